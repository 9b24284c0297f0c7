/* Guards over what a callable can reach: the module tree with its dictionaries, containers and object types, variables
 * of enclosing functions, globals that its code names, and the tensors bound from them.
 *
 * Functions of libraries are taken as they are; of functions outside them, and of what they call, names are followed.
 * Lists, sets and dictionaries of more than 4096 entries count as data: they are not looked into.
 *
 * Python 3.11 stamps each dictionary with a version that changes at every write, so a check compares numbers. Later
 * versions call a watcher instead, which counts events. Either way a changed dictionary is then compared with a copy
 * made at capture (identity, then value for numbers and strings): what did not change in effect costs one comparison.
 * The guards own references to all they watch.
 */
#include "guards.h"

#include <string.h>

#if PY_VERSION_HEX < 0x030C0000
#define HAVE_VERSION_TAGS 1
#else
#define HAVE_VERSION_TAGS 0
/* CPython's watcher callback carries no user pointer: the event count is the one mutable file-scope variable. */
static uint64_t dict_events;
#endif

typedef struct watch_dict {
    PyObject *dict, **items; /* items: key, value, key, value as at the capture; one block of memory, NULL when empty */
    Py_ssize_t count;        /* of pairs */
    uint64_t tag;
} watch_dict;

typedef struct watch_sequence { /* list, deque-like or set: length, then elements by identity (sets by equality) */
    PyObject *object, *copy;
} watch_sequence;

typedef struct watch_object {
    PyObject *object;
    PyTypeObject *type;
} watch_object;

typedef struct watch_cell { /* a variable of an enclosing function */
    PyObject *cell, *value; /* value NULL: not assigned yet */
} watch_cell;

typedef struct watch_scope {        /* globals that code names */
    PyObject *dict, *copy, *absent; /* name -> value; set of names that are not there (builtins, attributes) */
    uint64_t tag;
} watch_scope;

typedef struct bound {
    PyObject *dict, *key; /* owned; NULL for a constant */
    int32_t dtype, device_type, device_index;
    int64_t ndim, *dims;
    bool requires_grad;
} bound;

#define VEC(type)            \
    struct {                 \
        type *items;         \
        uint32_t count, cap; \
    }

struct thx_guards {
    VEC(watch_dict) dicts;
    VEC(watch_sequence) sequences;
    VEC(watch_object) objects;
    VEC(watch_cell) cells;
    VEC(watch_scope) scopes;
    VEC(PyObject *) modules; /* outermost modules (owned) */
    VEC(PyObject *) tensors; /* every tensor of the tree (owned) */
    VEC(bound) bounds;
    PyObject **live; /* the bound tensors (owned), parallel to bounds: handed out as an array */
    uint64_t generation, events;
    char reason[200];
};

static int reserve(void **items, uint32_t *cap, uint32_t count, size_t size) {
    if (count < *cap) return 0;
    uint32_t wanted = *cap ? *cap * 2 : 32;
    void *grown = PyMem_Realloc(*items, wanted * size);
    if (!grown) return PyErr_NoMemory(), -1;
    *items = grown;
    *cap = wanted;
    return 0;
}
#define RESERVE(vec) reserve((void **)&(vec).items, &(vec).cap, (vec).count, sizeof *(vec).items)

/* ---- version stamps ---- */

#if HAVE_VERSION_TAGS
static uint64_t tag_of(PyObject *dict) { return ((PyDictObject *)dict)->ma_version_tag; }
static int watch(thx *x, PyObject *dict) { return (void)x, (void)dict, 0; }
static void unwatch(thx *x, PyObject *dict) { (void)x, (void)dict; }
void thx_guards_fini(thx *x) { (void)x; }
#else
static uint64_t tag_of(PyObject *dict) { return (void)dict, 0; }

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

static int watch(thx *x, PyObject *dict) {
    if (x->dict_watcher == -2) { /* 3.13.0 loses events: every check compares contents */
        x->dict_watcher = Py_Version == 0x030D00F0 ? -1 : PyDict_AddWatcher(on_event);
        PyErr_Clear();
    }
    if (x->dict_watcher < 0) return 0;
    int count = count_watch(x, dict, 1);
    return count < 0 ? -1 : count == 1 ? PyDict_Watch(x->dict_watcher, dict) : 0;
}

static void unwatch(thx *x, PyObject *dict) {
    if (x->dict_watcher >= 0 && count_watch(x, dict, -1) == 0) (void)PyDict_Unwatch(x->dict_watcher, dict);
    PyErr_Clear();
}

