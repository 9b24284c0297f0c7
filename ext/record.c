/* Torch code recorded for an edit of a trace: it runs on fakes that stand for the trace's values. */
#include "capture.h"
#include "trace_object.h"

#include "passes/pass.h"

#include <string.h>

/* ---- fakes for values ---- */

int thx_excerpt_begin(thx_excerpt *e, thx *x, const th_trace *of) {
    *e = (thx_excerpt){.x = x, .of = of};
    if (x->active) {
        PyErr_SetString(PyExc_RuntimeError, "a trace cannot be edited while a function is captured");
        return -1;
    }
    e->inside = PyMem_Calloc(of->nvalues, sizeof *e->inside);
    if (!e->inside) return PyErr_NoMemory(), -1;
    e->r = thx_recorder_new(x, NULL);
    if (!e->r) return -1;
    e->r->editing = true;
    return 0;
}

void thx_excerpt_fini(thx_excerpt *e) {
    PyMem_Free(e->inside);
    Py_XDECREF(e->result);
    Py_XDECREF((PyObject *)e->r);
}

/* Values of one alias group are in one group here too. */
static uint32_t alias_inside(thx_excerpt *e, th_val value) {
    uint32_t group = e->of->values[value].alias;
    for (th_val v = 1; group && v < e->of->nvalues; v++)
        if (e->inside[v] && e->of->values[v].alias == group) return e->r->t->values[e->inside[v]].alias;
    return group ? th_trace_alias(e->r->t) : 0;
}

static PyObject *fake_inside(thx_excerpt *e, th_val inside) {
    for (uint32_t i = 0; i < e->r->cap_cells; i++)
        if (e->r->cells[i].key && e->r->cells[i].value == inside) return Py_NewRef(e->r->cells[i].key);
    return PyErr_Format(PyExc_SystemError, "an input of the recorded code is lost");
}

/* Whether a value of the trace will require grad is not decided yet: where gradients are on, whatever can may. So a
 * torch.no_grad() in the code leaves its mark, and an autograd.Function is kept whole. */
static th_typeref may_require_grad(const thx_excerpt *e, th_typeref type) {
    char class_ = th_dtype_get((th_dtype)th_type_get(e->x->ctx, type)->dtype)->class_;
    return th_type_set_grad(e->x->ctx, type, (class_ == 'f' || class_ == 'c') && thx_grad_mode(e->x) == 1);
}

PyObject *thx_excerpt_value(void *excerpt, th_val value) {
    thx_excerpt *e = excerpt;
    const th_value *v = &e->of->values[value];
    if (th_type_get(e->x->ctx, v->type)->kind != TH_TYPE_TENSOR)
        return PyErr_Format(PyExc_ValueError, "%s is no tensor: code for an edit cannot use it",
                            th_str_get(e->x->ctx, v->name));
    if (e->inside[value]) return fake_inside(e, e->inside[value]);
    th_typeref type = may_require_grad(e, v->type);
    th_val inside = th_trace_input(e->r->t, v->name, type);
    PyObject *fake = inside ? thx_fake(e->x, type) : NULL;
    if (!fake) return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    e->r->t->values[inside].alias = alias_inside(e, value);
    e->r->t->values[inside].offset = v->offset;
    e->inside[value] = inside;
    if (thx_recorder_define(e->r, fake, inside) < 0) Py_CLEAR(fake);
    return fake;
}

/* ---- running ---- */

/* Tensors that the code brought along become foreign objects of the trace. */
static int embed_tensors(thx_excerpt *e) {
    thx_recorder *r = e->r;
    th_trace *t = r->t;
    uint32_t ninputs = 0;
    th__rewrite w;
    for (th_opref o = 1; r->nroots && o < t->nops; o++)
        for (uint32_t i = 0; i < t->ops[o].nwrites; i++)
            for (uint32_t j = 0; j < r->nroots; j++) {
                th_val written = t->kids[t->ops[o].writes + i], root = r->roots[j].value;
                if (written != root && (!t->values[root].alias || t->values[written].alias != t->values[root].alias))
                    continue;
                PyErr_SetString(PyExc_ValueError, "the function writes to a tensor that it brought along");
                return -1;
            }
    if (!r->nroots) return 0;
    if (thx_check(e->x, th__rewrite_begin(&w, t)) < 0) return -1;
    for (uint32_t i = 0; i < r->nroots; i++)
        w.node[r->roots[i].value] = th_node_opaque(t, "constant", r->roots[i].real);
    for (th_opref o = 1; o < w.nops; o++) th__rewrite_copy(&w, &w.ops[o]);
    for (uint32_t i = 0; i < t->ninputs; i++)
        if (!w.node[t->inputs[i]]) t->inputs[ninputs++] = t->inputs[i];
    t->ninputs = ninputs;
    return thx_check(e->x, th__rewrite_end(&w, th_trace_status(t)));
}

