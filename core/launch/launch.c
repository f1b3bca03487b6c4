/* orch's side of the launcher. All of it runs in the loop's thread; the one wait is for a new
 * launcher's HELLO. */
#include "launch.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define VMM_UID 60001 /* what a VMM runs as when orch is root */
#define WAIT_MS INT64_C(30000)
/* The kernel closes a dead process's descriptors from the highest down, and is some 10 ms about
 * each microVM's nf_tables socket: the launcher is to hear of orch's end before these. */
#define MAIN_FD 512

/* The running helper program. pid 0: none. */
struct helper {
    int pid, pidfd, sock;
};

struct orch_launcher {
    struct orch_loop *loop;
    char *path;
    orch_launcher_lost_fn *on_lost;
    void *ud;
    struct helper h;
    struct orch_watch *dead;
    struct orch_cell *cells;
    char why[160]; /* how the last one ended */
    struct orch_launch_msg msg;
};

struct orch_cell {
    struct orch_launcher *la; /* NULL: freed before the cell */
    struct orch_cell *next, **link;
    struct orch_cell_opts o; /* the callbacks; borrowed pointers in it are not kept */
    void (*on_net)(void *ud, const int fds[ORCH_NET_FDS], bool settings); /* until the answer */
    int ctl;                                                              /* -1: over */
    int init;
    struct orch_watch *watch;
    bool fail_posted;
};

/* ---- sentences */

static void add_limits(char *out, size_t n)
{
    static const char *const names[] = { "user", "pid", "mnt", "net", "ipc", "uts", "cgroup" };
    size_t at = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(names) && at < n; i++) {
        char path[64];
        int value;
        snprintf(path, sizeof path, "/proc/sys/user/max_%s_namespaces", names[i]);
        FILE *f = fopen(path, "re");
        if (f && fscanf(f, "%d", &value) == 1)
            at += (size_t)snprintf(out + at, n - at, " user.max_%s_namespaces=%d", names[i], value);
        if (f)
            fclose(f);
    }
}

#define CONTAINER "in a container, its seccomp or AppArmor profile must be relaxed for orch"
#define PROCESSES "the limit of processes is reached; raise it (ulimit -u, cgroup pids.max)"
#define UNMAPPED \
    "uid and gid 60001 are not mapped in this user namespace; map them, or run orch as an " \
    "ordinary user"
#define NO_SETID \
    "orch runs as root without CAP_SETUID and CAP_SETGID; give it both, or run it as an ordinary " \
    "user"
#define OLD_KERNEL "the kernel is too old: Linux 5.12 or newer is needed"
#define KNOB "fix: sysctl -w kernel.unprivileged_userns_clone=1 where that setting exists; "

