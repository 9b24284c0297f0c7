/* Dead code: operations whose results nobody uses.
 *
 *     t0 = torch.sin(x)          removed
 *     t1 = torch.zeros(4)        removed with ...
 *     t2 = torch.Tensor.add_(t1, 1)   ... this write, which nobody can see
 *     return x
 *
 * An operation stays when a value of its outs is used later, when it draws random numbers (the generator's stream must
 * stay eager's), when it may fail for other sizes than stated (sized), when it touches outside state, when its name
 * says that it changes its argument's metadata, or when it writes a group that can still be seen: one with an input,
 * one of something that is no tensor, one with a member that is used after the write. One pass backwards decides all of
 * it.
 */
#include "passes/pass.h"

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
    if (data->effects & (TH_FX_RANDOM | TH_FX_STATE) || data->marks & TH_MARK_SIZED) return true;
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

th_status th_pass_dce(th_trace *t, th_fuel *fuel) {
    th__scratch s = {.ctx = t->ctx};
    liveness l = {.t = t, .group = th__groups(t, &s)};
    bool *dead = th__scratch_zeroed(&s, t->nops, sizeof *dead);
    l.value = th__scratch_zeroed(&s, t->nvalues, sizeof *l.value);
    l.group_used = th__scratch_zeroed(&s, th__group_count(t), sizeof *l.group_used);
    th_status status = l.group && l.value && l.group_used && dead ? TH_OK : th_ctx_error(t->ctx)->status;
    bool any = false;
    if (status == TH_OK) th_node_each_value(t, t->result, use, &l);
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
