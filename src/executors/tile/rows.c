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
    for (int64_t r = 0; r < rows; r++) out[r] = (float)(sum_row(x + r * n, n) / (double)n);
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
