/* The HTTP client: any number of calls in one loop, over TCP and unix sockets. libcurl, loaded at
 * the first orch_http_client_new: linked into a program it costs 5 ms and 8 MiB at every start.
 *
 * No proxy (the environment's neither), no cookies, no stored credentials, HTTP/1.1, http and https
 * only, certificates verified. Every call has deadlines and bounds. Functions given in struct
 * orch_http_call_opts are called from the loop alone, never from inside a call of this room nor of
 * libcurl, in this order: on_head once, on_data any number of times, on_done once, after which the
 * call no longer exists. They may start, pause and cancel calls, this one included. */
#ifndef ORCH_HTTP_CLIENT_H
#define ORCH_HTTP_CLIENT_H

#include "../base/loop.h"
#include "wire.h"

#include <sys/socket.h>

struct orch_http_client;
struct orch_http_call;

struct orch_http_response { /* valid during the function it is given to */
    int status;             /* 0: none came */
    const struct orch_http_header *headers;
    size_t n_headers;
    const char *location;   /* where a redirect leads, absolute; NULL: it is none */
    struct orch_slice body; /* in on_done, without on_data */
};

struct orch_http_call_opts {
    const char *method;    /* NULL: GET, with a body POST */
    const char *url;       /* user information in it is refused */
    const char *unix_path; /* connect there instead; the URL gives Host and path */
    /* numeric: connect there instead of asking DNS (TLS still verifies the URL's name); excludes
     * redirects, whose hosts nobody would have checked */
    const char *address;
    /* Asked before each connection, from inside libcurl: it must not touch calls. false: the call
     * fails with the err it set. The connection is this call's alone. The URL must hold an IPv4
     * address: who looks a name up tells it to others. Excludes address, unix_path and
     * redirects. */
    bool (*may_connect)(void *ud, const struct sockaddr *to, struct orch_err *err);
    const char *ca_file; /* PEM, instead of the system's authorities */
    const struct orch_http_header *headers;
    size_t n_headers;
    struct orch_slice body; /* copied */
    int64_t connect_ms;     /* 0: 10 s */
    int64_t total_ms;       /* 0: 60 s; negative: none, for streams */
    int64_t idle_ms;        /* without a byte from the peer; 0: 60 s; negative: none */
    size_t max_body_bytes;  /* 0: 16 MiB */
    /* 0: a redirect is an answer like others. Authorization and Cookie stay with the first host,
     * https does not become http */
    unsigned max_redirects;
    void (*on_head)(void *ud, const struct orch_http_response *r);
    /* NULL: the body is collected for on_done */
    void (*on_data)(void *ud, struct orch_slice data);
    /* err NULL: the whole answer came, whatever its status. Classes: timeout, limit (the peer sent
     * more than allowed, too many redirects), closed (broken off), upstream (resolve, connect, TLS,
     * protocol). */
    void (*on_done)(void *ud, const struct orch_http_response *r, const struct orch_err *err);
    void *ud;
};

struct orch_http_client *orch_http_client_new(struct orch_loop *l, struct orch_err *err);
/* Calls under way are cancelled. Not from a call's function. */
void orch_http_client_free(struct orch_http_client *h);
/* NULL with err set: a bad option (EINVAL), or 1024 calls under way (EAGAIN). */
struct orch_http_call *orch_http_call_start(struct orch_http_client *h,
                                            const struct orch_http_call_opts *o,
                                            struct orch_err *err);
/* While paused nothing is delivered and at most 64 KiB is read; the idle time stands still. */
void orch_http_call_pause(struct orch_http_call *c, bool on);
/* No function is called any more; c is gone. */
void orch_http_call_cancel(struct orch_http_call *c);

#endif
