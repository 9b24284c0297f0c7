/* Common subexpressions: the same pure operation on the same values is done once.
 *
 *     t0 = torch.sin(x)
 *     t1 = torch.sin(x)          gone; its uses read t0
 *
 * Never merged: operations with any effect, opaque callees, results that are Python objects. A group that is written
 * between the two makes the first one stale. Two results with storage of their own stay two when either is written, or
 * when both can be seen from outside, where a later write to one must not show in the other. Two views of the same
 * storage stay two objects when both are returned.
 */
#include "base/hash.h"
#include "passes/pass.h"
#include "passes/tie.h"

#include <string.h>

typedef struct entry { /* an operation of the new list that later ones may equal */
    uint64_t hash;
    th_opref op;    /* in the new list; 0: free slot */
    uint32_t order; /* its place in the old list */
} entry;

typedef struct merger {
    th__rewrite r;
    th_trace *t;
    uint8_t *groups;   /* flags of th__groups */
    uint32_t *written; /* by group: place of the last write so far */
    uint32_t *home;    /* by group: place where an operation first defines a member */
    uint32_t *place;   /* by value: place of its definition in the old list */
    th_val *returned;  /* the values of the result */
    uint32_t nreturned;
    bool *deleted; /* by value: a del came by */
    bool *tied;    /* by value: which tensor it is matters */
    entry *table;
    uint32_t mask;
    uint32_t order; /* place of the current operation in the old list */
    bool ok;
} merger;

/* ---- what may be merged ---- */

static void check_plain(void *user, th_val *v) {
    merger *m = user;
    uint8_t kind = th_type_get(m->t->ctx, m->t->values[*v].type)->kind;
    if (kind == TH_TYPE_OBJECT || kind == TH_TYPE_NONE) m->ok = false;
}

/* What an opaque argument holds may change without the trace saying so. */
static bool has_opaque(const th_trace *t, th_node n) {
    const th_node_data *node = &t->nodes[n];
    if (node->kind == TH_N_OPAQUE) return true;
    for (uint32_t i = 0; i < node->count; i++) {
        if (has_opaque(t, t->kids[node->u.kids + i])) return true;
    }
    return false;
}

static bool is_candidate(merger *m, th_opref ref) {
    const th_op *op = &m->t->ops[ref];
    if (op->kind != TH_OP_CALL || op->effects || op->callee_opaque || !op->outs) return false;
    if (th__op_named_in_place(m->t, op) || has_opaque(m->t, op->args) || has_opaque(m->t, op->kwargs)) return false;
    m->ok = true;
    th_op_each_use(m->t, ref, check_plain, m);
    th_op_each_out(m->t, ref, check_plain, m);
    return m->ok;
}

static void check_fresh_enough(void *user, th_val *v) {
    merger *m = user;
    if (m->written[th__group_of(m->t, *v)] >= m->order) m->ok = false;
}

/* Was no group that the operation reads written since `place`? */
static bool unwritten_since(merger *m, th_opref op, uint32_t place) {
    uint32_t now = m->order;
    m->ok = true;
    m->order = place;
    th_op_each_use(m->t, op, check_fresh_enough, m);
    m->order = now;
    return m->ok;
}

/* ---- hash and comparison of operations whose values are replaced already ---- */

static uint64_t hash_node(const th_trace *t, uint64_t hash, th_node n, bool outs) {
    const th_node_data *node = &t->nodes[n];
    hash = th__hash_mix(hash, (uint64_t)node->kind << 32 | node->count);
    if (outs && node->kind == TH_N_VALUE) return th__hash_mix(hash, t->values[node->u.ref].type);
    if (node->count == 0) {
        uint64_t bits[2] = {0, 0};
        bool wide =
            node->kind == TH_N_BOOL || node->kind == TH_N_INT || node->kind == TH_N_FLOAT || node->kind == TH_N_COMPLEX;
        bool bare = node->kind < TH_N_BOOL || (node->kind >= TH_N_TUPLE && node->kind <= TH_N_ELLIPSIS);
        if (wide)
            memcpy(&bits[0], &node->u, 8), memcpy(&bits[1], &node->f2, 8);
        else if (!bare)
            bits[0] = node->u.ref;
        return th__hash_mix(th__hash_mix(hash, bits[0]), bits[1]);
    }
    for (uint32_t i = 0; i < node->count; i++) hash = hash_node(t, hash, t->kids[node->u.kids + i], outs);
    return hash;
}

