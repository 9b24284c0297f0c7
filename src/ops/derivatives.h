/* The catalogue's derivative rules, by family in src/ops/<family>.grad.c; named in the operators' blocks (.grad).
 *
 * See backward.h for how one is written. Each is compared with eager in float64 over torch's own operator samples
 * (tests/test_derivative_rules.py).
 */
#ifndef THUNDER_OPS_DERIVATIVES_H
#define THUNDER_OPS_DERIVATIVES_H

#include "ops/backward.h"

#define TH_GRAD(name) th_status th__grad_##name(th__backward *b)

/* view.grad.c */
TH_GRAD(as_strided_scatter);

#endif
