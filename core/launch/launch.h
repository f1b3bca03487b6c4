/* orch's side of the launcher: starts it once, asks it for one confined VMM per microVM, learns of
 * exits. Everything of a microVM dies with its orch_cell, with the launcher, or with orch. */
#ifndef ORCH_LAUNCH_LAUNCH_H
#define ORCH_LAUNCH_LAUNCH_H

#include "../base/proc.h"
#include "wire.h"

struct orch_launcher;
struct orch_cell; /* one microVM's namespaces and VMM */

typedef void orch_launcher_lost_fn(void *ud, const char *why);

/* path: $PREFIX/libexec/orch/launcher. on_lost (may be NULL): the launcher ended; every cell was
 * failed before. The next orch_cell_new starts another. Starting it waits for its HELLO at most 30
 * s (measured: 2 ms). When orch is root, VMMs run as uid and gid 60001 (with ORCH_VMM_KVM: the
 * group of /dev/kvm), so what they are to read must be readable for others; else as orch's own
 * user. */
struct orch_launcher *orch_launcher_new(struct orch_loop *l, const char *path,
                                        orch_launcher_lost_fn *on_lost, void *ud,
                                        struct orch_err *err);
/* Ends it and with it all VMMs, without a callback. Cells still there must be freed all the
 * same. */
void orch_launcher_free(struct orch_launcher *la);
int orch_launcher_pid(const struct orch_launcher *la); /* 0: ended, none started since */

struct orch_cell_bind {
    const char *host, *guest;
};

struct orch_cell_opts {
    /* argv[0]: absolute path in the VMM's root; NULL-terminated */
    const char *const *argv;
    /* absolute paths of files, not directories; bound read-only */
    const struct orch_cell_bind *binds;
    size_t n_binds;
    int fds[ORCH_LAUNCH_FDS]; /* by enum orch_launch_fd, -1 absent; borrowed */
    uint32_t flags;           /* ORCH_VMM_… */
    uint64_t as_bytes;
    /* Exactly one of these ends a cell's life, once, from the loop: the VMM's wait status, or why
     * it never ran (class ISOLATION; step, system's error and the fix in the text). on_started is
     * optional. The cell stays until orch_cell_free; any callback may free any cell. Deadlines are
     * the caller's. */
    void (*on_started)(void *ud);
    void (*on_exit)(void *ud, int status);
    void (*on_error)(void *ud, const struct orch_err *err);
    void *ud;
};

/* Sends NEW and VMM at once; nothing is waited for, but a launcher's start when the last one
 * ended. */
struct orch_cell *orch_cell_new(struct orch_launcher *la, const struct orch_cell_opts *o,
                                struct orch_err *err);

struct orch_cell_net_opts {
    uint32_t flags; /* ORCH_NET_UPLINK; ORCH_VMM_KVM when the VMM will have it */
    /* Once: the namespace is there, its tap down, its tables empty. The sockets are the callee's;
     * settings: its sysctls are set. on_error as in orch_cell_opts, until orch_cell_start. */
    void (*on_net)(void *ud, const int fds[ORCH_NET_FDS], bool settings);
    void (*on_error)(void *ud, const struct orch_err *err);
    void *ud;
};
/* A cell with a network namespace and without a VMM yet. core/net is its user: no VMM is added
 * before the namespace's tables are verified. */
struct orch_cell *orch_cell_new_net(struct orch_launcher *la, const struct orch_cell_net_opts *o,
                                    struct orch_err *err);
/* Adds the VMM, with the tap as ORCH_LAUNCH_FD_TAP; from now on the callbacks are o's. */
int orch_cell_start(struct orch_cell *c, const struct orch_cell_opts *o, struct orch_err *err);

/* The pid of its init, whose children are pasta, where there is an uplink, and then the VMM. 0: not
 * started, or over. */
int orch_cell_init(const struct orch_cell *c);

/* Ends VMM and namespaces; no callback follows. Returns at once; the kernel is done within 0.1
 * s. */
void orch_cell_free(struct orch_cell *c);

/* Why `launcher protect` did not execute a program (class ISOLATION), with the fix. */
int orch_launch_unprotected(const char *launcher, const struct orch_proc_report *r,
                            struct orch_err *err);

/* For doctor: can this user get a confined VMM? Makes an empty cell and takes it down. 0, or the
 * error of the first step that failed, with the fix. Waits at most 30 s. */
int orch_launch_check(const char *path, struct orch_err *err);

#endif
