#include "boot.h"

#include "channel.h"
#include "rundir.h"

#include <errno.h>
#include <string.h>

/* Ends for a machine that is slow and busy: a boot takes 2 s elsewhere. */
#define BOOT_TCG_MS 180000
#define BOOT_KVM_MS 30000 /* shorter: where KVM only pretends, guests hang */
#define FREEZE_MS 60000
#define WARM_MS 60000
#define WARM_SCRIPT \
    "/etc/orch/warm" /* of a disk: what is run once before the freeze; lua/recipe.lua writes it */
#define EXIT_GRACE_MS 5000 /* from the agent stream's end to the VMM's exit */

struct orch_boot {
    struct orch_boot_opts o;
    struct orch_frozen frozen;
    struct orch_rundir *rundir;
    struct orch_rules *rules; /* nothing passes, and there is no uplink */
    struct orch_netns *netns;
    struct orch_vmm *vmm;
    struct orch_channel *channel;
    struct orch_timer *timer;
    const char *phase;
    struct orch_err stream_err; /* the agent's stream ended, the VMM's exit is awaited */
    int64_t start;
};

/* All but what is frozen. */
static void release(struct orch_boot *b)
{
    orch_channel_free(b->channel);
    b->o.backend->free(b->vmm);
    orch_netns_free(b->netns);
    orch_rules_free(b->rules);
    orch_rundir_free(b->rundir);
    orch_timer_free(b->timer);
    b->channel = NULL;
    b->vmm = NULL;
    b->netns = NULL;
    b->rules = NULL;
    b->rundir = NULL;
    b->timer = NULL;
}

void orch_boot_free(struct orch_boot *b)
{
    if (!b)
        return;
    release(b);
    orch_frozen_fini(&b->frozen);
    free(b);
}

static void explain(const struct orch_boot *b, struct orch_err *err)
{
    const struct orch_vmm_spec *spec = &b->o.spec;
    orch_err_wrap(err, "template of image %s (%s, %llu MiB): %s", spec->image->name,
                  spec->kvm ? "KVM" : "emulated", (unsigned long long)(spec->memory_bytes >> 20),
                  b->phase);
    if (b->rundir && err->cls != ORCH_CLASS_ISOLATION) /* that class: nothing ran, nor wrote */
        orch_rundir_explain(b->rundir, err);
}

static void failed(struct orch_boot *b, const struct orch_err *why)
{
    struct orch_err err = *why;
    explain(b, &err);
    b->o.done(b->o.ud, NULL, &err);
}

static void timeout(void *ud)
{
    struct orch_boot *b = ud;
    struct orch_err err;
    if (b->stream_err.code) {
        err = b->stream_err;
    } else {
        orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, "%s within %.1f s",
                      strcmp(b->phase, "booting") == 0 ? "the guest agent did not answer"
                                                       : "not done",
                      (double)(orch_loop_now_ms(b->o.loop) - b->start) / 1000);
    }
    failed(b, &err);
}

static void vmm_phase(void *ud, const char *name)
{
    (void)ud;
    (void)name;
}

static void vmm_ended(void *ud, const struct orch_err *err, int status)
{
    (void)status;
    failed(ud, err);
}

static void vmm_frozen(void *ud)
{
    struct orch_boot *b = ud;
    struct orch_err err;
    release(b);
    b->frozen.tsc_khz = b->o.spec.tsc_khz;
    if (orch_frozen_seal(&b->frozen, &err) < 0) {
        failed(b, &err);
        return;
    }
    struct orch_frozen f = b->frozen;
    b->frozen = ORCH_FROZEN_NONE;
    b->o.done(b->o.ud, &f, NULL);
}

static void freeze(struct orch_boot *b)
{
    b->phase = "freezing";
    orch_timer_set(b->timer, FREEZE_MS);
    b->o.backend->freeze(b->vmm, b->frozen.state_fd);
}

/* The agent makes an exec's cgroup and reads the user list at the first exec; clones find both
 * done. A disk says itself what its programs are: what they read of it is in the template's memory
 * then, unpacked. */
static void warmed(void *ud, const struct orch_exec_result *r, const struct orch_err *err)
{
    (void)err;
    struct orch_boot *b = ud;
    struct orch_err why;
    if (r && r->fail == 0 && r->status == 0) {
        freeze(b);
    } else if (r) {
        orch_err_set(&why, r->sys_errno, "the warming up in the guest: %s",
                     r->fail ? strerror(r->sys_errno) : "failed");
        failed(b, &why);
    } /* else the stream ended, and agent_failed follows */
}

