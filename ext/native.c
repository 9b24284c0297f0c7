/* Executors that are shared objects: loading them, their view of a call, and running what they claimed. */
#include "native.h"

#include "lower.h"
#include "trace_object.h"

#include "base/dylib.h"

#include <string.h>

enum { MAX_RESULTS = 16, MAX_TENSORS = 64 };

/* ---- a call, as the executor sees it ---- */

struct th_x_call {
    thx *x;
    th_trace *t;
    const th_op *op;
    th_call bound; /* def NULL: by position */
    char reason[240];
    th_typeref given[MAX_RESULTS]; /* by meta */
    uint32_t ngiven;
    bool in_meta, failed;
};

static th_node argument(const th_x_call *c, uint32_t i) {
    if (c->bound.def) return i < c->bound.nparams ? c->bound.arg[i] : 0;
    const th_node_data *args = &c->t->nodes[c->op->args];
    return i < args->count ? c->t->kids[args->u.kids + i] : 0;
}

static bool all_ints(const th_trace *t, const th_node_data *d) {
    for (uint32_t i = 0; i < d->count; i++)
        if (t->nodes[t->kids[d->u.kids + i]].kind != TH_N_INT) return false;
    return true;
}

static th_x_kind host_kind(const th_x_call *c, uint32_t i) {
    const th_node_data *d = &c->t->nodes[argument(c, i)];
    switch (d->kind) {
    case TH_N_ABSENT: return TH_X_ABSENT;
    case TH_N_NONE: return TH_X_NONE;
    case TH_N_BOOL: return TH_X_BOOL;
    case TH_N_INT: return TH_X_INT;
    case TH_N_FLOAT: return TH_X_FLOAT;
    case TH_N_STR: return TH_X_STR;
    case TH_N_VALUE: return TH_X_TENSOR;
    case TH_N_TUPLE:
    case TH_N_LIST: return all_ints(c->t, d) ? TH_X_INTS : TH_X_OTHER;
    default: return TH_X_OTHER;
    }
}

static bool describe(const th_x_call *c, th_typeref ref, th_x_type *out) {
    th_ctx *ctx = c->t->ctx;
    const th_type *t = th_type_get(ctx, ref);
    if (t->kind != TH_TYPE_TENSOR) return false;
    *out = (th_x_type){.dtype = th_dtype_get((th_dtype)t->dtype)->text,
                       .device = th_device_type(ctx, t->device),
                       .device_index = th_device_index(ctx, t->device),
                       .ndim = t->ndim,
                       .shape = t->shape,
                       .stride = t->stride,
                       .requires_grad = t->flags & TH_TYPE_REQUIRES_GRAD};
    return true;
}

static bool host_tensor(const th_x_call *c, uint32_t i, th_x_type *type) {
    const th_node_data *d = &c->t->nodes[argument(c, i)];
    return d->kind == TH_N_VALUE && describe(c, c->t->values[d->u.ref].type, type);
}

static bool host_integer(const th_x_call *c, uint32_t i, int64_t *value) {
    const th_node_data *d = &c->t->nodes[argument(c, i)];
    if (d->kind != TH_N_INT && d->kind != TH_N_BOOL) return false;
    *value = d->u.i;
    return true;
}

static bool host_real(const th_x_call *c, uint32_t i, double *value) {
    const th_node_data *d = &c->t->nodes[argument(c, i)];
    if (d->kind != TH_N_FLOAT && d->kind != TH_N_INT && d->kind != TH_N_BOOL) return false;
    *value = d->kind == TH_N_FLOAT ? d->u.f : (double)d->u.i;
    return true;
}

static const char *host_text(const th_x_call *c, uint32_t i) {
    const th_node_data *d = &c->t->nodes[argument(c, i)];
    return d->kind == TH_N_STR ? th_str_get(c->t->ctx, d->u.ref) : NULL;
}

static int64_t host_integers(const th_x_call *c, uint32_t i, int64_t *values, uint32_t capacity) {
    if (host_kind(c, i) != TH_X_INTS) return -1;
    const th_node_data *d = &c->t->nodes[argument(c, i)];
    for (uint32_t k = 0; k < d->count && k < capacity; k++) values[k] = c->t->nodes[c->t->kids[d->u.kids + k]].u.i;
    return d->count;
}

