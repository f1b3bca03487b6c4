/* nf_tables of one microVM's network namespace, over the one socket that was opened inside it.
 * The only user of libnftnl, which is loaded at the first use: linked, it would cost every start
 * of orch 0.1 ms.
 *
 * The tables belong to the socket (OWNER), so that no other program may change them. "orch_alive"
 * goes when it closes: however orch ends, the kernel is done with that before its parent hears of
 * it, and nothing is forwarded any more. So nobody else may hold the socket, not even a child of
 * orch beyond its exec. The other two stay (PERSIST); kernels before 6.9 do not know that flag, and
 * get these two without an owner; owned says so. Before 5.12 there are no owners: refused. */
#ifndef ORCH_NET_NFT_H
#define ORCH_NET_NFT_H

#include "ruleset.h"

struct orch_nft;

/* Takes fd (NETLINK_NETFILTER, bound), also on failure. */
struct orch_nft *orch_nft_new(int fd, struct orch_err *err);
/* Ends forwarding at once, frees n (NULL is fine) and returns its socket, which is the caller's to
 * close, after some 10 ms: before, the kernel would wait in close until no packet can be in what
 * was deleted. */
int orch_nft_release(struct orch_nft *n);

/* The messages that commit sends: one atomic batch that applies only to generation `genid`.
 * Pure. */
int orch_nft_batch(const struct orch_rules *r, uint32_t genid, bool owned, struct orch_buf *out,
                   struct orch_err *err);

/* Makes the tables in a namespace that has none and verifies them. Class ISOLATION; what was
 * refused, the kernel's words, and the fix. */
int orch_nft_commit(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err);
/* r: what is in force, but for the host's addresses (orch_rules_rehost). Replaces those in one
 * batch and verifies all of it; what fails leaves the tables in doubt. */
int orch_nft_rehost(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err);
/* Reads all tables, chains, sets, elements and rules of the namespace and compares them with r;
 * what is more or less than r is an error that names the first difference. */
int orch_nft_verify(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err);
/* Was anything changed since the last verify? 0, 1, or a negative errno. Some µs. */
int orch_nft_changed(struct orch_nft *n, struct orch_err *err);
bool orch_nft_owned(const struct orch_nft *n);

/* Each rule's label with what it counted, in order. */
int orch_nft_counters(struct orch_nft *n,
                      void (*fn)(void *ud, const char *label, uint64_t packets, uint64_t bytes),
                      void *ud, struct orch_err *err);
/* Flows that connection tracking knows in the namespace. */
int orch_nft_connections(struct orch_nft *n, uint32_t *out, struct orch_err *err);

#endif
