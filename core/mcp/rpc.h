/* JSON-RPC 2.0 framing: what kind of message a scanned document is, and the texts of answers. Pure
 * functions over buffers, no I/O. Ids are kept as the bytes that came, so that an integer beyond
 * 2^53 or an odd escape goes back unchanged. */
#ifndef ORCH_MCP_RPC_H
#define ORCH_MCP_RPC_H

#include "../base/json.h"

/* The revisions: the modern era has one, the legacy era those before it. */
#define ORCH_MCP_MODERN "2026-07-28"
#define ORCH_MCP_LEGACY "2025-11-25" /* its newest */
/* What the protocol's own keys in _meta, and its extensions, begin with. */
#define ORCH_MCP_META "io.modelcontextprotocol/"

#define ORCH_RPC_PARSE_ERROR (-32700)
#define ORCH_RPC_INVALID_REQUEST (-32600)
#define ORCH_RPC_METHOD_NOT_FOUND (-32601)
#define ORCH_RPC_INVALID_PARAMS (-32602)
#define ORCH_RPC_INTERNAL_ERROR (-32603)
#define ORCH_RPC_HEADER_MISMATCH (-32020)
#define ORCH_RPC_MISSING_CAPABILITY (-32021)
#define ORCH_RPC_UNSUPPORTED_VERSION (-32022)
/* orch's own, outside the ranges that JSON-RPC and MCP reserve. */
#define ORCH_RPC_TOO_MANY_CALLS (-31001)
#define ORCH_RPC_UPSTREAM_FAILED (-31002)

extern const char
    *const orch_rpc_legacy[]; /* the legacy revisions, newest first; NULL at the end */
const char *orch_rpc_legacy_version(struct orch_slice s); /* the one that s is, or NULL */

enum orch_rpc_kind { ORCH_RPC_REQUEST = 1, ORCH_RPC_NOTIFICATION, ORCH_RPC_RESPONSE };

struct orch_rpc_msg {
    enum orch_rpc_kind kind;
    struct orch_slice id;    /* as it came, with quotes; empty for notifications */
    uint32_t method, params; /* tokens; params 0 when absent */
    uint32_t result, error;  /* RESPONSE: one of them */
};

/* Reads the object at tok. On failure -EINVAL with a static reason for -32600; id is set when it
 * could be read, so that the refusal can name it. */
int orch_rpc_read(const struct orch_json_doc *d, uint32_t tok, struct orch_rpc_msg *m,
                  const char **why);

/* Appends {"jsonrpc":"2.0","id":ID,"result": — the caller appends the result and "}". */
void orch_rpc_result_head(struct orch_buf *out, struct orch_slice id);
/* Appends a whole error answer without newline; an empty id becomes null; data is JSON or empty. */
void orch_rpc_error(struct orch_buf *out, struct orch_slice id, int code, struct orch_slice text,
                    struct orch_slice data);

#endif
