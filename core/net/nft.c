#include "nft.h"
#include "netlink.h"

#include "../base/library.h"

#include "../launch/wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <libnftnl/chain.h>
#include <libnftnl/common.h>
#include <libnftnl/expr.h>
#include <libnftnl/rule.h>
#include <libnftnl/set.h>
#include <libnftnl/table.h>
#include <libnftnl/udata.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <stdio.h>
#include <string.h>

#define TABLE "orch"
#define F_PERSIST 4 /* NFT_TABLE_F_PERSIST, Linux 6.9 */
#define TYPE_IPV4 7 /* how the nft program calls the sets' key */
/* libnftnl writes without a bound; no message is longer than one nested list of 64 KiB and its
 * frame. */
#define MESSAGE_BYTES (128 * 1024)

/* What is used of libnftnl. */
#define FUNCTIONS(X) \
    X(nlmsg_build_hdr) \
    X(table_alloc) \
    X(table_free) \
    X(table_set_str) \
    X(table_set_u32) \
    X(table_get_str) \
    X(table_get_u32) \
    X(table_nlmsg_build_payload) \
    X(table_nlmsg_parse) \
    X(chain_alloc) \
    X(chain_free) \
    X(chain_set_str) \
    X(chain_set_u32) \
    X(chain_set_s32) \
    X(chain_is_set) \
    X(chain_get_str) \
    X(chain_get_u32) \
    X(chain_get_s32) \
    X(chain_nlmsg_build_payload) \
    X(chain_nlmsg_parse) \
    X(set_alloc) \
    X(set_free) \
    X(set_set_str) \
    X(set_set_u32) \
    X(set_is_set) \
    X(set_get_str) \
    X(set_get_u32) \
    X(set_nlmsg_build_payload) \
    X(set_nlmsg_parse) \
    X(set_elem_alloc) \
    X(set_elem_set) \
    X(set_elem_set_u32) \
    X(set_elem_add) \
    X(set_elem_is_set) \
    X(set_elem_get) \
    X(set_elem_get_u32) \
    X(set_elem_foreach) \
    X(set_elems_iter_create) \
    X(set_elems_iter_destroy) \
    X(set_elems_nlmsg_build_payload) \
    X(set_elems_nlmsg_build_payload_iter) \
    X(set_elems_nlmsg_parse) \
    X(rule_alloc) \
    X(rule_free) \
    X(rule_set_str) \
    X(rule_set_u32) \
    X(rule_set_data) \
    X(rule_get_str) \
    X(rule_get_data) \
    X(rule_get_u32) \
    X(rule_add_expr) \
    X(rule_nlmsg_build_payload) \
    X(rule_nlmsg_parse) \
    X(expr_alloc) \
    X(expr_set) \
    X(expr_set_u16) \
    X(expr_set_u32) \
    X(expr_set_u64) \
    X(expr_set_str) \
    X(expr_is_set) \
    X(expr_get) \
    X(expr_get_u64) \
    X(expr_get_str) \
    X(expr_iter_create) \
    X(expr_iter_next) \
    X(expr_iter_destroy)

static struct {
#define X(name) __typeof__(&nftnl_##name) name;
    FUNCTIONS(X)
#undef X
} nl;

ORCH_LIBRARY(nl, FUNCTIONS, .what = "firewall", .file = "libnftnl.so.11", .package = "libnftnl11",
             .prefix = "nftnl_", .cls = ORCH_CLASS_ISOLATION);

struct orch_nft {
    int fd;
    bool owned, committed;
    uint32_t genid; /* of the last verify */
};

enum { TABLE_ALIVE, TABLE_NETDEV, TABLE_INET };
static const struct table {
    const char *name;
    uint8_t family;
} tables[] = {
    [TABLE_ALIVE] = { "orch_alive", NFPROTO_INET },
    [TABLE_NETDEV] = { TABLE, NFPROTO_NETDEV },
    [TABLE_INET] = { TABLE, NFPROTO_INET },
};

static const struct chain {
    const struct table *table;
    const char *type; /* NULL: reached by goto and jump alone */
    uint32_t hook;
    int32_t prio;
    uint32_t policy;
} chains[ORCH_CHAINS] = {
    [ORCH_CHAIN_ALIVE] = { &tables[TABLE_ALIVE], "filter", NF_INET_FORWARD, -1, NF_ACCEPT },
    [ORCH_CHAIN_TAP] = { &tables[TABLE_NETDEV], "filter", NF_NETDEV_INGRESS, 0, NF_DROP },
    [ORCH_CHAIN_TAP_DENIED] = { .table = &tables[TABLE_NETDEV] },
    [ORCH_CHAIN_FORWARD] = { &tables[TABLE_INET], "filter", NF_INET_FORWARD, 0, NF_DROP },
    [ORCH_CHAIN_INPUT] = { &tables[TABLE_INET], "filter", NF_INET_LOCAL_IN, 0, NF_DROP },
    [ORCH_CHAIN_OUTPUT] = { &tables[TABLE_INET], "filter", NF_INET_LOCAL_OUT, 0, NF_DROP },
    [ORCH_CHAIN_NAT] = { &tables[TABLE_INET], "nat", NF_INET_POST_ROUTING, 100, NF_DROP },
    [ORCH_CHAIN_GUEST] = { .table = &tables[TABLE_INET] },
    [ORCH_CHAIN_ALLOW] = { .table = &tables[TABLE_INET] },
    [ORCH_CHAIN_FLOW] = { .table = &tables[TABLE_INET] },
    [ORCH_CHAIN_DENIED] = { .table = &tables[TABLE_INET] },
    [ORCH_CHAIN_HOST] = { .table = &tables[TABLE_INET] },
};

static uint32_t table_flags(size_t table, bool owned)
{
    if (table == TABLE_ALIVE)
        return NFT_TABLE_F_OWNER;
    return owned ? (uint32_t)NFT_TABLE_F_OWNER | F_PERSIST : 0;
}

/* A sequence number says what its message is about: the kernel returns it with an error. */
enum item { ITEM_BATCH, ITEM_TABLE, ITEM_SET, ITEM_ELEMENTS, ITEM_CHAIN, ITEM_RULE };
#define SEQ(item, index) ((uint32_t)(item) << 16 | (uint32_t)(index))

