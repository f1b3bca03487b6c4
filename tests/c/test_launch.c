/* Drives core/launch/launch.c against the built launcher, with the escape probe as the VMM. Needs
 * root, since every case runs as root and as an ordinary user; each case is a child process of its
 * own uid. */
#include <errno.h>
#include <fcntl.h>
#include <dirent.h>
#include <libgen.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "child.h"
#include "launch/launch.h"

#define PROBE_PATH "/vmm"

static char dir[] = "/tmp/orch-launch-XXXXXX"; /* also the mark that finds our processes */
static char launcher[64], probe[64], data[64];

/* ---- what runs on the machine */

static size_t read_proc(pid_t pid, const char *what, char *out, size_t n)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, what);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = 0, r = 0;
    while (fd >= 0 && (r = read(fd, out + got, n - 1 - (size_t)got)) > 0)
        got += r;
    if (fd >= 0)
        close(fd);
    out[got] = 0;
    return (size_t)got;
}

/* The state's letter, 0 when gone; and the parent. */
static char state_of(pid_t pid, pid_t *parent)
{
    char text[512], state = 0;
    read_proc(pid, "stat", text, sizeof text);
    return sscanf(text, "%*d (%*[^)]) %c %d", &state, parent) == 2 ? state : 0;
}

/* Processes whose command line holds our mark: launchers, inits, VMMs. The first argument that
 * starts with `first` filters (NULL: any). */
static int find_processes(const char *first, pid_t *out, int max)
{
    int n = 0;
    DIR *d = opendir("/proc");
    for (struct dirent *e; (e = readdir(d)) && n < max;) {
        pid_t pid = atoi(e->d_name);
        char text[1024];
        size_t len = pid > 0 ? read_proc(pid, "cmdline", text, sizeof text) : 0;
        if (!len || !memmem(text, len, dir, strlen(dir)) ||
            (first && strncmp(text, first, strlen(first))))
            continue;
        out[n++] = pid;
    }
    closedir(d);
    return n;
}

struct spaces {
    ino_t ino[512];
    int n;
};

static const char *const kinds[] = { "user",  "pid_for_children", "mnt", "net", "ipc", "uts",
                                     "cgroup" };

static ino_t space_of(pid_t pid, const char *kind)
{
    char path[64];
    struct stat st;
    snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, kind);
    return stat(path, &st) ? 0 : st.st_ino;
}

/* The namespaces of these processes that are not our own. */
static void note_spaces(struct spaces *s, const pid_t *pids, int n)
{
    for (int i = 0; i < n; i++)
        for (size_t k = 0; k < ORCH_ARRAY_LEN(kinds) && s->n < (int)ORCH_ARRAY_LEN(s->ino); k++) {
            ino_t ino = space_of(pids[i], kinds[k]);
            if (ino && ino != space_of(getpid(), kinds[k]))
                s->ino[s->n++] = ino;
        }
}

/* In how many of them something of ours still runs. A process that is ending has no command line
 * any more; one that has ended and waits for the system's init is none of ours. Others may have
 * been given the number of a namespace that was freed. */
static int count_spaces(const struct spaces *s)
{
    int n = 0;
    DIR *d = opendir("/proc");
    for (struct dirent *e; (e = readdir(d));) {
        pid_t pid = atoi(e->d_name), parent;
        char text[1024];
        size_t len = pid > 0 ? read_proc(pid, "cmdline", text, sizeof text) : 0;
        if (pid <= 0 || (len && !memmem(text, len, dir, strlen(dir))))
            continue;
        for (size_t k = 0; state_of(pid, &parent) != 'Z' && k < ORCH_ARRAY_LEN(kinds); k++) {
            ino_t ino = space_of(pid, kinds[k]);
            for (int i = 0; ino && i < s->n; i++)
                n += s->ino[i] == ino;
        }
    }
    closedir(d);
    return n;
}

/* Returns when at most `left` of our processes remain. */
static void wait_gone(int left, const char *what)
{
    pid_t pids[256];
    int n;
    for (int64_t end = orch_now_us() + WAIT_US; (n = find_processes(NULL, pids, 256)) > left;
         poll(NULL, 0, 1))
        CHECK(orch_now_us() < end, "%s: %d processes remain, e.g. %d", what, n, pids[0]);
}

static int count_fds(pid_t pid)
{
    char path[64];
    int n = -2;
    snprintf(path, sizeof path, "/proc/%d/fd", pid);
    DIR *d = opendir(path);
    CHECK(d, "%s: %m", path);
    while (readdir(d))
        n++;
    closedir(d);
    return n - (pid == getpid());
}

/* ---- a cell under test */

struct cell {
    struct orch_cell *c;
    int log; /* read end */
    int started, exited, failed, status;
    struct orch_err err;
};

static struct orch_loop *loop;
static struct orch_launcher *la;
static int n_lost;
static char lost_why[200];

static void on_started(void *ud)
{
    struct cell *t = ud;
    t->started++;
}

static void on_exit_(void *ud, int status)
{
    struct cell *t = ud;
    t->exited++;
    t->status = status;
}

static void on_error(void *ud, const struct orch_err *err)
{
    struct cell *t = ud;
    t->failed++;
    t->err = *err;
}

static void on_lost(void *ud, const char *why)
{
    (void)ud;
    n_lost++;
    snprintf(lost_why, sizeof lost_why, "%s", why);
}

static void open_launcher(void)
{
    struct orch_err err = { .code = 0 };
    loop = orch_loop_new(&err);
    la = orch_launcher_new(loop, launcher, on_lost, NULL, &err);
    CHECK(la, "%s", err.msg);
}

static void close_launcher(void)
{
    orch_launcher_free(la);
    orch_loop_free(loop);
}

static struct orch_cell_opts options(struct cell *t, const char *const *argv)
{
    static const struct orch_cell_bind binds[] = { { probe, PROBE_PATH }, { data, "/data/file" } };
    *t = (struct cell){ .log = -1 };
    struct orch_cell_opts o = {
        .argv = argv,
        .binds = binds,
        .n_binds = 2,
        .on_started = on_started,
        .on_exit = on_exit_,
        .on_error = on_error,
        .ud = t,
    };
    for (int i = 0; i < ORCH_LAUNCH_FDS; i++)
        o.fds[i] = -1;
    return o;
}

static void start_cell(struct cell *t, const char *mode, const char *arg)
{
    const char *argv[] = { PROBE_PATH, mode, arg, NULL };
    struct orch_cell_opts o = options(t, argv);
    struct orch_err err = { .code = 0 };
    int p[2];
    CHECK(!pipe2(p, O_CLOEXEC), "%m");
    o.fds[ORCH_LAUNCH_FD_LOG] = p[1];
    t->log = p[0];
    t->c = orch_cell_new(la, &o, &err);
    CHECK(t->c, "%s", err.msg);
    close(p[1]);
}

static void end_cell(struct cell *t)
{
    orch_cell_free(t->c);
    if (t->log >= 0)
        close(t->log);
}

#define WAIT(cond) \
    for (int64_t end_ = orch_now_us() + WAIT_US; !(cond); orch_loop_step(loop, 100)) \
    CHECK(orch_now_us() < end_, "waited in vain")

