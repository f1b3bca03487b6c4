#include "control.h"

#include "../base/log.h"
#include "../base/proc.h"
#include "../base/unix.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

enum {
    REQUEST_MAX_BYTES = 64 * 1024,
    ANSWER_MAX_BYTES = 4 << 20,
    CLIENTS_MAX = 16,
    ASK_TIMEOUT_S = 20,
    HANDLES_MAX = 1000, /* of one process */
};

struct client {
    struct client *next;
    struct orch_control *control;
    struct orch_watch *watch;
    struct orch_buf in;
    int fd, pid;
    bool outside; /* in no user namespace of its own: not where children on the host are */
};

struct orch_control {
    struct orch_loop *loop;
    const struct orch_control_verb *verbs;
    void *ud;
    struct orch_unix_listener at;
    struct orch_watch *watch;
    struct client *clients;
    unsigned n_clients;
};

static bool same_user_namespace(int pid)
{
    char path[64], own[64], its[64];
    snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
    ssize_t n = readlink("/proc/self/ns/user", own, sizeof own),
            m = readlink(path, its, sizeof its);
    return n > 0 && n == m && n < (ssize_t)sizeof own && memcmp(own, its, (size_t)n) == 0;
}

static void put_answer(struct client *k, struct orch_buf *out)
{
    const struct orch_control *c = k->control;
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    struct orch_slice line = { k->in.p, k->in.n - 1 };
    bool is_json = orch_json_scan(&d, line, &(struct orch_json_limits){ 0 }, &fault) == 0;
    uint32_t op = is_json ? orch_json_get(&d, 0, "op") : 0;
    const struct orch_control_verb *v = c->verbs;
    while (v->name && !(op && orch_json_string_eq(&d, op, v->name)))
        v++;
    if (!k->outside || (v->loosens && orch_proc_descends(k->pid, getpid())))
        orch_buf_str(out,
                     "{\"ok\":false,\"refused\":true,\"error\":\"refused: asked by a process that "
                     "orch started\"}");
    else if (v->name)
        v->answer(c->ud, &d, out);
    else
        orch_buf_str(out, "{\"ok\":false,\"error\":\"unknown request\"}");
}

static void answer(struct client *k)
{
    cleanup_buf struct orch_buf out = { 0 };
    put_answer(k, &out);
    orch_buf_char(&out, '\n');
    /* The peer is this user's own orch: it reads at once, and a time-out bounds one that does
     * not. */
    setsockopt(k->fd, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){ .tv_sec = 1 },
               sizeof(struct timeval));
    for (size_t sent = 0; sent < out.n;) {
        ssize_t w = send(k->fd, out.p + sent, out.n - sent, MSG_NOSIGNAL);
        if (w <= 0)
            break;
        sent += (size_t)w;
    }
}

static void client_free(struct client *k)
{
    for (struct client **at = &k->control->clients; *at; at = &(*at)->next)
        if (*at == k) {
            *at = k->next;
            break;
        }
    k->control->n_clients--;
    orch_watch_free(k->watch);
    close(k->fd);
    orch_buf_free(&k->in);
    free(k);
}

static void client_readable(void *ud, int events)
{
    (void)events;
    struct client *k = ud;
    char chunk[4096];
    ssize_t r = recv(k->fd, chunk, sizeof chunk, MSG_DONTWAIT);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r > 0)
        orch_buf_add(&k->in, chunk, (size_t)r);
    bool whole = k->in.n && k->in.p[k->in.n - 1] == '\n';
    if (whole)
        answer(k);
    if (r <= 0 || whole || k->in.n > REQUEST_MAX_BYTES)
        client_free(k);
}

static void accept_client(void *ud, int events)
{
    (void)events;
    struct orch_control *c = ud;
    pid_t pid;
    uid_t uid;
    int fd = accept4(c->at.fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    if (!orch_unix_peer(fd, &pid, &uid) || c->n_clients >= CLIENTS_MAX) {
        close(fd);
        return;
    }
    struct client *k = orch_xcalloc(1, sizeof *k);
    *k = (struct client){ .next = c->clients, .control = c, .fd = fd, .pid = pid };
    k->outside = (uid == 0 && getuid() != 0) || same_user_namespace(pid);
    c->clients = k;
    c->n_clients++;
    k->watch = orch_watch_new(c->loop, fd, ORCH_READ, client_readable, k);
}

static bool parse_name(const char *name, int *pid)
{
    int end = 0;
    unsigned n;
    return (sscanf(name, "%d.sock%n", pid, &end) == 1 && end && !name[end]) ||
           (sscanf(name, "%d-%u.sock%n", pid, &n, &end) == 2 && end && !name[end]);
}

/* Sockets of processes that were killed: nobody listens. */
static void remove_dead(int dirfd)
{
    int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), pid;
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!parse_name(e->d_name, &pid) || pid == getpid())
            continue;
        if (orch_unix_dead(dirfd, e->d_name))
            unlinkat(dirfd, e->d_name, 0);
    }
    if (d)
        closedir(d);
}

