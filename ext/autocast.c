/* Operations under autocast.
 *
 * What autocast does to an operation is found out by running it on fakes: torch's casts of its inputs are listed, and
 * the kernels that follow. Where the same kernels follow with the inputs cast first and autocast off, the operation is
 * recorded as these casts and itself, by our own rules like any other. It is left to layer 2, which records the kernels
 * one by one, where a cast is of something else, and where it writes. What was found is kept for operations of the same
 * kind on inputs of the same kind.
 */
#include "autocast.h"

#include "ambient.h"
#include "observe.h"
#include "sizes.h"

#include <string.h>

/* ---- the kinds of an operation's arguments ---- */

static PyObject *kind_of(thx_recorder *r, PyObject *o, bool known);

static PyObject *kind_of_tensor(thx_recorder *r, PyObject *tensor, bool known) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    if (!cell) return NULL;
    th_typeref ref = r->t->values[cell->value].type;
    const th_type *type = th_type_get(r->x->ctx, ref);
    return known ? Py_BuildValue("(iiI)", type->dtype, type->device, type->ndim) : PyLong_FromLong((long)ref);
}

static PyObject *kinds_of(thx_recorder *r, PyObject *sequence, bool known) {
    Py_ssize_t n = PySequence_Fast_GET_SIZE(sequence);
    PyObject *kinds = PyTuple_New(n + 1);
    if (kinds) PyTuple_SET_ITEM(kinds, n, Py_NewRef((PyObject *)Py_TYPE(sequence)));
    for (Py_ssize_t i = 0; kinds && i < n; i++) {
        PyObject *kind = kind_of(r, PySequence_Fast_ITEMS(sequence)[i], known);
        if (!kind)
            Py_CLEAR(kinds);
        else
            PyTuple_SET_ITEM(kinds, i, kind);
    }
    return kinds;
}

/* `known`: of an operation with a rule of ours, whose casts depend on no sizes and no ints. */
static PyObject *kind_of(thx_recorder *r, PyObject *o, bool known) {
    if (thx_is_tensor(r->x, o)) return kind_of_tensor(r, o, known);
    if (PyTuple_Check(o) || PyList_Check(o)) return kinds_of(r, o, known);
    if (PySlice_Check(o)) return Py_NewRef((PyObject *)Py_TYPE(o));
    if (PyDict_Check(o)) {
        PyObject *items = PyDict_Items(o), *kinds = items ? kinds_of(r, items, known) : NULL;
        Py_XDECREF(items);
        return kinds;
    }
    bool extent = Py_TYPE(o) == r->x->extent_type;
    if (known && (extent || PyLong_CheckExact(o))) return Py_NewRef((PyObject *)&PyLong_Type);
    if (extent) return thx_extent_plain(o);
    return PyTuple_Pack(2, Py_TYPE(o), o); /* 1, 1.0 and True are equal */
}

static PyObject *key_of(const thx_recording *c, const thx_ambient *a) {
    bool known = c->def && c->def->meta;
    PyObject *none = Py_None, *args = kind_of(c->r, c->args, known);
    PyObject *kwargs = args && c->kwargs ? kind_of(c->r, c->kwargs, known) : Py_XNewRef(args ? none : NULL);
    PyObject *key = kwargs ? PyTuple_Pack(5, c->func, a->autocast_cpu ? a->cpu_dtype : none,
                                          a->autocast_gpu ? a->gpu_dtype : none, args, kwargs)
                           : NULL;
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    return key;
}

/* ---- arguments with other tensors ---- */

typedef struct change {
    thx_recorder *r;
    PyObject *from, *to; /* tuples of fakes, and of what takes their place */
} change;

static PyObject *put_other(void *user, PyObject *o) {
    const change *c = user;
    thx_cell *cell = thx_is_tensor(c->r->x, o) ? thx_recorder_cell(c->r, o) : NULL;
    for (Py_ssize_t i = 0; cell && i < PyTuple_GET_SIZE(c->from); i++) {
        thx_cell *other = thx_recorder_cell(c->r, PyTuple_GET_ITEM(c->from, i));
        if (other && other->value == cell->value) return Py_NewRef(PyTuple_GET_ITEM(c->to, i));
    }
    return PyErr_Occurred() ? NULL : Py_NewRef(o);
}

static PyObject *changed(change *c, PyObject *o) { return thx_map_arguments(c->r->x, o, put_other, c); }

/* ---- what torch does ---- */

/* The kernels that a call reaches, each (overload, args, kwargs, result). Consumes neither. */
static PyObject *kernels_of(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs) {
    PyObject *heard = r->heard = PyList_New(0),
             *result = heard ? thx_call_under_fake_mode(r, func, args, kwargs) : NULL;
    r->heard = NULL;
    if (!result) Py_CLEAR(heard);
    Py_XDECREF(result);
    return heard;
}

