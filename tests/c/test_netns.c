/* core/net through the launcher: real namespaces, real tables, packets of a guest that is this
 * test.
 *
 * The machine is played by namespaces: H, in which the test and orch run, with one device to W,
 * the internet, which is the default route's way. Whatever arrives in W is captured there. */
#include <stdarg.h>
#include <stddef.h>

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/if_packet.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_log.h>
#include <linux/rtnetlink.h>
#include <net/ethernet.h>
#include <netinet/ip.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "child.h"
#include "net/link.h"
#include "net/netns.h"

#define WIRE_PATH "/wire"
#define PROBE_PATH "/probe"
#define HOST "203.0.113.2"

static char dir[64] = "/tmp/orch-netns-XXXXXX", launcher[96], wire[96], probe[96];
static int capture;  /* AF_PACKET in W */
static int echo_udp; /* in W, 198.51.100.10 */
static int echo_copies = 1;
#define ECHO_PORT 5300

static void sh(const char *command)
{
    if (system(command)) {
        fprintf(stderr, "test_netns: %s\n", command);
        exit(1);
    }
}

/* ---- a network under test */

struct net {
    struct orch_netns *n;
    struct orch_cell *cell;
    int guest; /* frames from and to the tap */
    int ready, up, failed, started, exited;
    int64_t ready_us, up_us;
    struct orch_err err;
    unsigned missed, denied; /* lines; the last: */
    char rule[ORCH_LABEL];
    struct orch_denied last;
    void (*then)(struct net *t); /* once, inside ready or denied */
};

static struct orch_loop *loop;
static struct orch_launcher *la;

static void go_on(struct net *t)
{
    void (*then)(struct net *) = t->then;
    t->then = NULL;
    if (then)
        then(t);
}

static void on_ready(void *ud)
{
    struct net *t = ud;
    t->ready++;
    t->ready_us = orch_now_us();
    go_on(t);
}

static void on_up(void *ud)
{
    struct net *t = ud;
    t->up++;
    t->up_us = orch_now_us();
}

static void on_failed(void *ud, const struct orch_err *err)
{
    struct net *t = ud;
    t->failed++;
    t->err = *err;
}

static void on_denied(void *ud, const char *rule, const struct orch_denied *d)
{
    struct net *t = ud;
    t->denied++;
    t->missed += d->missed;
    snprintf(t->rule, sizeof t->rule, "%s", rule);
    t->last = *d;
    go_on(t);
}

static void on_started(void *ud)
{
    ((struct net *)ud)->started++;
}

static void on_exit_(void *ud, int status)
{
    (void)status;
    ((struct net *)ud)->exited++;
}

#define WAIT(cond) \
    for (int64_t end_ = orch_now_us() + WAIT_US; !(cond); orch_loop_step(loop, 100)) \
    CHECK(orch_now_us() < end_, "waited in vain")

static void open_launcher(void)
{
    struct orch_err err = { .code = 0 };
    loop = orch_loop_new(&err);
    la = orch_launcher_new(loop, launcher, NULL, NULL, &err);
    CHECK(la, "%s", err.msg);
}

static void close_launcher(void)
{
    orch_launcher_free(la);
    orch_loop_free(loop);
}

static void begin(struct net *t, const struct orch_rules *r, bool uplink)
{
    struct orch_err err = { .code = 0 };
    struct orch_netns_opts o = { .rules = r,
                                 .uplink = uplink,
                                 .ready = on_ready,
                                 .uplink_up = on_up,
                                 .failed = on_failed,
                                 .denied = on_denied,
                                 .ud = t };
    *t = (struct net){ .guest = -1 };
    t->n = orch_netns_new(loop, la, &o, &err);
    CHECK(t->n, "%s", err.msg);
}

static void make_pair(int s[2])
{
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, s), "%m");
}

/* Takes both ends of the guest's wire. */
static void start_on(struct net *t, const int s[2])
{
    static const char *const argv[] = { WIRE_PATH, NULL };
    static const struct orch_cell_bind bind = { wire, WIRE_PATH };
    struct orch_err err = { .code = 0 };
    struct orch_cell_opts o = { .argv = argv,
                                .binds = &bind,
                                .n_binds = 1,
                                .on_started = on_started,
                                .on_exit = on_exit_,
                                .on_error = on_failed,
                                .ud = t };
    for (int i = 0; i < ORCH_LAUNCH_FDS; i++)
        o.fds[i] = -1;
    o.fds[ORCH_LAUNCH_FD_AGENT] = s[1];
    t->cell = orch_netns_start(t->n, &o, &err);
    CHECK(t->cell, "%s", err.msg);
    close(s[1]);
    t->guest = s[0];
}

static void start(struct net *t)
{
    int s[2];
    make_pair(s);
    start_on(t, s);
}

static void wait_up(struct net *t)
{
    WAIT((t->up && t->started) || t->failed);
    CHECK(!t->failed, "%s", t->err.msg);
}

static void end(struct net *t)
{
    orch_cell_free(t->cell);
    orch_netns_free(t->n);
    if (t->guest >= 0)
        close(t->guest);
}

static void begin_up(struct net *t, const struct orch_rules *r)
{
    begin(t, r, true);
    WAIT(t->ready || t->failed);
    CHECK(!t->failed, "%s", t->err.msg);
    start(t);
    wait_up(t);
}

static const struct orch_ports port_53[] = { { ECHO_PORT, ECHO_PORT } },
                               port_web[] = { { 80, 80 }, { 8000, 8010 } };
static const struct orch_allow allow[] = {
    { { 0xc6336400, 24 }, IPPROTO_UDP, port_53, 1 }, /* 198.51.100.0/24 */
    { { 0xc6336400, 24 }, IPPROTO_TCP, port_web, 2 },
    { { 0xcb007100, 24 }, IPPROTO_UDP, port_53, 1 }, /* 203.0.113.0/24, where H is too */
    { { 0x0a000000, 8 }, IPPROTO_UDP, port_53, 1 },
};

static struct orch_rules *rules_with(uint32_t connections, uint64_t bandwidth_bits)
{
    struct orch_err err = { .code = 0 };
    struct orch_cidr *host;
    size_t n;
    CHECK(!orch_link_host(&host, &n, &err), "%s", err.msg);
    struct orch_policy p = { .allow = allow,
                             .n_allow = ORCH_ARRAY_LEN(allow),
                             .connections = connections,
                             .bandwidth_bits = bandwidth_bits,
                             .host = host,
                             .n_host = n };
    struct orch_rules *r = orch_rules_new(&p, &err);
    CHECK(r, "%s", err.msg);
    free(host);
    return r;
}

/* ---- the host's addresses */

static void host_case(void)
{
    struct orch_err err = { .code = 0 };
    struct orch_cidr *v;
    size_t n;
    char text[ORCH_CIDR_TEXT], all[512] = "";
    CHECK(!orch_link_host(&v, &n, &err), "%s", err.msg);
    for (size_t i = 0; i < n; i++) {
        orch_cidr_text(v[i], text);
        strcat(strcat(all, text), " ");
    }
    free(v);
    /* A device's, that of one that is down, and networks the local table delivers. */
    CHECK(strstr(all, HOST " ") && strstr(all, "127.0.0.0/8 ") && strstr(all, "203.0.113.77 ") &&
              strstr(all, "192.0.2.128/25 "),
          "%s", all);
}

static void test_host(void **state)
{
    (void)state;
    run_as_both(host_case);
}

/* ---- commit, verify, tamper */

static void read_text(const char *command, char *out, size_t n)
{
    FILE *f = popen(command, "re");
    CHECK(f, "%m");
    size_t got = fread(out, 1, n - 1, f);
    out[got] = 0;
    CHECK(pclose(f) == 0, "%s", command);
}

/* The newest child: of the launcher the microVM's init, of that pasta. */
static pid_t child_of(pid_t pid)
{
    char path[64], text[128] = "";
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && read(fd, text, sizeof text - 1) > 0, "no child of %d", pid);
    close(fd);
    text[strlen(text) - 1] = 0; /* ends in a blank */
    return atoi(strrchr(text, ' ') ? strrchr(text, ' ') : text);
}

static pid_t find_init(void)
{
    return child_of(orch_launcher_pid(la));
}

static void verify_case(void)
{
    struct net t;
    struct orch_err err = { .code = 0 };
    struct orch_rules *r = rules_with(64, 0);
    open_launcher();
    begin(&t, r, false);
    WAIT(t.ready || t.failed);
    CHECK(t.ready && !t.up, "%s", t.err.msg);
    struct orch_nft *nft = orch_netns_nft(t.n);
    CHECK(orch_nft_owned(nft), "owner flag refused");
    CHECK(!orch_nft_verify(nft, r, &err), "%s", err.msg);
    CHECK(orch_nft_changed(nft, &err) == 0, "changed by itself");

    /* Other rules than those of the kernel are a difference, wherever it lies. */
    static const struct {
        enum orch_match_kind kind;
        const char *label;
    } bend[] = {
        { ORCH_MATCH_BYTES, "tap: IPv4 of the guest" },
        { ORCH_MATCH_UNMARKED, "forward: orch is gone" },
        { ORCH_MATCH_CT, "forward: replies" },
        { ORCH_MATCH_BYTES, "never: 10.0.0.0/8 (private)" },
        { ORCH_MATCH_PORTS, "allow: set 2 tcp 8000-8010" },
        { ORCH_MATCH_CONNS, "flow: more than 64 connections" },
        { ORCH_MATCH_PROTO, "flow: new udp" },
        { ORCH_MATCH_RATE, "denied: to the log" },
        { ORCH_MATCH_RATE, "tap denied: to the log" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bend); i++)
        for (size_t k = 0, hit = 0; k <= r->n_rules; k++) {
            CHECK(k < r->n_rules || hit, "no rule %s", bend[i].label);
            if (k == r->n_rules || strcmp(r->rules[k].label, bend[i].label))
                continue;
            hit = 1;
            struct orch_rule keep = r->rules[k];
            for (size_t m = 0; m < keep.n_match; m++)
                if (keep.match[m].kind == bend[i].kind) {
                    r->rules[k].match[m].a ^= 1;
                    r->rules[k].match[m].value[0] ^= 1;
                }
            CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, bend[i].label),
                  "%s: %s", bend[i].label, err.msg);
            r->rules[k] = keep;
            r->rules[k].verdict = keep.verdict == ORCH_VERDICT_DROP ? ORCH_VERDICT_ACCEPT
                                                                    : ORCH_VERDICT_DROP;
            CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, bend[i].label),
                  "verdict of %s", bend[i].label);
            r->rules[k] = keep;
            r->rules[k].n_match--;
            CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, bend[i].label),
                  "match of %s", bend[i].label);
            r->rules[k] = keep;
        }
    r->rules[0].verdict = ORCH_VERDICT_ACCEPT;
    CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, "alive: orch"), "%s", err.msg);
    r->rules[0].verdict = ORCH_VERDICT_MARK;
    r->sets[0].v[0].last--;
    CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, "elements of set o_set1"),
          "%s", err.msg);
    r->sets[0].v[0].last++;
    r->sets[0].n--;
    CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, "elements of set o_set1"),
          "%s", err.msg);
    r->sets[0].n++;
    r->n_rules--;
    CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, "a rule more"), "%s", err.msg);
    r->n_rules++;
    CHECK(!orch_nft_verify(nft, r, &err), "%s", err.msg);

    /* A second batch is refused whole, with the object and the kernel's words. */
    CHECK(orch_nft_commit(nft, r, &err) == -EEXIST &&
              strstr(err.msg, "table inet orch_alive: File exists"),
          "%s", err.msg);
    CHECK(!orch_nft_verify(nft, r, &err), "%s", err.msg);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_verify(void **state)
{
    (void)state;
    run_as_both(verify_case);
}

