#include "ruleset.h"

#include "../launch/wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#define IP(a, b, c, d) \
    ((uint32_t)(a) << 24 | (uint32_t)(b) << 16 | (uint32_t)(c) << 8 | (uint32_t)(d))

static const struct {
    struct orch_cidr cidr;
    const char *what;
} never[] = {
    { { IP(0, 0, 0, 0), 8 }, "this network" },
    { { IP(10, 0, 0, 0), 8 }, "private" },
    { { IP(100, 64, 0, 0), 10 }, "carrier-grade NAT" },
    { { IP(127, 0, 0, 0), 8 }, "loopback" },
    { { IP(168, 63, 129, 16), 32 }, "metadata" }, /* Azure */
    { { IP(169, 254, 0, 0), 16 }, "link-local and metadata" },
    { { IP(172, 16, 0, 0), 12 }, "private" },
    { { IP(192, 0, 0, 192), 32 }, "metadata" }, /* Oracle */
    { { IP(192, 168, 0, 0), 16 }, "private" },
    { { IP(198, 18, 0, 0), 15 }, "benchmarks" },
    { { IP(224, 0, 0, 0), 4 }, "multicast" },
    { { IP(240, 0, 0, 0), 4 }, "reserved and broadcast" },
};
const char *const orch_chain_names[ORCH_CHAINS] = {
    [ORCH_CHAIN_ALIVE] = "o_alive",
    [ORCH_CHAIN_TAP] = "o_tap",
    [ORCH_CHAIN_TAP_DENIED] = "o_tap_denied",
    [ORCH_CHAIN_FORWARD] = "o_forward",
    [ORCH_CHAIN_INPUT] = "o_input",
    [ORCH_CHAIN_OUTPUT] = "o_output",
    [ORCH_CHAIN_NAT] = "o_nat",
    [ORCH_CHAIN_GUEST] = "o_guest",
    [ORCH_CHAIN_ALLOW] = "o_allow",
    [ORCH_CHAIN_FLOW] = "o_flow",
    [ORCH_CHAIN_DENIED] = "o_denied",
    [ORCH_CHAIN_HOST] = "o_host",
};
const char *const orch_verdict_names[ORCH_VERDICTS] = {
    [ORCH_VERDICT_DROP] = "drop",
    [ORCH_VERDICT_ACCEPT] = "accept",
    [ORCH_VERDICT_GOTO] = "goto",
    [ORCH_VERDICT_JUMP] = "jump",
    [ORCH_VERDICT_MASQUERADE] = "masquerade",
    [ORCH_VERDICT_MARK] = "mark",
    [ORCH_VERDICT_DENY] = "deny",
    [ORCH_VERDICT_LOG] = "log",
};

const char *orch_chain_family(enum orch_chain_id chain)
{
    return chain == ORCH_CHAIN_TAP || chain == ORCH_CHAIN_TAP_DENIED ? "netdev" : "inet";
}

/* The namespace's own addresses, whatever permit_private says of 10/8. */
static const struct orch_cidr internal = { IP(10, 255, 0, 0), 23 };

/* ---- addresses and ports */

static uint32_t mask_of(unsigned bits)
{
    return bits ? ~UINT32_C(0) << (32 - bits) : 0;
}

static uint32_t last_of(struct orch_cidr c)
{
    return c.addr | ~mask_of(c.bits);
}

bool orch_cidr_contains(struct orch_cidr outer, struct orch_cidr inner)
{
    return inner.bits >= outer.bits && (inner.addr & mask_of(outer.bits)) == outer.addr;
}

static bool overlaps(struct orch_cidr a, struct orch_cidr b)
{
    return orch_cidr_contains(a, b) || orch_cidr_contains(b, a);
}

void orch_cidr_text(struct orch_cidr c, char out[ORCH_CIDR_TEXT])
{
    int n = snprintf(out, ORCH_CIDR_TEXT, "%u.%u.%u.%u", c.addr >> 24, c.addr >> 16 & 255,
                     c.addr >> 8 & 255, c.addr & 255);
    if (c.bits != 32)
        snprintf(out + n, (size_t)(ORCH_CIDR_TEXT - n), "/%u", c.bits);
}

