/* Numbers that change from call to call, such as a learning rate.
 *
 * The second capture for arguments that differ in floats alone follows them: they are Numbers (thunder/_numbers.py),
 * which write down what is computed of them, and a literal of the trace knows which of them it is. Then the two final
 * programs are compared. When they are the same but for such literals, these become slots that every call fills:
 *
 *     lr = 0.1                                          lr = 0.05
 *     t0 = torch.Tensor.mul(g, -0.1)                    t0 = torch.Tensor.mul(g, -0.05)       ->  -a0
 *
 * Floats that the callable reads of attributes, dictionaries and variables go the same way: these hold Numbers while it
 * is captured. A number whose value was looked at (compared, rounded, printed) stays a constant; one that the program
 * has no use for may be any.
 *
 * Where gradients are computed, those literals that operations add, subtract, multiply or divide by may be slots: no
 * derivative looks at these. A run keeps the values for its backward.
 */
#include "callable.h"

#include "region.h"

#include "ir/ir.h"

#include <string.h>

enum { MAX_TRIES = 16, MAX_LITERALS = 128 };

/* ---- arguments ---- */

static void count_floats(thx_spec *s, uint32_t *n) {
    if (s->kind == THX_S_OBJECT && s->original) return; /* passed on as it is */
    if (s->kind == THX_S_CONST && s->type == &PyFloat_Type) s->number = ++*n;
    for (uint32_t i = 0; i < s->nkids; i++) count_floats(&s->kids[i], n);
}

static void forget_floats(thx_spec *s) {
    s->number = 0;
    for (uint32_t i = 0; i < s->nkids; i++) forget_floats(&s->kids[i]);
}

static bool alike_calls(const thx_entry *a, const thx_entry *b, uint32_t *differences) {
    return !a->eager && !a->dead && !a->expected && !a->effects.count &&
           thx_calls_alike(a, b, THX_ALIKE_NUMBERS, differences);
}

PyObject *thx_tape_new(thx *x) {
    PyObject *module = PyImport_ImportModule("thunder._numbers"), *tape = NULL;
    if (module && !x->number_type) x->number_type = (PyTypeObject *)PyObject_GetAttrString(module, "Number");
    if (module && x->number_type) tape = PyObject_CallMethod(module, "Tape", NULL);
    Py_XDECREF(module);
    return tape;
}

/* Is it the entry of the same call but for values of floats? Then e knows the places of those that are no arguments. 1,
 * 0, -1. */
static int serves_other_floats(thx *x, thx_entry *e, const thx_entry *a, uint32_t floats) {
    uint32_t differences = 0;
    if (!alike_calls(a, e, &differences)) return 0;
    PyObject *changed = PyList_New(0);
    int holds = changed ? thx_guards_check_but(x, a->guards, &PyFloat_Type, changed) : -1;
    if (holds == 1 && !differences && !PyList_GET_SIZE(changed)) holds = 0;
    if (holds == 1 && thx_places_take(e, a, changed) < 0) holds = -1;
    Py_XDECREF(changed);
    if (holds == 1 && floats + e->nplaces <= THX_MAX_NUMBERS) return 1;
    thx_places_free(e);
    return holds < 0 ? -1 : 0;
}

int thx_numbers_begin(thx_callable_object *c, thx_entry *e, thx_entry **like) {
    uint32_t n = 0;
    *like = NULL;
    for (uint32_t i = 0; i < e->nargs; i++) count_floats(&e->args[i], &n);
    uint64_t changes = c->changes;
    thx_entry *a = n <= THX_MAX_NUMBERS && c->generalised < MAX_TRIES ? c->entries : NULL;
    while (a && !*like && c->changes == changes) {
        thx_entry *next = a->next;
        a->running++; /* the caller lets go of the one that is found */
        int holds = serves_other_floats(c->x, e, a, n);
        if (holds == 1)
            *like = a;
        else
            thx_entry_leave(c, a);
        if (holds < 0) return -1;
        a = next;
    }
    if (!*like) {
        for (uint32_t i = 0; i < e->nargs; i++) forget_floats(&e->args[i]);
        return 0;
    }
    e->nfloats = n;
    c->generalised++;
    return (c->x->tape = thx_tape_new(c->x)) ? 0 : -1;
}

