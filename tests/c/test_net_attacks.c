/* What gets out of a real microVM, in which the attacker is root (tests/e2e/attack.c).
 *
 * The machine is played by namespaces: H, in which this test and all of orch run, with one device
 * to W, the internet, which is the default route's way and answers for every address the attacks
 * are about. Judged by captures: of what arrives in W, of H's loopback, and, before pasta can hide
 * anything, of what leaves the microVM's own namespace on either side.
 *
 *   test_net_attacks            the cases and the rest of the tests
 *   test_net_attacks --mutate   each case against a filter without the rule that stops it: red
 * Needs root and, once, the network for Debian's kernel; images stay in ORCH_TEST_CACHE or
 * build/test-cache. */
#include <stdarg.h>
#include <stddef.h>

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>

#include "child.h"
#include "base/log.h"
#include "net/link.h"
#include "vm/vm.h"

#define HOST "203.0.113.2"
#define OTHER "203.0.113.77"
#define SERVER "198.51.100.10"
#define LIMIT 64
#define START_MS 180000

static char dir[64] = "/tmp/orch-attacks-XXXXXX", orch[512], launcher[96], agent[96], cache[4096];
static struct orch_buf attack;
static int broker, in_world, in_loopback, world_if;

/* ---- the cases */

/* What is done to the filter so that the case shows: a rule goes, or accepts, or one match (or all)
 * of a rule that accepts goes. */
enum how { NOTHING, GONE, ACCEPTS, WITHOUT, ACCEPTS_ALL };
struct change {
    const char *label;
    enum how how;
    unsigned match;
};
struct attack {
    const char *name, *args;
    const char *rule; /* which counts it; NULL: the kernel has no way for it before any rule */
    struct change change[2];
    bool arp;           /* an answer by ARP is what must not come */
    unsigned permitted; /* packets to the uplink */
};

#define TAP_IP "tap: IPv4 of the guest"
#define TAP_ARP "tap: ARP for the gateway"
#define STOPS(label, ...) .rule = label, .change = { __VA_ARGS__ }
#define FRAME STOPS("tap: rest", { TAP_IP, WITHOUT, 0 })
#define VERSION STOPS("tap: rest", { TAP_IP, WITHOUT, 1 })
#define FRAGMENT STOPS("tap: rest", { TAP_IP, WITHOUT, 2 })
#define SOURCE STOPS("tap: rest", { TAP_IP, WITHOUT, 3 })
#define ANY_FRAME STOPS("tap: rest", { TAP_IP, ACCEPTS_ALL, 0 })
#define ARP(n) STOPS("tap: rest", { TAP_ARP, WITHOUT, n }), .arp = true
#define ITSELF(label) STOPS(label, { label, ACCEPTS, 0 })
#define ALLOW ITSELF("allow: rest")
#define FLOW ITSELF("flow: rest")
#define INPUT STOPS("input: rest", { "input: rest", ACCEPTS, 0 }, { "output: rest", ACCEPTS, 0 })
#define INPUT_MUTE STOPS("input: rest", { "input: rest", GONE, 0 }) /* nothing there would answer */
#define NEVER(range) STOPS("never: " range, { "never: " range, GONE, 0 })
#define KERNEL .rule = NULL
#define MAC "02:00:00:00:00:02"
#define UDP "udp " SERVER " 5300 "
#define TCP "tcp " SERVER " 80 "
#define IPV6_HEAD "33:33:00:00:00:01:" MAC ":86:dd:60:00:00:00:00:10:"
#define LOCAL6 "fe:80:00:00:00:00:00:00:00:00:00:ff:fe:00:00:02:"
#define GLOBAL6 "20:01:0d:b8:00:00:00:00:00:00:00:00:00:00:00:10:"
#define GROUP6 "ff:02:00:00:00:00:00:00:00:00:00:00:00:00:00:01:"

