/* CudaKernel: a GPU kernel as a callable of tensors and numbers. See cuda.h.
 *
 * A variant is made once and lives as long as the kernel, for the list of them may move while Python code runs. A call
 * copies nothing and allocates nothing, unless the kernel needs scratch memory.
 */
#include "cuda.h"

#include <string.h>

static const uint32_t most_blocks[] = {INT32_MAX, 65535, 65535}, most_threads[] = {1024, 1024, 64};
enum { MAX_THREADS = 1024 };
enum { CPU = 0, CUDA = 1 }; /* torch's numbers of device types */

/* ---- variants ---- */

static thx_cuda_variant *find_variant(thx_cuda_kernel *k, const thx_cuda_args *args) {
    size_t size = 2 * (size_t)k->nparams;
    thx_cuda_variant *v = k->last;
    if (v && v->device == args->device && memcmp(v->key, args->key, size) == 0) return v;
    for (uint32_t i = 0; i < k->nvariants; i++) {
        v = k->variants[i];
        if (v->device == args->device && memcmp(v->key, args->key, size) == 0) return k->last = v;
    }
    return NULL;
}

static int check(thx_cuda_kernel *k, th_status status) { /* thx_check, with the kernel's name */
    if (status == TH_OK || status == TH_ENOMEM) return thx_check(k->x, status);
    PyErr_Format(PyExc_RuntimeError, "%U: %s", k->name, th_ctx_error(k->x->ctx)->text);
    return -1;
}

/* What `build` answers: (image, entry, block, shared, passed, scratch), scratch one size per hidden pointer. */
static int read_built(thx_cuda_kernel *k, PyObject *built, thx_cuda_variant *v) {
    thx *x = k->x;
    const char *image, *entry;
    Py_ssize_t size;
    PyObject *block, *scratch;
    unsigned long long passed;
    if (!PyArg_ParseTuple(built, "y#sOIKO!", &image, &size, &entry, &block, &v->shared, &passed, &PyTuple_Type,
                          &scratch) ||
        thx_cuda_read_extent(block, "block", most_threads, v->block) < 0)
        return -1;
    uint64_t threads = (uint64_t)v->block[0] * v->block[1] * v->block[2];
    if (!threads || threads > MAX_THREADS) {
        PyErr_Format(PyExc_ValueError, "%U: a block of %llu threads; it may have 1 to %d", k->name,
                     (unsigned long long)threads, MAX_THREADS);
        return -1;
    }
    v->passed = passed;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(scratch) && i < 2; i++, v->hidden++)
        v->scratch[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(scratch, i));
    th_cuda *driver = PyErr_Occurred() ? NULL : thx_cuda_driver(x);
    return driver ? check(k, th_cuda_load(x->ctx, driver, v->device, image, entry, v->shared, &v->function)) : -1;
}

static thx_cuda_variant *add_variant(thx_cuda_kernel *k, const thx_cuda_args *args) {
    size_t size = 2 * (size_t)k->nparams;
    PyObject *key = thx_cuda_key_object(k, args->key);
    PyObject *built = key ? PyObject_CallFunction(k->build, "iO", args->device, key) : NULL;
    thx_cuda_variant *v = built ? PyMem_Calloc(1, sizeof *v + size) : NULL;
    Py_XDECREF(key);
    if (built && !v) PyErr_NoMemory();
    if (v) {
        v->device = args->device;
        memcpy(v->key, args->key, size);
        thx_cuda_variant **more = NULL;
        if (read_built(k, built, v) == 0 &&
            !(more = PyMem_Realloc(k->variants, (k->nvariants + 1) * sizeof *k->variants)))
            PyErr_NoMemory();
        if (more) {
            k->variants = more;
            k->last = more[k->nvariants++] = v;
        } else {
            PyMem_Free(v);
            v = NULL;
        }
    }
    Py_XDECREF(built);
    return v;
}

/* ---- calls ---- */

/* Triton's way: one dict of all arguments by name, compile-time constants included. */
static PyObject *grid_of_meta(thx_cuda_kernel *k, PyObject *const *bound) {
    PyObject *meta = PyDict_Copy(k->meta);
    for (uint32_t i = 0; meta && i < k->nparams; i++)
        if (PyDict_SetItem(meta, k->params[i].name, bound[i]) < 0) Py_CLEAR(meta);
    PyObject *grid = meta ? PyObject_CallOneArg(k->grid, meta) : NULL;
    Py_XDECREF(meta);
    return grid;
}

