/* What the audit log holds of a call: two lines, its decision before it runs, its outcome before it
 * is answered. */
#include "call_int.h"

#include <errno.h>
#include <string.h>
#include <time.h>

enum {
    NAME_AUDIT_BYTES = 256, /* of an unknown tool */
    REASON_AUDIT_BYTES = 4096,
    URI_AUDIT_BYTES = 4096,
    /* Calls of one caller that do not run and are recorded each; of more the log has the number. */
    DENIED_AT_ONCE = 100,
    DENIED_EACH_US = 1000 * 1000,
    SUMMARY_MS = 5000,
    CALLERS_MAX = 64,
};

/* A call that was not judged is denied. */
const char *const orch_decision_words[] = { "deny", "allow", "ask", "deny" };

/* ---- calls that do not run */

/* Of one caller. An agent that is denied again and again does not fill the disk. */
struct orch_denials {
    struct orch_denials *next;
    char *caller;
    int64_t until_us; /* the time to which what was recorded is paid for */
    uint64_t counted;
    time_t since;
};

static struct orch_denials *denials_of(struct orch_calls *cs, const char *caller)
{
    struct orch_denials **at = &cs->denials;
    for (int n = 0; *at; at = &(*at)->next)
        if (++n == CALLERS_MAX || strcmp((*at)->caller, caller) == 0)
            return *at;
    *at = orch_xcalloc(1, sizeof **at);
    (*at)->caller = orch_xstrdup(caller);
    return *at;
}

static void put_count(struct orch_calls *cs, struct orch_denials *n)
{
    cleanup_buf struct orch_buf b = { 0 };
    char since[32];
    struct tm tm;
    gmtime_r(&n->since, &tm);
    strftime(since, sizeof since, "%Y-%m-%dT%H:%M:%SZ", &tm);
    orch_buf_str(&b, "\"caller\":");
    orch_json_quote(&b, orch_slice_str(n->caller));
    orch_buf_printf(&b, ",\"decision\":\"deny\",\"count\":%llu,\"since\":\"%s\"",
                    (unsigned long long)n->counted, since);
    orch_audit_note(cs->audit, "denied", orch_slice_of(&b));
    n->counted = 0;
}

static void put_counts(void *ud)
{
    struct orch_calls *cs = ud;
    for (struct orch_denials *n = cs->denials; n; n = n->next)
        if (n->counted)
            put_count(cs, n);
}

void orch_record_close(struct orch_calls *cs)
{
    put_counts(cs);
    orch_timer_free(cs->counts);
    cs->counts = NULL;
    for (struct orch_denials *n; (n = cs->denials);) {
        cs->denials = n->next;
        free(n->caller);
        free(n);
    }
}

/* Whether this one is recorded; else it is counted. */
static bool records_denied(struct orch_calls *cs, const char *caller)
{
    struct orch_denials *n = denials_of(cs, caller);
    int64_t now = orch_now_us(), at_once = (int64_t)DENIED_AT_ONCE * DENIED_EACH_US;
    if (n->until_us < now)
        n->until_us = now;
    if (n->until_us + DENIED_EACH_US <= now + at_once) {
        n->until_us += DENIED_EACH_US;
        return true;
    }
    if (n->counted++)
        return false;
    n->since = time(NULL);
    if (!cs->counts)
        cs->counts = orch_timer_new(cs->loop, put_counts, cs);
    orch_timer_set(cs->counts, SUMMARY_MS);
    return false;
}

/* ---- the decision */

static struct orch_slice at_most(struct orch_slice s, size_t n)
{
    while (n && n < s.n && (s.p[n] & 0xc0) == 0x80) /* whole characters */
        n--;
    return (struct orch_slice){ s.p, s.n < n ? s.n : n };
}

static void put_who(struct orch_call *c, struct orch_buf *b)
{
    orch_buf_str(b, "\"call\":\"");
    orch_buf_str(b, c->id);
    orch_buf_str(b, "\",");
    orch_buf_slice(b, orch_slice_of(&c->session->audit_fields));
}

static void put_digest(struct orch_call *c, const struct orch_json_doc *d, uint32_t args,
                       struct orch_buf *b)
{
    struct orch_buf *canonical = &c->calls->canonical;
    char digest[65];
    canonical->n = 0;
    if (args)
        orch_json_canonical(d, args, canonical);
    else
        orch_buf_str(canonical, "{}");
    orch_audit_digest(c->calls->audit, orch_slice_of(canonical), digest);
    orch_buf_str(b, ",\"args_digest\":\"");
    orch_buf_str(b, digest);
    orch_buf_char(b, '"');
}

static void put_decision(struct orch_call *c, const char *reason, const char *rules,
                         struct orch_buf *b)
{
    orch_buf_str(b, ",\"decision\":\"");
    orch_buf_str(b, orch_decision_words[c->decision]);
    orch_buf_char(b, '"');
    cleanup_buf struct orch_buf why = { 0 }; /* a predicate's error may quote an argument */
    if (reason) {
        orch_buf_str(&why, reason);
        bool hidden = c->gen->n_redact &&
                      orch_redact_text(c->gen, NULL, c->gen->n_redact, &why) < 0;
        orch_buf_str(b, ",\"reason\":");
        orch_json_quote(b, hidden ? ORCH_SLICE("[withheld: redaction limit]")
                                  : at_most(orch_slice_of(&why), REASON_AUDIT_BYTES));
    }
    orch_buf_str(b, ",\"rules\":");
    orch_buf_str(b, rules);
    orch_buf_slice(b, orch_slice_of(&c->gen->audit_field));
}

