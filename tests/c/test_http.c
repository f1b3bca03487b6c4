/* core/http: the wire formats, the server against raw sockets, the client against the server and
 * against hostile raw servers. Everything runs in one loop. */
#include "base/hash.h"
#include "base/log.h"
#include "http/client.h"
#include "http/server.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "odd_locale.h"

static struct orch_loop *loop;
static struct orch_http_server *server;
static char dir[64];

#define UNTIL(condition) \
    do { \
        int64_t give_up = orch_now_us() + 60 * 1000 * 1000; \
        while (!(condition)) { \
            if (orch_now_us() > give_up) \
                fail_msg("%s:%d: never came true: %s", __FILE__, __LINE__, #condition); \
            orch_loop_step(loop, 20); \
        } \
    } while (0)

/* ---- a raw socket, read by the loop */

struct raw {
    int fd;
    struct orch_watch *watch;
    struct orch_buf in;
    bool eof;
};

static void raw_readable(void *ud, int events)
{
    (void)events;
    struct raw *k = ud;
    char chunk[65536];
    ssize_t r = recv(k->fd, chunk, sizeof chunk, MSG_DONTWAIT);
    if (r > 0) {
        orch_buf_add(&k->in, chunk, (size_t)r);
    } else if (r == 0 || errno != EAGAIN) {
        k->eof = true;
        orch_watch_set(k->watch, 0);
    }
}

static int connect_to(const char *address)
{
    if (strncmp(address, "unix:", 5) == 0) {
        struct sockaddr_un u = { .sun_family = AF_UNIX };
        snprintf(u.sun_path, sizeof u.sun_path, "%.100s", address + 5);
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (struct sockaddr *)&u, sizeof u) == 0)
            return fd;
        close(fd);
        return -1;
    }
    struct sockaddr_in a = { .sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1)) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    return fd;
}

static void raw_open(struct raw *k)
{
    *k = (struct raw){ .fd = connect_to(orch_http_server_address(server)) };
    assert_true(k->fd >= 0);
    k->watch = orch_watch_new(loop, k->fd, ORCH_READ, raw_readable, k);
}

static void raw_close(struct raw *k)
{
    orch_watch_free(k->watch);
    if (k->fd >= 0)
        close(k->fd);
    orch_buf_free(&k->in);
    *k = (struct raw){ .fd = -1 };
}

static void forget(struct raw *k)
{
    k->in.n = 0;
    if (k->in.p)
        k->in.p[0] = 0;
}

static void raw_send(struct raw *k, const char *p, size_t n)
{
    assert_int_equal(send(k->fd, p, n, MSG_NOSIGNAL), (ssize_t)n);
}

static void say(struct raw *k, const char *text)
{
    raw_send(k, text, strlen(text));
}

static size_t count(const struct raw *k, const char *what)
{
    size_t n = 0;
    for (const char *p = k->in.p; p && (p = strstr(p, what)); p++)
        n++;
    return n;
}

static bool has(const struct raw *k, const char *what)
{
    return count(k, what) > 0;
}

/* ---- a server whose handler is told by the path what to do */

static struct orch_http_reply *kept[1100]; /* /later and /sse */
static size_t n_kept, n_requests, n_gone;
static enum orch_http_gone last_gone;
static struct orch_buf seen; /* "METHOD path?query body;" of each request */
static struct orch_http_peer last_peer;

static void gone(void *ud, enum orch_http_gone why)
{
    size_t i = (size_t)(uintptr_t)ud;
    n_gone++;
    last_gone = why;
    if (kept[i])
        /* no effect, ends the reply */
        orch_http_reply_send(kept[i], 200, NULL, 0, ORCH_SLICE("too late"));
    kept[i] = NULL;
}

static void handle(void *ud, const struct orch_http_request *q, struct orch_http_reply *r)
{
    (void)ud;
    n_requests++;
    last_peer = *q->peer;
    orch_buf_printf(&seen, "%.*s %.*s?%.*s %.*s;", (int)q->method.n, q->method.p, (int)q->path.n,
                    q->path.p, (int)q->query.n, q->query.p, q->body.n < 100 ? (int)q->body.n : 100,
                    q->body.p);
    if (orch_slice_eq(q->path, "/later") || orch_slice_eq(q->path, "/sse")) {
        assert_true(n_kept < ORCH_ARRAY_LEN(kept));
        orch_http_reply_on_gone(r, gone, (void *)(uintptr_t)n_kept);
        kept[n_kept++] = r;
        if (orch_slice_eq(q->path, "/sse")) {
            struct orch_http_header session = { ORCH_SLICE("Mcp-Session-Id"), ORCH_SLICE("s1") };
            orch_http_sse_start(r, &session, 1);
        }
        return;
    }
    if (orch_slice_eq(q->path, "/big")) {
        size_t n = strtoul(q->query.p, NULL, 10);
        cleanup_free char *body = orch_xmalloc(n);
        memset(body, 'b', n);
        orch_http_reply_send(r, 200, NULL, 0, (struct orch_slice){ body, n });
        return;
    }
    if (orch_slice_eq(q->path, "/redirect")) {
        struct orch_http_header to = { ORCH_SLICE("Location"), q->query };
        orch_http_reply_send(r, 302, &to, 1, ORCH_SLICE("elsewhere"));
        return;
    }
    if (orch_slice_eq(q->path, "/bad-header")) {
        struct orch_http_header h = { ORCH_SLICE("X-Split"), ORCH_SLICE("a\r\nSet-Cookie: b") };
        orch_http_reply_send(r, 200, &h, 1, ORCH_SLICE("x"));
        return;
    }
    if (orch_slice_eq(q->path, "/empty")) {
        orch_http_reply_send(r, 204, NULL, 0, ORCH_SLICE(""));
        return;
    }
    struct orch_http_header h[2] = { { ORCH_SLICE("Content-Type"), ORCH_SLICE("text/plain") } };
    size_t n = 1;
    struct orch_slice v;
    if (orch_http_header(q, "x-echo", &v))
        h[n++] = (struct orch_http_header){ ORCH_SLICE("X-Echo"), v };
    orch_http_reply_send(r, 200, h, n, q->body.n ? q->body : ORCH_SLICE("hello"));
}

static struct orch_err err;

static void serve_at(const char *listen, struct orch_http_limits limits)
{
    struct orch_http_server_opts o = { .listen = listen, .on_request = handle, .limits = limits };
    server = orch_http_server_new(loop, &o, &err);
    if (!server)
        fail_msg("%s", err.msg);
}

static void serve(struct orch_http_limits limits)
{
    serve_at("127.0.0.1:0", limits);
}

static struct orch_http_stats stats(void)
{
    struct orch_http_stats s;
    orch_http_server_stats(server, &s);
    return s;
}

static int setup(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/orch-test-http-XXXXXX");
    n_kept = n_requests = n_gone = 0;
    last_gone = 0;
    memset(kept, 0, sizeof kept);
    server = NULL;
    loop = orch_loop_new(NULL);
    return loop && mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    orch_http_server_free(server);
    for (size_t i = 0; i < n_kept; i++)
        if (kept[i])
            orch_http_reply_send(kept[i], 200, NULL, 0, ORCH_SLICE(""));
    orch_buf_free(&seen);
    orch_loop_free(loop);
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd);
}

#define GET "GET / HTTP/1.1\r\nHost: h\r\n\r\n"
#define HEAD_OF(method, path) method " " path " HTTP/1.1\r\nHost: h\r\n"

/* ---- requests that are refused: the status, then the end of the connection, and no handler */

#define P "POST / HTTP/1.1\r\nHost: h\r\n"

