/* A microVM waits for its template, starts a VMM that goes on from it, is ready when the guest
 * agent has answered RESTORE, and ends by orch_vm_free or by itself. Everything the user hears
 * comes from a turn of the loop of its own, so that he may free anything from there. */
#include "vm.h"

#include "../base/json.h"
#include "../base/log.h"
#include "../base/proc.h"
#include "../guest/wire.h"
#include "../net/hostaddr.h"
#include "../net/netns.h"
#include "rundir.h"
#include "template.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define CLONE_MS 60000
#define EXIT_GRACE_MS 5000 /* from the agent stream's end to the VMM's exit */
#define MEMORY_DEFAULT (256ULL << 20)
#define MEMORY_MIN (64ULL << 20)
#define MEMORY_MAX (4ULL << 30)
#define MAX_PHASES 8

enum state {
    WAITING,  /* for its template */
    STARTING, /* a VMM runs */
    READY,
    ENDING, /* why is known, the VMM is gone; the channel still delivers what the guest said */
    ENDED,  /* failed or lost was told, or is about to be */
};

struct orch_vms {
    struct orch_loop *loop;
    struct orch_vms_opts o;
    char *launcher_path, *runtime_dir;
    const struct orch_vmm_backend *backend;
    struct orch_vmm_host *host;
    struct orch_templates *templates;
    struct orch_launcher *launcher; /* from the first start on */
    struct orch_vm *vms;
    int n;
    struct orch_hostaddr *hostaddr; /* o's, or its own */
};

struct orch_vm {
    struct orch_vms *m;
    struct orch_vm *next, **link;
    struct orch_vm_opts o; /* its strings are not kept, but these: */
    char *image, *name, *call, *network;
    char id[16];
    enum state state;
    enum orch_isolation isolation;
    struct orch_template_want want;
    struct orch_template_wait *wait;
    struct orch_netns *netns; /* o.rules: until the VMM is gone */
    bool netns_kvm, uplink;
    struct orch_rundir *rundir;
    struct orch_vmm *vmm;
    struct orch_channel *channel;
    int agent_fd; /* the channel's */
    bool mute;    /* the agent's stream has ended */
    bool waits;   /* for its template, as was told */
    struct orch_timer *deadline, *life;
    int64_t spawned_us, started_us;
    struct orch_vm_phase phases[MAX_PHASES + 1];
    int n_phases;
    struct orch_err err; /* why it ended */
    const char *reason;  /* the same, for the audit log; NULL: not decided */
    int status;          /* of the VMM as wait(2), or -1 */
};

/* The agent includes no header of core/net. */
_Static_assert(ORCH_WIRE_NET_ADDR == ORCH_NET_GUEST && ORCH_WIRE_NET_GATEWAY == ORCH_NET_GATEWAY &&
                   ORCH_WIRE_NET_BITS == ORCH_NET_BITS,
               "the guest's addresses");

static void stream_timeout(void *ud);

const char *orch_isolation_name(enum orch_isolation i)
{
    static const char *const names[] = { "none", "hardware", "emulated" };
    return names[i];
}

static double ms_since(int64_t us)
{
    return (double)(orch_now_us() - us) / 1000;
}

/* ---- events */

static void add_string(struct orch_buf *b, const char *key, const char *value)
{
    orch_buf_printf(b, "%s\"%s\":", b->n ? "," : "", key);
    if (value)
        orch_json_quote(b, orch_slice_str(value));
    else
        orch_buf_str(b, "null");
}

static void emit(struct orch_vm *vm, const char *event, const struct orch_buf *fields)
{
    if (vm->m->o.event)
        vm->m->o.event(vm->m->o.ud, event, (struct orch_slice){ fields->p, fields->n });
    cleanup_free char *object = orch_xasprintf("{%s}", fields->p);
    orch_log_fields(ORCH_INFO, orch_slice_str(event), orch_slice_str(object));
}

static void add_ms(struct orch_buf *f, double ms)
{
    orch_buf_str(f, ",\"ms\":");
    orch_json_put_number(f, round(ms * 10) / 10);
}

