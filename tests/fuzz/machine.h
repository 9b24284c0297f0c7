/* A tiny machine that executes traces over int64 tensors of at most 64 elements: the oracle of fuzz_passes.
 *
 * It knows a dozen operations with torch's meaning, storages, views and tensor objects, computes the geometry of every
 * view itself and compares it with the annotation, and checks who shares storage against the alias groups. Nothing in
 * it is taken from the passes.
 */
#ifndef THUNDER_TESTS_MACHINE_H
#define THUNDER_TESTS_MACHINE_H

#include "thunder/thunder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MACHINE_DIMS = 4, MACHINE_ELEMENTS = 64, MACHINE_STORAGES = 400, MACHINE_LOG = 200 };

typedef struct machine_view {
    uint32_t ndim;
    int64_t shape[MACHINE_DIMS + 1], stride[MACHINE_DIMS + 1], offset;
} machine_view;

typedef struct machine_cell { /* what a value holds */
    enum { CELL_NONE, CELL_TENSOR, CELL_INT, CELL_DELETED } kind;
    uint32_t storage, object;
    machine_view view;
    int64_t number;
} machine_cell;

typedef struct machine {
    const th_trace *t;
    machine_cell *cells;               /* by th_val */
    int64_t (*data)[MACHINE_ELEMENTS]; /* by storage */
    int64_t *sizes;
    uint32_t nstorages, nobjects, draws;
    uint64_t log[MACHINE_LOG];
    uint32_t nlog;
    const th_op *op;
} machine;

static inline void machine_require(const machine *m, bool holds, const char *what) {
    char *text = NULL;
    if (holds) return;
    th_trace_print(m->t, &text, NULL);
    fprintf(stderr, "machine: %s at %s\n%s", what, m->op ? th_str_get(m->t->ctx, m->op->callee) : "?",
            text ? text : "");
    abort();
}

/* ---- views ---- */

static inline machine_view machine_type(const machine *m, th_val v) {
    const th_type *type = th_type_get(m->t->ctx, m->t->values[v].type);
    machine_view view = {.ndim = type->ndim, .offset = m->t->values[v].offset};
    machine_require(m, type->kind == TH_TYPE_TENSOR && type->ndim <= MACHINE_DIMS, "a tensor of the machine's ranks");
    for (uint32_t i = 0; i < type->ndim; i++) view.shape[i] = type->shape[i], view.stride[i] = type->stride[i];
    return view;
}

static inline int64_t machine_count(const machine_view *v) {
    int64_t n = 1;
    for (uint32_t i = 0; i < v->ndim; i++) n *= v->shape[i];
    return n;
}

/* Offset of the n-th element in row-major order. */
static inline int64_t machine_at(const machine_view *v, int64_t n) {
    int64_t at = v->offset;
    for (uint32_t i = v->ndim; i-- > 0;) {
        at += n % v->shape[i] * v->stride[i];
        n /= v->shape[i];
    }
    return at;
}

static inline bool machine_same(const machine_view *a, const machine_view *b) {
    bool same = a->ndim == b->ndim && a->offset == b->offset;
    for (uint32_t i = 0; same && i < a->ndim; i++) same = a->shape[i] == b->shape[i] && a->stride[i] == b->stride[i];
    return same;
}

static inline bool machine_fits(const machine_view *v, int64_t size) {
    int64_t last = v->offset;
    for (uint32_t i = 0; i < v->ndim; i++) last += (v->shape[i] - 1) * v->stride[i];
    return machine_count(v) == 0 || (v->offset >= 0 && last < size);
}

static inline void machine_drop_dim(machine_view *v, uint32_t dim) {
    for (uint32_t i = dim; i + 1 < v->ndim; i++) v->shape[i] = v->shape[i + 1], v->stride[i] = v->stride[i + 1];
    v->ndim--;
}

