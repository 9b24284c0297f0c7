/* Operations and values of a trace as Python objects: BoundSymbol and TensorProxy. Both only describe. */
#include "trace_object.h"

/* ---- lineages ---- */

static thx_lineage *retain(thx_lineage *line) {
    line->refs++;
    return line;
}

static void release(thx_lineage *line) {
    if (line && --line->refs == 0) PyMem_Free(line);
}

/* ---- proxies ---- */

PyObject *thx_proxy_new(thx_py_trace *o, th_val value) {
    if (thx_trace_number(o) < 0) return NULL;
    thx_proxy *p = (thx_proxy *)o->x->Proxy->tp_alloc(o->x->Proxy, 0);
    if (!p) return NULL;
    p->x = o->x;
    p->line = retain(o->line);
    p->name = o->t->values[value].name;
    p->type = o->t->values[value].type;
    return (PyObject *)p;
}

static void proxy_dealloc(thx_proxy *p) {
    PyTypeObject *type = Py_TYPE(p);
    release(p->line);
    type->tp_free((PyObject *)p);
    Py_DECREF(type);
}

static void mark_live(void *user, th_val *v) { ((bool *)user)[*v] = true; }

/* Is the value an input or defined by an operation? Passes and edits leave others in the table. */
static bool is_live(const thx_py_trace *o, th_val v) {
    for (uint32_t i = 0; i < o->t->ninputs; i++)
        if (o->t->inputs[i] == v) return true;
    th_opref def = o->t->values[v].def;
    bool *outs = def && def < o->t->nops ? PyMem_Calloc(o->t->nvalues, sizeof *outs) : NULL;
    if (outs) th_op_each_out((th_trace *)o->t, def, mark_live, outs);
    bool live = outs && outs[v];
    PyMem_Free(outs);
    return live;
}

th_val thx_proxy_find(const thx_py_trace *o, PyObject *object) {
    thx_proxy *p = (thx_proxy *)object;
    if (!Py_IS_TYPE(object, o->x->Proxy)) {
        PyErr_Format(PyExc_TypeError, "expected a TensorProxy of the trace, not %.100s", Py_TYPE(object)->tp_name);
        return 0;
    }
    for (th_val v = 1; p->line == o->line && v < o->t->nvalues; v++)
        if (o->t->values[v].name == p->name && is_live(o, v)) return v;
    PyErr_Format(PyExc_ValueError, "%s is not a value of this trace: it %s", th_str_get(o->x->ctx, p->name),
                 p->line == o->line ? "was removed" : "belongs to another one");
    return 0;
}

static const th_type *type_of(const thx_proxy *p) { return th_type_get(p->x->ctx, p->type); }

static PyObject *proxy_repr(thx_proxy *p) {
    char text[300];
    if (thx_check(p->x, th_type_print(p->x->ctx, p->type, text, sizeof text)) < 0) return NULL;
    return PyUnicode_FromFormat("<%s: \"%s\">", th_str_get(p->x->ctx, p->name), text);
}

static PyObject *proxy_compare(PyObject *a, PyObject *b, int op) {
    if ((op != Py_EQ && op != Py_NE) || Py_TYPE(a) != Py_TYPE(b)) Py_RETURN_NOTIMPLEMENTED;
    const thx_proxy *p = (thx_proxy *)a, *q = (thx_proxy *)b;
    return PyBool_FromLong((p->line == q->line && p->name == q->name) == (op == Py_EQ));
}

static Py_hash_t proxy_hash(thx_proxy *p) {
    Py_hash_t h = (Py_hash_t)(((uintptr_t)p->line >> 4) * 31 + p->name);
    return h == -1 ? -2 : h;
}

static PyObject *proxy_name(thx_proxy *p, void *unused) {
    (void)unused;
    return PyUnicode_FromString(th_str_get(p->x->ctx, p->name));
}

static PyObject *proxy_shape(thx_proxy *p, void *unused) {
    (void)unused;
    PyObject *shape = thx_int_tuple(type_of(p)->shape, type_of(p)->ndim);
    PyObject *size = shape ? PyObject_CallOneArg((PyObject *)p->x->Size, shape) : NULL;
    Py_XDECREF(shape);
    return size;
}

static PyObject *proxy_dtype(thx_proxy *p, void *unused) {
    (void)unused;
    PyObject *dtype = p->x->dtype_objects[type_of(p)->dtype];
    return Py_NewRef(dtype ? dtype : Py_None);
}

