/* core/net without a kernel: policies to rules, rules to netlink messages. The messages' bytes
 * are compared with tests/c/net_golden.hex; `test_net --golden >tests/c/net_golden.hex` writes
 * it anew. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_log.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#include "net/netlink.h"
#include "net/nflog.h"
#include "net/nft.h"
#include "net/ruleset.h"

static struct orch_cidr cidr(const char *text)
{
    struct orch_cidr c = { 0, 0 };
    struct orch_err err;
    if (orch_cidr_parse(text, &c, &err))
        fail_msg("%s", err.msg);
    return c;
}

static void test_cidr(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint32_t addr;
        unsigned bits;
    } good[] = {
        { "198.51.100.0/24", 0xc6336400, 24 },
        { "203.0.113.7", 0xcb007107, 32 },
        { "203.0.113.7/32", 0xcb007107, 32 },
        { "128.0.0.0/1", 0x80000000, 1 },
        { "0.0.0.0/8", 0, 8 },
        { "255.255.255.255", 0xffffffff, 32 },
        { "0.0.0.0", 0, 32 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(good); i++) {
        struct orch_cidr c = cidr(good[i].text);
        assert_int_equal(c.addr, good[i].addr);
        assert_int_equal(c.bits, good[i].bits);
    }
    static const struct {
        const char *text, *part;
    } bad[] = {
        { "", "not an IPv4" },
        { "1.2.3", "not an IPv4" },
        { "1.2.3.4.5", "not an IPv4" },
        { "1.2.3.256", "not an IPv4" },
        { "1.2.3.04", "not an IPv4" },
        { "1.2.3.4/33", "not an IPv4" },
        { "1.2.3.4/", "not an IPv4" },
        { "1.2.3.4/-1", "not an IPv4" },
        { " 1.2.3.4", "not an IPv4" },
        { "1.2.3.4 ", "not an IPv4" },
        { "0x1.2.3.4", "not an IPv4" },
        { "1.2.3.4/024", "not an IPv4" },
        { "::1/128", "not an IPv4" },
        { "1.2.3.99999999999", "not an IPv4" },
        { "1..3.4", "not an IPv4" },
        { "0.0.0.0/0", "every address" },
        { "1.2.3.4/0", "every address" },
        { "198.51.100.1/24", "write 198.51.100.0/24" },
        { "1.2.3.4/31", "" },
        { "1.2.3.5/31", "write 1.2.3.4/31" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++) {
        struct orch_cidr c;
        struct orch_err err = { .code = 0 };
        int e = orch_cidr_parse(bad[i].text, &c, &err);
        if (!*bad[i].part) {
            assert_int_equal(e, 0);
            continue;
        }
        if (e != -EINVAL || err.cls != ORCH_CLASS_CONFIG || !strstr(err.msg, bad[i].part))
            fail_msg("\"%s\": %d %s", bad[i].text, e, err.msg);
    }
    assert_true(orch_cidr_contains(cidr("10.0.0.0/8"), cidr("10.255.0.0/23")));
    assert_false(orch_cidr_contains(cidr("10.255.0.0/23"), cidr("10.0.0.0/8")));
    assert_false(orch_cidr_contains(cidr("10.0.0.0/8"), cidr("11.0.0.0/9")));
    assert_true(orch_cidr_contains(cidr("1.2.3.4"), cidr("1.2.3.4")));
}

static void test_ports(void **state)
{
    (void)state;
    struct orch_ports p;
    struct orch_err err = { .code = 0 };
    assert_int_equal(orch_ports_parse("443", &p, &err), 0);
    assert_true(p.first == 443 && p.last == 443);
    assert_int_equal(orch_ports_parse("8000-8010", &p, &err), 0);
    assert_true(p.first == 8000 && p.last == 8010);
    assert_int_equal(orch_ports_parse("1-65535", &p, &err), 0);
    static const char *const bad[] = {
        "",  "0",   "0-5", "65536", "1-65536", "-1",    "80-",
        "-", "80 ", "080", "http",  "1-2-3",   "90-80", "99999999999"
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++)
        if (orch_ports_parse(bad[i], &p, &err) != -EINVAL || err.cls != ORCH_CLASS_CONFIG)
            fail_msg("\"%s\" was taken", bad[i]);
    orch_ports_parse("90-80", &p, &err);
    assert_non_null(strstr(err.msg, "write 80-90"));
}

static void test_bandwidth(void **state)
{
    static const struct {
        const char *text;
        uint64_t bits;
    } good[] = { { "8kbit", 8000 }, { "10mbit", 10000000 }, { "100gbit", UINT64_C(100000000000) } };
    static const char *const bad[] = { "",        "10",      "7kbit",   "101gbit",
                                       "10 mbit", "10Mbit",  "1.5mbit", "-1mbit",
                                       "10mbits", "0x9mbit", "mbit",    "99999999999kbit" };
    (void)state;
    struct orch_err err = { .code = 0 };
    uint64_t bits;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(good); i++) {
        assert_int_equal(orch_bandwidth_parse(good[i].text, &bits, &err), 0);
        assert_int_equal(bits, good[i].bits);
    }
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++)
        if (orch_bandwidth_parse(bad[i], &bits, &err) != -EINVAL || err.cls != ORCH_CLASS_CONFIG)
            fail_msg("\"%s\" was taken", bad[i]);
}

/* ---- policies to rules */

