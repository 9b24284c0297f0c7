/* Any arguments at all are bound to every operator's parameters and given to its meta rule.
 *
 * A rule may decline. If it answers, each output is a tensor, and one that shares storage shares it with an argument
 * and stays inside of the memory that the argument spans.
 *
 * The input's bytes are choices: which operator, how many arguments, what each is. When they run out, choices go on
 * from a generator seeded by them, so short inputs make whole calls too.
 */
#include "thunder/thunder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { TENSORS = 24, CALLS = 60, ARGUMENTS = 7 };

typedef struct maker {
    const uint8_t *data;
    size_t size;
    uint64_t state;
    th_ctx *ctx;
    th_trace *t;
    th_dev devices[2];
    th_val tensors[TENSORS];
    uint32_t ntensors;
} maker;

static uint32_t choose(maker *m, uint32_t below) {
    if (m->size) {
        m->size--;
        m->state = (m->state ^ *m->data) * UINT64_C(0x100000001b3);
        return *m->data++ % below;
    }
    m->state ^= m->state << 13;
    m->state ^= m->state >> 7;
    m->state ^= m->state << 17;
    return (uint32_t)(m->state >> 20) % below;
}

/* ---- arguments ---- */

static int64_t some_int(maker *m) {
    static const int64_t odd[] = {INT64_MIN,        INT64_MIN + 1,    -3,       5, 16, 64, 100,
                                  INT64_C(1) << 40, INT64_C(1) << 62, INT64_MAX};
    return choose(m, 3) ? (int64_t)choose(m, 6) - 1 : odd[choose(m, sizeof odd / sizeof *odd)];
}

static void add_tensor(maker *m) {
    int64_t shape[18], stride[18], step = 1;
    uint32_t ndim = choose(m, 4) ? choose(m, 6) : choose(m, 18);
    for (uint32_t i = ndim; i-- > 0;) {
        shape[i] = choose(m, 3) ? choose(m, 5) : choose(m, 20) ? choose(m, 9) : 4096;
        stride[i] = choose(m, 4) ? step : choose(m, 9);
        if (shape[i] > 1 && step < INT64_C(1) << 40) step *= shape[i];
    }
    th_dtype dtype = choose(m, 3) ? TH_F32 : choose(m, 2) ? TH_I64 : (th_dtype)(1 + choose(m, TH_DTYPE_COUNT - 1));
    uint8_t flags = choose(m, 8) ? 0 : TH_TYPE_REQUIRES_GRAD;
    th_dev device = m->devices[choose(m, 6) == 0];
    th_typeref type = th_type_tensor(m->ctx, dtype, device, ndim, shape, choose(m, 2) ? stride : NULL, flags);
    if (!type) return;
    th_val v = th_trace_input(m->t, 0, type);
    m->t->values[v].offset = choose(m, 3) ? 0 : choose(m, 100);
    m->t->values[v].alias = choose(m, 3) ? 0 : 1 + choose(m, 2);
    m->tensors[m->ntensors++] = v;
}

static th_node some_node(maker *m, int depth);

static th_node some_sequence(maker *m, int depth) {
    th_node kids[70];
    uint32_t n = choose(m, 10) ? choose(m, 6) : choose(m, 70);
    bool ints = choose(m, 2);
    for (uint32_t i = 0; i < n; i++) kids[i] = ints ? th_node_int(m->t, some_int(m)) : some_node(m, depth + 1);
    return th_node_seq(m->t, choose(m, 2) ? TH_N_TUPLE : TH_N_LIST, n, kids);
}

static th_node some_slice(maker *m) {
    th_node kids[3];
    for (int i = 0; i < 3; i++) kids[i] = choose(m, 3) ? th_node_int(m->t, some_int(m)) : th_node_none(m->t);
    return th_node_seq(m->t, TH_N_SLICE, 3, kids);
}

static th_node some_text(maker *m) {
    static const char *const words[] = {"none",  "tanh", "floor",    "constant", "mean", "same",
                                        "valid", "cpu",  "bilinear", "nearest",  ""};
    static const char *const symbols[] = {"torch.preserve_format", "torch.contiguous_format", "torch.channels_last",
                                          "torch.strided"};
    if (choose(m, 2)) return th_node_symbol(m->t, th_intern_z(m->ctx, symbols[choose(m, 4)]));
    return th_node_str(m->t, th_intern_z(m->ctx, words[choose(m, sizeof words / sizeof *words)]));
}

