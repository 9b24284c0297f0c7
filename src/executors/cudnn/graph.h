/* Building a plan: operations over tensors. The first failure sticks, so that a graph is a column of plain calls. */
#ifndef THUNDER_EXECUTORS_CUDNN_GRAPH_H
#define THUNDER_EXECUTORS_CUDNN_GRAPH_H

#include "executors/cudnn/cudnn.h"

enum { TH_CUDNN_OPERATIONS = 48 };

typedef struct th__cudnn_graph {
    th_ctx *ctx;
    const th_cudnn *c;
    th_cudnn_plan *plan;
    void *operations[TH_CUDNN_OPERATIONS];
    uint32_t noperations;
    int64_t next_uid;
    th_status status;
} th__cudnn_graph;

typedef struct th__cudnn_shape {
    int64_t n[4], stride[4];
} th__cudnn_shape;

typedef void *th__cudnn_tensor; /* a descriptor, owned by the plan; NULL after a failure, or: none */

typedef enum th__cudnn_mode { /* pointwise; cuDNN's numbers */
                              TH__CUDNN_ADD = 0,
                              TH__CUDNN_MUL = 1,
                              TH__CUDNN_DIV = 6,
                              TH__CUDNN_SUB = 9,
                              TH__CUDNN_EXP = 13,
                              TH__CUDNN_LOG = 15,
                              TH__CUDNN_IDENTITY = 21,
                              TH__CUDNN_GE = 303,
                              TH__CUDNN_INDEX = 501,
                              TH__CUDNN_SELECT = 601,
} th__cudnn_mode;

enum { TH__CUDNN_SUM = 0, TH__CUDNN_MAX = 3 }; /* reductions */

th_status th__cudnn_begin(th__cudnn_graph *g, th_ctx *ctx, th_cudnn *c, int device, th_cudnn_plan *plan);
th_status th__cudnn_end(th__cudnn_graph *g); /* choose an engine; after a failure the plan is empty */

th__cudnn_shape th__cudnn_dense(int64_t a, int64_t b, int64_t c, int64_t d);
th__cudnn_shape th__cudnn_strided(int64_t a, int64_t b, int64_t c, int64_t d, const int64_t stride[4]);
th__cudnn_shape th__cudnn_swapped(th__cudnn_shape s); /* the last two dimensions */

th__cudnn_tensor th__cudnn_argument(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s); /* the next one */
th__cudnn_tensor th__cudnn_scratch(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s, uint64_t bytes);
th__cudnn_tensor th__cudnn_value(th__cudnn_graph *g, float value); /* one number that the host knows */
th__cudnn_tensor th__cudnn_virtual(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s);

void *th__cudnn_make(th__cudnn_graph *g, int kind);
void th__cudnn_set(th__cudnn_graph *g, void *descriptor, int name, int type, int64_t count, const void *values);
void th__cudnn_set_tensor(th__cudnn_graph *g, void *descriptor, int name, th__cudnn_tensor t); /* NULL: left out */
void th__cudnn_finish(th__cudnn_graph *g, void *descriptor);
void th__cudnn_operation(th__cudnn_graph *g, void *descriptor); /* finish, and take part in the graph */

/* y = mode(x, b); y = t ? x : b; axis: of an index. compute: TH_CUDNN_F32 in most cases. */
void th__cudnn_pointwise(th__cudnn_graph *g, th__cudnn_mode mode, uint8_t compute, int64_t axis, th__cudnn_tensor x,
                         th__cudnn_tensor b, th__cudnn_tensor t, th__cudnn_tensor y);
void th__cudnn_matmul(th__cudnn_graph *g, th__cudnn_tensor a, th__cudnn_tensor b, th__cudnn_tensor y);
void th__cudnn_reduce(th__cudnn_graph *g, int how, th__cudnn_tensor x, th__cudnn_tensor y);
void th__cudnn_reshape(th__cudnn_graph *g, th__cudnn_tensor x, th__cudnn_tensor y);

#endif