static void read_log(struct cell *t, char *out, size_t n)
{
    size_t at = 0;
    for (ssize_t r; at < n - 1; at += (size_t)r) {
        struct pollfd pf = { t->log, POLLIN, 0 };
        CHECK(poll(&pf, 1, WAIT_MS) > 0, "no output");
        r = read(t->log, out + at, n - 1 - at);
        if (r <= 0)
            break;
        if (!strcmp(out, "up\n"))
            break;
    }
    out[at] = 0;
}

static void start_sleeper(struct cell *t)
{
    char text[16] = "";
    start_cell(t, "sleep", dir);
    WAIT(t->started || t->failed || t->exited);
    CHECK(t->started, "%s", t->err.msg);
    struct pollfd pf = { t->log, POLLIN, 0 };
    CHECK(poll(&pf, 1, WAIT_MS) > 0 && read(t->log, text, 3) == 3 && !strcmp(text, "up\n"), "%s",
          text);
}

static void expect(const struct orch_err *err, const char *const *parts)
{
    CHECK(err->cls == ORCH_CLASS_ISOLATION, "class %d: %s", err->cls, err->msg);
    for (; *parts; parts++)
        CHECK(strstr(err->msg, *parts), "no `%s` in: %s", *parts, err->msg);
}
#define EXPECT(err, ...) expect(err, (const char *const[]){ __VA_ARGS__, NULL })

/* ---- the escape probe */

static int sealed_memfd(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(fd >= 0 && !ftruncate(fd, 65536), "%m");
    CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL), "%m");
    return fd;
}

/* A file of an image, as it is when it is finished (core/image): of the VMM's own uid, without a
 * write bit. */
static int image_file(void)
{
    char path[] = "/tmp/orch-launch-file-XXXXXX";
    int w = mkstemp(path);
    CHECK(w >= 0 && write(w, "image", 5) == 5 && !fchmod(w, 0444), "%m");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && !unlink(path), "%m");
    close(w);
    return fd;
}

/* The sealed memory and the files that nobody may write to differ in who says no. */
#define DESCRIPTOR(f, reopen, truncated, written, mapped) \
    f ": reopen: " reopen "\n" f ": reopen to truncate: " truncated "\n" f \
      ": reopen below: ENOTDIR\n" f ": read: ok\n" f ": write: " written "\n" f \
      ": shared map: " mapped "\n" f ": private map: ok\n" f ": map made writable: EACCES\n" f \
      ": hole in the map: EACCES\n" f ": truncate: EPERM\n" f ": truncate by link: EPERM\n" f \
      ": allocate: EPERM\n" f ": copy into: EPERM\n" f ": chmod: EPERM\n" f \
      ": chmod by link: EPERM\n" f ": chmod by path: EPERM\n" f ": chown: EPERM\n" f \
      ": xattr: EPERM\n" f ": xattr by link: EPERM\n" f ": xattr removed: EPERM\n" f \
      ": times: EPERM\n" f ": flags: EPERM\n" f ": link: EPERM\n" f ": rename: EPERM\n" f \
      ": lock: EPERM\n" f ": lock of a range: EPERM\n" f ": lease: EPERM\n" f \
      ": lease to write: EPERM\n" f ": signals: EPERM\n" f ": seal: EPERM\n" f ": mount: EPERM\n"

static const char escape[] =
    "pid: 1\n"
    "parent: 0\n"
    "uid: 65534 65534 gid: 65534 65534\n"
    "environment: PATH=/ -\n"
    "capabilities in the bounding set: 0\n"
    "capget: EPERM\n"
    "setuid: EPERM\n"
    "setgroups: EPERM\n"
    "unlock securebits: EPERM\n"
    "clear parent-death signal: EPERM\n"
    "no_new_privs off: EINVAL\n"
    "descriptors: 0 1 2 11 12 13 14 15 16 17\n"
    "open /etc/passwd: ENOENT\n"
    "open /proc: ENOENT\n"
    "open /proc/self/mem: ENOENT\n"
    "open /sys: ENOENT\n"
    "open /dev: ENOENT\n"
    "open /dev/kvm: ENOENT\n"
    "open /dev/net/tun: ENOENT\n"
    "open /tmp: ENOENT\n"
    "open /usr: ENOENT\n"
    "open /root: ENOENT\n"
    "open /../etc/passwd: ENOENT\n"
    "open /fd/../../proc/1/root: ENOENT\n"
    "open /: ok\n"
    "list /: EPERM\n"
    "create a file: EROFS\n"
    "create an unnamed file: EROFS\n"
    "own file for writing: ETXTBSY\n"
    "own file for reading: ok\n"
    "bound file for reading: ok\n"
    "bound file for writing: EROFS\n"
    "bound file: truncate: EROFS\n"
    "mkdir: EPERM\n"
    "unlink: EPERM\n"
    "rename: EPERM\n"
    "link: EPERM\n"
    "chmod: EPERM\n"
    "mknod: EPERM\n"
    "chdir: EPERM\n"
    "open by handle: EPERM\n"
    "mount tmpfs: EPERM\n"
    "remount for writing: EPERM\n"
    "umount: EPERM\n"
    "umount /fd: EPERM\n"
    "chroot: EPERM\n"
    "pivot_root: EPERM\n"
    "open_tree: EPERM\n"
    "move_mount: EPERM\n"
    "mount_setattr: EPERM\n"
    "fsopen: EPERM\n"
    "setns: EPERM\n"
    "unshare user: EPERM\n"
    "unshare net: EPERM\n"
    "unshare mounts: EPERM\n"
    "sethostname: EPERM\n"
    "socket inet: EPERM\n"
    "socket inet6: EPERM\n"
    "socket unix: EPERM\n"
    "socket netlink: EPERM\n"
    "socket nftables: EPERM\n"
    "socket packet: EPERM\n"
    "socket vsock: EPERM\n"
    "socket alg: EPERM\n"
    "socketpair: EPERM\n"
    "connect: EPERM\n"
    "bind: EPERM\n"
    "listen: EPERM\n"
    "accept: EPERM\n"
    "namespace of a socket: EPERM\n"
    "own socket: send: ok\n"
    "bpf: EPERM\n"
    "perf_event_open: EPERM\n"
    "io_uring_setup: ENOSYS\n"
    "userfaultfd: EPERM\n"
    "keyctl session: EPERM\n"
    "keyctl read: EPERM\n"
    "add_key: EPERM\n"
    "request_key: EPERM\n"
    "memfd_create: EPERM\n"
    "memfd_secret: EPERM\n"
    "shmget: EPERM\n"
    "mq_open: EPERM\n"
    "syslog: EPERM\n"
    "personality: EPERM\n"
    "modify_ldt: EPERM\n"
    "iopl: EPERM\n"
    "kexec_load: EPERM\n"
    "init_module: EPERM\n"
    "setpriority: EPERM\n"
    "clock_settime: EPERM\n"
    "inject into a terminal: EPERM\n"
    "KVM's ioctl: EPERM\n" DESCRIPTOR("memory", "ok", "EPERM", "EPERM", "EPERM")
        DESCRIPTOR("state", "ok", "EPERM", "EPERM", "EPERM")
            DESCRIPTOR("disk", "EACCES", "EACCES", "EBADF", "EACCES")
                DESCRIPTOR("kernel", "EACCES", "EACCES", "EBADF", "EACCES")
                    DESCRIPTOR("initrd", "EACCES", "EACCES", "EBADF",
                               "EACCES") "log: reopen to read: EACCES\n"
                                         "log: size: EPERM\n"
                                         "log: chmod: EPERM\n"
                                         "log: below: ENOTDIR\n"
                                         "socket: reopen: ENXIO\n"
                                         "control socket: reopen: ENXIO\n"
                                         "socket: chmod: EPERM\n"
                                         "socket: below: ENOTDIR\n"
                                         "no input: reopen: ok\n"
                                         "descriptors: list: EPERM\n"
                                         "descriptors: beside: ENOENT\n"
                                         "descriptors: above: ENOENT\n"
                                         "descriptors: create: ENOENT\n"
                                         "limit core: 1 1\n"
                                         "limit nofile: 64 64\n"
                                         "limit fsize: 16777216 16777216\n"
                                         "limit memlock: 0 0\n"
                                         "limit nproc: 16 16\n"
                                         "limit msgqueue: 0 0\n"
                                         "limit sigpending: 64 64\n"
                                         "limit as: 536870912 536870912\n"
                                         "raise nofile: EPERM\n"
                                         "lower core: EPERM\n"
                                         "map beyond as: ENOMEM\n"
                                         "mlock: EPERM\n"
                                         "kill all: EPERM\n"
                                         "kill 2: EPERM\n"
                                         "tgkill of another: ESRCH\n"
                                         "fork: EPERM\n"
                                         "fork sharing memory: EPERM\n"
                                         "clone into a user namespace: EPERM\n"
                                         "clone3: ENOSYS\n"
                                         "wait: EPERM\n"
                                         "ptrace traceme: EPERM\n"
                                         "ptrace attach: EPERM\n"
                                         "pidfd_open: EPERM\n"
                                         "process_vm_readv: EPERM\n"
                                         "execve of a shell: ENOENT\n"
                                         "execve of data: EACCES\n"
                                         "execve by descriptor: EPERM\n"
                                         "threads until EAGAIN: 16\n"
                                         "end\n";

