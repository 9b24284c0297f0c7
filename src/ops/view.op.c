/* Views: operations that only say anew how existing memory is read. Strides, offsets and sharing follow ATen exactly.
 *
 * reshape and flatten are here too: they are views wherever the strides allow one, and copies otherwise.
 */
#include "ops/derivatives.h"

#include <string.h>

/* ---- another shape ---- */

static th_status view_as_size(th_call *call, const th__tensor *x, th__dims *size, bool or_copy) {
    int64_t stride[TH_MAX_RANK];
    TRY(th__infer_size(size, th__numel(x->ndim, x->shape)));
    if (th__view_strides(x->ndim, x->shape, x->stride, size, stride)) {
        return th__out_view(call, x, size->n, size->at, stride, 0);
    }
    return or_copy ? th__out_fresh(call, x->dtype, x->device, size->n, size->at, NULL) : TH_DECLINED;
}

static th_status view(th_call *call) {
    th__tensor x;
    th__dims size;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &size));
    return view_as_size(call, &x, &size, false);
}

static th_status reshape(th_call *call) {
    th__tensor x;
    th__dims size;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &size));
    return view_as_size(call, &x, &size, true);
}

static th_status like_other(th_call *call, bool or_copy) {
    th__tensor x, other;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 1, &other));
    th__dims size = {.n = other.ndim};
    memcpy(size.at, other.shape, other.ndim * sizeof *size.at);
    return view_as_size(call, &x, &size, or_copy);
}

static th_status view_as(th_call *call) { return like_other(call, false); }
static th_status reshape_as(th_call *call) { return like_other(call, true); }

static th_status flatten(th_call *call) {
    th__tensor x;
    int64_t first, last;
    uint32_t from, to;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_int(call, 1, 0, &first));
    TRY(th__arg_int(call, 2, -1, &last));
    TRY(th__wrap(first, x.ndim, &from));
    TRY(th__wrap(last, x.ndim, &to));
    DECLINE_IF(from > to);
    th__dims size = {.n = 1, .at = {1}};
    if (x.ndim > 0 && from == to) return th__out_same(call, &x);
    if (x.ndim > 0) {
        size.n = 0;
        for (uint32_t i = 0; i < from; i++) size.at[size.n++] = x.shape[i];
        size.at[size.n++] = th__numel(to - from + 1, x.shape + from);
        for (uint32_t i = to + 1; i < x.ndim; i++) size.at[size.n++] = x.shape[i];
    }
    return view_as_size(call, &x, &size, true);
}

static th_status unflatten(th_call *call) {
    th__tensor x;
    uint32_t dim;
    th__dims inner, size = {0};
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__node_ints(call, call->arg[2], &inner));
    DECLINE_IF(x.ndim == 0 || inner.n == 0 || x.ndim + inner.n - 1 > TH_MAX_RANK);
    TRY(th__infer_size(&inner, x.shape[dim]));
    for (uint32_t i = 0; i < dim; i++) size.at[size.n++] = x.shape[i];
    for (uint32_t i = 0; i < inner.n; i++) size.at[size.n++] = inner.at[i];
    for (uint32_t i = dim + 1; i < x.ndim; i++) size.at[size.n++] = x.shape[i];
    return view_as_size(call, &x, &size, false);
}

/* ---- another order of dimensions ---- */

static th_status permuted(th_call *call, const th__tensor *x, const uint32_t *order) {
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    for (uint32_t i = 0; i < x->ndim; i++) {
        shape[i] = x->shape[order[i]];
        stride[i] = x->stride[order[i]];
    }
    return th__out_view(call, x, x->ndim, shape, stride, 0);
}

static th_status swapped(th_call *call, const th__tensor *x, uint32_t a, uint32_t b) {
    uint32_t order[TH_MAX_RANK];
    for (uint32_t i = 0; i < x->ndim; i++) order[i] = i == a ? b : i == b ? a : i;
    return permuted(call, x, order);
}

