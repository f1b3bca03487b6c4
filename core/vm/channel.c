#include "channel.h"

#include "../guest/wire.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum {
    MAX_EXECS = 256,
    QUEUE_SOFT = 1 << 20, /* stdin and file bytes wait while this much is queued */
    QUEUE_HARD = 4 << 20, /* a guest that lets it grow beyond is taken for dead */
    READS_PER_TURN = 8,   /* a flooding guest must not keep the loop */
    LIST_MAX = 8 << 20,
    PATH_SENT = 8192, /* longer than any path; the guest refuses it by its length */
    TICK_MS = 500,
    EXEC_GRACE_MS = 2000 + 10000, /* the agent's two seconds from TERM to KILL, and its own work */
    FILEOP_IDLE_MS = 30000,
};

enum kind { EXEC, WRITE_FILE, READ_FILE, LIST_DIR };

/* An id in use. First member of orch_exec and orch_fileop. */
struct op {
    struct op *next;
    struct orch_channel *c;
    uint32_t id;
    enum kind kind;
    int64_t deadline_ms; /* 0: none */
    uint32_t window;     /* bytes of STDIN or DATA that may still be sent */
    bool wants;          /* was refused some; tell when there is room */
};

struct orch_exec {
    struct op op;
    bool started, stdin_open, pty;
    uint64_t max_output, got[2];
    int64_t sent_us;
    void (*output)(void *ud, int stream, struct orch_slice bytes);
    void (*drained)(void *ud);
    void (*done)(void *ud, const struct orch_exec_result *r, const struct orch_err *err);
    void *ud;
};

struct orch_fileop {
    struct op op;
    char *path;
    struct orch_buf data; /* to be written, or what came */
    size_t sent;
    bool sent_end;
    uint64_t max, length;
    orch_fileop_fn *done;
    void *ud;
};

struct orch_channel {
    struct orch_loop *loop;
    struct orch_channel_cb cb;
    int fd;
    struct orch_watch *watch;
    struct orch_timer *tick;
    bool ticking;
    struct op *ops;
    uint32_t next_id, woken;
    int n_execs;
    struct orch_buf out;
    size_t out_off;
    bool inside;  /* a callback of the loop runs: free is put off to its end */
    bool dead;    /* freed by such a callback */
    bool failing; /* err is set, on_failing is posted or has run */
    bool ended;   /* err is the owner's, for every operation; on_ending is posted or has run */
    bool starved; /* an op was refused bytes because of the queue */
    bool paused;
    int64_t paused_at_ms;
    struct orch_err err;
    bool hello_seen, restoring;
    uint8_t epoch[16];
    size_t in_n;
    uint8_t in[sizeof(struct orch_wire_head) + ORCH_WIRE_MAX];
};

static void on_ready(void *ud, int events);
static void on_tick(void *ud);
static void on_ending(void *ud);

/* ---- operations ---- */

static struct op *op_find(struct orch_channel *c, uint32_t id)
{
    struct op *op = c->ops;
    while (op && op->id != id)
        op = op->next;
    return op;
}

static void op_add(struct orch_channel *c, struct op *op, enum kind kind)
{
    op->c = c;
    op->id = ++c->next_id;
    op->kind = kind;
    op->window = ORCH_WIRE_WINDOW;
    op->next = c->ops;
    c->ops = op;
    c->n_execs += kind == EXEC;
    if (c->ended)
        orch_loop_post(c->loop, on_ending, c);
}

static void op_detach(struct op *op)
{
    struct op **at = &op->c->ops;
    while (*at != op)
        at = &(*at)->next;
    *at = op->next;
    op->c->n_execs -= op->kind == EXEC;
}

static void op_free(struct op *op)
{
    if (op->kind != EXEC) {
        struct orch_fileop *f = (struct orch_fileop *)op;
        free(f->path);
        orch_buf_free(&f->data);
    }
    free(op);
}

