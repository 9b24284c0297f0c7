/* What is known about a torch function object: its importable name, its catalogue entry, how capture treats it.
 *
 * Function objects live as long as torch, so entries are kept for the life of the module, keyed by identity. A function
 * without importable name (a bound method, a lambda) is described anew each time and not kept.
 */
#include "capture.h"

#include <string.h>

static bool listed(const char *const *list, const char *name) {
    for (; *list; list++)
        if (strcmp(*list, name) == 0) return true;
    return false;
}

static const char *const queries[] = {"size",
                                      "dim",
                                      "ndimension",
                                      "numel",
                                      "nelement",
                                      "stride",
                                      "is_floating_point",
                                      "is_complex",
                                      "is_contiguous",
                                      "element_size",
                                      "get_device",
                                      "__len__",
                                      "is_signed",
                                      "type",
                                      "is_conj",
                                      "is_neg",
                                      "is_same_size",
                                      "has_names",
                                      "is_distributed",
                                      "is_coalesced",
                                      "sparse_dim",
                                      "dense_dim",
                                      "dim_order",
                                      "can_cast",
                                      "promote_types",
                                      "result_type",
                                      "is_tensor",
                                      "is_storage",
                                      "is_nonzero_query",
                                      "is_variable",
                                      "broadcast_shapes",
                                      "__hash__",
                                      "__dir__",
                                      "_nnz",
                                      "is_vulkan_available",
                                      "__reduce_ex_query__",
                                      "get_default_dtype",
                                      "_dimI",
                                      "_dimV",
                                      NULL};
static const char *const query_properties[] = {"shape",
                                               "dtype",
                                               "device",
                                               "ndim",
                                               "layout",
                                               "is_cuda",
                                               "is_cpu",
                                               "is_xpu",
                                               "is_mps",
                                               "is_meta",
                                               "is_sparse",
                                               "names",
                                               "is_quantized",
                                               "is_mkldnn",
                                               "is_ipu",
                                               "is_maia",
                                               "itemsize",
                                               "nbytes",
                                               "is_nested",
                                               "name",
                                               "output_nr",
                                               "is_sparse_csr",
                                               "is_xla",
                                               "is_vulkan",
                                               "is_mtia",
                                               "is_hpu",
                                               "_backward_hooks",
                                               "_post_accumulate_grad_hooks",
                                               NULL};
static const char *const data[] = {"item",        "__bool__",    "__int__",      "__float__", "__index__",
                                   "__complex__", "tolist",      "numpy",        "__array__", "equal",
                                   "allclose",    "is_nonzero",  "__contains__", "__repr__",  "__str__",
                                   "__format__",  "__nonzero__", "__long__",     NULL};
static const char *const skipped[] = {"_set_grad_enabled", "set_grad_enabled", "set_default_tensor_type",
                                      "__get_properties__", NULL};
static const char *const refused[] = {"register_post_accumulate_grad_hook",
                                      "data_ptr",
                                      "share_memory_",
                                      "__reduce_ex__",
                                      "__setstate__",
                                      "__deepcopy__",
                                      "to_dense_",
                                      "untyped_storage",
                                      "storage",
                                      "_typed_storage",
                                      "__dlpack__",
                                      "pin_memory",
                                      "record_stream",
                                      "__cuda_array_interface__",
                                      "set_",
                                      "storage_offset",
                                      "_make_dual",
                                      "_unpack_dual",
                                      NULL};
static const char *const parted[] = {"index_put", "index_put_", "__setitem__", "index_fill", "index_fill_", NULL};
/* How a tensor came to be: the fakes of a capture came another way. */
static const char *const asked[] = {"is_inference", "is_pinned", "is_shared", "is_set_to", "_is_view", NULL};
static const char *const asked_properties[] = {"_version", "_base", "retains_grad", NULL};
static const char *const autograd_names[] = {"requires_grad_", "register_hook", "retain_grad", "backward", NULL};
static const char *const autograd_properties[] = {"requires_grad", "is_leaf", "grad_fn", "grad", NULL};
static const char *const random_names[] = {"rand",
                                           "randn",
                                           "randint",
                                           "randperm",
                                           "rand_like",
                                           "randn_like",
                                           "randint_like",
                                           "bernoulli",
                                           "bernoulli_",
                                           "multinomial",
                                           "normal",
                                           "normal_",
                                           "uniform_",
                                           "random_",
                                           "poisson",
                                           "exponential_",
                                           "cauchy_",
                                           "log_normal_",
                                           "geometric_",
                                           "dropout",
                                           "dropout_",
                                           "dropout1d",
                                           "dropout2d",
                                           "dropout3d",
                                           "alpha_dropout",
                                           "feature_dropout",
                                           "feature_alpha_dropout",
                                           "rrelu",
                                           "rrelu_",
                                           "gumbel_softmax",
                                           "native_dropout",
                                           "fractional_max_pool2d",
                                           "fractional_max_pool3d",
                                           NULL};

