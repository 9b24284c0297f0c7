/* Text -> trace: recursive descent over the tokens of lex.c, along the grammar in docs/ir.md.
 *
 * The parser knows three kinds of names: values, values after their `del`, and opaque entries (any other identifier in
 * an argument). It reports the first error with line and column and frees what it built. Its own memory (a stack of
 * nodes, the name table, a buffer for strings) is freed at the end; the trace goes to the caller.
 */
#include "ir/parser.h"

#include <string.h>

/* ---- tokens and errors ---- */

th_status th__parse_no_memory(th__parser *p) { return th_ctx_error(p->ctx)->status; } /* th__grow recorded it */

th_status th__parse_advance(th__parser *p) { return th__lexer_next(&p->lex, &p->tok); }

th_status th__parse_expected(th__parser *p, const char *what) {
    switch (p->tok.kind) {
    case TH__TOK_END: return FAIL_AT(p, &p->tok, "expected %s, found the end of the text", what);
    case TH__TOK_NEWLINE: return FAIL_AT(p, &p->tok, "expected %s, found the end of the line", what);
    default: break;
    }
    int size = p->tok.size < 60 ? (int)p->tok.size : 60;
    return FAIL_AT(p, &p->tok, "expected %s, found %.*s", what, size, p->tok.start);
}

th_status th__parse_expect(th__parser *p, int kind, const char *what) {
    if (p->tok.kind != kind) return th__parse_expected(p, what);
    return th__parse_advance(p);
}

bool th__parse_is(const th__token *token, const char *word) {
    return token->kind == TH__TOK_NAME && strlen(word) == token->size && memcmp(word, token->start, token->size) == 0;
}

th_status th__parse_intern(th__parser *p, const th__token *token, th_str *out) {
    *out = th_intern(p->ctx, token->start, token->size);
    return *out ? TH_OK : th__parse_no_memory(p);
}

th_status th__parse_decode(th__parser *p, const th__token *token, size_t *length) {
    if (!th__reserve(p->ctx, &p->buffer, &p->cap_buffer, token->size, 1)) return th__parse_no_memory(p);
    return th__lexer_string(&p->lex, token, p->buffer, length);
}

bool th__parse_next_is(const th__parser *p, char c) {
    const char *at = p->tok.start + p->tok.size;
    while (at < p->lex.end && *at == ' ') at++;
    return at < p->lex.end && *at == c;
}

/* ---- names ---- */

static th_status name_entry_of(th__parser *p, th_str name, th__name_entry **out) {
    uint32_t before = p->cap_names;
    if (name >= before) {
        if (!th__grow(p->ctx, &p->names, &p->cap_names, (uint64_t)name + 1, sizeof *p->names))
            return th__parse_no_memory(p);
        memset(p->names + before, 0, (p->cap_names - before) * sizeof *p->names);
    }
    *out = &p->names[name];
    return TH_OK;
}

static th_status check_new_name(th__parser *p, const th__token *token) {
    int size = token->size < 100 ? (int)token->size : 100;
    if (!th__name_is_identifier(token->start, token->size)) {
        return FAIL_AT(p, token, "%.*s is not a name", size, token->start);
    }
    if (th__name_is_reserved(token->start, token->size)) {
        return FAIL_AT(p, token, "%.*s is a name of the text form itself", size, token->start);
    }
    return TH_OK;
}

/* Enter a value under its name. The value exists already; the name must be new. */
static th_status define(th__parser *p, th_val value, const th__token *at) {
    th_str name = p->t->values[value].name;
    th__name_entry *entry = NULL;
    TRY(name_entry_of(p, name, &entry));
    if (entry->kind == TH__NAME_OPAQUE) {
        return th_fail_at(p->ctx, TH_ESYNTAX, entry->line, entry->column, "%s is used before it is defined",
                          th_str_get(p->ctx, name));
    }
    if (entry->kind != TH__NAME_NEW) return FAIL_AT(p, at, "%s is defined twice", th_str_get(p->ctx, name));
    *entry = (th__name_entry){.kind = TH__NAME_VALUE, .ref = value};
    return TH_OK;
}

