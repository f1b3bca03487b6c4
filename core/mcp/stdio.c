#include "stdio.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>

enum {
    READ_BYTES = 256 * 1024,
    OUT_PAUSE_BYTES = 1 << 20,
    OUT_RESUME_BYTES = 256 * 1024,
};

struct stream {
    int fd, old_flags;
    bool blocking; /* terminal or file: left as it is, shared with others */
    struct orch_watch *watch;
};

struct orch_mcp_stdio {
    struct orch_loop *loop;
    struct orch_mcp_session *session;
    struct orch_mcp_stdio_opts o;
    struct stream in, out;
    struct orch_buf buf;
    size_t scanned; /* bytes of buf that hold no newline */
    bool skipping;  /* inside a line over the limit */
    bool paused, closed, flush_posted;
};

static void on_readable(void *ud, int events);

static void stream_open(struct stream *s, int fd)
{
    struct stat st;
    *s = (struct stream){ .fd = fd };
    s->blocking = fstat(fd, &st) < 0 || !(S_ISFIFO(st.st_mode) || S_ISSOCK(st.st_mode));
    if (!s->blocking) {
        s->old_flags = fcntl(fd, F_GETFL);
        fcntl(fd, F_SETFL, s->old_flags | O_NONBLOCK);
    }
}

static void stream_close(struct stream *s)
{
    orch_watch_free(s->watch);
    if (!s->blocking && s->fd >= 0)
        fcntl(s->fd, F_SETFL, s->old_flags);
    s->watch = NULL;
}

static void close_now(struct orch_mcp_stdio *t, const char *why)
{
    if (t->closed)
        return;
    t->closed = true;
    if (t->in.watch)
        orch_watch_set(t->in.watch, 0);
    t->o.closed(t->o.ud, why);
}

static void read_again(void *ud)
{
    on_readable(ud, ORCH_READ);
}

static void set_reading(struct orch_mcp_stdio *t, bool on)
{
    t->paused = !on;
    if (t->in.watch)
        orch_watch_set(t->in.watch, on && !t->closed ? ORCH_READ : 0);
    else if (on && !t->closed)
        orch_loop_post(t->loop, read_again, t);
}

static void flush(struct orch_mcp_stdio *t)
{
    struct orch_buf *out = orch_mcp_session_out(t->session);
    size_t sent = 0;
    while (sent < out->n) {
        ssize_t w = write(t->out.fd, out->p + sent, out->n - sent);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && errno == EAGAIN)
            break;
        if (w < 0) {
            out->n = 0;
            close_now(t, strerror(errno));
            return;
        }
        sent += (size_t)w;
    }
    orch_buf_consume(out, sent);
    if (t->out.watch)
        orch_watch_set(t->out.watch, out->n ? ORCH_WRITE : 0);
    if (out->n > OUT_PAUSE_BYTES && !t->paused)
        set_reading(t, false);
    else if (out->n < OUT_RESUME_BYTES && t->paused)
        set_reading(t, true);
}

static void on_writable(void *ud, int events)
{
    (void)events;
    flush(ud);
}

static void flush_later(void *ud)
{
    struct orch_mcp_stdio *t = ud;
    t->flush_posted = false;
    flush(t);
}

static void output_appeared(void *ud)
{
    struct orch_mcp_stdio *t = ud;
    if (t->flush_posted)
        return;
    t->flush_posted = true;
    orch_loop_post(t->loop, flush_later, t);
}

