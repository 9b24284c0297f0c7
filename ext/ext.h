/* What the rooms of the extension share: the module state `thx`, conversions, and each room's entry points.
 *
 * All state hangs on one `thx`, made at import and passed as the first argument; there are no file-scope variables.
 * Functions that return PyObject * follow CPython's conventions (new reference, NULL with an exception); functions that
 * return int give 0 or -1 with an exception unless they say otherwise.
 */
#ifndef THUNDER_EXT_H
#define THUNDER_EXT_H

#include "torchabi.h"

#include "runtime/plan.h"
#include "thunder/thunder.h"

#include <structmember.h>

typedef enum thx_func_kind {
    THX_FUNC_RECORD = 1,
    THX_FUNC_QUERY,  /* asks about metadata: run on the fake */
    THX_FUNC_DATA,   /* asks for values */
    THX_FUNC_GRAD,   /* asks or tells autograd something: gradstate.c */
    THX_FUNC_SKIP,   /* switches a mode: run, not recorded */
    THX_FUNC_REFUSE, /* cannot be captured */
    THX_FUNC_ASK,    /* asks for what only eager knows */
    THX_FUNC_CHECK,  /* ours: raises or warns, by data */
} thx_func_kind;
typedef struct thx_func { /* what is known about a torch function object: funcs.c */
    PyObject *key;        /* owned */
    th_str callee;        /* 0: no importable name */
    const th_opdef *def;
    uint8_t kind;
    bool random;
    bool in_parts; /* its derivative, where it needs values, is that of the operations it is made of */
} thx_func;

typedef struct thx_code { /* of the cache of code objects: recorder.c */
    PyObject *code;       /* owned */
    th_str file;          /* base name */
    bool torch;           /* torch's own code: not what a user calls a line */
    bool standard;        /* of Python's own library: a line only where nobody else called it */
} thx_code;

enum { THX_CODES = 256, THX_DEVICES = 32 }; /* of the caches below; others take the slower road */

typedef struct thx_names { /* interned attribute names */
    PyObject *torch_function, *torch_dispatch, *dict, *class_, *device, *enter, *exit, *self, *name, *module, *qualname,
        *objclass, *fields, *fake_device, *type, *index, *dtype, *requires_grad, *version, *tags, *wrapped, *to_save,
        *materialize_grads, *pending, *saved_tensors, *current_level, *parameters, *buffers, *modules;
} thx_names;

