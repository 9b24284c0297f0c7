/* Splits a joint trace: see thunder/grad.h.
 *
 * What depends on no gradient and is needed for the results, or has effects, is the forward trace; the rest is the
 * backward one. The backward trace needs values of the forward one: they are saved, or computed again from others that
 * are. Which, is a minimum cut through the forward operations: the source is what exists anyway (inputs) or cannot be
 * made again (random numbers, matrix products, anything that is not known to be cheap), the sink is what backward
 * operations use, and cutting a value costs its bytes.
 */
#include "thunder/grad.h"

#include "ops/backward.h"
#include "passes/cut.h"
#include "passes/pass.h"
#include "passes/rows.h"
#include "passes/tie.h"

#include <string.h>

typedef struct splitter {
    const th_joint *joint;
    th_trace *t;
    th__scratch scratch;
    th_catalog *catalog;
    bool *late;      /* by value: depends on a gradient */
    bool *forward;   /* by operation: part of the forward trace */
    bool *backward;  /* by operation: part of the backward trace; both: computed twice */
    bool *made;      /* by value: the forward trace has it */
    bool *input;     /* by value: an input of the call */
    bool *result;    /* by value: the caller gets it, so that keeping it costs nothing */
    uint8_t *groups; /* flags of th__groups; what is copied to after the call counts as written */
    bool *wanted;    /* by value: the backward trace uses it and does not make it */
    uint8_t *stored; /* by value: flags below, where regions are fused */
    th_remat remat;
    bool hit, written;
} splitter;

static void test_late(void *user, th_val *v) { ((splitter *)user)->hit |= ((splitter *)user)->late[*v]; }
static void set_late(void *user, th_val *v) { ((splitter *)user)->late[*v] = true; }
static void test_wanted(void *user, th_val *v) { ((splitter *)user)->hit |= ((splitter *)user)->wanted[*v]; }
static void set_wanted(void *user, th_val *v) { ((splitter *)user)->wanted[*v] = true; }
static void set_result(void *user, th_val *v) { ((splitter *)user)->result[*v] = true; }
static void set_made(void *user, th_val *v) { ((splitter *)user)->made[*v] = true; }

static th_node result_kid(const th_trace *t, uint32_t i) { return t->kids[t->nodes[t->result].u.kids + i]; }

static uint32_t nvalues(const th_joint *joint) { return joint->nresults + joint->nmutated; }
static uint32_t ngradients(const th_joint *joint) { return joint->nwrt + joint->nkept; }

/* ---- which operation belongs where ---- */

static void find_forward(splitter *s) {
    th_trace *t = s->t;
    uint32_t first = t->ninputs - s->joint->ntangents;
    for (uint32_t i = 0; i < t->ninputs; i++) {
        if (i < first)
            s->input[t->inputs[i]] = s->made[t->inputs[i]] = true;
        else
            s->late[t->inputs[i]] = true;
    }
    for (th_opref o = 1; o < t->nops; o++) {
        s->hit = false;
        th_op_each_use(t, o, test_late, s);
        if (s->hit) th_op_each_out(t, o, set_late, s);
        s->backward[o] = s->hit; /* for now: late */
    }
    for (uint32_t i = 0; i < nvalues(s->joint); i++) {
        th_node_each_value(t, result_kid(t, i), set_wanted, s);
        th_node_each_value(t, result_kid(t, i), set_result, s);
    }
    for (th_opref o = t->nops; o-- > 1;) {
        if (t->ops[o].kind == TH_OP_DEL || s->backward[o]) continue;
        bool tie = th__tie_of(t, &t->ops[o]) == TH__TIE_HOOK; /* the backward has the call */
        s->hit = (t->ops[o].effects != 0 && !tie && !(t->ops[o].marks & TH_MARK_LATE)) ||
                 t->ops[o].marks & TH_MARK_RAISES || th__op_is(t, &t->ops[o], TH__ROWS_SAVED);
        th_op_each_out(t, o, test_wanted, s);
        s->forward[o] = s->hit;
        if (s->hit) th_op_each_use(t, o, set_wanted, s);
    }
    for (th_opref o = 1; o < t->nops; o++)
        if (s->forward[o]) th_op_each_out(t, o, set_made, s);
}

