/* Derivatives of reductions and scans. */
#include "ops/derivatives.h"

static th_node V(th__backward *b, th_val v) { return th__node_of(b, v); }

static th_status give(th__backward *b, th_val g) {
    th__give(b, th__use(b, 0), g);
    return TH_OK;
}

/* What was reduced: bits of x's dimensions, in how many elements, and how many make one of the result. */
typedef struct reduced {
    th__tensor x;
    uint32_t set;
    int64_t count;
    bool keep;
} reduced;

static th_status reduced_of(th__backward *b, uint32_t dim_at, uint32_t keep_at, reduced *r) {
    th__dims dims;
    TRY(th__arg_tensor(&b->call, 0, &r->x));
    r->set = ~0u;
    r->keep = false;
    if (dim_at && th__has(&b->call, dim_at)) {
        TRY(th__arg_ints(&b->call, dim_at, &dims));
        if (dims.n) TRY(th__dim_set(&dims, r->x.ndim, &r->set));
    }
    if (keep_at) TRY(th__arg_bool(&b->call, keep_at, false, &r->keep));
    r->count = 1;
    for (uint32_t i = 0; i < r->x.ndim; i++)
        if (r->set >> i & 1) r->count *= r->x.shape[i];
    return TH_OK;
}

/* v in the shape that the reduction has with keepdim. */
static th_val kept(th__backward *b, const reduced *r, th_val v) {
    th_node sizes[TH_MAX_RANK];
    if (r->keep || !r->x.ndim) return v;
    for (uint32_t i = 0; i < r->x.ndim; i++) sizes[i] = th_node_int(b->e.t, r->set >> i & 1 ? 1 : r->x.shape[i]);
    return TH_APPLY(b, "torch.reshape", V(b, v), th_node_seq(b->e.t, TH_N_TUPLE, r->x.ndim, sizes));
}

static th_val spread(th__backward *b, const reduced *r, th_val v) {
    th_node sizes[TH_MAX_RANK];
    for (uint32_t i = 0; i < r->x.ndim; i++) sizes[i] = th_node_int(b->e.t, r->x.shape[i]);
    return TH_APPLY(b, "torch.Tensor.expand", V(b, kept(b, r, v)), th_node_seq(b->e.t, TH_N_TUPLE, r->x.ndim, sizes));
}

static th_node dims_of(th__backward *b, const reduced *r) {
    th_node dims[TH_MAX_RANK];
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->x.ndim; i++)
        if (r->set >> i & 1) dims[n++] = th_node_int(b->e.t, i);
    return th_node_seq(b->e.t, TH_N_TUPLE, n, dims);
}

TH_GRAD(sum) {
    reduced r;
    TRY(reduced_of(b, 1, 2, &r));
    return give(b, spread(b, &r, b->tangents[0]));
}

TH_GRAD(mean) {
    reduced r;
    TRY(reduced_of(b, 1, 2, &r));
    DECLINE_IF(r.count == 0);
    th_val g = spread(b, &r, b->tangents[0]);
    return give(b, TH_APPLY(b, "torch.div", V(b, g), th_node_int(b->e.t, r.count)));
}

/* Elements that are equally extreme share the gradient. */
TH_GRAD(extreme) {
    reduced r;
    TRY(reduced_of(b, 1, 2, &r));
    DECLINE_IF(r.x.ndim == 0);
    th_val best = kept(b, &r, b->outs[0]), g = kept(b, &r, b->tangents[0]);
    th_val mask = TH_APPLY(b, "torch.eq", b->call.arg[0], V(b, best));
    th_val count = TH_APPLY(b, "torch.sum", V(b, mask), dims_of(b, &r), th_node_bool(b->e.t, true));
    th_val part = TH_APPLY(b, "torch.div", V(b, g), V(b, count));
    return give(b, TH_APPLY(b, "torch.mul", V(b, part), V(b, mask)));
}

