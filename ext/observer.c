/* The two observers of a capture.
 *
 * Layer 1 sits on torch's function-mode stack and sees each API-level call (torch.relu, F.linear, Tensor.view,
 * operators, properties) whole. Its results come from our own meta rule, or from torch's fake kernels when there is
 * none. Layer 2 is the fakes' __torch_dispatch__: it sees ATen operations that layer 1 was not asked about: TorchScript
 * code, legacy constructors, code under functorch, and what autocast casts inside of (autocast.c).
 */
#include "ambient.h"
#include "autocast.h"
#include "sizes.h"

#include <string.h>

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

/* ---- arguments with others in the place of their tensors and extents ---- */

static PyObject *map_sequence(thx *x, PyObject *o, thx_map_fn leaf, void *user) {
    Py_ssize_t n = PySequence_Fast_GET_SIZE(o);
    PyObject **items = PySequence_Fast_ITEMS(o);
    PyObject *result = PyTuple_Check(o) ? PyTuple_New(n) : PyList_New(n);
    for (Py_ssize_t i = 0; result && i < n; i++) {
        PyObject *item = thx_map_arguments(x, items[i], leaf, user);
        if (!item)
            Py_CLEAR(result);
        else if (PyTuple_Check(o))
            PyTuple_SET_ITEM(result, i, item);
        else
            PyList_SET_ITEM(result, i, item);
    }
    return result;
}

static PyObject *map_dict(thx *x, PyObject *o, thx_map_fn leaf, void *user) {
    PyObject *result = PyDict_New(), *key, *value;
    Py_ssize_t at = 0;
    while (result && PyDict_Next(o, &at, &key, &value)) {
        PyObject *item = thx_map_arguments(x, value, leaf, user);
        if (!item || PyDict_SetItem(result, key, item) < 0) Py_CLEAR(result);
        Py_XDECREF(item);
    }
    return result;
}

PyObject *thx_map_arguments(thx *x, PyObject *o, thx_map_fn leaf, void *user) {
    if (Py_TYPE(o) == x->extent_type || thx_is_tensor(x, o)) return leaf(user, o);
    if (PyTuple_CheckExact(o) || PyList_CheckExact(o) || Py_TYPE(o) == x->Size) return map_sequence(x, o, leaf, user);
    if (PyDict_CheckExact(o)) return map_dict(x, o, leaf, user);
    if (PySlice_Check(o)) {
        PySliceObject *s = (PySliceObject *)o;
        PyObject *a = thx_map_arguments(x, s->start, leaf, user),
                 *b = a ? thx_map_arguments(x, s->stop, leaf, user) : NULL,
                 *c = b ? thx_map_arguments(x, s->step, leaf, user) : NULL;
        PyObject *slice = c ? PySlice_New(a, b, c) : NULL;
        Py_XDECREF(a);
        Py_XDECREF(b);
        Py_XDECREF(c);
        return slice;
    }
    return Py_NewRef(o);
}

static PyObject *fake_of(void *recorder, PyObject *o) {
    thx_recorder *r = recorder;
    return Py_TYPE(o) == r->x->extent_type ? thx_extent_plain(o) : Py_XNewRef(thx_recorder_fake(r, o));
}

PyObject *thx_fakeify(thx_recorder *r, PyObject *o) { return thx_map_arguments(r->x, o, fake_of, r); }

/* ---- results become values ---- */

