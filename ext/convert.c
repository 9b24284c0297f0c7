/* Between Python objects and the core's types and nodes. */
#include "ext.h"

#include "sizes.h"

#include <string.h>

/* ---- devices and dtypes ---- */

th_dev thx_device_ref(thx *x, PyObject *device) {
    PyObject *type = PyObject_GetAttr(device, x->n.type), *index = PyObject_GetAttr(device, x->n.index);
    th_dev ref = 0;
    if (type && index) {
        const char *name = PyUnicode_AsUTF8(type);
        long number = index == Py_None ? -1 : PyLong_AsLong(index);
        if (name && !PyErr_Occurred()) ref = th_device(x->ctx, name, (int32_t)number);
        if (!ref && !PyErr_Occurred()) PyErr_NoMemory();
    }
    Py_XDECREF(type);
    Py_XDECREF(index);
    return ref;
}

static PyObject *make_device(thx *x, th_dev device);

PyObject *thx_device_object(thx *x, th_dev device) {
    if (device < THX_DEVICES && x->devices[device].device) return Py_NewRef(x->devices[device].device);
    PyObject *object = make_device(x, device);
    if (object && device < THX_DEVICES) x->devices[device].device = Py_NewRef(object);
    return object;
}

/* The device of a real tensor. */
static th_dev read_device(thx *x, PyObject *tensor) {
    int32_t type = -1, index = -1;
    th_dev *cached = NULL;
    if (x->abi.on && !x->abi.aoti_torch_get_device_type(thx_borrow(&x->abi, tensor), &type) &&
        !x->abi.aoti_torch_get_device_index(thx_borrow(&x->abi, tensor), &index) && type >= 0 && type < THX_DEVICES &&
        index >= -1 && index + 1 < THX_DEVICES)
        cached = &x->device_of[type][index + 1];
    if (cached && *cached) return *cached;
    PyObject *device = PyObject_GetAttr(tensor, x->n.device);
    th_dev ref = device ? thx_device_ref(x, device) : 0;
    Py_XDECREF(device);
    if (cached) *cached = ref;
    return ref;
}

static PyObject *make_device(thx *x, th_dev device) {
    int32_t index = th_device_index(x->ctx, device);
    if (index < 0) return PyObject_CallFunction((PyObject *)x->Device, "s", th_device_type(x->ctx, device));
    return PyObject_CallFunction((PyObject *)x->Device, "si", th_device_type(x->ctx, device), (int)index);
}

th_dtype thx_dtype_ref(thx *x, PyObject *dtype) {
    for (int d = 1; d < TH_DTYPE_COUNT; d++)
        if (x->dtype_objects[d] == dtype) return (th_dtype)d;
    return TH_DTYPE_NONE;
}

/* ---- tensor metadata ---- */

