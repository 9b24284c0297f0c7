/* Any bytes are parsed. What parses is well formed, survives printing and parsing, and every pass keeps it so. */
#include "thunder/thunder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void parse_require(bool holds, const th_ctx *ctx, const char *what) {
    if (holds) return;
    fprintf(stderr, "%s: %s\n", what, th_ctx_error(ctx)->text);
    abort();
}

/* The text, after checking that it reads back as the same trace and prints the same again. */
static char *parse_round_trip(const th_trace *t) {
    th_trace *again = NULL;
    char *text = NULL, *twice = NULL;
    size_t length = 0;
    parse_require(th_trace_print(t, &text, &length) == TH_OK, t->ctx, "print");
    parse_require(th_trace_parse(t->ctx, text, length, &again) == TH_OK, t->ctx, text);
    parse_require(th_trace_verify(again) == TH_OK, t->ctx, text);
    parse_require(th_trace_equal(t, again), t->ctx, "not equal after print and parse");
    parse_require(th_trace_hash(t) == th_trace_hash(again), t->ctx, "another hash after print and parse");
    parse_require(th_trace_print(again, &twice, NULL) == TH_OK, t->ctx, "print");
    parse_require(strcmp(text, twice) == 0, t->ctx, "another text after print and parse");
    th_trace_free(again);
    th_ctx_alloc(t->ctx, twice, 0);
    return text;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_trace *t = NULL;
    if (!ctx) return 0;
    if (th_trace_parse(ctx, (const char *)data, size, &t) == TH_OK) {
        parse_require(th_trace_verify(t) == TH_OK, ctx, "parsed, and not well formed");
        th_ctx_alloc(ctx, parse_round_trip(t), 0);
        parse_require(th_pipeline_run(t, NULL, NULL, true, NULL, NULL) == TH_OK, ctx, "passes");
        th_ctx_alloc(ctx, parse_round_trip(t), 0);
    } else {
        const th_error *e = th_ctx_error(ctx);
        parse_require(t == NULL && e->text[0] != '\0' && (e->status == TH_ESYNTAX || e->status == TH_ELIMIT), ctx,
                      "an error without text, place or the right status");
        parse_require(e->status != TH_ESYNTAX || (e->line > 0 && e->column > 0), ctx,
                      "a syntax error without its place");
    }
    th_trace_free(t);
    th_ctx_free(ctx);
    return 0;
}
