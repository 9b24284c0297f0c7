/* What is watched besides dictionaries, lists, sets and variables: classes, functions, the order of ordered
 * dictionaries, deques, arrays and bytes, attributes in slots. Each kind has a copy of what it was and a way to tell
 * and to put it back. */
#include "attributes.h"
#include "guards_watch.h"

#include <string.h>

enum { MAX_BUFFER = 1 << 16 }; /* bytes that are compared at every call */

static PyObject *function_parts(PyObject *f) {
    PyObject *defaults = PyFunction_GET_DEFAULTS(f), *keywords = PyFunction_GET_KW_DEFAULTS(f);
    return PyTuple_Pack(3, PyFunction_GET_CODE(f), defaults ? defaults : Py_None, keywords ? keywords : Py_None);
}

static PyObject *partial_parts(PyObject *o) {
    static const char *const names[] = {"func", "args", "keywords", "__dict__"};
    PyObject *parts = PyTuple_New(4);
    for (int i = 0; parts && i < 4; i++) {
        PyObject *part = PyObject_GetAttrString(o, names[i]);
        if (!part)
            Py_CLEAR(parts);
        else
            PyTuple_SET_ITEM(parts, i, part);
    }
    return parts;
}

static PyObject *attributes_copy(PyObject *o) {
    PyObject *dict = thx_instance_dict(o), *copy = dict ? PyDict_Copy(dict) : NULL;
    Py_XDECREF(dict);
    return copy;
}

/* Of numpy's Generator or RandomState: what its numbers come from, which has a `state`. */
static PyObject *source_of(PyObject *o) {
    PyObject *source = PyObject_GetAttrString(o, "bit_generator");
    if (source) return source;
    PyErr_Clear();
    return PyObject_GetAttrString(o, "_bit_generator");
}

static PyObject *state_of(PyObject *o) { /* as bytes: arrays do not compare to a bool */
    PyObject *source = source_of(o), *state = source ? PyObject_GetAttrString(source, "state") : NULL;
    PyObject *pickle = state ? PyImport_ImportModule("pickle") : NULL;
    PyObject *bytes = pickle ? PyObject_CallMethod(pickle, "dumps", "O", state) : NULL;
    Py_XDECREF(pickle);
    Py_XDECREF(state);
    Py_XDECREF(source);
    return bytes;
}

static PyObject *bytes_of(PyObject *o) {
    PyObject *view = PyMemoryView_FromObject(o), *bytes = NULL;
    Py_buffer *b = view ? PyMemoryView_GET_BUFFER(view) : NULL;
    if (b && b->len <= MAX_BUFFER) bytes = PyObject_CallMethod(view, "tobytes", NULL);
    if (b && b->len > MAX_BUFFER) PyErr_SetString(PyExc_BufferError, "too large");
    Py_XDECREF(view);
    return bytes;
}

bool thx_buffer_in(PyObject *o, const thx_memory *memory) {
    Py_buffer b;
    if (!memory->bytes || PyObject_GetBuffer(o, &b, PyBUF_STRIDED_RO) < 0) return PyErr_Clear(), false;
    const char *low = b.buf, *high = low + b.itemsize;
    for (int i = 0; i < b.ndim && b.len; i++) {
        Py_ssize_t span = (b.shape[i] - 1) * b.strides[i];
        *(span < 0 ? &low : &high) += span;
    }
    bool found = b.len && low < memory->from + memory->bytes && memory->from < high;
    PyBuffer_Release(&b);
    return found;
}

bool thx_guards_buffer_in(const thx_guards *g, const thx_memory *memory) {
    bool found = false;
    for (uint32_t i = 0; i < g->others.count && !found; i++)
        found = g->others.items[i].kind == WATCH_BUFFER && thx_buffer_in(g->others.items[i].object, memory);
    return found;
}

static PyObject *read_slot(PyObject *o, PyObject *name) {
    PyObject *value = PyObject_GetAttr(o, name);
    if (value) return value;
    PyErr_Clear();
    return Py_NewRef(Py_NotImplemented); /* not assigned */
}

