/* Handing traces to the user's transforms, and checking what comes back.
 *
 * Everything that was worked out about a program goes by the numbers of its inputs and the places of its results. Edits
 * keep both, so an edit of the given trace is all that is taken.
 */
#include "transform.h"

#include "ambient.h"
#include "trace_object.h"

#include "passes/pass.h"

#include <string.h>

/* ---- the call ---- */

static th_trace *borrow_trace(thx *x, PyObject *object) {
    thx_py_trace *o = thx_as_trace(x, object);
    return o ? o->t : NULL;
}

/* What the hook makes of a copy: new reference to a Trace. */
static PyObject *call_hook(thx *x, PyObject *hook, const char *stage, const th_trace *t, bool backward, uint32_t nsaved,
                           PyObject *(*describe)(void *user, PyObject *trace), void *user) {
    th_trace *copy = NULL;
    if (thx_check(x, th_trace_clone(t, &copy)) < 0) return NULL;
    thx_drop_dels(copy);
    PyObject *given = thx_trace_object(x, copy);
    if (!given) return NULL;
    ((thx_py_trace *)given)->backward = backward;
    ((thx_py_trace *)given)->nsaved = nsaved;
    PyObject *info = describe ? describe(user, given) : PyTuple_Pack(2, Py_None, Py_None);
    PyObject *made = NULL;
    thx_autocast cast; /* its casts are operations of the trace already */
    if (info && thx_autocast_off(x, &cast) == 0) {
        made = PyObject_CallFunction(hook, "sOOO", stage, given, PyTuple_GET_ITEM(info, 0), PyTuple_GET_ITEM(info, 1));
        thx_autocast_on(x, &cast);
    }
    if (made && !borrow_trace(x, made)) Py_CLEAR(made);
    Py_XDECREF(info);
    Py_DECREF(given);
    return made;
}

static uint32_t result_count(const th_trace *t) {
    const th_node_data *d = &t->nodes[t->result];
    return d->kind == TH_N_TUPLE ? d->count : 1;
}

/* 0, or -1 with ValueError: other inputs, or another number of results. */
static int check_borders(const th_trace *before, const th_trace *after, uint32_t first_free, uint32_t nfree) {
    bool same = before->ninputs == after->ninputs;
    for (uint32_t i = 0; same && i < before->ninputs; i++) {
        th_val v = before->inputs[i];
        bool may_change = i >= first_free && i < first_free + nfree;
        same = v == after->inputs[i] && (may_change || before->values[v].type == after->values[v].type);
    }
    if (same && result_count(before) == result_count(after)) return 0;
    PyErr_SetString(PyExc_ValueError, same ? "the trace has another number of results than the one that was given"
                                           : "the trace is no edit of the one that was given: its inputs differ");
    return -1;
}

/* ---- before differentiation ---- */

typedef struct roots {
    thx *x;
    thx_recorder *r;
    const th_trace *t;
} roots;

static int describe_root(const roots *d, PyObject *trace, const thx_root *root, PyObject *tensors, PyObject *names) {
    PyObject *id = PyLong_FromVoidPtr(root->real), *proxy = NULL;
    PyObject *place = id && d->r->params ? PyDict_GetItemWithError(d->r->params, id) : NULL;
    int rc = id && (place || !PyErr_Occurred()) ? 0 : -1;
    if (rc == 0 && root->leaf < 0 && (proxy = thx_proxy_new((thx_py_trace *)trace, root->value))) {
        rc = PyDict_SetItem(tensors, proxy, root->real);
        if (rc == 0 && place) rc = PyDict_SetItem(names, proxy, PyTuple_GET_ITEM(place, 2));
    } else if (rc == 0 && root->leaf < 0) {
        rc = -1;
    }
    Py_XDECREF(proxy);
    Py_XDECREF(id);
    return rc;
}

/* (tensors by proxy, names in the module tree by proxy), of inputs that are no arguments. */
static PyObject *describe_roots(void *user, PyObject *trace) {
    const roots *d = user;
    PyObject *tensors = PyDict_New(), *names = PyDict_New(), *pair = NULL;
    int rc = tensors && names ? 0 : -1;
    for (uint32_t i = 0; i < d->r->nroots && rc == 0; i++)
        rc = describe_root(d, trace, &d->r->roots[i], tensors, names);
    if (rc == 0) pair = PyTuple_Pack(2, tensors, names);
    Py_XDECREF(tensors);
    Py_XDECREF(names);
    return pair;
}

static th_val root_of(thx_recorder *r, PyObject *tensor) {
    for (uint32_t i = 0; i < r->nroots; i++)
        if (r->roots[i].real == tensor) return r->roots[i].value;
    thx_cell *cell = thx_recorder_cell(r, tensor);
    return cell ? cell->value : 0;
}

/* Foreign tensors become inputs, as if the captured code had read them: parameters of the module tree are bound and
 * differentiated, others are constants. A node stands for one entry wherever it is used, so it is changed in place. */
