/* How a program is differentiated: from a joint trace to the backward programs and what a run has to know about its
 * inputs, results and gradients. autograd.c runs them.
 */
#include "autograd.h"

#include "region.h"
#include "transform.h"

#include "ir/ir.h"
#include "passes/pass.h"
#include "passes/view.h"

#include <string.h>

static void gradient_dealloc(thx_gradient *g) {
    PyTypeObject *type = Py_TYPE(g);
    thx_program_fini(&g->backward);
    thx_program_fini(&g->again);
    thx_program_fini(&g->batched);
    thx_partials_free(g->partials);
    PyMem_Free(g->wrt);
    PyMem_Free(g->tangent_of);
    PyMem_Free(g->base_of);
    PyMem_Free(g->aliased);
    PyMem_Free(g->shared);
    PyMem_Free(g->mutated);
    PyMem_Free(g->kept);
    PyMem_Free(g->stale);
    PyMem_Free(g->saved);
    PyMem_Free(g->numbers);
    PyMem_Free(g->depends);
    PyMem_Free(g->above);
    Py_XDECREF(g->derived);
    type->tp_free((PyObject *)g);
    Py_DECREF(type);
}

static uint32_t index_of(const th_val *items, uint32_t n, th_val v) {
    for (uint32_t i = 0; i < n; i++)
        if (items[i] == v) return i;
    return UINT32_MAX;
}

static int copy_numbers(uint32_t **to, const uint32_t *from, uint32_t n) {
    *to = PyMem_Calloc(n + 1, sizeof **to);
    if (!*to) return PyErr_NoMemory(), -1;
    if (n) memcpy(*to, from, n * sizeof **to);
    return 0;
}

static bool is_shown(const thx_gradient *g, const th_trace *forward, th_val v) {
    const th_node_data *result = &forward->nodes[forward->result];
    for (uint32_t i = 0; i < g->nresults; i++)
        if (forward->nodes[forward->kids[result->u.kids + i]].u.ref == v) return true;
    return false;
}

static int describe_saved(thx_gradient *g, const th_trace *forward, const th_halves *halves) {
    g->nsaved = halves->nsaved;
    g->saved = PyMem_Calloc(g->nsaved + 1, sizeof *g->saved);
    if (!g->saved) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < g->nsaved; i++) {
        uint32_t root = index_of(forward->inputs, forward->ninputs, halves->saved[i]);
        bool input = root != UINT32_MAX;
        g->saved[i] = (thx_saved){.root = input ? (int32_t)root : -1,
                                  .value = g->nresults + i,
                                  .shown = input || is_shown(g, forward, halves->saved[i])};
        for (uint32_t k = 0; input && k < g->nwrt; k++) g->saved[i].grad |= g->wrt[k] == halves->saved[i];
    }
    return 0;
}

static bool is_used(th_trace *t, th_val v) {
    for (th_opref o = 1; o < t->nops; o++)
        if (t->ops[o].kind == TH_OP_CALL && th_op_uses(t, o, v)) return true;
    return false;
}

/* Gradients that lie in each other's memory, as those of a stack that is summed up: a leaf keeps the one that it gets
 * and adds to it in place. Eager copies one that something else is computed of, too, and so do we. (Of others it does
 * not: after torch.stack([a, b]).sum(0) the gradients of a and b are one memory in eager.) */
int thx_find_shared(const thx_gradient *g, th_trace *t, bool **shared) {
    const th_node_data *result = &t->nodes[t->result];
    bool *of = *shared = PyMem_Calloc(g->nwrt + 1, sizeof *of);
    if (!of) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < g->nwrt; i++) {
        const th_node_data *a = &t->nodes[t->kids[result->u.kids + i]];
        uint32_t alias = a->kind == TH_N_VALUE ? t->values[a->u.ref].alias : 0;
        for (uint32_t k = 0; alias && k < i && !of[i]; k++) {
            const th_node_data *b = &t->nodes[t->kids[result->u.kids + k]];
            of[i] = b->kind == TH_N_VALUE && b->u.ref != a->u.ref && t->values[b->u.ref].alias == alias &&
                    (is_used(t, a->u.ref) || is_used(t, b->u.ref));
        }
    }
    return 0;
}

