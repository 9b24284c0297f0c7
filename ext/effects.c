/* See effects.h. */
#include "effects.h"

#include "attributes.h"
#include "describe.h"

#include <string.h>

/* ---- the list ---- */

int thx_effect_add(thx_effects *e, const thx_effect *effect, PyObject *content) {
    if (!e->contents && !(e->contents = PyList_New(0))) return -1;
    thx_effect *items = PyMem_Realloc(e->items, sizeof *items * (e->count + 1));
    if (!items) return PyErr_NoMemory(), -1;
    e->items = items;
    if (PyList_Append(e->contents, content ? content : Py_None) < 0) return -1;
    thx_effect *new = &items[e->count++];
    *new = *effect;
    Py_XINCREF(new->owner);
    Py_XINCREF(new->path);
    Py_XINCREF(new->key);
    Py_XINCREF(new->removed);
    return 0;
}

void thx_effects_fini(thx_effects *e) {
    for (uint32_t i = 0; i < e->count; i++) {
        Py_XDECREF(e->items[i].owner);
        Py_XDECREF(e->items[i].path);
        Py_XDECREF(e->items[i].key);
        Py_XDECREF(e->items[i].removed);
    }
    PyMem_Free(e->items);
    Py_XDECREF(e->contents);
    *e = (thx_effects){0};
}

int thx_effects_traverse(const thx_effects *e, visitproc visit, void *arg) {
    for (uint32_t i = 0; i < e->count; i++) {
        Py_VISIT(e->items[i].owner);
        Py_VISIT(e->items[i].path);
        Py_VISIT(e->items[i].key);
        Py_VISIT(e->items[i].removed);
    }
    Py_VISIT(e->contents);
    return 0;
}

/* ---- bodies: what a container holds, beside its attributes ---- */

bool thx_is_deque(PyObject *o) { return strcmp(Py_TYPE(o)->tp_name, "collections.deque") == 0; }

/* New reference: a tuple, a dict, a frozenset; None: it holds no items. */
static PyObject *items_of(PyObject *o) {
    if (PyList_Check(o)) return PyList_AsTuple(o);
    if (thx_is_deque(o)) return PySequence_Tuple(o);
    if (PyAnySet_Check(o)) return PyFrozenSet_New(o);
    if (!PyDict_Check(o)) return Py_NewRef(Py_None);
    PyObject *copy = PyDict_New(), *iterator = copy ? PyObject_GetIter(o) : NULL, *key;
    int rc = iterator ? 0 : -1;
    while (rc == 0 && (key = PyIter_Next(iterator))) { /* in its own order */
        PyObject *value = PyDict_GetItemWithError(o, key);
        rc = value ? PyDict_SetItem(copy, key, value) : -1;
        Py_DECREF(key);
    }
    Py_XDECREF(iterator);
    if (rc < 0 || PyErr_Occurred()) Py_CLEAR(copy);
    return copy;
}

static int call(PyObject *o, const char *method, PyObject *argument) {
    PyObject *done = argument ? PyObject_CallMethod(o, method, "(O)", argument) : PyObject_CallMethod(o, method, NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static int set_dict(PyObject *o, PyObject *items) {
    PyObject *key, *value;
    int rc = 0;
    if (PyODict_Check(o))
        rc = call(o, "clear", NULL);
    else
        PyDict_Clear(o);
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(items, &at, &key, &value);)
        rc = PyODict_Check(o) ? PyODict_SetItem(o, key, value) : PyDict_SetItem(o, key, value);
    return rc;
}

static int set_items(PyObject *o, PyObject *items) {
    if (items == Py_None) return 0;
    if (PyList_Check(o)) return PyList_SetSlice(o, 0, PyList_GET_SIZE(o), items);
    if (PyDict_Check(o)) return set_dict(o, items);
    return call(o, "clear", NULL) < 0 ? -1 : call(o, thx_is_deque(o) ? "extend" : "update", items);
}

static int remove_item(PyObject *dict, PyObject *key) { /* an ordered dictionary keeps a list beside its keys */
    return PyODict_Check(dict) ? PyODict_DelItem(dict, key) : PyDict_DelItem(dict, key);
}

static int remove_attribute(PyObject *o, PyObject *dict, PyObject *name) {
    if (dict && PyDict_GetItemWithError(dict, name)) return PyDict_DelItem(dict, name);
    return PyErr_Occurred() ? -1 : PyObject_GenericSetAttr(o, name, NULL);
}

static int set_attributes(PyObject *o, bool members, PyObject *attributes, PyObject *removed) {
    PyObject *dict = thx_instance_dict(o), *key, *value;
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && removed && i < PyTuple_GET_SIZE(removed); i++)
        rc = remove_attribute(o, dict, PyTuple_GET_ITEM(removed, i));
    for (Py_ssize_t at = 0;
         rc == 0 && attributes && attributes != Py_None && PyDict_Next(attributes, &at, &key, &value);)
        rc = thx_set_attribute(o, members, dict, key, value);
    Py_XDECREF(dict);
    return rc;
}