static const struct attack attacks[] = {
    /* frames */
    { "MAC of another", UDP "smac=02:00:00:00:00:03", FRAME },
    { "MAC of the gateway", UDP "smac=02:00:00:00:00:01", FRAME },
    { "MAC of a group", UDP "smac=ff:ff:ff:ff:ff:ff", FRAME },
    { "VLAN 0", UDP "vlan=0", FRAME },
    { "VLAN 5", UDP "vlan=5", FRAME },
    { "VLAN in VLAN", UDP "vlan=0 qinq=0", ANY_FRAME },
    { "IPv4 as another type", UDP "type=9000", FRAME },
    { "IPv4 as IPv6", UDP "type=86dd", FRAME },
    { "IPv6 echo to all nodes",
      "frame " IPV6_HEAD "3a:ff:" LOCAL6 GROUP6 "80:00:00:00:00:01:00:01:00:00:00:00:00:00:00:00",
      ANY_FRAME },
    { "IPv6 UDP to the world",
      "frame " IPV6_HEAD "11:40:" LOCAL6 GLOBAL6 "9c:40:14:b4:00:10:00:00:00:00:00:00:00:00:00:00",
      ANY_FRAME },
    { "IPv6 router advertisement",
      "frame " IPV6_HEAD "3a:ff:" LOCAL6 GROUP6 "86:00:00:00:40:08:07:08:00:00:00:00:00:00:00:00",
      ANY_FRAME },
    { "spanning tree",
      "frame 01:80:c2:00:00:00:" MAC ":00:26:42:42:03:00:00:00:00:00:00:00:00:00:00", ANY_FRAME },
    { "link layer discovery", "frame 01:80:c2:00:00:0e:" MAC ":88:cc:02:07:04:00:00:00:00:00:00",
      ANY_FRAME },
    { "PPPoE discovery", "frame ff:ff:ff:ff:ff:ff:" MAC ":88:63:11:09:00:00:00:04:01:01:00:00",
      ANY_FRAME },
    { "a frame of 15 bytes", "frame 02:00:00:00:00:01:" MAC ":08:00:45", ANY_FRAME },
    /* ARP */
    { "ARP probe without an address", "arp 1 " MAC " 0.0.0.0 10.255.0.1", ARP(2) },
    { "ARP with hardware of another", "arp 1 02:00:00:00:00:09 10.255.0.2 10.255.0.1", ARP(2) },
    { "ARP for the uplink's address", "arp 1 " MAC " 10.255.0.2 10.255.1.2", ARP(3) },
    { "ARP in the gateway's name", "arp 1 " MAC " 10.255.0.1 10.255.0.1", ARP(2) },
    { "ARP answer", "arp 2 " MAC " 10.255.0.2 10.255.0.1", ARP(1) },
    /* IPv4 */
    { "source beside", UDP "src=10.255.0.1", SOURCE },
    { "source in the world", UDP "src=8.8.8.8", SOURCE },
    { "source loopback", UDP "src=127.0.0.1", SOURCE },
    { "source the host", UDP "src=" HOST, SOURCE },
    { "fragments", UDP "frag=both", FRAGMENT },
    { "tiny fragments", TCP "frag=tiny", FRAGMENT },
    { "first fragment alone", UDP "frag=first", FRAGMENT },
    { "later fragment alone", UDP "frag=rest", FRAGMENT },
    { "IP option: none", UDP "opts=01010100", VERSION },
    { "IP option: router alert", UDP "opts=94040000", VERSION },
    { "IP option: source route", UDP "opts=830704c633640a00", VERSION },
    { "ICMP echo", "1 " SERVER " 0 body=0800000000010001", ALLOW },
    { "ICMP about a flow",
      "1 " SERVER
      " 0 body=0303000000000000450000240000400040110000c633640a0aff000214b44e2000100000",
      ALLOW },
    { "ICMP redirect",
      "1 " SERVER
      " 0 body=05010000c63364014500002400004000401100000aff0002c633640a4e2014b400100000",
      ALLOW },
    { "IP in IP", "4 " SERVER " 0", ALLOW },
    { "GRE", "47 " SERVER " 0", ALLOW },
    { "ESP", "50 " SERVER " 0", ALLOW },
    { "OSPF", "89 " SERVER " 0", ALLOW },
    { "SCTP", "132 " SERVER " 0 body=4e20005000000000f00000000100001000000001", ALLOW },
    { "UDP-Lite", "136 " SERVER " 0 body=4e2014b400000000", ALLOW },
    { "protocol 255", "255 " SERVER " 0", ALLOW },
    { "TTL 1", UDP "ttl=1", ITSELF("output: rest") },
    { "back to itself", "udp 10.255.0.2 5300",
      STOPS("forward: rest", { "forward: rest", ACCEPTS, 0 }, { "nat: rest", ACCEPTS, 0 }) },
    /* ports and networks */
    { "UDP to another port", "udp " SERVER " 5301", ALLOW },
    { "UDP to a TCP port", "udp " SERVER " 80", ALLOW },
    { "TCP to another port", "tcp " SERVER " 81", ALLOW },
    { "TCP to a UDP port", "tcp " SERVER " 5300", ALLOW },
    { "port behind a range", "tcp " SERVER " 8011", ALLOW },
    { "port before a range", "tcp " SERVER " 7999", ALLOW },
    { "port 0", "udp " SERVER " 0", ALLOW },
    { "network beside", "tcp 198.51.101.10 80", ALLOW },
    { "DNS over UDP", "udp 8.8.8.8 53", ALLOW },
    { "DNS over TCP", "tcp 8.8.8.8 53", ALLOW },
    { "DNS of an allowed address", "udp " SERVER " 53", ALLOW },
    { "NTP", "udp 8.8.8.8 123", ALLOW },
    { "SMTP", "tcp 8.8.8.8 25", ALLOW },
    /* the namespace, the host, what is private */
    { "gateway TCP", "tcp 10.255.0.1 22", INPUT },
    { "gateway UDP", "udp 10.255.0.1 53", INPUT },
    { "gateway ICMP", "1 10.255.0.1 0 body=0800000000010001", INPUT },
    { "uplink's own address", "tcp 10.255.1.2 80", INPUT },
    { "broadcast", "udp 255.255.255.255 67 dmac=ff:ff:ff:ff:ff:ff", INPUT_MUTE },
    { "broadcast of the subnet", "udp 10.255.0.3 5300 dmac=ff:ff:ff:ff:ff:ff", INPUT_MUTE },
    { "all hosts", "1 224.0.0.1 0 dmac=01:00:5e:00:00:01 body=0800000000010001", INPUT_MUTE },
    { "uplink's gateway", "tcp 10.255.1.1 80", NEVER("10.0.0.0/8 (private)") },
    { "a service of the host on 0.0.0.0", "tcp " HOST " 80", NEVER(HOST " (host)") },
    { "a UDP service of the host", "udp " HOST " 5300", NEVER(HOST " (host)") },
    { "another address of the host", "tcp " OTHER " 80", NEVER(OTHER " (host)") },
    { "127.0.0.1", "tcp 127.0.0.1 8001", KERNEL },
    { "0.0.0.0", "tcp 0.0.0.0 80", KERNEL },
    { "a group", "udp 239.1.1.1 5300 dmac=01:00:5e:01:01:01", KERNEL },
    { "metadata", "tcp 169.254.169.254 80", NEVER("169.254.0.0/16 (link-local and metadata)") },
    { "metadata of Azure", "tcp 168.63.129.16 80", NEVER("168.63.129.16 (metadata)") },
    { "metadata of Oracle", "tcp 192.0.0.192 80", NEVER("192.0.0.192 (metadata)") },
    { "private 10", "tcp 10.1.2.3 80", NEVER("10.0.0.0/8 (private)") },
    { "private 172.16", "udp 172.16.0.1 5300", NEVER("172.16.0.0/12 (private)") },
    { "private 192.168", "tcp 192.168.1.1 80", NEVER("192.168.0.0/16 (private)") },
    { "carrier-grade NAT", "tcp 100.64.0.1 80", NEVER("100.64.0.0/10 (carrier-grade NAT)") },
    { "benchmarks", "tcp 198.18.0.1 80", NEVER("198.18.0.0/15 (benchmarks)") },
    { "reserved", "tcp 240.0.0.1 80", NEVER("240.0.0.0/4 (reserved and broadcast)") },
    /* flows */
    { "in the midst of a flow", TCP "flags=10", FLOW },
    { "SYN and ACK", TCP "flags=12", FLOW },
    { "SYN and FIN", TCP "flags=03", FLOW },
    { "all flags", TCP "flags=3f", FLOW },
    { "no flags", TCP "flags=00", FLOW },
    { "reset", TCP "flags=04", FLOW },
    { "more flows than allowed", UDP "count=80 sport=30000",
      STOPS("flow: more than 64 connections", { "flow: more than 64 connections", GONE, 0 }),
      .permitted = LIMIT },
};

struct control {
    const char *name, *args, *user;
};
static const struct control controls[] = {
    { "TCP", "stream " SERVER " 80 10 10", "root" },
    { "TCP as uid 1000", "stream " SERVER " 80 10 10", "1000" },
    { "UDP", "echo " SERVER " 5300 100", "root" },
    { "UDP of 1472 bytes", "echo " SERVER " 5300 1472", "root" },
    { "UDP of an empty datagram", "echo " SERVER " 5300 0", "root" },
    { "first port of a range", "stream " SERVER " 8000 10 10", "root" },
    { "last port of a range", "stream " SERVER " 8010 10 10", "root" },
    { "another address of the network", "stream 198.51.100.254 80 10 10", "root" },
    { "4 MiB up", "stream " SERVER " 80 4194304 1", "root" },
    { "4 MiB down", "stream " SERVER " 80 1 4194304", "root" },
    { "both ways at once", "stream " SERVER " 8005 300000 300000 4", "root" },
    { "48 connections at once", "stream " SERVER " 80 1000 1000 48", "root" },
    { "48 more behind them", "stream " SERVER " 80 1000 1000 48", "root" },
};

/* ---- the policy */

static const struct orch_ports tcp_ports[] = { { 80, 80 }, { 8000, 8010 } },
                               udp_ports[] = { { 5300, 5300 } };
/* The attacks' targets are allowed by it as far as it can: what stops them is not that nobody named
 * them. */
static const uint32_t networks[][2] = {
    { 0xc6336400, 24 }, { 0x00000000, 8 },  { 0x0a000000, 8 },  { 0x64400000, 10 },
    { 0x7f000000, 8 },  { 0xa83f8110, 32 }, { 0xa9fe0000, 16 }, { 0xac100000, 12 },
    { 0xc00000c0, 32 }, { 0xc0a80000, 16 }, { 0xc6120000, 15 }, { 0xcb007100, 24 },
    { 0xe0000000, 4 },  { 0xf0000000, 4 },
};

static struct orch_rules *policy(void)
{
    struct orch_err err = { .code = 0 };
    struct orch_allow allow[2 * ORCH_ARRAY_LEN(networks)];
    struct orch_cidr *host;
    size_t n_host;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(networks); i++) {
        struct orch_cidr c = { networks[i][0], networks[i][1] };
        allow[2 * i] = (struct orch_allow){ c, IPPROTO_TCP, tcp_ports, 2 };
        allow[2 * i + 1] = (struct orch_allow){ c, IPPROTO_UDP, udp_ports, 1 };
    }
    CHECK(!orch_link_host(&host, &n_host, &err), "%s", err.msg);
    struct orch_policy p = { .allow = allow,
                             .n_allow = ORCH_ARRAY_LEN(allow),
                             .connections = LIMIT,
                             .host = host,
                             .n_host = n_host };
    struct orch_rules *r = orch_rules_new(&p, &err);
    CHECK(r, "%s", err.msg);
    free(host);
    return r;
}

