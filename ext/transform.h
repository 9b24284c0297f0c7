/* Transforms of the user between the passes. */
#ifndef THUNDER_TRANSFORM_H
#define THUNDER_TRANSFORM_H

#include "capture.h"

#include "thunder/grad.h"

/* hook(stage, trace, tensors, names) -> trace, from thunder.transforms. What comes back must be made from what was
 * given by edits: ValueError otherwise. Traces are given without dels. */

/* The program before it is differentiated. Tensors that the transforms brought along become roots of r. */
int thx_transform_program(thx *x, PyObject *hook, thx_recorder *r, th_trace **t);
/* The program that will run, where there is nothing to differentiate. Makes its dels. */
int thx_transform_inference(thx *x, PyObject *hook, th_trace **t);
/* Both halves; what is saved follows from the result of the forward one, whose first nresults entries keep their types.
 */
int thx_transform_halves(thx *x, PyObject *hook, th_halves *halves, uint32_t nresults);

#endif
