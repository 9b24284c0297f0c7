/* The derived rule: torch's autograd, watched.
 *
 *     torch.nn.functional.softplus(x)             torch.ops.aten.softplus.default(x, 1, 20)
 *                                        ->       torch.ops.aten.softplus_backward.default(g, x, 1, 20)
 *
 * The operation is called with fakes that require grad. Below autograd every ATen operation reaches the fakes' dispatch
 * handler, which records it: first those of the forward, then, while autograd runs backwards from fake gradients, those
 * of the backward. So every operation that torch can differentiate has a rule, and it saves what torch saves.
 */
#include "derive.h"

#include "capture.h"
#include "guards.h"

#include "passes/pass.h"

#include <string.h>

typedef struct thx_rule {
    uint64_t hash;
    th_trace *key; /* the operation alone, with its types */
    th_rule rule;
} thx_rule;

/* ---- the key ---- */

static th_val import_value(th_trace *t, const th_trace *from, th_val v, bool grad) {
    th_typeref type = th_type_set_grad(t->ctx, from->values[v].type, grad);
    return th_trace_input(t, 0, type);
}

static th_status build_key(const th_rule_request *q, th_trace **out) {
    th_ctx *ctx = q->t->ctx;
    th_trace *t = *out = th_trace_new(ctx, "rule");
    th_val *map = th_ctx_alloc(ctx, NULL, q->t->nvalues * sizeof *map);
    th_node *kids = th_ctx_alloc(ctx, NULL, (q->nouts + 1) * sizeof *kids);
    if (t && map && kids) {
        th_trace_set_opaque_vtable(t, thx_opaque_vtable);
        memset(map, 0, q->t->nvalues * sizeof *map);
        for (uint32_t i = 0; i < q->nuses; i++) map[q->uses[i]] = import_value(t, q->t, q->uses[i], q->needs[i]);
        for (uint32_t i = 0; i < q->nouts; i++) map[q->outs[i]] = th_trace_value(t, 0, q->t->values[q->outs[i]].type);
        th_op_args op = {.kind = TH_OP_CALL,
                         .callee = q->op->callee,
                         .args = th_node_import(t, q->t, q->op->args, map),
                         .kwargs = th_node_import(t, q->t, q->op->kwargs, map),
                         .outs = th_node_import(t, q->t, q->op->outs, map),
                         .outs_list = q->op->outs_list,
                         .effects = q->op->effects};
        if (q->op->callee_opaque)
            op.callee_opaque = th_trace_opaque(t, th_str_get(ctx, q->t->opaques[q->op->callee_opaque].name),
                                               q->t->opaques[q->op->callee_opaque].object);
        th_trace_op(t, &op);
        for (uint32_t i = 0; i < q->nouts; i++)
            kids[i] = q->tangents[i] ? th_node_value(t, th_trace_input(t, 0, q->tangents[i])) : th_node_none(t);
        t->result = th_node_seq(t, TH_N_TUPLE, q->nouts, kids);
    }
    th_ctx_alloc(ctx, map, 0);
    th_ctx_alloc(ctx, kids, 0);
    return t && map && kids ? th_trace_status(t) : th_fail(ctx, TH_ENOMEM, "out of memory");
}

/* ---- deriving ---- */

typedef struct derivation {
    thx *x;
    const th_rule_request *q;
    thx_recorder *r;
    PyObject **fakes;           /* by use (owned by the recorder's table) */
    PyObject *outs;             /* list: the results that are tensors, in order */
    PyObject *inputs;           /* list: fakes that require grad */
    PyObject *roots, *tangents; /* lists: results that a gradient is given for, and those gradients */
    PyObject *grads;            /* what autograd answered, by input */
} derivation;

static PyObject *fake_value(void *user, th_val v) {
    derivation *d = user;
    for (uint32_t i = 0; i < d->q->nuses; i++)
        if (d->q->uses[i] == v) return Py_NewRef(d->fakes[i]);
    PyErr_SetString(PyExc_SystemError, "a value that the operation does not use");
    return NULL;
}

