/* What a capture must not do: print, read the clock, draw from Python's or numpy's generators, open files, read the
 * environment. It would happen once, and the calls that follow would not do it again.
 *
 * Python's profiler tells of each call before it is made. Raising there keeps the effect from happening: the call of
 * the program then goes to its fallback, where it happens as in eager.
 */
#include "capture.h"
#include "guards.h"
#include "impure.h"
#include "origin.h"

#include "base/dylib.h"

#include <frameobject.h>
#include <string.h>

/* ---- what torch.compile would not look at either ---- */

static const char memo_text[] = "a function with functools.lru_cache", variable_text[] = "a context variable",
                  identity_text[] = "id", environment_text[] = "os.environ", type_text[] = "the type of a tensor",
                  step_text[] = "the number of an optimizer's step", generator_text[] = "a generator of random numbers",
                  system_text[] = "the system", hash_text[] = "the hash of a tensor";

/* The pending exception is a CaptureError: does it name something that its fallback takes for constant? */
bool thx_is_unseen_by_dynamo(thx *x) {
    static const char *const unseen[] = {memo_text,
                                         variable_text,
                                         identity_text,
                                         hash_text,
                                         environment_text,
                                         generator_text,
                                         step_text,
                                         system_text,
                                         THX_OBJECT_IN_C,
                                         THX_APPEARED,
                                         "torch.Tensor.__array__",
                                         "a weak reference",
                                         "a lazily conjugated or negated tensor",
                                         THX_TENSOR_ATTRIBUTE,
                                         "a result of type generator",
                                         THX_SHARED_ARRAY,
                                         THX_TWO_CONTAINERS,
                                         THX_TRANSFORMED_RANDOM,
                                         NULL};
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *construct = value ? PyObject_GetAttrString(value, "construct") : NULL;
    const char *text = construct && PyUnicode_Check(construct) ? PyUnicode_AsUTF8(construct) : NULL;
    bool found = false;
    for (const char *const *u = unseen; text && *u && !found; u++) found = strncmp(text, *u, strlen(*u)) == 0;
    PyErr_Clear();
    Py_XDECREF(construct);
    PyErr_Restore(type, value, trace);
    (void)x;
    return found;
}

int thx_purity_init(thx *x) {
    if (thx_impure_init(x) < 0) return -1;
    PyObject *random = PyImport_ImportModule("_random"), *os = PyImport_ImportModule("os");
    x->generators[0] = random ? (PyTypeObject *)PyObject_GetAttrString(random, "Random") : NULL;
    PyObject *environ = os ? PyObject_GetAttrString(os, "environ") : NULL;
    PyObject *get = environ ? PyObject_GetAttrString((PyObject *)Py_TYPE(environ), "__getitem__") : NULL;
    PyObject *hash = PyObject_GetAttrString((PyObject *)x->Tensor, "__hash__");
    if (hash && PyFunction_Check(hash)) x->tensor_hash = Py_NewRef(PyFunction_GET_CODE(hash));
    if (get && PyFunction_Check(get)) x->read_environment = Py_NewRef(PyFunction_GET_CODE(get));
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *condition = threading ? PyObject_GetAttrString(threading, "Condition") : NULL;
    PyObject *wait = condition ? PyObject_GetAttrString(condition, "wait") : NULL;
    if (wait && PyFunction_Check(wait)) x->waits = Py_NewRef(PyFunction_GET_CODE(wait));
    PyErr_Clear();
    Py_XDECREF(wait);
    Py_XDECREF(condition);
    Py_XDECREF(threading);
    static const char *const warns[] = {"warn", "warn_explicit"};
    PyObject *warnings = PyImport_ImportModule("_warnings");
    for (int i = 0; warnings && i < 2; i++) {
        PyObject *function = PyObject_GetAttrString(warnings, warns[i]);
        if (function && PyCFunction_Check(function)) x->warns[i] = ((PyCFunctionObject *)function)->m_ml;
        Py_XDECREF(function);
    }
    PyErr_Clear();
    Py_XDECREF(warnings);
    Py_XDECREF(hash);
    Py_XDECREF(get);
    Py_XDECREF(environ);
    Py_XDECREF(random);
    Py_XDECREF(os);
    return 0;
}

