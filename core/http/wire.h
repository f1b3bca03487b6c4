/* What goes over the wire in HTTP/1.1 and server-sent events: pure functions over bytes, no I/O.
 *
 * The request parser is orch's own. evhttp parses before its callbacks can look, and lets pass what
 * request smuggling needs (two Content-Length, a bare LF, a space before the colon, no Host, NUL in
 * a header); a check in front of it would have to find the end of each message by itself, and two
 * parsers that disagree about that are the very fault. So there is one, which refuses whatever RFC
 * 9112 lets a recipient refuse: folded lines, absolute-form and other targets, transfer codings
 * other than chunked, chunk extensions, trailers. */
#ifndef ORCH_HTTP_WIRE_H
#define ORCH_HTTP_WIRE_H

#include "../base/util.h"

#define ORCH_HTTP_HEADERS_MAX 128
#define ORCH_HTTP_LINE_MAX 8192 /* request line */

struct orch_http_header {
    struct orch_slice name, value; /* as they came, without the white space around the value */
};

struct orch_http_peer {
    bool local; /* a unix socket: uid and pid are known, addr is empty */
    uid_t uid;
    pid_t pid;
    char addr[46]; /* numeric */
    uint16_t port;
    uint8_t key[16]; /* what counts as the same peer: IPv4 address, IPv6 /64, uid */
};

/* A request. Slices point into the bytes it was parsed from. */
struct orch_http_request {
    /* path and query as they came, escapes valid and not %00 */
    struct orch_slice method, path, query;
    struct orch_slice host; /* the Host header: NAME, NAME:PORT, [IPV6]:PORT */
    struct orch_http_header headers[ORCH_HTTP_HEADERS_MAX];
    size_t n_headers;
    struct orch_slice body; /* set by the server, as is peer */
    const struct orch_http_peer *peer;
    /* framing */
    int64_t content_length; /* -1: none */
    bool chunked, keep_alive, http10, expect_continue;
};

/* Why a message is refused. */
struct orch_http_fault {
    int status;
    const char *rule;
};

struct orch_http_head_limits {
    size_t headers;     /* count, at most ORCH_HTTP_HEADERS_MAX */
    int64_t body_bytes; /* for Content-Length: 413 */
};

/* Bytes of the head at p, its empty line included; 0 when it is not all there; -1 with f set when
 * the line endings alone already refuse it. *scan (0 at first) keeps what was looked at between
 * calls. */
ssize_t orch_http_head_end(const char *p, size_t n, size_t *scan, struct orch_http_fault *f);
/* Parses a whole head of n bytes (from orch_http_head_end). 0 or -1 with f set. */
int orch_http_parse_head(const char *p, size_t n, const struct orch_http_head_limits *lim,
                         struct orch_http_request *q, struct orch_http_fault *f);

/* How often a header occurs (names ignore case); *value is the first one's, empty when none.
 * Whoever acts on a header that must be single looks at the count. */
size_t orch_http_find(const struct orch_http_header *h, size_t n, const char *name,
                      struct orch_slice *value);
static inline size_t orch_http_header(const struct orch_http_request *q, const char *name,
                                      struct orch_slice *value)
{
    return orch_http_find(q->headers, q->n_headers, name, value);
}
bool orch_http_name_eq(struct orch_slice a, const char *b); /* ignoring ASCII case */
bool orch_http_begins(struct orch_slice s, const char *b);  /* likewise */
bool orch_http_token_ok(struct orch_slice s);               /* a method or header name */
bool orch_http_value_ok(struct orch_slice s);               /* no control character but tab */

/* Chunked coding, resumable after any byte. Zero-initialise. */
struct orch_http_chunks {
    uint64_t left;
    int state, digits;
};
/* Decodes in place: raw bytes are p[*raw..n), the body's bytes are moved to p[*body..); both
 * advance. 1: the message has ended at *raw; 0: all is consumed, more must come; -1: refused.
 * max_body bounds `*body - start`. */
int orch_http_dechunk(struct orch_http_chunks *c, char *p, size_t n, size_t *raw, size_t *body,
                      size_t start, size_t max_body, struct orch_http_fault *f);

/* ---- who may ask */

/* Against DNS rebinding: the Host header, and each Origin, must be one of `allow`
 * (NULL-terminated). "NAME" and "[::1]" allow any port, "NAME:PORT" just that one; a browser's
 * Origin may also be given whole, "https://app.example.com". NULL when allowed, else what is wrong,
 * for the log: answer 403. */
const char *orch_http_name_refused(const struct orch_http_request *q, const char *const *allow);
/* Whether the one Authorization header is `Bearer TOKEN`, TOKEN's SHA-256 being this. Constant
 * time. */
bool orch_http_bearer_ok(const struct orch_http_request *q, const uint8_t token_sha256[32]);

/* ---- server-sent events (the WHATWG's event stream format) */

struct orch_sse_event {
    struct orch_slice id, event, data; /* id, event: empty for none (a reader keeps the last id) */
    /* an event without data is not shown to a page, but sets the id */
    bool has_data;
    int64_t retry_ms; /* <= 0: none */
};

/* Appends the event; -EINVAL when id or event has a line break or NUL. */
int orch_sse_put(struct orch_buf *out, const struct orch_sse_event *e);

/* An event as read; id is the last one the stream named. Non-zero ends orch_sse_feed, which then no
 * longer touches the reader (the function may have freed it). */
typedef int orch_sse_fn(void *ud, const struct orch_sse_event *e);

struct orch_sse_reader {
    size_t max_line_bytes, max_event_bytes; /* 0: 16 MiB */
    struct orch_buf id;                     /* last id: what Last-Event-ID would say */
    int64_t retry_ms;                       /* the last `retry`, 0 when none was sent */
    struct orch_buf line, data, event;
    bool has_data, after_cr, started;
};
void orch_sse_reader_fini(struct orch_sse_reader *r);
/* Reads on. What fn returned, or 0, or -EMSGSIZE when a line or an event is over its bound. */
int orch_sse_feed(struct orch_sse_reader *r, struct orch_slice bytes, orch_sse_fn *fn, void *ud);

#endif
