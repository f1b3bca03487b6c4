#include "headers.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { DEPTH_MAX = 32, PARAMS_MAX = 64, PATH_MAX_BYTES = 4096 };

#define PREFIX "=?base64?"
#define SUFFIX "?="

static bool is_coded(struct orch_slice s)
{
    size_t n = sizeof PREFIX - 1, end = sizeof SUFFIX - 1;
    return s.n >= n + end && memcmp(s.p, PREFIX, n) == 0 &&
           memcmp(s.p + s.n - end, SUFFIX, end) == 0;
}

static int digit(char c)
{
    return c >= 'A' && c <= 'Z'   ? c - 'A'
           : c >= 'a' && c <= 'z' ? c - 'a' + 26
           : c >= '0' && c <= '9' ? c - '0' + 52
           : c == '+'             ? 62
           : c == '/'             ? 63
                                  : -1;
}

static int decode_base64(struct orch_slice s, struct orch_buf *out)
{
    if (s.n % 4)
        return -EINVAL;
    for (size_t i = 0; i < s.n; i += 4) {
        bool last = i + 4 == s.n;
        int pad = last && s.p[i + 3] == '=' ? (s.p[i + 2] == '=' ? 2 : 1) : 0;
        uint32_t v = 0;
        for (size_t k = 0; k < 4; k++) {
            int x = k >= 4u - (unsigned)pad ? 0 : digit(s.p[i + k]);
            if (x < 0)
                return -EINVAL;
            v = v << 6 | (uint32_t)x;
        }
        char bytes[3] = { (char)(v >> 16), (char)(v >> 8), (char)v };
        orch_buf_add(out, bytes, 3u - (unsigned)pad);
    }
    return 0;
}

int orch_mcp_header_decode(struct orch_slice value, struct orch_buf *out)
{
    size_t n = sizeof PREFIX - 1;
    orch_buf_reserve(out, value.n);
    if (is_coded(value))
        return decode_base64((struct orch_slice){ value.p + n, value.n - n - (sizeof SUFFIX - 1) },
                             out);
    for (size_t i = 0; i < value.n; i++)
        if ((unsigned char)value.p[i] < 0x20 || (unsigned char)value.p[i] > 0x7e)
            return -EINVAL;
    orch_buf_slice(out, value);
    return 0;
}

void orch_mcp_header_encode(struct orch_slice text, struct orch_buf *out)
{
    bool plain = !is_coded(text) && !(text.n && (text.p[0] == ' ' || text.p[text.n - 1] == ' '));
    for (size_t i = 0; i < text.n; i++)
        plain &= (unsigned char)text.p[i] >= 0x20 && (unsigned char)text.p[i] <= 0x7e;
    if (plain) {
        orch_buf_slice(out, text);
        return;
    }
    orch_buf_str(out, PREFIX);
    orch_base64(out, text.p, text.n, false);
    orch_buf_str(out, SUFFIX);
}

/* ---- annotations */

struct reading {
    const struct orch_json_doc *d;
    struct orch_mcp_param_list *out;
    char *path[DEPTH_MAX + 1];
    size_t depth;
};

