#include "server.h"

#include "../base/log.h"
#include "listen.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <time.h>

enum {
    READ_BYTES = 64 * 1024, /* one read, and what may wait behind the request in hand */
    /* answers a pipelining client must read before its next request is looked at */
    OUT_PAUSE_BYTES = 256 * 1024,
    KEEP_BYTES = 1024, /* an output buffer this small stays with an idle connection */
    /* for the client to read the last answer before its unread bytes reset it */
    LINGER_MS = 2000,
};

enum state {
    HEAD = 1, /* between requests, or a head in part */
    BODY,
    IN_HAND, /* the handler has the request */
    STREAM,
    CLOSING, /* the last answer is being written */
    LINGER,
};

struct orch_http_reply {
    struct conn *c; /* NULL when the client is gone */
    orch_http_gone_fn *gone;
    void *ud;
};

struct conn {
    LIST_ENTRY(conn) link;
    struct orch_http_server *s;
    struct orch_watch *watch;
    int fd;
    enum state state;
    enum orch_http_gone why;
    bool dead, eof, posted, processing;
    bool begun; /* read_by is this request's, not the idle time */
    bool keep, head_only, http10;
    struct orch_buf in, out;
    size_t out_at, scan, accounted;
    /* the request being read */
    size_t head_n, body_n;
    int64_t content_length;
    bool chunked;
    struct orch_http_chunks chunks;
    struct orch_http_reply *reply;
    int64_t read_by, write_by, beat_at; /* 0: none */
    struct orch_http_peer peer;
};

struct orch_http_server {
    struct orch_loop *loop;
    orch_http_handler *on_request;
    void *ud;
    struct orch_http_limits lim;
    struct orch_http_listener listener;
    bool draining;
    struct orch_timer *sweep;
    int64_t sweep_at, grain_ms;
    LIST_HEAD(, conn) conns;
    struct orch_http_stats stats;
    struct orch_buf event; /* an event being composed */
    char date[32];
    time_t date_s;
    struct orch_http_request request;
    /* what is whole is parsed here, so that an idle connection has no buffer */
    char scratch[READ_BYTES];
};

/* ---- time: one timer, set to the nearest deadline of any connection */

static void arm(struct orch_http_server *s, int64_t at)
{
    if (at >= s->sweep_at)
        return;
    s->sweep_at = at;
    int64_t in = at - orch_loop_now_ms(s->loop);
    orch_timer_set(s->sweep, in > s->grain_ms ? in : s->grain_ms);
}

static void deadline(struct conn *c, int64_t *slot, int64_t ms)
{
    *slot = orch_loop_now_ms(c->s->loop) + ms;
    arm(c->s, *slot);
}

/* ---- the connection */

static size_t pending(const struct conn *c)
{
    return c->out.n - c->out_at;
}

static void account(struct conn *c)
{
    size_t now = c->in.cap + c->out.cap;
    c->s->stats.buffered_bytes += now - c->accounted;
    c->accounted = now;
}

static void later(void *ud);

static void soon(struct conn *c)
{
    if (!c->posted)
        orch_loop_post(c->s->loop, later, c);
    c->posted = true;
}

/* The end of the connection, carried out by later(): nobody's callback runs inside a call. */
static void fail(struct conn *c, enum orch_http_gone why)
{
    if (c->dead)
        return;
    c->dead = true;
    c->why = why;
    c->s->stats.slow += why == ORCH_HTTP_GONE_SLOW;
    orch_watch_set(c->watch, 0);
    soon(c);
}

static void conn_free(struct conn *c)
{
    struct orch_http_server *s = c->s;
    struct orch_http_reply *r = c->reply;
    enum orch_http_gone why = c->why;
    if (c->posted)
        orch_loop_unpost(s->loop, later, c);
    LIST_REMOVE(c, link);
    s->stats.connections--;
    s->stats.streams -= c->state == STREAM;
    s->stats.buffered_bytes -= c->accounted;
    orch_watch_free(c->watch);
    close(c->fd);
    orch_buf_free(&c->in);
    orch_buf_free(&c->out);
    free(c);
    if (!r)
        return;
    r->c = NULL;
    if (r->gone)
        r->gone(r->ud, why);
}

