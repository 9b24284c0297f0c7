/* The autograd node: forward and backward are C functions of a class made with torch's own metaclass.
 *
 *     call -> _FunctionBase.apply(run, x, w)         x, w: the inputs that require grad; run: a `pending` object
 *               forward(ctx, run, x, w)              runs the forward plan, hands results to torch
 *             y.backward() ... apply(ctx, gy)        runs the backward plan on what was saved
 *
 * What the user can see of the saved values (inputs, results) goes through torch's save_for_backward, with its checks
 * for later writes and its hooks; the rest stays in `pending`, as handles that no Python object was made for. With
 * saved tensor hooks active, everything goes through torch.
 */
#include "autograd.h"

#include "ambient.h"
#include "guards.h"
#include "lower.h"

typedef struct pending {               /* a run forwards, until it has run backwards for the last time */
    PyObject_VAR_HEAD thx_gradient *g; /* owned */
    thx_forward *run;                  /* while the run goes on */
    PyObject **inputs;                 /* of the call, for create_graph; owned; NULL where it was written to */
    long *versions;                    /* of those that torch does not keep */
    PyObject *numbers;                 /* tuple: the values of literals, or NULL; owned */
    PyObject *watched;                 /* tuple by result with a gradient of weak references to those that others are
                                          computed from, or None; NULL: there are none; owned */
    PyObject *keepers;                 /* tuple by kept result of what fills its .grad, or NULL; owned */
    bool all_shown, freed;
    th_slot kept[1]; /* by saved value: what torch does not keep */
} pending;

/* ---- a pending run ---- */

static void pending_release(pending *p) {
    thx_gradient *g = p->g;
    for (uint32_t i = 0; i < g->nsaved; i++) thx_slot_drop(g->x, &p->kept[i]);
    for (uint32_t i = 0; p->inputs && i < g->nroots; i++) Py_XDECREF(p->inputs[i]);
    PyMem_Free(p->inputs);
    PyMem_Free(p->versions);
    p->inputs = NULL;
    p->versions = NULL;
}

static void pending_dealloc(pending *p) {
    PyTypeObject *type = Py_TYPE(p);
    pending_release(p);
    Py_XDECREF(p->keepers);
    Py_XDECREF(p->watched);
    Py_XDECREF(p->numbers);
    Py_DECREF((PyObject *)p->g);
    type->tp_free((PyObject *)p);
    Py_DECREF(type);
}

static pending *pending_new(thx *x, thx_gradient *g, thx_forward *run) {
    pending *p = (pending *)x->Pending->tp_alloc(x->Pending, g->nsaved);
    if (!p) return NULL;
    p->g = (thx_gradient *)Py_NewRef((PyObject *)g);
    p->run = run;
    p->numbers = Py_XNewRef(run->numbers);
    return p;
}

/* ---- forward ---- */

static long version_of(thx *x, PyObject *tensor) {
    PyObject *v = x->version_get(tensor, x->version_closure);
    long version = v ? PyLong_AsLong(v) : -1;
    PyErr_Clear();
    Py_XDECREF(v);
    return version;
}

/* The inputs, for a backward that is itself differentiated; those that torch does not keep with the version they had.
 */
static int keep_inputs(thx *x, pending *p, const th_slot *slots) {
    const thx_gradient *g = p->g;
    p->inputs = PyMem_Calloc(g->nroots + 1, sizeof *p->inputs);
    p->versions = PyMem_Malloc(sizeof *p->versions * (g->nroots + 1));
    if (!p->inputs || !p->versions) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < g->nroots; i++) {
        p->inputs[i] = Py_NewRef((PyObject *)slots[i].object);
        p->versions[i] = -2;
    }
    for (uint32_t i = 0; i < g->nsaved; i++)
        if (g->saved[i].root >= 0) p->versions[g->saved[i].root] = -1;
    for (uint32_t i = 0; i < g->nroots; i++)
        if (p->versions[i] == -2) p->versions[i] = version_of(x, p->inputs[i]);
    for (uint32_t i = 0; i < g->nroots; i++)
        if (g->stale[i] & ROOT_GONE) Py_CLEAR(p->inputs[i]);
    for (uint32_t i = 0; i < g->nmutated; i++) Py_CLEAR(p->inputs[g->mutated[i]]); /* it will refer to this node */
    return 0;
}

static th_slot *result_slot(const thx_forward *f, uint32_t n) { return &f->slots[thx_program_result(f->program, n)]; }

