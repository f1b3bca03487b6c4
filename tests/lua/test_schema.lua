-- lua/policy/schema.lua. Cases are JSON; the regular expressions are a stand-in with just the patterns used here
-- (tests/c/test_regex.c has the real ones).
local count, failed = 0, 0
local function report(ok, name, detail)
    count = count + 1
    if not ok then failed = failed + 1 end
    print((ok and "ok " or "not ok ") .. count .. " - " .. name:gsub("[\n#]", " "))
    if not ok then print("# " .. tostring(detail):gsub("\n", "\n# ")) end
end

-- Stand-ins ------------------------------------------------------------------------------------------

local json = { null = newproxy() }
local array_mt = {}

local function is_array(t) return getmetatable(t) == array_mt end
local function is_bigint(v) return type(v) == "userdata" and v ~= json.null end

local function bigint(digits)
    local v = newproxy(true)
    local mt = getmetatable(v)
    mt.__tostring = function() return digits end
    return v
end

local ESCAPES = { n = "\n", t = "\t", ["/"] = "/", ["\\"] = "\\", ['"'] = '"' }
function json.decode(s)
    local at = 1
    local function skip() at = s:find("[^ \n]", at) or #s + 1 end
    local function take(pattern)
        local text = s:match("^" .. pattern, at)
        if text then at = at + #text end
        return text
    end
    local value
    local function members(close, one)
        at = at + 1
        skip()
        if take(close) then return end
        repeat
            one()
            skip()
        until not take(",")
        assert(take(close), "bad JSON in test: " .. s)
    end
    function value()
        skip()
        local c = s:sub(at, at)
        if c == "{" then
            local t = {}
            members("}", function()
                local k = value()
                skip()
                assert(take(":"), "bad JSON in test: " .. s)
                t[k] = value()
            end)
            return t
        elseif c == "[" then
            local t = setmetatable({}, array_mt)
            members("]", function() t[#t + 1] = value() end)
            return t
        elseif c == '"' then
            local from, i = at + 1, at + 1
            while s:sub(i, i) ~= '"' do i = i + (s:sub(i, i) == "\\" and 2 or 1) end
            at = i + 1
            return (s:sub(from, i - 1):gsub("\\(.)", ESCAPES))
        end
        local word = take("%l+")
        if word then
            assert(word == "true" or word == "false" or word == "null", "bad JSON in test: " .. s)
            return word == "null" and json.null or word == "true"
        end
        local n = assert(take("-?[%d.]+[eE]?[+-]?%d*"), "bad JSON in test: " .. s)
        local v = tonumber(n)
        return n:find("^-?%d+$") and math.abs(v) >= 2 ^ 53 and bigint(n) or v
    end
    local v = value()
    skip()
    assert(at > #s, "bad JSON in test: " .. s)
    return v
end

function json.encode(v)
    if v == json.null then return "null" end
    if type(v) == "string" then return '"' .. v:gsub('["\\]', "\\%0") .. '"' end
    if type(v) ~= "table" then return tostring(v) end
    local out = {}
    if is_array(v) or v[1] ~= nil then
        for i = 1, #v do out[i] = json.encode(v[i]) end
        return "[" .. table.concat(out, ",") .. "]"
    end
    for k, x in pairs(v) do out[#out + 1] = json.encode(k) .. ":" .. json.encode(x) end
    table.sort(out)
    return "{" .. table.concat(out, ",") .. "}"
end

local function regex(pattern)
    if pattern == "(" then return nil, "missing closing parenthesis at offset 1" end
    if pattern == "limit" then return function() error("pattern match limit", 0) end end
    return function(s) return s:find(pattern) ~= nil end
end

local values = assert(loadfile("lua/policy/values.lua"))({ json = json, is_array = is_array, is_bigint = is_bigint })
local schema = assert(loadfile("lua/policy/schema.lua"))({ json = json, regex = regex, is_array = is_array, is_bigint = is_bigint, values = values })

-- S(text):ok(value…):no(value, message…)
local function S(text, opts)
    local s = text
    if type(text) == "string" then s = json.decode(text) end
    local check, err = schema.compile(s, opts)
    local shown = type(text) == "string" and text or json.encode(text)
    if not check then report(false, shown, err) end
    local cases = {}
    function cases:ok(...)
        for i = 1, check and select("#", ...) or 0 do
            local v = select(i, ...)
            local good, message = check(json.decode(v))
            report(good == true and message == nil, shown .. " takes " .. v, message)
        end
        return cases
    end
    function cases:no(...)
        for i = 1, check and select("#", ...) or 0, 2 do
            local v, want = select(i, ...)
            local good, message = check(json.decode(v))
            want = "arguments" .. want
            report(good == nil and message == want, shown .. " refuses " .. v, "got:  " .. tostring(message) .. "\nwant: " .. want)
        end
        return cases
    end
    -- value, what is left of it without nulls that count as absent: "same" when it is valid as it is
    function cases:lean(...)
        for i = 1, check and select("#", ...) or 0, 2 do
            local text, want = select(i, ...)
            local v = json.decode(text)
            local good, dropped = check(v, true)
            local got = good and (dropped and json.encode(v) or "same") or dropped
            report(got == want and (want == "same" or (check(v))), shown .. " of " .. text .. " leaves " .. want, got)
        end
        return cases
    end
    -- value, message: wrong even so, and nothing of it is gone
    function cases:still(...)
        for i = 1, check and select("#", ...) or 0, 2 do
            local text, want = select(i, ...)
            local v = json.decode(text)
            local good, message = check(v, true)
            report(good == nil and message == "arguments" .. want and json.encode(v) == json.encode(json.decode(text)),
                shown .. " refuses without nulls " .. text, "got:  " .. tostring(message) .. " " .. json.encode(v) .. "\nwant: arguments" .. want)
        end
        return cases
    end
    return cases
end

local function bad(text, want, opts)
    local check, message = schema.compile(type(text) == "string" and json.decode(text) or text, opts)
    report(check == nil and message == want, "refused: " .. (type(text) == "string" and text or json.encode(text)),
        "got:  " .. tostring(message) .. "\nwant: " .. want)
end

-- null for what is optional -----------------------------------------------------------------------------

S '{"type":"object","properties":{"a":{"type":"string","minLength":1},"b":{"type":"integer"},"c":{"enum":["x"]}},"required":["b"],"additionalProperties":false}'
    :lean('{"a":null,"b":1}', '{"b":1}', '{"a":null,"b":1,"c":null}', '{"b":1}', '{"b":1}', "same")
    :still('{"a":null,"b":null}', ".b: expected integer, got null (type)", '{"a":null}', ': missing "b" (required)',
        '{"a":null,"b":1,"d":null}', ': unknown property "d" (additionalProperties)', '{"a":"","b":1,"c":null}', ".a: must have at least 1 characters (minLength)",
        '[null]', ": expected object, got array (type)")
S '{"properties":{"a":{"type":["string","null"]},"b":{"type":"string"},"c":{},"d":true,"e":{"const":null},"f":{"enum":[1,null]}}}'
    :lean('{"a":null,"c":null,"d":null,"e":null,"f":null}', "same", '{"a":null,"b":null,"c":null}', '{"a":null,"c":null}')
S '{"properties":{"o":{"type":"object","properties":{"a":{"type":"string"},"b":{}},"required":["b"]},"l":{"type":"array","items":{"properties":{"n":{"type":"number"}}}}}}'
    :lean('{"o":{"a":null,"b":null},"l":[{"n":null},{"n":1}]}', '{"l":[{},{"n":1}],"o":{"b":null}}', '{"o":null,"l":null}', "{}")
    :still('{"o":{"a":null}}', '.o: missing "b" (required)', '{"o":{"a":null,"b":1},"l":[{"n":"x"}]}', ".l[0].n: expected number, got string (type)")
S '{"items":{"type":"string"},"prefixItems":[{"properties":{"a":{"type":"string"}}}]}':lean('[{"a":null},"x"]', '[{},"x"]')
    :still('[{"a":null},null]', "[1]: expected string, got null (type)")
S '{"patternProperties":{"^s":{"type":"string"}},"additionalProperties":{"type":"number"},"required":["sure"]}'
    :lean('{"sure":"","s":null,"n":null,"m":1}', '{"m":1,"sure":""}'):still('{"sure":null}', ".sure: expected string, got null (type)")
S '{"maxProperties":1,"patternProperties":{"^a":{"type":"string"}},"propertyNames":{"maxLength":2}}':lean('{"ab":null,"a":"x"}', '{"a":"x"}')
    :still('{"bbc":1,"a":null}', ': property name "bbc": must have at most 2 characters (maxLength) (propertyNames)')
S '{"properties":{"a":{"type":"string"},"b":{"type":"string"}},"dependentRequired":{"a":["b"]},"minProperties":1}'
    :lean('{"a":null,"b":"x"}', '{"b":"x"}'):still('{"a":"x","b":null}', ': missing "b", which "a" needs (dependentRequired)',
        '{"a":null}', ": must have at least 1 properties (minProperties)")
S '{"dependentSchemas":{"a":{"properties":{"b":{"type":"string"}}}}}':lean('{"a":1,"b":null}', '{"a":1}', '{"b":null}', "same")
S '{"allOf":[{"properties":{"a":{"type":["string","null"]}}},{"properties":{"a":{"type":"string"}}}]}':lean('{"a":null}', "{}")
S '{"properties":{"a":{"type":"string"}},"allOf":[{"required":["a"]}]}':still('{"a":null}', ': missing "a" (required)')
S '{"$ref":"#/$defs/tree","$defs":{"tree":{"properties":{"name":{"type":"string"},"left":{"$ref":"#/$defs/tree","type":"object"}}}}}'
    :lean('{"left":{"left":{"name":null,"left":null}}}', '{"left":{"left":{}}}')
-- The alternatives stay as they were, but the first that takes the value so.
local KINDS = '":[{"properties":{"kind":{"const":"x"},"a":{"type":"string"}},"required":["kind"]},{"properties":{"kind":{"const":"y"},"a":{"type":["string","null"]},"b":{"type":"string"}},"required":["kind"]}]}'
for _, word in ipairs { "anyOf", "oneOf" } do
    S('{"' .. word .. KINDS):lean('{"kind":"x","a":null}', '{"kind":"x"}', '{"kind":"y","a":null}', "same", '{"kind":"y","a":null,"b":null}', '{"a":null,"kind":"y"}')
        :still('{"kind":"z","a":null}', ": matches none of 2 alternatives (" .. word .. '), nearest: .kind: must be "y" (const)')
end
S '{"anyOf":[{"type":"string"},{"type":"null"}]}':lean("null", "same")
S '{"properties":{"a":{"anyOf":[{"type":"string"},{"type":"integer"}]},"b":{"not":{"type":"null"}},"c":{"$ref":"#/$defs/c"}},"$defs":{"c":{"type":"string"}}}'
    :lean('{"a":null,"b":null,"c":null}', "{}")
S '{"not":{"properties":{"a":{"type":"string"}}},"properties":{"b":{"type":"string"}}}':lean('{"a":null,"b":null}', '{"a":null}')
S '{"if":{"properties":{"a":{"type":"string"}}},"then":{"required":["z"]},"else":{"properties":{"b":{"type":"string"}}}}':lean('{"a":null,"b":null}', '{"a":null}')
S '{"properties":{"l":{"contains":{"properties":{"a":{"type":"string"}},"required":["b"]}},"b":{"type":"string"}}}'
    :lean('{"l":[{"a":"x","b":1}],"b":null}', '{"l":[{"a":"x","b":1}]}')
    :still('{"l":[{"a":null,"b":1}]}', ".l: must contain at least 1 matching items, has 0 (contains)")
S '{"properties":{"b":{"type":"string"}},"anyOf":[{"properties":{"a":{"type":["string","null"]}}}],"unevaluatedProperties":{"type":"number"}}'
    :lean('{"a":null,"b":null}', '{"a":null}', '{"a":null,"c":null}', '{"a":null}')
S '{"properties":{"a":{"type":"string"}},"unevaluatedProperties":false}':lean('{"a":null}', "{}"):still('{"a":null,"c":null}', ': unknown property "c" (unevaluatedProperties)')
S '{"properties":{"a":{"pattern":"limit"},"b":{"type":"string"}}}':still('{"a":"x","b":null}', ": pattern match limit")

-- Types ----------------------------------------------------------------------------------------------

S "true":ok("1", "null", "{}")
S "{}":ok("1", "null", "[]")
S "false":no("1", ": nothing is allowed here (false)")
S '{"type":"string"}':ok('"a"', '""'):no("1", ": expected string, got number (type)", "null", ": expected string, got null (type)",
    "[]", ": expected string, got array (type)", "{}", ": expected string, got object (type)",
    "true", ": expected string, got boolean (type)")
S '{"type":"number"}':ok("1", "1.5", "-0", "9007199254740993"):no('"1"', ": expected number, got string (type)")
S '{"type":"integer"}':ok("1", "1.0", "-3", "1e300", "9007199254740993"):no("1.5", ": expected integer, got number (type)",
    '"1"', ": expected integer, got string (type)")
S '{"type":"boolean"}':ok("true", "false"):no("0", ": expected boolean, got number (type)")
S '{"type":"null"}':ok("null"):no("false", ": expected null, got boolean (type)", "{}", ": expected null, got object (type)")
S '{"type":"array"}':ok("[]", "[1]"):no("{}", ": expected array, got object (type)")
S '{"type":"object"}':ok("{}", '{"a":1}'):no("[]", ": expected object, got array (type)", "[1]", ": expected object, got array (type)")
S '{"type":["string","null"]}':ok('"a"', "null"):no("1", ": expected string or null, got number (type)")
S '{"type":["integer","string"]}':ok("2", '"a"'):no("2.5", ": expected integer or string, got number (type)")
S '{"type":["integer","number"]}':ok("2.5")
S '{"type":["object"],"required":["a"]}':ok('{"a":1}'):no("[]", ": expected object, got array (type)")

-- enum, const ----------------------------------------------------------------------------------------

S '{"enum":["a",1,null,true]}':ok('"a"', "1", "1.0", "null", "true"):no('"b"', ': must be one of "a", 1, null, true (enum)',
    "false", ': must be one of "a", 1, null, true (enum)')
S '{"enum":[[1,{"a":2,"b":3}],{}]}':ok('[1.0,{"b":3,"a":2}]', "{}"):no('[1,{"a":2}]', ': must be one of [1,{"a":2,"b":3}], {} (enum)',
    "[]", ': must be one of [1,{"a":2,"b":3}], {} (enum)')
S '{"enum":[1,2,3,4,5,6,7,8,9,10,11]}':no("12", ": must be one of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, … (enum)")
S '{"enum":[]}':no("1", ": must be one of  (enum)")
S '{"const":{"a":[1,2]}}':ok('{"a":[1,2]}'):no('{"a":[2,1]}', ': must be {"a":[1,2]} (const)', '{"a":[1,2],"b":1}', ': must be {"a":[1,2]} (const)')
S '{"const":false}':ok("false"):no("0", ": must be false (const)", "null", ": must be false (const)")
S '{"const":null}':ok("null"):no("false", ": must be null (const)")
S '{"const":9007199254740993}':ok("9007199254740993"):no("9007199254740994", ": must be 9007199254740993 (const)",
    "9007199254740992", ": must be 9007199254740993 (const)")
S '{"const":9223372036854775808}':ok("9223372036854775808", "9.223372036854775808e18")
S '{"const":1e20}':ok("100000000000000000000"):no("100000000000000000001", ": must be 1e+20 (const)")

-- Numbers --------------------------------------------------------------------------------------------

S '{"minimum":1}':ok("1", "2", '"a"', "9007199254740993"):no("0.5", ": must be at least 1 (minimum)",
    "-9007199254740993", ": must be at least 1 (minimum)")
S '{"maximum":1.5}':ok("1.5", "-9007199254740993"):no("2", ": must be at most 1.5 (maximum)", "9007199254740993", ": must be at most 1.5 (maximum)")
S '{"exclusiveMinimum":1}':ok("1.1"):no("1", ": must be more than 1 (exclusiveMinimum)")
S '{"exclusiveMaximum":1}':ok("0.9"):no("1", ": must be less than 1 (exclusiveMaximum)")
S '{"maximum":9223372036854775807}':ok("9223372036854775807", "5", "-9223372036854775808"):no(
    "9223372036854775808", ": must be at most 9223372036854775807 (maximum)", "1e20", ": must be at most 9223372036854775807 (maximum)")
S '{"minimum":-9223372036854775808}':ok("-9223372036854775808", "0"):no(
    "-9223372036854775809", ": must be at least -9223372036854775808 (minimum)", "-1e20", ": must be at least -9223372036854775808 (minimum)")
S '{"exclusiveMaximum":9223372036854775807}':ok("9223372036854775806"):no(
    "9223372036854775807", ": must be less than 9223372036854775807 (exclusiveMaximum)")
S '{"multipleOf":0.0001}':ok("0.0075", "0", "3"):no("0.00751", ": must be a multiple of 0.0001 (multipleOf)")
S '{"multipleOf":0.01}':ok("4.35", "1.1", "-0.07", "0.29"):no("4.355", ": must be a multiple of 0.01 (multipleOf)")
S '{"multipleOf":3}':ok("9", "-9", "9007199254740993", "3e300", "\"a\""):no("10", ": must be a multiple of 3 (multipleOf)",
    "9007199254740994", ": must be a multiple of 3 (multipleOf)", "3.5", ": must be a multiple of 3 (multipleOf)")
S '{"multipleOf":100}':ok("0", "200", "1e30"):no("20", ": must be a multiple of 100 (multipleOf)", "250", ": must be a multiple of 100 (multipleOf)")
S '{"multipleOf":0.123456789}':no("1e308", ": must be a multiple of 0.123456789 (multipleOf)")
S '{"multipleOf":1e-8}':ok("12391239123")
S '{"multipleOf":4}':ok("300", "1e2", "0.4e1"):no("30", ": must be a multiple of 4 (multipleOf)", "1e1", ": must be a multiple of 4 (multipleOf)")

-- Strings --------------------------------------------------------------------------------------------

S '{"minLength":2}':ok('"ab"', '"äöü"', "1"):no('"a"', ": must have at least 2 characters (minLength)", '"ä"', ": must have at least 2 characters (minLength)",
    '"😀"', ": must have at least 2 characters (minLength)")
S '{"maxLength":2}':ok('"ab"', '"äö"', '"😀😀"'):no('"abc"', ": must have at most 2 characters (maxLength)", '"äöü"', ": must have at most 2 characters (maxLength)")
S '{"pattern":"^a+$"}':ok('"aa"', "1"):no('"ab"', ': must match "^a+$" (pattern)')
S '{"pattern":"b"}':ok('"abc"')
do
    local given -- to the regular expressions, which do not know the long names
    local own = assert(loadfile("lua/policy/schema.lua"))({ json = json, is_array = is_array, is_bigint = is_bigint, values = values,
        regex = function(p) given = p end })
    for pattern, want in pairs { ["\\p{Letter}\\P{Decimal_Number}+"] = "\\p{L}\\P{Nd}+", ["\\p{Cased_Letter}"] = "\\p{L&}",
        ["\\\\p{Letter}"] = "\\\\p{Letter}", ["\\p{Greek}\\pL\\d{2}"] = "\\p{Greek}\\pL\\d{2}", ["\\p{L}"] = "\\p{L}", ["\\p{etter}"] = "\\p{etter}" } do
        own.compile({ pattern = pattern })
        report(given == want, "pattern " .. pattern, given)
    end
end
S '{"pattern":"limit"}':no('"a"', ": pattern match limit")
S '{"not":{"pattern":"limit"}}':no('"a"', ": pattern match limit")
S '{"anyOf":[{"pattern":"limit"},true]}':no('"a"', ": pattern match limit")
S '{"format":"email"}':ok('"no address"')

-- Arrays ---------------------------------------------------------------------------------------------

S '{"items":{"type":"string"}}':ok("[]", '["a"]', '{"a":1}'):no('["a",1]', "[1]: expected string, got number (type)")
S '{"items":false}':ok("[]"):no("[1]", "[0]: nothing is allowed here (false)")
S '{"prefixItems":[{"type":"string"},{"type":"number"}]}':ok('["a"]', '["a",1,null]', "[]"):no('["a","b"]', "[1]: expected number, got string (type)")
S '{"prefixItems":[true],"items":{"type":"number"}}':ok('["a",1,2]'):no('["a",1,"b"]', "[2]: expected number, got string (type)")
S '{"minItems":1,"maxItems":2}':ok("[1]", "[1,2]", '"a"'):no("[]", ": must have at least 1 items (minItems)", "[1,2,3]", ": must have at most 2 items (maxItems)")
S '{"uniqueItems":true}':ok("[1,2]", '[1,"1",true]', "[[1],[2]]", '[{"a":1},{"a":2}]', "[]", '["9007199254740993",9007199254740993]'):no(
    "[1,2,1.0]", ": items 0 and 2 are equal (uniqueItems)", '[{"a":1,"b":2},{"b":2,"a":1}]', ": items 0 and 1 are equal (uniqueItems)",
    "[null,1,null]", ": items 0 and 2 are equal (uniqueItems)", "[9007199254740993,9007199254740993]", ": items 0 and 1 are equal (uniqueItems)",
    "[1e20,100000000000000000000]", ": items 0 and 1 are equal (uniqueItems)")
S '{"uniqueItems":false}':ok("[1,1]")
S '{"contains":{"type":"number"}}':ok('["a",1]', '"a"'):no('["a"]', ": must contain at least 1 matching items, has 0 (contains)", "[]", ": must contain at least 1 matching items, has 0 (contains)")
S '{"contains":{"const":1},"minContains":2,"maxContains":3}':ok("[1,1]", "[1,2,1,1]"):no("[1]", ": must contain at least 2 matching items, has 1 (minContains)",
    "[1,1,1,1]", ": must contain at most 3 matching items, has 4 (maxContains)")
S '{"contains":{"const":1},"minContains":0}':ok("[]", "[2]")

-- Objects --------------------------------------------------------------------------------------------

S '{"type":"object","properties":{"message":{"type":"string"}},"required":["message"]}':ok('{"message":"x"}', '{"message":"x","n":1}'):no(
    "{}", ': missing "message" (required)', '{"message":1}', ".message: expected string, got number (type)",
    '{"message":null}', ".message: expected string, got null (type)", "[]", ": expected object, got array (type)",
    '["message"]', ": expected object, got array (type)", '"message"', ": expected object, got string (type)")
S '{"properties":{"a":{"type":"string"}}}':ok("{}", "[1]", "3", '{"b":1}'):no('{"a":1}', ".a: expected string, got number (type)")
S '{"required":["a","b"]}':ok('{"a":1,"b":null}', "[]", "1"):no('{"a":1}', ': missing "b" (required)')
S '{"required":[]}':ok("{}")
S '{"type":"object","properties":{"items":{"type":"array","items":{"type":"object","properties":{"name":{"type":"string"}}}}}}':no(
    '{"items":[{},{},{},{"name":5}]}', ".items[3].name: expected string, got number (type)")
S '{"properties":{"a b":{"properties":{"x-y":{"type":"null"}}}}}':no('{"a b":{"x-y":1}}', '["a b"]["x-y"]: expected null, got number (type)')
S '{"additionalProperties":false,"properties":{"a":true},"patternProperties":{"^x":true}}':ok('{"a":1,"xy":2}', "[]"):no(
    '{"c":1,"b":2}', ': unknown property "b" (additionalProperties)')
S '{"additionalProperties":{"type":"number"}}':ok('{"a":1}'):no('{"a":"b"}', ".a: expected number, got string (type)")
S '{"patternProperties":{"^n":{"type":"number"}}}':ok('{"n":1,"m":"x"}'):no('{"n1":"x"}', ".n1: expected number, got string (type)")
S '{"propertyNames":{"maxLength":2}}':ok('{"ab":1}', "[1]"):no('{"abc":1}', ': property name "abc": must have at most 2 characters (maxLength) (propertyNames)')
S '{"minProperties":1,"maxProperties":2}':ok('{"a":1}', "[]", "1"):no("{}", ": must have at least 1 properties (minProperties)",
    '{"a":1,"b":2,"c":3}', ": must have at most 2 properties (maxProperties)")
S '{"dependentRequired":{"card":["address","zip"]}}':ok("{}", '{"address":1}', '{"card":1,"address":2,"zip":3}', "[]"):no(
    '{"card":1,"address":2}', ': missing "zip", which "card" needs (dependentRequired)')
S '{"dependentSchemas":{"a":{"properties":{"b":{"type":"number"}}}}}':ok('{"b":"x"}', '{"a":1,"b":2}'):no(
    '{"a":1,"b":"x"}', ".b: expected number, got string (type)")

-- Combinations ---------------------------------------------------------------------------------------

S '{"allOf":[{"minimum":1},{"maximum":5}]}':ok("3"):no("9", ": must be at most 5 (maximum)")
S '{"anyOf":[{"type":"string"},{"type":"null"}]}':ok('"a"', "null"):no("1", ": matches none of 2 alternatives (anyOf), nearest: expected string, got number (type)")
S '{"anyOf":[{"type":"string"},{"type":"object","properties":{"a":{"type":"null"}}}]}':no('{"a":1}',
    ": matches none of 2 alternatives (anyOf), nearest: .a: expected null, got number (type)")
S '{"oneOf":[{"minimum":5},{"multipleOf":2}]}':ok("7", "2"):no("6", ": matches alternatives 1 and 2, must match one (oneOf)",
    "3", ": matches none of 2 alternatives (oneOf), nearest: must be at least 5 (minimum)")
S '{"not":{"type":"string"}}':ok("1"):no('"a"', ": must not match (not)")
S '{"if":{"type":"string"},"then":{"minLength":2},"else":{"minimum":3}}':ok('"ab"', "3"):no('"a"', ": must have at least 2 characters (minLength)",
    "2", ": must be at least 3 (minimum)")
S '{"if":{"type":"string"},"then":false}':ok("1"):no('"a"', ": nothing is allowed here (false)")
S '{"then":false,"else":false}':ok("1")
S '{"type":"string","minLength":2,"pattern":"^a","enum":["ab"]}':no('"b"', ': must be one of "ab" (enum)')

-- unevaluated* ---------------------------------------------------------------------------------------

S '{"properties":{"a":true},"unevaluatedProperties":false}':ok('{"a":1}', "{}", "[1]", "1"):no(
    '{"a":1,"c":1,"b":1}', ': unknown property "b" (unevaluatedProperties)')
S '{"allOf":[{"properties":{"a":true}},{"patternProperties":{"^x":true}}],"unevaluatedProperties":{"type":"number"}}':ok(
    '{"a":"s","xy":"s","n":1}'):no('{"a":1,"b":"s"}', ".b: expected number, got string (type)")
S '{"$ref":"#/$defs/a","unevaluatedProperties":false,"$defs":{"a":{"properties":{"a":true},"required":["a"]}}}':ok('{"a":1}'):no(
    '{"a":1,"b":2}', ': unknown property "b" (unevaluatedProperties)')
S '{"anyOf":[{"properties":{"a":{"const":1}},"required":["a"]},{"properties":{"b":true},"required":["b"]}],"unevaluatedProperties":false}':ok(
    '{"a":1}', '{"b":1}', '{"a":1,"b":1}'):no('{"a":2,"b":1}', ': unknown property "a" (unevaluatedProperties)')
S '{"oneOf":[{"properties":{"a":true},"required":["a"]},{"properties":{"b":true},"required":["b"]}],"unevaluatedProperties":false}':ok(
    '{"a":1}'):no('{"a":1,"b":1}', ": matches alternatives 1 and 2, must match one (oneOf)", '{"a":1,"c":1}', ': unknown property "c" (unevaluatedProperties)')
S '{"not":{"not":{"properties":{"a":true}}},"unevaluatedProperties":false}':no('{"a":1}', ': unknown property "a" (unevaluatedProperties)')
S '{"if":{"properties":{"k":{"const":1}},"required":["k"]},"then":{"properties":{"a":true}},"else":{"properties":{"b":true}},"unevaluatedProperties":false}':ok(
    '{"k":1,"a":1}', '{"b":1}'):no('{"k":1,"b":1}', ': unknown property "b" (unevaluatedProperties)',
    '{"k":2,"b":1}', ': unknown property "k" (unevaluatedProperties)')
S '{"if":{"required":["k"],"properties":{"k":true}},"unevaluatedProperties":false}':ok('{"k":1}'):no('{"a":1}', ': unknown property "a" (unevaluatedProperties)')
S '{"dependentSchemas":{"a":{"properties":{"a":true,"b":true}}},"unevaluatedProperties":false}':ok('{"a":1,"b":1}'):no(
    '{"b":1}', ': unknown property "b" (unevaluatedProperties)')
S '{"additionalProperties":true,"unevaluatedProperties":false}':ok('{"a":1}')
S '{"allOf":[{"additionalProperties":{"type":"number"}}],"unevaluatedProperties":false}':ok('{"a":1}')
S '{"allOf":[{"properties":{"a":true},"unevaluatedProperties":true}],"unevaluatedProperties":false}':ok('{"a":1,"b":1}')
S '{"properties":{"a":true},"allOf":[{"unevaluatedProperties":false}]}':no('{"a":1}', ': unknown property "a" (unevaluatedProperties)')
S '{"properties":{"a":{"properties":{"b":true}}},"unevaluatedProperties":false}':ok('{"a":{"b":1,"c":1}}'):no(
    '{"a":1,"b":1}', ': unknown property "b" (unevaluatedProperties)')
S '{"type":"object","properties":{"next":{"$ref":"#"}},"unevaluatedProperties":false}':ok('{"next":{"next":{}}}'):no(
    '{"next":{"next":{"a":1}}}', '.next.next: unknown property "a" (unevaluatedProperties)')
S '{"properties":{"a":true,"kid":{"$ref":"#","unevaluatedProperties":false}}}':ok('{"kid":{"a":1,"kid":{}},"b":1}'):no(
    '{"kid":{"b":1}}', '.kid: unknown property "b" (unevaluatedProperties)')
S '{"prefixItems":[true],"unevaluatedItems":false}':ok("[1]", "[]", "{}"):no("[1,2]", "[1]: nothing is allowed here (false)")
S '{"allOf":[{"prefixItems":[true]},{"prefixItems":[true,true]}],"unevaluatedItems":{"type":"number"}}':ok('["a","b",1]'):no(
    '["a","b","c"]', "[2]: expected number, got string (type)")
S '{"contains":{"type":"string"},"unevaluatedItems":{"type":"number"}}':ok('["a",1,"b"]'):no('["a",null]', "[1]: expected number, got null (type)")
S '{"anyOf":[{"items":true},false],"unevaluatedItems":false}':ok("[1,2]")
S '{"unevaluatedItems":false,"unevaluatedProperties":false}':ok("[]", "{}", "1"):no("[1]", "[0]: nothing is allowed here (false)")

-- References -----------------------------------------------------------------------------------------

S '{"$ref":"#/$defs/a","$defs":{"a":{"type":"string"}}}':ok('"a"'):no("1", ": expected string, got number (type)")
S '{"$ref":"#/$defs/a","maximum":3,"$defs":{"a":{"minimum":1}}}':ok("2"):no("0", ": must be at least 1 (minimum)", "4", ": must be at most 3 (maximum)")
S '{"$ref":"#/$defs/a~1b%25c~0d","$defs":{"a/b%c~d":{"type":"null"}}}':ok("null"):no("1", ": expected null, got number (type)")
S '{"$ref":"#/prefixItems/1","prefixItems":[true,{"type":"array"}]}':ok("[]"):no("{}", ": expected array, got object (type)")
S '{"$ref":"#name","$defs":{"a":{"$anchor":"name","type":"string"}}}':ok('"a"'):no("1", ": expected string, got number (type)")
S '{"$ref":"#name","not":{"$anchor":"name","type":"string"}}':no("1", ": expected string, got number (type)", '"a"', ": must not match (not)")
S '{"$ref":"#/$defs/no","$defs":{"no":false}}':no("1", ": nothing is allowed here (false)")
S '{"$id":"http://h/base/s","$ref":"other#x","$defs":{"o":{"$id":"other","$defs":{"y":{"$anchor":"x","type":"string"}}}}}':ok('"a"'):no(
    "1", ": expected string, got number (type)")
S '{"$id":"http://h/base/s","$ref":"./a/../other","$defs":{"o":{"$id":"/base/other","$ref":"#/$defs/t","$defs":{"t":{"type":"string"}}}}}':ok('"a"'):no(
    "1", ": expected string, got number (type)")
S '{"type":"object","properties":{"next":{"$ref":"#"},"v":{"type":"number"}}}':ok('{"next":{"next":{"v":1}}}'):no(
    '{"next":{"next":{"v":"x"}}}', ".next.next.v: expected number, got string (type)")
S '{"$ref":"#"}':no("1", ": recursion deeper than 256")
S '{"not":{"$ref":"#"}}':no("1", ": recursion deeper than 256")
S '{"allOf":[{"$ref":"#"},{"$ref":"#"}]}':no("1", ": recursion deeper than 256")
S '{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}},"anyOf":[{"$ref":"#/$defs/a"},true]}':no("1", ": recursion deeper than 256")

-- $dynamicRef: what the outermost resource with the anchor says

local LIST = '"list":{"$id":"list","items":{"$dynamicRef":"#item"},"$defs":{"d":{"$dynamicAnchor":"item"}}}'
S('{"$ref":"list","$defs":{"s":{"$dynamicAnchor":"item","type":"string"},' .. LIST .. "}}"):ok('["a"]'):no(
    "[1]", "[0]: expected string, got number (type)")
S('{"$ref":"list","$defs":{"s":{"$anchor":"item","type":"string"},' .. LIST .. "}}"):ok("[1]")
-- A resource that adds a name does not change those that the ones outside it gave.
S '{"$ref":"in","$defs":{"s":{"$dynamicAnchor":"a","type":"string"},"i":{"$id":"in","items":{"$dynamicRef":"#a"},"contains":{"$dynamicRef":"#b"},"$defs":{"a":{"$dynamicAnchor":"a"},"b":{"$dynamicAnchor":"b"}}}}}':ok(
    '["a"]'):no("[1]", "[0]: expected string, got number (type)")
-- The same list means another thing on each way to it.
S('{"properties":{"n":{"$ref":"numbers"},"s":{"$ref":"strings"},"l":{"$ref":"list"}},"$defs":{' .. LIST
    .. ',"n":{"$id":"numbers","$ref":"list","$defs":{"i":{"$dynamicAnchor":"item","type":"number"}}}'
    .. ',"s":{"$id":"strings","$ref":"list","$defs":{"i":{"$dynamicAnchor":"item","type":"string"}}}}}'):ok(
    '{"n":[1],"s":["a"],"l":[1,"a"]}'):no('{"n":["a"]}', ".n[0]: expected number, got string (type)", '{"s":[1]}', ".s[0]: expected string, got number (type)")
S '{"$id":"http://h/strict","$ref":"tree","$dynamicAnchor":"node","unevaluatedProperties":false,"$defs":{"t":{"$id":"tree","$dynamicAnchor":"node","properties":{"kids":{"items":{"$dynamicRef":"#node"}}}}}}':ok(
    '{"kids":[{"kids":[]}]}'):no('{"kids":[{"kid":[]}]}', '.kids[0]: unknown property "kid" (unevaluatedProperties)')
S '{"$dynamicRef":"#/$defs/a","$defs":{"a":{"type":"string"}}}':no("1", ": expected string, got number (type)")
S '{"$dynamicRef":"#"}':no("1", ": recursion deeper than 256")
do
    local list = {}
    for i = 1, 80 do
        list[i] = ('"r%d":{"$id":"r%d","$dynamicAnchor":"a%d","$ref":"r%d"}'):format(i, i, i, i % 80 + 1)
    end
    local check, message = schema.compile(json.decode(
        '{"$ref":"r1","allOf":[{"$dynamicRef":"#a"}],"$defs":{"a":{"$dynamicAnchor":"a"},' .. table.concat(list, ",") .. "}}"))
    report(not check and message:find(": more than 64 dynamic scopes", 1, true), "dynamic scopes are bounded", message)
end

-- The dialect's own schema, and a dialect of the document's own --------------------------------------

local META = "https://json-schema.org/draft/2020-12/"
S('{"$ref":"' .. META .. 'schema"}'):ok('{"type":"string","items":{"not":true}}', "true", '{"$id":"a"}', '{"x":1}'):no(
    '{"minLength":-1}', ".minLength: must be at least 0 (minimum)",
    '{"properties":{"a":{"items":{"required":"a"}}}}', ".properties.a.items.required: expected array, got string (type)",
    '{"$id":"a#b"}', '["$id"]: must match "^[^#]*#?$" (pattern)', "1", ": expected object or boolean, got number (type)")
S('{"$ref":"' .. META .. 'meta/validation#/$defs/stringArray"}'):ok('["a"]'):no('["a","a"]', ": items 0 and 1 are equal (uniqueItems)")
bad('{"$ref":"' .. META .. 'meta/none"}', "#/$ref: '" .. META .. "meta/none' is not in this schema; remote references are never fetched")
S('{"$schema":"http://h/own","properties":{"a":{"minimum":1},"b":false},"required":["c"],"$defs":{"m":{"$id":"http://h/own","$vocabulary":{"'
    .. META .. 'vocab/core":true,"' .. META .. 'vocab/applicator":true,"http://h/vocab/x":false}}}}'):ok('{"a":0}'):no(
    '{"b":1}', ".b: nothing is allowed here (false)")

-- Dialects -------------------------------------------------------------------------------------------

S '{"$schema":"https://json-schema.org/draft/2020-12/schema","type":"string"}':ok('"a"')
local D7 = '{"$schema":"http://json-schema.org/draft-07/schema#",'
S(D7 .. '"items":[{"type":"string"}],"additionalItems":false}'):ok('["a"]', "[]"):no("[1]", "[0]: expected string, got number (type)",
    '["a",1]', "[1]: nothing is allowed here (false)")
S(D7 .. '"dependencies":{"a":["b"],"c":{"required":["d"]}}}'):ok("{}", '{"a":1,"b":2}'):no('{"a":1}', ': missing "b", which "a" needs (dependentRequired)',
    '{"c":1}', ': missing "d" (required)')
S(D7 .. '"properties":{"a":{"$ref":"#/definitions/n","maximum":1}},"definitions":{"n":{"type":"number"}}}'):ok('{"a":5}'):no(
    '{"a":"x"}', ".a: expected number, got string (type)")
S(D7 .. '"$ref":"#n","definitions":{"n":{"$id":"#n","type":"number"}}}'):ok("1"):no('"a"', ": expected number, got string (type)")

-- Lua authors ----------------------------------------------------------------------------------------

S({ type = "object", properties = { a = { enum = { "x", "y" } } }, required = { "a" } }):ok('{"a":"x"}'):no('{"a":"z"}', '.a: must be one of "x", "y" (enum)')
S({ type = { "string", "null" }, title = "t", default = "d", ["x-own"] = 1, ["$comment"] = "c" }):ok("null")
S({ type = "object", properties = {}, required = {} }):ok("{}"):no("[]", ": expected object, got array (type)")
S({ const = { 1, 2 } }):ok("[1,2]"):no("[1]", ": must be [1,2] (const)")
do
    local tree = { type = "object", properties = { name = { type = "string" } } }
    tree.properties.child = tree
    local check = schema.compile(tree)
    report(check({ child = { child = { name = "x" } } }) == true, "a schema that contains itself takes a tree")
    local good, message = check({ child = { child = { name = 1 } } })
    report(not good and message == "arguments.child.child.name: expected string, got number (type)", "and says where it fails", message)
    local loop = {}
    loop.child = loop
    good, message = check(loop)
    report(not good and message == "arguments: recursion deeper than 256", "a value that contains itself ends", message)
    good, message = schema.compile({ type = "string" }, { root = "result" })(5)
    report(message == "result: expected string, got number (type)", "opts.root names the value", message)
    good, message = schema.compile({ items = { type = "string" } })({ "a", 2 })
    report(message == "arguments[1]: expected string, got number (type)", "a plain Lua sequence is an array", message)
    good, message = schema.compile({ const = "x" })(("ä"):rep(100))
    report(message == 'arguments: must be "x" (const)', "messages do not grow with the value", message)
    good, message = schema.compile({ additionalProperties = false })({ [("ä"):rep(100)] = 1 })
    report(message == 'arguments: unknown property "' .. ("ä"):rep(39) .. "… (additionalProperties)", "nor with a name", message)
end

-- Refused schemas ------------------------------------------------------------------------------------

bad("1", "#: expected a schema (an object, true or false), got number")
bad("[]", "#: expected a schema (an object, true or false), got array")
bad('{"properties":{"a":"string"}}', "#/properties/a: expected a schema (an object, true or false), got string")
bad('{"properties":{"a":{"typ":"string"}}}', "#/properties/a/typ: unknown keyword")
bad('{"zzz":1,"aaa":2}', "#/aaa: unknown keyword")
bad('{"a/b~c":1}', "#/a~1b~0c: unknown keyword")
bad('{"definitions":{}}', "#/definitions: unknown keyword; use $defs")
bad('{"dependencies":{}}', "#/dependencies: unknown keyword; use dependentRequired or dependentSchemas")
bad('{"additionalItems":false}', "#/additionalItems: unknown keyword; use prefixItems and items")
bad('{"id":"x"}', "#/id: unknown keyword; use $id")
bad('{"unevaluatedProperties":{"foo":1}}', "#/unevaluatedProperties/foo: unknown keyword")
bad('{"unevaluatedItems":1}', "#/unevaluatedItems: expected a schema (an object, true or false), got number")
bad('{"$dynamicRef":"#a"}', "#/$dynamicRef: no $anchor 'a' in this schema")
bad('{"$dynamicRef":"http://h/s#a"}', "#/$dynamicRef: 'http://h/s#a' is not in this schema; remote references are never fetched")
bad('{"$dynamicAnchor":5}', "#/$dynamicAnchor: expected a string")
bad('{"$schema":"http://h/own","$defs":{"m":{"$id":"http://h/own","$vocabulary":{"http://h/vocab/x":true}}}}',
    "#/$schema: unknown vocabulary http://h/vocab/x")
bad('{"$schema":"http://json-schema.org/draft-04/schema#"}', "#/$schema: expected https://json-schema.org/draft/2020-12/schema or http://json-schema.org/draft-07/schema#")
bad('{"$defs":{"a":{"$schema":"http://json-schema.org/draft-07/schema"}}}', "#/$defs/a/$schema: expected the dialect of the whole document")
bad('{"$ref":"http://example.com/s"}', "#/$ref: 'http://example.com/s' is not in this schema; remote references are never fetched")
bad('{"$ref":"other.json#/a"}', "#/$ref: 'other.json#/a' is not in this schema; remote references are never fetched")
bad('{"$ref":"#/$defs/missing"}', "#/$ref: '#/$defs/missing' leads to no schema")
bad('{"$ref":"#/title/x","title":"t"}', "#/$ref: '#/title/x' leads to no schema")
bad('{"$ref":"#gone"}', "#/$ref: no $anchor 'gone' in this schema")
bad('{"$ref":"#x","enum":[{"$anchor":"x"}]}', "#/$ref: no $anchor 'x' in this schema")
bad('{"$ref":5}', "#/$ref: expected a string")
bad('{"type":"str"}', "#/type: expected string, number, integer, boolean, null, array or object, got 'str'")
bad('{"type":[]}', "#/type: expected the name of a type or a list of them")
bad('{"type":5}', "#/type: expected the name of a type or a list of them")
bad('{"enum":"a"}', "#/enum: expected a list")
bad('{"minimum":"1"}', "#/minimum: expected a number")
bad({ minimum = 0 / 0 }, "#/minimum: expected a number")
bad({ maximum = 1 / 0 }, "#/maximum: expected a number")
bad('{"multipleOf":0}', "#/multipleOf: expected a number above 0")
bad('{"multipleOf":-2}', "#/multipleOf: expected a number above 0")
bad('{"multipleOf":1.23456789012345678}', "#/multipleOf: expected at most 14 significant digits")
bad('{"minLength":-1}', "#/minLength: expected an integer of at least 0")
bad('{"maxItems":1.5}', "#/maxItems: expected an integer of at least 0")
bad('{"contains":true,"minContains":"1"}', "#/contains: expected an integer of at least 0")
bad('{"pattern":"("}', "#/pattern: bad pattern: missing closing parenthesis at offset 1")
bad('{"pattern":5}', "#/pattern: expected a string")
bad('{"patternProperties":{"(":true}}', "#/patternProperties/(: bad pattern: missing closing parenthesis at offset 1")
bad('{"items":[{}]}', "#/items: a list of schemas is draft-07; use prefixItems")
bad('{"prefixItems":[]}', "#/prefixItems: expected a list of schemas, at least one")
bad('{"allOf":{}}', "#/allOf: expected a list of schemas, at least one")
bad('{"anyOf":[{"x":1}]}', "#/anyOf/0/x: unknown keyword")
bad('{"properties":[]}', "#/properties: expected an object of schemas")
bad('{"required":"a"}', "#/required: expected a list of names")
bad('{"required":[1]}', "#/required: expected a list of names")
bad('{"properties":{},"required":"a"}', "#/required: expected a list of names")
bad('{"uniqueItems":1}', "#/uniqueItems: expected true or false")
bad('{"dependentRequired":{"a":"b"}}', "#/dependentRequired/a: expected a list of names")
bad('{"type":"string","properties":{"a":{"foo":1}}}', "#/properties/a/foo: unknown keyword")
bad('{"$defs":{"unused":{"foo":1}}}', "#/$defs/unused/foo: unknown keyword")
bad('{"then":{"foo":1}}', "#/then/foo: unknown keyword")

do
    local check, unknown = schema.compile(json.decode(
        '{"foo":1,"type":"object","properties":{"a":{"bar":2,"type":"string"}},"unevaluatedProperties":{"baz":3},"x-y":1}'), { unknown = "collect" })
    report(check and table.concat(unknown, " ") == "#/foo #/properties/a/bar #/unevaluatedProperties/baz", "collect names unknown keywords",
        check and table.concat(unknown, " ") or unknown)
    local good, message = check({ a = 1 })
    report(not good and message == "arguments.a: expected string, got number (type)", "and checks the known ones", message)
    check, unknown = schema.compile({ type = "string" }, { unknown = "collect" })
    report(check and #unknown == 0, "collect with nothing unknown is an empty list")
    check, unknown = schema.compile({ type = "string" })
    report(check and unknown == nil, "without collect there is no list")
    check, message = schema.compile(json.decode('{"pattern":"("}'), { unknown = "collect" })
    report(not check and message == "#/pattern: bad pattern: missing closing parenthesis at offset 1", "collect does not hide errors", message)

    local deep = { type = "string" }
    for _ = 1, 300 do deep = { items = deep } end
    check, message = schema.compile(deep)
    report(not check and message:find("schemas and references nested deeper than 256", 1, true), "a schema nested too deeply is refused", message)
    deep = {}
    for i = 1, 2000 do deep["d" .. i] = { ["$ref"] = "#/$defs/d" .. i + 1 } end
    deep.d2001 = { type = "string" }
    check, message = schema.compile({ ["$ref"] = "#/$defs/d1", ["$defs"] = deep })
    report(not check and message:find("schemas and references nested deeper than 256", 1, true), "a chain of references, too", message)
    local wide = { properties = {}, items = { ["$ref"] = "#" } }
    for i = 1, 300 do wide.properties["p" .. i] = { type = "string" } end
    check, message = schema.compile(wide)
    report(check, "a wide schema is not a deep one", message)
    local rows = {}
    for i = 1, 300 do rows[i] = { p1 = "x" } end
    good, message = check(rows)
    report(good, "300 entries of a recursive schema are not a recursion of 300", message)
    local value, other = 1, 1
    for _ = 1, 300 do value, other = { value }, { other } end
    check = schema.compile({ const = value })
    report(not pcall(check, other), "values nested too deeply are not compared")
end

print("1.." .. count)
os.exit(failed == 0 and 0 or 1)
