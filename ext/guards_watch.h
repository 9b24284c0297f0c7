/* What guards watch, as a capture found it. Python 3.11 stamps each dictionary with a version that changes at every
 * write; later versions call a watcher instead, which counts events. Seen by the files guards*.c alone. */
#ifndef THUNDER_GUARDS_WATCH_H
#define THUNDER_GUARDS_WATCH_H

#include "guards.h"

#if PY_VERSION_HEX < 0x030C0000
#define HAVE_VERSION_TAGS 1
#else
#define HAVE_VERSION_TAGS 0
#endif

typedef struct watch_dict {
    PyObject *dict, **items; /* items: key, value, key, value as at the capture; one block of memory, NULL when empty */
    Py_ssize_t count;        /* of pairs */
    bool attributes, ignored; /* attributes: of an object, read by name. ignored (here and below): it cannot matter */
    bool saving;              /* a module's own, which its state_dict() alone reads */
    bool bare;                /* of a tensor that nobody has given an attribute */
} watch_dict;

typedef struct watch_stamp { /* what a check compares first: small and side by side, for there are hundreds */
    PyObject *dict;          /* borrowed from the watch_dict of the same place */
    uint64_t tag;
} watch_stamp;

typedef struct watch_sequence { /* list, deque-like or set: length, then elements by identity (sets by equality) */
    PyObject *object, *copy;
    bool ignored, is_set, saving;
} watch_sequence;

typedef struct watch_object {
    PyObject *object;
    PyTypeObject *type;
    PyObject *dict;   /* of its attributes (borrowed: it is watched too); NULL: it answers __dict__ in its own way */
    PyObject **place; /* in the object, where it holds that dictionary: the same as long as its type is */
} watch_object;

typedef struct watch_cell { /* a variable of an enclosing function */
    PyObject *cell, *value; /* value NULL: not assigned yet */
    bool ignored;
} watch_cell;

typedef struct watch_scope {        /* globals that code names */
    PyObject *dict, *copy, *absent; /* name -> value; set of names that are not there (builtins, attributes) */
    uint64_t tag;
} watch_scope;

typedef enum watch_kind {
    WATCH_FUNCTION,
    WATCH_CLASS,
    WATCH_ORDER,
    WATCH_DEQUE,
    WATCH_BUFFER,
    WATCH_SLOT,
    WATCH_REGISTRY, /* what abstract classes accept as their subclasses; one for all of them */
    WATCH_PARTIAL,
    WATCH_LOCAL, /* threading.local: attributes as this thread sees them */
    WATCH_DRAWS, /* a generator of numpy's: that a capture drew from it shows in its state; calls do not look */
    WATCH_ANSWER /* of a function that the code has asked for a setting of torch's, or for the level of a logger */
} watch_kind;

typedef struct watch_other {
    uint8_t kind;
    bool ignored;
    unsigned version;               /* of a class */
    PyObject *object, *copy, *name; /* name: of a slot, else NULL */
    PyObject *order;                /* of a class: itself and its bases as they are searched, a tuple */
} watch_other;

typedef struct bound {
    PyObject *dict, *key; /* owned; NULL for a constant */
    int32_t dtype, device_type, device_index;
    int64_t ndim, *dims;
    bool requires_grad;
    bool in_piece; /* the piece of the same place says all but requires_grad, see thx_layout_read */
} bound;

#define VEC(type)            \
    struct {                 \
        type *items;         \
        uint32_t count, cap; \
    }

struct thx_guards {
    VEC(watch_dict) dicts;
    VEC(watch_stamp) stamps; /* parallel to dicts */
    VEC(watch_sequence) sequences;
    VEC(watch_object) objects;
    VEC(watch_cell) cells;
    VEC(watch_scope) scopes;
    VEC(watch_other) others;
    VEC(PyObject *) modules; /* outermost modules (owned) */
    VEC(PyObject *) tensors; /* every tensor of the tree (owned) */
    VEC(PyObject *) held;    /* tensors in objects that are not watched (owned), until the capture has ended */
    VEC(PyObject *) tied;    /* those found in more than one place (borrowed from `tensors`) */
    VEC(bound) bounds;
    PyObject *roots, *codes, *names; /* owned: what was watched from; code that ran, or NULL; guards_relevance.c */
    PyObject **live;                 /* the bound tensors (owned), parallel to bounds: handed out as an array */
    uint64_t *pieces;                /* parallel to bounds too, THX_LAYOUT_WORDS each */
    PyObject *changed;               /* while checking: see thx_guards_check_but (borrowed); or NULL */
    PyTypeObject *changed_type;      /* then */
    PyObject *any;                   /* owned: list of (owner, key or None) of numbers that may be any; or NULL */
    PyTypeObject *iterator; /* borrowed: of one that was found: what it gives next cannot be guarded; NULL: none */
    PyTypeObject *weak;   /* borrowed: of what a weak reference leads to and a guard would keep alive; NULL: nothing */
    PyTypeObject *hidden; /* borrowed: of an object whose attributes cannot be watched; NULL: none was found */
    VEC(PyObject *) generators; /* torch's generators of random numbers (owned) */
    VEC(PyObject *) memos;      /* code of functions behind functools.lru_cache (owned) */
    bool registry;              /* a WATCH_REGISTRY is there */
    uint64_t generation, events;
    bool pinned;
    bool explain;    /* keep what does not hold, for a report */
    PyObject *cause; /* (owner, key, before, after), or NULL (owned) */
    bool unnamed;    /* something that can be reached reads attributes by names of its own */
    char reason[200];
};

int thx_watch_reserve(void **items, uint32_t *cap, uint32_t count, size_t size);
#define RESERVE(vec) thx_watch_reserve((void **)&(vec).items, &(vec).cap, (vec).count, sizeof *(vec).items)

int thx_watch(thx *x, PyObject *dict); /* from now on its writes are noticed */
void thx_watch_dict_clear(thx *x, watch_dict *w);
void thx_watch_sequence_clear(watch_sequence *w);

static inline uint64_t thx_watch_tag(PyObject *dict) {
#if HAVE_VERSION_TAGS
    return ((PyDictObject *)dict)->ma_version_tag;
#else
    return (void)dict, 0;
#endif
}

/* Numbers and strings by value, all else by identity. */
bool thx_same_value(PyObject *a, PyObject *b);
bool thx_watch_cell_holds(const watch_cell *c);
bool thx_watch_object_holds(const watch_object *o);
bool thx_watch_sequence_holds(const watch_sequence *w);

/* ---- guards_other.c ---- */
int thx_watch_other(thx *x, thx_guards *g, watch_kind kind, PyObject *object, PyObject *name);
bool thx_watch_other_holds(thx *x, watch_other *w);
void thx_watch_other_put_back(const watch_other *w);
bool thx_watch_is_ours(PyObject *key); /* an attribute that we keep in a class */
const char *thx_watch_other_text(const watch_other *w);

/* guards_collect.c: everything reachable from the roots becomes watched; names: through these alone, NULL: all */
int thx_guards_collect(thx *x, thx_guards *g, PyObject *roots, PyObject *names);
PyObject **thx_watch_items(PyObject *dict, Py_ssize_t *count); /* see watch_dict; count -1: an exception */
void thx_guards_clear(thx *x, thx_guards *g);

/* ---- guards_relevance.c ---- */
bool thx_relevant_name(thx_guards *g, PyObject *name);           /* of an attribute or a global */
bool thx_relevant_owner(thx *x, thx_guards *g, PyObject *owner); /* of a container, class, function or variable */

#endif