/* In the microVM's network namespace, as one who owns it. */
#define ENTER "nsenter -t %d %s -n "
#define HOW (geteuid() ? "-U --preserve-credentials" : "")

static int nft_in(pid_t pid, const char *script)
{
    char command[512];
    snprintf(command, sizeof command, ENTER "nft '%s' >/dev/null 2>&1", pid, HOW, script);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Others in the namespace cannot change the tables; what the owner's socket changes is seen. */
static void tamper_case(void)
{
    struct net t;
    struct orch_err err = { .code = 0 };
    struct orch_rules *r = rules_with(64, 0);
    open_launcher();
    begin(&t, r, false);
    WAIT(t.ready || t.failed);
    CHECK(t.ready, "%s", t.err.msg);
    struct orch_nft *nft = orch_netns_nft(t.n);
    pid_t init = find_init();
    CHECK(nft_in(init, "list ruleset") == 0, "cannot enter the namespace");
    CHECK(nft_in(init, "flush chain inet orch o_guest") == 1, "the table has no owner");
    CHECK(nft_in(init, "add rule inet orch o_forward accept") == 1, "the table has no owner");
    CHECK(nft_in(init, "delete table inet orch") == 1, "the table has no owner");
    CHECK(nft_in(init, "delete table inet orch_alive") == 1, "the table has no owner");
    CHECK(nft_in(init, "flush chain inet orch_alive o_alive") == 1, "the table has no owner");
    CHECK(nft_in(init, "add element inet orch o_set1 { 1.2.3.4 }") == 1, "the table has no owner");
    CHECK(!orch_nft_verify(nft, r, &err) && orch_nft_changed(nft, &err) == 0, "%s", err.msg);
    /* A table of its own may be added by whoever owns the namespace; it is seen. */
    CHECK(nft_in(init, "add table ip other") == 0, "no second table");
    CHECK(orch_nft_changed(nft, &err) == 1, "not noticed");
    CHECK(orch_nft_verify(nft, r, &err) == -EBADE && strstr(err.msg, "table \"other\""), "%s",
          err.msg);
    CHECK(nft_in(init, "delete table ip other") == 0, "cannot delete");
    CHECK(orch_nft_changed(nft, &err) == 1 && !orch_nft_verify(nft, r, &err) &&
              orch_nft_changed(nft, &err) == 0,
          "%s", err.msg);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_tamper(void **state)
{
    (void)state;
    run_as_both(tamper_case);
}

/* The only network's socket, found among this process's descriptors, which came in their order. */
static int netlink_fd(enum orch_net_fd which)
{
    int before = which == ORCH_NET_FD_LOG,
        wanted = which == ORCH_NET_FD_ROUTE ? NETLINK_ROUTE : NETLINK_NETFILTER;
    for (int i = 0; i < 64; i++) {
        int domain = -1, protocol = -1;
        socklen_t n = sizeof domain, m = sizeof protocol;
        if (!getsockopt(i, SOL_SOCKET, SO_DOMAIN, &domain, &n) && domain == AF_NETLINK &&
            !getsockopt(i, SOL_SOCKET, SO_PROTOCOL, &protocol, &m) && protocol == wanted &&
            !before--)
            return i;
    }
    CHECK(false, "no socket");
}

/* From now on there is room for one message, or two. */
static int narrow(enum orch_net_fd which)
{
    int small = 1, fd = netlink_fd(which);
    CHECK(!setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small), "%m");
    return fd;
}

/* A rule deleted behind verify's back: through the socket that owns the table. */
static void delete_case(void)
{
    struct net t;
    struct orch_err err = { .code = 0 };
    struct orch_nl_fault f;
    struct orch_rules *r = rules_with(0, 0);
    open_launcher();
    begin(&t, r, false);
    WAIT(t.ready || t.failed);
    CHECK(t.ready, "%s", t.err.msg);
    int fd = netlink_fd(ORCH_NET_FD_NFT);
    cleanup_buf struct orch_buf b = { 0 };
    struct nfgenmsg head = { .nfgen_family = AF_UNSPEC, .res_id = htons(NFNL_SUBSYS_NFTABLES) },
                    inet = { .nfgen_family = NFPROTO_INET };
    orch_nl_end(&b, orch_nl_begin(&b, NFNL_MSG_BATCH_BEGIN, 0, 1, &head, sizeof head));
    size_t m = orch_nl_begin(&b, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELRULE, NLM_F_ACK, 2, &inet,
                             sizeof inet);
    orch_nl_put(&b, NFTA_RULE_TABLE, "orch", 5);
    orch_nl_put(&b, NFTA_RULE_CHAIN, "o_output", 9);
    orch_nl_end(&b, m);
    orch_nl_end(&b, orch_nl_begin(&b, NFNL_MSG_BATCH_END, 0, 3, &head, sizeof head));
    CHECK(!orch_nl_talk(fd, b.p, b.n, 2, NULL, NULL, &f), "%s", strerror(f.code));
    CHECK(orch_nft_changed(orch_netns_nft(t.n), &err) == 1, "not noticed");
    CHECK(orch_nft_verify(orch_netns_nft(t.n), r, &err) == -EBADE &&
              strstr(err.msg, "output: IPv6"),
          "%s", err.msg);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_delete(void **state)
{
    (void)state;
    run_as_both(delete_case);
}

/* The largest policies: as many networks, and as many rules, as there may be. */
static void large_case(void)
{
    static struct orch_allow many[ORCH_ALLOW_MAX];
    static struct orch_ports ports[ORCH_ALLOW_MAX];
    struct orch_err err = { .code = 0 };
    open_launcher();
    for (int k = 0; k < 2; k++) {
        struct net t;
        for (size_t i = 0; i < ORCH_ALLOW_MAX; i++) {
            uint16_t port = (uint16_t)(1 + (k ? i : 0));
            ports[i] = (struct orch_ports){ port, port };
            many[i] = (struct orch_allow){
                { 0xc6336400 + (uint32_t)i * 2, 32 }, IPPROTO_TCP, &ports[i], 1
            };
        }
        struct orch_policy p = { .allow = many,
                                 .n_allow = k ? 470 : ORCH_ALLOW_MAX,
                                 .connections = 1 };
        struct orch_rules *r = orch_rules_new(&p, &err);
        CHECK(r, "%s", err.msg);
        begin(&t, r, false);
        WAIT(t.ready || t.failed);
        CHECK(t.ready, "%s", t.err.msg);
        r->sets[0].v[0].first ^= 1;
        CHECK(orch_nft_verify(orch_netns_nft(t.n), r, &err) == -EBADE, "not noticed");
        end(&t);
        orch_rules_free(r);
    }
    close_launcher();
}

static void test_large(void **state)
{
    (void)state;
    run_as_both(large_case);
}

/* Another program reads the same out of the kernel. */
static void listing_case(void)
{
    /* with a label: what a rule denies */
    static const struct {
        const char *line, *label, *to;
    } lines[] = {
        { "type filter hook ingress device \"tap0\" priority filter; policy drop;", NULL, NULL },
        { "@ll,48,64 0x200000000020800 @nh,0,8 0x45 @nh,48,16 & 0xbfff == 0x0 @nh,96,32 0xaff0002 "
          "counter packets 0 bytes 0 accept",
          NULL, NULL },
        { "", "tap: rest", "o_tap_denied" },
        { "type filter hook forward priority filter - 1; policy accept;", NULL, NULL },
        { "counter packets 0 bytes 0 meta mark set 0x00000001 comment \"alive: orch\"", NULL,
          NULL },
        { "type filter hook forward priority filter; policy drop;", NULL, NULL },
        { "meta mark != 0x00000001 counter packets 0 bytes 0 drop comment \"forward: orch is "
          "gone\"",
          NULL, NULL },
        { "iifname \"up0\" oifname \"tap0\" meta nfproto ipv4 ct state established,related counter "
          "packets 0 bytes 0 accept",
          NULL, NULL },
        { "counter packets 0 bytes 0 jump o_host comment \"guest: the host's addresses\"", NULL,
          NULL },
        { "@nh,128,8 0xa ", "never: 10.0.0.0/8 (private)", "o_denied" },
        { "@nh,128,32 0xcb007102 ", "never: 203.0.113.2 (host)", "o_denied" },
        { "elements = { 198.51.100.0/24 }", NULL, NULL },
        { "tcp dport 8000-8010 @nh,128,32 @o_set2 counter packets 0 bytes 0 goto o_flow", NULL,
          NULL },
        { "ct state new ct count over 64 ", "flow: more than 64 connections", "o_denied" },
        { "oifname \"up0\" meta nfproto ipv4 counter packets 0 bytes 0 masquerade", NULL, NULL },
        { "", "output: rest", "o_denied" },
        { "limit rate 10/second burst 20 packets counter packets 0 bytes 0 log group 1 snaplen 64 "
          "queue-threshold 1 comment \"denied: to the log\"",
          NULL, NULL },
        { "counter packets 0 bytes 0 drop comment \"denied: rest\"", NULL, NULL },
    };
    static char text[32768];
    struct net t;
    struct orch_rules *r = rules_with(64, 0);
    open_launcher();
    begin(&t, r, false);
    WAIT(t.ready || t.failed);
    CHECK(t.ready, "%s", t.err.msg);
    char command[128];
    snprintf(command, sizeof command, ENTER "nft list ruleset", find_init(), HOW);
    read_text(command, text, sizeof text);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(lines); i++) {
        char line[256];
        size_t k = 0;
        snprintf(line, sizeof line, "%s", lines[i].line);
        if (lines[i].label) {
            while (strcmp(r->rules[k].label, lines[i].label))
                k++;
            snprintf(line, sizeof line,
                     "%scounter packets 0 bytes 0 meta mark set 0x%08zx goto %s comment \"%s\"",
                     lines[i].line, ORCH_MARK_RULE + k, lines[i].to, lines[i].label);
        }
        CHECK(strstr(text, line), "no line `%s` in:\n%s", line, text);
    }
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_listing(void **state)
{
    (void)state;
    run_as_both(listing_case);
}

/* ---- packets */

static uint16_t sum(const uint8_t *p, size_t n, uint32_t s)
{
    for (size_t i = 0; i < n; i++)
        s += i & 1 ? p[i] : (uint32_t)p[i] << 8;
    while (s >> 16)
        s = (s & 0xffff) + (s >> 16);
    return (uint16_t)~s;
}

/* An IPv4 frame of the guest, as it should be; the cases then spoil it. */
struct frame {
    uint8_t b[1600];
    size_t n;
};

static void put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static void put_addr(uint8_t *p, const char *text)
{
    CHECK(inet_pton(AF_INET, text, p) == 1, "%s", text);
}

static void finish(struct frame *f)
{
    uint8_t *ip = f->b + 14;
    size_t head = (size_t)(ip[0] & 15) * 4;
    put16(ip + 2, (uint32_t)(f->n - 14));
    put16(ip + 10, 0);
    put16(ip + 10, sum(ip, head, 0));
    if (ip[9] == IPPROTO_TCP) {
        uint8_t pseudo[12] = { 0 };
        memcpy(pseudo, ip + 12, 8);
        pseudo[9] = ip[9];
        put16(pseudo + 10, (uint32_t)(f->n - 14 - head));
        uint32_t part = (uint16_t)~sum(pseudo, 12, 0);
        put16(ip + head + 16, 0);
        put16(ip + head + 16, sum(ip + head, f->n - 14 - head, part));
    }
}

static struct frame packet(uint8_t proto, const char *to, uint16_t from_port, uint16_t port,
                           size_t payload)
{
    struct frame f = { .n = 14 + 20 + (proto == IPPROTO_TCP ? 20 : 8) + payload };
    uint8_t *ip = f.b + 14, *l4 = ip + 20;
    memcpy(f.b, ORCH_NET_TAP_MAC, 6);
    memcpy(f.b + 6, ORCH_NET_GUEST_MAC, 6);
    put16(f.b + 12, ETHERTYPE_IP);
    ip[0] = 0x45;
    put16(ip + 6, IP_DF);
    ip[8] = 64;
    ip[9] = proto;
    put_addr(ip + 12, "10.255.0.2");
    put_addr(ip + 16, to);
    put16(l4, from_port);
    put16(l4 + 2, port);
    if (proto == IPPROTO_TCP) {
        l4[12] = 5 << 4;
        l4[13] = 2; /* SYN */
        put16(l4 + 14, 64240);
    } else {
        put16(l4 + 4, (uint32_t)(8 + payload));
    }
    finish(&f);
    return f;
}

static void send_frame(struct net *t, const struct frame *f)
{
    CHECK(send(t->guest, f->b, f->n, 0) == (ssize_t)f->n, "%m");
}

static void drain_capture(void)
{
    char buf[2048];
    while (recv(capture, buf, sizeof buf, MSG_DONTWAIT) > 0)
        ;
}

/* Datagrams to this port that came to W since it was drained, until `want` of them, or for 20 ms
 * when none is wanted. Other packets of the host, about flows that ended before, are none of the
 * guest's. */
static int came_to(uint16_t port, int want)
{
    uint8_t buf[2048];
    struct sockaddr_ll from;
    int n = 0;
    for (int64_t end_us = orch_now_us() + (want ? WAIT_US : 20000);
         orch_now_us() < end_us && (!want || n < want);) {
        struct pollfd pf = { capture, POLLIN, 0 };
        socklen_t len = sizeof from;
        poll(&pf, 1, 1);
        ssize_t got = recvfrom(capture, buf, sizeof buf, MSG_DONTWAIT, (struct sockaddr *)&from,
                               &len);
        n += got >= 42 && from.sll_pkttype != PACKET_OUTGOING && buf[12] == 8 && buf[13] == 0 &&
             buf[23] == IPPROTO_UDP && (buf[36] << 8 | buf[37]) == port;
    }
    return n;
}

/* What came to W over IP until `ms` have passed, or until the first with `want`. Echoes what
 * came to the server. */
static int arrived(int ms, bool want)
{
    int n = 0;
    for (int64_t end_us = orch_now_us() + ms * INT64_C(1000);
         orch_now_us() < end_us && !(want && n);) {
        struct pollfd pf[2] = { { capture, POLLIN, 0 }, { echo_udp, POLLIN, 0 } };
        uint8_t buf[2048];
        orch_loop_step(loop, 0);
        poll(pf, 2, 5);
        if (pf[0].revents) {
            struct sockaddr_ll from;
            socklen_t len = sizeof from;
            ssize_t got = recvfrom(capture, buf, sizeof buf, MSG_DONTWAIT, (struct sockaddr *)&from,
                                   &len);
            if (got > 0 && from.sll_pkttype != PACKET_OUTGOING && buf[12] == 8 && buf[13] != 6)
                n++;
        }
        if (pf[1].revents) {
            struct sockaddr_in from;
            socklen_t len = sizeof from;
            ssize_t got = recvfrom(echo_udp, buf, sizeof buf, MSG_DONTWAIT,
                                   (struct sockaddr *)&from, &len);
            for (int i = 0; got > 0 && i < echo_copies; i++)
                sendto(echo_udp, buf, (size_t)got, 0, (struct sockaddr *)&from, len);
        }
    }
    return n;
}

/* The next frame for the guest, or 0 within ms. */
static size_t received(struct net *t, uint8_t *buf, size_t n, int ms)
{
    for (int64_t end_us = orch_now_us() + ms * INT64_C(1000); orch_now_us() < end_us;) {
        struct pollfd pf = { t->guest, POLLIN, 0 };
        arrived(2, false);
        if (poll(&pf, 1, 0) > 0) {
            ssize_t got = recv(t->guest, buf, n, MSG_DONTWAIT);
            return got > 0 ? (size_t)got : 0;
        }
    }
    return 0;
}

struct look {
    const char *label;
    uint64_t packets;
};

static void look_at(void *ud, const char *label, uint64_t packets, uint64_t bytes)
{
    struct look *l = ud;
    (void)bytes;
    if (!strcmp(label, l->label))
        l->packets = packets;
}

static uint64_t counted(struct net *t, const char *label)
{
    struct look l = { label, UINT64_MAX };
    struct orch_err err = { .code = 0 };
    CHECK(!orch_nft_counters(orch_netns_nft(t->n), look_at, &l, &err), "%s", err.msg);
    CHECK(l.packets != UINT64_MAX, "no rule %s", label);
    return l.packets;
}

/* Sends and expects: nothing in W, and one packet more counted by the rule that stopped it. */
static void blocked(struct net *t, struct frame f, const char *rule, const char *what)
{
    uint64_t before = counted(t, rule);
    drain_capture();
    send_frame(t, &f);
    for (int64_t end_us = orch_now_us() + WAIT_US; counted(t, rule) == before;)
        CHECK(orch_now_us() < end_us, "%s: not counted by `%s`", what, rule);
    CHECK(arrived(10, false) == 0, "%s: something arrived", what);
}

static struct frame udp_to(const char *to, uint16_t port)
{
    return packet(IPPROTO_UDP, to, 40000, port, 16);
}

static void packets_case(void)
{
    struct net t;
    uint8_t buf[2048];
    struct orch_rules *r = rules_with(4, 0);
    open_launcher();
    begin_up(&t, r);
    CHECK(t.up_us >= t.ready_us, "order");

    /* ARP for the gateway is answered with the tap's address; nothing else is. */
    uint8_t arp[42] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0,  2,   8, 6,
                        0,    1,    8,    0,    6,    4,    0, 1, 2, 0, 0,  0,   0, 2,
                        10,   255,  0,    2,    0,    0,    0, 0, 0, 0, 10, 255, 0, 1 };
    struct frame f = { .n = sizeof arp };
    memcpy(f.b, arp, sizeof arp);
    send_frame(&t, &f);
    CHECK(received(&t, buf, sizeof buf, WAIT_MS) >= 42 && !memcmp(buf + 6, ORCH_NET_TAP_MAC, 6) &&
              buf[21] == 2,
          "no answer");
    f.b[41] = 77;
    blocked(&t, f, "tap: rest", "ARP for another");
    f.b[41] = 1;
    f.b[31] = 3;
    blocked(&t, f, "tap: rest", "ARP of another address");
    f.b[31] = 2;
    f.b[27] = 9;
    blocked(&t, f, "tap: rest", "ARP of another hardware");
    f.b[27] = 2;
    f.b[21] = 2;
    blocked(&t, f, "tap: rest", "ARP answer");
    f.b[21] = 1;
    f.b[11] = 3;
    blocked(&t, f, "tap: rest", "ARP in another's frame");

    /* The way and back. */
    f = udp_to("198.51.100.10", ECHO_PORT);
    send_frame(&t, &f);
    CHECK(arrived(WAIT_MS, true) == 1, "an allowed packet did not arrive");
    CHECK(received(&t, buf, sizeof buf, WAIT_MS) == f.n, "no echo");
    CHECK(!memcmp(buf, ORCH_NET_GUEST_MAC, 6) && !memcmp(buf + 26, f.b + 30, 4) &&
              !memcmp(buf + 30, f.b + 26, 4),
          "echo");
    f = packet(IPPROTO_TCP, "198.51.100.10", 40001, 80, 0);
    send_frame(&t, &f);
    CHECK(received(&t, buf, sizeof buf, WAIT_MS) >= 54 && buf[23] == IPPROTO_TCP && buf[47] == 0x12,
          "no SYN-ACK");

    blocked(&t, udp_to("198.51.100.10", ECHO_PORT + 1), "allow: rest", "other port");
    blocked(&t, udp_to("198.51.101.10", ECHO_PORT), "allow: rest", "other network");
    blocked(&t, packet(IPPROTO_TCP, "198.51.100.10", 40002, ECHO_PORT, 0), "allow: rest",
            "other protocol");
    blocked(&t, packet(IPPROTO_TCP, "198.51.100.10", 40002, 81, 0), "allow: rest", "port beside");
    blocked(&t, packet(IPPROTO_TCP, "198.51.100.10", 40002, 8011, 0), "allow: rest",
            "port behind a range");
    blocked(&t, udp_to(HOST, ECHO_PORT), "never: " HOST " (host)", "the host's address");
    blocked(&t, udp_to("203.0.113.77", ECHO_PORT), "never: 203.0.113.77 (host)",
            "an address of a device that is down");
    blocked(&t, udp_to("10.1.2.3", ECHO_PORT), "never: 10.0.0.0/8 (private)",
            "private, though allowed");
    blocked(&t, udp_to("169.254.169.254", ECHO_PORT),
            "never: 169.254.0.0/16 (link-local and metadata)", "metadata");
    blocked(&t, udp_to("10.255.0.1", ECHO_PORT), "input: rest", "gateway");
    blocked(&t, udp_to("10.255.1.2", ECHO_PORT), "input: rest", "uplink's own address");

    f = udp_to("198.51.100.10", ECHO_PORT);
    f.b[11] = 3;
    blocked(&t, f, "tap: rest", "spoofed MAC");
    f = udp_to("198.51.100.10", ECHO_PORT);
    put_addr(f.b + 26, "10.255.0.3");
    finish(&f);
    blocked(&t, f, "tap: rest", "spoofed source");
    f = udp_to("198.51.100.10", ECHO_PORT);
    put16(f.b + 20, IP_MF);
    finish(&f);
    blocked(&t, f, "tap: rest", "first fragment");
    put16(f.b + 20, 1);
    finish(&f);
    blocked(&t, f, "tap: rest", "later fragment");
    f = udp_to("198.51.100.10", ECHO_PORT);
    f.b[12] = 0x86;
    f.b[13] = 0xdd;
    blocked(&t, f, "tap: rest", "another type");
    f = udp_to("198.51.100.10", ECHO_PORT);
    memmove(f.b + 16, f.b + 12, f.n - 12);
    memcpy(f.b + 12, "\x81\x00\x00\x05", 4);
    f.n += 4;
    blocked(&t, f, "tap: rest", "VLAN 5");
    f.b[15] = 0;
    blocked(&t, f, "tap: rest", "VLAN 0");
    f = udp_to("198.51.100.10", ECHO_PORT);
    memmove(f.b + 38, f.b + 34, f.n - 34);
    memcpy(f.b + 34, "\x01\x01\x01\x00", 4);
    f.b[14] = 0x46;
    f.n += 4;
    finish(&f);
    blocked(&t, f, "tap: rest", "IP options");
    f = udp_to("198.51.100.10", ECHO_PORT);
    f.b[23] = IPPROTO_ICMP;
    memcpy(f.b + 34, "\x08\x00\xf7\xff\x00\x00\x00\x00", 8);
    finish(&f);
    blocked(&t, f, "allow: rest", "ICMP");
    f = packet(IPPROTO_TCP, "198.51.100.10", 40003, 80, 0);
    f.b[47] = 0x10;
    finish(&f);
    blocked(&t, f, "flow: rest", "in the midst of a flow");

    /* Four flows are open, two of them above. */
    for (uint16_t i = 0; i < 2; i++) {
        f = packet(IPPROTO_UDP, "198.51.100.10", (uint16_t)(41000 + i), ECHO_PORT, 16);
        send_frame(&t, &f);
        CHECK(arrived(WAIT_MS, true) == 1, "flow %u", i);
    }
    blocked(&t, packet(IPPROTO_UDP, "198.51.100.10", 42000, ECHO_PORT, 16),
            "flow: more than 4 connections", "fifth flow");
    f = udp_to("198.51.100.10", ECHO_PORT);
    send_frame(&t, &f);
    CHECK(arrived(WAIT_MS, true) == 1, "a known flow is not limited");
    struct orch_err err = { .code = 0 };
    CHECK(!orch_nft_verify(orch_netns_nft(t.n), r, &err), "%s", err.msg);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_packets(void **state)
{
    (void)state;
    run_as_both(packets_case);
}

/* Until the rule has counted n packets more; without a turn of the loop. */
static void await_count(struct net *t, const char *rule, uint64_t n)
{
    for (int64_t end_us = orch_now_us() + WAIT_US; counted(t, rule) < n;)
        CHECK(orch_now_us() < end_us, "%s: %llu of %llu", rule,
              (unsigned long long)counted(t, rule), (unsigned long long)n);
}

/* ---- the host's addresses change */

static struct orch_rules *rehosted(const struct orch_rules *r, uint32_t more)
{
    struct orch_err err = { .code = 0 };
    struct orch_cidr *host;
    size_t n;
    CHECK(!orch_link_host(&host, &n, &err), "%s", err.msg);
    host = orch_xrealloc(host, (n + 1) * sizeof *host);
    host[n] = (struct orch_cidr){ more, 32 };
    struct orch_rules *out = orch_rules_rehost(r, host, n + 1, &err);
    CHECK(out, "%s", err.msg);
    free(host);
    return out;
}

static void rehost(struct net *t, const struct orch_rules *r)
{
    struct orch_err err = { .code = 0 };
    CHECK(!orch_netns_rehost(t->n, r, &err), "%s", err.msg);
    CHECK(!orch_nft_verify(orch_netns_nft(t->n), r, &err), "%s", err.msg);
}

/* A server becomes the host's: its flow is cut, known or not, others go on. */
static void rehost_case(void)
{
    struct net t;
    struct orch_err err = { .code = 0 };
    struct orch_rules *r = rules_with(8, 0), *with = rehosted(r, 0xc633640a);
    const struct frame f = udp_to("198.51.100.10", ECHO_PORT),
                       other = udp_to("198.51.100.11", ECHO_PORT);
    uint8_t buf[2048];
    open_launcher();
    begin_up(&t, r);
    for (int i = 0; i < 2; i++) {
        for (int known = 0; known < 2; known++) {
            send_frame(&t, &f);
            CHECK(received(&t, buf, sizeof buf, WAIT_MS) == f.n, "no echo");
        }
        CHECK(counted(&t, "flow: known"), "the flow is not known");
        rehost(&t, with);
        CHECK(orch_nft_verify(orch_netns_nft(t.n), r, &err) == -EBADE, "these are not in force");
        unsigned lines = t.denied;
        uint64_t known = counted(&t, "flow: known");
        drain_capture();
        send_frame(&t, &f);
        WAIT(t.denied == lines + 1);
        CHECK(!strcmp(t.rule, "never: 198.51.100.10 (host)") && counted(&t, t.rule) == 1, "%s",
              t.rule);
        CHECK(counted(&t, "flow: known") == known && came_to(ECHO_PORT, 0) == 0, "it passed");
        send_frame(&t, &other);
        CHECK(came_to(ECHO_PORT, 1) == 1, "another server is cut off");
        rehost(&t, r);
    }
    /* Where it cannot be verified, that is said. */
    CHECK(nft_in(find_init(), "add table ip other") == 0, "no second table");
    CHECK(orch_netns_rehost(t.n, with, &err) == -EBADE && strstr(err.msg, "table \"other\""), "%s",
          err.msg);
    end(&t);

    /* Before the filter is made. */
    begin(&t, r, false);
    CHECK(!orch_netns_rehost(t.n, with, &err), "%s", err.msg);
    WAIT(t.ready || t.failed);
    CHECK(t.ready && !orch_nft_verify(orch_netns_nft(t.n), with, &err), "%s", err.msg);
    end(&t);
    orch_rules_free(with);
    orch_rules_free(r);
    close_launcher();
}

/* While the guest sends, without a pause, to an address that is the host's throughout. */
static void rehost_race_case(void)
{
    struct net t;
    struct orch_rules *r = rules_with(8, 0), *with = rehosted(r, 0xc633640a);
    struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons(ECHO_PORT) };
    put_addr((uint8_t *)&sa.sin_addr, HOST);
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK(!bind(s, (const struct sockaddr *)&sa, sizeof sa), "%m");
    open_launcher();
    begin_up(&t, r);
    pid_t sender = fork();
    if (!sender) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        struct frame f = udp_to(HOST, ECHO_PORT);
        while (send(t.guest, f.b, f.n, 0) > 0)
            ;
        _exit(0);
    }
    WAIT(t.denied);
    for (int i = 0; i < 200; i++) {
        rehost(&t, i & 1 ? r : with);
        orch_loop_step(loop, 0);
    }
    await_count(&t, "never: " HOST " (host)", 1);
    kill(sender, SIGKILL);
    waitpid(sender, NULL, 0);
    struct pollfd pf = { s, POLLIN, 0 };
    CHECK(poll(&pf, 1, 20) == 0, "the host was reached");
    close(s);
    end(&t);
    orch_rules_free(with);
    orch_rules_free(r);
    close_launcher();
}