/* numpy's generators, once numpy is there. */
static void find_numpys(thx *x) {
    static const char *const names[] = {"RandomState", "Generator"};
    PyObject *numpy = PyDict_GetItemString(PyImport_GetModuleDict(), "numpy.random");
    for (int i = 0; numpy && i < 2 && !x->generators[i + 1]; i++) {
        x->generators[i + 1] = (PyTypeObject *)PyObject_GetAttrString(numpy, names[i]);
        PyErr_Clear();
    }
}

static bool is_generator(const thx *x, PyObject *o) {
    bool found = false;
    for (int i = 0; x->generators[i] && !found; i++) found = PyObject_TypeCheck(o, x->generators[i]);
    return found;
}

static PyObject *file_of(PyFrameObject *frame) { /* borrowed: as long as the frame lives */
    PyCodeObject *code = PyFrame_GetCode(frame);
    PyObject *file = code->co_filename;
    Py_DECREF(code); /* the frame holds it */
    return file;
}

static bool names(PyObject *file, const char *part) {
    const char *path = PyUnicode_AsUTF8(file);
    PyErr_Clear();
    return path && strstr(path, part);
}

static bool in_an_import(PyFrameObject *frame) {
    bool found = false;
    Py_INCREF(frame);
    while (frame && !found) {
        found = names(file_of(frame), "<frozen importlib");
        PyFrameObject *back = PyFrame_GetBack(frame);
        Py_SETREF(frame, back);
    }
    Py_XDECREF(frame);
    return found;
}

enum {
    THROUGH_LIBRARY = 1, /* what Python's own library does on behalf of the caller counts */
    OF_PACKAGES = 2,     /* what installed packages do counts */
};

/* Parts of Python's library that look at files, clocks and threads for reasons of their own. */
static bool looks_for_itself(PyObject *file) {
    static const char *const parts[] = {
        "/logging/", "/warnings.py", "/linecache.py", "/dataclasses.py", "/reprlib.py", "/inspect.py", NULL};
    bool found = false;
    for (const char *const *p = parts; *p && !found; p++) found = names(file, *p);
    return found;
}

/* Is it the program's doing? The innermost frame outside Python's own library says. Torch's calls are its own matter,
 * and so are those of imports, warnings and logging. */
static bool is_the_programs(thx *x, PyFrameObject *frame, int flags) {
    bool users = false;
    if (in_an_import(frame)) return false;
    Py_INCREF(frame);
    while (frame) {
        PyObject *file = file_of(frame);
        thx_origin o = thx_origin_of(x, file);
        if (o != THX_STANDARD && o != THX_FROZEN) {
            users = o == THX_USERS || o == THX_GENERATED || (o == THX_PACKAGES && flags & OF_PACKAGES);
            break;
        }
        if (!(flags & THROUGH_LIBRARY) || looks_for_itself(file)) break;
        PyFrameObject *back = PyFrame_GetBack(frame);
        Py_SETREF(frame, back);
    }
    Py_XDECREF(frame);
    return users;
}

static int refuse(thx_recorder *r, const char *what, const char *why) {
    return thx_capture_error(r, what, why, "do it outside the compiled function");
}

/* C code that takes a float's value without asking the object. */
static bool reads_numbers(PyObject *function) {
    PyObject *self = PyCFunction_GET_SELF(function);
    const char *name = self && PyModule_Check(self) ? PyModule_GetName(self) : "";
    PyErr_Clear();
    return name && (strcmp(name, "math") == 0 || strcmp(name, "cmath") == 0 || strcmp(name, "_struct") == 0);
}

