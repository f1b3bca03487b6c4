/* The floor for clones: bare QEMU from a kept template, no launcher, no confinement, no orch. Same
 * options, same guest, same two requests (RESTORE, EXEC `true`); everything is written ahead and
 * this process does nothing but wait. Prints median and p90 of exec → control channel, → state
 * loaded, → HELLO, → `true` ran, and of `qemu-system-x86_64 -version`. usage: clone_raw
 * CACHE_DIR/templates/KEY [ROUNDS [norandmaps]] */
#include "guest/wire.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define QEMU "/usr/bin/qemu-system-x86_64"
#define MAX_ROUNDS 1000
#define GAP_US 100000
enum { AGENT = 11, QMP = 12, MEM = 13, STATE = 14 };
enum { GREETING, LOADED, HELLO, RAN, VERSION, PHASES };

static double times[PHASES][MAX_ROUNDS];
static int mem, state;

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void die(const char *what)
{
    fprintf(stderr, "clone_raw: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int load(const char *dir, const char *name)
{
    static char buf[1 << 20];
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int from = open(path, O_RDONLY | O_CLOEXEC),
        to = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    struct stat st;
    if (from < 0 || to < 0 || fstat(from, &st) < 0 || ftruncate(to, st.st_size) < 0)
        die(path);
    for (off_t at = 0; (at = lseek(from, at, SEEK_DATA)) >= 0;) {
        off_t end = lseek(from, at, SEEK_HOLE);
        while (at < end) {
            ssize_t n = pread(from, buf,
                              end - at < (off_t)sizeof buf ? (size_t)(end - at) : sizeof buf, at);
            if (n <= 0 || pwrite(to, buf, (size_t)n, at) != n)
                die(path);
            at += n;
        }
    }
    close(from);
    fcntl(to, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
    return to;
}

static pid_t spawn(const char *const *argv, const int *from, const int *to, int n)
{
    posix_spawn_file_actions_t fa;
    pid_t pid;
    char *env[] = { NULL };
    posix_spawn_file_actions_init(&fa);
    posix_spawn_file_actions_addopen(&fa, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&fa, 1, "/dev/null", O_WRONLY, 0);
    for (int i = 0; i < n; i++)
        posix_spawn_file_actions_adddup2(&fa, from[i], to[i]);
    int e = posix_spawn(&pid, argv[0], &fa, NULL, (char **)(uintptr_t)argv, env);
    posix_spawn_file_actions_destroy(&fa);
    if (e) {
        errno = e;
        die(argv[0]);
    }
    return pid;
}

static void version(int round)
{
    const char *argv[] = { QEMU, "-version", NULL };
    double t = now_ms();
    pid_t pid = spawn(argv, NULL, NULL, 0);
    if (waitpid(pid, NULL, 0) != pid)
        die("waitpid");
    times[VERSION][round] = now_ms() - t;
}

static size_t frame(char *out, uint32_t id, int type, const void *body, uint32_t n)
{
    struct orch_wire_head h = { .len = n, .id = id, .type = (uint8_t)type };
    memcpy(out, &h, sizeof h);
    memcpy(out + sizeof h, body, n);
    return sizeof h + n;
}

static size_t requests(char *out, bool no_aslr)
{
    struct orch_wire_restore r = { .realtime_ns = (int64_t)time(NULL) * 1000000000,
                                   .epoch = { 1 } };
    struct {
        struct orch_wire_exec x;
        char strings[11];
    } e = { { .flags = no_aslr ? ORCH_WIRE_EXEC_NO_ASLR : 0, .n_argv = 1 },
            "\0"
            "1000\0"
            "true" };
    memset(r.entropy, 0x5a, sizeof r.entropy);
    size_t n = frame(out, 0, ORCH_WIRE_RESTORE, &r, sizeof r);
    return n + frame(out + n, 1, ORCH_WIRE_EXEC, &e, sizeof e.x + sizeof e.strings);
}

/* Reads frames until EXIT. */
static void serve(int agent, int qmp, int round, double start)
{
    static char in[1 << 16], said[1 << 16];
    size_t n = 0, m = 0;
    for (;;) {
        struct pollfd p[] = { { agent, POLLIN, 0 }, { qmp, POLLIN, 0 } };
        if (poll(p, 2, 10000) <= 0)
            die("no answer");
        if (p[1].revents) {
            ssize_t k = read(qmp, said + m, sizeof said - 1 - m);
            if (k <= 0)
                die("QEMU ended");
            m += (size_t)k;
            said[m] = 0;
            if (!times[GREETING][round])
                times[GREETING][round] = now_ms() - start;
            if (!times[LOADED][round] && strstr(said, "\"completed\""))
                times[LOADED][round] = now_ms() - start;
        }
        if (!p[0].revents)
            continue;
        ssize_t k = read(agent, in + n, sizeof in - n);
        if (k <= 0)
            die("QEMU ended");
        n += (size_t)k;
        struct orch_wire_head h;
        while (n >= sizeof h && (memcpy(&h, in, sizeof h), n >= sizeof h + h.len)) {
            if (h.type == ORCH_WIRE_HELLO)
                times[HELLO][round] = now_ms() - start;
            if (h.type == ORCH_WIRE_EXIT) {
                times[RAN][round] = now_ms() - start;
                return;
            }
            n -= sizeof h + h.len;
            memmove(in, in + sizeof h + h.len, n);
        }
    }
}

static void clone_once(int round, unsigned mib, bool no_aslr)
{
    static const char commands[] =
        "{\"execute\":\"qmp_capabilities\"}\n"
        "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":["
        "{\"capability\":\"x-ignore-shared\",\"state\":true},{\"capability\":\"events\",\"state\":"
        "true}]}}\n"
        "{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"fd:14\"}}\n";
    char size[32], object[128], path[64], out[1024];
    int agent[2], qmp[2];
    snprintf(size, sizeof size, "%uM", mib);
    snprintf(object, sizeof object,
             "memory-backend-file,id=mem,size=%s,mem-path=/proc/self/fd/%d,share=off", size, MEM);
    const char *argv[] = {
        QEMU,
        "-accel",
        "tcg,tb-size=64",
        "-M",
        "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,memory-backend=mem",
        "-cpu",
        "max",
        "-smp",
        "1",
        "-m",
        size,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-object",
        object,
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
        "-chardev",
        "socket,id=agent,fd=11",
        "-device",
        "virtio-serial-device",
        "-device",
        "virtserialport,chardev=agent,name=orch.0",
        "-object",
        "rng-builtin,id=rng",
        "-device",
        "virtio-rng-device,rng=rng",
        "-chardev",
        "socket,id=qmp,fd=12",
        "-mon",
        "chardev=qmp,mode=control",
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-incoming",
        "defer",
        NULL
    };
    snprintf(path, sizeof path, "/proc/self/fd/%d", state);
    int own_state = open(path, O_RDONLY | O_CLOEXEC);
    if (own_state < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, agent) < 0 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, qmp) < 0)
        die("descriptors");
    int from[] = { agent[1], qmp[1], mem, own_state }, to[] = { AGENT, QMP, MEM, STATE };
    /* dup2 onto numbers in use would lose them: move all out of the way first */
    for (int i = 0; i < 4; i++)
        if ((from[i] = fcntl(from[i], F_DUPFD_CLOEXEC, 50)) < 0)
            die("dup");
    double start = now_ms();
    pid_t pid = spawn(argv, from, to, 4);
    size_t n = requests(out, no_aslr);
    if (write(qmp[0], commands, sizeof commands - 1) < 0 || write(agent[0], out, n) < 0)
        die("write");
    for (int i = 0; i < 4; i++)
        close(from[i]);
    close(agent[1]);
    close(qmp[1]);
    close(own_state);
    serve(agent[0], qmp[0], round, start);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(agent[0]);
    close(qmp[0]);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    static const char *const names[PHASES] = { "vmm", "state", "ready", "true ran", "-version" };
    int rounds = argc > 2 ? atoi(argv[2]) : 20;
    if (argc < 2 || rounds < 1 || rounds > MAX_ROUNDS) {
        fprintf(stderr, "usage: clone_raw CACHE_DIR/templates/KEY [ROUNDS [norandmaps]]\n");
        return 2;
    }
    mem = load(argv[1], "mem");
    state = load(argv[1], "state");
    struct stat st;
    if (fstat(mem, &st) < 0)
        die("mem");
    for (int i = 0; i < rounds; i++) {
        clone_once(i, (unsigned)(st.st_size >> 20), argc > 3);
        usleep(GAP_US);
        version(i);
    }
    for (int i = 0; i < PHASES; i++) {
        qsort(times[i], (size_t)rounds, sizeof times[i][0], by_value);
        printf("%-10s median %7.1f  p90 %7.1f ms\n", names[i], times[i][rounds / 2],
               times[i][rounds * 9 / 10]);
    }
    return 0;
}
