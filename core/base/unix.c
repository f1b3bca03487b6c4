#include "unix.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

static struct sockaddr_un address(int dirfd, const char *name)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    snprintf(a.sun_path, sizeof a.sun_path, "/proc/self/fd/%d/%.*s", dirfd, ORCH_UNIX_NAME_MAX,
             name);
    return a;
}

int orch_unix_connect(int dirfd, const char *name, int timeout_s)
{
    struct sockaddr_un a = address(dirfd, name);
    struct timeval tv = { .tv_sec = timeout_s };
    cleanup_close int fd = socket(AF_UNIX,
                                  SOCK_STREAM | SOCK_CLOEXEC | (timeout_s ? 0 : SOCK_NONBLOCK), 0);
    if (fd < 0)
        return -errno;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv); /* connect's too */
    if (connect(fd, (struct sockaddr *)&a, sizeof a) < 0)
        return -errno;
    return orch_steal_fd(&fd);
}

bool orch_unix_dead(int dirfd, const char *name)
{
    struct stat st;
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISSOCK(st.st_mode))
        return false;
    cleanup_close int fd = orch_unix_connect(dirfd, name, 0);
    return fd == -ECONNREFUSED;
}

static int listen_at(struct orch_unix_listener *u, int backlog)
{
    struct sockaddr_un a = address(u->dirfd, u->name);
    u->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* The mode that bind gives the file; the umask is the whole process's. */
    if (u->fd < 0 || fchmod(u->fd, 0600) < 0 || bind(u->fd, (struct sockaddr *)&a, sizeof a) < 0 ||
        fstatat(u->dirfd, u->name, &u->file, AT_SYMLINK_NOFOLLOW) < 0 || listen(u->fd, backlog) < 0)
        return -errno;
    return 0;
}

int orch_unix_listen(struct orch_unix_listener *u, int dirfd, const char *name, int backlog,
                     struct orch_err *err)
{
    struct stat st;
    *u = (struct orch_unix_listener){ .fd = -1, .dirfd = dirfd };
    size_t n = strlen(name);
    int r = n && n <= ORCH_UNIX_NAME_MAX && !strchr(name, '/') ? 0 : -EINVAL;
    if (r == 0)
        memcpy(u->name, name, n + 1);
    if (r < 0) {
        orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                      "the socket's file name must have 1 to %d bytes", ORCH_UNIX_NAME_MAX);
    } else if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
               !orch_unix_dead(dirfd, name)) {
        r = orch_err_set(err, EADDRINUSE, "%s",
                         S_ISSOCK(st.st_mode) ? "another process does"
                                              : "a file of this name is there");
    } else {
        unlinkat(dirfd, name, 0);
        r = listen_at(u, backlog);
        if (r < 0)
            orch_err_set(err, -r, "%s", strerror(-r));
    }
    if (r < 0)
        orch_unix_close(u);
    return r;
}

void orch_unix_close(struct orch_unix_listener *u)
{
    struct stat st;
    if (u->fd >= 0 && u->file.st_ino && fstatat(u->dirfd, u->name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
        st.st_ino == u->file.st_ino && st.st_dev == u->file.st_dev)
        unlinkat(u->dirfd, u->name, 0);
    if (u->fd >= 0)
        close(u->fd);
    if (u->dirfd >= 0)
        close(u->dirfd);
    u->fd = u->dirfd = -1;
}

bool orch_unix_peer(int fd, pid_t *pid, uid_t *uid)
{
    struct ucred peer;
    socklen_t n = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) < 0 ||
        (peer.uid != geteuid() && peer.uid != 0))
        return false;
    *pid = peer.pid;
    *uid = peer.uid;
    return true;
}