static PyObject *new_fake(derivation *d, th_typeref type, bool grad) { /* borrowed */
    thx *x = d->x;
    type = th_type_set_grad(x->ctx, type, false);
    th_val value = th_trace_input(d->r->t, 0, type);
    d->r->depth++; /* making it is nothing that autograd does */
    PyObject *fake = thx_fake(x, type);
    d->r->depth--;
    if (!fake) return NULL;
    int rc = grad ? PyObject_SetAttr(fake, x->n.requires_grad, Py_True) : 0;
    if (rc == 0) rc = thx_recorder_define(d->r, fake, value);
    Py_DECREF(fake); /* the table owns it */
    return rc < 0 ? NULL : fake;
}

static int make_inputs(derivation *d) {
    const th_rule_request *q = d->q;
    d->fakes = PyMem_Calloc(q->nuses + 1, sizeof *d->fakes);
    d->inputs = PyList_New(0);
    if (!d->fakes || !d->inputs) return PyErr_Occurred() ? -1 : (PyErr_NoMemory(), -1);
    for (uint32_t i = 0; i < q->nuses; i++) {
        d->fakes[i] = new_fake(d, q->t->values[q->uses[i]].type, q->needs[i]);
        if (!d->fakes[i] || (q->needs[i] && PyList_Append(d->inputs, d->fakes[i]) < 0)) return -1;
    }
    return 0;
}

/* Walk the recorded results and the ones that came now together. */
static int collect_outs(derivation *d, th_node outs, PyObject *result) {
    const th_trace *t = d->q->t;
    const th_node_data *n = &t->nodes[outs];
    if (n->kind == TH_N_VALUE) {
        if (thx_is_tensor(d->x, result)) return PyList_Append(d->outs, result);
        PyErr_SetString(PyExc_RuntimeError, "it gave something that is no tensor");
        return -1;
    }
    if (n->kind != TH_N_TUPLE) return 0;
    if ((!PyTuple_Check(result) && !PyList_Check(result)) || (uint32_t)PySequence_Fast_GET_SIZE(result) != n->count) {
        PyErr_SetString(PyExc_RuntimeError, "it gave another number of results");
        return -1;
    }
    for (uint32_t i = 0; i < n->count; i++)
        if (collect_outs(d, t->kids[t->nodes[outs].u.kids + i], PySequence_Fast_ITEMS(result)[i]) < 0) return -1;
    return 0;
}

typedef enum counting { FROM_ITSELF, FROM_ZERO, FROM_ELSEWHERE } counting;

/* as_strided counts from the start of a storage, and where an input of the call starts in its own is another matter at
 * each call. FROM_ZERO: the rule holds as long as inputs start where they do now. */
static counting counts_from(const th_rule_request *q) {
    const char *name = q->op->callee_opaque ? "" : th_str_get(q->t->ctx, q->op->callee);
    counting found = FROM_ITSELF;
    if (!strstr(name, "as_strided")) return FROM_ITSELF;
    for (uint32_t i = 0; i < q->nuses; i++) {
        const th_value *v = &q->t->values[q->uses[i]];
        bool whole = th_type_get(q->t->ctx, v->type)->contiguous; /* all of its storage, as far as can be told */
        if (v->offset || !whole) return FROM_ELSEWHERE;
        if (!v->def) found = FROM_ZERO;
        for (uint32_t k = 0; v->alias && k < q->t->ninputs; k++)
            if (q->t->values[q->t->inputs[k]].alias == v->alias) found = FROM_ZERO;
    }
    return found;
}

/* Kernels that torch chose because its fakes required no grad: they leave out what a backward needs. */
static bool chosen_without_grad(const th_rule_request *q) {
    static const char *const kernels[] = {"_scaled_dot_product_flash_attention.",
                                          "_scaled_dot_product_efficient_attention.",
                                          "_scaled_dot_product_cudnn_attention.", "_embedding_bag_forward_only.", NULL};
    const char *name = q->op->callee_opaque ? "" : th_str_get(q->t->ctx, q->op->callee);
    bool found = false;
    for (int i = 0; kernels[i] && !found; i++) found = strstr(name, kernels[i]) != NULL;
    return found;
}

