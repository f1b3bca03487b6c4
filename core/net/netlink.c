#include "netlink.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#define RECV_BYTES (64 * 1024) /* the kernel fills at most 32 KiB of a dump at once */
#define ROOM_BYTES (4 << 20)
#define ANSWER_MAX (1 << 16) /* packets */

void orch_nl_setup(int fd)
{
    int on = 1, room = ROOM_BYTES;
    setsockopt(fd, SOL_NETLINK, NETLINK_EXT_ACK, &on, sizeof on);
    setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof on);
    setsockopt(fd, SOL_NETLINK, NETLINK_GET_STRICT_CHK, &on, sizeof on);
    /* Without privileges up to wmem_max, which holds the largest ruleset too. */
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room))
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
}

static const void *find(const char *p, size_t n, int type, size_t least, size_t *len)
{
    struct nlattr a;
    for (size_t at = 0; at + sizeof a <= n; at += NLA_ALIGN(a.nla_len)) {
        memcpy(&a, p + at, sizeof a);
        if (a.nla_len < sizeof a || a.nla_len > n - at)
            return NULL;
        if ((a.nla_type & NLA_TYPE_MASK) == type && a.nla_len - sizeof a >= least) {
            if (len)
                *len = a.nla_len - sizeof a;
            return p + at + sizeof a;
        }
    }
    return NULL;
}

const void *orch_nl_get_all(const struct nlmsghdr *h, size_t head, int type, size_t least,
                            size_t *n)
{
    size_t from = NLMSG_HDRLEN + NLMSG_ALIGN(head);
    return h->nlmsg_len < from ? NULL
                               : find((const char *)h + from, h->nlmsg_len - from, type, least, n);
}

const void *orch_nl_get(const struct nlmsghdr *h, size_t head, int type, size_t least)
{
    return orch_nl_get_all(h, head, type, least, NULL);
}

static void read_fault(const struct nlmsghdr *h, const struct nlmsgerr *e, struct orch_nl_fault *f)
{
    size_t from = NLMSG_HDRLEN + sizeof *e, len;
    if (!(h->nlmsg_flags & NLM_F_CAPPED) && e->msg.nlmsg_len > sizeof e->msg)
        from += NLMSG_ALIGN(e->msg.nlmsg_len) - sizeof e->msg;
    f->code = -e->error;
    f->seq = h->nlmsg_seq;
    if (!(h->nlmsg_flags & NLM_F_ACK_TLVS) || h->nlmsg_len < from)
        return;
    const char *tlv = (const char *)h + from;
    size_t n = h->nlmsg_len - from;
    const char *text = find(tlv, n, NLMSGERR_ATTR_MSG, 1, &len);
    if (text)
        snprintf(f->text, sizeof f->text, "%.*s", (int)len, text);
    const void *offset = find(tlv, n, NLMSGERR_ATTR_OFFS, 4, NULL);
    if (offset)
        memcpy(&f->offset, offset, 4);
}

/* The kernel's messages alone: in the namespace others may send to this socket too. 0: nothing
 * there. -ENOBUFS and its like wait on the socket ahead of what is there, once. */
