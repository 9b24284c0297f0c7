/* Running a program: the first run compares each result with what the trace says of it. */
#include "program.h"

#include "capture.h"
#include "lower.h"
#include "shadow.h"
#include "sizes.h"

#include "passes/pass.h"

#include <string.h>

int thx_program_lower(thx *x, thx_program *p, bool plain) {
    th_plan_free(p->plan);
    PyMem_Free(p->slot_of);
    p->slot_of = NULL;
    p->nshim = p->nbuiltin = 0;
    p->plan = thx_lower(x, p->t, plain, p->spends, &p->literals, &p->slot_of, &p->nshim, &p->nbuiltin);
    p->checked = !p->nshim;
    return p->plan ? 0 : -1;
}

void thx_program_fini(thx_program *p) {
    th_plan_free(p->plan);
    PyMem_Free(p->slot_of);
    PyMem_Free(p->literals.numbers);
    th_trace_free(p->t);
    *p = (thx_program){0};
}

void thx_literals_fill(const thx_program *p, PyObject *values, th_slot *slots) {
    for (uint32_t i = 0; i < p->literals.nnumbers; i++)
        slots[p->t->ninputs + i] = (th_slot){.object = PyTuple_GET_ITEM(values, p->literals.numbers[i].from)};
}

uint32_t thx_program_result(const thx_program *p, uint32_t n) {
    const th_trace *t = p->t;
    const th_node_data *d = &t->nodes[t->result];
    if (d->kind == TH_N_TUPLE) d = &t->nodes[t->kids[d->u.kids + n]];
    return d->kind == TH_N_VALUE ? p->slot_of[d->u.ref] : UINT32_MAX;
}

/* Name the user's line on an exception that a kernel raised. */
void thx_program_name_line(thx *x, const thx_program *p, uint32_t failed) {
    const th_op *op = &p->t->ops[p->plan->instrs[failed].op];
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (!type) return thx_raise(x, TH_ERUN), (void)0;
    PyErr_NormalizeException(&type, &value, &trace);
    if (value && op->file) {
        PyObject *text =
            PyUnicode_FromFormat("raised by compiled code for %s, line %u: %s", th_str_get(x->ctx, op->file), op->line,
                                 op->callee ? th_str_get(x->ctx, op->callee) : "a function");
        PyObject *done = text ? PyObject_CallMethod(value, "add_note", "O", text) : NULL;
        Py_XDECREF(done);
        Py_XDECREF(text);
        PyErr_Clear();
    }
    PyErr_Restore(type, value, trace);
}

/* Is a result what the trace says? Strides of dimensions with at most one element do not matter. */
bool thx_as_predicted(thx *x, th_slot *slot, const th_type *t) {
    if ((!slot->handle && !slot->object) || t->kind != TH_TYPE_TENSOR) return true;
    if (slot->object && !thx_is_tensor(x, slot->object)) return false;
    if (t->dtype == TH_U8 && th_type_numel(t) == 0) return true; /* a workspace: fake kernels do not know its size */
    th_h h = thx_slot_handle(x, slot);
    int64_t ndim = -1, *sizes = NULL, *strides = NULL;
    int32_t dtype = -1;
    if (x->abi.aoti_torch_get_dim(h, &ndim) || ndim != t->ndim || x->abi.aoti_torch_get_dtype(h, &dtype) ||
        dtype != x->abi.scalar_types[t->dtype] || x->abi.aoti_torch_get_sizes(h, &sizes) ||
        x->abi.aoti_torch_get_strides(h, &strides))
        return false;
    bool same = true, empty = th_type_numel(t) == 0;
    for (int64_t i = 0; i < ndim; i++)
        same &= sizes[i] == t->shape[i] && (empty || sizes[i] <= 1 || strides[i] == t->stride[i]);
    return same;
}

typedef struct prediction {
    thx *x;
    const thx_program *p;
    th_slot *slots;
    const th_instr *instr;
    bool holds;
} prediction;

/* A result that nobody uses may be what it likes. */
static bool dies_here(const prediction *p, uint32_t slot) {
    const uint32_t *dead = p->p->plan->frees + p->instr->frees;
    for (uint32_t i = 0; i < p->instr->nfrees; i++)
        if (dead[i] == slot) return true;
    return false;
}

static void check_out(void *user, th_val *value) {
    prediction *p = user;
    uint32_t slot = p->p->slot_of[*value];
    if (slot != UINT32_MAX && !dies_here(p, slot))
        p->holds &= thx_as_predicted(p->x, &p->slots[slot], th_type_get(p->x->ctx, p->p->t->values[*value].type));
}

