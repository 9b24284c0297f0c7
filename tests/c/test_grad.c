/* Joining a program with its derivative and splitting it again: structure, what is saved, and memory that runs out at
 * any request. Values are compared with eager by the Python tests. */
#include "check.h"

#include "thunder/grad.h"

static const char *const mlp =
    "def computation(x: \"cpu f32[8, 4]\", w: \"cpu f32[16, 4] grad\", v: \"cpu f32[2, 16] grad\"):\n"
    "    t0: \"cpu f32[8, 16]\" = torch.nn.functional.linear(x, w)\n"
    "    t1: \"cpu f32[8, 16]\" = torch.exp(t0)\n"
    "    t2: \"cpu f32[8, 16]\" = torch.mul(t1, 3.0)\n"
    "    t3: \"cpu f32[8, 2]\" = torch.nn.functional.linear(t2, v)\n"
    "    return t3\n";

static th_status no_rule(void *user, const th_rule_request *request, const th_rule **rule) {
    (void)rule;
    ++*(int *)user;
    return th_fail(request->t->ctx, TH_DECLINED, "no rule");
}

static uint32_t count_calls(const th_trace *t, const char *callee) {
    uint32_t n = 0;
    for (th_opref o = 1; o < t->nops; o++)
        n += t->ops[o].kind == TH_OP_CALL && strcmp(th_str_get(t->ctx, t->ops[o].callee), callee) == 0;
    return n;
}

static th_status halves_of(th_ctx *ctx, const char *text, th_remat remat, th_halves *out, th_joint *joint, int *asked) {
    th_trace *t = NULL;
    th_status status = th_trace_parse(ctx, text, strlen(text), &t);
    if (status != TH_OK) return status;
    status = th_grad_join(t, &(th_grad_options){.rules = no_rule, .user = asked}, joint);
    if (status == TH_OK) status = th_pipeline_run(joint->t, "noop,cse,dce", NULL, true, NULL, NULL);
    if (status == TH_OK) status = th_grad_split(joint, remat, out);
    if (status == TH_OK) status = th_trace_verify(out->forward);
    if (status == TH_OK) status = th_trace_verify(out->backward);
    return status;
}

static void catalogue_rules_make_forward_and_backward(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_halves halves = {0};
    th_joint joint = {0};
    int asked = 0;
    CHECK(halves_of(ctx, mlp, TH_REMAT_OFF, &halves, &joint, &asked) == TH_OK);
    CHECK(asked == 0);
    CHECK(joint.nresults == 1 && joint.ntangents == 1 && joint.nwrt == 2 && joint.nmutated == 0);
    CHECK(halves.forward->ninputs == 3);
    CHECK(halves.backward->ninputs == halves.nsaved + 1);
    CHECK(count_calls(halves.forward, "torch.nn.functional.linear") == 2);
    CHECK(count_calls(halves.backward, "torch.mm") == 3); /* x requires no grad */
    CHECK(count_calls(halves.backward, "torch.exp") == 0);
    th_halves_fini(ctx, &halves);
    th_joint_fini(&joint);
    th_ctx_free(ctx);
}

static void cheap_results_are_made_again_rather_than_saved(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_halves off = {0}, cheap = {0};
    th_joint first = {0}, second = {0};
    int asked = 0;
    CHECK(halves_of(ctx, mlp, TH_REMAT_OFF, &off, &first, &asked) == TH_OK);
    CHECK(halves_of(ctx, mlp, TH_REMAT_AUTO, &cheap, &second, &asked) == TH_OK);
    CHECK(cheap.bytes_kept == 8 * 16 * 4);                /* exp's result alone */
    CHECK(off.bytes_kept == 2 * 8 * 16 * 4);              /* exp's result and the product's */
    CHECK(count_calls(cheap.backward, "torch.exp") == 0); /* of what costs the same the latest is saved */
    CHECK(count_calls(cheap.backward, "torch.mul") == count_calls(off.backward, "torch.mul") + 1);
    th_halves_fini(ctx, &off);
    th_halves_fini(ctx, &cheap);
    th_joint_fini(&first);
    th_joint_fini(&second);
    th_ctx_free(ctx);
}

