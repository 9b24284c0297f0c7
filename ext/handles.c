/* Functions of handles: what Inductor's C++ wrapper of a region is to Python.
 *
 *     function([capsule of a handle, ...]) -> [capsule of a handle, ...]
 *
 * It takes over the handles that it is given, we take over those that it gives. The plan has handles in its slots, so a
 * region runs with no Python object per tensor but the capsules, and no Python frame.
 */
#include "region.h"

typedef struct handle_call { /* Python object: thunder._C.HandleCall */
    PyObject_HEAD vectorcallfunc vectorcall;
    thx *x;
    PyObject *function; /* owned */
    PyObject *align;    /* owned; gives a copy of a tensor at an aligned address. NULL: no input need be aligned */
    uintptr_t alignment;
    PyObject *aligned; /* owned bytes: for each input, up to the last one of them, whether it must be aligned */
} handle_call;

static th_h own_handle(thx *x, th_h h) {
    th_h own = NULL;
    if (h && x->abi.aoti_torch_new_tensor_handle(h, &own) == 0) return own;
    PyErr_Format(PyExc_RuntimeError, "torch refused to share a tensor");
    return NULL;
}

/* The code for an input at an aligned address reads several elements at once. */
static bool is_misplaced(const handle_call *c, Py_ssize_t i, th_h h) {
    void *data = NULL;
    return c->align && i < PyBytes_GET_SIZE(c->aligned) && PyBytes_AS_STRING(c->aligned)[i] &&
           c->x->abi.aoti_torch_get_data_ptr(h, &data) == 0 && (uintptr_t)data % c->alignment;
}

static th_h aligned_copy(const handle_call *c, th_slot *slot) {
    PyObject *o = thx_slot_object(c->x, slot), *copy = o ? PyObject_CallOneArg(c->align, o) : NULL;
    th_h own = copy ? own_handle(c->x, thx_borrow(&c->x->abi, copy)) : NULL;
    Py_XDECREF(copy);
    return own;
}

static PyObject *capsule_of(const handle_call *c, Py_ssize_t i, th_slot *slot) {
    th_h h = thx_slot_handle(c->x, slot),
         own = h && is_misplaced(c, i, h) ? aligned_copy(c, slot) : own_handle(c->x, h);
    PyObject *capsule = own ? PyCapsule_New(own, NULL, NULL) : NULL;
    if (own && !capsule) c->x->abi.aoti_torch_delete_tensor_object(own);
    return capsule;
}

static void put(PyObject **list, Py_ssize_t i, PyObject *capsule) { /* NULL: there is an exception, and no list */
    if (capsule)
        PyList_SET_ITEM(*list, i, capsule);
    else
        Py_CLEAR(*list);
}

static void take(thx *x, PyObject *given, Py_ssize_t i, th_slot *out) {
    PyObject *capsule = PyList_GET_ITEM(given, i);
    th_h h = PyCapsule_CheckExact(capsule) ? PyCapsule_GetPointer(capsule, NULL) : NULL;
    if (!h) {
        PyErr_Clear();
    } else if (out) {
        thx_slot_drop(x, out);
        *out = (th_slot){.handle = h, .owns_handle = true};
    } else {
        x->abi.aoti_torch_delete_tensor_object(h);
    }
}

/* Handles of inputs that a call never got to are lost: only memory errors lead there. */
int thx_handles_run(thx *x, PyObject *callable, th_slot *slots, const uint32_t *ins, uint32_t nins,
                    const uint32_t *outs, uint32_t nouts) {
    const handle_call *c = (handle_call *)callable;
    PyObject *given = PyList_New(nins);
    for (uint32_t i = 0; given && i < nins; i++) put(&given, i, capsule_of(c, i, &slots[ins[i]]));
    PyObject *made = given ? PyObject_CallOneArg(c->function, given) : NULL;
    Py_XDECREF(given);
    if (!made) return -1;
    bool fits = PyList_CheckExact(made) && PyList_GET_SIZE(made) == nouts;
    for (Py_ssize_t i = 0; PyList_CheckExact(made) && i < PyList_GET_SIZE(made); i++)
        take(x, made, i, fits ? &slots[outs[i]] : NULL);
    for (uint32_t i = 0; fits && i < nouts; i++) fits = slots[outs[i]].handle != NULL;
    Py_DECREF(made);
    if (!fits) PyErr_Format(PyExc_RuntimeError, "generated code gave no %u tensors", nouts);
    return fits ? 0 : -1;
}

