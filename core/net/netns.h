/* One microVM's network: namespace, verified packet filter, tap, uplink. The order is the point
 * of it: launcher makes the namespace → tables in one batch → read back and compared → tap up →
 * only now can a VMM be added. The uplink (pasta) comes up meanwhile, about 7 ms after new; who
 * waits for it has no VMM when it fails.
 *
 * Guest side: eth0 has ORCH_NET_GUEST_MAC, ORCH_NET_GUEST/ORCH_NET_BITS, default route by
 * ORCH_NET_GATEWAY, MTU 1500, no IPv6; the VMM finds the tap at ORCH_VMM_FD_BASE +
 * ORCH_LAUNCH_FD_TAP. */
#ifndef ORCH_NET_NETNS_H
#define ORCH_NET_NETNS_H

#include "../launch/launch.h"
#include "nflog.h"
#include "nft.h"

struct orch_netns;

struct orch_netns_opts {
    const struct orch_rules *rules; /* borrowed until orch_netns_free, or rehost */
    bool uplink; /* false: tap and tables alone, as a template's boot needs them */
    bool kvm;    /* the VMM will have it */
    /* All from the loop, never from inside new; each at most once; any may free the netns.
     * ready: verified and the tap is up, orch_netns_start may be called. uplink_up, after ready:
     * the default route is there and the bandwidth limited; what the guest sent before is lost.
     * failed, and nothing after it: class ISOLATION; step, system's error, fix. After
     * orch_netns_start the end of pasta is not told here but by the cell's on_error, with the
     * VMM's end. */
    void (*ready)(void *ud);
    void (*uplink_up)(void *ud);
    void (*failed)(void *ud, const struct orch_err *err);
    /* May be NULL. Some of the packets that a rule denied (ORCH_LOG_RATE), as often as they come,
     * the last from inside free; it frees nothing of this. */
    void (*denied)(void *ud, const char *rule, const struct orch_denied *d);
    void *ud;
};

/* NULL: the launcher cannot be started. Deadline of ready and of uplink_up: 30 s each. */
struct orch_netns *orch_netns_new(struct orch_loop *l, struct orch_launcher *la,
                                  const struct orch_netns_opts *o, struct orch_err *err);
/* Adds the VMM; once, after ready. The cell and all callbacks of o are the caller's from then
 * on; free the cell first, then the netns, in the same turn. */
struct orch_cell *orch_netns_start(struct orch_netns *n, const struct orch_cell_opts *o,
                                   struct orch_err *err);
void orch_netns_free(struct orch_netns *n); /* no callback follows; NULL is fine */

/* The same rules for a host with other addresses (orch_rules_rehost), borrowed in their place from
 * now on, also on failure. Before ready they are what will be committed, after it they are in force
 * and verified when this returns 0; else the network must be ended. Flows that are known already
 * are not spared. */
int orch_netns_rehost(struct orch_netns *n, const struct orch_rules *rules, struct orch_err *err);

/* After ready: for counters, and for verifying again (orch_nft_changed, orch_nft_verify). */
struct orch_nft *orch_netns_nft(struct orch_netns *n);

#endif
