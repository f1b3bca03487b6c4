/* Whether KVM works here. /dev/kvm present does not mean that a guest runs: nested and paravirtual
 * hosts have it and hang or kill VMMs. So the first template is tried with KVM under a short
 * deadline, and the verdict is kept in CACHE/accel.json until kernel, processor, VMM or image
 * change. */
#ifndef ORCH_VM_ACCEL_H
#define ORCH_VM_ACCEL_H

#include "../base/err.h"

/* Can the user that VMMs run as open /dev/kvm? 0, or class ISOLATION with the reason and the
 * fix. */
int orch_accel_device(struct orch_err *err);

/* What a verdict holds for: this kernel and processor, and the VMM's identity, as 64 hex digits. */
void orch_accel_host_key(struct orch_slice vmm_identity, char out[65]);

enum orch_accel_verdict { ORCH_ACCEL_UNTRIED, ORCH_ACCEL_WORKS, ORCH_ACCEL_FAILS };

/* image NULL: the newest verdict for the host, whatever the image. why gets the reason of FAILS. */
enum orch_accel_verdict orch_accel_recall(const char *cache_dir, const char *host_key,
                                          const char *image, struct orch_buf *why);
/* Failing to write is logged; the next process then tries again. */
void orch_accel_remember(const char *cache_dir, const char *host_key, const char *image,
                         enum orch_accel_verdict v, const char *why);

#endif
