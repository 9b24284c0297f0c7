/* One compiled program of a callable: does it serve a call, and running it.
 *
 * Matching and running run no Python of the user's, but where he compares objects of his own.
 */
#include "callable.h"

#include "lower.h"
#include "shadow.h"

#include <string.h>

/* ---- matching ---- */

static bool same_names(PyObject *a, PyObject *b) {
    if (a == b) return true;
    if (!a || !b || PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); i++)
        if (PyTuple_GET_ITEM(a, i) != PyTuple_GET_ITEM(b, i) &&
            PyUnicode_Compare(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i)) != 0)
            return false;
    return true;
}

int64_t thx_offset_of(thx *x, PyObject *tensor) {
    int64_t offset = 0;
    if (x->abi.on) {
        x->abi.aoti_torch_get_storage_offset(thx_borrow(&x->abi, tensor), &offset);
        return offset;
    }
    PyObject *number = PyObject_CallMethod(tensor, "storage_offset", NULL);
    offset = number ? PyLong_AsLongLong(number) : 0;
    PyErr_Clear();
    Py_XDECREF(number);
    return offset;
}

static bool is_inference(thx *x, PyObject *tensor) { /* outside of inference mode nobody may write to it */
    PyObject *yes = PyObject_CallOneArg(x->is_inference, tensor);
    PyErr_Clear();
    Py_XDECREF(yes); /* a singleton */
    return yes == Py_True;
}

void thx_find_sharing(thx *x, const thx_guards *guards, const thx_leaves *leaves, uint32_t *out) {
    PyObject *const *live;
    uint32_t n = thx_guards_bound(guards, &live), count = leaves->count;
    for (uint32_t i = 0; i < count; i++) {
        void *base = thx_storage_base(x, leaves->items[i]);
        PyObject *with = NULL;
        out[i] = UINT32_MAX;
        for (uint32_t j = 0; base && j < i && !with; j++)
            if (thx_storage_base(x, leaves->items[j]) == base) with = leaves->items[out[i] = j];
        for (uint32_t j = 0; base && j < n && !with; j++)
            if (thx_storage_base(x, live[j]) == base) with = live[(out[i] = count + j) - count];
        out[count + i] = with ? (uint32_t)(thx_offset_of(x, leaves->items[i]) - thx_offset_of(x, with)) : 0;
        out[2 * count + i] = is_inference(x, leaves->items[i]);
    }
}

static int same_sharing(thx *x, const thx_entry *e, const thx_leaves *leaves) {
    uint32_t fixed[96], n = 3 * leaves->count, *now = n <= 96 ? fixed : PyMem_Malloc(sizeof *now * n);
    if (!now) return PyErr_NoMemory(), -1;
    thx_find_sharing(x, e->guards, leaves, now);
    int same = memcmp(now, e->sharing, sizeof *now * n) == 0;
    if (now != fixed) PyMem_Free(now);
    return same;
}

static bool same_offsets(thx *x, const thx_entry *e, const thx_leaves *leaves) {
    PyObject *const *live;
    thx_guards_bound(e->guards, &live);
    bool same = true;
    for (uint32_t i = 0; i < e->nroots && same; i++) {
        int32_t leaf = e->root_leaf[i];
        same = thx_offset_of(x, leaf >= 0 ? leaves->items[leaf] : live[-1 - leaf]) == e->offsets[i];
    }
    return same;
}

int thx_arguments_match(thx *x, const thx_entry *e, PyObject *const *args, Py_ssize_t npositional, PyObject *kwnames,
                        thx_leaves *leaves) {
    if (e->npositional != npositional || !same_names(e->kwnames, kwnames)) return 0;
    leaves->count = 0;
    if (leaves->held) Py_CLEAR(leaves->held);
    int same = 1;
    for (uint32_t i = 0; i < e->nargs && same == 1; i++) same = thx_spec_match(x, &e->args[i], args[i], leaves);
    return same;
}

static bool still_absent(const thx_entry *e, const thx_leaves *leaves) {
    for (Py_ssize_t i = 0; e->absent && i < PyList_GET_SIZE(e->absent); i++) {
        PyObject *note = PyList_GET_ITEM(e->absent, i);
        long leaf = PyLong_AsLong(PyTuple_GET_ITEM(note, 0));
        PyObject *tensor = leaf < 0 ? PyTuple_GET_ITEM(note, 1) : leaves->items[leaf];
        if (thx_has_own_attribute(tensor, PyTuple_GET_ITEM(note, 2))) return false;
    }
    return true;
}

/* No argument is a watched tensor, but for those that were when the program was captured. */
static bool are_strangers(const thx_entry *e, const thx_leaves *leaves) {
    uint32_t held = 0;
    for (uint32_t i = 0; i < leaves->count; i++) held += thx_guards_holds(e->guards, leaves->items[i]);
    return held == e->nidentical;
}

