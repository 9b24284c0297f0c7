/* Tensors from nothing but a shape and numbers: zeros, full, arange, new_*, *_like, random ones, tensor.
 *
 * Without a dtype, torch takes the default one, the input's (new_*, *_like), or the numbers' own (full, arange,
 * tensor).
 */
#include "ops/meta.h"

#include <math.h>
#include <string.h>

/* ---- options ---- */

/* Where a factory call puts its result. layout, pin_memory and requires_grad are declined unless they change nothing.
 */
typedef struct options {
    th_dtype dtype;
    th_dev device;
} options;

static th_status device_option(const th_call *call, uint32_t i, th_dev fallback, th_dev *out) {
    th_ctx *ctx = call->trace->ctx;
    const th_node_data *d = th__arg(call, i);
    *out = fallback;
    if (d->kind == TH_N_STR && strcmp(th_str_get(ctx, d->u.ref), "cpu") == 0)
        *out = th_device(ctx, "cpu", -1);
    else if (d->kind == TH_N_DEVICE)
        *out = d->u.ref;
    else
        DECLINE_IF(d->kind > TH_N_NONE);
    bool cpu = th__is_device(call, *out, "cpu"), indexed = th_device_index(ctx, *out) >= 0;
    return (cpu && !indexed) || (th__is_device(call, *out, "cuda") && indexed) ? TH_OK : TH_DECLINED;
}

static bool off(const th_node_data *d) {
    return d->kind == TH_N_ABSENT || d->kind == TH_N_NONE || (d->kind == TH_N_BOOL && d->u.i == 0);
}

/* The keyword-only tail `dtype, device, layout, requires_grad, pin_memory` from parameter `first` on. */
#define OPTIONS "dtype=None, device=None, layout=None, requires_grad=False, pin_memory=False"
static th_status read_options(const th_call *call, uint32_t first, th_dtype dtype, th_dev device, options *o) {
    TRY(th__arg_dtype(call, first, dtype, &o->dtype));
    TRY(device_option(call, first + 1, device, &o->device));
    DECLINE_IF(th__has(call, first + 2) && !th__arg_is_symbol(call, first + 2, "torch.strided"));
    return off(th__arg(call, first + 3)) && off(th__arg(call, first + 4)) ? TH_OK : TH_DECLINED;
}

static th_status filled(th_call *call, const options *o, const th__dims *size) {
    return th__out_fresh(call, o->dtype, o->device, size->n, size->at, NULL);
}

/* The dtype that torch gives a Python number. */
static th_dtype dtype_of_number(const th_call *call, const th_node_data *d) {
    return d->kind == TH_N_FLOAT ? call->default_dtype : d->kind == TH_N_INT ? TH_I64 : TH_BOOL;
}

/* ---- by size ---- */

static th_status zeros(th_call *call) {
    th__dims size;
    options o;
    TRY(th__arg_size(call, 0, &size));
    TRY(read_options(call, 1, call->default_dtype, call->default_device, &o));
    return filled(call, &o, &size);
}

static th_status random_floats(th_call *call) {
    th__dims size;
    options o;
    TRY(th__arg_size(call, 0, &size));
    TRY(read_options(call, 1, call->default_dtype, call->default_device, &o));
    DECLINE_IF(!th__is_float(o.dtype));
    return filled(call, &o, &size);
}

static th_status full(th_call *call) {
    th__dims size;
    options o;
    const th_node_data *value = th__arg(call, 1);
    TRY(th__node_ints(call, call->arg[0], &size));
    DECLINE_IF(!th__is_number(value));
    TRY(read_options(call, 2, dtype_of_number(call, value), call->default_device, &o));
    DECLINE_IF(!th__fits(value, o.dtype));
    return filled(call, &o, &size);
}

static th_status new_zeros(th_call *call) {
    th__tensor x;
    th__dims size;
    options o;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_size(call, 1, &size));
    TRY(read_options(call, 2, x.dtype, x.device, &o));
    return filled(call, &o, &size);
}

