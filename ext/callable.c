/* What thunder.jit returns: every call enters and leaves here.
 *
 * A hit runs no Python: ambient state, argument structure, guards, plan, outputs. A miss goes to compile.c.
 */
#include "callable.h"
#include "lower.h"

#include <string.h>

/* ---- ambient state ---- */

static long call_long(PyObject *builtin) {
    PyObject *o = PyObject_CallNoArgs(builtin);
    long n = o ? PyLong_AsLong(o) : -1;
    Py_XDECREF(o);
    return n;
}

static int call_flag(PyObject *builtin) {
    PyObject *o = PyObject_CallNoArgs(builtin);
    Py_XDECREF(o);
    return o ? o == Py_True : -1;
}

static int read_autocast(thx *x, thx_ambient *a) {
    static const char *const devices[] = {"cpu", "cuda"};
    for (int i = 0; i < 2; i++) {
        PyObject *on = PyObject_CallFunction(x->autocast_enabled, "s", devices[i]);
        PyObject *dtype = on ? PyObject_CallFunction(x->autocast_dtype, "s", devices[i]) : NULL;
        if (!dtype) { /* a build without that device type */
            PyErr_Clear();
            Py_XDECREF(on);
            continue;
        }
        *(i ? &a->autocast_gpu : &a->autocast_cpu) = on == Py_True;
        if (on == Py_True) *(i ? &a->gpu_dtype : &a->cpu_dtype) = dtype;
        Py_DECREF(on);
        Py_DECREF(dtype);
    }
    return 0;
}

/* 1: modes of the user are active, nothing may be assumed; 0: read; -1 error. */
static int read_ambient(thx *x, thx_ambient *a) {
    memset(a, 0, sizeof *a);
    long functions = call_long(x->f_stack_len), dispatches = call_long(x->d_stack_len);
    int grad = thx_grad_mode(x);
    int inference = call_flag(x->inference), autocast = call_flag(x->any_autocast);
    PyObject *dtype = PyObject_CallNoArgs(x->default_dtype);
    if (functions < 0 || dispatches < 0 || grad < 0 || inference < 0 || autocast < 0 || !dtype) {
        Py_XDECREF(dtype);
        return -1;
    }
    a->grad = grad;
    a->inference = inference;
    a->autocast = autocast;
    a->default_dtype = dtype;
    Py_DECREF(dtype);
    if (autocast && read_autocast(x, a) < 0) return -1;
    return functions > 0 || dispatches > 0;
}

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

void thx_find_sharing(thx *x, const thx_guards *guards, const thx_leaves *leaves, uint32_t *out) {
    PyObject *const *live;
    uint32_t n = thx_guards_bound(guards, &live);
    for (uint32_t i = 0; i < leaves->count; i++) {
        void *base = thx_storage_base(x, leaves->items[i]);
        out[i] = UINT32_MAX;
        for (uint32_t j = 0; base && j < i && out[i] == UINT32_MAX; j++)
            if (thx_storage_base(x, leaves->items[j]) == base) out[i] = j;
        for (uint32_t j = 0; base && j < n && out[i] == UINT32_MAX; j++)
            if (thx_storage_base(x, live[j]) == base) out[i] = leaves->count + j;
    }
}

static int same_sharing(thx *x, const thx_entry *e, const thx_leaves *leaves) {
    uint32_t fixed[32], *now = leaves->count <= 32 ? fixed : PyMem_Malloc(sizeof *now * leaves->count);
    if (!now) return PyErr_NoMemory(), -1;
    thx_find_sharing(x, e->guards, leaves, now);
    int same = memcmp(now, e->sharing, sizeof *now * leaves->count) == 0;
    if (now != fixed) PyMem_Free(now);
    return same;
}

