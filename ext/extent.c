/* Extents in a capture that follows sizes: what a query about a tensor is answered, how they go into the trace and out
 * of it. See sizes.c.
 */
#include "callable.h"
#include "observe.h"

#include <string.h>

/* ---- extents ---- */

PyObject *thx_sizes_new(thx *x) {
    PyObject *module = PyImport_ImportModule("thunder._sizes"), *sizes = NULL;
    if (module && !x->extent_type) x->extent_type = (PyTypeObject *)PyObject_GetAttrString(module, "Extent");
    if (module && x->extent_type) sizes = PyObject_CallMethod(module, "Sizes", NULL);
    Py_XDECREF(module);
    return sizes;
}

static int64_t number_attribute(PyObject *o, const char *name) { /* -1 with an exception */
    PyObject *number = PyObject_GetAttrString(o, name);
    int64_t value = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    return value;
}

PyObject *thx_extent_plain(PyObject *extent) { return PyObject_GetAttrString(extent, "value"); }

th_node thx_extent_node(thx *x, th_trace *t, PyObject *extent) {
    int64_t value = number_attribute(extent, "value"), place = number_attribute(extent, "place");
    if (PyErr_Occurred()) return 0;
    x->saw_extent = true;
    return th_node_extent(t, value, (uint16_t)(place + 1));
}

bool thx_holds_extent(thx *x, PyObject *tuple) {
    bool found = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple) && !found; i++)
        found = Py_TYPE(PyTuple_GET_ITEM(tuple, i)) == x->extent_type;
    return found;
}

int thx_describe_extent(thx_spec *s, PyObject *extent) {
    int64_t place = number_attribute(extent, "place");
    s->kind = THX_S_EXTENT;
    s->type = (PyTypeObject *)Py_NewRef((PyObject *)&PyLong_Type);
    s->object = thx_extent_plain(extent);
    s->leaf = (uint32_t)place;
    return place < 0 || !s->object ? -1 : 0;
}

void thx_sizes_spoil(thx_recorder *r, const char *why) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    if (!r->sizes || !r->like) return;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *done = PyObject_CallMethod(r->sizes, "spoil", "s", why);
    Py_XDECREF(done);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

/* ---- what queries are answered ---- */

static int emit_mark(thx_recorder *r, const char *callee, th_val value, const int64_t *numbers, uint32_t n) {
    th_trace *t = r->t;
    th_node parts[THX_MAX_RANK + 1];
    parts[0] = th_node_value(t, value);
    for (uint32_t i = 0; i < n; i++) parts[1 + i] = th_node_int(t, numbers[i]);
    return thx_emit(r, &(th_op_args){.kind = TH_OP_CALL,
                                     .callee = th_intern_z(r->x->ctx, callee),
                                     .args = th_node_seq(t, TH_N_TUPLE, n + 1, parts),
                                     .effects = TH_FX_STATE});
}

/* Sizes of a value that are the same here and there may not change. */
static int fix_sizes(thx_recorder *r, th_val value, const th_type *type, const th_type *other) {
    int64_t numbers[THX_MAX_RANK];
    PyObject *number = PyLong_FromUnsignedLong(value);
    if (!number || (!r->fixed && !(r->fixed = PySet_New(NULL)))) return Py_XDECREF(number), -1;
    int known = PySet_Contains(r->fixed, number), rc = known < 0 ? -1 : 0;
    if (known == 0) {
        for (uint32_t d = 0; d < type->ndim; d++) numbers[d] = type->shape[d] == other->shape[d] ? type->shape[d] : -1;
        rc = PySet_Add(r->fixed, number) < 0 ? -1 : emit_mark(r, THX_FIXED_CALLEE, value, numbers, type->ndim);
    }
    Py_DECREF(number);
    return rc;
}

/* Size d of a value: an extent where it was another one in the other capture. */
static PyObject *one_size(thx_recorder *r, th_val value, uint32_t d, const th_type *type, const th_type *other) {
    if (type->shape[d] == other->shape[d]) return PyLong_FromLongLong(type->shape[d]);
    int64_t before = PyList_GET_SIZE(r->numbers);
    PyObject *extent =
        PyObject_CallMethod(r->sizes, "size", "IIL", (unsigned)value, (unsigned)d, (long long)type->shape[d]);
    if (extent && PyList_GET_SIZE(r->numbers) > before) {
        int64_t numbers[] = {d, before};
        if (emit_mark(r, THX_EXTENT_CALLEE, value, numbers, 2) < 0) Py_CLEAR(extent);
    }
    return extent;
}

