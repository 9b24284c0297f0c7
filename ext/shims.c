/* Lowering by tensor handle: views, our kernels for small float32 tensors, and torch's C kernels.
 *
 * An instruction from here trusts the sizes and strides that the trace states. The first run of a plan checks every
 * result against them (callable.c); a plan that fails the check is lowered again without this file.
 */
#include "shims.h"

#include "passes/pass.h"

#include <math.h>
#include <string.h>

/* ---- reading the operation ---- */

static int param_index(const th_opdef *def, const char *name) {
    size_t n = strlen(name);
    int index = 0;
    for (const char *p = def->params; *p;) {
        while (*p == ' ' || *p == ',') p++;
        if (*p == '*' && (p[1] == ',' || p[1] == 0)) {
            p++;
            continue;
        }
        const char *start = p;
        while (*p && *p != ',') p++;
        size_t length = strcspn(start, "=, ");
        if (length == n && strncmp(start, name, n) == 0) return index;
        index++;
    }
    return -1;
}

static th_node param(const shape_op *s, const char *name) {
    int i = param_index(s->call.def, name);
    return i >= 0 && (uint32_t)i < s->call.nparams ? s->call.arg[i] : 0;
}

static bool absent(const shape_op *s, const char *name) {
    th_node n = param(s, name);
    return !n || data_of(s, n)->kind == TH_N_NONE;
}

/* Not given, None or False. */
static bool off(const shape_op *s, const char *name) {
    const th_node_data *d = data_of(s, param(s, name));
    return d->kind == TH_N_ABSENT || d->kind == TH_N_NONE || (d->kind == TH_N_BOOL && !d->u.i);
}

static bool is_cpu(const shape_op *s, const th_type *t) {
    return t->kind == TH_TYPE_TENSOR && strcmp(th_device_type(s->l->x->ctx, t->device), "cpu") == 0;
}

bool thx_shim_small(const shape_op *s, th_val v) {
    const th_type *t = type_of(s, v);
    return v && t->dtype == TH_F32 && is_cpu(s, t) && t->ndim <= TH_TILE_RANK && th_type_numel(t) <= THX_SMALL;
}

static bool returned(const thx_lowering *l, th_val v);

static int fail(const char *what) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_RuntimeError, "torch refused %s", what);
    return -1;
}

static void put_handle(th_frame *f, uint32_t slot, th_h h) {
    th_slot *s = &f->slots[slot];
    s->handle = h;
    s->owns_handle = true;
    s->object = NULL;
    s->owns_object = false;
}

const float *thx_shim_pointer(thx *x, th_slot *slot) {
    void *p = NULL;
    x->abi.aoti_torch_get_data_ptr(thx_slot_handle(x, slot), &p);
    return p;
}

float *thx_shim_allocate(thx *x, th_frame *f, const fresh *o, uint32_t slot) {
    th_h h = NULL;
    void *p = NULL;
    if (x->abi.aoti_torch_empty_strided(o->ndim, o->sizes, o->strides, x->abi.scalar_types[TH_F32], 0, 0, &h) ||
        x->abi.aoti_torch_get_data_ptr(h, &p)) {
        fail("to allocate a tensor");
        return NULL;
    }
    put_handle(f, slot, h);
    return p;
}

void thx_shim_fresh(fresh *o, const th_type *t) {
    o->ndim = t->ndim;
    memcpy(o->sizes, t->shape, sizeof(int64_t) * t->ndim);
    memcpy(o->strides, t->stride, sizeof(int64_t) * t->ndim);
}

int thx_shim_add(thx_lowering *l, th_instr_fn run, thx_instr_data *data, th_opref o) {
    data->free = PyMem_Free;
    l->nshim++;
    return thx_check(l->x, th_plan_add(l->plan, run, data, o)) < 0 ? -1 : 1;
}

/* ---- views ---- */

typedef struct view_data {
    thx_instr_data head;
    uint32_t from, to;
    int64_t ndim, offset, dims[]; /* sizes, then strides */
} view_data;

static int run_view(th_frame *f, const th_instr *instr) {
    const view_data *v = instr->data;
    thx *x = f->user;
    th_h h = NULL;
    if (x->abi.aoti_torch__reinterpret_tensor(thx_slot_handle(x, &f->slots[v->from]), v->ndim, v->dims,
                                              v->dims + v->ndim, v->offset, &h))
        return fail("to make a view");
    put_handle(f, v->to, h);
    return 0;
}

