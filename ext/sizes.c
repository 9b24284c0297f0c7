/* Sizes that change from call to call: a program for any of them, by one capture that follows sizes.
 *
 * A call that is like a former one but for sizes of its tensors is captured with these as Extents
 * (thunder/_sizes.py), which write down what is computed of them and what is decided by them. In the trace, an
 * operation marks where the program comes to know a size, and the numbers computed of it are marked where they occur:
 *
 *     thunder._kernels.extent(x, 1, 0)          number 0 is size 1 of x
 *     t0 = torch.arange(8)                      whose 8 is number 1 = number 0 + 1, say
 *
 * The program is trusted when it is, with the sizes of the former call put in, the program that was captured then. From
 * there on it runs for any sizes: by torch's own kernels, which look at the tensors that they get, and with the numbers
 * computed anew. What the code decided by sizes is checked as soon as it is known, before the call where the arguments
 * tell it; a call that does not fit is captured.
 *
 * Nothing may depend on a size that was not followed: whatever is recorded by way of torch's own decompositions, and
 * what is decided by values of tensors, leaves the program to its own sizes. So do gradients. A program that writes to
 * inputs or draws random numbers could not begin anew: sizes_dry.c finds out before whether it holds.
 */
#include "sizes.h"

#include "callable.h"

#include "ir/ir.h"
#include "passes/pass.h"

#include <string.h>

enum { MAX_TRIES = 4 };

/* ---- a former call ---- */

/* The dimensions of a tensor from the innermost on, and which of their strides follow from the sizes, here and there.
 */
static bool free_tensor(const thx_spec *a, thx_spec *b) {
    int64_t n = b->ndim, here = 1, there = 1;
    uint8_t *dense = PyMem_Calloc((size_t)(2 * n + 1), 1);
    if (!dense) return PyErr_NoMemory(), false;
    for (int64_t i = 0; i < n; i++) { /* by stride, then by size, then from the last on */
        int64_t at = i;
        for (; at > 0; at--) {
            uint8_t before = dense[at - 1], d = (uint8_t)(n - 1 - i);
            int64_t s = b->dims[n + d], t = b->dims[n + before];
            if (t < s || (t == s && b->dims[before] <= b->dims[d])) break;
            dense[at] = before;
        }
        dense[at] = (uint8_t)(n - 1 - i);
    }
    bool known = true;
    for (int64_t i = 0; i < n && known; i++) {
        uint8_t d = dense[i];
        dense[n + i] = b->dims[n + d] == here && a->dims[n + d] == there;
        known = dense[n + i] || b->dims[n + d] == a->dims[n + d];
        here = b->dims[n + d] * b->dims[d];
        there = a->dims[n + d] * a->dims[d];
        if (a->dims[d] != b->dims[d]) {
            known &= a->dims[d] > 1 && b->dims[d] > 1;
            b->free |= UINT64_C(1) << d;
        }
    }
    b->dense = dense;
    if (!known) b->free = 0;
    return known;
}

/* *ints: how many ints there are that may be any. */
static bool free_sizes(const thx_spec *a, thx_spec *b, uint32_t *ints) {
    bool differ =
        b->kind == THX_S_TENSOR && b->dims && memcmp(a->dims, b->dims, sizeof *a->dims * (size_t)(2 * b->ndim)) != 0;
    bool known = !differ || free_tensor(a, b);
    if (b->kind == THX_S_CONST && b->type == &PyLong_Type &&
        (a->kind == THX_S_NUMBER || !thx_same_constant(a->object, b->object))) {
        b->number = ++*ints;
        known = *ints <= THX_MAX_NUMBERS;
    }
    for (uint32_t i = 0; i < b->nkids && known; i++) known = free_sizes(&a->kids[i], &b->kids[i], ints);
    return known;
}

static void fix_sizes_of(thx_spec *s) {
    s->free = 0;
    s->number = 0;
    PyMem_Free(s->dense);
    s->dense = NULL;
    for (uint32_t i = 0; i < s->nkids; i++) fix_sizes_of(&s->kids[i]);
}

/* They would find extents where ints are while these are followed. Torch's own threads, which wait for work, run no
 * Python code. */
