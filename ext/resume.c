/* See resume.h. */
#include "resume.h"

#include "callable.h"

#include "ir/ir.h"

#include <string.h>

void thx_left_clear(thx_left *left) {
    for (uint32_t i = left->nroots; left->entry && i < left->nslots; i++) {
        th_slot s = left->slots[i];
        void *handle = s.owns_handle ? s.handle : NULL, *object = s.owns_object ? s.object : NULL;
        if (handle || object) left->release(left->user, handle, object);
    }
    PyMem_Free(left->slots);
    *left = (thx_left){0};
}

/* ---- which operations are the same ---- */

typedef struct pairing {
    const th_trace *a, *b;
    th_val *to, *back;   /* by value of a: the one of b; and the other way round; 0: none */
    th_opref *partner;   /* by operation of b: that of a */
    bool *gone, *needed; /* by value of a: deleted before the place; by value of b: used by what is run */
    bool *missed;        /* by value of a: it is gone, and would have been of use */
    bool misses;
} pairing;

static bool same_value(void *user, th_val a, th_val b) { return ((const pairing *)user)->to[a] == b; }

/* Results of the same operation on the same values. */
static bool pair_outs(pairing *k, th_node na, th_node nb, bool set) {
    const th_node_data *a = &k->a->nodes[na], *b = &k->b->nodes[nb];
    if (a->kind != b->kind || a->count != b->count) return false;
    if (a->kind == TH_N_VALUE) {
        if (k->a->values[a->u.ref].type != k->b->values[b->u.ref].type) return false;
        if (set) {
            k->to[a->u.ref] = b->u.ref;
            k->back[b->u.ref] = a->u.ref;
        }
        return true;
    }
    for (uint32_t i = 0; a->kind == TH_N_TUPLE && i < a->count; i++)
        if (!pair_outs(k, k->a->kids[a->u.kids + i], k->b->kids[b->u.kids + i], set)) return false;
    return true;
}

static bool same_op(pairing *k, const th_op *a, const th_op *b) {
    const th__match m = {k->a, k->b, same_value, k};
    return a->kind == TH_OP_CALL && b->kind == TH_OP_CALL && a->effects == b->effects && !a->nwrites && !b->nwrites &&
           th__callees_match(&m, a, b) && th__nodes_match(&m, a->args, b->args) &&
           th__nodes_match(&m, a->kwargs, b->kwargs) && pair_outs(k, a->outs, b->outs, false);
}

static void pair_inputs(pairing *k, const thx_entry *ea, const thx_entry *eb) {
    for (uint32_t i = 0; i < ea->nroots; i++)
        for (uint32_t j = 0; j < eb->nroots && !k->to[k->a->inputs[i]]; j++) {
            bool same = ea->root_leaf[i] >= 0 ? ea->root_leaf[i] == eb->root_leaf[j]
                                              : eb->root_leaf[j] < 0 && ea->roots[i].object == eb->roots[j].object;
            if (same) k->to[k->a->inputs[i]] = k->b->inputs[j];
        }
}

static void set_gone(void *user, th_val *v) { ((pairing *)user)->gone[*v] = true; }
static void set_needed(void *user, th_val *v) { ((pairing *)user)->needed[*v] = true; }

static void pair_ops(pairing *k, th_opref at) {
    th_opref next = 1;
    for (th_opref o = 1; o < at; o++) {
        if (k->a->ops[o].kind == TH_OP_DEL) {
            th_op_each_use((th_trace *)k->a, o, set_gone, k);
            continue;
        }
        th_opref found = next;
        while (found < k->b->nops && !same_op(k, &k->a->ops[o], &k->b->ops[found])) found++;
        if (found == k->b->nops) continue;
        pair_outs(k, k->a->ops[o].outs, k->b->ops[found].outs, true);
        k->partner[found] = o;
        next = found + 1;
    }
}

typedef struct test {
    pairing *k;
    bool there;
} test;

static void test_out(void *user, th_val *v) {
    test *t = user;
    if (!t->k->needed[*v] || !t->k->gone[t->k->back[*v]]) return;
    t->there = false;
    t->k->missed[t->k->back[*v]] = t->k->misses = true;
}

