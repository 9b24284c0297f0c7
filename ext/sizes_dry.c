/* Dry runs: does a program for any sizes hold for these, from the first operation to the last?
 *
 * A program that writes to its inputs or draws random numbers cannot begin anew once it has, so all that may not fit is
 * found out before. The rules of the catalogue answer types again, from those of the arguments on, as they did while
 * the program was captured, for what varies and nothing else: an operation costs about a microsecond. Where some
 * operation that varies has no rule there is no dry run, and the program stays one for its own sizes.
 */
#include "callable.h"

#include "ir/ir.h"
#include "passes/pass.h"

#include <string.h>

struct thx_dry {
    th_trace *t;      /* owned: the program; numbers and types in it are those of the last run */
    th_typeref *said; /* by value: what the program states; owned */
    th_dtype default_dtype;
    th_dev default_device;
};

void thx_dry_free(thx_dry *d) {
    if (!d) return;
    th_trace_free(d->t);
    PyMem_Free(d->said);
    PyMem_Free(d);
}

thx_dry *thx_dry_new(thx *x, const th_trace *t, const thx_recorder *r) {
    thx_dry *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return (thx_dry *)PyErr_NoMemory();
    d->default_dtype = r->default_dtype;
    d->default_device = r->default_device;
    d->said = PyMem_Calloc(t->nvalues + 1, sizeof *d->said);
    if (!d->said || thx_check(x, th_trace_clone(t, &d->t)) < 0) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        thx_dry_free(d);
        return NULL;
    }
    for (th_val v = 1; v < t->nvalues; v++) d->said[v] = th_type_set_grad(t->ctx, t->values[v].type, false);
    return d;
}

/* Numbers of sizes as they are now. */
static void put_numbers(th_trace *t, th_node n, const th_slot *slots) {
    th_node_data *d = &t->nodes[n];
    if (d->kind == TH_N_INT && d->number) d->u.i = thx_in_slot(slots, d->number - 1u);
    for (uint32_t i = 0; d->kind >= TH_N_TUPLE && d->kind <= TH_N_SLICE && i < d->count; i++)
        put_numbers(t, t->kids[t->nodes[n].u.kids + i], slots);
}

typedef struct outs {
    thx_dry *d;
    const thx_sizes *z;
    const th_call *rule;
    uint32_t at;
    bool fits;
} outs;

static void take_out(void *user, th_val *v) {
    outs *o = user;
    th_trace *t = o->d->t;
    if (o->at >= o->rule->nouts) {
        o->fits = false;
        return;
    }
    th_typeref type = th_type_set_grad(t->ctx, o->rule->outs[o->at++].type, false);
    const th_type *now = th_type_get(t->ctx, type), *said = th_type_get(t->ctx, o->d->said[*v]);
    if (o->z->varies[*v]) {
        t->values[*v].type = type;
        o->fits &= now->kind == said->kind && now->ndim == said->ndim && now->dtype == said->dtype;
    } else {
        o->fits &= type == o->d->said[*v];
    }
}

static bool run_op(thx *x, thx_dry *d, const thx_sizes *z, th_opref o, const th_slot *slots) {
    th_trace *t = d->t;
    const th_op op = t->ops[o];
    const th_opdef *def = op.callee_opaque ? NULL : th_catalog_find(x->catalog, op.callee);
    th_call rule = {.default_dtype = d->default_dtype};
    if (!def || !def->meta || op.kind != TH_OP_CALL) return false;
    put_numbers(t, op.args, slots);
    if (op.kwargs) put_numbers(t, op.kwargs, slots);
    th__mark mark = th__trace_mark(t);
    bool fits = th_call_bind(&rule, def, t, op.args, op.kwargs) == TH_OK;
    rule.default_dtype = d->default_dtype;
    rule.default_device = d->default_device;
    rule.facts = x->facts;
    fits = fits && def->meta(&rule) == TH_OK;
    outs out = {d, z, &rule, 0, true};
    if (fits) th_op_each_out(t, o, take_out, &out);
    th__trace_rewind(t, mark);
    return fits && out.fits && out.at == rule.nouts;
}

typedef struct looking {
    const thx_sizes *z;
    bool found;
} looking;

static void look(void *user, th_val *v) {
    looking *k = user;
    k->found |= k->z->varies[*v];
}

static bool is_unsteady(const thx_dry *d, const thx_sizes *z, th_opref o) {
    looking k = {z, false};
    const th_op *op = &d->t->ops[o];
    th_op_each_use(d->t, o, look, &k);
    th_op_each_out(d->t, o, look, &k);
    return k.found || th_node_has_extent(d->t, op->args) || th_node_has_extent(d->t, op->kwargs);
}

static bool mark_holds(const thx_dry *d, const thx_sizes *z, const th_op *op, int kind, th_slot *slots) {
    const th_type *type = th_type_get(d->t->ctx, d->t->values[thx_mark_argument(d->t, op, 0)->u.ref].type);
    return thx_mark_holds(d->t, op, kind, type, z, slots);
}

bool thx_dry_run(thx *x, thx_dry *d, const thx_sizes *z, const th_typeref *inputs, th_slot *slots) {
    th_trace *t = d->t;
    bool fits = true;
    for (uint32_t i = 0; i < t->ninputs; i++)
        if (inputs[i]) t->values[t->inputs[i]].type = inputs[i];
    for (uint32_t i = 0; i < z->count && z->terms[i].op != THX_T_SIZE && fits; i++)
        fits = z->terms[i].op == THX_T_ARGUMENT || thx_term_compute(z, i, slots);
    for (th_opref o = 1; o < t->nops && fits; o++) {
        if (t->ops[o].kind == TH_OP_DEL) continue;
        int kind = thx_mark_kind(t, &t->ops[o]);
        if (kind)
            fits = mark_holds(d, z, &t->ops[o], kind, slots);
        else if (is_unsteady(d, z, o))
            fits = run_op(x, d, z, o, slots);
    }
    return fits;
}
