/* Where torch's tensors keep what is read of them at every call. See torchabi_layout.h. */
#include "torchabi_layout.h"

#include <malloc.h>
#include <string.h>

int thx_abi_note(thx_abi *abi, const char *feature, const char *why) {
    PyObject *text = PyUnicode_FromString(why);
    int rc = text ? PyDict_SetItemString(abi->report, feature, text) : -1;
    Py_XDECREF(text);
    return rc;
}

PyObject *thx_abi_call(PyObject *torch, const char *function, const char *format, ...) {
    va_list list;
    va_start(list, format);
    PyObject *args = Py_VaBuildValue(format, list);
    va_end(list);
    PyObject *callable = args ? PyObject_GetAttrString(torch, function) : NULL;
    PyObject *result = callable ? PyObject_CallObject(callable, args) : NULL;
    Py_XDECREF(callable);
    Py_XDECREF(args);
    return result;
}

/* The place in a tensor object that holds its TensorImpl pointer, against torch's official handle. */
int thx_abi_find_impl(thx_abi *abi, PyObject *torch) {
    PyObject *aoti = PyObject_GetAttrString(torch, "_C");
    PyObject *module = aoti ? PyObject_GetAttrString(aoti, "_aoti") : NULL;
    PyObject *official = module ? PyObject_GetAttrString(module, "unsafe_alloc_void_ptrs_from_tensors") : NULL;
    abi->steal = module ? PyObject_GetAttrString(module, "alloc_tensors_by_stealing_from_void_ptrs") : NULL;
    Py_XDECREF(module);
    Py_XDECREF(aoti);
    if (!official || !abi->steal) {
        PyErr_Clear();
        Py_XDECREF(official);
        return thx_abi_note(abi, "borrow", "torch._C._aoti has no handle functions");
    }
    size_t found = 0;
    for (int round = 0; round < 3; round++) {
        PyObject *tensor = thx_abi_call(torch, "zeros", "(i)", 3 + round);
        PyObject *list = tensor ? PyList_New(1) : NULL;
        if (!list) {
            Py_XDECREF(tensor);
            Py_DECREF(official);
            return -1;
        }
        PyList_SET_ITEM(list, 0, Py_NewRef(tensor));
        PyObject *capsules = PyObject_CallOneArg(official, list);
        Py_DECREF(list);
        PyObject *capsule = capsules ? PySequence_GetItem(capsules, 0) : NULL;
        void *handle = capsule ? PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)) : NULL;
        size_t place = 0, hits = 0;
        if (handle) {
            void *impl = *(void **)handle;
            size_t size = (size_t)Py_TYPE(tensor)->tp_basicsize;
            for (size_t at = sizeof(PyObject); at + sizeof(void *) <= size; at += sizeof(void *))
                if (*(void **)((char *)tensor + at) == impl) place = at, hits++;
            if (abi->aoti_torch_delete_tensor_object) abi->aoti_torch_delete_tensor_object(handle);
        }
        Py_XDECREF(capsule);
        Py_XDECREF(capsules);
        Py_DECREF(tensor);
        PyErr_Clear();
        if (hits != 1 || (round && place != found)) {
            Py_DECREF(official);
            return thx_abi_note(abi, "borrow", "no unique place for the TensorImpl pointer");
        }
        found = place;
    }
    Py_DECREF(official);
    abi->borrow = found;
    return 0;
}

