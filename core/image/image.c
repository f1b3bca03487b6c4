#include "image_int.h"

#include "../base/hash.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What the recipe makes of equal inputs; a new number makes every image built before stale. */
#define RECIPE "orch-image 1"

enum { AGENT_MAX = 32 << 20, MANIFEST_MAX = 256 * 1024 };

/* "key value" lines. The value up to the end of the line, or NULL; owned by the caller. */
static char *field(const struct orch_buf *text, const char *key)
{
    size_t n = strlen(key);
    for (const char *p = text->p; p && *p;) {
        size_t line = strcspn(p, "\n");
        if (line > n && strncmp(p, key, n) == 0 && p[n] == ' ')
            return orch_xstrndup(p + n + 1, line - n - 1);
        p += line + (p[line] == '\n');
    }
    return NULL;
}

int orch_image_hash_agent(const char *path, struct orch_buf *agent, char hex[65],
                          struct orch_err *err)
{
    int r = orch_read_file(AT_FDCWD, path, AGENT_MAX, agent);
    if (r < 0)
        return orch_err_set(err, -r, "%s: %s", path, strerror(-r));
    orch_sha256_hex(agent->p, agent->n, hex);
    return 0;
}

int orch_image_check_name(const char *name, struct orch_err *err)
{
    size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-");
    if (*name >= 'a' && *name <= 'z' && !name[n] && n < sizeof((struct orch_image *)NULL)->name)
        return 0;
    return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                         "no image can be named \"%.64s\": a-z, then a-z, 0-9 and -, at most 63",
                         name);
}

void orch_image_fini(struct orch_image *i)
{
    free(i->kernel);
    free(i->initrd);
    free(i->disk);
    free(i->kernel_release);
    *i = (struct orch_image){ 0 };
}

void orch_image_copy(struct orch_image *to, const struct orch_image *from)
{
    *to = *from;
    to->kernel = orch_xstrdup(from->kernel);
    to->initrd = orch_xstrdup(from->initrd);
    to->disk = orch_xstrdup(from->disk);
    to->kernel_release = orch_xstrdup(from->kernel_release);
}

int orch_image_not_built(const char *name, struct orch_err *err)
{
    static const char *const shipped[] = { "base", "debian", NULL };
    const char *near = orch_nearest(name, shipped);
    if (near && strcmp(near, name) != 0)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, ENOENT,
                             "there is no image %s; did you mean %s?", name, near);
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, ENOENT,
                         "image %s is not built yet: orch image build %s%s", name, name,
                         near ? "" : ".lua (the file of its recipe)");
}

/* Whether a VMM could: it has this user's id, but when that is root's; so of root's files, found by
 * a user, what everybody may do counts. */
static bool writable(const struct stat *st)
{
    return st->st_mode & (st->st_uid == geteuid() ? 0222 : 0022);
}

int orch_image_open(int dir_fd, const char *path, struct orch_err *err)
{
    cleanup_close int fd = openat(dir_fd, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0 || (!S_ISREG(st.st_mode) && (errno = EINVAL)))
        return orch_err_set(err, errno, "%s: %s; build the image again (orch image build)", path,
                            strerror(errno));
    if (st.st_uid != geteuid() && st.st_uid != 0)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, EPERM,
                             "%s belongs to uid %u, who could change what every later microVM "
                             "starts from; remove the image (orch image rm) and build it again, "
                             "or: sudo chown %u '%s'",
                             path, st.st_uid, geteuid(), path);
    /* On a read-only filesystem nobody writes, whatever the mode. */
    if (!writable(&st) || (fchmod(fd, st.st_mode & 07555) < 0 && errno == EROFS))
        return orch_steal_fd(&fd);
    if (fstat(fd, &st) == 0 && !writable(&st))
        return orch_steal_fd(&fd);
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, EPERM,
                         "%s has mode %04o, and who may write to it could change what every later "
                         "microVM starts from; fix: sudo chmod a-w '%s' (on a filesystem without "
                         "modes: another cache directory, XDG_CACHE_HOME)",
                         path, st.st_mode & 07777, path);
}

