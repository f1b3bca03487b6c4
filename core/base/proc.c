#include "proc.h"

#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum {
    STDERR_KEEP = 8 * 1024,
    STDERR_READ = 16 * 1024,
    STDERR_GRACE_MS = 200,
    REAP_WAIT_MS = 2000,
    VIA_WAIT_MS = 5000,
    LAST_MS = 1000, /* for those that outlive the child and hold its stdout */
    LOG_LINE_BYTES = 1000,
    LOG_SECOND_BYTES = 64 * 1024, /* of one child's stderr in one second */
    STDERR_SHOWN = 1000,
    CHILD_STACK = 32 * 1024,
    MAX_FDS = ORCH_ARRAY_LEN(((struct orch_proc_opts *)0)->fds),
};

struct orch_proc {
    struct orch_loop *loop;
    /* stays a zombie until orch_proc_free, so that pid and process group stay the child's */
    pid_t pid;
    int pidfd, in, out, err;
    struct orch_watch *exit_watch, *err_watch;
    struct orch_timer *grace;
    struct orch_proc_via *via;
    bool exited, reaped;
    int status;
    struct orch_buf tail; /* up to twice `keep` bytes of stderr, the last `keep` are shown */
    size_t keep;
    orch_proc_exit_fn *on_exit;
    void (*on_stderr)(void *ud, struct orch_slice bytes);
    const char *log_as;
    struct orch_buf line; /* begun, not ended: for the log */
    int64_t log_second;
    size_t logged;     /* bytes in that second */
    unsigned unlogged; /* lines */
    void *ud;
};

/* What the child needs between clone and execve. It runs on the parent's memory while the parent
 * is suspended: it allocates nothing, and writes only here and on its own stack. */
struct child {
    const char *path;
    char *const *argv, *const *env;
    int cwd; /* -1: unchanged */
    int fds[3 + MAX_FDS];
    int n_fds;
    pid_t parent;
    const char *step; /* result: what failed, and why */
    int error;
};

/* The child's functions are not instrumented: they do not return, and run on a stack that the
 * sanitizers do not know. */
#define IN_CHILD __attribute__((no_sanitize("address", "thread")))

/* ThreadSanitizer's own clone takes the child for a fork with memory of its own, and sees nothing
 * in the parent from then on. */
#ifdef __SANITIZE_THREAD__
int __clone(int (*fn)(void *), void *stack, int flags, void *arg, ...);
#define clone __clone
#endif

IN_CHILD static int child_fail(struct child *c, const char *step)
{
    c->error = errno;
    c->step = step;
    _exit(127);
}

IN_CHILD static int child_main(void *arg)
{
    struct child *c = arg;
    if (setpgid(0, 0) < 0)
        return child_fail(c, "setpgid");
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        return child_fail(c, "prctl(PR_SET_PDEATHSIG)");
    /* The parent may have died before the line above: then no signal comes any more. */
    if (getppid() != c->parent)
        _exit(127);
    if (c->cwd >= 0 && fchdir(c->cwd) < 0)
        return child_fail(c, "fchdir");

    /* All up first, so that no target number is a source that is still needed. */
    for (int i = 0; i < c->n_fds; i++) {
        c->fds[i] = fcntl(c->fds[i], F_DUPFD_CLOEXEC, c->n_fds);
        if (c->fds[i] < 0)
            return child_fail(c, "fcntl(F_DUPFD_CLOEXEC)");
    }
    /* By the system call: ThreadSanitizer would take it for the parent's descriptors. */
    for (int i = 0; i < c->n_fds; i++)
        if (syscall(SYS_dup3, c->fds[i], i, 0) < 0)
            return child_fail(c, "dup3");
    if (syscall(SYS_close_range, (unsigned)c->n_fds, ~0U, 0) < 0)
        return child_fail(c, "close_range (Linux 5.9 or later is needed)");

    /* By the system call: libc's sigaction refuses its own two signals, which make(1) leaves
     * ignored. */
    static const struct {
        unsigned long handler, flags, restorer, mask;
    } dfl;
    for (int i = 1; i < NSIG; i++)
        syscall(SYS_rt_sigaction, i, &dfl, NULL, sizeof dfl.mask);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execve(c->path, c->argv, c->env);
    return child_fail(c, "execve");
}

static const char *env_get(const char *const *env, const char *name)
{
    size_t n = strlen(name);
    for (; env && *env; env++)
        if (strncmp(*env, name, n) == 0 && (*env)[n] == '=')
            return *env + n + 1;
    return NULL;
}

