/* See ambient.h. */
#include "ambient.h"

#include "capture.h"

#include <string.h>

static long call_long(PyObject *builtin) {
    PyObject *o = PyObject_CallNoArgs(builtin);
    long n = o ? PyLong_AsLong(o) : -1;
    Py_XDECREF(o);
    return n;
}

static int call_flag(PyObject *builtin) {
    PyObject *o = PyObject_CallNoArgs(builtin);
    Py_XDECREF(o);
    return o ? o == Py_True : -1;
}

static int read_autocast(thx *x, thx_ambient *a) {
    static const char *const devices[] = {"cpu", "cuda"};
    for (int i = 0; i < 2; i++) {
        PyObject *on = PyObject_CallFunction(x->autocast_enabled, "s", devices[i]);
        PyObject *dtype = on ? PyObject_CallFunction(x->autocast_dtype, "s", devices[i]) : NULL;
        if (!dtype) { /* a build without that device type */
            PyErr_Clear();
            Py_XDECREF(on);
            continue;
        }
        *(i ? &a->autocast_gpu : &a->autocast_cpu) = on == Py_True;
        if (on == Py_True) *(i ? &a->gpu_dtype : &a->cpu_dtype) = dtype;
        Py_DECREF(on);
        Py_DECREF(dtype);
    }
    return 0;
}

int thx_has_modes(thx *x) {
    if (x->abi.state) return x->abi.function_modes() > 0 || x->abi.dispatch_modes() > 0;
    long functions = call_long(x->f_stack_len), dispatches = call_long(x->d_stack_len);
    return functions < 0 || dispatches < 0 ? -1 : functions || dispatches;
}

static int read_by_python(thx *x, thx_ambient *a) {
    int grad = thx_grad_mode(x);
    int inference = call_flag(x->inference), autocast = call_flag(x->any_autocast);
    PyObject *dtype = PyObject_CallNoArgs(x->default_dtype);
    Py_XDECREF(dtype);
    if (grad < 0 || inference < 0 || autocast < 0 || !dtype) return -1;
    a->grad = grad;
    a->inference = inference;
    a->autocast = autocast;
    a->default_dtype = dtype;
    return 0;
}

static int read_by_abi(thx *x, thx_ambient *a) {
    const thx_abi *abi = &x->abi;
    a->grad = abi->aoti_torch_grad_mode_is_enabled();
    int inference = abi->keys_included(abi->view_keys) ? 0 : call_flag(x->inference);
    int autocast = abi->keys_excluded(abi->autocast_keys) ? 0 : call_flag(x->any_autocast);
    if (inference < 0 || autocast < 0) return -1;
    a->inference = inference;
    a->autocast = autocast;
    a->default_dtype = x->dtype_objects[abi->dtypes[abi->default_dtype() & 63]];
    return 0;
}

/* torch.autograd.forward_ad: its tensors carry tangents, which no program computes. */
static bool has_tangents(thx *x) {
    PyObject *level = PyDict_GetItemWithError(x->forward_ad, x->n.current_level);
    return level && PyLong_Check(level) && PyLong_AsLong(level) >= 0;
}

/* torch.jit.trace notes operations that pass torch's dispatcher; ours would be constants of its graph. */
static int is_traced(thx *x) { return x->abi.state ? x->abi.keys_included(x->abi.tracer_keys) : call_flag(x->tracing); }

int thx_ambient_read(thx *x, thx_ambient *a) {
    memset(a, 0, sizeof *a);
    if (thx_under_functorch(x) || has_tangents(x)) return 1;
    int modes = thx_has_modes(x);
    if (!modes) modes = is_traced(x);
    if (modes) return modes;
    if ((x->abi.state ? read_by_abi(x, a) : read_by_python(x, a)) < 0) return -1;
    return a->autocast ? read_autocast(x, a) : 0;
}

/* ---- autocast ---- */

static int set_autocast(thx *x, const char *device, bool on) {
    PyObject *done = PyObject_CallFunction(x->set_autocast, "sO", device, on ? Py_True : Py_False);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

bool thx_autocast_is_on(thx *x) {
    if (x->abi.state && x->abi.keys_excluded(x->abi.autocast_keys)) return false;
    int on = call_flag(x->any_autocast);
    PyErr_Clear();
    return on == 1;
}

int thx_autocast_off(thx *x, thx_autocast *was) {
    thx_ambient a = {0};
    *was = (thx_autocast){false, false};
    if (!thx_autocast_is_on(x)) return 0;
    if (read_autocast(x, &a) < 0) return -1;
    *was = (thx_autocast){a.autocast_cpu, a.autocast_gpu};
    return (was->cpu && set_autocast(x, "cpu", false) < 0) || (was->gpu && set_autocast(x, "cuda", false) < 0) ? -1 : 0;
}

void thx_autocast_on(thx *x, const thx_autocast *was) {
    if (!was->cpu && !was->gpu) return;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (was->cpu) set_autocast(x, "cpu", true);
    if (was->gpu) set_autocast(x, "cuda", true);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}
