/* A miss: capture, effects on the module tree, passes, lowering. */
#include "callable.h"

#include "derive.h"
#include "origin.h"
#include "region.h"
#include "transform.h"

#include "passes/pass.h"

#include <string.h>
#include <time.h>

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

void thx_entry_free(thx *x, thx_entry *e) { /* keeps a pending exception */
    PyObject *type, *value, *trace;
    if (!e) return;
    PyErr_Fetch(&type, &value, &trace);
    for (uint32_t i = 0; i < e->nargs; i++) thx_spec_fini(&e->args[i]);
    PyMem_Free(e->args);
    thx_entry_free_grads(e);
    Py_XDECREF(e->kwnames);
    Py_XDECREF(e->absent);
    Py_XDECREF(e->expected);
    thx_places_free(e);
    Py_XDECREF(e->formula);
    Py_XDECREF(e->conditions);
    thx_sizes_free(e->main.literals.sizes);
    PyMem_Free(e->undo);
    PyMem_Free(e->offsets);
    thx_resumes_free(e);
    thx_guards_free(x, e->guards);
    th_trace_free(e->captured);
    thx_program_fini(&e->main);
    if (e->gradient) e->gradient->reads = NULL;
    thx_guards_free(x, e->reads);
    Py_XDECREF((PyObject *)e->gradient);
    PyMem_Free(e->sharing);
    PyMem_Free(e->roots);
    PyMem_Free(e->root_leaf);
    thx_spec_fini(&e->result);
    PyMem_Free(e->result_slots);
    for (uint32_t i = 0; i < e->nwrites; i++) {
        Py_XDECREF(e->writes[i].dict);
        Py_XDECREF(e->writes[i].key);
        Py_XDECREF(e->writes[i].constant);
    }
    PyMem_Free(e->writes);
    thx_effects_fini(&e->effects);
    for (uint32_t i = 0; i < e->nidentical; i++) Py_DECREF(e->identical[i].tensor);
    PyMem_Free(e->identical);
    Py_XDECREF(e->known);
    PyMem_Free(e);
    PyErr_Restore(type, value, trace);
}

typedef struct compile {
    thx_callable_object *c;
    const thx_request *call;
    thx *x;
    thx_entry *e;
    thx_recorder *r;
    thx_leaves leaves; /* real tensors of the arguments */
    PyObject *fake_args, *fake_kwargs;
    PyObject **fakes; /* the same in the order of the specs (borrowed) */
    PyObject *result; /* what the user's code returned */
    thx_watched_args watched;
    thx_entry *like;    /* the entry for the same call but for values of floats, or NULL */
    PyObject *tape;     /* follows these */
    bool misled;        /* the code may have taken them for what they are not */
    thx_entry *other;   /* the entry for the same call but for sizes, or NULL */
    PyObject *sizes;    /* follows these */
    bool ints;          /* and follows ints alone */
    thx_leaves outputs; /* tensors in it */
    th_val *values;     /* values of outputs, then of writes */
    uint32_t nvalues;
    bool *told;  /* by value of `values`: the user's code was told that it requires grad */
    bool raised; /* the user's code ended with an exception of its own */
} compile;

/* ---- arguments ---- */

static int describe_args(compile *k) {
    thx_entry *e = k->e;
    PyObject *kwnames = k->call->kwnames;
    e->npositional = PyVectorcall_NARGS(k->call->nargsf);
    e->kwnames = Py_XNewRef(kwnames);
    e->nargs = (uint32_t)(e->npositional + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0));
    e->args = PyMem_Calloc(e->nargs + 1, sizeof *e->args);
    if (!e->args) return PyErr_NoMemory(), -1;
    return thx_specs_init(k->x, e->args, k->call->args, e->nargs, &k->leaves);
}

/* Watch what the callable can reach, and what arguments compared by identity (modules, functions) hold. */
static int make_guards(compile *k) {
    PyObject *roots = PyList_New(0);
    int rc = roots && (!k->c->module || PyList_Append(roots, k->c->module) == 0) ? PyList_Append(roots, k->c->fn) : -1;
    for (uint32_t i = 0; i < k->e->nargs && rc == 0; i++) rc = thx_spec_identities(&k->e->args[i], roots);
    if (rc == 0 && !(k->e->guards = thx_guards_new(k->x, roots))) rc = -1;
    Py_XDECREF(roots);
    return rc;
}

static PyObject *fake_leaf(void *user, uint32_t leaf) {
    compile *k = user;
    return Py_XNewRef(thx_recorder_argument(k->r, k->leaves.items[leaf], leaf));
}

static int build_fake_args(compile *k) {
    thx_entry *e = k->e;
    k->fake_args = PyTuple_New(e->npositional);
    k->fake_kwargs = PyDict_New();
    k->fakes = PyMem_Calloc(e->nargs + 1, sizeof *k->fakes);
    if (!k->fake_args || !k->fake_kwargs || !k->fakes) return PyErr_Occurred() ? -1 : (PyErr_NoMemory(), -1);
    PyObject *shared[THX_MAX_SHARED];
    for (uint32_t i = 0; i < e->nargs; i++) {
        PyObject *o = k->fakes[i] = thx_spec_build(k->x, &e->args[i], fake_leaf, k, shared);
        if (!o) return -1;
        if (i < e->npositional) {
            PyTuple_SET_ITEM(k->fake_args, i, o);
        } else {
            int rc = PyDict_SetItem(k->fake_kwargs, PyTuple_GET_ITEM(e->kwnames, i - e->npositional), o);
            Py_DECREF(o);
            if (rc < 0) return -1;
        }
    }
    return 0;
}

/* ---- effects on the module tree ---- */

static int add_write(compile *k, PyObject *dict, PyObject *key, PyObject *constant, th_val value) {
    thx_entry *e = k->e;
    thx_write *writes = PyMem_Realloc(e->writes, sizeof *writes * (e->nwrites + 1));
    if (!writes) return PyErr_NoMemory(), -1;
    e->writes = writes;
    writes[e->nwrites++] = (thx_write){Py_NewRef(dict), Py_NewRef(key), Py_XNewRef(constant), value};
    return 0;
}

