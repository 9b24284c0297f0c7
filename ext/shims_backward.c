/* Lowering of what backward programs are made of to kernels of our own: small matrix products, sums, gradients of
 * parts, derivatives of activations and of layer_norm. By dotted name, as many are ATen's own. */
#include "shims.h"

#include "passes/pass.h"

#include <string.h>

enum { OWN_PRODUCT = 20000 }; /* multiply-adds: above, torch's matrix kernels win back the cost of calling them */

static th_val arg_value(const shape_op *s, uint32_t i) { return value_at(s, th__op_arg(s->l->t, s->op, i, NULL)); }

static const th_node_data *arg_data(const shape_op *s, uint32_t i, const char *name) {
    return data_of(s, th__op_arg(s->l->t, s->op, i, name));
}

static bool f32_cpu(const shape_op *s, th_val v) {
    const th_type *t = type_of(s, v);
    return v && t->kind == TH_TYPE_TENSOR && t->dtype == TH_F32 && t->ndim <= TH_TILE_RANK && th_type_numel(t) > 0 &&
           strcmp(th_device_type(s->l->x->ctx, t->device), "cpu") == 0;
}

/* ---- matrix products ---- */

typedef struct product_data {
    thx_instr_data head;
    uint32_t a, b, out;
    uint8_t dtype;
    fresh o;
    th_tile_product p;
} product_data;

static int run_product(th_frame *f, const th_instr *instr) {
    const product_data *d = instr->data;
    thx *x = f->user;
    const float *a = thx_shim_pointer(x, &f->slots[d->a]), *b = thx_shim_pointer(x, &f->slots[d->b]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    th_tile_matmul(&d->p, out, a, b);
    return 0;
}

/* torch's own product, without the road through Python. */
static int run_torch_product(th_frame *f, const th_instr *instr) {
    const product_data *d = instr->data;
    thx *x = f->user;
    th_h h = NULL, a = thx_slot_handle(x, &f->slots[d->a]), b = thx_slot_handle(x, &f->slots[d->b]);
    if (x->abi.aoti_torch_empty_strided(d->o.ndim, d->o.sizes, d->o.strides, x->abi.scalar_types[d->dtype], 0, 0, &h) ||
        (d->o.ndim == 3 ? x->abi.aoti_torch_cpu_bmm_out : x->abi.aoti_torch_cpu_mm_out)(h, a, b)) {
        if (h) x->abi.aoti_torch_delete_tensor_object(h);
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "torch refused a matrix product");
        return -1;
    }
    f->slots[d->out] = (th_slot){.handle = h, .owns_handle = true};
    return 0;
}

static bool float_cpu(const shape_op *s, th_val v) {
    const th_type *t = type_of(s, v);
    return v && t->kind == TH_TYPE_TENSOR && th_dtype_get((th_dtype)t->dtype)->class_ == 'f' &&
           strcmp(th_device_type(s->l->x->ctx, t->device), "cpu") == 0;
}

static int lower_torch_product(shape_op *s, th_opref o, th_val out) {
    th_val a = arg_value(s, 0), b = arg_value(s, 1);
    const thx_abi *abi = &s->l->x->abi;
    if (!float_cpu(s, a) || !float_cpu(s, b) || !float_cpu(s, out) || s->op->kwargs) return 0;
    const th_type *ta = type_of(s, a), *tb = type_of(s, b), *to = type_of(s, out);
    if (to->ndim > 3 || ta->dtype != to->dtype || tb->dtype != to->dtype || ta->ndim != to->ndim ||
        !(to->ndim == 3 ? abi->aoti_torch_cpu_bmm_out : abi->aoti_torch_cpu_mm_out))
        return 0;
    product_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    thx_shim_fresh(&d->o, to);
    d->dtype = to->dtype;
    d->a = thx_slot_for(s->l, a);
    d->b = thx_slot_for(s->l, b);
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_torch_product, &d->head, o);
}

static int lower_product(shape_op *s, th_opref o, th_val out) {
    th_val a = arg_value(s, 0), b = arg_value(s, 1);
    if (!f32_cpu(s, a) || !f32_cpu(s, b) || !thx_shim_small(s, out) || s->op->kwargs) return 0;
    const th_type *ta = type_of(s, a), *tb = type_of(s, b), *to = type_of(s, out);
    uint32_t n = ta->ndim;
    if ((n != 2 && n != 3) || tb->ndim != n || to->ndim != n || !to->contiguous) return 0;
    th_tile_product p = {.batch = n == 3 ? to->shape[0] : 1, .m = to->shape[n - 2], .n = to->shape[n - 1]};
    p.k = ta->shape[n - 1];
    if (tb->shape[n - 2] != p.k || (n == 3 && (ta->shape[0] != p.batch || tb->shape[0] != p.batch)) ||
        p.batch * p.m * p.n * p.k > OWN_PRODUCT)
        return 0;
    for (uint32_t i = 0; i < n; i++) p.a[3 - n + i] = ta->stride[i], p.b[3 - n + i] = tb->stride[i];
    product_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    d->p = p;
    thx_shim_fresh(&d->o, to);
    d->a = thx_slot_for(s->l, a);
    d->b = thx_slot_for(s->l, b);
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_product, &d->head, o);
}