void thx_guards_fini(thx *x) {
    if (x->dict_watcher >= 0) (void)PyDict_ClearWatcher(x->dict_watcher);
    PyErr_Clear();
}
#endif

/* ---- collecting ---- */

static bool is_leaf(thx *x, PyObject *o) {
    PyTypeObject *t = Py_TYPE(o);
    return o == Py_None || t == &PyBool_Type || t == &PyLong_Type || t == &PyFloat_Type || t == &PyUnicode_Type ||
           t == &PyBytes_Type || PyType_Check(o) || PyCFunction_Check(o) || PyModule_Check(o) || t == x->Dtype ||
           t == x->Device || t == x->Size || PyCode_Check(o);
}

/* Classes of torch other than modules, loggers and locks hold nothing that a forward's result depends on. */
static bool is_foreign(thx *x, PyObject *o) {
    if (PyObject_TypeCheck(o, x->NnModule)) return false;
    PyObject *module = PyObject_GetAttr((PyObject *)Py_TYPE(o), x->n.module);
    const char *name = module && PyUnicode_Check(module) ? PyUnicode_AsUTF8(module) : "";
    bool foreign = strncmp(name, "torch.", 6) == 0 || strcmp(name, "torch") == 0 || strcmp(name, "logging") == 0 ||
                   strcmp(name, "_thread") == 0 || strcmp(name, "thunder._C") == 0 || strncmp(name, "thunder.", 8) == 0;
    PyErr_Clear();
    Py_XDECREF(module);
    return foreign;
}

typedef struct walker {
    thx *x;
    thx_guards *g;
    void **seen; /* open addressing by address */
    uint32_t nseen, cap_seen;
    PyTypeObject *types[64]; /* the last types looked at, by address, and whether they are foreign */
    bool foreign[64];
    bool in_module;
} walker;

enum { MAX_WATCHED = 4096 };

static void **seen_place(void **table, uint32_t cap, void *key) {
    uint32_t at = (uint32_t)(((uintptr_t)key >> 4) * 2654435761u) & (cap - 1);
    while (table[at] && table[at] != key) at = (at + 1) & (cap - 1);
    return &table[at];
}

/* 1 new, 0 seen before, -1 error. Objects stay alive through what is watched. */
static int first_visit(walker *w, PyObject *o) {
    if (w->nseen * 2 >= w->cap_seen) {
        uint32_t cap = w->cap_seen ? w->cap_seen * 2 : 1024;
        void **table = PyMem_Calloc(cap, sizeof *table);
        if (!table) return PyErr_NoMemory(), -1;
        for (uint32_t i = 0; i < w->cap_seen; i++)
            if (w->seen[i]) *seen_place(table, cap, w->seen[i]) = w->seen[i];
        PyMem_Free(w->seen);
        w->seen = table;
        w->cap_seen = cap;
    }
    void **place = seen_place(w->seen, w->cap_seen, o);
    if (*place) return 0;
    *place = o;
    w->nseen++;
    return 1;
}

static bool is_foreign_cached(walker *w, PyObject *o) {
    PyTypeObject *type = Py_TYPE(o);
    uint32_t at = (uint32_t)((uintptr_t)type >> 5) & 63;
    if (w->types[at] != type) {
        w->types[at] = type;
        w->foreign[at] = is_foreign(w->x, o);
    }
    return w->foreign[at];
}

static int walk(walker *w, PyObject *o, int depth);

/* Most dictionaries of a module are empty, the others small: pairs in plain memory are less than a dictionary, and no
 * work for the garbage collector. count -1: no memory. */
static PyObject **copy_items(PyObject *dict, Py_ssize_t *count) {
    Py_ssize_t n = PyDict_GET_SIZE(dict), i = 0;
    PyObject **items = n ? PyMem_Malloc(sizeof *items * (size_t)(2 * n)) : NULL, *key, *value;
    if (n && !items) {
        PyErr_NoMemory();
        *count = -1;
        return NULL;
    }
    for (Py_ssize_t at = 0; i < n && PyDict_Next(dict, &at, &key, &value); i++) {
        items[2 * i] = Py_NewRef(key);
        items[2 * i + 1] = Py_NewRef(value);
    }
    *count = i;
    return items;
}

