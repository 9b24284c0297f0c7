/* The text form: parse and print are inverse, every error has its place, floats and strings survive. */
#include "check.h"

#include <float.h>
#include <math.h>

/* parse(print(t)) equals t, hashes agree, a second print is the same text, and both verify. */
static void check_round_trip(th_trace *t) {
    char *once = NULL, *twice = NULL;
    th_trace *again = NULL;
    CHECK(th_trace_verify(t) == TH_OK);
    if (th_trace_verify(t) != TH_OK) fprintf(stderr, "%s\n", th_ctx_error(t->ctx)->text);
    CHECK(th_trace_print(t, &once, NULL) == TH_OK);
    again = check_parse(t->ctx, once);
    if (again) {
        CHECK(th_trace_verify(again) == TH_OK);
        CHECK(th_trace_equal(t, again));
        CHECK(th_trace_hash(t) == th_trace_hash(again));
        CHECK(th_trace_print(again, &twice, NULL) == TH_OK);
        CHECK_TEXT(twice, once);
    }
    th_ctx_alloc(t->ctx, once, 0);
    th_ctx_alloc(t->ctx, twice, 0);
    th_trace_free(again);
}

/* Texts in the canonical form: printing gives back exactly what was read. */
static const char *const canonical[] = {
    "def f():\n    return None\n",
    "# after dce (0.03 ms)\ndef f():\n    return None\n",
    "def f(x: \"cpu f32[2, 3]\"):\n    return x\n",
    "def f(x: \"cuda:1 bf16[2, 3]{1, 2} grad; alias 3; offset 7\", n: \"int\", a: \"float\", b: \"bool\", o: "
    "\"object\"):\n"
    "    return (x, [n, a], {\"b\": b, 1: o})\n",
    "def computation(x: \"cpu f32[16, 64]\", w: \"cpu f32[128, 64] grad\"):\n"
    "    t0: \"cpu f32[16, 128]\" = torch.nn.functional.linear(x, w)  # model.py:12\n"
    "    t1: \"cpu f32[8, 128]; alias 1\"\n"
    "    t2: \"cpu f32[8, 128]; alias 1; offset 1024\"\n"
    "    t1, t2 = torch.chunk(t0, 2)\n"
    "    t3: \"cpu f32[8, 128]; alias 1; writes t1\" = torch.Tensor.add_(t1, 1.0)\n"
    "    _: \"writes t2\" = torch.Tensor.__setitem__(t2, (0, slice(None, None, None)), 0.5)\n"
    "    t4: \"cpu f32[16, 128]; random\" = torch.nn.functional.dropout(t0, 0.5, True)\n"
    "    del t0, t3\n"
    "    return t4\n",
    "def f(x: \"cpu f32[]\"):\n"
    "    _: \"random; effect; writes x\"\n"
    "    _, _ = torch.strange(x)  # a file: with colon.py:3\n"
    "    a: \"cpu f32[0]\"\n"
    "    (a,) = torch.one(x)\n"
    "    b: \"int\"\n"
    "    c: \"int\"\n"
    "    d: \"int\"\n"
    "    b, (c, (_, d)), (_,) = torch.nested(x)\n"
    "    torch.nothing(x)\n"
    "    _: \"effect\" = print(x)\n"
    "    hook(x)\n"
    "    return (a,)\n",
    "def f(x: \"cpu f32[]\"):\n"
    "    t0: \"cpu f32[]\" = torch.literals(None, True, False, 1, -1, 9223372036854775807, -9223372036854775808, 0.5, "
    "-0.0, "
    "1e+16, 1e-05, 0.0001, 123456.789)\n"
    "    t1: \"cpu f32[]\" = torch.literals(float(\"inf\"), float(\"-inf\"), float(\"nan\"), complex(1.0, -2.5), "
    "complex(0.0, float(\"inf\")))\n"
    "    t2: \"cpu f32[]\" = torch.literals(torch.float32, torch.float8_e4m3fn, torch.device(\"cuda\", 0), "
    "torch.device(\"cpu\"), torch.strided, torch.preserve_format)\n"
    "    t3: \"cpu f32[]\" = torch.literals(\"\", \"a\\\"b\\\\c\\n\\t\\r\\x00\\x1f\\x7f\", \"\303\251\342\202\254\", "
    "\"\\ud800\")\n"
    "    t4: \"cpu f32[]\" = torch.literals((), (1,), (1, 2), [], [1], [[], [()]], {}, {\"a\": {}}, ..., slice(None, "
    "1, x))\n"
    "    t5: \"cpu f32[]\" = torch.literals(out=t0, memory_format=torch.channels_last, **{\"not a name\": 1}, "
    "**{\"from\": 2})\n"
    "    t6: \"object\" = my_function(my_object, my_object, key=other)\n"
    "    t7: \"cpu f4e2m1fnx2[2]\" = torch.ops.aten.add.Tensor(x, x)\n"
    "    return {\"a\": (t6, t7), \"b\": [None]}\n",
    "def f(\n"
    "    a_rather_long_name_of_an_input: \"cpu f32[1000, 1000]\",\n"
    "    another_rather_long_name_of_an_input: \"cpu f32[1000, 1000]\",\n"
    "    c: \"cpu f32[1000, 1000]\",\n"
    "):\n"
    "    return c\n",
};

