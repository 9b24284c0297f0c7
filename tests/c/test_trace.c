/* Contexts and traces as built from C: interning, names, verification, equality, copies, opaque objects. */
#include "check.h"

static th_ctx *ctx;

static th_typeref f32(int64_t a, int64_t b) {
    int64_t shape[2] = {a, b};
    return th_type_tensor(ctx, TH_F32, th_device(ctx, "cpu", -1), 2, shape, NULL, 0);
}

static th_opref unary(th_trace *t, const char *callee, th_val x, th_val y) {
    th_node arg = th_node_value(t, x);
    th_op_args op = {.kind = TH_OP_CALL,
                     .callee = th_intern_z(ctx, callee),
                     .args = th_node_seq(t, TH_N_TUPLE, 1, &arg),
                     .outs = y ? th_node_value(t, y) : 0};
    return th_trace_op(t, &op);
}

static th_trace *chain(void) { /* x -> t0 -> t1 */
    th_trace *t = th_trace_new(ctx, "chain");
    th_val x = th_trace_input(t, th_intern_z(ctx, "x"), f32(2, 3));
    th_val a = th_trace_value(t, 0, f32(2, 3)), b = th_trace_value(t, 0, f32(2, 3));
    unary(t, "torch.sin", x, a);
    unary(t, "torch.cos", a, b);
    t->result = th_node_value(t, b);
    CHECK(th_trace_status(t) == TH_OK);
    return t;
}

static void test_strings_devices_and_types_are_interned_once(void) {
    char text[24];
    th_str first = th_intern_z(ctx, "name-0");
    for (int i = 0; i < 1000; i++) {
        snprintf(text, sizeof text, "name-%d", i % 500);
        th_str s = th_intern_z(ctx, text);
        CHECK(s != 0 && strcmp(th_str_get(ctx, s), text) == 0);
    }
    CHECK(th_intern_z(ctx, "name-0") == first);
    CHECK(th_intern(ctx, "a\0b", 3) != th_intern(ctx, "a\0c", 3) && th_str_len(ctx, th_intern(ctx, "a\0b", 3)) == 3);
    CHECK(th_intern(ctx, "", 0) != 0);
    CHECK(th_device(ctx, "cuda", 1) == th_device(ctx, "cuda", 1) &&
          th_device(ctx, "cuda", 1) != th_device(ctx, "cuda", 0));
    CHECK(th_device(ctx, "two words", 0) == 0 && th_device(ctx, "", -1) == 0 && th_device(ctx, "cpu", -2) == 0);
    CHECK(f32(2, 3) == f32(2, 3) && f32(2, 3) != f32(3, 2));
    int64_t shape[2] = {2, 3}, rows[2] = {3, 1}, columns[2] = {1, 2}, negative[1] = {-1},
            huge[2] = {1ll << 40, 1ll << 40};
    th_dev cpu = th_device(ctx, "cpu", -1);
    CHECK(th_type_tensor(ctx, TH_F32, cpu, 2, shape, rows, 0) == f32(2, 3));
    CHECK(th_type_tensor(ctx, TH_F32, cpu, 2, shape, columns, 0) != f32(2, 3));
    CHECK(!th_type_get(ctx, th_type_tensor(ctx, TH_F32, cpu, 2, shape, columns, 0))->contiguous);
    CHECK(th_type_tensor(ctx, TH_F32, cpu, 1, negative, NULL, 0) == 0);
    CHECK(th_type_tensor(ctx, TH_F32, cpu, 2, huge, NULL, 0) == 0 && th_ctx_error(ctx)->status == TH_ELIMIT);
    CHECK(th_type_tensor(ctx, TH_DTYPE_NONE, cpu, 2, shape, NULL, 0) == 0);
    CHECK(th_type_numel(th_type_get(ctx, f32(5, 0))) == 0 && th_type_numel(th_type_get(ctx, f32(5, 4))) == 20);
    CHECK(th_type_get(ctx, 0)->kind == TH_TYPE_NONE && th_type_get(ctx, 12345)->kind == TH_TYPE_NONE);
}

static void test_a_type_prints_into_a_fixed_buffer(void) {
    char text[64], small[8];
    int64_t shape[3] = {2, 3, 4}, stride[3] = {1, 2, 6};
    th_typeref type = th_type_tensor(ctx, TH_BF16, th_device(ctx, "cuda", 0), 3, shape, stride, TH_TYPE_REQUIRES_GRAD);
    CHECK(th_type_print(ctx, type, text, sizeof text) == TH_OK);
    CHECK_TEXT(text, "cuda:0 bf16[2, 3, 4]{1, 2, 6} grad");
    CHECK(th_type_print(ctx, type, small, sizeof small) == TH_ELIMIT && strlen(small) < sizeof small);
}

