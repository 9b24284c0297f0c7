/* thunder-opt: reads a trace, runs passes over it, prints what is left.
 *
 *     thunder-opt FILE [--passes dce,cse] [--fuel N] [--verify] [--time] [--list]
 *
 * FILE "-" is the standard input. Without --passes the default pipeline runs; `--passes ""` only reads and prints.
 * --fuel N stops after N single rewrites and says on stderr which was the last one, for bisection.
 * Exit status: 0 done, 1 the trace is at fault (`FILE:line:col: error: text`), 2 the call or the file is.
 */
#include "thunder/thunder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    const char *file, *passes;
    long long fuel;
    bool verify, time, list;
} options;

static int usage(const char *problem, const char *what) {
    if (problem) fprintf(stderr, "thunder-opt: %s%s\n", problem, what);
    fputs("usage: thunder-opt FILE [--passes a,b] [--fuel N] [--verify] [--time] [--list]\n", stderr);
    return 2;
}

/* "--name value" or "--name=value"; moves *i past the value. */
static const char *option_value(int argc, char **argv, int *i, const char *name) {
    size_t length = strlen(name);
    if (strncmp(argv[*i], name, length) != 0) return NULL;
    if (argv[*i][length] == '=') return argv[*i] + length + 1;
    if (argv[*i][length] != '\0' || *i + 1 >= argc) return NULL;
    return argv[++*i];
}

static int parse_options(int argc, char **argv, options *o) {
    const char *value;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--list") == 0) {
            o->list = true;
        } else if (strcmp(argv[i], "--verify") == 0) {
            o->verify = true;
        } else if (strcmp(argv[i], "--time") == 0) {
            o->time = true;
        } else if ((value = option_value(argc, argv, &i, "--passes"))) {
            o->passes = value;
        } else if ((value = option_value(argc, argv, &i, "--fuel"))) {
            char *end;
            o->fuel = strtoll(value, &end, 10);
            if (*value == '\0' || *end != '\0' || o->fuel < 0) return usage("not a number of rewrites: ", value);
        } else if ((argv[i][0] == '-' && argv[i][1] != '\0') || o->file) {
            return usage("unexpected argument ", argv[i]);
        } else {
            o->file = argv[i];
        }
    }
    return o->file || o->list ? 0 : usage("no file given", "");
}

static char *read_all(FILE *file, size_t *length) {
    size_t cap = 1 << 16;
    char *text = malloc(cap);
    *length = 0;
    while (text) {
        *length += fread(text + *length, 1, cap - *length, file);
        if (*length < cap) break;
        char *more = realloc(text, cap *= 2);
        if (!more) free(text);
        text = more;
    }
    if (text && ferror(file)) {
        free(text);
        return NULL;
    }
    return text;
}

static char *read_input(const char *name, size_t *length) {
    bool standard = strcmp(name, "-") == 0;
    FILE *file = standard ? stdin : fopen(name, "rb");
    if (!file) return NULL;
    char *text = read_all(file, length);
    if (!standard) fclose(file);
    return text;
}

static th_status show_time(void *user, th_trace *t, const char *pass, double milliseconds) {
    (void)user;
    fprintf(stderr, "%-14s %8.3f ms %6u operations\n", pass, milliseconds, (unsigned)t->nops - 1);
    return TH_OK;
}

static int show_error(const options *o, const th_ctx *ctx) {
    const th_error *e = th_ctx_error(ctx);
    const char *file = strcmp(o->file, "-") == 0 ? "<stdin>" : o->file;
    if (e->line)
        fprintf(stderr, "%s:%u:%u: error: %s\n", file, (unsigned)e->line, (unsigned)e->column, e->text);
    else
        fprintf(stderr, "%s: error: %s\n", file, e->text);
    return e->status == TH_EUNKNOWN ? 2 : 1;
}

static int optimise(const options *o, th_ctx *ctx, const char *text, size_t length) {
    th_trace *t = NULL;
    char *printed = NULL;
    th_fuel fuel = {.left = o->fuel};
    th_status status = th_trace_parse(ctx, text, length, &t);
    if (status == TH_OK) status = th_trace_verify(t);
    if (status == TH_OK) {
        status = th_pipeline_run(t, o->passes, &fuel, o->verify, o->time ? show_time : NULL, NULL);
    }
    if (status == TH_OK) status = th_trace_print(t, &printed, NULL);
    if (status == TH_OK) {
        fputs(printed, stdout);
        if (o->fuel >= 0) fprintf(stderr, "%lld rewrites; the last was %s\n", (long long)fuel.spent, fuel.last);
    }
    th_ctx_alloc(ctx, printed, 0);
    th_trace_free(t);
    return status == TH_OK ? 0 : show_error(o, ctx);
}

int main(int argc, char **argv) {
    options o = {.fuel = -1};
    int wrong = parse_options(argc, argv, &o);
    if (wrong) return wrong;
    for (size_t i = 0; o.list && th_pass_name(i); i++) puts(th_pass_name(i));
    if (o.list) return 0;
    size_t length = 0;
    char *text = read_input(o.file, &length);
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    if (!text || !ctx) {
        fprintf(stderr, "thunder-opt: cannot read %s\n", o.file);
        free(text);
        th_ctx_free(ctx);
        return 2;
    }
    int code = optimise(&o, ctx, text, length);
    free(text);
    th_ctx_free(ctx);
    if (fflush(stdout) != 0) return 2;
    return code;
}