/* 0, -EPERM when it is there but no program one may execute, another error when it cannot be
 * reached. */
static int executable(int dirfd, const char *path)
{
    struct stat st;
    if (fstatat(dirfd, path, &st, 0) < 0)
        return -errno;
    return S_ISREG(st.st_mode) && faccessat(dirfd, path, X_OK, AT_EACCESS) == 0 ? 0 : -EPERM;
}

/* The file argv[0] names. Only absolute entries of PATH count: a relative one would let the working
 * folder, which may be somebody's repository, choose the program. */
static char *find_program(const struct orch_proc_opts *o, int cwd, struct orch_err *err)
{
    const char *name = o->argv[0];
    if (!*name) {
        orch_err_set(err, ENOENT, "the name of the program is empty");
        return NULL;
    }
    if (strchr(name, '/')) {
        int r = executable(cwd >= 0 ? cwd : AT_FDCWD, name);
        if (r == 0)
            return orch_xstrdup(name);
        if (r == -EPERM)
            orch_err_set(err, EACCES, "%s: not executable", name);
        else
            orch_err_set(err, -r, "%s: %s%s%s%s", name, strerror(-r),
                         o->cwd ? " (working directory " : "", o->cwd ? o->cwd : "",
                         o->cwd ? ")" : "");
        return NULL;
    }
    const char *path = env_get(o->env, "PATH");
    const char *list = path ? path : "/usr/local/bin:/usr/bin:/bin";
    cleanup_free char *refused = NULL;
    for (const char *s = list; *s;) {
        size_t n = strcspn(s, ":");
        if (*s == '/') {
            cleanup_free char *file = orch_xasprintf("%.*s/%s", (int)n, s, name);
            int r = executable(AT_FDCWD, file);
            if (r == 0)
                return orch_steal_ptr(&file);
            if (r == -EPERM && !refused)
                refused = orch_steal_ptr(&file);
        }
        s += n + (s[n] == ':');
    }
    if (refused)
        orch_err_set(err, EACCES, "%s: not executable", refused);
    else
        orch_err_set(err, ENOENT, "%s: program not found in PATH (%s%s)", name, list,
                     path ? "" : "; the environment has no PATH");
    return NULL;
}

static int start_error(const char *path, const char *step, int code, const struct orch_proc_opts *o,
                       struct orch_err *err)
{
    if (strcmp(step, "execve") != 0)
        return orch_err_set(err, code, "%s: cannot start: %s: %s", path, step, strerror(code));
    switch (code) {
    case ENOENT: /* the file was there a moment ago */
        return orch_err_set(err, ENOENT,
                            "%s: the interpreter its first line or header names does not exist",
                            path);
    case ENOEXEC:
        return orch_err_set(err, ENOEXEC,
                            "%s: not a program of this machine (a script needs a #! line)", path);
    case E2BIG:
        return orch_err_set(err, E2BIG, "%s: arguments and environment are too long", path);
    default:
        return orch_err_set(err, code, "%s: cannot execute: %s%s%s", path, strerror(code),
                            o->cwd ? ", in " : "", o->cwd ? o->cwd : "");
    }
}

/* words… PATH ARGV0 ARG… NULL, all borrowed. */
static char **via_argv(const struct orch_proc_opts *o, char *path)
{
    size_t n = 0, words = 0;
    while (o->argv[n])
        n++;
    while (o->via->words[words])
        words++;
    char **out = orch_xcalloc(words + n + 2, sizeof *out);
    memcpy(out, o->via->words, words * sizeof *out);
    out[words] = path;
    memcpy(out + words + 1, o->argv, n * sizeof *out);
    return out;
}

