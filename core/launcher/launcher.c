/* The launcher: one thread without policy that makes each microVM's init and reaps it. It lives as
 * long as its main socket; the inits die with it (PDEATHSIG) and each with its ctl, so there is
 * nothing to clean up however it ends. (As `launcher protect` it is none of this: see protect.c.)
 *
 * Each NEW takes a helper process: it drops root's uid where there is one, waits out namespace
 * limits without holding up the launcher, and makes init the launcher's child (CLONE_PARENT). */
#include "launcher.h"

#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static pid_t helpers[ORCH_LAUNCH_CELLS]; /* 0: free */
/* helpers and inits; a helper's place passes to its init */
static int n_cells;

/* The capability goes with the uid's change into the clone: a user namespace made by a creator with
 * CAP_SYS_ADMIN is exempt from AppArmor's and other restrictions of unprivileged ones. Root of a
 * container may lack it; then it is an unprivileged creation like a user's. */
static void drop_root(uid_t uid, gid_t gid)
{
    const uint32_t unchanged = UINT32_MAX; /* to setresuid and setresgid */
    errno = EINVAL;
    if (!uid || !gid || uid == unchanged || gid == unchanged)
        orch_launch_fail("uid");
    struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct d[2] = { { 0 } };
    if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
        orch_launch_fail("keepcaps");
    if (setgroups(0, NULL))
        orch_launch_fail("setgroups");
    if (setresgid(gid, gid, gid))
        orch_launch_fail("setresgid");
    if (setresuid(uid, uid, uid))
        orch_launch_fail("setresuid");
    if (syscall(SYS_capget, &h, d))
        orch_launch_fail("capget");
    d[0].permitted &= 1U << CAP_SYS_ADMIN;
    d[0].effective = d[0].permitted;
    d[0].inheritable = d[1].permitted = d[1].effective = d[1].inheritable = 0;
    if (syscall(SYS_capset, &h, d))
        orch_launch_fail("capset");
}

static _Noreturn void help(const struct orch_launch_msg *m, int ctl)
{
    dup2(ctl, ORCH_LAUNCH_SOCK);
    close_range(ORCH_LAUNCH_SOCK + 1, ~0U, 0);
    if (geteuid() == 0)
        drop_root(m->uid, m->gid);
    uid_t uid = geteuid();
    gid_t gid = getegid();
    /* Else /proc/self/uid_map belongs to root after the uid's change or with a file capability. */
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    pid_t p = orch_launch_clone(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC |
                                CLONE_NEWUTS | CLONE_PARENT | SIGCHLD);
    if (!p)
        orch_init_run(uid, gid);
    if (p < 0)
        orch_launch_fail("clone of init");
    _exit(0);
}

static void new_cell(const struct orch_launch_msg *m, int ctl)
{
    pid_t p = -1;
    errno = EUSERS;
    if (n_cells < ORCH_LAUNCH_CELLS)
        p = fork();
    if (!p)
        help(m, ctl);
    if (p < 0) {
        orch_launch_send(ctl, orch_launch_error(errno == EUSERS ? "cells" : "fork", NULL), NULL, 0);
        return;
    }
    for (int i = 0; i < ORCH_LAUNCH_CELLS; i++)
        if (!helpers[i]) {
            helpers[i] = p;
            break;
        }
    n_cells++;
}

static void reap(void)
{
    int status;
    for (pid_t p; (p = waitpid(-1, &status, WNOHANG)) > 0;) {
        bool made_init = false;
        for (int i = 0; i < ORCH_LAUNCH_CELLS; i++)
            if (helpers[i] == p) {
                helpers[i] = 0;
                made_init = status == 0;
            }
        n_cells -= !made_init;
    }
}

int main(int argc, char **argv)
{
    static struct orch_launch_msg msg;
    int type = 0, fds[ORCH_LAUNCH_FDS];
    socklen_t n_type = sizeof type;
    size_t n_fds;
    getsockopt(ORCH_LAUNCH_SOCK, SOL_SOCKET, SO_TYPE, &type, &n_type);
    if (type != SOCK_SEQPACKET) {
        fprintf(stderr, "launcher: this program is started by orch, which gives it a socket\n");
        return 2;
    }
    if (argc > 1 && !strcmp(argv[1], "protect"))
        orch_protect_exec(argv + 2);
    close_range(ORCH_LAUNCH_SOCK + 1, ~0U, 0);
    umask(022);
    if (chdir("/"))
        orch_launch_fail("chdir");
    /* The VMM's filter knows no keyctl; where the call is not there, there is no keyring to
     * leave. */
    syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL);
    int r = orch_filter_build();
    errno = -r;
    if (r)
        orch_launch_fail("filter");
    sigset_t chld;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_BLOCK, &chld, NULL);
    int sfd = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
    if (sfd < 0)
        orch_launch_fail("signalfd");
    msg = (struct orch_launch_msg){ .op = ORCH_LAUNCH_HELLO, .status = ORCH_LAUNCH_VERSION };
    orch_launch_send(ORCH_LAUNCH_SOCK, &msg, NULL, 0);

    for (struct pollfd pf[2] = { { ORCH_LAUNCH_SOCK, POLLIN, 0 }, { sfd, POLLIN, 0 } };;) {
        if (poll(pf, 2, -1) < 0)
            continue;
        if (pf[1].revents) {
            struct signalfd_siginfo si;
            while (read(sfd, &si, sizeof si) > 0)
                ;
            reap();
        }
        if (!pf[0].revents)
            continue;
        r = orch_launch_recv(ORCH_LAUNCH_SOCK, &msg, fds, &n_fds);
        if (r == 1 && msg.op == ORCH_LAUNCH_NEW && n_fds == 1)
            new_cell(&msg, fds[0]);
        for (size_t i = 0; i < n_fds; i++)
            close(fds[i]);
        if (r != 1 && r != -EBADMSG && r != -EAGAIN)
            _exit(0);
    }
}
