#include "err.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static int set_v(struct orch_err *err, enum orch_class cls, int code, const char *fmt, va_list ap)
{
    if (err) {
        err->code = code;
        err->cls = cls;
        vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    }
    return code > 0 ? -code : -EIO;
}

int orch_err_set(struct orch_err *err, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int r = set_v(err, ORCH_CLASS_FAILED, code, fmt, ap);
    va_end(ap);
    return r;
}

int orch_err_setc(struct orch_err *err, enum orch_class cls, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int r = set_v(err, cls, code, fmt, ap);
    va_end(ap);
    return r;
}

int orch_err_wrap(struct orch_err *err, const char *fmt, ...)
{
    if (!err)
        return -EIO;
    char text[sizeof err->msg];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    size_t used = n < 0 ? 0 : (size_t)n < sizeof text - 3 ? (size_t)n : sizeof text - 3;
    memcpy(text + used, ": ", 2);
    used += 2;
    size_t keep = strnlen(err->msg, sizeof text - used - 1);
    memcpy(text + used, err->msg, keep);
    text[used + keep] = 0;
    memcpy(err->msg, text, used + keep + 1);
    return err->code > 0 ? -err->code : -EIO;
}

const char *orch_class_name(enum orch_class cls)
{
    switch (cls) {
    case ORCH_CLASS_USAGE:
        return "usage";
    case ORCH_CLASS_DENIED:
        return "denied";
    case ORCH_CLASS_APPROVAL:
        return "approval";
    case ORCH_CLASS_ISOLATION:
        return "isolation";
    case ORCH_CLASS_CONFIG:
        return "config";
    case ORCH_CLASS_UPSTREAM:
        return "upstream";
    case ORCH_CLASS_LIMIT:
        return "limit";
    case ORCH_CLASS_TIMEOUT:
        return "timeout";
    case ORCH_CLASS_CANCELLED:
        return "cancelled";
    case ORCH_CLASS_CLOSED:
        return "closed";
    case ORCH_CLASS_FAILED:
        break;
    }
    return "failed";
}

int orch_class_exit(enum orch_class cls)
{
    return cls >= ORCH_CLASS_FAILED && cls <= ORCH_CLASS_LIMIT ? (int)cls : 1;
}