static int run_forward(derivation *d) {
    const th_rule_request *q = d->q;
    if (chosen_without_grad(q)) {
        PyErr_SetString(PyExc_RuntimeError, "torch chose it for a run without gradients");
        return -1;
    }
    PyObject *callee = thx_callable(d->x, q->t, q->op), *result = NULL;
    PyObject *args = callee ? thx_from_node(d->x, q->t, q->op->args, fake_value, d) : NULL;
    PyObject *kwargs = args && q->op->kwargs ? thx_from_node(d->x, q->t, q->op->kwargs, fake_value, d) : NULL;
    if (args && (kwargs || !q->op->kwargs)) result = PyObject_Call(callee, args, kwargs);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    d->outs = PyList_New(0);
    int rc = result && d->outs ? collect_outs(d, q->op->outs, result) : -1;
    Py_XDECREF(result);
    return rc;
}

/* A gradient that shows other values than its memory holds is one that the next rule, derived for plain ones, does not
 * expect: make it plain here. */
static int make_plain(derivation *d) {
    static const char *const methods[] = {"resolve_conj", "resolve_neg"};
    Py_ssize_t n = PyTuple_GET_SIZE(d->grads);
    PyObject *plain = PyTuple_New(n);
    for (Py_ssize_t i = 0; plain && i < n; i++) {
        PyObject *grad = Py_NewRef(PyTuple_GET_ITEM(d->grads, i));
        for (int k = 0; k < 2 && grad && grad != Py_None && thx_is_lazy(&d->x->abi, grad); k++)
            Py_SETREF(grad, PyObject_CallMethod(grad, methods[k], NULL));
        if (!grad)
            Py_CLEAR(plain);
        else
            PyTuple_SET_ITEM(plain, i, grad);
    }
    Py_SETREF(d->grads, plain);
    return plain ? 0 : -1;
}

static int run_backward(derivation *d, uint64_t *out_grad) {
    const th_rule_request *q = d->q;
    d->roots = PyList_New(0);
    d->tangents = PyList_New(0);
    if (!d->roots || !d->tangents) return -1;
    for (uint32_t i = 0; i < q->nouts; i++) {
        PyObject *out = PyList_GET_ITEM(d->outs, i), *tangent;
        if (thx_needs_grad(d->x, out) != 1) continue;
        *out_grad |= UINT64_C(1) << i;
        if (!q->tangents[i]) continue;
        if (!(tangent = new_fake(d, q->tangents[i], false)) || PyList_Append(d->roots, out) < 0 ||
            PyList_Append(d->tangents, tangent) < 0)
            return -1;
    }
    if (!PyList_GET_SIZE(d->roots)) return 0;
    PyObject *args = PyTuple_Pack(3, d->roots, d->inputs, d->tangents);
    PyObject *kwargs = Py_BuildValue("{s:O}", "allow_unused", Py_True);
    if (args && kwargs) d->grads = PyObject_Call(d->x->autograd_grad, args, kwargs);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    return !d->grads ? -1 : PyTuple_Check(d->grads) ? make_plain(d) : 0;
}

static th_node value_node(derivation *d, PyObject *tensor) {
    thx_cell *cell = thx_is_tensor(d->x, tensor) ? thx_recorder_cell(d->r, tensor) : NULL;
    return cell ? th_node_value(d->r->t, cell->value) : 0;
}

/* Did the author of an autograd.Function say that its backward cannot be differentiated? The decorator leaves a
 * wrapper. */
