/* Derivatives of views. */
#include "ops/derivatives.h"

#include <string.h>

/* torch's own formula gives the input the gradient of the region, where it should be zero, and zero elsewhere. */
th_status th__grad_as_strided_scatter(th__backward *b) {
    th_trace *t = b->e.t;
    th_val x = th__use(b, 0), src = th__use(b, 1), g = b->tangents[0];
    int64_t offset = 0;
    DECLINE_IF(!x || !th_type_get(t->ctx, t->values[x].type)->contiguous);
    if (th__has(&b->call, 4)) TRY(th__arg_int(&b->call, 4, 0, &offset));
    offset = th__has(&b->call, 4) ? offset - t->values[x].offset : 0;
    DECLINE_IF(offset < 0);
    g = th__own_storage(b, g);
    th_node size = b->call.arg[2], stride = b->call.arg[3], at = th_node_int(t, offset);
    if (th__wants(b, x)) {
        th_node zeros[] = {th__node_of(b, g), size};
        th_val blank = th__emit(&b->e, "torch.Tensor.new_zeros", 2, zeros);
        th_node args[] = {th__node_of(b, g), th__node_of(b, blank), size, stride, at};
        th__give(b, x, th__emit(&b->e, "torch.as_strided_scatter", 5, args));
    }
    if (th__wants(b, src)) {
        th_node args[] = {th__node_of(b, g), size, stride, at};
        th__tensor s;
        TRY(th__arg_tensor(&b->call, 1, &s));
        th__dims strides;
        TRY(th__arg_ints(&b->call, 3, &strides));
        th_typeref type = th_type_tensor(t->ctx, s.dtype, s.device, s.ndim, s.shape, strides.at, 0);
        th__give(b, src, th__emit_view(b, "torch.as_strided", type, g, offset, 4, args));
    }
    return TH_OK;
}

static th_val type_shape(th__backward *b, th_val of, th_node *sizes, uint32_t *n) {
    const th_type *type = th_type_get(b->e.t->ctx, b->e.t->values[of].type);
    if (type->ndim > TH_MAX_RANK) return 0;
    *n = type->ndim;
    for (uint32_t i = 0; i < type->ndim; i++) sizes[i] = th_node_int(b->e.t, type->shape[i]);
    return of;
}

/* Views that only group elements anew: the gradient in the input's shape. */
TH_GRAD(regroup) {
    th_node sizes[TH_MAX_RANK];
    uint32_t n = 0;
    th_val x = th__use(b, 0);
    DECLINE_IF(!x || !type_shape(b, x, sizes, &n));
    th_node args[] = {th__node_of(b, b->tangents[0]), th_node_seq(b->e.t, TH_N_TUPLE, n, sizes)};
    th__give(b, x, th__emit(&b->e, "torch.reshape", 2, args));
    return TH_OK;
}

/* Broadcast: th__give sums what grew. */
TH_GRAD(expand) {
    th__give(b, th__use(b, 0), b->tangents[0]);
    return TH_OK;
}

static th_status exchange(th__backward *b, th_node first, th_node second) {
    th_node args[] = {th__node_of(b, b->tangents[0]), first, second};
    th__give(b, th__use(b, 0), th__emit(&b->e, "torch.transpose", 3, args));
    return TH_OK;
}

TH_GRAD(transpose) { return exchange(b, b->call.arg[1], b->call.arg[2]); }

TH_GRAD(turn) { /* t, T, mT: of two dimensions and up; of one, the same */
    th_val x = th__use(b, 0);
    DECLINE_IF(!x);
    uint32_t ndim = th_type_get(b->e.t->ctx, b->e.t->values[x].type)->ndim;
    if (ndim < 2) return th__grad_expand(b);
    DECLINE_IF(ndim > 2 && strcmp(b->def->name, "T") == 0);
    return exchange(b, th_node_int(b->e.t, -2), th_node_int(b->e.t, -1));
}

