/* Inside strlib: what strings, patterns and tables share. */
#ifndef ORCH_SCRIPT_STRLIB_INT_H
#define ORCH_SCRIPT_STRLIB_INT_H

#include "state.h"

#include <lauxlib.h>
#include <string.h>

enum { ORCH_STRING_MAX = 0x7fffff00 }; /* LuaJIT's longest */

/* A result. It grows in a userdata that lives in a reserved stack slot: counted against the state's
 * memory, and collected whatever error ends the function. */
struct orch_sbuf {
    lua_State *L;
    char *p;
    size_t n, cap;
    int slot;
    char small[256];
};

static inline void orch_sbuf_init(struct orch_sbuf *b, lua_State *L)
{
    b->L = L;
    b->p = b->small;
    b->n = 0;
    b->cap = sizeof b->small;
    lua_pushnil(L);
    b->slot = lua_gettop(L);
}

/* Room for `more` bytes; raises. */
static inline char *orch_sbuf_room(struct orch_sbuf *b, size_t more)
{
    if (more <= b->cap - b->n)
        return b->p + b->n;
    if (more > ORCH_STRING_MAX - b->n)
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

static inline void orch_sbuf_add(struct orch_sbuf *b, const char *s, size_t n)
{
    memcpy(orch_sbuf_room(b, n), s, n);
    b->n += n;
}

static inline void orch_sbuf_char(struct orch_sbuf *b, char c)
{
    *orch_sbuf_room(b, 1) = c;
    b->n++;
}

static inline int orch_sbuf_push(struct orch_sbuf *b)
{
    orch_state_charge(b->L, b->n / 16);
    lua_pushlstring(b->L, b->p, b->n);
    return 1;
}

/* Lua position (1 first, negative from the end) to an offset that may lie outside the string. */
static inline ptrdiff_t orch_position(lua_Integer i, size_t n)
{
    if (i < 0)
        i += (lua_Integer)n + 1;
    return i < 0 ? 0 : i;
}

/* ASCII's classes, as LuaJIT has them: libc's go by the locale, which is the embedding
 * program's. */
static inline bool orch_between(unsigned char c, unsigned char first, unsigned char last)
{
    return c >= first && c <= last;
}

static inline bool orch_is_digit(char c)
{
    return orch_between((unsigned char)c, '0', '9');
}

static inline bool orch_is_cntrl(unsigned char c)
{
    return c < ' ' || c == 127;
}

/* strmatch.c: string.find, match, gmatch and gsub */
int orch_string_find(lua_State *L);
int orch_string_match(lua_State *L);
int orch_string_gmatch(lua_State *L);
int orch_string_gsub(lua_State *L);

#endif
