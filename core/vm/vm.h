/* microVMs: spawn, run commands, end. Owns the registry of this process's microVMs, the launcher,
 * the templates and the verdict about KVM. vmm.h has the backend's vtable; qemu.c is the one
 * backend yet.
 *
 * Every start is a clone of a template (a booted guest frozen with its memory); the first start of
 * an image × size × acceleration boots and freezes one, and keeps it in the cache directory. */
#ifndef ORCH_VM_VM_H
#define ORCH_VM_VM_H

#include "../image/image.h"
#include "../launch/launch.h"
#include "../net/ruleset.h"
#include "channel.h"

struct orch_vms; /* the manager */
struct orch_vm;

enum orch_isolation { ORCH_ISOLATION_NONE, ORCH_ISOLATION_HARDWARE, ORCH_ISOLATION_EMULATED };
const char *orch_isolation_name(enum orch_isolation i); /* "hardware", "emulated", "none" */

struct orch_vms_opts {
    const char *launcher_path, *agent_path;
    const char *cache_dir;        /* $XDG_CACHE_HOME/orch */
    const char *runtime_dir;      /* $XDG_RUNTIME_DIR/orch: a folder a microVM, with vmm.log */
    const char *kernel, *modules; /* --kernel; NULL: Debian's */
    const char *qemu;             /* NULL: the known places */
    /* deadlines of a template's boot and of a clone's start; 0: 180 s (30 s while KVM is tried)
     * and 60 s */
    int64_t boot_ms, clone_ms;
    struct orch_hostaddr *hostaddr; /* whose changes the filters follow; NULL: one of its own */
    int max;                        /* microVMs at once; more is refused with class LIMIT */
    void (*progress)(void *ud, const char *line); /* long work: image build, template boot */
    /* events for the audit log: "vm_spawn", "vm_exit", and "net_deny" for packets that a network's
     * filter denied, at most some a second and microVM; fields is a JSON object's inside. Frees no
     * microVM. */
    void (*event)(void *ud, const char *event, struct orch_slice fields);
    void *ud;
};

/* Makes runtime_dir and removes from it what killed processes left. Starts nothing yet. */
struct orch_vms *orch_vms_new(struct orch_loop *l, const struct orch_vms_opts *o,
                              struct orch_err *err);
/* Ends and frees every microVM; may wait, at most 30 s, until a new template is written to disk. */
void orch_vms_free(struct orch_vms *m);

struct orch_vm_opts {
    const char *image;   /* NULL: "base" */
    const char *backend; /* "auto", "qemu"; others: class ISOLATION, named */
    const char *accel;   /* "auto", "kvm", "tcg" */
    /* NULL or "none": no network device in the guest. Else a policy's name and its filter, which is
     * the microVM's from then on, also when spawn fails; one without the other: class USAGE. */
    const char *network;
    struct orch_rules *rules;
    const char *name;         /* NULL or a label for list */
    uint64_t memory_bytes;    /* 64M … 4G, default 256M */
    int vcpus;                /* 1…8 */
    int64_t timeout_ms;       /* life of the microVM from its VMM's start; 0: none */
    const char *timeout_name; /* what sets it, for its error; a literal. NULL: "timeout" */
    const char *call;         /* audit: the call it serves, or NULL */
    /* May be NULL. From the spawn on it waits for its template, which may have to be made first and
     * has deadlines of its own: false when that is over and its own start begins, true when it
     * waits anew. */
    void (*waits)(void *ud, bool waits);
    /* Ready or failed, once; the vm is borrowed and lives until orch_vm_free. On failure the
     * message has the phase, the VMM's last lines and the path of its log. Never called from inside
     * spawn. */
    void (*ready)(void *ud, struct orch_vm *vm, const struct orch_err *err);
    /* It ended by itself after ready (crash, timeout, launcher lost), once. Execs were failed
     * before, with the same error: "microVM ID: why", class TIMEOUT or CLOSED. */
    void (*lost)(void *ud, struct orch_vm *vm, const struct orch_err *err);
    void *ud;
};
/* Of a time that is over: seconds as a double, and its name. */
#define ORCH_VM_TIME_OVER "its time of %g s is over (%s)"

/* NULL only for a caller's mistake or the limit; everything else comes by ready. The returned vm
 * may be freed at any time: that cancels. */
struct orch_vm *orch_vm_spawn(struct orch_vms *m, const struct orch_vm_opts *o,
                              struct orch_err *err);
void orch_vm_free(struct orch_vm *vm); /* ends it, no callbacks; NULL is fine */
/* Ends it as if by itself, for this reason: one that was ready is lost, else ready gets it. */
void orch_vm_end(struct orch_vm *vm, const struct orch_err *why);

const char *orch_vm_id(const struct orch_vm *vm);
const char *orch_vm_name(const struct orch_vm *vm); /* NULL: none */
const char *orch_vm_call(const struct orch_vm *vm); /* that it serves; NULL: none */
int64_t orch_vm_spawned_us(const struct orch_vm *vm);
const char *orch_vm_backend(const struct orch_vm *vm);
const char *orch_vm_image(const struct orch_vm *vm);
enum orch_isolation orch_vm_isolation(const struct orch_vm *vm);
double orch_vm_spawn_ms(const struct orch_vm *vm); /* spawn to ready */
/* Phases of the start in the order they ended, with milliseconds since spawn; NULL-name
 * terminated. */
struct orch_vm_phase {
    const char *name;
    double ms;
};
const struct orch_vm_phase *orch_vm_phases(const struct orch_vm *vm);
/* The one way into a microVM, asked for anew each time: NULL with err when it is not ready, or no
 * more; then err is the one that lost gets, though the microVM may not have been told so yet. */
struct orch_channel *orch_vm_channel(struct orch_vm *vm, struct orch_err *err);
struct orch_slice orch_vm_log_tail(const struct orch_vm *vm);
/* True when under TCG, where guest programs start faster without ASLR (orch_exec_opts.no_aslr). */
bool orch_vm_no_aslr(const struct orch_vm *vm);

const char *orch_vm_network(const struct orch_vm *vm); /* the policy's name, or "none" */
/* The filter's rules with what they counted, in order; nothing without a network. After ready. */
int orch_vm_counters(struct orch_vm *vm,
                     void (*fn)(void *ud, const char *label, uint64_t packets, uint64_t bytes),
                     void *ud, struct orch_err *err);

/* What it takes of the host, after ready; nothing of one that ends. Memory is the proportional set
 * size; the uplink's is about 20 MB, whatever it carries. */
struct orch_vm_usage {
    uint64_t vmm_bytes, uplink_bytes;
    uint32_t connections;
};
int orch_vm_usage(struct orch_vm *vm, struct orch_vm_usage *out, struct orch_err *err);

/* Each microVM of this process. */
void orch_vms_each(struct orch_vms *m, void (*fn)(void *ud, struct orch_vm *vm), void *ud);

/* What a start with accel "auto" would use, from the device and the verdict remembered in the cache
 * directory; NONE when QEMU is missing or KVM was not tried yet. Writes nothing. `why` gets the
 * reason. */
enum orch_isolation orch_known_isolation(struct orch_loop *l, const struct orch_vms_opts *o,
                                         struct orch_buf *why);

#endif
