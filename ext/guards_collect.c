/* What a callable can reach: module trees with their dictionaries, containers and object types, variables of enclosing
 * functions, globals that code names. All of it becomes watched; parameters and buffers get their dotted names.
 *
 * Functions of libraries are taken as they are; of functions outside them, and of what they call, names are followed.
 * Lists, sets and dictionaries of more than 4096 entries count as data: they are not looked into.
 */
#include "attributes.h"
#include "guards_watch.h"
#include "origin.h"

#include <string.h>

static bool is_leaf(thx *x, PyObject *o) {
    PyTypeObject *t = Py_TYPE(o);
    return o == Py_None || t == &PyBool_Type || t == &PyLong_Type || t == &PyFloat_Type || t == &PyUnicode_Type ||
           t == &PyBytes_Type || PyCFunction_Check(o) || PyModule_Check(o) || t == x->Dtype || t == x->Device ||
           t == x->Size || PyCode_Check(o);
}

/* Classes of torch other than modules, fields of dataclasses, loggers and locks hold nothing that a forward's result
 * depends on; but these do. */
static bool holds_settings(const char *module) {
    static const char *const of[] = {"torch.optim", "torch.distributions", "torch.amp", "torch.nn.attention", NULL};
    bool found = false;
    for (const char *const *o = of; *o && !found; o++) {
        size_t length = strlen(*o);
        found = strncmp(module, *o, length) == 0 && (!module[length] || module[length] == '.');
    }
    return found;
}

static bool is_foreign(thx *x, PyObject *o) {
    if (PyObject_TypeCheck(o, x->NnModule)) return false;
    PyObject *module = PyObject_GetAttr((PyObject *)Py_TYPE(o), x->n.module);
    const char *name = module && PyUnicode_Check(module) ? PyUnicode_AsUTF8(module) : "";
    bool foreign = (strncmp(name, "torch.", 6) == 0 && !holds_settings(name)) || strcmp(name, "torch") == 0 ||
                   strcmp(name, "logging") == 0 || strcmp(name, "_thread") == 0 || strcmp(name, "dataclasses") == 0 ||
                   strcmp(name, "thunder._C") == 0 || strncmp(name, "thunder.", 8) == 0;
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
    uint32_t inside, looked; /* while the tensors of an object that is not watched are looked for */
    PyObject *names;         /* of attributes and globals to follow; NULL: all */
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

static int note_held(PyObject *o, void *walking) {
    enum { DEEP = 4, MANY = 4096 };
    walker *w = walking;
    if (thx_is_tensor(w->x, o)) {
        if (RESERVE(w->g->held) < 0) return -1;
        w->g->held.items[w->g->held.count++] = Py_NewRef(o);
        return 0;
    }
    bool holds = PyTuple_Check(o) || PyList_Check(o) || PyDict_Check(o);
    if (!holds || w->inside >= DEEP || w->looked++ >= MANY) return 0;
    w->inside++;
    int rc = Py_TYPE(o)->tp_traverse(o, note_held, w);
    w->inside--;
    return rc;
}

static int walk_foreign(walker *w, PyObject *o) {
    w->looked = 0;
    return PyObject_IS_GC(o) && Py_TYPE(o)->tp_traverse ? Py_TYPE(o)->tp_traverse(o, note_held, w) : 0;
}

void thx_guards_forget_met(thx_guards *g) {
    while (g->held.count) Py_DECREF(g->held.items[--g->held.count]);
}

bool thx_guards_met(const thx_guards *g, PyObject *tensor) {
    bool met = thx_guards_holds_tensor(g, tensor);
    for (uint32_t i = 0; i < g->held.count && !met; i++) met = g->held.items[i] == tensor;
    return met;
}

/* Most dictionaries of a module are empty, the others small: pairs in plain memory are less than a dictionary, and no
 * work for the garbage collector. count -1: no memory. */
PyObject **thx_watch_items(PyObject *dict, Py_ssize_t *count) {
    Py_ssize_t n = PyDict_GET_SIZE(dict), i = 0;
    PyObject **items = n ? PyMem_Malloc(sizeof *items * (size_t)(2 * n)) : NULL, *key, *value;
    if (n && !items) {
        PyErr_NoMemory();
        *count = -1;
        return NULL;
    }
    PyObject *keys = n && PyODict_Check(dict) ? PySequence_List(dict) : NULL; /* in an order of its own */
    PyErr_Clear();
    for (; keys && i < n && i < PyList_GET_SIZE(keys); i++) {
        value = PyDict_GetItemWithError(dict, PyList_GET_ITEM(keys, i));
        if (!value) break;
        items[2 * i] = Py_NewRef(PyList_GET_ITEM(keys, i));
        items[2 * i + 1] = Py_NewRef(value);
    }
    for (Py_ssize_t at = 0; !keys && i < n && PyDict_Next(dict, &at, &key, &value); i++) {
        items[2 * i] = Py_NewRef(key);
        items[2 * i + 1] = Py_NewRef(value);
    }
    Py_XDECREF(keys);
    *count = i;
    return items;
}

static bool follows(const walker *w, PyObject *name) { return !w->names || PySet_Contains(w->names, name) == 1; }

/* `inside`: what the values hold matters too. attributes: they are read by name. */
static int watch_items(walker *w, PyObject *dict, int depth, bool inside, bool attributes) {
    thx_guards *g = w->g;
    if (PyDict_GET_SIZE(dict) > MAX_WATCHED) return 0;
    if (RESERVE(g->dicts) < 0 || RESERVE(g->stamps) < 0 || thx_watch(w->x, dict) < 0) return -1;
    Py_ssize_t count = 0;
    PyObject **items = thx_watch_items(dict, &count);
    if (count < 0) return -1;
    g->stamps.items[g->stamps.count++] = (watch_stamp){dict, thx_watch_tag(dict)};
    g->dicts.items[g->dicts.count++] = (watch_dict){Py_NewRef(dict), items, count, .attributes = attributes};
    for (Py_ssize_t i = 0; inside && i < count; i++)
        if ((!attributes || follows(w, items[2 * i])) && walk(w, items[2 * i + 1], depth + 1) < 0) return -1;
    return 0;
}

static int walk_dict(walker *w, PyObject *dict, int depth) { return watch_items(w, dict, depth, true, false); }

static int walk_attributes(walker *w, PyObject *dict, int depth) { return watch_items(w, dict, depth, true, true); }

static int walk_members(walker *w, PyObject *set, int depth) {
    PyObject *iterator = PySet_GET_SIZE(set) ? PyObject_GetIter(set) : NULL, *member;
    int rc = PyErr_Occurred() ? -1 : 0;
    while (rc == 0 && iterator && (member = PyIter_Next(iterator))) {
        rc = walk(w, member, depth + 1);
        Py_DECREF(member); /* the set holds it */
    }
    Py_XDECREF(iterator);
    return PyErr_Occurred() ? -1 : rc;
}

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
        g->sequences.items[g->sequences.count++] = (watch_sequence){Py_NewRef(o), copy, .is_set = PyAnySet_Check(o)};
    if (PyAnySet_Check(o)) return walk_members(w, copy, depth);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(o); i++)
        if (walk(w, PySequence_Fast_ITEMS(o)[i], depth + 1) < 0) return -1;
    return 0;
}

