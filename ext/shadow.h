/* Values of tensors, while a program is captured.
 *
 * When captured code asks for a value that depends on the inputs, the operations recorded so far are run on the real
 * ones: this is the shadow. It leaves nothing behind: inputs that the program writes are copied first, and the random
 * generators are put back. The program is captured for the value found, and holds an expectation in its place:
 *
 *     if x.sum() > 0:         t0 = torch.Tensor.sum(x)
 *         ...                 t1 = torch.Tensor.gt(t0, 0)
 *                             _: "effect" = thunder._kernels.expect(0, torch.Tensor.__bool__, (t1,), {}, True)
 *
 * A run that finds another value raises ValueChanged(number, value) before it has had any effect that lasts; callable.c
 * goes on with the entry for that value, or captures one.
 */
#ifndef THUNDER_SHADOW_H
#define THUNDER_SHADOW_H

#include "capture.h"

/* The value that a call gives, from here on expected at every run: new reference. NULL without an exception: it cannot
 * be expected, being no number, string or list of such. func: what to call, by its name `callee` or as an object. */
PyObject *thx_expect_value(thx_recorder *r, th_str callee, PyObject *func, th_node args, th_node kwargs);
/* A call on the real tensors. NULL with an exception. */
PyObject *thx_shadow_call(thx_recorder *r, PyObject *func, th_node args, th_node kwargs);
PyObject *thx_shadow_value(void *recorder, th_val value); /* new reference */
/* The operation recorded last has this result: it need not run again. */
int thx_shadow_keep(thx_recorder *r, th_node outs, PyObject *result);
void thx_shadow_free(thx_shadow *s);
/* thunder._values.Undo: how tensors are now, and with `draws` the generators that the trace draws from. NULL with an
 * exception. */
PyObject *thx_undo_new(const thx *x, const th_trace *t, PyObject *tensors, bool draws);
/* thunder._kernels.expect */
PyObject *thx_expect(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
bool thx_same_values(PyObject *a, PyObject *b); /* in lists and tuples too; floats by their bits */

#endif