static void item_text(const struct orch_rules *r, uint32_t seq, char *out, size_t n)
{
    size_t i = seq & 0xffff;
    switch ((enum item)(seq >> 16)) {
    case ITEM_TABLE:
        i = i < ORCH_ARRAY_LEN(tables) ? i : TABLE_INET;
        snprintf(out, n, "table %s %s", tables[i].family == NFPROTO_NETDEV ? "netdev" : "inet",
                 tables[i].name);
        break;
    case ITEM_SET:
    case ITEM_ELEMENTS:
        snprintf(out, n, "%s %s", seq >> 16 == ITEM_SET ? "set" : "elements of set",
                 i < r->n_sets ? r->sets[i].name : "?");
        break;
    case ITEM_CHAIN:
        snprintf(out, n, "chain %s", i < ORCH_CHAINS ? orch_chain_names[i] : "?");
        break;
    case ITEM_RULE:
        snprintf(out, n, "rule \"%s\"", i < r->n_rules ? r->rules[i].label : "?");
        break;
    case ITEM_BATCH:
    default:
        snprintf(out, n, "batch");
    }
}

/* ---- data to libnftnl's objects */

static struct nftnl_table *build_table(size_t i, bool owned)
{
    struct nftnl_table *t = nl.table_alloc();
    nl.table_set_str(t, NFTNL_TABLE_NAME, tables[i].name);
    nl.table_set_u32(t, NFTNL_TABLE_FAMILY, tables[i].family);
    nl.table_set_u32(t, NFTNL_TABLE_FLAGS, table_flags(i, owned));
    return t;
}

static struct nftnl_chain *build_chain(size_t i)
{
    const struct chain *d = &chains[i];
    struct nftnl_chain *c = nl.chain_alloc();
    nl.chain_set_str(c, NFTNL_CHAIN_TABLE, d->table->name);
    nl.chain_set_str(c, NFTNL_CHAIN_NAME, orch_chain_names[i]);
    nl.chain_set_u32(c, NFTNL_CHAIN_FAMILY, d->table->family);
    if (d->type) {
        nl.chain_set_str(c, NFTNL_CHAIN_TYPE, d->type);
        nl.chain_set_u32(c, NFTNL_CHAIN_HOOKNUM, d->hook);
        nl.chain_set_s32(c, NFTNL_CHAIN_PRIO, d->prio);
        nl.chain_set_u32(c, NFTNL_CHAIN_POLICY, d->policy);
    }
    if (d->type && d->table->family == NFPROTO_NETDEV)
        nl.chain_set_str(c, NFTNL_CHAIN_DEV, ORCH_NET_TAP);
    return c;
}

static struct nftnl_set *build_set(const struct orch_rules *r, size_t i)
{
    struct nftnl_set *s = nl.set_alloc();
    nl.set_set_str(s, NFTNL_SET_TABLE, TABLE);
    nl.set_set_str(s, NFTNL_SET_NAME, r->sets[i].name);
    nl.set_set_u32(s, NFTNL_SET_FAMILY, NFPROTO_INET);
    nl.set_set_u32(s, NFTNL_SET_ID, (uint32_t)i + 1);
    nl.set_set_u32(s, NFTNL_SET_FLAGS, NFT_SET_INTERVAL);
    nl.set_set_u32(s, NFTNL_SET_KEY_TYPE, TYPE_IPV4);
    nl.set_set_u32(s, NFTNL_SET_KEY_LEN, 4);
    return s;
}

/* What the kernel holds for an interval: its first address, and the one behind its last, which
 * there is none of at the top. */
struct element {
    uint32_t key;
    bool end;
};

static size_t list_elements(const struct orch_set *s, struct element *out)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) {
        out[n++] = (struct element){ s->v[i].first, false };
        if (s->v[i].last != UINT32_MAX)
            out[n++] = (struct element){ s->v[i].last + 1, true };
    }
    return n;
}

static void add_elements(struct nftnl_set *s, const struct orch_set *set)
{
    cleanup_free struct element *v = orch_xcalloc(2 * set->n + 1, sizeof *v);
    size_t n = list_elements(set, v);
    for (size_t i = 0; i < n; i++) {
        struct nftnl_set_elem *e = nl.set_elem_alloc();
        uint32_t key = htonl(v[i].key);
        nl.set_elem_set(e, NFTNL_SET_ELEM_KEY, &key, sizeof key);
        if (v[i].end)
            nl.set_elem_set_u32(e, NFTNL_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END);
        nl.set_elem_add(s, e);
    }
}

static struct nftnl_expr *add_expr(struct nftnl_rule *r, const char *name)
{
    struct nftnl_expr *e = nl.expr_alloc(name);
    nl.rule_add_expr(r, e);
    return e;
}

static void add_meta(struct nftnl_rule *r, uint32_t key)
{
    struct nftnl_expr *e = add_expr(r, "meta");
    nl.expr_set_u32(e, NFTNL_EXPR_META_KEY, key);
    nl.expr_set_u32(e, NFTNL_EXPR_META_DREG, NFT_REG_1);
}

static void add_mark(struct nftnl_rule *r, uint32_t mark)
{
    struct nftnl_expr *e = add_expr(r, "immediate");
    nl.expr_set_u32(e, NFTNL_EXPR_IMM_DREG, NFT_REG_1);
    nl.expr_set(e, NFTNL_EXPR_IMM_DATA, &mark, sizeof mark);
    e = add_expr(r, "meta");
    nl.expr_set_u32(e, NFTNL_EXPR_META_KEY, NFT_META_MARK);
    nl.expr_set_u32(e, NFTNL_EXPR_META_SREG, NFT_REG_1);
}

static void add_verdict(struct nftnl_rule *r, uint32_t verdict, const char *chain)
{
    struct nftnl_expr *e = add_expr(r, "immediate");
    nl.expr_set_u32(e, NFTNL_EXPR_IMM_DREG, NFT_REG_VERDICT);
    nl.expr_set_u32(e, NFTNL_EXPR_IMM_VERDICT, verdict);
    if (chain)
        nl.expr_set_str(e, NFTNL_EXPR_IMM_CHAIN, chain);
}

