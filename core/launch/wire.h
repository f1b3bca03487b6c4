/* Messages between orch and the launcher: fixed structs over SOCK_SEQPACKET, descriptors by
 * SCM_RIGHTS. The launcher holds no policy and parses nothing that a peer wrote: every message comes
 * from orch, strings in it were composed by orch.
 *
 * Two sockets. The main one (descriptor 3 of the launcher): orch sends NEW with the launcher's end of
 * a per-microVM `ctl` socketpair. Holding ctl is the microVM's life: when orch's end closes, however,
 * the microVM's init exits and the kernel ends everything in its pid namespace. */
#ifndef ORCH_LAUNCH_WIRE_H
#define ORCH_LAUNCH_WIRE_H

#include <stdint.h>

#define ORCH_LAUNCH_VERSION 1
#define ORCH_LAUNCH_BLOB (48 * 1024)
#define ORCH_LAUNCH_FDS 8

enum orch_launch_op {
    ORCH_LAUNCH_NEW = 1, /* main, orch → launcher; fd 0: ctl. Makes the microVM's init */
    ORCH_LAUNCH_VMM,     /* ctl, orch → init; fds in enum orch_launch_fd order. Starts the VMM confined */
    ORCH_LAUNCH_STARTED, /* ctl, init → orch: the VMM was executed */
    ORCH_LAUNCH_EXIT,    /* ctl, init → orch: the VMM ended, `status` as wait(2) */
    ORCH_LAUNCH_ERROR,   /* main or ctl, → orch: `step` failed with `sys_errno`; nothing runs */
    ORCH_LAUNCH_HELLO,   /* main, launcher → orch: ready; `status` is ORCH_LAUNCH_VERSION */
};

/* Descriptor slots of VMM; the blob's fd_mask says which are present, in this order. In the VMM they
 * are ORCH_VMM_FD_BASE + slot. LOG becomes the VMM's stdout and stderr. */
enum orch_launch_fd {
    ORCH_LAUNCH_FD_LOG,
    ORCH_LAUNCH_FD_AGENT,
    ORCH_LAUNCH_FD_QMP,
    ORCH_LAUNCH_FD_MEM,
    ORCH_LAUNCH_FD_STATE,
    ORCH_LAUNCH_FD_DISK,
    ORCH_LAUNCH_FD_EXTRA,
};
#define ORCH_VMM_FD_BASE 10
#define ORCH_VMM_FD_DIR "/fd" /* the VMM's own /proc/self/fd, bound there */

#define ORCH_VMM_KVM 1      /* bind /dev/kvm and allow KVM's ioctls */
#define ORCH_VMM_FREEZING 2 /* RLIMIT_FSIZE 16 MiB instead of 0: the VMM writes its state */
#define ORCH_VMM_PROBE 4    /* tests: argv[0] is the escape probe */

struct orch_launch_msg {
    uint32_t op;
    uint32_t flags;
    uint32_t uid, gid;  /* NEW: run as (only when the launcher is root), else ignored */
    uint32_t fd_mask;   /* VMM: 1 << enum orch_launch_fd */
    uint32_t n_argv, n_binds;
    int32_t status;
    int32_t sys_errno;
    uint64_t as_bytes;  /* VMM: RLIMIT_AS; 0: none */
    uint32_t blob_len;
    char step[64];      /* ERROR: what failed, e.g. "uid_map" */
    /* n_binds pairs "host path\0path in the VMM's root\0" (read-only files), then n_argv strings */
    char blob[ORCH_LAUNCH_BLOB];
};

#endif