static th_status new_value(th__parser *p, th_str name, const th__facts *f, th_val *out) {
    *out = th__trace_add_value(p->t, name, f->type);
    if (!*out) return th_trace_status(p->t);
    p->t->values[*out].alias = f->alias;
    p->t->values[*out].offset = f->offset;
    if (f->alias >= p->t->next_alias) p->t->next_alias = f->alias + 1;
    return TH_OK;
}

/* The opaque entry that an identifier names. */
th_status th__parse_opaque(th__parser *p, const th__token *token, uint32_t *out) {
    th_str name;
    th__name_entry *entry;
    TRY(check_new_name(p, token));
    TRY(th__parse_intern(p, token, &name));
    TRY(name_entry_of(p, name, &entry));
    if (entry->kind == TH__NAME_VALUE || entry->kind == TH__NAME_DELETED) {
        return FAIL_AT(p, token, "%s is a value, not a callable", th_str_get(p->ctx, name));
    }
    if (entry->kind == TH__NAME_NEW) {
        uint32_t index = th__trace_add_opaque(p->t, name, NULL);
        if (!index) return th_trace_status(p->t);
        *entry = (th__name_entry){TH__NAME_OPAQUE, index, token->line, token->column};
    }
    *out = entry->ref;
    return TH_OK;
}

/* A value that may be used here; 0 when the name is no value. */
th_status th__parse_live(th__parser *p, const char *text, size_t size, uint32_t line, uint32_t column, th_val *out) {
    th_str name = th_intern(p->ctx, text, size);
    th__name_entry *entry;
    *out = 0;
    if (!name) return th__parse_no_memory(p);
    TRY(name_entry_of(p, name, &entry));
    if (entry->kind == TH__NAME_DELETED) {
        return th_fail_at(p->ctx, TH_ESYNTAX, line, column, "%s is used after its del", th_str_get(p->ctx, name));
    }
    if (entry->kind == TH__NAME_VALUE) *out = entry->ref;
    return TH_OK;
}

/* ---- calls ---- */

/* Pushes key and value of `name=value` or of each entry of `**{"name": value}`. */
static th_status keyword_argument(th__parser *p) {
    th_node node;
    if (p->tok.kind == TH__TOK_NAME) {
        th_str key;
        if (!th__name_is_identifier(p->tok.start, p->tok.size)) return th__parse_expected(p, "an argument's name");
        TRY(th__parse_intern(p, &p->tok, &key));
        TRY(th__parse_push(p, th_node_str(p->t, key)));
        TRY(th__parse_advance(p));
        TRY(th__parse_expect(p, '=', "'='"));
        TRY(th__parse_expression(p, &node));
        return th__parse_push(p, node);
    }
    TRY(th__parse_expect(p, TH__TOK_STARS, "name=value"));
    th__token open = p->tok;
    if (open.kind != '{') return th__parse_expected(p, "'{'");
    uint32_t base = p->nstack;
    bool comma;
    TRY(th__parse_advance(p));
    TRY(th__parse_items(p, '}', true, &comma));
    for (uint32_t i = base; i < p->nstack; i += 2) {
        if (p->t->nodes[p->stack[i]].kind != TH_N_STR) return FAIL_AT(p, &open, "the keys of ** must be strings");
    }
    return TH_OK;
}

static bool starts_keyword(const th__parser *p) {
    if (p->tok.kind == TH__TOK_STARS) return true;
    if (p->tok.kind != TH__TOK_NAME) return false;
    const char *at = p->tok.start + p->tok.size;
    while (at < p->lex.end && *at == ' ') at++;
    return at < p->lex.end && *at == '=';
}

static bool same_keyword_twice(const th__parser *p, uint32_t base) {
    for (uint32_t i = base; i < p->nstack; i += 2) {
        for (uint32_t j = base; j < i; j += 2) {
            if (p->t->nodes[p->stack[i]].u.ref == p->t->nodes[p->stack[j]].u.ref) return true;
        }
    }
    return false;
}

