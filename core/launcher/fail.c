/* What every process of the launcher says and does when a step fails. */
#include "launcher.h"

#include <poll.h>
#include <stdio.h>
#include <sys/syscall.h>

pid_t orch_launch_clone(unsigned long flags)
{
    for (int tries = 0;; tries++) {
        pid_t p = (pid_t)syscall(SYS_clone, flags, 0UL, 0UL, 0UL, 0UL);
        if (p >= 0 || errno != ENOSPC || tries == ORCH_LAUNCH_TRIES)
            return p;
        struct pollfd ctl = { .fd = ORCH_LAUNCH_SOCK };
        if (poll(&ctl, 1, 20) > 0) /* only a hang-up: no events were asked for */
            _exit(0);
    }
}

struct orch_launch_msg *orch_launch_error(const char *step, const char *file)
{
    static struct orch_launch_msg m;
    int code = errno;
    m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_ERROR, .sys_errno = code };
    snprintf(m.step, sizeof m.step, "%s", step);
    if (file && *file)
        m.blob_len = (uint32_t)snprintf(m.blob, 1024, "%s", file) + 1;
    if (m.blob_len > 1024)
        m.blob_len = 1024;
    return &m;
}

_Noreturn void orch_launch_fail(const char *step)
{
    orch_launch_send(ORCH_LAUNCH_SOCK, orch_launch_error(step, NULL), NULL, 0);
    _exit(1);
}
