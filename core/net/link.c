#include "link.h"

#include "../launch/wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if.h>
#include <linux/ip.h>
#include <linux/neighbour.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <stdio.h>
#include <string.h>

#define HOST_MAX 4096  /* addresses of a host */
#define EVENTS_MAX 256 /* packets of announcements a turn */
/* What passes at once: no less than the largest packet of either device, or 20 ms. */
#define BURST_BYTES (66 * 1024)
#define QUEUE_MS 100

static int refuse(struct orch_err *err, const char *what, const struct orch_nl_fault *f)
{
    char text[256];
    const char *fix = "see `orch doctor`";
    if (f->code == EPERM)
        fix = "orch needs CAP_NET_ADMIN over the microVM's namespace: run it as an ordinary user, "
              "or give root that capability";
    if (f->code == ENOENT && strstr(what, "bandwidth"))
        fix = "the kernel needs the tbf queue (modprobe sch_tbf)";
    return orch_err_setc(err, ORCH_CLASS_ISOLATION, f->code, "network: %s: %s; %s", what,
                         orch_nl_fault_text(f, text), fix);
}

void orch_link_note(void *ud, const struct nlmsghdr *h)
{
    struct orch_link_events *ev = ud;
    const struct rtmsg *r = NLMSG_DATA(h);
    if (h->nlmsg_type != RTM_NEWROUTE || h->nlmsg_len < NLMSG_LENGTH(sizeof *r) ||
        r->rtm_family != AF_INET || r->rtm_dst_len || r->rtm_table != RT_TABLE_MAIN)
        return;
    const int *index = orch_nl_get(h, sizeof *r, RTA_OIF, sizeof *index);
    if (index)
        ev->uplink = *index;
}

struct find {
    int index;
    struct orch_link_events *ev;
};

/* Announcements of other devices come too. */
static void take_index(void *ud, const struct nlmsghdr *h)
{
    struct find *f = ud;
    const struct ifinfomsg *i = NLMSG_DATA(h);
    const char *name = h->nlmsg_type == RTM_NEWLINK
                           ? orch_nl_get(h, sizeof *i, IFLA_IFNAME, sizeof ORCH_NET_TAP)
                           : NULL;
    if (name && !memcmp(name, ORCH_NET_TAP, sizeof ORCH_NET_TAP))
        f->index = i->ifi_index;
    else
        orch_link_note(f->ev, h);
}

/* All that is said on the namespace's socket may be said twice. */
static int talk(int fd, const struct orch_buf *b, uint32_t last, orch_nl_fn *fn, void *ud,
                struct orch_link_events *ev, struct orch_nl_fault *f)
{
    int e, tries = 0;
    do {
        e = orch_nl_talk(fd, b->p, b->n, last, fn, ud, f);
        ev->lost += f->lost;
    } while (orch_nl_again(e, &tries));
    return e;
}

int orch_link_catch_up(int fd, struct orch_link_events *ev, struct orch_err *err)
{
    struct orch_nl_fault f;
    struct rtmsg head = { .rtm_family = AF_INET, .rtm_table = RT_TABLE_MAIN };
    cleanup_buf struct orch_buf b = { 0 };
    if (!ev->lost)
        return 0;
    orch_nl_end(&b, orch_nl_begin(&b, RTM_GETROUTE, NLM_F_DUMP, 1, &head, sizeof head));
    /* A namespace without a route has no main table. */
    if (talk(fd, &b, 1, orch_link_note, ev, ev, &f) && f.code != ENOENT)
        return refuse(err, "reading the routes", &f);
    ev->lost = 0;
    return 0;
}

static int find_tap(int fd, struct find *find, struct orch_err *err)
{
    cleanup_buf struct orch_buf b = { 0 };
    struct orch_nl_fault f;
    struct ifinfomsg head = { .ifi_family = AF_UNSPEC };
    size_t m = orch_nl_begin(&b, RTM_GETLINK, NLM_F_ACK, 1, &head, sizeof head);
    orch_nl_put(&b, IFLA_IFNAME, ORCH_NET_TAP, sizeof ORCH_NET_TAP);
    orch_nl_end(&b, m);
    int e = talk(fd, &b, 1, take_index, find, find->ev, &f);
    return e ? refuse(err, "finding tap0", &f) : 0;
}

/* ---- requests: several are sent at once, each acked; the sequence number says which */

