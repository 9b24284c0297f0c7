/* NVIDIA's run-time compiler: CUDA C source to a cubin for one compute capability. See cuda.h.
 *
 * A GPU that is newer than the compiler gets PTX for the newest capability that the compiler knows; the driver
 * finishes the work at load time. The fixed-width integer types are there without any header: a header of ours stands
 * in for <stdint.h>, whose system version the compiler cannot read.
 */
#include "executors/cuda/cuda.h"

#include "base/ctx.h"

#include <stdio.h>
#include <string.h>

enum { MAX_OPTIONS = 64, MAX_ARCHS = 128 };

static const char integers[] = "#pragma once\n"
                               "typedef signed char int8_t;\ntypedef unsigned char uint8_t;\n"
                               "typedef short int16_t;\ntypedef unsigned short uint16_t;\n"
                               "typedef int int32_t;\ntypedef unsigned int uint32_t;\n"
                               "typedef long int64_t;\ntypedef unsigned long uint64_t;\n"
                               "typedef long intptr_t;\ntypedef unsigned long uintptr_t;\n";

th_status th_nvrtc_open(th_ctx *ctx, const char *path, th_nvrtc *nvrtc) {
    int major = 0, minor = 0;
    memset(nvrtc, 0, sizeof *nvrtc);
    TRY(th_dylib_open(ctx, path, false, &nvrtc->library));
#define TH_NVRTC_LOAD(name, ret, args)                                                 \
    {                                                                                  \
        void *symbol = th_dylib_symbol(nvrtc->library, #name);                         \
        memcpy(&nvrtc->name, &symbol, sizeof symbol);                                  \
        if (!symbol) return th_fail(ctx, TH_EIO, "%s is too old: no %s", path, #name); \
    }
    TH_NVRTC_SYMBOLS(TH_NVRTC_LOAD)
#undef TH_NVRTC_LOAD
    nvrtc->nvrtcVersion(&major, &minor);
    nvrtc->version = 1000 * major + 10 * minor;
    return TH_OK;
}

void th_cuda_image_fini(th_ctx *ctx, th_cuda_image *image) {
    th_ctx_alloc(ctx, image->data, 0);
    th_ctx_alloc(ctx, image->entry, 0);
    memset(image, 0, sizeof *image);
}

static th_status check(th_ctx *ctx, const th_nvrtc *nvrtc, int code, const char *doing) {
    if (code == 0) return TH_OK;
    return th_fail(ctx, TH_ERUN, "%s: %s", doing, nvrtc->nvrtcGetErrorString(code));
}

static bool names_architecture(const th_cuda_source *source) {
    for (uint32_t i = 0; i < source->noptions; i++)
        if (!strncmp(source->options[i], "-arch", 5) || !strncmp(source->options[i], "--gpu-architecture", 18))
            return true;
    return false;
}

/* "sm_90", or "compute_90" of the newest that the compiler knows when the device is newer. */
static th_status target_option(th_ctx *ctx, const th_nvrtc *nvrtc, int arch, char *text, size_t size) {
    int known[MAX_ARCHS], n = 0, newest = 0;
    TRY(check(ctx, nvrtc, nvrtc->nvrtcGetNumSupportedArchs(&n), "asking the compiler for its targets"));
    if (n > MAX_ARCHS) return th_fail(ctx, TH_ELIMIT, "the compiler has %d targets", n);
    TRY(check(ctx, nvrtc, nvrtc->nvrtcGetSupportedArchs(known), "asking the compiler for its targets"));
    for (int i = 0; i < n; i++)
        if (known[i] <= arch && known[i] > newest) newest = known[i];
    if (!newest)
        return th_fail(ctx, TH_EINVAL, "this NVRTC (%d.%d) does not compile for compute capability %d.%d",
                       nvrtc->version / 1000, nvrtc->version / 10 % 100, arch / 10, arch % 10);
    snprintf(text, size, "--gpu-architecture=%s_%d", newest == arch ? "sm" : "compute", newest);
    return TH_OK;
}

static th_status take_bytes(th_ctx *ctx, int sized, size_t size, int (*get)(void *, char *), void *program,
                            void **data) {
    *data = sized == 0 && size ? th_ctx_alloc(ctx, NULL, size) : NULL;
    if (!*data) return sized == 0 && size ? TH_ENOMEM : TH_DECLINED;
    return get(program, *data) == 0 ? TH_OK : th_fail(ctx, TH_ERUN, "NVRTC keeps its result");
}

static th_status take_image(th_ctx *ctx, const th_nvrtc *nvrtc, void *program, const char *entry,
                            th_cuda_image *image) {
    const char *lowered = NULL;
    TRY(check(ctx, nvrtc, nvrtc->nvrtcGetLoweredName(program, entry, &lowered), entry));
    image->entry = th_ctx_alloc(ctx, NULL, strlen(lowered) + 1);
    if (!image->entry) return TH_ENOMEM;
    memcpy(image->entry, lowered, strlen(lowered) + 1);
    int sized = nvrtc->nvrtcGetCUBINSize(program, &image->size);
    th_status status = take_bytes(ctx, sized, image->size, nvrtc->nvrtcGetCUBIN, program, &image->data);
    if (status != TH_DECLINED) return status;
    sized = nvrtc->nvrtcGetPTXSize(program, &image->size);
    status = take_bytes(ctx, sized, image->size, nvrtc->nvrtcGetPTX, program, &image->data);
    return status == TH_DECLINED ? th_fail(ctx, TH_ERUN, "NVRTC gives neither a cubin nor PTX") : status;
}

static th_status compile(th_ctx *ctx, const th_nvrtc *nvrtc, void *program, const th_cuda_source *source,
                         th_cuda_image *image, char **log) {
    const char *options[MAX_OPTIONS + 4];
    char target[64];
    int n = 0;
    size_t size = 0;
    if (source->noptions > MAX_OPTIONS) return th_fail(ctx, TH_ELIMIT, "more than %d options", MAX_OPTIONS);
    options[n++] = "--pre-include=stdint.h";
    if (!names_architecture(source)) {
        TRY(target_option(ctx, nvrtc, source->arch, target, sizeof target));
        options[n++] = target;
    }
    for (uint32_t i = 0; i < source->noptions; i++) options[n++] = source->options[i];
    if (source->headers) options[n++] = "--include-path", options[n++] = source->headers;
    TRY(check(ctx, nvrtc, nvrtc->nvrtcAddNameExpression(program, source->entry), source->entry));
    int code = nvrtc->nvrtcCompileProgram(program, n, options);
    if (nvrtc->nvrtcGetProgramLogSize(program, &size) == 0 && size > 1 && (*log = th_ctx_alloc(ctx, NULL, size)))
        nvrtc->nvrtcGetProgramLog(program, *log);
    if (code != 0) return th_fail(ctx, TH_EINVAL, "%s", nvrtc->nvrtcGetErrorString(code));
    return take_image(ctx, nvrtc, program, source->entry, image);
}

th_status th_nvrtc_compile(th_ctx *ctx, const th_nvrtc *nvrtc, const th_cuda_source *source, th_cuda_image *image,
                           char **log) {
    const char *const texts[] = {integers, integers}, *const names[] = {"stdint.h", "cstdint"};
    void *program = NULL;
    memset(image, 0, sizeof *image);
    *log = NULL;
    TRY(check(ctx, nvrtc, nvrtc->nvrtcCreateProgram(&program, source->text, TH_NVRTC_FILE, 2, texts, names),
              "handing the source to NVRTC"));
    th_status status = compile(ctx, nvrtc, program, source, image, log);
    nvrtc->nvrtcDestroyProgram(&program);
    if (status != TH_OK) th_cuda_image_fini(ctx, image);
    return status;
}
