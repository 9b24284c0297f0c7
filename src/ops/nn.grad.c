/* Derivatives of activations, clamp and dropout: torch's own backward kernels. */
#include "ops/derivatives.h"

#define KERNEL(f) "torch.ops.aten." #f "_backward.default"

static th_node V(th__backward *b, th_val v) { return th__node_of(b, v); }
static th_node gradient(th__backward *b) { return V(b, b->tangents[0]); }
static th_node input(th__backward *b) { return V(b, th__use(b, 0)); }

static th_status give(th__backward *b, th_val g) {
    th__give(b, th__use(b, 0), g);
    return TH_OK;
}

/* The number given, or its default. */
static th_node number_at(th__backward *b, uint32_t i, double fallback) {
    return th__arg(&b->call, i)->kind == TH_N_ABSENT ? th_node_float(b->e.t, fallback) : b->call.arg[i];
}

static th_status number_of(th__backward *b, uint32_t i, double fallback, double *value) {
    const th_node_data *d = th__arg(&b->call, i);
    *value = d->kind == TH_N_FLOAT ? d->u.f : d->kind == TH_N_INT ? (double)d->u.i : fallback;
    return d->kind == TH_N_FLOAT || d->kind == TH_N_INT || d->kind == TH_N_ABSENT ? TH_OK : TH_DECLINED;
}

TH_GRAD(relu) { return give(b, TH_APPLY(b, KERNEL(threshold), gradient(b), V(b, b->outs[0]), th_node_int(b->e.t, 0))); }

TH_GRAD(gelu) {
    th_trace *t = b->e.t;
    th_node args[] = {gradient(b), input(b)}, kwargs = 0;
    if (th__has(&b->call, 1)) {
        th_node pair[] = {th_node_str(t, th_intern_z(t->ctx, "approximate")), b->call.arg[1]};
        kwargs = th_node_seq(t, TH_N_DICT, 2, pair);
    }
    return give(b, th__emit_kw(&b->e, KERNEL(gelu), 2, args, kwargs));
}

TH_GRAD(silu) { return give(b, TH_APPLY(b, KERNEL(silu), gradient(b), input(b))); }
TH_GRAD(mish) { return give(b, TH_APPLY(b, KERNEL(mish), gradient(b), input(b))); }
TH_GRAD(hardswish) { return give(b, TH_APPLY(b, KERNEL(hardswish), gradient(b), input(b))); }
TH_GRAD(hardsigmoid) { return give(b, TH_APPLY(b, KERNEL(hardsigmoid), gradient(b), input(b))); }

static th_status elu_of(th__backward *b, th_node alpha, double scale, double input_scale) {
    th_trace *t = b->e.t;
    return give(b, TH_APPLY(b, KERNEL(elu), gradient(b), alpha, th_node_float(t, scale), th_node_float(t, input_scale),
                            th_node_bool(t, false), input(b)));
}

TH_GRAD(elu) { return elu_of(b, number_at(b, 1, 1), 1, 1); }
TH_GRAD(selu) {
    return elu_of(b, th_node_float(b->e.t, 1.6732632423543772848170429916717), 1.0507009873554804934193349852946, 1);
}
TH_GRAD(celu) {
    double alpha;
    TRY(number_of(b, 1, 1, &alpha));
    return elu_of(b, number_at(b, 1, 1), 1, 1.0 / (double)(float)alpha); /* torch's formula rounds it, too */
}

TH_GRAD(leaky_relu) {
    return give(
        b, TH_APPLY(b, KERNEL(leaky_relu), gradient(b), input(b), number_at(b, 1, 0.01), th_node_bool(b->e.t, false)));
}

static th_status between(th__backward *b, th_node low, th_node high) {
    return give(b, TH_APPLY(b, KERNEL(hardtanh), gradient(b), input(b), low, high));
}

TH_GRAD(hardtanh) { return between(b, number_at(b, 1, -1), number_at(b, 2, 1)); }
TH_GRAD(relu6) { return between(b, th_node_int(b->e.t, 0), th_node_int(b->e.t, 6)); }

TH_GRAD(softplus) {
    return give(b, TH_APPLY(b, KERNEL(softplus), gradient(b), input(b), number_at(b, 1, 1), number_at(b, 2, 20)));
}

TH_GRAD(glu) {
    int64_t dim;
    TRY(th__arg_int(&b->call, 1, -1, &dim));
    return give(b, TH_APPLY(b, KERNEL(glu), gradient(b), input(b), th_node_int(b->e.t, dim)));
}

/* Zero where the input was outside; a NaN is. Limits that are tensors have gradients of their own. */
static th_status clamped(th__backward *b, uint32_t low, uint32_t high) {
    double ignored;
    th_val inside = 0;
    if (low && th__has(&b->call, low)) {
        TRY(number_of(b, low, 0, &ignored));
        inside = TH_APPLY(b, "torch.ge", input(b), b->call.arg[low]);
    }
    if (high && th__has(&b->call, high)) {
        TRY(number_of(b, high, 0, &ignored));
        th_val below = TH_APPLY(b, "torch.le", input(b), b->call.arg[high]);
        inside = inside ? TH_APPLY(b, "torch.logical_and", V(b, inside), V(b, below)) : below;
    }
    return give(b, TH_APPLY(b, "torch.where", V(b, inside), gradient(b), th_node_int(b->e.t, 0)));
}

TH_GRAD(clamp) { return clamped(b, 1, 2); }
TH_GRAD(clamp_min) { return clamped(b, 1, 0); }
TH_GRAD(clamp_max) { return clamped(b, 0, 1); }

/* ---- dropout ---- */

/* As torch does it on the CPU: numbers 0 and 1 / (1 - p), drawn in the input's layout, and a product. */
TH_FORWARD(dropout) {
    th_trace *t = b->e.t;
    th__tensor x;
    bool training;
    double p;
    TRY(th__arg_tensor(&b->call, 0, &x));
    TRY(number_of(b, 1, 0.5, &p));
    TRY(th__arg_bool(&b->call, 2, true, &training));
    DECLINE_IF(!training || !(p > 0) || !(p < 1) || th__numel(x.ndim, x.shape) == 0 || !th__is_float(x.dtype));
    DECLINE_IF(!th__is_cpu(&b->call, &x) || !th__is_dense(x.ndim, x.shape, x.stride));
    th_typeref type = th_type_tensor(t->ctx, x.dtype, x.device, x.ndim, x.shape, x.stride, 0);
    th_node of = input(b), keep = th_node_float(t, 1. - p);
    th_val noise = th__emit_typed(&b->e, "torch.ops.aten.empty_like.default", type, 1, &of);
    noise = th__emit_write(&b->e, "torch.ops.aten.bernoulli_.float", TH_FX_RANDOM, noise, 1, &keep);
    noise = th__emit_write(&b->e, "torch.ops.aten.div_.Scalar", 0, noise, 1, &keep);
    b->saved[0] = noise;
    b->made[0] = TH_APPLY(b, "torch.mul", input(b), V(b, noise));
    b->nmade = 1;
    return TH_OK;
}

TH_GRAD(dropout) { return give(b, TH_APPLY(b, "torch.mul", gradient(b), V(b, b->saved[0]))); }
