/* The context: allocator, last error, arena, growth of arrays. See ctx.h for who owns what. */
#include "base/ctx.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_SIZE = 16 * 1024, MAX_ITEMS = 1 << 30 };

typedef struct th__block {
    struct th__block *next;
    uint64_t data[];
} th__block;

static void *libc_alloc(void *user, void *ptr, size_t size) {
    (void)user;
    if (size != 0) return realloc(ptr, size);
    free(ptr);
    return NULL;
}

th_ctx *th_ctx_new(th_alloc_fn alloc, void *user) {
    if (!alloc) alloc = libc_alloc;
    th_ctx *ctx = alloc(user, NULL, sizeof *ctx);
    if (!ctx) return NULL;
    memset(ctx, 0, sizeof *ctx);
    ctx->alloc = alloc;
    ctx->user = user;
    return ctx;
}

static void pool_fini(th_ctx *ctx, th__pool *pool) {
    if (pool->items) th_ctx_alloc(ctx, pool->items, 0);
    if (pool->slots) th_ctx_alloc(ctx, pool->slots, 0);
}

void th_ctx_free(th_ctx *ctx) {
    if (!ctx) return;
    pool_fini(ctx, &ctx->strings);
    pool_fini(ctx, &ctx->devices);
    pool_fini(ctx, &ctx->types);
    for (th__block *block = ctx->arena.blocks, *next; block; block = next) {
        next = block->next;
        th_ctx_alloc(ctx, block, 0);
    }
    ctx->alloc(ctx->user, ctx, 0);
}

void *th_ctx_alloc(th_ctx *ctx, void *ptr, size_t size) {
    if (!ptr && size == 0) return NULL;
    return ctx->alloc(ctx->user, ptr, size);
}

/* ---- outcomes ---- */

const th_error *th_ctx_error(const th_ctx *ctx) { return &ctx->error; }

const char *th_status_text(th_status status) {
    static const char *const texts[] = {
#define TH_STATUS(name, text) text,
#include "thunder/status.def"
#undef TH_STATUS
    };
    return (unsigned)status < TH_STATUS_COUNT ? texts[status] : "unknown status";
}

static th_status fail(th_ctx *ctx, th_status status, uint32_t line, uint32_t column, const char *format, va_list args) {
    char text[sizeof ctx->error.text]; /* the arguments may point into the previous error */
    vsnprintf(text, sizeof text, format, args);
    ctx->error = (th_error){.status = status, .line = line, .column = column};
    memcpy(ctx->error.text, text, sizeof text);
    return status;
}

th_status th_fail(th_ctx *ctx, th_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail(ctx, status, 0, 0, format, args);
    va_end(args);
    return status;
}

th_status th_fail_at(th_ctx *ctx, th_status status, uint32_t line, uint32_t column, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail(ctx, status, line, column, format, args);
    va_end(args);
    return status;
}

/* ---- memory ---- */

void *th__arena_take(th_ctx *ctx, size_t size) {
    th__arena *arena = &ctx->arena;
    size = (size + 7) & ~(size_t)7;
    if (size <= arena->left) {
        char *taken = arena->at;
        arena->at += size;
        arena->left -= size;
        return taken;
    }
    bool large = size > BLOCK_SIZE / 4; /* gets a block of its own, and the current one stays in use */
    size_t room = large ? size : BLOCK_SIZE;
    th__block *block = th_ctx_alloc(ctx, NULL, sizeof *block + room);
    if (!block) {
        th_fail(ctx, TH_ENOMEM, "out of memory (%zu bytes)", room);
        return NULL;
    }
    block->next = arena->blocks;
    arena->blocks = block;
    if (large) return block->data;
    arena->at = (char *)block->data + size;
    arena->left = room - size;
    return block->data;
}

/* A new place each time, so that a pointer kept across a growth is caught by the sanitizer. */
static void *grow_moving(th_ctx *ctx, void *old, size_t old_size, size_t size) {
    void *fresh = th_ctx_alloc(ctx, NULL, size);
    if (!fresh || !old) return fresh;
    memcpy(fresh, old, old_size);
    th_ctx_alloc(ctx, old, 0);
    return fresh;
}

bool th__grow(th_ctx *ctx, void *array, uint32_t *cap, uint64_t need, size_t size) {
    /* Growing copies into fresh pages, whose faults cost more than the copy; room that is never touched costs nothing.
     */
    uint64_t wanted = TH_DEBUG ? need + need / 4 : need * size > 16384 ? need * 4 : need + need / 2 + 30;
    if (wanted > MAX_ITEMS && need <= MAX_ITEMS) wanted = MAX_ITEMS;
    if (need > MAX_ITEMS) {
        th_fail(ctx, TH_ELIMIT, "more than %d items in one array", MAX_ITEMS);
        return false;
    }
    void *old, *fresh;
    memcpy(&old, array, sizeof old);
    fresh = TH_DEBUG ? grow_moving(ctx, old, *cap * size, wanted * size) : th_ctx_alloc(ctx, old, wanted * size);
    if (!fresh) {
        th_fail(ctx, TH_ENOMEM, "out of memory (%zu bytes)", (size_t)wanted * size);
        return false;
    }
    memcpy(array, &fresh, sizeof fresh);
    *cap = (uint32_t)wanted;
    return true;
}
