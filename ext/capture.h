/* The recorder of one capture: from user code running on fakes to a trace and its roots.
 *
 * recorder.c keeps what has been seen (objects, values, roots, constants) and runs the user's code;
 * observer.c holds the two observers that are called for each operation; funcs.c knows the function objects.
 */
#ifndef THUNDER_CAPTURE_H
#define THUNDER_CAPTURE_H

#include "ext.h"

typedef struct thx_cell { /* of the recorder's pointer-keyed table */
    PyObject *key;        /* owned: a fake, or a real tensor */
    PyObject *fake;       /* for a real tensor: its fake once there is one (owned); its cell then holds the value */
    th_val value;         /* the value it stands for now */
    bool ours;            /* a fake that a rule of ours made and no kernel has seen */
} thx_cell;

typedef struct thx_root { /* an input of the trace and where a call finds it */
    th_val value;
    PyObject *real;       /* owned: the tensor seen at capture */
    int32_t leaf;         /* index among the tensors of the arguments; -1: not an argument */
    PyObject *dict, *key; /* owned or NULL: dict[key] of the module tree holds it */
    void *base;           /* of its storage; NULL: none */
    bool requires_grad;
} thx_root;

typedef struct thx_read_grad { /* a tensor of the caller's, and what lay at its `.grad`: a tensor or None (owned) */
    PyObject *tensor, *grad;
} thx_read_grad;

typedef struct thx_pool thx_pool;
typedef struct thx_shadow thx_shadow;

typedef struct thx_line { /* of the recorder's cache: the line of an instruction */
    PyObject *code;       /* owned */
    int at;
    th_str file;
    uint32_t line;
} thx_line;
enum { THX_LINES = 1024 };

typedef struct thx_recorder {
    PyObject_HEAD thx *x;
    th_trace *t;
    thx_cell *cells;
    uint32_t ncells, cap_cells;
    thx_root *roots;
    uint32_t nroots, cap_roots;
    PyObject **consts; /* by value: the real tensor of a value without input roots, once evaluated (owned) */
    uint32_t nconsts;
    PyObject *bound;  /* its own __torch_function__ while the capture runs: a cycle, so no longer than that (owned) */
    PyObject *params; /* dict: id of a tensor -> (dict, key, dotted name) in the module tree, or NULL */
    PyObject *claims; /* of the callable, or NULL (borrowed) */
    PyObject *error;  /* the first CaptureError: raised at the end even if user code swallowed it (owned) */
    PyObject *absent; /* list of (leaf or -1, tensor or None, name): attributes that a tensor was asked for and lacks */
    PyObject *needed; /* the first GradNeeded, likewise (owned) */
    PyObject *doubt;  /* why torch may refuse what the code did: only the original can tell (owned) */
    PyObject **inputs; /* tensors of the operation being recorded: fakes, or real ones that have none yet (borrowed) */
    uint32_t ninputs, cap_inputs;
    bool real_inputs;   /* some of them came as real tensors */
    bool wrapped_input; /* a functorch wrapper was met: leave the call to layer 2 */
    bool forgivable;    /* a CaptureError now is the user's to catch: only a message was to be made */
    bool writes_part;   /* the operation writes where an index says: x[i] = y */
    bool saw_random;
    bool hidden_write;          /* something that requires grad was written while gradients were off */
    int recompute;              /* above 0: inside a checkpoint */
    PyObject *leaves;           /* set of values that the code made to require grad, or NULL (owned) */
    PyObject *ties;             /* list of (hook or node, file, line), or NULL: tie.c (owned) */
    PyObject *hooks;            /* saved tensor hooks that were active when the capture began (owned) */
    bool late;                  /* while deriving: autograd runs backwards */
    bool editing;               /* records a function for an edit of a trace: record.c */
    bool deriving;              /* records what autograd does for one operation: derive.c */
    bool inference;             /* inference mode of the caller */
    bool inside, outside;       /* operations were recorded in an inference mode of the program's own, and out of one */
    uint64_t schema_writes;     /* bit per input: an operation's schema says that it writes it */
    struct thx_guards *reached; /* of the callable that is captured; NULL: none */
    thx_read_grad *read_grads;  /* read_grads.c */
    uint32_t nread_grads, nleaves; /* nleaves: of the arguments */
    bool threads;                  /* other ones of Python's were seen while it is captured */
    bool seeded;                   /* the program set a generator's state since that was last looked at */
    PyObject *rng_last;            /* the generator's state when it was last looked at (owned) */
    PyObject *rng_outer; /* list of states that belong to the caller's stream; the last one is where it stands now */
    th_val rng_saved;    /* while the program runs on a seed of its own: the caller's state, to go back to */
    PyObject **codes;    /* code objects that ran, by address: open addressing (owned) */
    uint32_t ncodes, cap_codes;
    const PyMethodDef *warns; /* warnings.warn or the like while it is at work; NULL */
    PyObject *messages;       /* list of what the program gave to warnings and logging: thunder/_messages.py; or NULL */
    PyObject *asking;         /* dict: code -> the variables whose types it asks (owned); NULL: none does */
    bool may_expect;          /* values of tensors may be found out: a call is captured, and has real inputs */
    PyObject *tape;           /* of numbers that are followed, or NULL (borrowed) */
    PyObject *numbers;        /* r->sizes.values (borrowed) */
    PyObject *sizes;          /* thunder._sizes.Sizes: those of arguments are followed; or NULL (borrowed) */
    const th_trace *like;     /* then: a capture with other sizes (borrowed) */
    PyObject *fixed;          /* then: set of values whose sizes the program was told, which must not change (owned) */
    PyObject *oracle;         /* tuple of values of tensors that a run has seen, in order; or NULL (owned) */
    PyObject *expected;       /* list of all that the program was told, or NULL (owned) */
    thx_shadow *shadow;       /* shadow.c; NULL until a value is asked for */
    thx_pool *pool;           /* pool.c; NULL until the first fake of our own */
    thx_line *lines;          /* THX_LINES, by code and instruction; NULL until the first look-up */
    PyObject *cast;           /* dict: (value, dtype) -> what autocast casts once and keeps; or NULL (owned) */
    bool autocast;            /* of the caller */
    int casting;              /* above 0: an operation under autocast is recorded, with autocast off */
    PyObject *heard;          /* while autocast.c listens: list of the kernels that are called; or NULL (borrowed) */
    int depth;                /* above 0: inside an operation that is recorded whole */
    th_dtype default_dtype;
    th_dev default_device;
    uint32_t nfast, nslow, nqueries, nevals;
} thx_recorder;

