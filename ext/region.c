/* Units that executors have claimed: see region.h. */
#include "region.h"

#include "native.h"
#include "trace_object.h"

#include <time.h>

typedef struct unit_data {
    thx_instr_data head;
    thx_region *region; /* owned */
    thx_call *call;
    uint32_t nins, nouts, nslots; /* nslots: more than any slot that it touches */
    uint32_t *slots;              /* of the inputs, then of the results */
    th_typeref *types;            /* parallel to slots, as the trace has them */
} unit_data;

static void free_unit(void *data) {
    unit_data *d = data;
    thx_call_free(d->call);
    PyMem_Free(d->slots);
    PyMem_Free(d->types);
    Py_XDECREF((PyObject *)d->region);
    PyMem_Free(d);
}

/* ---- running the body on torch ---- */

/* Take the n-th result out of the body's slots; one that is an input gets a reference of its own. */
static int take_result(thx *x, const thx_program *p, th_slot *slots, uint32_t n, th_slot *out) {
    uint32_t at = thx_program_result(p, n);
    if (at == UINT32_MAX) return PyErr_SetString(PyExc_SystemError, "a region without a result"), -1;
    th_slot *s = &slots[at];
    if (s->owns_object || s->owns_handle) {
        *out = *s;
        *s = (th_slot){0};
        return 0;
    }
    PyObject *o = thx_slot_object(x, s);
    if (!o) return -1;
    *out = (th_slot){.object = Py_NewRef(o), .owns_object = true};
    return 0;
}

static int run_body(thx *x, thx_region *r, const th_slot *ins, uint32_t nins, th_slot *outs, uint32_t nouts) {
    thx_program *p = &r->reference;
    if (!p->plan && thx_program_lower(x, p, false) < 0) return -1;
    th_slot *slots = NULL;
    int rc = 1;
    r->reference_runs++;
    while (rc == 1) {
        PyMem_Free(slots);
        if (!(slots = PyMem_Calloc(p->plan->nslots + 1, sizeof *slots))) return PyErr_NoMemory(), -1;
        for (uint32_t i = 0; i < nins; i++) slots[i] = (th_slot){.handle = ins[i].handle, .object = ins[i].object};
        rc = thx_program_run(x, p, slots);
        for (uint32_t i = 0; rc && i < nins; i++) thx_slot_drop(x, &slots[i]);
    }
    for (uint32_t i = 0; rc == 0 && i < nouts; i++) rc = take_result(x, p, slots, i, &outs[i]);
    if (rc == 0) {
        th_frame frame = {.slots = slots, .user = x};
        th_plan_clear(p->plan, &frame);
        for (uint32_t i = 0; i < nins; i++) thx_slot_drop(x, &slots[i]);
    }
    PyMem_Free(slots);
    return rc;
}

static int run_reference(th_frame *f, const unit_data *d) {
    th_slot few[16], *own = d->nins + d->nouts <= 16 ? few : PyMem_Malloc((d->nins + d->nouts) * sizeof *own);
    if (!own) return PyErr_NoMemory(), -1;
    thx *x = f->user;
    for (uint32_t i = 0; i < d->nins; i++) own[i] = f->slots[d->slots[i]];
    for (uint32_t i = 0; i < d->nouts; i++) own[d->nins + i] = (th_slot){0};
    int rc = run_body(x, d->region, own, d->nins, own + d->nins, d->nouts);
    for (uint32_t i = 0; i < d->nouts; i++) {
        if (rc)
            thx_slot_drop(x, &own[d->nins + i]);
        else
            f->slots[d->slots[d->nins + i]] = own[d->nins + i];
    }
    if (own != few) PyMem_Free(own);
    return rc;
}

/* ---- comparing ---- */

static PyObject *objects(thx *x, th_slot *slots, const uint32_t *at, uint32_t n) {
    PyObject *list = PyList_New(n);
    for (uint32_t i = 0; list && i < n; i++) {
        PyObject *o = slots[at[i]].object || slots[at[i]].handle ? thx_slot_object(x, &slots[at[i]]) : Py_None;
        if (o)
            PyList_SET_ITEM(list, i, Py_NewRef(o));
        else
            Py_CLEAR(list);
    }
    return list;
}