static void deadline_set(struct op *op, int64_t ms)
{
    op->deadline_ms = orch_loop_now_ms(op->c->loop) + ms;
    if (!op->c->ticking && !op->c->failing)
        orch_timer_set(op->c->tick, TICK_MS);
    op->c->ticking = true;
}

/* Ends an exec with err (and no result) or a file operation with err or NULL; frees it. */
static void op_end(struct op *op, const struct orch_exec_result *r, const struct orch_err *err)
{
    op_detach(op);
    if (op->kind == EXEC) {
        struct orch_exec *x = (struct orch_exec *)op;
        x->done(x->ud, err ? NULL : r, err);
    } else {
        struct orch_fileop *f = (struct orch_fileop *)op;
        struct orch_slice got = { 0 };
        if (!err && op->kind != WRITE_FILE)
            got = orch_slice_of(&f->data);
        f->done(f->ud, got, err);
    }
    op_free(op);
}

/* ---- failing and freeing ---- */

static void channel_destroy(struct orch_channel *c)
{
    orch_watch_free(c->watch);
    orch_timer_free(c->tick);
    close(c->fd);
    orch_buf_free(&c->out);
    free(c);
}

static void leave(struct orch_channel *c)
{
    c->inside = false;
    if (c->dead)
        channel_destroy(c);
}

/* These have turns of their own, so that nobody is told from inside his own call. */
static void on_failing(void *ud)
{
    struct orch_channel *c = ud;
    c->inside = true;
    c->cb.failed(c->cb.ud, &c->err);
    leave(c);
}

static void on_ending(void *ud)
{
    struct orch_channel *c = ud;
    c->inside = true;
    while (!c->dead && c->ops)
        op_end(c->ops, NULL, &c->err);
    leave(c);
}

static void stop(struct orch_channel *c, const struct orch_err *err)
{
    c->failing = true;
    c->err = *err;
    orch_watch_set(c->watch, 0);
    orch_timer_cancel(c->tick);
}

static void fail(struct orch_channel *c, const struct orch_err *err)
{
    if (c->failing)
        return;
    stop(c, err);
    orch_loop_post(c->loop, on_failing, c);
}

void orch_channel_end(struct orch_channel *c, const struct orch_err *why)
{
    stop(c, why);
    c->ended = true;
    orch_loop_unpost(c->loop, on_failing, c);
    orch_loop_post(c->loop, on_ending, c);
}

static void protocol_error(struct orch_channel *c, const char *fmt, ...) ORCH_PRINTF(2, 3);
static void protocol_error(struct orch_channel *c, const char *fmt, ...)
{
    char what[200];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    struct orch_err err;
    orch_err_set(&err, EPROTO, "protocol error: the guest agent sent %s", what);
    fail(c, &err);
}

void orch_channel_free(struct orch_channel *c)
{
    if (!c)
        return;
    orch_loop_unpost(c->loop, on_failing, c);
    orch_loop_unpost(c->loop, on_ending, c);
    while (c->ops) {
        struct op *op = c->ops;
        op_detach(op);
        op_free(op);
    }
    c->failing = c->dead = true;
    if (!c->inside)
        channel_destroy(c);
}

/* ---- sending ---- */

static void watch_update(struct orch_channel *c)
{
    if (!c->failing)
        orch_watch_set(c->watch, (c->paused ? 0 : ORCH_READ) |
                                     (c->out.n > c->out_off || c->starved ? ORCH_WRITE : 0));
}

