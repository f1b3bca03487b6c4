/* core/vm/channel: the host's end of the guest agent's protocol, against a guest that this file
 * plays. */
#include "guest/wire.h"
#include "vm/channel.h"

#include <errno.h>
#include <linux/sockios.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cmocka.h>

#define WAIT_MS 60000

struct rig {
    struct orch_loop *loop;
    struct orch_channel *c;
    int guest;
    int hellos, fails, done, file_done, drained;
    uint8_t epoch[16];
    struct orch_err err; /* of failed */
    struct orch_exec_result result;
    struct orch_err done_err, file_err;
    struct orch_buf out[2], file;
    char order[16]; /* d: exec done, f: file operation done, F: channel failed */
    bool free_in_hello, free_in_output, free_in_done, free_in_failed, drop_in_output, end_later;
    struct orch_exec *exec;
};

static void note(struct rig *r, char what)
{
    size_t n = strlen(r->order);
    if (n + 1 < sizeof r->order)
        r->order[n] = what;
}

static void rig_free_channel(struct rig *r)
{
    orch_channel_free(r->c);
    r->c = NULL;
}

static void on_hello(void *ud, const uint8_t epoch[16])
{
    struct rig *r = ud;
    r->hellos++;
    memcpy(r->epoch, epoch, 16);
    if (r->free_in_hello)
        rig_free_channel(r);
}

static void on_failed(void *ud, const struct orch_err *err)
{
    struct rig *r = ud;
    r->fails++;
    r->err = *err;
    note(r, 'F');
    if (r->free_in_failed)
        rig_free_channel(r);
    else if (!r->end_later)
        orch_channel_end(r->c, err);
}

static void on_output(void *ud, int stream, struct orch_slice bytes)
{
    struct rig *r = ud;
    orch_buf_slice(&r->out[stream - 1], bytes);
    if (r->free_in_output)
        rig_free_channel(r);
    if (r->drop_in_output)
        orch_exec_drop(r->exec);
}

static void on_drained(void *ud)
{
    ((struct rig *)ud)->drained++;
}

static void on_done(void *ud, const struct orch_exec_result *res, const struct orch_err *err)
{
    struct rig *r = ud;
    r->done++;
    assert_true(!res != !err);
    if (res)
        r->result = *res;
    else
        r->done_err = *err;
    note(r, 'd');
    if (r->free_in_done)
        rig_free_channel(r);
}

static void on_file(void *ud, struct orch_slice data, const struct orch_err *err)
{
    struct rig *r = ud;
    r->file_done++;
    r->file.n = 0;
    if (err)
        r->file_err = *err;
    else
        orch_buf_add(&r->file, data.p ? data.p : "", data.n);
    note(r, 'f');
}

static void rig_init(struct rig *r)
{
    int p[2];
    struct orch_err err;
    *r = (struct rig){ 0 };
    r->loop = orch_loop_new(&err);
    assert_non_null(r->loop);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, p), 0);
    r->guest = p[1];
    r->c = orch_channel_new(r->loop, p[0], &(struct orch_channel_cb){ on_hello, on_failed, r });
}

static void rig_fini(struct rig *r)
{
    orch_channel_free(r->c);
    close(r->guest);
    orch_loop_free(r->loop);
    orch_buf_free(&r->out[0]);
    orch_buf_free(&r->out[1]);
    orch_buf_free(&r->file);
}

/* Turns the loop until *n reaches `want`. */
static void run_until(struct rig *r, const int *n, int want)
{
    int64_t end = orch_now_us() + WAIT_MS * 1000;
    while (*n < want && orch_now_us() < end)
        orch_loop_step(r->loop, 50);
    assert_true(*n >= want);
}

/* Turns the loop until everything that the guest sent was read. */
static void run_read(struct rig *r)
{
    int64_t end = orch_now_us() + WAIT_MS * 1000;
    int unread = 1;
    while (unread && orch_now_us() < end) {
        orch_loop_step(r->loop, 10);
        assert_int_equal(ioctl(r->guest, SIOCOUTQ, &unread), 0);
    }
    assert_int_equal(unread, 0);
}

static void guest_bytes(struct rig *r, const void *p, size_t n)
{
    for (size_t off = 0; off < n;) {
        ssize_t k = send(r->guest, (const char *)p + off, n - off, MSG_NOSIGNAL);
        if (k < 0 && errno == EPIPE)
            return;
        if (k < 0)
            assert_int_equal(errno, EAGAIN);
        off += k > 0 ? (size_t)k : 0;
        if (k < 0)
            orch_loop_step(r->loop, 10);
    }
}

static void guest_frame(struct rig *r, uint8_t type, uint32_t id, const void *p, size_t n)
{
    struct orch_wire_head h = { .len = (uint32_t)n, .id = id, .type = type };
    char b[sizeof h + ORCH_WIRE_MAX];
    memcpy(b, &h, sizeof h);
    if (n)
        memcpy(b + sizeof h, p, n);
    guest_bytes(r, b, sizeof h + n);
}

static void guest_hello(struct rig *r, const uint8_t *epoch)
{
    struct orch_wire_hello m = { .version = ORCH_WIRE_VERSION };
    if (epoch)
        memcpy(m.epoch, epoch, 16);
    guest_frame(r, ORCH_WIRE_HELLO, 0, &m, sizeof m);
}

static void guest_started(struct rig *r, uint32_t id)
{
    uint32_t pid = 100;
    guest_frame(r, ORCH_WIRE_STARTED, id, &pid, 4);
}

static void guest_exit(struct rig *r, uint32_t id, int status)
{
    struct orch_wire_exit e = { .status = status };
    guest_frame(r, ORCH_WIRE_EXIT, id, &e, sizeof e);
}