/* _to_copy(one of the inputs, dtype=...) and nothing else: its place among the inputs, else -1. */
static int cast_of(const thx_recorder *r, PyObject *kernel) {
    PyObject *args = PyTuple_GET_ITEM(kernel, 1), *kwargs = PyTuple_GET_ITEM(kernel, 2), *key, *value;
    if (PyTuple_GET_ITEM(kernel, 0) != r->x->to_copy || PyTuple_GET_SIZE(args) != 1 || !PyDict_Check(kwargs)) return -1;
    thx_meta from, to;
    if (thx_read_meta(r->x, PyTuple_GET_ITEM(args, 0), true, &from) < 0 ||
        thx_read_meta(r->x, PyTuple_GET_ITEM(kernel, 3), true, &to) < 0)
        return PyErr_Clear(), -1;
    if (th_dtype_get(from.dtype)->class_ != 'f' || th_dtype_get(to.dtype)->class_ != 'f') return -1;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &key, &value);)
        if (value != Py_None && PyUnicode_CompareWithASCIIString(key, "dtype") != 0) return -1;
    for (uint32_t i = 0; i < r->ninputs; i++)
        if (r->inputs[i] == PyTuple_GET_ITEM(args, 0)) return (int)i;
    return -1;
}

static bool same_argument(thx *x, PyObject *a, PyObject *b) {
    if (thx_is_tensor(x, a) && thx_is_tensor(x, b)) {
        thx_meta m, n;
        if (thx_read_meta(x, a, true, &m) < 0 || thx_read_meta(x, b, true, &n) < 0) return PyErr_Clear(), false;
        return m.dtype == n.dtype && m.ndim == n.ndim && m.device == n.device &&
               memcmp(m.shape, n.shape, sizeof *m.shape * (size_t)m.ndim) == 0;
    }
    if (Py_TYPE(a) != Py_TYPE(b)) return false;
    if (PyTuple_Check(a) || PyList_Check(a)) {
        Py_ssize_t n = PySequence_Fast_GET_SIZE(a);
        bool same = n == PySequence_Fast_GET_SIZE(b);
        for (Py_ssize_t i = 0; same && i < n; i++)
            same = same_argument(x, PySequence_Fast_ITEMS(a)[i], PySequence_Fast_ITEMS(b)[i]);
        return same;
    }
    if (PyDict_Check(a)) {
        bool same = PyDict_GET_SIZE(a) == PyDict_GET_SIZE(b);
        PyObject *key, *value;
        for (Py_ssize_t at = 0; same && PyDict_Next(a, &at, &key, &value);) {
            PyObject *other = PyDict_GetItemWithError(b, key);
            same = other && same_argument(x, value, other);
        }
        return same;
    }
    return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

static bool same_kernels(thx *x, PyObject *a, PyObject *b) { /* lists */
    bool same = PyList_GET_SIZE(a) == PyList_GET_SIZE(b);
    for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(a); i++) {
        PyObject *p = PyList_GET_ITEM(a, i), *q = PyList_GET_ITEM(b, i);
        same = PyTuple_GET_ITEM(p, 0) == PyTuple_GET_ITEM(q, 0);
        for (int k = 1; same && k < 4; k++) same = same_argument(x, PyTuple_GET_ITEM(p, k), PyTuple_GET_ITEM(q, k));
    }
    PyErr_Clear();
    return same;
}

/* The casts at work, by place among the inputs: a list of (place, dtype), and the kernels without them; what the casts
 * gave goes to from and to. */
static PyObject *sort(thx_recorder *r, PyObject *kernels, PyObject *rest, PyObject *from, PyObject *to) {
    PyObject *casts = PyList_New(0);
    for (Py_ssize_t i = 0; casts && i < PyList_GET_SIZE(kernels); i++) {
        PyObject *kernel = PyList_GET_ITEM(kernels, i);
        int place = cast_of(r, kernel);
        PyObject *cast =
            place < 0 ? NULL
                      : Py_BuildValue("(iN)", place, PyObject_GetAttrString(PyTuple_GET_ITEM(kernel, 3), "dtype"));
        int rc = place < 0                        ? PyList_Append(rest, kernel)
                 : !cast                          ? -1
                 : PyList_Append(casts, cast) < 0 ? -1
                 : PyList_Append(from, PyTuple_GET_ITEM(PyTuple_GET_ITEM(kernel, 1), 0)) < 0
                     ? -1
                     : PyList_Append(to, PyTuple_GET_ITEM(kernel, 3));
        Py_XDECREF(cast);
        if (rc < 0) Py_CLEAR(casts);
    }
    return casts;
}

/* Kernels that call further operations through the dispatcher, where autocast meets them in eager; a plan runs them
 * with autocast off. */
