/* What GPU kernels need of the outside: the driver, NVRTC, torch's current stream. See cuda.h.
 *
 * All of it is opened when first asked for: importing thunder touches no library of CUDA's.
 */
#include "cuda.h"

#include <string.h>

typedef int32_t (*stream_fn)(int32_t, void **);

typedef struct thx_cuda { /* of the module state */
    th_cuda driver;
    stream_fn stream;     /* torch's shim; NULL: through Python */
    PyObject *raw_stream; /* torch._C._cuda_getCurrentRawStream (owned); NULL: a torch without CUDA */
} thx_cuda;

static void find_stream(thx *x, thx_cuda *cuda) {
    PyObject *paths = PyObject_GetAttrString(x->torch, "__path__");
    PyObject *first = paths ? PySequence_GetItem(paths, 0) : NULL;
    PyObject *path = first ? PyUnicode_FromFormat("%U/lib/libtorch_cuda.so", first) : NULL;
    th_dylib *library = NULL;
    if (path && th_dylib_open(x->ctx, PyUnicode_AsUTF8(path), true, &library) == TH_OK) {
        void *symbol = th_dylib_symbol(library, "aoti_torch_get_current_cuda_stream");
        memcpy(&cuda->stream, &symbol, sizeof symbol);
    }
    cuda->raw_stream = PyObject_GetAttrString(x->torch_c, "_cuda_getCurrentRawStream");
    PyErr_Clear();
    Py_XDECREF(path);
    Py_XDECREF(first);
    Py_XDECREF(paths);
}

th_cuda *thx_cuda_driver(thx *x) {
    if (x->cuda) return &x->cuda->driver;
    thx_cuda *cuda = PyMem_Calloc(1, sizeof *cuda);
    if (!cuda) return (th_cuda *)PyErr_NoMemory();
    if (th_cuda_open(x->ctx, &cuda->driver) != TH_OK) {
        PyMem_Free(cuda);
        return PyErr_Format(PyExc_RuntimeError, "no CUDA driver: %s", th_ctx_error(x->ctx)->text), NULL;
    }
    find_stream(x, cuda);
    x->cuda = cuda;
    return &cuda->driver;
}

int thx_cuda_stream(thx *x, int device, void **stream) {
    *stream = NULL; /* CUDA's default stream */
    if (x->cuda->stream && x->cuda->stream(device, stream) == 0) return 0;
    if (!x->cuda->raw_stream) return 0;
    PyObject *raw = PyObject_CallFunction(x->cuda->raw_stream, "i", device);
    if (raw) *stream = PyLong_AsVoidPtr(raw);
    Py_XDECREF(raw);
    return PyErr_Occurred() ? -1 : 0;
}

void thx_cuda_fini(thx *x) { /* libraries and modules stay: work may still be in flight */
    if (x->cuda) Py_CLEAR(x->cuda->raw_stream);
    PyMem_Free(x->cuda);
    x->cuda = NULL;
}

static PyObject *arch_of(PyObject *module, PyObject *device) {
    thx *x = PyModule_GetState(module);
    int arch = 0, ordinal = (int)PyLong_AsLong(device);
    if (PyErr_Occurred()) return NULL;
    th_cuda *cuda = thx_cuda_driver(x);
    if (!cuda || thx_check(x, th_cuda_arch(x->ctx, cuda, ordinal, &arch)) < 0) return NULL;
    return PyLong_FromLong(arch);
}

/* ---- compiling: without the interpreter lock, in a context of its own ---- */

typedef struct job {
    const char *nvrtc;
    th_cuda_source source;
    char folder[4096]; /* of the cache; empty: none */
    th_cuda_image image;
    char *log;
    int version;
    bool cached;
} job;

static th_status run_job(th_ctx *ctx, job *j) {
    th_nvrtc nvrtc;
    th_status status = th_nvrtc_open(ctx, j->nvrtc, &nvrtc);
    if (status != TH_OK) return status;
    j->version = nvrtc.version;
    if (j->folder[0]) status = th_cuda_cache_get(ctx, j->folder, &j->source, j->version, &j->image);
    j->cached = j->folder[0] && status == TH_OK;
    if (j->cached) return TH_OK;
    status = th_nvrtc_compile(ctx, &nvrtc, &j->source, &j->image, &j->log);
    if (status == TH_OK && j->folder[0]) (void)th_cuda_cache_put(ctx, j->folder, &j->source, j->version, &j->image);
    return status;
}

static PyObject *result_of(th_ctx *ctx, job *j, th_status status) {
    if (status == TH_OK)
        return Py_BuildValue("(y#si)", (char *)j->image.data, (Py_ssize_t)j->image.size, j->image.entry,
                             (int)j->cached);
    const char *text = th_ctx_error(ctx)->text;
    if (status == TH_EINVAL) return Py_BuildValue("(Osi)", Py_None, j->log ? j->log : text, 0);
    PyErr_SetString(PyExc_RuntimeError, text[0] ? text : th_status_text(status));
    return NULL;
}

static PyObject *compile(PyObject *module, PyObject *args) {
    (void)module;
    job j = {0};
    PyObject *options;
    int keep = 1;
    const char *list[64];
    if (!PyArg_ParseTuple(args, "sssO!iz|p", &j.nvrtc, &j.source.text, &j.source.entry, &PyTuple_Type, &options,
                          &j.source.arch, &j.source.headers, &keep))
        return NULL;
    if (PyTuple_GET_SIZE(options) > 64) return PyErr_Format(PyExc_ValueError, "more than 64 options");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(options); i++)
        if (!(list[j.source.noptions++] = PyUnicode_AsUTF8(PyTuple_GET_ITEM(options, i)))) return NULL;
    j.source.options = list;
    if (!keep || !th_cuda_cache_folder(j.folder, sizeof j.folder)) j.folder[0] = '\0';
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    if (!ctx) return PyErr_NoMemory();
    th_status status;
    Py_BEGIN_ALLOW_THREADS status = run_job(ctx, &j);
    Py_END_ALLOW_THREADS PyObject *result = result_of(ctx, &j, status);
    th_cuda_image_fini(ctx, &j.image);
    th_ctx_alloc(ctx, j.log, 0);
    th_ctx_free(ctx);
    return result;
}

PyMethodDef thx_cuda_functions[] = {
    {"cuda_arch", arch_of, METH_O, "cuda_arch(device_index) -> int: compute capability as 10 * major + minor."},
    {"cuda_compile", compile, METH_VARARGS,
     "cuda_compile(nvrtc_path, source, entry, options, arch, headers, cache=True) -> (image, entry, from_cache), or "
     "(None, log, False) when the source is at fault."},
    {NULL, NULL, 0, NULL},
};