/* Whoever starts it, the VMM gets the same answers, but for its own log pipe: that belongs to
 * orch's uid, which is the VMM's own only when orch is no root. */
static void compare(const char *got, bool root)
{
    char expected[sizeof escape];
    memcpy(expected, escape, sizeof escape);
    char *mine = strstr(expected, "log: reopen to read: EACCES\n");
    CHECK(mine, "the list has no such line");
    if (!root) {
        char *value = strchr(mine + 5, ':') + 2, *rest = value + strlen("EACCES");
        memmove(value + 2, rest, strlen(rest) + 1);
        memcpy(value, "ok", 2);
    }
    for (const char *a = expected, *b = got; *a || *b;) {
        size_t n = strcspn(a, "\n"), m = strcspn(b, "\n");
        CHECK(n == m && !memcmp(a, b, n), "expected `%.*s`, got `%.*s`", (int)n, a, (int)m, b);
        a += n + (a[n] == '\n');
        b += m + (b[m] == '\n');
    }
}

static void escape_case(void)
{
    bool root = geteuid() == 0;
    const char *argv[] = { PROBE_PATH, "escape", NULL };
    struct cell t;
    struct orch_err err = { .code = 0 };
    char out[16384];
    int p[2], q[2], c[2];
    open_launcher();
    struct orch_cell_opts o = options(&t, argv);
    CHECK(!pipe2(p, O_CLOEXEC) && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, q) &&
              !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, c),
          "%m");
    o.fds[ORCH_LAUNCH_FD_LOG] = p[1];
    o.fds[ORCH_LAUNCH_FD_AGENT] = q[1];
    o.fds[ORCH_LAUNCH_FD_MEM] = sealed_memfd("memory");
    o.fds[ORCH_LAUNCH_FD_STATE] = sealed_memfd("state");
    o.fds[ORCH_LAUNCH_FD_DISK] = image_file();
    o.fds[ORCH_LAUNCH_FD_KERNEL] = image_file();
    o.fds[ORCH_LAUNCH_FD_INITRD] = image_file();
    o.fds[ORCH_LAUNCH_FD_QMP] = c[1];
    o.as_bytes = (uint64_t)512 << 20;
    /* else the limit of file sizes would answer in place of the seals */
    o.flags = ORCH_VMM_FREEZING;
    t.c = orch_cell_new(la, &o, &err);
    CHECK(t.c, "%s", err.msg);
    close(p[1]);
    t.log = p[0];
    WAIT(t.exited || t.failed);
    CHECK(t.exited, "%s", t.err.msg);
    read_log(&t, out, sizeof out);
    CHECK(t.status == 0 && t.started == 1 && !t.failed, "status %x, output %s", t.status, out);
    if (getenv("ORCH_TEST_SHOW"))
        fputs(out, stderr);
    compare(out, root);
    end_cell(&t);
    close_launcher();
}

static void test_escape(void **state)
{
    (void)state;
    run_as_both(escape_case);
}

/* posix_spawn leaves libc's two internal signals ignored. */
#define SIGIGN "SigIgn:\t0000000180000000\n"

/* The kernel's own account of the VMM, which holds without the filter too. */
static void outside_case(void)
{
    static const char *const lines[] = {
        "CapInh:\t0000000000000000\n",
        "CapPrm:\t0000000000000000\n",
        "CapEff:\t0000000000000000\n",
        "CapBnd:\t0000000000000000\n",
        "CapAmb:\t0000000000000000\n",
        "NoNewPrivs:\t1\n",
        "Seccomp:\t2\n",
        "SigBlk:\t0000000000000000\n",
        SIGIGN,
    };
    struct cell t;
    pid_t pid;
    char text[16384], path[64];
    signal(SIGPIPE, SIG_IGN);
    int stray = dup2(STDERR_FILENO, 200); /* without CLOEXEC, as an embedder may have */
    open_launcher();
    start_sleeper(&t);
    CHECK(find_processes(PROBE_PATH, &pid, 1) == 1, "the VMM is not found");
    read_proc(pid, "status", text, sizeof text);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(lines); i++)
        CHECK(strstr(text, lines[i]), "no %s in %s", lines[i], text);
    snprintf(path, sizeof path, "\nUid:\t%u\t", geteuid() ? geteuid() : 60001);
    CHECK(strstr(text, path), "%s", text);
    CHECK(read_proc(pid, "uid_map", text, sizeof text) == 0, "ids are mapped: %s", text);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(kinds); i++)
        CHECK(space_of(pid, kinds[i]) && space_of(pid, kinds[i]) != space_of(getpid(), kinds[i]),
              "same %s", kinds[i]);
    read_proc(pid, "mountinfo", text, sizeof text);
    int n = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), n++)
        CHECK(strstr(line, " ro,nosuid,nodev"), "%s", line);
    CHECK(n == 4, "%d mounts in place of /, two files and /fd", n);
    read_proc(pid, "limits", text, sizeof text);
    CHECK(strstr(text, "Max file size             0                    0 "), "%s", text);
    CHECK(read_proc(pid, "environ", text, sizeof text) == 7 && !strcmp(text, "PATH=/"), "%s", text);

    /* The launcher has stdio, its socket and its signals, and a session without a terminal. */
    pid_t l = orch_launcher_pid(la);
    CHECK(count_fds(l) == 5, "%d descriptors", count_fds(l));
    CHECK(getsid(l) == l && getpgid(l) == l, "no session of its own");
    read_proc(l, "status", text, sizeof text);
    CHECK(strstr(text, SIGIGN), "%s", text);
    end_cell(&t);
    close_launcher();
    close(stray);
    wait_gone(0, "outside");
}