/* Everything that the gradients need and the forward trace does not make; wanted: what it uses. */
static void find_backward(splitter *s) {
    th_trace *t = s->t;
    memset(s->wanted, 0, t->nvalues * sizeof *s->wanted);
    for (uint32_t i = 0; i < ngradients(s->joint); i++)
        th_node_each_value(t, result_kid(t, nvalues(s->joint) + i), set_wanted, s);
    for (th_opref o = t->nops; o-- > 1;) {
        s->hit = t->ops[o].effects != 0 && (s->backward[o] || t->ops[o].marks & TH_MARK_LATE);
        s->backward[o] = false;
        if (t->ops[o].kind == TH_OP_DEL || s->forward[o]) continue;
        th_op_each_out(t, o, test_wanted, s);
        s->backward[o] = s->hit;
        if (s->hit) th_op_each_use(t, o, set_wanted, s);
    }
}

/* ---- what to save ---- */

/* A view costs nothing to make again, as long as nobody wrote to what it shows. */
static bool is_view(const splitter *s, th_opref o) {
    const th_trace *t = s->t;
    const th_op *op = &t->ops[o];
    th_val from = th__node_as_value(t, th__op_arg(t, op, 0, NULL));
    const th_node_data *outs = &t->nodes[op->outs];
    th_val out = outs->kind == TH_N_VALUE                  ? outs->u.ref
                 : outs->kind == TH_N_TUPLE && outs->count ? th__node_as_value(t, t->kids[outs->u.kids])
                                                           : 0;
    return !op->effects && from && out && t->values[out].alias && t->values[out].alias == t->values[from].alias &&
           !(s->groups[th__group_of(t, out)] & TH__GROUP_WRITTEN);
}

/* Contents that came by a write after it was made: making it again would not bring them back. */
static void find_written(void *user, th_val *v) {
    splitter *s = user;
    s->written |= (s->groups[th__group_of(s->t, *v)] & TH__GROUP_WRITTEN) != 0;
}

/* Of an input's memory, which the call writes to at its end: then it is a copy that is saved. */
static bool is_overwritten(const splitter *s, th_val v) {
    uint8_t flags = s->groups[th__group_of(s->t, v)];
    return flags & TH__GROUP_WRITTEN && (s->input[v] || flags & TH__GROUP_INPUT);
}

/* ---- what is in memory although regions are fused ---- */

enum { STORED_FORWARD = 1, STORED_BACKWARD = 2, STORED_BOTH = 3, JOINED = 4 };

typedef struct storing {
    splitter *s;
    uint8_t flags;
} storing;

static void add_flags(void *user, th_val *v) { ((storing *)user)->s->stored[*v] |= ((storing *)user)->flags; }
static void take_flags(void *user, th_val *v) { ((storing *)user)->flags |= ((storing *)user)->s->stored[*v]; }

static bool is_joining(const splitter *s, th_opref o) {
    return th__op_is(s->t, &s->t->ops[o], "torch.cat") || th__op_is(s->t, &s->t->ops[o], "torch.stack");
}

static bool is_fused(splitter *s, th_opref o) {
    const th_opdef *def = s->t->ops[o].callee_opaque ? NULL : th_catalog_find(s->catalog, s->t->ops[o].callee);
    return def && (def->fusion == TH_FUSE_POINTWISE || def->fusion == TH_FUSE_VIEW || def->fusion == TH_FUSE_FACTORY ||
                   def->fusion == TH_FUSE_REDUCTION);
}

/* A value that a matrix product or an attention uses is in memory, forward or backward; JOINED: on the way to it
 * tensors are put together, which no kernel before or after does along the way. */
static void find_stored(splitter *s) {
    th_trace *t = s->t;
    for (th_opref o = t->nops; o-- > 1;) {
        storing w = {s, 0};
        if (t->ops[o].kind == TH_OP_DEL) continue;
        if (is_view(s, o)) {
            th_op_each_out(t, o, take_flags, &w);
        } else if (!is_fused(s, o) && !is_joining(s, o)) {
            w.flags = (s->forward[o] ? STORED_FORWARD : 0) | (s->backward[o] ? STORED_BACKWARD : 0);
        }
        th_op_each_use(t, o, add_flags, &w);
    }
    for (th_opref o = 1; o < t->nops; o++) {
        storing w = {s, 0};
        if (is_fused(s, o)) th_op_each_use(t, o, take_flags, &w);
        w.flags = is_joining(s, o) ? JOINED : w.flags & JOINED;
        th_op_each_out(t, o, add_flags, &w);
    }
}

