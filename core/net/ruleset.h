/* A network policy as data, and the packet filter it becomes: chains, interval sets and rules,
 * again as data. Pure: no descriptor, no kernel, no library; nft*.c turn it into netlink messages.
 *
 * Two tables named "orch" in the microVM's network namespace, each chain with an explicit drop at
 * its end:
 *   netdev  o_tap      ingress of tap0: the guest's ARP for its gateway, IPv4 from its addresses
 *   inet    o_forward  replies to the guest; what comes from the guest goes to o_guest
 *           o_input, o_output  nothing
 *           o_nat      masquerade on up0
 *           o_guest    o_host, then never-allowed addresses, then o_allow
 *           o_allow    a rule per protocol and port range over a set of addresses, to o_flow
 *           o_flow     known flows, new ones within the limit
 * What a rule denies, it marks with its own number and sends to the end of its table, which logs
 * some of it and drops it all:
 *   netdev  o_tap_denied
 *   inet    o_denied
 * The host's addresses have a chain of their own, the last, which alone is replaced when they
 * change:
 *   inet    o_host     what every packet of the guest passes first, also one of a known flow
 * Before them, "orch_alive" with
 *   inet    o_alive    marks what is forwarded; o_forward drops first what has no mark
 * which decides nothing and goes with orch's socket, so that nothing is forwarded without orch. A
 * packet is accepted by rules that name all of it; nothing relies on another rule having dropped
 * it. o_guest, o_host, o_allow and o_flow match IPv4 headers without saying so: only IPv4 is sent
 * there. */
#ifndef ORCH_NET_RULESET_H
#define ORCH_NET_RULESET_H

#include "../base/err.h"

/* The same in every microVM, so that clones need no renumbering. 10.255.0.0/23 is never
 * reachable. */
#define ORCH_NET_GUEST_MAC "\x02\x00\x00\x00\x00\x02"
#define ORCH_NET_TAP_MAC "\x02\x00\x00\x00\x00\x01"
#define ORCH_NET_GUEST UINT32_C(0x0aff0002)   /* 10.255.0.2, as the guest's eth0 */
#define ORCH_NET_GATEWAY UINT32_C(0x0aff0001) /* 10.255.0.1, on tap0 */
#define ORCH_NET_BITS 30

#define ORCH_ALLOW_MAX 1024 /* entries of a policy */
#define ORCH_PORTS_MAX 64   /* port ranges of an entry */
#define ORCH_RULES_MAX 512

/* Host byte order, host bits zero. */
struct orch_cidr {
    uint32_t addr;
    unsigned bits;
};

struct orch_ports {
    uint16_t first, last;
};

/* "198.51.100.0/24", or an address alone. -EINVAL: malformed, host bits set, or /0; err says
 * which. */
int orch_cidr_parse(const char *text, struct orch_cidr *out, struct orch_err *err);
/* "443" or "8000-8010". -EINVAL: malformed, 0, above 65535, or backwards. */
int orch_ports_parse(const char *text, struct orch_ports *out, struct orch_err *err);
/* "10mbit": bits a second, 8kbit to 100gbit. -EINVAL: malformed or out of range. */
int orch_bandwidth_parse(const char *text, uint64_t *bits, struct orch_err *err);
bool orch_cidr_contains(struct orch_cidr outer, struct orch_cidr inner);
#define ORCH_CIDR_TEXT 20
void orch_cidr_text(struct orch_cidr c, char out[ORCH_CIDR_TEXT]);

struct orch_allow {
    struct orch_cidr cidr;
    uint8_t proto; /* IPPROTO_TCP or IPPROTO_UDP */
    const struct orch_ports *ports;
    size_t n_ports;
};

struct orch_policy {
    const struct orch_allow *allow; /* empty: everything is denied */
    size_t n_allow;
    uint32_t connections;    /* at once; 0: no limit */
    uint64_t bandwidth_bits; /* a second and direction; 0: no limit */
    /* net.permit_private: taken out of the never-allowed ranges. An address of the host stays
     * never-allowed unless it is named itself, alone. */
    const struct orch_cidr *permit;
    size_t n_permit;
    const struct orch_cidr *host; /* the host's addresses */
    size_t n_host;
};

/* What the never-allowed range is that all of c lies in, permit taken into account; NULL: none. */
const char *orch_policy_never(const struct orch_policy *p, struct orch_cidr c);
/* Whether a new flow to this address would pass, as the filter decides it; the rule that
 * decides. */
bool orch_policy_explain(const struct orch_policy *p, uint32_t addr, uint8_t proto, uint16_t port,
                         char *rule, size_t n);

/* ---- the filter */

