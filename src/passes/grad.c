/* Joins a program with its derivative: see thunder/grad.h.
 *
 * Forwards, each operation that takes part is replaced by what its rule makes of it, or stays when its catalogue rule
 * works on it as it is. Then, from the last operation to the first, the gradients of its results become gradients of
 * what it used; gradients that meet are added. Which values take part is decided here, from the inputs that require
 * grad, the marks of operations (no_grad) and what rules say of their results: the `grad` flag of other values' types
 * is what the user's code was told, and is not looked at.
 *
 * Writes: functionalisation has left write-backs of inputs at the end. One that takes part in autograd becomes a result
 * (`mutated`); any other write of something that takes part cannot be differentiated.
 */
#include "thunder/grad.h"

#include "ir/ir.h"
#include "ops/backward.h"
#include "passes/pass.h"
#include "passes/tie.h"

#include <string.h>

typedef struct tied { /* code of the user that gets the gradient of a value: tie.h */
    struct tied *next;
    th__tie tie;
    th_val value;
    th_op site;
} tied;

typedef struct record {  /* of an operation that takes part */
    th__backward *own;   /* its catalogue rule applies */
    const th_rule *rule; /* or this one */
    th_op op;            /* with its arguments as they are in the joint trace */
    th_val *uses, *outs; /* joint values; outs as the rule's forward part made them */
    th_val *recorded;    /* the results as op.outs has them */
    bool *needs;
    uint32_t nuses, nouts;
    th_val *map;     /* by value of the rule's trace: joint value */
    uint32_t *alias; /* by alias group of the rule's trace: the joint one */
    bool *forward;   /* by operation of the rule's trace: spliced already */
    tied *ties;      /* of its results, in the order in which they were made */
    th_node module;  /* or it is the border of a module with hooks: the node of torch's that it stands for */
} record;

typedef struct joiner {
    th_trace *t;
    th__rewrite r;
    th__scratch scratch;
    th_catalog *catalog;
    th_grad_options options;
    bool *grad;       /* by joint value: requires grad */
    th_val *tangent;  /* by joint value: its gradient so far */
    uint32_t cap;     /* of both */
    record **records; /* by old operation */
    th_joint *joint;
    bool *used;    /* by value of the program: something uses it, so that it may get a gradient */
    bool *written; /* by input: a write-back of it takes part */
    tied **kept;   /* by entry of joint->kept */
} joiner;

/* ---- values ---- */

static bool requires_grad(const joiner *j, th_val v) { return v < j->cap && j->grad[v]; }

static th_status reserve_values(joiner *j) {
    uint32_t need = j->t->nvalues;
    if (need <= j->cap) return TH_OK;
    need += need / 2;
    bool *grad = th__scratch_zeroed(&j->scratch, need, sizeof *grad);
    th_val *tangent = th__scratch_zeroed(&j->scratch, need, sizeof *tangent);
    if (!grad || !tangent) return TH_ENOMEM;
    if (j->cap) {
        memcpy(grad, j->grad, j->cap * sizeof *grad);
        memcpy(tangent, j->tangent, j->cap * sizeof *tangent);
    }
    j->grad = grad;
    j->tangent = tangent;
    j->cap = need;
    return TH_OK;
}

typedef struct collect {
    th_val *items;
    uint32_t count;
    bool unique;
} collect;

static void count_value(void *user, th_val *v) {
    (void)v;
    ++*(uint32_t *)user;
}

static void collect_value(void *user, th_val *v) {
    collect *c = user;
    for (uint32_t i = 0; c->unique && i < c->count; i++)
        if (c->items[i] == *v) return;
    c->items[c->count++] = *v;
}

static th_val *values_of(joiner *j, th_node a, th_node b, bool unique, uint32_t *count) {
    uint32_t total = 0;
    th_node_each_value(j->t, a, count_value, &total);
    th_node_each_value(j->t, b, count_value, &total);
    collect c = {th__scratch_zeroed(&j->scratch, total, sizeof *c.items), 0, unique};
    if (c.items) {
        th_node_each_value(j->t, a, collect_value, &c);
        th_node_each_value(j->t, b, collect_value, &c);
    }
    *count = c.count;
    return c.items;
}

static void note_used(void *user, th_val *v) { ((joiner *)user)->used[*v] = true; }

static void find_used(joiner *j) {
    for (th_opref o = 1; o < j->t->nops; o++) th_op_each_use(j->t, o, note_used, j);
    th_node_each_value(j->t, j->t->result, note_used, j);
}

static bool may_require_grad(const joiner *j, th_val v) {
    const th_type *type = th_type_get(j->t->ctx, j->t->values[v].type);
    char class_ = type->kind == TH_TYPE_TENSOR ? th_dtype_get((th_dtype)type->dtype)->class_ : 0;
    return class_ == 'f' || class_ == 'c';
}

static th_status declined(joiner *j, const th_op *op, const char *why) {
    const char *file = op->file ? th_str_get(j->t->ctx, op->file) : "?";
    th_fail(j->t->ctx, TH_DECLINED, "%s (%s, line %u): %s", th__op_callee(j->t, op), file, op->line, why);
    return TH_DECLINED;
}

/* Strides that a gradient is asked to come in: the result's own where no two elements share a place. */
static th_typeref tangent_type(joiner *j, th_val v) {
    th_typeref ref = th_type_set_grad(j->t->ctx, j->t->values[v].type, false);
    const th_type *type = th_type_get(j->t->ctx, ref);
    if (th__is_dense(type->ndim, type->shape, type->stride)) return ref;
    return th_type_tensor(j->t->ctx, (th_dtype)type->dtype, type->device, type->ndim, type->shape, NULL, 0);
}

