/* Indexing, and what picks or replaces elements by an index or a mask: getitem, gather, where, masked_fill, embedding.
 *
 * x[...] with ints, slices, None and Ellipsis is a view. Index tensors of integers make a copy whose dimensions stand
 * in the place of the indexed ones when those are neighbours, else in front; its strides are the TensorIterator's over
 * x, with stride 0 in the indexed dimensions, and the index tensors. Masks give shapes that depend on data: declined,
 * as are index tensors without dimensions, whose value torch reads.
 */
#include "ops/derivatives.h"
#include "ops/iterator.h"

#include <string.h>

/* ---- basic indexing ---- */

enum { MAX_INDICES = TH_ITER_OPERANDS - 1 };

typedef struct subscript {
    th__tensor x;
    uint32_t n; /* dimensions of the result so far, and where the next item of x stands */
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK], skip;
    uint32_t taken;                     /* dimensions of x that are used up */
    uint32_t nindices, at[MAX_INDICES]; /* the dimension of the result that each index tensor picks from */
    th__tensor index[MAX_INDICES];
    int64_t list_shape[MAX_INDICES]; /* of an index that is a list of ints */
} subscript;

static th_status keep_dim(subscript *s, int64_t size, int64_t stride) {
    DECLINE_IF(s->n == TH_MAX_RANK);
    s->shape[s->n] = size;
    s->stride[s->n++] = stride;
    return TH_OK;
}

static th_status take_int(subscript *s, int64_t i) {
    DECLINE_IF(s->taken >= s->x.ndim);
    int64_t size = s->x.shape[s->taken];
    if (i < 0) i += size;
    DECLINE_IF(i < 0 || i >= size);
    s->skip += i * s->x.stride[s->taken++];
    return TH_OK;
}

static th_status take_slice(const th_call *call, subscript *s, const th_node_data *slice) {
    const int64_t fallback[] = {0, INT64_MAX, 1};
    int64_t v[3];
    DECLINE_IF(s->taken >= s->x.ndim);
    for (uint32_t i = 0; i < 3; i++) {
        const th_node_data *d = th__node(call, th__kid(call, slice, i));
        DECLINE_IF(d->kind != TH_N_NONE && d->kind != TH_N_INT);
        v[i] = d->kind == TH_N_INT ? d->u.i : fallback[i];
    }
    int64_t size = s->x.shape[s->taken], start = v[0], stop = v[1], step = v[2];
    DECLINE_IF(step <= 0);
    if (start < 0) start += size;
    if (stop < 0) stop += size;
    start = start < 0 ? 0 : start > size ? size : start;
    stop = stop < start ? start : stop > size ? size : stop;
    int64_t stride = s->x.stride[s->taken++], scaled;
    DECLINE_IF(__builtin_mul_overflow(stride, step, &scaled));
    s->skip += start * stride;
    int64_t length = stop - start;
    return keep_dim(s, length / step + (length % step != 0), scaled);
}

/* New dimensions from None stand before the next item of x. */
static th_status take_none(subscript *s) {
    bool last = s->taken >= s->x.ndim;
    return keep_dim(s, 1, last ? 1 : s->x.shape[s->taken] * s->x.stride[s->taken]);
}

static th_status take_whole(subscript *s, uint32_t count) {
    DECLINE_IF(s->taken + count > s->x.ndim);
    for (; count > 0; count--, s->taken++) TRY(keep_dim(s, s->x.shape[s->taken], s->x.stride[s->taken]));
    return TH_OK;
}

