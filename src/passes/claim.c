/* Claims: see thunder/claim.h.
 *
 * Every operation has a level: that of what it depends on, one more where it is another executor's. Operations of one
 * executor on one level are convex together, because every way out of the executor and back climbs two levels. They
 * are one region, or several where nothing connects them; the operations run in the order of their levels.
 */
#include "thunder/claim.h"

#include "passes/pass.h"

#include <string.h>

typedef struct claimer {
    th_trace *t;
    const th_claim_options *options;
    th__scratch scratch;
    th_claim *claims;         /* by operation */
    uint32_t *level;          /* by operation, from 1 */
    th_opref *unit;           /* by operation: the first one of its unit */
    th_opref *next;           /* by operation: the next one of its unit, in order */
    uint32_t *reads, *writes; /* by alias group: the level that a write needs at least; that of the last write */
    uint32_t random, barrier, highest; /* levels: of random numbers, of outside state, of everything so far */
    th_opref *seen;                    /* by value: the operation of some executor that made or used it last */
    uint32_t *need;                    /* by value: the level that its users need it at */
    th_opref *last;                    /* by value: the last operation of the region that uses it */
    uint8_t *groups;                   /* flags of th__groups */
    int64_t *ends;                     /* by operation: see weigh_ends */
    bool *escapes;                     /* by value: used outside its unit, or returned */
    /* ---- of the walks ---- */
    uint32_t at, owner, nlive;
    int64_t live_bytes;
    th_opref op;
    bool found;
    th_val *map; /* by value: its stand-in in the body */
    th_trace *body;
    th_val *ins, *outs;
    uint32_t nins, nouts;
    bool whole, used; /* the unit is one call, which gives all its results; somebody uses one of them */
} claimer;

static uint32_t class_of(const claimer *c, th_opref o) { return c->claims[o].fuses ? c->claims[o].owner : 0; }

static void raise_to(claimer *c, uint32_t level) {
    if (c->at < level) c->at = level;
}

/* ---- levels ---- */

static void after_definition(void *user, th_val *v) {
    claimer *c = user;
    th_opref def = c->t->values[*v].def;
    uint32_t group = th__group_of(c->t, *v);
    if (def) raise_to(c, c->level[def] + (class_of(c, def) != c->owner));
    if (c->writes[group]) raise_to(c, c->writes[group] + (c->owner != 0));
}

static void note_read(void *user, th_val *v) {
    claimer *c = user;
    uint32_t *reads = &c->reads[th__group_of(c->t, *v)], needed = c->at + (c->owner != 0);
    if (*reads < needed) *reads = needed;
}

static void find_level(claimer *c, th_opref o) {
    th_trace *t = c->t;
    const th_op *op = &t->ops[o];
    c->owner = class_of(c, o);
    c->at = c->barrier ? c->barrier + (c->owner != 0) : 1;
    th_op_each_use(t, o, after_definition, c);
    if (op->effects & TH_FX_RANDOM) raise_to(c, c->random);
    if (op->effects & TH_FX_STATE) raise_to(c, c->highest);
    for (uint32_t i = 0; i < op->nwrites; i++) raise_to(c, c->reads[th__group_of(t, t->kids[op->writes + i])]);
    c->level[o] = c->at;
    th_op_each_use(t, o, note_read, c);
    th_op_each_out(t, o, note_read, c);
    for (uint32_t i = 0; i < op->nwrites; i++) c->writes[th__group_of(t, t->kids[op->writes + i])] = c->at;
    if (op->effects & TH_FX_RANDOM) c->random = c->at;
    if (op->effects & TH_FX_STATE) c->barrier = c->at;
    uint32_t end = c->at + (c->owner != 0);
    if (c->highest < end) c->highest = end;
}

/* ---- later levels ---- */

static void note_need(void *user, th_val *v) {
    claimer *c = user;
    th_opref def = c->t->values[*v].def;
    if (!def) return;
    uint32_t level = c->level[c->op] - (class_of(c, def) != c->owner);
    if (!c->need[*v] || level < c->need[*v]) c->need[*v] = level;
}

