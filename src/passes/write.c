/* See write.h. The functional twin of an in-place operation and the type of its result come from the catalogue: its
 * `functional` field and that operator's meta rule. What the catalogue does not know is declined. */
#include "passes/write.h"

#include "ops/meta.h"
#include "passes/pass.h"

#include <stdio.h>
#include <string.h>

static bool callee_is(const th_trace *t, const th_op *op, const char *const *names) {
    for (; *names; names++) {
        if (th__op_is(t, op, *names)) return true;
    }
    return false;
}

static const th_type *type_of(const th_trace *t, th_val v) { return th_type_get(t->ctx, t->values[v].type); }

static bool is_number(const th_trace *t, th_node n) {
    uint8_t kind = t->nodes[n].kind;
    return kind == TH_N_BOOL || kind == TH_N_INT || kind == TH_N_FLOAT;
}

/* ---- contents from a tensor or a number ---- */

/* Can a tensor of this type be copied into the region? Same device, and shapes that broadcast without losing dims. */
static bool can_copy(const th_trace *t, th_val from, const th__write *w) {
    const th_type *source = type_of(t, from), *dest = type_of(t, w->dest);
    if (source->kind != TH_TYPE_TENSOR || source->device != dest->device || source->ndim > w->region.ndim) return false;
    if (th__class((th_dtype)source->dtype) == 'c') return false;
    for (uint32_t i = 0; i < source->ndim; i++) {
        int64_t wanted = w->region.shape[w->region.ndim - source->ndim + i];
        if (source->shape[i] != wanted && source->shape[i] != 1) return false;
    }
    return true;
}

static th_status from_source(const th_trace *t, th_node source, th__write *w) {
    th_val value = th__node_as_value(t, source);
    w->source = source;
    w->kind = is_number(t, source) ? TH__WRITE_FILL : TH__WRITE_COPY;
    if (w->kind == TH__WRITE_FILL) return TH_OK;
    DECLINE_IF(!value || !can_copy(t, value, w));
    th__view view;
    bool converts = type_of(t, value)->dtype != type_of(t, w->dest)->dtype; /* the strides of a dense one stay */
    DECLINE_IF(!th__view_of(t, value, &view) || (converts && !th__view_is_dense(&view)));
    return TH_OK;
}

static th_status understand_copy(const th_trace *t, const th_op *op, th__write *w) {
    DECLINE_IF(th__node_as_value(t, th__op_arg(t, op, 0, "self")) != w->dest);
    return from_source(t, th__op_arg(t, op, 1, "src"), w);
}

static th_status understand_fill(const th_trace *t, const th_op *op, th__write *w) {
    DECLINE_IF(th__node_as_value(t, th__op_arg(t, op, 0, "input")) != w->dest);
    TRY(from_source(t, th__op_arg(t, op, 1, "value"), w));
    DECLINE_IF(w->kind == TH__WRITE_COPY && type_of(t, th__node_as_value(t, w->source))->ndim != 0);
    return TH_OK;
}

static th_status understand_zero(th_trace *t, const th_op *op, th__write *w) {
    DECLINE_IF(th__node_as_value(t, th__op_arg(t, op, 0, "input")) != w->dest);
    w->kind = TH__WRITE_FILL;
    w->source = th_node_int(t, 0);
    return th_trace_status(t);
}

/* ---- x[index] = value ---- */

/* The rank of x[indices] for one boolean mask, or for integer tensors only; -1 otherwise. */
static int64_t indexed_rank(const th_trace *t, const th_node *indices, uint32_t n, const th_type *x) {
    int64_t rank = 0;
    for (uint32_t i = 0; i < n; i++) {
        th_val v = th__node_as_value(t, indices[i]);
        const th_type *index = v ? type_of(t, v) : NULL;
        if (!index || index->kind != TH_TYPE_TENSOR || index->device != x->device) return -1;
        if (index->dtype == TH_BOOL) {
            bool mask = n == 1 && index->ndim > 0 && index->ndim <= x->ndim;
            return mask ? 1 + (int64_t)x->ndim - index->ndim : -1;
        }
        if (index->dtype != TH_I64) return -1;
        if (index->ndim > rank) rank = index->ndim;
    }
    return n <= x->ndim ? rank + x->ndim - n : -1;
}