/* Decimal digits alone, no sign, no leading zero. The text behind them, or NULL. */
static const char *parse_number(const char *s, uint32_t max, uint32_t *out)
{
    uint32_t v = 0;
    if (*s < '0' || *s > '9' || (*s == '0' && s[1] >= '0' && s[1] <= '9'))
        return NULL;
    for (; *s >= '0' && *s <= '9'; s++) {
        v = v * 10 + (uint32_t)(*s - '0');
        if (v > max)
            return NULL;
    }
    *out = v;
    return s;
}

int orch_cidr_parse(const char *text, struct orch_cidr *out, struct orch_err *err)
{
    uint32_t addr = 0, part, bits = 32;
    const char *s = text;
    for (int i = 0; s && i < 4; i++) {
        s = parse_number(s, 255, &part);
        addr = addr << 8 | part;
        if (s && i < 3)
            s = *s == '.' ? s + 1 : NULL;
    }
    if (s && *s == '/')
        s = parse_number(s + 1, 32, &bits);
    if (!s || *s)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                             "\"%s\" is not an IPv4 network; write it as 198.51.100.0/24", text);
    struct orch_cidr c = { addr, bits };
    if (!bits)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                             "\"%s\" is every address; name the networks", text);
    if (addr & ~mask_of(bits)) {
        char fixed[ORCH_CIDR_TEXT];
        c.addr &= mask_of(bits);
        orch_cidr_text(c, fixed);
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                             "\"%s\" has bits set behind its prefix; write %s for the network",
                             text, fixed);
    }
    *out = c;
    return 0;
}

int orch_ports_parse(const char *text, struct orch_ports *out, struct orch_err *err)
{
    uint32_t first = 0, last = 0;
    const char *s = parse_number(text, UINT16_MAX, &first);
    last = first;
    if (s && *s == '-')
        s = parse_number(s + 1, UINT16_MAX, &last);
    if (!s || *s || !first)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                             "\"%s\" is not a port (1 to 65535) or a range as 8000-8010", text);
    if (last < first)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "\"%s\" runs backwards; write %u-%u",
                             text, last, first);
    *out = (struct orch_ports){ (uint16_t)first, (uint16_t)last };
    return 0;
}

int orch_bandwidth_parse(const char *text, uint64_t *bits, struct orch_err *err)
{
    static const struct {
        const char *name;
        uint32_t factor;
    } units[] = { { "kbit", 1000 }, { "mbit", 1000000 }, { "gbit", 1000000000 } };
    uint32_t n = 0;
    const char *unit = parse_number(text, 1000000000, &n);
    for (size_t i = 0; unit && i < ORCH_ARRAY_LEN(units); i++)
        if (strcmp(unit, units[i].name) == 0) {
            *bits = (uint64_t)n * units[i].factor;
            if (*bits >= 8000 && *bits <= 100000000000)
                return 0;
        }
    return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                         "must be like \"10mbit\" (8kbit to 100gbit), got \"%s\"", text);
}

static int by_first(const void *a, const void *b)
{
    uint32_t x = ((const struct orch_interval *)a)->first,
             y = ((const struct orch_interval *)b)->first;
    return (x > y) - (x < y);
}

/* Sorts and merges what overlaps or touches; the new count. */
static size_t merge(struct orch_interval *v, size_t n)
{
    size_t out = 0;
    qsort(v, n, sizeof *v, by_first);
    for (size_t i = 0; i < n; i++) {
        if (out && v[i].first <= v[out - 1].last + (v[out - 1].last != UINT32_MAX)) {
            if (v[i].last > v[out - 1].last)
                v[out - 1].last = v[i].last;
        } else {
            v[out++] = v[i];
        }
    }
    return out;
}

/* ---- matches */

static struct orch_match *add_match(struct orch_rule *r, enum orch_match_kind kind)
{
    struct orch_match *m = &r->match[r->n_match++];
    m->kind = kind;
    return m;
}

static void match_if(struct orch_rule *r, enum orch_match_kind kind, const char *name)
{
    add_match(r, kind)->name = name;
}

static void match_num(struct orch_rule *r, enum orch_match_kind kind, uint32_t a, uint32_t b)
{
    struct orch_match *m = add_match(r, kind);
    m->a = a;
    m->b = b;
}

