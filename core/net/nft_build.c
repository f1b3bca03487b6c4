/* The tables, and the rules as libnftnl's objects. */
#include "nft_int.h"

#include "../base/library.h"
#include "../launch/wire.h"

#include <arpa/inet.h>
#include <linux/netfilter.h>
#include <string.h>

#define F_PERSIST 4 /* NFT_TABLE_F_PERSIST, Linux 6.9 */
#define TYPE_IPV4 7 /* how the nft program calls the sets' key */

struct orch_nftnl orch_nftnl;

ORCH_LIBRARY(orch_nftnl, ORCH_NFTNL, .what = "firewall", .file = "libnftnl.so.11",
             .package = "libnftnl11", .prefix = "nftnl_", .cls = ORCH_CLASS_ISOLATION);

int orch_nft_load(struct orch_err *err)
{
    return orch_library_load(&library, err);
}

const struct orch_nft_table orch_nft_tables[ORCH_NFT_TABLES] = {
    [ORCH_NFT_ALIVE] = { "orch_alive", NFPROTO_INET },
    [ORCH_NFT_NETDEV] = { ORCH_NFT_TABLE, NFPROTO_NETDEV },
    [ORCH_NFT_INET] = { ORCH_NFT_TABLE, NFPROTO_INET },
};

#define IN(table) &orch_nft_tables[ORCH_NFT_##table]
const struct orch_nft_chain orch_nft_chains[ORCH_CHAINS] = {
    [ORCH_CHAIN_ALIVE] = { IN(ALIVE), "filter", NF_INET_FORWARD, -1, NF_ACCEPT },
    [ORCH_CHAIN_TAP] = { IN(NETDEV), "filter", NF_NETDEV_INGRESS, 0, NF_DROP },
    [ORCH_CHAIN_TAP_DENIED] = { .table = IN(NETDEV) },
    [ORCH_CHAIN_FORWARD] = { IN(INET), "filter", NF_INET_FORWARD, 0, NF_DROP },
    [ORCH_CHAIN_INPUT] = { IN(INET), "filter", NF_INET_LOCAL_IN, 0, NF_DROP },
    [ORCH_CHAIN_OUTPUT] = { IN(INET), "filter", NF_INET_LOCAL_OUT, 0, NF_DROP },
    [ORCH_CHAIN_NAT] = { IN(INET), "nat", NF_INET_POST_ROUTING, 100, NF_DROP },
    [ORCH_CHAIN_GUEST] = { .table = IN(INET) },
    [ORCH_CHAIN_ALLOW] = { .table = IN(INET) },
    [ORCH_CHAIN_FLOW] = { .table = IN(INET) },
    [ORCH_CHAIN_DENIED] = { .table = IN(INET) },
    [ORCH_CHAIN_HOST] = { .table = IN(INET) },
};

uint32_t orch_nft_table_flags(size_t table, bool owned)
{
    if (table == ORCH_NFT_ALIVE)
        return NFT_TABLE_F_OWNER;
    return owned ? (uint32_t)NFT_TABLE_F_OWNER | F_PERSIST : 0;
}

struct nftnl_table *orch_nft_build_table(size_t i, bool owned)
{
    struct nftnl_table *t = nl.table_alloc();
    nl.table_set_str(t, NFTNL_TABLE_NAME, orch_nft_tables[i].name);
    nl.table_set_u32(t, NFTNL_TABLE_FAMILY, orch_nft_tables[i].family);
    nl.table_set_u32(t, NFTNL_TABLE_FLAGS, orch_nft_table_flags(i, owned));
    return t;
}

struct nftnl_chain *orch_nft_build_chain(size_t i)
{
    const struct orch_nft_chain *d = &orch_nft_chains[i];
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

struct nftnl_set *orch_nft_build_set(const struct orch_rules *r, size_t i)
{
    struct nftnl_set *s = nl.set_alloc();
    nl.set_set_str(s, NFTNL_SET_TABLE, ORCH_NFT_TABLE);
    nl.set_set_str(s, NFTNL_SET_NAME, r->sets[i].name);
    nl.set_set_u32(s, NFTNL_SET_FAMILY, NFPROTO_INET);
    nl.set_set_u32(s, NFTNL_SET_ID, (uint32_t)i + 1);
    nl.set_set_u32(s, NFTNL_SET_FLAGS, NFT_SET_INTERVAL);
    nl.set_set_u32(s, NFTNL_SET_KEY_TYPE, TYPE_IPV4);
    nl.set_set_u32(s, NFTNL_SET_KEY_LEN, 4);
    return s;
}

size_t orch_nft_list_elements(const struct orch_set *s, struct orch_nft_element *out)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) {
        out[n++] = (struct orch_nft_element){ s->v[i].first, false };
        if (s->v[i].last != UINT32_MAX)
            out[n++] = (struct orch_nft_element){ s->v[i].last + 1, true };
    }
    return n;
}

void orch_nft_add_elements(struct nftnl_set *s, const struct orch_set *set)
{
    cleanup_free struct orch_nft_element *v = orch_xcalloc(2 * set->n + 1, sizeof *v);
    size_t n = orch_nft_list_elements(set, v);
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

struct nftnl_rule *orch_nft_build_rule(const struct orch_rules *rules, size_t i)
{
    const struct orch_rule *d = &rules->rules[i];
    const struct orch_nft_table *table = orch_nft_chains[d->chain].table;
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