/* A result in the form that a node may return: an object that is no view for autograd. */
static PyObject *result_object(thx *x, th_slot *slot) {
    if (slot->object && x->abi.on && x->abi.aoti_torch__reinterpret_tensor) {
        PyObject *view = PyObject_CallOneArg(x->is_view, slot->object);
        if (!view) return NULL;
        Py_DECREF(view);
        if (view == Py_True) {
            thx_meta m;
            th_h h = NULL;
            if (thx_read_meta(x, slot->object, false, &m) < 0) return NULL;
            if (x->abi.aoti_torch__reinterpret_tensor(thx_slot_handle(x, slot), m.ndim, m.shape, m.stride, 0, &h) ==
                0) {
                PyObject *plain = thx_wrap(&x->abi, h);
                if (!plain) return NULL;
                thx_slot_drop(x, slot);
                slot->object = plain;
                slot->owns_object = true;
            }
        }
    }
    return thx_slot_object(x, slot);
}

/* A result in an input's memory, as a view of the input: torch refuses to write to it, since the input's gradient would
 * not know. */
static PyObject *result_view(thx *x, th_slot *slot, PyObject *input) {
    PyObject *o = result_object(x, slot);
    PyObject *size = o ? PyObject_CallMethod(o, "size", NULL) : NULL, *stride = NULL, *offset = NULL, *view = NULL;
    if (size && (stride = PyObject_CallMethod(o, "stride", NULL)) &&
        (offset = PyObject_CallMethod(o, "storage_offset", NULL)))
        view = PyObject_CallMethod(input, "as_strided", "OOO", size, stride, offset);
    Py_XDECREF(size);
    Py_XDECREF(stride);
    Py_XDECREF(offset);
    if (!view) return NULL;
    thx_slot_drop(x, slot);
    slot->object = view;
    slot->owns_object = true;
    return view;
}

/* A result that shares memory with another one, as one of several views: torch refuses to write to it where gradients
 * are computed, since the other's gradient would not know. */
static PyObject *result_aliased(thx *x, th_slot *slot) {
    PyObject *o = result_object(x, slot), *view = o ? PyObject_CallMethod(o, "view_as", "O", o) : NULL;
    if (!view) return NULL;
    thx_slot_drop(x, slot);
    slot->object = view;
    slot->owns_object = true;
    return view;
}

/* Values that torch keeps: a tuple in the order of the saved ones. */
static PyObject *shown_tuple(thx *x, const pending *p, thx_forward *f) {
    const thx_gradient *g = p->g;
    uint32_t n = 0;
    for (uint32_t i = 0; i < g->nsaved; i++) n += p->all_shown || g->saved[i].shown;
    PyObject *tuple = PyTuple_New(n);
    for (uint32_t i = 0, at = 0; tuple && i < g->nsaved; i++) {
        const thx_saved *s = &g->saved[i];
        if (!p->all_shown && !s->shown) continue;
        PyObject *o = s->root >= 0 ? f->slots[s->root].object : thx_slot_object(x, result_slot(f, s->value));
        if (!o)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, at++, Py_NewRef(o));
    }
    return tuple;
}

static void keep_hidden(pending *p, thx_forward *f) {
    const thx_gradient *g = p->g;
    for (uint32_t i = 0; i < g->nsaved && !p->all_shown; i++) {
        if (g->saved[i].shown) continue;
        th_slot *slot = result_slot(f, g->saved[i].value);
        p->kept[i] = *slot;
        slot->owns_handle = slot->owns_object = false; /* still readable by the caller, no longer its own */
    }
}

static int run_program(thx *x, thx_forward *f) {
    for (;;) {
        uint32_t n = f->program->plan->nslots;
        f->slots = n <= THX_SLOTS_ON_STACK ? f->fixed : PyMem_Malloc(sizeof *f->slots * n);
        if (!f->slots) return PyErr_NoMemory(), -1;
        int rc = f->fill(f->user, f->slots);
        if (f->numbers) thx_literals_fill(f->program, f->numbers, f->slots);
        rc = rc < 0 ? -1 : f->run(f->user, f->slots);
        if (rc == 0) return 0;
        thx_forward_fini(f);
        if (rc < 0) return -1;
    }
}

void thx_forward_fini(thx_forward *f) {
    if (f->slots && f->slots != f->fixed) PyMem_Free(f->slots);
    f->slots = NULL;
}

