/* Are two calls, or results, the same but for numbers or sizes? */
#include "callable.h"

#include <string.h>

bool thx_same_object(PyObject *a, PyObject *b, bool by_identity) {
    if (a == b) return true;
    if (by_identity || !a || !b || Py_TYPE(a) != Py_TYPE(b)) return false;
    if (thx_same_constant(a, b)) return true;
    bool same = (PyTuple_CheckExact(a) || PyFrozenSet_CheckExact(a)) && PyObject_RichCompareBool(a, b, Py_EQ) == 1;
    PyErr_Clear();
    return same;
}

static bool same_tensor(const thx_spec *a, const thx_spec *b, int but_for, uint32_t *differences) {
    if (a->leaf != b->leaf || a->repeated != b->repeated || a->requires_grad != b->requires_grad ||
        a->dtype != b->dtype || a->device_type != b->device_type || a->device_index != b->device_index ||
        a->ndim != b->ndim || !a->dims != !b->dims)
        return false;
    bool same = !a->dims || memcmp(a->dims, b->dims, sizeof *a->dims * (size_t)(2 * a->ndim)) == 0;
    *differences += !same;
    return same || but_for == THX_ALIKE_SIZES;
}

bool thx_specs_alike(const thx_spec *a, const thx_spec *b, int but_for, uint32_t *differences) {
    bool number = a->kind == THX_S_NUMBER || (a->kind == THX_S_CONST && a->type == &PyFloat_Type && b->number);
    if (a->type != b->type || a->nkids != b->nkids || a->nitems != b->nitems || a->memo != b->memo) return false;
    if (number && b->number && but_for == THX_ALIKE_NUMBERS) {
        *differences += a->kind == THX_S_NUMBER || !thx_same_constant(a->object, b->object);
        return true;
    }
    if (but_for != THX_ALIKE_NUMBERS && b->kind == THX_S_CONST && b->type == &PyLong_Type) {
        bool any = a->kind == THX_S_NUMBER, same = !any && thx_same_constant(a->object, b->object);
        *differences += !same;
        return any || a->kind == THX_S_CONST;
    }
    if (a->kind != b->kind || a->by_identity != b->by_identity) return false;
    if (a->kind == THX_S_TENSOR) return same_tensor(a, b, but_for, differences);
    if ((a->kind == THX_S_SAME || a->kind == THX_S_EXTENT) && a->leaf != b->leaf) return false;
    if (a->kind == THX_S_BUFFER || !thx_same_object(a->object, b->object, a->by_identity)) return false;
    for (uint32_t i = 0; i < a->nkids; i++)
        if (!thx_specs_alike(&a->kids[i], &b->kids[i], but_for, differences)) return false;
    return true;
}

static bool same_names(PyObject *a, PyObject *b) {
    return a == b || (a && b && PyObject_RichCompareBool(a, b, Py_EQ) == 1);
}

bool thx_calls_alike(const thx_entry *a, const thx_entry *b, int but_for, uint32_t *differences) {
    bool same = a->nargs == b->nargs && a->npositional == b->npositional && same_names(a->kwnames, b->kwnames) &&
                memcmp(&a->ambient, &b->ambient, sizeof a->ambient) == 0;
    *differences = 0;
    for (uint32_t i = 0; i < a->nargs && same; i++)
        same = thx_specs_alike(&a->args[i], &b->args[i], but_for, differences);
    return same;
}
