/* Attention as the graph of simple operations that cuDNN's fused engines recognise.
 *
 *     s = scale * q k'            row and column numbers: what is right of the diagonal becomes the least number
 *     p = exp(s - logsumexp)      forward: the logsumexp by a maximum and a sum; backward: given
 *     out = p v
 *
 *     dv = p' grad     dp = grad v'     ds = scale * p * (dp - sum(grad * out))     dk = ds' q     dq = ds k
 *
 * The engines look for this very shape: operations in another order, or one more, and there is none. Where several
 * heads of the query share one of the keys, their gradients are added up at the end. dq is summed in float32.
 */
#include "executors/cudnn/graph.h"

#include "base/ctx.h"

#include <float.h>

typedef th__cudnn_tensor tensor;
typedef th__cudnn_shape shape;

typedef struct drawing { /* a graph, and the shapes that most of its tensors have */
    th__cudnn_graph g;
    const th_cudnn_attention *a;
    shape scores, rows;
} drawing;

static th_status begin(drawing *d, th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_attention *a,
                       th_cudnn_plan *out) {
    d->a = a;
    d->scores = th__cudnn_dense(a->batch, a->heads, a->length, a->kv_length);
    d->rows = th__cudnn_dense(a->batch, a->heads, a->length, 1);
    return th__cudnn_begin(&d->g, ctx, c, device, out);
}

static shape of_query(const th_cudnn_attention *a, const int64_t stride[4]) {
    return th__cudnn_strided(a->batch, a->heads, a->length, a->size, stride);
}

static shape of_key(const th_cudnn_attention *a, const int64_t stride[4]) {
    return th__cudnn_strided(a->batch, a->kv_heads, a->kv_length, a->size, stride);
}

static tensor scored(drawing *d) { return th__cudnn_virtual(&d->g, TH_CUDNN_F32, d->scores); }

static tensor pointwise(drawing *d, th__cudnn_mode mode, tensor x, tensor b, tensor y) {
    th__cudnn_pointwise(&d->g, mode, TH_CUDNN_F32, 0, x, b, NULL, y);
    return y;
}

static tensor mask(drawing *d, tensor s) {
    th__cudnn_graph *g = &d->g;
    tensor row = th__cudnn_virtual(g, TH_CUDNN_I32, d->scores), column = th__cudnn_virtual(g, TH_CUDNN_I32, d->scores);
    tensor seen = th__cudnn_virtual(g, TH_CUDNN_BOOL, d->scores), masked = scored(d);
    th__cudnn_pointwise(g, TH__CUDNN_INDEX, TH_CUDNN_F32, 2, s, NULL, NULL, row);
    th__cudnn_pointwise(g, TH__CUDNN_INDEX, TH_CUDNN_F32, 3, s, NULL, NULL, column);
    th__cudnn_pointwise(g, TH__CUDNN_GE, TH_CUDNN_BOOL, 0, row, column, NULL, seen);
    th__cudnn_pointwise(g, TH__CUDNN_SELECT, TH_CUDNN_F32, 0, s, th__cudnn_value(g, -FLT_MAX), seen, masked);
    return masked;
}

th_status th_cudnn_attention_forward(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_attention *a,
                                     th_cudnn_plan *out) {
    drawing d;
    TRY(begin(&d, ctx, c, device, a, out));
    th__cudnn_graph *g = &d.g;
    tensor q = th__cudnn_argument(g, a->type, of_query(a, a->q));
    tensor k = th__cudnn_argument(g, a->type, th__cudnn_swapped(of_key(a, a->k)));
    tensor v = th__cudnn_argument(g, a->type, of_key(a, a->v));
    tensor o = th__cudnn_argument(g, a->type, of_query(a, a->o));
    tensor logsumexp = th__cudnn_argument(g, TH_CUDNN_F32, d.rows);
    tensor s = scored(&d), p = th__cudnn_virtual(g, a->type, d.scores);
    th__cudnn_matmul(g, q, k, s);
    s = pointwise(&d, TH__CUDNN_MUL, s, th__cudnn_value(g, a->scale), scored(&d));
    if (a->causal) s = mask(&d, s);
    tensor most = th__cudnn_virtual(g, TH_CUDNN_F32, d.rows), sum = th__cudnn_virtual(g, TH_CUDNN_F32, d.rows);
    th__cudnn_reduce(g, TH__CUDNN_MAX, s, most);
    s = pointwise(&d, TH__CUDNN_SUB, s, most, scored(&d));
    s = pointwise(&d, TH__CUDNN_EXP, s, NULL, scored(&d));
    th__cudnn_reduce(g, TH__CUDNN_SUM, s, sum);
    tensor log = pointwise(&d, TH__CUDNN_LOG, sum, NULL, th__cudnn_virtual(g, TH_CUDNN_F32, d.rows));
    pointwise(&d, TH__CUDNN_ADD, most, log, logsumexp);
    pointwise(&d, TH__CUDNN_DIV, s, sum, p);
    th__cudnn_matmul(g, p, v, o);
    return th__cudnn_end(g);
}