/* `inside`: what the values hold matters too. */
static int watch_items(walker *w, PyObject *dict, int depth, bool inside) {
    thx_guards *g = w->g;
    if (PyDict_GET_SIZE(dict) > MAX_WATCHED) return 0;
    if (RESERVE(g->dicts) < 0 || watch(w->x, dict) < 0) return -1;
    Py_ssize_t count = 0;
    PyObject **items = copy_items(dict, &count);
    if (count < 0) return -1;
    g->dicts.items[g->dicts.count++] = (watch_dict){Py_NewRef(dict), items, count, tag_of(dict)};
    for (Py_ssize_t i = 0; inside && i < count; i++)
        if (walk(w, items[2 * i + 1], depth + 1) < 0) return -1;
    return 0;
}

static int walk_dict(walker *w, PyObject *dict, int depth) { return watch_items(w, dict, depth, true); }

static int walk_sequence(walker *w, PyObject *o, int depth) {
    thx_guards *g = w->g;
    if (PyObject_Size(o) > MAX_WATCHED) return 0;
    PyObject *copy = !PyAnySet_Check(o)  ? PySequence_Tuple(o)
                     : PySet_GET_SIZE(o) ? PyFrozenSet_New(o)
                                         : Py_NewRef(w->x->empty_set);
    if (!copy || RESERVE(g->sequences) < 0) return -1;
    if (PyTuple_Check(o))
        Py_DECREF(copy);
    else
        g->sequences.items[g->sequences.count++] = (watch_sequence){Py_NewRef(o), copy};
    if (PyAnySet_Check(o)) return 0;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(o); i++)
        if (walk(w, PySequence_Fast_ITEMS(o)[i], depth + 1) < 0) return -1;
    return 0;
}

/* ---- functions ---- */

/* Code of Python's own library, of and of installed packages. */
static bool is_library(thx *x, PyObject *code) {
    const char *file = PyUnicode_AsUTF8(((PyCodeObject *)code)->co_filename);
    PyErr_Clear();
    return !file || strncmp(file, "<frozen", 7) == 0 || strstr(file, "/site-packages/") ||
           strstr(file, "/dist-packages/") || (x->library && strncmp(file, x->library, strlen(x->library)) == 0);
}

static watch_scope *scope_of(walker *w, PyObject *dict) {
    thx_guards *g = w->g;
    for (uint32_t i = 0; i < g->scopes.count; i++)
        if (g->scopes.items[i].dict == dict) return &g->scopes.items[i];
    watch_scope scope = {NULL, PyDict_New(), PySet_New(NULL), tag_of(dict)};
    if (!scope.copy || !scope.absent || RESERVE(g->scopes) < 0 || watch(w->x, dict) < 0) {
        Py_XDECREF(scope.copy);
        Py_XDECREF(scope.absent);
        return NULL;
    }
    scope.dict = Py_NewRef(dict);
    g->scopes.items[g->scopes.count] = scope;
    return &g->scopes.items[g->scopes.count++];
}

static int walk_name(walker *w, PyObject *globals, PyObject *name, int depth) {
    watch_scope *scope = scope_of(w, globals);
    PyObject *value = scope ? PyDict_GetItemWithError(globals, name) : NULL;
    if (!value) return PyErr_Occurred() || !scope ? -1 : PySet_Add(scope->absent, name);
    if (PyDict_Contains(scope->copy, name) == 1) return 0;
    return PyDict_SetItem(scope->copy, name, value) < 0 ? -1 : walk(w, value, depth + 1);
}

static int walk_code(walker *w, PyCodeObject *code, PyObject *globals, int depth) {
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_names); i++)
        rc = walk_name(w, globals, PyTuple_GET_ITEM(code->co_names, i), depth);
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_consts); i++) {
        PyObject *inner = PyTuple_GET_ITEM(code->co_consts, i);
        if (PyCode_Check(inner)) rc = walk_code(w, (PyCodeObject *)inner, globals, depth);
    }
    return rc;
}

static int walk_cell(walker *w, PyObject *cell, int depth) {
    thx_guards *g = w->g;
    int fresh = first_visit(w, cell);
    if (fresh <= 0) return fresh;
    if (RESERVE(g->cells) < 0) return -1;
    PyObject *value = PyCell_GET(cell);
    g->cells.items[g->cells.count++] = (watch_cell){Py_NewRef(cell), Py_XNewRef(value)};
    return value ? walk(w, value, depth + 1) : 0;
}