/* The same for tensors: as many results as it has. */
static PyObject *handle_call_call(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    handle_call *c = (handle_call *)self;
    Py_ssize_t n = PyVectorcall_NARGS(nargsf);
    if (kwnames && PyTuple_GET_SIZE(kwnames))
        return PyErr_Format(PyExc_TypeError, "generated code takes tensors, by position");
    PyObject *given = PyList_New(n);
    for (Py_ssize_t i = 0; given && i < n; i++)
        put(&given, i,
            thx_is_tensor(c->x, args[i]) ? capsule_of(c, i, &(th_slot){.object = args[i]})
                                         : PyErr_Format(PyExc_TypeError, "argument %zd is no tensor", i));
    PyObject *made = given ? PyObject_CallOneArg(c->function, given) : NULL;
    Py_XDECREF(given);
    PyObject *result = made && PyList_CheckExact(made) ? PyTuple_New(PyList_GET_SIZE(made)) : NULL;
    for (Py_ssize_t i = 0; made && PyList_CheckExact(made) && i < PyList_GET_SIZE(made); i++) {
        th_slot slot = {0};
        take(c->x, made, i, &slot);
        PyObject *o = result ? (slot.handle ? thx_slot_object(c->x, &slot) : Py_None) : NULL;
        if (o)
            PyTuple_SET_ITEM(result, i, Py_NewRef(o));
        else
            Py_CLEAR(result);
        thx_slot_drop(c->x, &slot);
    }
    if (made && !result && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "generated code gave no list");
    Py_XDECREF(made);
    return result;
}

static PyObject *handle_call_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"function", "aligned", "alignment", "align", NULL};
    PyObject *function, *align = NULL, *aligned = NULL;
    Py_ssize_t alignment = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|SnO", names, &function, &aligned, &alignment, &align))
        return NULL;
    thx *x = PyType_GetModuleState(type);
    if (!x->abi.on) return PyErr_Format(PyExc_RuntimeError, "this torch has no handles");
    if (!PyCallable_Check(function)) return PyErr_Format(PyExc_TypeError, "a callable is needed");
    if (aligned && (alignment < 1 || !align || !PyCallable_Check(align)))
        return PyErr_Format(PyExc_TypeError,
                            "inputs to align need a positive alignment and a callable that copies one");
    handle_call *c = (handle_call *)type->tp_alloc(type, 0);
    if (!c) return NULL;
    c->x = x;
    c->vectorcall = handle_call_call;
    c->function = Py_NewRef(function);
    c->aligned = Py_XNewRef(aligned);
    c->alignment = (uintptr_t)alignment;
    c->align = aligned ? Py_NewRef(align) : NULL;
    return (PyObject *)c;
}

static int handle_call_traverse(handle_call *c, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(c));
    Py_VISIT(c->function);
    Py_VISIT(c->align);
    return 0;
}

static int handle_call_clear(handle_call *c) {
    Py_CLEAR(c->function);
    Py_CLEAR(c->align);
    return 0;
}

static void handle_call_dealloc(handle_call *c) {
    PyTypeObject *type = Py_TYPE(c);
    PyObject_GC_UnTrack(c);
    handle_call_clear(c);
    Py_XDECREF(c->aligned);
    type->tp_free((PyObject *)c);
    Py_DECREF(type);
}

static PyMemberDef handle_call_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(handle_call, vectorcall), READONLY, NULL},
    {"function", T_OBJECT, offsetof(handle_call, function), READONLY, "What it calls, with a list of capsules."},
    {NULL, 0, 0, 0, NULL},
};
static PyType_Slot handle_call_slots[] = {{Py_tp_new, handle_call_new},
                                          {Py_tp_dealloc, handle_call_dealloc},
                                          {Py_tp_traverse, handle_call_traverse},
                                          {Py_tp_clear, handle_call_clear},
                                          {Py_tp_call, PyVectorcall_Call},
                                          {Py_tp_members, handle_call_members},
                                          {Py_tp_doc,
                                           "HandleCall(function, aligned=None, alignment=1, align=None): calls a "
                                           "function of handles of tensors with tensors; a plan calls it "
                                           "with its handles. Inputs with a nonzero byte in `aligned` that do "
                                           "not lie at a multiple of `alignment` bytes are replaced by what "
                                           "`align` makes of them."},
                                          {0, NULL}};
static PyType_Spec handle_call_spec = {"thunder._C.HandleCall", sizeof(handle_call), 0,
                                       Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
                                       handle_call_slots};

int thx_handles_init(thx *x, PyObject *module) {
    x->HandleCall = (PyTypeObject *)PyType_FromModuleAndSpec(module, &handle_call_spec, NULL);
    return x->HandleCall && PyModule_AddObjectRef(module, "HandleCall", (PyObject *)x->HandleCall) == 0 ? 0 : -1;
}
