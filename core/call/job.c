/* The tasks extension (io.modelcontextprotocol/tasks): a call that became a task has answered its
 * request and goes on; its client asks for it by an id. A file in the state directory makes each
 * task durable before its id is given out: it holds the owner and the task as tasks/get shows it.
 * Tasks that run are in memory too; of one whose process ended before it did, the file says
 * `working` and tasks/get `failed`. */
#include "call_int.h"

#include "../base/log.h"
#include "../base/proc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum {
    JOBS_MAX = 1000, /* running */
    TTL_MS = 24 * 60 * 60 * 1000,
    POLL_MS = 1000,
    FILE_MAX_BYTES = 64 << 20,
};

struct orch_job {
    struct orch_call_part part;
    struct orch_job *next;
    struct orch_call *call;
    char id[33], created[32], updated[32];
    struct orch_timer *expiry;
};

static const struct orch_call_part_ops job_ops;

static void now_text(char out[32])
{
    struct timespec ts;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &ts);
    gmtime_r(&ts.tv_sec, &tm);
    size_t n = strftime(out, 32, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out + n, 32 - n, ".%03dZ", (int)(ts.tv_nsec / 1000000));
}

static char *dir_of(const struct orch_calls *cs)
{
    return orch_xasprintf("%s/tasks", cs->current->paths->state);
}

static char *file_of(const struct orch_calls *cs, const char *id)
{
    return orch_xasprintf("%s/tasks/%s.json", cs->current->paths->state, id);
}

static void put_head(const struct orch_job *j, const char *status, struct orch_buf *b)
{
    orch_buf_printf(b,
                    "\"taskId\":\"%s\",\"status\":\"%s\",\"createdAt\":\"%s\",\"lastUpdatedAt\":\"%"
                    "s\",\"ttlMs\":%d,\"pollIntervalMs\":%d",
                    j->id, status, j->created, j->updated, TTL_MS, POLL_MS);
}

static int write_file(const struct orch_job *j, struct orch_slice members, struct orch_err *err)
{
    const struct orch_calls *cs = j->call->calls;
    cleanup_free char *dir = dir_of(cs);
    cleanup_free char *path = file_of(cs, j->id);
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_str(&b, "{\"caller\":");
    orch_json_quote(&b, orch_slice_str(j->call->session->caller));
    orch_buf_printf(&b, ",\"pid\":%d,\"start\":%lld,\"task\":{", getpid(),
                    (long long)orch_proc_started(getpid()));
    orch_buf_slice(&b, members);
    orch_buf_str(&b, "}}");
    int r = orch_mkdir_p(dir, 0700);
    if (r == 0)
        r = orch_write_file(AT_FDCWD, path, b.p, b.n, 0600);
    return r < 0 ? orch_err_set(err, -r, "%s: the task cannot be kept: %s", path, strerror(-r)) : 0;
}

/* Files of tasks whose time is over; once a process, since each start makes few. */
static void sweep_files(struct orch_calls *cs)
{
    cleanup_free char *dir = dir_of(cs);
    DIR *d = cs->jobs_swept ? NULL : opendir(dir);
    cs->jobs_swept = true;
    if (!d)
        return;
    time_t oldest = time(NULL) - TTL_MS / 1000;
    for (struct dirent *e; (e = readdir(d));) {
        struct stat st;
        if (strlen(e->d_name) == 37 &&
            fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_mtime < oldest)
            unlinkat(dirfd(d), e->d_name, 0);
    }
    closedir(d);
}

static void job_expired(void *ud)
{
    struct orch_job *j = ud;
    orch_call_cancel(j->call, "the task's time is over");
}

static int admit(struct orch_call *c, struct orch_err *err)
{
    unsigned n = 0;
    if (!c->modern || !(c->caps & ORCH_MCP_CAP_TASKS) || !c->rq) {
        c->missing = ORCH_MCP_CAP_TASKS;
        return orch_err_setc(err, ORCH_CLASS_FAILED, ENOTSUP,
                             "the client does not offer the tasks extension");
    }
    for (const struct orch_job *k = c->calls->jobs; k; k = k->next)
        n++;
    if (n >= JOBS_MAX)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN, "%d tasks are running already",
                             JOBS_MAX);
    return 0;
}

