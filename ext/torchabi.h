/* The only room that knows torch's symbols.
 *
 * Everything is found at run time by dlsym in the libtorch_cpu that torch loaded. A missing symbol clears the feature
 * bit of what needs it; whoever asks for a feature that is off takes the road through Python builtins. A self-test at
 * import compares each trick with torch's own answer and switches off what disagrees. THUNDER_TORCH_ABI=0 switches all
 * of it off.
 */
#ifndef THUNDER_TORCHABI_H
#define THUNDER_TORCHABI_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/dylib.h"
#include "thunder/base.h"

typedef void *th_h;       /* AtenTensorHandle: a pointer to a TensorImpl pointer */
typedef int32_t th_rc;    /* 0 is success */
typedef uint64_t th_cell; /* StableIValue */

#define THX_ABI_SYMBOLS(X)                                                                                             \
    X(aoti_torch_abi_version, uint64_t, (void))                                                                        \
    X(aoti_torch_new_tensor_handle, th_rc, (th_h, th_h *))                                                             \
    X(aoti_torch_delete_tensor_object, th_rc, (th_h))                                                                  \
    X(aoti_torch_get_sizes, th_rc, (th_h, int64_t **))                                                                 \
    X(aoti_torch_get_strides, th_rc, (th_h, int64_t **))                                                               \
    X(aoti_torch_get_dim, th_rc, (th_h, int64_t *))                                                                    \
    X(aoti_torch_get_dtype, th_rc, (th_h, int32_t *))                                                                  \
    X(aoti_torch_get_device_type, th_rc, (th_h, int32_t *))                                                            \
    X(aoti_torch_get_device_index, th_rc, (th_h, int32_t *))                                                           \
    X(aoti_torch_get_data_ptr, th_rc, (th_h, void **))                                                                 \
    X(aoti_torch_get_storage_offset, th_rc, (th_h, int64_t *))                                                         \
    X(aoti_torch_get_layout, th_rc, (th_h, int32_t *))                                                                 \
    X(aoti_torch_layout_strided, int32_t, (void))                                                                      \
    X(aoti_torch_grad_mode_is_enabled, bool, (void))                                                                   \
    X(aoti_torch_grad_mode_set_enabled, void, (bool))                                                                  \
    X(aoti_torch_empty_strided, th_rc, (int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, th_h *)) \
    X(aoti_torch__reinterpret_tensor, th_rc, (th_h, int64_t, const int64_t *, const int64_t *, int64_t, th_h *))       \
    X(aoti_torch_call_dispatcher, th_rc, (const char *, const char *, th_cell *))                                      \
    X(torch_call_dispatcher, th_rc, (const char *, const char *, th_cell *, uint64_t))                                 \
    X(torch_new_list_reserve_size, th_rc, (size_t, th_h *))                                                            \
    X(torch_list_push_back, th_rc, (th_h, th_cell))                                                                    \
    X(torch_list_get_item, th_rc, (th_h, size_t, th_cell *))                                                           \
    X(torch_list_size, th_rc, (th_h, size_t *))                                                                        \
    X(torch_delete_list, th_rc, (th_h))                                                                                \
    X(torch_new_string_handle, th_rc, (const char *, size_t, th_h *))                                                  \
    X(torch_new_stable_ivalue, th_rc, (th_cell **))                                                                    \
    X(torch_exception_get_what_without_backtrace, const char *, (void))                                                \
    X(aoti_torch_cpu_add_Tensor, th_rc, (th_h, th_h, double, th_h *))                                                  \
    X(aoti_torch_cpu_add_Scalar, th_rc, (th_h, double, double, th_h *))                                                \
    X(aoti_torch_cpu_mul_Tensor, th_rc, (th_h, th_h, th_h *))                                                          \
    X(aoti_torch_cpu_mul_Scalar, th_rc, (th_h, double, th_h *))                                                        \
    X(aoti_torch_cpu_mm_out, th_rc, (th_h, th_h, th_h))                                                                \
    X(aoti_torch_cpu_bmm_out, th_rc, (th_h, th_h, th_h))                                                               \
    X(aoti_torch_cpu_addmm_out, th_rc, (th_h, th_h, th_h, th_h, double, double))                                       \
    X(aoti_torch_cpu_cat, th_rc, (const th_h *, int64_t, int64_t, th_h *))                                             \
    X(aoti_torch_cpu_pow_Tensor_Scalar, th_rc, (th_h, double, th_h *))                                                 \
    X(aoti_torch_device_type_meta, int32_t, (void))                                                                    \
    X(torch_parallel_for, th_rc, (int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *))              \
    X(torch_get_num_threads, uint32_t, (void))

