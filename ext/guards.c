/* Guards over what a callable can reach (guards_collect.c finds it) and the tensors bound from there: do they hold?
 *
 * A check compares version stamps, or the number of events. A changed dictionary is then compared with a copy made at
 * capture (identity, then value for numbers and strings): what did not change in effect costs one comparison. The
 * guards own references to all they watch.
 */
#include "attributes.h"
#include "guards_watch.h"

#include <string.h>

int thx_watch_reserve(void **items, uint32_t *cap, uint32_t count, size_t size) {
    if (count < *cap) return 0;
    uint32_t wanted = *cap ? *cap * 2 : 32;
    void *grown = PyMem_Realloc(*items, wanted * size);
    if (!grown) return PyErr_NoMemory(), -1;
    *items = grown;
    *cap = wanted;
    return 0;
}

/* ---- version stamps ---- */

#if HAVE_VERSION_TAGS
int thx_watch(thx *x, PyObject *dict) { return (void)x, (void)dict, 0; }
static void unwatch(thx *x, PyObject *dict) { (void)x, (void)dict; }
void thx_guards_fini(thx *x) { (void)x; }
#else
/* CPython's watcher callback carries no user pointer: the event count is the one mutable file-scope variable. */
static uint64_t dict_events;

static int on_event(PyDict_WatchEvent event, PyObject *dict, PyObject *key, PyObject *value) {
    (void)event, (void)dict, (void)key, (void)value;
    dict_events++;
    return 0;
}

static int count_watch(thx *x, PyObject *dict, long by) { /* the number of watches afterwards, or -1 */
    PyObject *id = PyLong_FromVoidPtr(dict), *old = id ? PyDict_GetItemWithError(x->watch_counts, id) : NULL;
    long count = (old ? PyLong_AsLong(old) : 0) + by;
    PyObject *now = id ? PyLong_FromLong(count) : NULL;
    int rc = !now ? -1 : count > 0 ? PyDict_SetItem(x->watch_counts, id, now) : PyDict_DelItem(x->watch_counts, id);
    Py_XDECREF(now);
    Py_XDECREF(id);
    return rc < 0 ? -1 : (int)count;
}

/* Is it told of a write to an attribute? Python 3.13.0 forgets to, where objects keep their values themselves. */
static bool is_told(int watcher) {
    PyObject *type = PyObject_CallFunction((PyObject *)&PyType_Type, "s(){}", "Watched");
    PyObject *object = type ? PyObject_CallNoArgs(type) : NULL, *dict = NULL, *none = Py_None;
    bool told = false;
    if (object && PyObject_SetAttrString(object, "written", none) == 0)
        dict = PyObject_GetAttrString(object, "__dict__");
    if (dict && PyDict_Watch(watcher, dict) == 0) {
        uint64_t before = dict_events;
        told = PyObject_SetAttrString(object, "written", type) == 0 && dict_events != before;
        (void)PyDict_Unwatch(watcher, dict);
    }
    Py_XDECREF(dict);
    Py_XDECREF(object);
    Py_XDECREF(type);
    return told;
}

/* The watcher's id, or -1: every check compares contents then, which is said once. */
static int find_watcher(void) {
    int watcher = PyDict_AddWatcher(on_event);
    if (watcher >= 0 && is_told(watcher)) return watcher;
    if (watcher >= 0) (void)PyDict_ClearWatcher(watcher);
    PyErr_Clear();
    PyObject *errors = PyImport_ImportModule("thunder._errors");
    PyObject *warning = errors ? PyObject_GetAttrString(errors, "ThunderWarning") : NULL;
    int rc = !warning
                 ? -1
                 : PyErr_WarnEx(warning,
                                "this Python does not tell of all writes to dictionaries (3.13.0 does not), or has "
                                "no watcher left: each call of a compiled function compares all that it reads, "
                                "which takes ten times longer. Use another release of Python",
                                1);
    Py_XDECREF(warning);
    Py_XDECREF(errors);
    return rc < 0 ? -2 : -1;
}

int thx_watch(thx *x, PyObject *dict) {
    if (x->dict_watcher == -2 && (x->dict_watcher = find_watcher()) == -2) return -1;
    if (x->dict_watcher < 0) return 0;
    int count = count_watch(x, dict, 1);
    return count < 0 ? -1 : count == 1 ? PyDict_Watch(x->dict_watcher, dict) : 0;
}

static void unwatch(thx *x, PyObject *dict) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (x->dict_watcher >= 0 && count_watch(x, dict, -1) == 0) (void)PyDict_Unwatch(x->dict_watcher, dict);
    PyErr_Restore(type, value, trace);
}

void thx_guards_fini(thx *x) {
    if (x->dict_watcher >= 0) (void)PyDict_ClearWatcher(x->dict_watcher);
    PyErr_Clear();
}
#endif

