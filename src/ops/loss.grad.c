/* Derivatives of losses that are reduced to one number. */
#include "ops/derivatives.h"

#include <string.h>

static th_node V(th__backward *b, th_val v) { return th__node_of(b, v); }

/* ATen's number of a reduction: 1 mean, 2 sum. */
static th_status reduction_of(th__backward *b, uint32_t i, int64_t *how) {
    const th_node_data *d = th__arg(&b->call, i);
    const char *name = d->kind == TH_N_STR ? th_str_get(b->e.t->ctx, d->u.ref) : "";
    *how = d->kind == TH_N_ABSENT || strcmp(name, "mean") == 0 ? 1 : 2;
    return *how == 1 || strcmp(name, "sum") == 0 ? TH_OK : TH_DECLINED;
}

static th_status none_between(const th__backward *b, uint32_t first, uint32_t last) {
    for (uint32_t i = first; i <= last && i < b->call.nparams; i++) DECLINE_IF(th__has(&b->call, i));
    return TH_OK;
}

/* Two floating tensors of one shape and dtype: no broadcast, no promotion. */
static th_status two_alike(th__backward *b, th__tensor *x) {
    th__tensor target;
    TRY(th__arg_tensor(&b->call, 0, x));
    TRY(th__arg_tensor(&b->call, 1, &target));
    DECLINE_IF(!th__is_float(x->dtype) || x->dtype != target.dtype || x->ndim != target.ndim);
    DECLINE_IF(x->ndim && memcmp(x->shape, target.shape, x->ndim * sizeof *x->shape) != 0);
    return th__numel(x->ndim, x->shape) ? TH_OK : TH_DECLINED;
}

/* A loss of each element, without the old arguments and weights, whose `reduction` is parameter i. */
static th_status elementwise(th__backward *b, uint32_t i, th__tensor *x, int64_t *how) {
    TRY(two_alike(b, x));
    TRY(none_between(b, 2, i - 1));
    TRY(none_between(b, i + 1, i + 1));
    return reduction_of(b, i, how);
}

/* The operation as its ATen overload: the public function is Python code around it. */
static th_status by_overload(th__backward *b, const char *overload, uint32_t nnone, int64_t how) {
    th_trace *t = b->e.t;
    th_node args[5] = {b->call.arg[0], b->call.arg[1]};
    uint32_t n = 2;
    while (nnone-- > 0) args[n++] = th_node_none(t);
    args[n++] = th_node_int(t, how);
    b->made[0] = th__emit_typed(&b->e, overload, th_type_set_grad(t->ctx, t->values[b->outs[0]].type, false), n, args);
    b->nmade = 1;
    return TH_OK;
}

TH_FORWARD(mse_loss) {
    th__tensor x;
    int64_t how;
    TRY(elementwise(b, 4, &x, &how));
    return by_overload(b, "torch.ops.aten.mse_loss.default", 0, how);
}

TH_FORWARD(binary_cross_entropy_with_logits) {
    th__tensor x;
    int64_t how;
    TRY(elementwise(b, 5, &x, &how));
    return by_overload(b, "torch.ops.aten.binary_cross_entropy_with_logits.default", 2, how);
}

TH_GRAD(mse_loss) {
    th__tensor x;
    int64_t how;
    TRY(elementwise(b, 4, &x, &how));
    for (uint32_t i = 0; i < 2; i++) {
        th_val of = th__use(b, i), other = th__use(b, 1 - i);
        if (th__wants(b, of))
            th__give(b, of,
                     TH_APPLY(b, "torch.ops.aten.mse_loss_backward.default", V(b, b->tangents[0]), V(b, of),
                              V(b, other), th_node_int(b->e.t, how)));
    }
    return TH_OK;
}

/* The gradient of one element's loss. */
static th_val each(th__backward *b, const th__tensor *x, int64_t how) {
    th_val g = b->tangents[0];
    int64_t count = th__numel(x->ndim, x->shape);
    return how == 1 ? TH_APPLY(b, "torch.div", V(b, g), th_node_int(b->e.t, count)) : g;
}

TH_GRAD(l1_loss) {
    th__tensor x;
    int64_t how;
    TRY(elementwise(b, 4, &x, &how));
    th_val first = th__use(b, 0), second = th__use(b, 1);
    th_val sign = TH_APPLY(b, "torch.sign", V(b, TH_APPLY(b, "torch.sub", V(b, first), V(b, second))));
    th_val g = TH_APPLY(b, "torch.mul", V(b, sign), V(b, each(b, &x, how)));
    if (th__wants(b, first)) th__give(b, first, g);
    if (th__wants(b, second)) th__give(b, second, TH_APPLY(b, "torch.neg", V(b, g)));
    return TH_OK;
}