static int adopt_tensors(thx *x, thx_recorder *r, th_trace *t) {
    int rc = 0;
    r->t = t;
    for (th_node n = 1; n < t->nnodes && rc == 0; n++) {
        PyObject *object = t->nodes[n].kind == TH_N_OPAQUE ? t->opaques[t->nodes[n].u.ref].object : NULL;
        if (!object || !thx_is_tensor(x, object)) continue;
        th_val value = root_of(r, object);
        if (value)
            t->nodes[n] = (th_node_data){.kind = TH_N_VALUE, .u.ref = value};
        else
            rc = -1;
    }
    r->t = NULL;
    return rc < 0 ? -1 : thx_check(x, th_trace_status(t));
}

int thx_transform_program(thx *x, PyObject *hook, thx_recorder *r, th_trace **t) {
    roots d = {x, r, *t};
    th_trace *copy = NULL;
    PyObject *made = call_hook(x, hook, "program", *t, false, 0, describe_roots, &d);
    if (!made) return -1;
    int rc = check_borders(*t, borrow_trace(x, made), 0, 0);
    if (rc == 0) rc = thx_check(x, th_trace_clone(borrow_trace(x, made), &copy));
    if (rc == 0) rc = adopt_tensors(x, r, copy);
    Py_DECREF(made);
    if (rc == 0) {
        th_trace_free(*t);
        *t = copy;
        return 0;
    }
    th_trace_free(copy);
    return -1;
}

/* ---- what will run ---- */

static int take_with_dels(thx *x, PyObject *made, th_trace **out) {
    th_trace *copy = NULL;
    if (thx_check(x, th_trace_clone(borrow_trace(x, made), &copy)) < 0) return -1;
    if (thx_check(x, th_pipeline_run(copy, "lifetime", NULL, x->verify, NULL, NULL)) < 0) {
        th_trace_free(copy);
        return -1;
    }
    th_trace_free(*out);
    *out = copy;
    return 0;
}

int thx_transform_inference(thx *x, PyObject *hook, th_trace **t) {
    PyObject *made = call_hook(x, hook, "inference", *t, false, 0, NULL, NULL);
    int rc = made ? check_borders(*t, borrow_trace(x, made), 0, 0) : -1;
    if (rc == 0) rc = take_with_dels(x, made, t);
    Py_XDECREF(made);
    return rc;
}

static th_val result_value(const th_trace *t, uint32_t n) {
    return th__node_as_value(t, t->kids[t->nodes[t->result].u.kids + n]);
}

static th_typeref plain_type(const th_trace *t, th_val v) {
    return v ? th_type_set_grad(t->ctx, t->values[v].type, false) : 0;
}

static int check_results(const th_trace *before, const th_trace *after, uint32_t nresults) {
    for (uint32_t i = 0; i < nresults; i++) {
        if (plain_type(before, result_value(before, i)) == plain_type(after, result_value(after, i))) continue;
        PyErr_Format(PyExc_ValueError, "result %u has another type than in the trace that was given", i);
        return -1;
    }
    return 0;
}

/* What is saved is what the forward returns after its results; the backward must expect just that. */
static int match_saved(thx *x, th_halves *h, uint32_t nresults) {
    char given[300], expected[300];
    const th_trace *f = h->forward, *b = h->backward;
    for (uint32_t i = 0; i < h->nsaved; i++) {
        th_val v = h->saved[i] = result_value(f, nresults + i), w = b->inputs[i];
        for (uint32_t j = 0; v && j < i; j++)
            if (h->saved[j] == v) v = 0;
        if (!v) {
            PyErr_Format(PyExc_ValueError, "saved value %u of the forward trace is no value of its own", i);
            return -1;
        }
        if (plain_type(f, v) == plain_type(b, w)) continue;
        if (thx_check(x, th_type_print(x->ctx, plain_type(f, v), given, sizeof given)) < 0 ||
            thx_check(x, th_type_print(x->ctx, plain_type(b, w), expected, sizeof expected)) < 0)
            return -1;
        PyErr_Format(PyExc_ValueError, "the forward trace saves %s as \"%s\"; the backward trace expects it as \"%s\"",
                     th_str_get(x->ctx, f->values[v].name), given, expected);
        return -1;
    }
    return 0;
}

int thx_transform_halves(thx *x, PyObject *hook, th_halves *h, uint32_t nresults) {
    PyObject *f = call_hook(x, hook, "forward", h->forward, false, h->nsaved, NULL, NULL);
    PyObject *b = f ? call_hook(x, hook, "backward", h->backward, true, h->nsaved, NULL, NULL) : NULL;
    int rc = b ? 0 : -1;
    if (rc == 0) rc = check_borders(h->forward, borrow_trace(x, f), 0, 0);
    if (rc == 0) rc = check_borders(h->backward, borrow_trace(x, b), 0, h->nsaved);
    if (rc == 0) rc = check_results(h->forward, borrow_trace(x, f), nresults);
    if (rc == 0) rc = take_with_dels(x, f, &h->forward);
    if (rc == 0) rc = take_with_dels(x, b, &h->backward);
    if (rc == 0) rc = match_saved(x, h, nresults);
    Py_XDECREF(f);
    Py_XDECREF(b);
    return rc;
}
