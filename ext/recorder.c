/* What a capture has seen: which object stands for which value, where inputs come from, what is constant.
 *
 * The recorder owns every fake of its capture, so that an address in the table cannot be reused while it runs.
 */
#include "ambient.h"
#include "capture.h"
#include "origin.h"
#include "shadow.h"

#include "passes/pass.h"

#include <string.h>

/* ---- pointer table ---- */

static thx_cell *probe(thx_cell *cells, uint32_t cap, PyObject *key) {
    uint32_t at = (uint32_t)(((uintptr_t)key >> 4) * 2654435761u) & (cap - 1);
    while (cells[at].key && cells[at].key != key) at = (at + 1) & (cap - 1);
    return &cells[at];
}

static int grow_cells(thx_recorder *r) {
    uint32_t cap = r->cap_cells ? r->cap_cells * 2 : 256;
    thx_cell *cells = PyMem_Calloc(cap, sizeof *cells);
    if (!cells) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < r->cap_cells; i++)
        if (r->cells[i].key) *probe(cells, cap, r->cells[i].key) = r->cells[i];
    PyMem_Free(r->cells);
    r->cells = cells;
    r->cap_cells = cap;
    return 0;
}

static thx_cell *insert(thx_recorder *r, PyObject *key, PyObject *fake, th_val value) {
    if (r->ncells * 2 >= r->cap_cells && grow_cells(r) < 0) return NULL;
    thx_cell *cell = probe(r->cells, r->cap_cells, key);
    if (!cell->key) {
        cell->key = Py_NewRef(key);
        cell->fake = Py_XNewRef(fake);
        r->ncells++;
    }
    cell->value = value;
    return cell;
}

int thx_recorder_define(thx_recorder *r, PyObject *fake, th_val value) { return insert(r, fake, NULL, value) ? 0 : -1; }

/* ---- roots ---- */

static bool is_name_char(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); }

/* p_ and the dotted name for what lives in a module; a0 for an argument, c3 for a constant. */
static th_str root_name(thx_recorder *r, PyObject *place, int32_t leaf) {
    char text[200], *out = text;
    if (!place) {
        snprintf(text, sizeof text, "%c%d", leaf >= 0 ? 'a' : 'c', leaf >= 0 ? (int)leaf : (int)r->nroots);
        return th_intern_z(r->x->ctx, text);
    }
    *out++ = 'p';
    *out++ = '_';
    for (const char *name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(place, 2)); name && *name && out < text + sizeof text;)
        *out++ = is_name_char(*name) ? *name : '_', name++;
    return th_intern(r->x->ctx, text, (size_t)(out - text));
}

/* A class of its own decides what operations on it mean: all but torch's, and parameters that add only a name. */
static bool plain_class(thx *x, PyTypeObject *type) {
    if (type == x->Tensor || type == x->Parameter) return true;
    if (!PyType_IsSubtype(type, x->Parameter)) return false;
    PyObject *function = PyObject_GetAttrString((PyObject *)type, "__torch_function__");
    PyObject *dispatch = PyObject_GetAttr((PyObject *)type, x->n.torch_dispatch);
    bool plain = function == x->no_function && dispatch == x->no_dispatch;
    PyErr_Clear();
    Py_XDECREF(function);
    Py_XDECREF(dispatch);
    return plain;
}

int thx_refuse_lazy(thx_recorder *r) {
    return thx_capture_error(r, "a lazily conjugated or negated tensor", "its memory holds other values than it shows",
                             "pass x.resolve_conj().resolve_neg()");
}

static int refuse_tensor(thx_recorder *r, PyObject *tensor) {
    thx *x = r->x;
    if (!plain_class(x, Py_TYPE(tensor))) {
        char text[200];
        snprintf(text, sizeof text, "a tensor of the subclass %.100s", Py_TYPE(tensor)->tp_name);
        return thx_capture_error(r, text, "operations on it are defined by its own class",
                                 "pass the plain tensor inside it");
    }
    PyObject *nested = PyObject_GetAttrString(tensor, "is_nested");
    Py_XDECREF(nested);
    if (!nested) return -1;
    if (nested == Py_True)
        return thx_capture_error(r, "a nested tensor", "its rows have lengths of their own",
                                 "pad it with to_padded_tensor() first, or call this part without thunder.jit");
    PyObject *layout = PyObject_GetAttrString(tensor, "layout");
    bool strided = layout == x->strided;
    Py_XDECREF(layout);
    if (!layout) return -1;
    if (!strided)
        return thx_capture_error(r, "a sparse, nested or mkldnn tensor", "its layout has no strides",
                                 "convert it with to_dense() first, or call this part without thunder.jit");
    for (int i = 0; i < 2; i++) { /* lazy conjugation and negation are bits beside the metadata */
        PyObject *lazy = PyObject_CallMethod(tensor, i ? "is_neg" : "is_conj", NULL);
        Py_XDECREF(lazy);
        if (!lazy) return -1;
        if (lazy == Py_True) return thx_refuse_lazy(r);
    }
    PyObject *quantized = PyObject_GetAttrString(tensor, "is_quantized");
    bool bad = quantized == Py_True;
    Py_XDECREF(quantized);
    return bad ? thx_capture_error(r, "a quantized tensor", "its values have no plain dtype",
                                   "dequantize() it first, or call this part without thunder.jit")
               : 0;
}