/* forward(ctx, pending, *tensors) */
static PyObject *forward(PyObject *module, PyObject *const *a, Py_ssize_t n) {
    thx *x = PyModule_GetState(module);
    if (n < 2 || !Py_IS_TYPE(a[1], x->Pending) || !((pending *)a[1])->run)
        return PyErr_Format(PyExc_TypeError, "this function is thunder's own");
    pending *p = (pending *)a[1];
    thx_forward *f = p->run;
    const thx_gradient *g = p->g;
    PyObject *hooks = x->top_hooks ? PyObject_CallOneArg(x->top_hooks, Py_False) : Py_NewRef(Py_None);
    if (!hooks) return NULL;
    p->all_shown = hooks != Py_None || !x->keep_graph; /* without that, only torch knows when to let go */
    Py_DECREF(hooks);
    if (run_program(x, f) < 0) return NULL;
    PyObject *outs = PyTuple_New(g->ntangents);
    for (uint32_t i = 0; outs && i < g->ntangents; i++) {
        th_slot *slot = result_slot(f, g->tangent_of[i]);
        PyObject *o = g->base_of[i] >= 0 ? result_view(x, slot, f->slots[g->base_of[i]].object)
                      : g->aliased[i]    ? result_aliased(x, slot)
                                         : result_object(x, slot);
        if (!o)
            Py_CLEAR(outs);
        else
            PyTuple_SET_ITEM(outs, i, Py_NewRef(o));
    }
    PyObject *shown = outs ? shown_tuple(x, p, f) : NULL;
    if (!shown || keep_inputs(x, p, f->slots) < 0 || PyObject_SetAttr(a[0], x->n.to_save, shown) < 0 ||
        PyObject_SetAttr(a[0], x->n.materialize_grads, Py_False) < 0 || PyObject_SetAttr(a[0], x->n.pending, a[1]) < 0)
        Py_CLEAR(outs);
    Py_XDECREF(shown);
    if (outs) keep_hidden(p, f);
    return outs;
}

static int take_outs(thx_forward *f, PyObject *outs) {
    const thx_gradient *g = f->gradient;
    if (!PyTuple_Check(outs) || PyTuple_GET_SIZE(outs) != g->ntangents) {
        PyErr_SetString(PyExc_SystemError, "autograd returned another number of results");
        return -1;
    }
    for (uint32_t i = 0; i < g->ntangents; i++) {
        th_slot *slot = result_slot(f, g->tangent_of[i]);
        PyObject *o = PyTuple_GET_ITEM(outs, i);
        if (slot->object == o) continue;
        thx_slot_drop(g->x, slot);
        slot->object = Py_NewRef(o);
        slot->owns_object = true;
    }
    return 0;
}

static PyObject *kernel(const char *name) {
    PyObject *module = PyImport_ImportModule("thunder._kernels");
    PyObject *found = module ? PyObject_GetAttrString(module, name) : NULL;
    Py_XDECREF(module);
    return found;
}

/* The results that retain their gradients, as the user will have them. */
static int keep_gradients_of(thx *x, pending *p, thx_forward *f) {
    const thx_gradient *g = p->g;
    if (!g->nkept) return 0;
    PyObject *cls = kernel("Kept");
    p->keepers = cls ? PyTuple_New(g->nkept) : NULL;
    for (uint32_t i = 0; p->keepers && i < g->nkept; i++) {
        PyObject *o = thx_slot_object(x, result_slot(f, g->kept[i]));
        PyObject *keeper = o ? PyObject_CallOneArg(cls, o) : NULL;
        if (!keeper)
            Py_CLEAR(p->keepers);
        else
            PyTuple_SET_ITEM(p->keepers, i, keeper);
    }
    Py_XDECREF(cls);
    return p->keepers ? 0 : -1;
}

static int watch_results(thx *x, pending *p, thx_forward *f) {
    const thx_gradient *g = p->g;
    uint64_t any = 0;
    for (uint32_t i = 0; g->above && i < g->ntangents; i++) any |= g->above[i];
    for (uint32_t i = 0; i < g->nkept && any; i++) /* those that retain it inside get all of it */
        for (uint32_t j = 0; j < g->ntangents; j++)
            if (g->tangent_of[j] == g->kept[i]) any &= ~(UINT64_C(1) << j);
    p->watched = any ? PyTuple_New(g->ntangents) : NULL;
    for (uint32_t i = 0; p->watched && i < g->ntangents; i++) {
        PyObject *o = any >> i & 1 ? thx_slot_object(x, result_slot(f, g->tangent_of[i])) : NULL, *none = Py_None;
        PyObject *reference = any >> i & 1 ? (o ? PyWeakref_NewRef(o, NULL) : NULL) : Py_NewRef(none);
        if (!reference) return -1;
        PyTuple_SET_ITEM(p->watched, i, reference);
    }
    return any && !p->watched ? -1 : 0;
}

static bool wants_gradient(PyObject *tensor) {
    PyObject *retains = PyObject_GetAttrString(tensor, "retains_grad");
    PyObject *hooks = PyObject_GetAttrString(tensor, "_backward_hooks");
    bool wants = retains == Py_True || (hooks && hooks != Py_None && PyObject_IsTrue(hooks) == 1);
    PyErr_Clear();
    Py_XDECREF(hooks);
    Py_XDECREF(retains);
    return wants;
}

/* All results leave one node: what flows from one of them to another inside does not come by outside, where torch would
 * look for it. */
