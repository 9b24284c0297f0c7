/* The CUDA driver, opened at run time: load an image, launch a function. See cuda.h.
 *
 * Work happens in a device's primary context, the one that torch uses. A thread that has not touched the device yet
 * has no context, or another device's: it is pushed around the call and popped again, so nothing of the thread changes.
 */
#include "executors/cuda/cuda.h"

#include "base/ctx.h"
#include "base/env.h"

#include <stdio.h>
#include <string.h>

/* Values of the driver API, which never change. */
enum {
    ATTRIBUTE_MAX_SHARED = 97, /* CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    ATTRIBUTE_MAJOR = 75,      /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR */
    ATTRIBUTE_MINOR = 76,
    FUNCTION_MAX_SHARED = 8, /* CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES */
    SHARED_WITHOUT_ASKING = 48 * 1024,
};

static th_status check(th_ctx *ctx, const th_cuda *cuda, int code, const char *doing) {
    if (code == 0) return TH_OK;
    const char *name = NULL, *text = NULL;
    cuda->cuGetErrorName(code, &name);
    cuda->cuGetErrorString(code, &text);
    return th_fail(ctx, TH_ERUN, "%s: %s (%s)", doing, name ? name : "unknown CUDA error", text ? text : "no text");
}

th_status th_cuda_open(th_ctx *ctx, th_cuda *cuda) {
    const char *path = th_env("THUNDER_CUDA_DRIVER");
    memset(cuda, 0, sizeof *cuda);
    TRY(th_dylib_open(ctx, path ? path : "libcuda.so.1", false, &cuda->library));
#define TH_CUDA_LOAD(name, args)                                                                     \
    {                                                                                                \
        void *symbol = th_dylib_symbol(cuda->library, #name);                                        \
        memcpy(&cuda->name, &symbol, sizeof symbol);                                                 \
        if (!symbol) return th_fail(ctx, TH_EIO, "the CUDA driver is too old: it has no %s", #name); \
    }
    TH_CUDA_SYMBOLS(TH_CUDA_LOAD)
#undef TH_CUDA_LOAD
    return check(ctx, cuda, cuda->cuInit(0), "starting the CUDA driver");
}

static th_status enter(th_ctx *ctx, const th_cuda *cuda, void *context, bool *pushed) {
    void *current = NULL;
    *pushed = false;
    cuda->cuCtxGetCurrent(&current);
    if (current == context) return TH_OK;
    TRY(check(ctx, cuda, cuda->cuCtxPushCurrent_v2(context), "entering the device's context"));
    *pushed = true;
    return TH_OK;
}

static void leave(const th_cuda *cuda, bool pushed) {
    void *popped;
    if (pushed) cuda->cuCtxPopCurrent_v2(&popped);
}

static th_status find_device(th_ctx *ctx, const th_cuda *cuda, int ordinal, int *device) {
    if (ordinal < 0 || ordinal >= TH_CUDA_DEVICES)
        return th_fail(ctx, TH_ELIMIT, "device cuda:%d: at most %d devices", ordinal, TH_CUDA_DEVICES);
    return check(ctx, cuda, cuda->cuDeviceGet(device, ordinal), "finding the device");
}

th_status th_cuda_arch(th_ctx *ctx, th_cuda *cuda, int ordinal, int *arch) {
    int device, major, minor;
    TRY(find_device(ctx, cuda, ordinal, &device));
    TRY(check(ctx, cuda, cuda->cuDeviceGetAttribute(&major, ATTRIBUTE_MAJOR, device), "asking the device"));
    TRY(check(ctx, cuda, cuda->cuDeviceGetAttribute(&minor, ATTRIBUTE_MINOR, device), "asking the device"));
    *arch = 10 * major + minor;
    return TH_OK;
}

/* Above 48 KiB a function has to ask; more than the device has is the user's mistake, so say what it has. */
static th_status allow_shared(th_ctx *ctx, const th_cuda *cuda, int device, void *function, uint32_t shared) {
    int most = 0;
    if (shared <= SHARED_WITHOUT_ASKING) return TH_OK;
    TRY(check(ctx, cuda, cuda->cuDeviceGetAttribute(&most, ATTRIBUTE_MAX_SHARED, device), "asking the device"));
    if (shared > (uint32_t)most)
        return th_fail(ctx, TH_ELIMIT, "%u bytes of shared memory: the device has %d a block", shared, most);
    return check(ctx, cuda, cuda->cuFuncSetAttribute(function, FUNCTION_MAX_SHARED, (int)shared),
                 "asking for shared memory");
}

static th_status load_in_context(th_ctx *ctx, const th_cuda *cuda, int device, const void *image, const char *entry,
                                 uint32_t shared, void **function) {
    void *module = NULL;
    TRY(check(ctx, cuda, cuda->cuModuleLoadData(&module, image), "loading the kernel"));
    char doing[256];
    snprintf(doing, sizeof doing, "no function %s in the code", entry);
    th_status status = check(ctx, cuda, cuda->cuModuleGetFunction(function, module, entry), doing);
    if (status == TH_OK) status = allow_shared(ctx, cuda, device, *function, shared);
    if (status != TH_OK) cuda->cuModuleUnload(module); /* otherwise it stays: a CUDA graph may hold the function */
    return status;
}

th_status th_cuda_load(th_ctx *ctx, th_cuda *cuda, int ordinal, const void *image, const char *entry, uint32_t shared,
                       th_cuda_function *out) {
    int device;
    bool pushed;
    TRY(find_device(ctx, cuda, ordinal, &device));
    void **context = &cuda->contexts[ordinal];
    if (!*context) TRY(check(ctx, cuda, cuda->cuDevicePrimaryCtxRetain(context, device), "retaining the context"));
    out->context = *context;
    TRY(enter(ctx, cuda, out->context, &pushed));
    th_status status = load_in_context(ctx, cuda, device, image, entry, shared, &out->handle);
    leave(cuda, pushed);
    return status;
}

th_status th_cuda_launch_function(th_ctx *ctx, const th_cuda *cuda, const th_cuda_function *function,
                                  const th_cuda_launch *l, void **params) {
    bool pushed;
    if (!l->grid[0] || !l->grid[1] || !l->grid[2]) return TH_OK;
    TRY(enter(ctx, cuda, function->context, &pushed));
    int code = cuda->cuLaunchKernel(function->handle, l->grid[0], l->grid[1], l->grid[2], l->block[0], l->block[1],
                                    l->block[2], l->shared, l->stream, params, NULL);
    leave(cuda, pushed);
    return check(ctx, cuda, code, "launching the kernel");
}