/* ---- comparing two programs ---- */

typedef struct literal {
    double before, now;
    int number; /* of the tape; -1: none */
} literal;

typedef struct comparison {
    const th_trace *a, *b;
    literal found[MAX_LITERALS]; /* different ones: a learning rate may be in hundreds of operations */
    uint32_t count;
    th_opref at;
    bool narrow, special; /* some operation does not take any literal; some literal is one that passes know */
} comparison;

static bool same_value(void *user, th_val a, th_val b) {
    const comparison *k = user;
    return a == b && k->a->values[a].type == k->b->values[b].type && k->a->values[a].alias == k->b->values[b].alias;
}

static bool same_node(comparison *k, th_node a, th_node b) {
    return th__nodes_match(&(th__match){k->a, k->b, same_value, k}, a, b);
}

/* Is a number of the tape somewhere inside? */
static bool holds_number(const th_trace *t, th_node n) {
    const th_node_data *d = &t->nodes[n];
    bool found = d->kind == TH_N_FLOAT && d->f2 > 0;
    if (d->kind < TH_N_TUPLE || d->kind > TH_N_SLICE) return found;
    for (uint32_t i = 0; i < d->count && !found; i++) found = holds_number(t, t->kids[d->u.kids + i]);
    return found;
}

bool thx_op_holds_number(const th_trace *t, const th_op *op) {
    return holds_number(t, op->args) || (op->kwargs && holds_number(t, op->kwargs));
}

static bool takes_any_literal(const th_trace *t, const th_op *op);

/* Passes and derivatives treat these in ways of their own. */
static bool is_special(double value) { return value == 0 || value == 1 || value == -1; }

static bool is_found(const comparison *k, const literal *l) {
    bool found = false;
    for (uint32_t i = 0; i < k->count && l->number >= 0 && !found; i++)
        found = k->found[i].number == l->number && memcmp(&k->found[i].before, &l->before, sizeof l->before) == 0;
    return found;
}

/* An argument itself, which may be a number of the tape, or a literal that differs. */
static bool same_argument(comparison *k, th_node na, th_node nb) {
    const th_node_data *a = &k->a->nodes[na], *b = &k->b->nodes[nb];
    bool floats = a->kind == TH_N_FLOAT && b->kind == TH_N_FLOAT, number = holds_number(k->b, nb);
    if (!floats) return !number && same_node(k, na, nb);
    if (!number && same_node(k, na, nb)) return true;
    const th_op *op = &k->b->ops[k->at];
    if (!op->callee_opaque && strstr(th_str_get(k->b->ctx, op->callee), "range"))
        return false; /* numbers make the shapes of ranges */
    const literal l = {a->u.f, b->u.f, (int)b->f2 - 1};
    k->narrow |= !takes_any_literal(k->b, op);
    k->special |= is_special(l.before) || is_special(l.now);
    if (is_found(k, &l)) return true;
    if (k->count == MAX_LITERALS) return false;
    k->found[k->count++] = l;
    return true;
}

static bool same_arguments(comparison *k, const th_op *a, const th_op *b) {
    const th_node_data *pa = &k->a->nodes[a->args], *pb = &k->b->nodes[b->args];
    uint32_t n = pa->count, la = pa->u.kids, lb = pb->u.kids;
    if (n != pb->count) return false;
    for (uint32_t i = 0; i < n; i++)
        if (!same_argument(k, k->a->kids[la + i], k->b->kids[lb + i])) return false;
    if (!a->kwargs || !b->kwargs) return !a->kwargs && !b->kwargs;
    uint32_t m = k->a->nodes[a->kwargs].count;
    la = k->a->nodes[a->kwargs].u.kids, lb = k->b->nodes[b->kwargs].u.kids;
    if (m != k->b->nodes[b->kwargs].count) return false;
    for (uint32_t i = 0; i + 1 < m; i += 2) {
        if (!same_node(k, k->a->kids[la + i], k->b->kids[lb + i]) ||
            !same_argument(k, k->a->kids[la + i + 1], k->b->kids[lb + i + 1]))
            return false;
    }
    return true;
}

