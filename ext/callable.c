/* What thunder.jit returns: every call enters and leaves here.
 *
 * A hit runs no Python: ambient state, argument structure, guards, plan, outputs. A miss goes to compile.c.
 */
#include "callable.h"

#include "lower.h"
#include "shadow.h"

#include "passes/pass.h"

#include <string.h>
#include <time.h>

static uint64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- entries for values of tensors ---- */

/* Is this how the values begin that the entry was captured for? */
static bool may_serve(const thx_entry *e, PyObject *seen) {
    if (!seen || !e->expected) return true;
    Py_ssize_t n = PyTuple_GET_SIZE(seen), expected = PyTuple_GET_SIZE(e->expected);
    bool same = true;
    for (Py_ssize_t i = 0; i < n && i < expected && same; i++)
        same = thx_same_values(PyTuple_GET_ITEM(seen, i), PyTuple_GET_ITEM(e->expected, i));
    return same;
}

/* 1: the pending exception says that the run of an entry met another value: it is in call->seen now. 0: another
 * exception, still pending; -1 error. */
static int take_value(thx *x, const thx_entry *e, thx_request *call) {
    if (!e->expected || !PyErr_ExceptionMatches(x->ValueChanged)) return 0;
    PyObject *type, *value, *trace, *number = NULL, *found = NULL, *seen = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *arguments = value ? PyObject_GetAttrString(value, "args") : NULL;
    if (arguments && PyArg_ParseTuple(arguments, "OO", &number, &found)) {
        PyObject *before = PyTuple_GetSlice(e->expected, 0, PyLong_AsSsize_t(number)), *last = PyTuple_Pack(1, found);
        seen = before && last ? PySequence_Concat(before, last) : NULL;
        Py_XDECREF(before);
        Py_XDECREF(last);
    }
    Py_XDECREF(arguments);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    if (!seen) return -1;
    Py_XSETREF(call->seen, seen);
    return 1;
}

/* The error for a call that meets ever new values; its line is that of the last value. */
static int refuse_values(thx *x, const thx_entry *e, thx_request *call, const char *why) {
    const th_trace *t = e->captured;
    th_opref at = t->nops;
    while (--at && !th__op_only_reads(t, &t->ops[at])) continue;
    const th_op *op = &t->ops[at];
    call->refusal = PyObject_CallFunction(x->CaptureError, "sIOsss", op->file ? th_str_get(x->ctx, op->file) : "?",
                                          (unsigned)op->line, Py_None, "a value of a tensor", why,
                                          "compute with the tensor instead of its value, or raise branch_limit");
    return call->refusal ? 0 : -1;
}

/* ---- the call ---- */

PyObject *thx_refuse_original(thx_callable_object *c, const char *why) {
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    if (!why) PyErr_Fetch(&type, &value, &trace);
    PyObject *text = why ? PyUnicode_FromString(why) : value ? PyObject_Str(value) : Py_NewRef(Py_None);
    if (text) PyErr_Format(c->x->CaptureError, "%U; without compilation the transforms would be left out", text);
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return NULL;
}

static PyObject *call_original(thx_callable_object *c, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    if (c->needs_transform)
        return thx_refuse_original(c, "this call cannot run compiled code: it is inside another capture, or another "
                                      "thread captures, or a torch function or dispatch mode is active");
    return PyObject_Vectorcall(c->fn, args, nargsf, kwnames);
}

/* Other threads, and code that a program calls, may drop an entry that runs. */
static void drop(thx_callable_object *c, thx_entry *e) {
    e->dropped = true;
    if (!e->running) thx_entry_free(c->x, e);
}

void thx_entry_leave(thx_callable_object *c, thx_entry *e) {
    if (!--e->running && e->dropped) thx_entry_free(c->x, e);
}

/* Is it a program for any sizes, some of which it may turn out not to fit? */
static bool may_misfit(const thx_entry *e) {
    const thx_sizes *z = e->main.literals.sizes;
    return z && !z->dry && !z->steady;
}

