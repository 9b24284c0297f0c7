/* Arithmetic, comparisons, bitwise and logical operators: one or two operands, broadcast, promoted.
 *
 * An in-place twin shares its rule: th__iter_out sees from the definition that the first operand is written.
 */
#include "ops/derivatives.h"
#include "ops/iterator.h"

/* ---- rules ---- */

static th_status two_operands(th__iter *it, th_call *call) {
    it->n = 0;
    TRY(th__iter_args(it, call, 0, 2));
    return th__iter_promote(it, call, false);
}

/* alpha must be an int for integer results; booleans have cases of their own. */
static th_status check_alpha(const th_call *call, uint32_t i, th_dtype common) {
    const th_node_data *alpha = th__arg(call, i);
    if (alpha->kind == TH_N_ABSENT) return TH_OK;
    DECLINE_IF(common == TH_BOOL || !th__fits(alpha, common));
    return alpha->kind == TH_N_INT || (alpha->kind == TH_N_FLOAT && th__is_float(common)) ? TH_OK : TH_DECLINED;
}

static th_status add(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    TRY(check_alpha(call, 2, it.common));
    return th__iter_out(&it, call, it.common);
}

static th_status sub(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    DECLINE_IF(it.in[0].x.dtype == TH_BOOL || it.in[1].x.dtype == TH_BOOL);
    TRY(check_alpha(call, 2, it.common));
    return th__iter_out(&it, call, it.common);
}

/* other - alpha * input: the operands come the other way round, which shows in the strides. */
static th_status rsub(th_call *call) {
    th__iter it = {0};
    TRY(th__iter_arg(&it, call, 1));
    TRY(th__iter_arg(&it, call, 0));
    TRY(th__iter_shape(&it, call));
    TRY(th__iter_promote(&it, call, false));
    DECLINE_IF(it.in[0].x.dtype == TH_BOOL || it.in[1].x.dtype == TH_BOOL);
    TRY(check_alpha(call, 2, it.common));
    return th__iter_out(&it, call, it.common);
}

static th_status mul(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    return th__iter_out(&it, call, it.common);
}

/* Integers stay integers when the quotient is rounded; then a Python number 0 is an error. */
static th_status div_rounded(th_call *call, bool rounded) {
    th__iter it = {0};
    TRY(th__iter_args(&it, call, 0, 2));
    TRY(th__iter_promote(&it, call, !rounded));
    const th_node_data *by = th__arg(call, 1);
    bool by_zero = th__is_number(by) && by->kind != TH_N_FLOAT && by->u.i == 0;
    DECLINE_IF(it.common == TH_BOOL || (by_zero && !th__is_float(it.common)));
    return th__iter_out(&it, call, it.common);
}

static th_status div_(th_call *call) {
    const th_node_data *mode = th__arg(call, 2);
    bool rounded = mode->kind == TH_N_STR;
    DECLINE_IF(mode->kind > TH_N_NONE && !rounded);
    if (rounded) {
        th_str s = mode->u.ref;
        th_ctx *ctx = call->trace->ctx;
        DECLINE_IF(s != th_intern_z(ctx, "floor") && s != th_intern_z(ctx, "trunc"));
    }
    return div_rounded(call, rounded);
}

static th_status true_divide(th_call *call) { return div_rounded(call, false); }

static th_status floor_divide(th_call *call) { return div_rounded(call, true); }

static th_status compare(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    if (call->def->effects & TH_OPDEF_INPLACE) return th__iter_out(&it, call, it.common);
    return th__iter_out(&it, call, TH_BOOL);
}

/* Python's reflected operators: the number on the left is the first operand. */
static th_status reflected(th_call *call, th__iter *it) {
    it->n = 0;
    TRY(th__iter_arg(it, call, 1));
    TRY(th__iter_arg(it, call, 0));
    DECLINE_IF(!it->in[0].number || it->in[1].number);
    TRY(th__iter_shape(it, call));
    return th__iter_promote(it, call, false);
}