/* The next frame the host sent; its payload (at most ORCH_WIRE_MAX) into `p` and its length as the
 * result. */
static size_t guest_recv(struct rig *r, struct orch_wire_head *h, void *p)
{
    size_t got = 0, want = sizeof *h;
    char b[sizeof *h + ORCH_WIRE_MAX];
    int64_t end = orch_now_us() + WAIT_MS * 1000;
    while (got < want && orch_now_us() < end) {
        ssize_t n = recv(r->guest, b + got, want - got, 0);
        if (n < 0)
            orch_loop_step(r->loop, 10);
        got += n > 0 ? (size_t)n : 0;
        if (got == sizeof *h) {
            memcpy(h, b, sizeof *h);
            want = sizeof *h + h->len;
        }
    }
    assert_int_equal(got, want);
    if (p)
        memcpy(p, b + sizeof *h, h->len);
    return h->len;
}

static struct orch_exec *start(struct rig *r, struct orch_exec_opts o)
{
    static const char *const argv[] = { "true", NULL };
    struct orch_err err;
    o.argv = o.argv ? o.argv : argv;
    o.output = on_output;
    o.drained = on_drained;
    o.done = on_done;
    o.ud = r;
    struct orch_exec *x = orch_exec_start(r->c, &o, &err);
    assert_non_null(x);
    return x;
}

/* ---- what works */

static void test_exec(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    run_until(&r, &r.hellos, 1);
    const char *const argv[] = { "echo", "a b", "", NULL }, *const env[] = { "A=1", "B=", NULL };
    start(&r, (struct orch_exec_opts){ .argv = argv,
                                       .env = env,
                                       .cwd = "/x",
                                       .user = "root",
                                       .timeout_ms = 1500,
                                       .max_output = 77,
                                       .pty = true,
                                       .no_aslr = true });
    struct orch_wire_head h;
    struct orch_wire_exec w;
    char b[ORCH_WIRE_MAX];
    size_t n = guest_recv(&r, &h, b);
    assert_int_equal(h.type, ORCH_WIRE_EXEC);
    assert_int_equal(h.id, 1);
    memcpy(&w, b, sizeof w);
    assert_int_equal(w.flags, ORCH_WIRE_EXEC_PTY | ORCH_WIRE_EXEC_NO_ASLR);
    assert_int_equal(w.n_argv, 3);
    assert_int_equal(w.n_env, 2);
    assert_int_equal(w.timeout_ms, 1500);
    assert_int_equal(w.max_output, 77);
    static const char strings[] = "/x\0root\0echo\0a b\0\0A=1\0B=";
    assert_int_equal(n - sizeof w, sizeof strings);
    assert_memory_equal(b + sizeof w, strings, sizeof strings);

    guest_started(&r, 1);
    guest_frame(&r, ORCH_WIRE_STDOUT, 1, "one", 3);
    struct orch_wire_exit e = { .status = -1,
                                .signal = 15,
                                .flags = ORCH_WIRE_EXIT_TIMED_OUT | ORCH_WIRE_EXIT_CUT_STDERR,
                                .dropped_stderr = 5 };
    guest_frame(&r, ORCH_WIRE_EXIT, 1, &e, sizeof e);
    run_until(&r, &r.done, 1);
    assert_int_equal(r.out[0].n, 3);
    assert_int_equal(r.result.signal, 15);
    assert_int_equal(r.result.status, -1);
    assert_true(r.result.timed_out && r.result.cut_stderr && !r.result.cut_stdout);
    assert_int_equal(r.result.dropped_stderr, 5);
    assert_true(r.result.ms >= 0);

    start(&r, (struct orch_exec_opts){ 0 });
    e = (struct orch_wire_exit){ .fail = ORCH_WIRE_FAIL_NOT_FOUND,
                                 .sys_errno = ENOENT,
                                 .status = 127 };
    guest_frame(&r, ORCH_WIRE_EXIT, 2, &e, sizeof e);
    run_until(&r, &r.done, 2);
    assert_int_equal(r.result.fail, ORCH_WIRE_FAIL_NOT_FOUND);
    assert_int_equal(r.result.sys_errno, ENOENT);
    assert_int_equal(r.fails, 0);
    rig_fini(&r);
}

static void test_one_byte_at_a_time(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    start(&r, (struct orch_exec_opts){ 0 });
    struct {
        struct orch_wire_head h0;
        struct orch_wire_hello hello;
        struct orch_wire_head h1;
        uint32_t pid;
        struct orch_wire_head h2;
        struct orch_wire_exit exit;
    } __attribute__((packed)) all = {
        { .len = sizeof all.hello, .type = ORCH_WIRE_HELLO },
        { .version = ORCH_WIRE_VERSION },
        { .len = 4, .id = 1, .type = ORCH_WIRE_STARTED },
        5,
        { .len = sizeof all.exit, .id = 1, .type = ORCH_WIRE_EXIT },
        { .status = 3 },
    };
    for (size_t i = 0; i < sizeof all; i++) {
        assert_int_equal(r.done, 0);
        guest_bytes(&r, (char *)&all + i, 1);
        orch_loop_step(r.loop, WAIT_MS);
    }
    run_until(&r, &r.done, 1);
    assert_int_equal(r.hellos, 1);
    assert_int_equal(r.result.status, 3);
    rig_fini(&r);
}

