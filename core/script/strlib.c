#include "strlib.h"
#include "strlib_int.h"

#include <limits.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>

enum { ITEM_MAX = 512 }; /* longest text of one formatted number: %99.99f of 1e308 */

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
    ptrdiff_t first = orch_position(i, n), last = orch_position(j, n);
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
    struct orch_sbuf b;
    orch_sbuf_init(&b, L);
    orch_state_charge(L, (uint64_t)n);
    for (int i = 1; i <= n; i++) {
        lua_Integer c = luaL_checkinteger(L, i);
        luaL_argcheck(L, c >= 0 && c <= 255, i, "invalid value");
        orch_sbuf_char(&b, (char)c);
    }
    return orch_sbuf_push(&b);
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
    if (times * (lua_Number)(n + n_sep) > ORCH_STRING_MAX)
        return luaL_error(L, "resulting string is too long");
    size_t k = n + n_sep ? (size_t)times : 1;
    size_t total = n * k + n_sep * (k - 1);
    orch_state_charge(L, total / 16);
    struct orch_sbuf b;
    orch_sbuf_init(&b, L);
    char *out = orch_sbuf_room(&b, total + n_sep);
    /* One unit, then ever longer copies of what is there. */
    memcpy(out, s, n);
    memcpy(out + n, sep, n_sep);
    for (size_t done = n + n_sep, all = (n + n_sep) * k; done < all;) {
        size_t more = done < all - done ? done : all - done;
        memcpy(out + done, out, more);
        done += more;
    }
    b.n = total;
    return orch_sbuf_push(&b);
}

static int map_bytes(lua_State *L, char (*map)(char))
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    orch_state_charge(L, n / 4);
    struct orch_sbuf b;
    orch_sbuf_init(&b, L);
    char *out = orch_sbuf_room(&b, n);
    for (size_t i = 0; i < n; i++)
        out[i] = map(s[i]);
    b.n = n;
    return orch_sbuf_push(&b);
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
    struct orch_sbuf b;
    orch_sbuf_init(&b, L);
    char *out = orch_sbuf_room(&b, n);
    for (size_t i = 0; i < n; i++)
        out[i] = s[n - 1 - i];
    b.n = n;
    return orch_sbuf_push(&b);
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
    for (int k = 0; k < 2 && p < end && orch_is_digit(*p); k++)
        f->width = f->width * 10 + (*p++ - '0');
    if (p < end && *p == '.') {
        f->precision = 0;
        p++;
        for (int k = 0; k < 2 && p < end && orch_is_digit(*p); k++)
            f->precision = f->precision * 10 + (*p++ - '0');
    }
    if (p < end && orch_is_digit(*p))
        luaL_error(L, "invalid format (width or precision over 99)");
    f->n = (size_t)(p - start) + 1;
    f->text[0] = '%';
    memcpy(f->text + 1, start, f->n - 1);
    return p;
}

static void add_padded(struct orch_sbuf *b, const struct spec *f, const char *s, size_t n)
{
    size_t pad = (size_t)f->width > n ? (size_t)f->width - n : 0;
    char *room = orch_sbuf_room(b, n + pad);
    memset(room, ' ', n + pad);
    if (n)
        memcpy(f->minus ? room : room + pad, s, n);
    b->n += n + pad;
}

/* The format was checked by read_spec: one conversion, two digits of width and precision. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
static void add_number(struct orch_sbuf *b, const struct spec *f, char conversion, lua_Number v)
{
    char format[24];
    memcpy(format, f->text, f->n);
    char *room = orch_sbuf_room(b, ITEM_MAX);
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

static void add_quoted(struct orch_sbuf *b, const char *s, size_t n)
{
    orch_sbuf_char(b, '"');
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\' || c == '\n') {
            orch_sbuf_char(b, '\\');
            orch_sbuf_char(b, (char)c);
        } else if (orch_is_cntrl(c)) {
            bool digit_follows = i + 1 < n && orch_is_digit(s[i + 1]);
            char *room = orch_sbuf_room(b, 5);
            b->n += (size_t)snprintf(room, 5, digit_follows ? "\\%03d" : "\\%d", c);
        } else {
            orch_sbuf_char(b, (char)c);
        }
    }
    orch_sbuf_char(b, '"');
}

static int string_format(lua_State *L)
{
    size_t n;
    const char *p = luaL_checklstring(L, 1, &n), *end = p + n;
    int top = lua_gettop(L), arg = 1;
    struct orch_sbuf b;
    orch_sbuf_init(&b, L);
    orch_state_charge(L, n / 8);
    while (p < end) {
        const char *percent = memchr(p, '%', (size_t)(end - p));
        size_t run = (size_t)((percent ? percent : end) - p);
        orch_sbuf_add(&b, p, run);
        p += run;
        if (!percent)
            break;
        if (++p < end && *p == '%') {
            orch_sbuf_char(&b, *p++);
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
    return orch_sbuf_push(&b);
}

static const luaL_Reg string_functions[] = {
    { "byte", string_byte },
    { "char", string_char },
    { "find", orch_string_find },
    { "format", string_format },
    { "gmatch", orch_string_gmatch },
    { "gsub", orch_string_gsub },
    { "len", string_len },
    { "lower", string_lower },
    { "match", orch_string_match },
    { "rep", string_rep },
    { "reverse", string_reverse },
    { "sub", string_sub },
    { "upper", string_upper },
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
}