static void where_regions_are_fused_scores_are_saved_and_not_their_logarithms(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_halves plain = {0}, fused = {0};
    th_joint first = {0}, second = {0};
    int asked = 0;
    const char *text = "def computation(x: \"cpu f32[8, 4]\", w: \"cpu f32[16, 4] grad\", labels: \"cpu i64[8]\"):\n"
                       "    t0: \"cpu f32[8, 16]\" = torch.nn.functional.linear(x, w)\n"
                       "    t1: \"cpu f32[]\" = torch.nn.functional.cross_entropy(t0, labels)\n"
                       "    return t1\n";
    CHECK(halves_of(ctx, text, TH_REMAT_AUTO, &plain, &first, &asked) == TH_OK);
    CHECK(halves_of(ctx, text, TH_REMAT_FUSED, &fused, &second, &asked) == TH_OK);
    CHECK(count_calls(plain.backward, "torch.log_softmax") == 0);
    CHECK(count_calls(fused.forward, "torch.log_softmax") == 1);
    CHECK(count_calls(fused.forward, "thunder._rows.logsumexp") == 1);
    CHECK(count_calls(fused.backward, "thunder._rows.log_softmax") == 1);
    CHECK(count_calls(fused.backward, "torch.nn.functional.linear") == 0);
    CHECK(fused.bytes_kept == plain.bytes_kept + 8 * 4); /* a number for each row */
    th_halves_fini(ctx, &plain);
    th_halves_fini(ctx, &fused);
    th_joint_fini(&first);
    th_joint_fini(&second);
    th_ctx_free(ctx);
}

static void where_regions_are_fused_what_was_put_together_for_a_product_is_saved(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_halves plain = {0}, fused = {0};
    th_joint first = {0}, second = {0};
    int asked = 0;
    const char *text =
        "def computation(x: \"cpu f32[8, 4]\", w: \"cpu f32[16, 4] grad\", v: \"cpu f32[2, 32] grad\"):\n"
        "    t0: \"cpu f32[8, 16]\" = torch.nn.functional.linear(x, w)\n"
        "    t1: \"cpu f32[8, 16]\" = torch.neg(t0)\n"
        "    t2: \"cpu f32[8, 32]\" = torch.cat([t0, t1], 1)\n"
        "    t3: \"cpu f32[8, 32]\" = torch.mul(t2, 2.0)\n"
        "    t4: \"cpu f32[8, 2]\" = torch.nn.functional.linear(t3, v)\n"
        "    return t4\n";
    CHECK(halves_of(ctx, text, TH_REMAT_AUTO, &plain, &first, &asked) == TH_OK);
    CHECK(halves_of(ctx, text, TH_REMAT_FUSED, &fused, &second, &asked) == TH_OK);
    CHECK(count_calls(plain.backward, "torch.cat") == 1);
    CHECK(count_calls(fused.backward, "torch.cat") == 0);
    CHECK(plain.bytes_kept == 8 * 16 * 4 && fused.bytes_kept == 8 * 32 * 4);
    th_halves_fini(ctx, &plain);
    th_halves_fini(ctx, &fused);
    th_joint_fini(&first);
    th_joint_fini(&second);
    th_ctx_free(ctx);
}

static void what_is_made_again_is_made_where_it_is_needed(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_halves halves = {0};
    th_joint joint = {0};
    int asked = 0;
    const char *text =
        "def computation(x: \"cpu f32[8, 4]\", w: \"cpu f32[16, 4] grad\", v: \"cpu f32[2, 16] grad\"):\n"
        "    t0: \"cpu f32[8, 16]\" = torch.nn.functional.linear(x, w)\n"
        "    t1: \"cpu f32[8, 16]\" = torch.mul(t0, 3.0)\n"
        "    t2: \"cpu f32[8, 16]\" = torch.exp(t0)\n"
        "    t3: \"cpu f32[8, 2]\" = torch.nn.functional.linear(t1, v)\n"
        "    t4: \"cpu f32[8, 2]\" = torch.nn.functional.linear(t2, v)\n"
        "    t5: \"cpu f32[8, 2]\" = torch.mul(t3, t4)\n"
        "    return t5\n";
    CHECK(halves_of(ctx, text, TH_REMAT_AUTO, &halves, &joint, &asked) == TH_OK);
    const th_trace *t = halves.backward;
    th_opref again = 0;
    for (th_opref o = 1; o < t->nops && !again; o++)
        if (t->ops[o].kind == TH_OP_CALL && strcmp(th_str_get(ctx, t->ops[o].callee), "torch.exp") == 0) again = o;
    CHECK(again > 1); /* not at once: the product's derivative comes before it */
    th_val made = t->nodes[t->ops[again].outs].u.ref;
    th_opref after = again + 1;
    while (t->ops[after].kind == TH_OP_DEL) after++;
    const th_node_data *next = &t->nodes[t->ops[after].args];
    bool used = false;
    for (uint32_t i = 0; i < next->count; i++) {
        const th_node_data *arg = &t->nodes[t->kids[next->u.kids + i]];
        used |= arg->kind == TH_N_VALUE && arg->u.ref == made;
    }
    CHECK(used);
    th_halves_fini(ctx, &halves);
    th_joint_fini(&joint);
    th_ctx_free(ctx);
}

static void an_operation_without_a_rule_is_declined_with_its_reason(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_halves halves = {0};
    th_joint joint = {0};
    int asked = 0;
    const char *text = "def computation(x: \"cpu f32[2] grad\"):\n"
                       "    t0: \"cpu f32[2]\" = torch.nobody_knows(x)\n"
                       "    return t0\n";
    CHECK(halves_of(ctx, text, TH_REMAT_AUTO, &halves, &joint, &asked) == TH_DECLINED);
    CHECK(asked == 1);
    CHECK_TEXT(th_ctx_error(ctx)->text, "no rule");
    th_joint_fini(&joint);
    th_ctx_free(ctx);
}