static th_status take_index(const th_call *call, subscript *s, th_node node) {
    const th_node_data *d = th__node(call, node);
    DECLINE_IF(s->nindices == MAX_INDICES || s->taken >= s->x.ndim || s->x.shape[s->taken] == 0);
    th__tensor *index = &s->index[s->nindices];
    if (d->kind == TH_N_LIST) {
        static const int64_t one = 1;
        int64_t size = s->x.shape[s->taken];
        DECLINE_IF(d->count == 0);
        for (uint32_t i = 0; i < d->count; i++) {
            const th_node_data *item = th__node(call, th__kid(call, d, i));
            DECLINE_IF(item->kind != TH_N_INT || item->u.i < -size || item->u.i >= size);
        }
        s->list_shape[s->nindices] = d->count;
        *index = (th__tensor){.dtype = TH_I64,
                              .device = s->x.device,
                              .ndim = 1,
                              .shape = &s->list_shape[s->nindices],
                              .stride = &one,
                              .contiguous = true};
    } else {
        TRY(th__node_tensor(call, node, index));
        DECLINE_IF(index->ndim == 0 || index->device != s->x.device);
        DECLINE_IF(index->dtype != TH_I64 && index->dtype != TH_I32);
    }
    s->at[s->nindices++] = s->n;
    return take_whole(s, 1);
}

static th_status take(const th_call *call, subscript *s, th_node node, uint32_t rest) {
    const th_node_data *d = th__node(call, node);
    switch (d->kind) {
    case TH_N_INT: return take_int(s, d->u.i);
    case TH_N_SLICE: return take_slice(call, s, d);
    case TH_N_NONE: return take_none(s);
    case TH_N_ELLIPSIS: return take_whole(s, rest);
    case TH_N_VALUE:
    case TH_N_LIST: return take_index(call, s, node);
    default: return TH_DECLINED;
    }
}

/* How many dimensions an Ellipsis stands for. */
static th_status count_rest(const th_call *call, const th_node_data *items, uint32_t ndim, uint32_t *rest) {
    uint32_t used = 0, ellipses = 0;
    for (uint32_t i = 0; i < items->count; i++) {
        uint8_t kind = th__node(call, th__kid(call, items, i))->kind;
        if (kind == TH_N_ELLIPSIS)
            ellipses++;
        else if (kind != TH_N_NONE)
            used++;
    }
    DECLINE_IF(used > ndim || ellipses > 1);
    *rest = ndim - used;
    return TH_OK;
}

/* ---- index tensors ---- */

/* Indexed dimensions move to the front when they are not neighbours. */
static void move_to_front(subscript *s) {
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    uint32_t n = 0, indexed = 0;
    for (uint32_t i = 0; i < s->nindices; i++) {
        indexed |= 1u << s->at[i];
        shape[n] = s->shape[s->at[i]];
        stride[n++] = s->stride[s->at[i]];
        s->at[i] = i;
    }
    for (uint32_t i = 0; i < s->n; i++) {
        if (indexed >> i & 1) continue;
        shape[n] = s->shape[i];
        stride[n++] = s->stride[i];
    }
    memcpy(s->shape, shape, n * sizeof *shape);
    memcpy(s->stride, stride, n * sizeof *stride);
}

/* CUDA makes index tensors alike, and a conversion to i64 may: only plain ones are followed there. */
static th_status check_indices(const th_call *call, const subscript *s, const th__dims *picked) {
    bool cpu = th__is_cpu(call, &s->x);
    for (uint32_t i = 0; i < s->nindices; i++) {
        const th__tensor *index = &s->index[i];
        bool plain = index->contiguous && index->ndim == picked->n &&
                     memcmp(index->shape, picked->at, picked->n * sizeof *picked->at) == 0;
        DECLINE_IF(!plain && (!cpu || index->dtype != TH_I64));
    }
    return TH_OK;
}

