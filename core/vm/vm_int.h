/* Inside core/vm: a microVM, for vm.c and vm_info.c. */
#ifndef ORCH_VM_VM_INT_H
#define ORCH_VM_VM_INT_H

#include "../net/hostaddr.h"
#include "../net/netns.h"
#include "rundir.h"
#include "template.h"

enum { ORCH_VM_PHASES = 8 };

enum orch_vm_state {
    ORCH_VM_WAITING,  /* for its template */
    ORCH_VM_STARTING, /* a VMM runs */
    ORCH_VM_READY,
    /* why is known, the VMM is gone; the channel still delivers what the guest said */
    ORCH_VM_ENDING,
    ORCH_VM_ENDED, /* failed or lost was told, or is about to be */
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
    enum orch_vm_state state;
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
    struct orch_vm_phase phases[ORCH_VM_PHASES + 1];
    int n_phases;
    struct orch_err err; /* why it ended */
    const char *reason;  /* the same, for the audit log; NULL: not decided */
    int status;          /* of the VMM as wait(2), or -1 */
};

static inline double orch_ms_since(int64_t us)
{
    return (double)(orch_now_us() - us) / 1000;
}

/* vm_info.c: the events of one microVM. */
void orch_vm_emit_spawn(struct orch_vm *vm);
/* Once for each microVM whose VMM was started. */
void orch_vm_emit_exit(struct orch_vm *vm);
void orch_vm_emit_deny(void *vm, const char *rule, const struct orch_denied *d);

#endif
