/* The decisions of ATen's TensorIterator: see iterator.h. */
#include "ops/iterator.h"

#include <string.h>

void th__iter_tensor(th__iter *it, const th__tensor *x) {
    it->in[it->n].x = *x;
    it->in[it->n++].number = false;
}

th_status th__iter_arg(th__iter *it, const th_call *call, uint32_t i) {
    const th_node_data *d = th__arg(call, i);
    th__tensor x = {0};
    if (!th__is_number(d)) {
        TRY(th__arg_tensor(call, i, &x));
        th__iter_tensor(it, &x);
        return TH_OK;
    }
    x.dtype = d->kind == TH_N_BOOL ? TH_BOOL : d->kind == TH_N_INT ? TH_I64 : TH_F64;
    x.contiguous = true;
    it->in[it->n].x = x;
    it->in[it->n++].number = true;
    return TH_OK;
}

th_status th__iter_args(th__iter *it, const th_call *call, uint32_t first, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) TRY(th__iter_arg(it, call, first + i));
    return th__iter_shape(it, call);
}

static bool shape_is(const th__tensor *x, const th__dims *shape) {
    return x->ndim == shape->n && (x->ndim == 0 || memcmp(x->shape, shape->at, x->ndim * sizeof *x->shape) == 0);
}

th_status th__iter_shape(th__iter *it, const th_call *call) {
    uint32_t cpu_scalars = 0;
    th_dev scalar_device = 0;
    it->shape.n = 0;
    it->device = 0;
    for (uint32_t i = 0; i < it->n; i++) {
        const th__tensor *x = &it->in[i].x;
        if (it->in[i].number) continue;
        TRY(th__broadcast(&it->shape, x->ndim, x->shape));
        if (x->ndim == 0 && th__is_cpu(call, x)) {
            cpu_scalars++;
            scalar_device = x->device;
            continue;
        }
        DECLINE_IF(it->device && it->device != x->device);
        it->device = x->device;
    }
    if (!it->device) it->device = scalar_device;
    DECLINE_IF(!it->device);
    if (cpu_scalars && it->device != scalar_device) DECLINE_IF(cpu_scalars > 1 || it->n > 2);
    it->same_shape = true;
    for (uint32_t i = 0; i < it->n; i++) it->same_shape &= shape_is(&it->in[i].x, &it->shape);
    return TH_OK;
}

/* ---- dtype ---- */

static th_dtype combine(th_dtype higher, th_dtype lower) {
    if (th__is_float(higher)) return higher;
    if (higher == TH_BOOL || higher == TH_DTYPE_NONE || th__is_float(lower)) return th__promote(higher, lower);
    return higher;
}

th_dtype th__iter_result_type(const th__iter *it, const th_call *call) {
    th_dtype with_dims = TH_DTYPE_NONE, without = TH_DTYPE_NONE, number = TH_DTYPE_NONE;
    for (uint32_t i = 0; i < it->n; i++) {
        const th__operand *o = &it->in[i];
        if (o->number)
            number = th__promote(number, o->x.dtype == TH_F64 ? call->default_dtype : o->x.dtype);
        else if (o->x.ndim)
            with_dims = th__promote(with_dims, o->x.dtype);
        else
            without = th__promote(without, o->x.dtype);
    }
    return combine(with_dims, combine(without, number));
}

void th__iter_convert(th__iter *it, const th_call *call, th_dtype dtype) {
    if (!th__is_device(call, it->device, "cpu")) return;
    for (uint32_t i = 0; i < it->n; i++) {
        th__operand *o = &it->in[i];
        if (o->number || o->x.dtype == dtype || th__is_dense(o->x.ndim, o->x.shape, o->x.stride)) continue;
        th__dense_like(o->x.ndim, o->x.shape, o->x.stride, o->dense);
        o->x.stride = o->dense;
        o->x.contiguous = false;
    }
}

th_status th__iter_promote(th__iter *it, const th_call *call, bool to_float) {
    it->common = th__iter_result_type(it, call);
    if (to_float && !th__is_float(it->common)) it->common = call->default_dtype;
    DECLINE_IF(!th__is_plain(it->common));
    th__iter_convert(it, call, it->common);
    return TH_OK;
}

/* ---- strides ---- */

static bool all(const th__iter *it, bool (*holds)(const th__tensor *)) {
    for (uint32_t i = 0; i < it->n; i++) {
        if (!holds(&it->in[i].x)) return false;
    }
    return true;
}

