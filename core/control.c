/* The control socket: PID.sock in the runtime directory, one JSON line in, one out. How `orch status`,
 * `orch reload` and `orch vm list` reach the running orch processes of the same user. */
#include "host.h"

#include "base/unix.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

enum { REQUEST_MAX_BYTES = 64 * 1024, ANSWER_MAX_BYTES = 4 << 20, CLIENTS_MAX = 16, ASK_TIMEOUT_S = 20 };

struct client {
    struct client *next;
    struct orch_control *control;
    struct orch_watch *watch;
    struct orch_buf in;
    int fd, pid;
    bool outside; /* in no user namespace of its own: not where children on the host are */
};

struct orch_control {
    struct orch *o;
    struct orch_unix_listener at;
    struct orch_watch *watch;
    struct client *clients;
    unsigned n_clients;
};

static void put_status(struct orch *o, struct orch_buf *out)
{
    struct orch_json *j = orch_json_object();
    unsigned sessions = 0, in_flight = 0;
    for (struct orch_session *s = o->sessions; s; s = s->next) {
        sessions++;
        in_flight += s->mcp ? orch_mcp_session_in_flight(s->mcp) : 0;
    }
    orch_json_set_str(j, "version", ORCH_VERSION);
    orch_json_set_num(j, "pid", getpid());
    orch_json_set_str(j, "config", o->paths.config);
    orch_json_set_str(j, "generation", o->gen ? o->gen->hash : NULL);
    orch_json_set_num(j, "tools", o->gen ? (double)o->gen->n_tools : 0);
    orch_json_set_num(j, "reloads", (double)o->reloads);
    orch_json_set_str(j, "reload_error", o->reload_error.n ? o->reload_error.p : NULL);
    orch_json_set_str(j, "notes", o->gen && o->gen->notes.n ? o->gen->notes.p : NULL);
    orch_json_set_num(j, "sessions", sessions);
    orch_json_set_num(j, "calls_in_flight", in_flight);
    orch_json_set_str(j, "audit", o->audit ? orch_audit_path(o->audit) : NULL);
    orch_json_set_bool(j, "audit_broken", o->audit && orch_audit_broken(o->audit));
    orch_json_set_num(j, "uptime_s", (double)(orch_now_us() - o->started_us) / 1e6);
    orch_json_set_str(j, "upstream", o->upstream ? (orch_upstream_ready(o->upstream) ? "ready" : orch_upstream_problem(o->upstream)) : NULL);
    orch_json_print(j, false, out);
    orch_json_free(j);
}

static struct orch_json *about_vm(struct orch_vm *vm)
{
    struct orch_json *j = orch_json_object();
    orch_json_set_str(j, "id", orch_vm_id(vm));
    orch_json_set_str(j, "name", orch_vm_name(vm));
    orch_json_set_str(j, "image", orch_vm_image(vm));
    orch_json_set_str(j, "backend", orch_vm_backend(vm));
    orch_json_set_str(j, "isolation", orch_isolation_name(orch_vm_isolation(vm)));
    orch_json_set_str(j, "network", orch_vm_network(vm));
    orch_json_set_num(j, "spawn_ms", orch_vm_spawn_ms(vm));
    return j;
}

static void put_vm(void *ud, struct orch_vm *vm)
{
    orch_json_add_take(ud, about_vm(vm));
}

static void put_rule(void *ud, const char *label, uint64_t packets, uint64_t bytes)
{
    struct orch_json *j = orch_json_object();
    orch_json_set_str(j, "label", label);
    orch_json_set_num(j, "packets", (double)packets);
    orch_json_set_num(j, "bytes", (double)bytes);
    orch_json_add_take(ud, j);
}

static void put_vm_stats(void *ud, struct orch_vm *vm)
{
    struct orch_json *j = about_vm(vm), *rules = orch_json_array();
    struct orch_vm_usage u;
    struct orch_err err = { .code = 0 };
    if (orch_vm_usage(vm, &u, &err) < 0 || orch_vm_counters(vm, put_rule, rules, &err) < 0)
        orch_json_set_str(j, "error", err.msg);
    orch_json_set_num(j, "vmm_bytes", (double)u.vmm_bytes);
    orch_json_set_num(j, "uplink_bytes", (double)u.uplink_bytes);
    orch_json_set_num(j, "connections", u.connections);
    orch_json_set_take(j, "rules", rules);
    orch_json_add_take(ud, j);
}

