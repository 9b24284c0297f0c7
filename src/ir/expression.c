/* Arguments: literals, containers, values, symbols. See parser.h.
 *
 * Nodes under construction wait on the parser's stack until their sequence is complete.
 */
#include "base/text.h"
#include "ir/parser.h"

#include <string.h>

th_status th__parse_push(th__parser *p, th_node node) {
    if (!th__reserve(p->ctx, &p->stack, &p->cap_stack, (uint64_t)p->nstack + 1, sizeof *p->stack)) {
        return th__parse_no_memory(p);
    }
    p->stack[p->nstack++] = node;
    return TH_OK;
}

/* A sequence of the nodes above `base` on the stack, which is popped. */
th_status th__parse_pop(th__parser *p, th_node_kind kind, uint32_t base, th_node *out) {
    *out = th_node_seq(p->t, kind, p->nstack - base, p->stack + base);
    p->nstack = base;
    return th_trace_status(p->t);
}

/* Items up to the closing bracket, pushed; keys and values for a dict. The opening bracket is consumed. */
th_status th__parse_items(th__parser *p, int close, bool dict, bool *trailing_comma) {
    *trailing_comma = false;
    while (p->tok.kind != close) {
        th_node item;
        TRY(th__parse_expression(p, &item));
        TRY(th__parse_push(p, item));
        if (dict) {
            TRY(th__parse_expect(p, ':', "':'"));
            TRY(th__parse_expression(p, &item));
            TRY(th__parse_push(p, item));
        }
        *trailing_comma = p->tok.kind == ',';
        if (*trailing_comma)
            TRY(th__parse_advance(p));
        else if (p->tok.kind != close)
            return th__parse_expected(p, "',' or a closing bracket");
    }
    return th__parse_advance(p);
}

static th_status sequence(th__parser *p, th_node *out) {
    uint32_t base = p->nstack;
    int open = p->tok.kind;
    bool comma;
    TRY(th__parse_advance(p));
    TRY(th__parse_items(p, open == '(' ? ')' : open == '[' ? ']' : '}', open == '{', &comma));
    if (open == '(' && p->nstack == base + 1 && !comma) { /* parentheses around one expression */
        *out = p->stack[--p->nstack];
        return TH_OK;
    }
    return th__parse_pop(p, open == '(' ? TH_N_TUPLE : open == '[' ? TH_N_LIST : TH_N_DICT, base, out);
}

static th_status number(th__parser *p, bool negative, th_node *out) {
    th__token token = p->tok;
    if (token.kind == TH__TOK_FLOAT) {
        double f;
        if (!th__float_parse(token.start, token.size, &f)) return FAIL_AT(p, &token, "not a number");
        *out = th_node_float(p->t, negative ? -f : f);
    } else if (token.kind == TH__TOK_INT) {
        int64_t i = 0; /* gathered below zero, where there is room for the smallest one */
        bool fits = true;
        for (uint32_t at = 0; at < token.size && fits; at++) {
            fits = !__builtin_mul_overflow(i, 10, &i) && !__builtin_sub_overflow(i, token.start[at] - '0', &i);
        }
        if (!fits || (!negative && i == INT64_MIN)) return FAIL_AT(p, &token, "the number does not fit in 64 bits");
        *out = th_node_int(p->t, negative ? i : -i);
    } else {
        return th__parse_expected(p, "a number");
    }
    return *out ? th__parse_advance(p) : th_trace_status(p->t);
}

/* float("inf"), after the name. */
static th_status float_call(th__parser *p, th_node *out) {
    static const char *const words[] = {"inf", "-inf", "nan"};
    static const double values[] = {__builtin_inf(), -__builtin_inf(), __builtin_nan("")};
    TRY(th__parse_expect(p, '(', "'('"));
    for (int i = 0; i < 3 && p->tok.kind == TH__TOK_STRING; i++) {
        if (strlen(words[i]) + 2 != p->tok.size || memcmp(p->tok.start + 1, words[i], p->tok.size - 2) != 0) continue;
        *out = th_node_float(p->t, values[i]);
        if (!*out) return th_trace_status(p->t);
        TRY(th__parse_advance(p));
        return th__parse_expect(p, ')', "')'");
    }
    return th__parse_expected(p, "\"inf\", \"-inf\" or \"nan\"");
}

static bool node_number(const th_trace *t, th_node n, double *out) {
    const th_node_data *node = &t->nodes[n];
    if (node->kind != TH_N_FLOAT && node->kind != TH_N_INT) return false;
    *out = node->kind == TH_N_FLOAT ? node->u.f : (double)node->u.i;
    return true;
}

static th_status complex_call(th__parser *p, const th__token *name, th_node *out) {
    uint32_t base = p->nstack;
    double re, im;
    bool comma;
    TRY(th__parse_expect(p, '(', "'('"));
    TRY(th__parse_items(p, ')', false, &comma));
    bool two = p->nstack == base + 2;
    p->nstack = base;
    if (!two || !node_number(p->t, p->stack[base], &re) || !node_number(p->t, p->stack[base + 1], &im)) {
        return FAIL_AT(p, name, "complex takes two numbers");
    }
    *out = th_node_complex(p->t, re, im);
    return th_trace_status(p->t);
}

