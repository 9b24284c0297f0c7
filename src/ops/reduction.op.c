/* Reductions and scans: sum, mean, amax, argmax, any, var, cumsum and the like. Results are row-major.
 *
 * max and min answer the forms that give one tensor: over everything, and of two tensors. Those with a dimension return
 * torch.return_types, which a trace does not hold.
 */
#include "ops/derivatives.h"
#include "ops/iterator.h"

#include <string.h>

/* ---- rules ---- */

/* The dimensions to reduce: absent, None and () mean all. */
static th_status reduced_dims(const th_call *call, uint32_t i, const th__tensor *x, uint32_t *set) {
    th__dims dims;
    *set = ~0u;
    if (!th__has(call, i)) return TH_OK;
    TRY(th__arg_ints(call, i, &dims));
    return dims.n ? th__dim_set(&dims, x->ndim, set) : TH_OK;
}

static th_status reduced(th_call *call, const th__tensor *x, uint32_t set, bool keep, th_dtype dtype) {
    int64_t shape[TH_MAX_RANK];
    uint32_t n = 0;
    for (uint32_t i = 0; i < x->ndim; i++) {
        if (!(set >> i & 1))
            shape[n++] = x->shape[i];
        else if (keep)
            shape[n++] = 1;
    }
    return th__out_fresh(call, dtype, x->device, n, shape, NULL);
}

static th_dtype summed(th_dtype d) { return th__is_float(d) ? d : TH_I64; }

/* input, dim, keepdim, *, dtype */
static th_status sum(th_call *call) {
    th__tensor x;
    uint32_t set;
    bool keep;
    th_dtype dtype;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(reduced_dims(call, 1, &x, &set));
    TRY(th__arg_bool(call, 2, false, &keep));
    TRY(th__arg_dtype(call, 3, summed(x.dtype), &dtype));
    return reduced(call, &x, set, keep, dtype);
}

static th_status mean(th_call *call) {
    th__tensor x;
    uint32_t set;
    bool keep;
    th_dtype dtype;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(reduced_dims(call, 1, &x, &set));
    TRY(th__arg_bool(call, 2, false, &keep));
    TRY(th__arg_dtype(call, 3, x.dtype, &dtype));
    DECLINE_IF(!th__is_float(dtype));
    return reduced(call, &x, set, keep, dtype);
}

/* One dimension or all of them. */
static th_status prod(th_call *call) {
    const th_node_data *dim = th__arg(call, 1);
    DECLINE_IF(dim->kind != TH_N_ABSENT && dim->kind != TH_N_INT);
    DECLINE_IF(dim->kind == TH_N_ABSENT && th__arg(call, 2)->kind != TH_N_ABSENT);
    return sum(call);
}

static th_status extreme(th_call *call) {
    th__tensor x;
    uint32_t set;
    bool keep;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(th__numel(x.ndim, x.shape) == 0 || th__arg(call, 1)->kind == TH_N_NONE);
    TRY(reduced_dims(call, 1, &x, &set));
    TRY(th__arg_bool(call, 2, false, &keep));
    return reduced(call, &x, set, keep, x.dtype);
}

static th_status max_min(th_call *call) {
    th__iter it = {0};
    if (th__arg(call, 1)->kind == TH_N_ABSENT) return extreme(call);
    TRY(th__iter_args(&it, call, 0, 2));
    DECLINE_IF(it.in[0].number || it.in[1].number);
    TRY(th__iter_promote(&it, call, false));
    return th__iter_out(&it, call, it.common);
}

static th_status arg_extreme(th_call *call) {
    th__tensor x;
    uint32_t dim = 0;
    bool keep;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.dtype == TH_BOOL || th__numel(x.ndim, x.shape) == 0);
    TRY(th__arg_bool(call, 2, false, &keep));
    if (!th__has(call, 1)) return reduced(call, &x, ~0u, keep, TH_I64);
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    return reduced(call, &x, 1u << dim, keep, TH_I64);
}

static th_status any_all(th_call *call) {
    th__tensor x;
    uint32_t set;
    bool keep;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(th__is_sequence(th__arg(call, 1)) && th__arg(call, 1)->count == 0);
    TRY(reduced_dims(call, 1, &x, &set));
    TRY(th__arg_bool(call, 2, false, &keep));
    return reduced(call, &x, set, keep, x.dtype == TH_U8 ? TH_U8 : TH_BOOL);
}

