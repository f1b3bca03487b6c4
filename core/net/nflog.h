/* What the packet filter of a microVM denied, as the kernel logs it over a socket of its own, so
 * that no overflow there disturbs the filter's. The kernel bounds what comes (ORCH_LOG_RATE); the
 * packets are the guest's words and read with suspicion. */
#ifndef ORCH_NET_NFLOG_H
#define ORCH_NET_NFLOG_H

#include "../base/loop.h"
#include "netlink.h"

struct orch_denied {
    uint32_t mark; /* orch_rules_marked tells the rule */
    uint16_t type; /* EtherType */
    bool has_ip;   /* dst and proto are there */
    uint32_t dst;
    uint8_t proto;
    bool has_port;
    uint16_t port;
    unsigned missed; /* times that messages before this one were lost; of how many is not known */
};

/* False: it is no logged packet. What its bytes do not show is absent. Pure. */
bool orch_denied_parse(const struct nlmsghdr *h, struct orch_denied *out);

struct orch_nflog;

/* Takes fd (NETLINK_NETFILTER, bound), also on failure, and listens to ORCH_LOG_GROUP. fn is called
 * from the loop and from release; it frees nothing of this. Class ISOLATION. */
struct orch_nflog *orch_nflog_new(struct orch_loop *l, int fd,
                                  void (*fn)(void *ud, const struct orch_denied *d), void *ud,
                                  struct orch_err *err);
/* Reads what is there now: before the rules change that the marks are about. */
void orch_nflog_read(struct orch_nflog *n);
/* Reads what is there still, frees n (NULL is fine) and returns its socket, which is the caller's
 * to close as orch_nft_release's. */
int orch_nflog_release(struct orch_nflog *n);

#endif