static int check_watched(const pending *p, uint64_t absent) {
    const thx_gradient *g = p->g;
    for (uint32_t i = 0; p->watched && i < g->ntangents; i++) {
        PyObject *reference = PyTuple_GET_ITEM(p->watched, i), *o = NULL;
        if (reference != Py_None) o = PyWeakref_GetObject(reference);
        if (!o || o == Py_None || !wants_gradient(o)) continue;
        for (uint32_t j = 0; j < g->ntangents; j++) {
            if (absent >> j & 1 || !(g->above[j] >> i & 1)) continue;
            PyErr_Format(
                PyExc_RuntimeError,
                "thunder: the gradient of result %u is asked for, by retain_grad() or a hook, and result %u of "
                "the same call is computed from it: that part of it is known inside the compiled function "
                "alone. Call retain_grad() or register_hook() there",
                (unsigned)g->tangent_of[i], (unsigned)g->tangent_of[j]);
            return -1;
        }
    }
    return 0;
}

/* Inputs that take new contents, in autograd's sight. */
static int write_inputs(thx *x, thx_forward *f) {
    const thx_gradient *g = f->gradient;
    for (uint32_t i = 0; i < g->nmutated; i++) {
        PyObject *target = f->slots[g->mutated[i]].object;
        PyObject *contents = thx_slot_object(x, result_slot(f, g->nresults - g->nmutated + i));
        PyObject *done = contents ? PyObject_CallMethod(target, "copy_", "O", contents) : NULL;
        Py_XDECREF(done);
        if (!done) return -1;
    }
    return 0;
}

/* Torch refuses to save inference tensors, and eager may save others than we do: that is found out before anything
 * runs, so that eager can. What requires grad is none. */
static int refuse_inference(thx *x, thx_forward *f, const th_slot *roots) {
    const thx_gradient *g = f->gradient;
    for (uint32_t i = 0; i < g->nsaved; i++) {
        if (g->saved[i].root < 0 || g->saved[i].grad) continue;
        if (thx_is_ordinary(&x->abi, roots[g->saved[i].root].object)) continue;
        PyObject *inference = PyObject_CallOneArg(x->is_inference, roots[g->saved[i].root].object);
        if (!inference) return -1;
        Py_DECREF(inference); /* a singleton */
        if (inference == Py_False) continue;
        f->program->failed = 1;
        PyErr_SetString(PyExc_RuntimeError, "Inference tensors cannot be saved for backward");
        return -1;
    }
    return 0;
}

int thx_forward_run(thx *x, thx_forward *f) {
    thx_gradient *g = f->gradient;
    f->slots = NULL;
    pending *p = pending_new(x, g, f);
    PyObject *fixed[16], **args = g->nwrt + 2 <= 16 ? fixed : PyMem_Malloc(sizeof *args * (g->nwrt + 2)), *outs = NULL;
    th_slot few[32], *roots = g->nroots <= 32 ? few : PyMem_Malloc(sizeof *roots * g->nroots);
    if (!args || !roots) PyErr_NoMemory();
    if (p && args && roots && f->fill(f->user, roots) == 0 && refuse_inference(x, f, roots) == 0) {
        args[1] = (PyObject *)p;
        for (uint32_t i = 0; i < g->nwrt; i++) args[2 + i] = roots[g->wrt[i]].object;
        outs = PyObject_Vectorcall(x->apply, args + 1, (g->nwrt + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    }
    if (args != fixed) PyMem_Free(args);
    if (roots != few) PyMem_Free(roots);
    if (p) p->run = NULL;
    int rc = outs ? take_outs(f, outs) : -1;
    if (rc == 0) rc = keep_gradients_of(x, p, f);
    if (rc == 0) rc = watch_results(x, p, f);
    Py_XDECREF((PyObject *)p);
    Py_XDECREF(outs);
    if (rc == 0) rc = write_inputs(x, f);
    if (rc < 0 && f->slots) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        for (uint32_t i = g->nroots; i < f->program->plan->nslots; i++) thx_slot_drop(x, &f->slots[i]);
        thx_forward_fini(f);
        PyErr_Restore(type, value, trace);
    }
    return rc;
}

/* ---- backward ---- */

/* A tensor of the type, filled from `source` or with zeros. New reference. */
static PyObject *laid_out(thx *x, const th_type *t, PyObject *source) {
    PyObject *device = thx_device_object(x, t->device), *done = NULL;
    PyObject *tensor = device ? thx_empty_strided(x, t, device) : NULL;
    if (tensor)
        done = source ? PyObject_CallMethod(tensor, "copy_", "O", source) : PyObject_CallMethod(tensor, "zero_", NULL);
    Py_XDECREF(device);
    if (!done) Py_CLEAR(tensor);
    Py_XDECREF(done);
    return tensor;
}

static bool laid_out_so(thx *x, PyObject *tensor, const th_type *t) {
    thx_meta m;
    if (thx_read_meta(x, tensor, false, &m) < 0) {
        PyErr_Clear();
        return false;
    }
    bool same = m.dtype == t->dtype && m.ndim == t->ndim, empty = th_type_numel(t) == 0;
    for (uint32_t i = 0; same && i < t->ndim; i++)
        same = m.shape[i] == t->shape[i] && (empty || m.shape[i] <= 1 || m.stride[i] == t->stride[i]);
    return same;
}

/* Zeros in the place of a gradient that did not come in. Hooks ask whether any did. */
static PyObject *undefined(thx *x, const thx_gradient *g, const th_type *type) {
    PyObject *zeros = laid_out(x, type, NULL), *mark = zeros && g->hooks ? kernel("undefined") : NULL;
    PyObject *marked = mark ? PyObject_CallOneArg(mark, zeros) : NULL;
    if (zeros && g->hooks && !marked) Py_CLEAR(zeros);
    Py_XDECREF(mark);
    Py_XDECREF(marked);
    return zeros;
}

/* The gradients in the layout that the backward program was made for; a list of new references. */
static PyObject *settle_tangents(thx *x, const thx_gradient *g, PyObject *const *grads, const th_trace *t,
                                 bool as_they_are) {
    PyObject *list = PyList_New(g->ntangents);
    for (uint32_t i = 0; list && i < g->ntangents; i++) {
        th_val v = t->inputs[t->ninputs - g->ntangents + i];
        const th_type *type = th_type_get(x->ctx, t->values[v].type);
        PyObject *o = grads[i];
        if (o == Py_None)
            o = undefined(x, g, type);
        else if (as_they_are || laid_out_so(x, o, type))
            o = Py_NewRef(o);
        else
            o = laid_out(x, type, o);
        if (!o)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, o);
    }
    return list;
}

