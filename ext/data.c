/* Calls that need the values of tensors: what depends on no input is evaluated, and the rest is found out on the real
 * inputs (shadow.h) and expected to be the same at every run.
 */
#include "observe.h"
#include "shadow.h"

#include <string.h>

static bool raised(const char *const *names) {
    PyObject *type = PyErr_Occurred();
    for (; type && *names; names++)
        if (strcmp(((PyTypeObject *)type)->tp_name, *names) == 0) return true;
    return false;
}

static const char *const data_dependent[] = {"DataDependentOutputException", "DynamicOutputShapeException",
                                             "GuardOnDataDependentSymNode", NULL};
/* What torch says when a kernel wants to read a fake's memory. */
bool thx_read_of_fake_data(void) {
    static const char *const texts[] = {
        "data is not allocated yet",        "Cannot copy out of meta tensor",
        "cannot be called on meta tensors", "data pointer of Tensor that doesn't have storage",
        "Cannot access data pointer of",    NULL};
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *string = value ? PyObject_Str(value) : NULL;
    const char *utf8 = string ? PyUnicode_AsUTF8(string) : NULL;
    bool found = false;
    for (int i = 0; utf8 && texts[i] && !found; i++) found = strstr(utf8, texts[i]) != NULL;
    Py_XDECREF(string);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    return found;
}

static const char *const fake_limits[] = {"UnsupportedFakeTensorException", "UnsupportedOperatorException",
                                          "MetadataMismatchError", "UnsupportedMutationAliasingException", NULL};

static PyObject *const_object(void *user, th_val value) {
    PyObject *real = thx_recorder_constant(user, value);
    if (!real && !PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "not a constant");
    return Py_XNewRef(real);
}

/* Evaluate the call for real when its tensors depend on no input. NULL without an exception when they do. */
static PyObject *evaluate(thx_recording *c) {
    thx_recorder *r = c->r;
    for (uint32_t i = 0; i < r->ninputs; i++) {
        thx_cell *cell = thx_recorder_cell(r, r->inputs[i]);
        if (!cell || !thx_recorder_constant(r, cell->value)) return NULL;
    }
    if (thx_numbers_folded(r, r->t, c->anode) < 0 || (c->knode && thx_numbers_folded(r, r->t, c->knode) < 0))
        return NULL;
    PyObject *args = thx_from_node(r->x, r->t, c->anode, const_object, r);
    PyObject *kwargs = args && c->knode ? thx_from_node(r->x, r->t, c->knode, const_object, r) : NULL;
    PyObject *result = args && (kwargs || !c->knode) ? PyObject_Call(c->func, args, kwargs) : NULL;
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    r->nevals++;
    return result;
}

static PyObject *data_error(thx_recording *c) {
    char text[200];
    snprintf(text, sizeof text, "%s", c->callee ? th_str_get(c->r->x->ctx, c->callee) : Py_TYPE(c->func)->tp_name);
    thx_capture_error(c->r, text, "the result, or its shape, depends on the values of a tensor",
                      "compute it outside, or express it with torch.where and fixed shapes");
    return NULL;
}

/* Real tensors become constant roots. */
static PyObject *adopt_real_results(thx_recorder *r, PyObject *result) {
    PyObject *fakes = result ? thx_fakeify(r, result) : NULL;
    Py_XDECREF(result);
    return fakes;
}

static bool lacks_fake(void) { /* a custom operator without a shape function */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *string = value ? PyObject_Str(value) : NULL;
    const char *utf8 = string ? PyUnicode_AsUTF8(string) : NULL;
    bool found = utf8 && strstr(utf8, "no fake impl registered");
    Py_XDECREF(string);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    return found;
}

static PyObject *tensor_method(thx_recorder *r, const char *name) {
    return PyObject_GetAttrString((PyObject *)r->x->Tensor, name);
}

/* The number in a tensor of no dimensions, where it is constant, or where `ask` says to expect it. NULL without an
 * exception: not so. */
static PyObject *number_in(thx_recorder *r, PyObject *tensor, bool ask) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    if (!cell || th_type_get(r->x->ctx, r->t->values[cell->value].type)->ndim) return NULL;
    th_val value = cell->value;
    PyObject *real = thx_recorder_constant(r, value);
    if (real) return PyObject_CallMethod(real, "item", NULL);
    if (!ask || PyErr_Occurred()) return NULL;
    th_node node = th_node_value(r->t, value);
    PyObject *item = tensor_method(r, "item");
    PyObject *number = item ? thx_expect_value(r, th_intern_z(r->x->ctx, "torch.Tensor.item"), item,
                                               th_node_seq(r->t, TH_N_TUPLE, 1, &node), 0)
                            : NULL;
    Py_XDECREF(item);
    return number;
}