static void test_canonical_texts_print_as_they_were_read(void) {
    for (size_t i = 0; i < sizeof canonical / sizeof *canonical; i++) {
        th_ctx *ctx = th_ctx_new(NULL, NULL);
        char *text = NULL;
        th_trace *t = check_parse(ctx, canonical[i]);
        if (t) {
            check_round_trip(t);
            CHECK(th_trace_print(t, &text, NULL) == TH_OK);
            CHECK_TEXT(text, canonical[i]);
        }
        th_ctx_alloc(ctx, text, 0);
        th_trace_free(t);
        th_ctx_free(ctx);
    }
}

static void check_prints(const char *source, const char *wanted) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    char *text = NULL;
    th_trace *t = check_parse(ctx, source);
    if (t) {
        check_round_trip(t);
        CHECK(th_trace_print(t, &text, NULL) == TH_OK);
        CHECK_TEXT(text, wanted);
    }
    th_ctx_alloc(ctx, text, 0);
    th_trace_free(t);
    th_ctx_free(ctx);
}

static void test_python_that_is_not_canonical_is_normalised(void) {
    check_prints(
        "\n# ignored\n\n#  note  \r\ndef  f( x : 'cpu f32[2,2]{2,1}' , ) :\r\n"
        "  # ignored too: 3\n\n"
        "  y : \"cpu  f32 [ 2 , 2 ] ; offset 3;alias 2\" = torch.add( (x) , # inside\n"
        "      'it\\'s', slice(3), slice(1, 2),\n     complex(1, 2), torch.float, torch.long, 1e5, .5, 5., 007e0,\n"
        "      alpha = 2, **{'from': 1, \"b c\": [1, 2,]},)   #   my file.py:7   \n"
        "  z: 'int'\n"
        "  (z) = torch.size(y) # no location\n"
        "  return(y)",
        "# note\ndef f(x: \"cpu f32[2, 2]\"):\n"
        "    y: \"cpu f32[2, 2]; alias 2; offset 3\" = torch.add(x, \"it's\", slice(None, 3, None), slice(1, 2, None), "
        "complex(1.0, 2.0), torch.float32, torch.int64, 100000.0, 0.5, 5.0, 7.0, alpha=2, **{\"from\": 1}, "
        "**{\"b c\": [1, 2]})  # my file.py:7\n"
        "    z: \"int\" = torch.size(y)\n"
        "    return y\n");
}

typedef struct bad_text {
    const char *text;
    uint32_t line, column;
    const char *message;
} bad_text;

