/* Lowering of ATen overloads to torch's C dispatcher: torch.ops.aten.add.Tensor without a Python object in between.
 *
 * The call is checked against the overload's schema when the plan is built, because a dispatcher that refuses a call
 * takes tens of milliseconds and may leak. Scalars cannot be expressed on its stack: overloads that take one stay on
 * the Python road, as do devices and whatever else is not listed in `encodings`.
 */
#include "lower.h"

#include <string.h>

typedef enum encoding {
    E_NONE,
    E_TENSOR,
    E_INT, /* int, bool, dtype, layout, memory format */
    E_FLOAT,
    E_STR,
    E_INTS,
    E_TENSORS,
} encoding;

typedef struct cell_spec { /* how one argument is put on the stack */
    uint8_t encoding;
    bool optional, absent; /* optional: behind a pointer; absent: None */
    uint32_t slot, count;
    int64_t number; /* E_INT; the bits of E_FLOAT */
    int64_t *ints;  /* E_INTS: values; E_TENSORS: slots; owned */
    char *text;     /* E_STR; owned */
} cell_spec;

typedef struct dispatch_data {
    thx_instr_data head;
    char name[200], overload[64];
    uint32_t nargs, nreturns;
    cell_spec *args;
    uint32_t outs[8]; /* slots; UINT32_MAX: not used */
    bool list_result; /* one return, a list of tensors: outs are its elements */
    uint32_t nouts;
    bool no_grad; /* ran while gradients were off; matters where a program runs under autograd */
} dispatch_data;

enum { MAX_ARGS = 32 };

static void free_dispatch(void *data) {
    dispatch_data *d = data;
    for (uint32_t i = 0; d->args && i < d->nargs; i++) {
        PyMem_Free(d->args[i].ints);
        PyMem_Free(d->args[i].text);
    }
    PyMem_Free(d->args);
    PyMem_Free(d);
}

/* ---- running ---- */

static th_cell tensor_cell(thx *x, th_frame *f, uint32_t slot) {
    th_h copy = NULL;
    x->abi.aoti_torch_new_tensor_handle(thx_slot_handle(x, &f->slots[slot]), &copy);
    return (th_cell)(uintptr_t)copy;
}

static th_cell list_cell(thx *x, th_frame *f, const cell_spec *a) {
    th_h list = NULL;
    x->abi.torch_new_list_reserve_size(a->count, &list);
    for (uint32_t i = 0; i < a->count; i++)
        x->abi.torch_list_push_back(list, a->encoding == E_INTS ? (th_cell)a->ints[i]
                                                                : tensor_cell(x, f, (uint32_t)a->ints[i]));
    return (th_cell)(uintptr_t)list;
}

static th_cell encode(thx *x, th_frame *f, const cell_spec *a) {
    th_cell cell = (th_cell)a->number;
    if (a->absent) return 0;
    if (a->encoding == E_TENSOR)
        cell = tensor_cell(x, f, a->slot);
    else if (a->encoding == E_INTS || a->encoding == E_TENSORS)
        cell = list_cell(x, f, a);
    else if (a->encoding == E_STR) {
        th_h text = NULL;
        x->abi.torch_new_string_handle(a->text, strlen(a->text), &text);
        cell = (th_cell)(uintptr_t)text;
    }
    if (!a->optional) return cell;
    th_cell *place = NULL;
    x->abi.torch_new_stable_ivalue(&place);
    *place = cell;
    return (th_cell)(uintptr_t)place;
}

static void put(thx *x, th_frame *f, uint32_t slot, th_cell cell) {
    th_h h = (th_h)(uintptr_t)cell;
    if (slot == UINT32_MAX) {
        x->abi.aoti_torch_delete_tensor_object(h);
        return;
    }
    f->slots[slot] = (th_slot){.handle = h, .owns_handle = true};
}