static th_dtype dtype_of(const th_trace *t, th_val v) { return th_type_get(t->ctx, t->values[v].type)->dtype; }

/* Results that lie in the memory of an input that requires grad. */
static int find_bases(thx_gradient *g, const th_trace *forward) {
    const th_node_data *result = &forward->nodes[forward->result];
    g->base_of = PyMem_Calloc(g->ntangents + 1, sizeof *g->base_of);
    if (!g->base_of) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < g->ntangents; i++) {
        th_val v = forward->nodes[forward->kids[result->u.kids + g->tangent_of[i]]].u.ref;
        const th_value *value = &forward->values[v];
        g->base_of[i] = -1;
        for (uint32_t k = 0; value->alias && k < forward->ninputs && g->base_of[i] < 0; k++) {
            const th_value *input = &forward->values[forward->inputs[k]];
            bool dtype = dtype_of(forward, forward->inputs[k]) == dtype_of(forward, v);
            bool wanted = index_of(g->wrt, g->nwrt, forward->inputs[k]) != UINT32_MAX;
            bool written = th__is_written(forward, forward->inputs[k], forward->nops);
            for (uint32_t m = 0; m < g->nmutated && !written; m++) /* copied to after the call: values for now */
                written = forward->values[g->mutated[m]].alias == value->alias;
            if (input->alias == value->alias && dtype && wanted && !written) g->base_of[i] = (int32_t)k;
        }
    }
    return 0;
}

/* Results that share elements with another one. The same result twice is one object. */
static int find_aliased(thx_gradient *g, const th_trace *forward) {
    const th_node_data *result = &forward->nodes[forward->result];
    g->aliased = PyMem_Calloc(g->ntangents + 1, sizeof *g->aliased);
    if (!g->aliased) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < g->ntangents; i++) {
        th_val a = forward->nodes[forward->kids[result->u.kids + g->tangent_of[i]]].u.ref;
        for (uint32_t k = 0; k < i && forward->values[a].alias; k++) {
            th_val b = forward->nodes[forward->kids[result->u.kids + g->tangent_of[k]]].u.ref;
            th__view va, vb;
            if (a == b || forward->values[a].alias != forward->values[b].alias) continue;
            bool apart = dtype_of(forward, a) == dtype_of(forward, b) && th__view_of(forward, a, &va) &&
                         th__view_of(forward, b, &vb) && !th__views_overlap(&va, &vb);
            if (!apart) g->aliased[i] = g->aliased[k] = true;
        }
    }
    return 0;
}

typedef struct spread {
    uint64_t *mask, all;
} spread;

static void gather(void *user, th_val *v) { ((spread *)user)->all |= ((spread *)user)->mask[*v]; }
static void scatter(void *user, th_val *v) { ((spread *)user)->mask[*v] |= ((spread *)user)->all; }

/* Which results are computed from which others: `mask` has a bit for each result that a value is, or comes from. */

typedef struct flow {
    spread s; /* first: for gather */
    const th_trace *t;
} flow;

static void scatter_flagged(void *user, th_val *v) {
    const flow *f = user;
    if (th_type_get(f->t->ctx, f->t->values[*v].type)->flags & TH_TYPE_REQUIRES_GRAD) scatter(user, v);
}

int thx_gradient_find_above(thx_gradient *g, th_trace *t, const th_val *results, uint32_t nresults) {
    flow f = {{PyMem_Calloc(t->nvalues, sizeof *f.s.mask), 0}, t};
    uint64_t *own = PyMem_Calloc(t->nvalues, sizeof *own), *above = PyMem_Calloc(g->ntangents + 1, sizeof *above);
    bool room = f.s.mask && own && above, any = false;
    uint32_t n = room && g->ntangents <= 64 ? g->ntangents : 0;
    for (uint32_t i = 0; i < n; i++)
        if (g->tangent_of[i] < nresults) own[results[g->tangent_of[i]]] |= UINT64_C(1) << i;
    for (th_opref o = 1; n && o < t->nops; o++) {
        f.s.all = 0;
        th_op_each_use(t, o, gather, &f);
        th_op_each_out(t, o, scatter_flagged, &f);
        for (uint32_t i = 0; i < t->ops[o].nwrites; i++) scatter_flagged(&f, &t->kids[t->ops[o].writes + i]);
        for (uint32_t i = 0; i < n; i++) {
            th_val v = g->tangent_of[i] < nresults ? results[g->tangent_of[i]] : 0;
            if (!v || t->values[v].def != o) continue;
            above[i] = f.s.mask[v] & ~own[v];
            f.s.mask[v] |= own[v];
            any |= above[i] != 0;
        }
    }
    g->above = any ? above : NULL;
    if (!any) PyMem_Free(above);
    PyMem_Free(own);
    PyMem_Free(f.s.mask);
    return room ? 0 : (PyErr_NoMemory(), -1);
}