static bool has_threads(void) {
    PyThreadState *mine = PyThreadState_Get();
    PyThreadState *state = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(mine));
    bool found = false;
    for (; state && !found; state = PyThreadState_Next(state)) {
        PyFrameObject *frame = state == mine ? NULL : PyThreadState_GetFrame(state);
        found = frame != NULL;
        Py_XDECREF(frame);
    }
    return found;
}

/* Is it the same call but for sizes and ints? Then the sizes of b that differ are free, its ints are numbered, and it
 * knows the places of ints that are no arguments. 1, 0, -1. */
static int alike_calls(thx *x, const thx_entry *a, thx_entry *b, bool ints) {
    uint32_t differences = 0;
    bool same = !a->eager && !a->dead && (ints || !(a->formula || a->gradient || a->expected)) &&
                thx_calls_alike(a, b, ints ? THX_ALIKE_INTS : THX_ALIKE_SIZES, &differences);
    if (!same) return PyErr_Occurred() ? -1 : 0;
    PyObject *changed = PyList_New(0);
    int holds = changed ? thx_guards_check_but(x, a->guards, ints ? NULL : &PyLong_Type, changed) : -1;
    if (holds == 1 && !differences && !PyList_GET_SIZE(changed)) holds = 0;
    b->nfloats = 0;
    for (uint32_t i = 0; i < b->nargs && holds == 1; i++) holds = free_sizes(&a->args[i], &b->args[i], &b->nfloats);
    if (holds == 1 && thx_places_take(b, a, changed) < 0) holds = -1;
    if (holds == 1 && (b->nfloats + b->nplaces > THX_MAX_NUMBERS || (b->nplaces && has_threads()))) holds = 0;
    Py_XDECREF(changed);
    if (holds == 1 && !PyErr_Occurred()) return 1;
    for (uint32_t i = 0; i < b->nargs; i++) fix_sizes_of(&b->args[i]);
    thx_places_free(b);
    b->nfloats = 0;
    return PyErr_Occurred() ? -1 : 0;
}

int thx_sizes_begin(thx_callable_object *c, thx_entry *e, thx_entry **like, bool *ints) {
    bool sizes = !c->claims && !c->transform;
    uint64_t changes = c->changes;
    *like = NULL;
    for (int pass = sizes ? 0 : 1; pass < 2 && !*like; pass++) {
        thx_entry *a = c->dynamic && c->unfollowed < MAX_TRIES ? c->entries : NULL;
        *ints = pass;
        while (a && !*like && c->changes == changes) {
            thx_entry *next = a->next;
            a->running++; /* the caller lets go of the one that is found */
            int alike = alike_calls(c->x, a, e, *ints);
            if (alike == 1)
                *like = a;
            else
                thx_entry_leave(c, a);
            if (alike < 0) return -1;
            a = next;
        }
    }
    return 0;
}

/* ---- the same program? ---- */

typedef struct comparison {
    const th_trace *a, *b;
    const thx_sizes *sizes;
    th_slot *slots; /* numbers as they are in a */
    th_opref at;    /* the operation of b that is looked at */
} comparison;

static bool same_value(void *user, th_val a, th_val b) {
    const comparison *k = user;
    const th_value *p = &k->a->values[a], *q = &k->b->values[b];
    const th_type *s = th_type_get(k->a->ctx, p->type), *t = th_type_get(k->b->ctx, q->type);
    return a == b && p->alias == q->alias && s->kind == t->kind && s->dtype == t->dtype && s->device == t->device &&
           s->ndim == t->ndim && s->flags == t->flags;
}

static bool same_node(const comparison *k, th_node na, th_node nb) {
    const th_node_data *a = &k->a->nodes[na], *b = &k->b->nodes[nb];
    if (a->kind != b->kind || a->count != b->count) return false;
    if (a->kind == TH_N_INT) return a->u.i == (b->number ? thx_in_slot(k->slots, b->number - 1u) : b->u.i);
    if (a->kind < TH_N_TUPLE || a->kind > TH_N_SLICE)
        return th__nodes_match(&(th__match){k->a, k->b, same_value, (void *)k}, na, nb);
    for (uint32_t i = 0; i < a->count; i++)
        if (!same_node(k, k->a->kids[a->u.kids + i], k->b->kids[b->u.kids + i])) return false;
    return true;
}

