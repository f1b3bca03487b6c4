/* What an MCP client over stdio sees of orch's speed, beside the least any server could need: an
 * echo server that knows no JSON, and a relay that copies. Harness and servers share one CPU, so
 * that a round trip is work plus two switches and no wake-up of another CPU; the servers take
 * turns, so that a noisy moment meets them all; every answer is checked. The figures are the best
 * of the rounds, medians beside them. Exit status 1 when a target is missed. usage: stdio ORCH
 * ECHO_CONFIG [ROUNDS]         all rows, and the audit log afterwards
 *        stdio floor | stdio relay CMD [ARG…]    the two floors */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SILENCE_MS 30000
enum {
    FIRST_ID = 2, /* after initialize and tools/list */
    WARM = 500,
    /* sequential calls of one era before the other has its turn, in the same server */
    BLOCK = 250,
    BLOCKS = 16,
    WINDOW = 64,
    /* all servers the same time: then a neighbour on the CPU costs all the same share */
    FLOW_MS = 40,
    FLOWS = 4,
    FLOW_MAX = 1 << 20,
    STARTS = 7,
    ROUNDS_MAX = 100,
    BUFFER = 1 << 20,
};

/* ---- the floors: canned JSON, found by string search; they trust their input */

static char in[BUFFER], out[2 * BUFFER];

static void write_all(int fd, const char *p, size_t n)
{
    while (n) {
        ssize_t w = write(fd, p, n);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0)
            _exit(1);
        p += w;
        n -= (size_t)w;
    }
}

static size_t floor_answer(char *to, const char *line)
{
    const char *id = strstr(line, "\"id\":"), *method = strstr(line, "\"method\":\"");
    if (!id || !method)
        return 0;
    long n = strtol(id + 5, NULL, 10);
    method += 10;
    if (strncmp(method, "tools/call", 10) == 0) {
        const char *text = strstr(method, "\"message\":\""),
                   *end = text ? strchr(text + 11, '"') : NULL;
        return (size_t)sprintf(to,
                               "{\"jsonrpc\":\"2.0\",\"id\":%ld,\"result\":{\"content\":[{\"type\":"
                               "\"text\",\"text\":\"%.*s\"}]}}\n",
                               n, end ? (int)(end - text - 11) : 0, end ? text + 11 : "");
    }
    const char *result = strncmp(method, "tools/list", 10) == 0
                             ? "\"tools\":[{\"name\":\"echo\",\"description\":\"Echo\","
                               "\"inputSchema\":{\"type\":\"object\"}}]"
                             : "\"protocolVersion\":\"2025-11-25\",\"capabilities\":{\"tools\":{}},"
                               "\"serverInfo\":{\"name\":\"floor\",\"version\":\"1\"}";
    return (size_t)sprintf(to, "{\"jsonrpc\":\"2.0\",\"id\":%ld,\"result\":{%s}}\n", n, result);
}

static int floor_main(void)
{
    size_t n = 0;
    for (ssize_t r; (r = read(0, in + n, sizeof in - n)) > 0;) {
        n += (size_t)r;
        size_t m = 0;
        char *line = in;
        for (char *nl; (nl = memchr(line, '\n', n - (size_t)(line - in))); line = nl + 1) {
            *nl = 0;
            m += floor_answer(out + m, line);
        }
        write_all(1, out, m);
        n -= (size_t)(line - in);
        memmove(in, line, n);
    }
    return 0;
}

static void start(char **argv, pid_t *pid, int *to, int *from);

static int relay_main(char **argv)
{
    pid_t pid;
    int to, from;
    start(argv, &pid, &to, &from);
    struct pollfd p[] = { { 0, POLLIN, 0 }, { from, POLLIN, 0 } };
    while (poll(p, 2, -1) >= 0) {
        if (p[0].revents) {
            ssize_t r = read(0, in, sizeof in);
            if (r <= 0)
                break;
            write_all(to, in, (size_t)r);
        }
        if (p[1].revents) {
            ssize_t r = read(from, out, sizeof out);
            if (r <= 0)
                break;
            write_all(1, out, (size_t)r);
        }
    }
    close(to);
    waitpid(pid, NULL, 0);
    return 0;
}

