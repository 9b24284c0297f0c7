/* The two observers of a capture.
 *
 * Layer 1 sits on torch's function-mode stack and sees each API-level call (torch.relu, F.linear, Tensor.view,
 * operators, properties) whole. Its results come from our own meta rule, or from torch's fake kernels when there is
 * none. Layer 2 is the fakes' __torch_dispatch__: it sees ATen operations that layer 1 was not asked about: TorchScript
 * code, legacy constructors, code under functorch, and everything under autocast (where the ATen level holds the
 * casts).
 */
#include "capture.h"

#include <string.h>

typedef struct call { /* one operation being recorded */
    thx_recorder *r;
    const thx_func *f;
    PyObject *func, *args, *kwargs; /* borrowed; kwargs NULL when empty */
    th_str callee;
    const th_opdef *def;
    th_node anode, knode;
    bool random;
    thx_grad_note note;
} call;

static long version_of(thx *x, PyObject *tensor) {
    PyObject *v = x->version_get(tensor, x->version_closure);
    if (!v) { /* inference tensors have none */
        PyErr_Clear();
        return -1;
    }
    long version = PyLong_AsLong(v);
    Py_DECREF(v);
    return version;
}

/* ---- real tensors in arguments become their fakes ---- */

static PyObject *fakeify(thx_recorder *r, PyObject *o);

static PyObject *fakeify_sequence(thx_recorder *r, PyObject *o) {
    Py_ssize_t n = PySequence_Fast_GET_SIZE(o);
    PyObject **items = PySequence_Fast_ITEMS(o);
    PyObject *result = PyTuple_CheckExact(o) ? PyTuple_New(n) : PyList_New(n);
    for (Py_ssize_t i = 0; result && i < n; i++) {
        PyObject *item = fakeify(r, items[i]);
        if (!item)
            Py_CLEAR(result);
        else if (PyTuple_CheckExact(o))
            PyTuple_SET_ITEM(result, i, item);
        else
            PyList_SET_ITEM(result, i, item);
    }
    return result;
}

static PyObject *fakeify_dict(thx_recorder *r, PyObject *o) {
    PyObject *result = PyDict_New(), *key, *value;
    Py_ssize_t at = 0;
    while (result && PyDict_Next(o, &at, &key, &value)) {
        PyObject *item = fakeify(r, value);
        if (!item || PyDict_SetItem(result, key, item) < 0) Py_CLEAR(result);
        Py_XDECREF(item);
    }
    return result;
}

static PyObject *fakeify(thx_recorder *r, PyObject *o) {
    if (thx_is_tensor(r->x, o)) {
        return Py_XNewRef(thx_recorder_fake(r, o));
    }
    if (PyTuple_CheckExact(o) || PyList_CheckExact(o)) return fakeify_sequence(r, o);
    if (PyDict_CheckExact(o)) return fakeify_dict(r, o);
    if (PySlice_Check(o)) {
        PySliceObject *s = (PySliceObject *)o;
        PyObject *a = fakeify(r, s->start), *b = a ? fakeify(r, s->stop) : NULL, *c = b ? fakeify(r, s->step) : NULL;
        PyObject *slice = c ? PySlice_New(a, b, c) : NULL;
        Py_XDECREF(a);
        Py_XDECREF(b);
        Py_XDECREF(c);
        return slice;
    }
    return Py_NewRef(o);
}

/* ---- results become values ---- */

static uint32_t alias_group(th_trace *t, th_val v) {
    if (!t->values[v].alias) t->values[v].alias = th_trace_alias(t);
    return t->values[v].alias;
}