static const struct {
    const char *step; /* "" ends */
    int code;         /* 0: any */
    const char *fix;
} fixes[] = {
    { "clone of init", EPERM,
      "user namespaces are refused; " KNOB CONTAINER
      " (Docker: --security-opt seccomp=…, clone with CLONE_NEWUSER); orch must not run in a "
      "chroot" },
    { "clone of init", EINVAL,
      "the kernel was built without user namespaces (CONFIG_USER_NS); use one with them" },
    { "clone of init", EAGAIN, PROCESSES },
    { "clone of the VMM", EAGAIN, PROCESSES },
    { "fork", EAGAIN, PROCESSES },
    { "cells", 0, "one launcher holds at most 64 microVMs; end some first" },
    { "message", 0, "orch sent more than the launcher takes; please report this as a bug of orch" },
    { "uid", 0, "orch asked to run the VMM as root; please report this as a bug of orch" },
    { "setresuid", EINVAL, UNMAPPED },
    { "setresgid", EINVAL, UNMAPPED },
    { "setgroups", EPERM, NO_SETID },
    { "setresuid", EPERM, NO_SETID },
    { "setresgid", EPERM, NO_SETID },
    { "pivot_root", EINVAL,
      "the root filesystem is the initramfs, or orch runs in a chroot; neither can be left" },
    { "unshare of the VMM", EPERM,
      "a user namespace inside a user namespace is refused; " KNOB CONTAINER },
    { "bind", ENOENT, "the file is missing; install it, or correct the path orch was given" },
    { "bind", EACCES,
      "the VMM's user may not reach the file; let others pass every directory to it (chmod o+x)" },
    { "bind", ENOSPC, "too many files, or the limit fs.mount-max is reached" },
    { "bind of /proc/self/fd", ENOSYS, OLD_KERNEL },
    { "read-only mounts", ENOSYS, OLD_KERNEL },
    { "bind of /dev/kvm", 0,
      "this machine offers no KVM: enable virtualization in its firmware or hypervisor and load "
      "kvm_intel or "
      "kvm_amd; without it microVMs run emulated (accel = \"tcg\")" },
    { "execve", ENOENT,
      "the program or its dynamic linker is not among the files bound into the VMM's root" },
    { "execve", EACCES,
      "the VMM's user may not execute the file: it needs mode o+rx, on no noexec filesystem" },
    { "execve", ENOEXEC, "the file is not a program of this machine" },
    { "seccomp", EINVAL,
      "the kernel was built without seccomp filters (CONFIG_SECCOMP_FILTER); use one with them" },
    { "pasta program", 0,
      "the uplink is the program pasta, which is not in /usr/bin; install the package passt" },
    { "pasta", 0,
      "it needs a default route on the host (ip -4 route) and /dev/net/tun for everyone (chmod 666 "
      "/dev/net/tun)" },
    { "/dev/net/tun", EACCES,
      "the device is for everyone to use on an ordinary system: chmod 666 /dev/net/tun" },
    { "/dev/net/tun", 0,
      "load its module (modprobe tun); in a container, pass the device in (--device "
      "/dev/net/tun)" },
    { "netfilter socket", 0, "the kernel needs nfnetlink and nf_tables (modprobe nf_tables)" },
    { "unshare of the user namespace", EPERM,
      "user namespaces are refused; " KNOB CONTAINER
      " (Docker: --security-opt seccomp=…); orch must not run in a chroot" },
    { "unshare of the user namespace", EINVAL,
      "the kernel was built without user namespaces (CONFIG_USER_NS); use one with them" },
    { "mount", ENOENT, "it went away meanwhile; start again" },
    { "mount of a link", 0,
      "this kernel cannot hold a symbolic link in its place; name the folder without it" },
    { "working directory", 0, "start orch in a directory that is still there" },
    { "filter", 0,
      "libseccomp could not build the VMM's filter; reinstall it (package libseccomp2)" },
    { "", 0, "see `orch doctor`; " CONTAINER },
};

/* The steps at which a user namespace that lacks capabilities shows. */
static bool wants_capabilities(const char *step, int code)
{
    static const char *const steps[] = { "setgroups file",       "uid_map",        "gid_map",
                                         "clone of the VMM",     "private mounts", "tmpfs",
                                         "bind of /proc/self/fd" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(steps) && (code == EPERM || code == EACCES); i++)
        if (!strcmp(step, steps[i]))
            return true;
    return false;
}

/* The steps of making a network, which a microVM without one does not take. */
static bool of_network(const char *step)
{
    static const char *const steps[] = { "pasta program",         "pasta",
                                         "/dev/net/tun",          "tap",
                                         "netfilter socket",      "route socket",
                                         "unshare of the network" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(steps); i++)
        if (!strcmp(step, steps[i]))
            return true;
    return false;
}

static void find_fix(const char *launcher, const char *step, int code, char *fix, size_t n)
{
    size_t i = 0;
    while (*fixes[i].step &&
           (strcmp(fixes[i].step, step) || (fixes[i].code && fixes[i].code != code)))
        i++;
    snprintf(fix, n, "%s", fixes[i].fix);
    if (wants_capabilities(step, code)) {
        snprintf(fix, n,
                 "user namespaces come without capabilities here. With AppArmor's "
                 "kernel.apparmor_restrict_unprivileged_userns=1 (Ubuntu 24.04), fix once as root: "
                 "put these lines "
                 "into /etc/apparmor.d/orch-launcher and run `apparmor_parser -r "
                 "/etc/apparmor.d/orch-launcher`:\n"
                 "abi <abi/4.0>,\ninclude <tunables/global>\nprofile orch-launcher %s "
                 "flags=(unconfined) {\n"
                 "  userns,\n  include if exists <local/orch-launcher>\n}\nElse " CONTAINER,
                 launcher);
    } else if (code == ENOSPC && (!strncmp(step, "clone", 5) || !strncmp(step, "unshare", 7))) {
        char limits[320] = "";
        add_limits(limits, sizeof limits);
        snprintf(fix, n,
                 "a limit of namespaces is reached; raise the one that is too low (sysctl -w):%s",
                 limits);
    }
}

