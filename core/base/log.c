#include "log.h"

#include "json.h"

#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

enum { LINE_MAX_BYTES = 8192 };

static _Thread_local const struct orch_log *in_force; /* NULL: none was put */

static const char *const level_names[] = { "debug", "info", "warn", "error" };

const struct orch_log *orch_log_use(const struct orch_log *l)
{
    const struct orch_log *before = in_force;
    in_force = l;
    return before;
}

static const struct orch_log *current(void)
{
    static const struct orch_log nobodys = { .least = ORCH_WARN };
    return in_force ? in_force : &nobodys;
}

bool orch_log_on(enum orch_level level)
{
    return level >= current()->least;
}

int orch_log_parse_level(const char *name)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(level_names); i++)
        if (strcmp(name, level_names[i]) == 0)
            return (int)i;
    return -1;
}

/* Length of a UTF-8 sequence that must not reach a terminal: C1 controls, zero-width, bidi and
 * other format characters (Unicode's Cf). */
static size_t unsafe_sequence(const unsigned char *s, size_t n)
{
    if (n >= 2 && s[0] == 0xc2 && s[1] >= 0x80 && s[1] < 0xa0)
        return 2; /* C1 */
    if (n >= 2 && s[0] == 0xd8 && ((s[1] >= 0x80 && s[1] <= 0x85) || s[1] == 0x9c))
        return 2; /* U+0600–0605, U+061C */
    if (n >= 2 && s[0] == 0xc2 && s[1] == 0xad)
        return 2; /* soft hyphen */
    if (n < 3)
        return 0;
    if (s[0] == 0xe2 && s[1] == 0x80 &&
        ((s[2] >= 0x8b && s[2] <= 0x8f) || (s[2] >= 0xa8 && s[2] <= 0xae)))
        return 3; /* U+200B–200F, U+2028–202E */
    if (s[0] == 0xe2 && s[1] == 0x81 && s[2] >= 0xa0 && s[2] <= 0xaf)
        return 3; /* U+2060–206F */
    if ((s[0] == 0xef && s[1] == 0xbb && s[2] == 0xbf) ||
        (s[0] == 0xe1 && s[1] == 0xa0 && s[2] == 0x8e))
        return 3; /* U+FEFF, U+180E */
    if (s[0] == 0xef && s[1] == 0xbf && s[2] >= 0xb9 && s[2] <= 0xbb)
        return 3; /* U+FFF9–FFFB */
    if (n >= 4 && s[0] == 0xf0 && s[1] == 0x9d && s[2] == 0x85 && s[3] >= 0xb3 && s[3] <= 0xba)
        return 4; /* U+1D173–1D17A */
    if (n >= 4 && s[0] == 0xf0 && s[1] == 0x93 && s[2] == 0x90 && s[3] >= 0xb0)
        return 4; /* U+13430–1343F */
    if (n >= 4 && s[0] == 0xf3 && s[1] == 0xa0 && (s[2] == 0x80 || s[2] == 0x81))
        return 4; /* tags */
    return 0;
}

static size_t utf8_length(unsigned char c)
{
    return c < 0x80 ? 1 : c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc2 ? 2 : 0;
}

void orch_escape_terminal(struct orch_buf *out, struct orch_slice s, bool keep_nl)
{
    const unsigned char *p = (const unsigned char *)s.p;
    for (size_t i = 0; i < s.n;) {
        unsigned char c = p[i];
        if (c == '\n' && keep_nl) {
            orch_buf_char(out, '\n');
            i++;
            continue;
        }
        if (c < 0x20 || c == 0x7f) {
            if (c == '\n')
                orch_buf_str(out, "\\n");
            else if (c == '\t')
                orch_buf_char(out, '\t');
            else
                orch_buf_printf(out, "\\x%02x", c);
            i++;
            continue;
        }
        size_t n = unsafe_sequence(p + i, s.n - i);
        size_t length = n ? n : utf8_length(c);
        bool valid = length && i + length <= s.n &&
                     orch_utf8_valid((struct orch_slice){ s.p + i, length });
        if (valid && !n) {
            orch_buf_add(out, p + i, length);
            i += length;
            continue;
        }
        for (size_t k = valid ? length : 1; k; k--, i++)
            orch_buf_printf(out, "\\x%02x", p[i]);
    }
}

static void emit(enum orch_level level, struct orch_slice msg, struct orch_slice fields)
{
    const struct orch_log *log = current();
    cleanup_buf struct orch_buf line = { 0 };
    if (msg.n > LINE_MAX_BYTES)
        msg.n = LINE_MAX_BYTES;
    if (log->json) {
        struct timespec ts;
        struct tm tm;
        clock_gettime(CLOCK_REALTIME, &ts);
        gmtime_r(&ts.tv_sec, &tm);
        char when[32];
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &tm);
        orch_buf_printf(&line, "{\"ts\":\"%s.%03ldZ\",\"level\":\"%s\",\"msg\":", when,
                        ts.tv_nsec / 1000000, level_names[level]);
        orch_json_quote(&line, msg);
        if (fields.n) {
            orch_buf_str(&line, ",\"fields\":");
            orch_buf_slice(&line, fields);
        }
        orch_buf_str(&line, "}\n");
    } else {
        orch_buf_printf(&line, "orch: %s%s", level == ORCH_INFO ? "" : level_names[level],
                        level == ORCH_INFO ? "" : ": ");
        orch_escape_terminal(&line, msg, false);
        if (fields.n) {
            orch_buf_char(&line, ' ');
            orch_escape_terminal(&line, fields, false);
        }
        orch_buf_char(&line, '\n');
    }
    if (log->write)
        log->write(log->ud, line.p, line.n);
    else
        (void)orch_write_all(STDERR_FILENO, line.p, line.n);
}

void orch_log(enum orch_level level, const char *fmt, ...)
{
    if (!orch_log_on(level))
        return;
    cleanup_free char *msg = NULL;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&msg, fmt, ap);
    va_end(ap);
    if (n >= 0)
        emit(level, (struct orch_slice){ msg, (size_t)n }, (struct orch_slice){ 0 });
}

void orch_log_fields(enum orch_level level, struct orch_slice msg, struct orch_slice fields)
{
    if (orch_log_on(level))
        emit(level, msg, fields);
}

void orch_log_print(struct orch_slice msg)
{
    emit(ORCH_INFO, msg, (struct orch_slice){ 0 });
}
