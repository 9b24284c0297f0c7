/* The trace itself: values, operations, opaque entries, copying and walking.
 *
 * Invariants: entry 0 of every table is reserved; an operation's outs are VALUE, a non-empty TUPLE, or 0, and it is a
 * TUPLE exactly when outs_list is set; FX_WRITES is set exactly when there are writes. The trace owns its arrays and
 * one reference to each opaque object. Any function that adds may move the arrays.
 */
#include "ir/ir.h"

#include <string.h>

th_status th__trace_fail(th_trace *t, th_status status) {
    if (t->sticky == TH_OK) t->sticky = status;
    return status;
}

static bool reserve(th_trace *t, void *array, uint32_t *cap, uint64_t need, size_t size) {
    if (th__reserve(t->ctx, array, cap, need, size)) return true;
    th__trace_fail(t, th_ctx_error(t->ctx)->status);
    return false;
}

th_trace *th_trace_new(th_ctx *ctx, const char *name) {
    th_trace *t = th_ctx_alloc(ctx, NULL, sizeof *t);
    if (!t) {
        th_fail(ctx, TH_ENOMEM, "out of memory");
        return NULL;
    }
    *t = (th_trace){.ctx = ctx, .next_alias = 1};
    if (!reserve(t, &t->values, &t->cap_values, 1, sizeof *t->values) ||
        !reserve(t, &t->ops, &t->cap_ops, 1, sizeof *t->ops) ||
        !reserve(t, &t->nodes, &t->cap_nodes, 1, sizeof *t->nodes) ||
        !reserve(t, &t->opaques, &t->cap_opaques, 1, sizeof *t->opaques)) {
        th_trace_free(t);
        return NULL;
    }
    t->values[0] = (th_value){0};
    t->ops[0] = (th_op){0};
    t->nodes[0] = (th_node_data){0};
    t->opaques[0] = (th_opaque){0};
    t->nvalues = t->nops = t->nnodes = t->nopaques = 1;
    t->name = th__name_unique(t, name, strlen(name)); /* not marked: a value may have the function's name */
    if (!t->name) {
        th_trace_free(t);
        return NULL;
    }
    return t;
}

void th_trace_free(th_trace *t) {
    if (!t) return;
    th_ctx *ctx = t->ctx;
    for (uint32_t i = 1; i < t->nopaques; i++) {
        if (t->opaque_vtable.release && t->opaques[i].object) t->opaque_vtable.release(t->opaques[i].object);
    }
    th_ctx_alloc(ctx, t->values, 0);
    th_ctx_alloc(ctx, t->ops, 0);
    th_ctx_alloc(ctx, t->nodes, 0);
    th_ctx_alloc(ctx, t->kids, 0);
    th_ctx_alloc(ctx, t->inputs, 0);
    th_ctx_alloc(ctx, t->opaques, 0);
    th_ctx_alloc(ctx, t->used_names, 0);
    th_ctx_alloc(ctx, t, 0);
}

th_status th_trace_status(const th_trace *t) { return t->sticky; }

th__mark th__trace_mark(const th_trace *t) { return (th__mark){t->nvalues, t->nops, t->nnodes, t->nkids}; }

void th__trace_rewind(th_trace *t, th__mark to) {
    t->nvalues = to.nvalues;
    t->nops = to.nops;
    t->nnodes = to.nnodes;
    t->nkids = to.nkids;
}

static void *copy(th_trace *to, const void *from, uint32_t count, uint32_t *cap, size_t size) {
    if (count == 0) return NULL;
    void *fresh = th_ctx_alloc(to->ctx, NULL, count * size);
    if (!fresh) {
        th__trace_fail(to, th_fail(to->ctx, TH_ENOMEM, "out of memory"));
        return NULL;
    }
    memcpy(fresh, from, count * size);
    *cap = count;
    return fresh;
}