static bool casts_inside(PyObject *kernels) {
    static const char *const names[] = {"aten._trilinear", "aten.linalg_pinv"};
    bool found = false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(kernels) && !found; i++) {
        PyObject *text = PyObject_Str(PyTuple_GET_ITEM(PyList_GET_ITEM(kernels, i), 0));
        const char *name = text ? PyUnicode_AsUTF8(text) : NULL;
        for (size_t k = 0; name && k < sizeof names / sizeof *names; k++)
            found |= strncmp(name, names[k], strlen(names[k])) == 0;
        PyErr_Clear();
        Py_XDECREF(text);
    }
    return found;
}

static bool cast_twice(PyObject *from) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(from); i++)
        for (Py_ssize_t k = 0; k < i; k++)
            if (PyList_GET_ITEM(from, i) == PyList_GET_ITEM(from, k)) return true;
    return false;
}

/* The casts as a tuple; None: the operation is not these and itself; False: only eager can tell what it is. NULL with
 * an exception. */
static PyObject *find_casts(thx_recording *c) {
    thx_recorder *r = c->r;
    thx_autocast was = {false, false};
    PyObject *none = Py_None, *casts = NULL, *answer = NULL, *rest = PyList_New(0);
    PyObject *from = PyList_New(0), *to = PyList_New(0);
    PyObject *args = thx_fakeify(r, c->args), *kwargs = args && c->kwargs ? thx_fakeify(r, c->kwargs) : NULL;
    PyObject *kernels = NULL, *plain = NULL;
    if (!args || (c->kwargs && !kwargs) || !rest || !from || !to) goto done;
    for (uint32_t i = 0; i < r->ninputs; i++)
        if (!(r->inputs[i] = thx_recorder_fake(r, r->inputs[i]))) goto done;
    kernels = kernels_of(r, c->func, args, kwargs);
    if (!kernels || !(casts = sort(r, kernels, rest, from, to))) goto done;
    if (casts_inside(kernels)) {
        answer = Py_NewRef(Py_False);
        goto done;
    }
    if (!cast_twice(from)) {
        Py_SETREF(from, PyList_AsTuple(from));
        Py_SETREF(to, PyList_AsTuple(to));
        change put = {r, from, to};
        Py_SETREF(args, from && to ? changed(&put, args) : NULL);
        if (kwargs) Py_SETREF(kwargs, args ? changed(&put, kwargs) : NULL);
        if (!args || (c->kwargs && !kwargs) || thx_autocast_off(r->x, &was) < 0) goto done;
        plain = kernels_of(r, c->func, args, kwargs);
        thx_autocast_on(r->x, &was);
    }
    answer = plain && same_kernels(r->x, rest, plain) ? PyList_AsTuple(casts) : Py_NewRef(none);
done:
    if (!answer && PyErr_ExceptionMatches(PyExc_Exception)) { /* layer 2 meets it again, and says so */
        PyErr_Clear();
        answer = Py_NewRef(none);
    } else if (answer)
        PyErr_Clear();
    Py_XDECREF(plain);
    Py_XDECREF(kernels);
    Py_XDECREF(casts);
    Py_XDECREF(from);
    Py_XDECREF(to);
    Py_XDECREF(rest);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    return answer;
}

/* ---- recording ---- */

static PyObject *record_new_cast(thx_recorder *r, PyObject *tensor, PyObject *dtype) {
    const thx_func *found = thx_func_find(r->x, r->x->tensor_to);
    PyObject *args = found ? PyTuple_Pack(2, tensor, dtype) : NULL;
    thx_func f = found ? *found : (thx_func){0}; /* the table may grow */
    PyObject *cast = args ? thx_record(r, &f, r->x->tensor_to, args, NULL) : NULL;
    Py_XDECREF(args);
    return cast;
}

/* A weight: torch casts it once and keeps that until autocast ends, so that its gradients are summed up in the type of
 * the cast. */
static bool is_kept(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    PyObject *real = NULL;
    for (uint32_t i = 0; cell && i < r->nroots && !real; i++)
        if (r->roots[i].value == cell->value && r->roots[i].requires_grad) real = r->roots[i].real;
    if (!real) return PyErr_Clear(), false;
    PyObject *leaf = PyObject_GetAttrString(real, "is_leaf"),
             *base = leaf ? PyObject_GetAttrString(real, "_base") : NULL;
    PyObject *keeps = base ? PyObject_CallMethod(r->x->torch, "is_autocast_cache_enabled", NULL) : NULL;
    bool kept = leaf == Py_True && base == Py_None && keeps == Py_True;
    PyErr_Clear();
    Py_XDECREF(keeps);
    Py_XDECREF(base);
    Py_XDECREF(leaf);
    return kept;
}

void thx_autocast_forget(thx_recorder *r) {
    if (r->cast && !r->autocast && !r->casting) Py_CLEAR(r->cast);
}

