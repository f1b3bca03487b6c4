/* Requests: however the bytes are cut, the verdict is the same; what is accepted has none of the
 * ambiguities that two parsers could read differently. */
#include "http/wire.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define MUST(x) \
    do { \
        if (!(x)) \
            __builtin_trap(); \
    } while (0)

enum { BODY_MAX = 4096 };

static bool within(struct orch_slice s, const char *p, size_t n)
{
    return s.n == 0 || (s.p >= p && s.p + s.n <= p + n);
}

/* Read again by the plainest means. */
static size_t lines_with(const char *p, size_t n, const char *name)
{
    size_t count = 0, k = strlen(name);
    for (size_t i = 0; i + 1 + k < n; i++)
        count += p[i] == '\n' && strncasecmp(p + i + 1, name, k) == 0;
    return count;
}

static void check_accepted(const char *p, size_t n, const struct orch_http_request *q)
{
    for (size_t i = 0; i < n; i++) {
        MUST(p[i] != 0);
        MUST((p[i] == '\n') == (i > 0 && p[i - 1] == '\r'));
        MUST(p[i] != '\n' || i + 1 == n || (p[i + 1] != ' ' && p[i + 1] != '\t'));
    }
    MUST(n > 4 && memcmp(p + n - 4, "\r\n\r\n", 4) == 0);
    MUST(lines_with(p, n, "host:") == 1 && lines_with(p, n, "host ") == 0);
    size_t lengths = lines_with(p, n, "content-length"),
           codings = lines_with(p, n, "transfer-encoding");
    /* A longer name may begin the same way. */
    MUST(lines_with(p, n, "content-length:") == (q->content_length >= 0) &&
         lengths >= (q->content_length >= 0));
    MUST(lines_with(p, n, "transfer-encoding:") == q->chunked && codings >= q->chunked);
    MUST(!(q->chunked && q->content_length >= 0) && q->content_length <= BODY_MAX);
    MUST(orch_http_token_ok(q->method) && within(q->method, p, n) && q->path.n &&
         q->path.p[0] == '/');
    MUST(within(q->path, p, n) && within(q->query, p, n) && within(q->host, p, n) &&
         q->n_headers <= 50);
    MUST(!memchr(q->path.p, '?', q->path.n));
    for (size_t i = 0; i < q->n_headers; i++) {
        const struct orch_http_header *h = &q->headers[i];
        MUST(within(h->name, p, n) && within(h->value, p, n));
        MUST(orch_http_token_ok(h->name) && orch_http_value_ok(h->value));
        MUST(!h->value.n ||
             (!strchr(" \t", h->value.p[0]) && !strchr(" \t", h->value.p[h->value.n - 1])));
    }
    static const char *const allow[] = { "localhost", "[::1]:80", "https://a.example", NULL };
    static const uint8_t digest[32];
    struct orch_slice v;
    if (!orch_http_name_refused(q, allow))
        MUST(orch_http_name_eq((struct orch_slice){ q->host.p, q->host.n < 9 ? q->host.n : 9 },
                               "localhost") ||
             orch_slice_eq(q->host, "[::1]:80"));
    MUST(!orch_http_bearer_ok(q, digest));
    MUST(orch_http_header(q, "HOST", &v) == 1 && v.p == q->host.p);
}

/* The chunked body at p: consumed `step` bytes at a time. Its verdict, its bytes in out. */
static int dechunk(const char *p, size_t n, size_t step, struct orch_buf *out, size_t *used,
                   struct orch_http_fault *f)
{
    struct orch_http_chunks c = { 0 };
    size_t body = 0, end = 0;
    orch_buf_reserve(out, n);
    *used = 0;
    for (int rc = 0;;) {
        size_t take = n - *used < step ? n - *used : step;
        if (!take)
            return rc;
        memcpy(out->p + end, p + *used, take);
        size_t raw = end;
        rc = orch_http_dechunk(&c, out->p, end + take, &raw, &body, 0, BODY_MAX, f);
        MUST(body <= raw && raw <= end + take && body <= BODY_MAX);
        *used += raw - end;
        out->n = body;
        if (rc != 0)
            return rc;
        MUST(raw == end + take);
        end = body;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 1)
        return 0;
    size_t step = 1 + data[0] % 16;
    const char *p = (const char *)data + 1;
    n--;
    struct orch_http_fault f = { 0 }, g = { 0 };
    size_t scan = 0, scan_cut = 0, fed = 0;
    ssize_t whole = orch_http_head_end(p, n, &scan, &f), cut = 0;
    while (cut == 0 && fed < n) {
        fed = fed + step < n ? fed + step : n;
        cut = orch_http_head_end(p, fed, &scan_cut, &g);
    }
    MUST(whole == cut);
    if (whole > 0) {
        struct orch_http_request q;
        struct orch_http_head_limits lim = { 50, BODY_MAX };
        int rc = orch_http_parse_head(p, (size_t)whole, &lim, &q, &f);
        MUST(rc == 0 || (f.status >= 400 && f.rule));
        if (rc == 0)
            check_accepted(p, (size_t)whole, &q);
        if (rc == 0 && q.chunked) {
            p += whole;
            n -= (size_t)whole;
        }
    }
    /* As chunks too, whatever it is. */
    cleanup_buf struct orch_buf one = { 0 };
    cleanup_buf struct orch_buf two = { 0 };
    size_t used_one, used_two;
    int a = dechunk(p, n, n + 1, &one, &used_one, &f), b = dechunk(p, n, step, &two, &used_two, &g);
    MUST(a == b && used_one == used_two && (a >= 0 || f.status == g.status));
    MUST(a < 0 || (one.n == two.n && memcmp(one.p, two.p, one.n) == 0));
    return 0;
}
