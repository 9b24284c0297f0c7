/* Is what a capture read of the module tree, of enclosing functions and of globals still so? */
#ifndef THUNDER_GUARDS_H
#define THUNDER_GUARDS_H

#include "ext.h"

typedef struct thx_guards thx_guards;

/* Watch everything reachable from the objects in the list `roots` (modules, functions, ...), and torch's global module
 * hooks. Roots of the trace that live in a module's dictionary are re-bound when they are replaced by an equal kind. */
thx_guards *thx_guards_new(thx *x, PyObject *roots);
void thx_guards_free(thx *x, thx_guards *g);
/* A function of torch without arguments, which tells of a setting: its answer is a guard. */
int thx_guards_ask(thx *x, thx_guards *g, PyObject *function);
/* Was a tensor there before the callable ran, watched or not? Only until what is not watched is forgotten. */
bool thx_guards_met(const thx_guards *guards, PyObject *tensor);
void thx_guards_forget_met(thx_guards *guards);
/* Is it one of the tensors that can be reached? */
bool thx_guards_holds_tensor(const thx_guards *g, PyObject *tensor);
/* May some code of the callable catch an exception, so that it goes on where a kernel fails? */
bool thx_guards_may_catch(thx *x, const thx_guards *g);
/* The code that ran while it was captured, as a list: names that it does not mention cannot matter. */
void thx_guards_ran(thx *x, thx_guards *g, PyObject *codes);
/* 1 holds; 0 does not: `reason` says what changed; -1 error. */
int thx_guards_check(thx *x, thx_guards *g);
/* The same, but numbers of the type (float or int; NULL: either) under keys, in variables and globals may have changed:
 * these are appended to `changed` as (owner, key or None, value before). Nothing is taken over. */
int thx_guards_check_but(thx *x, thx_guards *g, PyTypeObject *type, PyObject *changed);
/* From now on the number there may be any other of its type. */
int thx_guards_free_number(thx_guards *g, PyObject *owner, PyObject *key);
PyObject *thx_number_at(PyObject *owner, PyObject *key); /* what is there: borrowed, or NULL */
int thx_set_number_at(PyObject *owner, PyObject *key, PyObject *value);
/* The kind of an iterator that the callable can reach, whose place cannot be guarded; NULL: there is none. */
const char *thx_guards_iterator(const thx_guards *g);
/* The type of what a weak reference leads to that the callable can reach: a guard would keep it alive. NULL: none. */
const char *thx_guards_weak(const thx_guards *g);
/* The type of an object that the callable can reach and whose attributes cannot be watched; NULL: there is none. */
const char *thx_guards_hidden(const thx_guards *g);
/* Is an array that is watched in this memory? */
bool thx_guards_buffer_in(const thx_guards *g, const thx_memory *memory);
/* Was this generator of random numbers there before the callable ran? */
bool thx_guards_holds_generator(const thx_guards *g, PyObject *generator);
void thx_guards_forget(thx *x, thx_guards *g); /* from now on nothing is watched or kept alive */
/* Is it the code of a function behind a functools.lru_cache? That it runs fills the cache. */
bool thx_guards_memoizes(const thx_guards *g, PyObject *code);
void thx_guards_pin(thx_guards *g, bool pinned); /* pinned: a check replaces no bound tensor */
/* What does not hold: (text, owner, key, before, after), None for what there is not; Py_None when it holds. */
PyObject *thx_guards_cause(thx *x, thx_guards *g);
/* Parameters and buffers of the outermost modules. dict: id of a tensor -> (dict, key, dotted name); new reference. */
PyObject *thx_guards_params(thx *x, const thx_guards *g);
bool thx_guards_knows(const thx_guards *g, PyObject *object); /* a container or object that is watched */
/* A set: the ids of all these. `keyed`: among them are objects that a dictionary or a set finds by their hash. */
PyObject *thx_guards_known(const thx_guards *g, bool *keyed);
/* Does code that is watched compare two objects by `is`? During a capture its arguments are not what it can reach. */
bool thx_guards_compares_identity(const thx_guards *g);
bool thx_guards_finds(const thx_guards *g);                        /* does code ask `a in b`? */
bool thx_guards_watches_cell(const thx_guards *g, PyObject *cell); /* a variable of an enclosing function */
bool thx_guards_holds(const thx_guards *g, PyObject *tensor);      /* is it one of the watched tensors? */
/* The key under which a container was found, or NULL; borrowed. */
PyObject *thx_guards_name(const thx_guards *g, PyObject *object);
int thx_guards_traverse(const thx_guards *g, visitproc visit, void *arg);

/* The tensors that the trace takes from the tree or holds as constants: index -> live tensor. */
int thx_guards_bind(thx *x, thx_guards *g, PyObject *tensor, PyObject *dict, PyObject *key);
uint32_t thx_guards_bound(const thx_guards *g, PyObject *const **tensors); /* how many; borrowed array */
uint64_t thx_guards_generation(const thx_guards *g); /* changes when a bound tensor was replaced */

/* After a capture: put everything that is watched back as it was, telling `changed` of each key of a dictionary that
 * differed (before or after NULL: absent), and of each list, set and cell (then key is None). changed NULL: put back
 * only. -1 when changed said so. */
typedef int (*thx_change_fn)(void *user, PyObject *owner, PyObject *key, PyObject *before, PyObject *after);
int thx_guards_restore(thx *x, thx_guards *g, thx_change_fn changed, void *user);
void thx_guards_fini(thx *x);

#endif
