/* Templates: a booted guest, frozen, as two sealed memfds that any number of clones start from.
 * Made once per image × size × acceleration, with or without a network device, held in memory (the
 * four used last), kept on disk in CACHE/templates/KEY/ (mem, sparse; state; meta.json), loaded by
 * later processes. Finds or builds the image and decides the acceleration on the way. */
#ifndef ORCH_VM_TEMPLATE_H
#define ORCH_VM_TEMPLATE_H

#include "vm.h"
#include "vmm.h"

struct orch_templates;
struct orch_template_wait;

enum orch_accel { ORCH_ACCEL_AUTO, ORCH_ACCEL_KVM, ORCH_ACCEL_TCG };

struct orch_template {
    struct orch_image image;
    bool kvm;
    bool network; /* has a device for it */
    bool loaded;  /* false: mem is being filled; a VMM may be started with hold already */
    uint64_t memory_bytes;
    int vcpus;
    int mem_fd, state_fd;
    int disk_fd; /* -1: the image has none */
};

struct orch_templates_opts {
    struct orch_loop *loop;
    const struct orch_vmm_backend *backend;
    struct orch_vmm_host *host;
    const char *cache_dir, *runtime_dir, *agent_path, *kernel, *modules;
    int64_t boot_ms; /* 0: 180 s, 30 s for KVM */
    struct orch_launcher *(*launcher)(void *ud, struct orch_err *err);
    void *launcher_ud;
    void (*progress)(void *ud, const char *line); /* may be NULL */
    void *progress_ud;
};

struct orch_templates *orch_templates_new(const struct orch_templates_opts *o);
/* Ends what is being booted; waits (at most 30 s) until a template that is being written is
 * written. */
void orch_templates_free(struct orch_templates *ts);

/* What is wanted; AUTO means KVM where it works. */
struct orch_template_want {
    const char *image;
    enum orch_accel accel;
    bool network;
    uint64_t memory_bytes;
    int vcpus;
};

/* Never called from inside want:
 *   (t, NULL) with loaded false: a VMM may be started with hold;
 *   (NULL, NULL): t proved damaged and is made anew, what was started must be dropped;
 *   (t, NULL) with loaded true, or (NULL, err): the last call.
 * t is valid during the call; a VMM holds descriptors of its own. */
typedef void orch_template_fn(void *ud, const struct orch_template *t, const struct orch_err *err);
struct orch_template_wait *orch_template_want(struct orch_templates *ts,
                                              const struct orch_template_want *w,
                                              orch_template_fn *fn, void *ud);
void orch_template_cancel(struct orch_template_wait *w); /* the template is made all the same */

/* For doctor: what a start with AUTO would use, from the device and the remembered verdict; why
 * says why. */
enum orch_isolation orch_templates_known(struct orch_templates *ts, struct orch_buf *why);

/* A descriptor for one clone, with an offset of its own. */
int orch_template_open_state(const struct orch_template *t, struct orch_err *err);

#endif
