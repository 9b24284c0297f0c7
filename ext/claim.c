/* Asking the executors of a callable: between the core's claims and the Python objects that answer.
 *
 * `claims` is the policy, a Python object (thunder/extend/claims.py) with
 *     tables      tuple of dicts, one for each executor in order: operator key -> what it knows of the operator;
 *                 True: it takes every call, together with neighbours
 *     cuts        tuple of ints, likewise: see th_claim.cut
 *     ask(i, known, name, args, kwargs) -> 0 no, 1 alone, 2 with neighbours; tensors are fakes
 *     operators   bool: some implementation has a derivative of its own
 *     ask_operator(i, known, name, args, kwargs) -> None, or of the operator that takes the place of the call (dotted
 *                 name, how many results it has beside those of the call: its backward needs them)
 *     bind(i, region, kind) -> name of the unit, or None: declined after all
 *     settle()    before a program whose units are all bound runs
 *     judge       see thx_region_new
 *
 * The key of an operator is its catalogue name, or the dotted name where the catalogue has none; "*" stands for all.
 */
#include "native.h"
#include "region.h"

#include "thunder/claim.h"

typedef struct asking {
    thx *x;
    PyObject *claims, *tables, *cuts, *judge;
    const char *kind;
    const th_trace *t;
    PyObject **fakes; /* by value; made when first needed (owned) */
    uint32_t nfakes;
    PyObject *star, *native; /* names */
    char hint[96];
} asking;

static PyObject *fake_of(void *user, th_val v) {
    asking *a = user;
    if (v >= a->nfakes) return PyErr_Format(PyExc_SystemError, "a value that came later");
    if (!a->fakes[v]) {
        th_typeref type = a->t->values[v].type;
        a->fakes[v] = thx_fake(a->x, th_type_set_grad(a->x->ctx, type, false));
    }
    return Py_XNewRef(a->fakes[v]);
}

/* The catalogue's entry; torch.ops.aten.rsqrt.default and torch.ops.aten.rsqrt are the operator torch.rsqrt. */
static const th_opdef *operator_of(thx *x, th_str callee) {
    static const char aten[] = "torch.ops.aten.";
    const th_opdef *def = th_catalog_find(x->catalog, callee);
    const char *name = th_str_get(x->ctx, callee), *end;
    char dotted[96];
    if (def || strncmp(name, aten, sizeof aten - 1) != 0) return def;
    name += sizeof aten - 1;
    end = name + strcspn(name, ".");
    if (end - name > 80) return NULL;
    snprintf(dotted, sizeof dotted, "torch.%.*s", (int)(end - name), name);
    th_str base = th_intern_z(x->ctx, dotted);
    return base ? th_catalog_find(x->catalog, base) : NULL;
}

/* torch.ops.space.name is called for its overload torch.ops.space.name.default. */
static PyObject *key_of_name(thx *x, th_str callee) {
    static const char ops[] = "torch.ops.";
    const th_opdef *def = operator_of(x, callee);
    const char *name = def ? def->name : th_str_get(x->ctx, callee), *rest = name + sizeof ops - 1;
    const char *dot = !def && strncmp(name, ops, sizeof ops - 1) == 0 ? strchr(rest, '.') : NULL;
    return PyUnicode_FromFormat("%s%s", name, dot && !strchr(dot + 1, '.') ? ".default" : "");
}

static PyObject *key_of(const asking *a, const th_op *op) { return key_of_name(a->x, op->callee); }

/* What executor i answers to `method`; NULL with an exception. */
static PyObject *put(asking *a, const char *method, const th_trace *t, const th_op *op, Py_ssize_t i, PyObject *known) {
    const char *name = th_str_get(t->ctx, op->callee);
    PyObject *args = thx_from_node(a->x, t, op->args, fake_of, a), *kwargs = NULL, *answer = NULL;
    if (args) kwargs = op->kwargs ? thx_from_node(a->x, t, op->kwargs, fake_of, a) : PyDict_New();
    if (kwargs) answer = PyObject_CallMethod(a->claims, method, "nOsOO", i, known, name, args, kwargs);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    return answer;
}

