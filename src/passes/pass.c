/* See pass.h. */
#include "passes/pass.h"

#include "base/text.h"

#include <string.h>

/* ---- fuel ---- */

/* Runs at every rewrite of every compile: no printf. */
bool th_fuel_take(th_fuel *fuel, const char *pass, const char *what) {
    if (!fuel) return true;
    if (fuel->left == 0) return false;
    if (fuel->left > 0) fuel->left--;
    fuel->spent++;
    th__text text = {.data = fuel->last, .cap = sizeof fuel->last};
    th__text_z(&text, pass);
    th__text_z(&text, ": ");
    th__text_bytes(&text, what, strnlen(what, 100));
    return true;
}

/* ---- scratch ---- */

struct th__scratch_block {
    struct th__scratch_block *next;
    uint64_t data[];
};

void *th__scratch_zeroed(th__scratch *s, size_t count, size_t size) {
    size_t bytes = count > 0 ? count * size : size;
    struct th__scratch_block *block = th_ctx_alloc(s->ctx, NULL, sizeof *block + bytes);
    if (!block) {
        th_fail(s->ctx, TH_ENOMEM, "out of memory (%zu bytes)", bytes);
        return NULL;
    }
    block->next = s->blocks;
    s->blocks = block;
    return memset(block->data, 0, bytes);
}

void th__scratch_fini(th__scratch *s) {
    for (struct th__scratch_block *block = s->blocks, *next; block; block = next) {
        next = block->next;
        th_ctx_alloc(s->ctx, block, 0);
    }
    s->blocks = NULL;
}

/* ---- alias groups ---- */

typedef struct marking {
    const th_trace *t;
    uint8_t *flags;
    uint8_t flag;
    bool object;
} marking;

static void find_object(void *user, th_val *value) {
    marking *m = user;
    m->object |= th_type_get(m->t->ctx, m->t->values[*value].type)->kind == TH_TYPE_OBJECT;
}

static void mark(void *user, th_val *value) {
    marking *m = user;
    m->flags[th__group_of(m->t, *value)] |= m->flag;
}

int64_t th__bytes_of(const th_trace *t, th_val v) {
    const th_type *type = th_type_get(t->ctx, t->values[v].type);
    return type->kind == TH_TYPE_TENSOR ? th_type_numel(type) * th_dtype_get((th_dtype)type->dtype)->bytes : 0;
}

uint8_t *th__groups(th_trace *t, th__scratch *s) {
    marking m = {.t = t, .flags = th__scratch_zeroed(s, th__group_count(t), 1), .flag = TH__GROUP_INPUT};
    if (!m.flags) return NULL;
    for (uint32_t i = 0; i < t->ninputs; i++) mark(&m, &t->inputs[i]);
    for (th_opref op = 1; op < t->nops; op++) {
        m.flag = TH__GROUP_WRITTEN;
        for (uint32_t i = 0; i < t->ops[op].nwrites; i++) mark(&m, &t->kids[t->ops[op].writes + i]);
        m.flag = TH__GROUP_ESCAPES;
        m.object = false;
        th_op_each_out(t, op, find_object, &m);
        if (m.object || ((t->ops[op].effects & TH_FX_STATE) && !th__op_only_reads(t, &t->ops[op]))) {
            th_op_each_use(t, op, mark, &m);
            th_op_each_out(t, op, mark, &m);
        }
    }
    m.flag = TH__GROUP_RETURNED;
    th_node_each_value(t, t->result, mark, &m);
    return m.flags;
}

bool th__is_written(const th_trace *t, th_val v, th_opref end) {
    for (th_opref o = 1; o < end; o++)
        for (uint32_t i = 0; i < t->ops[o].nwrites; i++)
            if (th__group_of(t, t->kids[t->ops[o].writes + i]) == th__group_of(t, v)) return true;
    return false;
}

/* ---- rewriting ---- */

th_status th__rewrite_begin(th__rewrite *r, th_trace *t) {
    *r = (th__rewrite){.t = t, .ops = t->ops, .nops = t->nops, .nvalues = t->nvalues, .scratch = {.ctx = t->ctx}};
    r->value = th__scratch_zeroed(&r->scratch, t->nvalues, sizeof *r->value);
    r->node = th__scratch_zeroed(&r->scratch, t->nvalues, sizeof *r->node);
    r->keep_alive = th__scratch_zeroed(&r->scratch, t->nvalues, sizeof *r->keep_alive);
    th_op *fresh = NULL;
    uint32_t cap = 0;
    if (!r->value || !r->node || !r->keep_alive || !th__grow(t->ctx, &fresh, &cap, t->nops, sizeof *fresh)) {
        th__scratch_fini(&r->scratch);
        r->ops = NULL; /* still the trace's */
        return th_ctx_error(t->ctx)->status;
    }
    fresh[0] = (th_op){0};
    t->ops = fresh;
    t->cap_ops = cap;
    t->nops = 1;
    return TH_OK;
}

th_status th__rewrite_end(th__rewrite *r, th_status status) {
    th_trace *t = r->t;
    if (status == TH_OK) {
        if (t->result) t->result = th__rewrite_node(r, t->result);
        status = th_trace_status(t);
    }
    th_ctx_alloc(t->ctx, r->ops, 0);
    th__scratch_fini(&r->scratch);
    return status;
}

static th_val replaced(const th__rewrite *r, th_val v) { return v < r->nvalues && r->value[v] ? r->value[v] : v; }