static th_status new_full(th_call *call) {
    th__tensor x;
    th__dims size;
    options o;
    const th_node_data *value = th__arg(call, 2);
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__node_ints(call, call->arg[1], &size));
    DECLINE_IF(!th__is_number(value));
    TRY(read_options(call, 3, x.dtype, x.device, &o));
    DECLINE_IF(!th__fits(value, o.dtype));
    return filled(call, &o, &size);
}

static th_status like_with(th_call *call, uint32_t first, bool random) {
    th__tensor x;
    options o;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(read_options(call, first, x.dtype, x.device, &o));
    DECLINE_IF(random && !th__is_float(o.dtype));
    if (th__arg_is_symbol(call, first + 5, "torch.contiguous_format")) {
        return th__out_fresh(call, o.dtype, o.device, x.ndim, x.shape, NULL);
    }
    DECLINE_IF(th__has(call, first + 5) && !th__arg_is_symbol(call, first + 5, "torch.preserve_format"));
    return th__out_like(call, &x, o.dtype, o.device);
}

static th_status zeros_like(th_call *call) { return like_with(call, 1, false); }
static th_status rand_like(th_call *call) { return like_with(call, 1, true); }

static th_status full_like(th_call *call) {
    th__tensor x;
    th_dtype dtype;
    const th_node_data *value = th__arg(call, 1);
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_dtype(call, 2, x.dtype, &dtype));
    DECLINE_IF(!th__is_number(value) || !th__fits(value, dtype));
    return like_with(call, 2, false);
}

static th_status zero_(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    return th__out_written(call, &x);
}

static th_status fill_(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(!th__is_number(th__arg(call, 1)) || !th__fits(th__arg(call, 1), x.dtype));
    return th__out_written(call, &x);
}

/* ---- ranges ---- */

/* Python tells (end), (start, end) and (start, end, step) apart by position; start and end also come by name. */
static th_status range_bounds(const th_call *call, const th_node_data *bound[3]) {
    const th_node_data *rest = th__arg(call, 0), *start = th__arg(call, 1), *end = th__arg(call, 2);
    bool named[] = {start->kind != TH_N_ABSENT, end->kind != TH_N_ABSENT, th__arg(call, 3)->kind != TH_N_ABSENT};
    uint32_t n = rest->count;
    DECLINE_IF(n > 3 || (n == 0 && !named[1]) || (n > 0 && named[0]) || (n > 1 && named[1]) || (n > 2 && named[2]));
    bound[0] = n > 1 || (n == 1 && named[1]) ? th__node(call, th__kid(call, rest, 0)) : start;
    bound[1] = n > 1 ? th__node(call, th__kid(call, rest, 1)) : named[1] ? end : th__node(call, th__kid(call, rest, 0));
    bound[2] = n > 2 ? th__node(call, th__kid(call, rest, 2)) : th__arg(call, 3);
    for (uint32_t i = 0; i < 3; i++) {
        bool number = bound[i]->kind == TH_N_INT || bound[i]->kind == TH_N_FLOAT;
        DECLINE_IF(!number && (bound[i]->kind != TH_N_ABSENT || i == 1));
    }
    return TH_OK;
}

static double real(const th_node_data *d, double fallback) {
    return d->kind == TH_N_FLOAT ? d->u.f : d->kind == TH_N_INT ? (double)d->u.i : fallback;
}

static th_status range_length(const th_node_data *bound[3], int64_t *length) {
    double start = real(bound[0], 0), end = real(bound[1], 0), step = real(bound[2], 1);
    double count = ceil((end - start) / step);
    DECLINE_IF(!isfinite(start) || !isfinite(end) || !isfinite(step) || step == 0 || (end - start) * step < 0);
    DECLINE_IF(!(fabs(start) < 0x1p52 && fabs(end) < 0x1p52 && fabs(step) < 0x1p52 && count < 0x1p52));
    *length = (int64_t)count;
    return TH_OK;
}