static th_status transpose(th_call *call) {
    th__tensor x;
    uint32_t a, b;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &a));
    TRY(th__arg_dim(call, 2, x.ndim, &b));
    return swapped(call, &x, a, b);
}

static th_status t(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.ndim > 2);
    return x.ndim == 2 ? swapped(call, &x, 0, 1) : swapped(call, &x, 0, 0);
}

/* Tensor.T of other ranks is deprecated, and warns. */
static th_status T_property(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.ndim != 2);
    return swapped(call, &x, 0, 1);
}

static th_status mT_property(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.ndim < 2);
    return swapped(call, &x, x.ndim - 2, x.ndim - 1);
}

static th_status permute(th_call *call) {
    th__tensor x;
    th__dims dims;
    uint32_t order[TH_MAX_RANK], set;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &dims));
    DECLINE_IF(dims.n != x.ndim);
    TRY(th__dim_set(&dims, x.ndim, &set));
    for (uint32_t i = 0; i < dims.n; i++) TRY(th__wrap(dims.at[i], x.ndim, &order[i]));
    return permuted(call, &x, order);
}

static th_status movedim(th_call *call) {
    th__tensor x;
    th__dims from, to;
    uint32_t order[TH_MAX_RANK], taken = 0, placed = 0;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_ints(call, 1, &from));
    TRY(th__arg_ints(call, 2, &to));
    DECLINE_IF(x.ndim == 0 || from.n != to.n);
    for (uint32_t i = 0; i < from.n; i++) {
        uint32_t a, b;
        TRY(th__wrap(from.at[i], x.ndim, &a));
        TRY(th__wrap(to.at[i], x.ndim, &b));
        DECLINE_IF((taken >> a & 1) || (placed >> b & 1));
        taken |= 1u << a;
        placed |= 1u << b;
        order[b] = a;
    }
    for (uint32_t i = 0, next = 0; i < x.ndim; i++) {
        if (placed >> i & 1) continue;
        while (taken >> next & 1) next++;
        order[i] = next++;
    }
    return permuted(call, &x, order);
}

/* ---- more or fewer dimensions ---- */

static th_status unsqueeze(th_call *call) {
    th__tensor x;
    uint32_t dim;
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.ndim == TH_MAX_RANK);
    TRY(th__arg_dim(call, 1, x.ndim + 1, &dim));
    for (uint32_t i = 0; i <= x.ndim; i++) {
        if (i == dim) {
            shape[i] = 1;
            stride[i] = dim == x.ndim ? 1 : x.shape[dim] * x.stride[dim];
        } else {
            shape[i] = x.shape[i - (i > dim)];
            stride[i] = x.stride[i - (i > dim)];
        }
    }
    return th__out_view(call, &x, x.ndim + 1, shape, stride, 0);
}

static th_status squeeze(th_call *call) {
    th__tensor x;
    uint32_t set = ~0u, n = 0;
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    TRY(th__arg_tensor(call, 0, &x));
    if (th__arg(call, 1)->kind != TH_N_ABSENT) {
        th__dims dims;
        TRY(th__arg_ints(call, 1, &dims));
        TRY(th__dim_set(&dims, x.ndim, &set));
    }
    for (uint32_t i = 0; i < x.ndim; i++) {
        if ((set >> i & 1) && x.shape[i] == 1) continue;
        shape[n] = x.shape[i];
        stride[n++] = x.stride[i];
    }
    return th__out_view(call, &x, n, shape, stride, 0);
}

static th_status expand_to(th_call *call, const th__tensor *x, const th__dims *size) {
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    DECLINE_IF(size->n < x->ndim);
    uint32_t more = size->n - x->ndim;
    for (uint32_t i = size->n; i-- > 0;) {
        bool old = i >= more;
        int64_t have = old ? x->shape[i - more] : 1, want = size->at[i];
        stride[i] = old ? x->stride[i - more] : x->ndim ? shape[i + 1] * stride[i + 1] : 0;
        DECLINE_IF(want < -1 || (want == -1 && !old));
        shape[i] = want == -1 ? have : want;
        if (shape[i] == have) continue;
        DECLINE_IF(have != 1);
        stride[i] = 0;
    }
    return th__out_view(call, x, size->n, shape, stride, 0);
}