/* 1 some gradient is a wrapper around others (vmap), 0 none, -1 error. */
static int any_batched(thx *x, PyObject *const *grads, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        if (grads[i] == Py_None) continue;
        PyObject *const tests[] = {x->is_functorch, x->is_legacy_batched};
        for (int j = 0; j < 2; j++) {
            PyObject *yes = tests[j] ? PyObject_CallOneArg(tests[j], grads[i]) : Py_NewRef(Py_False);
            if (!yes) return -1;
            Py_DECREF(yes);
            if (yes == Py_True) return 1;
        }
    }
    return 0;
}

/* vmap runs the backward on many gradients at once: each operation must go through torch's dispatcher. */
static thx_program *batched_program(thx *x, thx_gradient *g) {
    if (g->batched.plan) return &g->batched;
    if (!g->batched.t && thx_check(x, th_trace_clone(g->backward.t, &g->batched.t)) < 0) return NULL;
    return thx_literals_find(g->numbers, g->nnumbers, &g->batched) < 0 || thx_program_lower(x, &g->batched, true) < 0
               ? NULL
               : &g->batched;
}

static void put_object(thx *x, th_slot *slot, PyObject *o) {
    *slot = (th_slot){.object = o, .handle = x->abi.on ? thx_borrow(&x->abi, o) : NULL};
}

typedef struct sources {
    thx *x;
    pending *p;
    PyObject *shown;    /* tuple: what torch kept */
    PyObject *tangents; /* list */
    bool spend;         /* the run may have what `pending` kept: nobody comes for it again */
} sources;

/* What the run spent is gone; the rest, and objects that were made for handles, go here. */
static void give_up_inputs(thx *x, const thx_program *program, th_slot *slots) {
    for (uint32_t i = 0; i < program->plan->nroots; i++) thx_slot_drop(x, &slots[i]);
}

/* Run a program whose inputs are given and collect the gradients: (None, gradient of each input that requires grad,
 * then of each result that retains its own). */
static PyObject *run_gradients(thx *x, const thx_gradient *g, thx_program *program,
                               void (*fill)(sources *s, th_slot *slots), sources *s) {
    th_slot fixed[THX_SLOTS_ON_STACK], *slots = fixed;
    for (int rc = 1; rc == 1;) {
        uint32_t n = program->plan->nslots;
        slots = n <= THX_SLOTS_ON_STACK ? fixed : PyMem_Malloc(sizeof *slots * n);
        if (!slots) return PyErr_NoMemory();
        fill(s, slots);
        if (s->p->numbers) thx_literals_fill(program, s->p->numbers, slots);
        rc = thx_program_run(x, program, slots);
        if (rc) give_up_inputs(x, program, slots);
        if (rc && slots != fixed) PyMem_Free(slots);
        if (rc < 0) return NULL;
    }
    PyObject *result = PyTuple_New(g->nwrt + g->nkept + 1);
    if (result) PyTuple_SET_ITEM(result, 0, Py_NewRef(Py_None));
    for (uint32_t i = 0; result && i < g->nwrt + g->nkept; i++) {
        uint32_t at = thx_program_result(program, i);
        PyObject *o = at == UINT32_MAX ? Py_None : thx_slot_object(x, &slots[at]);
        if (!o)
            Py_CLEAR(result);
        else
            PyTuple_SET_ITEM(result, i + 1, Py_NewRef(o));
    }
    th_frame frame = {.slots = slots, .user = x};
    th_plan_clear(program->plan, &frame);
    give_up_inputs(x, program, slots);
    if (slots != fixed) PyMem_Free(slots);
    return result;
}

