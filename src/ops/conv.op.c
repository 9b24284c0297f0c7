/* Convolutions and pooling over 1, 2 or 3 spatial dimensions, with or without a batch.
 *
 * Floating dtypes only. On the CPU, results are in channels_last where the input, or a convolution's weight, suggests
 * it in 4 dimensions, else row-major; on CUDA only row-major inputs are answered.
 */
#include "ops/meta.h"

#include <string.h>

/* ---- windows ---- */

typedef struct window { /* per spatial dimension */
    int64_t kernel[3], stride[3], padding[3], dilation[3];
} window;

/* An int for all spatial dimensions, a sequence of one, or one int each. Absent, None and () leave the fallback. */
static th_status spatial(const th_call *call, uint32_t i, uint32_t rank, int64_t least, int64_t out[3]) {
    th__dims v;
    if (!th__has(call, i) || (th__is_sequence(th__arg(call, i)) && th__arg(call, i)->count == 0)) return TH_OK;
    TRY(th__arg_ints(call, i, &v));
    DECLINE_IF(v.n != 1 && v.n != rank);
    for (uint32_t d = 0; d < rank; d++) {
        out[d] = v.at[v.n == 1 ? 0 : d];
        DECLINE_IF(out[d] < least || out[d] > INT32_MAX);
    }
    return TH_OK;
}

/* How many windows fit. In ceil mode a last one may begin inside of the input or its left padding. */
static th_status count_windows(const window *w, uint32_t d, int64_t size, bool ceil_mode, int64_t *count) {
    int64_t room = size + 2 * w->padding[d] - w->dilation[d] * (w->kernel[d] - 1) - 1;
    DECLINE_IF(room < 0);
    *count = (room + (ceil_mode ? w->stride[d] - 1 : 0)) / w->stride[d] + 1;
    if (ceil_mode && (*count - 1) * w->stride[d] >= size + w->padding[d]) --*count;
    return TH_OK;
}

/* The input: `rank` spatial dimensions behind the channels, and perhaps a batch. */
static th_status spatial_input(const th_call *call, uint32_t rank, th__tensor *x, bool *channels_last) {
    TRY(th__arg_tensor(call, 0, x));
    DECLINE_IF(!th__is_float(x->dtype) || (x->ndim != rank + 1 && x->ndim != rank + 2));
    DECLINE_IF(th__numel(x->ndim, x->shape) == 0);
    return th__follow_format(call, x, channels_last);
}

/* ---- convolution ---- */

/* input, weight, bias, stride, padding, dilation, groups */
static th_status conv(th_call *call, uint32_t rank) {
    th__tensor x, weight, bias;
    int64_t groups, shape[5];
    window w = {.stride = {1, 1, 1}, .dilation = {1, 1, 1}};
    bool by_input, by_weight;
    TRY(spatial_input(call, rank, &x, &by_input));
    TRY(th__arg_tensor(call, 1, &weight));
    DECLINE_IF(weight.ndim != rank + 2 || weight.dtype != x.dtype || weight.device != x.device);
    DECLINE_IF(th__numel(weight.ndim, weight.shape) == 0);
    TRY(th__follow_format(call, &weight, &by_weight));
    DECLINE_IF(by_weight && x.ndim != rank + 2);
    TRY(spatial(call, 3, rank, 1, w.stride));
    TRY(spatial(call, 4, rank, 0, w.padding));
    TRY(spatial(call, 5, rank, 1, w.dilation));
    TRY(th__arg_int(call, 6, 1, &groups));
    uint32_t channels = x.ndim - rank - 1;
    DECLINE_IF(groups <= 0 || weight.shape[0] % groups != 0 || weight.shape[1] * groups != x.shape[channels]);
    if (th__has(call, 2)) {
        TRY(th__arg_tensor(call, 2, &bias));
        DECLINE_IF(bias.ndim != 1 || bias.shape[0] != weight.shape[0]);
        DECLINE_IF(bias.dtype != x.dtype || bias.device != x.device);
    }
    shape[0] = x.shape[0];
    shape[channels] = weight.shape[0];
    for (uint32_t d = 0; d < rank; d++) {
        w.kernel[d] = weight.shape[2 + d];
        TRY(count_windows(&w, d, x.shape[channels + 1 + d], false, &shape[channels + 1 + d]));
    }
    return th__out_format(call, &x, shape, by_input || by_weight);
}

static th_status conv1d(th_call *call) { return conv(call, 1); }
static th_status conv2d(th_call *call) { return conv(call, 2); }
static th_status conv3d(th_call *call) { return conv(call, 3); }

/* ---- pooling ---- */

