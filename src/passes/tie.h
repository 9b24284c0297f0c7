/* Ties: operations that bind the user's Python code to the gradient of a value.
 *
 *     t0 = torch.sin(x)
 *     _: "effect" = thunder._kernels.tie_hook(t0, hook)          t0.register_hook(...)
 *     _: "effect" = thunder._kernels.tie_grad(t0)                t0.retain_grad()
 *     (t1,) = thunder._kernels.tie_module(node, t0)              torch's BackwardHookFunction
 *
 * They read no memory; what they hold on to is which tensor it was. So a tied value is merged with no other, and no
 * pass moves its tie to another value. When the program is joined with its derivative, that calls the code where the
 * gradient is complete; the tie itself stays for second derivatives, which run the program under autograd.
 */
#ifndef THUNDER_PASSES_TIE_H
#define THUNDER_PASSES_TIE_H

#include "passes/pass.h"

typedef enum th__tie { TH__TIE_NONE, TH__TIE_HOOK, TH__TIE_GRAD, TH__TIE_MODULE } th__tie;

th__tie th__tie_of(const th_trace *t, const th_op *op);
bool *th__tied(const th_trace *t, th__scratch *s); /* by value; NULL when out of memory */

/* The gradient as the user's hook leaves it. Inputs of the trace from `first` on are the gradients that come in: those
 * that this one depends on are given to the call, which does nothing when none of them is defined. */
th_val th__tie_run_hook(th_trace *t, th__scratch *s, const th_op *site, th_node hook, th_val gradient, uint32_t first);

/* The same for all the tensors that go into or out of a module: gradients[i] is replaced, 0 stands for none. `values`:
 * the tensors. */
th_status th__tie_run_module(th_trace *t, th__scratch *s, const th_op *site, th_node node, uint32_t n,
                             const th_val *values, th_val *gradients, uint32_t first);

#endif
