/* A server behind the policy (the thin proxy `mcp stdio -- CMD`): from its start on there are no
 * tools but its own, which join every generation; their calls go to it, and what it asks during a
 * call goes to that call's client. */
#ifndef ORCH_UPSTREAM_UPSTREAM_H
#define ORCH_UPSTREAM_UPSTREAM_H

#include "../call/call.h"

struct orch_proc_via;
struct orch_upstream;

struct orch_upstream_opts {
    const char *name; /* in policy */
    const char *const *command;
    int64_t start_ms;   /* from the start until its tools are known; also for each later list */
    int64_t timeout_ms; /* of a call, anew from each progress notification */
    /* Gives what each start of it goes by; NULL: nothing protects orch's files from it. */
    struct orch_proc_via *(*via)(void *via_ud, struct orch_err *err);
    void *via_ud;
    void (*settled)(void *ud); /* once, from the loop: its tools are known, or it failed */
    void (*changed)(void *ud); /* its tools have changed since: a generation with them is due */
    void *ud;
};

/* NULL with err: it cannot be started as asked (not of class UPSTREAM). Any other failure is a
 * problem of the generation (orch_current), told by settled. */
struct orch_upstream *orch_upstream_start(struct orch_calls *cs,
                                          const struct orch_upstream_opts *uo,
                                          struct orch_err *err);
/* Ends it, in its own time (orch_proc_end) unless in a hurry. NULL is fine. */
void orch_upstream_free(struct orch_upstream *u, bool hurry);
bool orch_upstream_ready(const struct orch_upstream *u);
/* Appends what a start is at, for people: "starting npx: the last line of its stderr". */
void orch_upstream_doing(const struct orch_upstream *u, struct orch_buf *out);

#endif
