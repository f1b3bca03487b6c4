/* The client's way over a child's stdin and stdout: a message a line. */
#include "client_int.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

enum {
    READ_BYTES = 256 * 1024,
    LAST_READS = 64, /* of what an ended server had still written */
};

struct child {
    struct orch_mcp_transport t;
    struct orch_proc *proc;
    struct orch_watch *in, *out;
    struct orch_buf inbuf;
    size_t scanned;          /* of inbuf: has no line's end */
    bool flush_posted, gone; /* gone: it has ended */
    bool broken;             /* it does not read any more, and its exit tells why */
};

static void flush(void *ud);

static void flush_soon(struct child *h)
{
    if (h->flush_posted)
        return;
    h->flush_posted = true;
    orch_loop_post(h->t.client->loop, flush, h);
}

static void flush(void *ud)
{
    struct child *h = ud;
    struct orch_mcp_client *c = h->t.client;
    h->flush_posted = false;
    orch_mcp_client_enter(c);
    while (c->out.n && !h->broken) {
        ssize_t w = write(orch_proc_stdin(h->proc), c->out.p, c->out.n);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && errno != EAGAIN)
            h->broken = true;
        if (w < 0)
            break;
        orch_buf_consume(&c->out, (size_t)w);
    }
    orch_watch_set(h->out, c->out.n && !h->broken ? ORCH_WRITE : 0);
    if (!h->broken)
        orch_mcp_client_sent(c, 0);
    orch_mcp_client_leave(c);
}

static void on_writable(void *ud, int events)
{
    (void)events;
    flush(ud);
}

static void too_long(struct orch_mcp_client *c)
{
    struct orch_err err = { 0 };
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EMSGSIZE,
                  "%s: a line of its stdout is over %zu bytes (limits.message)", c->name,
                  c->o.limits.bytes);
    orch_mcp_client_fail(c, &err);
}

/* Hands every whole line over; keeps the rest. */
static void take_lines(struct child *h)
{
    struct orch_mcp_client *c = h->t.client;
    if (!h->inbuf.n)
        return;
    char *start = h->inbuf.p, *from = start + h->scanned, *end = start + h->inbuf.n, *nl;
    while (!c->dead && (nl = memchr(from, '\n', (size_t)(end - from)))) {
        size_t n = (size_t)(nl - start);
        if (n && start[n - 1] == '\r')
            n--;
        if (n > c->o.limits.bytes)
            too_long(c);
        else
            orch_mcp_client_take(c, (struct orch_slice){ start, n }, 0, 0);
        start = from = nl + 1;
    }
    orch_buf_consume(&h->inbuf, (size_t)(start - h->inbuf.p));
    h->scanned = h->inbuf.n;
    if (h->inbuf.n > c->o.limits.bytes && !c->dead)
        too_long(c);
}

/* As read(2), without EINTR. */
static ssize_t read_more(struct child *h)
{
    ssize_t r;
    orch_buf_reserve(&h->inbuf, READ_BYTES);
    do
        r = read(orch_proc_stdout(h->proc), h->inbuf.p + h->inbuf.n, h->inbuf.cap - h->inbuf.n - 1);
    while (r < 0 && errno == EINTR);
    if (r > 0)
        h->inbuf.n += (size_t)r;
    return r;
}

static void on_readable(void *ud, int events)
{
    (void)events;
    struct child *h = ud;
    struct orch_mcp_client *c = h->t.client;
    ssize_t r = read_more(h);
    if (r < 0 && errno == EAGAIN)
        return;
    if (r <= 0) {
        /* The exit status follows; a server that only closed its stdout is ended. */
        orch_watch_set(h->in, 0);
        orch_proc_kill(h->proc, SIGTERM);
        return;
    }
    orch_mcp_client_enter(c);
    take_lines(h);
    orch_mcp_client_leave(c);
}

static void on_exit_status(void *ud, int status)
{
    struct child *h = ud;
    struct orch_mcp_client *c = h->t.client;
    char how[96];
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf tail = { 0 };
    h->gone = true;
    orch_mcp_client_enter(c);
    for (int i = 0; i < LAST_READS && !c->dead && read_more(h) > 0; i++)
        take_lines(h);
    orch_proc_describe(status, how, sizeof how);
    orch_mcp_client_tail(c, &tail);
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ECHILD, "%s: the server ended (%s)%s", c->name, how,
                  tail.n ? tail.p : "");
    if (!c->dead && !orch_mcp_era_gone(c))
        orch_mcp_client_fail(c, &err);
    orch_mcp_client_leave(c);
}

