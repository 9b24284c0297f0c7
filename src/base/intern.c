/* Interning pools, and the two that the base layer owns: strings and devices.
 *
 * A pool is an array of pointers to items plus an open-addressing table of (hash, reference), at most 3/4 full. Items
 * live in the context's arena and never move; the table and the array may.
 */
#include "base/ctx.h"
#include "base/hash.h"

#include <string.h>

enum { FIRST_SLOTS = 64 };

typedef struct string_item {
    uint64_t hash;
    size_t length;
    char text[];
} string_item;

typedef struct device_item {
    uint64_t hash;
    th_str type;
    int32_t index;
} device_item;

uint32_t th__pool_find(const th__pool *pool, uint64_t hash, th__same_fn same, const void *key) {
    if (pool->nslots == 0) return 0;
    uint32_t mask = pool->nslots - 1, small = (uint32_t)(hash >> 32);
    for (uint32_t at = small & mask; pool->slots[at].ref != 0; at = (at + 1) & mask) {
        if (pool->slots[at].hash == small && same(pool->items[pool->slots[at].ref], key)) return pool->slots[at].ref;
    }
    return 0;
}

static void slot_put(th__slot *slots, uint32_t mask, uint32_t hash, uint32_t ref) {
    uint32_t at = hash & mask;
    while (slots[at].ref != 0) at = (at + 1) & mask;
    slots[at] = (th__slot){hash, ref};
}

static bool pool_rehash(th_ctx *ctx, th__pool *pool) {
    uint32_t nslots = pool->nslots ? pool->nslots * 2 : FIRST_SLOTS;
    th__slot *slots = th_ctx_alloc(ctx, NULL, nslots * sizeof *slots);
    if (!slots) {
        th_fail(ctx, TH_ENOMEM, "out of memory (%zu bytes)", nslots * sizeof *slots);
        return false;
    }
    memset(slots, 0, nslots * sizeof *slots);
    for (uint32_t i = 0; i < pool->nslots; i++) {
        if (pool->slots[i].ref != 0) slot_put(slots, nslots - 1, pool->slots[i].hash, pool->slots[i].ref);
    }
    th_ctx_alloc(ctx, pool->slots, 0);
    pool->slots = slots;
    pool->nslots = nslots;
    return true;
}

uint32_t th__pool_add(th_ctx *ctx, th__pool *pool, uint64_t hash, void *item) {
    uint32_t ref = pool->count ? pool->count : 1;
    if (!th__reserve(ctx, &pool->items, &pool->cap, (uint64_t)ref + 1, sizeof *pool->items)) return 0;
    if ((uint64_t)ref * 4 >= (uint64_t)pool->nslots * 3 && !pool_rehash(ctx, pool)) return 0;
    pool->items[0] = NULL;
    pool->items[ref] = item;
    pool->count = ref + 1;
    slot_put(pool->slots, pool->nslots - 1, (uint32_t)(hash >> 32), ref);
    return ref;
}

/* ---- strings ---- */

typedef struct string_key {
    const char *text;
    size_t length;
} string_key;

static bool string_same(const void *item, const void *key) {
    const string_item *s = item;
    const string_key *k = key;
    return s->length == k->length && memcmp(s->text, k->text, k->length) == 0;
}

th_str th_intern(th_ctx *ctx, const char *text, size_t length) {
    uint64_t hash = th__hash_bytes(1, text, length);
    string_key key = {text, length};
    th_str found = th__pool_find(&ctx->strings, hash, string_same, &key);
    if (found) return found;
    string_item *item = th__arena_take(ctx, sizeof *item + length + 1);
    if (!item) return 0;
    item->hash = hash;
    item->length = length;
    memcpy(item->text, text, length);
    item->text[length] = '\0';
    return th__pool_add(ctx, &ctx->strings, hash, item);
}

th_str th_intern_z(th_ctx *ctx, const char *text) { return th_intern(ctx, text, strlen(text)); }

const char *th_str_get(const th_ctx *ctx, th_str s) {
    const string_item *item = th__pool_get(&ctx->strings, s);
    return item ? item->text : "";
}

size_t th_str_len(const th_ctx *ctx, th_str s) {
    const string_item *item = th__pool_get(&ctx->strings, s);
    return item ? item->length : 0;
}

uint64_t th__str_hash(const th_ctx *ctx, th_str s) {
    const string_item *item = th__pool_get(&ctx->strings, s);
    return item ? item->hash : 0;
}

/* ---- devices ---- */

static bool device_same(const void *item, const void *key) {
    const device_item *a = item, *b = key;
    return a->type == b->type && a->index == b->index;
}

static bool device_name_ok(const char *text) {
    if (*text == '\0' || (*text >= '0' && *text <= '9')) return false;
    for (; *text; text++) {
        bool letter = (*text >= 'a' && *text <= 'z') || (*text >= 'A' && *text <= 'Z');
        if (!letter && *text != '_' && !(*text >= '0' && *text <= '9')) return false;
    }
    return true;
}

th_dev th_device(th_ctx *ctx, const char *type, int32_t index) {
    if (!device_name_ok(type) || index < -1) {
        th_fail(ctx, TH_EINVAL, "not a device: \"%s\", index %d", type, (int)index);
        return 0;
    }
    th_str name = th_intern_z(ctx, type);
    if (!name) return 0;
    device_item key = {th__hash_mix(th__str_hash(ctx, name), (uint32_t)index), name, index};
    th_dev found = th__pool_find(&ctx->devices, key.hash, device_same, &key);
    if (found) return found;
    device_item *item = th__arena_take(ctx, sizeof *item);
    if (!item) return 0;
    *item = key;
    return th__pool_add(ctx, &ctx->devices, key.hash, item);
}

const char *th_device_type(const th_ctx *ctx, th_dev d) {
    const device_item *item = th__pool_get(&ctx->devices, d);
    return item ? th_str_get(ctx, item->type) : "";
}

int32_t th_device_index(const th_ctx *ctx, th_dev d) {
    const device_item *item = th__pool_get(&ctx->devices, d);
    return item ? item->index : -1;
}

uint64_t th__device_hash(const th_ctx *ctx, th_dev d) {
    const device_item *item = th__pool_get(&ctx->devices, d);
    return item ? item->hash : 0;
}