/* From the end: what is not there is run, and what that needs. */
static void choose(pairing *k) {
    th_trace *b = (th_trace *)k->b;
    th_node_each_value(b, b->result, set_needed, k);
    for (th_opref o = b->nops; o-- > 1;) {
        if (b->ops[o].kind == TH_OP_DEL) continue;
        test t = {k, k->partner[o] != 0};
        if (t.there) th_op_each_out(b, o, test_out, &t);
        if (t.there) continue;
        k->partner[o] = 0;
        th_op_each_use(b, o, set_needed, k);
    }
}

/* From now on `from` lets go of these at its end. Not while it runs elsewhere. */
static int keep_missed(thx *x, const pairing *k, thx_entry *from) {
    th_trace *t = from->main.t;
    for (th_opref o = 1; o < t->nops; o++) {
        if (t->ops[o].kind != TH_OP_DEL) continue;
        th_node kids[256];
        uint32_t n = 0, count = t->nodes[t->ops[o].args].count, first = t->nodes[t->ops[o].args].u.kids;
        for (uint32_t i = 0; i < count && count <= 256; i++)
            if (!k->missed[t->nodes[t->kids[first + i]].u.ref]) kids[n++] = t->kids[first + i];
        if (count <= 256 && n < count) t->ops[o].args = th_node_seq(t, TH_N_TUPLE, n, kids);
    }
    if (thx_check(x, th_trace_status(t)) < 0 || thx_program_lower(x, &from->main, false) < 0) return -1;
    from->main.checked = true; /* the same operations, in the same order */
    thx_resumes_free(from);
    from->number = ++x->entry_numbers; /* what others know of its slots is over */
    from->placed = NULL;               /* the new plan may lie where the old one did */
    return thx_entry_place(x, from);
}

/* ---- as instructions and slots ---- */

typedef struct moving {
    const pairing *k;
    const thx_program *from, *to;
    thx_resume *resume;
    uint32_t instr;
    bool failed;
} moving;

static void add_move(void *user, th_val *v) {
    moving *m = user;
    thx_resume *r = m->resume;
    if (m->k->gone[m->k->back[*v]]) return; /* nobody needs it; the rest is there for whoever goes on from here */
    uint32_t from = m->from->slot_of[m->k->back[*v]], to = m->to->slot_of[*v];
    void *moves = PyMem_Realloc(r->moves, sizeof *r->moves * (r->nmoves + 1));
    if (!moves || from == UINT32_MAX || to == UINT32_MAX) {
        m->failed = true;
        if (moves) r->moves = moves;
        return;
    }
    r->moves = moves;
    r->moves[r->nmoves].instr = m->instr;
    r->moves[r->nmoves].from = from;
    r->moves[r->nmoves++].to = to;
}

static bool plan_moves(const pairing *k, const thx_entry *ea, const thx_entry *eb, thx_resume *r) {
    const th_plan *plan = eb->main.plan;
    moving m = {k, &ea->main, &eb->main, r, 0, false};
    th_opref last = 0;
    r->skip = PyMem_Calloc(plan->ninstrs + 1, sizeof *r->skip);
    for (; r->skip && m.instr < plan->ninstrs && !m.failed; m.instr++) {
        th_opref o = plan->instrs[m.instr].op;
        r->skip[m.instr] = o && k->partner[o];
        if (r->skip[m.instr] && o != last) th_op_each_out((th_trace *)k->b, o, add_move, &m);
        last = o;
    }
    return r->skip && !m.failed;
}

static void free_resume(thx_resume *r) {
    PyMem_Free(r->skip);
    PyMem_Free(r->moves);
}

