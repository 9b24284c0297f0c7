/* What the passes share: scratch memory, alias groups, and rebuilding the list of operations.
 *
 * A pass that changes operations walks the old list and appends to a new one (th__rewrite): nodes are never changed in
 * place, because two operations may share them. Everything here lives until the pass ends.
 */
#ifndef THUNDER_PASSES_PASS_H
#define THUNDER_PASSES_PASS_H

#include "ir/ir.h"
#include "thunder/passes.h"

/* ---- scratch memory: freed at once ---- */

typedef struct th__scratch {
    th_ctx *ctx;
    struct th__scratch_block *blocks;
} th__scratch;

void *th__scratch_zeroed(th__scratch *s, size_t count, size_t size); /* NULL when out of memory (recorded) */
void th__scratch_fini(th__scratch *s);

/* ---- alias groups ---- */

enum {
    TH__GROUP_INPUT = 1,    /* an input is a member */
    TH__GROUP_WRITTEN = 2,  /* some operation writes a member */
    TH__GROUP_RETURNED = 4, /* a member is in the result */
    TH__GROUP_ESCAPES =
        8, /* used by an operation that touches outside state or returns an object: it may be kept there */
};

/* The number of a value's group: its alias number, or one of its own. */
static inline uint32_t th__group_of(const th_trace *t, th_val v) {
    return t->values[v].alias ? t->values[v].alias : t->next_alias + v;
}
static inline uint32_t th__group_count(const th_trace *t) { return t->next_alias + t->nvalues; }
uint8_t *th__groups(th_trace *t, th__scratch *s);  /* flags by group; NULL when out of memory */
int64_t th__bytes_of(const th_trace *t, th_val v); /* of a tensor, if it were dense; 0: it is none */

/* Does an operation before `end` write the value, or memory that it shares? */
bool th__is_written(const th_trace *t, th_val v, th_opref end);

/* ---- rewriting ---- */

typedef struct th__rewrite {
    th_trace *t;
    th_op *ops; /* the old list; t->ops is the new one */
    uint32_t nops;
    uint32_t nvalues; /* values that existed at the start; the arrays below are that long */
    th_val *value;    /* what a value is replaced by; 0: itself */
    th_node *node;    /* or a literal that replaces it; 0: none */
    bool *keep_alive; /* a value that may no longer be deleted where it was */
    th__scratch scratch;
} th__rewrite;

th_status th__rewrite_begin(th__rewrite *r, th_trace *t);
/* The node with its values replaced; the same node when nothing changes. */
th_node th__rewrite_node(th__rewrite *r, th_node n);
/* Append an old operation with its values replaced. Deleted values that are gone are left out. */
th_opref th__rewrite_copy(th__rewrite *r, const th_op *op);
/* Replace the result, free everything. On a status that is not TH_OK the trace is unspecified. */
th_status th__rewrite_end(th__rewrite *r, th_status status);

/* Append an operation as it is; sets def of its outs. */
th_opref th__op_push(th_trace *t, const th_op *op);

/* Is the callee of a call this dotted name? */
bool th__op_is(const th_trace *t, const th_op *op, const char *dotted);

/* An effect on the run alone: it compares what it reads with what the program was captured for, and keeps nothing. */
bool th__op_only_reads(const th_trace *t, const th_op *op);

/* Does its name say that it changes its argument: add_, torch.ops.aten.squeeze_.dim? Not whether it does. */
bool th__op_named_in_place(const th_trace *t, const th_op *op);

/* Could a kernel raise, for the values that it meets or since torch has none for these dtypes? No, where a rule of the
 * catalogue answers and says nothing else; and no for a view, which is no kernel. */
struct th_catalog;
th_status th__op_may_raise(const struct th_catalog *catalog, th_trace *t, th_opref op, bool *raises); /* dce.c */

/* The n-th positional argument, or the keyword argument of that name; 0 when not given. NULL name: positional only. */
th_node th__op_arg(const th_trace *t, const th_op *op, uint32_t n, const char *name);
th_val th__node_as_value(const th_trace *t, th_node n); /* 0 when it is no value */

/* The value that the operation returns, the very same tensor: `to` the same dtype, dropout outside training. 0: none.
 */
th_val th__op_returns_input(const th_trace *t, const th_op *op); /* noop.c */

/* The name that a report gives an operation: its first value, or its callee. */
const char *th__op_label(const th_trace *t, const th_op *op);

#endif
