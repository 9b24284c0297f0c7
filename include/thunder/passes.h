/* Passes rewrite a trace in place. One pass is one file in src/passes and one function; the order is the column in
 * src/passes/pipeline.c. A pass that fails leaves the trace unspecified: work on a clone when it matters. */
#ifndef THUNDER_PASSES_H
#define THUNDER_PASSES_H

#include "thunder/ir.h"

/* Fuel bounds the number of single rewrites, so that a bisection can name the guilty one. */
typedef struct th_fuel {
    int64_t left; /* negative: unlimited */
    int64_t spent;
    char last[120]; /* what the last rewrite was: "cse: t4" */
} th_fuel;
/* May `pass` do one more rewrite, of `what`? */
bool th_fuel_take(th_fuel *fuel, const char *pass, const char *what);

typedef th_status (*th_pass_fn)(th_trace *t, th_fuel *fuel);

th_status th_pass_functionalize(th_trace *t, th_fuel *fuel);
th_status th_pass_noop(th_trace *t, th_fuel *fuel); /* operations that return their input's value */
th_status th_pass_fold(th_trace *t,
                       th_fuel *fuel); /* pure operations over attributes only, seen twice or trivially known */
th_status th_pass_cse(th_trace *t, th_fuel *fuel);
th_status th_pass_errors(th_trace *t, th_fuel *fuel); /* marks what nobody uses and may raise: it stays */
th_status th_pass_dce(th_trace *t, th_fuel *fuel);
th_status th_pass_reinplace(th_trace *t, th_fuel *fuel); /* what is copied back is computed there */
th_status th_pass_reuse(th_trace *t, th_fuel *fuel);     /* what is computed of a dead intermediate takes its memory */
th_status th_pass_lifetime(th_trace *t, th_fuel *fuel);  /* inserts `del` after each last use */

th_pass_fn th_pass_find(const char *name, size_t length);
const char *th_pass_name(size_t index); /* NULL past the end: for listings */

/* Called after each pass with its name and time; returns an error to stop. */
typedef th_status (*th_pass_hook)(void *user, th_trace *t, const char *pass, double milliseconds);
/* passes: comma-separated names, or NULL for the default pipeline. Verifies after each pass when TH_DEBUG is set or
 * verify is true. */
th_status th_pipeline_run(th_trace *t, const char *passes, th_fuel *fuel, bool verify, th_pass_hook hook, void *user);

#endif
