#include "nflog.h"

#include "ruleset.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_log.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <string.h>

#define TURN_MAX 32  /* messages a turn of the loop */
#define ALL_MAX 8192 /* more than the socket's buffer holds */

struct orch_nflog {
    int fd;
    struct orch_watch *watch;
    void (*fn)(void *ud, const struct orch_denied *d);
    void *ud;
    unsigned missed;
};

/* ---- messages */

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static bool has_ports(uint8_t proto)
{
    return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP ||
           proto == IPPROTO_UDPLITE;
}

static void parse_ipv4(const uint8_t *p, size_t n, struct orch_denied *out)
{
    size_t head = n ? (p[0] & 15U) * 4 : 0;
    if (n < 20 || p[0] >> 4 != 4 || head < 20)
        return;
    out->has_ip = true;
    out->proto = p[9];
    out->dst = (uint32_t)get16(p + 16) << 16 | get16(p + 18);
    bool later_fragment = get16(p + 6) & 0x1fff;
    if (!has_ports(out->proto) || later_fragment || n < head + 4)
        return;
    out->has_port = true;
    out->port = get16(p + head + 2);
}

bool orch_denied_parse(const struct nlmsghdr *h, struct orch_denied *out)
{
    const size_t head = sizeof(struct nfgenmsg);
    size_t n;
    *out = (struct orch_denied){ .mark = 0 };
    if (h->nlmsg_type != (NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET))
        return false;
    const struct nfulnl_msg_packet_hdr *hdr = orch_nl_get(h, head, NFULA_PACKET_HDR, sizeof *hdr);
    const uint32_t *mark = orch_nl_get(h, head, NFULA_MARK, sizeof *mark);
    const uint8_t *packet = orch_nl_get_all(h, head, NFULA_PAYLOAD, 0, &n);
    out->mark = mark ? ntohl(*mark) : 0;
    out->type = hdr ? ntohs(hdr->hw_protocol) : 0;
    if (packet && out->type == ETHERTYPE_IP)
        parse_ipv4(packet, n, out);
    return true;
}

/* ---- the socket */

static void take(void *ud, const struct nlmsghdr *h)
{
    struct orch_nflog *n = ud;
    struct orch_denied d;
    if (!orch_denied_parse(h, &d))
        return;
    d.missed = n->missed;
    n->missed = 0;
    n->fn(n->ud, &d);
}

static void read_log(struct orch_nflog *n, int max)
{
    orch_nl_drain(n->fd, max, take, n, &n->missed);
}

static void log_event(void *ud, int events)
{
    (void)events;
    read_log(ud, TURN_MAX);
}

static int listen_to(int fd, struct orch_err *err)
{
    struct orch_nl_fault f;
    char text[256];
    struct nfgenmsg head = { .version = NFNETLINK_V0, .res_id = htons(ORCH_LOG_GROUP) };
    struct nfulnl_msg_config_cmd bind = { NFULNL_CFG_CMD_BIND };
    struct nfulnl_msg_config_mode mode = { htonl(ORCH_LOG_BYTES), NFULNL_COPY_PACKET, 0 };
    cleanup_buf struct orch_buf b = { 0 };
    size_t m = orch_nl_begin(&b, NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG, NLM_F_ACK, 1, &head,
                             sizeof head);
    orch_nl_put(&b, NFULA_CFG_CMD, &bind, sizeof bind);
    orch_nl_put(&b, NFULA_CFG_MODE, &mode, sizeof mode);
    orch_nl_end(&b, m);
    return orch_nl_talk(fd, b.p, b.n, 1, NULL, NULL, &f)
               ? orch_err_setc(
                     err, ORCH_CLASS_ISOLATION, f.code,
                     "firewall: log of denied packets: %s; the kernel needs nfnetlink_log "
                     "(modprobe nfnetlink_log)",
                     orch_nl_fault_text(&f, text))
               : 0;
}

struct orch_nflog *orch_nflog_new(struct orch_loop *l, int fd,
                                  void (*fn)(void *ud, const struct orch_denied *d), void *ud,
                                  struct orch_err *err)
{
    orch_nl_setup(fd);
    if (listen_to(fd, err)) {
        close(fd);
        return NULL;
    }
    struct orch_nflog *n = orch_xcalloc(1, sizeof *n);
    *n = (struct orch_nflog){ .fd = fd, .fn = fn, .ud = ud };
    n->watch = orch_watch_new(l, fd, ORCH_READ, log_event, n);
    return n;
}

void orch_nflog_read(struct orch_nflog *n)
{
    read_log(n, ALL_MAX);
}

int orch_nflog_release(struct orch_nflog *n)
{
    if (!n)
        return -1;
    orch_watch_free(n->watch);
    orch_nflog_read(n);
    int fd = n->fd;
    free(n);
    return fd;
}
