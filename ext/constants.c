/* Constant folding: operations that depend on no input run once, when the plan is built.
 *
 *     t0 = torch.arange(16)                    evaluated
 *     t1 = torch.Tensor.unsqueeze(t0, 0)       evaluated: becomes an input of the trace that holds a constant
 *     t2 = torch.Tensor.le(t1, x)              stays
 *
 * Not for random operations, not where the storage is written later or returned: a call must return a tensor of its
 * own.
 */
#include "capture.h"

#include "passes/pass.h"

#include <string.h>

enum { MAX_ELEMENTS = 1 << 22 }; /* a larger constant would cost memory for as long as the program lives */

typedef struct folding {
    thx *x;
    thx_recorder *r;
    th_trace *t;
    PyObject **made; /* by value: its tensor once evaluated (owned) */
    uint8_t *group;
    bool ok, returned;
} folding;

static void check_use(void *user, th_val *v) {
    folding *f = user;
    f->ok &= f->made[*v] != NULL;
}

static void check_out(void *user, th_val *v) {
    folding *f = user;
    const th_type *type = th_type_get(f->x->ctx, f->t->values[*v].type);
    uint8_t flags = f->group[th__group_of(f->t, *v)];
    f->ok &= type->kind == TH_TYPE_TENSOR && th_type_numel(type) <= MAX_ELEMENTS &&
             !(flags & (TH__GROUP_INPUT | TH__GROUP_WRITTEN | TH__GROUP_ESCAPES));
    f->returned |= (flags & TH__GROUP_RETURNED) != 0;
}

static PyObject *made_value(void *user, th_val v) { return Py_NewRef(((folding *)user)->made[v]); }

static bool keep_results(folding *f, th_node outs, PyObject *result) {
    const th_node_data *d = &f->t->nodes[outs];
    if (d->kind == TH_N_VALUE) {
        if (!thx_is_tensor(f->x, result)) return false;
        Py_XSETREF(f->made[d->u.ref], Py_NewRef(result));
        return true;
    }
    if (d->kind != TH_N_TUPLE) return true;
    if ((!PyTuple_Check(result) && !PyList_Check(result)) || (uint32_t)PySequence_Fast_GET_SIZE(result) != d->count)
        return false;
    for (uint32_t i = 0; i < d->count; i++)
        if (!keep_results(f, f->t->kids[f->t->nodes[outs].u.kids + i], PySequence_Fast_ITEMS(result)[i])) return false;
    return true;
}

/* 1 evaluated and replaceable, 0 stays, -1 error. What is returned stays too, but what follows from it can be constant.
 */
static int evaluate(folding *f, th_opref o) {
    const th_op *op = &f->t->ops[o];
    if (op->kind != TH_OP_CALL || op->effects || !op->outs || op->callee_opaque || th_node_has_extent(f->t, op->args) ||
        th_node_has_extent(f->t, op->kwargs))
        return 0;
    f->ok = true;
    f->returned = false;
    th_op_each_use(f->t, o, check_use, f);
    th_op_each_out(f->t, o, check_out, f);
    if (!f->ok) return 0;
    PyObject *result = thx_eval_op(f->x, f->t, op, made_value, f);
    if (!result && PyErr_ExceptionMatches(PyExc_Exception)) { /* it raises when it runs, after what comes before it */
        PyErr_Clear();
        return 0;
    }
    if (!result) return -1;
    if (thx_numbers_folded(f->r, f->t, op->args) < 0 || thx_numbers_folded(f->r, f->t, op->kwargs) < 0) {
        Py_DECREF(result);
        return -1;
    }
    bool kept = keep_results(f, op->outs, result);
    Py_DECREF(result);
    return kept && !f->returned;
}

typedef struct frontier {
    folding *f;
    th__rewrite *r;
} frontier;

/* A constant that a remaining operation uses becomes an input. */
static void to_input(void *user, th_val *v) {
    frontier *b = user;
    folding *f = b->f;
    if (*v >= b->r->nvalues || !f->made[*v] || b->r->value[*v] ||
        (f->group[th__group_of(f->t, *v)] & TH__GROUP_RETURNED))
        return;
    char name[32];
    snprintf(name, sizeof name, "k_%s", th_str_get(f->x->ctx, f->t->values[*v].name));
    th_val input = th_trace_input(f->t, th_intern_z(f->x->ctx, name), f->t->values[*v].type);
    f->t->values[input].offset = f->t->values[*v].offset;
    b->r->value[*v] = input;
    if (thx_recorder_constant_root(f->r, f->made[*v], input) < 0) f->ok = false;
}

static int rewrite(folding *f, const bool *gone) {
    th__rewrite r;
    th_status status = th__rewrite_begin(&r, f->t);
    frontier b = {f, &r};
    f->ok = true;
    for (uint32_t o = 1; status == TH_OK && o < r.nops; o++) {
        if (gone[o]) continue;
        th_node_each_value(f->t, r.ops[o].args, to_input, &b);
        if (r.ops[o].kwargs) th_node_each_value(f->t, r.ops[o].kwargs, to_input, &b);
        if (!th__rewrite_copy(&r, &r.ops[o])) status = th_trace_status(f->t);
    }
    return thx_check(f->x, th__rewrite_end(&r, status)) < 0 || !f->ok ? -1 : 0;
}

int thx_fold_constants(thx *x, thx_recorder *r, th_trace *t) {
    uint32_t nops = t->nops, nvalues = t->nvalues;
    th__scratch scratch = {.ctx = x->ctx};
    folding f = {
        .x = x, .r = r, .t = t, .made = PyMem_Calloc(nvalues, sizeof *f.made), .group = th__groups(t, &scratch)};
    bool *gone = PyMem_Calloc(nops, sizeof *gone);
    int rc = f.made && f.group && gone ? 0 : -1;
    uint32_t count = 0;
    for (th_opref o = 1; rc == 0 && o < nops; o++) {
        int done = evaluate(&f, o);
        gone[o] = done == 1;
        count += done == 1;
        rc = done < 0 ? -1 : 0;
    }
    if (rc == 0 && count) rc = rewrite(&f, gone);
    if (rc < 0 && !PyErr_Occurred()) PyErr_NoMemory();
    for (uint32_t v = 0; f.made && v < nvalues; v++) Py_XDECREF(f.made[v]);
    PyMem_Free(f.made);
    PyMem_Free(gone);
    th__scratch_fini(&scratch);
    return rc;
}

int thx_name_constants(thx *x, th_trace *t, uint32_t first, const th_slot *roots) {
    th__rewrite r;
    th_status status = th__rewrite_begin(&r, t);
    if (status != TH_OK) return thx_check(x, status);
    for (uint32_t i = first; i < t->ninputs; i++) {
        th_val input = t->inputs[i];
        uint32_t entry = th__trace_add_opaque(t, t->values[input].name, roots[i].object);
        r.node[input] = entry ? th__node_opaque_entry(t, entry) : 0;
    }
    t->ninputs = first < t->ninputs ? first : t->ninputs;
    for (th_opref o = 1; o < r.nops; o++)
        if (!th__rewrite_copy(&r, &r.ops[o]) && th_trace_status(t) != TH_OK) break;
    return thx_check(x, th__rewrite_end(&r, th_trace_status(t)));
}
