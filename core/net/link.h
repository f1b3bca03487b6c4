/* Devices and addresses by rtnetlink: the microVM's, over the socket opened inside its
 * namespace, and the host's, which are only read. Errors are of class ISOLATION. */
#ifndef ORCH_NET_LINK_H
#define ORCH_NET_LINK_H

#include "../base/loop.h"
#include "netlink.h"
#include "ruleset.h"

/* What the kernel announced on the socket; messages that come while it is used for something
 * else are noted here too. */
struct orch_link_events {
    int uplink;    /* index of the device of the default route; 0: none yet */
    unsigned lost; /* times that some were lost: uplink may be an older one */
};
void orch_link_note(void *ud, const struct nlmsghdr *h); /* ud: struct orch_link_events */
/* Where some were lost: asks for the default route. */
int orch_link_catch_up(int fd, struct orch_link_events *ev, struct orch_err *err);

/* tap0: the host side's hardware address, IP address, the guest as a permanent neighbour, up;
 * limited to bandwidth_bits a second towards the guest (0: no limit). settings: sysctls by
 * device, where /proc/sys could not be written. */
int orch_link_tap(int fd, uint64_t bandwidth_bits, bool settings, struct orch_link_events *ev,
                  struct orch_err *err);
/* The uplink device: limited towards the world. */
int orch_link_uplink(int fd, int index, uint64_t bandwidth_bits, bool settings,
                     struct orch_link_events *ev, struct orch_err *err);

/* Every IPv4 address that this network namespace takes for itself, each once, in order. *out is the
 * caller's to free. */
int orch_link_host(struct orch_cidr **out, size_t *n, struct orch_err *err);

/* Calls changed, at most once a turn of the loop, when that list may have become another one, of
 * which an announcement may be lost; it may free the watch. What changed before new returned is not
 * told. */
struct orch_link_watch;
struct orch_link_watch *orch_link_watch_new(struct orch_loop *l, void (*changed)(void *ud),
                                            void *ud, struct orch_err *err);
void orch_link_watch_free(struct orch_link_watch *w); /* NULL is fine */

#endif
