/* Lowering to Python builtins called from C: the road that exists for every operation.
 *
 * Arguments are prepared once: constants as objects, values as slots, containers that hold values as templates that are
 * rebuilt at each call.
 */
#include "lower.h"

#include "region.h"
#include "sizes.h"

#include <string.h>

typedef enum arg_kind { ARG_CONST = 1, ARG_SLOT, ARG_EXTENT, ARG_TUPLE, ARG_LIST, ARG_DICT, ARG_SLICE } arg_kind;

typedef struct arg {
    uint8_t kind;
    uint32_t slot, nkids;
    PyObject *object; /* owned */
    struct arg *kids;
} arg;

typedef enum call_kind { CALL_VECTOR = 1, CALL_GETITEM, CALL_SETITEM } call_kind;

typedef struct thx_call {
    thx_instr_data head;
    uint8_t kind;
    bool no_grad;               /* ran while gradients were off; matters where a program runs under autograd */
    bool below_autograd;        /* makes what a backward needs only while gradients are on */
    PyObject *callee, *kwnames; /* owned */
    uint32_t nargs, npositional;
    arg *args;
    arg outs; /* SLOT, TUPLE of SLOT/CONST (ignored), or kind 0 */
} thx_call;

/* ---- slots ---- */

PyObject *thx_slot_object(thx *x, th_slot *slot) {
    if (slot->object) return slot->object;
    if (!slot->owns_handle && x->abi.aoti_torch_new_tensor_handle(slot->handle, &slot->handle)) {
        slot->handle = NULL;
        PyErr_SetString(PyExc_RuntimeError, "torch refused to share a tensor");
        return NULL;
    }
    PyObject *o = thx_wrap(&x->abi, slot->handle);
    slot->owns_handle = false;
    slot->handle = NULL;
    if (!o) return NULL;
    slot->object = o;
    slot->owns_object = true;
    return o;
}

static void release(void *user, void *handle, void *object) {
    thx *x = user;
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    bool raised = PyErr_Occurred() != NULL; /* freeing a tensor may run code that clears it */
    if (raised) PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF((PyObject *)object);
    if (handle) x->abi.aoti_torch_delete_tensor_object(handle);
    if (raised) PyErr_Restore(type, value, trace);
}

uint32_t thx_slot_for(thx_lowering *l, th_val value) {
    if (l->slots[value] == UINT32_MAX) l->slots[value] = l->nfree ? l->free_slots[--l->nfree] : l->next_slot++;
    return l->slots[value];
}

/* ---- argument templates ---- */

static void arg_fini(arg *a) {
    for (uint32_t i = 0; i < a->nkids; i++) arg_fini(&a->kids[i]);
    PyMem_Free(a->kids);
    Py_XDECREF(a->object);
}

static bool has_value(const th_trace *t, th_node node) {
    const th_node_data *d = &t->nodes[node];
    if (d->kind == TH_N_VALUE || d->number) return true;
    if (d->kind < TH_N_TUPLE || d->kind > TH_N_SLICE) return false;
    for (uint32_t i = 0; i < d->count; i++)
        if (has_value(t, t->kids[d->u.kids + i])) return true;
    return false;
}

static PyObject *no_value(void *user, th_val value) {
    (void)user, (void)value;
    PyErr_SetString(PyExc_SystemError, "a constant argument holds a value");
    return NULL;
}

static int arg_init(thx_lowering *l, arg *a, th_node node) {
    const th_node_data *d = &l->t->nodes[node];
    memset(a, 0, sizeof *a);
    if (d->kind == TH_N_VALUE) {
        a->kind = ARG_SLOT;
        a->slot = thx_slot_for(l, d->u.ref);
        return 0;
    }
    if (d->number && l->literals->sizes) {
        a->kind = ARG_EXTENT;
        a->slot = thx_extent_slot(l, d->number);
        return 0;
    }
    if (d->number || !has_value(l->t, node)) {
        a->kind = ARG_CONST;
        a->object = thx_from_node(l->x, l->t, node, no_value, NULL);
        return a->object ? 0 : -1;
    }
    a->kind = d->kind == TH_N_TUPLE  ? ARG_TUPLE
              : d->kind == TH_N_LIST ? ARG_LIST
              : d->kind == TH_N_DICT ? ARG_DICT
                                     : ARG_SLICE;
    a->kids = PyMem_Calloc(d->count + 1, sizeof(arg));
    if (!a->kids) return PyErr_NoMemory(), -1;
    a->nkids = d->count;
    for (uint32_t i = 0; i < d->count; i++)
        if (arg_init(l, &a->kids[i], l->t->kids[l->t->nodes[node].u.kids + i]) < 0) return -1;
    return 0;
}