static inline machine_view machine_expand(const machine *m, const machine_view *from, uint32_t ndim,
                                          const int64_t *shape) {
    machine_view to = {.ndim = ndim, .offset = from->offset};
    machine_require(m, from->ndim <= ndim, "expand to fewer dimensions");
    for (uint32_t i = ndim; i-- > 0;) {
        uint32_t missing = ndim - from->ndim;
        to.shape[i] = shape[i];
        if (i < missing) { /* torch: a new dimension of size 1 gets a stride as if it were contiguous */
            bool outer = from->ndim != 0 && shape[i] == 1;
            to.stride[i] = outer ? to.shape[i + 1] * to.stride[i + 1] : 0;
            continue;
        }
        machine_require(m, from->shape[i - missing] == shape[i] || from->shape[i - missing] == 1, "shapes broadcast");
        to.stride[i] = from->shape[i - missing] == shape[i] ? from->stride[i - missing] : 0;
    }
    return to;
}

/* ---- reading arguments ---- */

static inline const th_node_data *machine_node(const machine *m, uint32_t i) {
    const th_node_data *args = &m->t->nodes[m->op->args];
    machine_require(m, i < args->count, "an argument is there");
    return &m->t->nodes[m->t->kids[args->u.kids + i]];
}

static inline machine_cell *machine_value(const machine *m, const th_node_data *node) {
    machine_require(m, node->kind == TH_N_VALUE, "an argument is a value");
    machine_cell *cell = &m->cells[node->u.ref];
    machine_require(m, cell->kind == CELL_TENSOR || cell->kind == CELL_INT, "a value is alive");
    return cell;
}

static inline int64_t machine_int_of(const machine *m, const th_node_data *node) {
    if (node->kind == TH_N_INT || node->kind == TH_N_BOOL) return node->u.i;
    machine_cell *cell = machine_value(m, node);
    machine_require(m, cell->kind == CELL_INT, "an int");
    return cell->number;
}

static inline int64_t machine_int(const machine *m, uint32_t i) { return machine_int_of(m, machine_node(m, i)); }

static inline machine_cell *machine_tensor(const machine *m, uint32_t i) {
    machine_cell *cell = machine_value(m, machine_node(m, i));
    machine_require(m, cell->kind == CELL_TENSOR, "a tensor");
    return cell;
}

static inline uint32_t machine_ints(const machine *m, uint32_t i, int64_t out[MACHINE_DIMS]) {
    const th_node_data *seq = machine_node(m, i);
    machine_require(m, seq->kind == TH_N_TUPLE && seq->count <= MACHINE_DIMS, "a short tuple of ints");
    for (uint32_t k = 0; k < seq->count; k++) out[k] = machine_int_of(m, &m->t->nodes[m->t->kids[seq->u.kids + k]]);
    return seq->count;
}

/* Element n of an operand that broadcasts to `shape`: a tensor or an int. */
static inline int64_t machine_element(const machine *m, const th_node_data *node, const machine_view *shape,
                                      int64_t n) {
    if (node->kind != TH_N_VALUE || m->cells[node->u.ref].kind == CELL_INT) return machine_int_of(m, node);
    machine_cell *cell = machine_value(m, node);
    machine_view view = machine_expand(m, &cell->view, shape->ndim, shape->shape);
    int64_t at = machine_at(&view, n);
    machine_require(m, at >= 0 && at < m->sizes[cell->storage], "a read stays in its storage");
    return m->data[cell->storage][at];
}

/* ---- results ---- */

static inline uint32_t machine_storage(machine *m, int64_t size) {
    machine_require(m, m->nstorages < MACHINE_STORAGES && size <= MACHINE_ELEMENTS, "room for a storage");
    m->sizes[m->nstorages] = size;
    memset(m->data[m->nstorages], 0, sizeof m->data[0]);
    return m->nstorages++;
}

static inline th_val machine_out(const machine *m) {
    const th_node_data *out = &m->t->nodes[m->op->outs];
    return out->kind == TH_N_VALUE ? out->u.ref : 0;
}