static struct orch_rules *rules_of(const struct orch_policy *p)
{
    struct orch_err err = { .code = 0 };
    struct orch_rules *r = orch_rules_new(p, &err);
    if (!r)
        fail_msg("%s", err.msg);
    return r;
}

static const struct orch_rule *find_rule(const struct orch_rules *r, const char *label)
{
    for (size_t i = 0; i < r->n_rules; i++)
        if (!strcmp(r->rules[i].label, label))
            return &r->rules[i];
    return NULL;
}

static bool is_match(const struct orch_match *m, enum orch_match_kind kind)
{
    return m->kind == kind;
}

static bool has_match(const struct orch_rule *r, enum orch_match_kind kind)
{
    for (size_t i = 0; i < r->n_match; i++)
        if (is_match(&r->match[i], kind))
            return true;
    return false;
}

static const struct orch_ports web[] = { { 80, 80 }, { 443, 443 } },
                               web_again[] = { { 443, 443 }, { 80, 80 }, { 80, 80 } },
                               high[] = { { 8000, 8005 }, { 8006, 8010 }, { 8004, 8008 } },
                               dns[] = { { 53, 53 } };

static const struct orch_allow sample[] = {
    { { 0xc6336400, 24 }, IPPROTO_TCP, web, 2 },       /* 198.51.100.0/24 */
    { { 0xc6336500, 24 }, IPPROTO_TCP, web_again, 3 }, /* touches it, the same ports */
    { { 0xcb007100, 24 }, IPPROTO_TCP, web, 2 },
    { { 0xcb007107, 32 }, IPPROTO_TCP, web, 2 }, /* within the one before */
    { { 0x08080808, 32 }, IPPROTO_UDP, dns, 1 },
    { { 0xc6336400, 24 }, IPPROTO_TCP, high, 3 },
};
static const struct orch_cidr sample_permit[] = { { 0x0a010000, 16 }, { 0xc0a80105, 32 } },
                              sample_host[] = { { 0x7f000000, 8 },  { 0xc0a80105, 32 },
                                                { 0x0a010203, 32 }, { 0xcb007109, 32 },
                                                { 0xcb007109, 32 }, { 0xac110001, 32 } };
static const struct orch_policy sample_policy = {
    .allow = sample,
    .n_allow = 6,
    .connections = 64,
    .bandwidth_bits = 10000000,
    .permit = sample_permit,
    .n_permit = 2,
    .host = sample_host,
    .n_host = 6,
};

static void test_sets(void **state)
{
    (void)state;
    struct orch_rules *r = rules_of(&sample_policy);
    assert_int_equal(r->n_sets, 3);
    assert_int_equal(r->sets[0].n, 2); /* .100 and .101 are one, .113.7 is within .113 */
    assert_int_equal(r->sets[0].v[0].first, 0xc6336400);
    assert_int_equal(r->sets[0].v[0].last, 0xc63365ff);
    assert_int_equal(r->sets[0].v[1].first, 0xcb007100);
    assert_int_equal(r->sets[0].v[1].last, 0xcb0071ff);
    assert_int_equal(r->sets[1].n, 1);
    assert_int_equal(r->sets[2].n, 1);
    assert_non_null(find_rule(r, "allow: set 1 tcp 80"));
    assert_non_null(find_rule(r, "allow: set 1 tcp 443"));
    assert_non_null(find_rule(r, "allow: set 2 udp 53"));
    const struct orch_rule *range = find_rule(r, "allow: set 3 tcp 8000-8010");
    assert_non_null(range);
    assert_int_equal(range->match[1].a, 8000);
    assert_int_equal(range->match[1].b, 8010);
    assert_non_null(find_rule(r, "flow: more than 64 connections"));
    orch_rules_free(r);

    static const struct orch_allow top[] = { { { 0xffffff00, 24 }, IPPROTO_UDP, dns, 1 },
                                             { { 0xfffffe00, 24 }, IPPROTO_UDP, dns, 1 },
                                             { { 0, 8 }, IPPROTO_UDP, dns, 1 } };
    r = rules_of(&(struct orch_policy){ .allow = top, .n_allow = 3 });
    assert_int_equal(r->sets[0].n, 2);
    assert_int_equal(r->sets[0].v[1].last, UINT32_MAX);
    assert_null(find_rule(r, "flow: more than 0 connections"));
    orch_rules_free(r);
}

