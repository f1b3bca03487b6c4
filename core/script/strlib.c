#include "strlib.h"

#include "state.h"

#include <lauxlib.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    CAPTURES_MAX = 32,
    PATTERN_DEPTH_MAX = 200, /* as in LuaJIT */
    PATTERN_BATCH = 256,     /* pattern steps between two charges */
    RESULT_MAX = 0x7fffff00, /* LuaJIT's longest string */
    ITEM_MAX = 512,          /* longest text of one formatted number: %99.99f of 1e308 */
    INDEX_MAX = INT32_MAX / 4,
};

/* ---- Result buffer
 * ----------------------------------------------------------------------------- */

/* Grows in a userdata that lives in a reserved stack slot: counted against the state's memory, and
 * collected whatever error ends the function. */
struct sbuf {
    lua_State *L;
    char *p;
    size_t n, cap;
    int slot;
    char small[256];
};

static void sbuf_init(struct sbuf *b, lua_State *L)
{
    b->L = L;
    b->p = b->small;
    b->n = 0;
    b->cap = sizeof b->small;
    lua_pushnil(L);
    b->slot = lua_gettop(L);
}

/* Room for `more` bytes; raises. */
static char *sbuf_room(struct sbuf *b, size_t more)
{
    if (more <= b->cap - b->n)
        return b->p + b->n;
    if (more > RESULT_MAX - b->n)
        luaL_error(b->L, "resulting string is too long");
    size_t cap = b->cap * 2 > b->n + more ? b->cap * 2 : b->n + more;
    orch_state_charge(b->L, b->n / 16);
    char *p = lua_newuserdata(b->L, cap);
    memcpy(p, b->p, b->n);
    lua_replace(b->L, b->slot);
    b->p = p;
    b->cap = cap;
    return p + b->n;
}

static void sbuf_add(struct sbuf *b, const char *s, size_t n)
{
    memcpy(sbuf_room(b, n), s, n);
    b->n += n;
}

static void sbuf_char(struct sbuf *b, char c)
{
    *sbuf_room(b, 1) = c;
    b->n++;
}

static int sbuf_push(struct sbuf *b)
{
    orch_state_charge(b->L, b->n / 16);
    lua_pushlstring(b->L, b->p, b->n);
    return 1;
}

/* Lua position (1 first, negative from the end) to an offset that may lie outside the string. */
static ptrdiff_t position(lua_Integer i, size_t n)
{
    if (i < 0)
        i += (lua_Integer)n + 1;
    return i < 0 ? 0 : i;
}

/* ---- Patterns
 * ---------------------------------------------------------------------------------- */

enum { CAPTURE_OPEN = -1, CAPTURE_POSITION = -2 };

struct match {
    lua_State *L;
    const char *s, *s_end; /* subject */
    const char *p_end;
    unsigned steps; /* done, not yet charged */
    int depth;
    int n;
    struct {
        const char *from;
        ptrdiff_t n; /* or CAPTURE_… */
    } cap[CAPTURES_MAX];
};

static void match_init(struct match *m, lua_State *L, const char *s, size_t n, const char *p_end)
{
    m->L = L;
    m->s = s;
    m->s_end = s + n;
    m->p_end = p_end;
    m->steps = 0;
}

static void settle(struct match *m)
{
    unsigned n = m->steps;
    m->steps = 0;
    orch_state_charge(m->L, n);
}

static inline void step(struct match *m, size_t n)
{
    m->steps += (unsigned)n;
    if (m->steps >= PATTERN_BATCH)
        settle(m);
}

/* ASCII's classes, as LuaJIT has them: libc's go by the locale, which is the embedding
 * program's. */
static inline bool between(unsigned char c, unsigned char first, unsigned char last)
{
    return c >= first && c <= last;
}

static inline bool is_digit(char c)
{
    return between((unsigned char)c, '0', '9');
}

static inline bool is_cntrl(unsigned char c)
{
    return c < ' ' || c == 127;
}

static bool in_class(unsigned char c, unsigned char class)
{
    bool upper = between(c, 'A', 'Z'), lower = between(c, 'a', 'z'), digit = is_digit((char)c);
    bool graph = between(c, '!', '~'), r;
    if (!between(class | 0x20, 'a', 'z'))
        return class == c;
    switch (class | 0x20) {
    case 'a':
        r = upper || lower;
        break;
    case 'c':
        r = is_cntrl(c);
        break;
    case 'd':
        r = digit;
        break;
    case 'g':
        r = graph;
        break;
    case 'l':
        r = lower;
        break;
    case 'p':
        r = graph && !upper && !lower && !digit;
        break;
    case 's':
        r = c == ' ' || between(c, '\t', '\r');
        break;
    case 'u':
        r = upper;
        break;
    case 'w':
        r = upper || lower || digit;
        break;
    case 'x':
        r = digit || between(c | 0x20, 'a', 'f');
        break;
    case 'z':
        r = c == 0;
        break;
    default:
        return class == c;
    }
    return class & 0x20 ? r : !r; /* a capital is the opposite */
}

