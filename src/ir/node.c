/* Argument nodes: leaves and sequences, appended to the trace's pool and never changed in shape.
 *
 * A sequence's kids are older than the sequence, so nodes form no cycle; its depth is bounded by TH_MAX_DEPTH, so every
 * walk may recurse. A node may be used in several places: a pass that changes one place builds a new node.
 */
#include "ir/ir.h"

#include <string.h>

static th_node add(th_trace *t, th_node_data node) {
    if (t->sticky != TH_OK) return 0;
    if (!th__reserve(t->ctx, &t->nodes, &t->cap_nodes, (uint64_t)t->nnodes + 1, sizeof *t->nodes)) {
        th__trace_fail(t, th_ctx_error(t->ctx)->status);
        return 0;
    }
    t->nodes[t->nnodes] = node;
    return t->nnodes++;
}

static th_node add_ref(th_trace *t, th_node_kind kind, uint32_t ref) {
    if (ref == 0) { /* perhaps that of a name for which there was no memory: then that is the error */
        th_status before = th_ctx_error(t->ctx)->status;
        if (t->sticky == TH_OK && before == TH_ENOMEM) th__trace_fail(t, before);
        if (t->sticky == TH_OK) th__trace_fail(t, th_fail(t->ctx, TH_EINVAL, "an argument node refers to nothing"));
        return 0;
    }
    return add(t, (th_node_data){.kind = (uint8_t)kind, .u.ref = ref});
}

/* None and values occur at most operations: one node each serves the whole trace. Looked at before it serves again: a
 * trace that was rewound has other nodes there. */
static bool stands(const th_trace *t, th_node node, th_node_kind kind, uint32_t ref) {
    return node && node < t->nnodes && t->nodes[node].kind == kind && t->nodes[node].u.ref == ref;
}

th_node th_node_none(th_trace *t) {
    if (!stands(t, t->none, TH_N_NONE, 0)) t->none = add(t, (th_node_data){.kind = TH_N_NONE});
    return t->none;
}
th_node th_node_ellipsis(th_trace *t) { return add(t, (th_node_data){.kind = TH_N_ELLIPSIS}); }
th_node th_node_bool(th_trace *t, bool b) { return add(t, (th_node_data){.kind = TH_N_BOOL, .u.i = b}); }
th_node th_node_int(th_trace *t, int64_t i) { return add(t, (th_node_data){.kind = TH_N_INT, .u.i = i}); }
th_node th_node_extent(th_trace *t, int64_t i, uint16_t number) {
    return add(t, (th_node_data){.kind = TH_N_INT, .number = number, .u.i = i});
}
bool th_node_has_extent(const th_trace *t, th_node n) {
    const th_node_data *d = &t->nodes[n];
    if (d->kind < TH_N_TUPLE || d->kind > TH_N_SLICE) return d->number != 0;
    bool found = false;
    for (uint32_t i = 0; i < d->count && !found; i++) found = th_node_has_extent(t, t->kids[d->u.kids + i]);
    return found;
}
th_node th_node_float(th_trace *t, double f) { return add(t, (th_node_data){.kind = TH_N_FLOAT, .u.f = f}); }
th_node th_node_complex(th_trace *t, double re, double im) {
    return add(t, (th_node_data){.kind = TH_N_COMPLEX, .u.f = re, .f2 = im});
}
th_node th_node_str(th_trace *t, th_str s) { return add_ref(t, TH_N_STR, s); }
th_node th_node_dtype(th_trace *t, th_dtype d) { return add_ref(t, TH_N_DTYPE, d); }
th_node th_node_device(th_trace *t, th_dev d) { return add_ref(t, TH_N_DEVICE, d); }
th_node th_node_symbol(th_trace *t, th_str dotted) { return add_ref(t, TH_N_SYMBOL, dotted); }
th_node th_node_value(th_trace *t, th_val v) {
    if (v == 0 || v >= t->nvalues) return add_ref(t, TH_N_VALUE, v);
    if (!stands(t, t->values[v].node, TH_N_VALUE, v)) t->values[v].node = add_ref(t, TH_N_VALUE, v);
    return t->values[v].node;
}
th_node th__node_opaque_entry(th_trace *t, uint32_t index) { return add_ref(t, TH_N_OPAQUE, index); }
th_node th_node_opaque(th_trace *t, const char *hint, void *object) {
    return add_ref(t, TH_N_OPAQUE, th_trace_opaque(t, hint, object));
}

th_node th_node_seq(th_trace *t, th_node_kind kind, uint32_t n, const th_node *kids) {
    uint32_t at = t->nkids, depth = 0;
    for (uint32_t i = 0; i < n && t->sticky == TH_OK; i++) {
        if (kids[i] == 0 || kids[i] >= t->nnodes) {
            th__trace_fail(t, th_fail(t->ctx, TH_EINVAL, "item %u of a sequence node is no node", i));
        } else if (t->nodes[kids[i]].depth >= depth) {
            depth = t->nodes[kids[i]].depth + 1u;
        }
    }
    if (depth > TH_MAX_DEPTH) {
        th__trace_fail(t, th_fail(t->ctx, TH_ELIMIT, "arguments nest deeper than %d levels", TH_MAX_DEPTH));
    }
    if (t->sticky != TH_OK) return 0;
    if (!th__reserve(t->ctx, &t->kids, &t->cap_kids, (uint64_t)at + n, sizeof *t->kids)) {
        th__trace_fail(t, th_ctx_error(t->ctx)->status);
        return 0;
    }
    if (n) memcpy(t->kids + at, kids, n * sizeof *kids);
    t->nkids += n;
    return add(t, (th_node_data){.kind = (uint8_t)kind, .depth = (uint8_t)depth, .count = n, .u.kids = at});
}

static th_node import_seq(th_trace *t, const th_trace *from, const th_node_data *d, const th_val *map) {
    th_node few[16], *kids = few;
    if (d->count > sizeof few / sizeof *few && !(kids = th_ctx_alloc(t->ctx, NULL, d->count * sizeof *kids))) {
        th__trace_fail(t, th_fail(t->ctx, TH_ENOMEM, "out of memory"));
        return 0;
    }
    for (uint32_t i = 0; i < d->count; i++) kids[i] = th_node_import(t, from, from->kids[d->u.kids + i], map);
    th_node result = th_node_seq(t, (th_node_kind)d->kind, d->count, kids);
    if (kids != few) th_ctx_alloc(t->ctx, kids, 0);
    return result;
}

th_node th_node_import(th_trace *t, const th_trace *from, th_node n, const th_val *map) {
    const th_node_data *d = &from->nodes[n];
    if (n == 0) return 0;
    if (d->kind == TH_N_VALUE) return th_node_value(t, map[d->u.ref]);
    if (d->kind >= TH_N_TUPLE && d->kind <= TH_N_SLICE) return import_seq(t, from, d, map);
    if (d->kind == TH_N_OPAQUE) {
        const th_opaque *entry = &from->opaques[d->u.ref];
        return th_node_opaque(t, th_str_get(from->ctx, entry->name), entry->object);
    }
    return add(t, *d);
}
