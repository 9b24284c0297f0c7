/* Layers that act on each element: activations, dropout, clamp. With a training dropout the result is a new tensor;
 * without one torch gives back the input itself. `inplace=True` is declined everywhere.
 */
#include "ops/derivatives.h"
#include "ops/iterator.h"

/* ---- rules ---- */

static th_status no_inplace(const th_call *call, uint32_t i) {
    const th_node_data *d = th__arg(call, i);
    return d->kind == TH_N_ABSENT || (d->kind == TH_N_BOOL && !d->u.i) ? TH_OK : TH_DECLINED;
}

/* Parameters first..last are numbers that the dtype holds. */
static th_status numbers(const th_call *call, uint32_t first, uint32_t last, th_dtype dtype) {
    for (uint32_t i = first; i <= last; i++) {
        const th_node_data *d = th__arg(call, i);
        if (d->kind == TH_N_ABSENT) continue;
        DECLINE_IF((d->kind != TH_N_INT && d->kind != TH_N_FLOAT) || !th__fits(d, dtype));
    }
    return TH_OK;
}

/* One floating tensor, `count` numbers, and `inplace` when the definition has one more parameter. */
static th_status activation(th_call *call, uint32_t count) {
    th__iter it = {0};
    TRY(th__iter_args(&it, call, 0, 1));
    DECLINE_IF(it.in[0].number || !th__is_float(it.in[0].x.dtype));
    TRY(numbers(call, 1, count, it.in[0].x.dtype));
    if (call->nparams > count + 1) TRY(no_inplace(call, count + 1));
    return th__iter_out(&it, call, it.in[0].x.dtype);
}

static th_status plain_activation(th_call *call) { return activation(call, 0); }
static th_status activation_1(th_call *call) { return activation(call, 1); }
static th_status activation_2(th_call *call) { return activation(call, 2); }

/* Of an empty tensor torch returns a copy with its strides. */
static th_status clamped_activation(th_call *call, uint32_t count) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(th__numel(x.ndim, x.shape) == 0);
    return activation(call, count);
}

static th_status relu6(th_call *call) { return clamped_activation(call, 0); }
static th_status hardtanh(th_call *call) { return clamped_activation(call, 2); }

static th_status relu(th_call *call) {
    th__iter it = {0};
    TRY(th__iter_args(&it, call, 0, 1));
    DECLINE_IF(it.in[0].number || it.in[0].x.dtype == TH_BOOL);
    if (call->nparams > 1) TRY(no_inplace(call, 1));
    return th__iter_out(&it, call, it.in[0].x.dtype);
}

static th_status gelu(th_call *call) {
    const th_node_data *how = th__arg(call, 1);
    th__iter it = {0};
    if (how->kind != TH_N_ABSENT) {
        th_ctx *ctx = call->trace->ctx;
        DECLINE_IF(how->kind != TH_N_STR);
        DECLINE_IF(how->u.ref != th_intern_z(ctx, "none") && how->u.ref != th_intern_z(ctx, "tanh"));
    }
    TRY(th__iter_args(&it, call, 0, 1));
    DECLINE_IF(it.in[0].number || !th__is_float(it.in[0].x.dtype));
    return th__iter_out(&it, call, it.in[0].x.dtype);
}

/* Row-major on the CPU, in the input's order on CUDA. */
static th_status logsigmoid(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(!th__is_float(x.dtype) || !th__is_contiguous(&x) || th__numel(x.ndim, x.shape) == 0);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

/* Half of a dimension times the sigmoid of the other half. */
static th_status glu(th_call *call) {
    th__tensor x;
    int64_t d, shape[TH_MAX_RANK];
    uint32_t dim;
    th__iter it = {0};
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_int(call, 1, -1, &d));
    TRY(th__wrap(d, x.ndim, &dim));
    DECLINE_IF(!th__is_float(x.dtype) || x.ndim == 0 || x.shape[dim] % 2 != 0);
    for (uint32_t i = 0; i < x.ndim; i++) shape[i] = i == dim ? x.shape[i] / 2 : x.shape[i];
    x.shape = shape;
    x.contiguous = false;
    th__iter_tensor(&it, &x);
    TRY(th__iter_shape(&it, call));
    return th__iter_out(&it, call, x.dtype);
}

static th_status probability(const th_node_data *d, double fallback, double *p) {
    *p = d->kind == TH_N_FLOAT ? d->u.f : d->kind == TH_N_INT ? (double)d->u.i : fallback;
    DECLINE_IF(d->kind != TH_N_ABSENT && d->kind != TH_N_FLOAT && d->kind != TH_N_INT);
    return *p >= 0 && *p <= 1 ? TH_OK : TH_DECLINED;
}

static th_status dropout_of(th_call *call, double fallback, bool training) {
    th__tensor x;
    double p;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(probability(th__arg(call, 1), fallback, &p));
    TRY(th__arg_bool(call, 2, training, &training));
    if (p == 0 || !training || th__numel(x.ndim, x.shape) == 0) return th__out_same(call, &x);
    DECLINE_IF(!th__is_float(x.dtype) || !th__is_dense(x.ndim, x.shape, x.stride));
    return th__out_like(call, &x, x.dtype, x.device);
}

static th_status functional_dropout(th_call *call) {
    TRY(no_inplace(call, 3));
    return dropout_of(call, 0.5, true);
}

static th_status dropout(th_call *call) { return dropout_of(call, 0.5, true); }

/* ---- clamp ---- */

