/* The catalogue: one block per operator, by family, in src/ops/<family>.op.c.
 *
 * An operator that is not in the catalogue is still a trace operation; the catalogue adds what is known about one:
 * its names, parameters, effects, how it fuses, and the rule that answers shapes ("meta rule").
 */
#ifndef THUNDER_OPS_H
#define THUNDER_OPS_H

#include "thunder/ir.h"

typedef enum th_fusion {
    TH_FUSE_OPAQUE = 1,
    TH_FUSE_POINTWISE,
    TH_FUSE_REDUCTION,
    TH_FUSE_VIEW,
    TH_FUSE_MATMUL,
    TH_FUSE_GATHER,
    TH_FUSE_FACTORY
} th_fusion;

enum {                        /* th_opdef.effects, beyond TH_FX_* */
       TH_OPDEF_INPLACE = 32, /* writes its first parameter and returns it */
       TH_OPDEF_VIEW = 64,    /* the result may share storage with the first parameter */
       TH_OPDEF_RAISES = 128, /* its kernel may find an error in the values: an index out of range, a division by 0 */
};

enum { TH_MAX_PARAMS = 16, TH_MAX_RANK = 16, TH_MAX_OUTS = 64 };

typedef struct th_call th_call;

/* Fill call->outs. TH_DECLINED: a case that the rule does not cover, or that torch would refuse: torch itself is asked
 * and gives the answer or its own error. So a rule never has to word an error, and must never guess. */
typedef th_status (*th_meta_fn)(th_call *call);

/* The catalogue's derivative of an operator: src/ops/backward.h. TH_DECLINED: the derivative of this call is derived
 * from torch's own autograd. */
struct th__backward;
typedef th_status (*th_grad_fn)(struct th__backward *b);

typedef struct th_opdef {
    const char *name;   /* short name, unique in the catalogue: "linear" */
    const char *params; /* "input, weight, bias=None"; "*" before keyword-only ones; "*sizes" collects the rest;
                           every overload that Python's call allows and the rule does not understand must be declined */
    const char *names;  /* every dotted Python name that means exactly this, separated by spaces */
    uint8_t effects;    /* TH_FX_*, TH_OPDEF_* */
    uint8_t fusion;     /* th_fusion */
    th_meta_fn meta;
    th_grad_fn grad;        /* NULL: derived */
    th_grad_fn forward;     /* what takes its place where `grad` needs more than its results (statistics, a mask) */
    const char *functional; /* TH_OPDEF_INPLACE: dotted name of the functional twin: torch.Tensor.add_ -> torch.add */
} th_opdef;

typedef struct th_out {
    th_typeref type;
    th_val alias_of; /* value whose storage this shares; 0: fresh storage */
    int64_t offset;  /* storage offset in elements when it shares */
    bool same;       /* the operation returns its input itself (contiguous() of a contiguous tensor) */
} th_out;

enum {                               /* th_call.facts: what this torch does, found out by trying it */
       TH_FACT_FLASH_LIKE_QUERY = 1, /* CPU flash attention lays its result out like the query */
       TH_FACT_FLASH_BLHD = 2,       /* ... always as (batch, length, head, size) */
       TH_FACT_GELU_DOUBLES = 4,     /* CPU gelu of several numbers is nan at infinity */
};

struct th_call {
    th_trace *trace; /* for values, nodes and the context */
    const th_opdef *def;
    th_node arg[TH_MAX_PARAMS]; /* by parameter; 0 when not given */
    uint32_t nparams;
    th_dtype default_dtype; /* torch.get_default_dtype() at capture */
    th_dev default_device;  /* torch.get_default_device() */
    bool grad_mode;
    uint32_t facts; /* TH_FACT_* */
    th_out outs[TH_MAX_OUTS];
    uint32_t nouts;
    bool outs_list; /* the operation returns a tuple or list (chunk, split, max with a dim) */
};

size_t th_catalog_size(void);
const th_opdef *th_catalog_get(size_t index);

/* An index of the catalogue over a context's interned names; build once per context. Refuses duplicate names. */
typedef struct th_catalog th_catalog;
th_status th_catalog_new(th_ctx *ctx, th_catalog **out);
void th_catalog_free(th_catalog *c);
const th_opdef *th_catalog_find(const th_catalog *c, th_str dotted); /* NULL when not catalogued */

/* Bind call arguments to parameters (positional, keyword, `*rest` collected into a TUPLE node). TH_DECLINED when they
 * do not fit. */
th_status th_call_bind(th_call *call, const th_opdef *def, th_trace *t, th_node args, th_node kwargs);

#endif
