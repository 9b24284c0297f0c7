/* Derivatives of indexing: what was picked gets its gradient, the rest zeros. */
#include "ops/derivatives.h"

#include <string.h>

static th_node V(th__backward *b, th_val v) { return th__node_of(b, v); }
static th_node gradient(th__backward *b) { return V(b, b->tangents[0]); }

static th_status give(th__backward *b, th_val g) {
    th__give(b, th__use(b, 0), g);
    return TH_OK;
}

static th_node ints(th__backward *b, uint32_t n, const int64_t *at) {
    th_node kids[TH_MAX_RANK];
    for (uint32_t i = 0; i < n; i++) kids[i] = th_node_int(b->e.t, at[i]);
    return th_node_seq(b->e.t, TH_N_LIST, n, kids);
}

static th_val zeros(th__backward *b, const th__tensor *x) {
    return TH_APPLY(b, "torch.Tensor.new_zeros", gradient(b), ints(b, x->ndim, x->shape));
}

/* ---- x[...] ---- */

enum { MAX_STEPS = 2 * TH_MAX_RANK };

/* One step of a subscript: what it did to which dimension, and the shape before. */
typedef struct step {
    enum { SELECT, SLICE, NEW } kind;
    uint32_t dim;
    int64_t start, stop, step;
    th__dims shape;
} step;

typedef struct subscript {
    step steps[MAX_STEPS];
    uint32_t nsteps;
    th__dims shape; /* so far */
    uint32_t at;    /* the next dimension */
    uint32_t nindices;
    th_node indices[TH_MAX_RANK]; /* index tensors by dimension, else 0 */
} subscript;

static step *begin(subscript *s) {
    if (s->nsteps == MAX_STEPS) return NULL;
    step *now = &s->steps[s->nsteps++];
    *now = (step){.dim = s->at, .shape = s->shape};
    return now;
}

static th_status take_int(subscript *s, int64_t i) {
    step *now = begin(s);
    DECLINE_IF(!now || s->at >= s->shape.n);
    now->kind = SELECT;
    now->start = i < 0 ? i + s->shape.at[s->at] : i;
    s->shape.n--;
    for (uint32_t k = s->at; k < s->shape.n; k++) s->shape.at[k] = s->shape.at[k + 1];
    return TH_OK;
}

static th_status take_slice(const th_call *call, subscript *s, const th_node_data *slice) {
    const int64_t fallback[] = {0, INT64_MAX, 1};
    int64_t v[3];
    DECLINE_IF(s->at >= s->shape.n);
    for (uint32_t i = 0; i < 3; i++) {
        const th_node_data *d = th__node(call, th__kid(call, slice, i));
        DECLINE_IF(d->kind != TH_N_NONE && d->kind != TH_N_INT);
        v[i] = d->kind == TH_N_INT ? d->u.i : fallback[i];
    }
    int64_t size = s->shape.at[s->at], start = v[0], stop = v[1];
    DECLINE_IF(v[2] <= 0);
    if (start < 0) start += size;
    if (stop < 0) stop += size;
    start = start < 0 ? 0 : start > size ? size : start;
    stop = stop < start ? start : stop > size ? size : stop;
    if (start != 0 || stop != size || v[2] != 1) {
        step *now = begin(s);
        DECLINE_IF(!now);
        now->kind = SLICE;
        now->start = start;
        now->stop = stop;
        now->step = v[2];
        s->shape.at[s->at] = (stop - start) / v[2] + ((stop - start) % v[2] != 0);
    }
    s->at++;
    return TH_OK;
}

static th_status take_none(subscript *s) {
    step *now = begin(s);
    DECLINE_IF(!now || s->shape.n == TH_MAX_RANK);
    now->kind = NEW;
    for (uint32_t k = s->shape.n++; k > s->at; k--) s->shape.at[k] = s->shape.at[k - 1];
    s->shape.at[s->at++] = 1;
    return TH_OK;
}

static th_status take(const th_call *call, subscript *s, th_node node, uint32_t rest) {
    const th_node_data *d = th__node(call, node);
    th__tensor index;
    switch (d->kind) {
    case TH_N_INT: return take_int(s, d->u.i);
    case TH_N_SLICE: return take_slice(call, s, d);
    case TH_N_NONE: return take_none(s);
    case TH_N_ELLIPSIS: s->at += rest; return TH_OK;
    case TH_N_VALUE:
        TRY(th__node_tensor(call, node, &index));
        DECLINE_IF(index.dtype != TH_I64 || index.ndim == 0 || s->at >= s->shape.n);
        s->indices[s->at++] = node;
        s->nindices++;
        return TH_OK;
    default: return TH_DECLINED;
    }
}

