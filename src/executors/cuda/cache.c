/* Compiled images on disk, one file each, shared by every process of a user. See cuda.h.
 *
 *     magic | size of key, entry, image | key | entry | image | hash of all that
 *
 * The key is everything that decides the image: compiler version, capability, kernel name, options, source. A file is
 * named by the key's hash and used only when the key inside is equal and the hash at its end right, so neither a
 * collision nor a torn file can hand out a wrong kernel. It is written beside its place and renamed into it: a reader
 * sees the old file, the new one, or none. A source that includes files of the user's is not kept, for their text is
 * not in the key.
 */
#include "executors/cuda/cuda.h"

#include "base/ctx.h"
#include "base/env.h"
#include "base/hash.h"
#include "base/text.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_PATH = 4096, MAX_NAME = 64 };
static const char magic[8] = "thcuda1";

typedef struct header {
    char magic[8];
    uint64_t key, entry, image; /* sizes in bytes */
} header;

bool th_cuda_cache_folder(char *path, size_t size) {
    const char *folder = th_env("THUNDER_CACHE_DIR"), *home = th_env("HOME");
    if (!folder && !home) return false;
    int length = folder ? snprintf(path, size, "%s", folder) : snprintf(path, size, "%s/.cache/thunder", home);
    return length > 0 && (size_t)length < size;
}

static bool may_keep(const th_cuda_source *source) {
    static const char *const including[] = {"-I", "--include-path", "-include", "--pre-include"};
    for (const char *at = source->text; (at = strstr(at, "include")); at += 7)
        if (at[7 + strspn(at + 7, " \t")] == '"') return false;
    for (uint32_t i = 0; i < source->noptions; i++)
        for (size_t j = 0; j < sizeof including / sizeof *including; j++)
            if (!strncmp(source->options[i], including[j], strlen(including[j]))) return false;
    return true;
}

static th_status make_key(th_ctx *ctx, const th_cuda_source *source, int version, char **key, size_t *size) {
    th__text text = {.ctx = ctx};
    th__text_int(&text, version);
    th__text_char(&text, ' ');
    th__text_int(&text, source->arch);
    th__text_bytes(&text, source->entry, strlen(source->entry) + 1);
    for (uint32_t i = 0; i < source->noptions; i++)
        th__text_bytes(&text, source->options[i], strlen(source->options[i]) + 1);
    th__text_char(&text, '\0');
    th__text_z(&text, source->text);
    th_status status = th__text_take(&text, key, size);
    th__text_fini(&text);
    return status;
}

static void make_name(const char *key, size_t size, char *name, size_t room) {
    snprintf(name, room, "cuda-%016llx", (unsigned long long)th__hash_bytes(0, key, size));
}

/* ---- reading ---- */

static char *read_file(th_ctx *ctx, const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    struct stat found;
    char *data = NULL;
    *size = fstat(fileno(file), &found) == 0 && S_ISREG(found.st_mode) ? (size_t)found.st_size : 0;
    if (*size > sizeof(header) && (data = th_ctx_alloc(ctx, NULL, *size)) && fread(data, 1, *size, file) != *size) {
        th_ctx_alloc(ctx, data, 0);
        data = NULL;
    }
    fclose(file);
    return data;
}

static void *copy_of(th_ctx *ctx, const void *data, size_t size) {
    void *copy = th_ctx_alloc(ctx, NULL, size);
    if (copy) memcpy(copy, data, size);
    return copy;
}

