/* torch's C ABI by dlsym: symbol table and self-test. See torchabi.h. */
#include "torchabi_layout.h"

#include "base/dylib.h"
#include "base/env.h"
#include "thunder/ir.h"

#include <string.h>

/* Path of lib/<name> beside torch's __init__.py. */
static PyObject *library_path(PyObject *torch, const char *name) {
    PyObject *paths = PyObject_GetAttrString(torch, "__path__");
    PyObject *first = paths ? PySequence_GetItem(paths, 0) : NULL;
    PyObject *path = first ? PyUnicode_FromFormat("%U/lib/%s", first, name) : NULL;
    Py_XDECREF(first);
    Py_XDECREF(paths);
    return path;
}

static void load_symbols(thx_abi *abi) {
#define THX_LOAD(name, ret, args)                                        \
    {                                                                    \
        void *symbol = th_dylib_symbol(abi->library, #name);             \
        memcpy(&abi->name, &symbol, sizeof symbol);                      \
        if (!symbol) (void)thx_abi_note(abi, #name, "symbol not found"); \
    }
    THX_ABI_SYMBOLS(THX_LOAD)
#undef THX_LOAD
}

/* Both ways between our dtypes and torch's numbers, which the library itself tells. */
static void map_dtypes(thx_abi *abi) {
    memset(abi->scalar_types, -1, sizeof abi->scalar_types);
    for (int d = 1; d < TH_DTYPE_COUNT; d++) {
        char name[64];
        int32_t (*number)(void) = NULL;
        void *symbol = NULL;
        for (int newer = 0; newer < 2 && !symbol; newer++) {
            snprintf(name, sizeof name, "%storch_dtype_%s", newer ? "" : "aoti_",
                     th_dtype_get((th_dtype)d)->torch_name);
            symbol = th_dylib_symbol(abi->library, name);
        }
        memcpy(&number, &symbol, sizeof number);
        int32_t n = number ? number() : -1;
        if (n >= 0 && n < 64) {
            abi->scalar_types[d] = n;
            abi->dtypes[n] = (uint8_t)d;
        }
    }
}

PyObject *thx_wrap(const thx_abi *abi, th_h handle) {
    if (abi->wrap) {
        PyObject *tensor = abi->wrap(handle);
        abi->aoti_torch_delete_tensor_object(handle);
        return tensor;
    }
    PyObject *capsule = PyCapsule_New(handle, NULL, NULL), *list = capsule ? PyList_New(1) : NULL;
    if (!list) {
        Py_XDECREF(capsule);
        abi->aoti_torch_delete_tensor_object(handle);
        return NULL;
    }
    PyList_SET_ITEM(list, 0, capsule);
    PyObject *tensors = PyObject_CallOneArg(abi->steal, list);
    Py_DECREF(list);
    PyObject *tensor = tensors ? PySequence_GetItem(tensors, 0) : NULL;
    Py_XDECREF(tensors);
    return tensor;
}

/* Every trick against torch's own answer, on a tensor that is neither contiguous nor square. */
static int self_test(thx_abi *abi, PyObject *torch) {
    PyObject *x = thx_abi_call(torch, "ones", "((ii))", 3, 5), *view = x ? PyObject_GetAttrString(x, "T") : NULL;
    bool ok = false;
    if (view) {
        th_h h = thx_borrow(abi, view), made = NULL;
        int64_t dim = 0, *sizes = NULL, *strides = NULL;
        int32_t dtype = -1;
        ok = !abi->aoti_torch_get_dim(h, &dim) && dim == 2 && !abi->aoti_torch_get_sizes(h, &sizes) && sizes[0] == 5 &&
             sizes[1] == 3 && !abi->aoti_torch_get_strides(h, &strides) && strides[0] == 1 && strides[1] == 5 &&
             !abi->aoti_torch_get_dtype(h, &dtype) && abi->dtypes[dtype & 63] == TH_F32;
        if (ok && !abi->aoti_torch_new_tensor_handle(h, &made)) {
            PyObject *same = thx_wrap(abi, made);
            ok = same == view;
            Py_XDECREF(same);
        }
    }
    PyErr_Clear();
    abi->on = ok;
    if (!ok && thx_abi_note(abi, "handles", "the self-test of borrowed handles failed") < 0) ok = false;
    if (abi->on && abi->aoti_torch_cpu_add_Tensor && abi->aoti_torch_cpu_mul_Tensor && abi->aoti_torch_empty_strided) {
        th_h h = thx_borrow(abi, view), sum = NULL;
        PyObject *result = !abi->aoti_torch_cpu_add_Tensor(h, h, 1.0, &sum) ? thx_wrap(abi, sum) : NULL;
        PyObject *want = result ? PyNumber_Add(view, view) : NULL;
        PyObject *same = want ? thx_abi_call(torch, "equal", "(OO)", result, want) : NULL;
        abi->shims = same == Py_True;
        Py_XDECREF(same);
        Py_XDECREF(want);
        Py_XDECREF(result);
        PyErr_Clear();
    }
    if (abi->on && abi->torch_call_dispatcher && abi->torch_new_stable_ivalue && abi->torch_new_list_reserve_size &&
        abi->torch_list_push_back) {
        th_h copy = NULL;
        th_cell stack[2] = {0};
        abi->aoti_torch_new_tensor_handle(thx_borrow(abi, view), &copy);
        stack[0] = (th_cell)(uintptr_t)copy;
        if (!abi->torch_call_dispatcher("aten::neg", "", stack, abi->version)) {
            PyObject *result = thx_wrap(abi, (th_h)(uintptr_t)stack[0]);
            PyObject *want = PyNumber_Negative(view);
            PyObject *same = result && want ? thx_abi_call(torch, "equal", "(OO)", result, want) : NULL;
            abi->dispatcher = same == Py_True;
            Py_XDECREF(same);
            Py_XDECREF(want);
            Py_XDECREF(result);
        }
        PyErr_Clear();
    }
    Py_XDECREF(view);
    Py_XDECREF(x);
    return 0;
}

int thx_abi_init(thx_abi *abi, th_ctx *ctx, PyObject *torch) {
    abi->report = PyDict_New();
    abi->autograd_meta = -1;
    if (!abi->report) return -1;
    if (!th_env_flag("THUNDER_TORCH_ABI", true))
        return thx_abi_note(abi, "handles", "switched off by THUNDER_TORCH_ABI=0");
    PyObject *path = library_path(torch, "libtorch_cpu.so");
    if (!path) return -1;
    th_status found = th_dylib_open(ctx, PyUnicode_AsUTF8(path), true, &abi->library);
    Py_DECREF(path);
    if (found != TH_OK) return thx_abi_note(abi, "handles", "libtorch_cpu is not loaded where expected");
    load_symbols(abi);
    if (!abi->aoti_torch_new_tensor_handle || !abi->aoti_torch_delete_tensor_object || !abi->aoti_torch_get_sizes ||
        !abi->aoti_torch_get_strides || !abi->aoti_torch_get_dim || !abi->aoti_torch_get_dtype ||
        !abi->aoti_torch_get_device_type || !abi->aoti_torch_get_device_index || !abi->aoti_torch_get_data_ptr ||
        !abi->aoti_torch_grad_mode_is_enabled || !abi->aoti_torch_get_storage_offset)
        return thx_abi_note(abi, "handles", "a basic tensor symbol is missing");
    abi->version = abi->aoti_torch_abi_version ? abi->aoti_torch_abi_version() : 0;
    if (thx_abi_find_impl(abi, torch) < 0) return -1;
    if (!abi->borrow) return 0;
    path = library_path(torch, "libtorch_python.so");
    th_dylib *python_library = NULL;
    if (path && th_dylib_open(ctx, PyUnicode_AsUTF8(path), true, &python_library) == TH_OK) {
        void *symbol = th_dylib_symbol(python_library, "_Z16THPVariable_WrapRKN2at10TensorBaseE");
        memcpy(&abi->wrap, &symbol, sizeof symbol);
    }
    Py_XDECREF(path);
    if (!abi->wrap && thx_abi_note(abi, "wrap", "THPVariable_Wrap not found: the slower list function is used") < 0)
        return -1;
    map_dtypes(abi);
    if (self_test(abi, torch) < 0) return -1;
    return !abi->on || thx_abi_find_layout(abi, torch) < 0 ? -abi->on : thx_abi_find_state(abi, torch);
}

void thx_abi_fini(thx_abi *abi) {
    Py_CLEAR(abi->report);
    Py_CLEAR(abi->steal); /* libraries stay loaded: torch itself never leaves a process */
}