static th_node rewrite_seq(th__rewrite *r, th_node n) {
    th_trace *t = r->t;
    th_node few[16], *kids = few;
    const th_node_data node = t->nodes[n];
    bool changed = false;
    if (node.count > sizeof few / sizeof *few) {
        kids = th_ctx_alloc(t->ctx, NULL, node.count * sizeof *kids);
        if (!kids) {
            t->sticky = th_fail(t->ctx, TH_ENOMEM, "out of memory");
            return 0;
        }
    }
    for (uint32_t i = 0; i < node.count; i++) {
        th_node kid = t->kids[node.u.kids + i];
        kids[i] = th__rewrite_node(r, kid);
        changed |= kids[i] != kid;
    }
    if (changed) n = th_node_seq(t, (th_node_kind)node.kind, node.count, kids);
    if (kids != few) th_ctx_alloc(t->ctx, kids, 0);
    return n;
}

th_node th__rewrite_node(th__rewrite *r, th_node n) {
    const th_node_data *node = &r->t->nodes[n];
    if (node->kind == TH_N_VALUE) {
        th_val v = node->u.ref;
        if (v < r->nvalues && r->node[v]) return r->node[v];
        return replaced(r, v) == v ? n : th_node_value(r->t, replaced(r, v));
    }
    return node->count ? rewrite_seq(r, n) : n;
}

th_opref th__op_push(th_trace *t, const th_op *op) {
    if (t->sticky != TH_OK) return 0;
    if (!th__reserve(t->ctx, &t->ops, &t->cap_ops, (uint64_t)t->nops + 1, sizeof *t->ops)) {
        t->sticky = th_ctx_error(t->ctx)->status;
        return 0;
    }
    t->ops[t->nops] = *op;
    th__node_define(t, op->outs, t->nops);
    return t->nops++;
}

/* A del keeps the values that are still themselves and may still go here. */
static th_opref copy_del(th__rewrite *r, const th_op *op) {
    th_trace *t = r->t;
    uint32_t count = 0, total = t->nodes[op->args].count;
    th_node *kept = th__scratch_zeroed(&r->scratch, total, sizeof *kept);
    if (!kept) {
        t->sticky = TH_ENOMEM;
        return 0;
    }
    for (uint32_t i = 0; i < total; i++) {
        th_node kid = t->kids[t->nodes[op->args].u.kids + i];
        th_val v = t->nodes[kid].u.ref;
        bool gone = r->value[v] || r->node[v] || r->keep_alive[v];
        if (!gone) kept[count++] = kid;
    }
    if (count == 0) return 0;
    th_op copy = *op;
    if (count < total) copy.args = th_node_seq(t, TH_N_TUPLE, count, kept);
    return th__op_push(t, &copy);
}

th_opref th__rewrite_copy(th__rewrite *r, const th_op *op) {
    th_trace *t = r->t;
    if (op->kind == TH_OP_DEL) return copy_del(r, op);
    th_op copy = *op;
    copy.args = th__rewrite_node(r, op->args);
    copy.kwargs = th__rewrite_node(r, op->kwargs);
    bool writes_change = false;
    for (uint32_t i = 0; i < op->nwrites; i++) {
        writes_change |= replaced(r, t->kids[op->writes + i]) != t->kids[op->writes + i];
    }
    if (writes_change) {
        copy.writes = t->nkids;
        if (!th__reserve(t->ctx, &t->kids, &t->cap_kids, (uint64_t)t->nkids + op->nwrites, sizeof *t->kids)) {
            t->sticky = th_ctx_error(t->ctx)->status;
            return 0;
        }
        for (uint32_t i = 0; i < op->nwrites; i++) t->kids[t->nkids++] = replaced(r, t->kids[op->writes + i]);
    }
    return th__op_push(t, &copy);
}

bool th__op_only_reads(const th_trace *t, const th_op *op) { return th__op_is(t, op, "thunder._kernels.expect"); }

bool th__op_is(const th_trace *t, const th_op *op, const char *dotted) {
    return op->kind == TH_OP_CALL && !op->callee_opaque && strcmp(th_str_get(t->ctx, op->callee), dotted) == 0;
}

bool th__op_named_in_place(const th_trace *t, const th_op *op) {
    if (op->kind != TH_OP_CALL || op->callee_opaque) return false;
    for (const char *part = th_str_get(t->ctx, op->callee), *end; *part; part = *end ? end + 1 : end) {
        end = part + strcspn(part, ".");
        if (end - part > 1 && end[-1] == '_' && end[-2] != '_') return true;
    }
    return false;
}

th_node th__op_arg(const th_trace *t, const th_op *op, uint32_t n, const char *name) {
    const th_node_data *args = &t->nodes[op->args], *kwargs = &t->nodes[op->kwargs];
    if (n < args->count) return t->kids[args->u.kids + n];
    for (uint32_t i = 0; name && i + 1 < kwargs->count; i += 2) {
        const th_node_data *key = &t->nodes[t->kids[kwargs->u.kids + i]];
        if (strcmp(th_str_get(t->ctx, key->u.ref), name) == 0) return t->kids[kwargs->u.kids + i + 1];
    }
    return 0;
}

th_val th__node_as_value(const th_trace *t, th_node n) {
    return t->nodes[n].kind == TH_N_VALUE ? t->nodes[n].u.ref : 0;
}

const char *th__op_label(const th_trace *t, const th_op *op) {
    th_node n = op->outs;
    while (t->nodes[n].kind == TH_N_TUPLE) n = t->kids[t->nodes[n].u.kids];
    if (t->nodes[n].kind == TH_N_VALUE) return th_str_get(t->ctx, t->values[t->nodes[n].u.ref].name);
    return th_str_get(t->ctx, op->callee);
}
