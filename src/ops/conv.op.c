/* Convolutions, pooling and resizing over 1, 2 or 3 spatial dimensions, with or without a batch.
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

/* ---- images ---- */

/* A tensor as the kernels see it: with 2 spatial dimensions where it has 1, and with a batch where that is added. */
typedef struct image {
    th__tensor x;
    int64_t shape[5], stride[5];
    bool channels_last;
} image;

static void append(image *m, uint32_t *n, int64_t size, int64_t stride) {
    m->shape[*n] = size;
    m->stride[(*n)++] = stride;
}

/* Argument i: channels and `rank` spatial dimensions, and perhaps a batch. */
static th_status read_image(const th_call *call, uint32_t i, uint32_t rank, bool add_batch, image *m) {
    uint32_t n = 0;
    th__tensor *x = &m->x;
    TRY(th__arg_tensor(call, i, x));
    DECLINE_IF(!th__is_float(x->dtype) || (x->ndim != rank + 1 && x->ndim != rank + 2));
    DECLINE_IF(th__numel(x->ndim, x->shape) == 0);
    if (add_batch && x->ndim == rank + 1) append(m, &n, 1, x->shape[0] * x->stride[0]);
    for (uint32_t d = 0; d < x->ndim; d++) {
        if (rank == 1 && d == x->ndim - 1) append(m, &n, 1, x->shape[d] * x->stride[d]);
        append(m, &n, x->shape[d], x->stride[d]);
    }
    th__tensor seen = *x;
    seen.ndim = n;
    seen.shape = m->shape;
    seen.stride = m->stride;
    return th__follow_format(call, &seen, &m->channels_last);
}

/* The result: x's dimensions with other channels and sizes. In channels_last the strides are those of the 4 dimensions
 * that the kernel works on. */
static th_status image_out(th_call *call, const th__tensor *x, uint32_t rank, const int64_t *shape,
                           bool channels_last) {
    int64_t full[4], full_stride[4], stride[4];
    if (!channels_last) return th__out_fresh(call, x->dtype, x->device, x->ndim, shape, NULL);
    uint32_t channels = x->ndim - rank - 1;
    full[0] = channels ? shape[0] : 1;
    full[1] = shape[channels];
    full[2] = rank == 2 ? shape[x->ndim - 2] : 1;
    full[3] = shape[x->ndim - 1];
    th__channels_last(4, full, full_stride);
    stride[0] = full_stride[0];
    stride[channels] = full_stride[1];
    if (rank == 2) stride[x->ndim - 2] = full_stride[2];
    stride[x->ndim - 1] = full_stride[3];
    return th__out_fresh(call, x->dtype, x->device, x->ndim, shape, stride);
}

/* ---- convolution ---- */

/* "valid" is no padding. "same" keeps the sizes: it pads by hand where the sides differ, so only row-major ones. */
static th_status named_padding(const th_call *call, const image *input, const image *kernel, window *w, uint32_t rank,
                               bool *same) {
    const th_node_data *d = th__arg(call, 4);
    *same = false;
    if (d->kind != TH_N_STR) return spatial(call, 4, rank, 0, w->padding);
    const char *name = th_str_get(call->trace->ctx, d->u.ref);
    *same = strcmp(name, "same") == 0;
    DECLINE_IF(!*same && strcmp(name, "valid") != 0);
    if (!*same) return TH_OK;
    for (uint32_t i = 0; i < rank; i++) DECLINE_IF(w->stride[i] != 1);
    return input->channels_last || kernel->channels_last ? TH_DECLINED : TH_OK;
}

