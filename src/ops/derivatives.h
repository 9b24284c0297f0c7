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
TH_GRAD(regroup);
TH_GRAD(expand);
TH_GRAD(transpose);
TH_GRAD(turn);
TH_GRAD(permute);
TH_GRAD(split);
TH_GRAD(unbind);
TH_GRAD(select);
TH_GRAD(narrow);

/* pointwise.grad.c */
TH_GRAD(add);
TH_GRAD(sub);
TH_GRAD(rsub);
TH_GRAD(mul);
TH_GRAD(div);
TH_GRAD(true_divide);
TH_GRAD(rdiv);
TH_GRAD(pow);
TH_GRAD(square);
TH_GRAD(positive);
TH_GRAD(neg);
TH_GRAD(abs);
TH_GRAD(exp);
TH_GRAD(expm1);
TH_GRAD(log);
TH_GRAD(log2);
TH_GRAD(log10);
TH_GRAD(log1p);
TH_GRAD(sqrt);
TH_GRAD(rsqrt);
TH_GRAD(reciprocal);
TH_GRAD(sin);
TH_GRAD(cos);
TH_GRAD(erf);
TH_GRAD(tanh);
TH_GRAD(sigmoid);

/* matmul.grad.c */
TH_GRAD(linear);
TH_GRAD(mm);
TH_GRAD(bmm);
TH_GRAD(matmul);
TH_GRAD(addmm);
TH_GRAD(baddbmm);
TH_GRAD(mv);
TH_GRAD(dot);

#endif
