/* Watches directories by inotify and calls back once things have been quiet for a moment, whatever
 * way an editor saves (write in place, rename over, unlink and create). That something changed is
 * all it says: swap and backup files count too, the caller compares contents. */
#ifndef ORCH_BASE_DIRWATCH_H
#define ORCH_BASE_DIRWATCH_H

#include "loop.h"

struct orch_dirwatch;

/* quiet_ms: after the last event; a stream of events is cut off after 4 × quiet_ms. */
struct orch_dirwatch *orch_dirwatch_new(struct orch_loop *l, int64_t quiet_ms, orch_loop_fn *fn,
                                        void *ud, struct orch_err *err);
/* Adds a directory (its entries are watched; a file is watched through its directory). Its parent
 * is watched for its name too, so that replacing the directory, or the symbolic link to it, is
 * seen; one that does not exist yet is watched through its nearest existing parent. */
int orch_dirwatch_add_dir(struct orch_dirwatch *r, const char *path, struct orch_err *err);
/* Forgets all directories. A change seen before is still called back. Add anew before reading the
 * files: then no change falls between. */
void orch_dirwatch_clear(struct orch_dirwatch *r);
void orch_dirwatch_free(struct orch_dirwatch *r);

#endif