static int walk_deque(walker *w, PyObject *o, int depth) {
    if (PyObject_Size(o) > MAX_WATCHED) return 0;
    if (thx_watch_other(w->x, w->g, WATCH_DEQUE, o, NULL) < 0) return -1;
    PyObject *copy = w->g->others.items[w->g->others.count - 1].copy;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(copy); i++)
        if (walk(w, PyTuple_GET_ITEM(copy, i), depth + 1) < 0) return -1;
    return 0;
}

/* Arrays and bytes; large ones count as data. */
static int walk_buffer(walker *w, PyObject *o) {
    if (thx_watch_other(w->x, w->g, WATCH_BUFFER, o, NULL) == 0) return 0;
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    return 0;
}

/* ---- functions ---- */

static bool is_library(thx *x, PyObject *code) { return thx_is_library(thx_origin_of_code(x, code)); }

static watch_scope *scope_of(walker *w, PyObject *dict) {
    thx_guards *g = w->g;
    for (uint32_t i = 0; i < g->scopes.count; i++)
        if (g->scopes.items[i].dict == dict) return &g->scopes.items[i];
    watch_scope scope = {NULL, PyDict_New(), PySet_New(NULL), thx_watch_tag(dict)};
    if (!scope.copy || !scope.absent || RESERVE(g->scopes) < 0 || thx_watch(w->x, dict) < 0) {
        Py_XDECREF(scope.copy);
        Py_XDECREF(scope.absent);
        return NULL;
    }
    scope.dict = Py_NewRef(dict);
    g->scopes.items[g->scopes.count] = scope;
    return &g->scopes.items[g->scopes.count++];
}

static int walk_name(walker *w, PyObject *globals, PyObject *name, int depth) {
    if (!follows(w, name)) return 0;
    watch_scope *scope = scope_of(w, globals);
    PyObject *value = scope ? PyDict_GetItemWithError(globals, name) : NULL;
    if (!value) return PyErr_Occurred() || !scope ? -1 : PySet_Add(scope->absent, name);
    if (PyDict_Contains(scope->copy, name) == 1) return 0;
    return PyDict_SetItem(scope->copy, name, value) < 0 ? -1 : walk(w, value, depth + 1);
}

/* A module of the user's: config.scale. */
static bool is_users_module(thx *x, PyObject *o) {
    PyObject *dict = o && PyModule_Check(o) ? PyModule_GetDict(o) : NULL; /* borrowed */
    if (!dict || o == x->torch) return false;
    PyObject *file = PyDict_GetItemString(dict, "__file__");
    if (!file) { /* made by hand, or built in */
        PyObject *spec = PyDict_GetItemString(dict, "__spec__");
        return !spec || spec == Py_None;
    }
    return PyUnicode_Check(file) && !thx_is_library(thx_origin_of(x, file));
}

/* Strings among the constants of code that are keys of a dictionary, for globals()["x"] and sys.modules["x"]. */
static int walk_constant_names(walker *w, PyObject *dict, PyCodeObject *code, int depth) {
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_consts); i++) {
        PyObject *constant = PyTuple_GET_ITEM(code->co_consts, i);
        if (PyUnicode_Check(constant) && PyDict_Contains(dict, constant) == 1) rc = walk_name(w, dict, constant, depth);
    }
    return rc;
}

static bool names(PyCodeObject *code, const char *name) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code->co_names); i++)
        if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(code->co_names, i), name) == 0) return true;
    return false;
}

static bool mentions(PyObject *code, bool (*such)(PyObject *name)) {
    PyObject *names = ((PyCodeObject *)code)->co_names;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++)
        if (such(PyTuple_GET_ITEM(names, i))) return true;
    return false;
}