enum step { STEP_SETTINGS = 1, STEP_ADDRESS, STEP_UP, STEP_GUEST, STEP_BANDWIDTH };
static const char *const steps[] = {
    [STEP_SETTINGS] = "settings of the device",
    [STEP_ADDRESS] = "address of tap0",
    [STEP_UP] = "tap0 up",
    [STEP_GUEST] = "neighbour of tap0",
    [STEP_BANDWIDTH] = "limiting the bandwidth",
};

static void put_settings(struct orch_buf *b, int index, const char *mac, bool settings)
{
    static const struct {
        int id;
        uint32_t value;
    } conf[] = {
        { IPV4_DEVCONF_FORWARDING, 1 },          { IPV4_DEVCONF_RP_FILTER, 1 },
        { IPV4_DEVCONF_ACCEPT_REDIRECTS, 0 },    { IPV4_DEVCONF_SEND_REDIRECTS, 0 },
        { IPV4_DEVCONF_ACCEPT_SOURCE_ROUTE, 0 }, { IPV4_DEVCONF_BC_FORWARDING, 0 },
        { IPV4_DEVCONF_PROXY_ARP, 0 },
    };
    struct ifinfomsg head = { .ifi_family = AF_UNSPEC, .ifi_index = index };
    size_t m = orch_nl_begin(b, RTM_SETLINK, NLM_F_ACK, STEP_SETTINGS, &head, sizeof head);
    if (mac)
        orch_nl_put(b, IFLA_ADDRESS, mac, 6);
    if (settings) {
        size_t spec = orch_nl_nest(b, IFLA_AF_SPEC), inet = orch_nl_nest(b, AF_INET),
               all = orch_nl_nest(b, IFLA_INET_CONF);
        for (size_t i = 0; i < ORCH_ARRAY_LEN(conf); i++)
            orch_nl_put_u32(b, conf[i].id, conf[i].value);
        orch_nl_nest_end(b, all);
        orch_nl_nest_end(b, inet);
        orch_nl_nest_end(b, spec);
    }
    orch_nl_end(b, m);
}

static void put_address(struct orch_buf *b, int index)
{
    struct ifaddrmsg head = { .ifa_family = AF_INET,
                              .ifa_prefixlen = ORCH_NET_BITS,
                              .ifa_index = (unsigned)index };
    size_t m = orch_nl_begin(b, RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, STEP_ADDRESS,
                             &head, sizeof head);
    orch_nl_put_u32(b, IFA_LOCAL, htonl(ORCH_NET_GATEWAY));
    orch_nl_put_u32(b, IFA_ADDRESS, htonl(ORCH_NET_GATEWAY));
    orch_nl_end(b, m);
}

static void put_up(struct orch_buf *b, int index)
{
    struct ifinfomsg head = {
        .ifi_family = AF_UNSPEC, .ifi_index = index, .ifi_flags = IFF_UP, .ifi_change = IFF_UP
    };
    orch_nl_end(b, orch_nl_begin(b, RTM_SETLINK, NLM_F_ACK, STEP_UP, &head, sizeof head));
}

/* So that nothing the guest says about addresses is learned, and no packet waits for an answer. */
static void put_guest(struct orch_buf *b, int index)
{
    struct ndmsg head = { .ndm_family = AF_INET, .ndm_ifindex = index, .ndm_state = NUD_PERMANENT };
    size_t m = orch_nl_begin(b, RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, STEP_GUEST,
                             &head, sizeof head);
    orch_nl_put_u32(b, NDA_DST, htonl(ORCH_NET_GUEST));
    orch_nl_put(b, NDA_LLADDR, ORCH_NET_GUEST_MAC, 6);
    orch_nl_end(b, m);
}

/* A token bucket as the device's queue: shapes what leaves by it. */
static void put_bandwidth(struct orch_buf *b, int index, uint64_t bits)
{
    uint64_t rate = bits / 8 ? bits / 8 : 1, burst = rate / 50, queue = rate * QUEUE_MS / 1000;
    burst = burst < BURST_BYTES ? BURST_BYTES : burst > INT32_MAX ? INT32_MAX : burst;
    queue = queue < BURST_BYTES ? BURST_BYTES : queue > INT32_MAX ? INT32_MAX : queue;
    struct tc_tbf_qopt q = {
        .rate = { .linklayer = TC_LINKLAYER_ETHERNET,
                  .rate = rate < UINT32_MAX ? (uint32_t)rate : UINT32_MAX },
        .limit = (uint32_t)queue,
    };
    struct tcmsg head = { .tcm_family = AF_UNSPEC,
                          .tcm_ifindex = index,
                          .tcm_handle = 1 << 16,
                          .tcm_parent = TC_H_ROOT };
    size_t m = orch_nl_begin(b, RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
                             STEP_BANDWIDTH, &head, sizeof head);
    orch_nl_put(b, TCA_KIND, "tbf", 4);
    size_t options = orch_nl_nest(b, TCA_OPTIONS);
    orch_nl_put(b, TCA_TBF_PARMS, &q, sizeof q);
    orch_nl_put_u32(b, TCA_TBF_BURST, (uint32_t)burst);
    if (rate >= UINT32_MAX)
        orch_nl_put(b, TCA_TBF_RATE64, &rate, sizeof rate);
    orch_nl_nest_end(b, options);
    orch_nl_end(b, m);
}

