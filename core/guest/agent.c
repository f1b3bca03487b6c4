/* The guest agent: PID 1 of a microVM. Boots the guest's user space (mounts, modules), opens the
 * virtio-serial port and serves the protocol of wire.h until the port closes, then powers off.
 *
 * One thread, one poll loop. What to wait for is worked out anew each turn from the state of the
 * operations, so that "do not read this pipe now" is simply an entry left out. Nothing is buffered
 * without bound: a command's output is read straight into the port's buffer and only when there is
 * room, its stdin is bounded by the host's window, files are moved one frame at a time.
 *
 * Each exec owns a cgroup (reused, never removed), so that its whole tree can be counted and killed
 * whatever the processes do. Without cgroup v2 a supervisor, subreaper of the tree, stands in.
 *
 * `agent --fd N` serves an open socket instead, in a namespace that somebody else furnished: the
 * tests run exactly this program that way. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

bool hosted;
struct op *ops;
unsigned n_ops, n_execs;
struct rlimit nofile;
static int sig_fd = -1;

/* ---- the end ---- */

_Noreturn void power(int how)
{
    sync();
    reboot(how);
    /* in a namespace that may not reboot; as the guest's PID 1 this panics, with the same effect */
    _exit(0);
}

_Noreturn void die(const char *why)
{
    char line[256];
    int n = snprintf(line, sizeof line, "orch agent: %.200s: %m\n", why);
    int fd = hosted ? 2 : open("/dev/kmsg", O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    /* as one piece: the kernel's log cannot be sought, as dprintf wants to */
    if (write(fd, line, (size_t)n) < 0)
        sync();
    power(RB_AUTOBOOT);
}

int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

bool set_nonblock(int fd)
{
    return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0;
}

void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- operations ---- */

struct op *op_find(uint32_t id)
{
    for (struct op *op = ops; op; op = op->next)
        if (op->id == id && !op->dropped)
            return op;
    return NULL;
}

struct op *op_new(uint32_t id, enum kind kind)
{
    struct op *op = calloc(1, sizeof *op);
    if (!op)
        return NULL;
    op->id = id;
    op->kind = kind;
    op->pid = -1;
    op->fail_fd = op->in_fd = op->fd = op->out[0].fd = op->out[1].fd = -1;
    op->next = ops;
    ops = op;
    n_ops++;
    n_execs += kind == EXEC;
    return op;
}

void op_free(struct op *op)
{
    struct op **at = &ops;
    while (*at != op)
        at = &(*at)->next;
    *at = op->next;
    n_ops--;
    n_execs -= op->kind == EXEC;
    if (op->group)
        group_give(op->group);
    close_fd(&op->fail_fd);
    close_fd(&op->in_fd);
    close_fd(&op->out[0].fd);
    close_fd(&op->out[1].fd);
    close_fd(&op->fd);
    if (op->dir)
        closedir(op->dir);
    if (op->temp)
        unlink(op->temp);
    free(op->temp);
    free(op->path);
    free(op->in);
    free(op);
}

/* ---- frames from the host ---- */

/* After this clone's first breath, and before anything in it asks for a random number or the time:
 * else it would share both with every other clone. */
static void restore(const struct orch_wire_restore *r)
{
    struct {
        struct rand_pool_info info;
        uint8_t bytes[sizeof r->entropy];
    } seed = { .info = { .entropy_count = 8 * sizeof r->entropy, .buf_size = sizeof r->entropy } };
    memcpy(seed.info.buf, r->entropy, sizeof r->entropy);
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    bool ok = fd >= 0 && ioctl(fd, RNDADDENTROPY, &seed) == 0 && ioctl(fd, RNDRESEEDCRNG, 0) == 0;
    close_fd(&fd);
    explicit_bzero(&seed, sizeof seed);
    struct timespec t = { r->realtime_ns / 1000000000, r->realtime_ns % 1000000000 };
    ok = clock_settime(CLOCK_REALTIME, &t) == 0 && ok;
    if (!ok && !hosted) /* a test's namespace may do neither */
        die("cannot reseed and set the clock");
    send_hello(r->epoch);
}

static void handle(const struct orch_wire_head *h, const char *b)
{
    struct orch_wire_restore r;
    struct winsize size = { 0 };
    uint32_t signo;
    struct op *op = h->id ? op_find(h->id) : NULL;
    if (!h->id != (h->type == ORCH_WIRE_RESTORE))
        die("protocol error: id");
    switch (h->type) {
    case ORCH_WIRE_RESTORE:
        if (h->len != sizeof r)
            break;
        memcpy(&r, b, sizeof r);
        restore(&r);
        explicit_bzero(&r, sizeof r);
        return;
    case ORCH_WIRE_EXEC:
        exec_frame(h->id, b, h->len);
        return;
    case ORCH_WIRE_WRITE:
        file_frame(h->id, WRITE, b, h->len);
        return;
    case ORCH_WIRE_READ:
        file_frame(h->id, READ, b, h->len);
        return;
    case ORCH_WIRE_LIST:
        file_frame(h->id, LIST, b, h->len);
        return;
    /* The rest is for an operation that may have ended while the frame was on its way. */
    case ORCH_WIRE_STDIN:
        if (op && op->kind != EXEC)
            break;
        if (op)
            stdin_frame(op, b, h->len);
        return;
    case ORCH_WIRE_SIGNAL:
        if (h->len != sizeof signo || (op && op->kind != EXEC))
            break;
        memcpy(&signo, b, sizeof signo);
        if (signo < 1 || signo > 64)
            break;
        if (op)
            tree_signal(op, (int)signo);
        return;
    case ORCH_WIRE_RESIZE:
        if (h->len != 4 || (op && !op->pty))
            break;
        memcpy(&size.ws_row, b, 2);
        memcpy(&size.ws_col, b + 2, 2);
        if (op)
            ioctl(op->out[0].fd, TIOCSWINSZ, &size);
        return;
    case ORCH_WIRE_DATA:
        if (op && op->kind != WRITE)
            break;
        if (op)
            write_data(op, b, h->len);
        return;
    case ORCH_WIRE_DROP:
        if (h->len)
            break;
        if (op && op->kind != EXEC) {
            op_free(op);
        } else if (op) {
            op->dropped = true;
            close_fd(&op->in_fd);
            close_fd(&op->out[0].fd);
            close_fd(&op->out[1].fd);
            tree_kill(op);
        }
        return;
    }
    die("protocol error: frame");
}

/* ---- the loop ---- */

static void reap(void)
{
    struct signalfd_siginfo si;
    while (read(sig_fd, &si, sizeof si) > 0)
        ;
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (struct op *op = ops; op; op = op->next)
            if (op->pid == pid && !op->reaped) {
                op->reaped = true;
                op->status = status;
            }
}

static short watch(struct pollfd *set, nfds_t *n, int fd, short events)
{
    if (fd < 0)
        return -1;
    set[*n] = (struct pollfd){ .fd = fd, .events = events };
    return (short)(*n)++;
}

static void sooner(int64_t *wait, int64_t ms)
{
    if (ms < 0)
        ms = 0;
    if (*wait < 0 || ms < *wait)
        *wait = ms;
}

/* Who came first goes last, so that nobody is served only after the room is gone. */
static void rotate(void)
{
    struct op *first = ops, **end = &ops;
    if (!first || !first->next)
        return;
    while (*end)
        end = &(*end)->next;
    *end = first;
    ops = first->next;
    first->next = NULL;
}

static void turn(void)
{
    static struct pollfd set[3 + 4 * MAX_OPS];
    nfds_t n = 0;
    int64_t wait = -1, now = now_ms();
    bool room = queued() < OUT_DATA;
    watch(set, &n, port, (short)((in_room() ? POLLIN : 0) | (queued() ? POLLOUT : 0)));
    watch(set, &n, sig_fd, POLLIN);
    int pressure = watch(set, &n, pressure_fd, POLLPRI);
    for (struct op *op = ops; op; op = op->next) {
        bool started = op->fail_fd < 0 && !op->reaped;
        op->at[0] = watch(set, &n, op->fail_fd, POLLIN);
        op->at[1] = watch(set, &n, op->in_n || op->in_eof ? op->in_fd : -1, POLLOUT);
        for (int i = 0; i < 2; i++) {
            bool full = op->max_output && op->out[i].sent == op->max_output;
            op->at[2 + i] = watch(set, &n, started && (room || full) ? op->out[i].fd : -1, POLLIN);
        }
        if (op->deadline)
            sooner(&wait, op->deadline - now);
        if (op->reaped ? (op->draining ? room : !op->killing)
                       : room && (op->kind == READ || op->kind == LIST))
            sooner(&wait, 0);
    }
    if (poll(set, n, (int)wait) < 0 && errno != EINTR)
        die("poll");
    if (set[0].revents & (POLLIN | POLLERR | POLLHUP))
        receive();
    now = now_ms();
    if (set[1].revents)
        reap();
    if (pressure >= 0 && set[pressure].revents & POLLPRI)
        pressure_relieve();
    for (struct op *op = ops, *next; op; op = next) {
        next = op->next;
        if (op->kind == EXEC)
            exec_turn(op, now, set);
        else if (op->kind == READ && queued() < OUT_DATA)
            read_turn(op);
        else if (op->kind == LIST && queued() < OUT_DATA)
            list_turn(op);
    }
    each_frame(handle);
    flush();
    rotate();
}

int main(int argc, char **argv)
{
    if (getpid() != 1) {
        fprintf(stderr, "agent: this is the guest agent of orch; it runs as PID 1 in a microVM\n");
        return 2;
    }
    hosted = argc == 3 && strcmp(argv[1], "--fd") == 0;
    if (hosted) {
        port = atoi(argv[2]);
        fcntl(port, F_SETFD, FD_CLOEXEC);
        set_nonblock(port);
    } else {
        boot();
    }
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_SETMASK, &set, NULL);
    /* Whatever it was started with, commands start with every signal at its default. */
    /* By the system call: libc's sigaction refuses its own two signals. */
    static const struct {
        unsigned long handler, flags, restorer, mask;
    } dfl;
    for (int i = 1; i < NSIG; i++)
        syscall(SYS_rt_sigaction, i, &dfl, NULL, sizeof dfl.mask);
    signal(SIGPIPE, SIG_IGN);
    sig_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    getrlimit(RLIMIT_NOFILE, &nofile);
    struct rlimit more = { nofile.rlim_max, nofile.rlim_max };
    setrlimit(RLIMIT_NOFILE, &more);
    find_cgroups();
    send_hello(NULL);
    flush();
    for (;;)
        turn();
}