static int decline(const asking *a, const th_trace *t, const th_op *op, Py_ssize_t i, const char *reason) { /* 0, -1 */
    PyObject *done = PyObject_CallMethod(a->claims, "declined", "nss", i, th_str_get(t->ctx, op->callee), reason);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* A C executor looks at the operation itself. */
static int ask_native(asking *a, th_trace *t, const th_op *op, Py_ssize_t i, thx_native_operator *o) {
    char reason[240];
    void *data = NULL;
    int rc = thx_native_claim(o, t, (th_opref)(op - t->ops), &data, reason, sizeof reason);
    thx_native_release(o, data);
    if (rc != 0) return rc;
    return decline(a, t, op, i, reason);
}

/* 0, 1, 2 as `ask` answers; -1 with an exception. */
static int ask_one(asking *a, const th_trace *t, const th_op *op, Py_ssize_t i, PyObject *known) {
    if (known == Py_True) return 2;
    PyObject *native = PyObject_GetAttr(known, a->native);
    if (!native) return -1;
    Py_DECREF(native); /* what it is kept by lives on */
    if (Py_TYPE(native) == a->x->NativeOperator)
        return ask_native(a, (th_trace *)t, op, i, (thx_native_operator *)native);
    PyObject *answer = put(a, "ask", t, op, i, known);
    int rc = answer ? (int)PyLong_AsLong(answer) : -1;
    Py_XDECREF(answer);
    return rc == -1 && PyErr_Occurred() ? -1 : rc;
}

static bool is_ours(const th_trace *t, const th_op *op) { /* checks of data, hooks: nobody else's */
    return !op->callee_opaque && strncmp(th_str_get(t->ctx, op->callee), "thunder._kernels.", 17) == 0;
}

static th_status ask(void *user, th_trace *t, th_opref o, th_claim *claim) {
    asking *a = user;
    const th_op *op = &t->ops[o];
    if (op->callee_opaque || is_ours(t, op)) return TH_OK; /* a Python object is nobody's operator */
    PyObject *key = key_of(a, op);
    if (!key) return TH_ERUN;
    th_status status = TH_OK;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a->tables) && !claim->owner && status == TH_OK; i++) {
        PyObject *table = PyTuple_GET_ITEM(a->tables, i), *known = PyDict_GetItemWithError(table, key);
        if (!known && !PyErr_Occurred()) known = PyDict_GetItemWithError(table, a->star);
        if (known == Py_None) continue;
        int answer = known ? ask_one(a, t, op, i, known) : PyErr_Occurred() ? -1 : 0;
        /* Code for a region has its numbers in it: one that changes would have it built at every call. */
        if (answer == 2 && thx_op_holds_number(t, op))
            answer = decline(a, t, op, i, "one of its numbers changes from call to call");
        if (answer < 0) status = TH_ERUN;
        if (answer > 0) {
            long cut = PyLong_AsLong(PyTuple_GET_ITEM(a->cuts, i));
            *claim = (th_claim){(uint32_t)i + 1, answer == 2, cut > 0 ? (uint32_t)cut : 0};
        }
    }
    Py_DECREF(key);
    return status;
}

static th_status bind(void *user, uint32_t owner, bool fused, th_trace *body, const char **hint, void **object) {
    asking *a = user;
    PyObject *executors = PyObject_GetAttrString(a->claims, "executors");
    PyObject *executor = executors ? PySequence_GetItem(executors, (Py_ssize_t)owner - 1) : NULL;
    Py_XDECREF(executors);
    if (!executor) return th_trace_free(body), TH_ERUN;
    thx_region *r = thx_region_new(a->x, executor, body, fused, a->judge);
    Py_DECREF(executor);
    PyObject *name = r ? PyObject_CallMethod(a->claims, "bind", "nOs", (Py_ssize_t)owner - 1, r, a->kind) : NULL;
    const char *text = name && name != Py_None ? PyUnicode_AsUTF8(name) : NULL;
    if (text) {
        snprintf(a->hint, sizeof a->hint, "%s", text);
        *hint = a->hint;
        *object = r;
    } else {
        Py_XDECREF((PyObject *)r);
    }
    Py_XDECREF(name);
    return PyErr_Occurred() ? TH_ERUN : TH_OK;
}

static void asking_fini(asking *a) {
    for (uint32_t i = 0; a->fakes && i < a->nfakes; i++) Py_XDECREF(a->fakes[i]);
    PyMem_Free(a->fakes);
    Py_XDECREF(a->tables);
    Py_XDECREF(a->cuts);
    Py_XDECREF(a->judge);
    Py_XDECREF(a->star);
    Py_XDECREF(a->native);
}

