/* The catalogue's index and the binding of call arguments to parameters. */
#include "check.h"

static th_ctx *ctx;

/* Bind torch.f's arguments in `call_text` to `params`; returns the bound arguments printed as one list, or "declined".
 */
static const char *bound(const char *params, const char *call_text) {
    static char out[400];
    char text[400];
    th_opdef def = {.name = "f", .params = params, .names = "torch.f"};
    th_call call = {0};
    snprintf(text, sizeof text, "def f(x: \"int\", y: \"int\"):\n    torch.f(%s)\n    return None\n", call_text);
    th_trace *t = check_parse(ctx, text);
    th_status status = th_call_bind(&call, &def, t, t->ops[1].args, t->ops[1].kwargs);
    snprintf(out, sizeof out, "%s", th_status_text(status));
    if (status == TH_OK) {
        char *printed = NULL;
        th_node shown[TH_MAX_PARAMS];
        for (uint32_t i = 0; i < call.nparams; i++) shown[i] = call.arg[i] ? call.arg[i] : th_node_ellipsis(t);
        t->result = th_node_seq(t, TH_N_LIST, call.nparams, shown);
        CHECK(th_trace_print(t, &printed, NULL) == TH_OK);
        snprintf(out, sizeof out, "%s", strstr(printed, "return ") + 7);
        out[strcspn(out, "\n")] = '\0';
        th_ctx_alloc(ctx, printed, 0);
    }
    th_trace_free(t);
    return out;
}

static void test_arguments_bind_by_position_and_by_name(void) {
    static const char linear[] = "input, weight, bias=None", sum[] = "input, dim=None, keepdim=False, *, dtype=None";
    CHECK_TEXT(bound(linear, "x, y"), "[x, y, ...]");
    CHECK_TEXT(bound(linear, "x, bias=1, weight=y"), "[x, y, 1]");
    CHECK_TEXT(bound(linear, "x"), "declined");
    CHECK_TEXT(bound(linear, "x, y, 1, 2"), "declined");
    CHECK_TEXT(bound(linear, "x, y, input=x"), "declined");
    CHECK_TEXT(bound(linear, "x, y, unknown=1"), "declined");
    CHECK_TEXT(bound(sum, "x, (0, 1), dtype=torch.float32"), "[x, (0, 1), ..., torch.float32]");
    CHECK_TEXT(bound(sum, "x, 0, True, torch.float32"), "declined");
    CHECK_TEXT(bound("", ""), "[]");
}

static void test_rest_parameters_collect(void) {
    static const char view[] = "input, *size", zeros[] = "*size, dtype=None";
    CHECK_TEXT(bound(view, "x, 1, 2"), "[x, (1, 2)]");
    CHECK_TEXT(bound(view, "x, (1, 2)"), "[x, ((1, 2),)]");
    CHECK_TEXT(bound(view, "x, size=(1, 2)"), "[x, (1, 2)]");
    CHECK_TEXT(bound(view, "x, 1, size=(1, 2)"), "declined");
    CHECK_TEXT(bound(view, "x"), "[x, ...]");
    CHECK_TEXT(bound(zeros, "2, 3, dtype=torch.int64"), "[(2, 3), torch.int64]");
}

static void test_the_index_finds_every_name_of_every_entry(void) {
    th_catalog *catalog = NULL;
    CHECK(th_catalog_new(ctx, &catalog) == TH_OK);
    if (!catalog) fprintf(stderr, "%s\n", th_ctx_error(ctx)->text);
    for (size_t i = 0; catalog && i < th_catalog_size(); i++) {
        const th_opdef *def = th_catalog_get(i);
        char names[2000];
        snprintf(names, sizeof names, "%s", def->names);
        for (char *name = strtok(names, " "); name; name = strtok(NULL, " ")) {
            CHECK(th_catalog_find(catalog, th_intern_z(ctx, name)) == def);
        }
    }
    CHECK(th_catalog_get(th_catalog_size()) == NULL);
    CHECK(th_catalog_find(catalog, th_intern_z(ctx, "torch.no_such_operator")) == NULL);
    CHECK(th_catalog_find(catalog, 0) == NULL);
    th_catalog_free(catalog);
}

int main(void) {
    ctx = th_ctx_new(NULL, NULL);
    test_arguments_bind_by_position_and_by_name();
    test_rest_parameters_collect();
    test_the_index_finds_every_name_of_every_entry();
    th_ctx_free(ctx);
    return check_report("test_catalog");
}
