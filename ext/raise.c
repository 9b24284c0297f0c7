/* The only room that turns a core error into a Python exception. */
#include "ext.h"

static PyObject *class_of(th_status status) {
    switch (status) {
    case TH_ENOMEM: return PyExc_MemoryError;
    case TH_ESYNTAX: return PyExc_SyntaxError;
    case TH_EINVAL:
    case TH_EVERIFY: return PyExc_ValueError;
    case TH_EUNKNOWN: return PyExc_LookupError;
    case TH_EIO: return PyExc_OSError;
    default: return PyExc_RuntimeError;
    }
}

PyObject *thx_raise(thx *x, th_status status) {
    if (PyErr_Occurred()) return NULL;
    const th_error *error = th_ctx_error(x->ctx);
    const char *text = error->status == status && error->text[0] ? error->text : th_status_text(status);
    if (error->status == status && error->line)
        return PyErr_Format(class_of(status), "line %u, column %u: %s", error->line, error->column, text);
    PyErr_SetString(class_of(status), text);
    return NULL;
}

int thx_check(thx *x, th_status status) {
    if (status == TH_OK) return 0;
    thx_raise(x, status);
    return -1;
}