int thx_effect_add_items(thx_effects *e, const thx_effect *effect, PyObject *dict, PyObject *order) {
    PyObject *items = order ? PyDict_New() : items_of(dict), *none = Py_None;
    for (Py_ssize_t i = 0; items && order && i < PyTuple_GET_SIZE(order); i++) {
        PyObject *key = PyTuple_GET_ITEM(order, i), *value = PyDict_GetItemWithError(dict, key);
        if (value && PyDict_SetItem(items, key, value) < 0) Py_CLEAR(items);
    }
    PyObject *content = items ? PyTuple_Pack(2, items, none) : NULL;
    int rc = content ? thx_effect_add(e, effect, content) : -1;
    Py_XDECREF(content);
    Py_XDECREF(items);
    return rc;
}

/* ---- applying ---- */

static int call_owner(PyObject *owner) {
    PyObject *done = PyObject_CallNoArgs(owner);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

int thx_effect_apply(const thx_effect *e, PyObject *owner, PyObject *content) {
    switch ((thx_effect_kind)e->kind) {
    case THX_EFFECT_BODY:
        return set_items(owner, PyTuple_GET_ITEM(content, 0)) < 0
                   ? -1
                   : set_attributes(owner, e->members, PyTuple_GET_ITEM(content, 1), e->removed);
    case THX_EFFECT_KEY:
        return PyType_Check(owner) ? PyObject_SetAttr(owner, e->key, content) : PyDict_SetItem(owner, e->key, content);
    case THX_EFFECT_DELETE:
        return PyType_Check(owner) ? PyObject_SetAttr(owner, e->key, NULL) : remove_item(owner, e->key);
    case THX_EFFECT_CELL: return PyCell_Set(owner, content);
    case THX_EFFECT_CALL: return call_owner(owner);
    }
    return 0;
}

PyObject **thx_effects_owners(const thx_effects *e, const thx_inputs *inputs) {
    PyObject **owners = PyMem_Calloc(e->count + 1, sizeof *owners);
    if (!owners) return (PyObject **)PyErr_NoMemory();
    for (uint32_t i = 0; i < e->count; i++) {
        owners[i] = e->items[i].owner ? Py_NewRef(e->items[i].owner) : thx_argument_at(inputs, e->items[i].path);
        if (owners[i]) continue;
        thx_effects_forget(e, owners);
        return NULL;
    }
    return owners;
}

void thx_effects_forget(const thx_effects *e, PyObject **owners) {
    for (uint32_t i = 0; owners && i < e->count; i++) Py_XDECREF(owners[i]);
    PyMem_Free(owners);
}

/* ---- arguments ---- */

static bool is_set(const thx_spec *s, PyObject *o) { return s->kind == THX_S_CONST && Py_IS_TYPE(o, &PySet_Type); }

static bool can_change(const thx_spec *s, PyObject *o) {
    return s->kind == THX_S_LIST || s->kind == THX_S_DICT || s->kind == THX_S_DEQUE || s->kind == THX_S_OBJECT ||
           is_set(s, o);
}

static PyObject *attributes_of(PyObject *o, bool members) { /* a copy, or None */
    PyObject *attributes = thx_attributes(o, members);
    if (!attributes) return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *copy = PyDict_Copy(attributes);
    Py_DECREF(attributes);
    return copy;
}

static int note_row(thx_watched_args *w, const thx_spec *s, PyObject *o, PyObject *path, bool own) {
    PyObject *items = items_of(o), *attributes = items ? attributes_of(o, s->members) : NULL;
    PyObject *row =
        attributes ? Py_BuildValue("(OOOOii)", o, path, items, attributes, (int)own, (int)s->members) : NULL;
    int rc = row ? PyList_Append(w->rows, row) : -1;
    Py_XDECREF(row);
    Py_XDECREF(attributes);
    Py_XDECREF(items);
    return rc;
}

static int watch(thx_watched_args *w, const thx_spec *s, PyObject *o, PyObject *path, bool own) {
    if (s->kind == THX_S_TENSOR || s->kind == THX_S_SLICE || s->kind == THX_S_SAME ||
        (s->kind == THX_S_CONST && !is_set(s, o)))
        return 0;
    own |= s->original != NULL;
    PyObject *id = PyLong_FromVoidPtr(o);
    int rc = id && PyDict_SetItem(w->index, id, path) == 0 ? PyList_Append(w->alive, o) : -1;
    Py_XDECREF(id);
    if (rc == 0 && can_change(s, o)) rc = note_row(w, s, o, path, own);
    for (uint32_t i = 0; i < s->nkids && rc == 0; i++) {
        PyObject *kid = thx_spec_part(s, o, i), *step = kid ? Py_BuildValue("(I)", i) : NULL,
                 *longer = step ? PySequence_Concat(path, step) : NULL;
        rc = longer ? watch(w, &s->kids[i], kid, longer, own) : -1;
        Py_XDECREF(longer);
        Py_XDECREF(step);
        Py_XDECREF(kid);
    }
    return rc;
}

int thx_args_watch(thx_watched_args *w, const thx_spec *specs, PyObject *const *objects, uint32_t count) {
    w->index = PyDict_New();
    w->alive = PyList_New(0);
    w->rows = PyList_New(0);
    int rc = w->index && w->alive && w->rows ? 0 : -1;
    for (uint32_t i = 0; i < count && rc == 0; i++) {
        PyObject *path = Py_BuildValue("(I)", i);
        rc = path ? watch(w, &specs[i], objects[i], path, false) : -1;
        Py_XDECREF(path);
    }
    return rc;
}

/* One object wherever it lies, which stays as it is. */
static bool is_member_of_enum(PyObject *o) { return strcmp(Py_TYPE(Py_TYPE(o))->tp_name, "EnumType") == 0; }

static int meets(const thx_spec *s, PyObject *o, PyObject *known, PyObject *met) {
    if (s->kind == THX_S_TENSOR || s->kind == THX_S_NUMBER || s->kind == THX_S_SAME || s->kind == THX_S_BUFFER ||
        (s->kind == THX_S_CONST && !is_set(s, o)) || is_member_of_enum(o))
        return 0;
    int found = 0;
    if (can_change(s, o)) {
        PyObject *id = PyLong_FromVoidPtr(o);
        found = !id ? -1 : (found = PySet_Contains(known, id)) ? found : PySet_Contains(met, id);
        if (found == 0) found = PySet_Add(met, id);
        Py_XDECREF(id);
    }
    for (uint32_t i = 0; i < s->nkids && found == 0; i++) {
        PyObject *kid = thx_spec_part(s, o, i);
        found = kid ? meets(&s->kids[i], kid, known, met) : -1;
        Py_XDECREF(kid);
    }
    return found;
}

int thx_args_meet(const thx_spec *specs, PyObject *const *objects, uint32_t count, PyObject *known) {
    PyObject *met = PySet_New(NULL);
    int found = met ? 0 : -1;
    for (uint32_t i = 0; i < count && found == 0; i++) found = meets(&specs[i], objects[i], known, met);
    Py_XDECREF(met);
    return found;
}

void thx_args_fini(thx_watched_args *w) {
    Py_CLEAR(w->index);
    Py_CLEAR(w->alive);
    Py_CLEAR(w->rows);
}

static bool same_part(PyObject *a, PyObject *b) { return a == b || (a && b && thx_same_constant(a, b)); }

static bool same_items(PyObject *before, PyObject *after) {
    if (before == Py_None || PyFrozenSet_Check(before))
        return before == after || PyObject_RichCompareBool(before, after, Py_EQ) == 1;
    if (PyDict_Check(before)) {
        PyObject *key, *value, *other, *now;
        Py_ssize_t at = 0, there = 0;
        bool same = PyDict_GET_SIZE(before) == PyDict_GET_SIZE(after);
        while (same && PyDict_Next(before, &at, &key, &value) && PyDict_Next(after, &there, &other, &now))
            same = same_part(key, other) && same_part(value, now);
        return same;
    }
    Py_ssize_t n = PyTuple_GET_SIZE(before);
    bool same = n == PyTuple_GET_SIZE(after);
    for (Py_ssize_t i = 0; i < n && same; i++)
        same = same_part(PyTuple_GET_ITEM(before, i), PyTuple_GET_ITEM(after, i));
    return same;
}

/* Attributes that differ, and the names of those that are gone. */
static int find_attributes(PyObject *before, PyObject *after, PyObject *changed, PyObject *gone) {
    PyObject *key, *value;
    int rc = 0;
    for (Py_ssize_t at = 0; rc == 0 && after != Py_None && PyDict_Next(after, &at, &key, &value);) {
        PyObject *old = before == Py_None ? NULL : PyDict_GetItemWithError(before, key);
        if (!same_part(old, value)) rc = PyDict_SetItem(changed, key, value);
    }
    for (Py_ssize_t at = 0; rc == 0 && before != Py_None && PyDict_Next(before, &at, &key, &value);)
        if (after == Py_None || !PyDict_GetItemWithError(after, key)) rc = PyList_Append(gone, key);
    return rc;
}

static int put_back(PyObject *row, PyObject *changed, PyObject *gone) {
    PyObject *o = PyTuple_GET_ITEM(row, 0), *before = PyTuple_GET_ITEM(row, 3), *key;
    bool members = PyLong_AsLong(PyTuple_GET_ITEM(row, 5)) != 0;
    PyObject *dict = thx_instance_dict(o);
    int rc = set_items(o, PyTuple_GET_ITEM(row, 2));
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(changed, &at, &key, NULL);) {
        PyObject *old = before == Py_None ? NULL : PyDict_GetItemWithError(before, key);
        rc = old ? thx_set_attribute(o, members, dict, key, old) : remove_attribute(o, dict, key);
    }
    for (Py_ssize_t i = 0; rc == 0 && i < PyList_GET_SIZE(gone); i++) {
        key = PyList_GET_ITEM(gone, i);
        rc = thx_set_attribute(o, members, dict, key, PyDict_GetItemWithError(before, key));
    }
    Py_XDECREF(dict);
    return rc;
}

