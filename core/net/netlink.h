/* Netlink messages: composing, sending, what comes back. Both protocols used here (nf_tables,
 * rtnetlink) answer inside send, so nothing waits: what is not there after a send does not come.
 *
 * A socket that is full loses what comes: read it empty, then take what it was about for
 * unknown. */
#ifndef ORCH_NET_NETLINK_H
#define ORCH_NET_NETLINK_H

#include <errno.h>
#include <linux/netlink.h>

#include "../base/err.h"

/* Why the kernel refused: its own words where it has any. */
struct orch_nl_fault {
    int code;        /* positive errno */
    uint32_t seq;    /* of the message it is about */
    uint32_t offset; /* of the attribute it is about, in the message; 0: not said */
    unsigned lost;   /* times that messages were lost, also without a fault: announcements */
    char text[160];
};

typedef void orch_nl_fn(void *ud, const struct nlmsghdr *h);

/* Turns on extended acks and makes room for large messages. The socket may have been opened
 * elsewhere. */
void orch_nl_setup(int fd);

/* Sends n bytes of messages, of which the one with sequence number `last` asks for an ack or is
 * a dump; every other message from the kernel goes to fn (which may be NULL), announcements that
 * were there before too. 0, or a negative errno with f set: the first that failed, -EINTR when a
 * dump changed under its reader, -ENOBUFS when an answer was lost (whether it was done is not
 * known), -EPROTO when there was none. */
int orch_nl_talk(int fd, const void *p, size_t n, uint32_t last, orch_nl_fn *fn, void *ud,
                 struct orch_nl_fault *f);
/* After such an end a request that only reads, or that may be done twice, is sent again: a few
 * times. */
static inline bool orch_nl_again(int result, int *tries)
{
    return (result == -ENOBUFS || result == -EINTR) && ++*tries < 5;
}
/* Reads what is there, at most `max` packets; every message goes to fn. True: nothing is left.
 * *lost grows with each time that messages were lost; until nothing is left, more may get lost
 * unsaid. */
bool orch_nl_drain(int fd, int max, orch_nl_fn *fn, void *ud, unsigned *lost);
/* "Operation not permitted (what the kernel says, attribute at byte 32)" */
const char *orch_nl_fault_text(const struct orch_nl_fault *f, char out[256]);

/* Composing: begin gives the message's place in b, for end; a nest's place likewise. */
size_t orch_nl_begin(struct orch_buf *b, int type, int flags, uint32_t seq, const void *head,
                     size_t n);
void orch_nl_end(struct orch_buf *b, size_t msg);
void orch_nl_put(struct orch_buf *b, int type, const void *p, size_t n);
void orch_nl_put_u32(struct orch_buf *b, int type, uint32_t v);
size_t orch_nl_nest(struct orch_buf *b, int type);
void orch_nl_nest_end(struct orch_buf *b, size_t nest);

/* The attribute's bytes behind the message's fixed head of `head` bytes, or NULL; at least
 * `least` long. */
const void *orch_nl_get(const struct nlmsghdr *h, size_t head, int type, size_t least);
const void *orch_nl_get_all(const struct nlmsghdr *h, size_t head, int type, size_t least,
                            size_t *n);

#endif