th_status th_trace_clone(const th_trace *t, th_trace **out) {
    *out = NULL;
    th_trace *to = th_ctx_alloc(t->ctx, NULL, sizeof *to);
    if (!to) return th_fail(t->ctx, TH_ENOMEM, "out of memory");
    *to = *t;
    to->cap_values = to->cap_ops = to->cap_nodes = to->cap_kids = 0;
    to->cap_inputs = to->cap_opaques = to->cap_used_names = 0;
    to->values = copy(to, t->values, t->nvalues, &to->cap_values, sizeof *t->values);
    to->ops = copy(to, t->ops, t->nops, &to->cap_ops, sizeof *t->ops);
    to->nodes = copy(to, t->nodes, t->nnodes, &to->cap_nodes, sizeof *t->nodes);
    to->kids = copy(to, t->kids, t->nkids, &to->cap_kids, sizeof *t->kids);
    to->inputs = copy(to, t->inputs, t->ninputs, &to->cap_inputs, sizeof *t->inputs);
    to->opaques = copy(to, t->opaques, t->nopaques, &to->cap_opaques, sizeof *t->opaques);
    to->used_names = copy(to, t->used_names, t->cap_used_names, &to->cap_used_names, sizeof *t->used_names);
    if (to->cap_opaques == 0) to->nopaques = 0; /* nothing was retained */
    for (uint32_t i = 1; i < to->nopaques; i++) {
        if (to->opaque_vtable.retain && to->opaques[i].object) to->opaque_vtable.retain(to->opaques[i].object);
    }
    if (to->sticky != TH_OK) {
        th_status status = to->sticky;
        th_trace_free(to);
        return status;
    }
    *out = to;
    return TH_OK;
}

/* Something that was to be interned is 0: whoever made it recorded why. */
static void missing(th_trace *t) {
    th_status status = th_ctx_error(t->ctx)->status;
    if (t->sticky != TH_OK) return;
    th__trace_fail(t, status != TH_OK ? status : th_fail(t->ctx, TH_EINVAL, "a name, type or callee is missing"));
}

/* ---- values ---- */

th_val th__trace_add_value(th_trace *t, th_str name, th_typeref type) {
    if (!name || !type) {
        missing(t);
        return 0;
    }
    if (!reserve(t, &t->values, &t->cap_values, (uint64_t)t->nvalues + 1, sizeof *t->values)) return 0;
    t->values[t->nvalues] = (th_value){.name = name, .type = type};
    th__name_mark(t, name);
    return t->sticky == TH_OK ? t->nvalues++ : 0;
}

th_val th_trace_value(th_trace *t, th_str name, th_typeref type) {
    if (!name)
        name = th__name_fresh(t);
    else
        name = th__name_unique(t, th_str_get(t->ctx, name), th_str_len(t->ctx, name));
    return th__trace_add_value(t, name, type);
}

th_val th_trace_input(th_trace *t, th_str name, th_typeref type) {
    if (!reserve(t, &t->inputs, &t->cap_inputs, (uint64_t)t->ninputs + 1, sizeof *t->inputs)) return 0;
    th_val value = th_trace_value(t, name, type);
    if (value) t->inputs[t->ninputs++] = value;
    return value;
}

uint32_t th_trace_alias(th_trace *t) { return t->next_alias++; }

/* ---- opaque entries ---- */

void th_trace_set_opaque_vtable(th_trace *t, th_opaque_vtable vtable) { t->opaque_vtable = vtable; }

static bool same_entry(const th_trace *t, const th_opaque *entry, const char *hint, void *object) {
    if (object || entry->object) return entry->object == object;
    return strcmp(th_str_get(t->ctx, entry->name), hint) == 0; /* parsed: the name is all there is */
}

uint32_t th__trace_add_opaque(th_trace *t, th_str name, void *object) {
    if (!name) {
        th__trace_fail(t, th_ctx_error(t->ctx)->status);
        return 0;
    }
    if (!reserve(t, &t->opaques, &t->cap_opaques, (uint64_t)t->nopaques + 1, sizeof *t->opaques)) return 0;
    th__name_mark(t, name);
    if (t->sticky != TH_OK) return 0;
    if (t->opaque_vtable.retain && object) t->opaque_vtable.retain(object);
    t->opaques[t->nopaques] = (th_opaque){name, object};
    return t->nopaques++;
}