static PyObject *copy_of(watch_kind kind, PyObject *o, PyObject *name) {
    switch (kind) {
    case WATCH_FUNCTION: return function_parts(o);
    case WATCH_CLASS: return PyDict_Copy(((PyTypeObject *)o)->tp_dict);
    case WATCH_ORDER:
    case WATCH_DEQUE: return PySequence_Tuple(o);
    case WATCH_BUFFER: return bytes_of(o);
    case WATCH_PARTIAL: return partial_parts(o);
    case WATCH_LOCAL: return attributes_copy(o);
    case WATCH_DRAWS: return state_of(o);
    case WATCH_REGISTRY:
    case WATCH_ANSWER: return PyObject_CallNoArgs(o);
    default: return read_slot(o, name);
    }
}

/* A number that changes whenever an attribute of the class or of a base does; 0: it has none now. */
static unsigned class_version(PyTypeObject *type) {
#if PY_VERSION_HEX < 0x030C0000
    return type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG ? type->tp_version_tag : 0;
#else
    return type->tp_version_tag;
#endif
}

static unsigned new_class_version(thx *x, PyTypeObject *type) {
    if (!class_version(type)) (void)_PyType_Lookup(type, x->n.dict); /* a look-up stamps it */
    return class_version(type);
}

int thx_watch_other(thx *x, thx_guards *g, watch_kind kind, PyObject *o, PyObject *name) {
    if (RESERVE(g->others) < 0) return -1;
    PyObject *copy = copy_of(kind, o, name);
    if (!copy) return -1;
    unsigned version = kind == WATCH_CLASS ? new_class_version(x, (PyTypeObject *)o) : 0;
    g->others.items[g->others.count++] =
        (watch_other){.kind = (uint8_t)kind,
                      .version = version,
                      .object = Py_NewRef(o),
                      .copy = copy,
                      .name = Py_XNewRef(name),
                      .order = kind == WATCH_CLASS ? Py_XNewRef(((PyTypeObject *)o)->tp_mro) : NULL};
    return 0;
}

int thx_guards_ask(thx *x, thx_guards *g, PyObject *function) {
    for (uint32_t i = 0; i < g->others.count; i++)
        if (g->others.items[i].object == function) return 0;
    if (thx_watch_other(x, g, WATCH_ANSWER, function, NULL) < 0) return PyErr_Clear(), 0;
    PyObject *answer = g->others.items[g->others.count - 1].copy;
    if (PyBool_Check(answer) || PyLong_Check(answer) || PyUnicode_Check(answer)) return 0;
    watch_other *last = &g->others.items[--g->others.count]; /* not one that can be compared */
    Py_CLEAR(last->object);
    Py_CLEAR(last->copy);
    return 0;
}

static bool same_attributes(PyObject *a, PyObject *b) { /* dictionaries */
    PyObject *key, *value;
    bool same = PyDict_GET_SIZE(a) == PyDict_GET_SIZE(b);
    for (Py_ssize_t at = 0; same && PyDict_Next(a, &at, &key, &value);) {
        PyObject *now = PyDict_GetItemWithError(b, key);
        same = now && thx_same_value(value, now);
    }
    return same;
}

static bool same_items(PyObject *a, PyObject *b) { /* tuples */
    Py_ssize_t n = PyTuple_GET_SIZE(a);
    if (n != PyTuple_GET_SIZE(b)) return false;
    for (Py_ssize_t i = 0; i < n; i++)
        if (!thx_same_value(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) return false;
    return true;
}

/* What we keep in a class ourselves (custom.c) is no change of it. */
bool thx_watch_is_ours(PyObject *key) {
    const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : NULL;
    PyErr_Clear();
    return name && strncmp(name, "_thunder_", 9) == 0;
}

static bool same_class(const watch_other *w) {
    if (((PyTypeObject *)w->object)->tp_mro != w->order) return false;
    PyObject *now = ((PyTypeObject *)w->object)->tp_dict, *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(now, &at, &key, &value);) {
        PyObject *old = thx_watch_is_ours(key) ? value : PyDict_GetItemWithError(w->copy, key);
        if (!old || !thx_same_value(old, value)) return PyErr_Clear(), false;
    }
    for (Py_ssize_t at = 0; PyDict_Next(w->copy, &at, &key, &value);)
        if (!thx_watch_is_ours(key) && PyDict_Contains(now, key) != 1) return PyErr_Clear(), false;
    return true;
}

