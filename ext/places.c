/* Numbers that a callable reads of its surroundings (attributes, entries of dictionaries, globals, variables of
 * enclosing functions) and that change from call to call: they are followed like arguments. See numbers.c and sizes.c.
 */
#include "callable.h"

static int add_place(thx_entry *e, PyObject *owner, PyObject *key, PyObject *before) {
    for (uint32_t i = 0; i < e->nplaces; i++)
        if (e->places[i].owner == owner && PyObject_RichCompareBool(e->places[i].key, key, Py_EQ) == 1) return 0;
    thx_place *places = PyMem_Realloc(e->places, sizeof *places * (e->nplaces + 1));
    if (!places) return PyErr_NoMemory(), -1;
    e->places = places;
    places[e->nplaces++] = (thx_place){Py_NewRef(owner), Py_NewRef(key), Py_NewRef(before), NULL, false};
    return 0;
}

void thx_places_free(thx_entry *e) {
    for (uint32_t i = 0; i < e->nplaces; i++) {
        Py_DECREF(e->places[i].owner);
        Py_DECREF(e->places[i].key);
        Py_DECREF(e->places[i].value);
        Py_XDECREF(e->places[i].followed);
    }
    PyMem_Free(e->places);
    e->places = NULL;
    e->nplaces = 0;
}

int thx_places_take(thx_entry *e, const thx_entry *like, PyObject *changed) {
    int rc = 0;
    for (uint32_t i = 0; i < like->nplaces && rc == 0; i++)
        if (like->places[i].any) rc = add_place(e, like->places[i].owner, like->places[i].key, like->places[i].value);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(changed) && rc == 0; i++) {
        PyObject *place = PyList_GET_ITEM(changed, i);
        rc = add_place(e, PyTuple_GET_ITEM(place, 0), PyTuple_GET_ITEM(place, 1), PyTuple_GET_ITEM(place, 2));
    }
    return rc;
}

int thx_places_put(const thx_entry *e, PyObject *tape, PyObject *sizes) {
    int rc = 0;
    for (uint32_t i = 0; i < e->nplaces && rc == 0; i++) {
        thx_place *p = &e->places[i];
        PyObject *now = thx_number_at(p->owner, p->key);
        PyObject *follows = now && PyFloat_Check(now) ? tape : sizes;
        p->followed =
            now && follows ? PyObject_CallMethod(follows, "argument", "OI", now, (unsigned)(e->nfloats + i)) : NULL;
        rc = p->followed ? thx_set_number_at(p->owner, p->key, p->followed) : PyErr_Occurred() ? -1 : 0;
    }
    return rc;
}

/* Where the code has written something else, that stays: it is found as a change. */
void thx_places_put_back(const thx_entry *e) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (uint32_t i = 0; i < e->nplaces; i++) {
        thx_place *p = &e->places[i];
        PyObject *number = p->followed;
        p->followed = NULL;
        if (!number || thx_number_at(p->owner, p->key) != number) {
            Py_XDECREF(number);
            continue;
        }
        PyObject *plain =
            PyFloat_Check(number) ? PyFloat_FromDouble(PyFloat_AS_DOUBLE(number)) : thx_extent_plain(number);
        if (plain) thx_set_number_at(p->owner, p->key, plain);
        Py_XDECREF(plain);
        Py_DECREF(number);
    }
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

int thx_places_keep(thx_entry *e) {
    int rc = 0;
    for (uint32_t i = 0; i < e->nplaces && rc == 0; i++) {
        thx_place *p = &e->places[i];
        PyObject *now = thx_number_at(p->owner, p->key);
        if (now) Py_SETREF(p->value, Py_NewRef(now));
        if (p->any) rc = thx_guards_free_number(e->guards, p->owner, p->key);
    }
    return rc;
}
