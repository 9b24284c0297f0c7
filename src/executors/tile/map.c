/* Pointwise kernels over strided operands with contiguous output. */
#include "executors/tile/tile.h"

#include <math.h>
#include <string.h>

typedef struct dim {
    int64_t size, o, a, b;
} dim;

void th_tile_map_init(th_tile_map *m, th_tile_op op, int64_t ndim, const int64_t *shape, const int64_t *o,
                      const int64_t *a, const int64_t *b) {
    dim dims[TH_TILE_RANK];
    int32_t count = 0, n = 0;
    memset(m, 0, sizeof *m);
    m->op = (uint8_t)op;
    for (int64_t i = 0; i < ndim && i < TH_TILE_RANK; i++) { /* insertion sort, largest output stride first */
        dim d = {shape[i], o[i], a[i], b ? b[i] : 0};
        if (d.size == 1) continue;
        int32_t at = count++;
        for (; at > 0 && dims[at - 1].o < d.o; at--) dims[at] = dims[at - 1];
        dims[at] = d;
    }
    for (int32_t i = 0; i < count; i++) { /* two dimensions that everyone steps through as through one are one */
        dim d = dims[i];
        if (n && m->o[n - 1] == d.o * d.size && m->a[n - 1] == d.a * d.size && m->b[n - 1] == d.b * d.size)
            m->shape[n - 1] *= d.size;
        else
            m->shape[n++] = d.size;
        m->o[n - 1] = d.o;
        m->a[n - 1] = d.a;
        m->b[n - 1] = d.b;
    }
    if (!n) {
        m->shape[0] = m->o[0] = 1;
        n = 1;
    }
    m->ndim = n;
}

static inline float unary(th_tile_op op, float x) {
    switch (op) {
    case TH_TILE_NEG: return -x;
    case TH_TILE_ABS: return fabsf(x);
    case TH_TILE_RELU: return x < 0 ? 0.0f : x; /* -0.0 and NaN stay */
    case TH_TILE_SQRT: return sqrtf(x);
    case TH_TILE_RSQRT: return 1.0f / sqrtf(x);
    case TH_TILE_RECIPROCAL: return 1.0f / x;
    case TH_TILE_SQUARE: return x * x;
    case TH_TILE_EXP: return expf(x);
    case TH_TILE_LOG: return logf(x);
    case TH_TILE_TANH: return tanhf(x);
    case TH_TILE_SIGMOID: return 1.0f / (1.0f + expf(-x));
    case TH_TILE_SILU: return x / (1.0f + expf(-x));
    case TH_TILE_GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f));
    case TH_TILE_GELU_DOUBLES: return isinf(x) ? NAN : x * (1.0f + erff(x * 0.70710678118654752440f)) * 0.5f;
    case TH_TILE_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
    case TH_TILE_SIN: return sinf(x);
    case TH_TILE_COS: return cosf(x);
    case TH_TILE_ERF: return erff(x);
    default: return x;
    }
}

static inline float binary(th_tile_op op, float x, float y) {
    switch (op) {
    case TH_TILE_ADD: return x + y;
    case TH_TILE_SUB: return x - y;
    case TH_TILE_MUL: return x * y;
    case TH_TILE_DIV: return x / y;
    case TH_TILE_MAXIMUM: return x != x || x >= y ? x : y; /* nan wins, and the first of two zeros, as in torch */
    case TH_TILE_MINIMUM: return x != x || x <= y ? x : y;
    case TH_TILE_RELU_BACKWARD: return y <= 0 ? 0.0f : x;
    case TH_TILE_TANH_BACKWARD: return x * (1.0f - y * y);
    case TH_TILE_SIGMOID_BACKWARD: return x * (1.0f - y) * y;
    case TH_TILE_SILU_BACKWARD: {
        float s = 1.0f / (1.0f + expf(-y));
        return x * s * (1.0f + y * (1.0f - s));
    }
    case TH_TILE_GELU_BACKWARD: {
        float cdf = 0.5f * (1.0f + erff(y * 0.70710678118654752440f));
        return x * (cdf + y * 0.39894228040143267794f * expf(-0.5f * y * y));
    }
    case TH_TILE_GELU_TANH_BACKWARD: {
        float inner = 0.79788456080286535588f * (y + 0.044715f * y * y * y), t = tanhf(inner);
        float slope = 0.79788456080286535588f * (1.0f + 3.0f * 0.044715f * y * y);
        return x * (0.5f * (1.0f + t) + 0.5f * y * (1.0f - t * t) * slope);
    }
    default: return x;
    }
}

