/* scaled_dot_product_attention on the CPU.
 *
 * Where torch's flash kernel takes the call, the result has the query's order of dimensions; otherwise it is the
 * row-major product of plain matrix products. Older kernels always lay the result out as (batch, length, head, size):
 * the caller finds out which and says so in th_call.facts. CUDA picks among kernels by the machine: declined.
 */
#include "ops/derivatives.h"

#include <string.h>

enum { QUERY, KEY, VALUE, MASK, DROPOUT, CAUSAL, SCALE, GQA };

/* ---- the kernel's conditions ---- */

static bool mask_suits_flash(const th__tensor *mask, const th__tensor *q, const th__tensor *k) {
    const int64_t *last = mask->shape + mask->ndim - 2;
    if ((last[0] != q->shape[2] && last[0] != 1) || (last[1] != k->shape[2] && last[1] != 1)) return false;
    if (mask->ndim == 2) return true;
    return mask->ndim == 4 && (mask->shape[0] == 1 || mask->shape[0] == q->shape[0]) &&
           (mask->shape[1] == 1 || mask->shape[1] == q->shape[1]);
}

/* The layout of the result, as this torch's flash kernel gives it; without knowing which, only where all agree. */
static bool result_layout(const th_call *call, const th__tensor *q, int64_t stride[4]) {
    int64_t like[4];
    const int64_t *n = q->shape;
    if (th__is_dense(4, n, q->stride))
        memcpy(like, q->stride, sizeof like);
    else
        th__dense_like(4, n, q->stride, like);
    stride[3] = 1;
    stride[1] = n[3];
    stride[2] = n[1] * n[3];
    stride[0] = n[2] * stride[2];
    bool agree = memcmp(like, stride, sizeof like) == 0;
    if (call->facts & TH_FACT_FLASH_LIKE_QUERY) memcpy(stride, like, sizeof like);
    return agree || (call->facts & (TH_FACT_FLASH_LIKE_QUERY | TH_FACT_FLASH_BLHD));
}

/* ---- rule ---- */

static th_status check_mask(const th_call *call, const th__tensor *q, const th__tensor *k, bool causal) {
    th__tensor mask;
    if (!th__has(call, MASK)) return TH_OK;
    TRY(th__arg_tensor(call, MASK, &mask));
    DECLINE_IF(causal || mask.device != q->device || mask.ndim < 2 || mask.grad);
    DECLINE_IF(mask.dtype != TH_BOOL && mask.dtype != q->dtype);
    DECLINE_IF(mask.stride[mask.ndim - 1] != 1);
    return mask_suits_flash(&mask, q, k) ? TH_OK : TH_DECLINED;
}

/* The four dimensions are batch, head, position, size. Grouped: several heads of the query share one of the others. */
static th_status check_shapes(const th__tensor *q, const th__tensor *k, const th__tensor *v, bool grouped) {
    const th__tensor *all[] = {q, k, v};
    for (uint32_t i = 0; i < 3; i++) {
        DECLINE_IF(all[i]->ndim != 4 || all[i]->dtype != q->dtype || all[i]->device != q->device);
        DECLINE_IF(all[i]->shape[0] != q->shape[0] || (!grouped && all[i]->shape[1] != q->shape[1]));
        DECLINE_IF(all[i]->shape[3] != q->shape[3] || all[i]->stride[3] != 1);
        DECLINE_IF(th__numel(4, all[i]->shape) == 0);
    }
    DECLINE_IF(k->shape[1] != v->shape[1] || q->shape[1] % k->shape[1] != 0);
    return k->shape[2] == v->shape[2] ? TH_OK : TH_DECLINED;
}

static th_status read(const th_call *call, th__tensor *q, bool *gqa) {
    th__tensor k, v;
    bool causal;
    const th_node_data *dropout = th__arg(call, DROPOUT), *scale = th__arg(call, SCALE);
    TRY(th__arg_tensor(call, QUERY, q));
    TRY(th__arg_tensor(call, KEY, &k));
    TRY(th__arg_tensor(call, VALUE, &v));
    TRY(th__arg_bool(call, CAUSAL, false, &causal));
    TRY(th__arg_bool(call, GQA, false, gqa));
    DECLINE_IF(!th__is_cpu(call, q) || !th__is_float(q->dtype));
    DECLINE_IF(scale->kind > TH_N_NONE && scale->kind != TH_N_FLOAT && scale->kind != TH_N_INT);
    bool no_dropout = dropout->kind == TH_N_ABSENT || (dropout->kind == TH_N_FLOAT && dropout->u.f == 0) ||
                      (dropout->kind == TH_N_INT && dropout->u.i == 0);
    DECLINE_IF(!no_dropout);
    TRY(check_shapes(q, &k, &v, *gqa));
    return check_mask(call, q, &k, causal);
}

static th_status attention(th_call *call) {
    th__tensor q;
    bool gqa;
    int64_t stride[4];
    TRY(read(call, &q, &gqa));
    DECLINE_IF(gqa && !(call->facts & TH_FACT_FLASH_LIKE_QUERY)); /* older flash kernels know no groups */
    DECLINE_IF(!result_layout(call, &q, stride));
    return th__out_fresh(call, q.dtype, q.device, 4, q.shape, stride);
}

th_status th__attention_is_flash(const th_call *call) {
    th__tensor q;
    bool gqa;
    TRY(read(call, &q, &gqa));
    return gqa && !(call->facts & TH_FACT_FLASH_LIKE_QUERY) ? TH_DECLINED : TH_OK;
}

/* ---- operators ---- */

const th_opdef th__ops_attention[] = {
    {.name = "scaled_dot_product_attention",
     .params = "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False",
     .names = "torch.nn.functional.scaled_dot_product_attention torch._C._nn.scaled_dot_product_attention",
     .fusion = TH_FUSE_OPAQUE,
     .meta = attention,
     .grad = th__grad_attention,
     .forward = th__forward_attention},
};
const size_t th__ops_attention_count = sizeof th__ops_attention / sizeof *th__ops_attention;