/* torch.are_deterministic_algorithms_enabled() and the like end in these: what they say is asked again at each call. */
static bool tells_of_a_setting(const PyMethodDef *method, PyObject *function) {
    static const char *const beginnings[] = {"_get_", "get_num_", "is_anomaly_", NULL};
    bool named = false;
    for (const char *const *b = beginnings; *b; b++) named |= strncmp(method->ml_name, *b, strlen(*b)) == 0;
    if (!(method->ml_flags & METH_NOARGS) || !named) return false;
    PyObject *self = PyCFunction_GET_SELF(function);
    const char *name = self && PyModule_Check(self) ? PyModule_GetName(self) : "";
    PyErr_Clear();
    return name && strncmp(name, "torch._C", 8) == 0;
}

/* That of random.random(), which torch.compile knows. */
static bool pythons_own(PyObject *generator) {
    PyObject *module = PyDict_GetItemString(PyImport_GetModuleDict(), "random");
    PyObject *own = module ? PyObject_GetAttrString(module, "_inst") : NULL;
    PyErr_Clear();
    Py_XDECREF(own); /* the module holds it */
    return own == generator;
}

/* A method of a generator of torch's. Its own one is seeded and read by torch.manual_seed, fork_rng and the like, which
 * random.c follows; of others nothing is known but what operations draw from them. */
static int check_generator(thx_recorder *r, PyFrameObject *frame, PyObject *self, const char *name) {
    static const char *const seeds[] = {"manual_seed", "set_state", "graphsafe_set_state", "set_offset", NULL};
    bool says = strcmp(name, "seed") == 0 || strcmp(name, "initial_seed") == 0;
    char text[120];
    snprintf(text, sizeof text, "%s: torch.Generator.%.40s", generator_text, name);
    if (self == r->x->default_generator ? says : is_the_programs(r->x, frame, THROUGH_LIBRARY | OF_PACKAGES))
        return refuse(r, text, "it reads or sets a generator's state, and later calls would not do that again");
    for (const char *const *n = seeds; *n; n++) r->seeded |= strcmp(name, *n) == 0;
    return 0;
}

/* ---- kernels that Python calls past torch's dispatcher ---- */

/* Of a library that uses torch's and is not torch's own: an extension of the user's. */
static bool is_extension(thx *x, const PyMethodDef *method) {
    void *address;
    memcpy(&address, &method->ml_meth, sizeof address);
    const char *path = th_dylib_path_of(address), *name = path ? strrchr(path, '/') : NULL;
    th_dylib *library = NULL;
    if (!name || strncmp(name, "/libtorch", 9) == 0 || th_dylib_open(x->ctx, path, true, &library) != TH_OK)
        return false;
    bool uses_torch =
        th_dylib_symbol(library, "aoti_torch_new_tensor_handle") != NULL; /* looked for in what it needs */
    th_dylib_close(library);
    return uses_torch;
}

static bool passes_dispatcher(thx *x, const PyMethodDef *method) {
    return strcmp(method->ml_name, "_cuda_jiterator_compile_and_launch_kernel") == 0 || is_extension(x, method);
}

/* Its arguments are not seen here, and a capture's tensors have no memory to read. */
static int check_extension(thx_recorder *r, const PyMethodDef **known, const PyMethodDef *method) {
    if (!passes_dispatcher(r->x, method)) {
        *known = method;
        return 0;
    }
    char text[160];
    snprintf(text, sizeof text, "%.80s, a kernel outside torch's dispatcher", method->ml_name);
    return thx_capture_error(r, text, "it reads the memory of tensors, which a capture does not have",
                             "register it with torch.library.custom_op, or call it outside the compiled function");
}

static bool is_warning(const thx_recorder *r, PyObject *function) {
    const PyMethodDef *method = PyCFunction_Check(function) ? ((PyCFunctionObject *)function)->m_ml : NULL;
    return method && (method == r->x->warns[0] || method == r->x->warns[1]);
}