thx_guards *thx_guards_new(thx *x, PyObject *roots) {
    thx_guards *g = PyMem_Calloc(1, sizeof *g);
    if (g) g->roots = Py_NewRef(roots);
    if (!g || thx_guards_collect(x, g, roots, NULL) < 0) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        thx_guards_free(x, g);
        return NULL;
    }
#if !HAVE_VERSION_TAGS
    g->events = dict_events;
#endif
    return g;
}

void thx_watch_dict_clear(thx *x, watch_dict *w) {
    unwatch(x, w->dict);
    Py_DECREF(w->dict);
    for (Py_ssize_t i = 0; i < 2 * w->count; i++) Py_DECREF(w->items[i]);
    PyMem_Free(w->items);
}

void thx_watch_sequence_clear(watch_sequence *w) {
    Py_DECREF(w->object);
    Py_DECREF(w->copy);
}

void thx_guards_clear(thx *x, thx_guards *g) {
    for (uint32_t i = 0; i < g->dicts.count; i++) thx_watch_dict_clear(x, &g->dicts.items[i]);
    for (uint32_t i = 0; i < g->sequences.count; i++) thx_watch_sequence_clear(&g->sequences.items[i]);
    for (uint32_t i = 0; i < g->objects.count; i++) {
        Py_DECREF(g->objects.items[i].object);
        Py_DECREF((PyObject *)g->objects.items[i].type);
    }
    for (uint32_t i = 0; i < g->cells.count; i++) {
        Py_DECREF(g->cells.items[i].cell);
        Py_XDECREF(g->cells.items[i].value);
    }
    for (uint32_t i = 0; i < g->scopes.count; i++) {
        unwatch(x, g->scopes.items[i].dict);
        Py_DECREF(g->scopes.items[i].dict);
        Py_DECREF(g->scopes.items[i].copy);
        Py_DECREF(g->scopes.items[i].absent);
    }
    for (uint32_t i = 0; i < g->others.count; i++) {
        Py_DECREF(g->others.items[i].object);
        Py_DECREF(g->others.items[i].copy);
        Py_XDECREF(g->others.items[i].name);
        Py_XDECREF(g->others.items[i].order);
    }
    for (uint32_t i = 0; i < g->memos.count; i++) Py_DECREF(g->memos.items[i]);
    for (uint32_t i = 0; i < g->generators.count; i++) Py_DECREF(g->generators.items[i]);
    for (uint32_t i = 0; i < g->modules.count; i++) Py_DECREF(g->modules.items[i]);
    for (uint32_t i = 0; i < g->tensors.count; i++) Py_DECREF(g->tensors.items[i]);
    for (uint32_t i = 0; i < g->held.count; i++) Py_DECREF(g->held.items[i]);
    for (uint32_t i = 0; i < g->bounds.count; i++) {
        Py_XDECREF(g->bounds.items[i].dict);
        Py_XDECREF(g->bounds.items[i].key);
        PyMem_Free(g->bounds.items[i].dims);
        Py_XDECREF(g->live[i]);
    }
    PyMem_Free(g->dicts.items);
    PyMem_Free(g->stamps.items);
    PyMem_Free(g->sequences.items);
    PyMem_Free(g->objects.items);
    PyMem_Free(g->cells.items);
    PyMem_Free(g->scopes.items);
    PyMem_Free(g->others.items);
    PyMem_Free(g->memos.items);
    PyMem_Free(g->generators.items);
    PyMem_Free(g->modules.items);
    PyMem_Free(g->tensors.items);
    PyMem_Free(g->held.items);
    PyMem_Free(g->tied.items);
    PyMem_Free(g->bounds.items);
    PyMem_Free(g->live);
    PyMem_Free(g->pieces);
    Py_XDECREF(g->roots);
    Py_XDECREF(g->codes);
    Py_XDECREF(g->names);
    Py_XDECREF(g->cause);
    Py_XDECREF(g->any);
}

void thx_guards_free(thx *x, thx_guards *g) {
    if (!g) return;
    thx_guards_clear(x, g);
    PyMem_Free(g);
}