static bool is_once_differentiable(const derivation *d) {
    const th_rule_request *q = d->q;
    PyObject *method = q->op->callee_opaque ? q->t->opaques[q->op->callee_opaque].object : NULL;
    if (!method || !PyMethod_Check(method) || !PyType_Check(PyMethod_GET_SELF(method))) return false;
    PyObject *backward = PyObject_GetAttrString(PyMethod_GET_SELF(method), "backward");
    PyObject *module = PyImport_ImportModule("torch.autograd.function");
    PyObject *decorator = module ? PyObject_GetAttrString(module, "once_differentiable") : NULL;
    bool found = false;
    if (backward && decorator && PyFunction_Check(backward) && PyFunction_Check(decorator)) {
        PyCodeObject *code = (PyCodeObject *)PyFunction_GET_CODE(backward);
        PyObject *consts = ((PyCodeObject *)PyFunction_GET_CODE(decorator))->co_consts;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(consts); i++)
            found |= PyTuple_GET_ITEM(consts, i) == (PyObject *)code;
    }
    PyErr_Clear();
    Py_XDECREF(backward);
    Py_XDECREF(decorator);
    Py_XDECREF(module);
    return found;
}

static th_node mark_once(th_trace *t, uint32_t nuses, th_node gradient) {
    th_val v = th__node_as_value(t, gradient), out = v ? th_trace_value(t, 0, t->values[v].type) : 0;
    uint32_t n = t->ninputs - nuses;
    th_node incoming[64];
    if (!v || n > 64) return gradient;
    for (uint32_t i = 0; i < n; i++) incoming[i] = th_node_value(t, t->inputs[nuses + i]);
    th_node args[] = {gradient, th_node_seq(t, TH_N_TUPLE, n, incoming)};
    if (!t->values[v].alias) t->values[v].alias = th_trace_alias(t);
    t->values[out].alias = t->values[v].alias;
    t->values[out].offset = t->values[v].offset;
    th_trace_op(t, &(th_op_args){.kind = TH_OP_CALL,
                                 .callee = th_intern_z(t->ctx, "thunder._kernels.once_differentiable"),
                                 .args = th_node_seq(t, TH_N_TUPLE, 2, args),
                                 .outs = th_node_value(t, out)});
    return th_node_value(t, out);
}

static int set_result(derivation *d) {
    const th_rule_request *q = d->q;
    th_trace *t = d->r->t;
    th_node *kids = PyMem_Calloc(q->nouts + q->nuses + 1, sizeof *kids);
    Py_ssize_t at = 0;
    bool once = is_once_differentiable(d);
    if (!kids) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < q->nouts; i++) kids[i] = value_node(d, PyList_GET_ITEM(d->outs, i));
    for (uint32_t i = 0; i < q->nuses; i++) {
        PyObject *grad = q->needs[i] && d->grads ? PyTuple_GET_ITEM(d->grads, at++) : Py_None;
        kids[q->nouts + i] = grad == Py_None ? th_node_none(t) : value_node(d, grad);
        if (once && kids[q->nouts + i]) kids[q->nouts + i] = mark_once(t, q->nuses, kids[q->nouts + i]);
    }
    if (!PyErr_Occurred()) t->result = th_node_seq(t, TH_N_TUPLE, q->nouts + q->nuses, kids);
    PyMem_Free(kids);
    if (PyErr_Occurred()) return -1;
    return thx_check(d->x, th_trace_status(t));
}

/* Tensors that the operation made out of plain arguments (x[[0, 2]]) are constants of the rule. */
static int embed_constants(derivation *d) {
    thx_recorder *r = d->r;
    th_trace *t = r->t;
    uint32_t ninputs = 0;
    th__rewrite w;
    if (!r->nroots) return 0;
    for (uint32_t i = 0; i < r->nroots; i++) {
        if (!r->roots[i].requires_grad) continue;
        PyErr_SetString(PyExc_RuntimeError,
                        "it differentiates with respect to a tensor that is not among its arguments");
        return -1;
    }
    if (thx_check(d->x, th__rewrite_begin(&w, t)) < 0) return -1;
    for (uint32_t i = 0; i < r->nroots; i++)
        w.node[r->roots[i].value] = th_node_opaque(t, "constant", r->roots[i].real);
    for (th_opref o = 1; o < w.nops; o++) th__rewrite_copy(&w, &w.ops[o]);
    for (uint32_t i = 0; i < t->ninputs; i++)
        if (!w.node[t->inputs[i]]) t->inputs[ninputs++] = t->inputs[i];
    t->ninputs = ninputs;
    return thx_check(d->x, th__rewrite_end(&w, th_trace_status(t)));
}

