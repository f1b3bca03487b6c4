/* Messages between orch and the launcher: one struct over SOCK_SEQPACKET, descriptors by
 * SCM_RIGHTS. The launcher holds no policy and parses nothing that a peer wrote: every message
 * comes from orch, strings in it were composed by orch.
 *
 * Two sockets. The main one (descriptor 3 of the launcher): orch sends NEW with the launcher's end
 * of a per-microVM `ctl` socketpair. Holding ctl is the microVM's life: when orch's end closes,
 * however, the microVM's init exits and the kernel ends everything in its pid namespace. What else
 * a microVM needs before its VMM (a network) comes as further messages on ctl.
 *
 * A message is the struct up to `blob` and exactly blob_len bytes of it, so that as many NEWs as a
 * launcher may hold cells always fit into the socket's buffer. Anything else is a broken sender:
 * its descriptors are closed, its cell is dropped. */
#ifndef ORCH_LAUNCH_WIRE_H
#define ORCH_LAUNCH_WIRE_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define ORCH_LAUNCH_VERSION 4
#define ORCH_LAUNCH_CELLS 64 /* at once, a launcher */
#define ORCH_LAUNCH_BLOB (48 * 1024)
#define ORCH_LAUNCH_BINDS 512
#define ORCH_LAUNCH_ARGV 256
#define ORCH_LAUNCH_FDS 9

enum orch_launch_op {
    ORCH_LAUNCH_NEW = 1, /* main, orch → launcher; fd 0: ctl. Makes the microVM's init */
    /* ctl, orch → init; fds in enum orch_launch_fd order. Starts the VMM confined; without argv
     * it is confined and ends with status 0 (orch_launch_check) */
    ORCH_LAUNCH_VMM,
    /* ctl, init → orch: the VMM was executed; `status`: init's own number in /proc */
    ORCH_LAUNCH_STARTED,
    /* ctl, init → orch: the VMM ended, `status` as wait(2); the cell is over */
    ORCH_LAUNCH_EXIT,
    /* ctl, → orch: `step` failed with `sys_errno`; blob: the file it was about, or nothing; the
     * cell is over. On main in place of HELLO: the launcher is */
    ORCH_LAUNCH_ERROR,
    ORCH_LAUNCH_HELLO, /* main, launcher → orch: ready; `status` is ORCH_LAUNCH_VERSION */
    /* ctl, orch → init, once and before VMM: makes the microVM's network namespace with
     * ORCH_NET_TAP, down, which VMM then passes on. The answer, init → orch: fds in enum
     * orch_net_fd order, of which init keeps none; `status` 1: /proc/sys could not be written */
    ORCH_LAUNCH_NET,
};

/* Netlink sockets bound inside the network namespace. */
enum orch_net_fd {
    /* NETLINK_NETFILTER: the filter, which is no longer alive without this socket */
    ORCH_NET_FD_NFT,
    ORCH_NET_FD_ROUTE, /* NETLINK_ROUTE: devices, addresses, routes */
    ORCH_NET_FD_LOG,   /* NETLINK_NETFILTER: what the filter logs */
    ORCH_NET_FDS,
};

/* Descriptor slots of VMM; fd_mask says which are present, in this order. In the VMM they are
 * ORCH_VMM_FD_BASE + slot, but LOG, which becomes its stdout and stderr. */
enum orch_launch_fd {
    ORCH_LAUNCH_FD_LOG,
    ORCH_LAUNCH_FD_AGENT,
    ORCH_LAUNCH_FD_QMP,
    ORCH_LAUNCH_FD_MEM,
    ORCH_LAUNCH_FD_STATE,
    ORCH_LAUNCH_FD_DISK,
    ORCH_LAUNCH_FD_KERNEL,
    ORCH_LAUNCH_FD_INITRD,
    ORCH_LAUNCH_FD_TAP, /* init's own, never orch's */
};
#define ORCH_VMM_FD_BASE 10
#define ORCH_VMM_FD_DIR "/fd" /* the VMM's own /proc/self/fd, bound there */

#define ORCH_VMM_KVM 1      /* bind /dev/kvm and allow KVM's ioctls */
#define ORCH_VMM_FREEZING 2 /* RLIMIT_FSIZE 16 MiB instead of 0: the VMM writes its state */
/* NET: with pasta, which makes ORCH_NET_UPLINK_IF and a default route; its end is the cell's */
#define ORCH_NET_UPLINK 4