static th_status unpack(th_ctx *ctx, const char *data, size_t size, const char *key, size_t key_size,
                        th_cuda_image *image) {
    header h;
    uint64_t hash, body = size - sizeof hash;
    memcpy(&h, data, sizeof h);
    memcpy(&hash, data + body, sizeof hash);
    if (memcmp(h.magic, magic, sizeof magic) != 0 || h.key > size || h.entry > size || h.image > size ||
        sizeof h + h.key + h.entry + h.image != body || th__hash_bytes(0, data, body) != hash)
        return TH_DECLINED;
    const char *at = data + sizeof h;
    if (h.key != key_size || memcmp(at, key, key_size) != 0 || !h.entry || !h.image || at[h.key + h.entry - 1])
        return TH_DECLINED;
    image->entry = copy_of(ctx, at + h.key, h.entry);
    image->data = copy_of(ctx, at + h.key + h.entry, h.image);
    image->size = h.image;
    if (image->entry && image->data) return TH_OK;
    th_cuda_image_fini(ctx, image);
    return TH_ENOMEM;
}

th_status th_cuda_cache_get(th_ctx *ctx, const char *folder, const th_cuda_source *source, int version,
                            th_cuda_image *image) {
    char name[MAX_NAME], path[MAX_PATH], *key = NULL;
    size_t key_size = 0, size = 0;
    memset(image, 0, sizeof *image);
    if (!may_keep(source)) return TH_DECLINED;
    TRY(make_key(ctx, source, version, &key, &key_size));
    make_name(key, key_size, name, sizeof name);
    th_status status = TH_DECLINED;
    int length = snprintf(path, sizeof path, "%s/%s", folder, name);
    char *data = length > 0 && (size_t)length < sizeof path ? read_file(ctx, path, &size) : NULL;
    if (data) status = unpack(ctx, data, size, key, key_size, image);
    th_ctx_alloc(ctx, data, 0);
    th_ctx_alloc(ctx, key, 0);
    return status;
}

/* ---- writing ---- */

static bool make_folder(const char *folder) { /* with its parents, for this user alone */
    char path[MAX_PATH];
    size_t length = strlen(folder);
    if (length >= sizeof path) return false;
    memcpy(path, folder, length + 1);
    for (char *at = path + 1; (at = strchr(at, '/')); at++) {
        *at = '\0';
        if (mkdir(path, 0700) != 0 && errno != EEXIST) return false;
        *at = '/';
    }
    return mkdir(path, 0700) == 0 || errno == EEXIST;
}

static bool write_parts(FILE *file, const th__text *body) {
    uint64_t hash = th__hash_bytes(0, body->data, body->length);
    return fwrite(body->data, 1, body->length, file) == body->length && fwrite(&hash, sizeof hash, 1, file) == 1;
}

static bool write_file(const char *path, const th__text *body) {
    char beside[MAX_PATH + 32];
    snprintf(beside, sizeof beside, "%s.XXXXXX", path);
    int fd = mkstemp(beside);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "wb");
    if (!file) {
        if (fd >= 0) close(fd), unlink(beside);
        return false;
    }
    bool ok = write_parts(file, body);
    ok = fclose(file) == 0 && ok;
    ok = ok && rename(beside, path) == 0;
    if (!ok) unlink(beside);
    return ok;
}

th_status th_cuda_cache_put(th_ctx *ctx, const char *folder, const th_cuda_source *source, int version,
                            const th_cuda_image *image) {
    char name[MAX_NAME], path[MAX_PATH], *key = NULL;
    size_t size = 0;
    if (!may_keep(source) || !make_folder(folder)) return TH_DECLINED;
    TRY(make_key(ctx, source, version, &key, &size));
    make_name(key, size, name, sizeof name);
    header h = {.key = size, .entry = strlen(image->entry) + 1, .image = image->size};
    memcpy(h.magic, magic, sizeof magic);
    th__text body = {.ctx = ctx};
    th__text_bytes(&body, (const char *)&h, sizeof h);
    th__text_bytes(&body, key, size);
    th__text_bytes(&body, image->entry, h.entry);
    th__text_bytes(&body, image->data, h.image);
    int length = snprintf(path, sizeof path, "%s/%s", folder, name);
    bool ok = body.status == TH_OK && length > 0 && (size_t)length < sizeof path && write_file(path, &body);
    th__text_fini(&body);
    th_ctx_alloc(ctx, key, 0);
    return ok ? TH_OK : TH_DECLINED;
}