/* A kernel failed. What eager writes before that line is not written yet, and the code may catch the error: eager does
 * it, as long as nothing else has changed; otherwise the error stays, which names the line. */
static PyObject *run_entry_or_raise(thx_callable_object *c, thx_entry *e, const thx_leaves *leaves, thx_request *call) {
    e->running++;
    PyObject *result = thx_entry_run(c, e, leaves, call);
    /* of torch: not what a hook raised, nor another executor's */
    bool kernel = !result && e->main.failed && thx_entry_may_fail_in_eager(c, e);
    bool again = !result && (thx_entry_leaves(e) || kernel) && !c->needs_transform &&
                 PyErr_ExceptionMatches(PyExc_Exception) && !PyErr_ExceptionMatches(c->x->StaleProgram) &&
                 !PyErr_ExceptionMatches(c->x->ValueChanged) && !may_misfit(e) && thx_entry_is_untouched(e);
    thx_entry_leave(c, e);
    if (!again) return result;
    PyErr_Clear();
    return PyObject_Vectorcall(c->fn, call->args, call->nargsf, call->kwnames);
}

/* A call of which a former one like it could not be captured, or not differentiated. */
static PyObject *call_eager(thx_callable_object *c, const thx_entry *e, PyObject *const *args, size_t nargsf,
                            PyObject *kwnames) {
    PyObject *run = e->eager == THX_EAGER_REFUSED ? c->refused : c->fn;
    return PyObject_Vectorcall(run, args, nargsf, kwnames);
}

static int tell(thx_callable_object *c, const char *event, PyObject *detail) {
    if (!c->on_event) return 0;
    PyObject *done = PyObject_CallFunction(c->on_event, "sO", event, detail ? detail : Py_None);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Say once why calls run the original; the pending exception holds the reason. */
static int tell_eager(thx_callable_object *c, const thx_entry *e) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    bool refused = e->eager != THX_EAGER_GRAD, *told = refused ? &c->warned_fallback : &c->warned_grad;
    const char *events[] = {[THX_EAGER_GRAD] = "grad",
                            [THX_EAGER_REFUSED] = "fallback",
                            [THX_EAGER_RAISED] = "raised",
                            [THX_EAGER_ORIGINAL] = "raised"};
    int rc = *told ? 0 : tell(c, events[e->eager], value);
    *told = true;
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return rc;
}

enum { MAX_SETTLED = 4 };

static void drop_all(thx_callable_object *c) {
    c->changes++;
    c->entry_count = 0;
    while (c->entries) {
        thx_entry *e = c->entries;
        c->entries = e->next;
        drop(c, e);
    }
}

static void keep(thx_callable_object *c, thx_entry *e) {
    e->next = c->entries;
    c->entries = e;
    c->entry_count++;
    c->changes++;
}

/* The program raised while it was captured, and all is as it was before: eager leaves behind what it did until then.
 * When eager does not raise, calls like this one cannot be captured. */
static PyObject *raise_in_eager(thx_callable_object *c, thx_entry *e, PyObject *const *args, size_t nargsf,
                                PyObject *kwnames) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *result = PyObject_Vectorcall(c->fn, args, nargsf, kwnames);
    if (result && c->refused) {
        PyErr_Restore(type, value, trace);
        c->fallbacks++;
        if (tell_eager(c, e) < 0) Py_CLEAR(result);
        e->eager = THX_EAGER_GRAD;
        keep(c, e);
        return result;
    }
    if (result) PyErr_Format(c->x->CaptureError, "this raised while it was captured, and not in eager: %S", value);
    Py_CLEAR(result);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    thx_entry_free(c->x, e);
    return NULL;
}

/* A program that turned out not to be right on the way: nothing has left it yet, so the call can begin anew. */
static bool begin_anew(thx_callable_object *c) {
    if (!c->claims || !PyErr_ExceptionMatches(c->x->StaleProgram)) return false;
    PyErr_Clear();
    drop_all(c);
    return true;
}