int orch_job_begin(struct orch_call *c, struct orch_err *err)
{
    struct orch_calls *cs = c->calls;
    uint8_t random[16];
    if (orch_call_part(c, &job_ops))
        return 0;
    int r = admit(c, err);
    if (r < 0)
        return r;
    if (orch_random(random, sizeof random) < 0)
        return orch_err_set(err, EIO, "no random numbers");
    sweep_files(cs);
    struct orch_job *j = orch_xcalloc(1, sizeof *j);
    j->part.ops = &job_ops;
    j->call = c;
    orch_hex(random, sizeof random, j->id);
    now_text(j->created);
    memcpy(j->updated, j->created, sizeof j->updated);
    cleanup_buf struct orch_buf b = { 0 };
    put_head(j, "working", &b);
    if (write_file(j, (struct orch_slice){ b.p, b.n }, err) < 0) {
        free(j);
        return -EIO;
    }
    j->expiry = orch_timer_new(cs->loop, job_expired, j);
    orch_timer_set(j->expiry, TTL_MS);
    j->next = cs->jobs;
    cs->jobs = j;
    orch_call_add_part(c, &j->part);
    struct orch_mcp_request *rq = orch_steal_ptr(&c->rq);
    orch_buf_char(&b, ',');
    orch_call_put_origin(c, &b);
    orch_mcp_respond_typed(rq, "task", (struct orch_slice){ b.p, b.n });
    return 0;
}

static void put_running(const struct orch_job *j, struct orch_buf *b)
{
    bool asks = orch_call_asks(j->call);
    put_head(j, asks ? "input_required" : "working", b);
    if (asks) {
        orch_buf_char(b, ',');
        orch_call_put_questions(j->call, b);
    }
}

static void changed(const struct orch_job *j, struct orch_slice members)
{
    const struct orch_calls *cs = j->call->calls;
    if (cs->task_changed)
        cs->task_changed(cs->ud, orch_slice_str(j->id), members);
}

static void job_asked(struct orch_call_part *p, struct orch_call *c)
{
    struct orch_job *j = (struct orch_job *)p;
    (void)c;
    cleanup_buf struct orch_buf b = { 0 };
    now_text(j->updated);
    put_running(j, &b);
    changed(j, (struct orch_slice){ b.p, b.n });
}

static void put_end(const struct orch_job *j, struct orch_buf *b)
{
    const struct orch_call *c = j->call;
    put_head(j, c->cancelled ? "cancelled" : c->rpc_code ? "failed" : "completed", b);
    if (c->cancelled)
        return;
    if (!c->rpc_code) {
        orch_buf_str(b, ",\"result\":{\"resultType\":\"complete\",");
        orch_buf_slice(b, (struct orch_slice){ c->text.p, c->text.n });
        orch_buf_char(b, '}');
        return;
    }
    orch_buf_printf(b, ",\"error\":{\"code\":%d,\"message\":", c->rpc_code);
    orch_json_quote(b, (struct orch_slice){ c->text.p, c->text.n });
    if (c->rpc_data.n) {
        orch_buf_str(b, ",\"data\":");
        orch_buf_slice(b, (struct orch_slice){ c->rpc_data.p, c->rpc_data.n });
    }
    orch_buf_char(b, '}');
}

static bool job_answer(struct orch_call_part *p, struct orch_call *c)
{
    struct orch_job *j = (struct orch_job *)p;
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf b = { 0 };
    (void)c;
    now_text(j->updated);
    put_end(j, &b);
    if (write_file(j, (struct orch_slice){ b.p, b.n }, &err) < 0)
        orch_log(ORCH_ERROR, "%s", err.msg);
    changed(j, (struct orch_slice){ b.p, b.n });
    return false;
}

static void job_free(struct orch_call_part *p)
{
    struct orch_job *j = (struct orch_job *)p;
    for (struct orch_job **at = &j->call->calls->jobs; *at; at = &(*at)->next)
        if (*at == j) {
            *at = j->next;
            break;
        }
    orch_timer_free(j->expiry);
    free(j);
}

static const struct orch_call_part_ops job_ops = {
    .answer = job_answer,
    .asked = job_asked,
    .free = job_free,
};

/* ---- tasks/get, tasks/update, tasks/cancel */

static bool id_ok(struct orch_slice id)
{
    for (size_t i = 0; i < id.n; i++)
        if (!strchr("0123456789abcdef", id.p[i]))
            return false;
    return id.n == 32;
}

