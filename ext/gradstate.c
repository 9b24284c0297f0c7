/* What autograd would say while a program is captured.
 *
 * Fakes never require grad for torch: autograd does not run on them. Which values would, is a flag of their types,
 * decided here operation by operation; user code that asks is answered from it. It is what the code is told, no more:
 * what is really differentiated is found out from the derivatives (src/passes/grad.c).
 */
#include "capture.h"

#include <string.h>

static bool is_named(const thx_recorder *r, th_str callee, const char *name) {
    return callee && strcmp(th_str_get(r->x->ctx, callee), name) == 0;
}

static bool flagged(const thx_recorder *r, th_val v) {
    return th_type_get(r->x->ctx, r->t->values[v].type)->flags & TH_TYPE_REQUIRES_GRAD;
}

/* Results of these require no grad, whatever they are given. */
static bool cuts_gradients(const thx_recorder *r, th_str callee, const th_opdef *def) {
    static const char *const names[] = {"detach", "data.__get__", "_like", "new_", "detach_"};
    const char *name = callee ? th_str_get(r->x->ctx, callee) : "";
    if (def && def->fusion == TH_FUSE_FACTORY) return true;
    const char *last = strstr(name, "torch.Tensor.") == name ? name + 13
                       : strrchr(name, '.')                  ? strrchr(name, '.') + 1
                                                             : name;
    size_t n = strlen(last);
    return strcmp(last, names[0]) == 0 || strcmp(last, names[1]) == 0 || strcmp(last, names[4]) == 0 ||
           (n > 5 && strcmp(last + n - 5, names[2]) == 0) || strncmp(last, names[3], 4) == 0;
}

static PyObject *saved_tensor_hooks(thx *x) {
    return x->top_hooks ? PyObject_CallOneArg(x->top_hooks, Py_False) : Py_NewRef(Py_None);
}

int thx_note_hooks_begin(thx_recorder *r) {
    r->hooks = saved_tensor_hooks(r->x);
    return r->hooks ? 0 : -1;
}

static bool is_checkpoint(PyObject *hooks) { /* (pack, unpack) */
    PyObject *pack = PyTuple_Check(hooks) && PyTuple_GET_SIZE(hooks) ? PyTuple_GET_ITEM(hooks, 0) : NULL;
    PyObject *name = pack ? PyObject_GetAttrString(pack, "__qualname__") : NULL;
    const char *text = name && PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
    bool found = text && strncmp(text, "_checkpoint_hook.", 17) == 0;
    PyErr_Clear();
    Py_XDECREF(name);
    return found;
}

/* Hooks that the code itself put around an operation: those of torch.utils.checkpoint say to run it again. */
static int look_at_hooks(thx_recorder *r, thx_grad_note *note) {
    PyObject *now = r->hooks ? saved_tensor_hooks(r->x) : Py_NewRef(Py_None);
    if (!now) return -1;
    int same = !r->hooks || now == r->hooks ? 1 : PyObject_RichCompareBool(now, r->hooks, Py_EQ);
    bool checkpoint = r->recompute > 0 || (same == 0 && is_checkpoint(now));
    Py_DECREF(now);
    if (checkpoint) note->marks |= TH_MARK_RECOMPUTE;
    if (same != 0 || checkpoint) return same < 0 ? -1 : 0;
    thx_grad_needed(r, "the function puts saved tensor hooks around a part of itself");
    return -1;
}

/* The real tensor that a tensor stands for, when it is an input of the capture as it came; borrowed. */
static PyObject *root_of(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_known(r, tensor);
    if (!cell && !thx_is_fake(r->x, tensor)) return tensor;
    for (uint32_t i = 0; cell && i < r->nroots; i++)
        if (r->roots[i].value == cell->value) return r->roots[i].real;
    return NULL;
}

bool thx_tensor_says(PyObject *tensor, const char *attribute) {
    PyObject *flag = PyObject_GetAttrString(tensor, attribute);
    if (flag && PyCallable_Check(flag)) Py_SETREF(flag, PyObject_CallNoArgs(flag));
    PyErr_Clear();
    Py_XDECREF(flag); /* a singleton */
    return flag == Py_True;
}

