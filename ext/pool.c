/* Fakes that user code has let go of, to be used again for another value of their type.
 *
 * Making a fake is the dearest part of recording an operation, and most intermediates of a model die at once: a layer
 * can run on the fakes of the layer before. As with memory that CPython frees and hands out again, nothing may be left
 * of the former tensor: only fakes that our own rules made and that no kernel ever saw are taken, when nobody but the
 * recorder refers to them, in Python, by weak reference or from torch, and nobody has left an attribute on them.
 */
#include "capture.h"

enum { PER_TYPE = 12 };

struct thx_pool {
    struct {
        th_typeref type;
        uint32_t count, next;
        PyObject *fakes[PER_TYPE]; /* borrowed: the recorder's table owns them */
    } rows[256];                   /* by type, direct-mapped */
};

static bool says(PyObject *answer, long wanted) {
    bool same = answer && PyLong_Check(answer) && PyLong_AsLong(answer) == wanted;
    Py_XDECREF(answer);
    return same;
}

static bool is_free(thx_recorder *r, PyObject *fake, th_typeref type) {
    if (!r->x->use_count || Py_REFCNT(fake) != 1) return false;
    thx_cell *cell = thx_recorder_cell(r, fake);
    if (!cell || !cell->ours || r->t->values[cell->value].type != type) return false;
    PyObject *attributes = PyObject_GenericGetDict(fake, NULL);
    bool bare = attributes && PyDict_GET_SIZE(attributes) == 0;
    Py_XDECREF(attributes);
    bool free = bare && says(PyObject_CallOneArg(r->x->count_weakrefs, fake), 0) &&
                says(PyObject_CallOneArg(r->x->use_count, fake), 1) && Py_REFCNT(fake) == 1;
    PyErr_Clear();
    return free;
}

PyObject *thx_pool_fake(thx_recorder *r, th_typeref type) {
    if (!r->pool && !(r->pool = PyMem_Calloc(1, sizeof *r->pool))) return PyErr_NoMemory();
    uint32_t at = type % 256;
    if (r->pool->rows[at].type != type) {
        r->pool->rows[at].type = type;
        r->pool->rows[at].count = r->pool->rows[at].next = 0;
    }
    for (uint32_t i = 0; i < r->pool->rows[at].count; i++)
        if (is_free(r, r->pool->rows[at].fakes[i], type)) return Py_NewRef(r->pool->rows[at].fakes[i]);
    PyObject *fake = thx_fake(r->x, type);
    if (!fake) return NULL;
    uint32_t place =
        r->pool->rows[at].count < PER_TYPE ? r->pool->rows[at].count++ : r->pool->rows[at].next++ % PER_TYPE;
    r->pool->rows[at].fakes[place] = fake;
    return fake;
}
