/* Claims: which operations become one unit, in which order units run, and memory that runs out at any request. */
#include "check.h"

#include "thunder/claim.h"
#include "thunder/passes.h"

typedef struct owner { /* of what it claims: operations whose callee contains one of its words */
    const char *words[4];
    uint32_t cut;
    th_trace *bodies[16];
    uint32_t nbodies;
    char objects[16];
} owner;

static th_status ask(void *user, th_trace *t, th_opref op, th_claim *claim) {
    const owner *o = user;
    for (int i = 0; i < 4 && o->words[i]; i++)
        if (strstr(th_str_get(t->ctx, t->ops[op].callee), o->words[i])) *claim = (th_claim){1, true, o->cut};
    return TH_OK;
}

static th_status bind(void *user, uint32_t number, bool fused, th_trace *body, const char **hint, void **object) {
    owner *o = user;
    CHECK(number == 1 && fused);
    if (o->nbodies == 16) {
        th_trace_free(body);
        return TH_OK;
    }
    *hint = "unit";
    *object = &o->objects[o->nbodies];
    o->bodies[o->nbodies++] = body;
    return TH_OK;
}

static void owner_fini(owner *o) {
    for (uint32_t i = 0; i < o->nbodies; i++) th_trace_free(o->bodies[i]);
    o->nbodies = 0;
}

static th_status claim(th_ctx *ctx, const char *text, owner *o, th_trace **out) {
    th_status status = th_trace_parse(ctx, text, strlen(text), out);
    const th_claim_options options = {ask, bind, o};
    if (status == TH_OK) status = th_claim_run(*out, &options);
    if (status == TH_OK) status = th_trace_verify(*out);
    for (uint32_t i = 0; i < o->nbodies && status == TH_OK; i++) status = th_trace_verify(o->bodies[i]);
    return status;
}

static void expect(const char *text, owner *o, const char *wanted) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_trace *t = NULL;
    char *printed = NULL;
    CHECK(claim(ctx, text, o, &t) == TH_OK);
    CHECK(th_trace_print(t, &printed, NULL) == TH_OK);
    CHECK_TEXT(printed, wanted);
    th_ctx_alloc(ctx, printed, 0);
    th_trace_free(t);
    owner_fini(o);
    th_ctx_free(ctx);
}

#define X    "x: \"cpu f32[4]\""
#define T(n) "    t" #n ": \"cpu f32[4]\" = "

static const char *const around = "def computation(" X "):\n" T(0) "torch.sin(x)\n" T(1) "torch.cos(t0)\n" T(
    2) "torch.mul(t0, 2)\n" T(3) "torch.add(t1, t2)\n" T(4) "torch.sin(t3)\n    return t4\n";

/* cos is nobody's: what comes after it cannot run together with what comes before. */
static void regions_are_convex(void) {
    owner o = {.words = {"sin", "mul", "add"}};
    expect(around, &o,
           "def computation(" X "):\n"
           "    t0: \"cpu f32[4]\"\n"
           "    (t0,) = unit(x)\n" T(1) "torch.cos(t0)\n"
                                        "    t4: \"cpu f32[4]\"\n"
                                        "    (t4,) = unit_1(t0, t1)\n"
                                        "    return t4\n");
}

static void a_write_stays_after_what_reads_and_before_what_reads_later(void) {
    owner o = {.words = {"sin", "mul"}};
    expect("def computation(x: \"cpu f32[4]; alias 1\"):\n" T(0) "torch.sin(x)\n"
                                                                 "    _: \"writes x\" = torch.Tensor.zero_(x)\n" T(
                                                                     1) "torch.sin(x)\n" T(2) "torch.mul(t0, t1)\n"
                                                                                              "    return t2\n",
           &o,
           "def computation(x: \"cpu f32[4]; alias 1\"):\n"
           "    t0: \"cpu f32[4]\"\n"
           "    (t0,) = unit(x)\n"
           "    _: \"writes x\" = torch.Tensor.zero_(x)\n"
           "    t2: \"cpu f32[4]\"\n"
           "    (t2,) = unit_1(x, t0)\n"
           "    return t2\n");
}