/* ---- names ---- */

static bool same_object(PyObject *owner, const char *name, PyObject *want) {
    PyObject *found = owner ? PyObject_GetAttrString(owner, name) : NULL;
    PyErr_Clear();
    Py_XDECREF(found);
    return found == want;
}

/* A dotted name that gives `function` again, or 0. `name` is its __name__. */
static th_str dotted_name(thx *x, PyObject *function, const char *name) {
    char text[256];
    struct {
        PyObject *owner;
        const char *prefix;
    } places[] = {{x->torch, "torch"}, {x->functional, "torch.nn.functional"}, {(PyObject *)x->Tensor, "torch.Tensor"}};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        if (same_object(places[i].owner, name, function)) {
            snprintf(text, sizeof text, "%s.%s", places[i].prefix, name);
            return th_intern_z(x->ctx, text);
        }
    PyObject *module = PyObject_GetAttr(function, x->n.module), *qualname = PyObject_GetAttr(function, x->n.qualname);
    PyErr_Clear();
    th_str result = 0;
    if (module && PyUnicode_Check(module) && qualname && PyUnicode_Check(qualname)) {
        snprintf(text, sizeof text, "%s.%s", PyUnicode_AsUTF8(module), PyUnicode_AsUTF8(qualname));
        bool ours = strncmp(text, "thunder._kernels.", 17) == 0;
        if ((ours || strncmp(text, "torch.", 6) == 0) && !strchr(text, '<')) {
            PyObject *owner = PyDict_GetItemString(PyImport_GetModuleDict(), PyUnicode_AsUTF8(module));
            PyObject *found = owner ? PyObject_GetAttr(owner, qualname) : NULL;
            PyErr_Clear();
            if (found == function) result = th_intern_z(x->ctx, text);
            Py_XDECREF(found);
        }
    }
    Py_XDECREF(module);
    Py_XDECREF(qualname);
    return result;
}

/* torch.ops.aten.add.Tensor for an OpOverload, torch.ops.aten.add for a packet: str() of the object is
 * "aten.add.Tensor". */
static th_str op_name(thx *x, PyObject *function) {
    const char *type = Py_TYPE(function)->tp_name;
    if (strcmp(type, "OpOverload") != 0 && strcmp(type, "OpOverloadPacket") != 0) return 0;
    PyObject *text = PyObject_Str(function);
    const char *utf8 = text ? PyUnicode_AsUTF8(text) : NULL;
    char dotted[256];
    th_str result = 0;
    if (utf8) {
        snprintf(dotted, sizeof dotted, "torch.ops.%s", utf8);
        result = th_intern_z(x->ctx, dotted);
    }
    PyErr_Clear();
    Py_XDECREF(text);
    return result;
}

static uint8_t kind_of(const char *callee, const char *name) {
    if (listed(queries, name)) return THX_FUNC_QUERY;
    if (listed(data, name)) return THX_FUNC_DATA;
    if (listed(skipped, name)) return THX_FUNC_SKIP;
    if (strncmp(callee, "thunder._kernels.", 17) == 0) return THX_FUNC_CHECK;
    if (listed(asked, name)) return THX_FUNC_ASK;
    if (listed(refused, name) || strncmp(callee, "torch.ops.aten.set_.", 20) == 0) return THX_FUNC_REFUSE;
    if (strcmp(callee, "torch.autograd.grad") == 0 || strncmp(callee, "torch.autograd.backward", 23) == 0)
        return THX_FUNC_GRAD;
    if (listed(autograd_names, name) && strncmp(callee, "torch.Tensor.", 13) == 0) return THX_FUNC_GRAD;
    return THX_FUNC_RECORD;
}