/* ---- sums ---- */

typedef struct sum_data {
    thx_instr_data head;
    uint32_t x, out;
    fresh o;
    th_tile_reduction r;
} sum_data;

static int run_sum(th_frame *f, const th_instr *instr) {
    const sum_data *d = instr->data;
    thx *x = f->user;
    const float *in = thx_shim_pointer(x, &f->slots[d->x]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    th_tile_sum(&d->r, out, in);
    return 0;
}

/* Bits of the dimensions that are summed; 0: not told. */
static uint32_t summed(const shape_op *s, uint32_t ndim) {
    const th_node_data *d = arg_data(s, 1, "dim");
    uint32_t bits = 0;
    if (d->kind == TH_N_ABSENT || d->kind == TH_N_NONE) return (1u << ndim) - 1;
    bool list = d->kind == TH_N_TUPLE || d->kind == TH_N_LIST;
    for (uint32_t i = 0; i < (list ? d->count : 1); i++) {
        const th_node_data *dim = list ? data_of(s, s->l->t->kids[d->u.kids + i]) : d;
        if (dim->kind != TH_N_INT) return 0;
        int64_t at = dim->u.i + (dim->u.i < 0 ? ndim : 0);
        if (at < 0 || at >= ndim) return 0;
        bits |= 1u << at;
    }
    return bits;
}

static int lower_sum(shape_op *s, th_opref o, th_val out) {
    th_val x = arg_value(s, 0);
    if (!f32_cpu(s, x) || !thx_shim_small(s, x) || !thx_shim_small(s, out)) return 0;
    if (arg_data(s, 3, "dtype")->kind > TH_N_NONE) return 0;
    const th_type *tx = type_of(s, x), *to = type_of(s, out);
    uint32_t dims = tx->ndim ? summed(s, tx->ndim) : 0;
    int64_t count = th_type_numel(to), step = 1;
    if (!dims || !to->contiguous || count > TH_TILE_MAX_SUMS) return 0;
    sum_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    d->r.ndim = tx->ndim;
    d->r.count = count;
    for (uint32_t i = tx->ndim; i-- > 0;) {
        d->r.shape[i] = tx->shape[i];
        d->r.x[i] = tx->stride[i];
        d->r.o[i] = dims >> i & 1 ? 0 : step;
        step *= dims >> i & 1 ? 1 : tx->shape[i];
    }
    thx_shim_fresh(&d->o, to);
    d->x = thx_slot_for(s->l, x);
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_sum, &d->head, o);
}

/* ---- the gradient of a part: zeros around it ---- */

typedef struct part_data {
    thx_instr_data head;
    uint32_t x, out;
    int64_t offset, numel;
    fresh o;
    th_tile_map map;
} part_data;

static int run_part(th_frame *f, const th_instr *instr) {
    const part_data *d = instr->data;
    thx *x = f->user;
    const float *in = thx_shim_pointer(x, &f->slots[d->x]);
    float *out = thx_shim_allocate(x, f, &d->o, d->out);
    if (!out) return -1;
    memset(out, 0, sizeof *out * (size_t)d->numel);
    th_tile_map_run(&d->map, out + d->offset, in, NULL);
    return 0;
}

static bool int_at(const shape_op *s, uint32_t i, int64_t *out) {
    const th_node_data *d = arg_data(s, i, NULL);
    *out = d->kind == TH_N_INT ? d->u.i : 0;
    return d->kind == TH_N_INT;
}

/* select_backward(g, sizes, dim, index); slice_backward(g, sizes, dim, start, end, step) */
static int lower_part(shape_op *s, th_opref o, th_val out, bool slice) {
    th_val g = arg_value(s, 0);
    int64_t dim, start, step = 1;
    if (!f32_cpu(s, g) || !thx_shim_small(s, out) || !int_at(s, 2, &dim) || !int_at(s, 3, &start) ||
        (slice && (!int_at(s, 5, &step) || step < 1)))
        return 0;
    const th_type *tg = type_of(s, g), *to = type_of(s, out);
    dim += dim < 0 ? to->ndim : 0;
    if (dim < 0 || dim >= to->ndim || !to->contiguous || tg->ndim != (slice ? to->ndim : to->ndim - 1)) return 0;
    int64_t size = to->shape[dim], strides[TH_TILE_RANK];
    start += start < 0 ? size : 0;
    if (start < 0) start = 0;
    if (start >= size) return 0;
    uint32_t n = 0;
    for (uint32_t i = 0; i < to->ndim; i++)
        if (slice || i != dim) strides[n++] = to->stride[i] * (slice && i == dim ? step : 1);
    part_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    th_tile_map_init(&d->map, TH_TILE_COPY, tg->ndim, tg->shape, strides, tg->stride, NULL);
    d->offset = start * to->stride[dim];
    d->numel = th_type_numel(to);
    thx_shim_fresh(&d->o, to);
    d->x = thx_slot_for(s->l, g);
    d->out = thx_slot_for(s->l, out);
    return thx_shim_add(s->l, run_part, &d->head, o);
}