/* var(x), var(x, unbiased), var(x, dim, unbiased, keepdim) or var(x, dim, correction=1, keepdim=False) */
static th_status var(th_call *call) {
    th__tensor x;
    uint32_t set = ~0u;
    bool keep, unbiased;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(!th__is_float(x.dtype));
    bool first_is_unbiased = th__arg(call, 1)->kind == TH_N_BOOL;
    if (first_is_unbiased) {
        for (uint32_t i = 2; i <= 4; i++) DECLINE_IF(th__arg(call, i)->kind != TH_N_ABSENT);
    } else {
        TRY(reduced_dims(call, 1, &x, &set));
    }
    const th_node_data *correction = th__arg(call, 4);
    DECLINE_IF(correction->kind > TH_N_NONE && correction->kind != TH_N_INT && correction->kind != TH_N_FLOAT);
    DECLINE_IF(correction->kind != TH_N_ABSENT && th__arg(call, 2)->kind != TH_N_ABSENT);
    TRY(th__arg_bool(call, 2, true, &unbiased));
    TRY(th__arg_bool(call, 3, false, &keep));
    return reduced(call, &x, set, keep, x.dtype);
}

static th_status logsumexp(th_call *call) {
    th__tensor x;
    uint32_t set;
    bool keep;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(!th__has(call, 1) || !th__is_float(x.dtype));
    TRY(reduced_dims(call, 1, &x, &set));
    TRY(th__arg_bool(call, 2, false, &keep));
    return reduced(call, &x, set, keep, x.dtype);
}

/* ---- scans ---- */

static th_status scan(th_call *call) {
    th__tensor x;
    uint32_t dim;
    th_dtype dtype;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_dtype(call, 2, summed(x.dtype), &dtype));
    return th__out_fresh(call, dtype, x.device, x.ndim, x.shape, NULL);
}

/* ---- operators ---- */

#define REDUCTION(f, params_, ...)             \
    {.name = #f,                               \
     .params = params_,                        \
     .names = "torch." #f " torch.Tensor." #f, \
     .fusion = TH_FUSE_REDUCTION,              \
     .meta = __VA_ARGS__}

const th_opdef th__ops_reduction[] = {
    REDUCTION(sum, "input, dim=None, keepdim=False, *, dtype=None", sum, .grad = th__grad_sum),
    REDUCTION(nansum, "input, dim=None, keepdim=False, *, dtype=None", sum),
    REDUCTION(mean, "input, dim=None, keepdim=False, *, dtype=None", mean, .grad = th__grad_mean),
    REDUCTION(prod, "input, dim=None, keepdim=False, *, dtype=None", prod),
    REDUCTION(amax, "input, dim=(), keepdim=False", extreme, .grad = th__grad_extreme),
    REDUCTION(amin, "input, dim=(), keepdim=False", extreme, .grad = th__grad_extreme),
    REDUCTION(max, "input, other=None", max_min, .grad = th__grad_extreme_of_all),
    REDUCTION(min, "input, other=None", max_min, .grad = th__grad_extreme_of_all),
    REDUCTION(argmax, "input, dim=None, keepdim=False", arg_extreme),
    REDUCTION(argmin, "input, dim=None, keepdim=False", arg_extreme),
    REDUCTION(any, "input, dim=None, keepdim=False", any_all),
    REDUCTION(all, "input, dim=None, keepdim=False", any_all),
    REDUCTION(var, "input, dim=None, unbiased=True, keepdim=False, *, correction=1", var, .grad = th__grad_var),
    REDUCTION(std, "input, dim=None, unbiased=True, keepdim=False, *, correction=1", var, .grad = th__grad_std),
    REDUCTION(logsumexp, "input, dim, keepdim=False", logsumexp, .grad = th__grad_logsumexp),
    REDUCTION(cumsum, "input, dim, *, dtype=None", scan, .grad = th__grad_cumsum),
    REDUCTION(cumprod, "input, dim, *, dtype=None", scan),
};
const size_t th__ops_reduction_count = sizeof th__ops_reduction / sizeof *th__ops_reduction;
