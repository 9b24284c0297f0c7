/* Whose a file of code is: see origin.h. By the folder that it lies in, not by words in its path: a user's program may
 * lie in a folder called torch, and packages may be installed anywhere.
 */
#include "origin.h"

#include <string.h>

/* The folder of a file, with its last slash; new reference, or NULL. */
static PyObject *folder_of(const char *module) {
    PyObject *found = PyImport_ImportModule(module), *file = found ? PyObject_GetAttrString(found, "__file__") : NULL;
    const char *path = file && PyUnicode_Check(file) ? PyUnicode_AsUTF8(file) : NULL,
               *end = path ? strrchr(path, '/') : NULL;
    PyObject *folder = end ? PyUnicode_FromStringAndSize(path, end - path + 1) : NULL;
    PyErr_Clear();
    Py_XDECREF(file);
    Py_XDECREF(found);
    return folder;
}

int thx_origin_init(thx *x) {
    x->origins = PyDict_New();
    x->folders.standard = folder_of("os");
    x->folders.torch = folder_of("torch");
    x->folders.thunder = folder_of("thunder._errors");
    return x->origins ? 0 : -1;
}

/* What follows the folder, or NULL: the path lies elsewhere. */
static const char *below(PyObject *folder, const char *path) {
    Py_ssize_t n = 0;
    const char *text = folder ? PyUnicode_AsUTF8AndSize(folder, &n) : NULL;
    PyErr_Clear();
    return text && strncmp(path, text, (size_t)n) == 0 ? path + n : NULL;
}

/* The parts of this package that run on behalf of the compiler; others, such as transforms, have lines of interest. */
static bool is_inner_part(const char *path) {
    static const char *const parts[] = {"_", "extend/", "examine/", "executors/", NULL};
    for (int i = 0; parts[i]; i++)
        if (strncmp(path, parts[i], strlen(parts[i])) == 0) return true;
    return false;
}

static bool is_installed(PyObject *file) { /* elsewhere than in the usual folders */
    PyObject *module = PyImport_ImportModule("thunder._origin");
    PyObject *answer = module ? PyObject_CallMethod(module, "installed", "O", file) : NULL;
    bool found = answer && PyObject_IsTrue(answer) == 1;
    PyErr_Clear();
    Py_XDECREF(answer);
    Py_XDECREF(module);
    return found;
}

static thx_origin find(thx *x, PyObject *file) {
    const char *path = PyUnicode_AsUTF8(file);
    PyErr_Clear();
    if (!path) return THX_USERS;
    if (strncmp(path, "<frozen", 7) == 0) return THX_FROZEN;
    if (strcmp(path, "<string>") == 0) return THX_GENERATED;
    if (below(x->folders.torch, path)) return THX_TORCHS;
    const char *ours = below(x->folders.thunder, path);
    if (ours && is_inner_part(ours)) return THX_OURS;
    if (strstr(path, "/site-packages/") || strstr(path, "/dist-packages/")) return THX_PACKAGES;
    if (below(x->folders.standard, path)) return THX_STANDARD;
    return is_installed(file) ? THX_PACKAGES : THX_USERS;
}

thx_origin thx_origin_of(thx *x, PyObject *file) {
    if (!file || !PyUnicode_Check(file)) return THX_USERS;
    PyObject *known = PyDict_GetItemWithError(x->origins, file);
    if (known) return (thx_origin)PyLong_AsLong(known);
    PyObject *type, *value, *trace; /* a pending exception is kept */
    PyErr_Fetch(&type, &value, &trace);
    thx_origin o = find(x, file);
    known = PyLong_FromLong(o);
    if (known) (void)PyDict_SetItem(x->origins, file, known);
    Py_XDECREF(known);
    PyErr_Restore(type, value, trace);
    return o;
}

thx_origin thx_origin_of_code(thx *x, PyObject *code) { return thx_origin_of(x, ((PyCodeObject *)code)->co_filename); }
