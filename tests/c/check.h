/* A test is a function; CHECK records a failure with its place and goes on; main returns check_report(). */
#ifndef THUNDER_TESTS_CHECK_H
#define THUNDER_TESTS_CHECK_H

#include "thunder/thunder.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#ifndef THUNDER_SOURCE_DIR
#define THUNDER_SOURCE_DIR "."
#endif

static int check_failures, check_count;

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        check_count++;                                                                    \
        if (!(condition)) {                                                               \
            check_failures++;                                                             \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #condition); \
        }                                                                                 \
    } while (0)

#define CHECK_TEXT(got, wanted)                                                                                        \
    do {                                                                                                               \
        const char *got_ = (got), *wanted_ = (wanted);                                                                 \
        check_count++;                                                                                                 \
        if (strcmp(got_, wanted_) != 0) {                                                                              \
            check_failures++;                                                                                          \
            fprintf(stderr, "%s:%d: %s:\n--- got\n%s\n--- wanted\n%s\n", __FILE__, __LINE__, __func__, got_, wanted_); \
        }                                                                                                              \
    } while (0)

static inline int check_report(const char *name) {
    printf("%s: %d checks, %d failed\n", name, check_count, check_failures);
    return check_failures != 0;
}

/* An allocator that fails at its n-th request (1-based; 0 never) and counts what is live. */
typedef struct check_alloc {
    long fail_at, requests, live;
} check_alloc;

static inline void *check_alloc_fn(void *user, void *ptr, size_t size) {
    check_alloc *a = user;
    if (size == 0) {
        if (ptr) a->live--;
        free(ptr);
        return NULL;
    }
    if (++a->requests == a->fail_at) return NULL;
    void *fresh = realloc(ptr, size);
    if (!ptr && fresh) a->live++;
    return fresh;
}

static inline th_trace *check_parse(th_ctx *ctx, const char *text) {
    th_trace *t = NULL;
    th_status status = th_trace_parse(ctx, text, strlen(text), &t);
    if (status == TH_OK) return t;
    const th_error *e = th_ctx_error(ctx);
    fprintf(stderr, "parse: %u:%u: %s\n%s\n", e->line, e->column, e->text, text);
    check_failures++;
    return NULL;
}

/* Call run for every file below a folder whose name ends so, in order of names. */
static inline void check_walk(const char *folder, const char *suffix, void (*run)(const char *path)) {
    struct dirent **entries;
    int count = scandir(folder, &entries, NULL, alphasort);
    CHECK(count >= 0);
    for (int i = 0; i < count; i++) {
        char path[4096];
        struct stat info;
        const char *name = entries[i]->d_name;
        size_t length = strlen(name), end = strlen(suffix);
        snprintf(path, sizeof path, "%s/%s", folder, name);
        bool below = stat(path, &info) == 0 && S_ISDIR(info.st_mode);
        if (below && name[0] != '.') check_walk(path, suffix, run);
        if (!below && length >= end && strcmp(name + length - end, suffix) == 0) run(path);
        free(entries[i]);
    }
    if (count >= 0) free(entries);
}

/* A file's bytes with a NUL behind them; NULL when it cannot be read. The caller frees. */
static inline char *check_read(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    long length = ftell(file);
    rewind(file);
    char *text = calloc((size_t)length + 1, 1);
    *size = text ? fread(text, 1, (size_t)length, file) : 0;
    fclose(file);
    return text;
}

#endif
