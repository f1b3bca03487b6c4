/* Commands: the process that becomes one, its standard streams, its end. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PATH_DEFAULT "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define KILL_AFTER_MS 2000 /* from TERM to KILL */

/* Looks up a name or a number in /etc/passwd; an unlisted number is a user without home. By hand,
 * since the C library's own look-up wants shared objects. */
bool user_find(const char *who, struct user *u)
{
    char *end, line[1024];
    unsigned long number = strtoul(who, &end, 10);
    bool numeric = *who >= '0' && *who <= '9' && !*end && number < UINT32_MAX;
    int fd = open_regular("/etc/passwd", O_RDONLY);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "re");
    bool found = false;
    while (f && !found && fgets(line, sizeof line, f)) {
        char *rest = line, *field[7] = { 0 };
        line[strcspn(line, "\n")] = 0;
        for (int i = 0; i < 7 && rest; i++)
            field[i] = strsep(&rest, ":");
        if (!field[6])
            continue;
        u->uid = (uid_t)strtoul(field[2], NULL, 10);
        u->gid = (gid_t)strtoul(field[3], NULL, 10);
        found = strcmp(field[0], who) == 0 || (numeric && u->uid == number);
        if (found) {
            snprintf(u->name, sizeof u->name, "%s", field[0]);
            snprintf(u->home, sizeof u->home, "%s", field[5]);
        }
    }
    if (f)
        fclose(f);
    if (!found && numeric) {
        u->uid = u->gid = (uid_t)number;
        snprintf(u->name, sizeof u->name, "%lu", number);
        snprintf(u->home, sizeof u->home, "/");
        found = true;
    }
    return found;
}

/* The groups of /etc/group that name the user, behind its own. */
static void groups_find(struct user *u)
{
    char line[4096];
    int fd = open_regular("/etc/group", O_RDONLY);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "re");
    u->groups[0] = u->gid;
    u->n_groups = 1;
    while (f && u->n_groups < MAX_GROUPS && fgets(line, sizeof line, f)) {
        char *rest = line, *name, *field[4] = { 0 };
        line[strcspn(line, "\n")] = 0;
        for (int i = 0; i < 4 && rest; i++)
            field[i] = strsep(&rest, ":");
        gid_t gid = field[3] ? (gid_t)strtoul(field[2], NULL, 10) : u->gid;
        while (gid != u->gid && (name = strsep(&field[3], ",")))
            if (strcmp(name, u->name) == 0) {
                u->groups[u->n_groups++] = gid;
                break;
            }
    }
    if (f)
        fclose(f);
}

struct plan {
    struct orch_wire_exec x;
    const char *cwd, *user;
    const char **argv, **env; /* NULL-terminated */
    struct user u;
    int in, out, err; /* the command's ends */
    int fail;
};

static _Noreturn void child_fail(int fd, uint32_t why)
{
    uint32_t fail[2] = { why, (uint32_t)errno };
    if (write(fd, fail, sizeof fail) < 0)
        _exit(126);
    _exit(127);
}

static void env_default(const char **env, uint32_t *n, const char *text)
{
    size_t name = strcspn(text, "=") + 1;
    for (uint32_t i = 0; i < *n; i++)
        if (strncmp(env[i], text, name) == 0)
            return;
    env[(*n)++] = text;
}

/* Like execvp, but looks before it leaps: under emulation a failed execve costs 0.3 ms, a look
 * 0.02, and most of PATH does not have the program. Returns with errno. */
static void exec_search(const struct plan *p)
{
    char *const *argv = (char *const *)(uintptr_t)p->argv;
    const char *path = getenv("PATH");
    int error = ENOENT;
    if (strchr(argv[0], '/') || !*argv[0]) {
        execv(argv[0], argv);
        return;
    }
    for (path = path ? path : PATH_DEFAULT; *path;) {
        char file[4096];
        int n = (int)strcspn(path, ":");
        if (snprintf(file, sizeof file, "%.*s/%s", n, path, argv[0]) < (int)sizeof file &&
            access(file, F_OK) == 0) {
            execv(file, argv);
            if (errno != EACCES)
                return;
            error = EACCES;
        }
        path += n + (path[n] == ':');
    }
    errno = error;
}