static void find_need(void *user, th_val *v) {
    claimer *c = user;
    if (c->need[*v] && (!c->at || c->need[*v] < c->at)) c->at = c->need[*v];
}

static void test_written(void *user, th_val *v) {
    claimer *c = user;
    c->found |= c->writes[th__group_of(c->t, *v)] != 0;
}

/* What is computed long before its use (a backward computes parts of the forward again) goes to the level of its users:
 * into their region, and its memory is spent no sooner. */
static void move_later(claimer *c) {
    for (c->op = c->t->nops; !c->barrier && c->op-- > 1;) {
        const th_op *op = &c->t->ops[c->op];
        c->owner = class_of(c, c->op);
        c->at = 0;
        c->found = op->effects != 0;
        th_op_each_out(c->t, c->op, find_need, c);
        th_op_each_use(c->t, c->op, test_written, c);
        th_op_each_out(c->t, c->op, test_written, c);
        if (!c->found && c->at > c->level[c->op]) c->level[c->op] = c->at;
        th_op_each_use(c->t, c->op, note_need, c);
    }
}

/* ---- regions ---- */

static th_opref root_of(claimer *c, th_opref o) {
    while (c->unit[o] != o) o = c->unit[o] = c->unit[c->unit[o]];
    return o;
}

static bool together(const claimer *c, th_opref a, th_opref b) {
    return c->level[a] == c->level[b] && class_of(c, a) == class_of(c, b);
}

static void join(claimer *c, th_opref other) {
    if (!other || !together(c, other, c->op)) return;
    th_opref a = root_of(c, other), b = root_of(c, c->op);
    c->unit[a < b ? b : a] = a < b ? a : b;
}

static void connect(void *user, th_val *v) {
    claimer *c = user;
    th_opref def = c->t->values[*v].def;
    if (!def) return;
    join(c, def);
    join(c, c->seen[*v]);
    c->seen[*v] = c->op;
}

/* What a value connects is one region; inputs of the trace connect nothing. */
static void find_regions(claimer *c) {
    for (th_opref o = 1; o < c->t->nops; o++) c->unit[o] = o;
    for (c->op = 1; c->op < c->t->nops; c->op++) {
        if (!class_of(c, c->op)) continue;
        th_op_each_use(c->t, c->op, connect, c);
        th_op_each_out(c->t, c->op, connect, c);
    }
    for (th_opref o = 1; o < c->t->nops; o++) c->unit[o] = root_of(c, o);
}

static void chain_units(claimer *c) {
    th_opref *tail = c->level + c->t->nops; /* the second half: by unit */
    for (th_opref o = 1; o < c->t->nops; o++) {
        c->next[o] = 0;
        if (c->unit[o] != o) c->next[tail[c->unit[o]]] = o;
        tail[c->unit[o]] = o;
    }
}

/* ---- cutting: a region ends where one value alone goes on ---- */

static void note_last(void *user, th_val *v) {
    claimer *c = user;
    th_opref def = c->t->values[*v].def;
    if (def && c->unit[def] == c->unit[c->op]) c->last[*v] = c->op;
}

static void enter(void *user, th_val *v) {
    claimer *c = user;
    if (!c->last[*v]) return;
    c->nlive++;
    c->live_bytes += th__bytes_of(c->t, *v);
}

static void leave(void *user, th_val *v) {
    claimer *c = user;
    if (c->last[*v] != c->op) return;
    c->last[*v] = 0; /* an operand may occur twice */
    c->nlive--;
    c->live_bytes -= th__bytes_of(c->t, *v);
}

/* By operation of a region: the bytes that go on where it would end behind it, -1 where that is more than one value. */
static void weigh_ends(claimer *c, th_opref first) {
    for (c->op = first; c->op; c->op = c->next[c->op]) th_op_each_use(c->t, c->op, note_last, c);
    c->nlive = 0;
    c->live_bytes = 0;
    for (c->op = first; c->op; c->op = c->next[c->op]) {
        th_op_each_out(c->t, c->op, enter, c);
        th_op_each_use(c->t, c->op, leave, c);
        c->ends[c->op] = c->nlive > 1 ? -1 : c->live_bytes;
    }
}

