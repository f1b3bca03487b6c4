/* JSON's numbers: from text, and to it. */
#include "json_int.h"

#include <math.h>
#include <stdio.h>

enum {
    EXACT_POWER = 22,  /* 10^22 is the last power of ten that a double holds exactly */
    SHORTEST_MAX = 17, /* digits that identify any double */
};

/* digits × 10^e10, correctly rounded. Texts handed to strtod have no decimal point, so that the
 * locale does not matter. */
static double decimal(const char *digits, size_t n, int e10)
{
    static const double power[EXACT_POWER + 1] = { 1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                                   1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                                   1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22 };
    if (n <= ORCH_JSON_SAFE_DIGITS && e10 >= -EXACT_POWER && e10 <= EXACT_POWER) {
        uint64_t m = 0;
        for (size_t i = 0; i < n; i++)
            m = m * 10 + (uint64_t)(digits[i] - '0');
        /* Both operands are exact, so the one operation rounds correctly. */
        if (m <= ORCH_JSON_SAFE_INTEGER)
            return e10 < 0 ? (double)m / power[-e10] : (double)m * power[e10];
    }
    char text[ORCH_JSON_NUMBER_BYTES + 16];
    memcpy(text, digits, n);
    snprintf(text + n, sizeof text - n, "e%d", e10);
    return strtod(text, NULL);
}

double orch_json_number_value(const char *p, const char *end)
{
    char digits[ORCH_JSON_NUMBER_BYTES];
    size_t n = 0;
    int e10 = 0, exponent = 0;
    bool negative = *p == '-', fraction = false;

    for (p += negative; p < end && (*p | 0x20) != 'e'; p++) {
        if (*p == '.') {
            fraction = true;
            continue;
        }
        e10 -= fraction;
        if (n > 0 || *p != '0')
            digits[n++] = *p;
    }
    if (p < end) {
        bool minus = *++p == '-';
        for (p += *p == '-' || *p == '+'; p < end; p++)
            exponent = exponent < 10000 ? exponent * 10 + (*p - '0') : exponent;
        exponent = minus ? -exponent : exponent;
    }
    double v = n ? decimal(digits, n, e10 + exponent) : 0;
    return negative ? -v : v;
}

/* Fewest digits that read back as v (positive and finite), without trailing zeros; v is
 * digits × 10^*e10. Up to 15 digits the nearest decimal is the only candidate of its length, so
 * the search starts there; subnormals have less precision and start at 1. */
static size_t shortest(double v, char digits[SHORTEST_MAX + 1], int *e10)
{
    char text[SHORTEST_MAX + 16];
    int e2;
    bool power_of_two = frexp(v, &e2) == 0.5;
    for (int n = v < 0x1p-1022 ? 1 : 15;; n++) {
        snprintf(text, sizeof text, "%.*e", n - 1, v);
        const char *e = strchr(text, 'e');
        digits[0] = text[0];
        memcpy(digits + 1, e - (n - 1), (size_t)(n - 1)); /* the locale's point skipped */
        *e10 = atoi(e + 1) - (n - 1);
        size_t len = (size_t)n;
        bool found = n == SHORTEST_MAX || decimal(digits, len, *e10) == v;
        if (!found && power_of_two) {
            /* The gap below a power of two is half the gap above: the next decimal up may read back
             * where the nearest, which lies below, does not. */
            size_t i = len;
            while (i > 0 && digits[i - 1] == '9')
                digits[--i] = '0';
            if (i == 0) {
                digits[0] = '1'; /* 99…9 became 100…0, one digit longer: drop a zero */
                ++*e10;
            } else {
                digits[i - 1]++;
            }
            found = decimal(digits, len, *e10) == v;
        }
        if (!found)
            continue;
        while (len > 1 && digits[len - 1] == '0')
            len--, ++*e10;
        return len;
    }
}

static void put_uint(struct orch_buf *out, uint64_t v)
{
    char text[20];
    size_t at = sizeof text;
    do
        text[--at] = (char)('0' + v % 10);
    while (v /= 10);
    orch_buf_add(out, text + at, sizeof text - at);
}

/* ECMAScript's Number::toString, which RFC 8785 prescribes; but -0 keeps its sign. */
void orch_json_put_number(struct orch_buf *out, double v)
{
    if (!isfinite(v)) {
        orch_buf_add(out, "null", 4);
        return;
    }
    if (signbit(v)) {
        orch_buf_char(out, '-');
        v = -v;
    }
    if (v <= (double)ORCH_JSON_SAFE_INTEGER && v == (double)(uint64_t)v) {
        put_uint(out, (uint64_t)v);
        return;
    }

    static const char zeros[] = "00000000000000000000";
    char digits[SHORTEST_MAX + 1];
    int e10;
    size_t k = shortest(v, digits, &e10);
    int point = (int)k + e10; /* v is 0.DIGITS × 10^point */
    if (e10 >= 0 && point <= 21) {
        orch_buf_add(out, digits, k);
        orch_buf_add(out, zeros, (size_t)e10);
    } else if (point > 0 && point <= 21) {
        orch_buf_add(out, digits, (size_t)point);
        orch_buf_char(out, '.');
        orch_buf_add(out, digits + point, k - (size_t)point);
    } else if (point > -6 && point <= 0) {
        orch_buf_add(out, "0.", 2);
        orch_buf_add(out, zeros, (size_t)-point);
        orch_buf_add(out, digits, k);
    } else {
        orch_buf_char(out, digits[0]);
        if (k > 1) {
            orch_buf_char(out, '.');
            orch_buf_add(out, digits + 1, k - 1);
        }
        orch_buf_str(out, point > 0 ? "e+" : "e-");
        put_uint(out, (uint64_t)(point > 0 ? point - 1 : 1 - point));
    }
}

double orch_json_number(const struct orch_json_doc *d, uint32_t tok)
{
    const struct orch_json_tok *t = &d->toks[tok];
    return t->type == ORCH_JSON_NUMBER
               ? orch_json_number_value(d->text + t->start, d->text + t->end)
               : NAN;
}

bool orch_json_int(const struct orch_json_doc *d, uint32_t tok, int64_t *out)
{
    const struct orch_json_tok *t = &d->toks[tok];
    if (t->type != ORCH_JSON_NUMBER || !(t->flags & ORCH_JSON_INTEGER))
        return false;
    const char *p = d->text + t->start, *end = d->text + t->end;
    bool negative = *p == '-';
    uint64_t v = 0, max = (uint64_t)INT64_MAX + negative;
    p += negative;
    if (end - p > ORCH_JSON_SAFE_DIGITS)
        return false;
    for (; p < end; p++)
        v = v * 10 + (uint64_t)(*p - '0');
    if (v > max)
        return false;
    *out = negative ? (int64_t)(0 - v) : (int64_t)v;
    return true;
}
