/* Derivatives of matrix products. */
#include "ops/derivatives.h"

static th_node node(th__backward *b, th_val v) { return th__node_of(b, v); }

static th_val product(th__backward *b, const char *callee, th_val x, th_val y) {
    th_node args[] = {node(b, x), node(b, y)};
    return th__emit(&b->e, callee, 2, args);
}

/* The last two dimensions exchanged. */
static th_val turned(th__backward *b, th_val v) {
    th_node args[] = {node(b, v), th_node_int(b->e.t, -2), th_node_int(b->e.t, -1)};
    return th__emit(&b->e, "torch.transpose", 3, args);
}

static th_val shaped(th__backward *b, th_val v, uint32_t ndim, const int64_t *shape) {
    th_node sizes[TH_MAX_RANK];
    for (uint32_t i = 0; i < ndim; i++) sizes[i] = th_node_int(b->e.t, shape[i]);
    th_node args[] = {node(b, v), th_node_seq(b->e.t, TH_N_TUPLE, ndim, sizes)};
    return th__emit(&b->e, "torch.reshape", 2, args);
}

/* All dimensions but the last as one. */
static th_val rows_of(th__backward *b, th_val v, const th_type *type) {
    int64_t n = type->shape[type->ndim - 1], shape[] = {1, n};
    for (uint32_t i = 0; i + 1 < type->ndim; i++) shape[0] *= type->shape[i];
    return type->ndim == 2 ? v : shaped(b, v, 2, shape);
}

static const th_type *type_of(const th__backward *b, th_val v) {
    return th_type_get(b->e.t->ctx, b->e.t->values[v].type);
}

/* x @ w^T or x @ w for a matrix w and x of any rank from 2: as one product of matrices. */
static th_status rows_times_matrix(th__backward *b, th_val x, th_val w, bool w_turned) {
    th_val g = b->tangents[0];
    const th_type *tx = type_of(b, x), *tg = type_of(b, g);
    DECLINE_IF(tx->ndim < 2 || th_type_numel(tx) == 0 || th_type_numel(tg) == 0);
    th_val rows = rows_of(b, g, tg);
    if (th__wants(b, x)) {
        th_val gx = product(b, "torch.mm", rows, w_turned ? w : turned(b, w));
        th__give(b, x, tx->ndim == 2 ? gx : shaped(b, gx, tx->ndim, tx->shape));
    }
    if (th__wants(b, w)) {
        th_val flat = rows_of(b, x, tx);
        th__give(b, w,
                 w_turned ? product(b, "torch.mm", turned(b, rows), flat)
                          : product(b, "torch.mm", turned(b, flat), rows));
    }
    return TH_OK;
}

TH_GRAD(linear) {
    th_val x = th__use(b, 0), w = th__use(b, 1), bias = b->call.nparams > 2 ? th__use(b, 2) : 0;
    DECLINE_IF(!x || !w);
    TRY(rows_times_matrix(b, x, w, true));
    if (th__wants(b, bias)) {
        th_val g = b->tangents[0];
        th_node zero = th_node_int(b->e.t, 0);
        th_node args[] = {node(b, rows_of(b, g, type_of(b, g))), th_node_seq(b->e.t, TH_N_TUPLE, 1, &zero)};
        th__give(b, bias, th__emit(&b->e, "torch.sum", 2, args));
    }
    return TH_OK;
}

static th_status plain_product(th__backward *b, th_val x, th_val y, const char *callee) {
    th_val g = b->tangents[0];
    if (th__wants(b, x)) th__give(b, x, product(b, callee, g, turned(b, y)));
    if (th__wants(b, y)) th__give(b, y, product(b, callee, turned(b, x), g));
    return TH_OK;
}

TH_GRAD(mm) { return plain_product(b, th__use(b, 0), th__use(b, 1), "torch.mm"); }
TH_GRAD(bmm) { return plain_product(b, th__use(b, 0), th__use(b, 1), "torch.bmm"); }

TH_GRAD(matmul) {
    th_val x = th__use(b, 0), y = th__use(b, 1);
    DECLINE_IF(!x || !y);
    const th_type *tx = type_of(b, x), *ty = type_of(b, y);
    DECLINE_IF(tx->ndim < 2 || ty->ndim < 2); /* vectors */
    if (ty->ndim == 2) return rows_times_matrix(b, x, y, false);
    return plain_product(b, x, y, "torch.matmul");
}

static bool is_one(const th__backward *b, uint32_t param) {
    const th_node_data *d = &b->e.t->nodes[b->call.arg[param]];
    return d->kind == TH_N_ABSENT || (d->kind == TH_N_INT && d->u.i == 1) || (d->kind == TH_N_FLOAT && d->u.f == 1);
}

/* input + x @ y, unscaled */
static th_status added_product(th__backward *b, const char *callee) {
    th_val input = th__use(b, 0);
    DECLINE_IF(!is_one(b, 3) || !is_one(b, 4));
    if (th__wants(b, input)) th__give(b, input, b->tangents[0]);
    return plain_product(b, th__use(b, 1), th__use(b, 2), callee);
}

TH_GRAD(addmm) { return added_product(b, "torch.mm"); }
TH_GRAD(baddbmm) { return added_product(b, "torch.bmm"); }

TH_GRAD(mv) {
    th_val x = th__use(b, 0), v = th__use(b, 1), g = b->tangents[0];
    if (th__wants(b, x)) th__give(b, x, product(b, "torch.outer", g, v));
    if (th__wants(b, v)) th__give(b, v, product(b, "torch.mv", turned(b, x), g));
    return TH_OK;
}

TH_GRAD(dot) {
    th_val x = th__use(b, 0), y = th__use(b, 1), g = b->tangents[0];
    if (th__wants(b, x)) th__give(b, x, product(b, "torch.mul", g, y));
    if (th__wants(b, y)) th__give(b, y, product(b, "torch.mul", g, x));
    return TH_OK;
}