static void emit_spawn(struct orch_vm *vm)
{
    cleanup_buf struct orch_buf f = { 0 };
    add_string(&f, "vm", vm->id);
    add_string(&f, "image", vm->image);
    add_string(&f, "backend", vm->m->backend->name);
    add_string(&f, "isolation", orch_isolation_name(vm->isolation));
    if (vm->call)
        add_string(&f, "call", vm->call);
    add_ms(&f, orch_vm_spawn_ms(vm));
    emit(vm, "vm_spawn", &f);
}

/* Once for each microVM whose VMM was started. */
static void emit_exit(struct orch_vm *vm)
{
    cleanup_buf struct orch_buf f = { 0 };
    char how[64];
    if (!vm->started_us)
        return;
    if (vm->status >= 0)
        orch_proc_describe(vm->status, how, sizeof how);
    add_string(&f, "vm", vm->id);
    add_string(&f, "reason", vm->reason);
    add_string(&f, "status", vm->status >= 0 ? how : NULL);
    add_ms(&f, ms_since(vm->started_us));
    emit(vm, "vm_exit", &f);
    vm->started_us = 0;
}

static const char *proto_name(const struct orch_denied *d)
{
    if (!d->has_ip)
        return d->type == ETHERTYPE_ARP ? "arp" : NULL;
    switch (d->proto) {
    case IPPROTO_TCP:
        return "tcp";
    case IPPROTO_UDP:
        return "udp";
    case IPPROTO_ICMP:
        return "icmp";
    default:
        return NULL;
    }
}

static void emit_deny(void *ud, const char *rule, const struct orch_denied *d)
{
    struct orch_vm *vm = ud;
    cleanup_buf struct orch_buf f = { 0 };
    char dst[ORCH_CIDR_TEXT], number[16];
    const char *proto = proto_name(d);
    add_string(&f, "vm", vm->id);
    if (vm->call)
        add_string(&f, "call", vm->call);
    add_string(&f, "rule", rule);
    orch_cidr_text((struct orch_cidr){ d->dst, 32 }, dst);
    if (d->has_ip)
        add_string(&f, "dst", dst);
    snprintf(number, sizeof number, d->has_ip ? "%u" : "0x%04x", d->has_ip ? d->proto : d->type);
    add_string(&f, "proto", proto ? proto : number); /* of IP, or what the frame says it is */
    if (d->has_port)
        orch_buf_printf(&f, ",\"port\":%u", d->port);
    if (d->missed)
        orch_buf_printf(&f, ",\"missed\":%u", d->missed);
    emit(vm, "net_deny", &f);
}

static void phase(struct orch_vm *vm, const char *name)
{
    if (vm->n_phases < MAX_PHASES)
        vm->phases[vm->n_phases++] = (struct orch_vm_phase){ name, ms_since(vm->spawned_us) };
}

static bool passed(const struct orch_vm *vm, const char *name)
{
    for (int i = 0; i < vm->n_phases; i++)
        if (strcmp(vm->phases[i].name, name) == 0)
            return true;
    return false;
}

/* ---- the end */

static void timer_drop(struct orch_timer **t)
{
    orch_timer_free(*t);
    *t = NULL;
}

static void free_vmm(struct orch_vm *vm)
{
    vm->m->backend->free(vm->vmm);
    vm->vmm = NULL;
    orch_netns_free(vm->netns);
    vm->netns = NULL;
    vm->uplink = false;
}

static void free_channel(struct orch_vm *vm)
{
    orch_channel_free(vm->channel);
    vm->channel = NULL;
    vm->mute = false;
}

/* All that a microVM holds of the system but its channel; what is left answers questions. */
static void release(struct orch_vm *vm)
{
    orch_template_cancel(vm->wait);
    vm->wait = NULL;
    timer_drop(&vm->deadline);
    timer_drop(&vm->life);
    free_vmm(vm);
}

static void tell_failed(void *ud)
{
    struct orch_vm *vm = ud;
    vm->o.ready(vm->o.ud, vm, &vm->err);
}

static void tell_lost(void *ud)
{
    struct orch_vm *vm = ud;
    free_channel(vm);
    if (vm->o.lost)
        vm->o.lost(vm->o.ud, vm, &vm->err);
}

