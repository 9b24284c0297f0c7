/* Writes become values: after this pass an alias group is only read, and a mutated input is written back once, at the
 * end.
 *
 *     def f(x):                                    def f(x):
 *         v = x[1]          (a view)                   v = x[1]
 *         v.add_(1)                          ->        t1 = torch.add(v, 1)
 *                                                      t2 = torch.as_strided_scatter(x, t1, ...)    x after the write
 *         y = x * 2                                    t3 = torch.mul(t2, 2)
 *         z = v * 2                                    t4 = torch.as_strided(t2, ...)               v after the write
 *                                                      ...
 *                                                      _: "writes x" = torch.Tensor.copy_(x, t2)
 *
 * Each alias group is taken whole or left exactly as recorded: operations with effects, in order, are always right. A
 * group has a base, the member that comes first and covers all others: an input, or the result of the operation that
 * made the storage. Each write makes a new version: a value that has the base's type and shape, with storage of its
 * own. Reading a member later means: the version itself, or torch.as_strided of it. Version 0 is the recorded storage,
 * which this pass leaves untouched until the write-back; so a view recorded before the first write is, at the end,
 * still a view of the input, and is returned as it is.
 *
 * An input's storage offset is not known: the same program serves inputs that start elsewhere. So nothing that this
 * pass makes counts from the start of an input's storage; offsets are absolute only in storages that the program made.
 *
 * Invariants that make it sound, checked by `examine`: one base, one dtype (not complex: conjugation is a flag that
 * types do not show), every member within the base, every write understood (write.h), nothing else that touches a
 * member knows about storage or outside state. No write reads elements that partly overlap those it writes.
 *
 * What is returned keeps its identity: the tensor that was mutated is returned itself, a view of it is a view of it.
 * An input that is only written to through .data is written back through it, so that its version stays.
 */
#include "ops/meta.h"
#include "passes/pass.h"
#include "passes/tie.h"
#include "passes/view.h"
#include "passes/write.h"

#include <string.h>

static const char data_getter[] = "torch.Tensor.data.__get__";

typedef struct group {
    bool written, refused, taken, has_input;
    bool shown;    /* a write changes the version of the base: it does not go through .data */
    bool kept;     /* a member retains its gradient: that of whatever version it has in the end */
    bool needs;    /* while rewriting: what was written to it may require grad */
    bool gradless; /* all writes were made while gradients were off, so the write-back is */
    th_val base;
    th_opref base_def, used_by; /* used_by: the last operation that took a member */
    th_opref first_write;
    uint32_t nwrites;
    /* while rewriting */
    th_val current;   /* the version that reads see */
    uint32_t version; /* 0: the recorded storage */
    int64_t shift;    /* storage offset of the current version minus the recorded one */
    th_str file;      /* of the last write, for the write-back */
    uint32_t line;
} group;

enum { NEVER = UINT32_MAX };

typedef struct member { /* by value, of those that the trace had at the start */
    uint32_t group;
    int64_t offset; /* as recorded */
    th_val object;  /* the value that is the same tensor object: what an in-place operation returns is its argument */
    uint32_t home;  /* version in whose storage its definition put it; NEVER: its definition is gone (see object) */
    th_val reread;  /* as_strided of version `reread_version` */
    uint32_t reread_version;
    th_val returned; /* made for the result */
    th_val same_as;  /* the operation that defines it returns this value, the same tensor */
} member;

typedef struct pass {
    th_trace *t;
    th_catalog *catalog;
    th__scratch scratch;
    group *groups;
    member *members;
    uint32_t nvalues, nops;
    th__write **writes; /* by operation; NULL: no write, or one that is not understood */
    th_opref last_state;
    th__rewrite r;
    th_str file; /* of the operation that is being rewritten */
    uint32_t line;
    uint8_t marks;
    bool grad;   /* an input requires grad: results that do stay connected to it */
    bool *needs; /* by value: it may require grad; NULL: none does */
    bool found;  /* one of those looked at does */
    th_opref op; /* being examined */
    bool suspicious;
    const th__view *region; /* that it writes */
    uint32_t skip;          /* uses of its destination that are no reads */
} pass;

static group *group_of(const pass *p, th_val v) { return &p->groups[p->members[v].group]; }

/* Where a value lies in the recorded storage. Only for values that passed add_member. */
static th__view recorded(const pass *p, th_val v) {
    th__view view;
    th__view_of(p->t, v, &view);
    view.offset = p->members[v].offset;
    return view;
}

/* ---- examine: which groups can be taken ---- */

