/* Changes of Python state that a program makes: to its arguments, and to what its callable can reach.
 *
 * What a container or object holds in the end is described like a result and made anew at each call, after the plan
 * has run; then the containers take it over. Tensors and plain constants written under a key of a watched dictionary
 * need none of this (thx_write).
 */
#ifndef THUNDER_EFFECTS_H
#define THUNDER_EFFECTS_H

#include "structure.h"

typedef enum thx_effect_kind {
    THX_EFFECT_BODY = 1, /* a container or object: (items or None, changed attributes or None) */
    THX_EFFECT_KEY,      /* dictionary or class, key: a value */
    THX_EFFECT_DELETE,   /* dictionary or class, key */
    THX_EFFECT_CELL,     /* variable of an enclosing function: a value */
    THX_EFFECT_CALL,     /* the owner is called */
} thx_effect_kind;

typedef struct thx_effect {
    uint8_t kind;
    bool members;      /* BODY: as in thx_spec */
    uint32_t after;    /* how many writes (thx_write) come before it */
    PyObject *owner;   /* what changes; NULL: an argument, at `path` */
    PyObject *path;    /* as in thx_spec of kind INPUT */
    PyObject *key;     /* KEY, DELETE */
    PyObject *removed; /* BODY: tuple of attributes that are gone */
} thx_effect;

typedef struct thx_effects {
    thx_effect *items;
    uint32_t count;
    PyObject *contents; /* while captured: list, one for each effect (None for DELETE, CALL) */
} thx_effects;

int thx_effect_add(thx_effects *e, const thx_effect *effect, PyObject *content); /* takes new references */
void thx_effects_fini(thx_effects *e);
int thx_effects_traverse(const thx_effects *e, visitproc visit, void *arg);
bool thx_is_deque(PyObject *o);
/* The effect is what the dictionary holds now, in the order of the keys in the tuple `order` (NULL: its own). */
int thx_effect_add_items(thx_effects *e, const thx_effect *effect, PyObject *dict, PyObject *order);
/* What changes at this call, one for each effect, found before any of them changes: NULL with an exception. */
PyObject **thx_effects_owners(const thx_effects *e, const thx_inputs *inputs);
void thx_effects_forget(const thx_effects *e, PyObject **owners);
int thx_effect_apply(const thx_effect *e, PyObject *owner, PyObject *content);

/* ---- arguments while they are captured ---- */

typedef struct thx_watched_args {
    PyObject *index; /* dict: id of a container of the arguments -> path */
    PyObject *alive; /* list of those containers: an id stays theirs */
    PyObject *rows;  /* list of (container, path, items, attributes, is the caller's own, members) before the run */
} thx_watched_args;

/* Is one of the containers and objects among the arguments in `known`, a set of ids, or in two places? -1 error. */
int thx_args_meet(const thx_spec *specs, PyObject *const *objects, uint32_t count, PyObject *known);
int thx_args_watch(thx_watched_args *w, const thx_spec *specs, PyObject *const *objects, uint32_t count);
/* After the run: what changed becomes effects (NULL: nothing is kept), the caller's own objects are as before. */
int thx_args_collect(thx_watched_args *w, thx_effects *effects);
void thx_args_fini(thx_watched_args *w);

#endif
