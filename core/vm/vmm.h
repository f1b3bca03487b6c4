/* What a VMM backend does: start one confined VMM that boots an image, freeze it into memory and
 * device state, and start VMMs that go on from there. It knows programs, arguments and the control
 * protocol; templates, deadlines and microVMs are its callers' matter. Loop callbacks only. */
#ifndef ORCH_VM_VMM_H
#define ORCH_VM_VMM_H

#include "../image/image.h"
#include "../net/netns.h"

struct orch_vmm_host; /* the backend's programs and files on this host */
struct orch_vmm;

struct orch_vmm_spec {
    const struct orch_image *image;
    bool kvm;
    bool clone; /* go on from mem and state; else boot the image with mem as its memory */
    bool hold;  /* clone: read neither mem nor state before go() */
    uint64_t memory_bytes;
    int vcpus;
    bool network;             /* with a network device, behind netns */
    struct orch_netns *netns; /* start: ready; the caller frees it right after the VMM */
    uint32_t tsc_khz;         /* of the host; boots under emulation need it */
    int log_fd;               /* stdout, stderr and the guest's console; borrowed like the others */
    int mem_fd;   /* memfd of memory_bytes; a clone's is sealed, by go() at the latest */
    int disk_fd;  /* of the image; -1: it has none */
    int state_fd; /* clone: readable from its start, with an offset of its own */
};

struct orch_vmm_cb {
    /* "vmm": its control channel answers; "state": a clone has loaded its state and runs. */
    void (*phase)(void *ud, const char *name);
    void (*frozen)(
        void *ud); /* state is complete and the VMM is gone: mem and state can be sealed */
    /* It ended by itself, never ran, or broke its protocol: once, and instead of frozen. status: as
     * wait(2), or -1. */
    void (*ended)(void *ud, const struct orch_err *err, int status);
    void *ud;
};

typedef void orch_vmm_ready_fn(void *ud, const struct orch_err *err);

struct orch_vmm_backend {
    const char *name;
    /* program: a VMM to use instead of the known places, or NULL. */
    struct orch_vmm_host *(*host_new)(struct orch_loop *l, const char *cache_dir,
                                      const char *program);
    void (*host_free)(struct orch_vmm_host *h); /* pending prepares are forgotten */
    /* Finds the files that a VMM of this acceleration needs; class ISOLATION when it is not
     * installed. start may be called after done reported success. */
    void (*prepare)(struct orch_vmm_host *h, bool kvm, orch_vmm_ready_fn *done, void *ud);
    void (*unprepare)(struct orch_vmm_host *h, void *ud); /* takes back what is pending for ud */
    /* Text that changes whenever the programs change, and, with a spec, the virtual machine they
     * build. */
    int (*identity)(struct orch_vmm_host *h, bool kvm, const struct orch_vmm_spec *spec,
                    struct orch_buf *out, struct orch_err *err);
    /* agent_fd: the host's end of the guest agent's stream, the caller's from then on. */
    struct orch_vmm *(*start)(struct orch_vmm_host *h, struct orch_launcher *la,
                              const struct orch_vmm_spec *spec, const struct orch_vmm_cb *cb,
                              int *agent_fd, struct orch_err *err);
    void (*go)(struct orch_vmm *v);
    void (*freeze)(struct orch_vmm *v, int state_fd);    /* an empty memfd, borrowed */
    struct orch_cell *(*cell)(const struct orch_vmm *v); /* borrowed; NULL when it is over */
    void (*free)(struct orch_vmm *v); /* ends it; no callback follows; NULL is fine */
};

extern const struct orch_vmm_backend orch_vmm_qemu;

#endif
