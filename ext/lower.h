/* From a trace to a plan: each operation becomes an instruction by the cheapest road that is known to be right. */
#ifndef THUNDER_LOWER_H
#define THUNDER_LOWER_H

#include "ext.h"

#include "runtime/plan.h"

typedef struct thx_instr_data { /* head of every instruction's data */
    void (*free)(void *data);
} thx_instr_data;

typedef struct thx_number { /* a literal of a program that is another one at each call */
    th_opref op;
    uint32_t argument; /* place among the positional arguments, then those by keyword */
    uint32_t from;     /* which of the values of a run it is */
} thx_number;

bool thx_op_holds_number(const th_trace *t, const th_op *op); /* numbers.c: one that changes from call to call */

typedef struct thx_literals { /* in the slots after those of the inputs */
    thx_number *numbers;      /* owned by the program */
    uint32_t nnumbers;
    const struct thx_sizes *sizes; /* sizes.h: what the program computes of sizes, as integers in `handle`; or NULL */
} thx_literals;

typedef struct thx_lowering {
    thx *x;
    const th_trace *t;
    const thx_literals *literals;
    th_plan *plan;
    uint32_t *slots; /* by value; UINT32_MAX: none yet */
    uint32_t *free_slots, nfree, next_slot;
    uint32_t nbuiltin, nshim; /* how many instructions took which road */
    bool plain;               /* builtins only: nothing that trusts predicted strides */
    th_opref *last;           /* by value: its last use, where inputs are spent; else NULL */
} thx_lowering;

/* Slots of trace inputs are 0 .. ninputs-1 in order. spends: they are dropped after their last use. slot_of: by value,
 * for the results (caller frees with PyMem_Free). */
th_plan *thx_lower(thx *x, const th_trace *t, bool plain, bool spends, const thx_literals *literals, uint32_t **slot_of,
                   uint32_t *nshim, uint32_t *nbuiltin);
uint32_t thx_slot_for(thx_lowering *l, th_val value); /* the slot of a value, assigned when it has none */

/* Kernels that leave out what only their backward needs while gradients are off: their instructions switch them on. */
bool thx_looks_at_grad_mode(thx *x, const th_op *op);

/* What a slot holds, as a tensor object (borrowed) or handle (borrowed). */
PyObject *thx_slot_object(thx *x, th_slot *slot);
static inline th_h thx_slot_handle(thx *x, th_slot *slot) {
    if (!slot->handle) slot->handle = thx_borrow(&x->abi, slot->object);
    return slot->handle;
}

static inline void thx_slot_drop(thx *x, th_slot *s) { /* empty it: what it owns goes */
    th_slot was = *s;
    *s = (th_slot){0};
    if (was.owns_object) Py_DECREF((PyObject *)was.object);
    if (was.owns_handle) x->abi.aoti_torch_delete_tensor_object(was.handle);
}

/* A call of a Python object, its arguments prepared; its results go to their slots. */
typedef struct thx_call thx_call;
thx_call *thx_call_new(thx_lowering *l, th_opref op); /* NULL with an exception */
void thx_call_free(thx_call *call);
int thx_call_run(th_frame *f, const thx_call *call, PyObject *callee); /* callee: in place of the operation's own */

/* ---- shims.c: 1 lowered, 0 not for this operation, -1 error ---- */
int thx_lower_shim(thx_lowering *l, th_opref op);
/* ---- dispatch.c: likewise ---- */
int thx_lower_dispatch(thx_lowering *l, th_opref op);

#endif