/* End of the item that matches one character: x, ., %x, [set]. */
static const char *item_end(struct match *m, const char *p)
{
    const char *start = p;
    char c = *p++;
    if (c == '%') {
        if (p == m->p_end)
            luaL_error(m->L, "malformed pattern (ends with '%%')");
        return p + 1;
    }
    if (c != '[')
        return p;
    if (p < m->p_end && *p == '^')
        p++;
    /* The first character is a member even when it is ']'. */
    for (bool first = true;; first = false) {
        if (p >= m->p_end)
            luaL_error(m->L, "malformed pattern (missing ']')");
        if (*p == ']' && !first)
            break;
        p += *p == '%' && p + 1 < m->p_end ? 2 : 1;
    }
    step(m, (size_t)(p - start) / 8);
    return p + 1;
}

/* set: at '['; last: at the closing ']'. */
static bool in_set(unsigned char c, const char *set, const char *last)
{
    bool found = true;
    const char *p = set + 1;
    if (*p == '^') {
        found = false;
        p++;
    }
    while (p < last) {
        unsigned char low = (unsigned char)*p;
        if (low == '%' && p + 1 < last) {
            if (in_class(c, (unsigned char)p[1]))
                return found;
            p += 2;
        } else if (p + 2 < last && p[1] == '-') {
            if (low <= c && c <= (unsigned char)p[2])
                return found;
            p += 3;
        } else {
            if (low == c)
                return found;
            p++;
        }
    }
    return !found;
}

static bool item_matches(struct match *m, const char *s, const char *p, const char *p_next)
{
    if (s >= m->s_end)
        return false;
    step(m, 1);
    unsigned char c = (unsigned char)*s;
    switch (*p) {
    case '.':
        return true;
    case '%':
        return in_class(c, (unsigned char)p[1]);
    case '[':
        step(m, (size_t)(p_next - p) / 8);
        return in_set(c, p, p_next - 1);
    default:
        return (unsigned char)*p == c;
    }
}

static const char *match_here(struct match *m, const char *s, const char *p);

/* %bxy; p at x. */
static const char *match_balanced(struct match *m, const char *s, const char *p)
{
    if (m->p_end - p < 2)
        luaL_error(m->L, "unbalanced pattern");
    if (s >= m->s_end || *s != p[0])
        return NULL;
    for (size_t open = 1; ++s < m->s_end;) {
        step(m, 1);
        if (*s == p[1]) {
            if (--open == 0)
                return s + 1;
        } else if (*s == p[0]) {
            open++;
        }
    }
    return NULL;
}

static const char *match_most(struct match *m, const char *s, const char *p, const char *rest)
{
    ptrdiff_t n = 0;
    while (item_matches(m, s + n, p, rest - 1))
        n++;
    for (; n >= 0; n--) {
        const char *end = match_here(m, s + n, rest);
        if (end)
            return end;
    }
    return NULL;
}

static const char *match_least(struct match *m, const char *s, const char *p, const char *rest)
{
    for (;; s++) {
        const char *end = match_here(m, s, rest);
        if (end)
            return end;
        if (!item_matches(m, s, p, rest - 1))
            return NULL;
    }
}

static const char *match_open(struct match *m, const char *s, const char *p, ptrdiff_t kind)
{
    if (m->n >= CAPTURES_MAX)
        luaL_error(m->L, "too many captures");
    m->cap[m->n].from = s;
    m->cap[m->n].n = kind;
    m->n++;
    const char *end = match_here(m, s, p);
    if (!end)
        m->n--;
    return end;
}

static const char *match_close(struct match *m, const char *s, const char *p)
{
    int i = m->n - 1;
    while (i >= 0 && m->cap[i].n != CAPTURE_OPEN)
        i--;
    if (i < 0)
        luaL_error(m->L, "invalid pattern capture");
    m->cap[i].n = s - m->cap[i].from;
    const char *end = match_here(m, s, p);
    if (!end)
        m->cap[i].n = CAPTURE_OPEN;
    return end;
}