static struct orch_match *match_bytes(struct orch_rule *r, enum orch_header base, unsigned offset,
                                      const void *value, size_t len)
{
    struct orch_match *m = add_match(r, ORCH_MATCH_BYTES);
    m->base = base;
    m->offset = (uint8_t)offset;
    m->len = (uint8_t)len;
    memcpy(m->value, value, len);
    memset(m->mask, 0xff, len);
    return m;
}

static void match_to(struct orch_rule *r, struct orch_cidr c)
{
    uint32_t addr = htonl(c.addr), mask = htonl(mask_of(c.bits));
    struct orch_match *m = match_bytes(r, ORCH_HEADER_NET, 16, &addr, (c.bits + 7) / 8);
    memcpy(m->mask, &mask, m->len);
}

/* ---- rules */

static struct orch_rule *add_rule(struct orch_rules *r, enum orch_chain_id chain,
                                  enum orch_verdict verdict, const char *fmt, ...)
    ORCH_PRINTF(4, 5);
/* Never NULL: rules above the maximum are counted and all written to the last place; orch_rules_new
 * then refuses. */
static struct orch_rule *add_rule(struct orch_rules *r, enum orch_chain_id chain,
                                  enum orch_verdict verdict, const char *fmt, ...)
{
    size_t i = r->n_rules < ORCH_RULES_MAX ? r->n_rules : ORCH_RULES_MAX;
    r->n_rules++;
    struct orch_rule *rule = &r->rules[i];
    *rule = (struct orch_rule){ .chain = chain, .verdict = verdict };
    if (verdict == ORCH_VERDICT_DENY)
        rule->target = chain == ORCH_CHAIN_TAP ? ORCH_CHAIN_TAP_DENIED : ORCH_CHAIN_DENIED;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(rule->label, sizeof rule->label, fmt, ap);
    va_end(ap);
    return rule;
}

/* Packets beyond the rate are not logged; logged or not, they are dropped. */
static void denied_rules(struct orch_rules *r, enum orch_chain_id chain, const char *name)
{
    match_num(add_rule(r, chain, ORCH_VERDICT_LOG, "%s: to the log", name), ORCH_MATCH_RATE,
              ORCH_LOG_RATE, ORCH_LOG_BURST);
    add_rule(r, chain, ORCH_VERDICT_DROP, "%s: rest", name);
}

/* Hardware source and type of the frame. The type is read from the frame, so that one in a VLAN tag
 * shows as 8100. */
static void match_frame(struct orch_rule *r, const char *type)
{
    uint8_t bytes[8];
    memcpy(bytes, ORCH_NET_GUEST_MAC, 6);
    memcpy(bytes + 6, type, 2);
    match_bytes(r, ORCH_HEADER_LINK, 6, bytes, sizeof bytes);
}

static void tap_rules(struct orch_rules *r)
{
    uint32_t guest = htonl(ORCH_NET_GUEST), gateway = htonl(ORCH_NET_GATEWAY);
    struct orch_rule *a = add_rule(r, ORCH_CHAIN_TAP, ORCH_VERDICT_ACCEPT,
                                   "tap: ARP for the gateway");
    uint8_t sender[10];
    memcpy(sender, ORCH_NET_GUEST_MAC, 6);
    memcpy(sender + 6, &guest, 4);
    match_frame(a, "\x08\x06");
    /* Ethernet, IPv4, request */
    match_bytes(a, ORCH_HEADER_NET, 0, "\x00\x01\x08\x00\x06\x04\x00\x01", 8);
    match_bytes(a, ORCH_HEADER_NET, 8, sender, sizeof sender);
    match_bytes(a, ORCH_HEADER_NET, 24, &gateway, 4);

    struct orch_rule *i = add_rule(r, ORCH_CHAIN_TAP, ORCH_VERDICT_ACCEPT,
                                   "tap: IPv4 of the guest");
    match_frame(i, "\x08\x00");
    match_bytes(i, ORCH_HEADER_NET, 0, "\x45", 1); /* no options */
    /* No fragment, and none to follow. Here, before connection tracking would put them together. */
    memcpy(match_bytes(i, ORCH_HEADER_NET, 6, "\x00\x00", 2)->mask, "\xbf\xff", 2);
    match_bytes(i, ORCH_HEADER_NET, 12, &guest, 4);

    add_rule(r, ORCH_CHAIN_TAP, ORCH_VERDICT_DENY, "tap: rest");
}