static void test_restore(void **state)
{
    (void)state;
    struct rig r;
    struct orch_wire_head h;
    struct orch_wire_restore a, b;
    uint8_t epoch[16] = "fifteen letters";
    rig_init(&r);
    orch_channel_restore(r.c, epoch);
    assert_int_equal(guest_recv(&r, &h, &a), sizeof a);
    assert_int_equal(h.type, ORCH_WIRE_RESTORE);
    assert_memory_equal(a.epoch, epoch, 16);
    assert_true(a.realtime_ns > 1700000000LL * 1000000000);
    assert_int_equal(r.hellos, 0);
    guest_hello(&r, epoch);
    run_until(&r, &r.hellos, 1);
    assert_memory_equal(r.epoch, epoch, 16);
    rig_fini(&r);

    rig_init(&r);
    orch_channel_restore(r.c, epoch);
    guest_recv(&r, &h, &b);
    assert_memory_not_equal(a.entropy, b.entropy, sizeof a.entropy);
    epoch[0] ^= 1;
    guest_hello(&r, epoch);
    run_until(&r, &r.fails, 1);
    assert_non_null(strstr(r.err.msg, "protocol error: "));
    assert_int_equal(r.hellos, 0);
    rig_fini(&r);
}

static void test_stdin_window(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    struct orch_exec *x = start(&r, (struct orch_exec_opts){ .stdin_open = true });
    guest_started(&r, 1);
    run_until(&r, &r.hellos, 1);
    cleanup_free char *data = orch_xcalloc(1, 1 << 20);
    for (size_t i = 0; i < 1 << 20; i++)
        data[i] = (char)(i * 31 >> 3);
    assert_int_equal(orch_exec_write(x, data, 1 << 20), ORCH_WIRE_WINDOW);
    assert_int_equal(orch_exec_write(x, data, 1), 0);
    assert_int_equal(r.drained, 0);

    size_t sent = ORCH_WIRE_WINDOW, got = 0;
    struct orch_wire_head h;
    cleanup_free char *b = orch_xmalloc(ORCH_WIRE_MAX);
    guest_recv(&r, &h, b);
    assert_int_equal(h.type, ORCH_WIRE_EXEC);
    while (true) {
        size_t n = guest_recv(&r, &h, b);
        assert_int_equal(h.type, ORCH_WIRE_STDIN);
        if (!n)
            break;
        assert_memory_equal(b, data + got, n);
        got += n;
        uint32_t credit = (uint32_t)n;
        int before = r.drained;
        guest_frame(&r, ORCH_WIRE_CREDIT, 1, &credit, 4);
        if (sent < 1 << 20) {
            run_until(&r, &r.drained, before + 1);
            sent += orch_exec_write(x, data + sent, (1 << 20) - sent);
            if (sent == 1 << 20)
                orch_exec_close_stdin(x);
        }
    }
    assert_int_equal(got, 1 << 20);
    assert_int_equal(orch_exec_write(x, data, 1), 0); /* after the end */
    rig_fini(&r);
}

static void test_write_file(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    cleanup_free char *data = orch_xcalloc(1, 700000), *b = orch_xmalloc(ORCH_WIRE_MAX);
    memset(data, 'x', 700000);
    orch_channel_write_file(r.c, "/tmp/f", (struct orch_slice){ data, 700000 }, 0640, on_file, &r);
    memset(data, 0, 700000); /* it was copied */
    struct orch_wire_head h;
    struct orch_wire_file w;
    assert_int_equal(guest_recv(&r, &h, b), sizeof w + 6);
    assert_int_equal(h.type, ORCH_WIRE_WRITE);
    memcpy(&w, b, sizeof w);
    assert_int_equal(w.mode, 0640);
    assert_int_equal(w.uid, 1000);
    assert_memory_equal(b + sizeof w, "/tmp/f", 6);
    size_t got = 0;
    for (size_t n; (n = guest_recv(&r, &h, b)); got += n) {
        assert_int_equal(h.type, ORCH_WIRE_DATA);
        assert_int_equal(b[n - 1], 'x');
        uint32_t credit = (uint32_t)n;
        guest_frame(&r, ORCH_WIRE_CREDIT, 1, &credit, 4);
    }
    assert_int_equal(got, 700000);
    struct orch_wire_done d = { .bytes = 700000 };
    guest_frame(&r, ORCH_WIRE_DONE, 1, &d, sizeof d);
    run_until(&r, &r.file_done, 1);
    assert_int_equal(r.file_err.code, 0);

    orch_channel_write_file(r.c, "/proc/f", (struct orch_slice){ NULL, 0 }, 0640, on_file, &r);
    d = (struct orch_wire_done){ .sys_errno = EROFS };
    guest_frame(&r, ORCH_WIRE_DONE, 2, &d, sizeof d);
    run_until(&r, &r.file_done, 2);
    assert_int_equal(r.file_err.code, EROFS);
    assert_string_equal(r.file_err.msg, "cannot write /proc/f in the guest: Read-only file system");
    assert_int_equal(r.fails, 0);
    rig_fini(&r);
}