static PyObject *run_first(thx_callable_object *c, thx_entry *e, thx_request *call) {
    thx_leaves leaves;
    thx_leaves_init(&leaves);
    leaves.args = call->args;
    PyObject *result = NULL;
    int same = 1;
    for (uint32_t i = 0; i < e->nargs && same == 1; i++)
        same = thx_spec_match(c->x, &e->args[i], call->args[i], &leaves);
    if (same == 1) same = thx_entry_match_grads(c->x, e, &leaves);
    if (same == 1)
        result = run_entry_or_raise(c, e, &leaves, call);
    else if (same == 0)
        PyErr_SetString(PyExc_RuntimeError, "an argument changed while the function was captured");
    thx_leaves_fini(&leaves);
    return result;
}

/* Does the call meet ever new values of tensors? Then it gets a refusal. */
static int limit_branches(thx_callable_object *c, thx_request *call) {
    const thx_entry *newest = NULL;
    uint32_t count = 0;
    thx_leaves leaves;
    if (!call->seen || call->refusal) return 0;
    thx_leaves_init(&leaves);
    leaves.args = call->args;
    int same = 0;
    uint64_t changes = c->changes;
    for (thx_entry *e = c->entries, *next; e && same >= 0 && c->changes == changes; e = next) {
        next = e->next;
        if (!e->expected) continue;
        e->running++;
        same = thx_entry_matches(c, e, call->ambient, call->args, PyVectorcall_NARGS(call->nargsf), call->kwnames,
                                 &leaves);
        count += same == 1;
        if (same == 1 && !newest) newest = e;
        thx_entry_leave(c, e);
    }
    if (c->changes != changes) newest = NULL; /* another thread was here: the next call will count */
    thx_leaves_fini(&leaves);
    if (same < 0) return -1;
    char why[120];
    snprintf(why, sizeof why, "calls have met more than %u different values, each with a program of its own",
             (unsigned)c->branch_limit);
    return count >= c->branch_limit && newest ? refuse_values(c->x, newest, call, why) : 0;
}

/* What made a program unfit whose arguments fit: as thx_guards_cause tells it. */
static PyObject *find_cause(thx_callable_object *c, const thx_request *call) {
    thx_leaves leaves;
    thx_leaves_init(&leaves);
    leaves.args = call->args;
    PyObject *cause = NULL;
    Py_ssize_t npositional = PyVectorcall_NARGS(call->nargsf);
    int same = 0;
    uint64_t changes = c->changes;
    for (thx_entry *e = c->entries, *next; e && same >= 0 && c->changes == changes && (!cause || cause == Py_None);
         e = next) {
        next = e->next;
        if (e->dead || memcmp(&e->ambient, call->ambient, sizeof e->ambient) != 0) continue;
        e->running++;
        same = thx_arguments_match(c->x, e, call->args, npositional, call->kwnames, &leaves);
        if (same == 1) {
            Py_XDECREF(cause);
            cause = thx_guards_cause(c->x, e->guards);
            if (!cause) same = -1;
        }
        thx_entry_leave(c, e);
    }
    thx_leaves_fini(&leaves);
    return cause || same < 0 ? cause : Py_NewRef(Py_None);
}

