#include "client.h"

#include "../base/library.h"

#include <arpa/inet.h>
#include <curl/curl.h>
#include <errno.h>
#include <string.h>
#include <sys/queue.h>

enum {
    CALLS_MAX = 1024,
    BUFFER_BYTES = 64 * 1024, /* of a streamed body, before curl is paused */
    HEAD_BYTES = 64 * 1024,   /* of all heads of an answer, 100 Continue and such included */
    KEPT_CONNECTIONS = 16,
};

/* What is used of libcurl. */
#define FUNCTIONS(X) \
    X(global_init) \
    X(easy_init) \
    X(easy_setopt) \
    X(easy_cleanup) \
    X(easy_pause) \
    X(easy_strerror) \
    X(slist_append) \
    X(slist_free_all) \
    X(multi_init) \
    X(multi_setopt) \
    X(multi_cleanup) \
    X(multi_add_handle) \
    X(multi_remove_handle) \
    X(multi_socket_action) \
    X(multi_assign) \
    X(multi_info_read) \
    X(easy_getinfo) \
    X(url) \
    X(url_set) \
    X(url_get) \
    X(url_cleanup) \
    X(free)

static struct {
#define X(name) __typeof__(&curl_##name) name;
    FUNCTIONS(X)
#undef X
} cu;

struct orch_http_call {
    LIST_ENTRY(orch_http_call) link;
    TAILQ_ENTRY(orch_http_call) ready;
    struct orch_http_client *h;
    CURL *easy;
    struct curl_slist *headers, *connect_to;
    struct orch_timer *timer;
    char *location; /* of the answer's head, absolute */
    char *label;    /* "POST https://host:port", for messages: path and query may hold secrets */
    /* functions, times and bounds; its other pointers are the caller's, not used after the start */
    struct orch_http_call_opts o;
    int64_t last_ms, total_at;
    /* the answer */
    struct orch_buf head, body;
    struct orch_http_header *fields;
    size_t n_fields, head_bytes, body_bytes;
    int status;
    bool following; /* the head being read is a redirect's, which curl follows */
    bool head_whole, head_told;
    bool queued, delivering, cancelled, paused, curl_paused, running, done;
    struct orch_err err; /* err.cls 0: none */
    char curl_error[CURL_ERROR_SIZE];
};

struct orch_http_client {
    struct orch_loop *loop;
    CURLM *multi;
    struct orch_timer *timer;
    LIST_HEAD(, orch_http_call) calls;
    TAILQ_HEAD(, orch_http_call) ready;
    size_t n_calls;
    bool posted;
};

static int start_curl(void)
{
    return cu.global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK;
}

ORCH_LIBRARY(cu, FUNCTIONS, .what = "http", .file = "libcurl.so.4", .package = "libcurl4",
             .prefix = "curl_", .cls = ORCH_CLASS_FAILED, .start = start_curl);

/* ---- the one place that calls the caller's functions */

static void drain(void *ud);

static void drain_soon(struct orch_http_client *h)
{
    if (!h->posted)
        orch_loop_post(h->loop, drain, h);
    h->posted = true;
}

static void queue(struct orch_http_call *c)
{
    if (!c->queued)
        TAILQ_INSERT_TAIL(&c->h->ready, c, ready);
    c->queued = true;
    drain_soon(c->h);
}

static void stop(struct orch_http_call *c)
{
    if (c->running)
        cu.multi_remove_handle(c->h->multi, c->easy);
    c->running = false;
    orch_timer_cancel(c->timer);
}

static void call_free(struct orch_http_call *c)
{
    struct orch_http_client *h = c->h;
    stop(c);
    if (c->queued)
        TAILQ_REMOVE(&h->ready, c, ready);
    LIST_REMOVE(c, link);
    h->n_calls--;
    if (c->easy)
        cu.easy_cleanup(c->easy);
    cu.slist_free_all(c->headers);
    cu.slist_free_all(c->connect_to);
    orch_timer_free(c->timer);
    orch_buf_free(&c->head);
    orch_buf_free(&c->body);
    free(c->fields);
    free(c->location);
    free(c->label);
    free(c);
}

