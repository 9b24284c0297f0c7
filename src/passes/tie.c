/* See tie.h. */
#include "passes/tie.h"

#include "ops/meta.h"

#include <string.h>

static const char prefix[] = "thunder._kernels.tie_";

th__tie th__tie_of(const th_trace *t, const th_op *op) {
    if (!(op->effects & TH_FX_STATE) || op->kind != TH_OP_CALL || op->callee_opaque) return TH__TIE_NONE;
    const char *name = th_str_get(t->ctx, op->callee);
    if (strncmp(name, prefix, sizeof prefix - 1) != 0) return TH__TIE_NONE;
    name += sizeof prefix - 1;
    if (strcmp(name, "hook") == 0) return TH__TIE_HOOK;
    if (strcmp(name, "grad") == 0) return TH__TIE_GRAD;
    return strcmp(name, "module") == 0 ? TH__TIE_MODULE : TH__TIE_NONE;
}

bool *th__tied(const th_trace *t, th__scratch *s) {
    bool *tied = th__scratch_zeroed(s, t->nvalues, sizeof *tied);
    for (th_opref o = 1; tied && o < t->nops; o++) {
        th__tie tie = th__tie_of(t, &t->ops[o]);
        if (tie == TH__TIE_HOOK || tie == TH__TIE_GRAD)
            tied[th__node_as_value(t, th__op_arg(t, &t->ops[o], 0, NULL))] = true;
    }
    return tied;
}

/* ---- which incoming gradients one depends on ---- */

typedef struct reach {
    bool *wanted;
    bool hit;
} reach;

static void test(void *user, th_val *v) {
    reach *r = user;
    r->hit |= r->wanted[*v];
}
static void want(void *user, th_val *v) { ((reach *)user)->wanted[*v] = true; }

static th_node sources(th_trace *t, th__scratch *s, uint32_t n, const th_val *gradients, uint32_t first) {
    reach r = {th__scratch_zeroed(s, t->nvalues, sizeof *r.wanted), false};
    th_node *kids = th__scratch_zeroed(s, t->ninputs, sizeof *kids);
    uint32_t count = 0;
    if (!r.wanted || !kids) {
        t->sticky = TH_ENOMEM;
        return 0;
    }
    for (uint32_t i = 0; i < n; i++) r.wanted[gradients[i]] = true;
    r.wanted[0] = false;
    for (th_opref o = t->nops; o-- > 1;) {
        r.hit = false;
        th_op_each_out(t, o, test, &r);
        if (r.hit) th_op_each_use(t, o, want, &r);
    }
    for (uint32_t i = first; i < t->ninputs; i++)
        if (r.wanted[t->inputs[i]]) kids[count++] = th_node_value(t, t->inputs[i]);
    return th_node_seq(t, TH_N_TUPLE, count, kids);
}

/* ---- calls ---- */

static th_node ints(th_trace *t, uint32_t n, const int64_t *items) {
    th_node kids[TH_MAX_RANK];
    for (uint32_t i = 0; i < n; i++) kids[i] = th_node_int(t, items[i]);
    return th_node_seq(t, TH_N_TUPLE, n, kids);
}

/* A gradient that comes back from the user: dense, in the order of the given one where that is dense. */
static th_typeref settled(th_trace *t, th_val like) {
    th_typeref ref = th_type_set_grad(t->ctx, t->values[like].type, false);
    const th_type *type = th_type_get(t->ctx, ref);
    if (th__is_dense(type->ndim, type->shape, type->stride)) return ref;
    return th_type_tensor(t->ctx, (th_dtype)type->dtype, type->device, type->ndim, type->shape, NULL, 0);
}

static void call(th_trace *t, const th_op *site, const char *callee, uint32_t n, const th_node *args, th_node outs) {
    th_trace_op(t, &(th_op_args){.kind = TH_OP_CALL,
                                 .callee = th_intern_z(t->ctx, callee),
                                 .args = th_node_seq(t, TH_N_TUPLE, n, args),
                                 .outs = outs,
                                 .outs_list = t->nodes[outs].kind == TH_N_TUPLE,
                                 .effects = TH_FX_STATE,
                                 .marks = TH_MARK_LATE,
                                 .file = site->file,
                                 .line = site->line});
}

th_val th__tie_run_hook(th_trace *t, th__scratch *s, const th_op *site, th_node hook, th_val gradient, uint32_t first) {
    th_typeref type = settled(t, gradient);
    const th_type *d = th_type_get(t->ctx, type);
    if (d->ndim > TH_MAX_RANK) return 0;
    th_node args[] = {hook, th_node_value(t, gradient), ints(t, d->ndim, d->stride),
                      sources(t, s, 1, &gradient, first)};
    th_val out = th_trace_value(t, 0, type);
    call(t, site, "thunder._kernels.run_hook", 4, args, th_node_value(t, out));
    return th_trace_status(t) == TH_OK ? out : 0;
}

th_status th__tie_run_module(th_trace *t, th__scratch *s, const th_op *site, th_node node, uint32_t n,
                             const th_val *values, th_val *gradients, uint32_t first) {
    th_node *given = th__scratch_zeroed(s, n, sizeof *given), *kinds = th__scratch_zeroed(s, n, sizeof *kinds);
    th_node *outs = th__scratch_zeroed(s, n, sizeof *outs);
    if (!given || !kinds || !outs) return TH_ENOMEM;
    th_node from = sources(t, s, n, gradients, first);
    for (uint32_t i = 0; i < n; i++) {
        th_typeref ref = settled(t, gradients[i] ? gradients[i] : values[i]);
        const th_type *type = th_type_get(t->ctx, ref);
        if (type->ndim > TH_MAX_RANK) return TH_DECLINED;
        th_node kind[] = {ints(t, type->ndim, type->shape), ints(t, type->ndim, type->stride),
                          th_node_dtype(t, (th_dtype)type->dtype), th_node_device(t, type->device)};
        given[i] = gradients[i] ? th_node_value(t, gradients[i]) : th_node_none(t);
        kinds[i] = th_node_seq(t, TH_N_TUPLE, 4, kind);
        gradients[i] = th_trace_value(t, 0, ref);
        outs[i] = th_node_value(t, gradients[i]);
    }
    th_node args[] = {node, th_node_seq(t, TH_N_TUPLE, n, given), th_node_seq(t, TH_N_TUPLE, n, kinds), from};
    call(t, site, "thunder._kernels.run_module_hooks", 4, args, th_node_seq(t, TH_N_TUPLE, n, outs));
    return th_trace_status(t);
}
