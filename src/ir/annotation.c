/* The text inside an annotation's quotes: "cuda:0 f32[2, 3]{1, 2} grad; alias 1; offset 4; random; writes x".
 *
 * Scans the decoded string in the parser's buffer, which nothing else uses meanwhile. Columns are right as long as the
 * literal holds no escapes.
 */
#include "ir/parser.h"

#include <string.h>

enum { MAX_ALIAS = 1000000 };

typedef struct note_text {
    const char *at, *end;
    uint32_t line, column; /* of `at`, as long as the literal holds no escapes */
} note_text;

#define FAIL_NOTE(p, n, ...) th_fail_at((p)->ctx, TH_ESYNTAX, (n)->line, (n)->column, __VA_ARGS__)

static void note_skip(note_text *n, size_t size) {
    n->at += size;
    n->column += (uint32_t)size;
}

static void note_blanks(note_text *n) {
    while (n->at < n->end && *n->at == ' ') note_skip(n, 1);
}

static bool note_take(note_text *n, char c) {
    note_blanks(n);
    if (n->at == n->end || *n->at != c) return false;
    note_skip(n, 1);
    return true;
}

static size_t note_word(note_text *n) {
    size_t size = 0;
    note_blanks(n);
    while (n->at + size < n->end) {
        char c = n->at[size];
        bool word = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
        if (!word) break;
        size++;
    }
    return size;
}

static bool note_is(const note_text *n, size_t size, const char *word) {
    return strlen(word) == size && memcmp(word, n->at, size) == 0;
}

static th_status note_int(th__parser *p, note_text *n, int64_t *out) {
    size_t size = note_word(n);
    int64_t value = 0;
    for (size_t i = 0; i < size; i++) {
        if (n->at[i] < '0' || n->at[i] > '9')
            size = 0;
        else if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, n->at[i] - '0', &value)) {
            return FAIL_NOTE(p, n, "the number does not fit in 64 bits");
        }
    }
    if (size == 0) return FAIL_NOTE(p, n, "expected a number");
    note_skip(n, size);
    *out = value;
    return TH_OK;
}

/* "4, 2]" after its opening bracket, into p->dims from `start`. */
static th_status note_dims(th__parser *p, note_text *n, uint32_t start, char close, uint32_t *count) {
    *count = 0;
    if (note_take(n, close)) return TH_OK;
    do {
        int64_t dim;
        TRY(note_int(p, n, &dim));
        if (!th__reserve(p->ctx, &p->dims, &p->cap_dims, (uint64_t)start + *count + 1, sizeof *p->dims)) {
            return th__parse_no_memory(p);
        }
        p->dims[start + (*count)++] = dim;
    } while (note_take(n, ','));
    if (!note_take(n, close)) return FAIL_NOTE(p, n, "expected ',' or '%c'", close);
    return TH_OK;
}

static th_status note_device(th__parser *p, note_text *n, size_t size, th_dev *out) {
    char name[64];
    int64_t index = -1;
    if (size >= sizeof name) return FAIL_NOTE(p, n, "the device's name is too long");
    memcpy(name, n->at, size);
    name[size] = '\0';
    note_text start = *n;
    note_skip(n, size);
    if (n->at < n->end && *n->at == ':') {
        note_skip(n, 1);
        TRY(note_int(p, n, &index));
        if (index > INT32_MAX) return FAIL_NOTE(p, &start, "the device's index is too large");
    }
    *out = th_device(p->ctx, name, (int32_t)index);
    if (*out) return TH_OK;
    if (th_ctx_error(p->ctx)->status == TH_ENOMEM) return TH_ENOMEM;
    return FAIL_NOTE(p, &start, "%s is not a device", name);
}

static th_status note_tensor(th__parser *p, note_text *n, size_t size, th_typeref *out) {
    note_text start = *n;
    th_dev device;
    uint32_t ndim, nstrides = 0;
    uint8_t flags = 0;
    TRY(note_device(p, n, size, &device));
    size = note_word(n);
    th_dtype dtype = th_dtype_from_text(n->at, size);
    if (dtype == TH_DTYPE_NONE) return FAIL_NOTE(p, n, "expected a dtype such as f32");
    note_skip(n, size);
    if (!note_take(n, '[')) return FAIL_NOTE(p, n, "expected '[' and the shape");
    TRY(note_dims(p, n, 0, ']', &ndim));
    bool strided = note_take(n, '{');
    if (strided) TRY(note_dims(p, n, ndim, '}', &nstrides));
    if (strided && nstrides != ndim) {
        return FAIL_NOTE(p, &start, "%u strides for %u dimensions", (unsigned)nstrides, (unsigned)ndim);
    }
    size = note_word(n);
    if (note_is(n, size, "grad")) {
        note_skip(n, size);
        flags = TH_TYPE_REQUIRES_GRAD;
    }
    *out = th_type_tensor(p->ctx, dtype, device, ndim, p->dims, strided && ndim ? p->dims + ndim : NULL, flags);
    if (*out) return TH_OK;
    if (th_ctx_error(p->ctx)->status == TH_ENOMEM) return TH_ENOMEM;
    return FAIL_NOTE(p, &start, "the tensor has more than 2^63 elements");
}