/* callee(arguments) and the end of the line; the current token is the callee. Appends the operation. */
static th_status call(th__parser *p, th_op_args *op) {
    th__token name = p->tok;
    if (name.kind != TH__TOK_NAME) return th__parse_expected(p, "a call");
    TRY(th__parse_advance(p));
    if (name.dotted && !th__name_is_dotted(name.start, name.size)) {
        return FAIL_AT(p, &name, "a keyword inside a dotted name");
    }
    if (name.dotted)
        TRY(th__parse_intern(p, &name, &op->callee));
    else
        TRY(th__parse_opaque(p, &name, &op->callee_opaque));
    TRY(th__parse_expect(p, '(', "'('"));
    uint32_t base = p->nstack;
    bool keywords = false;
    while (p->tok.kind != ')') {
        bool keyword = starts_keyword(p);
        if (keyword && !keywords) TRY(th__parse_pop(p, TH_N_TUPLE, base, &op->args));
        if (keywords && !keyword) return FAIL_AT(p, &p->tok, "a positional argument after a keyword argument");
        keywords = keyword;
        if (keyword) {
            TRY(keyword_argument(p));
        } else {
            th_node node;
            TRY(th__parse_expression(p, &node));
            TRY(th__parse_push(p, node));
        }
        if (p->tok.kind == ',')
            TRY(th__parse_advance(p));
        else if (p->tok.kind != ')')
            return th__parse_expected(p, "',' or ')'");
    }
    if (keywords && same_keyword_twice(p, base)) return FAIL_AT(p, &name, "the same keyword argument twice");
    TRY(th__parse_pop(p, keywords ? TH_N_DICT : TH_N_TUPLE, base, keywords ? &op->kwargs : &op->args));
    TRY(th__parse_advance(p));
    op->kind = TH_OP_CALL;
    op->nwrites = p->nwrites;
    op->writes = p->writes;
    if (p->tok.kind != TH__TOK_NEWLINE) return th__parse_expected(p, "the end of the line");
    return th_trace_op(p->t, op) ? TH_OK : th_trace_status(p->t);
}

/* ---- statements ---- */

/* "# model.py:12" at the end of a statement's line. */
static th_status location(th__parser *p, th_opref op) {
    const th__comment *c = &p->lex.comment;
    if (c->line != p->tok.line || c->alone || !c->start) return TH_OK;
    const char *start = c->start, *end = c->start + c->size, *digits;
    uint64_t line = 0;
    while (end > start && end[-1] == ' ') end--;
    for (digits = end; digits > start && digits[-1] >= '0' && digits[-1] <= '9'; digits--) {
    }
    if (digits == end || end - digits > 9 || digits == start || digits[-1] != ':') return TH_OK;
    for (const char *at = digits; at < end; at++) line = line * 10 + (uint64_t)(*at - '0');
    end = digits - 1;
    while (end > start && *start == ' ') start++;
    if (start == end) return TH_OK;
    th_str file = th_intern(p->ctx, start, (size_t)(end - start));
    if (!file) return th__parse_no_memory(p);
    p->t->ops[op].file = file;
    p->t->ops[op].line = (uint32_t)line;
    return TH_OK;
}

static th_status end_statement(th__parser *p) {
    if (p->tok.kind != TH__TOK_NEWLINE) return th__parse_expected(p, "the end of the line");
    p->nwrites = 0;
    p->pending_effects = (th__facts){0};
    return th__parse_advance(p);
}

static th_status end_operation(th__parser *p) {
    TRY(location(p, p->t->nops - 1));
    return end_statement(p);
}

static th_status define_outs(th__parser *p, th_node outs, const th__token *at) {
    const th_node_data node = p->t->nodes[outs];
    if (node.kind == TH_N_VALUE) return define(p, node.u.ref, at);
    for (uint32_t i = 0; i < node.count; i++) TRY(define_outs(p, p->t->kids[node.u.kids + i], at));
    return TH_OK;
}