static void test_read_and_list(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    orch_channel_read_file(r.c, "/f", 5, 0, 1000, on_file, &r);
    guest_frame(&r, ORCH_WIRE_DATA, 1, "ab\0c", 4);
    guest_frame(&r, ORCH_WIRE_DATA, 1, "d", 1);
    struct orch_wire_done d = { .bytes = 5 };
    guest_frame(&r, ORCH_WIRE_DONE, 1, &d, sizeof d);
    run_until(&r, &r.file_done, 1);
    assert_int_equal(r.file.n, 5);
    assert_memory_equal(r.file.p, "ab\0cd", 5);

    static const char entries[] = "f 0644 12 1700000000 a b\0d 1777 0 -1 \xff";
    orch_channel_list_dir(r.c, "/", on_file, &r);
    guest_frame(&r, ORCH_WIRE_DATA, 2, entries, sizeof entries);
    d.bytes = sizeof entries;
    guest_frame(&r, ORCH_WIRE_DONE, 2, &d, sizeof d);
    run_until(&r, &r.file_done, 2);
    assert_int_equal(r.file.n, sizeof entries);
    assert_int_equal(r.fails, 0);

    orch_channel_read_file(r.c, "/f", 0, 0, 10, on_file, &r);
    orch_fileop_drop(orch_channel_list_dir(r.c, "/", on_file, &r));
    guest_frame(&r, ORCH_WIRE_DATA, 4, entries, sizeof entries); /* was on its way */
    guest_frame(&r, ORCH_WIRE_DATA, 3, "01234567890", 11);
    run_until(&r, &r.file_done, 3);
    assert_int_equal(r.file_err.cls, ORCH_CLASS_LIMIT);
    struct orch_wire_head h;
    char b[ORCH_WIRE_MAX];
    int drops = 0;
    while (drops < 2) {
        guest_recv(&r, &h, b);
        drops += h.type == ORCH_WIRE_DROP;
    }
    assert_int_equal(h.id, 3);
    assert_int_equal(r.fails, 0);
    rig_fini(&r);
}

/* ---- limits */

static void test_refused(void **state)
{
    (void)state;
    struct rig r;
    struct orch_err err;
    rig_init(&r);
    cleanup_free char *big = orch_xcalloc(1, ORCH_WIRE_MAX + 1);
    memset(big, 'a', ORCH_WIRE_MAX);
    const char *const argv[] = { "echo", big, NULL }, *const none[] = { NULL };
    assert_null(orch_exec_start(r.c,
                                &(struct orch_exec_opts){ .argv = argv, .done = on_done, .ud = &r },
                                &err));
    assert_int_equal(err.code, E2BIG);
    assert_null(orch_exec_start(r.c,
                                &(struct orch_exec_opts){ .argv = none, .done = on_done, .ud = &r },
                                &err));
    assert_int_equal(err.code, EINVAL);
    for (int i = 0; i < 256; i++)
        start(&r, (struct orch_exec_opts){ 0 });
    const char *const one[] = { "true", NULL };
    assert_null(orch_exec_start(r.c,
                                &(struct orch_exec_opts){ .argv = one, .done = on_done, .ud = &r },
                                &err));
    assert_int_equal(err.code, EBUSY);
    guest_hello(&r, NULL);
    guest_started(&r, 7);
    guest_exit(&r, 7, 0);
    run_until(&r, &r.done, 1);
    start(&r, (struct orch_exec_opts){ 0 });
    close(r.guest);
    run_until(&r, &r.done, 257);
    r.done_err.cls = 0;
    assert_non_null(
        orch_exec_start(r.c, &(struct orch_exec_opts){ .argv = one, .done = on_done, .ud = &r },
                        &err));
    orch_channel_read_file(r.c, "/f", 0, 0, 10, on_file, &r);
    assert_int_equal(r.done + r.file_done, 257); /* never from inside the call */
    run_until(&r, &r.file_done, 1);
    run_until(&r, &r.done, 258);
    assert_int_equal(r.file_err.cls, ORCH_CLASS_CLOSED);
    assert_int_equal(r.done_err.cls, ORCH_CLASS_CLOSED);
    assert_int_equal(r.fails, 1);
    r.guest = -1;
    rig_fini(&r);
}

static void test_guest_that_does_not_read(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    cleanup_free char *data = orch_xcalloc(1, 1 << 20);
    struct orch_exec *x[64];
    size_t taken = 0;
    for (int i = 0; i < 64; i++) {
        x[i] = start(&r, (struct orch_exec_opts){ .stdin_open = true });
        taken += orch_exec_write(x[i], data, 1 << 20);
    }
    assert_true(taken >= 1 << 20 && taken < 3 << 20);
    assert_true(orch_channel_queued(r.c) < 2 << 20);
    int i;
    for (i = 0; i < 1000000 && !r.fails; i++) {
        orch_exec_signal(x[i % 64], 10);
        assert_true(orch_channel_queued(r.c) < 5 << 20);
        if (i % 10000 == 0)
            orch_loop_step(r.loop, 0);
    }
    assert_int_equal(r.fails, 1);
    assert_non_null(strstr(r.err.msg, "does not read"));
    assert_int_equal(r.done, 64);
    rig_fini(&r);
}

/* Refused because of the queue, not of its own window: told when the queue has room. */
static void test_starved_are_woken(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    cleanup_free char *data = orch_xcalloc(1, 1 << 20);
    struct orch_exec *last = NULL;
    size_t taken = 1;
    while (taken) {
        last = start(&r, (struct orch_exec_opts){ .stdin_open = true });
        taken = orch_exec_write(last, data, ORCH_WIRE_WINDOW);
    }
    struct orch_wire_head h;
    int64_t end = orch_now_us() + WAIT_MS * 1000;
    while (!r.drained && orch_now_us() < end)
        guest_recv(&r, &h, NULL);
    assert_true(r.drained > 0);
    assert_int_equal(orch_exec_write(last, data, 100), 100);
    rig_fini(&r);
}