static void test_rehost(void **state)
{
    (void)state;
    run_as_both(rehost_case);
    run_as_both(rehost_race_case);
}

static void on_change(void *ud)
{
    ++*(int *)ud;
}

static bool host_has(uint32_t addr)
{
    struct orch_err err = { .code = 0 };
    struct orch_cidr *v;
    size_t n;
    bool has = false;
    CHECK(!orch_link_host(&v, &n, &err), "%s", err.msg);
    for (size_t i = 0; i < n; i++)
        has |= v[i].addr == addr && v[i].bits == 32;
    free(v);
    return has;
}

/* While the list is read anew. */
static void on_loss(void *ud)
{
    if (!++*(int *)ud)
        sh("ip addr add 203.0.113.79/32 dev h1");
}

/* As root, since it changes them. */
static void watch_case(void)
{
    struct orch_err err = { .code = 0 };
    int changes = 0;
    loop = orch_loop_new(&err);
    struct orch_link_watch *w = orch_link_watch_new(loop, on_change, &changes, &err);
    CHECK(w, "%s", err.msg);
    sh("ip route add 192.0.2.0/25 dev h0");
    orch_loop_step(loop, 20);
    CHECK(!changes, "a route to elsewhere is none of the host's addresses");
    sh("ip addr add 203.0.113.78/32 dev h1");
    WAIT(changes);
    CHECK(host_has(0xcb00714e), "it is not there");
    sh("ip addr del 203.0.113.78/32 dev h1");
    WAIT(changes && !host_has(0xcb00714e));
    for (const char *const *c = (const char *const[]){ "add", "del", NULL }; *c; c++) {
        char command[64];
        snprintf(command, sizeof command, "ip route %s local 192.0.2.1/32 dev lo", *c);
        changes = 0;
        sh(command);
        WAIT(changes);
    }
    orch_link_watch_free(w);
    /* What was lost may have been an address; nor is one lost that comes while that is found
     * out. */
    changes = -1;
    w = orch_link_watch_new(loop, on_loss, &changes, &err);
    CHECK(w, "%s", err.msg);
    narrow(ORCH_NET_FD_ROUTE);
    sh("for i in 1 2 3 4 5 6 7 8 9; do ip route add 198.18.$i.0/24 dev h0; done");
    WAIT(changes >= 0);
    WAIT(changes > 0);
    CHECK(host_has(0xcb00714f), "it is not there");
    sh("for i in 1 2 3 4 5 6 7 8 9; do ip route del 198.18.$i.0/24; done; ip route del "
       "192.0.2.0/25; "
       "ip addr del 203.0.113.79/32 dev h1");
    orch_link_watch_free(w);
    orch_loop_free(loop);
}

