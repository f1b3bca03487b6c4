/* A guest is booted, warmed and frozen: what a template is made from. One boot, one end. */
#ifndef ORCH_VM_BOOT_H
#define ORCH_VM_BOOT_H

#include "frozen.h"
#include "vmm.h"

struct orch_boot;

struct orch_boot_opts {
    struct orch_loop *loop;
    const struct orch_vmm_backend *backend;
    struct orch_vmm_host *host;
    struct orch_launcher *(*launcher)(void *ud, struct orch_err *err);
    void *launcher_ud;
    const char *runtime_dir;
    struct orch_vmm_spec spec; /* netns and the descriptors but the disk's are set here */
    int64_t boot_ms;           /* 0: 180 s, 30 s for KVM */
    /* The end, from the loop; frees the boot. f: sealed, the callee's from then on; else NULL with
     * err: what was made of which image, the phase, and the VMM's last lines. */
    void (*done)(void *ud, const struct orch_frozen *f, const struct orch_err *err);
    void *ud;
};

/* NULL: err as done has it. */
struct orch_boot *orch_boot_new(const struct orch_boot_opts *o, struct orch_err *err);
/* Ends it without a callback; NULL is fine. */
void orch_boot_free(struct orch_boot *b);

#endif
