/* Derivatives of views. */
#include "ops/derivatives.h"

/* torch's own formula gives the input the gradient of the region, where it should be zero, and zero elsewhere. */
th_status th__grad_as_strided_scatter(th__backward *b) {
    th_trace *t = b->e.t;
    th_val x = th__use(b, 0), src = th__use(b, 1), g = b->tangents[0];
    int64_t offset = 0;
    DECLINE_IF(!x || !th_type_get(t->ctx, t->values[x].type)->contiguous);
    if (th__has(&b->call, 4)) TRY(th__arg_int(&b->call, 4, 0, &offset));
    offset = th__has(&b->call, 4) ? offset - t->values[x].offset : 0;
    DECLINE_IF(offset < 0);
    g = th__own_storage(b, g);
    th_node size = b->call.arg[2], stride = b->call.arg[3], at = th_node_int(t, offset);
    if (th__wants(b, x)) {
        th_node zeros[] = {th__node_of(b, g), size};
        th_val blank = th__emit(&b->e, "torch.Tensor.new_zeros", 2, zeros);
        th_node args[] = {th__node_of(b, g), th__node_of(b, blank), size, stride, at};
        th__give(b, x, th__emit(&b->e, "torch.as_strided_scatter", 5, args));
    }
    if (th__wants(b, src)) {
        th_node args[] = {th__node_of(b, g), size, stride, at};
        th__tensor s;
        TRY(th__arg_tensor(&b->call, 1, &s));
        th__dims strides;
        TRY(th__arg_ints(&b->call, 3, &strides));
        th_typeref type = th_type_tensor(t->ctx, s.dtype, s.device, s.ndim, s.shape, strides.at, 0);
        th__give(b, src, th__emit_view(b, "torch.as_strided", type, g, offset, 4, args));
    }
    return TH_OK;
}
