/* Arguments of GPU kernels: declared types, binding, checks, packing. See cuda.h.
 *
 * Every message names the kernel and the parameter. A tensor becomes its data pointer, None a null pointer; numbers
 * become cells of the declared width, and one that does not fit raises rather than wraps.
 */
#include "cuda.h"

#include "thunder/ir.h"

#include <string.h>

/* ---- declared types ---- */

static const struct {
    const char *text;
    uint8_t kind, bytes;
} types[] = {
    {"i8", THX_CUDA_SIGNED, 1},    {"i16", THX_CUDA_SIGNED, 2},   {"i32", THX_CUDA_SIGNED, 4},
    {"i64", THX_CUDA_SIGNED, 8},   {"u8", THX_CUDA_UNSIGNED, 1},  {"u16", THX_CUDA_UNSIGNED, 2},
    {"u32", THX_CUDA_UNSIGNED, 4}, {"u64", THX_CUDA_UNSIGNED, 8}, {"f32", THX_CUDA_FLOAT, 4},
    {"f64", THX_CUDA_FLOAT, 8},    {"bool", THX_CUDA_BOOL, 1},    {"auto", THX_CUDA_AUTO, 0},
};

static int read_type(thx_cuda_param *p, const char *text) {
    if (*text == '*') {
        p->kind = THX_CUDA_POINTER;
        p->dtype = text[1] ? (uint8_t)th_dtype_from_torch(text + 1, strlen(text + 1)) : TH_DTYPE_NONE;
        if (!text[1] || p->dtype != TH_DTYPE_NONE) return 0;
    }
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].text, text) == 0) {
            p->kind = types[i].kind;
            p->bytes = types[i].bytes;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "%s is not the type of a kernel's parameter", text);
    return -1;
}

int thx_cuda_read_params(thx_cuda_kernel *k, PyObject *params) {
    Py_ssize_t n = PyTuple_GET_SIZE(params);
    if (n > THX_CUDA_PARAMS) {
        PyErr_Format(PyExc_ValueError, "%U has %zd parameters; at most %d are supported", k->name, n, THX_CUDA_PARAMS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        thx_cuda_param *p = &k->params[i];
        const char *type;
        PyObject *name, *declared;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(params, i), "UUsb", &name, &declared, &type, &p->special) ||
            read_type(p, type) < 0)
            return -1;
        p->name = Py_NewRef(name);
        p->declared = Py_NewRef(declared);
        k->nparams++;
    }
    return 0;
}

/* ---- binding ---- */

static int find_param(const thx_cuda_kernel *k, PyObject *name) {
    for (uint32_t i = 0; i < k->nparams; i++) {
        int same = PyObject_RichCompareBool(k->params[i].name, name, Py_EQ);
        if (same != 0) return same < 0 ? -1 : (int)i;
    }
    PyErr_Format(PyExc_TypeError, "%U has no parameter %R", k->name, name);
    return -1;
}

int thx_cuda_bind(const thx_cuda_kernel *k, PyObject *const *args, Py_ssize_t n, PyObject *kwnames, PyObject **bound) {
    Py_ssize_t total = k->nparams, ndefaults = k->defaults ? PyTuple_GET_SIZE(k->defaults) : 0;
    if (n > total) {
        PyErr_Format(PyExc_TypeError, "%U takes %zd arguments, not %zd", k->name, total, n);
        return -1;
    }
    for (Py_ssize_t i = 0; i < total; i++) bound[i] = i < n ? args[i] : NULL;
    for (Py_ssize_t i = 0; kwnames && i < PyTuple_GET_SIZE(kwnames); i++) {
        int at = find_param(k, PyTuple_GET_ITEM(kwnames, i));
        if (at < 0) return -1;
        if (bound[at]) {
            PyErr_Format(PyExc_TypeError, "%U got two values for parameter %R", k->name, k->params[at].name);
            return -1;
        }
        bound[at] = args[n + i];
    }
    for (Py_ssize_t i = 0; i < total; i++) {
        if (!bound[i] && i >= total - ndefaults) bound[i] = PyTuple_GET_ITEM(k->defaults, i - (total - ndefaults));
        if (bound[i]) continue;
        PyErr_Format(PyExc_TypeError, "%U lacks an argument for parameter %zd, %R", k->name, i + 1, k->params[i].name);
        return -1;
    }
    return 0;
}

