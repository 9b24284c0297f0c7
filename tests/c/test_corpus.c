/* The fuzz targets' committed corpus, replayed in every test run, with some fixed mutations of the pass fuzzer's
 * inputs. */
#include "check.h"

#define LLVMFuzzerTestOneInput fuzz_parse
#include "../fuzz/fuzz_parse.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_passes
#include "../fuzz/fuzz_passes.c"
#undef LLVMFuzzerTestOneInput

static int (*target)(const uint8_t *data, size_t size);
static int replayed;

static void replay(const char *path) {
    size_t size;
    char *data = check_read(path, &size);
    CHECK(data != NULL);
    if (!data) return;
    CHECK(target((const uint8_t *)data, size) == 0); /* a finding aborts and names itself */
    replayed++;
    free(data);
}

static void test_random_bytes_make_traces_that_passes_keep(void) {
    uint64_t state = 42;
    for (int run = 0; run < 2000; run++) {
        uint8_t bytes[300];
        for (size_t i = 0; i < sizeof bytes; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            bytes[i] = (uint8_t)(state >> 56);
        }
        CHECK(fuzz_passes(bytes, sizeof bytes) == 0);
    }
}

int main(void) {
    target = fuzz_parse;
    check_walk(THUNDER_SOURCE_DIR "/tests/fuzz/corpus/parse", ".txt", replay);
    target = fuzz_passes;
    check_walk(THUNDER_SOURCE_DIR "/tests/fuzz/corpus/passes", ".bin", replay);
    CHECK(replayed > 10);
    test_random_bytes_make_traces_that_passes_keep();
    return check_report("test_corpus");
}