static bool same_op(const comparison *k, const th_op *a, const th_op *b) {
    const th__match m = {k->a, k->b, same_value, (void *)k};
    bool same = th__callees_match(&m, a, b) && a->kind == b->kind && a->effects == b->effects && a->marks == b->marks &&
                a->nwrites == b->nwrites && a->outs_list == b->outs_list;
    for (uint32_t i = 0; i < a->nwrites && same; i++) same = k->a->kids[a->writes + i] == k->b->kids[b->writes + i];
    return same && same_node(k, a->args, b->args) && same_node(k, a->kwargs, b->kwargs) &&
           same_node(k, a->outs, b->outs);
}

static bool same_mark(const comparison *k, const th_op *op, int kind) {
    th_val v = thx_mark_argument(k->b, op, 0)->u.ref;
    return v < k->a->nvalues &&
           thx_mark_holds(k->b, op, kind, th_type_get(k->a->ctx, k->a->values[v].type), k->sizes, k->slots);
}

static void put_former(const comparison *k, uint32_t number, PyObject *value) {
    for (uint32_t i = 0; i < k->sizes->count; i++)
        if (k->sizes->terms[i].op == THX_T_ARGUMENT && k->sizes->terms[i].leaf == (int32_t)number)
            thx_into_slot(k->slots, i, PyLong_AsLongLong(value));
}

/* The values of ints in the former call. */
static void former_ints(const thx_spec *a, const thx_spec *b, const comparison *k) {
    if (b->kind == THX_S_CONST && b->number && b->type == &PyLong_Type) put_former(k, b->number - 1, a->object);
    for (uint32_t i = 0; i < b->nkids; i++) former_ints(&a->kids[i], &b->kids[i], k);
}

/* Is b, with the sizes of a put in, the program a? */
static bool same_program(comparison *k) {
    const th_trace *a = k->a, *b = k->b;
    bool same = a->ninputs == b->ninputs;
    for (uint32_t i = 0; i < k->sizes->count && k->sizes->terms[i].op != THX_T_SIZE && same; i++)
        same = k->sizes->terms[i].op == THX_T_ARGUMENT || thx_term_compute(k->sizes, i, k->slots);
    for (uint32_t i = 0; i < a->ninputs && same; i++) same = same_value((void *)k, a->inputs[i], b->inputs[i]);
    th_opref at = 1;
    for (th_opref o = 1; o < b->nops && same; o++) {
        int kind = thx_mark_kind(b, &b->ops[k->at = o]);
        if (kind) {
            same = same_mark(k, &b->ops[o], kind);
            continue;
        }
        while (at < a->nops && thx_mark_kind(a, &a->ops[at])) at++;
        same = at < a->nops && same_op(k, &a->ops[at], &b->ops[o]);
        at++;
    }
    while (same && at < a->nops && thx_mark_kind(a, &a->ops[at])) at++;
    return same && at == a->nops && same_node(k, a->result, b->result);
}

/* ---- an entry for any sizes ---- */

typedef struct differing {
    const th_trace *a;
    th_trace *b;
    bool found;
} differing;

static int read_operand(PyObject *o, bool *of, int64_t *value) {
    *of = PyTuple_Check(o);
    *value = PyLong_AsLongLong(*of ? PyTuple_GET_ITEM(o, 0) : o);
    return PyErr_Occurred() ? -1 : 0;
}

static int read_term(const thx_recorder *r, thx_sizes *z, uint32_t i, PyObject *term, PyObject *value) {
    thx_term *out = &z->terms[i];
    out->op = (uint8_t)PyLong_AsLong(PyTuple_GET_ITEM(term, 0));
    out->condition = PyTuple_GET_ITEM(term, 3) == Py_True;
    out->value = PyLong_AsLongLong(value);
    out->leaf = -1;
    if (read_operand(PyTuple_GET_ITEM(term, 1), &out->of_a, &out->a) < 0 ||
        read_operand(PyTuple_GET_ITEM(term, 2), &out->of_b, &out->b) < 0)
        return -1;
    out->early = (!out->of_a || z->terms[out->a].early) && (!out->of_b || z->terms[out->b].early);
    out->of_int =
        out->op == THX_T_ARGUMENT || (out->of_a && z->terms[out->a].of_int) || (out->of_b && z->terms[out->b].of_int);
    if (out->op == THX_T_ARGUMENT) out->leaf = (int32_t)out->a;
    if (out->op != THX_T_SIZE) return 0;
    for (uint32_t j = 0; j < r->nroots; j++)
        if (r->roots[j].value == (th_val)out->a) out->leaf = r->roots[j].leaf;
    out->early = out->leaf >= 0;
    return 0;
}