static void update(struct conn *c)
{
    if (c->dead)
        return;
    bool hold = c->eof || (c->state == HEAD && pending(c) > OUT_PAUSE_BYTES);
    orch_watch_set(c->watch, (hold ? 0 : ORCH_READ) | (pending(c) ? ORCH_WRITE : 0));
    account(c);
}

static void begin_linger(struct conn *c)
{
    if (c->eof || shutdown(c->fd, SHUT_WR) < 0) {
        fail(c, ORCH_HTTP_GONE_CLIENT);
        return;
    }
    c->state = LINGER;
    deadline(c, &c->read_by, LINGER_MS);
}

static void flush(struct conn *c)
{
    if (c->dead)
        return;
    while (pending(c)) {
        ssize_t w = send(c->fd, c->out.p + c->out_at, pending(c), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && errno == EAGAIN) {
            if (!c->write_by)
                deadline(c, &c->write_by, c->s->lim.send_ms);
            return;
        }
        if (w < 0) {
            fail(c, ORCH_HTTP_GONE_CLIENT);
            return;
        }
        c->out_at += (size_t)w;
        c->write_by = 0;
    }
    c->out.n = c->out_at = 0;
    if (c->out.cap > KEEP_BYTES)
        orch_buf_free(&c->out);
    if (c->state == CLOSING)
        begin_linger(c);
    else if (c->eof)
        fail(c, ORCH_HTTP_GONE_CLIENT);
}

/* Room for more output: what was sent is dropped when it is the larger part. */
static struct orch_buf *output(struct conn *c)
{
    if (c->out_at > READ_BYTES && c->out_at > c->out.n / 2) {
        orch_buf_consume(&c->out, c->out_at);
        c->out_at = 0;
    }
    return &c->out;
}

/* ---- answers */

static const char *reason(int status)
{
    static const struct {
        int status;
        const char *text;
    } reasons[] = {
        { 200, "OK" },
        { 201, "Created" },
        { 202, "Accepted" },
        { 204, "No Content" },
        { 301, "Moved Permanently" },
        { 302, "Found" },
        { 303, "See Other" },
        { 304, "Not Modified" },
        { 307, "Temporary Redirect" },
        { 308, "Permanent Redirect" },
        { 400, "Bad Request" },
        { 401, "Unauthorized" },
        { 403, "Forbidden" },
        { 404, "Not Found" },
        { 405, "Method Not Allowed" },
        { 406, "Not Acceptable" },
        { 408, "Request Timeout" },
        { 409, "Conflict" },
        { 410, "Gone" },
        { 411, "Length Required" },
        { 413, "Content Too Large" },
        { 414, "URI Too Long" },
        { 415, "Unsupported Media Type" },
        { 417, "Expectation Failed" },
        { 429, "Too Many Requests" },
        { 431, "Request Header Fields Too Large" },
        { 500, "Internal Server Error" },
        { 501, "Not Implemented" },
        { 503, "Service Unavailable" },
        { 505, "HTTP Version Not Supported" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(reasons); i++)
        if (reasons[i].status == status)
            return reasons[i].text;
    return "Status";
}

/* The day names are HTTP's, not the locale's. */
static const char *http_date(struct orch_http_server *s)
{
    time_t now = time(NULL);
    if (now == s->date_s)
        return s->date;
    static const char days[] = "SunMonTueWedThuFriSat",
                      months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    struct tm t;
    s->date_s = now;
    gmtime_r(&now, &t);
    snprintf(s->date, sizeof s->date, "%.3s, %02u %.3s %04u %02u:%02u:%02u GMT",
             days + 3 * t.tm_wday, (unsigned)t.tm_mday % 100, months + 3 * t.tm_mon,
             (unsigned)(t.tm_year + 1900) % 10000, (unsigned)t.tm_hour % 100,
             (unsigned)t.tm_min % 100, (unsigned)t.tm_sec % 100);
    return s->date;
}

static bool headers_ok(const struct orch_http_header *h, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!orch_http_token_ok(h[i].name) || !orch_http_value_ok(h[i].value))
            return false;
    return true;
}

