/* New tensors put together from others: cat, stack, repeat, pad, roll, flip, tril and the like. */
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
    th_dtype with_dims = TH_DTYPE_NONE;
    for (uint32_t i = 0; i < n; i++) with_dims = th__promote(with_dims, xs[i].dtype);
    return with_dims;
}

/* channels_last only when every part suggests it. */
static th_status out_of_parts(th_call *call, const th__tensor *xs, uint32_t n, uint32_t ndim, const int64_t *shape) {
    int64_t stride[TH_MAX_RANK];
    bool channels_last = ndim == 4 || ndim == 5;
    for (uint32_t i = 0; channels_last && i < n; i++) channels_last = th__suggests_channels_last(&xs[i]);
    if (channels_last) th__channels_last(ndim, shape, stride);
    return th__out_fresh(call, parts_dtype(xs, n), xs[0].device, ndim, shape, channels_last ? stride : NULL);
}

static th_status cat(th_call *call) {
    th__tensor xs[MAX_PARTS];
    uint32_t n, dim;
    int64_t d, shape[TH_MAX_RANK];
    TRY(parts(call, xs, &n, &d));
    DECLINE_IF(xs[0].ndim == 0);
    TRY(th__wrap(d, xs[0].ndim, &dim));
    memcpy(shape, xs[0].shape, xs[0].ndim * sizeof *shape);
    for (uint32_t i = 0; i < n; i++) {
        DECLINE_IF(xs[i].ndim != xs[0].ndim || (xs[i].ndim == 1 && xs[i].shape[0] == 0)); /* skipped by torch */
        for (uint32_t j = 0; i > 0 && j < xs[i].ndim; j++) {
            if (j == dim)
                shape[j] += xs[i].shape[j];
            else
                DECLINE_IF(xs[i].shape[j] != shape[j]);
        }
    }
    return out_of_parts(call, xs, n, xs[0].ndim, shape);
}

static th_status stack(th_call *call) {
    th__tensor xs[MAX_PARTS];
    uint32_t n, dim;
    int64_t d, shape[TH_MAX_RANK];
    TRY(parts(call, xs, &n, &d));
    DECLINE_IF(xs[0].ndim + 1 > TH_MAX_RANK);
    TRY(th__wrap(d, xs[0].ndim + 1, &dim));
    bool plain = true;
    for (uint32_t i = 0; i < n; i++) {
        DECLINE_IF(xs[i].ndim != xs[0].ndim || xs[i].dtype != xs[0].dtype);
        for (uint32_t j = 0; j < xs[i].ndim; j++) DECLINE_IF(xs[i].shape[j] != xs[0].shape[j]);
        plain &= xs[i].contiguous;
    }
    DECLINE_IF(!plain && (xs[0].ndim == 3 || xs[0].ndim == 4)); /* may look like channels_last */
    for (uint32_t i = 0; i <= xs[0].ndim; i++) shape[i] = i == dim ? n : xs[0].shape[i - (i > dim)];
    return th__out_fresh(call, xs[0].dtype, xs[0].device, xs[0].ndim + 1, shape, NULL);
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
        return th__out_fresh(call, x.dtype, x.device, 1, shape, NULL);
    }
    DECLINE_IF(x.ndim == 0);
    TRY(th__arg_dim(call, 2, x.ndim, &dim));
    memcpy(shape, x.shape, x.ndim * sizeof *shape);
    DECLINE_IF(__builtin_mul_overflow(x.shape[dim], times, &shape[dim]));
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
        DECLINE_IF(pads.at[i] < 0);
        grows |= pads.at[i] > 0;
        shape[x.ndim - 1 - i / 2] += pads.at[i];
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

#define SHAPE(name_, params_, names_, rule) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_OPAQUE, .meta = rule}

const th_opdef th__ops_shape[] = {
    SHAPE("cat", "tensors, dim=0", "torch.cat torch.concat torch.concatenate", cat),
    SHAPE("stack", "tensors, dim=0", "torch.stack", stack),
    SHAPE("repeat", "input, *repeats", "torch.Tensor.repeat", repeat),
    SHAPE("tile", "input, *dims", "torch.tile torch.Tensor.tile", tile),
    SHAPE("repeat_interleave", "input, repeats, dim=None", "torch.repeat_interleave torch.Tensor.repeat_interleave",
          repeat_interleave),
    SHAPE("pad", "input, pad, mode=constant, value=None", "torch.nn.functional.pad torch._C._nn.pad", pad),
    SHAPE("tril", "input, diagonal=0", "torch.tril torch.Tensor.tril", triangle),
    SHAPE("triu", "input, diagonal=0", "torch.triu torch.Tensor.triu", triangle),
    SHAPE("roll", "input, shifts, dims=None", "torch.roll torch.Tensor.roll", roll),
    SHAPE("flip", "input, *dims", "torch.flip torch.Tensor.flip", flip),
};
const size_t th__ops_shape_count = sizeof th__ops_shape / sizeof *th__ops_shape;