static bool asks_whether(PyObject *name) {
    static const char *const all[] = {"getattr", "hasattr", "vars", "dir", "__dict__", "attrgetter", NULL};
    for (int i = 0; all[i]; i++)
        if (PyUnicode_CompareWithASCIIString(name, all[i]) == 0) return true;
    return false;
}

/* What code names of a module that it can reach, there or not; getattr(config, "scale") names it by a constant. */
static int walk_module_names(walker *w, PyObject *module, PyCodeObject *code, int depth) {
    if (!is_users_module(w->x, module)) return 0;
    PyObject *dict = PyModule_GetDict(module), *constants = code->co_consts;
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_names); i++)
        rc = walk_name(w, dict, PyTuple_GET_ITEM(code->co_names, i), depth);
    bool asks = mentions((PyObject *)code, asks_whether);
    for (Py_ssize_t i = 0; asks && rc == 0 && i < PyTuple_GET_SIZE(constants); i++)
        if (PyUnicode_Check(PyTuple_GET_ITEM(constants, i)))
            rc = walk_name(w, dict, PyTuple_GET_ITEM(constants, i), depth);
    return rc;
}

/* sys.argv: a short list of numbers and strings. */
static bool is_plain_list(thx *x, PyObject *o) {
    bool plain = PyList_CheckExact(o) && PyList_GET_SIZE(o) <= 64;
    for (Py_ssize_t i = 0; plain && i < PyList_GET_SIZE(o); i++) plain = is_leaf(x, PyList_GET_ITEM(o, i));
    return plain;
}

/* Is it an object of a class of another library's, put there: torch.relu = Mock()? */
static bool is_strange(thx *x, PyObject *module, PyObject *o) {
    PyTypeObject *type = Py_TYPE(o);
    bool plain = !(type->tp_flags & Py_TPFLAGS_HEAPTYPE) || PyType_Check(o) || thx_is_tensor(x, o);
    const char *name = plain ? NULL : PyModule_GetName(module);
    PyObject *where = name ? PyObject_GetAttr((PyObject *)type, x->n.module) : NULL;
    const char *its = where && PyUnicode_Check(where) ? PyUnicode_AsUTF8(where) : NULL;
    size_t length = name ? strcspn(name, ".") : 0;
    bool strange = its && (strcspn(its, ".") != length || strncmp(its, name, length) != 0);
    PyErr_Clear();
    Py_XDECREF(where);
    return strange;
}

/* A function that is the user's own, or a method or a partial of one: put in the place of a library's. */
static bool is_users_function(thx *x, PyObject *o) {
    if (PyMethod_Check(o)) o = PyMethod_GET_FUNCTION(o);
    bool partial = strcmp(Py_TYPE(o)->tp_name, "functools.partial") == 0;
    return partial || (PyFunction_Check(o) && thx_origin_of_code(x, PyFunction_GET_CODE(o)) == THX_USERS);
}

/* What code names of a library's module, torch.nn.functional.relu: that somebody may put another function there, not
 * what is inside, but for plain lists and functions of the user's. */
static int watch_library_names(walker *w, PyObject *module, PyCodeObject *code, int depth) {
    PyObject *dict =
        module && PyModule_Check(module) && !is_users_module(w->x, module) ? PyModule_GetDict(module) : NULL;
    for (Py_ssize_t i = 0; dict && depth < 4 && i < PyTuple_GET_SIZE(code->co_names); i++) {
        PyObject *name = PyTuple_GET_ITEM(code->co_names, i), *value = PyDict_GetItemWithError(dict, name);
        watch_scope *scope = value && follows(w, name) ? scope_of(w, dict) : NULL;
        if (PyErr_Occurred()) return -1;
        if (!scope || PyDict_Contains(scope->copy, name) == 1) continue;
        if (PyDict_SetItem(scope->copy, name, value) < 0) return -1;
        bool theirs = is_users_function(w->x, value) || is_strange(w->x, module, value);
        if ((theirs || is_plain_list(w->x, value)) && walk(w, value, depth) < 0) return -1;
        if (PyModule_Check(value) && watch_library_names(w, value, code, depth + 1) < 0) return -1;
    }
    return 0;
}

/* max, len: that of a global of that name, which is not there, is watched too. */
static int watch_builtins(walker *w, PyCodeObject *code, PyObject *globals) {
    PyObject *builtins = PyEval_GetBuiltins(); /* borrowed */
    for (Py_ssize_t i = 0; builtins && i < PyTuple_GET_SIZE(code->co_names); i++) {
        PyObject *name = PyTuple_GET_ITEM(code->co_names, i), *value = PyDict_GetItemWithError(builtins, name);
        if (PyErr_Occurred()) return -1;
        if (!value || PyDict_Contains(globals, name) == 1) continue;
        watch_scope *scope = scope_of(w, builtins);
        if (!scope || PyDict_SetItem(scope->copy, name, value) < 0) return -1;
    }
    return 0;
}

/* Modules of the user's that code imports. */
static int walk_imports(walker *w, PyCodeObject *code, int depth) {
    PyObject *modules = PyImport_GetModuleDict();
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_names); i++) {
        PyObject *name = PyTuple_GET_ITEM(code->co_names, i), *module = PyDict_GetItemWithError(modules, name);
        if (!module || !is_users_module(w->x, module)) continue;
        rc = walk_name(w, modules, name, depth);
        if (rc == 0) rc = walk_module_names(w, module, code, depth);
    }
    return rc;
}

