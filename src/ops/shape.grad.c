/* Derivatives of operators that put tensors together: the gradient's parts, or sums of them. */
#include "ops/derivatives.h"

#include <string.h>

static th_node V(th__backward *b, th_val v) { return th__node_of(b, v); }

static th_status give(th__backward *b, th_val g) {
    th__give(b, th__use(b, 0), g);
    return TH_OK;
}

static th_val packed(th__backward *b, th_val g) { return TH_APPLY(b, "torch.Tensor.contiguous", V(b, g)); }

static th_node ints(th__backward *b, uint32_t n, const int64_t *at) {
    th_node kids[TH_MAX_RANK];
    for (uint32_t i = 0; i < n; i++) kids[i] = th_node_int(b->e.t, at[i]);
    return th_node_seq(b->e.t, TH_N_TUPLE, n, kids);
}

static th_status list_of(th__backward *b, const th_node_data **list, uint32_t ndim, uint32_t *dim) {
    int64_t d;
    *list = th__arg(&b->call, 0);
    DECLINE_IF(!th__is_sequence(*list) || (*list)->count == 0 || (*list)->count > TH_MAX_PARAMS);
    TRY(th__arg_int(&b->call, 1, 0, &d));
    return th__wrap(d, ndim, dim);
}

TH_GRAD(cat) {
    th_trace *t = b->e.t;
    const th_node_data *list;
    uint32_t dim, ndim = th_type_get(t->ctx, t->values[b->outs[0]].type)->ndim;
    int64_t at = 0;
    TRY(list_of(b, &list, ndim, &dim));
    const th_node_data parts = *list; /* the pool may move */
    for (uint32_t i = 0; i < parts.count; i++) {
        th__tensor x;
        TRY(th__node_tensor(&b->call, t->kids[parts.u.kids + i], &x));
        if (x.ndim == 1 && x.shape[0] == 0 && ndim != 1) { /* left out, whatever the others are */
            DECLINE_IF(th__wants(b, x.value));
            continue;
        }
        DECLINE_IF(x.ndim != ndim);
        if (th__wants(b, x.value))
            th__give(b, x.value,
                     TH_APPLY(b, "torch.narrow", V(b, b->tangents[0]), th_node_int(t, dim), th_node_int(t, at),
                              th_node_int(t, x.shape[dim])));
        at += x.shape[dim];
    }
    return TH_OK;
}

TH_GRAD(stack) {
    th_trace *t = b->e.t;
    const th_node_data *list;
    uint32_t dim, ndim = th_type_get(t->ctx, t->values[b->outs[0]].type)->ndim;
    TRY(list_of(b, &list, ndim, &dim));
    const th_node_data parts = *list;
    for (uint32_t i = 0; i < parts.count; i++) {
        th__tensor x;
        TRY(th__node_tensor(&b->call, t->kids[parts.u.kids + i], &x));
        if (th__wants(b, x.value))
            th__give(b, x.value,
                     TH_APPLY(b, "torch.select", V(b, b->tangents[0]), th_node_int(t, dim), th_node_int(t, i)));
    }
    return TH_OK;
}

/* Each dimension as (times, size), the first summed. */
static th_status repeated(th__backward *b, const th__tensor *x, const th__dims *times) {
    int64_t shape[TH_MAX_RANK];
    th_node dims[TH_MAX_RANK];
    uint32_t n = 0, ndims = 0, more = times->n - x->ndim;
    DECLINE_IF(times->n < x->ndim || times->n + x->ndim > TH_MAX_RANK);
    for (uint32_t i = 0; i < times->n; i++) {
        DECLINE_IF(times->at[i] <= 0);
        if (i < more || times->at[i] != 1) {
            dims[ndims++] = th_node_int(b->e.t, n);
            shape[n++] = times->at[i];
        }
        if (i >= more) shape[n++] = x->shape[i - more];
    }
    if (!ndims) return give(b, b->tangents[0]);
    th_val split = TH_APPLY(b, "torch.reshape", V(b, b->tangents[0]), ints(b, n, shape));
    return give(b, TH_APPLY(b, "torch.sum", V(b, split), th_node_seq(b->e.t, TH_N_TUPLE, ndims, dims)));
}