/* The rule that decides about a destination in a chain; NULL: none. */
static const char *judge_in(const struct orch_rules *r, enum orch_chain_id chain,
                            const uint8_t bytes[4])
{
    for (size_t i = 0; i < r->n_rules; i++) {
        const struct orch_rule *rule = &r->rules[i];
        bool hit = rule->chain == chain;
        for (size_t k = 0; hit && k < rule->n_match; k++)
            for (size_t b = 0; b < rule->match[k].len; b++)
                hit &= (bytes[b] & rule->match[k].mask[b]) == rule->match[k].value[b];
        const char *there = hit && rule->verdict == ORCH_VERDICT_JUMP
                                ? judge_in(r, rule->target, bytes)
                                : NULL;
        if (there || (hit && rule->verdict != ORCH_VERDICT_JUMP))
            return there ? there : rule->label;
    }
    return NULL;
}

/* What a packet's destination meets first in o_guest. */
static const char *judge(const struct orch_rules *r, const char *address)
{
    uint32_t be = htonl(cidr(address).addr);
    uint8_t bytes[4];
    memcpy(bytes, &be, 4);
    const char *label = judge_in(r, ORCH_CHAIN_GUEST, bytes);
    return label ? label : "none";
}

static void test_never(void **state)
{
    (void)state;
    static const struct {
        const char *address, *plain, *sample;
    } cases[] = {
        { "0.0.0.0", "never: 0.0.0.0/8 (this network)", NULL },
        { "10.0.0.1", "never: 10.0.0.0/8 (private)", NULL },
        { "10.1.2.4", "never: 10.0.0.0/8 (private)", "permitted: 10.1.0.0/16" },
        { "10.1.2.3", "never: 10.0.0.0/8 (private)", "never: 10.1.2.3 (host)" },
        { "10.255.0.1", "never: 10.0.0.0/8 (private)", NULL },
        { "100.64.0.1", "never: 100.64.0.0/10 (carrier-grade NAT)", NULL },
        { "100.127.255.255", "never: 100.64.0.0/10 (carrier-grade NAT)", NULL },
        { "100.128.0.0", "guest: to the policy", NULL },
        { "127.0.0.1", "never: 127.0.0.0/8 (loopback)", NULL },
        { "168.63.129.16", "never: 168.63.129.16 (metadata)", NULL },
        { "168.63.129.17", "guest: to the policy", NULL },
        { "169.254.169.254", "never: 169.254.0.0/16 (link-local and metadata)", NULL },
        { "172.15.255.255", "guest: to the policy", NULL },
        { "172.16.0.0", "never: 172.16.0.0/12 (private)", NULL },
        { "172.31.255.255", "never: 172.16.0.0/12 (private)", NULL },
        { "172.32.0.0", "guest: to the policy", NULL },
        { "192.0.0.192", "never: 192.0.0.192 (metadata)", NULL },
        { "192.168.1.4", "never: 192.168.0.0/16 (private)", NULL },
        { "192.168.1.5", "never: 192.168.0.0/16 (private)",
          "permitted: 192.168.1.5" }, /* named, though the host's */
        { "198.18.0.1", "never: 198.18.0.0/15 (benchmarks)", NULL },
        { "198.20.0.0", "guest: to the policy", NULL },
        { "198.51.100.1", "guest: to the policy", NULL },
        { "203.0.113.9", "guest: to the policy", "never: 203.0.113.9 (host)" },
        { "224.0.0.1", "never: 224.0.0.0/4 (multicast)", NULL },
        { "255.255.255.255", "never: 240.0.0.0/4 (reserved and broadcast)", NULL },
    };
    struct orch_rules *plain = rules_of(&(struct orch_policy){ .n_allow = 0 }),
                      *s = rules_of(&sample_policy);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        assert_string_equal(judge(plain, cases[i].address), cases[i].plain);
        assert_string_equal(judge(s, cases[i].address),
                            cases[i].sample ? cases[i].sample : cases[i].plain);
    }
    /* The host's address within a range that is denied anyway costs no rule, nor does one said
     * twice. */
    assert_null(find_rule(s, "never: 172.17.0.1 (host)"));
    orch_rules_free(plain);
    orch_rules_free(s);

    /* All of 10/8 permitted: the namespace's own addresses are not. */
    static const struct orch_cidr ten = { 0x0a000000, 8 };
    s = rules_of(&(struct orch_policy){ .permit = &ten, .n_permit = 1 });
    assert_string_equal(judge(s, "10.255.0.1"), "never: the namespace's own");
    assert_string_equal(judge(s, "10.255.1.1"), "never: the namespace's own");
    assert_string_equal(judge(s, "10.255.2.1"), "permitted: 10.0.0.0/8");
    orch_rules_free(s);
    /* What is public already needs no permission, and gets none past a host's address. */
    static const struct orch_cidr public = { 0xc6336400, 24 };
    s = rules_of(&(struct orch_policy){ .permit = &public, .n_permit = 1 });
    assert_string_equal(judge(s, "198.51.100.1"), "guest: to the policy");
    orch_rules_free(s);
}