/* ---- recorder.c ---- */
thx_recorder *thx_recorder_new(thx *x, PyObject *params);
/* Register an argument's tensor before the run: its fake (borrowed). */
PyObject *thx_recorder_argument(thx_recorder *r, PyObject *real, uint32_t leaf);
/* Where the current value of a fake or a real tensor is kept, made when new; NULL with an exception. */
thx_cell *thx_recorder_cell(thx_recorder *r, PyObject *tensor);
/* The input of the trace that a fake stands for, whatever was written to it since; NULL: the program made it. */
const thx_root *thx_recorder_root(thx_recorder *r, PyObject *fake);
thx_cell *thx_recorder_known(thx_recorder *r, PyObject *tensor); /* the same, NULL when it is new */
/* The code asks for an attribute that no tensor has of itself. 0: nor has this one, which each call looks at again; -1
 * with CaptureError: the caller's tensor has it. */
bool thx_has_own_attribute(PyObject *tensor, PyObject *name);
int thx_recorder_missing(thx_recorder *r, PyObject *fake, PyObject *name);
/* -1 with CaptureError: the program gave attributes to what stands for an input, or to one of its results. */
int thx_recorder_check_attributes(thx_recorder *r, PyObject *const *results, uint32_t n);
PyObject *thx_recorder_fake(thx_recorder *r, PyObject *tensor); /* the fake of a real tensor, or itself: borrowed */
th_val thx_recorder_value(void *recorder, PyObject *tensor);    /* 0 with an exception */
int thx_recorder_define(thx_recorder *r, PyObject *fake, th_val value); /* bind or re-bind a fake */
int thx_recorder_run(thx_recorder *r, PyObject *fn, PyObject *args, PyObject *kwargs, PyObject **result);
/* The real tensor of a value that depends on no input: borrowed; NULL without exception when it does depend on one. */
PyObject *thx_recorder_constant(thx_recorder *r, th_val value);
/* An operation with these arguments was run to see its result: numbers of these values have been looked at. */
/* Which number of the tape of the capture under way is it? -1: of none. */
int thx_number_place(thx *x, PyObject *number);
int thx_numbers_folded(const thx_recorder *r, const th_trace *t, th_node n);
int thx_recorder_constant_root(thx_recorder *r, PyObject *real,
                               th_val value); /* value: an input of the trace already */