/* ---- names ---- */

typedef struct sharing {
    const th_trace *t;
    uint32_t alias;
    bool found;
} sharing;

static void find_sharing(void *user, th_val *v) {
    sharing *s = user;
    s->found |= s->t->values[*v].alias == s->alias;
}

static bool shares_with_argument(th_trace *t, const th_op *op, uint32_t alias) {
    sharing s = {t, alias, false};
    th_node_each_value(t, op->args, find_sharing, &s);
    th_node_each_value(t, op->kwargs, find_sharing, &s);
    return s.found;
}

static bool same_results(th_trace *t, const th_op *op, const th_call *call) {
    const th_node_data *outs = &t->nodes[op->outs];
    uint32_t n = outs->kind == TH_N_TUPLE ? outs->count : 1;
    if (n != call->nouts || (outs->kind == TH_N_TUPLE) != call->outs_list) return false;
    for (uint32_t i = 0; i < n; i++) {
        const th_node_data *out = outs->kind == TH_N_TUPLE ? &t->nodes[t->kids[outs->u.kids + i]] : outs;
        if (out->kind != TH_N_VALUE || call->outs[i].same) return false;
        const th_value *v = &t->values[out->u.ref];
        bool view = call->outs[i].alias_of != 0;
        if (v->type != th_type_set_grad(t->ctx, call->outs[i].type, false) || (view && !v->alias)) return false;
        if (!view && v->alias && shares_with_argument(t, op, v->alias)) return false;
        if (view && (t->values[call->outs[i].alias_of].alias != v->alias || call->outs[i].offset != v->offset))
            return false;
    }
    return true;
}

/* torch.ops.aten.mul.Tensor is torch.mul when the catalogue's rule for that name, given the same arguments, says the
 * same of the result: then everything that knows torch.mul serves it too. */
static void use_public_name(thx *x, th_trace *t, th_op *op) {
    static const char *const places[] = {"torch.%.*s", "torch.Tensor.%.*s", "torch.nn.functional.%.*s"};
    const char *name = th_str_get(x->ctx, op->callee);
    if (op->kind != TH_OP_CALL || op->callee_opaque || op->effects || strncmp(name, "torch.ops.aten.", 15) != 0) return;
    if (strcmp(name + 15, "detach.default") == 0) return; /* told apart from the user's own when rules are spliced */
    name += 15;
    int length = (int)strcspn(name, ".");
    for (int i = 0; i < 3; i++) {
        char text[128];
        snprintf(text, sizeof text, places[i], length, name);
        th_str callee = th_intern_z(x->ctx, text);
        const th_opdef *def = callee ? th_catalog_find(x->catalog, callee) : NULL;
        if (!def || !def->meta || (def->effects & (TH_OPDEF_INPLACE | TH_FX_RANDOM | TH_FX_STATE))) continue;
        if (i == 2 && def->fusion != TH_FUSE_POINTWISE) continue; /* their arguments may stand in another order */
        th_call call = {.default_dtype = TH_F32, .default_device = th_device(x->ctx, "cpu", -1), .facts = x->facts};
        if (th_call_bind(&call, def, t, op->args, op->kwargs) != TH_OK) continue;
        call.facts = x->facts;
        if (def->meta(&call) != TH_OK || !same_results(t, op, &call)) continue;
        op->callee = callee;
        return;
    }
}

