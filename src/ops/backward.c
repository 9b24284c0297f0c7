/* See backward.h. */
#include "ops/backward.h"

#include "ir/ir.h"

#include <string.h>

/* ---- emitting ---- */

static th_val emit_typed(th__emitter *e, const char *callee, th_typeref type, uint32_t n, const th_node *args,
                         th_node kwargs) {
    th_trace *t = e->t;
    th_val out = type ? th_trace_value(t, 0, type) : 0;
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = th_intern_z(t->ctx, callee),
                     .args = th_node_seq(t, TH_N_TUPLE, n, args),
                     .kwargs = kwargs,
                     .outs = out ? th_node_value(t, out) : 0,
                     .marks = e->marks,
                     .file = e->file,
                     .line = e->line};
    return out && th_trace_op(t, &op) ? out : 0;
}

th_val th__emit_typed(th__emitter *e, const char *callee, th_typeref type, uint32_t n, const th_node *args) {
    return emit_typed(e, callee, type, n, args, 0);
}

th_val th__emit_kw(th__emitter *e, const char *callee, uint32_t n, const th_node *args, th_node kwargs) {
    th_trace *t = e->t;
    for (uint32_t i = 0; i < n; i++)
        if (!args[i]) return 0;
    th_str name = th_intern_z(t->ctx, callee);
    const th_opdef *def = name ? th_catalog_find(e->catalog, name) : NULL;
    th_node tuple = th_node_seq(t, TH_N_TUPLE, n, args);
    if (!def || !def->meta || !tuple) return 0;
    th_call call = {.default_dtype = TH_F32, .default_device = th_device(t->ctx, "cpu", -1), .facts = e->facts};
    if (th_call_bind(&call, def, t, tuple, kwargs) != TH_OK || def->meta(&call) != TH_OK || call.nouts != 1) return 0;
    const th_out *out = &call.outs[0];
    if (out->same) return out->alias_of;
    th_val made = emit_typed(e, callee, th_type_set_grad(t->ctx, out->type, false), n, args, kwargs);
    if (made && out->alias_of) {
        if (!t->values[out->alias_of].alias) t->values[out->alias_of].alias = th_trace_alias(t);
        t->values[made].alias = t->values[out->alias_of].alias;
        t->values[made].offset = out->offset;
    }
    return made;
}

th_val th__emit(th__emitter *e, const char *callee, uint32_t n, const th_node *args) {
    return th__emit_kw(e, callee, n, args, 0);
}

th_val th__emit_as(th__emitter *e, const char *callee, uint32_t n, const th_node *args, const char *model) {
    th_trace *t = e->t;
    for (uint32_t i = 0; i < n; i++)
        if (!args[i]) return 0;
    const th_opdef *def = th_catalog_find(e->catalog, th_intern_z(t->ctx, model));
    th_node tuple = th_node_seq(t, TH_N_TUPLE, 2, args);
    th_call call = {.default_dtype = TH_F32, .default_device = th_device(t->ctx, "cpu", -1)};
    if (!def || !tuple || th_call_bind(&call, def, t, tuple, 0) != TH_OK || def->meta(&call) != TH_OK) return 0;
    if (call.nouts != 1 || call.outs[0].same || call.outs[0].alias_of) return 0;
    return th__emit_typed(e, callee, th_type_set_grad(t->ctx, call.outs[0].type, false), n, args);
}

bool th__emit_many(th__emitter *e, const char *callee, uint32_t n, const th_node *args, th_node kwargs, uint32_t nouts,
                   const th_typeref *types, th_val *outs) {
    th_trace *t = e->t;
    th_node nodes[TH_MAX_SAVED];
    if (nouts > TH_MAX_SAVED) return false;
    for (uint32_t i = 0; i < n; i++)
        if (!args[i]) return false;
    for (uint32_t i = 0; i < nouts; i++) {
        outs[i] = types[i] ? th_trace_value(t, 0, types[i]) : 0;
        nodes[i] = outs[i] ? th_node_value(t, outs[i]) : th_node_none(t);
    }
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = th_intern_z(t->ctx, callee),
                     .args = th_node_seq(t, TH_N_TUPLE, n, args),
                     .kwargs = kwargs,
                     .outs = th_node_seq(t, TH_N_TUPLE, nouts, nodes),
                     .outs_list = true,
                     .marks = e->marks,
                     .file = e->file,
                     .line = e->line};
    return th_trace_op(t, &op) != 0;
}