static int walk_function(walker *w, PyObject *function, int depth) {
    PyObject *code = PyFunction_GET_CODE(function), *closure = PyFunction_GET_CLOSURE(function);
    PyObject *parts[] = {PyFunction_GET_DEFAULTS(function), PyFunction_GET_KW_DEFAULTS(function)};
    int rc = 0;
    for (int i = 0; i < 2 && rc == 0; i++) rc = parts[i] ? walk(w, parts[i], depth + 1) : 0;
    for (Py_ssize_t i = 0; rc == 0 && closure && i < PyTuple_GET_SIZE(closure); i++)
        rc = walk_cell(w, PyTuple_GET_ITEM(closure, i), depth);
    if (rc == 0 && !is_library(w->x, code))
        rc = walk_code(w, (PyCodeObject *)code, PyFunction_GET_GLOBALS(function), depth);
    return rc;
}

static int walk_attribute(walker *w, PyObject *o, const char *name, int depth) {
    PyObject *value = PyObject_GetAttrString(o, name);
    int rc = value ? walk(w, value, depth + 1) : -1;
    Py_XDECREF(value);
    return rc;
}

static int walk_module(walker *w, PyObject *o) {
    thx_guards *g = w->g;
    if (RESERVE(g->modules) < 0) return -1;
    g->modules.items[g->modules.count++] = Py_NewRef(o);
    return 0;
}

/* A dictionary that torch keeps in a module for itself: nobody writes attributes of the dictionary object. */
static bool is_torchs_own(walker *w, PyObject *key, PyObject *value) {
    return PyODict_CheckExact(value) && PyUnicode_CheckExact(key) && PySet_Contains(w->x->module_dicts, key) == 1;
}

/* Backward hooks run after the call and read the world as it is then: only which ones there are matters. */
static bool holds_backward_hooks(PyObject *key) {
    return PyUnicode_CompareWithASCIIString(key, "_backward_hooks") == 0 ||
           PyUnicode_CompareWithASCIIString(key, "_backward_pre_hooks") == 0;
}

/* The attributes of a module. */
static int walk_module_dict(walker *w, PyObject *dict, int depth) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
        if (!is_torchs_own(w, key, value)) continue;
        int fresh = first_visit(w, value);
        bool inside = fresh == 1 && (!PyDict_GET_SIZE(value) || !holds_backward_hooks(key));
        if (fresh < 0 || (fresh == 1 && watch_items(w, value, depth + 1, inside) < 0)) return -1;
    }
    return walk_dict(w, dict, depth);
}

static int walk_object(walker *w, PyObject *o, int depth) {
    thx_guards *g = w->g;
    PyObject *dict = PyObject_GetAttr(o, w->x->n.dict);
    if (!dict || !PyDict_Check(dict)) {
        PyErr_Clear();
        Py_XDECREF(dict);
        return 0;
    }
    int rc = RESERVE(g->objects);
    if (rc == 0) {
        g->objects.items[g->objects.count++] =
            (watch_object){Py_NewRef(o), (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(o))};
        int fresh = first_visit(w, dict);
        bool module = fresh == 1 && PyObject_TypeCheck(o, w->x->NnModule);
        rc = fresh != 1 ? fresh : module ? walk_module_dict(w, dict, depth) : walk_dict(w, dict, depth);
    }
    Py_DECREF(dict);
    return rc;
}

static int walk(walker *w, PyObject *o, int depth) {
    thx_guards *g = w->g;
    if (PyDict_CheckExact(o)) { /* holds no attributes */
        int fresh = depth > 64 ? 0 : first_visit(w, o);
        return fresh == 1 ? walk_dict(w, o, depth) : fresh;
    }
    if (is_leaf(w->x, o) || depth > 64) return 0;
    int fresh = first_visit(w, o);
    if (fresh <= 0) return fresh;
    if (thx_is_tensor(w->x, o)) {
        if (RESERVE(g->tensors) < 0) return -1;
        g->tensors.items[g->tensors.count++] = Py_NewRef(o);
        return 0;
    }
    if (PyFunction_Check(o)) return walk_function(w, o, depth);
    if (PyMethod_Check(o))
        return walk(w, PyMethod_GET_SELF(o), depth + 1) < 0 ? -1 : walk(w, PyMethod_GET_FUNCTION(o), depth + 1);
    if (strcmp(Py_TYPE(o)->tp_name, "functools.partial") == 0)
        return walk_attribute(w, o, "func", depth) < 0 || walk_attribute(w, o, "args", depth) < 0
                   ? -1
                   : walk_attribute(w, o, "keywords", depth);
    if (PyDict_Check(o) && walk_dict(w, o, depth) < 0) return -1;
    if (PyList_Check(o) || PyTuple_Check(o) || PyAnySet_Check(o)) return walk_sequence(w, o, depth);
    if (is_foreign_cached(w, o)) return 0;
    bool outermost = !w->in_module && PyObject_TypeCheck(o, w->x->NnModule);
    if (outermost && walk_module(w, o) < 0) return -1;
    w->in_module |= outermost;
    int rc = walk_object(w, o, depth);
    if (outermost) w->in_module = false;
    return rc;
}

