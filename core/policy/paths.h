/* Where an orch finds its files: the installation, the configuration, and the directories of its
 * user. */
#ifndef ORCH_POLICY_PATHS_H
#define ORCH_POLICY_PATHS_H

#include "../base/err.h"

enum orch_config_origin {
    ORCH_CONFIG_OPTION,
    ORCH_CONFIG_ENV,
    ORCH_CONFIG_CWD,
    ORCH_CONFIG_XDG,
    ORCH_CONFIG_ETC,
    ORCH_CONFIG_BUILTIN,
};

struct orch_paths {
    char *share; /* …/share/orch, or the build tree: lua/, policies/, orchestrator.lua */
    char *launcher, *agent;
    char *kernel, *modules; /* of microVMs: --kernel, --modules; NULL: Debian's */
    char *state, *cache, *runtime;
    char *cwd, *home;
    char *config;      /* absolute, without links */
    char *named;       /* the same as it was named or found */
    char *user_config; /* $XDG_CONFIG_HOME/orch */
    enum orch_config_origin origin;
};

#define ORCH_SYSTEM_CONFIG "/etc/orch"

/* share, launcher and agent are looked for where they are NULL. config_option: --config or NULL.
 * Fails with class CONFIG when the named file does not exist. */
int orch_paths_find(struct orch_paths *p, const char *config_option, struct orch_err *err);
void orch_paths_fini(struct orch_paths *p);
/* The configuration's folder; the caller's to free. */
char *orch_paths_base(const struct orch_paths *p);

#endif