static int walk_code(walker *w, PyCodeObject *code, PyObject *globals, int depth) {
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_names); i++)
        rc = walk_name(w, globals, PyTuple_GET_ITEM(code->co_names, i), depth);
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_names); i++)
        rc = walk_module_names(w, PyDict_GetItemWithError(globals, PyTuple_GET_ITEM(code->co_names, i)), code, depth);
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_names); i++)
        rc = watch_library_names(w, PyDict_GetItemWithError(globals, PyTuple_GET_ITEM(code->co_names, i)), code, 0);
    if (rc == 0) rc = watch_builtins(w, code, globals);
    if (rc == 0) rc = walk_imports(w, code, depth);
    if (rc == 0 && names(code, "globals")) rc = walk_constant_names(w, globals, code, depth);
    if (rc == 0 && names(code, "modules")) rc = walk_constant_names(w, PyImport_GetModuleDict(), code, depth);
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(code->co_consts); i++) {
        PyObject *inner = PyTuple_GET_ITEM(code->co_consts, i);
        if (PyCode_Check(inner)) rc = walk_code(w, (PyCodeObject *)inner, globals, depth);
    }
    return rc;
}

static int walk_cell(walker *w, PyObject *cell, bool alone, int depth) { /* alone: without what is in it */
    thx_guards *g = w->g;
    int fresh = first_visit(w, cell);
    if (fresh <= 0) return fresh;
    if (RESERVE(g->cells) < 0) return -1;
    PyObject *value = PyCell_GET(cell);
    g->cells.items[g->cells.count++] = (watch_cell){Py_NewRef(cell), Py_XNewRef(value), false};
    return value && !alone ? walk(w, value, depth + 1) : 0;
}

static int walk_attribute(walker *w, PyObject *o, const char *name, int depth) {
    PyObject *value = PyObject_GetAttrString(o, name);
    int rc = value ? walk(w, value, depth + 1) : -1;
    Py_XDECREF(value);
    return rc;
}

/* The manager of a function that `@manager()` decorates: each call makes it anew of three attributes, so the generator
 * that it holds never runs. The object itself counts as not visited: other ways to it find the generator. */
static int walk_remade(walker *w, PyObject *manager, int depth) {
    static const char *const parts[] = {"func", "args", "kwds", NULL};
    PyObject *dict = PyObject_GetAttr(manager, w->x->n.dict);
    int rc = dict && PyDict_Check(dict) ? watch_items(w, dict, depth, false, true) : -1;
    for (int i = 0; parts[i] && rc == 0; i++) rc = walk_attribute(w, manager, parts[i], depth);
    Py_XDECREF(dict);
    return rc;
}

static int walk_function(walker *w, PyObject *function, int depth) {
    PyObject *code = PyFunction_GET_CODE(function), *closure = PyFunction_GET_CLOSURE(function);
    PyObject *parts[] = {PyFunction_GET_DEFAULTS(function), PyFunction_GET_KW_DEFAULTS(function)};
    bool library = is_library(w->x, code);
    int rc = library ? 0 : thx_watch_other(w->x, w->g, WATCH_FUNCTION, function, NULL);
    for (int i = 0; i < 2 && rc == 0; i++) rc = parts[i] ? walk(w, parts[i], depth + 1) : 0;
    for (Py_ssize_t i = 0; rc == 0 && closure && i < PyTuple_GET_SIZE(closure); i++) {
        PyObject *cell = PyTuple_GET_ITEM(closure, i), *value = PyCell_GET(cell);
        bool remade = value && code == w->x->remakes && Py_IS_TYPE(value, w->x->Remade);
        rc = walk_cell(w, cell, remade, depth);
        if (rc == 0 && remade) rc = walk_remade(w, value, depth);
        if (rc == 0 && !library) rc = walk_module_names(w, value, (PyCodeObject *)code, depth);
        if (rc == 0 && !library) rc = watch_library_names(w, value, (PyCodeObject *)code, 0);
    }
    if (rc == 0 && !library) rc = walk_code(w, (PyCodeObject *)code, PyFunction_GET_GLOBALS(function), depth);
    PyObject *dict =
        rc == 0 && !library ? PyObject_GetAttr(function, w->x->n.dict) : NULL; /* made where there is none */
    if (dict && first_visit(w, dict) == 1) rc = walk_attributes(w, dict, depth);
    Py_XDECREF(dict);
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

static inline bool is_called(PyObject *name, const char *text, Py_ssize_t length) {
    return PyUnicode_GET_LENGTH(name) == length && PyUnicode_CompareWithASCIIString(name, text) == 0;
}
#define IS_CALLED(name, text) is_called(name, text, sizeof text - 1)

/* Backward hooks run after the call and read the world as it is then: only which ones there are matters. */
static bool holds_backward_hooks(PyObject *key) {
    return IS_CALLED(key, "_backward_hooks") || IS_CALLED(key, "_backward_pre_hooks");
}

static bool is_empty(PyObject *dict, const char *name) {
    PyObject *hooks = PyDict_GetItemString(dict, name);
    return hooks && PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) == 0;
}

/* How hooks are called matters where there are some; that they came shows in another dictionary. */
static bool tells_of_no_hooks(PyObject *dict, PyObject *key) {
    if (IS_CALLED(key, "_forward_hooks_with_kwargs") || IS_CALLED(key, "_forward_hooks_always_called"))
        return is_empty(dict, "_forward_hooks");
    return IS_CALLED(key, "_forward_pre_hooks_with_kwargs") && is_empty(dict, "_forward_pre_hooks");
}