/* `name: "..."` with or without `= call`; the name is the current token. */
static th_status annotated(th__parser *p) {
    th__token name = p->tok;
    bool ignored = th__parse_is(&name, "_");
    th__facts f;
    if (!ignored) TRY(check_new_name(p, &name));
    TRY(th__parse_advance(p));
    TRY(th__parse_advance(p)); /* the ':' that the caller saw */
    if (p->pending_effects.has_effects) return FAIL_AT(p, &name, "an effects line stands directly above its operation");
    TRY(th__parse_annotation(p, &f, !ignored, true));
    bool assigns = p->tok.kind == '=';
    if (assigns && p->npending) return FAIL_AT(p, &p->pending[0].token, "annotated but not assigned");
    if (!assigns && !ignored && f.has_effects) {
        return FAIL_AT(p, &name, "effects of several results stand on a line of their own: _: \"...\"");
    }
    if (!assigns && p->tok.kind != TH__TOK_NEWLINE) return th__parse_expected(p, "'=' or the end of the line");
    th_str s;
    TRY(th__parse_intern(p, &name, &s));
    if (assigns) {
        th_op_args op = {.effects = f.effects, .marks = f.marks};
        th_val value = 0;
        if (!ignored) {
            TRY(new_value(p, s, &f, &value));
            op.outs = th_node_value(p->t, value);
        }
        TRY(th__parse_advance(p));
        TRY(call(p, &op));
        if (value) TRY(define(p, value, &name));
        return end_operation(p);
    }
    if (ignored) {
        p->pending_effects = f;
        return th__parse_advance(p);
    }
    if (!th__reserve(p->ctx, &p->pending, &p->cap_pending, (uint64_t)p->npending + 1, sizeof *p->pending)) {
        return th__parse_no_memory(p);
    }
    p->pending[p->npending++] = (th__declaration){s, f, name, false};
    return th__parse_advance(p);
}

/* The value that a target names: its annotation line must stand above. */
static th_status target_value(th__parser *p, th_node *out) {
    th_str s;
    th_val value;
    TRY(th__parse_intern(p, &p->tok, &s));
    for (uint32_t i = 0; i < p->npending; i++) {
        th__declaration *d = &p->pending[i];
        if (d->name != s) continue;
        if (d->assigned) return FAIL_AT(p, &p->tok, "%s is assigned twice", th_str_get(p->ctx, s));
        d->assigned = true;
        TRY(new_value(p, s, &d->facts, &value));
        *out = th_node_value(p->t, value);
        return *out ? th__parse_advance(p) : th_trace_status(p->t);
    }
    TRY(check_new_name(p, &p->tok));
    return FAIL_AT(p, &p->tok, "%s has no type: a line %s: \"...\" must stand above", th_str_get(p->ctx, s),
                   th_str_get(p->ctx, s));
}

static th_status targets(th__parser *p, int close, bool *trailing_comma);

static th_status target(th__parser *p, th_node *out) {
    if (th__parse_is(&p->tok, "_")) {
        *out = th_node_none(p->t);
        return *out ? th__parse_advance(p) : th_trace_status(p->t);
    }
    if (p->tok.kind == TH__TOK_NAME) return target_value(p, out);
    if (p->tok.kind != '(') return th__parse_expected(p, "a target");
    if (p->depth == TH_MAX_DEPTH)
        return th_fail_at(p->ctx, TH_ELIMIT, p->tok.line, p->tok.column, "targets nest too deep");
    uint32_t base = p->nstack;
    bool comma;
    p->depth++;
    TRY(th__parse_advance(p));
    TRY(targets(p, ')', &comma));
    TRY(th__parse_advance(p));
    p->depth--;
    if (p->nstack == base + 1 && !comma) { /* parentheses around one target */
        *out = p->stack[--p->nstack];
        return TH_OK;
    }
    return th__parse_pop(p, TH_N_TUPLE, base, out);
}

