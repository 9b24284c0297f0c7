/* Programs for any sizes at work: numbers are computed as sizes become known, conditions are checked, what does not
 * vary runs as in any program. See sizes.c.
 */
#include "callable.h"
#include "program.h"

#include "base/hash.h"
#include "ir/ir.h"

#include <string.h>

/* ---- marks in the trace ---- */

int thx_mark_kind(const th_trace *t, const th_op *op) {
    if (op->kind != TH_OP_CALL || op->callee_opaque || !(op->effects & TH_FX_STATE)) return 0;
    const char *callee = th_str_get(t->ctx, op->callee);
    return strcmp(callee, THX_EXTENT_CALLEE) == 0   ? THX_MARK_SIZE
           : strcmp(callee, THX_FIXED_CALLEE) == 0  ? THX_MARK_FIXED
           : strcmp(callee, THX_LAYOUT_CALLEE) == 0 ? THX_MARK_LAYOUT
           : strcmp(callee, THX_COPIED_CALLEE) == 0 ? THX_MARK_COPIED
                                                    : 0;
}

const th_node_data *thx_mark_argument(const th_trace *t, const th_op *op, uint32_t i) {
    return &t->nodes[t->kids[t->nodes[op->args].u.kids + i]];
}

/* ---- computing ---- */

static bool divides(int64_t a, int64_t b) { return b != 0 && (b != -1 || a != INT64_MIN); }
static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

/* A term that is no size, of those before. False: it has no value, or is a condition that does not hold. */
bool thx_term_compute(const thx_sizes *z, uint32_t i, th_slot *slots) {
    const thx_term *term = &z->terms[i];
    int64_t a = term->of_a ? thx_in_slot(slots, (uint32_t)term->a) : term->a, out = 0;
    int64_t b = term->of_b ? thx_in_slot(slots, (uint32_t)term->b) : term->b;
    bool fails = false;
    switch (term->op) {
    case THX_T_ADD: fails = __builtin_add_overflow(a, b, &out); break;
    case THX_T_SUB: fails = __builtin_sub_overflow(a, b, &out); break;
    case THX_T_MUL: fails = __builtin_mul_overflow(a, b, &out); break;
    case THX_T_FLOORDIV: fails = !divides(a, b) || (out = floor_divide(a, b), false); break;
    case THX_T_MOD: fails = !divides(a, b) || (out = a - floor_divide(a, b) * b, false); break;
    case THX_T_NEG: fails = __builtin_sub_overflow(0, a, &out); break;
    case THX_T_ABS: fails = a < 0 ? __builtin_sub_overflow(0, a, &out) : (out = a, false); break;
    case THX_T_LT: out = a < b; break;
    case THX_T_LE: out = a <= b; break;
    case THX_T_GT: out = a > b; break;
    case THX_T_GE: out = a >= b; break;
    case THX_T_EQ: out = a == b; break;
    default: out = a != b; break;
    }
    thx_into_slot(slots, i, out);
    return !fails && (!term->condition || (z->trusting && !term->of_int) || out == term->value);
}

/* Size number `i` is known: what follows from it, up to the next size. */
bool thx_term_follow(const thx_sizes *z, uint32_t i, int64_t size, th_slot *slots) {
    bool holds = true;
    thx_into_slot(slots, i, size);
    while (++i < z->count && z->terms[i].op != THX_T_SIZE && holds) holds = thx_term_compute(z, i, slots);
    return holds;
}

/* Would `contiguous` give the tensor itself? Strides of sizes 1 do not matter. */
static bool is_contiguous(const th_type *t) {
    int64_t stride = 1, n = th_type_numel(t);
    bool fits = true;
    for (uint32_t d = t->ndim; d-- > 0 && n && fits;) {
        fits = t->shape[d] == 1 || t->stride[d] == stride;
        stride *= t->shape[d];
    }
    return fits;
}

bool thx_mark_holds(const th_trace *t, const th_op *op, int kind, const th_type *type, const thx_sizes *z,
                    th_slot *slots) {
    if (kind == THX_MARK_LAYOUT || kind == THX_MARK_COPIED) return is_contiguous(type) == (kind == THX_MARK_LAYOUT);
    int64_t d = thx_mark_argument(t, op, 1)->u.i;
    if (kind == THX_MARK_SIZE)
        return d < type->ndim && thx_term_follow(z, (uint32_t)thx_mark_argument(t, op, 2)->u.i, type->shape[d], slots);
    bool same = t->nodes[op->args].count == type->ndim + 1u;
    for (uint32_t i = 0; i < type->ndim && same; i++) {
        int64_t size = thx_mark_argument(t, op, 1 + i)->u.i;
        same = size < 0 || size == type->shape[i];
    }
    return same;
}

