#include "paths.h"

#include <errno.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>

static char *xdg(const char *variable, const char *home, const char *below)
{
    const char *v = getenv(variable);
    if (v && *v == '/')
        return orch_xasprintf("%s/orch", v);
    return orch_xasprintf("%s/%s/orch", home, below);
}

/* The folder of the installation that DIR/orch would be part of, if it is one. */
static bool install_at(struct orch_paths *p, const char *dir, bool tree)
{
    cleanup_free char *share = tree ? orch_xstrdup(dir) : orch_xasprintf("%s/../share/orch", dir);
    cleanup_free char *probe = orch_xasprintf("%s/lua/policy/engine.lua", share);
    if (access(probe, R_OK) < 0)
        return false;
    p->share = realpath(share, NULL);
    if (!p->launcher)
        p->launcher = orch_xasprintf("%s/%s", p->share,
                                     tree ? "launcher" : "../../libexec/orch/launcher");
    if (!p->agent)
        p->agent = orch_xasprintf("%s/%s", p->share, tree ? "agent" : "../../libexec/orch/agent");
    return true;
}

/* Relative to the program, so that a tree can be moved; for an embedder's program elsewhere the
 * compiled-in prefix, then the orch in PATH. */
static void find_install(struct orch_paths *p)
{
    char exe[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    exe[n < 0 ? 0 : n] = 0;
    char *slash = strrchr(exe, '/');
    if (slash)
        *slash = 0;
    if (install_at(p, exe, true) || install_at(p, exe, false) ||
        install_at(p, ORCH_PREFIX "/bin", false))
        return;
    cleanup_free char *path = orch_xstrdup(getenv("PATH") ? getenv("PATH") : "");
    for (char *save, *dir = strtok_r(path, ":", &save); dir; dir = strtok_r(NULL, ":", &save)) {
        cleanup_free char *program = orch_xasprintf("%s/orch", dir);
        cleanup_free char *real = dir[0] == '/' ? realpath(program, NULL) : NULL;
        if (real && strrchr(real, '/') &&
            (*strrchr(real, '/') = 0, install_at(p, real, false) || install_at(p, real, true)))
            return;
    }
    /* Not there: what opens the files says so. */
    p->share = orch_xstrdup(ORCH_PREFIX "/share/orch");
    if (!p->launcher)
        p->launcher = orch_xstrdup(ORCH_PREFIX "/libexec/orch/launcher");
    if (!p->agent)
        p->agent = orch_xstrdup(ORCH_PREFIX "/libexec/orch/agent");
}

static bool try_config(struct orch_paths *p, char *path, enum orch_config_origin origin)
{
    if (access(path, F_OK) < 0) {
        free(path);
        return false;
    }
    p->config = realpath(path, NULL);
    if (!p->config)
        p->config = orch_xstrdup(path);
    p->named = path[0] == '/' ? path : orch_xasprintf("%s/%s", p->cwd, path);
    if (p->named != path)
        free(path);
    p->origin = origin;
    return true;
}

static int find_config(struct orch_paths *p, const char *option, struct orch_err *err)
{
    const char *env = getenv("ORCH_CONFIG");
    const char *named = option ? option : env && *env ? env : NULL;
    if (named) {
        if (try_config(p, orch_xstrdup(named), option ? ORCH_CONFIG_OPTION : ORCH_CONFIG_ENV))
            return 0;
        return orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT,
                             "%s: no such configuration (given by %s)", named,
                             option ? "--config" : "ORCH_CONFIG");
    }
    if (try_config(p, orch_xasprintf("%s/orchestrator.lua", p->cwd), ORCH_CONFIG_CWD) ||
        try_config(p, orch_xasprintf("%s/orchestrator.lua", p->user_config), ORCH_CONFIG_XDG) ||
        try_config(p, orch_xstrdup(ORCH_SYSTEM_CONFIG "/orchestrator.lua"), ORCH_CONFIG_ETC) ||
        try_config(p, orch_xasprintf("%s/orchestrator.lua", p->share), ORCH_CONFIG_BUILTIN))
        return 0;
    return orch_err_setc(
        err, ORCH_CLASS_CONFIG, ENOENT,
        "%s/orchestrator.lua: the built-in configuration is missing; is orch installed whole?",
        p->share);
}

int orch_paths_find(struct orch_paths *p, const char *config_option, struct orch_err *err)
{
    const char *home = getenv("HOME");
    struct passwd entry, *pw = NULL;
    char strings[4096];
    if (!home || *home != '/')
        getpwuid_r(getuid(), &entry, strings, sizeof strings, &pw);
    p->home = orch_xstrdup(pw ? pw->pw_dir : home && *home == '/' ? home : "/nonexistent");
    p->cwd = getcwd(NULL, 0);
    if (!p->cwd)
        return orch_err_set(err, errno, "the working directory cannot be read: %s",
                            strerror(errno));
    if (!p->share)
        find_install(p);
    bool root = geteuid() == 0;
    const char *run = getenv("XDG_RUNTIME_DIR");
    p->state = root && !getenv("XDG_STATE_HOME") ? orch_xstrdup("/var/lib/orch")
                                                 : xdg("XDG_STATE_HOME", p->home, ".local/state");
    p->cache = root && !getenv("XDG_CACHE_HOME") ? orch_xstrdup("/var/cache/orch")
                                                 : xdg("XDG_CACHE_HOME", p->home, ".cache");
    p->runtime = root && !run         ? orch_xstrdup("/run/orch")
                 : run && *run == '/' ? orch_xasprintf("%s/orch", run)
                                      : orch_xasprintf("%s/run", p->state);
    p->user_config = xdg("XDG_CONFIG_HOME", p->home, ".config");
    return find_config(p, config_option, err);
}

void orch_paths_fini(struct orch_paths *p)
{
    free(p->share);
    free(p->launcher);
    free(p->agent);
    free(p->kernel);
    free(p->modules);
    free(p->state);
    free(p->cache);
    free(p->runtime);
    free(p->cwd);
    free(p->home);
    free(p->config);
    free(p->named);
    free(p->user_config);
    *p = (struct orch_paths){ 0 };
}

char *orch_paths_base(const struct orch_paths *p)
{
    char *base = orch_xstrdup(p->config);
    *strrchr(base, '/') = 0;
    return base;
}