static bool is_plain(PyObject *o) {
    return o == Py_None || PyBool_Check(o) || PyLong_CheckExact(o) || PyFloat_CheckExact(o) || PyUnicode_CheckExact(o);
}

/* What a change is called in an error: 'a write to the list 'seen''. */
static void name_change(compile *k, PyObject *owner, PyObject *key, char *text, size_t size) {
    const char *what = PyDict_Check(owner)
                           ? key == Py_None ? "dictionary, in the order of its keys," : "attribute or key"
                       : PyCell_Check(owner) ? "variable of an enclosing function"
                                             : Py_TYPE(owner)->tp_name;
    PyObject *known = PyDict_Check(owner) && key != Py_None ? key : thx_guards_name(k->e->guards, owner);
    PyObject *name = known ? PyObject_Repr(known) : NULL;
    snprintf(text, size, "a write to a%s %.60s%s%.120s", strchr("aeiou", what[0]) ? "n" : "", what, name ? " " : "",
             name ? PyUnicode_AsUTF8(name) : "");
    PyErr_Clear();
    Py_XDECREF(name);
}

/* An attribute in a slot was written, or deleted: after is NULL. */
static int add_member(compile *k, PyObject *owner, PyObject *name, PyObject *after) {
    PyObject *none = Py_None, *removed = after ? PyTuple_New(0) : PyTuple_Pack(1, name), *written = PyDict_New();
    int rc = removed && written ? 0 : -1;
    if (rc == 0 && after) rc = PyDict_SetItem(written, name, after);
    PyObject *content = rc == 0 ? PyTuple_Pack(2, none, written) : NULL;
    const thx_effect effect = {
        .kind = THX_EFFECT_BODY, .members = true, .owner = owner, .removed = removed, .after = k->e->nwrites};
    rc = content ? thx_effect_add(&k->e->effects, &effect, content) : -1;
    Py_XDECREF(content);
    Py_XDECREF(written);
    Py_XDECREF(removed);
    return rc;
}

/* One changed key of a watched dictionary: tensors and plain constants are replayed, the rest is refused. */
static int on_change(void *user, PyObject *dict, PyObject *key, PyObject *before, PyObject *after) {
    compile *k = user;
    char text[240];
    thx_entry *e = k->e;
    bool keyed = PyDict_Check(dict) || PyType_Check(dict);
    if (keyed && after && thx_holds_fake(k->x, key))
        return thx_capture_error(k->r, "a tensor as a new key of a dictionary", "it is found by its address",
                                 "use a name, or the position of the tensor");
    if (keyed && after && thx_is_tensor(k->x, after)) {
        thx_cell *cell = thx_recorder_cell(k->r, after);
        if (!cell) return -1;
        th_val value = cell->value;
        return add_write(k, dict, key, NULL, value);
    }
    if (keyed && after && is_plain(after)) return add_write(k, dict, key, after, 0);
    thx_effect effect = {.owner = dict, .key = keyed ? key : NULL, .after = e->nwrites};
    if (PyDict_Check(dict) && key == Py_None && !before == !after && (!after || PyTuple_Check(after))) {
        effect.kind = THX_EFFECT_BODY; /* the order of its keys; after: these, and the dictionary is as it was */
        effect.key = NULL;
        return thx_effect_add_items(&e->effects, &effect, dict, after);
    }
    effect.kind = keyed                         ? (after ? THX_EFFECT_KEY : THX_EFFECT_DELETE)
                  : PyCell_Check(dict) && after ? THX_EFFECT_CELL
                                                : 0;
    if (effect.kind) return thx_effect_add(&e->effects, &effect, after);
    if (after && (PyList_Check(dict) || PyAnySet_Check(dict) || thx_is_deque(dict))) {
        effect.kind = THX_EFFECT_BODY;
        PyObject *none = Py_None, *content = PyTuple_Pack(2, after, none);
        int rc = content ? thx_effect_add(&e->effects, &effect, content) : -1;
        Py_XDECREF(content);
        return rc;
    }
    if (!keyed && PyUnicode_Check(key)) return add_member(k, dict, key, after);
    name_change(k, dict, key, text, sizeof text);
    return thx_capture_error(k->r, text, "this change of state cannot be replayed at later calls",
                             "keep such state outside the compiled function, or pass it in and return it");
}

static int add_messages(compile *k) {
    int rc = 0;
    for (Py_ssize_t i = 0; rc == 0 && k->r->messages && i < PyList_GET_SIZE(k->r->messages); i++) {
        const thx_effect effect = {
            .kind = THX_EFFECT_CALL, .owner = PyList_GET_ITEM(k->r->messages, i), .after = k->e->nwrites};
        rc = thx_effect_add(&k->e->effects, &effect, NULL);
    }
    return rc;
}

/* ---- outputs ---- */

static int collect_outputs(compile *k) {
    thx_entry *e = k->e;
    thx_inputs inputs = {e->args, k->fakes, e->nargs, k->watched.index};
    if (e->effects.count) { /* they are made like a result */
        PyObject *contents = PyList_AsTuple(e->effects.contents), *first = contents ? PyTuple_Pack(1, k->result) : NULL;
        PyObject *all = first ? PySequence_Concat(first, contents) : NULL;
        Py_XDECREF(first);
        Py_XDECREF(contents);
        if (!all) return -1;
        Py_CLEAR(e->effects.contents);
        Py_SETREF(k->result, all);
    }
    if (thx_result_init(k->r, &e->result, k->result, &inputs, e->guards, &k->outputs) < 0) return -1;
    if (thx_recorder_check_attributes(k->r, k->outputs.items, k->outputs.count) < 0) return -1;
    e->absent = Py_XNewRef(k->r->absent);
    e->nresults = k->outputs.count;
    k->values = PyMem_Calloc(e->nresults + e->nwrites + 1, sizeof *k->values);
    if (!k->values) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < e->nresults; i++) {
        thx_cell *cell = thx_recorder_cell(k->r, k->outputs.items[i]);
        if (!cell) return -1;
        k->values[k->nvalues++] = cell->value;
    }
    for (uint32_t i = 0; i < e->nwrites; i++)
        if (!e->writes[i].constant) k->values[k->nvalues++] = e->writes[i].slot; /* still a value */
    th_trace *t = k->r->t;
    th_node *nodes = PyMem_Calloc(k->nvalues + 1, sizeof *nodes);
    if (!nodes) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < k->nvalues; i++) nodes[i] = th_node_value(t, k->values[i]);
    t->result = k->nvalues == 1 ? nodes[0] : th_node_seq(t, TH_N_TUPLE, k->nvalues, nodes);
    PyMem_Free(nodes);
    return thx_check(k->x, th_trace_status(t));
}

