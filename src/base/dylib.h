/* Shared libraries: the only place of the project that opens one. */
#ifndef THUNDER_BASE_DYLIB_H
#define THUNDER_BASE_DYLIB_H

#include "thunder/base.h"

typedef struct th_dylib th_dylib; /* the system's handle; owned by whoever opened it */

/* loaded_only: succeed only when the process has the library already (it is then not initialised again). */
th_status th_dylib_open(th_ctx *ctx, const char *path, bool loaded_only, th_dylib **out);
void *th_dylib_symbol(th_dylib *lib, const char *name); /* NULL when absent, which is not an error */
const char *th_dylib_path_of(const void *address);      /* of the library that holds it, or NULL; borrowed from it */
void th_dylib_close(th_dylib *lib);

#endif
