/* cuDNN's plans as Python callables. */
#ifndef THUNDER_EXT_CUDNN_H
#define THUNDER_EXT_CUDNN_H

#include "ext.h"

int thx_cudnn_init(thx *x, PyObject *module);
void thx_cudnn_fini(thx *x);

#endif
