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
 * what is decided by values of tensors, leaves the program to its own sizes. So do programs that write to inputs or
 * draw random numbers, which could not begin anew, and those with gradients.
 */
#include "sizes.h"

#include "callable.h"
#include "observe.h"
#include "program.h"

#include "base/hash.h"
#include "ir/ir.h"
#include "passes/pass.h"

#include <string.h>

enum { SIZE, ARGUMENT, ADD, SUB, MUL, FLOORDIV, MOD, NEG, ABS, LT, LE, GT, GE, EQ, NE }; /* thunder._sizes.OPERATIONS */
enum { MAX_TRIES = 4 };

static const char extent_callee[] = "thunder._kernels.extent", fixed_callee[] = "thunder._kernels.expect_sizes";

/* ---- extents ---- */

PyObject *thx_sizes_new(thx *x) {
    PyObject *module = PyImport_ImportModule("thunder._sizes"), *sizes = NULL;
    if (module && !x->extent_type) x->extent_type = (PyTypeObject *)PyObject_GetAttrString(module, "Extent");
    if (module && x->extent_type) sizes = PyObject_CallMethod(module, "Sizes", NULL);
    Py_XDECREF(module);
    return sizes;
}

static int64_t number_attribute(PyObject *o, const char *name) { /* -1 with an exception */
    PyObject *number = PyObject_GetAttrString(o, name);
    int64_t value = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    return value;
}

PyObject *thx_extent_plain(PyObject *extent) { return PyObject_GetAttrString(extent, "value"); }

th_node thx_extent_node(thx *x, th_trace *t, PyObject *extent) {
    int64_t value = number_attribute(extent, "value"), place = number_attribute(extent, "place");
    if (PyErr_Occurred()) return 0;
    x->saw_extent = true;
    return th_node_extent(t, value, (uint16_t)(place + 1));
}

bool thx_holds_extent(thx *x, PyObject *tuple) {
    bool found = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple) && !found; i++)
        found = Py_TYPE(PyTuple_GET_ITEM(tuple, i)) == x->extent_type;
    return found;
}

int thx_describe_extent(thx_spec *s, PyObject *extent) {
    int64_t place = number_attribute(extent, "place");
    s->kind = THX_S_EXTENT;
    s->type = (PyTypeObject *)Py_NewRef((PyObject *)&PyLong_Type);
    s->object = thx_extent_plain(extent);
    s->leaf = (uint32_t)place;
    return place < 0 || !s->object ? -1 : 0;
}

void thx_sizes_spoil(thx_recorder *r, const char *why) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    if (!r->sizes) return;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *done = PyObject_CallMethod(r->sizes, "spoil", "s", why);
    Py_XDECREF(done);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

/* ---- what queries are answered ---- */

static int emit_mark(thx_recorder *r, const char *callee, th_val value, const int64_t *numbers, uint32_t n) {
    th_trace *t = r->t;
    th_node parts[THX_MAX_RANK + 1];
    parts[0] = th_node_value(t, value);
    for (uint32_t i = 0; i < n; i++) parts[1 + i] = th_node_int(t, numbers[i]);
    return thx_emit(r, &(th_op_args){.kind = TH_OP_CALL,
                                     .callee = th_intern_z(r->x->ctx, callee),
                                     .args = th_node_seq(t, TH_N_TUPLE, n + 1, parts),
                                     .effects = TH_FX_STATE});
}

/* Sizes of a value that are the same here and there may not change. */
static int fix_sizes(thx_recorder *r, th_val value, const th_type *type, const th_type *other) {
    int64_t numbers[THX_MAX_RANK];
    PyObject *number = PyLong_FromUnsignedLong(value);
    if (!number || (!r->fixed && !(r->fixed = PySet_New(NULL)))) return Py_XDECREF(number), -1;
    int known = PySet_Contains(r->fixed, number), rc = known < 0 ? -1 : 0;
    if (known == 0) {
        for (uint32_t d = 0; d < type->ndim; d++) numbers[d] = type->shape[d] == other->shape[d] ? type->shape[d] : -1;
        rc = PySet_Add(r->fixed, number) < 0 ? -1 : emit_mark(r, fixed_callee, value, numbers, type->ndim);
    }
    Py_DECREF(number);
    return rc;
}

