/* See dylib.h. */
#define _GNU_SOURCE /* dladdr */
#include "base/dylib.h"

#include <dlfcn.h>

th_status th_dylib_open(th_ctx *ctx, const char *path, bool loaded_only, th_dylib **out) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL | (loaded_only ? RTLD_NOLOAD : 0));
    *out = handle;
    if (handle) return TH_OK;
    const char *why = dlerror();
    return th_fail(ctx, TH_EIO, "cannot open %s: %s", path, why ? why : "it is not loaded");
}

void *th_dylib_symbol(th_dylib *lib, const char *name) { return dlsym(lib, name); }

const char *th_dylib_path_of(const void *address) {
    Dl_info info;
    return dladdr(address, &info) ? info.dli_fname : NULL;
}

void th_dylib_close(th_dylib *lib) {
    if (lib) dlclose(lib);
}