typedef struct nth { /* the n-th value that an operation defines */
    uint32_t left;
    th_val found;
    uint32_t count;
} nth;

static void visit_out(void *user, th_val *v) {
    nth *n = user;
    if (n->count++ == n->left) n->found = *v;
}

static nth out_of(const th_x_call *c, uint32_t i) {
    nth n = {i, 0, 0};
    if (!c->in_meta) th_node_each_value(c->t, c->op->outs, visit_out, &n);
    return n;
}

static uint32_t host_nresults(const th_x_call *c) { return out_of(c, 0).count; }

static bool host_result(const th_x_call *c, uint32_t i, th_x_type *type) {
    th_val v = out_of(c, i).found;
    return v && describe(c, c->t->values[v].type, type);
}

static int host_decline(th_x_call *c, const char *reason) {
    snprintf(c->reason, sizeof c->reason, "%s", reason);
    return 0;
}

static void host_give(th_x_call *c, const char *dtype, const char *device, int32_t index, uint32_t ndim,
                      const int64_t *shape, const int64_t *stride) {
    th_ctx *ctx = c->t->ctx;
    th_dtype d = th_dtype_from_text(dtype, strlen(dtype));
    th_dev where = th_device(ctx, device, index);
    th_typeref type = d && where && ndim <= THX_MAX_RANK ? th_type_tensor(ctx, d, where, ndim, shape, stride, 0) : 0;
    if (!type || !c->in_meta || c->ngiven == MAX_RESULTS)
        c->failed = true;
    else
        c->given[c->ngiven++] = type;
}

static const th_x_host host = {TH_EXECUTOR_ABI, sizeof host,   host_kind,     host_tensor, host_integer, host_real,
                               host_text,       host_integers, host_nresults, host_result, host_decline, host_give};

static void call_init(th_x_call *c, thx *x, th_trace *t, const th_op *op) {
    *c = (th_x_call){.x = x, .t = t, .op = op};
    const th_opdef *def = th_catalog_find(x->catalog, op->callee);
    c->bound = (th_call){.default_dtype = TH_F32, .default_device = th_device(t->ctx, "cpu", -1)};
    if (def && th_call_bind(&c->bound, def, t, op->args, op->kwargs) != TH_OK) c->bound.def = NULL;
}

int thx_native_claim(thx_native_operator *o, th_trace *t, th_opref op, void **data, char *reason, size_t size) {
    th_x_call c;
    const th_op copy = t->ops[op]; /* binding may append nodes */
    call_init(&c, o->x, t, &copy);
    *data = NULL;
    int rc = o->op->claim ? o->op->claim(&host, &c, data) : 1;
    if (rc < 0) {
        PyErr_Format(PyExc_RuntimeError, "%s: its claim failed: %s", o->op->name, c.reason[0] ? c.reason : "no reason");
        return -1;
    }
    snprintf(reason, size, "%s", c.reason[0] ? c.reason : "it does not take this call");
    return rc > 0;
}

void thx_native_release(const thx_native_operator *o, void *data) {
    if (data && o->op->release) o->op->release(data);
}

/* ---- running ---- */

static int view_of(thx *x, th_slot *slot, th_x_tensor *out) {
    int64_t ndim = 0, *shape = NULL, *stride = NULL;
    th_h h = thx_slot_handle(x, slot);
    if (!h || x->abi.aoti_torch_get_dim(h, &ndim) || x->abi.aoti_torch_get_sizes(h, &shape) ||
        x->abi.aoti_torch_get_strides(h, &stride) || x->abi.aoti_torch_get_data_ptr(h, &out->data)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "a tensor without memory");
        return -1;
    }
    out->ndim = (uint32_t)ndim;
    out->shape = shape;
    out->stride = stride;
    return 0;
}

static int allocate(thx *x, th_typeref ref, th_slot *out) {
    const th_type *t = th_type_get(x->ctx, ref);
    PyObject *device = thx_device_object(x, t->device);
    PyObject *o = device ? thx_empty_strided(x, t, device) : NULL;
    Py_XDECREF(device);
    if (!o) return -1;
    *out = (th_slot){.object = o, .owns_object = true};
    return 0;
}

