/* Derivatives of normalisations and of softmax.
 *
 * A normalisation's kernels take mean and reciprocal deviation, which its public name does not return: the operation is
 * replaced by the ATen overload that does.
 */
#include "ops/derivatives.h"

#include <string.h>

static th_node V(th__backward *b, th_val v) { return th__node_of(b, v); }

static th_node optional(th__backward *b, uint32_t i) {
    return th__has(&b->call, i) ? b->call.arg[i] : th_node_none(b->e.t);
}

static th_node number_at(th__backward *b, uint32_t i, double fallback) {
    return th__has(&b->call, i) ? b->call.arg[i] : th_node_float(b->e.t, fallback);
}

static th_typeref tensor_type(th__backward *b, const th__tensor *like, uint32_t n, const int64_t *shape) {
    return th_type_tensor(b->e.t->ctx, like->dtype, like->device, n, shape, NULL, 0);
}

static th_node ints(th__backward *b, uint32_t n, const int64_t *at) {
    th_node kids[TH_MAX_RANK];
    for (uint32_t i = 0; i < n; i++) kids[i] = th_node_int(b->e.t, at[i]);
    return th_node_seq(b->e.t, TH_N_LIST, n, kids);
}

/* Statistics of half precision are kept in single precision on some devices. */
static bool plain_statistics(const th__backward *b, const th__tensor *x) {
    return x->dtype == TH_F32 || x->dtype == TH_F64 || th__is_cpu(&b->call, x);
}

/* Which of input, weight and bias get a gradient. */
static th_node mask_of(th__backward *b, const th_val of[3], bool wants[3]) {
    th_node kids[3];
    for (uint32_t i = 0; i < 3; i++) kids[i] = th_node_bool(b->e.t, wants[i] = th__wants(b, of[i]));
    return th_node_seq(b->e.t, TH_N_LIST, 3, kids);
}

/* The kernel's three results, each in the shape of what it belongs to. */
static th_status give_three(th__backward *b, const char *kernel, uint32_t n, th_node *args, const th_val of[3]) {
    bool wants[3];
    th_val outs[3];
    th_typeref types[3] = {0};
    args[n] = mask_of(b, of, wants);
    for (uint32_t i = 0; i < 3; i++) {
        if (!wants[i]) continue;
        th__tensor x;
        TRY(th__node_tensor(&b->call, th_node_value(b->e.t, of[i]), &x));
        types[i] = tensor_type(b, &x, x.ndim, x.shape);
    }
    DECLINE_IF(!th__emit_many(&b->e, kernel, n + 1, args, 0, 3, types, outs));
    for (uint32_t i = 0; i < 3; i++)
        if (wants[i]) th__give(b, of[i], outs[i]);
    return TH_OK;
}

/* ---- layer_norm ---- */

static th_status layer_shape(th__backward *b, th__tensor *x, th__dims *shape) {
    TRY(th__arg_tensor(&b->call, 0, x));
    TRY(th__node_ints(&b->call, b->call.arg[1], shape));
    DECLINE_IF(shape->n == 0 || shape->n > x->ndim || th__numel(x->ndim, x->shape) == 0 || !plain_statistics(b, x));
    for (uint32_t i = 2; i <= 3; i++) {
        th__tensor w;
        if (!th__has(&b->call, i)) continue;
        TRY(th__arg_tensor(&b->call, i, &w));
        DECLINE_IF(w.dtype != x->dtype);
    }
    return TH_OK;
}

TH_FORWARD(layer_norm) {
    th__tensor x;
    th__dims shape, kept;
    TRY(layer_shape(b, &x, &shape));
    kept.n = x.ndim;
    for (uint32_t i = 0; i < x.ndim; i++) kept.at[i] = i < x.ndim - shape.n ? x.shape[i] : 1;
    th_node args[] = {b->call.arg[0], ints(b, shape.n, shape.at), optional(b, 2), optional(b, 3),
                      number_at(b, 4, 1e-5)};
    th_typeref statistic = tensor_type(b, &x, kept.n, kept.at);
    th_typeref types[] = {tensor_type(b, &x, x.ndim, x.shape), statistic, statistic};
    th_val outs[3];
    DECLINE_IF(!th__emit_many(&b->e, "torch.ops.aten.native_layer_norm.default", 5, args, 0, 3, types, outs));
    b->made[0] = outs[0];
    b->saved[0] = outs[1];
    b->saved[1] = outs[2];
    b->nmade = 1;
    return TH_OK;
}