/* ---- packing ---- */

/* A code of the key: 0 where the type is declared. The text is what `build` sees. */
enum { KEY_NONE = 1, KEY_BOOL, KEY_I32, KEY_I64, KEY_U64, KEY_F32, KEY_TENSOR = 64 };
static const char *const key_texts[] = {"", "none", "u1", "i32", "i64", "u64", "fp32"};
enum { VALUE_ONE = 1, VALUE_ALIGNED = 2, ALIGNMENT = 16 };
static const char *const value_texts[] = {"", "1", "D"};

static int refuse(const thx_cuda_kernel *k, const thx_cuda_param *p, PyObject *type, const char *format, ...) {
    va_list list;
    va_start(list, format);
    PyObject *text = PyUnicode_FromFormatV(format, list);
    va_end(list);
    if (text) PyErr_Format(type, "%U: parameter %R (%U): %U", k->name, p->name, p->declared, text);
    Py_XDECREF(text);
    return -1;
}

typedef struct tensor_facts {
    int32_t device_type, device_index;
    th_dtype dtype;
    void *data;
} tensor_facts;

static int read_by_handle(const thx_abi *abi, PyObject *tensor, tensor_facts *f) {
    th_h h = thx_borrow(abi, tensor);
    int32_t number = -1;
    if (abi->aoti_torch_get_device_type(h, &f->device_type) || abi->aoti_torch_get_device_index(h, &f->device_index) ||
        abi->aoti_torch_get_dtype(h, &number) || abi->aoti_torch_get_data_ptr(h, &f->data))
        return -1;
    f->dtype = number >= 0 && number < 64 ? (th_dtype)abi->dtypes[number] : TH_DTYPE_NONE;
    return 0;
}

static int read_by_attributes(thx *x, PyObject *tensor, tensor_facts *f) {
    PyObject *device = PyObject_GetAttr(tensor, x->n.device), *dtype = PyObject_GetAttr(tensor, x->n.dtype);
    PyObject *type = device ? PyObject_GetAttr(device, x->n.type) : NULL;
    PyObject *index = device ? PyObject_GetAttr(device, x->n.index) : NULL;
    PyObject *data = index && dtype ? PyObject_CallMethod(tensor, "data_ptr", NULL) : NULL;
    if (type && data) {
        f->device_type = PyUnicode_CompareWithASCIIString(type, "cuda") == 0  ? 1
                         : PyUnicode_CompareWithASCIIString(type, "cpu") == 0 ? 0
                                                                              : -1;
        f->device_index = index == Py_None ? -1 : (int32_t)PyLong_AsLong(index);
        f->dtype = thx_dtype_ref(x, dtype);
        f->data = PyLong_AsVoidPtr(data);
    }
    Py_XDECREF(data);
    Py_XDECREF(index);
    Py_XDECREF(type);
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    return PyErr_Occurred() ? -1 : 0;
}

static int wrong_device(const thx_cuda_kernel *k, const thx_cuda_param *p, PyObject *tensor, bool other) {
    PyObject *device = PyObject_GetAttr(tensor, k->x->n.device);
    if (device && other) refuse(k, p, PyExc_ValueError, "the tensor is on %S, another device than the first", device);
    if (device && !other)
        refuse(k, p, PyExc_ValueError, "the tensor is on %S, and the kernel runs on %s tensors", device,
               k->device_type == 1 ? "CUDA" : "CPU");
    Py_XDECREF(device);
    return -1;
}

