/* Fakes: tensors without data that user code runs on while it is captured.
 *
 * A fake is an instance of a subclass of torch's FakeTensor, one subclass for each device, made from a meta tensor with
 * the dispatch keys of its device. Being FakeTensors they work in torch's own fake kernels, which answer for every
 * operation that has no rule of ours; the FakeTensorMode behind those is made only when it is first needed, because
 * making one imports a thousand modules.
 */
#include "capture.h"

bool thx_is_fake(const thx *x, PyObject *o) { return PyObject_TypeCheck(o, x->FakeTensor); }

PyObject *thx_fake_mode(thx *x) {
    if (!x->fake_mode) {
        PyObject *module = PyImport_ImportModule("torch._subclasses.fake_tensor");
        PyObject *cls = module ? PyObject_GetAttrString(module, "FakeTensorMode") : NULL;
        PyObject *args = PyTuple_New(0),
                 *kwargs = Py_BuildValue("{s:O,s:O}", "allow_non_fake_inputs", Py_True, "static_shapes", Py_True);
        if (cls && args && kwargs) x->fake_mode = PyObject_Call(cls, args, kwargs);
        Py_XDECREF(kwargs);
        Py_XDECREF(args);
        Py_XDECREF(cls);
        Py_XDECREF(module);
    }
    return x->fake_mode;
}

static PyObject *get_fake_mode(PyObject *module, PyObject *fake) {
    (void)fake;
    return Py_XNewRef(thx_fake_mode(PyModule_GetState(module)));
}

static PyObject *get_device(PyObject *module, PyObject *fake) {
    thx *x = PyModule_GetState(module);
    if (x->fake_mode) {
        PyObject *inside = PyObject_GetAttrString(x->fake_mode, "in_kernel_invocation");
        Py_XDECREF(inside);
        if (!inside) return NULL;
        if (inside == Py_True) return Py_NewRef(x->meta_device);
    }
    return PyObject_GetAttr(fake, x->n.fake_device);
}

/* Called for attributes that the fake has not. */
static PyObject *get_missing(PyObject *module, PyObject *const *a, Py_ssize_t n) {
    thx *x = PyModule_GetState(module);
    thx_recorder *r = (thx_recorder *)x->active;
    if (n != 2) return PyErr_Format(PyExc_TypeError, "__getattr__ takes a tensor and a name");
    if (r && !r->depth && x->active_thread == PyThread_get_thread_ident() && thx_recorder_missing(r, a[0], a[1]) < 0)
        return NULL;
    return PyErr_Format(PyExc_AttributeError, "'Tensor' object has no attribute '%U'", a[1]);
}

