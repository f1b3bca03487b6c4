#include "modules.h"

#include "kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <stdio.h>
#include <string.h>

enum { MODULE_MAX = 32 << 20 };

/* In the order the guest loads them; what they depend on comes before. Those for a virtio device
 * that a microVM may lack are loaded only where it is there: each costs the cold boot about 15
 * ms. */
static const struct wanted {
    const char *name;
    bool required;
    int device; /* type of virtio device, 0: always */
} wanted[] = {
    { "virtio_ring", false, 0 },   { "virtio", false, 0 },     { "virtio_mmio", true, 0 },
    { "virtio_console", true, 0 }, { "virtio_rng", false, 0 }, { "failover", false, 1 },
    { "net_failover", false, 1 },  { "virtio_net", false, 1 }, { "virtio_blk", false, 2 },
    { "erofs", false, 2 },         { "overlay", false, 2 },
};

/* By name, where '-' and '_' are the same. */
static struct orch_module *module_find(struct orch_modules *all, const char *name, size_t n)
{
    for (size_t i = 0; i < all->n; i++) {
        const char *have = all->list[i].name;
        size_t k = 0;
        while (k < n && have[k] && (name[k] == '-' ? '_' : name[k]) == have[k])
            k++;
        if (k == n && !have[k])
            return &all->list[i];
    }
    return NULL;
}

static struct orch_module *module_add(struct orch_modules *all, const char *name, size_t n,
                                      bool required)
{
    struct orch_module *m = module_find(all, name, n);
    if (!m && n < sizeof m->name && all->n < ORCH_ARRAY_LEN(all->list)) {
        m = &all->list[all->n++];
        for (size_t i = 0; i < n; i++)
            m->name[i] = name[i] == '-' ? '_' : name[i];
    }
    if (m)
        m->required |= required;
    return m;
}

/* The wanted module whose file this is, while it has not been found. */
static struct orch_module *module_of_path(struct orch_modules *all, const char *path)
{
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path,
               *end = strstr(base, ".ko");
    struct orch_module *m = end && (!end[3] || end[3] == '.')
                                ? module_find(all, base, (size_t)(end - base))
                                : NULL;
    return m && !m->data.n ? m : NULL;
}

/* The value of one line of a module's information, NULL when it has none. */
static const char *modinfo(const struct orch_module *m, const char *key)
{
    cleanup_free char *text = orch_xasprintf("%s=", key);
    struct orch_slice rest = orch_slice_of(&m->data);
    for (const char *p; (p = memmem(rest.p, rest.n, text, strlen(text)));) {
        if (p > m->data.p && !p[-1] && memchr(p, 0, rest.n - (size_t)(p - rest.p)))
            return p + strlen(text);
        rest.n -= (size_t)(p + 1 - rest.p);
        rest.p = p + 1;
    }
    return NULL;
}

static bool is_builtin(const struct orch_modules *all, const char *name)
{
    char dashed[60], under[60];
    snprintf(under, sizeof under, "/%s.ko", name);
    snprintf(dashed, sizeof dashed, "%s", under);
    for (char *p = dashed; *p; p++)
        *p = *p == '_' ? '-' : *p;
    return all->builtin.n && (strstr(all->builtin.p, under) || strstr(all->builtin.p, dashed));
}

void orch_modules_want(struct orch_modules *all, bool disk)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(wanted); i++)
        module_add(all, wanted[i].name, strlen(wanted[i].name),
                   wanted[i].required || (wanted[i].device == 2 && disk));
}

struct orch_buf *orch_modules_into(struct orch_modules *all, const char *path, uint64_t size)
{
    static const char builtin[] = "/modules.builtin";
    const char *at = strstr(path, builtin);
    if (at && strlen(at) == strlen(builtin)) {
        all->builtin.n = 0;
        return size <= ORCH_KERNEL_MAX ? &all->builtin : NULL;
    }
    struct orch_module *m = module_of_path(all, path);
    return m && size <= MODULE_MAX ? &m->data : NULL;
}