static PyObject *arg_object(thx *x, th_frame *f, const arg *a) { /* new reference */
    if (a->kind == ARG_CONST) return Py_NewRef(a->object);
    if (a->kind == ARG_SLOT) return Py_XNewRef(thx_slot_object(x, &f->slots[a->slot]));
    if (a->kind == ARG_EXTENT) return PyLong_FromLongLong((intptr_t)f->slots[a->slot].handle);
    if (a->kind == ARG_DICT) {
        PyObject *dict = PyDict_New();
        for (uint32_t i = 0; dict && i + 1 < a->nkids; i += 2) {
            PyObject *key = arg_object(x, f, &a->kids[i]), *value = key ? arg_object(x, f, &a->kids[i + 1]) : NULL;
            if (!value || PyDict_SetItem(dict, key, value) < 0) Py_CLEAR(dict);
            Py_XDECREF(key);
            Py_XDECREF(value);
        }
        return dict;
    }
    PyObject *items = a->kind == ARG_LIST ? PyList_New(a->nkids) : PyTuple_New(a->nkids);
    for (uint32_t i = 0; items && i < a->nkids; i++) {
        PyObject *item = arg_object(x, f, &a->kids[i]);
        if (!item)
            Py_CLEAR(items);
        else if (a->kind == ARG_LIST)
            PyList_SET_ITEM(items, i, item);
        else
            PyTuple_SET_ITEM(items, i, item);
    }
    if (!items || a->kind != ARG_SLICE) return items;
    PyObject *slice = PySlice_New(PyTuple_GET_ITEM(items, 0), PyTuple_GET_ITEM(items, 1), PyTuple_GET_ITEM(items, 2));
    Py_DECREF(items);
    return slice;
}

/* ---- running ---- */

static int store(th_frame *f, const arg *out, PyObject *result) {
    if (out->kind == ARG_SLOT) {
        th_slot *slot = &f->slots[out->slot];
        slot->object = Py_NewRef(result);
        slot->owns_object = true;
        slot->handle = NULL;
        slot->owns_handle = false;
        return 0;
    }
    if (out->kind != ARG_TUPLE) return 0;
    if ((!PyTuple_Check(result) && !PyList_Check(result)) || (uint32_t)PySequence_Fast_GET_SIZE(result) != out->nkids) {
        PyErr_SetString(PyExc_RuntimeError,
                        "an operation returned another number of results than when it was captured");
        return -1;
    }
    for (uint32_t i = 0; i < out->nkids; i++)
        if (store(f, &out->kids[i], PySequence_Fast_ITEMS(result)[i]) < 0) return -1;
    return 0;
}

static PyObject *call_vector(thx *x, th_frame *f, const thx_call *c, PyObject *callee) {
    PyObject *fixed[20], **argv = c->nargs + 1 <= 20 ? fixed : PyMem_Malloc(sizeof *argv * (c->nargs + 1));
    if (!argv) return PyErr_NoMemory();
    PyObject *temporary[20], *result = NULL;
    uint32_t ntemporary = 0, i = 0;
    for (; i < c->nargs; i++) {
        const arg *a = &c->args[i];
        PyObject *o;
        if (a->kind == ARG_CONST) {
            o = a->object;
        } else if (a->kind == ARG_SLOT) {
            o = thx_slot_object(x, &f->slots[a->slot]);
        } else {
            o = ntemporary < 20 ? arg_object(x, f, a) : NULL;
            if (o) temporary[ntemporary++] = o;
        }
        if (!o) break;
        argv[i + 1] = o;
    }
    if (i == c->nargs)
        result = PyObject_Vectorcall(callee, argv + 1, c->npositional | PY_VECTORCALL_ARGUMENTS_OFFSET, c->kwnames);
    while (ntemporary) Py_DECREF(temporary[--ntemporary]);
    if (argv != fixed) PyMem_Free(argv);
    return result;
}

