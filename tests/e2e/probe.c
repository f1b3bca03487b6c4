/* The escape probe: a static program run in the VMM's place, behind all of the launcher's
 * confinement. It tries what a VMM taken over by its guest would try and prints a line for each
 * attempt, "name: ok" or "name: ERRNO". tests/c/test_launch.c knows the only acceptable answers.
 *
 * probe escape        the attempts probe sleep MARK    prints "up", then waits for its end (MARK
 * finds it in the process list) probe tap           those of a microVM's network device probe kvm
 * what /dev/kvm and its calls answer probe exit N        ends with status N probe x32
 * makes a call of a foreign ABI, which must end it */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/netlink.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define TRY(name, expr) \
    do { \
        errno = 0; \
        say(name, (long)(expr)); \
    } while (0)

extern char **environ;

static void say(const char *name, long result)
{
    printf("%s: %s\n", name, result < 0 ? strerrorname_np(errno) : "ok");
}

static void *wait_forever(void *arg)
{
    poll(NULL, 0, -1);
    return arg;
}

static void identity(void)
{
    struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
    printf("pid: %d\nparent: %d\n", getpid(), getppid());
    printf("uid: %u %u gid: %u %u\n", getuid(), geteuid(), getgid(), getegid());
    printf("environment: %s %s\n", environ[0], environ[1] ? environ[1] : "-");
    int bounding = 0;
    for (int cap = 0; cap < 64; cap++)
        bounding += prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1;
    printf("capabilities in the bounding set: %d\n", bounding);
    TRY("capget", syscall(SYS_capget, &h, NULL));
    TRY("setuid", setuid(0));
    TRY("setgroups", syscall(SYS_setgroups, 0, NULL));
    TRY("unlock securebits", prctl(PR_SET_SECUREBITS, 0, 0, 0, 0));
    TRY("clear parent-death signal", prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0));
    TRY("no_new_privs off", prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0));
}

static void descriptors(void)
{
    printf("descriptors:");
    for (int fd = 0; fd < 1024; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            printf(" %d", fd);
    printf("\n");
}

static void files(void)
{
    static const char *const absent[] = {
        "/etc/passwd", "/proc",    "/proc/self/mem", "/sys",
        "/dev",        "/dev/kvm", "/dev/net/tun",   "/tmp",
        "/usr",        "/root",    "/../etc/passwd", "/fd/../../proc/1/root",
    };
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) {
        char name[80];
        snprintf(name, sizeof name, "open %s", absent[i]);
        TRY(name, open(absent[i], O_RDONLY));
    }
    int root = open("/", O_RDONLY | O_DIRECTORY);
    char dents[512];
    TRY("open /", root);
    TRY("list /", syscall(SYS_getdents64, root, dents, sizeof dents));
    TRY("create a file", open("/x", O_CREAT | O_WRONLY, 0600));
    TRY("create an unnamed file", open("/", O_TMPFILE | O_RDWR, 0600));
    TRY("own file for writing", open("/vmm", O_WRONLY));
    TRY("own file for reading", open("/vmm", O_RDONLY));
    TRY("bound file for reading", open("/data/file", O_RDONLY));
    TRY("bound file for writing", open("/data/file", O_RDWR));
    TRY("bound file: truncate", open("/data/file", O_RDONLY | O_TRUNC));
    TRY("mkdir", mkdir("/d", 0700));
    TRY("unlink", unlink("/vmm"));
    TRY("rename", rename("/vmm", "/vmm2"));
    TRY("link", link("/vmm", "/vmm2"));
    TRY("chmod", chmod("/vmm", 0777));
    TRY("mknod", mknod("/n", S_IFCHR, 0));
    TRY("chdir", chdir("/data"));
    TRY("open by handle", syscall(SYS_open_by_handle_at, root, dents, O_RDONLY));
}

