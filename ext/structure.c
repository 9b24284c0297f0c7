/* Describe and match nested Python values. See structure.h.
 *
 * What an object holds are its items (tuples, lists, dicts, ...), then its attributes. An object whose C layout hides
 * more than that is compared by identity.
 */
#include "describe.h"

#include "attributes.h"
#include "sizes.h"

#include <string.h>

void thx_leaves_init(thx_leaves *l) {
    l->items = l->fixed;
    l->count = 0;
    l->cap = sizeof l->fixed / sizeof *l->fixed;
    l->args = NULL;
    l->held = NULL;
}

void thx_leaves_fini(thx_leaves *l) {
    Py_CLEAR(l->held);
    if (l->items != l->fixed) PyMem_Free(l->items);
    l->items = l->fixed;
    l->count = 0;
}

static int push(thx_leaves *l, PyObject *tensor) {
    if (l->count == l->cap) {
        PyObject **items = PyMem_Malloc(sizeof *items * l->cap * 2);
        if (!items) return PyErr_NoMemory(), -1;
        memcpy(items, l->items, sizeof *items * l->count);
        if (l->items != l->fixed) PyMem_Free(l->items);
        l->items = items;
        l->cap *= 2;
    }
    l->items[l->count++] = tensor;
    return 0;
}

static int64_t find(const thx_leaves *l, PyObject *tensor) {
    for (uint32_t i = 0; i < l->count; i++)
        if (l->items[i] == tensor) return i;
    return -1;
}

/* ---- classes of objects ---- */

bool thx_is_plain_value(thx *x, PyObject *o) {
    PyTypeObject *t = Py_TYPE(o);
    return o == Py_None || t == &PyBool_Type || t == &PyLong_Type || t == &PyFloat_Type || t == &PyComplex_Type ||
           t == &PyUnicode_Type || t == &PyBytes_Type || t == &PyRange_Type || t == x->Size || t == x->Device ||
           t == &PyFrozenSet_Type || t == &PySet_Type || PyObject_TypeCheck(o, x->NumpyGeneric);
}

bool thx_is_opaque_value(thx *x, PyObject *o) {
    return PyFunction_Check(o) || PyType_Check(o) || PyModule_Check(o) || PyMethod_Check(o) || PyCFunction_Check(o) ||
           PyObject_TypeCheck(o, x->NnModule) || Py_TYPE(o) == x->Dtype || PyGen_Check(o) || PyCoro_CheckExact(o);
}

/* Subclasses of immutable values: enum members of int, str subclasses. */
static bool valued(PyObject *o) {
    return PyLong_Check(o) || PyUnicode_Check(o) || PyFloat_Check(o) || PyBytes_Check(o) || PyComplex_Check(o) ||
           PyFrozenSet_Check(o);
}

static bool named(PyTypeObject *t, const char *name) { return strcmp(t->tp_name, name) == 0; }

static bool is_buffer(PyObject *o) {
    return Py_IS_TYPE(o, &PyByteArray_Type) || named(Py_TYPE(o), "numpy.ndarray") || named(Py_TYPE(o), "array.array");
}

/* ---- describe ---- */

static int describe_tensor(thx_describer *d, thx_spec *s, PyObject *o) {
    thx *x = d->x;
    s->kind = THX_S_TENSOR;
    int64_t seen = find(d->leaves, o);
    s->repeated = seen >= 0;
    s->leaf = seen >= 0 ? (uint32_t)seen : d->leaves->count;
    if (seen < 0 && push(d->leaves, o) < 0) return -1;
    if (d->r || s->repeated) return 0;
    PyObject *layout = PyObject_GetAttrString(o, "layout");
    Py_XDECREF(layout);
    if (!layout) return -1;
    if (layout != x->strided) return 0; /* refused with a clear message when it becomes an input of the trace */
    thx_meta m;
    if (thx_read_meta(x, o, false, &m) < 0) return PyErr_Clear(), 0; /* likewise: nested, quantized */
    s->requires_grad = m.requires_grad;
    s->lazy = thx_is_lazy(&x->abi, o);
    s->ndim = m.ndim;
    s->dims = PyMem_Malloc(sizeof(int64_t) * (size_t)(2 * m.ndim + 1));
    if (!s->dims) return PyErr_NoMemory(), -1;
    memcpy(s->dims, m.shape, sizeof(int64_t) * (size_t)m.ndim);
    memcpy(s->dims + m.ndim, m.stride, sizeof(int64_t) * (size_t)m.ndim);
    s->dtype = (int32_t)m.dtype;
    s->device_type = (int32_t)m.device; /* the interned device where handles are off */
    if (x->abi.on) {
        th_h h = thx_borrow(&x->abi, o);
        x->abi.aoti_torch_get_dtype(h, &s->dtype);
        x->abi.aoti_torch_get_device_type(h, &s->device_type);
        x->abi.aoti_torch_get_device_index(h, &s->device_index);
    }
    return 0;
}

