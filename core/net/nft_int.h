/* Inside core/net/nft*.c, which alone use libnftnl. */
#ifndef ORCH_NET_NFT_INT_H
#define ORCH_NET_NFT_INT_H

#include "netlink.h"
#include "nft.h"

#include <libnftnl/chain.h>
#include <libnftnl/common.h>
#include <libnftnl/expr.h>
#include <libnftnl/rule.h>
#include <libnftnl/set.h>
#include <libnftnl/table.h>
#include <libnftnl/udata.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>

/* What is used of libnftnl. */
#define ORCH_NFTNL(X) \
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

/* Its functions, once orch_nft_load has returned 0. */
extern struct orch_nftnl {
#define X(name) __typeof__(&nftnl_##name) name;
    ORCH_NFTNL(X)
#undef X
} orch_nftnl;
#define nl orch_nftnl
int orch_nft_load(struct orch_err *err);

struct orch_nft {
    int fd;
    bool owned, committed;
    uint32_t genid; /* of the last verify */
};

#define ORCH_NFT_TABLE "orch"
enum { ORCH_NFT_ALIVE, ORCH_NFT_NETDEV, ORCH_NFT_INET, ORCH_NFT_TABLES };
extern const struct orch_nft_table {
    const char *name;
    uint8_t family;
} orch_nft_tables[ORCH_NFT_TABLES];

extern const struct orch_nft_chain {
    const struct orch_nft_table *table;
    const char *type; /* NULL: reached by goto and jump alone */
    uint32_t hook;
    int32_t prio;
    uint32_t policy;
} orch_nft_chains[ORCH_CHAINS];

/* nft_build.c: objects are the caller's to free; i is the index in what describes it. */
uint32_t orch_nft_table_flags(size_t table, bool owned);
struct nftnl_table *orch_nft_build_table(size_t i, bool owned);
struct nftnl_chain *orch_nft_build_chain(size_t i);
struct nftnl_set *orch_nft_build_set(const struct orch_rules *r, size_t i);
struct nftnl_rule *orch_nft_build_rule(const struct orch_rules *rules, size_t i);
void orch_nft_add_elements(struct nftnl_set *s, const struct orch_set *set);
/* What the kernel holds for an interval: its first address, and the one behind its last, which
 * there is none of at the top. */
struct orch_nft_element {
    uint32_t key;
    bool end;
};
/* out: 2 * s->n; returns how many. */
size_t orch_nft_list_elements(const struct orch_set *s, struct orch_nft_element *out);

/* nft_read.c */
int orch_nft_genid(struct orch_nft *n, uint32_t *id, struct orch_err *err);
int orch_nft_refuse(struct orch_err *err, const char *what, const struct orch_nl_fault *f);

#endif