static const char *add_param(struct reading *r, uint32_t property, uint32_t annotation)
{
    const struct orch_json_doc *d = r->d;
    cleanup_buf struct orch_buf name = { 0 };
    uint32_t type = orch_json_get(d, property, "type");
    if (orch_json_string(d, annotation, &name) < 0 || !name.n ||
        !orch_http_token_ok((struct orch_slice){ name.p, name.n }))
        return "x-mcp-header must be a header token";
    bool string = type && orch_json_string_eq(d, type, "string"),
         integer = type && orch_json_string_eq(d, type, "integer"),
         boolean = type && orch_json_string_eq(d, type, "boolean");
    if (!string && !integer && !boolean)
        return "x-mcp-header belongs to properties of type string, integer or boolean";
    size_t n_path = 0;
    for (size_t i = 0; i < r->depth; i++)
        n_path += strlen(r->path[i]);
    if (r->out->n == PARAMS_MAX || n_path > PATH_MAX_BYTES)
        return "too many x-mcp-header, or too long names of properties that lead to one";
    cleanup_free char *header = orch_xasprintf("Mcp-Param-%s", name.p);
    for (size_t i = 0; i < r->out->n; i++)
        if (orch_http_name_eq(orch_slice_str(header), r->out->params[i].header))
            return "two properties have the same x-mcp-header";
    r->out->params = orch_xrealloc(r->out->params, (r->out->n + 1) * sizeof *r->out->params);
    struct orch_mcp_param *p = &r->out->params[r->out->n++];
    *p = (struct orch_mcp_param){ .header = orch_steal_ptr(&header),
                                  .path = orch_xcalloc(r->depth + 1, sizeof *p->path),
                                  .integer = integer,
                                  .boolean = boolean };
    for (size_t i = 0; i < r->depth; i++)
        p->path[i] = orch_xstrdup(r->path[i]);
    return NULL;
}

static const char *read_schema(struct reading *r, uint32_t schema)
{
    const struct orch_json_doc *d = r->d;
    if (d->toks[schema].type != ORCH_JSON_OBJECT)
        return NULL;
    uint32_t annotation = orch_json_get(d, schema, "x-mcp-header"),
             properties = orch_json_get(d, schema, "properties");
    const char *why = annotation ? (r->depth ? add_param(r, schema, annotation)
                                             : "x-mcp-header belongs to a property")
                                 : NULL;
    if (why || !properties || d->toks[properties].type != ORCH_JSON_OBJECT || r->depth == DEPTH_MAX)
        return why;
    uint32_t key = properties + 1;
    for (uint32_t i = 0; !why && i < d->toks[properties].count; i++, key = d->toks[key + 1].next) {
        cleanup_buf struct orch_buf name = { 0 };
        orch_json_string(d, key, &name);
        r->path[r->depth++] = name.p ? name.p : (char *)(uintptr_t) "";
        why = read_schema(r, key + 1);
        r->depth--;
    }
    return why;
}

int orch_mcp_params_read(const struct orch_json_doc *d, uint32_t schema,
                         struct orch_mcp_param_list *out, const char **why)
{
    struct reading r = { .d = d, .out = out };
    *why = read_schema(&r, schema);
    if (!*why)
        return 0;
    orch_mcp_params_free(out);
    return -EINVAL;
}

static bool annotated_below(const struct orch_json_doc *d, uint32_t tok)
{
    const struct orch_json_tok *t = &d->toks[tok];
    bool object = t->type == ORCH_JSON_OBJECT;
    uint32_t child = tok + 1;
    if ((!object && t->type != ORCH_JSON_ARRAY) || orch_json_get(d, tok, "x-mcp-header"))
        return object;
    for (uint32_t i = 0; i < t->count; i++, child = d->toks[child].next) {
        child += object; /* past the key */
        if (annotated_below(d, child))
            return true;
    }
    return false;
}

const char *orch_mcp_params_astray(const struct orch_json_doc *d, uint32_t schema)
{
    static const char *const data[] = { "x-mcp-header", "default", "examples", "enum", "const" };
    uint32_t key = schema + 1;
    if (d->toks[schema].type != ORCH_JSON_OBJECT)
        return NULL;
    for (uint32_t i = 0; i < d->toks[schema].count; i++, key = d->toks[key + 1].next) {
        bool properties = orch_json_string_eq(d, key, "properties") &&
                          d->toks[key + 1].type == ORCH_JSON_OBJECT,
             skip = false;
        for (size_t n = 0; n < ORCH_ARRAY_LEN(data); n++)
            skip |= orch_json_string_eq(d, key, data[n]);
        if (!skip && !properties && annotated_below(d, key + 1))
            return "x-mcp-header stands where it cannot be reached by properties alone";
        uint32_t name = key + 2;
        for (uint32_t n = 0; properties && n < d->toks[key + 1].count;
             n++, name = d->toks[name + 1].next) {
            const char *why = orch_mcp_params_astray(d, name + 1);
            if (why)
                return why;
        }
    }
    return NULL;
}

