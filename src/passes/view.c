/* See view.h. Sizes and offsets of real tensors stay far below 2^63, so sums of products do not overflow: the types
 * that they come from were checked. */
#include "passes/view.h"

#include <string.h>

bool th__view_of(const th_trace *t, th_val v, th__view *out) {
    const th_type *type = th_type_get(t->ctx, t->values[v].type);
    if (type->kind != TH_TYPE_TENSOR || type->ndim > TH_MAX_RANK) return false;
    out->ndim = type->ndim;
    for (uint32_t i = 0; i < type->ndim; i++) {
        const int64_t limit = INT64_C(1) << 56; /* of a stride times its size */
        out->shape[i] = type->shape[i];
        out->stride[i] = type->stride[i];
        if (type->shape[i] > 0 && type->stride[i] > limit / type->shape[i]) return false;
    }
    out->offset = t->values[v].offset;
    return out->offset < INT64_C(1) << 56;
}

bool th__view_same(const th__view *a, const th__view *b) {
    size_t dims = a->ndim * sizeof *a->shape;
    return a->ndim == b->ndim && a->offset == b->offset && memcmp(a->shape, b->shape, dims) == 0 &&
           memcmp(a->stride, b->stride, dims) == 0;
}

int64_t th__view_numel(const th__view *v) {
    int64_t count = 1;
    for (uint32_t i = 0; i < v->ndim; i++) count *= v->shape[i];
    return count;
}

/* Distance from the first to the last element. */
static int64_t span(const th__view *v) {
    int64_t sum = 0;
    for (uint32_t i = 0; i < v->ndim; i++) sum += v->shape[i] > 0 ? (v->shape[i] - 1) * v->stride[i] : 0;
    return sum;
}