static th_status arange(th_call *call) {
    const th_node_data *bound[3];
    th_dtype dtype = TH_I64;
    th__dims size = {.n = 1};
    options o;
    TRY(range_bounds(call, bound));
    for (uint32_t i = 0; i < 3; i++) {
        if (bound[i]->kind == TH_N_FLOAT) dtype = call->default_dtype;
    }
    TRY(read_options(call, 4, dtype, call->default_device, &o));
    DECLINE_IF(o.dtype == TH_BOOL || (dtype != TH_I64 && !th__is_float(o.dtype)));
    for (uint32_t i = 0; i < 3; i++) DECLINE_IF(bound[i]->kind != TH_N_ABSENT && !th__fits(bound[i], o.dtype));
    TRY(range_length(bound, &size.at[0]));
    return filled(call, &o, &size);
}

static th_status linspace(th_call *call) {
    th__dims size = {.n = 1};
    options o;
    for (uint32_t i = 0; i < 2; i++) {
        DECLINE_IF(th__arg(call, i)->kind != TH_N_INT && th__arg(call, i)->kind != TH_N_FLOAT);
    }
    TRY(th__arg_int(call, 2, 0, &size.at[0]));
    TRY(read_options(call, 3, call->default_dtype, call->default_device, &o));
    DECLINE_IF(!th__is_float(o.dtype));
    return filled(call, &o, &size);
}

static th_status eye(th_call *call) {
    th__dims size = {.n = 2};
    options o;
    TRY(th__arg_int(call, 0, 0, &size.at[0]));
    size.at[1] = size.at[0];
    if (th__has(call, 1)) TRY(th__arg_int(call, 1, 0, &size.at[1]));
    TRY(read_options(call, 2, call->default_dtype, call->default_device, &o));
    return filled(call, &o, &size);
}

/* ---- literals ---- */

/* Shape of nested lists of numbers, and the dtype that holds them all. */
static th_status literal(const th_call *call, th_node node, uint32_t depth, th__dims *shape, th_dtype *dtype) {
    const th_node_data *d = th__node(call, node);
    if (th__is_number(d)) {
        DECLINE_IF(depth != shape->n);
        *dtype = th__promote(*dtype, dtype_of_number(call, d));
        return TH_OK;
    }
    DECLINE_IF(!th__is_sequence(d) || depth == TH_MAX_RANK || d->count == 0);
    if (depth == shape->n && *dtype == TH_DTYPE_NONE) /* the first way down sets the shape */
        shape->at[shape->n++] = d->count;
    DECLINE_IF(depth >= shape->n || shape->at[depth] != d->count);
    for (uint32_t i = 0; i < d->count; i++) TRY(literal(call, th__kid(call, d, i), depth + 1, shape, dtype));
    return TH_OK;
}

/* Do all numbers fit? A float that becomes an int is cut, or refused, depending on its form: declined. */
static bool literal_fits(const th_call *call, th_node node, th_dtype dtype) {
    const th_node_data *d = th__node(call, node);
    if (th__is_number(d)) return th__fits(d, dtype);
    for (uint32_t i = 0; i < d->count; i++) {
        if (!literal_fits(call, th__kid(call, d, i), dtype)) return false;
    }
    return true;
}

static th_status literal_tensor(th_call *call, uint32_t data, th_dtype dtype, th_dev device) {
    th__dims shape = {0};
    th_dtype own = TH_DTYPE_NONE;
    options o;
    const th_node_data *list = th__arg(call, data);
    if (th__is_sequence(list) && list->count == 0) {
        shape.n = 1;
        own = call->default_dtype;
    } else {
        TRY(literal(call, call->arg[data], 0, &shape, &own));
    }
    TRY(th__arg_dtype(call, data + 1, dtype ? dtype : own, &o.dtype));
    TRY(device_option(call, data + 2, device, &o.device));
    DECLINE_IF(!off(th__arg(call, data + 3)) || !off(th__arg(call, data + 4)));
    DECLINE_IF(!literal_fits(call, call->arg[data], o.dtype));
    return filled(call, &o, &shape);
}