/* ---- splicing a rule ---- */

typedef struct reach {
    const th_trace *t;
    bool *value;
    bool hit;
} reach;

static void reach_test(void *user, th_val *v) {
    reach *r = user;
    r->hit |= r->value[*v];
}
static void reach_set(void *user, th_val *v) { ((reach *)user)->value[*v] = true; }

/* Which operations of a rule belong to its forward part: needed for the results, or with effects before the
 * backward ran. */
static th_status find_forward(joiner *j, const th_rule *rule, bool *forward) {
    th_trace *t = rule->trace;
    reach late = {t, th__scratch_zeroed(&j->scratch, t->nvalues, sizeof(bool)), false};
    reach used = {t, th__scratch_zeroed(&j->scratch, t->nvalues, sizeof(bool)), false};
    bool *depends = th__scratch_zeroed(&j->scratch, t->nops, sizeof *depends);
    if (!late.value || !used.value || !depends) return TH_ENOMEM;
    for (uint32_t i = rule->nuses; i < t->ninputs; i++) late.value[t->inputs[i]] = true;
    for (th_opref o = 1; o < t->nops; o++) {
        late.hit = false;
        th_op_each_use(t, o, reach_test, &late);
        depends[o] = late.hit;
        if (late.hit) th_op_each_out(t, o, reach_set, &late);
    }
    const th_node_data *result = &t->nodes[t->result];
    for (uint32_t i = 0; i < rule->nouts; i++) th_node_each_value(t, t->kids[result->u.kids + i], reach_set, &used);
    for (th_opref o = t->nops; o-- > 1;) {
        used.hit = t->ops[o].effects != 0 && !(t->ops[o].marks & TH_MARK_LATE);
        th_op_each_out(t, o, reach_test, &used);
        forward[o] = used.hit && !depends[o] && t->ops[o].kind == TH_OP_CALL;
        if (forward[o]) th_op_each_use(t, o, reach_set, &used);
    }
    return TH_OK;
}

static void splice_out(joiner *j, record *rec, const th_trace *from, th_val v) {
    th_trace *t = j->t;
    const th_value *value = &from->values[v];
    th_val made = rec->map[v] = th_trace_value(t, 0, th_type_set_grad(t->ctx, value->type, false));
    if (!made || !value->alias) return;
    uint32_t *alias = &rec->alias[value->alias];
    int64_t shift = 0;
    for (uint32_t i = 0; i < from->ninputs; i++) { /* a view of an input counts from where the input starts */
        const th_value *input = &from->values[from->inputs[i]];
        th_val is = rec->map[from->inputs[i]];
        if (input->alias != value->alias || !is) continue;
        if (!t->values[is].alias) t->values[is].alias = th_trace_alias(t);
        *alias = t->values[is].alias;
        shift = t->values[is].offset - input->offset;
        break;
    }
    if (!*alias) *alias = th_trace_alias(t);
    t->values[made].alias = *alias;
    t->values[made].offset = value->offset + shift > 0 ? value->offset + shift : 0;
}

static bool is_detach(const th_trace *t, const th_op *op) {
    return th__op_is(t, op, "torch.ops.aten.detach.default") && t->nodes[op->outs].kind == TH_N_VALUE;
}

static void splice_op(joiner *j, record *rec, const th_trace *from, th_opref o) {
    th_trace *t = j->t;
    const th_op *op = &from->ops[o];
    if (is_detach(from, op)) { /* inside a rule nobody can tell the two tensors apart */
        rec->map[from->nodes[op->outs].u.ref] = rec->map[th__node_as_value(from, th__op_arg(from, op, 0, NULL))];
        return;
    }
    collect outs = {th__scratch_zeroed(&j->scratch, from->nvalues, sizeof(th_val)), 0, false};
    th_val *writes = th__scratch_zeroed(&j->scratch, op->nwrites, sizeof *writes);
    if (!outs.items || !writes) {
        t->sticky = TH_ENOMEM;
        return;
    }
    th_op_each_out((th_trace *)from, o, collect_value, &outs);
    for (uint32_t i = 0; i < outs.count; i++) splice_out(j, rec, from, outs.items[i]);
    for (uint32_t i = 0; i < op->nwrites; i++) writes[i] = rec->map[from->kids[op->writes + i]];
    th_op_args args = {.kind = TH_OP_CALL,
                       .callee = op->callee,
                       .args = th_node_import(t, from, op->args, rec->map),
                       .kwargs = th_node_import(t, from, op->kwargs, rec->map),
                       .outs = th_node_import(t, from, op->outs, rec->map),
                       .outs_list = op->outs_list,
                       .effects = op->effects,
                       .marks = rec->op.marks | (op->effects ? op->marks & TH_MARK_LATE : 0),
                       .nwrites = op->nwrites,
                       .writes = writes,
                       .file = rec->op.file,
                       .line = rec->op.line};
    if (op->callee_opaque)
        args.callee_opaque = th_trace_opaque(t, th_str_get(t->ctx, from->opaques[op->callee_opaque].name),
                                             from->opaques[op->callee_opaque].object);
    th_trace_op(t, &args);
}