/* The dimensions of more than one element, by falling stride. */
static uint32_t by_stride(const th__view *v, uint32_t order[TH_MAX_RANK]) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < v->ndim; i++) {
        if (v->shape[i] == 1) continue;
        uint32_t at = n++;
        for (; at > 0 && v->stride[order[at - 1]] < v->stride[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    return n;
}

bool th__view_self_overlaps(const th__view *v) {
    uint32_t order[TH_MAX_RANK], n = by_stride(v, order);
    int64_t inner = 0;
    if (th__view_numel(v) == 0) return false;
    while (n-- > 0) {
        if (v->stride[order[n]] <= inner) return true;
        inner += (v->shape[order[n]] - 1) * v->stride[order[n]];
    }
    return false;
}

bool th__view_is_dense(const th__view *v) {
    return th__view_numel(v) == 0 || (!th__view_self_overlaps(v) && span(v) + 1 == th__view_numel(v));
}

bool th__view_inside(const th__view *v, const th__view *dense) {
    if (th__view_numel(v) == 0) return true;
    return v->offset >= dense->offset && v->offset + span(v) < dense->offset + th__view_numel(dense);
}

/* ---- overlap of two views ----
 *
 * An element is shared when sum(i_k * stride_k) - sum(j_k * stride_k) = distance has a solution with indices in range.
 * Terms are tried from the largest stride on; what the rest can still reach prunes nearly everything. */

typedef struct term {
    int64_t stride, low, high; /* coefficients low..high */
} term;

typedef struct search {
    term terms[2 * TH_MAX_RANK];
    int64_t low[2 * TH_MAX_RANK + 1], high[2 * TH_MAX_RANK + 1]; /* reach of the terms from k on */
    uint32_t n, visits;
} search;

static void add_terms(search *s, const th__view *v, bool negative) {
    for (uint32_t i = 0; i < v->ndim; i++) {
        if (v->shape[i] <= 1 || v->stride[i] == 0) continue;
        term new_term = {v->stride[i], negative ? 1 - v->shape[i] : 0, negative ? 0 : v->shape[i] - 1};
        uint32_t at = s->n++;
        for (; at > 0 && s->terms[at - 1].stride < new_term.stride; at--) s->terms[at] = s->terms[at - 1];
        s->terms[at] = new_term;
    }
}

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

static bool reaches(search *s, uint32_t k, int64_t distance) {
    if (distance < s->low[k] || distance > s->high[k]) return false;
    if (k == s->n) return distance == 0;
    if (++s->visits > 20000) return true;
    const term *x = &s->terms[k];
    int64_t first = -floor_div(s->high[k + 1] - distance, x->stride),
            last = floor_div(distance - s->low[k + 1], x->stride);
    if (first < x->low) first = x->low;
    if (last > x->high) last = x->high;
    for (int64_t i = first; i <= last; i++) {
        if (reaches(s, k + 1, distance - i * x->stride)) return true;
    }
    return false;
}

bool th__views_overlap(const th__view *a, const th__view *b) {
    search s = {.n = 0};
    if (th__view_numel(a) == 0 || th__view_numel(b) == 0) return false;
    add_terms(&s, a, false);
    add_terms(&s, b, true);
    for (uint32_t k = s.n; k-- > 0;) {
        s.low[k] = s.low[k + 1] + s.terms[k].low * s.terms[k].stride;
        s.high[k] = s.high[k + 1] + s.terms[k].high * s.terms[k].stride;
    }
    return reaches(&s, 0, b->offset - a->offset);
}

/* ---- basic indices ---- */

static bool int_or(const th_trace *t, th_node n, int64_t fallback, int64_t *out) {
    const th_node_data *node = &t->nodes[n];
    *out = node->kind == TH_N_INT ? node->u.i : fallback;
    return node->kind == TH_N_INT || node->kind == TH_N_NONE;
}

static int64_t clamp(int64_t i, int64_t size) {
    if (i < 0) i += size;
    return i < 0 ? 0 : i > size ? size : i;
}

static bool apply_slice(const th_trace *t, const th_node_data *slice, int64_t *size, int64_t *stride, int64_t *offset) {
    int64_t start, stop, step;
    if (!int_or(t, t->kids[slice->u.kids], 0, &start) || !int_or(t, t->kids[slice->u.kids + 1], *size, &stop) ||
        !int_or(t, t->kids[slice->u.kids + 2], 1, &step) || step <= 0) {
        return false;
    }
    start = clamp(start, *size);
    stop = clamp(stop, *size);
    int64_t count = stop > start ? (stop - start - 1) / step + 1 : 0;
    *offset += start * *stride;
    if (count > 1) *stride *= step;
    *size = count;
    return true;
}

/* How many of the view's dimensions the entries of an index use up; -1 when one is not basic. */
static int64_t dims_used(const th_trace *t, const th_node *entries, uint32_t n) {
    int64_t used = 0, ellipses = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t kind = t->nodes[entries[i]].kind;
        used += kind == TH_N_INT || kind == TH_N_SLICE;
        ellipses += kind == TH_N_ELLIPSIS;
        if (kind != TH_N_INT && kind != TH_N_SLICE && kind != TH_N_ELLIPSIS && kind != TH_N_NONE) return -1;
    }
    return ellipses > 1 ? -1 : used;
}

static bool push_dim(th__view *v, int64_t size, int64_t stride) {
    if (v->ndim == TH_MAX_RANK) return false;
    v->shape[v->ndim] = size;
    v->stride[v->ndim++] = stride;
    return true;
}

bool th__view_index(const th_trace *t, th_node index, th__view *v) {
    const th_node_data *node = &t->nodes[index];
    const th_node *entries = node->kind == TH_N_TUPLE ? t->kids + node->u.kids : &index;
    uint32_t n = node->kind == TH_N_TUPLE ? node->count : 1, dim = 0;
    int64_t used = dims_used(t, entries, n);
    if (used < 0 || used > v->ndim) return false;
    const th__view from = *v;
    v->ndim = 0;
    for (uint32_t i = 0; i < n; i++) {
        const th_node_data *entry = &t->nodes[entries[i]];
        if (entry->kind == TH_N_NONE) {
            if (!push_dim(v, 1, 0)) return false;
        } else if (entry->kind == TH_N_ELLIPSIS) {
            for (int64_t rest = from.ndim - used; rest > 0; rest--, dim++) {
                if (!push_dim(v, from.shape[dim], from.stride[dim])) return false;
            }
        } else if (entry->kind == TH_N_INT) {
            int64_t at = entry->u.i < 0 ? entry->u.i + from.shape[dim] : entry->u.i;
            if (at < 0 || at >= from.shape[dim]) return false;
            v->offset += at * from.stride[dim++];
        } else {
            int64_t size = from.shape[dim], stride = from.stride[dim++];
            if (!apply_slice(t, entry, &size, &stride, &v->offset) || !push_dim(v, size, stride)) return false;
        }
    }
    for (; dim < from.ndim; dim++) {
        if (!push_dim(v, from.shape[dim], from.stride[dim])) return false;
    }
    return true;
}
