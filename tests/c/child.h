/* Test cases in child processes of their own uid: what they check ends them, and the parent's case
 * with it. */
#ifndef TESTS_CHILD_H
#define TESTS_CHILD_H

#include <grp.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define USER 1000 /* an ordinary user */

/* How long an event is awaited, on a slow and busy machine too. */
#define WAIT_MS 60000
#define WAIT_US (WAIT_MS * INT64_C(1000))

/* In a child, in place of cmocka's assertions: CHECK(condition, "why %d", …). */
#define CHECK(cond, ...) \
    do { \
        if (!(cond)) { \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
            fprintf(stderr, __VA_ARGS__); \
            fputc('\n', stderr); \
            _exit(1); \
        } \
    } while (0)

static inline pid_t start_as(uid_t uid, void (*fn)(void))
{
    fflush(NULL);
    pid_t p = fork();
    if (!p) {
        if (uid)
            CHECK(!setgroups(0, NULL) && !setresgid(uid, uid, uid) && !setresuid(uid, uid, uid),
                  "%m");
        prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0); /* a failing test leaves nothing behind */
        fn();
        exit(0);
    }
    return p;
}

/* 0, or the wait status. */
static inline int status_as(uid_t uid, void (*fn)(void))
{
    int status;
    waitpid(start_as(uid, fn), &status, 0);
    return status;
}

static inline void run_as(uid_t uid, void (*fn)(void))
{
    int status = status_as(uid, fn);
    if (status)
        fail_msg("as uid %u: %s %d", uid, WIFSIGNALED(status) ? "signal" : "exit status",
                 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
}

static inline void run_as_both(void (*fn)(void))
{
    run_as(USER, fn);
    run_as(0, fn);
}

#endif