static void apply(struct orch_rules *r, const struct change *c)
{
    size_t i = 0;
    while (i < r->n_rules && strcmp(r->rules[i].label, c->label))
        i++;
    CHECK(i < r->n_rules, "no rule %s", c->label);
    struct orch_rule *rule = &r->rules[i];
    switch (c->how) {
    case NOTHING:
        break;
    case GONE:
        memmove(rule, rule + 1, (--r->n_rules - i) * sizeof *rule);
        break;
    case ACCEPTS:
        rule->verdict = ORCH_VERDICT_ACCEPT;
        break;
    case WITHOUT:
        CHECK(c->match < rule->n_match, "%s has no match %u", c->label, c->match);
        memmove(rule->match + c->match, rule->match + c->match + 1,
                (--rule->n_match - c->match) * sizeof *rule->match);
        break;
    case ACCEPTS_ALL:
        rule->n_match = 0;
        break;
    }
}

/* ---- microVMs */

static struct orch_loop *loop;
static struct orch_vms *vms;

struct guest {
    struct orch_vm *vm;
    bool ready, failed, lost;
    struct orch_err err;
    int tap, up, capture; /* devices of its namespace, and all that passes there */
};

static void on_ready(void *ud, struct orch_vm *vm, const struct orch_err *err)
{
    struct guest *g = ud;
    (void)vm;
    g->ready = !err;
    g->failed = err;
    if (err)
        g->err = *err;
}

static void on_lost(void *ud, struct orch_vm *vm, const struct orch_err *err)
{
    struct guest *g = ud;
    (void)vm;
    g->lost = true;
    g->err = *err;
}

#define WAIT(cond) \
    for (int64_t end_ = orch_now_us() + START_MS * INT64_C(1000); !(cond); \
         orch_loop_step(loop, 50)) \
    CHECK(orch_now_us() < end_, "waited in vain")

static void show(void *ud, const char *line)
{
    (void)ud;
    fprintf(stderr, "%s\n", line);
}

static struct lines {
    char last[400];
} denied_lines;

static void on_event(void *ud, const char *event, struct orch_slice fields)
{
    struct lines *l = ud;
    if (strcmp(event, "net_deny") != 0)
        return;
    snprintf(l->last, sizeof l->last, "%.*s", (int)fields.n, fields.p);
}

static void open_vms(void)
{
    struct orch_err err = { .code = 0 };
    char run_dir[96];
    static const struct orch_log errors = { .least = ORCH_ERROR };
    orch_log_use(&errors);
    snprintf(run_dir, sizeof run_dir, "%s/run-%d", dir, getpid());
    struct orch_vms_opts o = { .launcher_path = launcher,
                               .agent_path = agent,
                               .cache_dir = cache,
                               .runtime_dir = run_dir,
                               .max = 8,
                               .progress = show,
                               .event = on_event,
                               .ud = &denied_lines };
    loop = orch_loop_new(&err);
    vms = orch_vms_new(loop, &o, &err);
    CHECK(vms, "%s", err.msg);
}

static void close_vms(void)
{
    orch_vms_free(vms);
    orch_loop_free(loop);
}

static void spawn(struct guest *g, struct orch_rules *r)
{
    struct orch_err err = { .code = 0 };
    *g = (struct guest){ .capture = -1 };
    struct orch_vm_opts o = {
        .network = r ? "attacked" : "none", .rules = r, .ready = on_ready, .lost = on_lost, .ud = g
    };
    g->vm = orch_vm_spawn(vms, &o, &err);
    CHECK(g->vm, "%s", err.msg);
}

static void start(struct guest *g, struct orch_rules *r)
{
    spawn(g, r);
    WAIT(g->ready || g->failed);
    CHECK(g->ready, "%s", g->err.msg);
}

static void end(struct guest *g)
{
    orch_vm_free(g->vm);
    if (g->capture >= 0)
        close(g->capture);
}

struct command {
    bool done;
    int status;
    struct orch_buf out;
};

static void on_output(void *ud, int stream, struct orch_slice bytes)
{
    (void)stream;
    orch_buf_slice(&((struct command *)ud)->out, bytes);
}

static void on_done(void *ud, const struct orch_exec_result *r, const struct orch_err *err)
{
    struct command *c = ud;
    c->done = true;
    c->status = err ? -1 : r->fail ? 1000 + r->fail : r->status;
    if (err)
        orch_buf_str(&c->out, err->msg);
}

static void begin(struct guest *g, struct command *c, const char *args, const char *user)
{
    char text[512];
    const char *argv[24] = { "/tmp/attack" };
    size_t n = 1;
    struct orch_err err = { .code = 0 };
    snprintf(text, sizeof text, "%s", args);
    for (char *save, *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save))
        argv[n++] = word;
    struct orch_exec_opts o = {
        .argv = argv, .user = user, .no_aslr = true, .output = on_output, .done = on_done, .ud = c
    };
    *c = (struct command){ .done = false };
    struct orch_channel *channel = orch_vm_channel(g->vm, &err);
    CHECK(channel && orch_exec_start(channel, &o, &err), "%s", err.msg);
}

static void run(struct guest *g, const char *args, const char *user, const char *what)
{
    struct command c;
    begin(g, &c, args, user);
    WAIT(c.done);
    CHECK(c.status == 0, "%s: status %d: %s", what, c.status, c.out.p ? c.out.p : "");
    orch_buf_free(&c.out);
}

static void on_written(void *ud, struct orch_slice data, const struct orch_err *err)
{
    (void)data;
    CHECK(!err, "%s", err->msg);
    *(bool *)ud = true;
}

static void put_attack(struct guest *g)
{
    bool done = false;
    struct orch_err err;
    struct orch_channel *channel = orch_vm_channel(g->vm, &err);
    CHECK(channel, "%s", err.msg);
    orch_channel_write_file(channel, "/tmp/attack", (struct orch_slice){ attack.p, attack.n }, 0755,
                            on_written, &done);
    WAIT(done);
}

/* ---- processes */

static int children(pid_t pid, pid_t *v, int max)
{
    char path[64], text[1024] = "";
    int n = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, text, sizeof text - 1) > 0)
        for (char *save, *word = strtok_r(text, " ", &save); word && n < max;
             word = strtok_r(NULL, " ", &save))
            v[n++] = atoi(word);
    if (fd >= 0)
        close(fd);
    return n;
}

static bool is_called(pid_t pid, const char *name)
{
    char path[64], text[32] = "";
    snprintf(path, sizeof path, "/proc/%d/comm", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    return n > 0 && !strncmp(text, name, strlen(name));
}

static pid_t launcher_of(pid_t owner)
{
    pid_t v[32];
    int n = children(owner, v, 32);
    for (int i = 0; i < n; i++)
        if (is_called(v[i], "launcher"))
            return v[i];
    return 0;
}

/* The newest microVM's init. */
static pid_t newest_init(void)
{
    pid_t v[32];
    int n = children(launcher_of(getpid()), v, 32);
    CHECK(n > 0, "no init");
    return v[n - 1];
}

/* How many of the launcher's session run; said lists them. */
static int count_session(pid_t session, char *said, size_t n)
{
    int count_of = 0;
    DIR *d = opendir("/proc");
    *said = 0;
    for (struct dirent *e; (e = readdir(d));) {
        char path[300], text[256] = "", state = 0;
        int pid = atoi(e->d_name), parent, sid = 0;
        snprintf(path, sizeof path, "/proc/%.200s/stat", e->d_name);
        int fd = pid > 0 ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        if (fd < 0)
            continue;
        ssize_t got = read(fd, text, sizeof text - 1);
        close(fd);
        char *end_of_name = got > 0 ? strrchr(text, ')') : NULL;
        if (!end_of_name || sscanf(end_of_name + 1, " %c %d %*d %d", &state, &parent, &sid) != 3)
            continue;
        if (sid != session || state == 'Z' || state == 'X')
            continue;
        count_of++;
        snprintf(said + strlen(said), n - strlen(said), " %.40s", text);
    }
    closedir(d);
    return count_of;
}

/* ---- captures */

struct look_request {
    pid_t init;
};
struct look_answer {
    int tap, up;
};

/* Root, which may enter a microVM's namespace: opens captures there for those who ask. */
static void run_broker(int fd)
{
    struct look_request q;
    int here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    while (recv(fd, &q, sizeof q, 0) == sizeof q) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/ns/net", q.init);
        int ns = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(ns < 0 || !setns(ns, CLONE_NEWNET), "%s: %m", path);
        if (ns >= 0) /* it may have ended */
            close(ns);
        struct look_answer a = { (int)if_nametoindex("tap0"), (int)if_nametoindex("up0") };
        int s = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL)), room = 16 << 20;
        CHECK(s >= 0 && !setns(here, CLONE_NEWNET), "%m");
        setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
        union {
            char bytes[CMSG_SPACE(sizeof(int))];
            struct cmsghdr align;
        } control = { { 0 } };
        struct iovec iov = { &a, sizeof a };
        struct msghdr m = { .msg_iov = &iov,
                            .msg_iovlen = 1,
                            .msg_control = &control,
                            .msg_controllen = sizeof control };
        struct cmsghdr *k = CMSG_FIRSTHDR(&m);
        k->cmsg_level = SOL_SOCKET;
        k->cmsg_type = SCM_RIGHTS;
        k->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(k), &s, sizeof s);
        CHECK(sendmsg(fd, &m, 0) > 0, "%m");
        close(s);
    }
    _exit(0);
}