static void tell_ready(void *ud)
{
    struct orch_vm *vm = ud;
    vm->o.ready(vm->o.ud, vm, NULL);
}

static void uncount(struct orch_vm *vm)
{
    if (vm->state != ENDED)
        vm->m->n--;
    vm->state = ENDED;
}

static void set_reason(struct orch_vm *vm, const char *reason, const struct orch_err *err)
{
    if (vm->reason)
        return;
    vm->reason = reason;
    vm->err = *err;
}

/* It never became ready. */
static void failed(struct orch_vm *vm, const char *reason, const struct orch_err *err)
{
    set_reason(vm, reason, err);
    if (vm->started_us && vm->rundir) {
        orch_err_wrap(&vm->err, "microVM %s (image %s, %s): start failed %s", vm->id, vm->image,
                      orch_isolation_name(vm->isolation),
                      passed(vm, "state") ? "waiting for the guest agent"
                      : passed(vm, "vmm") ? "loading the template's state"
                                          : "starting the VMM");
        if (vm->err.cls != ORCH_CLASS_ISOLATION) /* that class: nothing ran, so it wrote nothing */
            orch_rundir_explain(vm->rundir, &vm->err);
    } else if (strcmp(reason, "template") != 0) { /* whose error names that */
        orch_err_wrap(&vm->err, "microVM %s", vm->id);
    }
    release(vm);
    free_channel(vm);
    emit_exit(vm);
    orch_rundir_free(vm->rundir);
    vm->rundir = NULL;
    uncount(vm);
    orch_loop_post(vm->m->loop, tell_failed, vm);
}

/* What is under way in it is told first, with the same error; both in turns of their own. */
static void lost(struct orch_vm *vm)
{
    release(vm);
    emit_exit(vm);
    uncount(vm);
    orch_channel_end(vm->channel, &vm->err);
    orch_loop_post(vm->m->loop, tell_lost, vm);
}

/* Ends a ready microVM in two steps: the VMM goes and the agent's stream is cut, which makes the
 * channel deliver what it still has and call agent_failed; then it is lost. From now on it has one
 * error, whoever asks: something ran, so it is never of class ISOLATION. */
static void end(struct orch_vm *vm, const char *reason, const struct orch_err *err)
{
    set_reason(vm, reason, err);
    vm->state = ENDING;
    if (vm->err.cls != ORCH_CLASS_TIMEOUT)
        vm->err.cls = ORCH_CLASS_CLOSED;
    orch_err_wrap(&vm->err, "microVM %s", vm->id);
    timer_drop(&vm->life);
    free_vmm(vm);
    if (vm->mute) {
        lost(vm);
        return;
    }
    orch_channel_pause(vm->channel, false);
    shutdown(vm->agent_fd, SHUT_RDWR);
}

static void fail_or_end(struct orch_vm *vm, const char *reason, const struct orch_err *err)
{
    if (vm->state == READY)
        end(vm, reason, err);
    else if (vm->state == WAITING || vm->state == STARTING)
        failed(vm, reason, err);
}

/* ---- the VMM's and the agent's voices */

static void vmm_phase(void *ud, const char *name)
{
    struct orch_vm *vm = ud;
    phase(vm, name);
    /* The guest runs from now: the time it is told is right by some milliseconds. */
    if (strcmp(name, "state") == 0) {
        uint8_t epoch[16];
        orch_random(epoch, sizeof epoch);
        orch_channel_restore(vm->channel, epoch);
    }
}

static void vmm_frozen(void *ud)
{
    (void)ud; /* a clone is never told to freeze */
}

static void vmm_ended(void *ud, const struct orch_err *err, int status)
{
    struct orch_vm *vm = ud;
    const char *reason = status >= 0 || err->cls != ORCH_CLASS_ISOLATION ? "vmm"
                         : err->code == ENETDOWN                         ? "network"
                                                                         : "launcher";
    vm->status = status;
    fail_or_end(vm, reason, err);
}

static void agent_hello(void *ud, const uint8_t epoch[16])
{
    (void)epoch; /* the channel has compared it */
    struct orch_vm *vm = ud;
    if (vm->state != STARTING)
        return;
    vm->state = READY;
    timer_drop(&vm->deadline);
    orch_rundir_log_handed_over(vm->rundir);
    phase(vm, "ready");
    emit_spawn(vm);
    orch_loop_post(vm->m->loop, tell_ready, vm);
}

