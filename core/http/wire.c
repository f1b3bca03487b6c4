#include "wire.h"

#include "../base/hash.h"

#include <errno.h>
#include <string.h>

enum { TOKEN = 1, TARGET = 2, HOST = 4, VALUE = 8 };
enum { SSE_MAX_BYTES = 16 << 20 };

static const uint8_t kind[256] = {
    ['\t'] = VALUE,
    [' '] = VALUE,
    ['!'] = TOKEN | TARGET | VALUE,
    ['"'] = VALUE,
    ['#'] = TOKEN | VALUE,
    ['$'] = TOKEN | TARGET | VALUE,
    ['%'] = TOKEN | VALUE,
    ['&' ... '\''] = TOKEN | TARGET | VALUE,
    ['(' ... ')'] = TARGET | VALUE,
    ['*' ... '+'] = TOKEN | TARGET | VALUE,
    [','] = TARGET | VALUE,
    ['-' ... '.'] = TOKEN | TARGET | HOST | VALUE,
    ['/'] = TARGET | VALUE,
    ['0' ... '9'] = TOKEN | TARGET | HOST | VALUE,
    [':' ... ';'] = TARGET | VALUE,
    ['<'] = VALUE,
    ['='] = TARGET | VALUE,
    ['>'] = VALUE,
    ['?' ... '@'] = TARGET | VALUE,
    ['A' ... 'Z'] = TOKEN | TARGET | HOST | VALUE,
    ['[' ... ']'] = VALUE,
    ['^'] = TOKEN | VALUE,
    ['_'] = TOKEN | TARGET | HOST | VALUE,
    ['`'] = TOKEN | VALUE,
    ['a' ... 'z'] = TOKEN | TARGET | HOST | VALUE,
    ['{'] = VALUE,
    ['|'] = TOKEN | VALUE,
    ['}'] = VALUE,
    ['~'] = TOKEN | TARGET | VALUE,
    [0x80 ... 0xff] = VALUE,
};

/* Length of the run at p whose bytes all have the bit. */
static size_t span(const char *p, size_t n, int bit)
{
    size_t i = 0;
    while (i < n && (kind[(uint8_t)p[i]] & bit))
        i++;
    return i;
}

static bool all(struct orch_slice s, int bit)
{
    return span(s.p, s.n, bit) == s.n;
}

bool orch_http_token_ok(struct orch_slice s)
{
    return s.n && all(s, TOKEN);
}

bool orch_http_value_ok(struct orch_slice s)
{
    return all(s, VALUE);
}

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c | 0x20) : c;
}

static bool same(struct orch_slice a, struct orch_slice b)
{
    if (a.n != b.n)
        return false;
    for (size_t i = 0; i < a.n; i++)
        if (lower(a.p[i]) != lower(b.p[i]))
            return false;
    return true;
}

bool orch_http_name_eq(struct orch_slice a, const char *b)
{
    return same(a, orch_slice_str(b));
}

bool orch_http_begins(struct orch_slice s, const char *b)
{
    struct orch_slice want = orch_slice_str(b);
    return s.n >= want.n && same((struct orch_slice){ s.p, want.n }, want);
}

size_t orch_http_find(const struct orch_http_header *h, size_t n, const char *name,
                      struct orch_slice *value)
{
    size_t count = 0;
    struct orch_slice want = orch_slice_str(name);
    *value = (struct orch_slice){ "", 0 };
    for (size_t i = 0; i < n; i++)
        if (same(h[i].name, want) && count++ == 0)
            *value = h[i].value;
    return count;
}

static int refuse(struct orch_http_fault *f, int status, const char *rule)
{
    *f = (struct orch_http_fault){ status, rule };
    return -1;
}

ssize_t orch_http_head_end(const char *p, size_t n, size_t *scan, struct orch_http_fault *f)
{
    if (n && !(kind[(uint8_t)p[0]] & TOKEN))
        return refuse(f, 400, "a request must begin with a method");
    while (*scan < n) {
        const char *lf = memchr(p + *scan, '\n', n - *scan);
        if (!lf) {
            *scan = n;
            break;
        }
        size_t at = (size_t)(lf - p);
        if (at == 0 || p[at - 1] != '\r')
            return refuse(f, 400, "a line must end with CR LF");
        *scan = at + 1;
        if (at >= 3 && p[at - 2] == '\n')
            return (ssize_t)(at + 1);
    }
    return 0;
}