typedef struct concretising {
    thx_recorder *r;
    bool ask, changed;
} concretising;

/* A copy of the arguments with scalar tensors as numbers: x[:n], torch.narrow(x, 0, start, 2). */
static PyObject *concretise(concretising *k, PyObject *o) {
    if (thx_is_tensor(k->r->x, o)) {
        PyObject *number = number_in(k->r, o, k->ask);
        k->changed |= number != NULL;
        return number || PyErr_Occurred() ? number : Py_NewRef(o);
    }
    if (PyTuple_CheckExact(o) || PyList_CheckExact(o)) {
        Py_ssize_t n = PySequence_Fast_GET_SIZE(o);
        PyObject *copy = PyTuple_CheckExact(o) ? PyTuple_New(n) : PyList_New(n);
        for (Py_ssize_t i = 0; copy && i < n; i++) {
            PyObject *item = concretise(k, PySequence_Fast_ITEMS(o)[i]);
            if (!item)
                Py_CLEAR(copy);
            else if (PyTuple_CheckExact(o))
                PyTuple_SET_ITEM(copy, i, item);
            else
                PyList_SET_ITEM(copy, i, item);
        }
        return copy;
    }
    if (PySlice_Check(o)) {
        PySliceObject *s = (PySliceObject *)o;
        PyObject *a = concretise(k, s->start), *b = a ? concretise(k, s->stop) : NULL;
        PyObject *c = b ? concretise(k, s->step) : NULL, *slice = c ? PySlice_New(a, b, c) : NULL;
        Py_XDECREF(a);
        Py_XDECREF(b);
        Py_XDECREF(c);
        return slice;
    }
    return Py_NewRef(o);
}

/* Record the call again with numbers in place of tensors, all but the first argument, which is what is operated on.
 * NULL without an exception when there are none. */
static PyObject *retry_concrete(thx_recording *c, bool ask) {
    Py_ssize_t n = PyTuple_GET_SIZE(c->args);
    concretising k = {c->r, ask, false};
    if (!c->f || n < 2) return NULL;
    PyObject *head = PyTuple_GetSlice(c->args, 0, 1), *tail = PyTuple_GetSlice(c->args, 1, n);
    PyObject *concrete = tail ? concretise(&k, tail) : NULL, *args = NULL, *result = NULL;
    if (head && concrete && k.changed && (args = PySequence_Concat(head, concrete))) {
        thx_func f = *c->f;
        result = thx_record(c->r, &f, c->func, args, c->kwargs);
    }
    Py_XDECREF(args);
    Py_XDECREF(concrete);
    Py_XDECREF(tail);
    Py_XDECREF(head);
    return result;
}

/* The operator in terms of others, under the observer, when it is known in such terms. NULL without an exception: not.
 */
static PyObject *decompose(thx_recording *c, const char *which) {
    thx_recorder *r = c->r;
    PyObject *module = c->callee ? PyImport_ImportModule("thunder._decompositions") : NULL;
    PyObject *table = module ? PyObject_GetAttrString(module, which) : NULL;
    PyObject *function = table ? PyDict_GetItemString(table, th_str_get(r->x->ctx, c->callee)) : NULL, *result = NULL;
    PyObject *given = c->kwargs ? PyDict_GetItemString(c->kwargs, "out") : NULL;
    bool out = given && given != Py_None;
    PyObject *pushed = function && !out ? PyObject_CallOneArg(r->x->push_function, (PyObject *)r) : NULL;
    if (pushed) {
        result = PyObject_Call(function, c->args, c->kwargs);
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *popped = PyObject_CallNoArgs(r->x->pop_function);
        Py_XDECREF(popped);
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
        if (result == Py_NotImplemented) Py_CLEAR(result);
    }
    Py_XDECREF(pushed);
    Py_XDECREF(table);
    Py_XDECREF(module);
    return result;
}

PyObject *thx_call_in_parts(thx_recording *c) { return c->r->may_expect ? decompose(c, "GRADIENTS") : NULL; }