/* Everything of the head but the framing headers and the empty line. */
static void put_head(struct conn *c, int status, const struct orch_http_header *h, size_t n)
{
    struct orch_buf *out = output(c);
    orch_buf_printf(out, "HTTP/1.1 %d %s\r\nDate: %s\r\n", status, reason(status), http_date(c->s));
    for (size_t i = 0; i < n; i++) {
        orch_buf_slice(out, h[i].name);
        orch_buf_add(out, ": ", 2);
        orch_buf_slice(out, h[i].value);
        orch_buf_add(out, "\r\n", 2);
    }
    if (!c->keep)
        orch_buf_str(out, "Connection: close\r\n");
}

static void put_answer(struct conn *c, int status, const struct orch_http_header *h, size_t n,
                       struct orch_slice body)
{
    put_head(c, status, h, n);
    struct orch_buf *out = &c->out;
    if (status == 204 || status == 304)
        orch_buf_add(out, "\r\n", 2);
    else
        orch_buf_printf(out, "Content-Length: %zu\r\n\r\n", body.n);
    if (status != 204 && status != 304 && !c->head_only)
        orch_buf_slice(out, body);
}

/* After the last byte of an answer was queued. */
static void answered(struct conn *c)
{
    c->reply = NULL;
    c->state = c->keep ? HEAD : CLOSING;
    c->begun = false;
    deadline(c, &c->read_by, c->s->lim.idle_ms);
    if (c->processing) /* the loop there goes on */
        return;
    flush(c);
    if (c->in.n && !c->dead)
        soon(c); /* a request was pipelined behind this one */
    update(c);
}

/* Answers for the server itself and closes. */
static void refuse(struct conn *c, int status, const char *rule)
{
    char text[160];
    int n = snprintf(text, sizeof text, "%s\n", rule);
    c->keep = false;
    c->head_only = false;
    c->s->stats.bad_requests++;
    struct orch_http_header type = { ORCH_SLICE("Content-Type"), ORCH_SLICE("text/plain") };
    put_answer(c, status, &type, 1, (struct orch_slice){ text, (size_t)n });
    c->state = CLOSING;
    c->read_by = 0;
}

/* Frees r; true while somebody is there to be answered. */
static bool reply_end(struct orch_http_reply *r)
{
    struct conn *c = r->c;
    free(r);
    if (c && c->dead)
        c->reply = NULL;
    return c && !c->dead;
}

void orch_http_reply_send(struct orch_http_reply *r, int status,
                          const struct orch_http_header *headers, size_t n_headers,
                          struct orch_slice body)
{
    struct conn *c = r->c;
    if (c && c->state == STREAM) {
        orch_http_sse_end(r);
        return;
    }
    if (!reply_end(r))
        return;
    if (status < 200 || status > 599 || !headers_ok(headers, n_headers)) {
        orch_log(ORCH_ERROR,
                 "http: an answer with status %d or a header that HTTP cannot carry became a 500",
                 status);
        status = 500;
        n_headers = 0;
        body = (struct orch_slice){ "", 0 };
    }
    put_answer(c, status, headers, n_headers, body);
    answered(c);
}

void orch_http_reply_on_gone(struct orch_http_reply *r, orch_http_gone_fn *fn, void *ud)
{
    r->gone = fn;
    r->ud = ud;
}

/* ---- event streams */