static void add_cmp(struct nftnl_rule *r, uint32_t op, const void *data, size_t n)
{
    struct nftnl_expr *e = add_expr(r, "cmp");
    nl.expr_set_u32(e, NFTNL_EXPR_CMP_SREG, NFT_REG_1);
    nl.expr_set_u32(e, NFTNL_EXPR_CMP_OP, op);
    nl.expr_set(e, NFTNL_EXPR_CMP_DATA, data, (uint32_t)n);
}

static void add_payload(struct nftnl_rule *r, uint32_t base, uint32_t offset, uint32_t len)
{
    struct nftnl_expr *e = add_expr(r, "payload");
    nl.expr_set_u32(e, NFTNL_EXPR_PAYLOAD_DREG, NFT_REG_1);
    nl.expr_set_u32(e, NFTNL_EXPR_PAYLOAD_BASE, base);
    nl.expr_set_u32(e, NFTNL_EXPR_PAYLOAD_OFFSET, offset);
    nl.expr_set_u32(e, NFTNL_EXPR_PAYLOAD_LEN, len);
}

static void add_mask(struct nftnl_rule *r, const void *mask, uint32_t n)
{
    static const uint8_t zero[16];
    struct nftnl_expr *e = add_expr(r, "bitwise");
    nl.expr_set_u32(e, NFTNL_EXPR_BITWISE_SREG, NFT_REG_1);
    nl.expr_set_u32(e, NFTNL_EXPR_BITWISE_DREG, NFT_REG_1);
    nl.expr_set_u32(e, NFTNL_EXPR_BITWISE_LEN, n);
    nl.expr_set(e, NFTNL_EXPR_BITWISE_MASK, mask, n);
    nl.expr_set(e, NFTNL_EXPR_BITWISE_XOR, zero, n);
}

static void add_match(struct nftnl_rule *r, const struct orch_rules *rules,
                      const struct orch_match *m)
{
    struct nftnl_expr *e;
    switch (m->kind) {
    case ORCH_MATCH_IIF:
    case ORCH_MATCH_OIF: {
        char name[16] = ""; /* all of it: a shorter comparison is one of prefixes */
        memcpy(name, m->name, strlen(m->name));
        add_meta(r, m->kind == ORCH_MATCH_IIF ? NFT_META_IIFNAME : NFT_META_OIFNAME);
        add_cmp(r, NFT_CMP_EQ, name, sizeof name);
        break;
    }
    case ORCH_MATCH_IPV4:
    case ORCH_MATCH_IPV6:
        add_meta(r, NFT_META_NFPROTO);
        add_cmp(r, NFT_CMP_EQ,
                &(uint8_t){ m->kind == ORCH_MATCH_IPV4 ? NFPROTO_IPV4 : NFPROTO_IPV6 }, 1);
        break;
    case ORCH_MATCH_PROTO:
        add_meta(r, NFT_META_L4PROTO);
        add_cmp(r, NFT_CMP_EQ, &(uint8_t){ (uint8_t)m->a }, 1);
        break;
    case ORCH_MATCH_BYTES:
        add_payload(r, m->base, m->offset, m->len);
        for (size_t i = 0; i < m->len; i++)
            if (m->mask[i] != 0xff) {
                add_mask(r, m->mask, m->len);
                break;
            }
        add_cmp(r, NFT_CMP_EQ, m->value, m->len);
        break;
    case ORCH_MATCH_PORTS: {
        uint16_t from = htons((uint16_t)m->a), to = htons((uint16_t)m->b);
        add_payload(r, NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2);
        if (from == to) {
            add_cmp(r, NFT_CMP_EQ, &from, sizeof from);
            break;
        }
        e = add_expr(r, "range");
        nl.expr_set_u32(e, NFTNL_EXPR_RANGE_SREG, NFT_REG_1);
        nl.expr_set_u32(e, NFTNL_EXPR_RANGE_OP, NFT_RANGE_EQ);
        nl.expr_set(e, NFTNL_EXPR_RANGE_FROM_DATA, &from, sizeof from);
        nl.expr_set(e, NFTNL_EXPR_RANGE_TO_DATA, &to, sizeof to);
        break;
    }
    case ORCH_MATCH_SET:
        add_payload(r, NFT_PAYLOAD_NETWORK_HEADER, 16, 4);
        e = add_expr(r, "lookup");
        nl.expr_set_u32(e, NFTNL_EXPR_LOOKUP_SREG, NFT_REG_1);
        nl.expr_set_str(e, NFTNL_EXPR_LOOKUP_SET, rules->sets[m->a].name);
        nl.expr_set_u32(e, NFTNL_EXPR_LOOKUP_SET_ID, m->a + 1);
        break;
    case ORCH_MATCH_CT: {
        uint32_t bits = m->a, zero = 0;
        e = add_expr(r, "ct");
        nl.expr_set_u32(e, NFTNL_EXPR_CT_KEY, NFT_CT_STATE);
        nl.expr_set_u32(e, NFTNL_EXPR_CT_DREG, NFT_REG_1);
        add_mask(r, &bits, sizeof bits);
        add_cmp(r, NFT_CMP_NEQ, &zero, sizeof zero);
        break;
    }
    case ORCH_MATCH_CONNS:
        e = add_expr(r, "connlimit");
        nl.expr_set_u32(e, NFTNL_EXPR_CONNLIMIT_COUNT, m->a);
        nl.expr_set_u32(e, NFTNL_EXPR_CONNLIMIT_FLAGS, NFT_CONNLIMIT_F_INV);
        break;
    case ORCH_MATCH_UNMARKED:
        add_meta(r, NFT_META_MARK);
        add_cmp(r, NFT_CMP_NEQ, &m->a, sizeof m->a);
        break;
    case ORCH_MATCH_RATE:
        e = add_expr(r, "limit");
        nl.expr_set_u64(e, NFTNL_EXPR_LIMIT_RATE, m->a);
        nl.expr_set_u64(e, NFTNL_EXPR_LIMIT_UNIT, 1);
        nl.expr_set_u32(e, NFTNL_EXPR_LIMIT_BURST, m->b);
        nl.expr_set_u32(e, NFTNL_EXPR_LIMIT_TYPE, NFT_LIMIT_PKTS);
        break;
    }
}