/* Text of %1…%9 again. */
static const char *match_again(struct match *m, const char *s, char digit)
{
    int i = digit - '1';
    if (i < 0 || i >= m->n || m->cap[i].n == CAPTURE_OPEN)
        luaL_error(m->L, "invalid capture index");
    /* A position capture has a negative length, which no rest of the subject reaches. */
    size_t n = (size_t)m->cap[i].n;
    if ((size_t)(m->s_end - s) < n)
        return NULL;
    step(m, n / 16);
    return memcmp(m->cap[i].from, s, n) == 0 ? s + n : NULL;
}

static const char *match_rest(struct match *m, const char *s, const char *p)
{
    while (p < m->p_end) {
        step(m, 1);
        switch (*p) {
        case '(':
            if (p + 1 < m->p_end && p[1] == ')')
                return match_open(m, s, p + 2, CAPTURE_POSITION);
            return match_open(m, s, p + 1, CAPTURE_OPEN);
        case ')':
            return match_close(m, s, p + 1);
        case '$':
            if (p + 1 == m->p_end)
                return s == m->s_end ? s : NULL;
            break;
        case '%':
            if (p + 1 == m->p_end)
                break;
            if (p[1] == 'b') {
                s = match_balanced(m, s, p + 2);
                if (!s)
                    return NULL;
                p += 4;
                continue;
            }
            if (p[1] == 'f') {
                p += 2;
                if (p >= m->p_end || *p != '[')
                    luaL_error(m->L, "missing '[' after '%%f' in pattern");
                const char *set_end = item_end(m, p);
                unsigned char before = s == m->s ? 0 : (unsigned char)s[-1];
                unsigned char after = s == m->s_end ? 0 : (unsigned char)*s;
                if (in_set(before, p, set_end - 1) || !in_set(after, p, set_end - 1))
                    return NULL;
                p = set_end;
                continue;
            }
            if (is_digit(p[1])) {
                s = match_again(m, s, p[1]);
                if (!s)
                    return NULL;
                p += 2;
                continue;
            }
            break;
        default:
            break;
        }
        const char *next = item_end(m, p);
        switch (next < m->p_end ? *next : 0) {
        case '?':
            if (item_matches(m, s, p, next)) {
                const char *end = match_here(m, s + 1, next + 1);
                if (end)
                    return end;
            }
            p = next + 1;
            continue;
        case '*':
            return match_most(m, s, p, next + 1);
        case '+':
            return item_matches(m, s, p, next) ? match_most(m, s + 1, p, next + 1) : NULL;
        case '-':
            return match_least(m, s, p, next + 1);
        default:
            if (!item_matches(m, s, p, next))
                return NULL;
            s++;
            p = next;
        }
    }
    return s;
}

static const char *match_here(struct match *m, const char *s, const char *p)
{
    if (m->depth >= PATTERN_DEPTH_MAX)
        luaL_error(m->L, "pattern too complex");
    m->depth++;
    const char *end = match_rest(m, s, p);
    m->depth--;
    return end;
}

static const char *match_at(struct match *m, const char *s, const char *p)
{
    m->n = 0;
    m->depth = 0;
    return match_here(m, s, p);
}

/* Capture i, or the whole match s…end when the pattern has none. */
static void push_capture(struct match *m, int i, const char *s, const char *end)
{
    if (i >= m->n) {
        if (i)
            luaL_error(m->L, "invalid capture index");
        orch_state_charge(m->L, (size_t)(end - s) / 16);
        lua_pushlstring(m->L, s, (size_t)(end - s));
        return;
    }
    ptrdiff_t n = m->cap[i].n;
    if (n == CAPTURE_OPEN)
        luaL_error(m->L, "unfinished capture");
    if (n == CAPTURE_POSITION) {
        lua_pushinteger(m->L, m->cap[i].from - m->s + 1);
        return;
    }
    orch_state_charge(m->L, (size_t)n / 16);
    lua_pushlstring(m->L, m->cap[i].from, (size_t)n);
}

/* s NULL: only real captures. */
static int push_captures(struct match *m, const char *s, const char *end)
{
    int n = m->n || !s ? m->n : 1;
    luaL_checkstack(m->L, n, "too many captures");
    for (int i = 0; i < n; i++)
        push_capture(m, i, s, end);
    return n;
}

static int find_plain(lua_State *L, const char *s, size_t n, size_t init, const char *p, size_t np)
{
    orch_state_charge(L, (n - init) / 16);
    const char *hit = np ? memmem(s + init, n - init, p, np) : s + init;
    if (!hit) {
        lua_pushnil(L);
        return 1;
    }
    lua_pushinteger(L, hit - s + 1);
    lua_pushinteger(L, hit - s + (ptrdiff_t)np);
    return 2;
}