/* indices: a TUPLE */
static th_status understand_put(const th_trace *t, th_node indices, th_node value, th__write *w) {
    const th_node_data *d = &t->nodes[indices];
    const th_type *x = type_of(t, w->dest);
    DECLINE_IF(d->count == 0 || !th__view_is_dense(&w->region));
    int64_t rank = indexed_rank(t, t->kids + d->u.kids, d->count, x);
    th_val source = th__node_as_value(t, value);
    DECLINE_IF(rank < 0 || !(source || is_number(t, value)));
    if (source) {
        const th_type *type = type_of(t, source);
        DECLINE_IF(type->kind != TH_TYPE_TENSOR || type->device != x->device || type->dtype != x->dtype);
        DECLINE_IF(type->ndim > rank);
    }
    w->kind = TH__WRITE_PUT;
    w->source = value;
    w->indices = indices;
    return TH_OK;
}

static th_status understand_setitem(th_trace *t, const th_op *op, th__write *w) {
    DECLINE_IF(t->nodes[op->args].count != 3 || op->kwargs || op->outs);
    DECLINE_IF(th__node_as_value(t, th__op_arg(t, op, 0, NULL)) != w->dest);
    th_node index = th__op_arg(t, op, 1, NULL), value = th__op_arg(t, op, 2, NULL);
    if (th__view_index(t, index, &w->region)) return from_source(t, value, w);
    if (t->nodes[index].kind != TH_N_TUPLE) index = th_node_seq(t, TH_N_TUPLE, 1, &index);
    return index ? understand_put(t, index, value, w) : th_trace_status(t);
}

/* index_put_(indices, values, accumulate=False) */
static th_status understand_index_put(th_trace *t, const th_op *op, th__write *w) {
    DECLINE_IF(th__node_as_value(t, th__op_arg(t, op, 0, "input")) != w->dest);
    th_node indices = th__op_arg(t, op, 1, "indices"), value = th__op_arg(t, op, 2, "values"),
            accumulate = th__op_arg(t, op, 3, "accumulate");
    DECLINE_IF(!indices || !value || !th__node_as_value(t, value));
    DECLINE_IF(accumulate && t->nodes[accumulate].kind != TH_N_BOOL);
    w->accumulate = accumulate && t->nodes[accumulate].u.i;
    th_node_data d = t->nodes[indices];
    if (d.kind == TH_N_LIST && d.count && d.count <= TH_MAX_RANK) { /* the pool may move while the tuple is made */
        th_node kids[TH_MAX_RANK];
        memcpy(kids, t->kids + d.u.kids, d.count * sizeof *kids);
        indices = th_node_seq(t, TH_N_TUPLE, d.count, kids);
        if (!indices) return th_trace_status(t);
    }
    return t->nodes[indices].kind == TH_N_TUPLE ? understand_put(t, indices, value, w) : TH_DECLINED;
}

/* ---- twins ---- */

static bool is_dest(const th_trace *t, th_node n, th_val dest) { return n && th__node_as_value(t, n) == dest; }

/* kwargs without one key; 0 when nothing is left. */
static th_node without(th_trace *t, th_node kwargs, const char *name) {
    th_node kept[2 * TH_MAX_PARAMS];
    uint32_t n = 0;
    for (uint32_t i = 0; i + 1 < t->nodes[kwargs].count && n < 2 * TH_MAX_PARAMS; i += 2) {
        th_node key = t->kids[t->nodes[kwargs].u.kids + i];
        if (strcmp(th_str_get(t->ctx, t->nodes[key].u.ref), name) == 0) continue;
        kept[n++] = key;
        kept[n++] = t->kids[t->nodes[kwargs].u.kids + i + 1];
    }
    return n ? th_node_seq(t, TH_N_DICT, n, kept) : 0;
}

/* args with one of them replaced by False. */
static th_node with_false(th_trace *t, th_node args, uint32_t at) {
    th_node kids[TH_MAX_PARAMS];
    uint32_t n = t->nodes[args].count;
    for (uint32_t i = 0; i < n; i++) kids[i] = t->kids[t->nodes[args].u.kids + i];
    kids[at] = th_node_bool(t, false);
    return th_node_seq(t, TH_N_TUPLE, n, kids);
}

