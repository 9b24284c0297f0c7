/* A plan: a flat array of instructions over slots, and the machine that runs it.
 *
 * The core knows neither tensors nor Python: a slot holds up to two foreign references (a tensor handle and a Python
 * object, say) with one ownership bit each, and instructions are functions that somebody above gave. Running allocates
 * nothing and locks nothing; a plan is immutable once built, so many threads may run it, each with a frame of its own.
 */
#ifndef THUNDER_RUNTIME_PLAN_H
#define THUNDER_RUNTIME_PLAN_H

#include "thunder/base.h"

typedef struct th_slot {
    void *handle, *object;
    bool owns_handle, owns_object;
} th_slot;

typedef struct th_frame {
    th_slot *slots;
    void *user;      /* the runner's: whatever the instructions need */
    uint32_t failed; /* after an error: the instruction, counted from 0 */
    bool keep;       /* after an error the slots stay as they are: the caller releases them */
} th_frame;

typedef struct th_instr th_instr;
typedef int (*th_instr_fn)(th_frame *frame, const th_instr *instr); /* 0, or any other number for an error */

struct th_instr {
    th_instr_fn run;
    void *data;             /* what run needs; freed by the plan's free_data */
    uint32_t frees, nfrees; /* range of th_plan.frees: slots dead after this instruction */
    uint32_t op;            /* the operation of the trace; 0 for none */
};

typedef struct th_plan {
    th_ctx *ctx; /* for its allocator */
    th_instr *instrs;
    uint32_t ninstrs, cap_instrs;
    uint32_t *frees;
    uint32_t nfrees, cap_frees;
    uint32_t nslots; /* slots 0 .. nslots-1 */
    uint32_t nroots; /* the first nroots slots are filled by the caller, who also clears them */
    void (*release)(void *user, void *handle, void *object); /* drop what a slot owns; either may be NULL */
    void *user;                                              /* for release */
    void (*free_data)(void *data);
} th_plan;

th_plan *th_plan_new(th_ctx *ctx, uint32_t nslots, uint32_t nroots, void (*release)(void *, void *, void *), void *user,
                     void (*free_data)(void *));
void th_plan_free(th_plan *plan);
/* Append an instruction; data is owned by the plan from here on, also on failure. */
th_status th_plan_add(th_plan *plan, th_instr_fn run, void *data, uint32_t op);
/* The slot dies after the last instruction added; before the first one there is nothing to do. */
th_status th_plan_kill(th_plan *plan, uint32_t slot);

/* Run all instructions. On error frame->failed is set, and everything that the frame owns is released unless it says
 * otherwise. */
int th_plan_run(const th_plan *plan, th_frame *frame);
/* Release every owned slot: after the outputs were taken. */
void th_plan_clear(const th_plan *plan, th_frame *frame);

static inline void th_slot_drop(const th_plan *plan, th_slot *slot) {
    void *handle = slot->owns_handle ? slot->handle : NULL, *object = slot->owns_object ? slot->object : NULL;
    slot->handle = slot->object = NULL;
    slot->owns_handle = slot->owns_object = false;
    if (handle || object) plan->release(plan->user, handle, object);
}

#endif