/* Size d of a value: an extent where it was another one in the other capture. */
static PyObject *one_size(thx_recorder *r, th_val value, uint32_t d, const th_type *type, const th_type *other) {
    if (type->shape[d] == other->shape[d]) return PyLong_FromLongLong(type->shape[d]);
    int64_t before = PyList_GET_SIZE(r->numbers);
    PyObject *extent =
        PyObject_CallMethod(r->sizes, "size", "IIL", (unsigned)value, (unsigned)d, (long long)type->shape[d]);
    if (extent && PyList_GET_SIZE(r->numbers) > before) {
        int64_t numbers[] = {d, before};
        if (emit_mark(r, extent_callee, value, numbers, 2) < 0) Py_CLEAR(extent);
    }
    return extent;
}

static PyObject *all_sizes(thx_recorder *r, th_val value, const th_type *type, const th_type *other) {
    PyObject *items = PyTuple_New(type->ndim), *sizes = NULL;
    for (uint32_t d = 0; items && d < type->ndim; d++) {
        PyObject *size = one_size(r, value, d, type, other);
        if (!size)
            Py_CLEAR(items);
        else
            PyTuple_SET_ITEM(items, d, size);
    }
    if (items) sizes = PyObject_CallOneArg((PyObject *)r->x->Size, items);
    Py_XDECREF(items);
    return sizes;
}

static PyObject *fixed_number(thx_recorder *r, PyObject *size) { /* takes `size` */
    if (!size || Py_TYPE(size) != r->x->extent_type) return size;
    PyObject *number = PyObject_CallMethod(r->sizes, "pin", "O", size);
    Py_DECREF(size);
    return number;
}

static PyObject *product(thx_recorder *r, PyObject *sizes) { /* takes `sizes` */
    PyObject *number = sizes ? PyObject_CallMethod(r->sizes, "product", "(O)", sizes) : NULL;
    Py_XDECREF(sizes);
    return number;
}

static bool is_any(const char *name, const char *const *list) {
    for (; *list; list++)
        if (strcmp(name, *list) == 0) return true;
    return false;
}

/* The dimension that is asked for: x.size(1), x.size(dim=1); -1: all. -2 with an exception. */
static int64_t dimension(PyObject *args, PyObject *kwargs, uint32_t ndim) {
    PyObject *given = PyTuple_GET_SIZE(args) > 1 ? PyTuple_GET_ITEM(args, 1)
                      : kwargs                   ? PyDict_GetItemString(kwargs, "dim")
                                                 : NULL;
    if (!given || given == Py_None) return -1;
    int64_t d = PyLong_AsLongLong(given);
    if (d == -1 && PyErr_Occurred()) return -2;
    return d < 0 ? d + ndim : d;
}

static PyObject *answer_changed(thx_recorder *r, const char *name, th_val value, const th_type *type,
                                const th_type *other, PyObject *args, PyObject *kwargs) {
    static const char *const counts[] = {"numel", "nelement", NULL}, *const whole[] = {"shape", NULL};
    if (strcmp(name, "size") == 0) {
        int64_t d = dimension(args, kwargs, type->ndim);
        if (d == -2) return NULL;
        return d < 0 ? all_sizes(r, value, type, other) : one_size(r, value, (uint32_t)d, type, other);
    }
    if (is_any(name, whole)) return all_sizes(r, value, type, other);
    if (is_any(name, counts)) return product(r, all_sizes(r, value, type, other));
    if (strcmp(name, "__len__") == 0) return fixed_number(r, one_size(r, value, 0, type, other));
    return NULL;
}

static const char *last_name(thx_recorder *r, const thx_func *f, char *text, size_t size) {
    const char *callee = f->callee ? th_str_get(r->x->ctx, f->callee) : "", *dot;
    snprintf(text, size, "%s", callee);
    size_t n = strlen(text);
    if (n > 8 && strcmp(text + n - 8, ".__get__") == 0) text[n - 8] = 0;
    dot = strrchr(text, '.');
    return dot ? dot + 1 : text;
}