static const struct {
    int status;
    struct orch_slice bytes;
} malformed[] = {
    /* the request line */
    { 400, ORCH_SLICE("\r\n" GET) },
    { 400, ORCH_SLICE(" GET / HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET  / HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /  HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET\t/ HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1 \r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / http/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/11.1\r\nHost: h\r\n\r\n") },
    { 505, ORCH_SLICE("GET / HTTP/1.2\r\nHost: h\r\n\r\n") },
    { 505, ORCH_SLICE("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") },
    { 400, ORCH_SLICE("G(T / HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GETGETGETGETGETGETGETGETGETGETGETGET / HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /a%2 HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /a%zz HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /a%00b HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /a?b=%0 HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /a\\b HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /\xc3\xa4 HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET /\0 HTTP/1.1\r\nHost: h\r\n\r\n") },
    { 400, ORCH_SLICE(
               "\x16\x03\x01\x02\x00\x01\x00\x01\xfc") }, /* TLS: at once, nothing more will come */
    /* line ends */
    { 400, ORCH_SLICE("GET / HTTP/1.1\nHost: h\n\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\n\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\rA: b\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\rContent-Length: 3\r\n\r\nabc") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\r\r\n\r\n") },
    /* headers */
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost : h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\n Host: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n c\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n\tc\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nnothing\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\n: b\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA b: c\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA\0: c\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\0c\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\x01\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nA: b\x7f\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\n\xc3\xa4: b\r\n\r\n") },
    /* Host */
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.0\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost:\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h\r\nhost: h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h, i\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: u@h\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h:\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h:8o\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: h/evil\r\n\r\n") },
    { 400, ORCH_SLICE("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n") },
    /* where the message ends */
    { 400, ORCH_SLICE(P "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc") },
    { 400, ORCH_SLICE(P "Content-Length: 3\r\ncontent-length: 4\r\n\r\nabcd") },
    { 400, ORCH_SLICE(P "Content-Length: 3, 3\r\n\r\nabc") },
    { 400, ORCH_SLICE(P "Content-Length: +3\r\n\r\nabc") },
    { 400, ORCH_SLICE(P "Content-Length: -3\r\n\r\nabc") },
    { 400, ORCH_SLICE(P "Content-Length: 0x3\r\n\r\nabc") },
    { 400, ORCH_SLICE(P "Content-Length: 3 \t4\r\n\r\nabc") },
    { 400, ORCH_SLICE(P "Content-Length:\r\n\r\n") },
    { 400, ORCH_SLICE(P "Content-Length: 99999999999999999999\r\n\r\n") },
    { 413, ORCH_SLICE(P "Content-Length: 999999999999999999\r\n\r\n") },
    { 400, ORCH_SLICE(P "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(P "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n") },
    { 400,
      ORCH_SLICE(P "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n") },
    { 501, ORCH_SLICE(P "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n") },
    { 501, ORCH_SLICE(P "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n") },
    { 501, ORCH_SLICE(P "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n") },
    { 501, ORCH_SLICE(P "Transfer-Encoding:\r\n\r\n0\r\n\r\n") },
    { 400,
      ORCH_SLICE("POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n") },
    { 417, ORCH_SLICE(P "Expect: 200-ok\r\nContent-Length: 3\r\n\r\nabc") },
#define C P "Transfer-Encoding: chunked\r\n\r\n"
    { 400, ORCH_SLICE(C "g\r\n") },
    { 400, ORCH_SLICE(C "\r\n") },
    { 400, ORCH_SLICE(C "0x3\r\nabc\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C "-3\r\nabc\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C " 3\r\nabc\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C "3 \r\nabc\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C "3\nabc\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C "3;a=b\r\nabc\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C "3\r\nabcd\r\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C "3\r\nabc\n0\r\n\r\n") },
    { 400, ORCH_SLICE(C "0\r\nTrailer: x\r\n\r\n") },
    { 413, ORCH_SLICE(C "100000000\r\n") },
    { 413, ORCH_SLICE(C "ffffffff\r\n") },
};

static void test_malformed(void **state)
{
    (void)state;
    assert_true(ORCH_ARRAY_LEN(malformed) >= 40);
    serve((struct orch_http_limits){ .request_ms = 5000 });
    for (size_t i = 0; i < ORCH_ARRAY_LEN(malformed); i++) {
        struct raw k;
        char want[32];
        raw_open(&k);
        raw_send(&k, malformed[i].bytes.p, malformed[i].bytes.n);
        UNTIL(k.eof);
        snprintf(want, sizeof want, "HTTP/1.1 %d ", malformed[i].status);
        if (!k.in.n || strncmp(k.in.p, want, strlen(want)) != 0 || n_requests ||
            count(&k, "Date: ") != 1)
            fail_msg("case %zu: want %d, one answer and no handler; got %s", i, malformed[i].status,
                     k.in.n ? k.in.p : "nothing");
        assert_true(has(&k, "Connection: close\r\n"));
        raw_close(&k);
    }
    assert_int_equal(stats().bad_requests, ORCH_ARRAY_LEN(malformed));
    UNTIL(stats().connections == 0);
    assert_int_equal(stats().buffered_bytes, 0);
}

/* A good request before a bad one is answered; what follows the bad one is not looked at. */
static void test_malformed_second(void **state)
{
    (void)state;
    struct raw k;
    serve((struct orch_http_limits){ 0 });
    raw_open(&k);
    say(&k, GET "GET / HTTP/1.1\nHost: h\n\n" GET);
    UNTIL(k.eof);
    assert_int_equal(n_requests, 1);
    assert_int_equal(count(&k, "HTTP/1.1 200 "), 1);
    assert_int_equal(count(&k, "HTTP/1.1 400 "), 1);
    raw_close(&k);
}

static const struct {
    const char *bytes, *seen;
} wellformed[] = {
    { GET, "GET /? ;" },
    { "get /a/../b?x=1&y=%41?z HTTP/1.1\r\nHost: h\r\n\r\n", "get /a/../b?x=1&y=%41?z ;" },
    { "GET /a;b=c,d@e:f!$&'()*+~_-. HTTP/1.1\r\nhOST:\th:80 \t\r\n\r\n",
      "GET /a;b=c,d@e:f!$&'()*+~_-.? ;" },
    { "GET / HTTP/1.1\r\nHost: [::1]:80\r\nA:\r\nB: \xc3\xa4 \t c\r\nA: again\r\n\r\n",
      "GET /? ;" },
    { P "Content-Length: 3\r\n\r\nabc", "POST /? abc;" },
    { P "Content-Length: 003\r\n\r\nabc", "POST /? abc;" },
    { P "Content-Length: 0\r\n\r\n", "POST /? ;" },
    { P "\r\n", "POST /? ;" },
    { C "3\r\nabc\r\n0\r\n\r\n", "POST /? abc;" },
    { C "00000003\r\nabc\r\n000\r\n\r\n", "POST /? abc;" },
    { C "1\r\na\r\nA\r\n0123456789\r\n0\r\n\r\n", "POST /? a0123456789;" },
    { P "Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", "POST /? ;" },
};

static void test_wellformed(void **state)
{
    (void)state;
    serve((struct orch_http_limits){ 0 });
    for (size_t i = 0; i < ORCH_ARRAY_LEN(wellformed); i++) {
        for (int split = 0; split < 2; split++) { /* whole, and byte by byte */
            struct raw k;
            raw_open(&k);
            seen.n = 0;
            for (const char *p = wellformed[i].bytes; split && *p; p++) {
                raw_send(&k, p, 1);
                orch_loop_step(loop, 0);
            }
            if (!split)
                say(&k, wellformed[i].bytes);
            UNTIL(k.in.n);
            assert_true(strncmp(k.in.p, "HTTP/1.1 200 OK\r\n", 17) == 0);
            assert_string_equal(seen.p, wellformed[i].seen);
            seen.n = 0;
            say(&k, GET); /* the connection is where it should be */
            UNTIL(count(&k, "HTTP/1.1 200 OK\r\n") == 2);
            assert_string_equal(seen.p, "GET /? ;");
            raw_close(&k);
        }
    }
}

static void test_answer(void **state)
{
    (void)state;
    struct raw k;
    serve((struct orch_http_limits){ 0 });
    raw_open(&k);
    say(&k, "GET / HTTP/1.1\r\nHost: h\r\nX-Echo: v a l\r\n\r\n");
    UNTIL(has(&k, "hello"));
    assert_true(has(&k, "\r\nContent-Length: 5\r\n\r\nhello") && has(&k, "\r\nX-Echo: v a l\r\n") &&
                has(&k, " GMT\r\n"));
    assert_false(has(&k, "Connection"));
    forget(&k);
    say(&k, "HEAD / HTTP/1.1\r\nHost: h\r\n\r\n" HEAD_OF("GET", "/empty") "\r\n");
    UNTIL(has(&k, "204"));
    UNTIL(k.in.n > 4 && strcmp(k.in.p + k.in.n - 4, "\r\n\r\n") == 0);
    assert_true(has(&k, "Content-Length: 5\r\n\r\nHTTP/1.1 204 No Content\r\n"));
    assert_int_equal(count(&k, "Content-Length"), 1);
    forget(&k);
    say(&k, HEAD_OF("GET", "/bad-header") "\r\n");
    UNTIL(has(&k, "\r\n\r\n"));
    assert_true(has(&k, "HTTP/1.1 500 ") && !has(&k, "Set-Cookie"));
    forget(&k);
    say(&k, HEAD_OF("GET", "/") "Connection: keep-alive, Close\r\n\r\n");
    UNTIL(k.eof);
    assert_true(has(&k, "Connection: close\r\n") && has(&k, "hello"));
    raw_close(&k);

    raw_open(&k);
    say(&k, "GET / HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n");
    UNTIL(k.eof);
    assert_true(has(&k, "Connection: close\r\n") && has(&k, "hello"));
    assert_false(last_peer.local);
    assert_string_equal(last_peer.addr, "127.0.0.1");
    raw_close(&k);
}

static void test_continue(void **state)
{
    (void)state;
    struct raw k;
    serve((struct orch_http_limits){ .body_bytes = 10 });
    raw_open(&k);
    say(&k, P "Content-Length: 3\r\nExpect: 100-Continue\r\n\r\n");
    UNTIL(has(&k, "HTTP/1.1 100 Continue\r\n\r\n"));
    say(&k, "abc");
    UNTIL(has(&k, "\r\n\r\nabc"));
    forget(&k);
    say(&k, P "Content-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"); /* already there */
    UNTIL(has(&k, "abc"));
    assert_false(has(&k, "100 Continue"));
    say(&k, P "Content-Length: 11\r\nExpect: 100-continue\r\n\r\n");
    UNTIL(k.eof);
    assert_true(has(&k, "HTTP/1.1 413 ") && !has(&k, "100 Continue"));
    raw_close(&k);
}

static void test_limits(void **state)
{
    (void)state;
    struct raw k;
    char long_line[10000], many[4000] = "GET / HTTP/1.1\r\nHost: h\r\n";
    memset(long_line, 'x', sizeof long_line - 1);
    long_line[sizeof long_line - 1] = 0;
    serve((struct orch_http_limits){
        .head_bytes = 9000, .headers = 10, .body_bytes = 8, .memory_bytes = 600 << 10 });
    static const char *const starts[] = { "GET /", "GET / HTTP/1.1\r\nHost: h\r\nA: " };
    for (size_t i = 0; i < 2; i++) {
        raw_open(&k);
        say(&k, starts[i]);
        say(&k, long_line);
        UNTIL(k.eof);
        assert_true(strncmp(k.in.p, i ? "HTTP/1.1 431" : "HTTP/1.1 414", 12) == 0);
        raw_close(&k);
    }
    for (int i = 0; i < 9; i++)
        strcat(many, "A: b\r\n");
    for (int i = 0; i < 2; i++) {
        raw_open(&k);
        say(&k, many);
        say(&k, i ? "A: b\r\n\r\n" : "\r\n");
        UNTIL(k.in.n);
        assert_true(strncmp(k.in.p, i ? "HTTP/1.1 431" : "HTTP/1.1 200", 12) == 0);
        raw_close(&k);
    }
    static const struct {
        const char *text, *status;
    } bodies[] = {
        { P "Content-Length: 8\r\n\r\n12345678", "HTTP/1.1 200" },
        { P "Content-Length: 9\r\n\r\n", "HTTP/1.1 413" },
        { C "4\r\n1234\r\n4\r\n5678\r\n0\r\n\r\n", "HTTP/1.1 200" },
        { C "4\r\n1234\r\n5\r\n", "HTTP/1.1 413" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bodies); i++) {
        raw_open(&k);
        say(&k, bodies[i].text);
        UNTIL(k.in.n);
        assert_true(strncmp(k.in.p, bodies[i].status, 12) == 0);
        raw_close(&k);
    }
}

/* All buffers together have a bound: who would go over it is refused, the others are served. */
static void test_memory(void **state)
{
    (void)state;
    struct raw k[8] = { { 0 } }, one;
    static char half[100 << 10];
    memset(half, 'x', sizeof half);
    serve((struct orch_http_limits){ .memory_bytes = 600 << 10 });
    size_t refused = 0;
    for (size_t i = 0; i < 8; i++) {
        raw_open(&k[i]);
        say(&k[i], P "Content-Length: 200000\r\n\r\n");
        raw_send(&k[i], half, sizeof half);
        UNTIL(stats().buffered_bytes >= (i + 1) * sizeof half || k[i].eof);
        assert_true(stats().buffered_bytes <= 800 << 10);
        refused += k[i].eof && has(&k[i], "HTTP/1.1 503 ");
        if (refused)
            break;
    }
    assert_int_equal(refused, 1);
    raw_open(&one);
    say(&one, GET);
    UNTIL(has(&one, "hello"));
    raw_close(&one);
    for (size_t i = 0; i < 8 && k[i].watch; i++)
        raw_close(&k[i]);
    UNTIL(stats().connections == 0);
    assert_int_equal(stats().buffered_bytes, 0);
}

static void test_pipelining(void **state)
{
    (void)state;
    struct raw k;
    serve((struct orch_http_limits){ 0 });
    raw_open(&k);
    say(&k, GET HEAD_OF("POST", "/a") "Content-Length: 1\r\n\r\n1" HEAD_OF(
                "GET", "/later") "\r\n" HEAD_OF("POST",
                                                "/b") "Transfer-Encoding: "
                                                      "chunked\r\n\r\n1\r\n2\r\n0\r\n\r"
                                                      "\n" HEAD_OF("GET", "/later") "\r\n" HEAD_OF(
                                                          "PO"
                                                          "S"
                                                          "T",
                                                          "/"
                                                          "c") "Content-Length: 1\r\n\r\n3");
    UNTIL(n_kept == 1);
    assert_string_equal(seen.p, "GET /? ;POST /a? 1;GET /later? ;"); /* one in hand at a time */
    orch_http_reply_send(kept[0], 200, NULL, 0, ORCH_SLICE("first"));
    assert_int_equal(n_requests, 3); /* the handler is not called from inside */
    kept[0] = NULL;
    UNTIL(n_kept == 2);
    orch_http_reply_send(kept[1], 200, NULL, 0, ORCH_SLICE("second"));
    kept[1] = NULL;
    UNTIL(count(&k, "HTTP/1.1 200 OK") == 6);
    const char *at = k.in.p, *const order[] = { "\r\n\r\nhello", "\r\n\r\n1",      "\r\n\r\nfirst",
                                                "\r\n\r\n2",     "\r\n\r\nsecond", "\r\n\r\n3" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(order); i++) {
        at = strstr(at, order[i]);
        assert_non_null(at);
        at++;
    }
    raw_close(&k);
}

static void test_slow_request(void **state)
{
    (void)state;
    struct raw k, idle, drip;
    serve((struct orch_http_limits){ .request_ms = 1000, .idle_ms = 1500 });
    raw_open(&k);
    raw_open(&idle);
    raw_open(&drip);
    say(&idle, GET);
    say(&k, GET);
    UNTIL(has(&k, "hello"));
    forget(&k);
    say(&k, P "Content-Length: 3\r\n\r\nab"); /* the second one has its own time */
    int64_t started = orch_now_us();
    for (int i = 0; !drip.eof; i++) { /* a byte now and then gains no time */
        if (send(drip.fd, i ? "x" : "G", 1, MSG_NOSIGNAL) < 0)
            break;
        orch_loop_step(loop, 10);
        assert_true(orch_now_us() - started < 60 * 1000 * 1000);
    }
    UNTIL(k.eof && drip.eof);
    assert_true(has(&k, "HTTP/1.1 408 "));
    assert_true(orch_now_us() - started >= 990 * 1000);
    UNTIL(idle.eof);
    assert_true(has(&idle, "200 OK") && count(&idle, "HTTP/1.1") == 1); /* closed without a word */
    assert_int_equal(n_requests, 2);
    raw_close(&k);
    raw_close(&idle);
    raw_close(&drip);
}

/* ---- clients that go away */

static void test_half_closed(void **state)
{
    (void)state;
    struct raw k;
    serve((struct orch_http_limits){ 0 });
    raw_open(&k);
    say(&k, GET GET); /* complete requests answered at once: the answers still arrive */
    shutdown(k.fd, SHUT_WR);
    UNTIL(k.eof);
    assert_int_equal(count(&k, "hello"), 2);
    raw_close(&k);
    raw_open(&k); /* while the handler has it: gone */
    say(&k, HEAD_OF("GET", "/later") "\r\n");
    UNTIL(n_kept == 1);
    shutdown(k.fd, SHUT_WR);
    UNTIL(n_gone == 1);
    assert_int_equal(last_gone, ORCH_HTTP_GONE_CLIENT);
    UNTIL(k.eof);
    raw_close(&k);
    raw_open(&k); /* half a request */
    say(&k, P "Content-Length: 10\r\n\r\nabc");
    shutdown(k.fd, SHUT_WR);
    UNTIL(k.eof);
    assert_int_equal(k.in.n, 0);
    raw_close(&k);
    UNTIL(stats().connections == 0);

    /* The end is seen while a part of the answer waits: more than a unix socket's buffer holds. */
    char where[128];
    snprintf(where, sizeof where, "unix:%s/sub/http.sock", dir);
    orch_http_server_free(server);
    serve_at(where, (struct orch_http_limits){ 0 });
    raw_open(&k);
    orch_watch_set(k.watch, 0);
    size_t before = n_requests;
    say(&k, HEAD_OF("GET", "/big?250000") "\r\n");
    shutdown(k.fd, SHUT_WR);
    UNTIL(n_requests > before);
    for (int i = 0; i < 5; i++)
        orch_loop_step(loop, 2);
    assert_true(stats().buffered_bytes > 0);
    orch_watch_set(k.watch, ORCH_READ);
    UNTIL(k.eof);
    assert_true(k.in.n > 250000);
    raw_close(&k);
}

static void reset_close(struct raw *k)
{
    setsockopt(k->fd, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 0 }, sizeof(struct linger));
    raw_close(k);
}

static void test_gone(void **state)
{
    (void)state;
    struct raw k, other;
    serve((struct orch_http_limits){ 0 });
    raw_open(&other);
    /* before the answer and in the middle of a stream, closed and reset */
    for (int i = 0; i < 4; i++) {
        raw_open(&k);
        say(&k, i & 1 ? HEAD_OF("GET", "/sse") "\r\n" : HEAD_OF("GET", "/later") "\r\n");
        UNTIL(n_kept == (size_t)i + 1);
        if (i & 1)
            UNTIL(has(&k, "text/event-stream"));
        if (i < 2)
            raw_close(&k);
        else
            reset_close(&k);
        UNTIL(n_gone == (size_t)i + 1);
        assert_int_equal(last_gone, ORCH_HTTP_GONE_CLIENT);
        assert_null(kept[i]);
    }
    /* Ended before the client went: nobody is told. One that nobody watches stays valid. */
    raw_open(&k);
    say(&k, HEAD_OF("GET", "/later") "\r\n");
    UNTIL(n_kept == 5);
    orch_http_reply_on_gone(kept[4], NULL, NULL);
    raw_close(&k);
    UNTIL(stats().connections == 1);
    assert_int_equal(n_gone, 4);
    orch_http_reply_send(kept[4], 200, NULL, 0, ORCH_SLICE("nobody"));
    kept[4] = NULL;
    say(&other, GET);
    UNTIL(has(&other, "hello"));
    raw_close(&other);
}

/* ---- back-pressure */

static int event(struct orch_http_reply *r, const char *id, const char *type,
                 struct orch_slice data)
{
    struct orch_sse_event e = { .id = orch_slice_str(id),
                                .event = orch_slice_str(type),
                                .data = data,
                                .has_data = data.p != NULL };
    return orch_http_sse_send(r, &e);
}

static void test_sse(void **state)
{
    (void)state;
    struct raw k;
    serve((struct orch_http_limits){ .keep_alive_ms = 200 });
    raw_open(&k);
    say(&k, HEAD_OF("GET", "/sse") "\r\n");
    UNTIL(has(&k, "\r\n\r\n"));
    assert_true(has(&k, "Content-Type: text/event-stream\r\n") &&
                has(&k, "Mcp-Session-Id: s1\r\n") && has(&k, "X-Accel-Buffering: no\r\n") &&
                has(&k, "Cache-Control: no-cache") && has(&k, "Transfer-Encoding: chunked"));
    assert_int_equal(stats().streams, 1);
    forget(&k);
    assert_int_equal(event(kept[0], "1", NULL, ORCH_SLICE("")), 0);
    assert_int_equal(event(kept[0], "2", "message", ORCH_SLICE("a\nb\r\nc\rd")), 0);
    assert_int_equal(orch_http_sse_send(kept[0], &(struct orch_sse_event){ .retry_ms = 500 }), 0);
    assert_int_equal(event(kept[0], "1\nx", NULL, ORCH_SLICE("")), -EINVAL);
    assert_int_equal(event(kept[0], "", "e\rdata: x", ORCH_SLICE("")), -EINVAL);
    UNTIL(has(&k, "retry: 500\n\n"));
    assert_string_equal(k.in.p, "e\r\nid: 1\ndata: \n\n\r\n"
                                "36\r\nid: 2\nevent: message\ndata: a\ndata: b\ndata: c\ndata: "
                                "d\n\n\r\nc\r\nretry: 500\n\n\r\n");
    forget(&k);
    UNTIL(has(&k, "3\r\n:\n\n\r\n")); /* by itself */
    forget(&k);
    orch_http_sse_end(kept[0]);
    kept[0] = NULL;
    UNTIL(k.in.n);
    assert_string_equal(k.in.p, "0\r\n\r\n");
    assert_int_equal(stats().streams, 0);
    say(&k, GET);
    UNTIL(has(&k, "hello"));
    raw_close(&k);
    raw_open(&k); /* HTTP/1.0: no chunks, the end is the end of the connection */
    say(&k, "GET /sse HTTP/1.0\r\nHost: h\r\n\r\n");
    UNTIL(n_kept == 2);
    assert_int_equal(event(kept[1], NULL, NULL, ORCH_SLICE("x")), 0);
    orch_http_sse_end(kept[1]);
    kept[1] = NULL;
    UNTIL(k.eof);
    assert_true(has(&k, "\r\n\r\ndata: x\n\n") && !has(&k, "chunked"));
    raw_close(&k);
}

static void test_sse_slow(void **state)
{
    (void)state;
    struct raw slow, fast;
    static char data[10000];
    memset(data, 'd', sizeof data);
    serve((struct orch_http_limits){ .queued_bytes = 100 << 10 });
    raw_open(&slow);
    raw_open(&fast);
    say(&slow, HEAD_OF("GET", "/sse") "\r\n");
    UNTIL(n_kept == 1);
    say(&fast, HEAD_OF("GET", "/sse") "\r\n");
    UNTIL(n_kept == 2);
    orch_watch_set(slow.watch, 0);
    int rc = 0;
    size_t sent = 0;
    for (; sent < 100u << 20; sent += sizeof data) {
        rc = event(kept[0], NULL, NULL, (struct orch_slice){ data, sizeof data });
        if (rc)
            break;
        assert_int_equal(event(kept[1], NULL, NULL, (struct orch_slice){ data, sizeof data }), 0);
        UNTIL(fast.in.n >= sent);
        assert_true(stats().buffered_bytes < 600 << 10);
    }
    assert_int_equal(rc, -ENOBUFS);
    assert_int_equal(n_gone, 0); /* not from inside */
    assert_int_equal(event(kept[0], NULL, NULL, ORCH_SLICE("x")), -EPIPE);
    UNTIL(n_gone == 1);
    assert_int_equal(last_gone, ORCH_HTTP_GONE_SLOW);
    assert_int_equal(stats().slow, 1);
    assert_int_equal(stats().streams, 1);
    /* One event that is larger than the bound is no fault of the client. */
    static char large[1 << 20];
    memset(large, 'l', sizeof large);
    forget(&fast);
    assert_int_equal(event(kept[1], NULL, NULL, (struct orch_slice){ large, sizeof large }), 0);
    UNTIL(fast.in.n > sizeof large);
    raw_close(&slow);
    raw_close(&fast);
    UNTIL(n_gone == 2);
}

static void test_slow_reader(void **state)
{
    (void)state;
    struct raw k, other;
    serve((struct orch_http_limits){ .send_ms = 300 });
    raw_open(&k);
    raw_open(&other);
    orch_watch_set(k.watch, 0);
    say(&k, HEAD_OF("GET", "/big?20000000") "\r\n" HEAD_OF("GET", "/big?20000000") "\r\n");
    UNTIL(n_requests >= 1);
    for (int i = 0; i < 20; i++) {
        forget(&other);
        say(&other, GET);
        UNTIL(has(&other, "hello"));
    }
    assert_int_equal(n_requests, 21); /* the second large one waits until the first was read */
    UNTIL(stats().connections == 1);
    assert_int_equal(stats().slow, 1);
    UNTIL(stats().buffered_bytes < 10000);
    raw_close(&k);
    raw_close(&other);
}

/* A client that sends without end while its request is in hand loses the connection. */
static void test_flood(void **state)
{
    (void)state;
    static char junk[60000];
    memset(junk, 'j', sizeof junk);
    serve((struct orch_http_limits){ 0 });
    for (size_t i = 0; i < 2; i++) {
        struct raw k, other;
        raw_open(&k);
        raw_open(&other);
        say(&k, i ? HEAD_OF("GET", "/sse") "\r\n" : HEAD_OF("GET", "/later") "\r\n");
        UNTIL(n_kept == i + 1);
        raw_send(&k, junk, sizeof junk);
        UNTIL(stats().buffered_bytes > sizeof junk);
        say(&other, GET);
        UNTIL(has(&other, "hello"));
        assert_int_equal(n_gone, i);
        fcntl(k.fd, F_SETFL, O_NONBLOCK);
        while (n_gone == i) {
            ssize_t w = send(k.fd, junk, sizeof junk, MSG_NOSIGNAL);
            assert_true(w > 0 || errno == EAGAIN || errno == EPIPE || errno == ECONNRESET);
            orch_loop_step(loop, 0);
            assert_true(stats().buffered_bytes < 400 << 10);
        }
        raw_close(&k);
        raw_close(&other);
    }
}

/* ---- many connections */

static void test_connection_limits(void **state)
{
    (void)state;
    struct raw k[4];
    serve((struct orch_http_limits){ .connections = 3 });
    for (int i = 0; i < 4; i++)
        raw_open(&k[i]);
    UNTIL(k[3].eof);
    assert_true(has(&k[3], "HTTP/1.1 503 "));
    assert_int_equal(stats().refused, 1);
    raw_close(&k[3]);
    raw_close(&k[0]);
    UNTIL(stats().connections == 2);
    raw_open(&k[0]);
    say(&k[0], GET);
    UNTIL(has(&k[0], "hello"));
    for (int i = 0; i < 3; i++)
        raw_close(&k[i]);
    orch_http_server_free(server);
    serve((struct orch_http_limits){ .peer_connections = 2 });
    for (int i = 0; i < 3; i++)
        raw_open(&k[i]);
    UNTIL(k[2].eof);
    assert_true(has(&k[2], "HTTP/1.1 503 "));
    for (int i = 0; i < 3; i++)
        raw_close(&k[i]);
}

static void test_thousand(void **state)
{
    (void)state;
    enum { N = 1000 };
    struct rlimit lim;
    getrlimit(RLIMIT_NOFILE, &lim);
    lim.rlim_cur = lim.rlim_max < 4096 ? lim.rlim_max : 4096;
    setrlimit(RLIMIT_NOFILE, &lim);
    cleanup_free struct raw *k = orch_xcalloc(N, sizeof *k);
    serve((struct orch_http_limits){ 0 });
    for (size_t i = 0; i < N; i++) {
        raw_open(&k[i]);
        say(&k[i], HEAD_OF("GET", "/sse") "\r\n");
        if (i % 100 == 99)
            UNTIL(n_kept == i + 1);
    }
    assert_int_equal(stats().streams, N);
    UNTIL(stats().buffered_bytes <= (1024 + 64) * N); /* what the server holds for idle streams */
    for (size_t i = 0; i < N; i++)
        assert_int_equal(event(kept[i], NULL, NULL, ORCH_SLICE("tick")), 0);
    for (size_t i = 0; i < N; i++)
        UNTIL(has(&k[i], "data: tick\n\n"));
    for (size_t i = 0; i < N; i++)
        raw_close(&k[i]);
    UNTIL(n_gone == N);
    UNTIL(stats().connections == 0);
    assert_int_equal(stats().buffered_bytes, 0);
}

static void test_no_descriptors(void **state)
{
    (void)state;
    struct rlimit lim, low;
    struct raw k;
    serve((struct orch_http_limits){ 0 });
    raw_open(&k); /* accepted by the kernel, not yet by the server */
    cleanup_close int probe = dup(k.fd);
    getrlimit(RLIMIT_NOFILE, &lim);
    low = lim;
    low.rlim_cur = (rlim_t)probe + 1;
    setrlimit(RLIMIT_NOFILE, &low);
    say(&k, GET);
    for (int i = 0; i < 20; i++)
        orch_loop_step(loop, 2); /* does not spin: the listener rests */
    assert_int_equal(n_requests, 0);
    setrlimit(RLIMIT_NOFILE, &lim);
    UNTIL(has(&k, "hello"));
    raw_close(&k);
}

/* ---- listening */

static void refused(const char *listen, int code, const char *part)
{
    struct orch_http_server_opts o = { .listen = listen, .on_request = handle };
    struct orch_http_server *s = orch_http_server_new(loop, &o, &err);
    assert_null(s);
    if (err.code != code || !strstr(err.msg, part))
        fail_msg("%s: %d %s", listen, err.code, err.msg);
}

static void test_listen(void **state)
{
    (void)state;
    static const char *const bad[] = { "",
                                       "127.0.0.1",
                                       "127.0.0.1:",
                                       ":80",
                                       "127.0.0.1:65536",
                                       "127.0.0.1:8x",
                                       "[::1:80",
                                       "::1:80",
                                       "example.com:80",
                                       "[127.0.0.1]:80" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++)
        refused(bad[i], EINVAL, "give ADDRESS:PORT");
    serve_at("localhost:0", (struct orch_http_limits){ 0 });
    assert_true(strncmp(orch_http_server_address(server), "127.0.0.1:", 10) == 0);
    refused(orch_http_server_address(server), EADDRINUSE, "another program");
}

static void test_unix(void **state)
{
    (void)state;
    struct raw k;
    struct stat st;
    char where[128], path[128];
    snprintf(where, sizeof where, "unix:%s/sub/http.sock", dir);
    snprintf(path, sizeof path, "%s/sub/http.sock", dir);
    serve_at(where, (struct orch_http_limits){ 0 });
    assert_string_equal(orch_http_server_address(server), where);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    raw_open(&k);
    say(&k, GET);
    UNTIL(has(&k, "hello"));
    assert_true(last_peer.local && last_peer.uid == geteuid() && last_peer.pid == getpid());
    raw_close(&k);
    refused(where, EADDRINUSE, "another process does");
    orch_http_server_free(server);
    server = NULL;
    assert_int_equal(stat(path, &st), -1);

    /* What a killed process left is replaced, other files are not. */
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    snprintf(a.sun_path, sizeof a.sun_path, "%.100s", path);
    int left = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(left, (struct sockaddr *)&a, sizeof a), 0);
    close(left);
    serve_at(where, (struct orch_http_limits){ 0 });
    /* and another's socket of the same name survives this one's end */
    assert_int_equal(unlink(path), 0);
    left = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(left, (struct sockaddr *)&a, sizeof a), 0);
    orch_http_server_free(server);
    server = NULL;
    assert_int_equal(stat(path, &st), 0);
    close(left);
    unlink(path);
    close(open(path, O_CREAT | O_WRONLY, 0600));
    refused(where, EADDRINUSE, "a file of this name");
    unlink(path);
    snprintf(path, sizeof path, "%s/sub", dir);
    chmod(path, 0750);
    refused(where, EPERM, "chmod 700");
}

/* As root only: nobody else can become another user. */
static void test_unix_other_user(void **state)
{
    (void)state;
    if (geteuid() != 0)
        return;
    char where[128];
    snprintf(where, sizeof where, "unix:%s/sub/http.sock", dir);
    serve_at(where, (struct orch_http_limits){ 0 });
    char path[128];
    snprintf(path, sizeof path, "%s/sub", dir);
    chmod(dir, 0755); /* even when someone opened the way */
    chmod(path, 0755);
    chmod(where + 5, 0666);
    pid_t child = fork();
    if (child == 0) {
        char c;
        if (setgid(1000) < 0 || setuid(1000) < 0)
            _exit(9);
        int fd = connect_to(where);
        if (fd < 0)
            _exit(8);
        ssize_t w = send(fd, GET, strlen(GET), MSG_NOSIGNAL); /* may already be closed */
        _exit(w > -2 && recv(fd, &c, 1, 0) <= 0 ? 0 : 7);
    }
    int status = -1;
    UNTIL(waitpid(child, &status, WNOHANG) == child);
    assert_int_equal(status, 0);
    assert_int_equal(n_requests, 0);
    assert_int_equal(stats().refused, 1);
}

static void test_drain_and_free(void **state)
{
    (void)state;
    struct raw idle, busy;
    serve((struct orch_http_limits){ 0 });
    raw_open(&idle);
    raw_open(&busy);
    say(&idle, GET);
    say(&busy, HEAD_OF("GET", "/later") "\r\n");
    UNTIL(n_kept == 1 && has(&idle, "hello"));
    orch_http_server_drain(server);
    UNTIL(idle.eof);
    orch_http_reply_send(kept[0], 200, NULL, 0, ORCH_SLICE("last"));
    kept[0] = NULL;
    UNTIL(busy.eof);
    assert_true(has(&busy, "Connection: close\r\n") && has(&busy, "last"));
    raw_close(&idle);
    raw_close(&busy);
    orch_http_server_free(server);

    serve((struct orch_http_limits){ 0 });
    raw_open(&idle);
    raw_open(&busy);
    say(&idle, HEAD_OF("GET", "/later") "\r\n");
    say(&busy, HEAD_OF("GET", "/sse") "\r\n");
    UNTIL(n_kept == 3);
    assert_int_equal(event(kept[2], NULL, NULL, ORCH_SLICE("not written yet")), 0);
    orch_http_server_free(server);
    server = NULL;
    orch_loop_step(loop, 0);
    assert_int_equal(n_gone, 2);
    assert_int_equal(last_gone, ORCH_HTTP_GONE_SERVER);
    UNTIL(idle.eof && busy.eof);
    raw_close(&idle);
    raw_close(&busy);
}

/* ---- who may ask */

static bool parse(const char *text, struct orch_http_request *q)
{
    struct orch_http_fault f;
    size_t scan = 0;
    ssize_t n = orch_http_head_end(text, strlen(text), &scan, &f);
    struct orch_http_head_limits lim = { 100, 1000 };
    return n > 0 && orch_http_parse_head(text, (size_t)n, &lim, q, &f) == 0;
}

static void test_names(void **state)
{
    (void)state;
    static const char *const allow[] = {
        "localhost", "127.0.0.1", "[::1]", "agent.example:8443", "https://app.example.com", NULL
    };
    static const struct {
        const char *host, *origin;
        bool good;
    } cases[] = {
        { "localhost", NULL, true },
        { "LOCALHOST:1234", NULL, true },
        { "127.0.0.1:8700", NULL, true },
        { "[::1]:8700", NULL, true },
        { "agent.example:8443", NULL, true },
        { "agent.example", NULL, false },
        { "agent.example:443", NULL, false },
        { "evil.example", NULL, false },
        { "localhost.evil.example", NULL, false },
        { "127.0.0.1.evil.example", NULL, false },
        { "localhost.", NULL, false },
        { "app.example.com", NULL, false },
        { "localhost", "http://localhost:3000", true },
        { "localhost", "https://127.0.0.1", true },
        { "localhost", "http://[::1]:80", true },
        { "localhost", "https://app.example.com", true },
        { "localhost", "https://app.example.com:444", false },
        { "localhost", "http://app.example.com", false },
        { "localhost", "http://evil.example", false },
        { "localhost", "null", false },
        { "localhost", "", false },
        { "localhost", "localhost", false },
        { "localhost", "file://localhost", false },
        { "localhost", "http://localhost@evil.example", false },
        { "localhost", "http://localhost:80/", false },
        { "localhost", "http://localhost, http://evil.example", false },
        { "evil.example", "http://localhost", false },
        { "localhost", "http://localhost\r\nOrigin: http://evil.example", false }, /* two */
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        struct orch_http_request q;
        cleanup_free char *text = orch_xasprintf("GET / HTTP/1.1\r\nHost: %s\r\n%s%s%s\r\n",
                                                 cases[i].host, cases[i].origin ? "Origin: " : "",
                                                 cases[i].origin ? cases[i].origin : "",
                                                 cases[i].origin ? "\r\n" : "");
        assert_true(parse(text, &q));
        if ((orch_http_name_refused(&q, allow) == NULL) != cases[i].good)
            fail_msg("case %zu: %s %s", i, cases[i].host, cases[i].origin);
    }
}

static void test_bearer(void **state)
{
    (void)state;
    uint8_t digest[32];
    orch_sha256("s3cret", 6, digest);
    static const struct {
        const char *lines;
        bool good;
    } cases[] = {
        { "Authorization: Bearer s3cret\r\n", true },
        { "authorization: bearer  s3cret \r\n", true },
        { "", false },
        { "Authorization: Bearer s3cre\r\n", false },
        { "Authorization: Bearer s3crets\r\n", false },
        { "Authorization: Bearer S3cret\r\n", false },
        { "Authorization: Bearer\r\n", false },
        { "Authorization: Basic s3cret\r\n", false },
        { "Authorization: s3cret\r\n", false },
        { "Authorization: Bearer s3cret\r\nAuthorization: Bearer s3cret\r\n", false },
        { "Authorization: Bearer s3cret, Bearer x\r\n", false },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        struct orch_http_request q;
        cleanup_free char *text = orch_xasprintf("GET / HTTP/1.1\r\nHost: h\r\n%s\r\n",
                                                 cases[i].lines);
        assert_true(parse(text, &q));
        assert_int_equal(orch_http_bearer_ok(&q, digest), cases[i].good);
    }
}

/* ---- reading event streams */

static struct orch_buf heard; /* "id|event|data;" */

static int note_event(void *ud, const struct orch_sse_event *e)
{
    orch_buf_printf(&heard, "%.*s|%.*s|%.*s;", (int)e->id.n, e->id.p ? e->id.p : "",
                    (int)e->event.n, e->event.p ? e->event.p : "", (int)e->data.n,
                    e->data.p ? e->data.p : "");
    return ud ? 7 : 0;
}

static void test_sse_reader(void **state)
{
    (void)state;
    static const struct {
        struct orch_slice bytes;
        const char *events;
        int64_t retry_ms;
    } cases[] = {
        { ORCH_SLICE("data: a\n\n"), "||a;", 0 },
        { ORCH_SLICE("\xef\xbb\xbf"
                     "data:a\r\rdata:b\r\n\r\ndata:c\n"),
          "||a;||b;", 0 },
        { ORCH_SLICE("id: 1\nevent: x\ndata: a\ndata:\ndata:  b\n\ndata: c\n\n"),
          "1|x|a\n\n b;1||c;", 0 },
        { ORCH_SLICE("id: 1\ndata: \n\n"), "1||;", 0 },
        { ORCH_SLICE("id: 1\n\nid: 2\nretry: 50\n\n:comment\nfield: x\ndata\n\n"), "2||;", 50 },
        { ORCH_SLICE("id: 1\nid: a\0b\nretry: 5x\nretry: -1\ndata: a\n\nid\ndata: b\n\n"),
          "1||a;||b;", 0 },
        { ORCH_SLICE("event: x\n\ndata: a\n\n"), "||a;", 0 },
        { ORCH_SLICE("data: never ended"), "", 0 },
        { ORCH_SLICE(" data: x\nDATA: y\n\n\n\r\n\r"), "", 0 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++)
        for (int split = 0; split < 2; split++) {
            struct orch_sse_reader r = { 0 };
            heard.n = 0;
            orch_buf_str(&heard, "");
            for (size_t b = 0; split && b < cases[i].bytes.n; b++)
                assert_int_equal(orch_sse_feed(&r, (struct orch_slice){ cases[i].bytes.p + b, 1 },
                                               note_event, NULL),
                                 0);
            if (!split)
                assert_int_equal(orch_sse_feed(&r, cases[i].bytes, note_event, NULL), 0);
            assert_string_equal(heard.p, cases[i].events);
            assert_int_equal(r.retry_ms, cases[i].retry_ms);
            orch_sse_reader_fini(&r);
        }
    struct orch_sse_reader r = { .max_line_bytes = 8, .max_event_bytes = 10 };
    assert_int_equal(orch_sse_feed(&r, ORCH_SLICE("data: 12345"), note_event, NULL), -EMSGSIZE);
    orch_sse_reader_fini(&r);
    r = (struct orch_sse_reader){ .max_line_bytes = 100, .max_event_bytes = 10 };
    assert_int_equal(orch_sse_feed(&r, ORCH_SLICE("data: 1234\ndata: 123456\n"), note_event, NULL),
                     -EMSGSIZE);
    orch_sse_reader_fini(&r);
    r = (struct orch_sse_reader){ 0 };
    heard.n = 0;
    assert_int_equal(orch_sse_feed(&r, ORCH_SLICE("data: a\n\ndata: b\n\n"), note_event, &r), 7);
    assert_string_equal(heard.p, "||a;");
    orch_sse_reader_fini(&r);
    orch_buf_free(&heard);
}

/* ---- the client */

static struct orch_http_client *client;

struct result {
    struct orch_http_call *call;
    int status, heads, dones;
    struct orch_buf body, headers;
    char *location;
    enum orch_class cls; /* 0: success */
    char msg[512];
    bool pause_on_data, cancel_on_head, cancel_on_data, cancel_on_done;
    struct result *cancel_other; /* when done */
};

static void got_head(void *ud, const struct orch_http_response *r)
{
    struct result *t = ud;
    t->heads++;
    t->status = r->status;
    t->location = orch_xstrdup(r->location);
    for (size_t i = 0; i < r->n_headers; i++)
        orch_buf_printf(&t->headers, "%.*s=%.*s;", (int)r->headers[i].name.n, r->headers[i].name.p,
                        (int)r->headers[i].value.n, r->headers[i].value.p);
    assert_int_equal(t->body.n, 0);
    if (t->cancel_on_head)
        orch_http_call_cancel(t->call);
}

static void got_data(void *ud, struct orch_slice data)
{
    struct result *t = ud;
    assert_int_equal(t->heads, 1);
    orch_buf_slice(&t->body, data);
    if (t->pause_on_data)
        orch_http_call_pause(t->call, true);
    if (t->cancel_on_data)
        orch_http_call_cancel(t->call);
}

static void got_all(void *ud, const struct orch_http_response *r, const struct orch_err *e)
{
    struct result *t = ud;
    t->dones++;
    t->status = r->status;
    if (r->body.n)
        orch_buf_slice(&t->body, r->body);
    t->cls = e ? e->cls : 0;
    snprintf(t->msg, sizeof t->msg, "%.500s", e ? e->msg : "");
    if (t->cancel_on_done)
        orch_http_call_cancel(t->call);
    if (t->cancel_other)
        orch_http_call_cancel(t->cancel_other->call);
    t->call = NULL;
}

static void result_free(struct result *t)
{
    orch_buf_free(&t->body);
    orch_buf_free(&t->headers);
    free(t->location);
    *t = (struct result){ 0 };
}

static void start(struct result *t, struct orch_http_call_opts o, bool stream)
{
    *t = (struct result){ .pause_on_data = t->pause_on_data,
                          .cancel_on_head = t->cancel_on_head,
                          .cancel_on_data = t->cancel_on_data,
                          .cancel_on_done = t->cancel_on_done };
    o.on_head = got_head;
    o.on_data = stream ? got_data : NULL;
    o.on_done = got_all;
    o.ud = t;
    t->call = orch_http_call_start(client, &o, &err);
    if (!t->call)
        fail_msg("%s", err.msg);
}

static char *url_of(const char *path)
{
    static char url[256];
    snprintf(url, sizeof url, "http://%s%s", orch_http_server_address(server), path);
    return url;
}

static int client_setup(void **state)
{
    if (setup(state) < 0)
        return -1;
    setenv("http_proxy", "http://127.0.0.1:1", 1); /* must not matter */
    setenv("all_proxy", "http://127.0.0.1:1", 1);
    client = orch_http_client_new(loop, &err);
    return client ? 0 : -1;
}

static int client_teardown(void **state)
{
    orch_http_client_free(client);
    return teardown(state);
}

static void test_client(void **state)
{
    (void)state;
    struct result t = { 0 };
    serve((struct orch_http_limits){ 0 });
    struct orch_http_header h[] = { { ORCH_SLICE("X-Echo"), ORCH_SLICE("v; w") },
                                    { ORCH_SLICE("X-Empty"), ORCH_SLICE("") } };
    start(&t, (struct orch_http_call_opts){ .url = url_of("/?q"), .headers = h, .n_headers = 2 },
          false);
    assert_int_equal(t.heads + t.dones, 0);
    UNTIL(t.dones);
    assert_true(t.cls == 0 && t.status == 200 && t.heads == 1);
    assert_string_equal(t.body.p, "hello");
    assert_non_null(strstr(t.headers.p, "Content-Type=text/plain;X-Echo=v; w;"));
    result_free(&t);
    static const struct {
        const char *method, *body, *seen;
    } cases[] = {
        { NULL, "b", "POST /? b;" },       { "POST", "", "POST /? ;" },
        { "PUT", "b", "PUT /? b;" },       { "DELETE", "", "DELETE /? ;" },
        { "DELETE", "b", "DELETE /? b;" }, { "GET", "", "GET /? ;" },
        { "OPTIONS", "", "OPTIONS /? ;" }, { "HEAD", "", "HEAD /? ;" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        seen.n = 0;
        start(&t,
              (struct orch_http_call_opts){ .url = url_of("/"),
                                            .method = cases[i].method,
                                            .body = orch_slice_str(cases[i].body) },
              i & 1);
        UNTIL(t.dones);
        assert_int_equal(t.cls, 0);
        assert_string_equal(seen.p, cases[i].seen);
        if (i == ORCH_ARRAY_LEN(cases) - 1)
            assert_int_equal(t.body.n, 0);
        result_free(&t);
    }
    assert_int_equal(stats().accepted, 1); /* one connection, kept */

    static char large[3 << 20];
    memset(large, 'x', sizeof large);
    start(&t, (struct orch_http_call_opts){ .url = url_of("/"), .body = { large, sizeof large } },
          false);
    UNTIL(t.dones);
    assert_int_equal(t.body.n, sizeof large);
    result_free(&t);
}

static void test_client_unix(void **state)
{
    (void)state;
    struct result t = { 0 };
    char where[128];
    snprintf(where, sizeof where, "unix:%s/sub/http.sock", dir);
    serve_at(where, (struct orch_http_limits){ 0 });
    start(&t, (struct orch_http_call_opts){ .url = "http://orch/there", .unix_path = where + 5 },
          false);
    UNTIL(t.dones);
    assert_int_equal(t.cls, 0);
    assert_string_equal(seen.p, "GET /there? ;");
    result_free(&t);
}

static void test_client_stream(void **state)
{
    (void)state;
    struct result t = { 0 };
    serve((struct orch_http_limits){ 0 });
    start(&t, (struct orch_http_call_opts){ .url = url_of("/sse"), .total_ms = -1 }, true);
    UNTIL(n_kept == 1 && t.heads);
    assert_int_equal(t.dones, 0);
    for (int i = 1; i <= 3; i++) {
        assert_int_equal(event(kept[0], i == 1 ? "one" : NULL, NULL, ORCH_SLICE("x")), 0);
        UNTIL(t.body.n == (size_t)i * 9 + 8);
    }
    orch_http_sse_end(kept[0]);
    kept[0] = NULL;
    UNTIL(t.dones);
    assert_int_equal(t.cls, 0);
    assert_string_equal(t.body.p, "id: one\ndata: x\n\ndata: x\n\ndata: x\n\n");
    result_free(&t);
}

/* While paused the transfer stops within its bound, and loses nothing afterwards. */
static void test_client_pause(void **state)
{
    (void)state;
    struct result t = { .pause_on_data = true };
    serve((struct orch_http_limits){ 0 });
    start(&t,
          (struct orch_http_call_opts){
              .url = url_of("/big?20000000"), .max_body_bytes = 1 << 30, .idle_ms = 800 },
          true);
    UNTIL(t.body.n);
    assert_true(t.body.n <= 64 << 10);
    size_t before = t.body.n;
    int64_t until = orch_now_us() + 1200 * 1000;
    while (orch_now_us() < until) /* longer than the idle time */
        orch_loop_step(loop, 20);
    assert_int_equal(t.body.n, before);
    assert_int_equal(t.dones, 0);
    assert_true(stats().buffered_bytes > 1 << 20); /* the rest waits there */
    for (size_t i = 0; i < 5; i++) {
        before = t.body.n;
        orch_http_call_pause(t.call, false);
        UNTIL(t.body.n > before);
        assert_true(t.body.n <= before + (64 << 10));
    }
    t.pause_on_data = false;
    orch_http_call_pause(t.call, false);
    UNTIL(t.dones);
    assert_int_equal(t.cls, 0);
    assert_int_equal(t.body.n, 20000000);
    result_free(&t);
}

static void test_client_cancel(void **state)
{
    (void)state;
    struct result t[5] = { { 0 },
                           { .cancel_on_head = true },
                           { .cancel_on_data = true },
                           { .cancel_on_done = true },
                           { 0 } };
    serve((struct orch_http_limits){ 0 });
    for (size_t i = 0; i < 5; i++)
        start(&t[i], (struct orch_http_call_opts){ .url = url_of("/big?300000") }, i != 4);
    orch_http_call_cancel(t[0].call);
    UNTIL(t[1].heads && t[2].body.n && t[3].dones && t[4].dones);
    for (int i = 0; i < 20; i++)
        orch_loop_step(loop, 2);
    assert_true(!t[0].heads && !t[0].dones && !t[1].body.n && !t[1].dones && !t[2].dones &&
                t[3].dones == 1);
    assert_int_equal(t[4].body.n, 300000);
    for (size_t i = 0; i < 5; i++)
        result_free(&t[i]);
    /* In hand at the server: it sees the client go. One whose name is being resolved goes too. */
    start(&t[0], (struct orch_http_call_opts){ .url = url_of("/later") }, false);
    UNTIL(n_kept == 1);
    orch_http_call_cancel(t[0].call);
    UNTIL(n_gone == 1);
    start(&t[0], (struct orch_http_call_opts){ .url = "http://name.invalid/" }, false);
    orch_loop_step(loop, 0);
    orch_http_call_cancel(t[0].call);
    /* Two have their answer, and the first that tells it cancels the other. */
    for (size_t i = 0; i < 2; i++) {
        start(&t[i], (struct orch_http_call_opts){ .url = url_of("/") }, false);
        t[i].cancel_other = &t[1 - i];
        orch_http_call_pause(t[i].call, true);
    }
    size_t before = n_requests;
    UNTIL(n_requests == before + 2);
    for (int i = 0; i < 20; i++)
        orch_loop_step(loop, 2);
    orch_http_call_pause(t[0].call, false);
    orch_http_call_pause(t[1].call, false);
    UNTIL(t[0].dones);
    orch_loop_step(loop, 2);
    assert_int_equal(t[1].dones, 0);
    result_free(&t[0]);
    result_free(&t[1]);
    /* Under way when the client is freed. */
    for (size_t i = 0; i < 3; i++)
        start(&t[i], (struct orch_http_call_opts){ .url = url_of("/later") }, false);
    UNTIL(n_kept == 4);
}

/* ---- hostile servers: send these bytes to who connects, then stall, close or go on for ever */

enum then { CLOSE, STALL, ENDLESS };

struct hostile {
    int fd, peer;
    struct orch_watch *accepting, *writing;
    struct orch_slice answer;
    enum then then;
    char url[64];
};

static void hostile_write(void *ud, int events)
{
    (void)events;
    struct hostile *s = ud;
    char request[4096];
    if (recv(s->peer, request, sizeof request, MSG_DONTWAIT) == 0)
        orch_watch_set(s->writing, 0);
    if (send(s->peer, s->answer.p, s->answer.n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN)
        orch_watch_set(s->writing, 0);
    if (s->then == ENDLESS) {
        s->answer = ORCH_SLICE("X-Header: 0123456789012345678901234567890123456789\r\n");
        return;
    }
    orch_watch_set(s->writing, 0);
    if (s->then == CLOSE)
        shutdown(s->peer, SHUT_WR);
}

static void hostile_accept(void *ud, int events)
{
    (void)events;
    struct hostile *s = ud;
    int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC);
    if (s->peer >= 0) { /* curl tries again once on a connection that it kept */
        close(fd);
        return;
    }
    s->peer = fd;
    s->writing = orch_watch_new(loop, fd, ORCH_WRITE, hostile_write, s);
}

static void hostile_open(struct hostile *s, struct orch_slice answer, enum then then)
{
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof a;
    *s = (struct hostile){ .fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0),
                           .peer = -1,
                           .answer = answer,
                           .then = then };
    assert_int_equal(bind(s->fd, (struct sockaddr *)&a, len) | listen(s->fd, 1) |
                         getsockname(s->fd, (struct sockaddr *)&a, &len),
                     0);
    snprintf(s->url, sizeof s->url, "http://127.0.0.1:%u/secret?token=abc", ntohs(a.sin_port));
    s->accepting = orch_watch_new(loop, s->fd, ORCH_READ, hostile_accept, s);
}

static void hostile_close(struct hostile *s)
{
    orch_watch_free(s->accepting);
    orch_watch_free(s->writing);
    close(s->fd);
    if (s->peer >= 0)
        close(s->peer);
}

#define OK "HTTP/1.1 200 OK\r\n"

static const struct {
    struct orch_slice answer;
    enum then then;
    enum orch_class cls;
    const char *body; /* when cls is 0 */
} hostiles[] = {
    { ORCH_SLICE(OK "Content-Length: 2\r\n\r\nok"), STALL, 0, "ok" },
    { ORCH_SLICE(OK "\r\nuntil the end"), CLOSE, 0, "until the end" },
    { ORCH_SLICE("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n" OK
                 "Content-Length: 2\r\n\r\nok"),
      STALL, 0, "ok" },
    { ORCH_SLICE(OK "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nTrailer: x\r\n\r\n"), STALL,
      0, "ok" },
    { ORCH_SLICE(""), CLOSE, ORCH_CLASS_CLOSED, NULL },
    { ORCH_SLICE(""), STALL, ORCH_CLASS_TIMEOUT, NULL },
    { ORCH_SLICE("garbage\r\n\r\n"), CLOSE, ORCH_CLASS_UPSTREAM, NULL },
    { ORCH_SLICE("HTTP/1.1 2"), CLOSE, ORCH_CLASS_CLOSED, NULL },
    { ORCH_SLICE(OK "A: b\r\n"), STALL, ORCH_CLASS_TIMEOUT, NULL },
    { ORCH_SLICE(OK "Content-Length: 5\r\n\r\nok"), CLOSE, ORCH_CLASS_CLOSED, NULL },
    { ORCH_SLICE(OK "Content-Length: 5\r\n\r\nok"), STALL, ORCH_CLASS_TIMEOUT, NULL },
    { ORCH_SLICE(OK "Content-Length: -5\r\n\r\nok"), STALL, ORCH_CLASS_UPSTREAM, NULL },
    { ORCH_SLICE(OK "Content-Length: 99999\r\n\r\nok"), STALL, ORCH_CLASS_TIMEOUT, NULL },
    { ORCH_SLICE(OK "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"), CLOSE, ORCH_CLASS_CLOSED,
      NULL },
    { ORCH_SLICE(OK "Transfer-Encoding: chunked\r\n\r\nxyz\r\nok\r\n"), STALL, ORCH_CLASS_CLOSED,
      NULL },
    { ORCH_SLICE(OK "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\nok\r\n"), STALL,
      ORCH_CLASS_CLOSED, NULL },
    { ORCH_SLICE(OK "X-Nul: a\0b\r\nContent-Length: 2\r\n\r\nok"), STALL, ORCH_CLASS_UPSTREAM,
      NULL },
    { ORCH_SLICE(OK), ENDLESS, ORCH_CLASS_LIMIT, NULL },
    { ORCH_SLICE(OK "Transfer-Encoding: chunked\r\n\r\n100000\r\n"), ENDLESS, ORCH_CLASS_LIMIT,
      NULL },
    { ORCH_SLICE(
          "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 2\r\n\r\nok"),
      STALL, 0, "ok" },
};

static void test_client_hostile(void **state)
{
    (void)state;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(hostiles); i++)
        for (int stream = 0; stream < 2; stream++) {
            struct hostile s;
            struct result t = { 0 };
            hostile_open(&s, hostiles[i].answer, hostiles[i].then);
            start(&t,
                  (struct orch_http_call_opts){
                      .url = s.url,
                      .max_body_bytes = 20000,
                      .idle_ms = hostiles[i].cls == ORCH_CLASS_TIMEOUT ? 150 : 0 },
                  stream);
            UNTIL(t.dones);
            if (t.cls != hostiles[i].cls || (!t.cls && strcmp(t.body.p, hostiles[i].body) != 0))
                fail_msg("case %zu: class %d (%s), body %s", i, (int)t.cls, t.msg,
                         t.body.n ? t.body.p : "");
            assert_true(t.body.n <= 20000);
            assert_null(strstr(t.msg, "token")); /* the query may be a secret */
            assert_true(!t.cls || strncmp(t.msg, "GET http://127.0.0.1:", 21) == 0);
            result_free(&t);
            hostile_close(&s);
        }
}

static void test_client_time(void **state)
{
    (void)state;
    struct result t = { 0 };
    struct hostile s;
    serve((struct orch_http_limits){ .keep_alive_ms = 50 });
    /* The total time, though bytes come all the while. */
    start(&t,
          (struct orch_http_call_opts){ .url = url_of("/sse"), .total_ms = 2000, .idle_ms = 1000 },
          true);
    int64_t started = orch_now_us();
    UNTIL(t.dones);
    assert_int_equal(t.cls, ORCH_CLASS_TIMEOUT);
    assert_true(orch_now_us() - started >= 1990 * 1000 && t.body.n > 0);
    assert_non_null(strstr(t.msg, "not done in time"));
    result_free(&t);
    UNTIL(n_gone == 1);
    /* Connecting: the queue of this listener is full. */
    hostile_open(&s, ORCH_SLICE(""), STALL);
    orch_watch_set(s.accepting, 0);
    int fill[8];
    for (size_t i = 0; i < ORCH_ARRAY_LEN(fill); i++) {
        struct sockaddr_in a = { .sin_family = AF_INET,
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                 .sin_port = htons((uint16_t)atoi(s.url + 17)) };
        fill[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        assert_true(connect(fill[i], (struct sockaddr *)&a, sizeof a) < 0);
    }
    start(&t, (struct orch_http_call_opts){ .url = s.url, .connect_ms = 200 }, false);
    UNTIL(t.dones);
    assert_int_equal(t.cls, ORCH_CLASS_TIMEOUT);
    result_free(&t);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(fill); i++)
        close(fill[i]);
    hostile_close(&s);
    start(&t, (struct orch_http_call_opts){ .url = "http://127.0.0.1:1/" }, false);
    UNTIL(t.dones);
    assert_int_equal(t.cls, ORCH_CLASS_UPSTREAM);
    assert_non_null(strstr(t.msg, "GET http://127.0.0.1:1: "));
    result_free(&t);
}

static void test_client_redirects(void **state)
{
    (void)state;
    struct result t = { 0 };
    serve((struct orch_http_limits){ 0 });
    char path[300];
    snprintf(path, sizeof path, "/redirect?http://%s/redirect?/end",
             orch_http_server_address(server));
    /* off unless asked for */
    start(&t, (struct orch_http_call_opts){ .url = url_of(path) }, false);
    UNTIL(t.dones);
    assert_int_equal(t.status, 302);
    assert_string_equal(t.body.p, "elsewhere");
    result_free(&t);
    start(&t, (struct orch_http_call_opts){ .url = url_of(path), .max_redirects = 2 }, true);
    UNTIL(t.dones);
    assert_true(t.cls == 0 && t.status == 200 && t.heads == 1);
    assert_string_equal(t.body.p, "hello");
    result_free(&t);
    start(&t,
          (struct orch_http_call_opts){ .url = url_of("/redirect?/redirect"), .max_redirects = 5 },
          false);
    UNTIL(t.dones);
    /* "/redirect" without a query says an empty Location: no redirect */
    assert_int_equal(t.status, 302);
    result_free(&t);
    static const char *const bad[] = { "/redirect?file:///etc/passwd", "/redirect?ftp://127.0.0.1/",
                                       "/redirect?http://user:pw@127.0.0.1/" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++) {
        start(&t, (struct orch_http_call_opts){ .url = url_of(bad[i]), .max_redirects = 5 }, false);
        UNTIL(t.dones);
        assert_int_equal(t.cls, ORCH_CLASS_UPSTREAM);
        assert_int_equal(t.body.n, 0);
        result_free(&t);
    }
}

static void test_client_redirect_loop(void **state)
{
    (void)state;
    struct result t = { 0 };
    serve((struct orch_http_limits){ 0 });
    /* Each hop takes one "/redirect?" off; more of them than are allowed. */
    start(&t,
          (struct orch_http_call_opts){
              .url = url_of("/redirect?/redirect?/redirect?/redirect?/redirect?/end"),
              .max_redirects = 3 },
          false);
    UNTIL(t.dones);
    assert_int_equal(t.cls, ORCH_CLASS_LIMIT);
    assert_int_equal(n_requests, 4);
    result_free(&t);
}

static void test_client_pinned(void **state)
{
    (void)state;
    struct result t = { 0 };
    char url[128];
    serve((struct orch_http_limits){ 0 });
    snprintf(url, sizeof url, "http://pinned.invalid:%s/",
             strrchr(orch_http_server_address(server), ':') + 1);
    for (int i = 0; i < 2; i++) {
        start(&t,
              (struct orch_http_call_opts){ .url = url, .address = i ? "127.0.0.2" : "127.0.0.1" },
              false);
        UNTIL(t.dones);
        /* a kept connection to another address is not used */
        assert_int_equal(t.cls, i ? ORCH_CLASS_UPSTREAM : 0);
        result_free(&t);
    }
    assert_int_equal(n_requests, 1);
}

static int n_asked;

/* 127.0.0.1, once. */
static bool only_first(void *ud, const struct sockaddr *to, struct orch_err *why)
{
    (void)ud;
    if (!n_asked++ && to->sa_family == AF_INET &&
        ((const struct sockaddr_in *)(const void *)to)->sin_addr.s_addr == htonl(INADDR_LOOPBACK))
        return true;
    orch_err_setc(why, ORCH_CLASS_DENIED, EACCES, "not there");
    return false;
}

static void test_client_judged(void **state)
{
    (void)state;
    struct result t = { 0 };
    serve((struct orch_http_limits){ 0 });
    n_asked = 0;
    for (int i = 0; i < 2; i++) { /* the first one's connection is not kept */
        start(&t, (struct orch_http_call_opts){ .url = url_of("/"), .may_connect = only_first },
              false);
        UNTIL(t.dones);
        assert_int_equal(t.cls, i ? ORCH_CLASS_DENIED : 0);
        result_free(&t);
    }
    assert_int_equal(n_requests, 1);
    assert_int_equal(n_asked, 2);
    /* nor is an unjudged one's used */
    start(&t, (struct orch_http_call_opts){ .url = url_of("/") }, false);
    UNTIL(t.dones);
    result_free(&t);
    start(&t, (struct orch_http_call_opts){ .url = url_of("/"), .may_connect = only_first }, false);
    UNTIL(t.dones);
    assert_int_equal(t.cls, ORCH_CLASS_DENIED);
    result_free(&t);
    err = (struct orch_err){ 0 };
    assert_null(orch_http_call_start(client,
                                     &(struct orch_http_call_opts){ .url = "http://localhost/",
                                                                    .may_connect = only_first },
                                     &err));
    assert_int_equal(err.cls, ORCH_CLASS_DENIED);
    assert_int_equal(n_asked, 3);
}

static void test_client_location(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        { "/redirect?/end", "/end" },
        { "/redirect?//other.invalid/x", "http://other.invalid/x" },
        { "/redirect?https://a.invalid/%20", "https://a.invalid/%20" },
        { "/", NULL }
    };
    struct result t = { 0 };
    serve((struct orch_http_limits){ 0 });
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        start(&t, (struct orch_http_call_opts){ .url = url_of(cases[i][0]) }, false);
        UNTIL(t.dones);
        if (cases[i][1])
            assert_string_equal(t.location,
                                cases[i][1][0] == '/' ? url_of(cases[i][1]) : cases[i][1]);
        else
            assert_null(t.location);
        result_free(&t);
    }
}

