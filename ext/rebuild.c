/* Rebuild a nested value from its spec. See structure.h. */
#include "describe.h"

#include "attributes.h"

PyObject *thx_copy_of(PyObject *o) {
    PyObject *module = PyImport_ImportModule("copy");
    PyObject *copy = module ? PyObject_CallMethod(module, "copy", "(O)", o) : NULL;
    Py_XDECREF(module);
    return copy;
}

/* ---- the parts of a value, as its spec sees them ---- */

PyObject *thx_spec_part(const thx_spec *s, PyObject *o, uint32_t i) {
    if (i >= s->nitems) {
        PyObject *attributes = thx_attributes(o, s->members);
        PyObject *value = attributes ? PyDict_GetItemWithError(attributes, PyTuple_GET_ITEM(s->object, i)) : NULL;
        Py_XINCREF(value);
        Py_XDECREF(attributes);
        if (!value && !PyErr_Occurred()) PyErr_SetString(PyExc_AttributeError, "an attribute of an argument is gone");
        return value;
    }
    if (s->kind == THX_S_DICT) {
        PyObject *value = PyDict_GetItemWithError(o, PyTuple_GET_ITEM(s->object, i));
        if (!value && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, PyTuple_GET_ITEM(s->object, i));
        return Py_XNewRef(value);
    }
    return PySequence_GetItem(o, i);
}

/* ---- build ---- */

typedef struct builder {
    thx *x;
    thx_leaf_fn leaf;
    void *user;
    PyObject **shared; /* borrowed */
    const thx_inputs *inputs;
} builder;

static PyObject *build(builder *b, const thx_spec *s);

static void note_shared(builder *b, const thx_spec *s, PyObject *o) { /* before the parts: they may refer to it */
    if (s->memo && o) b->shared[s->memo - 1] = o;
}

static PyObject *build_tuple(builder *b, const thx_spec *s) {
    PyObject *result = PyTuple_New(s->nitems);
    for (uint32_t i = 0; result && i < s->nitems; i++) {
        PyObject *item = build(b, &s->kids[i]);
        if (!item)
            Py_CLEAR(result);
        else
            PyTuple_SET_ITEM(result, i, item);
    }
    return result;
}

static PyObject *build_named(builder *b, const thx_spec *s) {
    PyObject *items = build_tuple(b, s), *result = NULL;
    if (items &&
        PyObject_HasAttr((PyObject *)s->type, b->x->n.fields)) { /* tuple.__new__(type, items): no user code runs */
        PyObject *args = PyTuple_Pack(1, items);
        result = args ? PyTuple_Type.tp_new(s->type, args, NULL) : NULL;
        Py_XDECREF(args);
    } else if (items) {
        result = PyObject_CallOneArg((PyObject *)s->type, items);
    }
    Py_XDECREF(items);
    return result;
}

static PyObject *build_slice(builder *b, const thx_spec *s) {
    PyObject *parts = build_tuple(b, s);
    PyObject *slice =
        parts ? PySlice_New(PyTuple_GET_ITEM(parts, 0), PyTuple_GET_ITEM(parts, 1), PyTuple_GET_ITEM(parts, 2)) : NULL;
    Py_XDECREF(parts);
    return slice;
}

static int build_attributes(builder *b, const thx_spec *s, PyObject *into) {
    if (s->nkids == s->nitems) return 0;
    PyObject *dict = thx_instance_dict(into);
    int rc = 0;
    for (uint32_t i = s->nitems; i < s->nkids && rc == 0; i++) {
        PyObject *item = build(b, &s->kids[i]);
        rc = item ? thx_set_attribute(into, s->members, dict, PyTuple_GET_ITEM(s->object, i), item) : -1;
        Py_XDECREF(item);
    }
    Py_XDECREF(dict);
    return rc;
}

