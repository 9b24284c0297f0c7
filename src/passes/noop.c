/* Operations that return their input itself: `to` the same dtype and device, `contiguous` of something contiguous,
 * dropout with p=0 or outside training.
 *
 *     t0 = torch.Tensor.to(x, torch.float32)      x is float32: t0 is x
 *
 * Only operations for which torch returns the very same tensor object are in the table, so what the trace returns keeps
 * its identity. An operation that makes an equal copy (clone, x + 0) or a new view (x.view(x.shape)) is none of them. A
 * value whose group is written anywhere is left alone, and so is a layout where sizes may be others than stated.
 */
#include "passes/pass.h"

#include <string.h>

typedef enum same_when { SAME_TYPE = 1, SAME_LAYOUT, DROPOUT, TO } same_when;

static const struct {
    const char *name;
    same_when when;
} known[] = {
    {"torch.Tensor.to", TO},
    {"torch.Tensor.contiguous", SAME_LAYOUT},
    {"torch.Tensor.type_as", SAME_TYPE},
    {"torch.Tensor.type", SAME_TYPE},
    {"torch.Tensor.float", SAME_TYPE},
    {"torch.Tensor.double", SAME_TYPE},
    {"torch.Tensor.half", SAME_TYPE},
    {"torch.Tensor.bfloat16", SAME_TYPE},
    {"torch.Tensor.int", SAME_TYPE},
    {"torch.Tensor.long", SAME_TYPE},
    {"torch.Tensor.short", SAME_TYPE},
    {"torch.Tensor.char", SAME_TYPE},
    {"torch.Tensor.byte", SAME_TYPE},
    {"torch.Tensor.bool", SAME_TYPE},
    {"torch.Tensor.cpu", SAME_TYPE},
    {"torch.Tensor.cuda", SAME_TYPE},
    {"torch.flatten", SAME_TYPE}, /* of one dimension */
    {"torch.Tensor.flatten", SAME_TYPE},
    {"torch.nn.functional.dropout", DROPOUT},
    {"torch.nn.functional.alpha_dropout", DROPOUT},
    {"torch.dropout", DROPOUT},
};

static bool is_zero(const th_trace *t, th_node n) {
    const th_node_data *node = &t->nodes[n];
    return (node->kind == TH_N_INT && node->u.i == 0) || (node->kind == TH_N_FLOAT && node->u.f == 0);
}

static bool is_bool(const th_trace *t, th_node n, bool value) {
    return t->nodes[n].kind == TH_N_BOOL && t->nodes[n].u.i == value;
}

/* A positional True may be non_blocking or copy, depending on the overload: it counts as copy. */
static bool may_copy(const th_trace *t, const th_op *op) {
    const th_node_data *args = &t->nodes[op->args];
    for (uint32_t i = 1; i < args->count; i++) {
        uint8_t kind = t->nodes[t->kids[args->u.kids + i]].kind;
        if (is_bool(t, t->kids[args->u.kids + i], true) || kind == TH_N_OPAQUE) return true;
    }
    th_node copy = th__op_arg(t, op, UINT32_MAX, "copy");
    return copy && !is_bool(t, copy, false);
}

static bool returns_input(const th_trace *t, const th_op *op, same_when when) {
    bool sized = op->marks & TH_MARK_SIZED;
    if (when == TO) return !may_copy(t, op) && !(sized && th__op_arg(t, op, UINT32_MAX, "memory_format"));
    if (when == SAME_LAYOUT) return !sized;
    if (when != DROPOUT) return true;
    bool functional = !th__op_is(t, op, "torch.dropout");
    th_node p = th__op_arg(t, op, 1, "p"), training = th__op_arg(t, op, 2, functional ? "training" : "train");
    return (p && is_zero(t, p)) || (training && is_bool(t, training, false));
}

th_val th__op_returns_input(const th_trace *t, const th_op *op) {
    same_when when = 0;
    th_val in = th__node_as_value(t, th__op_arg(t, op, 0, "input")), out = th__node_as_value(t, op->outs);
    if (!in || !out || op->kind != TH_OP_CALL || (op->effects & ~TH_FX_RANDOM)) return 0;
    if (th_type_set_grad(t->ctx, t->values[in].type, false) != th_type_set_grad(t->ctx, t->values[out].type, false))
        return 0;
    for (size_t i = 0; i < sizeof known / sizeof *known && !when; i++) {
        if (th__op_is(t, op, known[i].name)) when = known[i].when;
    }
    if (!when || (op->effects && when != DROPOUT) || !returns_input(t, op, when)) return 0;
    /* Without an alias number the recorder did not say; with another one it says that storage is not shared. */
    bool shares = t->values[out].alias == t->values[in].alias && t->values[out].offset == t->values[in].offset;
    return shares || t->values[out].alias == 0 ? in : 0;
}

static bool is_written(const th_trace *t, const uint8_t *groups, th_val v) {
    return groups[th__group_of(t, v)] & TH__GROUP_WRITTEN;
}

/* Note what each such operation's result is replaced by. */
static bool find_noops(th_trace *t, const uint8_t *groups, th_val *value, bool *kept, th_fuel *fuel) {
    bool any = false;
    for (th_opref op = 1; op < t->nops; op++) {
        th_val in = th__op_returns_input(t, &t->ops[op]), out = in ? t->nodes[t->ops[op].outs].u.ref : 0;
        if (!in || is_written(t, groups, in) || is_written(t, groups, out)) continue;
        if (!th_fuel_take(fuel, "noop", th_str_get(t->ctx, t->values[out].name))) continue;
        value[out] = value[in] ? value[in] : in;
        kept[value[out]] = true;
        any = true;
    }
    return any;
}

static th_status drop_noops(th_trace *t, const th_val *value, const bool *kept) {
    th__rewrite r;
    TRY(th__rewrite_begin(&r, t));
    memcpy(r.value, value, r.nvalues * sizeof *value);
    memcpy(r.keep_alive, kept, r.nvalues * sizeof *kept);
    for (th_opref op = 1; op < r.nops; op++) {
        th_val out = th__node_as_value(t, r.ops[op].outs);
        if (!out || !value[out]) th__rewrite_copy(&r, &r.ops[op]);
    }
    return th__rewrite_end(&r, th_trace_status(t));
}

th_status th_pass_noop(th_trace *t, th_fuel *fuel) {
    th__scratch s = {.ctx = t->ctx};
    uint8_t *groups = th__groups(t, &s);
    th_val *value = th__scratch_zeroed(&s, t->nvalues, sizeof *value);
    bool *kept = th__scratch_zeroed(&s, t->nvalues, sizeof *kept);
    th_status status = groups && value && kept ? TH_OK : th_ctx_error(t->ctx)->status;
    if (status == TH_OK && find_noops(t, groups, value, kept, fuel)) status = drop_noops(t, value, kept);
    th__scratch_fini(&s);
    return status;
}
