/* New tensors put together from others: cat, stack, repeat, pad, roll, flip, tril and the like. */
#include "ops/derivatives.h"
#include "ops/iterator.h"

#include <string.h>

/* ---- rules ---- */

enum { MAX_PARTS = 64 };

/* The list is the first parameter, the dimension the second, 0 when not given. */
static th_status parts(th_call *call, th__tensor *xs, uint32_t *n, int64_t *dim) {
    TRY(th__arg_tensors(call, 0, MAX_PARTS, xs, n));
    for (uint32_t i = 1; i < *n; i++) DECLINE_IF(xs[i].device != xs[0].device);
    return th__arg_int(call, 1, 0, dim);
}

static th_dtype parts_dtype(const th__tensor *xs, uint32_t n) {
    th_dtype dtype = TH_DTYPE_NONE;
    for (uint32_t i = 0; i < n; i++) dtype = th__promote(dtype, xs[i].dtype);
    return dtype;
}

/* channels_last only when every part suggests it, those without elements too. */
static void parts_strides(const th__tensor *xs, uint32_t n, uint32_t ndim, const int64_t *shape, int64_t *stride) {
    bool channels_last = ndim == 4 || ndim == 5;
    for (uint32_t i = 0; channels_last && i < n; i++) channels_last = th__suggests_channels_last(&xs[i]);
    if (channels_last)
        th__channels_last(ndim, shape, stride);
    else
        th__row_major(ndim, shape, stride);
}

/* Tensors of the one shape (0) are left out by torch, whatever the others are. */
static bool is_skipped(const th__tensor *x) { return x->ndim == 1 && x->shape[0] == 0; }

static th_status cat(th_call *call) {
    th__tensor xs[MAX_PARTS];
    const th__tensor *first = NULL;
    uint32_t n, dim = 0;
    int64_t d, shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    TRY(parts(call, xs, &n, &d));
    for (uint32_t i = 0; i < n; i++) {
        const th__tensor *x = &xs[i];
        if (is_skipped(x)) continue;
        if (!first) {
            DECLINE_IF(x->ndim == 0);
            TRY(th__wrap(d, x->ndim, &dim));
            memcpy(shape, x->shape, x->ndim * sizeof *shape);
            first = x;
            continue;
        }
        DECLINE_IF(x->ndim != first->ndim);
        for (uint32_t j = 0; j < x->ndim; j++) DECLINE_IF(j != dim && x->shape[j] != shape[j]);
        shape[dim] += x->shape[dim];
    }
    DECLINE_IF(!first);
    parts_strides(xs, n, first->ndim, shape, stride);
    return th__out_fresh(call, parts_dtype(xs, n), first->device, first->ndim, shape, stride);
}

/* A new last dimension: torch gives each part one of size 1 and joins them there. */
static th_status stack_last(th_call *call, th__tensor *xs, uint32_t n) {
    int64_t shape[TH_MAX_RANK], strides[MAX_PARTS][TH_MAX_RANK], stride[TH_MAX_RANK];
    uint32_t ndim = xs[0].ndim + 1;
    memcpy(shape, xs[0].shape, xs[0].ndim * sizeof *shape);
    shape[xs[0].ndim] = 1;
    for (uint32_t i = 0; i < n; i++) {
        memcpy(strides[i], xs[i].stride, xs[i].ndim * sizeof *stride);
        strides[i][xs[i].ndim] = 1;
        xs[i].ndim = ndim;
        xs[i].shape = shape;
        xs[i].stride = strides[i];
    }
    int64_t joined[TH_MAX_RANK];
    memcpy(joined, shape, ndim * sizeof *shape);
    joined[ndim - 1] = n;
    parts_strides(xs, n, ndim, joined, stride);
    return th__out_fresh(call, xs[0].dtype, xs[0].device, ndim, joined, stride);
}