static int tell_log(thx_callable_object *c, const thx_request *call) {
    if (!c->log) return 0;
    Py_ssize_t n = PyVectorcall_NARGS(call->nargsf) + (call->kwnames ? PyTuple_GET_SIZE(call->kwnames) : 0);
    PyObject *args = PyTuple_New(n), *cause = args ? find_cause(c, call) : NULL, *done = NULL, *none = Py_None;
    for (Py_ssize_t i = 0; args && i < n; i++) PyTuple_SET_ITEM(args, i, Py_NewRef(call->args[i]));
    if (cause)
        done = PyObject_CallMethod(c->log, "note", "KOOOO", (unsigned long long)c->calls, args,
                                   call->kwnames ? call->kwnames : none, cause, call->seen ? call->seen : none);
    Py_XDECREF(args);
    Py_XDECREF(cause);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

enum { MAX_ATTEMPTS = 4 }; /* to find the values that the compiled program finds, where eager's differ in a last bit */

/* One thread captures at a time. NULL without an exception: another one does. */
static thx_entry *compile_alone(thx_callable_object *c, thx_request *call, bool first) {
    thx *x = c->x;
    if (x->compiling) return NULL;
    x->compiling = true;
    thx_entry *e = NULL;
    c->misses += first;
    if (!first || (tell_log(c, call) == 0 && limit_branches(c, call) == 0)) e = thx_compile(c, call);
    x->compiling = false;
    return e;
}

/* The run changed state that it also reads (a flag set on first use): capture for the state it left behind. */
static void settle(thx_callable_object *c, const thx_request *call) {
    thx_request again = {
        .ambient = call->ambient, .args = call->args, .nargsf = call->nargsf, .kwnames = call->kwnames};
    thx_entry *after = compile_alone(c, &again, false);
    PyErr_Clear();
    if (after && after->eager)
        thx_entry_free(c->x, after);
    else if (after)
        keep(c, after);
}

/* A program for any sizes could not run: the call goes on without it, and raises what is to be raised. */
static bool is_misfit(thx_entry *e, uint64_t number) {
    enum { MAX_MISFITS = 8 };
    if (!may_misfit(e) || !PyErr_ExceptionMatches(PyExc_Exception)) return false;
    PyErr_Clear();
    e->tried = number;
    if (++e->misfits >= MAX_MISFITS) e->dead = true;
    return true;
}

static PyObject *miss(thx_callable_object *c, thx_request *call) {
    thx *x = c->x;
    thx_entry *e = NULL;
    PyObject *result = NULL;
    for (int attempt = 1; !result; attempt++) {
        e = compile_alone(c, call, attempt == 1);
        if (!e && PyErr_Occurred()) return NULL;
        if (!e) { /* another thread captures; this call does not wait for it */
            c->fallbacks++;
            return call_original(c, call->args, call->nargsf, call->kwnames);
        }
        if (e->eager == THX_EAGER_RAISED) return raise_in_eager(c, e, call->args, call->nargsf, call->kwnames);
        if (e->eager) {
            int told = tell_eager(c, e);
            keep(c, e);
            c->fallbacks++;
            return told < 0 ? NULL : call_eager(c, e, call->args, call->nargsf, call->kwnames);
        }
        result = run_first(c, e, call);
        if (result) break;
        int another = take_value(x, e, call);
        if (another == 0 && is_misfit(e, 0)) another = call->exact = true;
        if (another == 1 && attempt == MAX_ATTEMPTS)
            another = refuse_values(x, e, call, "it is another one each time the same program runs") < 0 ? -1 : 1;
        thx_entry_free(x, e);
        if (another == 1) continue;
        return another == 0 && begin_anew(c) ? miss(c, call) : NULL;
    }
    if (c->cache == 1) { /* kept for last_traces only */
        drop_all(c);
        keep(c, e);
        return result;
    }
    bool changed = (e->nwrites || e->effects.count) && thx_guards_check(x, e->guards) == 0;
    keep(c, e);
    if (changed && c->settled++ < MAX_SETTLED) settle(c, call);
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
            c->changes++;
            drop(c, e);
        } else {
            p = &e->next;
        }
    }
}

