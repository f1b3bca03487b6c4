/* What a microVM is, for those who ask, and its events for the audit log. */
#include "vm_int.h"

#include "../base/json.h"
#include "../base/log.h"
#include "../base/proc.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

const char *orch_isolation_name(enum orch_isolation i)
{
    static const char *const names[] = { "none", "hardware", "emulated" };
    return names[i];
}

const char *orch_vm_id(const struct orch_vm *vm)
{
    return vm->id;
}

const char *orch_vm_name(const struct orch_vm *vm)
{
    return vm->name;
}

const char *orch_vm_call(const struct orch_vm *vm)
{
    return vm->call;
}

int64_t orch_vm_spawned_us(const struct orch_vm *vm)
{
    return vm->spawned_us;
}

const char *orch_vm_backend(const struct orch_vm *vm)
{
    return vm->m->backend->name;
}

const char *orch_vm_image(const struct orch_vm *vm)
{
    return vm->image;
}

enum orch_isolation orch_vm_isolation(const struct orch_vm *vm)
{
    return vm->isolation;
}

double orch_vm_spawn_ms(const struct orch_vm *vm)
{
    return vm->n_phases ? vm->phases[vm->n_phases - 1].ms : 0;
}

const struct orch_vm_phase *orch_vm_phases(const struct orch_vm *vm)
{
    return vm->phases;
}

struct orch_slice orch_vm_log_tail(const struct orch_vm *vm)
{
    return vm->rundir ? orch_rundir_tail(vm->rundir) : ORCH_SLICE("");
}

bool orch_vm_no_aslr(const struct orch_vm *vm)
{
    return vm->isolation == ORCH_ISOLATION_EMULATED;
}

const char *orch_vm_network(const struct orch_vm *vm)
{
    return vm->network;
}

int orch_vm_counters(struct orch_vm *vm,
                     void (*fn)(void *ud, const char *label, uint64_t packets, uint64_t bytes),
                     void *ud, struct orch_err *err)
{
    return vm->netns ? orch_nft_counters(orch_netns_nft(vm->netns), fn, ud, err) : 0;
}

/* Of a process that may have ended meanwhile: then 0. */
static uint64_t pss_bytes(int pid)
{
    char path[48];
    cleanup_buf struct orch_buf text = { 0 };
    snprintf(path, sizeof path, "/proc/%d/smaps_rollup", pid);
    if (pid <= 0 || orch_read_file(AT_FDCWD, path, 65536, &text) < 0)
        return 0;
    const char *line = strstr(text.p, "\nPss:");
    return line ? strtoull(line + 5, NULL, 10) * 1024 : 0;
}

int orch_vm_usage(struct orch_vm *vm, struct orch_vm_usage *out, struct orch_err *err)
{
    char path[64];
    int pids[2] = { 0 };
    cleanup_buf struct orch_buf text = { 0 };
    struct orch_cell *cell = vm->vmm ? vm->m->backend->cell(vm->vmm) : NULL;
    int init = cell ? orch_cell_init(cell) : 0;
    *out = (struct orch_vm_usage){ 0 };
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", init, init);
    int r = init ? orch_read_file(AT_FDCWD, path, 4096, &text) : -ESRCH;
    if (r < 0 && r != -ESRCH && r != -ENOENT)
        return orch_err_set(err, -r, "memory of microVM %s: %s: %s", vm->id, path, strerror(-r));
    /* In the order in which they were started. */
    int n = r < 0 ? 0 : sscanf(text.p, "%d %d", &pids[0], &pids[1]);
    out->vmm_bytes = n > 0 ? pss_bytes(pids[n - 1]) : 0;
    out->uplink_bytes = n > 1 ? pss_bytes(pids[0]) : 0;
    return vm->netns ? orch_nft_connections(orch_netns_nft(vm->netns), &out->connections, err) : 0;
}

/* ---- events */

static void add_string(struct orch_buf *b, const char *key, const char *value)
{
    orch_buf_printf(b, "%s\"%s\":", b->n ? "," : "", key);
    if (value)
        orch_json_quote(b, orch_slice_str(value));
    else
        orch_buf_str(b, "null");
}

static void emit(struct orch_vm *vm, const char *event, const struct orch_buf *fields)
{
    if (vm->m->o.event)
        vm->m->o.event(vm->m->o.ud, event, (struct orch_slice){ fields->p, fields->n });
    cleanup_free char *object = orch_xasprintf("{%s}", fields->p);
    orch_log_fields(ORCH_INFO, orch_slice_str(event), orch_slice_str(object));
}

static void add_ms(struct orch_buf *f, double ms)
{
    orch_buf_str(f, ",\"ms\":");
    orch_json_put_number(f, round(ms * 10) / 10);
}

void orch_vm_emit_spawn(struct orch_vm *vm)
{
    cleanup_buf struct orch_buf f = { 0 };
    add_string(&f, "vm", vm->id);
    add_string(&f, "image", vm->image);
    add_string(&f, "backend", vm->m->backend->name);
    add_string(&f, "isolation", orch_isolation_name(vm->isolation));
    if (vm->call)
        add_string(&f, "call", vm->call);
    add_ms(&f, orch_vm_spawn_ms(vm));
    emit(vm, "vm_spawn", &f);
}

void orch_vm_emit_exit(struct orch_vm *vm)
{
    cleanup_buf struct orch_buf f = { 0 };
    char how[64];
    if (!vm->started_us)
        return;
    if (vm->status >= 0)
        orch_proc_describe(vm->status, how, sizeof how);
    add_string(&f, "vm", vm->id);
    add_string(&f, "reason", vm->reason);
    add_string(&f, "status", vm->status >= 0 ? how : NULL);
    add_ms(&f, orch_ms_since(vm->started_us));
    emit(vm, "vm_exit", &f);
    vm->started_us = 0;
}

static const char *proto_name(const struct orch_denied *d)
{
    if (!d->has_ip)
        return d->type == ETHERTYPE_ARP ? "arp" : NULL;
    switch (d->proto) {
    case IPPROTO_TCP:
        return "tcp";
    case IPPROTO_UDP:
        return "udp";
    case IPPROTO_ICMP:
        return "icmp";
    default:
        return NULL;
    }
}

void orch_vm_emit_deny(void *ud, const char *rule, const struct orch_denied *d)
{
    struct orch_vm *vm = ud;
    cleanup_buf struct orch_buf f = { 0 };
    char dst[ORCH_CIDR_TEXT], number[16];
    const char *proto = proto_name(d);
    add_string(&f, "vm", vm->id);
    if (vm->call)
        add_string(&f, "call", vm->call);
    add_string(&f, "rule", rule);
    orch_cidr_text((struct orch_cidr){ d->dst, 32 }, dst);
    if (d->has_ip)
        add_string(&f, "dst", dst);
    snprintf(number, sizeof number, d->has_ip ? "%u" : "0x%04x", d->has_ip ? d->proto : d->type);
    add_string(&f, "proto", proto ? proto : number); /* of IP, or what the frame says it is */
    if (d->has_port)
        orch_buf_printf(&f, ",\"port\":%u", d->port);
    if (d->missed)
        orch_buf_printf(&f, ",\"missed\":%u", d->missed);
    emit(vm, "net_deny", &f);
}