/* Elsewhere it joins them along the old dimension and splits that. */
static th_status stack_inside(th_call *call, const th__tensor *xs, uint32_t n, uint32_t dim) {
    int64_t joined[TH_MAX_RANK], stride[TH_MAX_RANK], split[TH_MAX_RANK];
    uint32_t ndim = xs[0].ndim;
    th__dims to = {.n = ndim + 1};
    memcpy(joined, xs[0].shape, ndim * sizeof *joined);
    DECLINE_IF(__builtin_mul_overflow(joined[dim], (int64_t)n, &joined[dim]));
    parts_strides(xs, n, ndim, joined, stride);
    for (uint32_t i = 0; i <= ndim; i++) to.at[i] = i == dim ? n : xs[0].shape[i - (i > dim)];
    DECLINE_IF(!th__view_strides(ndim, joined, stride, &to, split));
    return th__out_fresh(call, xs[0].dtype, xs[0].device, to.n, to.at, split);
}

static th_status stack(th_call *call) {
    th__tensor xs[MAX_PARTS];
    uint32_t n, dim;
    int64_t d;
    TRY(parts(call, xs, &n, &d));
    DECLINE_IF(xs[0].ndim + 1 > TH_MAX_RANK);
    TRY(th__wrap(d, xs[0].ndim + 1, &dim));
    for (uint32_t i = 0; i < n; i++) {
        DECLINE_IF(xs[i].ndim != xs[0].ndim || xs[i].dtype != xs[0].dtype);
        for (uint32_t j = 0; j < xs[i].ndim; j++) DECLINE_IF(xs[i].shape[j] != xs[0].shape[j]);
    }
    return dim == xs[0].ndim ? stack_last(call, xs, n) : stack_inside(call, xs, n, dim);
}

static th_status repeat_of(th_call *call, const th__tensor *x, const th__dims *times) {
    int64_t shape[TH_MAX_RANK];
    DECLINE_IF(times->n < x->ndim);
    uint32_t more = times->n - x->ndim;
    for (uint32_t i = 0; i < times->n; i++) {
        DECLINE_IF(times->at[i] < 0);
        DECLINE_IF(__builtin_mul_overflow(times->at[i], i < more ? 1 : x->shape[i - more], &shape[i]));
    }
    return th__out_fresh(call, x->dtype, x->device, times->n, shape, NULL);
}

static th_status repeat(th_call *call) {
    th__tensor x;
    th__dims times;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &times));
    return repeat_of(call, &x, &times);
}

static th_status tile(th_call *call) {
    th__tensor x;
    th__dims times, all = {0};
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &times));
    for (; all.n + times.n < x.ndim; all.n++) all.at[all.n] = 1;
    for (uint32_t i = 0; i < times.n; i++) all.at[all.n++] = times.at[i];
    return repeat_of(call, &x, &all);
}

static th_status repeat_interleave(th_call *call) {
    th__tensor x;
    int64_t times, shape[TH_MAX_RANK];
    uint32_t dim;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(th__arg(call, 1)->kind != TH_N_INT);
    TRY(th__arg_int(call, 1, 0, &times));
    DECLINE_IF(times < 0);
    if (!th__has(call, 2)) {
        DECLINE_IF(__builtin_mul_overflow(th__numel(x.ndim, x.shape), times, &shape[0]));
        DECLINE_IF(th__has(call, 3));
        return th__out_fresh(call, x.dtype, x.device, 1, shape, NULL);
    }
    DECLINE_IF(x.ndim == 0);
    TRY(th__arg_dim(call, 2, x.ndim, &dim));
    memcpy(shape, x.shape, x.ndim * sizeof *shape);
    DECLINE_IF(__builtin_mul_overflow(x.shape[dim], times, &shape[dim]));
    if (th__has(call, 3)) {
        int64_t announced;
        TRY(th__arg_int(call, 3, 0, &announced));
        DECLINE_IF(announced != shape[dim]);
    }
    return th__out_fresh(call, x.dtype, x.device, x.ndim, shape, NULL);
}

