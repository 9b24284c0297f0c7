/* Descriptors, operations, engines, runs. See graph.h.
 *
 * Everything that cuDNN hands out is a descriptor: created, given attributes one by one, finalised. The plan owns them
 * all, since the library does not say how long it needs each.
 */
#include "executors/cudnn/graph.h"

#include "base/ctx.h"

#include <string.h>

enum { /* descriptors */
       POINTWISE = 0,
       ENGINE_CONFIG = 3,
       HEURISTICS = 4,
       PLAN = 5,
       OPERATION_POINTWISE = 13,
       GRAPH = 15,
       PACK = 16,
       TENSOR = 17,
       MATMUL = 18,
       OPERATION_MATMUL = 19,
       REDUCTION = 21,
       OPERATION_REDUCTION = 22,
       OPERATION_RESHAPE = 31,
};
enum { /* types of attributes */
       IS_HANDLE = 0,
       IS_DATA_TYPE = 1,
       IS_BOOLEAN = 2,
       IS_INT64 = 3,
       IS_POINTER = 6,
       IS_HEURISTIC = 8,
       IS_POINTWISE_MODE = 14,
       IS_DESCRIPTOR = 15,
       IS_REDUCTION = 18,
};
enum { ALIGNMENT = 16, SCRATCH_ALIGNMENT = 256, MAX_ENGINES = 16, FALLBACK = 2, DECISION_TREE = 3 };

/* ---- the library ---- */

static th_status check(th_ctx *ctx, const th_cudnn *c, int code, const char *doing) {
    char text[256] = "";
    if (code == 0) return TH_OK;
    c->cudnnGetLastErrorString(text, sizeof text);
    return th_fail(ctx, TH_ERUN, "cuDNN, %s: %s %s", doing, c->cudnnGetErrorString(code), text);
}

