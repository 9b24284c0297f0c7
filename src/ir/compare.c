/* Equality and hash of traces: what the text says, without names, notes and source lines.
 *
 * Values correspond by the order in which they are defined, alias groups by the order in which they appear. Strings and
 * types compare by content, so traces of different contexts can be equal. Opaque objects compare by identity; entries
 * without object (parsed ones) by name. Hash and equality see the same things: equal traces have equal hashes.
 */
#include "base/hash.h"
#include "ir/ir.h"

#include <math.h>
#include <string.h>

/* One side of a comparison: numbers for its values and alias groups, in order of appearance. */
typedef struct side {
    const th_trace *t;
    uint32_t *value; /* by th_val; 0 when not defined yet */
    uint32_t *alias; /* by group; 0 when not seen yet */
    uint32_t nvalues, naliases, cap_aliases;
} side;

static bool side_init(side *s, const th_trace *t) {
    *s = (side){.t = t, .cap_aliases = t->next_alias};
    for (uint32_t i = 0; i < t->nvalues; i++) {
        if (t->values[i].alias >= s->cap_aliases) s->cap_aliases = t->values[i].alias + 1;
    }
    size_t count = (size_t)t->nvalues + s->cap_aliases;
    s->value = th_ctx_alloc(t->ctx, NULL, count * sizeof *s->value);
    if (!s->value) {
        th_fail(t->ctx, TH_ENOMEM, "out of memory");
        return false;
    }
    memset(s->value, 0, count * sizeof *s->value);
    s->alias = s->value + t->nvalues;
    return true;
}

static void side_fini(side *s) { th_ctx_alloc(s->t->ctx, s->value, 0); }

static uint32_t alias_number(side *s, uint32_t alias) {
    if (alias && s->alias[alias] == 0) s->alias[alias] = ++s->naliases;
    return s->alias[alias];
}

static bool str_equal(const th_ctx *a, th_str sa, const th_ctx *b, th_str sb) {
    if (a == b) return sa == sb;
    size_t length = th_str_len(a, sa);
    return length == th_str_len(b, sb) && memcmp(th_str_get(a, sa), th_str_get(b, sb), length) == 0;
}

static bool device_equal(const th_ctx *a, th_dev da, const th_ctx *b, th_dev db) {
    if (a == b) return da == db;
    return strcmp(th_device_type(a, da), th_device_type(b, db)) == 0 &&
           th_device_index(a, da) == th_device_index(b, db);
}

static bool type_equal(const th_ctx *a, th_typeref ta, const th_ctx *b, th_typeref tb) {
    if (a == b) return ta == tb;
    const th_type *x = th_type_get(a, ta), *y = th_type_get(b, tb);
    if (x->kind != y->kind || x->dtype != y->dtype || x->flags != y->flags || x->ndim != y->ndim) return false;
    if (!device_equal(a, x->device, b, y->device)) return false;
    size_t dims = x->ndim * sizeof *x->shape;
    return dims == 0 || (memcmp(x->shape, y->shape, dims) == 0 && memcmp(x->stride, y->stride, dims) == 0);
}

static bool opaque_equal(const th_trace *a, uint32_t ia, const th_trace *b, uint32_t ib) {
    const th_opaque *x = &a->opaques[ia], *y = &b->opaques[ib];
    if (x->object || y->object) return x->object == y->object;
    return str_equal(a->ctx, x->name, b->ctx, y->name);
}

static bool float_equal(double x, double y) {
    return (isnan(x) && isnan(y)) || memcmp(&x, &y, sizeof x) == 0; /* tells -0.0 from 0.0 */
}

/* ---- equality ---- */

static bool value_defined_equal(side *a, th_val va, side *b, th_val vb) {
    const th_value *x = &a->t->values[va], *y = &b->t->values[vb];
    if (!type_equal(a->t->ctx, x->type, b->t->ctx, y->type) || x->offset != y->offset) return false;
    a->value[va] = ++a->nvalues;
    b->value[vb] = ++b->nvalues;
    return alias_number(a, x->alias) == alias_number(b, y->alias);
}

