/* Dead code: operations whose results nobody uses.
 *
 *     t0 = torch.sin(x)          removed
 *     t1 = torch.zeros(4)        removed with ...
 *     t2 = torch.Tensor.add_(t1, 1)   ... this write, which nobody can see
 *     return x
 *
 * An operation stays when a value of its outs is used later, when it draws random numbers (the generator's stream must
 * stay eager's), when it may fail for other sizes than stated (sized), when its kernel may raise where eager's would
 * (raises: the pass below sets that mark, once, on what the user wrote), when it touches outside state, when its name
 * says that it changes its argument's metadata, or when it writes a group that can still be seen: one with an input,
 * one of something that is no tensor, one with a member that is used after the write. One pass backwards decides all of
 * it.
 */
#include "ops/meta.h"
#include "passes/pass.h"
#include "thunder/ops.h"

typedef struct liveness {
    th_trace *t;
    bool *value;      /* used by something that stays */
    uint8_t *group;   /* flags of th__groups */
    bool *group_used; /* a member is used after the current operation */
    bool found;
} liveness;

static void use(void *user, th_val *v) {
    liveness *l = user;
    l->value[*v] = true;
    l->group_used[th__group_of(l->t, *v)] = true;
}

static void find_used(void *user, th_val *v) {
    liveness *l = user;
    l->found |= l->value[*v];
}

static bool write_is_seen(const liveness *l, th_val v) {
    uint32_t group = th__group_of(l->t, v);
    bool tensor = th_type_get(l->t->ctx, l->t->values[v].type)->kind == TH_TYPE_TENSOR;
    return !tensor || l->group_used[group] || (l->group[group] & (TH__GROUP_INPUT | TH__GROUP_ESCAPES));
}

static bool stays(liveness *l, th_opref op) {
    const th_op *data = &l->t->ops[op];
    if (data->effects & (TH_FX_RANDOM | TH_FX_STATE) || data->marks & (TH_MARK_SIZED | TH_MARK_RAISES)) return true;
    if (data->nwrites == 0 && th__op_named_in_place(l->t, data)) return true; /* t_, unsqueeze_: they change metadata */
    for (uint32_t i = 0; i < data->nwrites; i++) {
        if (write_is_seen(l, l->t->kids[data->writes + i])) return true;
    }
    l->found = false;
    th_op_each_out(l->t, op, find_used, l);
    return l->found;
}

static void drop_values(th__rewrite *r, th_node outs) {
    const th_trace *t = r->t;
    const th_node_data *node = &t->nodes[outs];
    if (node->kind == TH_N_VALUE) r->keep_alive[node->u.ref] = true; /* no del may mention it */
    if (node->kind != TH_N_TUPLE) return;
    for (uint32_t i = 0; i < node->count; i++) drop_values(r, t->kids[node->u.kids + i]);
}

static th_status begin(liveness *l, th_trace *t, th__scratch *s) {
    *l = (liveness){.t = t, .group = th__groups(t, s)};
    l->value = th__scratch_zeroed(s, t->nvalues, sizeof *l->value);
    l->group_used = th__scratch_zeroed(s, th__group_count(t), sizeof *l->group_used);
    if (!l->group || !l->value || !l->group_used) return th_ctx_error(t->ctx)->status;
    th_node_each_value(t, t->result, use, l);
    return TH_OK;
}

/* ---- what may raise ---- */

typedef struct outcome {
    const th_trace *t;
    const th_op *op;
    uint32_t results;
    bool fresh, integers; /* some result has memory of its own; is of whole numbers */
    uint32_t group;
    bool found;
} outcome;

static void find_group(void *user, th_val *v) {
    ((outcome *)user)->found |= th__group_of(((outcome *)user)->t, *v) == ((outcome *)user)->group;
}