static void flush(struct orch_channel *c)
{
    while (c->out.n > c->out_off && !c->failing) {
        ssize_t n = send(c->fd, c->out.p + c->out_off, c->out.n - c->out_off,
                         MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        /* A broken pipe is found by reading, after what the guest still said. */
        if (n < 0)
            break;
        c->out_off += (size_t)n;
    }
    if (c->out_off == c->out.n) {
        c->out_off = c->out.n = 0;
    } else if (c->out_off >= QUEUE_SOFT) {
        orch_buf_consume(&c->out, c->out_off);
        c->out_off = 0;
    }
    watch_update(c);
}

static void put_head(struct orch_channel *c, uint32_t id, enum orch_wire_type type, size_t n)
{
    struct orch_wire_head h = { .len = (uint32_t)n, .id = id, .type = (uint8_t)type };
    orch_buf_add(&c->out, &h, sizeof h);
}

/* Sends what was put. The queue grows beyond its soft bound only by small frames and EXEC. */
static void put_end(struct orch_channel *c)
{
    flush(c);
    if (orch_channel_queued(c) > QUEUE_HARD) {
        struct orch_err err;
        orch_err_set(&err, ETIMEDOUT, "the guest agent does not read: %zu bytes wait for it",
                     orch_channel_queued(c));
        fail(c, &err);
    }
}

static void send_frame(struct orch_channel *c, uint32_t id, enum orch_wire_type type, const void *p,
                       size_t n)
{
    if (c->failing)
        return;
    put_head(c, id, type, n);
    orch_buf_add(&c->out, p, n);
    put_end(c);
}

/* Sends as many of the n bytes as the window and the queue allow. */
static size_t send_bytes(struct op *op, enum orch_wire_type type, const char *p, size_t n)
{
    size_t queued = orch_channel_queued(op->c);
    size_t room = queued < QUEUE_SOFT && !op->c->failing ? QUEUE_SOFT - queued : 0;
    size_t take = n < op->window ? n : op->window;
    if (take > room) {
        take = room;
        op->c->starved = true;
    }
    for (size_t off = 0; off < take;) {
        size_t k = take - off < ORCH_WIRE_MAX ? take - off : ORCH_WIRE_MAX;
        put_head(op->c, op->id, type, k);
        orch_buf_add(&op->c->out, p + off, k);
        off += k;
    }
    op->window -= (uint32_t)take;
    op->wants = take < n;
    put_end(op->c);
    return take;
}

static void fileop_send(struct orch_fileop *f)
{
    if (f->sent < f->data.n)
        f->sent += send_bytes(&f->op, ORCH_WIRE_DATA, f->data.p + f->sent, f->data.n - f->sent);
    if (f->sent == f->data.n && !f->sent_end) {
        f->sent_end = true;
        send_frame(f->op.c, f->op.id, ORCH_WIRE_DATA, NULL, 0);
    }
}

/* There is room again, in op's window or in the queue. May end anything: op is not valid
 * afterwards. */
static void go_on(struct op *op)
{
    op->wants = false;
    if (op->kind == WRITE_FILE)
        fileop_send((struct orch_fileop *)op);
    else if (((struct orch_exec *)op)->drained)
        ((struct orch_exec *)op)->drained(((struct orch_exec *)op)->ud);
}

/* The next in turn after the one woken last, by id. */
static struct op *next_wanting(const struct orch_channel *c)
{
    struct op *best = NULL;
    for (struct op *op = c->ops; op; op = op->next)
        if (op->wants && op->window && (!best || op->id - c->woken - 1 < best->id - c->woken - 1))
            best = op;
    return best;
}

static void wake_starved(struct orch_channel *c)
{
    int turns = MAX_EXECS; /* one who is refused again comes last, but must not go round for ever */
    struct op *op;
    if (!c->starved || orch_channel_queued(c) >= QUEUE_SOFT / 2)
        return;
    c->starved = false;
    while (!c->dead && !c->failing && turns-- && (op = next_wanting(c))) {
        if (orch_channel_queued(c) >= QUEUE_SOFT / 2) {
            c->starved = true;
            break;
        }
        c->woken = op->id;
        go_on(op);
    }
    if (!c->dead)
        watch_update(c);
}

/* ---- receiving ---- */

static void got_hello(struct orch_channel *c, const struct orch_wire_head *h, const uint8_t *b)
{
    struct orch_wire_hello m;
    if (h->id || h->len != sizeof m) {
        protocol_error(c, "a malformed HELLO");
        return;
    }
    memcpy(&m, b, sizeof m);
    static const uint8_t zeros[16];
    if (m.version != ORCH_WIRE_VERSION) {
        protocol_error(
            c, "HELLO of version %u, this orch speaks %d: build the image again (orch image build)",
            m.version, ORCH_WIRE_VERSION);
    } else if (m.zero || (!c->restoring && c->hello_seen) ||
               memcmp(m.epoch, c->restoring ? c->epoch : zeros, 16) != 0) {
        protocol_error(c, "a HELLO that was not asked for");
    } else {
        c->hello_seen = true;
        c->restoring = false;
        c->cb.hello(c->cb.ud, m.epoch);
    }
}

static void got_exit(struct orch_exec *x, const struct orch_wire_head *h, const uint8_t *b)
{
    struct orch_channel *c = x->op.c;
    struct orch_wire_exit e;
    if (h->len != sizeof e) {
        protocol_error(c, "a malformed EXIT");
        return;
    }
    memcpy(&e, b, sizeof e);
    bool ok = e.fail <= ORCH_WIRE_FAIL_RESOURCES && e.sys_errno < 4096 && !e.zero &&
              !(e.flags & ~15U) &&
              (e.fail ? !x->started && e.sys_errno : x->started && !e.sys_errno) &&
              (e.signal ? e.signal > 0 && e.signal <= 64 && e.status == -1
                        : e.status >= 0 && e.status <= 255) &&
              !(e.flags & ORCH_WIRE_EXIT_CUT_STDOUT) == !e.dropped_stdout &&
              !(e.flags & ORCH_WIRE_EXIT_CUT_STDERR) == !e.dropped_stderr;
    if (!ok) {
        protocol_error(c, "an EXIT that makes no sense");
        return;
    }
    struct orch_exec_result r = {
        .fail = (int)e.fail,
        .sys_errno = (int)e.sys_errno,
        .status = e.status,
        .signal = e.signal,
        .timed_out = e.flags & ORCH_WIRE_EXIT_TIMED_OUT,
        .cut_stdout = e.flags & ORCH_WIRE_EXIT_CUT_STDOUT,
        .cut_stderr = e.flags & ORCH_WIRE_EXIT_CUT_STDERR,
        .out_of_memory = e.flags & ORCH_WIRE_EXIT_MEMORY,
        .dropped_stdout = e.dropped_stdout,
        .dropped_stderr = e.dropped_stderr,
        .ms = (orch_now_us() - x->sent_us) / 1000,
    };
    op_end(&x->op, &r, NULL);
}

static void got_output(struct orch_exec *x, const struct orch_wire_head *h, const uint8_t *b)
{
    struct orch_channel *c = x->op.c;
    int i = h->type == ORCH_WIRE_STDERR;
    x->got[i] += h->len;
    if (!x->started || !h->len || (i && x->pty))
        protocol_error(c, "output out of place");
    else if (x->max_output && x->got[i] > x->max_output)
        protocol_error(c, "more output than the %llu bytes it was told",
                       (unsigned long long)x->max_output);
    else if (x->output)
        x->output(x->ud, i + 1, (struct orch_slice){ (const char *)b, h->len });
}

/* One number: spaces follow it. */
static const char *skip_number(const char *p, const char *end, int base)
{
    const char *start = p;
    while (p < end && *p >= '0' && *p < '0' + base)
        p++;
    return p > start && p - start <= 20 && p < end && *p == ' ' ? p + 1 : NULL;
}

/* "type mode size mtime name\0", whole entries only. */
static bool entries_valid(const char *p, size_t n)
{
    const char *end = p + n;
    if (!n || p[n - 1])
        return false;
    while (p < end) {
        if (!strchr("fdlpscb", *p) || !*p || end - p < 4 || p[1] != ' ')
            return false;
        p = skip_number(p + 2, end, 8);
        p = p ? skip_number(p, end, 10) : NULL;
        if (p && *p == '-')
            p++;
        p = p ? skip_number(p, end, 10) : NULL;
        size_t name = p ? strlen(p) : 0;
        if (!name || name > 255 || memchr(p, '/', name) || strcmp(p, ".") == 0 ||
            strcmp(p, "..") == 0)
            return false;
        p += name + 1;
    }
    return true;
}

static void got_data(struct orch_fileop *f, const struct orch_wire_head *h, const uint8_t *b)
{
    struct orch_channel *c = f->op.c;
    if (f->op.kind == WRITE_FILE || !h->len) {
        protocol_error(c, "DATA out of place");
    } else if (f->op.kind == LIST_DIR && !entries_valid((const char *)b, h->len)) {
        protocol_error(c, "a malformed folder entry");
    } else if (f->length && f->data.n + h->len > f->length) {
        protocol_error(c, "more of a file than was asked for");
    } else if (f->data.n + h->len > f->max) {
        struct orch_err err;
        orch_err_setc(&err, ORCH_CLASS_LIMIT, EFBIG,
                      "%s in the guest is larger than the limit of %llu bytes", f->path,
                      (unsigned long long)f->max);
        send_frame(c, f->op.id, ORCH_WIRE_DROP, NULL, 0);
        op_end(&f->op, NULL, &err);
    } else {
        orch_buf_add(&f->data, b, h->len);
        deadline_set(&f->op, FILEOP_IDLE_MS);
    }
}

static void got_done(struct orch_channel *c, struct op *op, const struct orch_wire_head *h,
                     const uint8_t *b)
{
    struct orch_wire_done d;
    if (h->len != sizeof d || h->id == 0) {
        protocol_error(c, "a malformed DONE");
        return;
    }
    memcpy(&d, b, sizeof d);
    if (d.zero || d.sys_errno >= 4096) {
        protocol_error(c, "a DONE that makes no sense");
    } else if (op) {
        struct orch_fileop *f = (struct orch_fileop *)op;
        struct orch_err err;
        if (!d.sys_errno && (d.bytes != f->data.n || (op->kind == WRITE_FILE && !f->sent_end))) {
            protocol_error(c, "a DONE before the end");
            return;
        }
        if (d.sys_errno)
            orch_err_set(&err, (int)d.sys_errno, "cannot %s %s in the guest: %s",
                         op->kind == WRITE_FILE  ? "write"
                         : op->kind == READ_FILE ? "read"
                                                 : "list",
                         f->path, strerror((int)d.sys_errno));
        op_end(op, NULL, d.sys_errno ? &err : NULL);
    }
}

static void got_credit(struct op *op, const struct orch_wire_head *h, const uint8_t *b)
{
    uint32_t n;
    if (h->len != sizeof n || (op->kind != EXEC && op->kind != WRITE_FILE)) {
        protocol_error(op->c, "a malformed CREDIT");
        return;
    }
    memcpy(&n, b, sizeof n);
    if (!n || n > ORCH_WIRE_WINDOW - op->window) {
        protocol_error(op->c, "CREDIT for more than it was sent");
        return;
    }
    op->window += n;
    if (op->kind == WRITE_FILE)
        deadline_set(op, FILEOP_IDLE_MS);
    if (op->wants && orch_channel_queued(op->c) < QUEUE_SOFT)
        go_on(op);
}

/* One frame. The last thing it does is at most one callback, after which c may be dead. */
static void got_frame(struct orch_channel *c, const struct orch_wire_head *h, const uint8_t *b)
{
    if (h->type == ORCH_WIRE_HELLO) {
        got_hello(c, h, b);
        return;
    }
    if (h->type != ORCH_WIRE_DATA && (h->type < ORCH_WIRE_HELLO || h->type > ORCH_WIRE_DONE)) {
        protocol_error(c, "a frame of unknown type %u", h->type);
        return;
    }
    if (!c->hello_seen || (!h->id && h->type != ORCH_WIRE_DONE) || h->id > c->next_id) {
        protocol_error(c, "a frame for %s",
                       c->hello_seen ? "an id that was never used"
                                     : "an operation before its HELLO");
        return;
    }
    struct op *op = op_find(c, h->id);
    if (h->type == ORCH_WIRE_DONE && (!op || op->kind != EXEC)) {
        got_done(c, op, h, b);
        return;
    }
    if (!op)
        return; /* dropped or ended: frames on their way then mean nothing now */
    if (h->type == ORCH_WIRE_CREDIT) {
        got_credit(op, h, b);
        return;
    }
    struct orch_exec *x = (struct orch_exec *)op;
    if ((op->kind == EXEC) != (h->type != ORCH_WIRE_DATA)) {
        protocol_error(c, "a frame of type %u for another kind of operation", h->type);
        return;
    }
    switch (h->type) {
    case ORCH_WIRE_DATA:
        got_data((struct orch_fileop *)op, h, b);
        return;
    case ORCH_WIRE_STARTED:
        if (x->started || h->len != 4)
            protocol_error(c, "a malformed STARTED");
        x->started = true;
        return;
    case ORCH_WIRE_STDOUT:
    case ORCH_WIRE_STDERR:
        got_output(x, h, b);
        return;
    case ORCH_WIRE_EXIT:
        got_exit(x, h, b);
        return;
    default: /* DONE for an exec */
        protocol_error(c, "a DONE for a command");
    }
}

static void receive(struct orch_channel *c)
{
    for (int i = 0; i < READS_PER_TURN; i++) {
        ssize_t n = recv(c->fd, c->in + c->in_n, sizeof c->in - c->in_n, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0) {
            struct orch_err err;
            orch_err_setc(&err, ORCH_CLASS_CLOSED, n < 0 ? errno : ECONNRESET,
                          "the microVM closed its channel: %s",
                          n < 0     ? strerror(errno)
                          : c->in_n ? "in the middle of a frame"
                                    : "end of file");
            fail(c, &err);
            return;
        }
        c->in_n += (size_t)n;
        size_t off = 0;
        struct orch_wire_head h;
        while (c->in_n - off >= sizeof h) {
            memcpy(&h, c->in + off, sizeof h);
            if (h.len > ORCH_WIRE_MAX || h.zero[0] || h.zero[1] || h.zero[2]) {
                protocol_error(c, "a malformed frame head (length %u)", h.len);
                return;
            }
            if (c->in_n - off - sizeof h < h.len)
                break;
            got_frame(c, &h, c->in + off + sizeof h);
            if (c->dead || c->failing)
                return;
            off += sizeof h + h.len;
        }
        c->in_n -= off;
        memmove(c->in, c->in + off, c->in_n);
        if (c->paused)
            return;
    }
}

static void on_ready(void *ud, int events)
{
    struct orch_channel *c = ud;
    c->inside = true;
    if ((events & ORCH_WRITE) && !c->failing) {
        flush(c);
        wake_starved(c);
    }
    if ((events & ORCH_READ) && !c->failing && !c->paused)
        receive(c);
    leave(c);
}

static void on_tick(void *ud)
{
    struct orch_channel *c = ud;
    int64_t now = orch_loop_now_ms(c->loop);
    bool more = false;
    c->inside = true;
    for (struct op *op = c->ops, *next; !c->dead && !c->failing && op; op = next) {
        next = op->next;
        if (!op->deadline_ms || c->paused || now < op->deadline_ms) {
            more |= op->deadline_ms != 0;
            continue;
        }
        struct orch_err err;
        if (op->kind == EXEC) {
            orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT,
                          "the guest agent does not answer: a command's time-out passed %d ms ago",
                          EXEC_GRACE_MS);
            fail(c, &err);
            break;
        }
        orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT,
                      "the guest agent does not answer: nothing of %s came for %d ms",
                      ((struct orch_fileop *)op)->path, FILEOP_IDLE_MS);
        send_frame(c, op->id, ORCH_WIRE_DROP, NULL, 0);
        op_end(op, NULL, &err); /* may have ended others: look from the start at the next tick */
        more = true;
        break;
    }
    c->ticking = more && !c->dead && !c->failing;
    if (c->ticking)
        orch_timer_set(c->tick, TICK_MS);
    leave(c);
}