/* To make it again would be a kernel of its own, and to save it is to let it be. */
static bool is_kept_anyway(const splitter *s, th_val v) { return s->stored[v] == (STORED_BOTH | JOINED); }

/* Memory-bound operations: making their results again costs about what reading them from memory would. */
static bool is_cheap(splitter *s, th_opref o) {
    static const char *const rows[] = {"torch.nn.functional.layer_norm",
                                       "torch.ops.aten.native_layer_norm.default",
                                       "torch.nn.functional.rms_norm",
                                       "torch.cat",
                                       "torch.stack",
                                       NULL};
    const th_op *op = &s->t->ops[o];
    s->written = false;
    th_op_each_out(s->t, o, find_written, s);
    if (op->effects || op->callee_opaque || s->written) return false;
    for (int i = 0; rows[i]; i++)
        if (th__op_is(s->t, op, rows[i])) return true;
    const th_opdef *def = th_catalog_find(s->catalog, op->callee);
    return def && (def->fusion == TH_FUSE_POINTWISE || def->fusion == TH_FUSE_VIEW || def->fusion == TH_FUSE_FACTORY) &&
           !(def->effects & (TH_OPDEF_INPLACE | TH_FX_RANDOM | TH_FX_STATE));
}

typedef struct kept { /* is some wanted result of an operation not kept otherwise? */
    const splitter *s;
    const th__cut *cut;
    bool missing;
} kept;

static void find_missing(void *user, th_val *v) {
    kept *k = user;
    k->missing |= k->s->wanted[*v] && !k->s->result[*v] && !th__cut_saved(k->cut, *v);
}

/* Inside torch.utils.checkpoint, and everywhere when as little as possible is to be saved: whatever it costs. */
static bool may_run_again(splitter *s, th_opref o) {
    s->written = false;
    th_op_each_out(s->t, o, find_written, s);
    bool wanted = s->remat == TH_REMAT_MAX || s->t->ops[o].marks & TH_MARK_RECOMPUTE;
    return wanted && !s->t->ops[o].effects && !s->written;
}

/* Make what may be made again part of the backward trace too, from the last operation to the first. */
static void recompute_views(splitter *s) {
    th_trace *t = s->t;
    for (th_opref o = t->nops; o-- > 1;) {
        if (!s->forward[o]) continue;
        s->hit = false;
        th_op_each_out(t, o, test_wanted, s);
        if (!s->hit || !(is_view(s, o) || may_run_again(s, o))) continue;
        s->backward[o] = true;
        th_op_each_use(t, o, set_wanted, s);
    }
}

static void link_use(void *user, th_val *v) {
    th__cut_link *link = user;
    th__cut_edge(link->cut, link->graph, *v, link->to);
}

/* What the cheapest cut leaves out of the saved values is computed again. */
static th_status recompute_cheap(splitter *s) {
    th_trace *t = s->t;
    th__cut cut;
    TRY(th__cut_init(&cut, &s->scratch, t->nvalues));
    for (th_val v = 1; v < t->nvalues; v++) {
        if (!s->made[v]) continue;
        th_opref def = t->values[v].def;
        bool again =
            !s->input[v] && !s->result[v] && def && (is_view(s, def) || is_cheap(s, def) || may_run_again(s, def));
        again = again && (is_view(s, def) || !is_kept_anyway(s, v));
        int64_t cost = s->input[v] || (s->result[v] && !is_overwritten(s, v)) ? 0 : th__bytes_of(t, v);
        if (again && is_view(s, def)) cost = INT64_C(1) << 50; /* it would keep all of its base: save that */
        th__cut_value(&cut, v, cost, !again, s->wanted[v]);
        th__cut_link link = {&cut, NULL, v};
        if (again) th_op_each_use(t, def, link_use, &link);
    }
    TRY(th__cut_solve(&cut));
    for (th_opref o = t->nops; o-- > 1;) {
        if (!s->forward[o]) continue;
        s->hit = false;
        th_op_each_out(t, o, test_wanted, s);
        if (!s->hit || t->ops[o].effects) continue;
        if (!is_view(s, o)) {
            kept k = {s, &cut, false};
            th_op_each_out(t, o, find_missing, &k);
            if (!k.missing || (!is_cheap(s, o) && !may_run_again(s, o))) continue;
        }
        s->backward[o] = true;
        th_op_each_use(t, o, set_wanted, s);
    }
    return TH_OK;
}