static int parse_target(struct orch_slice t, struct orch_http_request *q, struct orch_http_fault *f)
{
    if (!t.n || t.p[0] != '/')
        return refuse(f, 400, "the target must be a path");
    q->path = t;
    q->query = (struct orch_slice){ "", 0 };
    for (size_t i = 0; i < t.n;) {
        i += span(t.p + i, t.n - i, TARGET);
        if (i == t.n)
            break;
        static const char hex[] = "0123456789abcdefABCDEF";
        if (t.p[i] != '%')
            return refuse(f, 400, "the target has a character that must be escaped");
        if (t.n - i < 3 || !t.p[i + 1] || !strchr(hex, t.p[i + 1]) || !t.p[i + 2] ||
            !strchr(hex, t.p[i + 2]) || (t.p[i + 1] == '0' && t.p[i + 2] == '0'))
            return refuse(f, 400, "the target has an invalid escape");
        i += 3;
    }
    const char *mark = memchr(t.p, '?', t.n);
    if (mark) {
        q->path.n = (size_t)(mark - t.p);
        q->query = (struct orch_slice){ mark + 1, t.n - q->path.n - 1 };
    }
    return 0;
}

/* `line` is without its CR LF. */
static int parse_request_line(struct orch_slice line, struct orch_http_request *q,
                              struct orch_http_fault *f)
{
    if (line.n > ORCH_HTTP_LINE_MAX)
        return refuse(f, 414, "the request line is too long");
    size_t m = span(line.p, line.n, TOKEN);
    if (!m || m > 32 || m == line.n || line.p[m] != ' ')
        return refuse(f, 400, "the request line must be METHOD PATH HTTP/1.1");
    const char *target = line.p + m + 1;
    const char *sp = memchr(target, ' ', line.n - m - 1);
    if (!sp)
        return refuse(f, 400, "the request line must be METHOD PATH HTTP/1.1");
    q->method = (struct orch_slice){ line.p, m };
    struct orch_slice version = { sp + 1, line.n - (size_t)(sp + 1 - line.p) };
    if (version.n != 8 || memcmp(version.p, "HTTP/", 5) != 0 || version.p[5] < '0' ||
        version.p[5] > '9' || version.p[6] != '.' || version.p[7] < '0' || version.p[7] > '9')
        return refuse(f, 400, "the request line must be METHOD PATH HTTP/1.1");
    q->http10 = orch_slice_eq(version, "HTTP/1.0");
    if (!q->http10 && !orch_slice_eq(version, "HTTP/1.1"))
        return refuse(f, 505, "only HTTP/1.1 is spoken here");
    return parse_target((struct orch_slice){ target, (size_t)(sp - target) }, q, f);
}

/* NAME[:PORT] or [IPV6][:PORT] into its two parts (port empty when none). */
static bool split_host(struct orch_slice h, struct orch_slice *name, struct orch_slice *port)
{
    size_t n;
    if (h.n && h.p[0] == '[') {
        n = 1;
        while (n < h.n && h.p[n] != ']') {
            char c = lower(h.p[n]);
            if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || c == ':' || c == '.'))
                return false;
            n++;
        }
        if (n == h.n || n < 3)
            return false;
        n++;
    } else {
        n = span(h.p, h.n, HOST);
        if (!n)
            return false;
    }
    *name = (struct orch_slice){ h.p, n };
    *port = (struct orch_slice){ h.p + n, 0 };
    if (n == h.n)
        return true;
    *port = (struct orch_slice){ h.p + n + 1, h.n - n - 1 };
    if (h.p[n] != ':' || port->n < 1 || port->n > 5)
        return false;
    for (size_t i = 0; i < port->n; i++)
        if (port->p[i] < '0' || port->p[i] > '9')
            return false;
    return true;
}

static int parse_length(struct orch_slice v, int64_t *out)
{
    int64_t length = 0;
    if (!v.n || v.n > 18)
        return -1;
    for (size_t i = 0; i < v.n; i++) {
        if (v.p[i] < '0' || v.p[i] > '9')
            return -1;
        length = length * 10 + (v.p[i] - '0');
    }
    *out = length;
    return 0;
}

/* Whether the comma-separated list has this word, ignoring case. */
static bool list_has(struct orch_slice list, const char *word)
{
    for (size_t i = 0; i <= list.n;) {
        const char *comma = i < list.n ? memchr(list.p + i, ',', list.n - i) : NULL;
        size_t end = comma ? (size_t)(comma - list.p) : list.n, from = i, to = end;
        while (from < to && (list.p[from] == ' ' || list.p[from] == '\t'))
            from++;
        while (to > from && (list.p[to - 1] == ' ' || list.p[to - 1] == '\t'))
            to--;
        if (orch_http_name_eq((struct orch_slice){ list.p + from, to - from }, word))
            return true;
        i = end + 1;
    }
    return false;
}