/* An index tensor spread over the result: broadcast to `picked`, with ones before and after. */
static void add_index(th__iter *it, const th__tensor *index, const th__dims *picked, uint32_t before, uint32_t after,
                      int64_t *shape, int64_t *stride) {
    int64_t spread[TH_MAX_RANK];
    th__dims to = {.n = before + picked->n + after};
    uint32_t missing = picked->n - index->ndim;
    for (uint32_t i = 0; i < picked->n; i++) {
        bool here = i >= missing;
        spread[i] = here && (index->shape[i - missing] != 1 || picked->at[i] == 1) ? index->stride[i - missing] : 0;
    }
    for (uint32_t i = 0; i < to.n; i++) {
        to.at[i] = shape[i] = i >= before && i < before + picked->n ? picked->at[i - before] : 1;
    }
    if (!th__view_strides(picked->n, picked->at, spread, &to, stride)) th__row_major(to.n, to.at, stride);
    th__tensor x = {.ndim = to.n, .shape = shape, .stride = stride};
    th__iter_tensor(it, &x);
}

static th_status index_copy(th_call *call, subscript *s) {
    th__dims picked = {0};
    th__iter it = {0};
    int64_t shape[TH_ITER_OPERANDS][TH_MAX_RANK], stride[TH_ITER_OPERANDS][TH_MAX_RANK];
    for (uint32_t i = 0; i < s->nindices; i++) TRY(th__broadcast(&picked, s->index[i].ndim, s->index[i].shape));
    TRY(check_indices(call, s, &picked));
    for (uint32_t i = 1; i < s->nindices; i++) {
        if (s->at[i] == s->at[i - 1] + 1) continue;
        move_to_front(s);
        break;
    }
    uint32_t before = s->at[0], after = s->n - before - s->nindices, n = before + picked.n + after;
    DECLINE_IF(n > TH_MAX_RANK);
    it.same_shape = true;
    it.shape.n = n;
    for (uint32_t i = 0; i < n; i++) {
        bool inside = i >= before && i < before + picked.n;
        uint32_t from = i < before ? i : i - picked.n + s->nindices;
        it.shape.at[i] = shape[0][i] = inside ? picked.at[i - before] : s->shape[from];
        stride[0][i] = inside ? 0 : s->stride[from];
    }
    th__tensor source = {.ndim = n, .shape = shape[0], .stride = stride[0]};
    th__iter_tensor(&it, &source);
    for (uint32_t i = 0; i < s->nindices; i++) {
        add_index(&it, &s->index[i], &picked, before, after, shape[i + 1], stride[i + 1]);
        it.same_shape &= memcmp(shape[i + 1], it.shape.at, n * sizeof *it.shape.at) == 0;
    }
    int64_t out[TH_MAX_RANK];
    th__iter_strides(&it, out);
    return th__out_fresh(call, s->x.dtype, s->x.device, n, it.shape.at, out);
}

static th_status getitem(th_call *call) {
    subscript s;
    s.n = s.taken = s.nindices = 0;
    s.skip = 0;
    TRY(th__arg_tensor(call, 0, &s.x));
    const th_node_data *index = th__arg(call, 1);
    if (index->kind == TH_N_TUPLE) {
        uint32_t rest;
        TRY(count_rest(call, index, s.x.ndim, &rest));
        for (uint32_t i = 0; i < index->count; i++) TRY(take(call, &s, th__kid(call, index, i), rest));
    } else {
        DECLINE_IF(index->kind == TH_N_SLICE && s.x.ndim == 0);
        TRY(take(call, &s, call->arg[1], s.x.ndim));
    }
    TRY(take_whole(&s, s.x.ndim - s.taken));
    return s.nindices ? index_copy(call, &s) : th__out_view(call, &s.x, s.n, s.shape, s.stride, s.skip);
}

/* ---- picking along one dimension ---- */

static bool is_index(const th__tensor *index) { return index->dtype == TH_I64; }

/* index must not be larger than x, but for `dim`, and has nothing to pick where that is empty. */
static bool index_fits(const th__tensor *index, const th__tensor *x, uint32_t dim, bool with_dim) {
    uint32_t n = index->ndim ? index->ndim : 1, m = x->ndim ? x->ndim : 1;
    if (n != m || (x->ndim && x->shape[dim] == 0)) return false;
    for (uint32_t i = 0; i < index->ndim; i++) {
        int64_t have = x->ndim ? x->shape[i] : 1;
        if ((i != dim || with_dim) && index->shape[i] > have) return false;
    }
    return true;
}

