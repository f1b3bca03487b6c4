/* What the kernel says and holds. */
#include "nft_int.h"

#include "../launch/wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <stdio.h>
#include <string.h>

#define NO_NFT \
    "the kernel needs nf_tables with its netdev and inet families, ct, nat, masq, connlimit, " \
    "limit and log expressions (modprobe nf_tables nft_ct nft_masq nft_connlimit nft_limit " \
    "nft_log nfnetlink_log)"

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

int orch_nft_refuse(struct orch_err *err, const char *what, const struct orch_nl_fault *f)
{
    char text[256];
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, f->code, "firewall: %s: %s; %s", what,
                         orch_nl_fault_text(f, text), fix_of(f->code));
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
    return e ? orch_nft_refuse(err, what, &f) : 0;
}

int orch_nft_genid(struct orch_nft *n, uint32_t *id, struct orch_err *err)
{
    return get_number(n, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, take_genid, id, "generation",
                      err);
}

struct reader {
    const struct orch_rules *r;
    bool owned;
    size_t n_tables, n_chains, n_sets, n_rules;
    /* elements of the set that is read */
    struct orch_nft_element *v;
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
    else if (nl.table_nlmsg_parse(h, t) < 0 || i >= ORCH_NFT_TABLES ||
             !same_text(nl.table_get_str(t, NFTNL_TABLE_NAME), orch_nft_tables[i].name) ||
             nl.table_get_u32(t, NFTNL_TABLE_FAMILY) != orch_nft_tables[i].family ||
             nl.table_get_u32(t, NFTNL_TABLE_FLAGS) != orch_nft_table_flags(i, d->owned))
        d->bad = differs(d->err, "table \"%s\" of family %u with flags %u",
                         text_of(nl.table_get_str(t, NFTNL_TABLE_NAME)),
                         nl.table_get_u32(t, NFTNL_TABLE_FAMILY),
                         nl.table_get_u32(t, NFTNL_TABLE_FLAGS));
    nl.table_free(t);
}

static bool same_chain(const struct nftnl_chain *c, size_t i)
{
    const struct orch_nft_chain *d = &orch_nft_chains[i];
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
             !same_text(nl.set_get_str(s, NFTNL_SET_TABLE), ORCH_NFT_TABLE) ||
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
    d->v[d->n_v++] = (struct orch_nft_element){ ntohl(*key), flags };
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
    uint32_t x = ((const struct orch_nft_element *)a)->key,
             y = ((const struct orch_nft_element *)b)->key;
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
    struct nftnl_rule *got = nl.rule_alloc(), *want = orch_nft_build_rule(d->r, i);
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
        orch_nl_put(&b, NFTA_SET_ELEM_LIST_TABLE, ORCH_NFT_TABLE, sizeof ORCH_NFT_TABLE);
        orch_nl_put(&b, NFTA_SET_ELEM_LIST_SET, set, strlen(set) + 1);
    }
    orch_nl_end(&b, at);
    return orch_nl_talk(n->fd, b.p, b.n, 1, fn, ud, &f) ? orch_nft_refuse(err, what[type], &f) : 0;
}

static int verify_elements(struct orch_nft *n, struct reader *d, const struct orch_set *s,
                           struct orch_err *err)
{
    cleanup_free struct orch_nft_element *want = orch_xcalloc(2 * s->n + 1, sizeof *want);
    cleanup_free struct orch_nft_element *got = orch_xcalloc(2 * s->n + 1, sizeof *got);
    size_t n_want = orch_nft_list_elements(s, want);
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
    int e = orch_nft_genid(n, &before, err);
    e = e ? e : dump(n, NFT_MSG_GETTABLE, NULL, read_table, &d, err);
    e = e ? e : dump(n, NFT_MSG_GETCHAIN, NULL, read_chain, &d, err);
    e = e ? e : dump(n, NFT_MSG_GETSET, NULL, read_set, &d, err);
    e = e ? e : dump(n, NFT_MSG_GETRULE, NULL, read_rule, &d, err);
    e = e ? e : d.bad;
    if (!e && (d.n_tables != ORCH_NFT_TABLES || d.n_chains != ORCH_CHAINS ||
               d.n_sets != r->n_sets || d.n_rules != r->n_rules))
        e = differs(err, "%zu tables, %zu chains, %zu sets, %zu rules instead of %d, %d, %zu, %zu",
                    d.n_tables, d.n_chains, d.n_sets, d.n_rules, ORCH_NFT_TABLES, ORCH_CHAINS,
                    r->n_sets, r->n_rules);
    for (size_t i = 0; !e && i < r->n_sets; i++)
        e = verify_elements(n, &d, &r->sets[i], err);
    e = e ? e : orch_nft_genid(n, &after, err);
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
    int e = orch_nft_genid(n, &id, err);
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