static void test_flood_keeps_memory(void **state)
{
    (void)state;
    struct rig r;
    struct rusage before, after;
    rig_init(&r);
    guest_hello(&r, NULL);
    start(&r, (struct orch_exec_opts){ 0 });
    guest_started(&r, 1);
    run_until(&r, &r.hellos, 1);
    orch_channel_list_dir(r.c, "/", on_file, &r);
    getrusage(RUSAGE_SELF, &before);
    char b[ORCH_WIRE_MAX];
    memset(b, 'x', sizeof b);
    for (int i = 0; i < 1024; i++) { /* 64 MiB for an operation that has ended */
        if (i == 1) {
            guest_exit(&r, 1, 0);
            run_until(&r, &r.done, 1);
        }
        guest_frame(&r, ORCH_WIRE_STDOUT, 1, b, sizeof b);
    }
    static const char entry[] = "f 0644 1 1 a";
    size_t n = 0;
    while (n + sizeof entry <= sizeof b) {
        memcpy(b + n, entry, sizeof entry);
        n += sizeof entry;
    }
    for (int i = 0; i < 1024 && !r.file_done; i++)
        guest_frame(&r, ORCH_WIRE_DATA, 2, b, n);
    run_until(&r, &r.file_done, 1);
    assert_int_equal(r.file_err.cls, ORCH_CLASS_LIMIT);
    getrusage(RUSAGE_SELF, &after);
    assert_int_equal(r.out[0].n, ORCH_WIRE_MAX);
    /* the list's 8 MiB, grown by doubling, under ASAN */
    assert_true(after.ru_maxrss - before.ru_maxrss < 40 * 1024);
    assert_int_equal(r.fails, 0);
    rig_fini(&r);
}

static void test_pause(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    start(&r, (struct orch_exec_opts){ 0 });
    guest_started(&r, 1);
    run_until(&r, &r.hellos, 1);
    run_read(&r);
    orch_channel_pause(r.c, true);
    guest_frame(&r, ORCH_WIRE_STDOUT, 1, "x", 1);
    for (int i = 0; i < 5; i++)
        orch_loop_step(r.loop, 1);
    assert_int_equal(r.out[0].n, 0);
    orch_channel_pause(r.c, false);
    guest_exit(&r, 1, 0);
    run_until(&r, &r.done, 1);
    assert_int_equal(r.out[0].n, 1);
    rig_fini(&r);
}

/* ---- ends */

static void test_end_of_file(void **state)
{
    (void)state;
    struct rig r;
    rig_init(&r);
    guest_hello(&r, NULL);
    start(&r, (struct orch_exec_opts){ 0 });
    orch_channel_read_file(r.c, "/f", 0, 0, 10, on_file, &r);
    guest_started(&r, 1);
    guest_frame(&r, ORCH_WIRE_STDOUT, 1, "last words", 10);
    shutdown(r.guest, SHUT_RDWR);
    run_until(&r, &r.done, 1);
    run_until(&r, &r.file_done, 1);
    assert_int_equal(r.out[0].n, 10);
    assert_int_equal(r.done_err.cls, ORCH_CLASS_CLOSED);
    assert_int_equal(r.err.cls, ORCH_CLASS_CLOSED);
    assert_int_equal(strlen(r.order), 3);
    assert_int_equal(r.order[0], 'F');
    orch_loop_step(r.loop, 0);
    assert_int_equal(r.fails, 1);
    rig_fini(&r);
}

/* Why it failed is the owner's to say, and he may say it later, or before anything failed. */
static void test_end(void **state)
{
    (void)state;
    for (int by_owner = 0; by_owner < 2; by_owner++) {
        struct rig r;
        struct orch_err why;
        rig_init(&r);
        r.end_later = true;
        guest_hello(&r, NULL);
        start(&r, (struct orch_exec_opts){ 0 });
        orch_channel_list_dir(r.c, "/", on_file, &r);
        run_until(&r, &r.hellos, 1);
        if (!by_owner) {
            shutdown(r.guest, SHUT_RDWR);
            run_until(&r, &r.fails, 1);
            start(&r, (struct orch_exec_opts){ .stdin_open = true });
            for (int i = 0; i < 5; i++)
                orch_loop_step(r.loop, 1);
            assert_string_equal(r.order, "F");
        }
        orch_err_setc(&why, ORCH_CLASS_TIMEOUT, ETIMEDOUT, "its time is over");
        orch_channel_end(r.c, &why);
        assert_int_equal(r.done + r.file_done, 0); /* never from inside the call */
        run_until(&r, &r.done, by_owner ? 1 : 2);
        run_until(&r, &r.file_done, 1);
        assert_string_equal(r.done_err.msg, "its time is over");
        assert_string_equal(r.file_err.msg, "its time is over");
        assert_int_equal(r.file_err.cls, ORCH_CLASS_TIMEOUT);
        guest_started(&r, 1);
        close(r.guest);
        for (int i = 0; i < 5; i++)
            orch_loop_step(r.loop, 1);
        assert_int_equal(r.fails, by_owner ? 0 : 1);
        r.guest = -1;
        rig_fini(&r);
    }
}

static void test_free_in_callbacks(void **state)
{
    (void)state;
    for (int i = 0; i < 5; i++) {
        struct rig r;
        rig_init(&r);
        r.free_in_hello = i == 0;
        r.free_in_output = i == 1;
        r.free_in_done = i >= 2;
        r.free_in_failed = i == 4;
        struct orch_exec *x = start(&r, (struct orch_exec_opts){ .stdin_open = true });
        start(&r, (struct orch_exec_opts){ 0 });
        orch_channel_list_dir(r.c, "/", on_file, &r);
        orch_exec_write(x, "abc", 3);
        guest_hello(&r, NULL);
        guest_started(&r, 1);
        guest_frame(&r, ORCH_WIRE_STDOUT, 1, "x", 1);
        if (i == 2)
            guest_exit(&r, 1, 0);
        if (i >= 3)
            guest_frame(&r, ORCH_WIRE_EXIT, 1, "", 0); /* fails the channel */
        for (int turn = 0; r.c && turn < 100; turn++)
            orch_loop_step(r.loop, 50);
        assert_null(r.c);
        assert_int_equal(r.fails, i >= 3);
        assert_int_equal(r.done, i == 2 || i == 3);
        orch_loop_step(r.loop, 0);
        rig_fini(&r);
    }
}