static inline void machine_define(machine *m, th_val v, uint32_t storage, const machine_view *view, uint32_t object) {
    machine_view said = machine_type(m, v);
    machine_require(m, machine_same(&said, view), "the annotation tells the geometry");
    machine_require(m, machine_fits(view, m->sizes[storage]), "a view stays in its storage");
    m->cells[v] = (machine_cell){.kind = CELL_TENSOR, .storage = storage, .view = *view, .object = object};
    for (th_val w = 1; w < m->t->nvalues; w++) {
        if (w == v || m->cells[w].kind != CELL_TENSOR) continue;
        bool group = m->t->values[v].alias && m->t->values[v].alias == m->t->values[w].alias;
        machine_require(m, group == (m->cells[w].storage == storage), "alias groups tell who shares storage");
    }
}

/* A new tensor as annotated: dense, at the start of a storage of its own. */
static inline machine_cell *machine_fresh(machine *m) {
    th_val v = machine_out(m);
    machine_view view = machine_type(m, v);
    machine_require(m, view.offset == 0, "a new tensor starts at 0");
    machine_define(m, v, machine_storage(m, machine_count(&view)), &view, m->nobjects++);
    return &m->cells[v];
}

/* ---- operations ---- */

typedef int64_t (*machine_fn)(int64_t a, int64_t b);
static inline int64_t machine_add(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
static inline int64_t machine_sub(int64_t a, int64_t b) { return (int64_t)((uint64_t)a - (uint64_t)b); }
static inline int64_t machine_mul(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }
static inline int64_t machine_neg(int64_t a, int64_t b) { return (void)b, (int64_t)(0 - (uint64_t)a); }
static inline int64_t machine_first(int64_t a, int64_t b) { return (void)b, a; }
static inline int64_t machine_second(int64_t a, int64_t b) { return (void)a, b; }
static inline int64_t machine_zero(int64_t a, int64_t b) { return (void)a, (void)b, 0; }

/* fn over argument a (and b), into the elements of a view, one after the other: where a write overlaps what is still to
 * be read, order shows, as it does in torch. */
static inline void machine_apply(machine *m, machine_fn fn, uint32_t a, uint32_t b, uint32_t storage,
                                 const machine_view *to) {
    int64_t n = machine_count(to);
    machine_require(m, n <= MACHINE_ELEMENTS, "few elements");
    for (int64_t i = 0; i < n; i++) {
        int64_t x = machine_element(m, machine_node(m, a), to, i);
        m->data[storage][machine_at(to, i)] = fn(x, b != a ? machine_element(m, machine_node(m, b), to, i) : 0);
    }
}

static inline void machine_view_op(machine *m, const machine_view *view) {
    machine_define(m, machine_out(m), machine_tensor(m, 0)->storage, view, m->nobjects++);
}

/* Basic indexing with ints and slices. */
static inline machine_view machine_index(const machine *m, machine_view v, const th_node_data *index) {
    const th_node *entries = m->t->kids + index->u.kids;
    uint32_t count = index->kind == TH_N_TUPLE ? index->count : 1, dim = 0;
    for (uint32_t i = 0; i < count; i++) {
        const th_node_data *entry = index->kind == TH_N_TUPLE ? &m->t->nodes[entries[i]] : index;
        machine_require(m, dim < v.ndim, "an index for each dimension at most");
        if (entry->kind == TH_N_INT) {
            v.offset += (entry->u.i < 0 ? entry->u.i + v.shape[dim] : entry->u.i) * v.stride[dim];
            machine_drop_dim(&v, dim);
            continue;
        }
        int64_t part[3] = {0, v.shape[dim], 1};
        machine_require(m, entry->kind == TH_N_SLICE, "an int or a slice");
        for (int k = 0; k < 3; k++) {
            const th_node_data *p = &m->t->nodes[m->t->kids[entry->u.kids + k]];
            if (p->kind == TH_N_INT) part[k] = p->u.i;
        }
        for (int k = 0; k < 2; k++) {
            if (part[k] < 0) part[k] += v.shape[dim];
            if (part[k] < 0) part[k] = 0;
            if (part[k] > v.shape[dim]) part[k] = v.shape[dim];
        }
        int64_t count_here = 0;
        for (int64_t at = part[0]; at < part[1]; at += part[2]) count_here++;
        v.offset += part[0] * v.stride[dim];
        v.stride[dim] *= part[2];
        v.shape[dim++] = count_here;
    }
    return v;
}

static inline bool machine_views(machine *m, const char *name) {
    machine_view v = m->t->nodes[m->op->args].count && machine_node(m, 0)->kind == TH_N_VALUE
                         ? machine_value(m, machine_node(m, 0))->view
                         : (machine_view){0};
    if (strcmp(name, "torch.narrow") == 0) {
        int64_t dim = machine_int(m, 1);
        v.offset += machine_int(m, 2) * v.stride[dim];
        v.shape[dim] = machine_int(m, 3);
    } else if (strcmp(name, "torch.transpose") == 0) {
        int64_t a = machine_int(m, 1), b = machine_int(m, 2), shape = v.shape[a], stride = v.stride[a];
        v.shape[a] = v.shape[b], v.stride[a] = v.stride[b];
        v.shape[b] = shape, v.stride[b] = stride;
    } else if (strcmp(name, "torch.select") == 0) {
        int64_t dim = machine_int(m, 1);
        v.offset += machine_int(m, 2) * v.stride[dim];
        machine_drop_dim(&v, (uint32_t)dim);
    } else if (strcmp(name, "torch.Tensor.__getitem__") == 0) {
        v = machine_index(m, v, machine_node(m, 1));
    } else if (strcmp(name, "torch.Tensor.expand") == 0) {
        int64_t shape[MACHINE_DIMS];
        uint32_t ndim = machine_ints(m, 1, shape);
        v = machine_expand(m, &v, ndim, shape);
    } else if (strcmp(name, "torch.as_strided") == 0) {
        v.ndim = machine_ints(m, 1, v.shape);
        machine_ints(m, 2, v.stride);
        if (m->t->nodes[m->op->args].count > 3) v.offset = machine_int(m, 3);
    } else {
        return false;
    }
    machine_view_op(m, &v);
    return true;
}

static inline bool machine_pure(machine *m, const char *name) {
    static const struct {
        const char *name;
        machine_fn fn;
        uint32_t b;
    } known[] = {{"torch.add", machine_add, 1}, {"torch.sub", machine_sub, 1},     {"torch.mul", machine_mul, 1},
                 {"torch.neg", machine_neg, 0}, {"torch.clone", machine_first, 0}, {"torch.full", machine_second, 1}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name) != 0) continue;
        machine_cell *out = machine_fresh(m);
        bool full = known[i].fn == machine_second; /* its first argument is the shape */
        machine_apply(m, full ? machine_first : known[i].fn, full, full ? 1 : known[i].b, out->storage, &out->view);
        return true;
    }
    return false;
}

