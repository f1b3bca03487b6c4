/* Event streams: however the bytes are cut, the same events come; no bound is passed; an event that
 * was read and is written again is read the same. */
#include "http/wire.h"

#include <errno.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define MUST(x) \
    do { \
        if (!(x)) \
            __builtin_trap(); \
    } while (0)

enum { LINE_MAX = 200, EVENT_MAX = 300 };

static void put(struct orch_buf *out, struct orch_slice s)
{
    orch_buf_printf(out, "%zu:", s.n);
    orch_buf_slice(out, s);
}

static int note(void *ud, const struct orch_sse_event *e)
{
    struct orch_buf *out = ud;
    MUST(e->data.n <= EVENT_MAX && e->id.n <= LINE_MAX && e->event.n <= LINE_MAX);
    put(out, e->id);
    put(out, e->event);
    put(out, e->data);
    orch_buf_printf(out, "%lld;", (long long)e->retry_ms);
    return 0;
}

struct again {
    struct orch_buf stream, *heard;
    bool had_id, had_retry, faithful; /* faithful: nothing that writing changes */
};

static int write_again(void *ud, const struct orch_sse_event *e)
{
    struct again *a = ud;
    int rc = orch_sse_put(&a->stream, e);
    MUST((rc == 0) == !(e->event.n && memchr(e->event.p, 0, e->event.n)));
    a->faithful = a->faithful && rc == 0;
    /* "id" alone and "retry: 0" take back what was said before; orch never writes them. */
    a->faithful = a->faithful && (e->id.n || !a->had_id) && (e->retry_ms || !a->had_retry);
    a->had_id = a->had_id || e->id.n;
    a->had_retry = a->had_retry || e->retry_ms;
    return note(a->heard, e);
}

static int feed(struct orch_slice s, size_t step, orch_sse_fn *fn, void *ud, int64_t *retry)
{
    struct orch_sse_reader r = { .max_line_bytes = LINE_MAX, .max_event_bytes = EVENT_MAX };
    int rc = 0;
    for (size_t i = 0; i < s.n && rc == 0; i += step) {
        rc = orch_sse_feed(&r, (struct orch_slice){ s.p + i, s.n - i < step ? s.n - i : step }, fn,
                           ud);
        MUST(rc == 0 || rc == -EMSGSIZE);
        MUST(r.line.n <= LINE_MAX && r.data.n <= EVENT_MAX && r.id.n <= LINE_MAX &&
             r.event.n <= LINE_MAX && r.retry_ms >= 0);
    }
    *retry = r.retry_ms;
    orch_sse_reader_fini(&r);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 1)
        return 0;
    struct orch_slice s = { (const char *)data + 1, n - 1 };
    cleanup_buf struct orch_buf whole = { 0 };
    cleanup_buf struct orch_buf cut = { 0 };
    cleanup_buf struct orch_buf heard = { 0 };
    cleanup_buf struct orch_buf back = { 0 };
    struct again a = { .heard = &heard, .faithful = true };
    int64_t r1, r2;
    int x = feed(s, n, note, &whole, &r1), y = feed(s, 1 + data[0] % 8, note, &cut, &r2);
    MUST(x == y && whole.n == cut.n &&
         memcmp(whole.p ? whole.p : "", cut.p ? cut.p : "", whole.n) == 0);
    MUST(x < 0 || r1 == r2);
    x = feed(s, n, write_again, &a, &r1);
    if (x == 0 && a.faithful) {
        x = feed((struct orch_slice){ a.stream.p, a.stream.n }, n, note, &back, &r2);
        MUST(x < 0 || (back.n == heard.n &&
                       memcmp(back.p ? back.p : "", heard.p ? heard.p : "", heard.n) == 0));
    }
    orch_buf_free(&a.stream);
    return 0;
}