char *orch_image_built_hash(const char *cache_dir, const char *name, const char *key)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_free char *path = orch_xasprintf("%s/%s/manifest", cache_dir, name);
    cleanup_free char *hash = orch_read_file(AT_FDCWD, path, MANIFEST_MAX, &text) == 0
                                  ? field(&text, key)
                                  : NULL;
    return hash && strlen(hash) == 64 ? orch_steal_ptr(&hash) : NULL;
}

int orch_image_digest(int fd, char hex[65], uint64_t *bytes)
{
    enum { CHUNK = 1 << 20 };
    cleanup_free char *buf = orch_xmalloc(CHUNK);
    struct orch_sha256_ctx c;
    uint8_t hash[ORCH_SHA256_BYTES];
    ssize_t n;
    *bytes = 0;
    orch_sha256_init(&c);
    while ((n = read(fd, buf, CHUNK)) > 0) {
        orch_sha256_update(&c, buf, (size_t)n);
        *bytes += (uint64_t)n;
    }
    int r = n < 0 ? -errno : 0;
    orch_sha256_final(&c, hash);
    orch_hex(hash, sizeof hash, hex);
    return r;
}

static int damaged(const struct orch_image *i, const char *path, const char *why,
                   struct orch_err *err)
{
    return orch_err_set(err, ESTALE, "image %s is damaged (%s %s): orch image build %s", i->name,
                        path, why, i->name);
}

/* All of them are there, of the size they were made with, and nobody can write to them; with
 * `digests` the bytes are the manifest's, too. */
static int check_files(const char *manifest, const struct orch_buf *text, bool digests,
                       const struct orch_image *i, struct orch_err *err)
{
    static const char *const keys[] = { NULL, "kernel", "initrd", "disk" };
    const char *const paths[] = { manifest, i->kernel, i->initrd, i->disk };
    uint64_t bytes = 0;
    for (size_t k = 0; k < ORCH_ARRAY_LEN(paths) && paths[k]; k++) {
        struct orch_err why;
        struct stat st;
        cleanup_close int fd = orch_image_open(AT_FDCWD, paths[k], &why);
        if (fd < 0 && why.cls != ORCH_CLASS_ISOLATION)
            return damaged(i, paths[k], "cannot be read", err);
        if (fd < 0 || fstat(fd, &st) < 0)
            return orch_err_setc(err, why.cls, why.code, "image %s: %s", i->name, why.msg);
        bytes += k ? (uint64_t)st.st_size : 0;
        cleanup_free char *wanted = k && digests ? field(text, keys[k]) : NULL;
        char hex[65];
        uint64_t n;
        if (k && digests &&
            (orch_image_digest(fd, hex, &n) < 0 || !wanted || strcmp(hex, wanted) != 0))
            return damaged(i, paths[k], "is not what was built", err);
    }
    return bytes == i->bytes ? 0
                             : damaged(i, manifest, "names another size than its files have", err);
}