/* What Module.state_dict() and load_state_dict() read, which run in few programs. */
static bool is_for_saving(PyObject *name) {
    return IS_CALLED(name, "_non_persistent_buffers_set") || IS_CALLED(name, "_state_dict_hooks") ||
           IS_CALLED(name, "_state_dict_pre_hooks") || IS_CALLED(name, "_load_state_dict_pre_hooks") ||
           IS_CALLED(name, "_load_state_dict_post_hooks");
}

/* The attributes of a module. */
static int walk_module_dict(walker *w, PyObject *dict, int depth) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
        if (PySet_CheckExact(value) && PyUnicode_CheckExact(key) && is_for_saving(key) && first_visit(w, value) == 1) {
            if (walk_sequence(w, value, depth + 1) < 0) return -1;
            w->g->sequences.items[w->g->sequences.count - 1].saving = true;
        }
        if (!is_torchs_own(w, key, value)) continue;
        int fresh = first_visit(w, value);
        if (fresh == 1 && tells_of_no_hooks(dict, key)) continue;
        bool inside = fresh == 1 && (!PyDict_GET_SIZE(value) || !holds_backward_hooks(key));
        uint32_t before = w->g->dicts.count;
        if (fresh < 0 || (fresh == 1 && watch_items(w, value, depth + 1, inside, false) < 0)) return -1;
        if (w->g->dicts.count > before) w->g->dicts.items[before].saving = is_for_saving(key);
    }
    return walk_attributes(w, dict, depth);
}

/* Did code run that names these hooks? Module.state_dict() does. */
static bool saved(PyObject *codes) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(codes); i++)
        if (mentions(PyList_GET_ITEM(codes, i), is_for_saving)) return true;
    return false;
}

/* May code that ran have missed an attribute and gone on? Else it would have raised. */
static bool may_miss(thx *x, const thx_guards *g) {
    bool may = g->unnamed || thx_guards_may_catch(x, g);
    for (Py_ssize_t i = 0; !may && i < PyList_GET_SIZE(g->codes); i++) {
        PyObject *code = PyList_GET_ITEM(g->codes, i);
        may = mentions(code, asks_whether) && !thx_is_inner(thx_origin_of_code(x, code));
    }
    return may;
}

bool thx_guards_holds_tensor(const thx_guards *g, PyObject *tensor) {
    bool found = false;
    for (uint32_t i = 0; i < g->tensors.count && !found; i++) found = g->tensors.items[i] == tensor;
    return found;
}

bool thx_guards_may_catch(thx *x, const thx_guards *g) {
    bool may = !g || !g->codes;
    for (Py_ssize_t i = 0; !may && i < PyList_GET_SIZE(g->codes); i++) {
        PyObject *code = PyList_GET_ITEM(g->codes, i), *table = ((PyCodeObject *)code)->co_exceptiontable;
        may = table && PyBytes_GET_SIZE(table) && !thx_is_inner(thx_origin_of_code(x, code));
    }
    return may;
}

static void renew_registry(thx_guards *g) {
    for (uint32_t i = 0; i < g->others.count; i++) {
        watch_other *w = &g->others.items[i];
        PyObject *now = w->kind == WATCH_REGISTRY ? PyObject_CallNoArgs(w->object) : NULL;
        if (now) Py_SETREF(w->copy, now);
    }
    PyErr_Clear();
}

void thx_guards_ran(thx *x, thx_guards *g, PyObject *codes) {
    uint32_t kept = 0;
    Py_XSETREF(g->codes, Py_XNewRef(codes));
    if (g->registry) renew_registry(g); /* what the capture itself imported is no change */
    if (!codes) return;
    bool saves = saved(codes), misses = may_miss(x, g);
    for (uint32_t i = 0; i < g->dicts.count; i++) {
        const watch_dict *w = &g->dicts.items[i];
        if ((w->saving && !saves) || (w->bare && !misses)) {
            thx_watch_dict_clear(x, &g->dicts.items[i]);
            continue;
        }
        g->stamps.items[kept] = g->stamps.items[i];
        g->dicts.items[kept++] = g->dicts.items[i];
    }
    g->dicts.count = g->stamps.count = kept;
    kept = 0;
    for (uint32_t i = 0; i < g->sequences.count; i++) {
        if (g->sequences.items[i].saving && !saves)
            thx_watch_sequence_clear(&g->sequences.items[i]);
        else
            g->sequences.items[kept++] = g->sequences.items[i];
    }
    g->sequences.count = kept;
}

/* ---- classes ---- */

static PyObject *inside(PyObject *value) { /* of a property, a static or a class method: borrowed, or the value */
    static const char *const names[] = {"fget", "__func__", "func", NULL};
    PyTypeObject *t = Py_TYPE(value);
    if (t != &PyProperty_Type && t != &PyStaticMethod_Type && t != &PyClassMethod_Type) return value;
    PyObject *found = NULL;
    for (int i = 0; names[i] && !found; i++) {
        found = PyObject_GetAttrString(value, names[i]);
        PyErr_Clear();
    }
    Py_XDECREF(found); /* the value holds it */
    return found ? found : value;
}

/* Classes of libraries count by what they are; of others the methods are followed too. Python's library puts functions
 * of its own into some of these (enums, named tuples), and into those of libraries functions without a file
 * (dataclasses): of such ones the module of the class says whose it is. */