static void finish(struct orch_http_call *c)
{
    stop(c);
    c->done = true;
    queue(c);
}

static void fail(struct orch_http_call *c, enum orch_class cls, int code, const char *what)
{
    if (!c->err.cls)
        orch_err_setc(&c->err, cls, code, "%s: %s", c->label, what);
}

static void curl_failed(struct orch_http_call *c, CURLcode rc)
{
    const char *what = c->curl_error[0] ? c->curl_error : cu.easy_strerror(rc);
    switch (rc) {
    case CURLE_OPERATION_TIMEDOUT:
        fail(c, ORCH_CLASS_TIMEOUT, ETIMEDOUT, what);
        break;
    case CURLE_TOO_MANY_REDIRECTS:
        fail(c, ORCH_CLASS_LIMIT, ELOOP, what);
        break;
    case CURLE_PARTIAL_FILE:
    case CURLE_GOT_NOTHING:
    case CURLE_RECV_ERROR:
    case CURLE_SEND_ERROR:
        fail(c, ORCH_CLASS_CLOSED, ECONNRESET, what);
        break;
    case CURLE_OUT_OF_MEMORY: /* what libcurl says of a header line over its own limit */
        fail(c, ORCH_CLASS_LIMIT, EMSGSIZE,
             "a header of the answer is too long, or memory is short");
        break;
    case CURLE_COULDNT_CONNECT:
        fail(c, ORCH_CLASS_UPSTREAM, ECONNREFUSED, what);
        break;
    default:
        fail(c, ORCH_CLASS_UPSTREAM, EPROTO, what);
        break;
    }
}

static void resume_curl(struct orch_http_call *c)
{
    if (!c->curl_paused || !c->running)
        return;
    c->curl_paused = false;
    c->last_ms = orch_loop_now_ms(c->h->loop);
    CURLcode rc = cu.easy_pause(c->easy, CURLPAUSE_CONT); /* may call received() */
    if (rc != CURLE_OK) {
        curl_failed(c, rc);
        finish(c);
    }
}

static struct orch_http_response response(const struct orch_http_call *c)
{
    return (struct orch_http_response){ .status = c->head_whole ? c->status : 0,
                                        .headers = c->fields,
                                        .n_headers = c->head_whole ? c->n_fields : 0,
                                        .location = c->location };
}

/* What the call has to say; false when its function cancelled it. */
static bool deliver(struct orch_http_call *c)
{
    if (c->paused)
        return true;
    struct orch_http_response r = response(c);
    if (c->head_whole && !c->head_told) {
        c->head_told = true;
        if (c->o.on_head)
            c->o.on_head(c->o.ud, &r);
    }
    if (!c->cancelled && !c->paused && c->o.on_data && c->body.n) {
        cleanup_buf struct orch_buf data = c->body;
        c->body = (struct orch_buf){ 0 };
        c->o.on_data(c->o.ud, (struct orch_slice){ data.p, data.n });
    }
    if (!c->cancelled && !c->paused && !c->body.n)
        resume_curl(c);
    if (c->cancelled)
        return false;
    if (!c->done || c->paused)
        return true;
    if (c->o.on_data && c->body.n) { /* came while curl was resumed */
        queue(c);
        return true;
    }
    r.body = c->o.on_data ? (struct orch_slice){ "", 0 }
                          : (struct orch_slice){ c->body.n ? c->body.p : "", c->body.n };
    c->o.on_done(c->o.ud, &r, c->err.cls ? &c->err : NULL);
    return false;
}

