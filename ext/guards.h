/* Is what a capture read of the module tree still so? */
#ifndef THUNDER_GUARDS_H
#define THUNDER_GUARDS_H

#include "ext.h"

typedef struct thx_guards thx_guards;

/* Watch everything reachable from root (an nn.Module or NULL), torch's global module hooks, and what fn's closure and
 * the globals it names hold. Roots of the trace that live in a watched dictionary are re-bound when they are replaced
 * by an equal kind. */
thx_guards *thx_guards_new(thx *x, PyObject *root, PyObject *fn);
void thx_guards_free(thx *x, thx_guards *g);
int thx_guards_traverse(thx_guards *g, visitproc visit, void *arg); /* for the garbage collector: what is owned */
/* Watch what an argument reaches that is compared by identity: a module, a function, a partial. */
int thx_guards_watch(thx *x, thx_guards *g, PyObject *argument);
/* 1 holds; 0 does not: `reason` says what changed; -1 error. */
int thx_guards_check(thx *x, thx_guards *g);
const char *thx_guards_reason(const thx_guards *g);
/* dict: id of a tensor -> (dict, key, dotted name); new reference. */
PyObject *thx_guards_params(thx *x, PyObject *root);
/* True when the tree holds a parameter that requires grad. */
bool thx_guards_holds(const thx_guards *g, PyObject *tensor); /* is it one of the watched tensors? */
bool thx_guards_need_grad(const thx *x, const thx_guards *g);

/* The tensors that the trace takes from the tree or holds as constants: index -> live tensor. */
int thx_guards_bind(thx *x, thx_guards *g, PyObject *tensor, PyObject *dict, PyObject *key);
uint32_t thx_guards_bound(const thx_guards *g, PyObject *const **tensors); /* how many; borrowed array */
uint64_t thx_guards_generation(const thx_guards *g); /* changes when a bound tensor was replaced */

/* After a capture: put every watched dictionary and list back as it was, telling `changed` of each key that differed
 * (before or after NULL: absent). changed NULL: put back only. -1 when changed said so, or a list or set differed. */
typedef int (*thx_change_fn)(void *user, PyObject *dict, PyObject *key, PyObject *before, PyObject *after);
int thx_guards_restore(thx *x, thx_guards *g, thx_change_fn changed, void *user);
void thx_guards_fini(thx *x);

#endif