static int pack_tensor(thx_cuda_kernel *k, uint32_t i, PyObject *tensor, thx_cuda_args *out) {
    const thx_cuda_param *p = &k->params[i];
    thx *x = k->x;
    tensor_facts f = {.device_type = -1};
    if (thx_is_fake(x, tensor))
        return refuse(k, p, x->CaptureError,
                      "a kernel cannot be captured by itself: make it an operator with torch.library.custom_op");
    int read = x->abi.on ? read_by_handle(&x->abi, tensor, &f) : read_by_attributes(x, tensor, &f);
    if (read < 0 && PyErr_Occurred()) return -1;
    if (f.device_type != k->device_type) return wrong_device(k, p, tensor, false);
    if (read < 0) return refuse(k, p, PyExc_ValueError, "a tensor without memory of its own");
    if (p->dtype != TH_DTYPE_NONE && p->dtype != f.dtype)
        return refuse(k, p, PyExc_TypeError, "a tensor of %s is expected, not %s", th_dtype_get(p->dtype)->torch_name,
                      f.dtype ? th_dtype_get(f.dtype)->torch_name : "one of this dtype");
    if (p->kind == THX_CUDA_AUTO && f.dtype == TH_DTYPE_NONE)
        return refuse(k, p, PyExc_TypeError, "tensors of this dtype are not supported");
    int device = f.device_index < 0 ? 0 : f.device_index;
    if (out->device >= 0 && device != out->device) return wrong_device(k, p, tensor, true);
    out->device = device;
    out->cells[i] = (uint64_t)(uintptr_t)f.data;
    if (p->kind == THX_CUDA_AUTO) out->key[2 * i] = (uint8_t)(KEY_TENSOR + f.dtype);
    if ((p->special & THX_CUDA_IF_ALIGNED) && out->cells[i] % ALIGNMENT == 0) out->key[2 * i + 1] = VALUE_ALIGNED;
    return 0;
}

static bool fits(int64_t value, const thx_cuda_param *p) {
    if (p->bytes == 8) return p->kind == THX_CUDA_SIGNED || value >= 0;
    int64_t top = INT64_C(1) << (8 * p->bytes - (p->kind == THX_CUDA_SIGNED));
    return value < top && value >= (p->kind == THX_CUDA_SIGNED ? -top : 0);
}

static int pack_int(thx_cuda_kernel *k, uint32_t i, PyObject *value, thx_cuda_args *out) {
    const thx_cuda_param *p = &k->params[i];
    int overflow = 0;
    PyObject *number = PyLong_Check(value) ? Py_NewRef(value) : PyNumber_Index(value);
    if (!number) {
        PyErr_Clear();
        return refuse(k, p, PyExc_TypeError, "an int is expected, not %s", Py_TYPE(value)->tp_name);
    }
    int64_t small = PyLong_AsLongLongAndOverflow(number, &overflow);
    uint64_t cell = (uint64_t)small;
    bool big = overflow > 0 && (p->kind == THX_CUDA_AUTO || (p->kind == THX_CUDA_UNSIGNED && p->bytes == 8));
    if (big) cell = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    bool ok = !PyErr_Occurred() && (big || (!overflow && (p->kind == THX_CUDA_AUTO || fits(small, p))));
    PyErr_Clear();
    if (!ok) return refuse(k, p, PyExc_OverflowError, "%R does not fit", value);
    out->cells[i] = cell; /* the low bytes come first: narrower parameters read those */
    if (p->kind == THX_CUDA_AUTO)
        out->key[2 * i] = big ? KEY_U64 : small >= INT32_MIN && small <= INT32_MAX ? KEY_I32 : KEY_I64;
    if ((p->special & THX_CUDA_IF_ONE) && cell == 1)
        out->key[2 * i + 1] = VALUE_ONE;
    else if ((p->special & THX_CUDA_IF_ALIGNED) && cell % ALIGNMENT == 0)
        out->key[2 * i + 1] = VALUE_ALIGNED;
    return 0;
}

static int pack_float(thx_cuda_kernel *k, uint32_t i, PyObject *value, thx_cuda_args *out) {
    const thx_cuda_param *p = &k->params[i];
    double wide = PyFloat_AsDouble(value);
    float narrow = (float)wide;
    if (wide == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return refuse(k, p, PyExc_TypeError, "a float is expected, not %s", Py_TYPE(value)->tp_name);
    }
    if (p->kind == THX_CUDA_FLOAT && p->bytes == 8) {
        memcpy(&out->cells[i], &wide, sizeof wide);
    } else {
        out->cells[i] = 0;
        memcpy(&out->cells[i], &narrow, sizeof narrow);
    }
    if (p->kind == THX_CUDA_AUTO) out->key[2 * i] = KEY_F32;
    return 0;
}