/* ---- capture ---- */

static int check_arguments_unchanged(compile *k) {
    for (uint32_t i = 0; i < k->e->nargs; i++)
        if (!thx_spec_buffers_unchanged(&k->e->args[i], k->fakes[i]))
            return thx_capture_error(k->r, "a write to an array passed as an argument",
                                     "changes of arrays are not replayed", "pass a tensor, or return the new array");
    return 0;
}

static int find_identical(compile *k) {
    thx_entry *e = k->e;
    e->identical = PyMem_Calloc(k->leaves.count + 1, sizeof *e->identical);
    if (!e->identical) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < k->leaves.count; i++) {
        if (thx_guards_holds(e->guards, k->leaves.items[i])) {
            e->identical[e->nidentical].leaf = i;
            e->identical[e->nidentical++].tensor = Py_NewRef(k->leaves.items[i]);
        }
    }
    return 0;
}

static int refuse_unwatched(compile *k) {
    const char *kind = thx_guards_iterator(k->e->guards), *weak = thx_guards_weak(k->e->guards),
               *hidden = thx_guards_hidden(k->e->guards);
    char text[160];
    if (hidden) {
        snprintf(text, sizeof text, THX_OBJECT_IN_C ", %.80s", hidden);
        return thx_capture_error(k->r, text, "what it holds cannot be watched",
                                 "pass what is read of it as an argument");
    }
    if (!kind && weak) {
        snprintf(text, sizeof text, "a weak reference to an object (%.80s)", weak);
        return thx_capture_error(k->r, text,
                                 "what is watched for changes is kept alive, so that the reference would not die",
                                 "pass the object, or what is read of it, as an argument");
    }
    if (!kind) return 0;
    snprintf(text, sizeof text, "an iterator (%.80s) from outside the function", kind);
    return thx_capture_error(k->r, text, "each use moves it on, and where it is cannot be watched",
                             "make it inside the function, or pass what it gives as an argument");
}

/* A tensor that no operation made and that was not there before the call either: torch.Tensor([1.0]) makes one past all
 * observers, and so does what shares the memory of an array. */
static bool appeared(const thx_recorder *r, const thx_root *root) {
    bool known = root->leaf >= 0 || thx_guards_met(r->reached, root->real);
    for (uint32_t i = 0; i < r->nroots && !known; i++) {
        const thx_root *other = &r->roots[i];
        bool shares = other != root && root->base && other->base == root->base;
        known = shares && (other->leaf >= 0 || thx_guards_met(r->reached, other->real));
    }
    return !known;
}

/* Does an array that the code can read lie in the same memory? */
static bool shares_array(const compile *k, const thx_root *root) {
    const thx_memory memory = thx_storage_memory(k->x, root->real);
    bool found = k->r->reached && thx_guards_buffer_in(k->r->reached, &memory);
    for (uint32_t i = 0; i < k->e->nargs && !found; i++)
        found = thx_spec_buffer_in(&k->e->args[i], k->call->args[i], &memory);
    return found;
}

/* Each call of the original has another one of these, or writes to the array; that of the trace is always the same. */
static int refuse_appeared(compile *k) {
    const th_trace *t = k->r->t;
    for (uint32_t i = 0; i < k->r->nroots; i++) {
        const thx_root *root = &k->r->roots[i];
        if (th__is_written(t, root->value, t->nops) && shares_array(k, root))
            return thx_capture_error(k->r, THX_SHARED_ARRAY,
                                     "a write to the tensor does not reach it during the capture",
                                     "copy the array, torch.tensor(array)");
        if (!appeared(k->r, root)) continue;
        const th_value *v = &t->values[root->value];
        bool leaves = thx_random_is_state(k->r, root->real);
        for (uint32_t j = 0; j < k->nvalues && !leaves; j++)
            leaves = k->values[j] == root->value || (v->alias && t->values[k->values[j]].alias == v->alias);
        if (leaves || th__is_written(t, root->value, t->nops))
            return thx_capture_error(k->r, THX_APPEARED " and that was not there before",
                                     "each call has another one, or one that shares the memory of an array",
                                     "make it with torch.tensor, or outside of the compiled function");
    }
    return 0;
}

/* A tensor that is an argument and lies in the state too is two objects while the function runs on fakes. */
static int refuse_two_places(compile *k) {
    k->e->compares = thx_guards_compares_identity(k->e->guards);
    if (!k->e->nidentical || !k->e->compares) return 0;
    return thx_capture_error(k->r, "an argument that the function can also reach by itself",
                             "the function compares objects with `is`", "pass a copy, or do not pass it");
}

/* Likewise a container: what is written to one of the two objects does not reach the other. */
static int refuse_two_containers(compile *k) {
    thx_entry *e = k->e;
    bool keyed = false;
    if (!PyList_GET_SIZE(k->watched.rows)) return 0;
    if (!(e->known = thx_guards_known(e->guards, &keyed))) return -1;
    if (!(keyed || e->effects.count || e->nwrites || e->compares || thx_guards_finds(e->guards))) {
        Py_CLEAR(e->known);
        return 0;
    }
    int meets = thx_args_meet(e->args, k->call->args, e->nargs, e->known);
    if (meets) Py_CLEAR(e->known);
    return meets <= 0 ? meets
                      : thx_capture_error(k->r, THX_TWO_CONTAINERS, "what it writes to one does not reach the other",
                                          "do not pass it, or pass a copy");
}

