-- JSON Schema 2020-12 compiled to closures; draft-07 where the schema says so.
--
--   local schema = chunk(deps)   deps: json { encode, null }, regex(pattern) -> matcher | nil, err,
--                                is_array(t), is_bigint(v)
--   schema.compile(s, opts) -> check, unknown | nil, message
--   check(value) -> true | nil, "arguments.items[3].name: expected string, got number (type)"
--
-- opts.unknown: "error" (own tools: a keyword that is not known fails, named by its JSON pointer) or
-- "collect" (a peer's schema: it is passed over and its pointer is in the list `unknown`).
-- opts.root names the value in messages, "arguments" unless said. `format` and its like are annotations.
--
-- Values are those of orch.json, with nulls kept. A table is an array when is_array says so or it has an
-- element 1, so that a Lua author writes required = { "a" }; an empty plain table is an object.
--
-- A compiled node returns nothing for a valid value, else message and path below the node (nil: none).
-- Both are built on failure only. A Lua error (match limit, endless recursion) fails the whole check and
-- not just a branch, so that `not` and `anyOf` cannot turn it into acceptance.
local deps = ...
local json, regex, is_array, is_bigint = deps.json, deps.regex, deps.is_array, deps.is_bigint
local null = json.null
local type, pairs, next, select = type, pairs, next, select
local tostring, tonumber, pcall, error = tostring, tonumber, pcall, error
local find, match, sub, gsub = string.find, string.match, string.sub, string.gsub
local format, byte, char = string.format, string.byte, string.char
local sort, concat = table.sort, table.concat

local MAX_LEVEL = 256     -- schemas inside each other and references followed, when compiling
local MAX_RECURSION = 256 -- reentries of recursive schemas, when checking
local EXACT = 2 ^ 53

-- Values -------------------------------------------------------------------------------------------

local function arrayish(t) return t[1] ~= nil or is_array(t) end

local function kind(v)
  local t = type(v)
  if t == "table" then return arrayish(v) and "array" or "object" end
  if t == "string" or t == "number" or t == "boolean" then return t end
  return v == null and "null" or is_bigint(v) and "number" or t
end

local function is_number(v) return type(v) == "number" or is_bigint(v) end

local function is_integer(v)
  if type(v) == "number" then return v % 1 == 0 end
  return is_bigint(v)
end

-- Text of a value for a message, bounded.
local function show(v)
  local ok, s = pcall(json.encode, v)
  s = ok and s or tostring(v)
  return #s <= 80 and s or gsub(sub(s, 1, 80), "[\192-\255]?[\128-\191]*$", "") .. "…"
end

local function key(k, path)
  return (#k <= 64 and find(k, "^[%a_][%w_]*$") and "." .. k or "[" .. show(k) .. "]") .. (path or "")
end

local function element(i, path) return "[" .. (i - 1) .. "]" .. (path or "") end
local function mismatch(v, want) return "expected " .. want .. ", got " .. kind(v) .. " (type)" end

-- Decimal digits of an integer, fractions rounded down; "%.0f" is exact.
local function digits(v) return type(v) == "number" and format("%.0f", v - v % 1) or tostring(v) end

local function less(a, b)
  if type(a) == "number" and type(b) == "number" then return a < b end
  a, b = digits(a), digits(b)
  local neg = byte(a) == 45
  if neg ~= (byte(b) == 45) then return neg end
  if neg then a, b = b, a end
  return #a < #b or #a == #b and a < b
end

-- Digits without zeros at the ends, and the exponent of the last one: 0.0075 -> "75", -4.
local function decimal(v)
  local s = tostring(v)
  if type(v) == "number" then
    s = format("%.15g", v)
    s = tonumber(s) == v and s or format("%.17g", v)
  end
  local whole, frac, exp = match(s, "^-?(%d+)%.?(%d*)e?([+-]?%d*)$")
  local d, zeros = match(gsub(whole .. frac, "^0+", ""), "^(.-)(0*)$")
  return d, (tonumber(exp) or 0) - #frac + #zeros
end

-- Equality as JSON Schema has it: 1 is 1.0, the order of keys does not count.
local function same(a, b, depth)
  if a == b then return true end
  if type(a) ~= "table" or type(b) ~= "table" then
    return (is_bigint(a) or is_bigint(b)) and is_integer(a) and is_integer(b) and digits(a) == digits(b)
  end
  if depth > MAX_LEVEL then error("compared values are nested too deeply", 0) end
  if arrayish(a) ~= arrayish(b) or #a ~= #b then return false end
  for k, x in pairs(a) do if b[k] == nil or not same(x, b[k], depth + 1) then return false end end
  for k in pairs(b) do if a[k] == nil then return false end end
  return true
end

-- What each measure returns for a value of another type is nil.
local function characters(v)
  if type(v) ~= "string" then return nil end
  return find(v, "[\128-\255]") and select(2, gsub(v, "[^\128-\191]", "")) or #v
end

local function elements(v) return type(v) == "table" and arrayish(v) and #v or nil end

local function members(v)
  if type(v) ~= "table" or arrayish(v) then return nil end
  local n = 0
  for _ in pairs(v) do n = n + 1 end
  return n
end

-- Compiling ----------------------------------------------------------------------------------------

local node -- function(c, s, base, at) -> check; c: one compilation, base: URI, at: JSON pointer

local function fail(at, message) error({ at .. ": " .. message }, 0) end
local function want(ok, at, what) return ok or fail(at, "expected " .. what) end
local function below(at, k) return at .. "/" .. gsub(gsub(tostring(k), "~", "~0"), "/", "~1") end
local function is_list(x) return type(x) == "table" and (arrayish(x) or next(x) == nil) end
local function is_map(x) return type(x) == "table" and not arrayish(x) end

local function is_names(x)
  for i = 1, is_list(x) and #x or 0 do if type(x[i]) ~= "string" then return false end end
  return is_list(x)
end

local function sorted(t)
  local out = {}
  for k in pairs(t) do out[#out + 1] = tostring(k) end
  sort(out)
  return out
end

local function pass() end
local function never() return "nothing is allowed here (false)" end

local function sequence(checks)
  local n = #checks
  if n < 2 then return checks[1] or pass end
  return function(v)
    for i = 1, n do
      local m, p = checks[i](v)
      if m then return m, p end
    end
  end
end

local function nodes_of(list, c, base, at)
  local out = {}
  want(is_list(list) and #list > 0, at, "a list of schemas, at least one")
  for i = 1, #list do out[i] = node(c, list[i], base, at .. "/" .. (i - 1)) end
  return out, #out
end

local function map_of(map, c, base, at)
  local out, names = {}, sorted(want(is_map(map), at, "an object of schemas") and map)
  for i = 1, #names do out[names[i]] = node(c, map[names[i]], base, below(at, names[i])) end
  return out, names
end

local function matcher(c, pattern, at)
  local m, err = regex(want(type(pattern) == "string", at, "a string") and pattern)
  c.guarded = true
  return m or fail(at, "bad pattern: " .. tostring(err))
end

-- References ---------------------------------------------------------------------------------------

-- How the schemas inside a keyword are reached.
local ONE, MANY = 1, 2
local INNER = {
  ["not"] = ONE, ["if"] = ONE, ["then"] = ONE, ["else"] = ONE, items = ONE, contains = ONE, propertyNames = ONE,
  additionalProperties = ONE, additionalItems = ONE, allOf = MANY, anyOf = MANY, oneOf = MANY, prefixItems = MANY,
  properties = MANY, patternProperties = MANY, dependentSchemas = MANY, dependencies = MANY, ["$defs"] = MANY,
  definitions = MANY,
}

local function resolve(base, ref)
  if find(ref, "^%a[%w+.-]*:") then return ref end
  local scheme, rest = match(base, "^(%a[%w+.-]*:)(.*)$")
  scheme, rest = scheme or "", rest or base
  if sub(ref, 1, 2) == "//" then return scheme .. ref end
  local host, path = match(rest, "^(//[^/]*)(.*)$")
  if sub(ref, 1, 1) ~= "/" then
    ref = (match(path or rest, "^(.*/)") or host and "/" or "") .. ref
  end
  ref = gsub(gsub(ref, "/%./", "/"), "^%./", "")
  local n
  repeat ref, n = gsub(ref, "[^/]+/%.%./", "", 1) until n == 0
  return scheme .. (host or "") .. ref
end

-- The base of schema s inside `base`, and the plain name that draft-07 writes as $id = "#name".
local function rebase(c, s, base)
  local id = s["$id"]
  if type(id) ~= "string" or c.draft7 and s["$ref"] then return base end
  local uri, name = match(id, "^([^#]*)#?(.*)$")
  return uri == "" and base or resolve(base, uri), name ~= "" and name
end

-- Records every $id and $anchor; run at the first $ref, since most schemas have none.
local function index(c, s, base)
  if type(s) ~= "table" or c.bases[s] then return end
  local name
  base, name = rebase(c, s, base)
  c.bases[s] = base
  c.found[base] = c.found[base] or s
  name = name or s["$anchor"]
  if type(name) == "string" then c.found[base .. "#" .. name] = s end
  for k, x in pairs(s) do
    local how = type(x) == "table" and INNER[k]
    if how == ONE and not arrayish(x) then
      index(c, x, base)
    elseif how then
      for _, y in pairs(x) do index(c, y, base) end
    end
  end
end

-- The schema that a reference means.
local function lookup(c, ref, base, at)
  if not c.bases then
    c.bases, c.found = {}, { [""] = c.root }
    index(c, c.root, "")
  end
  local uri, frag = match(ref, "^([^#]*)#?(.*)$")
  frag = gsub(frag, "%%(%x%x)", function(h) return char(tonumber(h, 16)) end)
  base = uri == "" and base or resolve(base, uri)
  local t = c.found[base]
  if not t then fail(at, "'" .. ref .. "' is not in this schema; remote references are never fetched") end
  if byte(frag) ~= 47 then
    return frag == "" and t or c.found[base .. "#" .. frag] or fail(at, "no $anchor '" .. frag .. "' in this schema")
  end
  for token in frag:gmatch("/([^/]*)") do
    if type(t) == "table" then
      base = c.bases[t] or rebase(c, t, base)
      token = gsub(gsub(token, "~1", "/"), "~0", "~")
      local x = t[token]
      t = x == nil and find(token, "^%d+$") and t[tonumber(token) + 1] or x
    end
  end
  if type(t) ~= "table" and type(t) ~= "boolean" then fail(at, "'" .. ref .. "' leads to no schema") end
  index(c, t, base)
  return t
end

-- Keywords -----------------------------------------------------------------------------------------

-- K[keyword](x, c, base, at, s) -> check or nil; x is s[keyword], at its pointer. ORDER is the order of
-- the checks, which decides the failure that is reported.
local K, ORDER, KNOWN = {}, {}, {}
for k in ([[type enum const minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength
    pattern minItems maxItems prefixItems items contains uniqueItems properties required minProperties
    maxProperties propertyNames patternProperties additionalProperties dependentRequired dependentSchemas $ref
    allOf anyOf oneOf not if then else $defs]]):gmatch("%S+") do
  ORDER[#ORDER + 1], KNOWN[k] = k, true
end
for k in ([[$id $anchor $schema $comment title description default examples deprecated readOnly writeOnly
    format contentEncoding contentMediaType contentSchema minContains maxContains]]):gmatch("%S+") do
  KNOWN[k] = true
end
local TYPES = { string = 1, number = 1, integer = 1, boolean = 1, null = 1, array = 1, object = 1 }
local TEXTS = { ["$id"] = 1, ["$anchor"] = 1, ["$ref"] = 1, ["$schema"] = 1 }
local DRAFT7 = { definitions = 1, dependencies = 1, additionalItems = 1 }
local LATER = { ["$dynamicRef"] = 1, ["$dynamicAnchor"] = 1, unevaluatedItems = 1, unevaluatedProperties = 1 }
local HINTS = {
  definitions = "use $defs", dependencies = "use dependentRequired or dependentSchemas", id = "use $id",
  additionalItems = "use prefixItems and items", optional = "list what is needed in `required`",
}
local DIALECTS = { ["json-schema.org/draft/2020-12/schema"] = 2020, ["json-schema.org/draft-07/schema"] = 7 }

function K.type(x, c, base, at, s)
  local list, set = type(x) == "string" and { x } or x, {}
  want(is_names(list) and list[1], at, "the name of a type or a list of them")
  for i = 1, #list do
    want(TYPES[list[i]], at, "string, number, integer, boolean, null, array or object, got '" .. list[i] .. "'")
    set[list[i]] = true
  end
  if x == "object" and (s.properties ~= nil or s.required ~= nil) then return nil end -- done there
  if x == "string" or x == "boolean" then
    return function(v) if type(v) ~= x then return mismatch(v, x) end end
  end
  local text, integer = concat(list, " or "), set.integer and not set.number
  return function(v)
    local k = kind(v)
    if not set[k] and not (integer and k == "number" and is_integer(v)) then return mismatch(v, text) end
  end
end

function K.enum(list, c, base, at)
  local set, rest, n = {}, {}, #want(is_list(list) and list, at, "a list")
  for i = 1, n do
    local x = list[i]
    if type(x) == "table" or is_bigint(x) or type(x) == "number" and (x >= EXACT or x <= -EXACT) then
      rest[#rest + 1] = x
    else
      set[x] = true
    end
  end
  return function(v)
    if set[v] then return end
    for i = 1, #rest do if same(rest[i], v, 1) then return end end
    local some = {}
    for i = 1, n < 10 and n or 10 do some[i] = show(list[i]) end
    return "must be one of " .. concat(some, ", ") .. (n > 10 and ", … (enum)" or " (enum)")
  end
end

function K.const(x)
  return function(v) if not same(x, v, 1) then return "must be " .. show(x) .. " (const)" end end
end

-- keyword, text, limit first in less(), what less() says of a bad value
for _, b in pairs({ { "minimum", "at least ", false, true }, { "maximum", "at most ", true, true },
    { "exclusiveMinimum", "more than ", true, false }, { "exclusiveMaximum", "less than ", false, false } }) do
  local text, swap, bad = "must be " .. b[2], b[3], b[4]
  K[b[1]] = function(limit, c, base, at)
    want(is_number(limit) and (type(limit) ~= "number" or limit - limit == 0), at, "a number")
    return function(v)
      if not is_number(v) then return end
      local a, z = v, limit
      if swap then a, z = limit, v end
      if less(a, z) == bad then return text .. tostring(limit) .. " (" .. b[1] .. ")" end
    end
  end
end

-- In decimal, since 0.0075 / 0.0001 is 74.99999999999999 in binary. 14 digits, so that 10 * m is exact.
function K.multipleOf(x, c, base, at)
  local finite = is_number(x) and (type(x) ~= "number" or x - x == 0)
  local m, low = decimal(want(finite and less(0, x) and x, at, "a number above 0"))
  m = want(#m < 15, at, "at most 14 significant digits") and tonumber(m)
  return function(v)
    if not is_number(v) then return end
    local d, exp = decimal(v)
    local r = exp < low and d ~= "" and 1 or 0 -- d does not end in 0
    for i = 1, exp < low and 0 or #d do r = (r * 10 + byte(d, i) - 48) % m end
    for _ = 1, r ~= 0 and exp - low or 0 do r = r * 10 % m end
    if r ~= 0 then return "must be a multiple of " .. tostring(x) .. " (multipleOf)" end
  end
end

local function count(n, at)
  return want(type(n) == "number" and n >= 0 and n % 1 == 0 and n, at, "an integer of at least 0")
end

for _, m in pairs({ { "Length", characters, " characters" }, { "Items", elements, " items" },
    { "Properties", members, " properties" } }) do
  local word, measure, noun = m[1], m[2], m[3]
  K["min" .. word] = function(limit, c, base, at)
    local text = "must have at least " .. count(limit, at) .. noun .. " (min" .. word .. ")"
    return function(v) if (measure(v) or limit) < limit then return text end end
  end
  K["max" .. word] = function(limit, c, base, at)
    local text = "must have at most " .. count(limit, at) .. noun .. " (max" .. word .. ")"
    return function(v) if (measure(v) or 0) > limit then return text end end
  end
end

function K.pattern(x, c, base, at)
  local matches = matcher(c, x, at)
  return function(v)
    if type(v) == "string" and not matches(v) then return "must match " .. show(x) .. " (pattern)" end
  end
end

function K.prefixItems(x, c, base, at, s)
  local list, n, rest = {}, 0, pass
  if x ~= nil then list, n = nodes_of(x, c, base, at) end
  if s.items ~= nil then rest = node(c, s.items, base, gsub(at, "[^/]*$", "items")) end
  return function(v)
    for i = 1, elements(v) or 0 do
      local m, p = (list[i] or rest)(v[i])
      if m then return m, element(i, p) end
      if i >= n and rest == pass then return end
    end
  end
end

function K.items(x, c, base, at, s)
  if is_list(x) and not is_map(x) then fail(at, "a list of schemas is draft-07; use prefixItems") end
  return s.prefixItems == nil and x ~= true and K.prefixItems(nil, c, base, at, s)
end

function K.contains(x, c, base, at, s)
  local f, least, most = node(c, x, base, at), count(s.minContains or 1, at), count(s.maxContains or 1e300, at)
  local word = s.minContains and " (minContains)" or " (contains)"
  return function(v)
    local n, found = elements(v), 0
    for i = 1, n or 0 do found = f(v[i]) and found or found + 1 end
    if n and found < least then return "must contain at least " .. least .. " matching items, has " .. found .. word end
    if found <= most then return end
    return "must contain at most " .. most .. " matching items, has " .. found .. " (maxContains)"
  end
end

function K.uniqueItems(x, c, base, at)
  return want(type(x) == "boolean", at, "true or false") and x and function(v)
    local seen, tables = {}, {}
    for i = 1, elements(v) or 0 do
      local y, j = v[i], nil
      if y == nil then y = null end
      if type(y) == "table" then
        for k = 1, #tables do j = j or same(v[tables[k]], y, 1) and tables[k] end
        tables[#tables + 1] = i
      else
        -- Large integers meet as digits, whichever way they are held; strings keep apart from them.
        local k = type(y) == "string" and "s" .. y
          or is_integer(y) and (type(y) ~= "number" or y >= EXACT or y <= -EXACT) and digits(y) or y
        j, seen[k] = seen[k], i
      end
      if j then return "items " .. (j - 1) .. " and " .. (i - 1) .. " are equal (uniqueItems)" end
    end
  end
end

function K.properties(x, c, base, at, s)
  local map, names = map_of(x, c, base, at)
  local strict, need = s.type == "object", {}
  for i = 1, is_names(s.required) and #s.required or 0 do
    local k = s.required[i]
    if map[k] == nil and not need[k] then names[#names + 1] = k end
    need[k] = true
  end
  local n, some_needed = #names, next(need) ~= nil
  return function(v)
    -- A property found proves an object, since arrays have no string keys: is_array is asked last.
    if type(v) ~= "table" or not some_needed and arrayish(v) then
      return strict and mismatch(v, "object") or nil
    end
    for i = 1, n do
      local k = names[i]
      local y, f = v[k], map[k]
      if y == nil then
        if need[k] then
          if arrayish(v) then return strict and mismatch(v, "object") or nil end
          return "missing " .. show(k) .. " (required)"
        end
      elseif f then
        local m, p = f(y)
        if m then return m, key(k, p) end
      end
    end
  end
end

function K.required(x, c, base, at, s)
  want(is_names(x), at, "a list of names")
  return s.properties == nil and K.properties({}, c, base, at, s)
end

function K.propertyNames(x, c, base, at)
  local f = node(c, x, base, at)
  return function(v)
    for k in pairs(members(v) and v or {}) do
      local m = f(tostring(k))
      if m then return "property name " .. show(k) .. ": " .. m .. " (propertyNames)" end
    end
  end
end

function K.patternProperties(x, c, base, at, s)
  local more, map, names = pass, {}, {}
  if s.additionalProperties ~= nil then
    more = node(c, s.additionalProperties, base, gsub(at, "[^/]*$", "additionalProperties"))
  end
  if x ~= nil then map, names = map_of(x, c, base, at) end
  local n, matches, known = #names, {}, s.properties or {}
  for i = 1, n do matches[i] = matcher(c, names[i], below(at, names[i])) end
  return function(v)
    if type(v) ~= "table" or arrayish(v) then return end
    local unknown -- the first in order is named, whatever the order of pairs
    for k, y in pairs(v) do
      local covered, m, p = known[k] ~= nil, nil, nil
      for i = 1, n do
        if matches[i](tostring(k)) then
          covered = true
          m, p = map[names[i]](y)
          if m then break end
        end
      end
      if not covered and more == never then
        k = tostring(k)
        unknown = unknown and unknown < k and unknown or k
      elseif not covered then
        m, p = more(y)
      end
      if m then return m, key(tostring(k), p) end
    end
    return unknown and "unknown property " .. show(unknown) .. " (additionalProperties)" or nil
  end
end

function K.additionalProperties(x, c, base, at, s)
  return s.patternProperties == nil and x ~= true and K.patternProperties(nil, c, base, at, s)
end

function K.dependentRequired(x, c, base, at)
  local names = sorted(want(is_map(x), at, "an object of lists") and x)
  for i = 1, #names do
    local k, list = names[i], x[names[i]]
    want(is_names(list), below(at, k), "a list of names")
    names[i] = function(v)
      for j = 1, is_map(v) and v[k] ~= nil and #list or 0 do
        if v[list[j]] == nil then
          return "missing " .. show(list[j]) .. ", which " .. show(k) .. " needs (dependentRequired)"
        end
      end
    end
  end
  return sequence(names)
end

function K.dependentSchemas(x, c, base, at)
  local map, checks = map_of(x, c, base, at)
  for i = 1, #checks do
    local k, f = checks[i], map[checks[i]]
    checks[i] = function(v) if is_map(v) and v[k] ~= nil then return f(v) end end
  end
  return sequence(checks)
end

K["$ref"] = function(x, c, base, at) return node(c, lookup(c, x, base, at), base, at) end
function K.allOf(x, c, base, at) return sequence((nodes_of(x, c, base, at))) end

for _, word in pairs({ "anyOf", "oneOf" }) do
  K[word] = function(x, c, base, at)
    local list, n = nodes_of(x, c, base, at)
    return function(v)
      local hit, best, path -- best: the failure furthest inside the value
      for i = 1, n do
        local m, p = list[i](v)
        if not m then
          if hit then return "matches alternatives " .. hit .. " and " .. i .. ", must match one (oneOf)" end
          if word == "anyOf" then return end
          hit = i
        elseif not best or p and #p > #(path or "") then
          best, path = m, p
        end
      end
      if hit then return end
      return "matches none of " .. n .. " alternatives (" .. word .. "), nearest: "
        .. (path and path .. ": " or "") .. best
    end
  end
end

K["not"] = function(x, c, base, at)
  local f = node(c, x, base, at)
  return function(v) return not f(v) and "must not match (not)" or nil end
end

K["if"] = function(x, c, base, at, s)
  local f, yes, no = node(c, x, base, at), pass, pass
  if s["then"] ~= nil then yes = node(c, s["then"], base, gsub(at, "if$", "then")) end
  if s["else"] ~= nil then no = node(c, s["else"], base, gsub(at, "if$", "else")) end
  return function(v)
    if f(v) then return no(v) end
    return yes(v)
  end
end

-- Compiled for their errors; $defs also so that unknown keywords in unused ones are found.
K["then"] = function(x, c, base, at) node(c, x, base, at) end
K["else"] = K["then"]
K["$defs"] = function(x, c, base, at) map_of(x, c, base, at) end

-- Nodes --------------------------------------------------------------------------------------------

local function check_keywords(c, s, at)
  local bad
  for k, x in pairs(s) do
    if TEXTS[k] then
      want(type(x) == "string", below(at, k), "a string")
    elseif not (KNOWN[k] or c.draft7 and DRAFT7[k] or type(k) == "string" and sub(k, 1, 2) == "x-") then
      k = tostring(k)
      bad = bad and bad < k and bad or k
      if c.unknown then c.unknown[#c.unknown + 1] = below(at, k) end
    end
  end
  if bad and not c.unknown then
    local hint = HINTS[bad] and "; " .. HINTS[bad] or ""
    fail(below(at, bad), LATER[bad] and "not available yet" or "unknown keyword" .. hint)
  end
  local dialect = s["$schema"]
  if dialect then
    dialect = DIALECTS[gsub(gsub(dialect, "^https?://", ""), "#$", "")]
    want(dialect and (dialect == 7) == c.draft7, below(at, "$schema"), dialect and "the dialect of the whole document"
        or "https://json-schema.org/draft/2020-12/schema or http://json-schema.org/draft-07/schema#")
  end
end

-- Draft-07 in terms of 2020-12.
local function modernise(s)
  if s["$ref"] then return { ["$ref"] = s["$ref"] } end
  local t = {}
  for k, x in pairs(s) do t[k] = x end
  t["$defs"] = t["$defs"] or t.definitions
  if is_list(t.items) and arrayish(t.items) then
    t.prefixItems, t.items = t.items[1] ~= nil and t.items or nil, t.additionalItems
  end
  if is_map(t.dependencies) then
    t.dependentRequired, t.dependentSchemas = {}, {}
    for k, x in pairs(t.dependencies) do
      t[is_names(x) and "dependentRequired" or "dependentSchemas"][k] = x
    end
  end
  return t
end

local function build(c, s, base, at)
  check_keywords(c, s, at)
  base = c.bases and c.bases[s] or rebase(c, s, base)
  s = c.draft7 and modernise(s) or s
  local checks = {}
  for i = 1, #ORDER do
    local k = ORDER[i]
    if s[k] ~= nil then
      local f = K[k](s[k], c, base, below(at, k), s)
      checks[#checks + 1] = f ~= pass and f or nil
    end
  end
  return sequence(checks)
end

-- One node per schema table; a table met again while it is being compiled is a recursion.
function node(c, s, base, at)
  if type(s) == "boolean" then return s and pass or never end
  want(is_map(s), at, "a schema (an object, true or false), got " .. kind(s))
  local slot = c.slots[s]
  if not slot then
    slot = {}
    c.slots[s], c.level = slot, c.level + 1
    if c.level > MAX_LEVEL then fail(at, "schemas and references nested deeper than " .. MAX_LEVEL) end
    slot.f = build(c, s, base, at)
    c.level = c.level - 1
  elseif not slot.f then
    c.guarded = true
    return function(v)
      local depth = c.depth + 1
      if depth > MAX_RECURSION then error("recursion deeper than " .. MAX_RECURSION, 0) end
      c.depth = depth
      local m, p = slot.f(v)
      c.depth = depth - 1
      return m, p
    end
  end
  return slot.f
end

local function compile(s, opts)
  local root, unknown = opts and opts.root or "arguments", opts and opts.unknown == "collect" and {} or nil
  local dialect = type(s) == "table" and s["$schema"]
  local c = { root = s, slots = {}, level = 0, depth = 0, unknown = unknown,
    draft7 = type(dialect) == "string" and find(dialect, "/draft-07/", 1, true) ~= nil }
  local ok, f = pcall(node, c, s, "", "#")
  if not ok then
    return nil, type(f) == "table" and f[1] or tostring(f)
  elseif unknown then
    sort(unknown)
  end
  c.root, c.slots, c.bases, c.found = nil, nil, nil, nil

  local function check(v)
    local m, p = f(v)
    if m then return nil, root .. (p or "") .. ": " .. m end
    return true
  end
  return not c.guarded and check or function(v)
    c.depth = 0
    local done, good, message = pcall(check, v)
    if done then return good, message end
    return nil, root .. ": " .. tostring(good)
  end, unknown
end

return { compile = compile }