/* Items, then attributes (may be NULL); keys are those of items that have some. */
static int describe_kids(thx_describer *d, thx_spec *s, PyObject *const *items, Py_ssize_t n, PyObject *keys,
                         PyObject *attributes, int depth) {
    Py_ssize_t m = attributes ? PyDict_GET_SIZE(attributes) : 0;
    s->kids = PyMem_Calloc((size_t)(n + m + 1), sizeof *s->kids);
    if (!s->kids) return PyErr_NoMemory(), -1;
    s->nitems = (uint32_t)n;
    s->nkids = (uint32_t)(n + m);
    for (Py_ssize_t i = 0; i < n; i++)
        if (thx_describe(d, &s->kids[i], items[i], depth + 1) < 0) return -1;
    if (!keys && !attributes) return 0;
    PyObject *all = PyTuple_New(n + m), *key, *value;
    if (!all) return -1;
    s->object = all;
    for (Py_ssize_t i = 0; i < n; i++) PyTuple_SET_ITEM(all, i, Py_NewRef(keys ? PyTuple_GET_ITEM(keys, i) : Py_None));
    Py_ssize_t i = n;
    for (Py_ssize_t at = 0; attributes && PyDict_Next(attributes, &at, &key, &value) && i < n + m; i++) {
        PyTuple_SET_ITEM(all, i, Py_NewRef(key));
        if (thx_describe(d, &s->kids[i], value, depth + 1) < 0) return -1;
    }
    return 0;
}

/* An OrderedDict keeps an order of its own, which only iteration tells. */
static int describe_dict(thx_describer *d, thx_spec *s, PyObject *o, PyObject *attributes, int depth) {
    PyObject *list = PySequence_List(o), *keys = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    if (!keys || thx_refuse_hashed(d, o, keys) < 0) return Py_XDECREF(keys), -1;
    Py_ssize_t n = PyTuple_GET_SIZE(keys);
    PyObject **values = PyMem_Malloc(sizeof *values * (size_t)(n + 1));
    int rc = values ? 0 : (PyErr_NoMemory(), -1);
    for (Py_ssize_t i = 0; i < n && rc == 0; i++) {
        values[i] = PyDict_GetItemWithError(o, PyTuple_GET_ITEM(keys, i));
        if (!values[i]) {
            PyErr_SetString(PyExc_RuntimeError, "a dictionary without the keys that it iterates over");
            rc = -1;
        }
    }
    rc = rc == 0 ? describe_kids(d, s, values, n, keys, attributes, depth) : rc;
    PyMem_Free(values);
    Py_DECREF(keys);
    return rc;
}

static int describe_slice(thx_describer *d, thx_spec *s, PyObject *o, int depth) {
    PySliceObject *slice = (PySliceObject *)o;
    PyObject *parts[] = {slice->start, slice->stop, slice->step};
    s->kind = THX_S_SLICE;
    return describe_kids(d, s, parts, 3, NULL, NULL, depth);
}

static int describe_deque(thx_describer *d, thx_spec *s, PyObject *o, int depth) {
    PyObject *items = PySequence_Tuple(o);
    s->kind = THX_S_DEQUE;
    int rc = items ? describe_kids(d, s, PySequence_Fast_ITEMS(items), PyTuple_GET_SIZE(items), NULL, NULL, depth) : -1;
    s->object = rc == 0 ? PyObject_GetAttrString(o, "maxlen") : NULL;
    Py_XDECREF(items);
    return s->object ? 0 : -1;
}

