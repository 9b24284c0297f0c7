/* Edits of a trace: each makes a new trace and verifies it.
 *
 *     t1 = torch.mul(x, w)                          t1 = torch.mul(x, w)
 *     t2 = torch.nn.functional.gelu(t1)      ->     t3 = torch.sigmoid(t1)               replace(gelu, quick_gelu)
 *     return t2                                     t2 = torch.mul(t1, t3)
 *                                                   return t2
 *
 * The function runs on fakes (record.c); what was recorded is pasted into a copy of the trace, whose operations are
 * rewritten around it (passes/pass.h). Values keep their numbers and names, and what replaces a value takes its name.
 * Fresh names are fresh in the whole lineage, so a name means one value in all of its traces.
 */
#include "capture.h"
#include "trace_object.h"

#include "passes/pass.h"

#include <string.h>

typedef struct edit {
    thx *x;
    thx_py_trace *from;
    th_trace *t;   /* the copy that becomes the new trace */
    th__rewrite w; /* of t */
    uint64_t *ids; /* by operation of t */
    uint32_t nids, cap_ids;
    thx_excerpt e;
    th_val *pasted; /* by value of the excerpt: the value of t */
    th_str file;    /* the user's line that pasted operations belong to */
    uint32_t line;
    PyObject *fn;
} edit;

/* ---- begin, end ---- */

void thx_drop_dels(th_trace *t) {
    uint32_t n = 1;
    for (th_opref o = 1; o < t->nops; o++)
        if (t->ops[o].kind != TH_OP_DEL) t->ops[n++] = t->ops[o];
    t->nops = n;
    for (th_opref o = 1; o < n; o++) th__node_define(t, t->ops[o].outs, o);
}

static int begin(edit *k, PyObject *trace) {
    thx_py_trace *from = (thx_py_trace *)trace;
    *k = (edit){.x = from->x, .from = from};
    if (thx_trace_number(from) < 0) return -1;
    if (thx_check(k->x, th_trace_clone(from->t, &k->t)) < 0) return -1;
    th_trace_set_opaque_vtable(k->t, thx_opaque_vtable);
    if (k->t->next_name < from->line->next_name) k->t->next_name = from->line->next_name;
    return 0;
}

static int add_id(edit *k, uint64_t id) {
    if (k->nids == k->cap_ids) {
        uint32_t cap = k->cap_ids ? 2 * k->cap_ids : k->from->t->nops + 16;
        uint64_t *ids = PyMem_Realloc(k->ids, cap * sizeof *ids);
        if (!ids) return PyErr_NoMemory(), -1;
        k->ids = ids;
        k->cap_ids = cap;
    }
    k->ids[k->nids++] = id;
    return 0;
}

/* Operations of the old trace are copied by number; dels are left out. */
static int copy_op(edit *k, th_opref o) {
    if (k->w.ops[o].kind == TH_OP_DEL) return 0;
    if (!th__rewrite_copy(&k->w, &k->w.ops[o])) return thx_check(k->x, th_trace_status(k->t));
    return add_id(k, k->from->ids[o]);
}

static int rewrite_begin(edit *k) { return thx_check(k->x, th__rewrite_begin(&k->w, k->t)) < 0 ? -1 : add_id(k, 0); }

static void fini(edit *k) {
    if (k->w.ops) th__rewrite_end(&k->w, TH_EINVAL);
    if (k->e.x) thx_excerpt_fini(&k->e);
    th_trace_free(k->t);
    PyMem_Free(k->ids);
    PyMem_Free(k->pasted);
}

static PyObject *finish(edit *k, PyObject *result) {
    thx *x = k->x;
    th_trace *t = k->t;
    th_status status = th__rewrite_end(&k->w, th_trace_status(t));
    k->w.ops = NULL;
    if (status == TH_OK) status = th_trace_verify(t);
    if (status != TH_OK) {
        if (status != TH_EVERIFY) return thx_raise(x, status);
        return PyErr_Format(PyExc_ValueError, "this edit leaves a trace that cannot run: %s",
                            th_ctx_error(x->ctx)->text);
    }
    thx_lineage *line = k->from->line;
    if (line->next_name < t->next_name) line->next_name = t->next_name;
    k->t = NULL;
    thx_py_trace *made = (thx_py_trace *)thx_trace_object(x, t);
    if (!made) return NULL;
    made->line = line;
    line->refs++;
    made->ids = k->ids;
    k->ids = NULL;
    made->nsaved = k->from->nsaved;
    made->backward = k->from->backward;
    made->edit_result = Py_XNewRef(result);
    return (PyObject *)made;
}