static int find_or_match(lua_State *L, bool find)
{
    size_t n, np;
    const char *s = luaL_checklstring(L, 1, &n);
    const char *p = luaL_checklstring(L, 2, &np);
    ptrdiff_t init = position(luaL_optinteger(L, 3, 1), n) - 1;
    if (init < 0)
        init = 0;
    if ((size_t)init > n)
        init = (ptrdiff_t)n;
    if (find) {
        orch_state_charge(L, np / 16);
        if (lua_toboolean(L, 4) || strcspn(p, "^$*+?.([%-") == np)
            return find_plain(L, s, n, (size_t)init, p, np);
    }
    struct match m;
    match_init(&m, L, s, n, p + np);
    bool anchored = np && *p == '^';
    p += anchored;
    for (const char *from = s + init; from <= m.s_end; from++) {
        const char *end = match_at(&m, from, p);
        if (end) {
            settle(&m);
            if (!find)
                return push_captures(&m, from, end);
            lua_pushinteger(L, from - s + 1);
            lua_pushinteger(L, end - s);
            return 2 + push_captures(&m, NULL, NULL);
        }
        if (anchored)
            break;
    }
    settle(&m);
    lua_pushnil(L);
    return 1;
}

static int string_find(lua_State *L)
{
    return find_or_match(L, true);
}

static int string_match(lua_State *L)
{
    return find_or_match(L, false);
}

/* Upvalues: subject, pattern, offset to go on from. */
static int gmatch_next(lua_State *L)
{
    size_t n, np;
    const char *s = lua_tolstring(L, lua_upvalueindex(1), &n);
    const char *p = lua_tolstring(L, lua_upvalueindex(2), &np);
    size_t offset = (size_t)lua_tonumber(L, lua_upvalueindex(3));
    struct match m;
    match_init(&m, L, s, n, p + np);
    for (; offset <= n; offset++) {
        const char *end = match_at(&m, s + offset, p);
        if (!end)
            continue;
        settle(&m);
        lua_pushnumber(L, (lua_Number)(end - s + (end == s + offset)));
        lua_replace(L, lua_upvalueindex(3));
        return push_captures(&m, s + offset, end);
    }
    settle(&m);
    return 0;
}

static int string_gmatch(lua_State *L)
{
    luaL_checkstring(L, 1);
    luaL_checkstring(L, 2);
    lua_settop(L, 2);
    lua_pushnumber(L, 0);
    lua_pushcclosure(L, gmatch_next, 3);
    return 1;
}

/* Appends the replacement (argument 3) of the match from…end. */
static void add_replacement(struct match *m, struct sbuf *b, const char *from, const char *end)
{
    lua_State *L = m->L;
    switch (lua_type(L, 3)) {
    case LUA_TFUNCTION: {
        lua_pushvalue(L, 3);
        int n = push_captures(m, from, end);
        lua_call(L, n, 1);
        break;
    }
    case LUA_TTABLE:
        push_capture(m, 0, from, end);
        lua_gettable(L, 3);
        break;
    default: {
        size_t n;
        const char *r = lua_tolstring(L, 3, &n);
        for (size_t i = 0; i < n; i++) {
            const char *percent = memchr(r + i, '%', n - i);
            size_t run = percent ? (size_t)(percent - r) - i : n - i;
            orch_state_charge(L, 1 + run / 16);
            sbuf_add(b, r + i, run);
            i += run;
            if (!percent)
                break;
            if (++i == n)
                luaL_error(L, "invalid replacement string (ends with '%%')");
            if (!is_digit(r[i])) {
                sbuf_char(b, r[i]);
            } else if (r[i] == '0') {
                sbuf_add(b, from, (size_t)(end - from));
            } else {
                push_capture(m, r[i] - '1', from, end);
                size_t len;
                const char *text = lua_tolstring(L, -1, &len);
                sbuf_add(b, text, len);
                lua_pop(L, 1);
            }
        }
        return;
    }
    }
    size_t n;
    if (!lua_toboolean(L, -1)) {
        orch_state_charge(L, (size_t)(end - from) / 16);
        sbuf_add(b, from, (size_t)(end - from));
    } else if (lua_isstring(L, -1)) {
        const char *text = lua_tolstring(L, -1, &n);
        orch_state_charge(L, n / 16);
        sbuf_add(b, text, n);
    } else {
        luaL_error(L, "invalid replacement value (a %s)", luaL_typename(L, -1));
    }
    lua_pop(L, 1);
}