static int walk_global_hooks(walker *w) {
    static const char *const names[] = {
        "_global_forward_hooks",      "_global_forward_pre_hooks",           "_global_backward_hooks",
        "_global_backward_pre_hooks", "_global_forward_hooks_always_called", NULL};
    PyObject *module = PyImport_ImportModule("torch.nn.modules.module");
    if (!module) return -1;
    int rc = 0;
    for (int i = 0; names[i] && rc == 0; i++) {
        PyObject *hooks = PyObject_GetAttrString(module, names[i]);
        PyErr_Clear();
        if (hooks && PyDict_Check(hooks) && first_visit(w, hooks) == 1) rc = walk_dict(w, hooks, 0);
        Py_XDECREF(hooks);
    }
    Py_DECREF(module);
    return rc;
}

/* A callable, or an argument that is compared by identity. What a call of an object does is in its class. */
static int walk_root(walker *w, PyObject *o) {
    int rc = walk(w, o, 0);
    if (rc < 0 || PyObject_TypeCheck(o, w->x->NnModule) || is_foreign_cached(w, o)) return rc;
    PyObject *call = PyObject_GetAttrString((PyObject *)Py_TYPE(o), "__call__");
    PyErr_Clear();
    rc = call && PyFunction_Check(call) ? walk(w, call, 0) : 0;
    Py_XDECREF(call);
    return rc;
}

thx_guards *thx_guards_new(thx *x, PyObject *roots) {
    thx_guards *g = PyMem_Calloc(1, sizeof *g);
    walker w = {.x = x, .g = g};
    int rc = g ? walk_global_hooks(&w) : -1;
    for (Py_ssize_t i = 0; rc == 0 && i < PyList_GET_SIZE(roots); i++) rc = walk_root(&w, PyList_GET_ITEM(roots, i));
    if (rc < 0) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        thx_guards_free(x, g);
        g = NULL;
    }
    PyMem_Free(w.seen);
#if !HAVE_VERSION_TAGS
    if (g) g->events = dict_events;
#endif
    return g;
}

void thx_guards_free(thx *x, thx_guards *g) {
    if (!g) return;
    for (uint32_t i = 0; i < g->dicts.count; i++) {
        unwatch(x, g->dicts.items[i].dict);
        Py_DECREF(g->dicts.items[i].dict);
        for (Py_ssize_t j = 0; j < 2 * g->dicts.items[i].count; j++) Py_DECREF(g->dicts.items[i].items[j]);
        PyMem_Free(g->dicts.items[i].items);
    }
    for (uint32_t i = 0; i < g->sequences.count; i++) {
        Py_DECREF(g->sequences.items[i].object);
        Py_DECREF(g->sequences.items[i].copy);
    }
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
    for (uint32_t i = 0; i < g->modules.count; i++) Py_DECREF(g->modules.items[i]);
    for (uint32_t i = 0; i < g->tensors.count; i++) Py_DECREF(g->tensors.items[i]);
    for (uint32_t i = 0; i < g->bounds.count; i++) {
        Py_XDECREF(g->bounds.items[i].dict);
        Py_XDECREF(g->bounds.items[i].key);
        PyMem_Free(g->bounds.items[i].dims);
        Py_XDECREF(g->live[i]);
    }
    PyMem_Free(g->dicts.items);
    PyMem_Free(g->sequences.items);
    PyMem_Free(g->objects.items);
    PyMem_Free(g->cells.items);
    PyMem_Free(g->scopes.items);
    PyMem_Free(g->modules.items);
    PyMem_Free(g->tensors.items);
    PyMem_Free(g->bounds.items);
    PyMem_Free(g->live);
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
    for (uint32_t i = 0; i < g->modules.count; i++) Py_VISIT(g->modules.items[i]);
    for (uint32_t i = 0; i < g->tensors.count; i++) Py_VISIT(g->tensors.items[i]);
    for (uint32_t i = 0; i < g->bounds.count; i++) {
        Py_VISIT(g->bounds.items[i].dict);
        Py_VISIT(g->bounds.items[i].key);
        Py_VISIT(g->live[i]);
    }
    return 0;
}

