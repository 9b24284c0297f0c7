/* A growing text: the printer's output, or a fixed buffer that the caller owns.
 *
 * Failure is sticky: writers need no checks, th__text_take reports once. The growing form's memory comes from the
 * context and goes to whoever takes it; th__text_fini frees what was not taken. */
#ifndef THUNDER_BASE_TEXT_H
#define THUNDER_BASE_TEXT_H

#include "base/ctx.h"

typedef struct th__text {
    th_ctx *ctx; /* NULL: a fixed buffer */
    char *data;
    uint32_t length, cap;
    th_status status;
} th__text;

void th__text_bytes(th__text *text, const char *bytes, size_t length);
void th__text_z(th__text *text, const char *bytes);
void th__text_char(th__text *text, char c);
void th__text_int(th__text *text, int64_t value);
void th__text_float(th__text *text, double value);                       /* as Python's repr; inf as float("inf") */
void th__text_quoted(th__text *text, const char *bytes, size_t length);  /* a Python string literal */
void th__text_comment(th__text *text, const char *bytes, size_t length); /* trimmed, control characters replaced */
th_status th__text_take(th__text *text, char **out, size_t *length);
void th__text_fini(th__text *text);

/* The number that a Python float literal spells, whatever the locale; false when it is none. */
bool th__float_parse(const char *bytes, size_t length, double *out);

#endif