/* In the new process. The order matters: files while still root, identity, then the folder and the
 * program with the user's own rights. */
static _Noreturn void child_exec(struct plan *p)
{
    sigset_t none;
    sigemptyset(&none);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setrlimit(RLIMIT_NOFILE, &nofile);
    setsid();
    if (dup2(p->in, 0) < 0 || dup2(p->out, 1) < 0 || dup2(p->err, 2) < 0)
        child_fail(p->fail, ORCH_WIRE_FAIL_RESOURCES);
    if (p->x.flags & ORCH_WIRE_EXEC_PTY)
        ioctl(0, TIOCSCTTY, 0);
    umask(022);
    if (p->x.flags & ORCH_WIRE_EXEC_NO_ASLR)
        personality(ADDR_NO_RANDOMIZE);
    /* By the system calls: libc would tell its other threads, and this process is on the agent's
     * memory. */
    if (syscall(SYS_setgroups, p->u.n_groups, p->u.groups) < 0 ||
        syscall(SYS_setresgid, p->u.gid, p->u.gid, p->u.gid) < 0 ||
        syscall(SYS_setresuid, p->u.uid, p->u.uid, p->u.uid) < 0)
        child_fail(p->fail, ORCH_WIRE_FAIL_USER);
    if (*p->cwd ? chdir(p->cwd) < 0 : (chdir(p->u.home) < 0 && chdir("/") < 0))
        child_fail(p->fail, ORCH_WIRE_FAIL_CWD);
    environ = (char **)(uintptr_t)p->env;
    exec_search(p);
    switch (errno) {
    case ENOENT:
    case ENOTDIR:
        child_fail(p->fail, ORCH_WIRE_FAIL_NOT_FOUND);
    case ENOMEM:
    case EAGAIN:
    case E2BIG:
        child_fail(p->fail, ORCH_WIRE_FAIL_RESOURCES);
    default:
        child_fail(p->fail, ORCH_WIRE_FAIL_NOT_EXECUTABLE);
    }
}

/* Stands between the agent and a command where there are no cgroups: as subreaper it is an ancestor
 * of whatever the command leaves behind, so it can find and end all of it. It ends as the command
 * ended, and only after everything below it is gone. Returns in the command's process. */
static void supervise(struct plan *p)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid_t command = fork();
    if (command == 0)
        return;
    if (command < 0)
        child_fail(p->fail, ORCH_WIRE_FAIL_RESOURCES);
    close_range(0, ~0U, 0);
    int status, how = 0;
    pid_t pid;
    while ((pid = waitpid(-1, &status, 0)) != command)
        if (pid < 0 && errno != EINTR)
            _exit(126);
    how = status;
    while (waitpid(-1, NULL, WNOHANG) >= 0 || errno == EINTR) {
        descendants_signal(getpid(), SIGKILL);
        usleep(1000);
    }
    if (!WIFSIGNALED(how))
        _exit(WEXITSTATUS(how));
    struct rlimit no_core = { 0, 0 };
    setrlimit(RLIMIT_CORE, &no_core);
    sigemptyset(&all);
    kill(getpid(), WTERMSIG(how));
    sigprocmask(SIG_SETMASK, &all, NULL);
    _exit(126);
}

/* A pipe whose end `ours` (0 read, 1 write) does not block. */
static bool make_pipe(int ours, int *our_fd, int *their_fd)
{
    int p[2];
    if (pipe2(p, O_CLOEXEC) < 0)
        return false;
    *our_fd = p[ours];
    *their_fd = p[!ours];
    return set_nonblock(*our_fd);
}