static void mounts(void)
{
    TRY("mount tmpfs", mount("t", "/data", "tmpfs", 0, NULL));
    TRY("remount for writing", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    TRY("umount", umount2("/data/file", MNT_DETACH));
    TRY("umount /fd", umount2("/fd", MNT_DETACH));
    TRY("chroot", chroot("/data"));
    TRY("pivot_root", syscall(SYS_pivot_root, ".", "."));
    TRY("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    TRY("move_mount", syscall(SYS_move_mount, AT_FDCWD, "/data/file", AT_FDCWD, "/vmm", 0));
    TRY("mount_setattr", syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, NULL, 0));
    TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
    TRY("setns", setns(0, 0));
    TRY("unshare user", unshare(CLONE_NEWUSER));
    TRY("unshare net", unshare(CLONE_NEWNET));
    TRY("unshare mounts", unshare(CLONE_NEWNS));
    TRY("sethostname", sethostname("x", 1));
}

static void network(void)
{
    static const struct {
        const char *name;
        int domain, type, protocol;
    } sockets[] = {
        { "socket inet", AF_INET, SOCK_STREAM, 0 },
        { "socket inet6", AF_INET6, SOCK_DGRAM, 0 },
        { "socket unix", AF_UNIX, SOCK_STREAM, 0 },
        { "socket netlink", AF_NETLINK, SOCK_RAW, NETLINK_ROUTE },
        { "socket nftables", AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER },
        { "socket packet", AF_PACKET, SOCK_RAW, 0 },
        { "socket vsock", AF_VSOCK, SOCK_STREAM, 0 },
        { "socket alg", AF_ALG, SOCK_SEQPACKET, 0 },
    };
    for (size_t i = 0; i < sizeof sockets / sizeof *sockets; i++)
        TRY(sockets[i].name, socket(sockets[i].domain, sockets[i].type, sockets[i].protocol));
    int sv[2];
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_port = htons(53),
                              .sin_addr = { htonl(INADDR_LOOPBACK) } };
    TRY("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, sv));
    TRY("connect", connect(11, (struct sockaddr *)&to, sizeof to));
    TRY("bind", bind(11, (struct sockaddr *)&to, sizeof to));
    TRY("listen", listen(11, 1));
    TRY("accept", accept(11, NULL, NULL));
    TRY("namespace of a socket", ioctl(11, 0x894c /* SIOCGSKNS */, 0));
    TRY("own socket: send", send(11, "x", 1, MSG_NOSIGNAL));
}

static void processes(void)
{
    char buf[16];
    struct iovec iov = { buf, sizeof buf };
    TRY("kill all", kill(-1, 0));
    TRY("kill 2", kill(2, 0));
    TRY("tgkill of another", syscall(SYS_tgkill, 2, 2, 0));
    TRY("fork", syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
    TRY("fork sharing memory", syscall(SYS_clone, CLONE_VM | CLONE_VFORK | SIGCHLD, 0, 0, 0, 0));
    TRY("clone into a user namespace", syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));
    TRY("clone3", syscall(SYS_clone3, NULL, 0));
    TRY("wait", syscall(SYS_wait4, -1, NULL, 0, NULL));
    TRY("ptrace traceme", ptrace(PTRACE_TRACEME, 0, 0, 0));
    TRY("ptrace attach", ptrace(PTRACE_ATTACH, 1, 0, 0));
    TRY("pidfd_open", syscall(SYS_pidfd_open, 1, 0));
    TRY("process_vm_readv", syscall(SYS_process_vm_readv, 1, &iov, 1, &iov, 1, 0));
    TRY("execve of a shell", execl("/bin/sh", "sh", NULL));
    TRY("execve of data", execl("/data/file", "file", NULL));
    TRY("execve by descriptor", syscall(SYS_execveat, 13, "", NULL, NULL, AT_EMPTY_PATH));
    pthread_attr_t small;
    pthread_t t;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    int threads = 1;
    while (threads < 100 && !(errno = pthread_create(&t, &small, wait_forever, NULL)))
        threads++;
    printf("threads until %s: %d\n", strerrorname_np(errno), threads);
}

static void kernel(void)
{
    char buf[128] = { 0 };
    TRY("bpf", syscall(SYS_bpf, 0, buf, sizeof buf));
    TRY("perf_event_open", syscall(SYS_perf_event_open, buf, 0, -1, -1, 0));
    TRY("io_uring_setup", syscall(SYS_io_uring_setup, 1, buf));
    TRY("userfaultfd", syscall(SYS_userfaultfd, 1));
    TRY("keyctl session", syscall(SYS_keyctl, 0, -3, 0));
    TRY("keyctl read", syscall(SYS_keyctl, 11, -3, buf, sizeof buf));
    TRY("add_key", syscall(SYS_add_key, "user", "a", "b", 1, -3));
    TRY("request_key", syscall(SYS_request_key, "user", "a", NULL, -3));
    TRY("memfd_create", memfd_create("a", 0));
    TRY("memfd_secret", syscall(SYS_memfd_secret, 0));
    TRY("shmget", shmget(IPC_PRIVATE, 4096, 0600));
    TRY("mq_open", syscall(SYS_mq_open, "q", O_CREAT, 0600, NULL));
    TRY("syslog", syscall(SYS_syslog, 3, buf, 10));
    TRY("personality", syscall(SYS_personality, 0x0400000));
    TRY("modify_ldt", syscall(SYS_modify_ldt, 0, buf, sizeof buf));
    TRY("iopl", syscall(SYS_iopl, 3));
    TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, NULL, 0));
    TRY("init_module", syscall(SYS_init_module, buf, 0, buf));
    TRY("setpriority", setpriority(PRIO_PROCESS, 0, -5));
    TRY("clock_settime", syscall(SYS_clock_settime, 0, buf));
    TRY("inject into a terminal", ioctl(0, 0x5412 /* TIOCSTI */, buf));
    TRY("KVM's ioctl", ioctl(11, 0xae00 /* KVM_GET_API_VERSION */, 0));
}

