/* Shared parts of meta rules: see meta.h. The arithmetic follows ATen's to the letter where results depend on it. */
#include "ops/meta.h"

#include <string.h>

/* ---- arguments ---- */

bool th__is_device(const th_call *call, th_dev device, const char *type) {
    return strcmp(th_device_type(call->trace->ctx, device), type) == 0;
}

th_status th__node_tensor(const th_call *call, th_node node, th__tensor *x) {
    const th_node_data *d = th__node(call, node);
    DECLINE_IF(d->kind != TH_N_VALUE);
    th_typeref ref = call->trace->values[d->u.ref].type;
    const th_type *type = th_type_get(call->trace->ctx, ref);
    DECLINE_IF(type->kind != TH_TYPE_TENSOR || type->ndim > TH_MAX_RANK || !th__is_plain(type->dtype));
    DECLINE_IF(!th__is_device(call, type->device, "cpu") && !th__is_device(call, type->device, "cuda"));
    *x = (th__tensor){.value = d->u.ref,
                      .ref = ref,
                      .dtype = type->dtype,
                      .device = type->device,
                      .ndim = type->ndim,
                      .shape = type->shape,
                      .stride = type->stride,
                      .contiguous = type->contiguous,
                      .grad = type->flags & TH_TYPE_REQUIRES_GRAD};
    return TH_OK;
}

th_status th__node_ints(const th_call *call, th_node node, th__dims *out) {
    const th_node_data *d = th__node(call, node);
    DECLINE_IF(!th__is_sequence(d) || d->count > TH_MAX_RANK);
    out->n = d->count;
    for (uint32_t i = 0; i < d->count; i++) {
        const th_node_data *kid = th__node(call, th__kid(call, d, i));
        DECLINE_IF(kid->kind != TH_N_INT);
        out->at[i] = kid->u.i;
    }
    return TH_OK;
}

th_status th__arg_tensor(const th_call *call, uint32_t i, th__tensor *x) {
    return th__node_tensor(call, call->arg[i], x);
}

th_status th__arg_bool(const th_call *call, uint32_t i, bool fallback, bool *out) {
    const th_node_data *d = th__arg(call, i);
    *out = d->kind == TH_N_BOOL ? d->u.i != 0 : fallback;
    return d->kind == TH_N_BOOL || d->kind == TH_N_ABSENT ? TH_OK : TH_DECLINED;
}

th_status th__arg_int(const th_call *call, uint32_t i, int64_t fallback, int64_t *out) {
    const th_node_data *d = th__arg(call, i);
    *out = d->kind == TH_N_INT ? d->u.i : fallback;
    return d->kind == TH_N_INT || d->kind == TH_N_ABSENT ? TH_OK : TH_DECLINED;
}

th_status th__arg_dtype(const th_call *call, uint32_t i, th_dtype fallback, th_dtype *out) {
    const th_node_data *d = th__arg(call, i);
    *out = d->kind == TH_N_DTYPE ? (th_dtype)d->u.ref : fallback;
    DECLINE_IF(d->kind > TH_N_NONE && d->kind != TH_N_DTYPE);
    return th__is_plain(*out) ? TH_OK : TH_DECLINED;
}

th_status th__wrap(int64_t dim, uint32_t ndim, uint32_t *out) {
    int64_t rank = ndim ? ndim : 1;
    DECLINE_IF(dim < -rank || dim >= rank);
    *out = (uint32_t)(dim < 0 ? dim + rank : dim);
    return TH_OK;
}

th_status th__arg_dim(const th_call *call, uint32_t i, uint32_t ndim, uint32_t *out) {
    const th_node_data *d = th__arg(call, i);
    return d->kind == TH_N_INT ? th__wrap(d->u.i, ndim, out) : TH_DECLINED;
}

th_status th__arg_ints(const th_call *call, uint32_t i, th__dims *out) {
    const th_node_data *d = th__arg(call, i);
    if (d->kind != TH_N_INT) return th__node_ints(call, call->arg[i], out);
    out->n = 1;
    out->at[0] = d->u.i;
    return TH_OK;
}

th_status th__arg_size(const th_call *call, uint32_t i, th__dims *out) {
    const th_node_data *d = th__arg(call, i);
    if (d->kind == TH_N_TUPLE && d->count == 1 && th__is_sequence(th__node(call, th__kid(call, d, 0)))) {
        return th__node_ints(call, th__kid(call, d, 0), out);
    }
    return th__node_ints(call, call->arg[i], out);
}