/* F.pad by a constant; pads come in pairs from the last dimension. Negative ones cut. */
static th_status pad(th_call *call) {
    th__tensor x;
    th__dims pads;
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    bool grows = false;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__node_ints(call, call->arg[1], &pads));
    const th_node_data *mode = th__arg(call, 2), *value = th__arg(call, 3);
    DECLINE_IF(mode->kind != TH_N_ABSENT &&
               (mode->kind != TH_N_STR || mode->u.ref != th_intern_z(call->trace->ctx, "constant")));
    DECLINE_IF(value->kind > TH_N_NONE && (!th__is_number(value) || !th__fits(value, x.dtype)));
    DECLINE_IF(pads.n % 2 != 0 || pads.n / 2 > x.ndim);
    memcpy(shape, x.shape, x.ndim * sizeof *shape);
    for (uint32_t i = 0; i < pads.n; i++) {
        int64_t *size = &shape[x.ndim - 1 - i / 2];
        DECLINE_IF(pads.at[i] < 0 || __builtin_add_overflow(*size, pads.at[i], size));
        grows |= pads.at[i] > 0;
    }
    if (!grows) return th__out_like(call, &x, x.dtype, x.device);
    bool channels_last = th__suggests_channels_last(&x);
    if (channels_last) th__channels_last(x.ndim, shape, stride);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, shape, channels_last ? stride : NULL);
}

/* ---- the same shape, row-major ---- */

static th_status triangle(th_call *call) {
    th__tensor x;
    int64_t diagonal;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_int(call, 1, 0, &diagonal));
    DECLINE_IF(x.ndim < 2);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

static th_status roll(th_call *call) {
    th__tensor x;
    th__dims shifts, dims;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_ints(call, 1, &shifts));
    if (th__has(call, 2)) {
        TRY(th__arg_ints(call, 2, &dims));
        for (uint32_t i = 0; i < dims.n; i++) {
            uint32_t dim;
            TRY(th__wrap(dims.at[i], x.ndim, &dim));
        }
        DECLINE_IF(dims.n != shifts.n || dims.n == 0);
    } else {
        DECLINE_IF(shifts.n != 1);
    }
    DECLINE_IF(!x.contiguous || x.ndim == 0);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

static th_status flip(th_call *call) {
    th__tensor x;
    th__dims dims;
    uint32_t set;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &dims));
    TRY(th__dim_set(&dims, x.ndim, &set));
    DECLINE_IF(!x.contiguous);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

/* ---- operators ---- */

#define SHAPE(name_, params_, names_, ...) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_OPAQUE, .meta = __VA_ARGS__}

const th_opdef th__ops_shape[] = {
    SHAPE("cat", "tensors, dim=0", "torch.cat torch.concat torch.concatenate", cat, .grad = th__grad_cat),
    SHAPE("stack", "tensors, dim=0", "torch.stack", stack, .grad = th__grad_stack),
    SHAPE("repeat", "input, *repeats", "torch.Tensor.repeat", repeat, .grad = th__grad_repeat),
    SHAPE("tile", "input, *dims", "torch.tile torch.Tensor.tile", tile, .grad = th__grad_tile),
    SHAPE("repeat_interleave", "input, repeats, dim=None, *, output_size=None",
          "torch.repeat_interleave torch.Tensor.repeat_interleave", repeat_interleave,
          .grad = th__grad_repeat_interleave),
    SHAPE("pad", "input, pad, mode=constant, value=None", "torch.nn.functional.pad torch._C._nn.pad", pad,
          .grad = th__grad_pad),
    SHAPE("tril", "input, diagonal=0", "torch.tril torch.Tensor.tril", triangle, .grad = th__grad_tril),
    SHAPE("triu", "input, diagonal=0", "torch.triu torch.Tensor.triu", triangle, .grad = th__grad_triu),
    SHAPE("roll", "input, shifts, dims=None", "torch.roll torch.Tensor.roll", roll, .grad = th__grad_roll),
    SHAPE("flip", "input, *dims", "torch.flip torch.Tensor.flip", flip, .grad = th__grad_flip),
};
const size_t th__ops_shape_count = sizeof th__ops_shape / sizeof *th__ops_shape;