/* "add_" in "torch.ops.aten.add_.Tensor": where the name ends, before its underscore; NULL when it has none. */
static const char *in_place_end(const char *callee) {
    const char *end = strstr(callee, "_.");
    size_t length = strlen(callee);
    if (strncmp(callee, "torch.ops.aten.", 15) == 0) return end;
    return length > 1 && callee[length - 1] == '_' && callee[length - 2] != '_' ? callee + length - 1 : NULL;
}

/* The twin of an in-place name that the catalogue has no `functional` for: the same name without its underscore. Sets
 * the name to call and returns the operator that knows the result's type. */
static const th_opdef *twin_by_name(const th_catalog *catalog, th_trace *t, const char *callee, th_str *name) {
    char text[200];
    const char *end = in_place_end(callee), *start = end;
    if (!end || strlen(callee) >= sizeof text - 20) return NULL;
    while (start > callee && start[-1] != '.') start--;
    snprintf(text, sizeof text, "torch.%.*s", (int)(end - start), start);
    const th_opdef *def = th_catalog_find(catalog, th_intern_z(t->ctx, text));
    if (strncmp(callee, "torch.ops.", 10) == 0) {
        snprintf(text, sizeof text, "%.*s%s", (int)(end - callee), callee, end + 1);
    } else if (!def) {
        snprintf(text, sizeof text, "torch.nn.functional.%.*s", (int)(end - start), start);
        def = th_catalog_find(catalog, th_intern_z(t->ctx, text));
    }
    *name = th_intern_z(t->ctx, text);
    return *name ? def : NULL;
}

/* The position of a parameter of an operator, and its name as text; UINT32_MAX when it has none such. */
static uint32_t param_index(const th_opdef *def, const char *name) {
    uint32_t at = 0;
    size_t length = strlen(name);
    for (const char *p = def->params; *p; at++) {
        if (strncmp(p, name, length) == 0 && strchr("=, ", p[length])) return at;
        p += strcspn(p, ",");
        p += strspn(p, ", ");
    }
    return UINT32_MAX;
}

/* f(x, inplace=True): the same call without it. */
static th_status drop_inplace(th_trace *t, const th_op *op, const th_opdef *def, th__write *w) {
    uint32_t at = param_index(def, "inplace");
    th_node flag = at != UINT32_MAX ? th__op_arg(t, op, at, "inplace") : 0;
    DECLINE_IF(!flag || t->nodes[flag].kind != TH_N_BOOL || !t->nodes[flag].u.i);
    DECLINE_IF(!is_dest(t, th__op_arg(t, op, 0, "input"), w->dest));
    if (at < t->nodes[op->args].count)
        w->args = with_false(t, op->args, at);
    else
        w->kwargs = without(t, op->kwargs, "inplace");
    return th_trace_status(t);
}

static th_status find_twin(const th_catalog *catalog, th_trace *t, const th_op *op, th__write *w,
                           const th_opdef **twin) {
    const th_opdef *def = th_catalog_find(catalog, op->callee);
    const char *callee = th_str_get(t->ctx, op->callee);
    th_node out = th__op_arg(t, op, UINT32_MAX, "out");
    w->callee = op->callee;
    w->args = op->args;
    w->kwargs = op->kwargs;
    *twin = def;
    if (out) {
        DECLINE_IF(!def || !is_dest(t, out, w->dest));
        w->kwargs = without(t, op->kwargs, "out");
        return th_trace_status(t);
    }
    if (def && !(def->effects & TH_OPDEF_INPLACE)) return drop_inplace(t, op, def, w);
    DECLINE_IF(!is_dest(t, th__op_arg(t, op, 0, "input"), w->dest));
    if (def && def->functional) {
        w->callee = th_intern_z(t->ctx, def->functional);
        *twin = th_catalog_find(catalog, w->callee);
    } else {
        *twin = twin_by_name(catalog, t, callee, &w->callee);
    }
    return w->callee ? TH_OK : th_ctx_error(t->ctx)->status;
}

/* A rule declines when memory runs out inside of it, too; here that must not look like an answer. */
static th_status ask_rule(const th_opdef *def, th_call *call) {
    th_error *error = &call->trace->ctx->error;
    error->status = TH_OK;
    th_status status = def->meta(call);
    return status == TH_DECLINED && error->status == TH_ENOMEM ? TH_ENOMEM : status;
}

