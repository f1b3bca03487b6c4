/* The control socket: PID.sock in the runtime directory (PID-2.sock of a process's second handle,
 * and so on), one JSON line in, one out. How `orch status`, `orch reload` and `orch vm list` reach
 * the running orch processes of the same user. */
#ifndef ORCH_HOST_CONTROL_H
#define ORCH_HOST_CONTROL_H

#include "../base/json.h"
#include "../base/loop.h"

struct orch_control;

/* What can be asked: {"op":"NAME",…}. Nothing that orch started is answered what loosens rules;
 * what orch protects itself from, nothing at all. */
struct orch_control_verb {
    const char *name;
    bool loosens;
    /* out: a JSON value */
    void (*answer)(void *ud, const struct orch_json_doc *d, struct orch_buf *out);
};

/* verbs: ended by an empty one; outlives the socket. */
struct orch_control *orch_control_new(struct orch_loop *l, const char *runtime_dir,
                                      const struct orch_control_verb *verbs, void *ud,
                                      struct orch_err *err);
void orch_control_free(struct orch_control *c);

/* Sends one request to each running orch process of this user (or to pid); answers as a JSON array
 * of {"pid":…,"answer":…} or {"pid":…,"error":…}. Waits at most 20 s for each. */
void orch_control_ask(const char *runtime_dir, int pid, struct orch_slice request,
                      struct orch_buf *out);

#endif