static void test_drop(void **state)
{
    (void)state;
    struct rig r;
    struct orch_wire_head h;
    char b[ORCH_WIRE_MAX];
    rig_init(&r);
    guest_hello(&r, NULL);
    r.exec = start(&r, (struct orch_exec_opts){ 0 });
    r.drop_in_output = true;
    guest_started(&r, 1);
    guest_frame(&r, ORCH_WIRE_STDOUT, 1, "x", 1);
    guest_frame(&r, ORCH_WIRE_STDOUT, 1, "y", 1);
    guest_exit(&r, 1, 0);
    guest_recv(&r, &h, b);
    guest_recv(&r, &h, b);
    assert_int_equal(h.type, ORCH_WIRE_DROP);
    assert_int_equal(h.id, 1);
    run_read(&r);
    assert_int_equal(r.out[0].n, 1);
    assert_int_equal(r.done, 0);
    assert_int_equal(r.fails, 0);
    rig_fini(&r);
}

/* ---- a hostile guest */

/* Before the bytes of a case: operations 1 exec (stdin, 10 bytes sent, at most 100 bytes of output;
 * started unless FRESH), 2 exec (started), 3 read of at most 8 bytes, 4 list, 5 write of 300000
 * bytes, 6 exec with a terminal. */
enum { NO_HELLO = 1, FRESH = 2, DROPPED = 4 };

struct hostile {
    const char *name;
    int setup;
    const char *error; /* a part of the message after "protocol error: …"; NULL: ignored */
    size_t n;
    const char *bytes;
};

#define B(s) sizeof(s) - 1, s
#define HEAD(len4, id, type) len4 id "\0\0\0" type "\0\0\0"
#define EXIT(id, fail, status, signal, flags, sys_errno, d1, d2) \
    "\x28\0\0\0" id "\0\0\0\x44\0\0\0" fail "\0\0\0" status signal "\0\0\0" flags \
    "\0\0\0" sys_errno "\0\0\0\0\0\0\0" d1 "\0\0\0\0\0\0\0" d2 "\0\0\0\0\0\0\0"
#define ZERO4 "\0\0\0\0"
#define TEXT10 "0123456789"
#define LIST(len, entry) HEAD(len "\0\0\0", "\4", "\x08") entry