bool thx_guards_knows(const thx_guards *g, PyObject *o) {
    for (uint32_t i = 0; i < g->dicts.count; i++)
        if (g->dicts.items[i].dict == o) return true;
    for (uint32_t i = 0; i < g->sequences.count; i++)
        if (g->sequences.items[i].object == o) return true;
    for (uint32_t i = 0; i < g->objects.count; i++)
        if (g->objects.items[i].object == o) return true;
    return false;
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

/* ---- parameter places ---- */

static PyObject *dotted(PyObject *prefix, PyObject *key) {
    return PyUnicode_GET_LENGTH(prefix) ? PyUnicode_FromFormat("%U.%S", prefix, key) : PyObject_Str(key);
}

/* Tensors of one module's dictionary; a tensor found before keeps its first place. */
static int add_places(thx *x, PyObject *places, PyObject *prefix, PyObject *dict) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
        if (!thx_is_tensor(x, value)) continue;
        PyObject *name = dotted(prefix, key);
        PyObject *place = name ? PyTuple_Pack(3, dict, key, name) : NULL, *id = PyLong_FromVoidPtr(value);
        bool ok = place && id && PyDict_SetDefault(places, id, place);
        Py_XDECREF(id);
        Py_XDECREF(place);
        Py_XDECREF(name);
        if (!ok) return -1;
    }
    return 0;
}

static int walk_places(walker *w, PyObject *places, PyObject *prefix, PyObject *module, int depth) {
    int fresh = depth > 64 ? 0 : first_visit(w, module);
    PyObject *dict = fresh == 1 ? PyObject_GetAttr(module, w->x->n.dict) : NULL, *key, *child;
    if (!dict) return fresh == 1 ? -1 : fresh;
    int rc = 0;
    PyObject *const kinds[] = {w->x->n.parameters, w->x->n.buffers};
    for (int k = 0; k < 2 && rc == 0; k++) {
        PyObject *tensors = PyDict_GetItemWithError(dict, kinds[k]);
        if (tensors && PyDict_Check(tensors)) rc = add_places(w->x, places, prefix, tensors);
    }
    PyObject *modules = PyDict_GetItemWithError(dict, w->x->n.modules);
    for (Py_ssize_t at = 0; rc == 0 && modules && PyDict_Check(modules) && PyDict_Next(modules, &at, &key, &child);) {
        if (!PyObject_TypeCheck(child, w->x->NnModule)) continue;
        PyObject *name = dotted(prefix, key);
        rc = name ? walk_places(w, places, name, child, depth + 1) : -1;
        Py_XDECREF(name);
    }
    Py_DECREF(dict);
    return rc;
}

