/* The HTTP/1.1 server: listeners, connections, answers now or later, event streams. Strict parsing
 * is wire.h's; this room owns sockets, buffers, limits and time. One thread: the loop's.
 *
 * A request is whole (head and body) before on_request sees it, and a connection has one request in
 * hand at a time: what a client pipelines behind it waits, in order. Each request comes with a
 * `struct orch_http_reply *`, which is the handler's from then on: it ends it exactly once, inside
 * on_request or later, by orch_http_reply_send or orch_http_sse_end. When the client goes away
 * first the reply's on_gone function is told, once, from the loop and never from inside a call of
 * this room; the reply stays valid, what is done with it has no effect, and it still must be ended
 * (on_gone itself may do it). A client that closes its sending side is gone.
 *
 * Nothing a peer does grows memory without bound: see struct orch_http_limits. */
#ifndef ORCH_HTTP_SERVER_H
#define ORCH_HTTP_SERVER_H

#include "../base/loop.h"
#include "wire.h"

struct orch_http_server;
struct orch_http_reply;

/* `q` and all its slices are valid during the call. Must not free the server. */
typedef void orch_http_handler(void *ud, const struct orch_http_request *q,
                               struct orch_http_reply *r);

enum orch_http_gone {
    /* closed, reset, closed its sending side, or sent over 64 KiB ahead of its answer */
    ORCH_HTTP_GONE_CLIENT = 1,
    ORCH_HTTP_GONE_SLOW,   /* did not read: over queued_bytes or send_ms */
    ORCH_HTTP_GONE_SERVER, /* the server is freed */
};
typedef void orch_http_gone_fn(void *ud, enum orch_http_gone why);

struct orch_http_limits {    /* 0: the default */
    size_t head_bytes;       /* 32 KiB; 431 */
    size_t headers;          /* 100, at most ORCH_HTTP_HEADERS_MAX; 431 */
    size_t body_bytes;       /* 16 MiB; 413 */
    size_t connections;      /* 1024; further ones get 503 */
    size_t peer_connections; /* of one address or uid: as connections; 503 */
    /* 1 MiB: an event that would queue more for a stream ends it, unless nothing was queued */
    size_t queued_bytes;
    /* 256 MiB: all that is buffered for all connections; a body over it gets 503, a stream that
     * has something queued is ended */
    size_t memory_bytes;
    int64_t request_ms;    /* 30 s from connecting, or a request's first byte, to its last; 408 */
    int64_t idle_ms;       /* 75 s between requests */
    int64_t send_ms;       /* 30 s without the client reading anything of what waits for it */
    int64_t keep_alive_ms; /* 15 s of silence on an event stream, then a comment is sent */
};

struct orch_http_server_opts {
    /* "ADDRESS:PORT" ("127.0.0.1:8700", "[::1]:0", "localhost:8700") or "unix:PATH": the socket is
     * made 0600 in PATH's directory, which is made, or must be this user's and 0700. Only this
     * process's uid and root may connect there; others are closed at once. */
    const char *listen;
    orch_http_handler *on_request;
    void *ud;
    struct orch_http_limits limits;
};

struct orch_http_stats {
    size_t connections, streams, buffered_bytes;
    uint64_t accepted, refused, requests, bad_requests, slow;
};

struct orch_http_server *orch_http_server_new(struct orch_loop *l,
                                              const struct orch_http_server_opts *o,
                                              struct orch_err *err);
/* Where it listens, with the real port: "127.0.0.1:41763", "unix:/run/orch/mcp.sock". */
const char *orch_http_server_address(const struct orch_http_server *s);
void orch_http_server_stats(const struct orch_http_server *s, struct orch_http_stats *out);
/* Stops listening and closes idle connections; the others close after the answer in hand. */
void orch_http_server_drain(struct orch_http_server *s);
/* Closes everything; open replies are told (ORCH_HTTP_GONE_SERVER) before it returns. Not from a
 * handler. */
void orch_http_server_free(struct orch_http_server *s);

/* Consumes r. `headers` are added to the server's own (Date, Content-Length, Connection,
 * Transfer-Encoding); a name or value that would break the message makes the answer a 500. */
void orch_http_reply_send(struct orch_http_reply *r, int status,
                          const struct orch_http_header *headers, size_t n_headers,
                          struct orch_slice body);
/* fn NULL: nobody is told. */
void orch_http_reply_on_gone(struct orch_http_reply *r, orch_http_gone_fn *fn, void *ud);

/* Begins a 200 text/event-stream, never cached or buffered by proxies. Events are written at the
 * end of the turn of the loop; comments keep the stream alive by themselves. */
void orch_http_sse_start(struct orch_http_reply *r, const struct orch_http_header *headers,
                         size_t n_headers);
/* 0; -EPIPE when the client is gone; -ENOBUFS when it was too slow and this ended the stream
 * (on_gone follows); -EINVAL as orch_sse_put. */
int orch_http_sse_send(struct orch_http_reply *r, const struct orch_sse_event *e);
/* Ends the stream after what is queued. Consumes r. */
void orch_http_sse_end(struct orch_http_reply *r);

#endif