th_status th__arg_tensors(const th_call *call, uint32_t i, uint32_t cap, th__tensor *xs, uint32_t *n) {
    const th_node_data *d = th__arg(call, i);
    DECLINE_IF(!th__is_sequence(d) || d->count > cap || d->count == 0);
    for (*n = 0; *n < d->count; ++*n) TRY(th__node_tensor(call, th__kid(call, d, *n), &xs[*n]));
    return TH_OK;
}

bool th__arg_is_symbol(const th_call *call, uint32_t i, const char *dotted) {
    const th_node_data *d = th__arg(call, i);
    return d->kind == TH_N_SYMBOL && strcmp(th_str_get(call->trace->ctx, d->u.ref), dotted) == 0;
}

th_status th__dim_set(const th__dims *dims, uint32_t ndim, uint32_t *set) {
    *set = 0;
    for (uint32_t i = 0; i < dims->n; i++) {
        uint32_t dim;
        TRY(th__wrap(dims->at[i], ndim, &dim));
        DECLINE_IF(*set >> dim & 1);
        *set |= 1u << dim;
    }
    return TH_OK;
}

/* ---- results ---- */

static th_status add_out(th_call *call, th_out out) {
    DECLINE_IF(!out.type || call->nouts == TH_MAX_OUTS);
    call->outs[call->nouts++] = out;
    return TH_OK;
}

th_status th__out_fresh(th_call *call, th_dtype dtype, th_dev device, uint32_t ndim, const int64_t *shape,
                        const int64_t *stride) {
    DECLINE_IF(!device);
    for (uint32_t i = 0; i < ndim; i++) DECLINE_IF(shape[i] < 0);
    return add_out(call, (th_out){.type = th_type_tensor(call->trace->ctx, dtype, device, ndim, shape, stride, 0)});
}

th_status th__out_like(th_call *call, const th__tensor *x, th_dtype dtype, th_dev device) {
    int64_t stride[TH_MAX_RANK];
    if (th__is_dense(x->ndim, x->shape, x->stride))
        return th__out_fresh(call, dtype, device, x->ndim, x->shape, x->stride);
    th__dense_like(x->ndim, x->shape, x->stride, stride);
    return th__out_fresh(call, dtype, device, x->ndim, x->shape, stride);
}

th_status th__follow_format(const th_call *call, const th__tensor *x, bool *channels_last) {
    *channels_last = th__suggests_channels_last(x);
    DECLINE_IF(!th__is_cpu(call, x) && !x->contiguous);
    return *channels_last && x->ndim != 4 ? TH_DECLINED : TH_OK;
}

th_status th__out_format(th_call *call, const th__tensor *x, const int64_t *shape, bool channels_last) {
    int64_t stride[4];
    if (!channels_last) return th__out_fresh(call, x->dtype, x->device, x->ndim, shape, NULL);
    th__channels_last(4, shape, stride);
    return th__out_fresh(call, x->dtype, x->device, 4, shape, stride);
}

th_status th__out_view(th_call *call, const th__tensor *x, uint32_t ndim, const int64_t *shape, const int64_t *stride,
                       int64_t skip) {
    DECLINE_IF(ndim > TH_MAX_RANK);
    th_typeref type = th_type_tensor(call->trace->ctx, x->dtype, x->device, ndim, shape, stride, 0);
    return add_out(call,
                   (th_out){.type = type, .alias_of = x->value, .offset = call->trace->values[x->value].offset + skip});
}

th_status th__out_same(th_call *call, const th__tensor *x) {
    return add_out(
        call,
        (th_out){.type = x->ref, .alias_of = x->value, .offset = call->trace->values[x->value].offset, .same = true});
}

th_status th__out_written(th_call *call, const th__tensor *x) {
    DECLINE_IF(call->grad_mode && x->grad);
    for (uint32_t i = 0; i < x->ndim; i++) DECLINE_IF(x->stride[i] == 0 && x->shape[i] > 1);
    return add_out(call,
                   (th_out){.type = x->ref, .alias_of = x->value, .offset = call->trace->values[x->value].offset});
}

/* ---- dtypes ---- */

th_dtype th__promote(th_dtype a, th_dtype b) {
    if (a == b || b == TH_DTYPE_NONE) return a;
    if (a == TH_DTYPE_NONE) return b;
    if (a == TH_BOOL) return b;
    if (b == TH_BOOL) return a;
    if (th__is_float(a) != th__is_float(b)) return th__is_float(a) ? a : b;
    if (th__is_float(a)) return (a > b ? a : b) == TH_BF16 ? TH_F32 : (a > b ? a : b); /* f16 with bf16: neither */
    if (a == TH_U8 || b == TH_U8) {
        th_dtype other = a == TH_U8 ? b : a;
        return other == TH_I8 ? TH_I16 : other;
    }
    return a > b ? a : b;
}