/* Waits until the program was executed, and takes the root it has; or why it was not. */
static int via_wait(const struct orch_proc_opts *o, const char *path, int sock,
                    struct orch_err *err)
{
    struct orch_proc_via *v = o->via;
    int64_t until = orch_now_us() / 1000 + VIA_WAIT_MS;
    for (;;) {
        union {
            struct cmsghdr align;
            char bytes[CMSG_SPACE(sizeof(int))];
        } control;
        struct orch_proc_report report = { 0 };
        struct iovec iov = { &report, sizeof report };
        struct msghdr h = { .msg_iov = &iov,
                            .msg_iovlen = 1,
                            .msg_control = control.bytes,
                            .msg_controllen = sizeof control.bytes };
        struct pollfd pfd = { .fd = sock, .events = POLLIN };
        int64_t left = until - orch_now_us() / 1000;
        int ready = left > 0 ? poll(&pfd, 1, (int)left) : 0;
        if (ready < 0 && errno == EINTR)
            continue;
        ssize_t n = ready > 0 ? recvmsg(sock, &h, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) : -1;
        if (ready > 0 && n < 0 && errno == EINTR)
            continue;
        struct cmsghdr *k = n > 0 ? CMSG_FIRSTHDR(&h) : NULL;
        if (k && k->cmsg_type == SCM_RIGHTS && v->root < 0) {
            memcpy(&v->root, CMSG_DATA(k), sizeof v->root);
        } else if (n == 0 && v->root >= 0) {
            return 0;
        } else if (n == sizeof report && !report.step[sizeof report.step - 1] &&
                   !report.file[sizeof report.file - 1]) {
            return strcmp(report.step, "execve") == 0
                       ? start_error(path, report.step, report.code, o, err)
                       : v->refused(v, &report, err);
        } else {
            const char *why = ready > 0 ? "it ended" : "it did not answer within 5 s";
            return orch_err_setc(err, ORCH_CLASS_ISOLATION, EPIPE, "%s: cannot start: %s: %s", path,
                                 v->words[0], why);
        }
    }
}

static void via_release(struct orch_proc_via **v)
{
    if (*v)
        (*v)->release(*v);
}

static void log_left_out(struct orch_proc *p)
{
    if (p->unlogged)
        orch_log(ORCH_INFO, "%s: %u lines of its stderr are left out here", p->log_as, p->unlogged);
    p->logged = p->unlogged = 0;
}

static void log_line(struct orch_proc *p)
{
    cleanup_buf struct orch_buf b = { 0 };
    int64_t second = orch_now_us() / 1000000;
    if (!p->line.n)
        return;
    if (second != p->log_second)
        log_left_out(p);
    p->log_second = second;
    if (p->logged < LOG_SECOND_BYTES) {
        orch_buf_printf(&b, "%s: ", p->log_as);
        orch_buf_slice(&b, (struct orch_slice){ p->line.p, p->line.n });
        orch_log_fields(ORCH_INFO, (struct orch_slice){ b.p, b.n }, (struct orch_slice){ 0 });
        p->logged += b.n;
    } else {
        p->unlogged++;
    }
    p->line.n = 0;
}

/* A progress bar's carriage return ends a line too. */
static bool ends_line(char c)
{
    return c == '\n' || c == '\r';
}

static void log_stderr(struct orch_proc *p, struct orch_slice s)
{
    if (!p->log_as || !orch_log_on(ORCH_INFO))
        return;
    for (size_t i = 0; i < s.n; i++) {
        if (ends_line(s.p[i]))
            log_line(p);
        else if (p->line.n < LOG_LINE_BYTES)
            orch_buf_char(&p->line, s.p[i]);
    }
}

static void finish(struct orch_proc *p)
{
    log_line(p);
    orch_timer_cancel(p->grace);
    orch_proc_exit_fn *fn = p->on_exit;
    p->on_exit = NULL;
    if (fn)
        fn(p->ud, p->status); /* may free p */
}

static void grace_over(void *ud)
{
    finish(ud);
}

static void stderr_ready(void *ud, int events)
{
    (void)events;
    struct orch_proc *p = ud;
    char chunk[STDERR_READ];
    ssize_t r = read(p->err, chunk, sizeof chunk);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r > 0) {
        size_t n = (size_t)r;
        const char *last = chunk;
        if (n > p->keep) {
            last += n - p->keep;
            n = p->keep;
        }
        if (p->tail.n + n > 2 * p->keep)
            orch_buf_consume(&p->tail, p->tail.n - p->keep);
        orch_buf_add(&p->tail, last, n);
        log_stderr(p, (struct orch_slice){ chunk, (size_t)r });
        if (p->on_stderr)
            p->on_stderr(p->ud, (struct orch_slice){ chunk, (size_t)r });
        return;
    }
    orch_watch_free(p->err_watch);
    p->err_watch = NULL;
    close(orch_steal_fd(&p->err));
    if (p->exited)
        finish(p);
}

