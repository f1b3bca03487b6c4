-- The official JSON Schema test suite against lua/policy/schema.lua: orch tests/conformance/schema.lua SUITE
-- SUITE: a folder with the suite's tests/ and remotes/ (`make schema-suite` fetches one).
--
-- The suite's servers are never asked: a schema that refers to one of the remotes gets it in its own $defs,
-- under its address, as the specification bundles schemas. Each schema is one of an own tool (an unknown
-- keyword is an error). Schemas that are refused count apart; there should be none.
local ffi = require "ffi"
local json = orch.json
local suite = assert(..., "usage: orch tests/conformance/schema.lua SUITE")

-- PCRE2 with the options of core/bind/lua_regex.c
ffi.cdef [[
void *pcre2_compile_8(const char *pattern, size_t n, uint32_t options, int *fault, size_t *at, void *context);
void *pcre2_compile_context_create_8(void *general);
int pcre2_set_compile_extra_options_8(void *context, uint32_t options);
void *pcre2_match_data_create_8(uint32_t ovector, void *general);
int pcre2_match_8(void *code, const char *s, size_t n, size_t start, uint32_t options, void *data, void *context);
]]
local pcre = ffi.load "libpcre2-8.so.0"
local UTF, NEVER_UCP, NEVER_BACKSLASH_C = 0x00080000, 0x00002000, 0x00100000
local DOLLAR_ENDONLY, ALT_BSUX, MATCH_UNSET_BACKREF, EXTRA_ALT_BSUX = 0x10, 0x2, 0x200, 0x20
local how, data = pcre.pcre2_compile_context_create_8(nil), pcre.pcre2_match_data_create_8(1, nil)
pcre.pcre2_set_compile_extra_options_8(how, EXTRA_ALT_BSUX)

local function regex(pattern)
  local fault, at = ffi.new("int[1]"), ffi.new("size_t[1]")
  local options = UTF + NEVER_UCP + NEVER_BACKSLASH_C + DOLLAR_ENDONLY + ALT_BSUX + MATCH_UNSET_BACKREF
  local code = pcre.pcre2_compile_8(pattern, #pattern, options, fault, at, how)
  if code == nil then return nil, "PCRE2 error " .. fault[0] .. " at offset " .. tonumber(at[0]) end
  return function(s)
    local r = pcre.pcre2_match_8(code, s, #s, 0, 0, data, nil)
    if r < -1 then error("PCRE2 error " .. r, 0) end
    return r >= 0
  end
end

local function is_bigint(v) return type(v) == "userdata" and v ~= json.null end
local function is_array(t) return t[1] ~= nil or next(t) == nil and json.encode(t) == "[]" end

local deps = { json = json, regex = regex, is_array = is_array, is_bigint = is_bigint }
deps.values = assert(loadfile("lua/policy/values.lua"))(deps)
local schema = assert(loadfile("lua/policy/schema.lua"))(deps)

local function read(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read("*a")
  f:close()
  return text
end

local function list(folder)
  local out = {}
  for line in io.popen("cd '" .. folder .. "' && find . -name '*.json' | sort"):lines() do out[#out + 1] = line:sub(3) end
  return out
end

-- Those for every draft, or for this one.
local remotes = {}
for _, path in ipairs(list(suite .. "/remotes")) do
  if path:find("^draft2020%-12/") or not path:find("^draft") then remotes[#remotes + 1] = path end
end

-- Puts the remotes that `text` names, and those that they name, into `defs`.
local function bundle(text, defs)
  for _, path in ipairs(remotes) do
    local uri = "http://localhost:1234/" .. path
    local named = path:find("^draft") and path:match("[^/]*$") or uri
    if not defs[uri] and text:find(named, 1, true) then
      local source = read(suite .. "/remotes/" .. path)
      local s = json.decode(source)
      local id = s["$id"]
      if not id then s["$id"] = uri end
      defs[uri] = s
      if id and id ~= uri then defs[uri .. " moved"] = { ["$id"] = uri, ["$ref"] = id } end
      bundle(source, defs)
    end
  end
end

local passed, failed, refused, started = 0, 0, 0, os.clock()
for _, name in ipairs(list(suite .. "/tests/draft2020-12")) do
  if not name:find("/", 1, true) then -- optional/ is not required
    for _, group in ipairs(json.decode(read(suite .. "/tests/draft2020-12/" .. name))) do
      local title, s = name .. ": " .. group.description, group.schema
      local defs = {}
      if type(s) == "table" then bundle(json.encode(s), defs) end
      if next(defs) then
        s["$defs"] = s["$defs"] or {}
        for uri, remote in pairs(defs) do s["$defs"][uri] = remote end
      end
      local check, why = schema.compile(s)
      if not check then
        refused = refused + #group.tests
        io.write("refused: ", title, ": ", why, "\n")
      end
      for _, case in ipairs(check and group.tests or {}) do
        local good, message = check(case.data)
        if (good == true) == case.valid then
          passed = passed + 1
        else
          failed = failed + 1
          io.write("FAILED: ", title, ": ", case.description, ": ", message or "taken", "\n")
        end
      end
    end
  end
end
io.write(("%d refused, %.0f ms\n%d passed, %d failed\n"):format(refused, (os.clock() - started) * 1000, passed, failed + refused))
os.exit(passed > 0 and failed + refused == 0 and 0 or 1)