static bool is_plain_tensor(const th_trace *t, th_val v) {
    const th_type *type = th_type_get(t->ctx, t->values[v].type);
    return type->kind == TH_TYPE_TENSOR && th__class((th_dtype)type->dtype) != 'c';
}

static bool fits_base(const pass *p, th_val v, th_val base) {
    const th_type *a = th_type_get(p->t->ctx, p->t->values[v].type),
                  *b = th_type_get(p->t->ctx, p->t->values[base].type);
    th__view view = recorded(p, v), whole = recorded(p, base);
    if (a->dtype != b->dtype || a->device != b->device) return false;
    return th__view_same(&view, &whole) || (th__view_is_dense(&whole) && th__view_inside(&view, &whole));
}

/* A value that an operation (0: the call) defines. */
static void add_member(pass *p, th_val v, th_opref op) {
    group *g = group_of(p, v);
    th__view view;
    bool ok = th__view_of(p->t, v, &view) && is_plain_tensor(p->t, v);
    if (!g->base) {
        g->base = v;
        g->base_def = op;
        g->has_input = op == 0;
        ok = ok && !th__view_self_overlaps(&view);
    } else { /* a second input, a second result of what made the storage, or a view out of nowhere has no place */
        ok = ok && !g->refused && op != 0 && op != g->base_def && g->used_by == op && fits_base(p, v, g->base);
    }
    if (!ok) g->refused = true;
}

static void add_out(void *user, th_val *v) { add_member(user, *v, ((pass *)user)->op); }

static void note_use(void *user, th_val *v) {
    pass *p = user;
    group *g = group_of(p, *v);
    g->used_by = p->op;
    if (p->suspicious) g->refused = true;
}

static void find_object(void *user, th_val *v) {
    pass *p = user;
    if (th_type_get(p->t->ctx, p->t->values[*v].type)->kind == TH_TYPE_OBJECT) p->suspicious = true;
}

/* A tie to the tensor that the base of its group is. One to another view of it would move to the whole of it. */
static bool ties_base(const pass *p, th_opref op) {
    const th_trace *t = p->t;
    th__tie tie = th__tie_of(t, &t->ops[op]);
    th_val v =
        tie == TH__TIE_HOOK || tie == TH__TIE_GRAD ? th__node_as_value(t, th__op_arg(t, &t->ops[op], 0, NULL)) : 0;
    while (v && v != group_of(p, v)->base) {
        const th__write *w = p->writes[t->values[v].def];
        v = w ? w->dest : 0;
    }
    return v != 0;
}

/* May the operation keep a member, look at its storage, or change it in a way that the trace does not say? */
static bool is_suspicious(pass *p, th_opref op) {
    const th_op *data = &p->t->ops[op];
    const char *callee = th__op_callee(p->t, data);
    p->suspicious = ((data->effects & TH_FX_STATE) && !th__op_only_reads(p->t, data) && !ties_base(p, op)) ||
                    strstr(callee, "storage") || strstr(callee, "data_ptr") ||
                    (!data->nwrites && th__op_named_in_place(p->t, data));
    th_op_each_out(p->t, op, find_object, p);
    return p->suspicious;
}

/* as_strided counts from the start of the storage, which versions only have in common when the base starts there. */
static void refuse_absolute(void *user, th_val *v) {
    pass *p = user;
    group *g = group_of(p, *v);
    if (g->base && (g->has_input || p->members[g->base].offset != 0)) g->refused = true;
}

static void refuse(void *user, th_val *v) { group_of(user, *v)->refused = true; }

/* An argument of a write that shares storage with the destination must not partly overlap what is written. */
static void check_overlap(void *user, th_val *v) {
    pass *p = user;
    const th__write *w = p->writes[p->op];
    if (p->members[*v].group != p->members[w->dest].group) return;
    if (*v == w->dest && p->skip > 0) {
        p->skip--;
        return;
    }
    th__view view = recorded(p, *v);
    if (!th__view_same(&view, p->region) && th__views_overlap(&view, p->region)) group_of(p, *v)->refused = true;
}

/* Apart from whether they require grad. */
static bool same_type(const th_trace *t, th_val a, th_val b) {
    return th_type_set_grad(t->ctx, t->values[a].type, false) == th_type_set_grad(t->ctx, t->values[b].type, false);
}

/* What a write returns must be its destination. */
static bool returns_dest(const pass *p, const th_op *op, th_val dest) {
    th_val out = th__node_as_value(p->t, op->outs);
    if (!op->outs) return true;
    return out && p->members[out].group == p->members[dest].group && same_type(p->t, out, dest) &&
           p->members[out].offset == p->members[dest].offset;
}

