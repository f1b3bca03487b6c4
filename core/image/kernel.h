/* Guest kernels: what is packed becomes the ELF that QEMU enters, and the ELF says what it is.
 * Pure, but for the program that unpacks (lz4, gzip, xz or zstd): it is waited for, well under a
 * second. */
#ifndef ORCH_IMAGE_KERNEL_H
#define ORCH_IMAGE_KERNEL_H

#include "../base/err.h"
#include "../base/util.h"

enum { ORCH_KERNEL_MAX = 256 << 20 }; /* Debian's: 14 MB packed, 53 MB unpacked */

/* 1: `in` was packed, and out has at most max bytes of what it holds; 0: it is not packed. */
int orch_unpack(struct orch_slice in, size_t max, struct orch_buf *out, struct orch_err *err);
/* Unpacks a bzImage to the ELF vmlinux in out. */
int orch_bzimage_unpack(struct orch_slice bz, struct orch_buf *out, struct orch_err *err);

/* Whether QEMU can enter it: an x86-64 ELF with the Xen note 18 (PHYS32_ENTRY), as CONFIG_PVH makes
 * it. */
int orch_kernel_check(struct orch_slice elf, struct orch_err *err);
/* "6.1.0-56-cloud-amd64" from the banner in it; owned by the caller, NULL: none. */
char *orch_kernel_release(struct orch_slice elf);

#endif