static PyObject *call_item(thx *x, th_frame *f, const thx_call *c) {
    PyObject *self = arg_object(x, f, &c->args[0]), *key = self ? arg_object(x, f, &c->args[1]) : NULL, *result = NULL;
    if (key && c->kind == CALL_GETITEM) {
        result = PyObject_GetItem(self, key);
    } else if (key) {
        PyObject *value = arg_object(x, f, &c->args[2]);
        if (value && PyObject_SetItem(self, key, value) == 0) result = Py_NewRef(Py_None);
        Py_XDECREF(value);
    }
    Py_XDECREF(self);
    Py_XDECREF(key);
    return result;
}

static int set_grad_mode(thx *x, bool on) {
    if (x->abi.on && x->abi.aoti_torch_grad_mode_set_enabled) return x->abi.aoti_torch_grad_mode_set_enabled(on), 0;
    PyObject *done = PyObject_CallOneArg(x->set_grad, on ? Py_True : Py_False);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* With another grad mode than the current one. */
static PyObject *call_in_grad_mode(thx *x, th_frame *f, const thx_call *c, bool on) {
    PyObject *type, *value, *trace;
    if (set_grad_mode(x, on) < 0) return NULL;
    PyObject *result = c->kind == CALL_VECTOR ? call_vector(x, f, c, c->callee) : call_item(x, f, c);
    PyErr_Fetch(&type, &value, &trace);
    if (set_grad_mode(x, !on) < 0) PyErr_Clear();
    PyErr_Restore(type, value, trace);
    return result;
}

/* With the grad mode on, but autograd's own kernels passed over. */
static PyObject *call_below_autograd(thx *x, th_frame *f, const thx_call *c) {
    PyObject *guard = thx_enter(x, x->below_autograd);
    PyObject *result = guard ? call_in_grad_mode(x, f, c, true) : NULL;
    if (guard) thx_leave(x, guard);
    return result;
}

static int run_call(th_frame *f, const th_instr *instr) {
    const thx_call *c = instr->data;
    thx *x = f->user;
    PyObject *result = c->no_grad && thx_grad_mode(x) == 1          ? call_in_grad_mode(x, f, c, false)
                       : c->below_autograd && thx_grad_mode(x) == 0 ? call_below_autograd(x, f, c)
                       : c->kind == CALL_VECTOR                     ? call_vector(x, f, c, c->callee)
                                                                    : call_item(x, f, c);
    if (!result) return -1;
    int rc = store(f, &c->outs, result);
    Py_DECREF(result);
    return rc;
}

int thx_call_run(th_frame *f, const thx_call *c, PyObject *callee) {
    PyObject *result = call_vector(f->user, f, c, callee);
    if (!result) return -1;
    int rc = store(f, &c->outs, result);
    Py_DECREF(result);
    return rc;
}

/* ---- building ---- */

bool thx_looks_at_grad_mode(thx *x, const th_op *op) {
    return !op->callee_opaque && strcmp(th_str_get(x->ctx, op->callee), "torch.ops.aten.mkldnn_rnn_layer.default") == 0;
}

static void free_call(void *data) {
    thx_call *c = data;
    Py_XDECREF(c->callee);
    Py_XDECREF(c->kwnames);
    for (uint32_t i = 0; i < c->nargs; i++) arg_fini(&c->args[i]);
    PyMem_Free(c->args);
    arg_fini(&c->outs);
    PyMem_Free(c);
}

/* torch differentiates as_strided_scatter wrongly; a plain program may run under its autograd. */
static PyObject *differentiable_scatter(thx *x) {
    (void)x;
    PyObject *module = PyImport_ImportModule("thunder._kernels");
    PyObject *function = module ? PyObject_GetAttrString(module, "as_strided_scatter") : NULL;
    Py_XDECREF(module);
    return function;
}

static bool has_number(const thx_lowering *l, th_opref o) {
    for (uint32_t i = 0; i < l->literals->nnumbers; i++)
        if (l->literals->numbers[i].op == o) return true;
    return false;
}

static void put_numbers(const thx_lowering *l, thx_call *c, th_opref o) {
    for (uint32_t i = 0; i < l->literals->nnumbers; i++) {
        if (l->literals->numbers[i].op != o) continue;
        arg *a = &c->args[l->literals->numbers[i].argument];
        arg_fini(a);
        *a = (arg){.kind = ARG_SLOT, .slot = l->t->ninputs + i};
    }
}

static int call_init(thx_lowering *l, thx_call *c, const th_op *op) {
    const th_trace *t = l->t;
    const th_node_data *args = &t->nodes[op->args];
    uint32_t nkw = op->kwargs ? t->nodes[op->kwargs].count / 2 : 0;
    c->npositional = args->count;
    c->no_grad = op->marks & TH_MARK_NO_GRAD;
    c->below_autograd = l->x->below_autograd && thx_looks_at_grad_mode(l->x, op);
    c->args = PyMem_Calloc(args->count + nkw + 1, sizeof(arg));
    c->kwnames = nkw ? PyTuple_New(nkw) : NULL;
    if (!c->args || (nkw && !c->kwnames)) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < t->nodes[op->args].count; i++, c->nargs++)
        if (arg_init(l, &c->args[i], t->kids[t->nodes[op->args].u.kids + i]) < 0) return c->nargs++, -1;
    for (uint32_t i = 0; i < nkw; i++, c->nargs++) {
        uint32_t at = t->nodes[op->kwargs].u.kids + 2 * i;
        PyObject *key = thx_from_node(l->x, t, t->kids[at], no_value, NULL);
        if (!key) return -1;
        PyUnicode_InternInPlace(&key);
        PyTuple_SET_ITEM(c->kwnames, i, key);
        if (arg_init(l, &c->args[c->nargs], t->kids[at + 1]) < 0) return c->nargs++, -1;
    }
    const char *name = th_str_get(l->x->ctx, op->callee);
    c->kind = CALL_VECTOR;
    if (name && strcmp(name, "torch.Tensor.__getitem__") == 0 && c->nargs == 2) c->kind = CALL_GETITEM;
    if (name && strcmp(name, "torch.Tensor.__setitem__") == 0 && c->nargs == 3) c->kind = CALL_SETITEM;
    c->callee = l->plain && name && strstr(name, "as_strided_scatter") ? differentiable_scatter(l->x)
                                                                       : Py_XNewRef(thx_callable(l->x, t, op));
    if (!c->callee) return -1;
    return op->outs && has_value(t, op->outs) ? arg_init(l, &c->outs, op->outs) : 0;
}

