/* Inside base's JSON: what its files call of each other. */
#ifndef ORCH_BASE_JSON_INT_H
#define ORCH_BASE_JSON_INT_H

#include "json.h"

#include <endian.h>
#include <string.h>

enum {
    ORCH_JSON_NUMBER_BYTES = 64, /* longest number text */
    ORCH_JSON_SAFE_DIGITS = 19,  /* digits that always fit a uint64_t */
    ORCH_JSON_FEW_KEYS = 16,     /* objects up to this size are handled pair by pair */
};
#define ORCH_JSON_SAFE_INTEGER (UINT64_C(1) << 53)

#define ORCH_ONES UINT64_C(0x0101010101010101)
#define ORCH_HIGHS UINT64_C(0x8080808080808080)

/* The first byte from p on that is not plain text in a JSON string: a quote, a backslash, a control
 * character or part of a multi-byte character. Eight bytes at a time: subtraction borrows out of a
 * byte only above a byte that matched, so the lowest match is always exact. */
static inline const char *orch_json_plain_end(const char *p, const char *end)
{
    while (end - p >= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        w = le64toh(w);
        uint64_t quote = w ^ (ORCH_ONES * '"'), slash = w ^ (ORCH_ONES * '\\');
        uint64_t hit = (w | (w - ORCH_ONES * 0x20) | (quote - ORCH_ONES) | (slash - ORCH_ONES)) &
                       ORCH_HIGHS;
        if (hit)
            return p + (__builtin_ctzll(hit) >> 3);
        p += 8;
    }
    for (; p < end; p++) {
        unsigned char c = (unsigned char)*p;
        if (c < 0x20 || c >= 0x80 || c == '"' || c == '\\')
            break;
    }
    return p;
}

/* The length of the UTF-8 sequence at p, whose first byte is 0x80 or above; or minus the length of
 * the part that could have begun one, at least 1: what one U+FFFD stands for. */
static inline int orch_utf8_step(const char *text, const char *end)
{
    const unsigned char *p = (const unsigned char *)text;
    unsigned lo = 0x80, hi = 0xBF;
    int n;

    if (p[0] < 0xC2 || p[0] > 0xF4)
        return -1;
    if (p[0] < 0xE0) {
        n = 2;
    } else if (p[0] < 0xF0) {
        n = 3;
        lo = p[0] == 0xE0 ? 0xA0 : lo;
        hi = p[0] == 0xED ? 0x9F : hi;
    } else {
        n = 4;
        lo = p[0] == 0xF0 ? 0x90 : lo;
        hi = p[0] == 0xF4 ? 0x8F : hi;
    }
    for (int i = 1; i < n; i++) {
        if (end - text <= i || p[i] < lo || p[i] > hi)
            return -i;
        lo = 0x80;
        hi = 0xBF;
    }
    return n;
}

/* A string token's bytes between the quotes. */
static inline struct orch_slice orch_json_key_slice(const struct orch_json_doc *d, uint32_t tok)
{
    const struct orch_json_tok *t = &d->toks[tok];
    return (struct orch_slice){ d->text + t->start, t->end - t->start };
}

/* json_text.c */
/* The code unit of four hexadecimal digits, or -1 minus the number of digits before the bad one. */
int orch_json_hex4(const char *p, const char *end);
/* Decodes the escape at p (its backslash) of a scanned string; returns what follows it. */
const char *orch_json_unescape(const char *p, const char *end, char out[4], size_t *n_out);
void orch_json_append_unescaped(struct orch_buf *out, const char *p, const char *end);
/* The short form where there is one, else \u00xx; c is a quote, a backslash or below 0x20. */
void orch_json_put_escape(struct orch_buf *out, unsigned char c);

/* json_number.c */
/* The value of a number text that keeps the grammar and the length limit. */
double orch_json_number_value(const char *p, const char *end);

#endif
