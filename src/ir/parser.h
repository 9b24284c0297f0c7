/* The parser's state and what its files share: parse.c (statements), expression.c (arguments), annotation.c (the quoted
 * types and effects). One header for the three; nobody else includes it. */
#ifndef THUNDER_IR_PARSER_H
#define THUNDER_IR_PARSER_H

#include "ir/ir.h"
#include "ir/lex.h"

typedef enum th__name_kind { TH__NAME_NEW, TH__NAME_VALUE, TH__NAME_DELETED, TH__NAME_OPAQUE } th__name_kind;

typedef struct th__name_entry {
    uint32_t kind;
    uint32_t ref;          /* th_val or opaque index */
    uint32_t line, column; /* first mention */
} th__name_entry;

typedef struct th__facts { /* what an annotation says */
    th_typeref type;
    uint32_t alias;
    int64_t offset;
    uint8_t effects, marks;
    bool has_effects, has_alias, has_offset;
} th__facts;

typedef struct th__declaration { /* a bare annotation line that waits for its assignment */
    th_str name;
    th__facts facts;
    th__token token;
    bool assigned;
} th__declaration;

typedef struct th__parser {
    th_ctx *ctx;
    th_trace *t;
    th__lexer lex;
    th__token tok; /* the current token */
    uint32_t depth;
    th__name_entry *names; /* by th_str */
    uint32_t cap_names;
    uint32_t *stack; /* nodes under construction */
    uint32_t nstack, cap_stack;
    th__declaration *pending;
    uint32_t npending, cap_pending;
    th_val *writes;
    uint32_t nwrites, cap_writes;
    th__facts pending_effects; /* of a bare `_: "..."` line */
    int64_t *dims;
    uint32_t cap_dims;
    char *buffer;
    uint32_t cap_buffer;
} th__parser;

#define FAIL_AT(p, token, ...) th_fail_at((p)->ctx, TH_ESYNTAX, (token)->line, (token)->column, __VA_ARGS__)

/* ---- tokens (parse.c) ---- */

th_status th__parse_advance(th__parser *p);
th_status th__parse_expected(th__parser *p, const char *what);
th_status th__parse_expect(th__parser *p, int kind, const char *what);
bool th__parse_is(const th__token *token, const char *word);
bool th__parse_next_is(const th__parser *p, char c); /* the character after the current token */
th_status th__parse_intern(th__parser *p, const th__token *token, th_str *out);
th_status th__parse_decode(th__parser *p, const th__token *token, size_t *length); /* a string, into p->buffer */
th_status th__parse_no_memory(th__parser *p); /* th__grow or th_intern failed and recorded why */

/* ---- names (parse.c) ---- */

th_status th__parse_opaque(th__parser *p, const th__token *token, uint32_t *out);
/* A value that may be used here; 0 when the name is no value. */
th_status th__parse_live(th__parser *p, const char *text, size_t size, uint32_t line, uint32_t column, th_val *out);

/* ---- annotation.c, expression.c ---- */

/* The current STRING token as an annotation: of a value (type first), of an operation (effects), or of both. The values
 * that it says are written are appended to p->writes. */
th_status th__parse_annotation(th__parser *p, th__facts *f, bool of_value, bool of_op);

th_status th__parse_expression(th__parser *p, th_node *out);
/* Items up to the closing bracket, pushed on the stack; keys and values for a dict. The opening bracket is consumed. */
th_status th__parse_items(th__parser *p, int close, bool dict, bool *trailing_comma);
th_status th__parse_push(th__parser *p, th_node node);
/* A sequence of the nodes above `base` on the stack, which is popped. */
th_status th__parse_pop(th__parser *p, th_node_kind kind, uint32_t base, th_node *out);

#endif