static void not_wanted(void *user, th_val *v) { ((splitter *)user)->wanted[*v] = false; }

static void collect_saved(splitter *s, th_halves *out) {
    th_trace *t = s->t;
    for (th_opref o = 1; o < t->nops; o++)
        if (s->backward[o]) th_op_each_out(t, o, not_wanted, s);
    for (th_val v = 1; v < t->nvalues; v++)
        if (s->wanted[v] && s->made[v]) out->saved[out->nsaved++] = v;
}

/* Bytes of the distinct storages among the saved values that are not inputs. */
static int64_t saved_bytes(const splitter *s, const bool *wanted) {
    const th_trace *t = s->t;
    int64_t sum = 0;
    for (th_val v = 1; v < t->nvalues; v++) {
        if (!wanted[v] || !s->made[v] || s->input[v]) continue;
        uint32_t alias = t->values[v].alias;
        bool counted = false;
        for (th_val w = 1; alias && w < t->nvalues && !counted; w++)
            counted = t->values[w].alias == alias && (s->input[w] || (w < v && wanted[w] && s->made[w]));
        if (!counted) sum += th__bytes_of(t, v);
    }
    return sum;
}

/* ---- the two traces ---- */

static void keep_ops(th_trace *t, const bool *keep) {
    uint32_t n = 1;
    for (th_opref o = 1; o < t->nops; o++)
        if (keep[o]) t->ops[n++] = t->ops[o];
    t->nops = n;
    for (th_val v = 1; v < t->nvalues; v++) t->values[v].def = 0;
    for (th_opref o = 1; o < t->nops; o++) th__node_define(t, t->ops[o].outs, o);
}

/* The backward trace wants a value as it was when it was made, and the call writes to it later: a copy is saved in its
 * place, made of inputs first of all and of others where they are made. */
static void save_copies(const splitter *s, th_trace *t, th_halves *out) {
    th__scratch *scratch = (th__scratch *)&s->scratch;
    uint32_t before = t->nops, placed = 1;
    th_opref *after = th__scratch_zeroed(scratch, out->nsaved + 1, sizeof *after); /* by copy: what it follows */
    for (uint32_t i = 0; after && i < out->nsaved; i++) {
        th_val v = out->saved[i];
        if (!is_overwritten(s, v)) continue;
        th__emitter e = {t, s->catalog, 0, 0, 0, 0};
        th_node arg = th_node_value(t, v);
        after[t->nops - before] = t->values[v].def;
        out->saved[i] = th__emit_typed(&e, "torch.clone", th_type_set_grad(t->ctx, t->values[v].type, false), 1, &arg);
    }
    uint32_t count = t->nops - before;
    th_op *old = count ? th__scratch_zeroed(scratch, t->nops, sizeof *old) : NULL;
    if (!old) return;
    memcpy(old, t->ops, t->nops * sizeof *old);
    for (th_opref o = 0; o < before; o++) {
        if (o) t->ops[placed++] = old[o];
        for (uint32_t i = 0; i < count; i++)
            if (after[i] == o) t->ops[placed++] = old[before + i];
    }
    for (th_opref o = 1; o < t->nops; o++) th__node_define(t, t->ops[o].outs, o);
}

