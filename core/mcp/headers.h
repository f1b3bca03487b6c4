/* What the modern era says twice: values of headers (Mcp-Name, Mcp-Param-*), and the annotation
 * x-mcp-header in a tool's inputSchema. Pure functions. */
#ifndef ORCH_MCP_HEADERS_H
#define ORCH_MCP_HEADERS_H

#include "../base/json.h"
#include "../http/wire.h"

/* Appends the value that a header stands for: =?base64?…?= is decoded. -EINVAL: malformed. */
int orch_mcp_header_decode(struct orch_slice value, struct orch_buf *out);
/* Appends what a header says for this text: the text, or =?base64?…?= where a header could not
 * hold that. */
void orch_mcp_header_encode(struct orch_slice text, struct orch_buf *out);

/* The annotated properties of a schema. */
struct orch_mcp_param {
    char *header; /* "Mcp-Param-Region" */
    char **path;  /* names of properties, NULL-terminated */
    bool integer, boolean;
};
struct orch_mcp_param_list {
    struct orch_mcp_param *params;
    size_t n;
};

/* Reads a schema (token). 0, or -EINVAL with a static reason when an annotation is not allowed. */
int orch_mcp_params_read(const struct orch_json_doc *d, uint32_t schema,
                         struct orch_mcp_param_list *out, const char **why);
/* A reason when an annotation stands where it cannot be reached: below anything but properties. */
const char *orch_mcp_params_astray(const struct orch_json_doc *d, uint32_t schema);
/* Appends what the argument says as a header's value; false: it is absent or null, so there is no
 * header. args 0: none. */
bool orch_mcp_param_value(const struct orch_mcp_param *p, const struct orch_json_doc *d,
                          uint32_t args, struct orch_buf *out);
void orch_mcp_params_free(struct orch_mcp_param_list *p);
/* Whether the headers say what the arguments (0: none) say; NULL, or what is wrong, kept in why. */
const char *orch_mcp_params_check(const struct orch_mcp_param_list *p,
                                  const struct orch_http_request *q, const struct orch_json_doc *d,
                                  uint32_t args, char *why, size_t n_why);

#endif
