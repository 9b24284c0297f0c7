/* Tokens of the text form: Python's, as far as the grammar in docs/ir.md needs them. */
#ifndef THUNDER_IR_LEX_H
#define THUNDER_IR_LEX_H

#include "base/ctx.h"

typedef enum th__tok { /* punctuation of one character is its own code */
                       TH__TOK_END = 256,
                       TH__TOK_NEWLINE, /* end of a logical line: brackets are closed */
                       TH__TOK_NAME,    /* an identifier, or several with dots between */
                       TH__TOK_INT,
                       TH__TOK_FLOAT,
                       TH__TOK_STRING,
                       TH__TOK_DOTS, /* ... */
                       TH__TOK_STARS /* ** */
} th__tok;

typedef struct th__token {
    int kind;
    const char *start;
    uint32_t size;
    uint32_t line, column; /* 1-based; columns count bytes */
    bool first;            /* first of its logical line: column is the line's indentation + 1 */
    bool dotted;           /* a NAME with a dot */
} th__token;

/* The last comment seen. A statement's location is the comment on the line of its NEWLINE token. */
typedef struct th__comment {
    const char *start; /* after the '#' */
    size_t size;
    uint32_t line;
    bool alone; /* nothing else on its line */
} th__comment;

typedef struct th__lexer {
    th_ctx *ctx; /* for errors */
    const char *at, *end, *line_start;
    uint32_t line;
    uint32_t depth;  /* open brackets */
    bool line_empty; /* no token yet on this logical line */
    th__comment comment;
} th__lexer;

void th__lexer_init(th__lexer *lex, th_ctx *ctx, const char *text, size_t length);
th_status th__lexer_next(th__lexer *lex, th__token *out);

/* Decode a STRING token's content into `out` (at least the token's size); returns the length. The token was checked. */
th_status th__lexer_string(th__lexer *lex, const th__token *token, char *out, size_t *length);

#endif