static th_status targets(th__parser *p, int close, bool *trailing_comma) {
    *trailing_comma = false;
    while (p->tok.kind != close) {
        th_node node = 0;
        TRY(target(p, &node));
        TRY(th__parse_push(p, node));
        *trailing_comma = p->tok.kind == ',';
        if (*trailing_comma)
            TRY(th__parse_advance(p));
        else if (p->tok.kind != close)
            return th__parse_expected(p, close == '=' ? "',' or '='" : "',' or ')'");
    }
    return TH_OK;
}

static th_status assigned(th__parser *p) {
    th__token first = p->tok;
    th_op_args op = {.effects = p->pending_effects.effects, .marks = p->pending_effects.marks};
    uint32_t base = p->nstack;
    bool comma;
    TRY(targets(p, '=', &comma));
    if (p->nstack == base + 1 && !comma)
        op.outs = p->stack[--p->nstack];
    else
        TRY(th__parse_pop(p, TH_N_TUPLE, base, &op.outs));
    for (uint32_t i = 0; i < p->npending; i++) {
        if (!p->pending[i].assigned) return FAIL_AT(p, &p->pending[i].token, "annotated but not assigned");
    }
    p->npending = 0;
    TRY(th__parse_advance(p));
    th_node outs = op.outs;
    TRY(call(p, &op));
    TRY(define_outs(p, outs, &first));
    return end_operation(p);
}

static th_status del_statement(th__parser *p) {
    uint32_t base = p->nstack;
    th_op_args op = {.kind = TH_OP_DEL};
    do {
        th_val value;
        th__name_entry *entry;
        TRY(th__parse_advance(p));
        if (p->tok.kind != TH__TOK_NAME) return th__parse_expected(p, "the name of a value");
        TRY(th__parse_live(p, p->tok.start, p->tok.size, p->tok.line, p->tok.column, &value));
        if (!value) return FAIL_AT(p, &p->tok, "only a value can be deleted");
        TRY(name_entry_of(p, p->t->values[value].name, &entry));
        entry->kind = TH__NAME_DELETED;
        TRY(th__parse_push(p, th_node_value(p->t, value)));
        TRY(th__parse_advance(p));
    } while (p->tok.kind == ',');
    TRY(th__parse_pop(p, TH_N_TUPLE, base, &op.args));
    if (!th_trace_op(p->t, &op)) return th_trace_status(p->t);
    return end_operation(p);
}

static th_status return_statement(th__parser *p) {
    TRY(th__parse_advance(p));
    if (p->tok.kind != TH__TOK_NEWLINE) TRY(th__parse_expression(p, &p->t->result));
    TRY(end_statement(p));
    if (p->tok.kind != TH__TOK_END) return th__parse_expected(p, "nothing after return");
    return TH_OK;
}

static th_status statement(th__parser *p) {
    if (p->tok.kind == TH__TOK_NAME && !p->tok.dotted && th__parse_next_is(p, ':')) return annotated(p);
    bool calls = p->tok.kind == TH__TOK_NAME && th__parse_next_is(p, '(');
    if (!calls && (p->tok.kind == '(' ||
                   (p->tok.kind == TH__TOK_NAME && (th__parse_next_is(p, ',') || th__parse_next_is(p, '='))))) {
        return assigned(p);
    }
    if (p->npending) return FAIL_AT(p, &p->pending[0].token, "annotated but not assigned");
    if (p->pending_effects.has_effects) return FAIL_AT(p, &p->tok, "the effects line above belongs to no assignment");
    if (th__parse_is(&p->tok, "del")) return del_statement(p);
    if (!calls) return th__parse_expected(p, "a statement");
    th_op_args op = {0};
    TRY(call(p, &op));
    return end_operation(p);
}

/* ---- the function ---- */

