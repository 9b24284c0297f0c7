/* Drives a fuzz target without a fuzzing engine.
 *
 *     fuzz_x PATH...                       replay: every file, and every file below a folder
 *     fuzz_x --seconds S [PATH...]         replay, then mutate what was replayed for S seconds
 *     fuzz_x --runs N [--seed K] [PATH...] the same for N mutations
 *
 * The target is LLVMFuzzerTestOneInput, so libFuzzer and AFL++ drive it as well. When it dies the input that killed it
 * is written to crash-<target> in the current folder.
 */
#include <dirent.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

enum { INPUT_LIMIT = 4096, CORPUS_LIMIT = 4096 };

typedef struct input {
    uint8_t *data;
    size_t size;
} input;

static input corpus[CORPUS_LIMIT];
static size_t ncorpus;
static input current;
static char crash_path[300];
static uint64_t state = 1;

/* ---- what is left when it dies ---- */

static void leave_input(void) {
    FILE *file = fopen(crash_path, "wb");
    if (!file) return;
    fwrite(current.data, 1, current.size, file);
    fclose(file);
    fprintf(stderr, "input: %zu bytes in %s\n", current.size, crash_path);
}

static void on_signal(int number) {
    leave_input();
    signal(number, SIG_DFL);
    raise(number);
}

static void run(const uint8_t *data, size_t size) {
    current = (input){malloc(size ? size : 1), size}; /* its own block, so that reading past the end is seen */
    if (!current.data) exit(2);
    memcpy(current.data, data, size);
    LLVMFuzzerTestOneInput(current.data, size);
    free(current.data);
    current = (input){0};
}

/* ---- corpus ---- */

static void add_file(const char *path) {
    FILE *file = fopen(path, "rb");
    static uint8_t data[1 << 20];
    if (!file) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(2);
    }
    size_t size = fread(data, 1, sizeof data, file);
    fclose(file);
    run(data, size);
    if (ncorpus == CORPUS_LIMIT || size > INPUT_LIMIT) return;
    corpus[ncorpus] = (input){malloc(size ? size : 1), size};
    if (!corpus[ncorpus].data) exit(2);
    memcpy(corpus[ncorpus++].data, data, size);
}

static void add_path(const char *path) {
    struct dirent **entries;
    struct stat info;
    if (stat(path, &info) != 0 || !S_ISDIR(info.st_mode)) {
        add_file(path);
        return;
    }
    int count = scandir(path, &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char below[4096];
        snprintf(below, sizeof below, "%s/%s", path, entries[i]->d_name);
        if (entries[i]->d_name[0] != '.') add_path(below);
        free(entries[i]);
    }
    if (count >= 0) free(entries);
}

/* ---- mutation ---- */

static uint32_t next_random(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below ? (uint32_t)(state >> 16) % below : 0;
}

static size_t insert(uint8_t *data, size_t size, size_t at, const uint8_t *what, size_t length) {
    if (size + length > INPUT_LIMIT) return size;
    memmove(data + at + length, data + at, size - at);
    memcpy(data + at, what, length);
    return size + length;
}

static size_t mutate_once(uint8_t *data, size_t size) {
    static const char *const words[] = {"torch.add",
                                        "torch.Tensor.add_",
                                        "; alias 1",
                                        "; offset 3",
                                        "; writes x",
                                        "; random",
                                        "\n    ",
                                        "return ",
                                        "del ",
                                        "(",
                                        ")",
                                        "\"cpu f32[2]\"",
                                        "None",
                                        "slice(0, 1, None)",
                                        "-9223372036854775808",
                                        "1e308",
                                        "{",
                                        "}",
                                        "_: "};
    size_t at = next_random((uint32_t)size + 1);
    const input *other = ncorpus ? &corpus[next_random((uint32_t)ncorpus)] : NULL;
    const char *word = words[next_random(sizeof words / sizeof *words)];
    uint8_t byte = (uint8_t)next_random(256);
    switch (next_random(7)) {
    case 0:
        if (at < size) data[at] ^= (uint8_t)(1u << next_random(8));
        return size;
    case 1:
        if (at < size) data[at] = byte;
        return size;
    case 2: return insert(data, size, at, &byte, 1);
    case 3: return insert(data, size, at, (const uint8_t *)word, strlen(word));
    case 4: { /* remove a piece */
        size_t length = next_random(16);
        if (length > size - at) length = size - at;
        memmove(data + at, data + at + length, size - at - length);
        return size - length;
    }
    case 5: /* take over from another input at the same place */
        if (!other || other->size <= at) return size;
        memcpy(data + at, other->data + at, other->size - at);
        return other->size;
    default: { /* insert a piece of another input */
        if (!other || other->size == 0) return size;
        size_t from = next_random((uint32_t)other->size), length = next_random(64);
        if (length > other->size - from) length = other->size - from;
        return insert(data, size, at, other->data + from, length);
    }
    }
}

static void run_mutation(void) {
    uint8_t data[INPUT_LIMIT];
    size_t size = 0;
    if (ncorpus && next_random(8) != 0) {
        const input *from = &corpus[next_random((uint32_t)ncorpus)];
        memcpy(data, from->data, size = from->size);
        for (uint32_t n = 1 + next_random(6); n > 0; n--) size = mutate_once(data, size);
    } else {
        size = next_random(300);
        for (size_t i = 0; i < size; i++) data[i] = (uint8_t)next_random(256);
    }
    run(data, size);
}

int main(int argc, char **argv) {
    double seconds = 0;
    long runs = 0, done = 0;
    const char *name = strrchr(argv[0], '/');
    snprintf(crash_path, sizeof crash_path, "crash-%s", name ? name + 1 : argv[0]);
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(leave_input);
    signal(SIGABRT, on_signal);
    for (int i = 1; i < argc; i++) {
        bool value = i + 1 < argc;
        if (value && strcmp(argv[i], "--seconds") == 0)
            seconds = atof(argv[++i]);
        else if (value && strcmp(argv[i], "--runs") == 0)
            runs = atol(argv[++i]);
        else if (value && strcmp(argv[i], "--seed") == 0)
            state = (uint64_t)atoll(argv[++i]) * 2654435761u + 1;
        else
            add_path(argv[i]);
    }
    time_t end = time(NULL) + (time_t)seconds;
    while (done < runs || (seconds > 0 && time(NULL) < end)) {
        run_mutation();
        done++;
    }
    printf("%s: %zu inputs replayed, %ld mutations, seed state %llu\n", argv[0], ncorpus, done,
           (unsigned long long)state);
    for (size_t i = 0; i < ncorpus; i++) free(corpus[i].data);
    return 0;
}
