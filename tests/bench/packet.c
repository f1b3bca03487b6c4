/* What the packet filter costs a packet: 64-byte frames are written to tap0 as a VMM would and
 * leave by up0, in a network namespace of this program's own, in turns without and with a microVM's
 * tables. The kernel does all of it inside write(2), whose time is taken.
 *
 *     packet [ROUNDS]     as root, or as a user that may make user namespaces and open /dev/net/tun
 *
 * Prints the 25th percentile of each and the difference, and what the tables themselves take: to
 * read back and compare all of them, to ask whether they changed, to replace the host's addresses;
 * exit status 1 when the difference is over the target. */
#include "base/util.h"
#include "launch/wire.h"
#include "net/link.h"
#include "net/nft.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PACKETS = 50000, FLOWS = 32 };
#define TARGET_US 2.0
#define SERVER UINT32_C(0xc6336407) /* 198.51.100.7 */
#define UPLINK UINT32_C(0x0aff0102) /* 10.255.1.2 */
#define PEER_MAC "\x02\0\0\0\0\x09"

static struct orch_err err;
static unsigned first_port; /* of the flows at hand */

static void die(const char *what)
{
    fprintf(stderr, "packet: %s: %m %s\n", what, err.msg);
    exit(2);
}

static void put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        die(path);
    close(fd);
}

static void run(const char *command)
{
    if (system(command) != 0)
        die(command);
}

static int open_tap(const char *name)
{
    struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI };
    snprintf(r.ifr_name, sizeof r.ifr_name, "%s", name);
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &r) < 0)
        die("/dev/net/tun");
    return fd;
}

static int open_netlink(int protocol)
{
    struct sockaddr_nl any = { .nl_family = AF_NETLINK };
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof any) < 0)
        die("netlink");
    return fd;
}

static void enter_namespace(void)
{
    char map[64];
    unsigned uid = getuid(), gid = getgid();
    if (unshare(CLONE_NEWNET | (uid ? CLONE_NEWUSER : 0)) < 0)
        die("unshare");
    if (!uid)
        return;
    put("/proc/self/setgroups", "deny");
    snprintf(map, sizeof map, "0 %u 1", uid);
    put("/proc/self/uid_map", map);
    snprintf(map, sizeof map, "0 %u 1", gid);
    put("/proc/self/gid_map", map);
}

/* UDP over IPv4 in Ethernet, 64 bytes. */
static void frame(unsigned char out[64], const char *macs, uint32_t from, unsigned from_port,
                  uint32_t to, unsigned to_port)
{
    struct iphdr ip = { .version = 4,
                        .ihl = 5,
                        .tot_len = htons(50),
                        .ttl = 64,
                        .protocol = IPPROTO_UDP,
                        .saddr = htonl(from),
                        .daddr = htonl(to) };
    struct udphdr udp = { .source = htons((uint16_t)from_port),
                          .dest = htons((uint16_t)to_port),
                          .len = htons(30) };
    uint32_t sum = 0;
    uint16_t words[10];
    memcpy(words, &ip, 20);
    for (int i = 0; i < 10; i++)
        sum += words[i];
    sum = (sum & 0xffff) + (sum >> 16);
    ip.check = (uint16_t) ~(sum + (sum >> 16));
    memset(out, 0, 64);
    memcpy(out, macs, 12);
    out[12] = 0x08;
    memcpy(out + 14, &ip, sizeof ip);
    memcpy(out + 34, &udp, sizeof udp);
}

static void request(unsigned char out[64], unsigned flow)
{
    frame(out, ORCH_NET_TAP_MAC ORCH_NET_GUEST_MAC, ORCH_NET_GUEST, first_port + flow, SERVER, 443);
}

static void drain(int fd)
{
    unsigned char in[2048];
    while (read(fd, in, sizeof in) > 0)
        ;
}

/* Each flow gets a packet and, to the uplink's own address, its answer: from then on it is an
 * established one. */
static void answer_flows(int tap, int uplink)
{
    unsigned char out[64];
    struct ifreq r = { .ifr_name = ORCH_NET_UPLINK_IF };
    char macs[12] = "\0\0\0\0\0\0" PEER_MAC;
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s < 0 || ioctl(s, SIOCGIFHWADDR, &r) < 0)
        die("address of the uplink");
    close(s);
    memcpy(macs, r.ifr_hwaddr.sa_data, 6);
    for (unsigned i = 0; i < FLOWS; i++) {
        request(out, i);
        if (write(tap, out, sizeof out) < 0)
            die("write");
        frame(out, macs, SERVER, 443, UPLINK, first_port + i);
        if (write(uplink, out, sizeof out) < 0)
            die("write");
    }
    drain(tap);
    drain(uplink);
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, by_value);
    return v[n / 2];
}

