/* Kernels of our own for small float32 tensors on the CPU, where a call into a library costs more than the work.
 *
 * Plain C over pointers: no tensors, no allocation, no threads. Operands may broadcast and be strided. The arithmetic
 * operations round exactly as torch's; the transcendental ones use the C library.
 */
#ifndef THUNDER_EXECUTORS_TILE_H
#define THUNDER_EXECUTORS_TILE_H

#include <stdbool.h>
#include <stdint.h>

enum { TH_TILE_RANK = 8 };

typedef enum th_tile_op {
    TH_TILE_NONE,
    TH_TILE_NEG,
    TH_TILE_ABS,
    TH_TILE_RELU,
    TH_TILE_SQRT,
    TH_TILE_RSQRT,
    TH_TILE_RECIPROCAL,
    TH_TILE_SQUARE,
    TH_TILE_EXP,
    TH_TILE_LOG,
    TH_TILE_TANH,
    TH_TILE_SIGMOID,
    TH_TILE_SILU,
    TH_TILE_GELU,
    TH_TILE_GELU_DOUBLES, /* oneDNN's: it is infinite sooner, and nan of infinity */
    TH_TILE_GELU_TANH,
    TH_TILE_SIN,
    TH_TILE_COS,
    TH_TILE_ERF,
    TH_TILE_COPY,
    TH_TILE_BINARY, /* the ones below take two operands */
    TH_TILE_ADD = TH_TILE_BINARY,
    TH_TILE_SUB,
    TH_TILE_MUL,
    TH_TILE_DIV,
    TH_TILE_MAXIMUM,
    TH_TILE_MINIMUM,
    TH_TILE_RELU_BACKWARD, /* of a gradient and the input or, where that is enough, the result */
    TH_TILE_TANH_BACKWARD,
    TH_TILE_SIGMOID_BACKWARD,
    TH_TILE_SILU_BACKWARD,
    TH_TILE_GELU_BACKWARD,
    TH_TILE_GELU_TANH_BACKWARD,
} th_tile_op;

/* One pointwise operation over a fixed shape. scalar_at: 0 none, 1 the first operand is `scalar`, 2 the second. */
typedef struct th_tile_map {
    uint8_t op, scalar_at;
    int32_t ndim;
    float scalar;
    int64_t shape[TH_TILE_RANK], o[TH_TILE_RANK], a[TH_TILE_RANK],
        b[TH_TILE_RANK]; /* strides in elements; outermost first */
} th_tile_map;

/* Lay out an operation over a shape; strides of output and operands after broadcasting (b NULL: one operand).
 * Dimensions are visited in the order of the output's memory and merged where they can be. */
void th_tile_map_init(th_tile_map *m, th_tile_op op, int64_t ndim, const int64_t *shape, const int64_t *o,
                      const int64_t *a, const int64_t *b);
void th_tile_map_run(const th_tile_map *m, float *out, const float *a, const float *b);

/* out[m][n] = sum_k x[m][k] * w[n][k] + bias[n] (bias may be NULL); all contiguous. */
void th_tile_linear(float *out, const float *x, const float *w, const float *bias, int64_t m, int64_t n, int64_t k);
/* Rows of length n: (x - mean) / sqrt(variance + eps) * weight + bias (either may be NULL). */
void th_tile_layer_norm(float *out, const float *x, const float *weight, const float *bias, int64_t rows, int64_t n,
                        double eps);
/* softmax(q k^T * scale, causal) v for one batch of heads; strides by dimension (batch, head, row, column). keys <=
 * 1024. */
typedef struct th_tile_attention {
    int64_t batch, heads, rows, keys, depth, width; /* depth of q and k, width of v */
    int64_t q[4], k[4], v[4], o[4];
    float scale;
    bool causal;
} th_tile_attention;
void th_tile_attention_run(const th_tile_attention *t, float *out, const float *q, const float *k, const float *v);
/* Rows of a table of row length n. The first index outside 0 .. size-1 is returned, -1 when all are inside. */
int64_t th_tile_embedding(float *out, const int64_t *index, int64_t count, const float *table, int64_t size, int64_t n);
void th_tile_softmax(float *out, const float *x, int64_t rows, int64_t n);
void th_tile_mean_rows(float *out, const float *x, int64_t rows, int64_t n);

/* ---- for backward ---- */

/* out[batch][m][n] = a[batch][m][k] b[batch][k][n]; strides of a and b by dimension, out contiguous. */
typedef struct th_tile_product {
    int64_t batch, m, n, k, a[3], b[3];
} th_tile_product;
void th_tile_matmul(const th_tile_product *p, float *out, const float *a, const float *b);

/* Sums over the dimensions in which o is 0; out holds `count` contiguous sums. */
enum { TH_TILE_MAX_SUMS = 1024 };
typedef struct th_tile_reduction {
    int64_t ndim, count, shape[TH_TILE_RANK], x[TH_TILE_RANK], o[TH_TILE_RANK];
} th_tile_reduction;
void th_tile_sum(const th_tile_reduction *r, float *out, const float *x);

/* layer_norm with the mean and 1 / sqrt(variance + eps) of each row, and its derivative; all contiguous. */
void th_tile_layer_norm_stats(float *out, float *mean, float *rstd, const float *x, const float *weight,
                              const float *bias, int64_t rows, int64_t n, double eps);
void th_tile_layer_norm_backward(float *dx, float *dw, float *db, const float *g, const float *x, const float *mean,
                                 const float *rstd, const float *weight, int64_t rows, int64_t n);

#endif
