/* Arithmetic on known numbers: shape computations that capture recorded as operations.
 *
 *     n: "int" = torch.Tensor.size(x, 0)          x: "cpu f32[16, 64]"     -> 16
 *     m: "int" = operator.mul(n, 4)                                        -> 64
 *     t0 = torch.zeros(m)                                                  -> torch.zeros(64)
 *
 * Only plain values (int, float, bool) are computed here, with Python's own semantics; integers that leave 64 bits and
 * operations that would raise stay as they are. Tensors without input roots are evaluated by whoever can run torch;
 * equal ones are merged by cse.
 */
#include "passes/pass.h"

#include <math.h>
#include <string.h>

typedef struct number {
    th_node_kind kind; /* TH_N_BOOL, TH_N_INT or TH_N_FLOAT */
    int64_t i;
    double f;
} number;

typedef enum arithmetic {
    ADD = 1,
    SUB,
    MUL,
    TRUEDIV,
    FLOORDIV,
    MOD,
    NEG,
    POS,
    ABS,
    MIN,
    MAX,
    LT,
    LE,
    GT,
    GE,
    EQ,
    NE,
    NOT,
    TO_INT,
    TO_FLOAT,
    TO_BOOL,
} arithmetic;

static const struct {
    const char *name;
    arithmetic what;
    uint8_t operands;
} known[] = {
    {"operator.add", ADD, 2},
    {"operator.sub", SUB, 2},
    {"operator.mul", MUL, 2},
    {"operator.truediv", TRUEDIV, 2},
    {"operator.floordiv", FLOORDIV, 2},
    {"operator.mod", MOD, 2},
    {"operator.neg", NEG, 1},
    {"operator.pos", POS, 1},
    {"operator.abs", ABS, 1},
    {"operator.lt", LT, 2},
    {"operator.le", LE, 2},
    {"operator.gt", GT, 2},
    {"operator.ge", GE, 2},
    {"operator.eq", EQ, 2},
    {"operator.ne", NE, 2},
    {"operator.not_", NOT, 1},
    {"builtins.abs", ABS, 1},
    {"builtins.min", MIN, 2},
    {"builtins.max", MAX, 2},
    {"builtins.int", TO_INT, 1},
    {"builtins.float", TO_FLOAT, 1},
    {"builtins.bool", TO_BOOL, 1},
};

static bool number_of(const th_trace *t, th_node n, number *out) {
    const th_node_data *node = &t->nodes[n];
    *out = (number){.kind = (th_node_kind)node->kind};
    if (node->kind == TH_N_FLOAT)
        out->f = node->u.f;
    else
        out->i = node->u.i, out->f = (double)node->u.i;
    return node->kind == TH_N_BOOL || node->kind == TH_N_INT || node->kind == TH_N_FLOAT;
}

static number make_int(int64_t i) { return (number){TH_N_INT, i, (double)i}; }
static number make_float(double f) { return (number){TH_N_FLOAT, 0, f}; }
static number make_bool(bool b) { return (number){TH_N_BOOL, b, b}; }

/* Python rounds towards minus infinity and gives the remainder the divisor's sign. */
static bool int_divide(arithmetic what, int64_t a, int64_t b, number *out) {
    if (b == 0 || (a == INT64_MIN && b == -1)) return false;
    int64_t quotient = a / b, remainder = a % b;
    if (remainder != 0 && (remainder < 0) != (b < 0)) quotient--, remainder += b;
    *out = make_int(what == FLOORDIV ? quotient : remainder);
    return true;
}

static bool compare(arithmetic what, const number *a, const number *b, number *out) {
    bool floats = a->kind == TH_N_FLOAT || b->kind == TH_N_FLOAT;
    const int64_t exact = INT64_C(1) << 53; /* beyond it a mixed comparison in doubles would differ from Python's */
    if (floats && a->kind != b->kind && (a->i > exact || a->i < -exact || b->i > exact || b->i < -exact)) return false;
    if (floats && (isnan(a->f) || isnan(b->f))) return false;
    int order = floats ? (a->f > b->f) - (a->f < b->f) : (a->i > b->i) - (a->i < b->i);
    switch (what) {
    case LT: *out = make_bool(order < 0); return true;
    case LE: *out = make_bool(order <= 0); return true;
    case GT: *out = make_bool(order > 0); return true;
    case GE: *out = make_bool(order >= 0); return true;
    case EQ: *out = make_bool(order == 0); return true;
    case NE: *out = make_bool(order != 0); return true;
    case MIN: *out = order > 0 ? *b : *a; return true; /* the first of equals, as Python */
    case MAX: *out = order < 0 ? *b : *a; return true;
    default: return false;
    }
}

static bool binary(arithmetic what, const number *a, const number *b, number *out) {
    int64_t i = 0;
    if (what >= MIN) return compare(what, a, b, out);
    if (a->kind == TH_N_FLOAT || b->kind == TH_N_FLOAT) {
        switch (what) {
        case ADD: *out = make_float(a->f + b->f); return true;
        case SUB: *out = make_float(a->f - b->f); return true;
        case MUL: *out = make_float(a->f * b->f); return true;
        case TRUEDIV: *out = make_float(a->f / b->f); return b->f != 0;
        default: return false;
        }
    }
    switch (what) {
    case ADD:
        if (__builtin_add_overflow(a->i, b->i, &i)) return false;
        break;
    case SUB:
        if (__builtin_sub_overflow(a->i, b->i, &i)) return false;
        break;
    case MUL:
        if (__builtin_mul_overflow(a->i, b->i, &i)) return false;
        break;
    case FLOORDIV:
    case MOD: return int_divide(what, a->i, b->i, out);
    default: return false; /* true division of integers rounds once in Python, twice here */
    }
    *out = make_int(i);
    return true;
}