static void test_outside(void **state)
{
    (void)state;
    run_as_both(outside_case);
}

static void kvm_case(void)
{
    static const char *const argv[] = { PROBE_PATH, "kvm", NULL };
    struct cell t;
    struct orch_err err = { .code = 0 };
    struct stat st;
    char out[256];
    int p[2];
    open_launcher();
    struct orch_cell_opts o = options(&t, argv);
    CHECK(!pipe2(p, O_CLOEXEC), "%m");
    o.fds[ORCH_LAUNCH_FD_LOG] = p[1];
    o.flags = ORCH_VMM_KVM;
    t.c = orch_cell_new(la, &o, &err);
    CHECK(t.c, "%s", err.msg);
    close(p[1]);
    t.log = p[0];
    WAIT(t.exited || t.failed);
    if (stat("/dev/kvm", &st)) {
        CHECK(t.failed, "it runs without KVM");
        EXPECT(&t.err, "bind of /dev/kvm: No such file", "tcg");
    } else {
        /* The launcher gives root's VMM the device's group, unless that is root's. */
        bool may = (st.st_mode & 06) == 06 ||
                   ((st.st_mode & 060) == 060 && st.st_gid && geteuid() == 0);
        CHECK(t.exited, "%s", t.err.msg);
        read_log(&t, out, sizeof out);
        CHECK(!strcmp(out,
                      may ? "open /dev/kvm: ok\nKVM's ioctl: ok\nanother ioctl: EPERM\n"
                          : "open /dev/kvm: EACCES\nKVM's ioctl: ENOTTY\nanother ioctl: EPERM\n"),
              "%s", out);
    }
    end_cell(&t);
    close_launcher();
}

static void test_kvm(void **state)
{
    (void)state;
    run_as_both(kvm_case);
}

static void exit_case(void)
{
    struct cell t;
    open_launcher();
    start_cell(&t, "exit", "7");
    WAIT(t.exited || t.failed);
    CHECK(t.started == 1 && t.exited == 1 && !t.failed && WIFEXITED(t.status) &&
              WEXITSTATUS(t.status) == 7,
          "%x %s", t.status, t.err.msg);
    end_cell(&t);
#ifdef __x86_64__
    start_cell(&t, "x32", NULL);
    WAIT(t.exited || t.failed);
    CHECK(t.exited && WIFSIGNALED(t.status) && WTERMSIG(t.status) == SIGSYS, "%x %s", t.status,
          t.err.msg);
    end_cell(&t);
#endif
    start_sleeper(&t);
    pid_t pid;
    CHECK(find_processes(PROBE_PATH, &pid, 1) == 1, "the VMM is not found");
    kill(pid, SIGKILL);
    WAIT(t.exited || t.failed);
    CHECK(t.exited && WIFSIGNALED(t.status) && WTERMSIG(t.status) == SIGKILL, "%x %s", t.status,
          t.err.msg);
    end_cell(&t);
    close_launcher();
}

static void test_exit(void **state)
{
    (void)state;
    run_as(USER, exit_case);
}

/* ---- failing starts */

static void expect_failure(const struct orch_cell_opts *o, struct cell *t)
{
    struct orch_err err = { .code = 0 };
    t->failed = 0;
    t->c = orch_cell_new(la, o, &err);
    CHECK(t->c, "%s", err.msg);
    WAIT(t->exited || t->failed);
    CHECK(t->failed == 1 && !t->started && !t->exited, "it runs");
    end_cell(t);
}

static void errors_case(void)
{
    static const char *const nothing[] = { "/nothing", NULL },
                             *const sleep_[] = { PROBE_PATH, "sleep", NULL },
                             *const data_[] = { "/data/file", NULL };
    const struct orch_cell_bind missing[] = { { probe, PROBE_PATH }, { "/no/such/file", "/x" } };
    const struct orch_cell_bind twice[] = { { probe, PROBE_PATH }, { probe, PROBE_PATH } };
    const struct orch_cell_bind up[] = { { probe, "/a/../../x" } };
    const struct orch_cell_bind folder[] = { { "/tmp", "/x" } };
    const struct orch_cell_bind relative[] = { { "x", "/x" } };
    struct orch_err err = { .code = 0 };
    struct cell t;
    open_launcher();
    struct orch_cell_opts o = options(&t, nothing);
    expect_failure(&o, &t);
    EXPECT(&t.err, "execve /nothing: No such file", "not among the files bound");
    o = options(&t, data_);
    expect_failure(&o, &t);
    EXPECT(&t.err, "execve /data/file: Permission denied");
    o = options(&t, sleep_);
    o.binds = missing;
    expect_failure(&o, &t);
    EXPECT(&t.err, "bind /no/such/file: No such file", "the file is missing");
    o.binds = twice;
    expect_failure(&o, &t);
    EXPECT(&t.err, "bind /vmm: File exists");
    o = options(&t, sleep_);
    o.binds = up;
    o.n_binds = 1;
    expect_failure(&o, &t);
    EXPECT(&t.err, "bind /a/..: Invalid argument");
    o.binds = folder;
    expect_failure(&o, &t);
    EXPECT(&t.err, "bind /tmp: Not a directory");

    o = options(&t, sleep_);
    o.binds = relative;
    o.n_binds = 1;
    CHECK(!orch_cell_new(la, &o, &err), "a relative path is taken");
    EXPECT(&err, "not absolute");
    struct orch_cell_bind *many = calloc(ORCH_LAUNCH_BINDS + 1, sizeof *many);
    for (int i = 0; i <= ORCH_LAUNCH_BINDS; i++)
        many[i] = (struct orch_cell_bind){ "/a", "/b" };
    o.binds = many;
    o.n_binds = ORCH_LAUNCH_BINDS + 1;
    CHECK(!orch_cell_new(la, &o, &err), "%d files are taken", ORCH_LAUNCH_BINDS + 1);
    EXPECT(&err, "too many files");
    /* As many files as are allowed. */
    static char names[ORCH_LAUNCH_BINDS][24];
    for (int i = 0; i < ORCH_LAUNCH_BINDS - 1; i++) {
        snprintf(names[i], sizeof names[i], "/lib/a%d/b", i);
        many[i] = (struct orch_cell_bind){ data, names[i] };
    }
    many[ORCH_LAUNCH_BINDS - 1] = (struct orch_cell_bind){ probe, PROBE_PATH };
    o.n_binds = ORCH_LAUNCH_BINDS;
    t.c = orch_cell_new(la, &o, &err);
    CHECK(t.c, "%s", err.msg);
    WAIT(t.started || t.failed || t.exited);
    CHECK(t.started, "%s", t.err.msg);
    end_cell(&t);
    free(many);
    close_launcher();
    CHECK(!orch_launch_check(launcher, &err), "%s", err.msg);
}

