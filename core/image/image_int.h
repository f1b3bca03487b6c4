/* The room's own: the folder of built images, as a build needs it. */
#ifndef ORCH_IMAGE_IMAGE_INT_H
#define ORCH_IMAGE_IMAGE_INT_H

#include "image.h"

/* What a build has made; the texts are borrowed. */
struct orch_image_made {
    const char *name, *release, *source;
    const char *agent_hash, *disk_hash, *recipe_hash; /* the last two: empty without a disk */
    struct orch_slice kernel, initrd;
    uint64_t disk_bytes;
    bool acpi;
};

int orch_image_check_name(const char *name, struct orch_err *err);
int orch_image_not_built(const char *name, struct orch_err *err); /* the error */
int orch_image_hash_agent(const char *path, struct orch_buf *agent, char hex[65],
                          struct orch_err *err);
/* A hash of the built image's manifest, whatever agent it has: its `disk`, or the `recipe` that the
 * disk was made of; NULL: no disk. */
char *orch_image_built_hash(const char *cache_dir, const char *name, const char *key);
int orch_image_digest(int fd, char hex[65], uint64_t *bytes); /* from where it stands to its end */
/* As orch_image_find, for an agent of this hash; *source, what the kernel is from, is owned by the
 * caller. */
int orch_image_find_built(const char *name, const struct orch_image_opts *o, const char *agent_hash,
                          struct orch_image *out, char **source, struct orch_err *err);

/* A new folder to build in; *folder is NULL on failure. What killed builders left is removed: only
 * for who has the lock. */
int orch_image_folder_new(const char *cache_dir, char **folder, struct orch_err *err);
void orch_image_folder_remove(const char *folder);
/* Puts what was made into *folder, beside what is there already, and that under its name; *folder
 * is freed and NULL from then on. Images without a name are removed. */
int orch_image_install(const char *cache_dir, char **folder, const struct orch_image_made *m,
                       char id[65], uint64_t *bytes, struct orch_err *err);

#endif