static int arguments_match(thx *x, const thx_entry *e, PyObject *const *args, Py_ssize_t npositional, PyObject *kwnames,
                           thx_leaves *leaves) {
    if (e->npositional != npositional || !same_names(e->kwnames, kwnames)) return 0;
    leaves->count = 0;
    int same = 1;
    for (uint32_t i = 0; i < e->nargs && same == 1; i++) same = thx_spec_match(x, &e->args[i], args[i], leaves);
    return same;
}

/* 1 the entry serves this call, 0 it does not, -1 error. */
static int entry_matches(thx_callable_object *c, thx_entry *e, const thx_ambient *a, PyObject *const *args,
                         Py_ssize_t npositional, PyObject *kwnames, thx_leaves *leaves) {
    if (e->dead || memcmp(&e->ambient, a, sizeof *a) != 0) return 0;
    int same = arguments_match(c->x, e, args, npositional, kwnames, leaves);
    for (uint32_t i = 0; i < e->nidentical && same == 1; i++)
        same = leaves->items[e->identical[i].leaf] == e->identical[i].tensor;
    int holds = same == 1 ? thx_guards_check(c->x, e->guards) : same;
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
    return Py_XNewRef(thx_slot_object(o->x, &o->slots[o->e->result_slots[leaf]]));
}

static int replay_writes(thx *x, const thx_entry *e, th_slot *slots) {
    for (uint32_t i = 0; i < e->nwrites; i++) {
        const thx_write *w = &e->writes[i];
        PyObject *value = w->constant ? w->constant : thx_slot_object(x, &slots[w->slot]);
        if (!value || PyDict_SetItem(w->dict, w->key, value) < 0) return -1;
    }
    return 0;
}

static void refresh_roots(thx *x, thx_entry *e) { /* a bound tensor was replaced by one of the same kind */
    PyObject *const *live;
    thx_guards_bound(e->guards, &live);
    for (uint32_t i = 0; i < e->plan->nroots; i++)
        if (e->root_leaf[i] < 0) {
            e->roots[i].object = live[-1 - e->root_leaf[i]];
            e->roots[i].handle = x->abi.on ? thx_borrow(&x->abi, e->roots[i].object) : NULL;
        }
    e->generation = thx_guards_generation(e->guards);
}

/* Name the user's line on an exception that a kernel raised. */
static void add_line(thx *x, const thx_entry *e, const th_frame *f) {
    uint32_t o = e->plan->instrs[f->failed].op;
    const th_op *op = &e->final->ops[o];
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (!type) return thx_raise(x, TH_ERUN), (void)0;
    PyErr_NormalizeException(&type, &value, &trace);
    if (value && op->file) {
        PyObject *text =
            PyUnicode_FromFormat("raised by compiled code for %s, line %u: %s", th_str_get(x->ctx, op->file), op->line,
                                 op->callee ? th_str_get(x->ctx, op->callee) : "a function");
        PyObject *done = text ? PyObject_CallMethod(value, "add_note", "O", text) : NULL;
        Py_XDECREF(done);
        Py_XDECREF(text);
        PyErr_Clear();
    }
    PyErr_Restore(type, value, trace);
}

/* Is a result what the trace says? Strides of dimensions with at most one element do not matter. */
static bool as_predicted(thx *x, th_slot *slot, const th_type *t) {
    if ((!slot->handle && !slot->object) || t->kind != TH_TYPE_TENSOR) return true;
    th_h h = thx_slot_handle(x, slot);
    int64_t ndim = -1, *sizes = NULL, *strides = NULL;
    int32_t dtype = -1;
    if (x->abi.aoti_torch_get_dim(h, &ndim) || ndim != t->ndim || x->abi.aoti_torch_get_dtype(h, &dtype) ||
        dtype != x->abi.scalar_types[t->dtype] || x->abi.aoti_torch_get_sizes(h, &sizes) ||
        x->abi.aoti_torch_get_strides(h, &strides))
        return false;
    bool same = true, empty = th_type_numel(t) == 0;
    for (int64_t i = 0; i < ndim; i++)
        same &= sizes[i] == t->shape[i] && (empty || sizes[i] <= 1 || strides[i] == t->stride[i]);
    return same;
}