/* The last operation of a part that begins at `start`: behind `cut` operations the next one where a single value goes
 * on, or a later one, not many further on, where that value is smaller or as small: what turns it into another dtype or
 * adds to it belongs to what made it. `left` operations are there from `start` on. */
static th_opref end_of_part(const claimer *c, th_opref start, uint32_t cut, uint32_t left) {
    th_opref best = 0;
    uint32_t size = 1, until = left - cut;
    for (th_opref o = start; size <= until; o = c->next[o], size++) {
        if (size < cut || c->ends[o] < 0 || (best && c->ends[o] > c->ends[best])) continue;
        if (!best && size + cut / 2 < until) until = size + cut / 2;
        best = o;
    }
    return best;
}

static void cut_region(claimer *c, th_opref first) {
    uint32_t left = 0, cut = c->claims[first].cut;
    for (th_opref o = first; o; o = c->next[o]) left++;
    if (!cut || left < 2 * cut) return;
    weigh_ends(c, first);
    th_opref start = first, end, o;
    while (left >= 2 * cut && (end = end_of_part(c, start, cut, left))) {
        for (o = start; o != c->next[end]; o = c->next[o], left--) c->unit[o] = start;
        start = o;
    }
    for (o = start; o; o = c->next[o]) c->unit[o] = start;
}

/* ---- what crosses the border of a unit ---- */

static void note_escape(void *user, th_val *v) {
    claimer *c = user;
    th_opref def = c->t->values[*v].def;
    if (def && (!c->op || c->unit[def] != c->unit[c->op])) c->escapes[*v] = true;
}

static void find_escapes(claimer *c) {
    for (c->op = 1; c->op < c->t->nops; c->op++) th_op_each_use(c->t, c->op, note_escape, c);
    c->op = 0;
    th_node_each_value(c->t, c->t->result, note_escape, c);
}

/* ---- bodies ---- */

static void take_input(void *user, th_val *v) {
    claimer *c = user;
    if (c->map[*v]) return;
    c->map[*v] = th_trace_input(c->body, c->t->values[*v].name, c->t->values[*v].type);
    c->ins[c->nins++] = *v;
}

static void take_out(void *user, th_val *v) {
    claimer *c = user;
    const th_value *from = &c->t->values[*v];
    c->map[*v] = th_trace_value(c->body, from->name, from->type);
    if (c->escapes[*v] || c->whole) c->outs[c->nouts++] = *v;
    c->used |= c->escapes[*v];
}

static void copy_into_body(claimer *c, const th_op *op) {
    th_node_each_value(c->t, op->args, take_input, c);
    th_node_each_value(c->t, op->kwargs, take_input, c);
    th_node_each_value(c->t, op->outs, take_out, c);
    th_op_args args = {.kind = TH_OP_CALL,
                       .callee = op->callee,
                       .args = th_node_import(c->body, c->t, op->args, c->map),
                       .kwargs = th_node_import(c->body, c->t, op->kwargs, c->map),
                       .outs = th_node_import(c->body, c->t, op->outs, c->map),
                       .outs_list = op->outs_list,
                       .effects = op->effects,
                       .marks = op->marks,
                       .file = op->file,
                       .line = op->line};
    if (op->callee_opaque) {
        const th_opaque *q = &c->t->opaques[op->callee_opaque];
        args.callee_opaque = th_trace_opaque(c->body, th_str_get(c->t->ctx, q->name), q->object);
    }
    th_trace_op(c->body, &args);
}

static void share_storage(claimer *c) { /* aliases among what the body has, by the numbers of the whole */
    for (th_val v = 1; v < c->t->nvalues; v++) {
        if (!c->map[v]) continue;
        c->body->values[c->map[v]].alias = c->t->values[v].alias;
        c->body->values[c->map[v]].offset = c->t->values[v].offset;
        if (c->body->next_alias <= c->t->values[v].alias) c->body->next_alias = c->t->values[v].alias + 1;
    }
}