static void agent_failed(void *ud, const struct orch_err *err)
{
    struct orch_vm *vm = ud;
    struct orch_err why = *err; /* the channel's, which may go */
    vm->mute = true;
    if (vm->state == ENDING) {
        lost(vm);
    } else if (why.cls != ORCH_CLASS_CLOSED) {
        fail_or_end(vm, "protocol", &why);
    } else {
        /* The stream's end is mostly the VMM's end, whose status says more: awaited shortly. What
         * is started until then ends as what is under way. */
        vm->err = why;
        timer_drop(&vm->deadline);
        vm->deadline = orch_timer_new(vm->m->loop, stream_timeout, vm);
        orch_timer_set(vm->deadline, EXIT_GRACE_MS);
    }
}

static void stream_timeout(void *ud)
{
    struct orch_vm *vm = ud;
    struct orch_err err = vm->err;
    fail_or_end(vm, "agent", &err);
}

static void clone_timeout(void *ud)
{
    struct orch_vm *vm = ud;
    struct orch_err err;
    orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, "no answer within %.1f s",
                  (double)(vm->m->o.clone_ms ? vm->m->o.clone_ms : CLONE_MS) / 1000);
    failed(vm, "start", &err);
}

static void life_over(void *ud)
{
    struct orch_vm *vm = ud;
    struct orch_err err;
    orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, ORCH_VM_TIME_OVER,
                  (double)vm->o.timeout_ms / 1000,
                  vm->o.timeout_name ? vm->o.timeout_name : "timeout");
    fail_or_end(vm, "timeout", &err);
}

void orch_vm_end(struct orch_vm *vm, const struct orch_err *why)
{
    fail_or_end(vm, why->cls == ORCH_CLASS_TIMEOUT ? "timeout" : "closed", why);
}

/* ---- start */

static void launcher_lost(void *ud, const char *why)
{
    (void)ud; /* every cell was failed before; the next start makes another */
    orch_log(ORCH_WARN, "launcher: %s", why);
}

static struct orch_launcher *get_launcher(void *ud, struct orch_err *err)
{
    struct orch_vms *m = ud;
    if (!m->launcher)
        m->launcher = orch_launcher_new(m->loop, m->launcher_path, launcher_lost, m, err);
    return m->launcher;
}

static int start_vmm(struct orch_vm *vm, const struct orch_template *t, struct orch_err *err)
{
    struct orch_vms *m = vm->m;
    struct orch_vmm_cb cb = { vmm_phase, vmm_frozen, vmm_ended, vm };
    struct orch_channel_cb agent_cb = { agent_hello, agent_failed, vm };
    struct orch_launcher *la = get_launcher(m, err);
    if (!la)
        return -1;
    cleanup_close int state_fd = orch_template_open_state(t, err);
    if (state_fd < 0)
        return -1;
    struct orch_vmm_spec spec = {
        .image = &t->image,
        .kvm = t->kvm,
        .clone = true,
        .hold = !t->loaded,
        .memory_bytes = t->memory_bytes,
        .vcpus = t->vcpus,
        .log_fd = orch_rundir_log_fd(vm->rundir),
        .mem_fd = t->mem_fd,
        .disk_fd = t->disk_fd,
        .state_fd = state_fd,
        .network = t->network,
        .netns = vm->netns,
    };
    vm->vmm = m->backend->start(m->host, la, &spec, &cb, &vm->agent_fd, err);
    if (!vm->vmm)
        return -1;
    vm->channel = orch_channel_new(m->loop, vm->agent_fd, &agent_cb);
    vm->started_us = orch_now_us();
    return 0;
}

static void tell_waits(struct orch_vm *vm, bool waits)
{
    if (vm->o.waits && vm->waits != waits)
        vm->o.waits(vm->o.ud, waits);
    vm->waits = waits;
}