/* Does a write to `v` change the version of its base? Not where `v` came by .data. */
static bool is_shown(const pass *p, th_val v) {
    const th_trace *t = p->t;
    while (v != group_of(p, v)->base) {
        const th_op *op = &t->ops[t->values[v].def];
        const th__write *w = p->writes[t->values[v].def];
        th_val from = w ? w->dest : th__node_as_value(t, th__op_arg(t, op, 0, NULL));
        if (th__op_is(t, op, data_getter)) return false;
        if (!from || p->members[from].group != p->members[v].group) return true;
        v = from;
    }
    return true;
}

static th_status examine_write(pass *p, th_opref op) {
    th_trace *t = p->t;
    th_op data = t->ops[op];
    th__write *w = th__scratch_zeroed(&p->scratch, 1, sizeof *w);
    if (!w) return TH_ENOMEM;
    th_status status = th__write_understand(p->catalog, t, &data, w);
    if (status != TH_OK && status != TH_DECLINED) return status;
    for (uint32_t i = 0; i < data.nwrites; i++) {
        group *g = group_of(p, t->kids[data.writes + i]);
        g->gradless = (!g->written || g->gradless) && data.marks & TH_MARK_NO_GRAD;
        if (!g->written) g->first_write = op;
        g->written = true;
        g->nwrites++;
        g->refused |= status == TH_DECLINED || g->kept || !returns_dest(p, &data, w->dest);
    }
    if (status == TH_DECLINED) return TH_OK;
    p->writes[op] = w;
    group_of(p, w->dest)->shown |= is_shown(p, w->dest);
    p->region = &w->region;
    p->skip = 1;
    if (!group_of(p, w->dest)->refused) {
        th_node_each_value(t, data.args, check_overlap, p);
        if (th__op_arg(t, &data, UINT32_MAX, "out")) p->skip = 1;
        th_node_each_value(t, data.kwargs, check_overlap, p);
    }
    return TH_OK;
}

static th_status examine_op(pass *p, th_opref op) {
    th_trace *t = p->t;
    p->op = op;
    if (t->ops[op].kind == TH_OP_DEL) return TH_OK;
    if (t->ops[op].nwrites) TRY(examine_write(p, op));
    if ((t->ops[op].effects & TH_FX_STATE) && !th__tie_of(t, &t->ops[op]) && !th__op_only_reads(t, &t->ops[op]))
        p->last_state = op;
    if (th__tie_of(t, &t->ops[op]) == TH__TIE_GRAD)
        group_of(p, th__node_as_value(t, th__op_arg(t, &t->ops[op], 0, NULL)))->kept = true;
    is_suspicious(p, op);
    th_op_each_use(t, op, note_use, p);
    if (strstr(th__op_callee(t, &t->ops[op]), "as_strided")) th_op_each_use(t, op, refuse_absolute, p);
    if (p->suspicious) th_op_each_out(t, op, refuse, p);
    th_op_each_out(t, op, add_out, p);
    th_val same = th__op_returns_input(t, &t->ops[op]), out = same ? th__node_as_value(t, t->ops[op].outs) : 0;
    if (same && p->members[same].group == p->members[out].group) p->members[out].same_as = same;
    return TH_OK;
}

/* Is this operation of the form that the pass itself leaves at the end: a write-back, or a view made to be returned? */
static bool is_epilogue(const pass *p, th_opref op) {
    const th_op *data = &p->t->ops[op];
    const th__write *w = p->writes[op];
    if (data->kind == TH_OP_DEL || th__op_is(p->t, data, "torch.as_strided")) return true;
    if (th__op_is(p->t, data, "torch.narrow")) return true;
    return w && w->kind == TH__WRITE_COPY && !data->outs && group_of(p, w->dest)->has_input &&
           group_of(p, w->dest)->base == w->dest;
}

/* After a write to an input that happens where it stands a run that fails is not done again from its start, so the
 * writes to other inputs happen where they stand, too. With gradients they do not: nothing derives what a write does.
 */
static void refuse_beside(pass *p, th_opref tail) {
    const th_trace *t = p->t;
    bool stays = false;
    for (th_opref op = 1; op < tail && !p->grad && !stays; op++)
        for (uint32_t i = 0; i < t->ops[op].nwrites && !stays; i++) {
            const group *g = group_of(p, t->kids[t->ops[op].writes + i]);
            stays = g->has_input && g->refused;
        }
    for (uint32_t i = 0; i < t->ninputs && stays; i++) group_of(p, t->inputs[i])->refused = true;
}