static void test_every_rank_is_a_type(void) {
    int64_t shape[200];
    for (int i = 0; i < 200; i++) shape[i] = 1;
    th_typeref type = th_type_tensor(ctx, TH_I8, th_device(ctx, "meta", -1), 200, shape, NULL, 0);
    CHECK(type != 0 && th_type_get(ctx, type)->ndim == 200 && th_type_get(ctx, type)->stride[0] == 1);
}

static void test_names_are_made_unique_identifiers(void) {
    static const char *const wanted[][2] = {{"x", "x"},    {"x", "x_1"},        {"x", "x_2"},     {"self.w", "self_w"},
                                            {"2d", "_2d"}, {"", "v"},           {"for", "for_1"}, {"torch", "torch_1"},
                                            {"t0", "t0"},  {"\303\251", "___1"}};
    th_trace *t = th_trace_new(ctx, "f");
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        th_val v = th_trace_input(t, th_intern_z(ctx, wanted[i][0]), f32(1, 1));
        if (i != 9) CHECK_TEXT(th_str_get(ctx, t->values[v].name), wanted[i][1]);
    }
    th_val fresh = th_trace_value(t, 0, f32(1, 1));
    CHECK_TEXT(th_str_get(ctx, t->values[fresh].name), "t1"); /* t0 is taken */
    CHECK(th_trace_opaque(t, "x", &fresh) == th_trace_opaque(t, "other", &fresh));
    CHECK_TEXT(th_str_get(ctx, t->opaques[1].name), "x_3");
    for (int i = 0; i < 3000; i++) th_trace_input(t, th_intern_z(ctx, "weight"), f32(1, 1));
    CHECK(th_trace_status(t) == TH_OK && th_trace_verify(t) == TH_OK);
    th_trace_free(t);
}

static void test_outs_are_normalised(void) {
    th_trace *t = th_trace_new(ctx, "f");
    th_val a = th_trace_value(t, 0, f32(1, 1));
    th_op_args op = {
        .kind = TH_OP_CALL, .callee = th_intern_z(ctx, "torch.f"), .outs = th_node_value(t, a), .outs_list = true};
    th_opref one = th_trace_op(t, &op);
    CHECK(t->nodes[t->ops[one].outs].kind == TH_N_TUPLE && t->values[a].def == one);
    op.outs = th_node_none(t);
    th_opref none = th_trace_op(t, &op);
    op.outs = th_node_seq(t, TH_N_TUPLE, 0, NULL);
    th_opref empty = th_trace_op(t, &op);
    CHECK(t->ops[none].outs == 0 && t->ops[empty].outs == 0);
    CHECK(th_trace_verify(t) == TH_OK);
    th_trace_free(t);
}

static int live_objects;
static void object_retain(void *object) { live_objects += *(int *)object; }
static void object_release(void *object) { live_objects -= *(int *)object; }

static void test_opaque_objects_are_kept_by_each_trace_that_holds_them(void) {
    int object = 1;
    th_trace *t = th_trace_new(ctx, "f"), *copy = NULL;
    th_trace_set_opaque_vtable(t, (th_opaque_vtable){object_retain, object_release});
    t->result = th_node_opaque(t, "thing", &object);
    th_node_opaque(t, "thing", &object);
    CHECK(live_objects == 1);
    CHECK(th_trace_clone(t, &copy) == TH_OK && live_objects == 2);
    CHECK(th_trace_equal(t, copy) && th_trace_hash(t) == th_trace_hash(copy));
    th_trace_free(t);
    CHECK(live_objects == 1);
    th_trace_free(copy);
    CHECK(live_objects == 0);
}

static void test_equality_sees_what_the_text_says_and_no_names(void) {
    static const char base[] = "def f(x: \"cpu f32[2]; alias 3\", n: \"int\"):\n"
                               "    y: \"cpu f32[1]; alias 3; offset 1\" = torch.g(x, 1, a=n)  # m.py:1\n"
                               "    return (y, 1.0)\n";
    static const char renamed[] = "# note\ndef g(a: \"cpu f32[2]; alias 9\", b: \"int\"):\n"
                                  "    c: \"cpu f32[1]; alias 9; offset 1\" = torch.g(a, 1, a=b)\n"
                                  "    return (c, 1.0)\n";
    static const char *const others[][2] = {{"f32[2]", "f64[2]"},
                                            {"alias 3\", n", "alias 4\", n"},
                                            {"offset 1", "offset 2"},
                                            {"torch.g", "torch.h"},
                                            {"x, 1", "x, 2"},
                                            {"x, 1", "x, True"},
                                            {"a=n", "b=n"},
                                            {"(y, 1.0)", "(x, 1.0)"},
                                            {"(y, 1.0)", "[y, 1.0]"},
                                            {"1.0", "1"},
                                            {"; offset 1\"", "; offset 1; random\""}};
    th_ctx *elsewhere = th_ctx_new(NULL, NULL);
    th_intern_z(elsewhere, "shifts the numbering");
    th_trace *a = check_parse(ctx, base), *b = check_parse(ctx, renamed), *c = check_parse(elsewhere, renamed);
    CHECK(th_trace_equal(a, b) && th_trace_hash(a) == th_trace_hash(b));
    CHECK(th_trace_equal(a, c) && th_trace_hash(a) == th_trace_hash(c));
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        char text[300];
        const char *at = strstr(base, others[i][0]);
        snprintf(text, sizeof text, "%.*s%s%s", (int)(at - base), base, others[i][1], at + strlen(others[i][0]));
        th_trace *other = check_parse(ctx, text);
        CHECK(!th_trace_equal(a, other));
        CHECK(th_trace_hash(a) != th_trace_hash(other));
        th_trace_free(other);
    }
    th_trace_free(a);
    th_trace_free(b);
    th_trace_free(c);
    th_ctx_free(elsewhere);
}