static th_status expand(th_call *call) {
    th__tensor x;
    th__dims size;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &size));
    return expand_to(call, &x, &size);
}

static th_status expand_as(th_call *call) {
    th__tensor x, other;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 1, &other));
    th__dims size = {.n = other.ndim};
    memcpy(size.at, other.shape, other.ndim * sizeof *size.at);
    return expand_to(call, &x, &size);
}

/* ---- parts ---- */

static th_status part(th_call *call, const th__tensor *x, uint32_t dim, int64_t start, int64_t length) {
    int64_t shape[TH_MAX_RANK];
    memcpy(shape, x->shape, x->ndim * sizeof *shape);
    shape[dim] = length;
    return th__out_view(call, x, x->ndim, shape, x->stride, start * x->stride[dim]);
}

static th_status without(th_call *call, const th__tensor *x, uint32_t dim, int64_t index) {
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    for (uint32_t i = 0, n = 0; i < x->ndim; i++) {
        if (i == dim) continue;
        shape[n] = x->shape[i];
        stride[n++] = x->stride[i];
    }
    return th__out_view(call, x, x->ndim - 1, shape, stride, index * x->stride[dim]);
}

static th_status narrow(th_call *call) {
    th__tensor x;
    uint32_t dim;
    int64_t start, length;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.ndim == 0);
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_int(call, 2, 0, &start));
    TRY(th__arg_int(call, 3, 0, &length));
    if (start < 0) start += x.shape[dim];
    DECLINE_IF(start < 0 || length < 0 || start > x.shape[dim] - length);
    return part(call, &x, dim, start, length);
}

static th_status select_(th_call *call) {
    th__tensor x;
    uint32_t dim;
    int64_t index;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.ndim == 0);
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_int(call, 2, 0, &index));
    if (index < 0) index += x.shape[dim];
    DECLINE_IF(index < 0 || index >= x.shape[dim]);
    return without(call, &x, dim, index);
}

static th_status unbind(th_call *call) {
    th__tensor x;
    int64_t d;
    uint32_t dim;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_int(call, 1, 0, &d));
    TRY(th__wrap(d, x.ndim, &dim));
    DECLINE_IF(x.ndim == 0 || x.shape[dim] > TH_MAX_OUTS || x.shape[dim] == 0);
    call->outs_list = true;
    for (int64_t i = 0; i < x.shape[dim]; i++) TRY(without(call, &x, dim, i));
    return TH_OK;
}

/* Parts of `size` along dim; the last may be shorter. */
static th_status equal_parts(th_call *call, const th__tensor *x, uint32_t dim, int64_t size) {
    int64_t length = x->shape[dim], count = length ? length / size + (length % size != 0) : 1;
    DECLINE_IF(count > TH_MAX_OUTS);
    call->outs_list = true;
    for (int64_t i = 0; i < count; i++) {
        int64_t left = length - i * size;
        TRY(part(call, x, dim, i * size, left < size ? left : size));
    }
    return TH_OK;
}

static th_status parts_of_sizes(th_call *call, const th__tensor *x, uint32_t dim, th_node sizes) {
    const th_node_data *d = th__node(call, sizes);
    int64_t at = 0;
    DECLINE_IF(!th__is_sequence(d) || d->count > TH_MAX_OUTS || d->count == 0);
    call->outs_list = true;
    for (uint32_t i = 0; i < d->count; i++) {
        const th_node_data *size = th__node(call, th__kid(call, d, i));
        DECLINE_IF(size->kind != TH_N_INT || size->u.i < 0 || size->u.i > x->shape[dim] - at);
        TRY(part(call, x, dim, at, size->u.i));
        at += size->u.i;
    }
    return at == x->shape[dim] ? TH_OK : TH_DECLINED;
}

