-- lua/meta/orch.lua: every function of the API is annotated, and nothing else is.
local t = require "tap"
local dir = arg[0]:match("^(.*)/tests/lua/") or "."
local file = assert(io.open(dir .. "/lua/meta/orch.lua"))
local meta = file:read("*a")
file:close()

local function walk(found, prefix, value)
  for name, member in pairs(value) do
    if type(member) == "table" then
      walk(found, prefix .. name .. ".", member)
    elseif type(member) == "function" then
      found[prefix .. name] = true
    end
  end
  return found
end

t.test("it is Lua", function() t.ok(loadstring(meta, "=meta")) end)

local exists, annotated = walk({}, "orch.", require "orch"), {}
for name in meta:gmatch("\nfunction (orch%.[%w_.]+)%(") do annotated[name] = true end

t.test("what exists is annotated", function()
  for name in pairs(exists) do t.ok(annotated[name], name) end
end)

t.test("what is annotated exists", function()
  for name in pairs(annotated) do t.ok(exists[name], name) end
end)

t.test("what is not available yet says so", function()
  local n = 0
  for name in meta:gmatch("\n%-%-%-Not available yet[^\n]*\nfunction (orch%.[%w_.]+)%(") do
    t.raises(assert(loadstring("return " .. name))(), "not available yet")
    n = n + 1
  end
  t.ok(n > 3, n)
end)

return t.done()