/* Of entries that serve a call, one for its very sizes goes first. */
static bool serve_by(thx_callable_object *c, thx_request *call, bool any_sizes, PyObject **result) {
    thx *x = c->x;
    thx_leaves leaves;
    thx_leaves_init(&leaves);
    leaves.args = call->args;
    Py_ssize_t npositional = PyVectorcall_NARGS(call->nargsf);
    uint64_t number = c->calls, changes = c->changes;
    bool served = false;
    for (thx_entry **p = &c->entries; !served && *p && c->cache != 1;) {
        thx_entry *e = *p;
        e->running++;
        bool turn = any_sizes == (e->main.literals.sizes != NULL);
        int same = !turn || e->tried == number || !may_serve(e, call->seen) ? 0
                   : c->cache == 2
                       ? thx_arguments_match(x, e, call->args, npositional, call->kwnames, &leaves)
                       : thx_entry_matches(c, e, call->ambient, call->args, npositional, call->kwnames, &leaves);
        if (same == 1 && c->cache == 2) same = thx_entry_match_grads(x, e, &leaves);
        thx_entry_leave(c, e);
        if (same < 0) break;
        if (c->changes != changes) { /* comparing ran Python code, and that or another thread came by here */
            changes = c->changes;
            p = &c->entries;
            continue;
        }
        if (!same) {
            p = &e->next;
            continue;
        }
        if (c->timed) c->guard_ns += nanoseconds() - c->entered_ns;
        if (any_sizes && !e->main.literals.sizes->steady && thx_sizes_recur(x, e, &leaves)) {
            call->exact = true;
            break;
        }
        if (e->eager) {
            c->fallbacks++;
            *result = call_eager(c, e, call->args, call->nargsf, call->kwnames);
            served = true;
            break;
        }
        e->hits++;
        if (p != &c->entries) { /* most recent first */
            *p = e->next;
            e->next = c->entries;
            c->entries = e;
            c->changes++;
        }
        e->running++; /* it stays while its result is looked at */
        *result = run_entry_or_raise(c, e, &leaves, call);
        int another = *result ? 0 : take_value(x, e, call);
        if (another > 0) e->hits--, e->tried = number;
        if (!*result && another == 0 && is_misfit(e, number)) another = 1;
        thx_entry_leave(c, e);
        if (another < 0) break;
        if (another) { /* the entry for that value, if there is one */
            changes = c->changes;
            p = &c->entries;
            continue;
        }
        c->hits++;
        served = *result || !begin_anew(c);
        break;
    }
    thx_leaves_fini(&leaves);
    return served || PyErr_Occurred();
}

/* False: no entry serves this call. */
static bool serve(thx_callable_object *c, thx_request *call, PyObject **result) {
    if (serve_by(c, call, false, result)) return true;
    bool any = false;
    for (const thx_entry *e = c->entries; e && !any; e = e->next) any = e->main.literals.sizes != NULL;
    return any && serve_by(c, call, true, result);
}

static PyObject *vectorcall(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    thx_callable_object *c = (thx_callable_object *)self;
    thx *x = c->x;
    thx_ambient ambient;
    c->calls++;
    if (c->timed) c->entered_ns = nanoseconds();
    if (x->active &&
        x->active_thread ==
            PyThread_get_thread_ident()) /* called inside another capture: its operations belong to that trace */
        return call_original(c, args, nargsf, kwnames);
    int modes = thx_ambient_read(x, &ambient);
    if (modes < 0) return NULL;
    if (modes) {
        if (!c->needs_transform && !c->warned_modes && (c->warned_modes = true, tell(c, "modes", NULL) < 0))
            return NULL;
        c->fallbacks++;
        return call_original(c, args, nargsf, kwnames);
    }
    thx_request call = {.ambient = &ambient, .args = args, .nargsf = nargsf, .kwnames = kwnames};
    PyObject *result = NULL;
    if (!serve(c, &call, &result)) {
        if (c->entry_count >= 64) drop_dead(c);
        result = miss(c, &call);
    }
    thx_left_clear(&call.left);
    Py_XDECREF(call.seen);
    Py_XDECREF(call.refusal);
    return result;
}

/* ---- the type ---- */

