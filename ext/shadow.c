/* See shadow.h. */
#include "shadow.h"

#include "ambient.h"
#include "guards_watch.h"

#include "passes/tie.h"

#include <string.h>

struct thx_shadow {
    PyObject **real; /* by value: the tensor it stands for (owned); NULL: not there yet */
    uint32_t nreal;
    th_opref done;        /* operations before it have run; 0: none, and the inputs are not there */
    uint32_t nroots;      /* inputs that are there */
    bool *copied;         /* by root: a copy, because the program writes its storage */
    PyObject *generators; /* where the run has left them (owned) */
};

enum { MAX_VALUES = 256, MAX_ITEMS = 4096 }; /* asked for in one capture; in one list */

void thx_shadow_free(thx_shadow *s) {
    if (!s) return;
    for (uint32_t i = 0; i < s->nreal; i++) Py_XDECREF(s->real[i]);
    PyMem_Free(s->real);
    PyMem_Free(s->copied);
    Py_XDECREF(s->generators);
    PyMem_Free(s);
}

static PyObject *helper(const char *name) {
    PyObject *module = PyImport_ImportModule("thunder._values");
    PyObject *found = module ? PyObject_GetAttrString(module, name) : NULL;
    Py_XDECREF(module);
    return found;
}

static PyObject *call_helper(const char *name, PyObject *argument) {
    PyObject *function = helper(name);
    PyObject *result = !function  ? NULL
                       : argument ? PyObject_CallOneArg(function, argument)
                                  : PyObject_CallNoArgs(function);
    Py_XDECREF(function);
    return result;
}

PyObject *thx_undo_new(const thx *x, const th_trace *t, PyObject *tensors, bool draws) {
    PyObject *make = helper("Undo"), *undo = NULL;
    PyObject *others = draws ? thx_random_generators(x, t) : Py_NewRef(Py_None);
    if (make && others) undo = PyObject_CallFunctionObjArgs(make, tensors, others, NULL);
    Py_XDECREF(others);
    Py_XDECREF(make);
    return undo;
}

/* ---- inputs ---- */

static int grow(thx_recorder *r, thx_shadow *s) {
    const th_trace *t = r->t;
    if (s->nreal < t->nvalues) {
        PyObject **real = PyMem_Realloc(s->real, sizeof *real * t->nvalues);
        if (!real) return PyErr_NoMemory(), -1;
        memset(real + s->nreal, 0, sizeof *real * (t->nvalues - s->nreal));
        s->real = real;
        s->nreal = t->nvalues;
    }
    bool *copied = PyMem_Realloc(s->copied, r->nroots + 1);
    if (!copied) return PyErr_NoMemory(), -1;
    s->copied = copied;
    return 0;
}

static void start_again(thx_shadow *s) {
    for (uint32_t i = 0; i < s->nreal; i++) Py_CLEAR(s->real[i]);
    Py_CLEAR(s->generators);
    s->done = s->nroots = 0;
}

/* A write to an input that ran as it is, or one beside others that may share its memory, came later. */
static bool is_outdated(const thx_recorder *r, const thx_shadow *s) {
    for (uint32_t i = 0; s->nroots && i < r->nroots; i++)
        if ((i >= s->nroots || !s->copied[i]) && th__is_written(r->t, r->roots[i].value, r->t->nops)) return true;
    return false;
}

/* Inputs as they are, or copies of those that the program writes. */
static int bring_inputs(thx_recorder *r, thx_shadow *s) {
    if (is_outdated(r, s)) start_again(s);
    PyObject *written = PyList_New(0);
    int rc = written ? 0 : -1;
    for (uint32_t i = s->nroots; i < r->nroots && rc == 0; i++) {
        s->copied[i] = th__is_written(r->t, r->roots[i].value, r->t->nops);
        if (s->copied[i]) rc = PyList_Append(written, r->roots[i].real);
    }
    PyObject *copies = rc == 0 ? call_helper("copies", written) : NULL;
    if (!copies) rc = -1;
    Py_ssize_t at = 0;
    for (uint32_t i = s->nroots; i < r->nroots && rc == 0; i++) {
        PyObject *real = s->copied[i] ? PyList_GET_ITEM(copies, at++) : r->roots[i].real;
        Py_XSETREF(s->real[r->roots[i].value], Py_NewRef(real));
    }
    if (rc == 0) s->nroots = r->nroots;
    Py_XDECREF(copies);
    Py_XDECREF(written);
    return rc;
}