static bool same_op(comparison *k, th_opref o) {
    const th_op *a = &k->a->ops[o], *b = &k->b->ops[o];
    k->at = o;
    const th__match m = {k->a, k->b, same_value, k};
    if (!th__callees_match(&m, a, b) || a->kind != b->kind || a->effects != b->effects || a->marks != b->marks ||
        a->nwrites != b->nwrites || a->outs_list != b->outs_list)
        return false;
    for (uint32_t i = 0; i < a->nwrites; i++)
        if (k->a->kids[a->writes + i] != k->b->kids[b->writes + i]) return false;
    return same_arguments(k, a, b) && same_node(k, a->outs, b->outs);
}

static bool same_program(comparison *k, const th_trace *a, const th_trace *b) {
    k->a = a;
    k->b = b;
    bool same = a->nops == b->nops && a->ninputs == b->ninputs;
    for (uint32_t i = 0; i < a->ninputs && same; i++)
        same = a->inputs[i] == b->inputs[i] && a->values[a->inputs[i]].type == b->values[b->inputs[i]].type;
    for (th_opref o = 1; o < a->nops && same; o++) same = same_op(k, o);
    return same && same_node(k, a->result, b->result);
}

/* Operations whose derivatives take a literal as it is, and whose kernels do the same for any. */
static bool takes_any_literal(const th_trace *t, const th_op *op) {
    static const char *const names[] = {
        "add",         "sub",          "rsub",    "mul",       "div",   "true_divide", "__rsub__",
        "__rdiv__",    "__rtruediv__", "addcmul", "addcdiv",   "clamp", "clamp_min",   "clamp_max",
        "leaky_relu",  "ge",           "gt",      "le",        "lt",    "eq",          "ne",
        "masked_fill", "where",        "full",    "full_like", "fill",  NULL};
    const char *callee = th_str_get(t->ctx, op->callee_opaque ? t->opaques[op->callee_opaque].name : op->callee);
    const char *name = strrchr(callee, '.');
    size_t n = name ? strlen(++name) : 0;
    if (n > 1 && name[n - 1] == '_' && name[n - 2] != '_') n--; /* in place */
    for (int i = 0; n && names[i]; i++)
        if (strlen(names[i]) == n && strncmp(name, names[i], n) == 0) return true;
    return false;
}

static thx_region *region_of(thx *x, const th_trace *t, th_opref o) {
    PyObject *callee = t->ops[o].callee_opaque ? t->opaques[t->ops[o].callee_opaque].object : NULL;
    return callee && Py_TYPE(callee) == x->Region ? (thx_region *)callee : NULL;
}

static bool has_regions(thx *x, const th_trace *t) {
    bool found = false;
    for (th_opref o = 1; t && o < t->nops && !found; o++) found = region_of(x, t, o) != NULL;
    return found;
}

/* Numbers inside are what the executor made its code for. */
static bool regions_hold_numbers(thx *x, const th_trace *t) {
    bool found = false;
    for (th_opref o = 1; t && o < t->nops && !found; o++) {
        const thx_region *r = region_of(x, t, o);
        const th_trace *body = r ? r->reference.t : NULL;
        for (th_opref p = 1; body && p < body->nops && !found; p++)
            found = body->ops[p].kind == TH_OP_CALL && thx_op_holds_number(body, &body->ops[p]);
    }
    return found;
}

static const th_trace *backward_of(const thx_entry *e) { return e->gradient ? e->gradient->backward.t : NULL; }

/* Regions are objects of their own in each program, so programs that have some are compared as they were captured. */
static bool same_but_for_regions(thx *x, comparison *k, const thx_entry *a, const thx_entry *b) {
    if (!same_program(k, a->captured, b->captured)) return false;
    return !k->count || (!k->special && !k->narrow && !regions_hold_numbers(x, b->main.t) &&
                         !regions_hold_numbers(x, backward_of(b)));
}

/* As they were captured, and all that was made of that. The literals are those of the latter. */
static bool same_gradients(comparison *k, const thx_entry *a, const thx_entry *b) {
    if (!same_program(k, a->captured, b->captured)) return false;
    if (!k->count) return true; /* what is made of it has none either */
    if (k->narrow) return false;
    k->count = 0;
    const thx_gradient *g = a->gradient, *h = b->gradient;
    return same_program(k, a->main.t, b->main.t) && same_program(k, g->backward.t, h->backward.t) &&
           same_program(k, g->again.t, h->again.t);
}

