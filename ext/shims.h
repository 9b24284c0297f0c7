/* What the files that lower to kernels of our own share: reading an operation, slots, fresh results. */
#ifndef THUNDER_SHIMS_H
#define THUNDER_SHIMS_H

#include "lower.h"

#include "executors/tile/tile.h"

enum { THX_SMALL = 4096, THX_SMALL_PRODUCT = 65536 }; /* elements, multiply-adds: above, torch's threaded kernels win */

typedef struct shape_op { /* the operation with its arguments by parameter */
    thx_lowering *l;
    const th_op *op;
    const char *name; /* of the catalogue entry, without the "functional." of a twin with other parameters */
    th_call call;
} shape_op;

static inline const th_node_data *data_of(const shape_op *s, th_node n) { return &s->l->t->nodes[n]; }

static inline th_val value_at(const shape_op *s, th_node n) {
    const th_node_data *d = data_of(s, n);
    return n && d->kind == TH_N_VALUE ? d->u.ref : 0;
}

/* Booleans are no numbers here: torch refuses some of them. */
static inline bool number_at(const shape_op *s, th_node n, double *out) {
    const th_node_data *d = data_of(s, n);
    if (!n || (d->kind != TH_N_INT && d->kind != TH_N_FLOAT)) return false;
    *out = d->kind == TH_N_FLOAT ? d->u.f : (double)d->u.i;
    return true;
}

static inline const th_type *type_of(const shape_op *s, th_val v) {
    return th_type_get(s->l->x->ctx, s->l->t->values[v].type);
}

typedef struct fresh { /* a new float32 CPU tensor */
    int64_t ndim, sizes[TH_TILE_RANK], strides[TH_TILE_RANK];
} fresh;

bool thx_shim_small(const shape_op *s, th_val v); /* float32 on the CPU, few elements */
const float *thx_shim_pointer(thx *x, th_slot *slot);
float *thx_shim_allocate(thx *x, th_frame *f, const fresh *o, uint32_t slot); /* NULL with an exception */
void thx_shim_fresh(fresh *o, const th_type *t);
int thx_shim_add(thx_lowering *l, th_instr_fn run, thx_instr_data *data, th_opref o); /* 1, or -1 */
/* An operation element by element; a and b may be 0: then the scalar stands there. 1, 0 not for it, -1. */
int thx_shim_map(shape_op *s, th_opref o, th_tile_op op, th_val a, th_val b, double scalar, th_val out);

/* ---- shims_backward.c ---- */
int thx_lower_backward(shape_op *s, th_opref o); /* needs s->l and s->op only */

#endif