static th_status pool(th_call *call, uint32_t rank, window *w, uint32_t ceil_at) {
    th__tensor x;
    bool ceil_mode, channels_last;
    int64_t shape[5];
    TRY(spatial_input(call, rank, &x, &channels_last));
    DECLINE_IF(!th__has(call, 1));
    TRY(spatial(call, 1, rank, 1, w->kernel));
    memcpy(w->stride, w->kernel, sizeof w->stride);
    TRY(spatial(call, 2, rank, 1, w->stride));
    TRY(spatial(call, 3, rank, 0, w->padding));
    TRY(th__arg_bool(call, ceil_at, false, &ceil_mode));
    uint32_t first = x.ndim - rank;
    memcpy(shape, x.shape, x.ndim * sizeof *shape);
    for (uint32_t d = 0; d < rank; d++) {
        DECLINE_IF(2 * w->padding[d] > w->kernel[d]);
        TRY(count_windows(w, d, x.shape[first + d], ceil_mode, &shape[first + d]));
        DECLINE_IF(shape[first + d] <= 0);
    }
    return th__out_format(call, &x, shape, channels_last);
}

/* input, kernel_size, stride, padding, dilation, ceil_mode, return_indices */
static th_status max_pool(th_call *call, uint32_t rank) {
    window w = {.dilation = {1, 1, 1}};
    bool indices = false;
    TRY(spatial(call, 4, rank, 1, w.dilation));
    if (call->nparams > 6) TRY(th__arg_bool(call, 6, false, &indices));
    DECLINE_IF(indices);
    return pool(call, rank, &w, 5);
}

/* input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override */
static th_status avg_pool(th_call *call, uint32_t rank) {
    window w = {.dilation = {1, 1, 1}};
    bool ignored;
    TRY(th__arg_bool(call, 5, true, &ignored));
    if (call->nparams > 6) DECLINE_IF(th__has(call, 6));
    return pool(call, rank, &w, 4);
}

static th_status max_pool1d(th_call *call) { return max_pool(call, 1); }
static th_status max_pool2d(th_call *call) { return max_pool(call, 2); }
static th_status max_pool3d(th_call *call) { return max_pool(call, 3); }
static th_status avg_pool1d(th_call *call) { return avg_pool(call, 1); }
static th_status avg_pool2d(th_call *call) { return avg_pool(call, 2); }
static th_status avg_pool3d(th_call *call) { return avg_pool(call, 3); }

/* An output size may be None: the input's. */
static th_status adaptive_avg_pool(th_call *call, uint32_t rank) {
    th__tensor x;
    int64_t shape[5];
    bool channels_last;
    TRY(spatial_input(call, rank, &x, &channels_last));
    const th_node_data *size = th__arg(call, 1);
    DECLINE_IF(size->kind != TH_N_INT && (!th__is_sequence(size) || size->count != rank));
    memcpy(shape, x.shape, x.ndim * sizeof *shape);
    for (uint32_t d = 0; d < rank; d++) {
        const th_node_data *n = size->kind == TH_N_INT ? size : th__node(call, th__kid(call, size, d));
        if (n->kind == TH_N_NONE) continue;
        DECLINE_IF(n->kind != TH_N_INT || n->u.i <= 0);
        shape[x.ndim - rank + d] = n->u.i;
    }
    return th__out_format(call, &x, shape, channels_last);
}

static th_status adaptive_avg_pool1d(th_call *call) { return adaptive_avg_pool(call, 1); }
static th_status adaptive_avg_pool2d(th_call *call) { return adaptive_avg_pool(call, 2); }

/* ---- operators ---- */

#define CONV(f)                                                                       \
    {.name = #f,                                                                      \
     .params = "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1", \
     .names = "torch." #f " torch.nn.functional." #f,                                 \
     .fusion = TH_FUSE_OPAQUE,                                                        \
     .meta = f}
#define POOL(name_, params_, names_, rule) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_OPAQUE, .meta = rule}
#define MAX_POOL(f)                                                                                       \
    POOL("functional." #f,                                                                                \
         "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False", \
         "torch.nn.functional." #f, f),                                                                   \
        POOL(#f, "input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False", "torch." #f, f)
#define AVG_POOL_PARAMS                                                                     \
    "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, " \
    "divisor_override=None"

const th_opdef th__ops_conv[] = {
    CONV(conv1d),
    CONV(conv2d),
    CONV(conv3d),
    MAX_POOL(max_pool1d),
    MAX_POOL(max_pool2d),
    MAX_POOL(max_pool3d),
    POOL("avg_pool1d", "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True",
         "torch.avg_pool1d torch.nn.functional.avg_pool1d", avg_pool1d),
    POOL("avg_pool2d", AVG_POOL_PARAMS, "torch.nn.functional.avg_pool2d torch._C._nn.avg_pool2d", avg_pool2d),
    POOL("avg_pool3d", AVG_POOL_PARAMS, "torch.nn.functional.avg_pool3d torch._C._nn.avg_pool3d", avg_pool3d),
    POOL("adaptive_avg_pool1d", "input, output_size",
         "torch.adaptive_avg_pool1d torch.nn.functional.adaptive_avg_pool1d", adaptive_avg_pool1d),
    POOL("adaptive_avg_pool2d", "input, output_size",
         "torch.nn.functional.adaptive_avg_pool2d torch._C._nn.adaptive_avg_pool2d", adaptive_avg_pool2d),
};
const size_t th__ops_conv_count = sizeof th__ops_conv / sizeof *th__ops_conv;