static int describe_buffer(thx_spec *s, PyObject *o) {
    s->kind = THX_S_BUFFER;
    s->object = thx_copy_of(o);
    return s->object ? 0 : -1;
}

int thx_describe_const(thx_spec *s, PyObject *o, bool by_identity) {
    s->kind = THX_S_CONST;
    s->by_identity = by_identity;
    s->object = Py_NewRef(o);
    return 0;
}

static bool watched(const thx_describer *d, PyObject *o) { return d->r && d->guards && thx_guards_knows(d->guards, o); }

static int describe_object(thx_describer *d, thx_spec *s, PyObject *o, PyObject *attributes, int depth) {
    if (d->r && !thx_has_tensor_inside(d, o) && (s->members || thx_held_elsewhere(d, o)))
        return thx_describe_opaque_result(d, s, o);
    s->kind = THX_S_OBJECT;
    if (describe_kids(d, s, NULL, 0, NULL, attributes, depth) < 0) return -1;
    if (!d->r && !thx_spec_has_tensor(s)) /* passed on as it is */
        s->original = Py_NewRef(o);
    return 0;
}

/* ---- describe: the walk ---- */

/* A container met again: 1 described as such, 0 first time, -1 error. */
static int describe_seen(thx_describer *d, thx_spec *s, PyObject *o) {
    PyObject *id = PyLong_FromVoidPtr(o), *path = NULL, *first = NULL;
    int rc = id ? 0 : -1;
    if (rc == 0 && d->inputs && (path = PyDict_GetItemWithError(d->inputs, id))) {
        s->kind = THX_S_INPUT;
        s->object = Py_NewRef(path);
        rc = 1;
    } else if (rc == 0 && PyTuple_Check(o)) {
        rc = 0; /* which of two equal tuples it is makes no difference */
    } else if (rc == 0 && (first = PyDict_GetItemWithError(d->seen, id))) {
        thx_spec *spec = PyLong_AsVoidPtr(first);
        if (!spec->memo && d->nshared < THX_MAX_SHARED) spec->memo = ++d->nshared;
        if (spec->memo) {
            s->kind = THX_S_SAME;
            s->leaf = spec->memo - 1;
            rc = 1;
        }
    } else if (rc == 0) {
        PyObject *address = PyLong_FromVoidPtr(s);
        rc = address ? PyDict_SetItem(d->seen, id, address) : -1;
        Py_XDECREF(address);
    }
    Py_XDECREF(id);
    return PyErr_Occurred() ? -1 : rc;
}

static int describe_container(thx_describer *d, thx_spec *s, PyObject *o, int depth) {
    PyTypeObject *t = Py_TYPE(o);
    if (watched(d, o)) return thx_describe_const(s, o, true); /* the module's own */
    if (t == &PyTuple_Type || PyTuple_Check(o)) {
        s->kind = t == &PyTuple_Type ? THX_S_TUPLE : THX_S_NAMED;
        return describe_kids(d, s, PySequence_Fast_ITEMS(o), PyTuple_GET_SIZE(o), NULL, NULL, depth);
    }
    if (t == &PyList_Type) {
        s->kind = THX_S_LIST;
        return describe_kids(d, s, PySequence_Fast_ITEMS(o), PyList_GET_SIZE(o), NULL, NULL, depth);
    }
    if (t == &PyDict_Type) {
        s->kind = THX_S_DICT;
        return describe_dict(d, s, o, NULL, depth);
    }
    uint32_t members = thx_count_members(t);
    s->members = members > 0;
    PyObject *attributes = thx_attributes(o, s->members);
    int rc;
    if (PyDict_Check(o)) {
        s->kind = THX_S_DICT;
        rc = describe_dict(d, s, o, attributes, depth);
    } else if (PyList_Check(o)) {
        s->kind = THX_S_LIST;
        rc = describe_kids(d, s, PySequence_Fast_ITEMS(o), PyList_GET_SIZE(o), NULL, attributes, depth);
    } else if (attributes && thx_plain_layout(t, members) && !t->tp_finalize) { /* the end of a copy would be seen */
        rc = describe_object(d, s, o, attributes, depth);
    } else {
        rc = d->r ? thx_describe_opaque_result(d, s, o) : thx_describe_const(s, o, !valued(o));
    }
    Py_XDECREF(attributes);
    return rc;
}

