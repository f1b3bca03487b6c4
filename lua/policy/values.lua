-- Values of JSON as JSON Schema compares, measures and shows them, for schema.lua, which says what deps are.
local deps = ...
local json, is_array, is_bigint = deps.json, deps.is_array, deps.is_bigint
local null = json.null
local type, pairs, select, tostring, tonumber, pcall, error = type, pairs, select, tostring, tonumber, pcall, error
local find, match, sub, gsub, format, byte = string.find, string.match, string.sub, string.gsub, string.format, string.byte

local MAX_LEVEL = 256 -- values inside each other, when compared

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

return {
  arrayish = arrayish, kind = kind, is_number = is_number, is_integer = is_integer, show = show, key = key, element = element,
  mismatch = mismatch, digits = digits, less = less, decimal = decimal, same = same, characters = characters, elements = elements, members = members,
}