static th_status gather(th_call *call) {
    th__tensor x, index;
    uint32_t dim;
    bool sparse;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_tensor(call, 2, &index));
    TRY(th__arg_bool(call, 3, false, &sparse));
    DECLINE_IF(sparse || x.device != index.device || !is_index(&index));
    DECLINE_IF(!index_fits(&index, &x, dim, false));
    return th__out_fresh(call, x.dtype, x.device, index.ndim, index.shape, NULL);
}

static th_status index_select(th_call *call) {
    th__tensor x, index;
    uint32_t dim;
    int64_t shape[TH_MAX_RANK];
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_tensor(call, 2, &index));
    DECLINE_IF(x.ndim == 0 || index.ndim > 1 || x.device != index.device || th__numel(x.ndim, x.shape) == 0);
    DECLINE_IF(index.dtype != TH_I64 && index.dtype != TH_I32);
    memcpy(shape, x.shape, x.ndim * sizeof *shape);
    shape[dim] = th__numel(index.ndim, index.shape);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, shape, NULL);
}

/* The result of an operator and of its twin in place. One that shares its memory may overlap what is read. */
static th_status changed(th_call *call, const th__tensor *x) {
    if (!(call->def->effects & TH_OPDEF_INPLACE))
        return th__out_fresh(call, x->dtype, x->device, x->ndim, x->shape, NULL);
    DECLINE_IF(call->trace->values[x->value].alias);
    return th__out_written(call, x);
}

/* The name of a reduction, which is one of `known`, of numbers. */
static th_status check_reduction(const th_call *call, uint32_t i, const char *known, const th__tensor *x) {
    const th_node_data *d = th__arg(call, i);
    DECLINE_IF(d->kind != TH_N_STR || !(th__is_int(x->dtype) || th__is_float(x->dtype)));
    const char *name = th_str_get(call->trace->ctx, d->u.ref);
    size_t size = strlen(name);
    for (const char *at = known; size && (at = strstr(at, name)); at += size)
        if ((at == known || at[-1] == ' ') && (at[size] == ' ' || at[size] == '\0')) return TH_OK;
    return TH_DECLINED;
}

/* scatter with a tensor or a number; scatter_add. */
static th_status scatter(th_call *call) {
    th__tensor x, index, source;
    uint32_t dim;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_tensor(call, 2, &index));
    DECLINE_IF(x.device != index.device || !is_index(&index) || !index_fits(&index, &x, dim, false));
    bool by_name = th__arg(call, 3)->kind == TH_N_ABSENT;
    uint32_t at = by_name ? 4 : 3;
    DECLINE_IF(!by_name && call->nparams > 4 && th__arg(call, 4)->kind != TH_N_ABSENT);
    const th_node_data *value = th__arg(call, at);
    if (th__is_number(value) && call->nparams > 4) {
        DECLINE_IF(!th__fits(value, x.dtype));
    } else {
        TRY(th__arg_tensor(call, at, &source));
        DECLINE_IF(by_name || source.device != x.device || source.dtype != x.dtype);
        DECLINE_IF(!index_fits(&index, &source, dim, true));
    }
    return changed(call, &x);
}

/* input, dim, index, src, reduce, *, include_self */
static th_status scatter_reduce(th_call *call) {
    th__tensor x, index, source;
    uint32_t dim;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dim(call, 1, x.ndim, &dim));
    TRY(th__arg_tensor(call, 2, &index));
    TRY(th__arg_tensor(call, 3, &source));
    TRY(check_reduction(call, 4, "sum prod mean amax amin", &x));
    DECLINE_IF(x.device != index.device || !is_index(&index) || !index_fits(&index, &x, dim, false));
    DECLINE_IF(source.device != x.device || source.dtype != x.dtype || !index_fits(&index, &source, dim, true));
    return changed(call, &x);
}