thx_call *thx_call_new(thx_lowering *l, th_opref o) {
    thx_call *c = PyMem_Calloc(1, sizeof *c);
    if (!c) return (thx_call *)PyErr_NoMemory();
    c->head.free = free_call;
    if (call_init(l, c, &l->t->ops[o]) == 0) {
        put_numbers(l, c, o);
        return c;
    }
    free_call(c);
    return NULL;
}

void thx_call_free(thx_call *c) {
    if (c) free_call(c);
}

static int lower_builtin(thx_lowering *l, th_opref o) {
    thx_call *c = thx_call_new(l, o);
    if (!c) return -1;
    l->nbuiltin++;
    return thx_check(l->x, th_plan_add(l->plan, run_call, c, o));
}

static void free_data(void *data) { ((thx_instr_data *)data)->free(data); }

/* `del`: the slots die after the instruction before; they are free for values that come later. */
static int lower_del(thx_lowering *l, const th_op *op) {
    const th_node_data *args = &l->t->nodes[op->args];
    for (uint32_t i = 0; i < args->count; i++) {
        const th_node_data *d = &l->t->nodes[l->t->kids[args->u.kids + i]];
        if (d->kind != TH_N_VALUE || l->slots[d->u.ref] == UINT32_MAX || l->slots[d->u.ref] < l->plan->nroots) continue;
        if (thx_check(l->x, th_plan_kill(l->plan, l->slots[d->u.ref])) < 0) return -1;
        l->free_slots[l->nfree++] = l->slots[d->u.ref];
    }
    return 0;
}

