/* Traces as Python objects: text in, text out, passes. */
#include "callable.h"

#include "trace_object.h"

#include <string.h>

typedef thx_py_trace trace_object;

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

thx_py_trace *thx_as_trace(thx *x, PyObject *o) {
    if (Py_IS_TYPE(o, x->Trace)) return (trace_object *)o;
    PyErr_Format(PyExc_TypeError, "expected a thunder.Trace, not %.100s", Py_TYPE(o)->tp_name);
    return NULL;
}

int thx_trace_number(thx_py_trace *o) {
    if (!o->line) {
        o->line = PyMem_Calloc(1, sizeof *o->line);
        if (!o->line) return PyErr_NoMemory(), -1;
        o->line->refs = o->line->next_id = 1;
    }
    if (o->ids) return 0;
    o->ids = PyMem_Calloc(o->t->nops, sizeof *o->ids);
    for (th_opref op = 1; o->ids && op < o->t->nops; op++) o->ids[op] = o->line->next_id++;
    return o->ids ? 0 : (PyErr_NoMemory(), -1);
}

static void trace_dealloc(trace_object *o) {
    PyTypeObject *type = Py_TYPE(o);
    th_trace_free(o->t);
    PyMem_Free(o->ids);
    Py_XDECREF(o->edit_result);
    if (o->line && --o->line->refs == 0) PyMem_Free(o->line);
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

/* The packages that callees begin with: torch, thunder, those of functions that operators stand for. */
static int add_packages(const trace_object *o, PyObject *dict) {
    for (th_opref i = 1; i < o->t->nops; i++) {
        const char *callee = o->t->ops[i].callee ? th_str_get(o->x->ctx, o->t->ops[i].callee) : "";
        const char *dot = strchr(callee, '.');
        PyObject *name = dot ? PyUnicode_FromStringAndSize(callee, dot - callee) : NULL;
        if (dot && !name) return -1;
        PyObject *package = name && !PyDict_Contains(dict, name) ? PyImport_Import(name) : NULL;
        int rc = package ? PyDict_SetItem(dict, name, package) : PyErr_Occurred() ? -1 : 0;
        Py_XDECREF(package);
        Py_XDECREF(name);
        if (rc < 0) return -1;
    }
    return 0;
}

static PyObject *trace_namespace(trace_object *o, PyObject *unused) {
    (void)unused;
    PyObject *dict = PyDict_New();
    if (dict && PyDict_SetItemString(dict, "torch", o->x->torch) < 0) Py_CLEAR(dict);
    if (dict && add_packages(o, dict) < 0) Py_CLEAR(dict);
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

static PyObject *trace_edit_result(trace_object *o, void *unused) {
    (void)unused;
    return Py_NewRef(o->edit_result ? o->edit_result : Py_None);
}

static PyGetSetDef trace_getset[] = {
    {"bound_symbols", thx_trace_symbols, NULL, "Its operations in order: a list of BoundSymbol.", NULL},
    {"inputs", thx_trace_inputs, NULL, "Its inputs in order: a tuple of TensorProxy.", NULL},
    {"output", thx_trace_output, NULL, "What it returns: proxies, nested.", NULL},
    {"saved", thx_trace_saved, NULL,
     "What a forward trace saves for the backward one: the last of its results, or the first inputs of the backward.",
     NULL},
    {"edit_result", (getter)trace_edit_result, NULL,
     "What the function of the edit that made this trace returned, in proxies of this trace; else None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef trace_methods[] = {
    {"run_passes", (PyCFunction)trace_passes, METH_VARARGS,
     "run_passes(names=None, fuel=-1) -> Trace\n\nA new trace after the comma-separated passes (None: the default "
     "pipeline); fuel bounds the number of rewrites."},
    {"stages", (PyCFunction)trace_stages, METH_NOARGS,
     "This trace and what each pass of the pipeline makes of it: a list."},
    {"namespace", (PyCFunction)trace_namespace, METH_NOARGS,
     "The names that the printed text needs to run with exec(): torch, and foreign Python objects."},
    {"operations", (PyCFunction)trace_operations, METH_NOARGS, "The dotted names of the operations, in order."},
    {"python_callable", thx_trace_callable, METH_NOARGS,
     "python_callable() -> callable\n\nRuns the trace on real tensors, one positional argument for each input, without "
     "gradients. At a call: TypeError or ValueError for an argument that is not what the input's type says."},
    {"replace", (PyCFunction)thx_edit_replace, METH_VARARGS,
     "replace(symbol, fn) -> Trace\n\nfn, a function of torch code, is recorded with the operation's arguments; what "
     "it "
     "returns replaces the operation's results: the same structure, and for each the same shape, strides, dtype and "
     "device. A real tensor that it returns or uses becomes a constant.\n\nRaises ValueError: the operation is not in "
     "this trace, or the results differ."},
    {"insert_before", (PyCFunction)thx_edit_insert_before, METH_VARARGS,
     "insert_before(symbol, fn, *args) -> Trace\n\nfn(*args) is recorded before the operation, or at the start where "
     "symbol is None. args may hold proxies; edit_result of the new trace has what fn returned."},
    {"insert_after", (PyCFunction)thx_edit_insert_after, METH_VARARGS,
     "insert_after(symbol, fn, *args) -> Trace\n\nThe same after the operation, or at the end where symbol is None."},
    {"remove", (PyCFunction)thx_edit_remove, METH_O,
     "remove(symbol) -> Trace\n\nWithout the operation. Raises ValueError: something uses its results."},
    {"replace_uses", (PyCFunction)thx_edit_replace_uses, METH_VARARGS,
     "replace_uses(old, new) -> Trace\n\nEvery operation after the definition of new, and the result, use new instead "
     "of old. Raises ValueError: their types differ."},
    {"map_output", (PyCFunction)thx_edit_map_output, METH_VARARGS,
     "map_output(index, fn) -> Trace\n\nThe trace returns fn of what it returned at that place, computed after its "
     "last use. "
     "The type may change."},
    {"map_input", (PyCFunction)thx_edit_map_input, METH_VARARGS,
     "map_input(proxy, fn, like=None) -> Trace\n\nThe input comes with the type of like, a proxy or a tensor, and "
     "fn(input), computed before the first use, serves everything that used it: same shape, strides, dtype and device "
     "as the input had."},
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
    {Py_tp_getset, trace_getset},
    {Py_tp_doc, "Trace(text)\n\nA program as a flat list of operations. str() gives the text, "
                "which is valid Python and which Trace() reads."},
    {0, NULL},
};
static PyType_Spec trace_spec = {"thunder._C.Trace", sizeof(trace_object), 0, Py_TPFLAGS_DEFAULT, trace_slots};

int thx_trace_init(thx *x, PyObject *module) {
    x->Trace = (PyTypeObject *)PyType_FromModuleAndSpec(module, &trace_spec, NULL);
    return x->Trace && PyModule_AddObjectRef(module, "Trace", (PyObject *)x->Trace) == 0 &&
                   thx_symbol_init(x, module) == 0 && thx_run_trace_init(x, module) == 0
               ? 0
               : -1;
}