int thx_describe(thx_describer *d, thx_spec *s, PyObject *o, int depth) {
    thx *x = d->x;
    if (depth > THX_MAX_DEPTH) {
        PyErr_SetString(PyExc_ValueError, "arguments or results are nested more than 24 deep");
        return -1;
    }
    if (Py_TYPE(o) == x->number_type) { /* what is kept of it is its value in this call */
        PyObject *plain = PyNumber_Float(o);
        int rc = plain ? thx_describe(d, s, plain, depth) : -1;
        Py_XDECREF(plain);
        return rc;
    }
    if (Py_TYPE(o) == x->extent_type && d->r) return thx_describe_extent(s, o);
    s->type = (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(o));
    if (d->r && s->type == x->Size && thx_holds_extent(x, o)) {
        s->kind = THX_S_NAMED;
        return describe_kids(d, s, PySequence_Fast_ITEMS(o), PyTuple_GET_SIZE(o), NULL, NULL, depth);
    }
    if (thx_is_tensor(x, o)) return describe_tensor(d, s, o);
    if (PyAnySet_Check(o) && thx_refuse_hashed(d, o, o) < 0) return -1;
    if (thx_is_plain_value(x, o) && !PySet_Check(o)) return thx_describe_const(s, o, false);
    if (thx_is_opaque_value(x, o)) return d->r ? thx_describe_opaque_result(d, s, o) : thx_describe_const(s, o, true);
    if (PySlice_Check(o)) return describe_slice(d, s, o, depth);
    int seen = describe_seen(d, s, o);
    if (seen) return seen < 0 ? -1 : 0;
    if (Py_IS_TYPE(o, &PySet_Type)) {
        if (watched(d, o)) return thx_describe_const(s, o, true);
        s->kind = THX_S_CONST;
        s->object = PyFrozenSet_New(o);
        return s->object ? 0 : -1;
    }
    if (named(Py_TYPE(o), "collections.deque")) return describe_deque(d, s, o, depth);
    if (is_buffer(o) && !(d->r && thx_held_elsewhere(d, o))) return describe_buffer(s, o);
    return describe_container(d, s, o, depth);
}

int thx_specs_init(thx *x, thx_spec *specs, PyObject *const *objects, uint32_t count, thx_leaves *leaves) {
    thx_describer d = {.x = x, .leaves = leaves, .seen = PyDict_New()};
    int rc = d.seen ? 0 : -1;
    for (uint32_t i = 0; i < count && rc == 0; i++) rc = thx_describe(&d, &specs[i], objects[i], 0);
    Py_XDECREF(d.seen);
    return rc;
}

void thx_spec_settle(thx_spec *s) {
    Py_CLEAR(s->original);
    for (uint32_t i = 0; i < s->nkids; i++) thx_spec_settle(&s->kids[i]);
}

void thx_spec_fini(thx_spec *s) {
    for (uint32_t i = 0; i < s->nkids; i++) thx_spec_fini(&s->kids[i]);
    PyMem_Free(s->kids);
    PyMem_Free(s->dims);
    PyMem_Free(s->dense);
    Py_XDECREF((PyObject *)s->type);
    Py_XDECREF(s->object);
    Py_XDECREF(s->original);
    memset(s, 0, sizeof *s);
}

bool thx_spec_has_tensor(const thx_spec *s) {
    if (s->kind == THX_S_TENSOR) return true;
    for (uint32_t i = 0; i < s->nkids; i++)
        if (thx_spec_has_tensor(&s->kids[i])) return true;
    return false;
}