static th_status begin_map(joiner *j, record *rec, const th_rule *rule) {
    rec->rule = rule;
    rec->map = th__scratch_zeroed(&j->scratch, rule->trace->nvalues, sizeof *rec->map);
    rec->alias = th__scratch_zeroed(&j->scratch, rule->trace->next_alias + 1, sizeof *rec->alias);
    rec->forward = th__scratch_zeroed(&j->scratch, rule->trace->nops, sizeof *rec->forward);
    if (!rec->map || !rec->alias || !rec->forward) return TH_ENOMEM;
    for (uint32_t i = 0; i < rec->nuses; i++) rec->map[rule->trace->inputs[i]] = rec->uses[i];
    return find_forward(j, rule, rec->forward);
}

static th_node rule_result(const th_rule *rule, uint32_t i) {
    return rule->trace->kids[rule->trace->nodes[rule->trace->result].u.kids + i];
}

static bool same_layout(const th_ctx *ctx, th_typeref a, th_typeref b) {
    const th_type *x = th_type_get(ctx, a), *y = th_type_get(ctx, b);
    if (x->kind != y->kind || x->dtype != y->dtype || x->device != y->device || x->ndim != y->ndim) return false;
    bool same = true, empty = th_type_numel(x) == 0;
    for (uint32_t i = 0; i < x->ndim; i++)
        same &= x->shape[i] == y->shape[i] && (empty || x->shape[i] == 1 || x->stride[i] == y->stride[i]);
    return same;
}