bool thx_watch_other_holds(thx *x, watch_other *w) {
    if (w->kind == WATCH_CLASS) {
        if (w->version && class_version((PyTypeObject *)w->object) == w->version) return true;
        if (!same_class(w)) return false;
        w->version = new_class_version(x, (PyTypeObject *)w->object);
        return true;
    }
    if (w->kind == WATCH_FUNCTION) { /* without making anything: there are many */
        PyObject *d = PyFunction_GET_DEFAULTS(w->object), *k = PyFunction_GET_KW_DEFAULTS(w->object);
        return PyFunction_GET_CODE(w->object) == PyTuple_GET_ITEM(w->copy, 0) &&
               (d ? d : Py_None) == PyTuple_GET_ITEM(w->copy, 1) && (k ? k : Py_None) == PyTuple_GET_ITEM(w->copy, 2);
    }
    PyObject *now = copy_of((watch_kind)w->kind, w->object, w->name);
    bool equal =
        w->kind == WATCH_BUFFER || w->kind == WATCH_REGISTRY || w->kind == WATCH_ANSWER || w->kind == WATCH_DRAWS;
    bool same = now && (w->kind == WATCH_SLOT    ? thx_same_value(w->copy, now)
                        : w->kind == WATCH_LOCAL ? same_attributes(w->copy, now)
                        : equal                  ? PyObject_RichCompareBool(w->copy, now, Py_EQ) == 1
                                                 : same_items(w->copy, now));
    PyErr_Clear();
    Py_XDECREF(now);
    return same;
}

/* ---- putting back ---- */

static void put_back_class(const watch_other *w) {
    PyObject *now = PyDict_Copy(((PyTypeObject *)w->object)->tp_dict), *key, *value;
    for (Py_ssize_t at = 0; now && PyDict_Next(now, &at, &key, &value);)
        if (!thx_watch_is_ours(key) && !PyDict_GetItemWithError(w->copy, key))
            (void)PyObject_SetAttr(w->object, key, NULL);
    for (Py_ssize_t at = 0; now && PyDict_Next(w->copy, &at, &key, &value);)
        if (PyDict_GetItemWithError(now, key) != value) (void)PyObject_SetAttr(w->object, key, value);
    Py_XDECREF(now);
}

static void put_back_function(const watch_other *w) {
    static const char *const names[] = {"__code__", "__defaults__", "__kwdefaults__"};
    for (int i = 0; i < 3; i++) (void)PyObject_SetAttrString(w->object, names[i], PyTuple_GET_ITEM(w->copy, i));
}

static void put_back_contents(const watch_other *w, const char *add) {
    PyObject *done = PyObject_CallMethod(w->object, "clear", NULL);
    Py_XDECREF(done);
    done = done ? PyObject_CallMethod(w->object, add, "(O)", w->copy) : NULL;
    Py_XDECREF(done);
}

static void put_back_order(const watch_other *w) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(w->copy); i++) {
        PyObject *done = PyObject_CallMethod(w->object, "move_to_end", "O", PyTuple_GET_ITEM(w->copy, i));
        PyErr_Clear(); /* a key that the dictionary's own guard brings back */
        Py_XDECREF(done);
    }
}

static void put_back_buffer(const watch_other *w) {
    if (PyByteArray_Check(w->object)) {
        put_back_contents(w, "extend");
        return;
    }
    Py_buffer b;
    if (PyObject_GetBuffer(w->object, &b, PyBUF_WRITABLE | PyBUF_SIMPLE) < 0) return;
    if (b.len == PyBytes_GET_SIZE(w->copy)) memcpy(b.buf, PyBytes_AS_STRING(w->copy), (size_t)b.len);
    PyBuffer_Release(&b);
}

static void put_back_partial(const watch_other *w) {
    PyObject *done = PyObject_CallMethod(w->object, "__setstate__", "(O)", w->copy);
    Py_XDECREF(done);
}

static void put_back_attributes(const watch_other *w) {
    PyObject *dict = thx_instance_dict(w->object);
    if (dict) PyDict_Clear(dict);
    if (dict) (void)PyDict_Update(dict, w->copy);
    Py_XDECREF(dict);
}