/* A plain strided tensor, told at little cost; what is not is looked at again by refuse_tensor, which knows why. */
static bool is_plain_tensor(thx *x, PyObject *tensor, thx_meta *meta) {
    int32_t layout = -1;
    if (!x->abi.on || !x->abi.aoti_torch_get_layout || !x->abi.aoti_torch_layout_strided ||
        (Py_TYPE(tensor) != x->Tensor && Py_TYPE(tensor) != x->Parameter) ||
        x->abi.aoti_torch_get_layout(thx_borrow(&x->abi, tensor), &layout) ||
        layout != x->abi.aoti_torch_layout_strided())
        return false;
    PyObject *negated = thx_read_meta(x, tensor, false, meta) == 0 ? PyObject_CallOneArg(x->is_neg, tensor) : NULL;
    PyErr_Clear();
    Py_XDECREF(negated); /* a singleton */
    return negated == Py_False && meta->dtype != TH_C64 && meta->dtype != TH_C128;
}

static thx_root *push_root(thx_recorder *r, thx_root root) {
    if (r->nroots == r->cap_roots) {
        uint32_t cap = r->cap_roots ? r->cap_roots * 2 : 64;
        thx_root *roots = PyMem_Realloc(r->roots, cap * sizeof *roots);
        if (!roots) return (thx_root *)PyErr_NoMemory();
        r->roots = roots;
        r->cap_roots = cap;
    }
    r->roots[r->nroots] = root;
    return &r->roots[r->nroots++];
}

int thx_recorder_constant_root(thx_recorder *r, PyObject *real, th_val value) {
    thx_root *root = push_root(r, (thx_root){.value = value, .leaf = -1});
    if (root) root->real = Py_NewRef(real);
    return root ? 0 : -1;
}

/* Inputs that share storage are one alias group. */
static void join_storage(thx_recorder *r, const thx_root *root) {
    for (thx_root *other = r->roots; root->base && other < root; other++) {
        if (other->base != root->base) continue;
        th_value *first = &r->t->values[other->value];
        if (!first->alias) first->alias = th_trace_alias(r->t);
        r->t->values[root->value].alias = first->alias;
        return;
    }
}

/* An input of the trace for a real tensor. Its fake is made when something has to run on it. */
static thx_cell *add_root(thx_recorder *r, PyObject *real, int32_t leaf) {
    thx *x = r->x;
    thx_meta meta;
    if (!is_plain_tensor(x, real, &meta) && (refuse_tensor(r, real) < 0 || thx_read_meta(x, real, false, &meta) < 0))
        return NULL;
    th_typeref type = thx_meta_type(x, &meta);
    PyObject *place = NULL, *id = NULL;
    if (leaf < 0 && r->params && (id = PyLong_FromVoidPtr(real))) place = PyDict_GetItemWithError(r->params, id);
    Py_XDECREF(id);
    th_val value = type ? th_trace_input(r->t, root_name(r, place, leaf), type) : 0;
    thx_root *root =
        value ? push_root(r, (thx_root){value, NULL, leaf, NULL, NULL, thx_storage_base(x, real), meta.requires_grad})
              : NULL;
    if (!root) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        return NULL;
    }
    r->t->values[value].offset = meta.offset;
    join_storage(r, root);
    root->real = Py_NewRef(real);
    if (place) {
        root->dict = Py_NewRef(PyTuple_GET_ITEM(place, 0));
        root->key = Py_NewRef(PyTuple_GET_ITEM(place, 1));
    }
    return insert(r, real, NULL, value);
}

