/* Inside the guest, as root there: sends what the packet filter must stop, and what it must let
 * through. Static, without a dependency but libc.
 *
 *   attack udp|tcp|PROTO DST PORT [KEY=VALUE]…   one IPv4 frame, as it should be but for the keys:
 *       smac dmac=MAC  src=ADDR  type=HEX (EtherType)  vlan=N  qinq=N  ttl=N  flags=HEX (TCP)
 *       sport=N  opts=HEX (IP options)  frag=first|rest|both|tiny  body=HEX (behind the IP header)
 *       size=N (payload)  count=N (frames, each from the next port)  for=MS (again until then)
 *   attack arp OP SMAC SRC DST                  attack frame HEX
 *   attack stream DST PORT UP DOWN [N]          N connections at once, each UP and DOWN bytes
 *   attack echo DST PORT BYTES                  a datagram, and the same one back
 *   attack closed                               until no TCP connection here would send again by
 *   itself
 * Status 0: sent, or all came back as it should. */
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define GUEST_MAC "\x02\x00\x00\x00\x00\x02"
#define TAP_MAC "\x02\x00\x00\x00\x00\x01"
#define GUEST "10.255.0.2"
#define WAIT_MS 60000
/* none that the kernel gives to a connection: a flow that is known is no attack */
#define PORT 20000

struct frame {
    uint8_t b[2048];
    size_t n;
};

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "attack: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static void put_addr(uint8_t *p, const char *text)
{
    errno = EINVAL;
    if (inet_pton(AF_INET, text, p) != 1)
        fail(text);
}

static size_t put_hex(uint8_t *p, const char *hex)
{
    size_t n = 0;
    unsigned v;
    for (; *hex; hex++)
        if (*hex != ':' && sscanf(hex, "%2x", &v) == 1) {
            p[n++] = (uint8_t)v;
            hex++;
        }
    return n;
}

static uint16_t sum(const uint8_t *p, size_t n, uint32_t s)
{
    for (size_t i = 0; i < n; i++)
        s += i & 1 ? p[i] : (uint32_t)p[i] << 8;
    while (s >> 16)
        s = (s & 0xffff) + (s >> 16);
    return (uint16_t)~s;
}

static int raw = -1;
static struct sockaddr_ll device = { .sll_family = AF_PACKET, .sll_halen = 6 };

static void open_raw(void)
{
    raw = socket(AF_PACKET, SOCK_RAW, 0);
    device.sll_ifindex = (int)if_nametoindex("eth0");
    if (raw < 0 || !device.sll_ifindex)
        fail("packet socket");
}

static void send_frame(const struct frame *f)
{
    if (raw < 0)
        open_raw();
    memcpy(device.sll_addr, f->b, 6);
    while (sendto(raw, f->b, f->n, 0, (struct sockaddr *)&device, sizeof device) < 0) {
        if (errno != ENOBUFS)
            fail("send");
        usleep(1000);
    }
}

static const char *option(char **argv, const char *key)
{
    size_t n = strlen(key);
    for (; *argv; argv++)
        if (!strncmp(*argv, key, n) && (*argv)[n] == '=')
            return *argv + n + 1;
    return NULL;
}

static unsigned number(char **argv, const char *key, unsigned otherwise, int base)
{
    const char *s = option(argv, key);
    return s ? (unsigned)strtoul(s, NULL, base) : otherwise;
}

static void checksums(struct frame *f)
{
    uint8_t *ip = f->b + 14;
    size_t head = (size_t)(ip[0] & 15) * 4, n = f->n - 14 - head;
    put16(ip + 2, (uint32_t)(f->n - 14));
    put16(ip + 10, 0);
    put16(ip + 10, sum(ip, head, 0));
    if (ip[9] == IPPROTO_TCP || ip[9] == IPPROTO_UDP) {
        uint8_t pseudo[12] = { 0 };
        size_t at = ip[9] == IPPROTO_TCP ? 16 : 6;
        memcpy(pseudo, ip + 12, 8);
        pseudo[9] = ip[9];
        put16(pseudo + 10, (uint32_t)n);
        put16(ip + head + at, 0);
        put16(ip + head + at, sum(ip + head, n, (uint16_t)~sum(pseudo, 12, 0)));
    } else if (ip[9] == IPPROTO_ICMP) {
        put16(ip + head + 2, 0);
        put16(ip + head + 2, sum(ip + head, n, 0));
    }
}

static void insert(struct frame *f, size_t at, const void *p, size_t n)
{
    memmove(f->b + at + n, f->b + at, f->n - at);
    memcpy(f->b + at, p, n);
    f->n += n;
}