#define F "def f(x: \"cpu f32[2]\"):\n"
static const bad_text bad_texts[] = {
    {"", 1, 1, "expected def, found the end of the text"},
    {" def f():\n    return None\n", 1, 2, "def must not be indented"},
    {"def torch():\n    return None\n", 1, 5, "torch is a name of the text form itself"},
    {"def f(x):\n    return x\n", 1, 8, "expected ':' and the input's type, found )"},
    {"def f(x: \"cpu f33[2]\"):\n    return x\n", 1, 15, "expected a dtype such as f32"},
    {"def f(x: \"cpu f32[2]{1, 1}\"):\n    return x\n", 1, 11, "2 strides for 1 dimensions"},
    {"def f(x: \"cpu f32[2, -1]\"):\n    return x\n", 1, 22, "expected a number"},
    {"def f(x: \"cpu f32[99999999999999999999]\"):\n    return x\n", 1, 19, "the number does not fit in 64 bits"},
    {"def f(x: \"cpu f32[9999999999, 9999999999]\"):\n    return x\n", 1, 11, "the tensor has more than 2^63 elements"},
    {"def f(x: \"cpu f32[2]; alias 0\"):\n    return x\n", 1, 23, "alias groups are numbered from 1 to 1000000"},
    {"def f(x: \"cpu f32[2]; random\"):\n    return x\n", 1, 23, "expected one of: alias, offset"},
    {"def f(x: \"cpu f32[2]\", x: \"int\"):\n    return x\n", 1, 24, "x is defined twice"},
    {"def f(x: \"\"):\n    return x\n", 1, 11, "expected a type such as \"cpu f32[2, 3]\" or \"int\""},
    {"def f():\nreturn None\n", 2, 1, "unexpected indentation"},
    {"def f():\n    hook()\n", 3, 1, "expected return, found the end of the text"},
    {F "    return x\n    hook()\n", 3, 5, "expected nothing after return, found hook"},
    {F "      hook()\n    return x\n", 3, 5, "unexpected indentation"},
    {F "\thook()\n", 2, 1, "unexpected character '\\x09'"},
    {F "    t0: \"int\" = torch.f(t0)\n    return x\n", 2, 25, "t0 is used before it is defined"},
    {F "    t0: \"int\" = torch.f(t1)\n    t1: \"int\" = torch.f(x)\n    return x\n", 2, 25,
     "t1 is used before it is defined"},
    {F "    t0: \"int\" = torch.f()\n    t0: \"int\" = torch.f(x)\n    return x\n", 3, 5, "t0 is defined twice"},
    {F "    del x\n    return x\n", 3, 12, "x is used after its del"},
    {F "    del x, x\n    return None\n", 2, 12, "x is used after its del"},
    {F "    del y\n    return None\n", 2, 9, "only a value can be deleted"},
    {F "    t0: \"int\"\n    return x\n", 2, 5, "annotated but not assigned"},
    {F "    t0: \"int\"\n    _ = torch.f(x)\n    return x\n", 2, 5, "annotated but not assigned"},
    {F "    t0 = torch.f(x)\n    return x\n", 2, 5, "t0 has no type: a line t0: \"...\" must stand above"},
    {F "    t0: \"int\"\n    t0, t0 = torch.f(x)\n    return x\n", 3, 9, "t0 is assigned twice"},
    {F "    t0: \"int; random\"\n    t0, _ = torch.f(x)\n    return x\n", 2, 5,
     "effects of several results stand on a line of their own: _: \"...\""},
    {F "    _: \"random\"\n    torch.f(x)\n    return x\n", 3, 5, "the effects line above belongs to no assignment"},
    {F "    _: \"writes y\" = torch.f(x)\n    return x\n", 2, 16, "y is no value here"},
    {F "    _: \"random; random\" = torch.f(x)\n    return x\n", 2, 17, "given twice"},
    {F "    _: \"int\" = torch.f(x)\n    return x\n", 2, 9,
     "expected one of: random, effect, no_grad, recompute, late, sized, raises, writes"},
    {F "    torch.f(x, torch.g(x))\n    return x\n", 2, 23, "a call cannot be an argument; give its result a name"},
    {F "    torch.f(a=1, x)\n    return x\n", 2, 18, "a positional argument after a keyword argument"},
    {F "    torch.f(a=1, a=2)\n    return x\n", 2, 5, "the same keyword argument twice"},
    {F "    x(1)\n    return x\n", 2, 5, "x is a value, not a callable"},
    {F "    torch.f(9223372036854775808)\n    return x\n", 2, 13, "the number does not fit in 64 bits"},
    {F "    torch.f(01)\n    return x\n", 2, 13, "not a decimal number"},
    {F "    torch.f(\"a)\n    return x\n", 2, 13, "a string without its closing quote"},
    {F "    torch.f(\"a\\q\")\n    return x\n", 2, 15, "unknown escape in a string"},
    {F "    torch.f(x\n    return x\n", 3, 5, "expected ',' or ')', found return"},
    {F "    torch.f(slice())\n    return x\n", 2, 13, "slice takes one to three arguments"},
    {F "    torch.f(complex(1))\n    return x\n", 2, 13, "complex takes two numbers"},
    {F "    torch.f(float(\"1\"))\n    return x\n", 2, 19, "expected \"inf\", \"-inf\" or \"nan\", found \"1\""},
    {F "    torch.lambda(x)\n    return x\n", 2, 5, "a keyword inside a dotted name"},
    {F "    lambda(x)\n    return x\n", 2, 5, "lambda is not a name"},
    {F "    x + x\n    return x\n", 2, 5, "expected a statement, found x"},
    {F "    torch.f(1 + x)\n    return x\n", 2, 15, "unexpected character '+'"},
    {F "    return x y\n", 2, 14, "expected the end of the line, found y"},
};

