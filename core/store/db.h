/* The state database: one SQLite file, 0600, in the state directory; this room is SQLite's only
 * user. The library is loaded at the first use, since most starts never need it. Tables yet:
 * trust. */
#ifndef ORCH_STORE_DB_H
#define ORCH_STORE_DB_H

#include "../base/err.h"

struct orch_db;
/* Made with its folder (0700) and tables when absent. Any call may wait 5 s for another process
 * (EBUSY). A damaged file (EUCLEAN) or one of another format (EPROTO) is left as it is. Without the
 * build feature `trust` every open fails with ENOTSUP. */
struct orch_db *orch_db_open(const char *path, struct orch_err *err);
void orch_db_close(struct orch_db *db);

/* Trust of one folder (absolute real path). `files` are "relative or absolute path" → hex
 * SHA-256. */
struct orch_trust_file {
    char *path;
    char sha256[65];
};
/* Replaces what is recorded. edits: later edits are accepted too. */
int orch_db_trust_set(struct orch_db *db, const char *dir, bool edits,
                      const struct orch_trust_file *files, size_t n, struct orch_err *err);
/* 1 found, 0 not, negative errno. *files is malloc'ed, freed with orch_trust_files_free. */
int orch_db_trust_get(struct orch_db *db, const char *dir, bool *edits,
                      struct orch_trust_file **files, size_t *n, struct orch_err *err);
int orch_db_trust_forget(struct orch_db *db, const char *dir, struct orch_err *err);
void orch_trust_files_free(struct orch_trust_file *files, size_t n);

#endif