/* ---- rows by their numbers: input, dim, index, source ---- */

static th_status row_numbers(const th_call *call, th__tensor *x, uint32_t *dim, th__tensor *index) {
    TRY(th__arg_tensor(call, 0, x));
    TRY(th__arg_dim(call, 1, x->ndim, dim));
    TRY(th__arg_tensor(call, 2, index));
    DECLINE_IF(x->ndim == 0 || index->ndim > 1 || index->device != x->device);
    return is_index(index) ? TH_OK : TH_DECLINED;
}

/* A source that has one row for each number, else the shape of x. */
static th_status rows(const th_call *call, th__tensor *x) {
    th__tensor index, source;
    uint32_t dim;
    TRY(row_numbers(call, x, &dim, &index));
    TRY(th__arg_tensor(call, 3, &source));
    DECLINE_IF(source.ndim != x->ndim || source.dtype != x->dtype || source.device != x->device);
    DECLINE_IF(source.shape[dim] != th__numel(index.ndim, index.shape));
    for (uint32_t i = 0; i < x->ndim; i++) DECLINE_IF(i != dim && source.shape[i] != x->shape[i]);
    return TH_OK;
}

static th_status index_add(th_call *call) {
    th__tensor x;
    TRY(rows(call, &x));
    const th_node_data *alpha = th__arg(call, 4);
    DECLINE_IF(alpha->kind != TH_N_ABSENT && alpha->kind != TH_N_INT && alpha->kind != TH_N_FLOAT);
    DECLINE_IF(alpha->kind != TH_N_ABSENT && !th__fits(alpha, x.dtype));
    return changed(call, &x);
}

static th_status index_copy_rows(th_call *call) {
    th__tensor x;
    TRY(rows(call, &x));
    return changed(call, &x);
}

static th_status index_reduce(th_call *call) {
    th__tensor x;
    TRY(rows(call, &x));
    TRY(check_reduction(call, 4, "prod mean amax amin", &x));
    return changed(call, &x);
}

/* A number, or a tensor without dimensions, whose number the kernel reads. */
static th_status index_fill(th_call *call) {
    th__tensor x, index, value;
    uint32_t dim;
    TRY(row_numbers(call, &x, &dim, &index));
    const th_node_data *number = th__arg(call, 3);
    if (th__is_number(number)) {
        DECLINE_IF(!th__fits(number, x.dtype));
    } else {
        TRY(th__arg_tensor(call, 3, &value));
        DECLINE_IF(value.ndim != 0 || value.dtype != x.dtype || value.device != x.device);
    }
    return call->def->effects & TH_OPDEF_INPLACE ? changed(call, &x) : th__out_like(call, &x, x.dtype, x.device);
}

/* ---- masks ---- */

static th_status masked_fill(th_call *call) {
    th__tensor x, mask, value;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 1, &mask));
    DECLINE_IF(mask.dtype != TH_BOOL || mask.device != x.device);
    const th_node_data *number = th__arg(call, 2);
    if (th__is_number(number)) {
        DECLINE_IF(!th__fits(number, x.dtype));
    } else {
        TRY(th__arg_tensor(call, 2, &value));
        DECLINE_IF(value.ndim != 0 || value.device != x.device || !th__can_cast(value.dtype, x.dtype));
    }
    th__dims shape = {.n = x.ndim};
    memcpy(shape.at, x.shape, x.ndim * sizeof *x.shape);
    TRY(th__broadcast(&shape, mask.ndim, mask.shape));
    if (!(call->def->effects & TH_OPDEF_INPLACE)) {
        return th__out_fresh(call, x.dtype, x.device, shape.n, shape.at, NULL);
    }
    DECLINE_IF(shape.n != x.ndim || (x.ndim && memcmp(shape.at, x.shape, x.ndim * sizeof *x.shape) != 0));
    return th__out_written(call, &x);
}