static void test_watch(void **state)
{
    (void)state;
    run_as(0, watch_case);
}

/* ---- denied packets in the log */

static struct frame bent(struct frame f, unsigned at, uint8_t value)
{
    f.b[at] = value;
    finish(&f);
    return f;
}

static void denied_case(void)
{
    struct net t;
    struct orch_rules *r = rules_with(4, 0);
    const struct frame good = udp_to("198.51.100.10", ECHO_PORT);
    struct frame arp = { { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0,  2,   8, 6,
                           0,    1,    8,    0,    6,    4,    0, 1, 2, 0, 0,  0,   0, 2,
                           10,   255,  0,    2,    0,    0,    0, 0, 0, 0, 10, 255, 0, 9 },
                         42 };
    const struct {
        struct frame f;
        const char *rule, *dst;
        int proto, port; /* -1: none */
    } cases[] = {
        { udp_to("198.51.100.10", 5301), "allow: rest", "198.51.100.10", IPPROTO_UDP, 5301 },
        { packet(IPPROTO_TCP, "198.51.100.10", 40002, 81, 0), "allow: rest", "198.51.100.10",
          IPPROTO_TCP, 81 },
        { bent(good, 23, IPPROTO_ICMP), "allow: rest", "198.51.100.10", IPPROTO_ICMP, -1 },
        { udp_to(HOST, 53), "never: " HOST " (host)", HOST, IPPROTO_UDP, 53 },
        { udp_to("169.254.169.254", 80), "never: 169.254.0.0/16 (link-local and metadata)",
          "169.254.169.254", IPPROTO_UDP, 80 },
        { udp_to("10.255.0.1", 53), "input: rest", "10.255.0.1", IPPROTO_UDP, 53 },
        { bent(good, 22, 1), "output: rest", "10.255.0.2", IPPROTO_ICMP, -1 }, /* its TTL is over */
        { bent(packet(IPPROTO_TCP, "198.51.100.10", 40003, 80, 0), 47, 0x10), "flow: rest",
          "198.51.100.10", IPPROTO_TCP, 80 },
        { udp_to("10.255.0.2", 53), "forward: rest", "10.255.0.2", IPPROTO_UDP, 53 },
        { bent(good, 29, 3), "tap: rest", "198.51.100.10", IPPROTO_UDP, ECHO_PORT },
        { bent(good, 20, 0x20), "tap: rest", "198.51.100.10", IPPROTO_UDP, ECHO_PORT },
        { arp, "tap: rest", NULL, -1, -1 },
    };
    open_launcher();
    begin_up(&t, r);
    unsigned before = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        char dst[ORCH_CIDR_TEXT];
        send_frame(&t, &cases[i].f);
        WAIT(t.denied == before + 1);
        before++;
        orch_cidr_text((struct orch_cidr){ t.last.dst, 32 }, dst);
        CHECK(!strcmp(t.rule, cases[i].rule), "case %zu: %s", i, t.rule);
        CHECK(t.last.has_ip == !!cases[i].dst && (!cases[i].dst || !strcmp(dst, cases[i].dst)) &&
                  (!cases[i].dst || t.last.proto == cases[i].proto) &&
                  t.last.type == (cases[i].dst ? ETHERTYPE_IP : ETHERTYPE_ARP),
              "case %zu: %s", i, dst);
        CHECK(t.last.has_port == (cases[i].port >= 0) &&
                  (cases[i].port < 0 || t.last.port == cases[i].port),
              "case %zu: port %u", i, t.last.port);
    }
    /* New flows pass, without a line, until there are as many as may be. */
    for (uint16_t i = 0; t.denied == before; i++) {
        uint64_t passed = counted(&t, "flow: new udp");
        struct frame f = packet(IPPROTO_UDP, "198.51.100.10", (uint16_t)(41000 + i), ECHO_PORT, 16);
        send_frame(&t, &f);
        WAIT(t.denied > before || counted(&t, "flow: new udp") > passed);
        CHECK(i < 5, "flow %u", i);
    }
    CHECK(t.denied == ++before && !strcmp(t.rule, "flow: more than 4 connections"), "%s", t.rule);
    /* One that was denied just before the end. */
    send_frame(&t, &cases[0].f);
    await_count(&t, "allow: rest", 4);
    end(&t);
    CHECK(t.denied == before + 1 && !strcmp(t.rule, "allow: rest"), "%s", t.rule);
    orch_rules_free(r);
    close_launcher();
}