typedef struct thx {
    thx_abi abi;
    PyObject *module; /* borrowed: the state lives in it */
    th_ctx *ctx;
    th_catalog *catalog;
    thx_names n;
    PyObject *torch, *torch_c, *functional;
    PyTypeObject *Tensor, *TensorBase, *Parameter, *FakeTensor, *Size, *Dtype, *Device, *Layout, *MemoryFormat,
        *NnModule, *NumpyGeneric, *MethodWrapper;
    PyTypeObject *Callable, *Trace, *Proxy, *Symbol, *TraceCallable, *Observer, *Recorder, *Gradient, *Pending, *GradFn,
        *Region, *NativeOperator, *NativeKernel, *HandleCall, *CudaKernel;
    PyObject *CaptureError, *Unsupported; /* exceptions, from thunder._errors */
    PyObject *GradNeeded;                 /* internal: a capture that needs gradients */
    PyObject *ValueChanged;               /* internal: a run met another value than its program was made for */
    PyObject *StaleProgram;               /* internal: a run found out that its program has to be made anew */
    PyObject *SizesChanged;               /* internal: a program does not hold for the sizes that it met */
    PyObject *dtype_objects[TH_DTYPE_COUNT];
    PyObject *fake_classes; /* dict: device -> subclass of FakeTensor */
    struct {
        PyObject *device, *fake_class; /* by th_dev, made when first needed (owned) */
    } devices[THX_DEVICES];
    th_dev device_of[THX_DEVICES][THX_DEVICES]; /* by torch's device type and index + 1 */
    PyObject *fake_mode;                        /* the FakeTensorMode, made when first needed */
    PyObject *make_subclass, *empty_strided, *fake_kwnames, *elem_kwnames, *meta_device;
    PyObject *callables; /* dict: dotted name -> callable, for plans and evaluation */
    thx_func *funcs;     /* by identity of the function object: funcs.c */
    uint32_t nfuncs, cap_funcs;
    thx_func transient; /* description of a function without importable name; valid until the next look-up */
    PyObject *f_stack_len, *d_stack_len, *any_autocast, *default_dtype, *inference, *peek_functorch, *default_device;
    PyObject *tracing, *tensor_hash; /* the latter: code */
    PyObject *autocast_enabled, *autocast_dtype, *set_autocast, *grad_enabled, *set_grad, *inference_mode, *modes_off,
        *is_neg, *is_inference, *set_eval_frame, *use_count, *count_weakrefs, *get_rng_state, *set_rng_state, *equal,
        *rand;
    PyObject *autograd_grad, *is_view, *is_multithreading, *set_multithreading;
    PyObject *apply; /* of the autograd node's class: autograd.c */
    PyObject *top_hooks, *keep_graph, *is_legacy_batched, *below_autograd;
    PyObject *function_class, *function_class_apply, *function_apply, *function_watch;
    int applying;            /* above 0: we call Function.apply on our own account */
    /* custom.c */           /* NULL in a torch without them */
    struct thx_rule **rules; /* derived ones: derive.c */
    uint32_t nrules, cap_rules;
    bool counts_offsets; /* a rule was used that holds for inputs that start where they do in their storages */
    bool derived_only;   /* derivatives come from torch's autograd alone: for the tests of the catalogue's rules */
    PyObject *push_function, *pop_function, *push_dispatch, *pop_dispatch;
    getter version_get, requires_grad_get, grad_get;
    void *version_closure, *requires_grad_closure, *grad_closure;
    PyObject *active; /* the Recorder of the capture in progress, or NULL (borrowed) */
    unsigned long active_thread;
    bool compiling; /* some thread captures: others run the original meanwhile */
    PyObject *forward_ad, *no_function, *no_dispatch, *strided, *is_functorch, *is_alias_of, *random_tag,
        *fake_dispatch, *forbid_data_ptr, *increment_version, *functorch_level;
    PyObject *casts;               /* dict: kind of operation and of its arguments -> what autocast casts: autocast.c */
    PyObject *to_copy, *tensor_to; /* torch's overload of casts; Tensor.to */
    PyObject *step_value, *step_code; /* of torch.optim, and what it runs in a capture: thunder/_optimizers.py */
    PyObject *get_script_optimize, *set_script_optimize; /* TorchScript's optimiser: off while capturing */
    int dict_watcher;                   /* 3.12+: its id; -1: broken or none left, -2: not asked for yet */
    PyObject *empty_set;                /* the copy of every set that is empty, for guards */
    PyObject *impure;                   /* dict: definition of a C function -> (the function, why it is impure) */
    PyTypeObject *Generator;            /* torch's */
    PyObject *default_generator;        /* torch's, of the processor */
    PyTypeObject *generators[4];        /* whose methods draw random numbers that are not torch's; NULL at the end */
    const PyMethodDef *pure[THX_CODES]; /* C functions that were looked at and are not: by address */
    const PyMethodDef *warns[2];        /* warnings.warn and warnings.warn_explicit */
    PyObject *asks_level;               /* code of logging.Logger.isEnabledFor, once a capture has begun */
    PyObject *waits;                    /* code of threading.Condition.wait */
    PyObject *read_environment;         /* code of os.environ[...] */
    PyObject *remakes;                  /* code of a function that contextlib has decorated with a manager; or NULL */
    PyTypeObject *Remade;               /* the type of such a manager, which each call makes anew */
    PyObject *module_dicts;             /* frozenset: the dictionaries that every nn.Module has */
    PyObject *watch_counts;             /* 3.12+: dict: id of a dictionary -> how many guards watch it */
    uint64_t captures, entry_numbers;
    PyObject *tape;            /* of numbers that the capture in progress follows, or NULL: numbers.c */
    PyTypeObject *number_type; /* thunder._numbers.Number; NULL until the first tape */
    PyObject *following;       /* a thunder._sizes.Sizes while the arguments of its capture are made, or NULL */
    PyTypeObject *extent_type; /* thunder._sizes.Extent; NULL until sizes are followed for the first time: sizes.c */
    bool saw_extent;           /* one became a node since this was cleared */
    thx_code codes[THX_CODES];
    uint32_t facts;         /* TH_FACT_*: what meta rules may rely on */
    const char *passes;     /* the pipeline; NULL: the default one */
    bool verify;            /* check every trace after every pass: THUNDER_VERIFY=1 */
    struct thx_cuda *cuda;  /* cuda.c: NULL until the first kernel is built */
    struct th_cudnn *cudnn; /* cudnn.c: NULL until the first plan is made */
    PyObject *origins;      /* dict: file -> whose it is: origin.c */
    struct {
        PyObject *standard, *torch, *thunder; /* with a slash at the end; NULL: unknown (owned) */
    } folders;
} thx;