static void drain(void *ud)
{
    struct orch_http_client *h = ud;
    struct orch_http_call *c;
    CURLMsg *m;
    int left;
    h->posted = false;
    while ((m = cu.multi_info_read(h->multi, &left))) {
        if (m->msg != CURLMSG_DONE)
            continue;
        CURLcode rc = m->data.result; /* m does not outlive the removal of its handle */
        void *private;
        cu.easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &private);
        c = private;
        if (rc != CURLE_OK)
            curl_failed(c, rc);
        finish(c);
    }
    size_t turn = h->n_calls; /* what becomes ready again meanwhile waits for the next turn */
    while (turn-- && (c = TAILQ_FIRST(&h->ready))) {
        TAILQ_REMOVE(&h->ready, c, ready);
        c->queued = false;
        c->delivering = true;
        bool alive = deliver(c);
        c->delivering = false;
        if (!alive)
            call_free(c);
    }
    if (!TAILQ_EMPTY(&h->ready))
        drain_soon(h);
}

/* ---- called by libcurl: these only store */

/* The head's lines to fields, which point into c->head; lines that are no header are left out. */
static void split_head(struct orch_http_call *c)
{
    c->fields = orch_xcalloc(ORCH_HTTP_HEADERS_MAX, sizeof *c->fields);
    for (size_t at = 0; at < c->head.n && c->n_fields < ORCH_HTTP_HEADERS_MAX;) {
        char *line = c->head.p + at, *lf = memchr(line, '\n', c->head.n - at);
        size_t n = lf ? (size_t)(lf - line) : c->head.n - at;
        at += n + 1;
        const char *colon = memchr(line, ':', n);
        struct orch_slice name = { line, colon ? (size_t)(colon - line) : 0 };
        if (!orch_http_token_ok(name))
            continue;
        struct orch_slice value = { colon + 1, n - name.n - 1 };
        while (value.n && (value.p[value.n - 1] == '\r' || value.p[value.n - 1] == ' ' ||
                           value.p[value.n - 1] == '\t'))
            value.n--;
        while (value.n && (*value.p == ' ' || *value.p == '\t')) {
            value.p++;
            value.n--;
        }
        if (orch_http_value_ok(value))
            c->fields[c->n_fields++] = (struct orch_http_header){ name, value };
    }
}

static bool redirects(int status)
{
    return status == 301 || status == 302 || status == 303 || status == 307 || status == 308;
}

/* The Location of the head against the URL that was asked for. */
static char *find_location(const struct orch_http_call *c)
{
    char *url = NULL, *found = NULL;
    if (!redirects(c->status))
        return NULL;
    for (size_t i = 0; !found && i < c->n_fields; i++) {
        if (!orch_http_name_eq(c->fields[i].name, "location") || !c->fields[i].value.n)
            continue;
        cleanup_free char *to = orch_xasprintf("%.*s", (int)c->fields[i].value.n,
                                               c->fields[i].value.p);
        CURLU *u = cu.url();
        if (u && cu.easy_getinfo(c->easy, CURLINFO_EFFECTIVE_URL, &url) == CURLE_OK &&
            cu.url_set(u, CURLUPART_URL, url, 0) == CURLUE_OK &&
            cu.url_set(u, CURLUPART_URL, to, 0) == CURLUE_OK &&
            cu.url_get(u, CURLUPART_URL, &url, 0) == CURLUE_OK) {
            found = orch_xstrdup(url);
            cu.free(url);
        }
        cu.url_cleanup(u);
    }
    return found;
}

