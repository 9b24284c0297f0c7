/* An extension that Python calls past torch's dispatcher, as kernels written with torch/extension.h are: it is linked
 * to torch, and reads the memory of its argument. */
#include <Python.h>

#include <stdint.h>
#include <string.h>

typedef void *handle;
int32_t aoti_torch_get_data_ptr(handle tensor, void **data);

/* tripled(tensor, offset of its TensorImpl, numel): floats, in place; returns the tensor. */
static PyObject *tripled(PyObject *module, PyObject *args) {
    PyObject *tensor;
    Py_ssize_t offset, numel;
    void *data = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "Onn", &tensor, &offset, &numel)) return NULL;
    if (aoti_torch_get_data_ptr((char *)tensor + offset, &data)) return PyErr_Format(PyExc_RuntimeError, "no memory");
    for (Py_ssize_t i = 0; i < numel; i++) ((float *)data)[i] *= 3;
    return Py_NewRef(tensor);
}

static PyMethodDef methods[] = {{"tripled", tripled, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "extension", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_extension(void) { return PyModule_Create(&definition); }
