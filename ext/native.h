/* Executors that are shared objects: include/thunder/executor.h. */
#ifndef THUNDER_NATIVE_H
#define THUNDER_NATIVE_H

#include "ext.h"

#include "runtime/plan.h"
#include "thunder/executor.h"

typedef struct thx_native_operator { /* Python object: thunder._C.NativeOperator */
    PyObject_HEAD thx *x;
    PyObject *library; /* capsule that keeps the shared object open (owned) */
    const th_x_operator *op;
} thx_native_operator;

typedef struct thx_native_kernel { /* Python object: thunder._C.NativeKernel: one claimed call */
    PyObject_HEAD vectorcallfunc vectorcall;
    thx_native_operator *op; /* owned */
    void *data;              /* what claim made */
    uint32_t nresults;
    th_typeref *results; /* types (owned) */
} thx_native_kernel;

/* Does it take the call: 1, 0 with a reason, -1 with an exception. *data is released by the caller. */
int thx_native_claim(thx_native_operator *o, th_trace *t, th_opref op, void **data, char *reason, size_t size);
void thx_native_release(const thx_native_operator *o, void *data);
/* The results as owned handles or objects. 0, or -1 with an exception. */
int thx_native_run(thx *x, const thx_native_kernel *k, th_slot *const *ins, uint32_t nins, th_slot *const *outs);
int thx_native_init(thx *x, PyObject *module);
PyObject *thx_native_load(PyObject *module, PyObject *path);

#endif