uint32_t th_trace_opaque(th_trace *t, const char *hint, void *object) {
    for (uint32_t i = 1; i < t->nopaques; i++) {
        if (same_entry(t, &t->opaques[i], hint, object)) return i;
    }
    return th__trace_add_opaque(t, th__name_unique(t, hint, strlen(hint)), object);
}

/* ---- operations ---- */

void th__node_define(th_trace *t, th_node n, th_opref op) {
    const th_node_data *node = &t->nodes[n];
    if (node->kind == TH_N_VALUE && node->u.ref < t->nvalues) t->values[node->u.ref].def = op;
    if (node->kind != TH_N_TUPLE) return;
    for (uint32_t i = 0; i < node->count; i++) th__node_define(t, t->kids[node->u.kids + i], op);
}

/* The one form of an operation's outs that the text can express. */
static th_node normal_outs(th_trace *t, th_node outs, bool outs_list) {
    uint8_t kind = t->nodes[outs].kind;
    if (kind == TH_N_NONE || (kind == TH_N_TUPLE && t->nodes[outs].count == 0)) return 0;
    if (kind == TH_N_VALUE && outs_list) return th_node_seq(t, TH_N_TUPLE, 1, &outs);
    return outs;
}

th_opref th_trace_op(th_trace *t, const th_op_args *op) {
    th_node outs = normal_outs(t, op->outs, op->outs_list);
    th_node args = op->args ? op->args : th_node_seq(t, TH_N_TUPLE, 0, NULL);
    uint32_t writes = t->nkids;
    if (!reserve(t, &t->kids, &t->cap_kids, (uint64_t)t->nkids + op->nwrites, sizeof *t->kids)) return 0;
    if (!reserve(t, &t->ops, &t->cap_ops, (uint64_t)t->nops + 1, sizeof *t->ops)) return 0;
    if (op->kind == TH_OP_CALL && !op->callee && !op->callee_opaque) {
        missing(t);
    }
    if (t->sticky != TH_OK) return 0;
    if (op->nwrites) memcpy(t->kids + writes, op->writes, op->nwrites * sizeof *t->kids);
    t->nkids += op->nwrites;
    uint8_t effects = op->effects & (TH_FX_RANDOM | TH_FX_STATE);
    t->ops[t->nops] = (th_op){
        .kind = (uint8_t)op->kind,
        .effects = effects | (op->nwrites ? TH_FX_WRITES : 0),
        .marks = op->marks,
        .outs_list = t->nodes[outs].kind == TH_N_TUPLE,
        .callee = op->callee_opaque ? t->opaques[op->callee_opaque].name : op->callee,
        .callee_opaque = op->callee_opaque,
        .args = args,
        .kwargs = t->nodes[op->kwargs].count ? op->kwargs : 0,
        .outs = outs,
        .writes = writes,
        .nwrites = op->nwrites,
        .file = op->file,
        .line = op->line,
    };
    th__node_define(t, outs, t->nops);
    return t->nops++;
}

/* ---- walking ---- */

void th_node_each_value(th_trace *t, th_node n, th_value_fn fn, void *user) {
    if (t->nodes[n].kind == TH_N_VALUE) {
        fn(user, &t->nodes[n].u.ref);
        return;
    }
    for (uint32_t i = 0; i < t->nodes[n].count; i++) th_node_each_value(t, t->kids[t->nodes[n].u.kids + i], fn, user);
}

void th_op_each_use(th_trace *t, th_opref op, th_value_fn fn, void *user) {
    th_node_each_value(t, t->ops[op].args, fn, user);
    th_node_each_value(t, t->ops[op].kwargs, fn, user);
    for (uint32_t i = 0; i < t->ops[op].nwrites; i++) fn(user, &t->kids[t->ops[op].writes + i]);
}

typedef struct use_search {
    th_val value;
    bool found;
} use_search;

static void find_use(void *user, th_val *value) {
    use_search *s = user;
    s->found |= *value == s->value;
}

bool th_op_uses(th_trace *t, th_opref op, th_val value) {
    use_search s = {value, false};
    th_op_each_use(t, op, find_use, &s);
    return s.found;
}

void th_op_each_out(th_trace *t, th_opref op, th_value_fn fn, void *user) {
    th_node_each_value(t, t->ops[op].outs, fn, user);
}