static void limits(void)
{
    static const struct {
        const char *name;
        int what;
    } all[] = {
        { "core", RLIMIT_CORE },
        { "nofile", RLIMIT_NOFILE },
        { "fsize", RLIMIT_FSIZE },
        { "memlock", RLIMIT_MEMLOCK },
        { "nproc", RLIMIT_NPROC },
        { "msgqueue", RLIMIT_MSGQUEUE },
        { "sigpending", RLIMIT_SIGPENDING },
        { "as", RLIMIT_AS },
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct rlimit l;
        getrlimit(all[i].what, &l);
        printf("limit %s: %llu %llu\n", all[i].name, (unsigned long long)l.rlim_cur,
               (unsigned long long)l.rlim_max);
    }
    struct rlimit up = { 1000, 1000 }, down = { 0, 0 };
    TRY("raise nofile", setrlimit(RLIMIT_NOFILE, &up));
    TRY("lower core", setrlimit(RLIMIT_CORE, &down));
    TRY("map beyond as",
        mmap(NULL, (size_t)1 << 30, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TRY("mlock", mlock(&up, sizeof up));
}

#ifndef SYS_fchmodat2
#define SYS_fchmodat2 452
#endif

/* What one of its descriptors can be made into: by number, by its link, and opened anew. */
static void descriptor(const char *file, int fd)
{
    char link[16], what[80];
    snprintf(link, sizeof link, "/fd/%d", fd);
    int again = open(link, O_RDWR), readable = open(link, O_RDONLY), flags = 0;
    int at = again < 0 ? fd : again;
    void *p = mmap(NULL, 4096, PROT_READ, MAP_SHARED, readable, 0);
#define ATTEMPT(name, expr) \
    (snprintf(what, sizeof what, "%s: %s", file, name), errno = 0, say(what, (long)(expr)))
    ATTEMPT("reopen", open(link, O_RDWR));
    ATTEMPT("reopen to truncate", open(link, O_WRONLY | O_TRUNC));
    ATTEMPT("reopen below",
            open(link, O_PATH) < 0 ? -1 : openat(open(link, O_PATH), "..", O_RDONLY));
    ATTEMPT("read", pread(at, &(char){ 0 }, 1, 0));
    ATTEMPT("write", pwrite(at, "x", 1, 0));
    ATTEMPT("shared map", mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, at, 0));
    ATTEMPT("private map", mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, at, 0));
    ATTEMPT("map made writable", mprotect(p, 4096, PROT_READ | PROT_WRITE));
    ATTEMPT("hole in the map", madvise(p, 4096, MADV_REMOVE));
    ATTEMPT("truncate", ftruncate(at, 0));
    ATTEMPT("truncate by link", truncate(link, 0));
    ATTEMPT("allocate", fallocate(at, 0, 0, 1 << 20));
    ATTEMPT("copy into", copy_file_range(readable, NULL, at, NULL, 1, 0));
    ATTEMPT("chmod", fchmod(at, 0777));
    ATTEMPT("chmod by link", chmod(link, 0777));
    ATTEMPT("chmod by path", syscall(SYS_fchmodat2, at, "", 0777, AT_EMPTY_PATH));
    ATTEMPT("chown", fchown(at, (uid_t)-1, 0));
    ATTEMPT("xattr", fsetxattr(at, "user.x", "1", 1, 0));
    ATTEMPT("xattr by link", setxattr(link, "user.x", "1", 1, 0));
    ATTEMPT("xattr removed", fremovexattr(at, "user.x"));
    ATTEMPT("times", futimens(at, NULL));
    ATTEMPT("flags", ioctl(at, FS_IOC_SETFLAGS, &flags));
    ATTEMPT("link", linkat(AT_FDCWD, link, AT_FDCWD, "/new", AT_SYMLINK_FOLLOW));
    ATTEMPT("rename", rename(link, "/fd/99"));
    ATTEMPT("lock", flock(at, LOCK_EX | LOCK_NB));
    ATTEMPT("lock of a range", fcntl(at, F_SETLK, &(struct flock){ .l_type = F_WRLCK }));
    ATTEMPT("lease", fcntl(at, F_SETLEASE, F_RDLCK));
    ATTEMPT("lease to write", fcntl(at, F_SETLEASE, F_WRLCK));
    ATTEMPT("signals", fcntl(at, F_SETOWN, getpid()));
    ATTEMPT("seal", fcntl(at, F_ADD_SEALS, F_SEAL_SEAL));
    ATTEMPT("mount", syscall(SYS_open_tree, at, "", AT_EMPTY_PATH | 1 /* OPEN_TREE_CLONE */));
    close(again);
    close(readable);
}

