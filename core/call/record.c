/* What the audit log holds of a call: two lines, its decision before it runs, its outcome before it
 * is answered. */
#include "call_int.h"

#include "../script/regex.h"

#include <errno.h>
#include <string.h>

enum {
    ARGS_AUDIT_BYTES = 64 * 1024,
    NAME_AUDIT_BYTES = 256, /* of an unknown tool */
    REASON_AUDIT_BYTES = 4096,
    URI_AUDIT_BYTES = 4096,
};

/* A call that was not judged is denied. */
const char *const orch_decision_words[] = { "deny", "allow", "ask", "deny" };

/* ---- judging */

static void put_decision_fields(struct orch_call *c, struct orch_slice name, struct orch_slice args,
                                struct orch_slice canonical, const char *reason, const char *rules,
                                struct orch_buf *b)
{
    orch_buf_str(b, "\"call\":\"");
    orch_buf_str(b, c->id);
    orch_buf_str(b, "\",");
    orch_buf_slice(b,
                   (struct orch_slice){ c->session->audit_fields.p, c->session->audit_fields.n });
    orch_buf_str(b, ",\"tool\":");
    if (c->tool)
        orch_json_quote(b, orch_slice_str(c->tool->name));
    else
        orch_json_quote(b, (struct orch_slice){
                               name.p, name.n < NAME_AUDIT_BYTES ? name.n : NAME_AUDIT_BYTES });
    if (args.n <= ARGS_AUDIT_BYTES) {
        orch_buf_str(b, ",\"args\":");
        orch_buf_slice(b, args);
    } else {
        orch_buf_printf(b, ",\"args\":null,\"args_bytes\":%zu", args.n);
    }
    char digest[65];
    orch_audit_digest(c->calls->audit, canonical, digest);
    orch_buf_str(b, ",\"args_digest\":\"");
    orch_buf_str(b, digest);
    orch_buf_str(b, "\",\"decision\":\"");
    orch_buf_str(b, orch_decision_words[c->decision]);
    orch_buf_char(b, '"');
    if (reason) {
        orch_buf_str(b, ",\"reason\":");
        orch_json_quote(b, (struct orch_slice){ reason, strnlen(reason, REASON_AUDIT_BYTES) });
    }
    orch_buf_str(b, ",\"rules\":");
    orch_buf_str(b, rules);
    orch_buf_slice(b, (struct orch_slice){ c->gen->audit_field.p, c->gen->audit_field.n });
}

int orch_record_decision(struct orch_call *c, struct orch_slice name, const struct orch_json_doc *d,
                         uint32_t args, const char *reason, const char *rules, struct orch_err *err)
{
    struct orch_calls *cs = c->calls;
    struct orch_buf *canonical = &cs->canonical, *redacted = &cs->redacted, *fields = &cs->fields;
    fields->n = canonical->n = redacted->n = 0;
    struct orch_slice shown = ORCH_SLICE("{}");
    if (args)
        orch_json_canonical(d, args, canonical);
    else
        orch_buf_str(canonical, "{}");
    uint16_t all[256];
    size_t n = c->gen->n_redact < ORCH_ARRAY_LEN(all) ? c->gen->n_redact : ORCH_ARRAY_LEN(all);
    for (size_t i = 0; i < n; i++)
        all[i] = (uint16_t)i;
    if (args && c->gen->n_redact) {
        if (n < c->gen->n_redact || orch_redact_json(c->gen, all, n, d, args, redacted) < 0) {
            redacted->n = 0;
            orch_buf_str(redacted, "\"[withheld: redaction limit]\"");
        }
        shown = (struct orch_slice){ redacted->p, redacted->n };
    } else if (args) {
        shown = orch_json_raw(d, args);
    }
    cleanup_buf struct orch_buf why = { 0 }; /* a predicate's error may quote an argument */
    if (reason && c->gen->n_redact) {
        orch_buf_str(&why, reason);
        reason = n < c->gen->n_redact || orch_redact_text(c->gen, all, n, &why) < 0
                     ? "[withheld: redaction limit]"
                     : why.p;
    }
    put_decision_fields(c, name, shown, (struct orch_slice){ canonical->p, canonical->n }, reason,
                        rules, fields);
    orch_json_one_line(fields, 0);
    int r = orch_audit_add(cs->audit, "decision", (struct orch_slice){ fields->p, fields->n }, true,
                           err);
    c->reserved = r == 0;
    return r;
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

int orch_record_request(struct orch_call *c, struct orch_slice name, struct orch_err *err)
{
    struct orch_audit *log = c->calls->audit;
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_printf(&b, "\"call\":\"%s\",", c->id);
    orch_buf_slice(&b,
                   (struct orch_slice){ c->session->audit_fields.p, c->session->audit_fields.n });
    orch_buf_printf(&b, ",\"method\":\"%s\",\"name\":", c->method);
    orch_json_quote(&b, (struct orch_slice){ name.p,
                                             name.n > URI_AUDIT_BYTES ? URI_AUDIT_BYTES : name.n });
    orch_buf_slice(&b, (struct orch_slice){ c->gen->audit_field.p, c->gen->audit_field.n });
    if (!log || orch_audit_broken(log))
        return orch_err_set(err, EIO, "not run: the audit log cannot be written");
    int r = orch_audit_add(log, "request", (struct orch_slice){ b.p, b.n }, false, err);
    return r < 0 ? r : orch_audit_flush(log, err);
}