static size_t header_line(char *p, size_t size, size_t n, void *ud)
{
    struct orch_http_call *c = ud;
    n *= size;
    c->last_ms = orch_loop_now_ms(c->h->loop);
    c->head_bytes += n;
    if (c->head_bytes > HEAD_BYTES) {
        fail(c, ORCH_CLASS_LIMIT, EMSGSIZE, "the answer's head is over 64 KiB");
        return 0;
    }
    if (c->head_whole) /* trailers */
        return n;
    if (n > 5 && memcmp(p, "HTTP/", 5) == 0) { /* the last of several is the answer's */
        const char *sp = memchr(p, ' ', n);
        c->status = 0;
        for (size_t i = sp ? (size_t)(sp + 1 - p) : n;
             i < n && p[i] >= '0' && p[i] <= '9' && c->status < 1000; i++)
            c->status = c->status * 10 + (p[i] - '0');
        c->head.n = 0;
        c->following = false;
        return n;
    }
    if (n > 2 || (n && p[0] != '\r' && p[0] != '\n')) {
        orch_buf_add(&c->head, p, n);
        if (redirects(c->status) && c->o.max_redirects && n > 9 &&
            orch_http_name_eq((struct orch_slice){ p, 9 }, "location:"))
            for (size_t i = 9; i < n; i++)
                c->following |= (unsigned char)p[i] > ' '; /* an empty one leads nowhere */
        return n;
    }
    if (c->status == 101) {
        fail(c, ORCH_CLASS_UPSTREAM, EPROTO,
             "the server changes to another protocol, which nobody asked for");
        return 0;
    }
    if (c->status < 200 || c->following)
        return n;
    split_head(c);
    c->location = find_location(c);
    c->head_whole = true;
    queue(c);
    return n;
}

static size_t received(char *p, size_t size, size_t n, void *ud)
{
    struct orch_http_call *c = ud;
    n *= size;
    if (c->o.on_data && c->body.n && c->body.n + n > BUFFER_BYTES) {
        c->curl_paused = true; /* curl keeps these bytes and gives them again */
        return CURL_WRITEFUNC_PAUSE;
    }
    c->last_ms = orch_loop_now_ms(c->h->loop);
    if (n > c->o.max_body_bytes - c->body_bytes) {
        fail(c, ORCH_CLASS_LIMIT, EMSGSIZE, "the answer's body is larger than allowed");
        return 0;
    }
    c->body_bytes += n;
    orch_buf_add(&c->body, p, n);
    if (c->o.on_data)
        queue(c);
    return n;
}

static curl_socket_t open_socket(void *ud, curlsocktype purpose, struct curl_sockaddr *to)
{
    struct orch_http_call *c = ud;
    struct orch_err err = { 0 };
    (void)purpose;
    if (!c->o.may_connect(c->o.ud, &to->addr, &err)) {
        fail(c, err.cls, err.code, err.msg);
        return CURL_SOCKET_BAD;
    }
    return socket(to->family, to->socktype | SOCK_CLOEXEC, to->protocol);
}

/* ---- libcurl on the loop */

static void act(struct orch_http_client *h, curl_socket_t fd, int what)
{
    int running;
    cu.multi_socket_action(h->multi, fd, what, &running);
    drain_soon(h);
}

struct socket {
    struct orch_http_client *h;
    struct orch_watch *watch;
    curl_socket_t fd;
};

static void socket_ready(void *ud, int events)
{
    struct socket *s = ud; /* may be freed by curl meanwhile */
    act(s->h, s->fd,
        (events & ORCH_READ ? CURL_CSELECT_IN : 0) | (events & ORCH_WRITE ? CURL_CSELECT_OUT : 0));
}

static int on_socket(CURL *easy, curl_socket_t fd, int what, void *ud, void *sp)
{
    (void)easy;
    struct orch_http_client *h = ud;
    struct socket *s = sp;
    if (what == CURL_POLL_REMOVE) {
        if (s)
            orch_watch_free(s->watch);
        free(s);
        return 0;
    }
    int events = (what & CURL_POLL_IN ? ORCH_READ : 0) | (what & CURL_POLL_OUT ? ORCH_WRITE : 0);
    if (s) {
        orch_watch_set(s->watch, events);
        return 0;
    }
    s = orch_xcalloc(1, sizeof *s);
    *s = (struct socket){ .h = h, .fd = fd };
    s->watch = orch_watch_new(h->loop, fd, events, socket_ready, s);
    cu.multi_assign(h->multi, fd, s);
    return 0;
}

static int on_timer(CURLM *multi, long ms, void *ud)
{
    (void)multi;
    struct orch_http_client *h = ud;
    if (ms < 0)
        orch_timer_cancel(h->timer);
    else
        orch_timer_set(h->timer, ms);
    return 0;
}