static th_status slice_call(th__parser *p, const th__token *name, th_node *out) {
    uint32_t base = p->nstack;
    bool comma;
    TRY(th__parse_expect(p, '(', "'('"));
    TRY(th__parse_items(p, ')', false, &comma));
    uint32_t count = p->nstack - base;
    if (count < 1 || count > 3) return FAIL_AT(p, name, "slice takes one to three arguments");
    if (count == 1) { /* slice(stop) */
        th_node stop = p->stack[base];
        p->stack[base] = th_node_none(p->t);
        TRY(th__parse_push(p, stop));
    }
    if (count < 3) TRY(th__parse_push(p, th_node_none(p->t)));
    return th__parse_pop(p, TH_N_SLICE, base, out);
}

/* torch.device("cuda", 0), after the name. */
static th_status device_call(th__parser *p, const th__token *name, th_node *out) {
    size_t length;
    int64_t index = -1;
    TRY(th__parse_expect(p, '(', "'('"));
    if (p->tok.kind != TH__TOK_STRING) return th__parse_expected(p, "the device's type in quotes");
    TRY(th__parse_decode(p, &p->tok, &length));
    th_str type = th_intern(p->ctx, p->buffer, length);
    if (!type) return th__parse_no_memory(p);
    TRY(th__parse_advance(p));
    if (p->tok.kind == ',') {
        th_node n;
        TRY(th__parse_advance(p));
        TRY(number(p, false, &n));
        const th_node_data *node = &p->t->nodes[n];
        if (node->kind != TH_N_INT || node->u.i > INT32_MAX) return FAIL_AT(p, name, "not an index of a device");
        index = node->u.i;
    }
    TRY(th__parse_expect(p, ')', "')'"));
    th_dev device =
        strlen(th_str_get(p->ctx, type)) == length ? th_device(p->ctx, th_str_get(p->ctx, type), (int32_t)index) : 0;
    if (!device) {
        return th_ctx_error(p->ctx)->status == TH_ENOMEM ? TH_ENOMEM : FAIL_AT(p, name, "there is no such device");
    }
    *out = th_node_device(p->t, device);
    return th_trace_status(p->t);
}

/* A dotted name that is an argument: an element type or a symbol. */
static th_status dotted(th__parser *p, const th__token *name, th_node *out) {
    th_str s;
    th_dtype dtype = TH_DTYPE_NONE;
    if (!th__name_is_dotted(name->start, name->size)) return FAIL_AT(p, name, "a keyword inside a dotted name");
    if (name->size > 6 && memcmp(name->start, "torch.", 6) == 0) {
        dtype = th_dtype_from_torch(name->start + 6, name->size - 6);
    }
    TRY(th__parse_intern(p, name, &s));
    *out = dtype != TH_DTYPE_NONE ? th_node_dtype(p->t, dtype) : th_node_symbol(p->t, s);
    return th_trace_status(p->t);
}

static th_status identifier(th__parser *p, const th__token *name, th_node *out) {
    th_val value;
    uint32_t opaque;
    TRY(th__parse_live(p, name->start, name->size, name->line, name->column, &value));
    if (value) {
        *out = th_node_value(p->t, value);
        return th_trace_status(p->t);
    }
    TRY(th__parse_opaque(p, name, &opaque));
    *out = th__node_opaque_entry(p->t, opaque);
    return th_trace_status(p->t);
}

static th_status name_expression(th__parser *p, th_node *out) {
    th__token name = p->tok;
    TRY(th__parse_advance(p));
    if (th__parse_is(&name, "float")) return float_call(p, out);
    if (th__parse_is(&name, "complex")) return complex_call(p, &name, out);
    if (th__parse_is(&name, "slice")) return slice_call(p, &name, out);
    if (th__parse_is(&name, "torch.device") && p->tok.kind == '(') return device_call(p, &name, out);
    if (p->tok.kind == '(') return FAIL_AT(p, &p->tok, "a call cannot be an argument; give its result a name");
    if (name.dotted) return dotted(p, &name, out);
    if (th__parse_is(&name, "None"))
        *out = th_node_none(p->t);
    else if (th__parse_is(&name, "True") || th__parse_is(&name, "False"))
        *out = th_node_bool(p->t, name.start[0] == 'T');
    else
        return identifier(p, &name, out);
    return th_trace_status(p->t);
}

static th_status string_expression(th__parser *p, th_node *out) {
    size_t length;
    TRY(th__parse_decode(p, &p->tok, &length));
    th_str s = th_intern(p->ctx, p->buffer, length);
    if (!s) return th__parse_no_memory(p);
    *out = th_node_str(p->t, s);
    return *out ? th__parse_advance(p) : th_trace_status(p->t);
}

static th_status expression_inside(th__parser *p, th_node *out) {
    switch (p->tok.kind) {
    case TH__TOK_NAME: return name_expression(p, out);
    case TH__TOK_STRING: return string_expression(p, out);
    case TH__TOK_INT:
    case TH__TOK_FLOAT: return number(p, false, out);
    case '-': TRY(th__parse_advance(p)); return number(p, true, out);
    case '(':
    case '[':
    case '{': return sequence(p, out);
    case TH__TOK_DOTS: *out = th_node_ellipsis(p->t); return *out ? th__parse_advance(p) : th_trace_status(p->t);
    default: return th__parse_expected(p, "an argument");
    }
}

th_status th__parse_expression(th__parser *p, th_node *out) {
    *out = 0;
    if (p->depth == TH_MAX_DEPTH) {
        return th_fail_at(p->ctx, TH_ELIMIT, p->tok.line, p->tok.column, "arguments nest deeper than %d levels",
                          TH_MAX_DEPTH);
    }
    p->depth++;
    th_status status = expression_inside(p, out);
    p->depth--;
    return status;
}