static bool is_view(const shape_op *s, th_val from, th_val to) {
    const th_value *a = &s->l->t->values[from], *b = &s->l->t->values[to];
    return a->alias && a->alias == b->alias && type_of(s, from)->dtype == type_of(s, to)->dtype && !returned(s->l, to);
}

static int emit_view(const shape_op *s, th_opref o, th_val from, th_val to) {
    const th_type *t = type_of(s, to);
    view_data *v = PyMem_Malloc(sizeof *v + sizeof(int64_t) * 2 * t->ndim);
    if (!v) return PyErr_NoMemory(), -1;
    v->ndim = t->ndim;
    v->offset = s->l->t->values[to].offset - s->l->t->values[from].offset;
    memcpy(v->dims, t->shape, sizeof(int64_t) * t->ndim);
    memcpy(v->dims + t->ndim, t->stride, sizeof(int64_t) * t->ndim);
    v->from = thx_slot_for(s->l, from);
    v->to = thx_slot_for(s->l, to);
    return thx_shim_add(s->l, run_view, &v->head, o);
}

static int lower_views(shape_op *s, th_opref o) {
    th_val from = value_at(s, s->call.arg[0]);
    if (!(s->call.def->effects & TH_OPDEF_VIEW) || !from || !s->l->x->abi.aoti_torch__reinterpret_tensor) return 0;
    const th_node_data *outs = data_of(s, s->op->outs);
    if (outs->kind == TH_N_VALUE) return is_view(s, from, outs->u.ref) ? emit_view(s, o, from, outs->u.ref) : 0;
    if (outs->kind != TH_N_TUPLE) return 0;
    for (uint32_t i = 0; i < outs->count; i++) {
        th_val to = value_at(s, s->l->t->kids[outs->u.kids + i]);
        if (!to || !is_view(s, from, to)) return 0;
    }
    for (uint32_t i = 0; i < outs->count; i++)
        if (emit_view(s, o, from, value_at(s, s->l->t->kids[outs->u.kids + i])) < 0) return -1;
    return 1;
}

/* ---- pointwise ---- */

typedef struct map_data {
    thx_instr_data head;
    uint32_t a, b, out;
    fresh o;
    th_tile_map map;
} map_data;

static int run_map(th_frame *f, const th_instr *instr) {
    const map_data *d = instr->data;
    thx *x = f->user;
    const float *a = d->map.scalar_at == 1 ? NULL : thx_shim_pointer(x, &f->slots[d->a]);
    const float *b = d->b == UINT32_MAX ? NULL : thx_shim_pointer(x, &f->slots[d->b]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    th_tile_map_run(&d->map, out, a, b);
    return 0;
}

static void broadcast_strides(const th_type *t, const th_type *to, int64_t *out) {
    uint32_t lead = to->ndim - t->ndim;
    for (uint32_t i = 0; i < to->ndim; i++) out[i] = i < lead || t->shape[i - lead] == 1 ? 0 : t->stride[i - lead];
}

/* a and b may be 0: then the scalar stands there. */
int thx_shim_map(shape_op *s, th_opref o, th_tile_op op, th_val a, th_val b, double scalar, th_val out) {
    const th_type *t = type_of(s, out);
    int64_t sa[TH_TILE_RANK] = {0}, sb[TH_TILE_RANK] = {0};
    if (!thx_shim_small(s, out) || (a && !thx_shim_small(s, a)) || (b && !thx_shim_small(s, b)) ||
        th_type_numel(t) == 0)
        return 0;
    if (a) broadcast_strides(type_of(s, a), t, sa);
    if (b) broadcast_strides(type_of(s, b), t, sb);
    map_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    bool two = op >= TH_TILE_BINARY;
    th_tile_map_init(&d->map, op, t->ndim, t->shape, t->stride, sa, two ? sb : NULL);
    d->map.scalar = (float)scalar;
    d->map.scalar_at = !a ? 1 : two && !b ? 2 : 0;
    thx_shim_fresh(&d->o, t);
    d->a = a ? thx_slot_for(s->l, a) : UINT32_MAX;
    d->b = b ? thx_slot_for(s->l, b) : UINT32_MAX;
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_map, &d->head, o);
}