static inline bool machine_writes(machine *m, const char *name) {
    static const struct {
        const char *name;
        machine_fn fn;
        uint32_t b;
    } known[] = {{"torch.Tensor.add_", machine_add, 1},         {"torch.Tensor.sub_", machine_sub, 1},
                 {"torch.Tensor.mul_", machine_mul, 1},         {"torch.Tensor.neg_", machine_neg, 0},
                 {"torch.Tensor.copy_", machine_second, 1},     {"torch.Tensor.fill_", machine_second, 1},
                 {"torch.Tensor.zero_", machine_zero, 0},       {"torch.Tensor.unknown_", machine_add, 1},
                 {"torch.Tensor.__setitem__", machine_first, 2}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name) != 0) continue;
        machine_cell dest = *machine_tensor(m, 0);
        bool item = known[i].b == 2;
        machine_view to = item ? machine_index(m, dest.view, machine_node(m, 1)) : dest.view;
        machine_apply(m, known[i].fn, item ? 2 : 0, known[i].b, dest.storage, &to);
        if (m->op->outs) machine_define(m, machine_out(m), dest.storage, &dest.view, dest.object);
        return true;
    }
    return false;
}

/* The storage is copied whole, as torch does it. */
static inline void machine_scatter(machine *m) {
    machine_cell base = *machine_tensor(m, 0);
    machine_view to = {0};
    uint32_t storage = machine_storage(m, m->sizes[base.storage]);
    memcpy(m->data[storage], m->data[base.storage], sizeof m->data[0]);
    to.ndim = machine_ints(m, 2, to.shape);
    machine_ints(m, 3, to.stride);
    to.offset = m->t->nodes[m->op->args].count > 4 ? machine_int(m, 4) : base.view.offset;
    machine_require(m, machine_fits(&to, m->sizes[storage]), "a scatter stays in its storage");
    machine_apply(m, machine_first, 1, 1, storage, &to);
    machine_define(m, machine_out(m), storage, &base.view, m->nobjects++);
}