/* ---- operations ---- */

PyObject *thx_shadow_value(void *recorder, th_val value) {
    thx_shadow *s = ((thx_recorder *)recorder)->shadow;
    if (value < s->nreal && s->real[value]) return Py_NewRef(s->real[value]);
    PyErr_SetString(PyExc_RuntimeError, "a value was not computed");
    return NULL;
}

static int keep(thx_recorder *r, th_node outs, PyObject *result) {
    const th_node_data *d = &r->t->nodes[outs];
    if (d->kind == TH_N_VALUE && thx_is_tensor(r->x, result)) {
        Py_XSETREF(r->shadow->real[d->u.ref], Py_NewRef(result));
    } else if ((d->kind == TH_N_TUPLE || d->kind == TH_N_LIST) && (PyTuple_Check(result) || PyList_Check(result))) {
        for (uint32_t i = 0; i < d->count && i < (uint32_t)PySequence_Fast_GET_SIZE(result); i++)
            if (keep(r, r->t->kids[d->u.kids + i], PySequence_Fast_ITEMS(result)[i]) < 0) return -1;
    }
    return 0;
}

/* The tensors that go into a module, as those that come out of its border. */
static int pass_border(thx_recorder *r, const th_op *op) {
    const th_trace *t = r->t;
    const th_node_data *in = &t->nodes[op->args], *out = &t->nodes[op->outs];
    for (uint32_t i = 0; i < out->count; i++) {
        PyObject *real = thx_shadow_value(r, t->nodes[t->kids[in->u.kids + i + 1]].u.ref);
        if (!real) return -1;
        Py_XSETREF(r->shadow->real[t->nodes[t->kids[out->u.kids + i]].u.ref], real);
    }
    return 0;
}

/* Effects that are the program's own, or none at all when it runs once more. */
static bool is_harmless(const th_trace *t, const th_op *op) {
    const char *name = op->callee_opaque ? "" : th_str_get(t->ctx, op->callee);
    return strstr(name, "rng_state") || strstr(name, "assert") || strstr(name, "profiler._record_function") ||
           strcmp(name, "thunder._kernels.raise_if") == 0;
}

static int run_op(thx_recorder *r, th_opref o) {
    const th_trace *t = r->t;
    const th_op *op = &t->ops[o];
    th__tie tie = th__tie_of(t, op);
    if (tie == TH__TIE_MODULE) return pass_border(r, op);
    if (tie != TH__TIE_NONE || th__op_only_reads(t, op) || th__op_is(t, op, "thunder._kernels.warn_if")) return 0;
    if ((op->effects & TH_FX_STATE) && !is_harmless(t, op)) {
        char text[200];
        snprintf(text, sizeof text, "%.150s before a value of a tensor is used", th__op_label(t, op));
        return thx_capture_error(r, text, "it has an effect of its own, which would happen again for another value",
                                 "call it after the value is known, or outside the compiled function");
    }
    PyObject *result = thx_eval_op(r->x, t, op, thx_shadow_value, r);
    int rc = result ? keep(r, op->outs, result) : -1;
    Py_XDECREF(result);
    r->nevals++;
    return rc;
}

typedef struct surroundings {
    thx_autocast cast;
    int grad;
    PyObject *generators;
} surroundings;