/* method-wrapper: `Tensor.<property>.__get__`; the descriptor is its __self__. */
static int describe_property(thx *x, PyObject *wrapper, PyObject *descriptor, thx_func *f) {
    PyObject *property = PyObject_GetAttr(descriptor, x->n.name), *access = PyObject_GetAttr(wrapper, x->n.name);
    const char *name = property ? PyUnicode_AsUTF8(property) : NULL, *how = access ? PyUnicode_AsUTF8(access) : NULL;
    int rc = -1;
    if (name && how) {
        char text[256];
        bool get = strcmp(how, "__get__") == 0;
        snprintf(text, sizeof text, "torch.Tensor.%s.%s", name, how);
        f->callee = th_intern_z(x->ctx, text);
        if (listed(autograd_properties, name))
            f->kind = THX_FUNC_GRAD;
        else if (get)
            f->kind = listed(asked_properties, name)   ? THX_FUNC_ASK
                      : listed(query_properties, name) ? THX_FUNC_QUERY
                                                       : THX_FUNC_RECORD;
        else
            f->kind = strcmp(name, "names") == 0 ? THX_FUNC_SKIP : THX_FUNC_REFUSE;
        f->def = th_catalog_find(x->catalog, f->callee);
        rc = 0;
    }
    Py_XDECREF(property);
    Py_XDECREF(access);
    return rc;
}

static int describe(thx *x, PyObject *function, thx_func *f) {
    f->kind = THX_FUNC_RECORD;
    f->callee = op_name(x, function);
    PyObject *name = PyObject_GetAttr(function, x->n.name);
    PyErr_Clear();
    const char *utf8 = name && PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : "";
    if (!f->callee && utf8[0]) f->callee = dotted_name(x, function, utf8);
    f->kind = kind_of(f->callee ? th_str_get(x->ctx, f->callee) : "", utf8);
    f->random = listed(random_names, utf8);
    f->in_parts = listed(parted, utf8);
    if (f->callee) f->def = th_catalog_find(x->catalog, f->callee);
    Py_XDECREF(name);
    return 0;
}

/* ---- the table ---- */

static thx_func *slot_of(thx_func *table, uint32_t cap, PyObject *key) {
    uint32_t at = (uint32_t)(((uintptr_t)key >> 4) * 2654435761u) & (cap - 1);
    while (table[at].key && table[at].key != key) at = (at + 1) & (cap - 1);
    return &table[at];
}

static int grow(thx *x) {
    uint32_t cap = x->cap_funcs ? x->cap_funcs * 2 : 1024;
    thx_func *table = PyMem_Calloc(cap, sizeof *table);
    if (!table) return PyErr_NoMemory(), -1;
    for (uint32_t i = 0; i < x->cap_funcs; i++)
        if (x->funcs[i].key) *slot_of(table, cap, x->funcs[i].key) = x->funcs[i];
    PyMem_Free(x->funcs);
    x->funcs = table;
    x->cap_funcs = cap;
    return 0;
}

const thx_func *thx_func_find(thx *x, PyObject *function) {
    PyObject *key = function, *wrapped = NULL;
    if (Py_TYPE(function) == x->MethodWrapper) { /* made anew at each access: its descriptor is the identity */
        wrapped = PyObject_GetAttr(function, x->n.self);
        if (!wrapped) return NULL;
        key = wrapped;
        PyObject *name = PyObject_GetAttr(function, x->n.name);
        bool get = name && PyUnicode_CompareWithASCIIString(name, "__get__") == 0;
        Py_XDECREF(name);
        if (!get) key = function; /* __set__ and __delete__: described anew, never kept */
    }
    if (x->nfuncs * 2 >= x->cap_funcs && grow(x) < 0) {
        Py_XDECREF(wrapped);
        return NULL;
    }
    thx_func *f = slot_of(x->funcs, x->cap_funcs, key);
    if (f->key) {
        Py_XDECREF(wrapped);
        return f;
    }
    thx_func fresh = {0};
    int rc = wrapped ? describe_property(x, function, wrapped, &fresh) : describe(x, function, &fresh);
    if (rc == 0 && fresh.callee && !(wrapped && key == function)) {
        fresh.key = Py_NewRef(key);
        *f = fresh;
        x->nfuncs++;
    } else if (rc == 0) { /* the first slot is kept for descriptions that are valid until the next call */
        x->transient = fresh;
        f = &x->transient;
    }
    Py_XDECREF(wrapped);
    return rc < 0 ? NULL : f;
}

void thx_funcs_free(thx *x) {
    for (uint32_t i = 0; i < x->cap_funcs; i++) Py_XDECREF(x->funcs[i].key);
    PyMem_Free(x->funcs);
    x->funcs = NULL;
    x->nfuncs = x->cap_funcs = 0;
}