static th_status examine(pass *p) {
    th_trace *t = p->t;
    for (uint32_t i = 0; i < t->ninputs; i++) add_member(p, t->inputs[i], 0);
    for (th_opref op = 1; op < p->nops; op++) TRY(examine_op(p, op));
    th_opref tail = p->nops;
    while (tail > 1 && is_epilogue(p, tail - 1)) tail--;
    for (th_opref op = 1; op < p->nops; op++) {
        for (uint32_t i = 0; i < t->ops[op].nwrites; i++) {
            group *g = group_of(p, t->kids[t->ops[op].writes + i]);
            /* Outside state may show the input's contents: a write must not move past it. */
            if (g->has_input && p->last_state > g->first_write) g->refused = true;
            if (g->nwrites == 1 && op >= tail && p->writes[op]) g->refused = true; /* written back already */
        }
    }
    refuse_beside(p, tail);
    return th_trace_status(t);
}

/* ---- emit ---- */

static th_val emit(pass *p, const char *callee, th_typeref type, uint32_t n, const th_node *args, th_node kwargs) {
    th_trace *t = p->t;
    th_val out = th_trace_value(t, 0, th_type_set_grad(t->ctx, type, false));
    th_trace_op(t, &(th_op_args){.kind = TH_OP_CALL,
                                 .callee = th_intern_z(t->ctx, callee),
                                 .args = th_node_seq(t, TH_N_TUPLE, n, args),
                                 .kwargs = kwargs,
                                 .outs = th_node_value(t, out),
                                 .marks = p->marks,
                                 .file = p->file,
                                 .line = p->line});
    return out;
}

static th_node ints(th_trace *t, uint32_t n, const int64_t *values) {
    th_node kids[TH_MAX_RANK];
    for (uint32_t i = 0; i < n; i++) kids[i] = th_node_int(t, values[i]);
    return th_node_seq(t, TH_N_TUPLE, n, kids);
}

static uint32_t shared_alias(th_trace *t, th_val v) {
    if (!t->values[v].alias) t->values[v].alias = th_trace_alias(t);
    return t->values[v].alias;
}

/* Mark `view` as sharing `base`'s storage. */
static void share(th_trace *t, th_val view, th_val base, int64_t offset) {
    t->values[view].alias = shared_alias(t, base);
    t->values[view].offset = offset;
}

static th_typeref view_type(const pass *p, th_val like, const th__view *view) {
    const th_type *type = th_type_get(p->t->ctx, p->t->values[like].type);
    return th_type_tensor(p->t->ctx, (th_dtype)type->dtype, type->device, view->ndim, view->shape, view->stride, 0);
}

/* KEEP_OFFSET: where `of` itself starts, wherever that is. */
enum { KEEP_OFFSET = -1 };

static th_val emit_as_strided(pass *p, th_val of, const th__view *view, int64_t offset) {
    th_trace *t = p->t;
    th_node args[] = {th_node_value(t, of), ints(t, view->ndim, view->shape), ints(t, view->ndim, view->stride),
                      offset == KEEP_OFFSET ? 0 : th_node_int(t, offset)};
    th_val out = emit(p, "torch.as_strided", view_type(p, of, view), offset == KEEP_OFFSET ? 3 : 4, args, 0);
    if (out) share(t, out, of, offset == KEEP_OFFSET ? t->values[of].offset : offset);
    return out;
}

/* A view of `v` that requires no grad: torch.as_strided_scatter does not take every layout of what does, also where
 * gradients are off. */
static th_val emit_detached(pass *p, th_val v) {
    th_node arg = th_node_value(p->t, v);
    th_val out = emit(p, data_getter, p->t->values[v].type, 1, &arg, 0);
    if (out) share(p->t, out, v, p->t->values[v].offset);
    return out;
}

static th_val emit_scatter(pass *p, th_val into, th_val contents, const th__view *region, int64_t offset) {
    th_trace *t = p->t;
    th_typeref type = th_type_set_grad(t->ctx, t->values[into].type, false);
    int64_t start = t->values[into].offset;
    if (p->marks & TH_MARK_NO_GRAD && type != t->values[into].type) into = emit_detached(p, into);
    th_node args[] = {th_node_value(t, into), th_node_value(t, contents), ints(t, region->ndim, region->shape),
                      ints(t, region->ndim, region->stride), offset == KEEP_OFFSET ? 0 : th_node_int(t, offset)};
    th_val out = emit(p, "torch.as_strided_scatter", type, offset == KEEP_OFFSET ? 4 : 5, args, 0);
    if (out) t->values[out].offset = start; /* it copies the storage whole */
    return out;
}