static PyObject *all_sizes(thx_recorder *r, th_val value, const th_type *type, const th_type *other) {
    PyObject *items = PyTuple_New(type->ndim), *sizes = NULL;
    for (uint32_t d = 0; items && d < type->ndim; d++) {
        PyObject *size = one_size(r, value, d, type, other);
        if (!size)
            Py_CLEAR(items);
        else
            PyTuple_SET_ITEM(items, d, size);
    }
    if (items) sizes = PyObject_CallOneArg((PyObject *)r->x->Size, items);
    Py_XDECREF(items);
    return sizes;
}

static PyObject *fixed_number(thx_recorder *r, PyObject *size) { /* takes `size` */
    if (!size || Py_TYPE(size) != r->x->extent_type) return size;
    PyObject *number = PyObject_CallMethod(r->sizes, "pin", "O", size);
    Py_DECREF(size);
    return number;
}

static PyObject *product(thx_recorder *r, PyObject *sizes) { /* takes `sizes` */
    PyObject *number = sizes ? PyObject_CallMethod(r->sizes, "product", "(O)", sizes) : NULL;
    Py_XDECREF(sizes);
    return number;
}

static bool is_any(const char *name, const char *const *list) {
    for (; *list; list++)
        if (strcmp(name, *list) == 0) return true;
    return false;
}

/* The dimension that is asked for: x.size(1), x.size(dim=1); -1: all. -2 with an exception. */
static int64_t dimension(PyObject *args, PyObject *kwargs, uint32_t ndim) {
    PyObject *given = PyTuple_GET_SIZE(args) > 1 ? PyTuple_GET_ITEM(args, 1)
                      : kwargs                   ? PyDict_GetItemString(kwargs, "dim")
                                                 : NULL;
    if (!given || given == Py_None) return -1;
    int64_t d = PyLong_AsLongLong(given);
    if (d == -1 && PyErr_Occurred()) return -2;
    return d < 0 ? d + ndim : d;
}

static PyObject *answer_changed(thx_recorder *r, const char *name, th_val value, const th_type *type,
                                const th_type *other, PyObject *args, PyObject *kwargs) {
    static const char *const counts[] = {"numel", "nelement", NULL}, *const whole[] = {"shape", NULL};
    if (strcmp(name, "size") == 0) {
        int64_t d = dimension(args, kwargs, type->ndim);
        if (d == -2) return NULL;
        return d < 0 ? all_sizes(r, value, type, other) : one_size(r, value, (uint32_t)d, type, other);
    }
    if (is_any(name, whole)) return all_sizes(r, value, type, other);
    if (is_any(name, counts)) return product(r, all_sizes(r, value, type, other));
    if (strcmp(name, "__len__") == 0) return fixed_number(r, one_size(r, value, 0, type, other));
    return NULL;
}

/* What a query about a tensor tells is also told by an operation that gives its input back. Arguments are laid out as
 * they were. */
int thx_sizes_untouched(thx_recorder *r, const char *name, PyObject *kwargs, PyObject *tensor) {
    thx_cell *cell = thx_recorder_known(r, tensor);
    const char *dot = strrchr(name, '.');
    bool layout = dot && strcmp(dot, ".contiguous") == 0,
         formats = kwargs && PyDict_GetItemString(kwargs, "memory_format");
    if (!cell || !(layout || formats) || cell->value >= r->like->nvalues || !r->t->values[cell->value].def) return 0;
    if (r->t->values[cell->value].type == r->like->values[cell->value].type) return 0;
    if (formats) thx_sizes_spoil(r, "a memory format is asked for");
    return formats ? 0 : emit_mark(r, THX_LAYOUT_CALLEE, cell->value, NULL, 0);
}

/* `contiguous` made a copy: for sizes for which it would give the tensor itself, the program is another one. */
int thx_sizes_copied(thx_recorder *r, const char *name, PyObject *tensor) {
    const char *dot = strrchr(name, '.');
    thx_cell *cell = dot && strcmp(dot, ".contiguous") == 0 ? thx_recorder_known(r, tensor) : NULL;
    if (!cell || cell->value >= r->like->nvalues || !r->t->values[cell->value].def) return 0;
    if (r->t->values[cell->value].type == r->like->values[cell->value].type) return 0;
    return emit_mark(r, THX_COPIED_CALLEE, cell->value, NULL, 0);
}