/* Each packet at once, none waits for others. */
static void add_log(struct nftnl_rule *r)
{
    struct nftnl_expr *e = add_expr(r, "log");
    nl.expr_set_u16(e, NFTNL_EXPR_LOG_GROUP, ORCH_LOG_GROUP);
    nl.expr_set_u32(e, NFTNL_EXPR_LOG_SNAPLEN, ORCH_LOG_BYTES);
    nl.expr_set_u16(e, NFTNL_EXPR_LOG_QTHRESHOLD, 1);
}

static void add_end(struct nftnl_rule *r, const struct orch_rules *rules, size_t i)
{
    const struct orch_rule *d = &rules->rules[i];
    switch (d->verdict) {
    case ORCH_VERDICT_DROP:
        add_verdict(r, NF_DROP, NULL);
        break;
    case ORCH_VERDICT_ACCEPT:
        add_verdict(r, NF_ACCEPT, NULL);
        break;
    case ORCH_VERDICT_GOTO:
        add_verdict(r, (uint32_t)NFT_GOTO, orch_chain_names[d->target]);
        break;
    case ORCH_VERDICT_JUMP:
        add_verdict(r, (uint32_t)NFT_JUMP, orch_chain_names[d->target]);
        break;
    case ORCH_VERDICT_MASQUERADE:
        add_expr(r, "masq");
        break;
    case ORCH_VERDICT_MARK:
        add_mark(r, ORCH_MARK_ALIVE);
        break;
    case ORCH_VERDICT_DENY:
        add_mark(r, ORCH_MARK_RULE + (uint32_t)i);
        add_verdict(r, (uint32_t)NFT_GOTO, orch_chain_names[d->target]);
        break;
    case ORCH_VERDICT_LOG:
        add_log(r);
        break;
    case ORCH_VERDICTS:
        break;
    }
}

static struct nftnl_rule *build_rule(const struct orch_rules *rules, size_t i)
{
    const struct orch_rule *d = &rules->rules[i];
    const struct table *table = chains[d->chain].table;
    struct nftnl_rule *r = nl.rule_alloc();
    nl.rule_set_str(r, NFTNL_RULE_TABLE, table->name);
    nl.rule_set_str(r, NFTNL_RULE_CHAIN, orch_chain_names[d->chain]);
    nl.rule_set_u32(r, NFTNL_RULE_FAMILY, table->family);
    /* A comment as the nft program stores them: type, length, text with its NUL. */
    uint8_t comment[2 + ORCH_LABEL] = { NFTNL_UDATA_RULE_COMMENT, (uint8_t)(strlen(d->label) + 1) };
    memcpy(comment + 2, d->label, comment[1]);
    nl.rule_set_data(r, NFTNL_RULE_USERDATA, comment, 2U + comment[1]);
    for (size_t k = 0; k < d->n_match; k++)
        add_match(r, rules, &d->match[k]);
    add_expr(r, "counter");
    add_end(r, rules, i);
    return r;
}

/* ---- the batch */

/* One message is built in scratch, which stays zeroed where nothing is written, then taken over. */
static void take(struct orch_buf *out, char *scratch)
{
    uint32_t len = ((struct nlmsghdr *)(void *)scratch)->nlmsg_len;
    orch_buf_add(out, scratch, len);
    memset(scratch, 0, len);
}

static struct nlmsghdr *begin(char *scratch, uint16_t type, uint16_t family, uint16_t flags,
                              uint32_t seq)
{
    return nl.nlmsg_build_hdr(scratch, type, family, NLM_F_CREATE | flags, seq);
}

static size_t begin_frame(struct orch_buf *out, int type, uint32_t seq)
{
    struct nfgenmsg head = { .version = NFNETLINK_V0, .res_id = htons(NFNL_SUBSYS_NFTABLES) };
    return orch_nl_begin(out, type, 0, seq, &head, sizeof head);
}

/* genid 0: whatever it is. */
static void open_batch(struct orch_buf *out, uint32_t genid)
{
    uint32_t be = htonl(genid);
    size_t m = begin_frame(out, NFNL_MSG_BATCH_BEGIN, SEQ(ITEM_BATCH, 0));
    orch_nl_put(out, NFNL_BATCH_GENID, &be, sizeof be);
    orch_nl_end(out, m);
}

static void close_batch(struct orch_buf *out)
{
    orch_nl_end(out, begin_frame(out, NFNL_MSG_BATCH_END, SEQ(ITEM_BATCH, 1)));
}

/* The last of a batch asks for an ack. Before 6.13 the batch's end is not acked, and one for each
 * message would overflow the socket. */
static void put_rule(struct orch_buf *out, char *scratch, const struct orch_rules *r, size_t i)
{
    struct nftnl_rule *rule = build_rule(r, i);
    struct nlmsghdr *h = begin(scratch, NFT_MSG_NEWRULE, chains[r->rules[i].chain].table->family,
                               NLM_F_APPEND | (i + 1 == r->n_rules ? NLM_F_ACK : 0),
                               SEQ(ITEM_RULE, i));
    nl.rule_nlmsg_build_payload(h, rule);
    nl.rule_free(rule);
    take(out, scratch);
}

static void batch(const struct orch_rules *r, uint32_t genid, bool owned, struct orch_buf *out)
{
    cleanup_free char *scratch = orch_xcalloc(1, MESSAGE_BYTES);
    struct nlmsghdr *h;
    open_batch(out, genid);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(tables); i++) {
        struct nftnl_table *t = build_table(i, owned);
        h = begin(scratch, NFT_MSG_NEWTABLE, tables[i].family, NLM_F_EXCL, SEQ(ITEM_TABLE, i));
        nl.table_nlmsg_build_payload(h, t);
        nl.table_free(t);
        take(out, scratch);
    }
    for (size_t i = 0; i < r->n_sets; i++) {
        struct nftnl_set *s = build_set(r, i);
        h = begin(scratch, NFT_MSG_NEWSET, NFPROTO_INET, NLM_F_EXCL, SEQ(ITEM_SET, i));
        nl.set_nlmsg_build_payload(h, s);
        take(out, scratch);
        add_elements(s, &r->sets[i]);
        struct nftnl_set_elems_iter *it = nl.set_elems_iter_create(s);
        int more;
        do {
            h = begin(scratch, NFT_MSG_NEWSETELEM, NFPROTO_INET, NLM_F_EXCL, SEQ(ITEM_ELEMENTS, i));
            more = nl.set_elems_nlmsg_build_payload_iter(h, it);
            take(out, scratch);
        } while (more > 0);
        nl.set_elems_iter_destroy(it);
        nl.set_free(s);
    }
    for (size_t i = 0; i < ORCH_CHAINS; i++) {
        struct nftnl_chain *c = build_chain(i);
        h = begin(scratch, NFT_MSG_NEWCHAIN, chains[i].table->family, NLM_F_EXCL,
                  SEQ(ITEM_CHAIN, i));
        nl.chain_nlmsg_build_payload(h, c);
        nl.chain_free(c);
        take(out, scratch);
    }
    for (size_t i = 0; i < r->n_rules; i++)
        put_rule(out, scratch, r, i);
    close_batch(out);
}

