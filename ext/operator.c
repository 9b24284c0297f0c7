/* thunder._C.OperatorCall: what a call of a user's operator costs where nobody has to hear of it.
 *
 *     operator(x, 0.5)    the Python function itself, where no mode, autocast or gradient takes part
 *                         torch's dispatcher, by way of the overload, where one does
 *                         what Python says, `_transformed`, inside torch.func
 *
 * thunder.extend.Operator derives from it. A tensor of another class than torch.Tensor and nn.Parameter, one without
 * data and one in a nested structure go through the dispatcher as well.
 */
#include "ambient.h"
#include "capture.h"

typedef struct operator_call {
    PyObject_HEAD vectorcallfunc vectorcall;
    thx *x;
    PyObject *function, *overload; /* owned */
    PyObject *written;             /* owned: tuple of (place, name) of the arguments that it writes to */
} operator_call;

static bool has_data(thx *x, PyObject *tensor) {
    int32_t device = -1;
    if (x->abi.on && x->abi.aoti_torch_device_type_meta)
        return x->abi.aoti_torch_get_device_type(thx_borrow(&x->abi, tensor), &device) == 0 &&
               device != x->abi.aoti_torch_device_type_meta();
    PyObject *meta = PyObject_GetAttrString(tensor, "is_meta");
    PyErr_Clear();
    Py_XDECREF(meta);
    return meta == Py_False;
}

/* Is an argument nobody's but the function's? */
static bool is_plain(thx *x, PyObject *o, bool grad, bool inside) {
    if (Py_TYPE(o) == x->Tensor || Py_TYPE(o) == x->Parameter) return !(grad && thx_needs_grad(x, o)) && has_data(x, o);
    if (thx_is_tensor(x, o)) return false;
    if (!PyList_CheckExact(o) && !PyTuple_CheckExact(o)) return true;
    if (inside) return false;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(o); i++)
        if (!is_plain(x, PySequence_Fast_GET_ITEM(o, i), grad, true)) return false;
    return true;
}

static PyObject *argument_at(PyObject *const *args, Py_ssize_t n, PyObject *kwnames, PyObject *place) { /* borrowed */
    Py_ssize_t at = PyLong_AsSsize_t(PyTuple_GET_ITEM(place, 0));
    if (at < n) return args[at];
    for (Py_ssize_t i = 0; kwnames && i < PyTuple_GET_SIZE(kwnames); i++)
        if (PyUnicode_Compare(PyTuple_GET_ITEM(kwnames, i), PyTuple_GET_ITEM(place, 1)) == 0) return args[n + i];
    return NULL;
}

/* Autograd knows of no write that a kernel does: tell it, as the dispatcher would. */
static int tell_writes(const operator_call *c, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
    int rc = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(c->written) && rc == 0; i++) {
        PyObject *value = argument_at(args, n, kwnames, PyTuple_GET_ITEM(c->written, i));
        if (!value || value == Py_None) continue;
        PyObject *tensors = thx_is_tensor(c->x, value) ? PyTuple_Pack(1, value) : Py_NewRef(value);
        PyObject *done = tensors ? PyObject_CallOneArg(c->x->increment_version, tensors) : NULL;
        Py_XDECREF(tensors);
        Py_XDECREF(done);
        rc = done ? 0 : -1;
    }
    return rc;
}

static PyObject *operator_call_call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    operator_call *c = (operator_call *)self;
    thx *x = c->x;
    Py_ssize_t n = PyVectorcall_NARGS(nargsf) + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0);
    if (!x) return PyErr_Format(PyExc_RuntimeError, "an operator without a function");
    if (thx_under_functorch(x)) {
        PyObject *transformed = PyObject_GetAttrString(self, "_transformed");
        PyObject *result = transformed ? PyObject_Vectorcall(transformed, args, nargsf, kwnames) : NULL;
        Py_XDECREF(transformed);
        return result;
    }
    int grad = thx_grad_mode(x), modes = thx_has_modes(x);
    if (grad < 0 || modes < 0) return NULL;
    bool plain = !modes && !thx_autocast_is_on(x); /* torch.library.register_autocast */
    for (Py_ssize_t i = 0; plain && i < n; i++) plain = is_plain(x, args[i], grad, false);
    PyObject *result = PyObject_Vectorcall(plain ? c->function : c->overload, args, nargsf, kwnames);
    if (plain && result && tell_writes(c, args, PyVectorcall_NARGS(nargsf), kwnames) < 0) Py_CLEAR(result);
    return result;
}

static PyObject *operator_call_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs; /* are for __init__ */
    operator_call *c = (operator_call *)type->tp_alloc(type, 0);
    if (c) c->vectorcall = operator_call_call;
    return (PyObject *)c;
}

static PyObject *operator_call_runs(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t n,
                                    PyObject *kwnames) {
    operator_call *c = (operator_call *)self;
    if (n != 3 || kwnames || !PyTuple_Check(args[2]))
        return PyErr_Format(PyExc_TypeError, "_runs(function, overload, written)");
    c->x = PyType_GetModuleState(cls);
    Py_XSETREF(c->function, Py_NewRef(args[0]));
    Py_XSETREF(c->overload, Py_NewRef(args[1]));
    Py_XSETREF(c->written, Py_NewRef(args[2]));
    Py_RETURN_NONE;
}

static int operator_call_traverse(operator_call *c, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(c));
    Py_VISIT(c->function);
    Py_VISIT(c->overload);
    Py_VISIT(c->written);
    return 0;
}

static int operator_call_clear(operator_call *c) {
    c->x = NULL; /* nothing is called any more */
    Py_CLEAR(c->function);
    Py_CLEAR(c->overload);
    Py_CLEAR(c->written);
    return 0;
}

static void operator_call_dealloc(operator_call *c) {
    PyTypeObject *type = Py_TYPE(c);
    PyObject_GC_UnTrack(c);
    operator_call_clear(c);
    type->tp_free((PyObject *)c);
    Py_DECREF(type);
}

static PyMethodDef operator_call_methods[] = {
    {"_runs", (PyCFunction)(void (*)(void))operator_call_runs, METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
     "_runs(function, overload, written)\n\nWhat a call runs: `function`, or what torch's dispatcher has; "
     "(place, name) of the arguments that it writes to."},
    {NULL, NULL, 0, NULL},
};
static PyMemberDef operator_call_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(operator_call, vectorcall), READONLY, NULL},
    {"function", T_OBJECT, offsetof(operator_call, function), READONLY, "The Python function."},
    {"_overload", T_OBJECT, offsetof(operator_call, overload), READONLY, "The operator in torch.library."},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot operator_call_slots[] = {{Py_tp_new, operator_call_new},
                                            {Py_tp_dealloc, operator_call_dealloc},
                                            {Py_tp_traverse, operator_call_traverse},
                                            {Py_tp_clear, operator_call_clear},
                                            {Py_tp_call, PyVectorcall_Call},
                                            {Py_tp_methods, operator_call_methods},
                                            {Py_tp_members, operator_call_members},
                                            {Py_tp_doc, "The base of thunder.extend.Operator: its calls."},
                                            {0, NULL}};
static PyType_Spec operator_call_spec = {
    "thunder._C.OperatorCall", sizeof(operator_call), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_BASETYPE, operator_call_slots};

int thx_operator_init(thx *x, PyObject *module) {
    (void)x;
    PyObject *type = PyType_FromModuleAndSpec(module, &operator_call_spec, NULL);
    int rc = type ? PyModule_AddObjectRef(module, "OperatorCall", type) : -1;
    Py_XDECREF(type);
    return rc;
}
