/* The catalogue's derivative rules, by family in src/ops/<family>.grad.c; named in the operators' blocks (.grad).
 *
 * See backward.h for how one is written. Each is compared with eager in float64 over torch's own operator samples
 * (tests/test_derivative_rules.py).
 */
#ifndef THUNDER_OPS_DERIVATIVES_H
#define THUNDER_OPS_DERIVATIVES_H

#include "ops/backward.h"

#define TH_GRAD(name)    th_status th__grad_##name(th__backward *b)
#define TH_FORWARD(name) th_status th__forward_##name(th__backward *b) /* .forward of its operator */

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

/* nn.grad.c */
TH_GRAD(relu);
TH_GRAD(gelu);
TH_GRAD(silu);
TH_GRAD(mish);
TH_GRAD(hardswish);
TH_GRAD(hardsigmoid);
TH_GRAD(elu);
TH_GRAD(selu);
TH_GRAD(celu);
TH_GRAD(leaky_relu);
TH_GRAD(hardtanh);
TH_GRAD(relu6);
TH_GRAD(softplus);
TH_GRAD(glu);
TH_GRAD(clamp);
TH_GRAD(clamp_min);
TH_GRAD(clamp_max);
TH_FORWARD(dropout);
TH_GRAD(dropout);

/* norm.grad.c */
TH_FORWARD(layer_norm);
TH_GRAD(layer_norm);
TH_FORWARD(group_norm);
TH_GRAD(group_norm);
TH_GRAD(softmax);
TH_GRAD(log_softmax);

/* loss.grad.c */
TH_FORWARD(mse_loss);
TH_FORWARD(binary_cross_entropy_with_logits);
TH_GRAD(mse_loss);
TH_GRAD(l1_loss);
TH_GRAD(binary_cross_entropy_with_logits);
TH_FORWARD(nll_loss);
TH_FORWARD(cross_entropy);
TH_GRAD(nll_loss);
TH_GRAD(cross_entropy);

/* attention.grad.c */
TH_FORWARD(attention);
TH_GRAD(attention);
/* attention.op.c: does torch take its flash kernel for the CPU? TH_DECLINED: no, or it is not known. */
th_status th__attention_is_flash(const th_call *call);

/* index.grad.c */
TH_GRAD(getitem);
TH_GRAD(gather);
TH_GRAD(index_select);
TH_GRAD(scatter);
TH_GRAD(scatter_add);
TH_GRAD(index_add);
TH_GRAD(index_copy);
TH_GRAD(index_fill);
TH_GRAD(masked_fill);
TH_GRAD(where);
TH_GRAD(tensor_where);
TH_GRAD(functional_embedding);
TH_GRAD(embedding);

/* reduction.grad.c */
TH_GRAD(sum);
TH_GRAD(mean);
TH_GRAD(extreme);
TH_GRAD(extreme_of_all);
TH_GRAD(var);
TH_GRAD(std);
TH_GRAD(logsumexp);
TH_GRAD(cumsum);

/* cast.grad.c */
TH_GRAD(convert);
TH_GRAD(detach);

/* shape.grad.c */
TH_GRAD(cat);
TH_GRAD(stack);
TH_GRAD(repeat);
TH_GRAD(tile);
TH_GRAD(repeat_interleave);
TH_GRAD(pad);
TH_GRAD(tril);
TH_GRAD(triu);
TH_GRAD(roll);
TH_GRAD(flip);

#endif
