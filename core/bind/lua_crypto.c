/* What OAuth and skills need of cryptography (lua/mcp). The private module "orch.crypto":
 *   sha256(s) base64(s, url_safe) random(n)
 *   es256(pem)  a key of P-256, a new one without pem: key:sign(text), key:public(), 64 bytes
 *               each */
#include "bind.h"

#include "../base/es256.h"
#include "../base/hash.h"

enum { RANDOM_MAX = 1024 };

#define KEY_META "orch.es256"

static int t_sha256(lua_State *L)
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    uint8_t out[ORCH_SHA256_BYTES];
    orch_sha256(s, n, out);
    lua_pushlstring(L, (const char *)out, sizeof out);
    return 1;
}

static int t_base64(lua_State *L)
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    cleanup_buf struct orch_buf out = { 0 };
    orch_base64(&out, s, n, lua_toboolean(L, 2));
    lua_pushlstring(L, out.n ? out.p : "", out.n);
    return 1;
}

static int t_random(lua_State *L)
{
    char bytes[RANDOM_MAX];
    lua_Integer n = luaL_checkinteger(L, 1);
    luaL_argcheck(L, n > 0 && n <= RANDOM_MAX, 1, "1 to 1024");
    if (orch_random(bytes, (size_t)n) < 0)
        return luaL_error(L, "the kernel gives no random bytes");
    lua_pushlstring(L, bytes, (size_t)n);
    return 1;
}

static int key_gc(lua_State *L)
{
    struct orch_es256 **k = lua_touserdata(L, 1);
    orch_es256_free(*k);
    *k = NULL;
    return 0;
}

static int t_es256(lua_State *L)
{
    struct orch_slice pem = { "", 0 };
    struct orch_err err = { 0 };
    if (!lua_isnoneornil(L, 1))
        pem.p = luaL_checklstring(L, 1, &pem.n);
    struct orch_es256 **k = lua_newuserdata(L, sizeof *k);
    *k = NULL;
    luaL_getmetatable(L, KEY_META);
    lua_setmetatable(L, -2);
    *k = orch_es256_new(pem, &err);
    return *k ? 1 : orch_push_err(L, &err);
}

static int l_key_sign(lua_State *L)
{
    struct orch_es256 **k = luaL_checkudata(L, 1, KEY_META);
    struct orch_slice text;
    uint8_t out[ORCH_ES256_BYTES];
    struct orch_err err = { 0 };
    text.p = luaL_checklstring(L, 2, &text.n);
    if (orch_es256_sign(*k, text, out, &err) < 0)
        return orch_push_err(L, &err);
    lua_pushlstring(L, (const char *)out, sizeof out);
    return 1;
}

static int l_key_public(lua_State *L)
{
    struct orch_es256 **k = luaL_checkudata(L, 1, KEY_META);
    uint8_t out[ORCH_ES256_BYTES];
    struct orch_err err = { 0 };
    if (orch_es256_public(*k, out, &err) < 0)
        return orch_push_err(L, &err);
    lua_pushlstring(L, (const char *)out, sizeof out);
    return 1;
}

int orch_luaopen_crypto(lua_State *L)
{
    static const luaL_Reg key[] = { { "sign", l_key_sign },
                                    { "public", l_key_public },
                                    { NULL, NULL } };
    static const luaL_Reg functions[] = { { "sha256", t_sha256 },
                                          { "base64", t_base64 },
                                          { "random", t_random },
                                          { "es256", t_es256 },
                                          { NULL, NULL } };
    orch_class_new(L, KEY_META, key, key_gc);
    lua_newtable(L);
    luaL_setfuncs(L, functions, 0);
    return 1;
}
