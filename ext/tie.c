/* Hooks that captured code puts on tensors it computes, and gradients it wants retained.
 *
 *     b = a.sin(); b.register_hook(fn)      ->    _: "effect" = thunder._kernels.tie_hook(t0, hook)
 *
 * The hook stays the user's function, called from the backward program. It was made during the capture and serves every
 * later call, so it must be one that every call would have made: what it holds on to has to be constant, or to have
 * been there before the capture, where guards watch it. The check is made when the user's code has ended, as variables
 * of enclosing functions may change until then.
 */
#include "capture.h"
#include "guards.h"

#include <string.h>

static PyObject *kernel(const char *name) {
    PyObject *module = PyImport_ImportModule("thunder._kernels");
    PyObject *found = module ? PyObject_GetAttrString(module, name) : NULL;
    Py_XDECREF(module);
    return found;
}

/* The user's code gets the object; it is also kept, with the line, to be looked at when the code has ended. */
static int keep(thx_recorder *r, PyObject *object) {
    th_str file = 0;
    uint32_t line = 0;
    thx_user_line(r, &file, &line);
    if (!r->ties && !(r->ties = PyList_New(0))) return -1;
    PyObject *row = Py_BuildValue("(OsI)", object, file ? th_str_get(r->x->ctx, file) : "?", (unsigned)line);
    int rc = row ? PyList_Append(r->ties, row) : -1;
    Py_XDECREF(row);
    return rc;
}

static int emit(thx_recorder *r, const char *callee, uint32_t n, const th_node *args, th_node outs) {
    return thx_emit(r, &(th_op_args){.kind = TH_OP_CALL,
                                     .callee = th_intern_z(r->x->ctx, callee),
                                     .args = th_node_seq(r->t, TH_N_TUPLE, n, args),
                                     .outs = outs,
                                     .outs_list = outs != 0,
                                     .effects = TH_FX_STATE});
}

/* ---- tensors ---- */

PyObject *thx_tie_hook(thx_recorder *r, PyObject *tensor, PyObject *hook) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    PyObject *cls = cell ? kernel("CapturedHook") : NULL, *captured = cls ? PyObject_CallOneArg(cls, hook) : NULL;
    Py_XDECREF(cls);
    if (!captured) return NULL;
    th_node args[] = {th_node_value(r->t, cell->value), th_node_opaque(r->t, "hook", captured)};
    cell->ours = false; /* never to stand for another value */
    if (keep(r, captured) < 0 || emit(r, "thunder._kernels.tie_hook", 2, args, 0) < 0) Py_CLEAR(captured);
    return captured;
}

PyObject *thx_tie_grad(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    if (!cell) return NULL;
    th_node arg = th_node_value(r->t, cell->value);
    cell->ours = false;
    if (emit(r, "thunder._kernels.tie_grad", 1, &arg, 0) < 0) return NULL;
    Py_RETURN_NONE;
}

/* ---- modules ---- */

/* The tensor as it is on the other side of a module's border: the same storage, another value. */
static PyObject *cross(thx_recorder *r, PyObject *tensor, th_node *out) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    th_trace *t = r->t;
    if (!cell) return NULL;
    th_val from = cell->value, to = th_trace_value(t, 0, t->values[from].type);
    if (!t->values[from].alias) t->values[from].alias = th_trace_alias(t);
    t->values[to].alias = t->values[from].alias;
    t->values[to].offset = t->values[from].offset;
    PyObject *fake = thx_fake(r->x, t->values[from].type);
    *out = th_node_value(t, to);
    if (fake && thx_recorder_define(r, fake, to) < 0) Py_CLEAR(fake);
    return fake;
}

PyObject *thx_tie_module(thx_recorder *r, PyObject *args) {
    Py_ssize_t n = PyTuple_GET_SIZE(args) - 1; /* after the class */
    PyObject *cls = kernel("ModuleNode"), *node = cls ? PyObject_CallNoArgs(cls) : NULL, *results = PyTuple_New(n);
    th_node *in = PyMem_Calloc((size_t)n + 1, sizeof *in), *out = PyMem_Calloc((size_t)n + 1, sizeof *out);
    int rc = node && results && in && out ? 0 : -1;
    if (rc == 0) in[0] = th_node_opaque(r->t, "module", node);
    for (Py_ssize_t i = 0; rc == 0 && i < n; i++) {
        PyObject *tensor = PyTuple_GET_ITEM(args, i + 1);
        thx_cell *cell = thx_recorder_cell(r, tensor);
        PyObject *fake = cell ? cross(r, tensor, &out[i]) : NULL;
        if (!fake) {
            rc = -1;
            break;
        }
        in[i + 1] = th_node_value(r->t, cell->value);
        PyTuple_SET_ITEM(results, i, fake);
    }
    if (rc == 0) rc = keep(r, node);
    if (rc == 0)
        rc = emit(r, "thunder._kernels.tie_module", (uint32_t)n + 1, in,
                  th_node_seq(r->t, TH_N_TUPLE, (uint32_t)n, out));
    PyMem_Free(in);
    PyMem_Free(out);
    Py_XDECREF(cls);
    Py_XDECREF(node);
    if (rc < 0) Py_CLEAR(results);
    return results;
}

/* The node of the border that the tensor has crossed last: new reference; NULL without an exception: none. */
PyObject *thx_tie_node(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    const th_op *op = cell ? &r->t->ops[r->t->values[cell->value].def] : NULL;
    if (!op || op->callee_opaque || strcmp(th_str_get(r->x->ctx, op->callee), "thunder._kernels.tie_module") != 0)
        return NULL;
    th_node node = r->t->kids[r->t->nodes[op->args].u.kids];
    return Py_NewRef((PyObject *)r->t->opaques[r->t->nodes[node].u.ref].object);
}

