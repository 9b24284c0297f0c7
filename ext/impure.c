/* Which functions in C do more, or ask for more, than their arguments say: those that purity.c refuses. Three tables:
 * functions and methods by name, whole modules, and types whose instances hold no state that guards miss. A method in C
 * of an instance of any other type may read what nobody watches, or write what nobody replays: of a file, a queue, a
 * socket, a class of an extension.
 */
#include "impure.h"
#include "capture.h"

#include <string.h>

typedef struct impure_name {
    const char *module, *name, *why;
} impure_name;

static const char prints[] = "it prints", waits[] = "it waits for input", clock_[] = "it reads the clock",
                  files[] = "it opens a file", system_[] = "it asks the operating system",
                  identity_[] = "it asks for an object's address", interpreter[] = "it asks the interpreter",
                  date_[] = "it asks for the date", state[] = "it has state that cannot be watched";

static const impure_name names[] = {{"builtins", "print", prints},
                                    {"builtins", "input", waits},
                                    {"io", "open", files},
                                    {"io", "open_code", files},
                                    {"time", "time", clock_},
                                    {"time", "time_ns", clock_},
                                    {"time", "perf_counter", clock_},
                                    {"time", "perf_counter_ns", clock_},
                                    {"time", "monotonic", clock_},
                                    {"time", "monotonic_ns", clock_},
                                    {"time", "process_time", clock_},
                                    {"time", "process_time_ns", clock_},
                                    {"time", "process_time_ns", clock_},
                                    {"time", "thread_time", clock_},
                                    {"time", "thread_time_ns", clock_},
                                    {"time", "clock_gettime", clock_},
                                    {"time", "clock_gettime_ns", clock_},
                                    {"time", "localtime", clock_},
                                    {"time", "gmtime", clock_},
                                    {"time", "ctime", clock_},
                                    {"time", "asctime", clock_},
                                    {"time", "strftime", clock_},
                                    {"time", "sleep", clock_},
                                    {"datetime", "datetime.now", date_},
                                    {"datetime", "datetime.utcnow", date_},
                                    {"datetime", "date.today", date_},
                                    {"_thread", "LockType.locked", state},
                                    {"_decimal", "getcontext", state},
                                    {"_decimal", "setcontext", state},
                                    {"sys", "getrefcount", interpreter},
                                    {"_weakref", "getweakrefcount", interpreter},
                                    {"_thread", "get_ident", interpreter},
                                    {"_thread", "get_native_id", interpreter},
                                    {"sys", "getrecursionlimit", interpreter},
                                    {"sys", "setrecursionlimit", interpreter},
                                    {"sys", "getswitchinterval", interpreter},
                                    {"sys", "setswitchinterval", interpreter},
                                    {"_uuid", "generate_time_safe", system_},
                                    {"builtins", "id", identity_},
                                    {NULL, NULL, NULL}};

static const impure_name modules[] = {{"posix", NULL, system_},
                                      {"nt", NULL, system_},
                                      {"gc", NULL, interpreter},
                                      {"_socket", NULL, system_},
                                      {"select", NULL, system_},
                                      {"fcntl", NULL, system_},
                                      {"resource", NULL, system_},
                                      {"pwd", NULL, system_},
                                      {"grp", NULL, system_},
                                      {"_signal", NULL, system_},
                                      {"termios", NULL, system_},
                                      {"_sqlite3", NULL, system_},
                                      {"_posixsubprocess", NULL, system_},
                                      {NULL, NULL, NULL}};

/* Of the operating system's module: what computes with its argument. */
static const char *const computes[] = {"fspath", "_path_normpath", "_path_splitroot", "_path_splitroot_ex", NULL};

/* Types of these modules hold nothing, are watched, or are refused elsewhere. */
static const char *const watched[] = {"torch.",        "numpy.",     "thunder.",      "builtins.",    "collections.",
                                      "_collections.", "functools.", "itertools.",    "re.",          "_sre.",
                                      "array.",        "datetime.",  "decimal.",      "types.",       "typing.",
                                      "weakref.",      "_weakref.",  "operator.",     "_operator.",   "_thread.",
                                      "_struct.",      "_abc.",      "_contextvars.", "_random.",     "_ctypes.",
                                      "time.",         "os.",        "sys.",          "unicodedata.", NULL};

