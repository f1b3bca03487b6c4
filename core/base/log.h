/* The log: one line an event on stderr or to an embedder, never on stdout. Text or JSON. Control,
 * bidi and zero-width characters are escaped, so that what a peer wrote cannot drive a terminal.
 * Each handle has its own, the program one: who enters a handle puts its log in force in this
 * thread, so that whatever runs below writes to the right one without being told. */
#ifndef ORCH_BASE_LOG_H
#define ORCH_BASE_LOG_H

#include "util.h"

enum orch_level { ORCH_DEBUG, ORCH_INFO, ORCH_WARN, ORCH_ERROR };

struct orch_log {
    enum orch_level least; /* nothing below it */
    bool json;
    void (*write)(void *ud, const char *line, size_t n); /* NULL: to stderr */
    void *ud;
};

/* Puts l (borrowed; NULL: warnings and errors, as text, to stderr) in force in this thread; the one
 * that was, to be put back when its time is over. */
const struct orch_log *orch_log_use(const struct orch_log *l);

bool orch_log_on(enum orch_level level);
int orch_log_parse_level(const char *name); /* -1 unknown */

void orch_log(enum orch_level level, const char *fmt, ...) ORCH_PRINTF(2, 3);
/* `fields`: a JSON object's bytes or empty; written as they are in JSON mode, after the text
 * else. */
void orch_log_fields(enum orch_level level, struct orch_slice msg, struct orch_slice fields);
/* Info that is shown whatever the level: what a trusted script prints, progress of long work. */
void orch_log_print(struct orch_slice msg);

/* Appends s so that a terminal shows it and obeys nothing in it. Newline becomes \n unless
 * keep_nl. */
void orch_escape_terminal(struct orch_buf *out, struct orch_slice s, bool keep_nl);

#endif