static size_t pick(uint32_t *seed, size_t n)
{
    return ((*seed = *seed * 1664525 + 1013904223) >> 16) % n;
}

/* What explain says of an address is what the filter does, whatever is permitted and the host's. */
static void test_explain(void **state)
{
    (void)state;
    static const char *const near[] = { "10.0.0.0/8",      "10.1.0.0/16",   "10.1.2.3",
                                        "10.255.0.0/23",   "10.255.1.1",    "127.0.0.0/8",
                                        "127.0.0.1",       "192.168.1.5",   "192.168.0.0/16",
                                        "198.51.100.0/24", "198.51.100.1",  "203.0.113.9",
                                        "169.254.169.254", "172.16.0.0/12", "8.8.8.8" };
    static const struct orch_ports all[] = { { 1, 65535 } };
    static const struct orch_allow allow[] = { { { 0, 1 }, IPPROTO_TCP, all, 1 },
                                               { { 0x80000000, 1 }, IPPROTO_TCP, all, 1 } };
    uint32_t seed = 1;
    for (unsigned round = 0; round < 1000; round++) {
        struct orch_cidr permit[3], host[3];
        struct orch_policy p = { .allow = allow, .n_allow = 2, .permit = permit, .host = host };
        p.n_permit = pick(&seed, 4);
        p.n_host = pick(&seed, 4);
        for (size_t i = 0; i < p.n_permit; i++)
            permit[i] = cidr(near[pick(&seed, ORCH_ARRAY_LEN(near))]);
        for (size_t i = 0; i < p.n_host; i++) { /* an address, or a network that is its link's */
            host[i] = cidr(near[pick(&seed, ORCH_ARRAY_LEN(near))]);
            if (pick(&seed, 2))
                host[i].bits = 32;
        }
        struct orch_rules *r = rules_of(&p);
        for (size_t i = 0; i < ORCH_ARRAY_LEN(near); i++) {
            char text[ORCH_CIDR_TEXT], why[128];
            uint32_t to = cidr(near[i]).addr + (uint32_t)pick(&seed, 2);
            orch_cidr_text((struct orch_cidr){ to, 32 }, text);
            bool allowed = orch_policy_explain(&p, to, IPPROTO_TCP, 80, why, sizeof why);
            const char *label = judge(r, text);
            if (allowed == (strncmp(label, "never: ", 7) == 0))
                fail_msg("round %u, %s: explain says %s, the filter %s", round, text, why, label);
        }
        orch_rules_free(r);
    }
}

static bool is_denied_chain(enum orch_chain_id c)
{
    return c == ORCH_CHAIN_TAP_DENIED || c == ORCH_CHAIN_DENIED;
}

/* Whatever its limit lets through to the log, all of it is dropped. */
static void check_denied(const struct orch_rules *r, enum orch_chain_id chain)
{
    const struct orch_rule *v = r->rules;
    size_t i = 0, n = 0;
    while (v[i].chain != chain)
        i++;
    while (i + n < r->n_rules && v[i + n].chain == chain)
        n++;
    assert_int_equal(n, 2);
    assert_true(v[i].verdict == ORCH_VERDICT_LOG && v[i].n_match == 1 &&
                is_match(&v[i].match[0], ORCH_MATCH_RATE));
    assert_true(v[i + 1].verdict == ORCH_VERDICT_DROP && !v[i + 1].n_match);
}