/* The implementation on copies of the inputs: its results, or NULL with an exception. */
static PyObject *try_out(th_frame *f, const unit_data *d, PyObject *copies) {
    th_slot *slots = PyMem_Calloc(d->nslots + 1, sizeof *slots);
    if (!slots) return PyErr_NoMemory();
    thx *x = f->user;
    th_frame trial = {.slots = slots, .user = x};
    for (uint32_t i = 0; i < d->nins; i++) slots[d->slots[i]].object = PyList_GET_ITEM(copies, i);
    PyObject *results = NULL;
    if (thx_call_run(&trial, d->call, d->region->implementation) == 0)
        results = objects(x, slots, d->slots + d->nins, d->nouts);
    for (uint32_t i = 0; i < d->nslots; i++) thx_slot_drop(x, &slots[i]);
    PyMem_Free(slots);
    return results;
}

/* What went wrong in it is for the judge: the run has torch's results. Exceptions that are no Exception pass. */
static PyObject *caught(void) {
    PyObject *type, *value, *trace;
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace) PyException_SetTraceback(value, trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return value;
}

static int judge(th_frame *f, const unit_data *d, PyObject *before, PyObject *copies) {
    thx_region *r = d->region;
    PyObject *expected = objects(f->user, f->slots, d->slots + d->nins, d->nouts), *error = NULL, *verdict = NULL;
    PyObject *results = expected ? try_out(f, d, copies) : NULL;
    if (expected && !results) error = caught();
    if (expected && (results || error))
        verdict = PyObject_CallFunctionObjArgs(r->judge, (PyObject *)r, before, copies, expected,
                                               results ? results : Py_None, error ? error : Py_None, NULL);
    int rc = verdict ? 0 : -1;
    if (r->state == THX_REGION_NEW && verdict && !r->always && verdict == Py_True) r->state = THX_REGION_TRUSTED;
    Py_XDECREF(expected);
    Py_XDECREF(results);
    Py_XDECREF(error);
    Py_XDECREF(verdict);
    return rc;
}

static int run_and_compare(th_frame *f, const unit_data *d) {
    thx *x = f->user;
    PyObject *before = objects(x, f->slots, d->slots, d->nins), *copies = NULL;
    if (before) copies = PyObject_CallMethod((PyObject *)d->region, "_copies", "O", before);
    int rc = copies ? run_reference(f, d) : -1;
    if (rc == 0) rc = judge(f, d, before, copies);
    Py_XDECREF(before);
    Py_XDECREF(copies);
    return rc;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* A kernel of a C executor: from slot to slot, with no call of Python in between. */
static int run_native(th_frame *f, const unit_data *d, const thx_native_kernel *kernel) {
    th_slot *few[32], **at = d->nins + d->nouts <= 32 ? few : PyMem_Malloc((d->nins + d->nouts) * sizeof *at);
    if (!at) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < d->nins + d->nouts; i++) at[i] = &f->slots[d->slots[i]];
    int rc = thx_native_run(f->user, kernel, at, d->nins, at + d->nins);
    if (at != few) PyMem_Free(at);
    return rc;
}

static bool has_form(thx *x, th_slot *slot, const th_type *t) { /* all but the strides */
    int64_t ndim = -1, *sizes = NULL;
    int32_t dtype = -1;
    th_h h = thx_slot_handle(x, slot);
    if (t->kind != TH_TYPE_TENSOR || x->abi.aoti_torch_get_dim(h, &ndim) || ndim != t->ndim ||
        x->abi.aoti_torch_get_sizes(h, &sizes) || x->abi.aoti_torch_get_dtype(h, &dtype) ||
        dtype != x->abi.scalar_types[t->dtype])
        return false;
    for (int64_t i = 0; i < ndim; i++)
        if (sizes[i] != t->shape[i]) return false;
    return true;
}

/* Whoever reads a value relies on the strides that the trace states: one with others is laid out again. */
static int lay_out(th_frame *f, const unit_data *d, uint32_t from, uint32_t to) {
    thx *x = f->user;
    for (uint32_t i = from; i < to; i++) {
        th_slot *slot = &f->slots[d->slots[i]];
        const th_type *type = th_type_get(x->ctx, d->types[i]);
        if (thx_as_predicted(x, slot, type)) continue;
        PyObject *o = thx_slot_object(x, slot);
        if (!o || !thx_is_tensor(x, o) || !has_form(x, slot, type)) {
            PyErr_Format(PyExc_RuntimeError, "%R %s something of another shape or dtype than the operation has",
                         d->region->executor, i < d->nins ? "is given" : "returned");
            return -1;
        }
        PyObject *device = thx_device_object(x, type->device);
        PyObject *fresh = o && device ? thx_empty_strided(x, type, device) : NULL;
        PyObject *done = fresh ? PyObject_CallMethod(fresh, "copy_", "O", o) : NULL; /* raises where sizes differ */
        Py_XDECREF(device);
        Py_XDECREF(done);
        if (!done) {
            Py_XDECREF(fresh);
            return -1;
        }
        thx_slot_drop(x, slot);
        *slot = (th_slot){.object = fresh, .owns_object = true};
    }
    return 0;
}