/* The headers that decide where the message ends, and Host. */
static int apply_header(const struct orch_http_header *h, struct orch_http_request *q,
                        struct orch_http_fault *f)
{
    struct orch_slice name, port;
    switch (h->name.n) {
    case 4:
        if (!orch_http_name_eq(h->name, "host"))
            break;
        if (q->host.p)
            return refuse(f, 400, "two Host headers");
        if (!split_host(h->value, &name, &port))
            return refuse(f, 400, "Host must be NAME or NAME:PORT");
        q->host = h->value;
        break;
    case 6:
        if (!orch_http_name_eq(h->name, "expect"))
            break;
        if (!orch_http_name_eq(h->value, "100-continue"))
            return refuse(f, 417, "the only expectation known is 100-continue");
        q->expect_continue = true;
        break;
    case 10:
        if (orch_http_name_eq(h->name, "connection") && list_has(h->value, "close"))
            q->keep_alive = false;
        break;
    case 14:
        if (!orch_http_name_eq(h->name, "content-length"))
            break;
        if (q->content_length >= 0)
            return refuse(f, 400, "two Content-Length headers");
        if (parse_length(h->value, &q->content_length) < 0)
            return refuse(f, 400, "Content-Length must be one decimal number");
        break;
    case 17:
        if (!orch_http_name_eq(h->name, "transfer-encoding"))
            break;
        if (q->chunked)
            return refuse(f, 400, "two Transfer-Encoding headers");
        if (!orch_http_name_eq(h->value, "chunked"))
            return refuse(f, 501, "the only transfer coding known is chunked");
        q->chunked = true;
        break;
    default:
        break;
    }
    return 0;
}

int orch_http_parse_head(const char *p, size_t n, const struct orch_http_head_limits *lim,
                         struct orch_http_request *q, struct orch_http_fault *f)
{
    size_t most = lim->headers < ORCH_HTTP_HEADERS_MAX ? lim->headers : ORCH_HTTP_HEADERS_MAX;
    const char *end = p + n - 2; /* the empty line */
    const char *eol = memchr(p, '\r', n);
    q->n_headers = 0;
    q->host = q->body = (struct orch_slice){ NULL, 0 };
    q->content_length = -1;
    q->chunked = q->expect_continue = false;
    q->peer = NULL;
    if (!eol || eol[1] != '\n')
        return refuse(f, 400, "CR must be followed by LF");
    if (parse_request_line((struct orch_slice){ p, (size_t)(eol - p) }, q, f) < 0)
        return -1;
    q->keep_alive = !q->http10;
    for (p = eol + 2; p < end;) {
        if (*p == ' ' || *p == '\t')
            return refuse(f, 400, "a header must not be folded over lines");
        if (q->n_headers == most)
            return refuse(f, 431, "too many headers");
        struct orch_http_header *h = &q->headers[q->n_headers++];
        h->name = (struct orch_slice){ p, span(p, (size_t)(end - p), TOKEN) };
        p += h->name.n;
        if (!h->name.n || *p != ':')
            return refuse(f, 400, "a header must be NAME: VALUE without space before the colon");
        p++;
        while (*p == ' ' || *p == '\t')
            p++;
        h->value = (struct orch_slice){ p, span(p, (size_t)(end - p), VALUE) };
        p += h->value.n;
        if (p[0] != '\r' || p[1] != '\n')
            return refuse(f, 400, "a header value has a control character");
        p += 2;
        while (h->value.n &&
               (h->value.p[h->value.n - 1] == ' ' || h->value.p[h->value.n - 1] == '\t'))
            h->value.n--;
        if (apply_header(h, q, f) < 0)
            return -1;
    }
    if (!q->host.p)
        return refuse(f, 400, "a Host header is required");
    if (q->chunked && q->content_length >= 0)
        return refuse(f, 400, "Content-Length and Transfer-Encoding exclude each other");
    if (q->chunked && q->http10)
        return refuse(f, 400, "HTTP/1.0 has no Transfer-Encoding");
    if (q->content_length > lim->body_bytes)
        return refuse(f, 413, "the body is too large");
    return 0;
}

/* ---- chunked coding */

enum { SIZE = 0, SIZE_LF, DATA, DATA_CR, DATA_LF, LAST_CR, LAST_LF, ENDED };

static int chunk_size(struct orch_http_chunks *c, char ch, struct orch_http_fault *f)
{
    char l = lower(ch);
    int digit = ch >= '0' && ch <= '9' ? ch - '0' : l >= 'a' && l <= 'f' ? l - 'a' + 10 : -1;
    if (digit >= 0) {
        if (++c->digits > 8)
            return refuse(f, 413, "a chunk size has more than eight digits");
        c->left = c->left << 4 | (uint64_t)digit;
        return 0;
    }
    if (ch != '\r' || !c->digits)
        return refuse(f, 400, "a chunk must begin with its size in hexadecimal and CR LF");
    c->state = SIZE_LF;
    return 0;
}