static int set_grad(thx *x, int on) {
    PyObject *done = PyObject_CallOneArg(x->set_grad, on ? Py_True : Py_False);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static int swap_generators(thx_recorder *r, surroundings *s) {
    thx_shadow *shadow = r->shadow;
    PyObject *others = thx_random_generators(r->x, r->t);
    s->generators = others ? call_helper("generators", others) : NULL;
    Py_XDECREF(others);
    if (!s->generators) return -1;
    PyObject *mine = shadow->generators
                         ? Py_NewRef(shadow->generators)
                         : Py_BuildValue("(OOO)", PyList_GET_ITEM(r->rng_outer, 0), PyTuple_GET_ITEM(s->generators, 1),
                                         PyTuple_GET_ITEM(s->generators, 2));
    PyObject *done = mine ? call_helper("set_generators", mine) : NULL;
    Py_XDECREF(mine);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static int enter(thx_recorder *r, surroundings *s, bool random) {
    *s = (surroundings){.grad = thx_grad_mode(r->x)};
    if (s->grad < 0 || thx_autocast_off(r->x, &s->cast) < 0) return -1;
    if (set_grad(r->x, 0) == 0 && (!random || swap_generators(r, s) == 0)) return 0;
    thx_autocast_on(r->x, &s->cast);
    return -1;
}

static int leave(thx_recorder *r, surroundings *s) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    int rc = set_grad(r->x, s->grad);
    if (s->generators) {
        PyObject *others = thx_random_generators(r->x, r->t);
        Py_XSETREF(r->shadow->generators, others ? call_helper("generators", others) : NULL);
        Py_XDECREF(others);
        PyObject *done = r->shadow->generators ? call_helper("set_generators", s->generators) : NULL;
        if (!done) rc = -1;
        Py_XDECREF(done);
        Py_CLEAR(s->generators);
    }
    thx_autocast_on(r->x, &s->cast);
    if (type) {
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    return rc;
}

/* Run what was recorded since the last time. */
static int catch_up(thx_recorder *r) {
    if (!r->shadow && !(r->shadow = PyMem_Calloc(1, sizeof *r->shadow))) return PyErr_NoMemory(), -1;
    thx_shadow *s = r->shadow;
    surroundings around;
    if (thx_check(r->x, th_trace_status(r->t)) < 0 || grow(r, s) < 0 || bring_inputs(r, s) < 0) return -1;
    if (!s->done) s->done = 1;
    bool random = false;
    for (th_opref o = s->done; o < r->t->nops; o++) random |= (r->t->ops[o].effects & TH_FX_RANDOM) != 0;
    if (s->done == r->t->nops) return 0;
    if (enter(r, &around, random) < 0) return -1;
    int rc = 0;
    for (; s->done < r->t->nops && rc == 0; s->done++) rc = run_op(r, s->done);
    return leave(r, &around) < 0 ? -1 : rc;
}

PyObject *thx_shadow_call(thx_recorder *r, PyObject *func, th_node args, th_node kwargs) {
    surroundings around;
    if (catch_up(r) < 0) return NULL;
    PyObject *a = thx_from_node(r->x, r->t, args, thx_shadow_value, r);
    PyObject *k = a && kwargs ? thx_from_node(r->x, r->t, kwargs, thx_shadow_value, r) : NULL, *result = NULL;
    if (a && (k || !kwargs) && enter(r, &around, false) == 0) {
        result = PyObject_Call(func, a, k);
        if (leave(r, &around) < 0) Py_CLEAR(result);
    }
    Py_XDECREF(a);
    Py_XDECREF(k);
    return result;
}

int thx_shadow_keep(thx_recorder *r, th_node outs, PyObject *result) {
    if (grow(r, r->shadow) < 0 || keep(r, outs, result) < 0) return -1;
    r->shadow->done = r->t->nops;
    return 0;
}

/* ---- expectations ---- */

static bool is_literal(PyObject *o, int *left) {
    if (--*left < 0) return false;
    if (o == Py_None || PyBool_Check(o) || PyFloat_CheckExact(o) || PyComplex_CheckExact(o) || PyUnicode_CheckExact(o))
        return true;
    if (PyLong_CheckExact(o)) {
        int overflow = 0;
        PyLong_AsLongLongAndOverflow(o, &overflow);
        return !overflow;
    }
    if (!PyTuple_CheckExact(o) && !PyList_CheckExact(o)) return false;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(o); i++)
        if (!is_literal(PySequence_Fast_ITEMS(o)[i], left)) return false;
    return true;
}

bool thx_same_values(PyObject *a, PyObject *b) {
    if (Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyComplex_CheckExact(a)) {
        Py_complex p = PyComplex_AsCComplex(a), q = PyComplex_AsCComplex(b);
        return memcmp(&p, &q, sizeof p) == 0;
    }
    if (!PyTuple_CheckExact(a) && !PyList_CheckExact(a)) return thx_same_value(a, b);
    Py_ssize_t n = PySequence_Fast_GET_SIZE(a);
    bool same = n == PySequence_Fast_GET_SIZE(b);
    for (Py_ssize_t i = 0; i < n && same; i++)
        same = thx_same_values(PySequence_Fast_ITEMS(a)[i], PySequence_Fast_ITEMS(b)[i]);
    return same;
}

/* A torch.Size is compared as the tuple that it is. */
static PyObject *plain(PyObject *value) {
    return PyTuple_Check(value) && !PyTuple_CheckExact(value) ? PySequence_Tuple(value) : Py_NewRef(value);
}

static int emit_expectation(thx_recorder *r, th_str callee, PyObject *func, th_node args, th_node kwargs,
                            PyObject *value) {
    thx *x = r->x;
    th_trace *t = r->t;
    th_node parts[] = {th_node_int(t, PyList_GET_SIZE(r->expected)),
                       callee ? th_node_symbol(t, callee) : th_node_opaque(t, "fn", func), args,
                       kwargs ? kwargs : th_node_seq(t, TH_N_DICT, 0, NULL),
                       thx_to_node(x, t, value, thx_recorder_value, r)};
    return PyErr_Occurred() ? -1
                            : thx_emit(r, &(th_op_args){.kind = TH_OP_CALL,
                                                        .callee = th_intern_z(x->ctx, "thunder._kernels.expect"),
                                                        .args = th_node_seq(t, TH_N_TUPLE, 5, parts),
                                                        .effects = TH_FX_STATE,
                                                        .marks = TH_MARK_NO_GRAD});
}

PyObject *thx_expect_value(thx_recorder *r, th_str callee, PyObject *func, th_node args, th_node kwargs) {
    int left = MAX_ITEMS;
    if (!r->may_expect) return NULL;
    if (!r->expected && !(r->expected = PyList_New(0))) return NULL;
    Py_ssize_t n = PyList_GET_SIZE(r->expected);
    if (n >= MAX_VALUES) {
        thx_capture_error(r, "a loop over values of tensors", "it asks for more than 256 of them",
                          "compute with tensors, or ask for all values at once with tolist()");
        return NULL;
    }
    PyObject *result = NULL, *value = NULL;
    if (r->oracle && n < PyTuple_GET_SIZE(r->oracle))
        result = Py_NewRef(PyTuple_GET_ITEM(r->oracle, n));
    else
        result = thx_shadow_call(r, func, args, kwargs);
    if (!result || !(value = plain(result)) || !is_literal(value, &left)) {
        Py_XDECREF(value);
        Py_XDECREF(result);
        return NULL;
    }
    if (emit_expectation(r, callee, func, args, kwargs, value) < 0 || PyList_Append(r->expected, value) < 0)
        Py_CLEAR(result);
    Py_DECREF(value);
    return result;
}

PyObject *thx_expect(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    thx *x = PyModule_GetState(module);
    if (nargs != 5 || !PyTuple_Check(args[2]))
        return PyErr_Format(PyExc_TypeError, "expect takes number, function, args, kwargs and value");
    PyObject *kwargs = PyDict_Check(args[3]) && PyDict_GET_SIZE(args[3]) ? args[3] : NULL;
    PyObject *found = PyObject_Call(args[1], args[2], kwargs), *value = found ? plain(found) : NULL;
    Py_XDECREF(found);
    if (!value) return NULL;
    bool same = thx_same_values(value, args[4]);
    if (!same) {
        PyObject *what = PyTuple_Pack(2, args[0], value);
        if (what) PyErr_SetObject(x->ValueChanged, what);
        Py_XDECREF(what);
    }
    Py_DECREF(value);
    if (!same) return NULL;
    Py_RETURN_NONE;
}
