/* GPU kernels as Python callables: what the rooms cuda*.c share.
 *
 *     kernel(x, out, n)
 *        cuda_args.c    bind, check, pack into cells; note what the code depends on (the key)
 *        cuda.c         the variant for this device and key, built by `build` when it is new
 *        cuda.c         grid, the device's current stream, launch
 *
 * A CUDA C kernel has one variant for each device. A Triton kernel is also compiled anew for other dtypes, for pointers
 * and sizes divisible by 16, and for sizes that are 1: its parameters say so (`special`, or THX_CUDA_AUTO).
 */
#ifndef THUNDER_EXT_CUDA_H
#define THUNDER_EXT_CUDA_H

#include "ext.h"

#include "executors/cuda/cuda.h"

enum { THX_CUDA_PARAMS = 64 };

typedef enum thx_cuda_kind {
    THX_CUDA_POINTER = 1,
    THX_CUDA_SIGNED,
    THX_CUDA_UNSIGNED,
    THX_CUDA_FLOAT,
    THX_CUDA_BOOL,
    THX_CUDA_AUTO, /* by the argument: a tensor, None, or a number of the type that fits it */
} thx_cuda_kind;

enum { THX_CUDA_IF_ONE = 1, THX_CUDA_IF_ALIGNED = 2 }; /* what of a value the code depends on */

typedef struct thx_cuda_param {
    PyObject *name, *declared; /* owned; as the user wrote them */
    uint8_t kind, bytes;       /* bytes of a number */
    uint8_t dtype;             /* of a pointer; TH_DTYPE_NONE: any */
    uint8_t special;
} thx_cuda_param;

typedef struct thx_cuda_args { /* one call's arguments, packed */
    uint64_t cells[THX_CUDA_PARAMS];
    uint8_t key[2 * THX_CUDA_PARAMS]; /* for each parameter: its type where that is not fixed, what its value is like */
    int device;
} thx_cuda_args;

typedef struct thx_cuda_variant { /* code for one device and key */
    int device;
    th_cuda_function function;
    uint32_t block[3], shared;
    uint64_t passed;     /* bit i: parameter i is one of the code's */
    uint32_t hidden;     /* trailing pointers that the user does not see: */
    uint64_t scratch[2]; /* how many bytes of memory for each block of the grid they point to */
    uint8_t key[];       /* of the kernel's length */
} thx_cuda_variant;

typedef struct thx_cuda_kernel {
    PyObject_HEAD vectorcallfunc vectorcall;
    thx *x;
    PyObject *name, *grid, *meta, *build, *defaults, *dict; /* owned; meta NULL: the grid takes the arguments */
    int32_t device_type;                                    /* torch's number */
    uint32_t fixed_grid[3];                                 /* where grid is NULL */
    uint32_t nparams, nvariants;
    thx_cuda_variant **variants, *last;
    thx_cuda_param params[THX_CUDA_PARAMS];
} thx_cuda_kernel;

/* ---- cuda_args.c ---- */
int thx_cuda_read_params(thx_cuda_kernel *k, PyObject *params); /* from ((name, declared, type, special), ...) */
/* Positional and keyword arguments to one per parameter, borrowed; 0, or -1 with a TypeError that names the parameter.
 */
int thx_cuda_bind(const thx_cuda_kernel *k, PyObject *const *args, Py_ssize_t n, PyObject *kwnames, PyObject **bound);
int thx_cuda_pack(thx_cuda_kernel *k, PyObject *const *bound, thx_cuda_args *out);
PyObject *thx_cuda_key_object(const thx_cuda_kernel *k, const uint8_t *key); /* ((type, what its value is like), ...) */
int thx_cuda_read_extent(PyObject *value, const char *what, const uint32_t *most,
                         uint32_t out[3]); /* "grid", "block" */

/* ---- cuda_compile.c ---- */
extern PyMethodDef thx_cuda_functions[];
th_cuda *thx_cuda_driver(thx *x);                       /* opened when first asked for; NULL with an exception */
int thx_cuda_stream(thx *x, int device, void **stream); /* the device's current one */

/* ---- cuda.c ---- */
int thx_cuda_init(thx *x, PyObject *module);
void thx_cuda_fini(thx *x);

#endif