typedef struct prediction {
    thx *x;
    const thx_entry *e;
    th_frame *frame;
    const th_instr *instr;
    bool holds;
} prediction;

/* A result that nobody uses may be what it likes. */
static bool dies_here(const prediction *p, uint32_t slot) {
    const uint32_t *dead = p->e->plan->frees + p->instr->frees;
    for (uint32_t i = 0; i < p->instr->nfrees; i++)
        if (dead[i] == slot) return true;
    return false;
}

static void check_out(void *user, th_val *value) {
    prediction *p = user;
    uint32_t slot = p->e->slot_of[*value];
    if (slot != UINT32_MAX && !dies_here(p, slot))
        p->holds &=
            as_predicted(p->x, &p->frame->slots[slot], th_type_get(p->x->ctx, p->e->final->values[*value].type));
}

/* As th_plan_run, comparing each result with the trace: 0, -1 error, 1 a result differs. */
static int run_checked(thx *x, const thx_entry *e, th_frame *f) {
    prediction p = {x, e, f, NULL, true};
    for (uint32_t i = 0; i < e->plan->ninstrs; i++) {
        const th_instr *instr = p.instr = &e->plan->instrs[i];
        int rc = instr->run(f, instr);
        if (rc == 0 && instr->op) th_op_each_out(e->final, instr->op, check_out, &p);
        if (rc || !p.holds) {
            f->failed = i;
            th_plan_clear(e->plan, f);
            return rc ? -1 : 1;
        }
        for (uint32_t j = 0; j < instr->nfrees; j++) th_slot_drop(e->plan, &f->slots[e->plan->frees[instr->frees + j]]);
    }
    return 0;
}

static PyObject *run_plan(thx *x, thx_entry *e, const thx_leaves *leaves);

/* Predicted strides were wrong: lower without what trusts them, and run again. */
static PyObject *run_plain(thx *x, thx_entry *e, const thx_leaves *leaves, const th_frame *f) {
    const th_op *op = &e->final->ops[e->plan->instrs[f->failed].op];
    if (e->writes_inputs)
        return PyErr_Format(PyExc_RuntimeError,
                            "%s (%s, line %u) gave other strides than torch's fake kernel said, after inputs "
                            "were written; please report this",
                            th_str_get(x->ctx, op->callee), th_str_get(x->ctx, op->file), op->line);
    return thx_entry_lower(x, e, true) < 0 ? NULL : run_plan(x, e, leaves);
}

static PyObject *run_plan(thx *x, thx_entry *e, const thx_leaves *leaves) {
    enum { ON_STACK = 192 };
    th_slot fixed[ON_STACK], *slots = fixed;
    const th_plan *plan = e->plan;
    if (plan->nslots > ON_STACK && !(slots = PyMem_Malloc(sizeof *slots * plan->nslots))) return PyErr_NoMemory();
    if (e->generation != thx_guards_generation(e->guards)) refresh_roots(x, e);
    memcpy(slots, e->roots, sizeof *slots * plan->nroots);
    memset(slots + plan->nroots, 0, sizeof *slots * (plan->nslots - plan->nroots));
    for (uint32_t i = 0; i < plan->nroots; i++)
        if (e->root_leaf[i] >= 0) {
            slots[i].object = leaves->items[e->root_leaf[i]];
            slots[i].handle = x->abi.on ? thx_borrow(&x->abi, slots[i].object) : NULL;
        }
    th_frame frame = {slots, x, 0};
    PyObject *result = NULL;
    int rc = e->checked ? th_plan_run(plan, &frame) : run_checked(x, e, &frame);
    if (rc == 1 && !e->checked) {
        result = run_plain(x, e, leaves, &frame);
    } else if (rc) {
        add_line(x, e, &frame);
    } else {
        e->checked = true;
        output o = {x, e, slots};
        const thx_inputs inputs = {e->args, leaves->args, e->nargs};
        result = thx_result_build(x, &e->result, output_leaf, &o, &inputs);
        if (result && e->nwrites && replay_writes(x, e, slots) < 0) Py_CLEAR(result);
        th_plan_clear(plan, &frame);
    }
    if (slots != fixed) PyMem_Free(slots);
    return result;
}