static th_status read_subscript(th__backward *b, const th__tensor *x, subscript *s) {
    const th_call *call = &b->call;
    const th_node_data *index = th__arg(call, 1);
    memset(s, 0, sizeof *s);
    s->shape.n = x->ndim;
    memcpy(s->shape.at, x->shape, x->ndim * sizeof *x->shape);
    if (index->kind != TH_N_TUPLE) return take(call, s, call->arg[1], x->ndim);
    uint32_t used = 0;
    for (uint32_t i = 0; i < index->count; i++) {
        uint8_t kind = th__node(call, th__kid(call, index, i))->kind;
        used += kind != TH_N_NONE && kind != TH_N_ELLIPSIS;
    }
    DECLINE_IF(used > x->ndim);
    for (uint32_t i = 0; i < index->count; i++) TRY(take(call, s, th__kid(call, index, i), x->ndim - used));
    return TH_OK;
}

static th_val undo(th__backward *b, const step *s, th_val g, const th__tensor *x) {
    th_trace *t = b->e.t;
    th_typeref type = th_type_tensor(t->ctx, x->dtype, x->device, s->shape.n, s->shape.at, NULL, 0);
    th_node args[] = {V(b, g),
                      ints(b, s->shape.n, s->shape.at),
                      th_node_int(t, s->dim),
                      th_node_int(t, s->start),
                      th_node_int(t, s->stop),
                      th_node_int(t, s->step)};
    if (!args[0]) return 0;
    if (s->kind == NEW) return TH_APPLY(b, "torch.squeeze", args[0], args[2]);
    return s->kind == SELECT ? th__emit_typed(&b->e, "torch.ops.aten.select_backward.default", type, 4, args)
                             : th__emit_typed(&b->e, "torch.ops.aten.slice_backward.default", type, 6, args);
}

/* With index tensors only beside whole dimensions: torch takes the steps of a mixture in an order of its own. */
TH_GRAD(getitem) {
    th_trace *t = b->e.t;
    th__tensor x;
    subscript s;
    th_val g = b->tangents[0];
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(read_subscript(b, &x, &s));
    DECLINE_IF(s.nindices && s.nsteps);
    if (s.nindices) {
        uint32_t last = x.ndim;
        th_node kids[TH_MAX_RANK];
        while (last && !s.indices[last - 1]) last--;
        for (uint32_t i = 0; i < last; i++) kids[i] = s.indices[i] ? s.indices[i] : th_node_none(t);
        return give(b, TH_APPLY(b, "torch.ops.aten.index_put.default", V(b, zeros(b, &x)),
                                th_node_seq(t, TH_N_LIST, last, kids), gradient(b), th_node_bool(t, true)));
    }
    for (uint32_t i = s.nsteps; i-- > 0;) g = undo(b, &s.steps[i], g, &x);
    return give(b, g);
}

/* ---- along one dimension ---- */

TH_GRAD(gather) {
    th__tensor x;
    bool sparse;
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(th__arg_bool(&b->call, 3, false, &sparse));
    DECLINE_IF(sparse || x.ndim == 0);
    return give(b, TH_APPLY(b, "torch.scatter_add", V(b, zeros(b, &x)), b->call.arg[1], b->call.arg[2], gradient(b)));
}

TH_GRAD(index_select) {
    th__tensor x;
    TRY(th__arg_tensor(&b->call, 0, &x));
    DECLINE_IF(x.ndim == 0);
    return give(b, TH_APPLY(b, "torch.index_add", V(b, zeros(b, &x)), b->call.arg[1], b->call.arg[2], gradient(b)));
}

static bool alike(const th__tensor *x, const th__tensor *y) {
    return x->ndim == y->ndim && (!x->ndim || memcmp(x->shape, y->shape, x->ndim * sizeof *x->shape) == 0);
}

/* The source's gradient where the index has its shape: torch's formula asks for it. */
static th_status give_source(th__backward *b) {
    th__tensor index, source;
    th_val src = th__use(b, 3);
    if (!src || !th__wants(b, src)) return TH_OK;
    TRY(th__arg_tensor(&b->call, 2, &index));
    TRY(th__arg_tensor(&b->call, 3, &source));
    DECLINE_IF(!alike(&index, &source) || index.ndim == 0);
    th__give(b, src, TH_APPLY(b, "torch.gather", gradient(b), b->call.arg[1], b->call.arg[2]));
    return TH_OK;
}

