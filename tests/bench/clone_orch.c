/* orch's clones: spawn → `true` (or COMMAND) ran in the guest → freed, ROUNDS times in one process,
 * pool 0. Compare with clone_raw.c, which does the same with bare QEMU. IMAGE, ACCEL and ASLR=1
 * (the guest's, which is off under emulation otherwise) are taken from the environment. NETWORK=1:
 * behind the packet filter of a policy, with an uplink. usage: clone_orch LAUNCHER AGENT CACHE_DIR
 * RUNTIME_DIR [ROUNDS [AT_ONCE [COMMAND ARG…]]] */
#include "base/log.h"
#include "vm/vm.h"

#include <dirent.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#define MAX_AT_ONCE 64
#define GAP_US 100000 /* the last one's end must not cost the next one time */

struct run {
    struct orch_vm *vm;
    int64_t start_us;
    double ready_ms, done_ms;
    struct orch_vm_phase phases[9];
};

static struct orch_loop *loop;
static int left;
static const char *const *command;

static void show(void *ud, const char *line)
{
    (void)ud;
    fprintf(stderr, "%s\n", line);
}

static void executed(void *ud, const struct orch_exec_result *r, const struct orch_err *err)
{
    struct run *x = ud;
    if (err || r->status != 0) {
        fprintf(stderr, "%s failed: %s\n", command[0], err ? err->msg : "status");
        exit(1);
    }
    x->done_ms = (double)(orch_now_us() - x->start_us) / 1000;
    if (--left == 0)
        orch_loop_stop(loop);
}

static void ready(void *ud, struct orch_vm *vm, const struct orch_err *err)
{
    struct run *x = ud;
    if (err) {
        fprintf(stderr, "%s\n", err->msg);
        exit(1);
    }
    x->ready_ms = orch_vm_spawn_ms(vm);
    int n = 0;
    for (const struct orch_vm_phase *p = orch_vm_phases(vm); p->name; p++)
        x->phases[n++] = *p;
    struct orch_exec_opts o = { .argv = command,
                                .no_aslr = orch_vm_no_aslr(vm) && !getenv("ASLR"),
                                .done = executed,
                                .ud = x };
    struct orch_err why;
    struct orch_channel *channel = orch_vm_channel(vm, &why);
    if (!channel || !orch_exec_start(channel, &o, &why)) {
        fprintf(stderr, "%s\n", why.msg);
        exit(1);
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print(const char *name, double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, by_value);
    printf("%-10s median %7.1f  p90 %7.1f ms\n", name, v[n / 2], v[n * 9 / 10]);
}

static struct orch_rules *some_rules(void)
{
    static const struct orch_ports https = { 443, 443 };
    static const struct orch_allow allow = { { 0xc6336400, 24 }, IPPROTO_TCP, &https, 1 };
    struct orch_err err = { .code = 0 };
    struct orch_rules *r =
        orch_rules_new(&(struct orch_policy){ .allow = &allow, .n_allow = 1, .connections = 64 },
                       &err);
    if (!r) {
        fprintf(stderr, "%s\n", err.msg);
        exit(1);
    }
    return r;
}

int main(int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "usage: clone_orch LAUNCHER AGENT CACHE_DIR RUNTIME_DIR [ROUNDS [AT_ONCE "
                        "[COMMAND ARG…]]]\n");
        return 2;
    }
    int rounds = argc > 5 ? atoi(argv[5]) : 20, at_once = argc > 6 ? atoi(argv[6]) : 1;
    if (rounds < 1 || at_once < 1 || at_once > MAX_AT_ONCE)
        return 2;
    static const char *const just_true[] = { "true", NULL };
    command = argc > 7 ? (const char *const *)argv + 7 : just_true;
    struct orch_err err;
    orch_log_use(&(struct orch_log){ .least = getenv("VERBOSE") ? ORCH_DEBUG : ORCH_WARN });
    loop = orch_loop_new(&err);
    struct orch_vms_opts o = { .launcher_path = argv[1],
                               .agent_path = argv[2],
                               .cache_dir = argv[3],
                               .runtime_dir = argv[4],
                               .max = MAX_AT_ONCE,
                               .progress = show };
    if (getenv("BOOT_MS"))
        o.boot_ms = o.clone_ms = atoi(getenv("BOOT_MS"));
    struct orch_vms *m = orch_vms_new(loop, &o, &err);
    if (!m) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    double *done = orch_xcalloc((size_t)rounds, sizeof *done), *phase[9];
    struct run *x = orch_xcalloc((size_t)at_once, sizeof *x);
    const char *names[9] = { 0 };
    for (int i = 0; i < 9; i++)
        phase[i] = orch_xcalloc((size_t)rounds, sizeof *done);
    int n = 0;
    for (int r = -1; r < rounds; r++) { /* the first is the template's: not counted */
        left = at_once;
        for (int i = 0; i < at_once; i++) {
            struct orch_vm_opts vo = {
                .image = getenv("IMAGE"), .accel = getenv("ACCEL"), .ready = ready, .ud = &x[i]
            };
            if (getenv("NETWORK")) {
                vo.network = "bench";
                vo.rules = some_rules();
            }
            x[i].start_us = orch_now_us();
            x[i].vm = orch_vm_spawn(m, &vo, &err);
            if (!x[i].vm) {
                fprintf(stderr, "%s\n", err.msg);
                return 1;
            }
        }
        orch_loop_run(loop);
        double last = 0;
        for (int i = 0; i < at_once; i++) {
            last = x[i].done_ms > last ? x[i].done_ms : last;
            orch_vm_free(x[i].vm);
        }
        usleep(GAP_US);
        if (r < 0) {
            printf("first (template found or made): %.1f ms\n", last);
            for (int i = 0; x[0].phases[i].name; i++)
                printf("  %-8s %7.1f ms\n", x[0].phases[i].name, x[0].phases[i].ms);
            continue;
        }
        done[r] = last;
        for (n = 0; x[0].phases[n].name; n++) {
            names[n] = x[0].phases[n].name;
            phase[n][r] = x[0].phases[n].ms;
        }
    }
    for (int i = 0; i < n; i++)
        print(names[i], phase[i], rounds);
    print(argc > 7 ? "done" : "true ran", done, rounds);
    for (int i = 0; i < 9; i++)
        free(phase[i]);
    free(done);
    free(x);
    orch_vms_free(m);
    orch_loop_free(loop);
    return 0;
}