static PyObject *record_cast(thx_recorder *r, PyObject *tensor, PyObject *dtype) {
    if (!is_kept(r, tensor)) return record_new_cast(r, tensor, dtype);
    PyObject *key = Py_BuildValue("(IO)", thx_recorder_cell(r, tensor)->value, dtype), *cast = NULL;
    if (key && !r->cast) r->cast = PyDict_New();
    if (key && r->cast) cast = Py_XNewRef(PyDict_GetItemWithError(r->cast, key));
    if (key && r->cast && !cast && !PyErr_Occurred()) {
        cast = record_new_cast(r, tensor, dtype);
        if (cast && PyDict_SetItem(r->cast, key, cast) < 0) Py_CLEAR(cast);
    }
    Py_XDECREF(key);
    return cast;
}

static PyObject *record_with(thx_recording *c, PyObject *casts) {
    thx_recorder *r = c->r;
    Py_ssize_t n = PyTuple_GET_SIZE(casts);
    PyObject *from = PyTuple_New(n), *to = PyTuple_New(n), *result = NULL;
    for (Py_ssize_t i = 0; from && to && i < n; i++) /* recording a cast forgets the inputs of this operation */
        PyTuple_SET_ITEM(from, i, Py_NewRef(r->inputs[PyLong_AsLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(casts, i), 0))]));
    bool ok = from && to;
    for (Py_ssize_t i = 0; ok && i < n; i++) {
        PyObject *cast = record_cast(r, PyTuple_GET_ITEM(from, i), PyTuple_GET_ITEM(PyTuple_GET_ITEM(casts, i), 1));
        ok = cast != NULL;
        if (ok) PyTuple_SET_ITEM(to, i, cast);
    }
    change put = {r, from, to};
    PyObject *args = ok ? changed(&put, c->args) : NULL, *kwargs = args && c->kwargs ? changed(&put, c->kwargs) : NULL;
    if (args && (kwargs || !c->kwargs)) result = thx_record(r, c->f, c->func, args, kwargs);
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    Py_XDECREF(to);
    Py_XDECREF(from);
    return result;
}

/* May it write to its arguments? Then running it on their fakes would change these. */
static bool writes(const thx_recording *c) {
    if (c->def && c->def->meta) return (c->def->effects & TH_OPDEF_INPLACE) != 0;
    static const char *const options[] = {"out", "inplace"};
    for (int i = 0; c->kwargs && i < 2; i++) {
        PyObject *given = PyDict_GetItemString(c->kwargs, options[i]);
        if (given && given != Py_None && given != Py_False) return true;
    }
    PyObject *own = c->callee ? NULL : PyObject_GetAttrString(c->func, "__name__");
    const char *name = c->callee ? th_str_get(c->r->x->ctx, c->callee) : own ? PyUnicode_AsUTF8(own) : NULL;
    size_t n = name ? strlen(name) : 0;
    bool may =
        !n || (name[n - 1] == '_' && !(n > 1 && name[n - 2] == '_')) || strstr(name, "__i") || strstr(name, "set");
    PyErr_Clear();
    Py_XDECREF(own);
    return may;
}

PyObject *thx_record_under_autocast(thx_recording *c, thx_autocast_road *road) {
    thx *x = c->r->x;
    thx_ambient a;
    thx_autocast was;
    *road = THX_WHOLE;
    bool pointwise = c->def && c->def->fusion == TH_FUSE_POINTWISE;
    if (thx_ambient_read(x, &a) < 0) return NULL;
    if (!(a.autocast_cpu || a.autocast_gpu) || !x->to_copy || (writes(c) && !pointwise)) return NULL;
    PyObject *key = writes(c) ? NULL : key_of(c, &a), *casts = NULL;
    if (!key && PyErr_Occurred()) return NULL;
    casts = key ? Py_XNewRef(PyDict_GetItemWithError(x->casts, key)) : PyTuple_New(0);
    if (!casts && PyErr_ExceptionMatches(PyExc_TypeError)) { /* of an argument without a hash */
        PyErr_Clear();
        Py_CLEAR(key);
    }
    if (!casts && !PyErr_Occurred()) {
        casts = find_casts(c);
        if (casts && key && PyDict_SetItem(x->casts, key, casts) < 0) Py_CLEAR(casts);
    }
    Py_XDECREF(key);
    *road = casts == Py_None ? THX_KERNELS : THX_BY_RULE;
    PyObject *result = NULL;
    if (casts == Py_False)
        thx_doubt(c->r, "autocast acts inside of a kernel");
    else if (casts && casts != Py_None && thx_autocast_off(x, &was) == 0) {
        c->r->casting++;
        result = record_with(c, casts);
        c->r->casting--;
        thx_autocast_on(x, &was);
    }
    Py_XDECREF(casts);
    return result;
}
