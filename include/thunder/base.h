/* Contexts, outcomes, interned strings and devices: what every other header stands on.
 *
 * A th_ctx owns the interned strings, devices and types, the allocator and the last error. It is
 * not synchronised: one thread at a time (the extension calls with the interpreter lock held).
 * Nothing that runs a plan touches a context. References are 32-bit indices; 0 is "none".
 */
#ifndef THUNDER_BASE_H
#define THUNDER_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum th_status {
#define TH_STATUS(name, text) TH_##name,
#include "thunder/status.def"
#undef TH_STATUS
    TH_STATUS_COUNT
} th_status;

typedef struct th_ctx th_ctx;
typedef uint32_t th_str; /* interned string */
typedef uint32_t th_dev; /* interned device: type name and index */

/* realloc-like: size 0 frees and returns NULL; NULL for a size above 0 means out of memory. */
typedef void *(*th_alloc_fn)(void *user, void *ptr, size_t size);

typedef struct th_error {
    th_status status;
    uint32_t line, column; /* 1-based place in a parsed text; 0 when there is none */
    char text[480];
} th_error;

th_ctx *th_ctx_new(th_alloc_fn alloc, void *user); /* NULL alloc: the C library's */
void th_ctx_free(th_ctx *ctx);
const th_error *th_ctx_error(const th_ctx *ctx);
const char *th_status_text(th_status status);

/* Record an error in the context and return its status, for `return th_fail(ctx, TH_EINVAL, "...", ...)`. */
th_status th_fail(th_ctx *ctx, th_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));
th_status th_fail_at(th_ctx *ctx, th_status status, uint32_t line, uint32_t column, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

void *th_ctx_alloc(th_ctx *ctx, void *ptr, size_t size); /* the context's allocator */

th_str th_intern(th_ctx *ctx, const char *text, size_t length); /* 0 when out of memory */
th_str th_intern_z(th_ctx *ctx, const char *text);
const char *th_str_get(const th_ctx *ctx, th_str s); /* NUL-terminated, stable for the context's life */
size_t th_str_len(const th_ctx *ctx, th_str s);

/* Devices are (type name, index); index -1 means "none given". No list of known devices exists; the type is an
 * identifier. 0 when out of memory or when it is no device (recorded as the context's error). */
th_dev th_device(th_ctx *ctx, const char *type, int32_t index);
const char *th_device_type(const th_ctx *ctx, th_dev d);
int32_t th_device_index(const th_ctx *ctx, th_dev d);

#endif
