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
#include "wire.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_OPS 512
#define MAX_EXECS 256
#define CHUNK (32 * 1024)         /* bytes taken from one stream per turn; what the port takes in one write */
#define OUT_DATA (128 * 1024)     /* bulk data is added while less than this is queued */
#define OUT_REPLY (192 * 1024)    /* frames from the host are handled while less than this is queued */
#define OUT_CAP (288 * 1024)      /* the rest is for one turn's EXIT, STARTED and CREDIT frames */
#define KILL_AFTER_MS 2000        /* from TERM to KILL */
#define KILL_RETRY_MS 20
#define LIST_ENTRIES 65536
#define PATH_DEFAULT "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

enum kind { EXEC, WRITE, READ, LIST };

struct stream {
    int fd; /* -1: ended */
    uint64_t sent, dropped;
};

/* A cgroup for an exec; events is its cgroup.events, 0: not made yet. Used again, since making one
 * costs as much as a fork, but not after cgroup.kill: Linux 6.14 and later compare the count of kills
 * of the wrong cgroup, and kill at birth what is cloned into one that was killed before. */
struct cgroup {
    int dir, events;
    bool busy, killed;
    char name[16];
};

struct op {
    struct op *next;
    uint32_t id;
    enum kind kind;
    bool dropped; /* the host forgot it: end it, send nothing */

    /* EXEC; WARM is one with id 0 */
    pid_t pid;
    struct cgroup *group; /* NULL: pid is a supervisor */
    int fail_fd;         /* CLOEXEC pipe: empty at its end when the exec succeeded; -1 after */
    uint32_t fail[2];    /* enum orch_wire_fail, errno */
    bool reaped, killing, timed_out, draining, pty;
    int status;
    int64_t deadline; /* next step against the tree; 0: none */
    uint64_t max_output;
    struct stream out[2];
    int in_fd; /* -1: closed */
    bool in_open; /* stdin frames may come */
    char *in;     /* bytes for in_fd: in[in_off..in_n) */
    size_t in_off, in_n, in_cap;
    uint32_t uncredited; /* taken, not yet told */
    bool in_eof;

    /* files */
    int fd;
    DIR *dir;
    char *path, *temp;
    uint64_t left, bytes;
    uint32_t entries;

    short at[4]; /* this turn's places in the poll set: fail_fd, in_fd, out[0], out[1]; -1: none */
};

static int port = -1, sig_fd = -1;
static bool hosted; /* --fd */
static int cgroup_fd = -1;
static struct cgroup groups[MAX_EXECS];
static unsigned n_groups; /* ever made, for their names */
static struct op *ops;
static unsigned n_ops, n_execs;
static struct rlimit nofile;

static uint8_t in_buf[sizeof(struct orch_wire_head) + ORCH_WIRE_MAX];
static size_t in_n;
static uint8_t out_buf[OUT_CAP];
static size_t out_off, out_n; /* out_buf[out_off..out_n) is to be written */

/* ---- the end ---- */

static _Noreturn void power(int how)
{
    sync();
    reboot(how);
    _exit(0); /* in a namespace that may not reboot; as the guest's PID 1 this panics, with the same effect */
}