int thx_spec_identities(const thx_spec *s, PyObject *list) {
    if (s->kind == THX_S_CONST && s->by_identity) return PyList_Append(list, s->object);
    bool patched = s->kind != THX_S_TENSOR && s->type && s->type->tp_flags & Py_TPFLAGS_HEAPTYPE; /* or may be */
    if (patched && PyList_Append(list, (PyObject *)s->type) < 0) return -1;
    for (uint32_t i = 0; i < s->nkids; i++)
        if (thx_spec_identities(&s->kids[i], list) < 0) return -1;
    return 0;
}

int thx_spec_traverse(const thx_spec *s, visitproc visit, void *arg) {
    Py_VISIT(s->type);
    Py_VISIT(s->object);
    Py_VISIT(s->original);
    for (uint32_t i = 0; i < s->nkids; i++) {
        int rc = thx_spec_traverse(&s->kids[i], visit, arg);
        if (rc) return rc;
    }
    return 0;
}

/* ---- match ---- */

/* Where some sizes are free: the others are the same, and strides are laid out alike. */
static bool same_layout(const thx_spec *s, const int64_t *sizes, const int64_t *strides) {
    int64_t spans = 1;
    for (int64_t i = 0; i < s->ndim; i++)
        if (s->free >> i & 1 ? sizes[i] < 2 : sizes[i] != s->dims[i]) return false;
    for (int64_t i = 0; i < s->ndim; i++) {
        uint8_t d = s->dense[i];
        if (strides[d] != (s->dense[s->ndim + i] ? spans : s->dims[s->ndim + d])) return false;
        spans = strides[d] * sizes[d];
    }
    return true;
}

static bool same_dims(const thx_spec *s, const int64_t *sizes, const int64_t *strides) {
    if (s->free) return same_layout(s, sizes, strides);
    for (int64_t i = 0; i < s->ndim; i++)
        if (sizes[i] != s->dims[i] || strides[i] != s->dims[s->ndim + i]) return false;
    return true;
}

static int match_tensor(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    if (s->repeated) return s->leaf < leaves->count && leaves->items[s->leaf] == o;
    if (leaves->count <= 24 && find(leaves, o) >= 0) return 0; /* one tensor in two places, where they were two */
    if (!s->dims || thx_is_lazy(&x->abi, o) != s->lazy) return 0;
    if (x->abi.on) {
        const thx_abi *abi = &x->abi;
        th_h h = thx_borrow(abi, o);
        int64_t ndim, *sizes, *strides;
        int32_t dtype, device_type, device_index;
        if (abi->aoti_torch_get_dim(h, &ndim) || ndim != s->ndim || abi->aoti_torch_get_dtype(h, &dtype) ||
            dtype != s->dtype || abi->aoti_torch_get_device_type(h, &device_type) || device_type != s->device_type ||
            abi->aoti_torch_get_device_index(h, &device_index) || device_index != s->device_index ||
            abi->aoti_torch_get_sizes(h, &sizes) || abi->aoti_torch_get_strides(h, &strides) ||
            !same_dims(s, sizes, strides))
            return 0;
        if (thx_needs_grad(x, o) != s->requires_grad) return 0;
    } else {
        thx_meta m;
        if (thx_read_meta(x, o, false, &m) < 0) return PyErr_Clear(), 0;
        if (m.ndim != s->ndim || (int32_t)m.dtype != s->dtype || (int32_t)m.device != s->device_type ||
            m.requires_grad != s->requires_grad || !same_dims(s, m.shape, m.stride))
            return 0;
    }
    return push(leaves, o) < 0 ? -1 : 1;
}

static int match_const(const thx_spec *s, PyObject *o) {
    if (o == s->object) return 1;
    if (s->by_identity) return 0;
    if (PyType_IsSubtype(s->type, &PyFloat_Type)) { /* by bits: 0.0 is not -0.0, nan is nan */
        double a = PyFloat_AS_DOUBLE(o), b = PyFloat_AS_DOUBLE(s->object);
        return memcmp(&a, &b, sizeof a) == 0;
    }
    if (s->type == &PyComplex_Type) {
        Py_complex a = PyComplex_AsCComplex(o), b = PyComplex_AsCComplex(s->object);
        return memcmp(&a, &b, sizeof a) == 0;
    }
    return PyObject_RichCompareBool(o, s->object, Py_EQ);
}