/* Which input shares storage with a fresh output? Sets the value's alias group and offset. */
static int find_alias(thx_recorder *r, PyObject *out, th_val value, const thx_meta *meta) {
    thx *x = r->x;
    for (uint32_t i = 0; i < r->ninputs; i++) {
        PyObject *pair[] = {NULL, out, r->inputs[i]};
        PyObject *yes = PyObject_Vectorcall(x->is_alias_of, pair + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        if (!yes) return -1;
        Py_DECREF(yes);
        if (yes != Py_True) continue;
        thx_cell *cell = thx_recorder_cell(r, r->inputs[i]);
        thx_meta base;
        if (!cell || thx_read_meta(x, r->inputs[i], true, &base) < 0) return -1;
        th_value *source = &r->t->values[cell->value];
        r->t->values[value].offset = meta->offset - base.offset + source->offset;
        r->t->values[value].alias = alias_group(r->t, cell->value);
        return 0;
    }
    return 0;
}

static bool is_input(const thx_recorder *r, PyObject *o) {
    for (uint32_t i = 0; i < r->ninputs; i++)
        if (r->inputs[i] == o) return true;
    return false;
}

static th_node none_node(thx_recorder *r) { return th_node_none(r->t); }

static th_node out_tensor(thx_recorder *r, PyObject *out, const thx_grad_note *note) {
    thx *x = r->x;
    if (!thx_is_fake(x, out)) { /* a real tensor: nothing about it depends on fakes */
        thx_cell *cell = thx_recorder_cell(r, out);
        return cell ? none_node(r) : 0;
    }
    PyObject *layout = PyObject_GetAttrString(out, "layout");
    Py_XDECREF(layout);
    if (layout != x->strided) {
        thx_capture_error(r, "an operation with a sparse result", "its layout has no strides",
                          "call it outside the compiled function");
        return 0;
    }
    if (!thx_fake_adopt(x, out)) return 0;
    thx_meta meta;
    if (thx_read_meta(x, out, true, &meta) < 0) return 0;
    th_typeref type = thx_meta_type(x, &meta);
    if (!type) return 0;
    th_val value = th_trace_value(r->t, 0, thx_flag_type(r, type, note));
    if (is_input(r, out)) { /* the operation returns an input object: a new value for the same tensor */
        thx_cell *cell = thx_recorder_cell(r, out);
        if (!cell) return 0;
        r->t->values[value].alias = alias_group(r->t, cell->value);
        r->t->values[value].offset = r->t->values[cell->value].offset;
        bool before = th_type_get(x->ctx, r->t->values[cell->value].type)->flags & TH_TYPE_REQUIRES_GRAD;
        r->t->values[value].type = th_type_set_grad(x->ctx, type, note->grad || before);
    } else if (find_alias(r, out, value, &meta) < 0) {
        return 0;
    }
    if (thx_recorder_define(r, out, value) < 0) return 0;
    return th_node_value(r->t, value);
}

static th_node out_node(thx_recorder *r, PyObject *out, uint32_t *tensors, const thx_grad_note *note) {
    if (thx_is_tensor(r->x, out)) {
        ++*tensors;
        return out_tensor(r, out, note);
    }
    if (PyTuple_Check(out) || PyList_Check(out)) {
        Py_ssize_t n = PySequence_Fast_GET_SIZE(out);
        th_node *kids = PyMem_Malloc(sizeof(th_node) * (size_t)(n + 1)), result = 0;
        Py_ssize_t i = 0;
        for (; kids && i < n; i++)
            if (!(kids[i] = out_node(r, PySequence_Fast_ITEMS(out)[i], tensors, note))) break;
        if (kids && i == n) result = th_node_seq(r->t, TH_N_TUPLE, (uint32_t)n, kids);
        PyMem_Free(kids);
        return result;
    }
    return none_node(r);
}

/* Does the program run this operation in an inference mode of its own? Its results then carry the mark. */
static int note_inference(thx_recorder *r) {
    PyObject *on = PyObject_CallNoArgs(r->x->inference);
    if (!on) return -1;
    *((on == Py_True) == r->inference ? &r->outside : &r->inside) = true;
    Py_DECREF(on);
    return 0;
}

int thx_emit(thx_recorder *r, const th_op_args *op) {
    th_op_args here = *op;
    if (note_inference(r) < 0) return -1;
    thx_user_line(r, &here.file, &here.line);
    if (!th_trace_op(r->t, &here)) return thx_check(r->x, th_trace_status(r->t) ? th_trace_status(r->t) : TH_EINTERNAL);
    return 0;
}

static int emit(call *c, th_node outs, bool outs_list, uint8_t effects, const th_val *writes, uint32_t nwrites) {
    thx_recorder *r = c->r;
    if (!outs && !nwrites) effects |= TH_FX_STATE; /* what gives nothing and writes nothing is there for its effect */
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = c->callee,
                     .args = c->anode,
                     .kwargs = c->knode,
                     .outs = outs,
                     .outs_list = outs_list,
                     .effects = effects,
                     .marks = c->note.marks | (r->late ? TH_MARK_LATE : 0),
                     .writes = writes,
                     .nwrites = nwrites};
    if (!c->callee) op.callee_opaque = th_trace_opaque(r->t, "fn", c->func);
    if (!(effects & TH_FX_RANDOM) || r->deriving) return thx_emit(r, &op);
    return thx_random_before(r) < 0 || thx_emit(r, &op) < 0 || thx_random_after(r) < 0 ? -1 : 0;
}

/* ---- our own meta rules ---- */

static PyObject *fast_out(call *c, const th_out *out, th_node *node) {
    thx_recorder *r = c->r;
    th_val value = th_trace_value(r->t, 0, thx_flag_type(r, th_type_set_grad(r->x->ctx, out->type, false), &c->note));
    PyObject *fake = thx_pool_fake(r, out->type);
    if (!fake) return NULL;
    if (out->alias_of) {
        r->t->values[value].alias = alias_group(r->t, out->alias_of);
        r->t->values[value].offset = out->offset;
    }
    *node = th_node_value(r->t, value);
    if (thx_recorder_define(r, fake, value) < 0)
        Py_CLEAR(fake);
    else
        thx_recorder_cell(r, fake)->ours = true;
    return fake;
}