/* Where the requires_grad byte lies: compare a plain tensor, one that requires grad, and that one switched off. */
static int find_requires_grad(thx_abi *abi, PyObject *torch) {
    enum { IMPL_BYTES = 160, META_BYTES = 224 }; /* the first is at least that long, the second may end before */
    abi->autograd_meta = -1;
    int meta_at = -1, flag_at = -1;
    for (int round = 0; round < 3; round++) {
        PyObject *plain = thx_abi_call(torch, "zeros", "(i)", 2 + round);
        PyObject *grad = thx_abi_call(torch, "zeros", "(i)", 2 + round);
        PyObject *on = grad ? PyObject_CallMethod(grad, "requires_grad_", "O", Py_True) : NULL;
        int meta = -1, flag = -1;
        if (plain && on) {
            char *a = *(char **)thx_borrow(abi, plain), *b = *(char **)thx_borrow(abi, grad);
            for (int at = 8; at < IMPL_BYTES && meta < 0; at += 8)
                if (*(void **)(a + at) == NULL && *(void **)(b + at) != NULL) meta = at;
        }
        if (meta >= 0) {
            char before[META_BYTES], *m = *(char **)(*(char **)thx_borrow(abi, grad) + meta);
            int length = (int)malloc_usable_size(m);
            if (length > META_BYTES) length = META_BYTES;
            memcpy(before, m, (size_t)length);
            PyObject *off = PyObject_CallMethod(grad, "requires_grad_", "O", Py_False);
            int flips = 0;
            for (int at = 0; off && at < length; at++)
                if (before[at] == 1 && m[at] == 0) flag = at, flips++;
            if (flips != 1) flag = -1;
            Py_XDECREF(off);
        }
        Py_XDECREF(on);
        Py_XDECREF(grad);
        Py_XDECREF(plain);
        PyErr_Clear();
        if (flag < 0 || (round && (meta != meta_at || flag != flag_at)))
            return thx_abi_note(abi, "requires_grad", "no unique byte");
        meta_at = meta;
        flag_at = flag;
    }
    abi->autograd_meta = meta_at;
    abi->requires_grad = flag_at;
    return 0;
}

/* What the byte does not say, by torch's own function: tried on leaves, on results of operations and on views, which
 * ask their base. */
static int try_requires_grad(thx_abi *abi, PyObject *torch) {
    void *symbol = th_dylib_symbol(abi->library, "_ZNK3c1010TensorImpl13requires_gradEv");
    memcpy(&abi->impl_requires_grad, &symbol, sizeof symbol);
    PyObject *leaf = symbol ? thx_abi_call(torch, "zeros", "(i)", 2) : NULL;
    PyObject *view = leaf ? PyObject_CallMethod(leaf, "view", "ii", 2, 1) : NULL, *made = NULL;
    bool right = view && thx_requires_grad(abi, leaf) == 0 && thx_requires_grad(abi, view) == 0;
    PyObject *on = right ? PyObject_CallMethod(leaf, "requires_grad_", "O", Py_True) : NULL;
    if (on) made = PyObject_CallMethod(leaf, "mul", "i", 2);
    if (on) Py_XSETREF(view, PyObject_CallMethod(leaf, "view", "ii", 2, 1));
    right = made && view && thx_requires_grad(abi, leaf) == 1 && thx_requires_grad(abi, made) == 1 &&
            thx_requires_grad(abi, view) == 1;
    PyObject *off = right ? PyObject_CallMethod(leaf, "requires_grad_", "O", Py_False) : NULL;
    right = off && thx_requires_grad(abi, leaf) == 0;
    Py_XDECREF(off);
    Py_XDECREF(on);
    Py_XDECREF(made);
    Py_XDECREF(view);
    Py_XDECREF(leaf);
    PyErr_Clear();
    if (right) return 0;
    abi->impl_requires_grad = NULL;
    return thx_abi_note(abi, "requires_grad", "torch's function is missing or differs");
}

/* The words of two TensorImpls that differ in one bit: by place, that bit; else 0. */
static void one_bit_apart(const thx_abi *abi, PyObject *x, PyObject *y, uint64_t *bits, int n) {
    const uint64_t *a = *(uint64_t **)thx_borrow(abi, x), *b = *(uint64_t **)thx_borrow(abi, y);
    size_t length = malloc_usable_size((void *)a), other = malloc_usable_size((void *)b);
    if (other < length) length = other;
    for (int i = 1; i < n && (size_t)i < length / 8; i++) {
        uint64_t differ = a[i] ^ b[i];
        bits[i] = differ & (differ - 1) ? 0 : differ;
    }
}

/* Where the keys lie that say that a tensor shows other values than its memory holds: compare views with and without.
 */
