/* State of torch around a call that changes what operations mean. */
#ifndef THUNDER_AMBIENT_H
#define THUNDER_AMBIENT_H

#include "ext.h"

typedef struct thx_ambient {
    bool grad, inference, autocast;
    bool autocast_cpu, autocast_gpu;
    PyObject *default_dtype, *cpu_dtype, *gpu_dtype; /* immortal objects of torch: borrowed */
} thx_ambient;

/* 1: modes of the user are active, nothing may be assumed; 0: read; -1 error. */
int thx_ambient_read(thx *x, thx_ambient *a);
int thx_has_modes(thx *x); /* of functions or of dispatch, the user's; -1 with an exception */

/* Casts are explicit in a trace: autocast must not act on its operations again. */
typedef struct thx_autocast {
    bool cpu, gpu; /* was on */
} thx_autocast;
bool thx_autocast_is_on(thx *x);
int thx_autocast_off(thx *x, thx_autocast *was);
void thx_autocast_on(thx *x, const thx_autocast *was); /* as it was; keeps a pending exception */

#endif