static const struct {
    const char *name;
    uint8_t op;
} unary_ops[] = {
    {"neg", TH_TILE_NEG},         {"abs", TH_TILE_ABS},     {"relu", TH_TILE_RELU},
    {"sqrt", TH_TILE_SQRT},       {"rsqrt", TH_TILE_RSQRT}, {"reciprocal", TH_TILE_RECIPROCAL},
    {"exp", TH_TILE_EXP},         {"log", TH_TILE_LOG},     {"tanh", TH_TILE_TANH},
    {"sigmoid", TH_TILE_SIGMOID}, {"silu", TH_TILE_SILU},   {"sin", TH_TILE_SIN},
    {"cos", TH_TILE_COS},         {"erf", TH_TILE_ERF},     {"square", TH_TILE_SQUARE},
};
static const struct {
    const char *name;
    uint8_t op;
    bool swapped;
} binary_ops[] = {
    {"add", TH_TILE_ADD, false},         {"sub", TH_TILE_SUB, false},         {"mul", TH_TILE_MUL, false},
    {"div", TH_TILE_DIV, false},         {"rsub", TH_TILE_SUB, true},         {"rdiv", TH_TILE_DIV, true},
    {"maximum", TH_TILE_MAXIMUM, false}, {"minimum", TH_TILE_MINIMUM, false},
};

static int lower_pointwise(shape_op *s, th_opref o, th_val out) {
    const char *name = s->name;
    th_val a = value_at(s, s->call.arg[0]);
    for (size_t i = 0; a && i < sizeof unary_ops / sizeof *unary_ops; i++)
        if (strcmp(name, unary_ops[i].name) == 0)
            return off(s, "inplace") ? thx_shim_map(s, o, (th_tile_op)unary_ops[i].op, a, 0, 0, out) : 0;
    if (a && strcmp(name, "gelu") == 0) {
        const th_node_data *mode = data_of(s, param(s, "approximate"));
        const char *text = mode->kind == TH_N_STR ? th_str_get(s->l->x->ctx, mode->u.ref) : "none";
        bool doubles = s->l->x->facts & TH_FACT_GELU_DOUBLES && th_type_numel(type_of(s, out)) > 1;
        th_tile_op op = strcmp(text, "tanh") == 0 ? TH_TILE_GELU_TANH : doubles ? TH_TILE_GELU_DOUBLES : TH_TILE_GELU;
        return thx_shim_map(s, o, op, a, 0, 0, out);
    }
    double number = 0;
    if (a && strcmp(name, "pow") == 0)
        return s->call.nparams > 1 && number_at(s, s->call.arg[1], &number) && number == 2.0
                   ? thx_shim_map(s, o, TH_TILE_SQUARE, a, 0, 0, out)
                   : 0;
    for (size_t i = 0; i < sizeof binary_ops / sizeof *binary_ops; i++) {
        if (strcmp(name, binary_ops[i].name) != 0 || s->call.nparams < 2) continue;
        double alpha = 1;
        if ((!absent(s, "alpha") && !(number_at(s, param(s, "alpha"), &alpha) && alpha == 1)) ||
            !absent(s, "rounding_mode"))
            return 0;
        th_val b = value_at(s, s->call.arg[1]);
        bool sa = !a && number_at(s, s->call.arg[0], &number), sb = !b && number_at(s, s->call.arg[1], &number);
        if ((!a && !sa) || (!b && !sb) || (!a && !b)) return 0;
        return binary_ops[i].swapped ? thx_shim_map(s, o, (th_tile_op)binary_ops[i].op, b, a, number, out)
                                     : thx_shim_map(s, o, (th_tile_op)binary_ops[i].op, a, b, number, out);
    }
    return 0;
}

/* ---- copies ---- */