/* ---- activations ---- */

static int lower_activation(shape_op *s, th_opref o, th_val out, const char *name) {
    static const struct {
        const char *name;
        uint8_t op;
    } known[] = {{"threshold_backward", TH_TILE_RELU_BACKWARD},
                 {"tanh_backward", TH_TILE_TANH_BACKWARD},
                 {"sigmoid_backward", TH_TILE_SIGMOID_BACKWARD},
                 {"silu_backward", TH_TILE_SILU_BACKWARD},
                 {"gelu_backward", TH_TILE_GELU_BACKWARD}};
    th_val g = arg_value(s, 0), y = arg_value(s, 1);
    double threshold = 0;
    for (size_t i = 0; g && y && i < sizeof known / sizeof *known; i++) {
        if (strncmp(name, known[i].name, strlen(known[i].name)) != 0) continue;
        uint8_t op = known[i].op;
        if (op == TH_TILE_RELU_BACKWARD &&
            (!number_at(s, th__op_arg(s->l->t, s->op, 2, NULL), &threshold) || threshold != 0))
            return 0;
        if (op == TH_TILE_GELU_BACKWARD) {
            const th_node_data *mode = arg_data(s, UINT32_MAX, "approximate");
            const char *text = mode->kind == TH_N_STR ? th_str_get(s->l->x->ctx, mode->u.ref) : "none";
            if (strcmp(text, "tanh") == 0) op = TH_TILE_GELU_TANH_BACKWARD;
        }
        return thx_shim_map(s, o, (th_tile_op)op, g, y, 0, out);
    }
    return 0;
}

/* ---- layer_norm ---- */

typedef struct norm_data {
    thx_instr_data head;
    uint32_t x, w, b, g, mean, rstd, outs[3];
    int64_t rows, n;
    double eps;
    fresh o[3];
} norm_data;

static int run_norm(th_frame *f, const th_instr *instr) {
    const norm_data *d = instr->data;
    thx *x = f->user;
    const float *in = thx_shim_pointer(x, &f->slots[d->x]), *w = thx_shim_pointer(x, &f->slots[d->w]);
    const float *b = thx_shim_pointer(x, &f->slots[d->b]);
    float *out[3];
    for (int i = 0; i < 3; i++)
        if (!(out[i] = thx_shim_allocate(x, f, &d->o[i], d->outs[i]))) return -1;
    th_tile_layer_norm_stats(out[0], out[1], out[2], in, w, b, d->rows, d->n, d->eps);
    return 0;
}

static int run_norm_backward(th_frame *f, const th_instr *instr) {
    const norm_data *d = instr->data;
    thx *x = f->user;
    const float *in = thx_shim_pointer(x, &f->slots[d->x]), *w = thx_shim_pointer(x, &f->slots[d->w]);
    const float *g = thx_shim_pointer(x, &f->slots[d->g]), *mean = thx_shim_pointer(x, &f->slots[d->mean]);
    const float *rstd = thx_shim_pointer(x, &f->slots[d->rstd]);
    float *out[3];
    for (int i = 0; i < 3; i++)
        if (!(out[i] = thx_shim_allocate(x, f, &d->o[i], d->outs[i]))) return -1;
    th_tile_layer_norm_backward(out[0], out[1], out[2], g, in, mean, rstd, w, d->rows, d->n);
    return 0;
}

static bool plain_rows(const shape_op *s, th_val v, int64_t numel) {
    return f32_cpu(s, v) && type_of(s, v)->contiguous && th_type_numel(type_of(s, v)) == numel;
}

/* The three results; false when one is not used or not ours to make. */
static bool three_outs(const shape_op *s, th_val outs[3]) {
    const th_node_data *d = data_of(s, s->op->outs);
    if (d->kind != TH_N_TUPLE || d->count != 3) return false;
    for (uint32_t i = 0; i < 3; i++) {
        outs[i] = value_at(s, s->l->t->kids[d->u.kids + i]);
        if (!outs[i] || !thx_shim_small(s, outs[i]) || !type_of(s, outs[i])->contiguous) return false;
    }
    return true;
}