int orch_nft_batch(const struct orch_rules *r, uint32_t genid, bool owned, struct orch_buf *out,
                   struct orch_err *err)
{
    int e = orch_library_load(&library, err);
    if (!e)
        batch(r, genid, owned, out);
    return e;
}

/* Empties o_host and fills it again; the sequence number of the message that asks for an ack. */
static uint32_t host_batch(const struct orch_rules *r, uint32_t genid, struct orch_buf *out)
{
    cleanup_free char *scratch = orch_xcalloc(1, MESSAGE_BYTES);
    const char *chain = orch_chain_names[ORCH_CHAIN_HOST];
    struct nfgenmsg head = { .nfgen_family = NFPROTO_INET, .version = NFNETLINK_V0 };
    size_t first = r->n_rules;
    while (first && r->rules[first - 1].chain == ORCH_CHAIN_HOST)
        first--;
    bool none = first == r->n_rules;
    open_batch(out, genid);
    size_t m = orch_nl_begin(out, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELRULE, none ? NLM_F_ACK : 0,
                             SEQ(ITEM_CHAIN, ORCH_CHAIN_HOST), &head, sizeof head);
    orch_nl_put(out, NFTA_RULE_TABLE, TABLE, sizeof TABLE);
    orch_nl_put(out, NFTA_RULE_CHAIN, chain, strlen(chain) + 1);
    orch_nl_end(out, m);
    for (size_t i = first; i < r->n_rules; i++)
        put_rule(out, scratch, r, i);
    close_batch(out);
    return none ? SEQ(ITEM_CHAIN, ORCH_CHAIN_HOST) : SEQ(ITEM_RULE, r->n_rules - 1);
}

/* ---- the kernel's answers */

#define NO_NFT \
    "the kernel needs nf_tables with its netdev and inet families, ct, nat, masq, connlimit, " \
    "limit " \
    "and log expressions (modprobe nf_tables nft_ct nft_masq nft_connlimit nft_limit nft_log " \
    "nfnetlink_log)"

static const char *fix_of(int code)
{
    switch (code) {
    case EPERM:
        return "orch needs CAP_NET_ADMIN over the microVM's namespace: run it as an ordinary user, "
               "or give root that capability";
    case ERESTART:
    case EEXIST:
        return "something else changes tables in the microVM's namespace";
    case EMSGSIZE:
        return "the policy is too large for the socket: raise net.core.wmem_max";
    case ENOBUFS:
    case ENOMEM:
        return "memory is short";
    case ENOENT:
    case EOPNOTSUPP:
    case EPROTONOSUPPORT:
    case EINVAL:
        return NO_NFT;
    default:
        return "see `orch doctor`";
    }
}

static int refuse(struct orch_err *err, const char *what, const struct orch_nl_fault *f)
{
    char text[256];
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, f->code, "firewall: %s: %s; %s", what,
                         orch_nl_fault_text(f, text), fix_of(f->code));
}

static int refuse_item(struct orch_err *err, const struct orch_rules *r,
                       const struct orch_nl_fault *f)
{
    char what[ORCH_LABEL + 32];
    item_text(r, f->seq, what, sizeof what);
    return refuse(err, what, f);
}

static int differs(struct orch_err *err, const char *fmt, ...) ORCH_PRINTF(2, 3);
static int differs(struct orch_err *err, const char *fmt, ...)
{
    char what[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, EBADE,
                         "firewall: what the kernel holds is not what was sent: %s; something else "
                         "changes the tables, or this kernel or libnftnl is not one that orch can "
                         "verify",
                         what);
}

static void take_genid(void *ud, const struct nlmsghdr *h)
{
    const uint32_t *id = orch_nl_get(h, sizeof(struct nfgenmsg), NFTA_GEN_ID, 4);
    if (id && (h->nlmsg_type & 0xff) == NFT_MSG_NEWGEN)
        *(uint32_t *)ud = ntohl(*id);
}

/* A request without attributes, whose answer is a number. */
static int get_number(struct orch_nft *n, uint16_t type, orch_nl_fn *fn, uint32_t *out,
                      const char *what, struct orch_err *err)
{
    struct orch_nl_fault f;
    struct nfgenmsg head = { .version = NFNETLINK_V0 };
    char msg[NLMSG_LENGTH(sizeof head)] __attribute__((aligned(4)));
    struct nlmsghdr h = { sizeof msg, type, NLM_F_REQUEST | NLM_F_ACK, 1, 0 };
    memcpy(msg, &h, sizeof h);
    memcpy(msg + sizeof h, &head, sizeof head);
    int e, tries = 0;
    do {
        *out = 0;
        e = orch_nl_talk(n->fd, msg, sizeof msg, 1, fn, out, &f);
    } while (orch_nl_again(e, &tries));
    return e ? refuse(err, what, &f) : 0;
}

static int get_genid(struct orch_nft *n, uint32_t *id, struct orch_err *err)
{
    return get_number(n, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, take_genid, id, "generation",
                      err);
}

struct orch_nft *orch_nft_new(int fd, struct orch_err *err)
{
    if (orch_library_load(&library, err)) {
        close(fd);
        return NULL;
    }
    struct orch_nft *n = orch_xcalloc(1, sizeof *n);
    n->fd = fd;
    orch_nl_setup(fd);
    return n;
}

