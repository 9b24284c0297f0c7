/* The machine that runs a plan: one indirect call per instruction, then the slots that die there. */
#include "runtime/plan.h"

void th_plan_clear(const th_plan *plan, th_frame *frame) {
    for (uint32_t i = plan->nroots; i < plan->nslots; i++) th_slot_drop(plan, &frame->slots[i]);
}

int th_plan_run(const th_plan *plan, th_frame *frame) {
    const th_instr *instr = plan->instrs, *end = instr + plan->ninstrs;
    for (; instr < end; instr++) {
        int rc = instr->run(frame, instr);
        if (rc) {
            frame->failed = (uint32_t)(instr - plan->instrs);
            if (!frame->keep) th_plan_clear(plan, frame);
            return rc;
        }
        const uint32_t *dead = plan->frees + instr->frees, *last = dead + instr->nfrees;
        for (; dead < last; dead++) th_slot_drop(plan, &frame->slots[*dead]);
    }
    return 0;
}