int thx_native_run(thx *x, const thx_native_kernel *k, th_slot *const *ins, uint32_t nins, th_slot *const *outs) {
    th_x_tensor inputs[MAX_TENSORS], results[MAX_RESULTS];
    char error[400] = "";
    int rc = nins <= MAX_TENSORS ? 0 : -1;
    if (rc) PyErr_Format(PyExc_RuntimeError, "more than %d tensor arguments", MAX_TENSORS);
    for (uint32_t i = 0; i < nins && rc == 0; i++) rc = view_of(x, ins[i], &inputs[i]);
    for (uint32_t i = 0; i < k->nresults && rc == 0; i++) {
        rc = allocate(x, k->results[i], outs[i]);
        if (rc == 0) rc = view_of(x, outs[i], &results[i]);
    }
    if (rc == 0 && k->op->op->execute(k->data, inputs, nins, results, k->nresults, error, sizeof error)) {
        PyErr_Format(PyExc_RuntimeError, "%s: %s", k->op->op->name, error[0] ? error : "it failed and gave no reason");
        rc = -1;
    }
    return rc; /* the caller drops what was allocated */
}

/* ---- kernels ---- */

static void kernel_dealloc(thx_native_kernel *k) {
    PyTypeObject *type = Py_TYPE(k);
    if (k->op) thx_native_release(k->op, k->data);
    PyMem_Free(k->results);
    Py_XDECREF((PyObject *)k->op);
    type->tp_free((PyObject *)k);
    Py_DECREF(type);
}

/* Called with the arguments of the operation: its tensors are the inputs, each distinct one once. */
static PyObject *kernel_call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    thx_native_kernel *k = (thx_native_kernel *)self;
    thx *x = k->op->x;
    Py_ssize_t n = PyVectorcall_NARGS(nargsf) + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0);
    th_slot in[MAX_TENSORS] = {{0}}, out[MAX_RESULTS] = {{0}}, *ins[MAX_TENSORS], *outs[MAX_RESULTS];
    uint32_t nins = 0;
    for (Py_ssize_t i = 0; i < n && nins < MAX_TENSORS; i++) {
        bool known = !thx_is_tensor(x, args[i]);
        for (uint32_t j = 0; j < nins && !known; j++) known = in[j].object == args[i];
        if (known) continue;
        in[nins].object = args[i];
        ins[nins] = &in[nins];
        nins++;
    }
    for (uint32_t i = 0; i < k->nresults; i++) outs[i] = &out[i];
    PyObject *result = NULL;
    if (thx_native_run(x, k, ins, nins, outs) == 0)
        result = k->nresults == 1 ? Py_NewRef((PyObject *)out[0].object) : PyTuple_New(k->nresults);
    for (uint32_t i = 0; i < k->nresults; i++) {
        if (result && k->nresults > 1) PyTuple_SET_ITEM(result, i, Py_NewRef((PyObject *)out[i].object));
        Py_XDECREF((PyObject *)out[i].object);
    }
    return result;
}

static PyMemberDef kernel_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(thx_native_kernel, vectorcall), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot kernel_slots[] = {{Py_tp_dealloc, kernel_dealloc},
                                     {Py_tp_call, PyVectorcall_Call},
                                     {Py_tp_members, kernel_members},
                                     {Py_tp_doc, "One claimed call of an operator of a C executor."},
                                     {0, NULL}};
static PyType_Spec kernel_spec = {"thunder._C.NativeKernel", sizeof(thx_native_kernel), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, kernel_slots};

typedef struct typing {
    const th_trace *t;
    thx_native_kernel *k;
} typing;

static void note_type(void *user, th_val *v) {
    typing *n = user;
    n->k->results[n->k->nresults++] = n->t->values[*v].type;
}

/* ---- operators ---- */