/* ---- the verifier refuses every way to be wrong ---- */

static void bad_use_before(th_trace *t) { t->ops[1].args = t->ops[2].args; }
static void bad_def(th_trace *t) { t->values[2].def = 2; }
static void bad_twice(th_trace *t) { t->ops[2].outs = t->ops[1].outs; }
static void bad_input(th_trace *t) { t->inputs[0] = 2; }
static void bad_type(th_trace *t) { t->values[2].type = 0; }
static void bad_alias(th_trace *t) { t->values[2].alias = 7; }
static void bad_offset(th_trace *t) { t->values[2].offset = -1; }
static void bad_name(th_trace *t) { t->values[2].name = t->values[1].name; }
static void bad_keyword(th_trace *t) { t->values[2].name = th_intern_z(ctx, "lambda"); }
static void bad_reserved(th_trace *t) { t->values[2].name = th_intern_z(ctx, "torch"); }
static void bad_callee(th_trace *t) { t->ops[1].callee = th_intern_z(ctx, "undotted"); }
static void bad_kind(th_trace *t) { t->ops[1].kind = 9; }
static void bad_args(th_trace *t) { t->ops[1].args = t->result; }
static void bad_no_args(th_trace *t) { t->ops[1].args = 0; }
static void bad_kwargs(th_trace *t) { t->ops[1].kwargs = t->ops[1].args; }
static void bad_outs(th_trace *t) { t->ops[2].outs = th_node_int(t, 1); }
static void bad_list(th_trace *t) { t->ops[1].outs_list = true; }
static void bad_effect(th_trace *t) { t->ops[1].effects = TH_FX_WRITES; }
static void bad_unknown_effect(th_trace *t) { t->ops[1].effects = 64; }
static void bad_result(th_trace *t) { t->result = 999; }
static void bad_value(th_trace *t) { t->nodes[t->result].u.ref = 999; }
static void bad_node_kind(th_trace *t) { t->nodes[t->result].kind = 99; }
static void bad_cycle(th_trace *t) { t->kids[t->nodes[t->ops[1].args].u.kids] = t->ops[1].args; }
static void bad_kids(th_trace *t) { t->nodes[t->ops[1].args].count = 100000; }
static void bad_symbol(th_trace *t) { t->result = th_node_symbol(t, th_intern_z(ctx, "torch.float32")); }
static void bad_slice(th_trace *t) { t->result = th_node_seq(t, TH_N_SLICE, 1, &t->result); }
static void bad_dict(th_trace *t) { t->result = th_node_seq(t, TH_N_DICT, 1, &t->result); }
static void bad_opaque(th_trace *t) { t->ops[1].callee_opaque = 5; }
static void bad_del(th_trace *t) {
    th_node v[2] = {th_node_value(t, 3), th_node_value(t, 3)};
    th_op_args op = {.kind = TH_OP_DEL, .args = th_node_seq(t, TH_N_TUPLE, 2, v)};
    th_trace_op(t, &op);
}
static void bad_return_deleted(th_trace *t) {
    th_node v = th_node_value(t, 3);
    th_op_args op = {.kind = TH_OP_DEL, .args = th_node_seq(t, TH_N_TUPLE, 1, &v)};
    th_trace_op(t, &op);
}
static void bad_shared(th_trace *t) { /* 2^60 visits without the bound */
    for (int i = 0; i < 60; i++) {
        th_node twice[2] = {t->result, t->result};
        t->result = th_node_seq(t, TH_N_TUPLE, 2, twice);
    }
}