static void put_chunk(struct conn *c, struct orch_slice data)
{
    struct orch_buf *out = output(c);
    if (!c->http10)
        orch_buf_printf(out, "%zx\r\n", data.n);
    orch_buf_slice(out, data);
    if (!c->http10)
        orch_buf_add(out, "\r\n", 2);
    deadline(c, &c->beat_at, c->s->lim.keep_alive_ms);
    soon(c);
}

void orch_http_sse_start(struct orch_http_reply *r, const struct orch_http_header *headers,
                         size_t n_headers)
{
    struct conn *c = r->c;
    if (!c || c->dead || c->state == STREAM)
        return;
    if (!headers_ok(headers, n_headers)) {
        orch_log(ORCH_ERROR,
                 "http: headers that HTTP cannot carry were left out of an event stream's answer");
        n_headers = 0;
    }
    put_head(c, 200, headers, n_headers);
    orch_buf_str(&c->out, "Content-Type: text/event-stream\r\nCache-Control: no-cache, "
                          "no-transform\r\nX-Accel-Buffering: no\r\n");
    orch_buf_str(&c->out, c->http10 ? "\r\n" : "Transfer-Encoding: chunked\r\n\r\n");
    c->state = STREAM;
    c->s->stats.streams++;
    deadline(c, &c->beat_at, c->s->lim.keep_alive_ms);
    soon(c);
}

static bool over(const struct conn *c, size_t more)
{
    size_t queued = pending(c);
    return queued && (queued + more > c->s->lim.queued_bytes ||
                      c->s->stats.buffered_bytes + more > c->s->lim.memory_bytes);
}

int orch_http_sse_send(struct orch_http_reply *r, const struct orch_sse_event *e)
{
    struct conn *c = r->c;
    if (!c || c->dead || c->state != STREAM)
        return -EPIPE;
    struct orch_buf *event = &c->s->event;
    event->n = 0;
    int rc = orch_sse_put(event, e);
    if (rc < 0)
        return rc;
    if (over(c, event->n))
        flush(c);
    if (c->dead)
        return -EPIPE;
    if (over(c, event->n)) {
        fail(c, ORCH_HTTP_GONE_SLOW);
        return -ENOBUFS;
    }
    put_chunk(c, (struct orch_slice){ event->p, event->n });
    if (event->cap > READ_BYTES)
        orch_buf_free(event);
    account(c);
    return 0;
}

void orch_http_sse_end(struct orch_http_reply *r)
{
    struct conn *c = r->c;
    if (c && c->state != STREAM) {
        orch_http_reply_send(r, 500, NULL, 0, (struct orch_slice){ "", 0 });
        return;
    }
    if (!reply_end(r))
        return;
    if (!c->http10)
        orch_buf_str(output(c), "0\r\n\r\n");
    c->beat_at = 0;
    c->s->stats.streams--;
    answered(c);
}

/* ---- requests */

/* Whether the body is all there; *end is where the message ends. -1: refused. *n shrinks when
 * chunks were decoded but more must come. */
static int read_body(struct conn *c, char *p, size_t at, size_t *n, size_t *end,
                     struct orch_http_fault *f)
{
    size_t start = at + c->head_n;
    if (!c->chunked) {
        c->body_n = (size_t)c->content_length;
        *end = start + c->body_n;
        return *n - start >= c->body_n;
    }
    size_t raw = start + c->body_n, body = raw;
    int rc = orch_http_dechunk(&c->chunks, p, *n, &raw, &body, start, c->s->lim.body_bytes, f);
    c->body_n = body - start;
    *end = raw;
    if (rc == 0)
        *n = body;
    return rc;
}

