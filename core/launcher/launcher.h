/* Inside the launcher: what its files call of each other. One thread, three kinds of process: the
 * launcher, a microVM's init, the VMM before its execve. None of them allocates or returns to its
 * maker's code after the fork. */
#ifndef ORCH_LAUNCHER_LAUNCHER_H
#define ORCH_LAUNCHER_LAUNCHER_H

#include <linux/filter.h>
#include <stdbool.h>
#include <sys/types.h>

#include "../launch/wire.h"

#define ORCH_LAUNCH_TRIES 150 /* where a limit of namespaces is reached, every 20 ms */
#define ORCH_LAUNCH_SOCK 3    /* main in the launcher, ctl in a microVM's init */

/* fail.c. clone() as fork; a limit of namespaces (ENOSPC) is retried for 3 seconds, since
 * namespaces go asynchronously after the kill of what was in them. Ends the process when orch
 * closes ctl meanwhile. */
pid_t orch_launch_clone(unsigned long flags);
/* The process's one outgoing message, filled as ERROR of errno. */
struct orch_launch_msg *orch_launch_error(const char *step, const char *file);
/* Sends it over ctl and exits. */
_Noreturn void orch_launch_fail(const char *step);

/* init.c: pid 1 of a microVM's namespaces; uid and gid as the launcher's user namespace sees
 * them. */
_Noreturn void orch_init_run(uid_t uid, gid_t gid);

/* net.c: the microVM's network namespace, in init. */
struct orch_net {
    uid_t uid;      /* of init and pasta, as the launcher sees it */
    int tap;        /* -1: no network */
    pid_t pasta;    /* 0: no uplink */
    int said_fd;    /* pasta's stderr; -1 */
    char said[512]; /* the last of it */
    size_t n_said;
};
/* Answers NET, or reports the failed step and ends. */
void orch_net_make(struct orch_net *n, uint32_t flags);
/* Drains pasta's stderr. */
void orch_net_read(struct orch_net *n);
/* pasta ended: reports it and ends. */
_Noreturn void orch_net_lost(struct orch_net *n, int status);

/* confine.c: the VMM up to execve. Errors go as a message into `report`, which execve closes. */
struct orch_confine {
    uint32_t flags;
    uint64_t as_bytes;
    char **binds; /* n_binds pairs: host, guest */
    size_t n_binds;
    char **argv; /* NULL-terminated; empty: exit 0 in place of execve */
    int fds[ORCH_LAUNCH_FDS];
    int report;
};
_Noreturn void orch_confine_exec(struct orch_confine *c);

/* protect.c: `launcher protect r/PATH|p/PATH… -- PROGRAM ARGV0 ARG…`, with a socket as descriptor
 * 3. */
_Noreturn void orch_protect_exec(char **words);

/* filter.c: the VMM's seccomp filters are built once, in the launcher. 0 or a negative errno. */
int orch_filter_build(void);
const struct sock_fprog *orch_filter_get(bool kvm);

#endif