/* The object of the caller, whatever was written to it since. */
static bool comes_from_outside(thx_recorder *r, PyObject *tensor) {
    return !thx_is_fake(r->x, tensor) || thx_recorder_root(r, tensor);
}

/* x.is_inference(): of what the program computes it follows from the modes around it, and of most inputs too. */
bool thx_asks_of_intermediate(thx_recorder *r, const thx_func *f, PyObject *args) {
    const char *name = f->callee ? th_str_get(r->x->ctx, f->callee) : "";
    if (strcmp(name, "torch.Tensor.is_inference") != 0 || PyTuple_GET_SIZE(args) != 1) return false;
    PyObject *tensor = PyTuple_GET_ITEM(args, 0), *root = root_of(r, tensor);
    return !comes_from_outside(r, tensor) || (root && !r->inference && !thx_tensor_says(root, "is_inference"));
}

/* What x.detach_() does to a tensor no trace holds; it raises for a view. */
static int refuse_detaching(thx_recorder *r, th_str callee) {
    if (!is_named(r, callee, "torch.Tensor.detach_") || !r->ninputs) return 0;
    thx_cell *cell = thx_recorder_cell(r, r->inputs[0]);
    if (!cell) return -1;
    if (!flagged(r, cell->value) && !r->t->values[cell->value].alias && !comes_from_outside(r, r->inputs[0])) return 0;
    thx_grad_needed(r, "a tensor is detached in place");
    return -1;
}

/* The other inputs give a shape or a dtype. */
static bool looks_at_first(const thx_recorder *r, th_str callee, const th_opdef *def) {
    static const char *const names[] = {"type_as", "view_as", "reshape_as", "expand_as"};
    const char *name = callee ? th_str_get(r->x->ctx, callee) : "", *dot = strrchr(name, '.');
    bool found = def && def->fusion == TH_FUSE_VIEW;
    for (size_t i = 0; dot && i < sizeof names / sizeof *names && !found; i++) found = strcmp(dot + 1, names[i]) == 0;
    return found;
}

int thx_note_grad(thx_recorder *r, th_str callee, const th_opdef *def, thx_grad_note *note) {
    bool any = false;
    *note = (thx_grad_note){false, 0};
    bool first = r->ninputs && looks_at_first(r, callee, def), others = false;
    for (uint32_t i = 0; i < r->ninputs && !any; i++) {
        thx_cell *cell = thx_recorder_cell(r, r->inputs[i]);
        if (!cell) return -1;
        *(first && i ? &others : &any) |= flagged(r, cell->value);
    }
    if (refuse_detaching(r, callee) < 0) return -1;
    int on = thx_grad_mode(r->x);
    if (on < 0) return -1;
    note->marks = (on ? 0 : TH_MARK_GRAD_OFF) | (others && !any ? TH_MARK_NO_GRAD : 0);
    if (!any) return 0;
    if (on && (r->inference || r->inside)) {
        thx_grad_needed(r, "gradients are switched on inside inference mode");
        return -1;
    }
    note->grad = on && !cuts_gradients(r, callee, def);
    if (note->grad && callee && strstr(th_str_get(r->x->ctx, callee), "as_strided_scatter")) {
        thx_grad_needed(r, "torch.as_strided_scatter has a derivative of torch's own that is not compiled");
        return -1;
    }
    note->marks |= on ? 0 : TH_MARK_NO_GRAD;
    return on ? look_at_hooks(r, note) : 0;
}

th_typeref thx_flag_type(const thx_recorder *r, th_typeref type, const thx_grad_note *note) {
    if (!note->grad) return type;
    char class_ = th_dtype_get((th_dtype)th_type_get(r->x->ctx, type)->dtype)->class_;
    return class_ == 'f' || class_ == 'c' ? th_type_set_grad(r->x->ctx, type, true) : type;
}

