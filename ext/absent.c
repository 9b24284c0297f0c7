/* Backward programs for calls some of whose results get no gradient: src/passes/absent.c. They run on torch's kernels;
 * which results those are is mostly the same from step to step.
 */
#include "autograd.h"

#include "passes/pass.h"

struct thx_partial { /* one set of absent gradients */
    struct thx_partial *next;
    uint64_t absent;
    bool again;
    bool *shared;
    thx_program program; /* without a trace: there is none */
};

enum { MAX_PARTIALS = 16 };

void thx_partials_free(struct thx_partial *p) {
    while (p) {
        struct thx_partial *next = p->next;
        thx_program_fini(&p->program);
        PyMem_Free(p->shared);
        PyMem_Free(p);
        p = next;
    }
}

/* The trace that the program is made of; nobody has claimed its operations. */
static const th_trace *source_of(const thx_gradient *g, bool again) {
    return again ? g->again.t : g->batched.t ? g->batched.t : g->backward.t;
}

static int make(thx *x, thx_gradient *g, struct thx_partial *p) {
    th_trace *t = NULL;
    if (thx_check(x, th_trace_clone(source_of(g, p->again), &t)) < 0) return -1;
    th_status status = th_grad_without(t, g->ntangents, p->absent);
    if (status != TH_OK) th_trace_free(t);
    if (status == TH_DECLINED) return 0;
    if (thx_check(x, status) < 0) return -1;
    p->program.t = t;
    p->program.spends = !p->again && g->backward.spends;
    if (x->verify && thx_check(x, th_trace_verify(t)) < 0) return -1;
    if (thx_find_shared(g, t, &p->shared) < 0) return -1;
    return thx_literals_find(g->numbers, g->nnumbers, &p->program) < 0 ? -1
                                                                       : thx_program_lower(x, &p->program, p->again);
}

int thx_partial_find(thx *x, thx_gradient *g, uint64_t absent, bool again, thx_program **program, bool **shared) {
    struct thx_partial *p = g->partials;
    uint32_t n = 0;
    for (; p && (p->absent != absent || p->again != again); p = p->next) n++;
    if (!p && n < MAX_PARTIALS) {
        if (!(p = PyMem_Calloc(1, sizeof *p))) return PyErr_NoMemory(), -1;
        p->absent = absent;
        p->again = again;
        p->next = g->partials;
        g->partials = p;
        if (make(x, g, p) < 0) {
            g->partials = p->next;
            p->next = NULL;
            thx_partials_free(p);
            return -1;
        }
    }
    if (!p || !p->program.t) return 0;
    *program = &p->program;
    *shared = p->shared;
    return 0;
}
