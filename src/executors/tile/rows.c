/* Row kernels: small matrix products, normalisation, softmax. Sums run in eight lanes so that they vectorise. */
#include "executors/tile/tile.h"

#include <math.h>
#include <stddef.h>

enum { LANES = 8 };

static inline float dot(const float *a, const float *b, int64_t n) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += a[i + j] * b[i + j];
    float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    for (; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void
th_tile_linear(float *out, const float *x, const float *w, const float *bias, int64_t m, int64_t n, int64_t k) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            out[i * n + j] = dot(x + i * k, w + j * k, k) + (bias ? bias[j] : 0.0f);
}

static inline double sum_row(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i];
    return sum;
}

void th_tile_mean_rows(float *out, const float *x, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++)
        out[r] = (float)(sum_row(x + r * n, n) / (double)n);
}

void th_tile_layer_norm(float *out, const float *x, const float *weight, const float *bias, int64_t rows, int64_t n, double eps) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        double mean = sum_row(x, n) / (double)n, variance = 0;
        for (int64_t i = 0; i < n; i++)
            variance += (x[i] - mean) * (x[i] - mean);
        float scale = (float)(1.0 / sqrt(variance / (double)n + eps)), shift = (float)mean;
        for (int64_t i = 0; i < n; i++)
            out[i] = (x[i] - shift) * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
    }
}

void th_tile_softmax(float *out, const float *x, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, x += n, out += n) {
        float top = x[0];
        for (int64_t i = 1; i < n; i++)
            top = x[i] > top || x[i] != x[i] ? x[i] : top;
        double sum = 0;
        for (int64_t i = 0; i < n; i++)
            sum += out[i] = expf(x[i] - top);
        float scale = (float)(1.0 / sum);
        for (int64_t i = 0; i < n; i++)
            out[i] *= scale;
    }
}