static int lower_copy(shape_op *s, th_opref o, th_val out) {
    static const char *const names[] = {"contiguous", "clone", "reshape", "flatten", "view", NULL};
    th_val a = value_at(s, s->call.arg[0]);
    bool known = false;
    for (int i = 0; names[i]; i++) known |= strcmp(s->name, names[i]) == 0;
    if (!known || !a || s->l->t->values[out].alias || !thx_shim_small(s, a) || !thx_shim_small(s, out)) return 0;
    const th_type *from = type_of(s, a), *to = type_of(s, out);
    bool same_shape = from->ndim == to->ndim && memcmp(from->shape, to->shape, sizeof(int64_t) * to->ndim) == 0;
    if ((!to->contiguous && !same_shape) || th_type_numel(from) != th_type_numel(to) || !th_type_numel(to)) return 0;
    map_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    int64_t rows[TH_TILE_RANK], step = 1; /* where the elements of `from` lie in a contiguous result */
    for (uint32_t i = from->ndim; i-- > 0; step *= from->shape[i]) rows[i] = step;
    th_tile_map_init(&d->map, TH_TILE_COPY, from->ndim, from->shape, same_shape ? to->stride : rows, from->stride,
                     NULL);
    thx_shim_fresh(&d->o, to);
    d->a = thx_slot_for(s->l, a);
    d->b = UINT32_MAX;
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_map, &d->head, o);
}

/* ---- cat ---- */

typedef struct cat_data {
    thx_instr_data head;
    uint32_t out, count;
    fresh o;
    struct {
        uint32_t slot;
        int64_t offset;
        th_tile_map map;
    } part[];
} cat_data;

static int run_cat(th_frame *f, const th_instr *instr) {
    const cat_data *d = instr->data;
    thx *x = f->user;
    const float *in[16];
    for (uint32_t i = 0; i < d->count; i++) in[i] = thx_shim_pointer(x, &f->slots[d->part[i].slot]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    for (uint32_t i = 0; i < d->count; i++) th_tile_map_run(&d->part[i].map, out + d->part[i].offset, in[i], NULL);
    return 0;
}

static int lower_cat(shape_op *s, th_opref o, th_val out) {
    const th_node_data *list = data_of(s, s->call.arg[0]), *dim = data_of(s, param(s, "dim"));
    const th_type *t = type_of(s, out);
    int64_t axis = dim->kind == TH_N_INT ? dim->u.i : 0;
    axis += axis < 0 ? t->ndim : 0;
    if ((list->kind != TH_N_TUPLE && list->kind != TH_N_LIST) || list->count > 16 || !thx_shim_small(s, out) ||
        !t->ndim || axis < 0 || axis >= t->ndim)
        return 0;
    for (uint32_t i = 0; i < list->count; i++) {
        th_val v = value_at(s, s->l->t->kids[list->u.kids + i]);
        if (!v || !thx_shim_small(s, v) || type_of(s, v)->ndim != t->ndim || !th_type_numel(type_of(s, v))) return 0;
    }
    cat_data *d = PyMem_Calloc(1, sizeof *d + sizeof d->part[0] * list->count);
    if (!d) return PyErr_NoMemory(), -1;
    int64_t at = 0;
    for (d->count = 0; d->count < list->count; d->count++) {
        th_val v = value_at(s, s->l->t->kids[list->u.kids + d->count]);
        const th_type *part = type_of(s, v);
        d->part[d->count].slot = thx_slot_for(s->l, v);
        d->part[d->count].offset = at * t->stride[axis];
        th_tile_map_init(&d->part[d->count].map, TH_TILE_COPY, part->ndim, part->shape, t->stride, part->stride, NULL);
        at += part->shape[axis];
    }
    thx_shim_fresh(&d->o, t);
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_cat, &d->head, o);
}

/* ---- attention ---- */

typedef struct attention_data {
    thx_instr_data head;
    uint32_t q, k, v, out;
    fresh o;
    th_tile_attention t;
} attention_data;

