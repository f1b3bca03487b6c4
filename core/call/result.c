/* What comes of a call, as the members of an MCP result or as a JSON-RPC error. */
#include "call_int.h"

#include "../script/jsonlib.h"

#include <lauxlib.h>
#include <stdio.h>
#include <string.h>

static void put_meta(struct orch_call *c)
{
    struct orch_buf *b = &c->text;
    orch_buf_str(b, ",\"_meta\":{\"orch/decision\":\"");
    orch_buf_str(b, orch_decision_words[c->decision]);
    orch_buf_str(b, "\",\"orch/call\":\"");
    orch_buf_str(b, c->id);
    orch_buf_char(b, '"');
    if (c->isolation) {
        orch_buf_str(b, ",\"orch/isolation\":\"");
        orch_buf_str(b, c->isolation);
        orch_buf_char(b, '"');
    }
    if (c->modern) {
        orch_buf_str(b, ",\"" ORCH_MCP_META "serverInfo\":");
        orch_buf_str(b, c->server_info);
    }
    orch_buf_char(b, '}');
}

void orch_call_put_origin(const struct orch_call *c, struct orch_buf *b)
{
    orch_buf_printf(b, "\"_meta\":{\"orch/call\":\"%s\",\"" ORCH_MCP_META "serverInfo\":%s}", c->id,
                    c->server_info);
}

static void put_text_result(struct orch_call *c, struct orch_slice prefix, struct orch_slice text,
                            bool is_error)
{
    struct orch_buf *b = &c->text;
    b->n = 0;
    orch_buf_str(b, "\"content\":[{\"type\":\"text\",\"text\":");
    if (prefix.n) {
        cleanup_buf struct orch_buf whole = { 0 };
        orch_buf_slice(&whole, prefix);
        orch_buf_slice(&whole, text);
        orch_json_quote(b, (struct orch_slice){ whole.p, whole.n });
    } else {
        orch_json_quote(b, text);
    }
    orch_buf_str(b, "}]");
    if (is_error)
        orch_buf_str(b, ",\"isError\":true");
    c->is_error = is_error;
    put_meta(c);
}

void orch_call_text(struct orch_call *c, struct orch_slice text, bool is_error)
{
    put_text_result(c, (struct orch_slice){ 0 }, text, is_error);
}

void orch_call_fail_text(struct orch_call *c, const char *kind, struct orch_slice text)
{
    cleanup_free char *prefix = orch_xasprintf("%s: ", kind);
    put_text_result(c, orch_slice_str(prefix), text, true);
}

void orch_call_fail(struct orch_call *c, const struct orch_err *err)
{
    if (err->cls == ORCH_CLASS_CANCELLED) /* a task's, which says so itself */
        orch_call_text(c, orch_slice_str(err->msg), true);
    else
        orch_call_fail_text(c, err->cls == ORCH_CLASS_ISOLATION ? "not run" : "failed",
                            orch_slice_str(err->msg));
}

static void fail(struct orch_call *c, const char *text)
{
    orch_call_fail_text(c, "failed", orch_slice_str(text));
}

void orch_call_rpc_error(struct orch_call *c, int code, struct orch_slice text)
{
    c->rpc_code = code;
    c->is_error = true;
    c->text.n = 0;
    orch_buf_slice(&c->text, text);
}

void orch_call_members(struct orch_call *c, struct orch_slice members)
{
    c->text.n = 0;
    orch_buf_slice(&c->text, members);
}

void orch_call_missing(struct orch_call *c)
{
    struct orch_buf *b = &c->rpc_data;
    unsigned m = c->missing;
    b->n = 0;
    orch_buf_str(b, "{\"requiredCapabilities\":{");
    if (m & (ORCH_MCP_CAP_FORM | ORCH_MCP_CAP_URL))
        orch_buf_printf(b, "\"elicitation\":{\"%s\":{}},", m & ORCH_MCP_CAP_URL ? "url" : "form");
    if (m & (ORCH_MCP_CAP_SAMPLING | ORCH_MCP_CAP_SAMPLING_TOOLS))
        orch_buf_str(b, m & ORCH_MCP_CAP_SAMPLING_TOOLS ? "\"sampling\":{\"tools\":{}},"
                                                        : "\"sampling\":{},");
    if (m & ORCH_MCP_CAP_ROOTS)
        orch_buf_str(b, "\"roots\":{},");
    if (m & ORCH_MCP_CAP_TASKS)
        orch_buf_str(b, "\"extensions\":{\"" ORCH_MCP_META "tasks\":{}},");
    b->n--;
    orch_buf_str(b, "}}");
    orch_call_rpc_error(c, ORCH_RPC_MISSING_CAPABILITY,
                        ORCH_SLICE("Missing required client capability"));
}

/* ---- of a Lua tool */

/* Raw: no call protects us here, and no budget would end a metamethod. */
static void push_field(lua_State *L, int idx, const char *key)
{
    lua_pushstring(L, key);
    lua_rawget(L, idx);
}

static struct orch_slice get_string(lua_State *L, int idx, const char *key)
{
    struct orch_slice s = { 0 };
    push_field(L, idx, key);
    if (lua_type(L, -1) == LUA_TSTRING)
        s.p = lua_tolstring(L, -1, &s.n);
    lua_pop(L, 1); /* anchored in the result table */
    return s;
}

/* Checks `structured` (at the top) against the tool's output schema; an error
 * text, kept in why, or NULL. */