/* ---- run for real, for the shapes ---- */

/* May it write to its arguments, or draw random numbers? Then running it twice is not running it once. */
static bool runs_once(const thx_recording *c) {
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : "_";
    size_t length = strlen(name);
    PyObject *given = c->kwargs ? PyDict_GetItemString(c->kwargs, "out") : NULL;
    bool out = given && given != Py_None, writes = false;
    PyObject *schema = PyObject_GetAttrString(c->func, "_schema");
    PyObject *mutable = schema ? PyObject_GetAttrString(schema, "is_mutable") : NULL;
    PyErr_Clear();
    writes = mutable ? mutable == Py_True : length < 2 || (name[length - 1] == '_' && name[length - 2] != '_');
    Py_XDECREF(mutable);
    Py_XDECREF(schema);
    return out || writes || c->random || c->r->saw_random || c->r->schema_writes;
}

/* Which argument shares storage with a real result? */
static void share_storage(thx_recording *c, PyObject *real, th_val value, int64_t offset) {
    thx_recorder *r = c->r;
    void *base = thx_storage_base(r->x, real);
    for (uint32_t i = 0; base && i < r->ninputs; i++) {
        thx_cell *cell = thx_recorder_cell(r, r->inputs[i]);
        PyObject *from = cell ? thx_shadow_value(r, cell->value) : NULL;
        thx_meta meta;
        bool same = from && thx_storage_base(r->x, from) == base && thx_read_meta(r->x, from, false, &meta) == 0;
        Py_XDECREF(from);
        if (!same) continue;
        r->t->values[value].alias = thx_alias_group(r->t, cell->value);
        r->t->values[value].offset = offset - meta.offset + r->t->values[cell->value].offset;
        return;
    }
}

enum { MAX_RESULTS = 64 };
typedef struct results {
    th_val values[MAX_RESULTS];
    uint32_t count;
    th_node node;
} results;

/* The fake of a real tensor that is a result. NULL without an exception: a trace does not hold such. */
static PyObject *take_tensor(thx_recording *c, PyObject *real, results *out) {
    thx_recorder *r = c->r;
    thx_meta meta;
    PyObject *layout = PyObject_GetAttrString(real, "layout");
    bool strided = layout == r->x->strided && Py_TYPE(real) == r->x->Tensor;
    Py_XDECREF(layout);
    if (!strided || out->count == MAX_RESULTS || thx_read_meta(r->x, real, false, &meta) < 0) return NULL;
    meta.requires_grad = false;
    th_typeref type = thx_meta_type(r->x, &meta);
    PyObject *fake = type ? thx_fake(r->x, type) : NULL;
    if (!fake) return NULL;
    th_val value = th_trace_value(r->t, 0, thx_flag_type(r, type, &c->note));
    r->t->values[value].offset = meta.offset;
    share_storage(c, real, value, meta.offset);
    out->values[out->count++] = value;
    out->node = th_node_value(r->t, value);
    if (thx_recorder_define(r, fake, value) < 0) Py_CLEAR(fake);
    return fake;
}

static PyObject *take_result(thx_recording *c, PyObject *real, results *out) {
    if (thx_is_tensor(c->r->x, real)) return take_tensor(c, real, out);
    if (real == Py_None) {
        out->node = th_node_none(c->r->t);
        return Py_NewRef(real);
    }
    if (!PyTuple_Check(real) && !PyList_Check(real)) return NULL;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(real);
    th_node kids[MAX_RESULTS];
    PyObject *fakes = n <= MAX_RESULTS ? PyList_New(n) : NULL, *result = NULL;
    for (Py_ssize_t i = 0; fakes && i < n; i++) {
        PyObject *fake = take_result(c, PySequence_Fast_ITEMS(real)[i], out);
        if (!fake) {
            Py_CLEAR(fakes);
            break;
        }
        kids[i] = out->node;
        PyList_SET_ITEM(fakes, i, fake);
    }
    if (fakes) {
        out->node = th_node_seq(c->r->t, TH_N_TUPLE, (uint32_t)n, kids);
        result = PyList_CheckExact(real)
                     ? Py_NewRef(fakes)
                     : PyObject_CallOneArg(
                           PyTuple_CheckExact(real) ? (PyObject *)&PyTuple_Type : (PyObject *)Py_TYPE(real), fakes);
    }
    Py_XDECREF(fakes);
    return result;
}