/* In place: the first argument's tensor takes a new value of the same type and storage. */
static PyObject *fast_inplace(call *c, const th_call *rule) {
    thx_recorder *r = c->r;
    PyObject *self = r->inputs[0];
    thx_cell *cell = thx_recorder_cell(r, self);
    if (!cell || rule->outs[0].type != r->t->values[cell->value].type) return NULL;
    th_val before = cell->value, value = th_trace_value(r->t, 0, rule->outs[0].type);
    if (thx_check_write(r, before, &c->note) < 0) return NULL;
    cell->ours = false;
    r->t->values[value].alias = alias_group(r->t, before);
    r->t->values[value].offset = r->t->values[before].offset;
    uint8_t effects = TH_FX_WRITES | (c->random ? TH_FX_RANDOM : 0);
    thx_note_write(r, before, &c->note);
    r->t->values[value].type = r->t->values[before].type;
    if (thx_recorder_define(r, self, value) < 0 || emit(c, th_node_value(r->t, value), false, effects, &before, 1) < 0)
        return NULL;
    return Py_NewRef(self);
}

/* NULL without an exception: the rule declined. */
static PyObject *fast(call *c) {
    thx_recorder *r = c->r;
    th_call rule = {.default_dtype = r->default_dtype, .default_device = r->default_device};
    if (th_call_bind(&rule, c->def, r->t, c->anode, c->knode) != TH_OK) return NULL;
    rule.default_dtype = r->default_dtype;
    rule.default_device = r->default_device;
    rule.facts = r->x->facts;
    if (c->def->meta(&rule) != TH_OK) return NULL;
    if (!rule.outs_list && rule.nouts == 1 && rule.outs[0].same && r->ninputs) return Py_NewRef(r->inputs[0]);
    if (c->def->effects & TH_OPDEF_INPLACE) return r->ninputs ? fast_inplace(c, &rule) : NULL;
    for (uint32_t i = 0; i < rule.nouts; i++)
        if (rule.outs[i].same) return NULL;
    uint8_t effects = c->random || (c->def->effects & TH_FX_RANDOM) ? TH_FX_RANDOM : 0;
    if (!rule.outs_list && rule.nouts == 1) {
        th_node node = 0;
        PyObject *fake = fast_out(c, &rule.outs[0], &node);
        if (fake && emit(c, node, false, effects, NULL, 0) < 0) Py_CLEAR(fake);
        return fake;
    }
    th_node nodes[TH_MAX_OUTS];
    PyObject *tuple = PyTuple_New(rule.nouts);
    for (uint32_t i = 0; tuple && i < rule.nouts; i++) {
        PyObject *fake = fast_out(c, &rule.outs[i], &nodes[i]);
        if (!fake)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, fake);
    }
    if (tuple && emit(c, th_node_seq(r->t, TH_N_TUPLE, rule.nouts, nodes), true, effects, NULL, 0) < 0) Py_CLEAR(tuple);
    return tuple;
}

/* ---- torch's fake kernels ---- */

static PyObject *call_under_fake_mode(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
    thx *x = r->x;
    PyObject *mode = thx_fake_mode(x), *entered = mode ? PyObject_CallMethodNoArgs(mode, x->n.enter) : NULL;
    if (!entered) return NULL;
    Py_DECREF(entered);
    PyObject *result = NULL, *pushed = PyObject_CallOneArg(x->push_dispatch, (PyObject *)r);
    if (pushed) {
        r->depth++;
        result = PyObject_Call(func, args, kwargs);
        r->depth--;
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *popped = PyObject_CallOneArg(x->pop_dispatch, Py_None);
        if (!popped) PyErr_Clear();
        Py_XDECREF(popped);
        PyErr_Restore(type, value, trace);
        Py_DECREF(pushed);
    }
    thx_leave(x, Py_NewRef(mode));
    return result;
}

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
static PyObject *evaluate(call *c) {
    thx_recorder *r = c->r;
    for (uint32_t i = 0; i < r->ninputs; i++) {
        thx_cell *cell = thx_recorder_cell(r, r->inputs[i]);
        if (!cell || !thx_recorder_constant(r, cell->value)) return NULL;
    }
    PyObject *args = thx_from_node(r->x, r->t, c->anode, const_object, r);
    PyObject *kwargs = args && c->knode ? thx_from_node(r->x, r->t, c->knode, const_object, r) : NULL;
    PyObject *result = args && (kwargs || !c->knode) ? PyObject_Call(c->func, args, kwargs) : NULL;
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    r->nevals++;
    return result;
}

static PyObject *data_error(call *c) {
    char text[200];
    snprintf(text, sizeof text, "%s", c->callee ? th_str_get(c->r->x->ctx, c->callee) : Py_TYPE(c->func)->tp_name);
    thx_capture_error(c->r, text, "the result, or its shape, depends on the values of a tensor",
                      "compute it outside, or express it with torch.where and fixed shapes");
    return NULL;
}

