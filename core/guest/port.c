/* The virtio-serial port: frames out of one buffer, frames into another, both bounded. */
#include "agent.h"

#include <errno.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

#define OUT_CAP (288 * 1024) /* the rest is for one turn's EXIT, STARTED and CREDIT frames */

int port = -1;

static uint8_t in_buf[sizeof(struct orch_wire_head) + ORCH_WIRE_MAX];
static size_t in_n;
static uint8_t out_buf[OUT_CAP];
static size_t out_off, out_n; /* out_buf[out_off..out_n) is to be written */

size_t queued(void)
{
    return out_n - out_off;
}

uint8_t *out_room(size_t n)
{
    if (out_off > 0 && out_n + sizeof(struct orch_wire_head) + n > OUT_CAP) {
        memmove(out_buf, out_buf + out_off, queued());
        out_n -= out_off;
        out_off = 0;
    }
    if (out_n + sizeof(struct orch_wire_head) + n > OUT_CAP)
        die("the host does not read");
    return out_buf + out_n + sizeof(struct orch_wire_head);
}

void out_commit(uint32_t id, enum orch_wire_type type, size_t n)
{
    struct orch_wire_head h = { .len = (uint32_t)n, .id = id, .type = (uint8_t)type };
    memcpy(out_buf + out_n, &h, sizeof h);
    out_n += sizeof h + n;
}

void send_frame(uint32_t id, enum orch_wire_type type, const void *p, size_t n)
{
    memcpy(out_room(n), p, n);
    out_commit(id, type, n);
}

void send_done(uint32_t id, int error, uint64_t bytes)
{
    struct orch_wire_done d = { .sys_errno = (uint32_t)error, .bytes = bytes };
    send_frame(id, ORCH_WIRE_DONE, &d, sizeof d);
}

void send_hello(const uint8_t *epoch)
{
    struct orch_wire_hello h = { .version = ORCH_WIRE_VERSION };
    if (epoch)
        memcpy(h.epoch, epoch, sizeof h.epoch);
    send_frame(0, ORCH_WIRE_HELLO, &h, sizeof h);
}

void send_credit(struct op *op, uint32_t n)
{
    if (n && !op->dropped)
        send_frame(op->id, ORCH_WIRE_CREDIT, &n, sizeof n);
}

void flush(void)
{
    while (queued()) {
        ssize_t n = write(port, out_buf + out_off, queued());
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0)
            power(RB_POWER_OFF);
        out_off += (size_t)n;
    }
    out_off = out_n = 0;
}

void each_frame(void (*handle)(const struct orch_wire_head *h, const char *b))
{
    size_t off = 0;
    struct orch_wire_head h;
    while (in_n - off >= sizeof h && queued() < OUT_REPLY) {
        memcpy(&h, in_buf + off, sizeof h);
        if (h.len > ORCH_WIRE_MAX || h.zero[0] || h.zero[1] || h.zero[2])
            die("protocol error: head");
        if (in_n - off - sizeof h < h.len)
            break;
        handle(&h, (const char *)in_buf + off + sizeof h);
        off += sizeof h + h.len;
    }
    in_n -= off;
    memmove(in_buf, in_buf + off, in_n);
}

bool in_room(void)
{
    return in_n < sizeof in_buf;
}

void receive(void)
{
    ssize_t n = read(port, in_buf + in_n, sizeof in_buf - in_n);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        power(RB_POWER_OFF);
    in_n += n > 0 ? (size_t)n : 0;
}