static th_val emit_clone(pass *p, th_val v) {
    th_node arg = th_node_value(p->t, v);
    return emit(p, "torch.clone", p->t->values[v].type, 1, &arg, 0);
}

/* A copy in row-major order, which is the order of `type`. */
static th_val emit_packed(pass *p, th_val v, th_typeref type) {
    th_trace *t = p->t;
    th_node arg = th_node_value(t, v);
    th_node kwargs[] = {th_node_str(t, th_intern_z(t->ctx, "memory_format")),
                        th_node_symbol(t, th_intern_z(t->ctx, "torch.contiguous_format"))};
    return emit(p, "torch.clone", type, 1, &arg, th_node_seq(t, TH_N_DICT, 2, kwargs));
}

/* A view of an input, found from where the input starts: flatten its elements, skip some, shape the rest. */
static th_val emit_view_of_input(pass *p, th_val x, const th__view *view) {
    th_trace *t = p->t;
    th__view whole = recorded(p, x), flat = {.ndim = 1, .stride = {1}, .shape = {th__view_numel(&whole)}};
    int64_t skip = view->offset - whole.offset, count = flat.shape[0] - skip;
    if (skip == 0 || th__view_numel(view) == 0) return emit_as_strided(p, x, view, KEEP_OFFSET);
    th_val all = emit_as_strided(p, x, &flat, KEEP_OFFSET);
    flat.shape[0] = count;
    th_node args[] = {th_node_value(t, all), th_node_int(t, 0), th_node_int(t, skip), th_node_int(t, count)};
    th_val rest = emit(p, "torch.narrow", view_type(p, x, &flat), 4, args, 0);
    if (!rest) return 0;
    share(t, rest, x, view->offset);
    return emit_as_strided(p, rest, view, KEEP_OFFSET);
}

/* ---- read ---- */

/* The value that has the member's contents now. */
static th_val read_member(pass *p, th_val v) {
    group *g = group_of(p, v);
    if (!g->taken) return v;
    v = p->members[v].object;
    member *m = &p->members[v];
    if (m->home == g->version) return v;
    th__view view = recorded(p, v), whole = recorded(p, g->base);
    if (th__view_same(&view, &whole)) return g->current;
    if (!m->reread || m->reread_version != g->version) {
        m->reread = emit_as_strided(p, g->current, &view, view.offset + g->shift);
        m->reread_version = g->version;
    }
    return m->reread;
}

static void replace_by_read(void *user, th_val *v) {
    pass *p = user;
    th_val before = *v;               /* the node moves when a read is emitted */
    if (before >= p->nvalues) return; /* made by this pass: already a read */
    th_val now = read_member(p, before);
    p->r.value[before] = now != before ? now : 0;
}

static th_node read_node(pass *p, th_node n) {
    th_node_each_value(p->t, n, replace_by_read, p);
    return th__rewrite_node(&p->r, n);
}

/* ---- write ---- */

static th_typeref with_dtype(const pass *p, th_typeref ref, th_dtype dtype) {
    const th_type *type = th_type_get(p->t->ctx, ref);
    return th_type_tensor(p->t->ctx, dtype, type->device, type->ndim, type->shape, type->stride, 0);
}

static th_val convert(pass *p, th_val v, th_dtype dtype) {
    th_node args[] = {th_node_value(p->t, v), th_node_dtype(p->t, dtype)};
    return emit(p, "torch.Tensor.to", with_dtype(p, p->t->values[v].type, dtype), 2, args, 0);
}

/* Strides as torch's expand makes them: 0 where a dimension grows, and for everything that had none. */
static th_val expand(pass *p, th_val v, const th__view *to) {
    th_trace *t = p->t;
    const th_type *type = th_type_get(t->ctx, t->values[v].type);
    th__view view = *to;
    for (uint32_t i = to->ndim; i-- > 0;) {
        uint32_t missing = to->ndim - type->ndim;
        int64_t size = i >= missing ? type->shape[i - missing] : 1;
        int64_t outer = type->ndim && i + 1 < to->ndim ? view.shape[i + 1] * view.stride[i + 1] : 0;
        view.stride[i] = size != to->shape[i] ? 0 : i >= missing ? type->stride[i - missing] : outer;
    }
    th_node args[] = {th_node_value(t, v), ints(t, to->ndim, to->shape)};
    th_val out = emit(p, "torch.Tensor.expand", view_type(p, v, &view), 2, args, 0);
    if (out) share(t, out, v, t->values[v].offset);
    return out;
}

