/* See lex.h. Holds no memory: tokens point into the text. */
#include "ir/lex.h"

#include <stdio.h>
#include <string.h>

static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
static bool is_digit(char c) { return c >= '0' && c <= '9'; }

void th__lexer_init(th__lexer *lex, th_ctx *ctx, const char *text, size_t length) {
    *lex = (th__lexer){.ctx = ctx, .at = text, .end = text + length, .line_start = text, .line = 1, .line_empty = true};
}

static char peek(const th__lexer *lex, size_t ahead) {
    return (size_t)(lex->end - lex->at) > ahead ? lex->at[ahead] : '\0';
}

static uint32_t column(const th__lexer *lex, const char *at) { return (uint32_t)(at - lex->line_start) + 1; }

static void newline(th__lexer *lex) {
    lex->at++;
    lex->line++;
    lex->line_start = lex->at;
}

static void skip_comment(th__lexer *lex, bool alone) {
    const char *start = ++lex->at;
    while (lex->at < lex->end && *lex->at != '\n') lex->at++;
    size_t size = (size_t)(lex->at - start);
    if (size && start[size - 1] == '\r') size--;
    lex->comment = (th__comment){start, size, lex->line, alone};
}

/* Skip blanks, comments, and newlines that do not end a logical line. */
static void skip_space(th__lexer *lex) {
    bool line_fresh = lex->at == lex->line_start;
    while (lex->at < lex->end) {
        char c = *lex->at;
        if (c == '#') {
            skip_comment(lex, line_fresh);
        } else if (c == '\n' && (lex->depth > 0 || lex->line_empty)) {
            newline(lex);
            line_fresh = true;
        } else if (c == ' ' || (c == '\r' && peek(lex, 1) == '\n')) {
            lex->at++;
        } else {
            return;
        }
    }
}

static void lex_name(th__lexer *lex, th__token *out) {
    const char *at = lex->at;
    for (;;) {
        while (at < lex->end && (is_letter(*at) || is_digit(*at))) at++;
        if (lex->end - at < 2 || *at != '.' || !is_letter(at[1])) break;
        out->dotted = true;
        at++;
    }
    out->kind = TH__TOK_NAME;
    out->size = (uint32_t)(at - lex->at);
}

static th_status lex_number(th__lexer *lex, th__token *out) {
    const char *at = lex->at, *end = lex->end;
    bool leading_zero = *at == '0' && end - at > 1 && is_digit(at[1]);
    out->kind = TH__TOK_INT;
    while (at < end && is_digit(*at)) at++;
    if (at < end && *at == '.') {
        out->kind = TH__TOK_FLOAT;
        do at++;
        while (at < end && is_digit(*at));
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
        out->kind = TH__TOK_FLOAT;
        at++;
        if (at < end && (*at == '+' || *at == '-')) at++;
        if (at == end || !is_digit(*at)) {
            return th_fail_at(lex->ctx, TH_ESYNTAX, lex->line, out->column, "an exponent without digits");
        }
        while (at < end && is_digit(*at)) at++;
    }
    if ((at < end && is_letter(*at)) || (leading_zero && out->kind == TH__TOK_INT)) {
        return th_fail_at(lex->ctx, TH_ESYNTAX, lex->line, out->column, "not a decimal number");
    }
    out->size = (uint32_t)(at - lex->at);
    return TH_OK;
}

static th_status lex_string(th__lexer *lex, th__token *out) {
    const char *at = lex->at + 1;
    for (;; at++) {
        if (at == lex->end || *at == '\n') {
            return th_fail_at(lex->ctx, TH_ESYNTAX, lex->line, out->column, "a string without its closing quote");
        }
        if (*at == *lex->at) break;
        if (*at == '\\' && lex->end - at > 1 && at[1] != '\n') at++;
    }
    out->kind = TH__TOK_STRING;
    out->size = (uint32_t)(at + 1 - lex->at);
    return TH_OK;
}

