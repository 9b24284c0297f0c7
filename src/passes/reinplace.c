/* What was made functional, and in the end is copied to where it came from, is computed there.
 *
 *     t0 = torch.mul(p, 0.9)                     t0 = torch.Tensor.mul_(p, 0.9)
 *     t1 = torch.add(t0, g)                      t1 = torch.Tensor.add_(t0, g)
 *     t2 = torch.sum(t1)                         t2 = torch.sum(t1)
 *     torch.Tensor.copy_(p, t1)
 *
 * For a chain of pointwise operations with twins that work in place. Nobody may read the former contents after the
 * chain has begun, or write to that memory otherwise, and the chain's own results are no results of the trace. No
 * effect comes between its beginning and the copy, and nothing that may raise, unless an input has been written to
 * before that anyway: where a run ends early, memory is as it was.
 *
 * Likewise (the pass `reuse`) what is computed of a large intermediate that nobody needs afterwards is computed in its
 * memory: new memory of that size comes page by page from the system. Not before executors fuse such operations.
 */
#include "passes/pass.h"
#include "thunder/ops.h"

#include <string.h>

typedef struct twin twin;

typedef struct reinplace {
    th_trace *t;
    th_opref *last_use; /* by group: the last operation that reads it, but for copies into it */
    uint32_t *nwrites;  /* by group */
    uint32_t *nuses;    /* by value: by operations */
    bool *returned;     /* by value */
    twin *twins;
    uint32_t *risks;  /* by operation: how many up to it may raise */
    th_opref touched; /* the first operation that writes to an input for good */
    th_opref at;
    th_val *chain; /* by operation: the value that it computes in place of; 0: none */
    bool *dropped; /* by operation */
} reinplace;

/* A copy of the whole of one value into another: the value that it is copied to, or 0. */
static th_val copies_to(const th_trace *t, const th_op *op, th_val *from) {
    const th_node_data *args = &t->nodes[op->args];
    if (op->kind != TH_OP_CALL || op->nwrites != 1 || op->effects & (TH_FX_STATE | TH_FX_RANDOM) || op->kwargs ||
        args->count != 2 || !th__op_is(t, op, "torch.Tensor.copy_"))
        return 0;
    th_val to = th__node_as_value(t, t->kids[args->u.kids]);
    *from = th__node_as_value(t, t->kids[args->u.kids + 1]);
    return *from && to == t->kids[op->writes] && !op->outs ? to : 0;
}

static void note_use(void *user, th_val *v) {
    reinplace *p = user;
    p->nuses[*v]++;
    p->last_use[th__group_of(p->t, *v)] = p->at;
}

static void note_result(void *user, th_val *v) { ((reinplace *)user)->returned[*v] = true; }

static th_status note_risks(reinplace *p, const th_catalog *catalog, const uint8_t *groups) {
    th_trace *t = p->t;
    th_val from;
    p->touched = t->nops;
    for (th_opref op = 1; op < t->nops; op++) {
        const th_op *data = &t->ops[op];
        bool copies = data->kind != TH_OP_DEL && copies_to(t, data, &from), raises = false;
        for (uint32_t i = 0; i < data->nwrites && !copies && p->touched == t->nops; i++)
            if (groups[th__group_of(t, t->kids[data->writes + i])] & TH__GROUP_INPUT) p->touched = op;
        if (!copies) TRY(th__op_may_raise(catalog, t, op, &raises));
        p->risks[op] = p->risks[op - 1] + raises;
    }
    return TH_OK;
}

static void note_uses(reinplace *p) {
    const th_trace *t = p->t;
    for (p->at = 1; p->at < t->nops; p->at++) {
        const th_op *op = &t->ops[p->at];
        th_val from = 0, to = op->kind == TH_OP_DEL ? 0 : copies_to(t, op, &from);
        for (uint32_t i = 0; i < op->nwrites; i++) p->nwrites[th__group_of(t, t->kids[op->writes + i])]++;
        if (to)
            note_use(p, &from);
        else if (op->kind != TH_OP_DEL)
            th_op_each_use(p->t, p->at, note_use, p);
    }
    th_node_each_value(p->t, t->result, note_result, p);
}

/* The operation in place that a functional one is the twin of, by the latter's name: open addressing. */
enum { TWINS = 1024 };
struct twin {
    th_str functional, in_place;
};

static twin *twin_place(twin *twins, th_str name) {
    uint32_t at = (name * 2654435761u) % TWINS;
    while (twins[at].functional && twins[at].functional != name) at = (at + 1) % TWINS;
    return &twins[at];
}

