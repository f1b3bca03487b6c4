/* Inside core/store: what writing the audit log (audit.c), its folder (audit_dir.c) and reading it
 * (audit_verify.c) share. */
#ifndef ORCH_STORE_AUDIT_INT_H
#define ORCH_STORE_AUDIT_INT_H

#include "../base/hash.h"
#include "audit.h"

enum {
    ORCH_AUDIT_HEX = 2 * ORCH_SHA256_BYTES,
    /* what follows the hashed bytes of a line, without its newline */
    ORCH_AUDIT_TAIL = sizeof ",\"hash\":\"\"}" - 1 + ORCH_AUDIT_HEX,
    ORCH_AUDIT_NAME_MAX = 64,
    ORCH_AUDIT_DEPTH_MAX = 256, /* deeper than a message may be: a line wraps what one has */
};

#define ORCH_AUDIT_NEWEST "newest" /* the folder's record of the file that was made last */

/* A line of a file. seq 0: none could be read there. */
struct orch_audit_point {
    char file[ORCH_AUDIT_NAME_MAX];
    uint64_t seq;
    char hash[ORCH_AUDIT_HEX + 1];
};

/* ---- audit_dir.c */

/* -ENOENT without err when there is none. */
int orch_audit_key_read(const char *path, struct orch_hmac_key *key, struct orch_err *err);
int orch_audit_key_need(const char *path, struct orch_hmac_key *key, struct orch_err *err);
/* Made when it is not there; a descriptor, or a negative errno: others may write to it. */
int orch_audit_dir_open(const char *dir, struct orch_err *err);
/* For one at a time, of all that share the key: a descriptor to close. It is the key that is
 * locked, since who may only read it must not hold up who writes. */
int orch_audit_lock(const char *key_path, struct orch_err *err);
/* HMAC over "SEQ:HASH", and over "newest:NAME". */
void orch_audit_head_hmac(const struct orch_hmac_key *key, uint64_t seq, const char *hash,
                          char out[ORCH_AUDIT_HEX + 1]);
int orch_audit_head_write(int dir, const char *name, const struct orch_hmac_key *key, uint64_t seq,
                          const char *hash);
int orch_audit_newest_write(int dir, const struct orch_hmac_key *key, const char *name);
/* 0, -ENOENT, or -EBADMSG with what is wrong in why. key NULL: not checked. */
int orch_audit_newest_read(int dir, const struct orch_hmac_key *key, char name[ORCH_AUDIT_NAME_MAX],
                           const char **why);
/* p->file's last whole line. */
void orch_audit_last_line(int dir, struct orch_audit_point *p);
/* Whether its writer runs. */
bool orch_audit_written(int fd);
/* The log's files in dir, or their heads (suffix ".jsonl", ".jsonl.head"), by name, which is the
 * order in which they were made; for orch_audit_list_free. */
int orch_audit_names(int dir, const char *suffix, char ***names, size_t *n);
/* Removes the oldest files that ended before `before`, up to the first that did not, or is `own`;
 * said by `say` first, with the last of them and how many: negative keeps them. */
int orch_audit_prune(int dir, const char *own, time_t before,
                     int (*say)(void *ud, const struct orch_audit_point *last, size_t n), void *ud);

#endif