static const struct hostile hostiles[] = {
    { "length 4 GiB - 1", 0, "head", B("\xff\xff\xff\xff\1\0\0\0\x42\0\0\0") },
    { "length 64 KiB + 1", 0, "head", B("\1\0\1\0\1\0\0\0\x42\0\0\0") },
    { "reserved bytes", 0, "head", B("\1\0\0\0\1\0\0\0\x42\0\0\1x") },
    { "type 0", 0, "unknown type 0", B(HEAD(ZERO4, "\1", "\0")) },
    { "a host's type", 0, "unknown type 2", B(HEAD(ZERO4, "\1", "\2")) },
    { "type 71", 0, "unknown type 71", B(HEAD(ZERO4, "\1", "\x47")) },
    { "type 255", 0, "unknown type 255", B(HEAD(ZERO4, "\1", "\xff")) },
    { "STARTED before HELLO", NO_HELLO | FRESH, "before its HELLO",
      B(HEAD("\4\0\0\0", "\1", "\x41") "pid ") },
    { "HELLO of version 2", NO_HELLO | FRESH, "version 2",
      B(HEAD("\x18\0\0\0", "\0", "\x40") "\2\0\0\0" ZERO4 ZERO4 ZERO4 ZERO4 ZERO4) },
    { "HELLO with an epoch at boot", NO_HELLO | FRESH, "not asked for",
      B(HEAD("\x18\0\0\0", "\0", "\x40") "\1\0\0\0" ZERO4 "evil" ZERO4 ZERO4 ZERO4) },
    { "HELLO with an id", NO_HELLO | FRESH, "malformed HELLO",
      B(HEAD("\x18\0\0\0", "\1", "\x40") "\1\0\0\0" ZERO4 ZERO4 ZERO4 ZERO4 ZERO4) },
    { "HELLO too short", NO_HELLO | FRESH, "malformed HELLO",
      B(HEAD("\4\0\0\0", "\0", "\x40") "\1\0\0\0") },
    { "HELLO twice", 0, "not asked for",
      B(HEAD("\x18\0\0\0", "\0", "\x40") "\1\0\0\0" ZERO4 ZERO4 ZERO4 ZERO4 ZERO4) },
    { "STDOUT of id 0", 0, "never used", B(HEAD("\1\0\0\0", "\0", "\x42") "x") },
    { "STDOUT of an id to come", 0, "never used", B(HEAD("\1\0\0\0", "\x07", "\x42") "x") },
    { "EXIT of the largest id", 0, "never used", B(ZERO4 "\xff\xff\xff\xff\x44\0\0\0") },
    { "STARTED twice", 0, "STARTED", B(HEAD("\4\0\0\0", "\1", "\x41") "pid ") },
    { "STARTED too short", FRESH, "STARTED", B(HEAD("\3\0\0\0", "\1", "\x41") "pid") },
    { "STDOUT before STARTED", FRESH, "out of place", B(HEAD("\1\0\0\0", "\1", "\x42") "x") },
    { "empty STDOUT", 0, "out of place", B(HEAD(ZERO4, "\1", "\x42")) },
    { "STDERR of a terminal", 0, "out of place",
      B(HEAD("\4\0\0\0", "\6", "\x41") "pid " HEAD("\1\0\0\0", "\6", "\x43") "x") },
    { "more output than max_output", 0, "more output than the 100",
      B(HEAD("\x65\0\0\0", "\1", "\x42")
            TEXT10 TEXT10 TEXT10 TEXT10 TEXT10 TEXT10 TEXT10 TEXT10 TEXT10 TEXT10 "x") },
    { "EXIT before STARTED", FRESH, "no sense",
      B(EXIT("\1", "\0", ZERO4, "\0", "\0", "\0", "\0", "\0")) },
    { "EXIT of a failed start after STARTED", 0, "no sense",
      B(EXIT("\1", "\1", ZERO4, "\0", "\0", "\2", "\0", "\0")) },
    { "EXIT of a failed start without errno", FRESH, "no sense",
      B(EXIT("\1", "\1", ZERO4, "\0", "\0", "\0", "\0", "\0")) },
    { "EXIT of an unknown failure", FRESH, "no sense",
      B(EXIT("\1", "\x63", ZERO4, "\0", "\0", "\2", "\0", "\0")) },
    { "EXIT too short", 0, "malformed EXIT", B(HEAD("\4\0\0\0", "\1", "\x44") ZERO4) },
    { "EXIT with status 256", 0, "no sense",
      B(EXIT("\1", "\0", "\0\1\0\0", "\0", "\0", "\0", "\0", "\0")) },
    { "EXIT with status -2", 0, "no sense",
      B(EXIT("\1", "\0", "\xfe\xff\xff\xff", "\0", "\0", "\0", "\0", "\0")) },
    { "EXIT with signal 65", 0, "no sense",
      B(EXIT("\1", "\0", "\xff\xff\xff\xff", "\x41", "\0", "\0", "\0", "\0")) },
    { "EXIT with signal and status", 0, "no sense",
      B(EXIT("\1", "\0", ZERO4, "\x09", "\0", "\0", "\0", "\0")) },
    { "EXIT with unknown flags", 0, "no sense",
      B(EXIT("\1", "\0", ZERO4, "\0", "\x10", "\0", "\0", "\0")) },
    { "EXIT that cut nothing", 0, "no sense",
      B(EXIT("\1", "\0", ZERO4, "\0", "\2", "\0", "\0", "\0")) },
    { "EXIT that cut silently", 0, "no sense",
      B(EXIT("\1", "\0", ZERO4, "\0", "\0", "\0", "\0", "\1")) },
    { "EXIT of a file operation", 0, "another kind",
      B(EXIT("\3", "\0", ZERO4, "\0", "\0", "\0", "\0", "\0")) },
    { "STDOUT of a file operation", 0, "another kind", B(HEAD("\1\0\0\0", "\3", "\x42") "x") },
    { "DATA of a command", 0, "another kind", B(HEAD("\1\0\0\0", "\1", "\x08") "x") },
    { "CREDIT for more than was sent", 0, "CREDIT",
      B(HEAD("\4\0\0\0", "\1", "\x45") "\x0b\0\0\0") },
    { "CREDIT of 4 GiB - 1", 0, "CREDIT", B(HEAD("\4\0\0\0", "\1", "\x45") "\xff\xff\xff\xff") },
    { "CREDIT of nothing", 0, "CREDIT", B(HEAD("\4\0\0\0", "\1", "\x45") ZERO4) },
    { "CREDIT twice", 0, "CREDIT",
      B(HEAD("\4\0\0\0", "\1", "\x45") "\x0a\0\0\0" HEAD("\4\0\0\0", "\1", "\x45") "\1\0\0\0") },
    { "CREDIT too long", 0, "CREDIT", B(HEAD("\x08\0\0\0", "\1", "\x45") "\1\0\0\0\1\0\0\0") },
    { "CREDIT of a read", 0, "CREDIT", B(HEAD("\4\0\0\0", "\3", "\x45") "\1\0\0\0") },
    { "DONE of a command", 0, "DONE for a command",
      B(HEAD("\x10\0\0\0", "\1", "\x46") ZERO4 ZERO4 ZERO4 ZERO4) },
    { "DONE of id 0", 0, "malformed DONE",
      B(HEAD("\x10\0\0\0", "\0", "\x46") ZERO4 ZERO4 ZERO4 ZERO4) },
    { "DONE too short", 0, "malformed DONE", B(HEAD("\4\0\0\0", "\3", "\x46") ZERO4) },
    { "DONE with errno 4096", 0, "no sense",
      B(HEAD("\x10\0\0\0", "\3", "\x46") "\0\x10\0\0" ZERO4 ZERO4 ZERO4) },
    { "DONE with other bytes than came", 0, "before the end",
      B(HEAD("\x10\0\0\0", "\3", "\x46") ZERO4 ZERO4 "\1\0\0\0" ZERO4) },
    { "DONE of a write that was not all sent", 0, "before the end",
      B(HEAD("\x10\0\0\0", "\5", "\x46") ZERO4 ZERO4 "\xe0\x93\4\0" ZERO4) },
    { "DATA of a write", 0, "DATA", B(HEAD("\1\0\0\0", "\5", "\x08") "x") },
    { "empty DATA", 0, "DATA", B(HEAD(ZERO4, "\3", "\x08")) },
    { "DATA beyond the length asked for", 0, "more of a file",
      B(HEAD("\x09\0\0\0", "\3", "\x08") "123456789") },
    { "entry of unknown type", 0, "folder entry", B(LIST("\x0d", "x 0644 1 1 a\0")) },
    { "entry without its end", 0, "folder entry", B(LIST("\x0c", "f 0644 1 1 a")) },
    { "entry without a name", 0, "folder entry", B(LIST("\x0c", "f 0644 1 1 \0")) },
    { "entry named ..", 0, "folder entry", B(LIST("\x0e", "f 0644 1 1 ..\0")) },
    { "entry with a slash", 0, "folder entry", B(LIST("\x10", "f 0644 1 1 ../x\0")) },
    { "entry with a mode that is none", 0, "folder entry", B(LIST("\x0d", "f 0648 1 1 a\0")) },
    { "entry with a size of 21 digits", 0, "folder entry",
      B(LIST("\x21", "f 0644 999999999999999999999 1 a\0")) },
    { "entry of two bytes", 0, "folder entry", B(LIST("\2", "f\0")) },
    { "EXIT twice", 0, NULL,
      B(EXIT("\1", "\0", ZERO4, "\0", "\0", "\0", "\0", "\0")
            EXIT("\1", "\0", ZERO4, "\0", "\0", "\0", "\0", "\0")) },
    { "STDOUT after EXIT", 0, NULL,
      B(EXIT("\1", "\0", ZERO4, "\0", "\0", "\0", "\0", "\0") HEAD("\1\0\0\0", "\1", "\x42") "x") },
    { "CREDIT after EXIT", 0, NULL,
      B(EXIT("\1", "\0", ZERO4, "\0", "\0", "\0", "\0", "\0")
            HEAD("\4\0\0\0", "\1", "\x45") "\1\0\0\0") },
    { "DONE twice", 0, NULL,
      B(HEAD("\x10\0\0\0", "\3", "\x46") "\2\0\0\0" ZERO4 ZERO4 ZERO4
            HEAD("\x10\0\0\0", "\3", "\x46") "\2\0\0\0" ZERO4 ZERO4 ZERO4) },
    { "all about a dropped command", DROPPED, NULL,
      B(HEAD("\1\0\0\0", "\1", "\x42") "x" HEAD("\4\0\0\0", "\1",
                                                "\x45") "\1\0\0\0" EXIT("\1", "\0", ZERO4, "\0",
                                                                        "\0", "\0", "\0", "\0")) },
};