/* The 25th percentile, in microseconds. */
static double measure(int tap, int uplink)
{
    static double took[PACKETS];
    unsigned char out[64], in[2048];
    size_t passed = 0;
    for (unsigned i = 0; i < PACKETS; i++) {
        request(out, i % FLOWS);
        double start = now_us();
        if (write(tap, out, sizeof out) < 0)
            die("write");
        took[i] = now_us() - start;
        for (ssize_t r; (r = read(uplink, in, sizeof in)) > 0;)
            passed += r == 64;
    }
    if (passed != PACKETS)
        die("packets are missing");
    qsort(took, PACKETS, sizeof *took, by_value);
    return took[PACKETS / 4];
}

/* Of the tables in force, the medians. */
static void measure_tables(struct orch_nft *nft, const struct orch_rules *rules)
{
    enum { N = 100 };
    static double took[3][N];
    for (int i = 0; i < N; i++) {
        double t[4] = { now_us() };
        bool bad = orch_nft_verify(nft, rules, &err);
        t[1] = now_us();
        bad |= orch_nft_changed(nft, &err);
        t[2] = now_us();
        bad |= orch_nft_rehost(nft, rules, &err);
        t[3] = now_us();
        if (bad)
            die("tables");
        for (int k = 0; k < 3; k++)
            took[k][i] = t[k + 1] - t[k];
    }
    printf("%zu rules read back and compared: %.0f us; are they changed: %.1f us; the host's "
           "addresses replaced, verified: %.0f us\n",
           rules->n_rules, median(took[0], N), median(took[1], N), median(took[2], N));
}

int main(int argc, char **argv)
{
    static const struct orch_ports https = { 443, 443 };
    static const struct orch_allow allow = { { 0xc6336400, 24 }, IPPROTO_UDP, &https, 1 };
    static const struct orch_cidr host = { 0xcb007105, 32 };
    int rounds = argc > 1 ? atoi(argv[1]) : 10;
    double bare[100], unanswered[100], filtered[100];
    if (rounds < 1 || rounds > 100)
        return 2;
    setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);
    enter_namespace();
    int tap = open_tap(ORCH_NET_TAP), uplink = open_tap(ORCH_NET_UPLINK_IF),
        route = open_netlink(NETLINK_ROUTE);
    struct orch_link_events ev = { 0 };
    struct orch_rules *rules = orch_rules_new(&(struct orch_policy){ .allow = &allow,
                                                                     .n_allow = 1,
                                                                     .connections = 64,
                                                                     .host = &host,
                                                                     .n_host = 1 },
                                              &err);
    orch_nl_setup(route);
    if (!rules || orch_link_tap(route, 0, true, &ev, &err) ||
        orch_link_uplink(route, (int)if_nametoindex(ORCH_NET_UPLINK_IF), 0, true, &ev, &err))
        die("devices");
    run("ip address add 10.255.1.2/24 dev " ORCH_NET_UPLINK_IF " && ip link set " ORCH_NET_UPLINK_IF
        " up && "
        "ip neighbour add 10.255.1.1 lladdr 02:00:00:00:00:09 dev " ORCH_NET_UPLINK_IF
        " && ip route add default via 10.255.1.1");
    measure(tap, uplink);
    for (int i = 0; i < rounds; i++) {
        bare[i] = measure(tap, uplink);
        first_port = 1024 + (unsigned)(i * FLOWS); /* tracked flows outlive the tables */
        struct orch_nft *nft = orch_nft_new(open_netlink(NETLINK_NETFILTER), &err);
        if (!nft || orch_nft_commit(nft, rules, &err) < 0)
            die("tables");
        unanswered[i] = measure(tap, uplink);
        answer_flows(tap, uplink);
        filtered[i] = measure(tap, uplink);
        if (!i)
            measure_tables(nft, rules);
        close(orch_nft_release(nft));
        run("nft flush ruleset");
    }
    double without = median(bare, rounds), with = median(filtered, rounds);
    printf("a 64-byte packet from tap to uplink, 25th percentile of %d, median of %d rounds: %.2f "
           "us without tables; in %d known flows "
           "%.2f us, %.2f more (target %.0f); in as many that nobody answered %.2f us\n",
           PACKETS, rounds, without, FLOWS, with, with - without, TARGET_US,
           median(unanswered, rounds));
    orch_rules_free(rules);
    return with - without > TARGET_US;
}