static void test_errors(void **state)
{
    (void)state;
    run_as_both(errors_case);
}

static void write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) > 0, "%s: %m", path);
    close(fd);
}

/* A user namespace of the test's own, so that its limits and maps can be set. */
static void enter_userns(const char *uid_map, const char *gid_map)
{
    CHECK(!unshare(CLONE_NEWUSER), "%m");
    write_text("/proc/self/setgroups", "deny");
    write_text("/proc/self/uid_map", uid_map);
    write_text("/proc/self/gid_map", gid_map);
}

static void no_userns_case(void)
{
    static const char *const argv[] = { PROBE_PATH, "sleep", NULL };
    struct orch_err err = { .code = 0 };
    struct cell t;
    enter_userns("1000 1000 1", "1000 1000 1");
    write_text("/proc/sys/user/max_user_namespaces", "0");
    CHECK(orch_launch_check(launcher, &err) == -ENOSPC, "%s", err.msg);
    EXPECT(&err, "clone of init: No space", "user.max_user_namespaces=0", "sysctl -w");
    open_launcher();
    struct orch_cell_opts o = options(&t, argv);
    expect_failure(&o, &t);
    EXPECT(&t.err, "clone of init: No space", "user.max_user_namespaces=0");
    /* One is enough for init, not for the VMM's own. */
    write_text("/proc/sys/user/max_user_namespaces", "1");
    o = options(&t, argv);
    expect_failure(&o, &t);
    EXPECT(&t.err, "unshare of the VMM: No space", "user.max_user_namespaces=1");
    close_launcher();
}

/* Namespaces outlive the kill of their processes a little: the next cell waits for them. */
static void exhausted_case(void)
{
    static const char *const argv[] = { PROBE_PATH, "sleep", NULL };
    struct cell t, u;
    enter_userns("1000 1000 1", "1000 1000 1");
    write_text("/proc/sys/user/max_net_namespaces", "1");
    open_launcher();
    for (int i = 0; i < 5; i++) {
        start_sleeper(&t);
        end_cell(&t);
    }
    start_sleeper(&t);
    struct orch_cell_opts o = options(&u, argv);
    expect_failure(&o, &u);
    EXPECT(&u.err, "clone of the VMM: No space", "user.max_net_namespaces=1");
    end_cell(&t);
    close_launcher();
}

static void unmapped_case(void)
{
    struct orch_err err = { .code = 0 };
    enter_userns("0 0 1", "0 0 1");
    CHECK(orch_launch_check(launcher, &err) < 0, "it runs");
    EXPECT(&err, "setgroups: Operation not permitted");
}

static void test_namespaces(void **state)
{
    (void)state;
    run_as(USER, no_userns_case);
    run_as(USER, exhausted_case);
    run_as(0, unmapped_case);
}

/* ---- programs that are not the launcher. This program under another name: "fake-STEP-ERRNO". */

static int fake_launcher(const char *name)
{
    static struct orch_launch_msg m;
    char step[32];
    m.op = ORCH_LAUNCH_ERROR;
    if (sscanf(name, "fake-%31[^-]-%d", step, &m.sys_errno) != 2)
        return 3;
    memcpy(m.step, step, sizeof step);
    if (!strcmp(step, "version")) {
        m.op = ORCH_LAUNCH_HELLO;
        m.status = ORCH_LAUNCH_VERSION + 1;
    }
    if (strcmp(step, "dead"))
        orch_launch_send(3, &m, NULL, 0);
    return 4;
}

static void fake_case(void)
{
    static const struct {
        const char *name, *part, *part2;
    } fakes[] = {
        { "fake-uid_map-1", "uid_map: Operation not permitted", "/etc/apparmor.d/orch-launcher" },
        { "fake-setgroups file-13", "setgroups file: Permission denied",
          "/fake-setgroups file-13 flags=(unconfined)" },
        { "fake-tmpfs-1", "tmpfs: Operation not permitted", "userns," },
        { "fake-clone of init-1", "user namespaces are refused",
          "kernel.unprivileged_userns_clone=1" },
        { "fake-pivot_root-22", "initramfs", "chroot" },
        { "fake-version-0", "another version of orch", "reinstall" },
        { "fake-dead-0", "ended with exit status 4 before it was ready", "by hand" },
        { "missing", "No such file", "reinstall" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(fakes); i++) {
        struct orch_err err = { .code = 0 };
        char path[128];
        snprintf(path, sizeof path, "%s/%s", dir, fakes[i].name);
        CHECK(orch_launch_check(path, &err) < 0, "%s", fakes[i].name);
        EXPECT(&err, fakes[i].part, fakes[i].part2);
    }
}

static void test_fakes(void **state)
{
    (void)state;
    char path[128];
    static const char *const names[] = { "fake-uid_map-1",     "fake-setgroups file-13",
                                         "fake-tmpfs-1",       "fake-clone of init-1",
                                         "fake-pivot_root-22", "fake-version-0",
                                         "fake-dead-0" };
    char self[256];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n < 0 ? 0 : n] = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(names); i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        assert_int_equal(symlink(self, path), 0);
    }
    run_as(0, fake_case);
}

/* ---- programs executed by the launcher: orch_proc_via */

static int n_released;

static int via_refused(const struct orch_proc_via *v, const struct orch_proc_report *r,
                       struct orch_err *err)
{
    return orch_launch_unprotected(v->words[0], r, err);
}

static void via_release(struct orch_proc_via *v)
{
    n_released++;
    if (v->root >= 0)
        close(v->root);
    v->root = -1;
}

static void proc_exited(void *ud, int status)
{
    *(int *)ud = status;
}

