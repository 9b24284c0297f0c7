/* The shape of nested Python values with tensors at the leaves: recorded once, matched at each call, rebuilt for
 * outputs. */
#ifndef THUNDER_STRUCTURE_H
#define THUNDER_STRUCTURE_H

#include "ext.h"

#include "guards.h"

typedef enum thx_spec_kind {
    THX_S_CONST = 1, /* equal value of the same type (numbers, strings, ...), or the same object */
    THX_S_TENSOR,
    THX_S_NUMBER, /* any float, or any int: `leaf` is its place among the numbers */
    THX_S_TUPLE,  /* exact tuple */
    THX_S_LIST,   /* list and its subclasses, with instance attributes if any */
    THX_S_NAMED,  /* named tuple or structseq */
    THX_S_SLICE,  /* start, stop, step */
    THX_S_DEQUE,  /* object: its maxlen */
    THX_S_DICT,   /* dict and its subclasses, with instance attributes if any: keys are consts */
    THX_S_OBJECT, /* an object by its attributes */
    THX_S_BUFFER, /* numpy array or bytearray: object is a copy, contents are compared */
    THX_S_SAME,   /* a container that was met before: number `leaf` */
    THX_S_INPUT,  /* results only: a container of the arguments; object is the path to it */
    THX_S_EXTENT, /* results only: number `leaf` of what the program computes of sizes; object: its value at capture */
} thx_spec_kind;

typedef struct thx_spec {
    uint8_t kind;
    bool by_identity;       /* CONST */
    bool members;           /* the type has __slots__ or C members, besides a __dict__ or without one */
    PyTypeObject *type;     /* owned */
    PyObject *object;       /* owned: the constant; or the tuple of keys, of items first, then of attributes */
    PyObject *original;     /* owned or NULL: an OBJECT argument without tensors is passed on as it is */
    uint32_t nkids, nitems; /* the first nitems kids are items, the rest attributes */
    uint32_t number;        /* CONST: above 0 for a float or int that a capture follows, from 1; numbers.c, sizes.c */
    uint32_t memo;          /* above 0: SAME specs refer to this container by memo - 1 */
    struct thx_spec *kids;
    /* TENSOR */
    uint32_t leaf;            /* index among the leaves; the same tensor twice has one index */
    bool repeated;            /* an earlier leaf was this very tensor */
    bool requires_grad, lazy; /* lazy: conjugated or negated when it is read */
    int32_t dtype, device_type, device_index;
    int64_t ndim, *dims; /* ndim sizes, then ndim strides; owned */
    uint64_t free;       /* bit by dimension: its size may be any from 2 on */
    uint8_t *dense;      /* then: its dimensions from the innermost on, and by place among these: is its stride what
                            those before span? owned; otherwise NULL */
} thx_spec;

enum { THX_EXTENT_LEAF = 1u << 31 }; /* asked of a leaf function with the number of an extent */
enum { THX_MAX_NUMBERS = 16 };       /* floats among the arguments that may be another one at each call */
enum { THX_MAX_SHARED = 16 };        /* containers that may occur more than once among arguments, and in a result */

typedef struct thx_leaves { /* distinct tensors in the order of the walk (borrowed) */
    PyObject **items;
    uint32_t count, cap;
    PyObject *const *args;              /* of the call */
    PyObject *held;                     /* list of those that nothing else holds, or NULL (owned) */
    PyObject *shared[THX_MAX_SHARED];   /* by memo - 1 (borrowed) */
    PyObject *numbers[THX_MAX_NUMBERS]; /* by place (borrowed) */
    PyObject *fixed[24];
} thx_leaves;
void thx_leaves_init(thx_leaves *l);
void thx_leaves_fini(thx_leaves *l);

/* Describe the arguments of a call, one spec each (zeroed by the caller); their tensors are appended to leaves.
 * -1 with an exception: nested too deep, or something that cannot be described. */
int thx_specs_init(thx *x, thx_spec *specs, PyObject *const *objects, uint32_t count, thx_leaves *leaves);
void thx_spec_settle(thx_spec *spec); /* nothing is built from it any more: let go of the caller's objects */
void thx_spec_fini(thx_spec *spec);
/* 1 matches (leaves appended), 0 does not, -1 error. */
int thx_spec_match(thx *x, const thx_spec *spec, PyObject *object, thx_leaves *leaves);

/* Rebuild with each tensor replaced by leaf(user, index) (a new reference). shared: THX_MAX_SHARED places, one array
 * for all arguments of a call. */
typedef PyObject *(*thx_leaf_fn)(void *user, uint32_t leaf);
PyObject *thx_spec_build(thx *x, const thx_spec *spec, thx_leaf_fn leaf, void *user, PyObject **shared);

/* Describe what captured code returned. The objects are the arguments it ran with, built from the specs. */
struct thx_recorder;
typedef struct thx_inputs {
    const thx_spec *specs;
    PyObject *const *objects;
    uint32_t count;
    PyObject *index; /* of a capture: dict: id of a container of theirs -> path */
} thx_inputs;
PyObject *thx_argument_at(const thx_inputs *inputs, PyObject *path); /* new reference: the part of this call's */
int thx_result_init(struct thx_recorder *r, thx_spec *spec, PyObject *result, const thx_inputs *inputs,
                    const thx_guards *guards, thx_leaves *leaves);
PyObject *thx_result_build(thx *x, const thx_spec *spec, thx_leaf_fn leaf, void *user, const thx_inputs *inputs);

/* Does an array or the like in `object`, which the spec describes, show part of that memory? */
bool thx_spec_buffer_in(const thx_spec *spec, PyObject *object, const thx_memory *memory);
/* Do arrays and the like in `fake`, built from spec, hold what they did? */
bool thx_spec_buffers_unchanged(const thx_spec *spec, PyObject *fake);
bool thx_same_constant(PyObject *a, PyObject *b); /* numbers, by their bits, and strings */
bool thx_spec_has_tensor(const thx_spec *spec);
/* Append the objects that are compared by identity only to `list`, and the classes of the others: their methods may be
 * replaced. */
int thx_spec_identities(const thx_spec *spec, PyObject *list);
int thx_spec_traverse(const thx_spec *spec, visitproc visit, void *arg);

#endif
