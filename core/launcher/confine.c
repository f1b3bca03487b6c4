/* The VMM between its clone and its execve. Namespaces A own the mount and network namespace it is
 * in; it leaves them last for a user namespace of its own in which no id is mapped, so that nothing
 * it executes can gain a capability over anything. The order matters: each step takes away what an
 * earlier one needed. */
#include "launcher.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define REPORT_FD (ORCH_VMM_FD_BASE + ORCH_LAUNCH_FDS)

static int report;

static _Noreturn void fail(const char *step, const char *file)
{
    struct orch_launch_msg *m = orch_launch_error(step, file);
    if (write(report, m, ORCH_LAUNCH_HEAD + m->blob_len) < 0)
        _exit(2);
    _exit(1);
}

static void place_fds(struct orch_confine *c)
{
    /* Out of the way of the numbers they get. */
    report = fcntl(c->report, F_DUPFD_CLOEXEC, 2 * REPORT_FD);
    if (report < 0)
        _exit(2);
    for (int i = 0; i < ORCH_LAUNCH_FDS; i++)
        if (c->fds[i] >= 0 && (c->fds[i] = fcntl(c->fds[i], F_DUPFD_CLOEXEC, 2 * REPORT_FD)) < 0)
            fail("descriptors", NULL);
    /* /dev/null */
    int log = c->fds[ORCH_LAUNCH_FD_LOG] >= 0 ? c->fds[ORCH_LAUNCH_FD_LOG] : STDIN_FILENO;
    if (dup2(log, STDOUT_FILENO) < 0 || dup2(log, STDERR_FILENO) < 0)
        fail("descriptors", NULL);
    close_range(3, REPORT_FD, 0);
    for (int i = ORCH_LAUNCH_FD_LOG + 1; i < ORCH_LAUNCH_FDS; i++)
        if (c->fds[i] >= 0 && dup2(c->fds[i], ORCH_VMM_FD_BASE + i) < 0)
            fail("descriptors", NULL);
    if (dup3(report, REPORT_FD, O_CLOEXEC) < 0)
        fail("descriptors", NULL);
    report = REPORT_FD;
    close_range(REPORT_FD + 1, ~0U, 0);
}

/* An empty file at the path, below the working directory. */
static void make_file(char *path)
{
    errno = EINVAL;
    if (path[0] != '/')
        fail("bind", path);
    char *rel = path + 1;
    for (char *s = rel; (s = strchr(s, '/')); s++) {
        *s = 0;
        const char *last = strrchr(rel, '/') ? strrchr(rel, '/') + 1 : rel;
        errno = EINVAL;
        if (!*last || !strcmp(last, "..") || (mkdir(rel, 0755) && errno != EEXIST))
            fail("bind", path);
        *s = '/';
    }
    int fd = open(rel, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0444);
    if (fd < 0)
        fail("bind", path);
    close(fd);
}

/* The root is a tmpfs with the files bound into it. It is mounted over /proc: that directory exists
 * on every host this can run on, and none of the files lie in it. */
static void make_root(struct orch_confine *c)
{
    char kvm[] = "/dev/kvm";
    struct mount_attr ro = { .attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV };
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        fail("private mounts", NULL);
    int self = open_tree(AT_FDCWD, "/proc/self/fd", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (self < 0)
        fail("bind of /proc/self/fd", NULL);
    if (mount("orch", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC,
              "size=256k,nr_inodes=2048,mode=755"))
        fail("tmpfs", NULL);
    if (chdir("/proc"))
        fail("tmpfs", NULL);
    for (size_t i = 0; i < c->n_binds; i++) {
        char *host = c->binds[2 * i], *guest = c->binds[2 * i + 1];
        make_file(guest);
        if (mount(host, guest + 1, NULL, MS_BIND, NULL))
            fail("bind", host);
    }
    if (c->flags & ORCH_VMM_KVM)
        make_file(kvm);
    const char *dir = ORCH_VMM_FD_DIR + 1;
    if (mkdir(dir, 0755) || move_mount(self, "", AT_FDCWD, dir, MOVE_MOUNT_F_EMPTY_PATH))
        fail("bind of /proc/self/fd", NULL);
    close(self);
    if (mount_setattr(AT_FDCWD, ".", AT_RECURSIVE, &ro, sizeof ro))
        fail("read-only mounts", NULL);
    /* After the recursive NODEV: this one device may be opened. */
    if (c->flags & ORCH_VMM_KVM) {
        ro.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC;
        if (mount(kvm, kvm + 1, NULL, MS_BIND, NULL) ||
            mount_setattr(AT_FDCWD, kvm + 1, 0, &ro, sizeof ro))
            fail("bind of /dev/kvm", NULL);
    }
    if (syscall(SYS_pivot_root, ".", "."))
        fail("pivot_root", NULL);
    if (umount2(".", MNT_DETACH) || chdir("/"))
        fail("umount of the old root", NULL);
}

static void limit(int what, rlim_t value)
{
    struct rlimit l;
    if (getrlimit(what, &l))
        fail("rlimits", NULL);
    if (value < l.rlim_max) /* orch's own may be lower, and cannot be raised here */
        l.rlim_max = value;
    l.rlim_cur = l.rlim_max;
    if (setrlimit(what, &l))
        fail("rlimits", NULL);
}

static void set_limits(const struct orch_confine *c)
{
    limit(RLIMIT_CORE, 1); /* too small for a file; 0 would still feed a pipe handler, 1 does not */
    limit(RLIMIT_NOFILE, 64);
    limit(RLIMIT_FSIZE, c->flags & ORCH_VMM_FREEZING ? 16 << 20 : 0);
    limit(RLIMIT_MEMLOCK, 0);
    limit(RLIMIT_MSGQUEUE, 0);
    limit(RLIMIT_SIGPENDING, 64);
    limit(RLIMIT_NPROC, 16); /* counted in its own user namespace */
    if (c->as_bytes)
        limit(RLIMIT_AS, c->as_bytes);
}

static void drop_capabilities(void)
{
    struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct none[2] = { { 0 } };
    for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0))
            fail("bounding set", NULL);
    if (prctl(PR_SET_SECUREBITS,
              SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP |
                  SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS_LOCKED |
                  SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED,
              0, 0, 0))
        fail("securebits", NULL);
    if (syscall(SYS_capset, &h, none))
        fail("capset", NULL);
}

_Noreturn void orch_confine_exec(struct orch_confine *c)
{
    static char path[] = "PATH=/", *const env[] = { path, NULL };
    sigset_t none;
    sigemptyset(&none);
    place_fds(c);
    make_root(c);
    if (unshare(CLONE_NEWUSER | CLONE_NEWCGROUP))
        fail("unshare of the VMM", NULL);
    set_limits(c);
    drop_capabilities();
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        fail("no_new_privs", NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, orch_filter_get(c->flags & ORCH_VMM_KVM)))
        fail("seccomp", NULL);
    if (!c->argv[0])
        _exit(0);
    execve(c->argv[0], c->argv, env);
    fail("execve", c->argv[0]);
}
