#include "strlib.h"
#include "strlib_int.h"

enum { INDEX_MAX = INT32_MAX / 4 };

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
    struct orch_sbuf b;
    orch_sbuf_init(&b, L);
    for (; i <= last; i++) {
        lua_rawgeti(L, 1, i);
        if (!lua_isstring(L, -1))
            return luaL_error(L, "invalid value (%s) at index %d in table for 'concat'",
                              luaL_typename(L, -1), i);
        size_t len;
        const char *text = lua_tolstring(L, -1, &len);
        orch_state_charge(L, 2 + (len + n_sep) / 16);
        orch_sbuf_add(&b, text, len);
        lua_pop(L, 1);
        if (i != last)
            orch_sbuf_add(&b, sep, n_sep);
    }
    return orch_sbuf_push(&b);
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

static const luaL_Reg table_functions[] = {
    { "concat", table_concat },
    { "insert", table_insert },
    { "remove", table_remove },
    { "sort", table_sort },
    { NULL, NULL },
};

void orch_tablib_push(lua_State *L)
{
    lua_createtable(L, 0, ORCH_ARRAY_LEN(table_functions));
    luaL_setfuncs(L, table_functions, 0);
}
