/* Conversions of dtype, device and memory format: to, float, half, type_as, contiguous, clone, detach.
 *
 * A conversion that changes nothing returns its input itself. One that does keeps the order of dimensions.
 */
#include "ops/derivatives.h"

#include <string.h>

/* ---- rules ---- */

static th_status convert(th_call *call, const th__tensor *x, th_dtype dtype, th_dev device, bool copy) {
    if (!copy && x->dtype == dtype && x->device == device) return th__out_same(call, x);
    return th__out_like(call, x, dtype, device);
}

/* A device argument that names its index where torch would otherwise ask for the current one: 0 when declined. */
static th_dev device_of(const th_call *call, const th_node_data *d) {
    if (d->kind == TH_N_STR)
        return strcmp(th_str_get(call->trace->ctx, d->u.ref), "cpu") ? 0 : th_device(call->trace->ctx, "cpu", -1);
    if (d->kind != TH_N_DEVICE) return 0;
    if (th__is_device(call, d->u.ref, "cpu")) return th_device_index(call->trace->ctx, d->u.ref) < 0 ? d->u.ref : 0;
    return th__is_device(call, d->u.ref, "cuda") && th_device_index(call->trace->ctx, d->u.ref) >= 0 ? d->u.ref : 0;
}

/* Tensor.to has three forms: (dtype, ...), (device, dtype, ...) and (other, ...); then non_blocking and copy. */
enum { TO_INPUT, TO_FIRST, TO_SECOND, TO_THIRD, TO_FOURTH, TO_DEVICE, TO_DTYPE, TO_NON_BLOCKING, TO_COPY };

static th_status to_flags(const th_call *call, uint32_t at, bool *copy) {
    bool ignored;
    bool by_position = th__arg(call, at)->kind != TH_N_ABSENT;
    bool copy_by_position = at < TO_FOURTH && th__arg(call, at + 1)->kind != TH_N_ABSENT;
    DECLINE_IF(by_position && th__arg(call, TO_NON_BLOCKING)->kind != TH_N_ABSENT);
    DECLINE_IF(copy_by_position && th__arg(call, TO_COPY)->kind != TH_N_ABSENT);
    DECLINE_IF(at < TO_THIRD && th__arg(call, TO_FOURTH)->kind != TH_N_ABSENT);
    TRY(th__arg_bool(call, by_position ? at : TO_NON_BLOCKING, false, &ignored));
    return th__arg_bool(call, copy_by_position ? at + 1 : TO_COPY, false, copy);
}

static th_status to(th_call *call) {
    th__tensor x, other;
    bool copy;
    TRY(th__arg_tensor(call, TO_INPUT, &x));
    const th_node_data *first = th__arg(call, TO_FIRST), *device = th__arg(call, TO_DEVICE);
    th_dtype dtype = x.dtype;
    th_dev to_device = x.device;
    uint32_t dtype_at = TO_DTYPE, flags_at = TO_THIRD;
    if (first->kind == TH_N_VALUE) {
        TRY(th__arg_tensor(call, TO_FIRST, &other));
        DECLINE_IF(th__has(call, TO_DEVICE) || th__has(call, TO_DTYPE));
        TRY(to_flags(call, TO_SECOND, &copy));
        return convert(call, &x, other.dtype, other.device, copy);
    }
    if (first->kind == TH_N_DTYPE) {
        DECLINE_IF(th__has(call, TO_DEVICE) || th__has(call, TO_DTYPE));
        dtype_at = TO_FIRST;
        flags_at = TO_SECOND;
    } else if (first->kind != TH_N_ABSENT) {
        DECLINE_IF(th__has(call, TO_DEVICE));
        device = first;
        if (th__arg(call, TO_SECOND)->kind != TH_N_ABSENT) {
            DECLINE_IF(th__has(call, TO_DTYPE));
            dtype_at = TO_SECOND;
        }
    }
    TRY(th__arg_dtype(call, dtype_at, x.dtype, &dtype));
    if (device->kind > TH_N_NONE) to_device = device_of(call, device);
    DECLINE_IF(!to_device);
    TRY(to_flags(call, flags_at, &copy));
    return convert(call, &x, dtype, to_device, copy);
}

static bool preserves_format(const th_call *call, uint32_t i) {
    return th__arg(call, i)->kind == TH_N_ABSENT || th__arg_is_symbol(call, i, "torch.preserve_format");
}

static th_status cast_to(th_call *call, th_dtype dtype) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    DECLINE_IF(!preserves_format(call, 1));
    return convert(call, &x, dtype, x.device, false);
}

