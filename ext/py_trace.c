/* Traces as Python objects: text in, text out, passes. */
#include "callable.h"

#include <string.h>

typedef struct trace_object {
    PyObject_HEAD thx *x;
    th_trace *t;
} trace_object;

PyObject *thx_trace_object(thx *x, th_trace *t) {
    trace_object *o = (trace_object *)x->Trace->tp_alloc(x->Trace, 0);
    if (!o) {
        th_trace_free(t);
        return NULL;
    }
    o->x = x;
    o->t = t;
    return (PyObject *)o;
}

th_trace *thx_trace_copy(thx *x, PyObject *trace) {
    th_trace *copy = NULL;
    if (!PyObject_TypeCheck(trace, x->Trace))
        return PyErr_Format(PyExc_TypeError, "a thunder.Trace is needed, not %s", Py_TYPE(trace)->tp_name), NULL;
    return thx_check(x, th_trace_clone(((trace_object *)trace)->t, &copy)) < 0 ? NULL : copy;
}

static void trace_dealloc(trace_object *o) {
    PyTypeObject *type = Py_TYPE(o);
    th_trace_free(o->t);
    type->tp_free((PyObject *)o);
    Py_DECREF(type);
}

static PyObject *trace_str(trace_object *o) {
    char *text = NULL;
    size_t length = 0;
    if (thx_check(o->x, th_trace_print(o->t, &text, &length)) < 0) return NULL;
    PyObject *string = PyUnicode_DecodeUTF8(text, (Py_ssize_t)length, "replace");
    th_ctx_alloc(o->x->ctx, text, 0);
    return string;
}

static PyObject *trace_repr(trace_object *o) {
    return PyUnicode_FromFormat("<thunder trace %s: %u operations>", th_str_get(o->x->ctx, o->t->name), o->t->nops - 1);
}

static PyObject *trace_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    const char *text;
    Py_ssize_t length;
    if (kwargs && PyDict_GET_SIZE(kwargs)) return PyErr_Format(PyExc_TypeError, "Trace takes one argument: its text");
    if (!PyArg_ParseTuple(args, "s#", &text, &length)) return NULL;
    thx *x = PyType_GetModuleState(type);
    th_trace *t = NULL;
    if (thx_check(x, th_trace_parse(x->ctx, text, (size_t)length, &t)) < 0) return NULL;
    return thx_trace_object(x, t);
}

static PyObject *trace_passes(trace_object *o, PyObject *args) {
    const char *passes = NULL;
    long long fuel_left = -1;
    if (!PyArg_ParseTuple(args, "|zL", &passes, &fuel_left)) return NULL;
    th_trace *copy = NULL;
    if (thx_check(o->x, th_trace_clone(o->t, &copy)) < 0) return NULL;
    th_fuel fuel = {.left = fuel_left};
    if (thx_check(o->x, th_pipeline_run(copy, passes, &fuel, true, NULL, NULL)) < 0) {
        th_trace_free(copy);
        return NULL;
    }
    return thx_trace_object(o->x, copy);
}

typedef struct stages {
    thx *x;
    PyObject *list;
} stages;

static th_status keep_stage(void *user, th_trace *t, const char *pass, double ms) {
    stages *s = user;
    th_trace *copy = NULL;
    char note[96];
    th_status status = th_trace_clone(t, &copy);
    if (status != TH_OK) return status;
    snprintf(note, sizeof note, "after %s (%.3f ms)", pass, ms);
    copy->note = th_intern_z(s->x->ctx, note);
    PyObject *o = thx_trace_object(s->x, copy);
    int rc = o ? PyList_Append(s->list, o) : -1;
    Py_XDECREF(o);
    return rc < 0 ? TH_ENOMEM : TH_OK;
}

static PyObject *trace_stages(trace_object *o, PyObject *unused) {
    (void)unused;
    th_trace *copy = NULL, *first = NULL;
    stages s = {o->x, PyList_New(0)};
    if (!s.list) return NULL;
    if (thx_check(o->x, th_trace_clone(o->t, &copy)) < 0) goto fail;
    th_fuel fuel = {.left = -1};
    if (thx_check(o->x, th_trace_clone(o->t, &first)) < 0) goto fail;
    first->note = th_intern_z(o->x->ctx, "as captured");
    PyObject *captured = thx_trace_object(o->x, first);
    int rc = captured ? PyList_Append(s.list, captured) : -1;
    Py_XDECREF(captured);
    if (rc < 0 || thx_check(o->x, th_pipeline_run(copy, o->x->passes, &fuel, true, keep_stage, &s)) < 0) goto fail;
    th_trace_free(copy);
    return s.list;
fail:
    th_trace_free(copy);
    Py_DECREF(s.list);
    return NULL;
}

static PyObject *trace_equal(PyObject *a, PyObject *b, int op) {
    if ((op != Py_EQ && op != Py_NE) || Py_TYPE(a) != Py_TYPE(b)) Py_RETURN_NOTIMPLEMENTED;
    bool same = th_trace_equal(((trace_object *)a)->t, ((trace_object *)b)->t);
    return PyBool_FromLong(same == (op == Py_EQ));
}