static PyMethodDef fake_methods[] = {
    {"fake_mode", get_fake_mode, METH_O, NULL},
    {"device", get_device, METH_O, NULL},
    {"__torch_dispatch__", (PyCFunction)(void (*)(void))thx_torch_dispatch, METH_FASTCALL, NULL},
    {"__getattr__", (PyCFunction)(void (*)(void))get_missing, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static int set_method(PyObject *dict, PyMethodDef *def, PyObject *module) {
    PyObject *function = PyCFunction_New(def, module), *method = function ? PyInstanceMethod_New(function) : NULL;
    int rc = method ? PyDict_SetItemString(dict, def->ml_name, method) : -1;
    Py_XDECREF(method);
    Py_XDECREF(function);
    return rc;
}

static int set_property(PyObject *dict, PyMethodDef *def, PyObject *module) {
    PyObject *function = PyCFunction_New(def, module);
    PyObject *property = function ? PyObject_CallOneArg((PyObject *)&PyProperty_Type, function) : NULL;
    int rc = property ? PyDict_SetItemString(dict, def->ml_name, property) : -1;
    Py_XDECREF(property);
    Py_XDECREF(function);
    return rc;
}

static PyObject *make_class(thx *x, PyObject *device) {
    static const char *const none_fields[] = {"constant",
                                              "real_tensor",
                                              "pytype",
                                              "dispatch_keys",
                                              "_nonzero_memo",
                                              "_item_memo",
                                              "_unique_memo",
                                              "_unique_consecutive_memo",
                                              "_nested_int_memo",
                                              "_nonzero_memo_vc",
                                              "_item_memo_vc",
                                              "_unique_memo_vc",
                                              "_unique_consecutive_memo_vc",
                                              "_nested_int_memo_vc",
                                              "_nonzero_memo_epoch",
                                              "_item_memo_epoch",
                                              "_unique_memo_epoch",
                                              "_unique_consecutive_memo_epoch",
                                              "_nested_int_memo_epoch"};
    PyObject *dict = PyDict_New(), *bases = PyTuple_Pack(1, x->FakeTensor), *cls = NULL;
    PyObject *off = PyObject_GetAttrString(x->torch_c, "_disabled_torch_function_impl");
    PyObject *dispatch = PyCFunction_New(&fake_methods[2], x->module);
    if (!dict || !bases || !off || !dispatch) goto done;
    for (size_t i = 0; i < sizeof none_fields / sizeof *none_fields; i++)
        if (PyDict_SetItemString(dict, none_fields[i], Py_None) < 0) goto done;
    /* torch 2.13 answers `fake_device` from `_fake_device`; before, it is an attribute itself. */
    if (!PyObject_HasAttr((PyObject *)x->FakeTensor, x->n.fake_device) &&
        PyDict_SetItem(dict, x->n.fake_device, device) < 0)
        goto done;
    PyObject *package = PyUnicode_FromString("thunder");
    int named = package ? PyDict_SetItem(dict, x->n.module, package) : -1;
    Py_XDECREF(package);
    if (named < 0 || PyDict_SetItemString(dict, "_fake_device", device) < 0 ||
        PyDict_SetItemString(dict, "__torch_function__", off) < 0 ||
        PyDict_SetItemString(dict, "__torch_dispatch__", dispatch) < 0 ||
        set_property(dict, &fake_methods[0], x->module) < 0 || set_property(dict, &fake_methods[1], x->module) < 0 ||
        set_method(dict, &fake_methods[3], x->module) < 0)
        goto done;
    cls = PyObject_CallFunction((PyObject *)&PyType_Type, "sOO", "Fake", bases, dict);
done:
    Py_XDECREF(dispatch);
    Py_XDECREF(off);
    Py_XDECREF(bases);
    Py_XDECREF(dict);
    return cls;
}

static PyObject *fake_class(thx *x, PyObject *device) {
    PyObject *cls = PyDict_GetItemWithError(x->fake_classes, device);
    if (cls || PyErr_Occurred()) return cls;
    cls = make_class(x, device);
    if (!cls || PyDict_SetItem(x->fake_classes, device, cls) < 0) {
        Py_XDECREF(cls);
        return NULL;
    }
    Py_DECREF(cls); /* the dictionary owns it */
    return cls;
}

PyObject *thx_fake_adopt(thx *x, PyObject *fake) {
    PyObject *device = PyObject_GetAttr(fake, x->n.fake_device);
    PyObject *cls = device ? fake_class(x, device) : NULL;
    Py_XDECREF(device);
    if (!cls || ((PyObject *)Py_TYPE(fake) != cls && PyObject_SetAttr(fake, x->n.class_, cls) < 0)) return NULL;
    return fake;
}

/* A meta tensor of the type: by handle where that works. */
static PyObject *make_elem(thx *x, const th_type *type) {
    th_h h = NULL;
    if (x->abi.on && x->abi.aoti_torch_empty_strided && x->abi.aoti_torch_device_type_meta &&
        x->abi.scalar_types[type->dtype] >= 0 &&
        !x->abi.aoti_torch_empty_strided(type->ndim, type->shape, type->stride, x->abi.scalar_types[type->dtype],
                                         x->abi.aoti_torch_device_type_meta(), 0, &h))
        return thx_wrap(&x->abi, h);
    return thx_empty_strided(x, type, x->meta_device);
}

PyObject *thx_fake(thx *x, th_typeref ref) {
    const th_type *type = th_type_get(x->ctx, ref);
    PyObject *device = thx_device_object(x, type->device), *cls = NULL, *fake = NULL;
    if (type->device < THX_DEVICES && x->devices[type->device].fake_class) {
        cls = x->devices[type->device].fake_class;
    } else if (device && (cls = fake_class(x, device)) && type->device < THX_DEVICES) {
        x->devices[type->device].fake_class = Py_NewRef(cls);
    }
    PyObject *elem = cls ? make_elem(x, type) : NULL;
    if (elem) {
        PyObject *args[] = {NULL, cls, elem, Py_False, Py_True, device};
        fake = PyObject_Vectorcall(x->make_subclass, args + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, x->fake_kwnames);
    }
    Py_XDECREF(elem);
    Py_XDECREF(device);
    if (fake) { /* a kernel that asks for the memory of a fake gets an error, not address 0 */
        PyObject *done = PyObject_CallOneArg(x->forbid_data_ptr, fake);
        if (!done) Py_CLEAR(fake);
        Py_XDECREF(done);
    }
    return fake;
}

int thx_fake_init(thx *x, PyObject *module) {
    (void)module;
    x->fake_classes = PyDict_New();
    x->make_subclass = PyObject_GetAttrString((PyObject *)x->Tensor, "_make_subclass");
    x->empty_strided = PyObject_GetAttrString(x->torch, "empty_strided");
    x->elem_kwnames = Py_BuildValue("(ss)", "dtype", "device");
    x->fake_kwnames = Py_BuildValue("(ss)", "dispatch_device", "device_for_backend_keys");
    x->meta_device = PyObject_CallFunction((PyObject *)x->Device, "s", "meta");
    return x->fake_classes && x->make_subclass && x->empty_strided && x->elem_kwnames && x->fake_kwnames &&
                   x->meta_device
               ? 0
               : -1;
}