static int pack_bool(thx_cuda_kernel *k, uint32_t i, PyObject *value, thx_cuda_args *out) {
    if (!PyBool_Check(value))
        return refuse(k, &k->params[i], PyExc_TypeError, "a bool is expected, not %s", Py_TYPE(value)->tp_name);
    out->cells[i] = value == Py_True;
    if (k->params[i].kind == THX_CUDA_AUTO) out->key[2 * i] = KEY_BOOL;
    return 0;
}

static int pack_auto(thx_cuda_kernel *k, uint32_t i, PyObject *value, thx_cuda_args *out) {
    if (PyBool_Check(value)) return pack_bool(k, i, value, out);
    if (PyFloat_Check(value)) return pack_float(k, i, value, out);
    if (value != Py_None) return pack_int(k, i, value, out);
    out->cells[i] = 0;
    out->key[2 * i] = KEY_NONE;
    return 0;
}

static int pack_one(thx_cuda_kernel *k, uint32_t i, PyObject *value, thx_cuda_args *out) {
    const thx_cuda_param *p = &k->params[i];
    bool tensor = thx_is_tensor(k->x, value);
    if (tensor && (p->kind == THX_CUDA_POINTER || p->kind == THX_CUDA_AUTO)) return pack_tensor(k, i, value, out);
    if (tensor) return refuse(k, p, PyExc_TypeError, "a number is expected, not a tensor");
    switch (p->kind) {
    case THX_CUDA_POINTER:
        out->cells[i] = 0;
        return value == Py_None
                   ? 0
                   : refuse(k, p, PyExc_TypeError, "a tensor is expected, not %s", Py_TYPE(value)->tp_name);
    case THX_CUDA_FLOAT: return pack_float(k, i, value, out);
    case THX_CUDA_BOOL: return pack_bool(k, i, value, out);
    case THX_CUDA_AUTO: return pack_auto(k, i, value, out);
    default: return pack_int(k, i, value, out);
    }
}

int thx_cuda_pack(thx_cuda_kernel *k, PyObject *const *bound, thx_cuda_args *out) {
    out->device = -1;
    memset(out->key, 0, 2 * (size_t)k->nparams);
    for (uint32_t i = 0; i < k->nparams; i++)
        if (pack_one(k, i, bound[i], out) < 0) return -1;
    return 0;
}

PyObject *thx_cuda_key_object(const thx_cuda_kernel *k, const uint8_t *key) {
    PyObject *tuple = PyTuple_New(k->nparams);
    for (uint32_t i = 0; tuple && i < k->nparams; i++) {
        uint8_t code = key[2 * i];
        char text[64];
        snprintf(text, sizeof text, "%s%s", code >= KEY_TENSOR ? "*" : "",
                 code >= KEY_TENSOR ? th_dtype_get((th_dtype)(code - KEY_TENSOR))->torch_name : key_texts[code]);
        PyObject *item = Py_BuildValue("(ss)", text, value_texts[key[2 * i + 1]]);
        if (!item)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

/* ---- grids and blocks ---- */

int thx_cuda_read_extent(PyObject *value, const char *what, const uint32_t *most, uint32_t out[3]) {
    PyObject *items = PyLong_Check(value) ? PyTuple_Pack(1, value) : PySequence_Tuple(value);
    Py_ssize_t n = items ? PyTuple_GET_SIZE(items) : 0;
    out[0] = out[1] = out[2] = 1;
    if (items && (n < 1 || n > 3)) PyErr_Format(PyExc_ValueError, "a %s has 1 to 3 sizes, not %zd", what, n);
    for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++) {
        long long size = PyLong_AsLongLong(PyTuple_GET_ITEM(items, i));
        if (PyErr_Occurred()) break;
        if (size < 0 || size > most[i])
            PyErr_Format(PyExc_ValueError, "size %zd of the %s is %lld; it may be 0 to %u", i, what, size, most[i]);
        out[i] = (uint32_t)size;
    }
    Py_XDECREF(items);
    return PyErr_Occurred() ? -1 : 0;
}
