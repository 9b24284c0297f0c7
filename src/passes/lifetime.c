/* Last uses: `del` directly after the last operation that uses a value, so that its memory can go.
 *
 *     t0 = torch.sin(x)
 *     t1 = torch.cos(t0)
 *     del t0
 *     return t1
 *
 * Inputs belong to the caller and what is returned belongs to the result: neither is deleted. Every value holds its own
 * reference, so a base may go before its views. A del that the trace has already is made anew.
 */
#include "passes/pass.h"

typedef struct ends {
    const th_trace *t;
    th_opref *last; /* by th_val: the last operation that defines or uses it; 0 for what must stay */
    th_opref op;
} ends;

static void touch(void *user, th_val *v) {
    ends *e = user;
    e->last[*v] = e->op;
}

static bool holds_memory(const th_trace *t, th_val v) {
    uint8_t kind = th_type_get(t->ctx, t->values[v].type)->kind;
    return kind == TH_TYPE_TENSOR || kind == TH_TYPE_OBJECT;
}

/* Chains of the values that end at each operation: next[v], from first[op]; in order of the value table. */
static void chain(const ends *e, th_val *first, th_val *next) {
    for (th_val v = e->t->nvalues; v-- > 1;) {
        if (!e->last[v] || !holds_memory(e->t, v)) continue;
        next[v] = first[e->last[v]];
        first[e->last[v]] = v;
    }
}

static void push_del(th_trace *t, th_val v, const th_val *next, th__scratch *s) {
    uint32_t count = 0;
    for (th_val w = v; w; w = next[w]) count++;
    th_node few[16], *kids = count <= 16 ? few : th__scratch_zeroed(s, count, sizeof *kids);
    if (!kids) {
        t->sticky = TH_ENOMEM;
        return;
    }
    for (uint32_t i = 0; i < count; i++, v = next[v]) kids[i] = th_node_value(t, v);
    th_trace_op(t, &(th_op_args){.kind = TH_OP_DEL, .args = th_node_seq(t, TH_N_TUPLE, count, kids)});
}

th_status th_pass_lifetime(th_trace *t, th_fuel *fuel) {
    th__scratch s = {.ctx = t->ctx};
    ends e = {.t = t, .last = th__scratch_zeroed(&s, t->nvalues, sizeof *e.last)};
    th_val *next = th__scratch_zeroed(&s, t->nvalues, sizeof *next);
    th_val *first = th__scratch_zeroed(&s, t->nops, sizeof *first);
    th__rewrite r;
    th_status status = e.last && next && first ? TH_OK : th_ctx_error(t->ctx)->status;
    if (status == TH_OK) {
        for (e.op = 1; e.op < t->nops; e.op++) {
            if (t->ops[e.op].kind == TH_OP_DEL) continue;
            th_op_each_use(t, e.op, touch, &e);
            th_op_each_out(t, e.op, touch, &e);
        }
        e.op = 0;
        for (uint32_t i = 0; i < t->ninputs; i++) touch(&e, &t->inputs[i]);
        th_node_each_value(t, t->result, touch, &e);
        chain(&e, first, next);
        status = th__rewrite_begin(&r, t);
    }
    if (status == TH_OK) {
        for (th_opref op = 1; op < r.nops; op++) {
            if (r.ops[op].kind == TH_OP_DEL) continue;
            th__op_push(t, &r.ops[op]);
            if (first[op] && th_fuel_take(fuel, "lifetime", th_str_get(t->ctx, t->values[first[op]].name))) {
                push_del(t, first[op], next, &s);
            }
        }
        status = th__rewrite_end(&r, th_trace_status(t));
    }
    th__scratch_fini(&s);
    return status;
}