static int check_c_call(thx_recorder *r, PyFrameObject *frame, PyObject *function) {
    thx *x = r->x;
    if (!PyCFunction_Check(function)) return 0;
    const PyMethodDef *method = ((PyCFunctionObject *)function)->m_ml;
    if (r->tape && reads_numbers(function)) {
        PyObject *done = PyObject_CallMethod(r->tape, "fix_all", NULL);
        Py_XDECREF(done);
        return done ? 0 : -1;
    }
    if (is_warning(r, function)) r->warns = method;
    if (tells_of_a_setting(method, function) && r->reached) return thx_guards_ask(x, r->reached, function);
    const PyMethodDef **known = &x->pure[((uintptr_t)method >> 5) % THX_CODES];
    if (*known == method) return 0;
    const char *name = method->ml_name;
    PyObject *self = PyCFunction_GET_SELF(function);
    char text[120];
    if (self && !PyModule_Check(self)) {
        if (Py_TYPE(self) == x->Generator) return check_generator(r, frame, self, name);
        if (Py_TYPE(self) == &PyContextVar_Type) {
            if (!is_the_programs(x, frame, 0)) return 0;
            return refuse(r, variable_text, "it reads or sets one, and later calls would not look again");
        }
        if (is_generator(x, self)) {
            if (!is_the_programs(x, frame, THROUGH_LIBRARY | OF_PACKAGES)) return 0;
            snprintf(text, sizeof text, "%s%s%.40s.%.40s", pythons_own(self) ? "" : generator_text,
                     pythons_own(self) ? "" : ": ", Py_TYPE(self)->tp_name, name);
            return refuse(r, text,
                          "it draws random numbers that are not torch's, and later calls would have the same ones");
        }
    }
    thx_impurity found;
    if (thx_impure_why(x, function, &found) < 0) return -1;
    if (!found.why) return check_extension(r, known, method);
    int flags = found.prints ? THROUGH_LIBRARY | OF_PACKAGES : found.of_caller ? 0 : THROUGH_LIBRARY;
    if (!is_the_programs(x, frame, flags)) return 0;
    if (found.type)
        snprintf(text, sizeof text, THX_OBJECT_IN_C ", %.60s.%.40s", found.type, name);
    else
        snprintf(text, sizeof text, "%s%s%.40s", found.asks ? system_text : "", found.asks ? ": " : "", name);
    char reason[160];
    snprintf(reason, sizeof reason, "%s, and later calls would not do that again", found.why);
    return refuse(r, text, reason);
}

/* ---- which code ran ---- */

static PyObject **code_place(PyObject **table, uint32_t cap, PyObject *code) {
    uint32_t at = (uint32_t)(((uintptr_t)code >> 5) * 2654435761u) & (cap - 1);
    while (table[at] && table[at] != code) at = (at + 1) & (cap - 1);
    return &table[at];
}

/* 1: it is new */
static int note_code(thx_recorder *r, PyObject *code) {
    if (r->ncodes * 2 >= r->cap_codes) {
        uint32_t cap = r->cap_codes ? r->cap_codes * 2 : 256;
        PyObject **table = PyMem_Calloc(cap, sizeof *table);
        if (!table) return PyErr_NoMemory(), -1;
        for (uint32_t i = 0; i < r->cap_codes; i++)
            if (r->codes[i]) *code_place(table, cap, r->codes[i]) = r->codes[i];
        PyMem_Free(r->codes);
        r->codes = table;
        r->cap_codes = cap;
    }
    PyObject **place = code_place(r->codes, r->cap_codes, code);
    if (*place) return 0;
    *place = Py_NewRef(code);
    r->ncodes++;
    return 1;
}

PyObject *thx_codes_list(const thx_recorder *r) {
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list && i < r->cap_codes; i++)
        if (r->codes[i] && PyList_Append(list, r->codes[i]) < 0) Py_CLEAR(list);
    return list;
}

/* ---- events ---- */

/* The function of a functools.lru_cache runs: its result would be a fake's, and stay. Once eager has filled the cache
 * for these arguments, the program is captured with what is in it. */