static int64_t size_of(thx *x, th_slot *slot, uint32_t d) { /* -1: it has no such dimension */
    int64_t ndim = 0, *sizes = NULL;
    if (x->abi.on) {
        th_h h = thx_slot_handle(x, slot);
        bool known = !x->abi.aoti_torch_get_dim(h, &ndim) && d < ndim && !x->abi.aoti_torch_get_sizes(h, &sizes);
        return known ? sizes[d] : -1;
    }
    PyObject *object = thx_slot_object(x, slot);
    PyObject *size = object ? PyObject_CallMethod(object, "size", "I", (unsigned)d) : NULL;
    int64_t value = size ? PyLong_AsLongLong(size) : -1;
    PyErr_Clear();
    Py_XDECREF(size);
    return value;
}

static int64_t rank_of(thx *x, th_slot *slot) { /* -1: it is no tensor */
    int64_t ndim = -1;
    if (x->abi.on) return x->abi.aoti_torch_get_dim(thx_slot_handle(x, slot), &ndim) ? -1 : ndim;
    PyObject *object = thx_slot_object(x, slot);
    PyObject *answer = object ? PyObject_CallMethod(object, "dim", NULL) : NULL;
    if (answer) ndim = PyLong_AsLongLong(answer);
    PyErr_Clear();
    Py_XDECREF(answer);
    return ndim;
}

static bool int_argument(const thx_entry *e, const thx_term *term, const thx_leaves *leaves, int64_t *value) {
    uint32_t i = (uint32_t)term->leaf;
    int overflow = 0;
    const thx_place *place = i < e->nfloats ? NULL : &e->places[i - e->nfloats];
    PyObject *number = place ? thx_number_at(place->owner, place->key) : leaves->numbers[i];
    if (!number || !PyLong_CheckExact(number)) return false;
    *value = PyLong_AsLongLongAndOverflow(number, &overflow);
    return !overflow;
}

bool thx_sizes_start(thx *x, const thx_entry *e, const thx_leaves *leaves, th_slot *slots) {
    const thx_sizes *z = e->main.literals.sizes;
    bool holds = true;
    int64_t value = 0;
    for (uint32_t i = 0; i < z->count && z->terms[i].op != THX_T_SIZE && holds; i++)
        if (z->terms[i].op == THX_T_ARGUMENT) {
            holds = int_argument(e, &z->terms[i], leaves, &value);
            thx_into_slot(slots, i, value);
        } else {
            holds = thx_term_compute(z, i, slots);
        }
    if (!holds) PyErr_SetString(x->SizesChanged, "the program does not hold for the numbers that it got");
    return holds;
}

static bool dry_run(thx *x, const thx_entry *e, const thx_leaves *leaves, th_slot *slots) {
    const thx_sizes *z = e->main.literals.sizes;
    const th_trace *t = e->main.t;
    th_typeref fixed[64] = {0}, *types = e->nroots <= 64 ? fixed : PyMem_Calloc(e->nroots, sizeof *types);
    bool known = types != NULL;
    for (uint32_t i = 0; i < e->nroots && known; i++) {
        thx_meta meta;
        if (e->root_leaf[i] < 0 || !z->varies[t->inputs[i]]) continue;
        known = thx_read_meta(x, leaves->items[e->root_leaf[i]], false, &meta) == 0 &&
                (types[i] = thx_meta_type(x, &meta)) != 0;
        if (known) types[i] = th_type_set_grad(x->ctx, types[i], false);
    }
    PyErr_Clear();
    known = known && thx_dry_run(x, z->dry, z, types, slots);
    if (types != fixed) PyMem_Free(types);
    return known;
}

