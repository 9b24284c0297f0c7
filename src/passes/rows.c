/* See rows.h. */
#include "passes/rows.h"

#include "ops/backward.h"

typedef struct rows {
    th__rewrite r;
    bool *late;            /* by value: depends on a gradient */
    bool *wanted;          /* by value: an operation that does uses it */
    bool *late_op;         /* by operation */
    th_val *out, *instead; /* what was taken apart, and what late operations use in its place */
    uint32_t count;
    bool hit;
} rows;

static void test_late(void *user, th_val *v) { ((rows *)user)->hit |= ((rows *)user)->late[*v]; }
static void set_wanted(void *user, th_val *v) { ((rows *)user)->wanted[*v] = true; }
static void set_late(void *user, th_val *v) { ((rows *)user)->late[*v] = true; }

static th_status find_late(rows *s, th_trace *t, th__scratch *scratch, uint32_t ntangents) {
    s->late = th__scratch_zeroed(scratch, t->nvalues, sizeof *s->late);
    s->wanted = th__scratch_zeroed(scratch, t->nvalues, sizeof *s->wanted);
    s->late_op = th__scratch_zeroed(scratch, t->nops, sizeof *s->late_op);
    s->out = th__scratch_zeroed(scratch, t->nops, sizeof *s->out);
    s->instead = th__scratch_zeroed(scratch, t->nops, sizeof *s->instead);
    if (!s->late || !s->wanted || !s->late_op || !s->out || !s->instead) return TH_ENOMEM;
    for (uint32_t i = t->ninputs - ntangents; i < t->ninputs; i++) s->late[t->inputs[i]] = true;
    for (th_opref o = 1; o < t->nops; o++) {
        s->hit = false;
        th_op_each_use(t, o, test_late, s);
        if (s->hit) th_op_each_out(t, o, set_late, s);
        if (s->hit) th_op_each_use(t, o, set_wanted, s);
        s->late_op[o] = s->hit;
    }
    return TH_OK;
}

/* Scores that are inputs are saved anyway, and float64 says more than the sums would. */
static bool is_wanted(const th_trace *t, const th_op *op, th_val x) {
    if (!th__op_is(t, op, "torch.log_softmax") || op->effects || op->kwargs || !x || !t->values[x].def) return false;
    uint8_t dtype = th_type_get(t->ctx, t->values[x].type)->dtype;
    return dtype == TH_F32 || dtype == TH_BF16 || dtype == TH_F16;
}

/* The two operations beside one that takes logarithms. */
static th_status add_halves(rows *s, const th_op *op, const th_catalog *catalog) {
    th_trace *t = s->r.t;
    th_val x = th__node_as_value(t, th__op_arg(t, op, 0, NULL)), out = th__node_as_value(t, op->outs);
    th_node dim = th__op_arg(t, op, 1, NULL);
    if (!out || !s->wanted[out] || !dim || t->nodes[dim].kind != TH_N_INT || !is_wanted(t, op, x)) return TH_OK;
    const th_type *type = th_type_get(t->ctx, t->values[x].type);
    int64_t shape[TH_MAX_RANK], at = t->nodes[dim].u.i;
    uint32_t ndim = type->ndim;
    if (at < 0) at += ndim;
    if (at < 0 || at >= ndim || ndim > TH_MAX_RANK) return TH_OK;
    for (uint32_t i = 0; i < ndim; i++) shape[i] = i == at ? 1 : type->shape[i];
    th__emitter e = {t, catalog, op->file, op->line, op->marks, 0};
    th_typeref sums = th_type_tensor(t->ctx, TH_F32, type->device, ndim, shape, NULL, 0);
    th_node first[] = {th_node_value(t, x), dim};
    th_val r = th__emit_typed(&e, TH__ROWS_SAVED, sums, 2, first);
    th_typeref same = th_type_set_grad(t->ctx, t->values[out].type, false);
    th_node second[] = {th_node_value(t, x), th_node_value(t, r),
                        th_node_dtype(t, (th_dtype)th_type_get(t->ctx, same)->dtype)};
    s->out[s->count] = out;
    s->instead[s->count++] = th__emit_typed(&e, "thunder._rows.log_softmax", same, 3, second);
    return th_trace_status(t);
}

static th_status run(rows *s, const th_catalog *catalog) {
    for (th_opref o = 1; o < s->r.nops; o++) {
        for (uint32_t i = 0; i < s->count; i++) s->r.value[s->out[i]] = s->late_op[o] ? s->instead[i] : 0;
        th__rewrite_copy(&s->r, &s->r.ops[o]);
        if (!s->late_op[o]) TRY(add_halves(s, &s->r.ops[o], catalog));
    }
    for (uint32_t i = 0; i < s->count; i++) s->r.value[s->out[i]] = 0;
    return th_trace_status(s->r.t);
}

th_status th__rows_split(th_trace *t, uint32_t ntangents) {
    rows s = {0};
    th__scratch scratch = {.ctx = t->ctx};
    th_catalog *catalog = NULL;
    th_status status = find_late(&s, t, &scratch, ntangents);
    if (status == TH_OK) status = th_catalog_new(t->ctx, &catalog);
    if (status == TH_OK) status = th__rewrite_begin(&s.r, t);
    if (status == TH_OK) status = th__rewrite_end(&s.r, run(&s, catalog));
    th_catalog_free(catalog);
    th__scratch_fini(&scratch);
    return status;
}
