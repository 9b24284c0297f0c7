/* Whose a file of code is. Guards, the capture's watch over side effects and the lines in messages go by it. */
#ifndef THUNDER_ORIGIN_H
#define THUNDER_ORIGIN_H

#include "ext.h"

typedef enum thx_origin {
    THX_USERS,
    THX_PACKAGES,  /* installed: lists of what is installed name it */
    THX_STANDARD,  /* Python's own library */
    THX_FROZEN,    /* inside the interpreter: the import system */
    THX_GENERATED, /* no file: what exec() of a string made */
    THX_TORCHS,
    THX_OURS,
} thx_origin;

thx_origin thx_origin_of(thx *x, PyObject *file); /* `file`: a string; anything else is the user's. Sets no error */
thx_origin thx_origin_of_code(thx *x, PyObject *code); /* a code object */
/* Not what a user calls a line of the program. */
static inline bool thx_is_inner(thx_origin o) { return o >= THX_FROZEN; }
/* Its functions and classes are taken as they are. */
static inline bool thx_is_library(thx_origin o) { return o != THX_USERS && o != THX_GENERATED; }

int thx_origin_init(thx *x);

#endif
