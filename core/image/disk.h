/* The disk of an image: a read-only erofs file, made from Debian packages by mmdebstrap. Pure but
 * for looking which programs are there: build.c runs the child. It needs no root. Everything it
 * writes but the file `disk` lies on a tmpfs of its own mount namespace, and all of it dies with
 * the child. */
#ifndef ORCH_IMAGE_DISK_H
#define ORCH_IMAGE_DISK_H

#include "../base/err.h"
#include "../base/util.h"

struct orch_recipe {
    const char *suite;          /* "bookworm" */
    const char *const *options; /* of mmdebstrap: what is installed, left out, written and run */
    /* "deb URI SUITE main"; none: Debian's own. They do not make another image. */
    const char *const *sources;
};

/* All in one piece of memory; free() it. NULL stays NULL. */
struct orch_recipe *orch_recipe_dup(const struct orch_recipe *r);
void orch_recipe_hash(const struct orch_recipe *r, char hex[65]);

/* The file that comes out is the same, byte for byte, whichever way it is made. */
enum orch_disk_way {
    ORCH_DISK_ROOT,  /* as root */
    ORCH_DISK_RANGE, /* in a user namespace with a range of ids (/etc/subuid, newuidmap) */
    ORCH_DISK_FAKE,  /* in one with a single id: fakechroot and fakeroot */
};
#define ORCH_DISK_WORK "work" /* an empty folder that must be there, and is empty again after */

/* What is missing, with its package. */
int orch_disk_programs(enum orch_disk_way way, struct orch_err *err);
/* A child that ends with 0 where RANGE is possible. */
extern const char *const orch_disk_probe[];
/* The child that makes `disk` in its working directory; NULL-terminated, free() it. Lives no longer
 * than r. */
const char **orch_disk_argv(const struct orch_recipe *r, enum orch_disk_way way);
/* Environment that it needs beside PATH. */
extern const char *const orch_disk_env[2];
/* What failed, from how it ended and what it wrote to stderr. */
int orch_disk_explain(const char *how, struct orch_slice said, struct orch_err *err);

#endif