static void via_case(void)
{
    char protected[80], pinned[80], script[600], garbage[80];
    snprintf(protected, sizeof protected, "r%s", data);
    snprintf(pinned, sizeof pinned, "p%s", dir);
    snprintf(garbage, sizeof garbage, "%s/garbage", dir);
    char *words[] = { launcher,  (char *)(uintptr_t) "protect", pinned,
                      protected, (char *)(uintptr_t) "--",      NULL };
    char *nowhere[] = { launcher, (char *)(uintptr_t) "protect", (char *)(uintptr_t) "r/nowhere",
                        (char *)(uintptr_t) "--", NULL };
    char *silent[] = { (char *)(uintptr_t) "/bin/true", NULL };
    struct orch_err err = { .code = 0 };
    int before = count_fds(getpid()), status = -1;
    loop = orch_loop_new(&err);

    /* 7 when the file is as it was and all that was tried failed. */
    snprintf(script, sizeof script,
             "(echo x >>%s; mv %s %s.away; mv %s %s.away) 2>/dev/null; test \"$(cat %s)\" = data "
             "&& test -d %s && exit 7",
             data, data, data, dir, dir, data, dir);
    const char *argv[] = { "/bin/sh", "-c", script, NULL };
    struct orch_proc_via via = {
        .words = words, .root = -1, .refused = via_refused, .release = via_release
    };
    struct orch_proc_opts o = {
        .argv = argv, .null_stdio = true, .on_exit = proc_exited, .ud = &status, .via = &via
    };
    struct orch_proc *p = orch_proc_start(loop, &o, &err);
    CHECK(p, "%s", err.msg);
    CHECK(via.root >= 0 && !n_released && getpgid(orch_proc_pid(p)) == orch_proc_pid(p), "%d",
          via.root);
    WAIT(status != -1);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "%x", status);
    orch_proc_free(p);
    CHECK(n_released == 1, "%d", n_released);

    /* What cannot be protected is not executed; what cannot be executed is told as without. */
    via.words = nowhere;
    CHECK(!orch_proc_start(loop, &o, &err), "it runs");
    EXPECT(&err, "mount /nowhere: No such file", "not started");
    CHECK(err.cls == ORCH_CLASS_ISOLATION && n_released == 2, "%d %d", (int)err.cls, n_released);
    via.words = words;
    CHECK(!orch_write_file(AT_FDCWD, garbage, "\x01\x02", 2, 0755), "%m");
    argv[0] = garbage;
    CHECK(!orch_proc_start(loop, &o, &err), "it runs");
    CHECK(strstr(err.msg, garbage) && strstr(err.msg, "not a program of this machine") &&
              err.cls != ORCH_CLASS_ISOLATION,
          "%s", err.msg);
    argv[0] = "/bin/true";
    via.words = silent;
    CHECK(!orch_proc_start(loop, &o, &err), "it runs");
    EXPECT(&err, "/bin/true: it ended");
    via.words = nowhere + 2; /* r/nowhere */
    CHECK(!orch_proc_start(loop, &o, &err), "it runs");
    CHECK(n_released == 5, "%d", n_released);
    unlink(garbage);
    orch_loop_free(loop);
    CHECK(count_fds(getpid()) == before, "%d descriptors, were %d", count_fds(getpid()), before);
}

static void no_via_case(void)
{
    char *words[] = { launcher, (char *)(uintptr_t) "protect", (char *)(uintptr_t) "--", NULL };
    static const char *const argv[] = { "/bin/true", NULL };
    struct orch_err err = { .code = 0 };
    struct orch_proc_via via = {
        .words = words, .root = -1, .refused = via_refused, .release = via_release
    };
    loop = orch_loop_new(&err);
    enter_userns("1000 1000 1", "1000 1000 1");
    /* one is enough for the first alone */
    for (const char *limit = "0"; limit; limit = *limit == '0' ? "1" : NULL) {
        write_text("/proc/sys/user/max_user_namespaces", limit);
        CHECK(!orch_proc_start(loop,
                               &(struct orch_proc_opts){
                                   .argv = argv, .null_stdio = true, .via = &via },
                               &err),
              "it runs");
        EXPECT(&err, "unshare of the user namespace: No space", "user.max_user_namespaces=");
    }
    orch_loop_free(loop);
}

static void test_via(void **state)
{
    (void)state;
    /* An ordinary user's own folder: what fails does so for the mounts. */
    assert_int_equal(chmod(dir, 0777), 0);
    run_as_both(via_case);
    run_as(USER, no_via_case);
    assert_int_equal(chmod(dir, 0755), 0);
}

/* ---- the protocol, without the client */

static int raw_launcher(pid_t *pid)
{
    static struct orch_launch_msg m;
    int sv[2], fds[ORCH_LAUNCH_FDS];
    size_t n;
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv), "%m");
    *pid = fork();
    if (!*pid) {
        dup2(sv[1], 3);
        execl(launcher, launcher, NULL);
        _exit(127);
    }
    close(sv[1]);
    struct pollfd pf = { sv[0], POLLIN, 0 };
    CHECK(poll(&pf, 1, WAIT_MS) == 1 && orch_launch_recv(sv[0], &m, fds, &n) == 1, "no HELLO");
    CHECK(m.op == ORCH_LAUNCH_HELLO && m.status == ORCH_LAUNCH_VERSION, "%u %d", m.op, m.status);
    return sv[0];
}

static int raw_new(int sock, uint32_t uid)
{
    static struct orch_launch_msg m;
    int sv[2];
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv), "%m");
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NEW, .uid = uid, .gid = uid };
    CHECK(!orch_launch_send(sock, &m, &sv[1], 1), "%m");
    close(sv[1]);
    return sv[0];
}

/* The next answer: 0 for the cell's end. */
static int raw_answer(int ctl, struct orch_launch_msg *m)
{
    int fds[ORCH_LAUNCH_FDS];
    size_t n;
    struct pollfd pf = { ctl, POLLIN, 0 };
    CHECK(poll(&pf, 1, WAIT_MS) == 1, "no answer");
    int r = orch_launch_recv(ctl, m, fds, &n);
    CHECK(r >= 0, "%d", r);
    return r ? (int)m->op : 0;
}

/* Each of the two ties of an init holds alone: its launcher's life, its ctl. */
static void ties_case(void)
{
    static struct orch_launch_msg m;
    uint32_t uid = geteuid() ? 0 : 60001;
    pid_t pid;
    int sock = raw_launcher(&pid), ctl = raw_new(sock, uid), status;
    close(ctl);
    wait_gone(1, "ctl closed");
    ctl = raw_new(sock, uid);
    /* It takes the name after it has tied itself to the launcher. */
    char name[32] = "";
    for (int64_t end = orch_now_us() + WAIT_US; strcmp(name, "orch-init\n");) {
        pid_t pids[4];
        for (int i = find_processes(NULL, pids, 4); i-- > 0 && strcmp(name, "orch-init\n");)
            read_proc(pids[i], "comm", name, sizeof name);
        CHECK(orch_now_us() < end, "no init");
    }
    kill(pid, SIGKILL);
    CHECK(raw_answer(ctl, &m) == 0, "the init lives on");
    waitpid(pid, &status, 0);
    wait_gone(0, "launcher killed");
    close(ctl);
    close(sock);
}