static void back_to_waiting(struct orch_vm *vm)
{
    timer_drop(&vm->deadline);
    free_channel(vm);
    free_vmm(vm);
    vm->n_phases = 0;
    memset(vm->phases, 0, sizeof vm->phases);
    vm->state = WAITING;
    tell_waits(vm, true);
}

/* ---- network */

static void template_there(void *ud, const struct orch_template *t, const struct orch_err *err);

static void net_ready(void *ud)
{
    phase(ud, "filter");
}

/* Not before is there a VMM: a network that fails is one that no VMM ever saw. The template is
 * asked for once more, since what was told of it held for that turn alone. */
static void net_up(void *ud)
{
    struct orch_vm *vm = ud;
    vm->uplink = true;
    phase(vm, "uplink");
    orch_template_cancel(vm->wait);
    vm->wait = orch_template_want(vm->m->templates, &vm->want, template_there, vm);
}

static void net_failed(void *ud, const struct orch_err *err)
{
    struct orch_err why = *err;
    fail_or_end(ud, "network", &why);
}

/* 1: its filter, made or yet to be, was another one before. On failure it must end. */
static int follow_host(struct orch_vm *vm, struct orch_err *err)
{
    struct orch_rules *before = vm->o.rules;
    const struct orch_cidr *host;
    size_t n;
    int known = orch_hostaddr_get(vm->m->hostaddr, &host, &n, err);
    if (known < 0)
        return known;
    if (orch_rules_has_host(before, host, n))
        return 0;
    struct orch_rules *now = orch_rules_rehost(before, host, n, err);
    if (!now)
        return -E2BIG;
    vm->o.rules = now;
    int r = vm->netns ? orch_netns_rehost(vm->netns, now, err) : 0;
    orch_rules_free(before);
    return r < 0 ? r : 1;
}

static void cannot_follow(struct orch_vm *vm, struct orch_err *err)
{
    err->cls = ORCH_CLASS_ISOLATION;
    orch_err_wrap(err, "the packet filter could not follow the host's addresses");
    fail_or_end(vm, "network", err);
}

/* An address may have become the host's that a guest may reach: none may from now on. */
static void host_changed(void *ud, const struct orch_err *unread)
{
    struct orch_vms *m = ud;
    int n = 0;
    for (struct orch_vm *vm = m->vms; vm; vm = vm->next) {
        if (!vm->o.rules || vm->state == ENDED)
            continue;
        struct orch_err why = { 0 };
        if (unread)
            why = *unread;
        int r = unread ? -EIO : follow_host(vm, &why);
        n += r > 0;
        if (r < 0)
            cannot_follow(vm, &why);
    }
    if (n)
        orch_log(ORCH_INFO,
                 "network: the host's addresses changed; the filters of %d microVMs follow", n);
}

static int start_net(struct orch_vm *vm, bool kvm, struct orch_err *err)
{
    struct orch_launcher *la = get_launcher(vm->m, err);
    orch_netns_free(vm->netns); /* of a template that is gone */
    vm->netns = NULL;
    vm->uplink = false;
    vm->netns_kvm = kvm;
    if (la)
        vm->netns = orch_netns_new(vm->m->loop, la,
                                   &(struct orch_netns_opts){ .rules = vm->o.rules,
                                                              .uplink = true,
                                                              .kvm = kvm,
                                                              .ready = net_ready,
                                                              .uplink_up = net_up,
                                                              .failed = net_failed,
                                                              .denied = emit_deny,
                                                              .ud = vm },
                                   err);
    return vm->netns ? 0 : -1;
}