static int run_implementation(th_frame *f, const unit_data *d) {
    thx *x = f->user;
    /* Generated code does not look at what it reads. */
    if (d->region->fused && x->abi.on && lay_out(f, d, 0, d->nins) < 0) return -1;
    PyObject *implementation = Py_NewRef(d->region->implementation);
    PyTypeObject *type = x->abi.on ? Py_TYPE(implementation) : NULL;
    int rc = type == x->NativeKernel ? run_native(f, d, (const thx_native_kernel *)implementation)
             : type == x->HandleCall && d->region->fused
                 ? thx_handles_run(x, implementation, f->slots, d->slots, d->nins, d->slots + d->nins, d->nouts)
                 : thx_call_run(f, d->call, implementation);
    Py_DECREF(implementation);
    return rc == 0 && x->abi.on ? lay_out(f, d, d->nins, d->nins + d->nouts) : rc;
}

/* One of the runs that are timed on their device. A stopwatch that fails is put away. */
static int run_timed(th_frame *f, const unit_data *d) {
    thx_region *r = d->region;
    PyObject *watch = Py_NewRef(r->stopwatch), *started = PyObject_CallMethod(watch, "start", NULL), *enough = NULL;
    int rc = 0;
    if (started) {
        rc = run_implementation(f, d);
        if (rc == 0) enough = PyObject_CallMethod(watch, "stop", "O", started);
    } else {
        PyErr_Clear();
        rc = run_implementation(f, d);
    }
    if (rc == 0 && enough != Py_False) {
        PyErr_Clear();
        Py_CLEAR(r->stopwatch);
    }
    Py_XDECREF(started);
    Py_XDECREF(enough);
    Py_DECREF(watch);
    return rc;
}

static int run_unit(th_frame *f, const th_instr *instr) {
    const unit_data *d = instr->data;
    thx_region *r = d->region;
    r->runs++;
    if (r->state == THX_REGION_TRUSTED) {
        uint64_t start = now_ns();
        int rc = r->stopwatch ? run_timed(f, d) : run_implementation(f, d);
        r->nanoseconds += now_ns() - start;
        return rc;
    }
    return r->state == THX_REGION_NEW ? run_and_compare(f, d) : run_reference(f, d);
}

/* ---- lowering ---- */

typedef struct slot_list {
    thx_lowering *l;
    uint32_t *slots, n;
    th_typeref *types; /* parallel */
} slot_list;

static void add_slot(void *user, th_val *v) {
    slot_list *s = user;
    uint32_t slot = thx_slot_for(s->l, *v);
    for (uint32_t i = 0; i < s->n; i++)
        if (s->slots[i] == slot) return;
    s->types[s->n] = s->l->t->values[*v].type;
    s->slots[s->n++] = slot;
}

static void count_values(void *user, th_val *v) {
    (void)v;
    ++*(uint32_t *)user;
}

int thx_lower_region(thx_lowering *l, th_opref o) {
    const th_op *op = &l->t->ops[o];
    PyObject *callee = op->callee_opaque ? l->t->opaques[op->callee_opaque].object : NULL;
    if (!callee || Py_TYPE(callee) != l->x->Region) return 0;
    unit_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    d->head.free = free_unit;
    d->region = (thx_region *)Py_NewRef(callee);
    uint32_t n = 0;
    th_op_each_use((th_trace *)l->t, o, count_values, &n);
    th_op_each_out((th_trace *)l->t, o, count_values, &n);
    d->slots = PyMem_Malloc((n + 1) * sizeof *d->slots);
    d->types = PyMem_Malloc((n + 1) * sizeof *d->types);
    d->call = d->slots && d->types ? thx_call_new(l, o) : NULL;
    if (!d->call) {
        if (!d->slots || !d->types) PyErr_NoMemory();
        free_unit(d);
        return -1;
    }
    slot_list ins = {l, d->slots, 0, d->types};
    th_op_each_use((th_trace *)l->t, o, add_slot, &ins);
    slot_list outs = {l, d->slots + ins.n, 0, d->types + ins.n};
    th_op_each_out((th_trace *)l->t, o, add_slot, &outs);
    d->nins = ins.n;
    d->nouts = outs.n;
    for (uint32_t i = 0; i < ins.n + outs.n; i++)
        if (d->nslots <= d->slots[i]) d->nslots = d->slots[i] + 1;
    return thx_check(l->x, th_plan_add(l->plan, run_unit, d, o)) < 0 ? -1 : 1;
}

