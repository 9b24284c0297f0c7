/* Claims: which executor runs which operations of a trace.
 *
 *     t0 = torch.nn.functional.linear(x, w)         t0 = torch.nn.functional.linear(x, w)
 *     t1 = torch.nn.functional.gelu(t0)       ->    (t2,) = fused_0(t0, y)      def fused_0(t0, y):
 *     t2 = torch.add(t1, y)                                                         t1 = torch.nn.functional.gelu(t0)
 *                                                                                   t2 = torch.add(t1, y)
 *                                                                                   return (t2,)
 *
 * An operation is claimed by the first executor that takes it, alone or together with neighbours. Those together are a
 * region: convex, so that it can run at once, and moved over nothing whose order matters. A claimed unit becomes one
 * operation whose callee is a foreign object, made by whoever asked; its body stays a trace, which is what the unit is
 * tested against.
 */
#ifndef THUNDER_CLAIM_H
#define THUNDER_CLAIM_H

#include "thunder/ir.h"

typedef struct th_claim {
    uint32_t owner; /* a number above 0, for the executor; 0: nobody, torch runs it */
    bool fuses;     /* together with its neighbours */
    uint32_t cut;   /* its region ends where one value alone goes on, after at least that many operations; 0: never */
} th_claim;

typedef struct th_claim_options {
    th_status (*ask)(void *user, th_trace *t, th_opref op, th_claim *claim); /* claim is zeroed */
    /* The object that runs a unit; body: the unit as a trace, from what it uses to what others use of it (taken, also
     * on failure). *object NULL: it is declined after all. hint: for its name. */
    th_status (*bind)(void *user, uint32_t owner, bool fused, th_trace *body, const char **hint, void **object);
    void *user;
} th_claim_options;

/* Writes, random numbers and outside state are claimed by nobody. Removes `del`: run the lifetime pass afterwards. */
th_status th_claim_run(th_trace *t, const th_claim_options *options);

#endif