static int take_list(thx *x, th_frame *f, const dispatch_data *d, th_h list) {
    size_t size = 0;
    x->abi.torch_list_size(list, &size);
    for (size_t i = 0; i < size; i++) {
        th_cell cell = 0;
        x->abi.torch_list_get_item(list, i, &cell);
        put(x, f, i < d->nouts ? d->outs[i] : UINT32_MAX, cell);
    }
    x->abi.torch_delete_list(list);
    if (size == d->nouts) return 0;
    PyErr_SetString(PyExc_RuntimeError, "an operation returned another number of results than when it was captured");
    return -1;
}

static int run_dispatch(th_frame *f, const th_instr *instr) {
    const dispatch_data *d = instr->data;
    thx *x = f->user;
    th_cell stack[MAX_ARGS];
    bool off = d->no_grad && x->abi.aoti_torch_grad_mode_is_enabled();
    for (uint32_t i = 0; i < d->nargs; i++) stack[i] = encode(x, f, &d->args[i]);
    if (off) x->abi.aoti_torch_grad_mode_set_enabled(false);
    th_rc rc = x->abi.torch_call_dispatcher(d->name, d->overload, stack, x->abi.version);
    if (off) x->abi.aoti_torch_grad_mode_set_enabled(true);
    if (rc) {
        if (!PyErr_Occurred()) {
            const char *what = x->abi.torch_exception_get_what_without_backtrace
                                   ? x->abi.torch_exception_get_what_without_backtrace()
                                   : NULL;
            PyErr_Format(PyExc_RuntimeError, "%s", what && *what ? what : d->name);
        }
        return -1;
    }
    if (d->list_result) return take_list(x, f, d, (th_h)(uintptr_t)stack[0]);
    for (uint32_t i = 0; i < d->nreturns; i++) put(x, f, i < d->nouts ? d->outs[i] : UINT32_MAX, stack[i]);
    return 0;
}

/* ---- reading the schema ---- */

static const struct {
    const char *type;
    uint8_t encoding;
} encodings[] = {
    {"Tensor", E_TENSOR},    {"int", E_INT},        {"SymInt", E_INT},        {"bool", E_INT},
    {"float", E_FLOAT},      {"str", E_STR},        {"ScalarType", E_INT},    {"Layout", E_INT},
    {"MemoryFormat", E_INT}, {"List[int]", E_INTS}, {"List[SymInt]", E_INTS}, {"List[Tensor]", E_TENSORS},
};

static PyObject *type_name(PyObject *argument) { /* str of the declared type: "Optional[List[int]]" */
    PyObject *type = PyObject_GetAttrString(argument, "real_type");
    if (!type) {
        PyErr_Clear();
        type = PyObject_GetAttrString(argument, "type");
    }
    PyObject *text = type ? PyObject_Str(type) : NULL;
    Py_XDECREF(type);
    return text;
}

static uint8_t encoding_of(const char *text, bool *optional) {
    size_t n = strlen(text);
    *optional = strncmp(text, "Optional[", 9) == 0;
    if (*optional) text += 9, n -= 10;
    for (size_t i = 0; i < sizeof encodings / sizeof *encodings; i++)
        if (strlen(encodings[i].type) == n && strncmp(encodings[i].type, text, n) == 0) return encodings[i].encoding;
    return E_NONE;
}

/* A node, as an argument of that encoding; false: it does not fit. */
static bool fit_node(thx_lowering *l, cell_spec *a, const th_node_data *d) {
    const th_trace *t = l->t;
    if (d->kind == TH_N_NONE) return a->absent = true, a->optional;
    if (a->encoding == E_TENSOR && d->kind == TH_N_VALUE) return a->slot = thx_slot_for(l, d->u.ref), true;
    if (a->encoding == E_INT && (d->kind == TH_N_INT || d->kind == TH_N_BOOL)) return a->number = d->u.i, true;
    if (a->encoding == E_INT && d->kind == TH_N_DTYPE)
        return a->number = l->x->abi.scalar_types[d->u.ref], a->number >= 0;
    if (a->encoding == E_FLOAT && (d->kind == TH_N_FLOAT || d->kind == TH_N_INT)) {
        double number = d->kind == TH_N_FLOAT ? d->u.f : (double)d->u.i;
        return memcpy(&a->number, &number, sizeof number), true;
    }
    if (a->encoding == E_STR && d->kind == TH_N_STR) {
        size_t n = th_str_len(l->x->ctx, d->u.ref) + 1;
        a->text = PyMem_Malloc(n);
        return a->text && memcpy(a->text, th_str_get(l->x->ctx, d->u.ref), n);
    }
    if ((a->encoding != E_INTS && a->encoding != E_TENSORS) || (d->kind != TH_N_LIST && d->kind != TH_N_TUPLE))
        return false;
    a->ints = PyMem_Calloc(d->count + 1, sizeof *a->ints);
    for (a->count = 0; a->ints && a->count < d->count; a->count++) {
        const th_node_data *item = &t->nodes[t->kids[d->u.kids + a->count]];
        if (item->kind != (a->encoding == E_INTS ? TH_N_INT : TH_N_VALUE)) return false;
        a->ints[a->count] = a->encoding == E_INTS ? item->u.i : (int64_t)thx_slot_for(l, item->u.ref);
    }
    return a->ints != NULL;
}

