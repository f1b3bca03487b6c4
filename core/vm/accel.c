#include "accel.h"

#include "../base/hash.h"
#include "../base/json.h"
#include "../base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>

#define DEVICE "/dev/kvm"
#define MAX_VERDICTS 8
#define FILE_MAX (64 * 1024)

int orch_accel_device(struct orch_err *err)
{
    struct stat st;
    if (stat(DEVICE, &st) < 0)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, errno,
                             DEVICE ": %s; switch virtualization on in the firmware and load the "
                                    "module kvm_intel or kvm_amd",
                             strerror(errno));
    bool usable;
    if (geteuid() == 0) {
        /* A root orch runs VMMs under a uid of their own that gets the device's group, unless it is
         * root's. */
        mode_t need = st.st_gid ? (st.st_mode >> 3) | st.st_mode : st.st_mode;
        usable = (need & 06) == 06;
    } else {
        usable = faccessat(AT_FDCWD, DEVICE, R_OK | W_OK, AT_EACCESS) == 0;
    }
    if (usable)
        return 0;
    return orch_err_setc(
        err, ORCH_CLASS_ISOLATION, EACCES,
        DEVICE ": permission denied (mode %04o, uid %u, gid %u); %s", (unsigned)st.st_mode & 07777,
        (unsigned)st.st_uid, (unsigned)st.st_gid,
        st.st_gid == 0   ? "give it to group kvm: chgrp kvm " DEVICE "; chmod 660 " DEVICE
        : geteuid() == 0 ? "let its group use it: chmod 660 " DEVICE
                         : "add yourself to group kvm: usermod -aG kvm USER, then log in again");
}

static void add_cpu_model(struct orch_buf *out)
{
    cleanup_buf struct orch_buf text = { 0 };
    int fd = open("/proc/cpuinfo", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    orch_buf_reserve(&text, 8192);
    ssize_t n = read(fd, text.p, 8192);
    close(fd);
    text.p[n > 0 ? n : 0] = 0;
    static const char *const fields[] = { "\nvendor_id",  "\ncpu family", "\nmodel\t",
                                          "\nmodel name", "\nstepping",   "\nflags" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(fields); i++) {
        const char *at = strstr(text.p, fields[i]);
        if (at)
            orch_buf_add(out, at, 1 + strcspn(at + 1, "\n"));
    }
}

void orch_accel_host_key(struct orch_slice vmm_identity, char out[65])
{
    cleanup_buf struct orch_buf text = { 0 };
    struct utsname u;
    uname(&u);
    orch_buf_printf(&text, "%s %s\n", u.release, u.version);
    add_cpu_model(&text);
    orch_buf_char(&text, '\n');
    orch_buf_slice(&text, vmm_identity);
    orch_sha256_hex(text.p, text.n, out);
}

/* The file: {"verdicts":[{"host":…,"image":…,"works":bool,"why":…},…]}, newest first. */
static void load(const char *cache_dir, struct orch_buf *text, struct orch_json_doc *doc)
{
    cleanup_free char *path = orch_xasprintf("%s/accel.json", cache_dir);
    struct orch_json_limits lim = { FILE_MAX, 8, 4096 };
    struct orch_json_fault fault;
    if (orch_read_file(AT_FDCWD, path, FILE_MAX, text) < 0)
        return;
    if (orch_json_scan(doc, (struct orch_slice){ text->p, text->n }, &lim, &fault) < 0) {
        orch_log(ORCH_WARN, "%s: byte %zu: %s; KVM is tried again", path, fault.byte, fault.rule);
        doc->n = 0;
    }
}

/* Token of the first entry, or 0; its number in *count. */
static uint32_t first_entry(const struct orch_json_doc *doc, uint32_t *count)
{
    uint32_t list = doc->n ? orch_json_get(doc, 0, "verdicts") : 0;
    *count = list && doc->toks[list].type == ORCH_JSON_ARRAY ? doc->toks[list].count : 0;
    return list + 1;
}

static bool is_for(const struct orch_json_doc *doc, uint32_t entry, const char *host_key,
                   const char *image)
{
    uint32_t h = orch_json_get(doc, entry, "host"), i = orch_json_get(doc, entry, "image");
    return h && i && orch_json_string_eq(doc, h, host_key) &&
           (!image || orch_json_string_eq(doc, i, image));
}

enum orch_accel_verdict orch_accel_recall(const char *cache_dir, const char *host_key,
                                          const char *image, struct orch_buf *why)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_json struct orch_json_doc doc = { 0 };
    uint32_t count;
    load(cache_dir, &text, &doc);
    uint32_t e = first_entry(&doc, &count);
    for (; count; count--, e = doc.toks[e].next) {
        uint32_t works = orch_json_get(&doc, e, "works");
        if (!works || !is_for(&doc, e, host_key, image))
            continue;
        if (doc.toks[works].type == ORCH_JSON_TRUE)
            return ORCH_ACCEL_WORKS;
        orch_json_string(&doc, orch_json_get(&doc, e, "why"), why);
        return ORCH_ACCEL_FAILS;
    }
    return ORCH_ACCEL_UNTRIED;
}

void orch_accel_remember(const char *cache_dir, const char *host_key, const char *image,
                         enum orch_accel_verdict v, const char *why)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    cleanup_json struct orch_json_doc doc = { 0 };
    cleanup_free char *path = orch_xasprintf("%s/accel.json", cache_dir);
    uint32_t count, kept = 1;
    orch_buf_printf(&out,
                    "{\"verdicts\":[\n{\"host\":\"%s\",\"image\":\"%s\",\"works\":%s,\"why\":",
                    host_key, image, v == ORCH_ACCEL_WORKS ? "true" : "false");
    orch_json_quote(&out, orch_slice_str(why ? why : ""));
    orch_buf_char(&out, '}');
    load(cache_dir, &text, &doc);
    uint32_t e = first_entry(&doc, &count);
    for (; count && kept < MAX_VERDICTS; count--, e = doc.toks[e].next) {
        if (is_for(&doc, e, host_key, image))
            continue;
        orch_buf_str(&out, ",\n");
        orch_buf_slice(&out, orch_json_raw(&doc, e));
        kept++;
    }
    orch_buf_str(&out, "\n]}\n");
    int r = orch_write_file(AT_FDCWD, path, out.p, out.n, 0600);
    if (r < 0)
        orch_log(ORCH_WARN, "%s: cannot be written, KVM is tried again by the next process: %s",
                 path, strerror(-r));
}
