/* What several of the room need of a handle. */
#include "host.h"

#include "../base/log.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

int orch_host_audit(struct orch *o, struct orch_err *err)
{
    if (o->calls.audit)
        return 0;
    const struct orch_config *c = &o->current.gen->cfg;
    cleanup_free char *key = orch_xasprintf("%s/audit.key", o->paths.state);
    cleanup_close int dir = orch_own_dir(o->paths.state, err);
    if (dir < 0)
        return dir;
    o->calls.audit = orch_audit_open(o->loop, c->audit_dir, key, c->audit_sync, err);
    o->current.audit = o->calls.audit;
    if (o->calls.audit)
        orch_audit_keep(o->calls.audit, c->audit_keep_ms);
    return o->calls.audit ? 0 : -EIO;
}

int orch_host_flush(int status)
{
    struct pollfd out = { STDOUT_FILENO, POLLOUT, 0 };
    errno = 0;
    if (fflush(stdout) == 0 && !ferror(stdout))
        return status;
    if (errno == EPIPE || (poll(&out, 1, 0) > 0 && (out.revents & POLLERR)))
        return status;
    fprintf(stderr, "orch: standard output: %s\n", errno ? strerror(errno) : "cannot be written");
    return status ? status : ORCH_CLASS_FAILED;
}

void orch_host_keep_tool(struct orch *o, const struct orch_tool *t)
{
    for (size_t i = 0; i < o->tools.n; i++)
        if (strcmp(o->tools.list[i].name, t->name) == 0) {
            orch_tool_fini(&o->tools.list[i]);
            o->tools.list[i] = *t;
            return;
        }
    o->tools.list = orch_xrealloc(o->tools.list, (o->tools.n + 1) * sizeof *o->tools.list);
    o->tools.list[o->tools.n++] = *t;
}

/* Whoever serves or has microVMs can be asked by other commands of the same user. */
void orch_host_control(struct orch *o)
{
    struct orch_err err = { 0 };
    if (!o->control &&
        !(o->control = orch_control_new(o->loop, o->paths.runtime, orch_control_verbs, o, &err)))
        orch_log(ORCH_WARN, "%s", err.msg);
}