/* bind(trace) -> kernel of the trace's only operation, or the reason (str) why it is declined. */
static PyObject *operator_bind(thx_native_operator *o, PyObject *trace) {
    thx_py_trace *given = thx_as_trace(o->x, trace);
    if (!given) return NULL;
    if (given->t->nops != 2) return PyErr_Format(PyExc_ValueError, "a trace of one operation is needed");
    char reason[240];
    void *data = NULL;
    int rc = thx_native_claim(o, given->t, 1, &data, reason, sizeof reason);
    if (rc <= 0) return rc < 0 ? NULL : PyUnicode_FromString(reason);
    thx_native_kernel *k = (thx_native_kernel *)o->x->NativeKernel->tp_alloc(o->x->NativeKernel, 0);
    if (!k) return thx_native_release(o, data), NULL;
    k->vectorcall = kernel_call;
    k->op = (thx_native_operator *)Py_NewRef((PyObject *)o);
    k->data = data;
    nth n = {0, 0, 0};
    th_node_each_value(given->t, given->t->ops[1].outs, visit_out, &n);
    k->results = PyMem_Calloc(n.count + 1, sizeof *k->results);
    if (!k->results || n.count > MAX_RESULTS) {
        Py_DECREF((PyObject *)k);
        return k->results ? PyErr_Format(PyExc_ValueError, "more than %d results", MAX_RESULTS) : PyErr_NoMemory();
    }
    th_node_each_value(given->t, given->t->ops[1].outs, note_type, &(typing){given->t, k});
    return (PyObject *)k;
}

typedef struct build { /* a trace of one call, from Python arguments */
    thx *x;
    th_trace *t;
} build;

static th_val tensor_input(void *user, PyObject *tensor) {
    build *b = user;
    thx_meta meta;
    if (thx_read_meta(b->x, tensor, thx_is_fake(b->x, tensor), &meta) < 0) return 0;
    return th_trace_input(b->t, 0, thx_meta_type(b->x, &meta));
}

/* meta(args) -> list of fresh tensors, by the operator's own rule: on the device that it says. */
static PyObject *operator_meta(thx_native_operator *o, PyObject *args) {
    if (!PyTuple_Check(args)) return PyErr_Format(PyExc_TypeError, "a tuple of arguments is needed");
    if (!o->op->meta) return PyErr_Format(PyExc_RuntimeError, "%s has no shape rule", o->op->name);
    build b = {o->x, th_trace_new(o->x->ctx, "call")};
    if (!b.t) return PyErr_NoMemory();
    th_trace_set_opaque_vtable(b.t, thx_opaque_vtable);
    th_op op = {.kind = TH_OP_CALL, .callee = th_intern_z(o->x->ctx, o->op->name)};
    op.args = thx_to_node(o->x, b.t, args, tensor_input, &b);
    PyObject *list = op.args ? PyList_New(0) : NULL;
    th_x_call c = {.x = o->x, .t = b.t, .op = &op, .in_meta = true};
    if (list && (o->op->meta(&host, &c) < 0 || c.failed)) {
        PyErr_Format(PyExc_RuntimeError, "%s: its shape rule failed%s%s", o->op->name, c.reason[0] ? ": " : "",
                     c.reason);
        Py_CLEAR(list);
    }
    for (uint32_t i = 0; list && i < c.ngiven; i++) {
        th_slot slot = {0};
        if (allocate(o->x, c.given[i], &slot) < 0 || PyList_Append(list, slot.object) < 0) Py_CLEAR(list);
        Py_XDECREF((PyObject *)slot.object);
    }
    th_trace_free(b.t);
    return list;
}

static void operator_dealloc(thx_native_operator *o) {
    PyTypeObject *type = Py_TYPE(o);
    Py_XDECREF(o->library);
    type->tp_free((PyObject *)o);
    Py_DECREF(type);
}

static PyObject *operator_name(thx_native_operator *o, void *which) {
    const char *texts[] = {o->op->name, o->op->schema, o->op->derivative}, *text = texts[(intptr_t)which];
    return text ? PyUnicode_FromString(text) : Py_NewRef(Py_None);
}