static void note_twins(th_ctx *ctx, twin *twins) {
    for (size_t i = 0, n = 0; i < th_catalog_size() && n < TWINS / 2; i++) {
        const th_opdef *def = th_catalog_get(i);
        if (!def->functional || def->fusion != TH_FUSE_POINTWISE) continue;
        for (const char *at = def->names; at && *at; at += strcspn(at, " "), at += strspn(at, " ")) {
            size_t length = strcspn(at, " ");
            if (strncmp(at, "torch.Tensor.", 13) != 0 || at[length - 1] != '_' || at[length - 2] == '_') continue;
            twin *t = twin_place(twins, th_intern_z(ctx, def->functional));
            if (!t->functional) n++;
            *t = (twin){th_intern_z(ctx, def->functional), th_intern(ctx, at, length)};
            break;
        }
    }
}

static th_str twin_of(const reinplace *p, const th_op *op) { /* 0: none */
    bool plain =
        op->kind == TH_OP_CALL && !op->callee_opaque && !op->nwrites && !op->effects && !(op->marks & TH_MARK_SIZED);
    return plain ? twin_place(p->twins, op->callee)->in_place : 0;
}

static bool same_type(const th_trace *t, th_val a, th_val b) {
    return th_type_set_grad(t->ctx, t->values[a].type, false) == th_type_set_grad(t->ctx, t->values[b].type, false);
}

typedef struct finding {
    const th_trace *t;
    th_val value; /* this one does not count */
    uint32_t group;
    bool found;
} finding;

static void find_group(void *user, th_val *v) {
    finding *f = user;
    f->found |= *v != f->value && th__group_of(f->t, *v) == f->group;
}

/* Does the operation read the memory of `value`, but for `value` itself where that is `allowed`? */
static bool reads_memory_of(th_trace *t, th_opref op, th_val value, bool allowed) {
    finding f = {t, allowed ? value : 0, th__group_of(t, value), false};
    th_op_each_use(t, op, find_group, &f);
    return f.found;
}

/* From the value that is copied back to what the chain begins with, which is `to`: the first operation, or 0. */
static th_opref chain_begins(const reinplace *p, th_val value, th_val to) {
    th_trace *t = p->t;
    for (bool last = true;; last = false) {
        th_opref op = t->values[value].def;
        const th_op *data = &t->ops[op];
        bool own = op && !t->values[value].alias && !p->returned[value] && !p->nwrites[th__group_of(t, value)] &&
                   same_type(t, value, to) && th__node_as_value(t, data->outs) == value && twin_of(p, data);
        if (!own || (!last && p->nuses[value] != 1)) return 0;
        th_val first = th__node_as_value(t, th__op_arg(t, data, 0, NULL));
        if (!first || reads_memory_of(t, op, to, first == to)) return 0;
        if (first == to) return op;
        value = first;
    }
}

/* In place from the first operation of the chain on. */
static void take(reinplace *p, th_val value, th_val to) {
    th_trace *t = p->t;
    if (!t->values[to].alias) t->values[to].alias = th_trace_alias(t);
    for (th_val first = 0; first != to; value = first) {
        th_opref op = t->values[value].def;
        first = th__node_as_value(t, th__op_arg(t, &t->ops[op], 0, NULL));
        p->chain[op] = first;
        t->values[value].alias = t->values[to].alias;
        t->values[value].offset = t->values[to].offset;
    }
}

static bool find(reinplace *p, th_fuel *fuel) {
    th_trace *t = p->t;
    th_opref effect = 0; /* the last one */
    bool any = false;
    for (th_opref op = 1; op < t->nops; op++) {
        th_val from = 0, to = t->ops[op].kind == TH_OP_DEL ? 0 : copies_to(t, &t->ops[op], &from);
        if (t->ops[op].effects & TH_FX_STATE) effect = op;
        if (!to || p->nwrites[th__group_of(t, to)] != 1) continue;
        th_opref first = chain_begins(p, from, to);
        th_opref end = p->touched < op ? p->touched : op; /* where an input is written to in any case */
        if (!first || first < effect || (first < end && p->risks[end - 1] > p->risks[first])) continue;
        if (p->last_use[th__group_of(t, to)] > first) continue;
        if (!th_fuel_take(fuel, "reinplace", th_str_get(t->ctx, t->values[from].name))) continue;
        take(p, from, to);
        p->dropped[op] = any = true;
    }
    return any;
}

enum { LARGE = 1 << 16 }; /* bytes; for less, new memory costs nothing and there are faster kernels */