/* Which of the incoming gradients each outgoing one depends on. */
static int find_dependences(thx_gradient *g) {
    th_trace *t = g->backward.t;
    spread s = {PyMem_Calloc(t->nvalues, sizeof *s.mask), 0};
    g->depends = PyMem_Calloc(g->nwrt + g->nkept + 1, sizeof *g->depends);
    if (!s.mask || !g->depends) {
        PyMem_Free(s.mask);
        return PyErr_NoMemory(), -1;
    }
    for (uint32_t i = 0; i < g->ntangents && i < 64; i++)
        s.mask[t->inputs[t->ninputs - g->ntangents + i]] = UINT64_C(1) << i;
    for (th_opref o = 1; o < t->nops; o++) {
        s.all = 0;
        th_op_each_use(t, o, gather, &s);
        th_op_each_out(t, o, scatter, &s);
        for (uint32_t i = 0; i < t->ops[o].nwrites; i++) scatter(&s, &t->kids[t->ops[o].writes + i]);
    }
    const th_node_data *result = &t->nodes[t->result];
    for (uint32_t i = 0; i < g->nwrt + g->nkept; i++) {
        const th_node_data *d = &t->nodes[t->kids[result->u.kids + i]];
        g->depends[i] = d->kind == TH_N_VALUE ? s.mask[d->u.ref] : 0;
    }
    PyMem_Free(s.mask);
    return 0;
}

typedef struct renaming {
    th_val *to; /* by value; 0: stays */
    th_val input;
} renaming;

static void rename_result(void *user, th_val *v) { ((renaming *)user)->to[*v] = ((renaming *)user)->input; }

static void rename_use(void *user, th_val *v) {
    const renaming *r = user;
    if (r->to[*v]) *v = r->to[*v];
}

typedef struct placing {
    th_trace *t;
    th_opref op;
} placing;

static void place(void *user, th_val *v) { ((placing *)user)->t->values[*v].def = ((placing *)user)->op; }

static bool is_batch_norm(const th_trace *t, const th_op *op) {
    return !op->callee_opaque && strstr(th_str_get(t->ctx, op->callee), "batch_norm") != NULL;
}

/* What the run did to its inputs is done: such writes go, and what they returned is the input. Batch norm stays: its
 * statistics will be copies. */
static int drop_writes(th_trace *t) {
    renaming r = {PyMem_Calloc(t->nvalues, sizeof *r.to), 0};
    if (!r.to) return PyErr_NoMemory(), -1;
    uint32_t n = 1;
    for (th_opref o = 1; o < t->nops; o++) {
        th_op_each_use(t, o, rename_use, &r);
        r.input = 0;
        for (uint32_t i = 0; i < t->ops[o].nwrites; i++) {
            th_val written = t->kids[t->ops[o].writes + i];
            if (index_of(t->inputs, t->ninputs, written) != UINT32_MAX) r.input = written;
        }
        if (r.input && is_batch_norm(t, &t->ops[o])) {
            t->ops[n] = t->ops[o];
            t->ops[n].nwrites = 0;
            t->ops[n++].effects &= (uint8_t)~TH_FX_WRITES;
        } else if (r.input)
            th_op_each_out(t, o, rename_result, &r);
        else
            t->ops[n++] = t->ops[o];
    }
    th_node_each_value(t, t->result, rename_use, &r);
    t->nops = n;
    for (th_val v = 1; v < t->nvalues; v++) t->values[v].def = 0;
    for (placing p = {t, 1}; p.op < t->nops; p.op++) th_op_each_out(t, p.op, place, &p);
    PyMem_Free(r.to);
    return 0;
}