static th_status tensor(th_call *call) { return literal_tensor(call, 0, TH_DTYPE_NONE, call->default_device); }

static th_status new_tensor(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    return literal_tensor(call, 1, x.dtype, x.device);
}

/* ---- operators ---- */

#define FACTORY(name_, params_, names_, ...) \
    {.name = name_, .params = params_, .names = names_, .fusion = TH_FUSE_FACTORY, .meta = __VA_ARGS__}
#define RANDOM(name_, params_, names_, rule) \
    {.name = name_,                          \
     .params = params_,                      \
     .names = names_,                        \
     .effects = TH_FX_RANDOM,                \
     .fusion = TH_FUSE_FACTORY,              \
     .meta = rule}
#define IN_PLACE(name_, params_, names_, functional_, rule) \
    {.name = name_,                                         \
     .params = params_,                                     \
     .names = names_,                                       \
     .effects = TH_OPDEF_INPLACE | TH_FX_WRITES,            \
     .fusion = TH_FUSE_FACTORY,                             \
     .meta = rule,                                          \
     .functional = functional_}
#define FORMAT ", memory_format=torch.preserve_format"

const th_opdef th__ops_factory[] = {
    FACTORY("zeros", "*size, " OPTIONS, "torch.zeros", zeros),
    FACTORY("ones", "*size, " OPTIONS, "torch.ones", zeros),
    FACTORY("empty", "*size, " OPTIONS, "torch.empty", zeros),
    FACTORY("full", "size, fill_value, *, " OPTIONS, "torch.full", full),
    FACTORY("new_zeros", "input, *size, " OPTIONS, "torch.Tensor.new_zeros", new_zeros),
    FACTORY("new_ones", "input, *size, " OPTIONS, "torch.Tensor.new_ones", new_zeros),
    FACTORY("new_empty", "input, *size, " OPTIONS, "torch.Tensor.new_empty", new_zeros),
    FACTORY("new_full", "input, size, fill_value, *, " OPTIONS, "torch.Tensor.new_full", new_full),
    FACTORY("zeros_like", "input, *, " OPTIONS FORMAT, "torch.zeros_like", zeros_like),
    FACTORY("ones_like", "input, *, " OPTIONS FORMAT, "torch.ones_like", zeros_like),
    FACTORY("empty_like", "input, *, " OPTIONS FORMAT, "torch.empty_like", zeros_like),
    FACTORY("full_like", "input, fill_value, *, " OPTIONS FORMAT, "torch.full_like", full_like),
    IN_PLACE("zero_", "input", "torch.Tensor.zero_ torch.zero_", "torch.zeros_like", zero_),
    IN_PLACE("fill_", "input, value", "torch.Tensor.fill_ torch.fill_", "torch.full_like", fill_),
    FACTORY("arange", "*range, start=None, end=None, step=1, " OPTIONS, "torch.arange", arange),
    FACTORY("linspace", "start, end, steps, *, " OPTIONS, "torch.linspace", linspace),
    FACTORY("eye", "n, m=None, *, " OPTIONS, "torch.eye", eye),
    FACTORY("tensor", "data, *, dtype=None, device=None, requires_grad=False, pin_memory=False", "torch.tensor",
            tensor),
    FACTORY("new_tensor", "input, data, *, dtype=None, device=None, requires_grad=False, pin_memory=False",
            "torch.Tensor.new_tensor", new_tensor),
    RANDOM("rand", "*size, " OPTIONS, "torch.rand", random_floats),
    RANDOM("randn", "*size, " OPTIONS, "torch.randn", random_floats),
    RANDOM("rand_like", "input, *, " OPTIONS FORMAT, "torch.rand_like", rand_like),
    RANDOM("randn_like", "input, *, " OPTIONS FORMAT, "torch.randn_like", rand_like),
};
const size_t th__ops_factory_count = sizeof th__ops_factory / sizeof *th__ops_factory;