/* What the header promises of every filter. */
static void check_structure(const struct orch_rules *r)
{
    bool last_drops[ORCH_CHAINS] = { false };
    for (size_t i = 0; i < r->n_rules; i++) {
        const struct orch_rule *rule = &r->rules[i];
        if (i)
            assert_true(rule->chain >= r->rules[i - 1].chain);
        for (size_t k = 0; k < i; k++)
            assert_string_not_equal(rule->label, r->rules[k].label);
        last_drops[rule->chain] = (rule->verdict == ORCH_VERDICT_DROP ||
                                   rule->verdict == ORCH_VERDICT_DENY) &&
                                  !rule->n_match;
        /* Rules that drop without a word: there is no listener, nothing of the guest's, nothing. */
        if (rule->verdict == ORCH_VERDICT_DROP && !is_denied_chain(rule->chain))
            assert_true(!strcmp(rule->label, "forward: orch is gone") ||
                        !strcmp(rule->label, "output: IPv6") || !strcmp(rule->label, "nat: rest"));
        if (rule->verdict == ORCH_VERDICT_DENY) {
            assert_true(is_denied_chain(rule->target) && !is_denied_chain(rule->chain));
            assert_string_equal(orch_chain_family(rule->target), orch_chain_family(rule->chain));
            assert_string_equal(orch_rules_marked(r, ORCH_MARK_RULE + (uint32_t)i), rule->label);
        }
        bool own = rule->chain == ORCH_CHAIN_GUEST || rule->chain == ORCH_CHAIN_ALLOW ||
                   rule->chain == ORCH_CHAIN_FLOW || rule->chain == ORCH_CHAIN_HOST;
        /* The only way into the last chain is the first thing that a packet of the guest's
         * meets. */
        if (rule->verdict == ORCH_VERDICT_JUMP)
            assert_true(rule->target == ORCH_CHAIN_HOST && rule->chain == ORCH_CHAIN_GUEST &&
                        !rule->n_match && rule[-1].chain != ORCH_CHAIN_GUEST);
        if (rule->chain == ORCH_CHAIN_HOST)
            assert_true(rule->verdict == ORCH_VERDICT_DENY && rule->n_match == 1);
        bool proto = false, ipv4 = own || rule->chain == ORCH_CHAIN_TAP;
        for (size_t k = 0; k < rule->n_match; k++) {
            const struct orch_match *m = &rule->match[k];
            proto |= m->kind == ORCH_MATCH_PROTO;
            ipv4 |= m->kind == ORCH_MATCH_IPV4;
            if (m->kind == ORCH_MATCH_PORTS ||
                (m->kind == ORCH_MATCH_BYTES && m->base == ORCH_HEADER_TRANSPORT))
                assert_true(proto);
            if (m->kind == ORCH_MATCH_SET ||
                (m->kind == ORCH_MATCH_BYTES && m->base == ORCH_HEADER_NET))
                assert_true(ipv4);
        }
        /* Only IPv4 gets into the chains that do not ask for it. */
        if (rule->verdict == ORCH_VERDICT_GOTO && !own)
            assert_true(ipv4);
        if (rule->verdict == ORCH_VERDICT_GOTO)
            assert_true(rule->target > rule->chain);
        if (rule->verdict == ORCH_VERDICT_ACCEPT)
            assert_true(rule->n_match > 0);
    }
    check_denied(r, ORCH_CHAIN_TAP_DENIED);
    check_denied(r, ORCH_CHAIN_DENIED);
    assert_null(orch_rules_marked(r, 0));
    assert_null(orch_rules_marked(r, ORCH_MARK_ALIVE));
    assert_null(orch_rules_marked(r, ORCH_MARK_RULE + (uint32_t)r->n_rules));
    for (int c = 0; c < ORCH_CHAINS; c++)
        /* One decides nothing, one ends in a goto to one that does, one goes back to that. */
        if (c != ORCH_CHAIN_ALIVE && c != ORCH_CHAIN_GUEST && c != ORCH_CHAIN_HOST)
            assert_true(last_drops[c]);
    const struct orch_rule *out = find_rule(r, "guest: to the policy");
    assert_true(out && !out->n_match && out->verdict == ORCH_VERDICT_GOTO &&
                out[1].chain != ORCH_CHAIN_GUEST);
    /* Nothing is forwarded but what the chain that goes with orch has marked. */
    const struct orch_rule *alive = find_rule(r, "alive: orch"),
                           *gone = find_rule(r, "forward: orch is gone");
    assert_true(alive && alive->chain == ORCH_CHAIN_ALIVE && !alive->n_match &&
                alive->verdict == ORCH_VERDICT_MARK);
    assert_true(gone && gone->chain == ORCH_CHAIN_FORWARD && gone[-1].chain != ORCH_CHAIN_FORWARD &&
                gone->verdict == ORCH_VERDICT_DROP && gone->n_match == 1 &&
                is_match(&gone->match[0], ORCH_MATCH_UNMARKED) &&
                gone->match[0].a == ORCH_MARK_ALIVE);
    const struct orch_rule *tap = find_rule(r, "tap: IPv4 of the guest");
    assert_true(tap && tap->n_match == 4 && tap[-1].verdict == ORCH_VERDICT_ACCEPT);
    assert_true(has_match(find_rule(r, "forward: replies"), ORCH_MATCH_CT));
}

static void test_structure(void **state)
{
    (void)state;
    struct orch_rules *r = rules_of(&sample_policy);
    check_structure(r);
    orch_rules_free(r);
    r = rules_of(&(struct orch_policy){ .n_allow = 0 });
    check_structure(r);
    for (size_t i = 0; i < r->n_rules; i++)
        assert_true(r->rules[i].chain != ORCH_CHAIN_ALLOW ||
                    r->rules[i].verdict == ORCH_VERDICT_DENY);
    orch_rules_free(r);
}

