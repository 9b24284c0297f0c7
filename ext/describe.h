/* What structure.c, result.c and rebuild.c share about specs. */
#ifndef THUNDER_DESCRIBE_H
#define THUNDER_DESCRIBE_H

#include "capture.h"
#include "structure.h"

enum { THX_MAX_DEPTH = 24 };

typedef struct thx_describer {
    thx *x;
    thx_leaves *leaves;
    PyObject *seen; /* dict: id of a container -> address of its spec */
    uint32_t nshared;
    /* results only */
    thx_recorder *r;  /* NULL: these are arguments */
    PyObject *inputs; /* dict: id of a container of the arguments -> path */
    const thx_guards *guards;
    PyObject *counts;  /* dict: id of an object -> how often the result refers to it */
    PyObject *tensors; /* set of ids: objects of the result with a tensor inside */
} thx_describer;

int thx_describe(thx_describer *d, thx_spec *s, PyObject *o, int depth); /* structure.c */
int thx_describe_const(thx_spec *s, PyObject *o, bool by_identity);
bool thx_is_plain_value(thx *x, PyObject *o);  /* compared by value */
bool thx_is_opaque_value(thx *x, PyObject *o); /* compared by identity, not looked into */

/* result.c: what is the caller's, what is fresh, what cannot be returned. */
int thx_describe_opaque_result(thx_describer *d, thx_spec *s, PyObject *o);
int thx_refuse_hashed(thx_describer *d, PyObject *o, PyObject *keys); /* -1: they hold what stands for a tensor */
bool thx_held_elsewhere(const thx_describer *d, PyObject *o); /* by somebody else than the result: it lives on */
bool thx_has_tensor_inside(const thx_describer *d, PyObject *o);

/* rebuild.c */
PyObject *thx_spec_part(const thx_spec *s, PyObject *o, uint32_t i); /* new reference; NULL with an exception */
PyObject *thx_copy_of(PyObject *o);

#endif