/* ---- writes ---- */

int thx_doubt(thx_recorder *r, const char *why) {
    if (!r->doubt) r->doubt = PyUnicode_FromString(why); /* user code may catch it: the recorder raises it at the end */
    if (r->doubt) PyErr_SetObject(PyExc_RuntimeError, r->doubt);
    return -1;
}

typedef struct source {
    const th_trace *t;
    uint32_t alias;
    th_val found;
} source;

static void find_source(void *user, th_val *value) {
    source *s = user;
    if (!s->found && s->t->values[*value].alias == s->alias) s->found = *value;
}

/* Torch lets nobody write with gradients to such a view, nor to one made while they were off. */
static bool gives_several(const thx_recorder *r, const th_op *op) {
    (void)r;
    return op->outs_list && !op->nwrites;
}

static bool gives_gradless(const thx_recorder *r, const th_op *op) {
    (void)r;
    return op->marks & TH_MARK_GRAD_OFF && !op->nwrites;
}

static bool gives_detached(const thx_recorder *r, const th_op *op) {
    return op->callee && !op->nwrites && cuts_gradients(r, op->callee, NULL);
}

/* What `value` is a view of, or was before it was written; 0: an operation made it anew, or it is an input. */
static th_val source_of(const thx_recorder *r, th_val value) {
    source s = {r->t, r->t->values[value].alias, 0};
    if (s.alias && r->t->values[value].def) th_op_each_use(r->t, r->t->values[value].def, find_source, &s);
    return s.found;
}

/* Is it a view that such an operation gave, or a view of one? */
static bool is_view_by(const thx_recorder *r, th_val value, bool (*such)(const thx_recorder *, const th_op *)) {
    th_val of = source_of(r, value);
    for (int steps = 0; steps < 64 && of; steps++, value = of, of = source_of(r, value))
        if (such(r, &r->t->ops[r->t->values[value].def])) return true;
    return false;
}

/* One of several views that an operation gave (chunk, split, unbind), or a view of one. */
static bool is_one_of_several(const thx_recorder *r, th_val value) { return is_view_by(r, value, gives_several); }

/* Does a view of what is written lose its place in autograd's graph? torch raises when it is used again: it follows
 * writes to its base only for a view that is an operation's one result, made while gradients were on. */
static bool strands_a_view(const thx_recorder *r, th_val written) {
    const th_trace *t = r->t;
    uint32_t alias = t->values[written].alias;
    for (th_val v = 1; alias && v < t->nvalues; v++) {
        if (t->values[v].alias != alias || !source_of(r, v)) continue;
        const th_op *op = &t->ops[t->values[v].def];
        if (op->nwrites || gives_detached(r, op)) continue;
        if (op->marks & TH_MARK_NO_GRAD || is_one_of_several(r, v)) return true;
    }
    return false;
}

typedef struct span { /* of memory, in elements */
    int64_t first, last;
    bool dense; /* and without holes */
} span;

static bool overlaps_itself(const th_type *t) {
    for (uint32_t i = 0; i < t->ndim; i++)
        if (t->stride[i] == 0 && t->shape[i] > 1) return true;
    return false;
}

static span span_of(const thx_recorder *r, th_val v) {
    const th_type *t = th_type_get(r->x->ctx, r->t->values[v].type);
    span s = {r->t->values[v].offset, r->t->values[v].offset, true};
    for (uint32_t i = 0; i < t->ndim; i++) s.last += t->stride[i] * (t->shape[i] - 1);
    s.dense = s.last - s.first + 1 == th_type_numel(t);
    return s;
}

/* Does an input of the operation lie partly where the written tensor lies? As far as torch looks: at dense ones. */
static bool reads_what_it_writes(thx_recorder *r, th_val value) {
    uint32_t alias = r->t->values[value].alias;
    span to = span_of(r, value);
    for (uint32_t i = 0; alias && to.dense && !r->writes_part && i < r->ninputs; i++) {
        thx_cell *cell = thx_recorder_cell(r, r->inputs[i]);
        if (!cell || cell->value == value || r->t->values[cell->value].alias != alias) continue;
        span from = span_of(r, cell->value);
        bool same = from.first == to.first && from.last == to.last;
        if (from.dense && !same && from.first <= to.last && to.first <= from.last) return true;
    }
    PyErr_Clear();
    return false;
}