int thx_entry_matches(thx_callable_object *c, thx_entry *e, const thx_ambient *a, PyObject *const *args,
                      Py_ssize_t npositional, PyObject *kwnames, thx_leaves *leaves) {
    if (e->dead || memcmp(&e->ambient, a, sizeof *a) != 0) return 0;
    int same = thx_arguments_match(c->x, e, args, npositional, kwnames, leaves);
    for (uint32_t i = 0; i < e->nidentical && same == 1; i++)
        same = leaves->items[e->identical[i].leaf] == e->identical[i].tensor;
    if (same == 1 && !still_absent(e, leaves)) same = 0;
    thx_guards_pin(e->guards, e->running > 1); /* the tensors of a run that goes on stay */
    int holds = same == 1 ? thx_guards_check(c->x, e->guards) : same;
    if (holds == 1) holds = thx_numbers_hold(e, leaves);
    if (holds == 1) holds = thx_entry_match_grads(c->x, e, leaves);
    if (holds == 1 && e->main.literals.sizes && !thx_sizes_hold(c->x, e, leaves)) return 0;
    if (holds == 1 && e->compares && !are_strangers(e, leaves)) return 0;
    if (holds == 1 && e->known && (same = thx_args_meet(e->args, args, e->nargs, e->known))) return same < 0 ? -1 : 0;
    if (holds == 1 && e->offsets && !same_offsets(c->x, e, leaves)) return 0;
    return holds == 1 && e->writes_inputs ? same_sharing(c->x, e, leaves) : holds;
}

/* ---- running an entry ---- */

typedef struct output {
    thx *x;
    const thx_entry *e;
    th_slot *slots;
} output;

static PyObject *output_leaf(void *user, uint32_t leaf) {
    output *o = user;
    if (leaf & THX_EXTENT_LEAF)
        return PyLong_FromLongLong((intptr_t)o->slots[o->e->nroots + (leaf & ~THX_EXTENT_LEAF)].handle);
    return Py_XNewRef(thx_slot_object(o->x, &o->slots[o->e->result_slots[leaf]]));
}

static int replay_write(const thx_write *w, PyObject *value) {
    return PyType_Check(w->dict)    ? PyObject_SetAttr(w->dict, w->key, value)
           : PyODict_Check(w->dict) ? PyODict_SetItem(w->dict, w->key, value)
                                    : PyDict_SetItem(w->dict, w->key, value);
}

/* What is written to attributes; new references, as a change may drop the last one to what a later one writes. */
static PyObject *written_values(thx *x, const thx_entry *e, th_slot *slots) {
    PyObject *values = PyTuple_New(e->nwrites);
    for (uint32_t i = 0; values && i < e->nwrites; i++) {
        const thx_write *w = &e->writes[i];
        PyObject *value = w->constant ? w->constant : thx_slot_object(x, &slots[w->slot]);
        if (!value)
            Py_CLEAR(values);
        else
            PyTuple_SET_ITEM(values, i, Py_NewRef(value));
    }
    return values;
}

/* Changes of Python state, in the order in which they were found. */
static int replay(thx *x, const thx_entry *e, th_slot *slots, PyObject *const *contents, const thx_inputs *inputs) {
    PyObject *values = written_values(x, e, slots);
    PyObject **owners = values && e->effects.count ? thx_effects_owners(&e->effects, inputs) : NULL;
    int rc = !values || (e->effects.count && !owners) ? -1 : 0;
    uint32_t write = 0;
    for (uint32_t i = 0; rc == 0 && i < e->effects.count; i++) {
        for (; rc == 0 && write < e->effects.items[i].after; write++)
            rc = replay_write(&e->writes[write], PyTuple_GET_ITEM(values, write));
        if (rc == 0) rc = thx_effect_apply(&e->effects.items[i], owners[i], contents[i]);
    }
    for (; rc == 0 && write < e->nwrites; write++)
        rc = replay_write(&e->writes[write], PyTuple_GET_ITEM(values, write));
    thx_effects_forget(&e->effects, owners);
    Py_XDECREF(values);
    return rc;
}

static void refresh_roots(thx *x, thx_entry *e) { /* a bound tensor was replaced by one of the same kind */
    PyObject *const *live;
    thx_guards_bound(e->guards, &live);
    for (uint32_t i = 0; i < e->nroots; i++)
        if (e->root_leaf[i] < 0) {
            e->roots[i].object = live[-1 - e->root_leaf[i]];
            e->roots[i].handle = x->abi.on ? thx_borrow(&x->abi, e->roots[i].object) : NULL;
        }
    e->generation = thx_guards_generation(e->guards);
}