static th_status lex_punctuation(th__lexer *lex, th__token *out) {
    char c = *lex->at;
    out->size = 1;
    out->kind = (unsigned char)c;
    if (c == '.' && peek(lex, 1) == '.' && peek(lex, 2) == '.') {
        out->kind = TH__TOK_DOTS;
        out->size = 3;
    } else if (c == '*' && peek(lex, 1) == '*') {
        out->kind = TH__TOK_STARS;
        out->size = 2;
    } else if (c == '\0' || !strchr("()[]{}:,=-", c)) {
        char shown[8];
        snprintf(shown, sizeof shown, c > ' ' && c < 0x7f ? "%c" : "\\x%02x", (unsigned char)c);
        return th_fail_at(lex->ctx, TH_ESYNTAX, lex->line, out->column, "unexpected character '%s'", shown);
    }
    if (strchr("([{", c)) lex->depth++;
    if (strchr(")]}", c) && lex->depth > 0) lex->depth--;
    return TH_OK;
}

th_status th__lexer_next(th__lexer *lex, th__token *out) {
    skip_space(lex);
    *out = (th__token){.start = lex->at, .line = lex->line, .column = column(lex, lex->at), .first = lex->line_empty};
    th_status status = TH_OK;
    if (lex->at == lex->end || *lex->at == '\n') {
        bool ends_line = !lex->line_empty && (lex->at < lex->end || lex->depth == 0);
        out->kind = ends_line ? TH__TOK_NEWLINE : TH__TOK_END;
        lex->line_empty = true; /* the newline itself is skipped by the next call, so that its line keeps its number */
        return TH_OK;
    }
    if (is_letter(*lex->at))
        lex_name(lex, out);
    else if (is_digit(*lex->at) || (*lex->at == '.' && is_digit(peek(lex, 1))))
        status = lex_number(lex, out);
    else if (*lex->at == '"' || *lex->at == '\'')
        status = lex_string(lex, out);
    else
        status = lex_punctuation(lex, out);
    lex->at += out->size;
    lex->line_empty = false;
    return status;
}

/* ---- string literals ---- */

static size_t encode_utf8(uint32_t code, char *out) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    size_t more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out[0] = (char)((0xf0f0e0c0u >> (8 * more - 8) & 0xff) | code >> 6 * more);
    for (size_t i = 1; i <= more; i++) out[i] = (char)(0x80 | (code >> 6 * (more - i) & 0x3f));
    return more + 1;
}

/* \xHH, \uHHHH and \UHHHHHHHH: the code point, or UINT32_MAX when it is none. */
static uint32_t hex_code(const char *at, const char *end, size_t digits) {
    uint32_t code = 0;
    if ((size_t)(end - at) < digits) return UINT32_MAX;
    for (size_t i = 0; i < digits; i++) {
        static const char hex[] = "0123456789abcdef0123456789ABCDEF";
        const char *found = at[i] ? strchr(hex, at[i]) : NULL;
        if (!found) return UINT32_MAX;
        code = code << 4 | (uint32_t)((found - hex) & 15);
    }
    return code <= 0x10ffff ? code : UINT32_MAX;
}

th_status th__lexer_string(th__lexer *lex, const th__token *token, char *out, size_t *length) {
    const char *at = token->start + 1, *end = token->start + token->size - 1;
    char *to = out;
    while (at < end) {
        if (*at != '\\') {
            *to++ = *at++;
            continue;
        }
        static const char plain[] = "\\\\''\"\"n\nr\rt\ta\ab\bf\fv\v";
        char kind = at[1];
        const char *found = NULL;
        for (const char *pair = plain; *pair && !found; pair += 2) found = *pair == kind ? pair : NULL;
        size_t digits = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
        uint32_t code = digits ? hex_code(at + 2, end, digits) : UINT32_MAX;
        if (!found && code == UINT32_MAX) {
            return th_fail_at(lex->ctx, TH_ESYNTAX, token->line, token->column + (uint32_t)(at - token->start),
                              "unknown escape in a string");
        }
        if (found)
            *to++ = found[1];
        else
            to += encode_utf8(code, to);
        at += 2 + digits;
    }
    *length = (size_t)(to - out);
    return TH_OK;
}
