/* Guest images: what a microVM boots from. `base` is Debian's cloud kernel, unpacked to an ELF, and
 * an initramfs of static busybox, the kernel modules it needs and the guest agent. Every other
 * image has the same two and a disk (disk.h), which becomes the guest's root. Built once into
 * $XDG_CACHE_HOME/orch/images/<content hash>/, never on the user's system; nothing needs root. */
#ifndef ORCH_IMAGE_IMAGE_H
#define ORCH_IMAGE_IMAGE_H

#include "../base/loop.h"
#include "disk.h"

struct orch_image {
    char name[64];
    char id[65];  /* SHA-256 over all inputs: kernel, initrd, agent, recipe */
    char *kernel; /* path of the unpacked ELF vmlinux */
    char *initrd; /* path of the cpio archive */
    char *disk;   /* path of the erofs file; NULL: none */
    char *kernel_release;
    uint64_t bytes; /* of all files */
    bool acpi;      /* stock kernels find virtio-mmio devices by ACPI only */
};
void orch_image_fini(struct orch_image *i);
void orch_image_copy(struct orch_image *to, const struct orch_image *from);

struct orch_image_opts {
    const char *cache_dir;  /* …/orch/images */
    const char *agent_path; /* the static guest agent */
    const char *kernel;  /* NULL: Debian's cloud kernel by apt-get download; else bzImage or ELF */
    const char *modules; /* with kernel: its /lib/modules/VERSION, or NULL when all is built in */
    void (*progress)(void *ud, const char *line); /* one line a step; may be NULL */
    void *ud;
    /* To build an image that is not `base`. NULL: with the disk that the image of this name has
     * already (another agent or kernel needs no other), or it fails. */
    const struct orch_recipe *recipe;
    bool digests; /* what is found is compared with its manifest whole, which reads all of it */
    bool fresh;   /* with recipe: make the disk anew from today's packages, though there is one */
};

/* Opens a file of the cache for reading. What microVMs start from must stay as it was made, and a
 * VMM that escaped has the user's id: so nobody may be able to write to it, its owner neither.
 * Write bits, as earlier versions left them, are taken away. Class ISOLATION: others can change
 * it. */
int orch_image_open(int dir_fd, const char *path, struct orch_err *err);

/* Finds the built image; -ENOENT when it was never built, -ESTALE when its inputs (agent)
 * changed. */
int orch_image_find(const char *name, const struct orch_image_opts *o, struct orch_image *out,
                    struct orch_err *err);
typedef void orch_image_done_fn(void *ud, const struct orch_image *image,
                                const struct orch_err *err);
struct orch_image_build;
/* Builds in steps from the loop (children: apt-get, dpkg-deb); two builders at once: the second
 * waits for the first's lock and then finds. done is called once, never from inside this call. */
struct orch_image_build *orch_image_build_start(struct orch_loop *l, const char *name,
                                                const struct orch_image_opts *o,
                                                orch_image_done_fn *done, void *ud);
/* No callback, nothing half-made remains. */
void orch_image_build_cancel(struct orch_image_build *b);

#endif