static bool row_length(const shape_op *s, uint32_t i, const th_type *t, int64_t *n) {
    const th_node_data *shape = arg_data(s, i, NULL);
    if ((shape->kind != TH_N_LIST && shape->kind != TH_N_TUPLE) || shape->count != 1 || !t->ndim) return false;
    *n = t->shape[t->ndim - 1];
    return *n > 0;
}

static bool all_true(const shape_op *s, const th_node_data *mask) {
    bool all = mask->kind == TH_N_LIST || mask->kind == TH_N_TUPLE;
    for (uint32_t i = 0; all && i < mask->count; i++) {
        const th_node_data *d = data_of(s, s->l->t->kids[mask->u.kids + i]);
        all = d->kind == TH_N_BOOL && d->u.i;
    }
    return all;
}

static int add_norm(shape_op *s, th_opref o, norm_data d, th_instr_fn run, const th_val outs[3]) {
    norm_data *copy = PyMem_Malloc(sizeof *copy);
    if (!copy) return PyErr_NoMemory(), -1;
    *copy = d;
    for (int i = 0; i < 3; i++) {
        thx_shim_fresh(&copy->o[i], type_of(s, outs[i]));
        copy->outs[i] = thx_slot_for(s->l, outs[i]);
    }
    return thx_shim_add(s->l, run, &copy->head, o);
}

/* native_layer_norm(x, shape, weight, bias, eps) */
static int lower_norm(shape_op *s, th_opref o) {
    th_val x = arg_value(s, 0), w = arg_value(s, 2), b = arg_value(s, 3), outs[3];
    norm_data d = {0};
    if (!thx_shim_small(s, x) || !three_outs(s, outs) || !row_length(s, 1, type_of(s, x), &d.n) ||
        !number_at(s, th__op_arg(s->l->t, s->op, 4, NULL), &d.eps) || !plain_rows(s, x, th_type_numel(type_of(s, x))) ||
        !plain_rows(s, w, d.n) || !plain_rows(s, b, d.n))
        return 0;
    d.rows = th_type_numel(type_of(s, x)) / d.n;
    d.x = thx_slot_for(s->l, x), d.w = thx_slot_for(s->l, w), d.b = thx_slot_for(s->l, b);
    return add_norm(s, o, d, run_norm, outs);
}

/* native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, mask) */
static int lower_norm_backward(shape_op *s, th_opref o) {
    th_val g = arg_value(s, 0), x = arg_value(s, 1), mean = arg_value(s, 3), rstd = arg_value(s, 4);
    th_val w = arg_value(s, 5), outs[3];
    norm_data d = {0};
    if (!thx_shim_small(s, x) || !three_outs(s, outs) || !row_length(s, 2, type_of(s, x), &d.n) ||
        !all_true(s, arg_data(s, 7, NULL)))
        return 0;
    int64_t numel = th_type_numel(type_of(s, x));
    d.rows = numel / d.n;
    if (!plain_rows(s, x, numel) || !plain_rows(s, g, numel) || !plain_rows(s, w, d.n) ||
        !plain_rows(s, mean, d.rows) || !plain_rows(s, rstd, d.rows))
        return 0;
    d.g = thx_slot_for(s->l, g), d.x = thx_slot_for(s->l, x), d.w = thx_slot_for(s->l, w);
    d.mean = thx_slot_for(s->l, mean), d.rstd = thx_slot_for(s->l, rstd);
    return add_norm(s, o, d, run_norm_backward, outs);
}

/* ---- all of it ---- */

int thx_lower_backward(shape_op *s, th_opref o) {
    const char *name = th_str_get(s->l->x->ctx, s->op->callee);
    th_val out = value_at(s, s->op->outs);
    if (out) {
        static const char *const products[] = {"torch.mm", "torch.bmm", "torch.ops.aten.mm.default",
                                               "torch.ops.aten.bmm.default"};
        for (int i = 0; i < 4; i++)
            if (strcmp(name, products[i]) == 0) {
                int rc = lower_product(s, o, out);
                return rc ? rc : lower_torch_product(s, o, out);
            }
        if (strcmp(name, "torch.sum") == 0 || strcmp(name, "torch.ops.aten.sum.dim_IntList") == 0)
            return lower_sum(s, o, out);
    }
    if (strncmp(name, "torch.ops.aten.", 15) != 0) return 0;
    name += 15;
    if (strcmp(name, "native_layer_norm.default") == 0) return lower_norm(s, o);
    if (strcmp(name, "native_layer_norm_backward.default") == 0) return lower_norm_backward(s, o);
    if (!out) return 0;
    if (strcmp(name, "slice_backward.default") == 0) return lower_part(s, o, out, true);
    if (strcmp(name, "select_backward.default") == 0) return lower_part(s, o, out, false);
    return lower_activation(s, o, out, name);
}