/* The joint trace with the gradients alone as its result: what create_graph runs. */
static int keep_gradients(thx *x, const th_joint *joint, th_trace **out, bool *random, bool *hooks) {
    if (thx_check(x, th_trace_clone(joint->t, out)) < 0) return -1;
    th_trace *t = *out;
    const th_node_data *result = &t->nodes[t->result];
    uint32_t first = joint->nresults + joint->nmutated;
    const th_node *grads = joint->t->kids + result->u.kids + first; /* the other trace's: it does not move */
    t->result = th_node_seq(t, TH_N_TUPLE, joint->nwrt + joint->nkept, grads);
    if (drop_writes(t) < 0) return -1;
    for (th_opref o = 1; o < t->nops; o++) {
        const char *callee = t->ops[o].callee_opaque ? "" : th_str_get(t->ctx, t->ops[o].callee);
        bool hook = strncmp(callee, "thunder._kernels.run_", 21) == 0; /* runs in every backward */
        bool ours = strncmp(callee, "thunder._kernels.", 17) == 0;     /* ties, and checks of data */
        *hooks |= hook;
        *random |= !ours && (t->ops[o].effects & (TH_FX_RANDOM | TH_FX_STATE)) != 0;
    }
    th_fuel fuel = {.left = -1};
    return thx_check(x, th_pipeline_run(t, "dce,lifetime", &fuel, x->verify, NULL, NULL));
}

typedef struct stale_use {
    thx_gradient *g;
    const th_trace *t;
    bool norm;
} stale_use;

static void note_stale(void *user, th_val *v) {
    stale_use *s = user;
    uint32_t at = index_of(s->t->inputs, s->g->nroots, *v);
    if (at == UINT32_MAX) return;
    bool learned = th_type_get(s->t->ctx, s->t->values[*v].type)->flags & TH_TYPE_REQUIRES_GRAD;
    if (s->norm && !learned) s->g->stale[at] |= ROOT_COPY;
    if (!s->norm && s->g->stale[at]) s->g->stale[at] |= ROOT_GONE;
}

/* Inputs that the forward run writes to, by what the gradients computed from the inputs once more want with them. */
static int find_stale(thx_gradient *g, const th_trace *forward) {
    th_trace *t = g->again.t;
    g->stale = PyMem_Calloc(g->nroots + 1, sizeof *g->stale);
    if (!g->stale) return PyErr_NoMemory(), -1;
    for (th_opref o = 1; o < forward->nops; o++)
        for (uint32_t i = 0; i < forward->ops[o].nwrites && !is_batch_norm(forward, &forward->ops[o]); i++) {
            uint32_t at = index_of(forward->inputs, g->nroots, forward->kids[forward->ops[o].writes + i]);
            if (at != UINT32_MAX) g->stale[at] = ROOT_COPY;
        }
    for (th_opref o = 1; o < t->nops; o++) {
        stale_use s = {g, t, is_batch_norm(t, &t->ops[o])};
        if (t->ops[o].kind == TH_OP_CALL) th_op_each_use(t, o, note_stale, &s);
    }
    th_node_each_value(t, t->result, note_stale, &(stale_use){g, t, false});
    return 0;
}

/* Does one of the executors fuse regions? */
static int has_fuser(PyObject *claims) {
    PyObject *yes = claims ? PyObject_GetAttrString(claims, "fuses") : Py_NewRef(Py_False);
    int answer = yes ? PyObject_IsTrue(yes) : -1;
    Py_XDECREF(yes);
    return answer;
}