static bool same_entries(thx *x, comparison *k, const thx_entry *a, const thx_entry *b) {
    bool claimed = has_regions(x, a->main.t) || has_regions(x, b->main.t) || has_regions(x, backward_of(a)) ||
                   has_regions(x, backward_of(b));
    return claimed       ? same_but_for_regions(x, k, a, b)
           : b->gradient ? same_gradients(k, a, b)
                         : same_program(k, a->main.t, b->main.t);
}

/* Inputs that are no arguments: the same parameters and buffers, and constants that are equal. */
static bool same_roots(thx *x, const thx_entry *a, const thx_entry *b) {
    bool same = a->nroots == b->nroots;
    for (uint32_t i = 0; i < a->nroots && same; i++) {
        same = a->root_leaf[i] == b->root_leaf[i];
        PyObject *p = a->roots[i].object, *q = b->roots[i].object;
        if (!same || a->root_leaf[i] >= 0 || p == q) continue;
        PyObject *pair[] = {NULL, p, q};
        PyObject *equal = PyObject_Vectorcall(x->equal, pair + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        same = equal == Py_True;
        PyErr_Clear();
        Py_XDECREF(equal);
    }
    return same;
}

static bool same_result(const thx_spec *a, const thx_spec *b) {
    uint32_t differences = 0;
    return thx_specs_alike(a, b, THX_ALIKE_NUMBERS, &differences) && !differences;
}

static bool same_writes(const thx_entry *a, const thx_entry *b) {
    bool same = a->nwrites == b->nwrites;
    for (uint32_t i = 0; i < a->nwrites && same; i++) {
        const thx_write *p = &a->writes[i], *q = &b->writes[i];
        same = p->dict == q->dict && thx_same_object(p->key, q->key, false) && !p->constant == !q->constant &&
               (!p->constant || thx_same_object(p->constant, q->constant, false));
    }
    return same;
}

/* ---- making slots of literals ---- */

/* The values that the other entry's arguments had where this one's are followed. */
static int former_floats(const thx_spec *a, const thx_spec *b, PyObject *list) {
    int rc = b->number ? PyList_Append(list, a->object) : 0;
    for (uint32_t i = 0; i < b->nkids && rc == 0; i++) rc = former_floats(&a->kids[i], &b->kids[i], list);
    return rc;
}

/* Floats that may be any from here on; bit by place. */
static uint32_t free_arguments(thx_spec *s, PyObject *free) {
    uint32_t bits = 0;
    if (s->number) {
        PyObject *place = PyLong_FromUnsignedLong(s->number - 1);
        s->leaf = s->number - 1;
        if (place && PySet_Contains(free, place) == 1) {
            s->kind = THX_S_NUMBER;
            bits = UINT32_C(1) << s->leaf;
        }
        Py_XDECREF(place);
    }
    s->number = 0;
    for (uint32_t i = 0; i < s->nkids; i++) bits |= free_arguments(&s->kids[i], free);
    return bits;
}

/* The others are ints that the other program has no use for. */
static bool is_float(const thx_place *p) { return PyFloat_CheckExact(p->value); }

static int former_places(const thx_entry *e, PyObject *list) {
    int rc = list ? 0 : -1;
    for (uint32_t i = 0; i < e->nplaces && rc == 0; i++)
        if (is_float(&e->places[i])) rc = PyList_Append(list, e->places[i].value);
    return rc;
}

/* What followed floats were in the other capture: a tuple. */
static PyObject *all_former_floats(const thx_entry *e, const thx_entry *like) {
    PyObject *before = PyList_New(0);
    int rc = before ? 0 : -1;
    for (uint32_t i = 0; i < e->nargs && rc == 0; i++) rc = former_floats(&like->args[i], &e->args[i], before);
    if (rc == 0) rc = former_places(e, before);
    PyObject *tuple = rc == 0 ? PyList_AsTuple(before) : NULL;
    Py_XDECREF(before);
    return tuple;
}

/* Of the floats that are followed, those that may already be any in the other program: a frozenset. */
static PyObject *known_floats(const thx_entry *e, const thx_entry *like) {
    PyObject *known = PySet_New(NULL);
    int rc = known ? 0 : -1;
    for (uint32_t i = 0, at = 0; i < e->nfloats + e->nplaces && rc == 0; i++) {
        const thx_place *place = i < e->nfloats ? NULL : &e->places[i - e->nfloats];
        if (place && !is_float(place)) continue;
        uint32_t tape_place = at++;
        bool any = !place && like->nfloats == e->nfloats && like->free_floats >> i & 1;
        for (uint32_t k = 0; place && k < like->nplaces && !any; k++)
            any = like->places[k].any && like->places[k].owner == place->owner &&
                  PyObject_RichCompareBool(like->places[k].key, place->key, Py_EQ) == 1;
        PyObject *number = any ? PyLong_FromUnsignedLong(tape_place) : NULL;
        if (any) rc = number ? PySet_Add(known, number) : -1;
        Py_XDECREF(number);
    }
    PyObject *frozen = rc == 0 ? PyFrozenSet_New(known) : NULL;
    Py_XDECREF(known);
    return frozen;
}

static PyObject *unseen_floats(const thx_entry *e, const thx_entry *like, PyObject *tape) {
    PyObject *before = all_former_floats(e, like), *known = before ? known_floats(e, like) : NULL;
    PyObject *free = known ? PyObject_CallMethod(tape, "unseen", "OO", before, known) : NULL;
    Py_XDECREF(before);
    Py_XDECREF(known);
    return free;
}

static PyObject *ask_tape(const thx_entry *e, const thx_entry *like, PyObject *tape, const comparison *k) {
    PyObject *before = all_former_floats(e, like), *known = before ? known_floats(e, like) : NULL;
    PyObject *pairs = known ? PyList_New(k->count) : NULL, *answer = NULL;
    int rc = pairs ? 0 : -1;
    for (uint32_t i = 0; i < k->count && rc == 0; i++) {
        PyObject *pair = Py_BuildValue("(di)", k->found[i].before, k->found[i].number);
        if (pair)
            PyList_SET_ITEM(pairs, i, pair);
        else
            rc = -1;
    }
    if (rc == 0) answer = PyObject_CallMethod(tape, "formula", "OOO", before, pairs, known);
    Py_XDECREF(pairs);
    Py_XDECREF(known);
    Py_XDECREF(before);
    return answer;
}

/* Floats that are no arguments: those that the program is a function of may be any from here on. */
static int free_places(thx_entry *e, PyObject *free) {
    for (uint32_t i = 0, at = e->nfloats; i < e->nplaces; i++) {
        thx_place *p = &e->places[i];
        if (!is_float(p)) {
            p->any = true;
            continue;
        }
        PyObject *number = PyLong_FromUnsignedLong(at++);
        p->any = number && PySet_Contains(free, number) == 1;
        Py_XDECREF(number);
    }
    return thx_places_keep(e);
}

/* A program with other literals than it was lowered with. */
static int lower_anew(thx *x, thx_program *p) {
    bool checked = p->checked;
    if (thx_program_lower(x, p, false) < 0) return -1;
    p->checked &= checked;
    return 0;
}

static int take_numbers(thx *x, thx_entry *e, const comparison *k) {
    int32_t numbers[MAX_LITERALS];
    thx_gradient *g = e->gradient;
    for (uint32_t i = 0; i < k->count; i++) numbers[i] = k->found[i].number;
    if (thx_literals_find(numbers, k->count, &e->main) < 0) return -1;
    if (!g) return 0;
    if (!(g->numbers = PyMem_Calloc(k->count + 1, sizeof *g->numbers))) return PyErr_NoMemory(), -1;
    memcpy(g->numbers, numbers, k->count * sizeof *numbers);
    g->nnumbers = k->count;
    return thx_literals_find(numbers, k->count, &g->backward) < 0 ? -1 : lower_anew(x, &g->backward);
}

/* The literals of an operation, each a number of the tape; without `numbers` they are counted. */
static uint32_t literals_of(const th_trace *t, th_opref o, const int32_t *numbers, uint32_t n, thx_literals *l) {
    const th_op *op = &t->ops[o];
    uint32_t nargs = t->nodes[op->args].count, nkw = op->kwargs ? t->nodes[op->kwargs].count / 2 : 0, count = 0;
    for (uint32_t i = 0; i < nargs + nkw; i++) {
        uint32_t kid = i < nargs ? t->nodes[op->args].u.kids + i : t->nodes[op->kwargs].u.kids + 2 * (i - nargs) + 1;
        const th_node_data *d = &t->nodes[t->kids[kid]];
        if (d->kind != TH_N_FLOAT || d->f2 <= 0) continue;
        thx_number place = {o, i, 0};
        while (numbers && place.from < n && numbers[place.from] != (int32_t)d->f2 - 1) place.from++;
        if (numbers && place.from < n) l->numbers[l->nnumbers++] = place;
        count++;
    }
    return count;
}

int thx_literals_find(const int32_t *numbers, uint32_t n, thx_program *p) {
    uint32_t count = 0;
    thx_literals *l = &p->literals;
    if (!n) return 0;
    for (th_opref o = 1; o < p->t->nops; o++)
        if (p->t->ops[o].kind == TH_OP_CALL) count += literals_of(p->t, o, NULL, 0, NULL);
    PyMem_Free(l->numbers);
    l->nnumbers = 0;
    if (!(l->numbers = PyMem_Calloc(count + 1, sizeof *l->numbers))) return PyErr_NoMemory(), -1;
    for (th_opref o = 1; o < p->t->nops; o++)
        if (p->t->ops[o].kind == TH_OP_CALL) literals_of(p->t, o, numbers, n, l);
    if (l->nnumbers == count) return 0;
    return PyErr_Format(PyExc_SystemError, "a literal that is none of the program's numbers"), -1;
}

/* What calls of these numbers must answer as this one did. 0: the former capture's numbers would not: it is another
 * program that looks the same. */
static int take_conditions(thx_entry *e, const thx_entry *like, PyObject *tape, PyObject *free) {
    PyObject *holds = PyObject_CallMethod(tape, "holds", "O", free), *before = NULL, *answer = NULL;
    if (holds && holds != Py_None && (before = all_former_floats(e, like))) answer = PyObject_CallObject(holds, before);
    int rc = holds == Py_None ? 1 : !answer ? -1 : answer == Py_True;
    if (rc < 0 && PyErr_ExceptionMatches(PyExc_ArithmeticError)) PyErr_Clear(), rc = 0;
    if (rc == 1 && holds != Py_None) Py_XSETREF(e->conditions, Py_NewRef(holds));
    Py_XDECREF(answer);
    Py_XDECREF(before);
    Py_XDECREF(holds);
    return rc;
}

static int take_formula(thx *x, thx_entry *e, const comparison *k, PyObject *answer) {
    if (take_numbers(x, e, k) < 0) return -1;
    e->formula = Py_NewRef(PyTuple_GET_ITEM(answer, 0));
    for (uint32_t i = 0; i < e->nargs; i++) e->free_floats |= free_arguments(&e->args[i], PyTuple_GET_ITEM(answer, 1));
    if (free_places(e, PyTuple_GET_ITEM(answer, 1)) < 0) return -1;
    if (lower_anew(x, &e->main) < 0) return -1;
    e->placed = NULL;
    return thx_entry_place(x, e);
}

/* The programs are the same, literals included: what was not looked at, and changed, may be any. */
static int free_unused(thx_entry *e, const thx_entry *like, PyObject *tape) {
    PyObject *free = unseen_floats(e, like, tape);
    int rc = !free ? -1 : PySet_GET_SIZE(free) > 0;
    if (rc == 1) rc = take_conditions(e, like, tape, free);
    if (rc == 1) {
        for (uint32_t i = 0; i < e->nargs; i++) e->free_floats |= free_arguments(&e->args[i], free);
        if (free_places(e, free) < 0) rc = -1;
    }
    Py_XDECREF(free);
    return rc;
}

/* Does the entry serve all calls that the other one does? */
static bool covers(const thx_entry *e, const thx_entry *like) {
    bool all = (like->free_floats & ~e->free_floats) == 0;
    for (uint32_t i = 0; i < like->nplaces && all; i++) {
        bool found = !like->places[i].any;
        for (uint32_t k = 0; k < e->nplaces && !found; k++)
            found = e->places[k].any && e->places[k].owner == like->places[i].owner &&
                    PyObject_RichCompareBool(e->places[k].key, like->places[i].key, Py_EQ) == 1;
        all = found;
    }
    return all;
}

int thx_numbers_end(thx *x, thx_entry *e, const thx_entry *like, PyObject *tape) {
    comparison k = {.count = 0};
    bool same = !e->gradient == !like->gradient && !e->ask_in_backward && !e->expected && !e->effects.count &&
                same_writes(like, e) && same_result(&like->result, &e->result) && same_roots(x, like, e) &&
                same_entries(x, &k, like, e);
    int rc = 0;
    if (same && k.count) {
        PyObject *answer = ask_tape(e, like, tape, &k);
        rc = !answer ? -1 : answer == Py_None ? 0 : take_conditions(e, like, tape, PyTuple_GET_ITEM(answer, 1));
        if (rc == 1 && take_formula(x, e, &k, answer) < 0) rc = -1;
        Py_XDECREF(answer);
    } else if (same) {
        rc = free_unused(e, like, tape);
    }
    if (rc == 0) {
        for (uint32_t i = 0; i < e->nargs; i++) forget_floats(&e->args[i]);
        thx_places_free(e);
    }
    return rc == 1 && !covers(e, like) ? 2 : rc;
}

int thx_floats_unseen(const thx_entry *e, const thx_entry *like, PyObject *tape) {
    comparison k = {.count = 0};
    if (!same_writes(like, e) || !same_result(&like->result, &e->result) ||
        !same_program(&k, like->captured, e->captured) || k.count)
        return 0;
    PyObject *fixed = PyObject_GetAttrString(tape, "fixed"), *compared = PyObject_GetAttrString(tape, "conditions");
    int unseen = fixed && compared ? !PySet_GET_SIZE(fixed) && !PyDict_GET_SIZE(compared) : -1;
    Py_XDECREF(compared);
    Py_XDECREF(fixed);
    return unseen;
}

int thx_number_place(thx *x, PyObject *number) {
    PyObject *tape = PyObject_GetAttrString(number, "_tape"), *place = PyObject_GetAttrString(number, "_place");
    bool mine = tape && x->active && tape == ((thx_recorder *)x->active)->tape;
    long found = mine && place ? PyLong_AsLong(place) : -1;
    PyErr_Clear();
    Py_XDECREF(tape);
    Py_XDECREF(place);
    return (int)found;
}

int thx_numbers_folded(const thx_recorder *r, const th_trace *t, th_node n) {
    const th_node_data *d = &t->nodes[n];
    if (!r->tape) return 0;
    for (uint32_t i = 0; i < d->count; i++)
        if (thx_numbers_folded(r, t, t->kids[d->u.kids + i]) < 0) return -1;
    if (d->kind != TH_N_FLOAT || d->f2 < 1) return 0;
    PyObject *done = PyObject_CallMethod(r->tape, "folded", "i", (int)d->f2 - 1);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* ---- running ---- */

static PyObject *call_with_numbers(const thx_entry *e, const thx_leaves *leaves, PyObject *function) {
    PyObject *floats[THX_MAX_NUMBERS];
    uint32_t n = e->nfloats;
    for (uint32_t i = 0; i < e->nfloats; i++) floats[i] = e->free_floats >> i & 1 ? leaves->numbers[i] : Py_None;
    for (uint32_t i = 0; i < e->nplaces; i++) {
        if (!is_float(&e->places[i])) continue;
        PyObject *now = e->places[i].any ? thx_number_at(e->places[i].owner, e->places[i].key) : Py_None;
        if (!now || (e->places[i].any && !PyFloat_CheckExact(now)))
            return PyErr_Format(PyExc_RuntimeError, "a float that the program reads is gone");
        floats[n++] = now;
    }
    return PyObject_Vectorcall(function, floats, n, NULL);
}

PyObject *thx_numbers_values(const thx_entry *e, const thx_leaves *leaves) {
    return call_with_numbers(e, leaves, e->formula);
}

int thx_numbers_hold(const thx_entry *e, const thx_leaves *leaves) {
    PyObject *answer = e->conditions ? call_with_numbers(e, leaves, e->conditions) : NULL;
    if (!e->conditions) return 1;
    int holds = !answer ? -1 : answer == Py_True;
    if (holds < 0 && PyErr_ExceptionMatches(PyExc_ArithmeticError)) PyErr_Clear(), holds = 0;
    Py_XDECREF(answer);
    return holds;
}