/* The manifest is written last into a folder that is renamed whole: where it is, everything is. */
int orch_image_find_built(const char *name, const struct orch_image_opts *o, const char *agent_hash,
                          struct orch_image *out, char **source, struct orch_err *err)
{
    cleanup_free char *path = orch_xasprintf("%s/%s/manifest", o->cache_dir, name);
    cleanup_buf struct orch_buf text = { 0 };
    if (orch_read_file(AT_FDCWD, path, MANIFEST_MAX, &text) < 0)
        return orch_image_not_built(name, err);
    cleanup_free char *id = field(&text, "id"), *agent = field(&text, "agent"),
                      *bytes = field(&text, "bytes");
    cleanup_free char *acpi = field(&text, "acpi"), *release = field(&text, "release"),
                      *from = field(&text, "source");
    cleanup_free char *disk = field(&text, "disk");
    if (strncmp(text.p, RECIPE "\n", sizeof RECIPE) != 0 || !id || strlen(id) != 64 || !agent ||
        !bytes || !acpi || !release || !from)
        return orch_err_set(err, ESTALE,
                            "image %s was built by another version of orch: orch image build %s",
                            name, name);
    if (strcmp(agent, agent_hash) != 0)
        return orch_err_set(err, ESTALE,
                            "image %s holds another guest agent than %s: orch image build %s", name,
                            o->agent_path, name);
    *out = (struct orch_image){ .bytes = strtoull(bytes, NULL, 10), .acpi = *acpi == '1' };
    snprintf(out->name, sizeof out->name, "%s", name);
    memcpy(out->id, id, 65);
    out->kernel = orch_xasprintf("%s/%s/vmlinux", o->cache_dir, id);
    out->initrd = orch_xasprintf("%s/%s/initrd", o->cache_dir, id);
    out->disk = disk ? orch_xasprintf("%s/%s/disk", o->cache_dir, id) : NULL;
    out->kernel_release = orch_steal_ptr(&release);
    int r = check_files(path, &text, o->digests, out, err);
    if (r < 0) {
        orch_image_fini(out);
        return r;
    }
    if (source)
        *source = orch_steal_ptr(&from);
    return 0;
}

int orch_image_find(const char *name, const struct orch_image_opts *o, struct orch_image *out,
                    struct orch_err *err)
{
    cleanup_buf struct orch_buf agent = { 0 };
    char hash[65];
    int r = orch_image_check_name(name, err);
    if (r == 0)
        r = orch_image_hash_agent(o->agent_path, &agent, hash, err);
    return r < 0 ? r : orch_image_find_built(name, o, hash, out, NULL, err);
}

/* ---- what a build makes of the folder */

/* The folders of a build are flat, but for an empty one. */
void orch_image_folder_remove(const char *path)
{
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            unlinkat(dirfd(d), e->d_name,
                     strcmp(e->d_name, ORCH_DISK_WORK) == 0 ? AT_REMOVEDIR : 0);
    if (d)
        closedir(d);
    rmdir(path);
}

int orch_image_folder_new(const char *cache_dir, char **folder, struct orch_err *err)
{
    DIR *d = opendir(cache_dir);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strncmp(e->d_name, ".build-", 7) == 0) {
            cleanup_free char *left = orch_xasprintf("%s/%s", cache_dir, e->d_name);
            orch_image_folder_remove(left);
        }
    if (d)
        closedir(d);
    *folder = orch_xasprintf("%s/.build-XXXXXX", cache_dir);
    if (mkdtemp(*folder))
        return 0;
    int code = errno;
    free(orch_steal_ptr(folder));
    return orch_err_set(err, code, "%s: %s", cache_dir, strerror(code));
}

/* What was made is on the disk, nobody is to write to it again, and root's VMM, which has another
 * uid, is to read it. */
