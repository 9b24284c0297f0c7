/* Normalisations: layer_norm, rms_norm, group_norm, batch_norm in evaluation, softmax and log_softmax.
 *
 * Weights have to have the input's dtype and device. Results are row-major, but batch_norm and group_norm follow
 * channels_last.
 */
#include "ops/derivatives.h"

#include <string.h>

/* ---- rules ---- */

/* An optional tensor of the input's dtype and device and this shape. */
static th_status parameter(const th_call *call, uint32_t i, const th__tensor *x, uint32_t ndim, const int64_t *shape) {
    th__tensor w;
    if (!th__has(call, i)) return TH_OK;
    TRY(th__arg_tensor(call, i, &w));
    DECLINE_IF(w.dtype != x->dtype || w.device != x->device || w.ndim != ndim);
    return memcmp(w.shape, shape, ndim * sizeof *shape) == 0 ? TH_OK : TH_DECLINED;
}

/* The normalised shape is that of x's last dimensions. */
static th_status normalized(const th_call *call, th__tensor *x, th__dims *shape) {
    TRY(th__arg_tensor(call, 0, x));
    TRY(th__node_ints(call, call->arg[1], shape));
    DECLINE_IF(!th__is_float(x->dtype) || shape->n == 0 || shape->n > x->ndim);
    DECLINE_IF(memcmp(shape->at, x->shape + x->ndim - shape->n, shape->n * sizeof *shape->at) != 0);
    return TH_OK;
}

static th_status number(const th_call *call, uint32_t i) {
    const th_node_data *d = th__arg(call, i);
    return d->kind <= TH_N_NONE || d->kind == TH_N_INT || d->kind == TH_N_FLOAT ? TH_OK : TH_DECLINED;
}

static th_status layer_norm(th_call *call) {
    th__tensor x;
    th__dims shape;
    TRY(normalized(call, &x, &shape));
    TRY(parameter(call, 2, &x, shape.n, shape.at));
    TRY(parameter(call, 3, &x, shape.n, shape.at));
    DECLINE_IF(th__arg(call, 4)->kind == TH_N_NONE);
    TRY(number(call, 4));
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

static th_status rms_norm(th_call *call) {
    th__tensor x;
    th__dims shape;
    TRY(normalized(call, &x, &shape));
    TRY(parameter(call, 2, &x, shape.n, shape.at));
    TRY(number(call, 3));
    DECLINE_IF(th__numel(x.ndim, x.shape) == 0);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

static th_status group_norm(th_call *call) {
    th__tensor x;
    int64_t groups;
    bool channels_last;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__follow_format(call, &x, &channels_last));
    TRY(th__arg_int(call, 1, 0, &groups));
    DECLINE_IF(!th__is_float(x.dtype) || x.ndim < 2 || groups <= 0 || x.shape[1] % groups != 0);
    DECLINE_IF(th__numel(x.ndim, x.shape) == 0);
    TRY(parameter(call, 2, &x, 1, &x.shape[1]));
    TRY(parameter(call, 3, &x, 1, &x.shape[1]));
    TRY(number(call, 4));
    int64_t per_group = th__numel(x.ndim - 2, x.shape + 2) * (x.shape[1] / groups);
    DECLINE_IF(x.shape[0] * per_group == 1 || per_group == 1); /* torch refuses one value per group */
    return th__out_format(call, &x, x.shape, channels_last);
}

static th_status batch_norm_of(th_call *call, const uint32_t at[4], uint32_t training) {
    th__tensor x;
    bool on, channels_last;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__follow_format(call, &x, &channels_last));
    TRY(th__arg_bool(call, training, false, &on));
    DECLINE_IF(on || !th__is_float(x.dtype) || x.ndim < 2);
    DECLINE_IF(th__numel(x.ndim, x.shape) == 0 || !th__has(call, at[2]) || !th__has(call, at[3]));
    for (uint32_t i = 0; i < 4; i++) TRY(parameter(call, at[i], &x, 1, &x.shape[1]));
    return th__out_format(call, &x, x.shape, channels_last);
}

static th_status functional_batch_norm(th_call *call) { return batch_norm_of(call, (const uint32_t[]){3, 4, 1, 2}, 5); }

static th_status batch_norm(th_call *call) { return batch_norm_of(call, (const uint32_t[]){1, 2, 3, 4}, 5); }

static th_status softmax_of(th_call *call, uint32_t dtype_at) {
    th__tensor x;
    uint32_t dim;
    th_dtype dtype;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_dtype(call, dtype_at, x.dtype, &dtype));
    DECLINE_IF(!th__is_float(dtype));
    return th__out_fresh(call, dtype, x.device, x.ndim, x.shape, NULL);
}

static th_status functional_softmax(th_call *call) { return softmax_of(call, 3); }
static th_status softmax(th_call *call) { return softmax_of(call, 2); }

/* ---- operators ---- */

#define NORM(name_, params_, names_, ...) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_REDUCTION, .meta = __VA_ARGS__}
#define F "torch.nn.functional."

const th_opdef th__ops_norm[] = {
    NORM("functional.layer_norm", "input, normalized_shape, weight=None, bias=None, eps=1e-05", F "layer_norm",
         layer_norm, .grad = th__grad_layer_norm, .forward = th__forward_layer_norm),
    NORM("layer_norm", "input, normalized_shape, weight=None, bias=None, eps=1e-05, cudnn_enable=True",
         "torch.layer_norm", layer_norm, .grad = th__grad_layer_norm, .forward = th__forward_layer_norm),
    NORM("rms_norm", "input, normalized_shape, weight=None, eps=None", F "rms_norm torch.rms_norm", rms_norm),
    NORM("functional.group_norm", "input, num_groups, weight=None, bias=None, eps=1e-05", F "group_norm", group_norm,
         .grad = th__grad_group_norm, .forward = th__forward_group_norm),
    NORM("group_norm", "input, num_groups, weight=None, bias=None, eps=1e-05, cudnn_enabled=True", "torch.group_norm",
         group_norm, .grad = th__grad_group_norm, .forward = th__forward_group_norm),
    NORM("functional.batch_norm",
         "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05",
         F "batch_norm", functional_batch_norm),
    NORM("batch_norm", "input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled",
         "torch.batch_norm", batch_norm),
    NORM("functional.softmax", "input, dim=None, _stacklevel=3, dtype=None", F "softmax", functional_softmax,
         .grad = th__grad_softmax),
    NORM("functional.log_softmax", "input, dim=None, _stacklevel=3, dtype=None", F "log_softmax", functional_softmax,
         .grad = th__grad_log_softmax),
    NORM("softmax", "input, dim, dtype=None", "torch.softmax torch.Tensor.softmax", softmax, .grad = th__grad_softmax),
    NORM("log_softmax", "input, dim, dtype=None", "torch.log_softmax torch.Tensor.log_softmax", softmax,
         .grad = th__grad_log_softmax),
};
const size_t th__ops_norm_count = sizeof th__ops_norm / sizeof *th__ops_norm;