int thx_guards_traverse(const thx_guards *g, visitproc visit, void *arg) {
    if (!g) return 0;
    for (uint32_t i = 0; i < g->dicts.count; i++) {
        Py_VISIT(g->dicts.items[i].dict);
        for (Py_ssize_t j = 0; j < 2 * g->dicts.items[i].count; j++) Py_VISIT(g->dicts.items[i].items[j]);
    }
    for (uint32_t i = 0; i < g->sequences.count; i++) {
        Py_VISIT(g->sequences.items[i].object);
        Py_VISIT(g->sequences.items[i].copy);
    }
    for (uint32_t i = 0; i < g->objects.count; i++) {
        Py_VISIT(g->objects.items[i].object);
        Py_VISIT(g->objects.items[i].type);
    }
    for (uint32_t i = 0; i < g->cells.count; i++) {
        Py_VISIT(g->cells.items[i].cell);
        Py_VISIT(g->cells.items[i].value);
    }
    for (uint32_t i = 0; i < g->scopes.count; i++) {
        Py_VISIT(g->scopes.items[i].dict);
        Py_VISIT(g->scopes.items[i].copy);
        Py_VISIT(g->scopes.items[i].absent);
    }
    for (uint32_t i = 0; i < g->others.count; i++) {
        Py_VISIT(g->others.items[i].object);
        Py_VISIT(g->others.items[i].copy);
        Py_VISIT(g->others.items[i].order);
    }
    for (uint32_t i = 0; i < g->modules.count; i++) Py_VISIT(g->modules.items[i]);
    for (uint32_t i = 0; i < g->tensors.count; i++) Py_VISIT(g->tensors.items[i]);
    for (uint32_t i = 0; i < g->bounds.count; i++) {
        Py_VISIT(g->bounds.items[i].dict);
        Py_VISIT(g->bounds.items[i].key);
        Py_VISIT(g->live[i]);
    }
    Py_VISIT(g->roots);
    Py_VISIT(g->codes);
    Py_VISIT(g->names);
    Py_VISIT(g->any);
    return 0;
}

bool thx_guards_knows(const thx_guards *g, PyObject *o) {
    for (uint32_t i = 0; i < g->dicts.count; i++)
        if (g->dicts.items[i].dict == o) return true;
    for (uint32_t i = 0; i < g->sequences.count; i++)
        if (g->sequences.items[i].object == o) return true;
    for (uint32_t i = 0; i < g->objects.count; i++)
        if (g->objects.items[i].object == o) return true;
    for (uint32_t i = 0; i < g->others.count; i++)
        if (g->others.items[i].object == o) return true;
    return false;
}

static int add_id(PyObject *set, PyObject *o) {
    PyObject *id = PyLong_FromVoidPtr(o);
    int rc = id ? PySet_Add(set, id) : -1;
    Py_XDECREF(id);
    return rc;
}

static int add_key(PyObject *set, PyObject *key, bool *keyed) {
    bool found = Py_TYPE(key)->tp_flags & Py_TPFLAGS_HEAPTYPE; /* an object of a class that is written in Python */
    *keyed |= found;
    return found ? add_id(set, key) : 0;
}

PyObject *thx_guards_known(const thx_guards *g, bool *keyed) {
    PyObject *known = PySet_New(NULL), *member;
    int rc = known ? 0 : -1;
    *keyed = false;
    for (uint32_t i = 0; i < g->dicts.count && rc == 0; i++) {
        const watch_dict *w = &g->dicts.items[i];
        rc = add_id(known, w->dict);
        for (Py_ssize_t j = 0; j < w->count && rc == 0; j++) rc = add_key(known, w->items[2 * j], keyed);
    }
    for (uint32_t i = 0; i < g->sequences.count && rc == 0; i++) {
        const watch_sequence *w = &g->sequences.items[i];
        rc = add_id(known, w->object);
        PyObject *members = w->is_set && rc == 0 ? PyObject_GetIter(w->copy) : NULL;
        while (members && rc == 0 && (member = PyIter_Next(members))) {
            rc = add_key(known, member, keyed);
            Py_DECREF(member);
        }
        Py_XDECREF(members);
    }
    for (uint32_t i = 0; i < g->objects.count && rc == 0; i++) rc = add_id(known, g->objects.items[i].object);
    for (uint32_t i = 0; i < g->others.count && rc == 0; i++) rc = add_id(known, g->others.items[i].object);
    if (rc < 0) Py_CLEAR(known);
    return known;
}

bool thx_guards_watches_cell(const thx_guards *g, PyObject *cell) {
    for (uint32_t i = 0; i < g->cells.count; i++)
        if (g->cells.items[i].cell == cell) return true;
    return false;
}

bool thx_guards_holds(const thx_guards *g, PyObject *tensor) {
    for (uint32_t i = 0; i < g->tensors.count; i++)
        if (g->tensors.items[i] == tensor) return true;
    return false;
}

/* ---- bound tensors ---- */