/* A leaf that requires grad, or a view of one. */
static bool belongs_to_leaf(PyObject *tensor) {
    if (thx_tensor_says(tensor, "is_leaf")) return true;
    PyObject *base = PyObject_GetAttrString(tensor, "_base");
    bool leaf = base && base != Py_None && thx_tensor_says(base, "is_leaf");
    PyErr_Clear();
    Py_XDECREF(base);
    return leaf;
}

/* Why torch would refuse to write to an input, or to a view of it. */
static const char *refused_write(const thx_recorder *r, const thx_root *root, bool differentiable) {
    if (differentiable && root->requires_grad && belongs_to_leaf(root->real))
        return "a leaf that requires grad is written to";
    return !r->inference && !r->inside && thx_tensor_says(root->real, "is_inference")
               ? "an inference tensor is written to"
               : NULL;
}

/* Does something that requires grad lie in the memory of `value`? */
static bool shares_with_differentiable(const thx_recorder *r, th_val value) {
    const th_trace *t = r->t;
    uint32_t alias = t->values[value].alias;
    for (th_val v = 1; alias && v < t->nvalues; v++)
        if (t->values[v].alias == alias && flagged(r, v)) return true;
    return false;
}

/* Would torch refuse to write to `value`? What it does then is found out by running the original. */
int thx_check_write(thx_recorder *r, th_val value, thx_grad_note *note) {
    const th_trace *t = r->t;
    bool differentiable = flagged(r, value) && !(note->marks & TH_MARK_NO_GRAD);
    const char *why = NULL;
    if (!flagged(r, value) && shares_with_differentiable(r, value)) {
        if (thx_grad_mode(r->x) == 1)
            return thx_grad_needed(r, "a tensor that requires grad is written to through .data or detach()"), -1;
        note->marks |= TH_MARK_NO_GRAD;
        r->hidden_write = true;
    }
    if (note->grad &&
        is_view_by(r, value, gives_detached)) /* its memory then holds what its base has no gradient for */
        return thx_grad_needed(r, "what requires grad is written to a tensor through .data or detach()"), -1;
    if (overlaps_itself(th_type_get(r->x->ctx, t->values[value].type)))
        why = "a tensor that overlaps itself is written to";
    else if (differentiable && is_one_of_several(r, value))
        why = "one of several views is written to";
    else if (note->grad && is_view_by(r, value, gives_gradless))
        why = "a view made while gradients were off is written to";
    else if (note->grad && strands_a_view(r, value))
        why = "a tensor is written to of which views were made together, or while gradients were off";
    else if (reads_what_it_writes(r, value))
        why = "a tensor is written to that overlaps with what is read";
    for (uint32_t i = 0; i < r->nroots && !why; i++) {
        const thx_root *root = &r->roots[i];
        uint32_t alias = t->values[root->value].alias;
        if (root->value != value && !(alias && alias == t->values[value].alias)) continue;
        why = refused_write(r, root, differentiable);
    }
    return why ? thx_doubt(r, why) : 0;
}

/* `value` was written: all that share its storage now show what requires grad. */
void thx_note_write(thx_recorder *r, th_val value, const thx_grad_note *note) {
    th_trace *t = r->t;
    uint32_t alias = t->values[value].alias;
    if (note->marks & TH_MARK_NO_GRAD && flagged(r, value)) r->hidden_write = true;
    if (thx_was_made_leaf(r, value)) r->hidden_write = true; /* and eager would refuse it */
    if (!note->grad) return;
    t->values[value].type = thx_flag_type(r, t->values[value].type, note);
    for (th_val v = 1; alias && v < t->nvalues; v++) {
        th_opref def = t->values[v].alias == alias ? t->values[v].def : 0;
        if (def && !(source_of(r, v) && gives_detached(r, &t->ops[def])))
            t->values[v].type = thx_flag_type(r, t->values[v].type, note);
    }
}