static int find_lazy(thx_abi *abi, PyObject *torch) {
    enum { WORDS = 32, ROUNDS = 3 };
    uint64_t found[2][WORDS] = {{0}};
    abi->keys = -1;
    PyObject *dtype = PyObject_GetAttrString(torch, "complex64");
    for (int round = 0; round < ROUNDS; round++) {
        PyObject *base = thx_abi_call(torch, "zeros", "(i)", 2 + round), *z = NULL, *conj = NULL, *parts[2] = {NULL};
        if (base && dtype) z = PyObject_CallMethod(base, "to", "O", dtype);
        PyObject *plain = z ? PyObject_CallMethod(z, "view", "i", 2 + round) : NULL;
        conj = z ? PyObject_CallMethod(z, "conj", NULL) : NULL;
        if (plain && conj) {
            parts[0] = PyObject_GetAttrString(plain, "imag");
            parts[1] = PyObject_GetAttrString(conj, "imag");
        }
        uint64_t now[2][WORDS] = {{0}};
        if (parts[0] && parts[1]) {
            one_bit_apart(abi, plain, conj, now[0], WORDS);
            one_bit_apart(abi, parts[0], parts[1], now[1], WORDS);
        }
        for (int i = 0; i < WORDS; i++)
            for (int k = 0; k < 2; k++) found[k][i] = round && found[k][i] != now[k][i] ? 0 : now[k][i];
        Py_XDECREF(parts[0]);
        Py_XDECREF(parts[1]);
        Py_XDECREF(conj);
        Py_XDECREF(plain);
        Py_XDECREF(z);
        Py_XDECREF(base);
        PyErr_Clear();
    }
    Py_XDECREF(dtype);
    PyErr_Clear();
    int places = 0;
    for (int i = 0; i < WORDS; i++) {
        if (!found[0][i] || !found[1][i] || found[0][i] == found[1][i]) continue;
        abi->keys = 8 * i;
        abi->lazy = found[0][i] | found[1][i];
        places++;
    }
    if (places == 1) return 0;
    abi->keys = -1;
    return thx_abi_note(abi, "lazy", "no unique word");
}

/* ---- what describes a tensor, in one piece ---- */

enum { INLINE_DIMS = 5 }; /* more lie elsewhere */

static const char *impl_of(const thx_abi *abi, PyObject *tensor) { return *(char **)thx_borrow(abi, tensor); }

static PyObject *like(PyObject *torch, const char *dtype, const char *device) {
    PyObject *plain = thx_abi_call(torch, "zeros", "((ii))", 3, 4), *options = PyDict_New(), *result = NULL;
    PyObject *kind = PyObject_GetAttrString(torch, dtype), *method = NULL, *args = PyTuple_New(0);
    if (plain && options && kind && args && PyDict_SetItemString(options, "dtype", kind) == 0) {
        PyObject *name = PyUnicode_FromString(device);
        method =
            name && PyDict_SetItemString(options, "device", name) == 0 ? PyObject_GetAttrString(plain, "to") : NULL;
        Py_XDECREF(name);
        result = method ? PyObject_Call(method, args, options) : NULL;
    }
    Py_XDECREF(method);
    Py_XDECREF(args);
    Py_XDECREF(kind);
    Py_XDECREF(options);
    Py_XDECREF(plain);
    return result;
}

/* From the number of dimensions, before the sizes, to the dispatch keys: sizes, strides, dtype, device lie between. */
static bool place_layout(thx_abi *abi, PyObject *torch) {
    int at = -1;
    for (int n = 1; n <= INLINE_DIMS; n++) {
        PyObject *shape = PyTuple_New(n);
        for (int i = 0; shape && i < n; i++) PyTuple_SET_ITEM(shape, i, PyLong_FromLong(2 + i));
        PyObject *x = shape ? thx_abi_call(torch, "zeros", "(O)", shape) : NULL;
        Py_XDECREF(shape);
        if (!x) return false;
        const char *impl = impl_of(abi, x);
        int64_t *sizes = NULL, *strides = NULL;
        bool read = !abi->aoti_torch_get_sizes(thx_borrow(abi, x), &sizes) &&
                    !abi->aoti_torch_get_strides(thx_borrow(abi, x), &strides);
        ptrdiff_t place = read ? (const char *)sizes - impl : -1;
        bool fits = place >= 16 && place < abi->keys && strides == sizes + INLINE_DIMS && (n == 1 || place == at);
        fits = fits && *(const int64_t *)(impl + place - 8) == n;
        Py_DECREF(x);
        if (!fits) return false;
        at = (int)place;
    }
    abi->layout = at - 8;
    abi->layout_words = (abi->keys + 8 - abi->layout) / 8;
    return abi->layout_words > 2 * INLINE_DIMS + 1 && abi->layout_words <= THX_LAYOUT_WORDS;
}

enum { SAMPLES = 4 };

/* A byte that all samples of one kind share, and all of the other kind share with another value. What nobody wrote lies
 * between the fields, and differs as it likes. Consumes the samples. */