static th_status build_forward(splitter *s, th_halves *out) {
    TRY(th_trace_clone(s->t, &out->forward));
    th_trace *t = out->forward;
    uint32_t n = nvalues(s->joint), at = 0;
    keep_ops(t, s->forward);
    t->ninputs -= s->joint->ntangents;
    save_copies(s, t, out);
    th_node *kids = th__scratch_zeroed(&s->scratch, n + out->nsaved, sizeof *kids);
    if (!kids) return TH_ENOMEM;
    for (; at < n; at++) kids[at] = result_kid(s->t, at);
    for (uint32_t i = 0; i < out->nsaved; i++) kids[at++] = th_node_value(t, out->saved[i]);
    t->result = th_node_seq(t, TH_N_TUPLE, at, kids);
    t->name = th_intern_z(t->ctx, "forward");
    TRY(th_trace_status(t));
    return th_pass_lifetime(t, NULL);
}

/* ---- when to compute again ---- */

typedef struct deferral {
    const splitter *s;
    th_opref *needed; /* by value: the operation that it must precede */
    th_opref at;
    bool movable;
} deferral;

static void need(void *user, th_val *v) {
    deferral *d = user;
    if (!d->needed[*v] || d->at < d->needed[*v]) d->needed[*v] = d->at;
}

static void find_need(void *user, th_val *v) {
    deferral *d = user;
    if (d->needed[*v] && (!d->at || d->needed[*v] < d->at)) d->at = d->needed[*v];
}

static void test_movable(void *user, th_val *v) {
    deferral *d = user;
    d->movable &= !d->s->late[*v] && !(d->s->groups[th__group_of(d->s->t, *v)] & TH__GROUP_WRITTEN);
}

static bool is_movable(deferral *d, th_trace *t, th_opref o) {
    d->movable = t->ops[o].kind == TH_OP_CALL && !t->ops[o].effects && !t->ops[o].nwrites;
    th_op_each_use(t, o, test_movable, d);
    th_op_each_out(t, o, test_movable, d);
    return d->movable;
}

/* What needs no gradient comes first in the joint trace, so all of it would be computed again before the backward pass
 * begins, and the memory that was saved would be spent at once. Each such operation moves to just before the first one
 * that stays in its place and needs it. */
static th_status defer_recomputation(const splitter *s, th_trace *t) {
    th__scratch scratch = {.ctx = t->ctx};
    deferral d = {.s = s, .needed = th__scratch_zeroed(&scratch, t->nvalues, sizeof(th_opref))};
    th_opref *place = th__scratch_zeroed(&scratch, t->nops, sizeof *place); /* by operation: before which it comes */
    th_opref *first = th__scratch_zeroed(&scratch, t->nops, sizeof *first); /* chains of those that move */
    th_op *ops = th__scratch_zeroed(&scratch, t->nops, sizeof *ops);
    th_opref *chain = th__scratch_zeroed(&scratch, t->nops, sizeof *chain);
    if (!d.needed || !place || !first || !ops || !chain) {
        th__scratch_fini(&scratch);
        return TH_ENOMEM;
    }
    for (th_opref o = t->nops; o-- > 1;) { /* those after it are placed: chains come out in the old order */
        d.at = 0;
        if (is_movable(&d, t, o)) th_op_each_out(t, o, find_need, &d);
        place[o] = d.at ? d.at : o;
        d.at = place[o];
        th_op_each_use(t, o, need, &d);
        if (place[o] == o) continue;
        chain[o] = first[place[o]];
        first[place[o]] = o;
    }
    uint32_t n = 1;
    for (th_opref o = 1; o < t->nops; o++) {
        if (place[o] != o) continue;
        for (th_opref moved = first[o]; moved; moved = chain[moved]) ops[n++] = t->ops[moved];
        ops[n++] = t->ops[o];
    }
    memcpy(t->ops + 1, ops + 1, (n - 1) * sizeof *ops);
    for (th_opref o = 1; o < t->nops; o++) th__node_define(t, t->ops[o].outs, o);
    th__scratch_fini(&scratch);
    return TH_OK;
}

