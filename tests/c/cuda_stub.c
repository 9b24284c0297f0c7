/* A CUDA driver that launches nothing: it writes down what it is asked for. For tests without a GPU.
 *
 * An image is the text "sizes of the parameters", as "8 8 4"; an image that begins otherwise has no known parameters.
 * Each line of the file STUB_LOG is one launch, or one request for shared memory.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void note(const char *text) {
    FILE *file = fopen(getenv("STUB_LOG"), "a");
    fputs(text, file);
    fclose(file);
}

int cuInit(unsigned flags) { return getenv("STUB_NO_DEVICE") ? 100 : (int)flags; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal > 1 ? 101 : 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 9 : attribute == 97 ? 232448 : 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(long)(device + 1), 0; }

static void *stack[8];
static int depth;
int cuCtxGetCurrent(void **context) { return *context = depth ? stack[depth - 1] : NULL, 0; }
int cuCtxPushCurrent_v2(void *context) { return stack[depth++] = context, 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = stack[--depth], 0; }

int cuModuleLoadData(void **module, const void *image) { return *module = strdup(image), 0; }
int cuModuleUnload(void *module) { return free(module), 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return strcmp(name, "absent") == 0 ? 500 : 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    char line[64];
    (void)function;
    snprintf(line, sizeof line, "attribute %d %d\n", attribute, value);
    note(line);
    return 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
    char line[4096];
    (void)extra, (void)stream;
    if (depth != 1) return 201;
    int at = snprintf(line, sizeof line, "launch %u,%u,%u %u,%u,%u %u", gx, gy, gz, bx, by, bz, shared);
    for (char *size = function; *size >= '1' && *size <= '8'; size += size[1] == ' ' ? 2 : 1, params++) {
        at += snprintf(line + at, sizeof line - (size_t)at, " ");
        for (int i = *size - '1'; i >= 0; i--)
            at += snprintf(line + at, sizeof line - (size_t)at, "%02x", ((unsigned char *)*params)[i]);
    }
    snprintf(line + at, sizeof line - (size_t)at, "\n");
    note(line);
    return gx == 13 ? 719 : 0;
}

int cuGetErrorName(int code, const char **name) {
    *name = code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : code == 500 ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_NO_DEVICE";
    return 0;
}
int cuGetErrorString(int code, const char **text) { return *text = code == 719 ? "unspecified failure" : "?", 0; }
