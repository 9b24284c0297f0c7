/* What ATen's TensorIterator decides before a kernel runs: broadcast shape, common dtype, device, and the strides of
 * the output. Nearly every pointwise operation goes through it.
 *
 *     th__iter it = {0};
 *     TRY(th__iter_args(&it, call, 0, 2));        two operands: arguments 0 and 1
 *     TRY(th__iter_promote(&it, call, false));    common dtype
 *     return th__iter_out(&it, call, it.common);  a new tensor, or the first operand written in place
 *
 * The output's strides: row-major if all operands have one shape and are contiguous, else channels_last if all are,
 * else their common strides if those are dense; otherwise dimensions are ordered by the operands' strides, the first
 * operand that tells decides, and the output is packed in that order. A Python number is an operand without dimensions.
 */
#ifndef THUNDER_OPS_ITERATOR_H
#define THUNDER_OPS_ITERATOR_H

#include "ops/meta.h"

enum { TH_ITER_OPERANDS = 8 };

typedef struct th__operand {
    th__tensor x; /* of a number only dtype is set: bool, i64 or f64 */
    bool number;
    int64_t dense[TH_MAX_RANK]; /* strides of the copy that a conversion makes */
} th__operand;

typedef struct th__iter {
    uint32_t n;
    bool same_shape;
    th_dtype common;
    th_dev device;
    th__dims shape;
    th__operand in[TH_ITER_OPERANDS];
} th__iter;

void th__iter_tensor(th__iter *it, const th__tensor *x);               /* add an operand; at most TH_ITER_OPERANDS */
th_status th__iter_arg(th__iter *it, const th_call *call, uint32_t i); /* argument i: a tensor or a Python number */
/* Add arguments first..first+n-1, then th__iter_shape. */
th_status th__iter_args(th__iter *it, const th_call *call, uint32_t first, uint32_t n);
/* Broadcast shape and device; declines operands on several devices, unless all but one device's are CPU scalars. */
th_status th__iter_shape(th__iter *it, const th_call *call);
/* Common dtype by torch's categories (tensors with dimensions, without, Python numbers). to_float: integers become the
 * default dtype. Operands of another dtype are converted as the CPU does it, so that their strides are the copy's. */
th_status th__iter_promote(th__iter *it, const th_call *call, bool to_float);
th_dtype th__iter_result_type(const th__iter *it, const th_call *call);
void th__iter_convert(th__iter *it, const th_call *call, th_dtype dtype);
/* The output's strides. */
void th__iter_strides(const th__iter *it, int64_t *stride);
/* The result: a new tensor of this dtype, or, for an in-place operator, the first operand. */
th_status th__iter_out(th__iter *it, th_call *call, th_dtype dtype);

#endif