TH_GRAD(scatter) {
    th_val x = th__use(b, 0);
    if (th__wants(b, x))
        th__give(b, x,
                 TH_APPLY(b, "torch.scatter", gradient(b), b->call.arg[1], b->call.arg[2], th_node_int(b->e.t, 0)));
    return give_source(b);
}

TH_GRAD(scatter_add) {
    th_val x = th__use(b, 0);
    if (th__wants(b, x)) th__give(b, x, b->tangents[0]);
    return give_source(b);
}

/* ---- rows by their numbers ---- */

/* The gradient of the places where the rows of the source went. */
static th_val rows_taken(th__backward *b) {
    return TH_APPLY(b, "torch.index_select", gradient(b), b->call.arg[1], b->call.arg[2]);
}

static th_val without_rows(th__backward *b) {
    return TH_APPLY(b, "torch.index_fill", gradient(b), b->call.arg[1], b->call.arg[2], th_node_int(b->e.t, 0));
}

TH_GRAD(index_add) {
    th_val x = th__use(b, 0), source = th__use(b, 3);
    if (th__wants(b, x)) th__give(b, x, b->tangents[0]);
    if (!th__wants(b, source)) return TH_OK;
    th_val g = rows_taken(b);
    if (th__arg(&b->call, 4)->kind != TH_N_ABSENT) g = TH_APPLY(b, "torch.mul", V(b, g), b->call.arg[4]);
    th__give(b, source, g);
    return TH_OK;
}

TH_GRAD(index_copy) {
    th_val x = th__use(b, 0), source = th__use(b, 3);
    if (th__wants(b, x)) th__give(b, x, without_rows(b));
    if (th__wants(b, source)) th__give(b, source, rows_taken(b));
    return TH_OK;
}

TH_GRAD(index_fill) {
    th_val value = th__use(b, 3);
    DECLINE_IF(value && th__wants(b, value));
    return give(b, without_rows(b));
}

/* ---- masks ---- */

TH_GRAD(masked_fill) {
    th_val value = th__use(b, 2);
    DECLINE_IF(value && th__wants(b, value));
    return give(b, TH_APPLY(b, "torch.masked_fill", gradient(b), b->call.arg[1], th_node_int(b->e.t, 0)));
}

static th_status choice(th__backward *b, uint32_t condition, uint32_t first) {
    th_node zero = th_node_int(b->e.t, 0);
    th_val x = th__use(b, first), y = th__use(b, 2);
    if (th__wants(b, x)) th__give(b, x, TH_APPLY(b, "torch.where", b->call.arg[condition], gradient(b), zero));
    if (th__wants(b, y)) th__give(b, y, TH_APPLY(b, "torch.where", b->call.arg[condition], zero, gradient(b)));
    return TH_OK;
}

TH_GRAD(where) { return choice(b, 0, 1); }
TH_GRAD(tensor_where) { return choice(b, 1, 0); }

/* ---- embedding ---- */

static th_status rows_back(th__backward *b, uint32_t weight_at, uint32_t index_at, int64_t padding) {
    th_trace *t = b->e.t;
    th__tensor weight;
    TRY(th__arg_tensor(&b->call, weight_at, &weight));
    DECLINE_IF(weight.ndim != 2);
    th_val w = th__use(b, weight_at);
    th__give(b, w,
             TH_APPLY(b, "torch.ops.aten.embedding_dense_backward.default", gradient(b), b->call.arg[index_at],
                      th_node_int(t, weight.shape[0]), th_node_int(t, padding), th_node_bool(t, false)));
    return TH_OK;
}

static th_status plain_rows(th__backward *b, uint32_t first) { /* scale_grad_by_freq, sparse */
    bool by_frequency, sparse;
    TRY(th__arg_bool(&b->call, first, false, &by_frequency));
    TRY(th__arg_bool(&b->call, first + 1, false, &sparse));
    return by_frequency || sparse ? TH_DECLINED : TH_OK;
}

TH_GRAD(functional_embedding) {
    th__tensor weight;
    int64_t padding = -1;
    TRY(plain_rows(b, 5));
    DECLINE_IF(th__has(&b->call, 3));
    TRY(th__arg_tensor(&b->call, 1, &weight));
    if (th__has(&b->call, 2)) {
        TRY(th__arg_int(&b->call, 2, -1, &padding));
        if (padding < 0) padding += weight.shape[0];
    }
    return rows_back(b, 1, 0, padding);
}

TH_GRAD(embedding) {
    int64_t padding;
    TRY(plain_rows(b, 3));
    TRY(th__arg_int(&b->call, 2, -1, &padding));
    return rows_back(b, 0, 1, padding);
}
