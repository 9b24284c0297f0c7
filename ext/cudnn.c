/* CudnnPlan: a plan of cuDNN's as a callable of scratch memory and tensors. See executors/cudnn/cudnn.h.
 *
 *     CudnnPlan(library, kind, device, sizes, value)      plan.scratch bytes are needed
 *     plan(scratch, *tensors)                             enqueue on the device's current stream
 *
 * Making one takes up to a second and holds the interpreter lock: the library's handles are of one thread at a time.
 */
#include "cudnn.h"

#include "cuda.h"

#include "executors/cudnn/cudnn.h"

#include <string.h>

typedef struct thx_cudnn_plan {
    PyObject_HEAD vectorcallfunc vectorcall;
    thx *x;
    int device;
    th_cudnn_plan plan;
} thx_cudnn_plan;

enum { MAX_SIZES = 64 };

static th_cudnn *library(thx *x, const char *path) {
    if (x->cudnn) return x->cudnn;
    th_cudnn *c = PyMem_Malloc(sizeof *c);
    if (!c) return (th_cudnn *)PyErr_NoMemory();
    if (th_cudnn_open(x->ctx, path, c) != TH_OK) {
        PyMem_Free(c);
        return PyErr_Format(PyExc_RuntimeError, "no cuDNN: %s", th_ctx_error(x->ctx)->text), NULL;
    }
    return x->cudnn = c;
}

void thx_cudnn_fini(thx *x) { /* the library and its handles stay: work may still be in flight */
    PyMem_Free(x->cudnn);
    x->cudnn = NULL;
}

static int read_sizes(PyObject *tuple, int64_t *sizes, Py_ssize_t wanted) {
    if (PyTuple_GET_SIZE(tuple) != wanted) {
        PyErr_Format(PyExc_ValueError, "%zd sizes, and %zd are wanted", PyTuple_GET_SIZE(tuple), wanted);
        return -1;
    }
    for (Py_ssize_t i = 0; i < wanted; i++) sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    return PyErr_Occurred() ? -1 : 0;
}

static th_cudnn_attention attention_of(const int64_t *s, float scale) {
    th_cudnn_attention a = {.type = (uint8_t)s[0],
                            .causal = s[1] != 0,
                            .scale = scale,
                            .batch = s[2],
                            .heads = s[3],
                            .kv_heads = s[4],
                            .length = s[5],
                            .kv_length = s[6],
                            .size = s[7]};
    int64_t *strides[] = {a.q, a.k, a.v, a.o, a.grad, a.dq, a.dk, a.dv};
    for (uint32_t i = 0; i < 8; i++) memcpy(strides[i], s + 8 + 4 * i, 4 * sizeof *s);
    return a;
}

static int make(thx_cudnn_plan *p, th_cudnn *c, const char *kind, PyObject *tuple, float value) {
    int64_t s[MAX_SIZES] = {0};
    th_ctx *ctx = p->x->ctx;
    bool norm = strncmp(kind, "layer_norm", 10) == 0, backward = strstr(kind, "backward") != NULL;
    if (read_sizes(tuple, s, norm ? 4 : 40) < 0) return -1;
    th_status status;
    if (norm) {
        const th_cudnn_norm n = {(uint8_t)s[0], (uint8_t)s[1], s[2], s[3], value};
        status = backward ? th_cudnn_layer_norm_backward(ctx, c, p->device, &n, &p->plan)
                          : th_cudnn_layer_norm(ctx, c, p->device, &n, &p->plan);
    } else {
        const th_cudnn_attention a = attention_of(s, value);
        status = backward ? th_cudnn_attention_backward(ctx, c, p->device, &a, &p->plan)
                          : th_cudnn_attention_forward(ctx, c, p->device, &a, &p->plan);
    }
    if (status == TH_OK) return 0;
    PyErr_SetString(PyExc_RuntimeError, status == TH_ENOMEM ? "out of memory" : th_ctx_error(ctx)->text);
    return -1;
}

