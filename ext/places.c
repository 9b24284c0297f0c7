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
    places[e->nplaces++] = (thx_place){Py_NewRef(owner), Py_NewRef(key), Py_NewRef(before), NULL, NULL, NULL, false};
    return 0;
}

void thx_places_free(thx_entry *e) {
    for (uint32_t i = 0; i < e->nplaces; i++) {
        Py_DECREF(e->places[i].owner);
        Py_DECREF(e->places[i].key);
        Py_DECREF(e->places[i].value);
        Py_XDECREF(e->places[i].followed);
        Py_XDECREF(e->places[i].before);
        Py_XDECREF(e->places[i].rewritten);
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

/* What stands in the place of a number during the capture. A float where only sizes are followed is one that no
 * operation takes: another object of the same value, so that it shows whether the code writes there. */
static PyObject *stand_in(PyObject *follows, PyObject *now, unsigned number) {
    if (follows) return PyObject_CallMethod(follows, "argument", "OI", now, number);
    return PyFloat_CheckExact(now) ? PyFloat_FromDouble(PyFloat_AS_DOUBLE(now)) : NULL;
}

int thx_places_put(const thx_entry *e, PyObject *tape, PyObject *sizes) {
    int rc = 0;
    for (uint32_t i = 0; i < e->nplaces && rc == 0; i++) {
        thx_place *p = &e->places[i];
        PyObject *now = thx_number_at(p->owner, p->key);
        p->before = Py_XNewRef(now);
        PyObject *follows = now && PyFloat_Check(now) ? tape : sizes;
        p->followed = now ? stand_in(follows, now, e->nfloats + i) : NULL;
        rc = p->followed ? thx_set_number_at(p->owner, p->key, p->followed) : PyErr_Occurred() ? -1 : 0;
    }
    return rc;
}

/* The code wrote the very number that stood there, which would not be found as a change: for other numbers it is one.
 */
static bool is_rewritten(const thx_place *p, PyObject *now) {
    return now && Py_TYPE(now) == Py_TYPE(p->before) && PyObject_RichCompareBool(p->before, now, Py_EQ) == 1;
}

/* Where the code has written something else, that stays: it is found as a change. */
void thx_places_put_back(const thx_entry *e) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (uint32_t i = 0; i < e->nplaces; i++) {
        thx_place *p = &e->places[i];
        PyObject *number = p->followed;
        PyObject *now = thx_number_at(p->owner, p->key), *before = p->before;
        if (number && now != number && is_rewritten(p, now)) p->rewritten = Py_NewRef(now);
        p->followed = p->before = NULL;
        if (!number || now != number) {
            Py_XDECREF(number);
            Py_XDECREF(before);
            continue;
        }
        if (before) thx_set_number_at(p->owner, p->key, before);
        Py_XDECREF(before);
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
