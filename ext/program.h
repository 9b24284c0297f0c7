/* A trace with the plan that runs it. */
#ifndef THUNDER_PROGRAM_H
#define THUNDER_PROGRAM_H

#include "ext.h"
#include "lower.h"

#include "runtime/plan.h"

typedef struct thx_program {
    th_trace *t; /* owned */
    th_plan *plan;
    thx_literals literals; /* that are others at each run, in slots after those of the inputs */
    uint32_t *slot_of;     /* by value of the trace; UINT32_MAX: none */
    bool checked;          /* a run has confirmed the sizes and strides that the trace states */
    bool spends;           /* a run drops each input after its last use: the slots are empty then */
    uint32_t nshim, nbuiltin;
    th_opref failed; /* the operation at which the last run failed; 0: none did */
} thx_program;

enum { THX_SLOTS_ON_STACK = 192 };

/* plain: builtins only, which trust no predicted strides and let torch's autograd see what they do. */
int thx_program_lower(thx *x, thx_program *p, bool plain);
void thx_program_fini(thx_program *p);
/* Literals that are others at each run: `values` is a tuple, which holds them until the run has ended. */
void thx_literals_fill(const thx_program *p, PyObject *values, th_slot *slots);
/* The slots from the roots on are cleared here. 0 with results in the slots; -1 with an exception, everything released;
 * 1: predicted strides were wrong, the program was lowered anew: fill new slots and start over. */
int thx_program_run(thx *x, thx_program *p, th_slot *slots);
void thx_program_name_line(thx *x, const thx_program *p, uint32_t failed); /* on the pending exception */
/* Does a slot hold what the trace says: sizes, dtype, strides? */
bool thx_as_predicted(thx *x, th_slot *slot, const th_type *type);
/* The n-th entry of the trace's result: its slot, or UINT32_MAX for None. */
uint32_t thx_program_result(const thx_program *p, uint32_t n);

#endif
