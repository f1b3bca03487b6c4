-- TAP for Lua tests: local t = require "tap" (or dofile "tests/lua/tap.lua"); `return t.done()` at the end.
-- A test function may wait, where it runs in a task.
local t = {}
local count, failed = 0, 0

local function show(v, depth)
    if type(v) == "string" then
        return string.format("%q", v)
    elseif type(v) ~= "table" or depth > 3 then
        return tostring(v)
    end
    local parts = {}
    for k, item in pairs(v) do
        parts[#parts + 1] = (type(k) == "string" and k or "[" .. tostring(k) .. "]") .. " = " .. show(item, depth + 1)
    end
    table.sort(parts)
    return "{ " .. table.concat(parts, ", ") .. " }"
end

local function same(a, b)
    if a == b then
        return true
    elseif type(a) ~= "table" or type(b) ~= "table" then
        return a ~= a and b ~= b -- NaN
    end
    for k, v in pairs(a) do
        if not same(v, b[k]) then
            return false
        end
    end
    for k in pairs(b) do
        if a[k] == nil then
            return false
        end
    end
    return true
end

function t.test(name, fn)
    count = count + 1
    local ok, err = xpcall(fn, function(e)
        return type(e) == "string" and debug.traceback(e, 2) or show(e, 0)
    end)
    print((ok and "ok " or "not ok ") .. count .. " - " .. name:gsub("[\n#]", " "))
    if not ok then
        failed = failed + 1
        print("# " .. err:gsub("\n", "\n# "))
    end
    return ok
end

-- Equal by value, tables key by key.
function t.eq(got, expected, what)
    if not same(got, expected) then
        error((what and what .. ": " or "") .. "expected " .. show(expected, 0) .. ", got " .. show(got, 0), 2)
    end
    return got
end

-- Truthy; hands all its arguments on, so that it can wrap calls that return nil, message.
function t.ok(value, ...)
    if not value then
        error("expected a true value, got " .. show(value, 0) .. (... ~= nil and ": " .. show((...), 0) or ""), 2)
    end
    return value, ...
end

-- fn raises an error whose text contains `text` (no pattern); returns the text.
function t.raises(fn, text)
    local ok, err = pcall(fn)
    if ok then
        error("expected an error" .. (text and " with " .. show(text, 0) or ""), 2)
    end
    err = tostring(err)
    if text and not err:find(text, 1, true) then
        error("expected an error with " .. show(text, 0) .. ", got " .. show(err, 0), 2)
    end
    return err
end

-- Prints the plan; the exit status.
function t.done()
    print("1.." .. count)
    return failed == 0 and count > 0 and 0 or 1
end

return t