static void test_client_options(void **state)
{
    (void)state;
    struct orch_http_header split = { ORCH_SLICE("A"), ORCH_SLICE("b\r\nC: d") },
                            name = { ORCH_SLICE("A B"), ORCH_SLICE("c") };
    const struct orch_http_call_opts bad[] = {
        { .url = "ftp://h/" },
        { .url = "file:///etc/passwd" },
        { .url = "" },
        { .url = NULL },
        { .url = "http://" },
        { .url = "http://user:pw@h/" },
        { .url = "http://h/", .method = "GE T" },
        { .url = "http://h/", .method = "" },
        { .url = "http://h/", .headers = &split, .n_headers = 1 },
        { .url = "http://h/", .headers = &name, .n_headers = 1 },
        { .url = "http://h/", .address = "localhost" },
        { .url = "http://h/", .address = "127.0.0.1", .max_redirects = 1 },
        { .url = "http://h/", .address = "127.0.0.1", .unix_path = "/x" },
        { .url = "http://127.0.0.1/", .may_connect = only_first, .max_redirects = 1 },
        { .url = "http://127.0.0.1/", .may_connect = only_first, .address = "127.0.0.1" },
        { .url = "http://127.0.0.1/", .may_connect = only_first, .unix_path = "/x" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++) {
        err = (struct orch_err){ 0 };
        assert_null(orch_http_call_start(client, &bad[i], &err));
        assert_int_equal(err.code, EINVAL);
        assert_null(strstr(err.msg, "pw"));
    }
    struct orch_http_call *last = NULL;
    for (size_t i = 0; i < 1024; i++) {
        last = orch_http_call_start(client,
                                    &(struct orch_http_call_opts){ .url = "http://127.0.0.1:1/",
                                                                   .on_done = got_all },
                                    &err);
        assert_non_null(last);
    }
    assert_null(orch_http_call_start(client,
                                     &(struct orch_http_call_opts){ .url = "http://127.0.0.1:1/" },
                                     &err));
    assert_int_equal(err.code, EAGAIN);
}

/* A certificate for tls.orch.test that signs itself, and its key. */
static void make_certificate(const char *path)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *x = X509_new();
    X509_NAME *subject = X509_get_subject_name(x);
    X509_EXTENSION *alt = X509V3_EXT_conf_nid(NULL, NULL, NID_subject_alt_name,
                                              "DNS:tls.orch.test,IP:127.0.0.1");
    FILE *f = fopen(path, "w");
    X509_set_version(x, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
    X509_gmtime_adj(X509_getm_notBefore(x), -3600);
    X509_gmtime_adj(X509_getm_notAfter(x), 3600);
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)"tls.orch.test",
                               -1, -1, 0);
    X509_set_issuer_name(x, subject);
    X509_set_pubkey(x, key);
    X509_add_ext(x, alt, -1);
    assert_true(X509_sign(x, key, EVP_sha256()) > 0);
    assert_true(PEM_write_PrivateKey(f, key, NULL, NULL, 0, NULL, NULL) && PEM_write_X509(f, x));
    fclose(f);
    X509_EXTENSION_free(alt);
    X509_free(x);
    EVP_PKEY_free(key);
}