/* Limits that are numbers do not take part as operands, but in the dtype. */
static th_status clamp_numbers(th_call *call, th__iter *it) {
    th__iter typed = *it;
    for (uint32_t i = 1; i <= 2 && i < call->nparams; i++) {
        if (th__has(call, i)) TRY(th__iter_arg(&typed, call, i));
    }
    it->common = th__iter_result_type(&typed, call);
    DECLINE_IF(!th__is_plain(it->common) || it->common == TH_BOOL);
    for (uint32_t i = 1; i <= 2 && i < call->nparams; i++) {
        DECLINE_IF(th__has(call, i) && !th__fits(th__arg(call, i), it->common));
    }
    th__iter_convert(it, call, it->common);
    return th__iter_out(it, call, it->common);
}

static th_status clamp(th_call *call) {
    th__iter it = {0};
    bool low = th__has(call, 1), high = call->nparams > 2 && th__has(call, 2);
    DECLINE_IF(!low && !high);
    TRY(th__iter_arg(&it, call, 0));
    DECLINE_IF(it.in[0].number);
    bool number = th__is_number(th__arg(call, low ? 1 : 2));
    DECLINE_IF(low && high && th__is_number(th__arg(call, 2)) != number);
    if (number) {
        TRY(th__iter_shape(&it, call));
        return clamp_numbers(call, &it);
    }
    if (low) TRY(th__iter_arg(&it, call, 1));
    if (high) TRY(th__iter_arg(&it, call, 2));
    TRY(th__iter_shape(&it, call));
    TRY(th__iter_promote(&it, call, false));
    DECLINE_IF(it.common == TH_BOOL);
    return th__iter_out(&it, call, it.common);
}

/* ---- operators ---- */

#define ACTIVATION(name_, params_, names_, ...) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_POINTWISE, .meta = __VA_ARGS__}
#define IN_PLACE(name_, params_, names_, functional_, rule) \
    {.name = name_,                                         \
     .params = params_,                                     \
     .names = names_,                                       \
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES,            \
     .fusion = TH_FUSE_POINTWISE,                           \
     .meta = rule,                                          \
     .functional = functional_}
#define F "torch.nn.functional."

const th_opdef th__ops_nn[] = {
    ACTIVATION("gelu", "input, approximate=none", F "gelu", gelu, .grad = th__grad_gelu),
    ACTIVATION("silu", "input, inplace=False", F "silu", plain_activation, .grad = th__grad_silu),
    ACTIVATION("mish", "input, inplace=False", F "mish", plain_activation, .grad = th__grad_mish),
    ACTIVATION("hardswish", "input, inplace=False", F "hardswish", plain_activation, .grad = th__grad_hardswish),
    ACTIVATION("hardsigmoid", "input, inplace=False", F "hardsigmoid", plain_activation, .grad = th__grad_hardsigmoid),
    ACTIVATION("relu6", "input, inplace=False", F "relu6", relu6, .grad = th__grad_relu6),
    ACTIVATION("functional.selu", "input, inplace=False", F "selu", plain_activation, .grad = th__grad_selu),
    ACTIVATION("selu", "input", "torch.selu", plain_activation, .grad = th__grad_selu),
    ACTIVATION("logsigmoid", "input", "torch._C._nn.log_sigmoid " F "logsigmoid", logsigmoid),
    ACTIVATION("elu", "input, alpha=1.0, inplace=False", F "elu", activation_1, .grad = th__grad_elu),
    ACTIVATION("functional.celu", "input, alpha=1.0, inplace=False", F "celu", activation_1, .grad = th__grad_celu),
    ACTIVATION("leaky_relu", "input, negative_slope=0.01, inplace=False", F "leaky_relu", activation_1,
               .grad = th__grad_leaky_relu),
    ACTIVATION("hardtanh", "input, min_val=-1.0, max_val=1.0, inplace=False", F "hardtanh", hardtanh,
               .grad = th__grad_hardtanh),
    ACTIVATION("softplus", "input, beta=1, threshold=20", F "softplus", activation_2, .grad = th__grad_softplus),
    ACTIVATION("functional.relu", "input, inplace=False", F "relu", relu, .grad = th__grad_relu),
    ACTIVATION("relu", "input", "torch.relu torch.Tensor.relu", relu, .grad = th__grad_relu),
    IN_PLACE("relu_", "input", "torch.relu_ torch.Tensor.relu_", "torch.relu", relu),
    ACTIVATION("glu", "input, dim=-1", F "glu torch._C._nn.glu", glu, .grad = th__grad_glu),
    ACTIVATION("clamp", "input, min=None, max=None", "torch.clamp torch.Tensor.clamp torch.clip torch.Tensor.clip",
               clamp, .grad = th__grad_clamp),
    IN_PLACE("clamp_", "input, min=None, max=None", "torch.clamp_ torch.Tensor.clamp_ torch.clip_ torch.Tensor.clip_",
             "torch.clamp", clamp),
    ACTIVATION("clamp_min", "input, min", "torch.clamp_min torch.Tensor.clamp_min", clamp, .grad = th__grad_clamp_min),
    ACTIVATION("clamp_max", "input, max", "torch.clamp_max torch.Tensor.clamp_max", clamp, .grad = th__grad_clamp_max),
    {.name = "functional.dropout",
     .params = "input, p=0.5, training=True, inplace=False",
     .names = F "dropout",
     .effects = TH_FX_RANDOM,
     .fusion = TH_FUSE_POINTWISE,
     .meta = functional_dropout,
     .grad = th__grad_dropout,
     .forward = th__forward_dropout},
    {.name = "dropout",
     .params = "input, p, train",
     .names = "torch.dropout",
     .effects = TH_FX_RANDOM,
     .fusion = TH_FUSE_POINTWISE,
     .meta = dropout,
     .grad = th__grad_dropout,
     .forward = th__forward_dropout},
};
const size_t th__ops_nn_count = sizeof th__ops_nn / sizeof *th__ops_nn;