TH_GRAD(layer_norm) {
    th__tensor x;
    th__dims shape;
    TRY(layer_shape(b, &x, &shape));
    const th_val of[] = {th__use(b, 0), th__use(b, 2), th__use(b, 3)};
    th_node args[8] = {V(b, TH_APPLY(b, "torch.Tensor.contiguous", V(b, b->tangents[0]))),
                       b->call.arg[0],
                       ints(b, shape.n, shape.at),
                       V(b, b->saved[0]),
                       V(b, b->saved[1]),
                       optional(b, 2),
                       optional(b, 3)};
    return give_three(b, "torch.ops.aten.native_layer_norm_backward.default", 7, args, of);
}

/* ---- group_norm ---- */

typedef struct groups {
    th__tensor x;
    int64_t n, channels, rest, groups;
} groups;

static th_status groups_of(th__backward *b, groups *s) {
    TRY(th__arg_tensor(&b->call, 0, &s->x));
    TRY(th__arg_int(&b->call, 1, 0, &s->groups));
    DECLINE_IF(!s->x.contiguous || s->x.ndim < 2 || !th__is_cpu(&b->call, &s->x) || s->groups <= 0);
    DECLINE_IF(th__numel(s->x.ndim, s->x.shape) == 0);
    for (uint32_t i = 2; i <= 3; i++) {
        th__tensor w;
        if (!th__has(&b->call, i)) continue;
        TRY(th__arg_tensor(&b->call, i, &w));
        DECLINE_IF(w.dtype != s->x.dtype);
    }
    s->n = s->x.shape[0];
    s->channels = s->x.shape[1];
    s->rest = th__numel(s->x.ndim - 2, s->x.shape + 2);
    return TH_OK;
}

TH_FORWARD(group_norm) {
    groups s;
    th_trace *t = b->e.t;
    TRY(groups_of(b, &s));
    th_node args[] = {b->call.arg[0],
                      optional(b, 2),
                      optional(b, 3),
                      th_node_int(t, s.n),
                      th_node_int(t, s.channels),
                      th_node_int(t, s.rest),
                      th_node_int(t, s.groups),
                      number_at(b, 4, 1e-5)};
    int64_t shape[] = {s.n, s.groups};
    th_typeref statistic = tensor_type(b, &s.x, 2, shape);
    th_typeref types[] = {tensor_type(b, &s.x, s.x.ndim, s.x.shape), statistic, statistic};
    th_val outs[3];
    DECLINE_IF(!th__emit_many(&b->e, "torch.ops.aten.native_group_norm.default", 8, args, 0, 3, types, outs));
    b->made[0] = outs[0];
    b->saved[0] = outs[1];
    b->saved[1] = outs[2];
    b->nmade = 1;
    return TH_OK;
}

TH_GRAD(group_norm) {
    groups s;
    th_trace *t = b->e.t;
    TRY(groups_of(b, &s));
    const th_val of[] = {th__use(b, 0), th__use(b, 2), th__use(b, 3)};
    th_node args[10] = {V(b, TH_APPLY(b, "torch.Tensor.contiguous", V(b, b->tangents[0]))),
                        b->call.arg[0],
                        V(b, b->saved[0]),
                        V(b, b->saved[1]),
                        optional(b, 2),
                        th_node_int(t, s.n),
                        th_node_int(t, s.channels),
                        th_node_int(t, s.rest),
                        th_node_int(t, s.groups)};
    return give_three(b, "torch.ops.aten.native_group_norm_backward.default", 9, args, of);
}

/* ---- softmax ---- */

/* With a dtype, torch converts first; th__give converts back. */
static th_status softmax_by(th__backward *b, const char *kernel) {
    th_trace *t = b->e.t;
    th__tensor x;
    uint32_t dim;
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__arg_dim(&b->call, 1, x.ndim, &dim));
    const th_type *out = th_type_get(t->ctx, t->values[b->outs[0]].type);
    DECLINE_IF(!th__is_float(x.dtype) || (out->dtype != x.dtype && !th__is_cpu(&b->call, &x)));
    th__give(b, th__use(b, 0),
             TH_APPLY(b, kernel, V(b, b->tangents[0]), V(b, b->outs[0]), th_node_int(t, dim),
                      th_node_dtype(t, (th_dtype)out->dtype)));
    return TH_OK;
}

TH_GRAD(softmax) { return softmax_by(b, "torch.ops.aten._softmax_backward_data.default"); }
TH_GRAD(log_softmax) { return softmax_by(b, "torch.ops.aten._log_softmax_backward_data.default"); }