static int read_grid(thx_cuda_kernel *k, PyObject *const *bound, uint32_t out[3]) {
    if (!k->grid) {
        memcpy(out, k->fixed_grid, sizeof k->fixed_grid);
        return 0;
    }
    PyObject *grid = k->meta ? grid_of_meta(k, bound) : PyObject_Vectorcall(k->grid, bound, k->nparams, NULL);
    int rc = grid ? thx_cuda_read_extent(grid, "grid", most_blocks, out) : -1;
    Py_XDECREF(grid);
    return rc;
}

/* Memory for one hidden pointer. Freed after the launch: torch hands it to later work of the same stream only. */
static PyObject *take_scratch(thx_cuda_kernel *k, uint64_t bytes, int device, uint64_t *cell) {
    PyObject *place = PyObject_CallFunction((PyObject *)k->x->Device, "si", "cuda", device);
    PyObject *args = Py_BuildValue("(K)", (unsigned long long)bytes);
    PyObject *kwargs = place ? Py_BuildValue("{s:O,s:O}", "dtype", k->x->dtype_objects[TH_U8], "device", place) : NULL;
    PyObject *empty = PyObject_GetAttrString(k->x->torch, "empty");
    PyObject *tensor = args && kwargs && empty ? PyObject_Call(empty, args, kwargs) : NULL;
    PyObject *data = tensor ? PyObject_CallMethod(tensor, "data_ptr", NULL) : NULL;
    *cell = data ? PyLong_AsUnsignedLongLong(data) : 0;
    Py_XDECREF(data);
    Py_XDECREF(empty);
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    Py_XDECREF(place);
    if (PyErr_Occurred()) Py_CLEAR(tensor);
    return tensor;
}

static int launch(thx_cuda_kernel *k, const thx_cuda_variant *v, thx_cuda_args *args, th_cuda_launch *l) {
    void *params[THX_CUDA_PARAMS + 2];
    uint64_t hidden[2] = {0, 0}, blocks = (uint64_t)l->grid[0] * l->grid[1] * l->grid[2];
    PyObject *scratch[2] = {NULL, NULL};
    uint32_t n = 0;
    for (uint32_t i = 0; i < k->nparams; i++)
        if (v->passed >> i & 1) params[n++] = &args->cells[i];
    for (uint32_t i = 0; i < v->hidden; i++) {
        params[n++] = &hidden[i];
        if (v->scratch[i] && blocks && !(scratch[i] = take_scratch(k, v->scratch[i] * blocks, v->device, &hidden[i])))
            break;
    }
    l->stream = NULL;
    int rc = PyErr_Occurred() ? -1 : k->device_type == CUDA ? thx_cuda_stream(k->x, v->device, &l->stream) : 0;
    if (rc == 0) rc = check(k, th_cuda_launch_function(k->x->ctx, thx_cuda_driver(k->x), &v->function, l, params));
    Py_XDECREF(scratch[0]);
    Py_XDECREF(scratch[1]);
    return rc;
}

static PyObject *call(PyObject *self, PyObject *const *given, size_t nargsf, PyObject *kwnames) {
    thx_cuda_kernel *k = (thx_cuda_kernel *)self;
    Py_ssize_t n = PyVectorcall_NARGS(nargsf);
    PyObject *bound[THX_CUDA_PARAMS];
    thx_cuda_args args;
    th_cuda_launch l;
    if (kwnames || n != (Py_ssize_t)k->nparams) {
        if (thx_cuda_bind(k, given, n, kwnames, bound) < 0) return NULL;
        given = bound;
    }
    if (thx_cuda_pack(k, given, &args) < 0 || read_grid(k, given, l.grid) < 0) return NULL;
    if (args.device < 0) return PyErr_Format(PyExc_TypeError, "%U: no tensor says on which device to run", k->name);
    thx_cuda_variant *v = find_variant(k, &args);
    if (!v && !(v = add_variant(k, &args))) return NULL;
    memcpy(l.block, v->block, sizeof l.block);
    l.shared = v->shared;
    if (launch(k, v, &args, &l) < 0) return NULL;
    Py_RETURN_NONE;
}

/* ---- the type ---- */