bool thx_sizes_hold(thx *x, const thx_entry *e, const thx_leaves *leaves) {
    const thx_sizes *z = e->main.literals.sizes;
    th_slot fixed[64], *slots = z->count <= 64 ? fixed : PyMem_Malloc(sizeof *slots * z->count);
    bool holds = slots != NULL;
    int64_t value = 0;
    for (uint32_t i = 0; i < z->count && holds; i++) {
        const thx_term *term = &z->terms[i];
        if (!term->early) continue;
        if (term->op == THX_T_ARGUMENT) {
            holds = int_argument(e, term, leaves, &value);
            thx_into_slot(slots, i, value);
        } else if (term->op == THX_T_SIZE)
            thx_into_slot(slots, i, size_of(x, &(th_slot){.object = leaves->items[term->leaf]}, (uint32_t)term->b));
        else
            holds = thx_term_compute(z, i, slots);
    }
    if (holds && z->dry) holds = dry_run(x, e, leaves, slots);
    if (slots != fixed) PyMem_Free(slots);
    return holds;
}

/* Programs for very sizes know more: they run on our own kernels where tensors are small. So one is made for sizes that
 * recur, for a few at most. */
bool thx_sizes_recur(thx *x, thx_entry *e, const thx_leaves *leaves) {
    enum { CALLS = 16, MAX_EXACT = 8 };
    uint64_t hash = 1;
    if (!x->abi.on || e->exact >= MAX_EXACT) return false;
    for (uint32_t i = 0; i < leaves->count; i++) {
        int64_t ndim = 0, *sizes = NULL;
        th_h h = thx_borrow(&x->abi, leaves->items[i]);
        if (x->abi.aoti_torch_get_dim(h, &ndim) || x->abi.aoti_torch_get_sizes(h, &sizes)) return false;
        for (int64_t d = 0; d < ndim; d++) hash = th__hash_mix(hash, (uint64_t)sizes[d]);
    }
    for (uint32_t i = 0; i < e->main.literals.sizes->count; i++)
        if (e->main.literals.sizes->terms[i].op == THX_T_ARGUMENT) {
            int64_t value = 0;
            (void)int_argument(e, &e->main.literals.sizes->terms[i], leaves, &value);
            hash = th__hash_mix(hash, (uint64_t)value);
        }
    uint32_t at = 0;
    while (at < THX_RECENT - 1 && e->recent[at].hash != hash) at++;
    thx_recent found = e->recent[at].hash == hash ? e->recent[at] : (thx_recent){hash, 0};
    memmove(e->recent + 1, e->recent, sizeof *e->recent * at);
    found.calls = ++found.calls >= CALLS ? 0 : found.calls;
    e->recent[0] = found;
    e->exact += !found.calls;
    return !found.calls;
}

/* ---- plans ---- */

uint32_t thx_extent_slot(const thx_lowering *l, uint16_t number) {
    return l->t->ninputs + l->literals->nnumbers + number - 1;
}

typedef struct size_data {
    thx_instr_data head;
    const thx_sizes *sizes; /* borrowed: the entry's */
    uint32_t slot, first, ndim;
    int kind;
    int64_t numbers[]; /* of a size: dimension, place; of fixed ones: those, of which -1 may be any */
} size_data;

static int changed(const thx *x) {
    PyErr_SetString(x->SizesChanged, "the program does not hold for the sizes that it met");
    return -1;
}

static int run_size(th_frame *f, const th_instr *instr) {
    const size_data *s = instr->data;
    int64_t size = size_of(f->user, &f->slots[s->slot], (uint32_t)s->numbers[0]);
    if (size < 0 || !thx_term_follow(s->sizes, (uint32_t)s->numbers[1], size, f->slots + s->first))
        return changed(f->user);
    return 0;
}

static int run_fixed(th_frame *f, const th_instr *instr) {
    const size_data *s = instr->data;
    bool same = rank_of(f->user, &f->slots[s->slot]) == s->ndim;
    for (uint32_t d = 0; d < s->ndim && same; d++)
        same = s->numbers[d] < 0 || size_of(f->user, &f->slots[s->slot], d) == s->numbers[d];
    return same ? 0 : changed(f->user);
}

static int run_layout(th_frame *f, const th_instr *instr) {
    const size_data *s = instr->data;
    PyObject *object = thx_slot_object(f->user, &f->slots[s->slot]);
    PyObject *contiguous = object ? PyObject_CallMethod(object, "is_contiguous", NULL) : NULL;
    if (!contiguous) return -1;
    Py_DECREF(contiguous);
    return (contiguous == Py_True) == (s->kind == THX_MARK_LAYOUT) ? 0 : changed(f->user);
}

