/* Sizes that change from call to call: sizes.c. */
#ifndef THUNDER_SIZES_H
#define THUNDER_SIZES_H

#include "capture.h"
#include "lower.h"
#include "structure.h"

typedef struct thx_term { /* a number that a program computes of sizes */
    uint8_t op;           /* as thunder._sizes.OPERATIONS */
    bool condition;       /* it has to be what it was at capture */
    bool early;           /* arguments tell it before the program runs */
    bool of_int;          /* an int among the arguments has part in it */
    bool of_a, of_b;      /* operands are numbers, by place */
    int64_t a, b;         /* operands; of a size: the value of the captured trace, and the dimension */
    int64_t value;        /* at capture */
    int32_t leaf;         /* of a size of an argument: which tensor; of an int: which number; otherwise -1 */
} thx_term;

typedef struct thx_dry thx_dry;

typedef struct thx_sizes {
    uint32_t count;
    thx_dry *dry;  /* the program cannot begin anew: whether it holds is found out before; or NULL (owned) */
    bool trusting; /* the caller guarantees that sizes decide nothing: conditions do not count */
    bool steady;   /* no operation depends on them, only what the program writes to Python's state: it fits always */
    bool *varies;  /* by value of the final trace: its sizes or strides are others for other sizes; owned */
    thx_term terms[];
} thx_sizes;

static inline uint32_t thx_sizes_count(const thx_sizes *z) { return z ? z->count : 0; }

/* ---- while a capture follows sizes ---- */
PyObject *thx_sizes_new(thx *x); /* a thunder._sizes.Sizes */
th_node thx_extent_node(thx *x, th_trace *t, PyObject *extent);
PyObject *thx_extent_plain(PyObject *extent); /* an int */
bool thx_holds_extent(thx *x, PyObject *tuple);
int thx_describe_extent(thx_spec *spec, PyObject *extent);
/* What a query about a tensor is answered: sizes that change are extents. Takes `answer`. */
PyObject *thx_sizes_answer(thx_recorder *r, const thx_func *f, PyObject *args, PyObject *kwargs, PyObject *answer);
/* The operation `name` gave its input back and was not recorded: would it for other sizes? */
int thx_sizes_copied(thx_recorder *r, const char *name, PyObject *tensor);
int thx_sizes_untouched(thx_recorder *r, const char *name, PyObject *kwargs, PyObject *tensor);
void thx_sizes_spoil(thx_recorder *r, const char *why); /* the program holds for these sizes alone */

/* ---- sizes_run.c ---- */
enum { /* thunder._sizes.OPERATIONS */
       THX_T_SIZE,
       THX_T_ARGUMENT,
       THX_T_ADD,
       THX_T_SUB,
       THX_T_MUL,
       THX_T_FLOORDIV,
       THX_T_MOD,
       THX_T_NEG,
       THX_T_ABS,
       THX_T_LT,
       THX_T_LE,
       THX_T_GT,
       THX_T_GE,
       THX_T_EQ,
       THX_T_NE
};
#define THX_EXTENT_CALLEE "thunder._kernels.extent"
#define THX_FIXED_CALLEE  "thunder._kernels.expect_sizes"
#define THX_LAYOUT_CALLEE "thunder._kernels.expect_contiguous"
#define THX_COPIED_CALLEE "thunder._kernels.expect_not_contiguous"
enum { /* marks: where a size becomes known, sizes that may not change, a tensor that is contiguous, one that is not */
       THX_MARK_SIZE = 1,
       THX_MARK_FIXED,
       THX_MARK_LAYOUT,
       THX_MARK_COPIED
};
int thx_mark_kind(const th_trace *t, const th_op *op);
const th_node_data *thx_mark_argument(const th_trace *t, const th_op *op, uint32_t i);
/* Does a mark hold for a tensor of this type? A size becomes known: so does what follows from it. */
bool thx_mark_holds(const th_trace *t, const th_op *op, int kind, const th_type *type, const thx_sizes *z,
                    th_slot *slots);
/* Numbers lie in the handles of slots, by place. */
static inline int64_t thx_in_slot(const th_slot *slots, uint32_t i) { return (intptr_t)slots[i].handle; }
static inline void thx_into_slot(th_slot *slots, uint32_t i, int64_t value) {
    slots[i] = (th_slot){.handle = (void *)(intptr_t)value};
}
/* A term that is no size, of those before. False: it has no value, or is a condition that does not hold. */
bool thx_term_compute(const thx_sizes *z, uint32_t i, th_slot *slots);
/* Size number i is known: what follows from it, up to the next size. */
bool thx_term_follow(const thx_sizes *z, uint32_t i, int64_t size, th_slot *slots);
uint32_t thx_extent_slot(const thx_lowering *l, uint16_t number);
int thx_lower_size(thx_lowering *l, th_opref op);       /* 1 an operation on sizes, lowered; 0 another, -1 error */
bool thx_is_steady(const thx_lowering *l, th_opref op); /* its tensors and numbers are the same for all sizes */
int thx_lower_checks(thx_lowering *l, th_opref op);     /* results of an unsteady one that are the same for all */
void thx_sizes_free(const thx_sizes *sizes);

/* ---- sizes_dry.c ---- */
thx_dry *thx_dry_new(thx *x, const th_trace *program, const thx_recorder *r); /* NULL with an exception */
void thx_dry_free(thx_dry *dry);
/* inputs: by input of the trace, its type, or 0: as stated. slots: numbers, those of ints known. */
bool thx_dry_run(thx *x, thx_dry *dry, const thx_sizes *sizes, const th_typeref *inputs, th_slot *slots);

/* ---- entries ---- */
struct thx_entry;
struct thx_callable_object;
/* An entry for the same call but for sizes and ints, which does not go away until thx_entry_leave; NULL: there is none.
 * *ints: they alone differ, in a program that could not be made for any sizes (it computes gradients, say): it is one
 * for any of them if it has no use for them. */
int thx_sizes_begin(struct thx_callable_object *c, struct thx_entry *e, struct thx_entry **like, bool *ints);
/* After a capture that followed numbers alone: no operation of the program has a use for them. */
int thx_ints_end(thx *x, struct thx_entry *e, const struct thx_entry *like, const thx_recorder *r, PyObject *sizes,
                 PyObject *tape);
/* Before the passes: operations that sizes change are marked. like: the capture with other sizes. -1 with SizesChanged.
 */
int thx_sizes_mark(thx *x, th_trace *t, const th_trace *like);
/* After the capture of e: it serves calls of any sizes, or -1 with an exception when it is not the program of `like`.
 */
int thx_sizes_end(thx *x, struct thx_entry *e, const struct thx_entry *like, const thx_recorder *r, PyObject *sizes,
                  bool trusting);
/* Before a run: the numbers that no size is needed for, into their slots. False with SizesChanged. */
bool thx_sizes_start(thx *x, const struct thx_entry *e, const thx_leaves *leaves, th_slot *slots);
/* Do the conditions that arguments decide hold? */
bool thx_sizes_hold(thx *x, const struct thx_entry *e, const thx_leaves *leaves);
/* A program for any sizes serves a call: is it time for one for these very sizes, which torch's kernels need less of?
 */
bool thx_sizes_recur(thx *x, struct thx_entry *e, const thx_leaves *leaves);

enum { THX_RECENT = 4 };
typedef struct thx_recent { /* sizes of late calls */
    uint64_t hash;
    uint32_t calls;
} thx_recent;

#endif