static void alive_rules(struct orch_rules *r)
{
    add_rule(r, ORCH_CHAIN_ALIVE, ORCH_VERDICT_MARK, "alive: orch");
}

static void base_rules(struct orch_rules *r)
{
    match_num(add_rule(r, ORCH_CHAIN_FORWARD, ORCH_VERDICT_DROP, "forward: orch is gone"),
              ORCH_MATCH_UNMARKED, ORCH_MARK_ALIVE, 0);
    struct orch_rule *from = add_rule(r, ORCH_CHAIN_FORWARD, ORCH_VERDICT_GOTO,
                                      "forward: from the guest");
    match_if(from, ORCH_MATCH_IIF, ORCH_NET_TAP);
    match_if(from, ORCH_MATCH_OIF, ORCH_NET_UPLINK_IF);
    add_match(from, ORCH_MATCH_IPV4);
    from->target = ORCH_CHAIN_GUEST;
    struct orch_rule *back = add_rule(r, ORCH_CHAIN_FORWARD, ORCH_VERDICT_ACCEPT,
                                      "forward: replies");
    match_if(back, ORCH_MATCH_IIF, ORCH_NET_UPLINK_IF);
    match_if(back, ORCH_MATCH_OIF, ORCH_NET_TAP);
    add_match(back, ORCH_MATCH_IPV4);
    match_num(back, ORCH_MATCH_CT, ORCH_CT_ESTABLISHED | ORCH_CT_RELATED, 0);
    add_rule(r, ORCH_CHAIN_FORWARD, ORCH_VERDICT_DENY, "forward: rest");
    add_rule(r, ORCH_CHAIN_INPUT, ORCH_VERDICT_DENY, "input: rest");
    /* What the kernel says of itself where IPv6 cannot be switched off: nothing for the log. */
    add_match(add_rule(r, ORCH_CHAIN_OUTPUT, ORCH_VERDICT_DROP, "output: IPv6"), ORCH_MATCH_IPV6);
    add_rule(r, ORCH_CHAIN_OUTPUT, ORCH_VERDICT_DENY, "output: rest");
    struct orch_rule *nat = add_rule(r, ORCH_CHAIN_NAT, ORCH_VERDICT_MASQUERADE, "nat: uplink");
    match_if(nat, ORCH_MATCH_OIF, ORCH_NET_UPLINK_IF);
    add_match(nat, ORCH_MATCH_IPV4);
    add_rule(r, ORCH_CHAIN_NAT, ORCH_VERDICT_DROP, "nat: rest");
}

static bool permitted(const struct orch_policy *p, struct orch_cidr c)
{
    for (size_t i = 0; i < p->n_permit; i++)
        if (overlaps(p->permit[i], c))
            return true;
    return false;
}

/* Inside a range that a rule denies anyway, all of it. */
static bool denied(const struct orch_policy *p, struct orch_cidr c)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(never); i++)
        if (orch_cidr_contains(never[i].cidr, c))
            return !permitted(p, c);
    return false;
}

static bool named(const struct orch_policy *p, struct orch_cidr c)
{
    for (size_t i = 0; i < p->n_permit; i++)
        if (p->permit[i].addr == c.addr && p->permit[i].bits == c.bits)
            return true;
    return false;
}

const char *orch_policy_never(const struct orch_policy *p, struct orch_cidr c)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(never); i++)
        if (orch_cidr_contains(never[i].cidr, c) && !permitted(p, c))
            return never[i].what;
    return orch_cidr_contains(internal, c) ? "the namespace's own" : NULL;
}

static bool allows(const struct orch_allow *a, struct orch_cidr to, uint8_t proto, uint16_t port)
{
    if (a->proto != proto || !orch_cidr_contains(a->cidr, to))
        return false;
    for (size_t i = 0; i < a->n_ports; i++)
        if (port >= a->ports[i].first && port <= a->ports[i].last)
            return true;
    return false;
}