/* ---- the host's verbs ---- */

struct orch_channel *orch_channel_new(struct orch_loop *l, int fd, const struct orch_channel_cb *cb)
{
    struct orch_channel *c = orch_xcalloc(1, sizeof *c);
    c->loop = l;
    c->cb = *cb;
    c->fd = fd;
    c->tick = orch_timer_new(l, on_tick, c);
    c->watch = orch_watch_new(l, fd, ORCH_READ, on_ready, c);
    return c;
}

size_t orch_channel_queued(const struct orch_channel *c)
{
    return c->out.n - c->out_off;
}

void orch_channel_restore(struct orch_channel *c, const uint8_t epoch[16])
{
    struct orch_wire_restore r;
    struct timespec t;
    memcpy(c->epoch, epoch, 16);
    memcpy(r.epoch, epoch, 16);
    orch_random(r.entropy, sizeof r.entropy);
    clock_gettime(CLOCK_REALTIME, &t);
    r.realtime_ns = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    c->restoring = true;
    send_frame(c, 0, ORCH_WIRE_RESTORE, &r, sizeof r);
    explicit_bzero(&r, sizeof r);
}

void orch_channel_pause(struct orch_channel *c, bool paused)
{
    if (c->paused == paused)
        return;
    c->paused = paused;
    if (paused)
        c->paused_at_ms = orch_loop_now_ms(c->loop);
    else
        for (struct op *op = c->ops; op; op = op->next)
            if (op->deadline_ms)
                op->deadline_ms += orch_loop_now_ms(c->loop) - c->paused_at_ms;
    watch_update(c);
}