static int refuse_filling(thx_recorder *r) {
    return thx_capture_error(r, memo_text, "the call fills its cache",
                             "nothing: calls whose results are in the cache are compiled");
}

/* ---- type(x) ---- */

static bool mentions_types(const thx *x, PyCodeObject *code) { /* names are interned */
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code->co_names); i++) {
        PyObject *name = PyTuple_GET_ITEM(code->co_names, i);
        if (name == x->n.type || name == x->n.class_) return true;
    }
    return false;
}

/* Of which variables new code of the program's own asks the type: thunder/_relevance.py. */
static int note_asking(thx_recorder *r, PyFrameObject *frame, PyCodeObject *code) {
    if (!mentions_types(r->x, code) || !is_the_programs(r->x, frame, 0)) return 0;
    PyObject *module = PyImport_ImportModule("thunder._relevance");
    PyObject *names = module ? PyObject_CallMethod(module, "asks_types", "O", code) : NULL;
    Py_XDECREF(module);
    if (names && !r->asking) r->asking = PyDict_New();
    int rc = names && r->asking ? PyDict_SetItem(r->asking, (PyObject *)code, names) : -1;
    Py_XDECREF(names);
    return rc;
}

/* Is it a tensor, or something that is not among the variables and may be one? */
static bool may_be_fake(const thx *x, PyObject *locals, PyObject *name, bool returns) {
    PyObject *value = PyObject_GetItem(locals, name); /* new, or NULL */
    bool fake = value ? thx_is_fake(x, value) : !returns;
    PyErr_Clear();
    Py_XDECREF(value);
    return fake;
}

/* While a program is captured its tensors are instances of a subclass of torch.Tensor; isinstance sees no difference,
 * but type() does. */
static int check_types(thx_recorder *r, PyFrameObject *frame, PyCodeObject *code, bool returns) {
    PyObject *pair = r->asking ? PyDict_GetItemWithError(r->asking, (PyObject *)code) : NULL, *locals = NULL;
    PyObject *names = pair ? PyTuple_GET_ITEM(pair, returns) : NULL;
    bool found = false;
    if (names && PyTuple_GET_SIZE(names)) locals = PyFrame_GetLocals(frame);
    for (Py_ssize_t i = 0; locals && i < PyTuple_GET_SIZE(names) && !found; i++)
        found = may_be_fake(r->x, locals, PyTuple_GET_ITEM(names, i), returns);
    PyErr_Clear();
    Py_XDECREF(locals);
    return found ? thx_capture_error(r, type_text, "a tensor has another one while the program is captured",
                                     "use isinstance(x, torch.Tensor)")
                 : 0;
}

/* A method of loggers that many others begin with: its answer decides what is logged. */
static int watch_level(thx_recorder *r, PyFrameObject *frame) {
    PyObject *messages = PyImport_ImportModule("thunder._messages"), *locals = PyFrame_GetLocals(frame);
    PyObject *question = messages && locals ? PyObject_CallMethod(messages, "asked", "OO", frame, locals) : NULL;
    if (question && question != Py_None) thx_guards_ask(r->x, r->reached, question);
    Py_XDECREF(question);
    Py_XDECREF(locals);
    Py_XDECREF(messages);
    return PyErr_Occurred() ? -1 : 0;
}

/* A set or a dictionary looks for an argument: it is another object while the program is captured. */
static int check_hash(thx_recorder *r, PyFrameObject *frame) {
    PyFrameObject *caller = PyFrame_GetBack(frame);
    PyObject *locals = PyFrame_GetLocals(frame), *self = locals ? PyMapping_GetItemString(locals, "self") : NULL;
    const thx_root *root = self && caller ? thx_recorder_root(r, self) : NULL;
    bool argument = root && root->leaf >= 0 && is_the_programs(r->x, caller, 0);
    PyErr_Clear();
    Py_XDECREF(self);
    Py_XDECREF(locals);
    Py_XDECREF(caller);
    if (!argument) return 0;
    return thx_capture_error(r, hash_text, "an argument is another object while the program is captured",
                             "find it by its place, or by a name");
}