/* The host broke the protocol, or the guest cannot be run: nothing sensible is left to be done. */
static _Noreturn void die(const char *why)
{
    char line[256];
    int n = snprintf(line, sizeof line, "orch agent: %.200s: %m\n", why);
    int fd = hosted ? 2 : open("/dev/kmsg", O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    if (write(fd, line, (size_t)n) < 0) /* as one piece: the kernel's log cannot be sought, as dprintf wants to */
        sync();
    power(RB_AUTOBOOT);
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- sending ---- */

static size_t queued(void)
{
    return out_n - out_off;
}

/* Room for a payload of at most n bytes at the end of the queue. */
static uint8_t *out_room(size_t n)
{
    if (out_off > 0 && out_n + sizeof(struct orch_wire_head) + n > OUT_CAP) {
        memmove(out_buf, out_buf + out_off, queued());
        out_n -= out_off;
        out_off = 0;
    }
    if (out_n + sizeof(struct orch_wire_head) + n > OUT_CAP)
        die("the host does not read");
    return out_buf + out_n + sizeof(struct orch_wire_head);
}

/* Makes what was put into out_room a frame. */
static void out_commit(uint32_t id, enum orch_wire_type type, size_t n)
{
    struct orch_wire_head h = { .len = (uint32_t)n, .id = id, .type = (uint8_t)type };
    memcpy(out_buf + out_n, &h, sizeof h);
    out_n += sizeof h + n;
}

static void send_frame(uint32_t id, enum orch_wire_type type, const void *p, size_t n)
{
    memcpy(out_room(n), p, n);
    out_commit(id, type, n);
}

static void send_done(uint32_t id, int error, uint64_t bytes)
{
    struct orch_wire_done d = { .sys_errno = (uint32_t)error, .bytes = bytes };
    send_frame(id, ORCH_WIRE_DONE, &d, sizeof d);
}

static void send_hello(const uint8_t *epoch)
{
    struct orch_wire_hello h = { .version = ORCH_WIRE_VERSION };
    if (epoch)
        memcpy(h.epoch, epoch, sizeof h.epoch);
    send_frame(0, ORCH_WIRE_HELLO, &h, sizeof h);
}

static void send_credit(struct op *op, uint32_t n)
{
    if (n && !op->dropped)
        send_frame(op->id, ORCH_WIRE_CREDIT, &n, sizeof n);
}

static void flush(void)
{
    while (queued()) {
        ssize_t n = write(port, out_buf + out_off, queued());
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0)
            power(RB_POWER_OFF);
        out_off += (size_t)n;
    }
    out_off = out_n = 0;
}

/* ---- cgroups ---- */

/* A free cgroup, or NULL with errno. */
static struct cgroup *group_take(void)
{
    for (int i = 0; i < MAX_EXECS; i++) {
        struct cgroup *g = &groups[i];
        if (g->busy)
            continue;
        if (!g->events) {
            snprintf(g->name, sizeof g->name, "exec-%u", n_groups++);
            if (mkdirat(cgroup_fd, g->name, 0755) < 0)
                return NULL;
            int dir = openat(cgroup_fd, g->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            int events = openat(dir, "cgroup.events", O_RDONLY | O_CLOEXEC);
            if (events < 0) {
                close_fd(&dir);
                return NULL;
            }
            g->dir = dir;
            g->events = events;
        }
        g->busy = true;
        return g;
    }
    errno = EAGAIN;
    return NULL;
}

static void group_give(struct cgroup *g)
{
    if (g->killed) {
        close(g->events);
        close(g->dir);
        unlinkat(cgroup_fd, g->name, AT_REMOVEDIR);
        *g = (struct cgroup){ 0 };
    }
    g->busy = false;
}

static bool group_empty(const struct cgroup *g)
{
    char b[128];
    ssize_t n = pread(g->events, b, sizeof b - 1, 0);
    b[n > 0 ? n : 0] = 0;
    return strstr(b, "populated 0") != NULL;
}

/* ---- operations ---- */

static struct op *op_find(uint32_t id)
{
    for (struct op *op = ops; op; op = op->next)
        if (op->id == id && !op->dropped)
            return op;
    return NULL;
}

static struct op *op_new(uint32_t id, enum kind kind)
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

static void op_free(struct op *op)
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

/* ---- process trees ---- */

struct proc {
    pid_t pid, parent;
    bool in;
};

static int procs_read(struct proc *p, int max)
{
    DIR *d = opendir("/proc");
    int n = 0;
    for (struct dirent *e; d && n < max && (e = readdir(d));) {
        char path[280], b[512], *paren;
        if (e->d_name[0] < '1' || e->d_name[0] > '9')
            continue;
        snprintf(path, sizeof path, "/proc/%s/stat", e->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t k = fd < 0 ? -1 : read(fd, b, sizeof b - 1);
        close_fd(&fd);
        if (k <= 0)
            continue;
        b[k] = 0;
        if ((paren = strrchr(b, ')')) && sscanf(paren, ") %*c %d", &p[n].parent) == 1) {
            p[n].pid = atoi(e->d_name);
            p[n++].in = false;
        }
    }
    if (d)
        closedir(d);
    return n;
}

/* Signals every descendant of top, not itself. */
static void descendants_signal(pid_t top, int signo)
{
    enum { MAX = 8192 };
    static struct proc p[MAX];
    int n = procs_read(p, MAX);
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < n; i++) {
            bool in = p[i].parent == top;
            for (int k = 0; !in && !p[i].in && k < n; k++)
                in = p[k].in && p[k].pid == p[i].parent;
            more |= in && !p[i].in;
            p[i].in |= in;
        }
    }
    for (int i = 0; i < n; i++)
        if (p[i].in)
            kill(p[i].pid, signo);
}

static void tree_signal(const struct op *op, int signo)
{
    if (op->pid <= 0 || (op->reaped && !op->group)) /* the number may be another's by now */
        return;
    if (!op->group) {
        descendants_signal(op->pid, signo);
        return;
    }
    int fd = openat(op->group->dir, signo == SIGKILL ? "cgroup.kill" : "cgroup.procs",
                    (signo == SIGKILL ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
    if (fd < 0)
        return;
    if (signo == SIGKILL) {
        op->group->killed = true;
        if (write(fd, "1", 1) != 1 && !op->reaped)
            kill(op->pid, SIGKILL);
    } else {
        FILE *f = fdopen(fd, "re");
        for (int pid; f && fscanf(f, "%d", &pid) == 1;)
            kill(pid, signo);
        if (f)
            fclose(f);
        return;
    }
    close(fd);
}

static void tree_kill(struct op *op)
{
    op->killing = true;
    op->deadline = now_ms() + KILL_RETRY_MS;
    tree_signal(op, SIGKILL);
}

/* ---- users ---- */

struct user {
    uid_t uid;
    gid_t gid;
    char name[64], home[256];
};

/* Opens what cannot block: a regular file. errno EINVAL or EISDIR for anything else. */
static int open_regular(const char *path, int flags)
{
    struct stat st;
    int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode))
        return fd;
    close(fd);
    errno = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    return -1;
}

/* Looks up a name or a number in /etc/passwd; an unlisted number is a user without home. By hand,
 * since the C library's own look-up wants shared objects. */
static bool user_find(const char *who, struct user *u)
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

/* ---- exec ---- */

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

/* Like execvp, but looks before it leaps: under emulation a failed execve costs 0.3 ms, a look 0.02,
 * and most of PATH does not have the program. Returns with errno. */
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
        if (snprintf(file, sizeof file, "%.*s/%s", n, path, argv[0]) < (int)sizeof file && access(file, F_OK) == 0) {
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
    /* By the system calls: libc would tell its other threads, and this process is on the agent's memory. */
    if (syscall(SYS_setgroups, 0, NULL) < 0 || syscall(SYS_setresgid, p->u.gid, p->u.gid, p->u.gid) < 0 ||
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

static bool set_nonblock(int fd)
{
    return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0;
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
    struct winsize size = { .ws_row = p->x.rows ? p->x.rows : 24, .ws_col = p->x.cols ? p->x.cols : 80 };
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
    if (op->in_open ? !make_pipe(1, &op->in_fd, &p->in) : (p->in = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        return false;
    return make_pipe(0, &op->out[0].fd, &p->out) && make_pipe(0, &op->out[1].fd, &p->err);
}

/* Makes the command's process in its cgroup, on the agent's memory and a stack of its own, the agent
 * suspended until it executes: copying page tables is what a fork costs most, and under emulation all of
 * that kernel code is translated first. child_exec allocates nothing and changes only `environ`. */
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
    char home[300], user[80];
    snprintf(home, sizeof home, "HOME=%s", p->u.home);
    snprintf(user, sizeof user, "USER=%s", p->u.name);
    env_default(p->env, &p->x.n_env, "PATH=" PATH_DEFAULT);
    env_default(p->env, &p->x.n_env, home);
    env_default(p->env, &p->x.n_env, user);
    env_default(p->env, &p->x.n_env, "LANG=C.UTF-8");

    errno = EAGAIN;
    bool ok = n_execs <= MAX_EXECS && make_stdio(op, p) && (cgroup_fd < 0 || (op->group = group_take()));
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

static void exec_frame(uint32_t id, const char *b, size_t n)
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

static void warm(void)
{
    const char *argv[] = { "true", NULL }, *env[5] = { NULL };
    struct plan p = { .x = { .n_argv = 1 }, .cwd = "", .user = "1000", .argv = argv, .env = env };
    struct op *op = op_new(0, EXEC);
    if (op)
        exec_start(op, &p);
    else
        send_done(0, ENOMEM, 0);
}

/* Learns whether the exec worked. Output can only follow, so until then no stream is read. */
static void exec_check(struct op *op)
{
    uint32_t pid = (uint32_t)op->pid;
    ssize_t n = read(op->fail_fd, op->fail, sizeof op->fail);
    if (n < 0 && (errno == EAGAIN || errno == EINTR) && !op->reaped)
        return;
    close_fd(&op->fail_fd);
    if (n != (ssize_t)sizeof op->fail && !op->dropped && op->id)
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

static void stdin_frame(struct op *op, const char *b, size_t n)
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
    if (take && op->id)
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
                 (op->out[1].dropped ? ORCH_WIRE_EXIT_CUT_STDERR : 0),
        .dropped_stdout = op->out[0].dropped,
        .dropped_stderr = op->out[1].dropped,
    };
    if (op->dropped)
        return;
    if (op->id)
        send_frame(op->id, ORCH_WIRE_EXIT, &e, sizeof e);
    else
        send_done(0, (int)op->fail[1], 0);
}

/* One turn of an exec; frees it when it is over. `ready` says what poll found. */
static void exec_turn(struct op *op, int64_t now, const struct pollfd *set)
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

/* ---- files ---- */

static void file_end(struct op *op, int error)
{
    send_done(op->id, error, op->bytes);
    op_free(op);
}

static int write_open(struct op *op, const struct orch_wire_file *f)
{
    struct stat st;
    struct user u;
    char uid[16];
    snprintf(uid, sizeof uid, "%u", f->uid);
    if (lstat(op->path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISLNK(st.st_mode))
        return S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    const char *slash = strrchr(op->path, '/');
    char *temp;
    if (asprintf(&temp, "%.*s.orch-write-%u", slash ? (int)(slash + 1 - op->path) : 0, op->path, op->id) < 0)
        return ENOMEM;
    op->fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (op->fd < 0) {
        int error = errno;
        free(temp);
        return error;
    }
    op->temp = temp;
    if (!user_find(uid, &u) || fchown(op->fd, u.uid, u.gid) < 0 || fchmod(op->fd, f->mode & 07777) < 0)
        return errno;
    return 0;
}

static void write_data(struct op *op, const void *b, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t k = write(op->fd, (const char *)b + done, n - done);
        if (k < 0 && errno != EINTR) {
            file_end(op, errno);
            return;
        }
        done += k > 0 ? (size_t)k : 0;
    }
    op->bytes += n;
    if (n) {
        send_credit(op, (uint32_t)n);
        return;
    }
    int error = rename(op->temp, op->path) < 0 ? errno : 0;
    if (!error) {
        free(op->temp);
        op->temp = NULL;
    }
    file_end(op, error);
}

static int read_open(struct op *op, const struct orch_wire_file *f)
{
    op->left = f->length ? f->length : UINT64_MAX;
    if ((op->fd = open_regular(op->path, O_RDONLY)) < 0)
        return errno;
    if (f->offset > INT64_MAX)
        return EINVAL;
    return lseek(op->fd, (off_t)f->offset, SEEK_SET) < 0 ? errno : 0;
}

static int list_open(struct op *op)
{
    int fd = open(op->path, O_RDONLY | O_DIRECTORY | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && (op->dir = fdopendir(fd)))
        return 0;
    int error = errno;
    close_fd(&fd);
    return error;
}

static void file_frame(uint32_t id, enum kind kind, const char *b, size_t n)
{
    struct orch_wire_file f = { 0 };
    size_t head = kind == LIST ? 0 : sizeof f;
    if (op_find(id) || n < head)
        die("protocol error: file operation");
    memcpy(&f, b, head);
    struct op *op = n_ops < MAX_OPS ? op_new(id, kind) : NULL;
    if (!op || !(op->path = strndup(b + head, n - head))) {
        send_done(id, EAGAIN, 0);
        if (op)
            op_free(op);
        return;
    }
    int error;
    if (strlen(op->path) != n - head)
        error = EINVAL;
    else
        error = kind == LIST ? list_open(op) : kind == READ ? read_open(op, &f) : write_open(op, &f);
    if (error)
        file_end(op, error);
}

static void read_turn(struct op *op)
{
    size_t want = op->left < CHUNK ? (size_t)op->left : CHUNK;
    ssize_t n = want ? read(op->fd, out_room(CHUNK), want) : 0;
    if (n <= 0) {
        file_end(op, n < 0 ? errno : 0);
        return;
    }
    op->left -= (uint64_t)n;
    op->bytes += (uint64_t)n;
    out_commit(op->id, ORCH_WIRE_DATA, (size_t)n);
}

static char type_letter(mode_t m)
{
    return S_ISREG(m) ? 'f' : S_ISDIR(m) ? 'd' : S_ISLNK(m) ? 'l' : S_ISFIFO(m) ? 'p' :
           S_ISSOCK(m) ? 's' : S_ISCHR(m) ? 'c' : 'b';
}

static void list_turn(struct op *op)
{
    char *b = (char *)out_room(CHUNK);
    size_t n = 0;
    struct dirent *e = NULL;
    errno = 0;
    while (n < CHUNK - 512 && op->entries < LIST_ENTRIES && (e = readdir(op->dir))) {
        struct stat st;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 ||
            fstatat(dirfd(op->dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        n += (size_t)snprintf(b + n, CHUNK - n, "%c %04o %lld %lld %s", type_letter(st.st_mode),
                              st.st_mode & 07777, (long long)st.st_size, (long long)st.st_mtime, e->d_name) + 1;
        op->entries++;
    }
    int error = errno;
    op->bytes += n;
    if (n)
        out_commit(op->id, ORCH_WIRE_DATA, n);
    if (!e)
        file_end(op, op->entries < LIST_ENTRIES ? error : EFBIG);
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
    if (!h->id != (h->type == ORCH_WIRE_RESTORE || h->type == ORCH_WIRE_WARM))
        die("protocol error: id");
    switch (h->type) {
    case ORCH_WIRE_RESTORE:
        if (h->len != sizeof r)
            break;
        memcpy(&r, b, sizeof r);
        restore(&r);
        explicit_bzero(&r, sizeof r);
        return;
    case ORCH_WIRE_WARM:
        if (h->len)
            break;
        warm();
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

/* Handles the whole frames in in_buf while their answers have room. */
static void handle_all(void)
{
    size_t off = 0;
    struct orch_wire_head h;
    while (in_n - off >= sizeof h && queued() < OUT_REPLY) {
        memcpy(&h, in_buf + off, sizeof h);
        if (h.len > ORCH_WIRE_MAX || h.zero[0] || h.zero[1] || h.zero[2])
            die("protocol error: head");
        if (in_n - off - sizeof h < h.len)
            break;
        handle(&h, (const char *)in_buf + off + sizeof h);
        off += sizeof h + h.len;
    }
    in_n -= off;
    memmove(in_buf, in_buf + off, in_n);
}

static void receive(void)
{
    ssize_t n = read(port, in_buf + in_n, sizeof in_buf - in_n);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        power(RB_POWER_OFF);
    in_n += n > 0 ? (size_t)n : 0;
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
    static struct pollfd set[2 + 4 * MAX_OPS];
    nfds_t n = 0;
    int64_t wait = -1, now = now_ms();
    bool room = queued() < OUT_DATA;
    watch(set, &n, port, (short)((in_n < sizeof in_buf ? POLLIN : 0) | (queued() ? POLLOUT : 0)));
    watch(set, &n, sig_fd, POLLIN);
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
        if (op->reaped ? (op->draining ? room : !op->killing) : room && (op->kind == READ || op->kind == LIST))
            sooner(&wait, 0);
    }
    if (poll(set, n, (int)wait) < 0 && errno != EINTR)
        die("poll");
    if (set[0].revents & (POLLIN | POLLERR | POLLHUP))
        receive();
    now = now_ms();
    if (set[1].revents)
        reap();
    for (struct op *op = ops, *next; op; op = next) {
        next = op->next;
        if (op->kind == EXEC)
            exec_turn(op, now, set);
        else if (op->kind == READ && queued() < OUT_DATA)
            read_turn(op);
        else if (op->kind == LIST && queued() < OUT_DATA)
            list_turn(op);
    }
    handle_all();
    flush();
    rotate();
}

/* ---- boot ---- */

static void must_mount(const char *what, const char *where, const char *type, unsigned long flags, const char *data)
{
    mkdir(where, 0755);
    if (mount(what, where, type, flags, data) < 0)
        die(where);
}

/* Bit n: there is a virtio device of type n (1 network, 2 block, …). */
static uint64_t virtio_devices(void)
{
    uint64_t have = 0;
    DIR *d = opendir("/sys/bus/virtio/devices");
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[300], text[16] = "";
        snprintf(path, sizeof path, "/sys/bus/virtio/devices/%.200s/device", e->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && read(fd, text, sizeof text - 1) > 0)
            have |= 1ULL << (strtoul(text, NULL, 16) & 63);
        close_fd(&fd);
    }
    if (d)
        closedir(d);
    return have;
}

/* Lines of "PATH" or "PATH TYPE": the latter only where there is a virtio device of that type. */
static void load_modules(void)
{
    char line[512];
    uint64_t have = 0;
    FILE *f = fopen("/etc/orch/modules", "re");
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *type = strchr(line, ' ');
        if (type) {
            *type++ = 0;
            have = have ? have : virtio_devices() | 1;
            if (!(have & 1ULL << (strtoul(type, NULL, 10) & 63)))
                continue;
        }
        int fd = open(line, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            die(line);
        close(fd);
    }
    if (f)
        fclose(f);
}

/* Where the image has a disk, its file system with a writable layer in memory over it becomes the root,
 * the agent's too; what is mounted already goes along. Without its driver this is not the guest that was asked for. */
static void enter_disk(void)
{
    static const char *const moved[][2] = { { "/proc", "/mnt/new/proc" }, { "/sys", "/mnt/new/sys" }, { "/dev", "/mnt/new/dev" } };
    if (!(virtio_devices() & 1ULL << 2))
        return;
    must_mount("/dev/vda", "/mnt/disk", "erofs", MS_RDONLY, NULL);
    must_mount("tmpfs", "/mnt/rw", "tmpfs", 0, "mode=0755");
    mkdir("/mnt/rw/upper", 0755);
    mkdir("/mnt/rw/work", 0755);
    must_mount("overlay", "/mnt/new", "overlay", 0, "lowerdir=/mnt/disk,upperdir=/mnt/rw/upper,workdir=/mnt/rw/work");
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++)
        if (mount(moved[i][0], moved[i][1], NULL, MS_MOVE, NULL) < 0)
            die(moved[i][1]);
    if (chdir("/mnt/new") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        die("the disk as root");
}

/* Opens the port, -1 while it is not there. */
static int find_port(void)
{
    int fd = -1;
    DIR *d = opendir("/sys/class/virtio-ports");
    for (struct dirent *e; d && fd < 0 && (e = readdir(d));) {
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%.200s/name", e->d_name);
        int f = open(path, O_RDONLY | O_CLOEXEC);
        if (f < 0)
            continue;
        if (read(f, name, sizeof name - 1) > 0 && strcmp(name, ORCH_WIRE_PORT "\n") == 0) {
            snprintf(path, sizeof path, "/dev/%.200s", e->d_name);
            fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
        close(f);
    }
    if (d)
        closedir(d);
    return fd;
}

static void set_addr(struct sockaddr *sa, uint32_t addr)
{
    struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(addr) };
    memcpy(sa, &in, sizeof in);
}

/* The same in every guest, and so frozen into the template. */
static void networks_up(void)
{
    struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
    struct ifreq addr = { .ifr_name = "eth0" }, mask = addr, up = addr;
    struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0)
        ioctl(fd, SIOCSIFFLAGS, &lo);
    if (virtio_devices() & 1 << 1) {
        int no_ipv6 = open("/proc/sys/net/ipv6/conf/all/disable_ipv6", O_WRONLY | O_CLOEXEC);
        if (no_ipv6 >= 0 && write(no_ipv6, "1", 1) != 1)
            die("disable_ipv6");
        close_fd(&no_ipv6);
        set_addr(&addr.ifr_addr, ORCH_WIRE_NET_ADDR);
        set_addr(&mask.ifr_netmask, ~0u << (32 - ORCH_WIRE_NET_BITS));
        up.ifr_flags = IFF_UP | IFF_RUNNING;
        set_addr(&route.rt_dst, 0);
        set_addr(&route.rt_genmask, 0);
        set_addr(&route.rt_gateway, ORCH_WIRE_NET_GATEWAY);
        if (ioctl(fd, SIOCSIFADDR, &addr) || ioctl(fd, SIOCSIFNETMASK, &mask) ||
            ioctl(fd, SIOCSIFFLAGS, &up) || ioctl(fd, SIOCADDRT, &route))
            die("eth0");
        /* The driver's worker sees the link, and then the kernel's opens the queue; until then what is
         * sent is dropped, in clones too. */
        up.ifr_flags = 0;
        for (int i = 0; !(up.ifr_flags & IFF_RUNNING); i++) {
            if (i == 10000 || ioctl(fd, SIOCGIFFLAGS, &up))
                die("eth0: no link");
            usleep(500);
        }
    }
    close_fd(&fd);
}

static void boot(void)
{
    const unsigned long strict = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    must_mount("proc", "/proc", "proc", strict, NULL);
    must_mount("sysfs", "/sys", "sysfs", strict, NULL);
    must_mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = 0; i < 3; i++)
        dup2(null, i);
    if (null > 2)
        close(null);
    load_modules();
    enter_disk();
    must_mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    must_mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    must_mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    must_mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", strict, NULL); /* optional */

    char name[64] = "";
    int fd = open("/etc/hostname", O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, name, sizeof name - 1) > 0)
        sethostname(name, strcspn(name, "\n"));
    close_fd(&fd);
    networks_up();

    /* The port appears, gets its name and is opened by the host in steps of the driver's worker. */
    for (int i = 0; port < 0 && i < 30000; i++)
        if ((port = find_port()) < 0)
            usleep(500);
    if (port < 0)
        die("no virtio-serial port named " ORCH_WIRE_PORT);
    for (int i = 0; i < 30000; i++) {
        struct pollfd p = { .fd = port, .events = POLLOUT };
        if (poll(&p, 1, 0) == 1 && !(p.revents & POLLHUP))
            return;
        usleep(500);
    }
    die("the host does not open the port");
}

/* The cgroups are used only if trees can be killed through them. */
static void find_cgroups(void)
{
    cgroup_fd = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct cgroup *g = cgroup_fd < 0 ? NULL : group_take();
    if (g)
        g->busy = false;
    if (!g || faccessat(g->dir, "cgroup.kill", W_OK, 0) < 0)
        close_fd(&cgroup_fd);
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