bool th__nodes_match(const th__match *m, th_node na, th_node nb) {
    const th_trace *a = m->a, *b = m->b;
    const th_node_data *x = &a->nodes[na], *y = &b->nodes[nb];
    if (x->kind != y->kind || x->count != y->count || x->number != y->number) return false;
    switch ((th_node_kind)x->kind) {
    case TH_N_BOOL:
    case TH_N_INT: return x->u.i == y->u.i;
    case TH_N_COMPLEX: return float_equal(x->u.f, y->u.f) && float_equal(x->f2, y->f2);
    case TH_N_FLOAT: return float_equal(x->u.f, y->u.f);
    case TH_N_STR:
    case TH_N_SYMBOL: return str_equal(a->ctx, x->u.ref, b->ctx, y->u.ref);
    case TH_N_DTYPE: return x->u.ref == y->u.ref;
    case TH_N_DEVICE: return device_equal(a->ctx, x->u.ref, b->ctx, y->u.ref);
    case TH_N_OPAQUE: return opaque_equal(a, x->u.ref, b, y->u.ref);
    case TH_N_VALUE: return m->value(m->user, x->u.ref, y->u.ref);
    default: break;
    }
    for (uint32_t i = 0; i < x->count; i++) {
        if (!th__nodes_match(m, a->kids[x->u.kids + i], b->kids[y->u.kids + i])) return false;
    }
    return true;
}

bool th__callees_match(const th__match *m, const th_op *x, const th_op *y) {
    if ((x->callee_opaque != 0) != (y->callee_opaque != 0)) return false;
    return x->callee_opaque ? opaque_equal(m->a, x->callee_opaque, m->b, y->callee_opaque)
                            : str_equal(m->a->ctx, x->callee, m->b->ctx, y->callee);
}

typedef struct sides {
    side *a, *b;
} sides;

static bool value_used_equal(void *user, th_val va, th_val vb) {
    const sides *s = user;
    return s->a->value[va] == s->b->value[vb];
}

static bool value_made_equal(void *user, th_val va, th_val vb) {
    const sides *s = user;
    return value_defined_equal(s->a, va, s->b, vb);
}

static bool op_equal(side *a, const th_op *x, side *b, const th_op *y) {
    sides both = {a, b};
    const th__match used = {a->t, b->t, value_used_equal, &both}, made = {a->t, b->t, value_made_equal, &both};
    if (x->kind != y->kind || x->effects != y->effects || x->marks != y->marks || x->nwrites != y->nwrites)
        return false;
    if (!th__callees_match(&used, x, y) || !th__nodes_match(&used, x->args, y->args) ||
        !th__nodes_match(&used, x->kwargs, y->kwargs))
        return false;
    for (uint32_t i = 0; i < x->nwrites; i++) {
        if (a->value[a->t->kids[x->writes + i]] != b->value[b->t->kids[y->writes + i]]) return false;
    }
    return th__nodes_match(&made, x->outs, y->outs);
}

/* 0 and None both mean that nothing is returned. */
static bool returns_nothing(const th_trace *t) { return t->result == 0 || t->nodes[t->result].kind == TH_N_NONE; }

static bool sides_equal(side *a, side *b) {
    if (a->t->ninputs != b->t->ninputs || a->t->nops != b->t->nops) return false;
    for (uint32_t i = 0; i < a->t->ninputs; i++) {
        if (!value_defined_equal(a, a->t->inputs[i], b, b->t->inputs[i])) return false;
    }
    for (th_opref op = 1; op < a->t->nops; op++) {
        if (!op_equal(a, &a->t->ops[op], b, &b->t->ops[op])) return false;
    }
    if (returns_nothing(a->t) || returns_nothing(b->t)) return returns_nothing(a->t) == returns_nothing(b->t);
    sides both = {a, b};
    return th__nodes_match(&(th__match){a->t, b->t, value_used_equal, &both}, a->t->result, b->t->result);
}

