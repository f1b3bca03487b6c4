/* The program: global options, then a script, or a command (lua/cli/COMMAND.lua). */
#include "base/log.h"
#include "host/host.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum { SCRIPT_MAX_BYTES = 16 << 20, DEPTH_MAX = 2 };

struct options {
    const char *config, *code;
    struct orch_log log;
    int verbose, level;
    bool help, version, from_stdin;
};

struct running {
    struct orch *o;
    int signo;
    bool nohup; /* SIGHUP was ignored when this started */
};

static struct running running;

static int usage(const char *fmt, ...) ORCH_PRINTF(1, 2);
static int usage(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "orch: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\nTry: orch help\n");
    va_end(ap);
    return ORCH_CLASS_USAGE;
}

/* The global option at argv[*i], which is moved to its last word. 1: taken, 0: it is none, or a
 * negative exit status. */
static int take_global(char **argv, int *i, struct options *opt)
{
    static const char *const valued[] = { "-c", "--config", "--log-format", "--log-level", NULL };
    const char *a = argv[*i], *value = NULL, *name = NULL;
    for (const char *const *v = valued; *v && !name; v++) {
        size_t n = strlen(*v);
        if (strncmp(a, *v, n) != 0 || (a[n] && (a[n] != '=' || n == 2)))
            continue;
        name = *v;
        value = a[n] ? a + n + 1 : argv[*i + 1];
        if (!value)
            return -usage("%s needs a value", name);
        *i += !a[n];
    }
    if (!name) {
        if (strcmp(a, "--version") == 0)
            opt->version = true;
        else if (a[0] == '-' && a[1] && strspn(a + 1, "v") == strlen(a + 1))
            opt->verbose += (int)strlen(a + 1);
        else
            return 0;
    } else if (strcmp(name, "--log-format") == 0) {
        if (strcmp(value, "json") != 0 && strcmp(value, "text") != 0)
            return -usage("--log-format must be text or json, got %s", value);
        opt->log.json = strcmp(value, "json") == 0;
    } else if (strcmp(name, "--log-level") == 0) {
        opt->level = orch_log_parse_level(value);
        if (opt->level < 0)
            return -usage("--log-level must be debug, info, warn or error, got %s", value);
    } else {
        opt->config = value;
    }
    return 1;
}

/* Global options before the command. Returns the index of the first other argument, or a negative
 * exit status. */
static int parse(char **argv, struct options *opt)
{
    static const char *const known[] = { "--config", "--log-format", "--log-level",
                                         "--help",   "--version",    NULL };
    int i = 1;
    for (; argv[i] && argv[i][0] == '-' && argv[i][1]; i++) {
        const char *a = argv[i];
        int r = take_global(argv, &i, opt);
        if (r < 0)
            return r;
        if (r > 0)
            continue;
        if (strcmp(a, "-e") == 0) {
            opt->code = argv[i + 1];
            return opt->code ? i + 2 : -usage("-e needs a value");
        } else if (strcmp(a, "-h") == 0 || strcmp(a, "--help") == 0) {
            opt->help = true;
        } else {
            const char *near = orch_nearest(a, known);
            return -usage("unknown option %s%s%s%s", a, near ? "; did you mean " : "",
                          near ? near : "", near ? "?" : "");
        }
    }
    if (argv[i] && strcmp(argv[i], "-") == 0) {
        opt->from_stdin = true;
        i++;
    }
    return i;
}

/* Takes the global options out of a command's words, up to CMD: what follows "--" or, with mcp, the
 * word after its subcommand. A word behind an option of the command's own is left alone: it may be
 * its value. */
static int parse_rest(char **argv, struct options *opt)
{
    int kept = 0, words = 0, limit = argv[0] && strcmp(argv[0], "mcp") == 0 ? 2 : INT_MAX, i = 0;
    for (; argv[i] && strcmp(argv[i], "--") != 0 && words <= limit; i++) {
        int r = take_global(argv, &i, opt);
        if (r < 0)
            return r;
        if (r > 0)
            continue;
        bool option = argv[i][0] == '-';
        words += !option;
        argv[kept++] = argv[i];
        if (option && argv[i + 1] && argv[i + 1][0] != '-')
            argv[kept++] = argv[++i];
    }
    while (argv[i])
        argv[kept++] = argv[i++];
    argv[kept] = NULL;
    return kept;
}

static void on_signal(int signo)
{
    if (running.signo)
        _exit(128 + signo); /* asked twice */
    running.signo = signo;
    if (running.o && running.o->script.task)
        orch_task_cancel(running.o->script.task, signo == SIGINT   ? "interrupted"
                                                 : signo == SIGHUP ? "hung up"
                                                                   : "terminated");
}

static void on_sigint(void *ud)
{
    (void)ud;
    on_signal(SIGINT);
}

static void on_sigterm(void *ud)
{
    (void)ud;
    on_signal(SIGTERM);
}

/* A server reloads. What runs in front of a terminal ends with it, unless nohup says otherwise;
 * kernel and shell may both tell it. */
static void on_sighup(void *ud)
{
    struct orch *o = ud;
    if (o->serving.list)
        orch_current_reload(&o->current, "SIGHUP");
    else if (!running.nohup && !running.signo)
        on_signal(SIGHUP);
}

