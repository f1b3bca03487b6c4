#include "policy_int.h"

#include "../base/dirwatch.h"
#include "../base/log.h"

#include <errno.h>
#include <string.h>

enum { RELOAD_QUIET_MS = 50, ERROR_NOTED_BYTES = 4000 };

const char *const orch_beside[] = { "lua/resources", "lua/prompts", NULL };

int orch_current_need(struct orch_current *cur, struct orch_err *err)
{
    if (cur->gen)
        return 0;
    cleanup_buf struct orch_buf errors = { 0 };
    enum orch_class cls = ORCH_CLASS_CONFIG;
    cur->gen = orch_generation_load(cur, ORCH_TRUST_CHECK, &errors, &cls);
    if (!cur->gen) {
        while (errors.n && errors.p[errors.n - 1] == '\n')
            errors.p[--errors.n] = 0;
        return orch_err_setc(err, cls, EINVAL, "%s", errors.p);
    }
    /* Nobody wrote the built-in configuration: what there is to say of it is no warning. */
    enum orch_level level = cur->paths->origin == ORCH_CONFIG_BUILTIN ? ORCH_INFO : ORCH_WARN;
    for (char *line = cur->gen->notes.p, *end; line && (end = strchr(line, '\n')); line = end + 1)
        orch_log(level, "%.*s", (int)(end - line), line);
    return 0;
}

/* ---- another one */

static void note(struct orch_current *cur, const char *why, bool ok, int64_t started_us)
{
    cleanup_buf struct orch_buf fields = { 0 };
    orch_buf_str(&fields, "\"why\":");
    orch_json_quote(&fields, orch_slice_str(why));
    orch_buf_printf(&fields, ",\"ok\":%s,\"ms\":%.1f", ok ? "true" : "false",
                    (double)(orch_now_us() - started_us) / 1000);
    if (!ok) {
        size_t n = cur->error.n;
        orch_buf_str(&fields, ",\"error\":");
        orch_json_quote(&fields, (struct orch_slice){
                                     cur->error.p, n > ERROR_NOTED_BYTES ? ERROR_NOTED_BYTES : n });
    }
    orch_buf_slice(&fields,
                   (struct orch_slice){ cur->gen->audit_field.p, cur->gen->audit_field.n });
    orch_audit_note(cur->audit, "reload", (struct orch_slice){ fields.p, fields.n });
}

int orch_current_reload(struct orch_current *cur, const char *why)
{
    cleanup_buf struct orch_buf errors = { 0 };
    enum orch_class cls = ORCH_CLASS_CONFIG;
    int64_t started_us = orch_now_us();
    struct orch_generation *g = orch_generation_load(cur, ORCH_TRUST_CHECK, &errors, &cls);
    struct orch_generation *before = cur->gen;
    cur->error.n = 0;
    if (!g) {
        orch_buf_slice(&cur->error, (struct orch_slice){ errors.p, errors.n });
        orch_log(ORCH_ERROR, "reload failed, the policies and tools before stay in force: %s",
                 errors.p);
    } else if (strcmp(g->hash, before->hash) == 0 && !g->alone) {
        orch_generation_unref(g);
        return 0;
    } else {
        cur->gen = g;
        cur->reloads++;
        if (cur->watch)
            orch_current_watch(cur);
        cur->ops->swapped(cur->ud, before);
        orch_generation_unref(before);
        orch_log(ORCH_INFO, "reloaded (%s): generation %.12s, %zu tools", why, g->hash, g->n_tools);
    }
    note(cur, why, g != NULL, started_us);
    return g ? 0 : -(int)cls;
}

static void files_changed(void *ud)
{
    orch_current_reload(ud, "a file changed");
}

/* Each ended by NUL. */
static void list_folders(const struct orch_current *cur, struct orch_buf *dirs)
{
    const struct orch_paths *p = cur->paths;
    const struct orch_config *c = &cur->gen->cfg;
    cleanup_free char *base = orch_paths_base(p);
    orch_buf_add(dirs, base, strlen(base) + 1);
    orch_buf_add(dirs, c->policies, strlen(c->policies) + 1);
    for (char **dir = c->tools; *dir; dir++)
        orch_buf_add(dirs, *dir, strlen(*dir) + 1);
    for (const char *const *name = orch_beside; *name; name++) {
        cleanup_free char *dir = orch_xasprintf("%s/%s", base, *name);
        if (access(dir, F_OK) == 0)
            orch_buf_add(dirs, dir, strlen(dir) + 1);
    }
    orch_buf_printf(dirs, "%s/lua%c%s/lua/tools", p->share, 0, p->share);
    dirs->n++; /* the last NUL */
}

void orch_current_watch(struct orch_current *cur)
{
    struct orch_err err = { 0 };
    if (!cur->watch)
        cur->watch = orch_dirwatch_new(cur->loop, RELOAD_QUIET_MS, files_changed, cur, &err);
    if (!cur->watch) {
        orch_log(ORCH_WARN, "changes of files will not be noticed (orch reload works): %s",
                 err.msg);
        return;
    }
    cleanup_buf struct orch_buf dirs = { 0 };
    list_folders(cur, &dirs);
    /* The same folders stay watched: what changes while they are loaded must not be missed. */
    if (dirs.n == cur->watched.n && memcmp(dirs.p, cur->watched.p, dirs.n) == 0)
        return;
    orch_dirwatch_clear(cur->watch);
    for (const char *dir = dirs.p; dir < dirs.p + dirs.n; dir += strlen(dir) + 1)
        if (orch_dirwatch_add_dir(cur->watch, dir, &err) < 0)
            orch_log(ORCH_WARN, "%s", err.msg);
    orch_buf_free(&cur->watched);
    cur->watched = dirs;
    dirs = (struct orch_buf){ 0 };
}

/* ---- */

void orch_current_add_source(struct orch_current *cur, struct orch_tool_source *s)
{
    struct orch_tool_source **at = &cur->sources;
    while (*at)
        at = &(*at)->next;
    s->next = NULL;
    *at = s;
}

void orch_current_remove_source(struct orch_current *cur, struct orch_tool_source *s)
{
    for (struct orch_tool_source **at = &cur->sources; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            return;
        }
}

void orch_current_unwatch(struct orch_current *cur)
{
    orch_dirwatch_free(cur->watch);
    cur->watch = NULL;
}

void orch_current_fini(struct orch_current *cur)
{
    orch_current_unwatch(cur);
    orch_generation_unref(cur->gen);
    orch_rates_free(&cur->rates);
    orch_held_free(&cur->held);
    orch_buf_free(&cur->error);
    orch_buf_free(&cur->watched);
    cur->gen = NULL;
}