static bool reuse(reinplace *p, th_fuel *fuel) {
    th_trace *t = p->t;
    bool any = false;
    for (th_opref op = 1; op < t->nops; op++) {
        const th_op *data = &t->ops[op];
        th_val out = twin_of(p, data) ? th__node_as_value(t, data->outs) : 0;
        th_val in = out ? th__node_as_value(t, th__op_arg(t, data, 0, NULL)) : 0;
        if (!in || p->chain[op] || p->nuses[in] != 1 || p->returned[in] || t->values[in].alias ||
            t->values[out].alias || p->nwrites[th__group_of(t, in)] || p->nwrites[th__group_of(t, out)] ||
            !same_type(t, in, out) || th__bytes_of(t, in) < LARGE || !t->values[in].def)
            continue;
        if (!twin_of(p, &t->ops[t->values[in].def])) continue; /* else it may be its own argument */
        if (!th_fuel_take(fuel, "reuse", th_str_get(t->ctx, t->values[out].name))) continue;
        p->chain[op] = in;
        any = true;
    }
    for (th_opref op = 1; op < t->nops; op++) { /* one group from the first to the last */
        th_val in = p->chain[op], out = in ? th__node_as_value(t, t->ops[op].outs) : 0;
        if (!in || t->values[out].alias) continue;
        if (!t->values[in].alias) t->values[in].alias = th_trace_alias(t);
        t->values[out].alias = t->values[in].alias;
    }
    return any;
}

static void emit_in_place(const reinplace *p, const th_op *op, th_val first) {
    th_trace *t = p->t;
    th_trace_op(t, &(th_op_args){.kind = TH_OP_CALL,
                                 .callee = twin_of(p, op),
                                 .args = op->args,
                                 .kwargs = op->kwargs,
                                 .outs = op->outs,
                                 .nwrites = 1,
                                 .writes = &first,
                                 .marks = op->marks,
                                 .file = op->file,
                                 .line = op->line});
}

/* Is there anything to do? Most programs write to no input. */
static bool has_copies(const th_trace *t) {
    bool found = false;
    th_val from;
    for (th_opref op = 1; op < t->nops && !found; op++)
        found = t->ops[op].kind == TH_OP_CALL && t->ops[op].nwrites && copies_to(t, &t->ops[op], &from);
    return found;
}

static th_status begin(reinplace *p, th__scratch *s, bool temporaries) {
    th_trace *t = p->t;
    uint32_t groups = th__group_count(t);
    p->twins = th__scratch_zeroed(s, TWINS, sizeof *p->twins);
    p->risks = th__scratch_zeroed(s, t->nops, sizeof *p->risks);
    p->last_use = th__scratch_zeroed(s, groups, sizeof *p->last_use);
    p->nwrites = th__scratch_zeroed(s, groups, sizeof *p->nwrites);
    p->nuses = th__scratch_zeroed(s, t->nvalues, sizeof *p->nuses);
    p->returned = th__scratch_zeroed(s, t->nvalues, sizeof *p->returned);
    p->chain = th__scratch_zeroed(s, t->nops, sizeof *p->chain);
    p->dropped = th__scratch_zeroed(s, t->nops, sizeof *p->dropped);
    if (!p->twins || !p->risks || !p->last_use || !p->nwrites || !p->nuses || !p->returned || !p->chain || !p->dropped)
        return th_ctx_error(t->ctx)->status;
    note_twins(t->ctx, p->twins);
    note_uses(p);
    if (temporaries) return th_trace_status(t);
    th_catalog *catalog = NULL;
    uint8_t *inputs = th__groups(t, s);
    TRY(inputs ? th_catalog_new(t->ctx, &catalog) : th_ctx_error(t->ctx)->status);
    th_status status = note_risks(p, catalog, inputs);
    th_catalog_free(catalog);
    return status;
}

static th_status run(th_trace *t, th_fuel *fuel, bool temporaries) {
    th__scratch s = {.ctx = t->ctx};
    reinplace p = {.t = t};
    th__rewrite r;
    if (!temporaries && !has_copies(t)) return TH_OK;
    th_status status = begin(&p, &s, temporaries);
    bool any = status == TH_OK && (temporaries ? reuse(&p, fuel) : find(&p, fuel));
    if (any && (status = th__rewrite_begin(&r, t)) == TH_OK) {
        for (th_opref op = 1; op < r.nops; op++) {
            if (p.chain[op])
                emit_in_place(&p, &r.ops[op], p.chain[op]);
            else if (!p.dropped[op])
                th__rewrite_copy(&r, &r.ops[op]);
        }
        status = th__rewrite_end(&r, th_trace_status(t));
    }
    th__scratch_fini(&s);
    return status;
}

th_status th_pass_reinplace(th_trace *t, th_fuel *fuel) { return run(t, fuel, false); }
th_status th_pass_reuse(th_trace *t, th_fuel *fuel) { return run(t, fuel, true); }