PyObject *thx_recorder_fake(thx_recorder *r, PyObject *tensor) {
    thx *x = r->x;
    thx_cell *cell = thx_recorder_cell(r, tensor);
    if (!cell || thx_is_fake(x, cell->key)) return cell ? cell->key : NULL;
    th_val value = cell->value;
    PyObject *fake = thx_fake(x, r->t->values[value].type);
    if (!fake) return NULL;
    if (PyType_IsSubtype(Py_TYPE(tensor), x->Parameter) && PyObject_SetAttrString(fake, "_is_param", Py_True) < 0)
        PyErr_Clear();
    int rc = insert(r, fake, NULL, value) ? 0 : -1;
    if (rc == 0) probe(r->cells, r->cap_cells, tensor)->fake = Py_NewRef(fake);
    Py_DECREF(fake); /* the table owns it */
    return rc < 0 ? NULL : fake;
}

PyObject *thx_recorder_argument(thx_recorder *r, PyObject *real, uint32_t leaf) {
    thx_cell *cell = r->cap_cells ? probe(r->cells, r->cap_cells, real) : NULL;
    if ((!cell || !cell->key) && !add_root(r, real, (int32_t)leaf)) return NULL;
    return thx_recorder_fake(r, real);
}

const thx_root *thx_recorder_root(thx_recorder *r, PyObject *fake) {
    const thx_root *found = NULL;
    for (uint32_t i = 0; i < r->nroots && !found; i++) {
        const thx_cell *cell = probe(r->cells, r->cap_cells, r->roots[i].real);
        if (cell->key && cell->fake == fake) found = &r->roots[i];
    }
    return found;
}

static bool is_functorch(thx *x, PyObject *tensor) {
    PyObject *yes = PyObject_CallOneArg(x->is_functorch, tensor);
    PyErr_Clear();
    Py_XDECREF(yes);
    return yes == Py_True;
}

thx_cell *thx_recorder_known(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = r->cap_cells ? probe(r->cells, r->cap_cells, tensor) : NULL;
    if (!cell || !cell->key) return NULL;
    return cell->fake ? probe(r->cells, r->cap_cells, cell->fake) : cell;
}

thx_cell *thx_recorder_cell(thx_recorder *r, PyObject *tensor) {
    thx_cell *cell = thx_recorder_known(r, tensor);
    if (cell) return cell;
    if (thx_is_fake(r->x, tensor)) {
        thx_capture_error(r, "a tensor of another capture",
                          "it was made while something else was captured and kept since",
                          "do not keep tensors made inside a compiled call in globals or closures");
        return NULL;
    }
    if (is_functorch(r->x, tensor)) {
        r->wrapped_input = true;
        PyErr_SetString(PyExc_RuntimeError, "functorch wrapper");
        return NULL;
    }
    return add_root(r, tensor, -1);
}

th_val thx_recorder_value(void *user, PyObject *tensor) {
    thx_recorder *r = user;
    thx_cell *cell = thx_recorder_cell(r, tensor);
    if (!cell) return 0;
    if (r->ninputs == r->cap_inputs) {
        uint32_t cap = r->cap_inputs ? r->cap_inputs * 2 : 64;
        PyObject **inputs = PyMem_Realloc(r->inputs, cap * sizeof *inputs);
        if (!inputs) return PyErr_NoMemory(), 0;
        r->inputs = inputs;
        r->cap_inputs = cap;
    }
    r->real_inputs |= tensor != cell->key || !thx_is_fake(r->x, tensor);
    r->inputs[r->ninputs++] = cell->key;
    return cell->value;
}

/* ---- constants ---- */

static PyObject *const_value(void *user, th_val value) {
    PyObject *real = thx_recorder_constant(user, value);
    if (!real && !PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "not a constant");
    return Py_XNewRef(real);
}

PyObject *thx_eval_op(thx *x, const th_trace *t, const th_op *op, thx_value_fn value, void *user) {
    PyObject *callee = thx_callable(x, t, op);
    PyObject *args = callee ? thx_from_node(x, t, op->args, value, user) : NULL;
    PyObject *kwargs = args && op->kwargs ? thx_from_node(x, t, op->kwargs, value, user) : NULL;
    PyObject *result = args && (kwargs || !op->kwargs) ? PyObject_Call(callee, args, kwargs) : NULL;
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    return result;
}

typedef struct scan {
    thx_recorder *r;
    bool ok;
} scan;

static void scan_use(void *user, th_val *value) {
    scan *s = user;
    if (s->ok && !thx_recorder_constant(s->r, *value)) s->ok = false;
}