/* Casts are explicit in the trace: autocast must not act on its operations again. */
static PyObject *run_without_autocast(thx *x, thx_entry *e, const thx_leaves *leaves) {
    const char *const devices[] = {"cpu", "cuda"};
    const bool on[] = {e->ambient.autocast_cpu, e->ambient.autocast_gpu};
    PyObject *result = NULL, *done;
    for (int i = 0; i < 2; i++)
        if (on[i]) {
            done = PyObject_CallFunction(x->set_autocast, "sO", devices[i], Py_False);
            Py_XDECREF(done);
        }
    if (!PyErr_Occurred()) result = run_plan(x, e, leaves);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (int i = 0; i < 2; i++)
        if (on[i]) {
            done = PyObject_CallFunction(x->set_autocast, "sO", devices[i], Py_True);
            Py_XDECREF(done);
        }
    PyErr_Restore(type, value, trace);
    return result;
}

static PyObject *run_in_inference_mode(thx_callable_object *c, thx_entry *e, const thx_leaves *leaves) {
    thx *x = c->x;
    PyObject *mode = PyObject_CallOneArg(x->inference_mode, Py_True), *result = NULL;
    PyObject *entered = mode ? PyObject_CallMethodNoArgs(mode, x->n.enter) : NULL;
    if (entered) {
        result = e->ambient.autocast ? run_without_autocast(x, e, leaves) : run_plan(x, e, leaves);
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *left = PyObject_CallMethodObjArgs(mode, x->n.exit, Py_None, Py_None, Py_None, NULL);
        Py_XDECREF(left);
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(entered);
    Py_XDECREF(mode);
    return result;
}

static PyObject *run_entry(thx_callable_object *c, thx_entry *e, const thx_leaves *leaves) {
    if (e->inference) return run_in_inference_mode(c, e, leaves);
    return e->ambient.autocast ? run_without_autocast(c->x, e, leaves) : run_plan(c->x, e, leaves);
}

/* ---- the call ---- */

static PyObject *call_original(thx_callable_object *c, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    return PyObject_Vectorcall(c->fn, args, nargsf, kwnames);
}

static int tell(thx_callable_object *c, const char *event, PyObject *detail) {
    if (!c->on_event) return 0;
    PyObject *done = PyObject_CallFunction(c->on_event, "sO", event, detail ? detail : Py_None);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static bool any_requires_grad(thx *x, PyObject *const *objects, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) {
        if (thx_is_tensor(x, objects[i])) {
            PyObject *flag = x->requires_grad_get(objects[i], x->requires_grad_closure);
            PyErr_Clear();
            Py_XDECREF(flag);
            if (flag == Py_True) return true;
        }
    }
    return false;
}

/* Say once why calls run the original; the pending exception holds the reason. */
static int tell_eager(thx_callable_object *c, const thx_entry *e) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    bool refused = e->eager == THX_EAGER_REFUSED, *told = refused ? &c->warned_fallback : &c->warned_grad;
    int rc = *told ? 0 : tell(c, refused ? "fallback" : "grad", value);
    *told = true;
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return rc;
}

enum { MAX_SETTLED = 4 };

static void drop_all(thx_callable_object *c) {
    while (c->entries) {
        thx_entry *next = c->entries->next;
        thx_entry_free(c->x, c->entries);
        c->entries = next;
    }
    c->entry_count = 0;
}

static void keep(thx_callable_object *c, thx_entry *e) {
    e->next = c->entries;
    c->entries = e;
    c->entry_count++;
}

