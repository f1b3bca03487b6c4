/* A tar stream, read as it comes: regular files that somebody wants are kept, all else is skipped.
 * Pure. */
#ifndef ORCH_IMAGE_TAR_H
#define ORCH_IMAGE_TAR_H

#include "../base/util.h"

struct orch_tar {
    /* Where a file's bytes go; NULL: nowhere. size is what the stream says. */
    struct orch_buf *(*into)(void *ud, const char *path, uint64_t size);
    void *ud;
    bool failed; /* it is no tar */
    /* the file's own */
    char head[512];
    size_t n_head;
    uint64_t left, pad;
    struct orch_buf longname, *keep;
};
void orch_tar_restart(struct orch_tar *t); /* another stream follows */
void orch_tar_feed(struct orch_tar *t, const char *p, size_t n);
void orch_tar_fini(struct orch_tar *t);

#endif