/* Would torch refuse to write a result of the one kind to a tensor of the other? A float to integers, say. */
static bool loses_kind(th_dtype from, th_dtype to) {
    static const char order[] = "buifc"; /* integers with and without sign are one kind */
    const char *a = strchr(order, th__class(from)), *b = strchr(order, th__class(to));
    bool integers = a && b && (*a == 'u' || *a == 'i') && (*b == 'u' || *b == 'i');
    return !a || !b || (a > b && !integers);
}

static th_status understand_twin(const th_catalog *catalog, th_trace *t, const th_op *op, th__write *w) {
    const th_opdef *twin = NULL;
    DECLINE_IF(t->nodes[op->args].count > TH_MAX_PARAMS || t->nodes[op->kwargs].count > 2 * TH_MAX_PARAMS);
    TRY(find_twin(catalog, t, op, w, &twin));
    DECLINE_IF(!twin || !twin->meta || (twin->effects & (TH_OPDEF_INPLACE | TH_FX_STATE)));
    /* The defaults decide only results that could not be written to the destination. */
    th_call call = {.default_dtype = TH_F32, .default_device = th_device(t->ctx, "cpu", -1)};
    if (!call.default_device) return th_ctx_error(t->ctx)->status;
    TRY(th_call_bind(&call, twin, t, w->args, w->kwargs));
    TRY(ask_rule(twin, &call));
    DECLINE_IF(call.nouts != 1 || call.outs_list || call.outs[0].same || call.outs[0].alias_of);
    const th_type *type = th_type_get(t->ctx, call.outs[0].type), *dest = type_of(t, w->dest);
    DECLINE_IF(type->kind != TH_TYPE_TENSOR || type->device != dest->device || type->ndim != dest->ndim);
    DECLINE_IF(loses_kind((th_dtype)type->dtype, (th_dtype)dest->dtype));
    DECLINE_IF(type->ndim && memcmp(type->shape, dest->shape, type->ndim * sizeof *type->shape) != 0);
    th__view result = {.ndim = type->ndim};
    for (uint32_t i = 0; i < type->ndim; i++) result.shape[i] = type->shape[i], result.stride[i] = type->stride[i];
    DECLINE_IF(!th__view_is_dense(&result)); /* so that a conversion keeps its strides */
    w->type = call.outs[0].type;
    w->kind = TH__WRITE_TWIN;
    w->effects = op->effects & TH_FX_RANDOM;
    return TH_OK;
}

th_status th__write_understand(const th_catalog *catalog, th_trace *t, const th_op *op, th__write *out) {
    static const char *const copies[] = {"torch.Tensor.copy_", "torch.ops.aten.copy_.default", NULL};
    static const char *const fills[] = {"torch.Tensor.fill_", "torch.fill_", "torch.ops.aten.fill_.Scalar",
                                        "torch.ops.aten.fill_.Tensor", NULL};
    static const char *const zeros[] = {"torch.Tensor.zero_", "torch.zero_", "torch.ops.aten.zero_.default", NULL};
    static const char *const setitems[] = {"torch.Tensor.__setitem__", "operator.setitem", NULL};
    static const char *const puts[] = {"torch.Tensor.index_put_", "torch.index_put_",
                                       "torch.ops.aten.index_put_.default", NULL};
    *out = (th__write){.kind = TH__WRITE_UNKNOWN};
    DECLINE_IF(op->kind != TH_OP_CALL || op->callee_opaque || op->nwrites != 1 ||
               (op->effects & ~TH_FX_RANDOM) != TH_FX_WRITES);
    out->dest = t->kids[op->writes];
    DECLINE_IF(!th__view_of(t, out->dest, &out->region) || th__view_self_overlaps(&out->region));
    if (op->effects & TH_FX_RANDOM) return understand_twin(catalog, t, op, out);
    if (callee_is(t, op, copies)) return understand_copy(t, op, out);
    if (callee_is(t, op, fills)) return understand_fill(t, op, out);
    if (callee_is(t, op, zeros)) return understand_zero(t, op, out);
    if (callee_is(t, op, setitems)) return understand_setitem(t, op, out);
    if (callee_is(t, op, puts)) return understand_index_put(t, op, out);
    return understand_twin(catalog, t, op, out);
}