bool orch_policy_explain(const struct orch_policy *p, uint32_t addr, uint8_t proto, uint16_t port,
                         char *rule, size_t n)
{
    struct orch_cidr to = { addr, 32 };
    const char *what = orch_policy_never(p, to);
    for (size_t i = 0; i < p->n_host && !what; i++)
        if (orch_cidr_contains(p->host[i], to) && !named(p, p->host[i]))
            what = "an address of the host";
    if (what) {
        snprintf(rule, n, "never allowed: %s", what);
        return false;
    }
    for (size_t i = 0; i < p->n_allow; i++)
        if (allows(&p->allow[i], to, proto, port)) {
            char text[ORCH_CIDR_TEXT];
            orch_cidr_text(p->allow[i].cidr, text);
            snprintf(rule, n, "allow[%zu]: %s", i + 1, text);
            return true;
        }
    snprintf(rule, n, "no entry allows it");
    return false;
}

static void host_rules(struct orch_rules *r, const struct orch_policy *p)
{
    char text[ORCH_CIDR_TEXT];
    for (size_t i = 0; i < p->n_host; i++) {
        struct orch_cidr c = p->host[i];
        bool seen = denied(p, c) || named(p, c);
        for (size_t k = 0; k < i && !seen; k++)
            seen = orch_cidr_contains(p->host[k], c) && !named(p, p->host[k]);
        if (seen)
            continue;
        orch_cidr_text(c, text);
        match_to(add_rule(r, ORCH_CHAIN_HOST, ORCH_VERDICT_DENY, "never: %s (host)", text), c);
    }
}

static void guest_rules(struct orch_rules *r, const struct orch_policy *p)
{
    char text[ORCH_CIDR_TEXT];
    add_rule(r, ORCH_CHAIN_GUEST, ORCH_VERDICT_JUMP, "guest: the host's addresses")->target =
        ORCH_CHAIN_HOST;
    if (!denied(p, internal))
        match_to(add_rule(r, ORCH_CHAIN_GUEST, ORCH_VERDICT_DENY, "never: the namespace's own"),
                 internal);
    for (size_t i = 0; i < p->n_permit; i++) {
        struct orch_cidr c = p->permit[i];
        bool needed = false;
        for (size_t k = 0; k < ORCH_ARRAY_LEN(never); k++)
            needed |= overlaps(never[k].cidr, c);
        for (size_t k = 0; k < i; k++)
            needed &= !orch_cidr_contains(p->permit[k], c);
        if (!needed)
            continue;
        orch_cidr_text(c, text);
        struct orch_rule *rule = add_rule(r, ORCH_CHAIN_GUEST, ORCH_VERDICT_GOTO, "permitted: %s",
                                          text);
        match_to(rule, c);
        rule->target = ORCH_CHAIN_ALLOW;
    }
    for (size_t i = 0; i < ORCH_ARRAY_LEN(never); i++) {
        orch_cidr_text(never[i].cidr, text);
        match_to(add_rule(r, ORCH_CHAIN_GUEST, ORCH_VERDICT_DENY, "never: %s (%s)", text,
                          never[i].what),
                 never[i].cidr);
    }
    add_rule(r, ORCH_CHAIN_GUEST, ORCH_VERDICT_GOTO, "guest: to the policy")->target =
        ORCH_CHAIN_ALLOW;
}

/* Entries of one protocol and the same ports. */
struct group {
    uint8_t proto;
    struct orch_interval ports[ORCH_PORTS_MAX];
    size_t n_ports;
};

static int check_entry(const struct orch_allow *a, size_t number, struct orch_err *err)
{
    const char *what = NULL;
    if (a->cidr.bits < 1 || a->cidr.bits > 32 || (a->cidr.addr & ~mask_of(a->cidr.bits)))
        what = "its cidr is not a network";
    else if (a->proto != IPPROTO_TCP && a->proto != IPPROTO_UDP)
        what = "its proto is neither tcp nor udp";
    else if (!a->n_ports || a->n_ports > ORCH_PORTS_MAX)
        what = "it has no ports, or more than 64";
    for (size_t i = 0; !what && i < a->n_ports; i++)
        if (!a->ports[i].first || a->ports[i].last < a->ports[i].first)
            what = "a port is 0, or a range runs backwards";
    return what ? orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "allow entry %zu: %s", number, what)
                : 0;
}