static void put_vms(struct orch *o, void (*put)(void *ud, struct orch_vm *vm), struct orch_buf *out)
{
    struct orch_json *list = orch_json_array();
    if (o->vms)
        orch_vms_each(o->vms, put, list);
    orch_json_print(list, false, out);
    orch_json_free(list);
}

static bool same_user_namespace(int pid)
{
    char path[64], own[64], its[64];
    snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
    ssize_t n = readlink("/proc/self/ns/user", own, sizeof own), m = readlink(path, its, sizeof its);
    return n > 0 && n == m && n < (ssize_t)sizeof own && memcmp(own, its, (size_t)n) == 0;
}

static void answer(struct client *k)
{
    struct orch *o = k->control->o;
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    cleanup_buf struct orch_buf out = { 0 };
    struct orch_slice line = { k->in.p, k->in.n - 1 };
    uint32_t op = orch_json_scan(&d, line, &(struct orch_json_limits){ 0 }, &fault) == 0 ? orch_json_get(&d, 0, "op") : 0;
    bool reload = op && orch_json_string_eq(&d, op, "reload");
    /* Nothing that orch started asks for what loosens rules; what it protects itself from, for nothing at all, also when
     * its parents are gone. */
    if (!k->outside || (reload && orch_proc_descends(k->pid, getpid()))) {
        orch_buf_str(&out, "{\"ok\":false,\"refused\":true,\"error\":\"refused: asked by a process that orch started\"}");
    } else if (op && orch_json_string_eq(&d, op, "status")) {
        put_status(o, &out);
    } else if (op && orch_json_string_eq(&d, op, "vms")) {
        put_vms(o, put_vm, &out);
    } else if (op && orch_json_string_eq(&d, op, "stats")) {
        put_vms(o, put_vm_stats, &out);
    } else if (reload) {
        if (orch_host_reload(o, "orch reload") == 0)
            orch_buf_printf(&out, "{\"ok\":true,\"generation\":\"%s\"}", o->gen->hash);
        else {
            orch_buf_str(&out, "{\"ok\":false,\"error\":");
            orch_json_quote(&out, (struct orch_slice){ o->reload_error.p, o->reload_error.n });
            orch_buf_char(&out, '}');
        }
    } else {
        orch_buf_str(&out, "{\"ok\":false,\"error\":\"unknown request\"}");
    }
    orch_buf_char(&out, '\n');
    /* The peer is this user's own orch: it reads at once, and a time-out bounds one that does not. */
    setsockopt(k->fd, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){ .tv_sec = 1 }, sizeof(struct timeval));
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
    k->watch = orch_watch_new(c->o->loop, fd, ORCH_READ, client_readable, k);
}

static bool parse_name(const char *name, int *pid)
{
    int end = 0;
    return sscanf(name, "%d.sock%n", pid, &end) == 1 && end && !name[end];
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

struct orch_control *orch_control_new(struct orch *o, struct orch_err *err)
{
    char name[32];
    int dirfd = orch_own_dir(o->paths.runtime, err);
    if (dirfd < 0)
        return NULL;
    remove_dead(dirfd);
    struct orch_control *c = orch_xcalloc(1, sizeof *c);
    c->o = o;
    snprintf(name, sizeof name, "%d.sock", getpid());
    if (orch_unix_listen(&c->at, dirfd, name, 8, err) < 0) {
        orch_err_wrap(err, "%s/%s: the control socket cannot be made", o->paths.runtime, name);
        free(c);
        return NULL;
    }
    c->watch = orch_watch_new(o->loop, c->at.fd, ORCH_READ, accept_client, c);
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

void orch_control_ask(struct orch *o, int pid, struct orch_slice request, struct orch_buf *out)
{
    orch_buf_char(out, '[');
    struct orch_err err = { 0 };
    int copy = access(o->paths.runtime, F_OK) < 0 ? -1 : orch_own_dir(o->paths.runtime, &err);
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