bool th__can_cast(th_dtype from, th_dtype to) {
    if (th__is_float(from)) return th__is_float(to);
    return from == TH_BOOL || to != TH_BOOL;
}

bool th__fits(const th_node_data *number, th_dtype dtype) {
    static const double highest[] = {[TH_F16] = 65504., [TH_BF16] = 0x1.fep127, [TH_F32] = 0x1.fffffep127};
    if (dtype == TH_BOOL || number->kind == TH_N_BOOL) return true;
    if (th__is_float(dtype)) {
        double v = number->kind == TH_N_FLOAT ? number->u.f : (double)number->u.i;
        if (dtype == TH_F64 || v != v || v == __builtin_inf() || v == -__builtin_inf()) return true;
        return v >= -highest[dtype] && v <= highest[dtype];
    }
    if (number->kind != TH_N_INT) return false;
    uint32_t bits = 8u * th_dtype_get(dtype)->bytes;
    if (bits == 64) return true;
    int64_t low = dtype == TH_U8 ? 0 : -(INT64_C(1) << (bits - 1));
    return number->u.i >= low && number->u.i < low + (INT64_C(1) << bits);
}

/* ---- shapes and strides ----
 *
 * Products wrap: a shape too large to exist is refused when its type is made.
 */

int64_t th__numel(uint32_t ndim, const int64_t *shape) {
    int64_t count = 1;
    for (uint32_t i = 0; i < ndim; i++) {
        if (shape[i] == 0) return 0;
        count *= shape[i];
    }
    return count;
}

/* Are strides those of a tensor without gaps whose dimensions are, from the innermost, `order`? */
static bool packed(const int64_t *shape, const int64_t *stride, uint32_t n, const uint8_t *order) {
    uint64_t step = 1;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t d = order[i];
        if (shape[d] == 1) continue;
        if (stride[d] != (int64_t)step) return false;
        step *= (uint64_t)shape[d];
    }
    return true;
}

bool th__is_contiguous(const th__tensor *x) {
    static const uint8_t last_first[TH_MAX_RANK] = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
    if (x->contiguous || th__numel(x->ndim, x->shape) == 0) return true;
    return packed(x->shape, x->stride, x->ndim, last_first + TH_MAX_RANK - x->ndim);
}

static const uint8_t order_2d[] = {1, 3, 2, 0}, order_3d[] = {1, 4, 3, 2, 0};

bool th__is_channels_last(const th__tensor *x) { return x->ndim == 4 && packed(x->shape, x->stride, 4, order_2d); }

bool th__suggests_channels_last(const th__tensor *x) {
    if (x->contiguous || (x->ndim != 4 && x->ndim != 5) || x->stride[1] == 0) return false;
    const uint8_t *order = x->ndim == 4 ? order_2d : order_3d;
    int64_t least = 0;
    for (uint32_t i = 0; i < x->ndim; i++) {
        uint32_t d = order[i];
        if (x->shape[d] == 0 || x->stride[d] < least || (d == 0 && least == x->stride[1])) return false;
        least = x->stride[d];
        if (x->shape[d] > 1) least = (int64_t)((uint64_t)least * (uint64_t)x->shape[d]);
    }
    return true;
}