typedef struct uses {
    th_opref *last; /* by value: the last operation that uses it */
    th_opref op;
} uses;

static void note_use(void *user, th_val *v) { ((uses *)user)->last[*v] = ((uses *)user)->op; }

/* Inputs that are not returned die with their last use, where the program spends them. The caller fills their slots
 * anew: they are free for nothing else. */
static int spend_inputs(thx_lowering *l, const th_opref *last, th_opref op) {
    for (uint32_t i = 0; i < l->t->ninputs; i++)
        if (last[l->t->inputs[i]] == op && thx_check(l->x, th_plan_kill(l->plan, i)) < 0) return -1;
    return 0;
}

static th_opref *last_uses(const thx_lowering *l) {
    uses u = {PyMem_Calloc(l->t->nvalues, sizeof *u.last), 0};
    if (!u.last) return (th_opref *)PyErr_NoMemory();
    for (u.op = 1; u.op < l->t->nops; u.op++)
        if (l->t->ops[u.op].kind != TH_OP_DEL) th_op_each_use((th_trace *)l->t, u.op, note_use, &u);
    u.op = 0;
    th_node_each_value((th_trace *)l->t, l->t->result, note_use, &u);
    return u.last;
}

static int lower_ops(thx_lowering *l) {
    for (th_opref o = 1; o < l->t->nops; o++) {
        const th_op *op = &l->t->ops[o];
        int rc = thx_lower_size(l, o);
        bool call = rc == 0 && op->kind != TH_OP_DEL, whole = call && !has_number(l, o) && thx_is_steady(l, o);
        if (rc == 0 && !call) rc = lower_del(l, op);
        if (rc == 1) rc = 0;
        if (rc == 0 && whole) rc = thx_lower_region(l, o);
        if (rc == 0 && whole) rc = thx_lower_shim(l, o);
        if (rc == 0 && whole) rc = thx_lower_dispatch(l, o);
        if (rc == 0 && call) rc = lower_builtin(l, o) < 0 ? -1 : thx_lower_checks(l, o);
        if (rc == 0 && op->kind != TH_OP_DEL && l->last) rc = spend_inputs(l, l->last, o);
        if (rc < 0) return -1;
    }
    return 0;
}

th_plan *thx_lower(thx *x, const th_trace *t, bool plain, bool spends, const thx_literals *literals, uint32_t **slot_of,
                   uint32_t *nshim, uint32_t *nbuiltin) {
    thx_lowering l = {.x = x, .t = t, .plain = plain, .literals = literals};
    uint32_t nliterals = literals->nnumbers + thx_sizes_count(literals->sizes);
    l.slots = PyMem_Malloc(sizeof(uint32_t) * t->nvalues);
    l.free_slots = PyMem_Malloc(sizeof(uint32_t) * (t->nvalues + 1));
    l.plan = th_plan_new(x->ctx, 0, t->ninputs + nliterals, release, x, free_data);
    if (!l.slots || !l.free_slots || !l.plan) {
        PyErr_NoMemory();
        goto fail;
    }
    memset(l.slots, 0xff, sizeof(uint32_t) * t->nvalues);
    for (uint32_t i = 0; i < t->ninputs; i++) l.slots[t->inputs[i]] = l.next_slot++;
    l.next_slot += nliterals;
    if ((spends && !(l.last = last_uses(&l))) || lower_ops(&l) < 0) goto fail;
    l.plan->nslots = l.next_slot;
    PyMem_Free(l.free_slots);
    PyMem_Free(l.last);
    *slot_of = l.slots;
    *nshim = l.nshim;
    *nbuiltin = l.nbuiltin;
    return l.plan;
fail:
    PyMem_Free(l.slots);
    PyMem_Free(l.free_slots);
    PyMem_Free(l.last);
    th_plan_free(l.plan);
    return NULL;
}