/* A default of the schema: None, a number or a list of ints. */
static bool fit_default(cell_spec *a, PyObject *value) {
    if (value == Py_None) return a->absent = true, a->optional;
    if (a->encoding == E_INT && PyLong_Check(value)) return a->number = PyLong_AsLongLong(value), !PyErr_Occurred();
    if (a->encoding == E_FLOAT && PyNumber_Check(value)) {
        double number = PyFloat_AsDouble(value);
        return memcpy(&a->number, &number, sizeof number), !PyErr_Occurred();
    }
    if (a->encoding != E_INTS || !PyList_Check(value)) return false;
    a->count = (uint32_t)PyList_GET_SIZE(value);
    a->ints = PyMem_Calloc(a->count + 1, sizeof *a->ints);
    for (uint32_t i = 0; a->ints && i < a->count; i++) a->ints[i] = PyLong_AsLongLong(PyList_GET_ITEM(value, i));
    return a->ints && !PyErr_Occurred();
}

static th_node keyword(const thx_lowering *l, const th_op *op, const char *name) {
    const th_trace *t = l->t;
    for (uint32_t i = 0; op->kwargs && i + 1 < t->nodes[op->kwargs].count; i += 2) {
        const uint32_t *pair = &t->kids[t->nodes[op->kwargs].u.kids + i];
        if (strcmp(th_str_get(t->ctx, t->nodes[pair[0]].u.ref), name) == 0) return pair[1];
    }
    return 0;
}

static bool fit_argument(thx_lowering *l, const th_op *op, cell_spec *a, PyObject *argument, uint32_t at) {
    PyObject *text = type_name(argument), *name = PyObject_GetAttrString(argument, "name");
    const char *type = text ? PyUnicode_AsUTF8(text) : NULL, *utf8 = name ? PyUnicode_AsUTF8(name) : NULL;
    bool fits = false;
    if (type && utf8 && (a->encoding = encoding_of(type, &a->optional))) {
        const th_node_data *args = &l->t->nodes[op->args];
        th_node node = at < args->count ? l->t->kids[args->u.kids + at] : keyword(l, op, utf8);
        if (node) {
            fits = fit_node(l, a, &l->t->nodes[node]);
        } else {
            PyObject *value = PyObject_GetAttrString(argument, "default_value");
            fits = value && fit_default(a, value);
            Py_XDECREF(value);
        }
    }
    Py_XDECREF(name);
    Py_XDECREF(text);
    return fits;
}

