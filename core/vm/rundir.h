/* A running VMM's folder in the runtime directory, and its log. The folder (0700, named by id) is
 * locked with flock as long as its owner lives, so that what a killed orch left can be told from a
 * live one's. What the VMM and its guest's console write comes through a pipe that is always
 * drained: into vmm.log (0600) up to ORCH_RUNDIR_LOG_MAX, and into a ring of the last
 * ORCH_RUNDIR_TAIL bytes. */
#ifndef ORCH_VM_RUNDIR_H
#define ORCH_VM_RUNDIR_H

#include "../base/loop.h"

#define ORCH_RUNDIR_LOG_MAX (1024 * 1024)
#define ORCH_RUNDIR_TAIL 4096
#define ORCH_RUNDIR_KEPT 16 /* logs of failed starts that stay in runtime_dir/failed */

struct orch_rundir;

/* Makes the directory itself (0700) and removes folders in it whose owner is gone. */
int orch_rundir_open(const char *runtime_dir, struct orch_err *err);

/* A new folder PREFIX-XXXXXXXX. */
struct orch_rundir *orch_rundir_new(struct orch_loop *l, const char *runtime_dir,
                                    const char *prefix, struct orch_err *err);
/* Removes the folder; a kept log stays. NULL is fine. */
void orch_rundir_free(struct orch_rundir *r);

const char *orch_rundir_id(const struct orch_rundir *r);
/* The pipe's end for the VMM, until it was handed over. */
int orch_rundir_log_fd(const struct orch_rundir *r);
void orch_rundir_log_handed_over(struct orch_rundir *r);
struct orch_slice orch_rundir_tail(
    const struct orch_rundir *r); /* borrowed, valid until the next turn of the loop */

/* For a failed start: reads what is still in the pipe, moves the log to runtime_dir/failed/ID.log
 * and appends the last 20 lines, escaped for terminals, and the log's path to the message. */
void orch_rundir_explain(struct orch_rundir *r, struct orch_err *err);

/* How many entries of that type (S_IFREG, S_IFDIR; none with a leading dot) there are; name gets
 * the one that was changed longest ago. */
size_t orch_dir_oldest(int dir_fd, mode_t type, char name[256]);

#endif