static int send_all(int fd, const struct orch_buf *b, uint32_t last, struct orch_link_events *ev,
                    struct orch_err *err)
{
    struct orch_nl_fault f;
    if (!talk(fd, b, last, orch_link_note, ev, ev, &f))
        return 0;
    return refuse(err, f.seq && f.seq < ORCH_ARRAY_LEN(steps) ? steps[f.seq] : "rtnetlink", &f);
}

int orch_link_tap(int fd, uint64_t bandwidth_bits, bool settings, struct orch_link_events *ev,
                  struct orch_err *err)
{
    cleanup_buf struct orch_buf b = { 0 };
    struct find find = { 0, ev };
    int e = find_tap(fd, &find, err);
    if (e)
        return e;
    put_settings(&b, find.index, ORCH_NET_TAP_MAC, settings);
    put_address(&b, find.index);
    if (bandwidth_bits)
        put_bandwidth(&b, find.index, bandwidth_bits);
    put_up(&b, find.index);
    put_guest(&b, find.index);
    return send_all(fd, &b, STEP_GUEST, ev, err);
}

int orch_link_uplink(int fd, int index, uint64_t bandwidth_bits, bool settings,
                     struct orch_link_events *ev, struct orch_err *err)
{
    cleanup_buf struct orch_buf b = { 0 };
    if (settings)
        put_settings(&b, index, NULL, true);
    if (bandwidth_bits)
        put_bandwidth(&b, index, bandwidth_bits);
    return b.n ? send_all(fd, &b, bandwidth_bits ? STEP_BANDWIDTH : STEP_SETTINGS, ev, err) : 0;
}

/* ---- the host */

struct addresses {
    struct orch_cidr *v;
    size_t n;
};

static void add_address(struct addresses *a, uint32_t be, unsigned bits)
{
    struct orch_cidr c = { ntohl(be), bits };
    for (size_t i = 0; i < a->n; i++)
        if (a->v[i].addr == c.addr && a->v[i].bits == c.bits)
            return;
    if (a->n <= HOST_MAX)
        a->v[a->n++] = c;
}

/* Addresses of devices, which may be down, and what the local table delivers, which may be
 * networks. */
static void take_address(void *ud, const struct nlmsghdr *h)
{
    const uint32_t *addr;
    if (h->nlmsg_type == RTM_NEWADDR && h->nlmsg_len >= NLMSG_LENGTH(sizeof(struct ifaddrmsg))) {
        addr = orch_nl_get(h, sizeof(struct ifaddrmsg), IFA_LOCAL, sizeof *addr);
        addr = addr ? addr : orch_nl_get(h, sizeof(struct ifaddrmsg), IFA_ADDRESS, sizeof *addr);
        if (addr && ((const struct ifaddrmsg *)NLMSG_DATA(h))->ifa_family == AF_INET)
            add_address(ud, *addr, 32);
    } else if (h->nlmsg_type == RTM_NEWROUTE &&
               h->nlmsg_len >= NLMSG_LENGTH(sizeof(struct rtmsg))) {
        const struct rtmsg *r = NLMSG_DATA(h);
        addr = orch_nl_get(h, sizeof *r, RTA_DST, sizeof *addr);
        if (addr && r->rtm_family == AF_INET && r->rtm_type == RTN_LOCAL && r->rtm_dst_len &&
            r->rtm_dst_len <= 32)
            add_address(ud, *addr, r->rtm_dst_len);
    }
}

