/* One hash for everything that is interned or compared: 64 bits, eight bytes a step, not for hostile input. */
#ifndef THUNDER_BASE_HASH_H
#define THUNDER_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t th__hash_mix(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ (hash >> 29);
}

static inline uint64_t th__hash_bytes(uint64_t hash, const void *data, size_t size) {
    const unsigned char *at = data;
    uint64_t word;
    hash = th__hash_mix(hash, size);
    for (; size >= 8; size -= 8, at += 8) {
        memcpy(&word, at, 8);
        hash = th__hash_mix(hash, word);
    }
    if (size == 0) return hash;
    word = 0;
    memcpy(&word, at, size);
    return th__hash_mix(hash, word);
}

#endif
