/* The trace: a flat list of operations over typed values, and its one text form.
 *
 * Everything is addressed by 32-bit index into the trace's arrays; index 0 of values, ops and nodes
 * is reserved as "none". Arrays may move when they grow: keep indices, not pointers, across calls
 * that add. A trace owns its arrays; interned strings and types belong to the context.
 *
 * Text (the grammar is docs/ir.md; the text is valid Python):
 *
 *   def computation(x: "cpu f32[16, 64]", w: "cpu f32[128, 64] grad"):
 *       t0: "cpu f32[16, 128]" = torch.nn.functional.linear(x, w)  # model.py:12
 *       t1: "cpu f32[8, 128]; alias 1"
 *       t2: "cpu f32[8, 128]; alias 1; offset 1024"
 *       t1, t2 = torch.chunk(t0, 2)
 *       t3: "cpu f32[8, 128]; alias 1; writes t1" = torch.Tensor.add_(t1, 1.0)
 *       _: "writes t2" = torch.Tensor.__setitem__(t2, (0, slice(None, None, None)), 0.5)
 *       t4: "cpu f32[16, 128]; random" = torch.nn.functional.dropout(t0, 0.5, True)
 *       del t0
 *       return t4
 */
#ifndef THUNDER_IR_H
#define THUNDER_IR_H

#include "thunder/base.h"

typedef uint32_t th_typeref; /* interned type */
typedef uint32_t th_val;     /* value of a trace */
typedef uint32_t th_opref;   /* operation of a trace */
typedef uint32_t th_node;    /* argument node of a trace */

typedef enum th_dtype {
    TH_DTYPE_NONE,
#define TH_DTYPE(name, text, torch, bytes, class_) TH_##name,
#include "thunder/dtype.def"
#undef TH_DTYPE
    TH_DTYPE_COUNT
} th_dtype;

typedef struct th_dtype_info {
    const char *text, *torch_name;
    uint8_t bytes;
    char class_; /* 'b','u','i','f','c' */
} th_dtype_info;
const th_dtype_info *th_dtype_get(th_dtype d);
th_dtype th_dtype_from_text(const char *text, size_t length);  /* "f32"; TH_DTYPE_NONE when unknown */
th_dtype th_dtype_from_torch(const char *name, size_t length); /* "float32" */

/* ---- types ---- */

typedef enum th_type_kind {
    TH_TYPE_NONE,
    TH_TYPE_TENSOR,
    TH_TYPE_INT,
    TH_TYPE_FLOAT,
    TH_TYPE_BOOL,
    TH_TYPE_OBJECT
} th_type_kind;
enum { TH_TYPE_REQUIRES_GRAD = 1 };

typedef struct th_type {
    uint8_t kind, dtype, flags;
    bool contiguous; /* strides are the row-major ones (exactly; sizes 0 and 1 included) */
    th_dev device;
    uint32_t ndim;
    const int64_t *shape, *stride; /* ndim entries each; strides in elements */
} th_type;

/* stride NULL means row-major contiguous: stride[i] = product of max(shape[j], 1) for j > i. 0 when out of memory. */
th_typeref th_type_tensor(th_ctx *ctx, th_dtype dtype, th_dev device, uint32_t ndim, const int64_t *shape,
                          const int64_t *stride, uint8_t flags);
th_typeref th_type_plain(th_ctx *ctx, th_type_kind kind); /* TH_TYPE_INT and the like */
const th_type *th_type_get(const th_ctx *ctx, th_typeref type);
int64_t th_type_numel(const th_type *type);
th_typeref th_type_set_grad(th_ctx *ctx, th_typeref type,
                            bool grad); /* the type with or without TH_TYPE_REQUIRES_GRAD */

/* ---- argument nodes ---- */

typedef enum th_node_kind {
    TH_N_ABSENT, /* kind of node 0 */
    TH_N_NONE,
    TH_N_BOOL,    /* i */
    TH_N_INT,     /* i */
    TH_N_FLOAT,   /* f; inf and nan print as float("inf") */
    TH_N_COMPLEX, /* f, f2; prints as complex(re, im) */
    TH_N_STR,     /* ref: th_str */
    TH_N_DTYPE,   /* ref: th_dtype; prints as torch.float32 */
    TH_N_DEVICE,  /* ref: th_dev; prints as torch.device("cuda", 0) or torch.device("cpu") */
    TH_N_SYMBOL,  /* ref: th_str, a dotted global such as torch.strided or torch.channels_last */
    TH_N_VALUE,   /* ref: th_val */
    TH_N_TUPLE,   /* kids */
    TH_N_LIST,    /* kids */
    TH_N_DICT,    /* kids: key, value, key, value */
    TH_N_SLICE,   /* three kids */
    TH_N_ELLIPSIS,
    TH_N_OPAQUE /* ref: index into the trace's opaque table; prints as the entry's name */
} th_node_kind;