/* ---- the type ---- */

static PyObject *region_call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames);

thx_region *thx_region_new(thx *x, PyObject *executor, th_trace *body, bool fused, PyObject *judge_) {
    th_trace *copy = NULL;
    thx_region *r = NULL;
    if (thx_check(x, th_trace_clone(body, &copy)) == 0) r = (thx_region *)x->Region->tp_alloc(x->Region, 0);
    if (!r) {
        th_trace_free(copy);
        th_trace_free(body);
        return NULL;
    }
    r->x = x;
    r->vectorcall = region_call;
    r->executor = Py_NewRef(executor);
    r->judge = Py_NewRef(judge_);
    r->fused = fused;
    r->reference.t = body;
    if (!(r->trace = thx_trace_object(x, copy))) {
        Py_DECREF((PyObject *)r);
        return NULL;
    }
    return r;
}

static PyObject *region_call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    thx_region *r = (thx_region *)self;
    if (r->implementation && r->state != THX_REGION_REFUSED)
        return PyObject_Vectorcall(r->implementation, args, nargsf, kwnames);
    Py_ssize_t n = PyVectorcall_NARGS(nargsf);
    if ((uint32_t)n != r->reference.t->ninputs || (kwnames && PyTuple_GET_SIZE(kwnames)))
        return PyErr_Format(PyExc_TypeError, "this unit takes %u tensors", r->reference.t->ninputs);
    const th_trace *t = r->reference.t;
    uint32_t nouts = t->nodes[t->result].count;
    th_slot *slots = PyMem_Calloc((size_t)n + nouts + 1, sizeof *slots);
    if (!slots) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < n; i++) slots[i].object = args[i];
    PyObject *result = run_body(r->x, r, slots, (uint32_t)n, slots + n, nouts) == 0 ? PyTuple_New(nouts) : NULL;
    for (uint32_t i = 0; i < nouts; i++) {
        PyObject *o = result ? thx_slot_object(r->x, &slots[n + i]) : NULL;
        if (o)
            PyTuple_SET_ITEM(result, i, Py_NewRef(o));
        else
            Py_CLEAR(result);
        thx_slot_drop(r->x, &slots[n + i]);
    }
    PyMem_Free(slots);
    return result;
}

static PyObject *region_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)type, (void)args, (void)kwargs;
    return PyErr_Format(PyExc_TypeError, "regions are made by claims, not by hand");
}

static int region_traverse(thx_region *r, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(r));
    Py_VISIT(r->executor);
    Py_VISIT(r->implementation);
    Py_VISIT(r->trace);
    Py_VISIT(r->reason);
    Py_VISIT(r->judge);
    Py_VISIT(r->stopwatch);
    Py_VISIT(r->dict);
    return 0;
}

static int region_clear(thx_region *r) {
    r->state = THX_REGION_REFUSED;
    Py_CLEAR(r->executor);
    Py_CLEAR(r->implementation);
    Py_CLEAR(r->trace);
    Py_CLEAR(r->reason);
    Py_CLEAR(r->judge);
    Py_CLEAR(r->stopwatch);
    Py_CLEAR(r->dict);
    return 0;
}

static void region_dealloc(thx_region *r) {
    PyTypeObject *type = Py_TYPE(r);
    PyObject_GC_UnTrack(r);
    if (r->weakrefs) PyObject_ClearWeakRefs((PyObject *)r);
    region_clear(r);
    thx_program_fini(&r->reference);
    type->tp_free((PyObject *)r);
    Py_DECREF(type);
}

static PyObject *region_install(thx_region *r, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"implementation", "trusted", "always", NULL};
    PyObject *implementation;
    int trusted = 0, always = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|pp", names, &implementation, &trusted, &always)) return NULL;
    if (!PyCallable_Check(implementation))
        return PyErr_Format(PyExc_TypeError, "an implementation is a callable, not %s",
                            Py_TYPE(implementation)->tp_name);
    if (r->state == THX_REGION_REFUSED) Py_RETURN_NONE;
    Py_XSETREF(r->implementation, Py_NewRef(implementation));
    r->always = always;
    r->state = trusted ? THX_REGION_TRUSTED : THX_REGION_NEW;
    Py_RETURN_NONE;
}