static bool fit_returns(thx_lowering *l, const th_op *op, dispatch_data *d, PyObject *returns) {
    d->nreturns = (uint32_t)PyList_GET_SIZE(returns);
    for (uint32_t i = 0; i < d->nreturns; i++) {
        PyObject *text = type_name(PyList_GET_ITEM(returns, i));
        const char *type = text ? PyUnicode_AsUTF8(text) : "";
        bool list = strcmp(type, "List[Tensor]") == 0, tensor = strcmp(type, "Tensor") == 0;
        Py_XDECREF(text);
        if (!tensor && !(list && d->nreturns == 1)) return false;
        d->list_result |= list;
    }
    const th_node_data *outs = &l->t->nodes[op->outs];
    uint32_t count = outs->kind == TH_N_VALUE ? 1 : outs->kind == TH_N_TUPLE ? outs->count : 0;
    if (!count || count > 8 || (!d->list_result && count != d->nreturns) ||
        (d->list_result && outs->kind == TH_N_VALUE))
        return false;
    d->nouts = count;
    for (uint32_t i = 0; i < count; i++) {
        const th_node_data *out = outs->kind == TH_N_VALUE ? outs : &l->t->nodes[l->t->kids[outs->u.kids + i]];
        if (out->kind != TH_N_VALUE && out->kind != TH_N_NONE) return false;
        d->outs[i] = out->kind == TH_N_VALUE ? thx_slot_for(l, out->u.ref) : UINT32_MAX;
    }
    return true;
}

static bool fit_call(thx_lowering *l, const th_op *op, dispatch_data *d, PyObject *schema) {
    PyObject *arguments = PyObject_GetAttrString(schema, "arguments"),
             *returns = PyObject_GetAttrString(schema, "returns");
    bool fits = arguments && returns && PyList_Check(arguments) && PyList_Check(returns);
    uint32_t count = fits ? (uint32_t)PyList_GET_SIZE(arguments) : 0;
    fits = fits && count <= MAX_ARGS && l->t->nodes[op->args].count <= count &&
           (d->args = PyMem_Calloc(count + 1, sizeof *d->args)) != NULL;
    for (uint32_t i = 0; fits && i < count; i++) {
        d->nargs = i + 1;
        fits = fit_argument(l, op, &d->args[i], PyList_GET_ITEM(arguments, i), i);
    }
    fits = fits && fit_returns(l, op, d, returns);
    Py_XDECREF(returns);
    Py_XDECREF(arguments);
    return fits;
}

/* "torch.ops.aten.add.Tensor" -> "aten::add", "Tensor"; the overload "default" is the empty name. */
static bool split_name(const char *callee, dispatch_data *d) {
    char copy[192];
    if (strncmp(callee, "torch.ops.", 10) != 0 || strlen(callee + 10) >= sizeof copy) return false;
    strcpy(copy, callee + 10);
    char *op = strchr(copy, '.'), *overload = op ? strchr(op + 1, '.') : NULL;
    if (!overload || strchr(overload + 1, '.')) return false;
    *op++ = *overload++ = 0;
    if (strlen(overload) >= sizeof d->overload) return false;
    snprintf(d->name, sizeof d->name, "%s::%s", copy, op);
    snprintf(d->overload, sizeof d->overload, "%s", strcmp(overload, "default") == 0 ? "" : overload);
    return true;
}

int thx_lower_dispatch(thx_lowering *l, th_opref o) {
    thx *x = l->x;
    const th_op *op = &l->t->ops[o];
    bool switches = !(op->marks & TH_MARK_NO_GRAD) || x->abi.aoti_torch_grad_mode_set_enabled;
    if (!x->abi.dispatcher || l->plain || !switches || op->callee_opaque || thx_looks_at_grad_mode(x, op) ||
        !op->outs || (op->effects & TH_FX_WRITES))
        return 0;
    dispatch_data *d = PyMem_Calloc(1, sizeof *d);
    if (!d) return PyErr_NoMemory(), -1;
    d->head.free = free_dispatch;
    /* Others may be Python functions, whose exceptions the dispatcher would turn into text. */
    bool fits = split_name(th_str_get(x->ctx, op->callee), d) && strncmp(d->name, "aten::", 6) == 0;
    PyObject *overload = fits ? thx_callable(x, l->t, op) : NULL;
    PyObject *schema = overload ? PyObject_GetAttrString(overload, "_schema") : NULL;
    fits = schema && fit_call(l, op, d, schema);
    Py_XDECREF(schema);
    PyErr_Clear(); /* whatever could not be read: the Python road is there */
    if (!fits) {
        free_dispatch(d);
        return 0;
    }
    d->no_grad = op->marks & TH_MARK_NO_GRAD;
    l->nshim++;
    return thx_check(x, th_plan_add(l->plan, run_dispatch, d, o)) < 0 ? -1 : 1;
}