static inline uint64_t machine_sum(const machine *m, const machine_cell *x) {
    uint64_t sum = 17;
    for (int64_t i = 0; i < machine_count(&x->view); i++) {
        sum = sum * 31 + (uint64_t)m->data[x->storage][machine_at(&x->view, i)];
    }
    return sum;
}

/* Whoever looks at an argument from outside sees the inputs, too. */
static inline void machine_observe(machine *m) {
    uint64_t sum = machine_sum(m, machine_tensor(m, 0));
    for (uint32_t i = 0; i < m->t->ninputs; i++) sum = sum * 37 + machine_sum(m, &m->cells[m->t->inputs[i]]);
    if (m->nlog < MACHINE_LOG) m->log[m->nlog++] = sum;
}

static inline bool machine_numbers(machine *m, const char *name) {
    th_val out = machine_out(m);
    int64_t n;
    if (strcmp(name, "torch.Tensor.size") == 0)
        n = machine_tensor(m, 0)->view.shape[machine_int(m, 1)];
    else if (strcmp(name, "operator.add") == 0)
        n = machine_int(m, 0) + machine_int(m, 1);
    else if (strcmp(name, "operator.sub") == 0)
        n = machine_int(m, 0) - machine_int(m, 1);
    else
        return false;
    m->cells[out] = (machine_cell){.kind = CELL_INT, .number = n};
    return true;
}

static inline void machine_unbind(machine *m) {
    machine_cell x = *machine_tensor(m, 0);
    const th_node_data *outs = &m->t->nodes[m->op->outs];
    machine_require(m, outs->kind == TH_N_TUPLE && outs->count == (uint32_t)x.view.shape[0], "one result per row");
    for (uint32_t i = 0; i < outs->count; i++) {
        machine_view row = x.view;
        row.offset += i * row.stride[0];
        machine_drop_dim(&row, 0);
        machine_define(m, m->t->nodes[m->t->kids[outs->u.kids + i]].u.ref, x.storage, &row, m->nobjects++);
    }
}

static inline void machine_call(machine *m) {
    const char *name = th_str_get(m->t->ctx, m->op->callee);
    if (machine_pure(m, name) || machine_writes(m, name) || machine_numbers(m, name)) return;
    if (strcmp(name, "torch.unbind") == 0) {
        machine_unbind(m);
    } else if (strcmp(name, "torch.as_strided_scatter") == 0) {
        machine_scatter(m);
    } else if (strcmp(name, "torch.observe") == 0) {
        machine_observe(m);
    } else if (strcmp(name, "torch.draw_like") == 0) {
        machine_cell *out = machine_fresh(m);
        for (int64_t i = 0; i < m->sizes[out->storage]; i++) m->data[out->storage][i] = 1000 + 7 * m->draws + i;
        m->draws++;
    } else if (strcmp(name, "torch.Tensor.contiguous") == 0) {
        machine_cell x = *machine_tensor(m, 0);
        machine_define(m, machine_out(m), x.storage, &x.view, x.object);
    } else {
        machine_require(m, machine_views(m, name), "a known operation");
    }
}

/* ---- whole traces ---- */