static bool make_pty(struct op *op, struct plan *p)
{
    int zero = 0;
    struct winsize size = { .ws_row = p->x.rows ? p->x.rows : 24,
                            .ws_col = p->x.cols ? p->x.cols : 80 };
    int master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    op->out[0].fd = master;
    if (master < 0 || ioctl(master, TIOCSPTLCK, &zero) < 0 || ioctl(master, TIOCSWINSZ, &size) < 0)
        return false;
    p->in = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (p->in < 0 || fchown(p->in, p->u.uid, (gid_t)-1) < 0)
        return false;
    p->out = fcntl(p->in, F_DUPFD_CLOEXEC, 3);
    p->err = fcntl(p->in, F_DUPFD_CLOEXEC, 3);
    if (op->in_open)
        op->in_fd = fcntl(master, F_DUPFD_CLOEXEC, 3);
    return p->out >= 0 && p->err >= 0 && (!op->in_open || op->in_fd >= 0);
}

static bool make_stdio(struct op *op, struct plan *p)
{
    if (!make_pipe(0, &op->fail_fd, &p->fail))
        return false;
    if (op->pty)
        return make_pty(op, p);
    if (op->in_open ? !make_pipe(1, &op->in_fd, &p->in)
                    : (p->in = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        return false;
    if (!make_pipe(0, &op->out[0].fd, &p->out) || !make_pipe(0, &op->out[1].fd, &p->err))
        return false;
    /* Who opens /dev/stdout opens the pipe anew, as itself. */
    const int ends[] = { op->in_open ? p->in : p->out, p->out, p->err };
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (fchown(ends[i], p->u.uid, p->u.gid) < 0)
            return false;
    return true;
}

/* Makes the command's process in its cgroup, on the agent's memory and a stack of its own, the
 * agent suspended until it executes: copying page tables is what a fork costs most, and under
 * emulation all of that kernel code is translated first. child_exec allocates nothing and changes
 * only `environ`. */
static pid_t spawn_in(int cgroup, struct plan *p)
{
    static char stack[64 * 1024] __attribute__((aligned(16)));
    struct clone_args a = { .flags = CLONE_INTO_CGROUP | CLONE_VM | CLONE_VFORK,
                            .exit_signal = SIGCHLD,
                            .stack = (uint64_t)(uintptr_t)stack,
                            .stack_size = sizeof stack,
                            .cgroup = (uint64_t)cgroup };
    char **own_environ = environ;
    register void (*fn)(struct plan *) __asm__("r12") = (void (*)(struct plan *))child_exec;
    register struct plan *arg __asm__("r13") = p;
    long r;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "mov %%r13, %%rdi\n\t"
                     "call *%%r12\n\t"
                     "hlt\n"
                     "1:"
                     : "=a"(r)
                     : "a"(SYS_clone3), "D"(&a), "S"(sizeof a), "r"(fn), "r"(arg)
                     : "rcx", "r11", "memory", "cc");
    environ = own_environ;
    errno = r < 0 ? (int)-r : 0;
    return r < 0 ? -1 : (pid_t)r;
}

static void exec_failed(struct op *op, enum orch_wire_fail why)
{
    op->fail[0] = why;
    op->fail[1] = errno ? (uint32_t)errno : EIO;
    op->reaped = true;
}

static void exec_start(struct op *op, struct plan *p)
{
    op->pty = p->x.flags & ORCH_WIRE_EXEC_PTY;
    op->in_open = p->x.flags & ORCH_WIRE_EXEC_STDIN;
    op->max_output = p->x.max_output;
    p->in = p->out = p->err = p->fail = -1;
    if (!user_find(p->user, &p->u)) {
        errno = ENOENT;
        exec_failed(op, ORCH_WIRE_FAIL_USER);
        return;
    }
    groups_find(&p->u);
    char home[300], user[80];
    snprintf(home, sizeof home, "HOME=%s", p->u.home);
    snprintf(user, sizeof user, "USER=%s", p->u.name);
    env_default(p->env, &p->x.n_env, "PATH=" PATH_DEFAULT);
    env_default(p->env, &p->x.n_env, home);
    env_default(p->env, &p->x.n_env, user);
    env_default(p->env, &p->x.n_env, "LANG=C.UTF-8");

    errno = EAGAIN;
    bool ok = n_execs <= MAX_EXECS && make_stdio(op, p) &&
              (!has_cgroups() || (op->group = group_take()));
    if (ok) {
        op->pid = op->group ? spawn_in(op->group->dir, p) : fork();
        if (op->pid == 0) {
            supervise(p);
            child_exec(p);
        }
    }
    if (op->pid < 0)
        exec_failed(op, ORCH_WIRE_FAIL_RESOURCES);
    else if (p->x.timeout_ms)
        op->deadline = now_ms() + p->x.timeout_ms;
    close_fd(&p->in);
    close_fd(&p->out);
    close_fd(&p->err);
    close_fd(&p->fail);
}

void exec_frame(uint32_t id, const char *b, size_t n)
{
    struct plan p = { .cwd = "" };
    if (op_find(id) || n < sizeof p.x || b[n - 1] != 0)
        die("protocol error: EXEC");
    memcpy(&p.x, b, sizeof p.x);
    if (p.x.n_argv < 1 || p.x.n_argv > n || p.x.n_env > n)
        die("protocol error: EXEC counts");
    struct op *op = n_ops < MAX_OPS ? op_new(id, EXEC) : NULL;
    const char **strings = calloc(2 + (size_t)p.x.n_argv + 1 + p.x.n_env + 5, sizeof *strings);
    if (!op || !strings) {
        struct orch_wire_exit e = { .fail = ORCH_WIRE_FAIL_RESOURCES, .sys_errno = EAGAIN };
        send_frame(id, ORCH_WIRE_EXIT, &e, sizeof e);
        if (op)
            op_free(op);
        free(strings);
        return;
    }
    const char *at = b + sizeof p.x, *end = b + n;
    uint32_t total = 2 + p.x.n_argv + p.x.n_env, i;
    for (i = 0; i < total && at < end; i++) {
        strings[i < 2 + p.x.n_argv ? i : i + 1] = at;
        at += strlen(at) + 1;
    }
    if (i < total || at != end)
        die("protocol error: EXEC strings");
    p.cwd = strings[0];
    p.user = strings[1];
    p.argv = strings + 2;
    p.env = strings + 2 + p.x.n_argv + 1;
    exec_start(op, &p);
    free(strings);
}

/* Learns whether the exec worked. Output can only follow, so until then no stream is read. */
static void exec_check(struct op *op)
{
    uint32_t pid = (uint32_t)op->pid;
    ssize_t n = read(op->fail_fd, op->fail, sizeof op->fail);
    if (n < 0 && (errno == EAGAIN || errno == EINTR) && !op->reaped)
        return;
    close_fd(&op->fail_fd);
    if (n != (ssize_t)sizeof op->fail && !op->dropped)
        send_frame(op->id, ORCH_WIRE_STARTED, &pid, sizeof pid);
}

static void stdin_close(struct op *op)
{
    close_fd(&op->in_fd);
    op->uncredited += (uint32_t)(op->in_n - op->in_off);
    op->in_off = op->in_n = 0;
}

static void stdin_write(struct op *op)
{
    while (op->in_fd >= 0 && op->in_off < op->in_n) {
        ssize_t n = write(op->in_fd, op->in + op->in_off, op->in_n - op->in_off);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            stdin_close(op); /* nobody reads: what still comes is thrown away and credited */
        if (n < 0)
            break;
        op->in_off += (size_t)n;
        op->uncredited += (uint32_t)n;
    }
    if (op->in_off == op->in_n)
        op->in_off = op->in_n = 0;
    if (op->uncredited >= CHUNK || (op->uncredited && op->in_n == 0)) {
        send_credit(op, op->uncredited);
        op->uncredited = 0;
    }
    if (op->in_eof && op->in_n == 0 && op->in_fd >= 0) {
        /* A terminal has no end of file but a character for it. */
        if (!op->pty || write(op->in_fd, "\4", 1) == 1 || errno != EAGAIN)
            close_fd(&op->in_fd);
    }
}

void stdin_frame(struct op *op, const char *b, size_t n)
{
    if (!op->in_open)
        die("protocol error: STDIN of a command without");
    if (n == 0) {
        op->in_open = false;
        op->in_eof = true;
    } else if (op->in_fd < 0) {
        op->uncredited += (uint32_t)n;
    } else {
        size_t have = op->in_n - op->in_off;
        if (have + op->uncredited + n > ORCH_WIRE_WINDOW)
            die("protocol error: STDIN beyond its credit");
        if (op->in_n + n > op->in_cap) {
            if (op->in_off)
                memmove(op->in, op->in + op->in_off, have);
            op->in_off = 0;
            op->in_n = have;
            if (have + n > op->in_cap) {
                op->in_cap = have + n > ORCH_WIRE_MAX ? ORCH_WIRE_WINDOW : ORCH_WIRE_MAX;
                char *more = realloc(op->in, op->in_cap);
                if (!more)
                    die("no memory for stdin");
                op->in = more;
            }
        }
        memcpy(op->in + op->in_n, b, n);
        op->in_n += n;
    }
    stdin_write(op);
}

/* Moves one chunk of output towards the host. True: call again, there may be more. */
static bool stream_pump(struct op *op, int i)
{
    struct stream *s = &op->out[i];
    uint64_t may = op->max_output ? op->max_output - s->sent : UINT64_MAX;
    static uint8_t waste[CHUNK];
    if (s->fd < 0 || (may && queued() >= OUT_DATA))
        return s->fd >= 0;
    ssize_t n = read(s->fd, may ? out_room(CHUNK) : waste, CHUNK);
    if (n < 0 && errno == EINTR)
        return true;
    if (n < 0 && errno == EAGAIN) {
        if (op->reaped) /* called when the tree is gone: this was all */
            close_fd(&s->fd);
        return false;
    }
    if (n <= 0) { /* the end; EIO is a terminal's */
        close_fd(&s->fd);
        return false;
    }
    uint64_t take = (uint64_t)n < may ? (uint64_t)n : may;
    s->sent += take;
    s->dropped += (uint64_t)n - take;
    if (take)
        out_commit(op->id, i ? ORCH_WIRE_STDERR : ORCH_WIRE_STDOUT, take);
    return true;
}

static void exec_report(struct op *op)
{
    struct orch_wire_exit e = {
        .fail = op->fail[0],
        .sys_errno = op->fail[1],
        .status = WIFEXITED(op->status) ? WEXITSTATUS(op->status) : -1,
        .signal = WIFSIGNALED(op->status) ? WTERMSIG(op->status) : 0,
        .flags = (op->timed_out ? ORCH_WIRE_EXIT_TIMED_OUT : 0) |
                 (op->out[0].dropped ? ORCH_WIRE_EXIT_CUT_STDOUT : 0) |
                 (op->out[1].dropped ? ORCH_WIRE_EXIT_CUT_STDERR : 0) |
                 (op->group && group_starved(op->group) ? ORCH_WIRE_EXIT_MEMORY : 0),
        .dropped_stdout = op->out[0].dropped,
        .dropped_stderr = op->out[1].dropped,
    };
    if (!op->dropped)
        send_frame(op->id, ORCH_WIRE_EXIT, &e, sizeof e);
}

void exec_turn(struct op *op, int64_t now, const struct pollfd *set)
{
    bool ready[4];
    for (int i = 0; i < 4; i++)
        ready[i] = op->at[i] >= 0 && set[op->at[i]].revents;
    if (op->fail_fd >= 0 && (ready[0] || op->reaped))
        exec_check(op);
    if (ready[1])
        stdin_write(op);
    if (op->deadline && now >= op->deadline && !op->reaped && !op->killing) {
        if (!op->timed_out) {
            op->timed_out = true;
            op->deadline = now + KILL_AFTER_MS;
            tree_signal(op, SIGTERM);
        } else {
            tree_kill(op);
        }
    } else if (op->killing && now >= op->deadline) {
        tree_kill(op);
    }
    if (op->reaped && op->group && !group_empty(op->group)) {
        if (!op->killing)
            tree_kill(op); /* what the command left behind */
    } else if (op->reaped) {
        op->draining = stream_pump(op, 0) | stream_pump(op, 1);
        if (!op->draining) {
            exec_report(op);
            op_free(op);
        }
        return;
    }
    for (int i = 0; i < 2; i++)
        if (ready[2 + i] && op->fail_fd < 0)
            stream_pump(op, i);
}