static bool is_among(const char *name, const char *const *list) {
    for (; *list; list++)
        if (strcmp(name, *list) == 0) return true;
    return false;
}

/* The definition of a function in C, of a method of a type, or of a method of a class; NULL: it is none of these. */
static const PyMethodDef *definition(PyObject *function) {
    if (PyCFunction_Check(function)) return ((PyCFunctionObject *)function)->m_ml;
    return Py_IS_TYPE(function, &PyMethodDescr_Type) ? ((PyMethodDescrObject *)function)->d_method : NULL;
}

static PyObject *get_path(const char *module, const char *path) {
    PyObject *found = PyImport_ImportModule(module);
    char part[60];
    for (const char *at = path; found && at;) {
        const char *dot = strchr(at, '.');
        snprintf(part, sizeof part, "%.*s", dot ? (int)(dot - at) : 50, at);
        Py_SETREF(found, PyObject_GetAttrString(found, part));
        at = dot ? dot + 1 : NULL;
    }
    return found;
}

int thx_impure_init(thx *x) {
    x->impure = PyDict_New();
    if (!x->impure) return -1;
    for (const impure_name *n = names; n->module; n++) {
        PyObject *function = get_path(n->module, n->name);
        const PyMethodDef *def = function ? definition(function) : NULL;
        PyObject *id = def ? PyLong_FromVoidPtr((void *)def) : NULL;
        PyObject *row = id ? PyLong_FromVoidPtr((void *)n) : NULL;
        int rc = row ? PyDict_SetItem(x->impure, id, row) : 0;
        PyErr_Clear(); /* one that this Python has not */
        Py_XDECREF(row);
        Py_XDECREF(id);
        Py_XDECREF(function);
        if (rc < 0) return -1;
    }
    return 0;
}

/* The type that a method of an instance is defined in, or NULL. */
static PyTypeObject *definer(PyObject *self, const PyMethodDef *method) {
    PyObject *order = PyType_Check(self) ? NULL : Py_TYPE(self)->tp_mro;
    for (Py_ssize_t i = 0; order && i < PyTuple_GET_SIZE(order); i++) {
        PyTypeObject *type = (PyTypeObject *)PyTuple_GET_ITEM(order, i);
        for (const PyMethodDef *m = PyType_Check(type) ? type->tp_methods : NULL; m && m->ml_name; m++)
            if (m == method) return type;
    }
    return NULL;
}

static bool is_watched(const PyTypeObject *type) {
    if (!strchr(type->tp_name, '.')) return true; /* of builtins */
    for (const char *const *w = watched; *w; w++)
        if (strncmp(type->tp_name, *w, strlen(*w)) == 0) return true;
    return false;
}

static const char *of_module(PyObject *self, const PyMethodDef *method) {
    const char *name = PyModule_GetName(self);
    PyErr_Clear();
    for (const impure_name *m = modules; name && m->module; m++)
        if (strcmp(name, m->module) == 0) return is_among(method->ml_name, computes) ? NULL : m->why;
    return NULL;
}

static bool writes_to(const PyMethodDef *method) { return strncmp(method->ml_name, "write", 5) == 0; }

int thx_impure_why(thx *x, PyObject *function, thx_impurity *found) {
    const PyMethodDef *method = ((PyCFunctionObject *)function)->m_ml;
    PyObject *self = PyCFunction_GET_SELF(function), *id = PyLong_FromVoidPtr((void *)method);
    PyObject *row = id ? PyDict_GetItemWithError(x->impure, id) : NULL;
    Py_XDECREF(id);
    *found = (thx_impurity){0};
    if (row) found->why = ((const impure_name *)PyLong_AsVoidPtr(row))->why;
    if (PyErr_Occurred()) return -1;
    if (!found->why && self && PyModule_Check(self)) found->why = of_module(self, method);
    PyTypeObject *type = !found->why && self && !PyModule_Check(self) ? definer(self, method) : NULL;
    if (type && !is_watched(type)) {
        found->why = state;
        found->type = type->tp_name;
    }
    found->prints = found->why == prints || (type && strncmp(type->tp_name, "_io.", 4) == 0 && writes_to(method));
    found->asks = found->why == system_ || found->why == interpreter || found->why == date_;
    found->of_caller = found->why == identity_;
    return 0;
}