static void refuse(struct orch_mcp_request *rq, const char *text)
{
    orch_mcp_respond_error(rq, ORCH_RPC_INVALID_PARAMS, orch_slice_str(text),
                           (struct orch_slice){ 0 });
}

/* The members of the task in its file, when it is this caller's. */
static bool read_kept(const struct orch_calls *cs, const char *caller, const char *id,
                      struct orch_buf *members)
{
    cleanup_free char *path = file_of(cs, id);
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    struct stat st;
    if (stat(path, &st) < 0 || st.st_mtime < time(NULL) - TTL_MS / 1000 ||
        orch_read_file(AT_FDCWD, path, FILE_MAX_BYTES, &text) < 0 ||
        orch_json_scan(&d, (struct orch_slice){ text.p, text.n },
                       &(struct orch_json_limits){ .bytes = FILE_MAX_BYTES, .depth = 256 },
                       &fault) < 0)
        return false;
    uint32_t owner = orch_json_get(&d, 0, "caller"), task = orch_json_get(&d, 0, "task"),
             pid = orch_json_get(&d, 0, "pid");
    uint32_t status = task ? orch_json_get(&d, task, "status") : 0;
    if (!owner || !status || !orch_json_string_eq(&d, owner, caller))
        return false;
    struct orch_slice raw = orch_json_raw(&d, task);
    bool running = orch_json_string_eq(&d, status, "working");
    uint32_t start = orch_json_get(&d, 0, "start");
    int64_t by = 0, since = 0;
    if (running && pid && start && orch_json_int(&d, pid, &by) &&
        orch_json_int(&d, start, &since) && by != getpid() && by > 0 && by < INT32_MAX &&
        orch_proc_started((int)by) == since)
        running = false; /* another orch of this user still works on it */
    if (!running) {
        orch_buf_add(members, raw.p + 1, raw.n - 2);
        return true;
    }
    uint32_t created = orch_json_get(&d, task, "createdAt");
    orch_buf_printf(members, "\"taskId\":\"%s\",\"status\":\"failed\",\"createdAt\":", id);
    orch_buf_slice(members, orch_json_raw(&d, created));
    orch_buf_str(members, ",\"lastUpdatedAt\":");
    orch_buf_slice(members, orch_json_raw(&d, created));
    orch_buf_printf(members,
                    ",\"ttlMs\":%d,\"pollIntervalMs\":%d,\"error\":{\"code\":%d,\"message\":\"orch "
                    "ended before the task was done\"}",
                    TTL_MS, POLL_MS, ORCH_RPC_INTERNAL_ERROR);
    return true;
}

void orch_job_request(struct orch_session *s, struct orch_mcp_request *rq,
                      const struct orch_json_doc *d, const char *method,
                      const struct orch_mcp_params *p)
{
    struct orch_calls *cs = s->calls;
    if (!(orch_mcp_request_caps(rq) & ORCH_MCP_CAP_TASKS)) {
        orch_mcp_respond_error(rq, ORCH_RPC_MISSING_CAPABILITY,
                               ORCH_SLICE("Missing required client capability"),
                               ORCH_SLICE("{\"requiredCapabilities\":{\"extensions\":{\"io."
                                          "modelcontextprotocol/tasks\":{}}}}"));
        return;
    }
    cleanup_free char *id = orch_xstrndup(p->name.p, p->name.n);
    struct orch_job *j = cs->jobs;
    while (j && (strcmp(j->id, id) != 0 || strcmp(j->call->session->caller, s->caller) != 0))
        j = j->next;
    cleanup_buf struct orch_buf b = { 0 };
    if (j)
        put_running(j, &b);
    else if (!id_ok(p->name) || !read_kept(cs, s->caller, id, &b)) {
        refuse(rq, "Unknown task");
        return;
    }
    if (strcmp(method, "tasks/get") == 0) {
        orch_mcp_respond(rq, (struct orch_slice){ b.p, b.n });
        return;
    }
    bool update = strcmp(method, "tasks/update") == 0;
    if (update && !p->inputs) {
        refuse(rq, "tasks/update: params.inputResponses must be an object");
        return;
    }
    orch_mcp_respond(rq, (struct orch_slice){ 0 });
    if (j && update)
        orch_call_take_answers(j->call, orch_json_raw(d, p->inputs));
    else if (j)
        orch_call_cancel(j->call, "the client cancelled the task");
}