static PyObject *callable_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"fn",        "module",          "cache",  "refused",      "on_event", "remat",
                            "transform", "needs_transform", "claims", "branch_limit", "log",      "dynamic",
                            NULL};
    PyObject *fn, *module = Py_None, *on_event = Py_None, *transform = Py_None, *claims = Py_None, *refused = Py_None,
                  *log = Py_None;
    int cache = 0, remat = TH_REMAT_AUTO, needs = 0;
    unsigned branches = 16, dynamic = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OiOOiOpOIOI", names, &fn, &module, &cache, &refused, &on_event,
                                     &remat, &transform, &needs, &claims, &branches, &log, &dynamic))
        return NULL;
    thx_callable_object *c = (thx_callable_object *)type->tp_alloc(type, 0);
    if (!c) return NULL;
    c->vectorcall = vectorcall;
    c->x = PyType_GetModuleState(type);
    c->fn = Py_NewRef(fn);
    c->module = module == Py_None ? NULL : Py_NewRef(module);
    c->on_event = on_event == Py_None ? NULL : Py_NewRef(on_event);
    c->claims = claims == Py_None ? NULL : Py_NewRef(claims);
    c->cache = (uint8_t)cache;
    c->branch_limit = branches;
    c->dynamic = (uint8_t)dynamic;
    c->log = log == Py_None ? NULL : Py_NewRef(log);
    c->refused = refused == Py_None ? NULL : Py_NewRef(refused);
    c->remat = (uint8_t)remat;
    c->transform = transform == Py_None ? NULL : Py_NewRef(transform);
    c->needs_transform = needs;
    return (PyObject *)c;
}

static int callable_clear(thx_callable_object *c) {
    thx_entry *e = c->entries;
    c->entries = NULL;
    c->entry_count = 0;
    while (e) {
        thx_entry *next = e->next;
        drop(c, e);
        e = next;
    }
    Py_CLEAR(c->fn);
    Py_CLEAR(c->module);
    Py_CLEAR(c->on_event);
    Py_CLEAR(c->log);
    Py_CLEAR(c->claims);
    Py_CLEAR(c->refused);
    Py_CLEAR(c->transform);
    Py_CLEAR(c->dict);
    return 0;
}

