/* nf_tables of one microVM's network namespace, over the one socket that was opened inside it.
 * The only user of libnftnl, which is loaded at the first use: linked, it would cost every start
 * of orch 0.1 ms.
 *
 * The two tables belong to the socket (OWNER), so that no other program may change them, and
 * stay when it closes (PERSIST). Kernels before 6.9 know only half of that and get neither;
 * owned says so. */
#ifndef ORCH_NET_NFT_H
#define ORCH_NET_NFT_H

#include "ruleset.h"

struct orch_nft;

/* Takes fd (NETLINK_NETFILTER, bound), also on failure. */
struct orch_nft *orch_nft_new(int fd, struct orch_err *err);
void orch_nft_free(struct orch_nft *n); /* closes the socket; the tables stay */

/* The messages that commit sends: one atomic batch that applies only to generation `genid`.
 * Pure. */
int orch_nft_batch(const struct orch_rules *r, uint32_t genid, bool owned, struct orch_buf *out,
                   struct orch_err *err);

/* Makes the tables in a namespace that has none and verifies them. Class ISOLATION; what was
 * refused, the kernel's words, and the fix. */
int orch_nft_commit(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err);
/* Reads all tables, chains, sets, elements and rules of the namespace and compares them with r;
 * what is more or less than r is an error that names the first difference. */
int orch_nft_verify(struct orch_nft *n, const struct orch_rules *r, struct orch_err *err);
/* Was anything changed since the last verify? 0, 1, or a negative errno. 3 µs. */
int orch_nft_changed(struct orch_nft *n, struct orch_err *err);
bool orch_nft_owned(const struct orch_nft *n);

/* Each rule's label with what it counted, in order. */
int orch_nft_counters(struct orch_nft *n,
                      void (*fn)(void *ud, const char *label, uint64_t packets, uint64_t bytes),
                      void *ud, struct orch_err *err);
/* Flows that connection tracking knows in the namespace. */
int orch_nft_connections(struct orch_nft *n, uint32_t *out, struct orch_err *err);

#endif