static th_node some_node(maker *m, int depth) {
    static const double floats[] = {0, 1, -1, 0.5, 2, 0.1, 1e300, -1e300, __builtin_nan(""), __builtin_inf()};
    switch (choose(m, depth < 3 ? 14 : 11)) {
    case 0: return th_node_none(m->t);
    case 1: return th_node_bool(m->t, choose(m, 2));
    case 2: return th_node_float(m->t, floats[choose(m, sizeof floats / sizeof *floats)]);
    case 3: return some_text(m);
    case 4: return th_node_dtype(m->t, (th_dtype)(1 + choose(m, TH_DTYPE_COUNT - 1)));
    case 5: return th_node_device(m->t, m->devices[choose(m, 2)]);
    case 6: return choose(m, 2) ? th_node_ellipsis(m->t) : some_slice(m);
    case 7:
    case 8: return th_node_int(m->t, some_int(m));
    case 9:
    case 10: return th_node_value(m->t, m->tensors[choose(m, m->ntensors)]);
    default: return some_sequence(m, depth);
    }
}

/* Some of the parameters by name. */
static th_node some_keywords(maker *m, const char *params) {
    th_node kids[12];
    uint32_t n = 0;
    if (choose(m, 3)) return 0;
    while (*(params += strspn(params, ", *")) != '\0' && n < sizeof kids / sizeof *kids) {
        size_t name = strcspn(params, ",= ");
        if (choose(m, 3) == 0) {
            kids[n++] = th_node_str(m->t, th_intern(m->ctx, params, name));
            kids[n++] = some_node(m, 0);
        }
        params += strcspn(params, ",");
    }
    return n ? th_node_seq(m->t, TH_N_DICT, n, kids) : 0;
}

/* ---- answers ---- */

static void require(bool holds, const maker *m, const th_call *call, const char *what) {
    char *text = NULL;
    if (holds) return;
    th_trace_print(m->t, &text, NULL);
    fprintf(stderr, "%s: %s\n%s", call->def->name, what, text ? text : "");
    abort();
}

/* One past the last element that a tensor reaches from its first. */
static int64_t extent(const th_type *type) {
    int64_t last = 0;
    for (uint32_t i = 0; i < type->ndim; i++) {
        if (type->shape[i] == 0) return 0;
        last += (type->shape[i] - 1) * type->stride[i];
    }
    return last + 1;
}

static void check_out(const maker *m, const th_call *call, const th_out *out) {
    const th_type *type = th_type_get(m->ctx, out->type);
    require(type->kind == TH_TYPE_TENSOR, m, call, "an output is no tensor");
    if (!out->alias_of) {
        require(!out->same, m, call, "a new tensor is said to be an input");
        return;
    }
    const th_value *base = &m->t->values[out->alias_of];
    const th_type *whole = th_type_get(m->ctx, base->type);
    bool inside = out->offset >= base->offset && out->offset + extent(type) <= base->offset + extent(whole);
    require(extent(type) == 0 || inside, m, call, "a view reaches outside of its base");
    require(!out->same || out->type == base->type, m, call, "an input comes back as another type");
}

static void make_call(maker *m) {
    const th_opdef *def = th_catalog_get(choose(m, 256) * 256 % th_catalog_size() + choose(m, 256));
    th_node args[ARGUMENTS];
    uint32_t n = choose(m, ARGUMENTS);
    if (!def) return;
    for (uint32_t i = 0; i < n; i++) {
        bool tensor = i == 0 && choose(m, 8);
        args[i] = tensor ? th_node_value(m->t, m->tensors[choose(m, m->ntensors)]) : some_node(m, 0);
    }
    th_node positional = th_node_seq(m->t, TH_N_TUPLE, n, args), keywords = some_keywords(m, def->params);
    th_call call = {
        .default_dtype = TH_F32, .default_device = m->devices[0], .grad_mode = choose(m, 2), .facts = choose(m, 4)};
    if (th_call_bind(&call, def, m->t, positional, keywords) != TH_OK || def->meta(&call) != TH_OK) return;
    require(call.nouts > 0, m, &call, "an answer without outputs");
    for (uint32_t i = 0; i < call.nouts; i++) check_out(m, &call, &call.outs[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    if (!ctx) return 0;
    maker m = {.data = data, .size = size, .state = UINT64_C(0xcbf29ce484222325), .ctx = ctx};
    m.devices[0] = th_device(ctx, "cpu", -1);
    m.devices[1] = th_device(ctx, "cuda", 0);
    m.t = th_trace_new(ctx, "calls");
    while (m.ntensors < TENSORS) add_tensor(&m);
    for (int i = 0; i < CALLS; i++) make_call(&m);
    th_trace_free(m.t);
    th_ctx_free(ctx);
    return 0;
}
