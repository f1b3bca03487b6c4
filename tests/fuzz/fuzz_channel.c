/* Whatever a guest sends: the channel stays within its memory and tells everybody exactly once. The
 * first byte chooses what the host does meanwhile, the rest is what the guest sends. */
#include "guest/wire.h"
#include "vm/channel.h"

#include <string.h>
#include <sys/socket.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct host {
    struct orch_channel *c;
    int open, fails;
    uint8_t choice;
    size_t output;
};

static void on_hello(void *ud, const uint8_t epoch[16])
{
    struct host *h = ud;
    (void)epoch;
    if (h->fails)
        abort();
}

static void on_failed(void *ud, const struct orch_err *err)
{
    struct host *h = ud;
    if (h->fails++ || !err->msg[0])
        abort();
    orch_channel_end(h->c, err);
}

static void free_channel(struct host *h)
{
    orch_channel_free(h->c);
    h->c = NULL;
    h->open = 0;
}

static void on_output(void *ud, int stream, struct orch_slice bytes)
{
    struct host *h = ud;
    h->output += bytes.n;
    if (h->fails || !bytes.n || (stream != 1 && stream != 2))
        abort();
    if (h->choice & 8)
        free_channel(h);
}

static void on_done(void *ud, const struct orch_exec_result *r, const struct orch_err *err)
{
    struct host *h = ud;
    if (h->open-- <= 0 || !r == !err)
        abort();
    if (h->choice & 16)
        free_channel(h);
}

static void on_file(void *ud, struct orch_slice d, const struct orch_err *err)
{
    struct host *h = ud;
    if (h->open-- <= 0 || (err && d.n))
        abort();
    if (h->choice & 32)
        free_channel(h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const argv[] = { "true", NULL };
    static const uint8_t epoch[16] = "0123456789abcde";
    static const char file[300000];
    struct orch_err err;
    struct host h = { .choice = size ? data[0] : 0 };
    int p[2];
    if (!size || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, p) < 0)
        return 0;
    struct orch_loop *l = orch_loop_new(&err);
    h.c = orch_channel_new(l, p[0], &(struct orch_channel_cb){ on_hello, on_failed, &h });
    if (h.choice & 2)
        orch_channel_restore(h.c, epoch);
    struct orch_exec_opts o = { .argv = argv,
                                .stdin_open = true,
                                .max_output = 64,
                                .output = on_output,
                                .done = on_done,
                                .ud = &h };
    struct orch_exec *x = orch_exec_start(h.c, &o, &err);
    o.pty = true;
    struct orch_exec *dropped = orch_exec_start(h.c, &o, &err);
    orch_exec_write(x, file, 1000);
    orch_channel_read_file(h.c, "/r", 0, 0, 1 << 20, on_file, &h);
    orch_channel_read_file(h.c, "/r", 0, 100, 50, on_file, &h);
    orch_channel_list_dir(h.c, "/", on_file, &h);
    orch_channel_write_file(h.c, "/w",
                            (struct orch_slice){ file, h.choice & 64 ? sizeof file : 10 }, 0644,
                            on_file, &h);
    h.open = 6;
    if (h.choice & 128) {
        orch_exec_drop(dropped);
        h.open--;
    }
    if (h.choice & 1) {
        struct {
            struct orch_wire_head h;
            struct orch_wire_hello m;
        } hello = { { .len = sizeof hello.m, .type = ORCH_WIRE_HELLO },
                    { .version = ORCH_WIRE_VERSION } };
        if (h.choice & 2)
            memcpy(hello.m.epoch, epoch, 16);
        if (send(p[1], &hello, sizeof hello, MSG_NOSIGNAL) != (ssize_t)sizeof hello)
            abort();
    }
    for (size_t off = 1; off < size && h.c && !h.fails;) {
        ssize_t n = send(p[1], data + off, size - off, MSG_NOSIGNAL);
        off += n > 0 ? (size_t)n : 0;
        orch_loop_step(l, 0);
    }
    shutdown(p[1], SHUT_WR);
    for (int i = 0; i < 100 && h.c && (!h.fails || h.open); i++)
        orch_loop_step(l, 0);
    if (h.c && (!h.fails || h.open))
        abort(); /* the end of the stream ends everything */
    if (h.output > size)
        abort();
    orch_channel_free(h.c);
    orch_loop_step(l, 0);
    close(p[1]);
    orch_loop_free(l);
    return 0;
}