th_status th_cudnn_open(th_ctx *ctx, const char *path, th_cudnn *c) {
    memset(c, 0, sizeof *c);
    TRY(th_dylib_open(ctx, path, false, &c->library));
#define TH_CUDNN_LOAD(name, ret, args)                                                 \
    {                                                                                  \
        void *symbol = th_dylib_symbol(c->library, #name);                             \
        memcpy(&c->name, &symbol, sizeof symbol);                                      \
        if (!symbol) return th_fail(ctx, TH_EIO, "%s is too old: no %s", path, #name); \
    }
    TH_CUDNN_SYMBOLS(TH_CUDNN_LOAD)
#undef TH_CUDNN_LOAD
    c->version = (int64_t)c->cudnnGetVersion();
    if (c->version < TH_CUDNN_OLDEST)
        return th_fail(ctx, TH_EIO, "cuDNN %lld is older than %d", (long long)c->version, TH_CUDNN_OLDEST);
    return TH_OK;
}

/* ---- descriptors ---- */

static void fail(th__cudnn_graph *g, int code, const char *doing) {
    if (g->status == TH_OK) g->status = check(g->ctx, g->c, code, doing);
}

void *th__cudnn_make(th__cudnn_graph *g, int kind) {
    void *made = NULL;
    if (g->status != TH_OK) return NULL;
    if (g->plan->nowned == TH_CUDNN_DESCRIPTORS) {
        g->status = th_fail(g->ctx, TH_ELIMIT, "more than %d descriptors", TH_CUDNN_DESCRIPTORS);
        return NULL;
    }
    fail(g, g->c->cudnnBackendCreateDescriptor(kind, &made), "making a descriptor");
    if (g->status != TH_OK) return NULL;
    return g->plan->owned[g->plan->nowned++] = made;
}

void th__cudnn_set(th__cudnn_graph *g, void *descriptor, int name, int type, int64_t count, const void *values) {
    if (g->status == TH_OK)
        fail(g, g->c->cudnnBackendSetAttribute(descriptor, name, type, count, values), "setting an attribute");
}

void th__cudnn_set_tensor(th__cudnn_graph *g, void *descriptor, int name, th__cudnn_tensor t) {
    if (t) th__cudnn_set(g, descriptor, name, IS_DESCRIPTOR, 1, &t);
}

void th__cudnn_finish(th__cudnn_graph *g, void *descriptor) {
    if (g->status == TH_OK) fail(g, g->c->cudnnBackendFinalize(descriptor), "finalising a descriptor");
}

void th__cudnn_operation(th__cudnn_graph *g, void *descriptor) {
    th__cudnn_finish(g, descriptor);
    if (g->status == TH_OK && g->noperations == TH_CUDNN_OPERATIONS)
        g->status = th_fail(g->ctx, TH_ELIMIT, "more than %d operations", TH_CUDNN_OPERATIONS);
    if (g->status == TH_OK) g->operations[g->noperations++] = descriptor;
}

/* ---- tensors ---- */

th__cudnn_shape th__cudnn_dense(int64_t a, int64_t b, int64_t c, int64_t d) {
    return (th__cudnn_shape){{a, b, c, d}, {b * c * d, c * d, d, 1}};
}

th__cudnn_shape th__cudnn_strided(int64_t a, int64_t b, int64_t c, int64_t d, const int64_t stride[4]) {
    return (th__cudnn_shape){{a, b, c, d}, {stride[0], stride[1], stride[2], stride[3]}};
}

th__cudnn_shape th__cudnn_swapped(th__cudnn_shape s) {
    return (th__cudnn_shape){{s.n[0], s.n[1], s.n[3], s.n[2]}, {s.stride[0], s.stride[1], s.stride[3], s.stride[2]}};
}

static th__cudnn_tensor tensor(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s, bool is_virtual, bool by_value) {
    void *t = th__cudnn_make(g, TENSOR);
    int data_type = type;
    int64_t alignment = ALIGNMENT, uid = ++g->next_uid;
    th__cudnn_set(g, t, 901, IS_DATA_TYPE, 1, &data_type);
    th__cudnn_set(g, t, 902, IS_INT64, 4, s.n);
    th__cudnn_set(g, t, 903, IS_INT64, 4, s.stride);
    th__cudnn_set(g, t, 906, IS_INT64, 1, &uid);
    th__cudnn_set(g, t, 900, IS_INT64, 1, &alignment);
    if (is_virtual) th__cudnn_set(g, t, 907, IS_BOOLEAN, 1, &is_virtual);
    if (by_value) th__cudnn_set(g, t, 908, IS_BOOLEAN, 1, &by_value);
    th__cudnn_finish(g, t);
    return g->status == TH_OK ? t : NULL;
}

static th__cudnn_tensor with_address(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s, th_cudnn_operand operand) {
    th__cudnn_tensor t = tensor(g, type, s, false, operand.kind == TH_CUDNN_VALUE);
    th_cudnn_plan *p = g->plan;
    if (g->status == TH_OK && p->noperands == TH_CUDNN_OPERANDS)
        g->status = th_fail(g->ctx, TH_ELIMIT, "more than %d operands", TH_CUDNN_OPERANDS);
    if (g->status != TH_OK) return NULL;
    p->uids[p->noperands] = g->next_uid;
    p->operands[p->noperands++] = operand;
    return t;
}

th__cudnn_tensor th__cudnn_argument(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s) {
    return with_address(g, type, s, (th_cudnn_operand){.kind = TH_CUDNN_ARGUMENT, .at = g->plan->narguments++});
}

th__cudnn_tensor th__cudnn_scratch(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s, uint64_t bytes) {
    uint64_t at = g->plan->scratch;
    g->plan->scratch += (bytes + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
    return with_address(g, type, s, (th_cudnn_operand){.kind = TH_CUDNN_SCRATCH, .at = at});
}

th__cudnn_tensor th__cudnn_value(th__cudnn_graph *g, float value) {
    return with_address(g, TH_CUDNN_F32, th__cudnn_dense(1, 1, 1, 1),
                        (th_cudnn_operand){.kind = TH_CUDNN_VALUE, .value.f = value});
}

th__cudnn_tensor th__cudnn_virtual(th__cudnn_graph *g, uint8_t type, th__cudnn_shape s) {
    return tensor(g, type, s, true, false);
}

/* ---- operations ---- */

void th__cudnn_pointwise(th__cudnn_graph *g, th__cudnn_mode mode, uint8_t compute, int64_t axis, th__cudnn_tensor x,
                         th__cudnn_tensor b, th__cudnn_tensor t, th__cudnn_tensor y) {
    void *how = th__cudnn_make(g, POINTWISE);
    int number = mode, precision = compute;
    th__cudnn_set(g, how, 0, IS_POINTWISE_MODE, 1, &number);
    th__cudnn_set(g, how, 1, IS_DATA_TYPE, 1, &precision);
    if (mode == TH__CUDNN_INDEX) th__cudnn_set(g, how, 9, IS_INT64, 1, &axis);
    th__cudnn_finish(g, how);
    void *op = th__cudnn_make(g, OPERATION_POINTWISE);
    th__cudnn_set(g, op, 750, IS_DESCRIPTOR, 1, &how);
    th__cudnn_set_tensor(g, op, 751, x);
    th__cudnn_set_tensor(g, op, 752, b);
    th__cudnn_set_tensor(g, op, 753, y);
    th__cudnn_set_tensor(g, op, 758, t);
    th__cudnn_operation(g, op);
}

void th__cudnn_matmul(th__cudnn_graph *g, th__cudnn_tensor a, th__cudnn_tensor b, th__cudnn_tensor y) {
    void *how = th__cudnn_make(g, MATMUL);
    int compute = TH_CUDNN_F32;
    th__cudnn_set(g, how, 1500, IS_DATA_TYPE, 1, &compute);
    th__cudnn_finish(g, how);
    void *op = th__cudnn_make(g, OPERATION_MATMUL);
    th__cudnn_set_tensor(g, op, 1520, a);
    th__cudnn_set_tensor(g, op, 1521, b);
    th__cudnn_set_tensor(g, op, 1522, y);
    th__cudnn_set(g, op, 1523, IS_DESCRIPTOR, 1, &how);
    th__cudnn_operation(g, op);
}

void th__cudnn_reduce(th__cudnn_graph *g, int how_, th__cudnn_tensor x, th__cudnn_tensor y) {
    void *how = th__cudnn_make(g, REDUCTION);
    int number = how_, compute = TH_CUDNN_F32;
    th__cudnn_set(g, how, 1600, IS_REDUCTION, 1, &number);
    th__cudnn_set(g, how, 1601, IS_DATA_TYPE, 1, &compute);
    th__cudnn_finish(g, how);
    void *op = th__cudnn_make(g, OPERATION_REDUCTION);
    th__cudnn_set_tensor(g, op, 1610, x);
    th__cudnn_set_tensor(g, op, 1611, y);
    th__cudnn_set(g, op, 1612, IS_DESCRIPTOR, 1, &how);
    th__cudnn_operation(g, op);
}

void th__cudnn_reshape(th__cudnn_graph *g, th__cudnn_tensor x, th__cudnn_tensor y) {
    void *op = th__cudnn_make(g, OPERATION_RESHAPE);
    th__cudnn_set_tensor(g, op, 2200, x);
    th__cudnn_set_tensor(g, op, 2201, y);
    th__cudnn_operation(g, op);
}

/* ---- plans ---- */

th_status th__cudnn_begin(th__cudnn_graph *g, th_ctx *ctx, th_cudnn *c, int device, th_cudnn_plan *plan) {
    *g = (th__cudnn_graph){.ctx = ctx, .c = c, .plan = plan};
    memset(plan, 0, sizeof *plan);
    if (device < 0 || device >= TH_CUDNN_DEVICES)
        return th_fail(ctx, TH_ELIMIT, "device cuda:%d: at most %d devices", device, TH_CUDNN_DEVICES);
    if (!c->handles[device]) TRY(check(ctx, c, c->cudnnCreate(&c->handles[device]), "making a handle"));
    plan->handle = c->handles[device];
    return TH_OK;
}

/* A plan of one of the engines that a heuristic proposes, best first; false: none takes the graph. */
static bool choose_engine(th__cudnn_graph *g, void *graph, int mode) {
    void *heuristics = th__cudnn_make(g, HEURISTICS), *configs[MAX_ENGINES];
    int64_t n = 0;
    th__cudnn_set(g, heuristics, 201, IS_DESCRIPTOR, 1, &graph);
    th__cudnn_set(g, heuristics, 200, IS_HEURISTIC, 1, &mode);
    if (g->status != TH_OK || g->c->cudnnBackendFinalize(heuristics) != 0) return false;
    for (int i = 0; i < MAX_ENGINES; i++) configs[i] = th__cudnn_make(g, ENGINE_CONFIG);
    if (g->status != TH_OK) return false;
    if (g->c->cudnnBackendGetAttribute(heuristics, 202, IS_DESCRIPTOR, MAX_ENGINES, &n, configs) != 0) return false;
    for (int64_t i = 0; i < n && g->status == TH_OK; i++) {
        void *plan = th__cudnn_make(g, PLAN);
        th__cudnn_set(g, plan, 400, IS_HANDLE, 1, &g->plan->handle);
        th__cudnn_set(g, plan, 401, IS_DESCRIPTOR, 1, &configs[i]);
        if (g->status == TH_OK && g->c->cudnnBackendFinalize(plan) == 0) {
            g->plan->plan = plan;
            return true;
        }
    }
    return false;
}

static void choose_plan(th__cudnn_graph *g) {
    void *graph = th__cudnn_make(g, GRAPH);
    int64_t workspace = 0, got = 0;
    th__cudnn_set(g, graph, 800, IS_HANDLE, 1, &g->plan->handle);
    th__cudnn_set(g, graph, 801, IS_DESCRIPTOR, g->noperations, g->operations);
    th__cudnn_finish(g, graph);
    if (g->status != TH_OK) return;
    if (!choose_engine(g, graph, DECISION_TREE) && !choose_engine(g, graph, FALLBACK)) {
        char text[256] = "";
        g->c->cudnnGetLastErrorString(text, sizeof text);
        if (g->status == TH_OK)
            g->status = th_fail(g->ctx, TH_DECLINED, "cuDNN has no engine for these shapes: %s", text);
        return;
    }
    fail(g, g->c->cudnnBackendGetAttribute(g->plan->plan, 402, IS_INT64, 1, &got, &workspace), "asking the plan");
    g->plan->workspace = g->plan->scratch;
    g->plan->scratch += (uint64_t)workspace;
}

th_status th__cudnn_end(th__cudnn_graph *g) {
    if (g->status == TH_OK) choose_plan(g);
    if (g->status != TH_OK) th_cudnn_plan_fini(g->c, g->plan);
    return g->status;
}

void th_cudnn_plan_fini(const th_cudnn *c, th_cudnn_plan *plan) {
    while (plan->nowned) c->cudnnBackendDestroyDescriptor(plan->owned[--plan->nowned]);
    memset(plan, 0, sizeof *plan);
}

/* ---- running ---- */

static int fill_pack(const th_cudnn *c, const th_cudnn_plan *p, void *pack, void *const *arguments, char *scratch) {
    void *addresses[TH_CUDNN_OPERANDS], *workspace = scratch + p->workspace;
    for (uint32_t i = 0; i < p->noperands; i++) {
        const th_cudnn_operand *o = &p->operands[i];
        addresses[i] = o->kind == TH_CUDNN_ARGUMENT  ? arguments[o->at]
                       : o->kind == TH_CUDNN_SCRATCH ? scratch + o->at
                                                     : (void *)&o->value;
    }
    int code = c->cudnnBackendSetAttribute(pack, 1000, IS_INT64, p->noperands, p->uids);
    if (!code) code = c->cudnnBackendSetAttribute(pack, 1001, IS_POINTER, p->noperands, addresses);
    if (!code) code = c->cudnnBackendSetAttribute(pack, 1003, IS_POINTER, 1, &workspace);
    return code ? code : c->cudnnBackendFinalize(pack);
}

th_status th_cudnn_run(th_ctx *ctx, const th_cudnn *c, const th_cudnn_plan *plan, void *stream, void *const *arguments,
                       void *scratch) {
    void *pack = NULL;
    int code = c->cudnnSetStream(plan->handle, stream);
    if (!code) code = c->cudnnBackendCreateDescriptor(PACK, &pack);
    if (!code) code = fill_pack(c, plan, pack, arguments, scratch);
    if (!code) code = c->cudnnBackendExecute(plan->handle, plan->plan, pack);
    th_status status = check(ctx, c, code, "running a plan");
    if (pack) c->cudnnBackendDestroyDescriptor(pack);
    return status;
}