static th_status split_dim(th_call *call, th__tensor *x, uint32_t *dim) {
    int64_t d;
    TRY(th__arg_tensor(call, 0, x));
    DECLINE_IF(x->ndim == 0);
    TRY(th__arg_int(call, 2, 0, &d));
    return th__wrap(d, x->ndim, dim);
}

static th_status split(th_call *call) {
    th__tensor x;
    uint32_t dim;
    TRY(split_dim(call, &x, &dim));
    const th_node_data *size = th__arg(call, 1);
    if (size->kind != TH_N_INT) return parts_of_sizes(call, &x, dim, call->arg[1]);
    DECLINE_IF(size->u.i <= 0);
    return equal_parts(call, &x, dim, size->u.i);
}

static th_status split_with_sizes(th_call *call) {
    th__tensor x;
    uint32_t dim;
    TRY(split_dim(call, &x, &dim));
    return parts_of_sizes(call, &x, dim, call->arg[1]);
}

static th_status chunk(th_call *call) {
    th__tensor x;
    uint32_t dim;
    int64_t chunks;
    TRY(split_dim(call, &x, &dim));
    TRY(th__arg_int(call, 1, 0, &chunks));
    DECLINE_IF(chunks <= 0 || x.shape[dim] == 0);
    return equal_parts(call, &x, dim, x.shape[dim] / chunks + (x.shape[dim] % chunks != 0));
}

/* The main diagonal and its neighbours, as a new last dimension. */
static th_status diagonal(th_call *call) {
    th__tensor x;
    int64_t offset, a, b, shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    uint32_t d1, d2, n = 0;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_int(call, 1, 0, &offset));
    TRY(th__arg_int(call, 2, 0, &a));
    TRY(th__arg_int(call, 3, 1, &b));
    DECLINE_IF(x.ndim < 2 || offset > INT32_MAX || offset < -INT32_MAX);
    TRY(th__wrap(a, x.ndim, &d1));
    TRY(th__wrap(b, x.ndim, &d2));
    DECLINE_IF(d1 == d2);
    int64_t rows = x.shape[d1] + (offset < 0 ? offset : 0), columns = x.shape[d2] - (offset > 0 ? offset : 0);
    int64_t length = rows < columns ? rows : columns;
    if (length < 0) length = 0;
    for (uint32_t i = 0; i < x.ndim; i++) {
        if (i == d1 || i == d2) continue;
        shape[n] = x.shape[i];
        stride[n++] = x.stride[i];
    }
    shape[n] = length;
    stride[n++] = x.stride[d1] + x.stride[d2];
    int64_t skip = offset >= 0 ? offset * x.stride[d2] : -offset * x.stride[d1];
    return th__out_view(call, &x, n, shape, stride, length ? skip : 0);
}

/* A copy of the input's storage in which the region holds `src`. */
static th_status as_strided_scatter(th_call *call) {
    th__tensor x, src;
    th__dims size, stride;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 1, &src));
    TRY(th__arg_ints(call, 2, &size));
    TRY(th__arg_ints(call, 3, &stride));
    DECLINE_IF(!th__is_dense(x.ndim, x.shape, x.stride));
    DECLINE_IF(src.dtype != x.dtype || src.device != x.device || size.n != src.ndim || stride.n != size.n);
    for (uint32_t i = 0; i < size.n; i++) DECLINE_IF(size.at[i] != src.shape[i] || stride.at[i] < 0);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, x.stride);
}

/* ---- operators ---- */

#define VIEW(name_, params_, names_, ...) \
    {.name = name_,                       \
     .params = params_,                   \
     .names = names_,                     \
     .effects = TH_OPDEF_VIEW,            \
     .fusion = TH_FUSE_VIEW,              \
     .meta = __VA_ARGS__}

