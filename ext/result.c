/* What captured code returned, seen as a value that is made anew at each call.
 *
 * A container of the arguments is returned as the caller's own; one that existed before the capture is returned itself;
 * a fresh one is rebuilt. What can be neither kept nor rebuilt is refused.
 */
#include "describe.h"

#include "attributes.h"

static bool is_iterator(PyObject *o) { return PyGen_Check(o) || PyCoro_CheckExact(o) || PyIter_Check(o); }

/* ---- what cannot be returned ---- */

static int refuse_result(thx_describer *d, PyObject *o, const char *reason, const char *fix) {
    char text[160];
    snprintf(text, sizeof text, "a result of type %.100s", Py_TYPE(o)->tp_name);
    return thx_capture_error(d->r, text, reason, fix);
}

typedef struct fake_search {
    thx *x;
    int depth, budget;
} fake_search;

static int find_fake(PyObject *o, void *arg) {
    fake_search *f = arg;
    if (!o || PyType_Check(o) || PyModule_Check(o) || PyObject_TypeCheck(o, f->x->NnModule)) return 0;
    if (thx_is_fake(f->x, o)) return 1;
    if (PyFunction_Check(o)) { /* its globals hold the world */
        PyObject *parts[] = {PyFunction_GET_CLOSURE(o), PyFunction_GET_DEFAULTS(o), PyFunction_GET_KW_DEFAULTS(o)};
        for (int i = 0; i < 3; i++)
            if (find_fake(parts[i], arg)) return 1;
        return 0;
    }
    traverseproc traverse = PyObject_IS_GC(o) ? Py_TYPE(o)->tp_traverse : NULL;
    if (!traverse || f->depth > 5 || --f->budget < 0) return 0;
    f->depth++;
    int found = traverse(o, find_fake, arg);
    f->depth--;
    return found;
}

/* An object that is returned as it is must not hold what exists only during the capture. */
int thx_describe_opaque_result(thx_describer *d, thx_spec *s, PyObject *o) {
    if (is_iterator(o)) return refuse_result(d, o, "it can be run through only once", "return a list or a tuple");
    fake_search f = {d->x, 0, 10000};
    if (find_fake(o, &f))
        return refuse_result(d, o, "it holds a tensor and cannot be made anew at each call",
                             "return the tensor itself, or a tuple, list, dictionary or plain object");
    return thx_describe_const(s, o, true);
}

bool thx_holds_fake(thx *x, PyObject *o) {
    fake_search f = {x, 0, 10000};
    return find_fake(o, &f);
}

int thx_refuse_hashed(thx_describer *d, PyObject *o, PyObject *keys) {
    if (!d->r || !thx_holds_fake(d->x, keys)) return 0;
    return refuse_result(d, o, "a set, or the keys of a dictionary, hold a tensor",
                         "use a list, or values of a dictionary");
}

/* ---- what is fresh ---- */

bool thx_held_elsewhere(const thx_describer *d, PyObject *o) {
    PyObject *id = PyLong_FromVoidPtr(o), *count = id ? PyDict_GetItemWithError(d->counts, id) : NULL;
    bool held = !count || Py_REFCNT(o) > PyLong_AsLong(count);
    Py_XDECREF(id);
    return held;
}

bool thx_has_tensor_inside(const thx_describer *d, PyObject *o) {
    PyObject *id = PyLong_FromVoidPtr(o);
    bool found = id && PySet_Contains(d->tensors, id) == 1;
    Py_XDECREF(id);
    return found;
}

/* How often does the result refer to each of its objects, and which hold tensors? 1 this one does, 0 not, -1 error. */
static int survey(thx_describer *d, PyObject *o, int depth) {
    thx *x = d->x;
    if (thx_is_tensor(x, o)) return 1;
    if (depth > THX_MAX_DEPTH || thx_is_plain_value(x, o) || thx_is_opaque_value(x, o)) return 0;
    PyObject *id = PyLong_FromVoidPtr(o), *count = id ? PyDict_GetItemWithError(d->counts, id) : NULL;
    PyObject *more = id ? PyLong_FromLong((count ? PyLong_AsLong(count) : 0) + 1) : NULL;
    int rc = more ? PyDict_SetItem(d->counts, id, more) : -1, found = 0;
    Py_XDECREF(more);
    if (rc < 0 || count) {
        found = rc < 0 ? -1 : thx_has_tensor_inside(d, o);
        Py_XDECREF(id);
        return found;
    }
    PyObject *attributes = thx_attributes(o, thx_count_members(Py_TYPE(o)) > 0), *value;
    for (Py_ssize_t at = 0; found >= 0 && attributes && PyDict_Next(attributes, &at, NULL, &value);)
        found = (rc = survey(d, value, depth + 1)) < 0 ? -1 : found | rc;
    Py_XDECREF(attributes);
    for (Py_ssize_t at = 0; found >= 0 && PyDict_Check(o) && PyDict_Next(o, &at, NULL, &value);)
        found = (rc = survey(d, value, depth + 1)) < 0 ? -1 : found | rc;
    for (Py_ssize_t i = 0; found >= 0 && (PyTuple_Check(o) || PyList_Check(o)) && i < PySequence_Fast_GET_SIZE(o); i++)
        found = (rc = survey(d, PySequence_Fast_ITEMS(o)[i], depth + 1)) < 0 ? -1 : found | rc;
    if (found == 1 && PySet_Add(d->tensors, id) < 0) found = -1;
    Py_DECREF(id);
    return found;
}

int thx_result_init(thx_recorder *r, thx_spec *spec, PyObject *result, const thx_inputs *inputs,
                    const thx_guards *guards, thx_leaves *leaves) {
    thx_describer d = {.x = r->x, .leaves = leaves, .r = r, .guards = guards};
    d.seen = PyDict_New();
    d.inputs = Py_XNewRef(inputs->index);
    d.counts = PyDict_New();
    d.tensors = PySet_New(NULL);
    int rc = d.seen && d.inputs && d.counts && d.tensors ? 0 : -1;
    rc = rc == 0 && survey(&d, result, 0) < 0 ? -1 : rc;
    rc = rc == 0 ? thx_describe(&d, spec, result, 0) : rc;
    Py_XDECREF(d.seen);
    Py_XDECREF(d.inputs);
    Py_XDECREF(d.counts);
    Py_XDECREF(d.tensors);
    return rc;
}