static thx_sizes *read_sizes(const thx_recorder *r, PyObject *sizes, bool trusting) {
    PyObject *terms = PyObject_GetAttrString(sizes, "terms"), *values = PyObject_GetAttrString(sizes, "values");
    uint32_t n = terms && values ? (uint32_t)PyList_GET_SIZE(terms) : 0;
    thx_sizes *z = terms && values ? PyMem_Calloc(1, sizeof *z + sizeof *z->terms * n) : NULL;
    int rc = z ? 0 : (PyErr_Occurred() ? -1 : (PyErr_NoMemory(), -1));
    if (z) *z = (thx_sizes){.count = n, .trusting = trusting};
    for (uint32_t i = 0; i < n && rc == 0; i++)
        rc = read_term(r, z, i, PyList_GET_ITEM(terms, i), PyList_GET_ITEM(values, i));
    Py_XDECREF(terms);
    Py_XDECREF(values);
    if (rc == 0) return z;
    PyMem_Free(z);
    return NULL;
}

static bool asserts(const th_trace *t, const th_op *op) { /* that may be done twice */
    const char *callee = op->callee_opaque ? "" : th_str_get(t->ctx, op->callee);
    return strstr(callee, "assert") || strcmp(callee, "thunder._kernels.raise_if") == 0;
}

static bool acts_outside(const th_trace *t) {
    bool acts = false;
    for (th_opref o = 1; o < t->nops && !acts; o++)
        acts = t->ops[o].effects & TH_FX_STATE && !thx_mark_kind(t, &t->ops[o]) && !asserts(t, &t->ops[o]);
    return acts;
}

static bool runs_once(const th_trace *t) { /* it cannot begin anew when something does not fit */
    bool once = false;
    for (th_opref o = 1; o < t->nops && !once; o++) once = t->ops[o].effects & TH_FX_RANDOM;
    for (uint32_t i = 0; i < t->ninputs && !once; i++) once = th__is_written(t, t->inputs[i], t->nops);
    return once;
}

/* 1: dry runs say for both captures what these said; 0 they do not, -1 error. */
static int make_dry(thx *x, thx_sizes *z, const thx_recorder *r, const comparison *k, const th_trace *program) {
    z->dry = thx_dry_new(x, program, r);
    th_typeref *types = PyMem_Calloc(program->ninputs + 1, sizeof *types);
    th_slot *slots = PyMem_Calloc(z->count + 1, sizeof *slots);
    int fits = z->dry && types && slots ? 1 : -1;
    for (int pass = 0; pass < 2 && fits == 1; pass++) { /* this capture, then the former one */
        const th_trace *t = pass ? k->a : k->b;
        for (uint32_t i = 0; i < program->ninputs; i++) {
            th_val v = program->inputs[i];
            types[i] = v < t->nvalues ? th_type_set_grad(t->ctx, t->values[v].type, false) : 0;
        }
        for (uint32_t i = 0; i < z->count; i++)
            if (z->terms[i].op == THX_T_ARGUMENT)
                thx_into_slot(slots, i, pass ? thx_in_slot(k->slots, i) : z->terms[i].value);
        fits = thx_dry_run(x, z->dry, z, types, slots);
    }
    PyMem_Free(types);
    PyMem_Free(slots);
    return fits < 0 && !PyErr_Occurred() ? (PyErr_NoMemory(), -1) : fits;
}

static void find_other(void *user, th_val *v) {
    differing *d = user;
    const th_typeref now = th_type_set_grad(d->b->ctx, d->b->values[*v].type, false);
    d->found |= *v >= d->a->nvalues || th_type_set_grad(d->a->ctx, d->a->values[*v].type, false) != now;
}

static void find_written(void *user, th_val *v) {
    differing *d = user;
    d->found |= th__is_written(d->b, *v, d->b->nops);
}

