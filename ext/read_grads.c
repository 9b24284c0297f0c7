/* The `.grad` of a caller's tensor that a program reads: an optimizer's step, the clipping of gradients.
 *
 * Another tensor lies there at each step, or none. A program is for what it found: none, or a tensor of that kind,
 * which is one of its inputs like those of arguments and is fetched at each call, once arguments and guards fit.
 */
#include "callable.h"

/* ---- while captured ---- */

/* A plain one that nothing else leads to: what lies elsewhere too need not lie there at the next call. */
static bool can_follow(thx_recorder *r, PyObject *grad) {
    return Py_IS_TYPE(grad, r->x->Tensor) && !thx_tensor_says(grad, "requires_grad") && !thx_recorder_known(r, grad) &&
           !thx_guards_met(r->reached, grad);
}

static PyObject *note(thx_recorder *r, PyObject *tensor, PyObject *grad) {
    thx_read_grad *items = PyMem_Realloc(r->read_grads, sizeof *items * (r->nread_grads + 1));
    if (!items) return PyErr_NoMemory();
    r->read_grads = items;
    uint32_t leaf = r->nleaves;
    for (uint32_t i = 0; i < r->nread_grads; i++) leaf += items[i].grad != Py_None;
    if (!thx_recorder_cell(r, tensor)) return NULL; /* which makes it an input */
    PyObject *fake = grad == Py_None ? grad : thx_recorder_argument(r, grad, leaf);
    if (fake) items[r->nread_grads++] = (thx_read_grad){Py_NewRef(tensor), Py_NewRef(grad)};
    return Py_XNewRef(fake);
}

PyObject *thx_read_grad_of(thx_recorder *r, PyObject *tensor) {
    thx *x = r->x;
    const thx_root *root = thx_is_fake(x, tensor) ? thx_recorder_root(r, tensor) : NULL;
    PyObject *own = root ? root->real : thx_is_fake(x, tensor) ? NULL : tensor, *found = NULL;
    if (!own || !r->reached || r->sizes || r->deriving || !thx_tensor_says(own, "is_leaf")) return NULL;
    for (uint32_t i = 0; i < r->nread_grads; i++) {
        PyObject *grad = r->read_grads[i].grad;
        if (r->read_grads[i].tensor == own) return Py_XNewRef(grad == Py_None ? grad : thx_recorder_fake(r, grad));
    }
    PyObject *grad = x->grad_get(own, x->grad_closure);
    if (grad && (grad == Py_None || can_follow(r, grad))) found = note(r, own, grad);
    Py_XDECREF(grad);
    return found;
}

void thx_read_grads_fini(thx_recorder *r) {
    for (uint32_t i = 0; i < r->nread_grads; i++) {
        Py_DECREF(r->read_grads[i].tensor);
        Py_DECREF(r->read_grads[i].grad);
    }
    PyMem_Free(r->read_grads);
}

/* ---- of a program ---- */

int thx_entry_add_grads(thx *x, thx_entry *e, const thx_recorder *r, thx_leaves *leaves) {
    e->grads = r->nread_grads ? PyMem_Calloc(r->nread_grads, sizeof *e->grads) : NULL;
    if (r->nread_grads && !e->grads) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < r->nread_grads; i++) {
        thx_entry_grad *g = &e->grads[i];
        th_val value = 0;
        for (uint32_t j = 0; j < r->nroots && !value; j++)
            if (r->roots[j].real == r->read_grads[i].tensor) value = r->roots[j].value;
        while (g->root < e->nroots && e->main.t->inputs[g->root] != value) g->root++;
        if (g->root == e->nroots) return thx_raise(x, TH_EINTERNAL), -1;
        e->ngrads++;
        if (thx_specs_init(x, &g->spec, &r->read_grads[i].grad, 1, leaves) < 0) return -1;
        thx_spec_settle(&g->spec);
    }
    return 0;
}

int thx_entry_match_grads(thx *x, const thx_entry *e, thx_leaves *leaves) {
    PyObject *const *bound;
    if (!e->ngrads) return 1;
    thx_guards_bound(e->guards, &bound);
    if (!leaves->held && !(leaves->held = PyList_New(0))) return -1;
    int same = 1;
    for (uint32_t i = 0; i < e->ngrads && same == 1; i++) {
        int32_t leaf = e->root_leaf[e->grads[i].root];
        PyObject *tensor = leaf >= 0 ? leaves->items[leaf] : bound[-1 - leaf];
        PyObject *grad = x->grad_get(tensor, x->grad_closure);
        same = grad && PyList_Append(leaves->held, grad) == 0 ? thx_spec_match(x, &e->grads[i].spec, grad, leaves) : -1;
        Py_XDECREF(grad);
    }
    return same;
}

void thx_entry_free_grads(thx_entry *e) {
    for (uint32_t i = 0; i < e->ngrads; i++) thx_spec_fini(&e->grads[i].spec);
    PyMem_Free(e->grads);
}