static PyMethodDef operator_methods[] = {
    {"bind", (PyCFunction)operator_bind, METH_O, "bind(trace) -> NativeKernel, or the reason why it is declined."},
    {"meta", (PyCFunction)operator_meta, METH_O, "meta(args) -> list of tensors of the shapes that its rule gives."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef operator_getset[] = {
    {"name", (getter)operator_name, NULL, "As the shared object lists it.", (void *)0},
    {"schema", (getter)operator_name, NULL, "Of a new operator; None: torch has it.", (void *)1},
    {"derivative", (getter)operator_name, NULL, "The operator that computes its derivative, or None.", (void *)2},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot operator_slots[] = {{Py_tp_dealloc, operator_dealloc},
                                       {Py_tp_methods, operator_methods},
                                       {Py_tp_getset, operator_getset},
                                       {Py_tp_doc, "An operator that a C executor runs."},
                                       {0, NULL}};
static PyType_Spec operator_spec = {"thunder._C.NativeOperator", sizeof(thx_native_operator), 0, Py_TPFLAGS_DEFAULT,
                                    operator_slots};

/* ---- loading ---- */

static void close_library(PyObject *capsule) { th_dylib_close(PyCapsule_GetPointer(capsule, "thunder.library")); }

static PyObject *refuse(const char *path, const char *why) {
    return PyErr_Format(PyExc_ImportError, "%s is no executor for this thunder: %s", path, why);
}

/* (name, version, list of operators) of a library whose struct is in order. */
static PyObject *describe_library(thx *x, const char *path, PyObject *library, const th_executor *e) {
    char why[200];
    if (!e) return refuse(path, "its function returned NULL");
    if (e->abi != TH_EXECUTOR_ABI) {
        snprintf(why, sizeof why,
                 "it was built for version %u of the executor ABI, this is version %u; build it anew with this "
                 "thunder's include/thunder/executor.h",
                 e->abi, TH_EXECUTOR_ABI);
        return refuse(path, why);
    }
    if (e->size < sizeof *e || e->operator_size < sizeof(th_x_operator)) {
        snprintf(why, sizeof why, "its structs have %zu and %zu bytes where %zu and %zu are needed", e->size,
                 e->operator_size, sizeof *e, sizeof(th_x_operator));
        return refuse(path, why);
    }
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list && i < e->noperators; i++) {
        const th_x_operator *op = (const th_x_operator *)((const char *)e->operators + i * e->operator_size);
        if (!op->name || !op->execute) {
            Py_DECREF(list);
            return refuse(path, "an operator has no name or no execute function");
        }
        thx_native_operator *o = (thx_native_operator *)x->NativeOperator->tp_alloc(x->NativeOperator, 0);
        if (o) {
            o->x = x;
            o->op = op;
            o->library = Py_NewRef(library);
        }
        if (!o || PyList_Append(list, (PyObject *)o) < 0) Py_CLEAR(list);
        Py_XDECREF((PyObject *)o);
    }
    return list ? Py_BuildValue("ssN", e->name ? e->name : "", e->version ? e->version : "", list) : NULL;
}

PyObject *thx_native_load(PyObject *module, PyObject *path) {
    thx *x = PyModule_GetState(module);
    const char *text = PyUnicode_AsUTF8(path);
    th_dylib *lib = NULL;
    if (!text) return NULL;
    if (th_dylib_open(x->ctx, text, false, &lib) != TH_OK)
        return PyErr_Format(PyExc_ImportError, "%s", th_ctx_error(x->ctx)->text);
    PyObject *capsule = PyCapsule_New(lib, "thunder.library", close_library);
    if (!capsule) return th_dylib_close(lib), NULL;
    void *symbol = th_dylib_symbol(lib, TH_EXECUTOR_SYMBOL);
    PyObject *result = NULL;
    if (!symbol) {
        PyErr_Format(PyExc_ImportError, "%s is no executor: it exports no function " TH_EXECUTOR_SYMBOL, text);
    } else {
        const th_executor *(*get)(void);
        memcpy(&get, &symbol, sizeof get); /* ISO C has no other way from an object pointer to a function */
        result = describe_library(x, text, capsule, get());
    }
    Py_DECREF(capsule);
    return result;
}

int thx_native_init(thx *x, PyObject *module) {
    x->NativeOperator = (PyTypeObject *)PyType_FromModuleAndSpec(module, &operator_spec, NULL);
    x->NativeKernel = (PyTypeObject *)PyType_FromModuleAndSpec(module, &kernel_spec, NULL);
    return x->NativeOperator && x->NativeKernel &&
                   PyModule_AddObjectRef(module, "NativeOperator", (PyObject *)x->NativeOperator) == 0 &&
                   PyModule_AddObjectRef(module, "NativeKernel", (PyObject *)x->NativeKernel) == 0
               ? 0
               : -1;
}