/* ---- a client */

static struct client {
    const char *name;
    pid_t pid;
    int to, from;
    char buf[BUFFER];
    size_t at, n; /* bytes not yet read */
    long id;
    char logs[64]; /* the server's standard error goes there */
} client;

static void die(const char *what, const char *line, size_t n)
{
    fprintf(stderr, "stdio: %s: %s: %.*s\n", client.name, what, n > 500 ? 500 : (int)n, line);
    if (client.logs[0])
        fprintf(stderr, "its standard error is in %s\n", client.logs);
    if (client.pid > 0)
        kill(client.pid, SIGKILL);
    exit(2);
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void start(char **argv, pid_t *pid, int *to, int *from)
{
    extern char **environ;
    int a[2], b[2];
    posix_spawn_file_actions_t fa;
    if (pipe2(a, O_CLOEXEC) < 0 || pipe2(b, O_CLOEXEC) < 0)
        die("pipe", strerror(errno), 100);
    posix_spawn_file_actions_init(&fa);
    posix_spawn_file_actions_adddup2(&fa, a[0], 0);
    posix_spawn_file_actions_adddup2(&fa, b[1], 1);
    if (client.logs[0])
        posix_spawn_file_actions_addopen(&fa, 2, client.logs, O_WRONLY | O_CREAT | O_APPEND, 0600);
    int e = posix_spawnp(pid, argv[0], &fa, NULL, argv, environ);
    if (e)
        die(argv[0], strerror(e), strlen(strerror(e)));
    posix_spawn_file_actions_destroy(&fa);
    close(a[0]);
    close(b[1]);
    *to = a[1];
    *from = b[0];
}

/* Reads what is there, waiting for something. */
static void receive(void)
{
    struct client *c = &client;
    memmove(c->buf, c->buf + c->at, c->n);
    c->at = 0;
    struct pollfd p = { c->from, POLLIN, 0 };
    if (poll(&p, 1, SILENCE_MS) <= 0)
        die("silent", "", 0);
    ssize_t r = read(c->from, c->buf + c->n, sizeof c->buf - 1 - c->n);
    if (r <= 0)
        die("ended", c->buf, c->n);
    c->n += (size_t)r;
}

/* A complete line that has been received, its newline cut off; NULL when there is none. */
static char *line_at_hand(size_t *n)
{
    struct client *c = &client;
    char *line = c->buf + c->at, *nl = memchr(line, '\n', c->n);
    if (!nl)
        return NULL;
    *nl = 0;
    *n = (size_t)(nl - line);
    c->at += *n + 1;
    c->n -= *n + 1;
    return line;
}

static char *next_line(size_t *n)
{
    char *line;
    while (!(line = line_at_hand(n)))
        receive();
    return line;
}

#define META \
    ",\"_meta\":{\"io.modelcontextprotocol/" \
    "protocolVersion\":\"2026-07-28\",\"io.modelcontextprotocol/clientInfo\":" \
    "{\"name\":\"bench\",\"version\":\"1\"},\"io.modelcontextprotocol/clientCapabilities\":{}}"

static int put_call(char *to, long id, bool modern)
{
    return sprintf(to,
                   "{\"jsonrpc\":\"2.0\",\"id\":%ld,\"method\":\"tools/"
                   "call\",\"params\":{\"name\":\"echo\",\"arguments\":"
                   "{\"message\":\"text no. %08ld\"}%s}}\n",
                   id, id, modern ? META : "");
}

/* The id of an answer that has all it must have. */
static long check(const char *line, size_t n)
{
    char text[64];
    static const char head[] = "{\"jsonrpc\":\"2.0\",\"id\":";
    char *end;
    if (strncmp(line, head, sizeof head - 1) != 0)
        die("not an answer", line, n);
    long id = strtol(line + sizeof head - 1, &end, 10);
    sprintf(text, "\"content\":[{\"type\":\"text\",\"text\":\"text no. %08ld\"}]", id);
    if (strncmp(end, ",\"result\":{", 11) != 0 || !strstr(end, text) ||
        strstr(end, "\"isError\":true") || line[n - 1] != '}')
        die("wrong answer", line, n);
    return id;
}

static void handshake(void)
{
    static const char hello[] =
        "{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"initialize\",\"params\":{\"protocolVersion\":"
        "\"2025-11-25\","
        "\"capabilities\":{},\"clientInfo\":{\"name\":\"bench\",\"version\":\"1\"}}}\n";
    static const char list[] = "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}\n"
                               "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/list\"}\n";
    size_t n;
    write_all(client.to, hello, sizeof hello - 1);
    char *line = next_line(&n);
    if (!strstr(line, "\"id\":0") || !strstr(line, "\"protocolVersion\":\"2025-11-25\""))
        die("initialize", line, n);
    write_all(client.to, list, sizeof list - 1);
    line = next_line(&n);
    if (!strstr(line, "\"id\":1") || !strstr(line, "\"name\":\"echo\""))
        die("tools/list", line, n);
    client.id = FIRST_ID;
}

/* Start to the answer of tools/list, in microseconds. */
static double client_start(const char *name, char **argv)
{
    client.name = name;
    client.n = client.at = 0;
    double t = now_us();
    start(argv, &client.pid, &client.to, &client.from);
    handshake();
    return now_us() - t;
}

static void client_stop(void)
{
    int status;
    close(client.to);
    if (waitpid(client.pid, &status, 0) != client.pid || status)
        die("exit status", strerror(WEXITSTATUS(status)), 100);
    close(client.from);
    client.pid = 0;
}

static double call(bool modern)
{
    char b[1024];
    size_t n;
    long id = client.id++;
    int k = put_call(b, id, modern);
    double t = now_us();
    write_all(client.to, b, (size_t)k);
    char *line = next_line(&n);
    if (check(line, n) != id)
        die("answer to another call", line, n);
    return now_us() - t;
}

/* WINDOW calls in flight for FLOW_MS: for each answer at hand the next call, one write. Calls/s. */
static double flow(void)
{
    static char asked[WINDOW * 1024];
    static bool seen[FLOW_MAX];
    memset(seen, 0, sizeof seen);
    long first = client.id, sent = 0, got = 0;
    double t = now_us(), took;
    do {
        size_t m = 0, n;
        took = now_us() - t;
        for (; took < FLOW_MS * 1000 && sent - got < WINDOW && sent < FLOW_MAX; sent++)
            m += (size_t)put_call(asked + m, first + sent, false);
        write_all(client.to, asked, m);
        receive();
        for (char *line; (line = line_at_hand(&n)); got++) {
            long id = check(line, n) - first;
            if (id < 0 || id >= sent || seen[id])
                die("unknown or answered twice", line, n);
            seen[id] = true;
        }
    } while (got < sent);
    took = now_us() - t;
    client.id += sent;
    return (double)sent / took * 1e6;
}

/* Proportional memory of a process and its descendants, in KiB. */
static long pss_kb(pid_t pid)
{
    char path[64], line[4096];
    long kb = 0, child;
    snprintf(path, sizeof path, "/proc/%d/smaps_rollup", pid);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "Pss: %ld", &kb) == 1)
            break;
    if (f)
        fclose(f);
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, pid);
    if (!(f = fopen(path, "r")))
        die("cannot be read", path, strlen(path));
    while (fscanf(f, "%ld", &child) == 1)
        kb += pss_kb((pid_t)child);
    fclose(f);
    return kb;
}