static th_status build_backward(splitter *s, th_halves *out) {
    TRY(th_trace_clone(s->t, &out->backward));
    th_trace *t = out->backward;
    uint32_t n = ngradients(s->joint), ntangents = s->joint->ntangents, first = t->ninputs - ntangents;
    keep_ops(t, s->backward);
    th_val *inputs = th_ctx_alloc(t->ctx, NULL, (out->nsaved + ntangents + 1) * sizeof *inputs);
    th_node *kids = th__scratch_zeroed(&s->scratch, n, sizeof *kids);
    if (!inputs || !kids) {
        th_ctx_alloc(t->ctx, inputs, 0);
        return th_fail(t->ctx, TH_ENOMEM, "out of memory");
    }
    memcpy(inputs, out->saved, out->nsaved * sizeof *inputs);
    memcpy(inputs + out->nsaved, t->inputs + first, ntangents * sizeof *inputs);
    th_ctx_alloc(t->ctx, t->inputs, 0);
    t->inputs = inputs;
    t->ninputs = out->nsaved + ntangents;
    t->cap_inputs = t->ninputs + 1;
    for (uint32_t i = 0; i < n; i++) kids[i] = result_kid(s->t, nvalues(s->joint) + i);
    t->result = th_node_seq(t, TH_N_TUPLE, n, kids);
    t->name = th_intern_z(t->ctx, "backward");
    TRY(defer_recomputation(s, t));
    TRY(th_trace_status(t));
    return th_pass_lifetime(t, NULL);
}

/* ---- all of it ---- */

static th_status prepare(splitter *s) {
    th_trace *t = s->t;
    s->late = th__scratch_zeroed(&s->scratch, t->nvalues, sizeof(bool));
    s->made = th__scratch_zeroed(&s->scratch, t->nvalues, sizeof(bool));
    s->input = th__scratch_zeroed(&s->scratch, t->nvalues, sizeof(bool));
    s->result = th__scratch_zeroed(&s->scratch, t->nvalues, sizeof(bool));
    s->wanted = th__scratch_zeroed(&s->scratch, t->nvalues, sizeof(bool));
    s->forward = th__scratch_zeroed(&s->scratch, t->nops, sizeof(bool));
    s->backward = th__scratch_zeroed(&s->scratch, t->nops, sizeof(bool));
    s->groups = th__groups(t, &s->scratch);
    s->stored = th__scratch_zeroed(&s->scratch, t->nvalues, sizeof *s->stored);
    if (!s->groups || !s->stored || !s->late || !s->made || !s->input || !s->result || !s->wanted || !s->forward ||
        !s->backward)
        return TH_ENOMEM;
    for (uint32_t i = 0; i < s->joint->nmutated; i++)
        s->groups[th__group_of(t, s->joint->mutated[i])] |= TH__GROUP_WRITTEN;
    return th_catalog_new(t->ctx, &s->catalog);
}

static th_status split(splitter *s, th_remat remat, th_halves *out) {
    th_trace *t = s->t;
    if (remat == TH_REMAT_FUSED) TRY(th__rows_split(t, s->joint->ntangents));
    TRY(prepare(s));
    s->remat = remat;
    find_forward(s);
    find_backward(s);
    if (remat == TH_REMAT_FUSED) find_stored(s);
    bool *plain = th__scratch_zeroed(&s->scratch, t->nvalues, sizeof *plain);
    out->saved = th_ctx_alloc(t->ctx, NULL, t->nvalues * sizeof *out->saved);
    if (!plain || !out->saved) return th_fail(t->ctx, TH_ENOMEM, "out of memory");
    memcpy(plain, s->wanted, t->nvalues * sizeof *plain);
    out->bytes = saved_bytes(s, plain);
    if (remat == TH_REMAT_OFF)
        recompute_views(s);
    else
        TRY(recompute_cheap(s));
    collect_saved(s, out);
    out->bytes_kept = saved_bytes(s, s->wanted);
    TRY(build_backward(s, out));
    return build_forward(s, out);
}

th_status th_grad_split(const th_joint *joint, th_remat remat, th_halves *out) {
    splitter s = {.joint = joint, .t = joint->t, .scratch = {.ctx = joint->t->ctx}};
    *out = (th_halves){0};
    th_status status = split(&s, remat, out);
    th_catalog_free(s.catalog);
    th__scratch_fini(&s.scratch);
    if (status != TH_OK) th_halves_fini(joint->t->ctx, out);
    return status;
}

void th_halves_fini(th_ctx *ctx, th_halves *halves) {
    th_trace_free(halves->forward);
    th_trace_free(halves->backward);
    th_ctx_alloc(ctx, halves->saved, 0);
    *halves = (th_halves){0};
}