/* Distribute an evaluated result over the outs pattern. */
static void keep_consts(thx_recorder *r, th_node outs, PyObject *result) {
    const th_node_data *d = &r->t->nodes[outs];
    if (d->kind == TH_N_VALUE && thx_is_tensor(r->x, result) && d->u.ref < r->nconsts) {
        Py_XSETREF(r->consts[d->u.ref], Py_NewRef(result));
    } else if ((d->kind == TH_N_TUPLE || d->kind == TH_N_LIST) && (PyTuple_Check(result) || PyList_Check(result))) {
        for (uint32_t i = 0; i < d->count && i < (uint32_t)PySequence_Fast_GET_SIZE(result); i++)
            keep_consts(r, r->t->kids[r->t->nodes[outs].u.kids + i], PySequence_Fast_GET_ITEM(result, i));
    }
}

PyObject *thx_recorder_constant(thx_recorder *r, th_val value) {
    th_trace *t = r->t;
    if (r->nconsts < t->nvalues) {
        PyObject **consts = PyMem_Realloc(r->consts, sizeof(PyObject *) * t->nvalues);
        if (!consts) return PyErr_NoMemory();
        memset(consts + r->nconsts, 0, sizeof(PyObject *) * (t->nvalues - r->nconsts));
        r->consts = consts;
        r->nconsts = t->nvalues;
    }
    th_opref o = t->values[value].def;
    if (!o || th__is_written(t, value, t->nops)) return NULL;
    if (r->consts[value]) return r->consts[value];
    if (t->ops[o].effects || th_node_has_extent(t, t->ops[o].args) || th_node_has_extent(t, t->ops[o].kwargs))
        return NULL;
    scan s = {r, true};
    th_op_each_use(t, o, scan_use, &s);
    if (!s.ok || PyErr_Occurred()) return NULL;
    if (thx_numbers_folded(r, t, t->ops[o].args) < 0 || thx_numbers_folded(r, t, t->ops[o].kwargs) < 0) return NULL;
    PyObject *result = thx_eval_op(r->x, t, &t->ops[o], const_value, r);
    if (!result) return NULL;
    r->nevals++;
    keep_consts(r, t->ops[o].outs, result);
    Py_DECREF(result);
    return r->consts[value];
}

/* ---- the user's line ---- */

/* What is known about a code object: direct-mapped by address, which the reference keeps from being reused. */
static const thx_code *code_of(thx *x, PyCodeObject *code) {
    thx_code *c = &x->codes[((uintptr_t)code >> 5) % THX_CODES];
    if (c->code == (PyObject *)code) return c;
    const char *path = PyUnicode_AsUTF8(code->co_filename), *base = path ? strrchr(path, '/') : NULL;
    PyErr_Clear();
    Py_XSETREF(c->code, Py_NewRef((PyObject *)code));
    thx_origin origin = path ? thx_origin_of_code(x, (PyObject *)code) : THX_OURS;
    c->torch = thx_is_inner(origin);
    c->standard = origin == THX_STANDARD;
    c->file = path ? th_intern_z(x->ctx, base ? base + 1 : path) : 0;
    return c;
}

/* The innermost frame outside torch and Python's library, else outside torch: new reference, or NULL. */
static PyFrameObject *user_frame(thx *x, th_str *file) {
    PyFrameObject *frame = PyThreadState_GetFrame(PyThreadState_Get()), *standard = NULL;
    while (frame) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        const thx_code *known = code_of(x, code);
        Py_DECREF(code);
        if (!known->torch && (!known->standard || !standard)) *file = known->file;
        if (!known->torch && !known->standard) break;
        if (!known->torch && !standard) standard = (PyFrameObject *)Py_NewRef((PyObject *)frame);
        Py_SETREF(frame, PyFrame_GetBack(frame));
    }
    if (!frame) return standard;
    Py_XDECREF(standard);
    return frame;
}

/* CPython finds a line by walking the code's table from its start; loops over layers ask for the same ones again. */
void thx_user_line(thx_recorder *r, th_str *file, uint32_t *line) {
    PyFrameObject *frame = user_frame(r->x, file);
    if (!frame) return;
    PyCodeObject *code = PyFrame_GetCode(frame);
    int at = PyFrame_GetLasti(frame);
    if (!r->lines) r->lines = PyMem_Calloc(THX_LINES, sizeof *r->lines);
    thx_line *known = r->lines ? &r->lines[(((uintptr_t)code >> 5) * 31 + (unsigned)at / 2) % THX_LINES] : NULL;
    if (known && known->code == (PyObject *)code && known->at == at) {
        *line = known->line;
        Py_DECREF(code);
    } else {
        *line = (uint32_t)PyFrame_GetLineNumber(frame);
        if (known) {
            Py_XSETREF(known->code, (PyObject *)code);
            known->at = at;
            known->line = *line;
        } else {
            Py_DECREF(code);
        }
    }
    Py_DECREF(frame);
}