bool th_trace_equal(const th_trace *a, const th_trace *b) {
    side x, y;
    if (!side_init(&x, a)) return false;
    bool same = side_init(&y, b);
    if (same) {
        same = sides_equal(&x, &y);
        side_fini(&y);
    }
    side_fini(&x);
    return same;
}

/* ---- hash ---- */

static uint64_t hash_float(uint64_t hash, double f) {
    uint64_t bits = 0;
    if (!isnan(f)) memcpy(&bits, &f, sizeof bits);
    return th__hash_mix(hash, isnan(f) ? 1 : bits);
}

static uint64_t hash_opaque(const th_trace *t, uint32_t i) {
    const th_opaque *entry = &t->opaques[i];
    return entry->object ? (uint64_t)(uintptr_t)entry->object : th__str_hash(t->ctx, entry->name);
}

static uint64_t hash_defined(uint64_t hash, side *s, th_val v) {
    const th_value *value = &s->t->values[v];
    s->value[v] = ++s->nvalues;
    hash = th__hash_mix(hash, th__type_hash(s->t->ctx, value->type));
    return th__hash_mix(th__hash_mix(hash, alias_number(s, value->alias)), (uint64_t)value->offset);
}

static uint64_t hash_node(uint64_t hash, side *s, th_node n, bool defining) {
    const th_node_data *node = &s->t->nodes[n];
    hash = th__hash_mix(hash, (uint64_t)node->kind << 32 | node->count);
    switch ((th_node_kind)node->kind) {
    case TH_N_BOOL:
    case TH_N_INT: return th__hash_mix(th__hash_mix(hash, (uint64_t)node->u.i), node->number);
    case TH_N_FLOAT: return hash_float(hash, node->u.f);
    case TH_N_COMPLEX: return hash_float(hash_float(hash, node->u.f), node->f2);
    case TH_N_STR:
    case TH_N_SYMBOL: return th__hash_mix(hash, th__str_hash(s->t->ctx, node->u.ref));
    case TH_N_DTYPE: return th__hash_mix(hash, node->u.ref);
    case TH_N_DEVICE: return th__hash_mix(hash, th__device_hash(s->t->ctx, node->u.ref));
    case TH_N_OPAQUE: return th__hash_mix(hash, hash_opaque(s->t, node->u.ref));
    case TH_N_VALUE:
        if (defining) return hash_defined(hash, s, node->u.ref);
        return th__hash_mix(hash, s->value[node->u.ref]);
    default: break;
    }
    for (uint32_t i = 0; i < node->count; i++) hash = hash_node(hash, s, s->t->kids[node->u.kids + i], defining);
    return hash;
}

static uint64_t hash_op(uint64_t hash, side *s, const th_op *op) {
    hash = th__hash_mix(hash, (uint64_t)op->kind << 16 | (uint64_t)op->marks << 8 | op->effects);
    hash = th__hash_mix(hash,
                        op->callee_opaque ? hash_opaque(s->t, op->callee_opaque) : th__str_hash(s->t->ctx, op->callee));
    hash = hash_node(hash, s, op->args, false);
    hash = hash_node(hash, s, op->kwargs, false);
    for (uint32_t i = 0; i < op->nwrites; i++) hash = th__hash_mix(hash, s->value[s->t->kids[op->writes + i]]);
    return hash_node(hash, s, op->outs, true);
}

uint64_t th_trace_hash(const th_trace *t) {
    side s;
    uint64_t hash = th__hash_mix(1, t->ninputs);
    if (!side_init(&s, t)) return 0; /* a hash of its own for "unknown": the caller compares anyway */
    for (uint32_t i = 0; i < t->ninputs; i++) hash = hash_defined(hash, &s, t->inputs[i]);
    for (th_opref op = 1; op < t->nops; op++) hash = hash_op(hash, &s, &t->ops[op]);
    hash = returns_nothing(t) ? th__hash_mix(hash, 0) : hash_node(hash, &s, t->result, false);
    side_fini(&s);
    return hash;
}