/* Another host's addresses make the same rules as a policy compiled there. */
static void test_rehost(void **state)
{
    (void)state;
    static const struct orch_cidr other[] = {
        { 0x7f000000, 8 }, { 0xc0a80105, 32 }, { 0xc6336407, 32 }, { 0xc6336407, 32 }
    };
    static struct orch_cidr many[ORCH_RULES_MAX];
    struct orch_err err = { .code = 0 };
    struct orch_policy p = sample_policy;
    struct orch_rules *old = rules_of(&p), *now, *want;
    assert_true(orch_rules_has_host(old, sample_host, 6));
    assert_false(orch_rules_has_host(old, sample_host, 5));
    assert_false(orch_rules_has_host(old, other, 4));
    for (size_t n = 0; n <= 4; n += 4) {
        cleanup_buf struct orch_buf a = { 0 }, b = { 0 };
        now = orch_rules_rehost(old, other, n, &err);
        assert_non_null(now);
        assert_true(orch_rules_has_host(now, other, n));
        p.host = other;
        p.n_host = n;
        want = rules_of(&p);
        assert_int_equal(orch_nft_batch(now, 7, true, &a, &err), 0);
        assert_int_equal(orch_nft_batch(want, 7, true, &b, &err), 0);
        assert_true(a.n == b.n && !memcmp(a.p, b.p, a.n));
        check_structure(now);
        assert_string_equal(judge(now, "198.51.100.7"),
                            n ? "never: 198.51.100.7 (host)" : "guest: to the policy");
        assert_string_equal(judge(now, "203.0.113.9"), "guest: to the policy");
        assert_string_equal(judge(now, "192.168.1.5"), "permitted: 192.168.1.5");
        orch_rules_free(want);
        orch_rules_free(now);
    }
    for (size_t i = 0; i < ORCH_RULES_MAX; i++)
        many[i] = (struct orch_cidr){ 0x08000000 + (uint32_t)i, 32 };
    assert_null(orch_rules_rehost(old, many, ORCH_RULES_MAX, &err));
    assert_non_null(strstr(err.msg, "this host's addresses need"));
    orch_rules_free(old);
}

static void refused(const struct orch_policy *p, const char *part)
{
    struct orch_err err = { .code = 0 };
    assert_null(orch_rules_new(p, &err));
    if (err.cls != ORCH_CLASS_CONFIG || !strstr(err.msg, part))
        fail_msg("no `%s` in: %s", part, err.msg);
}

static void test_bad(void **state)
{
    (void)state;
    static const struct orch_ports zero[] = { { 0, 5 } }, back[] = { { 9, 5 } };
    static struct orch_ports many[ORCH_PORTS_MAX + 1];
    const struct orch_allow bad[] = {
        { { 0, 0 }, IPPROTO_TCP, web, 2 },
        { { 0xc6336401, 24 }, IPPROTO_TCP, web, 2 },
        { { 0xc6336400, 33 }, IPPROTO_TCP, web, 2 },
        { { 0xc6336400, 24 }, IPPROTO_ICMP, web, 2 },
        { { 0xc6336400, 24 }, IPPROTO_TCP, web, 0 },
        { { 0xc6336400, 24 }, IPPROTO_TCP, many, ORCH_PORTS_MAX + 1 },
        { { 0xc6336400, 24 }, IPPROTO_TCP, zero, 1 },
        { { 0xc6336400, 24 }, IPPROTO_TCP, back, 1 },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++) {
        struct orch_allow two[] = { sample[0], bad[i] };
        refused(&(struct orch_policy){ .allow = two, .n_allow = 2 }, "allow entry 2: ");
    }
    static struct orch_allow flood[ORCH_ALLOW_MAX + 1];
    static struct orch_ports one[ORCH_ALLOW_MAX + 1];
    for (size_t i = 0; i <= ORCH_ALLOW_MAX; i++) {
        one[i] = (struct orch_ports){ (uint16_t)(i + 1), (uint16_t)(i + 1) };
        flood[i] = (struct orch_allow){
            { 0xc6336400 + (uint32_t)i * 2, 32 }, IPPROTO_TCP, &one[i], 1
        };
    }
    refused(&(struct orch_policy){ .allow = flood, .n_allow = ORCH_ALLOW_MAX + 1 },
            "more than 1024");
    refused(&(struct orch_policy){ .allow = flood, .n_allow = ORCH_ALLOW_MAX },
            "use fewer different port lists");
    static const struct orch_cidr all = { 0, 0 };
    refused(&(struct orch_policy){ .permit = &all, .n_permit = 1 }, "permit_private entry 1");
    /* As many as fit: one port list, all networks apart. */
    for (size_t i = 0; i < ORCH_ALLOW_MAX; i++)
        flood[i].ports = web;
    struct orch_rules *r = rules_of(
        &(struct orch_policy){ .allow = flood, .n_allow = ORCH_ALLOW_MAX });
    assert_int_equal(r->sets[0].n, ORCH_ALLOW_MAX);
    orch_rules_free(r);
}

/* ---- rules to bytes */

static void make_batch(const struct orch_policy *p, struct orch_buf *out)
{
    struct orch_err err = { .code = 0 };
    struct orch_rules *r = rules_of(p);
    if (orch_nft_batch(r, 7, true, out, &err))
        fail_msg("%s", err.msg);
    orch_rules_free(r);
}

