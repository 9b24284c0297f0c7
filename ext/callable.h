/* What thunder.jit returns, seen from below: one object per compiled callable, with its entries. */
#ifndef THUNDER_CALLABLE_H
#define THUNDER_CALLABLE_H

#include "ambient.h"
#include "autograd.h"
#include "capture.h"
#include "effects.h"
#include "guards.h"
#include "resume.h"
#include "sizes.h"
#include "structure.h"
#include "trace_object.h"

enum {
    THX_EAGER_GRAD = 1,    /* the original is run: it uses autograd in a way that is not compiled, say */
    THX_EAGER_REFUSED = 2, /* it cannot be captured, and the user asked for the fallback */
    THX_EAGER_RAISED = 3,  /* the program itself raised: eager does so too, after what it does before */
    THX_EAGER_ORIGINAL = 4 /* it cannot be captured, and the fallback would not look at what it reads either */
};

typedef struct thx_place { /* a number that the callable can reach and that may be any */
    PyObject *owner, *key; /* owned; a dictionary and its key, or a variable of an enclosing function and None */
    PyObject *value;       /* owned: at the former capture; of a program that was made, at its own */
    PyObject *followed;    /* while captured: what stands there (owned) */
    PyObject *before;      /* then: what stood there (owned) */
    PyObject *rewritten;   /* the code wrote it, though it was what stood there (owned); or NULL */
    bool any;              /* it is a number of the program */
} thx_place;

typedef struct thx_write { /* a write to the module tree, replayed after each run */
    PyObject *dict, *key;  /* owned */
    PyObject *constant;    /* owned, or NULL: the value of an output */
    uint32_t slot;
} thx_write;

typedef struct thx_entry { /* one compiled program of a callable */
    thx_ambient ambient;
    Py_ssize_t npositional;
    PyObject *kwnames; /* owned or NULL */
    uint32_t nargs;
    thx_spec *args; /* nargs */
    thx_guards *guards;
    uint64_t generation; /* of the guards, when `roots` was filled */
    th_trace *captured;
    thx_program main;
    thx_guards *reads;      /* owned: see thx_gradient; NULL: none */
    thx_gradient *gradient; /* owned; NULL: nothing to differentiate */
    struct thx_entry_grad { /* the `.grad` of an input that the program reads: read_grads.c */
        uint32_t root;
        thx_spec spec;
    } *grads;
    uint32_t ngrads;
    bool inference;           /* the program's operations run in an inference mode of its own */
    const th_plan *placed;    /* the plan that result_slots and writes belong to */
    uint32_t nroots, nvalues; /* nvalues: outputs and tensors written to state */
    th_slot *roots;           /* nroots filled slots: the template of a frame */
    int32_t *root_leaf;       /* by root: argument leaf, or -1 - index of a bound tensor */
    thx_spec result;
    uint32_t *result_slots; /* by output leaf */
    uint32_t nresults;
    struct {
        uint32_t leaf;
        PyObject *tensor; /* owned */
    } *identical;         /* arguments that are watched tensors (a parameter, say): only these very ones will do */
    uint32_t nidentical;
    PyObject *known; /* owned or NULL: ids of what is watched; no container among the arguments may be one of these */
    bool compares;   /* the code asks `a is b`: no other argument may be a watched tensor */
    thx_write *writes;
    uint32_t nwrites;
    thx_effects effects; /* there are some: the result is (what the caller gets, a content for each of them) */
    uint32_t nfloats, free_floats; /* floats of the arguments: how many; which may be any, by bit */
    thx_place *places;             /* floats that are no arguments: they come after those */
    uint32_t nplaces;
    PyObject *formula;    /* owned: from all these to the literals; NULL: there are none */
    PyObject *conditions; /* owned: of all these, whether what the code compared comes out as it did; NULL: nothing */
    PyObject *absent;     /* owned; as in thx_recorder; NULL: none */
    PyObject *expected;   /* owned tuple: values of tensors that it was captured for, in order; NULL: none */
    uint64_t number;      /* its own, from 1 */
    thx_resume **resumes; /* how to go on from other entries */
    uint32_t nresumes;
    thx_recent recent[THX_RECENT]; /* most recent first */
    uint32_t exact;                /* programs for very sizes that were made because these recurred */
    uint32_t misfits;              /* how often it could not serve a call whose arguments fit */
    uint64_t tried;                /* the call that met another value in it */
    uint32_t *undo;                /* by undo: the root of a tensor that is written before the last of them is known */
    uint32_t nundo;
    bool undo_random;     /* random numbers are drawn before */
    bool draws;           /* random numbers */
    bool ran;             /* to its end */
    bool redraws;         /* they are put back when the run that goes on fails and is made again */
    bool writes_inputs;   /* then it matters which arguments share storage, with each other or with bound tensors: */
    uint32_t *sharing;    /* by leaf: the first other one, or count + index of a bound tensor; UINT32_MAX: nobody; then,
                             by leaf: how far its start lies from that one's; then: is it an inference tensor? */
    int64_t *offsets;     /* by root: where it starts in its storage, where that matters; else NULL */
    bool ask_in_backward; /* Python code of the user's has part in the derivative: what it reads cannot be told */
    uint8_t eager;        /* THX_EAGER_*: not compiled, calls like this one run the original */
    bool dead;            /* its guards failed for good */
    bool dropped;         /* out of the callable's list: freed when the last run of it ends */
    uint32_t running;
    uint64_t hits;
    double capture_ms, passes_ms, lower_ms;
    uint32_t nfast, nslow, nqueries, nevals;
    struct thx_entry *next;
} thx_entry;

