/* Text building and the spelling of numbers and strings as Python spells them; see text.h. */
#include "base/text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool room(th__text *text, size_t more) {
    uint64_t need = (uint64_t)text->length + more + 1;
    if (text->status != TH_OK) return false;
    if (need <= text->cap) return true;
    if (!text->ctx) {
        text->status = TH_ELIMIT;
    } else if (!th__grow(text->ctx, &text->data, &text->cap, need + need / 2 + 200, 1)) {
        text->status = th_ctx_error(text->ctx)->status;
    }
    return text->status == TH_OK;
}

void th__text_bytes(th__text *text, const char *bytes, size_t length) {
    if (!room(text, length)) return;
    memcpy(text->data + text->length, bytes, length);
    text->length += (uint32_t)length;
    text->data[text->length] = '\0';
}

void th__text_z(th__text *text, const char *bytes) { th__text_bytes(text, bytes, strlen(bytes)); }
void th__text_char(th__text *text, char c) { th__text_bytes(text, &c, 1); }

void th__text_int(th__text *text, int64_t value) {
    char digits[24];
    char *at = digits + sizeof digits;
    uint64_t rest = value < 0 ? -(uint64_t)value : (uint64_t)value;
    do *--at = (char)('0' + rest % 10);
    while ((rest /= 10) != 0);
    if (value < 0) *--at = '-';
    th__text_bytes(text, at, (size_t)(digits + sizeof digits - at));
}

th_status th__text_take(th__text *text, char **out, size_t *length) {
    room(text, 0); /* an empty text is still a NUL-terminated one */
    if (text->status != TH_OK) return text->status;
    text->data[text->length] = '\0';
    *out = text->data;
    if (length) *length = text->length;
    text->data = NULL;
    return TH_OK;
}

void th__text_fini(th__text *text) {
    if (text->ctx && text->data) th_ctx_alloc(text->ctx, text->data, 0);
    text->data = NULL;
}

/* ---- floats: the fewest digits that read back as the same number, laid out as Python's repr does ---- */

/* The locale's decimal point sits between the first and the second digit of "%.1e"; it may be several bytes. */
static size_t locale_point(char point[16]) {
    char sample[32];
    int length = snprintf(sample, sizeof sample, "%.1e", 1.5);
    const char *end = memchr(sample, '5', (size_t)length);
    size_t size = end ? (size_t)(end - sample) - 1 : 0;
    if (size == 0 || size > 15) size = 1, sample[1] = '.';
    memcpy(point, sample + 1, size);
    return size;
}

/* Decimal digits and exponent of |value|: value = 0.d1d2d3... * 10^*exponent. Returns the number of digits. */
static int shortest_digits(double value, char digits[20], int *exponent) {
    char sample[64];
    char point[16];
    size_t point_size = locale_point(point);
    int precision = 14;
    do snprintf(sample, sizeof sample, "%.*e", precision, value);
    while (strtod(sample, NULL) != value && ++precision < 17);
    const char *e = strchr(sample, 'e');
    int count = 0;
    digits[count++] = sample[0];
    for (const char *at = sample + 1 + point_size; at < e; at++) digits[count++] = *at;
    while (count > 1 && digits[count - 1] == '0') count--;
    *exponent = atoi(e + 1) + 1;
    return count;
}

void th__text_float(th__text *text, double value) {
    if (isnan(value)) {
        th__text_z(text, "float(\"nan\")");
        return;
    }
    if (isinf(value)) {
        th__text_z(text, value < 0 ? "float(\"-inf\")" : "float(\"inf\")");
        return;
    }
    if (signbit(value)) th__text_char(text, '-');
    char digits[20];
    int point, count = shortest_digits(fabs(value), digits, &point);
    if (value == 0) point = 1;
    if (point > 16 || point < -3) { /* 1.5e+16, 1e-05 */
        char tail[16];
        th__text_bytes(text, digits, 1);
        if (count > 1) th__text_char(text, '.');
        th__text_bytes(text, digits + 1, (size_t)count - 1);
        snprintf(tail, sizeof tail, "e%c%02d", point > 0 ? '+' : '-', abs(point - 1));
        th__text_z(text, tail);
        return;
    }
    if (point <= 0) th__text_bytes(text, "0.0000", (size_t)(2 - point));
    for (int i = 0; i < count || i < point; i++) {
        if (i == point && i > 0) th__text_char(text, '.');
        th__text_char(text, i < count ? digits[i] : '0');
    }
    if (point >= count) th__text_z(text, ".0");
}

bool th__float_parse(const char *bytes, size_t length, double *out) {
    char copy[400], point[16];
    size_t point_size = locale_point(point), used = 0;
    if (length == 0 || length > 300) return false;
    for (size_t i = 0; i < length; i++) {
        if (bytes[i] == '.') {
            memcpy(copy + used, point, point_size);
            used += point_size;
        } else {
            copy[used++] = bytes[i];
        }
        if (used > sizeof copy - 20) return false;
    }
    copy[used] = '\0';
    char *end;
    *out = strtod(copy, &end);
    return end == copy + used;
}

/* ---- strings ---- */

/* Length of the UTF-8 encoded surrogate at `at`, which Python source cannot hold as itself; 0 when there is none. */
static bool is_surrogate(const unsigned char *at, size_t left) {
    return left >= 3 && at[0] == 0xed && at[1] >= 0xa0 && at[1] <= 0xbf && (at[2] & 0xc0) == 0x80;
}

void th__text_quoted(th__text *text, const char *bytes, size_t length) {
    th__text_char(text, '"');
    for (size_t i = 0; i < length; i++) {
        const unsigned char *at = (const unsigned char *)bytes + i;
        char escape[8];
        switch (*at) {
        case '"': th__text_z(text, "\\\""); continue;
        case '\\': th__text_z(text, "\\\\"); continue;
        case '\n': th__text_z(text, "\\n"); continue;
        case '\r': th__text_z(text, "\\r"); continue;
        case '\t': th__text_z(text, "\\t"); continue;
        default: break;
        }
        if (*at < 0x20 || *at == 0x7f) {
            snprintf(escape, sizeof escape, "\\x%02x", *at);
            th__text_z(text, escape);
        } else if (is_surrogate(at, length - i)) {
            unsigned code = 0xd000u | (at[1] & 0x3fu) << 6 | (at[2] & 0x3fu);
            snprintf(escape, sizeof escape, "\\u%04x", code);
            th__text_z(text, escape);
            i += 2;
        } else {
            th__text_char(text, (char)*at);
        }
    }
    th__text_char(text, '"');
}

void th__text_comment(th__text *text, const char *bytes, size_t length) {
    while (length > 0 && (unsigned char)bytes[0] <= ' ') bytes++, length--;
    while (length > 0 && (unsigned char)bytes[length - 1] <= ' ') length--;
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)bytes[i];
        th__text_char(text, c < 0x20 || c == 0x7f ? '?' : (char)c);
    }
}