/* Half of what is logged at once, and dropped. */
static void flood(struct net *t)
{
    const struct frame f = udp_to("198.51.100.10", 5301);
    uint64_t before = counted(t, "denied: rest");
    for (int i = 0; i < ORCH_LOG_BURST / 2; i++)
        send_frame(t, &f);
    await_count(t, "denied: rest", before + ORCH_LOG_BURST / 2);
}

/* Again, when the last that had room is read: only then can more be lost than is said already. */
static void flood_again(struct net *t)
{
    struct pollfd pf = { netlink_fd(ORCH_NET_FD_LOG), POLLIN, 0 };
    if (poll(&pf, 1, 0))
        t->then = flood_again;
    else
        flood(t);
}

/* Whether it is logged or not, all of it is dropped: beyond the limit, with no room for a message,
 * with nobody who listens. */
static void flood_case(void)
{
    enum { N = 10000 };
    struct net t;
    struct orch_rules *r = rules_with(4, 0);
    const struct frame f = udp_to("198.51.100.10", 5301);
    open_launcher();
    begin_up(&t, r);
    drain_capture();
    int fd = narrow(ORCH_NET_FD_LOG);
    t.then = flood_again;
    flood(&t);
    WAIT(t.denied && !t.then);
    for (unsigned denied = 0; denied != t.denied; orch_loop_step(loop, 0))
        denied = t.denied;
    CHECK(t.missed == 2 && t.denied < ORCH_LOG_BURST, "missed %u", t.missed);
    CHECK(counted(&t, "denied: to the log") == ORCH_LOG_BURST, "the limit");

    int64_t t0 = orch_now_us();
    for (int i = 0; i < N; i++)
        send_frame(&t, &f);
    await_count(&t, "denied: rest", ORCH_LOG_BURST + N);
    int64_t us = orch_now_us() - t0;
    CHECK(counted(&t, "allow: rest") == ORCH_LOG_BURST + N, "other rules");
    uint64_t lines = counted(&t, "denied: to the log") - ORCH_LOG_BURST;
    /* What was saved up before the flood counts too. */
    CHECK(lines <= ORCH_LOG_BURST + ORCH_LOG_RATE * (uint64_t)(us / 1000000 + 1),
          "%llu lines in %lld us", (unsigned long long)lines, (long long)us);

    cleanup_buf struct orch_buf b = { 0 };
    struct orch_nl_fault fault;
    struct nfgenmsg head = { .res_id = htons(ORCH_LOG_GROUP) };
    size_t m = orch_nl_begin(&b, NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG, NLM_F_ACK, 1, &head,
                             sizeof head);
    orch_nl_put(&b, NFULA_CFG_CMD, &(struct nfulnl_msg_config_cmd){ NFULNL_CFG_CMD_UNBIND }, 1);
    orch_nl_end(&b, m);
    CHECK(!orch_nl_talk(fd, b.p, b.n, 1, NULL, NULL, &fault), "%s", strerror(fault.code));
    unsigned before = t.denied;
    uint64_t logged = counted(&t, "denied: to the log");
    do {
        uint64_t dropped = counted(&t, "denied: rest");
        send_frame(&t, &f);
        await_count(&t, "denied: rest", dropped + 1);
    } while (counted(&t, "denied: to the log") == logged);
    CHECK(came_to(5301, 0) == 0, "a denied packet arrived");
    CHECK(t.denied == before, "who told?");
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_denied(void **state)
{
    (void)state;
    run_as_both(denied_case);
    run_as_both(flood_case);
}

/* ---- sockets that are full */

/* Errors of a batch that nobody reads, more than there is room for; as if they answered the next
 * request. */
static void spoil(int fd)
{
    const struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
    struct nfgenmsg head = { .res_id = htons(NFNL_SUBSYS_NFTABLES) },
                    inet = { .nfgen_family = NFPROTO_INET };
    cleanup_buf struct orch_buf b = { 0 };
    orch_nl_end(&b, orch_nl_begin(&b, NFNL_MSG_BATCH_BEGIN, 0, 1, &head, sizeof head));
    for (int i = 0; i < 64; i++) {
        size_t m = orch_nl_begin(&b, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELRULE, NLM_F_ACK, 1,
                                 &inet, sizeof inet);
        orch_nl_put(&b, NFTA_RULE_TABLE, "orch", 5);
        orch_nl_put(&b, NFTA_RULE_CHAIN, "absent", 7);
        orch_nl_end(&b, m);
    }
    orch_nl_end(&b, orch_nl_begin(&b, NFNL_MSG_BATCH_END, 0, 1, &head, sizeof head));
    CHECK(sendto(fd, b.p, b.n, 0, (const struct sockaddr *)&kernel, sizeof kernel) > 0, "%m");
}

/* The filter's socket: what only reads is asked again, a batch is read back, and what is refused is
 * named though other errors behind it were lost. */
static void full_filter_case(void)
{
    struct net t;
    uint32_t flows = 1;
    struct orch_err err = { .code = 0 };
    struct orch_rules *r = rules_with(8, 0), *with = rehosted(r, 0xc633640a);
    open_launcher();
    begin(&t, r, false);
    WAIT(t.ready || t.failed);
    CHECK(t.ready, "%s", t.err.msg);
    struct orch_nft *nft = orch_netns_nft(t.n);
    int fd = narrow(ORCH_NET_FD_NFT);
    for (int i = 0; i < 6; i++) {
        int e = 0;
        spoil(fd);
        switch (i) {
        case 0:
            e = orch_nft_changed(nft, &err);
            break;
        case 1:
            e = orch_nft_verify(nft, r, &err);
            break;
        case 2:
            CHECK(counted(&t, "forward: rest") == 0, "counted");
            break;
        case 3:
            e = orch_nft_connections(nft, &flows, &err);
            CHECK(flows == 0, "%u flows", flows);
            break;
        case 4:
            e = orch_netns_rehost(t.n, with, &err);
            break;
        case 5:
            CHECK(orch_nft_commit(nft, with, &err) == -EEXIST, "%s", err.msg);
            CHECK(strstr(err.msg, "table inet orch_alive: File exists"), "%s", err.msg);
            break;
        }
        CHECK(!e, "case %d: %s", i, err.msg);
    }
    CHECK(!orch_nft_verify(nft, with, &err), "%s", err.msg);
    end(&t);
    orch_rules_free(with);
    orch_rules_free(r);
    close_launcher();
}

static void run_in(pid_t pid, const char *script)
{
    char command[512];
    snprintf(command, sizeof command, ENTER "sh -c '%s'", pid, HOW, script);
    sh(command);
}

#define ROUTES(what) \
    "for i in 1 2 3 4 5 6 7 8 9; do ip route " what " 198.18.$i.0/24 dev tap0 || exit 1; done"

/* The route's announcement is lost: it was there before, or comes among others. */
static void lose_route(struct net *t)
{
    char buf[8192];
    int fd = narrow(ORCH_NET_FD_ROUTE);
    (void)t;
    run_in(find_init(), "until ip route show default | grep -q up0; do sleep 0.01; done");
    while (recv(fd, buf, sizeof buf, MSG_DONTWAIT) > 0 || errno == ENOBUFS)
        ;
    run_in(find_init(), ROUTES("add"));
}

static void full_route_case(void)
{
    struct net t;
    struct orch_rules *r = rules_with(8, 8000000);
    uint8_t buf[2048];
    const struct frame f = udp_to("198.51.100.10", ECHO_PORT);
    open_launcher();
    begin(&t, r, true);
    t.then = lose_route;
    WAIT(t.ready || t.failed);
    CHECK(t.ready, "%s", t.err.msg);
    WAIT(t.up || t.failed);
    CHECK(t.up, "%s", t.err.msg);
    start(&t);
    wait_up(&t);
    send_frame(&t, &f);
    CHECK(received(&t, buf, sizeof buf, WAIT_MS) == f.n, "no echo");
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

/* Making the tap: what was lost before is no fault; what is lost of it is, and is said. */
static void full_tap_case(void)
{
    struct orch_err err = { .code = 0 };
    struct orch_link_events ev = { .uplink = 0 };
    struct sockaddr_nl sa = { .nl_family = AF_NETLINK,
                              .nl_groups = RTMGRP_LINK | RTMGRP_IPV4_ROUTE };
    CHECK(!unshare(CLONE_NEWNET), "%m");
    int large = 1 << 20, fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    CHECK(fd >= 0 && !bind(fd, (const struct sockaddr *)&sa, sizeof sa), "%m");
    sh("ip tuntap add tap0 mode tap && ip link add up0 type veth peer name up1 && ip link set up0 "
       "up");
    narrow(ORCH_NET_FD_ROUTE);
    sh("ip addr add 203.0.113.9/24 dev up0 && ip route add default via 203.0.113.1 dev up0");
    CHECK(!setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &large, sizeof large), "%m");
    CHECK(!orch_link_tap(fd, 8000000, true, &ev, &err), "%s", err.msg);
    CHECK(ev.lost && !ev.uplink, "%u, %d", ev.lost, ev.uplink);
    CHECK(!orch_link_catch_up(fd, &ev, &err), "%s", err.msg);
    CHECK(!ev.lost && ev.uplink > 1, "%u, %d", ev.lost, ev.uplink);
    sh("ip link show tap0 | grep -q UP && ip addr show tap0 | grep -q 10.255.0.1 && ip link set "
       "tap0 down");
    narrow(ORCH_NET_FD_ROUTE);
    int e = orch_link_tap(fd, 8000000, true, &ev, &err);
    CHECK(e == -ENOBUFS && err.cls == ORCH_CLASS_ISOLATION, "%d: %s", e, err.msg);
    close(fd);
}

static void test_full(void **state)
{
    (void)state;
    run_as_both(full_filter_case);
    run_as_both(full_route_case);
    run_as(0, full_tap_case);
}

/* A service on the host's loopback, with rules that let everything through: pasta's own doors
 * are shut. */
static void loopback_case(void)
{
    static const char *const to[] = { "127.0.0.1", "10.255.1.1", "10.255.0.1", "10.255.1.2",
                                      "0.0.0.0" };
    static const struct orch_allow all[] = { { { 0, 1 }, IPPROTO_UDP, port_53, 1 },
                                             { { 0x80000000, 1 }, IPPROTO_UDP, port_53, 1 } };
    static const struct orch_cidr permit[] = { { 0x7f000000, 8 }, { 0x0a000000, 8 }, { 0, 8 } };
    static char text[4096];
    char command[128];
    struct net t;
    struct orch_err err = { .code = 0 };
    struct orch_policy p = { .allow = all, .n_allow = 2, .permit = permit, .n_permit = 3 };
    struct orch_rules *r = orch_rules_new(&p, &err);
    CHECK(r, "%s", err.msg);
    for (size_t i = 0; i < r->n_rules; i++)
        if (!strcmp(r->rules[i].label, "never: the namespace's own")) {
            r->rules[i].verdict = ORCH_VERDICT_GOTO;
            r->rules[i].target = ORCH_CHAIN_ALLOW;
        }
    struct sockaddr_in lo = { .sin_family = AF_INET,
                              .sin_port = htons(ECHO_PORT),
                              .sin_addr = { htonl(INADDR_LOOPBACK) } };
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK(!bind(s, (const struct sockaddr *)&lo, sizeof lo), "%m");
    open_launcher();
    begin_up(&t, r);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(to); i++) {
        struct frame f = udp_to(to[i], ECHO_PORT);
        send_frame(&t, &f);
    }
    struct frame f = udp_to("198.51.100.10", ECHO_PORT);
    drain_capture();
    send_frame(&t, &f);
    CHECK(arrived(WAIT_MS, true) == 1, "nothing goes out at all");
    struct pollfd pf = { s, POLLIN, 0 };
    CHECK(poll(&pf, 1, 50) == 0, "a service on the host's loopback was reached");
    /* Nor does pasta listen in the namespace for what listens on the host. */
    snprintf(command, sizeof command, ENTER "ss -Hlntu", find_init(), HOW);
    read_text(command, text, sizeof text);
    CHECK(!*text, "%s", text);
    end(&t);
    close(s);
    orch_rules_free(r);
    close_launcher();
}