/* Reads a head at p; 1: read into s->request, 0: more must come, -1: refused. */
static int read_head(struct conn *c, const char *p, size_t n, struct orch_http_fault *f)
{
    struct orch_http_server *s = c->s;
    ssize_t end = orch_http_head_end(p, n, &c->scan, f);
    if (end < 0)
        return -1;
    if ((end ? (size_t)end : n) > s->lim.head_bytes) {
        bool line = !memchr(p, '\n', ORCH_HTTP_LINE_MAX < n ? ORCH_HTTP_LINE_MAX : n);
        *f = (struct orch_http_fault){ line ? 414 : 431, line ? "the request line is too long"
                                                              : "the head is too large" };
        return -1;
    }
    if (!end)
        return 0;
    struct orch_http_head_limits lim = { s->lim.headers, (int64_t)s->lim.body_bytes };
    if (orch_http_parse_head(p, (size_t)end, &lim, &s->request, f) < 0)
        return -1;
    c->head_n = (size_t)end;
    c->body_n = 0;
    c->content_length = s->request.content_length < 0 ? 0 : s->request.content_length;
    c->chunked = s->request.chunked;
    c->chunks = (struct orch_http_chunks){ 0 };
    return 1;
}

static void hand_over(struct conn *c, char *p)
{
    struct orch_http_server *s = c->s;
    struct orch_http_request *q = &s->request;
    struct orch_http_reply *r = orch_xcalloc(1, sizeof *r);
    q->body = (struct orch_slice){ p + c->head_n, c->body_n };
    q->peer = &c->peer;
    r->c = c;
    c->reply = r;
    c->state = IN_HAND;
    c->keep = q->keep_alive && !s->draining;
    c->head_only = orch_slice_eq(q->method, "HEAD");
    c->http10 = q->http10;
    c->read_by = 0;
    c->scan = 0;
    s->stats.requests++;
    s->on_request(s->ud, q, r);
}

/* Serves what is whole in p[0..*n); returns how much of it is done with. */
static size_t serve(struct conn *c, char *p, size_t *n)
{
    struct orch_http_server *s = c->s;
    struct orch_http_fault f;
    size_t at = 0, end;
    bool parsed = false; /* s->request is this request's head */
    while (!c->dead) {
        if (c->state == HEAD) {
            if (at == *n)
                break;
            if (pending(c) > OUT_PAUSE_BYTES) {
                flush(c);
                if (pending(c) > OUT_PAUSE_BYTES)
                    break;
            }
            int rc = read_head(c, p + at, *n - at, &f);
            if (rc < 0)
                refuse(c, f.status, f.rule);
            if (rc == 0)
                break;
            if (rc > 0) {
                c->state = BODY;
                parsed = true;
                bool body = c->chunked || c->content_length;
                if (s->request.expect_continue && body && !s->request.http10 &&
                    *n - at == c->head_n)
                    orch_buf_str(output(c), "HTTP/1.1 100 Continue\r\n\r\n");
            }
        } else if (c->state == BODY) {
            int rc = read_body(c, p, at, n, &end, &f);
            if (rc == 0)
                break;
            struct orch_http_head_limits lim = { s->lim.headers, (int64_t)s->lim.body_bytes };
            if (rc > 0 && !parsed)
                rc = orch_http_parse_head(p + at, c->head_n, &lim, &s->request, &f);
            if (rc < 0) {
                refuse(c, f.status, f.rule);
                continue;
            }
            hand_over(c, p + at);
            parsed = false;
            at = end;
        } else if (c->state == IN_HAND || c->state == STREAM) {
            break;
        } else { /* the connection ends: what else came is not looked at */
            at = *n;
            break;
        }
    }
    return c->dead ? *n : at;
}

/* p is c->in's memory or the server's scratch. */
static void process(struct conn *c, char *p, size_t n)
{
    bool own = p == c->in.p;
    c->processing = true;
    size_t done = serve(c, p, &n);
    c->processing = false;
    if (own) {
        c->in.n = n;
        orch_buf_consume(&c->in, done);
    } else if (done < n) {
        orch_buf_add(&c->in, p + done, n - done);
    }
    if (!c->in.n)
        orch_buf_free(&c->in);
    if ((c->state == HEAD || c->state == BODY) && c->in.n) {
        account(c);
        if (c->s->stats.buffered_bytes > c->s->lim.memory_bytes) {
            refuse(c, 503, "too much is being sent to this server");
            orch_buf_free(&c->in);
        } else if (!c->begun) {
            c->begun = true;
            deadline(c, &c->read_by, c->s->lim.request_ms);
        }
    }
    flush(c);
}

