/* The strict JSON scanner, what is derived from its tokens, and the cJSON builder. */
#include "json.h"

#include <cjson/cJSON.h>
#include <endian.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    DEFAULT_BYTES = 16 << 20,
    DEFAULT_DEPTH = 64,
    MAX_DEPTH = 1024, /* the canonical form and the Lua conversion recurse as deep */
    DEFAULT_TOKENS = 1000000,
    KEEP_TOKENS = 64 * 1024, /* a token array above this is given back when the texts get small */
    NUMBER_BYTES = 64,       /* longest number text */
    FEW_KEYS = 16,           /* objects up to this size are handled pair by pair */
    MAX_SAFE_DIGITS = 19,    /* digits that always fit a uint64_t */
    EXACT_POWER = 22,        /* 10^22 is the last power of ten that a double holds exactly */
    SHORTEST_MAX = 17,       /* digits that identify any double */
};
#define MAX_SAFE_INTEGER (UINT64_C(1) << 53)
#define NO_TOKEN UINT32_MAX

static const char *const RULE_END = "unexpected end of text";
static const char *const RULE_UTF8 = "invalid UTF-8";
static const char *const RULE_ESCAPE = "invalid escape";
static const char *const RULE_DIGIT = "expected a digit";
static const char *const RULE_TOKENS = "too many values";

/* ---- bytes and characters */

#define ONES UINT64_C(0x0101010101010101)
#define HIGHS UINT64_C(0x8080808080808080)

/* The first byte from p on that is not plain text in a JSON string: a quote, a backslash, a control
 * character or part of a multi-byte character. Eight bytes at a time: subtraction borrows out of a
 * byte only above a byte that matched, so the lowest match is always exact. */