/* A line a message: type and flags readable, then all bytes. */
static void show_batch(const struct orch_buf *b, struct orch_buf *out)
{
    int left = (int)b->n;
    for (const struct nlmsghdr *h = (const void *)b->p; NLMSG_OK(h, left);
         h = NLMSG_NEXT(h, left)) {
        orch_buf_printf(out, "%04x ", h->nlmsg_type);
        orch_buf_hex(out, h, h->nlmsg_len);
        orch_buf_char(out, '\n');
    }
    orch_buf_printf(out, "%d bytes left\n", left);
}

static void make_golden(struct orch_buf *out)
{
    const struct orch_policy policies[] = { { .n_allow = 0 }, sample_policy };
    for (size_t i = 0; i < 2; i++) {
        cleanup_buf struct orch_buf b = { 0 };
        make_batch(&policies[i], &b);
        show_batch(&b, out);
    }
}

static char golden_path[300];

static void test_golden(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf want = { 0 }, got = { 0 };
    make_golden(&got);
    assert_int_equal(orch_read_file(AT_FDCWD, golden_path, 1 << 20, &want), 0);
    size_t line = 1;
    for (size_t i = 0; i < want.n && i < got.n; i++) {
        if (want.p[i] != got.p[i])
            fail_msg("%s:%zu differs", golden_path, line);
        line += want.p[i] == '\n';
    }
    assert_int_equal(got.n, want.n);
}

static void test_batch(void **state)
{
    (void)state;
    cleanup_buf struct orch_buf b = { 0 };
    make_batch(&sample_policy, &b);
    int left = (int)b.n, n = 0, acks = 0, counts[64] = { 0 };
    const struct nlmsghdr *last = NULL;
    uint32_t genid = 0;
    for (const struct nlmsghdr *h = (const void *)b.p; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
        if (!n++) {
            assert_int_equal(h->nlmsg_type, NFNL_MSG_BATCH_BEGIN);
            const uint32_t *id = orch_nl_get(h, sizeof(struct nfgenmsg), NFNL_BATCH_GENID, 4);
            assert_non_null(id);
            genid = ntohl(*id);
        }
        if (h->nlmsg_type >> 8 == NFNL_SUBSYS_NFTABLES)
            counts[h->nlmsg_type & 63]++;
        if (h->nlmsg_flags & NLM_F_ACK) {
            acks++;
            assert_int_equal(h->nlmsg_type & 0xff, NFT_MSG_NEWRULE);
        }
        last = h;
    }
    assert_int_equal(left, 0);
    assert_int_equal(genid, 7);
    assert_int_equal(last->nlmsg_type, NFNL_MSG_BATCH_END);
    assert_int_equal(acks, 1);
    struct orch_rules *r = rules_of(&sample_policy);
    assert_int_equal(counts[NFT_MSG_NEWTABLE], 3);
    assert_int_equal(counts[NFT_MSG_NEWCHAIN], ORCH_CHAINS);
    assert_int_equal(counts[NFT_MSG_NEWSET], r->n_sets);
    assert_int_equal(counts[NFT_MSG_NEWSETELEM], r->n_sets);
    assert_int_equal(counts[NFT_MSG_NEWRULE], r->n_rules);
    orch_rules_free(r);
}

/* ---- what the kernel says */

static void test_fault(void **state)
{
    (void)state;
    char text[256];
    struct orch_nl_fault f = { .code = ENOENT };
    assert_string_equal(orch_nl_fault_text(&f, text), "No such file or directory");
    f.offset = 32;
    assert_string_equal(orch_nl_fault_text(&f, text),
                        "No such file or directory (attribute at byte 32)");
    snprintf(f.text, sizeof f.text, "Chain type not found");
    assert_string_equal(orch_nl_fault_text(&f, text),
                        "No such file or directory (Chain type not found, attribute at byte 32)");
    /* Attributes that lie about their length are none. */
    uint32_t raw[8] = { 0 };
    struct nlmsghdr *h = (void *)raw;
    struct nlattr *a = NLMSG_DATA(h);
    h->nlmsg_len = NLMSG_LENGTH(8);
    *a = (struct nlattr){ 8, 1 };
    assert_non_null(orch_nl_get(h, 0, 1, 4));
    assert_null(orch_nl_get(h, 0, 1, 5));
    assert_null(orch_nl_get(h, 0, 2, 4));
    a->nla_len = 200;
    assert_null(orch_nl_get(h, 0, 1, 4));
    a->nla_len = 2;
    assert_null(orch_nl_get(h, 0, 1, 0));
    assert_null(orch_nl_get(h, 64, 1, 0));
}

/* ---- what the filter denied */