uint32_t thx_alias_group(th_trace *t, th_val v) {
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
        r->t->values[value].alias = thx_alias_group(r->t, cell->value);
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
    PyObject *negated = PyObject_CallOneArg(x->is_neg, out); /* a singleton */
    Py_XDECREF(negated);
    if (negated != Py_False) {
        if (negated) thx_refuse_lazy(r);
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
        r->t->values[value].alias = thx_alias_group(r->t, cell->value);
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

int thx_call_emit(thx_recording *c, th_node outs, bool outs_list, uint8_t effects, const th_val *writes,
                  uint32_t nwrites) {
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
    return thx_random_before(r) < 0 || thx_emit(r, &op) < 0 || thx_random_check(r) < 0 || thx_random_after(r) < 0 ? -1
                                                                                                                  : 0;
}

/* ---- our own meta rules ---- */

static PyObject *fast_out(thx_recording *c, const th_out *out, th_node *node) {
    thx_recorder *r = c->r;
    th_val value = th_trace_value(r->t, 0, thx_flag_type(r, th_type_set_grad(r->x->ctx, out->type, false), &c->note));
    PyObject *fake = thx_pool_fake(r, out->type);
    if (!fake) return NULL;
    if (out->alias_of) {
        r->t->values[value].alias = thx_alias_group(r->t, out->alias_of);
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
static PyObject *fast_inplace(thx_recording *c, const th_call *rule) {
    thx_recorder *r = c->r;
    PyObject *self = r->inputs[0];
    thx_cell *cell = thx_recorder_cell(r, self);
    if (!cell || rule->outs[0].type != r->t->values[cell->value].type) return NULL;
    th_val before = cell->value, value = th_trace_value(r->t, 0, rule->outs[0].type);
    if (thx_check_write(r, before, &c->note) < 0) return NULL;
    cell->ours = false;
    r->t->values[value].alias = thx_alias_group(r->t, before);
    r->t->values[value].offset = r->t->values[before].offset;
    uint8_t effects = TH_FX_WRITES | (c->random ? TH_FX_RANDOM : 0);
    thx_note_write(r, before, &c->note);
    r->t->values[value].type = r->t->values[before].type;
    if (thx_recorder_define(r, self, value) < 0 ||
        thx_call_emit(c, th_node_value(r->t, value), false, effects, &before, 1) < 0)
        return NULL;
    return Py_NewRef(self);
}

/* NULL without an exception: the rule declined. */
static PyObject *fast(thx_recording *c) {
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
        if (fake && thx_call_emit(c, node, false, effects, NULL, 0) < 0) Py_CLEAR(fake);
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
    if (tuple && thx_call_emit(c, th_node_seq(r->t, TH_N_TUPLE, rule.nouts, nodes), true, effects, NULL, 0) < 0)
        Py_CLEAR(tuple);
    return tuple;
}

/* ---- torch's fake kernels ---- */

PyObject *thx_call_under_fake_mode(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
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

/* A check of data: kept, in its place. */
static PyObject *record_check(thx_recording *c) {
    if (thx_call_emit(c, 0, false, TH_FX_STATE, NULL, 0) < 0) return NULL;
    Py_RETURN_NONE;
}

/* torch._assert_async and its kind, and operators from outside torch: they give nothing, and are there for what they
 * do. */
static bool acts(const thx_recording *c) {
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : "";
    bool foreign = strncmp(name, "torch.ops.", 10) == 0 && strncmp(name, "torch.ops.aten.", 15) != 0 &&
                   strncmp(name, "torch.ops.prim", 14) != 0;
    return foreign || strstr(name, "assert") != NULL;
}

static PyObject *argument(const thx_recording *c, int position, const char *name) { /* borrowed; NULL: not given */
    if (position < PyTuple_GET_SIZE(c->args)) return PyTuple_GET_ITEM(c->args, position);
    return c->kwargs ? PyDict_GetItemString(c->kwargs, name) : NULL;
}

/* Batch norm in training updates its running statistics, of which neither its schema nor a version counter tells. */
static void note_statistics(thx_recording *c) {
    static const struct {
        const char *callee;
        int mean, training; /* the variance follows the mean; -1: always */
    } norms[] = {{"torch.nn.functional.batch_norm", 1, 5},
                 {"torch.batch_norm", 3, 5},
                 {"torch.native_batch_norm", 3, 5},
                 {"torch.cudnn_batch_norm", 3, 5},
                 {"torch.miopen_batch_norm", 3, 5},
                 {"torch.batch_norm_update_stats", 1, -1},
                 {"torch.ops.aten.batch_norm.default", 3, 5},
                 {"torch.ops.aten._batch_norm_impl_index.default", 3, 5},
                 {"torch.ops.aten.native_batch_norm.default", 3, 5},
                 {"torch.ops.aten.cudnn_batch_norm.default", 3, 5},
                 {"torch.ops.aten.miopen_batch_norm.default", 3, 5},
                 {"torch.ops.aten.batch_norm_update_stats.default", 1, -1}};
    thx_recorder *r = c->r;
    const char *callee = c->callee ? th_str_get(r->x->ctx, c->callee) : "";
    for (size_t i = 0; strstr(callee, "batch_norm") && i < sizeof norms / sizeof *norms; i++) {
        if (strcmp(callee, norms[i].callee) != 0) continue;
        PyObject *training = norms[i].training < 0 ? Py_True : argument(c, norms[i].training, "training");
        for (int k = 0; training == Py_True && k < 2; k++) {
            PyObject *written = argument(c, norms[i].mean + k, k ? "running_var" : "running_mean");
            thx_cell *cell = written && thx_is_tensor(r->x, written) ? thx_recorder_cell(r, written) : NULL;
            for (uint32_t j = 0; cell && j < r->ninputs && j < 64; j++)
                if (thx_recorder_cell(r, r->inputs[j])->value == cell->value) r->schema_writes |= UINT64_C(1) << j;
        }
    }
}

static bool has_out(const thx_recording *c) {
    PyObject *out = c->kwargs ? PyDict_GetItemString(c->kwargs, "out") : NULL;
    return out && out != Py_None;
}

/* By its name, x.add_, x[i] = y, inplace=, out=: others (an embedding that renorms its rows) know what they do. */
static bool says_that_it_writes(const thx_recording *c) {
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : "";
    bool overload = strncmp(name, "torch.ops.", 10) == 0; /* aten.add_.Tensor */
    const char *end = overload ? strrchr(name, '.') : name + strlen(name);
    PyObject *inplace = c->kwargs ? PyDict_GetItemString(c->kwargs, "inplace") : NULL;
    return (end > name && end[-1] == '_') || inplace == Py_True || has_out(c);
}

/* Emit what a slow call did: outputs, writes seen by version counters, randomness seen by the watcher. */
static int emit_slow(thx_recording *c, PyObject **result, const long *versions) {
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
    if (!tensors && !nwrites && !r->saw_random && !acts(c)) {
        if (r->x->saw_extent) thx_sizes_spoil(r, "torch computes with it");
        r->nqueries++;
        return 0;
    }
    if (!tensors) outs = 0;
    uint8_t effects = (nwrites ? TH_FX_WRITES : 0) | (r->saw_random || c->random ? TH_FX_RANDOM : 0);
    if (thx_call_emit(c, outs, !thx_is_tensor(r->x, *result), effects, writes, nwrites) < 0) return -1;
    for (uint32_t i = 0; i < nwrites; i++) {
        thx_alias_group(r->t, writes[i]);
        thx_note_write(r, writes[i], &c->note);
    }
    if (thx_is_tensor(r->x, *result) && !thx_is_fake(r->x, *result)) {
        PyObject *fake = thx_fakeify(r, *result);
        Py_SETREF(*result, fake);
    }
    return *result ? 0 : -1;
}

/* Did an operation draw or write before it raised? Keeps the pending exception. */
static bool has_acted(const thx_recording *c, const long *versions) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    bool acted = c->r->saw_random || c->random;
    for (uint32_t i = 0; i < c->r->ninputs && !acted; i++) acted = version_of(c->r->x, c->r->inputs[i]) != versions[i];
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    return acted;
}

/* An operation raised under torch's fake kernels: is it to be called in another way? The code may catch the error, and
 * what the operation did before shows in eager alone. */
static PyObject *slow_otherwise(thx_recording *c, const long *versions) {
    bool acted = has_acted(c, versions);
    thx_sizes_spoil(c->r, "an operation was recorded in parts");
    PyObject *result = thx_call_otherwise(c), *type, *value, *trace;
    if (result || !acted) return result;
    PyErr_Fetch(&type, &value, &trace);
    thx_doubt(c->r, "an operation raises that has drawn random numbers or written");
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    return NULL;
}

static PyObject *slow(thx_recording *c) {
    thx_recorder *r = c->r;
    bool copies = r->real_inputs || r->x->saw_extent;
    PyObject *args = copies ? thx_fakeify(r, c->args) : Py_NewRef(c->args);
    PyObject *kwargs = args && c->kwargs ? (copies ? thx_fakeify(r, c->kwargs) : Py_NewRef(c->kwargs)) : NULL;
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
    PyObject *result = thx_call_under_fake_mode(r, c->func, args, kwargs);
    r->nslow++;
    if (!result)
        result = slow_otherwise(c, versions);
    else if (note_statistics(c), emit_slow(c, &result, versions) < 0)
        Py_CLEAR(result);
    if (versions != fixed) PyMem_Free(versions);
    Py_DECREF(args);
    Py_XDECREF(kwargs);
    return result;
}

/* ---- layer 1 ---- */

bool thx_under_functorch(thx *x) {
    if (x->abi.state) return thx_functorch_at_work(&x->abi);
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
static bool is_basic_setitem(const thx_recording *c) {
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : "";
    if (strcmp(name, "torch.Tensor.__setitem__") != 0 || PyTuple_GET_SIZE(c->args) < 2) return false;
    PyObject *index = PyTuple_GET_ITEM(c->args, 1);
    bool basic = !PyList_Check(index) && !thx_is_tensor(c->r->x, index);
    for (Py_ssize_t i = 0; PyTuple_Check(index) && i < PyTuple_GET_SIZE(index); i++)
        basic &= !PyList_Check(PyTuple_GET_ITEM(index, i)) && !thx_is_tensor(c->r->x, PyTuple_GET_ITEM(index, i));
    return basic;
}

/* What torch's fake kernels let pass: mask.mul_(3), whose result is of another kind than what is written. */
static int check_result_fits(const thx_recording *c) {
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

/* torch.as_tensor(array): the result is the array's memory, as that of torch.from_numpy is, which nobody observes. */
static bool shares_an_array(const thx_recording *c) {
    const char *name = c->callee && !c->r->ninputs ? th_str_get(c->r->x->ctx, c->callee) : "";
    if (strcmp(name, "torch.as_tensor") != 0 && strcmp(name, "torch.asarray") != 0) return false;
    PyObject *array = PyTuple_GET_SIZE(c->args) ? PyTuple_GET_ITEM(c->args, 0) : NULL;
    const char *type = array ? Py_TYPE(array)->tp_name : "";
    return strncmp(type, "numpy.", 6) == 0 ? strcmp(type, "numpy.ndarray") == 0
                                           : array && PyObject_CheckBuffer(array) && !PyBytes_Check(array);
}

PyObject *thx_record(thx_recorder *r, const thx_func *f, PyObject *func, PyObject *args, PyObject *kwargs) {
    thx *x = r->x;
    thx_recording c = {r, f, func, args, kwargs, f->callee, f->def, 0, 0, f->random, {false, 0}};
    if (!indifferent_to_functorch(f) &&
        thx_under_functorch(x)) { /* what vmap or grad makes of the call reaches layer 2 */
        thx_sizes_spoil(r, "a functorch transform is at work");
        return thx_random_through(r, func, args, kwargs);
    }
    if (check_default_dtype(r) < 0) return NULL;
    r->ninputs = 0;
    r->real_inputs = r->wrapped_input = x->saw_extent = false;
    c.anode = thx_to_node(x, r->t, args, thx_recorder_value, r);
    c.knode = c.anode && kwargs ? thx_to_node(x, r->t, kwargs, thx_recorder_value, r) : 0;
    if (!c.anode || (kwargs && !c.knode)) {
        if (!r->wrapped_input) return NULL;
        PyErr_Clear(); /* under vmap or grad: what functorch makes of the call reaches layer 2 */
        return thx_random_through(r, func, args, kwargs);
    }
    if (shares_an_array(&c)) return PyObject_Call(func, args, kwargs);
    if (f->kind == THX_FUNC_DATA) {
        thx_sizes_spoil(r, "the values of a tensor are asked for");
        return thx_call_for_data(&c);
    }
    if (f->kind == THX_FUNC_CHECK) return record_check(&c);
    if (f->kind == THX_FUNC_REFUSE || f->kind == THX_FUNC_ASK)
        return thx_asks_of_intermediate(r, f, args) ? PyObject_Call(func, args, kwargs) : refuse_call(r, f);
    if (thx_note_grad(r, c.callee, c.def, &c.note) < 0) return NULL;
    r->writes_part = is_basic_setitem(&c);
    if (c.note.grad && has_out(&c)) return thx_doubt(r, "out= does not support automatic differentiation"), NULL;
    if (!thx_autocast_is_on(x))
        thx_autocast_forget(r);
    else if (r->ninputs) {
        thx_autocast_road road;
        PyObject *result = thx_record_under_autocast(&c, &road);
        if (result || road == THX_BY_RULE || PyErr_Occurred()) return result;
        PyObject *fa = thx_fakeify(r, args), *fk = fa && kwargs ? thx_fakeify(r, kwargs) : NULL; /* by layer 2 */
        if (fa && (fk || !kwargs))
            result =
                c.note.grad && road == THX_WHOLE ? call_below_autograd(r, func, fa, fk) : PyObject_Call(func, fa, fk);
        Py_XDECREF(fa);
        Py_XDECREF(fk);
        return result;
    }
    if (f->in_parts && c.note.grad) {
        PyObject *made = thx_call_in_parts(&c);
        if (made || PyErr_Occurred()) return made;
    }
    uint32_t before = r->t->nops;
    PyObject *result = c.def && c.def->meta ? fast(&c) : NULL;
    if (result) r->nfast++;
    if (!result && !PyErr_Occurred() && (!c.def || !c.def->meta || check_result_fits(&c) == 0)) result = slow(&c);
    bool untouched = result && r->sizes && r->like && r->t->nops == before && thx_is_tensor(x, result) && c.callee;
    if (untouched && thx_sizes_untouched(r, th_str_get(x->ctx, c.callee), kwargs, result) < 0) Py_CLEAR(result);
    bool made = result && r->sizes && r->like && !untouched && c.callee && c.def && r->ninputs == 1;
    if (made && thx_sizes_copied(r, th_str_get(x->ctx, c.callee), r->inputs[0]) < 0) Py_CLEAR(result);
    return result;
}

PyObject *thx_record_call(thx_recorder *r, PyObject *callee, PyObject *args, PyObject *kwargs) {
    const thx_func f = {.key = callee, .kind = THX_FUNC_RECORD};
    return thx_record(r, &f, callee, args, kwargs);
}

/* What a tensor of the surroundings is asked for (its shape, whether it requires grad) is guarded, though no operation
 * may use it: it is an input of the program. */
static int note_asked(thx_recorder *r, PyObject *args) {
    PyObject *first = PyTuple_Check(args) && PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : NULL;
    if (!first || !r->reached || r->deriving || !thx_is_tensor(r->x, first) || thx_is_fake(r->x, first)) return 0;
    if (!thx_guards_holds_tensor(r->reached, first) || thx_under_functorch(r->x)) return 0;
    return thx_recorder_cell(r, first) ? 0 : -1;
}

/* A question about a tensor of the surroundings: its fake answers, to which the program may have done something. */
static PyObject *ask(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
    PyObject *first = PyTuple_Check(args) && PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : NULL;
    thx_cell *cell = first && thx_is_tensor(r->x, first) ? thx_recorder_known(r, first) : NULL;
    if (!cell || cell->key == first || !thx_is_fake(r->x, cell->key)) return PyObject_Call(func, args, kwargs);
    PyObject *with = PyTuple_New(PyTuple_GET_SIZE(args)), *answer = NULL;
    for (Py_ssize_t i = 0; with && i < PyTuple_GET_SIZE(args); i++)
        PyTuple_SET_ITEM(with, i, Py_NewRef(i ? PyTuple_GET_ITEM(args, i) : cell->key));
    if (with) answer = PyObject_Call(func, with, kwargs);
    Py_XDECREF(with);
    return answer;
}

/* torch.zeros(3, requires_grad=True): what depends on it requires grad, as if requires_grad_() had made it so. */
static int note_leaf(thx_recorder *r, PyObject *kwargs, PyObject *result) {
    if (!kwargs || PyDict_GetItemString(kwargs, "requires_grad") != Py_True) return 0;
    bool made = thx_is_fake(r->x, result) && !is_input(r, result) && !thx_under_functorch(r->x);
    return made ? thx_make_leaf(r, result) : 0;
}

static PyObject *observe(PyObject *self, PyObject *const *a, Py_ssize_t n) {
    thx_recorder *r = (thx_recorder *)self;
    if (n < 3 || n > 4) return PyErr_Format(PyExc_TypeError, "__torch_function__ takes func, types, args and kwargs");
    PyObject *func = a[0], *args = a[2], *kwargs = n > 3 && a[3] != Py_None && PyDict_GET_SIZE(a[3]) ? a[3] : NULL;
    const thx_func *found = thx_func_find(r->x, func);
    if (!found) return NULL;
    thx_func f = *found; /* the table may grow below */
    if ((f.kind == THX_FUNC_QUERY || f.kind == THX_FUNC_GRAD) && note_asked(r, args) < 0) return NULL;
    if (f.kind == THX_FUNC_QUERY || f.kind == THX_FUNC_SKIP) {
        r->nqueries++;
        PyObject *answer = ask(r, func, args, kwargs);
        return r->sizes && answer ? thx_sizes_answer(r, &f, args, kwargs, answer) : answer;
    }
    PyObject *tuple = PyTuple_Check(args) ? Py_NewRef(args) : PySequence_Tuple(args), *result = NULL;
    if (tuple && f.kind == THX_FUNC_GRAD && !thx_under_functorch(r->x))
        result = thx_ask_autograd(r, &f, func, tuple, kwargs);
    else if (tuple)
        result = thx_record(r, &f, func, tuple, kwargs);
    if (result && note_leaf(r, kwargs, result) < 0) Py_CLEAR(result);
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

static void mark_written(thx_recorder *r, PyObject *written) { /* a tensor, or a list of tensors */
    if (PyList_Check(written) || PyTuple_Check(written)) {
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(written); i++)
            mark_written(r, PySequence_Fast_ITEMS(written)[i]);
        return;
    }
    for (uint32_t j = 0; j < r->ninputs && j < 64; j++)
        if (r->inputs[j] == written || is_versionless_alias(r->x, r->inputs[j], written))
            r->schema_writes |= UINT64_C(1) << j;
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
        if (tensor) mark_written(r, tensor);
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
    PyObject *result = PyObject_Call(a[0], a[2], kwargs);
    if (!r->heard || !result || Py_TYPE(result) == r->x->Device) return result; /* not what asks for a device */
    PyObject *none = Py_None, *kernel = PyTuple_Pack(4, a[0], a[2], kwargs ? kwargs : none, result);
    if (!kernel || PyList_Append(r->heard, kernel) < 0) Py_CLEAR(result);
    Py_XDECREF(kernel);
    return result;
}

static PyObject *record_overload(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
    thx *x = r->x;
    thx_sizes_spoil(r, "an operation was recorded in parts");
    thx_recording c = {.r = r, .func = func, .args = args, .kwargs = kwargs};
    const thx_func *f = thx_func_find(x, func);
    if (!f) return NULL;
    if (f->kind == THX_FUNC_REFUSE) return refuse_call(r, f);
    c.callee = f->callee;
    r->ninputs = 0;
    r->real_inputs = r->wrapped_input = x->saw_extent = false;
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
