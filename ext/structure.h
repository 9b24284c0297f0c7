/* The shape of nested Python values with tensors at the leaves: recorded once, matched at each call, rebuilt for
 * outputs. */
#ifndef THUNDER_STRUCTURE_H
#define THUNDER_STRUCTURE_H

#include "ext.h"

typedef enum thx_spec_kind {
    THX_S_CONST = 1, /* equal value of the same type (numbers, strings, ...), or the same object */
    THX_S_TENSOR,
    THX_S_TUPLE,  /* exact tuple */
    THX_S_LIST,   /* exact list */
    THX_S_NAMED,  /* named tuple or structseq */
    THX_S_DICT,   /* dict and its subclasses, with instance attributes if any: keys are consts */
    THX_S_OBJECT, /* an object by its __dict__ */
} thx_spec_kind;

typedef struct thx_spec {
    uint8_t kind;
    bool by_identity;       /* CONST */
    PyTypeObject *type;     /* owned */
    PyObject *object;       /* owned: the constant; or the tuple of keys */
    uint32_t nkids, nitems; /* DICT: the first nitems kids are items, the rest attributes */
    struct thx_spec *kids;
    /* TENSOR */
    uint32_t leaf; /* index among the leaves; the same tensor twice has one index */
    bool repeated; /* an earlier leaf was this very tensor */
    bool requires_grad;
    int32_t dtype, device_type, device_index;
    int64_t ndim, *dims; /* ndim sizes, then ndim strides; owned */
} thx_spec;

typedef struct thx_leaves { /* distinct tensors in the order of the walk (borrowed) */
    PyObject **items;
    uint32_t count, cap;
    PyObject *fixed[24];
} thx_leaves;
void thx_leaves_init(thx_leaves *l);
void thx_leaves_fini(thx_leaves *l);

/* Describe `object`; its tensors are appended to leaves. with_meta: record tensor metadata for matching.
 * -1 with an exception: nested too deep, or a container that cannot be described. */
int thx_spec_init(thx *x, thx_spec *spec, PyObject *object, bool with_meta, thx_leaves *leaves);
void thx_spec_fini(thx_spec *spec);
/* 1 matches (leaves appended), 0 does not, -1 error. */
int thx_spec_match(thx *x, const thx_spec *spec, PyObject *object, thx_leaves *leaves);
/* Rebuild with each tensor replaced by leaf(user, index) (a new reference). */
typedef PyObject *(*thx_leaf_fn)(void *user, uint32_t leaf);
PyObject *thx_spec_build(thx *x, const thx_spec *spec, thx_leaf_fn leaf, void *user);
/* Is `fake`, built from spec with fakes, still as it was built? Tensors by identity, through the recorder's roots. */
struct thx_recorder;
bool thx_spec_unchanged(thx *x, const thx_spec *spec, PyObject *fake, thx_leaves *seen, struct thx_recorder *r);
bool thx_spec_has_tensor(const thx_spec *spec);

#endif
