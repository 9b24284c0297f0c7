/* An executor in C: gelu as torch has it, and scaled_silu, a new operator with its derivative.
 *
 *     cc -O2 -shared -fPIC -I ../../include softly.c -lm -o softly.so
 *
 *     import torch, thunder
 *     softly = thunder.extend.load_executor("softly.so")
 *     compiled = thunder.jit(model, executors=[softly])
 *     y = torch.ops.thunder_softly.scaled_silu(x, 2.0)
 *
 * It takes float32 tensors on the CPU whose elements lie one after the other, and says so where it declines.
 */
#include "thunder/executor.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what it takes ---- */

static bool is_dense(const th_x_type *t) {
    int64_t expected = 1;
    for (uint32_t i = t->ndim; i-- > 0;) {
        if (t->shape[i] != 1 && t->stride[i] != expected) return false;
        expected *= t->shape[i];
    }
    return true;
}

/* The first `tensors` arguments are plain: 1, or declined with the reason. */
static int plain(const th_x_host *host, th_x_call *call, uint32_t tensors) {
    for (uint32_t i = 0; i < tensors; i++) {
        th_x_type type;
        if (!host->tensor(call, i, &type)) return host->decline(call, "an argument is no tensor");
        if (strcmp(type.device, "cpu") != 0) return host->decline(call, "it runs on the CPU only");
        if (strcmp(type.dtype, "f32") != 0) return host->decline(call, "it computes in float32 only");
        if (!is_dense(&type)) return host->decline(call, "the elements do not lie one after the other");
    }
    return 1;
}

static int64_t count(const th_x_tensor *t) {
    int64_t n = 1;
    for (uint32_t i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

/* ---- gelu ---- */

static int claim_gelu(const th_x_host *host, th_x_call *call, void **data) {
    (void)data;
    const char *approximate = host->text(call, 1);
    if (approximate && strcmp(approximate, "none") != 0) return host->decline(call, "it has no tanh approximation");
    return plain(host, call, 1);
}

static int run_gelu(void *data, const th_x_tensor *in, uint32_t nin, const th_x_tensor *out, uint32_t nout, char *error,
                    size_t size) {
    (void)data, (void)nin, (void)nout, (void)error, (void)size;
    const float *x = in[0].data;
    float *y = out[0].data;
    for (int64_t i = 0, n = count(&in[0]); i < n; i++) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
    return 0;
}

/* ---- scaled_silu(x, scale) = silu(x * scale) ---- */

static int claim_silu(const th_x_host *host, th_x_call *call, void **data) {
    double *scale = malloc(sizeof *scale);
    if (!scale) return -1;
    *data = scale;
    if (!host->real(call, 1, scale)) return host->decline(call, "the scale is no number");
    return plain(host, call, 1);
}

static int claim_silu_backward(const th_x_host *host, th_x_call *call, void **data) {
    double *scale = malloc(sizeof *scale);
    if (!scale) return -1;
    *data = scale;
    if (!host->real(call, 2, scale)) return host->decline(call, "the scale is no number");
    return plain(host, call, 2);
}

static int meta_like(const th_x_host *host, th_x_call *call) { /* one result, like the first argument */
    th_x_type type;
    if (!host->tensor(call, 0, &type)) return -1;
    host->give(call, type.dtype, type.device, type.device_index, type.ndim, type.shape, NULL);
    return 0;
}

static int run_silu(void *data, const th_x_tensor *in, uint32_t nin, const th_x_tensor *out, uint32_t nout, char *error,
                    size_t size) {
    (void)nin, (void)nout;
    const float scale = (float)*(const double *)data, *x = in[0].data;
    float *y = out[0].data;
    if (!isfinite(scale)) {
        snprintf(error, size, "the scale is %f", (double)scale);
        return -1;
    }
    for (int64_t i = 0, n = count(&in[0]); i < n; i++) y[i] = x[i] * scale / (1.0f + expf(-x[i] * scale));
    return 0;
}

static int run_silu_backward(void *data, const th_x_tensor *in, uint32_t nin, const th_x_tensor *out, uint32_t nout,
                             char *error, size_t size) {
    (void)nout, (void)error, (void)size;
    const float scale = (float)*(const double *)data, *g = in[0].data, *x = in[nin - 1].data; /* may be one tensor */
    float *dx = out[0].data;
    for (int64_t i = 0, n = count(&in[0]); i < n; i++) {
        float u = x[i] * scale, s = 1.0f / (1.0f + expf(-u));
        dx[i] = g[i] * scale * s * (1.0f + u * (1.0f - s));
    }
    return 0;
}

/* ---- the table ---- */

static const th_x_operator operators[] = {
    {.name = "gelu", .claim = claim_gelu, .execute = run_gelu},
    {.name = "scaled_silu",
     .schema = "(Tensor x, float scale) -> Tensor",
     .claim = claim_silu,
     .release = free,
     .execute = run_silu,
     .meta = meta_like,
     .derivative = "scaled_silu_backward"},
    {.name = "scaled_silu_backward",
     .schema = "(Tensor grad, Tensor x, float scale) -> Tensor",
     .claim = claim_silu_backward,
     .release = free,
     .execute = run_silu_backward,
     .meta = meta_like},
};

const th_executor *thunder_executor(void) {
    static const th_executor executor = {.abi = TH_EXECUTOR_ABI,
                                         .size = sizeof executor,
                                         .name = "softly",
                                         .version = "1.0",
                                         .operators = operators,
                                         .noperators = sizeof operators / sizeof *operators,
                                         .operator_size = sizeof *operators};
    return &executor;
}