static uint32_t count(const char *const *list)
{
    uint32_t n = 0;
    while (list && list[n])
        n++;
    return n;
}

static void add_strings(struct orch_buf *b, const char *const *list)
{
    for (; list && *list; list++)
        orch_buf_add(b, *list, strlen(*list) + 1);
}

struct orch_exec *orch_exec_start(struct orch_channel *c, const struct orch_exec_opts *o,
                                  struct orch_err *err)
{
    struct orch_wire_exec w = {
        .flags = (o->pty ? ORCH_WIRE_EXEC_PTY : 0) | (o->stdin_open ? ORCH_WIRE_EXEC_STDIN : 0) |
                 (o->no_aslr ? ORCH_WIRE_EXEC_NO_ASLR : 0),
        .n_argv = count(o->argv),
        .n_env = count(o->env),
        .timeout_ms = o->timeout_ms > UINT32_MAX ? UINT32_MAX : (uint32_t)o->timeout_ms,
        .max_output = o->max_output,
    };
    if (!w.n_argv) {
        orch_err_set(err, EINVAL, "a command needs at least one word");
        return NULL;
    }
    if (c->n_execs >= MAX_EXECS || orch_channel_queued(c) > QUEUE_HARD / 2) {
        orch_err_setc(
            err, ORCH_CLASS_LIMIT, EBUSY,
            "the microVM is busy: %d commands run in it (at most %d), %zu bytes wait to be sent",
            c->n_execs, MAX_EXECS, orch_channel_queued(c));
        return NULL;
    }
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_add(&b, &w, sizeof w);
    add_strings(&b,
                (const char *const[]){ o->cwd ? o->cwd : "", o->user ? o->user : "1000", NULL });
    add_strings(&b, o->argv);
    add_strings(&b, o->env);
    if (b.n > ORCH_WIRE_MAX) {
        orch_err_setc(err, ORCH_CLASS_LIMIT, E2BIG,
                      "the command with its environment has %zu bytes, at most %d fit: pass data "
                      "by stdin or in a file",
                      b.n, ORCH_WIRE_MAX);
        return NULL;
    }
    struct orch_exec *x = orch_xcalloc(1, sizeof *x);
    x->stdin_open = o->stdin_open;
    x->pty = o->pty;
    x->max_output = o->max_output;
    x->sent_us = orch_now_us();
    x->output = o->output;
    x->drained = o->drained;
    x->done = o->done;
    x->ud = o->ud;
    op_add(c, &x->op, EXEC);
    if (w.timeout_ms)
        deadline_set(&x->op, (int64_t)w.timeout_ms + EXEC_GRACE_MS);
    send_frame(c, x->op.id, ORCH_WIRE_EXEC, b.p, b.n);
    return x;
}

