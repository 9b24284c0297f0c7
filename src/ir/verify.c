/* Well-formedness of a trace: what every pass may rely on, and must leave behind.
 *
 * Checked here, and only here: nodes in range and acyclic; every use after its definition and before its `del`; one
 * definition per value; outs, writes and keyword arguments of the right form; names that the text form can carry.
 * Values that no operation defines and nothing uses may stay in the table (passes leave them behind).
 */
#include "ir/ir.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { UNDEFINED, LIVE, DELETED };

typedef struct verifier {
    const th_trace *t;
    uint8_t *state;  /* by th_val */
    uint64_t *names; /* bit set by th_str */
    th_opref op;     /* being checked; 0 for inputs and the result */
    uint64_t visits, max_visits;
} verifier;

#define BAD(v, ...) bad(v, __VA_ARGS__)

static th_status bad(const verifier *v, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* "operation 3 (torch.add, model.py:12): text" */
static th_status bad(const verifier *v, const char *format, ...) {
    char text[300], file[80] = "";
    const th_trace *t = v->t;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (v->op == 0) return th_fail(t->ctx, TH_EVERIFY, "%s", text);
    const th_op *op = &t->ops[v->op];
    if (op->file) snprintf(file, sizeof file, ", %.60s:%u", th_str_get(t->ctx, op->file), (unsigned)op->line);
    const char *callee = op->kind == TH_OP_DEL ? "del" : th__op_callee(t, op);
    return th_fail(t->ctx, TH_EVERIFY, "operation %u (%.60s%s): %s", (unsigned)v->op, callee, file, text);
}

static const char *value_name(const verifier *v, th_val value) {
    return th_str_get(v->t->ctx, v->t->values[value].name);
}

/* ---- names ---- */

static th_status check_name(verifier *v, th_str name) {
    const char *text = th_str_get(v->t->ctx, name);
    size_t length = th_str_len(v->t->ctx, name);
    if (!th__name_is_identifier(text, length) || th__name_is_reserved(text, length)) {
        return BAD(v, "\"%.100s\" cannot be a name", text);
    }
    if (v->names[name / 64] >> name % 64 & 1) return BAD(v, "two things are named %.100s", text);
    v->names[name / 64] |= UINT64_C(1) << name % 64;
    return TH_OK;
}

static th_status check_dotted(verifier *v, th_str name, const char *what) {
    const char *text = th_str_get(v->t->ctx, name);
    if (th__name_is_dotted(text, th_str_len(v->t->ctx, name))) return TH_OK;
    return BAD(v, "%s \"%.100s\" is not a dotted name", what, text);
}

/* ---- values ---- */

static th_status define(verifier *v, th_val value) {
    const th_trace *t = v->t;
    if (value == 0 || value >= t->nvalues) return BAD(v, "value %u does not exist", (unsigned)value);
    const th_value *data = &t->values[value];
    TRY(check_name(v, data->name));
    if (v->state[value] != UNDEFINED) return BAD(v, "%s is defined twice", value_name(v, value));
    if (data->def != v->op)
        return BAD(v, "%s names operation %u as its own", value_name(v, value), (unsigned)data->def);
    if (th_type_get(t->ctx, data->type)->kind == TH_TYPE_NONE) return BAD(v, "%s has no type", value_name(v, value));
    if (data->alias >= t->next_alias)
        return BAD(v, "%s is in an alias group that was never made", value_name(v, value));
    if (data->offset < 0) return BAD(v, "%s has a negative storage offset", value_name(v, value));
    v->state[value] = LIVE;
    return TH_OK;
}

static th_status use(verifier *v, th_val value) {
    if (value == 0 || value >= v->t->nvalues) return BAD(v, "value %u does not exist", (unsigned)value);
    if (v->state[value] == UNDEFINED) return BAD(v, "%s is used before it is defined", value_name(v, value));
    if (v->state[value] == DELETED) return BAD(v, "%s is used after its del", value_name(v, value));
    return TH_OK;
}

/* ---- nodes ---- */

static th_status check_symbol(verifier *v, th_str name) {
    const char *text = th_str_get(v->t->ctx, name);
    size_t length = th_str_len(v->t->ctx, name);
    TRY(check_dotted(v, name, "symbol"));
    if (strncmp(text, "torch.", 6) == 0 && th_dtype_from_torch(text + 6, length - 6) != TH_DTYPE_NONE) {
        return BAD(v, "%s is an element type, not a symbol", text);
    }
    return TH_OK;
}

static th_status check_node(verifier *v, th_node n);

static th_status check_kids(verifier *v, th_node n) {
    const th_trace *t = v->t;
    const th_node_data *node = &t->nodes[n];
    if (node->count > t->nkids || node->u.kids > t->nkids - node->count) return BAD(v, "node %u: kids out of range", n);
    if (node->kind == TH_N_SLICE && node->count != 3) return BAD(v, "a slice with %u parts", (unsigned)node->count);
    if (node->kind == TH_N_DICT && node->count % 2) return BAD(v, "a dict with a key and no value");
    for (uint32_t i = 0; i < node->count; i++) {
        th_node kid = t->kids[node->u.kids + i];
        if (kid == 0 || kid >= n) return BAD(v, "node %u: kid %u is not older than the node", (unsigned)n, (unsigned)i);
        if (t->nodes[kid].depth >= node->depth) return BAD(v, "node %u: wrong depth", (unsigned)n);
        TRY(check_node(v, kid));
    }
    return TH_OK;
}

static th_status check_node(verifier *v, th_node n) {
    const th_trace *t = v->t;
    if (n == 0 || n >= t->nnodes) return BAD(v, "node %u does not exist", (unsigned)n);
    if (++v->visits > v->max_visits) return BAD(v, "its arguments share nodes too much");
    const th_node_data *node = &t->nodes[n];
    switch ((th_node_kind)node->kind) {
    case TH_N_NONE:
    case TH_N_BOOL:
    case TH_N_INT:
    case TH_N_FLOAT:
    case TH_N_COMPLEX:
    case TH_N_ELLIPSIS: break;
    case TH_N_STR:
        if (node->u.ref >= t->ctx->strings.count) return BAD(v, "node %u: no such string", (unsigned)n);
        break;
    case TH_N_DTYPE:
        if (node->u.ref == 0 || node->u.ref >= TH_DTYPE_COUNT) return BAD(v, "node %u: no such dtype", (unsigned)n);
        break;
    case TH_N_DEVICE:
        if (!th__pool_get(&t->ctx->devices, node->u.ref)) return BAD(v, "node %u: no such device", (unsigned)n);
        break;
    case TH_N_SYMBOL: return check_symbol(v, node->u.ref);
    case TH_N_VALUE: return use(v, node->u.ref);
    case TH_N_OPAQUE:
        if (node->u.ref == 0 || node->u.ref >= t->nopaques) return BAD(v, "node %u: no such opaque entry", (unsigned)n);
        break;
    case TH_N_TUPLE:
    case TH_N_LIST:
    case TH_N_DICT:
    case TH_N_SLICE: return check_kids(v, n);
    default: return BAD(v, "node %u is of no known kind", (unsigned)n);
    }
    return node->count == 0 ? TH_OK : BAD(v, "node %u: a leaf with kids", (unsigned)n);
}

/* ---- operations ---- */

static th_status check_kwargs(verifier *v, th_node kwargs) {
    const th_trace *t = v->t;
    if (kwargs == 0) return TH_OK;
    TRY(check_node(v, kwargs));
    const th_node_data *node = &t->nodes[kwargs];
    if (node->kind != TH_N_DICT || node->count == 0) return BAD(v, "keyword arguments are not a dict with entries");
    for (uint32_t i = 0; i < node->count; i += 2) {
        const th_node_data *key = &t->nodes[t->kids[node->u.kids + i]];
        if (key->kind != TH_N_STR) return BAD(v, "a keyword argument without name");
        for (uint32_t j = 0; j < i; j += 2) {
            if (t->nodes[t->kids[node->u.kids + j]].u.ref == key->u.ref)
                return BAD(v, "a keyword argument given twice");
        }
    }
    return TH_OK;
}

static th_status check_outs(verifier *v, th_node n) {
    const th_trace *t = v->t;
    if (n == 0 || n >= t->nnodes) return BAD(v, "node %u does not exist", (unsigned)n);
    if (++v->visits > v->max_visits) return BAD(v, "its results share nodes too much");
    const th_node_data *node = &t->nodes[n];
    if (node->kind == TH_N_VALUE) return define(v, node->u.ref);
    if (node->kind == TH_N_NONE) return TH_OK;
    if (node->kind != TH_N_TUPLE) return BAD(v, "a result that is neither a value nor a tuple");
    if (node->count > t->nkids || node->u.kids > t->nkids - node->count) return BAD(v, "node %u: kids out of range", n);
    for (uint32_t i = 0; i < node->count; i++) {
        if (t->kids[node->u.kids + i] >= n) return BAD(v, "node %u: a kid is not older than the node", (unsigned)n);
        TRY(check_outs(v, t->kids[node->u.kids + i]));
    }
    return TH_OK;
}

static th_status check_writes(verifier *v, const th_op *op) {
    const th_trace *t = v->t;
    if (((op->effects & TH_FX_WRITES) != 0) != (op->nwrites != 0)) return BAD(v, "its writes do not match its effects");
    if (op->nwrites > t->nkids || op->writes > t->nkids - op->nwrites) return BAD(v, "its writes are out of range");
    for (uint32_t i = 0; i < op->nwrites; i++) {
        th_val value = t->kids[op->writes + i];
        TRY(use(v, value));
        uint8_t kind = th_type_get(t->ctx, t->values[value].type)->kind;
        if (kind != TH_TYPE_TENSOR && kind != TH_TYPE_OBJECT)
            return BAD(v, "writes %s, a number", value_name(v, value));
    }
    return TH_OK;
}

static th_status check_call(verifier *v, const th_op *op) {
    const th_trace *t = v->t;
    const uint8_t known = TH_FX_RANDOM | TH_FX_WRITES | TH_FX_STATE;
    if (op->callee_opaque >= t->nopaques) return BAD(v, "no such opaque entry");
    if (!op->callee_opaque) TRY(check_dotted(v, op->callee, "callee"));
    if (op->effects & ~known) return BAD(v, "unknown effects");
    TRY(check_node(v, op->args));
    TRY(check_kwargs(v, op->kwargs));
    TRY(check_writes(v, op));
    if (op->outs == 0) return op->outs_list ? BAD(v, "a list of no results") : TH_OK;
    TRY(check_outs(v, op->outs));
    const th_node_data *outs = &t->nodes[op->outs];
    if (outs->kind == TH_N_NONE || (outs->kind == TH_N_TUPLE && outs->count == 0))
        return BAD(v, "results that are none");
    return op->outs_list == (outs->kind == TH_N_TUPLE) ? TH_OK : BAD(v, "outs_list does not match the results' form");
}

static th_status check_del(verifier *v, const th_op *op) {
    const th_trace *t = v->t;
    if (op->kwargs || op->outs || op->effects || op->nwrites || op->callee)
        return BAD(v, "a del with more than values");
    TRY(check_node(v, op->args));
    const th_node_data *args = &t->nodes[op->args];
    if (args->count == 0) return BAD(v, "a del of nothing");
    for (uint32_t i = 0; i < args->count; i++) {
        const th_node_data *arg = &t->nodes[t->kids[args->u.kids + i]];
        if (arg->kind != TH_N_VALUE) return BAD(v, "a del of something that is no value");
        TRY(use(v, arg->u.ref)); /* the same value twice */
        v->state[arg->u.ref] = DELETED;
    }
    return TH_OK;
}

static th_status check_op(verifier *v, const th_op *op) {
    if (op->args == 0 || op->args >= v->t->nnodes || v->t->nodes[op->args].kind != TH_N_TUPLE) {
        return BAD(v, "arguments are not a tuple");
    }
    if (op->kind == TH_OP_DEL) return check_del(v, op);
    return op->kind == TH_OP_CALL ? check_call(v, op) : BAD(v, "an operation of no known kind");
}

static th_status check_trace(verifier *v) {
    const th_trace *t = v->t;
    if (t->sticky != TH_OK) return BAD(v, "building it failed: %s", th_status_text(t->sticky));
    const char *name = th_str_get(t->ctx, t->name);
    if (!th__name_is_identifier(name, strlen(name))) return BAD(v, "\"%.100s\" cannot name a function", name);
    for (uint32_t i = 1; i < t->nopaques; i++) TRY(check_name(v, t->opaques[i].name));
    for (uint32_t i = 0; i < t->ninputs; i++) TRY(define(v, t->inputs[i]));
    for (v->op = 1; v->op < t->nops; v->op++) TRY(check_op(v, &t->ops[v->op]));
    v->op = 0;
    return t->result ? check_node(v, t->result) : TH_OK;
}

th_status th_trace_verify(const th_trace *t) {
    uint32_t nstrings = t->ctx->strings.count;
    size_t name_bytes = ((size_t)nstrings / 64 + 1) * sizeof(uint64_t), size = name_bytes + t->nvalues;
    void *memory = th_ctx_alloc(t->ctx, NULL, size);
    if (!memory) return th_fail(t->ctx, TH_ENOMEM, "out of memory");
    memset(memory, 0, size);
    verifier v = {.t = t, .names = memory, .state = (uint8_t *)memory + name_bytes};
    v.max_visits = 64 * (uint64_t)t->nnodes + 1024;
    th_status status = check_trace(&v);
    th_ctx_alloc(t->ctx, memory, 0);
    return status;
}