typedef struct thx_callable_object {
    PyObject_HEAD vectorcallfunc vectorcall;
    thx *x;
    PyObject *fn, *module, *weakrefs, *dict;
    PyObject *transform; /* what calls the user's transforms: transform.h; or NULL */
    PyObject *claims;    /* what its executors claim: claim.c; NULL: torch runs everything */
    PyObject *log;       /* told of each call that is captured; or NULL */
    PyObject *on_event;  /* Python callable for rare things: warnings, fallback decisions */
    thx_entry *entries;  /* most recent first */
    uint64_t changes;    /* of that list: what looks through it while Python code may run begins anew */
    uint64_t hits, misses, fallbacks, entry_count, calls;
    uint32_t generalised;  /* how often it was tried to let numbers change */
    uint8_t dynamic;       /* 0: sizes are not followed, 1: they are, 2: and the caller says that they decide nothing */
    uint32_t unfollowed;   /* captures that tried to follow sizes and could not */
    uint32_t branch_limit; /* of entries for the values of tensors that one call can meet */
    uint8_t cache;         /* 0 constant values, 1 no caching, 2 same input */
    uint8_t remat;         /* th_remat */
    PyObject *refused;     /* runs what cannot be captured; NULL: it is an error */
    bool needs_transform;  /* the original computes something else: it is no way out */
    bool warned_grad, warned_modes, warned_fallback;
    uint32_t settled; /* how often a second capture followed a write to state */
    bool timed;       /* for benchmarks: hits add to guard_ns what they took up to the choice of their entry */
    uint64_t guard_ns, entered_ns;
} thx_callable_object;

typedef struct thx_request { /* a call */
    const thx_ambient *ambient;
    PyObject *const *args;
    size_t nargsf;
    PyObject *kwnames;
    PyObject *seen;            /* owned tuple: values of tensors that runs of it have met, in order; or NULL */
    thx_left left;             /* what the run before has computed */
    struct thx_entry *left_by; /* the entry that it was of, while it is there */
    bool exact;                /* to be captured for its very sizes */
    PyObject *refusal;         /* owned: the CaptureError for which it is not to be captured; or NULL */
} thx_request;

/* compile.c: capture, passes, lowering. NULL with an exception; an entry with `eager` set comes with the exception that
 * says why. */
thx_entry *thx_compile(thx_callable_object *c, const thx_request *call);
int64_t thx_offset_of(thx *x, PyObject *tensor); /* in its storage, in elements */
/* Which of the leaves share storage, as thx_entry.sharing describes; out holds 3 * leaves->count numbers. */
void thx_find_sharing(thx *x, const thx_guards *guards, const thx_leaves *leaves, uint32_t *out);
/* ---- alike.c ---- */
enum { THX_ALIKE_NUMBERS, THX_ALIKE_SIZES, THX_ALIKE_INTS };
/* The same but for values of the floats that b numbers, for sizes and ints, or for ints; adds to *differences. */
bool thx_specs_alike(const thx_spec *a, const thx_spec *b, int but_for, uint32_t *differences);
/* The same call but for these; *differences: how many there are. */
bool thx_calls_alike(const thx_entry *a, const thx_entry *b, int but_for, uint32_t *differences);
bool thx_same_object(PyObject *a, PyObject *b, bool by_identity);

