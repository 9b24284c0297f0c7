/* Losses, reduced to one number by "mean" or "sum"; without a reduction torch is asked. */
#include "ops/derivatives.h"

#include <string.h>

/* ---- rules ---- */

static th_status reduces(const th_call *call, uint32_t i) {
    const th_node_data *d = th__arg(call, i);
    if (d->kind == TH_N_ABSENT) return TH_OK;
    DECLINE_IF(d->kind != TH_N_STR);
    const char *how = th_str_get(call->trace->ctx, d->u.ref);
    return strcmp(how, "mean") == 0 || strcmp(how, "sum") == 0 ? TH_OK : TH_DECLINED;
}

/* Two floating tensors of one shape: input, target, ..., reduction at `at`; everything between is not given. */
static th_status elementwise(th_call *call, uint32_t at) {
    th__tensor x, target;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 1, &target));
    for (uint32_t i = 2; i < at; i++) DECLINE_IF(th__has(call, i));
    TRY(reduces(call, at));
    for (uint32_t i = at + 1; i < call->nparams; i++) DECLINE_IF(th__has(call, i));
    DECLINE_IF(!th__is_float(x.dtype) || x.dtype != target.dtype || x.device != target.device);
    DECLINE_IF(x.ndim != target.ndim || (x.ndim && memcmp(x.shape, target.shape, x.ndim * sizeof *x.shape) != 0));
    return th__out_fresh(call, x.dtype, x.device, 0, NULL, NULL);
}

static th_status mse_loss(th_call *call) { return elementwise(call, 4); }
static th_status bce_with_logits(th_call *call) { return elementwise(call, 5); }

/* Scores of classes in dimension 1 (0 without a batch), and the right class of each. */
static th_status by_class(th_call *call) {
    th__tensor x, target, weight;
    int64_t ignored;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 1, &target));
    DECLINE_IF(!th__is_float(x.dtype) || target.dtype != TH_I64 || x.device != target.device || x.ndim == 0);
    DECLINE_IF(th__numel(x.ndim, x.shape) == 0 || target.ndim + 1 != x.ndim);
    DECLINE_IF(x.ndim > 1 && x.shape[0] != target.shape[0]);
    for (uint32_t i = 2; i < x.ndim; i++) DECLINE_IF(x.shape[i] != target.shape[i - 1]);
    if (th__has(call, 2)) {
        TRY(th__arg_tensor(call, 2, &weight));
        DECLINE_IF(weight.dtype != x.dtype || weight.device != x.device || weight.ndim != 1);
        DECLINE_IF(weight.shape[0] != x.shape[x.ndim > 1 ? 1 : 0]);
    }
    DECLINE_IF(th__has(call, 3) || th__has(call, 5));
    TRY(th__arg_int(call, 4, -100, &ignored));
    TRY(reduces(call, 6));
    if (call->nparams > 7) {
        const th_node_data *smoothing = th__arg(call, 7);
        double s = smoothing->kind == TH_N_FLOAT ? smoothing->u.f : (double)smoothing->u.i;
        bool number = smoothing->kind == TH_N_FLOAT || smoothing->kind == TH_N_INT;
        DECLINE_IF(smoothing->kind != TH_N_ABSENT && (!number || s < 0 || s > 1));
    }
    return th__out_fresh(call, x.dtype, x.device, 0, NULL, NULL);
}

/* ---- operators ---- */

#define LOSS(f, params_, ...)            \
    {.name = #f,                         \
     .params = params_,                  \
     .names = "torch.nn.functional." #f, \
     .fusion = TH_FUSE_REDUCTION,        \
     .meta = __VA_ARGS__}
#define CLASSES "input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction=mean"

const th_opdef th__ops_loss[] = {
    LOSS(cross_entropy, CLASSES ", label_smoothing=0.0", by_class, .effects = TH_OPDEF_RAISES,
         .grad = th__grad_cross_entropy, .forward = th__forward_cross_entropy),
    LOSS(nll_loss, CLASSES, by_class, .effects = TH_OPDEF_RAISES, .grad = th__grad_nll_loss,
         .forward = th__forward_nll_loss),
    LOSS(mse_loss, "input, target, size_average=None, reduce=None, reduction=mean, weight=None", mse_loss,
         .grad = th__grad_mse_loss, .forward = th__forward_mse_loss),
    LOSS(l1_loss, "input, target, size_average=None, reduce=None, reduction=mean, weight=None", mse_loss,
         .grad = th__grad_l1_loss),
    LOSS(binary_cross_entropy_with_logits,
         "input, target, weight=None, size_average=None, reduce=None, reduction=mean, pos_weight=None", bce_with_logits,
         .grad = th__grad_binary_cross_entropy_with_logits, .forward = th__forward_binary_cross_entropy_with_logits),
};
const size_t th__ops_loss_count = sizeof th__ops_loss / sizeof *th__ops_loss;