static void fill_backward(sources *s, th_slot *slots) {
    const thx_gradient *g = s->p->g;
    Py_ssize_t at = 0;
    for (uint32_t i = 0; i < g->nsaved; i++) {
        if (s->p->all_shown || g->saved[i].shown) {
            put_object(s->x, &slots[i], PyTuple_GET_ITEM(s->shown, at++));
        } else {
            slots[i] = s->p->kept[i];
            if (s->spend)
                s->p->kept[i] = (th_slot){0};
            else
                slots[i].owns_handle = slots[i].owns_object = false;
        }
    }
    for (uint32_t i = 0; i < g->ntangents; i++)
        put_object(s->x, &slots[g->nsaved + i], PyList_GET_ITEM(s->tangents, i));
}

static void fill_again(sources *s, th_slot *slots) {
    const thx_gradient *g = s->p->g;
    for (uint32_t i = 0; i < g->nroots; i++) put_object(s->x, &slots[i], s->p->inputs[i]);
    Py_ssize_t at = 0;
    for (uint32_t i = 0; i < g->nsaved; i++) { /* with its history, and checked for writes */
        if (!s->p->all_shown && !g->saved[i].shown) continue;
        int32_t root = g->saved[i].root;
        if (root >= 0 && !g->stale[root]) put_object(s->x, &slots[root], PyTuple_GET_ITEM(s->shown, at));
        at++;
    }
    for (uint32_t i = 0; i < g->ntangents; i++)
        put_object(s->x, &slots[g->nroots + i], PyList_GET_ITEM(s->tangents, i));
}

/* The backward is itself to be differentiated: compute the gradients from the inputs, operation by operation under
 * autograd. */
static PyObject *backward_graph(sources *s, uint64_t absent) {
    thx *x = s->x;
    thx_program *program = NULL;
    bool *shared;
    thx_gradient *g = s->p->g;
    if (g->again_random) {
        PyErr_SetString(
            PyExc_RuntimeError,
            "thunder: create_graph=True needs the forward pass again, and it draws random numbers (dropout, "
            "say), which would differ. Call the original module for the part that is differentiated twice, "
            "or switch its dropout off");
        return NULL;
    }
    for (uint32_t i = 0; i < g->nroots; i++) {
        if (s->p->inputs[i] && (s->p->versions[i] < 0 || version_of(x, s->p->inputs[i]) == s->p->versions[i])) continue;
        PyErr_SetString(PyExc_RuntimeError,
                        "thunder: create_graph=True needs an input of the compiled call as it was, and it has been "
                        "modified by an inplace operation since");
        return NULL;
    }
    for (uint32_t i = 0; i < g->nroots; i++) {
        if (!g->stale[i]) continue;
        PyObject *copy = PyObject_CallMethod(s->p->inputs[i], "clone", NULL);
        if (!copy) return NULL;
        Py_SETREF(s->p->inputs[i], copy);
        s->p->versions[i] = version_of(x, copy);
    }
    if (absent && thx_partial_find(x, g, absent, true, &program, &shared) < 0) return NULL;
    if (!program && !g->again.plan &&
        (thx_literals_find(g->numbers, g->nnumbers, &g->again) < 0 || thx_program_lower(x, &g->again, true) < 0))
        return NULL;
    return run_gradients(x, g, program ? program : &g->again, fill_again, s);
}

/* Which of the gradients did not come in, by bit. Hooks of the user's are asked either way. */
static uint64_t absent_of(const thx_gradient *g, PyObject *const *grads) {
    uint64_t absent = 0;
    for (uint32_t i = 0; i < g->ntangents && g->ntangents <= 64; i++)
        if (grads[i] == Py_None) absent |= UINT64_C(1) << i;
    return absent;
}

/* A leaf keeps the gradient that it gets, and adds to it in place. */
static int copy_shared(const thx_gradient *g, const bool *shared, PyObject *result) {
    for (uint32_t i = 0; i < g->nwrt; i++) {
        PyObject *grad = PyTuple_GET_ITEM(result, i + 1);
        if (!shared[i] || grad == Py_None) continue;
        PyObject *copy = PyObject_CallMethod(grad, "clone", NULL);
        if (!copy) return -1;
        PyTuple_SET_ITEM(result, i + 1, copy);
        Py_DECREF(grad);
    }
    return 0;
}

