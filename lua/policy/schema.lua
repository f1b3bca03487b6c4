-- JSON Schema 2020-12 compiled to closures; draft-07 where the schema says so.
--
--   local schema = chunk(deps)   deps: json { encode, decode, null }, regex(pattern) -> matcher | nil, err,
--                                is_array(t), is_bigint(v), values: what values.lua returns for these
--   schema.compile(s, opts) -> check, unknown | nil, message
--   check(value) -> true | nil, "arguments.items[3].name: expected string, got number (type)"
--   check(value, true): a null member that is not required and that its schema refuses counts as absent. A value that
--   is valid only so has lost those members afterwards, and the second result is true; any other is as it was.
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
--
-- Below unevaluated* a node is also given `seen`, where it notes the keys and indexes it evaluated. Notes of
-- a node that fails do not count: anyOf, oneOf and if, which may pass all the same, hand down a table each.
-- Schemas without unevaluated* and $dynamicRef pay nothing for them: at the first, compiling starts anew in full.
local deps = ...
local json, regex, is_array, is_bigint = deps.json, deps.regex, deps.is_array, deps.is_bigint
local null = json.null
local type, pairs, next = type, pairs, next
local tostring, tonumber, pcall, error = tostring, tonumber, pcall, error
local find, match, sub, gsub = string.find, string.match, string.sub, string.gsub
local format, byte, char = string.format, string.byte, string.char
local sort, concat = table.sort, table.concat

local MAX_LEVEL = 256     -- schemas inside each other and references followed, when compiling
local MAX_RECURSION = 256 -- reentries of recursive schemas, when checking
local MAX_SCOPES = 64     -- dynamic scopes, in each of which a schema is compiled anew
local EXACT = 2 ^ 53

local values = deps.values
local arrayish, kind, is_number, is_integer = values.arrayish, values.kind, values.is_number, values.is_integer
local show, key, element, mismatch, digits = values.show, values.key, values.element, values.mismatch, values.digits
local less, decimal, same = values.less, values.decimal, values.same
local characters, elements, members = values.characters, values.elements, values.members

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

-- The names of `required` as a set; a list that is none is found elsewhere.
local function names_of(x)
  local set = {}
  for i = 1, is_names(x) and #x or 0 do set[x[i]] = true end
  return set
end