/* Later runs have to give the same shapes. */
static int expect_shapes(thx_recorder *r, const results *out) {
    PyObject *size = tensor_method(r, "size");
    int rc = size ? 0 : -1;
    for (uint32_t i = 0; i < out->count && rc == 0; i++) {
        th_node node = th_node_value(r->t, out->values[i]);
        PyObject *shape = thx_expect_value(r, th_intern_z(r->x->ctx, "torch.Tensor.size"), size,
                                           th_node_seq(r->t, TH_N_TUPLE, 1, &node), 0);
        rc = shape ? 0 : -1;
        Py_XDECREF(shape);
    }
    Py_XDECREF(size);
    return rc;
}

/* Run the call on the real inputs and record it with what it gave. NULL without an exception: it cannot be done. */
static PyObject *run_for_shapes(thx_recording *c) {
    thx_recorder *r = c->r;
    if (runs_once(c) || !r->may_expect) return NULL;
    PyObject *real = thx_shadow_call(r, c->func, c->anode, c->knode);
    results out = {.count = 0};
    PyObject *fakes = real ? take_result(c, real, &out) : NULL;
    if (fakes && (!out.count || thx_call_emit(c, out.node, !thx_is_tensor(r->x, real), 0, NULL, 0) < 0 ||
                  thx_shadow_keep(r, out.node, real) < 0 || expect_shapes(r, &out) < 0))
        Py_CLEAR(fakes);
    Py_XDECREF(real);
    return fakes;
}

static PyObject *cannot_run(thx_recording *c, const char *torch_says) {
    char text[200], why[300];
    snprintf(why, sizeof why, "torch cannot tell its result's shape without running it (%.200s)", torch_says);
    snprintf(text, sizeof text, "%s", c->callee ? th_str_get(c->r->x->ctx, c->callee) : Py_TYPE(c->func)->tp_name);
    thx_capture_error(c->r, text, why, "call this part outside the compiled function");
    return NULL;
}

/* Kernels for lists refuse fakes as numbers with errors of their own. NULL with the pending exception: it is none. */
static PyObject *with_lists(thx_recording *c) {
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : "";
    PyObject *type, *value, *trace, *result = NULL;
    PyErr_Fetch(&type, &value, &trace);
    if (strncmp(name, "torch._foreach_", 15) == 0) result = decompose(c, "TABLE");
    if (!result && !PyErr_Occurred()) {
        PyErr_Restore(type, value, trace);
        return NULL;
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return result;
}

PyObject *thx_call_otherwise(thx_recording *c) {
    bool data = raised(data_dependent) || thx_read_of_fake_data();
    if (!data && !raised(fake_limits) && !PyErr_ExceptionMatches(PyExc_NotImplementedError) && !lacks_fake())
        return with_lists(c); /* else the call itself is wrong */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *said = value && !data ? PyObject_Str(value) : NULL;
    PyErr_Clear();
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    PyObject *result = data ? evaluate(c) : NULL;
    if (result) {
        result = adopt_real_results(c->r, result);
    } else if (!PyErr_Occurred()) {
        if (data) result = retry_concrete(c, false);
        if (data && !result && !PyErr_Occurred()) result = decompose(c, "TABLE");
        if (data && !result && !PyErr_Occurred()) result = retry_concrete(c, true);
        if (!result && !PyErr_Occurred()) result = run_for_shapes(c);
    }
    if (!result && !PyErr_Occurred()) {
        const char *utf8 = said ? PyUnicode_AsUTF8(said) : NULL;
        if (data)
            data_error(c);
        else
            cannot_run(c, utf8 ? utf8 : "");
    }
    Py_XDECREF(said);
    return result;
}

/* What becomes a message is not worth a program for each value: the user may catch the error. */
static bool is_message(const char *name) {
    return strstr(name, ".__repr__") || strstr(name, ".__str__") || strstr(name, ".__format__");
}

PyObject *thx_call_for_data(thx_recording *c) {
    thx_recorder *r = c->r;
    PyObject *result = evaluate(c);
    const char *name = c->callee ? th_str_get(r->x->ctx, c->callee) : "";
    r->forgivable = is_message(name);
    if (!result && !PyErr_Occurred() && !r->forgivable)
        result = thx_expect_value(r, c->callee, c->func, c->anode, c->knode);
    if (!result && !PyErr_Occurred()) data_error(c);
    r->forgivable = false;
    return result;
}