/* ---- recording ---- */

/* Proxies in nested arguments become fakes. */
static PyObject *with_fakes(edit *k, PyObject *o) {
    if (Py_IS_TYPE(o, k->x->Proxy)) {
        th_val v = thx_proxy_find(k->from, o);
        return v ? thx_excerpt_value(&k->e, v) : NULL;
    }
    if (PyTuple_CheckExact(o) || PyList_CheckExact(o)) {
        Py_ssize_t n = PySequence_Fast_GET_SIZE(o);
        PyObject *list = PyList_New(n);
        for (Py_ssize_t i = 0; list && i < n; i++) {
            PyObject *item = with_fakes(k, PySequence_Fast_ITEMS(o)[i]);
            if (!item)
                Py_CLEAR(list);
            else
                PyList_SET_ITEM(list, i, item);
        }
        if (!list || PyList_CheckExact(o)) return list;
        PyObject *tuple = PyList_AsTuple(list);
        Py_DECREF(list);
        return tuple;
    }
    if (!PyDict_CheckExact(o)) return Py_NewRef(o);
    PyObject *dict = PyDict_New(), *key, *value;
    Py_ssize_t at = 0;
    while (dict && PyDict_Next(o, &at, &key, &value)) {
        PyObject *item = with_fakes(k, value);
        if (!item || PyDict_SetItem(dict, key, item) < 0) Py_CLEAR(dict);
        Py_XDECREF(item);
    }
    return dict;
}

static int record(edit *k, PyObject *args, PyObject *kwargs) {
    return args ? thx_excerpt_run(&k->e, k->fn, args, kwargs) : -1;
}

/* The function with the operation's own arguments. */
static int record_like(edit *k, const th_op *op) {
    const th_trace *t = k->from->t;
    if (thx_excerpt_begin(&k->e, k->x, t) < 0) return -1;
    PyObject *args = thx_from_node(k->x, t, op->args, thx_excerpt_value, &k->e);
    PyObject *kwargs = args && op->kwargs ? thx_from_node(k->x, t, op->kwargs, thx_excerpt_value, &k->e) : NULL;
    int rc = args && (kwargs || !op->kwargs) ? record(k, args, kwargs) : -1;
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    return rc;
}

static int record_with(edit *k, PyObject *arguments) {
    if (thx_excerpt_begin(&k->e, k->x, k->from->t) < 0) return -1;
    PyObject *args = with_fakes(k, arguments);
    int rc = record(k, args, NULL);
    Py_XDECREF(args);
    return rc;
}

/* ---- pasting ---- */

/* The alias group in the trace for one of the excerpt; made where there is none. */
static uint32_t alias_outside(edit *k, uint32_t alias) {
    const th_trace *in = k->e.r->t;
    uint32_t found = 0;
    if (!alias) return 0;
    for (th_val v = 1; v < in->nvalues && !found; v++)
        if (in->values[v].alias == alias && k->pasted[v]) {
            th_value *outside = &k->t->values[k->pasted[v]];
            if (!outside->alias) outside->alias = th_trace_alias(k->t);
            found = outside->alias;
        }
    return found;
}

static void define_out(void *user, th_val *v) {
    edit *k = user;
    const th_value *inner = &k->e.r->t->values[*v];
    uint32_t alias = alias_outside(k, inner->alias);
    if (!alias && inner->alias) alias = th_trace_alias(k->t);
    th_val value = th_trace_value(k->t, 0, th_type_set_grad(k->x->ctx, inner->type, false));
    if (!value) return;
    k->t->values[value].alias = alias;
    k->t->values[value].offset = inner->offset;
    k->pasted[*v] = value;
}