static void protocol_case(void)
{
    static struct orch_launch_msg m;
    uint32_t uid = geteuid() ? 0 : 60001;
    pid_t pid;
    int sock = raw_launcher(&pid), ctl, null = open("/dev/null", O_RDWR | O_CLOEXEC), many[16];
    for (int i = 0; i < 16; i++)
        many[i] = null;

    /* Broken messages on ctl end the cell. */
    ctl = raw_new(sock, uid);
    CHECK(send(ctl, "x", 1, MSG_NOSIGNAL) == 1 && raw_answer(ctl, &m) == 0, "short");
    close(ctl);
    ctl = raw_new(sock, uid);
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_VMM, .blob_len = ORCH_LAUNCH_BLOB + 1 };
    CHECK(send(ctl, &m, sizeof m, MSG_NOSIGNAL) == (ssize_t)sizeof m && raw_answer(ctl, &m) == 0,
          "blob_len");
    close(ctl);
    ctl = raw_new(sock, uid);
    static char big[sizeof m + 1];
    CHECK(send(ctl, big, sizeof big, MSG_NOSIGNAL) == (ssize_t)sizeof big &&
              raw_answer(ctl, &m) == 0,
          "long");
    close(ctl);
    ctl = raw_new(sock, uid);
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NEW };
    CHECK(!orch_launch_send(ctl, &m, NULL, 0) && raw_answer(ctl, &m) == 0, "another message");
    close(ctl);
    /* More descriptors than a message may carry: all are closed again. */
    ctl = raw_new(sock, uid);
    char control[CMSG_SPACE(sizeof many)] __attribute__((aligned(8))) = { 0 };
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_VMM };
    struct iovec iov = { &m, ORCH_LAUNCH_HEAD };
    struct msghdr h = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control
    };
    struct cmsghdr *k = CMSG_FIRSTHDR(&h);
    *k = (struct cmsghdr){ .cmsg_level = SOL_SOCKET,
                           .cmsg_type = SCM_RIGHTS,
                           .cmsg_len = CMSG_LEN(sizeof many) };
    memcpy(CMSG_DATA(k), many, sizeof many);
    CHECK(sendmsg(ctl, &h, MSG_NOSIGNAL) > 0 && raw_answer(ctl, &m) == 0, "descriptors");
    close(ctl);

    /* Counts that do not fit the rest are named. */
    static const struct {
        uint32_t n_argv, n_binds, fd_mask;
        int code;
        const char *blob;
        uint32_t blob_len;
    } bad[] = {
        { 0, ORCH_LAUNCH_BINDS + 1, 0, E2BIG, "", 0 },
        { ORCH_LAUNCH_ARGV + 1, 0, 0, E2BIG, "", 0 },
        { UINT32_MAX, UINT32_MAX, 0, E2BIG, "", 0 },
        { 2, 0, 0, EINVAL, "/vmm", 5 },
        { 1, 0, 0, EINVAL, "/vmm\0x", 7 },
        { 0, 1, 0, EINVAL, "/vmm", 5 },
        { 1, 0, 1, EINVAL, "/vmm", 5 },
        { 1, 0, 1 << ORCH_LAUNCH_FDS, EINVAL, "/vmm", 5 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++) {
        ctl = raw_new(sock, uid);
        m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_VMM,
                                      .n_argv = bad[i].n_argv,
                                      .n_binds = bad[i].n_binds,
                                      .fd_mask = bad[i].fd_mask,
                                      .blob_len = bad[i].blob_len };
        memcpy(m.blob, bad[i].blob, bad[i].blob_len);
        CHECK(!orch_launch_send(ctl, &m, NULL, 0) && raw_answer(ctl, &m) == ORCH_LAUNCH_ERROR,
              "%zu", i);
        CHECK(m.sys_errno == bad[i].code && !strcmp(m.step, "message"), "%zu: %s %d", i, m.step,
              m.sys_errno);
        CHECK(raw_answer(ctl, &m) == 0, "the cell goes on");
        close(ctl);
    }

    /* A second VMM is none. */
    ctl = raw_new(sock, uid);
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_VMM };
    CHECK(!orch_launch_send(ctl, &m, NULL, 0) && !orch_launch_send(ctl, &m, NULL, 0), "%m");
    int op;
    while ((op = raw_answer(ctl, &m)))
        CHECK(op != ORCH_LAUNCH_ERROR, "%s", m.step);
    close(ctl);

    /* On main, what is no NEW with one descriptor is dropped, and the launcher goes on. */
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NEW };
    CHECK(!orch_launch_send(sock, &m, NULL, 0) && !orch_launch_send(sock, &m, many, 2), "%m");
    CHECK(send(sock, "x", 1, MSG_NOSIGNAL) == 1, "%m");

    /* Root is refused as the VMM's uid, in every spelling. */
    for (int i = 0; !geteuid() && i < 2; i++) {
        ctl = raw_new(sock, i ? UINT32_MAX : 0);
        CHECK(raw_answer(ctl, &m) == ORCH_LAUNCH_ERROR && !strcmp(m.step, "uid"), "%s", m.step);
        close(ctl);
    }

    /* 64 at once, then one more when one has ended. */
    wait_gone(1, "protocol");
    int all[ORCH_LAUNCH_CELLS];
    for (int i = 0; i < ORCH_LAUNCH_CELLS; i++)
        all[i] = raw_new(sock, uid);
    ctl = raw_new(sock, uid);
    CHECK(raw_answer(ctl, &m) == ORCH_LAUNCH_ERROR && !strcmp(m.step, "cells") &&
              m.sys_errno == EUSERS,
          "%s", m.step);
    close(ctl);
    close(all[5]);
    for (int64_t end = orch_now_us() + WAIT_US;;) {
        ctl = raw_new(sock, uid);
        m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_VMM };
        orch_launch_send(ctl, &m, NULL, 0);
        if (raw_answer(ctl, &m) == ORCH_LAUNCH_STARTED)
            break;
        CHECK(orch_now_us() < end, "%s", m.step);
        close(ctl);
    }
    close(ctl);
    CHECK(count_fds(pid) == 5, "%d descriptors", count_fds(pid));
    for (int i = 0; i < ORCH_LAUNCH_CELLS; i++)
        if (i != 5)
            close(all[i]);
    close(sock);
    int status;
    waitpid(pid, &status, 0);
    CHECK(status == 0, "%x", status);
    wait_gone(0, "protocol");
    close(null);
}

static void test_protocol(void **state)
{
    (void)state;
    run_as_both(ties_case);
    run_as_both(protocol_case);
}

/* ---- death */

static void hold_two(void)
{
    struct cell t[2];
    open_launcher();
    for (int i = 0; i < 2; i++)
        start_cell(&t[i], "sleep", dir);
    orch_loop_run(loop);
}

static struct cell lost_cells[2];
static bool early; /* the kill may come before both cells are made */

static void free_on_error(void *ud, const struct orch_err *err)
{
    on_error(ud, err);
    struct cell *t = ud;
    end_cell(t);
}

static void free_on_lost(void *ud, const char *why)
{
    on_lost(ud, why);
    orch_launcher_free(la);
    la = NULL;
}

/* Sees its launcher die under two cells: both fail, then on_lost; each callback frees what it is
 * about. */
static void lose_launcher(void)
{
    static const char *const argv[] = { PROBE_PATH, "sleep", dir, NULL };
    struct orch_err err = { .code = 0 };
    loop = orch_loop_new(&err);
    la = orch_launcher_new(loop, launcher, free_on_lost, NULL, &err);
    if (!la && early) {
        EXPECT(&err, "killed by signal 9", "before it was ready");
        orch_loop_free(loop);
        return;
    }
    CHECK(la, "%s", err.msg);
    for (int i = 0; i < 2; i++) {
        struct orch_cell_opts o = options(&lost_cells[i], argv);
        o.on_error = free_on_error;
        lost_cells[i].c = orch_cell_new(la, &o, &err);
        CHECK(lost_cells[i].c, "%s", err.msg);
    }
    WAIT(n_lost);
    CHECK(strstr(lost_why, "killed by signal 9"), "%s", lost_why);
    for (int i = 0; i < 2; i++) {
        struct cell *t = &lost_cells[i];
        CHECK((t->failed || early) && !t->exited, "cell %d", i);
        if (t->failed)
            EXPECT(&t->err, launcher);
        else /* made after the kill, with another launcher, which on_lost has freed */
            end_cell(t);
    }
    orch_loop_free(loop);
}