/* False: it has no network, or not yet. */
static bool open_look(struct guest *g, pid_t init)
{
    struct look_request q = { init };
    struct look_answer a;
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = { &a, sizeof a };
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control
    };
    CHECK(send(broker, &q, sizeof q, 0) > 0 && recvmsg(broker, &m, MSG_CMSG_CLOEXEC) > 0, "%m");
    memcpy(&g->capture, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof g->capture);
    g->tap = a.tap;
    g->up = a.up;
    return a.tap && a.up;
}

static void look_into(struct guest *g)
{
    CHECK(open_look(g, newest_init()), "no devices");
}

struct seen {
    unsigned world, loopback, uplink, guest;
    char what[80]; /* the last packet to the uplink */
};

static ssize_t next_frame(int fd, uint8_t *buf, size_t n, struct sockaddr_ll *from)
{
    socklen_t len = sizeof *from;
    return recvfrom(fd, buf, n, MSG_DONTWAIT, (struct sockaddr *)from, &len);
}

static void describe(const uint8_t *p, ssize_t n, char *out, size_t size)
{
    if (n >= 48 && p[12] == 8 && !p[13])
        snprintf(out, size, "protocol %u, port %u to %u.%u.%u.%u port %u, TCP flags %02x", p[23],
                 p[34] << 8 | p[35], p[30], p[31], p[32], p[33], p[36] << 8 | p[37], p[47]);
    else
        snprintf(out, size, "%zd bytes of type %02x%02x", n, p[12], p[13]);
}

/* What got out since the last look, added up. The namespace's own ARP is none of the guest's. */
static void look(struct guest *g, struct seen *s, bool arp)
{
    static uint8_t buf[65536];
    struct sockaddr_ll from;
    while (next_frame(in_world, buf, sizeof buf, &from) > 0)
        s->world += from.sll_ifindex == world_if && from.sll_pkttype != PACKET_OUTGOING &&
                    from.sll_protocol != htons(ETH_P_ARP);
    while (next_frame(in_loopback, buf, sizeof buf, &from) > 0)
        s->loopback++;
    for (ssize_t n; (n = next_frame(g->capture, buf, sizeof buf, &from)) > 0;) {
        bool is_arp = from.sll_protocol == htons(ETH_P_ARP);
        if (from.sll_pkttype != PACKET_OUTGOING)
            continue;
        if (from.sll_ifindex == g->up && !is_arp) {
            s->uplink++;
            describe(buf, n, s->what, sizeof s->what);
        }
        s->guest += from.sll_ifindex == g->tap && (!is_arp || arp);
    }
}

/* Until nothing has passed for 100 ms. */
static void settle(struct guest *g)
{
    struct seen none = { 0 };
    for (int64_t quiet = orch_now_us(), end_us = quiet + WAIT_US; orch_now_us() < quiet + 100000;) {
        struct seen s = { 0 };
        CHECK(orch_now_us() < end_us, "it does not get quiet");
        orch_loop_step(loop, 10);
        look(g, &s, true);
        if (memcmp(&s, &none, sizeof s))
            quiet = orch_now_us();
    }
}

/* ---- counters */

struct counts {
    size_t n;
    struct {
        char label[ORCH_LABEL];
        uint64_t packets;
    } v[128];
};

static void count_one(void *ud, const char *label, uint64_t packets, uint64_t bytes)
{
    struct counts *c = ud;
    (void)bytes;
    if (c->n < ORCH_ARRAY_LEN(c->v)) {
        snprintf(c->v[c->n].label, ORCH_LABEL, "%s", label);
        c->v[c->n++].packets = packets;
    }
}

static void count(struct guest *g, struct counts *c)
{
    struct orch_err err = { .code = 0 };
    c->n = 0;
    CHECK(!orch_vm_counters(g->vm, count_one, c, &err), "%s", err.msg);
}

static uint64_t counted(const struct counts *c, const char *label)
{
    for (size_t i = 0; i < c->n; i++)
        if (!strcmp(c->v[i].label, label))
            return c->v[i].packets;
    return 0;
}

/* ---- one case */

struct outcome {
    struct seen seen;
    bool leaked, by_rule;
    char by[512]; /* the rules that counted */
};

static struct outcome strike(struct guest *g, const struct attack *a, int wait_ms)
{
    static struct counts before, after;
    struct outcome o = { .leaked = false };
    struct seen old = { 0 };
    look(g, &old, true);
    count(g, &before);
    run(g, a->args, "root", a->name);
    for (int64_t end_us = orch_now_us() + wait_ms * INT64_C(1000);;) {
        count(g, &after);
        look(g, &o.seen, a->arp);
        o.by_rule = a->rule && counted(&after, a->rule) > counted(&before, a->rule);
        if (o.by_rule || orch_now_us() > end_us)
            break;
        orch_loop_step(loop, 2);
    }
    for (int64_t end_us = orch_now_us() + 20000; orch_now_us() < end_us;)
        orch_loop_step(loop, 5);
    look(g, &o.seen, a->arp);
    o.leaked = a->permitted ? o.seen.uplink > a->permitted || o.seen.loopback
                            : o.seen.world || o.seen.loopback || o.seen.uplink || o.seen.guest;
    for (size_t i = 0; i < after.n; i++)
        if (after.v[i].packets > counted(&before, after.v[i].label))
            snprintf(o.by + strlen(o.by), sizeof o.by - strlen(o.by), "%s%s", *o.by ? ", " : "",
                     after.v[i].label);
    return o;
}

static void control_all(struct guest *g)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(controls); i++)
        run(g, controls[i].args, controls[i].user, controls[i].name);
    /* What a connection repeats because its peer's answer was lost is no attack that passed. */
    run(g, "closed", "root", "the end of all connections");
}