static bool separates(const thx_abi *abi, PyObject *const *one, PyObject *const *other) {
    bool found = false, all = true;
    for (int k = 0; k < SAMPLES; k++) all = all && one[k] && other[k];
    for (int i = 0; all && i < 8 * abi->layout_words && !found; i++) {
        char a = impl_of(abi, one[0])[abi->layout + i], b = impl_of(abi, other[0])[abi->layout + i];
        found = a != b;
        for (int k = 1; k < SAMPLES && found; k++)
            found = impl_of(abi, one[k])[abi->layout + i] == a && impl_of(abi, other[k])[abi->layout + i] == b;
    }
    for (int k = 0; k < SAMPLES; k++) {
        Py_XDECREF(one[k]);
        Py_XDECREF(other[k]);
    }
    PyErr_Clear();
    return found;
}

static bool separates_kinds(const thx_abi *abi, PyObject *torch, const char *dtype, const char *device, bool negated) {
    PyObject *one[SAMPLES], *other[SAMPLES];
    for (int k = 0; k < SAMPLES; k++) {
        one[k] = like(torch, "float32", "cpu");
        other[k] = like(torch, dtype, device);
        if (negated && other[k]) Py_SETREF(other[k], PyObject_CallMethod(other[k], "_neg_view", NULL));
    }
    return separates(abi, one, other);
}

/* Does the piece of one tensor change with a call of a method of it? */
static bool changes(const thx_abi *abi, PyObject *x, const char *method, PyObject *argument) { /* NULL: none */
    uint64_t before[THX_LAYOUT_WORDS];
    bool read = thx_layout_read(abi, x, before);
    PyObject *done = read ? PyObject_CallMethod(x, method, argument ? "O" : NULL, argument) : NULL;
    bool changed = done && !thx_layout_is(abi, x, before);
    Py_XDECREF(done);
    if (PyErr_Occurred()) changed = !changed; /* an answer that nobody wants */
    return changed;
}

static bool tell_apart(thx_abi *abi, PyObject *torch) {
    PyObject *x = like(torch, "float32", "cpu");
    bool on = abi->on;
    abi->on = true; /* for thx_layout_read */
    PyObject *two = PyLong_FromLong(2), *yes = Py_True, *no = Py_False;
    bool ok = x && two && !changes(abi, x, "requires_grad_", yes) && !changes(abi, x, "requires_grad_", no) &&
              !changes(abi, x, "add_", two) && !changes(abi, x, "zero_", NULL) && changes(abi, x, "t_", NULL) &&
              changes(abi, x, "unsqueeze_", two) && changes(abi, x, "squeeze_", NULL) &&
              changes(abi, x, "resize_", two);
    Py_XDECREF(two);
    abi->on = on;
    Py_XDECREF(x);
    PyErr_Clear();
    return ok && separates_kinds(abi, torch, "int32", "cpu", false) &&
           separates_kinds(abi, torch, "float32", "meta", false) && separates_kinds(abi, torch, "float32", "cpu", true);
}

/* Every description of a tensor in one piece of memory, so that comparing the piece compares them all. */
static int find_layout(thx_abi *abi, PyObject *torch) {
    abi->layout = -1;
    bool found = abi->keys > 0 && place_layout(abi, torch) && tell_apart(abi, torch);
    PyErr_Clear();
    if (found) return 0;
    abi->layout = -1;
    return thx_abi_note(abi, "layout", "sizes, strides, dtype and device do not lie in one place");
}

int thx_abi_find_layout(thx_abi *abi, PyObject *torch) {
    if (find_lazy(abi, torch) < 0 || find_layout(abi, torch) < 0 || find_requires_grad(abi, torch) < 0) return -1;
    return abi->autograd_meta < 0 ? 0 : try_requires_grad(abi, torch);
}

bool thx_layout_read(const thx_abi *abi, PyObject *tensor, uint64_t *piece) {
    if (!abi->on || abi->layout < 0) return false;
    const char *impl = impl_of(abi, tensor);
    int64_t *sizes = NULL, *strides = NULL;
    if (abi->aoti_torch_get_sizes(thx_borrow(abi, tensor), &sizes) ||
        abi->aoti_torch_get_strides(thx_borrow(abi, tensor), &strides))
        return false;
    if ((const char *)sizes != impl + abi->layout + 8 || strides != sizes + INLINE_DIMS) return false;
    memcpy(piece, impl + abi->layout, 8 * (size_t)abi->layout_words);
    return true;
}
