/* Views: which elements of a storage a value covers, as sizes, strides and an offset. */
#ifndef THUNDER_PASSES_VIEW_H
#define THUNDER_PASSES_VIEW_H

#include "thunder/ir.h"
#include "thunder/ops.h"

typedef struct th__view {
    uint32_t ndim;
    int64_t shape[TH_MAX_RANK], stride[TH_MAX_RANK];
    int64_t offset;
} th__view;

bool th__view_of(const th_trace *t, th_val v, th__view *out); /* false: no tensor, or of too high a rank */
bool th__view_same(const th__view *a, const th__view *b);
int64_t th__view_numel(const th__view *v);
bool th__view_is_dense(const th__view *v); /* its elements fill one interval of the storage, each once */

/* Do two indices of the view meet in one element? True when that cannot be excluded. */
bool th__view_self_overlaps(const th__view *v);
/* Are all its elements among those of a dense view? False when that is not certain. */
bool th__view_inside(const th__view *v, const th__view *dense);
/* May the two share an element? Exact unless the search grows too long; then true. */
bool th__views_overlap(const th__view *a, const th__view *b);

/* The view that indexing with a basic index (integers, slices, None, ...) gives. False for any other index. */
bool th__view_index(const th_trace *t, th_node index, th__view *v);

#endif