bool th__is_dense(uint32_t ndim, const int64_t *shape, const int64_t *stride) {
    uint32_t order[TH_MAX_RANK], n = 0;
    if (ndim == 1) return shape[0] < 2 || stride[0] == 1;
    for (uint32_t i = 0; i < ndim; i++) { /* by stride; sizes 0 and 1 fit anywhere, a size 0 ends the search */
        if (shape[i] == 0) return true;
        if (shape[i] == 1) continue;
        uint32_t at = n++;
        for (; at > 0 && stride[order[at - 1]] > stride[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    uint64_t step = 1;
    for (uint32_t i = 0; i < n; i++) {
        if (stride[order[i]] != (int64_t)step) return false;
        step *= (uint64_t)shape[order[i]];
    }
    return true;
}

void th__row_major(uint32_t ndim, const int64_t *shape, int64_t *stride) {
    uint64_t step = 1;
    for (uint32_t i = ndim; i-- > 0;) {
        stride[i] = (int64_t)step;
        if (shape[i] > 1) step *= (uint64_t)shape[i];
    }
}

void th__channels_last(uint32_t ndim, const int64_t *shape, int64_t *stride) {
    const uint8_t *order = ndim == 4 ? order_2d : order_3d;
    uint64_t step = 1;
    for (uint32_t i = 0; i < ndim; i++) {
        stride[order[i]] = (int64_t)step;
        step *= (uint64_t)shape[order[i]];
    }
}

/* Above 0 when dimension a belongs outside of b, below 0 when inside, 0 when their strides do not tell. */
static int compare_dims(const int64_t *shape, const int64_t *stride, uint32_t a, uint32_t b) {
    if (stride[a] == 0 || stride[b] == 0) return 0;
    if (stride[a] != stride[b]) return stride[a] < stride[b] ? -1 : 1;
    return shape[a] > shape[b];
}

void th__dense_like(uint32_t ndim, const int64_t *shape, const int64_t *stride, int64_t *out) {
    uint32_t order[TH_MAX_RANK]; /* from the innermost */
    for (uint32_t i = 0; i < ndim; i++) order[i] = ndim - 1 - i;
    for (uint32_t i = 1; i < ndim; i++) { /* insertion sort that steps over pairs that do not tell, as ATen's */
        uint32_t at = i;
        for (uint32_t j = i; j-- > 0;) {
            int c = compare_dims(shape, stride, order[j], order[at]);
            if (c < 0) break;
            if (c == 0) continue;
            uint32_t swap = order[j];
            order[j] = order[at];
            order[at] = swap;
            at = j;
        }
    }
    uint64_t step = 1;
    for (uint32_t i = 0; i < ndim; i++) {
        out[order[i]] = (int64_t)step;
        if (shape[order[i]] > 1) step *= (uint64_t)shape[order[i]];
    }
}

th_status th__broadcast(th__dims *shape, uint32_t ndim, const int64_t *other) {
    DECLINE_IF(ndim > TH_MAX_RANK);
    if (ndim > shape->n) {
        uint32_t more = ndim - shape->n;
        memmove(shape->at + more, shape->at, shape->n * sizeof *shape->at);
        for (uint32_t i = 0; i < more; i++) shape->at[i] = 1;
        shape->n = ndim;
    }
    for (uint32_t i = 0; i < ndim; i++) {
        int64_t *mine = &shape->at[shape->n - ndim + i];
        DECLINE_IF(*mine != other[i] && *mine != 1 && other[i] != 1);
        if (*mine == 1) *mine = other[i];
    }
    return TH_OK;
}

th_status th__infer_size(th__dims *shape, int64_t numel) {
    int64_t known = 1;
    uint32_t unknown = TH_MAX_RANK;
    for (uint32_t i = 0; i < shape->n; i++) {
        if (shape->at[i] == -1) {
            DECLINE_IF(unknown != TH_MAX_RANK);
            unknown = i;
            continue;
        }
        DECLINE_IF(shape->at[i] < 0 || __builtin_mul_overflow(known, shape->at[i], &known));
    }
    if (unknown == TH_MAX_RANK) return known == numel ? TH_OK : TH_DECLINED;
    DECLINE_IF(known == 0 || numel % known != 0);
    shape->at[unknown] = numel / known;
    return TH_OK;
}

/* Walks both shapes from the last dimension. A chunk is a run of old dimensions that lie in memory without gaps; the
 * new dimensions have to fill each chunk exactly. */
static bool view_chunks(uint32_t ndim, const int64_t *shape, const int64_t *stride, const th__dims *to, int64_t *out) {
    uint32_t left = to->n;
    int64_t base = stride[ndim - 1], old_count = 1, new_count = 1;
    for (uint32_t d = ndim; d-- > 0;) {
        old_count *= shape[d];
        if (d > 0 && (shape[d - 1] == 1 || stride[d - 1] == old_count * base)) continue;
        while (left > 0 && (new_count < old_count || to->at[left - 1] == 1)) {
            left--;
            out[left] = new_count * base;
            new_count *= to->at[left];
        }
        if (new_count != old_count) return false;
        if (d > 0) base = stride[d - 1];
        old_count = new_count = 1;
    }
    return left == 0;
}

bool th__view_strides(uint32_t ndim, const int64_t *shape, const int64_t *stride, const th__dims *to, int64_t *out) {
    if (ndim == 0) {
        for (uint32_t i = 0; i < to->n; i++) out[i] = 1;
        return true;
    }
    if (th__numel(ndim, shape) != 0) return view_chunks(ndim, shape, stride, to, out);
    if (ndim == to->n && memcmp(shape, to->at, ndim * sizeof *shape) == 0)
        memcpy(out, stride, ndim * sizeof *stride);
    else
        th__row_major(to->n, to->at, out);
    return true;
}
