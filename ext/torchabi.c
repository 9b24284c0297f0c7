/* torch's C ABI by dlsym: symbol table, calibration of object layout, self-test. See torchabi.h. */
#include "torchabi.h"

#include "base/dylib.h"
#include "base/env.h"
#include "thunder/ir.h"

#include <malloc.h>
#include <string.h>

static int note(thx_abi *abi, const char *feature, const char *why) {
    PyObject *text = PyUnicode_FromString(why);
    int rc = text ? PyDict_SetItemString(abi->report, feature, text) : -1;
    Py_XDECREF(text);
    return rc;
}

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
#define THX_LOAD(name, ret, args)                                \
    {                                                            \
        void *symbol = th_dylib_symbol(abi->library, #name);     \
        memcpy(&abi->name, &symbol, sizeof symbol);              \
        if (!symbol) (void)note(abi, #name, "symbol not found"); \
    }
    THX_ABI_SYMBOLS(THX_LOAD)
#undef THX_LOAD
}

static PyObject *call_tensor(PyObject *torch, const char *function, const char *format, ...) {
    va_list list;
    va_start(list, format);
    PyObject *args = Py_VaBuildValue(format, list);
    va_end(list);
    PyObject *callable = args ? PyObject_GetAttrString(torch, function) : NULL;
    PyObject *result = callable ? PyObject_CallObject(callable, args) : NULL;
    Py_XDECREF(callable);
    Py_XDECREF(args);
    return result;
}

/* The place in a tensor object that holds its TensorImpl pointer, against torch's official handle. */
static int calibrate_borrow(thx_abi *abi, PyObject *torch) {
    PyObject *aoti = PyObject_GetAttrString(torch, "_C");
    PyObject *module = aoti ? PyObject_GetAttrString(aoti, "_aoti") : NULL;
    PyObject *official = module ? PyObject_GetAttrString(module, "unsafe_alloc_void_ptrs_from_tensors") : NULL;
    abi->steal = module ? PyObject_GetAttrString(module, "alloc_tensors_by_stealing_from_void_ptrs") : NULL;
    Py_XDECREF(module);
    Py_XDECREF(aoti);
    if (!official || !abi->steal) {
        PyErr_Clear();
        Py_XDECREF(official);
        return note(abi, "borrow", "torch._C._aoti has no handle functions");
    }
    size_t found = 0;
    for (int round = 0; round < 3; round++) {
        PyObject *tensor = call_tensor(torch, "zeros", "(i)", 3 + round);
        PyObject *list = tensor ? PyList_New(1) : NULL;
        if (!list) {
            Py_XDECREF(tensor);
            Py_DECREF(official);
            return -1;
        }
        PyList_SET_ITEM(list, 0, Py_NewRef(tensor));
        PyObject *capsules = PyObject_CallOneArg(official, list);
        Py_DECREF(list);
        PyObject *capsule = capsules ? PySequence_GetItem(capsules, 0) : NULL;
        void *handle = capsule ? PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)) : NULL;
        size_t place = 0, hits = 0;
        if (handle) {
            void *impl = *(void **)handle;
            size_t size = (size_t)Py_TYPE(tensor)->tp_basicsize;
            for (size_t at = sizeof(PyObject); at + sizeof(void *) <= size; at += sizeof(void *))
                if (*(void **)((char *)tensor + at) == impl) place = at, hits++;
            if (abi->aoti_torch_delete_tensor_object) abi->aoti_torch_delete_tensor_object(handle);
        }
        Py_XDECREF(capsule);
        Py_XDECREF(capsules);
        Py_DECREF(tensor);
        PyErr_Clear();
        if (hits != 1 || (round && place != found)) {
            Py_DECREF(official);
            return note(abi, "borrow", "no unique place for the TensorImpl pointer");
        }
        found = place;
    }
    Py_DECREF(official);
    abi->borrow = found;
    return 0;
}