/* input, weight, bias, stride, padding, dilation, groups */
static th_status conv(th_call *call, uint32_t rank) {
    image input, kernel;
    th__tensor bias;
    bool same;
    int64_t groups, shape[5];
    window w = {.stride = {1, 1, 1}, .dilation = {1, 1, 1}};
    TRY(read_image(call, 0, rank, true, &input));
    TRY(read_image(call, 1, rank, false, &kernel));
    const th__tensor *x = &input.x, *weight = &kernel.x;
    DECLINE_IF(weight->ndim != rank + 2 || weight->dtype != x->dtype || weight->device != x->device);
    TRY(spatial(call, 3, rank, 1, w.stride));
    TRY(named_padding(call, &input, &kernel, &w, rank, &same));
    TRY(spatial(call, 5, rank, 1, w.dilation));
    TRY(th__arg_int(call, 6, 1, &groups));
    uint32_t channels = x->ndim - rank - 1;
    DECLINE_IF(groups <= 0 || weight->shape[0] % groups != 0 || weight->shape[1] * groups != x->shape[channels]);
    if (th__has(call, 2)) {
        TRY(th__arg_tensor(call, 2, &bias));
        DECLINE_IF(bias.ndim != 1 || bias.shape[0] != weight->shape[0]);
        DECLINE_IF(bias.dtype != x->dtype || bias.device != x->device);
    }
    shape[0] = x->shape[0];
    shape[channels] = weight->shape[0];
    for (uint32_t d = 0; d < rank; d++) {
        w.kernel[d] = weight->shape[2 + d];
        shape[channels + 1 + d] = x->shape[channels + 1 + d];
        if (same) continue;
        TRY(count_windows(&w, d, x->shape[channels + 1 + d], false, &shape[channels + 1 + d]));
    }
    bool by_input = input.channels_last && rank > 1; /* with 1 dimension torch packs the input first */
    return image_out(call, x, rank, shape, by_input || kernel.channels_last);
}

static th_status conv1d(th_call *call) { return conv(call, 1); }
static th_status conv2d(th_call *call) { return conv(call, 2); }
static th_status conv3d(th_call *call) { return conv(call, 3); }

/* ---- pooling ---- */

static th_status pool(th_call *call, uint32_t rank, const image *m, window *w, uint32_t ceil_at) {
    bool ceil_mode;
    int64_t shape[5];
    const th__tensor *x = &m->x;
    TRY(spatial(call, 1, rank, 1, w->kernel));
    DECLINE_IF(w->kernel[0] == 0); /* none given */
    memcpy(w->stride, w->kernel, sizeof w->stride);
    TRY(spatial(call, 2, rank, 1, w->stride));
    TRY(spatial(call, 3, rank, 0, w->padding));
    TRY(th__arg_bool(call, ceil_at, false, &ceil_mode));
    uint32_t first = x->ndim - rank;
    memcpy(shape, x->shape, x->ndim * sizeof *shape);
    for (uint32_t d = 0; d < rank; d++) {
        DECLINE_IF(2 * w->padding[d] > w->kernel[d]);
        TRY(count_windows(w, d, x->shape[first + d], ceil_mode, &shape[first + d]));
        DECLINE_IF(shape[first + d] <= 0);
    }
    return image_out(call, x, rank, shape, m->channels_last);
}

/* input, kernel_size, stride, padding, dilation, ceil_mode, return_indices */
static th_status max_pool(th_call *call, uint32_t rank) {
    image m;
    window w = {.dilation = {1, 1, 1}};
    bool indices = false;
    TRY(read_image(call, 0, rank, false, &m));
    TRY(spatial(call, 4, rank, 1, w.dilation));
    if (call->nparams > 6) TRY(th__arg_bool(call, 6, false, &indices));
    DECLINE_IF(indices);
    if (rank == 1) { /* its own kernel, unless a gradient is wanted */
        DECLINE_IF(m.channels_last && call->grad_mode && m.x.grad);
        m.channels_last = false;
    }
    return pool(call, rank, &m, &w, 5);
}

/* input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override */
static th_status avg_pool(th_call *call, uint32_t rank) {
    image m;
    window w = {.dilation = {1, 1, 1}};
    bool ignored;
    TRY(read_image(call, 0, rank, false, &m));
    TRY(th__arg_bool(call, 5, true, &ignored));
    if (call->nparams > 6) DECLINE_IF(th__has(call, 6));
    return pool(call, rank, &m, &w, 4);
}

static th_status max_pool1d(th_call *call) { return max_pool(call, 1); }
static th_status max_pool2d(th_call *call) { return max_pool(call, 2); }
static th_status max_pool3d(th_call *call) { return max_pool(call, 3); }
static th_status avg_pool1d(th_call *call) { return avg_pool(call, 1); }
static th_status avg_pool2d(th_call *call) { return avg_pool(call, 2); }
static th_status avg_pool3d(th_call *call) { return avg_pool(call, 3); }

