/* Unix stream sockets by directory handle, so that a long path or a moved directory does no harm.
 * A listener's file is its owner's alone (0600) and goes with the listener. */
#ifndef ORCH_BASE_UNIX_H
#define ORCH_BASE_UNIX_H

#include "err.h"

#include <sys/stat.h>

enum { ORCH_UNIX_NAME_MAX = 64 }; /* bytes of a socket's file name */

struct orch_unix_listener {
    int fd, dirfd; /* -1: none */
    struct stat file;
    char name[ORCH_UNIX_NAME_MAX + 1];
};

/* Takes dirfd, also on failure. What is left of a listener that is dead is replaced; -EADDRINUSE
 * for anything else of that name. fd does not block. */
int orch_unix_listen(struct orch_unix_listener *u, int dirfd, const char *name, int backlog,
                     struct orch_err *err);
void orch_unix_close(struct orch_unix_listener *u);
/* A connected descriptor or a negative errno; -ECONNREFUSED: nobody listens there any more.
 * timeout_s bounds the connection, and each send and receive; 0: nothing is waited for, the
 * descriptor does not block. */
int orch_unix_connect(int dirfd, const char *name, int timeout_s);
/* Whether the file is a socket that nobody listens on. */
bool orch_unix_dead(int dirfd, const char *name);
/* Who is at the other end; false: another user, and not root. */
bool orch_unix_peer(int fd, pid_t *pid, uid_t *uid);

#endif
