/* Describe, match and rebuild nested Python values. See structure.h. */
#include "structure.h"
#include "capture.h"

#include <string.h>

enum { MAX_DEPTH = 24 };

void thx_leaves_init(thx_leaves *l) {
    l->items = l->fixed;
    l->count = 0;
    l->cap = sizeof l->fixed / sizeof *l->fixed;
}

void thx_leaves_fini(thx_leaves *l) {
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

/* ---- describe ---- */

static int describe(thx *x, thx_spec *s, PyObject *o, bool meta, thx_leaves *leaves, int depth);

static int describe_tensor(thx *x, thx_spec *s, PyObject *o, bool with_meta, thx_leaves *leaves) {
    s->kind = THX_S_TENSOR;
    int64_t seen = find(leaves, o);
    s->repeated = seen >= 0;
    s->leaf = seen >= 0 ? (uint32_t)seen : leaves->count;
    if (seen < 0 && push(leaves, o) < 0) return -1;
    if (!with_meta || s->repeated) return 0;
    PyObject *layout = PyObject_GetAttrString(o, "layout");
    Py_XDECREF(layout);
    if (!layout) return -1;
    if (layout != x->strided) return 0; /* refused with a clear message when it becomes an input of the trace */
    thx_meta m;
    if (thx_read_meta(x, o, false, &m) < 0) { /* a kind that is refused by name when it becomes an input of the trace */
        PyErr_Clear();
        return 0;
    }
    s->requires_grad = m.requires_grad;
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

static int describe_kids(thx *x, thx_spec *s, PyObject *const *items, Py_ssize_t n, bool meta, thx_leaves *leaves,
                         int depth) {
    s->kids = PyMem_Calloc((size_t)(n + 1), sizeof *s->kids);
    if (!s->kids) return PyErr_NoMemory(), -1;
    s->nkids = (uint32_t)n;
    for (Py_ssize_t i = 0; i < n; i++)
        if (describe(x, &s->kids[i], items[i], meta, leaves, depth + 1) < 0) return -1;
    return 0;
}

/* Is all of an object in its __dict__? Types with fields of their own (partial objects, slots) compare by identity. */
static bool only_dict(PyObject *o) {
    return Py_TYPE(o)->tp_basicsize <= (Py_ssize_t)(sizeof(PyObject) + 2 * sizeof(void *)) || PyDict_Check(o);
}

static PyObject *instance_dict(PyObject *o) { /* new reference or NULL without exception */
    PyObject *dict = PyObject_GetAttrString(o, "__dict__");
    if (!dict || !PyDict_Check(dict)) {
        PyErr_Clear();
        Py_CLEAR(dict);
    }
    return dict;
}

/* Items of `dict` (may be NULL), then attributes of `attrs` (may be NULL). */
static int describe_mapping(thx *x, thx_spec *s, PyObject *dict, PyObject *attrs, bool meta, thx_leaves *leaves,
                            int depth) {
    Py_ssize_t n = dict ? PyDict_GET_SIZE(dict) : 0, m = attrs ? PyDict_GET_SIZE(attrs) : 0, at = 0, i = 0;
    PyObject **values = PyMem_Malloc(sizeof *values * (size_t)(n + m + 1)), *keys = PyTuple_New(n + m), *key, *value;
    int rc = -1;
    if (values && keys) {
        while (dict && PyDict_Next(dict, &at, &key, &value) && i < n) {
            PyTuple_SET_ITEM(keys, i, Py_NewRef(key));
            values[i++] = value;
        }
        for (at = 0; attrs && PyDict_Next(attrs, &at, &key, &value) && i < n + m;) {
            PyTuple_SET_ITEM(keys, i, Py_NewRef(key));
            values[i++] = value;
        }
        s->nitems = (uint32_t)n;
        s->object = Py_NewRef(keys);
        rc = describe_kids(x, s, values, n + m, meta, leaves, depth);
    } else {
        PyErr_NoMemory();
    }
    Py_XDECREF(keys);
    PyMem_Free(values);
    return rc;
}

static bool plain_value(thx *x, PyObject *o) {
    PyTypeObject *t = Py_TYPE(o);
    return o == Py_None || PyLong_Check(o) || PyFloat_Check(o) || PyComplex_Check(o) || PyUnicode_Check(o) ||
           PyBytes_Check(o) || t == &PyRange_Type || t == &PySlice_Type || t == x->Size || t == x->Device ||
           t == &PyFrozenSet_Type || t == &PySet_Type || PyObject_TypeCheck(o, x->NumpyGeneric);
}

static bool opaque_value(thx *x, PyObject *o) { /* compared by identity, not looked into */
    return PyFunction_Check(o) || PyType_Check(o) || PyModule_Check(o) || PyMethod_Check(o) || PyCFunction_Check(o) ||
           PyObject_TypeCheck(o, x->NnModule) || Py_TYPE(o) == x->Dtype || PyGen_Check(o) || PyCoro_CheckExact(o);
}

typedef struct fake_search {
    thx *x;
    int depth;
} fake_search;

static int find_fake(PyObject *o, void *user) { /* a visitproc: 1 when found */
    fake_search *f = user;
    if (thx_is_fake(f->x, o)) return 1;
    if (f->depth > 3 || PyType_Check(o) || PyModule_Check(o) || PyFunction_Check(o) || !PyObject_IS_GC(o)) return 0;
    fake_search deeper = {f->x, f->depth + 1};
    return Py_TYPE(o)->tp_traverse(o, find_fake, &deeper);
}

/* Does an object that is compared by identity keep a tensor of the capture? */
static bool holds_fake(thx *x, PyObject *o) {
    fake_search f = {x, 0};
    return Py_TYPE(o)->tp_traverse && PyObject_IS_GC(o) && Py_TYPE(o)->tp_traverse(o, find_fake, &f) == 1;
}

static int describe(thx *x, thx_spec *s, PyObject *o, bool meta, thx_leaves *leaves, int depth) {
    if (depth > MAX_DEPTH) {
        PyErr_SetString(PyExc_ValueError, "arguments or results are nested more than 24 deep, or contain themselves");
        return -1;
    }
    PyTypeObject *t = Py_TYPE(o);
    s->type = (PyTypeObject *)Py_NewRef((PyObject *)t);
    if (thx_is_tensor(x, o)) return describe_tensor(x, s, o, meta, leaves);
    s->kind = THX_S_CONST;
    if (plain_value(x, o)) {
        s->object = PySet_Check(o) ? PyFrozenSet_New(o) : Py_NewRef(o);
        return s->object ? 0 : -1;
    }
    if (t == &PyTuple_Type || t == &PyList_Type) {
        s->kind = t == &PyTuple_Type ? THX_S_TUPLE : THX_S_LIST;
        return describe_kids(x, s, PySequence_Fast_ITEMS(o), PySequence_Fast_GET_SIZE(o), meta, leaves, depth);
    }
    if (PyTuple_Check(o)) {
        s->kind = THX_S_NAMED;
        return describe_kids(x, s, PySequence_Fast_ITEMS(o), PySequence_Fast_GET_SIZE(o), meta, leaves, depth);
    }
    PyObject *attrs = t == &PyDict_Type || opaque_value(x, o) || !only_dict(o) ? NULL : instance_dict(o);
    int rc = 0;
    if (PyDict_Check(o)) {
        s->kind = THX_S_DICT;
        rc = describe_mapping(x, s, o, attrs, meta, leaves, depth);
    } else if (attrs) {
        s->kind = THX_S_OBJECT;
        rc = describe_mapping(x, s, NULL, attrs, meta, leaves, depth);
        if (rc == 0 && !thx_spec_has_tensor(s) && !meta) { /* an output object without tensors: return it itself */
            thx_spec_fini(s);
            *s = (thx_spec){.kind = THX_S_CONST,
                            .by_identity = true,
                            .type = (PyTypeObject *)Py_NewRef((PyObject *)t),
                            .object = Py_NewRef(o)};
        } else if (rc == 0) { /* an object without tensors is passed on as it is; others are not kept alive */
            PyObject *pair = PyTuple_Pack(2, s->object, thx_spec_has_tensor(s) ? Py_None : o);
            if (!pair)
                rc = -1;
            else
                Py_SETREF(s->object, pair);
        }
    } else {
        s->by_identity = true;
        s->object = Py_NewRef(o);
        if (!meta && !opaque_value(x, o) && holds_fake(x, o)) {
            PyErr_Format(x->CaptureError,
                         "thunder cannot capture a function that returns tensors inside an object of type "
                         "%.100s, which it does not know how to build again. What to do: return them in tuples, lists, "
                         "dictionaries or dataclasses.",
                         t->tp_name);
            rc = -1;
        }
    }
    Py_XDECREF(attrs);
    return rc;
}

int thx_spec_init(thx *x, thx_spec *spec, PyObject *object, bool with_meta, thx_leaves *leaves) {
    memset(spec, 0, sizeof *spec);
    return describe(x, spec, object, with_meta, leaves, 0);
}

void thx_spec_fini(thx_spec *s) {
    for (uint32_t i = 0; i < s->nkids; i++) thx_spec_fini(&s->kids[i]);
    PyMem_Free(s->kids);
    PyMem_Free(s->dims);
    Py_XDECREF((PyObject *)s->type);
    Py_XDECREF(s->object);
    memset(s, 0, sizeof *s);
}

bool thx_spec_has_tensor(const thx_spec *s) {
    if (s->kind == THX_S_TENSOR) return true;
    for (uint32_t i = 0; i < s->nkids; i++)
        if (thx_spec_has_tensor(&s->kids[i])) return true;
    return false;
}

/* ---- match ---- */

static int match_tensor(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    if (s->repeated) return s->leaf < leaves->count && leaves->items[s->leaf] == o;
    if (leaves->count <= 24 && find(leaves, o) >= 0) return 0; /* one tensor in two places, where they were two */
    if (!s->dims) return 0;
    if (x->abi.on) {
        const thx_abi *abi = &x->abi;
        th_h h = thx_borrow(abi, o);
        int64_t ndim, *sizes, *strides;
        int32_t dtype, device_type, device_index;
        if (abi->aoti_torch_get_dim(h, &ndim) || ndim != s->ndim || abi->aoti_torch_get_dtype(h, &dtype) ||
            dtype != s->dtype || abi->aoti_torch_get_device_type(h, &device_type) || device_type != s->device_type ||
            abi->aoti_torch_get_device_index(h, &device_index) || device_index != s->device_index ||
            abi->aoti_torch_get_sizes(h, &sizes))
            return 0;
        for (int64_t i = 0; i < ndim; i++)
            if (sizes[i] != s->dims[i]) return 0;
        if (abi->aoti_torch_get_strides(h, &strides)) return 0;
        for (int64_t i = 0; i < ndim; i++)
            if (strides[i] != s->dims[ndim + i]) return 0;
        int grad = thx_requires_grad(abi, o);
        if (grad < 0) {
            PyObject *flag = x->requires_grad_get(o, x->requires_grad_closure);
            grad = flag == Py_True;
            Py_XDECREF(flag);
        }
        if (grad != s->requires_grad) return 0;
    } else {
        thx_meta m;
        if (thx_read_meta(x, o, false, &m) < 0) return PyErr_Clear(), 0;
        if (m.ndim != s->ndim || (int32_t)m.dtype != s->dtype || (int32_t)m.device != s->device_type ||
            m.requires_grad != s->requires_grad || memcmp(m.shape, s->dims, sizeof(int64_t) * (size_t)m.ndim) ||
            memcmp(m.stride, s->dims + m.ndim, sizeof(int64_t) * (size_t)m.ndim))
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

static int match_keys(thx *x, const thx_spec *s, PyObject *keys, uint32_t from, uint32_t count, PyObject *dict,
                      thx_leaves *leaves) {
    if ((uint32_t)PyDict_GET_SIZE(dict) != count) return 0;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (uint32_t i = from; i < from + count && PyDict_Next(dict, &at, &key, &value); i++) {
        PyObject *want = PyTuple_GET_ITEM(keys, i);
        int same = key == want ? 1 : PyObject_RichCompareBool(key, want, Py_EQ);
        if (same == 1) same = thx_spec_match(x, &s->kids[i], value, leaves);
        if (same != 1) return same;
    }
    return 1;
}

static PyObject *keys_of(const thx_spec *s) {
    return s->kind == THX_S_OBJECT ? PyTuple_GET_ITEM(s->object, 0) : s->object;
}

int thx_spec_match(thx *x, const thx_spec *s, PyObject *o, thx_leaves *leaves) {
    if (Py_TYPE(o) != s->type) return 0;
    int same = 1;
    PyObject *attrs;
    switch ((thx_spec_kind)s->kind) {
    case THX_S_TENSOR: return match_tensor(x, s, o, leaves);
    case THX_S_CONST: return match_const(s, o);
    case THX_S_TUPLE:
    case THX_S_LIST:
    case THX_S_NAMED:
        if ((uint32_t)PySequence_Fast_GET_SIZE(o) != s->nkids) return 0;
        for (uint32_t i = 0; i < s->nkids && same == 1; i++)
            same = thx_spec_match(x, &s->kids[i], PySequence_Fast_ITEMS(o)[i], leaves);
        return same;
    case THX_S_DICT:
        same = match_keys(x, s, s->object, 0, s->nitems, o, leaves);
        if (same != 1 || s->nitems == s->nkids) return same;
        __attribute__((fallthrough)); /* instance attributes of a dict subclass */
    case THX_S_OBJECT:
        attrs = instance_dict(o);
        if (!attrs) return 0;
        same = match_keys(x, s, keys_of(s), s->nitems, s->nkids - s->nitems, attrs, leaves);
        Py_DECREF(attrs);
        return same;
    }
    return 0;
}

/* ---- build ---- */

static PyObject *build_sequence(thx *x, const thx_spec *s, thx_leaf_fn leaf, void *user) {
    PyObject *result = s->kind == THX_S_LIST ? PyList_New(s->nkids) : PyTuple_New(s->nkids);
    for (uint32_t i = 0; result && i < s->nkids; i++) {
        PyObject *item = thx_spec_build(x, &s->kids[i], leaf, user);
        if (!item)
            Py_CLEAR(result);
        else if (s->kind == THX_S_LIST)
            PyList_SET_ITEM(result, i, item);
        else
            PyTuple_SET_ITEM(result, i, item);
    }
    if (!result || s->kind != THX_S_NAMED) return result;
    PyObject *named;
    if (PyObject_HasAttr((PyObject *)s->type, x->n.fields)) { /* tuple.__new__(type, items): no user code runs */
        PyObject *args = PyTuple_Pack(1, result);
        named = args ? PyTuple_Type.tp_new(s->type, args, NULL) : NULL;
        Py_XDECREF(args);
    } else {
        named = PyObject_CallOneArg((PyObject *)s->type, result);
    }
    Py_DECREF(result);
    return named;
}

static int build_items(thx *x, const thx_spec *s, PyObject *into, thx_leaf_fn leaf, void *user) {
    for (uint32_t i = 0; i < s->nitems; i++) {
        PyObject *item = thx_spec_build(x, &s->kids[i], leaf, user), *key = PyTuple_GET_ITEM(s->object, i);
        int rc = !item ? -1 : PyODict_Check(into) ? PyODict_SetItem(into, key, item) : PyDict_SetItem(into, key, item);
        Py_XDECREF(item);
        if (rc < 0) return -1;
    }
    return 0;
}

static int build_attributes(thx *x, const thx_spec *s, PyObject *into, thx_leaf_fn leaf, void *user) {
    PyObject *attrs = instance_dict(into), *keys = keys_of(s);
    if (!attrs) {
        PyErr_Format(PyExc_TypeError, "cannot rebuild an object of type %.100s", s->type->tp_name);
        return -1;
    }
    int rc = 0;
    for (uint32_t i = s->nitems; i < s->nkids && rc == 0; i++) {
        PyObject *item = thx_spec_build(x, &s->kids[i], leaf, user);
        rc = item ? PyDict_SetItem(attrs, PyTuple_GET_ITEM(keys, i), item) : -1;
        Py_XDECREF(item);
    }
    Py_DECREF(attrs);
    return rc;
}

static PyObject *new_instance(thx *x, PyTypeObject *type) {
    (void)x;
    PyObject *make = PyObject_GetAttrString((PyObject *)type, "__new__");
    PyObject *o = make ? PyObject_CallOneArg(make, (PyObject *)type) : NULL;
    Py_XDECREF(make);
    return o;
}

PyObject *thx_spec_build(thx *x, const thx_spec *s, thx_leaf_fn leaf, void *user) {
    PyObject *o = NULL;
    switch ((thx_spec_kind)s->kind) {
    case THX_S_TENSOR: return leaf(user, s->leaf);
    case THX_S_CONST: return s->type == &PySet_Type ? PySet_New(s->object) : Py_NewRef(s->object);
    case THX_S_TUPLE:
    case THX_S_LIST:
    case THX_S_NAMED: return build_sequence(x, s, leaf, user);
    case THX_S_DICT:
        o = s->type == &PyDict_Type ? PyDict_New() : new_instance(x, s->type);
        if (!o || build_items(x, s, o, leaf, user) < 0 ||
            (s->nitems < s->nkids && build_attributes(x, s, o, leaf, user) < 0))
            Py_CLEAR(o);
        return o;
    case THX_S_OBJECT:
        if (!thx_spec_has_tensor(s)) return Py_NewRef(PyTuple_GET_ITEM(s->object, 1));
        o = new_instance(x, s->type);
        if (!o || build_attributes(x, s, o, leaf, user) < 0) Py_CLEAR(o);
        return o;
    }
    return thx_raise(x, TH_EINTERNAL);
}

/* ---- unchanged ---- */

static bool same_leaf(struct thx_recorder *r, uint32_t leaf, PyObject *fake) {
    for (uint32_t i = 0; i < r->nroots; i++)
        if (r->roots[i].leaf == (int32_t)leaf) return thx_recorder_fake(r, r->roots[i].real) == fake;
    return false;
}

static bool unchanged_keys(thx *x, const thx_spec *s, uint32_t from, uint32_t count, PyObject *dict, thx_leaves *seen,
                           struct thx_recorder *r) {
    if ((uint32_t)PyDict_GET_SIZE(dict) != count) return false;
    for (uint32_t i = from; i < from + count; i++) {
        PyObject *value = PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(keys_of(s), i));
        if (!value || !thx_spec_unchanged(x, &s->kids[i], value, seen, r)) return false;
    }
    return true;
}

bool thx_spec_unchanged(thx *x, const thx_spec *s, PyObject *o, thx_leaves *seen, struct thx_recorder *r) {
    bool same = true;
    switch ((thx_spec_kind)s->kind) {
    case THX_S_TENSOR: return same_leaf(r, s->leaf, o);
    case THX_S_CONST: return Py_TYPE(o) == s->type && match_const(s, o) == 1;
    case THX_S_TUPLE:
    case THX_S_LIST:
    case THX_S_NAMED:
        if (Py_TYPE(o) != s->type || (uint32_t)PySequence_Fast_GET_SIZE(o) != s->nkids) return false;
        for (uint32_t i = 0; i < s->nkids && same; i++)
            same = thx_spec_unchanged(x, &s->kids[i], PySequence_Fast_ITEMS(o)[i], seen, r);
        return same;
    case THX_S_DICT:
        if (!PyDict_Check(o) || !unchanged_keys(x, s, 0, s->nitems, o, seen, r)) return false;
        if (s->nitems == s->nkids) return true;
        __attribute__((fallthrough)); /* attributes */
    case THX_S_OBJECT: {
        PyObject *attrs = instance_dict(o);
        same = attrs && unchanged_keys(x, s, s->nitems, s->nkids - s->nitems, attrs, seen, r);
        Py_XDECREF(attrs);
        return same;
    }
    }
    return false;
}