/* ---- rows and rounds */

enum { START_MS, P50, P99, MODERN, FLOW, PSS, FIGURES };
enum { SAMPLES = STARTS > FLOWS ? STARTS : FLOWS }; /* a round, at most */

struct row {
    const char *name;
    char *argv[9];
    int n[FIGURES];
    double v[FIGURES][ROUNDS_MAX * SAMPLES];
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void add(struct row *r, int figure, double v)
{
    r->v[figure][r->n[figure]++] = v;
}

static double best(const struct row *r, int figure)
{
    double b = r->v[figure][0];
    for (int i = 1; i < r->n[figure]; i++)
        /* memory: the largest */
        if (figure == FLOW || figure == PSS ? r->v[figure][i] > b : r->v[figure][i] < b)
            b = r->v[figure][i];
    return b;
}

static double middle(struct row *r, int figure)
{
    qsort(r->v[figure], (size_t)r->n[figure], sizeof(double), by_value);
    return r->v[figure][r->n[figure] / 2];
}

static void measure_starts(struct row *r)
{
    add(r, START_MS, client_start(r->name, r->argv) / 1e3);
    client_stop();
}

static long measure_calls(struct row *r)
{
    static double took[2][BLOCK * BLOCKS];
    client_start(r->name, r->argv);
    for (int i = 0; i < WARM; i++)
        call(i & 1);
    for (int b = 0; b < BLOCKS; b++)
        for (int modern = 0; modern < 2; modern++)
            for (int i = 0; i < BLOCK; i++)
                took[modern][b * BLOCK + i] = call(modern);
    for (int modern = 0; modern < 2; modern++)
        qsort(took[modern], BLOCK * BLOCKS, sizeof(double), by_value);
    add(r, P50, took[0][BLOCK * BLOCKS / 2]);
    add(r, P99, took[0][BLOCK * BLOCKS * 99 / 100]);
    add(r, MODERN, took[1][BLOCK * BLOCKS / 2] - took[0][BLOCK * BLOCKS / 2]);
    for (int i = 0; i < FLOWS; i++)
        add(r, FLOW, flow());
    add(r, PSS, (double)pss_kb(client.pid) / 1024);
    client_stop();
    return client.id - FIRST_ID;
}

static void print_row(struct row *r)
{
    printf("%-28s %6.1f /%6.1f  %6.1f /%6.1f  %5.0f k /%5.0f k  %6.2f /%6.2f  %5.1f\n", r->name,
           best(r, P50), middle(r, P50), best(r, P99), middle(r, P99), best(r, FLOW) / 1e3,
           middle(r, FLOW) / 1e3, best(r, START_MS), middle(r, START_MS), best(r, PSS));
}

static bool verdict(const char *what, double value, double target, const char *unit)
{
    bool ok = value <= target;
    printf("%-58s %6.2f%s  target <= %g%s  %s\n", what, value, unit, target, unit,
           ok ? "met" : "MISSED");
    return ok;
}

/* ---- the audit log */

/* Counts the lines of every audit file in which needle occurs. */
static long audit_lines(const char *dir, const char *needle)
{
    char path[4096];
    static char line[1 << 20];
    long n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!strstr(e->d_name, ".jsonl") || strstr(e->d_name, ".head"))
            continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        FILE *f = fopen(path, "r");
        while (f && fgets(line, sizeof line, f))
            n += strstr(line, needle) != NULL;
        if (f)
            fclose(f);
    }
    if (d)
        closedir(d);
    return n;
}

