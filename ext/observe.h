/* One operation being recorded: what observer.c and data.c share. */
#ifndef THUNDER_OBSERVE_H
#define THUNDER_OBSERVE_H

#include "capture.h"

typedef struct thx_recording {
    thx_recorder *r;
    const thx_func *f;
    PyObject *func, *args, *kwargs; /* borrowed; kwargs NULL when empty */
    th_str callee;
    const th_opdef *def;
    th_node anode, knode;
    bool random;
    thx_grad_note note;
} thx_recording;

/* ---- observer.c ---- */
/* Arguments with what `leaf` gives in the place of each tensor and extent; it returns a new reference. */
typedef PyObject *(*thx_map_fn)(void *user, PyObject *object);
PyObject *thx_map_arguments(thx *x, PyObject *object, thx_map_fn leaf, void *user);
PyObject *thx_fakeify(thx_recorder *r, PyObject *object); /* real tensors in it become their fakes */
uint32_t thx_alias_group(th_trace *t, th_val v);          /* of a value, made when it has none */
PyObject *thx_record(thx_recorder *r, const thx_func *f, PyObject *func, PyObject *args, PyObject *kwargs);
PyObject *thx_call_under_fake_mode(thx_recorder *r, PyObject *func, PyObject *args, PyObject *kwargs);
int thx_call_emit(thx_recording *c, th_node outs, bool outs_list, uint8_t effects, const th_val *writes,
                  uint32_t nwrites);

/* ---- data.c ---- */
/* For a derivative: as the operations it is made of. NULL without an exception: it is taken whole. */
PyObject *thx_call_in_parts(thx_recording *c);
PyObject *thx_call_for_data(thx_recording *c); /* a function that gives values of tensors, for real */
/* torch's fake kernels could not run the call: the pending exception says why. Another way to its result; NULL with an
 * exception when there is none. */
PyObject *thx_call_otherwise(thx_recording *c);

#endif