/* An output size may be None: the input's. */
static th_status adaptive_avg_pool(th_call *call, uint32_t rank) {
    image m;
    int64_t shape[5];
    TRY(read_image(call, 0, rank, false, &m));
    const th__tensor *x = &m.x;
    const th_node_data *size = th__arg(call, 1);
    DECLINE_IF(size->kind != TH_N_INT && (!th__is_sequence(size) || size->count != rank));
    memcpy(shape, x->shape, x->ndim * sizeof *shape);
    for (uint32_t d = 0; d < rank; d++) {
        const th_node_data *n = size->kind == TH_N_INT ? size : th__node(call, th__kid(call, size, d));
        if (n->kind == TH_N_NONE) continue;
        DECLINE_IF(n->kind != TH_N_INT || n->u.i <= 0);
        shape[x->ndim - rank + d] = n->u.i;
    }
    return image_out(call, x, rank, shape, m.channels_last);
}

static th_status adaptive_avg_pool1d(th_call *call) { return adaptive_avg_pool(call, 1); }
static th_status adaptive_avg_pool2d(th_call *call) { return adaptive_avg_pool(call, 2); }

/* ---- resizing ---- */

enum { RESIZE_INPUT, RESIZE_SIZE, RESIZE_SCALE, RESIZE_MODE, RESIZE_CORNERS, RESIZE_RECOMPUTE, RESIZE_ANTIALIAS };

static th_status resize_mode(const th_call *call, th_dtype dtype) {
    const th_node_data *mode = th__arg(call, RESIZE_MODE), *corners = th__arg(call, RESIZE_CORNERS);
    const char *name = mode->kind == TH_N_STR ? th_str_get(call->trace->ctx, mode->u.ref) : "nearest";
    bool antialias;
    DECLINE_IF(mode->kind != TH_N_ABSENT && mode->kind != TH_N_STR);
    DECLINE_IF(th__has(call, RESIZE_RECOMPUTE));
    TRY(th__arg_bool(call, RESIZE_ANTIALIAS, false, &antialias));
    DECLINE_IF(antialias && dtype != TH_F32);
    if (strcmp(name, "bilinear") == 0 || strcmp(name, "bicubic") == 0) {
        return corners->kind <= TH_N_BOOL ? TH_OK : TH_DECLINED;
    }
    DECLINE_IF(strcmp(name, "nearest") != 0 && strcmp(name, "nearest-exact") != 0);
    return antialias || corners->kind > TH_N_NONE ? TH_DECLINED : TH_OK;
}

/* Images of 2 dimensions, to a size or by a factor. */
static th_status interpolate(th_call *call) {
    image m;
    int64_t shape[4], size[3];
    const th_node_data *scale = th__arg(call, RESIZE_SCALE);
    TRY(read_image(call, RESIZE_INPUT, 2, false, &m));
    TRY(resize_mode(call, m.x.dtype));
    DECLINE_IF(m.x.ndim != 4 || th__has(call, RESIZE_SIZE) == th__has(call, RESIZE_SCALE));
    TRY(spatial(call, RESIZE_SIZE, 2, 1, size));
    memcpy(shape, m.x.shape, sizeof shape);
    for (uint32_t d = 0; d < 2; d++) {
        if (th__has(call, RESIZE_SIZE)) {
            shape[2 + d] = size[d];
            continue;
        }
        DECLINE_IF(th__is_sequence(scale) && scale->count != 2);
        const th_node_data *factor = th__is_sequence(scale) ? th__node(call, th__kid(call, scale, d)) : scale;
        DECLINE_IF(factor->kind != TH_N_FLOAT && factor->kind != TH_N_INT);
        double f = factor->kind == TH_N_FLOAT ? factor->u.f : (double)factor->u.i;
        DECLINE_IF(!(f > 0 && f < 1e6 && (double)shape[2 + d] * f >= 1));
        shape[2 + d] = (int64_t)((double)shape[2 + d] * f);
    }
    return image_out(call, &m.x, 2, shape, m.channels_last);
}

/* ---- operators ---- */

#define CONV(f)                                                                       \
    {.name = #f,                                                                      \
     .params = "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1", \
     .names = "torch." #f " torch.nn.functional." #f,                                 \
     .fusion = TH_FUSE_OPAQUE,                                                        \
     .meta = f}
#define POOL(name_, params_, names_, ...) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_OPAQUE, .meta = __VA_ARGS__}
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
    POOL("interpolate",
         "input, size=None, scale_factor=None, mode=nearest, align_corners=None, recompute_scale_factor=None, "
         "antialias=False",
         "torch.nn.functional.interpolate", interpolate),
};
const size_t th__ops_conv_count = sizeof th__ops_conv / sizeof *th__ops_conv;