static bool is_users_class(thx *x, PyTypeObject *type) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(type->tp_dict, &at, &key, &value);)
        if (PyFunction_Check(inside(value)) && thx_origin_of_code(x, PyFunction_GET_CODE(inside(value))) == THX_USERS)
            return true;
    PyObject *name = PyDict_GetItemWithError(type->tp_dict, x->n.module);
    PyObject *module = name ? PyDict_GetItemWithError(PyImport_GetModuleDict(), name) : NULL;
    bool users =
        module && (is_users_module(x, module) || PyDict_GetItemString(PyModule_GetDict(module), "__file__") == NULL);
    PyErr_Clear();
    return users;
}

static int walk_class(walker *w, PyTypeObject *type, int depth);

/* Where a class is looked up what its own class holds is found too; that of abstract classes keeps a registry. */
static int walk_metaclass(walker *w, PyTypeObject *meta, int depth) {
    if (meta == &PyType_Type) return 0;
    if (is_users_class(w->x, meta) && walk_class(w, meta, depth + 1) < 0) return -1;
    bool abstract = false;
    for (Py_ssize_t i = 0; meta->tp_mro && i < PyTuple_GET_SIZE(meta->tp_mro); i++)
        abstract |= strcmp(((PyTypeObject *)PyTuple_GET_ITEM(meta->tp_mro, i))->tp_name, "ABCMeta") == 0;
    if (!abstract || w->g->registry) return 0;
    PyObject *module = PyImport_ImportModule("abc");
    PyObject *count = module ? PyObject_GetAttrString(module, "get_cache_token") : NULL;
    int rc = count ? thx_watch_other(w->x, w->g, WATCH_REGISTRY, count, NULL) : -1;
    w->g->registry = rc == 0;
    Py_XDECREF(count);
    Py_XDECREF(module);
    return rc;
}

static int walk_class(walker *w, PyTypeObject *type, int depth) {
    PyObject *mro = type->tp_mro, *key, *value;
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && mro && i < PyTuple_GET_SIZE(mro); i++) {
        PyTypeObject *base = (PyTypeObject *)PyTuple_GET_ITEM(mro, i);
        if (!PyType_Check((PyObject *)base) || !(base->tp_flags & Py_TPFLAGS_HEAPTYPE)) continue;
        if ((rc = first_visit(w, (PyObject *)base)) <= 0) continue;
        rc = thx_watch_other(w->x, w->g, WATCH_CLASS, (PyObject *)base, NULL);
        if (rc < 0 || !is_users_class(w->x, base)) continue;
        if ((rc = walk_metaclass(w, Py_TYPE(base), depth)) < 0) continue;
        PyObject *items = PyDict_Copy(base->tp_dict);
        rc = items ? 0 : -1;
        for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(items, &at, &key, &value);)
            rc = walk(w, inside(value), depth + 1);
        Py_XDECREF(items);
    }
    return rc;
}

/* Attributes in slots. */
static int walk_slots(walker *w, PyObject *o, int depth) {
    PyObject *mro = Py_TYPE(o)->tp_mro, *key, *value;
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && mro && i < PyTuple_GET_SIZE(mro); i++) {
        PyTypeObject *base = (PyTypeObject *)PyTuple_GET_ITEM(mro, i);
        if (!(base->tp_flags & Py_TPFLAGS_HEAPTYPE)) continue;
        for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(base->tp_dict, &at, &key, &value);) {
            if (Py_TYPE(value) != &PyMemberDescr_Type) continue;
            rc = thx_watch_other(w->x, w->g, WATCH_SLOT, o, key);
            PyObject *held = rc == 0 ? w->g->others.items[w->g->others.count - 1].copy : NULL;
            if (held && held != Py_NotImplemented && follows(w, key)) rc = walk(w, held, depth + 1);
        }
    }
    return rc;
}

static int walk_object(walker *w, PyObject *o, int depth) {
    thx_guards *g = w->g;
    PyObject *dict = PyObject_GetAttr(o, w->x->n.dict);
    if (!dict) PyErr_Clear();
    int rc = walk_class(w, Py_TYPE(o), depth);
    if (rc == 0) rc = walk_slots(w, o, depth);
    if (rc < 0 || !dict || !PyDict_Check(dict)) {
        if (rc == 0) PyErr_Clear();
        Py_XDECREF(dict);
        return rc;
    }
    rc = RESERVE(g->objects);
    PyObject **place = _PyObject_GetDictPtr(o);
    if (rc == 0) {
        g->objects.items[g->objects.count++] =
            (watch_object){Py_NewRef(o), (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(o)),
                           place && *place == dict ? dict : NULL, place};
        int fresh = first_visit(w, dict);
        bool module = fresh == 1 && PyObject_TypeCheck(o, w->x->NnModule);
        rc = fresh != 1 ? fresh : module ? walk_module_dict(w, dict, depth) : walk_attributes(w, dict, depth);
    }
    Py_DECREF(dict);
    return rc;
}

/* Python's own iterators, and files in memory: each use moves them on. */
static bool is_iterator(PyObject *o) {
    const char *name = Py_TYPE(o)->tp_name, *end = strrchr(name, '_');
    return PyGen_CheckExact(o) || strcmp(name, "_io.StringIO") == 0 || strcmp(name, "_io.BytesIO") == 0 ||
           (PyIter_Check(o) &&
            (strncmp(name, "itertools.", 10) == 0 || Py_TYPE(o) == &PyEnum_Type || Py_TYPE(o) == &PyZip_Type ||
             Py_TYPE(o) == &PyMap_Type || Py_TYPE(o) == &PyFilter_Type || (end && strstr(end, "iterator"))));
}

