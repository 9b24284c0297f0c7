/* Images on disk: what was put is got again, anything else is declined, whatever happened to the file. */
#include "check.h"

#include "executors/cuda/cuda.h"

#include <unistd.h>

static char folder[256];
static const char *const options[] = {"--use_fast_math"};
static const th_cuda_source source = {
    .text = "__global__ void k() {}", .entry = "k", .options = options, .noptions = 1, .arch = 90};

static bool has(th_ctx *ctx, const th_cuda_source *of, int version) {
    th_cuda_image image;
    th_status status = th_cuda_cache_get(ctx, folder, of, version, &image);
    CHECK(status == TH_OK || status == TH_DECLINED);
    if (status != TH_OK) return false;
    CHECK(image.size == 5 && memcmp(image.data, "\x7f\0ELF", 5) == 0);
    CHECK_TEXT(image.entry, "_Z1kv");
    th_cuda_image_fini(ctx, &image);
    return true;
}

static bool put(th_ctx *ctx, const th_cuda_source *of) {
    const th_cuda_image image = {.data = "\x7f\0ELF", .size = 5, .entry = "_Z1kv"};
    return th_cuda_cache_put(ctx, folder, of, 13000, &image) == TH_OK;
}

static bool file_path(char *path, size_t size) { /* of the only file */
    DIR *dir = opendir(folder);
    bool found = false;
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (e->d_name[0] != '.') snprintf(path, size, "%s/%s", folder, e->d_name), found = true;
    if (dir) closedir(dir);
    return found;
}

static void check_key(th_ctx *ctx) {
    const char *other_options[] = {"--use_fast_mat"}, *joined[] = {"--use_fast_math", ""};
    th_cuda_source other = source;
    CHECK(!has(ctx, &source, 13000));
    CHECK(put(ctx, &source));
    CHECK(has(ctx, &source, 13000));
    CHECK(!has(ctx, &source, 13010));
    other.arch = 80;
    CHECK(!has(ctx, &other, 13000));
    other = source, other.entry = "j";
    CHECK(!has(ctx, &other, 13000));
    other = source, other.text = "__global__ void k() { }";
    CHECK(!has(ctx, &other, 13000));
    other = source, other.options = other_options;
    CHECK(!has(ctx, &other, 13000));
    other = source, other.options = joined, other.noptions = 2;
    CHECK(!has(ctx, &other, 13000));
}

/* Every byte of the file in turn damaged, and every length cut. */
static void check_damage(th_ctx *ctx) {
    char path[512], bytes[1024];
    CHECK(file_path(path, sizeof path));
    FILE *file = fopen(path, "rb");
    size_t size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    for (size_t i = 0; i < 2 * size; i++) {
        size_t length = i < size ? size : i - size;
        if (i < size) bytes[i] ^= 0x10;
        file = fopen(path, "wb");
        fwrite(bytes, 1, length, file);
        fclose(file);
        if (i < size) bytes[i] ^= 0x10;
        CHECK(!has(ctx, &source, 13000));
    }
    CHECK(put(ctx, &source));
    CHECK(has(ctx, &source, 13000));
    unlink(path);
}

static void check_not_kept(th_ctx *ctx) {
    static const char *const including[] = {"-I.", "--include-path=.", "-include=a.h", "--pre-include=a.h"};
    th_cuda_source other = source;
    other.text = "#  include \t\"mine.h\"\n";
    CHECK(!put(ctx, &other));
    other = source;
    for (size_t i = 0; i < 4; i++) {
        other.options = &including[i];
        CHECK(!put(ctx, &other));
    }
    other = source, other.text = "#include <cuda_fp16.h>\n";
    CHECK(put(ctx, &other));
    char path[512];
    if (file_path(path, sizeof path)) unlink(path);
}

int main(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    snprintf(folder, sizeof folder, "/tmp/thunder-cache-%ld", (long)getpid());
    check_key(ctx);
    check_damage(ctx);
    check_not_kept(ctx);
    rmdir(folder);
    th_ctx_free(ctx);
    return check_report("cuda_cache");
}
