/* cuDNN's graph API: layer_norm and attention, forward and backward, as plans that are made once per shape.
 *
 *     a kind and its sizes --- norm.c, attention.c ---> operations over tensors (graph.c)
 *                                                          |
 *                              heuristics, first engine that takes them ---> th_cudnn_plan --- run ---> a stream
 *
 * The library is opened on demand; nothing of its headers is needed: the numbers below never change. A plan knows its
 * tensors by position: the caller passes one address for each argument, and scratch memory. No Python.
 */
#ifndef THUNDER_EXECUTORS_CUDNN_H
#define THUNDER_EXECUTORS_CUDNN_H

#include "base/dylib.h"

enum { TH_CUDNN_DEVICES = 64, TH_CUDNN_OLDEST = 90600 }; /* before that dQ's sums had to be cleared by the caller */

#define TH_CUDNN_SYMBOLS(X)                                                          \
    X(cudnnGetVersion, size_t, (void))                                               \
    X(cudnnGetErrorString, const char *, (int))                                      \
    X(cudnnGetLastErrorString, void, (char *, size_t))                               \
    X(cudnnCreate, int, (void **))                                                   \
    X(cudnnSetStream, int, (void *, void *))                                         \
    X(cudnnBackendCreateDescriptor, int, (int, void **))                             \
    X(cudnnBackendDestroyDescriptor, int, (void *))                                  \
    X(cudnnBackendFinalize, int, (void *))                                           \
    X(cudnnBackendSetAttribute, int, (void *, int, int, int64_t, const void *))      \
    X(cudnnBackendGetAttribute, int, (void *, int, int, int64_t, int64_t *, void *)) \
    X(cudnnBackendExecute, int, (void *, void *, void *))

typedef struct th_cudnn {
    th_dylib *library;
    int64_t version;                 /* 10000 * major + 100 * minor + patch */
    void *handles[TH_CUDNN_DEVICES]; /* of devices, for the life of the process; NULL: not yet */
#define TH_CUDNN_FIELD(name, ret, args) ret(*name) args;
    TH_CUDNN_SYMBOLS(TH_CUDNN_FIELD)
#undef TH_CUDNN_FIELD
} th_cudnn;

/* TH_EIO: no such library, or one that is too old. */
th_status th_cudnn_open(th_ctx *ctx, const char *path, th_cudnn *cudnn);

/* ---- plans ---- */

typedef enum th_cudnn_type { /* cuDNN's numbers */
                             TH_CUDNN_F32 = 0,
                             TH_CUDNN_F16 = 2,
                             TH_CUDNN_I32 = 4,
                             TH_CUDNN_BF16 = 9,
                             TH_CUDNN_BOOL = 11,
} th_cudnn_type;

enum { TH_CUDNN_OPERANDS = 16, TH_CUDNN_DESCRIPTORS = 160 };

typedef struct th_cudnn_operand { /* a tensor of a plan that has an address */
    enum { TH_CUDNN_ARGUMENT, TH_CUDNN_SCRATCH, TH_CUDNN_VALUE } kind;
    uint64_t at; /* which argument; offset in the scratch memory */
    union {
        float f;
        int32_t i;
    } value;
} th_cudnn_operand;

typedef struct th_cudnn_plan {
    void *handle, *plan;
    uint64_t scratch; /* bytes of scratch memory that a run needs, cuDNN's own workspace at `workspace` included */
    uint64_t workspace;
    uint32_t narguments, noperands, nowned;
    int64_t uids[TH_CUDNN_OPERANDS];
    th_cudnn_operand operands[TH_CUDNN_OPERANDS];
    void *owned[TH_CUDNN_DESCRIPTORS]; /* descriptors, destroyed with the plan */
} th_cudnn_plan;

typedef struct th_cudnn_norm {
    uint8_t type, weight_type;
    int64_t rows, width; /* dense rows */
    float eps;
} th_cudnn_norm;

typedef struct th_cudnn_attention {
    uint8_t type;
    bool causal; /* position i of the query sees the first i + 1 keys */
    float scale;
    int64_t batch, heads, kv_heads, length, kv_length, size;
    int64_t q[4], k[4], v[4], o[4], grad[4]; /* strides in elements, the last 1; grad: of the result's gradient */
    int64_t dq[4], dk[4], dv[4];
} th_cudnn_attention;

/* The current device of the thread must be `device`. TH_DECLINED with the context's error: no engine takes it. After
 * an error there is nothing to free.
 *
 *     layer_norm            x, weight, bias -> y, mean, rstd
 *     layer_norm_backward   grad, x, weight, mean, rstd -> dx, dweight, dbias
 *     attention             q, k, v -> out, logsumexp
 *     attention_backward    grad, q, k, v, out, logsumexp -> dq, dk, dv
 */
th_status th_cudnn_layer_norm(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_norm *n, th_cudnn_plan *out);
th_status th_cudnn_layer_norm_backward(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_norm *n,
                                       th_cudnn_plan *out);
th_status th_cudnn_attention_forward(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_attention *a,
                                     th_cudnn_plan *out);
th_status th_cudnn_attention_backward(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_attention *a,
                                      th_cudnn_plan *out);
/* Enqueue. arguments: addresses, inputs before results; aligned to 16 bytes, as scratch is to 256. */
th_status th_cudnn_run(th_ctx *ctx, const th_cudnn *c, const th_cudnn_plan *plan, void *stream, void *const *arguments,
                       void *scratch);
void th_cudnn_plan_fini(const th_cudnn *c, th_cudnn_plan *plan);

#endif
