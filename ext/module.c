/* thunder._C: making the module state and tearing it down. */
#include "callable.h"
#include "capture.h"
#include "cuda.h"
#include "cudnn.h"
#include "derive.h"
#include "native.h"
#include "origin.h"
#include "region.h"
#include "shadow.h"
#include "trace_object.h"

#include "base/env.h"

#include <string.h>

/* ---- what we need of torch ---- */

static PyObject *get_path(PyObject *root, const char *path) { /* "a.b.c" from root: new reference */
    PyObject *o = Py_NewRef(root);
    while (o && *path) {
        size_t n = strcspn(path, ".");
        PyObject *name = PyUnicode_FromStringAndSize(path, (Py_ssize_t)n);
        PyObject *next = name ? PyObject_GetAttr(o, name) : NULL;
        Py_XDECREF(name);
        Py_SETREF(o, next);
        path += n + (path[n] == '.');
    }
    return o;
}

static int get_type(PyObject *root, const char *path, PyTypeObject **out) {
    PyObject *o = get_path(root, path);
    if (o && !PyType_Check(o)) {
        PyErr_Format(PyExc_TypeError, "torch.%s is not a type", path);
        Py_CLEAR(o);
    }
    *out = (PyTypeObject *)o;
    return o ? 0 : -1;
}

static int get_getter(thx *x, const char *name, getter *get, void **closure) {
    PyObject *descriptor = PyObject_GetAttrString((PyObject *)x->TensorBase, name);
    if (!descriptor) return -1;
    int rc = -1;
    if (Py_TYPE(descriptor) == &PyGetSetDescr_Type) {
        PyGetSetDef *def = ((PyGetSetDescrObject *)descriptor)->d_getset;
        *get = def->get;
        *closure = def->closure;
        rc = 0;
    } else {
        PyErr_Format(PyExc_TypeError, "torch.Tensor.%s is not a C property", name);
    }
    Py_DECREF(descriptor);
    return rc;
}

static int load_types(thx *x) {
    if (get_type(x->torch, "Tensor", &x->Tensor) < 0 || get_type(x->torch_c, "TensorBase", &x->TensorBase) < 0 ||
        get_type(x->torch, "nn.Parameter", &x->Parameter) < 0 || get_type(x->torch, "nn.Module", &x->NnModule) < 0 ||
        get_type(x->torch, "Size", &x->Size) < 0 || get_type(x->torch, "dtype", &x->Dtype) < 0 ||
        get_type(x->torch, "device", &x->Device) < 0 || get_type(x->torch, "layout", &x->Layout) < 0 ||
        get_type(x->torch, "memory_format", &x->MemoryFormat) < 0 ||
        get_getter(x, "_version", &x->version_get, &x->version_closure) < 0 ||
        get_getter(x, "requires_grad", &x->requires_grad_get, &x->requires_grad_closure) < 0 ||
        get_getter(x, "grad", &x->grad_get, &x->grad_closure) < 0)
        return -1;
    PyObject *wrapper = get_path((PyObject *)x->Tensor, "shape.__get__");
    if (!wrapper) return -1;
    x->MethodWrapper = (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(wrapper));
    Py_DECREF(wrapper);
    PyObject *fakes = PyImport_ImportModule("torch._subclasses.fake_tensor");
    int rc = fakes ? get_type(fakes, "FakeTensor", &x->FakeTensor) : -1;
    Py_XDECREF(fakes);
    PyObject *numpy = PyImport_ImportModule("numpy"); /* optional: torch runs without it */
    if (rc == 0 && (!numpy || get_type(numpy, "generic", &x->NumpyGeneric) < 0)) {
        PyErr_Clear();
        x->NumpyGeneric = (PyTypeObject *)Py_NewRef((PyObject *)&PyEllipsis_Type);
    }
    Py_XDECREF(numpy);
    return rc;
}

