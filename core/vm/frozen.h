/* A frozen guest: memory and device state in two memfds, sealed so that no VMM can change them, and
 * its copy on disk, DIR/KEY/{mem,state,meta.json}. The copy is complete or absent: written under
 * another name, synced, renamed. What is found damaged is reported, and the caller builds anew. */
#ifndef ORCH_VM_FROZEN_H
#define ORCH_VM_FROZEN_H

#include "../base/err.h"

struct orch_frozen {
    int mem_fd, state_fd; /* -1: none */
    uint64_t memory_bytes;
    uint32_t tsc_khz; /* of the host it was booted on */
};
#define ORCH_FROZEN_NONE ((struct orch_frozen){ .mem_fd = -1, .state_fd = -1 })
void orch_frozen_fini(struct orch_frozen *f);

/* Empty memfds, to be written by the VMM that freezes. */
int orch_frozen_new(struct orch_frozen *f, uint64_t memory_bytes, struct orch_err *err);
/* Both can never be changed again. -EBUSY while a VMM still maps the memory. */
int orch_frozen_seal(struct orch_frozen *f, struct orch_err *err);

/* Reading the copy: open checks what is cheap (sizes, the state's hash, not the memory) and gives
 * the state sealed and the memory empty; step fills some MiB of it and returns 1, or 0 once all is
 * there, its checksum is right and it is sealed. open: -ENOENT when there is no copy; else
 * negative: damaged. */
struct orch_frozen_load;
struct orch_frozen_load *orch_frozen_open(const char *dir, const char *key, uint64_t memory_bytes,
                                          struct orch_frozen *out, struct orch_err *err);
int orch_frozen_step(struct orch_frozen_load *l, struct orch_err *err);
void orch_frozen_close(struct orch_frozen_load *l);

/* Writes the copy from a child process, since syncing may take long; about: JSON members for
 * people; lock_fd stays open in it, so locked until it ends. Its exit status is 0 or an errno;
 * pidfd tells the end. */
pid_t orch_frozen_save(const char *dir, const char *key, const struct orch_frozen *f,
                       struct orch_slice about, int lock_fd, int *pidfd, struct orch_err *err);
/* Removes the copy, and what an interrupted save left. */
void orch_frozen_remove(const char *dir, const char *key);
/* Keeps the `keep` copies that were used last. */
void orch_frozen_prune(const char *dir, size_t keep);

#endif
