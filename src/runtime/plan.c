/* Building plans. Memory: the arrays belong to the plan, instruction data too. */
#include "runtime/plan.h"

#include <string.h>

th_plan *th_plan_new(th_ctx *ctx, uint32_t nslots, uint32_t nroots, void (*release)(void *, void *, void *), void *user,
                     void (*free_data)(void *)) {
    th_plan *plan = th_ctx_alloc(ctx, NULL, sizeof *plan);
    if (!plan) return NULL;
    memset(plan, 0, sizeof *plan);
    plan->ctx = ctx;
    plan->nslots = nslots;
    plan->nroots = nroots;
    plan->release = release;
    plan->user = user;
    plan->free_data = free_data;
    return plan;
}

void th_plan_free(th_plan *plan) {
    if (!plan) return;
    for (uint32_t i = 0; i < plan->ninstrs; i++)
        if (plan->instrs[i].data && plan->free_data) plan->free_data(plan->instrs[i].data);
    th_ctx_alloc(plan->ctx, plan->instrs, 0);
    th_ctx_alloc(plan->ctx, plan->frees, 0);
    th_ctx_alloc(plan->ctx, plan, 0);
}

th_status th_plan_add(th_plan *plan, th_instr_fn run, void *data, uint32_t op) {
    if (plan->ninstrs == plan->cap_instrs) {
        uint32_t cap = plan->cap_instrs ? plan->cap_instrs * 2 : 64;
        th_instr *instrs = th_ctx_alloc(plan->ctx, plan->instrs, cap * sizeof *instrs);
        if (!instrs) {
            if (data && plan->free_data) plan->free_data(data);
            return th_fail(plan->ctx, TH_ENOMEM, "no memory for a plan of %u instructions", cap);
        }
        plan->instrs = instrs;
        plan->cap_instrs = cap;
    }
    plan->instrs[plan->ninstrs++] = (th_instr){run, data, plan->nfrees, 0, op};
    return TH_OK;
}

th_status th_plan_kill(th_plan *plan, uint32_t slot) {
    if (!plan->ninstrs) return TH_OK;
    if (plan->nfrees == plan->cap_frees) {
        uint32_t cap = plan->cap_frees ? plan->cap_frees * 2 : 64;
        uint32_t *frees = th_ctx_alloc(plan->ctx, plan->frees, cap * sizeof *frees);
        if (!frees) return th_fail(plan->ctx, TH_ENOMEM, "no memory for a plan");
        plan->frees = frees;
        plan->cap_frees = cap;
    }
    plan->frees[plan->nfrees++] = slot;
    plan->instrs[plan->ninstrs - 1].nfrees++;
    return TH_OK;
}