/* A gradient that depends on none of those that came in is none, as in eager. */
static void drop_undefined(const thx_gradient *g, uint64_t absent, PyObject *result) {
    for (uint32_t i = 0; i < g->nwrt + g->nkept; i++) {
        if (!g->depends[i] || g->depends[i] & ~absent) continue;
        Py_DECREF(PyTuple_GET_ITEM(result, i + 1));
        PyTuple_SET_ITEM(result, i + 1, Py_NewRef(Py_None));
    }
}

/* The gradients that results retain go to them; the rest is autograd's. Takes the tuple. */
static PyObject *hand_out(const pending *p, PyObject *result) {
    const thx_gradient *g = p->g;
    if (!result || !g->nkept) return result;
    PyObject *rest = PyTuple_GetSlice(result, 0, g->nwrt + 1);
    for (uint32_t i = 0; rest && i < g->nkept; i++) {
        PyObject *total = PyTuple_GET_ITEM(result, g->nwrt + 1 + i);
        if (total == Py_None || !p->keepers) continue;
        PyObject *done = PyObject_CallMethod(PyTuple_GET_ITEM(p->keepers, i), "add", "O", total);
        if (!done) Py_CLEAR(rest);
        Py_XDECREF(done);
    }
    Py_DECREF(result);
    return rest;
}

static bool keeps_graph(thx *x) {
    PyObject *keep = x->keep_graph ? PyObject_CallNoArgs(x->keep_graph) : NULL;
    PyErr_Clear();
    Py_XDECREF(keep);
    return keep != Py_False; /* unknown: yes */
}

/* A backward function of the user's reads what has changed since it was compiled: eager's would see it. */
static int check_reads(thx *x, const thx_gradient *g) {
    int holds = g->reads ? thx_guards_check(x, g->reads) : 1;
    if (holds) return holds < 0 ? -1 : 0;
    PyObject *cause = thx_guards_cause(x, g->reads);
    if (!cause || cause == Py_None) {
        Py_XDECREF(cause);
        return cause ? 0 : -1;
    }
    PyErr_Format(PyExc_RuntimeError,
                 "thunder: a backward function reads what has changed since the forward call: %S. Pass it to the "
                 "forward and keep it in ctx",
                 PyTuple_GET_ITEM(cause, 0));
    Py_DECREF(cause);
    return -1;
}

/* x.data = y counts as no write. What the kernels then would take for numbers of the former kind is refused. */
static int check_saved(const sources *s) {
    const thx_gradient *g = s->p->g;
    const th_trace *t = g->backward.t;
    Py_ssize_t at = 0;
    for (uint32_t i = 0; i < g->nsaved && !s->p->all_shown; i++) {
        if (!g->saved[i].shown) continue;
        PyObject *o = PyTuple_GET_ITEM(s->shown, at++);
        if (g->saved[i].root < 0 || laid_out_so(s->x, o, th_type_get(s->x->ctx, t->values[t->inputs[i]].type)))
            continue;
        PyErr_SetString(PyExc_RuntimeError,
                        "thunder: an input that the backward needs has another dtype or layout than at the forward "
                        "call: its .data was assigned to");
        return -1;
    }
    return 0;
}

/* apply(ctx, *gradients), called by the engine. */
static PyObject *apply(PyObject *module, PyObject *const *a, Py_ssize_t n) {
    thx *x = PyModule_GetState(module);
    pending *p = n > 0 ? (pending *)PyObject_GetAttr(a[0], x->n.pending) : NULL;
    if (!p || !Py_IS_TYPE((PyObject *)p, x->Pending) || (uint32_t)n - 1 != p->g->ntangents) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "this function is thunder's own");
        Py_XDECREF((PyObject *)p);
        return NULL;
    }
    sources s = {x, p, NULL, NULL, false};
    uint64_t absent = absent_of(p->g, a + 1);
    bool keep = keeps_graph(x), *shared = p->g->shared;
    PyObject *result = NULL;
    if (p->freed)
        PyErr_SetString(PyExc_RuntimeError,
                        "Trying to backward through the graph a second time (or directly access saved tensors after "
                        "they have already been freed). Saved intermediate values of the graph are freed when you call "
                        ".backward() or autograd.grad(). Specify retain_graph=True if you need to backward through the "
                        "graph a second time or if you need to access saved tensors after calling backward.");
    else if (check_reads(x, p->g) == 0 && check_watched(p, absent) == 0)
        s.shown = PyObject_GetAttr(a[0], x->n.saved_tensors);
    int graph = thx_grad_mode(x), batched = s.shown ? any_batched(x, a + 1, p->g->ntangents) : 0;
    thx_autocast cast;
    if (batched < 0 || (s.shown && check_saved(&s) < 0)) Py_CLEAR(s.shown);
    if (s.shown && graph >= 0 && thx_autocast_off(x, &cast) == 0) {
        s.tangents = settle_tangents(x, p->g, a + 1, p->g->backward.t, graph || batched);
        if (s.tangents && graph)
            result = backward_graph(&s, p->g->hooks ? 0 : absent);
        else if (s.tangents) {
            thx_program *program = batched ? batched_program(x, p->g) : &p->g->backward;
            if (absent && !batched && !p->g->hooks && thx_partial_find(x, p->g, absent, false, &program, &shared) < 0)
                program = NULL;
            s.spend = program && program->checked && !keep; /* else the run may have to start over */
            p->freed |= s.spend;
            result = program ? run_gradients(x, p->g, program, fill_backward, &s) : NULL;
        }
        thx_autocast_on(x, &cast);
    }
    if (result) drop_undefined(p->g, absent, result);
    if (result && !graph && copy_shared(p->g, shared, result) < 0) Py_CLEAR(result);
    result = hand_out(p, result);
    if (result && !keep) {
        p->freed = true;
        pending_release(p);
    }
    Py_XDECREF(s.shown);
    Py_XDECREF(s.tangents);
    Py_DECREF((PyObject *)p);
    return result;
}