static int read_bound(thx *x, PyObject *tensor, bound *b) {
    thx_meta m;
    if (thx_read_meta(x, tensor, false, &m) < 0) return -1;
    b->ndim = m.ndim;
    b->requires_grad = m.requires_grad;
    b->dims = PyMem_Malloc(sizeof(int64_t) * (size_t)(2 * m.ndim + 1));
    if (!b->dims) return PyErr_NoMemory(), -1;
    memcpy(b->dims, m.shape, sizeof(int64_t) * (size_t)m.ndim);
    memcpy(b->dims + m.ndim, m.stride, sizeof(int64_t) * (size_t)m.ndim);
    b->dtype = (int32_t)m.dtype;
    b->device_type = (int32_t)m.device;
    if (x->abi.on) {
        th_h h = thx_borrow(&x->abi, tensor);
        x->abi.aoti_torch_get_dtype(h, &b->dtype);
        x->abi.aoti_torch_get_device_type(h, &b->device_type);
        x->abi.aoti_torch_get_device_index(h, &b->device_index);
    }
    return 0;
}

/* Without what the piece of memory says. */
static bool bound_answers(thx *x, PyObject *tensor, const bound *b) {
    const thx_abi *abi = &x->abi;
    if (!abi->on) {
        bound now = {0};
        bool same = read_bound(x, tensor, &now) == 0 && now.ndim == b->ndim && now.dtype == b->dtype &&
                    now.device_type == b->device_type && now.requires_grad == b->requires_grad &&
                    memcmp(now.dims, b->dims, sizeof(int64_t) * (size_t)(2 * b->ndim)) == 0;
        PyErr_Clear();
        PyMem_Free(now.dims);
        return same;
    }
    th_h h = thx_borrow(abi, tensor);
    int64_t ndim, *sizes, *strides;
    int32_t dtype, device_type, device_index;
    if (abi->aoti_torch_get_dim(h, &ndim) || ndim != b->ndim || abi->aoti_torch_get_dtype(h, &dtype) ||
        dtype != b->dtype || abi->aoti_torch_get_device_type(h, &device_type) || device_type != b->device_type ||
        abi->aoti_torch_get_device_index(h, &device_index) || device_index != b->device_index ||
        abi->aoti_torch_get_sizes(h, &sizes) || abi->aoti_torch_get_strides(h, &strides))
        return false;
    int64_t *want = b->dims;
    for (int64_t i = 0; i < ndim; i++)
        if (sizes[i] != want[i] || strides[i] != want[ndim + i]) return false;
    return thx_needs_grad(x, tensor) == b->requires_grad;
}

static bool bound_holds(thx *x, thx_guards *g, uint32_t i) {
    bound *b = &g->bounds.items[i];
    PyObject *tensor = g->live[i];
    uint64_t *piece = g->pieces + (size_t)i * THX_LAYOUT_WORDS;
    if (b->in_piece && thx_layout_is(&x->abi, tensor, piece)) return thx_needs_grad(x, tensor) == b->requires_grad;
    if (!bound_answers(x, tensor, b)) return false;
    b->in_piece = thx_layout_read(&x->abi, tensor, piece);
    return true;
}

int thx_guards_bind(thx *x, thx_guards *g, PyObject *tensor, PyObject *dict, PyObject *key) {
    if (RESERVE(g->bounds) < 0) return -1;
    PyObject **live = PyMem_Realloc(g->live, sizeof *live * (g->bounds.count + 1));
    if (live) g->live = live;
    uint64_t *pieces = PyMem_Realloc(g->pieces, sizeof *pieces * THX_LAYOUT_WORDS * (g->bounds.count + 1));
    if (pieces) g->pieces = pieces;
    if (!live || !pieces) return PyErr_NoMemory(), -1;
    bound b = {.dict = NULL};
    if (read_bound(x, tensor, &b) < 0) return -1;
    b.in_piece = thx_layout_read(&x->abi, tensor, pieces + (size_t)g->bounds.count * THX_LAYOUT_WORDS);
    b.dict = Py_XNewRef(dict);
    b.key = Py_XNewRef(key);
    live[g->bounds.count] = Py_NewRef(tensor);
    g->bounds.items[g->bounds.count++] = b;
    return 0;
}

uint32_t thx_guards_bound(const thx_guards *g, PyObject *const **tensors) {
    *tensors = g->live;
    return g->bounds.count;
}
uint64_t thx_guards_generation(const thx_guards *g) { return g->generation; }
const char *thx_guards_iterator(const thx_guards *g) { return g->iterator ? g->iterator->tp_name : NULL; }
void thx_guards_forget(thx *x, thx_guards *g) {
    thx_guards_clear(x, g);
    memset(g, 0, sizeof *g);
}

const char *thx_guards_weak(const thx_guards *g) { return g->weak ? g->weak->tp_name : NULL; }
const char *thx_guards_hidden(const thx_guards *g) { return g->hidden ? g->hidden->tp_name : NULL; }

bool thx_guards_holds_generator(const thx_guards *g, PyObject *generator) {
    bool found = false;
    for (uint32_t i = 0; i < g->generators.count && !found; i++) found = g->generators.items[i] == generator;
    return found;
}

