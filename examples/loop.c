/* A C program with an event loop of its own, here poll: it reads lines from stdin, has each judged
 * as a call of the tool `shout`, and prints the answers; the tool takes its time. orch is one
 * descriptor more in the loop, and nothing waits for another.
 *
 *   cc -o loop loop.c $(pkg-config --cflags --libs --static orch)
 *   echo '{"text":"hello"}' | ./loop orchestrator.lua
 *
 * The policies beside the configuration allow the tool:
 *   return { rules = { { tool = "shout", action = "allow" } } } */
#include <ctype.h>
#include <orch.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { JOBS_MAX = 64 };

/* The work that the tool has to do when the timer is due. */
static struct program {
    struct orch *o;
    int timer, pending;
    int n_jobs;
    struct job {
        struct orch_tool_call *call;
        char text[256];
    } jobs[JOBS_MAX];
} program;

/* The tool, when policy allowed the call. args is JSON that fits the schema below. */
static void shout(void *ud, struct orch_tool_call *call, const char *args)
{
    struct program *p = ud;
    if (p->n_jobs == JOBS_MAX) {
        orch_answer(call, "too much to do", 1);
        return;
    }
    const char *text = strchr(strstr(args, "\"text\""), ':') + 1;
    struct job *job = &p->jobs[p->n_jobs++];
    job->call = call;
    snprintf(job->text, sizeof job->text, "%s", text + strspn(text, " \""));
    job->text[strcspn(job->text, "\"")] = 0;
    timerfd_settime(p->timer, 0, &(struct itimerspec){ .it_value.tv_nsec = 50 * 1000 * 1000 },
                    NULL);
}

static void work(struct program *p)
{
    uint64_t times;
    if (read(p->timer, &times, sizeof times) < 0)
        return;
    for (int i = 0; i < p->n_jobs; i++) {
        for (char *c = p->jobs[i].text; *c; c++)
            *c = (char)toupper((unsigned char)*c);
        orch_answer(p->jobs[i].call, p->jobs[i].text, 0);
    }
    p->n_jobs = 0;
}

static void print_result(void *ud, const char *result, int is_error)
{
    struct program *p = ud;
    printf("%s: %s\n", is_error ? "error" : "result", result);
    p->pending--;
}

/* One line of input is one call. False at the end. */
static bool read_line(struct program *p)
{
    static char line[1024];
    static size_t n;
    struct orch_error err;
    ssize_t r = read(STDIN_FILENO, line + n, sizeof line - 1 - n);
    if (r <= 0)
        return false;
    n += (size_t)r;
    line[n] = 0;
    for (char *end; (end = strchr(line, '\n')); memmove(line, end + 1, n + 1)) {
        *end = 0;
        n -= (size_t)(end + 1 - line);
        if (orch_call(p->o, "shout", line, "loop", print_result, p, &err) < 0)
            fprintf(stderr, "loop: %s\n", err.message);
        else
            p->pending++;
    }
    return n < sizeof line - 1;
}

static void log_line(void *ud, const char *line, size_t n)
{
    (void)ud;
    fprintf(stderr, "loop says: %.*s", (int)n, line);
}

int main(int argc, char **argv)
{
    struct program *p = &program;
    struct orch_error err;
    struct orch_options options = { .size = sizeof options,
                                    .config = argc > 1 ? argv[1] : NULL,
                                    .log = log_line,
                                    .log_level = ORCH_LOG_INFO };
    struct orch_tool_def def = {
        .name = "shout",
        .description = "Say it loud",
        .input = "{\"type\":\"object\",\"properties\":{\"text\":{\"type\":\"string\"}},"
                 "\"required\":[\"text\"]}",
        .fn = shout,
        .ud = p,
    };
    signal(SIGPIPE, SIG_IGN);
    p->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    p->o = orch_open(&options, &err);
    if (!p->o || orch_add_tool(p->o, &def, &err) < 0)
        return fprintf(stderr, "loop: %s\n", err.message), err.status;
    enum { ORCH, TIMER, INPUT };
    struct pollfd fds[] = {
        [ORCH] = { .fd = orch_fd(p->o), .events = POLLIN },
        [TIMER] = { .fd = p->timer, .events = POLLIN },
        [INPUT] = { .fd = STDIN_FILENO, .events = POLLIN },
    };
    while (fds[INPUT].fd >= 0 || p->pending) {
        if (poll(fds, sizeof fds / sizeof *fds, -1) < 0)
            return perror("poll"), 1;
        if (fds[INPUT].revents && !read_line(p))
            fds[INPUT].fd = -1; /* poll leaves it out */
        if (fds[TIMER].revents)
            work(p);
        if (fds[ORCH].revents && orch_step(p->o, 0) < 0)
            return 1;
    }
    orch_close(p->o);
    close(p->timer);
    return 0;
}