static void kept(void)
{
    descriptor("memory", 13);
    descriptor("state", 14);
    descriptor("disk", 15);
    descriptor("kernel", 16);
    descriptor("initrd", 17);
    TRY("log: reopen to read", open("/fd/1", O_RDONLY | O_NONBLOCK));
    TRY("log: size", fcntl(1, F_SETPIPE_SZ, 1 << 20));
    TRY("log: chmod", fchmod(1, 0777));
    TRY("log: below", open("/fd/1/..", O_RDONLY));
    TRY("socket: reopen", open("/fd/11", O_RDWR));
    TRY("control socket: reopen", open("/fd/12", O_RDWR));
    TRY("socket: chmod", fchmod(11, 0777));
    TRY("socket: below", open("/fd/11/..", O_RDONLY));
    TRY("no input: reopen", open("/fd/0", O_RDWR));
    int fds = open("/fd", O_RDONLY | O_DIRECTORY);
    char dents[512];
    TRY("descriptors: list", syscall(SYS_getdents64, fds, dents, sizeof dents));
    TRY("descriptors: beside", openat(fds, "../status", O_RDONLY));
    TRY("descriptors: above", openat(openat(fds, "..", O_RDONLY), "proc", O_RDONLY));
    TRY("descriptors: create", openat(fds, "99", O_CREAT | O_RDWR, 0600));
    close(fds);
}

/* The device behind the tap can be opened anew, which is a tap of nobody's. */
static void tap(void)
{
    struct ifreq r = { .ifr_name = "tap0", .ifr_flags = IFF_TAP | IFF_NO_PI };
    int again = open("/fd/18", O_RDWR);
    TRY("reopen", again);
    TRY("reopened: write", write(again, "x", 1));
    TRY("reopened: attach", ioctl(again, TUNSETIFF, &r));
    TRY("map", mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, 18, 0));
    TRY("attach", ioctl(18, TUNSETIFF, &r));
    TRY("queue", ioctl(18, TUNSETQUEUE, &r));
    TRY("persist", ioctl(18, TUNSETPERSIST, 1));
    TRY("owner", ioctl(18, TUNSETOWNER, 0));
    TRY("link type", ioctl(18, TUNSETLINK, 1));
    TRY("carrier", ioctl(18, TUNSETCARRIER, &(int){ 0 }));
    TRY("debug", ioctl(18, TUNSETDEBUG, 1));
    TRY("filter", ioctl(18, TUNATTACHFILTER, &r));
    TRY("address", ioctl(18, SIOCSIFHWADDR, &r));
    TRY("namespace", ioctl(18, TUNGETDEVNETNS, 0));
    TRY("chmod", fchmod(18, 0777));
    TRY("chmod by link", chmod("/fd/18", 0777));
    TRY("xattr", fsetxattr(18, "user.x", "1", 1, 0));
    TRY("below", open("/fd/18/..", O_RDONLY));
    printf("end\n");
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *mode = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "exit") && argc > 2)
        return atoi(argv[2]);
    if (!strcmp(mode, "sleep")) {
        printf("up\n");
        poll(NULL, 0, -1);
    }
#ifdef __x86_64__
    if (!strcmp(mode, "x32"))
        return (int)syscall(0x40000000 | SYS_getpid);
#endif
    if (!strcmp(mode, "tap")) {
        tap();
        return 0;
    }
    if (!strcmp(mode, "kvm")) {
        int kvm = open("/dev/kvm", O_RDWR);
        say("open /dev/kvm", kvm);
        TRY("KVM's ioctl", ioctl(kvm < 0 ? 0 : kvm, 0xae00 /* KVM_GET_API_VERSION */, 0));
        TRY("another ioctl", ioctl(0, 0x5401 /* TCGETS */, NULL));
        return 0;
    }
    if (strcmp(mode, "escape"))
        return 2;
    identity();
    descriptors();
    files();
    mounts();
    network();
    kernel();
    kept();
    limits();
    processes();
    printf("end\n");
    return 0;
}