size_t orch_exec_write(struct orch_exec *x, const void *p, size_t n)
{
    return x->stdin_open ? send_bytes(&x->op, ORCH_WIRE_STDIN, p, n) : 0;
}

void orch_exec_close_stdin(struct orch_exec *x)
{
    if (x->stdin_open)
        send_frame(x->op.c, x->op.id, ORCH_WIRE_STDIN, NULL, 0);
    x->stdin_open = false;
}

void orch_exec_signal(struct orch_exec *x, int signo)
{
    uint32_t s = (uint32_t)signo;
    send_frame(x->op.c, x->op.id, ORCH_WIRE_SIGNAL, &s, sizeof s);
}

void orch_exec_resize(struct orch_exec *x, int rows, int cols)
{
    uint16_t size[2] = { (uint16_t)rows, (uint16_t)cols };
    if (x->pty)
        send_frame(x->op.c, x->op.id, ORCH_WIRE_RESIZE, size, sizeof size);
}

static void op_drop(struct op *op)
{
    send_frame(op->c, op->id, ORCH_WIRE_DROP, NULL, 0);
    op_detach(op);
    op_free(op);
}

void orch_exec_drop(struct orch_exec *x)
{
    op_drop(&x->op);
}

static struct orch_fileop *fileop_start(struct orch_channel *c, enum kind kind, const char *path,
                                        const struct orch_wire_file *w, orch_fileop_fn *done,
                                        void *ud)
{
    static const enum orch_wire_type type[] = {
        [WRITE_FILE] = ORCH_WIRE_WRITE, [READ_FILE] = ORCH_WIRE_READ, [LIST_DIR] = ORCH_WIRE_LIST
    };
    struct orch_fileop *f = orch_xcalloc(1, sizeof *f);
    cleanup_buf struct orch_buf b = { 0 };
    f->path = orch_xstrdup(path);
    f->done = done;
    f->ud = ud;
    op_add(c, &f->op, kind);
    if (w)
        orch_buf_add(&b, w, sizeof *w);
    orch_buf_add(&b, path, strnlen(path, PATH_SENT));
    deadline_set(&f->op, FILEOP_IDLE_MS);
    send_frame(c, f->op.id, type[kind], b.p, b.n);
    return f;
}