PyObject *thx_guards_params(thx *x, const thx_guards *g) {
    PyObject *places = PyDict_New(), *prefix = PyUnicode_FromString("");
    walker w = {.x = x};
    for (uint32_t i = 0; places && i < g->modules.count; i++)
        if (!prefix || walk_places(&w, places, prefix, g->modules.items[i], 0) < 0) Py_CLEAR(places);
    PyMem_Free(w.seen);
    Py_XDECREF(prefix);
    return places;
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

static bool bound_holds(thx *x, PyObject *tensor, const bound *b) {
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
    int grad = thx_requires_grad(abi, tensor);
    if (grad < 0) { /* not to be told from the outside: ask */
        PyObject *flag = x->requires_grad_get(tensor, x->requires_grad_closure);
        PyErr_Clear();
        Py_XDECREF(flag);
        grad = flag == Py_True;
    }
    return grad == b->requires_grad;
}

int thx_guards_bind(thx *x, thx_guards *g, PyObject *tensor, PyObject *dict, PyObject *key) {
    if (RESERVE(g->bounds) < 0) return -1;
    PyObject **live = PyMem_Realloc(g->live, sizeof *live * (g->bounds.count + 1));
    if (!live) return PyErr_NoMemory(), -1;
    g->live = live;
    bound b = {.dict = NULL};
    if (read_bound(x, tensor, &b) < 0) return -1;
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
const char *thx_guards_reason(const thx_guards *g) { return g->reason; }

bool thx_guards_need_grad(const thx *x, const thx_guards *g) {
    for (uint32_t i = 0; i < g->tensors.count; i++) {
        int grad = thx_requires_grad(&x->abi, g->tensors.items[i]);
        if (grad < 0) {
            PyObject *flag = x->requires_grad_get(g->tensors.items[i], x->requires_grad_closure);
            grad = flag == Py_True;
            Py_XDECREF(flag);
        }
        if (grad) return true;
    }
    return false;
}

/* ---- checking ---- */

static bool same_value(PyObject *a, PyObject *b) {
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

/* A tensor bound from dict[key] was replaced: take the new one when it is of the same kind. */
static bool rebind(thx *x, thx_guards *g, PyObject *dict, PyObject *key, PyObject *old, PyObject *now) {
    if (!thx_is_tensor(x, now) || Py_TYPE(now) != Py_TYPE(old)) return false;
    bool found = false;
    for (uint32_t i = 0; i < g->bounds.count; i++) {
        bound *b = &g->bounds.items[i];
        if (g->live[i] != old) continue;
        if (b->dict != dict || !same_value(b->key, key) || !bound_holds(x, now, b)) return false;
        Py_SETREF(g->live[i], Py_NewRef(now));
        found = true;
    }
    for (uint32_t i = 0; found && i < g->tensors.count; i++)
        if (g->tensors.items[i] == old) Py_SETREF(g->tensors.items[i], Py_NewRef(now));
    g->generation += found;
    return found;
}

static bool dict_holds(thx *x, thx_guards *g, watch_dict *w) {
    if (PyDict_GET_SIZE(w->dict) != w->count) {
        snprintf(g->reason, sizeof g->reason, "a dictionary went from %zd to %zd entries", w->count,
                 PyDict_GET_SIZE(w->dict));
        return false;
    }
    for (Py_ssize_t i = 0; i < w->count; i++) {
        PyObject *key = w->items[2 * i], *old = w->items[2 * i + 1], *now = PyDict_GetItemWithError(w->dict, key);
        if (now == old) continue;
        if (now && (same_value(old, now) || rebind(x, g, w->dict, key, old, now))) {
            Py_SETREF(w->items[2 * i + 1], Py_NewRef(now));
            continue;
        }
        PyObject *text = PyObject_Repr(key);
        const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
        snprintf(g->reason, sizeof g->reason, "the value of %.100s changed", utf8 ? utf8 : "a key");
        PyErr_Clear();
        Py_XDECREF(text);
        return false;
    }
    w->tag = tag_of(w->dict);
    return true;
}

static bool scope_holds(thx_guards *g, watch_scope *s) {
    PyObject *key, *old, *now;
    for (Py_ssize_t at = 0; PyDict_Next(s->copy, &at, &key, &old);) {
        now = PyDict_GetItemWithError(s->dict, key);
        if (!now || !same_value(old, now)) {
            const char *name = PyUnicode_AsUTF8(key);
            snprintf(g->reason, sizeof g->reason, "the global %.100s changed", name ? name : "?");
            PyErr_Clear();
            return false;
        }
    }
    PyObject *iterator = PyObject_GetIter(s->absent);
    bool holds = iterator != NULL;
    while (holds && (key = PyIter_Next(iterator))) {
        holds = !PyDict_GetItemWithError(s->dict, key);
        Py_DECREF(key);
    }
    if (!holds) snprintf(g->reason, sizeof g->reason, "a global was added");
    PyErr_Clear();
    Py_XDECREF(iterator);
    if (holds) s->tag = tag_of(s->dict);
    return holds;
}

static bool cell_holds(const watch_cell *c) {
    PyObject *now = PyCell_GET(c->cell);
    return now == c->value || (now && c->value && same_value(c->value, now));
}

static bool sequence_holds(const watch_sequence *w) {
    if (PyAnySet_Check(w->object)) {
        Py_ssize_t n = PySet_GET_SIZE(w->object);
        return n == PySet_GET_SIZE(w->copy) && (!n || PyObject_RichCompareBool(w->object, w->copy, Py_EQ) == 1);
    }
    Py_ssize_t n = PySequence_Fast_GET_SIZE(w->object);
    if (n != PyTuple_GET_SIZE(w->copy)) return false;
    for (Py_ssize_t i = 0; i < n; i++)
        if (!same_value(PySequence_Fast_ITEMS(w->object)[i], PyTuple_GET_ITEM(w->copy, i))) return false;
    return true;
}

int thx_guards_check(thx *x, thx_guards *g) {
#if HAVE_VERSION_TAGS
    for (uint32_t i = 0; i < g->dicts.count; i++)
        if (tag_of(g->dicts.items[i].dict) != g->dicts.items[i].tag && !dict_holds(x, g, &g->dicts.items[i])) return 0;
    for (uint32_t i = 0; i < g->scopes.count; i++)
        if (tag_of(g->scopes.items[i].dict) != g->scopes.items[i].tag && !scope_holds(g, &g->scopes.items[i])) return 0;
#else
    if (x->dict_watcher < 0 || g->events != dict_events) {
        uint64_t events = dict_events;
        for (uint32_t i = 0; i < g->dicts.count; i++)
            if (!dict_holds(x, g, &g->dicts.items[i])) return 0;
        for (uint32_t i = 0; i < g->scopes.count; i++)
            if (!scope_holds(g, &g->scopes.items[i])) return 0;
        g->events = events;
    }
#endif
    for (uint32_t i = 0; i < g->objects.count; i++)
        if (Py_TYPE(g->objects.items[i].object) != g->objects.items[i].type) {
            snprintf(g->reason, sizeof g->reason, "an object of type %.100s changed its class",
                     g->objects.items[i].type->tp_name);
            return 0;
        }
    for (uint32_t i = 0; i < g->cells.count; i++)
        if (!cell_holds(&g->cells.items[i])) {
            snprintf(g->reason, sizeof g->reason, "a variable of an enclosing function changed");
            return 0;
        }
    for (uint32_t i = 0; i < g->sequences.count; i++)
        if (!sequence_holds(&g->sequences.items[i])) {
            snprintf(g->reason, sizeof g->reason, "a list or set of the module changed");
            return 0;
        }
    for (uint32_t i = 0; i < g->bounds.count; i++)
        if (!bound_holds(x, g->live[i], &g->bounds.items[i])) {
            snprintf(g->reason, sizeof g->reason,
                     "a parameter or buffer changed its shape, strides, dtype, device or "
                     "requires_grad");
            return 0;
        }
    return 1;
}

/* ---- effects of a capture ---- */

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
        if (old != now && !(old && same_value(old, now))) rc = changed(user, dict, key, old, now);
    }
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(before, &at, &key, &old);)
        if (!PyDict_GetItemWithError(after, key)) rc = changed(user, dict, key, old, NULL);
    Py_DECREF(after);
    return rc;
}