/* Dimensions from the largest stride to the smallest; false: the elements leave gaps, or share places. */
static bool stride_order(const th_type *type, uint32_t *order) {
    if (type->ndim > TH_MAX_RANK || !th__is_dense(type->ndim, type->shape, type->stride)) return false;
    for (uint32_t i = 0; i < type->ndim; i++) {
        uint32_t at = i;
        for (; at && type->stride[order[at - 1]] < type->stride[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    return true;
}

/* A copy in the order of `want`, which is dense: packed with its dimensions in that order, then seen as it was. */
static th_val emit_ordered(joiner *j, const record *rec, th_val v, th_typeref want) {
    th_trace *t = j->t;
    uint32_t order[TH_MAX_RANK];
    const th_type *type = th_type_get(t->ctx, want);
    if (!stride_order(type, order)) return 0;
    th__emitter e = {t, j->catalog, rec->op.file, rec->op.line, rec->op.marks, j->options.facts};
    th_node there[TH_MAX_RANK], back[TH_MAX_RANK];
    for (uint32_t i = 0; i < type->ndim; i++) {
        there[i] = th_node_int(t, order[i]);
        back[order[i]] = th_node_int(t, i);
    }
    th_node args[] = {th_node_value(t, v), th_node_seq(t, TH_N_TUPLE, type->ndim, there)};
    th_val turned = th__emit(&e, "torch.permute", 2, args), packed = turned ? th__emit_packed(&e, turned) : 0;
    if (!packed) return 0;
    th_node again[] = {th_node_value(t, packed), th_node_seq(t, TH_N_TUPLE, type->ndim, back)};
    th_val out = th__emit(&e, "torch.permute", 2, again);
    return out && same_layout(t->ctx, t->values[out].type, want) ? out : 0;
}

/* The operation's results in the joint trace: what the rule's forward part made, in the layout that was recorded. */
static th_val settle_out(joiner *j, const record *rec, th_val old, th_val made) {
    th_trace *t = j->t;
    th_typeref was = t->values[old].type;
    if (same_layout(t->ctx, was, t->values[made].type)) return made;
    th__emitter e = {t, j->catalog, rec->op.file, rec->op.line, 0, j->options.facts};
    if (th_type_get(t->ctx, was)->contiguous) return th__emit_packed(&e, made);
    return emit_ordered(j, rec, made, was);
}

static th_status splice_forward(joiner *j, record *rec, const th_op *old, const th_val *old_outs) {
    th_trace *from = rec->rule->trace;
    for (th_opref o = 1; o < from->nops; o++)
        if (rec->forward[o]) splice_op(j, rec, from, o);
    for (uint32_t i = 0; i < rec->nouts; i++) {
        th_val made = th__node_as_value(from, rule_result(rec->rule, i));
        made = made ? rec->map[made] : 0;
        if (made) made = settle_out(j, rec, old_outs[i], made);
        if (!made)
            return th_trace_status(j->t) ? th_trace_status(j->t) : declined(j, old, "its rule has another layout");
        rec->outs[i] = made;
        j->r.value[old_outs[i]] = made;
    }
    TRY(reserve_values(j));
    for (uint32_t i = 0; i < rec->nouts; i++)
        if (rec->rule->out_grad >> i & 1) j->grad[rec->outs[i]] = true;
    return th_trace_status(j->t);
}

/* ---- forwards ---- */

static th_status ask(joiner *j, record *rec, const th_typeref *tangents, const th_rule **rule) {
    const th_rule_request request = {j->t,       &rec->op,   rec->nuses,    rec->uses,
                                     rec->needs, rec->nouts, rec->recorded, tangents};
    th_status status = j->options.rules(j->options.user, &request, rule);
    if (status != TH_OK) return status;
    if ((*rule)->nuses != rec->nuses || (*rule)->nouts != rec->nouts || rec->nouts > 64)
        return th_fail(j->t->ctx, TH_EINTERNAL, "a rule for %s has another signature", th__op_callee(j->t, &rec->op));
    return TH_OK;
}

/* By the catalogue's rule. TH_DECLINED: the trace is as it was. */
static th_status take_by_catalogue(joiner *j, const th_opdef *def, record *rec, const th_val *old_outs) {
    th_trace *t = j->t;
    th__mark start = th__trace_mark(t);
    th__backward *own = rec->own = th__scratch_zeroed(&j->scratch, 1, sizeof *own);
    if (!own) return TH_ENOMEM;
    memcpy(rec->outs, old_outs, rec->nouts * sizeof *old_outs);
    th_status status = th__backward_begin(own, t, j->catalog, def, &rec->op, j->options.facts, rec->nouts, rec->outs,
                                          rec->nuses, rec->uses, rec->needs);
    if (status == TH_OK && def->forward) status = th__backward_forward(own);
    if (status == TH_OK && !own->nmade) {
        if (rec->op.effects) status = TH_DECLINED;
        if (status == TH_OK && !th__op_push(t, &rec->op)) return th_trace_status(t);
    }
    if (status == TH_OK) status = th__backward_probe(own);
    TRY(reserve_values(j));
    if (status == TH_DECLINED) {
        rec->own = NULL;
        th__trace_rewind(t, start);
    }
    TRY(status);
    for (uint32_t i = 0; i < rec->nouts; i++) {
        if (own->nmade) rec->outs[i] = j->r.value[old_outs[i]] = own->made[i];
        j->grad[rec->outs[i]] = may_require_grad(j, rec->outs[i]) && own->out_grad >> i & 1;
    }
    j->joint->ncatalogue++;
    return TH_OK;
}

static bool any_may_require_grad(const joiner *j, const th_val *values, uint32_t n) {
    bool any = false;
    for (uint32_t i = 0; i < n; i++) any |= may_require_grad(j, values[i]);
    return any;
}

static void note_derived(joiner *j, const th_op *op) {
    th_joint *joint = j->joint;
    th_str *more = th_ctx_alloc(j->t->ctx, joint->derived, (joint->nderived + 1) * sizeof *more);
    if (!more) return; /* statistics */
    joint->derived = more;
    joint->derived[joint->nderived++] = th_intern_z(j->t->ctx, th__op_callee(j->t, op));
}

static th_status take_part(joiner *j, th_opref at, record *rec) {
    const th_op *old = &j->r.ops[at];
    uint32_t nouts = 0;
    th_val *old_outs = values_of(j, old->outs, 0, false, &nouts);
    rec->outs = th__scratch_zeroed(&j->scratch, nouts, sizeof *rec->outs);
    rec->needs = th__scratch_zeroed(&j->scratch, rec->nuses, sizeof *rec->needs);
    if (!old_outs || !rec->outs || !rec->needs) return TH_ENOMEM;
    rec->nouts = nouts;
    rec->recorded = old_outs;
    for (uint32_t i = 0; i < rec->nuses; i++) rec->needs[i] = requires_grad(j, rec->uses[i]);
    if (!old->effects && !any_may_require_grad(j, old_outs, nouts)) { /* comparisons, argmax */
        th__op_push(j->t, &rec->op);
        return th_trace_status(j->t);
    }
    bool named = !old->callee_opaque && !j->options.derived_only;
    const th_opdef *def = named ? th_catalog_find(j->catalog, old->callee) : NULL;
    if (def && def->grad && (!old->effects || (def->forward && old->effects == TH_FX_RANDOM))) {
        th_status status = take_by_catalogue(j, def, rec, old_outs);
        if (status == TH_OK) j->records[at] = rec;
        if (status != TH_DECLINED) return status;
    }
    note_derived(j, &rec->op);
    th_typeref *tangents = th__scratch_zeroed(&j->scratch, nouts, sizeof *tangents);
    if (!tangents) return TH_ENOMEM;
    for (uint32_t i = 0; i < nouts; i++)
        tangents[i] = j->used[old_outs[i]] && may_require_grad(j, old_outs[i]) ? tangent_type(j, old_outs[i]) : 0;
    const th_rule *rule = NULL;
    TRY(ask(j, rec, tangents, &rule));
    if (!rule->out_grad) { /* detach, argmax: nothing of it is differentiable */
        th__op_push(j->t, &rec->op);
        return th_trace_status(j->t);
    }
    j->records[at] = rec;
    TRY(begin_map(j, rec, rule));
    return splice_forward(j, rec, old, old_outs);
}

static bool any_requires_grad(const joiner *j, const th_val *values, uint32_t n) {
    bool any = false;
    for (uint32_t i = 0; i < n; i++) any |= requires_grad(j, values[i]);
    return any;
}

static uint32_t input_index(const th_trace *t, th_val v) {
    for (uint32_t i = 0; i < t->ninputs; i++)
        if (t->inputs[i] == v) return i;
    return UINT32_MAX;
}

typedef struct search {
    const th_trace *t;
    uint32_t group;
    bool found;
} search;

static void find_group(void *user, th_val *v) {
    search *s = user;
    s->found |= th__group_of(s->t, *v) == s->group;
}

/* Does an operation after `at` use a member of the value's group? */
static bool used_later(const joiner *j, th_opref at, th_val v) {
    search s = {j->t, th__group_of(j->t, v), false};
    for (th_opref o = at + 1; o < j->r.nops; o++) {
        if (j->r.ops[o].kind == TH_OP_DEL) continue;
        th_node_each_value(j->t, j->r.ops[o].args, find_group, &s);
        th_node_each_value(j->t, j->r.ops[o].kwargs, find_group, &s);
    }
    return s.found;
}

static bool writes_what_has_grad(const joiner *j, const th_op *op) {
    for (uint32_t i = 0; i < op->nwrites; i++) {
        th_val v = j->t->kids[op->writes + i];
        if (requires_grad(j, v < j->r.nvalues && j->r.value[v] ? j->r.value[v] : v)) return true;
    }
    return false;
}

typedef struct written {
    const th_trace *t;
    const th_op *op;
    bool own; /* some result is a tensor apart from what is written */
} written;

static void find_own_result(void *user, th_val *v) {
    written *w = user;
    bool own = true;
    for (uint32_t i = 0; i < w->op->nwrites; i++)
        own &= th__group_of(w->t, *v) != th__group_of(w->t, w->t->kids[w->op->writes + i]);
    w->own |= own;
}

/* Statistics that an operation updates beside what it computes: batch norm's. They take no part in its derivative. */
static bool writes_statistics(const joiner *j, th_opref at, const th_op *op) {
    written w = {j->t, &j->r.ops[at], false};
    th_node_each_value(j->t, w.op->outs, find_own_result, &w);
    return w.own && !writes_what_has_grad(j, op);
}

/* Does the operation write memory that two inputs share, or part of an input, which is used again by another name? */
static bool writes_shared_input(const joiner *j, th_opref at) {
    const th_trace *t = j->t;
    const th_op *op = &j->r.ops[at];
    for (uint32_t i = 0; i < op->nwrites; i++) {
        th_val v = t->kids[op->writes + i];
        uint32_t inputs = 0;
        for (uint32_t k = 0; k < t->ninputs; k++) inputs += th__group_of(t, t->inputs[k]) == th__group_of(t, v);
        bool whole = inputs == 1 && input_index(t, v) != UINT32_MAX;
        if (inputs && !whole && used_later(j, at, v)) return true;
    }
    return false;
}

/* A write: inside the forward trace when autograd has no part in it, after the call when it has. */
static th_status join_write(joiner *j, th_opref at, record *rec) {
    const th_op *old = &j->r.ops[at];
    th_val dest = th__node_as_value(j->t, th__op_arg(j->t, &rec->op, 0, NULL));
    uint32_t input = input_index(j->t, dest);
    bool part = any_requires_grad(j, rec->uses, rec->nuses) && !(old->marks & TH_MARK_NO_GRAD);
    bool copy = th__op_is(j->t, old, "torch.Tensor.copy_");
    if (!part && writes_shared_input(j, at))
        return declined(j, old, "writes to memory of an input that is used again by another name");
    if (!part && input != UINT32_MAX && !old->outs && !copy && used_later(j, at, dest))
        return declined(j, old, "writes to an input that is used again: what a derivative keeps of it cannot be told");
    if (!part) {
        th__op_push(j->t, &rec->op);
        return th_trace_status(j->t);
    }
    th_val source = th__node_as_value(j->t, th__op_arg(j->t, &rec->op, 1, NULL));
    if (!th__op_is(j->t, old, "torch.Tensor.copy_") && writes_statistics(j, at, &rec->op))
        return take_part(j, at, rec); /* its rule writes them too */
    if (!th__op_is(j->t, old, "torch.Tensor.copy_") || input == UINT32_MAX || !source || old->outs ||
        j->written[input] || used_later(j, at, dest))
        return declined(j, old, "writes to a tensor that takes part in autograd");
    j->joint->mutated[j->joint->nmutated] = dest;
    j->written[input] = true;
    j->joint->tangent_of[j->joint->nmutated++] = source; /* a value for now */
    return TH_OK;
}

/* The operation that makes a value, and makes it a tensor of its own: only then is what reaches the value's gradient
 * what reaches the tensor's. */
static record *maker(joiner *j, th_opref before, th_val v) {
    for (th_opref o = before; o-- > 1;) {
        record *rec = j->records[o];
        for (uint32_t i = 0; rec && i < rec->nouts; i++) {
            if (rec->outs[i] != v) continue;
            for (uint32_t k = 0; k < rec->nuses; k++)
                if (rec->uses[k] == v) return NULL;
            return rec;
        }
    }
    return NULL;
}

static th_status join_tie(joiner *j, th_opref at, th__tie tie, const record *rec) {
    th_val v = th__node_as_value(j->t, th__op_arg(j->t, &rec->op, 0, NULL));
    record *made_by = requires_grad(j, v) ? maker(j, at, v) : NULL;
    tied *made = th__scratch_zeroed(&j->scratch, 1, sizeof *made);
    if (!made) return TH_ENOMEM;
    if (!made_by) return declined(j, &rec->op, "it is of a tensor whose gradient is not computed by itself");
    *made = (tied){NULL, tie, v, rec->op};
    tied **end = &made_by->ties;
    while (*end) end = &(*end)->next;
    *end = made;
    if (tie == TH__TIE_HOOK) th__op_push(j->t, &rec->op); /* for second derivatives: it sees those too */
    return th_trace_status(j->t);
}

/* A module with hooks begins or ends here: its tensors are themselves, with gradients of their own. */
static th_status join_module(joiner *j, th_opref at, record *rec) {
    th_trace *t = j->t;
    uint32_t nouts = 0, n = t->nodes[rec->op.args].count - 1;
    th_val *old_outs = values_of(j, j->r.ops[at].outs, 0, false, &nouts);
    rec->nouts = rec->nuses = n;
    rec->recorded = old_outs;
    rec->module = th__op_arg(t, &rec->op, 0, NULL);
    rec->uses = th__scratch_zeroed(&j->scratch, n, sizeof *rec->uses);
    rec->outs = th__scratch_zeroed(&j->scratch, n, sizeof *rec->outs);
    if (!old_outs || !rec->uses || !rec->outs || n != nouts) return TH_ENOMEM;
    memcpy(rec->outs, old_outs, n * sizeof *old_outs);
    for (uint32_t i = 0; i < n; i++) {
        rec->uses[i] = th__node_as_value(t, th__op_arg(t, &rec->op, i + 1, NULL));
        j->grad[rec->outs[i]] = requires_grad(j, rec->uses[i]);
    }
    th__op_push(t, &rec->op);
    j->records[at] = rec;
    return th_trace_status(t);
}

static th_status join_op(joiner *j, th_opref at) {
    const th_op *old = &j->r.ops[at];
    if (old->kind == TH_OP_DEL) return TH_OK;
    th__tie tie = th__tie_of(j->t, old);
    record *rec = th__scratch_zeroed(&j->scratch, 1, sizeof *rec);
    if (!rec) return TH_ENOMEM;
    rec->op = *old;
    rec->op.args = th__rewrite_node(&j->r, old->args);
    rec->op.kwargs = th__rewrite_node(&j->r, old->kwargs);
    rec->uses = values_of(j, rec->op.args, rec->op.kwargs, true, &rec->nuses);
    if (!rec->uses) return TH_ENOMEM;
    if (tie == TH__TIE_MODULE) return join_module(j, at, rec);
    if (tie) return join_tie(j, at, tie, rec);
    if (old->nwrites) return join_write(j, at, rec);
    if (!any_requires_grad(j, rec->uses, rec->nuses) || old->marks & (TH_MARK_NO_GRAD | TH_MARK_RAISES)) {
        th__op_push(j->t, &rec->op);
        return th_trace_status(j->t);
    }
    return take_part(j, at, rec);
}

/* ---- backwards ---- */

static th_status accumulate(joiner *j, const th_op *site, th_val v, th_val gradient) {
    th_trace *t = j->t;
    TRY(reserve_values(j));
    const th_type *type = th_type_get(t->ctx, t->values[v].type), *g = th_type_get(t->ctx, t->values[gradient].type);
    bool fits = type->ndim == g->ndim && type->dtype == g->dtype &&
                (!type->ndim || memcmp(type->shape, g->shape, type->ndim * sizeof *type->shape) == 0);
    if (!fits) return declined(j, site, "its rule gives a gradient of another shape or dtype");
    if (!j->tangent[v]) {
        j->tangent[v] = gradient;
        return TH_OK;
    }
    th__emitter e = {t, j->catalog, site->file, site->line, 0, j->options.facts};
    th_val sum = th__emit_add(&e, j->tangent[v], gradient);
    if (!sum) return th_trace_status(t) ? th_trace_status(t) : declined(j, site, "its gradients cannot be added");
    TRY(reserve_values(j));
    j->tangent[v] = sum;
    return TH_OK;
}

/* A rule made for other gradients: its forward part is the one that was spliced. */
static th_status follow(joiner *j, record *rec, const th_rule *rule) {
    record before = *rec;
    const th_trace *a = before.rule->trace, *b = rule->trace;
    TRY(begin_map(j, rec, rule));
    th_opref at = 1;
    for (th_opref o = 1; o < b->nops; o++) {
        if (!rec->forward[o]) continue;
        while (at < a->nops && !before.forward[at]) at++;
        if (at == a->nops || a->ops[at].callee != b->ops[o].callee)
            return declined(j, &rec->op, "its derivative depends on its gradient in a way that has no rule");
        collect outs = {th__scratch_zeroed(&j->scratch, a->nvalues + b->nvalues, sizeof(th_val)), 0, false};
        if (!outs.items) return TH_ENOMEM;
        th_op_each_out((th_trace *)a, at, collect_value, &outs);
        uint32_t half = outs.count;
        th_op_each_out((th_trace *)b, o, collect_value, &outs);
        if (outs.count != 2 * half) return declined(j, &rec->op, "its derivative has no rule");
        for (uint32_t i = 0; i < half; i++) {
            th_val x = outs.items[i], y = outs.items[half + i];
            rec->map[y] = before.map[x];
            if (b->values[y].alias) rec->alias[b->values[y].alias] = j->t->values[before.map[x]].alias;
        }
        at++;
    }
    return TH_OK;
}

static th_status backward_by_rule(joiner *j, record *rec, const th_val *tangents) {
    th_typeref *types = th__scratch_zeroed(&j->scratch, rec->nouts, sizeof *types);
    if (!types) return TH_ENOMEM;
    for (uint32_t i = 0; i < rec->nouts; i++) types[i] = tangents[i] ? j->t->values[tangents[i]].type : 0;
    const th_rule *rule = NULL;
    TRY(ask(j, rec, types, &rule));
    if (rule != rec->rule) TRY(follow(j, rec, rule));
    th_trace *from = rule->trace;
    uint32_t input = rec->nuses;
    for (uint32_t i = 0; i < rec->nouts; i++)
        if (tangents[i]) rec->map[from->inputs[input++]] = tangents[i];
    for (th_opref o = 1; o < from->nops; o++)
        if (!rec->forward[o] && from->ops[o].kind == TH_OP_CALL) splice_op(j, rec, from, o);
    TRY(th_trace_status(j->t));
    for (uint32_t i = 0; i < rec->nuses; i++) {
        th_val g = th__node_as_value(from, rule_result(rule, rec->nouts + i));
        if (g && rec->needs[i]) TRY(accumulate(j, &rec->op, rec->uses[i], rec->map[g]));
    }
    return TH_OK;
}

static th_status backward_by_catalogue(joiner *j, record *rec, const th_val *tangents) {
    th__backward *b = rec->own;
    th_status status = th__backward_run(b, tangents);
    if (status == TH_DECLINED) return declined(j, &rec->op, "its catalogue rule does not cover this gradient");
    TRY(status);
    for (uint32_t i = 0; i < b->ngrads; i++)
        if (requires_grad(j, b->grads[i].of)) TRY(accumulate(j, &rec->op, b->grads[i].of, b->grads[i].gradient));
    return TH_OK;
}

/* All that reaches the gradients of these results has: hooks see them, and tensors that retain theirs get them last, as
 * in eager. */
static th_status run_ties(joiner *j, const record *rec) {
    uint32_t first = j->t->ninputs - j->joint->ntangents;
    for (const tied *tie = rec->ties; tie; tie = tie->next) {
        TRY(reserve_values(j));
        th_val *tangent = &j->tangent[tie->value];
        if (tie->tie != TH__TIE_HOOK || !*tangent) continue;
        th_val seen =
            th__tie_run_hook(j->t, &j->scratch, &tie->site, th__op_arg(j->t, &tie->site, 1, NULL), *tangent, first);
        if (!seen)
            return th_trace_status(j->t) ? th_trace_status(j->t) : declined(j, &tie->site, "too many dimensions");
        *tangent = seen;
    }
    for (const tied *tie = rec->ties; tie; tie = tie->next)
        for (uint32_t i = 0; i < j->joint->nkept; i++)
            if (j->kept[i] == tie) j->joint->kept[i].total = j->tangent[tie->value];
    return reserve_values(j);
}

static th_status backward_by_module(joiner *j, record *rec, th_val *tangents) {
    uint32_t first = j->t->ninputs - j->joint->ntangents;
    TRY(th__tie_run_module(j->t, &j->scratch, &rec->op, rec->module, rec->nouts, rec->uses, tangents, first));
    for (uint32_t i = 0; i < rec->nuses; i++)
        if (requires_grad(j, rec->uses[i])) TRY(accumulate(j, &rec->op, rec->uses[i], tangents[i]));
    return TH_OK;
}

static th_status backward_op(joiner *j, th_opref at) {
    record *rec = j->records[at];
    if (!rec) return TH_OK;
    TRY(run_ties(j, rec));
    bool any = false;
    th_val *tangents = th__scratch_zeroed(&j->scratch, rec->nouts, sizeof *tangents);
    if (!tangents) return TH_ENOMEM;
    TRY(reserve_values(j));
    for (uint32_t i = 0; i < rec->nouts; i++) {
        bool counted = false; /* a result that is an argument itself, or another result */
        for (uint32_t k = 0; k < rec->nuses; k++) counted |= rec->uses[k] == rec->outs[i];
        for (uint32_t k = 0; k < i; k++) counted |= rec->outs[k] == rec->outs[i];
        tangents[i] = requires_grad(j, rec->outs[i]) && !counted ? j->tangent[rec->outs[i]] : 0;
        any |= tangents[i] != 0;
    }
    if (!any) return TH_OK;
    if (rec->module) return backward_by_module(j, rec, tangents);
    return rec->own ? backward_by_catalogue(j, rec, tangents) : backward_by_rule(j, rec, tangents);
}

/* ---- all of it ---- */

/* Which results keep their gradients. Of a tensor that is not returned nobody can ask for it. */
static th_status find_kept(joiner *j, uint32_t nvalues, const th_val *values) {
    th_joint *joint = j->joint;
    uint32_t n = 0;
    for (th_opref o = 1; o < j->r.nops; o++)
        for (tied *tie = j->records[o] ? j->records[o]->ties : NULL; tie; tie = tie->next)
            n += tie->tie == TH__TIE_GRAD;
    joint->kept = th_ctx_alloc(j->t->ctx, NULL, (n + 1) * sizeof *joint->kept);
    j->kept = th__scratch_zeroed(&j->scratch, n, sizeof *j->kept);
    if (!joint->kept || !j->kept) return th_fail(j->t->ctx, TH_ENOMEM, "out of memory");
    for (th_opref o = 1; o < j->r.nops; o++)
        for (tied *tie = j->records[o] ? j->records[o]->ties : NULL; tie; tie = tie->next) {
            uint32_t i = 0;
            while (i < nvalues && values[i] != tie->value) i++;
            if (tie->tie != TH__TIE_GRAD || i == nvalues) continue;
            if (i >= joint->nresults)
                return declined(j, &tie->site, "it keeps the gradient of an input that is written to");
            j->kept[joint->nkept] = tie;
            joint->kept[joint->nkept++] = (th_kept){i, 0};
        }
    return TH_OK;
}

/* The results of the call, then the new contents of inputs; those that require grad get a gradient as a new input. */
static th_status add_tangents(joiner *j, uint32_t *nvalues, th_val **values) {
    th_trace *t = j->t;
    th_joint *joint = j->joint;
    th_node result = th__rewrite_node(&j->r, t->result);
    uint32_t n = 0;
    th_val *all = values_of(j, result, 0, false, &n);
    *values = th__scratch_zeroed(&j->scratch, n + joint->nmutated, sizeof **values);
    if (!all || !*values) return TH_ENOMEM;
    joint->nresults = n;
    memcpy(*values, all, n * sizeof *all);
    for (uint32_t i = 0; i < joint->nmutated; i++) (*values)[n + i] = joint->tangent_of[i];
    *nvalues = n + joint->nmutated;
    th_ctx_alloc(t->ctx, joint->tangent_of, 0);
    joint->tangent_of = th_ctx_alloc(t->ctx, NULL, (*nvalues + 1) * sizeof *joint->tangent_of);
    if (!joint->tangent_of) return th_fail(t->ctx, TH_ENOMEM, "out of memory");
    uint32_t ninputs = t->ninputs;
    for (uint32_t i = 0; i < *nvalues; i++) {
        th_val v = (*values)[i];
        uint32_t at = input_index(t, v);
        if (!requires_grad(j, v) || (at < ninputs) || j->tangent[v]) continue;
        th_val tangent = th_trace_input(t, th_intern_z(t->ctx, "g"), tangent_type(j, v));
        TRY(reserve_values(j));
        j->tangent[v] = tangent;
        joint->tangent_of[joint->ntangents++] = i;
    }
    return find_kept(j, *nvalues, *values);
}

/* Inputs that no gradient reaches are no inputs for autograd: it would run backwards through where they come from. */
static void drop_unused(joiner *j) {
    th_joint *joint = j->joint;
    uint32_t n = 0;
    for (uint32_t i = 0; i < joint->nwrt; i++)
        if (joint->wrt[i] < j->cap && j->tangent[joint->wrt[i]]) joint->wrt[n++] = joint->wrt[i];
    if (n) joint->nwrt = n;
}

static void set_result(joiner *j, uint32_t nvalues, const th_val *values) {
    th_trace *t = j->t;
    th_joint *joint = j->joint;
    drop_unused(j);
    uint32_t ngrads = joint->nwrt + joint->nkept;
    th_node *kids = th__scratch_zeroed(&j->scratch, nvalues + ngrads, sizeof *kids);
    if (!kids) {
        t->sticky = TH_ENOMEM;
        return;
    }
    for (uint32_t i = 0; i < nvalues; i++) kids[i] = th_node_value(t, values[i]);
    for (uint32_t i = 0; i < joint->nwrt; i++) {
        th_val g = joint->wrt[i] < j->cap ? j->tangent[joint->wrt[i]] : 0;
        kids[nvalues + i] = g ? th_node_value(t, g) : th_node_none(t);
    }
    for (uint32_t i = 0; i < joint->nkept; i++) {
        th_val g = joint->kept[i].total;
        kids[nvalues + joint->nwrt + i] = g ? th_node_value(t, g) : th_node_none(t);
    }
    t->result = th_node_seq(t, TH_N_TUPLE, nvalues + ngrads, kids);
}

static th_status join(joiner *j) {
    th_trace *t = j->t;
    for (th_opref o = 1; o < j->r.nops; o++) TRY(join_op(j, o));
    uint32_t nvalues = 0;
    th_val *values = NULL;
    TRY(add_tangents(j, &nvalues, &values));
    for (th_opref o = j->r.nops; o-- > 1;) TRY(backward_op(j, o));
    set_result(j, nvalues, values);
    return th_trace_status(t);
}

static th_status prepare(joiner *j) {
    th_trace *t = j->t;
    th_joint *joint = j->joint;
    uint32_t n = t->ninputs + 1;
    joint->mutated = th_ctx_alloc(t->ctx, NULL, n * sizeof *joint->mutated);
    joint->wrt = th_ctx_alloc(t->ctx, NULL, n * sizeof *joint->wrt);
    joint->tangent_of = th_ctx_alloc(t->ctx, NULL, n * sizeof *joint->tangent_of);
    j->records = th__scratch_zeroed(&j->scratch, t->nops, sizeof(record *));
    j->written = th__scratch_zeroed(&j->scratch, n, sizeof *j->written);
    if (!joint->mutated || !joint->wrt || !joint->tangent_of) return th_fail(t->ctx, TH_ENOMEM, "out of memory");
    j->used = th__scratch_zeroed(&j->scratch, t->nvalues, sizeof *j->used);
    if (!j->records || !j->written || !j->used) return TH_ENOMEM;
    find_used(j);
    TRY(reserve_values(j));
    for (uint32_t i = 0; i < t->ninputs; i++) {
        th_val v = t->inputs[i];
        if (!(th_type_get(t->ctx, t->values[v].type)->flags & TH_TYPE_REQUIRES_GRAD)) continue;
        j->grad[v] = true;
        joint->wrt[joint->nwrt++] = v;
    }
    return th_catalog_new(t->ctx, &j->catalog);
}

th_status th_grad_join(th_trace *t, const th_grad_options *options, th_joint *joint) {
    joiner j = {.t = t, .scratch = {.ctx = t->ctx}, .options = *options, .joint = joint};
    *joint = (th_joint){.t = t};
    th_status status = prepare(&j);
    if (status == TH_OK) status = th__rewrite_begin(&j.r, t);
    if (status == TH_OK) status = th__rewrite_end(&j.r, join(&j));
    th_catalog_free(j.catalog);
    th__scratch_fini(&j.scratch);
    return status;
}

void th_joint_fini(th_joint *joint) {
    if (!joint->t) return;
    th_ctx *ctx = joint->t->ctx;
    th_ctx_alloc(ctx, joint->mutated, 0);
    th_ctx_alloc(ctx, joint->wrt, 0);
    th_ctx_alloc(ctx, joint->tangent_of, 0);
    th_ctx_alloc(ctx, joint->kept, 0);
    th_ctx_alloc(ctx, joint->derived, 0);
    th_trace_free(joint->t);
    *joint = (th_joint){0};
}