static int string_gsub(lua_State *L)
{
    size_t n, np;
    const char *s = luaL_checklstring(L, 1, &n);
    const char *p = luaL_checklstring(L, 2, &np);
    int kind = lua_type(L, 3);
    luaL_argcheck(L,
                  kind == LUA_TNUMBER || kind == LUA_TSTRING || kind == LUA_TFUNCTION ||
                      kind == LUA_TTABLE,
                  3, "string/function/table expected");
    lua_Number most = luaL_optnumber(L, 4, (lua_Number)n + 1);
    ORCH_NEST(L);
    struct match m;
    struct sbuf b;
    match_init(&m, L, s, n, p + np);
    sbuf_init(&b, L);
    bool anchored = np && *p == '^';
    p += anchored;
    lua_Integer count = 0;
    while (count < most) {
        const char *end = match_at(&m, s, p);
        if (end) {
            count++;
            add_replacement(&m, &b, s, end);
        }
        if (end && end > s)
            s = end;
        else if (s < m.s_end)
            sbuf_char(&b, *s++);
        else
            break;
        if (anchored)
            break;
    }
    settle(&m);
    sbuf_add(&b, s, (size_t)(m.s_end - s));
    sbuf_push(&b);
    lua_pushinteger(L, count);
    return 2;
}

/* ---- Other string functions
 * ---------------------------------------------------------------------- */

static int string_len(lua_State *L)
{
    size_t n;
    luaL_checklstring(L, 1, &n);
    lua_pushnumber(L, (lua_Number)n);
    return 1;
}

/* Offsets [from, to) of the Lua range i…j. */
static size_t range(lua_Integer i, lua_Integer j, size_t n, size_t *from)
{
    ptrdiff_t first = position(i, n), last = position(j, n);
    if (first < 1)
        first = 1;
    if (last > (ptrdiff_t)n)
        last = (ptrdiff_t)n;
    *from = (size_t)first - 1;
    return first > last ? 0 : (size_t)(last - first + 1);
}

static int string_sub(lua_State *L)
{
    size_t n, from;
    const char *s = luaL_checklstring(L, 1, &n);
    size_t len = range(luaL_checkinteger(L, 2), luaL_optinteger(L, 3, -1), n, &from);
    orch_state_charge(L, len / 16);
    if (len)
        lua_pushlstring(L, s + from, len);
    else
        lua_pushliteral(L, "");
    return 1;
}

static int string_byte(lua_State *L)
{
    size_t n, from;
    const char *s = luaL_checklstring(L, 1, &n);
    lua_Integer i = luaL_optinteger(L, 2, 1);
    size_t len = range(i, luaL_optinteger(L, 3, i), n, &from);
    if (len > 8000)
        return luaL_error(L, "string slice too long");
    luaL_checkstack(L, (int)len, "string slice too long");
    orch_state_charge(L, len);
    for (size_t k = 0; k < len; k++)
        lua_pushinteger(L, (unsigned char)s[from + k]);
    return (int)len;
}

static int string_char(lua_State *L)
{
    int n = lua_gettop(L);
    struct sbuf b;
    sbuf_init(&b, L);
    orch_state_charge(L, (uint64_t)n);
    for (int i = 1; i <= n; i++) {
        lua_Integer c = luaL_checkinteger(L, i);
        luaL_argcheck(L, c >= 0 && c <= 255, i, "invalid value");
        sbuf_char(&b, (char)c);
    }
    return sbuf_push(&b);
}

static int string_rep(lua_State *L)
{
    size_t n, n_sep = 0;
    const char *s = luaL_checklstring(L, 1, &n);
    lua_Number times = luaL_checknumber(L, 2);
    const char *sep = luaL_optlstring(L, 3, "", &n_sep);
    if (!(times >= 1)) {
        lua_pushliteral(L, "");
        return 1;
    }
    if (times * (lua_Number)(n + n_sep) > RESULT_MAX)
        return luaL_error(L, "resulting string is too long");
    size_t k = n + n_sep ? (size_t)times : 1;
    size_t total = n * k + n_sep * (k - 1);
    orch_state_charge(L, total / 16);
    struct sbuf b;
    sbuf_init(&b, L);
    char *out = sbuf_room(&b, total + n_sep);
    /* One unit, then ever longer copies of what is there. */
    memcpy(out, s, n);
    memcpy(out + n, sep, n_sep);
    for (size_t done = n + n_sep, all = (n + n_sep) * k; done < all;) {
        size_t more = done < all - done ? done : all - done;
        memcpy(out + done, out, more);
        done += more;
    }
    b.n = total;
    return sbuf_push(&b);
}

static int map_bytes(lua_State *L, char (*map)(char))
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    orch_state_charge(L, n / 4);
    struct sbuf b;
    sbuf_init(&b, L);
    char *out = sbuf_room(&b, n);
    for (size_t i = 0; i < n; i++)
        out[i] = map(s[i]);
    b.n = n;
    return sbuf_push(&b);
}

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + 32) : c;
}