static void test_the_verifier_refuses_what_is_not_well_formed(void) {
    static void (*const damage[])(th_trace *) = {
        bad_use_before,     bad_def,     bad_twice,   bad_input,     bad_type,   bad_alias,
        bad_offset,         bad_name,    bad_keyword, bad_reserved,  bad_callee, bad_kind,
        bad_args,           bad_no_args, bad_kwargs,  bad_outs,      bad_list,   bad_effect,
        bad_unknown_effect, bad_result,  bad_value,   bad_node_kind, bad_cycle,  bad_kids,
        bad_symbol,         bad_slice,   bad_dict,    bad_opaque,    bad_del,    bad_return_deleted,
        bad_shared};
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {
        th_trace *t = chain();
        CHECK(th_trace_verify(t) == TH_OK);
        damage[i](t);
        th_status status = th_trace_verify(t);
        CHECK(status == TH_EVERIFY);
        if (status != TH_EVERIFY) fprintf(stderr, "damage %zu was not noticed\n", i);
        th_trace_free(t);
    }
}

static void test_the_verifier_names_the_operation_and_its_line(void) {
    th_trace *t = check_parse(ctx, "def f(x: \"int\"):\n    y: \"int\" = torch.g(x)  # model.py:7\n    return y\n");
    t->values[2].offset = -1;
    CHECK(th_trace_verify(t) == TH_EVERIFY);
    CHECK_TEXT(th_ctx_error(ctx)->text, "operation 1 (torch.g, model.py:7): y has a negative storage offset");
    th_trace_free(t);
}

static void count_value(void *user, th_val *value) { *(uint32_t *)user = *(uint32_t *)user * 10 + *value; }

static void test_walks_visit_uses_writes_and_outs_in_order(void) {
    th_trace *t = check_parse(ctx, "def f(x: \"cpu f32[2]\", y: \"cpu f32[2]\"):\n"
                                   "    z: \"cpu f32[2]; writes y\" = torch.g([x, (y, {\"a\": x})], b=y)\n"
                                   "    return z\n");
    uint32_t uses = 0, outs = 0;
    th_op_each_use(t, 1, count_value, &uses);
    th_op_each_out(t, 1, count_value, &outs);
    CHECK(uses == 12122 && outs == 3);
    th_trace_free(t);
}

static void test_errors_may_quote_the_error_before(void) {
    th_fail(ctx, TH_EINVAL, "inner");
    CHECK(th_fail(ctx, TH_EIO, "outer: %s", th_ctx_error(ctx)->text) == TH_EIO);
    CHECK_TEXT(th_ctx_error(ctx)->text, "outer: inner");
    CHECK_TEXT(th_status_text(TH_DECLINED), "declined");
    CHECK_TEXT(th_status_text((th_status)999), "unknown status");
}

static void test_building_survives_any_failing_allocation(void) {
    check_alloc alloc = {0};
    long tries = 0;
    for (bool done = false; !done; tries++) {
        alloc = (check_alloc){.fail_at = tries + 1};
        th_ctx *mine = th_ctx_new(check_alloc_fn, &alloc);
        if (!mine) continue;
        th_ctx *outer = ctx;
        ctx = mine;
        th_trace *t = th_trace_new(mine, "f"), *copy = NULL;
        char *text = NULL;
        if (t) {
            th_val v = th_trace_input(t, th_intern_z(mine, "x"), f32(2, 3));
            for (int i = 0; i < 40; i++) {
                th_val w = th_trace_value(t, 0, f32(2, i));
                unary(t, "torch.sin", v, w);
                v = w;
            }
            t->result = th_node_value(t, v);
            done = th_trace_status(t) == TH_OK && th_trace_clone(t, &copy) == TH_OK && th_trace_verify(t) == TH_OK &&
                   th_trace_print(t, &text, NULL) == TH_OK && th_trace_equal(t, copy);
            /* A name that could not be interned became a fresh one: the only failure that leaves no trace. */
            if (alloc.requests >= alloc.fail_at && done)
                done = false;
            else if (!done)
                CHECK(th_ctx_error(mine)->status == TH_ENOMEM);
        }
        th_ctx_alloc(mine, text, 0);
        th_trace_free(copy);
        th_trace_free(t);
        th_ctx_free(mine);
        ctx = outer;
        CHECK(alloc.live == 0);
    }
    CHECK(tries > 50);
}

int main(void) {
    ctx = th_ctx_new(NULL, NULL);
    test_strings_devices_and_types_are_interned_once();
    test_a_type_prints_into_a_fixed_buffer();
    test_every_rank_is_a_type();
    test_names_are_made_unique_identifiers();
    test_outs_are_normalised();
    test_opaque_objects_are_kept_by_each_trace_that_holds_them();
    test_equality_sees_what_the_text_says_and_no_names();
    test_the_verifier_refuses_what_is_not_well_formed();
    test_the_verifier_names_the_operation_and_its_line();
    test_walks_visit_uses_writes_and_outs_in_order();
    test_errors_may_quote_the_error_before();
    test_building_survives_any_failing_allocation();
    th_ctx_free(ctx);
    return check_report("test_trace");
}
