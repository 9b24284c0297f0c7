/* Operations under autocast, as casts and themselves. */
#ifndef THUNDER_AUTOCAST_H
#define THUNDER_AUTOCAST_H

#include "observe.h"

typedef enum thx_autocast_road {
    THX_BY_RULE, /* recorded, or an exception */
    THX_WHOLE,   /* by layer 2: autocast has nothing to do with it */
    THX_KERNELS, /* by layer 2: autocast acts inside of it, between the kernels it is made of */
} thx_autocast_road;

/* NULL without an exception: layer 2 records the operation, as `road` says. */
PyObject *thx_record_under_autocast(thx_recording *c, thx_autocast_road *road);

/* An operation is recorded with autocast off: what a block kept ends with it. */
void thx_autocast_forget(thx_recorder *r);

#endif
