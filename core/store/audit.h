/* The audit log (CONTRACT section 8): append-only JSON lines, hash-chained, one file a process. A
 * call's decision line is on its way to the kernel, and room for its outcome is reserved on disk,
 * before the call runs; where that cannot be, the call does not run. */
#ifndef ORCH_STORE_AUDIT_H
#define ORCH_STORE_AUDIT_H

#include "../base/loop.h"

struct orch_audit;
enum orch_audit_sync { ORCH_AUDIT_SYNC_NONE, ORCH_AUDIT_SYNC_INTERVAL, ORCH_AUDIT_SYNC_EACH };

#define ORCH_AUDIT_OUTCOME_MAX (16 * 1024) /* bytes of one outcome line */
#define ORCH_AUDIT_LINE_MAX (256 * 1024)

/* dir: made 0700. key_path: 32 random bytes, made 0600 on first use. Writes FILE.head each second (by
 * the loop's timer) and at close. */
struct orch_audit *orch_audit_open(struct orch_loop *l, const char *dir, const char *key_path, enum orch_audit_sync sync,
                                   struct orch_err *err);
void orch_audit_close(struct orch_audit *a);

/* Queues one line: {"ts":…,"seq":…,"event":"…",FIELDS,"prev":…,"hash":…}. fields: JSON members without
 * braces, composed by the caller, valid and newline-free. Nothing is written yet; `reserve`: also
 * reserve ORCH_AUDIT_OUTCOME_MAX for the outcome that will follow. */
int orch_audit_add(struct orch_audit *a, const char *event, struct orch_slice fields, bool reserve, struct orch_err *err);
/* Like add, for the outcome of a reserved call: gives the reservation back. Over the maximum: -EMSGSIZE. */
int orch_audit_add_outcome(struct orch_audit *a, struct orch_slice fields, struct orch_err *err);
/* Writes all that is queued with one write (and fdatasync when sync is each). On failure the queued
 * lines are dropped from the chain, the file is cut back to its last whole line, err says why, and
 * orch_audit_broken is true from then on. */
int orch_audit_flush(struct orch_audit *a, struct orch_err *err);
bool orch_audit_broken(const struct orch_audit *a);
const char *orch_audit_path(const struct orch_audit *a);
/* HMAC with the key over bytes (RFC 8785 JSON), as hex. */
void orch_audit_digest(struct orch_audit *a, struct orch_slice canonical, char out[65]);

struct orch_audit_report {
    uint64_t lines, unsigned_lines; /* unsigned: after the head */
    bool ok, has_head;
    char problem[512];              /* file:line: what */
    char head_hash[65];
};
/* Checks one file: every line strict JSON, seq without gap, prev and hash right, head right when
 * present. expect_head: a hash kept elsewhere, or NULL. 0 when it could be read; r->ok is the verdict. */
int orch_audit_verify(const char *path, const char *key_path, const char *expect_head, struct orch_audit_report *r,
                      struct orch_err *err);

#endif