enum orch_match_kind {
    ORCH_MATCH_IIF, /* name */
    ORCH_MATCH_OIF, /* name */
    ORCH_MATCH_IPV4,
    ORCH_MATCH_IPV6,
    ORCH_MATCH_PROTO,    /* a: transport protocol */
    ORCH_MATCH_BYTES,    /* len header bytes at base + offset, under mask, are value */
    ORCH_MATCH_PORTS,    /* destination port a…b; only behind a PROTO */
    ORCH_MATCH_SET,      /* IPv4 destination in set a */
    ORCH_MATCH_CT,       /* flow state is one of the bits a */
    ORCH_MATCH_CONNS,    /* more than a flows are open */
    ORCH_MATCH_UNMARKED, /* the packet's mark is not a */
    ORCH_MATCH_RATE,     /* a packets a second, b at once */
};
/* As nftables numbers them. */
enum orch_header {
    ORCH_HEADER_LINK,
    ORCH_HEADER_NET,
    ORCH_HEADER_TRANSPORT,
};
enum orch_ct { ORCH_CT_ESTABLISHED = 2, ORCH_CT_RELATED = 4, ORCH_CT_NEW = 8 };
enum orch_verdict {
    ORCH_VERDICT_DROP,
    ORCH_VERDICT_ACCEPT,
    ORCH_VERDICT_GOTO,
    ORCH_VERDICT_JUMP, /* to the target and, where nothing there decides, back */
    ORCH_VERDICT_MASQUERADE,
    ORCH_VERDICT_MARK, /* none: sets the packet's mark to ORCH_MARK_ALIVE */
    ORCH_VERDICT_DENY, /* sets the mark to the rule's, goes to the chain that logs and drops */
    ORCH_VERDICT_LOG,  /* none: the packet's mark and beginning to ORCH_LOG_GROUP */
    ORCH_VERDICTS,
};
/* Marks of packets, which the guest has no way to set. */
#define ORCH_MARK_ALIVE 1
#define ORCH_MARK_RULE 2 /* and the rule's index */
#define ORCH_LOG_GROUP 1
#define ORCH_LOG_BYTES 64 /* of a packet, from its IP header on */
#define ORCH_LOG_RATE 10  /* packets a second and table */
#define ORCH_LOG_BURST 20

struct orch_match {
    enum orch_match_kind kind;
    const char *name;
    uint32_t a, b;
    enum orch_header base;
    uint8_t offset, len;
    uint8_t value[16], mask[16];
};

/* In the order of their tables. */
enum orch_chain_id {
    ORCH_CHAIN_ALIVE,
    ORCH_CHAIN_TAP,
    ORCH_CHAIN_TAP_DENIED,
    ORCH_CHAIN_FORWARD,
    ORCH_CHAIN_INPUT,
    ORCH_CHAIN_OUTPUT,
    ORCH_CHAIN_NAT,
    ORCH_CHAIN_GUEST,
    ORCH_CHAIN_ALLOW,
    ORCH_CHAIN_FLOW,
    ORCH_CHAIN_DENIED,
    ORCH_CHAIN_HOST,
    ORCH_CHAINS,
};

/* As nftables and reports call them. */
extern const char *const orch_chain_names[ORCH_CHAINS];
extern const char *const orch_verdict_names[ORCH_VERDICTS];
const char *orch_chain_family(enum orch_chain_id chain); /* "netdev" or "inet" */

/* Every rule counts; the label is unique, is the rule's comment in nftables and names it in
 * reports. */
#define ORCH_LABEL 64
struct orch_rule {
    enum orch_chain_id chain;
    char label[ORCH_LABEL];
    struct orch_match match[6];
    size_t n_match;
    enum orch_verdict verdict;
    enum orch_chain_id target; /* GOTO, JUMP, DENY */
};

struct orch_interval {
    uint32_t first, last;
};

/* Sorted, neither overlapping nor touching. */
struct orch_set {
    char name[16];
    struct orch_interval *v;
    size_t n;
};

/* Rules are in the order of their chains. */
struct orch_rules {
    struct orch_set *sets;
    size_t n_sets;
    struct orch_rule *rules;
    size_t n_rules;
    uint64_t bandwidth_bits;
    struct orch_cidr *permit, *host; /* the policy's */
    size_t n_permit, n_host;
};

/* Class CONFIG when the policy is not one (a bad entry is named by its number from 1) or too large.
 * Nothing of p is kept. */
struct orch_rules *orch_rules_new(const struct orch_policy *p, struct orch_err *err);
/* The same for a host with other addresses: only the rules of o_host differ. Class CONFIG when they
 * are too many. */
struct orch_rules *orch_rules_rehost(const struct orch_rules *old, const struct orch_cidr *host,
                                     size_t n, struct orch_err *err);
bool orch_rules_has_host(const struct orch_rules *r, const struct orch_cidr *host, size_t n);
void orch_rules_free(struct orch_rules *r);
/* The label of the rule that set a mark; NULL: none of these did. */
const char *orch_rules_marked(const struct orch_rules *r, uint32_t mark);

#endif
