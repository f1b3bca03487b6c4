/* The loop's descriptor (orch_loop_fd): it tells of all that a step would do, and falls silent. */
#include "base/loop.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cmocka.h>

enum { WAIT_MS = 20000 };

static struct orch_loop *loop;
static unsigned called, timed; /* timed: by a timer, which may come up to a clock tick early */

static bool told(int ms)
{
    struct pollfd p = { .fd = orch_loop_fd(loop), .events = POLLIN };
    return poll(&p, 1, ms) > 0;
}

/* What a step does is told before it. True when it did something. */
static bool step(void)
{
    unsigned before = called, timers = timed;
    bool knew = told(0);
    orch_loop_step(loop, 0);
    assert_true(knew || called == before || timed != timers);
    return called != before;
}

static void await_call(void)
{
    for (int tries = 0; tries < 100; tries++) {
        assert_true(told(WAIT_MS));
        if (step())
            return;
    }
    fail_msg("told again and again of nothing");
}

static void assert_silent(void)
{
    for (int tries = 0; told(0) && tries < 3; tries++)
        assert_false(step());
    assert_false(told(0));
}

static void count(void *ud)
{
    (void)ud;
    called++;
}

static void on_watch(void *ud, int events)
{
    *(int *)ud |= events;
    called++;
}

static int setup(void **state)
{
    (void)state;
    called = 0;
    loop = orch_loop_new(NULL);
    return loop ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    orch_loop_free(loop);
    return 0;
}

static void test_before_it_is_asked(void **state)
{
    (void)state;
    int p[2], seen = 0;
    assert_int_equal(pipe(p), 0);
    struct orch_watch *w = orch_watch_new(loop, p[0], ORCH_READ, on_watch, &seen);
    struct orch_timer *soon = orch_timer_new(loop, count, NULL);
    struct orch_timer *later = orch_timer_new(loop, count, NULL);
    orch_timer_set(later, 100000);
    orch_timer_set(soon, 30);
    orch_loop_post(loop, count, NULL);
    int fd = orch_loop_fd(loop);
    assert_true(fd >= 0 && orch_loop_fd(loop) == fd && (fcntl(fd, F_GETFD) & FD_CLOEXEC));
    assert_true(told(0)); /* the post */
    assert_true(step());
    await_call(); /* the timer */
    assert_int_equal(called, 2);
    assert_silent();
    assert_int_equal(write(p[1], "x", 1), 1);
    assert_true(told(0));
    assert_true(step());
    assert_int_equal(seen, ORCH_READ);
    assert_true(told(0)); /* while it is not read */
    orch_watch_free(w);
    assert_silent();
    orch_timer_free(soon);
    orch_timer_free(later);
    close(p[0]);
    close(p[1]);
}

static void test_watched_twice(void **state)
{
    (void)state;
    int s[2], in = 0, out = 0;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
    assert_true(orch_loop_fd(loop) >= 0);
    struct orch_watch *reader = orch_watch_new(loop, s[0], ORCH_READ, on_watch, &in);
    struct orch_watch *writer = orch_watch_new(loop, s[0], ORCH_WRITE, on_watch, &out);
    assert_true(told(0) && step() && out == ORCH_WRITE && !in);
    orch_watch_set(writer, 0);
    assert_silent();
    assert_true(write(s[1], "x", 1) == 1 && told(0) && step() && in == ORCH_READ);
    orch_watch_set(reader, 0);
    assert_silent();
    orch_watch_set(reader, ORCH_READ | ORCH_WRITE);
    orch_watch_free(writer);
    in = 0;
    assert_true(told(0) && step() && in == (ORCH_READ | ORCH_WRITE));
    orch_watch_free(reader);
    assert_silent();

    /* The number again, for another file. */
    int old = s[0], p[2];
    assert_int_equal(close(s[0]) | pipe(p), 0);
    if (p[0] != old)
        assert_int_equal(dup2(p[0], old), old);
    reader = orch_watch_new(loop, old, ORCH_READ, on_watch, &in);
    assert_silent();
    assert_true(write(p[1], "x", 1) == 1 && told(0) && step());
    /* Closed before its watch was freed, and again in use: wrong, but no reason to fall silent. */
    int q[2];
    close(p[0]);
    if (p[0] != old)
        close(old);
    assert_int_equal(pipe(q), 0);
    if (q[1] != old)
        assert_int_equal(dup2(q[1], old), old);
    out = 0;
    writer = orch_watch_new(loop, old, ORCH_WRITE, on_watch, &out);
    assert_true(told(0) && step() && out == ORCH_WRITE);
    orch_watch_free(writer);
    orch_watch_free(reader);
    close(p[1]);
    close(q[0]);
    close(q[1]);
    close(old);
    close(s[1]);
}

static void test_timers(void **state)
{
    (void)state;
    assert_true(orch_loop_fd(loop) >= 0);
    struct orch_timer *a = orch_timer_new(loop, count, NULL);
    struct orch_timer *b = orch_timer_new(loop, count, NULL);
    orch_timer_set(a, 0);
    assert_true(told(0) && step());
    assert_silent();
    orch_timer_set(a, 50);
    orch_timer_set(b, 20);
    orch_timer_cancel(b); /* it may tell of nothing then */
    await_call();
    assert_int_equal(called, 2);
    assert_silent();
    orch_timer_set(b, 100000);
    orch_timer_set(a, 40);
    orch_timer_set(b, 20); /* the sooner one, anew */
    await_call();
    await_call();
    assert_int_equal(called, 4);
    assert_silent();
    orch_timer_free(a);
    orch_timer_free(b);
}