PyObject *thx_sizes_answer(thx_recorder *r, const thx_func *f, PyObject *args, PyObject *kwargs, PyObject *answer) {
    static const char *const told[] = {"size", "shape", "numel", "nelement", "__len__", "stride", NULL};
    static const char *const others[] = {"is_same_size", "nbytes", "dim_order", NULL};
    char text[256];
    const char *name = last_name(r, f, text, sizeof text);
    bool tells = is_any(name, told);
    if (!tells) {
        if (is_any(name, others)) thx_sizes_spoil(r, name);
        return answer;
    }
    PyObject *tensor = PyTuple_Check(args) && PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : NULL;
    if (!tensor || !thx_is_tensor(r->x, tensor)) {
        thx_sizes_spoil(r, name);
        return answer;
    }
    thx_cell *cell = thx_recorder_known(r, tensor);
    if (!cell) return answer;                /* a parameter or the like, which is watched */
    for (uint32_t i = 0; i < r->nroots; i++) /* likewise */
        if (r->roots[i].value == cell->value && r->roots[i].leaf < 0) return answer;
    th_val value = cell->value;
    const th_type *type = th_type_get(r->x->ctx, r->t->values[value].type), *other = NULL;
    if (value < r->like->nvalues) other = th_type_get(r->x->ctx, r->like->values[value].type);
    if (!other || other->kind != TH_TYPE_TENSOR || other->ndim != type->ndim) {
        thx_sizes_spoil(r, "the program is another one for other sizes");
        return answer;
    }
    bool same = memcmp(type->shape, other->shape, sizeof *type->shape * type->ndim) == 0;
    bool argument = !r->t->values[value].def;
    if (!argument && fix_sizes(r, value, type, other) < 0) return Py_DECREF(answer), NULL;
    if (strcmp(name, "stride") == 0) {
        if (memcmp(type->stride, other->stride, sizeof *type->stride * type->ndim) != 0) thx_sizes_spoil(r, name);
        return answer;
    }
    if (same) return answer;
    PyObject *changed = answer_changed(r, name, value, type, other, args, kwargs);
    Py_DECREF(answer);
    return changed;
}

/* ---- computing ---- */

static int64_t in_slot(const th_slot *slots, uint32_t i) { return (intptr_t)slots[i].handle; }
static void into_slot(th_slot *slots, uint32_t i, int64_t value) {
    slots[i] = (th_slot){.handle = (void *)(intptr_t)value};
}

static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

/* A term that is no size, of those before. False: it has no value, or is a condition that does not hold. */
static bool compute(const thx_sizes *z, uint32_t i, th_slot *slots) {
    const thx_term *term = &z->terms[i];
    int64_t a = term->of_a ? in_slot(slots, (uint32_t)term->a) : term->a, out = 0;
    int64_t b = term->of_b ? in_slot(slots, (uint32_t)term->b) : term->b;
    bool fails = false;
    switch (term->op) {
    case ADD: fails = __builtin_add_overflow(a, b, &out); break;
    case SUB: fails = __builtin_sub_overflow(a, b, &out); break;
    case MUL: fails = __builtin_mul_overflow(a, b, &out); break;
    case FLOORDIV: fails = b == 0 || (out = floor_divide(a, b), false); break;
    case MOD: fails = b == 0 || (out = a - floor_divide(a, b) * b, false); break;
    case NEG: out = -a; break;
    case ABS: out = a < 0 ? -a : a; break;
    case LT: out = a < b; break;
    case LE: out = a <= b; break;
    case GT: out = a > b; break;
    case GE: out = a >= b; break;
    case EQ: out = a == b; break;
    default: out = a != b; break;
    }
    into_slot(slots, i, out);
    return !fails && (!term->condition || (z->trusting && !term->of_int) || out == term->value);
}