static void test_each_error_has_its_line_and_column(void) {
    for (size_t i = 0; i < sizeof bad_texts / sizeof *bad_texts; i++) {
        const bad_text *bad = &bad_texts[i];
        th_ctx *ctx = th_ctx_new(NULL, NULL);
        th_trace *t = NULL;
        CHECK(th_trace_parse(ctx, bad->text, strlen(bad->text), &t) == TH_ESYNTAX);
        CHECK(t == NULL);
        const th_error *e = th_ctx_error(ctx);
        CHECK_TEXT(e->text, bad->message);
        CHECK(e->line == bad->line && e->column == bad->column);
        if (e->line != bad->line || e->column != bad->column) {
            fprintf(stderr, "%u:%u instead of %u:%u\n%s", e->line, e->column, bad->line, bad->column, bad->text);
        }
        th_trace_free(t);
        th_ctx_free(ctx);
    }
}

static void test_nesting_is_bounded(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    th_trace *t = NULL;
    for (int depth = 150; depth <= 300; depth += 150) {
        char text[1000] = "def f():\n    return ";
        size_t used = strlen(text);
        memset(text + used, '[', (size_t)depth);
        memset(text + used + depth, ']', (size_t)depth);
        text[used + 2 * (size_t)depth] = '\0';
        th_status status = th_trace_parse(ctx, text, strlen(text), &t);
        CHECK(status == (depth < TH_MAX_DEPTH ? TH_OK : TH_ELIMIT));
        if (t) check_round_trip(t);
        th_trace_free(t);
    }
    t = th_trace_new(ctx, "deep");
    th_node n = th_node_none(t);
    for (int i = 0; i < 1000; i++) n = th_node_seq(t, TH_N_TUPLE, 1, &n);
    CHECK(n == 0 && th_trace_status(t) == TH_ELIMIT);
    th_trace_free(t);
    th_ctx_free(ctx);
}

static void test_floats_survive(void) {
    static const double few[] = {0.1,  1.0 / 3, 5e-324,  DBL_MIN, DBL_MAX, 1e15,   1e16,  123456789012345678.0,
                                 1e22, 1e23,    9.5e-05, 0.0001,  100.0,   2.5e-7, 1e308, 0.3,
                                 12.5, 4.35,    1e-300};
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    uint64_t seed = 88172645463325252u;
    for (size_t i = 0; i < 2000; i++) {
        double f;
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        memcpy(&f, &seed, sizeof f);
        if (i < sizeof few / sizeof *few) f = few[i];
        th_trace *t = th_trace_new(ctx, "f");
        t->result = th_node_float(t, f);
        check_round_trip(t);
        th_trace_free(t);
    }
    th_ctx_free(ctx);
}

static void test_any_string_survives(void) {
    th_ctx *ctx = th_ctx_new(NULL, NULL);
    char bytes[512];
    for (int i = 0; i < 512; i++) bytes[i] = (char)(i * 7 + i / 256);
    for (size_t length = 0; length < sizeof bytes; length += 37) {
        th_trace *t = th_trace_new(ctx, "f");
        t->result = th_node_str(t, th_intern(ctx, bytes, length));
        check_round_trip(t);
        th_trace_free(t);
    }
    th_ctx_free(ctx);
}

static void test_the_examples_of_the_documentation_parse(void) {
    static const char mark[] = "```python\n";
    size_t size;
    int examples = 0;
    char *text = check_read(THUNDER_SOURCE_DIR "/docs/ir.md", &size), *at = text;
    CHECK(text != NULL);
    for (; at && (at = strstr(at, mark)) != NULL; examples++) {
        th_ctx *ctx = th_ctx_new(NULL, NULL);
        char *end = strstr(at += strlen(mark), "```");
        *end = '\0';
        th_trace *t = check_parse(ctx, at);
        if (t) check_round_trip(t);
        th_trace_free(t);
        th_ctx_free(ctx);
        at = end + 1;
    }
    CHECK(examples >= 2);
    free(text);
}

int main(void) {
    test_canonical_texts_print_as_they_were_read();
    test_python_that_is_not_canonical_is_normalised();
    test_each_error_has_its_line_and_column();
    test_nesting_is_bounded();
    test_floats_survive();
    test_any_string_survives();
    test_the_examples_of_the_documentation_parse();
    return check_report("test_text");
}