static void test_child(void **state)
{
    (void)state;
    int seen = 0;
    assert_true(orch_loop_fd(loop) >= 0);
    pid_t pid = fork();
    if (pid == 0) {
        pause();
        _exit(0);
    }
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    assert_true(pidfd >= 0);
    struct orch_watch *w = orch_watch_new(loop, pidfd, ORCH_READ, on_watch, &seen);
    assert_silent();
    kill(pid, SIGKILL);
    await_call();
    orch_watch_free(w);
    close(pidfd);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

/* A file, which epoll refuses, is no reason to fall silent for others. */
static void test_file(void **state)
{
    (void)state;
    int seen = 0, file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    assert_true(orch_loop_fd(loop) >= 0);
    struct orch_watch *w = orch_watch_new(loop, file, ORCH_READ, on_watch, &seen);
    assert_silent();
    orch_loop_post(loop, count, NULL);
    assert_true(told(0) && step());
    orch_watch_free(w);
    close(file);
}

/* ---- all of it at random, changed inside callbacks and outside */

enum { PAIRS = 8, TIMERS = 6, ROUNDS = 4000 };

static struct bed {
    int fds[PAIRS][2];
    struct orch_watch *watches[PAIRS * 2]; /* two of each first descriptor */
    struct orch_timer *timers[TIMERS];
    uint32_t seed;
    unsigned posts;
} bed;

static uint32_t dice(uint32_t n)
{
    bed.seed = bed.seed * 1664525 + 1013904223;
    return (bed.seed >> 8) % n;
}

static void meddle(void);

static void on_any(void *ud)
{
    (void)ud;
    called++;
    if (dice(2))
        meddle();
}

static void on_timer(void *ud)
{
    timed++;
    on_any(ud);
}

static void on_post(void *ud)
{
    bed.posts--;
    on_any(ud);
}

static void on_ready(void *ud, int events)
{
    size_t i = (size_t)(uintptr_t)ud;
    char c[4];
    if ((events & ORCH_READ) && dice(4))
        (void)!read(bed.fds[i / 2][0], c, 1 + dice(4));
    if ((events & ORCH_WRITE) && dice(2)) /* else writable for ever: also right */
        orch_watch_set(bed.watches[i], dice(2) ? ORCH_READ : 0);
    on_any(NULL);
}

static void meddle(void)
{
    size_t i = dice(PAIRS * 2), t = dice(TIMERS);
    switch (dice(9)) {
    case 0:
    case 1:
        (void)!write(bed.fds[i / 2][1], "abc", 1 + dice(3));
        break;
    case 2:
        orch_watch_set(bed.watches[i], (int)dice(4));
        break;
    case 3:
        orch_watch_free(bed.watches[i]);
        bed.watches[i] = orch_watch_new(loop, bed.fds[i / 2][0], dice(2) ? ORCH_READ : 0, on_ready,
                                        (void *)(uintptr_t)i);
        break;
    case 4:
        orch_timer_set(bed.timers[t], dice(3) ? dice(8) : 1000);
        break;
    case 5:
        orch_timer_cancel(bed.timers[t]);
        break;
    case 6:
        if (bed.posts < 8) {
            bed.posts++;
            orch_loop_post(loop, on_post, NULL);
        }
        break;
    case 7: /* another file under the numbers */
        for (size_t k = i & ~1u; k <= (i | 1); k++) {
            orch_watch_free(bed.watches[k]);
            bed.watches[k] = NULL;
        }
        close(bed.fds[i / 2][0]);
        close(bed.fds[i / 2][1]);
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, bed.fds[i / 2]) < 0)
            abort();
        for (size_t k = i & ~1u; k <= (i | 1); k++)
            bed.watches[k] = orch_watch_new(loop, bed.fds[i / 2][0], (int)dice(2), on_ready,
                                            (void *)(uintptr_t)k);
        break;
    default:
        break;
    }
}

static void test_at_random(void **state)
{
    (void)state;
    unsigned did = 0, nothing = 0;
    bed = (struct bed){ .seed = (uint32_t)getpid() };
    print_message("seed %u\n", bed.seed);
    assert_true(orch_loop_fd(loop) >= 0);
    for (size_t i = 0; i < PAIRS; i++)
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0,
                                    bed.fds[i]),
                         0);
    for (size_t i = 0; i < PAIRS * 2; i++)
        bed.watches[i] = orch_watch_new(loop, bed.fds[i / 2][0], ORCH_READ, on_ready,
                                        (void *)(uintptr_t)i);
    for (size_t i = 0; i < TIMERS; i++)
        bed.timers[i] = orch_timer_new(loop, on_timer, NULL);
    for (int i = 0; i < ROUNDS; i++) {
        for (uint32_t n = dice(3); n; n--)
            meddle();
        bool knew = told(dice(4) ? 0 : 2);
        bool some = step();
        did += some;
        nothing += knew && !some;
    }
    assert_true(did > ROUNDS / 10);
    assert_true(nothing < ROUNDS / 10); /* cancelled timers */
    for (size_t i = 0; i < PAIRS * 2; i++)
        orch_watch_free(bed.watches[i]);
    for (size_t i = 0; i < TIMERS; i++)
        orch_timer_free(bed.timers[i]);
    while (bed.posts)
        orch_loop_step(loop, 0);
    assert_silent();
    for (size_t i = 0; i < PAIRS; i++) {
        close(bed.fds[i][0]);
        close(bed.fds[i][1]);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
#define S(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
        S(test_before_it_is_asked),
        S(test_watched_twice),
        S(test_timers),
        S(test_child),
        S(test_file),
        S(test_at_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