static int paste_op(edit *k, th_opref o) {
    th_trace *in = k->e.r->t, *t = k->t;
    const th_op *op = &in->ops[o];
    th_val *writes = PyMem_Calloc(op->nwrites + 1, sizeof *writes);
    if (!writes) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < op->nwrites; i++) writes[i] = k->pasted[in->kids[op->writes + i]];
    th_op_args copy = {.kind = TH_OP_CALL,
                       .callee = op->callee,
                       .args = th_node_import(t, in, op->args, k->pasted),
                       .kwargs = th_node_import(t, in, op->kwargs, k->pasted),
                       .outs_list = op->outs_list,
                       .effects = op->effects,
                       .marks = op->marks,
                       .nwrites = op->nwrites,
                       .writes = writes,
                       .file = k->file ? k->file : op->file,
                       .line = k->file ? k->line : op->line};
    if (op->callee_opaque) {
        const th_opaque *callee = &in->opaques[op->callee_opaque];
        copy.callee_opaque = th_trace_opaque(t, th_str_get(t->ctx, callee->name), callee->object);
    }
    th_op_each_out(in, o, define_out, k);
    copy.outs = th_node_import(t, in, op->outs, k->pasted);
    th_trace_op(t, &copy);
    PyMem_Free(writes);
    return thx_check(k->x, th_trace_status(t)) < 0 ? -1 : add_id(k, k->from->line->next_id++);
}

static int paste(edit *k) {
    th_trace *in = k->e.r->t;
    k->pasted = PyMem_Calloc(in->nvalues, sizeof *k->pasted);
    if (!k->pasted) return PyErr_NoMemory(), -1;
    for (th_val v = 1; v < k->from->t->nvalues; v++)
        if (k->e.inside[v]) k->pasted[k->e.inside[v]] = v;
    for (th_opref o = 1; o < in->nops; o++)
        if (paste_op(k, o) < 0) return -1;
    return 0;
}

/* The tensor with data that a fake stands for, where it is one that the function brought along or made; borrowed. NULL
 * without an exception: it stands for a value. */
static PyObject *brought_along(edit *k, PyObject *tensor) {
    if (!thx_is_fake(k->x, tensor)) return tensor;
    thx_cell *cell = thx_recorder_cell(k->e.r, tensor);
    for (uint32_t i = 0; cell && i < k->e.r->nroots; i++)
        if (k->e.r->roots[i].value == cell->value) return k->e.r->roots[i].real;
    return NULL;
}

/* What a tensor that the function returned is in the trace: a value, or a constant's node. */
static int outside(edit *k, PyObject *tensor, th_val *value, th_node *constant, th_typeref *type) {
    thx *x = k->x;
    thx_meta meta;
    PyObject *real = brought_along(k, tensor);
    *value = *constant = 0;
    if (real) {
        tensor = real;
        if (thx_read_meta(x, tensor, false, &meta) < 0) return -1;
        *constant = th_node_opaque(k->t, "constant", tensor);
        *type = th_type_set_grad(x->ctx, thx_meta_type(x, &meta), false);
        return *constant && *type ? 0 : thx_check(x, th_trace_status(k->t));
    }
    thx_cell *cell = thx_recorder_cell(k->e.r, tensor);
    if (!cell) return -1;
    *value = k->pasted[cell->value];
    *type = th_type_set_grad(x->ctx, k->t->values[*value].type, false);
    return 0;
}

/* ---- replacing ---- */

static int check_types(edit *k, th_val old, th_typeref got) {
    char was[300], is[300];
    th_typeref wanted = th_type_set_grad(k->x->ctx, k->t->values[old].type, false);
    if (got == wanted) return 0;
    if (thx_check(k->x, th_type_print(k->x->ctx, wanted, was, sizeof was)) < 0 ||
        thx_check(k->x, th_type_print(k->x->ctx, got, is, sizeof is)) < 0)
        return -1;
    PyErr_Format(PyExc_ValueError, "%s is \"%s\"; what should replace it is \"%s\"",
                 th_str_get(k->x->ctx, k->t->values[old].name), was, is);
    return -1;
}