static ssize_t receive(int fd, char *buf)
{
    struct sockaddr_nl from = { .nl_pid = 1 };
    struct iovec iov = { buf, RECV_BYTES };
    struct msghdr m = {
        .msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &iov, .msg_iovlen = 1
    };
    ssize_t n;
    do
        n = recvmsg(fd, &m, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EAGAIN ? 0 : -errno;
    if (!from.nl_pid && m.msg_flags & MSG_TRUNC)
        return -EMSGSIZE;
    if (from.nl_pid)
        memset(buf, 0, NLMSG_HDRLEN); /* no message */
    return n;
}

bool orch_nl_drain(int fd, int max, orch_nl_fn *fn, void *ud, unsigned *lost)
{
    cleanup_free char *buf = orch_xmalloc(RECV_BYTES);
    for (; max > 0; max--) {
        ssize_t got = receive(fd, buf);
        if (!got)
            return true;
        *lost += got < 0;
        for (const struct nlmsghdr *h = (const void *)buf; got > 0 && NLMSG_OK(h, got);
             h = NLMSG_NEXT(h, got))
            fn(ud, h);
    }
    return false;
}

struct talk {
    uint32_t self, last;
    orch_nl_fn *fn;
    void *ud;
    struct orch_nl_fault *f;
    bool acked, ended, torn;
};

/* What an earlier request left is no answer to this one. */
static void take_old(void *ud, const struct nlmsghdr *h)
{
    const struct talk *t = ud;
    if (t->fn && h->nlmsg_type >= NLMSG_MIN_TYPE && h->nlmsg_pid != t->self)
        t->fn(t->ud, h);
}

static void take_answer(void *ud, const struct nlmsghdr *h)
{
    struct talk *t = ud;
    bool last = h->nlmsg_seq == t->last;
    t->torn |= h->nlmsg_flags & NLM_F_DUMP_INTR && last;
    if (h->nlmsg_type == NLMSG_ERROR && h->nlmsg_len >= NLMSG_LENGTH(sizeof(struct nlmsgerr))) {
        const struct nlmsgerr *e = NLMSG_DATA(h);
        if (e->error && !t->f->code)
            read_fault(h, e, t->f);
        t->acked |= last;
    } else if (h->nlmsg_type == NLMSG_DONE) {
        int code = 0;
        if (h->nlmsg_len >= NLMSG_LENGTH(sizeof code))
            memcpy(&code, NLMSG_DATA(h), sizeof code);
        if (code < 0 && !t->f->code) {
            t->f->code = -code;
            t->f->seq = h->nlmsg_seq;
        }
        t->ended |= last;
    } else if (t->fn && h->nlmsg_type >= NLMSG_MIN_TYPE) {
        t->fn(t->ud, h);
    }
}

int orch_nl_talk(int fd, const void *p, size_t n, uint32_t last, orch_nl_fn *fn, void *ud,
                 struct orch_nl_fault *f)
{
    const struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
    struct sockaddr_nl self = { .nl_family = AF_NETLINK };
    socklen_t len = sizeof self;
    ssize_t got;
    *f = (struct orch_nl_fault){ .code = 0 };
    if (getsockname(fd, (struct sockaddr *)&self, &len)) {
        f->code = errno;
        return -f->code;
    }
    struct talk t = { .self = self.nl_pid, .last = last, .fn = fn, .ud = ud, .f = f };
    /* A full socket takes no answer either. */
    bool all = orch_nl_drain(fd, ANSWER_MAX, take_old, &t, &f->lost);
    unsigned before = f->lost;
    do
        got = sendto(fd, p, n, MSG_DONTWAIT, (const struct sockaddr *)&kernel, sizeof kernel);
    while (got < 0 && errno == EINTR);
    if (got < 0) {
        f->code = errno;
        return -f->code;
    }
    all = orch_nl_drain(fd, ANSWER_MAX, take_answer, &t, &f->lost) && all;
    /* From the first message that does not fit the kernel drops them all until the socket is read
     * empty: behind an ack that came nothing of the answer was lost. */
    if (!f->code)
        f->code = !all || (f->lost != before && !t.acked) ? ENOBUFS
                  : t.torn                                ? EINTR
                  : t.acked || t.ended                    ? 0
                                                          : EPROTO;
    return -f->code;
}

const char *orch_nl_fault_text(const struct orch_nl_fault *f, char out[256])
{
    char at[48] = "";
    if (f->offset)
        snprintf(at, sizeof at, "%sattribute at byte %u", *f->text ? ", " : "", f->offset);
    snprintf(out, 256, "%s%s%s%s%s", strerror(f->code), *f->text || *at ? " (" : "", f->text, at,
             *f->text || *at ? ")" : "");
    return out;
}

/* ---- composing */

static void pad(struct orch_buf *b)
{
    while (b->n % NLMSG_ALIGNTO)
        orch_buf_char(b, 0);
}

size_t orch_nl_begin(struct orch_buf *b, int type, int flags, uint32_t seq, const void *head,
                     size_t n)
{
    size_t at = b->n;
    struct nlmsghdr h = { .nlmsg_type = (uint16_t)type,
                          .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags),
                          .nlmsg_seq = seq };
    orch_buf_add(b, &h, sizeof h);
    orch_buf_add(b, head, n);
    pad(b);
    return at;
}

void orch_nl_end(struct orch_buf *b, size_t msg)
{
    uint32_t len = (uint32_t)(b->n - msg);
    memcpy(b->p + msg, &len, sizeof len);
}

void orch_nl_put(struct orch_buf *b, int type, const void *p, size_t n)
{
    struct nlattr a = { (uint16_t)(sizeof a + n), (uint16_t)type };
    orch_buf_add(b, &a, sizeof a);
    orch_buf_add(b, p, n);
    pad(b);
}

void orch_nl_put_u32(struct orch_buf *b, int type, uint32_t v)
{
    orch_nl_put(b, type, &v, sizeof v);
}

size_t orch_nl_nest(struct orch_buf *b, int type)
{
    size_t at = b->n;
    orch_nl_put(b, type | NLA_F_NESTED, NULL, 0);
    return at;
}

void orch_nl_nest_end(struct orch_buf *b, size_t nest)
{
    uint16_t len = (uint16_t)(b->n - nest);
    memcpy(b->p + nest, &len, sizeof len);
}