static int read_ints(PyObject *tuple, int64_t *out, int64_t *count) {
    Py_ssize_t n = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : -1;
    if (n < 0 || n > THX_MAX_RANK) {
        PyErr_SetString(PyExc_ValueError, "tensor rank above 64");
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    *count = n;
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *get_attr(PyObject *o, const char *name) { return PyObject_GetAttrString(o, name); }

PyObject *thx_enter(thx *x, PyObject *make) {
    PyObject *manager = PyObject_CallNoArgs(make);
    PyObject *entered = manager ? PyObject_CallMethodNoArgs(manager, x->n.enter) : NULL;
    if (!entered) Py_CLEAR(manager);
    Py_XDECREF(entered);
    return manager;
}

void thx_leave(thx *x, PyObject *manager) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *left = PyObject_CallMethodObjArgs(manager, x->n.exit, Py_None, Py_None, Py_None, NULL);
    Py_XDECREF(left);
    Py_DECREF(manager);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

PyObject *thx_int_tuple(const int64_t *items, uint32_t n) {
    PyObject *tuple = PyTuple_New(n);
    for (uint32_t i = 0; tuple && i < n; i++) {
        PyObject *item = PyLong_FromLongLong(items[i]);
        if (!item)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

PyObject *thx_empty_strided(thx *x, const th_type *type, PyObject *device) {
    PyObject *shape = thx_int_tuple(type->shape, type->ndim), *stride = thx_int_tuple(type->stride, type->ndim),
             *tensor = NULL;
    if (shape && stride) {
        PyObject *args[] = {NULL, shape, stride, x->dtype_objects[type->dtype], device};
        tensor = PyObject_Vectorcall(x->empty_strided, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, x->elem_kwnames);
    }
    Py_XDECREF(shape);
    Py_XDECREF(stride);
    return tensor;
}

/* The road through Python getters, where the ABI is off. */
static int ask_meta(thx *x, PyObject *tensor, thx_meta *m) {
    int64_t count = 0;
    PyObject *shape = get_attr(tensor, "shape"), *stride = PyObject_CallMethod(tensor, "stride", NULL);
    PyObject *offset = PyObject_CallMethod(tensor, "storage_offset", NULL),
             *dtype = PyObject_GetAttr(tensor, x->n.dtype);
    int rc = -1;
    if (shape && stride && offset && dtype && read_ints(shape, m->shape, &m->ndim) == 0 &&
        read_ints(stride, m->stride, &count) == 0) {
        m->offset = PyLong_AsLongLong(offset);
        m->dtype = thx_dtype_ref(x, dtype);
        rc = PyErr_Occurred() ? -1 : 0;
    }
    Py_XDECREF(shape);
    Py_XDECREF(stride);
    Py_XDECREF(offset);
    Py_XDECREF(dtype);
    return rc;
}

static int read_meta_slow(thx *x, PyObject *tensor, thx_meta *m) {
    PyObject *off = thx_enter(x, x->modes_off);
    if (!off) return -1;
    int rc = ask_meta(x, tensor, m);
    thx_leave(x, off);
    return rc;
}

int thx_grad_mode(thx *x) {
    if (x->abi.on) return x->abi.aoti_torch_grad_mode_is_enabled();
    PyObject *on = PyObject_CallNoArgs(x->grad_enabled);
    Py_XDECREF(on); /* a singleton */
    return on ? on == Py_True : -1;
}

int thx_read_meta(thx *x, PyObject *tensor, bool fake, thx_meta *m) {
    const thx_abi *abi = &x->abi;
    if (abi->on) {
        th_h h = thx_borrow(abi, tensor);
        int64_t *sizes = NULL, *strides = NULL;
        int32_t number = 0;
        if (abi->aoti_torch_get_dim(h, &m->ndim) || m->ndim > THX_MAX_RANK || abi->aoti_torch_get_sizes(h, &sizes) ||
            abi->aoti_torch_get_strides(h, &strides) || abi->aoti_torch_get_dtype(h, &number) ||
            abi->aoti_torch_get_storage_offset(h, &m->offset)) {
            PyErr_SetString(PyExc_ValueError, "cannot read this tensor's sizes and strides");
            return -1;
        }
        memcpy(m->shape, sizes, sizeof(int64_t) * (size_t)m->ndim);
        memcpy(m->stride, strides, sizeof(int64_t) * (size_t)m->ndim);
        m->dtype = number >= 0 && number < 64 ? (th_dtype)abi->dtypes[number] : TH_DTYPE_NONE;
    } else if (read_meta_slow(x, tensor, m) < 0) {
        return -1;
    }
    if (m->dtype == TH_DTYPE_NONE) {
        PyErr_SetString(PyExc_TypeError, "tensors of this dtype are not supported");
        return -1;
    }
    if (fake) {
        PyObject *device = PyObject_GetAttr(tensor, x->n.fake_device);
        m->device = device ? thx_device_ref(x, device) : 0;
        Py_XDECREF(device);
    } else {
        m->device = read_device(x, tensor);
    }
    if (!m->device) return -1;
    PyObject *flag = x->requires_grad_get(tensor, x->requires_grad_closure);
    if (!flag) return -1;
    m->requires_grad = flag == Py_True;
    Py_DECREF(flag);
    return 0;
}

int thx_needs_grad(thx *x, PyObject *tensor) {
    int known = x->abi.on ? thx_requires_grad(&x->abi, tensor) : -1;
    if (known >= 0) return known; /* else not to be told from the outside */
    PyObject *flag = x->requires_grad_get(tensor, x->requires_grad_closure);
    if (!flag) return PyErr_Clear(), -1;
    Py_DECREF(flag);
    return flag == Py_True;
}

void *thx_storage_base(thx *x, PyObject *tensor) {
    th_h h = x->abi.on ? thx_borrow(&x->abi, tensor) : NULL;
    int64_t offset = 0;
    int32_t number = -1;
    void *data = NULL;
    if (h) {
        if (x->abi.aoti_torch_get_data_ptr(h, &data) || x->abi.aoti_torch_get_storage_offset(h, &offset) ||
            x->abi.aoti_torch_get_dtype(h, &number) || number < 0 || number >= 64 || !data)
            return NULL;
        return (char *)data - offset * th_dtype_get((th_dtype)x->abi.dtypes[number])->bytes;
    }
    PyObject *off = thx_enter(x, x->modes_off);
    PyObject *storage = off ? PyObject_CallMethod(tensor, "untyped_storage", NULL) : NULL;
    PyObject *address = storage ? PyObject_CallMethod(storage, "data_ptr", NULL) : NULL;
    data = address ? PyLong_AsVoidPtr(address) : NULL;
    PyErr_Clear();
    Py_XDECREF(address);
    Py_XDECREF(storage);
    if (off) thx_leave(x, off);
    return data;
}

thx_memory thx_storage_memory(thx *x, PyObject *tensor) {
    PyObject *off = thx_enter(x, x->modes_off);
    PyObject *storage = off ? PyObject_CallMethod(tensor, "untyped_storage", NULL) : NULL;
    PyObject *size = storage ? PyObject_CallMethod(storage, "nbytes", NULL) : NULL;
    Py_ssize_t bytes = size ? PyLong_AsSsize_t(size) : 0;
    PyErr_Clear();
    Py_XDECREF(size);
    Py_XDECREF(storage);
    if (off) thx_leave(x, off);
    const char *from = thx_storage_base(x, tensor);
    return (thx_memory){from, from && bytes > 0 ? (size_t)bytes : 0};
}

th_typeref thx_meta_type(thx *x, const thx_meta *m) {
    th_typeref type = th_type_tensor(x->ctx, m->dtype, m->device, (uint32_t)m->ndim, m->shape, m->stride,
                                     m->requires_grad ? TH_TYPE_REQUIRES_GRAD : 0);
    if (!type) PyErr_NoMemory();
    return type;
}

/* ---- Python object -> node ---- */

static void opaque_retain(void *object) { Py_INCREF((PyObject *)object); }
static void opaque_release(void *object) { Py_DECREF((PyObject *)object); }
const th_opaque_vtable thx_opaque_vtable = {opaque_retain, opaque_release};

static th_node sequence_node(thx *x, th_trace *t, PyObject **items, Py_ssize_t n, th_node_kind kind,
                             thx_tensor_fn tensor, void *user) {
    th_node fixed[32] = {0}, *kids = n <= 32 ? fixed : PyMem_Malloc(sizeof(th_node) * (size_t)n);
    if (!kids) return PyErr_NoMemory(), 0;
    th_node result = 0;
    Py_ssize_t i = 0;
    for (; i < n; i++) {
        kids[i] = thx_to_node(x, t, items[i], tensor, user);
        if (!kids[i]) break;
    }
    if (i == n) result = th_node_seq(t, kind, (uint32_t)n, kids);
    if (kids != fixed) PyMem_Free(kids);
    if (!result && !PyErr_Occurred()) PyErr_NoMemory();
    return result;
}

static th_node dict_node(thx *x, th_trace *t, PyObject *dict, thx_tensor_fn tensor, void *user) {
    Py_ssize_t n = PyDict_GET_SIZE(dict), at = 0, i = 0;
    PyObject **items = PyMem_Malloc(sizeof(PyObject *) * (size_t)(2 * n + 1)), *key, *value;
    if (!items) return PyErr_NoMemory(), 0;
    while (PyDict_Next(dict, &at, &key, &value) && i < 2 * n) {
        items[i++] = key;
        items[i++] = value;
    }
    th_node result = sequence_node(x, t, items, i, TH_N_DICT, tensor, user);
    PyMem_Free(items);
    return result;
}

static th_node symbol_of(thx *x, th_trace *t, PyObject *object) { /* repr is the dotted name: torch.strided */
    PyObject *text = PyObject_Repr(object);
    const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
    th_node node = utf8 ? th_node_symbol(t, th_intern_z(x->ctx, utf8)) : 0;
    Py_XDECREF(text);
    return node;
}

th_node thx_to_node(thx *x, th_trace *t, PyObject *o, thx_tensor_fn tensor, void *user) {
    PyTypeObject *type = Py_TYPE(o);
    th_node node = 0;
    if (o == Py_None) {
        node = th_node_none(t);
    } else if (thx_is_tensor(x, o)) {
        th_val v = tensor(user, o);
        if (!v) return 0;
        node = th_node_value(t, v);
    } else if (type == &PyBool_Type) {
        node = th_node_bool(t, o == Py_True);
    } else if (type == &PyLong_Type) {
        int overflow = 0;
        long long number = PyLong_AsLongLongAndOverflow(o, &overflow);
        node = overflow ? th_node_opaque(t, "big", o) : th_node_int(t, number);
    } else if (type == x->extent_type) {
        node = thx_extent_node(x, t, o);
    } else if (type == &PyFloat_Type || type == x->number_type) {
        node = th_node_float(t, PyFloat_AS_DOUBLE(o));
        if (node && type == x->number_type) t->nodes[node].f2 = thx_number_place(x, o) + 1;
    } else if (type == &PyComplex_Type) {
        node = th_node_complex(t, PyComplex_RealAsDouble(o), PyComplex_ImagAsDouble(o));
    } else if (type == &PyUnicode_Type) {
        Py_ssize_t length;
        const char *text = PyUnicode_AsUTF8AndSize(o, &length);
        if (!text) return 0;
        node = th_node_str(t, th_intern(x->ctx, text, (size_t)length));
    } else if (type == &PyTuple_Type || type == x->Size || (PyTuple_Check(o) && PyObject_HasAttr(o, x->n.fields))) {
        return sequence_node(x, t, ((PyTupleObject *)o)->ob_item, PyTuple_GET_SIZE(o), TH_N_TUPLE, tensor, user);
    } else if (type == &PyList_Type) {
        return sequence_node(x, t, ((PyListObject *)o)->ob_item, PyList_GET_SIZE(o), TH_N_LIST, tensor, user);
    } else if (type == &PyDict_Type) {
        return dict_node(x, t, o, tensor, user);
    } else if (type == &PySlice_Type) {
        PySliceObject *s = (PySliceObject *)o;
        PyObject *parts[3] = {s->start, s->stop, s->step};
        return sequence_node(x, t, parts, 3, TH_N_SLICE, tensor, user);
    } else if (o == Py_Ellipsis) {
        node = th_node_ellipsis(t);
    } else if (type == x->Dtype) {
        th_dtype d = thx_dtype_ref(x, o);
        node = d ? th_node_dtype(t, d) : symbol_of(x, t, o);
    } else if (type == x->Device) {
        th_dev d = thx_device_ref(x, o);
        if (!d) return 0;
        node = th_node_device(t, d);
    } else if (type == x->Layout || type == x->MemoryFormat) {
        node = symbol_of(x, t, o);
    } else {
        node = th_node_opaque(t, "obj", o);
    }
    if (!node && !PyErr_Occurred()) PyErr_NoMemory();
    return node;
}

/* ---- node -> Python object ---- */

static PyObject *resolve(thx *x, const char *dotted) {
    PyObject *object = Py_NewRef(x->torch);
    const char *part = dotted;
    size_t first = strcspn(part, ".");
    if (first != 5 || strncmp(part, "torch", 5) != 0) { /* another package: import its head */
        Py_DECREF(object);
        PyObject *head = PyUnicode_FromStringAndSize(part, (Py_ssize_t)first);
        object = head ? PyImport_Import(head) : NULL;
        Py_XDECREF(head);
    }
    part += first;
    while (object && *part == '.') {
        part++;
        size_t length = strcspn(part, ".");
        PyObject *name = PyUnicode_FromStringAndSize(part, (Py_ssize_t)length);
        PyObject *next = name ? PyObject_GetAttr(object, name) : NULL;
        Py_XDECREF(name);
        Py_DECREF(object);
        object = next;
        part += length;
    }
    return object;
}

static PyObject *resolve_cached(thx *x, th_str dotted) { /* borrowed */
    const char *text = th_str_get(x->ctx, dotted);
    PyObject *found = PyDict_GetItemString(x->callables, text);
    if (found) return found;
    PyObject *object = resolve(x, text);
    if (!object || PyDict_SetItemString(x->callables, text, object) < 0) {
        Py_XDECREF(object);
        return NULL;
    }
    Py_DECREF(object);
    return object;
}

PyObject *thx_callable(thx *x, const th_trace *t, const th_op *op) {
    if (!op->callee_opaque) return resolve_cached(x, op->callee);
    PyObject *object = t->opaques[op->callee_opaque].object;
    if (!object)
        PyErr_Format(PyExc_NameError, "'%s' is a Python object that this trace's text does not hold",
                     th_str_get(x->ctx, t->opaques[op->callee_opaque].name));
    return object;
}

static PyObject *sequence_object(thx *x, const th_trace *t, const th_node_data *d, thx_value_fn value, void *user) {
    PyObject *result = d->kind == TH_N_LIST ? PyList_New(d->count) : PyTuple_New(d->count);
    for (uint32_t i = 0; result && i < d->count; i++) {
        PyObject *item = thx_from_node(x, t, t->kids[d->u.kids + i], value, user);
        if (!item)
            Py_CLEAR(result);
        else if (d->kind == TH_N_LIST)
            PyList_SET_ITEM(result, i, item);
        else
            PyTuple_SET_ITEM(result, i, item);
    }
    return result;
}

static PyObject *dict_object(thx *x, const th_trace *t, const th_node_data *d, thx_value_fn value, void *user) {
    PyObject *dict = PyDict_New();
    for (uint32_t i = 0; dict && i + 1 < d->count; i += 2) {
        PyObject *key = thx_from_node(x, t, t->kids[d->u.kids + i], value, user);
        PyObject *item = key ? thx_from_node(x, t, t->kids[d->u.kids + i + 1], value, user) : NULL;
        if (!item || PyDict_SetItem(dict, key, item) < 0) Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(item);
    }
    return dict;
}

static PyObject *slice_object(thx *x, const th_trace *t, const th_node_data *d, thx_value_fn value, void *user) {
    PyObject *part[3] = {NULL, NULL, NULL}, *slice = NULL;
    for (uint32_t i = 0; i < 3; i++)
        if (!(part[i] = thx_from_node(x, t, t->kids[d->u.kids + i], value, user))) goto done;
    slice = PySlice_New(part[0], part[1], part[2]);
done:
    for (int i = 0; i < 3; i++) Py_XDECREF(part[i]);
    return slice;
}

PyObject *thx_from_node(thx *x, const th_trace *t, th_node node, thx_value_fn value, void *user) {
    const th_node_data *d = &t->nodes[node];
    switch ((th_node_kind)d->kind) {
    case TH_N_NONE: Py_RETURN_NONE;
    case TH_N_BOOL: return PyBool_FromLong(d->u.i != 0);
    case TH_N_INT: return PyLong_FromLongLong(d->u.i);
    case TH_N_FLOAT: return PyFloat_FromDouble(d->u.f);
    case TH_N_COMPLEX: return PyComplex_FromDoubles(d->u.f, d->f2);
    case TH_N_STR:
        return PyUnicode_FromStringAndSize(th_str_get(x->ctx, d->u.ref), (Py_ssize_t)th_str_len(x->ctx, d->u.ref));
    case TH_N_DTYPE: return Py_NewRef(x->dtype_objects[d->u.ref]);
    case TH_N_DEVICE: return thx_device_object(x, d->u.ref);
    case TH_N_SYMBOL: return Py_XNewRef(resolve_cached(x, d->u.ref));
    case TH_N_VALUE: return value(user, d->u.ref);
    case TH_N_TUPLE:
    case TH_N_LIST: return sequence_object(x, t, d, value, user);
    case TH_N_DICT: return dict_object(x, t, d, value, user);
    case TH_N_SLICE: return slice_object(x, t, d, value, user);
    case TH_N_ELLIPSIS: return Py_NewRef(Py_Ellipsis);
    case TH_N_OPAQUE:
        if (t->opaques[d->u.ref].object) return Py_NewRef((PyObject *)t->opaques[d->u.ref].object);
        return PyErr_Format(PyExc_NameError, "'%s' is a Python object that this trace's text does not hold",
                            th_str_get(x->ctx, t->opaques[d->u.ref].name));
    case TH_N_ABSENT: break;
    }
    return thx_raise(x, TH_EINTERNAL);
}