static uint32_t argument(const struct orch_mcp_param *p, const struct orch_json_doc *d,
                         uint32_t args)
{
    uint32_t tok = args;
    for (char **name = p->path; tok && *name; name++)
        tok = d->toks[tok].type == ORCH_JSON_OBJECT ? orch_json_get(d, tok, *name) : 0;
    return tok;
}

bool orch_mcp_param_value(const struct orch_mcp_param *p, const struct orch_json_doc *d,
                          uint32_t args, struct orch_buf *out)
{
    cleanup_buf struct orch_buf text = { 0 };
    uint32_t tok = argument(p, d, args);
    int64_t whole;
    switch (tok ? d->toks[tok].type : 0) {
    case ORCH_JSON_STRING:
        orch_json_string(d, tok, &text);
        break;
    case ORCH_JSON_NUMBER:
        if (orch_json_int(d, tok, &whole))
            orch_buf_slice(&text, orch_json_raw(d, tok));
        else
            orch_json_put_number(&text, orch_json_number(d, tok));
        break;
    case ORCH_JSON_TRUE:
    case ORCH_JSON_FALSE:
        orch_buf_slice(&text, orch_json_raw(d, tok));
        break;
    default:
        return false;
    }
    orch_mcp_header_encode((struct orch_slice){ text.p, text.n }, out);
    return true;
}

void orch_mcp_params_free(struct orch_mcp_param_list *p)
{
    for (size_t i = 0; i < p->n; i++) {
        for (char **name = p->params[i].path; *name; name++)
            free(*name);
        free(p->params[i].path);
        free(p->params[i].header);
    }
    free(p->params);
    *p = (struct orch_mcp_param_list){ 0 };
}

static bool same(const struct orch_mcp_param *p, struct orch_slice given,
                 const struct orch_json_doc *d, uint32_t tok)
{
    cleanup_buf struct orch_buf text = { 0 };
    if (p->integer && d->toks[tok].type == ORCH_JSON_NUMBER) {
        cleanup_json struct orch_json_doc number = { 0 };
        struct orch_json_fault fault;
        return orch_json_scan(&number, given, &(struct orch_json_limits){ .depth = 1 }, &fault) ==
                   0 &&
               orch_json_number(&number, 0) == orch_json_number(d, tok);
    }
    if (p->boolean)
        return orch_slice_eq(given, d->toks[tok].type == ORCH_JSON_TRUE ? "true" : "false");
    return orch_json_string(d, tok, &text) == 0 && text.n == given.n &&
           memcmp(text.p ? text.p : "", given.p ? given.p : "", given.n) == 0;
}

const char *orch_mcp_params_check(const struct orch_mcp_param_list *p,
                                  const struct orch_http_request *q, const struct orch_json_doc *d,
                                  uint32_t args, char *why, size_t n_why)
{
    for (size_t i = 0; i < p->n; i++) {
        const struct orch_mcp_param *param = &p->params[i];
        struct orch_slice value;
        cleanup_buf struct orch_buf decoded = { 0 };
        uint32_t tok = argument(param, d, args);
        bool present = tok && d->toks[tok].type != ORCH_JSON_NULL;
        size_t n = orch_http_header(q, param->header, &value);
        const char *problem = n > 1           ? "is there more than once"
                              : present && !n ? "is missing"
                              : !present && n ? "is there, but its argument is not"
                              : !n            ? NULL
                              : orch_mcp_header_decode(value, &decoded) < 0
                                  ? "has bad characters or bad base64"
                              : !same(param, (struct orch_slice){ decoded.p, decoded.n }, d, tok)
                                  ? "is not the same as its argument"
                                  : NULL;
        if (problem) {
            snprintf(why, n_why, "the header %.150s %s", param->header, problem);
            return why;
        }
    }
    return NULL;
}