static void test_loopback(void **state)
{
    (void)state;
    run_as_both(loopback_case);
}

/* 8 Mbit/s, a megabyte a second: what passes in some time is at most that and the burst; the same
 * for what comes back, which is four times as much. */
static void bandwidth_case(void)
{
    struct net t;
    uint8_t buf[2048];
    struct orch_rules *r = rules_with(0, 8000000);
    open_launcher();
    begin_up(&t, r);
    struct frame f = packet(IPPROTO_UDP, "198.51.100.10", 40000, ECHO_PORT, 1400);
    size_t out = 0, back = 0;
    drain_capture();
    echo_copies = 4;
    int64_t us = 0;
    for (int64_t start_us = orch_now_us(); us < 250000 || out <= 100 || back <= 100;) {
        for (int i = 0; i < 20; i++)
            send(t.guest, f.b, f.n, MSG_DONTWAIT);
        out += (size_t)arrived(5, false);
        while (recv(t.guest, buf, sizeof buf, MSG_DONTWAIT) > 0)
            back++;
        us = orch_now_us() - start_us;
        CHECK(us < WAIT_US, "%zu frames out, %zu back", out, back);
    }
    size_t limit = (66 * 1024 + (size_t)us + 100000) / 1442 + 10;
    CHECK(out <= limit, "%zu frames of at most %zu", out, limit);
    CHECK(back <= limit, "%zu frames back of at most %zu", back, limit);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_bandwidth(void **state)
{
    (void)state;
    run_as_both(bandwidth_case);
}

/* ---- the tap in the VMM's hands */

/* What tests/e2e/probe.c may find. The device behind it can be opened anew, as by everyone on the
 * host. */
static const char tap_answers[] = "reopen: ok\n"
                                  "reopened: write: EBADFD\n"
                                  "reopened: attach: EPERM\n"
                                  "map: ENODEV\n"
                                  "attach: EPERM\n"
                                  "queue: EPERM\n"
                                  "persist: EPERM\n"
                                  "owner: EPERM\n"
                                  "link type: EPERM\n"
                                  "carrier: EPERM\n"
                                  "debug: EPERM\n"
                                  "filter: EPERM\n"
                                  "address: EPERM\n"
                                  "namespace: EPERM\n"
                                  "chmod: EPERM\n"
                                  "chmod by link: EPERM\n"
                                  "xattr: EPERM\n"
                                  "below: ENOTDIR\n"
                                  "end\n";

static void tap_case(void)
{
    static const char *const argv[] = { PROBE_PATH, "tap", NULL };
    static const struct orch_cell_bind bind = { probe, PROBE_PATH };
    struct orch_err err = { .code = 0 };
    struct orch_cell_opts o = { .argv = argv,
                                .binds = &bind,
                                .n_binds = 1,
                                .on_started = on_started,
                                .on_exit = on_exit_,
                                .on_error = on_failed };
    struct orch_rules *r = rules_with(0, 0);
    cleanup_buf struct orch_buf said = { 0 };
    struct net t;
    int log[2];
    open_launcher();
    begin(&t, r, false);
    WAIT(t.ready || t.failed);
    CHECK(!t.failed && !pipe2(log, O_CLOEXEC), "%s", t.err.msg);
    o.ud = &t;
    for (int i = 0; i < ORCH_LAUNCH_FDS; i++)
        o.fds[i] = -1;
    o.fds[ORCH_LAUNCH_FD_LOG] = log[1];
    t.cell = orch_netns_start(t.n, &o, &err);
    CHECK(t.cell, "%s", err.msg);
    close(log[1]);
    WAIT(t.exited || t.failed);
    CHECK(t.exited && !orch_read_fd(log[0], 4096, &said), "%s", t.err.msg);
    CHECK(!strcmp(said.p, tap_answers), "expected\n%sgot\n%s", tap_answers, said.p);
    close(log[0]);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void test_tap(void **state)
{
    (void)state;
    run_as_both(tap_case);
}

/* ---- refusals */

static void expect_failure(const char *const *parts, bool uplink)
{
    struct net t;
    struct orch_rules *r = rules_with(0, 0);
    open_launcher();
    begin(&t, r, uplink);
    WAIT(t.failed);
    CHECK(t.err.cls == ORCH_CLASS_ISOLATION && !t.up && !t.started, "class %d: %s", t.err.cls,
          t.err.msg);
    for (; *parts; parts++)
        CHECK(strstr(t.err.msg, *parts), "no `%s` in: %s", *parts, t.err.msg);
    orch_loop_step(loop, 20);
    CHECK(t.failed == 1, "told %d times", t.failed);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}
#define EXPECT_FAILURE(uplink, ...) \
    expect_failure((const char *const[]){ __VA_ARGS__, NULL }, uplink)

static void no_route_case(void)
{
    EXPECT_FAILURE(true, "no network: pasta (exit status 1): ", "default route on the host");
}

static void no_pasta_case(void)
{
    EXPECT_FAILURE(true, "no network: pasta program", "install the package passt");
}

static void no_tun_case(void)
{
    EXPECT_FAILURE(false, "no network: /dev/net/tun: Permission denied", "chmod 666 /dev/net/tun");
}

static void too_early_case(void)
{
    static const char *const argv[] = { WIRE_PATH, NULL };
    struct net t;
    struct orch_err err = { .code = 0 };
    struct orch_rules *r = rules_with(0, 0);
    open_launcher();
    begin(&t, r, true);
    struct orch_cell_opts o = {
        .argv = argv, .on_exit = on_exit_, .on_error = on_failed, .ud = &t
    };
    for (int i = 0; i < ORCH_LAUNCH_FDS; i++)
        o.fds[i] = -1;
    CHECK(!orch_netns_start(t.n, &o, &err) && strstr(err.msg, "no verified packet filter"), "%s",
          err.msg);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

/* The launcher's own refusals: a second NET, NET behind VMM, NET with a descriptor, a tap from
 * outside. */
static void wire_case(void)
{
    static struct orch_launch_msg m;
    for (int k = 0; k < 4; k++) {
        int sv[2], main_fd[2], fds[ORCH_LAUNCH_FDS], status,
            null = open("/dev/null", O_RDWR | O_CLOEXEC);
        size_t n;
        CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, main_fd) &&
                  !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv),
              "%m");
        pid_t pid = fork();
        if (!pid) {
            dup2(main_fd[1], 3);
            execl(launcher, launcher, (char *)NULL);
            _exit(127);
        }
        close(main_fd[1]);
        m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NEW,
                                      .uid = geteuid() ? 0 : 60001,
                                      .gid = geteuid() ? 0 : 60001 };
        CHECK(!orch_launch_send(main_fd[0], &m, &sv[1], 1), "%m");
        close(sv[1]);
        m = (struct orch_launch_msg){ .op = ORCH_LAUNCH_NET };
        if (k == 0)
            orch_launch_send(sv[0], &m, NULL, 0);
        if (k == 1) {
            m.op = ORCH_LAUNCH_VMM;
            orch_launch_send(sv[0], &m, NULL, 0);
            m.op = ORCH_LAUNCH_NET;
        }
        if (k == 3) {
            m.op = ORCH_LAUNCH_VMM;
            m.fd_mask = 1 << ORCH_LAUNCH_FD_TAP;
        }
        orch_launch_send(sv[0], &m, &null, k >= 2);
        bool answered = false, named = false;
        for (;;) {
            struct pollfd pf = { sv[0], POLLIN, 0 };
            CHECK(poll(&pf, 1, WAIT_MS) == 1, "case %d goes on", k);
            int r = orch_launch_recv(sv[0], &m, fds, &n);
            for (size_t i = 0; i < n; i++)
                close(fds[i]);
            if (r != 1)
                break;
            answered |= m.op == ORCH_LAUNCH_NET;
            named |= m.op == ORCH_LAUNCH_ERROR && !strcmp(m.step, "message");
        }
        CHECK(answered == (k == 0) && named == (k == 3), "case %d: %d %d", k, answered, named);
        close(sv[0]);
        close(main_fd[0]);
        close(null);
        waitpid(pid, &status, 0);
    }
}