bool thx_guards_memoizes(const thx_guards *g, PyObject *code) {
    for (uint32_t i = 0; i < g->memos.count; i++)
        if (g->memos.items[i] == code) return true;
    return false;
}

void thx_guards_pin(thx_guards *g, bool pinned) { g->pinned = pinned; }

/* ---- checking ---- */

bool thx_same_value(PyObject *a, PyObject *b) {
    if (a == b) return true;
    PyTypeObject *t = Py_TYPE(a);
    if (t != Py_TYPE(b)) return false;
    if (t == &PyFloat_Type) {
        double p = PyFloat_AS_DOUBLE(a), q = PyFloat_AS_DOUBLE(b);
        return memcmp(&p, &q, sizeof p) == 0;
    }
    return (t == &PyLong_Type || t == &PyUnicode_Type || t == &PyBytes_Type) &&
           PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

bool thx_watch_cell_holds(const watch_cell *c) {
    PyObject *now = PyCell_GET(c->cell);
    return now == c->value || (now && c->value && thx_same_value(c->value, now));
}

bool thx_watch_object_holds(const watch_object *o) {
    return Py_TYPE(o->object) == o->type && (!o->dict || *o->place == o->dict);
}

/* The elements in their places, as a copy has them; else they may be the same still. */
static bool same_table(const PySetObject *a, const PySetObject *b) {
    if (a->used != b->used || a->mask != b->mask) return false;
    for (Py_ssize_t i = 0; i <= a->mask; i++)
        if (a->table[i].key != b->table[i].key) return false;
    return true;
}

bool thx_watch_sequence_holds(const watch_sequence *w) {
    if (w->is_set) {
        const PySetObject *now = (PySetObject *)w->object, *copy = (PySetObject *)w->copy;
        if (now->used != copy->used) return false;
        return !now->used || same_table(now, copy) || PyObject_RichCompareBool(w->object, w->copy, Py_EQ) == 1;
    }
    Py_ssize_t n = PySequence_Fast_GET_SIZE(w->object);
    if (n != PyTuple_GET_SIZE(w->copy)) return false;
    for (Py_ssize_t i = 0; i < n; i++)
        if (!thx_same_value(PySequence_Fast_ITEMS(w->object)[i], PyTuple_GET_ITEM(w->copy, i))) return false;
    return true;
}

static bool is_tied(const thx_guards *g, PyObject *tensor) {
    for (uint32_t i = 0; i < g->tied.count; i++)
        if (g->tied.items[i] == tensor) return true;
    return false;
}

static PyObject *attributes_of(PyObject *tensor) { /* borrowed, or NULL */
    PyObject *dict = thx_instance_dict(tensor);
    Py_XDECREF(dict); /* the tensor holds it */
    return dict;
}

static bool has_those_of(thx_guards *g, PyObject *dict, PyObject *other) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; other && PyDict_Next(other, &at, &key, &value);) {
        PyObject *same = dict ? PyDict_GetItemWithError(dict, key) : NULL;
        if ((!same || !thx_same_value(same, value)) && thx_relevant_name(g, key)) return PyErr_Clear(), false;
    }
    return true;
}

/* What watches the attributes of one tensor watches those of another, which are the same as far as they matter. */
static bool watch_instead(thx *x, thx_guards *g, PyObject *dict, PyObject *now) {
    for (uint32_t i = 0; i < g->dicts.count; i++) {
        watch_dict *w = &g->dicts.items[i];
        if (w->dict != dict) continue;
        Py_ssize_t count = 0;
        PyObject **items = now && thx_watch(x, now) == 0 ? thx_watch_items(now, &count) : NULL;
        if (!now || count < 0 || PyErr_Occurred()) return PyErr_Clear(), false;
        watch_dict made = {Py_NewRef(now), items, count, .attributes = true, .bare = w->bare, .ignored = w->ignored};
        thx_watch_dict_clear(x, w);
        *w = made;
        g->stamps.items[i] = (watch_stamp){now, thx_watch_tag(now)};
    }
    return true;
}

/* A tensor bound from dict[key] was replaced: take the new one when it is of the same kind, with the same attributes,
 * and as single as the old one was: which places hold the same tensor is something that programs see. */
static bool rebind(thx *x, thx_guards *g, PyObject *dict, PyObject *key, PyObject *old, PyObject *now) {
    if (!thx_is_tensor(x, now) || Py_TYPE(now) != Py_TYPE(old) || g->pinned || is_tied(g, old) ||
        thx_guards_holds(g, now))
        return false;
    PyObject *had = attributes_of(old), *has = attributes_of(now);
    if (!has_those_of(g, had, has) || !has_those_of(g, has, had)) return false;
    bool found = false;
    for (uint32_t i = 0; i < g->bounds.count; i++) {
        bound *b = &g->bounds.items[i];
        if (g->live[i] != old) continue;
        if (b->dict != dict || !thx_same_value(b->key, key) || !bound_answers(x, now, b)) return false;
        Py_SETREF(g->live[i], Py_NewRef(now));
        b->in_piece = false;
        found = true;
    }
    if (found && had && !watch_instead(x, g, had, has)) return false;
    for (uint32_t i = 0; found && i < g->tensors.count; i++)
        if (g->tensors.items[i] == old) Py_SETREF(g->tensors.items[i], Py_NewRef(now));
    g->generation += found;
    return found;
}