static void test_client_tls(void **state)
{
    (void)state;
    static const char program[] =
        "import ssl,socket,sys\n"
        "c=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain(sys.argv[1])\n"
        "s=socket.create_server(('127.0.0.1',0)); print(s.getsockname()[1],flush=True)\n"
        "while True:\n"
        "  k,_=s.accept()\n"
        "  try:\n"
        "    t=c.wrap_socket(k,server_side=True); q=t.recv(4096)\n"
        "    t.sendall(b'HTTP/1.1 302 Found\\r\\nLocation: '+q.split()[1][2:] if b'?' in q else "
        "b'HTTP/1.1 200 OK')\n"
        "    t.sendall(b'\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok'); "
        "t.close()\n"
        "  except (ssl.SSLError, OSError): k.close()\n";
    char pem[96], url[64], wrong[64];
    int out[2];
    snprintf(pem, sizeof pem, "%s/tls.pem", dir);
    make_certificate(pem);
    assert_int_equal(pipe2(out, O_CLOEXEC), 0);
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(out[1], 1);
        execlp("python3", "python3", "-c", program, pem, (char *)NULL);
        _exit(127);
    }
    close(out[1]);
    char port[16] = "";
    for (size_t n = 0; !strchr(port, '\n') && n < sizeof port - 1; n++)
        assert_int_equal(read(out[0], port + n, 1), 1);
    close(out[0]);
    snprintf(url, sizeof url, "https://tls.orch.test:%d/", atoi(port));
    snprintf(wrong, sizeof wrong, "https://other.orch.test:%d/", atoi(port));
    struct result t = { 0 };
    const struct {
        const char *url, *ca;
        enum orch_class cls;
    } cases[] = { { url, NULL, ORCH_CLASS_UPSTREAM },
                  { wrong, pem, ORCH_CLASS_UPSTREAM },
                  { url, pem, 0 } };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        start(&t,
              (struct orch_http_call_opts){
                  .url = cases[i].url, .address = "127.0.0.1", .ca_file = cases[i].ca },
              false);
        UNTIL(t.dones);
        if (t.cls != cases[i].cls)
            fail_msg("case %zu: %s", i, t.msg);
        result_free(&t);
    }
    /* A redirect to https is followed, one that leaves it is not. */
    serve((struct orch_http_limits){ 0 });
    for (int down = 0; down < 2; down++) {
        char from[128];
        snprintf(from, sizeof from, "https://127.0.0.1:%d/?%s", atoi(port),
                 down ? url_of("/") : "/there");
        start(&t, (struct orch_http_call_opts){ .url = from, .ca_file = pem, .max_redirects = 1 },
              false);
        UNTIL(t.dones);
        if (t.cls != (down ? ORCH_CLASS_UPSTREAM : 0) || t.status != (down ? 0 : 200))
            fail_msg("%d: %d %s", down, t.status, t.msg);
        result_free(&t);
    }
    assert_int_equal(n_requests, 0);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