static th_status build_body(claimer *c, const th_op *old, th_opref first) {
    memset(c->map, 0, c->t->nvalues * sizeof *c->map);
    c->nins = c->nouts = 0;
    c->whole = !c->claims[first].fuses;
    c->used = false;
    c->body = th_trace_new(c->t->ctx, "region");
    if (!c->body) return TH_ENOMEM;
    th_trace_set_opaque_vtable(c->body, c->t->opaque_vtable);
    for (th_opref o = first; o; o = c->next[o]) copy_into_body(c, &old[o]);
    share_storage(c);
    th_node *kids = th__scratch_zeroed(&c->scratch, c->nouts + 1, sizeof *kids);
    if (!kids) return TH_ENOMEM;
    for (uint32_t i = 0; i < c->nouts; i++) kids[i] = th_node_value(c->body, c->map[c->outs[i]]);
    c->body->result = th_node_seq(c->body, TH_N_TUPLE, c->nouts, kids);
    return th_trace_status(c->body);
}

/* ---- emission ---- */

static th_node values_node(claimer *c, const th_val *values, uint32_t n) {
    th_node *kids = th__scratch_zeroed(&c->scratch, n + 1, sizeof *kids);
    if (!kids) return 0;
    for (uint32_t i = 0; i < n; i++) kids[i] = th_node_value(c->t, values[i]);
    return th_node_seq(c->t, TH_N_TUPLE, n, kids);
}

static th_status push_unit(claimer *c, const th_op *first, bool fused, const char *hint, void *object) {
    th_trace *t = c->t;
    th_op op = *first;
    op.def = 0;
    op.callee_opaque = th_trace_opaque(t, hint, object);
    op.callee = t->opaques[op.callee_opaque].name;
    if (fused) {
        op.kwargs = 0;
        op.marks = 0;
        op.args = values_node(c, c->ins, c->nins);
        op.outs = values_node(c, c->outs, c->nouts);
        op.outs_list = true;
        if (!op.args || !op.outs) return TH_ENOMEM;
    }
    th__op_push(t, &op);
    return th_trace_status(t);
}

/* Appends to the new list; `old` is the list that levels and units are numbers of. */
static th_status emit_unit(claimer *c, const th_op *old, th_opref first) {
    const th_claim *claim = &c->claims[first];
    const char *hint = NULL;
    void *object = NULL;
    if (claim->owner) {
        th_status status = build_body(c, old, first);
        if (status != TH_OK || !c->used) { /* what nobody uses nobody runs */
            th_trace_free(c->body);
            TRY(status);
        } else {
            TRY(c->options->bind(c->options->user, claim->owner, claim->fuses, c->body, &hint, &object));
        }
    }
    if (object) {
        th_status status = push_unit(c, &old[first], claim->fuses, hint, object);
        if (c->t->opaque_vtable.release) c->t->opaque_vtable.release(object); /* the trace has its own */
        return status;
    }
    for (th_opref o = first; o; o = c->next[o]) th__op_push(c->t, &old[o]);
    return th_trace_status(c->t);
}

static th_status emit(claimer *c) {
    th_trace *t = c->t;
    uint32_t nops = t->nops;
    th_op *old = th__scratch_zeroed(&c->scratch, nops, sizeof *old);
    th_opref *head = th__scratch_zeroed(&c->scratch, c->highest + 2, sizeof *head);
    th_opref *chain = th__scratch_zeroed(&c->scratch, nops, sizeof *chain); /* units of a level, in order */
    if (!old || !head || !chain) return TH_ENOMEM;
    memcpy(old, t->ops, nops * sizeof *old);
    for (th_opref o = nops; o-- > 1;) {
        if (c->unit[o] != o) continue;
        chain[o] = head[c->level[o]];
        head[c->level[o]] = o;
    }
    t->nops = 1;
    for (uint32_t level = 1; level <= c->highest; level++)
        for (th_opref o = head[level]; o; o = chain[o]) TRY(emit_unit(c, old, o));
    return th_trace_status(t);
}

static void drop_dels(th_trace *t) {
    uint32_t n = 1;
    for (th_opref o = 1; o < t->nops; o++)
        if (t->ops[o].kind != TH_OP_DEL) t->ops[n++] = t->ops[o];
    t->nops = n;
    for (th_opref o = 1; o < n; o++) th__node_define(t, t->ops[o].outs, o);
}