static void timed_out(void *ud)
{
    act(ud, CURL_SOCKET_TIMEOUT, 0);
}

/* ---- calls */

static void watch_time(struct orch_http_call *c)
{
    int64_t now = orch_loop_now_ms(c->h->loop), next = INT64_MAX;
    if (c->o.total_ms > 0)
        next = c->total_at;
    if (c->paused || c->curl_paused) /* it is not the peer who is silent */
        c->last_ms = now;
    if (c->o.idle_ms > 0 && c->last_ms + c->o.idle_ms < next)
        next = c->last_ms + c->o.idle_ms;
    if (next != INT64_MAX)
        orch_timer_set(c->timer, next - now);
}

static void call_timer(void *ud)
{
    struct orch_http_call *c = ud;
    int64_t now = orch_loop_now_ms(c->h->loop);
    bool total = c->o.total_ms > 0 && now >= c->total_at;
    bool idle = c->o.idle_ms > 0 && !c->paused && !c->curl_paused &&
                now - c->last_ms >= c->o.idle_ms;
    if (!total && !idle) {
        watch_time(c);
        return;
    }
    fail(c, ORCH_CLASS_TIMEOUT, ETIMEDOUT,
         total ? "not done in time" : "nothing came for too long");
    finish(c);
}

static int add_headers(struct orch_http_call *c, const struct orch_http_call_opts *o,
                       struct orch_err *err)
{
    bool type = false;
    for (size_t i = 0; i < o->n_headers; i++) {
        const struct orch_http_header *h = &o->headers[i];
        if (!orch_http_token_ok(h->name) || !orch_http_value_ok(h->value))
            return orch_err_set(err, EINVAL,
                                "http: the header %.*s has a character that a header cannot hold",
                                (int)(h->name.n < 64 ? h->name.n : 64), h->name.p);
        type |= orch_http_name_eq(h->name, "content-type");
        /* "Name;" is curl's way to say an empty value; "Name:" would leave the header out. */
        cleanup_free char *line = h->value.n
                                      ? orch_xasprintf("%.*s: %.*s", (int)h->name.n, h->name.p,
                                                       (int)h->value.n, h->value.p)
                                      : orch_xasprintf("%.*s;", (int)h->name.n, h->name.p);
        c->headers = cu.slist_append(c->headers, line);
    }
    c->headers = cu.slist_append(c->headers, "Expect:");
    if (!type)
        c->headers = cu.slist_append(c->headers, "Content-Type:");
    return 0;
}

static int check_url(struct orch_http_call *c, const struct orch_http_call_opts *o,
                     struct orch_err *err)
{
    CURLU *u = cu.url();
    char *scheme = NULL, *host = NULL, *port = NULL, *user = NULL;
    struct in_addr four;
    int r = 0;
    if (!u || !o->url || cu.url_set(u, CURLUPART_URL, o->url, 0) != CURLUE_OK ||
        cu.url_get(u, CURLUPART_SCHEME, &scheme, 0) != CURLUE_OK ||
        cu.url_get(u, CURLUPART_HOST, &host, 0) != CURLUE_OK ||
        cu.url_get(u, CURLUPART_PORT, &port, CURLU_DEFAULT_PORT) != CURLUE_OK ||
        (strcmp(scheme, "http") != 0 && strcmp(scheme, "https") != 0))
        r = orch_err_set(err, EINVAL, "http: not an http or https URL");
    else if (cu.url_get(u, CURLUPART_USER, &user, 0) == CURLUE_OK)
        r = orch_err_set(err, EINVAL,
                         "http: the URL for %s has user information in it: give it as a header",
                         host);
    else if (o->may_connect && inet_pton(AF_INET, host, &four) != 1)
        r = orch_err_setc(err, ORCH_CLASS_DENIED, EACCES,
                          "http: %s is not an IPv4 address; network policies do not judge names "
                          "yet, and none is looked up",
                          host);
    else
        c->label = orch_xasprintf("%s %s://%s:%s", c->o.method, scheme, host, port);
    cu.free(scheme);
    cu.free(host);
    cu.free(port);
    cu.free(user);
    cu.url_cleanup(u);
    return r;
}

