/* From the kernel's first process to an open port: mounts, modules, the image's disk, the
 * network. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void must_mount(const char *what, const char *where, const char *type, unsigned long flags,
                       const char *data)
{
    mkdir(where, 0755);
    if (mount(what, where, type, flags, data) < 0)
        die(where);
}

/* Bit n: there is a virtio device of type n (1 network, 2 block, …). */
static uint64_t virtio_devices(void)
{
    uint64_t have = 0;
    DIR *d = opendir("/sys/bus/virtio/devices");
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[300], text[16] = "";
        snprintf(path, sizeof path, "/sys/bus/virtio/devices/%.200s/device", e->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && read(fd, text, sizeof text - 1) > 0)
            have |= 1ULL << (strtoul(text, NULL, 16) & 63);
        close_fd(&fd);
    }
    if (d)
        closedir(d);
    return have;
}

/* Lines of "PATH" or "PATH TYPE": the latter only where there is a virtio device of that type. */
static void load_modules(void)
{
    char line[512];
    uint64_t have = 0;
    FILE *f = fopen("/etc/orch/modules", "re");
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *type = strchr(line, ' ');
        if (type) {
            *type++ = 0;
            have = have ? have : virtio_devices() | 1;
            if (!(have & 1ULL << (strtoul(type, NULL, 10) & 63)))
                continue;
        }
        int fd = open(line, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            die(line);
        close(fd);
    }
    if (f)
        fclose(f);
}

/* All that can be written to is one file system in memory, so that its bound is one: what is full
 * is full (ENOSPC) long before the guest has no memory left to run anything. */
static void mount_writable(const char *root, bool disk)
{
    enum { BARE = 1 }; /* where there is no disk, whose writable layer has the rest */
    static const struct {
        const char *name, *at;
        mode_t mode;
        uid_t uid;
        unsigned when;
        unsigned long flags;
    } places[] = {
        { "tmp", "tmp", 01777, 0, 0, MS_NOSUID | MS_NODEV },
        { "shm", "dev/shm", 01777, 0, 0, MS_NOSUID | MS_NODEV },
        { "run", "run", 0755, 0, 0, MS_NOSUID | MS_NODEV },
        { "var-tmp", "var/tmp", 01777, 0, BARE, MS_NOSUID | MS_NODEV },
        { "root", "root", 0700, 0, BARE, 0 },
        { "user", "home/user", 0755, 1000, BARE, 0 },
    };
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        char from[64], to[64];
        if (disk && places[i].when == BARE)
            continue;
        snprintf(from, sizeof from, "/mnt/rw/%s", places[i].name);
        snprintf(to, sizeof to, "%s/%s", root, places[i].at);
        mkdir(to, 0755);
        if (mkdir(from, 0755) < 0 || chmod(from, places[i].mode) < 0 ||
            chown(from, places[i].uid, places[i].uid) < 0 ||
            mount(from, to, NULL, MS_BIND, NULL) < 0 ||
            (places[i].flags &&
             mount(NULL, to, NULL, MS_BIND | MS_REMOUNT | places[i].flags, NULL) < 0))
            die(to);
    }
}

/* Where the image has a disk, its file system with a writable layer in memory over it becomes the
 * root, the agent's too; what is mounted already goes along. Without its driver this is not the
 * guest that was asked for. */
static void enter_disk(void)
{
    static const char *const moved[][2] = { { "/proc", "/mnt/new/proc" },
                                            { "/sys", "/mnt/new/sys" },
                                            { "/dev", "/mnt/new/dev" } };
    must_mount("tmpfs", "/mnt/rw", "tmpfs", 0, "mode=0755,size=50%");
    if (!(virtio_devices() & 1ULL << 2)) {
        mount_writable("", false);
        umount2("/mnt/rw", MNT_DETACH);
        rmdir("/mnt/rw");
        return;
    }
    must_mount("/dev/vda", "/mnt/disk", "erofs", MS_RDONLY, NULL);
    mkdir("/mnt/rw/upper", 0755);
    mkdir("/mnt/rw/work", 0755);
    must_mount("overlay", "/mnt/new", "overlay", 0,
               "lowerdir=/mnt/disk,upperdir=/mnt/rw/upper,workdir=/mnt/rw/work");
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++)
        if (mount(moved[i][0], moved[i][1], NULL, MS_MOVE, NULL) < 0)
            die(moved[i][1]);
    mount_writable("/mnt/new", true);
    if (chdir("/mnt/new") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 ||
        chdir("/") < 0)
        die("the disk as root");
}

