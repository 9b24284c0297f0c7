/* Softmax in two halves, where regions are fused.
 *
 *     forward       t1 = torch.log_softmax(t0, -1)           forward       t1 = torch.log_softmax(t0, -1)
 *                   ...                                                    r = thunder._rows.logsumexp(t0, -1)
 *     backward      g  = f(t1)                        ->     backward      u = thunder._rows.log_softmax(t0, r, bf16)
 *                                                                          g = f(u)
 *
 * The scores t0 are in memory anyway, as the result of a matrix product; the logarithms are not, where a loss is fused
 * with them. With r, a number for each row, the backward has them again without going through the rows first.
 */
#ifndef THUNDER_PASSES_ROWS_H
#define THUNDER_PASSES_ROWS_H

#include "passes/pass.h"

#define TH__ROWS_SAVED "thunder._rows.logsumexp" /* the forward makes it for the backward */

/* Of a joint trace, whose last `ntangents` inputs are gradients. */
th_status th__rows_split(th_trace *t, uint32_t ntangents);

#endif
