/* Traces as Python objects, seen by the rooms that read, edit, run and transform them.
 *
 * A user's trace never changes: an edit makes a new one. All traces made from one another by edits are a lineage.
 * Within it an operation is known by a number and a value by its name, so that what was found in one trace can be
 * looked up in the next.
 */
#ifndef THUNDER_TRACE_OBJECT_H
#define THUNDER_TRACE_OBJECT_H

#include "ext.h"

typedef struct thx_lineage { /* shared by its traces, symbols and proxies; the GIL guards it */
    uint32_t refs, next_name;
    uint64_t next_id;
} thx_lineage;

typedef struct thx_py_trace {
    PyObject_HEAD thx *x;
    th_trace *t;       /* owned */
    thx_lineage *line; /* one reference; NULL until something asks */
    uint64_t *ids;     /* by operation; owned; NULL until something asks */
    bool backward;     /* saved values are its first inputs, not its last results */
    uint32_t nsaved;
    PyObject *edit_result; /* owned or NULL: what the function of the edit that made this trace returned */
} thx_py_trace;

typedef struct thx_proxy { /* a value of a trace */
    PyObject_HEAD thx *x;
    thx_lineage *line; /* one reference */
    th_str name;
    th_typeref type;
} thx_proxy;

typedef struct thx_symbol {            /* an operation of a trace */
    PyObject_HEAD thx_py_trace *trace; /* owned */
    th_opref op;
    uint64_t id;
} thx_symbol;

/* ---- py_trace.c ---- */
PyObject *thx_trace_object(thx *x, th_trace *t); /* takes the trace, also when it fails */
int thx_trace_number(thx_py_trace *o);           /* make sure that line and ids are there */
thx_py_trace *thx_as_trace(thx *x, PyObject *o); /* borrowed; NULL with TypeError */

/* ---- py_symbol.c ---- */
PyObject *thx_proxy_new(thx_py_trace *o, th_val value);
th_val thx_proxy_find(const thx_py_trace *o, PyObject *proxy);     /* 0 with ValueError or TypeError */
th_opref thx_symbol_find(const thx_py_trace *o, PyObject *symbol); /* likewise */
PyObject *thx_trace_symbols(PyObject *trace, void *unused);
PyObject *thx_trace_inputs(PyObject *trace, void *unused);
PyObject *thx_trace_output(PyObject *trace, void *unused);
PyObject *thx_trace_saved(PyObject *trace, void *unused);
int thx_symbol_init(thx *x, PyObject *module);

/* ---- edit.c ---- */
PyObject *thx_edit_replace(PyObject *trace, PyObject *args);
PyObject *thx_edit_insert_before(PyObject *trace, PyObject *args);
PyObject *thx_edit_insert_after(PyObject *trace, PyObject *args);
PyObject *thx_edit_remove(PyObject *trace, PyObject *symbol);
PyObject *thx_edit_replace_uses(PyObject *trace, PyObject *args);
PyObject *thx_edit_map_output(PyObject *trace, PyObject *args);
PyObject *thx_edit_map_input(PyObject *trace, PyObject *args);
void thx_drop_dels(th_trace *t);

/* ---- record.c: torch code and foreign calls, recorded for an edit ---- */
typedef struct thx_excerpt { /* code that was run on fakes of a trace's values */
    thx *x;
    const th_trace *of;
    struct thx_recorder *r; /* owned; its trace has an input for each value that was used, and no other inputs */
    th_val *inside;         /* by value of `of`: the input of the excerpt */
    PyObject *result;       /* owned: what the code returned, with fakes */
} thx_excerpt;
int thx_excerpt_begin(thx_excerpt *e, thx *x, const th_trace *of);
PyObject *thx_excerpt_value(void *excerpt, th_val value); /* its fake: new reference */
int thx_excerpt_run(thx_excerpt *e, PyObject *fn, PyObject *args, PyObject *kwargs);
void thx_excerpt_fini(thx_excerpt *e);
PyObject *thx_opaque_call(PyObject *module, PyObject *args, PyObject *kwargs);

/* ---- run_trace.c ---- */
PyObject *thx_trace_callable(PyObject *trace, PyObject *unused);
int thx_run_trace_init(thx *x, PyObject *module);

#endif