static int allow_rules(struct orch_rules *r, const struct orch_policy *p, struct orch_err *err)
{
    cleanup_free struct group *groups = orch_xcalloc(p->n_allow + 1, sizeof *groups);
    r->sets = orch_xcalloc(p->n_allow + 1, sizeof *r->sets);
    for (size_t i = 0; i < p->n_allow; i++) {
        const struct orch_allow *a = &p->allow[i];
        struct group g = { .proto = a->proto };
        int e = check_entry(a, i + 1, err);
        if (e)
            return e;
        for (size_t k = 0; k < a->n_ports; k++)
            g.ports[k] = (struct orch_interval){ a->ports[k].first, a->ports[k].last };
        g.n_ports = merge(g.ports, a->n_ports);
        size_t at = 0;
        while (at < r->n_sets && (groups[at].proto != g.proto || groups[at].n_ports != g.n_ports ||
                                  memcmp(groups[at].ports, g.ports, g.n_ports * sizeof *g.ports)))
            at++;
        struct orch_set *s = &r->sets[at];
        if (at == r->n_sets) {
            groups[r->n_sets++] = g;
            snprintf(s->name, sizeof s->name, "o_set%u", (unsigned)at + 1);
            s->v = orch_xcalloc(p->n_allow, sizeof *s->v);
        }
        s->v[s->n++] = (struct orch_interval){ a->cidr.addr, last_of(a->cidr) };
    }
    for (size_t i = 0; i < r->n_sets; i++) {
        r->sets[i].n = merge(r->sets[i].v, r->sets[i].n);
        for (size_t k = 0; k < groups[i].n_ports; k++) {
            struct orch_interval v = groups[i].ports[k];
            bool tcp = groups[i].proto == IPPROTO_TCP;
            char range[8] = "";
            if (v.last != v.first)
                snprintf(range, sizeof range, "-%u", v.last & UINT16_MAX);
            struct orch_rule *rule = add_rule(r, ORCH_CHAIN_ALLOW, ORCH_VERDICT_GOTO,
                                              "allow: set %zu %s %u%s", i + 1, tcp ? "tcp" : "udp",
                                              v.first, range);
            match_num(rule, ORCH_MATCH_PROTO, groups[i].proto, 0);
            match_num(rule, ORCH_MATCH_PORTS, v.first, v.last);
            match_num(rule, ORCH_MATCH_SET, (uint32_t)i, 0);
            rule->target = ORCH_CHAIN_FLOW;
        }
    }
    add_rule(r, ORCH_CHAIN_ALLOW, ORCH_VERDICT_DENY, "allow: rest");
    return 0;
}

static void flow_rules(struct orch_rules *r, uint32_t connections)
{
    match_num(add_rule(r, ORCH_CHAIN_FLOW, ORCH_VERDICT_ACCEPT, "flow: known"), ORCH_MATCH_CT,
              ORCH_CT_ESTABLISHED, 0);
    if (connections) {
        struct orch_rule *c = add_rule(r, ORCH_CHAIN_FLOW, ORCH_VERDICT_DENY,
                                       "flow: more than %u connections", connections);
        match_num(c, ORCH_MATCH_CT, ORCH_CT_NEW, 0);
        match_num(c, ORCH_MATCH_CONNS, connections, 0);
    }
    struct orch_rule *t = add_rule(r, ORCH_CHAIN_FLOW, ORCH_VERDICT_ACCEPT, "flow: new tcp");
    match_num(t, ORCH_MATCH_CT, ORCH_CT_NEW, 0);
    match_num(t, ORCH_MATCH_PROTO, IPPROTO_TCP, 0);
    /* SYN, without ACK, RST and FIN: connection tracking would also begin in the midst of a
     * flow. */
    match_bytes(t, ORCH_HEADER_TRANSPORT, 13, "\x02", 1)->mask[0] = 0x17;
    struct orch_rule *u = add_rule(r, ORCH_CHAIN_FLOW, ORCH_VERDICT_ACCEPT, "flow: new udp");
    match_num(u, ORCH_MATCH_CT, ORCH_CT_NEW, 0);
    match_num(u, ORCH_MATCH_PROTO, IPPROTO_UDP, 0);
    add_rule(r, ORCH_CHAIN_FLOW, ORCH_VERDICT_DENY, "flow: rest");
}

static struct orch_cidr *copy_cidrs(const struct orch_cidr *v, size_t n)
{
    struct orch_cidr *out = orch_xcalloc(n + 1, sizeof *out);
    if (n)
        memcpy(out, v, n * sizeof *v);
    return out;
}

