#include "disk.h"

#include "../base/hash.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* Of every file: compact inodes have no time of their own. Before any clock is set, so nothing is
 * from the future. */
#define EPOCH "1704067200"
/* -x-1: without extended attributes. The two folders have another owner in each way; apt makes them
 * anew. */
#define PACK \
    "rm -rf work/root/var/lib/apt/lists/partial work/root/var/cache/apt/archives/partial; " \
    "echo \"I: packing $(du -sm work/root | cut -f1) MB...\" >&2; " \
    "mkfs.erofs --quiet -x-1 -T" EPOCH \
    " -U6f726368-6469-4b00-8000-000000000001 -zlz4hc,9 disk work/root"
/* /sys cannot be mounted in every namespace, and no package needs it. */
#define MAKE \
    "PATH=\"$PATH:/usr/sbin:/sbin\"; mount -t tmpfs -o size=80%,mode=755 orch " ORCH_DISK_WORK \
    "; mkdir work/tmp; export TMPDIR=\"$PWD/work/tmp\"; " \
    "mmdebstrap --variant=minbase --skip=chroot/mount/sys --dpkgopt=force-unsafe-io \"$@\"; "
#define PLAIN MAKE "rm -rf work/root/dev; mkdir work/root/dev; " PACK
#define FAKE \
    MAKE "exec fakeroot sh -euc 'mkdir work/root; tar -C work/root -xf work/root.tar " \
         "--exclude=./dev/*; " \
         "rm work/root.tar; " PACK "'"
#define NAMESPACES "--mount", "--pid", "--fork", "--kill-child=KILL"

enum { WAY_MAX = 16, SAID_MAX = 1200 };

static const struct {
    const char *argv[WAY_MAX], *target;
} ways[] = {
    [ORCH_DISK_ROOT] = { { "unshare", NAMESPACES, "sh", "-euc", PLAIN, "orch", "--mode=root" },
                         "work/root" },
    [ORCH_DISK_RANGE] = { { "unshare", "--map-root-user", "--map-auto", NAMESPACES, "sh", "-euc",
                            PLAIN, "orch", "--mode=root" },
                          "work/root" },
    [ORCH_DISK_FAKE] = { { "unshare", "--map-root-user", NAMESPACES, "sh", "-euc", FAKE, "orch",
                           "--mode=fakechroot" },
                         "work/root.tar" },
};

const char *const orch_disk_probe[] = { "unshare", "--map-root-user", "--map-auto", "true", NULL };
/* fakeroot would try to give files to ids that a namespace with a single one does not have. */
const char *const orch_disk_env[2] = { "SOURCE_DATE_EPOCH=" EPOCH, "FAKEROOTDONTTRYCHOWN=1" };

static size_t count(const char *const *list)
{
    size_t n = 0;
    while (list[n])
        n++;
    return n;
}

static size_t text_bytes(const char *const *list)
{
    size_t n = 0;
    for (; *list; list++)
        n += strlen(*list) + 1;
    return n;
}

static const char *put(char **at, const char *s)
{
    char *copy = *at;
    *at = stpcpy(copy, s) + 1;
    return copy;
}

struct orch_recipe *orch_recipe_dup(const struct orch_recipe *r)
{
    if (!r)
        return NULL;
    size_t n = count(r->options), k = count(r->sources);
    struct orch_recipe *copy = orch_xmalloc(sizeof *copy + (n + k + 2) * sizeof(char *) +
                                            strlen(r->suite) + 1 + text_bytes(r->options) +
                                            text_bytes(r->sources));
    const char **lists = (const char **)(copy + 1);
    char *at = (char *)(lists + n + k + 2);
    *copy = (struct orch_recipe){ put(&at, r->suite), lists, lists + n + 1 };
    for (size_t i = 0; i <= n; i++)
        lists[i] = i < n ? put(&at, r->options[i]) : NULL;
    for (size_t i = 0; i <= k; i++)
        lists[n + 1 + i] = i < k ? put(&at, r->sources[i]) : NULL;
    return copy;
}