/* The number of a step lies on the CPU: may an executor fuse what is computed with it and the rest? */
static bool may_fuse_steps(const thx_recorder *r) {
    bool may = r->claims != NULL;
    for (uint32_t i = 0; i < r->nroots && may; i++) {
        const th_type *t = th_type_get(r->x->ctx, r->t->values[r->roots[i].value].type);
        may = strcmp(th_device_type(r->x->ctx, t->device), "cpu") == 0;
    }
    return may;
}

static int check_call(thx_recorder *r, PyFrameObject *frame) {
    PyCodeObject *code = PyFrame_GetCode(frame);
    int fresh = note_code(r, (PyObject *)code);
    if (fresh < 0 || (fresh && note_asking(r, frame, code) < 0) || check_types(r, frame, code, false) < 0) {
        Py_DECREF(code);
        return -1;
    }
    /* torch.save and torch.load: from C they write and read what the profiler does not see. Modules of torch that an
     * operation imports only register their classes there. */
    bool file = fresh && names(code->co_filename, "/torch/serialization.py") && !in_an_import(frame);
    bool environment = (PyObject *)code == r->x->read_environment, hash = (PyObject *)code == r->x->tensor_hash;
    bool memo = r->reached && thx_guards_memoizes(r->reached, (PyObject *)code);
    bool bound = r->x->function_apply && PyFunction_Check(r->x->function_apply) &&
                 (PyObject *)code == PyFunction_GET_CODE(r->x->function_apply);
    bool waits = (PyObject *)code == r->x->waits;
    bool step = (PyObject *)code == r->x->step_code && !may_fuse_steps(r);
    bool level = r->reached && (PyObject *)code == r->x->asks_level;
    Py_DECREF(code); /* the frame holds it */
    if (level && watch_level(r, frame) < 0) return -1;
    if (bound && !r->x->applying && !r->depth && !r->deriving && thx_grad_mode(r->x) == 1)
        return thx_capture_error(r, "an autograd function whose `apply` was looked up outside the function",
                                 "its backward would not be seen", "write Function.apply(...) where it is called");
    if (memo) return refuse_filling(r);
    if (step)
        return thx_capture_error(r, step_text,
                                 "it is in a tensor on the CPU, and small operations on tensors take longer than the "
                                 "arithmetic of eager's, unless an executor fuses them with the rest",
                                 "compile with an executor that fuses on the CPU (torchcompile), use capturable=True "
                                 "on another device, or leave the step to eager");
    if (waits && is_the_programs(r->x, frame, THROUGH_LIBRARY | OF_PACKAGES))
        return refuse(r, "threading.Condition.wait", "it waits for other threads, and later calls would not");
    if (hash) return check_hash(r, frame);
    if (file) return refuse(r, system_text, "it saves or loads tensors, and later calls would not do that again");
    if (!environment || !is_the_programs(r->x, frame, THROUGH_LIBRARY)) return 0;
    return refuse(r, environment_text, "it reads the environment, and later calls would not look again");
}

static int check_return(thx_recorder *r, PyFrameObject *frame) {
    if (!r->asking || PyErr_Occurred()) return 0;
    PyCodeObject *code = PyFrame_GetCode(frame);
    int rc = check_types(r, frame, code, true);
    Py_DECREF(code);
    return rc;
}

static int on_event(PyObject *recorder, PyFrameObject *frame, int what, PyObject *arg) {
    thx_recorder *r = (thx_recorder *)recorder;
    if (r->x->active != recorder) return 0;
    if (what == PyTrace_C_CALL) return check_c_call(r, frame, arg);
    if ((what == PyTrace_C_RETURN || what == PyTrace_C_EXCEPTION) && r->warns && is_warning(r, arg)) r->warns = NULL;
    return what == PyTrace_CALL ? check_call(r, frame) : what == PyTrace_RETURN ? check_return(r, frame) : 0;
}

