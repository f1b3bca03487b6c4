/* The protocol between orch (core/vm/channel.c) and the guest agent (core/guest/agent.c), over one
 * virtio-serial port. The only header both include. Little-endian; both sides are x86-64.
 *
 * Frame: struct orch_wire_head, then `len` bytes. `id` is an exec or file operation, chosen by the
 * host, never reused within a microVM; 0 is the agent itself. Neither side trusts the other's
 * lengths: a frame over ORCH_WIRE_MAX, an unknown type, or a frame that its state does not allow
 * ends the connection (host: the microVM is failed with "protocol error: …"). */
#ifndef ORCH_GUEST_WIRE_H
#define ORCH_GUEST_WIRE_H

#include <stdint.h>

#define ORCH_WIRE_VERSION 1
#define ORCH_WIRE_MAX (64 * 1024)     /* payload bytes of one frame */
#define ORCH_WIRE_WINDOW (256 * 1024) /* stdin or file bytes the host may send ahead of credit */
#define ORCH_WIRE_PORT "orch.0"       /* name of the virtio-serial port */

/* eth0, where there is one, in every guest. */
#define ORCH_WIRE_NET_ADDR 0x0aff0002u    /* 10.255.0.2 */
#define ORCH_WIRE_NET_GATEWAY 0x0aff0001u /* 10.255.0.1 */
#define ORCH_WIRE_NET_BITS 30

struct orch_wire_head {
    uint32_t len;
    uint32_t id;
    uint8_t type;
    uint8_t zero[3];
};

enum orch_wire_type {
    /* host → guest */
    ORCH_WIRE_RESTORE = 1, /* id 0, once after a clone: struct orch_wire_restore → HELLO */
    ORCH_WIRE_EXEC,        /* struct orch_wire_exec + strings */
    ORCH_WIRE_STDIN,       /* bytes; len 0 = end of input */
    ORCH_WIRE_SIGNAL,      /* u32 signal, to the whole process tree of the exec */
    /* struct orch_wire_file + path; then DATA frames, empty one ends → DONE */
    ORCH_WIRE_WRITE,
    ORCH_WIRE_READ, /* struct orch_wire_file + path → DATA…, DONE */
    /* path → DATA (entries "type mode size mtime name\0"), DONE; type one of fdlpscb, mode
     * octal, mtime in seconds, in no order, no entry split, EFBIG after 65536 */
    ORCH_WIRE_LIST,
    ORCH_WIRE_DATA,      /* both directions: file bytes */
    ORCH_WIRE_RESIZE,    /* u16 rows, u16 cols (pty) */
    ORCH_WIRE_DROP = 11, /* host gave up on id: kill its process tree, no further frames for it */
    /* guest → host */
    /* id 0: struct orch_wire_hello; after boot, and as the answer to RESTORE */
    ORCH_WIRE_HELLO = 64,
    ORCH_WIRE_STARTED, /* u32 pid */
    ORCH_WIRE_STDOUT,  /* bytes */
    ORCH_WIRE_STDERR,  /* bytes */
    /* struct orch_wire_exit: the command and its whole tree are gone, all output sent */
    ORCH_WIRE_EXIT,
    ORCH_WIRE_CREDIT, /* u32 bytes of STDIN or DATA taken by the guest */
    ORCH_WIRE_DONE,   /* struct orch_wire_done: end of a file operation */
};

struct orch_wire_restore {
    uint8_t entropy[64];
    int64_t realtime_ns;
    uint8_t epoch[16]; /* a fresh UUID for each clone */
};

struct orch_wire_hello {
    uint32_t version;
    uint32_t zero;
    uint8_t epoch[16]; /* zeros after boot */
};

#define ORCH_WIRE_EXEC_PTY 1
#define ORCH_WIRE_EXEC_STDIN 2 /* stdin will be sent; else it is /dev/null */
/* personality(ADDR_NO_RANDOMIZE): under TCG, see notes in qemu.c */
#define ORCH_WIRE_EXEC_NO_ASLR 4

/* Followed by strings, each ended by NUL: cwd ("" = the user's home), user ("1000", "root", …),
 * n_argv arguments, n_env "NAME=value". Output caps are the guest's too: after max_output bytes of
 * one stream it reads on and drops (EXIT tells). */
struct orch_wire_exec {
    uint32_t flags, n_argv, n_env;
    uint32_t timeout_ms; /* 0: none; then TERM, 2 s, KILL to the tree */
    uint64_t max_output; /* per stream; 0: none */
    uint16_t rows, cols; /* 0: 24, 80 */
    uint32_t zero;
};

enum orch_wire_fail {
    ORCH_WIRE_FAIL_NONE,
    ORCH_WIRE_FAIL_NOT_FOUND,      /* argv[0]: 127 */
    ORCH_WIRE_FAIL_NOT_EXECUTABLE, /* 126 */
    ORCH_WIRE_FAIL_CWD,
    ORCH_WIRE_FAIL_USER,
    ORCH_WIRE_FAIL_RESOURCES, /* fork, pipes, memory */
};

#define ORCH_WIRE_EXIT_TIMED_OUT 1
#define ORCH_WIRE_EXIT_CUT_STDOUT 2
#define ORCH_WIRE_EXIT_CUT_STDERR 4
#define ORCH_WIRE_EXIT_MEMORY 8 /* ended, with its tree, for want of memory */

struct orch_wire_exit {
    uint32_t fail;  /* enum orch_wire_fail; then sys_errno says why and nothing ran */
    int32_t status; /* exit status, -1 when signalled */
    int32_t signal; /* 0 when it exited */
    uint32_t flags;
    uint32_t sys_errno;
    uint32_t zero;
    uint64_t dropped_stdout, dropped_stderr; /* bytes over max_output */
};

/* Followed by the path. Regular files only: EISDIR, EINVAL. WRITE: creates or replaces the file (or
 * the link) by rename, mode & 07777, owner `uid`. READ: from offset, at most length bytes (0: to
 * the end). */
struct orch_wire_file {
    uint64_t offset, length;
    uint32_t mode, uid;
};

struct orch_wire_done {
    uint32_t sys_errno;
    uint32_t zero;
    uint64_t bytes;
};

#endif
