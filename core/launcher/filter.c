/* The VMM's seccomp filter: an allow-list over which QEMU lays its own -sandbox. What is not named
 * is EPERM; a call of another ABI (32-bit, x32) ends the process. */
#include "launcher.h"

#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/sched.h>
#include <seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#define MAX_INSNS 1024

/* Names unknown to this architecture are left out. */
static const char *const allowed[] = {
    "access",
    "arch_prctl",
    "brk",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "dup",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "eventfd2",
    "execve",
    "exit",
    "exit_group",
    "fstat",
    "fstatfs",
    "futex",
    "get_mempolicy",
    "getegid",
    "geteuid",
    "getgid",
    "getpeername",
    "getpid",
    "getppid",
    "getrandom",
    "getresgid",
    "getresuid",
    "getsockname",
    "getsockopt",
    "gettid",
    "getuid",
    "lseek",
    "madvise",
    "membarrier",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "openat",
    "pipe2",
    "poll",
    "ppoll",
    "pread64",
    "preadv",
    "pwrite64",
    "pwritev",
    "read",
    "readlink",
    "readlinkat",
    "readv",
    "recvfrom",
    "recvmsg",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigpending",
    "rt_sigprocmask",
    "rt_sigreturn",
    "rt_sigsuspend",
    "rt_sigtimedwait",
    "sched_getaffinity",
    "sched_yield",
    "seccomp",
    "sendmsg",
    "sendto",
    "set_robust_list",
    "set_tid_address",
    "setsockopt",
    "shutdown",
    "sigaltstack",
    "signalfd4",
    "statfs",
    "sysinfo",
    "tgkill",
    "timer_create",
    "timer_delete",
    "timer_getoverrun",
    "timer_gettime",
    "timer_settime",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_settime",
    "uname",
    "write",
    "writev",
};

/* Callers fall back to an older call (clone, plain reads) when these look unknown. */
static const char *const unknown[] = { "clone3", "io_uring_setup" };

static const int prctls[] = {
    PR_SET_NAME,     PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP,
    PR_CAPBSET_READ, PR_SET_TIMERSLACK,   PR_SET_VMA,
};

/* What QEMU asks of its own descriptors. Not TUNSETIFF, nor what changes a tap for the host: its
 * persistence, carrier, debugging, address. */
static const uint32_t ioctls[] = {
    FIONBIO,         TUNGETIFF,       TUNGETFEATURES, TUNSETOFFLOAD,
    TUNGETVNETHDRSZ, TUNSETVNETHDRSZ, TUNSETSNDBUF,
};

/* Not a lease or a lock, which hold up whoever opens the file next, nor a pipe's size, which counts
 * against all that the user has. */
static const int fcntls[] = { F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL };

static struct sock_filter insns[2][MAX_INSNS];
static struct sock_fprog programs[2];

static int add(scmp_filter_ctx f, uint32_t action, const char *name, unsigned n,
               struct scmp_arg_cmp cmp)
{
    int nr = seccomp_syscall_resolve_name(name);
    return nr < 0 ? 0 : seccomp_rule_add_array(f, action, nr, n, &cmp);
}

static int add_rules(scmp_filter_ctx f, bool kvm)
{
    const struct scmp_arg_cmp none = { 0 };
    const uint64_t namespaces = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC |
                                CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;
    int r = seccomp_attr_set(f, SCMP_FLTATR_CTL_OPTIMIZE, 2);
    r = r ? r : seccomp_attr_set(f, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS);
    for (size_t i = 0; !r && i < sizeof allowed / sizeof *allowed; i++)
        r = add(f, SCMP_ACT_ALLOW, allowed[i], 0, none);
    for (size_t i = 0; !r && i < sizeof unknown / sizeof *unknown; i++)
        r = add(f, SCMP_ACT_ERRNO(ENOSYS), unknown[i], 0, none);
    for (size_t i = 0; !r && i < sizeof prctls / sizeof *prctls; i++)
        r = add(f, SCMP_ACT_ALLOW, "prctl", 1, SCMP_A0_64(SCMP_CMP_EQ, (uint64_t)prctls[i]));
    for (size_t i = 0; !r && i < sizeof fcntls / sizeof *fcntls; i++)
        r = add(f, SCMP_ACT_ALLOW, "fcntl", 1, SCMP_A1_64(SCMP_CMP_EQ, (uint64_t)fcntls[i]));
    if (!r) /* threads, never processes */
        r = add(f, SCMP_ACT_ALLOW, "clone", 1,
                SCMP_A0_64(SCMP_CMP_MASKED_EQ, CLONE_THREAD | namespaces, CLONE_THREAD));
    if (!r) /* limits are read, not lowered: RLIMIT_CORE 0 would dump into a pipe handler again */
        r = add(f, SCMP_ACT_ALLOW, "prlimit64", 1, SCMP_A2_64(SCMP_CMP_EQ, 0));
    /* An ioctl's number is 32 bits of the register; the rest is not looked at by the kernel
     * either. */
    for (size_t i = 0; !r && i < sizeof ioctls / sizeof *ioctls; i++)
        r = add(f, SCMP_ACT_ALLOW, "ioctl", 1,
                SCMP_A1_64(SCMP_CMP_MASKED_EQ, UINT32_MAX, ioctls[i]));
    if (!r && kvm)
        r = add(f, SCMP_ACT_ALLOW, "ioctl", 1, SCMP_A1_64(SCMP_CMP_MASKED_EQ, 0xff00, KVMIO << 8));
    return r;
}

static int build(bool kvm)
{
    scmp_filter_ctx f = seccomp_init(SCMP_ACT_ERRNO(EPERM));
    if (!f)
        return -ENOMEM;
    int fd = memfd_create("filter", MFD_CLOEXEC);
    int r = fd < 0 ? -errno : add_rules(f, kvm);
    r = r ? r : seccomp_export_bpf(f, fd);
    if (!r) {
        ssize_t n = pread(fd, insns[kvm], sizeof insns[kvm], 0);
        if (n <= 0 || n == sizeof insns[kvm])
            r = n < 0 ? -errno : -EFBIG;
        programs[kvm] = (struct sock_fprog){ (unsigned short)((size_t)n / sizeof insns[kvm][0]),
                                             insns[kvm] };
    }
    if (fd >= 0)
        close(fd);
    seccomp_release(f);
    return r;
}

int orch_filter_build(void)
{
    int r = build(false);
    return r ? r : build(true);
}

const struct sock_fprog *orch_filter_get(bool kvm)
{
    return &programs[kvm];
}