static int load_functions(thx *x) {
    const struct {
        PyObject **place, *root;
        const char *path;
    } wanted[] = {
        {&x->f_stack_len, x->torch_c, "_len_torch_function_stack"},
        {&x->d_stack_len, x->torch_c, "_len_torch_dispatch_stack"},
        {&x->push_function, x->torch_c, "_push_on_torch_function_stack"},
        {&x->pop_function, x->torch_c, "_pop_torch_function_stack"},
        {&x->push_dispatch, x->torch_c, "_push_on_torch_dispatch_stack"},
        {&x->pop_dispatch, x->torch_c, "_pop_torch_dispatch_stack"},
        {&x->any_autocast, x->torch_c, "_is_any_autocast_enabled"},
        {&x->tracing, x->torch_c, "_is_tracing"},
        {&x->autocast_enabled, x->torch, "is_autocast_enabled"},
        {&x->autocast_dtype, x->torch, "get_autocast_dtype"},
        {&x->set_autocast, x->torch, "set_autocast_enabled"},
        {&x->grad_enabled, x->torch, "is_grad_enabled"},
        {&x->is_neg, (PyObject *)x->TensorBase, "is_neg"},
        {&x->is_inference, (PyObject *)x->TensorBase, "is_inference"},
        {&x->set_eval_frame, x->torch_c, "_dynamo.eval_frame.set_eval_frame"},
        {&x->set_grad, x->torch_c, "_set_grad_enabled"},
        {&x->modes_off, x->torch_c, "DisableTorchFunction"},
        {&x->default_dtype, x->torch, "get_default_dtype"},
        {&x->default_device, x->torch, "get_default_device"},
        {&x->inference, x->torch, "is_inference_mode_enabled"},
        {&x->inference_mode, x->torch, "inference_mode"},
        {&x->is_functorch, x->torch_c, "_functorch.is_functorch_wrapped_tensor"},
        {&x->is_alias_of, x->torch_c, "_is_alias_of"},
        {&x->get_rng_state, x->torch, "get_rng_state"},
        {&x->set_rng_state, x->torch, "set_rng_state"},
        {&x->equal, x->torch, "equal"},
        {&x->rand, x->torch, "rand"},
        {&x->no_function, x->torch_c, "_disabled_torch_function_impl"},
        {&x->no_dispatch, (PyObject *)x->Tensor, "__torch_dispatch__"},
        {&x->fake_dispatch, (PyObject *)x->FakeTensor, "__torch_dispatch__"},
        {&x->forward_ad, x->torch, "autograd.forward_ad.__dict__"},
        {&x->functorch_level, x->torch_c, "_functorch.maybe_current_level"},
        {&x->increment_version, x->torch_c, "_increment_version"},
        {&x->forbid_data_ptr, x->torch_c, "_set_throw_on_mutable_data_ptr"},
        {&x->get_script_optimize, x->torch_c, "_get_graph_executor_optimize"},
        {&x->set_script_optimize, x->torch_c, "_set_graph_executor_optimize"},
        {&x->strided, x->torch, "strided"},
        {&x->autograd_grad, x->torch, "autograd.grad"},
        {&x->is_view, (PyObject *)x->Tensor, "_is_view"},
        {&x->is_multithreading, x->torch_c, "_is_multithreading_enabled"},
        {&x->set_multithreading, x->torch_c, "_set_multithreading_enabled"},
        {&x->random_tag, x->torch, "Tag.nondeterministic_seeded"},
        {&x->to_copy, x->torch, "ops.aten._to_copy.default"},
        {&x->tensor_to, (PyObject *)x->Tensor, "to"},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (!(*wanted[i].place = get_path(wanted[i].root, wanted[i].path))) return -1;
    x->use_count =
        PyObject_GetAttrString((PyObject *)x->TensorBase, "_use_count"); /* without it no fake serves twice */
    PyErr_Clear();
    PyObject *weakref = PyImport_ImportModule("_weakref");
    x->count_weakrefs = weakref ? PyObject_GetAttrString(weakref, "getweakrefcount") : NULL;
    Py_XDECREF(weakref);
    if (!x->count_weakrefs) return -1;
    for (int d = 1; d < TH_DTYPE_COUNT; d++) {
        x->dtype_objects[d] = PyObject_GetAttrString(x->torch, th_dtype_get((th_dtype)d)->torch_name);
        if (!x->dtype_objects[d]) PyErr_Clear(); /* a torch without that dtype */
    }
    return 0;
}

static int load_names(thx *x) {
    const struct {
        PyObject **place;
        const char *text;
    } names[] = {
        {&x->n.torch_function, "__torch_function__"},
        {&x->n.torch_dispatch, "__torch_dispatch__"},
        {&x->n.dict, "__dict__"},
        {&x->n.class_, "__class__"},
        {&x->n.device, "device"},
        {&x->n.enter, "__enter__"},
        {&x->n.exit, "__exit__"},
        {&x->n.self, "__self__"},
        {&x->n.name, "__name__"},
        {&x->n.module, "__module__"},
        {&x->n.qualname, "__qualname__"},
        {&x->n.fields, "_fields"},
        {&x->n.fake_device, "fake_device"},
        {&x->n.type, "type"},
        {&x->n.index, "index"},
        {&x->n.dtype, "dtype"},
        {&x->n.tags, "tags"},
        {&x->n.requires_grad, "requires_grad"},
        {&x->n.to_save, "to_save"},
        {&x->n.materialize_grads, "materialize_grads"},
        {&x->n.pending, "_thunder_pending"},
        {&x->n.saved_tensors, "saved_tensors"},
        {&x->n.current_level, "_current_level"},
        {&x->n.parameters, "_parameters"},
        {&x->n.buffers, "_buffers"},
        {&x->n.modules, "_modules"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!(*names[i].place = PyUnicode_InternFromString(names[i].text))) return -1;
    return 0;
}

/* The names under which a bare nn.Module keeps dictionaries. */
static int load_module_dicts(thx *x) {
    PyObject *module = PyObject_CallNoArgs((PyObject *)x->NnModule), *key, *value;
    PyObject *attributes = module ? PyObject_GetAttr(module, x->n.dict) : NULL, *names = PyList_New(0);
    int rc = attributes && names ? 0 : -1;
    for (Py_ssize_t at = 0; rc == 0 && PyDict_Next(attributes, &at, &key, &value);)
        if (PyDict_Check(value)) rc = PyList_Append(names, key);
    if (rc == 0 && !(x->module_dicts = PyFrozenSet_New(names))) rc = -1;
    Py_XDECREF(names);
    Py_XDECREF(attributes);
    Py_XDECREF(module);
    return rc;
}

/* How contextlib decorates a function with a manager that a generator makes. */
static void load_contextlib(thx *x) {
    PyObject *contextlib = PyImport_ImportModule("contextlib");
    PyObject *make =
        contextlib ? PyObject_CallMethod(contextlib, "contextmanager", "O", (PyObject *)&PyTuple_Type) : NULL;
    PyObject *manager = make ? PyObject_CallNoArgs(make) : NULL;
    PyObject *decorated = manager ? PyObject_CallOneArg(manager, make) : NULL;
    if (decorated && PyFunction_Check(decorated)) {
        x->remakes = Py_NewRef(PyFunction_GET_CODE(decorated));
        x->Remade = (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(manager));
    }
    PyErr_Clear(); /* a contextlib of another kind: such functions are refused */
    Py_XDECREF(decorated);
    Py_XDECREF(manager);
    Py_XDECREF(make);
    Py_XDECREF(contextlib);
}

static int load_errors(thx *x) {
    PyObject *errors = PyImport_ImportModule("thunder._errors");
    x->CaptureError = errors ? PyObject_GetAttrString(errors, "CaptureError") : NULL;
    Py_XDECREF(errors);
    x->GradNeeded = PyErr_NewException("thunder._C.GradNeeded", NULL, NULL);
    x->StaleProgram = PyErr_NewException("thunder._C.StaleProgram", NULL, NULL);
    x->ValueChanged = PyErr_NewException("thunder._C.ValueChanged", NULL, NULL);
    x->SizesChanged = PyErr_NewException("thunder._C.SizesChanged", NULL, NULL);
    return x->CaptureError && x->GradNeeded && x->StaleProgram && x->ValueChanged && x->SizesChanged ? 0 : -1;
}

/* ---- functions ---- */

static PyObject *torch_abi(PyObject *module, PyObject *unused) {
    (void)unused;
    thx *x = PyModule_GetState(module);
    return Py_BuildValue(
        "{s:O,s:O,s:O,s:O,s:O,s:O,s:O,s:K,s:O}", "handles", x->abi.on ? Py_True : Py_False, "dispatcher",
        x->abi.dispatcher ? Py_True : Py_False, "shims", x->abi.shims ? Py_True : Py_False, "wrap",
        x->abi.wrap ? Py_True : Py_False, "requires_grad", x->abi.autograd_meta >= 0 ? Py_True : Py_False, "layout",
        x->abi.on && x->abi.layout >= 0 ? Py_True : Py_False, "state", x->abi.state ? Py_True : Py_False, "version",
        (unsigned long long)x->abi.version, "off", x->abi.report);
}

static PyObject *passes(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && th_pass_name(i); i++) {
        PyObject *name = PyUnicode_FromString(th_pass_name(i));
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

/* meta_rule(function, args, kwargs): what our own rule answers, for the test that compares it with torch. */
static PyObject *meta_rule(PyObject *module, PyObject *a) {
    thx *x = PyModule_GetState(module);
    PyObject *function, *args, *kwargs;
    if (!PyArg_ParseTuple(a, "OO!O!", &function, &PyTuple_Type, &args, &PyDict_Type, &kwargs)) return NULL;
    const thx_func *f = thx_func_find(x, function);
    if (!f) return NULL;
    if (!f->def || !f->def->meta) Py_RETURN_NOTIMPLEMENTED;
    const th_opdef *def = f->def;
    thx_recorder *r = thx_recorder_new(x, NULL);
    if (!r) return NULL;
    th_node an = thx_to_node(x, r->t, args, thx_recorder_value, r);
    th_node kn = an && PyDict_GET_SIZE(kwargs) ? thx_to_node(x, r->t, kwargs, thx_recorder_value, r) : 0;
    PyObject *result = NULL;
    if (!an || (PyDict_GET_SIZE(kwargs) && !kn)) goto done;
    th_call call = {.default_dtype = r->default_dtype, .default_device = r->default_device};
    bool ok = th_call_bind(&call, def, r->t, an, kn) == TH_OK;
    call.default_dtype = r->default_dtype;
    call.default_device = r->default_device;
    call.facts = x->facts;
    if (!ok || def->meta(&call) != TH_OK) {
        result = Py_NewRef(Py_None); /* declined */
        goto done;
    }
    result = PyList_New(0);
    for (uint32_t i = 0; result && i < call.nouts; i++) {
        char text[1024];
        th_type_print(x->ctx, call.outs[i].type, text, sizeof text);
        const th_type *t = th_type_get(x->ctx, call.outs[i].type);
        PyObject *shape = PyTuple_New(t->ndim), *stride = PyTuple_New(t->ndim),
                 *device = thx_device_object(x, t->device);
        for (uint32_t j = 0; j < t->ndim; j++) {
            PyTuple_SET_ITEM(shape, j, PyLong_FromLongLong(t->shape[j]));
            PyTuple_SET_ITEM(stride, j, PyLong_FromLongLong(t->stride[j]));
        }
        PyObject *item =
            Py_BuildValue("{s:N,s:N,s:O,s:N,s:s,s:O,s:L,s:O,s:O}", "shape", shape, "stride", stride, "dtype",
                          x->dtype_objects[t->dtype], "device", device, "text", text, "same",
                          call.outs[i].same ? Py_True : Py_False, "offset", (long long)call.outs[i].offset, "alias",
                          call.outs[i].alias_of ? Py_True : Py_False, "list", call.outs_list ? Py_True : Py_False);
        if (!item || PyList_Append(result, item) < 0) Py_CLEAR(result);
        Py_XDECREF(item);
    }
done:
    Py_DECREF(r);
    return result;
}

static PyObject *catalog(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < th_catalog_size(); i++) {
        const th_opdef *d = th_catalog_get(i);
        PyObject *item =
            Py_BuildValue("{s:s,s:s,s:s,s:i,s:i,s:O}", "name", d->name, "params", d->params, "names", d->names,
                          "effects", (int)d->effects, "fusion", (int)d->fusion, "grad", d->grad ? Py_True : Py_False);
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/* derived_only(on): leave the catalogue's derivative rules out of what is compiled from now on. Returns what it was. */
static PyObject *derived_only(PyObject *module, PyObject *on) {
    thx *x = PyModule_GetState(module);
    int value = PyObject_IsTrue(on);
    if (value < 0) return NULL;
    bool was = x->derived_only;
    x->derived_only = value;
    return PyBool_FromLong(was);
}

static PyObject *function_kind(PyObject *module, PyObject *function) {
    static const char *const names[] = {"", "record", "query", "data", "grad", "skip", "refuse", "check"};
    const thx_func *f = thx_func_find(PyModule_GetState(module), function);
    return f ? PyUnicode_FromString(names[f->kind]) : NULL;
}

static PyObject *is_capturing(PyObject *module, PyObject *unused) {
    (void)unused;
    thx *x = PyModule_GetState(module);
    return PyBool_FromLong(x->active != NULL);
}

static PyObject *capturing_for(PyObject *module, PyObject *unused) {
    (void)unused;
    thx *x = PyModule_GetState(module);
    if (!x->active || x->active_thread != PyThread_get_thread_ident()) Py_RETURN_NONE;
    PyObject *claims = ((thx_recorder *)x->active)->claims;
    return Py_NewRef(claims ? claims : Py_None);
}

static PyMethodDef functions[] = {
    {"torch_abi", torch_abi, METH_NOARGS,
     "Which features of torch's C ABI are in use, and why others are off: a dict."},
    {"passes", passes, METH_NOARGS, "Names of the passes."},
    {"catalog", catalog, METH_NOARGS, "The catalogued operators: a list of dicts."},
    {"derived_only", derived_only, METH_O,
     "derived_only(on) -> bool: leave the catalogue's derivative rules out from now on; returns what it was."},
    {"meta_rule", meta_rule, METH_VARARGS,
     "meta_rule(function, args, kwargs) -> list of results, None when declined, or "
     "NotImplemented when the function is not catalogued."},
    {"load_native", thx_native_load, METH_O,
     "load_native(path) -> (name, version, operators): open a shared object that is an executor."},
    {"operator_key", thx_operator_key, METH_O,
     "operator_key(dotted) -> str: under which executors find an operator: its name in the catalogue, or itself."},
    {"function_kind", function_kind, METH_O,
     "function_kind(function) -> str: what a capture does with a torch function: \"record\" it, \"data\": it asks for "
     "values, \"refuse\", ..."},
    {"opaque_call", (PyCFunction)(void (*)(void))thx_opaque_call, METH_VARARGS | METH_KEYWORDS,
     "opaque_call(function, args, like): see thunder.transforms.opaque_call."},
    {"expect", (PyCFunction)(void (*)(void))thx_expect, METH_FASTCALL,
     "expect(number, function, args, kwargs, value): raise ValueChanged(number, found) unless function(*args, "
     "**kwargs) "
     "gives the value that the program was captured for, bit by bit."},
    {"capturing_for", capturing_for, METH_NOARGS,
     "The claims of the callable that this thread captures a function for, or None."},
    {"is_capturing", is_capturing, METH_NOARGS, "True while a function is being captured."},
    {NULL, NULL, 0, NULL},
};

/* ---- facts ---- */

/* How does CPU flash attention lay out its result? Tried on a query whose order of dimensions is its own. */
static uint32_t flash_layout(thx *x) {
    uint32_t fact = 0;
    PyObject *attention = PyObject_GetAttrString(x->functional, "scaled_dot_product_attention");
    PyObject *q = PyObject_CallMethod(x->torch, "zeros", "((iiii))", 1, 2, 3, 4);
    PyObject *detached = q ? PyObject_CallFunctionObjArgs(attention, q, q, q, NULL) : NULL;
    thx_meta meta;
    if (detached && thx_read_meta(x, detached, false, &meta) == 0 && meta.ndim == 4)
        fact = meta.stride[1] == 12 && meta.stride[2] == 4  ? TH_FACT_FLASH_LIKE_QUERY
               : meta.stride[1] == 4 && meta.stride[2] == 8 ? TH_FACT_FLASH_BLHD
                                                            : 0;
    PyErr_Clear();
    Py_XDECREF(detached);
    Py_XDECREF(q);
    Py_XDECREF(attention);
    return fact;
}

/* Whose gelu is it, oneDNN's or torch's own? */
static uint32_t gelu_kernel(thx *x) {
    uint32_t fact = 0;
    PyObject *gelu = PyObject_GetAttrString(x->functional, "gelu");
    PyObject *far = PyObject_CallMethod(x->torch, "full", "(i)d", 4, Py_HUGE_VAL);
    PyObject *curved = gelu && far ? PyObject_CallOneArg(gelu, far) : NULL;
    PyObject *sum = curved ? PyObject_CallMethod(curved, "sum", NULL) : NULL;
    PyObject *number = sum ? PyObject_CallMethod(sum, "item", NULL) : NULL;
    if (number && PyFloat_Check(number) && Py_IS_NAN(PyFloat_AS_DOUBLE(number))) fact = TH_FACT_GELU_DOUBLES;
    PyErr_Clear();
    Py_XDECREF(number);
    Py_XDECREF(sum);
    Py_XDECREF(curved);
    Py_XDECREF(far);
    Py_XDECREF(gelu);
    return fact;
}

/* ---- life ---- */

static int module_exec(PyObject *module) {
    thx *x = PyModule_GetState(module);
    memset(x, 0, sizeof *x);
    x->module = module; /* borrowed: the state lives in it */
    x->dict_watcher = -2;
    x->watch_counts = PyDict_New();
    x->empty_set = PyFrozenSet_New(NULL);
    x->callables = PyDict_New();
    x->casts = PyDict_New();
    x->ctx = th_ctx_new(NULL, NULL);
    x->verify = th_env_flag("THUNDER_VERIFY", false);
    if (!x->ctx || !x->callables || !x->casts || !x->watch_counts || !x->empty_set) return PyErr_NoMemory(), -1;
    if (thx_check(x, th_catalog_new(x->ctx, &x->catalog)) < 0) return -1;
    x->torch = PyImport_ImportModule("torch");
    x->torch_c = x->torch ? PyObject_GetAttrString(x->torch, "_C") : NULL;
    x->functional = x->torch ? get_path(x->torch, "nn.functional") : NULL;
    if (!x->torch_c || !x->functional || load_names(x) < 0 || load_types(x) < 0 || load_functions(x) < 0 ||
        load_errors(x) < 0 || !(x->Generator = (PyTypeObject *)get_path(x->torch_c, "Generator")) ||
        !(x->default_generator = get_path(x->torch, "default_generator")) || thx_origin_init(x) < 0 ||
        load_module_dicts(x) < 0 || thx_abi_init(&x->abi, x->ctx, x->torch) < 0 || thx_fake_init(x, module) < 0 ||
        thx_recorder_init(x, module) < 0 || thx_purity_init(x) < 0 || thx_trace_init(x, module) < 0 ||
        thx_autograd_init(x, module) < 0 || thx_region_init(x, module) < 0 || thx_native_init(x, module) < 0 ||
        thx_handles_init(x, module) < 0 || thx_custom_init(x, module) < 0 || thx_operator_init(x, module) < 0 ||
        thx_gradstate_init(x, module) < 0 || thx_callable_init(x, module) < 0 || thx_cuda_init(x, module) < 0 ||
        thx_cudnn_init(x, module) < 0)
        return -1;
    x->facts = flash_layout(x) | gelu_kernel(x);
    load_contextlib(x);
    return PyModule_AddObjectRef(module, "GradNeeded", x->GradNeeded) < 0
               ? -1
               : PyModule_AddObjectRef(module, "StaleProgram", x->StaleProgram);
}

static void module_free(void *module) {
    thx *x = PyModule_GetState(module);
    if (!x || !x->ctx) return;
    thx_guards_fini(x);
    thx_funcs_free(x);
    thx_rules_free(x);
    thx_cuda_fini(x);
    thx_cudnn_fini(x);
    thx_abi_fini(&x->abi);
    th_catalog_free(x->catalog);
    th_ctx_free(x->ctx);
    x->ctx = NULL;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};
static struct PyModuleDef module_def = {PyModuleDef_HEAD_INIT,
                                        "thunder._C",
                                        "The C side of thunder.",
                                        sizeof(thx),
                                        functions,
                                        module_slots,
                                        NULL,
                                        NULL,
                                        module_free};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_def); }