/* Does the derivative hold what Python code of the user's said: of autograd functions, custom operators, hooks? */
static bool asks_in_backward(const thx_recorder *r, const th_trace *t) {
    bool asks = r->ties != NULL;
    for (th_opref o = 1; o < t->nops && !asks; o++) {
        const char *name = t->ops[o].callee_opaque ? "" : th_str_get(t->ctx, t->ops[o].callee);
        PyObject *object = t->ops[o].callee_opaque ? t->opaques[t->ops[o].callee_opaque].object : NULL;
        if (object && PyFunction_Check(object) && thx_origin_of_code(r->x, PyFunction_GET_CODE(object)) == THX_TORCHS)
            continue; /* x ** 2 */
        bool torchs = strncmp(name, "torch.", 6) == 0 && !strstr(name, "autograd") &&
                      (strncmp(name, "torch.ops.", 10) != 0 || strncmp(name, "torch.ops.aten.", 15) == 0);
        asks = t->ops[o].kind == TH_OP_CALL && !torchs && !thx_mark_kind(t, &t->ops[o]);
    }
    return asks;
}

/* The code has run: what it says of sizes from here on does not count. Keeps a pending exception. */
static int close_sizes(compile *k) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    k->r->sizes = NULL;
    PyObject *codes = thx_codes_list(k->r), *done = codes ? PyObject_CallMethod(k->sizes, "close", "O", codes) : NULL;
    Py_XDECREF(codes);
    PyObject *spoiled = done ? PyObject_GetAttrString(k->sizes, "spoiled") : NULL;
    Py_XDECREF(done);
    if (!type && spoiled && spoiled != Py_None) PyErr_SetObject(k->x->SizesChanged, spoiled);
    Py_XDECREF(spoiled);
    if (type) PyErr_Restore(type, value, trace);
    return PyErr_Occurred() ? -1 : 0;
}

/* Extents hold their Sizes. Some are left where no plain int is put in their place: in a partial, a slot, an array. */
static int refuse_escaped(compile *k) {
    if (Py_REFCNT(k->sizes) > 1) PyGC_Collect();
    if (Py_REFCNT(k->sizes) == 1) return 0;
    PyErr_SetString(k->x->SizesChanged, "the code keeps a size in an object that is not opened");
    return -1;
}

static int capture(compile *k) {
    thx *x = k->x;
    PyObject *params = thx_guards_params(x, k->e->guards);
    if (!params) return -1;
    if (find_identical(k) < 0) {
        Py_XDECREF(params);
        return -1;
    }
    k->r = thx_recorder_new(x, params);
    Py_XDECREF(params);
    if (!k->r) return -1;
    k->r->oracle = Py_XNewRef(k->call->seen);
    k->r->nleaves = k->leaves.count;
    k->r->claims = k->c->claims;
    k->r->may_expect = k->c->branch_limit > 0;
    x->following = k->sizes;
    int built = build_fake_args(k);
    x->following = NULL;
    if (built == 0 && k->ints && !(x->tape = thx_tape_new(x))) built = -1;
    if (built == 0 && (x->tape || k->sizes)) built = thx_places_put(k->e, x->tape, k->sizes);
    k->tape = x->tape;
    x->tape = NULL;
    k->r->tape = k->tape;
    if (k->sizes) {
        k->r->sizes = k->sizes;
        k->r->like = k->ints ? NULL : k->other->captured;
        k->r->numbers = PyObject_GetAttrString(k->sizes, "values");
        Py_XDECREF(k->r->numbers); /* k->sizes holds it */
    }
    if (built < 0 || thx_args_watch(&k->watched, k->e->args, k->fakes, k->e->nargs) < 0) {
        thx_places_put_back(k->e);
        return -1;
    }
    int rc = refuse_unwatched(k) < 0 ? -1 : refuse_two_places(k);
    k->r->reached = k->e->guards;
    if (rc == 0) rc = thx_recorder_run(k->r, k->c->fn, k->fake_args, k->fake_kwargs, &k->result);
    thx_places_put_back(k->e);
    if (k->sizes && close_sizes(k) < 0) rc = -1;
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    k->raised = rc < 0 && PyErr_ExceptionMatches(PyExc_Exception) && !PyErr_ExceptionMatches(x->CaptureError) &&
                !PyErr_ExceptionMatches(x->GradNeeded);
    k->misled = k->raised && k->tape; /* handlers[type(s)] */
    if (rc < 0) PyErr_Fetch(&type, &value, &trace);
    PyObject *codes = rc < 0 ? NULL : thx_codes_list(k->r);
    thx_guards_ran(k->x, k->e->guards, codes);
    if (codes && k->tape) {
        PyObject *done = PyObject_CallMethod(k->tape, "ran", "O", codes);
        if (!done) rc = -1;
        if (done == Py_True) {
            PyErr_SetString(x->SizesChanged, "code that ran may ask for the type of a number");
            k->misled = true;
            rc = -1;
        }
        Py_XDECREF(done);
    }
    Py_XDECREF(codes);
    int kept = thx_args_collect(&k->watched, rc < 0 ? NULL : &k->e->effects);
    int undone = thx_guards_restore(k->x, k->e->guards, rc < 0 ? NULL : on_change, k);
    for (uint32_t i = 0; i < k->e->nplaces && rc == 0 && undone == 0; i++) {
        const thx_place *p = &k->e->places[i];
        if (p->rewritten) undone = on_change(k, p->owner, p->key, p->value, p->rewritten);
    }
    if (rc < 0) {
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
    } else if (kept < 0 || undone < 0 || add_messages(k) < 0 || thx_ties_check(k->r, k->e->guards) < 0 ||
               check_arguments_unchanged(k) < 0 || refuse_two_containers(k) < 0 || collect_outputs(k) < 0 ||
               refuse_appeared(k) < 0) {
        rc = -1;
    }
    thx_guards_forget_met(k->e->guards);
    for (uint32_t i = 0; i < k->e->nargs; i++) thx_spec_settle(&k->e->args[i]);
    return rc;
}