TH_GRAD(binary_cross_entropy_with_logits) {
    th__tensor x;
    int64_t how;
    TRY(elementwise(b, 5, &x, &how));
    DECLINE_IF(th__wants(b, th__use(b, 1)));
    th_val sigmoid = TH_APPLY(b, "torch.sigmoid", b->call.arg[0]);
    th_val off = TH_APPLY(b, "torch.sub", V(b, sigmoid), b->call.arg[1]);
    th_val g = TH_APPLY(b, "torch.mul", V(b, off), V(b, b->tangents[0]));
    if (how == 1) g = TH_APPLY(b, "torch.div", V(b, g), th_node_int(b->e.t, th__numel(x.ndim, x.shape)));
    th__give(b, th__use(b, 0), g);
    return TH_OK;
}

/* ---- of classes ---- */

/* nll_loss_forward also gives the sum of the weights that counted, which its backward kernel takes. Scores with more
 * dimensions than batch and class go another way in torch: derived. */
static th_status by_class(th__backward *b, th__tensor *x, th__tensor *target, th_node *rest) {
    th_trace *t = b->e.t;
    int64_t ignored, how;
    TRY(th__arg_tensor(&b->call, 0, x));
    TRY(th__arg_tensor(&b->call, 1, target));
    TRY(th__arg_int(&b->call, 4, -100, &ignored));
    TRY(none_between(b, 3, 3));
    TRY(none_between(b, 5, 5));
    TRY(reduction_of(b, 6, &how));
    DECLINE_IF(x->ndim == 0 || x->ndim > 2 || target->ndim + 1 != x->ndim || target->dtype != TH_I64);
    DECLINE_IF(!th__is_float(x->dtype) || th__numel(x->ndim, x->shape) == 0);
    if (b->call.nparams > 7) { /* label_smoothing */
        const th_node_data *d = th__arg(&b->call, 7);
        DECLINE_IF(d->kind != TH_N_ABSENT && !(d->kind == TH_N_FLOAT && d->u.f == 0) &&
                   !(d->kind == TH_N_INT && d->u.i == 0));
    }
    DECLINE_IF(th__wants(b, th__use(b, 2)));
    rest[0] = b->call.arg[1];
    rest[1] = th__has(&b->call, 2) ? b->call.arg[2] : th_node_none(t);
    rest[2] = th_node_int(t, how);
    rest[3] = th_node_int(t, ignored);
    return TH_OK;
}

/* from_scores: the logarithms of probabilities are taken first; nll_loss gets them. */
static th_status nll_forward(th__backward *b, bool from_scores) {
    th_trace *t = b->e.t;
    th__tensor x, target;
    th_node args[5];
    th_val outs[2], scores = th__use(b, 0);
    TRY(by_class(b, &x, &target, args + 1));
    if (from_scores)
        scores = TH_APPLY(b, "torch.log_softmax", V(b, scores), th_node_int(t, x.ndim - 1), th_node_none(t));
    args[0] = V(b, scores);
    th_typeref number = th_type_tensor(t->ctx, x.dtype, x.device, 0, NULL, NULL, 0);
    th_typeref types[] = {number, number};
    DECLINE_IF(!th__emit_many(&b->e, "torch.ops.aten.nll_loss_forward.default", 5, args, 0, 2, types, outs));
    b->made[0] = outs[0];
    b->saved[0] = outs[1];
    b->saved[1] = scores;
    b->nmade = 1;
    return TH_OK;
}

TH_FORWARD(nll_loss) { return nll_forward(b, false); }
TH_FORWARD(cross_entropy) { return nll_forward(b, true); }

static th_status nll_back(th__backward *b, th_val *g, uint32_t *dim) {
    th__tensor x, target;
    th_node r[4];
    TRY(by_class(b, &x, &target, r));
    *g = TH_APPLY(b, "torch.ops.aten.nll_loss_backward.default", V(b, b->tangents[0]), V(b, b->saved[1]), r[0], r[1],
                  r[2], r[3], V(b, b->saved[0]));
    *dim = x.ndim - 1;
    return TH_OK;
}

TH_GRAD(nll_loss) {
    th_val g;
    uint32_t dim;
    TRY(nll_back(b, &g, &dim));
    th__give(b, th__use(b, 0), g);
    return TH_OK;
}

TH_GRAD(cross_entropy) {
    th_trace *t = b->e.t;
    th_val g, x = th__use(b, 0);
    uint32_t dim;
    TRY(nll_back(b, &g, &dim));
    th_dtype dtype = (th_dtype)th_type_get(t->ctx, t->values[x].type)->dtype;
    th__give(b, x,
             TH_APPLY(b, "torch.ops.aten._log_softmax_backward_data.default", V(b, g), V(b, b->saved[1]),
                      th_node_int(t, dim), th_node_dtype(t, dtype)));
    return TH_OK;
}
