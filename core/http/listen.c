#include "listen.h"

#include "../base/log.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

enum {
    ACCEPTS = 64,          /* new connections a turn */
    ACCEPT_RETRY_MS = 100, /* after running out of descriptors */
};

static void tcp_peer(const struct sockaddr_storage *a, struct orch_http_peer *p)
{
    if (a->ss_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)a;
        inet_ntop(AF_INET, &v4->sin_addr, p->addr, sizeof p->addr);
        p->port = ntohs(v4->sin_port);
        memcpy(p->key, &v4->sin_addr, sizeof v4->sin_addr);
    } else {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)a;
        inet_ntop(AF_INET6, &v6->sin6_addr, p->addr, sizeof p->addr);
        p->port = ntohs(v6->sin6_port);
        memcpy(p->key, &v6->sin6_addr, 8);
    }
}

/* False: another user's, closed. */
static bool take_peer(struct orch_http_listener *l, int fd, const struct sockaddr_storage *a,
                      struct orch_http_peer *p)
{
    pid_t pid;
    if (l->local.fd < 0) {
        tcp_peer(a, p);
        return true;
    }
    if (!orch_unix_peer(fd, &pid, &p->uid)) {
        orch_log(ORCH_WARN, "http: %s: a connection of another user was closed", l->address);
        return false;
    }
    p->local = true;
    p->pid = pid;
    memcpy(p->key, &p->uid, sizeof p->uid);
    return true;
}

static void accept_some(void *ud, int events)
{
    (void)events;
    struct orch_http_listener *l = ud;
    for (int i = 0; i < ACCEPTS; i++) {
        struct sockaddr_storage a = { 0 };
        socklen_t len = sizeof a;
        cleanup_close int fd = accept4(l->fd, (struct sockaddr *)&a, &len,
                                       SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)) {
            orch_log(ORCH_WARN, "http: %s: no connection can be accepted: %s", l->address,
                     strerror(errno));
            orch_watch_set(l->watch, 0);
            orch_timer_set(l->retry, ACCEPT_RETRY_MS);
            return;
        }
        if (fd < 0 && errno != ECONNABORTED && errno != EINTR)
            return;
        if (fd < 0)
            continue;
        struct orch_http_peer peer = { 0 };
        if (take_peer(l, fd, &a, &peer))
            l->accepted(l->ud, orch_steal_fd(&fd), &peer);
        else
            l->refused++;
    }
}

static void accept_again(void *ud)
{
    struct orch_http_listener *l = ud;
    if (l->watch)
        orch_watch_set(l->watch, ORCH_READ);
}

static int listen_tcp(struct orch_http_listener *l, const char *where, struct orch_err *err)
{
    const char *colon = strrchr(where, ':');
    char *end, host[64] = "";
    size_t n = colon ? (size_t)(colon - where) : 0;
    unsigned long port = colon && colon[1] ? strtoul(colon + 1, &end, 10) : 65536;
    struct sockaddr_in v4 = { .sin_family = AF_INET };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6 };
    bool six = n > 2 && where[0] == '[' && where[n - 1] == ']';
    if (n < sizeof host)
        snprintf(host, sizeof host, "%.*s", (int)(six ? n - 2 : n), where + six);
    if (strcmp(host, "localhost") == 0)
        strcpy(host, "127.0.0.1");
    if (port > 65535 || *end ||
        inet_pton(six ? AF_INET6 : AF_INET, host,
                  six ? (void *)&v6.sin6_addr : (void *)&v4.sin_addr) != 1)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "http: cannot listen on \"%s\": give ADDRESS:PORT (127.0.0.1:8700, "
                             "[::1]:8700, localhost:8700) or unix:PATH",
                             where);
    v4.sin_port = v6.sin6_port = htons((uint16_t)port);
    struct sockaddr *a = six ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4;
    socklen_t len = six ? sizeof v6 : sizeof v4;
    l->fd = socket(a->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->fd >= 0) {
        setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int));
        if (six)
            setsockopt(l->fd, IPPROTO_IPV6, IPV6_V6ONLY, &(int){ 1 }, sizeof(int));
    }
    if (l->fd < 0 || bind(l->fd, a, len) < 0 || listen(l->fd, 512) < 0 ||
        getsockname(l->fd, a, &len) < 0)
        return orch_err_set(err, errno, "http: cannot listen on %s: %s%s", where, strerror(errno),
                            errno == EADDRINUSE ? "; another program does, choose another port"
                                                : "");
    l->address = six ? orch_xasprintf("[%s]:%u", host, ntohs(v6.sin6_port))
                     : orch_xasprintf("%s:%u", host, ntohs(v4.sin_port));
    return 0;
}

static int socket_directory(const char *dir, struct orch_err *err)
{
    int r = orch_mkdir_p(dir, 0700);
    int fd = r < 0 ? -1 : open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct stat st;
    if (r < 0 || fd < 0 || fstat(fd, &st) < 0) {
        r = orch_err_set(err, r < 0 ? -r : errno, "http: directory %s: %s", dir,
                         strerror(r < 0 ? -r : errno));
        if (fd >= 0)
            close(fd);
        return r;
    }
    if (st.st_uid == geteuid() && !(st.st_mode & 077))
        return fd;
    close(fd);
    return orch_err_setc(err, ORCH_CLASS_CONFIG, EPERM,
                         "http: directory %s holds the socket and must be this user's alone (is "
                         "%04o, uid %u): chmod 700 it "
                         "or name a directory that does not exist yet",
                         dir, (unsigned)st.st_mode & 07777, (unsigned)st.st_uid);
}

static int listen_unix(struct orch_http_listener *l, const char *path, struct orch_err *err)
{
    const char *slash = strrchr(path, '/');
    cleanup_free char *dir = slash ? orch_xstrndup(path, slash == path ? 1 : (size_t)(slash - path))
                                   : orch_xstrdup(".");
    int dirfd = socket_directory(dir, err);
    if (dirfd < 0)
        return dirfd;
    int r = orch_unix_listen(&l->local, dirfd, slash ? slash + 1 : path, 512, err);
    if (r < 0)
        return orch_err_wrap(err, "http: cannot listen on unix:%s", path);
    l->fd = l->local.fd;
    l->address = orch_xasprintf("unix:%s", path);
    return 0;
}

void orch_http_listener_stop(struct orch_http_listener *l)
{
    orch_watch_free(l->watch);
    l->watch = NULL;
    if (l->fd >= 0 && l->fd != l->local.fd)
        close(l->fd);
    l->fd = -1;
    orch_unix_close(&l->local);
}

int orch_http_listen(struct orch_http_listener *l, struct orch_loop *loop, const char *where,
                     struct orch_err *err)
{
    l->fd = l->local.fd = l->local.dirfd = -1;
    bool local = strncmp(where, "unix:", 5) == 0;
    int r = local ? listen_unix(l, where + 5, err) : listen_tcp(l, where, err);
    if (r < 0)
        return r;
    l->watch = orch_watch_new(loop, l->fd, ORCH_READ, accept_some, l);
    l->retry = orch_timer_new(loop, accept_again, l);
    return 0;
}

void orch_http_listener_fini(struct orch_http_listener *l)
{
    orch_http_listener_stop(l);
    orch_timer_free(l->retry);
    free(l->address);
}