static int run_attention(th_frame *f, const th_instr *instr) {
    const attention_data *d = instr->data;
    thx *x = f->user;
    const float *q = thx_shim_pointer(x, &f->slots[d->q]), *k = thx_shim_pointer(x, &f->slots[d->k]),
                *v = thx_shim_pointer(x, &f->slots[d->v]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    th_tile_attention_run(&d->t, out, q, k, v);
    return 0;
}

static int lower_attention(shape_op *s, th_opref o, th_val out) {
    enum { MAX_KEYS = 1024 };
    th_val q = value_at(s, s->call.arg[0]), k = value_at(s, s->call.arg[1]), v = value_at(s, s->call.arg[2]);
    double dropout = 0, scale = 0;
    const th_node_data *causal = data_of(s, param(s, "is_causal"));
    if (!q || !k || !v || !absent(s, "attn_mask") || !off(s, "enable_gqa") || !thx_shim_small(s, out) ||
        !thx_shim_small(s, q) || !thx_shim_small(s, k) || !thx_shim_small(s, v) ||
        (number_at(s, param(s, "dropout_p"), &dropout) && dropout != 0))
        return 0;
    const th_type *tq = type_of(s, q), *tk = type_of(s, k), *tv = type_of(s, v), *to = type_of(s, out);
    if (tq->ndim != 4 || tk->ndim != 4 || tv->ndim != 4 || to->ndim != 4 || !th_type_numel(to) || !th_type_numel(tk) ||
        tk->shape[2] > MAX_KEYS || tq->shape[3] != tk->shape[3] || tq->shape[0] != tk->shape[0] ||
        tq->shape[1] != tk->shape[1] || tv->shape[0] != tk->shape[0] || tv->shape[1] != tk->shape[1] ||
        tv->shape[2] != tk->shape[2] ||
        tq->shape[0] * tq->shape[1] * tq->shape[2] * tk->shape[2] * (tq->shape[3] + tv->shape[3]) > THX_SMALL_PRODUCT)
        return 0;
    if (!number_at(s, param(s, "scale"), &scale)) scale = 1.0 / sqrt((double)tq->shape[3]);
    if (!(scale > 0)) return 0; /* torch's kernels scale after they mask: not a number, where this would have one */
    attention_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    th_tile_attention *t = &d->t;
    t->batch = tq->shape[0], t->heads = tq->shape[1], t->rows = tq->shape[2], t->keys = tk->shape[2];
    t->depth = tq->shape[3], t->width = tv->shape[3], t->scale = (float)scale;
    t->causal = causal->kind == TH_N_BOOL && causal->u.i;
    memcpy(t->q, tq->stride, sizeof t->q);
    memcpy(t->k, tk->stride, sizeof t->k);
    memcpy(t->v, tv->stride, sizeof t->v);
    memcpy(t->o, to->stride, sizeof t->o);
    thx_shim_fresh(&d->o, to);
    d->q = thx_slot_for(s->l, q), d->k = thx_slot_for(s->l, k), d->v = thx_slot_for(s->l, v);
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_attention, &d->head, o);
}

/* ---- embedding ---- */

typedef struct embedding_data {
    thx_instr_data head;
    uint32_t index, table, out;
    int64_t count, size, n;
    fresh o;
} embedding_data;

static int run_embedding(th_frame *f, const th_instr *instr) {
    const embedding_data *d = instr->data;
    thx *x = f->user;
    const void *index = thx_shim_pointer(x, &f->slots[d->index]);
    const float *table = thx_shim_pointer(x, &f->slots[d->table]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    if (th_tile_embedding(out, index, d->count, table, d->size, d->n) < 0) return 0;
    PyErr_SetString(PyExc_IndexError, "index out of range in self");
    return -1;
}

static int lower_embedding(shape_op *s, th_opref o, th_val out) {
    th_val index = value_at(s, s->call.arg[0]), table = value_at(s, s->call.arg[1]);
    if (!index || !table || !absent(s, "max_norm") || !thx_shim_small(s, out) || !type_of(s, out)->contiguous) return 0;
    const th_type *ti = type_of(s, index), *tt = type_of(s, table);
    if (ti->dtype != TH_I64 || !ti->contiguous || !is_cpu(s, ti) || tt->dtype != TH_F32 || !tt->contiguous ||
        !is_cpu(s, tt) || tt->ndim != 2 || !th_type_numel(type_of(s, out)))
        return 0;
    embedding_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    d->count = th_type_numel(ti), d->size = tt->shape[0], d->n = tt->shape[1];
    thx_shim_fresh(&d->o, type_of(s, out));
    d->index = thx_slot_for(s->l, index), d->table = thx_slot_for(s->l, table), d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_embedding, &d->head, o);
}

/* ---- rows ---- */

typedef struct rows_data {
    thx_instr_data head;
    uint8_t kind; /* 'l' linear, 'n' layer_norm, 's' softmax, 'm' mean */
    uint32_t x, w, b, out;
    int64_t rows, n, k;
    double eps;
    fresh o;
} rows_data;