static th_status choose(th_call *call, uint32_t condition, uint32_t input) {
    th__tensor where;
    th__iter it = {0}, values = {0};
    TRY(th__arg_tensor(call, condition, &where));
    DECLINE_IF(where.dtype != TH_BOOL);
    th__iter_tensor(&it, &where);
    TRY(th__iter_arg(&it, call, input));
    TRY(th__iter_arg(&it, call, 2));
    TRY(th__iter_shape(&it, call));
    values.n = 2;
    values.in[0] = it.in[1];
    values.in[1] = it.in[2];
    th_dtype dtype = th__iter_result_type(&values, call);
    for (uint32_t i = 1; i <= 2; i++) {
        const th_node_data *number = th__arg(call, i == 1 ? input : 2);
        DECLINE_IF(it.in[i].number && !th__fits(number, dtype));
    }
    it.in[0].x.dtype = dtype; /* the condition is not converted */
    th__iter_convert(&it, call, dtype);
    return th__iter_out(&it, call, dtype);
}

static th_status where(th_call *call) { return choose(call, 0, 1); }
static th_status tensor_where(th_call *call) { return choose(call, 1, 0); }

/* ---- embedding ---- */

static th_status rows_of(th_call *call, const th__tensor *weight, const th__tensor *index) {
    int64_t shape[TH_MAX_RANK];
    DECLINE_IF(weight->ndim != 2 || weight->device != index->device || index->ndim == TH_MAX_RANK);
    DECLINE_IF(th__numel(2, weight->shape) == 0);
    DECLINE_IF(index->dtype != TH_I64 && index->dtype != TH_I32);
    if (index->ndim) memcpy(shape, index->shape, index->ndim * sizeof *shape);
    shape[index->ndim] = weight->shape[1];
    return th__out_fresh(call, weight->dtype, weight->device, index->ndim + 1, shape, NULL);
}

static th_status functional_embedding(th_call *call) {
    th__tensor index, weight;
    TRY(th__arg_tensor(call, 0, &index));
    TRY(th__arg_tensor(call, 1, &weight));
    DECLINE_IF(weight.ndim != 2 || th__has(call, 3));
    if (th__has(call, 2)) {
        int64_t padding, rows = weight.shape[0];
        TRY(th__arg_int(call, 2, 0, &padding));
        DECLINE_IF(padding >= rows || padding < -rows);
    }
    return rows_of(call, &weight, &index);
}

static th_status embedding(th_call *call) {
    th__tensor index, weight;
    TRY(th__arg_tensor(call, 0, &weight));
    TRY(th__arg_tensor(call, 1, &index));
    return rows_of(call, &weight, &index);
}

/* ---- operators ---- */