/* Comes twice when the template is being read from disk: QEMU starts while its memory is filled. */
static void template_there(void *ud, const struct orch_template *t, const struct orch_err *err)
{
    struct orch_vm *vm = ud;
    struct orch_vms *m = vm->m;
    struct orch_err why;
    if (!t && !err) {
        back_to_waiting(vm);
        return;
    }
    if (err || t->loaded)
        vm->wait = NULL;
    if (err) {
        failed(vm, "template", err);
        return;
    }
    tell_waits(vm, false);
    vm->isolation = t->kvm ? ORCH_ISOLATION_HARDWARE : ORCH_ISOLATION_EMULATED;
    if (t->loaded && !passed(vm, "template"))
        phase(vm, "template");
    if (vm->o.rules && (!vm->netns || vm->netns_kvm != t->kvm)) {
        if (start_net(vm, t->kvm, &why) < 0)
            failed(vm, "network", &why);
        return;
    }
    if (vm->netns && !vm->uplink)
        return;
    if (vm->vmm) {
        m->backend->go(vm->vmm);
    } else if (start_vmm(vm, t, &why) < 0) {
        failed(vm, "start", &why);
        return;
    }
    vm->state = STARTING;
    if (!vm->deadline)
        vm->deadline = orch_timer_new(m->loop, clone_timeout, vm);
    orch_timer_set(vm->deadline, m->o.clone_ms ? m->o.clone_ms : CLONE_MS);
    if (vm->o.timeout_ms && !vm->life) {
        vm->life = orch_timer_new(m->loop, life_over, vm);
        orch_timer_set(vm->life, vm->o.timeout_ms);
    }
}

static int parse_accel(const char *s, enum orch_accel *out, struct orch_err *err)
{
    static const char *const names[] = { "auto", "kvm", "tcg", NULL };
    for (int i = 0; names[i]; i++)
        if (!s || strcmp(s, names[i]) == 0) {
            *out = (enum orch_accel)i;
            return 0;
        }
    const char *near = orch_nearest(s, names);
    return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                         "accel: \"%s\" is not known; auto, kvm or tcg%s%s%s", s,
                         near ? " (did you mean " : "", near ? near : "", near ? "?)" : "");
}

static int check_opts(struct orch_vms *m, const struct orch_vm_opts *o,
                      struct orch_template_want *w, struct orch_err *err)
{
    if (o->backend && strcmp(o->backend, "auto") != 0 && strcmp(o->backend, m->backend->name) != 0)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, ENOTSUP,
                             "backend: \"%s\" is not available; qemu is", o->backend);
    if ((o->network && strcmp(o->network, "none") != 0) != (o->rules != NULL))
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "network: a policy's name comes with its filter, \"none\" without");
    *w = (struct orch_template_want){
        .image = o->image ? o->image : "base",
        .network = o->rules != NULL,
        .memory_bytes = o->memory_bytes ? o->memory_bytes : MEMORY_DEFAULT,
        .vcpus = o->vcpus ? o->vcpus : 1,
    };
    if (parse_accel(o->accel, &w->accel, err) < 0)
        return -EINVAL;
    if (w->memory_bytes < MEMORY_MIN || w->memory_bytes > MEMORY_MAX || w->memory_bytes % (1 << 20))
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "memory: %llu bytes; 64M to 4G in whole MiB are possible",
                             (unsigned long long)w->memory_bytes);
    if (w->vcpus < 1 || w->vcpus > 8)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "vcpus: %d; 1 to 8 are possible",
                             w->vcpus);
    if (o->timeout_ms < 0)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "timeout: negative");
    if (m->n >= m->o.max)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN,
                             "%d microVMs run already, the limit (vm.max) is %d", m->n, m->o.max);
    return 0;
}

struct orch_vm *orch_vm_spawn(struct orch_vms *m, const struct orch_vm_opts *o,
                              struct orch_err *err)
{
    struct orch_template_want want;
    struct orch_err why;
    if (check_opts(m, o, &want, err) < 0) {
        orch_rules_free(o->rules);
        return NULL;
    }
    struct orch_vm *vm = orch_xcalloc(1, sizeof *vm);
    vm->m = m;
    vm->o = *o;
    vm->image = orch_xstrdup(want.image);
    vm->want = want;
    vm->want.image = vm->image;
    vm->name = orch_xstrdup(o->name);
    vm->call = orch_xstrdup(o->call);
    vm->network = orch_xstrdup(o->rules ? o->network : "none");
    vm->status = -1;
    vm->agent_fd = -1;
    vm->waits = true;
    vm->spawned_us = orch_now_us();
    vm->next = m->vms;
    vm->link = &m->vms;
    if (vm->next)
        vm->next->link = &vm->next;
    m->vms = vm;
    m->n++;
    vm->rundir = orch_rundir_new(m->loop, m->runtime_dir, "vm", &why);
    if (!vm->rundir) {
        uint32_t n = 0;
        orch_random(&n, sizeof n);
        snprintf(vm->id, sizeof vm->id, "vm-%08x", n);
        failed(vm, "start", &why);
        return vm;
    }
    snprintf(vm->id, sizeof vm->id, "%s", orch_rundir_id(vm->rundir));
    if (o->rules && follow_host(vm, &why) < 0)
        cannot_follow(vm, &why);
    else
        vm->wait = orch_template_want(m->templates, &vm->want, template_there, vm);
    return vm;
}