int main(void)
{
    orch_log_use(&(struct orch_log){ .least = ORCH_ERROR });
    static const struct CMUnitTest tests[] = {
#define S(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
        S(test_malformed),
        S(test_malformed_second),
        S(test_wellformed),
        S(test_answer),
        S(test_continue),
        S(test_limits),
        S(test_memory),
        S(test_pipelining),
        S(test_slow_request),
        S(test_half_closed),
        S(test_gone),
        S(test_sse),
        S(test_sse_slow),
        S(test_slow_reader),
        S(test_flood),
        S(test_connection_limits),
        S(test_thousand),
        S(test_no_descriptors),
        S(test_listen),
        S(test_unix),
        S(test_unix_other_user),
        S(test_drain_and_free),
        S(test_names),
        S(test_bearer),
        S(test_sse_reader),
#undef S
#define S(name) cmocka_unit_test_setup_teardown(name, client_setup, client_teardown)
        S(test_client),
        S(test_client_unix),
        S(test_client_stream),
        S(test_client_pause),
        S(test_client_cancel),
        S(test_client_hostile),
        S(test_client_time),
        S(test_client_redirects),
        S(test_client_redirect_loop),
        S(test_client_pinned),
        S(test_client_judged),
        S(test_client_location),
        S(test_client_options),
        S(test_client_tls),
    };
    odd_locale();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