/* What cannot be deleted goes with the socket. */
static void delete_alive(int fd)
{
    const struct table *t = &tables[TABLE_ALIVE];
    struct nfgenmsg head = { .nfgen_family = t->family, .version = NFNETLINK_V0 };
    struct orch_nl_fault f;
    cleanup_buf struct orch_buf b = { 0 };
    open_batch(&b, 0);
    size_t m = orch_nl_begin(&b, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE, NLM_F_ACK,
                             SEQ(ITEM_TABLE, TABLE_ALIVE), &head, sizeof head);
    orch_nl_put(&b, NFTA_TABLE_NAME, t->name, strlen(t->name) + 1);
    orch_nl_end(&b, m);
    close_batch(&b);
    orch_nl_talk(fd, b.p, b.n, SEQ(ITEM_TABLE, TABLE_ALIVE), NULL, NULL, &f);
}

int orch_nft_release(struct orch_nft *n)
{
    if (!n)
        return -1;
    if (n->committed)
        delete_alive(n->fd);
    int fd = n->fd;
    free(n);
    return fd;
}

bool orch_nft_owned(const struct orch_nft *n)
{
    return n->owned;
}

/* A batch was sent: where the answer was lost, what is read back is the answer. */
static int settle(struct orch_nft *n, const struct orch_rules *r, int sent,
                  const struct orch_nl_fault *f, struct orch_err *err)
{
    if (sent && sent != -ENOBUFS)
        return refuse_item(err, r, f);
    int e = orch_nft_verify(n, r, err);
    return e && sent ? refuse_item(err, r, f) : e;
}

int orch_nft_commit(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err)
{
    struct orch_nl_fault f;
    cleanup_buf struct orch_buf out = { 0 };
    uint32_t genid;
    int e = get_genid(n, &genid, err);
    if (e)
        return e;
    n->owned = true;
    batch(r, genid, true, &out);
    const uint32_t last = SEQ(ITEM_RULE, r->n_rules - 1);
    e = orch_nl_talk(n->fd, out.p, out.n, last, NULL, NULL, &f);
    /* flags this kernel does not know */
    if (e == -EOPNOTSUPP && f.seq == SEQ(ITEM_TABLE, TABLE_NETDEV)) {
        n->owned = false;
        orch_buf_consume(&out, out.n);
        batch(r, genid, false, &out);
        e = orch_nl_talk(n->fd, out.p, out.n, last, NULL, NULL, &f);
    }
    n->committed = !e || e == -ENOBUFS;
    return settle(n, r, e, &f, err);
}

int orch_nft_rehost(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err)
{
    struct orch_nl_fault f;
    cleanup_buf struct orch_buf out = { 0 };
    uint32_t genid;
    int e = get_genid(n, &genid, err);
    if (e)
        return e;
    uint32_t last = host_batch(r, genid, &out);
    return settle(n, r, orch_nl_talk(n->fd, out.p, out.n, last, NULL, NULL, &f), &f, err);
}

/* ---- reading back */

struct reader {
    const struct orch_rules *r;
    bool owned;
    size_t n_tables, n_chains, n_sets, n_rules;
    /* elements of the set that is read */
    struct element *v;
    size_t n_v, cap_v;
    bool odd;
    struct orch_err *err;
    int bad;
};

static const char *text_of(const char *s)
{
    return s ? s : "";
}

static bool same_text(const char *a, const char *b)
{
    return !strcmp(text_of(a), text_of(b));
}

static void read_table(void *ud, const struct nlmsghdr *h)
{
    struct reader *d = ud;
    struct nftnl_table *t = nl.table_alloc();
    size_t i = d->n_tables++;
    if (d->bad)
        ;
    else if (nl.table_nlmsg_parse(h, t) < 0 || i >= ORCH_ARRAY_LEN(tables) ||
             !same_text(nl.table_get_str(t, NFTNL_TABLE_NAME), tables[i].name) ||
             nl.table_get_u32(t, NFTNL_TABLE_FAMILY) != tables[i].family ||
             nl.table_get_u32(t, NFTNL_TABLE_FLAGS) != table_flags(i, d->owned))
        d->bad = differs(d->err, "table \"%s\" of family %u with flags %u",
                         text_of(nl.table_get_str(t, NFTNL_TABLE_NAME)),
                         nl.table_get_u32(t, NFTNL_TABLE_FAMILY),
                         nl.table_get_u32(t, NFTNL_TABLE_FLAGS));
    nl.table_free(t);
}

static bool same_chain(const struct nftnl_chain *c, size_t i)
{
    const struct chain *d = &chains[i];
    bool hooked = d->type;
    if (!same_text(nl.chain_get_str(c, NFTNL_CHAIN_TABLE), d->table->name) ||
        !same_text(nl.chain_get_str(c, NFTNL_CHAIN_NAME), orch_chain_names[i]) ||
        nl.chain_get_u32(c, NFTNL_CHAIN_FAMILY) != d->table->family ||
        nl.chain_is_set(c, NFTNL_CHAIN_HOOKNUM) != hooked)
        return false;
    return !hooked || (same_text(nl.chain_get_str(c, NFTNL_CHAIN_TYPE), d->type) &&
                       nl.chain_get_u32(c, NFTNL_CHAIN_HOOKNUM) == d->hook &&
                       nl.chain_get_s32(c, NFTNL_CHAIN_PRIO) == d->prio &&
                       nl.chain_get_u32(c, NFTNL_CHAIN_POLICY) == d->policy &&
                       (d->table->family != NFPROTO_NETDEV ||
                        same_text(nl.chain_get_str(c, NFTNL_CHAIN_DEV), ORCH_NET_TAP)));
}

static void read_chain(void *ud, const struct nlmsghdr *h)
{
    struct reader *d = ud;
    struct nftnl_chain *c = nl.chain_alloc();
    size_t i = d->n_chains++;
    if (d->bad)
        ;
    else if (nl.chain_nlmsg_parse(h, c) < 0 || i >= ORCH_CHAINS || !same_chain(c, i))
        d->bad = differs(d->err, "chain \"%s\", number %zu",
                         text_of(nl.chain_get_str(c, NFTNL_CHAIN_NAME)), i + 1);
    nl.chain_free(c);
}