th_val th__emit_write(th__emitter *e, const char *callee, uint8_t effects, th_val dest, uint32_t n,
                      const th_node *rest) {
    th_trace *t = e->t;
    th_node args[TH_MAX_PARAMS];
    if (!dest || n + 1 > TH_MAX_PARAMS) return 0;
    args[0] = th_node_value(t, dest);
    for (uint32_t i = 0; i < n; i++) args[i + 1] = rest[i];
    if (!t->values[dest].alias) t->values[dest].alias = th_trace_alias(t);
    th_val out = th_trace_value(t, 0, t->values[dest].type);
    if (!out) return 0;
    t->values[out].alias = t->values[dest].alias;
    t->values[out].offset = t->values[dest].offset;
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = th_intern_z(t->ctx, callee),
                     .args = th_node_seq(t, TH_N_TUPLE, n + 1, args),
                     .outs = th_node_value(t, out),
                     .effects = effects | TH_FX_WRITES,
                     .marks = e->marks,
                     .nwrites = 1,
                     .writes = &dest,
                     .file = e->file,
                     .line = e->line};
    return th_trace_op(t, &op) ? out : 0;
}

th_val th__emit_add(th__emitter *e, th_val a, th_val b) {
    th_trace *t = e->t;
    th_node args[] = {th_node_value(t, a), th_node_value(t, b)};
    th_val sum = th__emit(e, "torch.add", 2, args);
    if (sum || th_trace_status(t) != TH_OK) return sum;
    const th_type *x = th_type_get(t->ctx, t->values[a].type); /* complex numbers have no rule of their own */
    bool plain = t->values[a].type == t->values[b].type && th__is_dense(x->ndim, x->shape, x->stride);
    return plain ? th__emit_typed(e, "torch.add", t->values[a].type, 2, args) : 0;
}

th_val th__emit_packed(th__emitter *e, th_val v) {
    th_trace *t = e->t;
    const th_type *type = th_type_get(t->ctx, t->values[v].type);
    th_typeref packed = th_type_tensor(t->ctx, (th_dtype)type->dtype, type->device, type->ndim, type->shape, NULL, 0);
    th_node arg = th_node_value(t, v);
    th_node kwargs[] = {th_node_str(t, th_intern_z(t->ctx, "memory_format")),
                        th_node_symbol(t, th_intern_z(t->ctx, "torch.contiguous_format"))};
    th_val out = packed ? th_trace_value(t, 0, packed) : 0;
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = th_intern_z(t->ctx, "torch.clone"),
                     .args = th_node_seq(t, TH_N_TUPLE, 1, &arg),
                     .kwargs = th_node_seq(t, TH_N_DICT, 2, kwargs),
                     .outs = out ? th_node_value(t, out) : 0,
                     .marks = e->marks,
                     .file = e->file,
                     .line = e->line};
    return out && th_trace_op(t, &op) ? out : 0;
}

/* ---- for rules ---- */

th_val th__use(const th__backward *b, uint32_t param) {
    const th_node_data *d = &b->e.t->nodes[b->call.arg[param]];
    return d->kind == TH_N_VALUE ? d->u.ref : 0;
}

bool th__wants(const th__backward *b, th_val v) {
    for (uint32_t i = 0; v && i < b->nuses; i++)
        if (b->uses[i] == v) return b->needs[i];
    return false;
}

th_node th__node_of(th__backward *b, th_val v) {
    if (!v) b->failed = true;
    return v && !b->failed ? th_node_value(b->e.t, v) : 0;
}

th_val th__own_storage(th__backward *b, th_val v) {
    const th_value *value = &b->e.t->values[v];
    if (!v) return 0;
    bool own = value->def && !value->alias && th_type_get(b->e.t->ctx, value->type)->contiguous;
    return own ? v : th__emit_packed(&b->e, v);
}

th_val th__emit_view(th__backward *b, const char *callee, th_typeref type, th_val base, int64_t skip, uint32_t n,
                     const th_node *args) {
    th_trace *t = b->e.t;
    for (uint32_t i = 0; i < n; i++)
        if (!args[i]) return 0;
    th_val v = base ? th__emit_typed(&b->e, callee, type, n, args) : 0;
    if (!v) return 0;
    if (!t->values[base].alias) t->values[base].alias = th_trace_alias(t);
    t->values[v].alias = t->values[base].alias;
    t->values[v].offset = t->values[base].offset + skip;
    return v;
}