static void attacks_case(void)
{
    struct guest g;
    unsigned leaks = 0, wrong = 0;
    open_vms();
    start(&g, policy());
    look_into(&g);
    put_attack(&g);
    control_all(&g);
    settle(&g);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(attacks); i++) {
        const struct attack *a = &attacks[i];
        if (a->permitted) { /* the last: it fills the table of flows */
            run(&g, "echo " SERVER " 5300 100", "root", "a datagram after the attacks");
            settle(&g);
        }
        struct outcome o = strike(&g, a, a->rule ? WAIT_MS : 20);
        if (o.leaked)
            fprintf(stderr,
                    "LEAK: %s: in W %u, on the host's loopback %u, to the uplink %u (%s), to the "
                    "guest %u\n",
                    a->name, o.seen.world, o.seen.loopback, o.seen.uplink, o.seen.what,
                    o.seen.guest);
        if (a->rule && !o.by_rule)
            fprintf(stderr, "NOT BY ITS RULE: %s: %s; counted: %s\n", a->name, a->rule,
                    *o.by ? o.by : "nothing");
        leaks += o.leaked;
        wrong += a->rule && !o.by_rule;
    }
    CHECK(!leaks && !wrong, "%u leaks, %u not stopped by their rule", leaks, wrong);
    end(&g);
    close_vms();
    printf("as uid %u: %zu attacks, 0 leaks; %zu controls\n", getuid(), ORCH_ARRAY_LEN(attacks),
           ORCH_ARRAY_LEN(controls));
}

/* ---- each case without its rule */

static int mutate(void)
{
    unsigned red = 0, leaked = 0, held = 0, without = 0;
    open_vms();
    printf("%-36s %-46s %s\n", "case", "its rule", "without it");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(attacks); i++) {
        const struct attack *a = &attacks[i];
        struct guest g;
        struct orch_rules *r = policy();
        if (!a->rule) {
            without++;
            printf("%-36s %-46s %s\n", a->name, "-",
                   "the kernel has no route for it; no rule sees it");
            orch_rules_free(r);
            continue;
        }
        for (size_t k = 0; k < ORCH_ARRAY_LEN(a->change); k++)
            if (a->change[k].how)
                apply(r, &a->change[k]);
        start(&g, r);
        look_into(&g);
        put_attack(&g);
        settle(&g);
        struct outcome o = strike(&g, a, 100);
        bool is_red = o.leaked || !o.by_rule;
        red += is_red;
        leaked += o.leaked;
        held += is_red && !o.leaked;
        printf("%-36s %-46s ", a->name, a->rule);
        if (o.leaked)
            printf("red: leaks: W %u, host %u, uplink %u, guest %u\n", o.seen.world,
                   o.seen.loopback, o.seen.uplink, o.seen.guest);
        else
            printf("%s: past it, then stopped; counted: %s\n", is_red ? "red" : "GREEN", o.by);
        fflush(stdout);
        end(&g);
    }
    close_vms();
    printf("%zu cases: %u red (%u leak, %u are stopped by what lies behind), %u have no rule\n",
           ORCH_ARRAY_LEN(attacks), red, leaked, held, without);
    return red + without == ORCH_ARRAY_LEN(attacks) ? 0 : 1;
}

/* ---- refusals, pasta's death, the host's state */

static void no_route_case(void)
{
    struct guest g;
    open_vms();
    spawn(&g, policy());
    WAIT(g.ready || g.failed);
    CHECK(g.failed && g.err.cls == ORCH_CLASS_ISOLATION && strstr(g.err.msg, "no network: pasta") &&
              strstr(g.err.msg, "ip -4 route"),
          "%s", g.err.msg);
    /* pasta failed: no VMM was there */
    for (const struct orch_vm_phase *p = orch_vm_phases(g.vm); p->name; p++)
        CHECK(!strcmp(p->name, "template") || !strcmp(p->name, "filter"), "phase %s", p->name);
    end(&g);
    close_vms();
}

static void no_pasta_case(void)
{
    struct guest g;
    open_vms();
    spawn(&g, policy());
    WAIT(g.ready || g.failed);
    CHECK(g.failed && g.err.cls == ORCH_CLASS_ISOLATION &&
              strstr(g.err.msg, "no network: pasta program") &&
              strstr(g.err.msg, "install the package passt"),
          "%s", g.err.msg);
    CHECK(!orch_vm_phases(g.vm)[1].name, "a phase behind the template: %s",
          orch_vm_phases(g.vm)[1].name);
    end(&g);
    close_vms();
}

static void pasta_dies_case(void)
{
    struct guest g, none;
    struct orch_vm_usage u;
    struct orch_err err = { .code = 0 };
    pid_t v[4];
    open_vms();
    start(&g, policy());
    int n = children(newest_init(), v, 4);
    CHECK(n == 2 && is_called(v[0], "pas"), "%d children", n);
    CHECK(!orch_vm_usage(g.vm, &u, &err), "%s", err.msg);
    CHECK(u.vmm_bytes > 20 << 20 && u.uplink_bytes > 1 << 20 && u.uplink_bytes < 40 << 20,
          "VMM %llu, pasta %llu", (unsigned long long)u.vmm_bytes,
          (unsigned long long)u.uplink_bytes);
    start(&none, NULL);
    CHECK(!orch_vm_usage(none.vm, &u, &err) && u.vmm_bytes > 20 << 20 && !u.uplink_bytes &&
              !u.connections,
          "%s", err.msg);
    CHECK(!strcmp(orch_vm_network(g.vm), "attacked") && !strcmp(orch_vm_network(none.vm), "none"),
          "names");
    kill(v[0], SIGKILL);
    WAIT(g.lost);
    CHECK(g.err.cls == ORCH_CLASS_CLOSED &&
              strstr(g.err.msg, "no network: pasta (killed by signal 9)"),
          "%s", g.err.msg);
    CHECK(!none.lost, "the other is lost too");
    end(&g);
    end(&none);
    close_vms();
}

static void sh(const char *command)
{
    CHECK(!system(command), "%s", command);
}

static void run_prepared(uid_t uid, void (*prepare)(void), void (*fn)(void))
{
    int status;
    fflush(NULL);
    pid_t p = fork();
    if (!p) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        if (prepare) {
            CHECK(!unshare(CLONE_NEWNS) && !mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL),
                  "%m");
            prepare();
        }
        if (uid) {
            snprintf(cache, sizeof cache, "%s/cache", dir);
            CHECK(!setgroups(0, NULL) && !setresgid(uid, uid, uid) && !setresuid(uid, uid, uid),
                  "%m");
            prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        }
        prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
        fn();
        exit(0);
    }
    waitpid(p, &status, 0);
    if (status)
        fail_msg("as uid %u: %s %d", uid, WIFSIGNALED(status) ? "signal" : "exit status",
                 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
}

static void test_attacks_as_root(void **state)
{
    (void)state;
    run_prepared(0, NULL, attacks_case);
}

static void test_attacks_as_user(void **state)
{
    (void)state;
    run_prepared(USER, NULL, attacks_case);
}

static void without_route(void)
{
    CHECK(!unshare(CLONE_NEWNET), "%m");
}

static void without_pasta(void)
{
    sh("touch "
       "/tmp/orch-attacks-no-pasta && mount --bind /tmp/orch-attacks-no-pasta /usr/bin/pasta && rm "
       "-f "
       "/tmp/orch-attacks-no-pasta");
}

static void test_refusals(void **state)
{
    (void)state;
    run_prepared(0, without_route, no_route_case);
    run_prepared(USER, without_route, no_route_case);
    run_prepared(0, without_pasta, no_pasta_case);
    run_prepared(USER, without_pasta, no_pasta_case);
}

static void test_pasta_dies(void **state)
{
    (void)state;
    run_prepared(0, NULL, pasta_dies_case);
    run_prepared(USER, NULL, pasta_dies_case);
}

/* The same from outside: policies/network.lua, the command line, Lua. The guest closes when it has
 * its answer: pasta of 2023 often stalls a connection whose FIN comes right behind its first
 * data. */
#define ASK(n) \
    "mkfifo /tmp/f; nc " SERVER " 80 </tmp/f | (exec 3>/tmp/f; printf '\\0\\0\\0\\0\\" #n \
    "\\0\\0\\0' >&3; head -c " #n " | wc -c)"