static int wait_status(const siginfo_t *si)
{
    return si->si_code == CLD_EXITED   ? W_EXITCODE(si->si_status & 0xff, 0)
           : si->si_code == CLD_DUMPED ? si->si_status | WCOREFLAG
                                       : si->si_status;
}

static void exit_ready(void *ud, int events)
{
    (void)events;
    struct orch_proc *p = ud;
    siginfo_t si = { 0 };
    if (waitid(P_PIDFD, (id_t)p->pidfd, &si, WEXITED | WNOHANG | WNOWAIT) < 0) {
        if (errno == EINTR)
            return;
        /* Only where SIGCHLD is ignored or somebody else in this process waits for any child. */
        orch_log(ORCH_WARN, "process %d: exit status lost: %s", p->pid, strerror(errno));
        p->reaped = true;
        p->status = W_EXITCODE(255, 0);
    } else if (si.si_pid == 0) {
        return;
    } else {
        p->status = wait_status(&si);
    }
    p->exited = true;
    orch_watch_free(p->exit_watch);
    p->exit_watch = NULL;
    if (p->err < 0)
        finish(p);
    else
        orch_timer_set(p->grace, STDERR_GRACE_MS);
}

/* Both sides' descriptors, -1: not there. Of in, out and err the one to read is the first; of via's
 * socket the parent's. */
struct ends {
    int null, in[2], out[2], err[2], via[2];
};
#define NO_ENDS ((struct ends){ -1, { -1, -1 }, { -1, -1 }, { -1, -1 }, { -1, -1 } })

static void ends_close(struct ends *e)
{
    orch_cleanup_close(&e->null);
    for (int i = 0; i < 2; i++) {
        orch_cleanup_close(&e->in[i]);
        orch_cleanup_close(&e->out[i]);
        orch_cleanup_close(&e->err[i]);
        orch_cleanup_close(&e->via[i]);
    }
}

static bool open_pipe(int p[2], int ours)
{
    return pipe2(p, O_CLOEXEC) == 0 && fcntl(p[ours], F_SETFL, O_NONBLOCK) == 0;
}

/* False with errno. */
static bool ends_open(struct ends *e, const struct orch_proc_opts *o)
{
    if (o->null_stdio)
        e->null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (o->null_stdio ? e->null < 0 : !open_pipe(e->in, 1) || !open_pipe(e->out, 0))
        return false;
    return open_pipe(e->err, 0) &&
           (!o->via || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, e->via) == 0);
}