int orch_http_dechunk(struct orch_http_chunks *c, char *p, size_t n, size_t *raw, size_t *body,
                      size_t start, size_t max_body, struct orch_http_fault *f)
{
    while (*raw < n && c->state != ENDED) {
        if (c->state == DATA) {
            size_t take = n - *raw < c->left ? n - *raw : (size_t)c->left;
            memmove(p + *body, p + *raw, take);
            *raw += take;
            *body += take;
            c->left -= take;
            if (!c->left)
                c->state = DATA_CR;
            continue;
        }
        char ch = p[(*raw)++];
        if (c->state == SIZE) {
            if (chunk_size(c, ch, f) < 0)
                return -1;
            continue;
        }
        bool lf = c->state == SIZE_LF || c->state == DATA_LF || c->state == LAST_LF;
        if (ch != (lf ? '\n' : '\r'))
            return refuse(f, 400,
                          c->state == LAST_CR ? "trailers are not accepted"
                                              : "a chunk must end with CR LF");
        switch (c->state) {
        case SIZE_LF:
            if (c->left > max_body || *body - start > max_body - c->left)
                return refuse(f, 413, "the body is too large");
            c->state = c->left ? DATA : LAST_CR;
            c->digits = 0;
            break;
        case DATA_CR:
            c->state = DATA_LF;
            break;
        case DATA_LF:
            c->state = SIZE;
            break;
        case LAST_CR:
            c->state = LAST_LF;
            break;
        default:
            c->state = ENDED;
            break;
        }
    }
    return c->state == ENDED;
}

/* ---- who may ask */

static bool name_allowed(struct orch_slice host, const char *const *allow)
{
    struct orch_slice name, port;
    if (!split_host(host, &name, &port))
        return false;
    for (; *allow; allow++) {
        struct orch_slice a = orch_slice_str(*allow), its_name, its_port;
        if (split_host(a, &its_name, &its_port) && same(name, its_name) &&
            (!its_port.n || same(port, its_port)))
            return true;
    }
    return false;
}

static bool origin_allowed(struct orch_slice origin, const char *const *allow)
{
    for (const char *const *a = allow; *a; a++)
        if (strstr(*a, "://") && orch_http_name_eq(origin, *a))
            return true;
    static const char *const schemes[] = { "http://", "https://" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(schemes); i++) {
        size_t k = strlen(schemes[i]);
        if (origin.n > k && orch_http_name_eq((struct orch_slice){ origin.p, k }, schemes[i]))
            return name_allowed((struct orch_slice){ origin.p + k, origin.n - k }, allow);
    }
    return false;
}

const char *orch_http_name_refused(const struct orch_http_request *q, const char *const *allow)
{
    if (!name_allowed(q->host, allow))
        return "Host is not one of this server's names";
    for (size_t i = 0; i < q->n_headers; i++)
        if (orch_http_name_eq(q->headers[i].name, "origin") &&
            !origin_allowed(q->headers[i].value, allow))
            return "Origin is not allowed";
    return NULL;
}

bool orch_http_bearer_ok(const struct orch_http_request *q, const uint8_t token_sha256[32])
{
    struct orch_slice v;
    if (orch_http_header(q, "authorization", &v) != 1 || v.n < 8 ||
        !orch_http_name_eq((struct orch_slice){ v.p, 7 }, "bearer "))
        return false;
    uint8_t got[ORCH_SHA256_BYTES];
    size_t skip = 7;
    while (skip < v.n && v.p[skip] == ' ')
        skip++;
    orch_sha256(v.p + skip, v.n - skip, got);
    return orch_equal_ct(got, token_sha256, sizeof got);
}

/* ---- server-sent events */

static bool one_line(struct orch_slice s)
{
    for (size_t i = 0; i < s.n; i++)
        if (s.p[i] == '\n' || s.p[i] == '\r' || s.p[i] == 0)
            return false;
    return true;
}

static void put_field(struct orch_buf *out, const char *name, struct orch_slice value)
{
    orch_buf_str(out, name);
    orch_buf_str(out, ": ");
    orch_buf_slice(out, value);
    orch_buf_char(out, '\n');
}

/* Where the line at p ends: its first LF or CR, or n. */
static size_t line_end(const char *p, size_t n)
{
    const char *lf = memchr(p, '\n', n);
    n = lf ? (size_t)(lf - p) : n;
    const char *cr = memchr(p, '\r', n);
    return cr ? (size_t)(cr - p) : n;
}