static inline void machine_inputs(machine *m) {
    for (uint32_t i = 0; i < m->t->ninputs; i++) {
        th_val v = m->t->inputs[i];
        machine_view view = machine_type(m, v);
        uint32_t storage = UINT32_MAX;
        for (uint32_t j = 0; j < i; j++) {
            th_val w = m->t->inputs[j];
            if (m->t->values[v].alias && m->t->values[w].alias == m->t->values[v].alias) storage = m->cells[w].storage;
        }
        if (storage == UINT32_MAX) {
            storage = machine_storage(m, MACHINE_ELEMENTS);
            for (int k = 0; k < MACHINE_ELEMENTS; k++) m->data[storage][k] = 100 * (i + 1) + k;
        }
        machine_define(m, v, storage, &view, m->nobjects++);
    }
}

static inline void machine_run(machine *m, const th_trace *t) {
    *m = (machine){.t = t};
    m->cells = calloc(t->nvalues, sizeof *m->cells);
    m->data = calloc(MACHINE_STORAGES, sizeof *m->data);
    m->sizes = calloc(MACHINE_STORAGES, sizeof *m->sizes);
    if (!m->cells || !m->data || !m->sizes) abort();
    machine_inputs(m);
    for (th_opref op = 1; op < t->nops; op++) {
        m->op = &t->ops[op];
        if (m->op->kind != TH_OP_DEL) {
            machine_call(m);
            continue;
        }
        const th_node_data *args = &t->nodes[m->op->args];
        for (uint32_t i = 0; i < args->count; i++)
            m->cells[t->nodes[t->kids[args->u.kids + i]].u.ref].kind = CELL_DELETED;
    }
    m->op = NULL;
}

static inline void machine_free(machine *m) {
    free(m->cells);
    free(m->data);
    free(m->sizes);
}

/* The result's cells, then the inputs'. */
static inline uint32_t machine_leaves(const machine *m, machine_cell *out, uint32_t cap) {
    const th_node_data *result = &m->t->nodes[m->t->result];
    uint32_t n = 0;
    for (uint32_t i = 0; i < result->count && n < cap; i++) {
        const th_node_data *leaf = &m->t->nodes[m->t->kids[result->u.kids + i]];
        if (leaf->kind == TH_N_INT)
            out[n++] = (machine_cell){.kind = CELL_INT, .number = leaf->u.i};
        else
            out[n++] = *machine_value(m, leaf);
    }
    for (uint32_t i = 0; i < m->t->ninputs && n < cap; i++) out[n++] = m->cells[m->t->inputs[i]];
    return n;
}

/* Do two runs return the same contents, identities and sharing, leave the same inputs, and show the same outside? */
static inline const char *machine_difference(const machine *a, const machine *b) {
    enum { LEAVES = 64 };
    machine_cell x[LEAVES], y[LEAVES];
    uint32_t n = machine_leaves(a, x, LEAVES);
    if (n != machine_leaves(b, y, LEAVES)) return "number of results";
    if (a->draws != b->draws) return "random draws";
    if (a->nlog != b->nlog || memcmp(a->log, b->log, a->nlog * sizeof *a->log) != 0) return "what outside state saw";
    for (uint32_t i = 0; i < n; i++) {
        if (x[i].kind != y[i].kind || x[i].number != y[i].number) return "a number in the result";
        if (x[i].kind != CELL_TENSOR) continue;
        int64_t count = machine_count(&x[i].view);
        y[i].view.offset -= x[i].view.offset; /* storages may begin elsewhere */
        machine_view there = y[i].view;
        there.offset = x[i].view.offset;
        if (!machine_same(&x[i].view, &there)) return "geometry of a result";
        y[i].view.offset += x[i].view.offset;
        for (int64_t k = 0; k < count; k++) {
            int64_t p = a->data[x[i].storage][machine_at(&x[i].view, k)],
                    q = b->data[y[i].storage][machine_at(&y[i].view, k)];
            if (p != q) return i + a->t->ninputs < n ? "contents of a result" : "contents of an input";
        }
        for (uint32_t j = 0; j < i; j++) {
            if (x[j].kind != CELL_TENSOR) continue;
            if ((x[i].object == x[j].object) != (y[i].object == y[j].object)) return "identity of results";
            if ((x[i].storage == x[j].storage) != (y[i].storage == y[j].storage)) return "sharing of results";
        }
    }
    return NULL;
}

#endif