static th_val full(pass *p, th_val like, uint32_t ndim, const int64_t *shape, th_node number) {
    th_trace *t = p->t;
    const th_type *type = th_type_get(t->ctx, t->values[like].type);
    th_node args[] = {ints(t, ndim, shape), number};
    th_node kwargs[] = {th_node_str(t, th_intern_z(t->ctx, "dtype")), th_node_dtype(t, (th_dtype)type->dtype),
                        th_node_str(t, th_intern_z(t->ctx, "device")), th_node_device(t, type->device)};
    th_typeref out = th_type_tensor(t->ctx, (th_dtype)type->dtype, type->device, ndim, shape, NULL, 0);
    return emit(p, "torch.full", out, 2, args, th_node_seq(t, TH_N_DICT, 4, kwargs));
}

static bool is_number_node(const th_trace *t, th_node n) {
    return t->nodes[n].kind >= TH_N_BOOL && t->nodes[n].kind <= TH_N_FLOAT;
}

static bool is_whole(const pass *p, const th__write *w) {
    th__view dest = recorded(p, w->dest);
    return th__view_same(&dest, &w->region) && th__view_is_dense(&dest);
}

/* The new contents, of the region's shape and the destination's dtype. *fresh: in storage of their own. */
static th_val new_contents(pass *p, const th__write *w, bool *fresh) {
    th_trace *t = p->t;
    const th_type *dest = th_type_get(t->ctx, t->values[w->dest].type);
    th_val v;
    *fresh = true;
    if (w->kind == TH__WRITE_FILL && p->grad && is_number_node(t, w->source) && is_whole(p, w)) {
        th_node args[] = {th_node_value(t, read_member(p, w->dest)),
                          w->source}; /* requires grad, as what it replaces */
        return emit(p, "torch.ops.aten.fill.Scalar", t->values[w->dest].type, 2, args, 0);
    }
    if (w->kind == TH__WRITE_FILL) return full(p, w->dest, w->region.ndim, w->region.shape, w->source);
    if (w->kind == TH__WRITE_PUT) {
        th_val value = th__node_as_value(t, w->source);
        th_node source = value ? read_node(p, w->source) : th_node_value(t, full(p, w->dest, 0, NULL, w->source));
        th_node args[] = {th_node_value(t, read_member(p, w->dest)), read_node(p, w->indices), source,
                          w->accumulate ? th_node_bool(t, true) : 0};
        return emit(p, "torch.index_put", t->values[w->dest].type, w->accumulate ? 4 : 3, args, 0);
    }
    if (w->kind == TH__WRITE_TWIN) {
        th_node args = read_node(p, w->args), kwargs = w->kwargs ? read_node(p, w->kwargs) : 0;
        v = th_trace_value(t, 0, w->type);
        th_trace_op(t, &(th_op_args){.kind = TH_OP_CALL,
                                     .callee = w->callee,
                                     .args = args,
                                     .kwargs = kwargs,
                                     .outs = th_node_value(t, v),
                                     .effects = w->effects,
                                     .marks = p->marks,
                                     .file = p->file,
                                     .line = p->line});
    } else {
        v = th__node_as_value(t, read_node(p, w->source));
        *fresh = false;
    }
    const th_type *type = th_type_get(t->ctx, t->values[v].type);
    if (v && type->dtype != dest->dtype) {
        v = convert(p, v, (th_dtype)dest->dtype);
        *fresh = true;
    }
    bool same_shape = type->ndim == w->region.ndim;
    for (uint32_t i = 0; same_shape && i < type->ndim; i++) same_shape = type->shape[i] == w->region.shape[i];
    if (v && !same_shape) {
        v = expand(p, v, &w->region);
        *fresh = false;
    }
    return v;
}

/* The next version of a group: the contents themselves when they are a whole new base, else the base with them put in:
 * so too where it is `replaced` and requires grad, for the gradient of what it was is zeros then, and not none. */
