/* The node that a compiled call leaves in autograd's graph: gradient.c builds what autograd.c runs. */
#ifndef THUNDER_AUTOGRAD_H
#define THUNDER_AUTOGRAD_H

#include "program.h"

#include "thunder/grad.h"

typedef struct thx_saved { /* one input of the backward program */
    int32_t root;          /* an input of the call, by number; -1: a value that the forward program made */
    uint32_t value;        /* entry of the forward program's result */
    bool grad;             /* an input that requires grad */
    bool shown;            /* the user can see, and so change, it: torch keeps it, with its version */
} thx_saved;

enum {                /* of an input that the run writes to */
       ROOT_COPY = 1, /* statistics that batch norm updates and, in training, does not read: a copy takes the update */
       ROOT_GONE = 2, /* what it held is needed and gone */
};

typedef struct thx_gradient { /* Python object: how a program is differentiated; shared by its entry and pending runs */
    PyObject_HEAD thx *x;
    thx_program backward;
    thx_program batched;       /* the same on builtins alone: for gradients that are no plain tensors (vmap) */
    thx_program again;         /* gradients from the inputs of the call, run under autograd: for create_graph */
    bool again_random;         /* it draws random numbers, so it would not be the run that it repeats */
    bool hooks;                /* the backward calls hooks of the user */
    uint32_t nroots, nresults; /* of the forward program; nresults without what is saved */
    uint8_t *stale;            /* by root: ROOT_*: the run writes to it, and `again` would read what it left */
    uint32_t nwrt, *wrt;       /* inputs of the call that require grad */
    uint32_t ntangents, *tangent_of;
    int32_t *base_of;            /* by result that has a gradient: the input whose memory it lies in; -1: none */
    bool *aliased;               /* by result that has a gradient: another such result lies in its memory too */
    bool *shared;                /* by input that requires grad: its gradient lies in the memory of one before it */
    uint32_t nmutated, *mutated; /* inputs that take new contents under autograd; these are the last results */
    uint32_t nkept, *kept;       /* results that retain their gradients */
    uint64_t *above;   /* by incoming gradient: bits of the others whose results its own is computed from; NULL: none */
    uint64_t *depends; /* by input that requires grad, then by kept result: bits of the incoming gradients that its own
                          depends on */
    struct thx_guards *reads; /* what backward functions of the user's read, as it was; the entry's; NULL: nothing */
    struct thx_partial *partials; /* backward programs without gradients that did not come in; owned */
    uint32_t nsaved;
    thx_saved *saved;
    uint32_t nnumbers; /* literals that are others at each run (numbers.c): by value of a run, the number that it is */
    int32_t *numbers;
    int64_t bytes, bytes_kept;
    uint32_t ncatalogue; /* operations whose derivative is the catalogue's */
    PyObject *derived;   /* tuple: names of the operations whose derivative was derived */
} thx_gradient;

/* From a joint trace (consumed) to a gradient; *forward gets the forward trace. transform: see transform.h;
 * claims: see region.h; or NULL. */
thx_gradient *thx_gradient_new(thx *x, th_joint *joint, th_remat remat, PyObject *transform, PyObject *claims,
                               th_trace **forward);

/* Which results are computed from which others, as autograd sees it in the captured trace: fills `above`. */
int thx_gradient_find_above(thx_gradient *g, th_trace *captured, const th_val *results, uint32_t nresults);

int thx_gradient_init(thx *x, PyObject *module);

/* One run forwards. The caller fills what is above the line and gets `slots` back with the results in them. */
typedef struct thx_forward {
    thx_program *program;
    thx_gradient *gradient;
    int (*fill)(void *user, th_slot *slots); /* the inputs */
    int (*run)(void *user, th_slot *slots);  /* as thx_program_run */
    void *user;
    PyObject *numbers; /* tuple: the values of literals, or NULL (borrowed) */
    /* ---- */
    th_slot *slots; /* of the program; freed by the caller: thx_forward_fini */
    th_slot fixed[THX_SLOTS_ON_STACK];
} thx_forward;
int thx_forward_run(thx *x, thx_forward *f);
void thx_forward_fini(thx_forward *f);

/* By input that requires grad: its gradient lies in the memory of one before it. */
int thx_find_shared(const thx_gradient *g, th_trace *backward, bool **shared);

/* absent.c: the program for calls where these gradients (by bit) do not come in, and what of its gradients is shared;
 * both are left as they are where there is no such program. again: of the one for create_graph. */
int thx_partial_find(thx *x, thx_gradient *g, uint64_t absent, bool again, thx_program **program, bool **shared);
void thx_partials_free(struct thx_partial *p);

/* numbers.c: find the literals of a program that is not lowered yet; numbers: as in thx_gradient. 0, -1 */
int thx_literals_find(const int32_t *numbers, uint32_t n, thx_program *p);

int thx_autograd_init(thx *x, PyObject *module);

#endif