static void note_result(void *user, th_val *v) {
    outcome *o = user;
    o->results++;
    o->group = th__group_of(o->t, *v);
    o->found = false;
    th_node_each_value((th_trace *)o->t, o->op->args, find_group, o);
    o->fresh |= !o->found;
    o->integers |= !th__is_float((th_dtype)th_type_get(o->t->ctx, o->t->values[*v].type)->dtype);
}

th_status th__op_may_raise(const struct th_catalog *catalog, th_trace *t, th_opref op, bool *raises) {
    const th_op *data = &t->ops[op];
    outcome o = {.t = t, .op = data};
    *raises = false;
    if (data->kind != TH_OP_CALL) return TH_OK;
    th_op_each_out(t, op, note_result, &o);
    if (o.results && !o.fresh && !data->nwrites) return TH_OK;
    const th_opdef *def = data->callee_opaque ? NULL : th_catalog_find(catalog, data->callee), *twin = def;
    if (def && def->functional) twin = th_catalog_find(catalog, th_intern_z(t->ctx, def->functional));
    *raises = !def || !def->meta || !twin;
    if (*raises) return TH_OK;
    *raises = twin->effects & TH_OPDEF_RAISES && (twin->fusion != TH_FUSE_POINTWISE || o.integers);
    if (*raises) return TH_OK;
    th_call call = {.default_dtype = TH_F32, .default_device = th_device(t->ctx, "cpu", -1)};
    if (!call.default_device) return th_ctx_error(t->ctx)->status;
    th_error *error = &t->ctx->error;
    error->status = TH_OK;
    th_status status = th_call_bind(&call, def, t, data->args, data->kwargs);
    if (status == TH_OK) status = def->meta(&call);
    *raises = status != TH_OK;
    return error->status == TH_ENOMEM ? TH_ENOMEM : th_trace_status(t);
}

th_status th_pass_errors(th_trace *t, th_fuel *fuel) {
    th__scratch s = {.ctx = t->ctx};
    liveness l;
    th_catalog *catalog = NULL;
    th_status status = begin(&l, t, &s);
    (void)fuel;
    for (th_opref op = t->nops; status == TH_OK && op-- > 1;) {
        if (t->ops[op].kind == TH_OP_DEL) continue;
        bool kept = stays(&l, op);
        if (!kept) {
            if (!catalog) status = th_catalog_new(t->ctx, &catalog);
            if (status == TH_OK) status = th__op_may_raise(catalog, t, op, &kept);
            if (kept) t->ops[op].marks |= TH_MARK_RAISES;
        }
        if (kept) th_op_each_use(t, op, use, &l);
    }
    th_catalog_free(catalog);
    th__scratch_fini(&s);
    return status;
}

/* ---- the pass ---- */

th_status th_pass_dce(th_trace *t, th_fuel *fuel) {
    th__scratch s = {.ctx = t->ctx};
    liveness l;
    th_status status = begin(&l, t, &s);
    bool *dead = status == TH_OK ? th__scratch_zeroed(&s, t->nops, sizeof *dead) : NULL;
    if (status == TH_OK && !dead) status = th_ctx_error(t->ctx)->status;
    bool any = false;
    for (th_opref op = t->nops; status == TH_OK && op-- > 1;) {
        if (t->ops[op].kind == TH_OP_DEL) continue;
        dead[op] = !stays(&l, op) && th_fuel_take(fuel, "dce", th__op_label(t, &t->ops[op]));
        any |= dead[op];
        if (!dead[op]) th_op_each_use(t, op, use, &l);
    }
    th__rewrite r;
    if (any && status == TH_OK && (status = th__rewrite_begin(&r, t)) == TH_OK) {
        for (th_opref op = 1; op < r.nops; op++) {
            if (dead[op])
                drop_values(&r, r.ops[op].outs);
            else
                th__rewrite_copy(&r, &r.ops[op]);
        }
        status = th__rewrite_end(&r, th_trace_status(t));
    }
    th__scratch_fini(&s);
    return status;
}