/* A number took the place of another one of its type: may it? Else it may still be of those that are looked for, which
 * are kept. */
static bool number_may_change(thx_guards *g, PyObject *owner, PyObject *key, PyObject *old, PyObject *now, bool *keep) {
    PyObject *none = Py_None;
    *keep = false;
    if (!old || !now || Py_TYPE(old) != Py_TYPE(now) || (Py_TYPE(now) != &PyFloat_Type && Py_TYPE(now) != &PyLong_Type))
        return false;
    for (Py_ssize_t i = 0; g->any && i < PyList_GET_SIZE(g->any); i++) {
        PyObject *place = PyList_GET_ITEM(g->any, i);
        if (PyTuple_GET_ITEM(place, 0) == owner && thx_same_value(PyTuple_GET_ITEM(place, 1), key ? key : none))
            return true;
    }
    if (!g->changed || (g->changed_type && Py_TYPE(now) != g->changed_type) || thx_same_value(old, now)) return false;
    PyObject *place = PyTuple_Pack(3, owner, key ? key : none, old);
    *keep = place && PyList_Append(g->changed, place) == 0;
    PyErr_Clear();
    Py_XDECREF(place);
    return *keep;
}

int thx_guards_free_number(thx_guards *g, PyObject *owner, PyObject *key) {
    PyObject *place = PyTuple_Pack(2, owner, key);
    if (place && !g->any) g->any = PyList_New(0);
    int rc = place && g->any ? PyList_Append(g->any, place) : -1;
    Py_XDECREF(place);
    return rc;
}

PyObject *thx_number_at(PyObject *owner, PyObject *key) {
    return PyCell_Check(owner) ? PyCell_GET(owner) : PyDict_GetItemWithError(owner, key);
}

int thx_set_number_at(PyObject *owner, PyObject *key, PyObject *value) {
    return PyCell_Check(owner) ? PyCell_Set(owner, value) : PyDict_SetItem(owner, key, value);
}

static void keep_cause(thx_guards *g, PyObject *owner, PyObject *key, PyObject *before, PyObject *after) {
    if (!g->explain) return;
    PyObject *none = Py_None;
    Py_XSETREF(g->cause, PyTuple_Pack(4, owner, key ? key : none, before ? before : none, after ? after : none));
    PyErr_Clear();
}

static void say(thx_guards *g, const char *format, PyObject *key) {
    PyObject *text = PyObject_Repr(key);
    const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
    snprintf(g->reason, sizeof g->reason, format, utf8 ? utf8 : "a key");
    PyErr_Clear();
    Py_XDECREF(text);
}

/* Compare with the copy; what changed and cannot matter is taken over. 1 the same, 0 not. */
static bool compare_items(thx *x, thx_guards *g, watch_dict *w) {
    bool grown = false;
    for (Py_ssize_t i = 0; i < w->count; i++) {
        PyObject *key = w->items[2 * i], *old = w->items[2 * i + 1], *now = PyDict_GetItemWithError(w->dict, key);
        if (now == old) continue;
        bool irrelevant = now && !thx_same_value(old, now) && w->attributes && !thx_relevant_name(g, key);
        bool keep = false, any = !irrelevant && number_may_change(g, w->dict, key, old, now, &keep);
        if (keep) continue;
        if (now && (any || irrelevant || thx_same_value(old, now) || rebind(x, g, w->dict, key, old, now))) {
            Py_SETREF(w->items[2 * i + 1], Py_NewRef(now));
            continue;
        }
        if (!now && w->attributes && !thx_relevant_name(g, key)) {
            grown = true;
            continue;
        }
        say(g, now ? "the value of %.100s changed" : "%.100s was removed", key);
        keep_cause(g, w->dict, key, old, now);
        return false;
    }
    if (!grown && PyDict_GET_SIZE(w->dict) == w->count) return true;
    PyObject *key, *value, **items = PyMem_Malloc(sizeof *items * (size_t)(2 * PyDict_GET_SIZE(w->dict) + 1));
    Py_ssize_t count = 0;
    bool same = items != NULL;
    for (Py_ssize_t at = 0; same && PyDict_Next(w->dict, &at, &key, &value);) {
        bool known = false;
        for (Py_ssize_t i = 0; i < w->count && !known; i++) known = thx_same_value(w->items[2 * i], key);
        same = known || (w->attributes && !thx_relevant_name(g, key));
        if (!same) {
            say(g, "%.100s was added", key);
            keep_cause(g, w->dict, key, NULL, value);
            break;
        }
        items[2 * count] = Py_NewRef(key);
        items[2 * count++ + 1] = Py_NewRef(value);
    }
    if (same) {
        PyObject **old = w->items;
        Py_ssize_t n = w->count;
        w->items = items;
        w->count = count;
        items = old;
        count = n;
    }
    for (Py_ssize_t i = 0; items && i < 2 * count; i++) Py_DECREF(items[i]);
    PyMem_Free(items);
    return same;
}