/* As th_plan_run, comparing each result with the trace: 0, -1 error, 1 a result differs. */
static int run_checked(thx *x, const thx_program *p, th_frame *f) {
    prediction check = {x, p, f->slots, NULL, true};
    const th_plan *plan = p->plan;
    for (uint32_t i = 0; i < plan->ninstrs; i++) {
        const th_instr *instr = check.instr = &plan->instrs[i];
        int rc = instr->run(f, instr);
        if (rc == 0 && instr->op) th_op_each_out(p->t, instr->op, check_out, &check);
        if (rc || !check.holds) {
            f->failed = i;
            th_plan_clear(plan, f);
            return rc ? -1 : 1;
        }
        for (uint32_t j = 0; j < instr->nfrees; j++) th_slot_drop(plan, &f->slots[plan->frees[instr->frees + j]]);
    }
    return 0;
}

/* What the first run may have to take back, or NULL: nothing, or an exception. */
static PyObject *remember(thx *x, const thx_program *p, th_slot *slots) {
    const th_trace *t = p->t;
    uint8_t effects = 0;
    for (th_opref o = 1; o < t->nops; o++) effects |= t->ops[o].effects;
    if (!(effects & (TH_FX_RANDOM | TH_FX_WRITES))) return NULL;
    PyObject *written = PyList_New(0), *undo = NULL;
    int rc = written ? 0 : -1;
    for (uint32_t i = 0; i < t->ninputs && rc == 0; i++) {
        if (!th__is_written(t, t->inputs[i], t->nops)) continue;
        PyObject *tensor = thx_slot_object(x, &slots[i]);
        rc = tensor ? PyList_Append(written, tensor) : -1;
    }
    bool draws = effects & TH_FX_RANDOM;
    if (rc == 0 && (draws || PyList_GET_SIZE(written))) undo = thx_undo_new(x, t, written, draws);
    Py_XDECREF(written);
    return undo;
}

/* Did an operation that came before this one act on something else than tensors and generators? */
static bool acted(const thx *x, const th_trace *t, th_opref end) {
    bool found = false;
    for (th_opref o = 1; o < end && !found; o++) {
        const char *name = t->ops[o].callee_opaque ? "" : th_str_get(x->ctx, t->ops[o].callee);
        found = (t->ops[o].effects & TH_FX_STATE) && !(t->ops[o].effects & TH_FX_RANDOM) &&
                !thx_mark_kind(t, &t->ops[o]) && strncmp(name, "thunder._kernels.", 17) != 0;
    }
    return found;
}

/* Predicted strides were wrong: lower without what trusts them. */
static int start_over(thx *x, thx_program *p, const th_frame *f, PyObject *undo) {
    th_opref at = p->plan->instrs[f->failed].op;
    const th_op *op = &p->t->ops[at];
    if (acted(x, p->t, at)) {
        PyErr_Format(PyExc_RuntimeError,
                     "%s (%s, line %u) gave other strides than torch's fake kernel said, after an operation with an "
                     "effect of its own; please report this",
                     th_str_get(x->ctx, op->callee), op->file ? th_str_get(x->ctx, op->file) : "?", op->line);
        return -1;
    }
    PyObject *done = undo ? PyObject_CallMethod(undo, "restore", NULL) : Py_NewRef(Py_None);
    Py_XDECREF(done);
    return !done || thx_program_lower(x, p, true) < 0 ? -1 : 1;
}

int thx_program_run(thx *x, thx_program *p, th_slot *slots) {
    th_frame frame = {.slots = slots, .user = x};
    memset(slots + p->plan->nroots, 0, sizeof *slots * (p->plan->nslots - p->plan->nroots));
    PyObject *undo = p->checked ? NULL : remember(x, p, slots);
    int rc = p->checked ? th_plan_run(p->plan, &frame) : PyErr_Occurred() ? -2 : run_checked(x, p, &frame);
    if (rc == -2) th_plan_clear(p->plan, &frame);
    if (rc == 1 && !p->checked) rc = start_over(x, p, &frame, undo) < 0 ? -2 : 1;
    Py_XDECREF(undo);
    if (rc == 1 || rc == -2) return rc == 1 ? 1 : -1;
    p->failed = rc ? p->plan->instrs[frame.failed].op : 0;
    if (rc) {
        thx_program_name_line(x, p, frame.failed);
        return -1;
    }
    p->checked = true;
    return 0;
}