/* In training the backward of batch norm does not look at the running statistics, which its forward has changed. */
static void forget_statistics(th_trace *t, th_op *op) {
    static const struct {
        const char *callee;
        uint32_t training; /* 0: always in training */
    } backwards[] = {{"torch.ops.aten.native_batch_norm_backward.default", 7},
                     {"torch.ops.aten.cudnn_batch_norm_backward.default", 0}};
    const char *name = op->kind != TH_OP_CALL || op->callee_opaque ? "" : th_str_get(t->ctx, op->callee);
    for (int i = 0; i < 2; i++) {
        const th_node_data *args = &t->nodes[op->args];
        if (strcmp(name, backwards[i].callee) != 0 || args->count > 16 || args->count < 8) continue;
        th_node kids[16];
        memcpy(kids, t->kids + args->u.kids, args->count * sizeof *kids);
        const th_node_data *training = &t->nodes[kids[backwards[i].training]];
        if (backwards[i].training && !(training->kind == TH_N_BOOL && training->u.i)) continue;
        kids[3] = kids[4] = th_node_none(t);
        op->args = th_node_seq(t, TH_N_TUPLE, t->nodes[op->args].count, kids);
    }
}

/* ---- surroundings ---- */

typedef struct around {
    PyObject *active, *threads, *script;
    int grad;
    bool pushed, hooked;
} around;

static PyObject *identity(PyObject *module, PyObject *o) {
    (void)module;
    return Py_NewRef(o);
}
static PyMethodDef identity_method = {"identity", identity, METH_O, NULL};

/* Saved tensor hooks around the call are for what the call saves, not for what a rule does: the last ones pushed count.
 * 1 pushed, 0 there are none, -1 error. */
static int hide_saved_tensor_hooks(thx *x) {
    PyObject *hooks = x->top_hooks ? PyObject_CallOneArg(x->top_hooks, Py_False) : Py_NewRef(Py_None);
    Py_XDECREF(hooks);
    if (!hooks || hooks == Py_None) return hooks ? 0 : -1;
    PyObject *autograd = PyObject_GetAttrString(x->torch_c, "_autograd"),
             *same = PyCFunction_New(&identity_method, NULL);
    PyObject *done =
        autograd && same ? PyObject_CallMethod(autograd, "_push_saved_tensors_default_hooks", "OO", same, same) : NULL;
    Py_XDECREF(autograd);
    Py_XDECREF(same);
    Py_XDECREF(done);
    return done ? 1 : -1;
}

static void show_saved_tensor_hooks(thx *x) {
    PyObject *autograd = PyObject_GetAttrString(x->torch_c, "_autograd");
    PyObject *done = autograd ? PyObject_CallMethod(autograd, "_pop_saved_tensors_default_hooks", NULL) : NULL;
    Py_XDECREF(autograd);
    Py_XDECREF(done);
}

static PyObject *call_flag(PyObject *function, bool on) {
    return PyObject_CallOneArg(function, on ? Py_True : Py_False);
}

static int enter(thx *x, derivation *d, around *a) {
    a->active = x->active;
    a->grad = thx_grad_mode(x);
    a->threads = PyObject_CallNoArgs(x->is_multithreading);
    a->script = PyObject_CallNoArgs(x->get_script_optimize);
    PyObject *done = a->grad >= 0 && a->threads && a->script ? call_flag(x->set_grad, true) : NULL;
    Py_XDECREF(done);
    if (done) done = call_flag(x->set_multithreading, false); /* backward runs here, where we watch */
    Py_XDECREF(done);
    if (done) done = PyObject_CallOneArg(x->set_script_optimize, Py_False);
    Py_XDECREF(done);
    if (done) done = PyObject_CallOneArg(x->push_dispatch, (PyObject *)d->r);
    Py_XDECREF(done);
    a->pushed = done != NULL;
    int hooked = done ? hide_saved_tensor_hooks(x) : -1;
    a->hooked = hooked == 1;
    x->active = (PyObject *)d->r;
    x->active_thread = PyThread_get_thread_ident();
    return hooked < 0 ? -1 : 0;
}

