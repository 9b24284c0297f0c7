/* Trace.python_callable(): a trace as a function of real tensors. */
#include "lower.h"
#include "program.h"
#include "trace_object.h"

typedef struct runner {
    PyObject_HEAD thx *x;
    thx_program p;
} runner;

static void runner_dealloc(runner *o) {
    PyTypeObject *type = Py_TYPE(o);
    thx_program_fini(&o->p);
    type->tp_free((PyObject *)o);
    Py_DECREF(type);
}

PyObject *thx_trace_callable(PyObject *trace, PyObject *unused) {
    thx_py_trace *from = (thx_py_trace *)trace;
    thx *x = from->x;
    (void)unused;
    runner *o = (runner *)x->TraceCallable->tp_alloc(x->TraceCallable, 0);
    if (!o) return NULL;
    o->x = x;
    if (thx_check(x, th_trace_clone(from->t, &o->p.t)) < 0 ||
        thx_check(x, th_pipeline_run(o->p.t, "lifetime", NULL, x->verify, NULL, NULL)) < 0) {
        Py_DECREF((PyObject *)o);
        return NULL;
    }
    if (thx_program_lower(x, &o->p, false) < 0) {
        Py_DECREF((PyObject *)o);
        return NULL;
    }
    return (PyObject *)o;
}

/* ---- a call ---- */

static int check_input(const runner *o, th_val v, PyObject *tensor) {
    thx *x = o->x;
    thx_meta meta;
    char expected[300], given[300];
    const char *name = th_str_get(x->ctx, o->p.t->values[v].name);
    if (!thx_is_tensor(x, tensor)) {
        PyErr_Format(PyExc_TypeError, "%s must be a tensor, not %.100s", name, Py_TYPE(tensor)->tp_name);
        return -1;
    }
    if (thx_read_meta(x, tensor, false, &meta) < 0) return -1;
    th_typeref type = thx_meta_type(x, &meta), wanted = th_type_set_grad(x->ctx, o->p.t->values[v].type, false);
    if (!type) return -1;
    type = th_type_set_grad(x->ctx, type, false);
    if (type == wanted) return 0;
    if (thx_check(x, th_type_print(x->ctx, wanted, expected, sizeof expected)) < 0 ||
        thx_check(x, th_type_print(x->ctx, type, given, sizeof given)) < 0)
        return -1;
    PyErr_Format(PyExc_ValueError, "%s must be \"%s\", not \"%s\"", name, expected, given);
    return -1;
}

typedef struct results {
    const runner *o;
    th_slot *slots;
} results;

static PyObject *result_value(void *user, th_val v) {
    results *r = user;
    return Py_XNewRef(thx_slot_object(r->o->x, &r->slots[r->o->p.slot_of[v]]));
}

/* As thx_program_run. */
static int run_once(runner *o, PyObject *args, PyObject **result) {
    thx *x = o->x;
    th_slot *slots = PyMem_Calloc(o->p.plan->nslots + 1, sizeof *slots);
    if (!slots) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < o->p.t->ninputs; i++) {
        PyObject *tensor = PyTuple_GET_ITEM(args, i);
        slots[i] = (th_slot){.object = tensor, .handle = x->abi.on ? thx_borrow(&x->abi, tensor) : NULL};
    }
    const th_plan *plan = o->p.plan;
    int rc = thx_program_run(x, &o->p, slots);
    if (rc == 0) {
        results r = {o, slots};
        *result = o->p.t->result ? thx_from_node(x, o->p.t, o->p.t->result, result_value, &r) : Py_NewRef(Py_None);
        th_frame frame = {.slots = slots, .user = x};
        th_plan_clear(plan, &frame);
    }
    PyMem_Free(slots);
    return rc;
}

static int set_grad(thx *x, bool on) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *done = PyObject_CallOneArg(x->set_grad, on ? Py_True : Py_False);
    Py_XDECREF(done);
    if (done || type) PyErr_Restore(type, value, trace);
    return done ? 0 : -1;
}

static PyObject *runner_call(runner *o, PyObject *args, PyObject *kwargs) {
    const th_trace *t = o->p.t;
    PyObject *result = NULL;
    if ((kwargs && PyDict_GET_SIZE(kwargs)) || PyTuple_GET_SIZE(args) != t->ninputs)
        return PyErr_Format(PyExc_TypeError, "this trace takes %u positional arguments", t->ninputs);
    for (uint32_t i = 0; i < t->ninputs; i++)
        if (check_input(o, t->inputs[i], PyTuple_GET_ITEM(args, i)) < 0) return NULL;
    int grad = thx_grad_mode(o->x);
    if (grad < 0 || (grad && set_grad(o->x, false) < 0)) return NULL;
    for (int rc = 1; rc == 1;) rc = run_once(o, args, &result);
    if (grad && set_grad(o->x, true) < 0) Py_CLEAR(result);
    return result;
}

static PyType_Slot runner_slots[] = {
    {Py_tp_dealloc, runner_dealloc},
    {Py_tp_call, runner_call},
    {Py_tp_doc, "A trace as a function of tensors: see Trace.python_callable()."},
    {0, NULL},
};
static PyType_Spec runner_spec = {"thunder._C.TraceCallable", sizeof(runner), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, runner_slots};

int thx_run_trace_init(thx *x, PyObject *module) {
    x->TraceCallable = (PyTypeObject *)PyType_FromModuleAndSpec(module, &runner_spec, NULL);
    return x->TraceCallable ? 0 : -1;
}