/* An orch started by an orch, started by an orch: a loop of configuration, not a wish. */
static bool too_deep(void)
{
    const char *v = getenv("ORCH_DEPTH");
    int depth = v ? atoi(v) : 0;
    char next[16];
    if (depth > DEPTH_MAX)
        return true;
    snprintf(next, sizeof next, "%d", depth + 1);
    setenv("ORCH_DEPTH", next, 1);
    return false;
}

static bool is_script(const char *arg)
{
    struct stat st;
    size_t n = strlen(arg);
    return (n > 4 && strcmp(arg + n - 4, ".lua") == 0) ||
           (strchr(arg, '/') && stat(arg, &st) == 0 && S_ISREG(st.st_mode));
}

static int read_input(struct orch_buf *text)
{
    char chunk[16384];
    for (ssize_t r; (r = read(STDIN_FILENO, chunk, sizeof chunk)) != 0;) {
        if (r < 0)
            return -errno;
        orch_buf_add(text, chunk, (size_t)r);
        if (text->n > SCRIPT_MAX_BYTES)
            return -EFBIG;
    }
    orch_buf_reserve(text, 1);
    return 0;
}

/* The file that carries a command out, e.g. …/lua/cli/vm.lua; NULL when there is none. */
static char *command_file(struct orch *o, const char *name)
{
    if (strspn(name, "abcdefghijklmnopqrstuvwxyz-") != strlen(name))
        return NULL;
    char *path = strcmp(name, "mcp") == 0
                     ? orch_xasprintf("%s/lua/mcp.lua", o->paths.share)
                     : orch_xasprintf("%s/lua/cli/%s.lua", o->paths.share, name);
    if (access(path, R_OK) == 0)
        return path;
    free(path);
    return NULL;
}

static int run(struct orch *o, const struct options *opt, int argc, char **argv,
               struct orch_err *err)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_free char *file = NULL;
    const char *const *args = (const char *const *)argv;
    const char *unknown[] = { "--unknown", argv[0] };
    if (opt->code)
        return orch_host_run(o, "(command line)", orch_slice_str(opt->code), argc, args, err);
    if (opt->from_stdin) {
        int r = read_input(&text);
        if (r < 0)
            return orch_err_set(err, -r, "standard input: %s", strerror(-r)), -1;
        return orch_host_run(o, "(stdin)", (struct orch_slice){ text.p, text.n }, argc, args, err);
    }
    if (opt->version) {
        file = command_file(o, "version");
        argc = 0;
    } else if (opt->help) {
        file = command_file(o, "help"); /* the words after -h are the command to explain */
    } else if (argc &&
               (file = is_script(argv[0]) ? orch_xstrdup(argv[0]) : command_file(o, argv[0]))) {
        args++;
        argc--;
    } else {
        file = command_file(o, "help");
        args = unknown;
        argc = argc ? 2 : 1;
    }
    if (!file) {
        orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT,
                      "%s/lua/cli: missing; is orch installed whole?", o->paths.share);
        return -1;
    }
    int r = orch_read_file(AT_FDCWD, file, SCRIPT_MAX_BYTES, &text);
    if (r < 0) {
        orch_err_setc(err, ORCH_CLASS_CONFIG, -r, "%s: %s", file, strerror(-r));
        return -1;
    }
    return orch_host_run(o, file, (struct orch_slice){ text.p, text.n }, argc, args, err);
}

int main(int argc, char **argv)
{
    struct options opt = { .level = -1 };
    struct orch_err err = { 0 };
    /* A standard stream that is closed must not become some other file's number. */
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_WRONLY : O_RDONLY) != fd)
            return ORCH_CLASS_FAILED;
    int first = parse(argv, &opt);
    if (first < 0)
        return -first;
    argv += first;
    argc -= first;
    if (!opt.code && !opt.from_stdin && argc && !is_script(argv[0]) &&
        (argc = parse_rest(argv, &opt)) < 0)
        return -argc;
    opt.log.least = opt.level >= 0    ? (enum orch_level)opt.level
                    : opt.verbose > 1 ? ORCH_DEBUG
                    : opt.verbose     ? ORCH_INFO
                                      : ORCH_WARN;
    orch_log_use(&opt.log);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow is an error like any other */
    struct sigaction hup;
    running.nohup = sigaction(SIGHUP, NULL, &hup) == 0 && hup.sa_handler == SIG_IGN;
    if (too_deep()) {
        fprintf(stderr, "orch: started by an orch that was started by an orch (ORCH_DEPTH); this "
                        "looks like a loop, refused\n");
        return ORCH_CLASS_CONFIG;
    }
    struct orch *o = orch_host_open(opt.config, NULL, &err);
    int status = -1;
    if (o) {
        running.o = o;
        orch_loop_signal(o->loop, SIGINT, on_sigint, NULL);
        orch_loop_signal(o->loop, SIGTERM, on_sigterm, NULL);
        orch_loop_signal(o->loop, SIGHUP, on_sighup, o);
        status = run(o, &opt, argc, argv, &err);
    }
    int written = orch_host_flush(0);
    orch_host_close(o);
    if (running.signo)
        return 128 + running.signo;
    if (status >= 0)
        return status & 255 ? status & 255 : written;
    cleanup_buf struct orch_buf text = { 0 };
    orch_escape_terminal(&text, orch_slice_str(err.msg), true);
    fprintf(stderr, "orch: %s\n", text.p ? text.p : "?");
    return orch_class_exit(err.cls);
}