typedef struct filling {
    thx *x;
    thx_entry *e;
    const thx_leaves *leaves;
    thx_request *call;
} filling;

static int fill_roots(void *user, th_slot *slots) {
    const filling *f = user;
    memcpy(slots, f->e->roots, sizeof *slots * f->e->nroots);
    for (uint32_t i = 0; i < f->e->nroots; i++)
        if (f->e->root_leaf[i] >= 0) {
            slots[i].object = f->leaves->items[f->e->root_leaf[i]];
            slots[i].handle = f->x->abi.on ? thx_borrow(&f->x->abi, slots[i].object) : NULL;
        }
    return 0;
}

/* The plan has run: its results as the caller gets them, writes to state replayed, everything else released. */
static PyObject *finish(thx *x, thx_entry *e, const thx_leaves *leaves, th_slot *slots) {
    output o = {x, e, slots};
    const thx_inputs inputs = {e->args, leaves->args, e->nargs, NULL};
    PyObject *result = thx_result_build(x, &e->result, output_leaf, &o, &inputs);
    if (result && (e->effects.count || e->nwrites)) {
        PyObject *own = Py_NewRef(e->effects.count ? PyTuple_GET_ITEM(result, 0) : result);
        PyObject *const *contents = e->effects.count ? &PyTuple_GET_ITEM(result, 1) : NULL;
        if (replay(x, e, slots, contents, &inputs) < 0) Py_CLEAR(own);
        Py_SETREF(result, own);
    }
    th_frame frame = {.slots = slots, .user = x};
    th_plan_clear(e->main.plan, &frame);
    return result;
}

/* From where another entry's run has stopped, if it did and this program has run before. */
static int run_program(thx *x, thx_entry *e, th_slot *slots, thx_request *call) {
    if (!e->main.checked || !e->expected || !call || e->nundo || e->undo_random)
        return thx_program_run(x, &e->main, slots);
    const thx_resume *resume = NULL;
    if (call->left.entry && call->left_by) resume = thx_resume_find(x, e, call->left_by, call->left.at);
    if (!resume && PyErr_Occurred()) return -1;
    thx_left leave = {0};
    int rc = thx_program_resume(x, &e->main, slots, resume, &call->left, &leave);
    thx_left_clear(&call->left);
    if (leave.entry) {
        leave.entry = e->number;
        call->left = leave;
        call->left_by = e;
    }
    return rc;
}

static PyObject *run_plain(thx *x, thx_entry *e, const thx_leaves *leaves, thx_request *call) {
    th_slot fixed[THX_SLOTS_ON_STACK], *slots;
    filling f = {x, e, leaves, call};
    PyObject *result = NULL;
    for (int rc = 1; rc == 1;) {
        uint32_t n = e->main.plan->nslots;
        slots = n <= THX_SLOTS_ON_STACK ? fixed : PyMem_Malloc(sizeof *slots * n);
        if (!slots) return PyErr_NoMemory();
        fill_roots(&f, slots);
        memset(slots + e->nroots, 0, sizeof *slots * (e->main.plan->nroots - e->nroots));
        PyObject *numbers = e->formula ? thx_numbers_values(e, leaves) : NULL;
        if (numbers) thx_literals_fill(&e->main, numbers, slots);
        bool ready = e->formula               ? numbers != NULL
                     : e->main.literals.sizes ? thx_sizes_start(x, e, leaves, slots + e->nroots)
                                              : true;
        rc = ready ? run_program(x, e, slots, call) : -1;
        Py_XDECREF(numbers);
        if (rc == 1 && thx_entry_place(x, e) < 0) rc = -1;
        if (rc == 0) result = finish(x, e, leaves, slots);
        if (slots != fixed) PyMem_Free(slots);
    }
    return result;
}

/* Gradients that the function itself switched on are on for its node too. */
static int under_grad_mode(thx *x, const thx_entry *e, thx_forward *run) {
    if (e->ambient.grad) return thx_forward_run(x, run);
    PyObject *done = PyObject_CallOneArg(x->set_grad, Py_True), *type, *value, *trace;
    int rc = done ? thx_forward_run(x, run) : -1;
    Py_XDECREF(done);
    PyErr_Fetch(&type, &value, &trace);
    done = PyObject_CallOneArg(x->set_grad, Py_False);
    Py_XDECREF(done);
    PyErr_Restore(type, value, trace);
    return rc;
}

static int run_filled(void *user, th_slot *slots) {
    const filling *f = user;
    if (f->e->main.literals.sizes && !thx_sizes_start(f->x, f->e, f->leaves, slots + f->e->nroots)) return -1;
    return run_program(f->x, f->e, slots, f->call);
}