static void leave(thx *x, around *a) { /* keeps a pending exception */
    PyObject *type, *value, *trace, *done;
    PyErr_Fetch(&type, &value, &trace);
    if (a->hooked) show_saved_tensor_hooks(x);
    x->active = a->active;
    if (a->pushed) {
        done = PyObject_CallOneArg(x->pop_dispatch, Py_None);
        Py_XDECREF(done);
    }
    if (a->grad >= 0) {
        done = call_flag(x->set_grad, a->grad);
        Py_XDECREF(done);
    }
    if (a->threads) {
        done = PyObject_CallOneArg(x->set_multithreading, a->threads);
        Py_XDECREF(done);
    }
    if (a->script) {
        done = PyObject_CallOneArg(x->set_script_optimize, a->script);
        Py_XDECREF(done);
    }
    Py_XDECREF(a->threads);
    Py_XDECREF(a->script);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

/* ---- all of it ---- */

static bool writes_outside(const thx_recorder *r) { /* to a tensor that is neither an argument nor its own */
    bool found = false;
    for (uint32_t i = 0; i < r->nroots && !found; i++) found = th__is_written(r->t, r->roots[i].value, r->t->nops);
    return found;
}

/* The backward of the user's autograd.Function runs here once for all calls: like a captured function it may not print
 * and the like, and may not change what is there already. */
static int run_users_backward(derivation *d, thx_guards *state, uint64_t *out_grad) {
    thx_purity purity;
    if (!state) return run_backward(d, out_grad);
    if (thx_guards_restore(d->x, state, NULL, NULL) < 0) return -1; /* the forward is done again at each call */
    thx_purity_begin(d->r, &purity);
    int rc = run_backward(d, out_grad);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    thx_purity_end(d->r, &purity);
    int unchanged = thx_custom_check(d->x, state);
    if (rc == 0 && unchanged == 0 && writes_outside(d->r)) {
        PyErr_SetString(PyExc_RuntimeError, "its backward writes to a tensor that was there before");
        unchanged = -1;
    }
    if (rc == 0 && unchanged == 0 && d->r->error) PyErr_SetObject(d->x->CaptureError, d->r->error);
    if (rc < 0) PyErr_Restore(type, value, trace);
    return rc < 0 || unchanged < 0 || d->r->error ? -1 : 0;
}

static thx_guards *users_state(thx *x, const th_rule_request *q, int *rc) {
    PyObject *callee = q->op->callee_opaque ? thx_callable(x, q->t, q->op) : NULL;
    PyObject *cls = callee ? thx_custom_class(x, callee) : NULL;
    thx_guards *state = cls ? thx_custom_state(x, cls) : NULL;
    *rc = cls && !state ? -1 : 0;
    return state;
}

static int derive(thx *x, const th_rule_request *q, thx_rule *out) {
    derivation d = {.x = x, .q = q, .r = thx_recorder_new(x, NULL)};
    around a = {0};
    if (!d.r) return -1;
    d.r->deriving = true;
    int rc = 0;
    thx_guards *state = users_state(x, q, &rc);
    if (rc == 0) rc = make_inputs(&d);
    if (rc == 0) {
        rc = enter(x, &d, &a);
        PyObject *listener = thx_listen(d.r); /* what forward says it has said */
        if (rc == 0) rc = run_forward(&d);
        thx_stop_listening(d.r, listener);
        d.r->late = true;
        if (rc == 0) rc = run_users_backward(&d, state, &out->rule.out_grad);
        leave(x, &a);
    }
    if (rc == 0) rc = set_result(&d);
    if (rc == 0) rc = embed_constants(&d);
    if (rc == 0) {
        th_trace *t = d.r->t;
        rc = thx_check(x, th_pipeline_run(t, "functionalize", NULL, x->verify, NULL, NULL));
        for (th_opref o = 1; rc == 0 && o < t->nops; o++) forget_statistics(t, &t->ops[o]);
        for (th_opref o = 1; rc == 0 && o < t->nops; o++) use_public_name(x, t, &t->ops[o]);
        if (rc == 0) rc = thx_check(x, th_pipeline_run(t, "noop,cse,dce", NULL, x->verify, NULL, NULL));
    }
    if (rc == 0) {
        out->rule.trace = d.r->t;
        out->rule.nuses = q->nuses;
        out->rule.nouts = q->nouts;
        d.r->t = NULL;
    }
    if (state) thx_guards_free(x, state);
    Py_XDECREF(d.outs);
    Py_XDECREF(d.inputs);
    Py_XDECREF(d.roots);
    Py_XDECREF(d.tangents);
    Py_XDECREF(d.grads);
    PyMem_Free(d.fakes);
    Py_DECREF((PyObject *)d.r);
    return rc;
}

/* The pending exception becomes the reason of a decline. */
static th_status decline(thx *x, const th_rule_request *q) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *text = value ? PyObject_Str(value) : NULL;
    const char *why = text ? PyUnicode_AsUTF8(text) : NULL, *name = th_str_get(x->ctx, q->op->callee);
    const char *file = q->op->file ? th_str_get(x->ctx, q->op->file) : "?";
    PyErr_Clear();
    th_fail(x->ctx, TH_DECLINED, "%s, line %u: the derivative of %s cannot be recorded: %.300s", file,
            (unsigned)q->op->line, name ? name : "an operation", why ? why : "unknown error");
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return TH_DECLINED;
}