/* numbers.c. Before a capture: is there an entry for the same call but for values of floats? Then these are followed,
 * and `*like` is that entry. After it: what differs between the two programs becomes slots; 1 it did, 0 not, -1 error.
 */
int thx_numbers_begin(thx_callable_object *c, thx_entry *e, thx_entry **like);
int thx_numbers_end(thx *x, thx_entry *e, const thx_entry *like, PyObject *tape);
/* ---- places.c ---- */
/* Those that another entry follows, and those that have changed since (as thx_guards_check_but has them). */
int thx_places_take(thx_entry *e, const thx_entry *like, PyObject *changed);
/* For the time of a capture: floats that the tape follows, ints that the sizes do. */
int thx_places_put(const thx_entry *e, PyObject *tape, PyObject *sizes);
void thx_places_put_back(const thx_entry *e); /* keeps a pending exception */
int thx_places_keep(thx_entry *e);            /* those that are `any` are free from here on */
void thx_places_free(thx_entry *e);
/* Is the program the same as that of `like`, whose floats were others, and has nothing looked at them? 1, 0, -1. */
int thx_floats_unseen(const thx_entry *e, const thx_entry *like, PyObject *tape);
PyObject *thx_tape_new(thx *x);
/* The literals of a call, into their slots: what holds them, or NULL with an exception. */
PyObject *thx_numbers_values(const thx_entry *e, const thx_leaves *leaves);
int thx_numbers_hold(const thx_entry *e, const thx_leaves *leaves); /* the conditions; -1 with an exception */
/* A run has failed: is all as it was before, no input written to and no random number drawn? */
bool thx_entry_is_untouched(const thx_entry *entry);
bool thx_entry_leaves(const thx_entry *entry); /* a run changes something beside its results */
bool thx_entry_may_fail_in_eager(const thx_callable_object *callable,
                                 const thx_entry *entry); /* a kernel of torch's that fails does so where eager is */
/* ---- entry.c ---- */
/* 1 the entry serves this call, 0 it does not, -1 error; leaves: the tensors of the arguments. */
int thx_entry_matches(thx_callable_object *c, thx_entry *e, const thx_ambient *a, PyObject *const *args,
                      Py_ssize_t npositional, PyObject *kwnames, thx_leaves *leaves);
int thx_arguments_match(thx *x, const thx_entry *e, PyObject *const *args, Py_ssize_t npositional, PyObject *kwnames,
                        thx_leaves *leaves); /* as far as these go */
/* ---- read_grads.c ---- */
typedef struct thx_entry_grad thx_entry_grad;
int thx_entry_add_grads(thx *x, thx_entry *e, const thx_recorder *r, thx_leaves *leaves);
/* 1: they are of the same kind, and leaves after those of the arguments; 0: not; -1: error. After the guards. */
int thx_entry_match_grads(thx *x, const thx_entry *e, thx_leaves *leaves);
void thx_entry_free_grads(thx_entry *e);

/* The result as the caller gets it. ValueChanged: all is as it was before, and call->left has what was computed. */
PyObject *thx_entry_run(thx_callable_object *c, thx_entry *e, const thx_leaves *leaves, thx_request *call);

int thx_entry_place(thx *x, thx_entry *entry); /* find the slots of results in the present plan */
void thx_entry_free(thx *x, thx_entry *entry);
/* An entry that is looked at while Python code may run: entry->running++ before, this afterwards. */
void thx_entry_leave(thx_callable_object *c, thx_entry *entry);
/* Raise for a call that would have to run the original; NULL: for the pending exception. Always NULL. */
PyObject *thx_refuse_original(thx_callable_object *c, const char *why);
int thx_callable_init(thx *x, PyObject *module);
int thx_trace_init(thx *x, PyObject *module);

#endif
