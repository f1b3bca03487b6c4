/* The program: global options, then a script, or a command (lua/cli/COMMAND.lua). */
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum { SCRIPT_MAX_BYTES = 16 << 20, DEPTH_MAX = 2 };

struct options {
    const char *config, *code;
    int verbose, level;
    bool help, version, from_stdin;
};

struct running {
    struct orch *o;
    int signo;
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

/* A global option at argv[0]: how many arguments it takes up, 0 when it is none, or a negative exit status. */
static int parse_global(char **argv, struct options *opt)
{
    const char *a = argv[0], *value = argv[1];
    if (a[0] == '-' && a[1] && strspn(a + 1, "v") == strlen(a + 1)) {
        opt->verbose += (int)strlen(a + 1);
        return 1;
    }
    if (strcmp(a, "-c") != 0 && strcmp(a, "--config") != 0 && strcmp(a, "--log-format") != 0 && strcmp(a, "--log-level") != 0)
        return 0;
    if (!value)
        return -usage("%s needs a value", a);
    if (strcmp(a, "--log-format") == 0) {
        if (strcmp(value, "json") != 0 && strcmp(value, "text") != 0)
            return -usage("--log-format must be text or json, got %s", value);
        orch_log_json(strcmp(value, "json") == 0);
    } else if (strcmp(a, "--log-level") == 0) {
        opt->level = orch_log_parse_level(value);
        if (opt->level < 0)
            return -usage("--log-level must be debug, info, warn or error, got %s", value);
    } else {
        opt->config = value;
    }
    return 2;
}

/* Global options between a command's own words, up to "--" or, for `mcp stdio`, the server's command:
 * taken out of argv. Returns the new argc, or a negative exit status. */
static int parse_between(int argc, char **argv, struct options *opt)
{
    int kept = 1, words = 0;
    bool proxy = argc > 1 && strcmp(argv[0], "mcp") == 0 && strcmp(argv[1], "stdio") == 0;
    for (int i = 1; i < argc; i++) {
        bool value_of_own = proxy && (strcmp(argv[i - 1], "--as") == 0 || strcmp(argv[i - 1], "--sandbox") == 0);
        bool command = argv[i][0] != '-' && !value_of_own && proxy && ++words > 1;
        if (strcmp(argv[i], "--") == 0 || command) {
            while (i < argc)
                argv[kept++] = argv[i++];
            break;
        }
        int taken = value_of_own ? 0 : parse_global(argv + i, opt);
        if (taken < 0)
            return taken;
        if (!taken)
            argv[kept++] = argv[i];
        else
            i += taken - 1;
    }
    argv[kept] = NULL;
    return kept;
}

/* Global options before the command. Returns the index of the first other argument, or a negative exit
 * status. */
static int parse(int argc, char **argv, struct options *opt)
{
    static const char *const known[] = { "--config", "--log-format", "--log-level", "--help", "--version", NULL };
    int i = 1;
    for (; i < argc && argv[i][0] == '-' && argv[i][1]; i++) {
        const char *a = argv[i];
        int taken = parse_global(argv + i, opt);
        if (taken < 0)
            return taken;
        if (taken) {
            i += taken - 1;
        } else if (strcmp(a, "-e") == 0) {
            opt->code = argv[i + 1];
            return opt->code ? i + 2 : -usage("%s needs a value", a);
        } else if (strcmp(a, "-h") == 0 || strcmp(a, "--help") == 0) {
            opt->help = true;
        } else if (strcmp(a, "--version") == 0) {
            opt->version = true;
        } else {
            const char *near = orch_nearest(a, known);
            return -usage("unknown option %s%s%s%s", a, near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
        }
    }
    if (i < argc && strcmp(argv[i], "-") == 0) {
        opt->from_stdin = true;
        i++;
    }
    return i;
}

static void on_signal(int signo)
{
    if (running.signo)
        _exit(128 + signo); /* asked twice */
    running.signo = signo;
    if (running.o && running.o->main)
        orch_task_cancel(running.o->main, signo == SIGINT ? "interrupted" : "terminated");
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

static void on_sighup(void *ud)
{
    struct orch *o = ud;
    if (o->gen)
        orch_host_reload(o, "SIGHUP");
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
    return (n > 4 && strcmp(arg + n - 4, ".lua") == 0) || (strchr(arg, '/') && stat(arg, &st) == 0 && S_ISREG(st.st_mode));
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
    /* lua/mcp.lua is a script like any user's: it needs nothing private. */
    char *path = strcmp(name, "mcp") == 0 ? orch_xasprintf("%s/lua/mcp.lua", o->paths.share)
                                          : orch_xasprintf("%s/lua/cli/%s.lua", o->paths.share, name);
    if (access(path, R_OK) == 0)
        return path;
    free(path);
    return NULL;
}

static int run(struct orch *o, const struct options *opt, int argc, char **argv, struct orch_err *err)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_free char *file = NULL;
    const char *const *args = (const char *const *)argv;
    const char *help[3] = { NULL };
    bool internal = false;
    if (opt->code)
        return orch_host_run(o, "(command line)", orch_slice_str(opt->code), argc, args, false, err);
    if (opt->from_stdin) {
        int r = read_input(&text);
        if (r < 0)
            return orch_err_set(err, -r, "standard input: %s", strerror(-r)), -1;
        return orch_host_run(o, "(stdin)", (struct orch_slice){ text.p, text.n }, argc, args, false, err);
    }
    if (argc && is_script(argv[0])) {
        file = orch_xstrdup(argv[0]);
        args++;
        argc--;
    } else {
        internal = true;
        const char *name = opt->version ? "version" : !argc || opt->help ? "help" : argv[0];
        file = command_file(o, name);
        if (opt->version || (!argc && !opt->help)) {
            argc = 0;
        } else if (opt->help) {
            /* the words after -h are the command to explain */
        } else if (!file) {
            file = command_file(o, "help");
            help[0] = "--unknown";
            help[1] = name;
            args = help;
            argc = 2;
        } else {
            internal = strcmp(name, "mcp") != 0;
            args++;
            argc--;
        }
        if (!file) {
            orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT, "%s/lua/cli: missing; is orch installed whole?", o->paths.share);
            return -1;
        }
    }
    int r = orch_read_file(AT_FDCWD, file, SCRIPT_MAX_BYTES, &text);
    if (r < 0) {
        orch_err_setc(err, ORCH_CLASS_CONFIG, -r, "%s: %s", file, strerror(-r));
        return -1;
    }
    return orch_host_run(o, file, (struct orch_slice){ text.p, text.n }, argc, args, internal, err);
}

int main(int argc, char **argv)
{
    struct options opt = { .level = -1 };
    struct orch_err err = { 0 };
    int first = parse(argc, argv, &opt);
    if (first < 0)
        return -first;
    argc -= first;
    argv += first;
    bool script = opt.code || opt.from_stdin || (argc && is_script(argv[0]));
    if (!script && argc && (argc = parse_between(argc, argv, &opt)) < 0)
        return -argc;
    /* print of a script is a line of the log at level info. */
    enum orch_level usual = script ? ORCH_INFO : ORCH_WARN;
    orch_log_level(opt.level >= 0 ? (enum orch_level)opt.level : opt.verbose > 1 ? ORCH_DEBUG : opt.verbose ? ORCH_INFO : usual);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a file-size limit is a full disk to us: an error, not the end */
    if (too_deep()) {
        fprintf(stderr, "orch: started by an orch that was started by an orch (ORCH_DEPTH); this looks like a loop, refused\n");
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
    fflush(stdout);
    orch_close(o);
    if (running.signo)
        return 128 + running.signo;
    if (status >= 0)
        return status & 255;
    cleanup_buf struct orch_buf text = { 0 };
    orch_escape_terminal(&text, orch_slice_str(err.msg), true);
    fprintf(stderr, "orch: %s\n", text.p ? text.p : "?");
    return orch_class_exit(err.cls);
}