static bool dict_holds(thx *x, thx_guards *g, watch_dict *w) {
    PyObject *key, *value;
    Py_ssize_t place = 0;
    bool same = compare_items(x, g, w);
    for (Py_ssize_t at = 0; same && !PyODict_Check(w->dict) && PyDict_Next(w->dict, &at, &key, &value); place++)
        if (key != w->items[2 * place] && !thx_same_value(key, w->items[2 * place])) {
            snprintf(g->reason, sizeof g->reason, "the order of a dictionary changed");
            same = false;
        }
    if (!same && !thx_relevant_owner(x, g, w->dict)) same = w->ignored = true;
    return same;
}

static bool scope_holds(thx_guards *g, watch_scope *s) {
    PyObject *key, *old, *now;
    for (Py_ssize_t at = 0; PyDict_Next(s->copy, &at, &key, &old);) {
        now = PyDict_GetItemWithError(s->dict, key);
        bool keep = false,
             any = now != old && thx_relevant_name(g, key) && number_may_change(g, s->dict, key, old, now, &keep);
        if (any) {
            if (!keep) (void)PyDict_SetItem(s->copy, key, now); /* of a key that is there */
            continue;
        }
        if ((!now || !thx_same_value(old, now)) && thx_relevant_name(g, key)) {
            const char *name = PyUnicode_AsUTF8(key);
            snprintf(g->reason, sizeof g->reason, "the global %.100s changed", name ? name : "?");
            keep_cause(g, s->dict, key, old, now);
            PyErr_Clear();
            return false;
        }
    }
    PyObject *iterator = PyObject_GetIter(s->absent);
    bool holds = iterator != NULL;
    while (holds && (key = PyIter_Next(iterator))) {
        PyObject *found = PyDict_GetItemWithError(s->dict, key);
        holds = !found || !thx_relevant_name(g, key);
        if (!holds) keep_cause(g, s->dict, key, NULL, found);
        Py_DECREF(key);
    }
    if (!holds) snprintf(g->reason, sizeof g->reason, "a global was added");
    PyErr_Clear();
    Py_XDECREF(iterator);
    if (holds && !g->changed) s->tag = thx_watch_tag(s->dict);
    return holds;
}

static bool object_holds(thx *x, thx_guards *g, watch_other *w) {
    if (w->ignored || w->kind == WATCH_DRAWS || thx_watch_other_holds(x, w)) return true;
    w->ignored = w->kind == WATCH_SLOT ? !thx_relevant_name(g, w->name)
                                       : w->kind != WATCH_ANSWER && !thx_relevant_owner(x, g, w->object);
    if (!w->ignored) {
        PyObject *now = w->kind == WATCH_SLOT ? PyObject_GetAttr(w->object, w->name) : NULL;
        PyErr_Clear();
        snprintf(g->reason, sizeof g->reason, "%s changed", thx_watch_other_text(w));
        keep_cause(g, w->object, w->name, now ? w->copy : NULL, now);
        Py_XDECREF(now);
    }
    return w->ignored;
}

#if HAVE_VERSION_TAGS
enum { AHEAD = 12 }; /* the dictionaries lie all over the memory */

static const void *stamp_place(PyObject *dict) { return &((PyDictObject *)dict)->ma_version_tag; }

static bool stamp_holds(thx *x, thx_guards *g, watch_stamp *stamp) {
    watch_dict *w = &g->dicts.items[stamp - g->stamps.items];
    if (!w->ignored && !dict_holds(x, g, w)) return false;
    if (!g->changed) stamp->tag = thx_watch_tag(stamp->dict);
    return true;
}
#endif

