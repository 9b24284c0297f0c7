/* Element types, and the interned types of values.
 *
 * A type is one arena block: content hash, th_type, then shape and strides. It lives as long as the context.
 */
#include "base/hash.h"
#include "ir/ir.h"

#include <string.h>

/* ---- element types ---- */

const th_dtype_info *th_dtype_get(th_dtype d) {
    static const th_dtype_info infos[] = {
        {"", "", 0, 0},
#define TH_DTYPE(name, text, torch, bytes, class_) {text, torch, bytes, class_},
#include "thunder/dtype.def"
#undef TH_DTYPE
    };
    return &infos[(unsigned)d < TH_DTYPE_COUNT ? d : TH_DTYPE_NONE];
}

static bool same_text(const char *z, const char *text, size_t length) {
    return strlen(z) == length && memcmp(z, text, length) == 0;
}

th_dtype th_dtype_from_text(const char *text, size_t length) {
    for (int d = 1; d < TH_DTYPE_COUNT; d++) {
        if (same_text(th_dtype_get((th_dtype)d)->text, text, length)) return (th_dtype)d;
    }
    return TH_DTYPE_NONE;
}

th_dtype th_dtype_from_torch(const char *name, size_t length) {
    static const struct {
        const char *name;
        th_dtype dtype;
    } second_names[] = {{"half", TH_F16}, {"float", TH_F32}, {"double", TH_F64}, {"short", TH_I16},   {"int", TH_I32},
                        {"long", TH_I64}, {"chalf", TH_C32}, {"cfloat", TH_C64}, {"cdouble", TH_C128}};
    for (int d = 1; d < TH_DTYPE_COUNT; d++) {
        if (same_text(th_dtype_get((th_dtype)d)->torch_name, name, length)) return (th_dtype)d;
    }
    for (size_t i = 0; i < sizeof second_names / sizeof *second_names; i++) {
        if (same_text(second_names[i].name, name, length)) return second_names[i].dtype;
    }
    return TH_DTYPE_NONE;
}

/* ---- types of values ---- */

typedef struct type_item {
    uint64_t hash;
    th_type type;
    int64_t dims[]; /* shape, then strides */
} type_item;

static bool type_same(const void *item, const void *key) {
    const th_type *a = &((const type_item *)item)->type, *b = key;
    size_t dims = a->ndim * sizeof *a->shape;
    if (a->kind != b->kind || a->dtype != b->dtype || a->flags != b->flags || a->device != b->device) return false;
    if (a->ndim != b->ndim || dims == 0) return a->ndim == b->ndim;
    return memcmp(a->shape, b->shape, dims) == 0 && memcmp(a->stride, b->stride, dims) == 0;
}

static uint64_t type_hash(const th_ctx *ctx, const th_type *type) {
    uint64_t hash = th__hash_mix(type->kind, (uint64_t)type->dtype << 8 | type->flags);
    if (type->kind != TH_TYPE_TENSOR) return hash;
    hash = th__hash_mix(hash, th__device_hash(ctx, type->device));
    hash = th__hash_bytes(hash, type->shape, type->ndim * sizeof *type->shape);
    return th__hash_bytes(hash, type->stride, type->ndim * sizeof *type->stride);
}

static th_typeref type_intern(th_ctx *ctx, const th_type *type) {
    uint64_t hash = type_hash(ctx, type);
    th_typeref found = th__pool_find(&ctx->types, hash, type_same, type);
    if (found) return found;
    size_t dims = type->ndim * sizeof *type->shape;
    type_item *item = th__arena_take(ctx, sizeof *item + 2 * dims);
    if (!item) return 0;
    item->hash = hash;
    item->type = *type;
    item->type.shape = item->dims;
    item->type.stride = item->dims + type->ndim;
    if (dims) {
        memcpy(item->dims, type->shape, dims);
        memcpy(item->dims + type->ndim, type->stride, dims);
    }
    return th__pool_add(ctx, &ctx->types, hash, item);
}

/* Row-major strides; false when the number of elements does not fit 63 bits. */
static bool row_major(uint32_t ndim, const int64_t *shape, int64_t *stride) {
    int64_t step = 1;
    for (uint32_t i = ndim; i-- > 0;) {
        stride[i] = step;
        if (shape[i] > 1 && __builtin_mul_overflow(step, shape[i], &step)) return false;
    }
    return true;
}

th_typeref th_type_tensor(th_ctx *ctx, th_dtype dtype, th_dev device, uint32_t ndim, const int64_t *shape,
                          const int64_t *stride, uint8_t flags) {
    int64_t few[16], *plain = few;
    th_typeref made = 0;
    if (!device) return 0; /* th_device recorded why there is none */
    if (dtype == TH_DTYPE_NONE || (unsigned)dtype >= TH_DTYPE_COUNT) {
        th_fail(ctx, TH_EINVAL, "a tensor type needs a dtype");
        return 0;
    }
    for (uint32_t i = 0; i < ndim; i++) {
        if (shape[i] < 0 || (stride && stride[i] < 0)) {
            th_fail(ctx, TH_EINVAL, "negative size or stride in dimension %u", i);
            return 0;
        }
    }
    if (ndim > sizeof few / sizeof *few) {
        plain = th_ctx_alloc(ctx, NULL, ndim * sizeof *plain);
        if (!plain) {
            th_fail(ctx, TH_ENOMEM, "out of memory");
            return 0;
        }
    }
    if (row_major(ndim, shape, plain)) {
        bool contiguous = !stride || ndim == 0 || memcmp(stride, plain, ndim * sizeof *plain) == 0;
        th_type type = {.kind = TH_TYPE_TENSOR,
                        .dtype = (uint8_t)dtype,
                        .flags = flags,
                        .contiguous = contiguous,
                        .device = device,
                        .ndim = ndim,
                        .shape = shape,
                        .stride = contiguous ? plain : stride};
        made = type_intern(ctx, &type);
    } else {
        th_fail(ctx, TH_ELIMIT, "a tensor of more than 2^63 elements");
    }
    if (plain != few) th_ctx_alloc(ctx, plain, 0);
    return made;
}

th_typeref th_type_plain(th_ctx *ctx, th_type_kind kind) {
    th_type type = {.kind = (uint8_t)kind};
    if (kind == TH_TYPE_NONE || kind == TH_TYPE_TENSOR) {
        th_fail(ctx, TH_EINVAL, "not a plain type");
        return 0;
    }
    return type_intern(ctx, &type);
}

const th_type *th_type_get(const th_ctx *ctx, th_typeref type) {
    static const th_type none = {0};
    const type_item *item = th__pool_get(&ctx->types, type);
    return item ? &item->type : &none;
}

uint64_t th__type_hash(const th_ctx *ctx, th_typeref type) {
    const type_item *item = th__pool_get(&ctx->types, type);
    return item ? item->hash : 0;
}

int64_t th_type_numel(const th_type *type) {
    int64_t count = 1;
    for (uint32_t i = 0; i < type->ndim; i++) {
        if (type->shape[i] == 0) return 0;
        count *= type->shape[i];
    }
    return count;
}

th_typeref th_type_set_grad(th_ctx *ctx, th_typeref ref, bool grad) {
    const th_type *type = th_type_get(ctx, ref);
    uint8_t flags = (uint8_t)(grad ? type->flags | TH_TYPE_REQUIRES_GRAD : type->flags & ~TH_TYPE_REQUIRES_GRAD);
    if (type->kind != TH_TYPE_TENSOR || flags == type->flags) return ref;
    return th_type_tensor(ctx, (th_dtype)type->dtype, type->device, type->ndim, type->shape, type->stride, flags);
}