/* What reads attributes whose names its caller's code does not mention. */
static bool reads_by_string(PyObject *o) {
    const char *name = PyCFunction_Check(o) ? ((PyCFunctionObject *)o)->m_ml->ml_name : Py_TYPE(o)->tp_name;
    static const char *const readers[] = {
        "operator.attrgetter", "operator.methodcaller", "getattr", "hasattr", "vars", "dir", NULL};
    for (int i = 0; readers[i]; i++)
        if (strcmp(name, readers[i]) == 0) return true;
    return false;
}

/* ---- what shows another object ---- */

static bool is_view_of_dict(PyObject *o) {
    PyTypeObject *t = Py_TYPE(o);
    return t == &PyDictProxy_Type || t == &PyDictKeys_Type || t == &PyDictValues_Type || t == &PyDictItems_Type ||
           t == &PyODictKeys_Type || t == &PyODictValues_Type || t == &PyODictItems_Type;
}

typedef struct dict_seeker {
    PyObject *found, *besides; /* borrowed */
} dict_seeker;

static int seek_dict(PyObject *o, void *seeker) {
    dict_seeker *s = seeker;
    if (PyDict_Check(o) && o != s->besides) s->found = o;
    return 0;
}

/* Only the garbage collector is told what these hold. Borrowed, or NULL. */
static PyObject *dict_behind(PyObject *o, PyObject *besides) {
    dict_seeker s = {NULL, besides};
    if (Py_TYPE(o)->tp_traverse) (void)Py_TYPE(o)->tp_traverse(o, seek_dict, &s);
    return s.found;
}

/* Results of functools.lru_cache; libraries' hold nothing that changes. */
static int walk_memo(walker *w, PyObject *o, int depth) {
    PyObject *wrapped = PyObject_GetAttrString(o, "__wrapped__"), **place = _PyObject_GetDictPtr(o), *cache = NULL;
    bool users = wrapped && PyFunction_Check(wrapped) && !is_library(w->x, PyFunction_GET_CODE(wrapped));
    int rc = 0;
    PyErr_Clear();
    if (users && (cache = dict_behind(o, place ? *place : NULL)) && first_visit(w, cache) == 1) {
        rc = RESERVE(w->g->memos);
        if (rc == 0) w->g->memos.items[w->g->memos.count++] = Py_NewRef(PyFunction_GET_CODE(wrapped));
        if (rc == 0) rc = walk_dict(w, cache, depth);
    }
    Py_XDECREF(wrapped);
    return rc;
}

static bool was_visited(const walker *w, void *o) { return w->cap_seen && *seen_place(w->seen, w->cap_seen, o); }

/* Schedules of learning rates hold their optimizer so, and in its `step` too. */
static bool is_optimizer(walker *w, PyObject *o) {
    PyObject *optim = PyObject_GetAttrString(w->x->torch, "optim");
    PyObject *base = optim ? PyObject_GetAttrString(optim, "Optimizer") : NULL;
    int found = base ? PyObject_IsInstance(o, base) : 0;
    PyErr_Clear();
    Py_XDECREF(base);
    Py_XDECREF(optim);
    return found == 1;
}

/* A guard owns what it watches, so that a weak reference would never die; modules and optimizers live as long as their
 * callable, and what was met on another way lives with it. */
static int walk_weak(walker *w, PyObject *o, int depth) {
    PyObject *target = PyWeakref_GetObject(o); /* borrowed */
    if (!target || target == Py_None || thx_is_tensor(w->x, target)) return 0;
    bool stays = PyObject_TypeCheck(target, w->x->NnModule) || PyType_Check(target) || PyFunction_Check(target) ||
                 was_visited(w, target) || is_optimizer(w, target);
    if (!stays) w->g->weak = Py_TYPE(target);
    return walk(w, target, depth + 1);
}

/* Attributes that somebody gave a tensor, or gives it later; what transformers notes there is for itself. */
static int walk_tensor_attributes(walker *w, PyObject *tensor, int depth) {
    PyObject *dict = thx_instance_dict(tensor);
    if (!dict) return 0; /* of a class without */
    bool bare =
        !PyDict_GET_SIZE(dict) || (PyDict_GET_SIZE(dict) == 1 && PyDict_GetItemString(dict, "_is_hf_initialized"));
    uint32_t before = w->g->dicts.count;
    int rc = first_visit(w, dict);
    if (rc == 1) rc = walk_attributes(w, dict, depth);
    if (w->g->dicts.count > before) w->g->dicts.items[before].bare = bare;
    Py_DECREF(dict); /* the tensor holds it */
    return rc;
}

/* What a method of an object in C is bound to: the list of `kept.append`. Borrowed, or NULL. */
static PyObject *bound_to(PyObject *o) {
    PyObject *self = PyCFunction_Check(o) ? PyCFunction_GET_SELF(o) : NULL;
    return self && !PyModule_Check(self) && !PyType_Check(self) ? self : NULL;
}

static bool is_local(PyObject *o) {
    for (PyTypeObject *t = Py_TYPE(o); t; t = t->tp_base)
        if (strcmp(t->tp_name, "_thread._local") == 0) return true;
    return false;
}