static int entry_traverse(const thx_entry *e, visitproc visit, void *arg) {
    int rc = thx_guards_traverse(e->guards, visit, arg);
    if (!rc && e->reads) rc = thx_guards_traverse(e->reads, visit, arg);
    Py_VISIT(e->formula);
    Py_VISIT(e->conditions);
    for (uint32_t i = 0; i < e->nargs && !rc; i++) rc = thx_spec_traverse(&e->args[i], visit, arg);
    if (rc || (rc = thx_spec_traverse(&e->result, visit, arg))) return rc;
    for (uint32_t i = 0; i < e->nwrites; i++) {
        Py_VISIT(e->writes[i].dict);
        Py_VISIT(e->writes[i].key);
        Py_VISIT(e->writes[i].constant);
    }
    return thx_effects_traverse(&e->effects, visit, arg);
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
    Py_VISIT(c->log);
    Py_VISIT(c->claims);
    Py_VISIT(c->refused);
    Py_VISIT(c->transform);
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

static PyObject *entry_stats(const thx_entry *e) {
    const thx_gradient *g = e->gradient;
    return Py_BuildValue(
        "{s:K,s:d,s:d,s:d,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:L,s:L,s:I,s:I,s:n,s:O,s:N}", "hits", e->hits, "capture_ms",
        e->capture_ms, "passes_ms", e->passes_ms, "lower_ms", e->lower_ms, "recorded_by_rule", e->nfast,
        "recorded_by_torch", e->nslow, "queries", e->nqueries, "evaluated", e->nevals, "operations",
        e->main.t ? e->main.t->nops - 1 : 0, "instructions", e->main.plan ? e->main.plan->ninstrs : 0,
        "shim_instructions", e->main.nshim, "builtin_instructions", e->main.nbuiltin, "saved_bytes",
        (long long)(g ? g->bytes_kept : 0), "saved_bytes_without_remat", (long long)(g ? g->bytes : 0),
        "backward_instructions", g ? g->backward.plan->ninstrs : 0, "catalogue_rules", g ? g->ncatalogue : 0, "values",
        e->expected ? PyTuple_GET_SIZE(e->expected) : (Py_ssize_t)0, "any_sizes",
        e->main.literals.sizes ? Py_True : Py_False, "derived_rules", g ? Py_NewRef(g->derived) : PyTuple_New(0));
}

static PyObject *callable_stats(thx_callable_object *c, PyObject *unused) {
    (void)unused;
    PyObject *list = PyList_New(0);
    for (thx_entry *e = c->entries; list && e; e = e->next) {
        if (e->eager) continue;
        PyObject *stats = entry_stats(e);
        if (!stats || PyList_Append(list, stats) < 0) Py_CLEAR(list);
        Py_XDECREF(stats);
    }
    return list ? Py_BuildValue("{s:K,s:K,s:K,s:K,s:N}", "calls", c->calls, "cache_hits", c->hits, "cache_misses",
                                c->misses, "fallbacks", c->fallbacks, "entries", list)
                : NULL;
}

/* A trace to show: evaluated constants, the inputs that the capture did not have, are objects that it names. */
static PyObject *trace_copy(thx *x, const thx_entry *e, const th_trace *t) {
    th_trace *copy = NULL;
    if (thx_check(x, th_trace_clone(t, &copy)) < 0) return NULL;
    if (t != e->main.t || thx_name_constants(x, copy, e->captured->ninputs, e->roots) == 0)
        return thx_trace_object(x, copy);
    th_trace_free(copy);
    return NULL;
}

/* Traces of the entry used last: (captured, final), and where it can be differentiated the gradients from the inputs
 * and the backward; None before the first compile. */
static PyObject *callable_traces(thx_callable_object *c, PyObject *unused) {
    (void)unused;
    const thx_entry *e = c->entries;
    while (e && e->eager) e = e->next;
    if (!e) Py_RETURN_NONE;
    const th_trace *all[] = {e->captured, e->main.t, e->gradient ? e->gradient->again.t : NULL,
                             e->gradient ? e->gradient->backward.t : NULL};
    uint32_t n = e->gradient ? 4 : 2;
    PyObject *tuple = PyTuple_New(n);
    for (uint32_t i = 0; tuple && i < n; i++) {
        PyObject *o = trace_copy(c->x, e, all[i]);
        if (o && e->gradient && i % 2 == 1) { /* the halves */
            ((thx_py_trace *)o)->nsaved = e->gradient->nsaved;
            ((thx_py_trace *)o)->backward = i == 3;
        }
        if (!o)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, o);
    }
    return tuple;
}

static PyObject *callable_reset(thx_callable_object *c, PyObject *unused) {
    (void)unused;
    drop_all(c);
    Py_RETURN_NONE;
}

static PyMethodDef callable_methods[] = {
    {"_stats", (PyCFunction)callable_stats, METH_NOARGS, "Counters of this callable and its entries, as a dict."},
    {"_traces", (PyCFunction)callable_traces, METH_NOARGS,
     "Traces of the entry used last: (captured, final) or (captured, forward, gradients, backward)."},
    {"_reset", (PyCFunction)callable_reset, METH_NOARGS, "Forget all compiled entries."},
    {NULL, NULL, 0, NULL},
};
static PyMemberDef callable_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(thx_callable_object, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(thx_callable_object, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(thx_callable_object, weakrefs), READONLY, NULL},
    {"__wrapped__", T_OBJECT, offsetof(thx_callable_object, fn), READONLY, "The original callable."},
    {"_timed", T_BOOL, offsetof(thx_callable_object, timed), 0, "Whether _guard_ns is counted."},
    {"_guard_ns", T_ULONGLONG, offsetof(thx_callable_object, guard_ns), READONLY,
     "Nanoseconds that hits took up to the choice of their program, while _timed."},
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
