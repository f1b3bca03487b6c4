/* What a running orch tells other commands of its user. */
#include "host.h"

#include "../vm/vm.h"

#include <string.h>
#include <time.h>

static char *since(int64_t begun_us)
{
    char text[32];
    struct tm tm;
    time_t at = time(NULL) - (time_t)((orch_now_us() - begun_us) / 1000000);
    gmtime_r(&at, &tm);
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &tm);
    return orch_xstrdup(text);
}

/* What runs, for whom, since when. */
static void put_call(struct orch_json *j, const struct orch_call *c)
{
    cleanup_free char *at = since(c->begun_us);
    orch_json_set_str(j, "call", c->id);
    orch_json_set_str(j, "tool", c->tool ? c->tool->name : c->method);
    orch_json_set_str(j, "session", c->session->id);
    orch_json_set_str(j, "caller", c->session->caller);
    orch_json_set_str(j, "since", at);
    orch_json_set_num(j, "ms", (double)((orch_now_us() - c->begun_us) / 1000));
}

static struct orch_json *running_calls(struct orch *o)
{
    struct orch_json *list = orch_json_array();
    for (struct orch_call *c = o->calls.running; c; c = c->next) {
        struct orch_json *j = orch_json_object();
        put_call(j, c);
        orch_json_set_str(j, "vm", c->vm_id[0] ? c->vm_id : NULL);
        orch_json_add_take(list, j);
    }
    return list;
}

static void put_status(void *ud, const struct orch_json_doc *d, struct orch_buf *out)
{
    struct orch *o = ud;
    const struct orch_generation *g = o->current.gen;
    (void)d;
    struct orch_json *j = orch_json_object();
    unsigned sessions = 0, in_flight = 0;
    for (struct orch_session *s = o->calls.sessions; s; s = s->next) {
        sessions++;
        in_flight += s->mcp ? orch_mcp_session_in_flight(s->mcp) : 0;
    }
    orch_json_set_str(j, "version", ORCH_VERSION);
    orch_json_set_num(j, "pid", getpid());
    orch_json_set_str(j, "config", o->paths.config);
    orch_json_set_str(j, "generation", g ? g->hash : NULL);
    orch_json_set_num(j, "tools", g ? (double)g->n_tools : 0);
    orch_json_set_num(j, "reloads", (double)o->current.reloads);
    orch_json_set_str(j, "reload_error", o->current.error.n ? o->current.error.p : NULL);
    orch_json_set_str(j, "notes", g && g->notes.n ? g->notes.p : NULL);
    orch_json_set_num(j, "sessions", sessions);
    orch_json_set_num(j, "calls_in_flight", in_flight);
    orch_json_set_take(j, "running", running_calls(o));
    orch_json_set_str(j, "audit", o->calls.audit ? orch_audit_path(o->calls.audit) : NULL);
    orch_json_set_bool(j, "audit_broken", o->calls.audit && orch_audit_broken(o->calls.audit));
    orch_json_set_num(j, "uptime_s", (double)(orch_now_us() - o->started_us) / 1e6);
    orch_json_set_str(j, "upstream",
                      !o->serving.upstream ? NULL
                      : o->current.problem ? o->current.problem
                                           : "ready");
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

struct vm_list {
    struct orch *o;
    struct orch_json *list;
};

/* With the call that it serves, or when it was started. */
static void put_vm_of(void *ud, struct orch_vm *vm)
{
    struct vm_list *to = ud;
    struct orch_json *j = about_vm(vm);
    const char *id = orch_vm_call(vm);
    cleanup_free char *at = since(orch_vm_spawned_us(vm));
    for (struct orch_call *c = id ? to->o->calls.running : NULL; c; c = c->next)
        if (strcmp(c->id, id) == 0)
            put_call(j, c);
    orch_json_set_str(j, "since", at);
    orch_json_add_take(to->list, j);
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

static void answer_vms(void *ud, const struct orch_json_doc *d, struct orch_buf *out)
{
    struct vm_list to = { ud, orch_json_array() };
    (void)d;
    if (to.o->vms)
        orch_vms_each(to.o->vms, put_vm_of, &to);
    orch_json_print(to.list, false, out);
    orch_json_free(to.list);
}

static void answer_stats(void *ud, const struct orch_json_doc *d, struct orch_buf *out)
{
    struct orch *o = ud;
    struct orch_json *list = orch_json_array();
    (void)d;
    if (o->vms)
        orch_vms_each(o->vms, put_vm_stats, list);
    orch_json_print(list, false, out);
    orch_json_free(list);
}

static void reload(void *ud, const struct orch_json_doc *d, struct orch_buf *out)
{
    struct orch *o = ud;
    (void)d;
    if (orch_current_reload(&o->current, "orch reload") == 0) {
        orch_buf_printf(out, "{\"ok\":true,\"generation\":\"%s\"}", o->current.gen->hash);
        return;
    }
    orch_buf_str(out, "{\"ok\":false,\"error\":");
    orch_json_quote(out, (struct orch_slice){ o->current.error.p, o->current.error.n });
    orch_buf_char(out, '}');
}

const struct orch_control_verb orch_control_verbs[] = {
    { "status", false, put_status }, { "vms", false, answer_vms }, { "stats", false, answer_stats },
    { "reload", true, reload },      { NULL, false, NULL },
};