static void free_rule(thx_rule *rule) {
    th_trace_free(rule->key);
    th_trace_free(rule->rule.trace);
    PyMem_Free(rule);
}

static thx_rule *push_rule(thx *x) {
    if (x->nrules == x->cap_rules) {
        uint32_t cap = x->cap_rules ? 2 * x->cap_rules : 64;
        thx_rule **rules = PyMem_Realloc(x->rules, sizeof *rules * cap);
        if (!rules) return NULL;
        x->rules = rules;
        x->cap_rules = cap;
    }
    return x->rules[x->nrules] = PyMem_Calloc(1, sizeof(thx_rule));
}

th_status thx_derive(void *user, const th_rule_request *q, const th_rule **rule) {
    thx *x = user;
    th_trace *key = NULL;
    counting from = counts_from(q);
    if (from == FROM_ELSEWHERE) { /* rules that are known are for inputs that start at zero */
        PyErr_SetString(PyExc_RuntimeError, "it counts from the start of a storage in which its input starts later");
        return decline(x, q);
    }
    x->counts_offsets |= from == FROM_ZERO;
    th_status status = build_key(q, &key);
    uint64_t hash = status == TH_OK ? th_trace_hash(key) : 0;
    for (uint32_t i = 0; status == TH_OK && i < x->nrules; i++) {
        if (x->rules[i]->hash != hash || !th_trace_equal(x->rules[i]->key, key)) continue;
        th_trace_free(key);
        *rule = &x->rules[i]->rule;
        return TH_OK;
    }
    thx_rule *made = status == TH_OK ? push_rule(x) : NULL;
    if (!made) {
        th_trace_free(key);
        return status != TH_OK ? status : th_fail(x->ctx, TH_ENOMEM, "out of memory");
    }
    if (derive(x, q, made) < 0) {
        th_trace_free(key);
        PyMem_Free(made);
        return decline(x, q);
    }
    made->hash = hash;
    made->key = key;
    x->nrules++;
    *rule = &made->rule;
    return TH_OK;
}

void thx_rules_forget(thx *x) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < x->nrules; i++) {
        if (x->rules[i]->key->nopaques <= 1 && x->rules[i]->rule.trace->nopaques <= 1)
            x->rules[n++] = x->rules[i];
        else
            free_rule(x->rules[i]);
    }
    x->nrules = n;
}

void thx_rules_free(thx *x) {
    for (uint32_t i = 0; i < x->nrules; i++) free_rule(x->rules[i]);
    PyMem_Free(x->rules);
    x->rules = NULL;
    x->nrules = x->cap_rules = 0;
}