void orch_vm_free(struct orch_vm *vm)
{
    if (!vm)
        return;
    if (!vm->reason)
        vm->reason = "closed";
    release(vm);
    free_channel(vm);
    emit_exit(vm);
    uncount(vm);
    orch_loop_unpost(vm->m->loop, tell_ready, vm);
    orch_loop_unpost(vm->m->loop, tell_failed, vm);
    orch_loop_unpost(vm->m->loop, tell_lost, vm);
    orch_rundir_free(vm->rundir);
    *vm->link = vm->next;
    if (vm->next)
        vm->next->link = vm->link;
    free(vm->image);
    free(vm->name);
    free(vm->call);
    free(vm->network);
    orch_rules_free(vm->o.rules);
    free(vm);
}

/* ---- answers */

const char *orch_vm_id(const struct orch_vm *vm)
{
    return vm->id;
}

const char *orch_vm_name(const struct orch_vm *vm)
{
    return vm->name;
}

const char *orch_vm_call(const struct orch_vm *vm)
{
    return vm->call;
}

int64_t orch_vm_spawned_us(const struct orch_vm *vm)
{
    return vm->spawned_us;
}

const char *orch_vm_backend(const struct orch_vm *vm)
{
    return vm->m->backend->name;
}

const char *orch_vm_image(const struct orch_vm *vm)
{
    return vm->image;
}

enum orch_isolation orch_vm_isolation(const struct orch_vm *vm)
{
    return vm->isolation;
}

double orch_vm_spawn_ms(const struct orch_vm *vm)
{
    return vm->n_phases ? vm->phases[vm->n_phases - 1].ms : 0;
}

const struct orch_vm_phase *orch_vm_phases(const struct orch_vm *vm)
{
    return vm->phases;
}

struct orch_channel *orch_vm_channel(struct orch_vm *vm, struct orch_err *err)
{
    if (vm->state == READY)
        return vm->channel;
    if (vm->state == WAITING || vm->state == STARTING)
        orch_err_setc(err, ORCH_CLASS_USAGE, EBUSY, "microVM %s: it is not ready yet", vm->id);
    else
        *err = vm->err;
    return NULL;
}

struct orch_slice orch_vm_log_tail(const struct orch_vm *vm)
{
    return vm->rundir ? orch_rundir_tail(vm->rundir) : ORCH_SLICE("");
}

bool orch_vm_no_aslr(const struct orch_vm *vm)
{
    return vm->isolation == ORCH_ISOLATION_EMULATED;
}

const char *orch_vm_network(const struct orch_vm *vm)
{
    return vm->network;
}

int orch_vm_counters(struct orch_vm *vm,
                     void (*fn)(void *ud, const char *label, uint64_t packets, uint64_t bytes),
                     void *ud, struct orch_err *err)
{
    return vm->netns ? orch_nft_counters(orch_netns_nft(vm->netns), fn, ud, err) : 0;
}

/* Of a process that may have ended meanwhile: then 0. */
static uint64_t pss_bytes(int pid)
{
    char path[48];
    cleanup_buf struct orch_buf text = { 0 };
    snprintf(path, sizeof path, "/proc/%d/smaps_rollup", pid);
    if (pid <= 0 || orch_read_file(AT_FDCWD, path, 65536, &text) < 0)
        return 0;
    const char *line = strstr(text.p, "\nPss:");
    return line ? strtoull(line + 5, NULL, 10) * 1024 : 0;
}

