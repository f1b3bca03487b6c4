#include "lines.h"

#include <stdio.h>
#include <string.h>

enum { FRAMES = 8, PATH = 200 };

struct lexer {
    const char *p, *end;
    int line;
};

/* One table constructor that is being read. */
struct frame {
    char path[PATH];
    int n;      /* positional elements so far */
    bool fresh; /* an element begins with the next token */
};

/* Skips [[…]] or [=[…]=] at p; false when there is none. */
static bool skip_long(struct lexer *x)
{
    const char *q = x->p + 1;
    while (q < x->end && *q == '=')
        q++;
    if (q >= x->end || *q != '[')
        return false;
    size_t level = (size_t)(q - x->p) - 1;
    for (q++; q < x->end; q++) {
        if (*q == '\n')
            x->line++;
        if (*q != ']')
            continue;
        const char *c = q + 1;
        while (c < x->end && *c == '=')
            c++;
        if (c < x->end && *c == ']' && (size_t)(c - q) - 1 == level) {
            x->p = c + 1;
            return true;
        }
    }
    x->p = x->end;
    return true;
}

static bool is_word(char c)
{
    return c == '_' || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z');
}

static void skip_quoted(struct lexer *x)
{
    char quote = *x->p++;
    for (; x->p < x->end && *x->p != quote && *x->p != '\n'; x->p++)
        if (*x->p == '\\' && x->p + 1 < x->end) {
            x->p++;
            if (*x->p == '\n')
                x->line++;
        }
    if (x->p < x->end && *x->p == quote)
        x->p++;
}

/* The next token: its first character, 'a' for a word (then in *word), '"' for a string, 0 at the
 * end. */
static int next_token(struct lexer *x, struct orch_slice *word)
{
    while (x->p < x->end) {
        char c = *x->p;
        if (c == ' ' || (c >= '\t' && c <= '\r')) {
            x->line += c == '\n';
            x->p++;
        } else if (c == '-' && x->p + 1 < x->end && x->p[1] == '-') {
            x->p += 2;
            if (!(x->p < x->end && *x->p == '[' && skip_long(x)))
                while (x->p < x->end && *x->p != '\n')
                    x->p++;
        } else if (c == '"' || c == '\'') {
            skip_quoted(x);
            return '"';
        } else if (c == '[' && skip_long(x)) {
            return '"';
        } else if (is_word(c)) {
            word->p = x->p;
            while (x->p < x->end && is_word(*x->p))
                x->p++;
            word->n = (size_t)(x->p - word->p);
            return 'a';
        } else {
            x->p++;
            return c;
        }
    }
    return 0;
}

static bool one_of(struct orch_slice word, const char *const *list)
{
    for (; *list; list++)
        if (orch_slice_eq(word, *list))
            return true;
    return false;
}

/* How a token changes the nesting of what is no table constructor of ours. */
static int nesting(int token, struct orch_slice word)
{
    static const char *const opens[] = { "function", "do", "then", "repeat", NULL };
    static const char *const closes[] = { "end", "until", "elseif", NULL };
    if (token == '(' || token == '[' || token == '{' || (token == 'a' && one_of(word, opens)))
        return 1;
    if (token == ')' || token == ']' || token == '}' || (token == 'a' && one_of(word, closes)))
        return -1;
    return 0;
}

/* Names the element that begins with this token, and notes its line. Returns the token its value
 * begins with. */
static int begin_element(lua_State *L, struct lexer *x, struct frame *f, int token,
                         struct orch_slice *word, char path[PATH])
{
    struct lexer ahead = *x;
    struct orch_slice key = *word, next = { 0 };
    bool named = token == 'a' && next_token(&ahead, &next) == '=' &&
                 !(ahead.p < ahead.end && *ahead.p == '=');
    int line = x->line;
    if (named)
        snprintf(path, PATH, "%s%s%.*s", f->path, f->path[0] ? "." : "",
                 (int)(key.n < 64 ? key.n : 64), key.p);
    else
        snprintf(path, PATH, "%s[%d]", f->path, ++f->n);
    lua_pushinteger(L, line);
    lua_setfield(L, -2, path);
    if (named) {
        *x = ahead;
        token = next_token(x, word);
    }
    return token;
}

void orch_lines_push(lua_State *L, struct orch_slice text)
{
    struct lexer x = { text.p, text.p + text.n, 1 };
    struct frame frames[FRAMES];
    struct orch_slice word = { 0 };
    int n_frames = 0, depth = 0; /* depth: nesting inside the innermost frame */
    bool returned = false;
    lua_newtable(L);
    for (int t; (t = next_token(&x, &word));) {
        if (!n_frames) {
            if (t == '{' && returned && !depth)
                frames[n_frames++] = (struct frame){ .fresh = true };
            else
                depth += nesting(t, word);
            returned = t == 'a' && !depth && orch_slice_eq(word, "return");
            continue;
        }
        struct frame *f = &frames[n_frames - 1];
        if (!depth && t == '}') {
            if (!--n_frames)
                return;
            continue;
        }
        if (!depth && (t == ',' || t == ';')) {
            f->fresh = true;
            continue;
        }
        if (f->fresh && !depth) {
            char path[PATH];
            f->fresh = false;
            t = begin_element(L, &x, f, t, &word, path);
            if (t == '{' && n_frames < FRAMES) {
                struct frame *inner = &frames[n_frames++];
                *inner = (struct frame){ .fresh = true };
                memcpy(inner->path, path, sizeof path);
                continue;
            }
        }
        depth += nesting(t, word);
    }
}