void orch_recipe_hash(const struct orch_recipe *r, char hex[65])
{
    struct orch_sha256_ctx c;
    uint8_t hash[ORCH_SHA256_BYTES];
    orch_sha256_init(&c);
    orch_sha256_update(&c, PLAIN, sizeof PLAIN);
    orch_sha256_update(&c, r->suite, strlen(r->suite) + 1);
    for (const char *const *o = r->options; *o; o++)
        orch_sha256_update(&c, *o, strlen(*o) + 1);
    orch_sha256_final(&c, hash);
    orch_hex(hash, sizeof hash, hex);
}

static bool in_path(const char *program)
{
    const char *path = getenv("PATH");
    cleanup_free char *all = orch_xasprintf("%s:/usr/sbin:/sbin", path ? path : "/usr/bin:/bin");
    for (char *save, *dir = strtok_r(all, ":", &save); dir; dir = strtok_r(NULL, ":", &save)) {
        cleanup_free char *file = orch_xasprintf("%s/%s", dir, program);
        if (access(file, X_OK) == 0)
            return true;
    }
    return false;
}

int orch_disk_programs(enum orch_disk_way way, struct orch_err *err)
{
    static const struct {
        const char *program, *package;
        bool fake;
    } needed[] = {
        { "unshare", "util-linux", false },     { "mmdebstrap", "mmdebstrap", false },
        { "mkfs.erofs", "erofs-utils", false }, { "fakechroot", "fakechroot", true },
        { "fakeroot", "fakeroot", true },
    };
    cleanup_buf struct orch_buf programs = { 0 }, packages = { 0 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(needed); i++) {
        if ((needed[i].fake && way != ORCH_DISK_FAKE) || in_path(needed[i].program))
            continue;
        orch_buf_printf(&programs, "%s%s", programs.n ? ", " : "", needed[i].program);
        orch_buf_printf(&packages, " %s", needed[i].package);
    }
    if (!programs.n)
        return 0;
    return orch_err_set(err, ENOENT,
                        "%s not found; install it: sudo apt-get install --no-install-recommends%s",
                        programs.p, packages.p);
}

const char **orch_disk_argv(const struct orch_recipe *r, enum orch_disk_way way)
{
    size_t w = count(ways[way].argv), n = count(r->options), k = count(r->sources);
    const char **argv = orch_xcalloc(w + n + 2 + k + 1, sizeof *argv);
    memcpy(argv, ways[way].argv, w * sizeof *argv);
    memcpy(argv + w, r->options, n * sizeof *argv);
    argv[w + n] = r->suite;
    argv[w + n + 1] = ways[way].target;
    memcpy(argv + w + n + 2, r->sources, k * sizeof *argv);
    return argv;
}

static const struct {
    const char *said, *means;
} known[] = {
    { "unshare: ", "this user cannot make namespaces (orch doctor says why and what to do)" },
    { "No space left on device",
      "the disk is full, or 80 % of the memory, where the packages are unpacked" },
    { "Unable to locate package", "a package of the recipe does not exist in its suite" },
    { "Could not resolve",
      "no way to the packages' server: is there a network, is http_proxy set?" },
    { "Could not connect",
      "no way to the packages' server: is there a network, is http_proxy set?" },
    { "Failed to fetch",
      "the packages' server does not have what its lists promise; later, or: sudo apt-get update" },
    { "NO_PUBKEY", "the suite's key is missing: sudo apt-get install debian-archive-keyring" },
};

int orch_disk_explain(const char *how, struct orch_slice said, struct orch_err *err)
{
    cleanup_buf struct orch_buf rest = { 0 };
    const char *means = "";
    for (const char *p = said.p, *end = said.p + said.n; p < end;) { /* all but progress */
        const char *nl = memchr(p, '\n', (size_t)(end - p));
        size_t n = (nl ? (size_t)(nl - p) : (size_t)(end - p));
        if (n && strncmp(p, "I: ", n < 3 ? n : 3) != 0)
            orch_buf_printf(&rest, "%s%.*s", rest.n ? "\n" : "", (int)n, p);
        p += n + 1;
    }
    for (size_t i = 0; i < ORCH_ARRAY_LEN(known) && !*means && rest.n; i++)
        if (strstr(rest.p, known[i].said))
            means = known[i].means;
    size_t skip = rest.n > SAID_MAX ? rest.n - SAID_MAX : 0;
    return orch_err_set(err, EIO, "its disk could not be made%s%s (%s): %s", *means ? ": " : "",
                        means, how, rest.n ? rest.p + skip : "");
}
