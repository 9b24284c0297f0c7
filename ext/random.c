/* Seeding inside captured code.
 *
 * Nothing is drawn while a program is captured, so torch's generator changes only when the program seeds it or puts a
 * saved state back (torch.manual_seed, fork_rng, set_rng_state). Its state is looked at before each random operation:
 * a state never seen is a seed of the program's own and becomes an operation that sets it; the caller's own state means
 * that the program went back to it. After each random operation the generator is moved on, so that seeding it the same
 * way twice is seen twice.
 *
 * Generators that a program is given, or reaches, are drawn from by its operations alone: it may not ask for their
 * state or set it, nor make one, which each call would begin anew.
 */
#include "capture.h"
#include "guards.h"

static int same_state(thx_recorder *r, PyObject *a, PyObject *b) {
    PyObject *pair[] = {NULL, a, b};
    PyObject *same = PyObject_Vectorcall(r->x->equal, pair + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_XDECREF(same);
    return same ? same == Py_True : -1;
}

static int remember(thx_recorder *r, PyObject *state) {
    Py_XSETREF(r->rng_last, Py_NewRef(state));
    return r->rng_saved ? 0 : PyList_Append(r->rng_outer, state);
}

static void see_threads(thx_recorder *r) {
    PyThreadState *first = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(PyThreadState_Get()));
    r->threads |= first && PyThreadState_Next(first);
}

int thx_random_begin(thx_recorder *r) {
    see_threads(r);
    PyObject *state = PyObject_CallNoArgs(r->x->get_rng_state);
    r->rng_outer = PyList_New(0);
    int rc = state && r->rng_outer ? remember(r, state) : -1;
    Py_XDECREF(state);
    return rc;
}

static int emit_set(thx_recorder *r, th_val state) {
    th_trace *t = r->t;
    th_node arg = th_node_value(t, state);
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = th_intern_z(r->x->ctx, "torch.set_rng_state"),
                     .args = th_node_seq(t, TH_N_TUPLE, 1, &arg),
                     .effects = TH_FX_RANDOM | TH_FX_STATE};
    return thx_emit(r, &op);
}

static int emit_save(thx_recorder *r, PyObject *example) {
    th_trace *t = r->t;
    thx_meta meta;
    if (thx_read_meta(r->x, example, false, &meta) < 0) return -1;
    r->rng_saved = th_trace_value(t, 0, thx_meta_type(r->x, &meta));
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = th_intern_z(r->x->ctx, "torch.get_rng_state"),
                     .args = th_node_seq(t, TH_N_TUPLE, 0, NULL),
                     .outs = th_node_value(t, r->rng_saved),
                     .effects = TH_FX_RANDOM | TH_FX_STATE};
    return thx_emit(r, &op);
}

bool thx_random_is_state(thx_recorder *r, PyObject *tensor) {
    PyObject *dtype = PyObject_GetAttrString(tensor, "dtype");
    bool bytes = dtype && thx_dtype_ref(r->x, dtype) == TH_U8, found = false;
    for (Py_ssize_t i = 0; bytes && !found && i < PyList_GET_SIZE(r->rng_outer); i++)
        found = same_state(r, tensor, PyList_GET_ITEM(r->rng_outer, i)) == 1;
    PyErr_Clear();
    Py_XDECREF(dtype);
    return found;
}

/* The place of a state in the caller's stream, counted from its end: 0 is where it stands; -1: none. */
static Py_ssize_t place_in_stream(thx_recorder *r, PyObject *state) {
    Py_ssize_t n = PyList_GET_SIZE(r->rng_outer);
    for (Py_ssize_t i = 0; i < n; i++)
        if (same_state(r, state, PyList_GET_ITEM(r->rng_outer, n - 1 - i)) == 1) return i;
    return -1;
}

/* torch.manual_seed seeds the generators of all devices, and a plan would put back the CPU's alone. */
static bool others_have_generators(thx *x) {
    static const char *const kinds[] = {"cuda", "xpu"};
    bool found = false;
    for (int i = 0; i < 2 && !found; i++) {
        PyObject *module = PyObject_GetAttrString(x->torch, kinds[i]);
        PyObject *used = module ? PyObject_CallMethod(module, "is_initialized", NULL) : NULL;
        found = used == Py_True;
        PyErr_Clear();
        Py_XDECREF(used);
        Py_XDECREF(module);
    }
    return found;
}