/* ---- types ---- */

static PyType_Slot pending_slots[] = {
    {Py_tp_dealloc, pending_dealloc}, {Py_tp_doc, "A run forwards that may run backwards."}, {0, NULL}};
static PyType_Spec pending_spec = {"thunder._C.Pending", offsetof(pending, kept), sizeof(th_slot),
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, pending_slots};

static PyMethodDef node_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL, NULL},
    {"apply", (PyCFunction)(void (*)(void))apply, METH_FASTCALL, NULL},
};

/* The class, and its `apply` without the Python layer of torch.autograd.Function. */
static int make_class(thx *x, PyObject *module) {
    PyObject *function = PyObject_GetAttrString(x->torch, "autograd"), *base = NULL, *cls = NULL, *node = NULL;
    PyObject *f = PyCFunction_New(&node_methods[0], module), *b = PyCFunction_New(&node_methods[1], module);
    PyObject *method = b ? PyInstanceMethod_New(b) : NULL, *raw = NULL;
    int rc = -1;
    if (function && (base = PyObject_GetAttrString(function, "Function")) && f && method) {
        PyObject *dict = Py_BuildValue("{s:O,s:O,s:s}", "forward", f, "backward", b, "__module__", "thunder");
        cls = dict ? PyObject_CallFunction((PyObject *)Py_TYPE(base), "s(O)O", "Compiled", base, dict) : NULL;
        Py_XDECREF(dict);
    }
    if (cls && (node = PyObject_GetAttrString(cls, "_backward_cls")) &&
        PyObject_SetAttrString(node, "apply", method) == 0) {
        PyObject *root = PyObject_GetAttrString(x->torch_c, "_FunctionBase");
        PyObject *descriptor = root ? PyDict_GetItemString(((PyTypeObject *)root)->tp_dict, "apply") : NULL;
        raw = descriptor ? Py_TYPE(descriptor)->tp_descr_get(descriptor, NULL, cls) : NULL;
        Py_XDECREF(root);
        rc = raw ? 0 : -1;
    }
    x->apply = raw;
    Py_XDECREF(node);
    Py_XDECREF(cls);
    Py_XDECREF(method);
    Py_XDECREF(b);
    Py_XDECREF(f);
    Py_XDECREF(base);
    Py_XDECREF(function);
    return rc;
}

int thx_autograd_init(thx *x, PyObject *module) {
    x->Pending = (PyTypeObject *)PyType_FromModuleAndSpec(module, &pending_spec, NULL);
    PyObject *autograd = PyObject_GetAttrString(x->torch_c, "_autograd");
    if (thx_gradient_init(x, module) < 0 || !x->Pending || !autograd) {
        Py_XDECREF(autograd);
        return -1;
    }
    x->top_hooks = PyObject_GetAttrString(autograd, "_top_saved_tensors_default_hooks");
    x->keep_graph = PyObject_GetAttrString(autograd, "_get_current_graph_task_keep_graph");
    PyErr_Clear(); /* a torch without them: see where they are used */
    Py_DECREF(autograd);
    PyObject *functorch = PyObject_GetAttrString(x->torch_c, "_functorch");
    x->is_legacy_batched = functorch ? PyObject_GetAttrString(functorch, "is_legacy_batchedtensor") : NULL;
    PyErr_Clear();
    x->below_autograd = PyObject_GetAttrString(x->torch_c, "_AutoDispatchBelowAutograd");
    PyErr_Clear();
    Py_XDECREF(functorch);
    return make_class(x, module);
}
