/* Derivatives of conversions: the gradient goes back to the input's dtype (th__give sees to it) on the same device. */
#include "ops/derivatives.h"

static th_status back(th__backward *b) {
    th_trace *t = b->e.t;
    th_val x = th__use(b, 0), g = b->tangents[0];
    DECLINE_IF(!x);
    const th_type *from = th_type_get(t->ctx, t->values[x].type), *to = th_type_get(t->ctx, t->values[g].type);
    DECLINE_IF(from->device != to->device || !th__is_float((th_dtype)from->dtype));
    if (th__wants(b, x)) th__give(b, x, g);
    return TH_OK;
}

TH_GRAD(convert) { return back(b); }

TH_GRAD(detach) {
    b->out_grad = 0;
    return TH_OK;
}
