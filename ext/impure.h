/* Functions in C that do more, or ask for more, than their arguments say. */
#ifndef THUNDER_IMPURE_H
#define THUNDER_IMPURE_H

#include "ext.h"

typedef struct thx_impurity {
    const char *why;  /* NULL: nothing is known against it */
    const char *type; /* whose method it is, where that is what is wrong; or NULL */
    bool prints;      /* it counts whoever's code calls it */
    bool asks;        /* the system or the interpreter */
    bool of_caller;   /* it counts only where the program calls it itself */
} thx_impurity;

int thx_impure_init(thx *x);
int thx_impure_why(thx *x, PyObject *function, thx_impurity *found); /* -1 with an exception */

#endif