/* Where the requires_grad byte lies: compare a plain tensor, one that requires grad, and that one switched off. */
static int calibrate_requires_grad(thx_abi *abi, PyObject *torch) {
    enum { IMPL_BYTES = 160, META_BYTES = 224 }; /* the first is at least that long, the second may end before */
    abi->autograd_meta = -1;
    int meta_at = -1, flag_at = -1;
    for (int round = 0; round < 3; round++) {
        PyObject *plain = call_tensor(torch, "zeros", "(i)", 2 + round);
        PyObject *grad = call_tensor(torch, "zeros", "(i)", 2 + round);
        PyObject *on = grad ? PyObject_CallMethod(grad, "requires_grad_", "O", Py_True) : NULL;
        int meta = -1, flag = -1;
        if (plain && on) {
            char *a = *(char **)thx_borrow(abi, plain), *b = *(char **)thx_borrow(abi, grad);
            for (int at = 8; at < IMPL_BYTES && meta < 0; at += 8)
                if (*(void **)(a + at) == NULL && *(void **)(b + at) != NULL) meta = at;
        }
        if (meta >= 0) {
            char before[META_BYTES], *m = *(char **)(*(char **)thx_borrow(abi, grad) + meta);
            int length = (int)malloc_usable_size(m);
            if (length > META_BYTES) length = META_BYTES;
            memcpy(before, m, (size_t)length);
            PyObject *off = PyObject_CallMethod(grad, "requires_grad_", "O", Py_False);
            int flips = 0;
            for (int at = 0; off && at < length; at++)
                if (before[at] == 1 && m[at] == 0) flag = at, flips++;
            if (flips != 1) flag = -1;
            Py_XDECREF(off);
        }
        Py_XDECREF(on);
        Py_XDECREF(grad);
        Py_XDECREF(plain);
        PyErr_Clear();
        if (flag < 0 || (round && (meta != meta_at || flag != flag_at)))
            return note(abi, "requires_grad", "no unique byte");
        meta_at = meta;
        flag_at = flag;
    }
    abi->autograd_meta = meta_at;
    abi->requires_grad = flag_at;
    return 0;
}

/* The words of two TensorImpls that differ in one bit: by place, that bit; else 0. */
static void one_bit_apart(const thx_abi *abi, PyObject *x, PyObject *y, uint64_t *bits, int n) {
    const uint64_t *a = *(uint64_t **)thx_borrow(abi, x), *b = *(uint64_t **)thx_borrow(abi, y);
    for (int i = 1; i < n; i++) {
        uint64_t differ = a[i] ^ b[i];
        bits[i] = differ & (differ - 1) ? 0 : differ;
    }
}

/* Where the keys lie that say that a tensor shows other values than its memory holds: compare views with and without.
 */