static th_status to_float(th_call *call) { return cast_to(call, TH_F32); }
static th_status to_half(th_call *call) { return cast_to(call, TH_F16); }
static th_status to_bfloat16(th_call *call) { return cast_to(call, TH_BF16); }
static th_status to_double(th_call *call) { return cast_to(call, TH_F64); }
static th_status to_int(th_call *call) { return cast_to(call, TH_I32); }
static th_status to_long(th_call *call) { return cast_to(call, TH_I64); }
static th_status to_short(th_call *call) { return cast_to(call, TH_I16); }
static th_status to_char(th_call *call) { return cast_to(call, TH_I8); }
static th_status to_byte(th_call *call) { return cast_to(call, TH_U8); }
static th_status to_bool(th_call *call) { return cast_to(call, TH_BOOL); }

static th_status type_as(th_call *call) {
    th__tensor x, other;
    TRY(th__arg_tensor(call, 0, &x));
    TRY(th__arg_tensor(call, 1, &other));
    return convert(call, &x, other.dtype, other.device, false);
}

static th_status contiguous(th_call *call) {
    th__tensor x;
    int64_t stride[TH_MAX_RANK];
    TRY(th__arg_tensor(call, 0, &x));
    if (th__arg_is_symbol(call, 1, "torch.channels_last")) {
        DECLINE_IF(x.ndim != 4);
        if (th__is_channels_last(&x)) return th__out_same(call, &x);
        th__channels_last(4, x.shape, stride);
        return th__out_fresh(call, x.dtype, x.device, 4, x.shape, stride);
    }
    DECLINE_IF(th__arg(call, 1)->kind != TH_N_ABSENT && !th__arg_is_symbol(call, 1, "torch.contiguous_format"));
    if (th__is_contiguous(&x)) return th__out_same(call, &x);
    return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
}

static th_status clone(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    if (th__arg_is_symbol(call, 1, "torch.contiguous_format")) {
        return th__out_fresh(call, x.dtype, x.device, x.ndim, x.shape, NULL);
    }
    DECLINE_IF(th__has(call, 1) && !th__arg_is_symbol(call, 1, "torch.preserve_format"));
    return th__out_like(call, &x, x.dtype, x.device);
}

static th_status detach(th_call *call) {
    th__tensor x;
    TRY(th__arg_tensor(call, 0, &x));
    return th__out_view(call, &x, x.ndim, x.shape, x.stride, 0);
}

/* ---- operators ---- */

#define CAST(name_, ...)                                     \
    {.name = "to_" name_,                                    \
     .params = "input, memory_format=torch.preserve_format", \
     .names = "torch.Tensor." name_,                         \
     .fusion = TH_FUSE_POINTWISE,                            \
     .meta = __VA_ARGS__}

const th_opdef th__ops_cast[] = {
    {.name = "to",
     .params = "input, first=None, second=None, third=None, fourth=None, *, device=None, dtype=None, "
               "non_blocking=False, copy=False",
     .names = "torch.Tensor.to",
     .fusion = TH_FUSE_POINTWISE,
     .meta = to,
     .grad = th__grad_convert},
    CAST("float", to_float, .grad = th__grad_convert),
    CAST("half", to_half, .grad = th__grad_convert),
    CAST("bfloat16", to_bfloat16, .grad = th__grad_convert),
    CAST("double", to_double, .grad = th__grad_convert),
    CAST("int", to_int),
    CAST("long", to_long),
    CAST("short", to_short),
    CAST("char", to_char),
    CAST("byte", to_byte),
    CAST("bool", to_bool),
    {.name = "type_as",
     .params = "input, other",
     .names = "torch.Tensor.type_as",
     .fusion = TH_FUSE_POINTWISE,
     .meta = type_as,
     .grad = th__grad_convert},
    {.name = "contiguous",
     .params = "input, memory_format=torch.contiguous_format",
     .names = "torch.Tensor.contiguous",
     .fusion = TH_FUSE_POINTWISE,
     .meta = contiguous,
     .grad = th__grad_convert},
    {.name = "clone",
     .params = "input, *, memory_format=torch.preserve_format",
     .names = "torch.clone torch.Tensor.clone",
     .fusion = TH_FUSE_POINTWISE,
     .meta = clone,
     .grad = th__grad_convert},
    {.name = "detach",
     .params = "input",
     .names = "torch.detach torch.Tensor.detach torch.Tensor.data.__get__",
     .effects = TH_OPDEF_VIEW,
     .fusion = TH_FUSE_VIEW,
     .meta = detach,
     .grad = th__grad_detach},
};
const size_t th__ops_cast_count = sizeof th__ops_cast / sizeof *th__ops_cast;