static PyObject *build_list(builder *b, const thx_spec *s) {
    PyObject *list = s->type == &PyList_Type ? PyList_New(0) : thx_new_instance(s->type);
    note_shared(b, s, list);
    for (uint32_t i = 0; list && i < s->nitems; i++) {
        PyObject *item = build(b, &s->kids[i]);
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    if (list && build_attributes(b, s, list) < 0) Py_CLEAR(list);
    return list;
}

static PyObject *build_deque(builder *b, const thx_spec *s) {
    PyObject *empty = PyTuple_New(0), *deque = NULL;
    if (empty) deque = PyObject_CallFunctionObjArgs((PyObject *)s->type, empty, s->object, NULL);
    Py_XDECREF(empty);
    note_shared(b, s, deque);
    PyObject *items = deque ? build_tuple(b, s) : NULL;
    PyObject *done = items ? PyObject_CallMethod(deque, "extend", "(O)", items) : NULL;
    Py_XDECREF(items);
    Py_XDECREF(done);
    if (!done) Py_CLEAR(deque);
    return deque;
}

static PyObject *build_dict(builder *b, const thx_spec *s) {
    PyObject *dict = s->type == &PyDict_Type ? PyDict_New() : thx_new_instance(s->type);
    note_shared(b, s, dict);
    for (uint32_t i = 0; dict && i < s->nitems; i++) {
        PyObject *item = build(b, &s->kids[i]), *key = PyTuple_GET_ITEM(s->object, i);
        if (!item || (PyODict_Check(dict) ? PyODict_SetItem(dict, key, item) : PyDict_SetItem(dict, key, item)) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(item);
    }
    if (dict && build_attributes(b, s, dict) < 0) Py_CLEAR(dict);
    return dict;
}

static PyObject *build_object(builder *b, const thx_spec *s) {
    if (s->original) return Py_NewRef(s->original);
    PyObject *o = thx_new_instance(s->type);
    note_shared(b, s, o);
    if (o && build_attributes(b, s, o) < 0) Py_CLEAR(o);
    return o;
}

PyObject *thx_argument_at(const thx_inputs *inputs, PyObject *path) {
    uint32_t at = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(path, 0));
    const thx_spec *spec = &inputs->specs[at];
    PyObject *o = Py_NewRef(inputs->objects[at]);
    for (Py_ssize_t i = 1; o && i < PyTuple_GET_SIZE(path); i++) {
        at = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(path, i));
        PyObject *next = thx_spec_part(spec, o, at);
        spec = &spec->kids[at];
        Py_SETREF(o, next);
    }
    return o;
}

static PyObject *build_plain(builder *b, const thx_spec *s) {
    switch ((thx_spec_kind)s->kind) {
    case THX_S_TENSOR: return b->leaf(b->user, s->leaf);
    case THX_S_NUMBER: break; /* of matched arguments, which are not built */
    case THX_S_CONST:
        if (s->number && b->x->following)
            return PyObject_CallMethod(b->x->following, "argument", "OI", s->object, (unsigned)s->number - 1);
        if (s->number && b->x->tape) return PyObject_CallMethod(b->x->tape, "argument", "O", s->object);
        return s->type == &PySet_Type && !s->by_identity ? PySet_New(s->object) : Py_NewRef(s->object);
    case THX_S_TUPLE: return build_tuple(b, s);
    case THX_S_NAMED: return build_named(b, s);
    case THX_S_SLICE: return build_slice(b, s);
    case THX_S_LIST: return build_list(b, s);
    case THX_S_DEQUE: return build_deque(b, s);
    case THX_S_DICT: return build_dict(b, s);
    case THX_S_OBJECT: return build_object(b, s);
    case THX_S_BUFFER: return thx_copy_of(s->object);
    case THX_S_SAME: return Py_NewRef(b->shared[s->leaf]);
    case THX_S_INPUT: return thx_argument_at(b->inputs, s->object);
    case THX_S_EXTENT: return b->leaf(b->user, THX_EXTENT_LEAF | s->leaf);
    }
    return thx_raise(b->x, TH_EINTERNAL);
}

static PyObject *build(builder *b, const thx_spec *s) {
    PyObject *o = build_plain(b, s);
    note_shared(b, s, o);
    return o;
}

PyObject *thx_spec_build(thx *x, const thx_spec *s, thx_leaf_fn leaf, void *user, PyObject **shared) {
    builder b = {x, leaf, user, shared, NULL};
    return build(&b, s);
}

PyObject *thx_result_build(thx *x, const thx_spec *s, thx_leaf_fn leaf, void *user, const thx_inputs *inputs) {
    PyObject *shared[THX_MAX_SHARED];
    builder b = {x, leaf, user, shared, inputs};
    return build(&b, s);
}
