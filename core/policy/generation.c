#include "policy_int.h"

#include "../script/regex.h"

#include <string.h>

static int load_all(struct orch_loading *l)
{
    struct orch_generation *g = l->g;
    struct orch_err err = { 0 };
    if (orch_load_find_trust(l, &err) < 0) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s", err.msg);
        return -1;
    }
    g->policy = orch_load_state(l, ORCH_CTX_POLICY, 64 << 20);
    if (!g->policy || orch_load_config(l) < 0)
        return -1;
    g->tools_state = orch_load_state(l, ORCH_CTX_TOOL, g->cfg.tool_memory_bytes);
    if (!g->tools_state)
        return -1;
    /* Both are tried, so that one run shows the errors of policies and tools alike. */
    int r = orch_load_policies(l);
    if (g->engine_ref <= 0)
        return -1;
    if (orch_load_tools(l) < 0 || (!g->alone && orch_load_offer(l) < 0))
        r = -1;
    if (r < 0 || orch_load_networks(l) < 0 || orch_load_finish_policies(l) < 0)
        return -1;
    orch_generation_list(g);
    orch_state_set_limits(g->policy, g->cfg.policy_memory_bytes,
                          (uint64_t)g->cfg.policy_time_ms * ORCH_STEPS_PER_MS,
                          g->cfg.policy_time_ms);
    orch_state_set_limits(g->tools_state, g->cfg.tool_memory_bytes,
                          (uint64_t)g->cfg.tool_cpu_ms * ORCH_STEPS_PER_MS, g->cfg.tool_cpu_ms);
    uint8_t digest[ORCH_SHA256_BYTES];
    orch_sha256_final(&l->hash, digest);
    cleanup_buf struct orch_buf hex = { 0 };
    orch_buf_hex(&hex, digest, sizeof digest);
    memcpy(g->hash, hex.p, 65);
    orch_buf_printf(&g->audit_field, ",\"generation\":\"%s\"", g->hash);
    return 0;
}

struct orch_generation *orch_generation_load(struct orch_current *cur, enum orch_trust_mode mode,
                                             struct orch_buf *errors, enum orch_class *cls)
{
    struct orch_loading l = {
        .cur = cur, .mode = mode, .errors = errors, .cls = ORCH_CLASS_CONFIG
    };
    l.g = orch_xcalloc(1, sizeof *l.g);
    l.g->hostaddr = cur->hostaddr;
    l.g->refs = 1;
    l.base = orch_paths_base(cur->paths);
    l.trust_dir = orch_trust_dir(cur->paths);
    orch_sha256_init(&l.hash);
    int r = load_all(&l);
    if (l.unheld && cur->gen)
        orch_load_hold_to_trust(&l);
    orch_trust_fini(&l.trust);
    free(l.trust_dir);
    free(l.base);
    if (r < 0) {
        *cls = l.cls;
        orch_generation_unref(l.g);
        return NULL;
    }
    return l.g;
}

struct orch_generation *orch_generation_ref(struct orch_generation *g)
{
    g->refs++;
    return g;
}

void orch_generation_unref(struct orch_generation *g)
{
    if (!g || --g->refs)
        return;
    orch_state_free(g->policy);
    orch_state_free(g->tools_state);
    for (size_t i = 0; i < g->n_tools; i++) {
        orch_tool_fini(g->tools[i]);
        free(g->tools[i]);
    }
    free(g->tools);
    while (g->replaced) {
        struct orch_tool *t = g->replaced;
        g->replaced = t->replaced;
        orch_tool_fini(t);
        free(t);
    }
    orch_networks_free(g);
    for (size_t i = 0; i < g->n_redact; i++) {
        orch_regex_free(g->redact[i]);
        free(g->redact_text[i]);
    }
    free(g->redact);
    free(g->redact_text);
    struct orch_config *c = &g->cfg;
    for (char **dir = c->tools; dir && *dir; dir++)
        free(*dir);
    free(c->tools);
    free(c->permit);
    free(c->policies);
    free(c->workspace);
    free(c->audit_dir);
    free(c->http_listen);
    free(c->http_token);
    free(c->vm_backend);
    free(c->vm_accel);
    free(c->vm_image);
    free(g->config_show);
    free(g->linked);
    orch_trust_files_free(g->sources.files, g->sources.n);
    orch_buf_free(&g->list);
    orch_buf_free(&g->audit_field);
    orch_buf_free(&g->notes);
    free(g);
}