static bool same_node(const th_trace *t, th_node a, th_node b) {
    const th_node_data *x = &t->nodes[a], *y = &t->nodes[b];
    if (a == b) return true;
    if (x->kind != y->kind || x->count != y->count) return false;
    switch ((th_node_kind)x->kind) {
    case TH_N_BOOL:
    case TH_N_INT: return x->u.i == y->u.i && x->number == y->number;
    case TH_N_FLOAT: return memcmp(&x->u.f, &y->u.f, sizeof x->u.f) == 0 && x->f2 == y->f2;
    case TH_N_COMPLEX: return memcmp(&x->u.f, &y->u.f, sizeof x->u.f) == 0 && memcmp(&x->f2, &y->f2, sizeof x->f2) == 0;
    case TH_N_STR:
    case TH_N_DTYPE:
    case TH_N_DEVICE:
    case TH_N_SYMBOL:
    case TH_N_VALUE:
    case TH_N_OPAQUE: return x->u.ref == y->u.ref;
    default: break;
    }
    for (uint32_t i = 0; i < x->count; i++) {
        if (!same_node(t, t->kids[x->u.kids + i], t->kids[y->u.kids + i])) return false;
    }
    return true;
}

/* How many values of the result are views just like this one? In-place operations give one object several names, so two
 * views stay two objects when more than one name of their kind is returned. */
static uint32_t returned_alike(const merger *m, th_val v) {
    const th_trace *t = m->t;
    uint32_t count = 0;
    for (uint32_t i = 0; i < m->nreturned; i++) {
        const th_value *other = &t->values[m->returned[i]];
        count += other->alias == t->values[v].alias && other->type == t->values[v].type &&
                 other->offset == t->values[v].offset;
    }
    return count;
}

/* May the results `b` of the later operation be the results `a` of the earlier one? */
static bool results_merge(const merger *m, th_node a, th_node b) {
    const th_trace *t = m->t;
    const th_node_data *x = &t->nodes[a], *y = &t->nodes[b];
    if (x->kind != y->kind || x->count != y->count) return false;
    if (x->kind == TH_N_VALUE) {
        const th_value *va = &t->values[x->u.ref], *vb = &t->values[y->u.ref];
        uint32_t ga = th__group_of(t, x->u.ref), gb = th__group_of(t, y->u.ref);
        if (va->type != vb->type || va->offset != vb->offset || m->deleted[x->u.ref]) return false;
        if (m->tied[x->u.ref] || m->tied[y->u.ref]) return false;
        if (ga == gb) return returned_alike(m, x->u.ref) < 2;
        uint8_t fa = m->groups[ga], fb = m->groups[gb];
        bool fresh = m->home[ga] == m->place[x->u.ref] && m->home[gb] == m->order;
        bool seen = (fa & (TH__GROUP_RETURNED | TH__GROUP_ESCAPES)) && (fb & (TH__GROUP_RETURNED | TH__GROUP_ESCAPES));
        return fresh && !seen && !((fa | fb) & (TH__GROUP_WRITTEN | TH__GROUP_INPUT));
    }
    for (uint32_t i = 0; i < x->count; i++) {
        if (!results_merge(m, t->kids[x->u.kids + i], t->kids[y->u.kids + i])) return false;
    }
    return true;
}

/* ---- merging ---- */

/* Group `from` becomes group `to`: its views are views of the surviving result. */
static void join_groups(merger *m, th_val to, th_val from) {
    th_trace *t = m->t;
    uint32_t old_to = t->values[to].alias, old_from = t->values[from].alias, alias = old_to ? old_to : old_from;
    uint8_t flags = m->groups[th__group_of(t, to)] | m->groups[th__group_of(t, from)];
    if (alias && old_to != old_from) {
        for (th_val v = 1; v < m->r.nvalues; v++) {
            if (v == to || v == from || (old_from && t->values[v].alias == old_from)) t->values[v].alias = alias;
        }
    }
    m->groups[th__group_of(t, to)] = flags;
    m->home[th__group_of(t, to)] = m->place[to];
}

static void merge_results(merger *m, th_node a, th_node b) {
    th_trace *t = m->t;
    if (t->nodes[a].kind == TH_N_VALUE) {
        th_val to = t->nodes[a].u.ref, from = t->nodes[b].u.ref;
        if (th__group_of(t, to) != th__group_of(t, from)) join_groups(m, to, from);
        m->r.value[from] = to;
        m->r.keep_alive[to] = true;
        return;
    }
    for (uint32_t i = 0; i < t->nodes[a].count; i++) {
        merge_results(m, t->kids[t->nodes[a].u.kids + i], t->kids[t->nodes[b].u.kids + i]);
    }
}