/* Same element type, sizes and bytes. Arrays that are not contiguous compare through a contiguous copy. */
static int match_buffer(const thx_spec *s, PyObject *o) {
    Py_buffer a, b;
    if (PyObject_GetBuffer(s->object, &a, PyBUF_FULL_RO) < 0) return PyErr_Clear(), 0;
    if (PyObject_GetBuffer(o, &b, PyBUF_FULL_RO) < 0) {
        PyErr_Clear();
        PyBuffer_Release(&a);
        return 0;
    }
    bool same = a.len == b.len && a.ndim == b.ndim && strcmp(a.format, b.format) == 0 && !strchr(a.format, 'O');
    for (int i = 0; i < a.ndim && same; i++) same = a.shape[i] == b.shape[i];
    char *bytes = same ? PyMem_Malloc((size_t)(2 * a.len + 1)) : NULL;
    int rc = !same ? 0 : !bytes ? (PyErr_NoMemory(), -1) : 1;
    if (rc == 1 &&
        (PyBuffer_ToContiguous(bytes, &a, a.len, 'C') < 0 || PyBuffer_ToContiguous(bytes + a.len, &b, a.len, 'C') < 0))
        rc = -1;
    if (rc == 1) rc = memcmp(bytes, bytes + a.len, (size_t)a.len) == 0;
    PyMem_Free(bytes);
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    return rc;
}

static bool same_key(const thx *x, PyObject *key, PyObject *want) {
    if (key == want) return true;
    bool plain = Py_TYPE(key) == Py_TYPE(want) && !Py_IS_TYPE(key, x->Tensor); /* found by its address */
    int same = plain ? PyObject_RichCompareBool(key, want, Py_EQ) : 0;
    if (same < 0) PyErr_Clear(); /* of tensors in a tuple */
    return same == 1;
}

static int match_attributes(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    PyObject *attributes = thx_attributes(o, s->members), *key, *value;
    if (!attributes) return s->nkids == s->nitems;
    int same = (uint32_t)PyDict_GET_SIZE(attributes) == s->nkids - s->nitems;
    Py_ssize_t at = 0;
    for (uint32_t i = s->nitems; same == 1 && i < s->nkids && PyDict_Next(attributes, &at, &key, &value); i++)
        same = same_key(x, key, PyTuple_GET_ITEM(s->object, i)) ? thx_spec_match(x, &s->kids[i], value, leaves) : 0;
    Py_DECREF(attributes);
    return same;
}

static int match_ordered(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    PyObject *iterator = PyObject_GetIter(o), *key;
    int same = iterator ? 1 : -1;
    for (uint32_t i = 0; same == 1 && i < s->nitems; i++) {
        key = PyIter_Next(iterator);
        PyObject *value =
            key && same_key(x, key, PyTuple_GET_ITEM(s->object, i)) ? PyDict_GetItemWithError(o, key) : NULL;
        same = value ? thx_spec_match(x, &s->kids[i], value, leaves) : PyErr_Occurred() ? -1 : 0;
        Py_XDECREF(key);
    }
    Py_XDECREF(iterator);
    return same;
}

static int match_items(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    if ((uint32_t)PyDict_GET_SIZE(o) != s->nitems) return 0;
    if (PyODict_Check(o)) return match_ordered(x, s, o, leaves);
    PyObject *key, *value;
    Py_ssize_t at = 0;
    int same = 1;
    for (uint32_t i = 0; same == 1 && i < s->nitems && PyDict_Next(o, &at, &key, &value); i++)
        same = same_key(x, key, PyTuple_GET_ITEM(s->object, i)) ? thx_spec_match(x, &s->kids[i], value, leaves) : 0;
    return same;
}

static int match_sequence(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    if ((uint32_t)PySequence_Fast_GET_SIZE(o) != s->nitems) return 0;
    int same = 1;
    for (uint32_t i = 0; i < s->nitems && same == 1; i++)
        same = thx_spec_match(x, &s->kids[i], PySequence_Fast_ITEMS(o)[i], leaves);
    return same;
}