static char upper(char c)
{
    return c >= 'a' && c <= 'z' ? (char)(c - 32) : c;
}

static int string_lower(lua_State *L)
{
    return map_bytes(L, lower);
}

static int string_upper(lua_State *L)
{
    return map_bytes(L, upper);
}

static int string_reverse(lua_State *L)
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    orch_state_charge(L, n / 4);
    struct sbuf b;
    sbuf_init(&b, L);
    char *out = sbuf_room(&b, n);
    for (size_t i = 0; i < n; i++)
        out[i] = s[n - 1 - i];
    b.n = n;
    return sbuf_push(&b);
}

struct spec {
    bool minus;
    int width, precision; /* precision -1: none */
    char text[16];        /* "%-+ #0" width "." precision, without the conversion */
    size_t n;
};

/* Reads what stands between '%' and the conversion; raises. */
static const char *read_spec(lua_State *L, const char *p, const char *end, struct spec *f)
{
    const char *start = p;
    *f = (struct spec){ .precision = -1 };
    while (p < end && *p && strchr("-+ #0", *p)) {
        f->minus |= *p == '-';
        p++;
    }
    if (p - start > 5)
        luaL_error(L, "invalid format (repeated flags)");
    for (int k = 0; k < 2 && p < end && is_digit(*p); k++)
        f->width = f->width * 10 + (*p++ - '0');
    if (p < end && *p == '.') {
        f->precision = 0;
        p++;
        for (int k = 0; k < 2 && p < end && is_digit(*p); k++)
            f->precision = f->precision * 10 + (*p++ - '0');
    }
    if (p < end && is_digit(*p))
        luaL_error(L, "invalid format (width or precision over 99)");
    f->n = (size_t)(p - start) + 1;
    f->text[0] = '%';
    memcpy(f->text + 1, start, f->n - 1);
    return p;
}

static void add_padded(struct sbuf *b, const struct spec *f, const char *s, size_t n)
{
    size_t pad = (size_t)f->width > n ? (size_t)f->width - n : 0;
    char *room = sbuf_room(b, n + pad);
    memset(room, ' ', n + pad);
    if (n)
        memcpy(f->minus ? room : room + pad, s, n);
    b->n += n + pad;
}

/* The format was checked by read_spec: one conversion, two digits of width and precision. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
static void add_number(struct sbuf *b, const struct spec *f, char conversion, lua_Number v)
{
    char format[24];
    memcpy(format, f->text, f->n);
    char *room = sbuf_room(b, ITEM_MAX);
    if (strchr("aAeEfgG", conversion)) {
        if (isnan(v))
            v = NAN; /* "nan", never "-nan" */
        format[f->n] = conversion;
        format[f->n + 1] = 0;
        /* The C locale is static in libc: nothing is made, and nothing to free. */
        locale_t before = uselocale(newlocale(LC_ALL_MASK, "C", NULL));
        b->n += (size_t)snprintf(room, ITEM_MAX, format, v);
        uselocale(before);
        return;
    }
    if (conversion != 'd' && conversion != 'i' && v >= 0x1p63)
        v -= 0x1p64;
    /* As LuaJIT converts: truncated, negative ones as two's complement, the least one for all
     * beyond. */
    long long whole = v >= -0x1p63 && v < 0x1p63 ? (long long)v : LLONG_MIN;
    memcpy(format + f->n, "ll", 2);
    format[f->n + 2] = conversion;
    format[f->n + 3] = 0;
    b->n += (size_t)snprintf(room, ITEM_MAX, format, whole);
}
#pragma GCC diagnostic pop

static void add_quoted(struct sbuf *b, const char *s, size_t n)
{
    sbuf_char(b, '"');
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\' || c == '\n') {
            sbuf_char(b, '\\');
            sbuf_char(b, (char)c);
        } else if (is_cntrl(c)) {
            bool digit_follows = i + 1 < n && is_digit(s[i + 1]);
            char *room = sbuf_room(b, 5);
            b->n += (size_t)snprintf(room, 5, digit_follows ? "\\%03d" : "\\%d", c);
        } else {
            sbuf_char(b, (char)c);
        }
    }
    sbuf_char(b, '"');
}

