/* After a capture: everything that is watched goes back to what it was, and who asks is told what had changed. */
#include "guards_watch.h"

/* Put back with the exception that may be pending left in place. */
typedef struct pending {
    PyObject *type, *value, *trace;
} pending;
static pending hold_error(void) {
    pending p;
    PyErr_Fetch(&p.type, &p.value, &p.trace);
    return p;
}
static void release_error(pending p) {
    PyErr_Clear();
    PyErr_Restore(p.type, p.value, p.trace);
}

/* The dictionary as it was. */
static PyObject *dict_before(const watch_dict *w) {
    PyObject *before = PyDict_New();
    for (Py_ssize_t i = 0; before && i < w->count; i++)
        if (PyDict_SetItem(before, w->items[2 * i], w->items[2 * i + 1]) < 0) Py_CLEAR(before);
    return before;
}

static int tell_changes(PyObject *dict, PyObject *before, thx_change_fn changed, void *user) {
    PyObject *key, *now, *old;
    PyObject *after = PyDict_Copy(dict);
    if (!after) return -1;
    int rc = 0;
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(after, &at, &key, &now);) {
        old = PyDict_GetItemWithError(before, key);
        if (old != now && !(old && thx_same_value(old, now))) rc = changed(user, dict, key, old, now);
    }
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(before, &at, &key, &old);)
        if (!PyDict_GetItemWithError(after, key)) rc = changed(user, dict, key, old, NULL);
    Py_DECREF(after);
    return rc;
}

static void put_back_plain(PyObject *dict, PyObject *before) {
    PyDict_Clear(dict);
    (void)PyDict_Update(dict, before);
}

/* An ordered dictionary keeps a list of its own beside the keys. */
static void put_back_ordered(PyObject *dict, PyObject *before) {
    PyObject *key, *value, *done = PyObject_CallMethod((PyObject *)&PyODict_Type, "clear", "O", dict);
    Py_XDECREF(done);
    for (Py_ssize_t at = 0; PyDict_Next(before, &at, &key, &value);) (void)PyODict_SetItem(dict, key, value);
}

/* Do the keys that are left come in the order that they had, and before new ones? */
static bool keeps_order(const watch_dict *w) {
    PyObject *keys = PyMapping_Keys(w->dict), *key;
    Py_ssize_t at = 0, n = keys ? PyList_GET_SIZE(keys) : 0, i = 0;
    for (; i < w->count && at < n; i++) {
        key = PyList_GET_ITEM(keys, at);
        if (key == w->items[2 * i] || PyObject_RichCompareBool(key, w->items[2 * i], Py_EQ) == 1)
            at++;
        else if (PyDict_Contains(w->dict, w->items[2 * i]))
            break; /* it comes later now */
    }
    PyErr_Clear();
    Py_XDECREF(keys);
    return i == w->count || at == n;
}

static int restore_dict(watch_dict *w, thx_change_fn changed, void *user) {
    int rc = 0;
    pending before_look = hold_error();
    bool ordered = keeps_order(w), differs = !ordered || PyDict_GET_SIZE(w->dict) != w->count;
    release_error(before_look);
    for (Py_ssize_t i = 0; !differs && i < w->count; i++) {
        PyObject *now = PyDict_GetItemWithError(w->dict, w->items[2 * i]);
        differs = !now || !thx_same_value(w->items[2 * i + 1], now);
    }
    if (differs) {
        pending error = hold_error();
        PyObject *before = dict_before(w);
        release_error(error);
        if (!before) return -1;
        if (changed && !ordered) rc = changed(user, w->dict, Py_None, NULL, NULL);
        if (changed && rc == 0) rc = tell_changes(w->dict, before, changed, user);
        error = hold_error();
        if (PyODict_Check(w->dict))
            put_back_ordered(w->dict, before);
        else
            put_back_plain(w->dict, before);
        Py_DECREF(before);
        release_error(error);
    }
    return rc;
}