/* The first name that no other handle of this process has. */
static int listen_at(struct orch_unix_listener *at, int dirfd, struct orch_err *err)
{
    char name[ORCH_UNIX_NAME_MAX];
    int r = -EADDRINUSE;
    for (unsigned n = 1; n <= HANDLES_MAX && r == -EADDRINUSE; n++) {
        if (n == 1)
            snprintf(name, sizeof name, "%d.sock", getpid());
        else
            snprintf(name, sizeof name, "%d-%u.sock", getpid(), n);
        *err = (struct orch_err){ 0 };
        r = orch_unix_listen(at, fcntl(dirfd, F_DUPFD_CLOEXEC, 3), name, 8, err);
    }
    return r < 0 ? orch_err_wrap(err, "%s: the control socket cannot be made", name), r : 0;
}

struct orch_control *orch_control_new(struct orch_loop *l, const char *runtime_dir,
                                      const struct orch_control_verb *verbs, void *ud,
                                      struct orch_err *err)
{
    cleanup_close int dirfd = orch_own_dir(runtime_dir, err);
    if (dirfd < 0)
        return NULL;
    remove_dead(dirfd);
    struct orch_control *c = orch_xcalloc(1, sizeof *c);
    c->loop = l;
    c->verbs = verbs;
    c->ud = ud;
    if (listen_at(&c->at, dirfd, err) < 0) {
        orch_err_wrap(err, "%s", runtime_dir);
        free(c);
        return NULL;
    }
    c->watch = orch_watch_new(l, c->at.fd, ORCH_READ, accept_client, c);
    return c;
}

void orch_control_free(struct orch_control *c)
{
    if (!c)
        return;
    while (c->clients)
        client_free(c->clients);
    orch_watch_free(c->watch);
    orch_unix_close(&c->at);
    free(c);
}

/* ---- asking */

/* The answer's line appended to out; 0 or a negative errno. */
static int ask_one(int dirfd, const char *name, struct orch_slice request, struct orch_buf *out)
{
    cleanup_close int fd = orch_unix_connect(dirfd, name, ASK_TIMEOUT_S);
    if (fd < 0)
        return fd;
    int r = orch_write_all(fd, request.p, request.n);
    if (r < 0 || (r = orch_write_all(fd, "\n", 1)) < 0)
        return r;
    size_t start = out->n;
    while (out->n - start < ANSWER_MAX_BYTES) {
        char chunk[8192];
        ssize_t n = recv(fd, chunk, sizeof chunk, 0);
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        orch_buf_add(out, chunk, (size_t)n);
    }
    while (out->n > start && out->p[out->n - 1] == '\n')
        out->n--;
    return out->n > start ? 0 : -EPIPE;
}

void orch_control_ask(const char *runtime_dir, int pid, struct orch_slice request,
                      struct orch_buf *out)
{
    orch_buf_char(out, '[');
    struct orch_err err = { 0 };
    int copy = access(runtime_dir, F_OK) < 0 ? -1 : orch_own_dir(runtime_dir, &err);
    if (err.cls)
        orch_log(ORCH_WARN, "%s", err.msg);
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    for (struct dirent *e; d && (e = readdir(d));) {
        int its_pid;
        if (!parse_name(e->d_name, &its_pid) || (pid && pid != its_pid) || its_pid == getpid())
            continue;
        cleanup_buf struct orch_buf text = { 0 };
        int r = ask_one(dirfd(d), e->d_name, request, &text);
        if (r == -ECONNREFUSED) { /* left by a process that was killed */
            unlinkat(dirfd(d), e->d_name, 0);
            continue;
        }
        orch_buf_printf(out, "%s{\"pid\":%d,", out->n > 1 ? "," : "", its_pid);
        if (r < 0) {
            orch_buf_str(out, "\"error\":");
            orch_json_quote(out, orch_slice_str(strerror(-r)));
        } else {
            orch_buf_str(out, "\"answer\":");
            orch_buf_slice(out, (struct orch_slice){ text.p, text.n });
        }
        orch_buf_char(out, '}');
    }
    if (d)
        closedir(d);
    orch_buf_char(out, ']');
}
