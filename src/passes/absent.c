/* A backward trace without gradients that do not come in.
 *
 *     t0 = torch.mul(g_1, t)                     removed: g_1 does not come in
 *     t1 = torch.mul(g, 2)                ->     t1 = torch.mul(g, 2)
 *     t2 = torch.add(t1, t0)                     removed: it is t1
 *     return t2                                  return t1
 *
 * Autograd does not run what no gradient reaches. Zeros in its place are as good as long as they are multiplied by
 * finite numbers alone; by an infinite derivative they give nan. A backward trace is linear in the gradients: what is
 * computed of absent ones alone is absent. Where an operation takes an absent value and a present one and is no sum,
 * the absent one is zeros. What a new derivative rule must obey: nothing that it computes of a gradient alone may be
 * other than zeros for zeros.
 */
#include "thunder/grad.h"

#include "ops/meta.h"
#include "passes/pass.h"

typedef enum state { FREE, PRESENT, ABSENT } state; /* FREE: computed of no gradient */

typedef struct pass {
    th_trace *t;
    th__scratch scratch;
    th__rewrite r;
    state *state;              /* by value of the trace as it was */
    bool *is_input;            /* likewise: zeros already */
    bool absent, present, odd; /* what the operation uses; odd: a result that cannot be a gradient */
    th_val other;              /* the last present value that it uses */
} pass;

static void look_at_use(void *user, th_val *v) {
    pass *p = user;
    p->absent |= p->state[*v] == ABSENT;
    p->present |= p->state[*v] == PRESENT;
    if (p->state[*v] != ABSENT) p->other = *v;
}

static void look_at_out(void *user, th_val *v) {
    pass *p = user;
    const th_type *type = th_type_get(p->t->ctx, p->t->values[*v].type);
    char class_ = type->kind == TH_TYPE_TENSOR ? th_dtype_get((th_dtype)type->dtype)->class_ : 0;
    p->odd |= class_ != 'f' && class_ != 'c';
}

static void set_present(void *user, th_val *v) { ((pass *)user)->state[*v] = PRESENT; }
static void set_absent(void *user, th_val *v) { ((pass *)user)->state[*v] = ABSENT; }

/* torch.add(a, b) of equal types is the other operand. */
static bool is_sum(const pass *p, const th_op *op) {
    const th_trace *t = p->t;
    bool add = th__op_is(t, op, "torch.add") || th__op_is(t, op, "torch.Tensor.add") ||
               th__op_is(t, op, "torch.ops.aten.add.Tensor");
    th_val out = th__node_as_value(t, op->outs);
    return add && out && p->other && !op->kwargs && t->nodes[op->args].count == 2 &&
           t->values[out].type == t->values[p->other].type;
}

static void make_zeros(void *user, th_val *place) {
    pass *p = user;
    th_trace *t = p->t;
    const th_val v = *place; /* new nodes and types may move the old ones */
    if (p->state[v] != ABSENT || p->is_input[v] || p->r.value[v]) return;
    const th_type copy = *th_type_get(t->ctx, t->values[v].type), *type = &copy;
    th_node sizes[TH_MAX_RANK];
    for (uint32_t i = 0; i < type->ndim; i++) sizes[i] = th_node_int(t, type->shape[i]);
    th_typeref packed = th_type_tensor(t->ctx, (th_dtype)type->dtype, type->device, type->ndim, type->shape, NULL, 0);
    if (packed != t->values[v].type) p->odd = true; /* laid out otherwise */
    th_node kwargs[] = {th_node_str(t, th_intern_z(t->ctx, "dtype")), th_node_dtype(t, (th_dtype)type->dtype),
                        th_node_str(t, th_intern_z(t->ctx, "device")), th_node_device(t, type->device)};
    th_node size = th_node_seq(t, TH_N_TUPLE, type->ndim, sizes);
    th_val zeros = th_trace_value(t, 0, packed);
    th_trace_op(t, &(th_op_args){.kind = TH_OP_CALL,
                                 .callee = th_intern_z(t->ctx, "torch.zeros"),
                                 .args = th_node_seq(t, TH_N_TUPLE, 1, &size),
                                 .kwargs = th_node_seq(t, TH_N_DICT, 4, kwargs),
                                 .outs = th_node_value(t, zeros)});
    p->r.value[v] = zeros;
}

/* TH_DECLINED: the operation does more than to compute gradients. */
static th_status take(pass *p, const th_op *op) {
    th_trace *t = p->t;
    if (op->kind == TH_OP_DEL) return TH_OK; /* lifetime makes them anew */
    p->absent = p->present = p->odd = false;
    p->other = 0;
    th_node_each_value(t, op->args, look_at_use, p);
    th_node_each_value(t, op->kwargs, look_at_use, p);
    if (!p->absent) {
        if (p->present) th_node_each_value(t, op->outs, set_present, p);
        th__rewrite_copy(&p->r, op);
        return TH_OK;
    }
    if (op->effects || op->nwrites) return TH_DECLINED;
    th_node_each_value(t, op->outs, look_at_out, p);
    if (p->odd) return TH_DECLINED;
    if (!p->present) {
        th_node_each_value(t, op->outs, set_absent, p);
        return TH_OK;
    }
    th_node_each_value(t, op->outs, set_present, p);
    if (is_sum(p, op)) {
        p->r.value[th__node_as_value(t, op->outs)] = p->r.value[p->other] ? p->r.value[p->other] : p->other;
        return TH_OK;
    }
    th_node_each_value(t, op->args, make_zeros, p);
    th_node_each_value(t, op->kwargs, make_zeros, p);
    th__rewrite_copy(&p->r, op);
    return p->odd ? TH_DECLINED : TH_OK;
}

static th_status rewrite(pass *p, uint32_t ntangents, uint64_t absent) {
    th_trace *t = p->t;
    TRY(th__rewrite_begin(&p->r, t));
    th_status status = TH_OK;
    p->state = th__scratch_zeroed(&p->scratch, p->r.nvalues, sizeof *p->state);
    p->is_input = th__scratch_zeroed(&p->scratch, p->r.nvalues, sizeof *p->is_input);
    if (!p->state || !p->is_input) return th__rewrite_end(&p->r, TH_ENOMEM);
    for (uint32_t i = 0; i < ntangents; i++) {
        th_val v = t->inputs[t->ninputs - ntangents + i];
        p->is_input[v] = true;
        p->state[v] = absent >> i & 1 ? ABSENT : PRESENT;
    }
    for (th_opref op = 1; op < p->r.nops && status == TH_OK; op++) {
        const th_op data = p->r.ops[op];
        status = take(p, &data);
    }
    for (th_val v = 1; v < p->r.nvalues; v++)
        if (p->state[v] == ABSENT) p->r.node[v] = th_node_none(t);
    return th__rewrite_end(&p->r, status == TH_OK ? th_trace_status(t) : status);
}

th_status th_grad_without(th_trace *t, uint32_t ntangents, uint64_t absent) {
    pass p = {.t = t, .scratch = {.ctx = t->ctx}};
    th_status status = rewrite(&p, ntangents, absent);
    th__scratch_fini(&p.scratch);
    th_fuel fuel = {.left = -1};
    return status == TH_OK ? th_pipeline_run(t, "dce,lifetime", &fuel, false, NULL, NULL) : status;
}
