/* The kernel's modules that a guest needs: those it loads itself, and what they depend on. They are
 * picked out of the files of a package or a folder as those come, in as many rounds as the
 * dependencies need. */
#ifndef ORCH_IMAGE_MODULES_H
#define ORCH_IMAGE_MODULES_H

#include "../base/err.h"
#include "../base/util.h"

struct orch_module {
    char name[56];
    bool required, placed;
    struct orch_buf data; /* empty: not found yet */
};

struct orch_modules {
    struct orch_module list[64];
    size_t n;
    struct orch_buf builtin; /* modules.builtin: what the kernel has in itself */
};

/* disk: those for one are required too. */
void orch_modules_want(struct orch_modules *m, bool disk);
/* Where the bytes of a file under /lib/modules/ go; NULL: it is not needed. */
struct orch_buf *orch_modules_into(struct orch_modules *m, const char *path, uint64_t size);
int orch_modules_read(struct orch_modules *m, const char *folder, struct orch_err *err);
/* Unpacks what came packed, and wants what the found ones depend on. 1: more is to be found, in
 * another round; 0: all is there and made for `release`. source is for the error. */
int orch_modules_resolve(struct orch_modules *m, const char *release, const char *source,
                         struct orch_err *err);
/* Calls fn once for each that was found, in the order the guest loads them: dependencies first.
 * device: the type of virtio device with which alone it is loaded, 0: always. To be called once. */
void orch_modules_each(struct orch_modules *m,
                       void (*fn)(void *ud, const struct orch_module *module, int device),
                       void *ud);
void orch_modules_fini(struct orch_modules *m);

#endif
