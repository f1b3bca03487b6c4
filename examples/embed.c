/* A C program that hosts tool calls: it registers a tool written in C, has the policy judge a call
 * of it, and prints the answer.
 *
 *   cc -o embed embed.c $(pkg-config --cflags --libs --static orch)
 *   ./embed [orchestrator.lua]
 *
 * Without a configuration of yours it writes a small one into a temporary folder: one rule allows
 * the tool `add`, and a second one denies large numbers. */
#include <orch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char policy[] = "return { rules = {\n"
                             "  { tool = 'add', action = 'allow' },\n"
                             "  { tool = 'add', action = 'deny', when = function(call) return "
                             "call.args.a > 1000 end, reason = 'too large' },\n"
                             "} }\n";

static void write_file(const char *dir, const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0) {
        perror(path);
        exit(1);
    }
}

/* The tool. args is JSON that fits the schema below; a real program uses its JSON library here. */
static void add(void *ud, struct orch_tool_call *call, const char *args)
{
    (void)ud;
    const char *a = strstr(args, "\"a\":"), *b = strstr(args, "\"b\":");
    char text[64];
    snprintf(text, sizeof text, "%ld", strtol(a + 4, NULL, 10) + strtol(b + 4, NULL, 10));
    orch_answer(call, text, 0);
}

static void print_result(void *ud, const char *result, int is_error)
{
    printf("%s: %s\n", is_error ? "error" : "result", result);
    --*(int *)ud;
}

int main(int argc, char **argv)
{
    char dir[] = "/tmp/orch-embed-XXXXXX", config[64];
    struct orch_error err;
    if (argc < 2) {
        if (!mkdtemp(dir))
            return perror(dir), 1;
        snprintf(config, sizeof config, "%s/policies", dir);
        mkdir(config, 0700);
        write_file(dir, "policies/tools.lua", policy);
        write_file(dir, "orchestrator.lua", "return { audit = { dir = 'audit' } }\n");
        snprintf(config, sizeof config, "%s/orchestrator.lua", dir);
    }
    struct orch_options options = { .size = sizeof options, .config = argc < 2 ? config : argv[1] };
    struct orch *o = orch_open(&options, &err);
    if (!o)
        return fprintf(stderr, "embed: %s\n", err.message), err.status;
    struct orch_tool_def def = {
        .name = "add",
        .description = "Add two integers",
        .input = "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{"
                 "\"type\":\"integer\"}},\"required\":[\"a\",\"b\"]}",
        .fn = add,
    };
    int pending = 2;
    if (orch_add_tool(o, &def, &err) < 0 ||
        orch_call(o, "add", "{\"a\":2,\"b\":40}", "embed", print_result, &pending, &err) < 0 ||
        orch_call(o, "add", "{\"a\":2000,\"b\":1}", "embed", print_result, &pending, &err) < 0)
        return fprintf(stderr, "embed: %s\n", err.message), err.status;
    while (pending)
        orch_step(o, -1);
    orch_close(o);
    return 0;
}