static void put_logged(struct orch_buf *b, uint16_t type, uint32_t mark, const void *packet,
                       size_t n)
{
    struct nfgenmsg head = { .nfgen_family = AF_INET };
    struct nfulnl_msg_packet_hdr hdr = { .hw_protocol = htons(type) };
    mark = htonl(mark);
    b->n = 0;
    size_t m = orch_nl_begin(b, NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET, 0, 0, &head,
                             sizeof head);
    orch_nl_put(b, NFULA_PACKET_HDR, &hdr, sizeof hdr);
    orch_nl_put(b, NFULA_MARK, &mark, sizeof mark);
    orch_nl_put(b, NFULA_PAYLOAD, packet, n);
    orch_nl_end(b, m);
}

static void test_denied(void **state)
{
    (void)state;
    /* 10.255.0.2 to 198.51.100.10, UDP 40000 to 5300, behind 4 bytes of options */
    static const uint8_t packet[] = { 0x46, 0,  0,    40,   0,    0,    0x40, 0,   64, 17, 0,
                                      0,    10, 255,  0,    2,    198,  51,   100, 10, 1,  1,
                                      1,    0,  0x9c, 0x40, 0x14, 0xb4, 0,    16,  0,  0 };
    cleanup_buf struct orch_buf b = { 0 };
    struct orch_denied d;
    /* As much as there is of it. */
    for (size_t n = 0; n <= sizeof packet; n++) {
        put_logged(&b, ETHERTYPE_IP, 9, packet, n);
        assert_true(orch_denied_parse((const void *)b.p, &d));
        assert_true(d.mark == 9 && d.type == ETHERTYPE_IP);
        assert_int_equal(d.has_ip, n >= 20);
        assert_int_equal(d.has_port, n >= 28);
        if (d.has_ip)
            assert_true(d.dst == 0xc633640a && d.proto == IPPROTO_UDP);
        if (d.has_port)
            assert_int_equal(d.port, 5300);
    }
    /* What says something else of itself. */
    static const struct {
        unsigned at;
        uint8_t value;
        bool ip, port;
    } bent[] = {
        { 0, 0x66, false, false }, /* version 6 */
        { 0, 0x44, false, false }, /* a header of 16 bytes */
        { 0, 0x4f, true, false },  /* of 60, which are not there */
        { 6, 0x20, true, true },   /* a first fragment */
        { 7, 1, true, false },     /* a later one */
        { 9, IPPROTO_ICMP, true, false },
        { 9, IPPROTO_TCP, true, true },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bent); i++) {
        uint8_t copy[sizeof packet];
        memcpy(copy, packet, sizeof copy);
        copy[bent[i].at] = bent[i].value;
        put_logged(&b, ETHERTYPE_IP, 9, copy, sizeof copy);
        assert_true(orch_denied_parse((const void *)b.p, &d));
        assert_int_equal(d.has_ip, bent[i].ip);
        assert_int_equal(d.has_port, bent[i].port);
    }
    put_logged(&b, ETHERTYPE_ARP, 9, packet, sizeof packet);
    assert_true(orch_denied_parse((const void *)b.p, &d) && !d.has_ip && d.type == ETHERTYPE_ARP);
    /* Every message that is cut short, and every byte of one that is not what it was: no more is
     * read than is there, which the sanitizer sees. */
    put_logged(&b, ETHERTYPE_IP, 9, packet, sizeof packet);
    for (size_t n = NLMSG_HDRLEN; n < b.n; n++) {
        struct nlmsghdr *cut = orch_xmalloc(n);
        memcpy(cut, b.p, n);
        cut->nlmsg_len = (uint32_t)n;
        orch_denied_parse(cut, &d);
        free(cut);
    }
    for (size_t at = NLMSG_HDRLEN; at < b.n; at++)
        for (unsigned v = 0; v < 256; v++) {
            struct nlmsghdr *bad = orch_xmalloc(b.n);
            memcpy(bad, b.p, b.n);
            ((uint8_t *)bad)[at] = (uint8_t)v;
            orch_denied_parse(bad, &d);
            free(bad);
        }
    ((struct nlmsghdr *)(void *)b.p)->nlmsg_type = NFNL_SUBSYS_NFTABLES << 8;
    assert_false(orch_denied_parse((const void *)b.p, &d));
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--golden")) {
        cleanup_buf struct orch_buf b = { 0 };
        make_golden(&b);
        return orch_write_all(1, b.p, b.n) ? 1 : 0;
    }
    snprintf(golden_path, sizeof golden_path, "%s/../../../tests/c/net_golden.hex",
             dirname(argv[0]));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cidr),      cmocka_unit_test(test_ports),
        cmocka_unit_test(test_bandwidth), cmocka_unit_test(test_sets),
        cmocka_unit_test(test_never),     cmocka_unit_test(test_explain),
        cmocka_unit_test(test_structure), cmocka_unit_test(test_rehost),
        cmocka_unit_test(test_bad),       cmocka_unit_test(test_golden),
        cmocka_unit_test(test_batch),     cmocka_unit_test(test_fault),
        cmocka_unit_test(test_denied),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