static void test_group(void *user, th_val *v) {
    claimer *c = user;
    c->found |= (c->groups[th__group_of(c->t, *v)] & TH__GROUP_WRITTEN) != 0;
}

/* Memory that nobody has written yet: there is nothing to compare, and it is there to be written to. */
static bool is_uninitialised(const th_trace *t, const th_op *op) {
    const char *name = op->callee_opaque ? "" : th_str_get(t->ctx, op->callee);
    return strstr(name, ".empty") || strstr(name, ".new_empty");
}

/* What is written to later has to be memory of its own, which the results of a region need not be. */
static bool is_free(claimer *c, th_opref o) {
    const th_op *op = &c->t->ops[o];
    c->found = op->effects || op->nwrites || is_uninitialised(c->t, op);
    th_op_each_out(c->t, o, test_group, c);
    return !c->found;
}

static th_status ask_all(claimer *c, bool *any) {
    if (!(c->groups = th__groups(c->t, &c->scratch))) return TH_ENOMEM;
    for (th_opref o = 1; o < c->t->nops; o++) {
        if (!is_free(c, o)) continue;
        /* What nobody uses and is there for its error alone would get lost in a region. */
        if (c->t->ops[o].marks & TH_MARK_RAISES) continue;
        TRY(c->options->ask(c->options->user, c->t, o, &c->claims[o]));
        if (!c->claims[o].owner) c->claims[o] = (th_claim){0};
        *any |= c->claims[o].owner != 0;
    }
    return TH_OK;
}

static th_status run(claimer *c) {
    bool any = false;
    TRY(ask_all(c, &any));
    if (!any) return TH_OK;
    for (th_opref o = 1; o < c->t->nops; o++) find_level(c, o);
    move_later(c);
    find_regions(c);
    chain_units(c);
    for (th_opref o = c->t->nops; o-- > 1;) /* backwards: the parts of a region begin behind its first operation */
        if (c->unit[o] == o && c->claims[o].fuses) cut_region(c, o);
    chain_units(c);
    find_escapes(c);
    return emit(c);
}

th_status th_claim_run(th_trace *t, const th_claim_options *options) {
    drop_dels(t);
    uint32_t n = t->nops, groups = th__group_count(t);
    claimer c = {.t = t, .options = options, .scratch = {.ctx = t->ctx}};
    c.claims = th__scratch_zeroed(&c.scratch, n, sizeof *c.claims);
    c.level = th__scratch_zeroed(&c.scratch, 2 * n, sizeof *c.level);
    c.unit = th__scratch_zeroed(&c.scratch, n, sizeof *c.unit);
    c.next = th__scratch_zeroed(&c.scratch, n, sizeof *c.next);
    c.reads = th__scratch_zeroed(&c.scratch, groups, sizeof *c.reads);
    c.writes = th__scratch_zeroed(&c.scratch, groups, sizeof *c.writes);
    c.seen = th__scratch_zeroed(&c.scratch, t->nvalues, sizeof *c.seen);
    c.need = th__scratch_zeroed(&c.scratch, t->nvalues, sizeof *c.need);
    c.last = th__scratch_zeroed(&c.scratch, t->nvalues, sizeof *c.last);
    c.ends = th__scratch_zeroed(&c.scratch, n, sizeof *c.ends);
    c.escapes = th__scratch_zeroed(&c.scratch, t->nvalues, sizeof *c.escapes);
    c.map = th__scratch_zeroed(&c.scratch, t->nvalues, sizeof *c.map);
    c.ins = th__scratch_zeroed(&c.scratch, t->nvalues, sizeof *c.ins);
    c.outs = th__scratch_zeroed(&c.scratch, t->nvalues, sizeof *c.outs);
    bool ready = c.claims && c.level && c.unit && c.next && c.reads && c.writes && c.seen && c.need && c.last &&
                 c.ends && c.escapes && c.map && c.ins && c.outs;
    th_status status = ready ? run(&c) : th_ctx_error(t->ctx)->status;
    th__scratch_fini(&c.scratch);
    return status;
}