static int run_rows(th_frame *f, const th_instr *instr) {
    const rows_data *d = instr->data;
    thx *x = f->user;
    const float *in = thx_shim_pointer(x, &f->slots[d->x]);
    const float *w = d->w == UINT32_MAX ? NULL : thx_shim_pointer(x, &f->slots[d->w]);
    const float *b = d->b == UINT32_MAX ? NULL : thx_shim_pointer(x, &f->slots[d->b]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    switch (d->kind) {
    case 'l': th_tile_linear(out, in, w, b, d->rows, d->n, d->k); break;
    case 'n': th_tile_layer_norm(out, in, w, b, d->rows, d->n, d->eps); break;
    case 's': th_tile_softmax(out, in, d->rows, d->n); break;
    default: th_tile_mean_rows(out, in, d->rows, d->n);
    }
    return 0;
}

static int emit_rows(shape_op *s, th_opref o, rows_data d, th_val x, th_val w, th_val b, th_val out) {
    rows_data *copy = PyMem_Malloc(sizeof *copy);
    if (!copy) return PyErr_NoMemory(), -1;
    *copy = d;
    thx_shim_fresh(&copy->o, type_of(s, out));
    copy->x = thx_slot_for(s->l, x);
    copy->w = w ? thx_slot_for(s->l, w) : UINT32_MAX;
    copy->b = b ? thx_slot_for(s->l, b) : UINT32_MAX;
    copy->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_rows, &copy->head, o);
}

static bool row_input(const shape_op *s, th_val v) {
    return v && thx_shim_small(s, v) && type_of(s, v)->contiguous && th_type_numel(type_of(s, v)) > 0;
}

static bool vector_of(const shape_op *s, th_val v, int64_t n) {
    const th_type *t = type_of(s, v);
    return v && t->dtype == TH_F32 && is_cpu(s, t) && t->ndim == 1 && t->shape[0] == n && t->contiguous;
}

static int lower_linear(shape_op *s, th_opref o, th_val out) {
    th_val x = value_at(s, s->call.arg[0]), w = value_at(s, s->call.arg[1]), b = value_at(s, param(s, "bias"));
    if (!row_input(s, x) || !w || !thx_shim_small(s, out) || !type_of(s, out)->contiguous) return 0;
    const th_type *tx = type_of(s, x), *tw = type_of(s, w);
    if (tw->ndim != 2 || tw->dtype != TH_F32 || !tw->contiguous || !is_cpu(s, tw) || !tx->ndim) return 0;
    int64_t k = tw->shape[1], n = tw->shape[0], rows = th_type_numel(tx) / (k ? k : 1);
    if (tx->shape[tx->ndim - 1] != k || rows * n * k > THX_SMALL_PRODUCT || !rows || !n || !k ||
        (!b && !absent(s, "bias")) || (b && !vector_of(s, b, n)))
        return 0;
    return emit_rows(s, o, (rows_data){.kind = 'l', .rows = rows, .n = n, .k = k}, x, w, b, out);
}

static int lower_layer_norm(shape_op *s, th_opref o, th_val out) {
    th_val x = value_at(s, s->call.arg[0]), w = value_at(s, param(s, "weight")), b = value_at(s, param(s, "bias"));
    const th_node_data *shape = data_of(s, param(s, "normalized_shape"));
    double eps = 1e-5;
    if (!row_input(s, x) || !thx_shim_small(s, out) || !type_of(s, out)->contiguous || shape->count != 1 ||
        (shape->kind != TH_N_TUPLE && shape->kind != TH_N_LIST) || (!w && !absent(s, "weight")) ||
        (!b && !absent(s, "bias")) || (!absent(s, "eps") && !number_at(s, param(s, "eps"), &eps)))
        return 0;
    const th_type *t = type_of(s, x);
    int64_t n = t->ndim ? t->shape[t->ndim - 1] : 0;
    if (!n || (w && !vector_of(s, w, n)) || (b && !vector_of(s, b, n))) return 0;
    return emit_rows(s, o, (rows_data){.kind = 'n', .rows = th_type_numel(t) / n, .n = n, .eps = eps}, x, w, b, out);
}