static PyObject *miss(thx_callable_object *c, const thx_ambient *a, PyObject *const *args, size_t nargsf,
                      PyObject *kwnames) {
    thx *x = c->x;
    Py_ssize_t npositional = PyVectorcall_NARGS(nargsf),
               total = npositional + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0);
    if (x->compiling) { /* another thread captures; this call does not wait for it */
        c->fallbacks++;
        return call_original(c, args, nargsf, kwnames);
    }
    c->misses++;
    x->compiling = true;
    thx_entry *e = thx_compile(c, a, args, npositional, kwnames);
    x->compiling = false;
    if (!e) return NULL;
    if (e->eager) {
        int told = tell_eager(c, e);
        keep(c, e);
        c->fallbacks++;
        return told < 0 ? NULL : call_original(c, args, nargsf, kwnames);
    }
    thx_leaves leaves;
    thx_leaves_init(&leaves);
    leaves.args = args;
    PyObject *result = NULL;
    int same = 1;
    for (Py_ssize_t i = 0; i < total && same == 1; i++) same = thx_spec_match(x, &e->args[i], args[i], &leaves);
    if (same == 1)
        result = run_entry(c, e, &leaves);
    else if (same == 0)
        PyErr_SetString(PyExc_RuntimeError, "an argument changed while the function was captured");
    thx_leaves_fini(&leaves);
    if (!result) {
        thx_entry_free(x, e);
        return NULL;
    }
    if (c->cache == 1) { /* kept for last_traces only */
        drop_all(c);
        keep(c, e);
        return result;
    }
    bool settle = e->nwrites && thx_guards_check(x, e->guards) == 0;
    keep(c, e);
    /* The run changed state that it also reads (a flag set on first use): capture for the state it left behind. */
    if (settle && c->settled++ < MAX_SETTLED) {
        thx_entry *after = thx_compile(c, a, args, npositional, kwnames);
        PyErr_Clear();
        if (after && after->eager)
            thx_entry_free(x, after);
        else if (after)
            keep(c, after);
    }
    return result;
}

static void drop_dead(thx_callable_object *c) { /* keep at most 64 entries */
    enum { MAX_ENTRIES = 64 };
    uint64_t kept = 0;
    for (thx_entry **p = &c->entries; *p;) {
        thx_entry *e = *p;
        if (e->dead || ++kept > MAX_ENTRIES) {
            *p = e->next;
            c->entry_count--;
            thx_entry_free(c->x, e);
        } else {
            p = &e->next;
        }
    }
}

static PyObject *vectorcall(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    thx_callable_object *c = (thx_callable_object *)self;
    thx *x = c->x;
    thx_ambient ambient;
    c->calls++;
    if (x->active &&
        x->active_thread ==
            PyThread_get_thread_ident()) /* called inside another capture: its operations belong to that trace */
        return call_original(c, args, nargsf, kwnames);
    int modes = read_ambient(x, &ambient);
    if (modes < 0) return NULL;
    if (modes) {
        if (!c->warned_modes && (c->warned_modes = true, tell(c, "modes", NULL) < 0)) return NULL;
        c->fallbacks++;
        return call_original(c, args, nargsf, kwnames);
    }
    Py_ssize_t npositional = PyVectorcall_NARGS(nargsf);
    thx_leaves leaves;
    thx_leaves_init(&leaves);
    leaves.args = args;
    for (thx_entry **p = &c->entries; *p && c->cache != 1; p = &(*p)->next) {
        thx_entry *e = *p;
        int same = c->cache == 2 ? arguments_match(x, e, args, npositional, kwnames, &leaves)
                                 : entry_matches(c, e, &ambient, args, npositional, kwnames, &leaves);
        if (same < 0) {
            thx_leaves_fini(&leaves);
            return NULL;
        }
        if (!same) continue;
        bool grad = ambient.grad && e->eager < THX_EAGER_INSIDE &&
                    (any_requires_grad(x, leaves.items, leaves.count) || thx_guards_need_grad(x, e->guards));
        if (grad != (e->eager == THX_EAGER_GRAD)) { /* requires_grad of a parameter changed since */
            e->dead = true;
            continue;
        }
        if (e->eager) {
            thx_leaves_fini(&leaves);
            c->fallbacks++;
            return call_original(c, args, nargsf, kwnames);
        }
        c->hits++;
        e->hits++;
        *p = e->next; /* most recent first */
        e->next = c->entries;
        c->entries = e;
        PyObject *result = run_entry(c, e, &leaves);
        thx_leaves_fini(&leaves);
        return result;
    }
    thx_leaves_fini(&leaves);
    if (c->entry_count >= 64) drop_dead(c);
    return miss(c, &ambient, args, nargsf, kwnames);
}

