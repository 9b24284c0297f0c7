/* Names in a trace: what is an identifier, what is taken, and how a free one is made.
 *
 * A trace keeps one bit per interned string that is in use as the name of a value or of an opaque entry.
 */
#include "base/text.h"
#include "ir/ir.h"

#include <stdio.h>
#include <string.h>

static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static bool in_list(const char *const *list, const char *text, size_t length) {
    for (; *list; list++) {
        if (strncmp(*list, text, length) == 0 && (*list)[length] == '\0') return true;
    }
    return false;
}

static bool is_keyword(const char *text, size_t length) {
    static const char *const keywords[] = {
        "False", "None",     "True",  "and",    "as",   "assert", "async",  "await",    "break",
        "class", "continue", "def",   "del",    "elif", "else",   "except", "finally",  "for",
        "from",  "global",   "if",    "import", "in",   "is",     "lambda", "nonlocal", "not",
        "or",    "pass",     "raise", "return", "try",  "while",  "with",   "yield",    NULL};
    return length >= 2 && length <= 8 && in_list(keywords, text, length);
}

bool th__name_is_identifier(const char *text, size_t length) {
    if (length == 0 || !is_letter(text[0])) return false;
    for (size_t i = 1; i < length; i++) {
        if (!is_letter(text[i]) && !is_digit(text[i])) return false;
    }
    return !is_keyword(text, length);
}

bool th__name_is_dotted(const char *text, size_t length) {
    bool dotted = false;
    for (;;) {
        const char *dot = memchr(text, '.', length);
        size_t part = dot ? (size_t)(dot - text) : length;
        if (!th__name_is_identifier(text, part)) return false;
        if (!dot) return dotted;
        dotted = true;
        text += part + 1;
        length -= part + 1;
    }
}

bool th__name_is_reserved(const char *text, size_t length) {
    static const char *const reserved[] = {"_", "torch", "slice", "float", "complex", NULL};
    return length <= 7 && in_list(reserved, text, length);
}

/* First words of dotted callees: a value of that name would hide the module in the printed Python. */
static bool is_common_module(const char *text, size_t length) {
    static const char *const modules[] = {"operator", "builtins", "math", "numpy", "np", "thunder", NULL};
    return length <= 8 && in_list(modules, text, length);
}

bool th__name_used(const th_trace *t, th_str name) {
    uint32_t word = name / 32;
    return word < t->cap_used_names && (t->used_names[word] >> name % 32 & 1);
}

void th__name_mark(th_trace *t, th_str name) {
    uint32_t word = name / 32, before = t->cap_used_names;
    if (word >= before) {
        if (!th__grow(t->ctx, &t->used_names, &t->cap_used_names, (uint64_t)word + 1, sizeof *t->used_names)) {
            th__trace_fail(t, th_ctx_error(t->ctx)->status);
            return;
        }
        memset(t->used_names + before, 0, (t->cap_used_names - before) * sizeof *t->used_names);
    }
    t->used_names[word] |= 1u << name % 32;
}

th_str th__name_fresh(th_trace *t) {
    char buffer[16];
    th_str name;
    do {
        th__text text = {.data = buffer, .cap = sizeof buffer};
        th__text_char(&text, 't');
        th__text_int(&text, t->next_name++);
        name = th_intern(t->ctx, buffer, text.length);
    } while (name && th__name_used(t, name));
    return name;
}

static bool is_free(const th_trace *t, th_str name) {
    const char *text = th_str_get(t->ctx, name);
    size_t length = th_str_len(t->ctx, name);
    return th__name_is_identifier(text, length) && !th__name_is_reserved(text, length) &&
           !is_common_module(text, length) && !th__name_used(t, name);
}

th_str th__name_unique(th_trace *t, const char *text, size_t length) {
    char base[80];
    size_t used = 0;
    if (length == 0) text = "v", length = 1;
    if (is_digit(text[0])) base[used++] = '_';
    for (size_t i = 0; i < length && used < 60; i++)
        base[used++] = is_letter(text[i]) || is_digit(text[i]) ? text[i] : '_';
    th_str name = th_intern(t->ctx, base, used);
    /* The first few suffixes count from 1; after that from the number of values, so that many equal names stay cheap.
     */
    for (uint32_t suffix = 1; name && !is_free(t, name); suffix++) {
        if (suffix == 10 && t->nvalues > suffix) suffix = t->nvalues;
        size_t more = (size_t)snprintf(base + used, sizeof base - used, "_%u", suffix);
        name = th_intern(t->ctx, base, used + more);
    }
    return name;
}