static int string_format(lua_State *L)
{
    size_t n;
    const char *p = luaL_checklstring(L, 1, &n), *end = p + n;
    int top = lua_gettop(L), arg = 1;
    struct sbuf b;
    sbuf_init(&b, L);
    orch_state_charge(L, n / 8);
    while (p < end) {
        const char *percent = memchr(p, '%', (size_t)(end - p));
        size_t run = (size_t)((percent ? percent : end) - p);
        sbuf_add(&b, p, run);
        p += run;
        if (!percent)
            break;
        if (++p < end && *p == '%') {
            sbuf_char(&b, *p++);
            continue;
        }
        struct spec f;
        p = read_spec(L, p, end, &f);
        if (++arg > top)
            luaL_argerror(L, arg, "no value");
        char conversion = p < end ? *p++ : 0;
        size_t len;
        const char *text;
        orch_state_charge(L, 10);
        switch (conversion) {
        case 'c': {
            char c = (char)luaL_checkinteger(L, arg);
            add_padded(&b, &f, &c, 1);
            break;
        }
        case 'd':
        case 'i':
        case 'o':
        case 'u':
        case 'x':
        case 'X':
        case 'a':
        case 'A':
        case 'e':
        case 'E':
        case 'f':
        case 'g':
        case 'G':
            add_number(&b, &f, conversion, luaL_checknumber(L, arg));
            break;
        case 'q':
            text = luaL_checklstring(L, arg, &len);
            orch_state_charge(L, len / 4);
            add_quoted(&b, text, len);
            break;
        case 's':
            text = orch_state_text(L, arg, &len);
            if (f.precision >= 0 && len > (size_t)f.precision)
                len = (size_t)f.precision;
            orch_state_charge(L, len / 16);
            add_padded(&b, &f, text, len);
            lua_settop(L, b.slot);
            break;
        case 0:
            luaL_error(L, "invalid format (ends with '%%')");
            break;
        default:
            luaL_error(L, "invalid option '%%%c' to 'format'", conversion);
        }
    }
    return sbuf_push(&b);
}

/* ---- Tables
 * -------------------------------------------------------------------------------------- */

static int check_array(lua_State *L, bool write)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    if (write && orch_state_frozen(L, 1))
        luaL_error(L, "the table is read-only");
    size_t n = lua_objlen(L, 1);
    if (n > INDEX_MAX)
        luaL_error(L, "the table is too long");
    return (int)n;
}

static int check_index(lua_State *L, int arg, lua_Integer absent)
{
    lua_Integer i = luaL_optinteger(L, arg, absent);
    luaL_argcheck(L, i >= -INDEX_MAX && i <= INDEX_MAX, arg, "index out of range");
    return (int)i;
}

static int table_concat(lua_State *L)
{
    int n = check_array(L, false);
    size_t n_sep;
    const char *sep = luaL_optlstring(L, 2, "", &n_sep);
    int i = check_index(L, 3, 1), last = check_index(L, 4, n);
    struct sbuf b;
    sbuf_init(&b, L);
    for (; i <= last; i++) {
        lua_rawgeti(L, 1, i);
        if (!lua_isstring(L, -1))
            return luaL_error(L, "invalid value (%s) at index %d in table for 'concat'",
                              luaL_typename(L, -1), i);
        size_t len;
        const char *text = lua_tolstring(L, -1, &len);
        orch_state_charge(L, 2 + (len + n_sep) / 16);
        sbuf_add(&b, text, len);
        lua_pop(L, 1);
        if (i != last)
            sbuf_add(&b, sep, n_sep);
    }
    return sbuf_push(&b);
}

static int table_insert(lua_State *L)
{
    int end = check_array(L, true) + 1;
    int top = lua_gettop(L);
    if (top == 2) {
        lua_rawseti(L, 1, end);
        return 0;
    }
    if (top != 3)
        return luaL_error(L, "wrong number of arguments to 'insert'");
    luaL_checkinteger(L, 2);
    int at = check_index(L, 2, 0);
    for (int i = end; i > at; i--) {
        orch_state_charge(L, 2);
        lua_rawgeti(L, 1, i - 1);
        lua_rawseti(L, 1, i);
    }
    lua_rawseti(L, 1, at);
    return 0;
}

static int table_remove(lua_State *L)
{
    int n = check_array(L, true), at = check_index(L, 2, n);
    if (at < 1 || at > n)
        return 0;
    lua_rawgeti(L, 1, at);
    for (; at < n; at++) {
        orch_state_charge(L, 2);
        lua_rawgeti(L, 1, at + 1);
        lua_rawseti(L, 1, at);
    }
    lua_pushnil(L);
    lua_rawseti(L, 1, n);
    return 1;
}

/* table.sort: bottom-up merge sort between two scratch tables, written back at the end. */
enum { SORT_LESS = 2, SORT_FROM = 3, SORT_TO = 4, SORT_LEFT = 5, SORT_RIGHT = 6 };