struct orch_fileop *orch_channel_write_file(struct orch_channel *c, const char *path,
                                            struct orch_slice data, mode_t mode,
                                            orch_fileop_fn *done, void *ud)
{
    struct orch_wire_file w = { .mode = mode & 07777, .uid = 1000 };
    struct orch_fileop *f = fileop_start(c, WRITE_FILE, path, &w, done, ud);
    orch_buf_add(&f->data, data.p, data.n);
    fileop_send(f);
    return f;
}

struct orch_fileop *orch_channel_read_file(struct orch_channel *c, const char *path,
                                           uint64_t offset, uint64_t length, size_t max,
                                           orch_fileop_fn *done, void *ud)
{
    struct orch_wire_file w = { .offset = offset, .length = length };
    struct orch_fileop *f = fileop_start(c, READ_FILE, path, &w, done, ud);
    f->length = length;
    f->max = max;
    return f;
}

struct orch_fileop *orch_channel_list_dir(struct orch_channel *c, const char *path,
                                          orch_fileop_fn *done, void *ud)
{
    struct orch_fileop *f = fileop_start(c, LIST_DIR, path, NULL, done, ud);
    f->max = LIST_MAX;
    return f;
}

void orch_fileop_drop(struct orch_fileop *f)
{
    op_drop(&f->op);
}