int orch_vm_usage(struct orch_vm *vm, struct orch_vm_usage *out, struct orch_err *err)
{
    char path[64];
    int pids[2] = { 0 };
    cleanup_buf struct orch_buf text = { 0 };
    struct orch_cell *cell = vm->vmm ? vm->m->backend->cell(vm->vmm) : NULL;
    int init = cell ? orch_cell_init(cell) : 0;
    *out = (struct orch_vm_usage){ 0 };
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", init, init);
    int r = init ? orch_read_file(AT_FDCWD, path, 4096, &text) : -ESRCH;
    if (r < 0 && r != -ESRCH && r != -ENOENT)
        return orch_err_set(err, -r, "memory of microVM %s: %s: %s", vm->id, path, strerror(-r));
    /* In the order in which they were started. */
    int n = r < 0 ? 0 : sscanf(text.p, "%d %d", &pids[0], &pids[1]);
    out->vmm_bytes = n > 0 ? pss_bytes(pids[n - 1]) : 0;
    out->uplink_bytes = n > 1 ? pss_bytes(pids[0]) : 0;
    return vm->netns ? orch_nft_connections(orch_netns_nft(vm->netns), &out->connections, err) : 0;
}

/* ---- the manager */

struct orch_vms *orch_vms_new(struct orch_loop *l, const struct orch_vms_opts *o,
                              struct orch_err *err)
{
    int r = orch_mkdir_p(o->cache_dir, 0700);
    if (r < 0) {
        orch_err_set(err, -r, "cache directory %s: cannot be made: %s", o->cache_dir, strerror(-r));
        return NULL;
    }
    if (orch_rundir_open(o->runtime_dir, err) < 0)
        return NULL;
    struct orch_vms *m = orch_xcalloc(1, sizeof *m);
    m->loop = l;
    m->o = *o;
    m->launcher_path = orch_xstrdup(o->launcher_path);
    m->runtime_dir = orch_xstrdup(o->runtime_dir);
    m->hostaddr = o->hostaddr ? o->hostaddr : orch_hostaddr_new(l);
    orch_hostaddr_follow(m->hostaddr, host_changed, m);
    m->backend = &orch_vmm_qemu;
    m->host = m->backend->host_new(l, o->cache_dir, o->qemu);
    struct orch_templates_opts t = {
        .loop = l,
        .backend = m->backend,
        .host = m->host,
        .cache_dir = o->cache_dir,
        .runtime_dir = o->runtime_dir,
        .agent_path = o->agent_path,
        .kernel = o->kernel,
        .modules = o->modules,
        .boot_ms = o->boot_ms,
        .launcher = get_launcher,
        .launcher_ud = m,
        .progress = o->progress,
        .progress_ud = o->ud,
    };
    m->templates = orch_templates_new(&t);
    return m;
}

void orch_vms_free(struct orch_vms *m)
{
    if (!m)
        return;
    while (m->vms)
        orch_vm_free(m->vms);
    orch_templates_free(m->templates);
    m->backend->host_free(m->host);
    orch_launcher_free(m->launcher);
    orch_hostaddr_follow(m->hostaddr, NULL, NULL);
    if (!m->o.hostaddr)
        orch_hostaddr_free(m->hostaddr);
    free(m->launcher_path);
    free(m->runtime_dir);
    free(m);
}

void orch_vms_each(struct orch_vms *m, void (*fn)(void *ud, struct orch_vm *vm), void *ud)
{
    for (struct orch_vm *vm = m->vms, *next; vm; vm = next) {
        next = vm->next;
        if (vm->state != ENDED)
            fn(ud, vm);
    }
}

enum orch_isolation orch_known_isolation(struct orch_loop *l, const struct orch_vms_opts *o,
                                         struct orch_buf *why)
{
    struct orch_vmm_host *host = orch_vmm_qemu.host_new(l, o->cache_dir, o->qemu);
    struct orch_templates *ts = orch_templates_new(
        &(struct orch_templates_opts){ .loop = l,
                                       .backend = &orch_vmm_qemu,
                                       .host = host,
                                       .cache_dir = o->cache_dir,
                                       .runtime_dir = o->runtime_dir,
                                       .agent_path = o->agent_path });
    enum orch_isolation i = orch_templates_known(ts, why);
    orch_templates_free(ts);
    orch_vmm_qemu.host_free(host);
    return i;
}