local function sorted(t)
  local out = {}
  for k in pairs(t) do out[#out + 1] = tostring(k) end
  sort(out)
  return out
end

local function pass() end
local function never() return "nothing is allowed here (false)" end

-- While `dropping`, a check takes refused nulls out of the value and notes them in `dropped`: object, name, object, …
-- What it says then does not count, but that there is more to do.
local dropping, dropped = false, {}

local function drop(v, k, y, needed)
  if not dropping or y ~= null or needed[k] then return false end
  v[k] = nil
  dropped[#dropped + 1], dropped[#dropped + 2] = v, k
  return true
end

-- Whether f takes v once nulls are dropped. One pass shows what is wrong then, in ever fewer members.
local function drop_nulls(f, v)
  local from, n, m, p = #dropped, nil, nil, nil
  repeat
    n, dropping = #dropped, true
    f(v)
    dropping = false
    m, p = f(v)
  until not m or #dropped == n
  for i = m and #dropped or 0, from + 1, -2 do
    dropped[i - 1][dropped[i]] = null
    dropped[i], dropped[i - 1] = nil, nil
  end
  return m, p
end

-- A check that is a question and no demand: nothing is dropped for its sake.
local function as_is(f)
  return function(v, seen)
    local was = dropping
    dropping = false
    local m, p = f(v, seen)
    dropping = was
    return m, p
  end
end

-- One of alternatives has to take the value: of those that would without nulls, the first.
local function choose(check, list)
  local asked = as_is(check)
  return function(v, seen)
    if not dropping then return check(v, seen) end
    if asked(v) then
      local i = 1
      while list[i] and drop_nulls(list[i], v) do i = i + 1 end
      dropping = true
    end
    return asked(v, seen)
  end
end

local function sequence(checks)
  local n = #checks
  if n < 2 then return checks[1] or pass end
  return function(v, seen)
    local first, path
    for i = 1, n do
      local m, p = checks[i](v, seen)
      if m and not dropping then return m, p end
      if m and not first then first, path = m, p end
    end
    return first, path
  end
end

local ALL = {} -- seen[ALL]: every key or index
local function merge(seen, more) for k in pairs(more) do seen[k] = true end end

local AGAIN = {} -- thrown for a schema that has to be compiled in full: c.full, and all of it indexed first
local function need_full(c) if not c.full then error(AGAIN, 0) end end

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

-- Patterns may name a general category in full, \p{Letter}; PCRE2 knows \p{L}.
local CATEGORIES = [[ Letter=L Cased_Letter=L& Uppercase_Letter=Lu Lowercase_Letter=Ll Titlecase_Letter=Lt
  Modifier_Letter=Lm Other_Letter=Lo Mark=M Combining_Mark=M Nonspacing_Mark=Mn Spacing_Mark=Mc Enclosing_Mark=Me
  Number=N Decimal_Number=Nd digit=Nd Letter_Number=Nl Other_Number=No Punctuation=P punct=P Connector_Punctuation=Pc
  Dash_Punctuation=Pd Open_Punctuation=Ps Close_Punctuation=Pe Initial_Punctuation=Pi Final_Punctuation=Pf
  Other_Punctuation=Po Symbol=S Math_Symbol=Sm Currency_Symbol=Sc Modifier_Symbol=Sk Other_Symbol=So Separator=Z
  Space_Separator=Zs Line_Separator=Zl Paragraph_Separator=Zp Other=C Control=Cc cntrl=Cc Format=Cf Surrogate=Cs
  Private_Use=Co Unassigned=Cn ]]

local function short_category(escape, rest) -- rest: "{Letter}" of \p{Letter}
  local name = find(escape, "[pP]") and match(rest, "^{([%a_]+)}$")
  local short = name and match(CATEGORIES, "%s" .. name .. "=(%S+)")
  return short and escape .. "{" .. short .. "}" or nil
end

local function matcher(c, pattern, at)
  want(type(pattern) == "string", at, "a string")
  local m, err = regex((gsub(pattern, "(\\.)({?[%a_]*}?)", short_category)))
  c.guarded = true
  return m or fail(at, "bad pattern: " .. tostring(err))
end

-- References ---------------------------------------------------------------------------------------

-- How the schemas inside a keyword are reached.
local ONE, MANY = 1, 2
local INNER = {
  ["not"] = ONE, ["if"] = ONE, ["then"] = ONE, ["else"] = ONE, items = ONE, contains = ONE, propertyNames = ONE,
  additionalProperties = ONE, additionalItems = ONE, unevaluatedItems = ONE, unevaluatedProperties = ONE,
  contentSchema = ONE, allOf = MANY, anyOf = MANY, oneOf = MANY, prefixItems = MANY, properties = MANY,
  patternProperties = MANY, dependentSchemas = MANY, dependencies = MANY, ["$defs"] = MANY, definitions = MANY,
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

-- The dialect's own schema, for a tool that takes schemas: https://json-schema.org/draft/2020-12/schema and
-- its vocabularies, without annotations. JSON, since it is decoded only when something refers to it.
local DIALECT_BASE = "https://json-schema.org/draft/2020-12/"
local METASCHEMA = [==[[{"$id":"https://json-schema.org/draft/2020-12/schema","$dynamicAnchor":"meta","allOf":[{"$ref":"meta/core"},
{"$ref":"meta/applicator"},{"$ref":"meta/unevaluated"},{"$ref":"meta/validation"},{"$ref":"meta/meta-data"},
{"$ref":"meta/format-annotation"},{"$ref":"meta/content"}],"type":["object","boolean"],
"properties":{"definitions":{"type":"object","additionalProperties":{"$dynamicRef":"#meta"}},
"dependencies":{"type":"object","additionalProperties":{"anyOf":[{"$dynamicRef":"#meta"},
{"$ref":"meta/validation#/$defs/stringArray"}]}},"$recursiveAnchor":{"$ref":"meta/core#/$defs/anchorString"},
"$recursiveRef":{"$ref":"meta/core#/$defs/uriReferenceString"}}},
{"$id":"https://json-schema.org/draft/2020-12/meta/core","$dynamicAnchor":"meta","type":["object","boolean"],
"properties":{"$id":{"$ref":"#/$defs/uriReferenceString","pattern":"^[^#]*#?$"},
"$schema":{"$ref":"#/$defs/uriString"},"$ref":{"$ref":"#/$defs/uriReferenceString"},
"$anchor":{"$ref":"#/$defs/anchorString"},"$dynamicRef":{"$ref":"#/$defs/uriReferenceString"},
"$dynamicAnchor":{"$ref":"#/$defs/anchorString"},"$vocabulary":{"type":"object",
"propertyNames":{"$ref":"#/$defs/uriString"},"additionalProperties":{"type":"boolean"}},
"$comment":{"type":"string"},"$defs":{"type":"object","additionalProperties":{"$dynamicRef":"#meta"}}},
"$defs":{"anchorString":{"type":"string","pattern":"^[A-Za-z_][-A-Za-z0-9._]*$"},"uriString":{"type":"string"},
"uriReferenceString":{"type":"string"}}},
{"$id":"https://json-schema.org/draft/2020-12/meta/applicator","$dynamicAnchor":"meta","type":["object","boolean"],
"properties":{"prefixItems":{"$ref":"#/$defs/schemaArray"},"items":{"$dynamicRef":"#meta"},
"contains":{"$dynamicRef":"#meta"},"additionalProperties":{"$dynamicRef":"#meta"},"properties":{"type":"object",
"additionalProperties":{"$dynamicRef":"#meta"}},"patternProperties":{"type":"object",
"additionalProperties":{"$dynamicRef":"#meta"},"propertyNames":{}},"dependentSchemas":{"type":"object",
"additionalProperties":{"$dynamicRef":"#meta"}},"propertyNames":{"$dynamicRef":"#meta"},
"if":{"$dynamicRef":"#meta"},"then":{"$dynamicRef":"#meta"},"else":{"$dynamicRef":"#meta"},
"allOf":{"$ref":"#/$defs/schemaArray"},"anyOf":{"$ref":"#/$defs/schemaArray"},
"oneOf":{"$ref":"#/$defs/schemaArray"},"not":{"$dynamicRef":"#meta"}},"$defs":{"schemaArray":{"type":"array",
"minItems":1,"items":{"$dynamicRef":"#meta"}}}},
{"$id":"https://json-schema.org/draft/2020-12/meta/unevaluated","$dynamicAnchor":"meta","type":["object","boolean"],
"properties":{"unevaluatedItems":{"$dynamicRef":"#meta"},"unevaluatedProperties":{"$dynamicRef":"#meta"}}},
{"$id":"https://json-schema.org/draft/2020-12/meta/validation","$dynamicAnchor":"meta","type":["object","boolean"],
"properties":{"type":{"anyOf":[{"$ref":"#/$defs/simpleTypes"},{"type":"array",
"items":{"$ref":"#/$defs/simpleTypes"},"minItems":1,"uniqueItems":true}]},"const":true,"enum":{"type":"array",
"items":true},"multipleOf":{"type":"number","exclusiveMinimum":0},"maximum":{"type":"number"},
"exclusiveMaximum":{"type":"number"},"minimum":{"type":"number"},"exclusiveMinimum":{"type":"number"},
"maxLength":{"$ref":"#/$defs/nonNegativeInteger"},"minLength":{"$ref":"#/$defs/nonNegativeIntegerDefault0"},
"pattern":{"type":"string"},"maxItems":{"$ref":"#/$defs/nonNegativeInteger"},
"minItems":{"$ref":"#/$defs/nonNegativeIntegerDefault0"},"uniqueItems":{"type":"boolean"},
"maxContains":{"$ref":"#/$defs/nonNegativeInteger"},"minContains":{"$ref":"#/$defs/nonNegativeInteger"},
"maxProperties":{"$ref":"#/$defs/nonNegativeInteger"},"minProperties":{"$ref":"#/$defs/nonNegativeIntegerDefault0"},
"required":{"$ref":"#/$defs/stringArray"},"dependentRequired":{"type":"object",
"additionalProperties":{"$ref":"#/$defs/stringArray"}}},"$defs":{"nonNegativeInteger":{"type":"integer",
"minimum":0},"nonNegativeIntegerDefault0":{"$ref":"#/$defs/nonNegativeInteger"},"simpleTypes":{"enum":["array",
"boolean","integer","null","number","object","string"]},"stringArray":{"type":"array","items":{"type":"string"},
"uniqueItems":true}}},
{"$id":"https://json-schema.org/draft/2020-12/meta/meta-data","$dynamicAnchor":"meta","type":["object","boolean"],
"properties":{"title":{"type":"string"},"description":{"type":"string"},"default":true,
"deprecated":{"type":"boolean"},"readOnly":{"type":"boolean"},"writeOnly":{"type":"boolean"},
"examples":{"type":"array","items":true}}},
{"$id":"https://json-schema.org/draft/2020-12/meta/format-annotation","$dynamicAnchor":"meta","type":["object",
"boolean"],"properties":{"format":{"type":"string"}}},
{"$id":"https://json-schema.org/draft/2020-12/meta/content","$dynamicAnchor":"meta","type":["object","boolean"],
"properties":{"contentEncoding":{"type":"string"},"contentMediaType":{"type":"string"},
"contentSchema":{"$dynamicRef":"#meta"}}}]]==]

-- Records every $id, $anchor and $dynamicAnchor.
local function index(c, s, base)
  if type(s) ~= "table" or c.bases[s] then return end
  local name
  base, name = rebase(c, s, base)
  c.bases[s] = base
  c.found[base] = c.found[base] or s
  name = name or s["$anchor"]
  if type(name) == "string" then c.found[base .. "#" .. name] = s end
  name = s["$dynamicAnchor"]
  if type(name) == "string" then
    c.found[base .. "#" .. name], c.dynamic[base] = s, c.dynamic[base] or {}
    c.dynamic[base][name] = s
  end
  for k, x in pairs(s) do
    local how = type(x) == "table" and INNER[k]
    if how == ONE and not arrayish(x) then
      index(c, x, base)
    elseif how then
      for _, y in pairs(x) do index(c, y, base) end
    end
  end
end

local function index_all(c)
  c.bases, c.found, c.dynamic = {}, { [""] = c.root }, {}
  index(c, c.root, "")
end

-- The schema that a reference means. Most schemas have no reference: they are indexed at the first one.
local function lookup(c, ref, base, at)
  if not c.bases then index_all(c) end
  local uri, frag = match(ref, "^([^#]*)#?(.*)$")
  frag = gsub(frag, "%%(%x%x)", function(h) return char(tonumber(h, 16)) end)
  base = uri == "" and base or resolve(base, uri)
  local t = c.found[base]
  if not t and find(base, DIALECT_BASE, 1, true) == 1 then
    for _, s in pairs(json.decode(METASCHEMA)) do index(c, s, "") end
    t = c.found[base]
  end
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

-- A scope is what each $dynamicAnchor means from here on: its schema in the outermost of the resources that
-- references and $id have led through. That is known when compiling, so checking need not look for it; a
-- schema is compiled once for each scope it is reached in.
local function new_scope(bound) return { bound = bound, after = {}, slots = {} } end

-- The scope inside the resource `base`.
local function enter(c, scope, base, at)
  if scope.after[base] then return scope.after[base] end
  local bound, more = {}, 0
  for name, s in pairs(c.dynamic[base] or {}) do bound[name], more = s, scope.bound[name] and more or 1 end
  for name, s in pairs(scope.bound) do bound[name] = s end
  c.scopes = c.scopes + more
  if c.scopes > MAX_SCOPES then fail(at, "more than " .. MAX_SCOPES .. " dynamic scopes") end
  scope.after[base] = more > 0 and new_scope(bound) or scope
  return scope.after[base]
end

-- Keywords -----------------------------------------------------------------------------------------

-- K[keyword](x, c, base, at, s) -> check(v, seen) or nil; x is s[keyword], at its pointer. ORDER is the order of
-- the checks, which decides the failure that is reported.
local K, ORDER, KNOWN = {}, {}, {}
for k in ([[type enum const minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength
    pattern minItems maxItems prefixItems items contains uniqueItems properties required minProperties
    maxProperties propertyNames patternProperties additionalProperties dependentRequired dependentSchemas $ref
    $dynamicRef allOf anyOf oneOf not if then else unevaluatedItems unevaluatedProperties $defs]]):gmatch("%S+") do
  ORDER[#ORDER + 1], KNOWN[k] = k, true
end
for k in ([[$id $anchor $dynamicAnchor $schema $vocabulary $comment title description default examples deprecated
    readOnly writeOnly format contentEncoding contentMediaType contentSchema minContains maxContains]]):gmatch("%S+") do
  KNOWN[k] = true
end
local TYPES = { string = 1, number = 1, integer = 1, boolean = 1, null = 1, array = 1, object = 1 }
local TEXTS = { ["$id"] = 1, ["$anchor"] = 1, ["$dynamicAnchor"] = 1, ["$ref"] = 1, ["$dynamicRef"] = 1, ["$schema"] = 1 }
local DRAFT7 = { definitions = 1, dependencies = 1, additionalItems = 1 }
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
  return function(v, seen)
    if seen and elements(v) then
      for i = 1, n do seen[i] = true end
      if s.items ~= nil then seen[ALL] = true end
    end
    for i = 1, elements(v) or 0 do
      local m, p = (list[i] or rest)(v[i])
      if m then return m, element(i, p) end
      if i >= n and rest == pass then return end
    end
  end
end

function K.items(x, c, base, at, s)
  if is_list(x) and not is_map(x) then fail(at, "a list of schemas is draft-07; use prefixItems") end
  return s.prefixItems == nil and (x ~= true or c.full) and K.prefixItems(nil, c, base, at, s)
end

function K.contains(x, c, base, at, s)
  local f, least, most = as_is(node(c, x, base, at)), count(s.minContains or 1, at), count(s.maxContains or 1e300, at)
  local word = s.minContains and " (minContains)" or " (contains)"
  return function(v, seen)
    local n, found = elements(v), 0
    for i = 1, n or 0 do
      if not f(v[i]) then
        found = found + 1
        if seen then seen[i] = true end
      end
    end
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
  local function check(v)
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
        if m and not drop(v, k, y, need) then return m, key(k, p) end
      end
    end
  end
  return not c.full and check or function(v, seen)
    for i = 1, seen and type(v) == "table" and n or 0 do
      local k = names[i]
      if map[k] and v[k] ~= nil then seen[k] = true end
    end
    return check(v)
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
  local n, matches, known, need = #names, {}, s.properties or {}, names_of(s.required)
  for i = 1, n do matches[i] = matcher(c, names[i], below(at, names[i])) end
  return function(v, seen)
    if type(v) ~= "table" or arrayish(v) then return end
    if seen and s.additionalProperties ~= nil then seen[ALL] = true end
    local unknown -- the first in order is named, whatever the order of pairs
    for k, y in pairs(v) do
      local covered, m, p = known[k] ~= nil, nil, nil
      for i = 1, n do
        if matches[i](tostring(k)) then
          covered = true
          if seen then seen[k] = true end
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
      if m and not drop(v, k, y, need) then return m, key(tostring(k), p) end
    end
    return unknown and "unknown property " .. show(unknown) .. " (additionalProperties)" or nil
  end
end

function K.additionalProperties(x, c, base, at, s)
  return s.patternProperties == nil and (x ~= true or c.full) and K.patternProperties(nil, c, base, at, s)
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
    checks[i] = function(v, seen) if is_map(v) and v[k] ~= nil then return f(v, seen) end end
  end
  return sequence(checks)
end

K["$ref"] = function(x, c, base, at) return node(c, lookup(c, x, base, at), base, at) end

K["$dynamicRef"] = function(x, c, base, at)
  need_full(c)
  local t, name = lookup(c, x, base, at), match(x, "#(.*)$")
  if name and type(t) == "table" and t["$dynamicAnchor"] == name then t = c.scope.bound[name] or t end
  return node(c, t, base, at)
end

function K.allOf(x, c, base, at) return sequence((nodes_of(x, c, base, at))) end

for _, word in pairs({ "anyOf", "oneOf" }) do
  K[word] = function(x, c, base, at)
    local list, n = nodes_of(x, c, base, at)
    return choose(function(v, seen)
      local hit, best, path -- best: the failure furthest inside the value
      for i = 1, n do
        local mine = seen and {}
        local m, p = list[i](v, mine)
        if not m then
          if seen then merge(seen, mine) end
          if hit and word == "oneOf" then
            return "matches alternatives " .. hit .. " and " .. i .. ", must match one (oneOf)"
          end
          if word == "anyOf" and not seen then return end
          hit = i
        elseif not best or p and #p > #(path or "") then
          best, path = m, p
        end
      end
      if hit then return end
      return "matches none of " .. n .. " alternatives (" .. word .. "), nearest: "
        .. (path and path .. ": " or "") .. best
    end, list)
  end
end

K["not"] = function(x, c, base, at)
  local f = as_is(node(c, x, base, at))
  return function(v) return not f(v) and "must not match (not)" or nil end
end

K["if"] = function(x, c, base, at, s)
  local f, yes, no = as_is(node(c, x, base, at)), pass, pass
  if s["then"] ~= nil then yes = node(c, s["then"], base, gsub(at, "if$", "then")) end
  if s["else"] ~= nil then no = node(c, s["else"], base, gsub(at, "if$", "else")) end
  return function(v, seen)
    local mine = seen and {}
    if f(v, mine) then return no(v, seen) end
    if seen then merge(seen, mine) end
    return yes(v, seen)
  end
end

-- Last of all, when `seen` has what the other keywords of the schema and those inside them evaluated.
function K.unevaluatedItems(x, c, base, at)
  need_full(c)
  local f = node(c, x, base, at)
  return function(v, seen)
    local n = elements(v)
    if not n or seen[ALL] then return end
    for i = 1, n do
      local m, p
      if not seen[i] then m, p = f(v[i]) end
      if m then return m, element(i, p) end
    end
    seen[ALL] = true
  end
end

function K.unevaluatedProperties(x, c, base, at, s)
  need_full(c)
  local f, need = node(c, x, base, at), names_of(s.required)
  return function(v, seen)
    if not is_map(v) or seen[ALL] then return end
    local unknown
    for k, y in pairs(v) do
      if not seen[k] and f == never then
        k = tostring(k)
        unknown = unknown and unknown < k and unknown or k
      elseif not seen[k] then
        local m, p = f(y)
        if m and not drop(v, k, y, need) then return m, key(tostring(k), p) end
      end
    end
    if unknown then return "unknown property " .. show(unknown) .. " (unevaluatedProperties)" end
    seen[ALL] = true
  end
end

-- Compiled for their errors; $defs also so that unknown keywords in unused ones are found.
K["then"] = function(x, c, base, at) node(c, x, base, at) end
K["else"] = K["then"]
K["$defs"] = function(x, c, base, at) map_of(x, c, base, at) end

-- Nodes --------------------------------------------------------------------------------------------

local function without(s, keys)
  local t = {}
  for k, x in pairs(s) do if not keys[k] then t[k] = x end end
  return t
end

-- The keywords that are none in a dialect of the document's own: those of the vocabularies that its schema,
-- which is inside the document, does not list.
local function left_out(c)
  local meta, out = is_map(c.root) and c.found[c.root["$schema"] or c], {}
  local listed = meta and meta["$vocabulary"]
  if not is_map(listed) then return nil end
  local needed = without(listed, {})
  for _, s in pairs(json.decode(METASCHEMA)) do
    local uri = gsub(s["$id"], "/meta/", "/vocab/")
    for k in pairs(listed[uri] == nil and not find(uri, "/core$") and s.properties or {}) do out[k] = true end
    needed[uri] = nil
  end
  for uri, must in pairs(needed) do if must then fail("#/$schema", "unknown vocabulary " .. uri) end end
  return out
end

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
    fail(below(at, bad), "unknown keyword" .. hint)
  end
  local dialect = s["$schema"]
  if dialect and not (c.left_out and dialect == c.root["$schema"]) then
    dialect = DIALECTS[gsub(gsub(dialect, "^https?://", ""), "#$", "")]
    if not dialect then need_full(c) end
    want(dialect and (dialect == 7) == c.draft7, below(at, "$schema"), dialect and "the dialect of the whole document"
        or "https://json-schema.org/draft/2020-12/schema or http://json-schema.org/draft-07/schema#")
  end
end

-- Draft-07 in terms of 2020-12.
local function modernise(s)
  if s["$ref"] then return { ["$ref"] = s["$ref"] } end
  local t = without(s, {})
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
  s = c.draft7 and modernise(s) or c.left_out and without(s, c.left_out) or s
  local checks = {}
  for i = 1, #ORDER do
    local k = ORDER[i]
    if s[k] ~= nil then
      local f = K[k](s[k], c, base, below(at, k), s)
      checks[#checks + 1] = f ~= pass and f or nil
    end
  end
  local check = sequence(checks)
  if s.unevaluatedItems == nil and s.unevaluatedProperties == nil then return check end
  return function(v, seen)
    local mine = {}
    local m, p = check(v, mine)
    if m then return m, p end
    if seen then merge(seen, mine) end
  end
end

-- One node per schema table and scope; a table met again while it is being compiled is a recursion.
function node(c, s, base, at)
  if type(s) == "boolean" then return s and pass or never end
  want(is_map(s), at, "a schema (an object, true or false), got " .. kind(s))
  local outer = c.scope
  local scope = c.full and enter(c, outer, c.bases[s] or base, at) or outer
  local slot = scope.slots[s]
  if not slot then
    slot = {}
    scope.slots[s], c.scope, c.level = slot, scope, c.level + 1
    if c.level > MAX_LEVEL then fail(at, "schemas and references nested deeper than " .. MAX_LEVEL) end
    slot.f = build(c, s, base, at)
    c.scope, c.level = outer, c.level - 1
  elseif not slot.f then
    c.guarded = true
    return function(v, seen)
      local depth = c.depth + 1
      if depth > MAX_RECURSION then error("recursion deeper than " .. MAX_RECURSION, 0) end
      c.depth = depth
      local m, p = slot.f(v, seen)
      c.depth = depth - 1
      return m, p
    end
  end
  return slot.f
end

local function start(c)
  if c.full then
    index_all(c)
    c.scope, c.scopes, c.left_out = new_scope({}), 0, left_out(c)
  end
  return node(c, c.root, "", "#")
end

local function compile(s, opts)
  local root, unknown, c = opts and opts.root or "arguments", nil, nil
  local dialect, ok, f = type(s) == "table" and s["$schema"], nil, nil
  repeat
    unknown = opts and opts.unknown == "collect" and {} or nil
    c = { root = s, scope = { slots = {} }, full = f == AGAIN, level = 0, depth = 0, unknown = unknown,
      draft7 = type(dialect) == "string" and find(dialect, "/draft-07/", 1, true) ~= nil }
    ok, f = pcall(start, c)
  until f ~= AGAIN
  if not ok then
    return nil, type(f) == "table" and f[1] or tostring(f)
  elseif unknown then
    sort(unknown)
  end
  c.root, c.scope, c.bases, c.found, c.dynamic = nil, nil, nil, nil, nil

  local function check(v, lenient)
    dropping = false -- an error may have ended the last check
    local m, p = f(v)
    local again = m and lenient
    if again then
      dropped = {}
      m, p = drop_nulls(f, v)
    end
    if m then return nil, root .. (p or "") .. ": " .. m end
    return true, again
  end
  return not c.guarded and check or function(v, lenient)
    c.depth = 0
    local done, good, message = pcall(check, v, lenient)
    if done then return good, message end
    return nil, root .. ": " .. tostring(good)
  end, unknown
end

return { compile = compile }