static const char *last_name(thx_recorder *r, const thx_func *f, char *text, size_t size) {
    const char *callee = f->callee ? th_str_get(r->x->ctx, f->callee) : "", *dot;
    snprintf(text, size, "%s", callee);
    size_t n = strlen(text);
    if (n > 8 && strcmp(text + n - 8, ".__get__") == 0) text[n - 8] = 0;
    dot = strrchr(text, '.');
    return dot ? dot + 1 : text;
}

static bool is_dense(const th_type *t) { /* its elements fill their stretch of memory */
    int64_t span = 1;
    for (uint32_t d = 0; d < t->ndim; d++) span += (t->shape[d] - 1) * t->stride[d];
    return span == th_type_numel(t);
}

/* Strides, and whether they are those of a contiguous tensor, are as they are where no size is 1 and the tensor is
 * dense, here and there. */
static PyObject *answer_layout(thx_recorder *r, const char *name, th_val value, const th_type *type,
                               const th_type *other, PyObject *answer) {
    bool strides = strcmp(name, "stride") == 0, argument = !r->t->values[value].def;
    uint32_t vary = 0;
    for (uint32_t d = 0; d < type->ndim; d++) vary += type->shape[d] != other->shape[d];
    bool fixed = memcmp(type->stride, other->stride, sizeof *type->stride * type->ndim) == 0;
    if (!vary && fixed) return answer;
    if (strides ? !fixed || vary > 1 || !argument : !is_dense(type) || !is_dense(other)) thx_sizes_spoil(r, name);
    for (uint32_t d = 0; d < type->ndim && !argument; d++) {
        PyObject *one = PyLong_FromLong(1), *size = one ? one_size(r, value, d, type, other) : NULL;
        int large = size ? PyObject_RichCompareBool(size, one, Py_GT) : -1; /* of an extent: a condition */
        Py_XDECREF(size);
        Py_XDECREF(one);
        if (large < 0) return Py_DECREF(answer), NULL;
    }
    return answer;
}

PyObject *thx_sizes_answer(thx_recorder *r, const thx_func *f, PyObject *args, PyObject *kwargs, PyObject *answer) {
    if (!r->like) return answer; /* ints alone are followed */
    static const char *const told[] = {"size",    "shape",  "numel",         "nelement",
                                       "__len__", "stride", "is_contiguous", NULL};
    static const char *const others[] = {"is_same_size", "nbytes", "dim_order", NULL};
    char text[256];
    const char *name = last_name(r, f, text, sizeof text);
    bool tells = is_any(name, told);
    if (!tells) {
        if (is_any(name, others)) thx_sizes_spoil(r, name);
        return answer;
    }
    PyObject *tensor = PyTuple_Check(args) && PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : NULL;
    if (!tensor || !thx_is_tensor(r->x, tensor)) {
        thx_sizes_spoil(r, name);
        return answer;
    }
    thx_cell *cell = thx_recorder_known(r, tensor);
    if (!cell) return answer;                /* a parameter or the like, which is watched */
    for (uint32_t i = 0; i < r->nroots; i++) /* likewise */
        if (r->roots[i].value == cell->value && r->roots[i].leaf < 0) return answer;
    th_val value = cell->value;
    const th_type *type = th_type_get(r->x->ctx, r->t->values[value].type), *other = NULL;
    if (value < r->like->nvalues) other = th_type_get(r->x->ctx, r->like->values[value].type);
    if (!other || other->kind != TH_TYPE_TENSOR || other->ndim != type->ndim) {
        thx_sizes_spoil(r, "the program is another one for other sizes");
        return answer;
    }
    bool same = memcmp(type->shape, other->shape, sizeof *type->shape * type->ndim) == 0;
    bool argument = !r->t->values[value].def;
    if (!argument && fix_sizes(r, value, type, other) < 0) return Py_DECREF(answer), NULL;
    if (strcmp(name, "stride") == 0 || strcmp(name, "is_contiguous") == 0)
        return answer_layout(r, name, value, type, other, answer);
    if (same) return answer;
    PyObject *changed = answer_changed(r, name, value, type, other, args, kwargs);
    Py_DECREF(answer);
    return changed;
}