static void command_case(void)
{
    static const char *const files[][2] = {
        { "orchestrator.lua", "return {}\n" },
        { "policies/tools.lua", "return { rules = {} }\n" },
        { "policies/network.lua", "return { open = { allow = { { cidr = '198.51.100.0/24', ports = "
                                  "{ 80 } } }, connections = 8 } }\n" },
        { "s.lua", "local vm = assert(orch.vm.spawn { network = 'open' })\n"
                   "local r = vm:exec { 'sh', '-c', [[" ASK(
                       5) "]] }\n"
                          "local s = assert(vm:stats())\n"
                          "for _, rule in ipairs(s.rules) do s[rule.label] = rule.packets end\n"
                          "io.write(vm:network(), ' ', tonumber(r.stdout) or r.stderr, ' ', "
                          "s.connections, ' ', s['flow: new tcp'], ' ',\n"
                          "  s['allow: rest'], ' ', s['tap: rest'], ' ', tostring(s.memory.vmm > "
                          "20e6 and s.memory.uplink > 1e6))\n" },
    };
    char path[200], command[6000];
    static char out[4096];
    snprintf(path, sizeof path, "%s/conf/policies", dir);
    CHECK(!orch_mkdir_p(path, 0755), "%m");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(files); i++) {
        snprintf(path, sizeof path, "%s/conf/%s", dir, files[i][0]);
        CHECK(!orch_write_file(AT_FDCWD, path, files[i][1], strlen(files[i][1]), 0644), "%s", path);
    }
#define ORCH(args) \
    snprintf(command, sizeof command, \
             "cd %s/conf && mkdir -p ../xdg && ln -sfn %s ../xdg/orch && " \
             "XDG_CACHE_HOME=%s/xdg XDG_RUNTIME_DIR=%s/xdg XDG_STATE_HOME=%s/xdg/state timeout " \
             "300 %s --config %s/conf/orchestrator.lua " args " 2>&1; echo \" $?\"", \
             dir, cache, dir, dir, dir, orch, dir)
    ORCH("s.lua");
    FILE *f = popen(command, "re");
    size_t n = fread(out, 1, sizeof out - 1, f);
    out[n] = 0;
    pclose(f);
    CHECK(!strcmp(out, "open 5 1 1 0 0 true 0\n"), "%s", out);
    ORCH("vm run --network open -- sh -c \"" ASK(7) "; nc -w 1 " SERVER
                                                    " 81 </dev/null; echo \\$?\"");
    f = popen(command, "re");
    n = fread(out, 1, sizeof out - 1, f);
    out[n] = 0;
    pclose(f);
    CHECK(!strncmp(out, "7\n", 2) && strstr(out, "\n1\n 0\n"), "%s", out);
    /* What was denied in it stands in the audit log. */
    snprintf(command, sizeof command, "grep -rh net_deny %s/xdg/state", dir);
    f = popen(command, "re");
    n = fread(out, 1, sizeof out - 1, f);
    out[n] = 0;
    pclose(f);
    CHECK(strstr(out, "\"event\":\"net_deny\",\"vm\":\"vm-") &&
              strstr(out, "\"rule\":\"allow: rest\",\"dst\":\"" SERVER
                          "\",\"proto\":\"tcp\",\"port\":81"),
          "%s", out);
}

static void test_command(void **state)
{
    (void)state;
    run_prepared(0, NULL, command_case);
}

static void host_state(struct orch_buf *b)
{
    static char text[262144];
    FILE *f = popen("nft list ruleset; ip rule; ip route show table all; ip -6 route show table "
                    "all; ip -br link; "
                    "sysctl -a 2>/dev/null | grep ^net | grep -v -e conntrack_count -e bytes_",
                    "re");
    CHECK(f, "%m");
    size_t n = fread(text, 1, sizeof text, f);
    CHECK(pclose(f) == 0 && n > 1000 && n < sizeof text, "%zu bytes", n);
    b->n = 0;
    orch_buf_add(b, text, n);
}

static void untouched_case(void)
{
    cleanup_buf struct orch_buf before = { 0 }, now = { 0 };
    struct guest g[2];
    host_state(&before);
    open_vms();
    for (int i = 0; i < 2; i++)
        start(&g[i], policy());
    put_attack(&g[0]);
    run(&g[0], "stream " SERVER " 80 100000 100000 4", "root", "traffic");
    host_state(&now);
    CHECK(!strcmp(before.p, now.p), "changed while microVMs run");
    for (int i = 0; i < 2; i++)
        end(&g[i]);
    close_vms();
    host_state(&now);
    CHECK(!strcmp(before.p, now.p), "changed afterwards");
}

static void test_host_untouched(void **state)
{
    (void)state;
    run_prepared(0, NULL, untouched_case);
}