typedef struct thx_abi {
    th_dylib *library;
    bool on;           /* handles may be borrowed, read, made and wrapped */
    bool dispatcher;   /* torch_call_dispatcher and its encodings passed the self-test */
    bool shims;        /* the direct CPU kernels passed the self-test */
    uint64_t version;  /* passed to torch_call_dispatcher */
    size_t borrow;     /* offset of the TensorImpl pointer in a torch.Tensor object */
    int autograd_meta; /* byte offset of the autograd metadata pointer in TensorImpl; -1: unknown */
    int requires_grad; /* byte offset of the flag behind that pointer */
    bool (*impl_requires_grad)(const void *impl); /* where the flag is not set; NULL: ask Python */
    int keys;                                     /* byte offset of the dispatch keys in TensorImpl; -1: unknown */
    uint64_t lazy;                                /* the keys of lazily conjugated and of negated tensors */
    int layout, layout_words; /* the words of TensorImpl from the number of dimensions to the keys; -1: none */
    bool state;               /* the following, of the thread, passed the self-test */
    int64_t (*function_modes)(void), (*dispatch_modes)(void);
    int8_t (*default_dtype)(void);
    bool (*keys_excluded)(uint64_t), (*keys_included)(uint64_t); /* all of them? */
    uint64_t autocast_keys;                                      /* all excluded: autocast is off */
    uint64_t view_keys;                                          /* included: no inference mode */
    uint64_t tracer_keys;                                        /* included: torch.jit.trace is at work */
    void *const *(*functorch_layers)(void);
    PyObject *(*wrap)(th_h);  /* new reference to a torch.Tensor of a handle, which stays owned by the caller */
    PyObject *steal;          /* torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs, the road without `wrap` */
    int32_t scalar_types[64]; /* th_dtype -> torch's number; -1 unknown */
    uint8_t dtypes[64];       /* torch's number -> th_dtype */
    PyObject *report;         /* dict: feature -> why it is off, for thunder.torch_abi() */
#define THX_FIELD(name, ret, args) ret(*name) args;
    THX_ABI_SYMBOLS(THX_FIELD)
#undef THX_FIELD
} thx_abi;

/* Fill the table and run the self-test. Never fails because a symbol is missing; -1 with a Python error otherwise. */
int thx_abi_init(thx_abi *abi, th_ctx *ctx, PyObject *torch);
void thx_abi_fini(thx_abi *abi);

static inline th_h thx_borrow(const thx_abi *abi, PyObject *tensor) { return (char *)tensor + abi->borrow; }

/* Turn an owned handle into a tensor object; the handle is consumed either way. */
PyObject *thx_wrap(const thx_abi *abi, th_h handle);

/* -1 when it has to be asked of Python. Most tensors need no call: it costs more than all else here. */
static inline int thx_requires_grad(const thx_abi *abi, PyObject *tensor) {
    if (abi->autograd_meta < 0) return -1;
    const char *impl = *(char **)thx_borrow(abi, tensor);
    const char *meta = *(char **)(impl + abi->autograd_meta);
    if (!meta) return 0;
    if (meta[abi->requires_grad]) return 1;
    return abi->impl_requires_grad ? abi->impl_requires_grad(impl) : -1; /* of an operation's result, of a view */
}

/* Surely none of inference mode: it has the keys that such a one lacks. */
static inline bool thx_is_ordinary(const thx_abi *abi, PyObject *tensor) {
    if (!abi->state || abi->keys < 0) return false;
    const char *impl = *(char **)thx_borrow(abi, tensor);
    return (*(const uint64_t *)(impl + abi->keys) & abi->view_keys) == abi->view_keys;
}

static inline bool thx_functorch_at_work(const thx_abi *abi) { /* begin and end of a std::vector */
    void *const *layers = abi->functorch_layers();
    return layers[0] != layers[1];
}

/* Copy the piece of a tensor's memory that holds its sizes, strides, dtype, device and keys; false where there is no
 * such piece: of more than five dimensions, of sizes that are symbols, or without calibration. */
enum { THX_LAYOUT_WORDS = 20 };
bool thx_layout_read(const thx_abi *abi, PyObject *tensor, uint64_t *piece);

/* Is the piece what was read then? Else it may be still: ask. */
static inline bool thx_layout_is(const thx_abi *abi, PyObject *tensor, const uint64_t *piece) {
    const uint64_t *now = (const uint64_t *)(*(char **)thx_borrow(abi, tensor) + abi->layout);
    uint64_t differ = 0;
    for (int i = 0; i < abi->layout_words; i++) differ |= now[i] ^ piece[i];
    return !differ;
}

/* Does it show other values than its memory holds, conjugated or negated ones? */
static inline bool thx_is_lazy(const thx_abi *abi, PyObject *tensor) {
    if (abi->on && abi->keys >= 0) {
        const char *impl = *(char **)thx_borrow(abi, tensor);
        return (*(const uint64_t *)(impl + abi->keys) & abi->lazy) != 0;
    }
    bool lazy = false;
    for (int i = 0; i < 2 && !lazy; i++) {
        PyObject *flag = PyObject_CallMethod(tensor, i ? "is_neg" : "is_conj", NULL);
        lazy = flag == Py_True;
        Py_XDECREF(flag);
    }
    PyErr_Clear();
    return lazy;
}

#endif