PyObject *thx_eval_op(thx *x, const th_trace *t, const th_op *op, thx_value_fn value, void *user);
/* Raise CaptureError for the user's current line and remember it; always -1. */
#define THX_TENSOR_ATTRIBUTE   "an attribute of a tensor"
#define THX_OBJECT_IN_C        "an object that C code implements"
#define THX_APPEARED           "a tensor that torch's functions did not make"
#define THX_TRANSFORMED_RANDOM "random numbers inside a functorch transform"
#define THX_TWO_CONTAINERS     "a container in the arguments that the function can also reach by itself"
#define THX_SHARED_ARRAY       "an array that shares the memory of a tensor"
int thx_capture_error(thx_recorder *r, const char *construct, const char *reason, const char *fix);
int thx_refuse_lazy(thx_recorder *r); /* a tensor that shows other values than it holds: CaptureError; -1 */
void thx_user_line(thx_recorder *r, th_str *file, uint32_t *line);
int thx_recorder_init(thx *x, PyObject *module);

/* ---- observer.c, data.c ---- */
PyObject *thx_torch_function(PyObject *recorder, PyObject *const *args, Py_ssize_t nargs);
PyObject *thx_torch_dispatch(PyObject *module, PyObject *const *args, Py_ssize_t nargs); /* of the fakes */
bool thx_read_of_fake_data(void); /* does the pending exception say that a kernel wanted a fake's memory? */
PyObject *thx_watch_dispatch(PyObject *recorder, PyObject *const *args,
                             Py_ssize_t nargs); /* mode: notes random kernels */

PyObject *thx_record_call(thx_recorder *r, PyObject *callee, PyObject *args, PyObject *kwargs); /* as one operation */
bool thx_under_functorch(thx *x);

/* ---- custom.c: torch.autograd.Function ---- */
int thx_custom_init(thx *x, PyObject *module);
PyObject *thx_custom_class(thx *x, PyObject *callee); /* whose apply a recorded callee is: borrowed; NULL: none's */
/* State that the methods of such a class can reach. */
struct thx_guards *thx_custom_state(thx *x, PyObject *cls);
/* Put it back as it was. -1 with an exception: its backward has changed it. */
int thx_custom_check(thx *x, struct thx_guards *state);
int thx_custom_enter(thx *x);
void thx_custom_leave(thx *x);
/* ---- operator.c: calls of a user's operators ---- */
int thx_operator_init(thx *x, PyObject *module);

/* ---- read_grads.c: the `.grad` of a caller's tensor ---- */
PyObject *thx_read_grad_of(thx_recorder *r, PyObject *tensor); /* NULL without exception: it cannot be an input */
void thx_read_grads_fini(thx_recorder *r);

/* ---- pool.c ---- */
PyObject *thx_pool_fake(thx_recorder *r, th_typeref type); /* for a value of our own rules: new reference */

/* ---- purity.c: what a capture must not do, because later calls would not do it again ---- */
typedef struct thx_purity { /* the profiler of Python that was set before */
    Py_tracefunc before;
    PyObject *argument;
    PyObject *numpy;    /* the state of numpy's global generator; NULL: numpy is not there */
    PyObject *listener; /* thunder._messages.Listener */
} thx_purity;
bool thx_is_unseen_by_dynamo(thx *x);
void thx_purity_begin(thx_recorder *r, thx_purity *p);
/* The recorder keeps its error, when it drew numbers from numpy's global generator, which is put back, or the like. */
void thx_purity_end(thx_recorder *r, thx_purity *p);
/* What it gives to warnings and logging is heard instead of shown (r->messages): NULL without exception: shown. */
PyObject *thx_listen(thx_recorder *r);
void thx_stop_listening(thx_recorder *r, PyObject *listener); /* of thx_listen, or NULL; consumed */
PyObject *thx_refuse_message(PyObject *recorder, PyObject *const *args, Py_ssize_t nargs); /* (what, why) */
int thx_purity_init(thx *x);
PyObject *thx_codes_list(const thx_recorder *r); /* the code that ran */