int thx_guards_check(thx *x, thx_guards *g) {
#if HAVE_VERSION_TAGS
    watch_stamp *stamp = g->stamps.items, *end = stamp + g->stamps.count;
    for (; stamp < end; stamp++) {
        if (end - stamp > AHEAD) __builtin_prefetch(stamp_place(stamp[AHEAD].dict));
        if (thx_watch_tag(stamp->dict) != stamp->tag && !stamp_holds(x, g, stamp)) return 0;
    }
    for (uint32_t i = 0; i < g->scopes.count; i++)
        if (thx_watch_tag(g->scopes.items[i].dict) != g->scopes.items[i].tag && !scope_holds(g, &g->scopes.items[i]))
            return 0;
#else
    if (x->dict_watcher < 0 || g->events != dict_events) {
        uint64_t events = dict_events;
        for (uint32_t i = 0; i < g->dicts.count; i++)
            if (!g->dicts.items[i].ignored && !dict_holds(x, g, &g->dicts.items[i])) return 0;
        for (uint32_t i = 0; i < g->scopes.count; i++)
            if (!scope_holds(g, &g->scopes.items[i])) return 0;
        if (!g->changed) g->events = events;
    }
#endif
    for (uint32_t i = 0; i < g->objects.count; i++) {
        if (!thx_watch_object_holds(&g->objects.items[i])) {
            snprintf(g->reason, sizeof g->reason, "an object of type %.100s changed its class or its __dict__",
                     g->objects.items[i].type->tp_name);
            keep_cause(g, g->objects.items[i].object, NULL, NULL, NULL);
            return 0;
        }
    }
    for (uint32_t i = 0; i < g->others.count; i++)
        if (!object_holds(x, g, &g->others.items[i])) return 0;
    for (uint32_t i = 0; i < g->cells.count; i++)
        if (!g->cells.items[i].ignored && !thx_watch_cell_holds(&g->cells.items[i])) {
            watch_cell *c = &g->cells.items[i];
            bool keep = false;
            if (number_may_change(g, c->cell, NULL, c->value, PyCell_GET(c->cell), &keep)) {
                if (!keep) Py_SETREF(c->value, Py_NewRef(PyCell_GET(c->cell)));
                continue;
            }
            if ((g->cells.items[i].ignored = !thx_relevant_owner(x, g, g->cells.items[i].cell))) continue;
            snprintf(g->reason, sizeof g->reason, "a variable of an enclosing function changed");
            keep_cause(g, g->cells.items[i].cell, NULL, g->cells.items[i].value, PyCell_GET(g->cells.items[i].cell));
            return 0;
        }
    for (uint32_t i = 0; i < g->sequences.count; i++) {
        if (!g->sequences.items[i].ignored && !thx_watch_sequence_holds(&g->sequences.items[i])) {
            if ((g->sequences.items[i].ignored = !thx_relevant_owner(x, g, g->sequences.items[i].object))) continue;
            snprintf(g->reason, sizeof g->reason, "a list or set of the module changed");
            keep_cause(g, g->sequences.items[i].object, NULL, NULL, NULL);
            return 0;
        }
    }
    for (uint32_t i = 0; i < g->bounds.count; i++) {
        if (!bound_holds(x, g, i)) {
            snprintf(g->reason, sizeof g->reason,
                     "a parameter or buffer changed its shape, strides, dtype, device or "
                     "requires_grad");
            if (g->bounds.items[i].dict) keep_cause(g, g->bounds.items[i].dict, g->bounds.items[i].key, NULL, NULL);
            return 0;
        }
    }
    return 1;
}

int thx_guards_check_but(thx *x, thx_guards *g, PyTypeObject *type, PyObject *changed) {
    g->changed = changed;
    g->changed_type = type;
    int holds = thx_guards_check(x, g);
    g->changed = NULL;
    return holds;
}

PyObject *thx_guards_cause(thx *x, thx_guards *g) {
    g->explain = true;
    int holds = thx_guards_check(x, g);
    g->explain = false;
    PyObject *cause = g->cause, *none = Py_None;
    g->cause = NULL;
    if (holds < 0 || holds == 1) {
        Py_XDECREF(cause);
        return holds < 0 ? NULL : Py_NewRef(none);
    }
    PyObject *result = cause
                           ? Py_BuildValue("(sOOOO)", g->reason, PyTuple_GET_ITEM(cause, 0), PyTuple_GET_ITEM(cause, 1),
                                           PyTuple_GET_ITEM(cause, 2), PyTuple_GET_ITEM(cause, 3))
                           : Py_BuildValue("(sOOOO)", g->reason, none, none, none, none);
    Py_XDECREF(cause);
    return result;
}

PyObject *thx_guards_name(const thx_guards *g, PyObject *object) {
    PyObject *key, *value;
    for (uint32_t i = 0; i < g->dicts.count; i++)
        for (Py_ssize_t j = 0; j < g->dicts.items[i].count; j++)
            if (g->dicts.items[i].items[2 * j + 1] == object) return g->dicts.items[i].items[2 * j];
    for (uint32_t i = 0; i < g->scopes.count; i++)
        for (Py_ssize_t at = 0; PyDict_Next(g->scopes.items[i].copy, &at, &key, &value);)
            if (value == object) return key;
    return NULL;
}
