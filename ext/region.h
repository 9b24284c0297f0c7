/* A unit of a trace that an executor has claimed: one operation, or a region of several.
 *
 *     building --- install() ---> new --- first run agrees with torch ---> trusted
 *         |                        |
 *         +------ refuse() --------+--- it differs, or raises ------------> refused
 *
 * While it is being built and after it was refused torch runs its body. What a new one computes is compared with that
 * on the live inputs, whose values it sees as copies.
 */
#ifndef THUNDER_REGION_H
#define THUNDER_REGION_H

#include "lower.h"
#include "program.h"

typedef enum thx_region_state {
    THX_REGION_BUILDING,
    THX_REGION_NEW,
    THX_REGION_TRUSTED,
    THX_REGION_REFUSED,
} thx_region_state;

typedef struct thx_region { /* Python object: thunder._C.Region */
    PyObject_HEAD vectorcallfunc vectorcall;
    thx *x;
    PyObject *executor, *weakrefs, *dict;
    PyObject *implementation; /* NULL: none yet */
    PyObject *trace;          /* the body, to look at */
    PyObject *reason;         /* str: why it was refused; NULL: it was not */
    PyObject *judge;          /* callable: see thx_region_new */
    PyObject *stopwatch;      /* a thunder._stopwatch.Stopwatch that wants more runs, or NULL */
    thx_program reference;    /* the body on torch; lowered at its first run */
    uint8_t state;
    bool fused, always;                         /* always: compared at every run */
    uint64_t runs, reference_runs, nanoseconds; /* of the implementation, all its trusted runs together */
} thx_region;

/* judge(region, before, after, expected, results, error) -> bool: does what it computed pass? All but error are lists
 * of tensors: inputs as they were, the copies that it was given, torch's results and its own. */
thx_region *thx_region_new(thx *x, PyObject *executor, th_trace *body, bool fused, PyObject *judge);
int thx_lower_region(thx_lowering *l, th_opref op); /* 1 lowered, 0 not for this operation, -1 error */
int thx_region_init(thx *x, PyObject *module);

/* ---- handles.c: generated code that takes the handles of a plan ---- */

/* callable: a thunder._C.HandleCall. 0, or -1 with an exception. */
int thx_handles_run(thx *x, PyObject *callable, th_slot *slots, const uint32_t *ins, uint32_t nins,
                    const uint32_t *outs, uint32_t nouts);
int thx_handles_init(thx *x, PyObject *module);

/* ---- claim.c: let the executors of a callable claim the operations of a trace, in place ---- */
int thx_claim(thx *x, PyObject *claims, th_trace *t, const char *kind);
int thx_claims_settle(PyObject *claims); /* before the program runs: wait for what is built of its units */
/* Before a program is differentiated: operators that bring their derivative along take the place of what they
 * implement. */
int thx_claim_operators(thx *x, PyObject *claims, th_trace *t);
PyObject *thx_operator_key(PyObject *module, PyObject *dotted); /* the key under which claims find an operator */

#endif
