/* The order of the passes, and running them: each by name, timed, counted in fuel, verified in debug builds. */
#include "passes/pass.h"

#include <string.h>
#include <time.h>

static const struct {
    const char *name;
    th_pass_fn run;
} column[] = {
    {"functionalize", th_pass_functionalize}, /* writes become values, inputs are written back once */
    {"noop", th_pass_noop},                   /* operations that return their input */
    {"fold", th_pass_fold},                   /* arithmetic on known numbers */
    {"cse", th_pass_cse},                     /* the same operation twice */
    {"errors", th_pass_errors},               /* results that nobody uses, of what may raise, stay */
    {"dce", th_pass_dce},                     /* results that nobody uses */
    {"reinplace", th_pass_reinplace},         /* inputs are not written back, but computed in */
    {"reuse", th_pass_reuse},                 /* nor is new memory taken where old is at hand */
    {"lifetime", th_pass_lifetime},           /* del after the last use */
};
enum { NPASSES = sizeof column / sizeof *column };

th_pass_fn th_pass_find(const char *name, size_t length) {
    for (size_t i = 0; i < NPASSES; i++) {
        if (strlen(column[i].name) == length && memcmp(column[i].name, name, length) == 0) return column[i].run;
    }
    return NULL;
}

const char *th_pass_name(size_t index) { return index < NPASSES ? column[index].name : NULL; }

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

typedef struct run {
    th_trace *t;
    th_fuel *fuel;
    bool verify;
    th_pass_hook hook;
    void *user;
} run;

static th_status run_one(const run *r, const char *name, size_t length) {
    char text[32];
    th_ctx *ctx = r->t->ctx;
    th_pass_fn pass = th_pass_find(name, length);
    if (!pass) return th_fail(ctx, TH_EUNKNOWN, "there is no pass called %.*s", length < 60 ? (int)length : 60, name);
    memcpy(text, name, length); /* shorter than text: it is a pass's name */
    text[length] = '\0';
    double start = milliseconds();
    TRY(pass(r->t, r->fuel));
    double spent = milliseconds() - start;
    TRY(th_trace_status(r->t));
    if ((TH_DEBUG || r->verify) && th_trace_verify(r->t) != TH_OK) {
        if (th_ctx_error(ctx)->status == TH_ENOMEM) return TH_ENOMEM;
        return th_fail(ctx, TH_EINTERNAL, "after %s: %s", text, th_ctx_error(ctx)->text);
    }
    return r->hook ? r->hook(r->user, r->t, text, spent) : TH_OK;
}

th_status th_pipeline_run(th_trace *t, const char *passes, th_fuel *fuel, bool verify, th_pass_hook hook, void *user) {
    const run r = {t, fuel, verify, hook, user};
    if (!passes) {
        for (size_t i = 0; i < NPASSES; i++) TRY(run_one(&r, column[i].name, strlen(column[i].name)));
        return TH_OK;
    }
    while (*(passes += strspn(passes, ", ")) != '\0') {
        size_t length = strcspn(passes, ", ");
        TRY(run_one(&r, passes, length));
        passes += length;
    }
    return TH_OK;
}