static int explain(const char *launcher, const struct orch_launch_msg *m, struct orch_err *err)
{
    const char *step = m->step, *file = m->blob_len ? m->blob : "";
    int code = m->sys_errno;
    char fix[1200];
    find_fix(launcher, step, code, fix, sizeof fix);
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, code, "%s: %s%s%s: %s; %s",
                         of_network(step) ? "no network" : "no confined VMM", step,
                         *file ? " " : "", file, strerror(code), fix);
}

int orch_launch_unprotected(const char *launcher, const struct orch_proc_report *r,
                            struct orch_err *err)
{
    char fix[1200];
    find_fix(launcher, r->step, r->code, fix, sizeof fix);
    return orch_err_setc(
        err, ORCH_CLASS_ISOLATION, r->code,
        "it was not started, since orch's files cannot be protected from it: %s%s%s: %s; %s",
        r->step, *r->file ? " " : "", r->file, strerror(r->code), fix);
}

static int refuse(struct orch_err *err, int code, const char *path, const char *what)
{
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, code, "launcher %s: %s", path, what);
}

/* ---- the program's life */

/* False when fd had nothing to read by end_us. */
static bool wait_readable(int fd, int64_t end_us)
{
    struct pollfd pf = { fd, POLLIN, 0 };
    int r;
    do {
        int64_t left_us = end_us - orch_now_us();
        r = poll(&pf, 1, left_us > 0 ? (int)(left_us / 1000) : 0);
    } while (r < 0 && errno == EINTR);
    return r > 0;
}

/* Reaps the helper, killing it first when it still runs; `why` gets how it ended. */
static void helper_end(struct helper *h, char *why, size_t n)
{
    siginfo_t si = { .si_pid = 0 };
    /* By the pidfd: when an embedder's own wait reaped it, its number may be another's by now. */
    if (h->pidfd >= 0 && (waitid(P_PIDFD, (id_t)h->pidfd, &si, WEXITED | WNOHANG) || !si.si_pid)) {
        pidfd_send_signal(h->pidfd, SIGKILL, NULL, 0);
        while (waitid(P_PIDFD, (id_t)h->pidfd, &si, WEXITED) && errno == EINTR)
            ;
    }
    if (h->pidfd >= 0)
        close(h->pidfd);
    if (h->sock >= 0)
        close(h->sock);
    *h = (struct helper){ 0, -1, -1 };
    if (!si.si_pid)
        snprintf(why, n, "ended");
    else if (si.si_code == CLD_EXITED)
        snprintf(why, n, "ended with exit status %d", si.si_status);
    else {
        const char *name = sigdescr_np(si.si_status);
        snprintf(why, n, "was killed by signal %d (%s)", si.si_status, name ? name : "unknown");
    }
}

/* It is a session of its own, so that an interrupt typed at a terminal reaches orch alone; with
 * default signals, which its children pass on to the VMM. */
static int spawn(const char *path, int sock, int *pid)
{
    char *argv[] = { orch_xstrdup(path), NULL }, *env[] = { NULL };
    posix_spawn_file_actions_t fa;
    posix_spawnattr_t at;
    sigset_t all, none;
    sigfillset(&all);
    sigemptyset(&none);
    posix_spawn_file_actions_init(&fa);
    posix_spawnattr_init(&at);
    posix_spawnattr_setflags(&at,
                             POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK);
    posix_spawnattr_setsigdefault(&at, &all);
    posix_spawnattr_setsigmask(&at, &none);
    /* First: the socket's own number may be 0 or 1. */
    posix_spawn_file_actions_adddup2(&fa, sock, 3);
    posix_spawn_file_actions_addopen(&fa, 0, "/dev/null", O_RDWR, 0);
    posix_spawn_file_actions_adddup2(&fa, 0, 1);
    int r = posix_spawn(pid, path, &fa, &at, argv, env);
    posix_spawn_file_actions_destroy(&fa);
    posix_spawnattr_destroy(&at);
    free(argv[0]);
    return r;
}

