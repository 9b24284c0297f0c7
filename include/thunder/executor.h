/* Executors in C: a shared object that runs operators, new ones or torch's.
 *
 * It exports one function,
 *
 *     const th_executor *thunder_executor(void);
 *
 * and is loaded with thunder.extend.load_executor("libmine.so"), or found in the folder that THUNDER_EXECUTORS names.
 * The compiler asks `claim` about each call of an operator that the executor lists, when a program is compiled; what
 * was claimed runs as `execute`, with the interpreter lock held, its results allocated by the host as the trace says.
 * The first run of everything is compared with torch's. examples/executor_c/ is a whole one.
 *
 * This header needs nothing else of the project. Nothing in it changes within one TH_EXECUTOR_ABI; what is added comes
 * at the end of a struct, behind what `size` says is there.
 */
#ifndef THUNDER_EXECUTOR_H
#define THUNDER_EXECUTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TH_EXECUTOR_ABI    1
#define TH_EXECUTOR_SYMBOL "thunder_executor"

typedef struct th_x_type { /* of a tensor; shape and stride have ndim entries, strides count elements */
    const char *dtype;     /* "f32", "f64", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool", ... */
    const char *device;    /* "cpu", "cuda", ... */
    int32_t device_index;  /* -1: none given */
    uint32_t ndim;
    const int64_t *shape, *stride;
    bool requires_grad;
} th_x_type;

typedef struct th_x_tensor { /* at run time */
    void *data;              /* of its first element; NULL where it has none */
    uint32_t ndim;
    const int64_t *shape, *stride;
} th_x_tensor;

typedef enum th_x_kind {
    TH_X_ABSENT, /* not given, and has a default */
    TH_X_NONE,
    TH_X_BOOL,
    TH_X_INT,
    TH_X_FLOAT,
    TH_X_STR,
    TH_X_INTS, /* a tuple or list of ints */
    TH_X_TENSOR,
    TH_X_OTHER,
} th_x_kind;

typedef struct th_x_call th_x_call; /* one call of an operator, while a program is compiled */

typedef struct th_x_host { /* what the compiler offers; valid during the call that it is given to */
    uint32_t abi;
    size_t size;
    /* Arguments by parameter, in the order of the operator's signature; past the end: TH_X_ABSENT. */
    th_x_kind (*kind)(const th_x_call *call, uint32_t parameter);
    bool (*tensor)(const th_x_call *call, uint32_t parameter, th_x_type *type);
    bool (*integer)(const th_x_call *call, uint32_t parameter, int64_t *value); /* of INT and BOOL */
    bool (*real)(const th_x_call *call, uint32_t parameter, double *value);     /* of FLOAT, INT and BOOL */
    const char *(*text)(const th_x_call *call, uint32_t parameter);             /* NULL: no TH_X_STR */
    /* How many ints; the first `capacity` of them go to values. -1: no TH_X_INTS. */
    int64_t (*integers)(const th_x_call *call, uint32_t parameter, int64_t *values, uint32_t capacity);
    uint32_t (*nresults)(const th_x_call *call); /* 0 within meta */
    bool (*result)(const th_x_call *call, uint32_t n, th_x_type *type);
    /* Why a call is declined, for the user to read; returns 0, so that claim may `return host->decline(call, "...")`.
     */
    int (*decline)(th_x_call *call, const char *reason);
    /* Within meta: the next result. stride NULL: row-major. */
    void (*give)(th_x_call *call, const char *dtype, const char *device, int32_t device_index, uint32_t ndim,
                 const int64_t *shape, const int64_t *stride);
} th_x_host;

typedef struct th_x_operator {
    const char *name;   /* "gelu": of the catalogue; "torch.ops.aten.gelu_backward.default"; or of a new one */
    const char *schema; /* NULL: torch has it; else of a new one: "(Tensor x, float scale) -> Tensor" */
    /* 1: taken, *data is what execute gets; 0: not; negative: an error, with its reason as by decline. NULL: always. */
    int (*claim)(const th_x_host *host, th_x_call *call, void **data);
    void (*release)(void *data); /* of what claim made; may be NULL */
    /* inputs: the tensor arguments in order, each distinct one once. 0, or anything else with a reason in `error`. */
    int (*execute)(void *data, const th_x_tensor *inputs, uint32_t ninputs, const th_x_tensor *results,
                   uint32_t nresults, char *error, size_t error_size);
    int (*meta)(const th_x_host *host, th_x_call *call); /* of a new one: gives its results; 0, or negative */
    /* Of a new one: the operator of this executor that computes its derivative, called with the gradients of the
     * results and then the arguments; gives the gradients of the tensor arguments in order. NULL: it has none. */
    const char *derivative;
} th_x_operator;

typedef struct th_executor {
    uint32_t abi; /* TH_EXECUTOR_ABI */
    size_t size;  /* sizeof(th_executor) */
    const char *name, *version;
    const th_x_operator *operators;
    uint32_t noperators;
    size_t operator_size; /* sizeof(th_x_operator) */
} th_executor;

const th_executor *thunder_executor(void);

#endif