/* Over everything, where a NaN is an extreme, too. Of two tensors: derived. */
TH_GRAD(extreme_of_all) {
    reduced r;
    DECLINE_IF(th__arg(&b->call, 1)->kind != TH_N_ABSENT);
    TRY(reduced_of(b, 0, 0, &r));
    th_node x = b->call.arg[0], best = V(b, b->outs[0]);
    th_val nans =
        TH_APPLY(b, "torch.logical_and", V(b, TH_APPLY(b, "torch.isnan", x)), V(b, TH_APPLY(b, "torch.isnan", best)));
    th_val mask = TH_APPLY(b, "torch.logical_or", V(b, TH_APPLY(b, "torch.eq", x, best)), V(b, nans));
    th_val count = TH_APPLY(b, "torch.sum", V(b, mask));
    th_val part = TH_APPLY(b, "torch.div", V(b, b->tangents[0]), V(b, count));
    return give(b, TH_APPLY(b, "torch.mul", V(b, mask), V(b, part)));
}

/* ---- var and std ---- */

/* var(x), var(x, unbiased), var(x, dim, unbiased, keepdim) or var(x, dim, correction=1, keepdim=False) */
static th_status var_of(th__backward *b, reduced *r, double *degrees) {
    bool unbiased;
    double correction = 1;
    bool first_is_unbiased = th__arg(&b->call, 1)->kind == TH_N_BOOL;
    TRY(reduced_of(b, first_is_unbiased ? 0 : 1, 3, r));
    TRY(th__arg_bool(&b->call, first_is_unbiased ? 1 : 2, true, &unbiased));
    if (!unbiased) correction = 0;
    const th_node_data *d = th__arg(&b->call, 4);
    if (d->kind == TH_N_INT || d->kind == TH_N_FLOAT) correction = d->kind == TH_N_INT ? (double)d->u.i : d->u.f;
    *degrees = (double)r->count - correction;
    DECLINE_IF(!(*degrees > 0) || r->x.ndim == 0);
    return TH_OK;
}

static th_val var_back(th__backward *b, const reduced *r, double degrees, th_val g) {
    th_val mean = TH_APPLY(b, "torch.mean", b->call.arg[0], dims_of(b, r), th_node_bool(b->e.t, true));
    th_val off = TH_APPLY(b, "torch.sub", b->call.arg[0], V(b, mean));
    th_val scaled = TH_APPLY(b, "torch.mul", V(b, kept(b, r, g)), th_node_float(b->e.t, 2.0 / degrees));
    return TH_APPLY(b, "torch.mul", V(b, scaled), V(b, off));
}

TH_GRAD(var) {
    reduced r;
    double degrees;
    TRY(var_of(b, &r, &degrees));
    return give(b, var_back(b, &r, degrees, b->tangents[0]));
}

TH_GRAD(std) {
    reduced r;
    double degrees;
    TRY(var_of(b, &r, &degrees));
    th_val twice = TH_APPLY(b, "torch.mul", V(b, b->outs[0]), th_node_int(b->e.t, 2));
    th_val g = TH_APPLY(b, "torch.div", V(b, b->tangents[0]), V(b, twice));
    th_val flat = TH_APPLY(b, "torch.eq", V(b, b->outs[0]), th_node_int(b->e.t, 0));
    g = TH_APPLY(b, "torch.masked_fill", V(b, g), V(b, flat), th_node_int(b->e.t, 0));
    return give(b, var_back(b, &r, degrees, g));
}

TH_GRAD(logsumexp) {
    reduced r;
    TRY(reduced_of(b, 1, 2, &r));
    DECLINE_IF(!th__is_float(r.x.dtype));
    th_val off = TH_APPLY(b, "torch.sub", b->call.arg[0], V(b, kept(b, &r, b->outs[0])));
    th_val share = TH_APPLY(b, "torch.exp", V(b, off));
    return give(b, TH_APPLY(b, "torch.mul", V(b, kept(b, &r, b->tangents[0])), V(b, share)));
}

/* ---- scans ---- */

/* Summed from the other end. */
TH_GRAD(cumsum) {
    th__tensor x;
    uint32_t dim;
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__arg_dim(&b->call, 1, x.ndim, &dim));
    DECLINE_IF(x.ndim == 0 || th__numel(x.ndim, x.shape) == 0);
    th_node at = th_node_int(b->e.t, dim), list = th_node_seq(b->e.t, TH_N_TUPLE, 1, &at);
    th_val g = TH_APPLY(b, "torch.Tensor.contiguous", V(b, b->tangents[0]));
    g = TH_APPLY(b, "torch.flip", V(b, g), list);
    g = TH_APPLY(b, "torch.cumsum", V(b, g), at);
    return give(b, TH_APPLY(b, "torch.flip", V(b, g), list));
}