/* ---- the type ---- */

static PyObject *callable_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"fn", "module", "cache", "fallback_eager", "on_event", NULL};
    PyObject *fn, *module = Py_None, *on_event = Py_None;
    int cache = 0, fallback = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OipO", names, &fn, &module, &cache, &fallback, &on_event))
        return NULL;
    thx_callable_object *c = (thx_callable_object *)type->tp_alloc(type, 0);
    if (!c) return NULL;
    c->vectorcall = vectorcall;
    c->x = PyType_GetModuleState(type);
    c->fn = Py_NewRef(fn);
    c->module = module == Py_None ? NULL : Py_NewRef(module);
    c->on_event = on_event == Py_None ? NULL : Py_NewRef(on_event);
    c->cache = (uint8_t)cache;
    c->fallback_eager = fallback;
    return (PyObject *)c;
}

static int callable_clear(thx_callable_object *c) {
    thx_entry *e = c->entries;
    c->entries = NULL;
    c->entry_count = 0;
    while (e) {
        thx_entry *next = e->next;
        thx_entry_free(c->x, e);
        e = next;
    }
    Py_CLEAR(c->fn);
    Py_CLEAR(c->module);
    Py_CLEAR(c->on_event);
    Py_CLEAR(c->dict);
    return 0;
}

static int entry_traverse(const thx_entry *e, visitproc visit, void *arg) {
    int rc = thx_guards_traverse(e->guards, visit, arg);
    for (uint32_t i = 0; i < e->nargs && !rc; i++) rc = thx_spec_traverse(&e->args[i], visit, arg);
    if (rc || (rc = thx_spec_traverse(&e->result, visit, arg))) return rc;
    for (uint32_t i = 0; i < e->nwrites; i++) {
        Py_VISIT(e->writes[i].dict);
        Py_VISIT(e->writes[i].key);
        Py_VISIT(e->writes[i].constant);
    }
    return 0;
}

static int callable_traverse(thx_callable_object *c, visitproc visit, void *arg) {
    for (const thx_entry *e = c->entries; e; e = e->next) {
        int rc = entry_traverse(e, visit, arg);
        if (rc) return rc;
    }
    Py_VISIT(Py_TYPE(c));
    Py_VISIT(c->fn);
    Py_VISIT(c->module);
    Py_VISIT(c->on_event);
    Py_VISIT(c->dict);
    return 0;
}

static void callable_dealloc(thx_callable_object *c) {
    PyTypeObject *type = Py_TYPE(c);
    PyObject_GC_UnTrack(c);
    if (c->weakrefs) PyObject_ClearWeakRefs((PyObject *)c);
    callable_clear(c);
    type->tp_free((PyObject *)c);
    Py_DECREF(type);
}

static PyObject *callable_get(PyObject *self, PyObject *object, PyObject *type) { /* a method when found in a class */
    (void)type;
    return object && object != Py_None ? PyMethod_New(self, object) : Py_NewRef(self);
}