static th_status parameters(th__parser *p) {
    TRY(th__parse_expect(p, '(', "'('"));
    while (p->tok.kind != ')') {
        th__token name = p->tok;
        th_str s;
        th_val value;
        th__facts f;
        if (name.kind != TH__TOK_NAME) return th__parse_expected(p, "an input's name");
        TRY(check_new_name(p, &name));
        TRY(th__parse_intern(p, &name, &s));
        TRY(th__parse_advance(p));
        TRY(th__parse_expect(p, ':', "':' and the input's type"));
        TRY(th__parse_annotation(p, &f, true, false));
        if (!th__reserve(p->ctx, &p->t->inputs, &p->t->cap_inputs, (uint64_t)p->t->ninputs + 1, sizeof(th_val))) {
            return th__parse_no_memory(p);
        }
        TRY(new_value(p, s, &f, &value));
        TRY(define(p, value, &name));
        p->t->inputs[p->t->ninputs++] = value;
        if (p->tok.kind == ',')
            TRY(th__parse_advance(p));
        else if (p->tok.kind != ')')
            return th__parse_expected(p, "',' or ')'");
    }
    return th__parse_advance(p);
}

static th_status header(th__parser *p) {
    TRY(th__parse_advance(p));
    if (!th__parse_is(&p->tok, "def")) return th__parse_expected(p, "def");
    if (p->tok.column != 1) return FAIL_AT(p, &p->tok, "def must not be indented");
    const th__comment *c = &p->lex.comment;
    if (c->start && c->alone && c->line + 1 == p->tok.line) {
        const char *start = c->start, *end = c->start + c->size;
        while (start < end && (unsigned char)*start <= ' ') start++;
        while (end > start && (unsigned char)end[-1] <= ' ') end--;
        p->t->note = th_intern(p->ctx, start, (size_t)(end - start));
        if (!p->t->note) return th__parse_no_memory(p);
    }
    TRY(th__parse_advance(p));
    if (p->tok.kind != TH__TOK_NAME) return th__parse_expected(p, "the function's name");
    TRY(check_new_name(p, &p->tok));
    TRY(th__parse_intern(p, &p->tok, &p->t->name));
    TRY(th__parse_advance(p));
    TRY(parameters(p));
    TRY(th__parse_expect(p, ':', "':'"));
    return th__parse_expect(p, TH__TOK_NEWLINE, "the end of the line");
}

static th_status function(th__parser *p) {
    TRY(header(p));
    uint32_t indent = p->tok.column;
    if (p->tok.kind == TH__TOK_END) return th__parse_expected(p, "the function's body");
    for (;;) {
        if (p->tok.kind == TH__TOK_END) return th__parse_expected(p, "return");
        if (p->tok.column != indent || indent == 1) return FAIL_AT(p, &p->tok, "unexpected indentation");
        if (th__parse_is(&p->tok, "return")) break;
        TRY(statement(p));
    }
    if (p->npending) return FAIL_AT(p, &p->pending[0].token, "annotated but not assigned");
    return return_statement(p);
}

th_status th_trace_parse(th_ctx *ctx, const char *text, size_t length, th_trace **out) {
    *out = NULL;
    if (length > UINT32_MAX / 2) return th_fail(ctx, TH_ELIMIT, "the text is too long");
    th__parser p = {.ctx = ctx, .t = th_trace_new(ctx, "parsed")};
    if (!p.t) return th_ctx_error(ctx)->status;
    th__lexer_init(&p.lex, ctx, text, length);
    th_status status = function(&p);
    if (status == TH_OK) status = th_trace_status(p.t);
    th_ctx_alloc(ctx, p.names, 0);
    th_ctx_alloc(ctx, p.stack, 0);
    th_ctx_alloc(ctx, p.pending, 0);
    th_ctx_alloc(ctx, p.writes, 0);
    th_ctx_alloc(ctx, p.dims, 0);
    th_ctx_alloc(ctx, p.buffer, 0);
    if (status == TH_OK)
        *out = p.t;
    else
        th_trace_free(p.t);
    return status;
}