/* On a machine that prepare has changed. */
static void run_changed(int unshared, void (*prepare)(void), void (*fn)(void))
{
    pid_t p = fork();
    int status;
    if (!p) {
        CHECK(!unshare(unshared | CLONE_NEWNS) &&
                  !mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL),
              "%m");
        prepare();
        _exit(status_as(USER, fn) || status_as(0, fn));
    }
    waitpid(p, &status, 0);
    assert_int_equal(status, 0);
}

static void prepare_nothing(void)
{
}

static void prepare_no_pasta(void)
{
    CHECK(!mount("none", "/usr/bin", "tmpfs", 0, NULL), "%m");
}

static void prepare_no_tun(void)
{
    char path[96];
    snprintf(path, sizeof path, "%s/tun-closed", dir);
    CHECK(!mknod(path, S_IFCHR | 0600, makedev(10, 200)) &&
              !mount(path, "/dev/net/tun", NULL, MS_BIND, NULL),
          "%m");
}

static void test_refusals(void **state)
{
    (void)state;
    run_changed(CLONE_NEWNET, prepare_nothing, no_route_case);
    run_changed(0, prepare_no_pasta, no_pasta_case);
    run_changed(0, prepare_no_tun, no_tun_case);
    run_as_both(too_early_case);
    run_as_both(wire_case);
}

/* /proc/sys read-only, as in containers: the devices are set one by one. */
static void read_only_case(void)
{
    struct net t;
    uint8_t buf[2048];
    static char text[4096];
    struct orch_rules *r = rules_with(4, 0);
    open_launcher();
    begin_up(&t, r);
    struct frame f = udp_to("198.51.100.10", ECHO_PORT);
    send_frame(&t, &f);
    CHECK(arrived(WAIT_MS, true) == 1 && received(&t, buf, sizeof buf, WAIT_MS) == f.n, "no echo");
    char command[256];
    snprintf(command, sizeof command,
             ENTER "sh -c 'cd /proc/sys/net/ipv4; cat ip_forward; "
                   "for d in tap0 up0; do cat conf/$d/forwarding conf/$d/rp_filter "
                   "conf/$d/send_redirects; done'",
             find_init(), HOW);
    read_text(command, text, sizeof text);
    CHECK(!strcmp(text, "0\n1\n1\n0\n1\n1\n0\n"), "%s", text);
    end(&t);
    orch_rules_free(r);
    close_launcher();
}

static void prepare_read_only(void)
{
    CHECK(!mount("/proc/sys", "/proc/sys", NULL, MS_BIND, NULL) &&
              !mount(NULL, "/proc/sys", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL),
          "%m");
}

static void test_read_only(void **state)
{
    (void)state;
    run_changed(0, prepare_read_only, read_only_case);
}

/* ---- ends */

/* Processes of the launcher's session, which is its own; those that have ended and only wait to
 * be reaped do not count. */
static int count_session(pid_t session)
{
    int n = 0;
    DIR *d = opendir("/proc");
    for (struct dirent *e; (e = readdir(d));) {
        char path[300], text[512] = "", state;
        int sid;
        snprintf(path, sizeof path, "/proc/%s/stat", e->d_name);
        int fd = *e->d_name >= '0' && *e->d_name <= '9' ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        if (fd >= 0 && read(fd, text, sizeof text - 1) > 0 && strrchr(text, ')') &&
            sscanf(strrchr(text, ')') + 1, " %c %*d %*d %d", &state, &sid) == 2)
            n += sid == session && state != 'Z';
        if (fd >= 0)
            close(fd);
    }
    closedir(d);
    return n;
}

static void wait_session(pid_t session, int n)
{
    for (int64_t end_us = orch_now_us() + WAIT_US; count_session(session) != n; poll(NULL, 0, 1))
        CHECK(orch_now_us() < end_us, "%d processes, not %d", count_session(session), n);
}

static void ends_case(void)
{
    struct net t;
    struct orch_rules *r = rules_with(4, 0);
    open_launcher();
    pid_t l = orch_launcher_pid(la);
    /* pasta dies: the VMM's owner is told why, and the VMM is gone. */
    begin(&t, r, true);
    WAIT(t.up || t.failed);
    CHECK(t.up, "%s", t.err.msg);
    pid_t pasta = child_of(find_init());
    start(&t);
    WAIT(t.started);
    wait_session(l, 4);
    kill(pasta, SIGKILL);
    WAIT(t.failed);
    CHECK(strstr(t.err.msg, "no network: pasta (killed by signal 9)"), "%s", t.err.msg);
    wait_session(l, 1);
    end(&t);
    /* Before the VMM: the netns is told. */
    begin(&t, r, true);
    WAIT(t.up || t.failed);
    CHECK(t.up, "%s", t.err.msg);
    kill(child_of(find_init()), SIGKILL);
    WAIT(t.failed);
    CHECK(strstr(t.err.msg, "no network: pasta"), "%s", t.err.msg);
    end(&t);
    wait_session(l, 1);
    /* The end of the cell is pasta's. */
    begin_up(&t, r);
    wait_session(l, 4);
    end(&t);
    wait_session(l, 1);
    /* At any moment before. */
    for (int i = 0; i < 20; i++) {
        begin(&t, r, true);
        for (int64_t end_us = orch_now_us() + i * 700; orch_now_us() < end_us;)
            orch_loop_step(loop, 0);
        CHECK(!t.failed, "%s", t.err.msg);
        end(&t);
    }
    wait_session(l, 1);
    /* The launcher's end is everything's. */
    begin_up(&t, r);
    kill(l, SIGKILL);
    WAIT(t.failed);
    wait_session(l, 0);
    end(&t);
    close_launcher();
    orch_rules_free(r);
}

static int told; /* where the holder says its launcher's number */

static void hold(void)
{
    struct net t[2];
    struct orch_rules *r = rules_with(4, 0);
    open_launcher();
    pid_t l = orch_launcher_pid(la);
    begin_up(&t[0], r);
    begin(&t[1], r, true); /* is killed while it comes up */
    CHECK(write(told, &l, sizeof l) == (ssize_t)sizeof l, "%m");
    orch_loop_run(loop);
}

/* A process that plays orch (fn), once it has said what pid there is to know. */
static pid_t start_holder(void (*fn)(void), pid_t *said)
{
    int p[2];
    CHECK(!pipe2(p, O_CLOEXEC), "%m");
    told = p[1];
    pid_t holder = fork();
    if (!holder)
        fn();
    close(p[1]);
    CHECK(read(p[0], said, sizeof *said) == (ssize_t)sizeof *said, "the holder failed");
    close(p[0]);
    return holder;
}

/* orch is killed: all of it ends. */
static void kill_case(void)
{
    for (int i = 0; i < 8; i++) {
        pid_t l, holder = start_holder(hold, &l);
        poll(NULL, 0, i * 2);
        CHECK(count_session(l) >= 4, "%d processes", count_session(l));
        kill(holder, SIGKILL);
        waitpid(holder, NULL, 0);
        wait_session(l, 0);
    }
}