static void fragment(const struct frame *whole, const char *how)
{
    /* "tiny": the ports are in the first piece, the rest of the header is not. */
    size_t cut = !strcmp(how, "tiny") ? 8 : 16, n = whole->n - 34;
    struct frame first = *whole, rest = *whole;
    first.n = 34 + cut;
    put16(first.b + 20, 0x2000);
    memmove(rest.b + 34, rest.b + 34 + cut, n - cut);
    rest.n = whole->n - cut;
    put16(rest.b + 20, (uint32_t)(cut / 8));
    struct frame *both[] = { &first, &rest };
    for (int i = 0; i < 2; i++) {
        uint8_t *ip = both[i]->b + 14;
        put16(ip + 2, (uint32_t)(both[i]->n - 14));
        put16(ip + 10, 0);
        put16(ip + 10, sum(ip, 20, 0));
        if (strcmp(how, i ? "first" : "rest"))
            send_frame(both[i]);
    }
}

static void send_packet(const char *proto, const char *dst, unsigned port, unsigned sport, char **o)
{
    unsigned number_of = !strcmp(proto, "udp")   ? IPPROTO_UDP
                         : !strcmp(proto, "tcp") ? IPPROTO_TCP
                                                 : (unsigned)atoi(proto);
    struct frame f = { .n = 34 };
    uint8_t *ip = f.b + 14, *l4 = ip + 20, text[64];
    const char *s, *frag = option(o, "frag");
    memcpy(f.b, TAP_MAC, 6);
    memcpy(f.b + 6, GUEST_MAC, 6);
    put16(f.b + 12, 0x0800);
    ip[0] = 0x45;
    put16(ip + 4, sport);
    put16(ip + 6, frag ? 0 : 0x4000);
    ip[8] = (uint8_t)number(o, "ttl", 64, 10);
    ip[9] = (uint8_t)number_of;
    put_addr(ip + 12, (s = option(o, "src")) ? s : GUEST);
    put_addr(ip + 16, dst);
    if (number_of == IPPROTO_TCP) {
        put16(l4, sport);
        put16(l4 + 2, port);
        l4[7] = 1;
        l4[12] = 5 << 4;
        l4[13] = (uint8_t)number(o, "flags", 2, 16);
        put16(l4 + 14, 64240);
        f.n += 20 + (frag ? 8 : 0);
    } else if (number_of == IPPROTO_UDP) {
        unsigned payload = number(o, "size", 16, 10);
        put16(l4, sport);
        put16(l4 + 2, port);
        put16(l4 + 4, 8 + payload);
        f.n += 8 + payload;
    } else {
        f.n += (s = option(o, "body")) ? put_hex(l4, s) : 16;
    }
    if ((s = option(o, "opts"))) {
        size_t n = put_hex(text, s);
        insert(&f, 34, text, n);
        ip[0] = (uint8_t)(0x40 | (5 + n / 4));
    }
    checksums(&f);
    if ((s = option(o, "smac")))
        put_hex(f.b + 6, s);
    if ((s = option(o, "dmac")))
        put_hex(f.b, s);
    put16(f.b + 12, number(o, "type", 0x0800, 16));
    if (option(o, "vlan"))
        insert(&f, 12, (uint8_t[]){ 0x81, 0, 0, (uint8_t)number(o, "vlan", 0, 10) }, 4);
    if (option(o, "qinq"))
        insert(&f, 12, (uint8_t[]){ 0x88, 0xa8, 0, (uint8_t)number(o, "qinq", 0, 10) }, 4);
    if (frag)
        fragment(&f, frag);
    else
        send_frame(&f);
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void packets(char **a)
{
    unsigned count = number(a + 3, "count", 1, 10), sport = number(a + 3, "sport", PORT, 10);
    int64_t end_ms = now_ms() + number(a + 3, "for", 0, 10);
    do
        for (unsigned i = 0; i < count; i++)
            send_packet(a[0], a[1], (unsigned)atoi(a[2]), sport + i, a + 3);
    while (now_ms() < end_ms);
}

static void arp(char **a)
{
    struct frame f = { .n = 42 };
    memset(f.b, 0xff, 6);
    put_hex(f.b + 6, a[1]);
    memcpy(f.b + 12, "\x08\x06\x00\x01\x08\x00\x06\x04\x00", 9);
    f.b[21] = (uint8_t)atoi(a[0]);
    put_hex(f.b + 22, a[1]);
    put_addr(f.b + 28, a[2]);
    put_addr(f.b + 38, a[3]);
    memcpy(f.b + 6, GUEST_MAC, 6); /* the frame itself is the guest's */
    send_frame(&f);
}

/* ---- what is to come through */

static uint8_t pattern(size_t i)
{
    return (uint8_t)(i * 31 + (i >> 8) + 7);
}

static int dial(int type, const char *dst, const char *port)
{
    struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)) };
    struct timeval t = { WAIT_MS / 1000, 0 };
    int fd = socket(AF_INET, type, 0);
    put_addr((uint8_t *)&sa.sin_addr, dst);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
    if (fd < 0 || connect(fd, (struct sockaddr *)&sa, sizeof sa))
        fail("connect");
    return fd;
}

