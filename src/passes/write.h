/* What an operation that writes does, said without the write: which elements change, and how their new contents come.
 */
#ifndef THUNDER_PASSES_WRITE_H
#define THUNDER_PASSES_WRITE_H

#include "passes/view.h"

typedef enum th__write_kind {
    TH__WRITE_UNKNOWN,
    TH__WRITE_TWIN, /* callee(args, kwargs) gives the new contents: add_ -> add, relu(inplace=True) -> relu, out= */
    TH__WRITE_COPY, /* a tensor, converted and broadcast: copy_, x[i] = tensor */
    TH__WRITE_FILL, /* a number: fill_, zero_, x[i] = number */
    TH__WRITE_PUT,  /* index_put_, x[mask] = value, x[indices] = value */
} th__write_kind;

typedef struct th__write {
    th__write_kind kind;
    th_val dest;          /* the written value */
    th__view region;      /* the elements that may change: dest's, or fewer */
    th_str callee;        /* TWIN */
    th_node args, kwargs; /* TWIN: without `inplace` and `out`; values as recorded */
    uint8_t effects;      /* TWIN: TH_FX_RANDOM when it draws */
    th_typeref type;      /* TWIN: type of the twin's result */
    th_node source;       /* COPY: a value; FILL, PUT: a number or a value */
    th_node indices;      /* PUT: a TUPLE of values */
    bool accumulate;      /* PUT: the value is added */
} th__write;

/* TH_DECLINED when the operation does something else, or when the result type of its twin is not known. May append
 * nodes to the trace. */
th_status th__write_understand(const th_catalog *catalog, th_trace *t, const th_op *op, th__write *out);

#endif