int thx_lower_size(thx_lowering *l, th_opref o) {
    const th_op *op = &l->t->ops[o];
    int kind = thx_mark_kind(l->t, op);
    if (!kind || !l->literals->sizes) return kind != 0;
    uint32_t n = l->t->nodes[op->args].count - 1;
    size_data *s = PyMem_Malloc(sizeof *s + sizeof(int64_t) * n);
    if (!s) return PyErr_NoMemory(), -1;
    s->head.free = PyMem_Free;
    s->sizes = l->literals->sizes;
    s->slot = thx_slot_for(l, thx_mark_argument(l->t, op, 0)->u.ref);
    s->first = thx_extent_slot(l, 1);
    s->ndim = n;
    s->kind = kind;
    for (uint32_t i = 0; i < n; i++) s->numbers[i] = thx_mark_argument(l->t, op, 1 + i)->u.i;
    th_instr_fn run = kind == THX_MARK_SIZE ? run_size : kind == THX_MARK_FIXED ? run_fixed : run_layout;
    return thx_check(l->x, th_plan_add(l->plan, run, s, o)) < 0 ? -1 : 1;
}

/* What does not vary is lowered as in any program, by what the trace states: where it comes from something that varies,
 * each run looks whether it is as stated. */
typedef struct variation {
    const thx_lowering *l;
    const th_trace *t;
    th_opref op;
    bool found;
    int rc;
} variation;

static void find_varying(void *user, th_val *v) {
    variation *s = user;
    s->found |= s->l->literals->sizes->varies[*v];
}

bool thx_is_steady(const thx_lowering *l, th_opref o) {
    if (!l->literals->sizes) return true;
    variation s = {.l = l};
    th_op_each_use((th_trace *)l->t, o, find_varying, &s);
    th_op_each_out((th_trace *)l->t, o, find_varying, &s);
    return !s.found && !th_node_has_extent(l->t, l->t->ops[o].args) && !th_node_has_extent(l->t, l->t->ops[o].kwargs);
}

typedef struct check_data {
    thx_instr_data head;
    uint32_t slot;
    th_typeref type;
    bool loose; /* sizes may be any */
} check_data;

static int run_check(th_frame *f, const th_instr *instr) {
    const check_data *c = instr->data;
    thx *x = f->user;
    const th_type *t = th_type_get(x->ctx, c->type);
    th_slot *slot = &f->slots[c->slot];
    int32_t dtype = -1;
    bool tensor = (slot->handle || slot->object) && t->kind == TH_TYPE_TENSOR, same = true;
    if (tensor && (c->loose || th_type_numel(t) == 0)) {
        same = rank_of(x, slot) == t->ndim;
        if (x->abi.on)
            same = same && !x->abi.aoti_torch_get_dtype(thx_slot_handle(x, slot), &dtype) &&
                   dtype == x->abi.scalar_types[t->dtype];
        for (uint32_t d = 0; d < t->ndim && same && !c->loose; d++) same = size_of(x, slot, d) == t->shape[d];
    }
    return same && (c->loose || !x->abi.on || thx_as_predicted(x, slot, t)) ? 0 : changed(x);
}

static void lower_check(void *user, th_val *v) {
    variation *s = user;
    thx_lowering *l = (thx_lowering *)s->l;
    bool varies = l->literals->sizes->varies[*v];
    if (s->rc < 0 || (varies && !s->found) || l->slots[*v] == UINT32_MAX) return;
    check_data *c = PyMem_Malloc(sizeof *c);
    if (!c) {
        PyErr_NoMemory();
        s->rc = -1;
        return;
    }
    *c = (check_data){{PyMem_Free}, l->slots[*v], l->t->values[*v].type, varies};
    s->rc = thx_check(l->x, th_plan_add(l->plan, run_check, c, s->op));
}

/* Sizes of 1, and ints, may decide how many dimensions a result has. */
static bool may_change_rank(const th_trace *t, const th_op *op) {
    const char *callee = op->callee_opaque ? "" : th_str_get(t->ctx, op->callee);
    return strstr(callee, "squeeze") || strstr(callee, "cov") || strstr(callee, "corrcoef") ||
           th_node_has_extent(t, op->args) || (op->kwargs && th_node_has_extent(t, op->kwargs));
}

int thx_lower_checks(thx_lowering *l, th_opref o) {
    variation s = {.l = l, .op = o, .found = may_change_rank(l->t, &l->t->ops[o])};
    if (l->literals->sizes && !thx_is_steady(l, o)) th_op_each_out((th_trace *)l->t, o, lower_check, &s);
    return s.rc;
}