void th__give(th__backward *b, th_val of, th_val gradient) {
    th_trace *t = b->e.t;
    if (!gradient || b->ngrads == TH_MAX_PARAMS) {
        b->failed = true;
        return;
    }
    const th_type *want = th_type_get(t->ctx, t->values[of].type),
                  *have = th_type_get(t->ctx, t->values[gradient].type);
    uint32_t lead = have->ndim - want->ndim, n = 0;
    th_node dims[TH_MAX_RANK], sizes[TH_MAX_RANK];
    bool same = have->ndim == want->ndim;
    for (uint32_t i = 0; i < have->ndim && have->ndim >= want->ndim && have->ndim <= TH_MAX_RANK; i++) {
        bool grown = i < lead || (want->shape[i - lead] == 1 && have->shape[i] != 1);
        same &= !grown;
        if (grown) dims[n++] = th_node_int(t, i);
    }
    if (have->ndim < want->ndim || have->ndim > TH_MAX_RANK) b->failed = true;
    if (!same && !b->failed) { /* what was broadcast: summed over the dimensions it grew in */
        th_node args[] = {th_node_value(t, gradient), th_node_seq(t, TH_N_TUPLE, n, dims), th_node_bool(t, true)};
        gradient = th__emit(&b->e, "torch.sum", 3, args);
        for (uint32_t i = 0; i < want->ndim; i++) sizes[i] = th_node_int(t, want->shape[i]);
        if (gradient && lead) {
            th_node shape[] = {th_node_value(t, gradient), th_node_seq(t, TH_N_TUPLE, want->ndim, sizes)};
            gradient = th__emit(&b->e, "torch.reshape", 2, shape);
        }
        if (!gradient) b->failed = true;
    }
    const th_type *now = th_type_get(t->ctx, t->values[gradient].type);
    if (!b->failed && now->dtype != want->dtype) {
        th_node args[] = {th_node_value(t, gradient), th_node_dtype(t, (th_dtype)want->dtype)};
        gradient = th__emit(&b->e, "torch.Tensor.to", 2, args);
        if (!gradient) b->failed = true;
    }
    if (b->failed) return;
    b->grads[b->ngrads].of = of;
    b->grads[b->ngrads++].gradient = gradient;
}

/* ---- running a rule ---- */

static th_status run(th__backward *b, const th_val *tangents) {
    b->tangents = tangents;
    b->ngrads = 0;
    b->failed = false;
    b->out_grad = ~UINT64_C(0);
    th_status status = b->def->grad(b);
    if (th_trace_status(b->e.t) != TH_OK) return th_trace_status(b->e.t);
    return status == TH_OK && b->failed ? TH_DECLINED : status;
}

th_status th__backward_begin(th__backward *b, th_trace *t, const th_catalog *catalog, const th_opdef *def,
                             const th_op *op, uint32_t facts, uint32_t nouts, const th_val *outs, uint32_t nuses,
                             const th_val *uses, const bool *needs) {
    if (nouts > TH_MAX_OUTS) return TH_DECLINED;
    *b = (th__backward){.e = {t, catalog, op->file, op->line, op->marks & TH_MARK_RECOMPUTE, facts},
                        .def = def,
                        .op = op,
                        .nouts = nouts,
                        .outs = outs,
                        .nuses = nuses,
                        .uses = uses,
                        .needs = needs};
    b->call = (th_call){.default_dtype = TH_F32, .default_device = th_device(t->ctx, "cpu", -1), .facts = facts};
    return th_call_bind(&b->call, def, t, op->args, op->kwargs);
}

th_status th__backward_forward(th__backward *b) {
    th_trace *t = b->e.t;
    uint8_t marks = b->e.marks;
    b->failed = false;
    b->e.marks = b->op->marks;
    th_status status = b->def->forward(b);
    b->e.marks = marks;
    if (th_trace_status(t) != TH_OK) return th_trace_status(t);
    if (status != TH_OK || !b->nmade) return status;
    if (b->failed || b->nmade != b->nouts) return TH_DECLINED;
    for (uint32_t i = 0; i < b->nouts; i++) { /* what others were told of the results stays true */
        const th_typeref was = th_type_set_grad(t->ctx, t->values[b->outs[i]].type, false);
        if (!b->made[i] || t->values[b->made[i]].type != was) return TH_DECLINED;
    }
    b->outs = b->made;
    return TH_OK;
}

th_status th__backward_probe(th__backward *b) {
    th_trace *t = b->e.t;
    th__mark start = th__trace_mark(t);
    th_val tangents[TH_MAX_OUTS];
    for (uint32_t i = 0; i < b->nouts; i++)
        tangents[i] = th_trace_value(t, 0, th_type_set_grad(t->ctx, t->values[b->outs[i]].type, false));
    if (th_trace_status(t) != TH_OK) return th_trace_status(t);
    th_status status = run(b, tangents);
    if (th_trace_status(t) != TH_OK) return th_trace_status(t);
    th__trace_rewind(t, start);
    return status;
}

th_status th__backward_run(th__backward *b, const th_val *tangents) {
    b->call =
        (th_call){.default_dtype = TH_F32, .default_device = th_device(b->e.t->ctx, "cpu", -1), .facts = b->e.facts};
    th_status status = th_call_bind(&b->call, b->def, b->e.t, b->op->args, b->op->kwargs);
    return status == TH_OK ? run(b, tangents) : status;
}
