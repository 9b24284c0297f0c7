/* Derivatives of pointwise operators: torch's formulas. Everything is broadcast back by th__give. */
#include "ops/derivatives.h"

#include <math.h>

static th_node arg(const th__backward *b, uint32_t i) { return b->call.arg[i]; }

static th_val emit1(th__backward *b, const char *callee, th_node x) { return th__emit(&b->e, callee, 1, &x); }

static th_val emit2(th__backward *b, const char *callee, th_node x, th_node y) {
    th_node args[] = {x, y};
    return th__emit(&b->e, callee, 2, args);
}

/* callee(x, y) of two values. */
static th_val with(th__backward *b, const char *callee, th_val x, th_val y) {
    return emit2(b, callee, th__node_of(b, x), th__node_of(b, y));
}

static th_val times(th__backward *b, th_val x, double factor) {
    return emit2(b, "torch.mul", th__node_of(b, x), th_node_float(b->e.t, factor));
}

static th_val plus(th__backward *b, th_val x, double term) {
    return emit2(b, "torch.add", th__node_of(b, x), th_node_float(b->e.t, term));
}

static th_val g_of(const th__backward *b) { return b->tangents[0]; }
static th_val out_of(const th__backward *b) { return b->outs[0]; }

/* The gradient of an operand of a sum that a number may scale: by 1, -1 or `alpha`, or by minus that. */
static th_val scaled(th__backward *b, th_val g, bool by_alpha, bool minus) {
    const th_node_data *d = &b->e.t->nodes[arg(b, 2)];
    double alpha = d->kind == TH_N_ABSENT ? 1 : d->kind == TH_N_INT ? (double)d->u.i : d->u.f;
    if (by_alpha && alpha == -1) return minus ? g : times(b, g, -1);
    if (by_alpha && alpha != 1) g = emit2(b, "torch.mul", th__node_of(b, g), arg(b, 2));
    return minus ? times(b, g, -1) : g;
}

static th_status sum_of(th__backward *b, uint32_t scaled_one, uint32_t minus_one) {
    const th_node_data *d = &b->e.t->nodes[arg(b, 2)];
    DECLINE_IF(d->kind != TH_N_ABSENT && d->kind != TH_N_INT && d->kind != TH_N_FLOAT);
    for (uint32_t i = 0; i < 2; i++) {
        th_val x = th__use(b, i);
        if (th__wants(b, x)) th__give(b, x, scaled(b, g_of(b), i == scaled_one, i == minus_one));
    }
    return TH_OK;
}

TH_GRAD(add) { return sum_of(b, 1, 2); }
TH_GRAD(sub) { return sum_of(b, 1, 1); }
TH_GRAD(rsub) { return sum_of(b, 0, 0); }

TH_GRAD(mul) {
    th_val x = th__use(b, 0), y = th__use(b, 1);
    if (th__wants(b, x)) th__give(b, x, emit2(b, "torch.mul", th__node_of(b, g_of(b)), arg(b, 1)));
    if (th__wants(b, y)) th__give(b, y, emit2(b, "torch.mul", th__node_of(b, g_of(b)), arg(b, 0)));
    return TH_OK;
}

/* top / bottom, by parameter */
static th_status quotient(th__backward *b, uint32_t top, uint32_t bottom) {
    th_val x = th__use(b, top), y = th__use(b, bottom), g = g_of(b);
    if (th__wants(b, x)) th__give(b, x, emit2(b, "torch.div", th__node_of(b, g), arg(b, bottom)));
    if (th__wants(b, y)) {
        th_val ratio = emit2(b, "torch.div", th__node_of(b, out_of(b)), arg(b, bottom));
        th_val minus = emit1(b, "torch.neg", th__node_of(b, g));
        th__give(b, y, with(b, "torch.mul", minus, ratio));
    }
    return TH_OK;
}

TH_GRAD(div) {
    DECLINE_IF(b->call.nparams > 2 && th__has(&b->call, 2)); /* rounded: no gradient */
    return quotient(b, 0, 1);
}
TH_GRAD(true_divide) { return quotient(b, 0, 1); }
TH_GRAD(rdiv) { return quotient(b, 1, 0); }

/* x ** number */
TH_GRAD(pow) {
    th_trace *t = b->e.t;
    const th_node_data *d = &t->nodes[arg(b, 1)];
    DECLINE_IF(!th__use(b, 0) || (d->kind != TH_N_INT && d->kind != TH_N_FLOAT));
    double e = d->kind == TH_N_INT ? (double)d->u.i : d->u.f;
    DECLINE_IF(e == 0 || e != e);
    th_val power = th__use(b, 0);
    if (e != 2) {
        th_node rest = d->kind == TH_N_INT ? th_node_int(t, d->u.i - 1) : th_node_float(t, e - 1);
        power = emit2(b, "torch.pow", arg(b, 0), rest);
    }
    th__give(b, th__use(b, 0), with(b, "torch.mul", g_of(b), times(b, power, e)));
    return TH_OK;
}