static void advance(pass *p, group *g, const th__write *w, th_val contents, bool fresh, bool replaced) {
    const th_trace *t = p->t;
    th__view base = recorded(p, g->base);
    th_typeref type = t->values[g->base].type;
    bool whole = th__view_same(&w->region, &base), dense = th__view_is_dense(&base);
    bool same = same_type(t, contents, g->base);
    if (!replaced && whole && dense && (same || th_type_get(t->ctx, type)->contiguous)) {
        g->current = same && fresh ? contents : same ? emit_clone(p, contents) : emit_packed(p, contents, type);
        g->shift = -base.offset;
    } else {
        if (dense && g->has_input && g->version == 0) { /* an input's offset is not known, a copy's is */
            g->current = emit_clone(p, g->base);
            g->shift = -base.offset;
        }
        int64_t offset = whole ? KEEP_OFFSET : w->region.offset + g->shift;
        g->current = emit_scatter(p, g->current, contents, &w->region, offset);
    }
    g->version++;
    g->file = p->file;
    g->line = p->line;
}

/* `v` is another name for the tensor that `of` is; what defined it is gone. */
static void same_object(pass *p, th_val v, th_val of) {
    p->members[v].object = p->members[of].object;
    p->members[v].home = NEVER;
}

static void look_for_need(void *user, th_val *v) { ((pass *)user)->found |= ((pass *)user)->needs[*v]; }
static void set_need(void *user, th_val *v) { ((pass *)user)->needs[*v] = true; }

static bool uses_needing(pass *p, const th_op *op) {
    p->found = false;
    th_node_each_value(p->t, op->args, look_for_need, p);
    th_node_each_value(p->t, op->kwargs, look_for_need, p);
    return p->found;
}

static void rewrite_write(pass *p, const th_op *op, const th__write *w) {
    group *g = group_of(p, w->dest);
    bool fresh;
    th_val contents = new_contents(p, w, &fresh), out = th__node_as_value(p->t, op->outs);
    if (!contents || th_trace_status(p->t) != TH_OK) return;
    bool grad = p->needs && !(p->marks & TH_MARK_NO_GRAD);
    advance(p, g, w, contents, fresh, grad && w->kind == TH__WRITE_COPY && (g->needs || p->needs[g->base]));
    g->needs |= grad && uses_needing(p, op);
    if (out) same_object(p, out, w->dest);
}

/* ---- all operations ---- */

/* A view that an operation makes of the current version. */
static void move_out(void *user, th_val *v) {
    pass *p = user;
    group *g = group_of(p, *v);
    if (!g->taken || g->version == 0) return;
    p->members[*v].home = g->version;
    share(p->t, *v, g->current, p->members[*v].offset + g->shift);
}

static void rewrite_op(pass *p, th_opref op) {
    const th_op data = p->r.ops[op];
    const th__write *w = p->writes[op];
    if (data.kind == TH_OP_DEL) return; /* lifetime makes them anew */
    p->file = data.file;
    p->line = data.line;
    p->marks = data.marks;
    if (w && group_of(p, w->dest)->taken) {
        rewrite_write(p, &data, w);
        return;
    }
    th_val out = th__node_as_value(p->t, data.outs);
    if (out && p->members[out].same_as && group_of(p, out)->taken) {
        same_object(p, out, p->members[out].same_as);
        return;
    }
    th_node_each_value(p->t, data.args, replace_by_read, p);
    th_node_each_value(p->t, data.kwargs, replace_by_read, p);
    if (th__rewrite_copy(&p->r, &data)) th_node_each_value(p->t, data.outs, move_out, p);
}

static void write_back(pass *p, th_val x, const group *g) {
    th_trace *t = p->t;
    p->file = g->file;
    p->line = g->line;
    th_val to = g->shown ? x : emit_detached(p, x), writes[] = {x, to};
    th_node args[] = {th_node_value(t, to), th_node_value(t, g->current)};
    th_trace_op(t, &(th_op_args){.kind = TH_OP_CALL,
                                 .callee = th_intern_z(t->ctx, "torch.Tensor.copy_"),
                                 .args = th_node_seq(t, TH_N_TUPLE, 2, args),
                                 .nwrites = g->shown ? 1 : 2,
                                 .writes = writes,
                                 .marks = g->gradless ? TH_MARK_NO_GRAD : 0,
                                 .file = g->file,
                                 .line = g->line});
}

/* What the result holds in place of a member: the same tensor object, or a view of the same storage. */
static th_val returned_value(pass *p, th_val v) {
    th_val object = p->members[v].object;
    group *g = group_of(p, v);
    member *m = &p->members[object];
    if (object == g->base) return g->has_input ? g->base : g->current;
    if (m->home == (g->has_input ? 0 : g->version)) return object;
    if (!m->returned) {
        th__view view = recorded(p, object);
        p->file = g->file;
        p->line = g->line;
        m->returned = g->has_input ? emit_view_of_input(p, g->base, &view)
                                   : emit_as_strided(p, g->current, &view, view.offset + g->shift);
    }
    return m->returned;
}