static void read_set(void *ud, const struct nlmsghdr *h)
{
    struct reader *d = ud;
    struct nftnl_set *s = nl.set_alloc();
    size_t i = d->n_sets++;
    if (d->bad)
        ;
    else if (nl.set_nlmsg_parse(h, s) < 0 || i >= d->r->n_sets ||
             !same_text(nl.set_get_str(s, NFTNL_SET_TABLE), TABLE) ||
             !same_text(nl.set_get_str(s, NFTNL_SET_NAME), d->r->sets[i].name) ||
             nl.set_get_u32(s, NFTNL_SET_FAMILY) != NFPROTO_INET ||
             nl.set_get_u32(s, NFTNL_SET_FLAGS) != NFT_SET_INTERVAL ||
             nl.set_get_u32(s, NFTNL_SET_KEY_LEN) != 4 || nl.set_is_set(s, NFTNL_SET_DATA_TYPE) ||
             nl.set_is_set(s, NFTNL_SET_TIMEOUT))
        d->bad = differs(d->err, "set \"%s\", number %zu",
                         text_of(nl.set_get_str(s, NFTNL_SET_NAME)), i + 1);
    nl.set_free(s);
}

static int read_element(struct nftnl_set_elem *e, void *ud)
{
    struct reader *d = ud;
    uint32_t n = 0, flags = 0;
    const uint32_t *key = nl.set_elem_get(e, NFTNL_SET_ELEM_KEY, &n);
    if (nl.set_elem_is_set(e, NFTNL_SET_ELEM_FLAGS))
        flags = nl.set_elem_get_u32(e, NFTNL_SET_ELEM_FLAGS);
    if (!key || n != 4 || (flags & ~(uint32_t)NFT_SET_ELEM_INTERVAL_END) || d->n_v == d->cap_v) {
        d->odd = true;
        return 0;
    }
    d->v[d->n_v++] = (struct element){ ntohl(*key), flags };
    return 0;
}

static void read_elements(void *ud, const struct nlmsghdr *h)
{
    struct reader *d = ud;
    struct nftnl_set *s = nl.set_alloc();
    if (nl.set_elems_nlmsg_parse(h, s) < 0)
        d->odd = true;
    nl.set_elem_foreach(s, read_element, d);
    nl.set_free(s);
}

static int by_key(const void *a, const void *b)
{
    uint32_t x = ((const struct element *)a)->key, y = ((const struct element *)b)->key;
    return (x > y) - (x < y);
}

static bool zeros(const void *p, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (((const uint8_t *)p)[i])
            return false;
    return true;
}

/* Attribute by attribute; one that is absent is the same as one that is zero. */
static bool same_expr(const struct nftnl_expr *a, const struct nftnl_expr *b)
{
    const char *name = nl.expr_get_str(a, NFTNL_EXPR_NAME);
    if (!same_text(name, nl.expr_get_str(b, NFTNL_EXPR_NAME)))
        return false;
    if (same_text(name, "counter"))
        return true;
    for (uint16_t id = NFTNL_EXPR_BASE; id < 16; id++) {
        uint32_t na = 0, nb = 0;
        if (id == NFTNL_EXPR_LOOKUP_SET_ID && same_text(name, "lookup")) /* of the batch only */
            continue;
        const void *va = nl.expr_is_set(a, id) ? nl.expr_get(a, id, &na) : NULL;
        const void *vb = nl.expr_is_set(b, id) ? nl.expr_get(b, id, &nb) : NULL;
        if (va && vb ? na != nb || memcmp(va, vb, na) : !zeros(va ? va : vb, va ? na : nb))
            return false;
    }
    return true;
}

static bool same_exprs(const struct nftnl_rule *a, const struct nftnl_rule *b)
{
    struct nftnl_expr_iter *ia = nl.expr_iter_create(a), *ib = nl.expr_iter_create(b);
    const struct nftnl_expr *ea, *eb;
    bool same;
    do {
        ea = nl.expr_iter_next(ia);
        eb = nl.expr_iter_next(ib);
        same = ea && eb ? same_expr(ea, eb) : ea == eb;
    } while (same && ea);
    nl.expr_iter_destroy(ia);
    nl.expr_iter_destroy(ib);
    return same;
}

static bool same_rule(const struct nftnl_rule *a, const struct nftnl_rule *b)
{
    uint32_t na = 0, nb = 0;
    const void *ua = nl.rule_get_data(a, NFTNL_RULE_USERDATA, &na),
               *ub = nl.rule_get_data(b, NFTNL_RULE_USERDATA, &nb);
    return same_text(nl.rule_get_str(a, NFTNL_RULE_TABLE), nl.rule_get_str(b, NFTNL_RULE_TABLE)) &&
           same_text(nl.rule_get_str(a, NFTNL_RULE_CHAIN), nl.rule_get_str(b, NFTNL_RULE_CHAIN)) &&
           nl.rule_get_u32(a, NFTNL_RULE_FAMILY) == nl.rule_get_u32(b, NFTNL_RULE_FAMILY) &&
           na == nb && ua && ub && !memcmp(ua, ub, na) && same_exprs(a, b);
}

static void read_rule(void *ud, const struct nlmsghdr *h)
{
    struct reader *d = ud;
    size_t i = d->n_rules++;
    if (d->bad)
        return;
    if (i >= d->r->n_rules) {
        d->bad = differs(d->err, "a rule more");
        return;
    }
    struct nftnl_rule *got = nl.rule_alloc(), *want = build_rule(d->r, i);
    if (nl.rule_nlmsg_parse(h, got) < 0 || !same_rule(got, want))
        d->bad = differs(d->err, "rule \"%s\", the %zu. of all", d->r->rules[i].label, i + 1);
    nl.rule_free(got);
    nl.rule_free(want);
}

