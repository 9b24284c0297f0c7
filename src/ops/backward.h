/* What derivative rules of the catalogue are written with.
 *
 *     TH_GRAD(mul) {
 *         th_val x = th__use(b, 0), y = th__use(b, 1);
 *         th_node g = th__node_of(b, b->tangents[0]);
 *         if (th__wants(b, x)) th__give(b, x, TH_APPLY(b, "torch.mul", g, b->call.arg[1]));
 *         ...
 *         return TH_OK;
 *     }
 *
 * A rule emits operations through the catalogue's own meta rules; when one of those declines, the rule as a whole does
 * (b->failed), and the derivative is derived from torch's own autograd instead. A rule may use the operation's
 * arguments and results, and what its forward rule kept, where there is one: else the operation stays as it was.
 */
#ifndef THUNDER_OPS_BACKWARD_H
#define THUNDER_OPS_BACKWARD_H

#include "ops/meta.h"

typedef struct th__emitter { /* appends operations whose types the catalogue knows */
    th_trace *t;
    const th_catalog *catalog;
    th_str file;
    uint32_t line;
    uint8_t marks;
    uint32_t facts; /* TH_FACT_* */
} th__emitter;

/* 0: the catalogue declined, or memory ran out (then the trace's status says so). Nodes of 0 fail too. */
th_val th__emit(th__emitter *e, const char *callee, uint32_t n, const th_node *args);
th_val th__emit_kw(th__emitter *e, const char *callee, uint32_t n, const th_node *args, th_node kwargs);
th_val th__emit_typed(th__emitter *e, const char *callee, th_typeref type, uint32_t n, const th_node *args);
/* Laid out as the result of another operator on the first two arguments: kernels that work element by element. */
th_val th__emit_as(th__emitter *e, const char *callee, uint32_t n, const th_node *args, const char *model);
/* Several results; of a type of 0: None. kwargs: a DICT or 0. */
bool th__emit_many(th__emitter *e, const char *callee, uint32_t n, const th_node *args, th_node kwargs, uint32_t nouts,
                   const th_typeref *types, th_val *outs);
/* In place: the result is `dest` as it is afterwards, first among the arguments. */
th_val th__emit_write(th__emitter *e, const char *callee, uint8_t effects, th_val dest, uint32_t n,
                      const th_node *rest);
th_val th__emit_add(th__emitter *e, th_val a, th_val b);
th_val th__emit_packed(th__emitter *e, th_val v); /* a row-major copy */

enum { TH_MAX_SAVED = 4 };

typedef struct th__backward {
    th__emitter e;
    const th_opdef *def;
    th_call call; /* arguments by parameter */
    const th_op *op;
    uint32_t nouts, nuses, ngrads;
    const th_val *outs, *uses, *tangents; /* tangents: by result; 0: no gradient reaches it */
    const bool *needs;
    uint64_t out_grad; /* bit by result: it requires grad; all, unless the rule says otherwise */
    bool failed;
    /* From the forward rule (th_opdef.forward), which runs first: the results that it made, none where the operation
     * stays, and what it keeps for the derivative. */
    uint32_t nmade;
    th_val made[TH_MAX_SAVED], saved[TH_MAX_SAVED];
    struct {
        th_val of, gradient;
    } grads[TH_MAX_PARAMS];
} th__backward;

/* ---- for rules; a value of 0 makes the rule fail ---- */

th_val th__use(const th__backward *b, uint32_t param);      /* the tensor that the parameter was given; 0: none */
bool th__wants(const th__backward *b, th_val v);            /* does it require grad? */
th_node th__node_of(th__backward *b, th_val v);             /* 0 for 0 */
void th__give(th__backward *b, th_val of, th_val gradient); /* summed up to the shape that was broadcast */
/* An operator of the catalogue on nodes: TH_APPLY(b, "torch.mul", th__node_of(b, g), th__node_of(b, x)). */
#define TH_APPLY(b, callee, ...) \
    th__emit(&(b)->e, callee, sizeof((th_node[]){__VA_ARGS__}) / sizeof(th_node), (th_node[]){__VA_ARGS__})
/* The same contents, row-major, in storage that starts with them. */
th_val th__own_storage(th__backward *b, th_val v);
th_val th__emit_view(th__backward *b, const char *callee, th_typeref type, th_val base, int64_t skip, uint32_t n,
                     const th_node *args);

th_status th__backward_begin(th__backward *b, th_trace *t, const th_catalog *catalog, const th_opdef *def,
                             const th_op *op, uint32_t facts, uint32_t nouts, const th_val *outs, uint32_t nuses,
                             const th_val *uses, const bool *needs);
/* The forward rule, with the operation's own marks: `made` and `saved` stay in the trace. */
th_status th__backward_forward(th__backward *b);
/* Does the rule cover this call? It is run with gradients like the results, and what it emits is taken back. */
th_status th__backward_probe(th__backward *b);
th_status th__backward_run(th__backward *b, const th_val *tangents);

#endif