PyObject *thx_grad_needed(thx_recorder *r, const char *why) {
    th_str file = 0;
    uint32_t line = 0;
    thx_user_line(r, &file, &line);
    if (!r->needed)
        r->needed = PyUnicode_FromFormat("%s, line %u: %s", file ? th_str_get(r->x->ctx, file) : "?", line, why);
    if (r->needed) PyErr_SetObject(r->x->GradNeeded, r->needed);
    return NULL;
}

/* ---- answers ---- */

/* What stands for the grad_fn of an intermediate: it is not None, and that is all that it can say. */
static PyObject *grad_fn_attribute(PyObject *self, PyObject *name) {
    PyObject *found = PyObject_GenericGetAttr(self, name);
    thx *x = PyType_GetModuleState(Py_TYPE(self));
    if (found || !PyErr_ExceptionMatches(PyExc_AttributeError)) return found;
    PyErr_Clear();
    return PyErr_Format(x->GradNeeded, "the function uses %U of a grad_fn", name);
}

static PyType_Slot grad_fn_slots[] = {{Py_tp_getattro, grad_fn_attribute},
                                      {Py_tp_doc, "The grad_fn of a tensor while its function is captured."},
                                      {0, NULL}};
static PyType_Spec grad_fn_spec = {"thunder._C.GradFn", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT, grad_fn_slots};

int thx_gradstate_init(thx *x, PyObject *module) {
    x->GradFn = (PyTypeObject *)PyType_FromModuleAndSpec(module, &grad_fn_spec, NULL);
    return x->GradFn ? 0 : -1;
}

int thx_tensor_flag(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_known(r, tensor); /* of a real tensor too: it may have been written to */
    if (!cell && thx_is_fake(r->x, tensor)) cell = thx_recorder_cell(r, tensor);
    if (cell || thx_is_fake(r->x, tensor)) return cell ? flagged(r, cell->value) : -1;
    PyObject *flag = r->x->requires_grad_get(tensor, r->x->requires_grad_closure);
    Py_XDECREF(flag);
    return flag ? flag == Py_True : -1;
}

bool thx_was_made_leaf(const thx_recorder *r, th_val value) {
    PyObject *id = r->leaves ? PyLong_FromUnsignedLong(value) : NULL;
    bool found = id && PySet_Contains(r->leaves, id) == 1;
    Py_XDECREF(id);
    return found;
}

/* A tensor that the code computed is made to require grad. Its gradient ends there, where nobody sees it: what reads it
 * runs in eager. What is left is what the code is told, and whether results require grad for its sake (compile.c). */
int thx_make_leaf(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    if (!cell || (!r->leaves && !(r->leaves = PySet_New(NULL)))) return -1;
    PyObject *id = PyLong_FromUnsignedLong(cell->value);
    int rc = id ? PySet_Add(r->leaves, id) : -1;
    Py_XDECREF(id);
    th_typeref *type = &r->t->values[cell->value].type;
    *type = th_type_set_grad(r->x->ctx, *type, true);
    cell->ours = false;
    return rc;
}

static bool may_require_grad(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_cell(r, tensor);
    const th_type *type = cell ? th_type_get(r->x->ctx, r->t->values[cell->value].type) : NULL;
    char class_ = type ? th_dtype_get((th_dtype)type->dtype)->class_ : 0;
    PyErr_Clear();
    return class_ == 'f' || class_ == 'c';
}

static PyObject *set_requires_grad(thx_recorder *r, PyObject *tensor, int is, PyObject *wanted) {
    int on = PyObject_IsTrue(wanted);
    if (on < 0) return NULL;
    if (on == is) return Py_NewRef(tensor);
    if (on && !comes_from_outside(r, tensor) && may_require_grad(r, tensor))
        return thx_make_leaf(r, tensor) < 0 ? NULL : Py_NewRef(tensor);
    return thx_grad_needed(r,
                           on ? "a tensor is made to require gradients" : "a tensor is made to require no gradients");
}