/* ---- roots ---- */

static int bind_roots(compile *k) {
    thx_entry *e = k->e;
    thx *x = k->x;
    const th_trace *t = e->main.t;
    uint32_t bound = 0;
    e->nroots = t->ninputs;
    e->roots = PyMem_Calloc(t->ninputs + 1, sizeof *e->roots);
    e->root_leaf = PyMem_Calloc(t->ninputs + 1, sizeof *e->root_leaf);
    if (!e->roots || !e->root_leaf) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < t->ninputs; i++) {
        const thx_root *root = NULL; /* passes keep the inputs and their order */
        for (uint32_t j = 0; j < k->r->nroots && !root; j++)
            if (k->r->roots[j].value == t->inputs[i]) root = &k->r->roots[j];
        if (!root) return thx_raise(x, TH_EINTERNAL), -1;
        if (root->leaf >= 0) {
            e->root_leaf[i] = root->leaf;
            continue;
        }
        if (thx_guards_bind(x, e->guards, root->real, root->dict, root->key) < 0) return -1;
        e->root_leaf[i] = -1 - (int32_t)bound++;
        e->roots[i].object = root->real;
        e->roots[i].handle = x->abi.on ? thx_borrow(&x->abi, root->real) : NULL;
    }
    return 0;
}

static bool writes_inputs(const th_trace *t, th_opref until) {
    bool found = false;
    for (uint32_t i = 0; i < t->ninputs && !found; i++) found = th__is_written(t, t->inputs[i], until);
    return found;
}

bool thx_entry_is_untouched(const thx_entry *e) {
    const th_trace *t = e->main.t;
    th_opref until = e->main.failed ? e->main.failed : t->nops;
    uint8_t stays = TH_FX_STATE | (e->redraws ? 0 : TH_FX_RANDOM);
    for (th_opref o = 1; o < until; o++)
        if (t->ops[o].effects & stays && !thx_mark_kind(t, &t->ops[o]) && !th__op_only_reads(t, &t->ops[o]))
            return false;
    return !writes_inputs(t, until) && (!e->gradient || e->gradient->nmutated < 2);
}

/* ---- all of it ---- */

int thx_entry_place(thx *x, thx_entry *e) {
    if (e->placed == e->main.plan) return 0;
    if (!e->result_slots && !(e->result_slots = PyMem_Calloc(e->nresults + 1, sizeof *e->result_slots)))
        return PyErr_NoMemory(), -1;
    uint32_t at = 0;
    for (uint32_t i = 0; i < e->nvalues; i++) { /* outputs first, then writes */
        uint32_t slot = thx_program_result(&e->main, i);
        if (slot == UINT32_MAX) return thx_raise(x, TH_EINTERNAL), -1;
        if (i < e->nresults) {
            e->result_slots[i] = slot;
            continue;
        }
        while (e->writes[at].constant) at++;
        e->writes[at++].slot = slot;
    }
    e->placed = e->main.plan;
    return 0;
}

/* What a run that meets another value than expected has to put back. */
static int note_undo(compile *k) {
    thx_entry *e = k->e;
    const th_trace *t = e->main.t;
    th_opref last = t->nops;
    if (!k->r->expected) return 0;
    while (--last && !th__op_only_reads(t, &t->ops[last])) continue;
    e->expected = PyList_AsTuple(k->r->expected);
    e->undo = PyMem_Calloc(t->ninputs + 1, sizeof *e->undo);
    if (!e->expected || !e->undo) return PyErr_Occurred() ? -1 : (PyErr_NoMemory(), -1);
    for (th_opref o = 1; o < last; o++) e->undo_random |= (t->ops[o].effects & TH_FX_RANDOM) != 0;
    for (uint32_t i = 0; i < t->ninputs; i++)
        if (th__is_written(t, t->inputs[i], last)) e->undo[e->nundo++] = i;
    return 0;
}

static int note_offsets(compile *k) {
    thx_entry *e = k->e;
    if (!k->x->counts_offsets) return 0;
    e->offsets = PyMem_Calloc(e->nroots + 1, sizeof *e->offsets);
    if (!e->offsets) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < e->nroots; i++) {
        int32_t leaf = e->root_leaf[i];
        e->offsets[i] = thx_offset_of(k->x, leaf >= 0 ? k->leaves.items[leaf] : e->roots[i].object);
    }
    return 0;
}

static int lower(compile *k) {
    thx_entry *e = k->e;
    e->nvalues = k->nvalues;
    for (th_opref o = 1; o < e->main.t->nops; o++) e->draws |= (e->main.t->ops[o].effects & TH_FX_RANDOM) != 0;
    e->writes_inputs = writes_inputs(e->main.t, e->main.t->nops) || (e->gradient && e->gradient->nmutated);
    if (thx_claim(k->x, k->c->claims, e->main.t, e->gradient ? "forward" : "inference") < 0 ||
        thx_program_lower(k->x, &e->main, false) < 0 || thx_entry_place(k->x, e) < 0 ||
        thx_claims_settle(k->c->claims) < 0)
        return -1;
    return bind_roots(k) < 0 || note_offsets(k) < 0 ? -1 : note_undo(k);
}

/* Between the passes: what the core leaves to whoever can run torch. */
static th_status between_passes(void *user, th_trace *t, const char *pass, double ms) {
    compile *k = user;
    (void)ms;
    if (strcmp(pass, "fold") != 0 || k->e->ambient.autocast) return TH_OK;
    return thx_fold_constants(k->x, k->r, t) < 0 ? TH_ERUN : TH_OK;
}