static PyObject *region_refuse(thx_region *r, PyObject *reason) {
    if (!PyUnicode_Check(reason)) return PyErr_Format(PyExc_TypeError, "the reason is a str");
    Py_XSETREF(r->reason, Py_NewRef(reason));
    r->state = THX_REGION_REFUSED;
    Py_RETURN_NONE;
}

/* Torch's side of the comparison is another trace, of the same inputs and results. */
static PyObject *region_compare_with(thx_region *r, PyObject *trace) {
    thx_py_trace *given = thx_as_trace(r->x, trace);
    th_trace *copy = NULL;
    if (!given || thx_check(r->x, th_trace_clone(given->t, &copy)) < 0) return NULL;
    if (copy->ninputs != r->reference.t->ninputs ||
        copy->nodes[copy->result].count != r->reference.t->nodes[r->reference.t->result].count) {
        th_trace_free(copy);
        return PyErr_Format(PyExc_ValueError, "it has other inputs or results");
    }
    thx_program_fini(&r->reference);
    r->reference.t = copy;
    Py_RETURN_NONE;
}

static PyObject *region_copies(thx_region *r, PyObject *tensors) {
    PyObject *module = PyImport_ImportModule("thunder._verify");
    PyObject *copies = module ? PyObject_CallMethod(module, "copies", "O", tensors) : NULL;
    (void)r;
    Py_XDECREF(module);
    return copies;
}

static PyObject *region_state(thx_region *r, void *unused) {
    static const char *const names[] = {"building", "new", "trusted", "refused"};
    (void)unused;
    return PyUnicode_FromString(names[r->state]);
}

static PyMethodDef region_methods[] = {
    {"install", (PyCFunction)(void (*)(void))region_install, METH_VARARGS | METH_KEYWORDS,
     "install(implementation, trusted=False, always=False)\n\nFrom the next run on `implementation` runs the unit: a "
     "callable with the operation's own arguments, or of a region the tensors of `trace`'s inputs. Its first run is "
     "compared with torch unless it is trusted, every run if `always`."},
    {"refuse", (PyCFunction)region_refuse, METH_O, "refuse(reason)\n\nTorch runs the unit from now on."},
    {"_compare_with", (PyCFunction)region_compare_with, METH_O,
     "_compare_with(trace)\n\nWhat torch runs in its place."},
    {"_copies", (PyCFunction)region_copies, METH_O, "Copies of tensors, laid out as they are."},
    {NULL, NULL, 0, NULL},
};
static PyMemberDef region_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(thx_region, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(thx_region, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(thx_region, weakrefs), READONLY, NULL},
    {"executor", T_OBJECT, offsetof(thx_region, executor), READONLY, "Who claimed it."},
    {"implementation", T_OBJECT, offsetof(thx_region, implementation), READONLY, "What runs it, or None."},
    {"trace", T_OBJECT, offsetof(thx_region, trace), READONLY, "Its body, a thunder.Trace."},
    {"reason", T_OBJECT, offsetof(thx_region, reason), READONLY, "Why torch runs it, or None."},
    {"stopwatch", T_OBJECT, offsetof(thx_region, stopwatch), 0, "What times its next runs on the device, or None."},
    {"fused", T_BOOL, offsetof(thx_region, fused), READONLY, "Several operations, or one alone."},
    {"runs", T_ULONGLONG, offsetof(thx_region, runs), READONLY, "How often it was run, by whomever."},
    {"nanoseconds", T_ULONGLONG, offsetof(thx_region, nanoseconds), READONLY,
     "How long its implementation ran in all, as the host sees it, once trusted."},
    {"reference_runs", T_ULONGLONG, offsetof(thx_region, reference_runs), READONLY, "How often torch ran it."},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef region_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {"state", (getter)region_state, NULL, "\"building\", \"new\", \"trusted\" or \"refused\".", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot region_slots[] = {
    {Py_tp_new, region_new},
    {Py_tp_dealloc, region_dealloc},
    {Py_tp_traverse, region_traverse},
    {Py_tp_clear, region_clear},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_methods, region_methods},
    {Py_tp_members, region_members},
    {Py_tp_getset, region_getset},
    {Py_tp_doc, "A unit of a trace that an executor "
                "has claimed."},
    {0, NULL},
};
static PyType_Spec region_spec = {"thunder._C.Region", sizeof(thx_region), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, region_slots};

int thx_region_init(thx *x, PyObject *module) {
    x->Region = (PyTypeObject *)PyType_FromModuleAndSpec(module, &region_spec, NULL);
    return x->Region && PyModule_AddObjectRef(module, "Region", (PyObject *)x->Region) == 0 ? 0 : -1;
}