static bool unary(arithmetic what, const number *a, number *out) {
    bool is_float = a->kind == TH_N_FLOAT;
    const double limit = 9007199254740992.0; /* 2^53 */
    switch (what) {
    case POS: *out = is_float ? *a : make_int(a->i); return true;
    case NEG:
        *out = is_float ? make_float(-a->f) : make_int(a->i == INT64_MIN ? 0 : -a->i);
        return is_float || a->i != INT64_MIN;
    case ABS:
        if (!is_float && a->i == INT64_MIN) return false;
        *out = is_float ? make_float(fabs(a->f)) : make_int(a->i < 0 ? -a->i : a->i);
        return true;
    case NOT: *out = make_bool(is_float ? a->f == 0 : a->i == 0); return true;
    case TO_BOOL: *out = make_bool(is_float ? a->f != 0 : a->i != 0); return true;
    case TO_INT:
        if (is_float && !(fabs(a->f) <= limit)) return false;
        *out = make_int(is_float ? (int64_t)a->f : a->i);
        return true;
    case TO_FLOAT: *out = make_float(a->f); return is_float || fabs(a->f) <= limit;
    default: return false;
    }
}

/* What a tensor's type answers: size(x, d), dim(x), numel(x). */
static bool ask_type(const th_trace *t, const th_op *op, number *out) {
    th_val x = th__node_as_value(t, th__op_arg(t, op, 0, "input"));
    const th_type *type = x ? th_type_get(t->ctx, t->values[x].type) : NULL;
    if (!type || type->kind != TH_TYPE_TENSOR || op->kwargs) return false;
    uint32_t given = t->nodes[op->args].count;
    number d;
    if (th__op_is(t, op, "torch.Tensor.size") && given == 2 && number_of(t, th__op_arg(t, op, 1, NULL), &d)) {
        int64_t dim = d.i < 0 ? d.i + type->ndim : d.i;
        if (d.kind != TH_N_INT || dim < 0 || dim >= type->ndim) return false;
        *out = make_int(type->shape[dim]);
        return true;
    }
    if (given != 1) return false;
    if (th__op_is(t, op, "torch.Tensor.dim"))
        *out = make_int(type->ndim);
    else if (th__op_is(t, op, "torch.Tensor.numel") || th__op_is(t, op, "torch.numel"))
        *out = make_int(th_type_numel(type));
    else
        return false;
    return true;
}

static bool evaluate(const th_trace *t, const th_op *op, number *out) {
    number a, b;
    if (ask_type(t, op, out)) return true;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!th__op_is(t, op, known[i].name)) continue;
        if (op->kwargs || t->nodes[op->args].count != known[i].operands) return false;
        if (!number_of(t, th__op_arg(t, op, 0, NULL), &a)) return false;
        if (known[i].operands == 1) return unary(known[i].what, &a, out);
        return number_of(t, th__op_arg(t, op, 1, NULL), &b) && binary(known[i].what, &a, &b, out);
    }
    return false;
}

/* The literal, when it is of the type that the value has; 0 otherwise. */
static th_node literal(th_trace *t, th_val v, const number *n) {
    switch (th_type_get(t->ctx, t->values[v].type)->kind) {
    case TH_TYPE_INT: return n->kind == TH_N_INT ? th_node_int(t, n->i) : 0;
    case TH_TYPE_FLOAT: return n->kind == TH_N_FLOAT ? th_node_float(t, n->f) : 0;
    case TH_TYPE_BOOL: return n->kind == TH_N_BOOL ? th_node_bool(t, n->i != 0) : 0;
    default: return 0;
    }
}

static bool computes_numbers(const th_trace *t) {
    for (th_val v = 1; v < t->nvalues; v++) {
        if (t->values[v].def && th_type_get(t->ctx, t->values[v].type)->kind != TH_TYPE_TENSOR) return true;
    }
    return false;
}

th_status th_pass_fold(th_trace *t, th_fuel *fuel) {
    th__rewrite r;
    if (!computes_numbers(t)) return TH_OK;
    TRY(th__rewrite_begin(&r, t));
    for (th_opref op = 1; op < r.nops && th_trace_status(t) == TH_OK; op++) {
        th_op data = r.ops[op];
        th_val out = th__node_as_value(t, data.outs);
        number n;
        data.args = th__rewrite_node(&r, data.args);
        bool known_result = out && data.kind == TH_OP_CALL && !data.effects && evaluate(t, &data, &n);
        th_node node = known_result ? literal(t, out, &n) : 0;
        if (node && th_fuel_take(fuel, "fold", th_str_get(t->ctx, t->values[out].name)))
            r.node[out] = node;
        else
            th__rewrite_copy(&r, &r.ops[op]);
    }
    return th__rewrite_end(&r, th_trace_status(t));
}