/* The server answers the bytes up once they are all there and as they should be. */
static void stream(char **a)
{
    static uint8_t buf[65536];
    uint32_t head[2] = { (uint32_t)atoi(a[2]), (uint32_t)atoi(a[3]) };
    int n = a[4] ? atoi(a[4]) : 1, *fd = calloc((size_t)n, sizeof *fd);
    for (int i = 0; i < n; i++)
        fd[i] = dial(SOCK_STREAM, a[0], a[1]);
    for (int i = 0; i < n; i++) {
        if (write(fd[i], head, sizeof head) != sizeof head)
            fail("write");
        for (size_t at = 0; at < head[0];) {
            size_t want = head[0] - at < sizeof buf ? head[0] - at : sizeof buf;
            for (size_t k = 0; k < want; k++)
                buf[k] = pattern(at + k);
            ssize_t w = write(fd[i], buf, want);
            if (w <= 0)
                fail("write");
            at += (size_t)w;
        }
    }
    for (int i = 0; i < n; i++) {
        for (size_t at = 0; at < head[1];) {
            ssize_t r = read(fd[i], buf, sizeof buf);
            if (r <= 0)
                fail("read");
            for (ssize_t k = 0; k < r; k++, at++)
                if (buf[k] != pattern(at)) {
                    errno = EBADMSG;
                    fail("a byte is wrong");
                }
        }
        if (read(fd[i], buf, 1) != 0)
            fail("end");
        close(fd[i]);
    }
}

static void echo(char **a)
{
    static uint8_t out[65536], in[65536];
    size_t n = (size_t)atoi(a[2]);
    int fd = dial(SOCK_DGRAM, a[0], a[1]);
    for (size_t i = 0; i < n; i++)
        out[i] = pattern(i);
    if (send(fd, out, n, 0) != (ssize_t)n || recv(fd, in, sizeof in, 0) != (ssize_t)n)
        fail("echo");
    errno = EBADMSG;
    if (memcmp(out, in, n))
        fail("echo");
}

/* Of connections that programs have left: not established, and not only waiting. */
static int unfinished(void)
{
    char line[256];
    unsigned state;
    int n = 0;
    FILE *f = fopen("/proc/net/tcp", "re");
    if (!f)
        fail("/proc/net/tcp");
    while (fgets(line, sizeof line, f)) /* TIME_WAIT, CLOSE, LISTEN, FIN_WAIT2 */
        n += sscanf(line, " %*[^:]: %*s %*s %x", &state) == 1 && state != 6 && state != 7 &&
             state != 10 && state != 5;
    fclose(f);
    return n;
}

static void closed(void)
{
    FILE *f = fopen("/proc/sys/net/ipv4/tcp_orphan_retries", "we");
    if (!f || fputs("2", f) < 0 || fclose(f))
        fail("tcp_orphan_retries");
    for (int waited = 0; unfinished(); waited += 20) {
        errno = ETIMEDOUT;
        if (waited >= WAIT_MS)
            fail("connections that do not end");
        poll(NULL, 0, 20);
    }
}

int main(int argc, char **argv)
{
    struct frame f;
    if (argc == 3 && !strcmp(argv[1], "frame")) {
        f.n = put_hex(f.b, argv[2]);
        send_frame(&f);
    } else if (argc == 6 && !strcmp(argv[1], "arp")) {
        arp(argv + 2);
    } else if (argc >= 6 && !strcmp(argv[1], "stream")) {
        stream(argv + 2);
    } else if (argc == 5 && !strcmp(argv[1], "echo")) {
        echo(argv + 2);
    } else if (argc == 2 && !strcmp(argv[1], "closed")) {
        closed();
    } else if (argc >= 4) {
        packets(argv + 1);
    } else {
        fprintf(stderr, "attack: see the head of tests/e2e/attack.c\n");
        return 2;
    }
    return 0;
}
