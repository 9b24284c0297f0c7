/* torch's kernels that derivatives are made of, under the names of their ATen overloads.
 *
 * Nobody calls these by hand. They are catalogued so that derivative rules can emit them like any other operator, and
 * executors can claim them. Those whose results may be left out (native_layer_norm_backward) are not here: a meta rule
 * cannot say so; their rules state the types themselves.
 */
#include "ops/iterator.h"

#include <string.h>

/* ---- rules ---- */

/* Two floating tensors of one shape and dtype, in the order in which the kernel's TensorIterator has them. */
static th_status pair(th_call *call, uint32_t first, uint32_t second) {
    th__iter it = {0};
    TRY(th__iter_arg(&it, call, first));
    TRY(th__iter_arg(&it, call, second));
    const th__tensor *x = &it.in[0].x, *y = &it.in[1].x;
    DECLINE_IF(it.in[0].number || it.in[1].number || x->dtype != y->dtype || !th__is_float(x->dtype));
    DECLINE_IF(x->ndim != y->ndim || (x->ndim && memcmp(x->shape, y->shape, x->ndim * sizeof *x->shape) != 0));
    for (uint32_t i = 0; i < call->nparams; i++)
        DECLINE_IF(i != first && i != second && th__arg(call, i)->kind == TH_N_VALUE);
    TRY(th__iter_shape(&it, call));
    return th__iter_out(&it, call, x->dtype);
}

static th_status gradient_first(th_call *call) { return pair(call, 0, 1); }
static th_status input_first(th_call *call) { return pair(call, 1, 0); }
static th_status elu(th_call *call) { return pair(call, 0, 5); }

/* Row-major in the shape of argument i, which has the gradient's dtype. */
static th_status shaped_like(th_call *call, uint32_t i) {
    th__tensor g, x;
    TRY(th__arg_tensor(call, 0, &g));
    TRY(th__arg_tensor(call, i, &x));
    DECLINE_IF(g.dtype != x.dtype || !th__is_float(x.dtype) || g.device != x.device);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

static th_status like_second(th_call *call) { return shaped_like(call, 1); }

/* grad_output, output, dim, input_dtype */
static th_status softmax(th_call *call) {
    th__tensor g;
    th_dtype dtype;
    TRY(th__arg_tensor(call, 0, &g));
    TRY(th__arg_dtype(call, 3, g.dtype, &dtype));
    DECLINE_IF(dtype != g.dtype);
    return shaped_like(call, 1);
}

/* grad_output, self, target, weight, reduction, ignore_index, total_weight: scores by class, with a batch or without */
static th_status nll_loss(th_call *call) {
    th__tensor x, target;
    TRY(th__arg_tensor(call, 1, &x));
    TRY(th__arg_tensor(call, 2, &target));
    DECLINE_IF(x.ndim == 0 || x.ndim > 2 || target.ndim + 1 != x.ndim || target.dtype != TH_I64);
    DECLINE_IF((x.ndim == 2 && x.shape[0] != target.shape[0]) || th__numel(x.ndim, x.shape) == 0);
    return shaped_like(call, 1);
}

/* grad_output, self, target, reduction: the gradient is one number, or one for each element */
static th_status mse_loss(th_call *call) {
    th__tensor x, target;
    TRY(th__arg_tensor(call, 1, &x));
    TRY(th__arg_tensor(call, 2, &target));
    DECLINE_IF(x.dtype != target.dtype || x.ndim != target.ndim);
    DECLINE_IF(x.ndim && memcmp(x.shape, target.shape, x.ndim * sizeof *x.shape) != 0);
    return shaped_like(call, 1);
}

/* grad_output, indices, num_weights, padding_idx, scale_grad_by_freq */
static th_status embedding(th_call *call) {
    th__tensor g, index;
    int64_t rows;
    TRY(th__arg_tensor(call, 0, &g));
    TRY(th__arg_tensor(call, 1, &index));
    TRY(th__arg_int(call, 2, 0, &rows));
    DECLINE_IF(!th__is_float(g.dtype) || g.ndim != index.ndim + 1 || g.device != index.device);
    DECLINE_IF(index.dtype != TH_I64 && index.dtype != TH_I32);
    int64_t shape[] = {rows, g.shape[g.ndim - 1]};
    return th__out_fresh(call, g.dtype, g.device, 2, shape, NULL);
}

/* self, indices (a list of tensors and None), values, accumulate */
static th_status index_put(th_call *call) {
    th__tensor x, values;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 2, &values));
    DECLINE_IF(x.dtype != values.dtype || x.device != values.device || !x.contiguous);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

/* ---- operators ---- */

#define KERNEL(f, params_, fusion_, ...)       \
    {.name = "aten." #f,                       \
     .params = params_,                        \
     .names = "torch.ops.aten." #f ".default", \
     .fusion = fusion_,                        \
     .meta = __VA_ARGS__}
#define ELEMENTS(f, params_, ...) KERNEL(f, "grad_output, self" params_, TH_FUSE_POINTWISE, __VA_ARGS__)

const th_opdef th__ops_backward_kernels[] = {
    ELEMENTS(threshold_backward, ", threshold", input_first),
    ELEMENTS(gelu_backward, ", *, approximate=none", gradient_first),
    ELEMENTS(silu_backward, "", gradient_first),
    ELEMENTS(mish_backward, "", gradient_first),
    ELEMENTS(softplus_backward, ", beta, threshold", gradient_first),
    ELEMENTS(hardtanh_backward, ", min_val, max_val", gradient_first),
    ELEMENTS(hardswish_backward, "", gradient_first),
    ELEMENTS(hardsigmoid_backward, "", gradient_first),
    ELEMENTS(leaky_relu_backward, ", negative_slope, self_is_result", input_first),
    KERNEL(elu_backward, "grad_output, alpha, scale, input_scale, is_result, self_or_result", TH_FUSE_POINTWISE, elu),
    KERNEL(glu_backward, "grad_output, self, dim", TH_FUSE_OPAQUE, like_second),
    KERNEL(_softmax_backward_data, "grad_output, output, dim, input_dtype", TH_FUSE_REDUCTION, softmax),
    KERNEL(_log_softmax_backward_data, "grad_output, output, dim, input_dtype", TH_FUSE_REDUCTION, softmax),
    KERNEL(nll_loss_backward, "grad_output, self, target, weight, reduction, ignore_index, total_weight",
           TH_FUSE_GATHER, nll_loss),
    KERNEL(mse_loss_backward, "grad_output, self, target, reduction", TH_FUSE_OPAQUE, mse_loss),
    KERNEL(embedding_dense_backward, "grad_output, indices, num_weights, padding_idx, scale_grad_by_freq",
           TH_FUSE_GATHER, embedding),
    KERNEL(index_put, "self, indices, values, accumulate=False", TH_FUSE_GATHER, index_put),
};
const size_t th__ops_backward_kernels_count = sizeof th__ops_backward_kernels / sizeof *th__ops_backward_kernels;