TH_GRAD(repeat) {
    th__tensor x;
    th__dims times;
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__arg_size(&b->call, 1, &times));
    return repeated(b, &x, &times);
}

TH_GRAD(tile) {
    th__tensor x;
    th__dims times, all = {0};
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__arg_size(&b->call, 1, &times));
    for (; all.n + times.n < x.ndim; all.n++) all.at[all.n] = 1;
    DECLINE_IF(all.n + times.n > TH_MAX_RANK);
    for (uint32_t i = 0; i < times.n; i++) all.at[all.n++] = times.at[i];
    return repeated(b, &x, &all);
}

TH_GRAD(repeat_interleave) {
    th__tensor x;
    int64_t times, shape[TH_MAX_RANK + 1];
    uint32_t dim;
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__arg_int(&b->call, 1, 0, &times));
    DECLINE_IF(!th__has(&b->call, 2) || times <= 0 || x.ndim == 0 || x.ndim == TH_MAX_RANK);
    TRY(th__arg_dim(&b->call, 2, x.ndim, &dim));
    memcpy(shape, x.shape, (dim + 1) * sizeof *shape);
    shape[dim + 1] = times;
    memcpy(shape + dim + 2, x.shape + dim + 1, (x.ndim - dim - 1) * sizeof *shape);
    th_val split = TH_APPLY(b, "torch.reshape", V(b, b->tangents[0]), ints(b, x.ndim + 1, shape));
    int64_t summed = dim + 1;
    return give(b, TH_APPLY(b, "torch.sum", V(b, split), ints(b, 1, &summed)));
}

/* A copy of the inner part, as torch's: the gradient that came in stays the caller's. */
TH_GRAD(pad) {
    th_trace *t = b->e.t;
    th__tensor x;
    th__dims pads;
    const th_node_data *mode = th__arg(&b->call, 2);
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__node_ints(&b->call, b->call.arg[1], &pads));
    DECLINE_IF(mode->kind != TH_N_ABSENT && (mode->kind != TH_N_STR || mode->u.ref != th_intern_z(t->ctx, "constant")));
    DECLINE_IF(pads.n % 2 != 0 || pads.n / 2 > x.ndim);
    th_val g = b->tangents[0];
    for (uint32_t i = 0; i < pads.n / 2; i++) {
        uint32_t dim = x.ndim - 1 - i;
        DECLINE_IF(pads.at[2 * i] < 0 || pads.at[2 * i + 1] < 0);
        if (pads.at[2 * i] || pads.at[2 * i + 1])
            g = TH_APPLY(b, "torch.narrow", V(b, g), th_node_int(t, dim), th_node_int(t, pads.at[2 * i]),
                         th_node_int(t, x.shape[dim]));
    }
    DECLINE_IF(!g);
    return give(b, th__emit_packed(&b->e, g));
}

static th_status triangle(th__backward *b, const char *callee) {
    int64_t diagonal;
    TRY(th__arg_int(&b->call, 1, 0, &diagonal));
    return give(b, TH_APPLY(b, callee, V(b, b->tangents[0]), th_node_int(b->e.t, diagonal)));
}

TH_GRAD(tril) { return triangle(b, "torch.tril"); }
TH_GRAD(triu) { return triangle(b, "torch.triu"); }

TH_GRAD(roll) {
    th__dims shifts;
    TRY(th__arg_ints(&b->call, 1, &shifts));
    for (uint32_t i = 0; i < shifts.n; i++) shifts.at[i] = -shifts.at[i];
    th_val g = packed(b, b->tangents[0]);
    if (!th__has(&b->call, 2)) return give(b, TH_APPLY(b, "torch.roll", V(b, g), ints(b, shifts.n, shifts.at)));
    return give(b, TH_APPLY(b, "torch.roll", V(b, g), ints(b, shifts.n, shifts.at), b->call.arg[2]));
}

TH_GRAD(flip) {
    th__dims dims;
    TRY(th__arg_size(&b->call, 1, &dims));
    return give(b, TH_APPLY(b, "torch.flip", V(b, packed(b, b->tangents[0])), ints(b, dims.n, dims.at)));
}
