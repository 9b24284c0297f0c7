/* GPU kernels from the user's source: compiled once, kept on disk, loaded and launched through the CUDA driver.
 *
 *     CUDA C source --- nvrtc.c ---> image (cubin) --- driver.c ---> function ---> launch
 *                          |            ^
 *                          +-- cache.c -+      the images of earlier processes
 *
 * The driver and the compiler are shared libraries that are opened on demand: nothing here is touched by a program
 * without GPU kernels. No tensors, no Python. Functions record their error in the context that they are given; those
 * that take long (compiling, reading) may run beside others, each with a context of its own.
 */
#ifndef THUNDER_EXECUTORS_CUDA_H
#define THUNDER_EXECUTORS_CUDA_H

#include "base/dylib.h"

/* ---- driver.c: CUDA's driver API, the part that launches ---- */

enum { TH_CUDA_DEVICES = 64 };

#define TH_CUDA_SYMBOLS(X)                                                                                      \
    X(cuInit, (unsigned))                                                                                       \
    X(cuDeviceGet, (int *, int))                                                                                \
    X(cuDeviceGetAttribute, (int *, int, int))                                                                  \
    X(cuDevicePrimaryCtxRetain, (void **, int))                                                                 \
    X(cuCtxGetCurrent, (void **))                                                                               \
    X(cuCtxPushCurrent_v2, (void *))                                                                            \
    X(cuCtxPopCurrent_v2, (void **))                                                                            \
    X(cuModuleLoadData, (void **, const void *))                                                                \
    X(cuModuleUnload, (void *))                                                                                 \
    X(cuModuleGetFunction, (void **, void *, const char *))                                                     \
    X(cuFuncSetAttribute, (void *, int, int))                                                                   \
    X(cuLaunchKernel,                                                                                           \
      (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **)) \
    X(cuGetErrorName, (int, const char **))                                                                     \
    X(cuGetErrorString, (int, const char **))

typedef struct th_cuda {
    th_dylib *library;
    void *contexts[TH_CUDA_DEVICES]; /* primary contexts, retained for the life of the process; NULL: not yet */
#define TH_CUDA_FIELD(name, args) int(*name) args;
    TH_CUDA_SYMBOLS(TH_CUDA_FIELD)
#undef TH_CUDA_FIELD
} th_cuda;

typedef struct th_cuda_function { /* valid for the life of the process: modules stay loaded */
    void *handle, *context;
} th_cuda_function;

typedef struct th_cuda_launch {
    uint32_t grid[3], block[3];
    uint32_t shared; /* bytes of dynamic shared memory */
    void *stream;
} th_cuda_launch;

/* Open the driver: THUNDER_CUDA_DRIVER, or libcuda.so.1. TH_EIO with the reason when there is none. */
th_status th_cuda_open(th_ctx *ctx, th_cuda *cuda);
/* Compute capability as 10 * major + minor, 90 for Hopper. */
th_status th_cuda_arch(th_ctx *ctx, th_cuda *cuda, int device, int *arch);
/* The function `entry` of a cubin or of PTX text, on a device, allowed to use `shared` bytes. */
th_status th_cuda_load(th_ctx *ctx, th_cuda *cuda, int device, const void *image, const char *entry, uint32_t shared,
                       th_cuda_function *out);
/* Enqueue one launch; params[i] is the address of argument i, read before the call returns. An empty grid is no work.
 */
th_status th_cuda_launch_function(th_ctx *ctx, const th_cuda *cuda, const th_cuda_function *function,
                                  const th_cuda_launch *launch, void **params);

/* ---- nvrtc.c: CUDA C to machine code ---- */

typedef struct th_cuda_source {
    const char *text, *entry; /* entry: the kernel's name, or an instantiation of a template */
    const char *const *options;
    uint32_t noptions;
    int arch;
    const char *headers; /* folder of the toolkit's own headers; NULL: none */
} th_cuda_source;

typedef struct th_cuda_image { /* from the context's allocator: th_cuda_image_fini */
    void *data;
    size_t size;
    char *entry; /* the kernel's name in the image */
} th_cuda_image;
void th_cuda_image_fini(th_ctx *ctx, th_cuda_image *image);

#define TH_NVRTC_SYMBOLS(X)                                                                                          \
    X(nvrtcVersion, int, (int *, int *))                                                                             \
    X(nvrtcGetErrorString, const char *, (int))                                                                      \
    X(nvrtcGetNumSupportedArchs, int, (int *))                                                                       \
    X(nvrtcGetSupportedArchs, int, (int *))                                                                          \
    X(nvrtcCreateProgram, int, (void **, const char *, const char *, int, const char *const *, const char *const *)) \
    X(nvrtcAddNameExpression, int, (void *, const char *))                                                           \
    X(nvrtcCompileProgram, int, (void *, int, const char *const *))                                                  \
    X(nvrtcGetProgramLogSize, int, (void *, size_t *))                                                               \
    X(nvrtcGetProgramLog, int, (void *, char *))                                                                     \
    X(nvrtcGetLoweredName, int, (void *, const char *, const char **))                                               \
    X(nvrtcGetCUBINSize, int, (void *, size_t *))                                                                    \
    X(nvrtcGetCUBIN, int, (void *, char *))                                                                          \
    X(nvrtcGetPTXSize, int, (void *, size_t *))                                                                      \
    X(nvrtcGetPTX, int, (void *, char *))                                                                            \
    X(nvrtcDestroyProgram, int, (void **))

typedef struct th_nvrtc {
    th_dylib *library;
    int version; /* 1000 * major + 10 * minor, as CUDA counts: 12080 */
#define TH_NVRTC_FIELD(name, ret, args) ret(*name) args;
    TH_NVRTC_SYMBOLS(TH_NVRTC_FIELD)
#undef TH_NVRTC_FIELD
} th_nvrtc;

/* The place of a compile error: "kernel.cu" is the name under which the compiler sees the user's source. */
#define TH_NVRTC_FILE "kernel.cu"

th_status th_nvrtc_open(th_ctx *ctx, const char *path, th_nvrtc *nvrtc);
/* TH_EINVAL: the source is at fault. *log, where the compiler wrote one, is owned by the caller in every case. */
th_status th_nvrtc_compile(th_ctx *ctx, const th_nvrtc *nvrtc, const th_cuda_source *source, th_cuda_image *image,
                           char **log);

/* ---- cache.c: images on disk ---- */

/* The folder: THUNDER_CACHE_DIR, or ~/.cache/thunder; false: there is none, or the path is too long. */
bool th_cuda_cache_folder(char *path, size_t size);
/* TH_DECLINED: not there, or not usable; the caller compiles. */
th_status th_cuda_cache_get(th_ctx *ctx, const char *folder, const th_cuda_source *source, int version,
                            th_cuda_image *image);
/* TH_DECLINED: the folder cannot be written, or the source may not be kept. */
th_status th_cuda_cache_put(th_ctx *ctx, const char *folder, const th_cuda_source *source, int version,
                            const th_cuda_image *image);

#endif