static Py_hash_t trace_hash(trace_object *o) {
    Py_hash_t h = (Py_hash_t)th_trace_hash(o->t);
    return h == -1 ? -2 : h;
}

static PyObject *trace_namespace(trace_object *o, PyObject *unused) {
    (void)unused;
    PyObject *dict = PyDict_New();
    if (dict && PyDict_SetItemString(dict, "torch", o->x->torch) < 0) Py_CLEAR(dict);
    for (uint32_t i = 0; dict && i < o->t->nopaques; i++) {
        const th_opaque *q = &o->t->opaques[i];
        if (q->name && q->object && PyDict_SetItemString(dict, th_str_get(o->x->ctx, q->name), q->object) < 0)
            Py_CLEAR(dict);
    }
    return dict;
}

static PyObject *trace_operations(trace_object *o, PyObject *unused) {
    (void)unused;
    PyObject *list = PyList_New(0);
    for (th_opref i = 1; list && i < o->t->nops; i++) {
        const th_op *op = &o->t->ops[i];
        if (op->kind != TH_OP_CALL) continue;
        const char *name = op->callee ? th_str_get(o->x->ctx, op->callee)
                                      : th_str_get(o->x->ctx, o->t->opaques[op->callee_opaque].name);
        PyObject *s = PyUnicode_FromString(name ? name : "");
        if (!s || PyList_Append(list, s) < 0) Py_CLEAR(list);
        Py_XDECREF(s);
    }
    return list;
}

static PyObject *sizes_tuple(const int64_t *sizes, uint32_t n) {
    PyObject *tuple = PyTuple_New(n);
    for (uint32_t i = 0; tuple && i < n; i++) {
        PyObject *size = PyLong_FromLongLong(sizes[i]);
        if (size)
            PyTuple_SET_ITEM(tuple, i, size);
        else
            Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *describe_value(trace_object *o, th_val v) {
    const th_type *t = th_type_get(o->x->ctx, o->t->values[v].type);
    if (t->kind != TH_TYPE_TENSOR) Py_RETURN_NONE;
    return Py_BuildValue("NNON", sizes_tuple(t->shape, t->ndim), sizes_tuple(t->stride, t->ndim),
                         o->x->dtype_objects[t->dtype], thx_device_object(o->x, t->device));
}

static PyObject *trace_signature(trace_object *o, PyObject *unused) {
    (void)unused;
    const th_node_data *result = &o->t->nodes[o->t->result];
    PyObject *inputs = PyList_New(0), *results = PyList_New(0);
    for (uint32_t i = 0; inputs && i < o->t->ninputs; i++) {
        PyObject *item = describe_value(o, o->t->inputs[i]);
        if (!item || PyList_Append(inputs, item) < 0) Py_CLEAR(inputs);
        Py_XDECREF(item);
    }
    for (uint32_t i = 0; results && result->kind == TH_N_TUPLE && i < result->count; i++) {
        const th_node_data *d = &o->t->nodes[o->t->kids[result->u.kids + i]];
        PyObject *item = d->kind == TH_N_VALUE ? describe_value(o, d->u.ref) : Py_NewRef(Py_None);
        if (!item || PyList_Append(results, item) < 0) Py_CLEAR(results);
        Py_XDECREF(item);
    }
    if (inputs && results) return Py_BuildValue("NN", inputs, results);
    Py_XDECREF(inputs);
    Py_XDECREF(results);
    return NULL;
}

static PyMethodDef trace_methods[] = {
    {"run_passes", (PyCFunction)trace_passes, METH_VARARGS,
     "run_passes(names=None, fuel=-1) -> Trace\n\nA new trace after the comma-separated passes (None: the default "
     "pipeline); fuel bounds the number of rewrites."},
    {"stages", (PyCFunction)trace_stages, METH_NOARGS,
     "This trace and what each pass of the pipeline makes of it: a list."},
    {"namespace", (PyCFunction)trace_namespace, METH_NOARGS,
     "The names that the printed text needs to run with exec(): torch, and foreign Python objects."},
    {"signature", (PyCFunction)trace_signature, METH_NOARGS,
     "signature() -> (inputs, results): (shape, strides, dtype, device) of each that is a tensor, None of the others."},
    {"operations", (PyCFunction)trace_operations, METH_NOARGS, "The dotted names of the operations, in order."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot trace_slots[] = {
    {Py_tp_new, trace_new},
    {Py_tp_dealloc, trace_dealloc},
    {Py_tp_str, trace_str},
    {Py_tp_repr, trace_repr},
    {Py_tp_richcompare, trace_equal},
    {Py_tp_hash, trace_hash},
    {Py_tp_methods, trace_methods},
    {Py_tp_doc, "Trace(text)\n\nA program as a flat list of operations. str() gives the text, "
                "which is valid Python and which Trace() reads."},
    {0, NULL},
};
static PyType_Spec trace_spec = {"thunder._C.Trace", sizeof(trace_object), 0, Py_TPFLAGS_DEFAULT, trace_slots};

int thx_trace_init(thx *x, PyObject *module) {
    x->Trace = (PyTypeObject *)PyType_FromModuleAndSpec(module, &trace_spec, NULL);
    return x->Trace && PyModule_AddObjectRef(module, "Trace", (PyObject *)x->Trace) == 0 ? 0 : -1;
}
