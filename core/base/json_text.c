/* The characters of JSON's strings: UTF-8 and escapes. */
#include "json_int.h"

bool orch_utf8_valid(struct orch_slice s)
{
    const char *p = s.n ? s.p : "", *end = p + s.n;
    while ((p = orch_json_plain_end(p, end)) < end) {
        int n = (unsigned char)*p < 0x80 ? 1 : orch_utf8_step(p, end);
        if (n < 0)
            return false;
        p += n;
    }
    return true;
}

int orch_json_hex4(const char *p, const char *end)
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

const char *orch_json_unescape(const char *p, const char *end, char out[4], size_t *n_out)
{
    static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
    unsigned char *o = (unsigned char *)out;
    *n_out = 1;
    if (p[1] != 'u') {
        const char *at = strchr(from, p[1]);
        out[0] = at ? to[at - from] : p[1];
        return p + 2;
    }
    unsigned c = (unsigned)orch_json_hex4(p + 2, end);
    p += 6;
    if ((c & 0xF800) == 0xD800) {
        c = 0x10000 + ((c & 0x3FF) << 10) + ((unsigned)orch_json_hex4(p + 2, end) & 0x3FF);
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

void orch_json_append_unescaped(struct orch_buf *out, const char *p, const char *end)
{
    while (p < end) {
        const char *slash = memchr(p, '\\', (size_t)(end - p));
        orch_buf_add(out, p, (size_t)((slash ? slash : end) - p));
        if (!slash)
            return;
        char c[4];
        size_t n;
        p = orch_json_unescape(slash, end, c, &n);
        orch_buf_add(out, c, n);
    }
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

void orch_json_put_escape(struct orch_buf *out, unsigned char c)
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
    while ((p = orch_json_plain_end(p, end)) < end) {
        bool wide = (unsigned char)*p >= 0x80;
        int n = wide ? orch_utf8_step(p, end) : 1;
        if (wide && n > 0) {
            p += n;
            continue;
        }
        orch_buf_add(out, run, (size_t)(p - run));
        if (wide)
            orch_buf_add(out, "\xEF\xBF\xBD", 3);
        else
            orch_json_put_escape(out, (unsigned char)*p);
        p += abs(n);
        run = p;
    }
    orch_buf_add(out, run, (size_t)(p - run));
    orch_buf_char(out, '"');
}