/* ---- numpy's global generator: its methods are no C functions that the profiler sees ---- */

static PyObject *numpys(const char *method, PyObject *argument) { /* NULL without exception where there is no numpy */
    PyObject *module = PyDict_GetItemString(PyImport_GetModuleDict(), "numpy.random"), *result = NULL;
    if (module) result = PyObject_CallMethod(module, method, argument ? "(O)" : NULL, argument);
    PyErr_Clear();
    return result;
}

/* (name, array, position, ...): the same numbers next? */
static bool same_state(PyObject *a, PyObject *b) {
    bool same = PyTuple_Check(a) && PyTuple_Check(b) && PyTuple_GET_SIZE(a) == PyTuple_GET_SIZE(b);
    for (Py_ssize_t i = 0; same && i < PyTuple_GET_SIZE(a); i++) {
        PyObject *x = PyTuple_GET_ITEM(a, i), *y = PyTuple_GET_ITEM(b, i);
        PyObject *p = i == 1 ? PyObject_CallMethod(x, "tobytes", NULL) : Py_NewRef(x);
        PyObject *q = i == 1 ? PyObject_CallMethod(y, "tobytes", NULL) : Py_NewRef(y);
        same = p && q && PyObject_RichCompareBool(p, q, Py_EQ) == 1;
        Py_XDECREF(p);
        Py_XDECREF(q);
    }
    PyErr_Clear();
    return same;
}

/* ---- messages ---- */

PyObject *thx_listen(thx_recorder *r) {
    PyObject *module = PyImport_ImportModule("thunder._messages");
    PyObject *listener = module ? PyObject_CallMethod(module, "Listener", "O", r) : NULL;
    if (listener && !r->x->asks_level) r->x->asks_level = PyObject_GetAttrString(module, "ASKS_LEVEL");
    PyErr_Clear();
    Py_XDECREF(module);
    return listener;
}

/* Keeps no exception. */
void thx_stop_listening(thx_recorder *r, PyObject *listener) {
    PyObject *done = listener ? PyObject_CallMethod(listener, "stop", NULL) : NULL;
    PyObject *heard = done ? PyObject_GetAttrString(listener, "heard") : NULL;
    if (heard) Py_XSETREF(r->messages, Py_NewRef(heard));
    PyErr_Clear();
    Py_XDECREF(heard);
    Py_XDECREF(done);
    Py_XDECREF(listener);
}

PyObject *thx_refuse_message(PyObject *recorder, PyObject *const *args, Py_ssize_t nargs) {
    const char *what = nargs == 2 ? PyUnicode_AsUTF8(args[0]) : NULL, *why = what ? PyUnicode_AsUTF8(args[1]) : NULL;
    if (why) (void)refuse((thx_recorder *)recorder, what, why);
    return NULL;
}

void thx_purity_begin(thx_recorder *r, thx_purity *p) {
    PyThreadState *state = PyThreadState_Get();
    find_numpys(r->x);
    p->numpy = numpys("get_state", NULL);
    p->listener = thx_listen(r);
    p->before = state->c_profilefunc;
    p->argument = Py_XNewRef(state->c_profileobj);
    PyEval_SetProfile(on_event, (PyObject *)r);
}

void thx_purity_end(thx_recorder *r, thx_purity *p) {
    PyEval_SetProfile(p->before, p->argument);
    Py_CLEAR(p->argument);
    thx_stop_listening(r, p->listener);
    PyObject *now = p->numpy ? numpys("get_state", NULL) : NULL;
    if (now && !same_state(p->numpy, now)) {
        PyObject *done = numpys("set_state", p->numpy);
        Py_XDECREF(done);
        (void)refuse(r, "numpy.random",
                     "it draws random numbers that are not torch's, and later calls would have the same ones");
        PyErr_Clear(); /* the recorder keeps it, and raises it at the end */
    }
    Py_XDECREF(now);
    Py_CLEAR(p->numpy);
}