static int restore_dict(watch_dict *w, thx_change_fn changed, void *user) {
    int rc = 0;
    bool differs = PyDict_GET_SIZE(w->dict) != w->count;
    for (Py_ssize_t i = 0; !differs && i < w->count; i++) {
        PyObject *now = PyDict_GetItemWithError(w->dict, w->items[2 * i]);
        differs = !now || !same_value(w->items[2 * i + 1], now);
    }
    if (differs) {
        pending error = hold_error();
        PyObject *before = dict_before(w);
        release_error(error);
        if (!before) return -1;
        if (changed) rc = tell_changes(w->dict, before, changed, user);
        error = hold_error();
        PyDict_Clear(w->dict);
        (void)PyDict_Update(w->dict, before);
        Py_DECREF(before);
        release_error(error);
    }
    w->tag = tag_of(w->dict);
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
    if (sequence_holds(w)) return 0;
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
    if (cell_holds(c)) return 0;
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
    if (old == now || (old && now && same_value(old, now))) return 0;
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
    s->tag = tag_of(s->dict);
    return rc;
}

int thx_guards_restore(thx_guards *g, thx_change_fn changed, void *user) {
    int rc = 0;
    for (uint32_t i = 0; i < g->dicts.count; i++)
        if (!HAVE_VERSION_TAGS || tag_of(g->dicts.items[i].dict) != g->dicts.items[i].tag)
            rc |= restore_dict(&g->dicts.items[i], rc == 0 ? changed : NULL, user);
    for (uint32_t i = 0; i < g->scopes.count; i++)
        if (!HAVE_VERSION_TAGS || tag_of(g->scopes.items[i].dict) != g->scopes.items[i].tag)
            rc |= restore_scope(&g->scopes.items[i], rc == 0 ? changed : NULL, user);
    for (uint32_t i = 0; i < g->sequences.count; i++)
        rc |= restore_sequence(&g->sequences.items[i], rc == 0 ? changed : NULL, user);
    for (uint32_t i = 0; i < g->cells.count; i++)
        rc |= restore_cell(&g->cells.items[i], rc == 0 ? changed : NULL, user);
    return rc ? -1 : 0;
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
