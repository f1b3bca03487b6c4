/* RFC 8785 */
#include "json_int.h"

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
        p = orch_json_unescape(slash, end, c, &n);
        if (n == 1 && ((unsigned char)c[0] < 0x20 || c[0] == '"' || c[0] == '\\'))
            orch_json_put_escape(out, (unsigned char)c[0]);
        else
            orch_buf_add(out, c, n);
    }
    orch_buf_char(out, '"');
}

static void canonical_object(const struct orch_json_doc *d, uint32_t tok, struct orch_buf *out)
{
    uint32_t count = d->toks[tok].count;
    struct member few[ORCH_JSON_FEW_KEYS], *m = few;
    cleanup_free struct member *many = NULL;
    cleanup_buf struct orch_buf arena = { 0 };

    if (count > ORCH_JSON_FEW_KEYS)
        m = many = orch_xmalloc(count * sizeof *m);
    for (uint32_t k = tok + 1, i = 0; i < count; i++, k = d->toks[k + 1].next) {
        struct orch_slice s = orch_json_key_slice(d, k);
        m[i] = (struct member){ s.p, 0, (uint32_t)s.n, k };
        if (d->toks[k].flags & ORCH_JSON_ESCAPED) {
            size_t before = arena.n;
            orch_json_append_unescaped(&arena, s.p, s.p + s.n);
            m[i] = (struct member){ NULL, before, (uint32_t)(arena.n - before), k };
        }
    }
    for (uint32_t i = 0; arena.p && i < count; i++) {
        if (!m[i].p)
            m[i].p = arena.p + m[i].at;
    }
    if (count > ORCH_JSON_FEW_KEYS) {
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
        v = orch_json_number_value(text, text + n);
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
