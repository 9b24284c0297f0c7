/* What meta rules are written with: reading bound arguments, stating results, and torch's arithmetic on shapes,
 * strides and dtypes.
 *
 * Every reader declines what a rule would have to guess about: a value that is not a plain tensor on a device whose
 * kernels our rules were compared with (cpu, cuda), a complex or rare dtype, a boolean where torch wants an int. So a
 * rule reads as the list of cases that it answers:
 *
 *     static th_status transpose(th_call *call) {
 *         th__tensor x;
 *         uint32_t a, b;
 *         TRY(th__arg_tensor(call, 0, &x));
 *         TRY(th__arg_dim(call, 1, x.ndim, &a));
 *         ...
 *         return th__out_view(call, &x, x.ndim, shape, stride, 0);
 *     }
 *
 * Shapes and strides of a th__tensor are interned: they live as long as the context.
 */
#ifndef THUNDER_OPS_META_H
#define THUNDER_OPS_META_H

#include "base/ctx.h"
#include "thunder/ops.h"

#define DECLINE_IF(condition)              \
    do {                                   \
        if (condition) return TH_DECLINED; \
    } while (0)

typedef struct th__tensor {
    th_val value;
    th_typeref ref;
    th_dtype dtype;
    th_dev device;
    uint32_t ndim;
    const int64_t *shape, *stride;
    bool contiguous; /* exactly row-major, as th_type's */
    bool grad;       /* requires_grad */
} th__tensor;

typedef struct th__dims { /* a shape, or a list of dimensions */
    uint32_t n;
    int64_t at[TH_MAX_RANK];
} th__dims;

/* ---- arguments ---- */

static inline const th_node_data *th__node(const th_call *call, th_node node) { return &call->trace->nodes[node]; }
static inline const th_node_data *th__arg(const th_call *call, uint32_t i) { return th__node(call, call->arg[i]); }
static inline bool th__has(const th_call *call, uint32_t i) { return th__arg(call, i)->kind > TH_N_NONE; }
static inline th_node th__kid(const th_call *call, const th_node_data *d, uint32_t i) {
    return call->trace->kids[d->u.kids + i];
}
static inline bool th__is_sequence(const th_node_data *d) { return d->kind == TH_N_TUPLE || d->kind == TH_N_LIST; }
static inline bool th__is_number(const th_node_data *d) { return d->kind >= TH_N_BOOL && d->kind <= TH_N_FLOAT; }

th_status th__node_tensor(const th_call *call, th_node node, th__tensor *x);
th_status th__node_ints(const th_call *call, th_node node, th__dims *out); /* a sequence of ints */

th_status th__arg_tensor(const th_call *call, uint32_t i, th__tensor *x);
/* Absent arguments take the fallback; None is declined. */
th_status th__arg_bool(const th_call *call, uint32_t i, bool fallback, bool *out);
th_status th__arg_int(const th_call *call, uint32_t i, int64_t fallback, int64_t *out);
th_status th__arg_dtype(const th_call *call, uint32_t i, th_dtype fallback, th_dtype *out); /* None: the fallback */
th_status th__arg_dim(const th_call *call, uint32_t i, uint32_t ndim, uint32_t *out);       /* required; wraps */
th_status th__arg_ints(const th_call *call, uint32_t i, th__dims *out); /* one int or a sequence; required */
/* `*size`: (2, 3), ((2, 3),) or, by keyword, the sequence itself. */
th_status th__arg_size(const th_call *call, uint32_t i, th__dims *out);
/* The list of tensors of cat and stack. */
th_status th__arg_tensors(const th_call *call, uint32_t i, uint32_t cap, th__tensor *xs, uint32_t *n);
bool th__arg_is_symbol(const th_call *call, uint32_t i, const char *dotted);

th_status th__wrap(int64_t dim, uint32_t ndim, uint32_t *out); /* -1 means the last; a rank of 0 counts as 1 */
/* Bits of the dimensions in a list; declines repeated ones. */
th_status th__dim_set(const th__dims *dims, uint32_t ndim, uint32_t *set);

/* ---- results ---- */

/* A new tensor; stride NULL means row-major. */
th_status th__out_fresh(th_call *call, th_dtype dtype, th_dev device, uint32_t ndim, const int64_t *shape,
                        const int64_t *stride);
/* A new tensor of x's shape that keeps x's order of dimensions, as empty_like and clone do. */
th_status th__out_like(th_call *call, const th__tensor *x, th_dtype dtype, th_dev device);
/* Does a kernel that follows channels_last do so for x? Declines what was not compared: CUDA, 5 dimensions. */
th_status th__follow_format(const th_call *call, const th__tensor *x, bool *channels_last);
/* A new tensor of x's rank and dtype, row-major or in channels_last. */
th_status th__out_format(th_call *call, const th__tensor *x, const int64_t *shape, bool channels_last);
/* A view of x that starts `skip` elements into it. */
th_status th__out_view(th_call *call, const th__tensor *x, uint32_t ndim, const int64_t *shape, const int64_t *stride,
                       int64_t skip);
th_status th__out_same(th_call *call, const th__tensor *x); /* x itself */
/* x after an in-place operation; declines what torch refuses to write to. */
th_status th__out_written(th_call *call, const th__tensor *x);

/* ---- dtypes ---- */

static inline char th__class(th_dtype d) { return th_dtype_get(d)->class_; }
static inline bool th__is_float(th_dtype d) { return d >= TH_F16 && d <= TH_F64; }
static inline bool th__is_int(th_dtype d) { return d == TH_U8 || (d >= TH_I8 && d <= TH_I64); }
static inline bool th__is_plain(th_dtype d) { return d == TH_BOOL || th__is_int(d) || th__is_float(d); }
th_dtype th__promote(th_dtype a, th_dtype b); /* of plain dtypes; either may be TH_DTYPE_NONE */
bool th__can_cast(th_dtype from, th_dtype to);
/* A Python number that this dtype holds: torch refuses some others, so rules decline them. */
bool th__fits(const th_node_data *number, th_dtype dtype);

/* ---- devices ---- */

bool th__is_device(const th_call *call, th_dev device, const char *type);
static inline bool th__is_cpu(const th_call *call, const th__tensor *x) {
    return th__is_device(call, x->device, "cpu");
}

/* ---- shapes and strides ---- */

int64_t th__numel(uint32_t ndim, const int64_t *shape);
bool th__is_contiguous(const th__tensor *x);          /* torch's sense: sizes 0 and 1 do not matter */
bool th__is_channels_last(const th__tensor *x);       /* contiguous in channels_last, 4 dimensions */
bool th__suggests_channels_last(const th__tensor *x); /* suggest_memory_format() is not contiguous */
bool th__is_dense(uint32_t ndim, const int64_t *shape, const int64_t *stride); /* non-overlapping and dense */
void th__row_major(uint32_t ndim, const int64_t *shape, int64_t *stride);
void th__channels_last(uint32_t ndim, const int64_t *shape, int64_t *stride);                  /* 4 or 5 dimensions */
void th__dense_like(uint32_t ndim, const int64_t *shape, const int64_t *stride, int64_t *out); /* infer_dense_strides */
th_status th__broadcast(th__dims *shape, uint32_t ndim, const int64_t *other);
/* Replace a -1; declines sizes that do not give numel. */
th_status th__infer_size(th__dims *shape, int64_t numel);
/* Strides of a view of x in another shape; false when only a copy can have it. */
bool th__view_strides(uint32_t ndim, const int64_t *shape, const int64_t *stride, const th__dims *to, int64_t *out);

#endif