static int finish_files(int dir)
{
    DIR *d = fdopendir(fcntl(dir, F_DUPFD_CLOEXEC, 0));
    int r = d ? 0 : -errno;
    for (struct dirent *e; r == 0 && (e = readdir(d));) {
        cleanup_close int fd = openat(dir, e->d_name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        struct stat st;
        if (fd < 0 || fstat(fd, &st) < 0 ||
            (S_ISREG(st.st_mode) && (fchmod(fd, 0444) < 0 || fsync(fd) < 0)))
            r = -errno;
    }
    if (d)
        closedir(d);
    return r < 0 ? r : fsync(dir) < 0 ? -errno : 0;
}

/* Under its final name only when it is whole and on disk; the name's link last. */
static int place(const char *cache_dir, char **folder, const struct orch_image_made *m,
                 const char *id, struct orch_slice manifest)
{
    cleanup_close int tmp = open(*folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cleanup_close int cache = open(cache_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cleanup_free char *link = orch_xasprintf(".%s.link", m->name),
                      *whole = orch_xasprintf("%s/%s", cache_dir, id);
    int r;
    if (tmp < 0 || cache < 0)
        return -errno;
    if ((r = orch_write_file(tmp, "vmlinux", m->kernel.p, m->kernel.n, 0400)) < 0 ||
        (r = orch_write_file(tmp, "initrd", m->initrd.p, m->initrd.n, 0400)) < 0 ||
        (r = orch_write_file(tmp, "manifest", manifest.p, manifest.n, 0400)) < 0 ||
        (r = finish_files(tmp)) < 0)
        return r;
    /* The same content may be there already, or what somebody left of it. */
    if (rename(*folder, whole) < 0) {
        orch_image_folder_remove(whole);
        if (rename(*folder, whole) < 0)
            return -errno;
    }
    free(orch_steal_ptr(folder));
    unlinkat(cache, link, 0);
    if (symlinkat(id, cache, link) < 0 || renameat(cache, link, cache, m->name) < 0 ||
        fsync(cache) < 0)
        return -errno;
    return 0;
}

/* Removes what no name leads to any more. Templates in use have their disk open. */
static void prune(const char *cache_dir)
{
    char used[32][65], target[66];
    size_t n = 0;
    DIR *d = opendir(cache_dir);
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d));)
        if (readlinkat(dirfd(d), e->d_name, target, sizeof target) == 64) {
            if (n == ORCH_ARRAY_LEN(used)) { /* so many that it cannot be told */
                closedir(d);
                return;
            }
            snprintf(used[n++], sizeof *used, "%.64s", target);
        }
    rewinddir(d);
    for (struct dirent *e; (e = readdir(d));) {
        bool keeps = strspn(e->d_name, "0123456789abcdef") != 64 || e->d_name[64];
        for (size_t i = 0; i < n && !keeps; i++)
            keeps = strcmp(used[i], e->d_name) == 0;
        if (!keeps) {
            cleanup_free char *left = orch_xasprintf("%s/%s", cache_dir, e->d_name);
            orch_image_folder_remove(left);
        }
    }
    closedir(d);
}

/* The id is the hash of the lines that say what the image is made of; those behind it are not part
 * of it. */
int orch_image_install(const char *cache_dir, char **folder, const struct orch_image_made *m,
                       char id[65], uint64_t *bytes, struct orch_err *err)
{
    cleanup_buf struct orch_buf manifest = { 0 };
    char kernel_hash[65], initrd_hash[65];
    bool disk = *m->disk_hash;
    orch_sha256_hex(m->kernel.p, m->kernel.n, kernel_hash);
    orch_sha256_hex(m->initrd.p, m->initrd.n, initrd_hash);
    orch_buf_printf(&manifest, RECIPE "\nname %s\nkernel %s\ninitrd %s\nagent %s\nacpi %d\n",
                    m->name, kernel_hash, initrd_hash, m->agent_hash, m->acpi);
    if (disk)
        orch_buf_printf(&manifest, "disk %s\n", m->disk_hash);
    orch_sha256_hex(manifest.p, manifest.n, id);
    *bytes = m->kernel.n + m->initrd.n + m->disk_bytes;
    orch_buf_printf(&manifest, "id %s\nrelease %s\nbytes %llu\nsource %s\n", id, m->release,
                    (unsigned long long)*bytes, m->source);
    if (disk)
        orch_buf_printf(&manifest, "recipe %s\n", m->recipe_hash);
    int r = place(cache_dir, folder, m, id, orch_slice_of(&manifest));
    if (r < 0)
        return orch_err_set(err, -r, "cannot write %s: %s", cache_dir, strerror(-r));
    prune(cache_dir);
    return 0;
}