TH_GRAD(square) {
    th__give(b, th__use(b, 0), with(b, "torch.mul", g_of(b), times(b, th__use(b, 0), 2)));
    return TH_OK;
}

TH_GRAD(positive) {
    th__give(b, th__use(b, 0), g_of(b));
    return TH_OK;
}

TH_GRAD(neg) {
    th__give(b, th__use(b, 0), emit1(b, "torch.neg", th__node_of(b, g_of(b))));
    return TH_OK;
}

TH_GRAD(abs) {
    th_val sign = emit1(b, "torch.sign", arg(b, 0));
    th__give(b, th__use(b, 0), with(b, "torch.mul", g_of(b), sign));
    return TH_OK;
}

TH_GRAD(exp) {
    th__give(b, th__use(b, 0), with(b, "torch.mul", g_of(b), out_of(b)));
    return TH_OK;
}

TH_GRAD(expm1) {
    th__give(b, th__use(b, 0), with(b, "torch.mul", g_of(b), plus(b, out_of(b), 1)));
    return TH_OK;
}

TH_GRAD(log) {
    th__give(b, th__use(b, 0), emit2(b, "torch.div", th__node_of(b, g_of(b)), arg(b, 0)));
    return TH_OK;
}

static th_status log_to_base(th__backward *b, double ln) {
    th_val scaled = times(b, th__use(b, 0), ln);
    th__give(b, th__use(b, 0), with(b, "torch.div", g_of(b), scaled));
    return TH_OK;
}

TH_GRAD(log2) { return log_to_base(b, 0.6931471805599453); }
TH_GRAD(log10) { return log_to_base(b, 2.3025850929940456); }

TH_GRAD(log1p) {
    th__give(b, th__use(b, 0), with(b, "torch.div", g_of(b), plus(b, th__use(b, 0), 1)));
    return TH_OK;
}

TH_GRAD(sqrt) {
    th__give(b, th__use(b, 0), with(b, "torch.div", g_of(b), times(b, out_of(b), 2)));
    return TH_OK;
}

TH_GRAD(rsqrt) {
    th_val cube = emit2(b, "torch.pow", th__node_of(b, out_of(b)), th_node_int(b->e.t, 3));
    th__give(b, th__use(b, 0), with(b, "torch.mul", times(b, g_of(b), -0.5), cube));
    return TH_OK;
}

TH_GRAD(reciprocal) {
    th_val square = with(b, "torch.mul", out_of(b), out_of(b));
    th_val minus = emit1(b, "torch.neg", th__node_of(b, g_of(b)));
    th__give(b, th__use(b, 0), with(b, "torch.mul", minus, square));
    return TH_OK;
}

TH_GRAD(sin) {
    th_val cosine = emit1(b, "torch.cos", arg(b, 0));
    th__give(b, th__use(b, 0), with(b, "torch.mul", g_of(b), cosine));
    return TH_OK;
}

TH_GRAD(cos) {
    th_val sine = emit1(b, "torch.sin", arg(b, 0));
    th_val minus = emit1(b, "torch.neg", th__node_of(b, sine));
    th__give(b, th__use(b, 0), with(b, "torch.mul", g_of(b), minus));
    return TH_OK;
}

TH_GRAD(erf) {
    th_val square = emit2(b, "torch.pow", arg(b, 0), th_node_int(b->e.t, 2));
    th_val bell = emit1(b, "torch.exp", th__node_of(b, emit1(b, "torch.neg", th__node_of(b, square))));
    th__give(b, th__use(b, 0), with(b, "torch.mul", times(b, bell, 2 / sqrt(M_PI)), g_of(b)));
    return TH_OK;
}

/* Kernels of torch that take the gradient and the result. */
static th_status by_kernel(th__backward *b, const char *kernel) {
    th_node args[] = {th__node_of(b, g_of(b)), th__node_of(b, out_of(b))};
    th__give(b, th__use(b, 0), th__emit_as(&b->e, kernel, 2, args, "torch.mul"));
    return TH_OK;
}

TH_GRAD(tanh) { return by_kernel(b, "torch.ops.aten.tanh_backward.default"); }
TH_GRAD(sigmoid) { return by_kernel(b, "torch.ops.aten.sigmoid_backward.default"); }