enum { TH_MAX_DEPTH = 200 }; /* of nested argument nodes; deeper is TH_ELIMIT */

typedef struct th_node_data {
    uint8_t kind;
    uint8_t depth;   /* 0 for a leaf, else 1 + the deepest kid's */
    uint16_t number; /* of TH_N_INT: above 0, it is that number of what the program computes of sizes, from 1 */
    uint32_t count;  /* number of kids */
    union {
        int64_t i;
        double f;
        uint32_t ref;
        uint32_t kids; /* offset into th_trace.kids */
    } u;
    double f2; /* imaginary part of TH_N_COMPLEX; of TH_N_FLOAT: above 0, it is that number of those followed, from 1 */
} th_node_data;

/* ---- values, operations ---- */

typedef struct th_value {
    th_str name;
    th_typeref type;
    th_opref def;   /* producing operation; 0 for an input */
    uint32_t alias; /* values with the same non-zero number share storage; 0 shares with nobody */
    th_node node;   /* the node that stands for it; 0 when none was asked for yet */
    int64_t offset; /* storage offset in elements, counted from the storage's start */
} th_value;

enum {                   /* effects of one operation */
       TH_FX_RANDOM = 1, /* draws from a random number generator: never merged, never folded */
       TH_FX_WRITES = 2, /* writes the values in its writes list */
       TH_FX_STATE = 4,  /* touches state outside the trace: never removed, merged or moved; text: "effect" */
};

enum {                        /* marks of one operation: what a derivative and other passes do with it */
       TH_MARK_NO_GRAD = 1,   /* ran while gradients were off: its results require none */
       TH_MARK_LATE = 4,      /* in a rule: ran backwards */
       TH_MARK_RECOMPUTE = 2, /* inside torch.utils.checkpoint: run again in the backward pass, not saved */
       TH_MARK_SIZED = 8,     /* may meet other sizes than stated, and fail for them: stays, also when it is dead */
       TH_MARK_RAISES = 16,   /* nobody uses it, and its kernel may raise as eager's would: stays */
       TH_MARK_GRAD_OFF = 32, /* while it is captured: gradients were off, whatever its inputs require */
};

typedef enum th_op_kind { TH_OP_CALL = 1, TH_OP_DEL } th_op_kind;

typedef struct th_op {
    uint8_t kind, effects, marks;
    bool outs_list; /* the callee returns a list or tuple even when there is one output: prints "(t0,) = ..." */
    th_str callee;  /* dotted name: torch.nn.functional.linear; or the name of an opaque entry (see callee_opaque) */
    uint32_t callee_opaque; /* index into the opaque table when the callee is a Python object without importable name */
    th_node args;           /* TUPLE; for TH_OP_DEL a TUPLE of values */
    th_node kwargs;         /* DICT with TH_N_STR keys, or 0 */
    th_node outs;           /* VALUE, or TUPLE (nested) of VALUE and NONE ("_": result that nobody can use), or 0 */
    uint32_t writes, nwrites; /* range in th_trace.kids that holds th_val */
    th_str file;              /* the user's source line; 0 when unknown */
    uint32_t line;
    uint32_t def; /* cached catalogue entry + 1 (see ops.h); 0 when not looked up; not part of the text */
} th_op;

/* A foreign object that an operation needs. The core only keeps it alive. */
typedef struct th_opaque {
    th_str name;  /* unique in the trace; an identifier */
    void *object; /* NULL in a parsed trace */
} th_opaque;      /* entry 0 is reserved, as everywhere */
typedef struct th_opaque_vtable {
    void (*retain)(void *object);
    void (*release)(void *object);
} th_opaque_vtable;

typedef struct th_trace {
    th_ctx *ctx;
    th_str name;
    th_str note; /* comment line above the def: "after dce (0.03 ms)"; kept by parse and print, not compared */
    th_value *values;
    uint32_t nvalues, cap_values; /* nvalues counts the reserved entry 0 */
    th_op *ops;
    uint32_t nops, cap_ops;
    th_node_data *nodes;
    uint32_t nnodes, cap_nodes;
    uint32_t *kids; /* pool of node children (th_node) and writes lists (th_val) */
    uint32_t nkids, cap_kids;
    th_val *inputs;
    uint32_t ninputs, cap_inputs;
    th_opaque *opaques;
    uint32_t nopaques, cap_opaques;
    th_opaque_vtable opaque_vtable;
    th_node none;   /* the node of None; 0 when none was asked for yet */
    th_node result; /* what is returned: any node; 0 returns None */
    uint32_t next_name, next_alias;
    th_status sticky; /* first failed allocation; checked by th_trace_status so that builders need no checks between */
    uint32_t *used_names; /* bit set over th_str: names of values and opaque entries */
    uint32_t cap_used_names;
} th_trace;