/* What a copy of it holds matters too. */
static int walk_copy(walker *w, PyObject *o, watch_kind kind, int depth) {
    if (thx_watch_other(w->x, w->g, kind, o, NULL) < 0) return -1;
    PyObject *copy = w->g->others.items[w->g->others.count - 1].copy, *key, *value;
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && PyTuple_Check(copy) && i < PyTuple_GET_SIZE(copy); i++)
        rc = walk(w, PyTuple_GET_ITEM(copy, i), depth + 1);
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Check(copy) && PyDict_Next(copy, &at, &key, &value);)
        rc = walk(w, value, depth + 1);
    return rc;
}

static int walk_draws(walker *w, PyObject *o) {
    if (thx_watch_other(w->x, w->g, WATCH_DRAWS, o, NULL) == 0) return 0;
    PyErr_Clear(); /* one whose state is not to be had */
    return 0;
}

static int walk(walker *w, PyObject *o, int depth) {
    thx_guards *g = w->g;
    g->unnamed |= reads_by_string(o);
    if (PyDict_CheckExact(o)) { /* holds no attributes */
        int fresh = depth > 64 ? 0 : first_visit(w, o);
        return fresh == 1 ? walk_dict(w, o, depth) : fresh;
    }
    if (bound_to(o) && depth <= 64) return walk(w, bound_to(o), depth + 1);
    if (is_leaf(w->x, o) || depth > 64) return 0;
    if (PyType_Check(o)) {
        PyTypeObject *type = (PyTypeObject *)o;
        bool users = type->tp_flags & Py_TPFLAGS_HEAPTYPE && !PyObject_TypeCheck(o, w->x->NnModule);
        return users && is_users_class(w->x, type) ? walk_class(w, type, depth) : 0;
    }
    int fresh = first_visit(w, o);
    if (fresh == 0 && thx_is_tensor(w->x, o)) {
        if (RESERVE(g->tied) < 0) return -1;
        g->tied.items[g->tied.count++] = o;
    }
    if (fresh <= 0) return fresh;
    if (Py_TYPE(o) == w->x->Generator) {
        if (RESERVE(g->generators) < 0) return -1;
        g->generators.items[g->generators.count++] = Py_NewRef(o);
        return 0;
    }
    if (PyCell_Check(o)) return g->hidden = Py_TYPE(o), 0; /* held as an object: in no function that is watched */
    if (thx_is_tensor(w->x, o)) {
        if (RESERVE(g->tensors) < 0) return -1;
        g->tensors.items[g->tensors.count++] = Py_NewRef(o);
        return walk_tensor_attributes(w, o, depth);
    }
    if (PyFunction_Check(o)) return walk_function(w, o, depth);
    if (is_iterator(o)) return g->iterator = Py_TYPE(o), 0;
    if (PyWeakref_CheckRef(o)) return walk_weak(w, o, depth);
    if (is_view_of_dict(o)) {
        PyObject *dict = dict_behind(o, NULL);
        return dict ? walk(w, dict, depth + 1) : 0;
    }
    if (strcmp(Py_TYPE(o)->tp_name, "functools._lru_cache_wrapper") == 0 && walk_memo(w, o, depth) < 0) return -1;
    if (PyMethod_Check(o))
        return walk(w, PyMethod_GET_SELF(o), depth + 1) < 0 ? -1 : walk(w, PyMethod_GET_FUNCTION(o), depth + 1);
    if (strcmp(Py_TYPE(o)->tp_name, "functools.partial") == 0) return walk_copy(w, o, WATCH_PARTIAL, depth);
    if (PyODict_CheckExact(o) && PyDict_GET_SIZE(o) < 64 && thx_watch_other(w->x, g, WATCH_ORDER, o, NULL) < 0)
        return -1;
    if (PyDict_Check(o) && walk_dict(w, o, depth) < 0) return -1;
    if (strcmp(Py_TYPE(o)->tp_name, "collections.deque") == 0) return walk_deque(w, o, depth);
    if (PyObject_CheckBuffer(o) && !PyBytes_Check(o)) return walk_buffer(w, o);
    if (PyList_Check(o) || PyTuple_Check(o) || PyAnySet_Check(o)) {
        bool plain = !(Py_TYPE(o)->tp_flags & Py_TPFLAGS_HEAPTYPE); /* else it may hold attributes, too */
        if (walk_sequence(w, o, depth) < 0 || plain) return PyErr_Occurred() ? -1 : 0;
    }
    if (strcmp(Py_TYPE(o)->tp_name, "thunder._C.Callable") == 0) /* its function is captured along with ours */
        return walk_attribute(w, o, "__wrapped__", depth);
    if (is_local(o) && walk_copy(w, o, WATCH_LOCAL, depth) < 0) return -1;
    if (is_foreign_cached(w, o)) return walk_foreign(w, o);
    if (strncmp(Py_TYPE(o)->tp_name, "numpy.random.", 13) == 0) return walk_draws(w, o);
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

static int walk_users_methods(walker *w, PyObject *dict) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);)
        if (is_users_function(w->x, inside(value)) && walk(w, inside(value), 0) < 0) return -1;
    return 0;
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

int thx_guards_collect(thx *x, thx_guards *g, PyObject *roots, PyObject *names) {
    walker w = {.x = x, .g = g, .names = names};
    int rc = walk_global_hooks(&w);
    if (rc == 0) rc = watch_items(&w, x->Tensor->tp_dict, 0, false, true); /* methods put in another's place */
    if (rc == 0) rc = walk_users_methods(&w, x->Tensor->tp_dict);
    for (Py_ssize_t i = 0; rc == 0 && i < PyList_GET_SIZE(roots); i++) rc = walk_root(&w, PyList_GET_ITEM(roots, i));
    PyMem_Free(w.seen);
    return rc;
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