/* Everything of one kind in the namespace, or the elements of one set. */
static int dump(struct orch_nft *n, uint16_t type, const char *set, orch_nl_fn *fn, void *ud,
                struct orch_err *err)
{
    static const char *const what[] = {
        [NFT_MSG_GETTABLE] = "reading tables", [NFT_MSG_GETCHAIN] = "reading chains",
        [NFT_MSG_GETSET] = "reading sets",     [NFT_MSG_GETSETELEM] = "reading elements",
        [NFT_MSG_GETRULE] = "reading rules",
    };
    struct orch_nl_fault f;
    cleanup_buf struct orch_buf b = { 0 };
    struct nfgenmsg head = { .nfgen_family = set ? NFPROTO_INET : NFPROTO_UNSPEC,
                             .version = NFNETLINK_V0 };
    size_t at = orch_nl_begin(&b, NFNL_SUBSYS_NFTABLES << 8 | type, NLM_F_DUMP, 1, &head,
                              sizeof head);
    if (set) {
        orch_nl_put(&b, NFTA_SET_ELEM_LIST_TABLE, TABLE, sizeof TABLE);
        orch_nl_put(&b, NFTA_SET_ELEM_LIST_SET, set, strlen(set) + 1);
    }
    orch_nl_end(&b, at);
    return orch_nl_talk(n->fd, b.p, b.n, 1, fn, ud, &f) ? refuse(err, what[type], &f) : 0;
}

static int verify_elements(struct orch_nft *n, struct reader *d, const struct orch_set *s,
                           struct orch_err *err)
{
    cleanup_free struct element *want = orch_xcalloc(2 * s->n + 1, sizeof *want);
    cleanup_free struct element *got = orch_xcalloc(2 * s->n + 1, sizeof *got);
    size_t n_want = list_elements(s, want);
    d->v = got;
    d->n_v = 0;
    d->cap_v = n_want;
    int e = dump(n, NFT_MSG_GETSETELEM, s->name, read_elements, d, err);
    if (e)
        return e;
    qsort(got, d->n_v, sizeof *got, by_key);
    bool same = !d->odd && d->n_v == n_want;
    for (size_t i = 0; same && i < n_want; i++)
        same = got[i].key == want[i].key && got[i].end == want[i].end;
    return same ? 0 : differs(err, "elements of set %s", s->name);
}

static int read_back(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err)
{
    struct reader d = { .r = r, .owned = n->owned, .err = err };
    uint32_t before, after;
    int e = get_genid(n, &before, err);
    e = e ? e : dump(n, NFT_MSG_GETTABLE, NULL, read_table, &d, err);
    e = e ? e : dump(n, NFT_MSG_GETCHAIN, NULL, read_chain, &d, err);
    e = e ? e : dump(n, NFT_MSG_GETSET, NULL, read_set, &d, err);
    e = e ? e : dump(n, NFT_MSG_GETRULE, NULL, read_rule, &d, err);
    e = e ? e : d.bad;
    if (!e && (d.n_tables != ORCH_ARRAY_LEN(tables) || d.n_chains != ORCH_CHAINS ||
               d.n_sets != r->n_sets || d.n_rules != r->n_rules))
        e = differs(err, "%zu tables, %zu chains, %zu sets, %zu rules instead of %zu, %d, %zu, %zu",
                    d.n_tables, d.n_chains, d.n_sets, d.n_rules, ORCH_ARRAY_LEN(tables),
                    ORCH_CHAINS, r->n_sets, r->n_rules);
    for (size_t i = 0; !e && i < r->n_sets; i++)
        e = verify_elements(n, &d, &r->sets[i], err);
    e = e ? e : get_genid(n, &after, err);
    if (!e && before != after)
        e = differs(err, "generation %u became %u while it was read", before, after);
    if (!e)
        n->genid = after;
    return e;
}

int orch_nft_verify(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err)
{
    int e, tries = 0;
    do
        e = read_back(n, r, err);
    while (orch_nl_again(e, &tries));
    return e;
}

int orch_nft_changed(struct orch_nft *n, struct orch_err *err)
{
    uint32_t id;
    int e = get_genid(n, &id, err);
    return e ? e : id != n->genid;
}

struct counter {
    char label[ORCH_LABEL];
    uint64_t packets, bytes;
};

static void read_counter(void *ud, const struct nlmsghdr *h)
{
    struct nftnl_rule *r = nl.rule_alloc();
    uint32_t n = 0;
    const uint8_t *comment = nl.rule_nlmsg_parse(h, r) < 0
                                 ? NULL
                                 : nl.rule_get_data(r, NFTNL_RULE_USERDATA, &n);
    if (comment && n > 2 && comment[0] == NFTNL_UDATA_RULE_COMMENT && comment[1] == n - 2 &&
        !comment[n - 1]) {
        struct nftnl_expr_iter *it = nl.expr_iter_create(r);
        for (const struct nftnl_expr *e; (e = nl.expr_iter_next(it));)
            if (same_text(nl.expr_get_str(e, NFTNL_EXPR_NAME), "counter")) {
                struct counter c = { .packets = nl.expr_get_u64(e, NFTNL_EXPR_CTR_PACKETS),
                                     .bytes = nl.expr_get_u64(e, NFTNL_EXPR_CTR_BYTES) };
                snprintf(c.label, sizeof c.label, "%s", (const char *)comment + 2);
                orch_buf_add(ud, &c, sizeof c);
            }
        nl.expr_iter_destroy(it);
    }
    nl.rule_free(r);
}

int orch_nft_counters(struct orch_nft *n,
                      void (*fn)(void *ud, const char *label, uint64_t packets, uint64_t bytes),
                      void *ud, struct orch_err *err)
{
    cleanup_buf struct orch_buf all = { 0 };
    int e, tries = 0;
    do {
        orch_buf_consume(&all, all.n);
        e = dump(n, NFT_MSG_GETRULE, NULL, read_counter, &all, err);
    } while (orch_nl_again(e, &tries));
    const struct counter *c = (const void *)all.p;
    for (size_t i = 0; !e && i < all.n / sizeof *c; i++)
        fn(ud, c[i].label, c[i].packets, c[i].bytes);
    return e;
}

static void take_entries(void *ud, const struct nlmsghdr *h)
{
    const uint32_t *n = orch_nl_get(h, sizeof(struct nfgenmsg), CTA_STATS_GLOBAL_ENTRIES, 4);
    if (n)
        *(uint32_t *)ud = ntohl(*n);
}

int orch_nft_connections(struct orch_nft *n, uint32_t *out, struct orch_err *err)
{
    return get_number(n, NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET_STATS, take_entries, out,
                      "connections", err);
}