static int asking_init(asking *a, thx *x, PyObject *claims, const th_trace *t, const char *kind) {
    *a = (asking){.x = x, .claims = claims, .kind = kind, .t = t, .nfakes = t->nvalues};
    a->tables = PyObject_GetAttrString(claims, "tables");
    a->cuts = a->tables ? PyObject_GetAttrString(claims, "cuts") : NULL;
    a->judge = a->cuts ? PyObject_GetAttrString(claims, "judge") : NULL;
    a->star = a->judge ? PyUnicode_FromString("*") : NULL;
    a->native = a->star ? PyUnicode_InternFromString("native") : NULL;
    a->fakes = a->native ? PyMem_Calloc(t->nvalues, sizeof *a->fakes) : NULL;
    if (a->fakes) return 0;
    if (!PyErr_Occurred()) PyErr_NoMemory();
    asking_fini(a);
    return -1;
}

int thx_claim(thx *x, PyObject *claims, th_trace *t, const char *kind) {
    asking a;
    if (!claims) return 0;
    if (asking_init(&a, x, claims, t, kind) < 0) return -1;
    th_fuel fuel = {.left = -1};
    const th_claim_options options = {ask, bind, &a};
    int rc = thx_check(x, th_claim_run(t, &options));
    if (rc == 0) rc = thx_check(x, th_pipeline_run(t, "lifetime", &fuel, x->verify, NULL, NULL));
    asking_fini(&a);
    return rc;
}

int thx_claims_settle(PyObject *claims) {
    PyObject *done = claims ? PyObject_CallMethod(claims, "settle", NULL) : Py_NewRef(Py_None);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

enum { MOST_SAVED = 8 };

/* Results that only the backward of an operator sees: derive.c gives them values where it uses them. */
static void add_saved(th_trace *t, th_op *op, uint32_t n) {
    th_node outs[MOST_SAVED + 1] = {op->outs};
    if (!n) return;
    for (uint32_t i = 1; i <= n; i++) outs[i] = th_node_none(t);
    op->outs = th_node_seq(t, TH_N_TUPLE, n + 1, outs);
    op->outs_list = true;
}

/* The operator that takes the place of one operation: 1 it did, 0 none, -1 with an exception. */
static int replace_one(asking *a, th_trace *t, th_op *op) {
    PyObject *key = key_of(a, op);
    int rc = key ? 0 : -1;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_GET_SIZE(a->tables); i++) {
        PyObject *known = PyDict_GetItemWithError(PyTuple_GET_ITEM(a->tables, i), key);
        if (!known && PyErr_Occurred()) rc = -1;
        if (!known || known == Py_True || known == Py_None) continue;
        PyObject *answer = put(a, "ask_operator", t, op, i, known);
        const char *text = NULL;
        unsigned saved = 0;
        bool taken = answer && answer != Py_None && PyArg_ParseTuple(answer, "sI", &text, &saved);
        if (taken && saved && (saved > MOST_SAVED || t->nodes[op->outs].kind != TH_N_VALUE)) {
            PyErr_Format(PyExc_ValueError, "%s has %u results for its backward: it may have %d, and one other", text,
                         saved, MOST_SAVED);
            taken = false;
        }
        if (taken) {
            op->callee = th_intern_z(t->ctx, text);
            op->callee_opaque = 0;
            op->def = 0;
            add_saved(t, op, saved);
        }
        rc = taken ? 1 : PyErr_Occurred() ? -1 : 0;
        Py_XDECREF(answer);
    }
    Py_XDECREF(key);
    return rc;
}

int thx_claim_operators(thx *x, PyObject *claims, th_trace *t) {
    asking a;
    PyObject *any = claims ? PyObject_GetAttrString(claims, "operators") : NULL;
    Py_XDECREF(any);
    if (!claims || any == Py_False) return 0;
    if (!any || asking_init(&a, x, claims, t, "joint") < 0) return -1;
    int rc = 0;
    for (th_opref o = 1; o < t->nops && rc >= 0; o++)
        if (t->ops[o].kind == TH_OP_CALL && !t->ops[o].callee_opaque && !t->ops[o].effects && !is_ours(t, &t->ops[o]))
            rc = replace_one(&a, t, &t->ops[o]);
    asking_fini(&a);
    return rc < 0 ? -1 : 0;
}

PyObject *thx_operator_key(PyObject *module, PyObject *dotted) {
    thx *x = PyModule_GetState(module);
    const char *text = PyUnicode_AsUTF8(dotted);
    th_str name = text ? th_intern_z(x->ctx, text) : 0;
    if (!name) return text ? thx_raise(x, TH_ENOMEM) : NULL;
    return key_of_name(x, name);
}