/* Real tensors become constant roots. */
static PyObject *adopt_real_results(thx_recorder *r, PyObject *result) {
    PyObject *fakes = result ? fakeify(r, result) : NULL;
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

/* A copy of the arguments with scalar tensors that depend on no input as numbers: x[:n], torch.narrow(x, 0, start, 2).
 */
static PyObject *concretise(thx_recorder *r, PyObject *o, bool *changed) {
    if (thx_is_tensor(r->x, o)) {
        thx_cell *cell = thx_recorder_cell(r, o);
        const th_type *type = cell ? th_type_get(r->x->ctx, r->t->values[cell->value].type) : NULL;
        PyObject *real = type && !type->ndim ? thx_recorder_constant(r, cell->value) : NULL;
        *changed |= real != NULL;
        return real ? PyObject_CallMethod(real, "item", NULL) : PyErr_Occurred() ? NULL : Py_NewRef(o);
    }
    if (PyTuple_CheckExact(o) || PyList_CheckExact(o)) {
        Py_ssize_t n = PySequence_Fast_GET_SIZE(o);
        PyObject *copy = PyTuple_CheckExact(o) ? PyTuple_New(n) : PyList_New(n);
        for (Py_ssize_t i = 0; copy && i < n; i++) {
            PyObject *item = concretise(r, PySequence_Fast_ITEMS(o)[i], changed);
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
        PyObject *a = concretise(r, s->start, changed), *b = a ? concretise(r, s->stop, changed) : NULL;
        PyObject *c = b ? concretise(r, s->step, changed) : NULL, *slice = c ? PySlice_New(a, b, c) : NULL;
        Py_XDECREF(a);
        Py_XDECREF(b);
        Py_XDECREF(c);
        return slice;
    }
    return Py_NewRef(o);
}

static PyObject *record(thx_recorder *r, const thx_func *f, PyObject *func, PyObject *args, PyObject *kwargs);

/* Record the call again with constants as numbers, all but the first argument, which is what is operated on. NULL
 * without an exception when there are none. */
static PyObject *retry_concrete(call *c) {
    Py_ssize_t n = PyTuple_GET_SIZE(c->args);
    bool changed = false;
    if (!c->f || n < 2) return NULL;
    PyObject *head = PyTuple_GetSlice(c->args, 0, 1), *tail = PyTuple_GetSlice(c->args, 1, n);
    PyObject *concrete = tail ? concretise(c->r, tail, &changed) : NULL, *args = NULL, *result = NULL;
    if (head && concrete && changed && (args = PySequence_Concat(head, concrete))) {
        thx_func f = *c->f;
        result = record(c->r, &f, c->func, args, c->kwargs);
    }
    Py_XDECREF(args);
    Py_XDECREF(concrete);
    Py_XDECREF(tail);
    Py_XDECREF(head);
    return result;
}

/* The operator in terms of others, under the observer, when it is known in such terms. NULL without an exception: not.
 */
static PyObject *decompose(call *c) {
    thx_recorder *r = c->r;
    PyObject *module = c->callee ? PyImport_ImportModule("thunder._decompositions") : NULL;
    PyObject *table = module ? PyObject_GetAttrString(module, "TABLE") : NULL;
    PyObject *function = table ? PyDict_GetItemString(table, th_str_get(r->x->ctx, c->callee)) : NULL, *result = NULL;
    PyObject *pushed = function ? PyObject_CallOneArg(r->x->push_function, (PyObject *)r) : NULL;
    if (pushed) {
        result = PyObject_Call(function, c->args, c->kwargs);
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *popped = PyObject_CallNoArgs(r->x->pop_function);
        Py_XDECREF(popped);
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(pushed);
    Py_XDECREF(table);
    Py_XDECREF(module);
    return result;
}

/* A check of data: kept, in its place. */
static PyObject *record_check(call *c) {
    if (emit(c, 0, false, TH_FX_STATE, NULL, 0) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *explain_failure(call *c) {
    if (raised(data_dependent) || thx_read_of_fake_data()) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *result = evaluate(c);
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        if (result) return adopt_real_results(c->r, result);
        if (!PyErr_Occurred()) result = retry_concrete(c);
        if (!result && !PyErr_Occurred()) result = decompose(c);
        return result || PyErr_Occurred() ? result : data_error(c);
    }
    if (raised(fake_limits) || PyErr_ExceptionMatches(PyExc_NotImplementedError) || lacks_fake()) {
        char text[200], why[300];
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *string = value ? PyObject_Str(value) : NULL;
        const char *utf8 = string ? PyUnicode_AsUTF8(string) : NULL;
        snprintf(why, sizeof why, "torch cannot tell its result's shape without running it (%.200s)", utf8 ? utf8 : "");
        Py_XDECREF(string);
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        snprintf(text, sizeof text, "%s", c->callee ? th_str_get(c->r->x->ctx, c->callee) : Py_TYPE(c->func)->tp_name);
        thx_capture_error(c->r, text, why, "call this part outside the compiled function");
    }
    return NULL;
}

/* torch._assert_async and its kind: they give nothing, and are there for what they raise. */
static bool asserts(const call *c) {
    return c->callee && strstr(th_str_get(c->r->x->ctx, c->callee), "assert") != NULL;
}

/* By its name, x.add_, x[i] = y, inplace=, out=: others (an embedding that renorms its rows) know what they do. */
static bool says_that_it_writes(const call *c) {
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : "";
    bool overload = strncmp(name, "torch.ops.", 10) == 0; /* aten.add_.Tensor */
    const char *end = overload ? strrchr(name, '.') : name + strlen(name);
    PyObject *inplace = c->kwargs ? PyDict_GetItemString(c->kwargs, "inplace") : NULL;
    return (end > name && end[-1] == '_') || inplace == Py_True ||
           (c->kwargs && PyDict_GetItemString(c->kwargs, "out"));
}

/* Emit what a slow call did: outputs, writes seen by version counters, randomness seen by the watcher. */
static int emit_slow(call *c, PyObject **result, const long *versions) {
    thx_recorder *r = c->r;
    th_val writes[64];
    uint32_t nwrites = 0, tensors = 0;
    for (uint32_t i = 0; i < r->ninputs; i++) {
        bool by_schema = i < 64 && r->schema_writes >> i & 1;
        if (!by_schema && version_of(r->x, r->inputs[i]) == versions[i]) continue;
        thx_cell *cell = thx_recorder_cell(r, r->inputs[i]);
        if (cell && says_that_it_writes(c) && thx_check_write(r, cell->value, &c->note) < 0) return -1;
        if (cell && nwrites < 64) writes[nwrites++] = cell->value;
    }
    if (!nwrites && thx_is_tensor(r->x, *result) && is_input(r, *result))
        return 0; /* returned its input untouched: nothing happened */
    th_node outs = out_node(r, *result, &tensors, &c->note);
    if (!outs) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        return -1;
    }
    if (!tensors && !nwrites && !r->saw_random && !asserts(c)) {
        r->nqueries++;
        return 0;
    }
    if (!tensors) outs = 0;
    uint8_t effects = (nwrites ? TH_FX_WRITES : 0) | (r->saw_random || c->random ? TH_FX_RANDOM : 0);
    if (emit(c, outs, !thx_is_tensor(r->x, *result), effects, writes, nwrites) < 0) return -1;
    for (uint32_t i = 0; i < nwrites; i++) {
        alias_group(r->t, writes[i]);
        thx_note_write(r, writes[i], &c->note);
    }
    if (thx_is_tensor(r->x, *result) && !thx_is_fake(r->x, *result)) {
        PyObject *fake = fakeify(r, *result);
        Py_SETREF(*result, fake);
    }
    return *result ? 0 : -1;
}

static PyObject *slow(call *c) {
    thx_recorder *r = c->r;
    PyObject *args = r->real_inputs ? fakeify(r, c->args) : Py_NewRef(c->args);
    PyObject *kwargs = args && c->kwargs ? (r->real_inputs ? fakeify(r, c->kwargs) : Py_NewRef(c->kwargs)) : NULL;
    if (!args || (c->kwargs && !kwargs)) {
        Py_XDECREF(args);
        return NULL;
    }
    for (uint32_t i = 0; i < r->ninputs; i++) {
        if (!(r->inputs[i] = thx_recorder_fake(r, r->inputs[i]))) {
            Py_DECREF(args);
            Py_XDECREF(kwargs);
            return NULL;
        }
        thx_recorder_cell(r, r->inputs[i])->ours = false; /* what a kernel does to it or keeps of it cannot be told */
    }
    long fixed[64], *versions = r->ninputs <= 64 ? fixed : PyMem_Malloc(sizeof(long) * r->ninputs);
    uint32_t count = r->ninputs;
    for (uint32_t i = 0; i < count; i++) versions[i] = version_of(r->x, r->inputs[i]);
    r->saw_random = false;
    r->schema_writes = 0;
    PyObject *result = call_under_fake_mode(r, c->func, args, kwargs);
    r->nslow++;
    if (!result)
        result = explain_failure(c);
    else if (emit_slow(c, &result, versions) < 0)
        Py_CLEAR(result);
    if (versions != fixed) PyMem_Free(versions);
    Py_DECREF(args);
    Py_XDECREF(kwargs);
    return result;
}

/* ---- layer 1 ---- */

static bool autocast_on(thx *x) {
    PyObject *on = PyObject_CallNoArgs(x->any_autocast);
    PyErr_Clear();
    Py_XDECREF(on);
    return on == Py_True;
}

bool thx_under_functorch(thx *x) {
    PyObject *level = PyObject_CallNoArgs(x->functorch_level);
    PyErr_Clear();
    Py_XDECREF(level);
    return level && level != Py_None;
}

/* A pure operation on tensors that no transform has wrapped is what it is outside the transform; on wrapped ones
 * thx_to_node notices. */
static bool indifferent_to_functorch(const thx_func *f) {
    return f->kind == THX_FUNC_RECORD && !f->random && f->def && f->def->meta &&
           !(f->def->effects & (TH_OPDEF_INPLACE | TH_FX_RANDOM)) && f->def->fusion != TH_FUSE_FACTORY &&
           f->def->fusion != TH_FUSE_OPAQUE;
}

/* A plan runs under the caller's default dtype, so a program must not switch it. */
static int check_default_dtype(thx_recorder *r) {
    PyObject *dtype = PyObject_CallNoArgs(r->x->default_dtype);
    Py_XDECREF(dtype); /* a singleton of torch */
    if (!dtype || dtype == r->x->dtype_objects[r->default_dtype]) return dtype ? 0 : -1;
    return thx_capture_error(r, "torch.set_default_dtype", "the default dtype changed while the function ran",
                             "set it outside the compiled function, or pass dtype= to each operation");
}

/* Operations that torch makes of others look at requires_grad to choose among kernels, and fakes require none: passing
 * autograd over, they reach layer 2 whole, and what they are made of is found out with gradients on. */
static PyObject *call_below_autograd(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
    thx *x = r->x;
    if (!x->below_autograd) return thx_grad_needed(r, "autocast with gradients is not compiled with this torch");
    PyObject *guard = thx_enter(x, x->below_autograd);
    PyObject *result = guard ? PyObject_Call(func, args, kwargs) : NULL;
    if (guard) thx_leave(x, guard);
    return result;
}

static PyObject *refuse_call(thx_recorder *r, const thx_func *f) {
    char text[240];
    snprintf(text, 160, "%s", f->callee ? th_str_get(r->x->ctx, f->callee) : "this call");
    if (f->kind == THX_FUNC_ASK) {
        strcat(text, " tells of a tensor's past, which a trace does not hold");
        return thx_doubt(r, text), NULL;
    }
    thx_capture_error(r, text, "it acts on memory, storage or hooks, which a trace does not hold",
                      "call it outside the compiled function");
    return NULL;
}

/* x[1:3] = y: not all of x is written, as it is by x[[0, 2]] = y as far as torch's checks go. */
static bool is_basic_setitem(const call *c) {
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : "";
    if (strcmp(name, "torch.Tensor.__setitem__") != 0 || PyTuple_GET_SIZE(c->args) < 2) return false;
    PyObject *index = PyTuple_GET_ITEM(c->args, 1);
    bool basic = !PyList_Check(index) && !thx_is_tensor(c->r->x, index);
    for (Py_ssize_t i = 0; PyTuple_Check(index) && i < PyTuple_GET_SIZE(index); i++)
        basic &= !PyList_Check(PyTuple_GET_ITEM(index, i)) && !thx_is_tensor(c->r->x, PyTuple_GET_ITEM(index, i));
    return basic;
}

/* What torch's fake kernels let pass: mask.mul_(3), whose result is of another kind than what is written. */
static int check_result_fits(const call *c) {
    thx *x = c->r->x;
    bool written = c->def->effects & TH_OPDEF_INPLACE && c->def->fusion == TH_FUSE_POINTWISE;
    if (!written || PyTuple_GET_SIZE(c->args) < 2) return 0;
    PyObject *self = PyTuple_GET_ITEM(c->args, 0), *other = PyTuple_GET_ITEM(c->args, 1);
    PyObject *type = PyObject_CallMethod(x->torch, "result_type", "OO", self, other);
    PyObject *to = type ? PyObject_GetAttrString(self, "dtype") : NULL;
    PyObject *fits = to ? PyObject_CallMethod(x->torch, "can_cast", "OO", type, to) : NULL;
    PyErr_Clear();
    Py_XDECREF(fits); /* a singleton */
    Py_XDECREF(to);
    Py_XDECREF(type);
    if (fits != Py_False) return 0;
    return thx_doubt(c->r, "the result cannot be cast to the dtype of the tensor that is written to");
}

static PyObject *record(thx_recorder *r, const thx_func *f, PyObject *func, PyObject *args, PyObject *kwargs) {
    thx *x = r->x;
    call c = {r, f, func, args, kwargs, f->callee, f->def, 0, 0, f->random, {false, 0}};
    if (!indifferent_to_functorch(f) &&
        thx_under_functorch(x)) /* what vmap or grad makes of the call reaches layer 2 */
        return PyObject_Call(func, args, kwargs);
    if (check_default_dtype(r) < 0) return NULL;
    r->ninputs = 0;
    r->real_inputs = r->wrapped_input = false;
    c.anode = thx_to_node(x, r->t, args, thx_recorder_value, r);
    c.knode = c.anode && kwargs ? thx_to_node(x, r->t, kwargs, thx_recorder_value, r) : 0;
    if (!c.anode || (kwargs && !c.knode)) {
        if (!r->wrapped_input) return NULL;
        PyErr_Clear(); /* under vmap or grad: what functorch makes of the call reaches layer 2 */
        return PyObject_Call(func, args, kwargs);
    }
    if (f->kind == THX_FUNC_DATA) {
        PyObject *result = evaluate(&c);
        const char *name = f->callee ? th_str_get(x->ctx, f->callee) : "";
        r->forgivable = strstr(name, ".__repr__") || strstr(name, ".__str__") || strstr(name, ".__format__");
        if (!result && !PyErr_Occurred()) data_error(&c);
        r->forgivable = false;
        return result;
    }
    if (f->kind == THX_FUNC_CHECK) return record_check(&c);
    if (f->kind == THX_FUNC_REFUSE || f->kind == THX_FUNC_ASK)
        return thx_asks_of_intermediate(r, f, args) ? PyObject_Call(func, args, kwargs) : refuse_call(r, f);
    if (thx_note_grad(r, c.callee, c.def, &c.note) < 0) return NULL;
    r->writes_part = is_basic_setitem(&c);
    if (c.note.grad && kwargs && PyDict_GetItemString(kwargs, "out"))
        return thx_doubt(r, "out= does not support automatic differentiation"), NULL;
    if (r->ninputs && autocast_on(x)) { /* layer 2 sees the casts */
        PyObject *fa = fakeify(r, args), *fk = fa && kwargs ? fakeify(r, kwargs) : NULL;
        PyObject *result = !fa || (kwargs && !fk) ? NULL
                           : c.note.grad          ? call_below_autograd(r, func, fa, fk)
                                                  : PyObject_Call(func, fa, fk);
        Py_XDECREF(fa);
        Py_XDECREF(fk);
        return result;
    }
    if (c.def && c.def->meta) {
        PyObject *result = fast(&c);
        if (result || PyErr_Occurred()) {
            r->nfast++;
            return result;
        }
        if (check_result_fits(&c) < 0) return NULL;
    }
    return slow(&c);
}

PyObject *thx_record_call(thx_recorder *r, PyObject *callee, PyObject *args, PyObject *kwargs) {
    const thx_func f = {.key = callee, .kind = THX_FUNC_RECORD};
    return record(r, &f, callee, args, kwargs);
}

static PyObject *observe(PyObject *self, PyObject *const *a, Py_ssize_t n) {
    thx_recorder *r = (thx_recorder *)self;
    if (n < 3 || n > 4) return PyErr_Format(PyExc_TypeError, "__torch_function__ takes func, types, args and kwargs");
    PyObject *func = a[0], *args = a[2], *kwargs = n > 3 && a[3] != Py_None && PyDict_GET_SIZE(a[3]) ? a[3] : NULL;
    const thx_func *found = thx_func_find(r->x, func);
    if (!found) return NULL;
    thx_func f = *found; /* the table may grow below */
    if (f.kind == THX_FUNC_QUERY || f.kind == THX_FUNC_SKIP) {
        r->nqueries++;
        return PyObject_Call(func, args, kwargs);
    }
    PyObject *tuple = PyTuple_Check(args) ? Py_NewRef(args) : PySequence_Tuple(args), *result = NULL;
    if (tuple && f.kind == THX_FUNC_GRAD && !thx_under_functorch(r->x))
        result = thx_ask_autograd(r, &f, func, tuple, kwargs);
    else if (tuple)
        result = record(r, &f, func, tuple, kwargs);
    Py_XDECREF(tuple);
    return result;
}

/* Nothing that happens in here is the user's code: Python's profiler (purity.c) need not hear of it. */
PyObject *thx_torch_function(PyObject *self, PyObject *const *a, Py_ssize_t n) {
    PyThreadState *state = PyThreadState_Get();
    PyThreadState_EnterTracing(state);
    PyObject *result = observe(self, a, n);
    PyThreadState_LeaveTracing(state);
    return result;
}

/* ---- layer 2 ---- */

/* In inference mode tensors have no version counters, so that a write to a view shows in its base here alone. */
static bool is_versionless_alias(thx *x, PyObject *input, PyObject *written) {
    if (!thx_is_tensor(x, written) || version_of(x, input) >= 0) return false;
    PyObject *pair[] = {NULL, written, input};
    PyObject *yes = PyObject_Vectorcall(x->is_alias_of, pair + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    PyErr_Clear();
    Py_XDECREF(yes);
    return yes == Py_True;
}

/* Which tensors does an overload write, by its schema? Version counters do not tell for every custom kernel. */
static int note_writes(thx_recorder *r, PyObject *overload, PyObject *args, PyObject *kwargs) {
    PyObject *schema = PyObject_GetAttrString(overload, "_schema");
    PyObject *mutable = schema ? PyObject_GetAttrString(schema, "is_mutable") : NULL;
    PyObject *list = mutable == Py_True ? PyObject_GetAttrString(schema, "arguments") : NULL;
    for (Py_ssize_t i = 0; list && i < PyList_GET_SIZE(list); i++) {
        PyObject *argument = PyList_GET_ITEM(list, i), *alias = PyObject_GetAttrString(argument, "alias_info");
        PyObject *write = alias && alias != Py_None ? PyObject_GetAttrString(alias, "is_write") : NULL;
        PyObject *name = write == Py_True ? PyObject_GetAttrString(argument, "name") : NULL;
        PyObject *tensor = !name                        ? NULL
                           : i < PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, i)
                           : kwargs                     ? PyDict_GetItemWithError(kwargs, name)
                                                        : NULL;
        for (uint32_t j = 0; tensor && j < r->ninputs && j < 64; j++)
            if (r->inputs[j] == tensor || is_versionless_alias(r->x, r->inputs[j], tensor))
                r->schema_writes |= UINT64_C(1) << j;
        Py_XDECREF(name);
        Py_XDECREF(write);
        Py_XDECREF(alias);
    }
    PyErr_Clear();
    Py_XDECREF(list);
    Py_XDECREF(mutable);
    Py_XDECREF(schema);
    return 0;
}

static bool has_tag(thx *x, PyObject *overload, PyObject *tag) {
    PyObject *tags = PyObject_GetAttr(overload, x->n.tags);
    int found = tags ? PySequence_Contains(tags, tag) : 0;
    PyErr_Clear();
    Py_XDECREF(tags);
    return found == 1;
}

/* Attention kernels draw for their dropout alone: without it they are as pure as a product. */
static bool drops_nothing(PyObject *func, PyObject *args, PyObject *kwargs) {
    PyObject *schema = PyObject_GetAttrString(func, "_schema"), *value = NULL;
    PyObject *list = schema ? PyObject_GetAttrString(schema, "arguments") : NULL;
    for (Py_ssize_t i = 0; list && !value && i < PyList_GET_SIZE(list); i++) {
        PyObject *argument = PyList_GET_ITEM(list, i), *name = PyObject_GetAttrString(argument, "name");
        if (name && PyUnicode_CompareWithASCIIString(name, "dropout_p") == 0) {
            value = i < PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, i)
                    : kwargs                   ? PyDict_GetItemWithError(kwargs, name)
                                               : NULL;
            value = value ? Py_NewRef(value) : PyObject_GetAttrString(argument, "default_value");
        }
        Py_XDECREF(name);
    }
    bool zero = value && PyFloat_Check(value) && PyFloat_AS_DOUBLE(value) == 0;
    Py_XDECREF(value);
    Py_XDECREF(list);
    Py_XDECREF(schema);
    PyErr_Clear();
    return zero;
}

static PyObject *record_overload(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs);

PyObject *thx_watch_dispatch(PyObject *self, PyObject *const *a, Py_ssize_t n) {
    thx_recorder *r = (thx_recorder *)self;
    if (n < 3) return PyErr_Format(PyExc_TypeError, "__torch_dispatch__ takes func, types, args and kwargs");
    PyObject *kwargs = n > 3 && a[3] != Py_None ? a[3] : NULL;
    if (!r->saw_random && has_tag(r->x, a[0], r->x->random_tag)) r->saw_random = !drops_nothing(a[0], a[2], kwargs);
    if (r->deriving && !r->depth) /* tensors that autograd makes out of nothing come by here only */
        return record_overload(r, a[0], a[2], kwargs && PyDict_GET_SIZE(kwargs) ? kwargs : NULL);
    note_writes(r, a[0], a[2], kwargs);
    return PyObject_Call(a[0], a[2], kwargs);
}

static PyObject *record_overload(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
    thx *x = r->x;
    call c = {.r = r, .func = func, .args = args, .kwargs = kwargs};
    const thx_func *f = thx_func_find(x, func);
    if (!f) return NULL;
    if (f->kind == THX_FUNC_REFUSE) return refuse_call(r, f);
    c.callee = f->callee;
    r->ninputs = 0;
    r->real_inputs = r->wrapped_input = false;
    c.anode = thx_to_node(x, r->t, args, thx_recorder_value, r);
    c.knode = c.anode && kwargs ? thx_to_node(x, r->t, kwargs, thx_recorder_value, r) : 0;
    if (!c.anode || (kwargs && !c.knode)) {
        if (r->wrapped_input)
            thx_capture_error(r, "a functorch transform", "its tensors reach the operation without being unwrapped",
                              "call this transform outside the compiled function");
        return NULL;
    }
    return thx_note_grad(r, c.callee, NULL, &c.note) < 0 ? NULL : slow(&c);
}

PyObject *thx_torch_dispatch(PyObject *module, PyObject *const *a, Py_ssize_t n) {
    thx *x = PyModule_GetState(module);
    thx_recorder *r = (thx_recorder *)x->active;
    if (n < 3) return PyErr_Format(PyExc_TypeError, "__torch_dispatch__ takes func, types, args and kwargs");
    PyObject *func = a[0], *args = a[2], *kwargs = n > 3 && a[3] != Py_None && PyDict_GET_SIZE(a[3]) ? a[3] : NULL;
    if (!r) {
        PyErr_SetString(x->CaptureError,
                        "a tensor that was made while thunder.jit captured a function is used after the "
                        "capture: it holds no data. Do not keep intermediate tensors in globals or closures");
        return NULL;
    }
    if (r->depth) { /* inside a recorded operation: torch's fake kernels answer */
        return PyObject_Vectorcall(x->fake_dispatch, a, (size_t)n, NULL);
    }
    PyObject *quiet = thx_enter(x, x->modes_off); /* layer 1 is on the stack still */
    if (!quiet) return NULL;
    PyObject *result = record_overload(r, func, args, kwargs);
    thx_leave(x, quiet);
    return result;
}