static int match_parts(thx *x, const thx_spec *s, PyObject *const *parts, uint32_t n, thx_leaves *leaves) {
    int same = n == s->nitems;
    for (uint32_t i = 0; i < n && same == 1; i++) same = thx_spec_match(x, &s->kids[i], parts[i], leaves);
    return same;
}

static int match_deque(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    PyObject *maxlen = PyObject_GetAttrString(o, "maxlen"), *items = maxlen ? PySequence_Tuple(o) : NULL;
    int same = !items ? -1 : PyObject_RichCompareBool(maxlen, s->object, Py_EQ);
    if (same == 1) same = match_parts(x, s, PySequence_Fast_ITEMS(items), (uint32_t)PyTuple_GET_SIZE(items), leaves);
    Py_XDECREF(maxlen);
    Py_XDECREF(items);
    return same;
}

int thx_spec_match(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    if (Py_TYPE(o) != s->type) return 0;
    if (s->memo) leaves->shared[s->memo - 1] = o;
    int same = 1;
    switch ((thx_spec_kind)s->kind) {
    case THX_S_TENSOR: return match_tensor(x, s, o, leaves);
    case THX_S_CONST: return match_const(s, o);
    case THX_S_NUMBER: leaves->numbers[s->leaf] = o; return 1;
    case THX_S_TUPLE:
    case THX_S_NAMED: return match_sequence(x, s, o, leaves);
    case THX_S_LIST:
        same = match_sequence(x, s, o, leaves);
        return same == 1 && s->type != &PyList_Type ? match_attributes(x, s, o, leaves) : same;
    case THX_S_DICT:
        same = match_items(x, s, o, leaves);
        return same == 1 && s->type != &PyDict_Type ? match_attributes(x, s, o, leaves) : same;
    case THX_S_OBJECT: return match_attributes(x, s, o, leaves);
    case THX_S_SLICE: {
        PySliceObject *slice = (PySliceObject *)o;
        PyObject *parts[] = {slice->start, slice->stop, slice->step};
        return match_parts(x, s, parts, 3, leaves);
    }
    case THX_S_DEQUE: return match_deque(x, s, o, leaves);
    case THX_S_BUFFER: return match_buffer(s, o);
    case THX_S_SAME: return leaves->shared[s->leaf] == o;
    case THX_S_INPUT:
    case THX_S_EXTENT: break;
    }
    return 0;
}

/* ---- unchanged ---- */

bool thx_same_constant(PyObject *a, PyObject *b) {
    const thx_spec spec = {.kind = THX_S_CONST, .type = Py_TYPE(a), .object = a};
    PyTypeObject *t = Py_TYPE(a);
    bool plain = t == &PyBool_Type || t == &PyLong_Type || t == &PyFloat_Type || t == &PyComplex_Type ||
                 t == &PyUnicode_Type || t == &PyBytes_Type;
    return plain && t == Py_TYPE(b) && match_const(&spec, b) == 1;
}

bool thx_spec_buffer_in(const thx_spec *s, PyObject *o, const thx_memory *memory) {
    bool found = s->kind == THX_S_BUFFER && thx_buffer_in(o, memory);
    for (uint32_t i = 0; i < s->nkids && !found; i++) {
        PyObject *kid = thx_spec_part(s, o, i);
        found = kid && thx_spec_buffer_in(&s->kids[i], kid, memory);
        PyErr_Clear();
        Py_XDECREF(kid);
    }
    return found;
}

bool thx_spec_buffers_unchanged(const thx_spec *s, PyObject *o) {
    if (s->kind == THX_S_BUFFER) return match_buffer(s, o) == 1;
    bool same = true;
    for (uint32_t i = 0; i < s->nkids && same; i++) {
        PyObject *kid = thx_spec_part(s, o, i);
        same = !kid || thx_spec_buffers_unchanged(&s->kids[i], kid);
        PyErr_Clear();
        Py_XDECREF(kid);
    }
    return same;
}