const th_opdef th__ops_view[] = {
    VIEW("view", "input, *size", "torch.Tensor.view", view, .grad = th__grad_regroup),
    VIEW("view_as", "input, other", "torch.Tensor.view_as", view_as, .grad = th__grad_regroup),
    VIEW("reshape", "input, *shape", "torch.reshape torch.Tensor.reshape", reshape, .grad = th__grad_regroup),
    VIEW("reshape_as", "input, other", "torch.Tensor.reshape_as", reshape_as, .grad = th__grad_regroup),
    VIEW("flatten", "input, start_dim=0, end_dim=-1", "torch.flatten torch.Tensor.flatten", flatten,
         .grad = th__grad_regroup),
    VIEW("unflatten", "input, dim, sizes", "torch.unflatten torch.Tensor.unflatten", unflatten,
         .grad = th__grad_regroup),
    VIEW("transpose", "input, dim0, dim1", "torch.transpose torch.Tensor.transpose", transpose,
         .grad = th__grad_transpose),
    VIEW("swapdims", "input, dim0, dim1", "torch.swapdims torch.Tensor.swapdims", transpose,
         .grad = th__grad_transpose),
    VIEW("swapaxes", "input, axis0, axis1", "torch.swapaxes torch.Tensor.swapaxes", transpose,
         .grad = th__grad_transpose),
    VIEW("t", "input", "torch.t torch.Tensor.t", t, .grad = th__grad_turn),
    VIEW("T", "input", "torch.Tensor.T.__get__", T_property, .grad = th__grad_turn),
    VIEW("mT", "input", "torch.Tensor.mT.__get__ torch.adjoint torch.Tensor.adjoint", mT_property,
         .grad = th__grad_turn),
    VIEW("permute", "input, *dims", "torch.permute torch.Tensor.permute", permute, .grad = th__grad_permute),
    VIEW("movedim", "input, source, destination",
         "torch.movedim torch.Tensor.movedim torch.moveaxis torch.Tensor.moveaxis", movedim),
    VIEW("unsqueeze", "input, dim", "torch.unsqueeze torch.Tensor.unsqueeze", unsqueeze, .grad = th__grad_regroup),
    VIEW("squeeze", "input, dim=None", "torch.squeeze torch.Tensor.squeeze", squeeze, .grad = th__grad_regroup),
    VIEW("expand", "input, *size", "torch.Tensor.expand", expand, .grad = th__grad_expand),
    VIEW("expand_as", "input, other", "torch.Tensor.expand_as", expand_as, .grad = th__grad_expand),
    VIEW("broadcast_to", "input, size", "torch.broadcast_to torch.Tensor.broadcast_to", expand,
         .grad = th__grad_expand),
    VIEW("narrow", "input, dim, start, length", "torch.narrow torch.Tensor.narrow", narrow, .grad = th__grad_narrow),
    VIEW("select", "input, dim, index", "torch.select torch.Tensor.select", select_, .grad = th__grad_select),
    VIEW("unbind", "input, dim=0", "torch.unbind torch.Tensor.unbind", unbind, .grad = th__grad_unbind),
    VIEW("split", "tensor, split_size_or_sections, dim=0", "torch.split", split, .grad = th__grad_split),
    VIEW("Tensor.split", "input, split_size, dim=0", "torch.Tensor.split", split, .grad = th__grad_split),
    VIEW("split_with_sizes", "input, split_sizes, dim=0", "torch.split_with_sizes torch.Tensor.split_with_sizes",
         split_with_sizes, .grad = th__grad_split),
    VIEW("chunk", "input, chunks, dim=0", "torch.chunk torch.Tensor.chunk", chunk, .grad = th__grad_split),
    {.name = "as_strided_scatter",
     .params = "input, src, size, stride, storage_offset=None",
     .names = "torch.as_strided_scatter torch.Tensor.as_strided_scatter torch.ops.aten.as_strided_scatter.default",
     .fusion = TH_FUSE_OPAQUE,
     .meta = as_strided_scatter,
     .grad = th__grad_as_strided_scatter},
    VIEW("diagonal", "input, offset=0, dim1=0, dim2=1", "torch.diagonal torch.Tensor.diagonal", diagonal),
};
const size_t th__ops_view_count = sizeof th__ops_view / sizeof *th__ops_view;
