/* What torch keeps for a thread, read through its C++ functions that take nothing or one word.
 *
 * Their names are mangled, so each is looked up as text; each answer is compared with torch's own on a state that was
 * changed for it. One that is missing or disagrees leaves all of them to Python's functions.
 */
#include "torchabi_layout.h"

#include "thunder/ir.h"

#include <string.h>

static bool load(thx_abi *abi) {
    const struct {
        const char *name;
        void *to;
    } wanted[] = {
        {"_ZN3c104impl31tls_is_dispatch_keyset_includedENS_14DispatchKeySetE", &abi->keys_included},
        {"_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv", &abi->function_modes},
        {"_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", &abi->dispatch_modes},
        {"_ZN3c1031get_default_dtype_as_scalartypeEv", &abi->default_dtype},
        {"_ZN3c104impl31tls_is_dispatch_keyset_excludedENS_14DispatchKeySetE", &abi->keys_excluded},
        {"_ZN2at9functorch20getDynamicLayerStackEv", &abi->functorch_layers},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = th_dylib_symbol(abi->library, wanted[i].name);
        if (!symbol) return false;
        memcpy(wanted[i].to, &symbol, sizeof symbol);
    }
    return true;
}

/* Run lines of Python beside torch and call back in between. */
static bool told_by(PyObject *scope, const char *change, const char *back, bool (*seen)(thx_abi *, bool),
                    thx_abi *abi) {
    bool before = seen(abi, false);
    PyObject *done = PyRun_String(change, Py_file_input, scope, scope);
    bool during = done && seen(abi, true);
    Py_XDECREF(done);
    PyErr_Clear();
    done = PyRun_String(back, Py_file_input, scope, scope);
    bool after = done && seen(abi, false);
    Py_XDECREF(done);
    PyErr_Clear();
    return before && during && after;
}

static bool sees_functions(thx_abi *abi, bool on) { return abi->function_modes() == on; }
static bool sees_dispatches(thx_abi *abi, bool on) { return abi->dispatch_modes() == on; }
static bool sees_functorch(thx_abi *abi, bool on) { return thx_functorch_at_work(abi) == on; }
static bool sees_autocast(thx_abi *abi, bool on) { return abi->keys_excluded(abi->autocast_keys) != on; }
static bool sees_dtype(thx_abi *abi, bool on) {
    return abi->dtypes[abi->default_dtype() & 63] == (on ? TH_F64 : TH_F32);
}
static bool sees_inference(thx_abi *abi, bool on) { return abi->keys_included(abi->view_keys) != on; }

static bool sees_tracer(thx_abi *abi, bool on) { return abi->keys_included(abi->tracer_keys) == on; }

static uint64_t keys_of(PyObject *scope, const char *expression) {
    PyObject *keys = PyRun_String(expression, Py_eval_input, scope, scope);
    uint64_t found = keys ? PyLong_AsUnsignedLongLong(keys) : 0;
    Py_XDECREF(keys);
    if (PyErr_Occurred()) found = 0;
    PyErr_Clear();
    return found;
}

/* Autocast is off for a kind of device where its key is excluded, and all of these keys are by default: those that
 * Python has names for, and what is excluded now. One too many costs a question. */
static bool find_autocast_keys(thx_abi *abi, PyObject *scope) {
    abi->autocast_keys =
        keys_of(scope, "sum({C.DispatchKeySet(k).raw_repr() for n, k in C.DispatchKey.__members__.items() "
                       "if n.startswith('Autocast') and n != 'AutocastFunctionality'})");
    if (!abi->autocast_keys) return false;
    for (int bit = 0; bit < 64; bit++)
        if (abi->keys_excluded((uint64_t)1 << bit)) abi->autocast_keys |= (uint64_t)1 << bit;
    return true;
}

int thx_abi_find_state(thx_abi *abi, PyObject *torch) {
    PyObject *scope = PyDict_New(), *c = PyObject_GetAttrString(torch, "_C");
    if (!scope || !c || PyDict_SetItemString(scope, "torch", torch) < 0 || PyDict_SetItemString(scope, "C", c) < 0 ||
        PyDict_SetItemString(scope, "__builtins__", PyEval_GetBuiltins()) < 0) {
        Py_XDECREF(scope);
        Py_XDECREF(c);
        return -1;
    }
    Py_DECREF(c);
    const char *autocast = "torch.set_autocast_enabled('cpu', True)",
               *no_autocast = "torch.set_autocast_enabled('cpu', False)";
    const char *tracer = "C._dispatch_tls_set_dispatch_key_included('Tracer', True)",
               *no_tracer = "C._dispatch_tls_set_dispatch_key_included('Tracer', False)";
    abi->state =
        load(abi) && find_autocast_keys(abi, scope) &&
        told_by(scope, "C._push_on_torch_function_stack(object())", "C._pop_torch_function_stack()", sees_functions,
                abi) &&
        told_by(scope, "C._push_on_torch_dispatch_stack(object())", "C._pop_torch_dispatch_stack(None)",
                sees_dispatches, abi) &&
        told_by(scope, "C._functorch._vmap_increment_nesting(1, 'error')", "C._functorch._vmap_decrement_nesting()",
                sees_functorch, abi) &&
        told_by(scope, autocast, no_autocast, sees_autocast, abi) &&
        told_by(scope, "C._set_default_dtype(torch.float64)", "C._set_default_dtype(torch.float32)", sees_dtype, abi) &&
        (abi->view_keys = keys_of(scope, "C.DispatchKeySet(C.DispatchKey.ADInplaceOrView).raw_repr()")) &&
        told_by(scope, "m = C._InferenceMode(True)", "m.__exit__(None, None, None)", sees_inference, abi) &&
        (abi->tracer_keys = keys_of(scope, "C.DispatchKeySet(C._parse_dispatch_key('Tracer')).raw_repr()")) &&
        told_by(scope, tracer, no_tracer, sees_tracer, abi);
    Py_DECREF(scope);
    return abi->state ? 0
                      : thx_abi_note(abi, "state", "torch's functions for the state of a thread are missing or differ");
}