static int check_address(struct orch_http_call *c, const struct orch_http_call_opts *o,
                         struct orch_err *err)
{
    uint8_t binary[16];
    if (o->may_connect && (o->address || o->max_redirects || o->unix_path))
        return orch_err_set(
            err, EINVAL,
            "http: judged connections exclude redirects, unix sockets and a pinned address");
    if (!o->address)
        return 0;
    bool six = inet_pton(AF_INET6, o->address, binary) == 1;
    if (!six && inet_pton(AF_INET, o->address, binary) != 1)
        return orch_err_set(err, EINVAL, "http: %s is not a numeric address", o->address);
    if (o->max_redirects || o->unix_path)
        return orch_err_set(err, EINVAL,
                            "http: a pinned address excludes redirects and unix sockets");
    /* any host, any port: there */
    cleanup_free char *to = orch_xasprintf(six ? "::[%s]:" : "::%s:", o->address);
    c->connect_to = cu.slist_append(NULL, to);
    return 0;
}

static bool set_options(struct orch_http_call *c, const struct orch_http_call_opts *o)
{
    bool ok = true;
#define SET(option, value) ok &= cu.easy_setopt(c->easy, CURLOPT_##option, value) == CURLE_OK
    SET(URL, o->url);
    SET(PROTOCOLS_STR, "http,https");
    SET(REDIR_PROTOCOLS_STR,
        orch_http_begins(orch_slice_str(o->url), "https:") ? "https" : "http,https");
    SET(HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    SET(PROXY, "");
    SET(DISALLOW_USERNAME_IN_URL, 1L);
    SET(SSL_VERIFYPEER, 1L);
    SET(SSL_VERIFYHOST, 2L);
    SET(NOSIGNAL, 1L);
    /* cancelling while a name is resolved does not wait for the resolver's thread */
    SET(QUICK_EXIT, 1L);
    SET(TCP_KEEPALIVE, 1L);
    SET(CONNECTTIMEOUT_MS, (long)(o->connect_ms > 0 ? o->connect_ms : 10 * 1000));
    SET(FOLLOWLOCATION, o->max_redirects ? 1L : 0L);
    SET(MAXREDIRS, (long)o->max_redirects);
    SET(HTTPHEADER, c->headers);
    SET(ERRORBUFFER, c->curl_error);
    SET(PRIVATE, c);
    SET(HEADERFUNCTION, header_line);
    SET(HEADERDATA, c);
    SET(WRITEFUNCTION, received);
    SET(WRITEDATA, c);
    if (o->ca_file) {
        SET(CAINFO, o->ca_file);
        SET(CAPATH, NULL);
    }
    if (o->unix_path)
        SET(UNIX_SOCKET_PATH, o->unix_path);
    if (c->connect_to)
        SET(CONNECT_TO, c->connect_to);
    if (o->may_connect) {
        SET(OPENSOCKETFUNCTION, open_socket);
        SET(OPENSOCKETDATA, c);
        SET(FRESH_CONNECT, 1L); /* neither one that somebody else opened, nor left to others */
        SET(FORBID_REUSE, 1L);
    }
    const char *plain = "GET"; /* what curl would say by itself */
    if (o->body.n || strcmp(c->o.method, "POST") == 0) {
        plain = "POST";
        SET(POST, 1L);
        SET(POSTFIELDSIZE_LARGE, (curl_off_t)o->body.n);
        SET(COPYPOSTFIELDS, o->body.n ? o->body.p : "");
    } else if (strcmp(c->o.method, "HEAD") == 0) {
        plain = "HEAD";
        SET(NOBODY, 1L);
    }
    if (strcmp(c->o.method, plain) != 0)
        SET(CUSTOMREQUEST, c->o.method);
#undef SET
    return ok;
}

struct orch_http_call *orch_http_call_start(struct orch_http_client *h,
                                            const struct orch_http_call_opts *o,
                                            struct orch_err *err)
{
    if (h->n_calls >= CALLS_MAX) {
        orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN, "http: %d calls are under way", CALLS_MAX);
        return NULL;
    }
    struct orch_http_call *c = orch_xcalloc(1, sizeof *c);
    c->h = h;
    c->o = *o;
    c->o.method = o->method ? o->method : o->body.n ? "POST" : "GET";
    c->o.total_ms = o->total_ms ? o->total_ms : 60 * 1000;
    c->o.idle_ms = o->idle_ms ? o->idle_ms : 60 * 1000;
    c->o.max_body_bytes = o->max_body_bytes ? o->max_body_bytes : 16 << 20;
    c->last_ms = orch_loop_now_ms(h->loop);
    c->total_at = c->last_ms + c->o.total_ms;
    c->timer = orch_timer_new(h->loop, call_timer, c);
    LIST_INSERT_HEAD(&h->calls, c, link);
    h->n_calls++;
    int r = orch_http_token_ok(orch_slice_str(c->o.method))
                ? check_url(c, o, err)
                : orch_err_set(err, EINVAL, "http: not a method: %s", c->o.method);
    if (r == 0)
        r = check_address(c, o, err);
    if (r == 0)
        r = add_headers(c, o, err);
    if (r == 0 && !((c->easy = cu.easy_init()) && set_options(c, o)))
        r = orch_err_set(err, EIO, "http: libcurl refuses the options of a call to %s", c->label);
    if (r == 0 && cu.multi_add_handle(h->multi, c->easy) != CURLM_OK)
        r = orch_err_set(err, EIO, "http: libcurl refuses a call to %s", c->label);
    if (r < 0) {
        call_free(c);
        return NULL;
    }
    c->running = true;
    watch_time(c);
    return c;
}