static void *address(thx *x, PyObject *tensor) {
    void *data = NULL;
    if (x->abi.on && x->abi.aoti_torch_get_data_ptr(thx_borrow(&x->abi, tensor), &data) == 0) return data;
    PyObject *number = PyObject_CallMethod(tensor, "data_ptr", NULL);
    data = number ? PyLong_AsVoidPtr(number) : NULL;
    Py_XDECREF(number);
    return data;
}

static PyObject *call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    thx_cudnn_plan *p = (thx_cudnn_plan *)self;
    Py_ssize_t n = PyVectorcall_NARGS(nargsf);
    void *at[TH_CUDNN_OPERANDS + 1], *stream = NULL;
    if (kwnames || n != (Py_ssize_t)p->plan.narguments + 1)
        return PyErr_Format(PyExc_TypeError, "this plan takes scratch memory and %u tensors", p->plan.narguments);
    for (Py_ssize_t i = 0; i < n; i++) {
        if (!thx_is_tensor(p->x, args[i]) || thx_is_fake(p->x, args[i]))
            return PyErr_Format(PyExc_TypeError, "argument %zd is no tensor with data", i);
        at[i] = address(p->x, args[i]);
        if (PyErr_Occurred()) return NULL;
        if ((uintptr_t)at[i] % 16) return PyErr_Format(PyExc_ValueError, "argument %zd is not aligned to 16 bytes", i);
    }
    if (!thx_cuda_driver(p->x) || thx_cuda_stream(p->x, p->device, &stream) < 0) return NULL;
    if (thx_check(p->x, th_cudnn_run(p->x->ctx, p->x->cudnn, &p->plan, stream, at + 1, at[0])) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    const char *path, *kind;
    PyObject *sizes;
    double value;
    int device;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "ssiO!d", &path, &kind, &device, &PyTuple_Type, &sizes, &value)) return NULL;
    thx *x = PyType_GetModuleState(type);
    th_cudnn *c = library(x, path);
    thx_cudnn_plan *p = c ? (thx_cudnn_plan *)type->tp_alloc(type, 0) : NULL;
    if (!p) return NULL;
    p->x = x;
    p->vectorcall = call;
    p->device = device;
    if (make(p, c, kind, sizes, (float)value) == 0) return (PyObject *)p;
    Py_DECREF(p);
    return NULL;
}

static void plan_dealloc(thx_cudnn_plan *p) {
    PyTypeObject *type = Py_TYPE(p);
    if (p->x && p->x->cudnn) th_cudnn_plan_fini(p->x->cudnn, &p->plan);
    type->tp_free((PyObject *)p);
    Py_DECREF(type);
}

static PyObject *version(PyObject *module, PyObject *path) {
    const char *text = PyUnicode_AsUTF8(path);
    const th_cudnn *c = text ? library(PyModule_GetState(module), text) : NULL;
    return c ? PyLong_FromLongLong(c->version) : NULL;
}

static PyMemberDef plan_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(thx_cudnn_plan, vectorcall), READONLY, NULL},
    {"scratch", T_ULONGLONG, offsetof(thx_cudnn_plan, plan.scratch), READONLY, "Bytes of scratch memory of a run."},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot plan_slots[] = {
    {Py_tp_new, plan_new},
    {Py_tp_dealloc, plan_dealloc},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_members, plan_members},
    {Py_tp_doc, "CudnnPlan(library, kind, device, sizes, value)\n\nA plan of cuDNN's graph API: see "
                "thunder/executors/cudnn.py."},
    {0, NULL},
};
static PyType_Spec plan_spec = {"thunder._C.CudnnPlan", sizeof(thx_cudnn_plan), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, plan_slots};
static PyMethodDef functions[] = {
    {"cudnn_version", version, METH_O, "cudnn_version(path) -> int: opens the library; 91900 for 9.19.0."},
    {NULL, NULL, 0, NULL},
};

int thx_cudnn_init(thx *x, PyObject *module) {
    (void)x;
    PyObject *type = PyType_FromModuleAndSpec(module, &plan_spec, NULL);
    int rc = type ? PyModule_AddObjectRef(module, "CudnnPlan", type) : -1;
    Py_XDECREF(type);
    return rc < 0 ? -1 : PyModule_AddFunctions(module, functions);
}
