/* Lua patterns, and the string functions that take one. */
#include "strlib_int.h"

enum {
    CAPTURES_MAX = 32,
    PATTERN_DEPTH_MAX = 200, /* as in LuaJIT */
    PATTERN_BATCH = 256,     /* pattern steps between two charges */
};

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

static bool in_class(unsigned char c, unsigned char class)
{
    bool upper = orch_between(c, 'A', 'Z'), lower = orch_between(c, 'a', 'z'),
         digit = orch_is_digit((char)c);
    bool graph = orch_between(c, '!', '~'), r;
    if (!orch_between(class | 0x20, 'a', 'z'))
        return class == c;
    switch (class | 0x20) {
    case 'a':
        r = upper || lower;
        break;
    case 'c':
        r = orch_is_cntrl(c);
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
        r = c == ' ' || orch_between(c, '\t', '\r');
        break;
    case 'u':
        r = upper;
        break;
    case 'w':
        r = upper || lower || digit;
        break;
    case 'x':
        r = digit || orch_between(c | 0x20, 'a', 'f');
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
            if (orch_is_digit(p[1])) {
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
    ptrdiff_t init = orch_position(luaL_optinteger(L, 3, 1), n) - 1;
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

int orch_string_find(lua_State *L)
{
    return find_or_match(L, true);
}

int orch_string_match(lua_State *L)
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

int orch_string_gmatch(lua_State *L)
{
    luaL_checkstring(L, 1);
    luaL_checkstring(L, 2);
    lua_settop(L, 2);
    lua_pushnumber(L, 0);
    lua_pushcclosure(L, gmatch_next, 3);
    return 1;
}

/* Appends the replacement (argument 3) of the match from…end. */
static void add_replacement(struct match *m, struct orch_sbuf *b, const char *from, const char *end)
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
            orch_sbuf_add(b, r + i, run);
            i += run;
            if (!percent)
                break;
            if (++i == n)
                luaL_error(L, "invalid replacement string (ends with '%%')");
            if (!orch_is_digit(r[i])) {
                orch_sbuf_char(b, r[i]);
            } else if (r[i] == '0') {
                orch_sbuf_add(b, from, (size_t)(end - from));
            } else {
                push_capture(m, r[i] - '1', from, end);
                size_t len;
                const char *text = lua_tolstring(L, -1, &len);
                orch_sbuf_add(b, text, len);
                lua_pop(L, 1);
            }
        }
        return;
    }
    }
    size_t n;
    if (!lua_toboolean(L, -1)) {
        orch_state_charge(L, (size_t)(end - from) / 16);
        orch_sbuf_add(b, from, (size_t)(end - from));
    } else if (lua_isstring(L, -1)) {
        const char *text = lua_tolstring(L, -1, &n);
        orch_state_charge(L, n / 16);
        orch_sbuf_add(b, text, n);
    } else {
        luaL_error(L, "invalid replacement value (a %s)", luaL_typename(L, -1));
    }
    lua_pop(L, 1);
}

int orch_string_gsub(lua_State *L)
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
    struct orch_sbuf b;
    match_init(&m, L, s, n, p + np);
    orch_sbuf_init(&b, L);
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
            orch_sbuf_char(&b, *s++);
        else
            break;
        if (anchored)
            break;
    }
    settle(&m);
    orch_sbuf_add(&b, s, (size_t)(m.s_end - s));
    orch_sbuf_push(&b);
    lua_pushinteger(L, count);
    return 2;
}