int thx_excerpt_run(thx_excerpt *e, PyObject *fn, PyObject *args, PyObject *kwargs) {
    thx *x = e->x;
    bool outer = x->compiling; /* other threads do not capture meanwhile */
    x->compiling = true;
    int rc = thx_recorder_run(e->r, fn, args, kwargs, &e->result);
    x->compiling = outer;
    return rc < 0 ? -1 : embed_tensors(e);
}

/* ---- calls that are recorded as they are ---- */

/* A fresh fake of the type that a tensor has, or of a proxy's; the value it stands for. */
static PyObject *like_tensor(thx_recorder *r, PyObject *like, th_node *node) {
    thx *x = r->x;
    thx_meta meta;
    th_typeref type = 0;
    if (Py_IS_TYPE(like, x->Proxy))
        type = ((thx_proxy *)like)->type;
    else if (!thx_is_tensor(x, like))
        return PyErr_Format(PyExc_TypeError, "like holds a %.100s: it must hold tensors and proxies",
                            Py_TYPE(like)->tp_name);
    else if (thx_read_meta(x, like, thx_is_fake(x, like), &meta) == 0)
        type = thx_meta_type(x, &meta);
    if (!type) return NULL;
    type = th_type_set_grad(x->ctx, type, false);
    th_val value = th_trace_value(r->t, 0, type);
    PyObject *fake = value ? thx_fake(x, type) : NULL;
    if (fake && thx_recorder_define(r, fake, value) < 0) Py_CLEAR(fake);
    if (fake) *node = th_node_value(r->t, value);
    return fake;
}

/* like: None, a tensor, or a tuple or list of tensors. Results of the same form. */
static PyObject *like_results(thx_recorder *r, PyObject *like, th_node *outs) {
    *outs = 0;
    if (like == Py_None) Py_RETURN_NONE;
    if (!PyTuple_Check(like) && !PyList_Check(like)) return like_tensor(r, like, outs);
    Py_ssize_t n = PySequence_Fast_GET_SIZE(like);
    th_node *kids = PyMem_Calloc((size_t)n + 1, sizeof *kids);
    PyObject *tuple = kids ? PyTuple_New(n) : PyErr_NoMemory();
    for (Py_ssize_t i = 0; tuple && i < n; i++) {
        PyObject *item = like_tensor(r, PySequence_Fast_ITEMS(like)[i], &kids[i]);
        if (!item)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, item);
    }
    if (tuple) *outs = th_node_seq(r->t, TH_N_TUPLE, (uint32_t)n, kids);
    PyMem_Free(kids);
    return tuple;
}

static PyObject *record_opaque(thx_recorder *r, PyObject *function, PyObject *arguments, PyObject *like) {
    thx *x = r->x;
    th_node outs;
    r->ninputs = 0;
    th_node args = thx_to_node(x, r->t, arguments, thx_recorder_value, r);
    PyObject *result = args ? like_results(r, like, &outs) : NULL;
    if (!result) return NULL;
    PyObject *name = PyObject_GetAttr(function, x->n.name);
    const char *hint = name && PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
    PyErr_Clear();
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee_opaque = th_trace_opaque(r->t, hint ? hint : "fn", function),
                     .args = args,
                     .outs = outs,
                     .outs_list = PyTuple_Check(result),
                     .effects = TH_FX_STATE,
                     .marks = outs ? 0 : TH_MARK_NO_GRAD}; /* without results there is nothing to differentiate */
    Py_XDECREF(name);
    if (thx_emit(r, &op) < 0) Py_CLEAR(result);
    return result;
}

PyObject *thx_opaque_call(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"function", "args", "like", NULL};
    thx *x = PyModule_GetState(module);
    thx_recorder *r = (thx_recorder *)x->active;
    PyObject *function, *arguments, *like = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO!|O", names, &function, &PyTuple_Type, &arguments, &like))
        return NULL;
    if (!r || x->active_thread != PyThread_get_thread_ident()) return PyObject_Call(function, arguments, NULL);
    if (!r->editing)
        return PyErr_Format(PyExc_RuntimeError, "opaque_call is for functions that are given to an edit of a trace");
    return record_opaque(r, function, arguments, like);
}
