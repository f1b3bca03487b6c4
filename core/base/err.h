/* Errors as values. A function that can fail for a reason outside the program takes a last argument
 * `struct orch_err *err` and returns 0 (or a pointer) on success with err untouched, a negative
 * errno (or NULL) on failure with err set. Callers add context with orch_err_wrap on the way up;
 * exactly one place prints. No allocation, so it works when memory is gone. */
#ifndef ORCH_BASE_ERR_H
#define ORCH_BASE_ERR_H

#include "util.h"

/* What kind of failure it is for the user. The first nine are exit statuses (help: orch help
 * exit). */
enum orch_class {
    ORCH_CLASS_FAILED = 1,    /* "failed": a Lua error, a test, the world */
    ORCH_CLASS_USAGE = 2,     /* "usage" */
    ORCH_CLASS_DENIED = 3,    /* "denied": by policy */
    ORCH_CLASS_APPROVAL = 4,  /* "approval": refused, timed out, nobody to ask */
    ORCH_CLASS_ISOLATION = 5, /* "isolation": VMM or firewall not available; nothing was run */
    ORCH_CLASS_CONFIG = 6,    /* "config": configuration, policy or script invalid or not trusted */
    ORCH_CLASS_UPSTREAM = 7,  /* "upstream": a provider or MCP server failed */
    ORCH_CLASS_LIMIT = 8,     /* "limit": a budget or limit was hit */
    ORCH_CLASS_TIMEOUT = 20,  /* "timeout" */
    ORCH_CLASS_CANCELLED,     /* "cancelled" */
    ORCH_CLASS_CLOSED,        /* "closed": the object was closed or its peer went away */
};

struct orch_err {
    int code; /* positive errno, 0 when none fits */
    enum orch_class cls;
    char msg[2048];
};

/* Sets err (which may be NULL) with class FAILED; returns -code, or -EIO when code is 0. */
int orch_err_set(struct orch_err *err, int code, const char *fmt, ...) ORCH_PRINTF(3, 4);
/* The same with a class. */
int orch_err_setc(struct orch_err *err, enum orch_class cls, int code, const char *fmt, ...)
    ORCH_PRINTF(4, 5);
/* Puts "context: " before the message; returns -err->code (or -EIO). */
int orch_err_wrap(struct orch_err *err, const char *fmt, ...) ORCH_PRINTF(2, 3);
/* The third value Lua sees, "isolation" and so on; never NULL. */
const char *orch_class_name(enum orch_class cls);
int orch_class_exit(enum orch_class cls); /* exit status; TIMEOUT and later: 1 */

#endif