static PyObject *proxy_device(thx_proxy *p, void *unused) {
    (void)unused;
    return type_of(p)->device ? thx_device_object(p->x, type_of(p)->device) : Py_NewRef(Py_None);
}

static PyObject *proxy_ndim(thx_proxy *p, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(type_of(p)->ndim);
}

static PyObject *proxy_requires_grad(thx_proxy *p, void *unused) {
    (void)unused;
    return PyBool_FromLong(type_of(p)->flags & TH_TYPE_REQUIRES_GRAD);
}

static PyObject *proxy_numel(thx_proxy *p, PyObject *unused) {
    (void)unused;
    return PyLong_FromLongLong(th_type_numel(type_of(p)));
}

static PyObject *proxy_stride(thx_proxy *p, PyObject *args) {
    PyObject *dim = NULL;
    if (!PyArg_ParseTuple(args, "|O", &dim)) return NULL;
    PyObject *all = thx_int_tuple(type_of(p)->stride, type_of(p)->ndim);
    if (!all || !dim || dim == Py_None) return all;
    PyObject *one = PyObject_GetItem(all, dim);
    Py_DECREF(all);
    return one;
}

static PyMethodDef proxy_methods[] = {
    {"numel", (PyCFunction)proxy_numel, METH_NOARGS, "numel() -> int\n\nHow many elements it has."},
    {"stride", (PyCFunction)proxy_stride, METH_VARARGS, "stride(dim=None)\n\nStrides in elements, or one of them."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef proxy_getset[] = {
    {"name", (getter)proxy_name, NULL, "Its name in the trace's text.", NULL},
    {"shape", (getter)proxy_shape, NULL, "torch.Size", NULL},
    {"dtype", (getter)proxy_dtype, NULL, "torch.dtype", NULL},
    {"device", (getter)proxy_device, NULL, "torch.device", NULL},
    {"ndim", (getter)proxy_ndim, NULL, "How many dimensions it has.", NULL},
    {"requires_grad", (getter)proxy_requires_grad, NULL,
     "Inputs only: the program is differentiated with respect to it.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot proxy_slots[] = {
    {Py_tp_dealloc, proxy_dealloc},
    {Py_tp_repr, proxy_repr},
    {Py_tp_richcompare, proxy_compare},
    {Py_tp_hash, proxy_hash},
    {Py_tp_methods, proxy_methods},
    {Py_tp_getset, proxy_getset},
    {Py_tp_doc,
     "A value of a trace: what is known about a tensor before the program runs. Equal when the name is, within "
     "a trace and those made from it by edits."},
    {0, NULL},
};
static PyType_Spec proxy_spec = {"thunder._C.TensorProxy", sizeof(thx_proxy), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, proxy_slots};

/* ---- symbols ---- */

static PyObject *symbol_new(thx_py_trace *o, th_opref op) {
    thx_symbol *s = (thx_symbol *)o->x->Symbol->tp_alloc(o->x->Symbol, 0);
    if (!s) return NULL;
    s->trace = (thx_py_trace *)Py_NewRef((PyObject *)o);
    s->op = op;
    s->id = o->ids[op];
    return (PyObject *)s;
}

static void symbol_dealloc(thx_symbol *s) {
    PyTypeObject *type = Py_TYPE(s);
    Py_DECREF((PyObject *)s->trace);
    type->tp_free((PyObject *)s);
    Py_DECREF(type);
}

static const th_op *op_of(const thx_symbol *s) { return &s->trace->t->ops[s->op]; }

static const char *callee_of(const thx_symbol *s) {
    const th_op *op = op_of(s);
    const th_trace *t = s->trace->t;
    return th_str_get(t->ctx, op->callee_opaque ? t->opaques[op->callee_opaque].name : op->callee);
}

th_opref thx_symbol_find(const thx_py_trace *o, PyObject *object) {
    thx_symbol *s = (thx_symbol *)object;
    if (!Py_IS_TYPE(object, o->x->Symbol)) {
        PyErr_Format(PyExc_TypeError, "expected a BoundSymbol of the trace, not %.100s", Py_TYPE(object)->tp_name);
        return 0;
    }
    bool related = s->trace->line == o->line;
    for (th_opref op = 1; related && op < o->t->nops; op++)
        if (o->ids[op] == s->id) return op;
    PyErr_Format(PyExc_ValueError, "this %s is not an operation of this trace: it %s", callee_of(s),
                 related ? "was removed or replaced" : "belongs to another one");
    return 0;
}

static PyObject *as_proxy(void *user, th_val v) { return thx_proxy_new(user, v); }

static PyObject *from_node(thx_py_trace *o, th_node n) {
    if (!n) Py_RETURN_NONE;
    return thx_from_node(o->x, o->t, n, as_proxy, o);
}

static PyObject *symbol_repr(thx_symbol *s) {
    return PyUnicode_FromFormat("<BoundSymbol %s at %s:%u>", callee_of(s),
                                op_of(s)->file ? th_str_get(s->trace->x->ctx, op_of(s)->file) : "?", op_of(s)->line);
}

static PyObject *symbol_compare(PyObject *a, PyObject *b, int op) {
    if ((op != Py_EQ && op != Py_NE) || Py_TYPE(a) != Py_TYPE(b)) Py_RETURN_NOTIMPLEMENTED;
    const thx_symbol *s = (thx_symbol *)a, *z = (thx_symbol *)b;
    return PyBool_FromLong((s->trace->line == z->trace->line && s->id == z->id) == (op == Py_EQ));
}

static Py_hash_t symbol_hash(thx_symbol *s) {
    Py_hash_t h = (Py_hash_t)(((uintptr_t)s->trace->line >> 4) * 37 + s->id);
    return h == -1 ? -2 : h;
}

static PyObject *symbol_name(thx_symbol *s, void *unused) {
    (void)unused;
    return PyUnicode_FromString(callee_of(s));
}

static PyObject *symbol_sym(thx_symbol *s, void *unused) {
    (void)unused;
    return Py_XNewRef(thx_callable(s->trace->x, s->trace->t, op_of(s)));
}

static PyObject *symbol_args(thx_symbol *s, void *unused) {
    (void)unused;
    return from_node(s->trace, op_of(s)->args);
}

static PyObject *symbol_kwargs(thx_symbol *s, void *unused) {
    (void)unused;
    return op_of(s)->kwargs ? from_node(s->trace, op_of(s)->kwargs) : PyDict_New();
}

static PyObject *symbol_output(thx_symbol *s, void *unused) {
    (void)unused;
    return from_node(s->trace, op_of(s)->outs);
}

static PyObject *symbol_effects(thx_symbol *s, void *unused) {
    static const char *const names[] = {"random", "writes", "effect"};
    (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < 3; i++) {
        if (!(op_of(s)->effects >> i & 1)) continue;
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    PyObject *set = list ? PyFrozenSet_New(list) : NULL;
    Py_XDECREF(list);
    return set;
}

static PyObject *symbol_file(thx_symbol *s, void *unused) {
    (void)unused;
    if (!op_of(s)->file) Py_RETURN_NONE;
    return PyUnicode_FromString(th_str_get(s->trace->x->ctx, op_of(s)->file));
}

static PyObject *symbol_line(thx_symbol *s, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(op_of(s)->line);
}

typedef struct collecting {
    thx_py_trace *trace;
    PyObject *list; /* NULL once it failed */
} collecting;

static void collect(void *user, th_val *v) {
    collecting *c = user;
    PyObject *proxy = c->list ? thx_proxy_new(c->trace, *v) : NULL;
    if (!proxy || PyList_Append(c->list, proxy) < 0) Py_CLEAR(c->list);
    Py_XDECREF(proxy);
}

static PyObject *finish(collecting *c) {
    PyObject *tuple = c->list ? PyList_AsTuple(c->list) : NULL;
    Py_XDECREF(c->list);
    return tuple;
}

static PyObject *symbol_flat_args(thx_symbol *s, void *unused) {
    (void)unused;
    collecting c = {s->trace, PyList_New(0)};
    th_node_each_value(s->trace->t, op_of(s)->args, collect, &c);
    th_node_each_value(s->trace->t, op_of(s)->kwargs, collect, &c);
    return finish(&c);
}

static PyObject *symbol_flat_outs(thx_symbol *s, void *unused) {
    (void)unused;
    collecting c = {s->trace, PyList_New(0)};
    th_node_each_value(s->trace->t, op_of(s)->outs, collect, &c);
    return finish(&c);
}

static PyObject *symbol_writes(thx_symbol *s, void *unused) {
    (void)unused;
    collecting c = {s->trace, PyList_New(0)};
    for (uint32_t i = 0; i < op_of(s)->nwrites; i++) collect(&c, &s->trace->t->kids[op_of(s)->writes + i]);
    return finish(&c);
}

static PyGetSetDef symbol_getset[] = {
    {"name", (getter)symbol_name, NULL, "Dotted name of what is called: \"torch.nn.functional.linear\".", NULL},
    {"sym", (getter)symbol_sym, NULL, "The callable itself.", NULL},
    {"args", (getter)symbol_args, NULL, "Positional arguments: proxies and plain values, nested as in the call.", NULL},
    {"kwargs", (getter)symbol_kwargs, NULL, "Keyword arguments: a dict.", NULL},
    {"output", (getter)symbol_output, NULL, "What it returns: proxies, nested; None where nobody can use it.", NULL},
    {"effects", (getter)symbol_effects, NULL, "A frozenset of \"random\", \"writes\", \"effect\".", NULL},
    {"writes", (getter)symbol_writes, NULL, "Proxies of the values that it changes.", NULL},
    {"file", (getter)symbol_file, NULL, "File of the user's line, or None.", NULL},
    {"line", (getter)symbol_line, NULL, "The user's line, 0 when unknown.", NULL},
    {"flat_proxy_args", (getter)symbol_flat_args, NULL, "Proxies among the arguments, in order.", NULL},
    {"flat_proxy_outs", (getter)symbol_flat_outs, NULL, "Proxies among the results, in order.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot symbol_slots[] = {
    {Py_tp_dealloc, symbol_dealloc},
    {Py_tp_repr, symbol_repr},
    {Py_tp_richcompare, symbol_compare},
    {Py_tp_hash, symbol_hash},
    {Py_tp_getset, symbol_getset},
    {Py_tp_doc,
     "One operation of a trace. It serves as an address in every trace made from this one by edits, as long as "
     "the operation is there."},
    {0, NULL},
};
static PyType_Spec symbol_spec = {"thunder._C.BoundSymbol", sizeof(thx_symbol), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, symbol_slots};

/* ---- of a trace ---- */

PyObject *thx_trace_symbols(PyObject *trace, void *unused) {
    thx_py_trace *o = (thx_py_trace *)trace;
    (void)unused;
    PyObject *list = thx_trace_number(o) < 0 ? NULL : PyList_New(0);
    for (th_opref op = 1; list && op < o->t->nops; op++) {
        if (o->t->ops[op].kind != TH_OP_CALL) continue;
        PyObject *symbol = symbol_new(o, op);
        if (!symbol || PyList_Append(list, symbol) < 0) Py_CLEAR(list);
        Py_XDECREF(symbol);
    }
    return list;
}

PyObject *thx_trace_inputs(PyObject *trace, void *unused) {
    thx_py_trace *o = (thx_py_trace *)trace;
    (void)unused;
    collecting c = {o, PyList_New(0)};
    for (uint32_t i = 0; i < o->t->ninputs; i++) collect(&c, &o->t->inputs[i]);
    return finish(&c);
}

PyObject *thx_trace_output(PyObject *trace, void *unused) {
    (void)unused;
    return from_node((thx_py_trace *)trace, ((thx_py_trace *)trace)->t->result);
}

PyObject *thx_trace_saved(PyObject *trace, void *unused) {
    thx_py_trace *o = (thx_py_trace *)trace;
    PyObject *all = o->backward ? thx_trace_inputs(trace, unused) : thx_trace_output(trace, unused);
    if (!all) return NULL;
    Py_ssize_t n = o->nsaved && PyTuple_Check(all) ? PyTuple_GET_SIZE(all) : 0, first = o->backward ? 0 : n - o->nsaved;
    PyObject *part = n ? PyTuple_GetSlice(all, first, first + o->nsaved) : PyTuple_New(0);
    Py_DECREF(all);
    return part;
}

int thx_symbol_init(thx *x, PyObject *module) {
    x->Proxy = (PyTypeObject *)PyType_FromModuleAndSpec(module, &proxy_spec, NULL);
    x->Symbol = (PyTypeObject *)PyType_FromModuleAndSpec(module, &symbol_spec, NULL);
    return x->Proxy && x->Symbol && PyModule_AddObjectRef(module, "TensorProxy", (PyObject *)x->Proxy) == 0 &&
                   PyModule_AddObjectRef(module, "BoundSymbol", (PyObject *)x->Symbol) == 0
               ? 0
               : -1;
}