static int put_back_sequence(const watch_sequence *w) {
    if (PyList_Check(w->object)) return PyList_SetSlice(w->object, 0, PyList_GET_SIZE(w->object), w->copy);
    PyObject *done = PyObject_CallMethod(w->object, "clear", NULL);
    Py_XDECREF(done);
    done = done ? PyObject_CallMethod(w->object, "update", "(O)", w->copy) : NULL;
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static int restore_sequence(const watch_sequence *w, thx_change_fn changed, void *user) {
    if (thx_watch_sequence_holds(w)) return 0;
    pending error = hold_error();
    PyObject *after = PyList_Check(w->object) ? PySequence_Tuple(w->object) : PyFrozenSet_New(w->object);
    PyErr_Clear();
    (void)put_back_sequence(w);
    release_error(error);
    int rc = changed ? changed(user, w->object, Py_None, w->copy, after) : 0;
    Py_XDECREF(after);
    return rc;
}

static int restore_cell(const watch_cell *c, thx_change_fn changed, void *user) {
    if (thx_watch_cell_holds(c)) return 0;
    PyObject *after = Py_XNewRef(PyCell_GET(c->cell));
    pending error = hold_error();
    (void)PyCell_Set(c->cell, c->value);
    release_error(error);
    int rc = changed ? changed(user, c->cell, Py_None, c->value, after) : 0;
    Py_XDECREF(after);
    return rc;
}

static int restore_name(const watch_scope *s, PyObject *key, PyObject *old, thx_change_fn changed, void *user) {
    PyObject *now = PyDict_GetItemWithError(s->dict, key);
    if (old == now || (old && now && thx_same_value(old, now))) return 0;
    Py_XINCREF(now);
    pending error = hold_error();
    (void)(old ? PyDict_SetItem(s->dict, key, old) : PyDict_DelItem(s->dict, key));
    release_error(error);
    int rc = changed ? changed(user, s->dict, key, old, now) : 0;
    Py_XDECREF(now);
    return rc;
}

static int restore_scope(watch_scope *s, thx_change_fn changed, void *user) {
    PyObject *key, *old;
    int rc = 0;
    for (Py_ssize_t at = 0; PyDict_Next(s->copy, &at, &key, &old);)
        if (restore_name(s, key, old, rc == 0 ? changed : NULL, user) < 0) rc = -1;
    PyObject *names = PySequence_List(s->absent);
    for (Py_ssize_t i = 0; names && i < PyList_GET_SIZE(names); i++)
        if (restore_name(s, PyList_GET_ITEM(names, i), NULL, rc == 0 ? changed : NULL, user) < 0) rc = -1;
    Py_XDECREF(names);
    s->tag = thx_watch_tag(s->dict);
    return rc;
}

static int tell_class_changes(const watch_other *w, PyObject *after, thx_change_fn changed, void *user) {
    PyObject *key, *now, *old;
    int rc = 0;
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(after, &at, &key, &now);) {
        old = PyDict_GetItemWithError(w->copy, key);
        if (!thx_watch_is_ours(key) && old != now && !(old && thx_same_value(old, now)))
            rc = changed(user, w->object, key, old, now);
    }
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(w->copy, &at, &key, &old);)
        if (!PyDict_GetItemWithError(after, key)) rc = changed(user, w->object, key, old, NULL);
    return rc;
}

static int restore_other(thx *x, watch_other *w, thx_change_fn changed, void *user) {
    pending error = hold_error();
    bool holds = thx_watch_other_holds(x, w), class_ = w->kind == WATCH_CLASS;
    PyObject *after = !holds && class_ ? PyDict_Copy(((PyTypeObject *)w->object)->tp_dict) : NULL;
    bool listed = w->kind == WATCH_ORDER || w->kind == WATCH_DEQUE;
    PyObject *now = holds                   ? NULL
                    : listed                ? PySequence_Tuple(w->object)
                    : w->kind == WATCH_SLOT ? PyObject_GetAttr(w->object, w->name)
                                            : NULL;
    PyErr_Clear();
    if (!holds) thx_watch_other_put_back(w);
    release_error(error);
    if (holds) return 0;
    if (after) {
        int rc = changed ? tell_class_changes(w, after, changed, user) : 0;
        Py_DECREF(after);
        return rc;
    }
    int rc = changed ? changed(user, w->object, w->name ? w->name : Py_None, w->copy, now) : 0;
    Py_XDECREF(now);
    return rc;
}

/* Its class, and the dictionary that its attributes are in. */
static int restore_object(const watch_object *o, thx_change_fn changed, void *user) {
    if (thx_watch_object_holds(o)) return 0;
    pending error = hold_error();
    (void)PyObject_SetAttrString(o->object, "__class__", (PyObject *)o->type);
    PyErr_Clear();
    if (o->dict) (void)PyObject_SetAttrString(o->object, "__dict__", o->dict);
    release_error(error);
    return changed ? changed(user, o->object, Py_None, NULL, NULL) : 0;
}

int thx_guards_restore(thx *x, thx_guards *g, thx_change_fn changed, void *user) {
    int rc = 0;
    for (uint32_t i = 0; i < g->objects.count; i++)
        rc |= restore_object(&g->objects.items[i], rc == 0 ? changed : NULL, user);
    for (uint32_t i = 0; i < g->dicts.count; i++) {
        watch_stamp *stamp = &g->stamps.items[i];
        if (HAVE_VERSION_TAGS && thx_watch_tag(stamp->dict) == stamp->tag) continue;
        rc |= restore_dict(&g->dicts.items[i], rc == 0 ? changed : NULL, user);
        stamp->tag = thx_watch_tag(stamp->dict);
    }
    for (uint32_t i = 0; i < g->scopes.count; i++)
        if (!HAVE_VERSION_TAGS || thx_watch_tag(g->scopes.items[i].dict) != g->scopes.items[i].tag)
            rc |= restore_scope(&g->scopes.items[i], rc == 0 ? changed : NULL, user);
    for (uint32_t i = 0; i < g->sequences.count; i++)
        rc |= restore_sequence(&g->sequences.items[i], rc == 0 ? changed : NULL, user);
    for (uint32_t i = 0; i < g->cells.count; i++)
        rc |= restore_cell(&g->cells.items[i], rc == 0 ? changed : NULL, user);
    for (uint32_t i = 0; i < g->others.count; i++)
        rc |= restore_other(x, &g->others.items[i], rc == 0 ? changed : NULL, user);
    return rc ? -1 : 0;
}
