/* Derivatives from torch's own autograd. */
#ifndef THUNDER_DERIVE_H
#define THUNDER_DERIVE_H

#include "ext.h"

#include "thunder/grad.h"

/* A th_rule_fn whose user is the thx: the operation is run on fakes that require grad, and what autograd runs forwards
 * and backwards is the rule. Kept by operation, attributes and types for as long as the module lives. TH_DECLINED with
 * the context's error when torch has no derivative, or one that cannot be recorded. */
th_status thx_derive(void *user, const th_rule_request *request, const th_rule **rule);
void thx_rules_forget(thx *x); /* those that hold Python objects: after each compile */
void thx_rules_free(thx *x);

#endif