static inline const char *plain_end(const char *p, const char *end)
{
    while (end - p >= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        w = le64toh(w);
        uint64_t quote = w ^ (ONES * '"'), slash = w ^ (ONES * '\\');
        uint64_t hit = (w | (w - ONES * 0x20) | (quote - ONES) | (slash - ONES)) & HIGHS;
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
static inline int utf8_step(const char *text, const char *end)
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

bool orch_utf8_valid(struct orch_slice s)
{
    const char *p = s.n ? s.p : "", *end = p + s.n;
    while ((p = plain_end(p, end)) < end) {
        int n = (unsigned char)*p < 0x80 ? 1 : utf8_step(p, end);
        if (n < 0)
            return false;
        p += n;
    }
    return true;
}

/* The code unit of four hexadecimal digits, or -1 minus the number of digits before the bad one. */
static int hex4(const char *p, const char *end)
{
    int v = 0;
    for (int i = 0; i < 4; i++) {
        if (end - p <= i)
            return -1 - i;
        unsigned char c = (unsigned char)p[i], lower = c | 0x20;
        if (c >= '0' && c <= '9')
            v = v << 4 | (c - '0');
        else if (lower >= 'a' && lower <= 'f')
            v = v << 4 | (lower - 'a' + 10);
        else
            return -1 - i;
    }
    return v;
}

/* Decodes the escape at p (its backslash) of a scanned string; returns what follows it. */
static const char *unescape(const char *p, const char *end, char out[4], size_t *n_out)
{
    static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
    unsigned char *o = (unsigned char *)out;
    *n_out = 1;
    if (p[1] != 'u') {
        const char *at = strchr(from, p[1]);
        out[0] = at ? to[at - from] : p[1];
        return p + 2;
    }
    unsigned c = (unsigned)hex4(p + 2, end);
    p += 6;
    if ((c & 0xF800) == 0xD800) {
        c = 0x10000 + ((c & 0x3FF) << 10) + ((unsigned)hex4(p + 2, end) & 0x3FF);
        p += 6;
    }
    if (c < 0x80) {
        o[0] = (unsigned char)c;
    } else if (c < 0x800) {
        o[0] = (unsigned char)(0xC0 | c >> 6);
        o[1] = (unsigned char)(0x80 | (c & 0x3F));
        *n_out = 2;
    } else if (c < 0x10000) {
        o[0] = (unsigned char)(0xE0 | c >> 12);
        o[1] = (unsigned char)(0x80 | (c >> 6 & 0x3F));
        o[2] = (unsigned char)(0x80 | (c & 0x3F));
        *n_out = 3;
    } else {
        o[0] = (unsigned char)(0xF0 | c >> 18);
        o[1] = (unsigned char)(0x80 | (c >> 12 & 0x3F));
        o[2] = (unsigned char)(0x80 | (c >> 6 & 0x3F));
        o[3] = (unsigned char)(0x80 | (c & 0x3F));
        *n_out = 4;
    }
    return p;
}

static void append_unescaped(struct orch_buf *out, const char *p, const char *end)
{
    while (p < end) {
        const char *slash = memchr(p, '\\', (size_t)(end - p));
        orch_buf_add(out, p, (size_t)((slash ? slash : end) - p));
        if (!slash)
            return;
        char c[4];
        size_t n;
        p = unescape(slash, end, c, &n);
        orch_buf_add(out, c, n);
    }
}

/* ---- duplicate keys */

static struct orch_slice key_slice(const struct orch_json_doc *d, uint32_t tok)
{
    const struct orch_json_tok *t = &d->toks[tok];
    return (struct orch_slice){ d->text + t->start, t->end - t->start };
}

static inline uint64_t rotl(uint64_t v, int by)
{
    return v << by | v >> (64 - by);
}

struct sip {
    uint64_t a, b, c, d;
};

static inline void sip_round(struct sip *s)
{
    s->a += s->b, s->b = rotl(s->b, 13) ^ s->a, s->a = rotl(s->a, 32);
    s->c += s->d, s->d = rotl(s->d, 16) ^ s->c;
    s->a += s->d, s->d = rotl(s->d, 21) ^ s->a;
    s->c += s->b, s->b = rotl(s->b, 17) ^ s->c, s->c = rotl(s->c, 32);
}

/* SipHash-1-3 under a secret of this thread, so that a peer cannot choose keys that collide. */
static uint64_t key_hash(struct orch_slice s)
{
    static _Thread_local uint64_t secret[2];
    static _Thread_local bool seeded;
    if (!seeded) {
        if (orch_random(secret, sizeof secret) < 0)
            abort();
        seeded = true;
    }
    struct sip h = {
        secret[0] ^ UINT64_C(0x736f6d6570736575),
        secret[1] ^ UINT64_C(0x646f72616e646f6d),
        secret[0] ^ UINT64_C(0x6c7967656e657261),
        secret[1] ^ UINT64_C(0x7465646279746573),
    };
    const char *p = s.p;
    uint64_t w;
    for (size_t left = s.n; left >= 8; left -= 8, p += 8) {
        memcpy(&w, p, 8);
        h.d ^= w;
        sip_round(&h);
        h.a ^= w;
    }
    w = 0;
    memcpy(&w, p, s.n & 7);
    w ^= (uint64_t)s.n << 56;
    h.d ^= w;
    sip_round(&h);
    h.a ^= w;
    h.c ^= 0xFF;
    sip_round(&h);
    sip_round(&h);
    sip_round(&h);
    return h.a ^ h.b ^ h.c ^ h.d;
}

/* The key's characters: the text's own bytes, or unescaped into buf. */
static struct orch_slice key_text(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *buf)
{
    struct orch_slice s = key_slice(d, tok);
    if (!(d->toks[tok].flags & ORCH_JSON_ESCAPED))
        return s;
    buf->n = 0;
    append_unescaped(buf, s.p, s.p + s.n);
    return (struct orch_slice){ buf->p, buf->n };
}

/* Linear in the bytes of the keys: a slot holds 32 bits of hash and the key's token, and only keys
 * whose 32 bits agree are compared. */
static uint32_t duplicate_among_many(const struct orch_json_doc *d, uint32_t obj)
{
    size_t n_slots = 64;
    while (n_slots < (size_t)d->toks[obj].count * 2)
        n_slots *= 2;
    cleanup_free uint64_t *slots = orch_xcalloc(n_slots, sizeof *slots);
    cleanup_buf struct orch_buf mine = { 0 };
    cleanup_buf struct orch_buf other = { 0 };

    for (uint32_t k = obj + 1, i = 0; i < d->toks[obj].count; i++, k = d->toks[k + 1].next) {
        struct orch_slice s = key_text(d, k, &mine);
        uint64_t hash = key_hash(s);
        size_t at = hash & (n_slots - 1);
        for (; slots[at]; at = (at + 1) & (n_slots - 1)) {
            if (slots[at] >> 32 != hash >> 32)
                continue;
            struct orch_slice o = key_text(d, (uint32_t)slots[at], &other);
            if (o.n == s.n && memcmp(o.p, s.p, s.n) == 0)
                return k;
        }
        slots[at] = (hash >> 32) << 32 | k;
    }
    return 0;
}

/* The second of two equal keys of the object, or 0. */
static uint32_t duplicate_key(const struct orch_json_doc *d, uint32_t obj)
{
    struct orch_slice seen[FEW_KEYS];
    uint32_t count = d->toks[obj].count;
    if (count > FEW_KEYS)
        return duplicate_among_many(d, obj);
    for (uint32_t k = obj + 1, i = 0; i < count; i++, k = d->toks[k + 1].next) {
        if (d->toks[k].flags & ORCH_JSON_ESCAPED)
            return duplicate_among_many(d, obj);
        struct orch_slice s = seen[i] = key_slice(d, k);
        for (uint32_t j = 0; j < i; j++) {
            if (seen[j].n == s.n && memcmp(seen[j].p, s.p, s.n) == 0)
                return k;
        }
    }
    return 0;
}

/* ---- numbers */

/* digits × 10^e10, correctly rounded. Texts handed to strtod have no decimal point, so that the
 * locale does not matter. */
static double decimal(const char *digits, size_t n, int e10)
{
    static const double power[EXACT_POWER + 1] = { 1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                                   1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                                   1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22 };
    if (n <= MAX_SAFE_DIGITS && e10 >= -EXACT_POWER && e10 <= EXACT_POWER) {
        uint64_t m = 0;
        for (size_t i = 0; i < n; i++)
            m = m * 10 + (uint64_t)(digits[i] - '0');
        /* Both operands are exact, so the one operation rounds correctly. */
        if (m <= MAX_SAFE_INTEGER)
            return e10 < 0 ? (double)m / power[-e10] : (double)m * power[e10];
    }
    char text[NUMBER_BYTES + 16];
    memcpy(text, digits, n);
    snprintf(text + n, sizeof text - n, "e%d", e10);
    return strtod(text, NULL);
}

/* The value of a number text that keeps the grammar and the length limit. */
static double number_value(const char *p, const char *end)
{
    char digits[NUMBER_BYTES];
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
    if (v <= (double)MAX_SAFE_INTEGER && v == (double)(uint64_t)v) {
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

/* ---- the scanner */

struct scan {
    const char *text, *end;
    const char *bad; /* set with rule when a part is refused */
    const char *rule;
};

static const char *refuse(struct scan *s, const char *at, const char *rule)
{
    s->bad = at;
    s->rule = at == s->end ? RULE_END : rule;
    return NULL;
}

static inline const char *skip_space(const char *p, const char *end)
{
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t'))
        p++;
    return p;
}

/* p is the backslash; returns what follows the escape. */
static const char *scan_escape(struct scan *s, const char *p, uint8_t *flags)
{
    const char *const start = p++;
    *flags |= ORCH_JSON_ESCAPED;
    if (p == s->end)
        return refuse(s, p, RULE_ESCAPE);
    switch (*p) {
    case '"':
    case '\\':
    case '/':
    case 'b':
    case 'f':
    case 'n':
    case 'r':
    case 't':
        return p + 1;
    case 'u':
        break;
    default:
        return refuse(s, p, RULE_ESCAPE);
    }
    int unit = hex4(++p, s->end);
    if (unit < 0)
        return refuse(s, p + (-1 - unit), RULE_ESCAPE);
    p += 4;
    if (unit == 0)
        *flags |= ORCH_JSON_HAS_NUL;
    if ((unit & 0xF800) != 0xD800)
        return p;
    if (unit >= 0xDC00 || s->end - p < 2 || p[0] != '\\' || p[1] != 'u')
        return refuse(s, start, "lone surrogate");
    p += 2;
    unit = hex4(p, s->end);
    if (unit < 0)
        return refuse(s, p + (-1 - unit), RULE_ESCAPE);
    if ((unit & 0xFC00) != 0xDC00)
        return refuse(s, start, "lone surrogate");
    return p + 4;
}

/* p is past the opening quote; returns the closing one. */
static inline const char *scan_string(struct scan *s, const char *p, uint8_t *flags)
{
    for (;;) {
        p = plain_end(p, s->end);
        if (p == s->end)
            return refuse(s, p, RULE_END);
        unsigned char c = (unsigned char)*p;
        if (c == '"')
            return p;
        if (c == '\\') {
            p = scan_escape(s, p, flags);
            if (!p)
                return NULL;
            continue;
        }
        if (c < 0x20)
            return refuse(s, p, "control character in string");
        do { /* multi-byte characters rarely come alone */
            int n = utf8_step(p, s->end);
            if (n < 0)
                return refuse(s, p, RULE_UTF8);
            p += n;
        } while (p < s->end && (unsigned char)*p >= 0x80);
    }
}

static inline bool is_digit(const char *p, const char *end)
{
    return p < end && (unsigned)(*p - '0') < 10;
}

static const char *scan_number(struct scan *s, const char *p, uint8_t *flags)
{
    const char *const start = p, *const end = s->end;
    uint64_t v = 0;
    int exponent = 0;

    p += *p == '-';
    if (!is_digit(p, end))
        return refuse(s, p, RULE_DIGIT);
    const char *const digits = p;
    while (is_digit(p, end))
        v = v * 10 + (uint64_t)(*p++ - '0');
    if (*digits == '0' && p - digits > 1)
        return refuse(s, digits + 1, "leading zero");

    if (p == end || (*p != '.' && (*p | 0x20) != 'e')) {
        *flags = ORCH_JSON_INTEGER;
        if (p - digits > MAX_SAFE_DIGITS || v > MAX_SAFE_INTEGER)
            *flags |= ORCH_JSON_BIG;
    }
    if (p < end && *p == '.') {
        if (!is_digit(++p, end))
            return refuse(s, p, RULE_DIGIT);
        while (is_digit(p, end))
            p++;
    }
    if (p < end && (*p | 0x20) == 'e') {
        bool minus = ++p < end && *p == '-';
        p += p < end && (*p == '-' || *p == '+');
        if (!is_digit(p, end))
            return refuse(s, p, RULE_DIGIT);
        for (; is_digit(p, end); p++)
            exponent = exponent < 10000 ? exponent * 10 + (*p - '0') : exponent;
        exponent = minus ? -exponent : exponent;
    }
    if (p - start > NUMBER_BYTES) {
        s->bad = start + NUMBER_BYTES;
        s->rule = "number too long";
        return NULL;
    }
    /* At most 62 digits stand before a positive exponent: below 10^200 nothing can overflow. */
    if (exponent > 200 && isinf(number_value(start, p))) {
        s->bad = start;
        s->rule = "number out of range";
        return NULL;
    }
    return p;
}

static const char *scan_literal(struct scan *s, const char *p, const char *word)
{
    for (; *word; p++, word++) {
        if (p == s->end || *p != *word)
            return refuse(s, p, "misspelt literal");
    }
    return p;
}

/* Makes room for the most tokens that n bytes can hold. A finished value of b bytes holds at most
 * (b + 1) / 2, and each open container adds one. */
static void reserve_tokens(struct orch_json_doc *d, size_t n_text, unsigned depth, uint32_t limit)
{
    size_t need = n_text / 2 + depth + 1;
    need = need < n_text ? need : n_text;
    need = need < limit ? need : limit;
    if (need <= d->cap && (d->cap <= KEEP_TOKENS || need > d->cap / 16))
        return;
    free(d->toks);
    d->toks = orch_xmalloc(need * sizeof *d->toks);
    d->cap = (uint32_t)need;
}

static int fault_at(struct orch_json_doc *d, struct orch_json_fault *fault, const char *at,
                    const char *rule, int code)
{
    d->n = 0;
    *fault = (struct orch_json_fault){ (size_t)(at - d->text), rule };
    return code;
}

int orch_json_scan(struct orch_json_doc *d, struct orch_slice text,
                   const struct orch_json_limits *lim, struct orch_json_fault *fault)
{
    size_t max_bytes = lim && lim->bytes ? lim->bytes : DEFAULT_BYTES;
    unsigned max_depth = lim && lim->depth ? lim->depth : DEFAULT_DEPTH;
    uint32_t max_tokens = lim && lim->tokens ? lim->tokens : DEFAULT_TOKENS;
    max_bytes = max_bytes < UINT32_MAX ? max_bytes : UINT32_MAX; /* offsets are 32 bits */
    max_depth = max_depth < MAX_DEPTH ? max_depth : MAX_DEPTH;

    d->text = text.p;
    d->n_text = text.n;
    d->n = d->nul_flag = 0;
    if (text.n > max_bytes)
        return fault_at(d, fault, text.p + max_bytes, "text too long", -EMSGSIZE);
    if (text.n == 0)
        return fault_at(d, fault, text.p, RULE_END, -EBADMSG);
    if (text.n >= 3 && memcmp(text.p, "\xEF\xBB\xBF", 3) == 0)
        return fault_at(d, fault, text.p, "byte-order mark", -EBADMSG);
    reserve_tokens(d, text.n, max_depth, max_tokens);

    struct scan s = { .text = text.p, .end = text.p + text.n };
    struct orch_json_tok *const toks = d->toks, *t;
    const uint32_t max = d->cap < max_tokens ? d->cap : max_tokens;
    const char *p = text.p, *const end = s.end;
    const char *rule;
    unsigned depth = 0;
    uint32_t n = 0;
    uint8_t flags, nul = 0;
    /* The innermost open container. While one is open its `next` holds the container around it, so
     * the token array is its own stack. */
    uint32_t open = NO_TOKEN;

value:
    p = skip_space(p, end);
    if (p == end)
        return fault_at(d, fault, p, RULE_END, -EBADMSG);
    if (n == max)
        return fault_at(d, fault, p, RULE_TOKENS, -EMSGSIZE);
    t = &toks[n++];
    flags = 0;
    t->start = (uint32_t)(p - text.p);
    t->count = 0;
    switch (*p) {
    case '"':
        t->type = ORCH_JSON_STRING;
        t->start++;
        p = scan_string(&s, p + 1, &flags);
        if (!p)
            goto refused;
        t->end = (uint32_t)(p++ - text.p);
        nul |= flags;
        break;
    case '{':
    case '[':
        if (++depth > max_depth)
            return fault_at(d, fault, p, "nested too deeply", -EMSGSIZE);
        t->type = *p == '{' ? ORCH_JSON_OBJECT : ORCH_JSON_ARRAY;
        t->flags = 0;
        t->next = open;
        open = n - 1;
        p = skip_space(p + 1, end);
        if (p < end && *p == (t->type == ORCH_JSON_OBJECT ? '}' : ']'))
            goto close;
        if (t->type == ORCH_JSON_OBJECT)
            goto key;
        goto value;
    case '-':
    case '0':
    case '1':
    case '2':
    case '3':
    case '4':
    case '5':
    case '6':
    case '7':
    case '8':
    case '9':
        t->type = ORCH_JSON_NUMBER;
        p = scan_number(&s, p, &flags);
        goto ended;
    case 't':
        t->type = ORCH_JSON_TRUE;
        p = scan_literal(&s, p, "true");
        goto ended;
    case 'f':
        t->type = ORCH_JSON_FALSE;
        p = scan_literal(&s, p, "false");
        goto ended;
    case 'n':
        t->type = ORCH_JSON_NULL;
        p = scan_literal(&s, p, "null");
        goto ended;
    default:
        return fault_at(d, fault, p, "expected a value", -EBADMSG);
    ended:
        if (!p)
            goto refused;
        t->end = (uint32_t)(p - text.p);
    }
    t->flags = flags;
    t->next = n;

after:
    p = skip_space(p, end);
    if (open == NO_TOKEN) {
        if (p != end)
            return fault_at(d, fault, p, "text after the value", -EBADMSG);
        d->n = n;
        d->nul_flag = (nul & ORCH_JSON_HAS_NUL) != 0;
        return 0;
    }
    t = &toks[open];
    t->count++;
    if (p == end)
        return fault_at(d, fault, p, RULE_END, -EBADMSG);
    if (t->type == ORCH_JSON_ARRAY) {
        if (*p == ',') {
            p++;
            goto value;
        }
        rule = "expected ',' or ']'";
        if (*p == ']')
            goto close;
    } else {
        if (*p == ',') {
            p++;
            goto key;
        }
        rule = "expected ',' or '}'";
        if (*p == '}')
            goto close;
    }
    return fault_at(d, fault, p, rule, -EBADMSG);

key:
    p = skip_space(p, end);
    if (p == end || *p != '"')
        return fault_at(d, fault, p, p == end ? RULE_END : "expected a key", -EBADMSG);
    if (n == max)
        return fault_at(d, fault, p, RULE_TOKENS, -EMSGSIZE);
    t = &toks[n++];
    flags = 0;
    t->start = (uint32_t)(++p - text.p);
    p = scan_string(&s, p, &flags);
    if (!p)
        goto refused;
    t->end = (uint32_t)(p - text.p);
    t->next = n;
    t->count = 0;
    t->type = ORCH_JSON_STRING;
    t->flags = flags;
    nul |= flags;
    p = skip_space(p + 1, end);
    if (p == end || *p != ':')
        return fault_at(d, fault, p, p == end ? RULE_END : "expected ':'", -EBADMSG);
    p++;
    goto value;

close:
    t = &toks[open];
    t->end = (uint32_t)(++p - text.p);
    if (t->type == ORCH_JSON_OBJECT && t->count > 1) {
        uint32_t dup = duplicate_key(d, open);
        if (dup)
            return fault_at(d, fault, text.p + toks[dup].start - 1, "duplicate key", -EBADMSG);
    }
    open = t->next;
    t->next = n;
    depth--;
    goto after;

refused:
    return fault_at(d, fault, s.bad, s.rule, -EBADMSG);
}

void orch_json_doc_free(struct orch_json_doc *d)
{
    free(d->toks);
    *d = (struct orch_json_doc){ 0 };
}

/* ---- reading tokens */

static bool text_eq(const struct orch_json_doc *d, uint32_t tok, const char *s, size_t n)
{
    const struct orch_json_tok *t = &d->toks[tok];
    const char *p = d->text + t->start, *end = d->text + t->end;
    if (!(t->flags & ORCH_JSON_ESCAPED))
        return (size_t)(end - p) == n && memcmp(p, s, n) == 0;
    while (p < end) {
        char c[4] = { *p };
        size_t len = 1;
        p = *p == '\\' ? unescape(p, end, c, &len) : p + 1;
        if (len > n || memcmp(c, s, len) != 0)
            return false;
        s += len;
        n -= len;
    }
    return n == 0;
}

uint32_t orch_json_get(const struct orch_json_doc *d, uint32_t obj, const char *key)
{
    if (obj >= d->n || d->toks[obj].type != ORCH_JSON_OBJECT)
        return 0;
    size_t n = strlen(key);
    for (uint32_t k = obj + 1, end = d->toks[obj].next; k < end; k = d->toks[k + 1].next) {
        if (text_eq(d, k, key, n))
            return k + 1;
    }
    return 0;
}

struct orch_slice orch_json_raw(const struct orch_json_doc *d, uint32_t tok)
{
    const struct orch_json_tok *t = &d->toks[tok];
    uint32_t quote = t->type == ORCH_JSON_STRING;
    return (struct orch_slice){ d->text + t->start - quote, t->end - t->start + 2 * quote };
}

/* The length of what some take for a line end. */
static size_t line_end(const char *p, size_t n)
{
    if (n >= 2 && memcmp(p, "\xc2\x85", 2) == 0)
        return 2;
    return n >= 3 && (memcmp(p, "\xe2\x80\xa8", 3) == 0 || memcmp(p, "\xe2\x80\xa9", 3) == 0) ? 3
                                                                                              : 0;
}

static void escape_line_ends(struct orch_buf *b, size_t from)
{
    cleanup_buf struct orch_buf whole = { 0 };
    orch_buf_add(&whole, b->p + from, b->n - from);
    b->n = from;
    for (size_t i = 0; i < whole.n;) {
        size_t n = line_end(whole.p + i, whole.n - i);
        if (!n)
            orch_buf_char(b, whole.p[i++]);
        else
            orch_buf_str(b, n == 2 ? "\\u0085" : whole.p[i + 2] == '\xa8' ? "\\u2028" : "\\u2029");
        i += n;
    }
}

void orch_json_one_line(struct orch_buf *b, size_t from)
{
    char *p, *end = b->p + b->n;
    if (b->n == from)
        return;
    for (int end_of_line = 0; end_of_line < 2; end_of_line++)
        for (p = b->p + from; (p = memchr(p, "\r\n"[end_of_line], (size_t)(end - p))); p++)
            *p = ' ';
    for (int lead = 0; lead < 2; lead++)
        for (p = b->p + from; (p = memchr(p, "\xc2\xe2"[lead], (size_t)(end - p))); p++)
            if (line_end(p, (size_t)(end - p))) {
                escape_line_ends(b, from);
                return;
            }
}

int orch_json_string(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out)
{
    const struct orch_json_tok *t = &d->toks[tok];
    if (t->type != ORCH_JSON_STRING)
        return -EINVAL;
    if (t->flags & ORCH_JSON_ESCAPED)
        append_unescaped(out, d->text + t->start, d->text + t->end);
    else
        orch_buf_add(out, d->text + t->start, t->end - t->start);
    return 0;
}

bool orch_json_string_eq(const struct orch_json_doc *d, uint32_t tok, const char *s)
{
    return d->toks[tok].type == ORCH_JSON_STRING && text_eq(d, tok, s, strlen(s));
}

double orch_json_number(const struct orch_json_doc *d, uint32_t tok)
{
    const struct orch_json_tok *t = &d->toks[tok];
    return t->type == ORCH_JSON_NUMBER ? number_value(d->text + t->start, d->text + t->end) : NAN;
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
    if (end - p > MAX_SAFE_DIGITS)
        return false;
    for (; p < end; p++)
        v = v * 10 + (uint64_t)(*p - '0');
    if (v > max)
        return false;
    *out = negative ? (int64_t)(0 - v) : (int64_t)v;
    return true;
}

/* ---- writing text */

/* The short form where there is one, else \u00xx; c is a quote, a backslash or below 0x20. */
static void put_escape(struct orch_buf *out, unsigned char c)
{
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char *at = c ? strchr(from, c) : NULL;
    if (at) {
        orch_buf_add(out, (char[]){ '\\', to[at - from] }, 2);
    } else {
        orch_buf_add(out, "\\u00", 4);
        orch_buf_hex(out, &c, 1);
    }
}

void orch_json_quote(struct orch_buf *out, struct orch_slice s)
{
    const char *p = s.n ? s.p : "", *run = p, *end = p + s.n;
    orch_buf_reserve(out, s.n + 2);
    orch_buf_char(out, '"');
    while ((p = plain_end(p, end)) < end) {
        bool wide = (unsigned char)*p >= 0x80;
        int n = wide ? utf8_step(p, end) : 1;
        if (wide && n > 0) {
            p += n;
            continue;
        }
        orch_buf_add(out, run, (size_t)(p - run));
        if (wide)
            orch_buf_add(out, "\xEF\xBF\xBD", 3);
        else
            put_escape(out, (unsigned char)*p);
        p += abs(n);
        run = p;
    }
    orch_buf_add(out, run, (size_t)(p - run));
    orch_buf_char(out, '"');
}

/* ---- RFC 8785 */

struct member {
    const char *p; /* the key's characters; NULL while they are in the arena at `at` */
    size_t at;
    uint32_t n, tok;
};

/* UTF-16 code units order as the bytes of UTF-8 do, but for U+E000 to U+FFFF (lead bytes EE and
 * EF), which come after the surrogates that stand for what is beyond (F0 and above). */
static int member_cmp(const void *pa, const void *pb)
{
    const struct member *a = pa, *b = pb;
    uint32_t n = a->n < b->n ? a->n : b->n, i = 0;
    const unsigned char *x = (const unsigned char *)a->p, *y = (const unsigned char *)b->p;
    while (i < n && x[i] == y[i])
        i++;
    if (i == n)
        return a->n < b->n ? -1 : a->n > b->n;
    int cx = x[i], cy = y[i];
    cx += (cx == 0xEE || cx == 0xEF) << 8;
    cy += (cy == 0xEE || cy == 0xEF) << 8;
    return cx - cy;
}

static void canonical_string(const struct orch_json_doc *d, const struct orch_json_tok *t,
                             struct orch_buf *out)
{
    const char *p = d->text + t->start, *end = d->text + t->end;
    if (!(t->flags & ORCH_JSON_ESCAPED)) { /* then it has nothing that needs an escape */
        orch_buf_add(out, p - 1, (size_t)(end - p) + 2);
        return;
    }
    orch_buf_char(out, '"');
    while (p < end) {
        const char *slash = memchr(p, '\\', (size_t)(end - p));
        orch_buf_add(out, p, (size_t)((slash ? slash : end) - p));
        if (!slash)
            break;
        char c[4];
        size_t n;
        p = unescape(slash, end, c, &n);
        if (n == 1 && ((unsigned char)c[0] < 0x20 || c[0] == '"' || c[0] == '\\'))
            put_escape(out, (unsigned char)c[0]);
        else
            orch_buf_add(out, c, n);
    }
    orch_buf_char(out, '"');
}

static void canonical_object(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out)
{
    uint32_t count = d->toks[tok].count;
    struct member few[FEW_KEYS], *m = few;
    cleanup_free struct member *many = NULL;
    cleanup_buf struct orch_buf arena = { 0 };

    if (count > FEW_KEYS)
        m = many = orch_xmalloc(count * sizeof *m);
    for (uint32_t k = tok + 1, i = 0; i < count; i++, k = d->toks[k + 1].next) {
        struct orch_slice s = key_slice(d, k);
        m[i] = (struct member){ s.p, 0, (uint32_t)s.n, k };
        if (d->toks[k].flags & ORCH_JSON_ESCAPED) {
            size_t before = arena.n;
            append_unescaped(&arena, s.p, s.p + s.n);
            m[i] = (struct member){ NULL, before, (uint32_t)(arena.n - before), k };
        }
    }
    for (uint32_t i = 0; arena.p && i < count; i++) {
        if (!m[i].p)
            m[i].p = arena.p + m[i].at;
    }
    if (count > FEW_KEYS) {
        qsort(m, count, sizeof *m, member_cmp);
    } else {
        for (uint32_t i = 1; i < count; i++) {
            struct member v = m[i];
            uint32_t j = i;
            for (; j > 0 && member_cmp(&m[j - 1], &v) > 0; j--)
                m[j] = m[j - 1];
            m[j] = v;
        }
    }
    orch_buf_char(out, '{');
    for (uint32_t i = 0; i < count; i++) {
        if (i)
            orch_buf_char(out, ',');
        canonical_string(d, &d->toks[m[i].tok], out);
        orch_buf_char(out, ':');
        orch_json_canonical(d, m[i].tok + 1, out);
    }
    orch_buf_char(out, '}');
}

void orch_json_canonical(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out)
{
    const struct orch_json_tok *t = &d->toks[tok];
    const char *text = d->text + t->start;
    size_t n = t->end - t->start;
    double v;

    switch ((enum orch_json_type)t->type) {
    case ORCH_JSON_NULL:
    case ORCH_JSON_FALSE:
    case ORCH_JSON_TRUE:
        orch_buf_add(out, text, n);
        return;
    case ORCH_JSON_NUMBER:
        v = number_value(text, text + n);
        if (v == 0) /* -0 too */
            orch_buf_char(out, '0');
        else if ((t->flags & (ORCH_JSON_INTEGER | ORCH_JSON_BIG)) == ORCH_JSON_INTEGER)
            orch_buf_add(out, text, n);
        else
            orch_json_put_number(out, v);
        return;
    case ORCH_JSON_STRING:
        canonical_string(d, t, out);
        return;
    case ORCH_JSON_ARRAY:
        orch_buf_char(out, '[');
        for (uint32_t e = tok + 1; e < t->next; e = d->toks[e].next) {
            if (e > tok + 1)
                orch_buf_char(out, ',');
            orch_json_canonical(d, e, out);
        }
        orch_buf_char(out, ']');
        return;
    case ORCH_JSON_OBJECT:
        if (t->count > 1) {
            canonical_object(d, tok, out);
            return;
        }
        orch_buf_char(out, '{');
        if (t->count == 1) {
            canonical_string(d, &d->toks[tok + 1], out);
            orch_buf_char(out, ':');
            orch_json_canonical(d, tok + 2, out);
        }
        orch_buf_char(out, '}');
        return;
    }
}

/* ---- the builder
 * Strings and numbers go into cJSON as raw text made above: cJSON alone would pass bad UTF-8 on and
 * print 10^15 with an exponent. */

static cJSON *node(struct orch_json *j)
{
    return (cJSON *)j;
}

static struct orch_json *made(cJSON *j)
{
    if (!j)
        abort();
    return (struct orch_json *)j;
}

static struct orch_json *raw_str(const char *v)
{
    if (!v)
        return made(cJSON_CreateNull());
    cleanup_buf struct orch_buf text = { 0 };
    orch_json_quote(&text, orch_slice_str(v));
    return made(cJSON_CreateRaw(text.p));
}

struct orch_json *orch_json_object(void)
{
    return made(cJSON_CreateObject());
}

struct orch_json *orch_json_array(void)
{
    return made(cJSON_CreateArray());
}

void orch_json_free(struct orch_json *j)
{
    cJSON_Delete(node(j));
}

void orch_json_set_take(struct orch_json *obj, const char *key, struct orch_json *v)
{
    cJSON_DeleteItemFromObjectCaseSensitive(node(obj), key);
    if (!cJSON_AddItemToObject(node(obj), key, node(v)))
        abort();
}

void orch_json_set_str(struct orch_json *obj, const char *key, const char *v)
{
    orch_json_set_take(obj, key, raw_str(v));
}

void orch_json_set_num(struct orch_json *obj, const char *key, double v)
{
    cleanup_buf struct orch_buf text = { 0 };
    orch_json_put_number(&text, v);
    orch_json_set_take(obj, key, made(cJSON_CreateRaw(text.p)));
}

void orch_json_set_bool(struct orch_json *obj, const char *key, bool v)
{
    orch_json_set_take(obj, key, made(cJSON_CreateBool(v)));
}

void orch_json_add_take(struct orch_json *arr, struct orch_json *v)
{
    if (!cJSON_AddItemToArray(node(arr), node(v)))
        abort();
}

void orch_json_add_str(struct orch_json *arr, const char *v)
{
    orch_json_add_take(arr, raw_str(v));
}

void orch_json_print(const struct orch_json *j, bool pretty, struct orch_buf *out)
{
    char *text = pretty ? cJSON_Print((const cJSON *)j) : cJSON_PrintUnformatted((const cJSON *)j);
    if (!text)
        abort();
    orch_buf_str(out, text);
    cJSON_free(text);
}