struct held {
    pid_t launcher, init;
};

static void hold_wire(const int s[2])
{
    struct net t;
    struct orch_rules *r = rules_with(4, 0);
    open_launcher();
    begin(&t, r, true);
    WAIT(t.ready || t.failed);
    CHECK(!t.failed, "%s", t.err.msg);
    start_on(&t, s);
    wait_up(&t);
    struct held h = { orch_launcher_pid(la), find_init() };
    CHECK(write(told, &h, sizeof h) == (ssize_t)sizeof h, "%m");
    orch_loop_run(loop);
}

static void stop(pid_t pid)
{
    char state = 0;
    CHECK(!kill(pid, SIGSTOP), "%m");
    for (int64_t end_us = orch_now_us() + WAIT_US; state != 'T'; poll(NULL, 0, 1)) {
        char path[64], text[256] = "";
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0 && read(fd, text, sizeof text - 1) > 0 && orch_now_us() < end_us, "%s", path);
        close(fd);
        sscanf(strrchr(text, ')') + 1, " %c", &state);
    }
}

/* orch is killed and nothing else ends: launcher and init are stopped, so that guest, tap, pasta
 * and tables stay. Not a packet passes from then on, since nobody but orch had the socket. */
static void gone_case(void)
{
    enum { N = 20 };
    static char text[16384];
    struct orch_err err = { .code = 0 };
    struct held h;
    int p[2], s[2];
    char command[128], count[64];
    loop = orch_loop_new(&err);
    make_pair(s);
    CHECK(!pipe2(p, O_CLOEXEC), "%m");
    told = p[1];
    pid_t holder = fork();
    if (!holder)
        hold_wire(s);
    close(p[1]);
    close(s[1]);
    struct net t = { .guest = s[0] };
    CHECK(read(p[0], &h, sizeof h) == (ssize_t)sizeof h, "the holder failed");
    close(p[0]);
    struct frame f = udp_to("198.51.100.10", ECHO_PORT);
    echo_copies = 0;
    drain_capture();
    stop(h.launcher);
    stop(h.init);
    send_frame(&t, &f);
    int before = came_to(ECHO_PORT, 1);
    kill(holder, SIGKILL);
    waitpid(holder, NULL, 0);
    drain_capture();
    for (int i = 0; i < N; i++)
        send_frame(&t, &f);
    snprintf(command, sizeof command, ENTER "nft list ruleset", h.init, HOW);
    snprintf(count, sizeof count,
             "counter packets %d bytes %zu drop comment \"forward: orch is gone\"", N,
             N * (f.n - 14));
    int64_t end_us = orch_now_us() + WAIT_US;
    do
        read_text(command, text, sizeof text);
    while (!strstr(text, count) && orch_now_us() < end_us);
    int after = came_to(ECHO_PORT, 0);
    kill(h.init, SIGCONT);
    kill(h.launcher, SIGCONT);
    CHECK(before == 1, "an allowed packet did not arrive");
    CHECK(after == 0, "%d packets passed after orch's end", after);
    CHECK(strstr(text, count) && !strstr(text, "orch_alive"), "%s", text);
    wait_session(h.launcher, 0);
    close(s[0]);
    orch_loop_free(loop);
}

static void test_ends(void **state)
{
    (void)state;
    run_as_both(ends_case);
    run_as_both(kill_case);
}

static void hold_many(void)
{
    struct net t[6];
    struct orch_rules *r = rules_with(4, 0);
    open_launcher();
    for (size_t i = 0; i < ORCH_ARRAY_LEN(t); i++) {
        begin(&t[i], r, false);
        WAIT(t[i].ready || t[i].failed);
        CHECK(t[i].ready, "%s", t[i].err.msg);
    }
    pid_t l = orch_launcher_pid(la);
    CHECK(write(told, &l, sizeof l) == (ssize_t)sizeof l, "%m");
    orch_loop_run(loop);
}

/* The end of many filters takes the kernel longer than the launcher needs to hear of orch's; when
 * it gets a processor, which on a busy machine it does not each time. */
static void many_case(void)
{
    int64_t launcher_us, orch_us, end_us = orch_now_us() + WAIT_US;
    do {
        pid_t l, holder = start_holder(hold_many, &l);
        struct pollfd launcher_end = { pidfd_open(l, 0), POLLIN, 0 },
                      orch_end = { pidfd_open(holder, 0), POLLIN, 0 };
        int64_t t0 = orch_now_us();
        kill(holder, SIGKILL);
        CHECK(poll(&launcher_end, 1, WAIT_MS) == 1, "the launcher goes on");
        launcher_us = orch_now_us() - t0;
        CHECK(poll(&orch_end, 1, WAIT_MS) == 1, "orch goes on");
        orch_us = orch_now_us() - t0;
        waitpid(holder, NULL, 0);
        close(launcher_end.fd);
        close(orch_end.fd);
        wait_session(l, 0);
        CHECK(orch_now_us() < end_us, "the launcher ended after %lld us, orch after %lld",
              (long long)launcher_us, (long long)orch_us);
    } while (launcher_us >= orch_us / 2);
}

static void test_gone(void **state)
{
    (void)state;
    run_as_both(gone_case);
    run_as_both(many_case);
}

/* ---- the host is left as it was */

static void host_state(char *out, size_t n)
{
    read_text("nft list ruleset; ip rule; ip route show table all; ip -6 route show table all; ip "
              "-br link; "
              "sysctl -a 2>/dev/null | grep ^net | grep -v -e conntrack_count -e bytes_",
              out, n);
    CHECK(strlen(out) > 1000 && strlen(out) < n - 1, "%zu bytes", strlen(out));
}

static void test_untouched(void **state)
{
    (void)state;
    static char before[262144], during[262144], after[262144];
    struct net t[2];
    host_state(before, sizeof before);
    struct orch_rules *r = rules_with(4, 8000000);
    open_launcher();
    for (int i = 0; i < 2; i++)
        begin_up(&t[i], r);
    host_state(during, sizeof during);
    for (int i = 0; i < 2; i++)
        end(&t[i]);
    close_launcher();
    host_state(after, sizeof after);
    orch_rules_free(r);
    assert_string_equal(before, during);
    assert_string_equal(before, after);
}

/* ---- the played machine */

static void copy(const char *from, const char *to)
{
    cleanup_buf struct orch_buf b = { 0 };
    if (orch_read_file(AT_FDCWD, from, 64 << 20, &b) ||
        orch_write_file(AT_FDCWD, to, b.p, b.n, 0755)) {
        perror(from);
        exit(1);
    }
}

static pid_t world;

static int set_up(void **state)
{
    (void)state;
    char self[256], path[300], command[128];
    int ready[2];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n < 0 ? 0 : n] = 0;
    if (geteuid() || !mkdtemp(dir) || chmod(dir, 0755)) {
        fprintf(stderr, "test_netns: needs root and /tmp\n");
        return 1;
    }
    char *tests = dirname(self);
    snprintf(launcher, sizeof launcher, "%s/launcher", dir);
    snprintf(wire, sizeof wire, "%s/wire", dir);
    snprintf(path, sizeof path, "%s/../launcher", tests);
    copy(path, launcher);
    snprintf(path, sizeof path, "%s/wire", tests);
    copy(path, wire);
    snprintf(probe, sizeof probe, "%s/probe", dir);
    snprintf(path, sizeof path, "%s/probe", tests);
    copy(path, probe);

    if (unshare(CLONE_NEWNET | CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        pipe2(ready, O_CLOEXEC))
        return 1;
    /* For everyone, as udev makes it. */
    snprintf(path, sizeof path, "%s/tun", dir);
    umask(0);
    if (mknod(path, S_IFCHR | 0666, makedev(10, 200)) ||
        mount(path, "/dev/net/tun", NULL, MS_BIND, NULL))
        return 1;
    umask(022);
    world = fork();
    if (!world) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        if (!unshare(CLONE_NEWNET) && write(ready[1], "", 1) == 1)
            poll(NULL, 0, -1);
        _exit(1);
    }
    if (read(ready[0], command, 1) != 1)
        return 1;
    int here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    sh("ip link set lo up && ip link add h0 type veth peer name w0 && ip link add h1 type veth "
       "peer name h2");
    snprintf(command, sizeof command, "ip link set w0 netns %d", world);
    sh(command);
    sh("ip addr add " HOST
       "/24 dev h0 && ip addr add 203.0.113.77/32 dev h1 && ip link set h0 up && "
       "ip route add default via 203.0.113.1 && ip route add local 192.0.2.128/25 dev lo");
    snprintf(path, sizeof path, "/proc/%d/ns/net", world);
    int there = open(path, O_RDONLY | O_CLOEXEC);
    if (setns(there, CLONE_NEWNET))
        return 1;
    sh("ip link set lo up && ip addr add 203.0.113.1/24 dev w0 && ip addr add 198.51.100.10/24 dev "
       "w0 && ip link set w0 up && "
       "ip route add default via " HOST);
    capture = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL));
    echo_udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int tcp = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), room = 16 << 20;
    setsockopt(capture, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons(ECHO_PORT) },
                       web = { .sin_family = AF_INET, .sin_port = htons(80) };
    put_addr((uint8_t *)&sa.sin_addr, "198.51.100.10");
    if (bind(echo_udp, (const struct sockaddr *)&sa, sizeof sa) ||
        bind(tcp, (const struct sockaddr *)&web, sizeof web) || listen(tcp, 16) || capture < 0 ||
        setns(here, CLONE_NEWNET))
        return 1;
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    kill(world, SIGKILL);
    umount2("/dev/net/tun", MNT_DETACH);
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));)
        unlinkat(dirfd(d), e->d_name, 0);
    if (d)
        closedir(d);
    return rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_host),      cmocka_unit_test(test_verify),
        cmocka_unit_test(test_tamper),    cmocka_unit_test(test_delete),
        cmocka_unit_test(test_large),     cmocka_unit_test(test_listing),
        cmocka_unit_test(test_packets),   cmocka_unit_test(test_denied),
        cmocka_unit_test(test_rehost),    cmocka_unit_test(test_watch),
        cmocka_unit_test(test_full),      cmocka_unit_test(test_loopback),
        cmocka_unit_test(test_tap),       cmocka_unit_test(test_bandwidth),
        cmocka_unit_test(test_refusals),  cmocka_unit_test(test_read_only),
        cmocka_unit_test(test_ends),      cmocka_unit_test(test_gone),
        cmocka_unit_test(test_untouched),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