/* Opens the port, -1 while it is not there. */
static int find_port(void)
{
    int fd = -1;
    DIR *d = opendir("/sys/class/virtio-ports");
    for (struct dirent *e; d && fd < 0 && (e = readdir(d));) {
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%.200s/name", e->d_name);
        int f = open(path, O_RDONLY | O_CLOEXEC);
        if (f < 0)
            continue;
        if (read(f, name, sizeof name - 1) > 0 && strcmp(name, ORCH_WIRE_PORT "\n") == 0) {
            snprintf(path, sizeof path, "/dev/%.200s", e->d_name);
            fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
        close(f);
    }
    if (d)
        closedir(d);
    return fd;
}

static void set_addr(struct sockaddr *sa, uint32_t addr)
{
    struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(addr) };
    memcpy(sa, &in, sizeof in);
}

/* The same in every guest, and so frozen into the template. */
static void networks_up(void)
{
    struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
    struct ifreq addr = { .ifr_name = "eth0" }, mask = addr, up = addr;
    struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0)
        ioctl(fd, SIOCSIFFLAGS, &lo);
    if (virtio_devices() & 1 << 1) {
        int no_ipv6 = open("/proc/sys/net/ipv6/conf/all/disable_ipv6", O_WRONLY | O_CLOEXEC);
        if (no_ipv6 >= 0 && write(no_ipv6, "1", 1) != 1)
            die("disable_ipv6");
        close_fd(&no_ipv6);
        set_addr(&addr.ifr_addr, ORCH_WIRE_NET_ADDR);
        set_addr(&mask.ifr_netmask, ~0u << (32 - ORCH_WIRE_NET_BITS));
        up.ifr_flags = IFF_UP | IFF_RUNNING;
        set_addr(&route.rt_dst, 0);
        set_addr(&route.rt_genmask, 0);
        set_addr(&route.rt_gateway, ORCH_WIRE_NET_GATEWAY);
        if (ioctl(fd, SIOCSIFADDR, &addr) || ioctl(fd, SIOCSIFNETMASK, &mask) ||
            ioctl(fd, SIOCSIFFLAGS, &up) || ioctl(fd, SIOCADDRT, &route))
            die("eth0");
        /* The driver's worker sees the link, and then the kernel's opens the queue; until then what
         * is sent is dropped, in clones too. */
        up.ifr_flags = 0;
        for (int i = 0; !(up.ifr_flags & IFF_RUNNING); i++) {
            if (i == 10000 || ioctl(fd, SIOCGIFFLAGS, &up))
                die("eth0: no link");
            usleep(500);
        }
    }
    close_fd(&fd);
}

void boot(void)
{
    const unsigned long strict = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    must_mount("proc", "/proc", "proc", strict, NULL);
    must_mount("sysfs", "/sys", "sysfs", strict, NULL);
    must_mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = 0; i < 3; i++)
        dup2(null, i);
    if (null > 2)
        close(null);
    /* As udev makes them: shells need them for <(…), scripts for /dev/stdin. */
    static const char *const links[][2] = { { "/proc/self/fd", "/dev/fd" },
                                            { "/proc/self/fd/0", "/dev/stdin" },
                                            { "/proc/self/fd/1", "/dev/stdout" },
                                            { "/proc/self/fd/2", "/dev/stderr" } };
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlink(links[i][0], links[i][1]) < 0)
            die(links[i][1]);
    load_modules();
    enter_disk();
    must_mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
               "mode=0620,gid=5,ptmxmode=0666");
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", strict, NULL); /* optional */

    char name[64] = "";
    int fd = open("/etc/hostname", O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && read(fd, name, sizeof name - 1) > 0)
        sethostname(name, strcspn(name, "\n"));
    close_fd(&fd);
    networks_up();

    /* The port appears, gets its name and is opened by the host in steps of the driver's worker. */
    for (int i = 0; port < 0 && i < 30000; i++)
        if ((port = find_port()) < 0)
            usleep(500);
    if (port < 0)
        die("no virtio-serial port named " ORCH_WIRE_PORT);
    for (int i = 0; i < 30000; i++) {
        struct pollfd p = { .fd = port, .events = POLLOUT };
        if (poll(&p, 1, 0) == 1 && !(p.revents & POLLHUP))
            return;
        usleep(500);
    }
    die("the host does not open the port");
}
