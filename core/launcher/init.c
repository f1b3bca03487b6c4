/* A microVM's init: pid 1 of its pid namespace and owner of its namespaces. It makes a network if
 * asked to, starts one VMM, reports its end, and ends when orch closes ctl; the kernel then kills
 * whatever is left in the namespace. */
#include "launcher.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

static struct orch_launch_msg msg;
static struct orch_net net = { .tap = -1, .said_fd = -1 };

static void write_self(const char *step, const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        orch_launch_fail(step);
    close(fd);
}

/* Cuts the blob into exactly n strings. */
static bool split(char **out, size_t n)
{
    size_t at = 0, i = 0;
    for (; i < n && at < msg.blob_len; i++) {
        out[i] = msg.blob + at;
        at += strlen(out[i]) + 1;
    }
    return i == n && at == msg.blob_len;
}

/* Returns the VMM's pid; *report gets the end of the pipe that execve closes. */
static pid_t start(const int *fds, size_t n_fds, int *report)
{
    static char *strings[2 * ORCH_LAUNCH_BINDS + ORCH_LAUNCH_ARGV + 1];
    int p[2];
    errno = E2BIG;
    if (msg.n_binds > ORCH_LAUNCH_BINDS || msg.n_argv > ORCH_LAUNCH_ARGV)
        orch_launch_fail("message");
    size_t n = 2 * (size_t)msg.n_binds + msg.n_argv;
    errno = EINVAL;
    if (!split(strings, n) || msg.fd_mask >> ORCH_LAUNCH_FD_TAP ||
        (size_t)__builtin_popcount(msg.fd_mask) != n_fds)
        orch_launch_fail("message");
    strings[n] = NULL;
    if (pipe2(p, O_CLOEXEC))
        orch_launch_fail("pipe");
    struct orch_confine c = {
        .flags = msg.flags,
        .as_bytes = msg.as_bytes,
        .binds = strings,
        .n_binds = msg.n_binds,
        .argv = strings + 2 * msg.n_binds,
        .report = p[1],
    };
    for (int slot = 0, i = 0; slot < ORCH_LAUNCH_FDS; slot++)
        c.fds[slot] = msg.fd_mask >> slot & 1 ? fds[i++] : -1;
    c.fds[ORCH_LAUNCH_FD_TAP] = net.tap;
    pid_t pid = orch_launch_clone(CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC |
                                  CLONE_NEWUTS | SIGCHLD);
    if (!pid)
        orch_confine_exec(&c);
    if (pid < 0)
        orch_launch_fail("clone of the VMM");
    close(p[1]);
    *report = p[0];
    return pid;
}

static void tell(enum orch_launch_op op, int status)
{
    msg = (struct orch_launch_msg){ .op = op, .status = status };
    orch_launch_send(ORCH_LAUNCH_SOCK, &msg, NULL, 0);
}

/* Its pid for orch: /proc is still the host's. */
static int own_number(void)
{
    char text[16];
    ssize_t n = readlink("/proc/self", text, sizeof text - 1);
    text[n < 0 ? 0 : n] = 0;
    return atoi(text);
}

_Noreturn void orch_init_run(uid_t uid, gid_t gid)
{
    char map[64];
    net.uid = uid;
    /* After the last change of uid, which would clear it. That the launcher ended before is not
     * seen here; then orch, which did see it, closes ctl. */
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    prctl(PR_SET_NAME, "orch-init", 0, 0, 0);
    write_self("setgroups file", "/proc/self/setgroups", "deny");
    snprintf(map, sizeof map, "0 %u 1", uid);
    write_self("uid_map", "/proc/self/uid_map", map);
    snprintf(map, sizeof map, "0 %u 1", gid);
    write_self("gid_map", "/proc/self/gid_map", map);
    sigset_t chld; /* blocked by the launcher already */
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    int sfd = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
    if (sfd < 0)
        orch_launch_fail("signalfd");

    pid_t vmm = 0;
    for (struct pollfd pf[4] = { { ORCH_LAUNCH_SOCK, POLLIN, 0 },
                                 { -1, POLLIN, 0 },
                                 { sfd, POLLIN, 0 },
                                 { -1, POLLIN, 0 } };
         ;) {
        pf[3].fd = net.said_fd;
        if (poll(pf, 4, -1) < 0)
            continue;
        if (pf[3].revents)
            orch_net_read(&net);
        if (pf[0].revents) {
            int fds[ORCH_LAUNCH_FDS];
            size_t n_fds;
            if (orch_launch_recv(ORCH_LAUNCH_SOCK, &msg, fds, &n_fds) != 1 || vmm)
                _exit(0);
            if (msg.op == ORCH_LAUNCH_NET && net.tap < 0 && !n_fds) {
                orch_net_make(&net, msg.flags);
                continue;
            }
            if (msg.op != ORCH_LAUNCH_VMM)
                _exit(0);
            vmm = start(fds, n_fds, &pf[1].fd);
            for (size_t i = 0; i < n_fds; i++)
                close(fds[i]);
            if (net.tap >= 0) /* the device lives as long as the VMM */
                close(net.tap);
            net.tap = -1;
            continue;
        }
        /* Before the VMM's end, so that orch hears of its start or of the failed step first. */
        if (pf[1].revents) {
            ssize_t n = read(pf[1].fd, &msg, sizeof msg);
            close(pf[1].fd);
            pf[1].fd = -1;
            if (n > 0) {
                orch_launch_send(ORCH_LAUNCH_SOCK, &msg, NULL, 0);
                _exit(1);
            }
            tell(ORCH_LAUNCH_STARTED, own_number());
            continue;
        }
        if (pf[2].revents) {
            struct signalfd_siginfo si;
            int status;
            while (read(sfd, &si, sizeof si) > 0)
                ;
            for (pid_t p; (p = waitpid(-1, &status, WNOHANG)) > 0;)
                if (p == vmm) {
                    tell(ORCH_LAUNCH_EXIT, status);
                    _exit(0);
                } else if (p == net.pasta) {
                    orch_net_lost(&net, status);
                }
        }
    }
}
