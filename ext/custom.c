/* torch.autograd.Function in captured code.
 *
 * Function.apply is seen by no mode of torch's, so for the length of a capture ours stands in its place. A call that
 * takes part in autograd is recorded whole, as one operation; what its forward and its backward do is found out when it
 * is differentiated (derive.c), which runs both. Any other call runs the forward, whose operations are recorded one by
 * one.
 */
#include "ambient.h"
#include "capture.h"
#include "guards.h"

#include <string.h>

/* Function.apply bound to the class: what is recorded as the callee. The class keeps it, so that it is one object. */
static PyObject *bound_apply(thx *x, PyObject *cls) {
    PyObject *own = PyDict_GetItemString(((PyTypeObject *)cls)->tp_dict, "_thunder_apply");
    if (own && PyMethod_Check(own)) return Py_NewRef(own);
    PyObject *bound = PyMethod_New(x->function_apply, cls);
    if (bound && PyObject_SetAttrString(cls, "_thunder_apply", bound) < 0) Py_CLEAR(bound);
    return bound;
}

static PyObject *call_original(thx *x, PyObject *args, PyObject *kwargs) {
    x->applying++;
    PyObject *result = PyObject_Call(x->function_apply, args, kwargs);
    x->applying--;
    return result;
}

/* Reentrant checkpoint: (cls, run_function, preserve_rng_state, *args). The function's operations are recorded with the
 * mark that they are to run again. */
static PyObject *record_checkpoint(thx_recorder *r, PyObject *args) {
    PyObject *rest = PyTuple_GetSlice(args, 3, PyTuple_GET_SIZE(args));
    if (!rest) return NULL;
    r->recompute++;
    PyObject *result = PyObject_Call(PyTuple_GET_ITEM(args, 1), rest, NULL);
    r->recompute--;
    Py_DECREF(rest);
    return result;
}

/* Autocast casts inside of forward, and what `ctx` notes of it decides about backward: the operation switches it on by
 * itself. */
static PyObject *under_autocast(PyObject *bound) {
    PyObject *module = PyImport_ImportModule("thunder._kernels");
    PyObject *callee = module ? PyObject_CallMethod(module, "under_autocast", "O", bound) : NULL;
    Py_XDECREF(module);
    return callee;
}

static PyObject *record_whole(thx_recorder *r, PyObject *cls, PyObject *args, PyObject *kwargs) {
    thx *x = r->x;
    PyObject *bound = bound_apply(x, cls), *rest = PyTuple_GetSlice(args, 1, PyTuple_GET_SIZE(args)), *result = NULL;
    if (bound && thx_autocast_is_on(x)) Py_SETREF(bound, under_autocast(bound));
    PyObject *quiet = bound && rest ? thx_enter(x, x->modes_off) : NULL;
    thx_autocast cast;
    if (quiet && thx_autocast_off(x, &cast) == 0) {
        x->applying++;
        r->casting++;
        result = thx_record_call(r, bound, rest, kwargs);
        r->casting--;
        x->applying--;
        thx_autocast_on(x, &cast);
    }
    if (quiet) thx_leave(x, quiet);
    Py_XDECREF(bound);
    Py_XDECREF(rest);
    return result;
}

static int takes_part(thx_recorder *r, PyObject *args) {
    int on = thx_grad_mode(r->x);
    for (Py_ssize_t i = 1; on == 1 && i < PyTuple_GET_SIZE(args); i++) {
        PyObject *o = PyTuple_GET_ITEM(args, i);
        int flag = thx_is_tensor(r->x, o) ? thx_tensor_flag(r, o) : 0;
        if (flag) return flag;
    }
    return on < 0 ? -1 : 0;
}

static bool is_named(PyObject *cls, const char *name) { return strcmp(((PyTypeObject *)cls)->tp_name, name) == 0; }

static PyObject *apply(PyObject *module, PyObject *args, PyObject *kwargs) {
    thx *x = PyModule_GetState(module);
    thx_recorder *r = (thx_recorder *)x->active;
    PyObject *cls = PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : NULL;
    bool ours = r && !r->depth && !r->deriving && x->active_thread == PyThread_get_thread_ident();
    if (!ours || !cls || !PyType_Check(cls) || thx_under_functorch(x)) return call_original(x, args, kwargs);
    if (is_named(cls, "CheckpointFunction") && PyTuple_GET_SIZE(args) >= 3) return record_checkpoint(r, args);
    int part = takes_part(r, args);
    if (part < 0) return NULL;
    if (!part) return call_original(x, args, kwargs);
    if (is_named(cls, "BackwardHookFunction")) return thx_tie_module(r, args);
    return record_whole(r, cls, args, kwargs);
}

PyObject *thx_custom_class(thx *x, PyObject *callee) {
    PyObject *bound = PyMethod_Check(callee) ? Py_NewRef(callee) : PyObject_GetAttrString(callee, "_thunder_apply");
    PyErr_Clear();
    bool found = bound && PyMethod_Check(bound) && PyMethod_GET_FUNCTION(bound) == x->function_apply;
    PyObject *cls = found ? PyMethod_GET_SELF(bound) : NULL;
    Py_XDECREF(bound); /* the callee holds it */
    return cls;
}

struct thx_guards *thx_custom_state(thx *x, PyObject *cls) {
    PyObject *roots = PyList_New(1);
    if (!roots) return NULL;
    PyList_SET_ITEM(roots, 0, Py_NewRef(cls));
    thx_guards *state = thx_guards_new(x, roots);
    Py_DECREF(roots);
    return state;
}

static int refuse_change(void *user, PyObject *owner, PyObject *key, PyObject *before, PyObject *after) {
    (void)user, (void)owner, (void)before, (void)after;
    bool named = key && PyUnicode_Check(key);
    PyErr_Format(PyExc_RuntimeError, "its backward changes state%s%V, and later calls would not do that again",
                 named ? ", " : "", named ? key : NULL, "");
    return -1;
}

int thx_custom_check(thx *x, thx_guards *state) { return thx_guards_restore(x, state, refuse_change, NULL); }

static PyMethodDef methods[] = {{"apply", (PyCFunction)(void (*)(void))apply, METH_VARARGS | METH_KEYWORDS, NULL}};

int thx_custom_enter(thx *x) { return PyObject_SetAttrString(x->function_class, "apply", x->function_watch); }

void thx_custom_leave(thx *x) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject_SetAttrString(x->function_class, "apply", x->function_class_apply);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

int thx_custom_init(thx *x, PyObject *module) {
    PyObject *autograd = PyObject_GetAttrString(x->torch, "autograd");
    x->function_class = autograd ? PyObject_GetAttrString(autograd, "Function") : NULL;
    Py_XDECREF(autograd);
    if (!x->function_class) return -1;
    PyObject *own = PyDict_GetItemString(((PyTypeObject *)x->function_class)->tp_dict, "apply");
    x->function_class_apply = Py_XNewRef(own); /* a classmethod */
    x->function_apply = own ? PyObject_GetAttrString(own, "__func__") : NULL;
    PyObject *builtin = PyCFunction_New(methods, module);
    x->function_watch = builtin ? PyClassMethod_New(builtin) : NULL;
    Py_XDECREF(builtin);
    return x->function_apply && x->function_watch ? 0 : -1;
}