static th_status note_type(th__parser *p, note_text *n, th_typeref *out) {
    static const char *const plain[] = {"int", "float", "bool", "object"};
    size_t size = note_word(n);
    for (int i = 0; i < 4; i++) {
        if (!note_is(n, size, plain[i])) continue;
        note_skip(n, size);
        *out = th_type_plain(p->ctx, (th_type_kind)(TH_TYPE_INT + i));
        return *out ? TH_OK : th__parse_no_memory(p);
    }
    if (size == 0) return FAIL_NOTE(p, n, "expected a type such as \"cpu f32[2, 3]\" or \"int\"");
    return note_tensor(p, n, size, out);
}

static th_status note_writes(th__parser *p, note_text *n) {
    do {
        th_val value;
        size_t size = note_word(n);
        if (size == 0) return FAIL_NOTE(p, n, "expected the name of a value");
        TRY(th__parse_live(p, n->at, size, n->line, n->column, &value));
        if (!value) return FAIL_NOTE(p, n, "%.*s is no value here", (int)(size < 100 ? size : 100), n->at);
        uint8_t kind = th_type_get(p->ctx, p->t->values[value].type)->kind;
        if (kind != TH_TYPE_TENSOR && kind != TH_TYPE_OBJECT) return FAIL_NOTE(p, n, "a number cannot be written");
        if (!th__reserve(p->ctx, &p->writes, &p->cap_writes, (uint64_t)p->nwrites + 1, sizeof *p->writes)) {
            return th__parse_no_memory(p);
        }
        p->writes[p->nwrites++] = value;
        note_skip(n, size);
    } while (note_take(n, ','));
    return TH_OK;
}

/* One part after the type: alias N, offset N, random, effect, no_grad, recompute, late, writes a, b. */
static th_status note_part(th__parser *p, note_text *n, th__facts *f, bool of_value, bool of_op) {
    size_t size = note_word(n);
    note_text start = *n;
    bool alias = note_is(n, size, "alias"), offset = note_is(n, size, "offset");
    bool random = note_is(n, size, "random"), effect = note_is(n, size, "effect"), writes = note_is(n, size, "writes");
    if (of_value && (alias || offset)) {
        int64_t number;
        if (alias ? f->has_alias : f->has_offset) return FAIL_NOTE(p, &start, "given twice");
        note_skip(n, size);
        TRY(note_int(p, n, &number));
        if (alias && (number == 0 || number > MAX_ALIAS)) {
            return FAIL_NOTE(p, &start, "alias groups are numbered from 1 to %d", MAX_ALIAS);
        }
        if (alias)
            f->alias = (uint32_t)number, f->has_alias = true;
        else
            f->offset = number, f->has_offset = true;
        return TH_OK;
    }
    uint8_t mark = note_is(n, size, "no_grad")     ? TH_MARK_NO_GRAD
                   : note_is(n, size, "recompute") ? TH_MARK_RECOMPUTE
                   : note_is(n, size, "late")      ? TH_MARK_LATE
                   : note_is(n, size, "sized")     ? TH_MARK_SIZED
                   : note_is(n, size, "raises")    ? TH_MARK_RAISES
                                                   : 0;
    if (!of_op || !(random || effect || writes || mark)) {
        return FAIL_NOTE(p, &start, "expected one of:%s%s", of_value ? " alias, offset" : "",
                         of_op ? " random, effect, no_grad, recompute, late, sized, raises, writes" : "");
    }
    f->has_effects = true;
    if (mark) {
        if (f->marks & mark) return FAIL_NOTE(p, &start, "given twice");
        f->marks |= mark;
        note_skip(n, size);
        return TH_OK;
    }
    uint8_t bit = random ? TH_FX_RANDOM : effect ? TH_FX_STATE : TH_FX_WRITES;
    if (f->effects & bit) return FAIL_NOTE(p, &start, "given twice");
    f->effects |= bit;
    note_skip(n, size);
    return writes ? note_writes(p, n) : TH_OK;
}

/* Parse the current STRING token as an annotation: of a value (type first), of an operation (effects), or of both. */
th_status th__parse_annotation(th__parser *p, th__facts *f, bool of_value, bool of_op) {
    size_t length;
    if (p->tok.kind != TH__TOK_STRING) return th__parse_expected(p, "an annotation in quotes");
    TRY(th__parse_decode(p, &p->tok, &length));
    note_text n = {p->buffer, p->buffer + length, p->tok.line, p->tok.column + 1};
    *f = (th__facts){0};
    if (of_value)
        TRY(note_type(p, &n, &f->type));
    else
        TRY(note_part(p, &n, f, of_value, of_op));
    while (note_take(&n, ';')) TRY(note_part(p, &n, f, of_value, of_op));
    note_blanks(&n);
    if (n.at != n.end) return FAIL_NOTE(p, &n, "expected ';' or the end of the annotation");
    return th__parse_advance(p);
}