/* Returns once the child has executed or failed: its pid, or a negative errno. */
static pid_t run_child(struct child *c, int *pidfd)
{
    cleanup_free char *stack = orch_xmalloc(CHILD_STACK);
    /* No handler of ours may run in the child while it shares our memory. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t pid = clone(child_main, (char *)((uintptr_t)(stack + CHILD_STACK) & ~(uintptr_t)15),
                      CLONE_VM | CLONE_VFORK | CLONE_PIDFD | SIGCHLD, c, pidfd);
    int code = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pid >= 0)
        return pid;
    *pidfd = -1;
    return -code;
}

struct orch_proc *orch_proc_start(struct orch_loop *l, const struct orch_proc_opts *o,
                                  struct orch_err *err)
{
    ORCH_CLEANUP(via_release) struct orch_proc_via *via = o->via;
    if (!o->argv || !o->argv[0] || o->n_fds > MAX_FDS || (via && o->n_fds)) {
        orch_err_set(err, EINVAL,
                     "process: no program is named, or more than %d descriptors are passed",
                     (int)MAX_FDS);
        return NULL;
    }
    cleanup_close int cwd = -1;
    if (o->cwd && (cwd = open(o->cwd, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0) {
        orch_err_set(err, errno, "%s: working directory %s: %s", o->argv[0], o->cwd,
                     strerror(errno));
        return NULL;
    }
    cleanup_free char *path = find_program(o, cwd, err);
    if (!path)
        return NULL;

    ORCH_CLEANUP(ends_close) struct ends ends = NO_ENDS;
    if (!ends_open(&ends, o)) {
        orch_err_set(err, errno, "%s: cannot start: pipes: %s", o->argv[0], strerror(errno));
        return NULL;
    }

    static const char *const no_env[] = { NULL };
    cleanup_free char **through = via ? via_argv(o, path) : NULL;
    struct child c = {
        .path = via ? via->words[0] : path,
        .argv = via ? through : (char *const *)(uintptr_t)o->argv,
        .env = (char *const *)(uintptr_t)(o->env ? o->env : no_env),
        .cwd = cwd,
        .fds = { o->null_stdio ? ends.null : ends.in[0], o->null_stdio ? ends.null : ends.out[1],
                 ends.err[1] },
        .n_fds = 3 + (int)o->n_fds + (via != NULL),
        .parent = getpid(),
    };
    if (via)
        c.fds[3] = ends.via[1];
    if (o->n_fds)
        memcpy(c.fds + 3, o->fds, o->n_fds * sizeof c.fds[0]);

    cleanup_close int pidfd = -1;
    pid_t pid = run_child(&c, &pidfd);
    if (pid < 0) {
        orch_err_set(err, -pid, "%s: cannot start: clone: %s", path, strerror(-pid));
        return NULL;
    }
    if (c.step) {
        waitid(P_PIDFD, (id_t)pidfd, &(siginfo_t){ 0 }, WEXITED);
        start_error(c.path, c.step, c.error, o, err);
        return NULL;
    }
    close(orch_steal_fd(&ends.via[1])); /* -1 without via */
    if (via && via_wait(o, path, ends.via[0], err) < 0) {
        kill(pid, SIGKILL);
        waitid(P_PIDFD, (id_t)pidfd, &(siginfo_t){ 0 }, WEXITED);
        return NULL;
    }

    struct orch_proc *proc = orch_xcalloc(1, sizeof *proc);
    *proc = (struct orch_proc){
        .loop = l,
        .pid = pid,
        .pidfd = orch_steal_fd(&pidfd),
        .via = orch_steal_ptr(&via),
        .in = orch_steal_fd(&ends.in[1]),
        .out = orch_steal_fd(&ends.out[0]),
        .err = orch_steal_fd(&ends.err[0]),
        .on_stderr = o->on_stderr,
        .log_as = o->log_as,
        .keep = o->stderr_keep ? o->stderr_keep : STDERR_KEEP,
        .on_exit = o->on_exit,
        .ud = o->ud,
    };
    proc->grace = orch_timer_new(l, grace_over, proc);
    proc->exit_watch = orch_watch_new(l, proc->pidfd, ORCH_READ, exit_ready, proc);
    proc->err_watch = orch_watch_new(l, proc->err, ORCH_READ, stderr_ready, proc);
    return proc;
}

int orch_proc_pid(const struct orch_proc *p)
{
    return p->pid;
}

int orch_proc_stdin(const struct orch_proc *p)
{
    return p->in;
}

int orch_proc_stdout(const struct orch_proc *p)
{
    return p->out;
}

void orch_proc_close_stdin(struct orch_proc *p)
{
    if (p->in >= 0)
        close(orch_steal_fd(&p->in));
}

struct orch_slice orch_proc_stderr(const struct orch_proc *p)
{
    size_t n = p->tail.n < p->keep ? p->tail.n : p->keep;
    return (struct orch_slice){ n ? p->tail.p + p->tail.n - n : "", n };
}

struct orch_slice orch_proc_stderr_line(const struct orch_proc *p)
{
    struct orch_slice s = orch_proc_stderr(p);
    while (s.n && (ends_line(s.p[s.n - 1]) || s.p[s.n - 1] == ' '))
        s.n--;
    size_t from = s.n;
    while (from && !ends_line(s.p[from - 1]))
        from--;
    return (struct orch_slice){ s.p + from, s.n - from };
}

void orch_proc_stderr_describe(const struct orch_proc *p, struct orch_buf *b)
{
    struct orch_slice tail = orch_proc_stderr(p);
    if (tail.n > STDERR_SHOWN)
        tail = (struct orch_slice){ tail.p + tail.n - STDERR_SHOWN, STDERR_SHOWN };
    while (tail.n && (tail.p[tail.n - 1] == '\n' || tail.p[tail.n - 1] == ' '))
        tail.n--;
    orch_buf_str(b, tail.n ? "its stderr ends: " : "it wrote nothing to stderr");
    orch_escape_terminal(b, tail, true);
}

void orch_proc_kill(struct orch_proc *p, int signo)
{
    if (p->reaped)
        return;
    kill(-p->pid, signo);
    /* The child may have joined another group. */
    if (!p->exited && getpgid(p->pid) != p->pid)
        syscall(SYS_pidfd_send_signal, p->pidfd, signo, NULL, 0);
}