static int check_unwritten(edit *k, th_val old) {
    const th_trace *t = k->from->t;
    uint32_t alias = t->values[old].alias;
    for (th_opref o = 1; alias && o < t->nops; o++)
        for (uint32_t i = 0; i < t->ops[o].nwrites; i++) {
            if (t->values[t->kids[t->ops[o].writes + i]].alias != alias) continue;
            PyErr_Format(PyExc_ValueError, "%s cannot be replaced: it shares memory with what %s writes to",
                         th_str_get(t->ctx, t->values[old].name),
                         t->ops[o].callee_opaque ? "an operation" : th_str_get(t->ctx, t->ops[o].callee));
            return -1;
        }
    return 0;
}

/* Views of the old value are views of the new one from here on. */
static void join_group(edit *k, th_val old, th_val value) {
    th_value *was = &k->t->values[old], *is = &k->t->values[value];
    bool input = false;
    for (uint32_t i = 0; i < k->t->ninputs; i++) input |= k->t->values[k->t->inputs[i]].alias == was->alias;
    if (!was->alias || input || is->alias || value < k->w.nvalues) return;
    is->alias = was->alias;
    is->offset = was->offset;
}

/* A value that was made for it takes the old one's name. */
static void take_name(edit *k, th_val old, th_val value) {
    th_str name = k->t->values[old].name;
    if (value < k->w.nvalues) return;
    for (th_val v = 1; v < k->w.nvalues; v++)
        if (v != old && k->w.value[v] == value) return;
    k->t->values[old].name = k->t->values[value].name;
    k->t->values[value].name = name;
}

static int replace_value(edit *k, th_val old, PyObject *tensor, bool rename) {
    th_val value;
    th_node constant;
    th_typeref type;
    if (!thx_is_tensor(k->x, tensor)) {
        PyErr_Format(PyExc_ValueError, "%s is a tensor; what should replace it is a %.100s",
                     th_str_get(k->x->ctx, k->t->values[old].name), Py_TYPE(tensor)->tp_name);
        return -1;
    }
    if (outside(k, tensor, &value, &constant, &type) < 0 || check_types(k, old, type) < 0 ||
        check_unwritten(k, old) < 0)
        return -1;
    if (value == old) return 0;
    k->w.value[old] = value;
    k->w.node[old] = constant;
    if (value) join_group(k, old, value);
    if (rename && value) take_name(k, old, value);
    return 0;
}

/* Walk the operation's results and what the function returned together. */
static int replace_outs(edit *k, th_node outs, PyObject *result) {
    const th_trace *t = k->from->t;
    const th_node_data *d = &t->nodes[outs];
    if (d->kind == TH_N_VALUE) return replace_value(k, d->u.ref, result, true);
    if (d->kind != TH_N_TUPLE) return 0;
    if ((!PyTuple_Check(result) && !PyList_Check(result)) || (uint32_t)PySequence_Fast_GET_SIZE(result) != d->count) {
        PyErr_Format(PyExc_ValueError, "the operation has %u results; the function returned %.100s", d->count,
                     Py_TYPE(result)->tp_name);
        return -1;
    }
    for (uint32_t i = 0; i < d->count; i++)
        if (replace_outs(k, t->kids[d->u.kids + i], PySequence_Fast_ITEMS(result)[i]) < 0) return -1;
    return 0;
}

static void take_place(edit *k, th_opref at) {
    k->file = at ? k->from->t->ops[at].file : 0;
    k->line = at ? k->from->t->ops[at].line : 0;
}

static int replace(edit *k, PyObject *symbol) {
    th_opref at = thx_symbol_find(k->from, symbol);
    if (!at || record_like(k, &k->from->t->ops[at]) < 0 || rewrite_begin(k) < 0) return -1;
    take_place(k, at);
    for (th_opref o = 1; o < k->w.nops; o++) {
        if (o != at && copy_op(k, o) < 0) return -1;
        if (o == at && (paste(k) < 0 || replace_outs(k, k->from->t->ops[at].outs, k->e.result) < 0)) return -1;
    }
    return 0;
}