static void readable(struct conn *c)
{
    struct orch_http_server *s = c->s;
    ssize_t r = recv(c->fd, s->scratch, sizeof s->scratch, MSG_DONTWAIT);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r <= 0) {
        c->eof = true;
        /* An answer that is complete may still be read by a client that closed its sending side. */
        if (r < 0 || !pending(c) || c->reply)
            fail(c, ORCH_HTTP_GONE_CLIENT);
        return;
    }
    bool waits = c->state == IN_HAND || c->state == STREAM;
    if (c->state == LINGER || c->state == CLOSING)
        return;
    if (waits && c->in.n + (size_t)r > READ_BYTES) {
        fail(c, ORCH_HTTP_GONE_CLIENT);
        return;
    }
    if (!waits && !c->in.n) {
        process(c, s->scratch, (size_t)r);
        return;
    }
    orch_buf_add(&c->in, s->scratch, (size_t)r);
    if (!waits)
        process(c, c->in.p, c->in.n);
}

static void ready(void *ud, int events)
{
    struct conn *c = ud;
    if (events & ORCH_WRITE) {
        flush(c);
        if (!c->dead && c->state == HEAD && c->in.n)
            process(c, c->in.p, c->in.n);
    }
    if ((events & ORCH_READ) && !c->dead)
        readable(c);
    update(c);
}

static void later(void *ud)
{
    struct conn *c = ud;
    c->posted = false;
    if (c->dead) {
        conn_free(c);
        return;
    }
    flush(c);
    if (!c->dead && c->state == HEAD && c->in.n)
        process(c, c->in.p, c->in.n);
    update(c);
}

static void expire(struct conn *c, int64_t now)
{
    if (c->write_by && c->write_by <= now) {
        fail(c, ORCH_HTTP_GONE_SLOW);
        return;
    }
    if (c->beat_at && c->beat_at <= now) {
        c->beat_at = 0;
        if (!pending(c))
            put_chunk(c, ORCH_SLICE(":\n\n"));
        else
            deadline(c, &c->beat_at, c->s->lim.keep_alive_ms);
    }
    if (c->read_by && c->read_by <= now) {
        c->read_by = 0;
        if (!c->in.n) {
            fail(c, ORCH_HTTP_GONE_CLIENT);
            return;
        }
        refuse(c, 408, "the request did not arrive in time");
        orch_buf_free(&c->in);
        flush(c);
        update(c);
    }
}

static void sweep(void *ud)
{
    struct orch_http_server *s = ud;
    struct conn *c;
    int64_t now = orch_loop_now_ms(s->loop), nearest = INT64_MAX;
    s->sweep_at = 0; /* not armed while at it */
    LIST_FOREACH (c, &s->conns, link) {
        if (!c->dead)
            expire(c, now);
        if (c->dead)
            continue;
        const int64_t at[] = { c->read_by, c->write_by, c->beat_at };
        for (size_t i = 0; i < ORCH_ARRAY_LEN(at); i++)
            if (at[i] && at[i] < nearest)
                nearest = at[i];
    }
    s->sweep_at = INT64_MAX;
    if (nearest != INT64_MAX)
        arm(s, nearest);
}

static bool is_full(const struct orch_http_server *s, const struct orch_http_peer *p)
{
    size_t same = 0;
    const struct conn *c;
    LIST_FOREACH (c, &s->conns, link)
        same += memcmp(c->peer.key, p->key, sizeof p->key) == 0;
    return s->stats.connections >= s->lim.connections || same >= s->lim.peer_connections;
}

