/* Row kernels: small matrix products, normalisation, softmax. Sums run in eight lanes so that they vectorise. */
#include "executors/tile/tile.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum { LANES = 8 };

static inline float dot(const float *a, const float *b, int64_t n) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += a[i + j] * b[i + j];
    float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void
th_tile_linear(float *out, const float *x, const float *w, const float *bias, int64_t m, int64_t n, int64_t k) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) out[i * n + j] = dot(x + i * k, w + j * k, k) + (bias ? bias[j] : 0.0f);
}

static inline double sum_row(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

void th_tile_mean_rows(float *out, const float *x, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++) out[r] = (float)sum_row(x + r * n, n) / (float)n;
}

void th_tile_layer_norm(float *out, const float *x, const float *weight, const float *bias, int64_t rows, int64_t n,
                        double eps) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        double mean = sum_row(x, n) / (double)n, variance = 0;
        for (int64_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
        float scale = (float)(1.0 / sqrt(variance / (double)n + eps)), shift = (float)mean;
        for (int64_t i = 0; i < n; i++)
            out[i] = (x[i] - shift) * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
    }
}

void th_tile_softmax(float *out, const float *x, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        float top = x[0];
        for (int64_t i = 1; i < n; i++) top = x[i] > top || x[i] != x[i] ? x[i] : top;
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += out[i] = expf(x[i] - top);
        float scale = (float)(1.0 / sum);
        for (int64_t i = 0; i < n; i++) out[i] *= scale;
    }
}

static inline float dot_strided(const float *a, int64_t sa, const float *b, int64_t sb, int64_t n) {
    if (sa == 1 && sb == 1) return dot(a, b, n);
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i * sa] * b[i * sb];
    return sum;
}

/* One query row: scores over the keys it may see, softmax, then the weighted sum of values. */
static void attend(const th_tile_attention *t, float *out, const float *q, const float *k, const float *v,
                   int64_t row) {
    float score[1024], top = -INFINITY;
    int64_t keys = t->causal && row + 1 < t->keys ? row + 1 : t->keys;
    for (int64_t j = 0; j < keys; j++) {
        score[j] = dot_strided(q, t->q[3], k + j * t->k[2], t->k[3], t->depth) * t->scale;
        top = score[j] > top || score[j] != score[j] ? score[j] : top;
    }
    float sum = 0;
    for (int64_t j = 0; j < keys; j++) sum += score[j] = expf(score[j] - top);
    float scale = 1.0f / sum;
    for (int64_t c = 0; c < t->width; c++) out[c * t->o[3]] = 0;
    for (int64_t j = 0; j < keys; j++) {
        float weight = score[j] * scale;
        const float *value = v + j * t->v[2];
        for (int64_t c = 0; c < t->width; c++) out[c * t->o[3]] += weight * value[c * t->v[3]];
    }
}

void th_tile_attention_run(const th_tile_attention *t, float *out, const float *q, const float *k, const float *v) {
    for (int64_t b = 0; b < t->batch; b++)
        for (int64_t h = 0; h < t->heads; h++)
            for (int64_t i = 0; i < t->rows; i++)
                attend(t, out + b * t->o[0] + h * t->o[1] + i * t->o[2], q + b * t->q[0] + h * t->q[1] + i * t->q[2],
                       k + b * t->k[0] + h * t->k[1], v + b * t->v[0] + h * t->v[1], i);
}

int64_t th_tile_embedding(float *out, const int64_t *index, int64_t count, const float *table, int64_t size,
                          int64_t n) {
    for (int64_t i = 0; i < count; i++) {
        if (index[i] < 0 || index[i] >= size) return i;
        memcpy(out + i * n, table + index[i] * n, sizeof(float) * (size_t)n);
    }
    return -1;
}

/* ---- for backward ---- */

enum { WIDE = 16 };

