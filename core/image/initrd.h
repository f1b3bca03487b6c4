/* The initramfs of every guest: static busybox, the kernel's modules and the guest agent as its
 * init. Pure; equal inputs make equal bytes. */
#ifndef ORCH_IMAGE_INITRD_H
#define ORCH_IMAGE_INITRD_H

#include "modules.h"

#define ORCH_BUSYBOX "/bin/busybox" /* on the host and in the guest */

/* applets: what `busybox --list-full` prints. modules are placed by it: once. */
void orch_initrd_make(struct orch_modules *modules, const char *release, struct orch_slice agent,
                      struct orch_slice busybox, const char *applets, struct orch_buf *out);

#endif
