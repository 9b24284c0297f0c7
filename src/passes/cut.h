/* A minimum cut over the values of a trace: which to save. */
#ifndef THUNDER_PASSES_CUT_H
#define THUNDER_PASSES_CUT_H

#include "passes/pass.h"

typedef struct th__cut {
    th__scratch *scratch;
    uint32_t nnodes; /* two for each value (in and out), then source and sink */
    struct th__arc *arcs;
    uint32_t narcs, cap_arcs;
    uint32_t *first; /* by node: its newest arc, 0 none */
    int32_t *level;
    uint32_t *next; /* by node: the arc to try next */
    uint32_t *queue;
    bool failed;
} th__cut;

typedef struct th__cut_link {
    th__cut *cut;
    void *graph;
    th_val to;
} th__cut_link;

th_status th__cut_init(th__cut *cut, th__scratch *scratch, uint32_t nvalues);
/* A value that may be saved for `cost`. fixed: it cannot be made again; wanted: it is needed behind the cut. */
void th__cut_value(th__cut *cut, th_val v, int64_t cost, bool fixed, bool wanted);
void th__cut_edge(th__cut *cut, void *unused, th_val from, th_val to); /* `to` is made from `from` */
th_status th__cut_solve(th__cut *cut);
bool th__cut_saved(const th__cut *cut, th_val v); /* the cut goes through the value */

#endif