/* One row of a product whose right operand has its rows in order: WIDE results at a time stay in registers. */
static inline void row_times_rows(float *restrict row, const float *restrict a, int64_t sa, const float *restrict b,
                                  int64_t sb, int64_t n, int64_t k) {
    int64_t j = 0;
    for (; j + WIDE <= n; j += WIDE) {
        float lane[WIDE] = {0};
        for (int64_t l = 0; l < k; l++)
            for (int i = 0; i < WIDE; i++) lane[i] += a[l * sa] * b[l * sb + j + i];
        for (int i = 0; i < WIDE; i++) row[j + i] = lane[i];
    }
    for (; j < n; j++) {
        float sum = 0;
        for (int64_t l = 0; l < k; l++) sum += a[l * sa] * b[l * sb + j];
        row[j] = sum;
    }
}

static inline float column_sum(const float *a, int64_t sa, const float *b, int64_t sb, int64_t k) {
    if (sa == 1 && sb == 1) return dot(a, b, k);
    float sum = 0;
    for (int64_t l = 0; l < k; l++) sum += a[l * sa] * b[l * sb];
    return sum;
}

__attribute__((target_clones("avx512f", "arch=haswell", "default"), optimize("O3"))) void
th_tile_matmul(const th_tile_product *p, float *out, const float *a, const float *b) {
    for (int64_t z = 0; z < p->batch; z++, out += p->m * p->n, a += p->a[0], b += p->b[0]) {
        for (int64_t i = 0; i < p->m; i++) {
            float *row = out + i * p->n;
            const float *ai = a + i * p->a[1];
            if (p->b[2] == 1)
                row_times_rows(row, ai, p->a[2], b, p->b[1], p->n, p->k);
            else
                for (int64_t j = 0; j < p->n; j++) row[j] = column_sum(ai, p->a[2], b + j * p->b[2], p->b[1], p->k);
        }
    }
}

void th_tile_sum(const th_tile_reduction *r, float *out, const float *x) {
    double sums[TH_TILE_MAX_SUMS];
    int64_t index[TH_TILE_RANK] = {0}, from = 0, to = 0, last = r->ndim - 1;
    memset(sums, 0, sizeof *sums * (size_t)r->count);
    for (;;) {
        for (int64_t i = 0; i < r->shape[last]; i++) sums[to + i * r->o[last]] += x[from + i * r->x[last]];
        int64_t d = last - 1;
        for (; d >= 0; d--) {
            from += r->x[d], to += r->o[d];
            if (++index[d] < r->shape[d]) break;
            from -= r->x[d] * r->shape[d], to -= r->o[d] * r->shape[d];
            index[d] = 0;
        }
        if (d < 0) break;
    }
    for (int64_t i = 0; i < r->count; i++) out[i] = (float)sums[i];
}

void th_tile_layer_norm_stats(float *out, float *mean, float *rstd, const float *x, const float *weight,
                              const float *bias, int64_t rows, int64_t n, double eps) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        double m = sum_row(x, n) / (double)n, variance = 0;
        for (int64_t i = 0; i < n; i++) variance += (x[i] - m) * (x[i] - m);
        float scale = (float)(1.0 / sqrt(variance / (double)n + eps)), shift = (float)m;
        for (int64_t i = 0; i < n; i++)
            out[i] = (x[i] - shift) * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
        mean[r] = shift;
        rstd[r] = scale;
    }
}

void th_tile_layer_norm_backward(float *dx, float *dw, float *db, const float *g, const float *x, const float *mean,
                                 const float *rstd, const float *weight, int64_t rows, int64_t n) {
    memset(dw, 0, sizeof *dw * (size_t)n);
    memset(db, 0, sizeof *db * (size_t)n);
    for (int64_t r = 0; r < rows; r++, x += n, g += n, dx += n) {
        double along = 0, level = 0;
        for (int64_t i = 0; i < n; i++) {
            float hat = (x[i] - mean[r]) * rstd[r], scaled = g[i] * weight[i];
            along += scaled * hat;
            level += scaled;
            dw[i] += g[i] * hat;
            db[i] += g[i];
        }
        float a = (float)(along / (double)n), l = (float)(level / (double)n);
        for (int64_t i = 0; i < n; i++) {
            float hat = (x[i] - mean[r]) * rstd[r];
            dx[i] = rstd[r] * (g[i] * weight[i] - l - hat * a);
        }
    }
}