/* dim names the last dimension, alone. */
static bool last_dim(const shape_op *s, th_node n, uint32_t ndim) {
    const th_node_data *d = data_of(s, n);
    if ((d->kind == TH_N_TUPLE || d->kind == TH_N_LIST) && d->count == 1) d = data_of(s, s->l->t->kids[d->u.kids]);
    return n && d->kind == TH_N_INT && (d->u.i == -1 || d->u.i == (int64_t)ndim - 1);
}

static int lower_reduction(shape_op *s, th_opref o, th_val out) {
    bool mean = strcmp(s->name, "mean") == 0;
    th_val x = value_at(s, s->call.arg[0]);
    if ((!mean && strcmp(s->name, "softmax") != 0) || !row_input(s, x) || !thx_shim_small(s, out) ||
        !type_of(s, out)->contiguous || !absent(s, "dtype"))
        return 0;
    const th_type *t = type_of(s, x);
    if (!t->ndim || !last_dim(s, param(s, "dim"), t->ndim)) return 0;
    int64_t n = t->shape[t->ndim - 1];
    return emit_rows(s, o, (rows_data){.kind = mean ? 'm' : 's', .rows = th_type_numel(t) / n, .n = n}, x, 0, 0, out);
}

/* ---- all of it ---- */

static bool returned(const thx_lowering *l, th_val v) {
    const th_node_data *d = &l->t->nodes[l->t->result];
    if (d->kind == TH_N_VALUE) return d->u.ref == v;
    for (uint32_t i = 0; d->kind == TH_N_TUPLE && i < d->count; i++) {
        const th_node_data *kid = &l->t->nodes[l->t->kids[d->u.kids + i]];
        if (kid->kind == TH_N_VALUE && kid->u.ref == v) return true;
    }
    return false;
}

/* A view that the catalogue does not know: where its elements lie was recorded. */
static int lower_recorded_view(shape_op *s, th_opref o) {
    th_val from = value_at(s, th__op_arg(s->l->t, s->op, 0, NULL)), to = value_at(s, s->op->outs);
    bool aten = strncmp(th_str_get(s->l->x->ctx, s->op->callee), "torch.ops.aten.", 15) == 0;
    const char *name = th_str_get(s->l->x->ctx, s->op->callee);
    if (strstr(name, "conj") || strstr(name, "neg_view")) return 0; /* bits beside the metadata */
    if (!aten || !from || !to || !s->l->x->abi.aoti_torch__reinterpret_tensor) return 0;
    return is_view(s, from, to) ? emit_view(s, o, from, to) : 0;
}

int thx_lower_shim(thx_lowering *l, th_opref o) {
    thx *x = l->x;
    const th_op *op = &l->t->ops[o];
    if (!x->abi.shims || l->plain || op->callee_opaque || op->effects || !op->outs) return 0;
    const th_opdef *def = th_catalog_find(x->catalog, op->callee);
    shape_op s = {.l = l, .op = op};
    int done = def ? 0 : lower_recorded_view(&s, o);
    if (!done) done = thx_lower_backward(&s, o);
    if (done) return done;
    if (!def || (def->effects & (TH_OPDEF_INPLACE | TH_FX_RANDOM)) ||
        th_call_bind(&s.call, def, (th_trace *)l->t, op->args, op->kwargs) != TH_OK)
        return 0;
    s.call.def = def;
    s.name = strncmp(def->name, "functional.", 11) == 0 ? def->name + 11 : def->name;
    if (!s.call.nparams) return 0;
    int rc = lower_views(&s, o);
    th_val out = value_at(&s, op->outs);
    if (rc || !out) return rc;
    if (strcmp(s.name, "linear") == 0) return lower_linear(&s, o, out);
    if (strcmp(s.name, "layer_norm") == 0) return lower_layer_norm(&s, o, out);
    if (strcmp(s.name, "cat") == 0) return lower_cat(&s, o, out);
    if (strcmp(s.name, "scaled_dot_product_attention") == 0) return lower_attention(&s, o, out);
    if (strcmp(s.name, "embedding") == 0) return lower_embedding(&s, o, out);
    rc = lower_pointwise(&s, o, out);
    if (!rc) rc = lower_copy(&s, o, out);
    return rc ? rc : lower_reduction(&s, o, out);
}
