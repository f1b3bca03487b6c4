/* The strict scanner, and what is read from its tokens. */
#include "json_int.h"

#include <errno.h>
#include <math.h>

enum {
    DEFAULT_BYTES = 16 << 20,
    DEFAULT_DEPTH = 64,
    MAX_DEPTH = 1024, /* the canonical form and the Lua conversion recurse as deep */
    DEFAULT_TOKENS = 1000000,
    KEEP_TOKENS = 64 * 1024, /* a token array above this is given back when the texts get small */
};
#define NO_TOKEN UINT32_MAX

static const char *const RULE_END = "unexpected end of text";
static const char *const RULE_UTF8 = "invalid UTF-8";
static const char *const RULE_ESCAPE = "invalid escape";
static const char *const RULE_DIGIT = "expected a digit";
static const char *const RULE_TOKENS = "too many values";

/* ---- duplicate keys */

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
    struct orch_slice s = orch_json_key_slice(d, tok);
    if (!(d->toks[tok].flags & ORCH_JSON_ESCAPED))
        return s;
    buf->n = 0;
    orch_json_append_unescaped(buf, s.p, s.p + s.n);
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
    struct orch_slice seen[ORCH_JSON_FEW_KEYS];
    uint32_t count = d->toks[obj].count;
    if (count > ORCH_JSON_FEW_KEYS)
        return duplicate_among_many(d, obj);
    for (uint32_t k = obj + 1, i = 0; i < count; i++, k = d->toks[k + 1].next) {
        if (d->toks[k].flags & ORCH_JSON_ESCAPED)
            return duplicate_among_many(d, obj);
        struct orch_slice s = seen[i] = orch_json_key_slice(d, k);
        for (uint32_t j = 0; j < i; j++) {
            if (seen[j].n == s.n && memcmp(seen[j].p, s.p, s.n) == 0)
                return k;
        }
    }
    return 0;
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
    int unit = orch_json_hex4(++p, s->end);
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
    unit = orch_json_hex4(p, s->end);
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
        p = orch_json_plain_end(p, s->end);
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
            int n = orch_utf8_step(p, s->end);
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
        if (p - digits > ORCH_JSON_SAFE_DIGITS || v > ORCH_JSON_SAFE_INTEGER)
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
    if (p - start > ORCH_JSON_NUMBER_BYTES) {
        s->bad = start + ORCH_JSON_NUMBER_BYTES;
        s->rule = "number too long";
        return NULL;
    }
    /* At most 62 digits stand before a positive exponent: below 10^200 nothing can overflow. */
    if (exponent > 200 && isinf(orch_json_number_value(start, p))) {
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
        p = *p == '\\' ? orch_json_unescape(p, end, c, &len) : p + 1;
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

int orch_json_string(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out)
{
    const struct orch_json_tok *t = &d->toks[tok];
    if (t->type != ORCH_JSON_STRING)
        return -EINVAL;
    if (t->flags & ORCH_JSON_ESCAPED)
        orch_json_append_unescaped(out, d->text + t->start, d->text + t->end);
    else
        orch_buf_add(out, d->text + t->start, t->end - t->start);
    return 0;
}

bool orch_json_string_eq(const struct orch_json_doc *d, uint32_t tok, const char *s)
{
    return d->toks[tok].type == ORCH_JSON_STRING && text_eq(d, tok, s, strlen(s));
}