static PyObject *entry_stats(thx *x, const thx_entry *e) {
    (void)x;
    return Py_BuildValue(
        "{s:K,s:d,s:d,s:d,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "hits", e->hits, "capture_ms", e->capture_ms, "passes_ms",
        e->passes_ms, "lower_ms", e->lower_ms, "recorded_by_rule", e->nfast, "recorded_by_torch", e->nslow, "queries",
        e->nqueries, "evaluated", e->nevals, "operations", e->final ? e->final->nops - 1 : 0, "instructions",
        e->plan ? e->plan->ninstrs : 0, "shim_instructions", e->nshim, "builtin_instructions", e->nbuiltin);
}

static PyObject *callable_stats(thx_callable_object *c, PyObject *unused) {
    (void)unused;
    PyObject *list = PyList_New(0);
    for (thx_entry *e = c->entries; list && e; e = e->next) {
        if (e->eager) continue;
        PyObject *stats = entry_stats(c->x, e);
        if (!stats || PyList_Append(list, stats) < 0) Py_CLEAR(list);
        Py_XDECREF(stats);
    }
    return list ? Py_BuildValue("{s:K,s:K,s:K,s:K,s:N}", "calls", c->calls, "cache_hits", c->hits, "cache_misses",
                                c->misses, "fallbacks", c->fallbacks, "entries", list)
                : NULL;
}

/* (captured, final) of the entry used last, as Trace objects; None before the first compile. */
static PyObject *callable_traces(thx_callable_object *c, PyObject *unused) {
    (void)unused;
    const thx_entry *e = c->entries;
    while (e && e->eager) e = e->next;
    if (!e) Py_RETURN_NONE;
    th_trace *captured = NULL, *final = NULL;
    if (thx_check(c->x, th_trace_clone(e->captured, &captured)) < 0) return NULL;
    if (thx_check(c->x, th_trace_clone(e->final, &final)) < 0 ||
        thx_name_constants(c->x, final, captured->ninputs, e->roots) < 0) {
        th_trace_free(final);
        th_trace_free(captured);
        return NULL;
    }
    PyObject *a = thx_trace_object(c->x, captured), *b = thx_trace_object(c->x, final);
    PyObject *pair = a && b ? PyTuple_Pack(2, a, b) : NULL;
    Py_XDECREF(a);
    Py_XDECREF(b);
    return pair;
}

static PyObject *callable_reset(thx_callable_object *c, PyObject *unused) {
    (void)unused;
    drop_all(c);
    Py_RETURN_NONE;
}

static PyMethodDef callable_methods[] = {
    {"_stats", (PyCFunction)callable_stats, METH_NOARGS, "Counters of this callable and its entries, as a dict."},
    {"_traces", (PyCFunction)callable_traces, METH_NOARGS, "(captured trace, final trace) of the entry used last."},
    {"_reset", (PyCFunction)callable_reset, METH_NOARGS, "Forget all compiled entries."},
    {NULL, NULL, 0, NULL},
};
static PyMemberDef callable_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(thx_callable_object, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(thx_callable_object, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(thx_callable_object, weakrefs), READONLY, NULL},
    {"__wrapped__", T_OBJECT, offsetof(thx_callable_object, fn), READONLY, "The original callable."},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef callable_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot callable_slots[] = {
    {Py_tp_new, callable_new},
    {Py_tp_dealloc, callable_dealloc},
    {Py_tp_traverse, callable_traverse},
    {Py_tp_clear, callable_clear},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, callable_get},
    {Py_tp_methods, callable_methods},
    {Py_tp_members, callable_members},
    {Py_tp_getset, callable_getset},
    {Py_tp_doc, "A compiled callable, made by thunder.jit."},
    {0, NULL},
};
static PyType_Spec callable_spec = {"thunder._C.Callable", sizeof(thx_callable_object), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                                        Py_TPFLAGS_METHOD_DESCRIPTOR,
                                    callable_slots};

int thx_callable_init(thx *x, PyObject *module) {
    x->Callable = (PyTypeObject *)PyType_FromModuleAndSpec(module, &callable_spec, NULL);
    return x->Callable && PyModule_AddObjectRef(module, "Callable", (PyObject *)x->Callable) == 0 ? 0 : -1;
}