/* x' y, for all heads of the query, then added up over those that share one. */
static void into_keys(drawing *d, tensor x, tensor y, tensor result) {
    const th_cudnn_attention *a = d->a;
    th__cudnn_graph *g = &d->g;
    tensor turned = th__cudnn_virtual(g, a->type, th__cudnn_swapped(d->scores));
    th__cudnn_reshape(g, x, turned);
    if (a->heads == a->kv_heads) {
        th__cudnn_matmul(g, turned, y, result);
        return;
    }
    tensor all = th__cudnn_virtual(g, a->type, th__cudnn_dense(a->batch, a->heads, a->kv_length, a->size));
    th__cudnn_matmul(g, turned, y, all);
    th__cudnn_reduce(g, TH__CUDNN_SUM, all, result);
}

th_status th_cudnn_attention_backward(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_attention *a,
                                      th_cudnn_plan *out) {
    drawing d;
    TRY(begin(&d, ctx, c, device, a, out));
    th__cudnn_graph *g = &d.g;
    tensor grad = th__cudnn_argument(g, a->type, of_query(a, a->grad));
    tensor q = th__cudnn_argument(g, a->type, of_query(a, a->q));
    tensor k = th__cudnn_argument(g, a->type, th__cudnn_swapped(of_key(a, a->k)));
    tensor v = th__cudnn_argument(g, a->type, th__cudnn_swapped(of_key(a, a->v)));
    tensor o = th__cudnn_argument(g, a->type, of_query(a, a->o));
    tensor logsumexp = th__cudnn_argument(g, TH_CUDNN_F32, d.rows);
    tensor dq = th__cudnn_argument(g, a->type, of_query(a, a->dq));
    tensor dk = th__cudnn_argument(g, a->type, of_key(a, a->dk));
    tensor dv = th__cudnn_argument(g, a->type, of_key(a, a->dv));
    tensor scale = th__cudnn_value(g, a->scale);
    uint64_t nrows = (uint64_t)(a->batch * a->heads * a->length), bytes = sizeof(float);

    tensor product = th__cudnn_virtual(g, TH_CUDNN_F32, th__cudnn_dense(a->batch, a->heads, a->length, a->size));
    tensor sum = th__cudnn_virtual(g, TH_CUDNN_F32, d.rows);
    pointwise(&d, TH__CUDNN_MUL, grad, o, product);
    th__cudnn_reduce(g, TH__CUDNN_SUM, product, sum);
    sum = pointwise(&d, TH__CUDNN_MUL, sum, th__cudnn_value(g, 1.0f),
                    th__cudnn_scratch(g, TH_CUDNN_F32, d.rows, nrows * bytes));

    tensor s = scored(&d);
    th__cudnn_matmul(g, q, k, s);
    s = pointwise(&d, TH__CUDNN_MUL, s, scale, scored(&d));
    s = pointwise(&d, TH__CUDNN_SUB, s, logsumexp, scored(&d));
    if (a->causal) s = mask(&d, s);
    tensor p = pointwise(&d, TH__CUDNN_EXP, s, NULL, scored(&d));
    into_keys(&d, p, grad, dv);

    tensor dp = scored(&d);
    th__cudnn_matmul(g, grad, v, dp);
    tensor ds = pointwise(&d, TH__CUDNN_SUB, dp, sum, scored(&d));
    ds = pointwise(&d, TH__CUDNN_MUL, ds, p, scored(&d));
    ds = pointwise(&d, TH__CUDNN_MUL, ds, scale, scored(&d));
    into_keys(&d, ds, q, dk);

    tensor plain = th__cudnn_virtual(g, a->type, of_key(a, a->k));
    shape dense = th__cudnn_dense(a->batch, a->heads, a->length, a->size);
    tensor wide = th__cudnn_scratch(g, TH_CUDNN_F32, dense, nrows * (uint64_t)a->size * bytes);
    th__cudnn_reshape(g, k, plain);
    th__cudnn_matmul(g, ds, plain, wide);
    pointwise(&d, TH__CUDNN_IDENTITY, wide, NULL, dq);
    return th__cudnn_end(g);
}