/* Sizes decide whether these give a view or a copy. */
static bool may_copy(const th_trace *t, const th_op *op) {
    static const char *const known[] = {"reshape", "reshape_as",  "contiguous",   "flatten",       "ravel",
                                        "to",      "sum_to_size", "matrix_power", "cartesian_prod"};
    const char *callee = op->callee_opaque ? "" : th_str_get(t->ctx, op->callee), *dot = strrchr(callee, '.');
    bool found = false;
    for (size_t i = 0; dot && i < sizeof known / sizeof *known && !found; i++) found = strcmp(dot + 1, known[i]) == 0;
    return found;
}

static bool writes_to_some_view(th_trace *t) {
    differing d = {NULL, t, false};
    for (th_opref o = 1; o < t->nops && !d.found; o++) {
        if (!(t->ops[o].marks & TH_MARK_SIZED) || !may_copy(t, &t->ops[o])) continue;
        th_op_each_use(t, o, find_written, &d);
        th_op_each_out(t, o, find_written, &d);
    }
    return d.found;
}

int thx_sizes_mark(thx *x, th_trace *t, const th_trace *like) {
    for (th_opref o = 1; o < t->nops; o++) {
        differing d = {like, t, th_node_has_extent(t, t->ops[o].args) || th_node_has_extent(t, t->ops[o].kwargs)};
        th_op_each_use(t, o, find_other, &d);
        th_op_each_out(t, o, find_other, &d);
        if (d.found && t->ops[o].kind == TH_OP_CALL && !thx_mark_kind(t, &t->ops[o])) t->ops[o].marks |= TH_MARK_SIZED;
    }
    if (!writes_to_some_view(t)) return 0;
    PyErr_SetString(x->SizesChanged, "the program writes to what is a view for some sizes, and a copy for others");
    return -1;
}

void thx_sizes_free(const thx_sizes *z) {
    if (z) PyMem_Free(z->varies);
    if (z) thx_dry_free(z->dry);
    PyMem_Free((void *)z);
}

/* Values keep their numbers through the passes, and what these add are constants. */
static int note_varying(thx_sizes *z, const th_trace *a, const th_trace *b, const th_trace *final) {
    z->varies = PyMem_Calloc(final->nvalues + 1, sizeof *z->varies);
    if (!z->varies) return PyErr_NoMemory(), -1;
    for (th_val v = 1; v < final->nvalues; v++)
        z->varies[v] = v < b->nvalues ? v >= a->nvalues || th_type_set_grad(a->ctx, a->values[v].type, false) !=
                                                               th_type_set_grad(b->ctx, b->values[v].type, false)
                                      : final->values[v].def != 0;
    return 0;
}

static void free_ints(thx_spec *s) {
    if (s->kind == THX_S_CONST && s->number) {
        s->kind = THX_S_NUMBER;
        s->leaf = s->number - 1;
        s->number = 0;
    }
    for (uint32_t i = 0; i < s->nkids; i++) free_ints(&s->kids[i]);
}

static bool holds_extent(const thx_spec *s) {
    bool found = s->kind == THX_S_EXTENT;
    for (uint32_t i = 0; i < s->nkids && !found; i++) found = holds_extent(&s->kids[i]);
    return found;
}

static int free_all_ints(thx_entry *e) {
    for (uint32_t i = 0; i < e->nargs; i++) free_ints(&e->args[i]);
    for (uint32_t i = 0; i < e->nplaces; i++) e->places[i].any = true;
    return thx_places_keep(e);
}

/* What the capture of e followed, and the numbers as they were in the former one; NULL with an exception. */
static thx_sizes *begin_comparison(comparison *k, const thx_entry *e, const thx_entry *like, const thx_recorder *r,
                                   PyObject *sizes, bool trusting) {
    thx_sizes *z = read_sizes(r, sizes, trusting);
    th_slot *slots = z ? PyMem_Calloc(z->count + 1, sizeof *slots) : NULL;
    if (!slots) {
        PyMem_Free(z);
        if (!PyErr_Occurred()) PyErr_NoMemory();
        return NULL;
    }
    *k = (comparison){like->captured, e->captured, z, slots, 0};
    for (uint32_t i = 0; i < e->nargs; i++) former_ints(&like->args[i], &e->args[i], k);
    for (uint32_t i = 0; i < e->nplaces; i++) put_former(k, e->nfloats + i, e->places[i].value);
    return z;
}