PyObject *thx_edit_replace(PyObject *trace, PyObject *args) {
    edit k;
    PyObject *symbol, *fn, *made = NULL;
    if (!PyArg_ParseTuple(args, "OO:replace", &symbol, &fn)) return NULL;
    int rc = begin(&k, trace);
    k.fn = fn;
    if (rc == 0 && replace(&k, symbol) == 0) made = finish(&k, NULL);
    fini(&k);
    return made;
}

/* ---- inserting ---- */

static int insert(edit *k, PyObject *symbol, bool after, PyObject *arguments) {
    th_opref at = symbol == Py_None ? 0 : thx_symbol_find(k->from, symbol);
    if ((!at && symbol != Py_None) || record_with(k, arguments) < 0 || rewrite_begin(k) < 0) return -1;
    take_place(k, at);
    if (!at && !after && paste(k) < 0) return -1;
    for (th_opref o = 1; o < k->w.nops; o++) {
        if (o == at && !after && paste(k) < 0) return -1;
        if (copy_op(k, o) < 0) return -1;
        if (o == at && after && paste(k) < 0) return -1;
    }
    return !at && after ? paste(k) : 0;
}

/* What the function returned, with proxies for fakes. */
static PyObject *with_proxies(edit *k, thx_py_trace *made, PyObject *o) {
    if (thx_is_tensor(k->x, o)) {
        PyObject *real = brought_along(k, o);
        if (real) return Py_NewRef(real);
        thx_cell *cell = thx_recorder_cell(k->e.r, o);
        return cell ? thx_proxy_new(made, k->pasted[cell->value]) : NULL;
    }
    if (!PyTuple_CheckExact(o) && !PyList_CheckExact(o)) return Py_NewRef(o);
    PyObject *tuple = PyTuple_New(PySequence_Fast_GET_SIZE(o));
    for (Py_ssize_t i = 0; tuple && i < PyTuple_GET_SIZE(tuple); i++) {
        PyObject *item = with_proxies(k, made, PySequence_Fast_ITEMS(o)[i]);
        if (!item)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

static PyObject *inserted(PyObject *trace, PyObject *args, bool after) {
    edit k;
    Py_ssize_t n = PyTuple_GET_SIZE(args);
    if (n < 2) return PyErr_Format(PyExc_TypeError, "an operation, or None, and a function are needed");
    PyObject *arguments = PyTuple_GetSlice(args, 2, n), *made = NULL;
    int rc = arguments ? begin(&k, trace) : -1;
    if (!arguments) return NULL;
    k.fn = PyTuple_GET_ITEM(args, 1);
    if (rc == 0 && insert(&k, PyTuple_GET_ITEM(args, 0), after, arguments) == 0) made = finish(&k, NULL);
    if (made) {
        thx_py_trace *o = (thx_py_trace *)made;
        o->edit_result = with_proxies(&k, o, k.e.result);
        if (!o->edit_result) Py_CLEAR(made);
    }
    fini(&k);
    Py_DECREF(arguments);
    return made;
}

PyObject *thx_edit_insert_before(PyObject *trace, PyObject *args) { return inserted(trace, args, false); }
PyObject *thx_edit_insert_after(PyObject *trace, PyObject *args) { return inserted(trace, args, true); }

/* ---- removing, renaming uses ---- */

typedef struct search {
    bool *outs; /* by value */
    th_val found;
} search;

static void mark_out(void *user, th_val *v) { ((search *)user)->outs[*v] = true; }
static void find_marked(void *user, th_val *v) {
    search *s = user;
    if (!s->found && s->outs[*v]) s->found = *v;
}

static int check_unused(edit *k, th_opref at) {
    th_trace *t = k->from->t;
    search s = {PyMem_Calloc(t->nvalues, sizeof *s.outs), 0};
    if (!s.outs) return PyErr_NoMemory(), -1;
    th_op_each_out(t, at, mark_out, &s);
    const char *user = "the result";
    for (th_opref o = at + 1; o < t->nops && !s.found; o++) {
        if (t->ops[o].kind == TH_OP_DEL) continue;
        th_op_each_use(t, o, find_marked, &s);
        if (s.found) user = t->ops[o].callee_opaque ? "an operation" : th_str_get(t->ctx, t->ops[o].callee);
    }
    th_node_each_value(t, t->result, find_marked, &s);
    PyMem_Free(s.outs);
    if (!s.found) return 0;
    PyErr_Format(PyExc_ValueError, "the operation cannot be removed: %s uses %s", user,
                 th_str_get(t->ctx, t->values[s.found].name));
    return -1;
}

PyObject *thx_edit_remove(PyObject *trace, PyObject *symbol) {
    edit k;
    PyObject *made = NULL;
    int rc = begin(&k, trace);
    th_opref at = rc == 0 ? thx_symbol_find(k.from, symbol) : 0;
    rc = !at || check_unused(&k, at) < 0 ? -1 : rewrite_begin(&k);
    for (th_opref o = 1; rc == 0 && o < k.w.nops; o++)
        if (o != at) rc = copy_op(&k, o);
    if (rc == 0) made = finish(&k, NULL);
    fini(&k);
    return made;
}

PyObject *thx_edit_replace_uses(PyObject *trace, PyObject *args) {
    edit k;
    PyObject *old, *new, *made = NULL;
    if (!PyArg_ParseTuple(args, "OO:replace_uses", &old, &new)) return NULL;
    int rc = begin(&k, trace);
    th_val from = rc == 0 ? thx_proxy_find(k.from, old) : 0, to = from ? thx_proxy_find(k.from, new) : 0;
    if (!to || check_types(&k, from, th_type_set_grad(k.x->ctx, k.t->values[to].type, false)) < 0 ||
        check_unwritten(&k, from) < 0)
        rc = -1;
    if (rc == 0) rc = rewrite_begin(&k);
    th_opref first = rc == 0 ? k.from->t->values[to].def : 0;
    for (th_opref o = 1; rc == 0 && o < k.w.nops; o++) {
        if (o == first + 1) k.w.value[from] = to;
        rc = copy_op(&k, o);
    }
    if (rc == 0 && from != to) k.w.value[from] = to;
    if (rc == 0) made = finish(&k, NULL);
    fini(&k);
    return made;
}

/* ---- the border of the trace ---- */

static bool uses(th_trace *t, th_opref o, th_val value) {
    return t->ops[o].kind != TH_OP_DEL && th_op_uses(t, o, value);
}

/* The operation after which a value is what it is in the end and used no more: memory can go as early as that. */
static th_opref last_use(th_trace *t, th_val value) {
    th_opref last = th__is_written(t, value, t->nops) ? t->nops - 1 : t->values[value].def;
    for (th_opref o = last + 1; o < t->nops; o++)
        if (uses(t, o, value)) last = o;
    return last;
}

/* The operation before which an input is first needed; the number of operations where none uses it. */
static th_opref first_use(th_trace *t, th_val value) {
    th_opref first = 1;
    while (!th__is_written(t, value, t->nops) && first < t->nops && !uses(t, first, value)) first++;
    return first;
}

static int map_output(edit *k, Py_ssize_t index) {
    const th_trace *t = k->from->t;
    const th_node_data *d = &t->nodes[t->result];
    bool many = d->kind == TH_N_TUPLE;
    if (index < 0 || index >= (many ? (Py_ssize_t)d->count : 1)) {
        PyErr_Format(PyExc_ValueError, "the trace has no result %zd", index);
        return -1;
    }
    th_node node = many ? t->kids[d->u.kids + index] : t->result;
    th_val old = th__node_as_value(t, node), value;
    th_node constant;
    th_typeref type;
    if (!old) {
        PyErr_Format(PyExc_ValueError, "result %zd of the trace is no tensor", index);
        return -1;
    }
    if (thx_excerpt_begin(&k->e, k->x, t) < 0) return -1;
    PyObject *fake = thx_excerpt_value(&k->e, old), *args = fake ? PyTuple_Pack(1, fake) : NULL;
    int rc = record(k, args, NULL);
    Py_XDECREF(args);
    Py_XDECREF(fake);
    if (rc < 0 || rewrite_begin(k) < 0) return -1;
    th_opref at = last_use(k->from->t, old);
    if (!at && paste(k) < 0) return -1;
    for (th_opref o = 1; o < k->w.nops; o++)
        if (copy_op(k, o) < 0 || (o == at && paste(k) < 0)) return -1;
    if (!thx_is_tensor(k->x, k->e.result)) {
        PyErr_Format(PyExc_ValueError, "the function must return a tensor, not %.100s", Py_TYPE(k->e.result)->tp_name);
        return -1;
    }
    if (outside(k, k->e.result, &value, &constant, &type) < 0) return -1;
    th_node fresh = value ? th_node_value(k->t, value) : constant;
    if (!many) {
        k->t->result = fresh;
        return 0;
    }
    uint32_t count = k->t->nodes[k->t->result].count;
    th_node *kids = PyMem_Calloc(count, sizeof *kids);
    if (!kids) return PyErr_NoMemory(), -1;
    memcpy(kids, k->t->kids + k->t->nodes[k->t->result].u.kids, count * sizeof *kids);
    kids[index] = fresh;
    k->t->result = th_node_seq(k->t, TH_N_TUPLE, count, kids);
    PyMem_Free(kids);
    return 0;
}

PyObject *thx_edit_map_output(PyObject *trace, PyObject *args) {
    edit k;
    Py_ssize_t index;
    PyObject *fn, *made = NULL;
    if (!PyArg_ParseTuple(args, "nO:map_output", &index, &fn)) return NULL;
    int rc = begin(&k, trace);
    k.fn = fn;
    if (rc == 0 && map_output(&k, index) == 0) made = finish(&k, NULL);
    fini(&k);
    return made;
}

/* The type that an input shall have: that of a tensor or a proxy. 0 with an exception. */
static th_typeref type_like(thx *x, PyObject *like) {
    thx_meta meta;
    if (Py_IS_TYPE(like, x->Proxy)) return ((thx_proxy *)like)->type;
    if (!thx_is_tensor(x, like)) {
        PyErr_Format(PyExc_TypeError, "like must be a tensor or a proxy, not %.100s", Py_TYPE(like)->tp_name);
        return 0;
    }
    return thx_read_meta(x, like, false, &meta) < 0 ? 0 : thx_meta_type(x, &meta);
}

static int map_input(edit *k, PyObject *proxy, PyObject *like) {
    th_trace *t = k->t;
    th_val input = thx_proxy_find(k->from, proxy);
    if (!input) return -1;
    if (t->values[input].def) {
        PyErr_Format(PyExc_ValueError, "%s is no input of the trace", th_str_get(t->ctx, t->values[input].name));
        return -1;
    }
    th_typeref was = t->values[input].type, now = like == Py_None ? was : type_like(k->x, like);
    if (!now) return -1;
    bool grad = th_type_get(t->ctx, was)->flags & TH_TYPE_REQUIRES_GRAD;
    t->values[input].type = th_type_set_grad(t->ctx, now, grad);
    if (thx_excerpt_begin(&k->e, k->x, t) < 0) return -1; /* of the copy: it has the new type */
    PyObject *fake = thx_excerpt_value(&k->e, input), *args = fake ? PyTuple_Pack(1, fake) : NULL;
    int rc = record(k, args, NULL);
    Py_XDECREF(args);
    Py_XDECREF(fake);
    if (rc < 0 || rewrite_begin(k) < 0) return -1;
    th_opref at = first_use(k->from->t, input);
    for (th_opref o = 1; o < at; o++)
        if (copy_op(k, o) < 0) return -1;
    if (paste(k) < 0) return -1;
    t->values[input].type = was; /* what must be met */
    rc = replace_value(k, input, k->e.result, false);
    t->values[input].type = th_type_set_grad(t->ctx, now, grad);
    for (th_opref o = at; rc == 0 && o < k->w.nops; o++) rc = copy_op(k, o);
    return rc;
}

PyObject *thx_edit_map_input(PyObject *trace, PyObject *args) {
    edit k;
    PyObject *proxy, *fn, *like = Py_None, *made = NULL;
    if (!PyArg_ParseTuple(args, "OO|O:map_input", &proxy, &fn, &like)) return NULL;
    int rc = begin(&k, trace);
    k.fn = fn;
    if (rc == 0 && map_input(&k, proxy, like) == 0) made = finish(&k, NULL);
    fini(&k);
    return made;
}