static void marks_keep_operations_out_of_the_derivative(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_halves halves = {0};
    th_joint joint = {0};
    int asked = 0;
    const char *text = "def computation(x: \"cpu f32[2] grad\"):\n"
                       "    t0: \"cpu f32[2]; no_grad\" = torch.exp(x)\n"
                       "    t1: \"cpu f32[2]\" = torch.mul(x, t0)\n"
                       "    return t1\n";
    th_trace *t = check_parse(ctx, text);
    char *printed = NULL;
    CHECK(th_trace_print(t, &printed, NULL) == TH_OK);
    CHECK_TEXT(printed, text);
    th_ctx_alloc(ctx, printed, 0);
    th_trace_free(t);
    CHECK(halves_of(ctx, text, TH_REMAT_OFF, &halves, &joint, &asked) == TH_OK);
    CHECK(count_calls(halves.backward, "torch.mul") == 1); /* the gradient of x by way of exp would be a second one */
    th_halves_fini(ctx, &halves);
    th_joint_fini(&joint);
    th_ctx_free(ctx);
}

static const char *const backward = "def backward(a: \"cpu f32[2]\", g: \"cpu f32[2]\", h: \"cpu f32[2]\"):\n"
                                    "    t0: \"cpu f32[2]\" = torch.mul(h, a)\n"
                                    "    t1: \"cpu f32[2]\" = torch.mul(g, a)\n"
                                    "    t2: \"cpu f32[2]\" = torch.add(t1, t0)\n"
                                    "    t3: \"cpu f32[4]\" = torch.cat([t2, t0])\n"
                                    "    return (t2, t3, t0)\n";

static void what_is_computed_of_absent_gradients_is_not(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_trace *t = check_parse(ctx, backward);
    char *printed = NULL;
    CHECK(th_grad_without(t, 2, 2) == TH_OK);
    CHECK(th_trace_verify(t) == TH_OK);
    CHECK(t->ninputs == 3);
    CHECK(count_calls(t, "torch.mul") == 1 && count_calls(t, "torch.add") == 0);
    CHECK(count_calls(t, "torch.zeros") == 1 && count_calls(t, "torch.cat") == 1);
    CHECK(th_trace_print(t, &printed, NULL) == TH_OK);
    CHECK(strstr(printed, ", None)"));
    th_ctx_alloc(ctx, printed, 0);
    th_trace_free(t);
    th_ctx_free(ctx);
}

static void a_comparison_of_absent_gradients_is_declined(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_trace *t = check_parse(ctx, "def backward(g: \"cpu f32[2]\", h: \"cpu f32[2]\"):\n"
                                   "    t0: \"cpu b8[2]\" = torch.eq(h, 0)\n"
                                   "    t1: \"cpu f32[2]\" = torch.mul(g, t0)\n"
                                   "    return t1\n");
    CHECK(th_grad_without(t, 2, 2) == TH_DECLINED);
    th_trace_free(t);
    th_ctx_free(ctx);
}

static void memory_may_run_out_at_any_request(void) {
    long survived = 0;
    for (long n = 1;; n++) {
        check_alloc alloc = {.fail_at = n};
        th_ctx *ctx = th_ctx_new(check_alloc_fn, &alloc);
        th_halves halves = {0};
        th_joint joint = {0};
        int asked = 0;
        th_status status = ctx ? halves_of(ctx, mlp, TH_REMAT_AUTO, &halves, &joint, &asked) : TH_ENOMEM;
        bool failed = alloc.requests >= n;
        CHECK(failed ? status != TH_OK || halves.forward : status == TH_OK);
        CHECK(status == TH_OK || status == TH_ENOMEM || status == TH_DECLINED);
        if (ctx) {
            th_halves_fini(ctx, &halves);
            th_joint_fini(&joint);
            th_ctx_free(ctx);
        }
        CHECK(alloc.live == 0);
        if (!failed) break;
        survived++;
    }
    CHECK(survived > 100);
}

int main(void) {
    catalogue_rules_make_forward_and_backward();
    cheap_results_are_made_again_rather_than_saved();
    where_regions_are_fused_scores_are_saved_and_not_their_logarithms();
    where_regions_are_fused_what_was_put_together_for_a_product_is_saved();
    what_is_made_again_is_made_where_it_is_needed();
    an_operation_without_a_rule_is_declined_with_its_reason();
    marks_keep_operations_out_of_the_derivative();
    what_is_computed_of_absent_gradients_is_not();
    a_comparison_of_absent_gradients_is_declined();
    memory_may_run_out_at_any_request();
    return check_report("test_grad");
}
