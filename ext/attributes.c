/* The attributes of an instance: its __dict__, and members of its type (__slots__, and fields of C types such as
 * defaultdict's factory). See attributes.h.
 */
#include "attributes.h"

#include <structmember.h>

PyObject *thx_instance_dict(PyObject *o) {
    PyObject *dict = PyObject_GetAttrString(o, "__dict__");
    if (!dict || !PyDict_Check(dict)) {
        PyErr_Clear();
        Py_CLEAR(dict);
    }
    return dict;
}

static bool is_member(PyObject *descriptor) { /* a writable object field */
    if (!Py_IS_TYPE(descriptor, &PyMemberDescr_Type)) return false;
    const PyMemberDef *def = ((PyMemberDescrObject *)descriptor)->d_member;
    return (def->type == T_OBJECT || def->type == T_OBJECT_EX) && !(def->flags & READONLY);
}

static PyObject *type_dict(PyObject *type) { /* new reference, or NULL */
#if PY_VERSION_HEX >= 0x030C0000
    return PyType_GetDict((PyTypeObject *)type);
#else
    return Py_XNewRef(((PyTypeObject *)type)->tp_dict);
#endif
}

/* Calls visit for each member of the type and its bases; stops when it answers non-zero. */
typedef int (*member_fn)(void *user, PyObject *name, PyObject *descriptor);
static int each_member(PyTypeObject *type, member_fn visit, void *user) {
    PyObject *mro = type->tp_mro, *name, *descriptor;
    int rc = 0;
    for (Py_ssize_t i = 0; mro && i < PyTuple_GET_SIZE(mro) && !rc; i++) {
        PyObject *dict = type_dict(PyTuple_GET_ITEM(mro, i));
        for (Py_ssize_t at = 0; dict && !rc && PyDict_Next(dict, &at, &name, &descriptor);)
            if (is_member(descriptor)) rc = visit(user, name, descriptor);
        Py_XDECREF(dict);
    }
    return rc;
}

static int count_member(void *user, PyObject *name, PyObject *descriptor) {
    (void)name, (void)descriptor;
    ++*(uint32_t *)user;
    return 0;
}

uint32_t thx_count_members(PyTypeObject *type) {
    uint32_t count = 0;
    (void)each_member(type, count_member, &count);
    return count;
}

typedef struct read_members {
    PyObject *object, *into;
} read_members;

static int read_member(void *user, PyObject *name, PyObject *descriptor) {
    read_members *r = user;
    PyObject *value = Py_TYPE(descriptor)->tp_descr_get(descriptor, r->object, (PyObject *)Py_TYPE(r->object));
    if (!value) { /* an empty slot */
        PyErr_Clear();
        return 0;
    }
    int rc = PyDict_SetItem(r->into, name, value);
    Py_DECREF(value);
    return rc;
}

PyObject *thx_attributes(PyObject *o, bool members) {
    PyObject *dict = thx_instance_dict(o);
    if (!members) return dict;
    PyObject *all = dict ? PyDict_Copy(dict) : PyDict_New();
    Py_XDECREF(dict);
    read_members r = {o, all};
    if (!all || each_member(Py_TYPE(o), read_member, &r)) {
        PyErr_Clear();
        Py_CLEAR(all);
    }
    return all;
}

typedef struct write_members {
    PyObject *object, *name, *value;
} write_members;

static int write_member(void *user, PyObject *name, PyObject *descriptor) {
    write_members *w = user;
    if (PyUnicode_Compare(name, w->name) != 0) return 0;
    return Py_TYPE(descriptor)->tp_descr_set(descriptor, w->object, w->value) < 0 ? -1 : 1;
}

bool thx_plain_layout(PyTypeObject *t, uint32_t members) {
    size_t size = sizeof(PyObject) + members * sizeof(PyObject *);
#ifdef Py_TPFLAGS_MANAGED_DICT
    if (t->tp_dictoffset && !(t->tp_flags & Py_TPFLAGS_MANAGED_DICT)) size += sizeof(PyObject *);
#else
    if (t->tp_dictoffset) size += sizeof(PyObject *);
#endif
#ifdef Py_TPFLAGS_MANAGED_WEAKREF
    if (t->tp_weaklistoffset && !(t->tp_flags & Py_TPFLAGS_MANAGED_WEAKREF)) size += sizeof(PyObject *);
#else
    if (t->tp_weaklistoffset) size += sizeof(PyObject *);
#endif
    return (size_t)t->tp_basicsize <= size && !t->tp_itemsize;
}

PyObject *thx_new_instance(PyTypeObject *type) {
    PyObject *mro = type->tp_mro;
    for (Py_ssize_t i = 0; mro && i < PyTuple_GET_SIZE(mro); i++) {
        PyObject *dict = type_dict(PyTuple_GET_ITEM(mro, i)),
                 *make = dict ? PyDict_GetItemString(dict, "__new__") : NULL;
        PyObject *o = make && PyCFunction_Check(make) ? PyObject_CallOneArg(make, (PyObject *)type) : NULL;
        Py_XDECREF(dict);
        if (o || PyErr_Occurred()) return o;
    }
    return PyErr_Format(PyExc_TypeError, "cannot rebuild an object of type %.100s", type->tp_name);
}

int thx_set_attribute(PyObject *o, bool members, PyObject *dict, PyObject *name, PyObject *value) {
    write_members w = {o, name, value};
    int done = members ? each_member(Py_TYPE(o), write_member, &w) : 0;
    if (done) return done < 0 ? -1 : 0;
    if (dict) return PyDict_SetItem(dict, name, value);
    PyErr_Format(PyExc_TypeError, "cannot rebuild an object of type %.100s", Py_TYPE(o)->tp_name);
    return -1;
}
