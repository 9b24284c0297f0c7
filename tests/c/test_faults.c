/* Memory may run out at any request: every golden trace is parsed, verified, optimised, compared and printed with an
 * allocator that fails at its n-th request, n growing until nothing fails. Each failure must be reported as
 * out-of-memory, free everything, and crash nowhere. */
#include "check.h"

static int cases;
static long failures_survived;

static th_status work(th_ctx *ctx, const char *text, size_t length, char **printed) {
    th_trace *t = NULL, *copy = NULL;
    th_status status = th_trace_parse(ctx, text, length, &t);
    if (status == TH_OK) status = th_trace_clone(t, &copy);
    if (status == TH_OK) status = th_pipeline_run(t, NULL, NULL, true, NULL, NULL);
    if (status == TH_OK) status = th_trace_verify(t);
    if (status == TH_OK && th_trace_equal(t, copy) && th_trace_hash(t) != th_trace_hash(copy)) status = TH_ENOMEM;
    if (status == TH_OK) status = th_trace_print(t, printed, NULL);
    th_trace_free(copy);
    th_trace_free(t);
    return status;
}

static void survive(const char *path, const char *text, size_t length) {
    char *wanted = NULL, *got = NULL;
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_status sound = work(ctx, text, length, &wanted);
    for (long n = 1;; n++) {
        check_alloc alloc = {.fail_at = n};
        th_ctx *mine = th_ctx_new(check_alloc_fn, &alloc);
        th_status status = mine ? work(mine, text, length, &got) : TH_ENOMEM;
        bool failed = alloc.requests >= n;
        bool same = got && wanted && strcmp(got, wanted) == 0;
        if (failed) failures_survived++;
        /* A request may fail and be survived, but only with the same outcome. */
        bool fine = status == sound ? sound != TH_OK || same : failed && status == TH_ENOMEM;
        if (!fine) {
            fprintf(stderr, "%s: request %ld: %s: %s\n", path, n, th_status_text(status),
                    mine ? th_ctx_error(mine)->text : "");
        }
        CHECK(fine);
        if (mine) th_ctx_alloc(mine, got, 0);
        got = NULL;
        th_ctx_free(mine);
        CHECK(alloc.live == 0);
        if (!failed || !fine) break;
    }
    th_ctx_alloc(ctx, wanted, 0);
    th_ctx_free(ctx);
}

static void run_file(const char *path) {
    size_t length;
    char *text = check_read(path, &length), *expect = text ? strstr(text, "# EXPECT:") : NULL;
    CHECK(text != NULL);
    if (text) survive(path, text, expect ? (size_t)(expect - text) : length);
    cases++;
    free(text);
}

int main(int argc, char **argv) {
    check_walk(argc > 1 ? argv[1] : THUNDER_SOURCE_DIR "/tests/ir", ".ir", run_file);
    CHECK(cases > 50 && failures_survived > 5000);
    printf("%d traces, %ld failures survived; ", cases, failures_survived);
    return check_report("test_faults");
}
