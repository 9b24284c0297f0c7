/* Which changes can matter: those of attributes and globals whose names occur in the code that ran, and of what is
 * reached through such names. Asked only where something has changed; thunder/_relevance.py reads the names.
 */
#include "guards_watch.h"

static PyObject *names_of(PyObject *codes) {
    PyObject *module = PyImport_ImportModule("thunder._relevance");
    PyObject *names = module ? PyObject_CallMethod(module, "names", "O", codes) : NULL;
    Py_XDECREF(module);
    PyErr_Clear();
    return names ? names : Py_NewRef(Py_None);
}

/* A set of names, or None: every name can matter. Borrowed. */
static PyObject *names(thx_guards *g) {
    if (!g->names) g->names = g->codes && !g->unnamed ? names_of(g->codes) : Py_NewRef(Py_None);
    return g->names;
}

bool thx_relevant_name(thx_guards *g, PyObject *name) {
    PyObject *known = names(g);
    int found = known == Py_None ? 1 : PySet_Contains(known, name);
    PyErr_Clear();
    return found != 0;
}

static bool watches(const thx_guards *g, PyObject *o) {
    for (uint32_t i = 0; i < g->cells.count; i++)
        if (g->cells.items[i].cell == o) return true;
    return thx_guards_knows(g, o);
}

bool thx_relevant_owner(thx *x, thx_guards *g, PyObject *owner) {
    thx_guards reached = {0};
    PyObject *known = names(g);
    if (known == Py_None || !g->roots) return true;
    bool relevant = thx_guards_collect(x, &reached, g->roots, known) < 0 || watches(&reached, owner);
    PyErr_Clear();
    thx_guards_clear(x, &reached);
    return relevant;
}
