/* Inside of a context, for the core's own files: arena, interning pools, array growth.
 *
 * Ownership: the arena holds every interned item and is freed with the context, so items never move. The pools' tables
 * and every array grown by th__grow come from the context's allocator. Nothing here is freed singly.
 */
#ifndef THUNDER_BASE_CTX_H
#define THUNDER_BASE_CTX_H

#include "thunder/base.h"

#ifndef TH_DEBUG
#define TH_DEBUG 0
#endif

/* Pass an outcome that is not TH_OK on to the caller. */
#define TRY(expression)                               \
    do {                                              \
        th_status try_status_ = (expression);         \
        if (try_status_ != TH_OK) return try_status_; \
    } while (0)

typedef struct th__arena {
    struct th__block *blocks; /* newest first */
    char *at;
    size_t left;
} th__arena;

typedef struct th__slot {
    uint32_t hash, ref; /* ref 0: free */
} th__slot;

/* Items that exist once. Every item starts with its 64-bit content hash; item 0 is reserved. */
typedef struct th__pool {
    void **items;
    uint32_t count, cap; /* count includes the reserved item */
    th__slot *slots;
    uint32_t nslots; /* power of two, or 0 before the first item */
} th__pool;

struct th_ctx {
    th_alloc_fn alloc;
    void *user;
    th_error error;
    th__arena arena;
    th__pool strings, devices, types;
};

void *th__arena_take(th_ctx *ctx, size_t size); /* 8-byte aligned; NULL when out of memory (recorded) */

typedef bool (*th__same_fn)(const void *item, const void *key);
uint32_t th__pool_find(const th__pool *pool, uint64_t hash, th__same_fn same, const void *key);
uint32_t th__pool_add(th_ctx *ctx, th__pool *pool, uint64_t hash, void *item); /* 0 when out of memory */

static inline const void *th__pool_get(const th__pool *pool, uint32_t ref) {
    return ref != 0 && ref < pool->count ? pool->items[ref] : NULL;
}

/* Content hashes: equal in every context that interned the same thing. */
uint64_t th__str_hash(const th_ctx *ctx, th_str s);
uint64_t th__device_hash(const th_ctx *ctx, th_dev d);

/* Make room for `need` items of `size` bytes; `array` is the address of the array's pointer. The array may move, and
 * always does in debug builds. On failure nothing changes and the error is recorded. */
bool th__grow(th_ctx *ctx, void *array, uint32_t *cap, uint64_t need, size_t size);

static inline bool th__reserve(th_ctx *ctx, void *array, uint32_t *cap, uint64_t need, size_t size) {
    return need <= *cap || th__grow(ctx, array, cap, need, size);
}

#endif
