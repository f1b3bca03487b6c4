/* MCP over stdin and stdout: newline-delimited JSON, nothing else ever written. Reads all lines at
 * hand, lets the host handle them as one batch, answers with one write. A reader that does not read
 * is waited for: no further input is taken while more than 1 MiB of output waits. */
#ifndef ORCH_MCP_STDIO_H
#define ORCH_MCP_STDIO_H

#include "../base/loop.h"
#include "session.h"

struct orch_mcp_stdio;

struct orch_mcp_stdio_opts {
    int in_fd, out_fd; /* borrowed; pipes and sockets are made non-blocking until free */
    size_t max_line;
    /* All lines at hand were handled; what the host deferred runs now. */
    void (*batch_end)(void *ud);
    /* End of input, or the output is closed; once. why is NULL at a plain end of input. */
    void (*closed)(void *ud, const char *why);
    void *ud;
};

struct orch_mcp_stdio *orch_mcp_stdio_new(struct orch_loop *l, struct orch_mcp_session *s,
                                          const struct orch_mcp_stdio_opts *o,
                                          struct orch_err *err);
bool orch_mcp_stdio_gone(const struct orch_mcp_stdio *t); /* nobody will read the output */
/* Writes what waits, at most until deadline_ms from now. For the end of the session. */
void orch_mcp_stdio_drain(struct orch_mcp_stdio *t, int64_t deadline_ms);
void orch_mcp_stdio_free(struct orch_mcp_stdio *t);

#endif
