/* What the files of this layer share beside the public header: names, type equality across contexts. */
#ifndef THUNDER_IR_IR_H
#define THUNDER_IR_IR_H

#include "base/ctx.h"
#include "thunder/ir.h"

/* ---- names (name.c) ---- */

bool th__name_is_identifier(const char *text, size_t length); /* Python's ASCII identifiers, keywords excluded */
bool th__name_is_dotted(const char *text, size_t length);     /* identifiers with at least one dot between */
/* Names that the text form itself needs, such as torch or slice: no value or opaque entry may have them. */
bool th__name_is_reserved(const char *text, size_t length);

bool th__name_used(const th_trace *t, th_str name);
void th__name_mark(th_trace *t, th_str name);
/* A free identifier from any text: bad characters replaced, made unique with a suffix. 0 when out of memory. */
th_str th__name_unique(th_trace *t, const char *text, size_t length);
th_str th__name_fresh(th_trace *t); /* t0, t1, ... */

/* ---- the trace (trace.c) ---- */

th_status th__trace_fail(th_trace *t, th_status status); /* keep the first failure */

typedef struct th__mark { /* how much of a trace there was */
    uint32_t nvalues, nops, nnodes, nkids;
} th__mark;

th__mark th__trace_mark(const th_trace *t);
void th__trace_rewind(th_trace *t, th__mark to); /* forget what was added since */
/* Under exactly this name, which must be free. */
th_val th__trace_add_value(th_trace *t, th_str name, th_typeref type);
uint32_t th__trace_add_opaque(th_trace *t, th_str name, void *object);
void th__node_define(th_trace *t, th_node outs, th_opref op); /* set def of the values in outs */
th_node th__node_opaque_entry(th_trace *t, uint32_t index);

/* ---- nodes of two traces (compare.c) ---- */

typedef struct th__match {
    const th_trace *a, *b;
    bool (*value)(void *user, th_val a, th_val b); /* is the one in a's place what the other is in b's? */
    void *user;
} th__match;

bool th__nodes_match(const th__match *m, th_node a, th_node b); /* equal but for values */
bool th__callees_match(const th__match *m, const th_op *a, const th_op *b);

/* ---- types (type.c) ---- */

uint64_t th__type_hash(const th_ctx *ctx, th_typeref type); /* content hash */

/* ---- texts (print.c) ---- */

struct th__text;
void th__print_type(struct th__text *out, const th_ctx *ctx, th_typeref type);
const char *th__op_callee(const th_trace *t, const th_op *op);

#endif