static void replace_result(void *user, th_val *v) {
    pass *p = user;
    th_val before = *v; /* the node moves when a view is emitted */
    if (before >= p->nvalues || !group_of(p, before)->taken) return;
    th_val now = returned_value(p, before);
    p->r.value[before] = now != before ? now : 0;
}

static th_status rewrite(pass *p) {
    th_trace *t = p->t;
    TRY(th__rewrite_begin(&p->r, t));
    for (th_opref op = 1; op < p->nops && th_trace_status(t) == TH_OK; op++) rewrite_op(p, op);
    p->marks = 0;
    for (uint32_t i = 0; i < t->ninputs; i++) {
        const group *g = group_of(p, t->inputs[i]);
        if (g->taken) write_back(p, t->inputs[i], g);
    }
    memset(p->r.value, 0, p->r.nvalues * sizeof *p->r.value);
    th_node_each_value(t, t->result, replace_result, p);
    return th__rewrite_end(&p->r, th_trace_status(t));
}

/* Number the groups densely: alias numbers may be few and large. */
static th_status number_groups(pass *p) {
    th_trace *t = p->t;
    uint32_t count = 0, *by_alias = th__scratch_zeroed(&p->scratch, t->next_alias, sizeof *by_alias);
    if (!by_alias) return TH_ENOMEM;
    for (th_val v = 1; v < t->nvalues; v++) {
        uint32_t alias = t->values[v].alias, group = alias ? by_alias[alias] : 0;
        if (!group) group = ++count;
        if (alias) by_alias[alias] = group;
        p->members[v] = (member){.group = group, .offset = t->values[v].offset, .object = v};
    }
    p->groups = th__scratch_zeroed(&p->scratch, (size_t)count + 1, sizeof *p->groups);
    return p->groups ? TH_OK : TH_ENOMEM;
}

static th_status find_needs(pass *p) {
    th_trace *t = p->t;
    if (!p->grad) return TH_OK;
    p->needs = th__scratch_zeroed(&p->scratch, t->nvalues, sizeof *p->needs);
    if (!p->needs) return TH_ENOMEM;
    for (uint32_t i = 0; i < t->ninputs; i++)
        p->needs[t->inputs[i]] = th_type_get(t->ctx, t->values[t->inputs[i]].type)->flags != 0;
    for (th_opref op = 1; op < t->nops; op++)
        if (!(t->ops[op].marks & TH_MARK_NO_GRAD) && uses_needing(p, &t->ops[op])) th_op_each_out(t, op, set_need, p);
    return TH_OK;
}

static th_status prepare(pass *p) {
    th_trace *t = p->t;
    p->members = th__scratch_zeroed(&p->scratch, t->nvalues, sizeof *p->members);
    p->writes = th__scratch_zeroed(&p->scratch, t->nops, sizeof(th__write *));
    if (!p->members || !p->writes) return TH_ENOMEM;
    for (uint32_t i = 0; i < t->ninputs; i++) p->grad |= th_type_get(t->ctx, t->values[t->inputs[i]].type)->flags != 0;
    p->nvalues = t->nvalues;
    p->nops = t->nops;
    TRY(find_needs(p));
    TRY(number_groups(p));
    return th_catalog_new(t->ctx, &p->catalog);
}

/* Groups to take, in the order of their first writes. */
static bool choose(pass *p, th_fuel *fuel) {
    const th_trace *t = p->t;
    bool any = false;
    for (th_opref op = 1; op < p->nops; op++) {
        group *g = p->writes[op] ? group_of(p, p->writes[op]->dest) : NULL;
        if (!g || g->refused || g->taken || g->first_write != op) continue;
        g->taken = th_fuel_take(fuel, "functionalize", th_str_get(t->ctx, t->values[g->base].name));
        g->current = g->base;
        any |= g->taken;
    }
    return any;
}

th_status th_pass_functionalize(th_trace *t, th_fuel *fuel) {
    pass p = {.t = t, .scratch = {.ctx = t->ctx}};
    bool writes = false;
    for (th_opref op = 1; op < t->nops; op++) writes |= t->ops[op].nwrites != 0;
    if (!writes) return TH_OK;
    th_status status = prepare(&p);
    if (status == TH_OK) status = examine(&p);
    if (status == TH_OK && choose(&p, fuel)) status = rewrite(&p);
    th_catalog_free(p.catalog);
    th__scratch_fini(&p.scratch);
    return status;
}