/* Builders return 0 and set the sticky status when memory runs out; passing 0 on is harmless. */
th_trace *th_trace_new(th_ctx *ctx, const char *name);
void th_trace_free(th_trace *t);
th_status th_trace_status(const th_trace *t);
th_status th_trace_clone(const th_trace *t, th_trace **out);
void th_trace_set_opaque_vtable(th_trace *t, th_opaque_vtable vtable);

/* Name 0: a fresh "t<n>"; any other is made an identifier that is free, with a suffix if need be. */
th_val th_trace_value(th_trace *t, th_str name, th_typeref type);
th_val th_trace_input(th_trace *t, th_str name, th_typeref type); /* the same, and appends to the inputs */
uint32_t th_trace_alias(th_trace *t);                             /* a fresh alias group number */

th_node th_node_none(th_trace *t);
th_node th_node_bool(th_trace *t, bool b);
th_node th_node_int(th_trace *t, int64_t i);
th_node th_node_extent(th_trace *t, int64_t i, uint16_t number); /* of what the program computes of sizes, from 1 */
bool th_node_has_extent(const th_trace *t, th_node node);
th_node th_node_float(th_trace *t, double f);
th_node th_node_complex(th_trace *t, double re, double im);
th_node th_node_str(th_trace *t, th_str s);
th_node th_node_dtype(th_trace *t, th_dtype d);
th_node th_node_device(th_trace *t, th_dev d);
th_node th_node_symbol(th_trace *t, th_str dotted);
th_node th_node_value(th_trace *t, th_val v);
th_node th_node_ellipsis(th_trace *t);
th_node th_node_seq(th_trace *t, th_node_kind kind, uint32_t n, const th_node *kids); /* TUPLE, LIST, DICT, SLICE */
/* A node of another trace of the same context, with its values replaced: map is by value of `from`. */
th_node th_node_import(th_trace *t, const th_trace *from, th_node n, const th_val *map);
th_node th_node_opaque(th_trace *t, const char *hint, void *object);   /* same object: same entry; retains it */
uint32_t th_trace_opaque(th_trace *t, const char *hint, void *object); /* the entry's index */

typedef struct th_op_args { /* arguments of th_trace_op; zero what does not apply */
    th_op_kind kind;
    th_str callee;
    uint32_t callee_opaque;
    th_node args, kwargs, outs;
    bool outs_list;
    uint8_t effects, marks;
    uint32_t nwrites;
    const th_val *writes;
    th_str file;
    uint32_t line;
} th_op_args;
/* Appends; sets def of the outs' values. Outs are normalised: NONE or an empty TUPLE become 0, one VALUE with outs_list
 * a TUPLE; absent args become an empty TUPLE. TH_FX_WRITES follows from nwrites. */
th_opref th_trace_op(th_trace *t, const th_op_args *op);

/* Call fn for each value used (args, kwargs, writes) or defined (outs) by an operation; a pointer so that it may be
 * rewritten. */
typedef void (*th_value_fn)(void *user, th_val *value);
void th_op_each_use(th_trace *t, th_opref op, th_value_fn fn, void *user);
bool th_op_uses(th_trace *t, th_opref op, th_val value);
void th_op_each_out(th_trace *t, th_opref op, th_value_fn fn, void *user);
void th_node_each_value(th_trace *t, th_node n, th_value_fn fn, void *user);

/* Compare without names, notes and source lines; hash likewise. Opaque objects compare by identity, entries without an
 * object by name. Out of memory (recorded): not equal, and hash 0. */
bool th_trace_equal(const th_trace *a, const th_trace *b);
uint64_t th_trace_hash(const th_trace *t);

/* Text. print: *out is NUL-terminated, from the context's allocator; free with th_ctx_alloc(ctx, p, 0). */
th_status th_trace_print(const th_trace *t, char **out, size_t *length);
th_status th_trace_parse(th_ctx *ctx, const char *text, size_t length, th_trace **out);
th_status th_type_print(const th_ctx *ctx, th_typeref type, char *buffer, size_t size);

/* Well-formedness: every use after its definition and before its del, defs unique, nodes in range, kwargs keyed by
 * strings, outs of the right form, writes name values of alias groups that exist, names unique. */
th_status th_trace_verify(const th_trace *t);

#endif