/* One inner loop per operation: the switch is on a constant and folds away. */
#define INNER_UNARY(OP)                                                       \
    case OP:                                                                  \
        if (so == 1 && sa == 1)                                               \
            for (int64_t i = 0; i < n; i++) o[i] = unary(OP, a[i]);           \
        else                                                                  \
            for (int64_t i = 0; i < n; i++) o[i * so] = unary(OP, a[i * sa]); \
        return;
#define INNER_BINARY(OP)                                                                  \
    case OP:                                                                              \
        if (so == 1 && sa == 1 && sb == 1)                                                \
            for (int64_t i = 0; i < n; i++) o[i] = binary(OP, a[i], b[i]);                \
        else if (so == 1 && sa == 1 && sb == 0)                                           \
            for (int64_t i = 0; i < n; i++) o[i] = binary(OP, a[i], *b);                  \
        else if (so == 1 && sa == 0 && sb == 1)                                           \
            for (int64_t i = 0; i < n; i++) o[i] = binary(OP, *a, b[i]);                  \
        else                                                                              \
            for (int64_t i = 0; i < n; i++) o[i * so] = binary(OP, a[i * sa], b[i * sb]); \
        return;

static void inner(th_tile_op op, float *restrict o, const float *a, const float *b, int64_t n, int64_t so, int64_t sa,
                  int64_t sb) {
    switch (op) {
        INNER_UNARY(TH_TILE_NEG)
        INNER_UNARY(TH_TILE_ABS)
        INNER_UNARY(TH_TILE_RELU)
        INNER_UNARY(TH_TILE_SQRT)
        INNER_UNARY(TH_TILE_RSQRT)
        INNER_UNARY(TH_TILE_RECIPROCAL)
        INNER_UNARY(TH_TILE_SQUARE)
        INNER_UNARY(TH_TILE_EXP)
        INNER_UNARY(TH_TILE_LOG)
        INNER_UNARY(TH_TILE_TANH)
        INNER_UNARY(TH_TILE_SIGMOID)
        INNER_UNARY(TH_TILE_SILU)
        INNER_UNARY(TH_TILE_GELU)
        INNER_UNARY(TH_TILE_GELU_DOUBLES)
        INNER_UNARY(TH_TILE_GELU_TANH)
        INNER_UNARY(TH_TILE_SIN)
        INNER_UNARY(TH_TILE_COS)
        INNER_UNARY(TH_TILE_ERF)
        INNER_UNARY(TH_TILE_COPY)
        INNER_BINARY(TH_TILE_ADD)
        INNER_BINARY(TH_TILE_SUB)
        INNER_BINARY(TH_TILE_MUL)
        INNER_BINARY(TH_TILE_DIV)
        INNER_BINARY(TH_TILE_MAXIMUM)
        INNER_BINARY(TH_TILE_MINIMUM)
        INNER_BINARY(TH_TILE_RELU_BACKWARD)
        INNER_BINARY(TH_TILE_TANH_BACKWARD)
        INNER_BINARY(TH_TILE_SIGMOID_BACKWARD)
        INNER_BINARY(TH_TILE_SILU_BACKWARD)
        INNER_BINARY(TH_TILE_GELU_BACKWARD)
        INNER_BINARY(TH_TILE_GELU_TANH_BACKWARD)
    case TH_TILE_NONE: return;
    }
}

void th_tile_map_run(const th_tile_map *m, float *out, const float *a, const float *b) {
    int64_t index[TH_TILE_RANK] = {0}, so = 0, sa = 0, sb = 0;
    const float *p = m->scalar_at == 1 ? &m->scalar : a, *q = m->scalar_at == 2 ? &m->scalar : b;
    int32_t last = m->ndim - 1;
    for (;;) {
        inner((th_tile_op)m->op, out + so, p + sa, q ? q + sb : NULL, m->shape[last], m->o[last], m->a[last],
              m->b[last]);
        int32_t d = last - 1;
        for (; d >= 0; d--) {
            so += m->o[d];
            sa += m->a[d];
            sb += m->b[d];
            if (++index[d] < m->shape[d]) break;
            so -= m->o[d] * m->shape[d];
            sa -= m->a[d] * m->shape[d];
            sb -= m->b[d] * m->shape[d];
            index[d] = 0;
        }
        if (d < 0) return;
    }
}