static th_status rfloordiv(th_call *call) {
    th__iter it;
    TRY(reflected(call, &it));
    DECLINE_IF(it.common == TH_BOOL);
    return th__iter_out(&it, call, it.common);
}

static th_status rpow(th_call *call) {
    th__iter it;
    TRY(reflected(call, &it));
    DECLINE_IF(it.common == TH_BOOL || !th__fits(th__arg(call, 1), it.common));
    return th__out_fresh(call, it.common, it.device, it.shape.n, it.shape.at, NULL);
}

/* 2 / x is x.reciprocal() * 2. */
static th_status rdiv(th_call *call) {
    int64_t stride[TH_MAX_RANK];
    th__iter it = {0};
    DECLINE_IF(!th__is_number(th__arg(call, 1)));
    TRY(th__iter_args(&it, call, 0, 1));
    TRY(th__iter_promote(&it, call, true));
    th__iter_strides(&it, stride);
    it.in[0].x.stride = stride;
    it.in[0].x.dtype = it.common;
    it.in[0].x.contiguous = false;
    TRY(th__iter_arg(&it, call, 1));
    TRY(th__iter_shape(&it, call));
    return th__iter_out(&it, call, it.common);
}

static th_status minmax(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    DECLINE_IF(it.in[0].number || it.in[1].number);
    return th__iter_out(&it, call, it.common);
}

static th_status bitwise(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    DECLINE_IF(th__is_float(it.common));
    return th__iter_out(&it, call, it.common);
}

static th_status shift(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    DECLINE_IF(!th__is_int(it.common));
    return th__iter_out(&it, call, it.common);
}

static th_status logical(th_call *call) {
    th__iter it;
    TRY(two_operands(&it, call));
    DECLINE_IF(it.in[0].number || it.in[1].number);
    return th__iter_out(&it, call, TH_BOOL);
}

static th_status logical_not(th_call *call) {
    th__iter it = {0};
    TRY(th__iter_args(&it, call, 0, 1));
    DECLINE_IF(it.in[0].number);
    return th__iter_out(&it, call, TH_BOOL);
}

/* A number as exponent does not take part as an operand: the result has the base's strides. With a number as base it is
 * row-major. */
static th_status pow_(th_call *call) {
    const th_node_data *exponent = th__arg(call, 1);
    th__iter it;
    TRY(two_operands(&it, call));
    DECLINE_IF(it.common == TH_BOOL);
    if (it.in[0].number) {
        DECLINE_IF(!th__fits(th__arg(call, 0), it.common) || call->def->effects & TH_OPDEF_INPLACE);
        return th__out_fresh(call, it.common, it.device, it.shape.n, it.shape.at, NULL);
    }
    DECLINE_IF(!th__is_float(it.common) && exponent->kind == TH_N_INT && exponent->u.i < 0);
    if (it.in[1].number) {
        DECLINE_IF(!th__fits(exponent, it.common));
        it.n = 1;
        it.same_shape = true;
    }
    return th__iter_out(&it, call, it.common);
}

/* ---- one operand ---- */

static th_status same_dtype(th_call *call) {
    th__iter it = {0};
    TRY(th__iter_args(&it, call, 0, 1));
    DECLINE_IF(it.in[0].number);
    return th__iter_out(&it, call, it.in[0].x.dtype);
}

/* Those that torch does not have for booleans. */
static th_status same_dtype_no_bool(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(x.dtype == TH_BOOL);
    return same_dtype(call);
}

static th_status positive(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    return x.dtype == TH_BOOL ? TH_DECLINED : th__out_same(call, &x);
}

static th_status bitwise_not(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(th__is_float(x.dtype));
    return same_dtype(call);
}

static th_status float_result(th_call *call) {
    th__iter it = {0};
    TRY(th__iter_args(&it, call, 0, 1));
    DECLINE_IF(it.in[0].number);
    TRY(th__iter_promote(&it, call, true));
    return th__iter_out(&it, call, it.common);
}

static th_status is_special(th_call *call) {
    th__iter it = {0};
    TRY(th__iter_args(&it, call, 0, 1));
    DECLINE_IF(it.in[0].number);
    return th__iter_out(&it, call, TH_BOOL);
}