static bool check_audit(const char *state, const char *orch, const char *config, long calls)
{
    char dir[4096], command[4096];
    snprintf(dir, sizeof dir, "%s/orch/audit", state);
    snprintf(command, sizeof command, "'%s' -c '%s' audit verify >/dev/null", orch, config);
    long decisions = audit_lines(dir, "\"event\":\"decision\""),
         outcomes = audit_lines(dir, "\"event\":\"outcome\"");
    bool whole = decisions == calls && outcomes == calls, verified = system(command) == 0;
    printf("audit: %ld calls, %ld decisions, %ld outcomes: %s; audit verify: %s\n", calls,
           decisions, outcomes, whole ? "two lines a call" : "LINES MISSING OR TOO MANY",
           verified ? "done" : "FAILED");
    return whole && verified;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "floor") == 0)
        return floor_main();
    if (argc > 2 && strcmp(argv[1], "relay") == 0)
        return relay_main(argv + 2);
    int rounds = argc > 3 ? atoi(argv[3]) : 5;
    if (argc < 3 || rounds < 1 || rounds > ROUNDS_MAX) {
        fprintf(stderr, "usage: stdio ORCH ECHO_CONFIG [ROUNDS]\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    cpu_set_t cpus;
    int cpu = sched_getcpu();
    CPU_ZERO(&cpus);
    CPU_SET(cpu, &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus) < 0)
        die("sched_setaffinity", strerror(errno), 100);
    char self[4096], state[] = "/tmp/orch-bench-XXXXXX";
    ssize_t k = readlink("/proc/self/exe", self, sizeof self - 1);
    if (k < 0 || !mkdtemp(state))
        die("temporary folder", strerror(errno), 100);
    self[k] = 0;
    setenv("XDG_STATE_HOME", state, 1);
    setenv("XDG_RUNTIME_DIR", state, 1);
    snprintf(client.logs, sizeof client.logs, "%s/stderr", state);

    static char c_floor[] = "floor", c_relay[] = "relay", c_c[] = "-c", c_mcp[] = "mcp",
                c_stdio[] = "stdio", c_end[] = "--";
    enum { FLOOR, ORCH, RELAY, PROXY, ROWS };
    static struct row rows[ROWS];
    rows[FLOOR] = (struct row){ .name = "floor", .argv = { self, c_floor } };
    rows[ORCH] = (struct row){ .name = "orch", .argv = { argv[1], c_c, argv[2], c_mcp, c_stdio } };
    rows[RELAY] = (struct row){ .name = "relay in front of the floor",
                                .argv = { self, c_relay, self, c_floor } };
    rows[PROXY] = (struct row){ .name = "orch in front of the floor",
                                .argv = { argv[1], c_c, argv[2], c_mcp, c_stdio, c_end, self,
                                          c_floor } };
    long calls = 0;
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < STARTS; i++)
            for (int r = 0; r < ROWS; r++)
                measure_starts(&rows[r]);
        for (int r = 0; r < ROWS; r++) {
            long n = measure_calls(&rows[r]);
            calls += r == ORCH || r == PROXY ? n : 0;
        }
    }

    printf("echo tool, 17-byte argument, 20 rules (one with `when`), audited; one CPU (no. %d), %d "
           "rounds, best / median\n",
           cpu, rounds);
    printf("%-28s %14s  %14s  %17s  %14s  %s\n", "", "p50 us", "p99 us", "64 in flight /s",
           "start ms", "PSS MiB");
    for (int r = 0; r < ROWS; r++)
        print_row(&rows[r]);
    printf("\n");
    bool ok = verdict("p50: orch / floor", best(&rows[ORCH], P50) / best(&rows[FLOOR], P50), 3, "");
    ok &= verdict("64 in flight: floor / orch", best(&rows[FLOOR], FLOW) / best(&rows[ORCH], FLOW),
                  12, "");
    ok &= verdict("start to the answer of tools/list: orch / floor",
                  best(&rows[ORCH], START_MS) / best(&rows[FLOOR], START_MS), 6, "");
    ok &= verdict("memory before the first microVM", best(&rows[ORCH], PSS), 10, " MiB");
    ok &= verdict("2026-07-28's _meta, p50 of the same server: more", middle(&rows[ORCH], MODERN),
                  1, " us");
    printf("%-58s %6.2f\n", "proxy, p50: orch / relay",
           best(&rows[PROXY], P50) / best(&rows[RELAY], P50));
    printf("%-58s %6.2f\n", "proxy, 64 in flight: relay / orch",
           best(&rows[RELAY], FLOW) / best(&rows[PROXY], FLOW));
    ok &= check_audit(state, argv[1], argv[2], calls);
    if (ok) {
        char command[64];
        snprintf(command, sizeof command, "rm -r %s", state);
        ok = system(command) == 0;
    } else {
        printf("the state folder is kept: %s\n", state);
    }
    return ok ? 0 : 1;
}