/* ---- what a hook may hold on to ---- */

enum { MAX_DEPTH = 16 };

static bool lasts(thx *x, const thx_guards *g, PyObject *o, int depth);

static bool all_last(thx *x, const thx_guards *g, PyObject *items, int depth) {
    bool all = true;
    if (!items || items == Py_None) return true;
    for (Py_ssize_t i = 0; all && i < PySequence_Fast_GET_SIZE(items); i++)
        all = lasts(x, g, PySequence_Fast_ITEMS(items)[i], depth + 1);
    return all;
}

static bool values_last(thx *x, const thx_guards *g, PyObject *dict, int depth) {
    PyObject *value;
    bool all = true;
    for (Py_ssize_t at = 0; dict && PyDict_Check(dict) && all && PyDict_Next(dict, &at, NULL, &value);)
        all = lasts(x, g, value, depth + 1);
    return all;
}

static bool attributes_last(thx *x, const thx_guards *g, PyObject *o, const char *const *names, int depth) {
    bool all = true;
    for (; *names && all; names++) {
        PyObject *value = PyObject_GetAttrString(o, *names);
        all = value && (PyDict_CheckExact(value)   ? values_last(x, g, value, depth)
                        : PyList_CheckExact(value) ? all_last(x, g, value, depth)
                                                   : lasts(x, g, value, depth + 1));
        Py_XDECREF(value);
    }
    PyErr_Clear();
    return all;
}

static bool function_lasts(thx *x, const thx_guards *g, PyObject *f, int depth) {
    PyObject *closure = PyFunction_GET_CLOSURE(f);
    bool all =
        all_last(x, g, PyFunction_GET_DEFAULTS(f), depth) && values_last(x, g, PyFunction_GET_KW_DEFAULTS(f), depth);
    for (Py_ssize_t i = 0; closure && all && i < PyTuple_GET_SIZE(closure); i++) {
        PyObject *cell = PyTuple_GET_ITEM(closure, i);
        all = thx_guards_watches_cell(g, cell) || lasts(x, g, PyCell_GET(cell), depth + 1);
    }
    return all;
}

static bool lasts(thx *x, const thx_guards *g, PyObject *o, int depth) {
    static const char *const partial[] = {"func", "args", "keywords", NULL};
    static const char *const module_hook[] = {"module", NULL}; /* which holds the hooks, or torch does */
    if (!o || o == Py_None || PyBool_Check(o) || PyLong_CheckExact(o) || PyFloat_CheckExact(o) ||
        PyUnicode_CheckExact(o) || PyBytes_CheckExact(o) || PyType_Check(o) || PyModule_Check(o) || PyCode_Check(o) ||
        thx_guards_knows(g, o))
        return true;
    if (depth > MAX_DEPTH) return false;
    if (thx_is_tensor(x, o)) return !thx_is_fake(x, o) && thx_guards_holds(g, o);
    if (PyFunction_Check(o)) return function_lasts(x, g, o, depth);
    if (PyMethod_Check(o))
        return lasts(x, g, PyMethod_GET_SELF(o), depth + 1) && lasts(x, g, PyMethod_GET_FUNCTION(o), depth + 1);
    if (PyCFunction_Check(o)) return lasts(x, g, PyCFunction_GET_SELF(o), depth + 1);
    if (PyTuple_CheckExact(o)) return all_last(x, g, o, depth);
    const char *type = Py_TYPE(o)->tp_name;
    if (strcmp(type, "functools.partial") == 0) return attributes_last(x, g, o, partial, depth);
    if (strcmp(type, "BackwardHook") == 0) return attributes_last(x, g, o, module_hook, depth);
    return false;
}

static PyObject *functions_of(PyObject *object) {
    if (PyObject_HasAttrString(object, "functions")) return PyObject_CallMethod(object, "functions", NULL);
    PyObject *function = PyObject_GetAttrString(object, "function");
    return function ? Py_BuildValue("[N]", function) : NULL;
}

void thx_ties_close(thx_recorder *r) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (Py_ssize_t i = 0; r->ties && i < PyList_GET_SIZE(r->ties); i++) {
        PyObject *object = PyTuple_GET_ITEM(PyList_GET_ITEM(r->ties, i), 0);
        PyObject *done =
            PyObject_HasAttrString(object, "close") ? PyObject_CallMethod(object, "close", NULL) : Py_NewRef(Py_None);
        if (done == Py_None) PyObject_SetAttrString(object, "capturing", Py_False);
        Py_XDECREF(done);
        PyErr_Clear();
    }
    PyErr_Restore(type, value, trace);
}

int thx_ties_check(thx_recorder *r, const thx_guards *g) {
    for (Py_ssize_t i = 0; r->ties && i < PyList_GET_SIZE(r->ties); i++) {
        PyObject *row = PyList_GET_ITEM(r->ties, i), *functions = functions_of(PyTuple_GET_ITEM(row, 0));
        if (!functions) return -1;
        bool all = all_last(r->x, g, functions, 0);
        Py_DECREF(functions);
        if (all) continue;
        PyErr_Format(r->x->GradNeeded, "%U, line %S: a hook holds on to something that was made inside the function",
                     PyTuple_GET_ITEM(row, 1), PyTuple_GET_ITEM(row, 2));
        return -1;
    }
    return 0;
}