static int gradient_init(thx *x, thx_gradient *g, th_joint *joint, th_remat remat, PyObject *transform,
                         PyObject *claims, th_trace **forward) {
    th_halves halves;
    int fuser = has_fuser(claims);
    if (fuser < 0) return -1;
    if (fuser && remat == TH_REMAT_AUTO) remat = TH_REMAT_FUSED;
    if (keep_gradients(x, joint, &g->again.t, &g->again_random, &g->hooks) < 0 ||
        thx_check(x, th_grad_split(joint, remat, &halves)) < 0)
        return -1;
    if (x->verify &&
        (thx_check(x, th_trace_verify(halves.forward)) < 0 || thx_check(x, th_trace_verify(halves.backward)) < 0)) {
        th_halves_fini(x->ctx, &halves);
        return -1;
    }
    if (transform && thx_transform_halves(x, transform, &halves, joint->nresults + joint->nmutated) < 0) {
        th_halves_fini(x->ctx, &halves);
        return -1;
    }
    const th_trace *f = halves.forward;
    g->backward.t = halves.backward;
    g->backward.spends = true;
    halves.backward = NULL;
    g->nroots = f->ninputs;
    g->nresults = joint->nresults + joint->nmutated;
    g->nwrt = joint->nwrt;
    g->ntangents = joint->ntangents;
    g->nmutated = joint->nmutated;
    g->nkept = joint->nkept;
    g->kept = PyMem_Calloc(joint->nkept + 1, sizeof *g->kept);
    for (uint32_t i = 0; g->kept && i < joint->nkept; i++) g->kept[i] = joint->kept[i].result;
    g->bytes = halves.bytes;
    g->bytes_kept = halves.bytes_kept;
    g->ncatalogue = joint->ncatalogue;
    g->derived = PyTuple_New(joint->nderived);
    for (uint32_t i = 0; g->derived && i < joint->nderived; i++) {
        PyObject *name = PyUnicode_FromString(th_str_get(x->ctx, joint->derived[i]));
        if (name)
            PyTuple_SET_ITEM(g->derived, i, name);
        else
            Py_CLEAR(g->derived);
    }
    int rc = !g->kept || !g->derived || copy_numbers(&g->wrt, joint->wrt, g->nwrt) < 0 ||
                     copy_numbers(&g->mutated, joint->mutated, g->nmutated) < 0 ||
                     copy_numbers(&g->tangent_of, joint->tangent_of, g->ntangents) < 0 ||
                     describe_saved(g, f, &halves) < 0 || find_bases(g, f) < 0 || find_aliased(g, f) < 0 ||
                     thx_find_shared(g, g->backward.t, &g->shared) < 0 || find_dependences(g) < 0 ||
                     find_stale(g, f) < 0
                 ? -1
                 : 0;
    for (uint32_t i = 0; rc == 0 && i < g->nwrt; i++) g->wrt[i] = index_of(f->inputs, f->ninputs, g->wrt[i]);
    for (uint32_t i = 0; rc == 0 && i < g->nmutated; i++)
        g->mutated[i] = index_of(f->inputs, f->ninputs, g->mutated[i]);
    if (rc == 0) {
        *forward = halves.forward;
        halves.forward = NULL;
        rc = claims ? thx_check(x, th_trace_clone(g->backward.t, &g->batched.t)) : 0; /* what nobody has claimed */
        if (rc == 0) rc = thx_claim(x, claims, g->backward.t, "backward");
        if (rc == 0) rc = thx_program_lower(x, &g->backward, false);
    }
    th_halves_fini(x->ctx, &halves);
    return rc;
}

thx_gradient *thx_gradient_new(thx *x, th_joint *joint, th_remat remat, PyObject *transform, PyObject *claims,
                               th_trace **forward) {
    thx_gradient *g = (thx_gradient *)x->Gradient->tp_alloc(x->Gradient, 0);
    if (!g) return NULL;
    g->x = x;
    if (gradient_init(x, g, joint, remat, transform, claims, forward) < 0) {
        Py_DECREF((PyObject *)g);
        return NULL;
    }
    return g;
}

static PyType_Slot gradient_slots[] = {
    {Py_tp_dealloc, gradient_dealloc}, {Py_tp_doc, "How a compiled program is differentiated."}, {0, NULL}};
static PyType_Spec gradient_spec = {"thunder._C.Gradient", sizeof(thx_gradient), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, gradient_slots};

int thx_gradient_init(thx *x, PyObject *module) {
    x->Gradient = (PyTypeObject *)PyType_FromModuleAndSpec(module, &gradient_spec, NULL);
    return x->Gradient ? 0 : -1;
}
