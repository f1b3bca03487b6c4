#include "initrd.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

struct entry {
    char *path; /* without a leading slash */
    unsigned mode, uid;
    struct orch_slice data; /* of a link: its target */
};

struct entries {
    struct entry *e;
    size_t n, cap;
};

static void add(struct entries *l, const char *path, unsigned mode, unsigned uid,
                struct orch_slice data)
{
    if (l->n == l->cap)
        l->e = orch_xrealloc(l->e, (l->cap = l->cap ? 2 * l->cap : 512) * sizeof *l->e);
    l->e[l->n++] = (struct entry){ orch_xstrdup(path), mode, uid, data };
}

static int by_path(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->path, ((const struct entry *)b)->path);
}

static void cpio_entry(struct orch_buf *out, const struct entry *e, unsigned ino)
{
    const unsigned size = (unsigned)e->data.n, name = (unsigned)strlen(e->path) + 1;
    const unsigned field[] = { ino, e->mode, e->uid, e->uid, 1, 0, size, 0, 0, 0, 0, name, 0 };
    orch_buf_str(out, "070701");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(field); i++)
        orch_buf_printf(out, "%08X", field[i]);
    orch_buf_add(out, e->path, name);
    orch_buf_add(out, "\0\0\0", -out->n & 3);
    if (size)
        orch_buf_add(out, e->data.p, size);
    orch_buf_add(out, "\0\0\0", -out->n & 3);
}

/* A "newc" archive: sorted, without times, so that equal inputs make equal bytes. Plain, since the
 * guest would take longer to unpack it than to copy it. Empties the list. */
static void cpio_write(struct entries *l, struct orch_buf *out)
{
    qsort(l->e, l->n, sizeof *l->e, by_path);
    for (size_t i = 0; i < l->n; i++)
        if (i == 0 || strcmp(l->e[i].path, l->e[i - 1].path) != 0)
            cpio_entry(out, &l->e[i], (unsigned)i + 1);
    char end[] = "TRAILER!!!";
    cpio_entry(out, &(struct entry){ .path = end }, 0);
    for (size_t i = 0; i < l->n; i++)
        free(l->e[i].path);
    free(l->e);
    *l = (struct entries){ 0 };
}

/* What is being made. */
struct initrd {
    struct entries l;
    struct orch_buf list; /* of the modules, in the order in which the agent loads them */
    const char *release;
};

static void add_module(void *ud, const struct orch_module *m, int device)
{
    struct initrd *i = ud;
    char path[100];
    snprintf(path, sizeof path, "lib/modules/%.64s", i->release);
    add(&i->l, path, S_IFDIR | 0755, 0, (struct orch_slice){ 0 });
    cleanup_free char *file = orch_xasprintf("%s/%s.ko", path, m->name);
    add(&i->l, file, S_IFREG | 0644, 0, orch_slice_of(&m->data));
    orch_buf_printf(&i->list, device ? "/%s %d\n" : "/%s\n", file, device);
}

static void add_applets(struct entries *l, const char *list)
{
    for (const char *p = list; p && *p;) {
        size_t n = strcspn(p, "\n");
        cleanup_free char *path = orch_xstrndup(p, n);
        if (n && strcmp(path, &ORCH_BUSYBOX[1]) != 0 && !strstr(path, ".."))
            add(l, path, S_IFLNK | 0777, 0, ORCH_SLICE(ORCH_BUSYBOX));
        p += n + (p[n] == '\n');
    }
}

void orch_initrd_make(struct orch_modules *modules, const char *release, struct orch_slice agent,
                      struct orch_slice busybox, const char *applets, struct orch_buf *out)
{
    static const struct {
        const char *path;
        unsigned mode, uid;
    } folders[] = {
        { "bin", 0755, 0 },      { "dev", 0755, 0 },         { "etc", 0755, 0 },
        { "etc/orch", 0755, 0 }, { "home", 0755, 0 },        { "home/user", 0755, 1000 },
        { "lib", 0755, 0 },      { "lib/modules", 0755, 0 }, { "mnt", 0755, 0 },
        { "proc", 0755, 0 },     { "root", 0700, 0 },        { "run", 0755, 0 },
        { "sbin", 0755, 0 },     { "sys", 0755, 0 },         { "tmp", 01777, 0 },
        { "usr", 0755, 0 },      { "usr/bin", 0755, 0 },     { "usr/sbin", 0755, 0 },
        { "var", 0755, 0 },      { "var/tmp", 01777, 0 },
    };
    static const struct {
        const char *path, *text;
    } files[] = {
        { "etc/group", "root:x:0:\ntty:x:5:\nuser:x:1000:\n" },
        { "etc/hostname", "orch\n" },
        { "etc/hosts", "127.0.0.1 localhost orch\n::1 localhost\n" },
        { "etc/os-release", "ID=orch-base\nNAME=\"orch base\"\n"
                            "PRETTY_NAME=\"orch base image\"\nVERSION_ID=" ORCH_VERSION "\n" },
        { "etc/passwd",
          "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n" },
        { "etc/resolv.conf", "" },
    };
    struct initrd made = { .release = release };
    struct entries *l = &made.l;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(folders); i++)
        add(l, folders[i].path, S_IFDIR | folders[i].mode, folders[i].uid,
            (struct orch_slice){ 0 });
    for (size_t i = 0; i < ORCH_ARRAY_LEN(files); i++)
        add(l, files[i].path, S_IFREG | 0644, 0, orch_slice_str(files[i].text));
    orch_modules_each(modules, add_module, &made);
    add(l, "etc/orch/modules", S_IFREG | 0644, 0, orch_slice_of(&made.list));
    add(l, "init", S_IFREG | 0755, 0, agent);
    add(l, &ORCH_BUSYBOX[1], S_IFREG | 0755, 0, busybox);
    add_applets(l, applets);
    cpio_write(l, out);
    orch_buf_free(&made.list);
}