#define ORCH_NET_TAP "tap0"
#define ORCH_NET_UPLINK_IF "up0"
#define ORCH_NET_UPLINK_ADDR "10.255.1.2"
#define ORCH_NET_UPLINK_BITS "24"
#define ORCH_NET_UPLINK_GATEWAY "10.255.1.1"

struct orch_launch_msg {
    uint32_t op;
    uint32_t flags;
    uint32_t uid, gid; /* NEW: run as (only when the launcher is root), else ignored */
    uint32_t fd_mask;  /* VMM: 1 << enum orch_launch_fd, but TAP */
    uint32_t n_argv, n_binds;
    int32_t status;
    int32_t sys_errno;
    uint32_t blob_len;
    uint64_t as_bytes; /* VMM: RLIMIT_AS; 0: none */
    char step[32];     /* ERROR: what failed, e.g. "uid_map" */
    /* VMM: n_binds pairs "host path\0path in the VMM's root\0" (read-only files), then n_argv
     * strings. Always ends with a NUL. */
    char blob[ORCH_LAUNCH_BLOB];
};
#define ORCH_LAUNCH_HEAD offsetof(struct orch_launch_msg, blob)

union orch_launch_control {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int) * ORCH_LAUNCH_FDS)];
};

/* 0 or a negative errno; never waits. */
static inline int orch_launch_send(int sock, struct orch_launch_msg *m, const int *fds,
                                   size_t n_fds)
{
    union orch_launch_control c = { .bytes = { 0 } };
    struct iovec iov = { m, ORCH_LAUNCH_HEAD + m->blob_len };
    struct msghdr h = { .msg_iov = &iov, .msg_iovlen = 1 };
    if (n_fds) {
        h.msg_control = c.bytes;
        h.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
        struct cmsghdr *k = CMSG_FIRSTHDR(&h);
        k->cmsg_level = SOL_SOCKET;
        k->cmsg_type = SCM_RIGHTS;
        k->cmsg_len = CMSG_LEN(sizeof(int) * n_fds);
        memcpy(CMSG_DATA(k), fds, sizeof(int) * n_fds);
    }
    return sendmsg(sock, &h, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

/* 1: a message with *n_fds descriptors, which are now the caller's. 0: the other end closed.
 * -EBADMSG: not a message; its descriptors were closed. -EAGAIN: nothing there. */
static inline int orch_launch_recv(int sock, struct orch_launch_msg *m, int fds[ORCH_LAUNCH_FDS],
                                   size_t *n_fds)
{
    union orch_launch_control c;
    struct iovec iov = { m, sizeof *m };
    /* Not sizeof c.bytes: its padding would have room for one more than there is in fds. */
    struct msghdr h = { .msg_iov = &iov,
                        .msg_iovlen = 1,
                        .msg_control = c.bytes,
                        .msg_controllen = CMSG_LEN(sizeof(int) * ORCH_LAUNCH_FDS) };
    *n_fds = 0;
    ssize_t n = recvmsg(sock, &h, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    /* The other end closed before it had read all; what it sent is still there, behind this one
     * error. */
    if (n < 0 && errno == ECONNRESET)
        n = recvmsg(sock, &h, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (n <= 0)
        return n ? -errno : 0;
    struct cmsghdr *k = h.msg_controllen >= sizeof *k ? CMSG_FIRSTHDR(&h) : NULL;
    if (k && k->cmsg_level == SOL_SOCKET && k->cmsg_type == SCM_RIGHTS) {
        *n_fds = (k->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(fds, CMSG_DATA(k), *n_fds * sizeof(int));
    }
    if (!(h.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) && (size_t)n >= ORCH_LAUNCH_HEAD &&
        m->blob_len <= ORCH_LAUNCH_BLOB && (size_t)n == ORCH_LAUNCH_HEAD + m->blob_len &&
        !m->step[sizeof m->step - 1] && (!m->blob_len || !m->blob[m->blob_len - 1]))
        return 1;
    for (size_t i = 0; i < *n_fds; i++)
        close(fds[i]);
    *n_fds = 0;
    return -EBADMSG;
}

#endif