/* Under autograd: a node of ours in its graph runs the plan. */
static PyObject *run_differentiable(thx *x, thx_entry *e, const thx_leaves *leaves, thx_request *call) {
    filling f = {x, e, leaves, call};
    thx_forward run = {.program = &e->main, .gradient = e->gradient, .fill = fill_roots, .run = run_filled, .user = &f};
    if (e->formula && !(run.numbers = thx_numbers_values(e, leaves))) return NULL;
    int rc = under_grad_mode(x, e, &run);
    Py_XDECREF(run.numbers);
    if (rc < 0) return NULL;
    PyObject *result = thx_entry_place(x, e) == 0 ? finish(x, e, leaves, run.slots) : NULL;
    thx_forward_fini(&run);
    return result;
}

static PyObject *run_in_inference_mode(thx *x, thx_entry *e, const thx_leaves *leaves, thx_request *call) {
    PyObject *mode = thx_enter(x, x->inference_mode);
    PyObject *result = mode ? run_plain(x, e, leaves, call) : NULL;
    if (mode) thx_leave(x, mode);
    return result;
}

static PyObject *run_in_mode(thx *x, thx_entry *e, const thx_leaves *leaves, thx_request *call) {
    thx_autocast cast;
    if (e->ambient.autocast && thx_autocast_off(x, &cast) < 0) return NULL;
    if (e->generation != thx_guards_generation(e->guards)) refresh_roots(x, e);
    PyObject *result = e->inference  ? run_in_inference_mode(x, e, leaves, call)
                       : e->gradient ? run_differentiable(x, e, leaves, call)
                                     : run_plain(x, e, leaves, call);
    if (e->ambient.autocast) thx_autocast_on(x, &cast);
    return result;
}

/* ---- entries for values of tensors ---- */

/* How to put back what a run does before it knows the values. */
static PyObject *remember(const thx *x, const thx_entry *e, const thx_leaves *leaves, bool random) {
    PyObject *tensors = PyList_New(e->nundo);
    for (uint32_t i = 0; tensors && i < e->nundo; i++) {
        int32_t leaf = e->root_leaf[e->undo[i]];
        PyObject *tensor = leaf >= 0 ? leaves->items[leaf] : e->roots[e->undo[i]].object;
        PyList_SET_ITEM(tensors, i, Py_NewRef(tensor));
    }
    PyObject *undo = tensors ? thx_undo_new(x, e->main.t, tensors, random) : NULL;
    Py_XDECREF(tensors);
    return undo;
}

static int put_back(PyObject *undo) { /* keeps the pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *done = PyObject_CallMethod(undo, "restore", NULL);
    if (!done) {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        return -1;
    }
    Py_DECREF(done);
    PyErr_Restore(type, value, trace);
    return 0;
}

static thx_entry *find_entry(const thx_callable_object *c, uint64_t number) {
    thx_entry *e = c->entries;
    while (e && e->number != number) e = e->next;
    return e;
}

bool thx_entry_leaves(const thx_entry *e) { return e->nwrites || e->writes_inputs || e->effects.count; }

bool thx_entry_may_fail_in_eager(const thx_callable_object *c, const thx_entry *e) {
    return !c->claims && (e->gradient || thx_guards_may_catch(c->x, e->guards));
}

/* Is a run that fails made again, so that its random draws have to be undone? Kernels that fail after they have drawn
 * do so for the types of what they are given: before any run has come to its end. */
static bool redraws(const thx_callable_object *c, const thx_entry *e) {
    return e->draws && !c->needs_transform && (thx_entry_leaves(e) || (!e->ran && thx_entry_may_fail_in_eager(c, e)));
}

/* The pending exception is a failure of the run, and the original is called in its place. */
static bool is_run_again(const thx *x, const thx_entry *e) {
    return (thx_entry_leaves(e) || e->main.failed) && PyErr_ExceptionMatches(PyExc_Exception) &&
           !PyErr_ExceptionMatches(x->StaleProgram) && !PyErr_ExceptionMatches(x->ValueChanged) &&
           thx_entry_is_untouched(e);
}

PyObject *thx_entry_run(thx_callable_object *c, thx_entry *e, const thx_leaves *leaves, thx_request *call) {
    thx *x = c->x;
    PyObject *undo = NULL;
    e->redraws = redraws(c, e);
    bool undoes = e->redraws || (e->expected && (e->nundo || e->undo_random));
    if (undoes && !(undo = remember(x, e, leaves, e->undo_random || e->redraws))) return NULL;
    if (call->left.entry) call->left_by = find_entry(c, call->left.entry);
    PyObject *result = run_in_mode(x, e, leaves, call);
    bool put = !result && undo && (PyErr_ExceptionMatches(x->ValueChanged) || (e->redraws && is_run_again(x, e)));
    if (put) put_back(undo);
    Py_XDECREF(undo);
    e->ran |= result != NULL;
    return result;
}
