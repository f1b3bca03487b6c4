/* Regular expressions (PCRE2, UTF-8, ASCII classes) that end whatever pattern and subject are: a
 * match limit of 100,000 for each starting point, depth and heap limits, and a deadline of 100 ms
 * plus 100 ns for each byte of the subject. The deadline is there because the match limit counts
 * backtracking, not scanning: `a*a*b` on 64 KiB takes minutes within it. Both meet in automatic
 * callouts, which cost a third in backtracking patterns and nothing in those that start with a
 * literal.
 *
 * Written as in JSON Schema as far as PCRE2 goes: `$` is the very end, \uXXXX is a character. */
#ifndef ORCH_SCRIPT_REGEX_H
#define ORCH_SCRIPT_REGEX_H

#include "../base/err.h"
#include <lua.h>

struct orch_regex; /* for one thread at a time */

/* NULL: err names the fault and its offset. Patterns of more than 16 KiB are refused. */
struct orch_regex *orch_regex_compile(struct orch_slice pattern, struct orch_err *err);
void orch_regex_free(struct orch_regex *re);

/* Appends `in` to out with every match that is not empty replaced, and returns how many there were.
 * With none, nothing is appended: the bytes stay as they came. -EOVERFLOW: a limit was hit,
 * -EILSEQ: `in` is not UTF-8; out is as before, and `in` must not be shown. */
int orch_regex_replace(struct orch_regex *re, struct orch_slice in, struct orch_slice with,
                       struct orch_buf *out);

/* Pushes compile(pattern) -> matcher | nil, message. matcher(s) -> boolean; matcher:find(s, init)
 * -> first, last | nil. Raises "pattern match limit", and for strings that are not UTF-8. */
int orch_luaopen_regex(lua_State *L);

#endif