static bool same_call(const th_trace *t, const th_op *a, const th_op *b) {
    return a->callee == b->callee && ((a->marks ^ b->marks) & ~TH_MARK_LATE) == 0 && a->outs_list == b->outs_list &&
           same_node(t, a->args, b->args) && same_node(t, a->kwargs, b->kwargs);
}

/* The operation was just appended: take it back when an earlier one has its results, remember it otherwise. */
static void look_up(merger *m, th_opref ref, th_fuel *fuel) {
    th_trace *t = m->t;
    const th_op *op = &t->ops[ref];
    uint64_t hash = th__hash_mix(op->callee, 0);
    hash = hash_node(t, hash_node(t, hash_node(t, hash, op->args, false), op->kwargs, false), op->outs, true);
    uint32_t at = (uint32_t)(hash >> 32) & m->mask;
    for (; m->table[at].op; at = (at + 1) & m->mask) {
        const th_op *before = &t->ops[m->table[at].op];
        if (m->table[at].hash != hash || !same_call(t, before, op)) continue;
        if (!unwritten_since(m, ref, m->table[at].order) || !results_merge(m, before->outs, op->outs)) break;
        if (!th_fuel_take(fuel, "cse", th__op_label(t, op))) return;
        merge_results(m, before->outs, op->outs);
        t->nops--;
        return;
    }
    m->table[at] = (entry){hash, ref, m->order};
}

static void note_op(merger *m, const th_op *op) {
    const th_trace *t = m->t;
    for (uint32_t i = 0; i < op->nwrites; i++) m->written[th__group_of(t, t->kids[op->writes + i])] = m->order;
    if (op->kind != TH_OP_DEL) return;
    const th_node_data *args = &t->nodes[op->args];
    for (uint32_t i = 0; i < args->count; i++) m->deleted[t->nodes[t->kids[args->u.kids + i]].u.ref] = true;
}

static void note_places(merger *m, th_node outs) {
    const th_node_data *node = &m->t->nodes[outs];
    if (node->kind == TH_N_VALUE) {
        uint32_t *home = &m->home[th__group_of(m->t, node->u.ref)];
        m->place[node->u.ref] = m->order;
        if (*home == 0) *home = m->order;
    }
    if (node->kind != TH_N_TUPLE) return;
    for (uint32_t i = 0; i < node->count; i++) note_places(m, m->t->kids[node->u.kids + i]);
}

static void note_returned(void *user, th_val *v) {
    merger *m = user;
    for (uint32_t i = 0; i < m->nreturned; i++) {
        if (m->returned[i] == *v) return;
    }
    m->returned[m->nreturned++] = *v;
}

static th_status prepare(merger *m, th_trace *t) {
    uint32_t slots = 16;
    while (slots < 2 * t->nops) slots *= 2;
    TRY(th__rewrite_begin(&m->r, t));
    th__scratch *s = &m->r.scratch;
    uint32_t ngroups = th__group_count(t);
    m->t = t;
    m->mask = slots - 1;
    m->table = th__scratch_zeroed(s, slots, sizeof *m->table);
    m->written = th__scratch_zeroed(s, ngroups, sizeof *m->written);
    m->home = th__scratch_zeroed(s, ngroups, sizeof *m->home);
    m->place = th__scratch_zeroed(s, t->nvalues, sizeof *m->place);
    m->returned = th__scratch_zeroed(s, t->nvalues, sizeof *m->returned);
    m->deleted = th__scratch_zeroed(s, t->nvalues, sizeof *m->deleted);
    if (!m->table || !m->written || !m->home || !m->place || !m->returned || !m->deleted) return TH_ENOMEM;
    for (m->order = 1; m->order < m->r.nops; m->order++) note_places(m, m->r.ops[m->order].outs);
    th_node_each_value(t, t->result, note_returned, m);
    return TH_OK;
}

th_status th_pass_cse(th_trace *t, th_fuel *fuel) {
    th__scratch s = {.ctx = t->ctx};
    merger m = {.groups = th__groups(t, &s), .tied = th__tied(t, &s)};
    th_status status = m.groups && m.tied ? prepare(&m, t) : th_ctx_error(t->ctx)->status;
    bool begun = m.r.ops != NULL;
    if (status == TH_OK) {
        for (m.order = 1; m.order < m.r.nops && th_trace_status(t) == TH_OK; m.order++) {
            th_opref ref = th__rewrite_copy(&m.r, &m.r.ops[m.order]);
            note_op(&m, &m.r.ops[m.order]);
            if (ref && is_candidate(&m, ref)) look_up(&m, ref, fuel);
        }
        status = th_trace_status(t);
    }
    if (begun) status = th__rewrite_end(&m.r, status);
    th__scratch_fini(&s);
    return status;
}