static int helper_start(struct helper *h, const char *path, struct orch_launch_msg *m,
                        struct orch_err *err)
{
    int sv[2], fds[ORCH_LAUNCH_FDS], pid;
    size_t n_fds;
    char why[100], text[160];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv))
        return refuse(err, errno, path, "no socket for it: too many open files?");
    int r = spawn(path, sv[1], &pid);
    close(sv[1]);
    if (r) {
        close(sv[0]);
        snprintf(text, sizeof text, "%s; reinstall orch, or give its path", strerror(r));
        return refuse(err, r, path, text);
    }
    int high = fcntl(sv[0], F_DUPFD_CLOEXEC, MAIN_FD);
    if (high >= 0) {
        close(sv[0]);
        sv[0] = high;
    }
    *h = (struct helper){ pid, pidfd_open(pid, 0), sv[0] };
    if (h->pidfd < 0) {
        r = -errno;
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    } else if (!wait_readable(sv[0], orch_now_us() + WAIT_MS * 1000)) {
        r = -ETIMEDOUT;
    } else {
        r = orch_launch_recv(sv[0], m, fds, &n_fds);
    }
    if (r == 1 && m->op == ORCH_LAUNCH_HELLO && m->status == ORCH_LAUNCH_VERSION)
        return 0;
    if (r == 0) /* it is ending by itself: its status tells more than a kill */
        wait_readable(h->pidfd, orch_now_us() + WAIT_MS * 1000);
    helper_end(h, why, sizeof why);
    if (r == 1 && m->op == ORCH_LAUNCH_ERROR)
        return explain(path, m, err);
    if (r == 1 && m->op == ORCH_LAUNCH_HELLO)
        return refuse(err, EPROTO, path, "it belongs to another version of orch; reinstall orch");
    if (r < 0)
        return refuse(err, -r, path,
                      r == -ETIMEDOUT ? "it did not answer within 30 s" : strerror(-r));
    snprintf(text, sizeof text, "it %s before it was ready; run it by hand to see why", why);
    return refuse(err, EPIPE, path, text);
}

/* ---- cells */

static void cell_over(struct orch_cell *c)
{
    orch_watch_free(c->watch);
    c->watch = NULL;
    if (c->ctl >= 0)
        close(c->ctl);
    c->ctl = -1;
}

static void cell_lost(void *ud)
{
    struct orch_cell *c = ud;
    struct orch_err err = { .code = 0 };
    c->fail_posted = false;
    refuse(&err, EPIPE, c->la->path, c->la->why);
    c->o.on_error(c->o.ud, &err);
}

static void launcher_lost(void *ud)
{
    struct orch_launcher *la = ud;
    la->on_lost(la->ud, la->why);
}

/* Callbacks are posted one by one: each may free any cell, or the launcher. */
static void launcher_dead(void *ud, int events)
{
    struct orch_launcher *la = ud;
    (void)events;
    orch_watch_free(la->dead);
    la->dead = NULL;
    helper_end(&la->h, la->why, sizeof la->why);
    for (struct orch_cell *c = la->cells; c; c = c->next)
        if (c->ctl >= 0) {
            cell_over(c);
            c->fail_posted = true;
            orch_loop_post(la->loop, cell_lost, c);
        }
    if (la->on_lost)
        orch_loop_post(la->loop, launcher_lost, la);
}

static int launcher_start(struct orch_launcher *la, struct orch_err *err)
{
    int r = helper_start(&la->h, la->path, &la->msg, err);
    if (!r)
        la->dead = orch_watch_new(la->loop, la->h.pidfd, ORCH_READ, launcher_dead, la);
    return r;
}

struct orch_launcher *orch_launcher_new(struct orch_loop *l, const char *path,
                                        orch_launcher_lost_fn *on_lost, void *ud,
                                        struct orch_err *err)
{
    struct orch_launcher *la = orch_xcalloc(1, sizeof *la);
    la->loop = l;
    la->path = orch_xstrdup(path);
    la->on_lost = on_lost;
    la->ud = ud;
    la->h = (struct helper){ 0, -1, -1 };
    if (!launcher_start(la, err))
        return la;
    orch_launcher_free(la);
    return NULL;
}

void orch_launcher_free(struct orch_launcher *la)
{
    if (!la)
        return;
    for (struct orch_cell *c = la->cells; c; c = c->next) {
        cell_over(c);
        if (c->fail_posted)
            orch_loop_unpost(la->loop, cell_lost, c);
        c->fail_posted = false;
        c->la = NULL;
    }
    orch_loop_unpost(la->loop, launcher_lost, la);
    orch_watch_free(la->dead);
    helper_end(&la->h, la->why, sizeof la->why);
    free(la->path);
    free(la);
}

int orch_launcher_pid(const struct orch_launcher *la)
{
    return la->h.pid;
}