static struct orch_rules *new_rules(const struct orch_policy *p)
{
    struct orch_rules *r = orch_xcalloc(1, sizeof *r);
    r->rules = orch_xcalloc(ORCH_RULES_MAX + 1, sizeof *r->rules);
    r->bandwidth_bits = p->bandwidth_bits;
    r->permit = copy_cidrs(p->permit, p->n_permit);
    r->n_permit = p->n_permit;
    r->host = copy_cidrs(p->host, p->n_host);
    r->n_host = p->n_host;
    return r;
}

/* The last rules, and whether there is room for all. */
static int finish_rules(struct orch_rules *r, const struct orch_policy *p, struct orch_err *err)
{
    host_rules(r, p);
    return r->n_rules > ORCH_RULES_MAX
               ? orch_err_setc(err, ORCH_CLASS_CONFIG, E2BIG,
                               "the policy and this host's addresses need %zu rules, more than %d; "
                               "use fewer different port lists",
                               r->n_rules, ORCH_RULES_MAX)
               : 0;
}

struct orch_rules *orch_rules_new(const struct orch_policy *p, struct orch_err *err)
{
    struct orch_rules *r = new_rules(p);
    int e = p->n_allow > ORCH_ALLOW_MAX
                ? orch_err_setc(err, ORCH_CLASS_CONFIG, E2BIG, "more than %d allow entries",
                                ORCH_ALLOW_MAX)
                : 0;
    for (size_t i = 0; !e && i < p->n_permit; i++)
        if (!p->permit[i].bits || p->permit[i].bits > 32 ||
            (p->permit[i].addr & ~mask_of(p->permit[i].bits)))
            e = orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                              "permit_private entry %zu is not a network", i + 1);
    if (!e) {
        alive_rules(r);
        tap_rules(r);
        denied_rules(r, ORCH_CHAIN_TAP_DENIED, "tap denied");
        base_rules(r);
        guest_rules(r, p);
        e = allow_rules(r, p, err);
    }
    if (!e) {
        flow_rules(r, p->connections);
        denied_rules(r, ORCH_CHAIN_DENIED, "denied");
        e = finish_rules(r, p, err);
    }
    if (!e)
        return r;
    orch_rules_free(r);
    return NULL;
}

struct orch_rules *orch_rules_rehost(const struct orch_rules *old, const struct orch_cidr *host,
                                     size_t n, struct orch_err *err)
{
    const struct orch_policy p = { .bandwidth_bits = old->bandwidth_bits,
                                   .permit = old->permit,
                                   .n_permit = old->n_permit,
                                   .host = host,
                                   .n_host = n };
    struct orch_rules *r = new_rules(&p);
    r->sets = orch_xcalloc(old->n_sets + 1, sizeof *r->sets);
    for (; r->n_sets < old->n_sets; r->n_sets++) {
        const struct orch_set *from = &old->sets[r->n_sets];
        struct orch_set *to = &r->sets[r->n_sets];
        *to = *from;
        to->v = orch_xcalloc(from->n + 1, sizeof *to->v);
        memcpy(to->v, from->v, from->n * sizeof *to->v);
    }
    while (r->n_rules < old->n_rules && old->rules[r->n_rules].chain != ORCH_CHAIN_HOST)
        r->n_rules++;
    memcpy(r->rules, old->rules, r->n_rules * sizeof *r->rules);
    if (!finish_rules(r, &p, err))
        return r;
    orch_rules_free(r);
    return NULL;
}

bool orch_rules_has_host(const struct orch_rules *r, const struct orch_cidr *host, size_t n)
{
    bool same = r->n_host == n;
    for (size_t i = 0; same && i < n; i++)
        same = r->host[i].addr == host[i].addr && r->host[i].bits == host[i].bits;
    return same;
}

const char *orch_rules_marked(const struct orch_rules *r, uint32_t mark)
{
    size_t i = mark - ORCH_MARK_RULE;
    return mark >= ORCH_MARK_RULE && i < r->n_rules ? r->rules[i].label : NULL;
}

void orch_rules_free(struct orch_rules *r)
{
    if (!r)
        return;
    for (size_t i = 0; i < r->n_sets; i++)
        free(r->sets[i].v);
    free(r->sets);
    free(r->rules);
    free(r->permit);
    free(r->host);
    free(r);
}