static int calibrate_lazy(thx_abi *abi, PyObject *torch) {
    enum { WORDS = 20, ROUNDS = 3 };
    uint64_t found[2][WORDS] = {{0}};
    abi->keys = -1;
    PyObject *dtype = PyObject_GetAttrString(torch, "complex64");
    for (int round = 0; round < ROUNDS; round++) {
        PyObject *base = call_tensor(torch, "zeros", "(i)", 2 + round), *z = NULL, *conj = NULL, *parts[2] = {NULL};
        if (base && dtype) z = PyObject_CallMethod(base, "to", "O", dtype);
        PyObject *plain = z ? PyObject_CallMethod(z, "view", "i", 2 + round) : NULL;
        conj = z ? PyObject_CallMethod(z, "conj", NULL) : NULL;
        if (plain && conj) {
            parts[0] = PyObject_GetAttrString(plain, "imag");
            parts[1] = PyObject_GetAttrString(conj, "imag");
        }
        uint64_t now[2][WORDS] = {{0}};
        if (parts[0] && parts[1]) {
            one_bit_apart(abi, plain, conj, now[0], WORDS);
            one_bit_apart(abi, parts[0], parts[1], now[1], WORDS);
        }
        for (int i = 0; i < WORDS; i++)
            for (int k = 0; k < 2; k++) found[k][i] = round && found[k][i] != now[k][i] ? 0 : now[k][i];
        Py_XDECREF(parts[0]);
        Py_XDECREF(parts[1]);
        Py_XDECREF(conj);
        Py_XDECREF(plain);
        Py_XDECREF(z);
        Py_XDECREF(base);
        PyErr_Clear();
    }
    Py_XDECREF(dtype);
    PyErr_Clear();
    int places = 0;
    for (int i = 0; i < WORDS; i++) {
        if (!found[0][i] || !found[1][i] || found[0][i] == found[1][i]) continue;
        abi->keys = 8 * i;
        abi->lazy = found[0][i] | found[1][i];
        places++;
    }
    if (places == 1) return 0;
    abi->keys = -1;
    return note(abi, "lazy", "no unique word");
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
    PyObject *x = call_tensor(torch, "ones", "((ii))", 3, 5), *view = x ? PyObject_GetAttrString(x, "T") : NULL;
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
    if (!ok && note(abi, "handles", "the self-test of borrowed handles failed") < 0) ok = false;
    if (abi->on && abi->aoti_torch_cpu_add_Tensor && abi->aoti_torch_cpu_mul_Tensor && abi->aoti_torch_empty_strided) {
        th_h h = thx_borrow(abi, view), sum = NULL;
        PyObject *result = !abi->aoti_torch_cpu_add_Tensor(h, h, 1.0, &sum) ? thx_wrap(abi, sum) : NULL;
        PyObject *want = result ? PyNumber_Add(view, view) : NULL;
        PyObject *same = want ? call_tensor(torch, "equal", "(OO)", result, want) : NULL;
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
            PyObject *same = result && want ? call_tensor(torch, "equal", "(OO)", result, want) : NULL;
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
    if (!th_env_flag("THUNDER_TORCH_ABI", true)) return note(abi, "handles", "switched off by THUNDER_TORCH_ABI=0");
    PyObject *path = library_path(torch, "libtorch_cpu.so");
    if (!path) return -1;
    th_status found = th_dylib_open(ctx, PyUnicode_AsUTF8(path), true, &abi->library);
    Py_DECREF(path);
    if (found != TH_OK) return note(abi, "handles", "libtorch_cpu is not loaded where expected");
    load_symbols(abi);
    if (!abi->aoti_torch_new_tensor_handle || !abi->aoti_torch_delete_tensor_object || !abi->aoti_torch_get_sizes ||
        !abi->aoti_torch_get_strides || !abi->aoti_torch_get_dim || !abi->aoti_torch_get_dtype ||
        !abi->aoti_torch_get_device_type || !abi->aoti_torch_get_device_index || !abi->aoti_torch_get_data_ptr ||
        !abi->aoti_torch_grad_mode_is_enabled || !abi->aoti_torch_get_storage_offset)
        return note(abi, "handles", "a basic tensor symbol is missing");
    abi->version = abi->aoti_torch_abi_version ? abi->aoti_torch_abi_version() : 0;
    if (calibrate_borrow(abi, torch) < 0) return -1;
    if (!abi->borrow) return 0;
    path = library_path(torch, "libtorch_python.so");
    th_dylib *python_library = NULL;
    if (path && th_dylib_open(ctx, PyUnicode_AsUTF8(path), true, &python_library) == TH_OK) {
        void *symbol = th_dylib_symbol(python_library, "_Z16THPVariable_WrapRKN2at10TensorBaseE");
        memcpy(&abi->wrap, &symbol, sizeof symbol);
    }
    Py_XDECREF(path);
    if (!abi->wrap && note(abi, "wrap", "THPVariable_Wrap not found: the slower list function is used") < 0) return -1;
    map_dtypes(abi);
    if (self_test(abi, torch) < 0) return -1;
    if (abi->on && calibrate_lazy(abi, torch) < 0) return -1;
    return abi->on ? calibrate_requires_grad(abi, torch) : 0;
}

void thx_abi_fini(thx_abi *abi) {
    Py_CLEAR(abi->report);
    Py_CLEAR(abi->steal); /* libraries stay loaded: torch itself never leaves a process */
}