/* Of integers torch makes the answer without looking at them. */
static th_status is_infinite(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    return th__is_float(x.dtype) ? is_special(call) : th__out_like(call, &x, TH_BOOL, x.device);
}

/* ---- operators ---- */

#define POINTWISE(name_, params_, names_, ...) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_POINTWISE, .meta = __VA_ARGS__}
#define IN_PLACE(name_, params_, names_, functional_, rule) \
    {.name = name_,                                         \
     .params = params_,                                     \
     .names = names_,                                       \
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES,            \
     .fusion = TH_FUSE_POINTWISE,                           \
     .meta = rule,                                          \
     .functional = functional_}
/* torch.f, Tensor.f and Tensor.f_ */
#define UNARY(f, rule, ...)                                                     \
    POINTWISE(#f, "input", "torch." #f " torch.Tensor." #f, rule, __VA_ARGS__), \
        IN_PLACE(#f "_", "input", "torch." #f "_ torch.Tensor." #f "_", "torch." #f, rule)
#define BINARY(f, rule, ...)                                                           \
    POINTWISE(#f, "input, other", "torch." #f " torch.Tensor." #f, rule, __VA_ARGS__), \
        IN_PLACE(#f "_", "input, other", "torch.Tensor." #f "_", "torch." #f, rule)

const th_opdef th__ops_pointwise[] = {
    POINTWISE("add", "input, other, *, alpha=1",
              "torch.add torch.Tensor.add torch.Tensor.__add__ torch.Tensor.__radd__", add, .grad = th__grad_add),
    IN_PLACE("add_", "input, other, *, alpha=1", "torch.Tensor.add_ torch.Tensor.__iadd__", "torch.add", add),
    POINTWISE("sub", "input, other, *, alpha=1",
              "torch.sub torch.Tensor.sub torch.Tensor.__sub__ torch.subtract torch.Tensor.subtract", sub,
              .grad = th__grad_sub),
    IN_PLACE("sub_", "input, other, *, alpha=1", "torch.Tensor.sub_ torch.Tensor.__isub__ torch.Tensor.subtract_",
             "torch.sub", sub),
    POINTWISE("rsub", "input, other, *, alpha=1", "torch.rsub torch.Tensor.__rsub__", rsub, .grad = th__grad_rsub),
    POINTWISE(
        "mul", "input, other",
        "torch.mul torch.Tensor.mul torch.Tensor.__mul__ torch.Tensor.__rmul__ torch.multiply torch.Tensor.multiply",
        mul, .grad = th__grad_mul),
    IN_PLACE("mul_", "input, other", "torch.Tensor.mul_ torch.Tensor.__imul__ torch.Tensor.multiply_", "torch.mul",
             mul),
    POINTWISE(
        "div", "input, other, *, rounding_mode=None",
        "torch.div torch.Tensor.div torch.Tensor.__truediv__ torch.Tensor.__div__ torch.divide torch.Tensor.divide",
        div_, .effects = TH_OPDEF_RAISES, .grad = th__grad_div),
    IN_PLACE("div_", "input, other, *, rounding_mode=None",
             "torch.Tensor.div_ torch.Tensor.__itruediv__ torch.Tensor.__idiv__ torch.Tensor.divide_", "torch.div",
             div_),
    POINTWISE("true_divide", "input, other", "torch.true_divide torch.Tensor.true_divide", true_divide,
              .grad = th__grad_true_divide),
    IN_PLACE("true_divide_", "input, other", "torch.Tensor.true_divide_", "torch.true_divide", true_divide),
    POINTWISE("floor_divide", "input, other", "torch.floor_divide torch.Tensor.floor_divide torch.Tensor.__floordiv__",
              floor_divide, .effects = TH_OPDEF_RAISES),
    IN_PLACE("floor_divide_", "input, other", "torch.Tensor.floor_divide_ torch.Tensor.__ifloordiv__",
             "torch.floor_divide", floor_divide),
    POINTWISE("remainder", "input, other", "torch.remainder torch.Tensor.remainder torch.Tensor.__mod__", floor_divide,
              .effects = TH_OPDEF_RAISES),
    IN_PLACE("remainder_", "input, other", "torch.Tensor.remainder_ torch.Tensor.__imod__", "torch.remainder",
             floor_divide),
    BINARY(fmod, floor_divide, .effects = TH_OPDEF_RAISES),
    POINTWISE("rdiv", "input, other", "torch.Tensor.__rdiv__ torch.Tensor.__rtruediv__", rdiv, .grad = th__grad_rdiv),
    POINTWISE("rfloordiv", "input, other", "torch.Tensor.__rfloordiv__", rfloordiv, .effects = TH_OPDEF_RAISES),
    POINTWISE("rmod", "input, other", "torch.Tensor.__rmod__", rfloordiv, .effects = TH_OPDEF_RAISES),
    POINTWISE("rpow", "input, other", "torch.Tensor.__rpow__", rpow),
    POINTWISE("pow", "input, exponent", "torch.pow torch.Tensor.pow torch.Tensor.__pow__ torch._tensor.TensorBase.pow",
              pow_, .grad = th__grad_pow),
    IN_PLACE("pow_", "input, exponent", "torch.Tensor.pow_ torch.Tensor.__ipow__ torch._tensor.TensorBase.pow_",
             "torch.pow", pow_),

    POINTWISE("eq", "input, other", "torch.eq torch.Tensor.eq torch.Tensor.__eq__", compare),
    POINTWISE("ne", "input, other",
              "torch.ne torch.Tensor.ne torch.Tensor.__ne__ torch.not_equal torch.Tensor.not_equal", compare),
    POINTWISE("lt", "input, other", "torch.lt torch.Tensor.lt torch.Tensor.__lt__ torch.less torch.Tensor.less",
              compare),
    POINTWISE("le", "input, other",
              "torch.le torch.Tensor.le torch.Tensor.__le__ torch.less_equal torch.Tensor.less_equal", compare),
    POINTWISE("gt", "input, other", "torch.gt torch.Tensor.gt torch.Tensor.__gt__ torch.greater torch.Tensor.greater",
              compare),
    POINTWISE("ge", "input, other",
              "torch.ge torch.Tensor.ge torch.Tensor.__ge__ torch.greater_equal torch.Tensor.greater_equal", compare),
    POINTWISE("minimum", "input, other", "torch.minimum torch.Tensor.minimum", minmax),
    POINTWISE("maximum", "input, other", "torch.maximum torch.Tensor.maximum", minmax),

    POINTWISE("bitwise_and", "input, other", "torch.bitwise_and torch.Tensor.bitwise_and torch.Tensor.__and__",
              bitwise),
    IN_PLACE("bitwise_and_", "input, other", "torch.Tensor.bitwise_and_ torch.Tensor.__iand__", "torch.bitwise_and",
             bitwise),
    POINTWISE("bitwise_or", "input, other", "torch.bitwise_or torch.Tensor.bitwise_or torch.Tensor.__or__", bitwise),
    IN_PLACE("bitwise_or_", "input, other", "torch.Tensor.bitwise_or_ torch.Tensor.__ior__", "torch.bitwise_or",
             bitwise),
    POINTWISE("bitwise_xor", "input, other", "torch.bitwise_xor torch.Tensor.bitwise_xor torch.Tensor.__xor__",
              bitwise),
    IN_PLACE("bitwise_xor_", "input, other", "torch.Tensor.bitwise_xor_ torch.Tensor.__ixor__", "torch.bitwise_xor",
             bitwise),
    POINTWISE("bitwise_not", "input", "torch.bitwise_not torch.Tensor.bitwise_not torch.Tensor.__invert__",
              bitwise_not),
    IN_PLACE("bitwise_not_", "input", "torch.Tensor.bitwise_not_", "torch.bitwise_not", bitwise_not),
    POINTWISE("bitwise_left_shift", "input, other",
              "torch.bitwise_left_shift torch.Tensor.bitwise_left_shift torch.Tensor.__lshift__", shift),
    POINTWISE("bitwise_right_shift", "input, other",
              "torch.bitwise_right_shift torch.Tensor.bitwise_right_shift torch.Tensor.__rshift__", shift),
    IN_PLACE("bitwise_left_shift_", "input, other", "torch.Tensor.bitwise_left_shift_ torch.Tensor.__ilshift__",
             "torch.bitwise_left_shift", shift),
    IN_PLACE("bitwise_right_shift_", "input, other", "torch.Tensor.bitwise_right_shift_ torch.Tensor.__irshift__",
             "torch.bitwise_right_shift", shift),
    BINARY(logical_and, logical, ),
    BINARY(logical_or, logical, ),
    BINARY(logical_xor, logical, ),
    POINTWISE("logical_not", "input", "torch.logical_not torch.Tensor.logical_not", logical_not),
    IN_PLACE("logical_not_", "input", "torch.Tensor.logical_not_", "torch.logical_not", logical_not),

    POINTWISE("neg", "input", "torch.neg torch.Tensor.neg torch.Tensor.__neg__ torch.negative torch.Tensor.negative",
              same_dtype_no_bool, .grad = th__grad_neg),
    IN_PLACE("neg_", "input", "torch.neg_ torch.Tensor.neg_ torch.negative_ torch.Tensor.negative_", "torch.neg",
             same_dtype_no_bool),
    POINTWISE("abs", "input", "torch.abs torch.Tensor.abs torch.Tensor.__abs__ torch.absolute torch.Tensor.absolute",
              same_dtype_no_bool, .grad = th__grad_abs),
    IN_PLACE("abs_", "input", "torch.abs_ torch.Tensor.abs_ torch.Tensor.absolute_", "torch.abs", same_dtype_no_bool),
    POINTWISE("positive", "input", "torch.positive torch.Tensor.positive torch.Tensor.__pos__", positive,
              .grad = th__grad_positive),
    POINTWISE("sign", "input", "torch.sign torch.Tensor.sign", same_dtype),
    UNARY(square, same_dtype_no_bool, .grad = th__grad_square),
    UNARY(floor, same_dtype_no_bool, ),
    UNARY(ceil, same_dtype_no_bool, ),
    UNARY(trunc, same_dtype_no_bool, ),
    POINTWISE("isnan", "input", "torch.isnan torch.Tensor.isnan", is_special),
    POINTWISE("isinf", "input", "torch.isinf torch.Tensor.isinf", is_infinite),
    POINTWISE("isfinite", "input", "torch.isfinite torch.Tensor.isfinite", is_infinite),

    UNARY(rsqrt, float_result, .grad = th__grad_rsqrt),
    UNARY(sqrt, float_result, .grad = th__grad_sqrt),
    UNARY(exp, float_result, .grad = th__grad_exp),
    UNARY(expm1, float_result, .grad = th__grad_expm1),
    UNARY(exp2, float_result, ),
    UNARY(log, float_result, .grad = th__grad_log),
    UNARY(log2, float_result, .grad = th__grad_log2),
    UNARY(log10, float_result, .grad = th__grad_log10),
    UNARY(log1p, float_result, .grad = th__grad_log1p),
    UNARY(sin, float_result, .grad = th__grad_sin),
    UNARY(cos, float_result, .grad = th__grad_cos),
    UNARY(tan, float_result, ),
    UNARY(sinh, float_result, ),
    UNARY(cosh, float_result, ),
    UNARY(tanh, float_result, .grad = th__grad_tanh),
    UNARY(asin, float_result, ),
    UNARY(acos, float_result, ),
    UNARY(atan, float_result, ),
    UNARY(asinh, float_result, ),
    UNARY(acosh, float_result, ),
    UNARY(atanh, float_result, ),
    UNARY(erf, float_result, .grad = th__grad_erf),
    UNARY(erfc, float_result, ),
    UNARY(reciprocal, float_result, .grad = th__grad_reciprocal),
    UNARY(sigmoid, float_result, .grad = th__grad_sigmoid),
};
const size_t th__ops_pointwise_count = sizeof th__ops_pointwise / sizeof *th__ops_pointwise;