int thx_random_before(thx_recorder *r) {
    see_threads(r);
    if (r->seeded && others_have_generators(r->x))
        return thx_capture_error(r, "the random number generator", "it is set where a device has one of its own",
                                 "seed outside the compiled function");
    PyObject *state = PyObject_CallNoArgs(r->x->get_rng_state);
    int same = state ? same_state(r, state, r->rng_last) : -1, rc = same < 0 ? -1 : 0;
    bool another = same == 0 && !r->seeded && r->threads;
    r->seeded = false;
    if (another) {
        rc = remember(r, state);
    } else if (same == 0) {
        Py_ssize_t place = place_in_stream(r, state);
        if (place > 0) {
            rc = thx_capture_error(r, "the random number generator",
                                   "it was put back to an earlier state of the caller's stream",
                                   "save and restore random states outside the compiled function");
        } else if (place == 0 && r->rng_saved) {
            rc = emit_set(r, r->rng_saved);
            r->rng_saved = 0;
        } else if (place < 0) {
            thx_cell *cell = NULL;
            rc = r->rng_saved ? 0 : emit_save(r, state);
            if (rc == 0 && !(cell = thx_recorder_cell(r, state))) rc = -1;
            rc = rc == 0 ? emit_set(r, cell->value) : rc;
        }
        if (rc == 0) Py_XSETREF(r->rng_last, Py_NewRef(state));
    }
    Py_XDECREF(state);
    return rc;
}

int thx_random_after(thx_recorder *r) {
    PyObject *size = PyLong_FromLong(1), *drawn = size ? PyObject_CallOneArg(r->x->rand, size) : NULL;
    PyObject *state = drawn ? PyObject_CallNoArgs(r->x->get_rng_state) : NULL;
    int rc = state ? remember(r, state) : -1;
    Py_XDECREF(state);
    Py_XDECREF(drawn);
    Py_XDECREF(size);
    return rc;
}

/* Inside vmap and grad what draws without a tensor, and dropout, draws at once: no operation is recorded for it. */
PyObject *thx_random_through(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
    PyObject *before = PyObject_CallNoArgs(r->x->get_rng_state);
    PyObject *result = before ? PyObject_Call(func, args, kwargs) : NULL;
    PyObject *after = result ? PyObject_CallNoArgs(r->x->get_rng_state) : NULL;
    int same = after ? same_state(r, after, r->rng_last) : -1;
    if (same == 0) same = same_state(r, after, before);
    if (same == 0)
        thx_capture_error(r, THX_TRANSFORMED_RANDOM, "they are drawn at once, and later calls would have the same ones",
                          "draw them outside the transform");
    if (same <= 0) Py_CLEAR(result);
    Py_XDECREF(after);
    Py_XDECREF(before);
    return result;
}

int thx_random_end(thx_recorder *r) {
    if (!r->rng_outer || !PyList_GET_SIZE(r->rng_outer)) return 0;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *now = PyObject_CallNoArgs(r->x->get_rng_state), *first = PyList_GET_ITEM(r->rng_outer, 0), *done = NULL;
    int same = now ? same_state(r, now, first) : -1;
    if (same == 0 && !(done = PyObject_CallOneArg(r->x->set_rng_state, first))) same = -1;
    Py_XDECREF(done);
    Py_XDECREF(now);
    if (type || same >= 0) {
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    return same < 0 && !type ? -1 : 0;
}

/* ---- generators besides torch's own ---- */

static int gather(const thx *x, const th_trace *t, th_node n, PyObject *list) {
    const th_node_data *d = &t->nodes[n];
    if (d->kind == TH_N_OPAQUE) {
        PyObject *object = t->opaques[d->u.ref].object;
        bool one = object && Py_TYPE(object) == x->Generator && object != x->default_generator;
        return one && PySequence_Contains(list, object) == 0 ? PyList_Append(list, object) : 0;
    }
    for (uint32_t i = 0; d->kind >= TH_N_TUPLE && d->kind <= TH_N_SLICE && i < d->count; i++)
        if (gather(x, t, t->kids[t->nodes[n].u.kids + i], list) < 0) return -1;
    return 0;
}

static int gather_op(const thx *x, const th_trace *t, const th_op *op, PyObject *list) {
    if (op->kind != TH_OP_CALL || !(op->effects & TH_FX_RANDOM)) return 0;
    return gather(x, t, op->args, list) < 0 ? -1 : op->kwargs ? gather(x, t, op->kwargs, list) : 0;
}

PyObject *thx_random_generators(const thx *x, const th_trace *t) {
    PyObject *list = PyList_New(0);
    for (th_opref o = 1; list && o < t->nops; o++)
        if (gather_op(x, t, &t->ops[o], list) < 0) Py_CLEAR(list);
    return list;
}

/* The operation recorded last draws from generators that were there before the call. */
int thx_random_check(thx_recorder *r) {
    PyObject *list = PyList_New(0);
    int rc = list ? gather_op(r->x, r->t, &r->t->ops[r->t->nops - 1], list) : -1;
    for (Py_ssize_t i = 0; rc == 0 && i < PyList_GET_SIZE(list); i++)
        if (!r->reached || !thx_guards_holds_generator(r->reached, PyList_GET_ITEM(list, i)))
            rc = thx_capture_error(r, "a generator of random numbers that the function makes",
                                   "later calls would go on with it instead of making another one",
                                   "make it outside and pass it");
    Py_XDECREF(list);
    return rc;
}