void orch_proc_describe(int status, char *out, size_t n)
{
    if (WIFSIGNALED(status)) {
        const char *name = sigdescr_np(WTERMSIG(status));
        snprintf(out, n, "killed by signal %d (%s)", WTERMSIG(status), name ? name : "unknown");
    } else {
        snprintf(out, n, "exit status %d", WEXITSTATUS(status));
    }
}

/* False at the end of its stdout. */
static bool discard_stdout(struct orch_proc *p)
{
    char chunk[16384];
    ssize_t r = read(p->out, chunk, sizeof chunk);
    return r > 0 || (r < 0 && (errno == EAGAIN || errno == EINTR));
}

void orch_proc_end(struct orch_proc *p, int64_t eof_ms, int64_t term_ms)
{
    bool told = false, exited = p->exited, closed = p->out < 0;
    int64_t now = orch_now_us() / 1000,
            until = now + (exited && eof_ms > LAST_MS ? LAST_MS : eof_ms);
    p->on_exit = NULL;
    orch_proc_close_stdin(p);
    while (!exited || !closed) {
        if (now >= until) {
            if (told || exited)
                return;
            told = true;
            orch_proc_kill(p, SIGTERM);
            until = now + term_ms;
        }
        struct pollfd fds[] = { { .fd = exited ? -1 : p->pidfd, .events = POLLIN },
                                { .fd = closed ? -1 : p->out, .events = POLLIN },
                                { .fd = p->err, .events = POLLIN } };
        int n = poll(fds, ORCH_ARRAY_LEN(fds), (int)(until - now));
        now = orch_now_us() / 1000;
        if (n < 0 && !told)
            until = now;
        if (n <= 0)
            continue;
        if (fds[2].revents)
            stderr_ready(p, 0);
        if (fds[1].revents)
            closed = !discard_stdout(p);
        if (fds[0].revents) {
            exited = true;
            if (until > now + LAST_MS)
                until = now + LAST_MS;
        }
    }
}

void orch_proc_free(struct orch_proc *p)
{
    if (!p)
        return;
    log_line(p);
    log_left_out(p);
    /* Also after the child's exit: what it left behind in its group ends here. */
    orch_proc_kill(p, SIGKILL);
    if (!p->reaped) {
        struct pollfd pfd = { .fd = p->pidfd, .events = POLLIN };
        int64_t until = orch_now_us() / 1000 + REAP_WAIT_MS, left = REAP_WAIT_MS;
        while (left >= 0 && poll(&pfd, 1, (int)left) < 0 && errno == EINTR)
            left = until - orch_now_us() / 1000;
        siginfo_t si = { 0 };
        if (waitid(P_PIDFD, (id_t)p->pidfd, &si, WEXITED | WNOHANG) == 0 && si.si_pid == 0)
            orch_log(ORCH_WARN,
                     "process %d: still there %d ms after SIGKILL (waiting in the kernel)", p->pid,
                     (int)REAP_WAIT_MS);
    }
    orch_watch_free(p->exit_watch);
    orch_watch_free(p->err_watch);
    orch_timer_free(p->grace);
    orch_cleanup_close(&p->pidfd);
    orch_cleanup_close(&p->in);
    orch_cleanup_close(&p->out);
    orch_cleanup_close(&p->err);
    orch_buf_free(&p->tail);
    via_release(&p->via);
    orch_buf_free(&p->line);
    free(p);
}

/* ---- any process */

/* The fields of /proc/PID/stat after the name, which may hold anything. */
static bool read_stat(int pid, int *parent, long long *started)
{
    char path[64];
    cleanup_buf struct orch_buf stat = { 0 };
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    if (orch_read_file(AT_FDCWD, path, 4096, &stat) < 0)
        return false;
    const char *after = strrchr(stat.p, ')');
    return after && sscanf(after + 1,
                           " %*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d "
                           "%*d %*d %lld",
                           parent, started) == 2;
}

int orch_proc_parent(int pid)
{
    int parent;
    long long started;
    return read_stat(pid, &parent, &started) ? parent : 0;
}

bool orch_proc_descends(int pid, int of)
{
    for (int depth = 0; pid > 1 && depth < ORCH_ANCESTORS_MAX; depth++) {
        pid = orch_proc_parent(pid);
        if (pid == of)
            return true;
    }
    return false;
}

int64_t orch_proc_started(int pid)
{
    int parent;
    long long started;
    return read_stat(pid, &parent, &started) ? started : -1;
}