/* ---- raise.c: the only room that turns a core error into an exception ---- */
PyObject *thx_raise(thx *x, th_status status); /* always NULL */
int thx_check(thx *x, th_status status);       /* 0, or -1 with the exception */

/* ---- convert.c ---- */
enum { THX_MAX_RANK = 64 };
typedef struct thx_meta {
    th_dtype dtype;
    th_dev device;
    int64_t ndim, offset;
    int64_t shape[THX_MAX_RANK], stride[THX_MAX_RANK];
    bool requires_grad;
} thx_meta;
static inline bool thx_is_tensor(const thx *x, PyObject *o) { return PyObject_TypeCheck(o, x->Tensor); }
int thx_read_meta(thx *x, PyObject *tensor, bool fake, thx_meta *meta);
th_typeref thx_meta_type(thx *x, const thx_meta *meta);
/* A context manager that `make` gives, entered; NULL with an exception. thx_leave exits and releases it: a pending
 * exception stays, one of its own is dropped. x->modes_off: no function mode, ours or the user's, sees what we call on
 * our own account. */
PyObject *thx_enter(thx *x, PyObject *make);
void thx_leave(thx *x, PyObject *manager);
PyObject *thx_empty_strided(thx *x, const th_type *type, PyObject *device); /* laid out as the type says */
PyObject *thx_int_tuple(const int64_t *items, uint32_t n);
int thx_needs_grad(thx *x, PyObject *tensor); /* 0, 1, -1 where it does not say; no exception */
int thx_grad_mode(thx *x);                    /* 0, 1, -1 with an exception */
typedef struct thx_memory {
    const char *from;
    size_t bytes; /* 0: none, or none that is known */
} thx_memory;
thx_memory thx_storage_memory(thx *x, PyObject *tensor);
bool thx_buffer_in(PyObject *o, const thx_memory *memory); /* part of what an array or the like shows */
void *thx_storage_base(thx *x, PyObject *tensor); /* equal for real tensors that share storage; NULL: no memory */
th_dev thx_device_ref(thx *x, PyObject *device);
PyObject *thx_device_object(thx *x, th_dev device);
th_dtype thx_dtype_ref(thx *x, PyObject *dtype);

/* Tensors become what `tensor` answers: a value (0: error set). Foreign objects become opaque entries. 0 on error. */
typedef th_val (*thx_tensor_fn)(void *user, PyObject *tensor);
th_node thx_to_node(thx *x, th_trace *t, PyObject *object, thx_tensor_fn tensor, void *user);
/* The inverse: values come from `value` (new reference). */
typedef PyObject *(*thx_value_fn)(void *user, th_val value);
PyObject *thx_from_node(thx *x, const th_trace *t, th_node node, thx_value_fn value, void *user);
PyObject *thx_callable(thx *x, const th_trace *t, const th_op *op); /* borrowed */
extern const th_opaque_vtable thx_opaque_vtable;

/* ---- fake.c ---- */
PyObject *thx_fake(thx *x, th_typeref type);      /* a fresh fake of that type */
PyObject *thx_fake_adopt(thx *x, PyObject *fake); /* give a plain FakeTensor our class; borrowed argument, 0/-1 style */
bool thx_is_fake(const thx *x, PyObject *o);
bool thx_holds_fake(thx *x, PyObject *o); /* is it one, or does one lie in it? */
PyObject *thx_fake_mode(thx *x);          /* borrowed */
int thx_fake_init(thx *x, PyObject *module);

#endif