static void cell_event(void *ud, int events)
{
    struct orch_cell *c = ud;
    struct orch_launch_msg *m = &c->la->msg;
    struct orch_err err = { .code = 0 };
    int fds[ORCH_LAUNCH_FDS];
    size_t n_fds;
    (void)events;
    int r = orch_launch_recv(c->ctl, m, fds, &n_fds);
    if (r == 1 && m->op == ORCH_LAUNCH_NET && n_fds == ORCH_NET_FDS && c->on_net) {
        void (*on_net)(void *, const int[ORCH_NET_FDS], bool) = c->on_net;
        c->on_net = NULL;
        on_net(c->o.ud, fds, !m->status);
        return;
    }
    for (size_t i = 0; i < n_fds; i++)
        close(fds[i]);
    if (r == -EAGAIN)
        return;
    if (r == 1 && m->op == ORCH_LAUNCH_STARTED) {
        c->init = m->status;
        if (c->o.on_started)
            c->o.on_started(c->o.ud);
        return;
    }
    /* it fails every cell, this one too, and knows why */
    if (r != 1 && c->la->h.pid && wait_readable(c->la->h.pidfd, 0)) {
        launcher_dead(c->la, 0);
        return;
    }
    cell_over(c);
    if (r == 1 && m->op == ORCH_LAUNCH_EXIT) {
        c->o.on_exit(c->o.ud, m->status);
        return;
    }
    if (r == 1 && m->op == ORCH_LAUNCH_ERROR)
        explain(c->la->path, m, &err);
    else
        refuse(&err, EPIPE, c->la->path,
               "the microVM's init was killed, or the launcher was, and the VMM with it");
    c->o.on_error(c->o.ud, &err);
}

static int add_string(struct orch_launch_msg *m, const char *s)
{
    size_t n = strlen(s) + 1;
    if (n > sizeof m->blob - m->blob_len)
        return -E2BIG;
    memcpy(m->blob + m->blob_len, s, n);
    m->blob_len += (uint32_t)n;
    return 0;
}

static void fill_new(struct orch_launch_msg *m, uint32_t flags)
{
    *m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NEW, .uid = VMM_UID, .gid = VMM_UID };
    struct stat st;
    /* Root's VMM gets at /dev/kvm through the device's group, as a user does. */
    if ((flags & ORCH_VMM_KVM) && !stat("/dev/kvm", &st) && st.st_gid)
        m->gid = st.st_gid;
}

static int fill_vmm(struct orch_launch_msg *m, const struct orch_cell_opts *o, int *fds,
                    size_t *n_fds)
{
    *m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_VMM,
                                   .flags = o->flags,
                                   .as_bytes = o->as_bytes };
    int r = o->n_binds > ORCH_LAUNCH_BINDS ? -E2BIG : 0;
    for (size_t i = 0; !r && i < o->n_binds; i++) {
        if (o->binds[i].host[0] != '/' || o->binds[i].guest[0] != '/')
            return -EINVAL;
        r = add_string(m, o->binds[i].host);
        r = r ? r : add_string(m, o->binds[i].guest);
    }
    m->n_binds = (uint32_t)o->n_binds;
    for (; !r && o->argv[m->n_argv]; m->n_argv++)
        r = m->n_argv == ORCH_LAUNCH_ARGV ? -E2BIG : add_string(m, o->argv[m->n_argv]);
    *n_fds = 0;
    for (int i = 0; i < ORCH_LAUNCH_FDS; i++)
        if (o->fds[i] >= 0) {
            fds[(*n_fds)++] = o->fds[i];
            m->fd_mask |= 1U << i;
        }
    return r;
}

static int send_vmm(int ctl, struct orch_launch_msg *m, const struct orch_cell_opts *o)
{
    int fds[ORCH_LAUNCH_FDS];
    size_t n_fds;
    int r = fill_vmm(m, o, fds, &n_fds);
    return r ? r : orch_launch_send(ctl, m, fds, n_fds);
}

/* NEW, and at once what comes first on ctl: VMM, or without argv NET. Returns orch's end of ctl, or
 * a negative errno. */
static int send_cell(int sock, struct orch_launch_msg *m, const struct orch_cell_opts *o)
{
    int sv[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv))
        return -errno;
    fill_new(m, o->flags);
    int r = orch_launch_send(sock, m, &sv[1], 1);
    close(sv[1]);
    if (!r && !o->argv) {
        *m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NET, .flags = o->flags };
        r = orch_launch_send(sv[0], m, NULL, 0);
    } else if (!r) {
        r = send_vmm(sv[0], m, o);
    }
    if (!r)
        return sv[0];
    close(sv[0]);
    return r;
}