static void accepted(void *ud, int fd, const struct orch_http_peer *peer)
{
    static const char full[] = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: "
                               "0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n";
    struct orch_http_server *s = ud;
    if (is_full(s, peer)) {
        if (send(fd, full, sizeof full - 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
            orch_log(ORCH_DEBUG, "http: %s: too many connections", s->listener.address);
        s->stats.refused++;
        close(fd);
        return;
    }
    if (!peer->local) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){ 1 }, sizeof(int));
        /* What the peer's machine no longer acknowledges ends the connection, streams included. */
        setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &(unsigned){ (unsigned)s->lim.send_ms },
                   sizeof(unsigned));
    }
    struct conn *c = orch_xcalloc(1, sizeof *c);
    *c = (struct conn){ .s = s, .fd = fd, .state = HEAD, .begun = true, .peer = *peer };
    LIST_INSERT_HEAD(&s->conns, c, link);
    s->stats.connections++;
    s->stats.accepted++;
    c->watch = orch_watch_new(s->loop, c->fd, ORCH_READ, ready, c);
    deadline(c, &c->read_by, s->lim.request_ms);
}

/* ---- the server */

static void set_limits(struct orch_http_server *s, const struct orch_http_limits *l)
{
#define LIMIT(name, otherwise) s->lim.name = l->name ? l->name : (otherwise)
    LIMIT(head_bytes, 32 << 10);
    LIMIT(headers, 100);
    LIMIT(body_bytes, 16 << 20);
    LIMIT(connections, 1024);
    LIMIT(peer_connections, s->lim.connections);
    LIMIT(queued_bytes, 1 << 20);
    LIMIT(memory_bytes, 256 << 20);
    LIMIT(request_ms, 30 * 1000);
    LIMIT(idle_ms, 75 * 1000);
    LIMIT(send_ms, 30 * 1000);
    LIMIT(keep_alive_ms, 15 * 1000);
#undef LIMIT
    const int64_t times[] = { s->lim.request_ms, s->lim.idle_ms, s->lim.send_ms,
                              s->lim.keep_alive_ms };
    s->grain_ms = 250;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(times); i++)
        if (times[i] / 4 < s->grain_ms)
            s->grain_ms = times[i] / 4;
}

struct orch_http_server *orch_http_server_new(struct orch_loop *l,
                                              const struct orch_http_server_opts *o,
                                              struct orch_err *err)
{
    struct orch_http_server *s = orch_xcalloc(1, sizeof *s);
    s->loop = l;
    s->on_request = o->on_request;
    s->ud = o->ud;
    s->listener = (struct orch_http_listener){ .accepted = accepted, .ud = s };
    s->sweep_at = INT64_MAX;
    LIST_INIT(&s->conns);
    set_limits(s, &o->limits);
    s->sweep = orch_timer_new(l, sweep, s);
    if (orch_http_listen(&s->listener, l, o->listen, err) < 0) {
        orch_http_server_free(s);
        return NULL;
    }
    return s;
}

const char *orch_http_server_address(const struct orch_http_server *s)
{
    return s->listener.address;
}

void orch_http_server_stats(const struct orch_http_server *s, struct orch_http_stats *out)
{
    *out = s->stats;
    out->refused += s->listener.refused;
}

void orch_http_server_drain(struct orch_http_server *s)
{
    struct conn *c;
    s->draining = true;
    orch_http_listener_stop(&s->listener);
    LIST_FOREACH (c, &s->conns, link) {
        c->keep = false;
        if (c->state == HEAD && !c->in.n && !pending(c))
            fail(c, ORCH_HTTP_GONE_SERVER);
    }
}

void orch_http_server_free(struct orch_http_server *s)
{
    struct conn *c;
    if (!s)
        return;
    orch_http_listener_stop(&s->listener);
    while ((c = LIST_FIRST(&s->conns))) {
        c->why = c->dead ? c->why : ORCH_HTTP_GONE_SERVER;
        conn_free(c);
    }
    orch_timer_free(s->sweep);
    orch_buf_free(&s->event);
    orch_http_listener_fini(&s->listener);
    free(s);
}