/* The flags of types were for the user's code; only those of inputs mean something from here on. True: some result of
 * an operation may require grad. */
static bool take_flags(const thx_recorder *r, th_trace *t) {
    bool any = false;
    for (uint32_t i = 0; i < r->nroots; i++) { /* one that was written to may show more than the tensor itself says */
        th_typeref *type = &t->values[r->roots[i].value].type, told = *type;
        *type = th_type_set_grad(t->ctx, told, r->roots[i].requires_grad);
        any |= *type != told;
    }
    for (th_val v = 1; v < t->nvalues; v++) {
        if (!t->values[v].def) continue;
        th_typeref plain = th_type_set_grad(t->ctx, t->values[v].type, false);
        any |= plain != t->values[v].type;
        t->values[v].type = plain;
    }
    bool differentiable = any;
    for (uint32_t i = 0; i < r->nroots; i++) differentiable |= r->roots[i].requires_grad;
    for (th_opref o = 1; o < t->nops && !differentiable; o++) t->ops[o].marks &= (uint8_t)~TH_MARK_NO_GRAD;
    return any;
}

/* Does anything that was computed require grad? Where parameters are only written, as an optimizer does, nothing does.
 */
static bool computes_gradients(const th_trace *t) {
    bool any = false;
    for (th_val v = 1; v < t->nvalues && !any; v++)
        any = t->values[v].def && !(t->ops[t->values[v].def].marks & TH_MARK_NO_GRAD) &&
              th_type_get(t->ctx, t->values[v].type)->flags & TH_TYPE_REQUIRES_GRAD;
    return any;
}

/* The error of the core that says why there is no derivative: calls like this one run the original. */
static int no_derivative(compile *k, th_status status) {
    if (status != TH_DECLINED) return thx_check(k->x, status);
    PyErr_SetString(k->x->GradNeeded, th_ctx_error(k->x->ctx)->text);
    return -1;
}

static int note_told(compile *k) {
    k->told = PyMem_Calloc(k->nvalues + 1, sizeof *k->told);
    if (!k->told) return PyErr_NoMemory(), -1;
    const th_trace *t = k->r->t;
    for (uint32_t i = 0; i < k->nvalues; i++)
        k->told[i] = th_type_get(t->ctx, t->values[k->values[i]].type)->flags & TH_TYPE_REQUIRES_GRAD;
    return 0;
}

/* What the recorder said of a result is that some input requires grad. Where nothing is written, the rules of the
 * operations know better: a result may have no derivative. */
static bool rules_decide(const th_trace *t, th_val v) {
    static const char *const fresh[] = {".new_", "_like", ".empty", ".zeros", ".ones", ".full", NULL};
    const th_op *op = &t->ops[t->values[v].def];
    const char *name = t->values[v].def && !op->callee_opaque ? th_str_get(t->ctx, op->callee) : "";
    bool found = t->values[v].def && t->nodes[op->outs].kind == TH_N_TUPLE && t->nodes[op->outs].count > 1,
         writes = false;
    for (int i = 0; fresh[i] && !found; i++) found = strstr(name, fresh[i]) != NULL;
    for (th_opref o = 1; o < t->nops && !writes; o++) writes = t->ops[o].nwrites > 0;
    return !writes || (found && !th__is_written(t, v, t->nops));
}

/* A result that requires grad though no gradient reaches an input through it (the code made a leaf; something was
 * written over), or the other way round (a.type_as(b)), is not one of ours. */
static int check_leaves(compile *k, const th_joint *joint) {
    const th_trace *t = k->e->captured;
    for (uint32_t i = 0; i < k->nvalues; i++) {
        bool reached = false;
        for (uint32_t j = 0; j < joint->ntangents && !reached; j++)
            reached = joint->tangent_of[j] < k->nvalues && k->values[joint->tangent_of[j]] == k->values[i];
        bool right = reached == k->told[i];
        for (uint32_t j = 0; j < k->r->nroots && !right && !reached; j++) { /* an input, or one that was written to */
            const thx_root *root = &k->r->roots[j];
            const thx_cell *cell = thx_recorder_known(k->r, root->real);
            bool same = i < k->outputs.count && cell && cell->key == k->outputs.items[i];
            right = (root->value == k->values[i] && root->requires_grad) || (joint->nmutated && same);
        }
        /* A transform may have made it so; and of what is new or one of several results, the rule knows best. */
        right |= reached ? k->c->transform != NULL : !k->r->leaves && rules_decide(t, k->values[i]);
        if (right) continue;
        PyErr_SetString(k->x->GradNeeded,
                        "whether a result requires grad does not follow from the inputs that it is computed from");
        return -1;
    }
    return 0;
}

/* A result that is a view of an input to which the call copies new contents at its end is differentiated as a view of
 * the former ones. */
static int check_returned_views(compile *k, const th_joint *joint) {
    const th_trace *t = joint->t;
    const th_node_data *result = &t->nodes[t->result];
    for (uint32_t i = 0; i < joint->nresults; i++) {
        const th_node_data *d = &t->nodes[t->kids[result->u.kids + i]];
        uint32_t alias = d->kind == TH_N_VALUE ? t->values[d->u.ref].alias : 0;
        for (uint32_t m = 0; alias && m < joint->nmutated; m++) {
            if (t->values[joint->mutated[m]].alias != alias || joint->mutated[m] == d->u.ref) continue;
            PyErr_SetString(k->x->GradNeeded, "a view of an input is returned that the function has written to");
            return -1;
        }
    }
    return 0;
}

/* The backward of a torch.autograd.Function of the user's was run for the derivative: what it reads must be the same
 * when the gradients are computed. */