int orch_record_decision(struct orch_call *c, struct orch_slice name, const struct orch_json_doc *d,
                         uint32_t args, const char *reason, const char *rules, struct orch_err *err)
{
    struct orch_buf *fields = &c->calls->fields;
    bool runs = c->decision == ORCH_ALLOW && !c->rpc_code;
    bool unrecorded = false;
    const char *why = "";
    if (!runs && !records_denied(c->calls, c->session->caller))
        return 0;
    fields->n = 0;
    put_who(c, fields);
    orch_buf_str(fields, ",\"tool\":");
    orch_json_quote(fields,
                    c->tool ? orch_slice_str(c->tool->name) : at_most(name, NAME_AUDIT_BYTES));
    if (!c->tool && name.n > NAME_AUDIT_BYTES)
        orch_buf_printf(fields, ",\"tool_bytes\":%zu", name.n);
    if (orch_record_args(c->calls, c->gen, d, args, runs, fields, &why) < 0 && runs) {
        /* What cannot be recorded is not run. */
        unrecorded = true;
        orch_err_set(err, EMSGSIZE, "its arguments cannot be recorded: %s", why);
        c->decision = ORCH_DENY;
        reason = err->msg;
    }
    put_digest(c, d, args, fields);
    put_decision(c, reason, rules, fields);
    orch_json_one_line(fields, 0);
    int r = orch_audit_add(c->calls->audit, "decision", orch_slice_of(fields), true, err);
    c->reserved = r == 0;
    return r < 0 ? r : unrecorded;
}

int orch_record_outcome(struct orch_call *c, struct orch_err *err)
{
    char sha[65];
    struct orch_buf *b = &c->calls->fields;
    b->n = 0;
    orch_sha256_hex(c->text.p, c->text.n, sha);
    orch_buf_str(b, "\"call\":\"");
    orch_buf_str(b, c->id);
    orch_buf_str(b, "\",\"tool\":");
    orch_json_quote(b, orch_slice_str(c->tool ? c->tool->name : "?"));
    if (c->vm_id[0])
        orch_buf_printf(b, ",\"vm\":\"%s\"", c->vm_id);
    if (c->isolation)
        orch_buf_printf(b, ",\"isolation\":\"%s\"", c->isolation);
    if (c->cancelled)
        orch_buf_str(b, ",\"cancelled\":true");
    if (c->timed_out)
        orch_buf_str(b, ",\"timed_out\":true");
    int64_t us = orch_now_us() - c->begun_us;
    orch_buf_str(b, ",\"ms\":");
    orch_json_put_number(b,
                         (double)(us /
                                  1000)); /* whole numbers are cheap to print, fractions are not */
    int part = (int)(us % 1000);
    orch_buf_add(b,
                 (char[]){ '.', (char)('0' + part / 100), (char)('0' + part / 10 % 10),
                           (char)('0' + part % 10) },
                 4);
    orch_buf_str(b, c->is_error || c->rpc_code ? ",\"result\":{\"is_error\":true,\"bytes\":"
                                               : ",\"result\":{\"is_error\":false,\"bytes\":");
    orch_json_put_number(b, (double)c->text.n);
    orch_buf_str(b, ",\"sha256\":\"");
    orch_buf_str(b, sha);
    orch_buf_str(b, "\"}");
    return orch_audit_add_outcome(c->calls->audit, (struct orch_slice){ b->p, b->n }, err);
}

int orch_record_request(struct orch_call *c, struct orch_slice name, const struct orch_json_doc *d,
                        uint32_t args, struct orch_err *err)
{
    struct orch_audit *log = c->calls->audit;
    cleanup_buf struct orch_buf b = { 0 };
    const char *why = "";
    if (name.n > URI_AUDIT_BYTES)
        return orch_err_set(err, EMSGSIZE,
                            "not run: a name of %zu bytes cannot be recorded, at most %d are",
                            name.n, URI_AUDIT_BYTES);
    put_who(c, &b);
    orch_buf_printf(&b, ",\"method\":\"%s\",\"name\":", c->method);
    cleanup_buf struct orch_buf shown = { 0 };
    orch_buf_slice(&shown, name);
    if (c->gen->n_redact && orch_redact_text(c->gen, NULL, c->gen->n_redact, &shown) < 0)
        return orch_err_set(err, EOVERFLOW,
                            "not run: its name cannot be recorded: a redact "
                            "pattern hit its match limit");
    orch_json_quote(&b, orch_slice_of(&shown));
    if (args && orch_record_args(c->calls, c->gen, d, args, true, &b, &why) < 0)
        return orch_err_set(err, EMSGSIZE, "not run: its arguments cannot be recorded: %s", why);
    orch_buf_slice(&b, orch_slice_of(&c->gen->audit_field));
    orch_json_one_line(&b, 0);
    if (!log || orch_audit_broken(log))
        return orch_err_set(err, EIO, "not run: the audit log cannot be written");
    int r = orch_audit_add(log, "request", orch_slice_of(&b), false, err);
    return r < 0 ? r : orch_audit_flush(log, err);
}