/* The capture's own copy lets go of what it holds: then the effect alone does. */
static int let_go(PyObject *row, PyObject *changed) {
    PyObject *o = PyTuple_GET_ITEM(row, 0), *key;
    PyObject *dict = thx_instance_dict(o);
    int rc = PyTuple_GET_ITEM(row, 2) == Py_None ? 0
             : PyList_Check(o)                   ? PyList_SetSlice(o, 0, PyList_GET_SIZE(o), NULL)
                                                 : call(o, "clear", NULL);
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(changed, &at, &key, NULL);) rc = remove_attribute(o, dict, key);
    Py_XDECREF(dict);
    return rc;
}

static int collect_row(PyObject *row, thx_effects *effects) {
    PyObject *o = PyTuple_GET_ITEM(row, 0);
    bool own = PyLong_AsLong(PyTuple_GET_ITEM(row, 4)) != 0, members = PyLong_AsLong(PyTuple_GET_ITEM(row, 5)) != 0;
    PyObject *items = items_of(o), *attributes = items ? attributes_of(o, members) : NULL, *changed = PyDict_New(),
             *gone = PyList_New(0);
    int rc = attributes && changed && gone ? find_attributes(PyTuple_GET_ITEM(row, 3), attributes, changed, gone) : -1;
    bool same = rc == 0 && same_items(PyTuple_GET_ITEM(row, 2), items),
         quiet = rc == 0 && !PyDict_GET_SIZE(changed) && !PyList_GET_SIZE(gone);
    if (rc == 0 && !(same && quiet)) {
        if (effects) {
            PyObject *removed = PyList_AsTuple(gone), *none = Py_None;
            PyObject *content = removed ? PyTuple_Pack(2, same ? none : items, quiet ? none : changed) : NULL;
            const thx_effect effect = {
                .kind = THX_EFFECT_BODY, .members = members, .path = PyTuple_GET_ITEM(row, 1), .removed = removed};
            rc = content ? thx_effect_add(effects, &effect, content) : -1;
            Py_XDECREF(content);
            Py_XDECREF(removed);
        }
        if (own) {
            if (put_back(row, changed, gone) < 0) rc = -1;
        } else if (rc == 0 && effects) {
            rc = let_go(row, changed);
        }
    }
    Py_XDECREF(gone);
    Py_XDECREF(changed);
    Py_XDECREF(attributes);
    Py_XDECREF(items);
    return rc;
}

int thx_args_collect(thx_watched_args *w, thx_effects *effects) {
    int rc = 0;
    for (Py_ssize_t i = 0; w->rows && i < PyList_GET_SIZE(w->rows); i++)
        if (collect_row(PyList_GET_ITEM(w->rows, i), effects) < 0) rc = -1;
    return rc;
}