const th_opdef th__ops_index[] = {
    {.name = "getitem",
     .params = "input, index",
     .names = "torch.Tensor.__getitem__",
     .effects = TH_OPDEF_VIEW | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_VIEW,
     .meta = getitem,
     .grad = th__grad_getitem},
    {.name = "gather",
     .params = "input, dim, index, *, sparse_grad=False",
     .names = "torch.gather torch.Tensor.gather",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = gather,
     .grad = th__grad_gather},
    {.name = "index_select",
     .params = "input, dim, index",
     .names = "torch.index_select torch.Tensor.index_select",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_select,
     .grad = th__grad_index_select},
    {.name = "scatter",
     .params = "input, dim, index, src=None, *, value=None",
     .names = "torch.scatter torch.Tensor.scatter",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = scatter,
     .grad = th__grad_scatter},
    {.name = "scatter_",
     .params = "input, dim, index, src=None, *, value=None",
     .names = "torch.Tensor.scatter_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = scatter,
     .functional = "torch.scatter"},
    {.name = "scatter_add",
     .params = "input, dim, index, src",
     .names = "torch.scatter_add torch.Tensor.scatter_add",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = scatter,
     .grad = th__grad_scatter_add},
    {.name = "scatter_add_",
     .params = "input, dim, index, src",
     .names = "torch.Tensor.scatter_add_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = scatter,
     .functional = "torch.scatter_add"},
    {.name = "scatter_reduce",
     .params = "input, dim, index, src, reduce, *, include_self=True",
     .names = "torch.scatter_reduce torch.Tensor.scatter_reduce",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = scatter_reduce},
    {.name = "scatter_reduce_",
     .params = "input, dim, index, src, reduce, *, include_self=True",
     .names = "torch.Tensor.scatter_reduce_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = scatter_reduce,
     .functional = "torch.scatter_reduce"},
    {.name = "index_add",
     .params = "input, dim, index, source, *, alpha=1",
     .names = "torch.index_add torch.Tensor.index_add torch.ops.aten.index_add.default",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_add,
     .grad = th__grad_index_add},
    {.name = "index_add_",
     .params = "input, dim, index, source, *, alpha=1",
     .names = "torch.Tensor.index_add_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_add,
     .functional = "torch.index_add"},
    {.name = "index_copy",
     .params = "input, dim, index, source",
     .names = "torch.index_copy torch.Tensor.index_copy",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_copy_rows,
     .grad = th__grad_index_copy},
    {.name = "index_copy_",
     .params = "input, dim, index, source",
     .names = "torch.Tensor.index_copy_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_copy_rows,
     .functional = "torch.index_copy"},
    {.name = "index_reduce",
     .params = "input, dim, index, source, reduce, *, include_self=True",
     .names = "torch.index_reduce torch.Tensor.index_reduce",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_reduce},
    {.name = "index_reduce_",
     .params = "input, dim, index, source, reduce, *, include_self=True",
     .names = "torch.Tensor.index_reduce_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_reduce,
     .functional = "torch.index_reduce"},
    {.name = "index_fill",
     .params = "input, dim, index, value",
     .names = "torch.index_fill torch.Tensor.index_fill",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_fill,
     .grad = th__grad_index_fill},
    {.name = "index_fill_",
     .params = "input, dim, index, value",
     .names = "torch.Tensor.index_fill_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES | TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = index_fill,
     .functional = "torch.index_fill"},
    {.name = "masked_fill",
     .params = "input, mask, value",
     .names = "torch.masked_fill torch.Tensor.masked_fill",
     .fusion = TH_FUSE_POINTWISE,
     .meta = masked_fill,
     .grad = th__grad_masked_fill},
    {.name = "masked_fill_",
     .params = "input, mask, value",
     .names = "torch.Tensor.masked_fill_",
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES,
     .fusion = TH_FUSE_POINTWISE,
     .meta = masked_fill,
     .functional = "torch.masked_fill"},
    {.name = "where",
     .params = "condition, input, other",
     .names = "torch.where",
     .fusion = TH_FUSE_POINTWISE,
     .meta = where,
     .grad = th__grad_where},
    {.name = "Tensor.where",
     .params = "input, condition, other",
     .names = "torch.Tensor.where",
     .fusion = TH_FUSE_POINTWISE,
     .meta = tensor_where,
     .grad = th__grad_tensor_where},
    {.name = "functional.embedding",
     .params = "input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False",
     .names = "torch.nn.functional.embedding",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = functional_embedding,
     .grad = th__grad_functional_embedding},
    {.name = "embedding",
     .params = "weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False",
     .names = "torch.embedding",
     .effects = TH_OPDEF_RAISES,
     .fusion = TH_FUSE_GATHER,
     .meta = embedding,
     .grad = th__grad_embedding},
};
const size_t th__ops_index_count = sizeof th__ops_index / sizeof *th__ops_index;