static void unwatch(struct child *h)
{
    orch_watch_free(h->in);
    orch_watch_free(h->out);
    h->in = h->out = NULL;
    if (h->flush_posted)
        orch_loop_unpost(h->t.client->loop, flush, h);
    h->flush_posted = false;
}

static void child_end(struct orch_mcp_transport *t, int64_t eof_ms, int64_t term_ms)
{
    struct child *h = (struct child *)t;
    unwatch(h);
    if (h->proc && !h->gone)
        orch_proc_end(h->proc, eof_ms, term_ms);
}

static int child_start(struct orch_mcp_transport *t, struct orch_err *err)
{
    struct child *h = (struct child *)t;
    struct orch_mcp_client *c = t->client;
    /* The one before has nothing yet that it could lose. */
    child_end(t, ORCH_PROC_HURRY_EOF_MS, ORCH_PROC_HURRY_TERM_MS);
    orch_proc_free(h->proc);
    h->proc = c->proc = NULL;
    h->inbuf.n = h->scanned = c->out.n = 0;
    h->broken = h->gone = false;
    struct orch_proc_via *via = c->o.via ? c->o.via(c->o.via_ud, err) : NULL;
    if (via || !c->o.via)
        h->proc = orch_proc_start(c->loop,
                                  &(struct orch_proc_opts){ .argv = c->o.argv,
                                                            .env = c->o.env,
                                                            .cwd = c->o.cwd,
                                                            .via = via,
                                                            .on_exit = on_exit_status,
                                                            .log_as = c->name,
                                                            .ud = h },
                                  err);
    if (!h->proc) {
        int rc = orch_err_wrap(err, "%s", c->name);
        if (err && err->cls != ORCH_CLASS_ISOLATION && (via || !c->o.via))
            err->cls = ORCH_CLASS_UPSTREAM;
        return rc;
    }
    c->proc = h->proc;
    h->in = orch_watch_new(c->loop, orch_proc_stdout(h->proc), ORCH_READ, on_readable, h);
    h->out = orch_watch_new(c->loop, orch_proc_stdin(h->proc), 0, on_writable, h);
    return 0;
}

static void child_send(struct orch_mcp_transport *t, size_t from, enum orch_mcp_kind kind,
                       int64_t id)
{
    (void)from, (void)kind, (void)id;
    orch_buf_char(&t->client->out, '\n');
    flush_soon((struct child *)t);
}

static void child_release(struct orch_mcp_transport *t, int64_t id)
{
    (void)t, (void)id;
}

static void child_listen(struct orch_mcp_transport *t)
{
    orch_mcp_client_opened(t->client);
}

static void child_key(struct orch_mcp_transport *t, struct orch_sha256_ctx *h)
{
    const struct orch_mcp_client_opts *o = &t->client->o;
    for (const char *const *a = o->argv; *a; a++)
        orch_sha256_update(h, *a, strlen(*a) + 1);
    if (o->cwd)
        orch_sha256_update(h, o->cwd, strlen(o->cwd));
}

static void child_stop(struct orch_mcp_transport *t)
{
    struct child *h = (struct child *)t;
    unwatch(h);
    if (h->proc)
        orch_proc_kill(h->proc, SIGKILL);
}

static void child_free(struct orch_mcp_transport *t)
{
    struct child *h = (struct child *)t;
    unwatch(h);
    orch_proc_free(h->proc);
    orch_buf_free(&h->inbuf);
    free(h);
}

struct orch_mcp_transport *orch_mcp_child_new(struct orch_mcp_client *c)
{
    static const struct orch_mcp_transport_ops ops = { .start = child_start,
                                                       .send = child_send,
                                                       .release = child_release,
                                                       .listen = child_listen,
                                                       .key = child_key,
                                                       .stop = child_stop,
                                                       .end = child_end,
                                                       .free = child_free };
    struct child *h = orch_xcalloc(1, sizeof *h);
    h->t = (struct orch_mcp_transport){ &ops, c };
    return &h->t;
}