static void test_kill(void **state)
{
    (void)state;
    uint32_t random = (uint32_t)getpid();
    char before[32768], after[32768];
    read_proc(getpid(), "mountinfo", before, sizeof before);
    for (int run = 0; run < 30; run++) {
        bool kill_launcher = run % 3, kill_holder = run % 3 != 1;
        int delay_ms = 1 + (int)((random = random * 1664525 + 1013904223) >> 16) % 60;
        early = run >= 6;
        pid_t holder = start_as(run & 1 ? 0 : USER, kill_holder ? hold_two : lose_launcher),
              pids[64];
        int status;
        struct spaces spaces = { .n = 0 };
        for (int64_t end = orch_now_us() + WAIT_US; find_processes(launcher, pids, 64) < 1;)
            assert_true(orch_now_us() < end);
        pid_t l = 0, parent = 0;
        for (int i = find_processes(launcher, pids, 64); i-- > 0 && !l;)
            if (state_of(pids[i], &parent) && parent == holder)
                l = pids[i];
        if (!l) { /* before the exec it was the holder's image still */
            kill(holder, SIGKILL);
            waitpid(holder, &status, 0);
            fail_msg("run %d: no launcher", run);
        }
        poll(NULL, 0, early ? delay_ms : 0);
        for (int64_t end = orch_now_us() + WAIT_US;; assert_true(orch_now_us() < end)) {
            int n = find_processes(NULL, pids, 64);
            spaces.n = 0;
            note_spaces(&spaces, pids, n);
            if (early || (n == 5 && spaces.n >= 20)) /* a launcher, two inits, two VMMs */
                break;
        }
        int64_t t0 = orch_now_us();
        if (kill_holder)
            kill(holder, SIGKILL);
        if (kill_launcher)
            kill(l, SIGKILL);
        waitpid(holder, &status, 0);
        if (kill_holder ? !WIFSIGNALED(status) : status != 0)
            fail_msg("run %d: the holder ended with status %x", run, status);
        int left, inside;
        while ((left = find_processes(NULL, pids, 64)) + (inside = count_spaces(&spaces)))
            if (orch_now_us() - t0 > WAIT_US)
                fail_msg("run %d: after the kill %d processes, %d namespaces remain", run, left,
                         inside);
    }
    read_proc(getpid(), "mountinfo", after, sizeof after);
    assert_string_equal(before, after);
}

/* After its launcher's death the client goes on with another, also before the loop has noticed. */
static void restart_case(void)
{
    struct cell t, u;
    open_launcher();
    start_sleeper(&t);
    pid_t first = orch_launcher_pid(la);
    kill(first, SIGKILL);
    WAIT(n_lost);
    CHECK(t.failed == 1 && orch_launcher_pid(la) == 0, "not noticed");
    end_cell(&t);
    start_sleeper(&t);
    pid_t second = orch_launcher_pid(la);
    CHECK(second != first && second > 0, "the same launcher");
    kill(second, SIGKILL);
    pid_t parent;
    for (int64_t end = orch_now_us() + WAIT_US; state_of(second, &parent) != 'Z';)
        CHECK(orch_now_us() < end, "not killed");
    start_sleeper(&u);
    CHECK(orch_launcher_pid(la) != second && u.started == 1, "not restarted");
    WAIT(n_lost == 2 && t.failed == 1);
    end_cell(&t);
    end_cell(&u);
    close_launcher();
    wait_gone(0, "restart");
}

static void test_restart(void **state)
{
    (void)state;
    run_as(USER, restart_case);
}

static void sequence_case(void)
{
    enum { N = 200 };
    char before[32768], after[32768];
    struct cell t;
    open_launcher();
    read_proc(getpid(), "mountinfo", before, sizeof before);
    int own = count_fds(getpid()), its = count_fds(orch_launcher_pid(la));
    for (int i = 0; i < N; i++) {
        start_cell(&t, "sleep", dir);
        WAIT(t.started || t.failed);
        CHECK(t.started, "cell %d: %s", i, t.err.msg);
        end_cell(&t);
    }
    wait_gone(1, "after 200 cells");
    CHECK(count_fds(getpid()) == own, "%d descriptors, %d before", count_fds(getpid()), own);
    CHECK(count_fds(orch_launcher_pid(la)) == its, "%d descriptors, %d before",
          count_fds(orch_launcher_pid(la)), its);
    char path[64];
    snprintf(path, sizeof path, "task/%d/children", orch_launcher_pid(la));
    for (int64_t end = orch_now_us() + WAIT_US;
         read_proc(orch_launcher_pid(la), path, after, sizeof after);)
        CHECK(orch_now_us() < end, "children remain: %s", after);
    read_proc(getpid(), "mountinfo", after, sizeof after);
    CHECK(!strcmp(before, after), "mounts remain");
    close_launcher();
    wait_gone(0, "after the launcher");
}

static void test_sequence(void **state)
{
    (void)state;
    run_as_both(sequence_case);
}

/* ---- files */

static void copy(const char *from, const char *to, mode_t mode)
{
    struct orch_buf b = { 0 };
    if (orch_read_file(AT_FDCWD, from, 64 << 20, &b) ||
        orch_write_file(AT_FDCWD, to, b.p, b.n, mode)) {
        perror(from);
        exit(1);
    }
    orch_buf_free(&b);
}

static int set_up(void **state)
{
    (void)state;
    char self[256], path[300];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n < 0 ? 0 : n] = 0;
    /* Where an ordinary user can reach them, wherever the source tree lies. */
    if (geteuid() || !mkdtemp(dir) || chmod(dir, 0755)) {
        fprintf(stderr, "test_launch: needs root and /tmp\n");
        return 1;
    }
    char *tests = dirname(self);
    snprintf(launcher, sizeof launcher, "%s/launcher", dir);
    snprintf(probe, sizeof probe, "%s/probe", dir);
    snprintf(data, sizeof data, "%s/data", dir);
    snprintf(path, sizeof path, "%s/../launcher", tests);
    copy(path, launcher, 0755);
    snprintf(path, sizeof path, "%s/probe", tests);
    copy(path, probe, 0755);
    if (orch_write_file(AT_FDCWD, data, "data\n", 5, 0666))
        return 1;
    /* So that it is the mounts that keep the VMM from writing to them, not the files' modes. */
    return chmod(probe, 0777) || chmod(data, 0666);
}

static int tear_down(void **state)
{
    (void)state;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));)
        unlinkat(dirfd(d), e->d_name, 0);
    if (d)
        closedir(d);
    return rmdir(dir);
}

int main(int argc, char **argv)
{
    (void)argc;
    if (!strncmp(basename(argv[0]), "fake-", 5))
        return fake_launcher(basename(argv[0]));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_escape),   cmocka_unit_test(test_outside),
        cmocka_unit_test(test_kvm),      cmocka_unit_test(test_exit),
        cmocka_unit_test(test_errors),   cmocka_unit_test(test_namespaces),
        cmocka_unit_test(test_fakes),    cmocka_unit_test(test_protocol),
        cmocka_unit_test(test_kill),     cmocka_unit_test(test_restart),
        cmocka_unit_test(test_sequence), cmocka_unit_test(test_via),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