static const char *check_output(struct orch_call *c, lua_State *L, char *why, size_t n)
{
    struct orch_err err = { 0 };
    lua_State *main = orch_state_lua(c->tool->state);
    if (c->tool->output_ref == LUA_NOREF)
        return NULL;
    lua_rawgeti(main, LUA_REGISTRYINDEX, c->tool->output_ref);
    lua_pushvalue(L, -1);
    lua_xmove(L, main, 1);
    if (orch_state_pcall(c->tool->state, 1, 2, &err) < 0) {
        snprintf(why, n, "%.500s", err.msg);
        return why;
    }
    const char *text = lua_toboolean(main, -2) ? NULL : lua_tostring(main, -1);
    if (text)
        snprintf(why, n, "structured result: %s", text);
    lua_pop(main, 2);
    return text ? why : NULL;
}

/* The table a tool returned: { text, structured, is_error, content }. */
static void take_result_table(struct orch_call *c, lua_State *L, int idx)
{
    char why[512];
    struct orch_slice text = get_string(L, idx, "text");
    cleanup_buf struct orch_buf structured = { 0 };
    cleanup_buf struct orch_buf content = { 0 };
    push_field(L, idx, "is_error");
    bool is_error = lua_toboolean(L, -1);
    push_field(L, idx, "structured");
    if (!lua_isnil(L, -1)) {
        const char *problem = check_output(c, L, why, sizeof why);
        if (problem) {
            fail(c, problem);
            return;
        }
        if (orch_lua_encode_json(L, -1, &structured, why, sizeof why) < 0) {
            cleanup_free char *m = orch_xasprintf("structured result: %s", why);
            fail(c, m);
            return;
        }
    }
    push_field(L, idx, "content");
    if (!lua_isnil(L, -1) && orch_lua_encode_json(L, -1, &content, why, sizeof why) < 0) {
        cleanup_free char *m = orch_xasprintf("content: %s", why);
        fail(c, m);
        return;
    }
    if (content.n && content.p[0] != '[') {
        fail(c, "content must be a list of MCP content blocks");
        return;
    }
    struct orch_buf *b = &c->text;
    b->n = 0;
    orch_buf_str(b, "\"content\":");
    if (content.n) {
        orch_buf_slice(b, (struct orch_slice){ content.p, content.n });
    } else {
        orch_buf_str(b, "[{\"type\":\"text\",\"text\":");
        orch_json_quote(b, text.p ? text : (struct orch_slice){ structured.p, structured.n });
        orch_buf_str(b, "}]");
    }
    /* Before 2026-07-28 only an object is allowed there. */
    if (structured.n && (structured.p[0] == '{' || c->modern)) {
        orch_buf_str(b, ",\"structuredContent\":");
        orch_buf_slice(b, (struct orch_slice){ structured.p, structured.n });
    }
    if (is_error)
        orch_buf_str(b, ",\"isError\":true");
    c->is_error = is_error;
    put_meta(c);
}

void orch_call_take_lua(struct orch_call *c, lua_State *L, int nres)
{
    int first = lua_gettop(L) - nres + 1;
    int type = nres ? lua_type(L, first) : LUA_TNIL;
    if (type == LUA_TTABLE) {
        take_result_table(c, L, first);
    } else if (type == LUA_TSTRING) {
        size_t n;
        const char *s = lua_tolstring(L, first, &n);
        orch_call_text(c, (struct orch_slice){ s, n }, false);
    } else if (type == LUA_TNIL && nres >= 2) {
        const char *code = nres >= 3 && lua_type(L, first + 2) == LUA_TSTRING
                               ? lua_tostring(L, first + 2)
                               : NULL;
        struct orch_slice why = ORCH_SLICE("the tool gave no reason");
        const char *text = lua_tolstring(L, first + 1, &why.n); /* a guest's output may be in it */
        if (text)
            why.p = text;
        else
            why = ORCH_SLICE("the tool gave no reason");
        orch_call_fail_text(c, code && strcmp(code, "isolation") == 0 ? "not run" : "failed", why);
        if (code && strcmp(code, "capability") == 0 && c->modern && c->missing)
            orch_call_missing(c);
        else if (nres >= 3 && lua_type(L, first + 2) == LUA_TNUMBER) /* it wants a JSON-RPC error */
            orch_call_rpc_error(c, (int)lua_tonumber(L, first + 2), why);
    } else {
        cleanup_free char *m = orch_xasprintf(
            "%s: run must return a table, a string, or nil and an error; it returned %s",
            c->tool->name, lua_typename(L, type));
        fail(c, m);
    }
}

void orch_call_withhold(struct orch_call *c, const char *text)
{
    c->rpc_code = 0;
    fail(c, text);
}

void orch_call_redact(struct orch_call *c)
{
    if (!c->n_redact || c->decision != ORCH_ALLOW)
        return;
    cleanup_buf struct orch_buf whole = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (c->rpc_code)
        orch_json_quote(&whole, (struct orch_slice){ c->text.p, c->text.n });
    else {
        orch_buf_char(&whole, '{');
        orch_buf_slice(&whole, (struct orch_slice){ c->text.p, c->text.n });
        orch_buf_char(&whole, '}');
    }
    if (orch_json_scan(&d, (struct orch_slice){ whole.p, whole.n },
                       &(struct orch_json_limits){ .bytes = 256 << 20, .depth = 1000 },
                       &fault) < 0 ||
        orch_redact_json(c->gen, c->redact, c->n_redact, &d, 0, &out) < 0) {
        orch_call_withhold(c, "the result was withheld: a redact pattern hit its match limit");
        return;
    }
    c->text.n = 0;
    if (c->rpc_code) {
        cleanup_json struct orch_json_doc text = { 0 };
        if (orch_json_scan(&text, (struct orch_slice){ out.p, out.n },
                           &(struct orch_json_limits){ 0 }, &fault) == 0)
            orch_json_string(&text, 0, &c->text);
    } else {
        orch_buf_add(&c->text, out.p + 1, out.n - 2);
    }
}