int orch_modules_read(struct orch_modules *all, const char *folder, struct orch_err *err)
{
    char *roots[] = { (char *)(uintptr_t)folder, NULL };
    cleanup_free char *builtin = orch_xasprintf("%s/modules.builtin", folder);
    all->builtin.n = 0;
    orch_read_file(AT_FDCWD, builtin, ORCH_KERNEL_MAX, &all->builtin);
    FTS *fts = fts_open(roots, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, NULL);
    int r = 0;
    for (FTSENT *e; r == 0 && fts && (e = fts_read(fts));) {
        struct orch_module *m = e->fts_info == FTS_F ? module_of_path(all, e->fts_path) : NULL;
        if (m && (r = orch_read_file(AT_FDCWD, e->fts_path, MODULE_MAX, &m->data)) < 0)
            orch_err_set(err, -r, "%s: %s", e->fts_path, strerror(-r));
        if (e->fts_level == 0 && (e->fts_info == FTS_NS || e->fts_info == FTS_DNR))
            r = orch_err_set(err, e->fts_errno, "%s: %s", e->fts_path, strerror(e->fts_errno));
    }
    if (fts)
        fts_close(fts);
    return r;
}

static int unpack(struct orch_module *m, struct orch_err *err)
{
    cleanup_buf struct orch_buf plain = { 0 };
    int r = orch_unpack(orch_slice_of(&m->data), MODULE_MAX, &plain, err);
    if (r <= 0)
        return r < 0 ? orch_err_wrap(err, "module %s", m->name) : 0;
    struct orch_buf packed = m->data;
    m->data = plain;
    plain = packed;
    return 0;
}

/* A list of names, "a,b"; NULL: the module was not found. */
static const char *depends(const struct orch_module *m)
{
    return m->data.n ? modinfo(m, "depends") : NULL;
}

/* The next name of such a list, NULL at its end. */
static const char *next_name(const char **list, size_t *n)
{
    const char *name = *list;
    if (!name || !*name)
        return NULL;
    *n = strcspn(name, ",");
    *list = name + *n + (name[*n] == ',');
    return name;
}

int orch_modules_resolve(struct orch_modules *all, const char *release, const char *source,
                         struct orch_err *err)
{
    size_t before = all->n, n;
    for (size_t i = 0; i < all->n; i++) {
        struct orch_module *m = &all->list[i];
        if (unpack(m, err) < 0)
            return -err->code;
        for (const char *name, *list = depends(m); (name = next_name(&list, &n));)
            if (!module_add(all, name, n, true))
                return orch_err_set(err, E2BIG, "module %s depends on too much", m->name);
    }
    if (all->n > before)
        return 1;
    for (size_t i = 0; i < all->n; i++) {
        const struct orch_module *m = &all->list[i];
        if (!m->data.n && m->required && !is_builtin(all, m->name))
            return orch_err_set(err, ENOENT, "the kernel's module %s is missing in %s", m->name,
                                source);
        const char *magic = m->data.n ? modinfo(m, "vermagic") : NULL;
        n = strlen(release);
        if (m->data.n && (!magic || strncmp(magic, release, n) != 0 || magic[n] != ' '))
            return orch_err_set(err, EINVAL,
                                "module %s was built for kernel %.60s, but the kernel is %s",
                                m->name, magic ? magic : "(unknown)", release);
    }
    return 0;
}

static void place(struct orch_modules *all, struct orch_module *m, int device,
                  void (*fn)(void *ud, const struct orch_module *module, int device), void *ud)
{
    if (!m || m->placed || !m->data.n)
        return;
    m->placed = true;
    size_t n;
    for (const char *name, *list = depends(m); (name = next_name(&list, &n));)
        place(all, module_find(all, name, n), device, fn, ud);
    fn(ud, m, device);
}

void orch_modules_each(struct orch_modules *all,
                       void (*fn)(void *ud, const struct orch_module *module, int device), void *ud)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(wanted); i++)
        place(all, module_find(all, wanted[i].name, strlen(wanted[i].name)), wanted[i].device, fn,
              ud);
}

void orch_modules_fini(struct orch_modules *all)
{
    for (size_t i = 0; i < all->n; i++)
        orch_buf_free(&all->list[i].data);
    orch_buf_free(&all->builtin);
}
