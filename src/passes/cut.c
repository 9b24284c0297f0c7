/* Dinic's maximum flow. Of the minimum cuts the one nearest to the sink: what no longer reaches the sink in the
 * residual graph lies before it, so of values that cost the same the latest is saved, and the least is made again.
 *
 *     source --inf--> in(v) --cost--> out(v) --inf--> in(w), w made from v
 *                                     out(v) --inf--> sink, when v is wanted
 */
#include "passes/cut.h"

#include <string.h>

typedef struct th__arc {
    uint32_t to, next; /* next: of the same node, 0 none */
    int64_t left;      /* capacity; the arc of the other direction is at index ^ 1 */
} th__arc;

enum { SOURCE = 0, SINK = 1 };
#define INFINITE (INT64_C(1) << 60)

static uint32_t in(th_val v) { return 2 * v; }
static uint32_t out(th_val v) { return 2 * v + 1; }

th_status th__cut_init(th__cut *c, th__scratch *scratch, uint32_t nvalues) {
    *c = (th__cut){.scratch = scratch, .nnodes = 2 * nvalues, .narcs = 2}; /* value 0 is none: its nodes are the ends */
    c->first = th__scratch_zeroed(scratch, c->nnodes, sizeof *c->first);
    c->level = th__scratch_zeroed(scratch, c->nnodes, sizeof *c->level);
    c->next = th__scratch_zeroed(scratch, c->nnodes, sizeof *c->next);
    c->queue = th__scratch_zeroed(scratch, c->nnodes, sizeof *c->queue);
    return c->first && c->level && c->next && c->queue ? TH_OK : TH_ENOMEM;
}

static void add_arc(th__cut *c, uint32_t from, uint32_t to, int64_t capacity) {
    if (c->narcs + 2 > c->cap_arcs) {
        uint32_t cap = c->cap_arcs ? 2 * c->cap_arcs : 256;
        th__arc *arcs = th__scratch_zeroed(c->scratch, cap, sizeof *arcs);
        if (!arcs) {
            c->failed = true;
            return;
        }
        if (c->arcs) memcpy(arcs, c->arcs, c->narcs * sizeof *arcs);
        c->arcs = arcs;
        c->cap_arcs = cap;
    }
    c->arcs[c->narcs] = (th__arc){to, c->first[from], capacity};
    c->first[from] = c->narcs++;
    c->arcs[c->narcs] = (th__arc){from, c->first[to], 0};
    c->first[to] = c->narcs++;
}

void th__cut_value(th__cut *c, th_val v, int64_t cost, bool fixed, bool wanted) {
    add_arc(c, in(v), out(v), cost);
    if (fixed) add_arc(c, SOURCE, in(v), INFINITE);
    if (wanted) add_arc(c, out(v), SINK, INFINITE);
}

void th__cut_edge(th__cut *c, void *unused, th_val from, th_val to) {
    (void)unused;
    add_arc(c, out(from), in(to), INFINITE);
}

static bool levels(th__cut *c) {
    uint32_t head = 0, tail = 0;
    memset(c->level, 0xff, c->nnodes * sizeof *c->level);
    c->level[SOURCE] = 0;
    c->queue[tail++] = SOURCE;
    while (head < tail) {
        uint32_t at = c->queue[head++];
        for (uint32_t a = c->first[at]; a; a = c->arcs[a].next) {
            uint32_t to = c->arcs[a].to;
            if (!c->arcs[a].left || c->level[to] >= 0) continue;
            c->level[to] = c->level[at] + 1;
            c->queue[tail++] = to;
        }
    }
    return c->level[SINK] >= 0;
}

/* One path from source to sink along rising levels: its bottleneck, 0 when there is none. `queue` holds its arcs. */
static int64_t push_path(th__cut *c) {
    uint32_t depth = 0, at = SOURCE;
    while (at != SINK) {
        uint32_t a = c->next[at];
        while (a && (!c->arcs[a].left || c->level[c->arcs[a].to] != c->level[at] + 1)) a = c->arcs[a].next;
        c->next[at] = a;
        if (a) {
            c->queue[depth++] = a;
            at = c->arcs[a].to;
        } else if (depth == 0) {
            return 0;
        } else { /* dead end: go back and take the next arc */
            uint32_t back = c->queue[--depth];
            at = c->arcs[back ^ 1].to;
            c->next[at] = c->arcs[back].next;
        }
    }
    int64_t flow = INFINITE;
    for (uint32_t i = 0; i < depth; i++)
        if (c->arcs[c->queue[i]].left < flow) flow = c->arcs[c->queue[i]].left;
    for (uint32_t i = 0; i < depth; i++) {
        c->arcs[c->queue[i]].left -= flow;
        c->arcs[c->queue[i] ^ 1].left += flow;
    }
    return flow;
}

/* level: 0 for what reaches the sink. */
static void mark_sink_side(th__cut *c) {
    uint32_t head = 0, tail = 0;
    memset(c->level, 0xff, c->nnodes * sizeof *c->level);
    c->level[SINK] = 0;
    c->queue[tail++] = SINK;
    while (head < tail) {
        uint32_t at = c->queue[head++];
        for (uint32_t a = c->first[at]; a; a = c->arcs[a].next) {
            uint32_t from = c->arcs[a].to;
            if (!c->arcs[a ^ 1].left || c->level[from] == 0) continue;
            c->level[from] = 0;
            c->queue[tail++] = from;
        }
    }
}

th_status th__cut_solve(th__cut *c) {
    if (c->failed) return TH_ENOMEM;
    while (levels(c)) {
        memcpy(c->next, c->first, c->nnodes * sizeof *c->next);
        while (push_path(c) > 0) continue;
    }
    mark_sink_side(c);
    return TH_OK;
}

bool th__cut_saved(const th__cut *c, th_val v) { return c->level[in(v)] < 0 && c->level[out(v)] == 0; }