/* Hands every complete line to the session; keeps the rest. */
static void take_lines(struct orch_mcp_stdio *t)
{
    if (!t->buf.n)
        return;
    char *start = t->buf.p, *end = t->buf.p + t->buf.n, *nl;
    char *from = start + t->scanned;
    while ((nl = memchr(from, '\n', (size_t)(end - from)))) {
        if (t->skipping)
            t->skipping = false;
        else if ((size_t)(nl - start) > t->o.max_line)
            orch_mcp_session_oversized(t->session, t->o.max_line);
        else
            orch_mcp_session_feed(t->session, (struct orch_slice){ start, (size_t)(nl - start) },
                                  NULL);
        start = from = nl + 1;
    }
    orch_buf_consume(&t->buf, (size_t)(start - t->buf.p));
    if (t->skipping) {
        t->buf.n = 0;
    } else if (t->buf.n > t->o.max_line) {
        orch_mcp_session_oversized(t->session, t->o.max_line);
        t->skipping = true;
        t->buf.n = 0;
    }
    t->scanned = t->buf.n;
}

static void on_readable(void *ud, int events)
{
    (void)events;
    struct orch_mcp_stdio *t = ud;
    if (t->closed || t->paused)
        return;
    orch_buf_reserve(&t->buf, READ_BYTES);
    ssize_t r = read(t->in.fd, t->buf.p + t->buf.n, t->buf.cap - t->buf.n - 1);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r > 0) {
        t->buf.n += (size_t)r;
        take_lines(t);
    } else if (r == 0 && t->buf.n && !t->skipping) {
        /* The last line came without its newline. */
        orch_buf_char(&t->buf, '\n');
        take_lines(t);
    }
    t->o.batch_end(t->o.ud);
    flush(t);
    if (r <= 0)
        close_now(t, r < 0 ? strerror(errno) : NULL);
    else if (!t->in.watch && !t->closed && !t->paused)
        orch_loop_post(t->loop, read_again, t);
}

struct orch_mcp_stdio *orch_mcp_stdio_new(struct orch_loop *l, struct orch_mcp_session *s,
                                          const struct orch_mcp_stdio_opts *o, struct orch_err *err)
{
    struct stat st;
    if (fstat(o->in_fd, &st) < 0 || fcntl(o->out_fd, F_GETFL) < 0) {
        orch_err_set(err, errno, "mcp stdio: standard input or output is closed");
        return NULL;
    }
    struct orch_mcp_stdio *t = orch_xcalloc(1, sizeof *t);
    t->loop = l;
    t->session = s;
    t->o = *o;
    stream_open(&t->in, o->in_fd);
    stream_open(&t->out, o->out_fd);
    /* epoll refuses what is always readable (files, /dev/null): those are read by posted turns. */
    if (S_ISREG(st.st_mode) || (S_ISCHR(st.st_mode) && !isatty(o->in_fd)))
        orch_loop_post(l, read_again, t);
    else
        t->in.watch = orch_watch_new(l, o->in_fd, ORCH_READ, on_readable, t);
    if (!t->out.blocking)
        t->out.watch = orch_watch_new(l, o->out_fd, 0, on_writable, t);
    orch_mcp_session_on_output(s, output_appeared, t);
    return t;
}

bool orch_mcp_stdio_gone(const struct orch_mcp_stdio *t)
{
    struct pollfd p = { .fd = t->out.fd };
    return poll(&p, 1, 0) > 0; /* a closed pipe is told unasked */
}

void orch_mcp_stdio_drain(struct orch_mcp_stdio *t, int64_t deadline_ms)
{
    struct orch_buf *out = orch_mcp_session_out(t->session);
    int64_t end = orch_now_us() / 1000 + deadline_ms;
    while (out->n) {
        int64_t left = end - orch_now_us() / 1000;
        struct pollfd p = { t->out.fd, POLLOUT, 0 };
        if (left <= 0 || poll(&p, 1, (int)left) <= 0)
            return;
        flush(t);
    }
}

void orch_mcp_stdio_free(struct orch_mcp_stdio *t)
{
    if (!t)
        return;
    orch_mcp_session_on_output(t->session, NULL, NULL);
    orch_loop_unpost(t->loop, flush_later, t);
    orch_loop_unpost(t->loop, read_again, t);
    stream_close(&t->in);
    stream_close(&t->out);
    orch_buf_free(&t->buf);
    free(t);
}