TH_GRAD(permute) {
    th_trace *t = b->e.t;
    th__dims dims;
    th_node back[TH_MAX_RANK] = {0};
    TRY(th__arg_size(&b->call, 1, &dims));
    for (uint32_t i = 0; i < dims.n; i++) {
        uint32_t d;
        TRY(th__wrap(dims.at[i], dims.n, &d));
        back[d] = th_node_int(t, i);
    }
    for (uint32_t i = 0; i < dims.n; i++) DECLINE_IF(!back[i]);
    th_node args[] = {th__node_of(b, b->tangents[0]), th_node_seq(t, TH_N_TUPLE, dims.n, back)};
    th__give(b, th__use(b, 0), th__emit(&b->e, "torch.permute", 2, args));
    return TH_OK;
}

/* The pieces of a tensor along one dimension: their gradients side by side; zeros where one has none. */
static th_status join(th__backward *b, const char *callee, th_node dim) {
    th_trace *t = b->e.t;
    th_node pieces[TH_MAX_OUTS], sizes[TH_MAX_RANK];
    uint32_t n = 0, some = 0;
    while (some < b->nouts && !b->tangents[some]) some++;
    DECLINE_IF(some == b->nouts);
    for (uint32_t i = 0; i < b->nouts; i++) {
        th_val g = b->tangents[i];
        if (!g) {
            DECLINE_IF(!type_shape(b, b->outs[i], sizes, &n));
            th_node args[] = {th__node_of(b, b->tangents[some]), th_node_seq(t, TH_N_TUPLE, n, sizes)};
            g = th__emit(&b->e, "torch.Tensor.new_zeros", 2, args);
        }
        pieces[i] = th__node_of(b, g);
        DECLINE_IF(!pieces[i]);
    }
    th_node args[] = {th_node_seq(t, TH_N_LIST, b->nouts, pieces), dim ? dim : th_node_int(t, 0)};
    th__give(b, th__use(b, 0), th__emit(&b->e, callee, 2, args));
    return TH_OK;
}

TH_GRAD(split) { return join(b, "torch.cat", b->call.nparams > 2 ? b->call.arg[2] : 0); }
TH_GRAD(unbind) { return join(b, "torch.stack", b->call.nparams > 1 ? b->call.arg[1] : 0); }

/* A gradient of part of a tensor, zeros elsewhere: torch's own kernels. */
static th_status scatter_back(th__backward *b, const char *kernel, uint32_t n, const th_node *rest) {
    th_trace *t = b->e.t;
    th_val x = th__use(b, 0);
    th_node sizes[TH_MAX_RANK], args[6];
    uint32_t ndim = 0;
    DECLINE_IF(!x || !type_shape(b, x, sizes, &ndim));
    const th_type *type = th_type_get(t->ctx, t->values[x].type);
    th_typeref out = th_type_tensor(t->ctx, (th_dtype)type->dtype, type->device, type->ndim, type->shape, NULL, 0);
    args[0] = th__node_of(b, b->tangents[0]);
    args[1] = th_node_seq(t, TH_N_LIST, ndim, sizes);
    for (uint32_t i = 0; i < n; i++) args[2 + i] = rest[i];
    for (uint32_t i = 0; i < n + 2; i++) DECLINE_IF(!args[i]);
    th__give(b, x, th__emit_typed(&b->e, kernel, out, n + 2, args));
    return TH_OK;
}

TH_GRAD(select) {
    th_node rest[] = {b->call.arg[1], b->call.arg[2]};
    return scatter_back(b, "torch.ops.aten.select_backward.default", 2, rest);
}

TH_GRAD(narrow) {
    th_trace *t = b->e.t;
    th__tensor x;
    uint32_t dim;
    int64_t start, length;
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__arg_dim(&b->call, 1, x.ndim, &dim));
    TRY(th__arg_int(&b->call, 2, 0, &start));
    TRY(th__arg_int(&b->call, 3, 0, &length));
    start += start < 0 ? x.shape[dim] : 0;
    th_node rest[] = {th_node_int(t, dim), th_node_int(t, start), th_node_int(t, start + length), th_node_int(t, 1)};
    return scatter_back(b, "torch.ops.aten.slice_backward.default", 4, rest);
}