static PyObject *kernel_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"name", "params", "grid", "build", "meta", "defaults", "device", NULL};
    PyObject *name, *params, *grid, *build, *meta = Py_None, *defaults = NULL;
    const char *device = "cuda";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UO!OO|OO!s", names, &name, &PyTuple_Type, &params, &grid, &build,
                                     &meta, &PyTuple_Type, &defaults, &device))
        return NULL;
    thx_cuda_kernel *k = (thx_cuda_kernel *)type->tp_alloc(type, 0);
    if (!k) return NULL;
    k->x = PyType_GetModuleState(type);
    k->vectorcall = call;
    k->name = Py_NewRef(name);
    k->build = Py_NewRef(build);
    k->meta = meta == Py_None ? NULL : Py_NewRef(meta);
    k->defaults = Py_XNewRef(defaults);
    k->device_type = strcmp(device, "cpu") == 0 ? CPU : CUDA; /* "cpu" serves the tests: no stream */
    if (PyCallable_Check(grid))
        k->grid = Py_NewRef(grid);
    else if (thx_cuda_read_extent(grid, "grid", most_blocks, k->fixed_grid) < 0)
        goto fail;
    if (k->meta && !PyDict_Check(k->meta)) {
        PyErr_SetString(PyExc_TypeError, "meta is a dict");
        goto fail;
    }
    if (thx_cuda_read_params(k, params) < 0) goto fail;
    return (PyObject *)k;
fail:
    Py_DECREF(k);
    return NULL;
}

static int kernel_traverse(thx_cuda_kernel *k, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(k));
    Py_VISIT(k->grid);
    Py_VISIT(k->meta);
    Py_VISIT(k->build);
    Py_VISIT(k->defaults);
    Py_VISIT(k->dict);
    return 0;
}

static int kernel_clear(thx_cuda_kernel *k) {
    Py_CLEAR(k->grid);
    Py_CLEAR(k->meta);
    Py_CLEAR(k->build);
    Py_CLEAR(k->defaults);
    Py_CLEAR(k->dict);
    return 0;
}

static void kernel_dealloc(thx_cuda_kernel *k) {
    PyTypeObject *type = Py_TYPE(k);
    PyObject_GC_UnTrack(k);
    kernel_clear(k);
    for (uint32_t i = 0; i < THX_CUDA_PARAMS; i++) {
        Py_XDECREF(k->params[i].name);
        Py_XDECREF(k->params[i].declared);
    }
    for (uint32_t i = 0; i < k->nvariants; i++) PyMem_Free(k->variants[i]);
    PyMem_Free(k->variants);
    Py_XDECREF(k->name);
    type->tp_free((PyObject *)k);
    Py_DECREF(type);
}

static PyObject *kernel_repr(thx_cuda_kernel *k) {
    return PyUnicode_FromFormat("<thunder GPU kernel %U: %u parameters, %u built>", k->name, k->nparams, k->nvariants);
}

static PyMemberDef kernel_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(thx_cuda_kernel, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(thx_cuda_kernel, dict), READONLY, NULL},
    {"__name__", T_OBJECT, offsetof(thx_cuda_kernel, name), READONLY, "The kernel's name."},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef kernel_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot kernel_slots[] = {
    {Py_tp_new, kernel_new},
    {Py_tp_dealloc, kernel_dealloc},
    {Py_tp_traverse, kernel_traverse},
    {Py_tp_clear, kernel_clear},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_repr, kernel_repr},
    {Py_tp_members, kernel_members},
    {Py_tp_getset, kernel_getset},
    {Py_tp_doc, "CudaKernel(name, params, grid, build, meta=None, defaults=(), device='cuda')\n\nA GPU kernel, made by "
                "thunder.extend.cuda_kernel and thunder.extend.triton_kernel. Calling it enqueues one launch."},
    {0, NULL},
};
static PyType_Spec kernel_spec = {"thunder._C.CudaKernel", sizeof(thx_cuda_kernel), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, kernel_slots};

int thx_cuda_init(thx *x, PyObject *module) {
    x->CudaKernel = (PyTypeObject *)PyType_FromModuleAndSpec(module, &kernel_spec, NULL);
    if (!x->CudaKernel || PyModule_AddObjectRef(module, "CudaKernel", (PyObject *)x->CudaKernel) < 0) return -1;
    return PyModule_AddFunctions(module, thx_cuda_functions);
}