static int cannot_send(const struct orch_launcher *la, int r, struct orch_err *err)
{
    if (r != -E2BIG && r != -EINVAL)
        return refuse(err, -r, la->path, strerror(-r));
    return orch_err_setc(
        err, ORCH_CLASS_ISOLATION, -r,
        "VMM: %s: at most %d files by absolute path, %d arguments, %d bytes of both",
        r == -E2BIG ? "too many files or arguments" : "a path is not absolute", ORCH_LAUNCH_BINDS,
        ORCH_LAUNCH_ARGV, ORCH_LAUNCH_BLOB);
}

struct orch_cell *orch_cell_new(struct orch_launcher *la, const struct orch_cell_opts *o,
                                struct orch_err *err)
{
    if (!la->h.pid && launcher_start(la, err))
        return NULL;
    int ctl = send_cell(la->h.sock, &la->msg, o);
    if (ctl == -EPIPE || ctl == -ECONNRESET) { /* it ended, and the loop has not said so yet */
        launcher_dead(la, 0);
        if (launcher_start(la, err))
            return NULL;
        ctl = send_cell(la->h.sock, &la->msg, o);
    }
    if (ctl < 0) {
        cannot_send(la, ctl, err);
        return NULL;
    }
    struct orch_cell *c = orch_xcalloc(1, sizeof *c);
    c->la = la;
    c->o = *o;
    c->ctl = ctl;
    c->next = la->cells;
    c->link = &la->cells;
    if (c->next)
        c->next->link = &c->next;
    la->cells = c;
    c->watch = orch_watch_new(la->loop, ctl, ORCH_READ, cell_event, c);
    return c;
}

struct orch_cell *orch_cell_new_net(struct orch_launcher *la, const struct orch_cell_net_opts *o,
                                    struct orch_err *err)
{
    struct orch_cell_opts begin = { .flags = o->flags, .on_error = o->on_error, .ud = o->ud };
    struct orch_cell *c = orch_cell_new(la, &begin, err);
    if (c)
        c->on_net = o->on_net;
    return c;
}

int orch_cell_start(struct orch_cell *c, const struct orch_cell_opts *o, struct orch_err *err)
{
    if (!c->la || c->ctl < 0)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, EPIPE,
                             "launcher: it ended, and the microVM's network with it");
    int r = send_vmm(c->ctl, &c->la->msg, o);
    if (r)
        return cannot_send(c->la, r, err);
    c->o = *o;
    return 0;
}

int orch_cell_init(const struct orch_cell *c)
{
    return c->ctl >= 0 ? c->init : 0;
}

void orch_cell_free(struct orch_cell *c)
{
    if (!c)
        return;
    cell_over(c);
    if (c->la) {
        if (c->fail_posted)
            orch_loop_unpost(c->la->loop, cell_lost, c);
        *c->link = c->next;
        if (c->next)
            c->next->link = c->link;
    }
    free(c);
}

/* ---- doctor */

int orch_launch_check(const char *path, struct orch_err *err)
{
    static const char *const no_argv[] = { NULL };
    struct orch_cell_opts o = { .argv = no_argv };
    struct helper h = { 0, -1, -1 };
    cleanup_free struct orch_launch_msg *m = orch_xcalloc(1, sizeof *m);
    char why[100];
    int fds[ORCH_LAUNCH_FDS];
    size_t n_fds;
    for (int i = 0; i < ORCH_LAUNCH_FDS; i++)
        o.fds[i] = -1;
    int r = helper_start(&h, path, m, err);
    if (r)
        return r;
    int64_t end_us = orch_now_us() + WAIT_MS * 1000;
    cleanup_close int ctl = send_cell(h.sock, m, &o);
    do
        r = ctl < 0                      ? ctl
            : wait_readable(ctl, end_us) ? orch_launch_recv(ctl, m, fds, &n_fds)
                                         : -ETIMEDOUT;
    while (r == 1 && m->op == ORCH_LAUNCH_STARTED);
    helper_end(&h, why, sizeof why);
    if (r == 1 && m->op == ORCH_LAUNCH_EXIT && m->status == 0)
        return 0;
    if (r == 1 && m->op == ORCH_LAUNCH_ERROR)
        return explain(path, m, err);
    return refuse(err, r < 0 ? -r : EPIPE, path,
                  "an empty microVM did not come up within 30 s, or was killed");
}