int thx_capture_error(thx_recorder *r, const char *construct, const char *reason, const char *fix) {
    if (PyErr_Occurred()) PyErr_Clear();
    th_str base = 0;
    PyFrameObject *frame = user_frame(r->x, &base);
    PyObject *file = NULL, *function = NULL;
    int line = 0;
    if (frame) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        file = Py_NewRef(code->co_filename);
        function = Py_NewRef(code->co_name);
        line = PyFrame_GetLineNumber(frame);
        Py_DECREF(code);
        Py_DECREF(frame);
    }
    PyObject *error = PyObject_CallFunction(r->x->CaptureError, "OiOsss", file ? file : Py_None, line,
                                            function ? function : Py_None, construct, reason, fix);
    Py_XDECREF(file);
    Py_XDECREF(function);
    if (error) {
        if (!r->error && !r->forgivable) r->error = Py_NewRef(error);
        PyErr_SetObject(r->x->CaptureError, error);
        Py_DECREF(error);
    }
    return -1;
}

/* ---- attributes that somebody gives a tensor ---- */

static int refuse_attribute(thx_recorder *r) {
    return thx_capture_error(r, THX_TENSOR_ATTRIBUTE, "a program does not hold what else there is to a tensor",
                             "keep it in an object or a dictionary");
}

static PyObject *fake_of(const thx_recorder *r, const thx_root *root) { /* borrowed, or NULL */
    const thx_cell *cell = r->cap_cells && root->real ? probe(r->cells, r->cap_cells, root->real) : NULL;
    return cell && cell->key ? cell->fake : NULL;
}

static bool is_called_by_torch(thx *x) {
    PyFrameObject *frame = PyThreadState_GetFrame(PyThreadState_Get());
    PyCodeObject *code = frame ? PyFrame_GetCode(frame) : NULL;
    bool torch = !code || code_of(x, code)->torch;
    Py_XDECREF(code);
    Py_XDECREF(frame);
    return torch;
}

static int note_absent(thx_recorder *r, const thx_root *root, PyObject *name) {
    PyObject *note = Py_BuildValue("(iOO)", (int)root->leaf, root->leaf < 0 ? root->real : Py_None, name);
    if (!r->absent) r->absent = PyList_New(0);
    int rc = note && r->absent ? PyList_Append(r->absent, note) : -1;
    Py_XDECREF(note);
    return rc;
}

bool thx_has_own_attribute(PyObject *tensor, PyObject *name) {
    PyObject **place = _PyObject_GetDictPtr(tensor);
    return place && *place && PyDict_Contains(*place, name) == 1;
}

int thx_recorder_missing(thx_recorder *r, PyObject *fake, PyObject *name) {
    const char *text = PyUnicode_AsUTF8(name);
    if (!text || strncmp(text, "__", 2) == 0 || is_called_by_torch(r->x)) return text ? 0 : -1;
    for (uint32_t i = 0; i < r->nroots; i++) {
        const thx_root *root = &r->roots[i];
        if (fake_of(r, root) != fake) continue;
        return thx_has_own_attribute(root->real, name) ? refuse_attribute(r) : note_absent(r, root, name);
    }
    return 0;
}

static bool has_attributes(PyObject *fake) {
    PyObject **place = _PyObject_GetDictPtr(fake), *dict = place ? *place : NULL, *key, *value;
    bool found = false;
    for (Py_ssize_t at = 0; dict && !found && PyDict_Next(dict, &at, &key, &value);)
        found = PyUnicode_Check(key) && !_PyType_Lookup(Py_TYPE(fake), key) && /* that torch's own fakes have */
                PyUnicode_CompareWithASCIIString(key, "_is_param") != 0;
    return found;
}

int thx_recorder_check_attributes(thx_recorder *r, PyObject *const *results, uint32_t n) {
    bool found = false;
    for (uint32_t i = 0; i < r->nroots && !found; i++) {
        PyObject *fake = fake_of(r, &r->roots[i]);
        found = fake && has_attributes(fake);
    }
    for (uint32_t i = 0; i < n && !found; i++) found = thx_is_fake(r->x, results[i]) && has_attributes(results[i]);
    return found ? refuse_attribute(r) : 0;
}

/* ---- running ---- */

typedef struct surroundings { /* state of torch that is different while a program is captured */
    PyObject *previous, *compiler, *compiling, *script, *frames, *step_code;
    thx_purity purity;
} surroundings;