static void put_back_draws(const watch_other *w) {
    PyObject *pickle = PyImport_ImportModule("pickle");
    PyObject *state = pickle ? PyObject_CallMethod(pickle, "loads", "O", w->copy) : NULL,
             *source = source_of(w->object);
    if (state && source) (void)PyObject_SetAttrString(source, "state", state);
    Py_XDECREF(source);
    Py_XDECREF(state);
    Py_XDECREF(pickle);
}

void thx_watch_other_put_back(const watch_other *w) {
    switch ((watch_kind)w->kind) {
    case WATCH_CLASS: put_back_class(w); break;
    case WATCH_FUNCTION: put_back_function(w); break;
    case WATCH_DEQUE: put_back_contents(w, "extend"); break;
    case WATCH_ORDER: put_back_order(w); break;
    case WATCH_BUFFER: put_back_buffer(w); break;
    case WATCH_PARTIAL: put_back_partial(w); break;
    case WATCH_LOCAL: put_back_attributes(w); break;
    case WATCH_DRAWS: put_back_draws(w); break;
    case WATCH_REGISTRY: /* nothing is ever taken off it */
    case WATCH_ANSWER: break;
    case WATCH_SLOT: (void)PyObject_SetAttr(w->object, w->name, w->copy == Py_NotImplemented ? NULL : w->copy); break;
    }
    PyErr_Clear();
}

const char *thx_watch_other_text(const watch_other *w) {
    static const char *const texts[] = {[WATCH_FUNCTION] = "the code or the defaults of a function",
                                        [WATCH_CLASS] = "an attribute of a class",
                                        [WATCH_ORDER] = "the order of a dictionary",
                                        [WATCH_DEQUE] = "a deque",
                                        [WATCH_BUFFER] = "an array or bytes",
                                        [WATCH_SLOT] = "an attribute of an object",
                                        [WATCH_PARTIAL] = "a functools.partial",
                                        [WATCH_LOCAL] = "a threading.local",
                                        [WATCH_DRAWS] = "a generator of numpy's",
                                        [WATCH_REGISTRY] = "the registry of an abstract class",
                                        [WATCH_ANSWER] = "a setting of torch or of a logger"};
    return texts[w->kind];
}

/* ---- a is b ---- */

static int opcode_of(const char *name) { /* this Python's number; -1 */
    PyObject *module = PyImport_ImportModule("opcode"), *map = module ? PyObject_GetAttrString(module, "opmap") : NULL;
    PyObject *number = map ? PyDict_GetItemString(map, name) : NULL; /* borrowed */
    long found = number ? PyLong_AsLong(number) : -1;
    PyErr_Clear();
    Py_XDECREF(map);
    Py_XDECREF(module);
    return (int)found;
}

static bool code_compares(PyCodeObject *code, int is, int constant) {
    PyObject *bytes = PyCode_GetCode(code);
    bool found = false;
    int before = 0;
    for (Py_ssize_t i = 0; bytes && i + 1 < PyBytes_GET_SIZE(bytes) && !found; i += 2) {
        int op = (unsigned char)PyBytes_AS_STRING(bytes)[i];
        found = op == is && before != constant; /* x is None asks for nothing */
        if (op) before = op;                    /* 0: room for the interpreter's caches */
    }
    Py_XDECREF(bytes);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code->co_consts) && !found; i++) {
        PyObject *inner = PyTuple_GET_ITEM(code->co_consts, i);
        found = PyCode_Check(inner) && code_compares((PyCodeObject *)inner, is, constant);
    }
    PyErr_Clear();
    return found;
}

static bool any_code_has(const thx_guards *g, int is, int constant) {
    bool found = false;
    for (uint32_t i = 0; i < g->others.count && !found; i++)
        found = g->others.items[i].kind == WATCH_FUNCTION &&
                code_compares((PyCodeObject *)PyFunction_GET_CODE(g->others.items[i].object), is, constant);
    return found;
}

bool thx_guards_compares_identity(const thx_guards *g) {
    return any_code_has(g, opcode_of("IS_OP"), opcode_of("LOAD_CONST"));
}

bool thx_guards_finds(const thx_guards *g) { return any_code_has(g, opcode_of("CONTAINS_OP"), -1); }