static bool same_dense_strides(const th__iter *it) {
    const th__tensor *first = &it->in[0].x;
    for (uint32_t i = 1; i < it->n; i++) {
        if (memcmp(it->in[i].x.stride, first->stride, first->ndim * sizeof *first->stride) != 0) return false;
    }
    return th__is_dense(first->ndim, first->shape, first->stride);
}

/* Strides for operands of one shape; false when they need the general way. */
static bool fast_strides(const th__iter *it, int64_t *stride) {
    if (all(it, th__is_contiguous))
        th__row_major(it->shape.n, it->shape.at, stride);
    else if (all(it, th__is_channels_last))
        th__channels_last(4, it->shape.at, stride);
    else if (same_dense_strides(it))
        memcpy(stride, it->in[0].x.stride, it->shape.n * sizeof *stride);
    else
        return false;
    return true;
}

/* The operand's stride along a dimension of the output: 0 where it is broadcast. */
static int64_t stride_along(const th__iter *it, const th__tensor *x, uint32_t dim) {
    uint32_t missing = it->shape.n - x->ndim;
    if (dim < missing || (x->shape[dim - missing] == 1 && it->shape.at[dim] != 1)) return 0;
    return x->stride[dim - missing];
}

/* Above 0 when dimension a belongs outside of b, below 0 when inside, 0 when no operand tells. */
static int compare_dims(const th__iter *it, uint32_t a, uint32_t b) {
    for (uint32_t i = 0; i < it->n; i++) {
        int64_t sa = stride_along(it, &it->in[i].x, a), sb = stride_along(it, &it->in[i].x, b);
        if (sa == 0 || sb == 0) continue;
        if (sa != sb) return sa < sb ? -1 : 1;
        if (it->shape.at[a] > it->shape.at[b]) return 1;
    }
    return 0;
}

void th__iter_strides(const th__iter *it, int64_t *stride) {
    uint32_t n = it->shape.n, order[TH_MAX_RANK]; /* from the innermost */
    if (it->same_shape && fast_strides(it, stride)) return;
    for (uint32_t i = 0; i < n; i++) order[i] = n - 1 - i;
    for (uint32_t i = 1; i < n; i++) {
        uint32_t at = i;
        for (uint32_t j = i; j-- > 0;) {
            int c = compare_dims(it, order[j], order[at]);
            if (c < 0) break;
            if (c == 0) continue;
            uint32_t swap = order[j];
            order[j] = order[at];
            order[at] = swap;
            at = j;
        }
    }
    bool row_major = true;
    for (uint32_t i = 0; i < n; i++) row_major &= order[i] == n - 1 - i;
    if (row_major) {
        th__row_major(n, it->shape.at, stride);
        return;
    }
    uint64_t step = 1;
    for (uint32_t i = 0; i < n; i++) { /* a size of 0 makes the strides outside of it 0 */
        stride[order[i]] = (int64_t)step;
        step *= (uint64_t)it->shape.at[order[i]];
    }
}

/* ---- result ---- */

/* Is there an operand that shares storage with the written one, other than that tensor itself? */
static bool overlaps(const th__iter *it, const th_call *call) {
    const th_value *values = call->trace->values, *self = &values[it->in[0].x.value];
    for (uint32_t i = 1; i < it->n; i++) {
        const th_value *other = &values[it->in[i].x.value];
        if (it->in[i].number || !self->alias || other->alias != self->alias) continue;
        if (other->type != self->type || other->offset != self->offset) return true;
    }
    return false;
}

th_status th__iter_out(th__iter *it, th_call *call, th_dtype dtype) {
    int64_t stride[TH_MAX_RANK];
    if (!(call->def->effects & TH_OPDEF_INPLACE)) {
        th__iter_strides(it, stride);
        return th__out_fresh(call, dtype, it->device, it->shape.n, it->shape.at, stride);
    }
    th__tensor self;
    TRY(th__arg_tensor(call, 0, &self));
    DECLINE_IF(!shape_is(&self, &it->shape) || self.device != it->device);
    DECLINE_IF(!th__can_cast(dtype, self.dtype) || overlaps(it, call));
    for (uint32_t i = 0; i < it->n; i++) DECLINE_IF(call->grad_mode && it->in[i].x.grad);
    return th__out_written(call, &self);
}