static int dump_addresses(int fd, struct addresses *a, struct orch_err *err)
{
    struct orch_nl_fault f;
    struct ifaddrmsg addr = { .ifa_family = AF_INET };
    struct rtmsg route = { .rtm_family = AF_INET,
                           .rtm_table = RT_TABLE_LOCAL,
                           .rtm_type = RTN_LOCAL };
    cleanup_buf struct orch_buf b = { 0 };
    orch_nl_end(&b, orch_nl_begin(&b, RTM_GETADDR, NLM_F_DUMP, 1, &addr, sizeof addr));
    if (orch_nl_talk(fd, b.p, b.n, 1, take_address, a, &f))
        return refuse(err, "reading the host's addresses", &f);
    orch_buf_consume(&b, b.n);
    orch_nl_end(&b, orch_nl_begin(&b, RTM_GETROUTE, NLM_F_DUMP, 2, &route, sizeof route));
    /* A namespace in which no device was ever up has no local table. */
    if (orch_nl_talk(fd, b.p, b.n, 2, take_address, a, &f) && f.code != ENOENT)
        return refuse(err, "reading the host's local routes", &f);
    if (a->n > HOST_MAX)
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, E2BIG,
                             "network: the host has more than %d addresses", HOST_MAX);
    return 0;
}

static int by_address(const void *a, const void *b)
{
    const struct orch_cidr *x = a, *y = b;
    return x->addr != y->addr ? (x->addr > y->addr) - (x->addr < y->addr)
                              : (x->bits > y->bits) - (x->bits < y->bits);
}

/* In orch's own network namespace. */
static int open_route(uint32_t groups, struct orch_err *err)
{
    struct sockaddr_nl sa = { .nl_family = AF_NETLINK, .nl_groups = groups };
    cleanup_close int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0 || bind(fd, (const struct sockaddr *)&sa, sizeof sa))
        return orch_err_setc(err, ORCH_CLASS_ISOLATION, errno, "network: route socket: %s",
                             strerror(errno));
    orch_nl_setup(fd);
    return orch_steal_fd(&fd);
}

int orch_link_host(struct orch_cidr **out, size_t *n, struct orch_err *err)
{
    cleanup_close int fd = open_route(0, err);
    if (fd < 0)
        return fd;
    cleanup_free struct orch_cidr *v = orch_xcalloc(HOST_MAX + 1, sizeof *v);
    struct addresses a = { v, 0 };
    int e, tries = 0;
    do {
        a.n = 0;
        e = dump_addresses(fd, &a, err);
    } while (orch_nl_again(e, &tries));
    if (e)
        return e;
    qsort(v, a.n, sizeof *v, by_address);
    *out = orch_steal_ptr(&v);
    *n = a.n;
    return 0;
}

struct orch_link_watch {
    int fd;
    struct orch_watch *watch;
    bool stale; /* something was lost, and has not been read empty since */
    void (*changed)(void *ud);
    void *ud;
};

static void note_change(void *ud, const struct nlmsghdr *h)
{
    bool route = h->nlmsg_type == RTM_NEWROUTE || h->nlmsg_type == RTM_DELROUTE;
    if (h->nlmsg_type == RTM_NEWADDR || h->nlmsg_type == RTM_DELADDR ||
        (route && h->nlmsg_len >= NLMSG_LENGTH(sizeof(struct rtmsg)) &&
         ((const struct rtmsg *)NLMSG_DATA(h))->rtm_table == RT_TABLE_LOCAL))
        *(bool *)ud = true;
}

static void host_event(void *ud, int events)
{
    struct orch_link_watch *w = ud;
    bool changed = false;
    unsigned lost = 0;
    (void)events;
    bool all = orch_nl_drain(w->fd, EVENTS_MAX, note_change, &changed, &lost);
    /* What was lost may have been anything, what is read hereafter is not. */
    w->stale |= lost > 0;
    changed |= w->stale;
    w->stale &= !all;
    if (changed)
        w->changed(w->ud);
}

struct orch_link_watch *orch_link_watch_new(struct orch_loop *l, void (*changed)(void *ud),
                                            void *ud, struct orch_err *err)
{
    int fd = open_route(RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE, err);
    if (fd < 0)
        return NULL;
    struct orch_link_watch *w = orch_xcalloc(1, sizeof *w);
    *w = (struct orch_link_watch){ .fd = fd, .changed = changed, .ud = ud };
    w->watch = orch_watch_new(l, fd, ORCH_READ, host_event, w);
    return w;
}

void orch_link_watch_free(struct orch_link_watch *w)
{
    if (!w)
        return;
    orch_watch_free(w->watch);
    close(w->fd);
    free(w);
}