/* Size number `i` is known: what follows from it, up to the next size. */
static bool follow(const thx_sizes *z, uint32_t i, int64_t size, th_slot *slots) {
    bool holds = true;
    into_slot(slots, i, size);
    while (++i < z->count && z->terms[i].op != SIZE && holds) holds = compute(z, i, slots);
    return holds;
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

static bool int_argument(const thx_term *term, const thx_leaves *leaves, int64_t *value) {
    int overflow = 0;
    *value = PyLong_AsLongLongAndOverflow(leaves->numbers[term->leaf], &overflow);
    return !overflow;
}

bool thx_sizes_start(thx *x, const thx_entry *e, const thx_leaves *leaves, th_slot *slots) {
    const thx_sizes *z = e->main.literals.sizes;
    bool holds = true;
    int64_t value = 0;
    for (uint32_t i = 0; i < z->count && z->terms[i].op != SIZE && holds; i++)
        if (z->terms[i].op == ARGUMENT) {
            holds = int_argument(&z->terms[i], leaves, &value);
            into_slot(slots, i, value);
        } else {
            holds = compute(z, i, slots);
        }
    if (!holds) PyErr_SetString(x->SizesChanged, "the program does not hold for the numbers that it got");
    return holds;
}

bool thx_sizes_hold(thx *x, const thx_entry *e, const thx_leaves *leaves) {
    const thx_sizes *z = e->main.literals.sizes;
    th_slot fixed[64], *slots = z->count <= 64 ? fixed : PyMem_Malloc(sizeof *slots * z->count);
    bool holds = slots != NULL;
    int64_t value = 0;
    for (uint32_t i = 0; i < z->count && holds; i++) {
        const thx_term *term = &z->terms[i];
        if (!term->early) continue;
        if (term->op == ARGUMENT) {
            holds = int_argument(term, leaves, &value);
            into_slot(slots, i, value);
        } else if (term->op == SIZE)
            into_slot(slots, i, size_of(x, &(th_slot){.object = leaves->items[term->leaf]}, (uint32_t)term->b));
        else
            holds = compute(z, i, slots);
    }
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
        if (e->main.literals.sizes->terms[i].op == ARGUMENT)
            hash =
                th__hash_mix(hash, (uint64_t)PyLong_AsLongLong(leaves->numbers[e->main.literals.sizes->terms[i].leaf]));
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
    int64_t numbers[]; /* ndim 0: dimension, place; otherwise sizes, of which -1 may be any */
} size_data;

static int changed(const thx *x) {
    PyErr_SetString(x->SizesChanged, "the program does not hold for the sizes that it met");
    return -1;
}

static int run_size(th_frame *f, const th_instr *instr) {
    const size_data *s = instr->data;
    int64_t size = size_of(f->user, &f->slots[s->slot], (uint32_t)s->numbers[0]);
    if (size < 0 || !follow(s->sizes, (uint32_t)s->numbers[1], size, f->slots + s->first)) return changed(f->user);
    return 0;
}

static int run_fixed(th_frame *f, const th_instr *instr) {
    const size_data *s = instr->data;
    bool same = true;
    for (uint32_t d = 0; d < s->ndim && same; d++)
        same = s->numbers[d] < 0 || size_of(f->user, &f->slots[s->slot], d) == s->numbers[d];
    return same ? 0 : changed(f->user);
}

/* 0: neither, 1: where a size becomes known, 2: sizes that may not change. */
static int mark_kind(const th_trace *t, const th_op *op) {
    if (op->kind != TH_OP_CALL || op->callee_opaque || !(op->effects & TH_FX_STATE)) return 0;
    const char *callee = th_str_get(t->ctx, op->callee);
    return strcmp(callee, extent_callee) == 0 ? 1 : strcmp(callee, fixed_callee) == 0 ? 2 : 0;
}

static const th_node_data *mark_argument(const th_trace *t, const th_op *op, uint32_t i) {
    return &t->nodes[t->kids[t->nodes[op->args].u.kids + i]];
}

int thx_lower_size(thx_lowering *l, th_opref o) {
    const th_op *op = &l->t->ops[o];
    int kind = mark_kind(l->t, op);
    if (!kind || !l->literals->sizes) return kind != 0;
    uint32_t n = l->t->nodes[op->args].count - 1;
    size_data *s = PyMem_Malloc(sizeof *s + sizeof(int64_t) * n);
    if (!s) return PyErr_NoMemory(), -1;
    s->head.free = PyMem_Free;
    s->sizes = l->literals->sizes;
    s->slot = thx_slot_for(l, mark_argument(l->t, op, 0)->u.ref);
    s->first = thx_extent_slot(l, 1);
    s->ndim = kind == 2 ? n : 0;
    for (uint32_t i = 0; i < n; i++) s->numbers[i] = mark_argument(l->t, op, 1 + i)->u.i;
    return thx_check(l->x, th_plan_add(l->plan, kind == 1 ? run_size : run_fixed, s, o)) < 0 ? -1 : 1;
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
} check_data;

static int run_check(th_frame *f, const th_instr *instr) {
    const check_data *c = instr->data;
    thx *x = f->user;
    return thx_as_predicted(x, &f->slots[c->slot], th_type_get(x->ctx, c->type)) ? 0 : changed(x);
}

static void lower_check(void *user, th_val *v) {
    variation *s = user;
    thx_lowering *l = (thx_lowering *)s->l;
    if (s->rc < 0 || l->literals->sizes->varies[*v] || l->slots[*v] == UINT32_MAX) return;
    check_data *c = PyMem_Malloc(sizeof *c);
    if (!c) {
        PyErr_NoMemory();
        s->rc = -1;
        return;
    }
    *c = (check_data){{PyMem_Free}, l->slots[*v], l->t->values[*v].type};
    s->rc = thx_check(l->x, th_plan_add(l->plan, run_check, c, s->op));
}

int thx_lower_checks(thx_lowering *l, th_opref o) {
    variation s = {.l = l, .op = o};
    if (l->literals->sizes && !thx_is_steady(l, o)) th_op_each_out((th_trace *)l->t, o, lower_check, &s);
    return s.rc;
}

/* ---- a former call ---- */

static bool same_names(PyObject *a, PyObject *b) {
    return a == b || (a && b && PyObject_RichCompareBool(a, b, Py_EQ) == 1);
}

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

/* They are, and then the sizes of b that differ are free. */
static bool alike_calls(const thx_entry *a, thx_entry *b) {
    bool same = !a->eager && !a->dead && !a->expected && !a->gradient && !a->formula && a->nargs == b->nargs &&
                a->npositional == b->npositional && same_names(a->kwnames, b->kwnames) &&
                memcmp(&a->ambient, &b->ambient, sizeof a->ambient) == 0;
    uint32_t differences = 0, ints = 0;
    for (uint32_t i = 0; i < a->nargs && same; i++)
        same = thx_specs_alike(&a->args[i], &b->args[i], THX_ALIKE_SIZES, &differences);
    if (!same || !differences) return false;
    for (uint32_t i = 0; i < b->nargs && same; i++) same = free_sizes(&a->args[i], &b->args[i], &ints);
    for (uint32_t i = 0; i < b->nargs && !same; i++) fix_sizes_of(&b->args[i]);
    return same && !PyErr_Occurred();
}

int thx_sizes_begin(thx_callable_object *c, thx_entry *e, thx_entry **like) {
    uint64_t changes = c->changes;
    *like = NULL;
    thx_entry *a = c->dynamic && !c->claims && !c->transform && c->unfollowed < MAX_TRIES ? c->entries : NULL;
    while (a && !*like && c->changes == changes) {
        thx_entry *next = a->next;
        a->running++; /* the caller lets go of the one that is found */
        bool alike = alike_calls(a, e);
        int holds = alike ? thx_guards_check(c->x, a->guards) : PyErr_Occurred() ? -1 : 0;
        if (holds == 1)
            *like = a;
        else
            thx_entry_leave(c, a);
        for (uint32_t i = 0; i < e->nargs && alike && holds != 1; i++) fix_sizes_of(&e->args[i]);
        if (holds < 0) return -1;
        a = next;
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
    if (a->kind == TH_N_INT) return a->u.i == (b->number ? in_slot(k->slots, b->number - 1u) : b->u.i);
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
    const th_type *type = th_type_get(k->a->ctx, k->a->values[mark_argument(k->b, op, 0)->u.ref].type);
    int64_t d = mark_argument(k->b, op, 1)->u.i;
    if (kind == 1) return follow(k->sizes, (uint32_t)mark_argument(k->b, op, 2)->u.i, type->shape[d], k->slots);
    bool same = true;
    for (uint32_t i = 0; i < type->ndim && same; i++) {
        int64_t size = mark_argument(k->b, op, 1 + i)->u.i;
        same = size < 0 || size == type->shape[i];
    }
    return same;
}

/* The values of ints in the former call. */
static void former_ints(const thx_spec *a, const thx_spec *b, const comparison *k) {
    if (b->kind == THX_S_CONST && b->number && b->type == &PyLong_Type)
        for (uint32_t i = 0; i < k->sizes->count; i++)
            if (k->sizes->terms[i].op == ARGUMENT && k->sizes->terms[i].leaf == (int32_t)b->number - 1)
                into_slot(k->slots, i, PyLong_AsLongLong(a->object));
    for (uint32_t i = 0; i < b->nkids; i++) former_ints(&a->kids[i], &b->kids[i], k);
}

/* Is b, with the sizes of a put in, the program a? */
static bool same_program(comparison *k) {
    const th_trace *a = k->a, *b = k->b;
    bool same = a->ninputs == b->ninputs;
    for (uint32_t i = 0; i < k->sizes->count && k->sizes->terms[i].op != SIZE && same; i++)
        same = k->sizes->terms[i].op == ARGUMENT || compute(k->sizes, i, k->slots);
    for (uint32_t i = 0; i < a->ninputs && same; i++) same = same_value((void *)k, a->inputs[i], b->inputs[i]);
    th_opref at = 1;
    for (th_opref o = 1; o < b->nops && same; o++) {
        int kind = mark_kind(b, &b->ops[k->at = o]);
        if (kind) {
            same = same_mark(k, &b->ops[o], kind);
            continue;
        }
        while (at < a->nops && mark_kind(a, &a->ops[at])) at++;
        same = at < a->nops && same_op(k, &a->ops[at], &b->ops[o]);
        at++;
    }
    while (same && at < a->nops && mark_kind(a, &a->ops[at])) at++;
    return same && at == a->nops && same_node(k, a->result, b->result);
}

/* ---- an entry for any sizes ---- */

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
        out->op == ARGUMENT || (out->of_a && z->terms[out->a].of_int) || (out->of_b && z->terms[out->b].of_int);
    if (out->op == ARGUMENT) out->leaf = (int32_t)out->a;
    if (out->op != SIZE) return 0;
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

/* Why a run could not begin anew; NULL: it can. */
static const char *once_only(const th_trace *t) {
    for (th_opref o = 1; o < t->nops; o++) {
        const th_op *op = &t->ops[o];
        if (op->effects & TH_FX_RANDOM) return "the program draws random numbers";
        if (op->effects & TH_FX_STATE && !mark_kind(t, op) && !asserts(t, op))
            return "the program checks data, or acts outside of tensors";
    }
    for (uint32_t i = 0; i < t->ninputs; i++)
        if (th__is_written(t, t->inputs[i], t->nops))
            return "the program writes to an argument, a parameter or a buffer";
    return NULL;
}

void thx_sizes_free(const thx_sizes *z) {
    if (z) PyMem_Free(z->varies);
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

int thx_sizes_end(thx *x, thx_entry *e, const thx_entry *like, const thx_recorder *r, PyObject *sizes, bool trusting) {
    thx_sizes *z = read_sizes(r, sizes, trusting);
    th_slot *slots = z ? PyMem_Calloc(z->count + 1, sizeof *slots) : NULL;
    if (!slots) {
        PyMem_Free(z);
        return PyErr_Occurred() ? -1 : (PyErr_NoMemory(), -1);
    }
    comparison k = {like->captured, e->captured, z, slots, 0};
    for (uint32_t i = 0; i < e->nargs; i++) former_ints(&like->args[i], &e->args[i], &k);
    const char *why = e->expected   ? "values of tensors steer the program"
                      : e->gradient ? "the program computes gradients"
                                    : once_only(e->main.t);
    bool same = !why && same_program(&k);
    PyMem_Free(slots);
    if (same && note_varying(z, like->captured, e->captured, e->main.t) == 0) {
        e->main.literals.sizes = z;
        for (uint32_t i = 0; i < e->nargs; i++) free_ints(&e->args[i]);
        return 0;
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