static int watch_backwards(compile *k) {
    const th_trace *t = k->e->captured;
    PyObject *roots = PyList_New(0);
    int rc = roots ? 0 : -1;
    for (th_opref o = 1; o < t->nops && rc == 0; o++) {
        PyObject *callee = t->ops[o].callee_opaque ? thx_callable(k->x, t, &t->ops[o]) : NULL;
        PyObject *cls = callee ? thx_custom_class(k->x, callee) : NULL; /* borrowed */
        if (!cls) continue;
        PyObject *backward = PyObject_GetAttrString(cls, "backward");
        rc = backward ? PyList_Append(roots, backward) : -1;
        Py_XDECREF(backward);
    }
    if (rc == 0 && PyList_GET_SIZE(roots)) {
        k->e->reads = thx_guards_new(k->x, roots);
        if (!k->e->reads) rc = -1;
        if (k->e->gradient) k->e->gradient->reads = k->e->reads;
    }
    Py_XDECREF(roots);
    return rc;
}

/* Join the program with its derivative and split it in two. */
static int differentiate(compile *k) {
    thx *x = k->x;
    thx_entry *e = k->e;
    th_trace *copy = NULL;
    th_joint joint;
    const th_grad_options options = {thx_derive, x, x->facts, x->derived_only};
    thx_autocast cast;
    if (k->r->hidden_write) {
        PyErr_SetString(x->GradNeeded, "a tensor that requires grad is written to under torch.no_grad()");
        return -1;
    }
    if (thx_check(x, th_trace_clone(e->main.t, &copy)) < 0 || thx_autocast_off(x, &cast) < 0) {
        th_trace_free(copy);
        return -1;
    }
    int rc = thx_claim_operators(x, k->c->claims, copy);
    if (rc < 0) {
        th_trace_free(copy);
        thx_autocast_on(x, &cast);
        return -1;
    }
    rc = no_derivative(k, th_grad_join(copy, &options, &joint));
    thx_autocast_on(x, &cast);
    if (rc == 0) rc = check_leaves(k, &joint);
    if (rc == 0) rc = check_returned_views(k, &joint);
    if (rc == 0 && (joint.ntangents || joint.nmutated)) {
        th_fuel fuel = {.left = -1};
        th_trace *forward = NULL;
        rc = thx_check(x, th_pipeline_run(joint.t, "noop,cse,dce", &fuel, x->verify, NULL, NULL));
        if (rc == 0 &&
            !(e->gradient = thx_gradient_new(x, &joint, k->c->remat, k->c->transform, k->c->claims, &forward)))
            rc = -1;
        if (rc == 0) {
            th_trace_free(e->main.t);
            e->main.t = forward;
            rc = thx_gradient_find_above(e->gradient, e->captured, k->values, k->nvalues) < 0 ? -1 : watch_backwards(k);
        }
    }
    th_joint_fini(&joint);
    thx_rules_forget(x);
    return rc;
}

static const char functional[] = "functionalize,noop,fold,cse,errors,dce"; /* what comes before a transform */
/* What comes before differentiation. Operations that are the same are merged after it: of two that are one, the
 * derivative is (g1 + g2) * c where eager's is g1 * c + g2 * c, which is another number where c is infinite. */
static const char differentiable[] = "functionalize,noop,fold,errors,dce";
/* Without gradients, before executors claim what they run: regions are made of what is functional. */
static const char unclaimed[] = "functionalize,noop,fold,cse,errors,dce,reinplace,lifetime";
/* Of a program for any sizes: what functionalize makes of a write states sizes. */
static const char sized[] = "noop,fold,cse,errors,dce,lifetime";

/* Autocast casts a weight once, however often it is used: so do we, before differentiation. */
static const char *before_gradients(const th_trace *t) {
    for (th_opref o = 1; o < t->nops; o++)
        if (th__op_is(t, &t->ops[o], "torch.ops.aten.to.dtype")) return functional;
    return differentiable;
}

/* What the user's transforms make of the program may require grad where the captured one did not. */
static int transform(compile *k, bool *grad) {
    th_fuel fuel = {.left = -1};
    th_trace **t = &k->e->main.t;
    if (thx_transform_program(k->x, k->c->transform, k->r, t) < 0) return -1;
    for (uint32_t i = 0; i < k->r->nroots; i++) *grad |= k->r->roots[i].requires_grad && thx_grad_mode(k->x) == 1;
    const char *passes = k->x->passes ? k->x->passes : *grad ? before_gradients(*t) : functional;
    return thx_check(k->x, th_pipeline_run(*t, passes, &fuel, k->x->verify, between_passes, k));
}

/* The last step of a program without gradients. */
static int finish_inference(compile *k) {
    th_fuel fuel = {.left = -1};
    if (k->c->transform) return thx_transform_inference(k->x, k->c->transform, &k->e->main.t);
    return thx_check(k->x, th_pipeline_run(k->e->main.t, "lifetime", &fuel, k->x->verify, NULL, NULL));
}

static int run_passes(compile *k) {
    thx_entry *e = k->e;
    if (thx_check(k->x, th_trace_clone(k->r->t, &e->captured)) < 0 || note_told(k) < 0) return -1;
    e->main.t = k->r->t;
    k->r->t = NULL;
    if (k->sizes && !k->ints && thx_sizes_mark(k->x, e->main.t, k->other->captured) < 0) return -1;
    bool only_writes = k->r->hidden_write && !k->r->leaves && !computes_gradients(e->main.t);
    bool grad = take_flags(k->r, e->main.t) && !only_writes;
    th_fuel fuel = {.left = -1};
    bool more = grad || k->c->transform;
    const char *passes = k->x->passes           ? k->x->passes
                         : grad                 ? before_gradients(e->main.t)
                         : more                 ? functional
                         : k->sizes && !k->ints ? sized
                         : k->c->claims         ? unclaimed
                                                : NULL;
    if (thx_check(k->x, th_pipeline_run(e->main.t, passes, &fuel, k->x->verify, between_passes, k)) < 0) return -1;
    if (k->c->transform && transform(k, &grad) < 0) return -1;
    if (grad && differentiate(k) < 0) return -1;
    return more && !e->gradient ? finish_inference(k) : 0;
}

