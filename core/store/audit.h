/* The audit log (CONTRACT section 8): append-only JSON lines, hash-chained, one file a process. A
 * call's decision line is on its way to the kernel, and room for its outcome is reserved on disk,
 * before the call runs; where that cannot be, the call does not run.
 *
 * A file is made with its first line, "start", which names the file before in the folder and that
 * one's last line then; its last is "end". So the folder's files are one chain, in the order of
 * their names; FOLDER/newest, signed, says which is the last. */
#ifndef ORCH_STORE_AUDIT_H
#define ORCH_STORE_AUDIT_H

#include "../base/loop.h"

struct orch_audit;
enum orch_audit_sync { ORCH_AUDIT_SYNC_NONE, ORCH_AUDIT_SYNC_INTERVAL, ORCH_AUDIT_SYNC_EACH };

#define ORCH_AUDIT_OUTCOME_MAX (16 * 1024) /* bytes of one outcome line */
#define ORCH_AUDIT_LINE_MAX (256 * 1024)
/* of either maximum, at most so many bytes are not the event or the fields */
#define ORCH_AUDIT_AROUND 256

/* dir: made 0700. key_path: 32 random bytes, made 0600 on first use. The file is made by the first
 * add: what adds nothing leaves none. While something is written, and at close, each second (by the
 * loop's timer): with sync `interval` fdatasync, which may wait for the disk, then FILE.head
 * {"seq":…,"hash":…,"hmac":…}: the last written line's, and HMAC-SHA-256 over "SEQ:HASH". A
 * filesystem without fallocate: EOPNOTSUPP, with the fix. */
struct orch_audit *orch_audit_open(struct orch_loop *l, const char *dir, const char *key_path,
                                   enum orch_audit_sync sync, struct orch_err *err);
void orch_audit_close(struct orch_audit *a);
/* When a file is made, those that ended longer ago are removed, oldest first; a line "prune" says
 * so. 0: all are kept. */
void orch_audit_keep(struct orch_audit *a, int64_t ms);

/* Queues one line: {"ts":…,"seq":…,"event":"…",FIELDS,"prev":…,"hash":…}; seq counts from 1.
 * fields: JSON members without braces, composed by the caller, valid; event: a plain word. Nothing
 * is written yet (unless 4 MiB are queued), but there is room on the disk for it; `reserve`: also
 * for the outcome, which then must follow, also when the call does not run. Nothing is queued on an
 * error: -ENOSPC or -EDQUOT (this call is refused, a later one may fit; of the last hundredth of
 * the disk, at most 1 GiB, calls take nothing), -EMSGSIZE (shorten), -EINVAL (a newline in fields,
 * or what the scanner of base/json does not read; of a call's two lines, which come often, the
 * caller sees to that), or what broke the log. */
int orch_audit_add(struct orch_audit *a, const char *event, struct orch_slice fields, bool reserve,
                   struct orch_err *err);
/* Like add, for the outcome of a reserved call, whose reservation it uses. Needs no more space, so
 * only a broken log refuses it. Over the maximum: -EMSGSIZE, the reservation stays: shorten and
 * call again. */
int orch_audit_add_outcome(struct orch_audit *a, struct orch_slice fields, struct orch_err *err);
/* Writes all that is queued with one write (and fdatasync when sync is each). Before a decision the
 * file is looked for where it was made: when it is not there any more, or not as it was left, the
 * log goes on in a new one, whose first line says so. On failure the queued lines are dropped, with
 * what was reserved for their calls, the file is cut back to where it ended before, err says why,
 * and orch_audit_broken is true from then on: every later add and flush fails with the same error;
 * only where no new file could be made, and no outcome was lost, the next call tries again. */
int orch_audit_flush(struct orch_audit *a, struct orch_err *err);
/* Adds and writes what is no call's; what fails is logged. a may be NULL: then there is no log
 * yet. */
void orch_audit_note(struct orch_audit *a, const char *event, struct orch_slice fields);
bool orch_audit_broken(const struct orch_audit *a);
/* the file; the folder while there is none */
const char *orch_audit_path(const struct orch_audit *a);
/* HMAC with the key over bytes (RFC 8785 JSON), as hex. */
void orch_audit_digest(struct orch_audit *a, struct orch_slice canonical, char out[65]);

struct orch_audit_report {
    uint64_t lines;          /* right ones, up to the first problem */
    uint64_t unsigned_lines; /* those of them after the head; all when there is no right head */
    bool ok, has_head;
    bool running;       /* it is being written */
    bool ended;         /* else: its process came to its end, and did not crash */
    bool missing;       /* other files say that it was there */
    size_t cut;         /* bytes of a last, unsigned line, which its process did not live to end */
    char problem[512];  /* the first, as file:line: what */
    char head_hash[65]; /* of the last right line; kept elsewhere it proves all up to it */
};
/* Checks one file: every line strict JSON, seq without gap, prev and hash right, the first one its
 * own, head there and right. key_path NULL: the head's signature is not checked. expect_head: a
 * hash kept elsewhere, which one of the lines must have, or NULL. 0 when it could be read; r->ok is
 * the verdict. */
int orch_audit_verify(const char *path, const char *key_path, const char *expect_head,
                      struct orch_audit_report *r, struct orch_err *err);

struct orch_audit_summary {
    bool ok, head_seen; /* head_seen: a line has the hash expect_head */
    size_t files, bad;  /* bad: with the missing ones, which are not among the files */
    size_t running, crashed;
    uint64_t lines, unsigned_lines;
    char pruned[64];    /* the last file that was removed because of its age; empty: none */
    char problem[512];  /* the first */
    char head_hash[65]; /* of the newest file */
};
typedef void orch_audit_each_fn(void *ud, const char *path, const struct orch_audit_report *r);
/* Checks all files in dir, and that they are all: each is told, the missing ones last. A folder
 * that is not there has no files. */
int orch_audit_verify_dir(const char *dir, const char *key_path, const char *expect_head,
                          orch_audit_each_fn *each, void *ud, struct orch_audit_summary *s,
                          struct orch_err *err);

bool orch_audit_running(const char *path); /* whether its writer runs */
/* The log files in dir, oldest first; none when dir does not exist. */
int orch_audit_list(const char *dir, char ***paths, size_t *n, struct orch_err *err);
void orch_audit_list_free(char **paths, size_t n);

#endif
