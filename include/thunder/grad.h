/* Derivatives: from one trace to a forward and a backward trace.
 *
 *     computation(x, w)                      joint(x, w, g)                         forward(x, w)      backward(x, w,
 * t0, g) t0 = torch.mm(x, w)                    t0 = torch.mm(x, w)                    t0 = ...           g0 =
 * torch.mul(...) t1 = torch.sin(t0)          ->         t1 = torch.sin(t0)            ->       t1 = ...           ...
 *         return t1                              g0 = torch.mul(g, torch.cos(t0))       return t1, t0      return gx,
 * gw
 *                                                ...
 *                                                return t1, gx, gw
 *
 * Which operation has which derivative is asked of a rule function. A rule is a trace: the operation in terms of
 * others, and the gradients of what it uses in terms of the gradients of its results and whatever it computed on the
 * way.
 */
#ifndef THUNDER_GRAD_H
#define THUNDER_GRAD_H

#include "thunder/ir.h"

/* What a rule is asked for. Values are those of `t`. */
typedef struct th_rule_request {
    th_trace *t;
    const th_op *op;
    uint32_t nuses;
    const th_val *uses; /* the tensors that the operation uses, each once, in order of first use */
    const bool *needs;  /* by use: it requires grad */
    uint32_t nouts;
    const th_val *outs;         /* its results in order */
    const th_typeref *tangents; /* by result: type of its gradient, 0: it gets none */
} th_rule_request;

typedef struct th_rule {
    th_trace *trace; /* inputs: the uses, then one gradient for each result that gets one;
                        result: a TUPLE of the operation's results, then by use its gradient or None */
    uint32_t nuses, nouts;
    uint64_t out_grad; /* bit by result: it requires grad */
} th_rule;

/* TH_DECLINED: the operation has no derivative that can be had; the context's error says why. The rule must live as
 * long as the join runs. */
typedef th_status (*th_rule_fn)(void *user, const th_rule_request *request, const th_rule **rule);

typedef struct th_kept { /* a result whose whole gradient is wanted: retain_grad() */
    uint32_t result;
    th_val total; /* 0: it gets none */
} th_kept;

typedef struct th_grad_options {
    th_rule_fn rules; /* asked for what has no rule in the catalogue */
    void *user;
    uint32_t facts;    /* what this torch does: th_call.facts */
    bool derived_only; /* for tests: the catalogue's rules are left out */
} th_grad_options;

typedef struct th_joint {
    th_trace *t; /* result: TUPLE of the call's results, new contents of inputs, by input that requires grad its
                    gradient or None, and by kept result the same; inputs: those of the call, then the gradients of
                    results */
    uint32_t nresults, nmutated, nwrt, ntangents;
    th_val *mutated;      /* inputs whose new contents take part in autograd: to be copied to them after the call */
    th_val *wrt;          /* inputs that require grad */
    uint32_t *tangent_of; /* by gradient of a result: which of the results and new contents it belongs to */
    uint32_t nkept;
    th_kept *kept;
    uint32_t ncatalogue; /* operations whose derivative is the catalogue's */
    uint32_t nderived;   /* and the others: their names */
    th_str *derived;
} th_joint;

/* Differentiate a functionalised trace, which is consumed: it becomes joint->t. Inputs whose types carry
 * TH_TYPE_REQUIRES_GRAD are differentiated with respect to. TH_DECLINED:
 * it cannot be done; the error says why. */
th_status th_grad_join(th_trace *t, const th_grad_options *options, th_joint *joint);
void th_joint_fini(th_joint *joint);

typedef enum th_remat {
    TH_REMAT_OFF,
    TH_REMAT_AUTO,
    TH_REMAT_MAX,
    TH_REMAT_FUSED, /* as AUTO, for executors that fuse regions */
} th_remat;

typedef struct th_halves {
    th_trace *forward;  /* result: TUPLE of the results, the new contents of inputs, then what is saved */
    th_trace *backward; /* inputs: what is saved, then the gradients of results; result: TUPLE by input that requires
                           grad, then by kept result */
    uint32_t nsaved;
    th_val *saved;             /* values of `forward`; inputs of the call may be among them */
    int64_t bytes, bytes_kept; /* of intermediate results saved: as autograd would, and as chosen */
} th_halves;

/* Take what is computed of some gradients alone out of a trace whose last `ntangents` inputs they are (bit by gradient:
 * it does not come in); its results are None then. TH_DECLINED: it cannot be told; the trace is unspecified. */
th_status th_grad_without(th_trace *t, uint32_t ntangents, uint64_t absent);

th_status th_grad_split(const th_joint *joint, th_remat remat, th_halves *out);
void th_halves_fini(th_ctx *ctx, th_halves *halves);

#endif