void orch_http_call_pause(struct orch_http_call *c, bool on)
{
    if (c->paused == on)
        return;
    c->paused = on;
    if (on)
        return;
    c->last_ms = orch_loop_now_ms(c->h->loop);
    queue(c);
}

void orch_http_call_cancel(struct orch_http_call *c)
{
    if (!c)
        return;
    c->cancelled = true;
    if (c->delivering)
        stop(c);
    else
        call_free(c);
}

struct orch_http_client *orch_http_client_new(struct orch_loop *l, struct orch_err *err)
{
    if (orch_library_load(&library, err) < 0)
        return NULL;
    struct orch_http_client *h = orch_xcalloc(1, sizeof *h);
    h->loop = l;
    LIST_INIT(&h->calls);
    TAILQ_INIT(&h->ready);
    h->timer = orch_timer_new(l, timed_out, h);
    h->multi = cu.multi_init();
    if (!h->multi || cu.multi_setopt(h->multi, CURLMOPT_SOCKETFUNCTION, on_socket) ||
        cu.multi_setopt(h->multi, CURLMOPT_SOCKETDATA, h) ||
        cu.multi_setopt(h->multi, CURLMOPT_TIMERFUNCTION, on_timer) ||
        cu.multi_setopt(h->multi, CURLMOPT_TIMERDATA, h) ||
        cu.multi_setopt(h->multi, CURLMOPT_MAXCONNECTS, (long)KEPT_CONNECTIONS)) {
        orch_err_set(err, EIO, "http: libcurl cannot be started");
        orch_http_client_free(h);
        return NULL;
    }
    return h;
}

void orch_http_client_free(struct orch_http_client *h)
{
    if (!h)
        return;
    while (!LIST_EMPTY(&h->calls))
        call_free(LIST_FIRST(&h->calls));
    if (h->multi)
        cu.multi_cleanup(h->multi);
    if (h->posted)
        orch_loop_unpost(h->loop, drain, h);
    orch_timer_free(h->timer);
    free(h);
}