/* Is the right one strictly less than the left one? */
static bool right_is_less(lua_State *L, bool custom)
{
    if (custom) {
        orch_state_charge(L, 10);
        lua_pushvalue(L, SORT_LESS);
        lua_pushvalue(L, SORT_RIGHT);
        lua_pushvalue(L, SORT_LEFT);
        lua_call(L, 2, 1);
        bool less = lua_toboolean(L, -1);
        lua_pop(L, 1);
        return less;
    }
    size_t bytes = 0;
    if (lua_type(L, SORT_LEFT) == LUA_TSTRING && lua_type(L, SORT_RIGHT) == LUA_TSTRING) {
        size_t a = lua_objlen(L, SORT_LEFT), b = lua_objlen(L, SORT_RIGHT);
        bytes = a < b ? a : b;
    }
    orch_state_charge(L, 8 + bytes / 4);
    return lua_lessthan(L, SORT_RIGHT, SORT_LEFT);
}

static void load_item(lua_State *L, int from, int i, int slot)
{
    lua_rawgeti(L, from, i);
    lua_replace(L, slot);
}

static void merge(lua_State *L, int from, int to, int low, int mid, int high, bool custom)
{
    int left = low, right = mid;
    if (left < mid)
        load_item(L, from, left, SORT_LEFT);
    if (right < high)
        load_item(L, from, right, SORT_RIGHT);
    for (int out = low; out < high; out++) {
        orch_state_charge(L, 2);
        if (right >= high || (left < mid && !right_is_less(L, custom))) {
            lua_pushvalue(L, SORT_LEFT);
            if (++left < mid)
                load_item(L, from, left, SORT_LEFT);
        } else {
            lua_pushvalue(L, SORT_RIGHT);
            if (++right < high)
                load_item(L, from, right, SORT_RIGHT);
        }
        lua_rawseti(L, to, out);
    }
}

static int table_sort(lua_State *L)
{
    int n = check_array(L, true);
    bool custom = !lua_isnoneornil(L, SORT_LESS);
    if (custom)
        luaL_checktype(L, SORT_LESS, LUA_TFUNCTION);
    if (n < 2)
        return 0;
    ORCH_NEST(L);
    lua_settop(L, 2);
    lua_createtable(L, n, 0);
    lua_createtable(L, n, 0);
    lua_settop(L, SORT_RIGHT);
    for (int i = 1; i <= n; i++) {
        orch_state_charge(L, 1);
        lua_rawgeti(L, 1, i);
        lua_rawseti(L, SORT_FROM, i);
    }
    int from = SORT_FROM, to = SORT_TO;
    for (int width = 1; width < n; width *= 2) {
        for (int low = 1; low <= n; low += 2 * width) {
            int mid = low + width < n + 1 ? low + width : n + 1;
            int high = low + 2 * width < n + 1 ? low + 2 * width : n + 1;
            merge(L, from, to, low, mid, high, custom);
        }
        int swap = from;
        from = to;
        to = swap;
    }
    for (int i = 1; i <= n; i++) {
        orch_state_charge(L, 1);
        lua_rawgeti(L, from, i);
        lua_rawseti(L, 1, i);
    }
    return 0;
}

/* ---------------------------------------------------------------------------------------------- */

static const luaL_Reg string_functions[] = {
    { "byte", string_byte },       { "char", string_char },
    { "find", string_find },       { "format", string_format },
    { "gmatch", string_gmatch },   { "gsub", string_gsub },
    { "len", string_len },         { "lower", string_lower },
    { "match", string_match },     { "rep", string_rep },
    { "reverse", string_reverse }, { "sub", string_sub },
    { "upper", string_upper },     { NULL, NULL },
};

static const luaL_Reg table_functions[] = {
    { "concat", table_concat },
    { "insert", table_insert },
    { "remove", table_remove },
    { "sort", table_sort },
    { NULL, NULL },
};

void orch_strlib_push(lua_State *L)
{
    lua_createtable(L, 0, ORCH_ARRAY_LEN(string_functions));
    luaL_setfuncs(L, string_functions, 0);

    /* Methods of strings come from a copy, since the table itself becomes a read-only proxy. */
    lua_pushliteral(L, "");
    lua_createtable(L, 0, 2);
    lua_createtable(L, 0, ORCH_ARRAY_LEN(string_functions));
    luaL_setfuncs(L, string_functions, 0);
    lua_setfield(L, -2, "__index");
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    lua_setmetatable(L, -2);
    lua_pop(L, 1);

    lua_createtable(L, 0, ORCH_ARRAY_LEN(table_functions));
    luaL_setfuncs(L, table_functions, 0);
}
