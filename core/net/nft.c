#include "nft_int.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <stdio.h>
#include <string.h>

/* libnftnl writes without a bound; no message is longer than one nested list of 64 KiB and its
 * frame. */
#define MESSAGE_BYTES (128 * 1024)

/* A sequence number says what its message is about: the kernel returns it with an error. */
enum item { ITEM_BATCH, ITEM_TABLE, ITEM_SET, ITEM_ELEMENTS, ITEM_CHAIN, ITEM_RULE };
#define SEQ(item, index) ((uint32_t)(item) << 16 | (uint32_t)(index))

static void item_text(const struct orch_rules *r, uint32_t seq, char *out, size_t n)
{
    size_t i = seq & 0xffff;
    switch ((enum item)(seq >> 16)) {
    case ITEM_TABLE:
        i = i < ORCH_NFT_TABLES ? i : ORCH_NFT_INET;
        snprintf(out, n, "table %s %s",
                 orch_nft_tables[i].family == NFPROTO_NETDEV ? "netdev" : "inet",
                 orch_nft_tables[i].name);
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
    struct nftnl_rule *rule = orch_nft_build_rule(r, i);
    struct nlmsghdr *h = begin(scratch, NFT_MSG_NEWRULE,
                               orch_nft_chains[r->rules[i].chain].table->family,
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
    for (size_t i = 0; i < ORCH_NFT_TABLES; i++) {
        struct nftnl_table *t = orch_nft_build_table(i, owned);
        h = begin(scratch, NFT_MSG_NEWTABLE, orch_nft_tables[i].family, NLM_F_EXCL,
                  SEQ(ITEM_TABLE, i));
        nl.table_nlmsg_build_payload(h, t);
        nl.table_free(t);
        take(out, scratch);
    }
    for (size_t i = 0; i < r->n_sets; i++) {
        struct nftnl_set *s = orch_nft_build_set(r, i);
        h = begin(scratch, NFT_MSG_NEWSET, NFPROTO_INET, NLM_F_EXCL, SEQ(ITEM_SET, i));
        nl.set_nlmsg_build_payload(h, s);
        take(out, scratch);
        orch_nft_add_elements(s, &r->sets[i]);
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
        struct nftnl_chain *c = orch_nft_build_chain(i);
        h = begin(scratch, NFT_MSG_NEWCHAIN, orch_nft_chains[i].table->family, NLM_F_EXCL,
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
    int e = orch_nft_load(err);
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
    orch_nl_put(out, NFTA_RULE_TABLE, ORCH_NFT_TABLE, sizeof ORCH_NFT_TABLE);
    orch_nl_put(out, NFTA_RULE_CHAIN, chain, strlen(chain) + 1);
    orch_nl_end(out, m);
    for (size_t i = first; i < r->n_rules; i++)
        put_rule(out, scratch, r, i);
    close_batch(out);
    return none ? SEQ(ITEM_CHAIN, ORCH_CHAIN_HOST) : SEQ(ITEM_RULE, r->n_rules - 1);
}

/* ---- the socket */

struct orch_nft *orch_nft_new(int fd, struct orch_err *err)
{
    if (orch_nft_load(err)) {
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
    const struct orch_nft_table *t = &orch_nft_tables[ORCH_NFT_ALIVE];
    struct nfgenmsg head = { .nfgen_family = t->family, .version = NFNETLINK_V0 };
    struct orch_nl_fault f;
    cleanup_buf struct orch_buf b = { 0 };
    open_batch(&b, 0);
    size_t m = orch_nl_begin(&b, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE, NLM_F_ACK,
                             SEQ(ITEM_TABLE, ORCH_NFT_ALIVE), &head, sizeof head);
    orch_nl_put(&b, NFTA_TABLE_NAME, t->name, strlen(t->name) + 1);
    orch_nl_end(&b, m);
    close_batch(&b);
    orch_nl_talk(fd, b.p, b.n, SEQ(ITEM_TABLE, ORCH_NFT_ALIVE), NULL, NULL, &f);
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

static int refuse_item(struct orch_err *err, const struct orch_rules *r,
                       const struct orch_nl_fault *f)
{
    char what[ORCH_LABEL + 32];
    item_text(r, f->seq, what, sizeof what);
    return orch_nft_refuse(err, what, f);
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
    int e = orch_nft_genid(n, &genid, err);
    if (e)
        return e;
    n->owned = true;
    batch(r, genid, true, &out);
    const uint32_t last = SEQ(ITEM_RULE, r->n_rules - 1);
    e = orch_nl_talk(n->fd, out.p, out.n, last, NULL, NULL, &f);
    /* flags this kernel does not know */
    if (e == -EOPNOTSUPP && f.seq == SEQ(ITEM_TABLE, ORCH_NFT_NETDEV)) {
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
    int e = orch_nft_genid(n, &genid, err);
    if (e)
        return e;
    uint32_t last = host_batch(r, genid, &out);
    return settle(n, r, orch_nl_talk(n->fd, out.p, out.n, last, NULL, NULL, &f), &f, err);
}
