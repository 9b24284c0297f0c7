/* Golden tests: every *.ir file below tests/ir.
 *
 *     # RUN: dce,cse              the passes ("parse": none)
 *     # FUEL: 1                   optional
 *     # NORUN: why                optional: test_traces_run.py cannot execute it
 *     def computation(...):       the trace
 *         ...
 *     # EXPECT:                   what is left of it, to the end of the file
 *     def computation(...):
 *
 * A file that must fail has no EXPECT: its guilty line ends in `# ERROR column: text`, or a line `# ERROR: text` stands
 * anywhere when the error has no place. Beside the text each case checks that the result is well formed, survives a
 * print and a parse, and does not change when the passes run once more.
 *
 *     test_golden [DIRECTORY]     THUNDER_BLESS=1 rewrites the expectations
 */
#include "check.h"

static int cases;

static void report(const char *path, const char *what, const char *detail) {
    check_failures++;
    fprintf(stderr, "%s: %s\n%s\n", path, what, detail);
}

/* ---- one case ---- */

typedef struct golden {
    const char *path;
    char *text;
    char passes[200];
    long long fuel;
    char *expect;     /* inside text; NULL when the case must fail */
    size_t head_size; /* of the text before `expect` */
} golden;

static bool directive(const char *text, const char *name, char *out, size_t size) {
    const char *at = text;
    while (at && strncmp(at, name, strlen(name)) != 0) at = (at = strchr(at, '\n')) ? at + 1 : NULL;
    if (!at) return false;
    at += strlen(name);
    at += strspn(at, " ");
    snprintf(out, size, "%.*s", (int)strcspn(at, "\n"), at);
    return true;
}

/* Blank out the directive lines, so that none of them is taken for a note and every line keeps its number. */
static char *trace_text(const golden *g) {
    size_t size = g->expect ? g->head_size : strlen(g->text);
    char *text = calloc(size + 1, 1);
    memcpy(text, g->text, size);
    static const char *const names[] = {"# RUN:", "# NORUN:", "# FUEL:", "# EXPECT:", "# ERROR:"};
    for (char *line = text; line; line = (line = strchr(line, '\n')) ? line + 1 : NULL) {
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            if (strncmp(line, names[i], strlen(names[i])) == 0) memset(line, ' ', strcspn(line, "\n"));
        }
    }
    return text;
}

static char *print(const th_trace *t) {
    char *text = NULL;
    CHECK(th_trace_print(t, &text, NULL) == TH_OK);
    return text;
}

static th_status run_passes(const golden *g, th_trace *t) {
    th_fuel fuel = {.left = g->fuel};
    return strcmp(g->passes, "parse") == 0 ? th_trace_verify(t)
                                           : th_pipeline_run(t, g->passes, &fuel, true, NULL, NULL);
}

/* Where the file says that the error is: line (0: nowhere), column and text. */
static bool expected_error(const golden *g, uint32_t *line, uint32_t *column, char text[300]) {
    *line = *column = 0;
    if (directive(g->text, "# ERROR:", text, 300)) return true;
    const char *at = strstr(g->text, "# ERROR ");
    if (!at) return false;
    *line = 1;
    for (const char *c = g->text; c < at; c++) *line += *c == '\n';
    char *end;
    *column = (uint32_t)strtoul(at + 8, &end, 10);
    snprintf(text, 300, "%.*s", (int)strcspn(end, "\n") - 2, end + 2);
    return true;
}

static void check_error(const golden *g, const th_error *e) {
    uint32_t line, column;
    char text[300], got[600];
    snprintf(got, sizeof got, "%u:%u: %s", e->line, e->column, e->text);
    if (!expected_error(g, &line, &column, text))
        report(g->path, "failed, and no error was expected", got);
    else if (strcmp(text, e->text) != 0 || line != e->line || column != e->column)
        report(g->path, "another error:", got);
}

static void check_result(const golden *g, th_trace *t) {
    char *text = print(t);
    th_trace *again = check_parse(t->ctx, text);
    if (again) {
        char *twice = print(again);
        CHECK(th_trace_equal(t, again) && th_trace_hash(t) == th_trace_hash(again));
        CHECK_TEXT(twice, text);
        th_ctx_alloc(t->ctx, twice, 0);
        if (g->fuel < 0) {
            CHECK(run_passes(g, again) == TH_OK);
            twice = print(again);
            CHECK_TEXT(twice, text);
            th_ctx_alloc(t->ctx, twice, 0);
        }
    }
    th_trace_free(again);
    if (getenv("THUNDER_BLESS")) {
        FILE *file = fopen(g->path, "wb");
        fprintf(file, "%.*s%s", (int)g->head_size, g->text, text);
        fclose(file);
    } else if (strcmp(text, g->expect) != 0) {
        report(g->path, "got (THUNDER_BLESS=1 accepts it)", text);
    }
    th_ctx_alloc(t->ctx, text, 0);
}

static void run_case(golden *g) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_trace *t = NULL;
    char *text = trace_text(g);
    th_status status = th_trace_parse(ctx, text, strlen(text), &t);
    if (status == TH_OK) status = run_passes(g, t);
    if (status != TH_OK)
        check_error(g, th_ctx_error(ctx));
    else if (g->expect)
        check_result(g, t);
    else
        report(g->path, "must fail, and did not", "");
    free(text);
    th_trace_free(t);
    th_ctx_free(ctx);
}

static void run_file(const char *path) {
    static const char mark[] = "# EXPECT:\n";
    golden g = {.path = path, .fuel = -1};
    char fuel[32];
    size_t size;
    g.text = check_read(path, &size);
    cases++;
    check_count++;
    if (!g.text || !directive(g.text, "# RUN:", g.passes, sizeof g.passes)) {
        report(path, "no `# RUN:` line", "");
    } else {
        if (directive(g.text, "# FUEL:", fuel, sizeof fuel)) g.fuel = strtoll(fuel, NULL, 10);
        g.expect = strstr(g.text, mark);
        if (g.expect) g.expect += strlen(mark), g.head_size = (size_t)(g.expect - g.text);
        run_case(&g);
    }
    free(g.text);
}

int main(int argc, char **argv) {
    check_walk(argc > 1 ? argv[1] : THUNDER_SOURCE_DIR "/tests/ir", ".ir", run_file);
    CHECK(cases > 0);
    printf("%d golden cases; ", cases);
    return check_report("test_golden");
}