static void agent_hello(void *ud, const uint8_t epoch[16])
{
    (void)epoch;
    struct orch_boot *b = ud;
    static const char *const plain[] = { "true", NULL }, *const disk[] = { "sh", WARM_SCRIPT,
                                                                           NULL };
    struct orch_exec_opts o = {
        .argv = b->o.spec.image->disk ? disk : plain, .timeout_ms = WARM_MS, .done = warmed, .ud = b
    };
    struct orch_err err;
    if (strcmp(b->phase, "booting") != 0)
        return;
    b->phase = "warming";
    if (!orch_exec_start(b->channel, &o, &err))
        failed(b, &err);
}

/* A VMM that ended closes the stream too, and its exit tells more: that is awaited shortly. */
static void agent_failed(void *ud, const struct orch_err *err)
{
    struct orch_boot *b = ud;
    if (strcmp(b->phase, "freezing") == 0)
        return;
    b->stream_err = *err;
    if (err->cls != ORCH_CLASS_CLOSED) {
        failed(b, &b->stream_err);
        return;
    }
    orch_timer_set(b->timer, EXIT_GRACE_MS);
}

static int start_vmm(struct orch_boot *b, struct orch_err *err)
{
    struct orch_vmm_cb cb = { vmm_phase, vmm_frozen, vmm_ended, b };
    struct orch_channel_cb agent_cb = { agent_hello, agent_failed, b };
    int agent_fd;
    b->phase = "starting the VMM";
    struct orch_launcher *la = b->o.launcher(b->o.launcher_ud, err);
    if (!la)
        return -1;
    struct orch_vmm_spec spec = b->o.spec;
    spec.log_fd = orch_rundir_log_fd(b->rundir);
    spec.mem_fd = b->frozen.mem_fd;
    spec.netns = b->netns;
    b->vmm = b->o.backend->start(b->o.host, la, &spec, &cb, &agent_fd, err);
    if (!b->vmm)
        return -1;
    orch_rundir_log_handed_over(b->rundir);
    b->channel = orch_channel_new(b->o.loop, agent_fd, &agent_cb);
    b->phase = "booting";
    return 0;
}

static void net_ready(void *ud)
{
    struct orch_boot *b = ud;
    struct orch_err err;
    if (start_vmm(b, &err) < 0)
        failed(b, &err);
}

static void net_failed(void *ud, const struct orch_err *err)
{
    failed(ud, err);
}

static int start_net(struct orch_boot *b, struct orch_err *err)
{
    struct orch_launcher *la = b->o.launcher(b->o.launcher_ud, err);
    if (!la)
        return -1;
    b->phase = "making its network";
    b->rules = orch_rules_new(&(struct orch_policy){ .n_allow = 0 }, err);
    if (!b->rules)
        return -1;
    b->netns = orch_netns_new(b->o.loop, la,
                              &(struct orch_netns_opts){ .rules = b->rules,
                                                         .kvm = b->o.spec.kvm,
                                                         .ready = net_ready,
                                                         .failed = net_failed,
                                                         .ud = b },
                              err);
    return b->netns ? 0 : -1;
}

static int start(struct orch_boot *b, struct orch_err *err)
{
    if (orch_frozen_new(&b->frozen, b->o.spec.memory_bytes, err) < 0)
        return -1;
    b->rundir = orch_rundir_new(b->o.loop, b->o.runtime_dir, "template", err);
    if (!b->rundir)
        return -1;
    return b->o.spec.network ? start_net(b, err) : start_vmm(b, err);
}

struct orch_boot *orch_boot_new(const struct orch_boot_opts *o, struct orch_err *err)
{
    struct orch_boot *b = orch_xcalloc(1, sizeof *b);
    b->o = *o;
    b->frozen = ORCH_FROZEN_NONE;
    b->phase = "starting the VMM";
    b->start = orch_loop_now_ms(o->loop);
    if (start(b, err) < 0) {
        explain(b, err);
        orch_boot_free(b);
        return NULL;
    }
    b->timer = orch_timer_new(o->loop, timeout, b);
    orch_timer_set(b->timer, o->boot_ms ? o->boot_ms : o->spec.kvm ? BOOT_KVM_MS : BOOT_TCG_MS);
    return b;
}