PyObject *thx_ask_autograd(thx_recorder *r, const thx_func *f, PyObject *func, PyObject *args, PyObject *kwargs) {
    const char *name = f->callee ? th_str_get(r->x->ctx, f->callee) : "";
    PyObject *tensor = PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : NULL;
    if (strncmp(name, "torch.Tensor.", 13) != 0 || !tensor || !thx_is_tensor(r->x, tensor))
        return thx_grad_needed(r, "gradients are computed inside the function");
    int is = thx_tensor_flag(r, tensor);
    if (is < 0) return NULL;
    name += 13;
    if (strcmp(name, "requires_grad.__get__") == 0) return PyBool_FromLong(is);
    PyObject *root = root_of(r, tensor);
    if (strcmp(name, "is_leaf.__get__") == 0 && is && !root) {
        thx_cell *cell = thx_recorder_cell(r, tensor);
        return cell ? PyBool_FromLong(thx_was_made_leaf(r, cell->value)) : NULL;
    }
    if (strcmp(name, "is_leaf.__get__") == 0 && !is) Py_RETURN_TRUE;
    if (strcmp(name, "is_leaf.__get__") == 0 && Py_TYPE(root) != r->x->Tensor) return PyObject_CallOneArg(func, root);
    if (strcmp(name, "requires_grad_") == 0) {
        PyObject *flag = PyTuple_GET_SIZE(args) > 1 ? PyTuple_GET_ITEM(args, 1)
                         : kwargs                   ? PyDict_GetItemString(kwargs, "requires_grad")
                                                    : Py_True;
        return set_requires_grad(r, tensor, is, flag ? flag : Py_True);
    }
    if (strcmp(name, "requires_grad.__set__") == 0 && PyTuple_GET_SIZE(args) > 1) {
        PyObject *same = set_requires_grad(r, tensor, is, PyTuple_GET_ITEM(args, 1));
        if (!same) return NULL;
        Py_DECREF(same);
        Py_RETURN_NONE;
    }
    if (strcmp(name, "register_hook") == 0 || strcmp(name, "retain_grad") == 0) {
        if (!is) return PyObject_Call(func, args, kwargs); /* torch's own error */
        if (!root && name[2] == 't') return thx_tie_grad(r, tensor);
        PyObject *hook = PyTuple_GET_SIZE(args) > 1 ? PyTuple_GET_ITEM(args, 1) : PyDict_GetItemString(kwargs, "hook");
        if (!root && hook) return thx_tie_hook(r, tensor, hook);
    }
    if (is && strcmp(name, "grad_fn.__get__") == 0) {
        thx_cell *cell = thx_recorder_cell(r, tensor);
        if (!cell) return NULL;
        if (thx_was_made_leaf(r, cell->value)) Py_RETURN_NONE;
        PyObject *node = thx_tie_node(r, tensor);
        if (node || PyErr_Occurred()) return node;
        if (!root) return PyObject_CallNoArgs((PyObject *)r->x->GradFn);
    }
    if (!is && strcmp(name, "grad_fn.__get__") == 0) Py_RETURN_NONE;
    if (strcmp(name, "grad.__get__") == 0) {
        PyObject *grad = !is && !root ? Py_NewRef(Py_None) : thx_read_grad_of(r, tensor);
        if (grad || PyErr_Occurred()) return grad;
    }
    if (is) {
        char why[120];
        snprintf(why, sizeof why, "the function uses torch.Tensor.%.60s of a tensor that requires grad", name);
        return thx_grad_needed(r, why);
    }
    thx_capture_error(r, th_str_get(r->x->ctx, f->callee), "it acts on autograd's state, which a trace does not hold",
                      "call it outside the compiled function");
    return NULL;
}