/* ---- random.c: seeding inside captured code ---- */
int thx_random_begin(thx_recorder *r);
int thx_random_before(thx_recorder *r); /* before a random operation is recorded, and at the end of a capture */
int thx_random_after(thx_recorder *r);  /* after one */
int thx_random_end(thx_recorder *r);    /* put the generator back as it was */
/* A call that is not recorded itself. */
PyObject *thx_random_through(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs);
int thx_random_check(thx_recorder *r); /* of the operation recorded last: whose generators it draws from */
bool thx_random_is_state(thx_recorder *r, PyObject *tensor); /* of torch's generator, as the program asked for it */
PyObject *thx_random_generators(const thx *x, const th_trace *t); /* list: those besides torch's own */
int thx_emit(thx_recorder *r, const th_op_args *op);              /* append an operation at the user's current line */

/* ---- gradstate.c: what autograd would say ---- */
typedef struct thx_grad_note { /* of one operation */
    bool grad;                 /* its results require grad */
    uint8_t marks;             /* TH_MARK_* */
} thx_grad_note;
int thx_note_grad(thx_recorder *r, th_str callee, const th_opdef *def, thx_grad_note *note); /* of r->inputs */
th_typeref thx_flag_type(const thx_recorder *r, th_typeref type, const thx_grad_note *note);
/* Torch may refuse what the code did, and only the original can tell: the call runs it. Always -1 with an exception. */
int thx_doubt(thx_recorder *r, const char *why);
bool thx_asks_of_intermediate(thx_recorder *r, const thx_func *f, PyObject *args); /* f: one that is refused */
int thx_check_write(thx_recorder *r, th_val value, thx_grad_note *note);           /* -1: torch would refuse it */
void thx_note_write(thx_recorder *r, th_val value, const thx_grad_note *note);
PyObject *thx_grad_needed(thx_recorder *r, const char *why);   /* raises: calls must run eager; always NULL */
int thx_tensor_flag(thx_recorder *r, PyObject *tensor);        /* 1 requires grad, 0 does not, -1 error */
bool thx_tensor_says(PyObject *tensor, const char *attribute); /* a flag, or a method without arguments */
int thx_make_leaf(thx_recorder *r, PyObject *tensor);
bool thx_was_made_leaf(const thx_recorder *r, th_val value); /* by the code, of something that required no grad */
int thx_note_hooks_begin(thx_recorder *r);
int thx_gradstate_init(thx *x, PyObject *module);
PyObject *thx_ask_autograd(thx_recorder *r, const thx_func *f, PyObject *func, PyObject *args, PyObject *kwargs);

/* ---- tie.c: hooks that captured code registers; tensor: a fake that requires grad and is no input ---- */
PyObject *thx_tie_hook(thx_recorder *r, PyObject *tensor, PyObject *hook);
PyObject *thx_tie_grad(thx_recorder *r, PyObject *tensor);
PyObject *thx_tie_module(thx_recorder *r, PyObject *args); /* BackwardHookFunction.apply(cls, *tensors) */
PyObject *thx_tie_node(thx_recorder *r, PyObject *tensor);
void thx_ties_close(thx_recorder *r); /* the user's code has ended: handles no longer remove */
struct thx_guards;
int thx_ties_check(thx_recorder *r, const struct thx_guards *g); /* -1 with GradNeeded: a hook is not made to last */

/* ---- constants.c ---- */
int thx_fold_constants(thx *x, thx_recorder *r, th_trace *t); /* new constants become roots of r */
/* For showing: the inputs from `first` on are what was evaluated; they become foreign objects of their names, so that
 * the text is a function of the same arguments at every stage. */
int thx_name_constants(thx *x, th_trace *t, uint32_t first, const th_slot *roots);

/* ---- funcs.c ---- */
const thx_func *thx_func_find(thx *x, PyObject *function); /* NULL with an exception */
void thx_funcs_free(thx *x);

#endif
