/* The calibration of torch's objects: which bytes hold what is found by looking at tensors that differ in it alone.
 * What cannot be found is noted in the report, and asked of torch's functions. */
#ifndef THUNDER_TORCHABI_LAYOUT_H
#define THUNDER_TORCHABI_LAYOUT_H

#include "torchabi.h"

int thx_abi_note(thx_abi *abi, const char *feature, const char *why);
PyObject *thx_abi_call(PyObject *torch, const char *function, const char *format, ...);

/* The TensorImpl pointer in a tensor's object. All return -1 with a Python error; not finding is none. */
int thx_abi_find_impl(thx_abi *abi, PyObject *torch);
int thx_abi_find_layout(thx_abi *abi, PyObject *torch);
/* torchabi_state.c */
int thx_abi_find_state(thx_abi *abi, PyObject *torch);

#endif