static void test_hostile(void **state)
{
    (void)state;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(hostiles); i++) {
        const struct hostile *t = &hostiles[i];
        struct rig r;
        rig_init(&r);
        if (!(t->setup & NO_HELLO))
            guest_hello(&r, NULL);
        struct orch_exec *x = start(&r, (struct orch_exec_opts){ .stdin_open = true,
                                                                 .max_output = 100 });
        assert_int_equal(orch_exec_write(x, "0123456789", 10), 10);
        start(&r, (struct orch_exec_opts){ 0 });
        orch_channel_read_file(r.c, "/f", 0, 8, 1000, on_file, &r);
        orch_channel_list_dir(r.c, "/", on_file, &r);
        cleanup_free char *data = orch_xcalloc(1, 300000);
        orch_channel_write_file(r.c, "/w", (struct orch_slice){ data, 300000 }, 0644, on_file, &r);
        start(&r, (struct orch_exec_opts){ .pty = true });
        if (!(t->setup & (FRESH | NO_HELLO)))
            guest_started(&r, 1);
        if (!(t->setup & NO_HELLO))
            guest_started(&r, 2);
        run_read(&r);
        assert_int_equal(r.fails, 0);
        if (t->setup & DROPPED)
            orch_exec_drop(x);
        int done = r.done;
        /* What comes behind, in the same piece, counts no more after an error. */
        static const char output[] = HEAD("\1\0\0\0", "\2", "\x42") "z";
        cleanup_buf struct orch_buf all = { 0 };
        orch_buf_add(&all, t->bytes, t->n);
        orch_buf_add(&all, output, sizeof output - 1);
        guest_bytes(&r, all.p, all.n);
        if (!t->error)
            guest_exit(&r, 2, 42);
        int64_t end = orch_now_us() + WAIT_MS * 1000;
        while (!r.fails && !(r.done > done && r.result.status == 42) && orch_now_us() < end)
            orch_loop_step(r.loop, 50);
        if (t->error)
            orch_loop_step(r.loop, 0); /* the end is told in the next turn */
        if (t->error && (!r.fails || strncmp(r.err.msg, "protocol error: ", 16) != 0 ||
                         !strstr(r.err.msg, t->error)))
            fail_msg("%s: expected \"protocol error: … %s\", got \"%s\"", t->name, t->error,
                     r.fails ? r.err.msg : "nothing");
        if (!t->error && (r.fails || r.result.status != 42))
            fail_msg("%s: expected to be ignored, got \"%s\"", t->name,
                     r.fails ? r.err.msg : "nothing");
        if (t->error)
            assert_int_equal(r.done + r.file_done, 6); /* everyone was told, once */
        assert_int_equal(r.out[0].n, t->error ? 0 : 1);
        rig_fini(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exec),
        cmocka_unit_test(test_one_byte_at_a_time),
        cmocka_unit_test(test_restore),
        cmocka_unit_test(test_stdin_window),
        cmocka_unit_test(test_write_file),
        cmocka_unit_test(test_read_and_list),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_guest_that_does_not_read),
        cmocka_unit_test(test_starved_are_woken),
        cmocka_unit_test(test_flood_keeps_memory),
        cmocka_unit_test(test_pause),
        cmocka_unit_test(test_end_of_file),
        cmocka_unit_test(test_end),
        cmocka_unit_test(test_free_in_callbacks),
        cmocka_unit_test(test_drop),
        cmocka_unit_test(test_hostile),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