/* What the code computes of numbers goes to Python's state alone (`self.steps += 1`), and arguments tell it. 1, 0, -1.
 */
static int compute_for_python(thx_entry *e, const thx_entry *like, const thx_recorder *r, PyObject *sizes) {
    comparison k;
    thx_sizes *z = begin_comparison(&k, e, like, r, sizes, false);
    if (!z) return -1;
    bool same = !e->expected;
    for (uint32_t i = 0; i < z->count; i++) same &= z->terms[i].early && z->terms[i].op != THX_T_SIZE;
    same = same && same_program(&k);
    PyMem_Free(k.slots);
    if (same && !(z->varies = PyMem_Calloc(e->main.t->nvalues + 1, sizeof *z->varies))) PyErr_NoMemory();
    if (!z->varies) {
        thx_sizes_free(z);
        return same ? -1 : 0;
    }
    z->steady = true;
    e->main.literals.sizes = z;
    return 1;
}

int thx_ints_end(thx *x, thx_entry *e, const thx_entry *like, const thx_recorder *r, PyObject *sizes, PyObject *tape) {
    PyObject *terms = PyObject_GetAttrString(sizes, "terms");
    const th_trace *t = e->captured;
    uint32_t floats = 0;
    for (uint32_t i = 0; i < e->nplaces; i++) floats += PyFloat_CheckExact(e->places[i].value);
    bool computed =
        terms && (PyList_GET_SIZE(terms) > (Py_ssize_t)(e->nfloats + e->nplaces - floats) || holds_extent(&e->result));
    bool used = !terms || e->ask_in_backward || (computed && floats);
    for (th_opref o = 1; o < t->nops && !used; o++)
        used = th_node_has_extent(t, t->ops[o].args) || th_node_has_extent(t, t->ops[o].kwargs);
    Py_XDECREF(terms);
    if (!used && floats) used = thx_floats_unseen(e, like, tape) != 1;
    int rc = !used && computed ? compute_for_python(e, like, r, sizes) : 1;
    if (rc < 0) return -1;
    if (!used && rc) return free_all_ints(e);
    if (!PyErr_Occurred()) PyErr_SetString(x->SizesChanged, "the program computes with a number that changes");
    return -1;
}

int thx_sizes_end(thx *x, thx_entry *e, const thx_entry *like, const thx_recorder *r, PyObject *sizes, bool trusting) {
    comparison k;
    thx_sizes *z = begin_comparison(&k, e, like, r, sizes, trusting);
    if (!z) return -1;
    const char *why = e->expected               ? "values of tensors steer the program"
                      : e->gradient             ? "the program computes gradients"
                      : acts_outside(e->main.t) ? "the program acts outside of tensors"
                                                : NULL;
    /* Where a kernel fails, eager has changed Python state before and tensors in between: only what writes at its end,
     * as functionalize makes it, can leave the rest to eager. */
    if (!why && (e->effects.count || e->nwrites) && runs_once(e->main.t))
        why = "the program writes to its inputs or draws random numbers, and changes Python state";
    bool same = !why && same_program(&k) && note_varying(z, like->captured, e->captured, e->main.t) == 0;
    if (same && runs_once(e->main.t)) {
        same = make_dry(x, z, r, &k, e->main.t) == 1;
        if (!same)
            why = "the program writes to its inputs or draws random numbers, and some operation that sizes change "
                  "has no rule";
    }
    PyMem_Free(k.slots);
    if (same) {
        e->main.literals.sizes = z;
        return free_all_ints(e);
    }
    thx_sizes_free(z);
    const th_op *op = k.at ? &e->captured->ops[k.at] : NULL;
    if (PyErr_Occurred()) return -1;
    if (why || !op)
        PyErr_SetString(x->SizesChanged, why ? why : "the program is another one for other sizes");
    else
        PyErr_Format(x->SizesChanged, "the program is another one for other sizes, from %s, line %u, on",
                     op->file ? th_str_get(x->ctx, op->file) : "?", (unsigned)op->line);
    return -1;
}