const thx_resume *thx_resume_find(thx *x, thx_entry *e, thx_entry *from, th_opref at) {
    for (uint32_t i = 0; i < e->nresumes; i++)
        if (e->resumes[i]->entry == from->number && e->resumes[i]->at == at) return e->resumes[i];
    thx_resume **resumes = PyMem_Realloc(e->resumes, sizeof *resumes * (e->nresumes + 1)), made = {from->number, at};
    if (!resumes) return (thx_resume *)PyErr_NoMemory();
    e->resumes = resumes;
    pairing k = {from->main.t, e->main.t};
    k.to = PyMem_Calloc(k.a->nvalues + 1, sizeof *k.to);
    k.back = PyMem_Calloc(k.b->nvalues + 1, sizeof *k.back);
    k.partner = PyMem_Calloc(k.b->nops + 1, sizeof *k.partner);
    k.gone = PyMem_Calloc(k.a->nvalues + 1, sizeof *k.gone);
    k.needed = PyMem_Calloc(k.b->nvalues + 1, sizeof *k.needed);
    k.missed = PyMem_Calloc(k.a->nvalues + 1, sizeof *k.missed);
    bool ready = k.to && k.back && k.partner && k.gone && k.needed && k.missed;
    int rc = 0;
    if (ready) {
        pair_inputs(&k, from, e);
        pair_ops(&k, at);
        choose(&k);
        ready = plan_moves(&k, from, e, &made);
        if (ready && k.misses && !from->running) { /* this call has what is left; the next one will have more */
            rc = keep_missed(x, &k, from);
            made.at = 0;
        }
    }
    PyMem_Free(k.to);
    PyMem_Free(k.back);
    PyMem_Free(k.partner);
    PyMem_Free(k.gone);
    PyMem_Free(k.needed);
    PyMem_Free(k.missed);
    if (!ready || rc < 0) {
        free_resume(&made);
        return NULL;
    }
    thx_resume *kept = PyMem_Malloc(sizeof *kept);
    if (!kept) {
        free_resume(&made);
        return (thx_resume *)PyErr_NoMemory();
    }
    *kept = made;
    return e->resumes[e->nresumes++] = kept;
}

void thx_resumes_free(thx_entry *e) {
    for (uint32_t i = 0; i < e->nresumes; i++) {
        free_resume(e->resumes[i]);
        PyMem_Free(e->resumes[i]);
    }
    PyMem_Free(e->resumes);
    e->resumes = NULL;
    e->nresumes = 0;
}

/* ---- running ---- */

/* A run that itself went on from another one has not all that its program makes. */
static bool is_there(const thx_resume *resume, const thx_left *from) {
    bool all = from->entry != 0;
    for (uint32_t i = 0; i < resume->nmoves && all; i++) {
        const th_slot *s = &from->slots[resume->moves[i].from];
        all = s->handle || s->object;
    }
    return all;
}

static int run_skipping(const th_plan *plan, th_frame *frame, const thx_resume *resume, thx_left *from) {
    uint32_t move = 0;
    for (uint32_t i = 0; i < plan->ninstrs; i++) {
        const th_instr *instr = &plan->instrs[i];
        for (; move < resume->nmoves && resume->moves[move].instr == i; move++) {
            th_slot *source = &from->slots[resume->moves[move].from];
            frame->slots[resume->moves[move].to] = *source;
            *source = (th_slot){0};
        }
        int rc = resume->skip[i] ? 0 : instr->run(frame, instr);
        if (rc) {
            frame->failed = i;
            return rc;
        }
        for (uint32_t j = 0; j < instr->nfrees; j++) th_slot_drop(plan, &frame->slots[plan->frees[instr->frees + j]]);
    }
    return 0;
}

/* What a run has computed goes to `leave` when it has met another value; else it is released. */
static void stop(thx *x, const thx_program *p, th_frame *frame, thx_left *leave) {
    const th_plan *plan = p->plan;
    if (leave && PyErr_ExceptionMatches(x->ValueChanged)) {
        thx_left_clear(leave);
        leave->slots = PyMem_Malloc(sizeof *leave->slots * (plan->nslots + 1));
        if (leave->slots) {
            memcpy(leave->slots, frame->slots, sizeof *leave->slots * plan->nslots);
            leave->at = plan->instrs[frame->failed].op;
            leave->nroots = plan->nroots;
            leave->nslots = plan->nslots;
            leave->release = plan->release;
            leave->user = plan->user;
            leave->entry = UINT64_MAX; /* the caller says whose it is */
            return;
        }
    }
    th_plan_clear(plan, frame);
}

int thx_program_resume(thx *x, thx_program *p, th_slot *slots, const thx_resume *resume, thx_left *from,
                       thx_left *leave) {
    th_frame frame = {.slots = slots, .user = x, .keep = true};
    memset(slots + p->plan->nroots, 0, sizeof *slots * (p->plan->nslots - p->plan->nroots));
    int rc =
        resume && is_there(resume, from) ? run_skipping(p->plan, &frame, resume, from) : th_plan_run(p->plan, &frame);
    if (rc == 0) return 0;
    bool changed = PyErr_ExceptionMatches(x->ValueChanged);
    stop(x, p, &frame, leave);
    if (!changed) thx_program_name_line(x, p, frame.failed);
    return -1;
}
