/* layer_norm over dense rows. cuDNN sees (rows, width, 1, 1), channels last. */
#include "executors/cudnn/graph.h"

#include "base/ctx.h"

enum { NORM = 29, NORM_BACKWARD = 30, LAYER_NORM = 0, TRAINING = 1, IS_NORM_MODE = 27, IS_NORM_PHASE = 28 };

static th__cudnn_shape rows(const th_cudnn_norm *n) {
    return (th__cudnn_shape){{n->rows, n->width, 1, 1}, {n->width, 1, n->width, n->width}};
}

static th__cudnn_shape row(const th_cudnn_norm *n) {
    return (th__cudnn_shape){{1, n->width, 1, 1}, {n->width, 1, n->width, n->width}};
}

static th__cudnn_shape one_per_row(const th_cudnn_norm *n) {
    return (th__cudnn_shape){{n->rows, 1, 1, 1}, {1, 1, 1, 1}};
}

th_status th_cudnn_layer_norm(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_norm *n, th_cudnn_plan *out) {
    th__cudnn_graph g;
    int mode = LAYER_NORM, phase = TRAINING;
    TRY(th__cudnn_begin(&g, ctx, c, device, out));
    th__cudnn_tensor x = th__cudnn_argument(&g, n->type, rows(n));
    th__cudnn_tensor weight = th__cudnn_argument(&g, n->weight_type, row(n));
    th__cudnn_tensor bias = th__cudnn_argument(&g, n->weight_type, row(n));
    th__cudnn_tensor y = th__cudnn_argument(&g, n->type, rows(n));
    th__cudnn_tensor mean = th__cudnn_argument(&g, TH_CUDNN_F32, one_per_row(n));
    th__cudnn_tensor rstd = th__cudnn_argument(&g, TH_CUDNN_F32, one_per_row(n));
    void *op = th__cudnn_make(&g, NORM);
    th__cudnn_set(&g, op, 2000, IS_NORM_MODE, 1, &mode);
    th__cudnn_set(&g, op, 2001, IS_NORM_PHASE, 1, &phase);
    th__cudnn_set_tensor(&g, op, 2002, x);
    th__cudnn_set_tensor(&g, op, 2003, mean);
    th__cudnn_set_tensor(&g, op, 2004, rstd);
    th__cudnn_set_tensor(&g, op, 2005, weight);
    th__cudnn_set_tensor(&g, op, 2006, bias);
    th__cudnn_set_tensor(&g, op, 2007, th__cudnn_value(&g, n->eps));
    th__cudnn_set_tensor(&g, op, 2013, y);
    th__cudnn_operation(&g, op);
    return th__cudnn_end(&g);
}

th_status th_cudnn_layer_norm_backward(th_ctx *ctx, th_cudnn *c, int device, const th_cudnn_norm *n,
                                       th_cudnn_plan *out) {
    th__cudnn_graph g;
    int mode = LAYER_NORM;
    TRY(th__cudnn_begin(&g, ctx, c, device, out));
    th__cudnn_tensor grad = th__cudnn_argument(&g, n->type, rows(n));
    th__cudnn_tensor x = th__cudnn_argument(&g, n->type, rows(n));
    th__cudnn_tensor weight = th__cudnn_argument(&g, n->weight_type, row(n));
    th__cudnn_tensor mean = th__cudnn_argument(&g, TH_CUDNN_F32, one_per_row(n));
    th__cudnn_tensor rstd = th__cudnn_argument(&g, TH_CUDNN_F32, one_per_row(n));
    th__cudnn_tensor dx = th__cudnn_argument(&g, n->type, rows(n));
    th__cudnn_tensor dweight = th__cudnn_argument(&g, n->weight_type, row(n));
    th__cudnn_tensor dbias = th__cudnn_argument(&g, n->weight_type, row(n));
    void *op = th__cudnn_make(&g, NORM_BACKWARD);
    th__cudnn_set(&g, op, 2100, IS_NORM_MODE, 1, &mode);
    th__cudnn_set_tensor(&g, op, 2101, x);
    th__cudnn_set_tensor(&g, op, 2102, mean);
    th__cudnn_set_tensor(&g, op, 2103, rstd);
    th__cudnn_set_tensor(&g, op, 2104, grad);
    th__cudnn_set_tensor(&g, op, 2105, weight);
    th__cudnn_set_tensor(&g, op, 2107, dweight);
    th__cudnn_set_tensor(&g, op, 2108, dbias);
    th__cudnn_set_tensor(&g, op, 2109, dx);
    th__cudnn_operation(&g, op);
    return th__cudnn_end(&g);
}