/* follow: sizes that were others in a former call. */
static thx_entry *compile_once(thx_callable_object *c, const thx_request *call, bool follow, bool *followed) {
    thx *x = c->x;
    compile k = {.c = c, .call = call, .x = x, .e = PyMem_Calloc(1, sizeof(thx_entry))};
    if (!k.e) return (thx_entry *)PyErr_NoMemory();
    k.e->ambient = *call->ambient;
    thx_leaves_init(&k.leaves);
    thx_leaves_init(&k.outputs);
    double start = now_ms(), captured = 0, passed = 0;
    x->counts_offsets = false;
    int collecting = PyGC_Disable(); /* a capture only allocates: collections would find nothing, again and again */
    int rc = describe_args(&k);
    rc = rc == 0 ? make_guards(&k) : rc;
    if (rc == 0 && follow && !c->cache && !call->seen && !c->transform) rc = thx_numbers_begin(c, k.e, &k.like);
    if (rc == 0 && follow && !k.like && !c->cache && !call->seen) {
        rc = thx_sizes_begin(c, k.e, &k.other, &k.ints);
        if (k.other && !(k.sizes = thx_sizes_new(x))) rc = -1;
    }
    *followed = k.sizes != NULL;
    if (rc == 0 && call->refusal) {
        PyErr_SetObject(x->CaptureError, call->refusal);
        rc = -1;
    }
    if (rc == 0) rc = capture(&k);
    *followed |= k.misled;
    captured = now_ms();
    if (rc == 0) rc = run_passes(&k);
    if (rc == 0) k.e->ask_in_backward = k.e->gradient && asks_in_backward(k.r, k.e->captured);
    if (rc == 0 && k.sizes)
        rc = k.ints ? thx_ints_end(x, k.e, k.other, k.r, k.sizes, k.tape)
                    : thx_sizes_end(x, k.e, k.other, k.r, k.sizes, c->dynamic > 1);
    passed = now_ms();
    if (rc == 0) rc = lower(&k);
    if (rc == 0) rc = thx_entry_add_grads(x, k.e, k.r, &k.leaves);
    if (rc == 0) {
        thx_entry *e = k.e;
        e->sharing = PyMem_Malloc(sizeof *e->sharing * (3 * k.leaves.count + 1));
        if (e->sharing)
            thx_find_sharing(x, e->guards, &k.leaves, e->sharing);
        else
            rc = (PyErr_NoMemory(), -1);
        e->generation = thx_guards_generation(e->guards);
        e->capture_ms = captured - start;
        e->passes_ms = passed - captured;
        e->lower_ms = now_ms() - passed;
        e->inference = k.r->inside;
        e->nfast = k.r->nfast;
        e->nslow = k.r->nslow;
        e->nqueries = k.r->nqueries;
        e->nevals = k.r->nevals;
        x->captures++;
        e->number = ++x->entry_numbers;
    }
    thx_leaves_fini(&k.leaves);
    thx_leaves_fini(&k.outputs);
    PyMem_Free(k.values);
    PyMem_Free(k.told);
    PyMem_Free(k.fakes);
    Py_XDECREF(k.result);
    thx_args_fini(&k.watched);
    if (rc == 0 && k.like) {
        rc = thx_numbers_end(x, k.e, k.like, k.tape);
        if (rc == 1) k.like->dead = true; /* serves its calls too */
        if (rc > 0) c->generalised--;     /* tries in vain are limited */
        if (rc > 0) rc = 0;
    }
    if (k.like) thx_entry_leave(c, k.like);
    if (k.other) thx_entry_leave(c, k.other);
    Py_XDECREF(k.tape);
    Py_XDECREF(k.fake_args);
    Py_XDECREF(k.fake_kwargs);
    bool leaves = k.r && k.r->leaves; /* models that do this (wav2vec2) also draw which layers run: eager, as ever */
    Py_XDECREF((PyObject *)k.r);
    if (collecting) PyGC_Enable();
    if (rc == 0 && k.sizes) rc = refuse_escaped(&k);
    Py_XDECREF(k.sizes);
    if (rc < 0 && c->needs_transform && PyErr_ExceptionMatches(x->GradNeeded)) thx_refuse_original(c, NULL);
    if (rc < 0 && k.e->guards && !k.e->eager && !c->needs_transform) {
        if (PyErr_ExceptionMatches(x->GradNeeded) || (leaves && PyErr_ExceptionMatches(x->CaptureError)))
            k.e->eager = THX_EAGER_GRAD;
        else if (PyErr_ExceptionMatches(x->CaptureError) && c->refused)
            k.e->eager = thx_is_unseen_by_dynamo(x) ? THX_EAGER_ORIGINAL : THX_EAGER_REFUSED;
        else if (k.raised)
            k.e->eager = THX_EAGER_RAISED;
        if (k.e->eager == THX_EAGER_ORIGINAL && thx_guards_weak(k.e->guards)) thx_guards_forget(x, k.e->guards);
        if (k.e->eager) /* the exception stays set: the caller tells it once */
            return k.e;
    }
    if (rc < 0) {
        thx_entry_free(x, k.e);
        return NULL;
    }
    return k.e;
}

/* The log keeps why: the pending exception, which is dropped. */
static int tell_unfollowed(thx_callable_object *c) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *done = c->log && value ? PyObject_CallMethod(c->log, "unfollowed", "O", value) : Py_NewRef(Py_None);
    Py_XDECREF(done);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return done ? 0 : -1;
}

thx_entry *thx_compile(thx_callable_object *c, const thx_request *call) {
    bool followed = false;
    thx_entry *e = compile_once(c, call, !call->exact, &followed);
    if (!followed || (e && !e->eager)) return e;
    int told =
        tell_unfollowed(c); /* what the code does with a size cannot be followed, or so it seems: as it is, then */
    c->unfollowed++;
    if (e) thx_entry_free(c->x, e);
    return told < 0 ? NULL : compile_once(c, call, false, &followed);
}