int orch_sse_put(struct orch_buf *out, const struct orch_sse_event *e)
{
    if (!one_line(e->id) || !one_line(e->event))
        return -EINVAL;
    if (e->id.n)
        put_field(out, "id", e->id);
    if (e->event.n)
        put_field(out, "event", e->event);
    if (e->retry_ms > 0)
        orch_buf_printf(out, "retry: %lld\n", (long long)e->retry_ms);
    for (size_t i = 0; e->has_data && i <= e->data.n;) {
        size_t end = i + line_end(e->data.p + i, e->data.n - i);
        put_field(out, "data", (struct orch_slice){ e->data.p + i, end - i });
        i = end +
            (end + 1 < e->data.n && e->data.p[end] == '\r' && e->data.p[end + 1] == '\n' ? 2 : 1);
    }
    orch_buf_char(out, '\n');
    return 0;
}

void orch_sse_reader_fini(struct orch_sse_reader *r)
{
    orch_buf_free(&r->id);
    orch_buf_free(&r->line);
    orch_buf_free(&r->data);
    orch_buf_free(&r->event);
}

static void keep(struct orch_buf *b, struct orch_slice s)
{
    b->n = 0;
    orch_buf_slice(b, s);
}

static int field(struct orch_sse_reader *r, struct orch_slice line)
{
    size_t max = r->max_event_bytes ? r->max_event_bytes : SSE_MAX_BYTES;
    const char *colon = memchr(line.p, ':', line.n);
    struct orch_slice name = { line.p, colon ? (size_t)(colon - line.p) : line.n };
    struct orch_slice value = { line.p + line.n, 0 };
    if (colon) {
        value = (struct orch_slice){ colon + 1, line.n - name.n - 1 };
        if (value.n && value.p[0] == ' ')
            value = (struct orch_slice){ value.p + 1, value.n - 1 };
    }
    if (orch_slice_eq(name, "data")) {
        if (r->data.n + value.n + 1 > max)
            return -EMSGSIZE;
        if (r->has_data)
            orch_buf_char(&r->data, '\n');
        orch_buf_slice(&r->data, value);
        r->has_data = true;
    } else if (orch_slice_eq(name, "event")) {
        keep(&r->event, value);
    } else if (orch_slice_eq(name, "id")) {
        if (!memchr(value.p, 0, value.n))
            keep(&r->id, value);
    } else if (orch_slice_eq(name, "retry")) {
        int64_t ms;
        if (parse_length(value, &ms) == 0)
            r->retry_ms = ms;
    }
    return 0;
}

static int end_of_line(struct orch_sse_reader *r, struct orch_slice line, orch_sse_fn *fn, void *ud)
{
    if (line.n)
        return line.p[0] == ':' ? 0 : field(r, line);
    struct orch_sse_event e = {
        .id = { r->id.p, r->id.n },
        .event = { r->event.p, r->event.n },
        .data = { r->data.p, r->data.n },
        .has_data = true,
        .retry_ms = r->retry_ms,
    };
    bool show = r->has_data;
    /* Reset first: fn may free the reader. Its bytes stay until the next line is read. */
    r->has_data = false;
    r->data.n = r->event.n = 0;
    return show ? fn(ud, &e) : 0;
}

int orch_sse_feed(struct orch_sse_reader *r, struct orch_slice b, orch_sse_fn *fn, void *ud)
{
    size_t max = r->max_line_bytes ? r->max_line_bytes : SSE_MAX_BYTES;
    for (size_t i = 0; i < b.n;) {
        if (r->after_cr && b.p[i] == '\n') {
            r->after_cr = false;
            i++;
            continue;
        }
        r->after_cr = false;
        size_t end = i + line_end(b.p + i, b.n - i);
        if (r->line.n + (end - i) > max)
            return -EMSGSIZE;
        struct orch_slice line = { b.p + i, end - i };
        if (r->line.n || end == b.n) {
            orch_buf_slice(&r->line, line);
            line = (struct orch_slice){ r->line.p, r->line.n };
        }
        if (end == b.n)
            break;
        r->after_cr = b.p[end] == '\r';
        i = end + 1;
        if (!r->started && line.n >= 3 && memcmp(line.p, "\xef\xbb\xbf", 3) == 0)
            line = (struct orch_slice){ line.p + 3, line.n - 3 };
        r->started = true;
        r->line.n = 0;
        int rc = end_of_line(r, line, fn, ud);
        if (rc)
            return rc;
    }
    return 0;
}