static int64_t wall_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* When the last packet passed a device, into it or out of it; 0: none. */
static int64_t last_packet_us(int fd, int device, bool out)
{
    int64_t last = 0;
    for (;;) {
        char buf[256], control[256];
        struct sockaddr_ll from;
        struct iovec iov = { buf, sizeof buf };
        struct msghdr m = { .msg_name = &from,
                            .msg_namelen = sizeof from,
                            .msg_iov = &iov,
                            .msg_iovlen = 1,
                            .msg_control = control,
                            .msg_controllen = sizeof control };
        if (recvmsg(fd, &m, MSG_DONTWAIT) < 0)
            return last;
        for (struct cmsghdr *k = CMSG_FIRSTHDR(&m); k; k = CMSG_NXTHDR(&m, k))
            if (k->cmsg_type == SCM_TIMESTAMPNS && from.sll_ifindex == device &&
                (from.sll_pkttype == PACKET_OUTGOING) == out &&
                from.sll_protocol != htons(ETH_P_ARP)) {
                struct timespec t;
                memcpy(&t, CMSG_DATA(k), sizeof t);
                last = (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
            }
    }
}

/* ---- addresses of the host come and go while microVMs start and run */

static bool denies(struct guest *g, const char *label)
{
    static struct counts c;
    count(g, &c);
    for (size_t i = 0; i < c.n; i++)
        if (!strcmp(c.v[i].label, label))
            return true;
    return false;
}

static void set_address(const char *verb, const char *addr)
{
    char command[128];
    snprintf(command, sizeof command, "ip addr %s %s/32 dev h1", verb, addr);
    sh(command);
}

/* The server of a flow that goes on becomes an address of the host, and is one no more. */
static void address_case(void)
{
    static const char label[] = "never: " SERVER " (host)";
    int on = 1;
    struct guest g;
    struct command c;
    open_vms();
    start(&g, policy());
    look_into(&g);
    put_attack(&g);
    setsockopt(g.capture, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
    begin(&g, &c, UDP "for=600000 size=200", "root");
    for (int i = 0; i < 10; i++) {
        while (last_packet_us(g.capture, g.up, true))
            ;
        WAIT(last_packet_us(g.capture, g.up, true));
        *denied_lines.last = 0;
        set_address("add", SERVER);
        WAIT(denies(&g, label));
        /* Lines of its answers to what it got before come in between. */
        WAIT(strstr(denied_lines.last, "\"rule\":\"never: " SERVER " (host)\",\"dst\":\"" SERVER
                                       "\",\"proto\":\"udp\",\"port\":5300"));
        last_packet_us(g.capture, g.up, true);
        for (int64_t end_us = orch_now_us() + 20000; orch_now_us() < end_us;)
            orch_loop_step(loop, 5);
        CHECK(!last_packet_us(g.capture, g.up, true), "round %d: the flow goes on", i);
        set_address("del", SERVER);
        WAIT(!denies(&g, label));
        WAIT(last_packet_us(g.capture, g.up, true));
    }
    CHECK(!c.done && !g.lost, "%s", g.lost ? g.err.msg : "the traffic ended");
    end(&g);
    close_vms();
}

/* In each of a start's phases, and between the policy and the start. */
static void address_race_case(void)
{
    static const char label[] = "never: 203.0.113.99 (host)";
    cleanup_buf struct orch_buf before = { 0 }, after = { 0 };
    host_state(&before);
    open_vms();
    for (int i = 0; i < 12; i++) {
        struct guest g[2];
        struct orch_rules *r[2] = { policy(), policy() };
        if (i == 0)
            set_address("add", "203.0.113.99");
        for (int k = 0; k < 2; k++)
            spawn(&g[k], r[k]);
        for (int64_t end_us = orch_now_us() + i * 4000; i && orch_now_us() < end_us;)
            orch_loop_step(loop, 1);
        if (i)
            set_address("add", "203.0.113.99");
        for (int k = 0; k < 2; k++) {
            WAIT(g[k].ready || g[k].failed);
            CHECK(g[k].ready, "%s", g[k].err.msg);
            WAIT(denies(&g[k], label));
        }
        set_address("del", "203.0.113.99");
        for (int k = 0; k < 2; k++) {
            WAIT(!denies(&g[k], label));
            CHECK(!g[k].lost, "%s", g[k].err.msg);
            end(&g[k]);
        }
    }
    /* One whose filter cannot follow ends; something ran in it, so it is not of class ISOLATION. */
    struct guest g;
    struct command c = { .done = false };
    struct orch_err later;
    start(&g, policy());
    static const char *const wait[] = { "sleep", "100", NULL };
    struct orch_exec_opts wait_opts = { .argv = wait, .no_aslr = true, .done = on_done, .ud = &c };
    CHECK(orch_exec_start(orch_vm_channel(g.vm, &later), &wait_opts, &later), "%s", later.msg);
    char command[96];
    snprintf(command, sizeof command, "nsenter -t %d -n nft add table ip other", newest_init());
    sh(command);
    set_address("add", "203.0.113.99");
    WAIT(g.lost);
    CHECK(g.err.cls == ORCH_CLASS_CLOSED &&
              strstr(g.err.msg, "the packet filter could not follow") &&
              strstr(g.err.msg, "table \"other\""),
          "%s", g.err.msg);
    CHECK(c.done && !strcmp(c.out.p, g.err.msg), "under way: %s", c.out.p ? c.out.p : "nothing");
    CHECK(!orch_vm_channel(g.vm, &later) && !strcmp(later.msg, g.err.msg) && later.cls == g.err.cls,
          "later: %s", later.msg);
    orch_buf_free(&c.out);
    set_address("del", "203.0.113.99");
    end(&g);
    close_vms();
    host_state(&after);
    CHECK(!strcmp(before.p, after.p), "the host has changed");
}

static void test_addresses(void **state)
{
    (void)state;
    run_prepared(0, NULL, address_case);
    run_prepared(0, NULL, address_race_case);
}

/* ---- orch is killed while traffic flows. Namespace, tap and tables have no owner but processes of
 * the launcher's session, and orch's sockets. */

static void hold(void)
{
    struct guest g;
    struct command c;
    open_vms();
    start(&g, policy());
    put_attack(&g);
    begin(&g, &c, UDP "for=600000 size=200 count=16", "root");
    orch_loop_run(loop);
}

/* One process's microVM, looked into if its network is there. */
static bool look_into_child(struct guest *g, pid_t session)
{
    pid_t v[32];
    int n = session ? children(session, v, 32) : 0, on = 1;
    *g = (struct guest){ .capture = -1 };
    if (!n || !open_look(g, v[n - 1]))
        return false;
    return !setsockopt(g->capture, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
}

static void kill_case(void)
{
    enum { N = 30 };
    int with_traffic = 0, n_left = 0, on = 1;
    setsockopt(in_world, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
    struct guest g;
    open_vms(); /* so that the template is there */
    start(&g, policy());
    end(&g);
    close_vms();
    srand((unsigned)getpid());
    for (int i = 0; i < N; i++) {
        poll(NULL, 0, 20);
        last_packet_us(in_world, world_if, false);
        pid_t holder = fork();
        if (!holder) {
            prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
            hold();
        }
        /* In every second round there is traffic, whatever the machine. */
        bool await = i % 2, came = false;
        int64_t left_us = 0, last_us, end_us = orch_now_us() + WAIT_US;
        if (!await)
            poll(NULL, 0, 20 + rand() % 900);
        for (; await && !came; poll(NULL, 0, 1)) {
            came = last_packet_us(in_world, world_if, false);
            CHECK(orch_now_us() < end_us, "round %d: no traffic", i);
        }
        kill(holder, SIGSTOP); /* so that its launcher is known */
        waitpid(holder, NULL, WUNTRACED);
        pid_t session = launcher_of(holder);
        bool looking = look_into_child(&g, session);
        for (; await && looking && !left_us; poll(NULL, 0, 1)) {
            left_us = last_packet_us(g.capture, g.up, true);
            CHECK(orch_now_us() < end_us, "round %d: no more traffic", i);
        }
        if (looking && poll(&(struct pollfd){ g.capture, POLLIN, 0 }, 1, 100) > 0)
            poll(NULL, 0, rand() % 20);
        kill(holder, SIGKILL);
        waitpid(holder, NULL, 0);
        int64_t dead_us = orch_now_us(), dead_wall_us = wall_us();
        char said[512];
        while (session && count_session(session, said, sizeof said)) {
            CHECK(orch_now_us() < dead_us + WAIT_US, "round %d: there are left:%s", i, said);
            poll(NULL, 0, 1);
        }
        last_us = looking ? last_packet_us(g.capture, g.up, true) : 0;
        left_us = last_us ? last_us : left_us;
        with_traffic += last_packet_us(in_world, world_if, false) || came;
        n_left += left_us != 0;
        CHECK(left_us <= dead_wall_us,
              "round %d: a packet left the microVM's namespace %.1f ms after orch's end", i,
              (double)(left_us - dead_wall_us) / 1000);
        if (g.capture >= 0)
            close(g.capture);
        poll(NULL, 0, 20);
        CHECK(!last_packet_us(in_world, world_if, false),
              "round %d: packets after everything ended", i);
    }
    CHECK(with_traffic > N / 3 && n_left > N / 6, "traffic in %d, %d rounds only", with_traffic,
          n_left);
    printf("as uid %u: %d killed, %d with traffic\n", getuid(), N, with_traffic);
}

static void test_killed(void **state)
{
    (void)state;
    run_prepared(0, NULL, kill_case);
    run_prepared(USER, NULL, kill_case);
}

/* ---- the stage */

static int serve_tcp(const char *addr, uint16_t port)
{
    struct sockaddr_in sa = { .sin_family = AF_INET,
                              .sin_port = htons(port),
                              .sin_addr.s_addr = inet_addr(addr) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    CHECK(!bind(fd, (const struct sockaddr *)&sa, sizeof sa) && !listen(fd, 128), "%s %u: %m", addr,
          port);
    return fd;
}

static int serve_udp(const char *addr, uint16_t port)
{
    struct sockaddr_in sa = { .sin_family = AF_INET,
                              .sin_port = htons(port),
                              .sin_addr.s_addr = inet_addr(addr) };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK(!bind(fd, (const struct sockaddr *)&sa, sizeof sa), "%s %u: %m", addr, port);
    return fd;
}

static uint8_t pattern(size_t i)
{
    return (uint8_t)(i * 31 + (i >> 8) + 7);
}

static _Noreturn void serve_stream(int fd)
{
    static uint8_t buf[65536];
    uint32_t head[2];
    ssize_t n;
    alarm(300);
    if (recv(fd, head, sizeof head, MSG_WAITALL) != sizeof head)
        _exit(1);
    for (size_t at = 0; at < head[0]; at += (size_t)n) {
        n = recv(fd, buf, head[0] - at < sizeof buf ? head[0] - at : sizeof buf, 0);
        if (n <= 0)
            _exit(1);
        for (ssize_t k = 0; k < n; k++)
            if (buf[k] != pattern(at + (size_t)k))
                _exit(1);
    }
    for (size_t at = 0; at < head[1]; at += (size_t)n) {
        size_t want = head[1] - at < sizeof buf ? head[1] - at : sizeof buf;
        for (size_t k = 0; k < want; k++)
            buf[k] = pattern(at + k);
        n = send(fd, buf, want, MSG_NOSIGNAL);
        if (n <= 0)
            _exit(1);
    }
    _exit(0);
}

static void serve(bool world)
{
    static const uint16_t more[] = { 22, 25, 53, 81, 443, 5300, 7999, 8011 };
    struct pollfd pf[64];
    int n = 0;
    pf[n++].fd = serve_tcp("0.0.0.0", 80);
    for (uint16_t p = 8000; p <= 8010 && world; p++)
        pf[n++].fd = serve_tcp("0.0.0.0", p);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(more) && world; i++)
        pf[n++].fd = serve_tcp("0.0.0.0", more[i]);
    if (!world)
        pf[n++].fd = serve_tcp("127.0.0.1", 8001);
    int n_tcp = n;
    pf[n++].fd = serve_udp(world ? SERVER : "0.0.0.0", 5300);
    pf[n++].fd = serve_udp(world ? SERVER : "0.0.0.0", 53);
    for (int i = 0; i < n; i++)
        pf[i].events = POLLIN;
    signal(SIGCHLD, SIG_IGN);
    while (poll(pf, (nfds_t)n, -1) > 0)
        for (int i = 0; i < n; i++) {
            if (!pf[i].revents)
                continue;
            if (i < n_tcp) {
                int fd = accept4(pf[i].fd, NULL, NULL, SOCK_CLOEXEC);
                if (fd >= 0 && !fork())
                    serve_stream(fd);
                close(fd);
                continue;
            }
            char buf[2048];
            struct sockaddr_in from;
            socklen_t len = sizeof from;
            ssize_t got = recvfrom(pf[i].fd, buf, sizeof buf, MSG_DONTWAIT,
                                   (struct sockaddr *)&from, &len);
            if (got >= 0)
                sendto(pf[i].fd, buf, (size_t)got, MSG_DONTWAIT, (struct sockaddr *)&from, len);
        }
    _exit(1);
}

static int open_capture(int device)
{
    struct sockaddr_ll sa = { .sll_family = AF_PACKET,
                              .sll_protocol = htons(ETH_P_ALL),
                              .sll_ifindex = device };
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0), room = 16 << 20;
    CHECK(fd >= 0 && !bind(fd, (const struct sockaddr *)&sa, sizeof sa), "%m");
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    return fd;
}

static pid_t helpers[4];
static int n_helpers;

static pid_t helper(void)
{
    fflush(NULL);
    pid_t p = fork();
    CHECK(p >= 0, "%m");
    if (!p)
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    else
        helpers[n_helpers++] = p;
    return p;
}

static void image_case(void)
{
    struct guest g;
    open_vms();
    start(&g, NULL);
    end(&g);
    close_vms();
}

static void copy(const char *from, const char *to)
{
    cleanup_buf struct orch_buf b = { 0 };
    CHECK(!orch_read_file(AT_FDCWD, from, 64 << 20, &b) &&
              !orch_write_file(AT_FDCWD, to, b.p, b.n, 0755),
          "%s", from);
}

static int set_up(void **state)
{
    (void)state;
    char self[256], path[4200], command[9000], ready;
    int pipe_fds[2], sv[2];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n < 0 ? 0 : n] = 0;
    CHECK(!geteuid() && mkdtemp(dir) && !chmod(dir, 0755), "needs root and /tmp");
    char *tests = dirname(self);
    snprintf(launcher, sizeof launcher, "%s/launcher", dir);
    snprintf(agent, sizeof agent, "%s/agent", dir);
    snprintf(path, sizeof path, "%s/../launcher", tests);
    copy(path, launcher);
    snprintf(path, sizeof path, "%s/../agent", tests);
    copy(path, agent);
    snprintf(orch, sizeof orch, "%s/../orch", tests);
    snprintf(path, sizeof path, "%s/attack", tests);
    CHECK(!orch_read_file(AT_FDCWD, path, 8 << 20, &attack), "%s", path);
    const char *shared = getenv("ORCH_TEST_CACHE");
    if (shared)
        snprintf(path, sizeof path, "%s/orch", shared);
    else
        snprintf(path, sizeof path, "%s/../../test-cache/orch", tests);
    CHECK(!orch_mkdir_p(path, 0700) && realpath(path, cache), "%s: %m", path);
    run_prepared(0, NULL, image_case); /* while there is a network */
    snprintf(command, sizeof command,
             "mkdir '%s/cache' && cp -rL '%s/images' '%s/cache/' && chown -R 1000:1000 '%s/cache' "
             "&& chmod 1777 '%s'",
             dir, cache, dir, dir, dir);
    sh(command);

    CHECK(!unshare(CLONE_NEWNET | CLONE_NEWNS) &&
              !mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL),
          "%m");
    /* For everyone, as udev makes it. */
    snprintf(path, sizeof path, "%s/tun", dir);
    umask(0);
    CHECK(!mknod(path, S_IFCHR | 0666, makedev(10, 200)) &&
              !mount(path, "/dev/net/tun", NULL, MS_BIND, NULL),
          "%m");
    umask(022);
    CHECK(!pipe2(pipe_fds, O_CLOEXEC) && !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv),
          "%m");
    pid_t world = helper();
    if (!world) {
        CHECK(!unshare(CLONE_NEWNET) && write(pipe_fds[1], "", 1) == 1 &&
                  read(sv[1], &ready, 1) == 1,
              "%m");
        serve(true);
    }
    CHECK(read(pipe_fds[0], &ready, 1) == 1, "%m");
    sh("ip link set lo up && ip link add h0 type veth peer name w0 && ip link add h1 type veth "
       "peer name h2 && "
       "ip link set h0 addrgenmode none && ip link set w0 addrgenmode none");
    snprintf(command, sizeof command, "ip link set w0 netns %d", world);
    sh(command);
    sh("ip addr add " HOST "/24 dev h0 && ip addr add " OTHER "/32 dev h1 && ip link set h0 up && "
       "ip route add default via 203.0.113.1");
    int here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%d/ns/net", world);
    int there = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(!setns(there, CLONE_NEWNET), "%m");
    sh("ip link set lo up && ip link set w0 addrgenmode none && ip addr add 203.0.113.1/24 dev w0 "
       "&& ip link set w0 up && "
       "for net in 198.51.100.0/23 8.8.8.8 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 169.254.0.0/16 "
       "100.64.0.0/10 198.18.0.0/15 "
       "168.63.129.16 192.0.0.192 240.0.0.0/4; do ip route add local $net dev lo; done");
    world_if = (int)if_nametoindex("w0");
    in_world = open_capture(0);
    CHECK(!setns(here, CLONE_NEWNET), "%m");
    in_loopback = open_capture((int)if_nametoindex("lo"));
    CHECK(write(sv[0], "", 1) == 1, "%m");
    close(sv[0]);
    close(sv[1]);
    if (!helper())
        serve(false);
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv), "%m");
    if (!helper())
        run_broker(sv[1]);
    close(sv[1]);
    broker = sv[0];
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    char command[128];
    for (int i = 0; i < n_helpers; i++)
        kill(helpers[i], SIGKILL);
    umount2("/dev/net/tun", MNT_DETACH);
    orch_buf_free(&attack);
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    return system(command);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attacks_as_root), cmocka_unit_test(test_attacks_as_user),
        cmocka_unit_test(test_refusals),        cmocka_unit_test(test_pasta_dies),
        cmocka_unit_test(test_command),         cmocka_unit_test(test_host_untouched),
        cmocka_unit_test(test_addresses),       cmocka_unit_test(test_killed),
    };
    if (argc == 2 && !strcmp(argv[1], "--mutate")) {
        set_up(NULL);
        int status = mutate();
        tear_down(NULL);
        return status;
    }
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests_name("net attacks", tests, set_up, tear_down);
}