static int set_script_optimize(thx *x, PyObject *on) {
    PyObject *done = PyObject_CallOneArg(x->set_script_optimize, on);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static void find_step_value(thx *x) {
    PyObject *module = PyImport_ImportModule("thunder._optimizers");
    PyObject *found = module ? PyObject_CallMethod(module, "value_function", NULL) : NULL, *none = Py_None;
    if (found && PyTuple_Check(found)) {
        x->step_value = Py_NewRef(PyTuple_GET_ITEM(found, 0));
        x->step_code = Py_NewRef(PyTuple_GET_ITEM(found, 1));
    } else if (found) {
        x->step_value = Py_NewRef(none);
    }
    PyErr_Clear();
    Py_XDECREF(found);
    Py_XDECREF(module);
}

/* torch.optim takes the number of a step as thunder/_optimizers.py says. What is there now is returned. */
static PyObject *set_step_code(thx *x, PyObject *code) {
    if (!x->step_value || !PyFunction_Check(x->step_value)) return NULL;
    PyObject *now = Py_NewRef(PyFunction_GET_CODE(x->step_value));
    if (PyObject_SetAttrString(x->step_value, "__code__", code) < 0) PyErr_Clear();
    return now;
}

/* torch.compiler.is_compiling() says yes; TorchScript runs operation by operation, as its fused kernels would want
 * data; the observer is on the stack of function modes. */
static int enter(thx_recorder *r, surroundings *s) {
    thx *x = r->x;
    s->previous = x->active;
    s->compiler = PyObject_GetAttrString(x->torch, "compiler");
    s->compiling = s->compiler ? PyObject_GetAttrString(s->compiler, "_is_compiling_flag") : NULL;
    PyErr_Clear();
    s->script = PyObject_CallNoArgs(x->get_script_optimize);
    r->bound = PyObject_GetAttr((PyObject *)r, x->n.torch_function);
    if (!s->script || !r->bound || thx_random_begin(r) < 0 || thx_note_hooks_begin(r) < 0 ||
        set_script_optimize(x, Py_False) < 0)
        return -1;
    PyObject *pushed = PyObject_CallOneArg(x->push_function, (PyObject *)r);
    if (!pushed) {
        set_script_optimize(x, s->script);
        return -1;
    }
    Py_DECREF(pushed);
    if (thx_custom_enter(x) < 0) PyErr_Clear(); /* then autograd functions are seen by what their forward does */
    x->active = (PyObject *)r;
    x->active_thread = PyThread_get_thread_ident();
    if (s->compiling) PyObject_SetAttrString(s->compiler, "_is_compiling_flag", Py_True);
    if (!x->step_value) find_step_value(x);
    s->step_code = set_step_code(x, x->step_code);
    s->frames = PyObject_CallOneArg(x->set_eval_frame, Py_None); /* what torch.compile makes of code is not the code */
    PyErr_Clear();
    thx_purity_begin(r, &s->purity);
    return 0;
}

static void leave(thx_recorder *r, surroundings *s) { /* keeps a pending exception */
    thx *x = r->x;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    thx_purity_end(r, &s->purity);
    PyObject *frames = s->frames ? PyObject_CallOneArg(x->set_eval_frame, s->frames) : NULL;
    Py_XDECREF(frames);
    Py_CLEAR(s->frames);
    if (s->step_code) Py_XDECREF(set_step_code(x, s->step_code));
    Py_CLEAR(s->step_code);
    if (s->compiling) PyObject_SetAttrString(s->compiler, "_is_compiling_flag", s->compiling);
    set_script_optimize(x, s->script);
    thx_custom_leave(x);
    PyObject *popped = PyObject_CallNoArgs(x->pop_function);
    Py_XDECREF(popped);
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    x->active = s->previous;
}

static bool from_dynamo(thx *x, PyObject *type) {
    PyObject *module = PyObject_GetAttr(type, x->n.module);
    const char *name = module && PyUnicode_Check(module) ? PyUnicode_AsUTF8(module) : NULL;
    bool found = name && strncmp(name, "torch._dynamo", 13) == 0;
    PyErr_Clear();
    Py_XDECREF(module);
    return found;
}

/* Exceptions that are there because the program runs on fakes become CaptureErrors with the original as their cause. */
static void explain_exception(thx_recorder *r) {
    PyObject *type, *value, *trace, *error, *ours, *our_trace;
    bool data = thx_read_of_fake_data();
    PyErr_Fetch(&type, &value, &trace);
    bool dynamo = type && from_dynamo(r->x, type);
    if (!data && !dynamo) {
        PyErr_Restore(type, value, trace);
        return;
    }
    PyErr_NormalizeException(&type, &value, &trace);
    if (data)
        thx_capture_error(r, "a kernel outside torch's dispatcher",
                          "it reads the memory of a tensor, which a capture does not have",
                          "register it with torch.library.custom_op, or call it outside the compiled function");
    else
        thx_capture_error(r, "a part that only torch.compile can run", "it starts torch.compile while thunder captures",
                          "call this part outside the compiled function");
    PyErr_Fetch(&error, &ours, &our_trace);
    PyErr_NormalizeException(&error, &ours, &our_trace);
    if (ours && value) PyException_SetCause(ours, Py_NewRef(value));
    PyErr_Restore(error, ours, our_trace);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
}

/* 1: it was another, -1: it cannot be told; keeps a pending exception. */
static int restore_grad_mode(thx_recorder *r, int before) {
    thx *x = r->x;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    int now = thx_grad_mode(x), changed = now < 0 || before < 0 ? -1 : now != before;
    if (changed == 1 && x->abi.on && x->abi.aoti_torch_grad_mode_set_enabled) {
        x->abi.aoti_torch_grad_mode_set_enabled(before);
    } else if (changed == 1) {
        PyObject *done = PyObject_CallOneArg(x->set_grad, before ? Py_True : Py_False);
        Py_XDECREF(done);
    }
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
    return changed;
}

int thx_recorder_run(thx_recorder *r, PyObject *fn, PyObject *args, PyObject *kwargs, PyObject **result) {
    thx *x = r->x;
    int grad = thx_grad_mode(x);
    surroundings s = {0};
    *result = NULL;
    if (grad >= 0 && enter(r, &s) == 0) {
        *result = PyObject_Call(fn, args, kwargs);
        leave(r, &s);
        thx_ties_close(r);
        if (!*result && !PyErr_ExceptionMatches(x->CaptureError) && !PyErr_ExceptionMatches(x->GradNeeded))
            explain_exception(r);
    }
    for (th_opref o = 1; o < r->t->nops; o++) r->t->ops[o].marks &= (uint8_t)~TH_MARK_GRAD_OFF;
    Py_CLEAR(r->bound);
    Py_XDECREF(s.script);
    Py_XDECREF(s.compiling);
    Py_XDECREF(s.compiler);
    if (restore_grad_mode(r, grad) != 0 && *result) {
        Py_CLEAR(*result);
        thx_capture_error(r, "the grad mode", "the function leaves it other than it found it",
                          "switch it outside, or in a with block");
    }
    if (*result && r->inside && (r->outside || r->inference)) { /* a plan runs in one mode */
        Py_CLEAR(*result);
        thx_capture_error(r, "torch.inference_mode", "some operations run inside and some outside of it",
                          "put the whole function inside, or use torch.no_grad()");
    }
    if (*result && thx_random_before(r) < 0) Py_CLEAR(*result);
    if (thx_random_end(r) < 0) Py_CLEAR(*result);
    if (r->error && (*result || !PyErr_ExceptionMatches(x->CaptureError))) { /* user code swallowed it */
        Py_CLEAR(*result);
        PyErr_Clear();
        PyErr_SetObject(x->CaptureError, r->error);
    }
    if (r->doubt && !r->error && !r->needed) {
        Py_CLEAR(*result);
        PyErr_Clear();
        PyErr_SetObject(PyExc_RuntimeError, r->doubt);
    }
    if (r->needed && (*result || !(PyErr_ExceptionMatches(x->CaptureError) || PyErr_ExceptionMatches(x->GradNeeded)))) {
        Py_CLEAR(*result);
        PyErr_Clear();
        PyErr_SetObject(x->GradNeeded, r->needed);
    }
    if (*result && thx_check(x, th_trace_status(r->t)) < 0) Py_CLEAR(*result);
    return *result ? 0 : -1;
}

/* ---- the type ---- */

thx_recorder *thx_recorder_new(thx *x, PyObject *params) {
    thx_recorder *r = (thx_recorder *)x->Recorder->tp_alloc(x->Recorder, 0);
    if (!r) return NULL;
    r->x = x;
    r->params = Py_XNewRef(params);
    PyObject *inference = PyObject_CallNoArgs(x->inference);
    r->inference = inference == Py_True;
    r->autocast = thx_autocast_is_on(x);
    PyErr_Clear();
    Py_XDECREF(inference);
    r->t = th_trace_new(x->ctx, "computation");
    PyObject *dtype = PyObject_CallNoArgs(x->default_dtype), *device = PyObject_CallNoArgs(x->default_device);
    if (dtype && device && r->t) {
        r->default_dtype = thx_dtype_ref(x, dtype);
        r->default_device = thx_device_ref(x, device);
    }
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    if (!r->t) PyErr_NoMemory();
    if (!r->t || !r->default_device) {
        Py_DECREF(r);
        return NULL;
    }
    th_trace_set_opaque_vtable(r->t, thx_opaque_vtable);
    return r;
}

static void recorder_dealloc(thx_recorder *r) {
    PyTypeObject *type = Py_TYPE(r);
    for (uint32_t i = 0; i < r->cap_cells; i++) {
        Py_XDECREF(r->cells[i].key);
        Py_XDECREF(r->cells[i].fake);
    }
    for (uint32_t i = 0; i < r->nroots; i++) {
        Py_XDECREF(r->roots[i].real);
        Py_XDECREF(r->roots[i].dict);
        Py_XDECREF(r->roots[i].key);
    }
    for (uint32_t i = 0; i < r->nconsts; i++) Py_XDECREF(r->consts[i]);
    PyMem_Free(r->cells);
    PyMem_Free(r->roots);
    PyMem_Free(r->consts);
    PyMem_Free(r->inputs);
    for (uint32_t i = 0; r->lines && i < THX_LINES; i++) Py_XDECREF(r->lines[i].code);
    PyMem_Free(r->lines);
    PyMem_Free(r->pool);
    Py_XDECREF(r->params);
    Py_XDECREF(r->error);
    Py_XDECREF(r->absent);
    Py_XDECREF(r->needed);
    Py_XDECREF(r->doubt);
    Py_XDECREF(r->rng_last);
    Py_XDECREF(r->rng_outer);
    Py_XDECREF(r->hooks);
    Py_XDECREF(r->ties);
    Py_XDECREF(r->leaves);
    Py_XDECREF(r->cast);
    Py_XDECREF(r->oracle);
    for (uint32_t i = 0; i < r->cap_codes; i++) Py_XDECREF(r->codes[i]);
    PyMem_Free(r->codes);
    Py_XDECREF(r->asking);
    Py_XDECREF(r->messages);
    thx_read_grads_fini(r);
    Py_XDECREF(r->expected);
    Py_XDECREF(r->fixed);
    thx_shadow_free(r->shadow);
    th_trace_free(r->t);
    type->tp_free((PyObject *)r);
    Py_DECREF(type);
}

/* torch asks for __torch_function__ by C string, twice for each operation: without a string object it costs little. */
static PyObject *recorder_getattr(PyObject *self, char *name) {
    thx_recorder *r = (thx_recorder *)self;
    if (r->bound && strcmp(name, "__torch_function__") == 0) return Py_NewRef(r->bound);
    PyObject *key = PyUnicode_FromString(name), *found = key ? PyObject_GenericGetAttr(self, key) : NULL;
    Py_XDECREF(key);
    return found;
}

static PyMethodDef recorder_methods[] = {
    {"__torch_function__", (PyCFunction)(void (*)(void))thx_torch_function, METH_FASTCALL, NULL},
    {"__torch_dispatch__", (PyCFunction)(void (*)(void))thx_watch_dispatch, METH_FASTCALL, NULL},
    {"refuse", (PyCFunction)(void (*)(void))thx_refuse_message, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyObject *recorder_hears(PyObject *self, void *unused) {
    const thx_recorder *r = (thx_recorder *)self;
    (void)unused;
    bool own = !r->depth || r->x->applying || r->deriving; /* forward of an autograd function is the program's */
    return PyLong_FromLong(!own ? 0 : 1 | (r->warns || r->deriving ? 2 : 0) | (r->late ? 4 : 0));
}

static PyGetSetDef recorder_getset[] = {
    {"hears", recorder_hears, NULL, "Whose a message is now: see thunder/_messages.py.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot recorder_slots[] = {
    {Py_tp_dealloc, recorder_dealloc},
    {Py_tp_getattr, recorder_getattr},
    {Py_tp_methods, recorder_methods},
    {Py_tp_getset, recorder_getset},
    {Py_tp_doc, "The observer of a capture in progress."},
    {0, NULL},
};
static PyType_Spec recorder_spec = {"thunder._C.Recorder", sizeof(thx_recorder), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, recorder_slots};

int thx_recorder_init(thx *x, PyObject *module) {
    x->Recorder = (PyTypeObject *)PyType_FromModuleAndSpec(module, &recorder_spec, NULL);
    return x->Recorder ? 0 : -1;
}
