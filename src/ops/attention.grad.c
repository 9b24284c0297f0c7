/* The derivative of attention: torch's flash kernel for the CPU, which also gives the logarithm of the softmax's
 * denominators, and its backward kernel. Without dropout and a mask that is differentiated: those, and every
 * case in which torch takes another kernel, are derived. */
#include "ops/derivatives.h"

#include <string.h>

enum { QUERY, KEY, VALUE, MASK, DROPOUT, CAUSAL, SCALE };

static th_node V(th__backward *b, th_val v) { return th__node_of(b, v); }

/* What is added to the scores. Booleans say what takes part: torch makes numbers of them. */
static th_status mask_of(th__backward *b, const th__tensor *q, th_val *mask) {
    th_trace *t = b->e.t;
    th__tensor m;
    *mask = th__use(b, MASK);
    if (!*mask) return TH_OK;
    TRY(th__arg_tensor(&b->call, MASK, &m));
    DECLINE_IF(th__wants(b, *mask));
    if (m.dtype != TH_BOOL) return TH_OK;
    th_node sizes[TH_MAX_RANK];
    for (uint32_t i = 0; i < m.ndim; i++) sizes[i] = th_node_int(t, m.shape[i]);
    th_val zeros = TH_APPLY(b, "torch.Tensor.new_zeros", V(b, q->value), th_node_seq(t, TH_N_TUPLE, m.ndim, sizes));
    th_val out = TH_APPLY(b, "torch.logical_not", V(b, *mask));
    *mask = TH_APPLY(b, "torch.masked_fill", V(b, zeros), V(b, out), th_node_float(t, -__builtin_inf()));
    return *mask ? TH_OK : TH_DECLINED;
}

static th_node options(th__backward *b, th_val mask) {
    th_trace *t = b->e.t;
    th_node pairs[4];
    uint32_t n = 0;
    if (mask) {
        pairs[n++] = th_node_str(t, th_intern_z(t->ctx, "attn_mask"));
        pairs[n++] = th_node_value(t, mask);
    }
    if (th__has(&b->call, SCALE)) {
        pairs[n++] = th_node_str(t, th_intern_z(t->ctx, "scale"));
        pairs[n++] = b->call.arg[SCALE];
    }
    return n ? th_node_seq(t, TH_N_DICT, n, pairs) : 0;
}

static th_status operands(th__backward *b, th__tensor x[3], bool *causal) {
    for (uint32_t i = 0; i < 3; i++) TRY(th__arg_tensor(&b->call, i, &x[i]));
    return th__arg_bool(&b->call, CAUSAL, false, causal);
}

TH_FORWARD(attention) {
    th_trace *t = b->e.t;
    th__tensor x[3];
    bool causal;
    th_val mask, outs[2];
    TRY(operands(b, x, &causal));
    TRY(th__attention_is_flash(&b->call));
    TRY(mask_of(b, &x[0], &mask));
    const int64_t *n = x[0].shape, shape[] = {n[0], n[1], n[2]}, stride[] = {n[1] * n[2], 1, n[1]};
    th_dtype sums = x[0].dtype == TH_F64 ? TH_F64 : TH_F32;
    th_typeref types[] = {th_type_set_grad(t->ctx, t->values[b->outs[0]].type, false),
                          th_type_tensor(t->ctx, sums, x[0].device, 3, shape, stride, 0)};
    th_node args[] = {b->call.arg[QUERY], b->call.arg[KEY], b->call.arg[VALUE], th_node_float(t, 0),
                      th_node_bool(t, causal)};
    DECLINE_IF(!th__emit_many(&b->e, "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default", 5, args,
                              options(b, mask), 2, types, outs));
    b->made[0] = outs[0];
    b->saved[0] = outs[1];
    b->saved[1] = mask;
    b->nmade = 1;
    return TH_OK;
}

/* The kernel lays its results out as (batch, length, head, size). */
TH_GRAD(attention) {
    th_trace *t = b->e.t;
    th__tensor x[3];
    bool causal;
    th_val outs[3];
    th_typeref types[3];
    TRY(operands(b, x, &causal));
    for (uint32_t i = 0; i < 3; i++) {
        const int64_t *n = x[i].shape, stride[] = {n[1] * n[2] * n[3], n[3], n[1] * n[3], 1};
        types[i] = th_type_tensor(t->ctx, x[i].dtype, x[i].device, 4, n, stride, 0);
    }
    th_node args[] = {V(b, b->tangents[0]), b->call.arg[QUERY], b->call.arg[KEY],    b->call.arg[VALUE],
                      V(b, b->outs[0]),     V(b, b->saved[0]),  th_node_float(t, 0), th_node_bool(t, causal)};
    DECLINE_IF(!th__emit_many(&b->e, "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default", 8,
                              args, options(b, b->saved[1]), 3, types, outs));
    for (uint32_t i = 0; i < 3; i++)
        if (th__wants(b, th__use(b, i))) th__give(b, th__use(b, i), outs[i]);
    return TH_OK;
}