static void long_regions_end_where_one_value_goes_on(void) {
    owner o = {.words = {"torch."}, .cut = 2};
    expect("def computation(" X "):\n" T(0) "torch.sin(x)\n" T(1) "torch.cos(t0)\n" T(2) "torch.sin(t1)\n" T(
               3) "torch.cos(t2)\n    return t3\n",
           &o,
           "def computation(" X "):\n"
           "    t1: \"cpu f32[4]\"\n"
           "    (t1,) = unit(x)\n"
           "    t3: \"cpu f32[4]\"\n"
           "    (t3,) = unit_1(t1)\n"
           "    return t3\n");
}

static void a_part_ends_no_sooner_than_the_value_is_small(void) {
    owner o = {.words = {"torch."}, .cut = 2};
    expect("def computation(" X
           "):\n" T(0) "torch.sin(x)\n" T(1) "torch.cos(t0)\n"
                                             "    t2: \"cpu bf16[4]\" = torch.Tensor.to(t1, torch.bfloat16)\n"
                                             "    t3: \"cpu bf16[4]\" = torch.sin(t2)\n"
                                             "    t4: \"cpu bf16[4]\" = torch.cos(t3)\n    return t4\n",
           &o,
           "def computation(" X "):\n"
           "    t2: \"cpu bf16[4]\"\n"
           "    (t2,) = unit(x)\n"
           "    t4: \"cpu bf16[4]\"\n"
           "    (t4,) = unit_1(t2)\n"
           "    return t4\n");
}

static void each_part_ends_where_one_value_goes_on(void) {
    owner o = {.words = {"torch."}, .cut = 2};
    expect("def computation(" X "):\n" T(0) "torch.sin(x)\n" T(1) "torch.cos(t0)\n" T(2) "torch.sin(t1)\n" T(
               3) "torch.cos(t1)\n" T(4) "torch.sin(t3)\n" T(5) "torch.cos(t2)\n" T(6) "torch.sin(t5)\n"
                                                                                       "    return (t4, t6)\n",
           &o,
           "def computation(" X "):\n"
           "    t1: \"cpu f32[4]\"\n"
           "    (t1,) = unit(x)\n"
           "    t2: \"cpu f32[4]\"\n"
           "    t4: \"cpu f32[4]\"\n"
           "    t2, t4 = unit_1(t1)\n"
           "    t6: \"cpu f32[4]\"\n"
           "    (t6,) = unit_2(t2)\n"
           "    return (t4, t6)\n");
}

static void memory_may_run_out_at_any_request(void) {
    int survived = 0;
    for (long n = 1;; n++) {
        check_alloc alloc = {.fail_at = n};
        th_ctx *ctx = th_ctx_new(check_alloc_fn, &alloc);
        owner o = {.words = {"sin", "mul", "add"}};
        th_trace *t = NULL;
        th_status status = ctx ? claim(ctx, around, &o, &t) : TH_ENOMEM;
        bool failed = alloc.requests >= n;
        CHECK(failed || status == TH_OK);
        CHECK(status == TH_OK || status == TH_ENOMEM);
        if (ctx) {
            th_trace_free(t);
            owner_fini(&o);
            th_ctx_free(ctx);
        }
        CHECK(alloc.live == 0);
        if (!failed) break;
        survived++;
    }
    CHECK(survived > 20);
}

int main(void) {
    regions_are_convex();
    a_write_stays_after_what_reads_and_before_what_reads_later();
    long_regions_end_where_one_value_goes_on();
    a_part_ends_no_sooner_than_the_value_is_small();
    each_part_ends_where_one_value_goes_on();
    memory_may_run_out_at_any_request();
    return check_report("test_claim");
}
