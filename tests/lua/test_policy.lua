-- lua/policy/engine.lua: each row is rules and a call, and what becomes of it. Three ask the engine: a call (judge), `policy
-- explain` and the tests of a policy. Every row asks all three, so that none can say what another does not.
local t = require "tap"
local orch = require "orch"
local json, null = orch.json, orch.json.null
local dir = arg[0]:match("^(.*)/tests/lua/") or "."
local FILE = "policies/tools.lua"

-- Stand-ins for the host's functions -----------------------------------------------------------------

local function is_array(v) return getmetatable(v) == getmetatable(json.array {}) end
local function regex(pattern)
  if pattern:find("%($") then return nil, "missing )" end
  return function(text) return text:find(pattern) ~= nil end
end
local types = { json = json, regex = regex, is_array = is_array, is_bigint = function() return false end }
types.values = assert(loadfile(dir .. "/lua/policy/values.lua"))(types)
local schema = assert(loadfile(dir .. "/lua/policy/schema.lua"))(types)

local function nearest(word, list)
  for _, known in ipairs(list) do
    if known:sub(1, 2) == word:sub(1, 2) then return known end
  end
end

local function text_check(pattern, why)
  return function(text) if text:find(pattern) then return true end return nil, why end
end

-- Rule i is written at line i * 10, test i at line 500 + i, in network.lua all at line 3.
local lines = { ["web.allow[1]"] = 4 }
for i = 1, 60 do lines["rules[" .. i .. "]"], lines["tests[" .. i .. "]"] = i * 10, 500 + i end
local function at(i) return FILE .. ":" .. i * 10 end

local NETWORKS = { web = { allow = { { cidr = "198.51.100.0/24", ports = { 443 } } } }, mail = { allow = {} } }

local policy = assert(loadfile(dir .. "/lua/policy/engine.lua"))

-- An engine with what the row says of its surroundings; what it did to them is in `log`.
local function bare(row)
  local log = { rates = {}, sessions = {} }
  local engine = policy {
    json = json, regex = regex, schema = schema, nearest = nearest,
    cidr = text_check("/24$", "is never allowed"), ports = text_check("^%d+$", "is no port"), bandwidth = text_check("mbit$", "is no rate"),
    rate = function(key, limit, window)
      log.rates[#log.rates + 1] = ("%s %d/%d"):format(key, limit, window)
      return not (row.used_up and key:find(row.used_up, 1, true))
    end,
    session = function(id)
      local marks = {}
      for _, mark in ipairs(row.marks or {}) do marks[mark] = true end
      log.sessions[#log.sessions + 1] = { id = id, marks = marks }
      return log.sessions[#log.sessions], row.client or {}
    end,
  }
  return engine, log
end

local SCHEMA = { type = "object", properties = { message = { type = "string" }, n = { type = "integer" }, list = { type = "array" } },
  additionalProperties = false }

local function engine_of(row, tests)
  local engine, log = bare(row)
  t.eq(engine.load_network("policies/network.lua", NETWORKS, lines), {}, "errors of network.lua")
  t.eq(engine.load_tools(FILE, { rules = row.rules, tests = tests }, lines), {}, "errors of tools.lua")
  for _, name in ipairs { "echo", "echo_more", "up__read", "up__write", "up__more__read" } do
    t.ok(engine.add_tool(name, name:match("^(.-)__") or "local", row.schema or SCHEMA, row.says and json.encode(row.says)))
  end
  return engine, log
end

local function without_nulls(v)
  if type(v) ~= "table" then return v end
  local out = {}
  for k, x in pairs(v) do
    if x ~= null or type(k) == "number" then out[k] = without_nulls(x) end
  end
  return is_array(v) and json.array(out) or out
end

local function copy(v)
  if type(v) ~= "table" then return v end
  local out = {}
  for k, x in pairs(v) do out[k] = copy(x) end
  return is_array(v) and json.array(out) or out
end

-- The three ------------------------------------------------------------------------------------------

local WORDS = { "allow", "ask", "deny" }

-- Arguments as C hands them over: a second table where there are nulls.
local function judged(row)
  local engine, log = engine_of(row)
  local full = copy(row.args or {})
  local args = row.nulls and without_nulls(full) or full
  local less, verdict, reason, rules, effects, rewritten = engine.judge(row.tool or "echo", full, args, "s1", "me")
  if verdict == 0 then return { decision = "deny", reason = "bad arguments: " .. reason, by = {} }, log end
  effects = effects or {}
  local redact = {}
  for i, index in ipairs(effects.redact or {}) do redact[i] = engine.redact[index] end
  return { decision = WORDS[verdict], reason = reason, by = json.decode(rules), network = effects.network, redact = redact,
    marks = effects.marks or {}, args = rewritten, less = less }, log
end

local function column(list, key)
  local out = {}
  for i, x in ipairs(list) do out[i] = x[key] end
  return out
end

local function value(v) if v ~= null then return v end end

local function explained(row)
  local engine, log = engine_of(row)
  local args = copy(row.args or {})
  local x = engine.explain(row.tool or "echo", args, "s1", "me")
  t.eq(args, row.args or {}, "explain changed what it was given")
  json.encode(x) -- it can be
  return x, log
end

-- What `expect` and the rest of a test come to: the list of its failures.
local function tested(row, expected)
  local test = { call = { tool = row.tool or "echo", args = row.args or {}, caller = "me", marks = row.marks, session = row.session,
    untrusted = row.client and { client = row.client } } }
  for k, v in pairs(expected) do test[k] = v end
  local engine, log = engine_of(row, { test })
  local failures = engine.run_tests()
  t.eq(log.rates, {}, "a test takes nothing from a rate")
  for _, failure in ipairs(failures) do
    t.eq(failure:sub(1, #FILE + 14), FILE .. ":501: tests[1]", "where a failing test is")
  end
  return failures
end

local function wheres(by)
  local out = {}
  for i, rule in ipairs(by or {}) do out[i] = at(rule) end
  return out
end

local function agree(row)
  local want = { decision = row.decision, reason = row.reason, by = wheres(row.by), network = row.network, redact = row.redact or {},
    marks = row.sets or {}, args = row.rewritten }
  -- judge
  local got, log = judged(row)
  local taken, marks = log.rates, {}
  for _, session in ipairs(log.sessions) do
    for mark in pairs(session.marks) do marks[mark] = true end
  end
  for _, key in ipairs { "decision", "reason", "by" } do t.eq(got[key], want[key], "judge: " .. key) end
  if row.decision ~= "deny" then
    for _, key in ipairs { "redact", "marks", "args" } do t.eq(got[key], want[key], "judge: " .. key) end
    -- none is no effect, and neither is told; without any other effect a network of none is left out
    t.eq(got.network ~= "none" and got.network or nil, want.network ~= "none" and want.network or nil, "judge: network")
  end
  t.eq(taken, row.takes or {}, "what was taken from rates")
  for _, mark in ipairs(row.decision == "allow" and row.sets or {}) do t.ok(marks[mark], "the mark " .. mark .. " is set") end
  if row.decision ~= "allow" and #log.sessions > 0 then
    t.eq(marks, (function() local m = {} for _, v in ipairs(row.marks or {}) do m[v] = true end return m end)(), "marks of a call that is not allowed")
  end
  if row.less then t.eq(got.less, row.less, "arguments without the nulls that stand for absent members") end
  -- explain
  local x, quiet = explained(row)
  t.eq(quiet.rates, {}, "explain takes nothing from a rate")
  for _, session in ipairs(quiet.sessions) do
    for mark in pairs(session.marks) do t.ok((" " .. table.concat(row.marks or {}, " ") .. " "):find(" " .. mark .. " ", 1, true), "explain sets no mark") end
  end
  t.eq(x.decision, want.decision, "explain: decision")
  t.eq(value(x.reason), want.reason, "explain: reason")
  t.eq(x.by, want.by, "explain: rules")
  if row.decision ~= "deny" then
    t.eq(value(x.network) and x.network.name, want.network, "explain: network")
    t.eq(column(x.redact, "pattern"), want.redact, "explain: redact")
    t.eq(column(x.marks, "mark"), want.marks, "explain: marks")
    t.eq(value(x.args), want.args, "explain: rewritten arguments")
    t.eq(column(x.rates, "rate"), row.rates or {}, "explain: rates")
  end
  if row.said then
    local said = {}
    for i, r in ipairs(x.rules) do
      said[i] = r.where:match("%d+$") / 10 .. (value(r.error) and " error" or not r.seen and " unseen" or r.matched and " yes" or " no")
        .. (r.before == nil and "" or r.before and " was yes" or " was no")
    end
    t.eq(table.concat(said, ", "), row.said, "explain: what each rule said")
  end
  -- the tests of a policy
  local function holds(expected) t.eq(tested(row, expected), {}, "a test that expects what is") end
  local function fails(expected, what)
    t.eq(#tested(row, expected), 1, "failures of a test that expects another " .. what)
  end
  for _, word in ipairs(WORDS) do
    if row.bad_arguments or word ~= row.decision then fails({ expect = word }, "decision") end
  end
  if row.bad_arguments then return end
  local expect = row.decision
  holds { expect = expect, network = expect ~= "deny" and row.network or "none", reason = row.reason }
  fails({ expect = expect, network = row.network == "web" and "mail" or "web" }, "network")
  fails({ expect = expect, reason = "because" }, "reason")
  for _, i in ipairs(row.by or {}) do
    holds { expect = expect, rule = at(i) }
    holds { expect = expect, rule = "tools.lua:" .. i * 10 }
  end
  fails({ expect = expect, rule = "ools.lua:10" }, "rule")
  fails({ expect = expect, rule = "tools.lua:990" }, "rule")
  if row.decision ~= "deny" then
    holds { expect = expect, args = row.rewritten or row.args or {} }
    fails({ expect = expect, args = { message = "another" } }, "argument")
  end
end

-- Rows -----------------------------------------------------------------------------------------------

local function yes() return true end
local function no() return false end
local function rule(action, fields)
  local r = { tool = "echo", action = action }
  for k, v in pairs(fields or {}) do r[k] = v end
  return r
end
local function says(text) return function(call) return call.args.message == text end end
local function set(key, v) return function(args) args[key] = v return args end end
local X = { message = "x" }
local NOBODY, NO_RULE = "nobody to ask (%s)", "no rule allows it (" .. FILE .. ")"

local function rows(list)
  for _, row in ipairs(list) do t.test(row[1], function() agree(row) end) end
end

-- Deny beats ask beats allow, in every order.
for _, order in ipairs { { 1, 2, 3 }, { 1, 3, 2 }, { 2, 1, 3 }, { 2, 3, 1 }, { 3, 1, 2 }, { 3, 2, 1 } } do
  local all, two, at_deny, at_ask = {}, {}, nil, nil
  for i, n in ipairs(order) do
    all[i] = rule(WORDS[n])
    if n == 3 then at_deny = i else two[#two + 1] = rule(WORDS[n]) if n == 2 then at_ask = #two end end
  end
  local name = ("order %s %s %s: "):format(WORDS[order[1]], WORDS[order[2]], WORDS[order[3]])
  rows {
    { name .. "deny decides", rules = all, decision = "deny", by = { 1, 2, 3 }, reason = "a rule denies it (" .. at(at_deny) .. ")" },
    { name .. "without deny, ask decides", rules = two, decision = "ask", by = { 1, 2 }, reason = NOBODY:format(at(at_ask)) },
  }
end

rows {
  { "one allow", rules = { rule "allow" }, decision = "allow", by = { 1 }, said = "1 yes" },
  { "no rules", rules = {}, decision = "deny", reason = NO_RULE },
  { "rules for other tools alone", rules = { rule("allow", { tool = "other" }) }, decision = "deny", reason = NO_RULE, said = "" },
  { "the first of two that deny gives its reason", rules = { rule("deny", { reason = "one" }), rule("deny", { reason = "two" }) },
    decision = "deny", by = { 1, 2 }, reason = "one (" .. at(1) .. ")" },
  { "an ask with a reason", rules = { rule("ask", { reason = "leaves" }) }, decision = "ask", by = { 1 }, reason = "nobody to ask: leaves (" .. at(1) .. ")" },
  { "a tool that is denied gets no effects of rules that allow it", rules = { rule("deny", { reason = "no" }), rule("allow", { network = "web", rate = "1/s", mark = "m" }),
    rule("allow", { network = "mail", rewrite = function() error "not to be run" end }) }, decision = "deny", by = { 1, 2, 3 }, reason = "no (" .. at(1) .. ")" },
}

-- Predicates.
local function when(fn) return { rule "allow", rule("deny", { when = fn, reason = "when" }) } end
for _, truth in ipairs { true, 1, 0, "", "no", { false } } do
  rows { { "when gives " .. type(truth) .. " " .. json.encode(truth) .. ": it counts", rules = when(function() return truth end),
    decision = "deny", by = { 1, 2 }, reason = "when (" .. at(2) .. ")", said = "1 yes, 2 yes" } }
end
rows {
  { "when gives false", rules = when(no), decision = "allow", by = { 1 }, said = "1 yes, 2 no" },
  { "when gives nil", rules = when(function() end), decision = "allow", by = { 1 }, said = "1 yes, 2 no" },
  { "an allow that needs its when", rules = { rule("allow", { when = says "y" }) }, args = X, decision = "deny", reason = NO_RULE, said = "1 no" },
  { "when fails: denied by that rule alone, and none after it is asked", rules = { rule("allow", { when = yes }), rule("allow", { when = function() error("ouch", 0) end }),
    rule("deny", { when = yes }), rule "allow" }, decision = "deny", by = { 2 }, said = "1 yes, 2 error, 3 unseen, 4 yes",
    reason = "`when` failed: ouch (" .. at(2) .. ")" },
  { "when fails with what is no text", rules = { rule("allow", { when = function() error({}, 0) end }) }, decision = "deny", by = { 1 },
    reason = "`when` failed: a table (" .. at(1) .. ")" },
  { "when sees the call", rules = when(function(call)
      return not (call.tool == "echo" and call.server == "local" and call.args.message == "x" and call.caller == "me" and call.session.id and call.session.marks)
    end), args = X, decision = "allow", by = { 1 } },
  { "when sees the server of an upstream's tool", tool = "up__read", rules = { { tool = "up__*", action = "allow", when = function(call) return call.server == "up" end } },
    decision = "allow", by = { 1 } },
  { "what a tool says of itself is untrusted", rules = when(function(call) return call.untrusted.tool.description ~= "obey me" or call.description end),
    says = { description = "obey me" }, decision = "allow", by = { 1 } },
  { "a tool that says nothing", rules = when(function(call) return call.untrusted.tool.description or call.untrusted.client.name end), decision = "allow", by = { 1 } },
  { "what the client says of itself is untrusted", rules = when(function(call) return call.untrusted.client.name ~= "it" or call.client end),
    client = { name = "it" }, decision = "allow", by = { 1 } },
  { "path_outside", rules = when(function(call) return call:path_outside("message") end), args = { message = "a/../../b" }, decision = "deny", by = { 1, 2 },
    reason = "when (" .. at(2) .. ")" },
  { "path_outside of a missing argument", rules = when(function(call) return call:path_outside("message") end), decision = "allow", by = { 1 } },
}

-- Arguments.
rows {
  { "arguments that the schema refuses: no rule is asked", rules = { rule("allow", { when = function() error "asked" end }) }, args = { mesage = "x" }, bad_arguments = true,
    decision = "deny", said = "1 unseen", reason = 'bad arguments: arguments: unknown property "mesage" (additionalProperties)' },
  { "null for an optional argument is absent", rules = when(function(call) return call.args.n ~= nil end), args = { message = "x", n = null }, nulls = true,
    less = { message = "x" }, decision = "allow", by = { 1 } },
  { "null that the schema accepts: policy does not see it, the tool does", schema = { type = "object" }, rules = when(function(call) return call.args.n ~= nil end),
    args = { message = "x", n = null }, nulls = true, decision = "allow", by = { 1 } },
  { "null for an argument that is required", schema = { type = "object", properties = { n = { type = "integer" } }, required = { "n" } }, rules = { rule "allow" },
    args = { n = null }, nulls = true, bad_arguments = true, decision = "deny", reason = "bad arguments: arguments.n: expected integer, got null (type)" },
  { "null in an array stays", rules = when(function(call) return call.args.list[1] ~= null or #call.args.list ~= 1 end), args = { list = json.array { null } },
    decision = "allow", by = { 1 } },
  { "an empty array stays one", rules = when(function(call) return not is_array(call.args.list) end), args = { list = json.array {} }, decision = "allow", by = { 1 } },
}

-- Marks and rates.
rows {
  { "a mark of the session", rules = { rule "allow", rule("ask", { when = function(call) return call.session.marks.untrusted end }) }, marks = { "untrusted" },
    decision = "ask", by = { 1, 2 }, reason = NOBODY:format(at(2)) },
  { "no such mark", rules = { rule "allow", rule("ask", { when = function(call) return call.session.marks.untrusted end }) }, marks = { "other" }, decision = "allow", by = { 1 } },
  { "a call that is allowed sets marks", rules = { rule("allow", { mark = "a" }), rule("allow", { mark = "b" }), rule("allow", { mark = "c", when = no }) },
    decision = "allow", by = { 1, 2 }, sets = { "a", "b" } },
  { "a call that waits for an answer does not", rules = { rule("ask", { mark = "a" }) }, decision = "ask", by = { 1 }, sets = { "a" }, reason = NOBODY:format(at(1)) },
  { "a call takes one from every rate of its rules", rules = { rule("allow", { rate = "2/min" }), rule("allow", { rate = "5/h", id = "five" }), rule("allow", { rate = "1/s", when = no }) },
    decision = "allow", by = { 1, 2 }, rates = { "2/min", "5/h" }, takes = { FILE .. "|echo|2/min|me 2/60000", "id:five|me 5/3600000" } },
  { "two rules that count as one take one", rules = { rule("allow", { rate = "2/day" }), rule("allow", { rate = "2/day" }) }, decision = "allow", by = { 1, 2 },
    rates = { "2/day" }, takes = { FILE .. "|echo|2/day|me 2/86400000" } },
  { "a call that is not allowed takes none", rules = { rule("ask", { rate = "2/min" }) }, decision = "ask", by = { 1 }, rates = { "2/min" }, reason = NOBODY:format(at(1)) },
}

t.test("a rate that is used up denies the call; explain and tests, which take none, say what would be without", function()
  local row = { rules = { rule("allow", { rate = "2/min", mark = "m" }) }, used_up = "2/min" }
  local got, log = judged(row)
  t.eq({ got.decision, got.reason, got.by }, { "deny", "rate limit 2/min is used up (" .. at(1) .. ")", { at(1) } })
  t.eq(#log.sessions, 0, "nothing is marked")
  t.eq(explained(row).decision, "allow")
  t.eq(tested(row, { expect = "allow" }), {})
end)

t.test("marks that a call sets are there for the next of its session, until it is forgotten", function()
  local engine = engine_of { rules = { rule("allow", { mark = "m" }), rule("deny", { tool = "echo_more", when = function(call) return call.session.marks.m end }),
    rule("allow", { tool = "echo_more" }) } }
  local function verdict(tool, session) return (select(2, engine.judge(tool, X, X, session, "me"))) end
  t.eq({ verdict("echo_more", "a"), verdict("echo", "a"), verdict("echo_more", "a"), verdict("echo_more", "b") }, { 1, 1, 3, 1 })
  engine.forget_session("a")
  t.eq(verdict("echo_more", "a"), 1)
end)

-- Rewrites.
rows {
  { "a rewrite", rules = { rule("allow", { rewrite = set("message", "y") }) }, args = X, decision = "allow", by = { 1 }, rewritten = { message = "y" } },
  { "rewrites in their order, each on the result before", rules = { rule("allow", { rewrite = function(a) a.message = a.message .. "1" return a end }),
    rule("allow", { rewrite = function(a) return { message = a.message .. "2", n = 3 } end }) }, args = X, decision = "allow", by = { 1, 2 }, rewritten = { message = "x12", n = 3 } },
  { "what was rewritten is judged again: denied", rules = { rule("allow", { rewrite = set("message", "bad") }), rule("deny", { when = says "bad", reason = "bad" }) },
    args = X, decision = "deny", by = { 1, 2 }, reason = "bad (" .. at(2) .. ")", said = "1 yes, 2 yes was no" },
  { "what was rewritten is judged again: effects are those of the second time", rules = { rule("allow", { rewrite = set("message", "y") }),
    rule("allow", { when = says "x", network = "web", mark = "first", redact = { "a" } }), rule("allow", { when = says "y", mark = "second", redact = { "b" } }) },
    args = X, decision = "allow", by = { 1, 3 }, rewritten = { message = "y" }, sets = { "second" }, redact = { "b" }, said = "1 yes, 2 no was yes, 3 yes was no" },
  { "a rewrite that matches only now is not run", rules = { rule("allow", { rewrite = set("message", "y") }), rule("allow", { when = says "y", rewrite = set("message", "z") }) },
    args = X, decision = "allow", by = { 1, 2 }, rewritten = { message = "y" } },
  { "a deny ends it: nothing is rewritten", rules = { rule("allow", { rewrite = function() error "run" end }), rule("deny", { when = says "x", reason = "x" }) }, args = X,
    decision = "deny", by = { 1, 2 }, reason = "x (" .. at(2) .. ")" },
  { "an ask is rewritten too", rules = { rule("ask", { rewrite = set("message", "y") }) }, args = X, decision = "ask", by = { 1 }, reason = NOBODY:format(at(1)), rewritten = { message = "y" } },
  { "a rewrite that the schema refuses", rules = { rule "allow", rule("allow", { rewrite = set("n", "no number") }) }, args = X, decision = "deny", by = { 1, 2 },
    reason = "the rewritten arguments are wrong: arguments.n: expected integer, got string (type) (" .. at(2) .. ")" },
  { "a rewrite that returns nothing", rules = { rule("allow", { rewrite = function() end }) }, args = X, decision = "deny", by = { 1 },
    reason = "rewrite must return the arguments, got nil (" .. at(1) .. ")" },
  { "a rewrite that fails", rules = { rule("allow", { rewrite = function() error("ouch", 0) end }) }, args = X, decision = "deny", by = { 1 },
    reason = "rewrite failed: ouch (" .. at(1) .. ")" },
  { "when fails on what was rewritten", rules = { rule("allow", { rewrite = function() return {} end }), rule("deny", { when = function(call)
      if not call.args.message then error("none", 0) end end }) }, args = X, decision = "deny", by = { 2 }, reason = "`when` failed: none (" .. at(2) .. ")",
    said = "1 yes, 2 error" },
}

t.test("what no JSON can be made of is denied by the call's side; explain and tests say so", function()
  local row = { rules = { rule("allow", { rewrite = set("list", json.array { print }) }) }, args = X }
  local x = explained(row)
  t.eq({ x.decision, x.args }, { "deny", null })
  t.ok(x.reason:find("^the rewritten arguments cannot be JSON: "), x.reason)
  t.eq(tested(row, { expect = "deny", reason = "cannot be JSON" }), {})
  t.eq(#tested(row, { expect = "allow" }), 1)
end)

-- Networks and redaction.
rows {
  { "a network", rules = { rule("allow", { network = "web" }) }, decision = "allow", by = { 1 }, network = "web" },
  { "the same network twice", rules = { rule("allow", { network = "web" }), rule("allow", { network = "web" }) }, decision = "allow", by = { 1, 2 }, network = "web" },
  { "one that names a network and one that names none", rules = { rule "allow", rule("allow", { network = "web" }) }, decision = "allow", by = { 1, 2 }, network = "web" },
  { "none by name", rules = { rule("allow", { network = "none" }) }, decision = "allow", by = { 1 }, network = "none" },
  { "two networks", rules = { rule("allow", { network = "web" }), rule "allow", rule("ask", { network = "mail" }) }, decision = "deny", by = { 1, 2, 3 },
    reason = ("ambiguous network: web (%s) and mail (%s)"):format(at(1), at(3)) },
  { "two networks, one of them none", rules = { rule("allow", { network = "none" }), rule("allow", { network = "web" }) }, decision = "deny", by = { 1, 2 },
    reason = ("ambiguous network: none (%s) and web (%s)"):format(at(1), at(2)) },
  { "two networks where one rule does not apply", rules = { rule("allow", { network = "web" }), rule("allow", { network = "mail", when = no }) }, decision = "allow", by = { 1 }, network = "web" },
  { "a network cannot be enforced on a server of the host", tool = "up__read", rules = { { tool = "up__*", action = "allow", network = "web" } }, decision = "deny", by = { 1 },
    reason = "network web cannot be enforced here: the server runs on the host (" .. at(1) .. ")" },
  { "nor can none", tool = "up__read", rules = { { tool = "*", action = "allow" }, { tool = "up__*", action = "ask", network = "none" } }, decision = "deny", by = { 1, 2 },
    reason = "network none cannot be enforced here: the server runs on the host (" .. at(2) .. ")" },
  { "a network that is named only before a rewrite need not be enforced", tool = "up__read", args = X, rules = { { tool = "up__*", action = "allow", rewrite = set("message", "y") },
    { tool = "up__*", action = "allow", network = "web", when = says "x" } }, decision = "allow", by = { 1 }, rewritten = { message = "y" } },
  { "one that is named only after a rewrite must be", tool = "up__read", args = X, rules = { { tool = "up__*", action = "allow", rewrite = set("message", "y") },
    { tool = "up__*", action = "allow", network = "web", when = says "y" } }, decision = "deny", by = { 1, 2 },
    reason = "network web cannot be enforced here: the server runs on the host (" .. at(2) .. ")" },
  { "redaction is the union", rules = { rule("allow", { redact = { "a", "b" } }), rule("allow", { redact = { "c" } }), rule("allow", { redact = { "d" }, when = no }) },
    decision = "allow", by = { 1, 2 }, redact = { "a", "b", "c" } },
}

t.test("explain names the rule of each effect", function()
  local x = explained { rules = { rule("allow", { network = "web" }), rule("allow", { redact = { "a" }, rate = "1/s" }), rule("allow", { mark = "m", rewrite = set("n", 1) }) } }
  t.eq({ x.network.where, x.redact[1].where, x.rates[1].where, x.marks[1].where, x.rewrites }, { at(1), at(2), at(2), at(3), { at(3) } })
end)

-- Names.
for _, case in ipairs {
  { "echo", "echo", true }, { "echo", "echo_more", false }, { "Echo", "echo", false }, { "ec*", "echo", true }, { "*o", "echo", true },
  { "*ch*", "echo", true }, { "e*h*o", "echo", true }, { "echo*", "echo", true }, { "echo*o", "echo", false }, { "e*ho*ho", "echo", false }, { "ech*cho", "echo", false }, { "ech.", "echo", false }, { "e?ho", "echo", false },
  { "*", "echo", true }, { "*", "up__read", true }, { "**", "echo", true }, { "**", "up__read", false }, { "up*", "up__read", false }, { "*read", "up__read", false },
  { "up__*", "up__read", true }, { "up__read", "up__read", true }, { "up__*", "echo", false }, { "*__read", "up__read", true }, { "*__read", "up__more__read", true },
  { "u*__*d", "up__read", true }, { "up__*__read", "up__read", false }, { "upx__*", "up__read", false },
} do
  local pattern, tool, matches = case[1], case[2], case[3]
  rows { { ("pattern %s %s %s"):format(pattern, matches and "matches" or "does not match", tool), tool = tool, rules = { { tool = pattern, action = "allow" } },
    decision = matches and "allow" or "deny", by = matches and { 1 } or {}, reason = not matches and NO_RULE or nil } }
end

t.test("a tool that is not there: only its name is judged, its server is in its name", function()
  local row = { tool = "far__off", args = { any = 1 }, rules = { { tool = "far__*", action = "allow", when = function(call) return call.server == "far" and call.args.any end } } }
  local x = explained(row)
  t.eq({ x.decision, x.known, x.by }, { "allow", false, { at(1) } })
  t.eq(tested(row, { expect = "allow" }), {})
  t.eq(#tested(row, { expect = "deny" }), 1)
  row.rules[1].network = "web"
  t.eq(explained(row).reason, "network web cannot be enforced here: the server runs on the host (" .. at(1) .. ")")
  t.eq(tested(row, { expect = "deny", reason = "cannot be enforced" }), {})
  t.eq({ explained({ rules = {} }).known, explained({ tool = "gone", rules = {} }).known }, { true, false })
end)

t.test("without arguments only the name is judged, and explain says what a call would need", function()
  local row = { schema = { type = "object", required = { "message" } }, rules = { rule("allow", { rewrite = set("n", 1) }), rule("deny", { when = says "x" }), rule("allow", { tool = "other" }) } }
  local x = explained(row)
  t.eq({ x.decision, x.reason, x.others }, { "deny", 'bad arguments: arguments: missing "message" (required)', 1 })
  t.eq({ x.by_name.decision, x.by_name.by }, { "allow", { at(1) } })
  local engine = engine_of(row, { { call = { tool = "echo" }, expect = "allow" }, { call = { tool = "echo", args = {} }, expect = "allow" } })
  t.eq(engine.run_tests(), { FILE .. ':502: tests[2]: echo: expected allow, got bad arguments: arguments: missing "message" (required)' })
end)

t.test("a server that changes a schema keeps no policy from being loaded: its tools' tests do not look at it", function()
  local row = { tool = "up__read", args = { path = "a" }, rules = { { tool = "up__*", action = "allow", rewrite = set("n", "x") } } }
  t.eq(explained(row).reason, 'bad arguments: arguments: unknown property "path" (additionalProperties)')
  t.eq(tested(row, { expect = "allow", args = { path = "a", n = "x" } }), {})
  t.eq(#tested(row, { expect = "deny" }), 1)
end)

t.test("more predicates than are kept apart: denied, and said", function()
  local many = {}
  for i = 1, 51 do many[i] = rule("allow", { when = yes }) end
  local row = { rules = many, decision = "deny", reason = "more than 50 rules with `when` match it (" .. FILE .. ")" }
  agree(row)
  table.remove(many)
  local by = {}
  for i = 1, 50 do by[i] = i end
  agree { rules = many, decision = "allow", by = by }
end)

t.test("each set of answers has an outcome of its own, however many there are", function()
  local rules = { rule "allow" }
  for i = 1, 10 do rules[i + 1] = rule("deny", { reason = "bit " .. i, when = function(call) return math.floor(call.args.n / 2 ^ (i - 1)) % 2 == 1 end }) end
  local engine = engine_of { rules = rules }
  for round = 1, 2 do
    for n = 0, 1023 do
      local _, verdict, reason, by = engine.judge("echo", { n = n }, { n = n }, "s", "me")
      local want, lowest = { at(1) }, nil
      for i = 1, 10 do
        if math.floor(n / 2 ^ (i - 1)) % 2 == 1 then
          want[#want + 1] = at(i + 1)
          lowest = lowest or i
        end
      end
      t.eq({ verdict, reason, by }, { lowest and 3 or 1, lowest and ("bit %d (%s)"):format(lowest, at(lowest + 1)) or nil, json.encode(json.array(want)) }, "round " .. round .. ", " .. n)
    end
  end
end)

t.test("the rule that runs is named, for the limit that may end it", function()
  local seen = {}
  local engine
  local function note(answer) return function(x) seen[#seen + 1] = tostring(engine.current) return answer or x end end
  local row = { rules = { rule("allow", { when = note() }), rule("allow", { rewrite = note() }), rule("allow", { when = note() }) }, args = X }
  engine = engine_of(row)
  engine.judge("echo", X, X, "s", "me")
  t.eq(seen, { at(1), at(3), at(2), at(1), at(3) })
  t.eq((select(2, engine.judge("echo", { bad = 1 }, { bad = 1 }, "s", "me"))), 0)
  t.eq(engine.current, nil, "bad arguments are no rule's fault")
  engine.current = "left over"
  engine.explain("echo", { bad = 1 }, "s", "me")
  t.eq(engine.current ~= "left over", true)
end)

t.test("listed: what an allow or ask may let pass and no deny without when denies", function()
  local function listed(...) return engine_of({ rules = { ... } }).listed("echo") end
  t.eq({ listed(), listed(rule "allow"), listed(rule("ask", { when = no })), listed(rule "allow", rule "deny"), listed(rule "allow", rule("deny", { when = yes })), listed(rule "deny") },
    { false, true, true, false, true, false })
end)

t.test("an own tool that takes the place of another is judged by its own schema", function()
  local engine = engine_of { rules = { rule "allow" } }
  t.ok(engine.add_tool("echo", "local", { type = "object", required = { "n" } }))
  t.eq((select(2, engine.judge("echo", X, X, "s", "me"))), 0)
  t.eq({ engine.judge("echo", { n = 1 }, { n = 1 }, "s", "me") }, { nil, 1, nil, json.encode(json.array { at(1) }) })
end)

-- What is wrong is said where it is written ------------------------------------------------------------

local function load_errors(value)
  local engine = bare {}
  engine.load_network("policies/network.lua", NETWORKS, lines)
  return engine.load_tools(FILE, value, lines)
end

for _, case in ipairs {
  { "no table", 7, FILE .. ": must return a table, got number" },
  { "no rules", {}, FILE .. ": rules must be a list, got nil" },
  { "an unknown key", { rules = {}, tess = {} }, FILE .. ": unknown key tess (did you mean tests?)" },
  { "rules with a name", { rules = { first = rule "allow" } }, FILE .. ": rules must be a plain list; it has the key first" },
  { "tests are no list", { rules = {}, tests = 1 }, FILE .. ": tests must be a list, got number" },
  { "tests with a name, which would never be run", { rules = {}, tests = { first = {} } }, FILE .. ": tests must be a plain list; it has the key first" },
  { "rules with a hole, after which none would count", { rules = { rule "allow", nil, rule "deny" } }, at(2) .. ": a rule must be a table, got nil" },
  { "a rule is no table", { rules = { rule "allow", "allow" } }, at(2) .. ": a rule must be a table, got string" },
  { "an unknown key of a rule", { rules = { rule("allow", { netork = "web" }) } }, at(1) .. ": unknown key netork (did you mean network?)" },
  { "no tool", { rules = { { action = "allow" } } }, at(1) .. ": tool must be a pattern (a string)" },
  { "no action", { rules = { { tool = "x" } } }, at(1) .. ': action must be "allow", "ask" or "deny", got nil' },
  { "another action", { rules = { rule "alow" } }, at(1) .. ': action must be "allow", "ask" or "deny", got alow' },
  { "a reason that is no text", { rules = { rule("deny", { reason = 1 }) } }, at(1) .. ": reason must be a string, got number" },
  { "when is no function", { rules = { rule("deny", { when = true }) } }, at(1) .. ": when must be a function, got boolean" },
  { "rewrite is no function", { rules = { rule("allow", { rewrite = "x" }) } }, at(1) .. ": rewrite must be a function, got string" },
  { "effects on a deny", { rules = { rule("deny", { mark = "m", rate = "1/s" }) } }, at(1) .. ": rate on a deny rule has no effect; remove it",
    at(1) .. ": mark on a deny rule has no effect; remove it" },
  { "no such network", { rules = { rule("allow", { network = "wb" }), rule("allow", { network = "wex" }) } }, at(1) .. ': no network policy "wb" in policies/network.lua',
    at(2) .. ': no network policy "wex" in policies/network.lua; did you mean web?' },
  { "a rate", { rules = { rule("allow", { rate = "0/min" }), rule("allow", { rate = "1/week" }), rule("allow", { rate = 5 }) } },
    at(1) .. ': rate must be like "30/min" (1 to 1000000 per s, min, h or day), got 0/min', at(2) .. ': rate must be like "30/min" (1 to 1000000 per s, min, h or day), got 1/week',
    at(3) .. ': rate must be like "30/min" (1 to 1000000 per s, min, h or day), got 5' },
  { "redact is no list", { rules = { rule("allow", { redact = "x" }) } }, at(1) .. ": redact must be a list, got string" },
  { "redact with names, of which nothing would be redacted", { rules = { rule("allow", { redact = { key = "sk" } }) } }, at(1) .. ": redact must be a plain list; it has the key key" },
  { "redact with what is no text", { rules = { rule("allow", { redact = { "ok", 5 } }) } }, at(1) .. ": redact[2]: must be a PCRE2 pattern (a string)" },
  { "redact is no pattern", { rules = { rule("allow", { redact = { "ok", "(" } }) } }, at(1) .. ": redact[2]: missing )" },
} do
  t.test("refused: " .. case[1], function() t.eq(load_errors(case[2]), { unpack(case, 3) }) end)
end

for _, case in ipairs {
  { "no table", 1, "p/network.lua: must return a table, got number" },
  { "none", { none = { allow = {} } }, "p/network.lua: none: none is built in and cannot be redefined" },
  { "no list", { web = {} }, "p/network.lua: web: web.allow must be a list" },
  { "by name", { web = { allow = { { host = "a.example", ports = { 1 } } } } }, 'p/network.lua:4: host = "a.example": rules by name are not available yet; use cidr' },
  { "address and port", { web = { allow = { { cidr = "x", ports = { "y" } } } } }, "p/network.lua:4: cidr: is never allowed", "p/network.lua:4: ports[1]: is no port" },
  { "no ports", { web = { allow = { { cidr = "1/24" } } } }, 'p/network.lua:4: ports is required: a list like { 443, "8000-8010" }' },
  { "limits", { web = { allow = {}, connections = 0, bandwidth = "x" } }, "p/network.lua: web: web.connections must be an integer from 1 to 65535, got 0",
    "p/network.lua: web: web.bandwidth is no rate" },
} do
  t.test("refused in network.lua: " .. case[1], function()
    t.eq(bare({}).load_network("p/network.lua", case[2], lines), { unpack(case, 3) })
  end)
end

local A_TEST = 'a test is { call = { tool =, args = }, expect = "allow" | "ask" | "deny" }'
for _, case in ipairs {
  { "no table", 1, ": " .. A_TEST },
  { "no tool", { call = {}, expect = "deny" }, ": " .. A_TEST },
  { "no expectation", { call = { tool = "echo" } }, ": " .. A_TEST },
  { "another expectation", { call = { tool = "echo" }, expect = "denied" }, ": " .. A_TEST },
  { "an unknown key", { call = { tool = "echo" }, expect = "allow", netork = "web" }, ": unknown key netork (did you mean network?)" },
  { "an unknown key of the call", { call = { tool = "echo", mark = {} }, expect = "allow" }, ": unknown key mark (did you mean marks?)" },
  { "arguments that are none", { call = { tool = "echo", args = "x" }, expect = "allow" }, ": call.args must be a table, got string" },
  { "a rule that is no text", { call = { tool = "echo" }, expect = "allow", rule = 10 }, ": rule must be a string, got number" },
  { "the server of another tool", { call = { tool = "echo", server = "up" }, expect = "allow" }, ": echo is a tool of local, not of up" },
  { "its name, when it fails", { name = "all is lost", call = { tool = "echo", args = X }, expect = "deny" },
    ' (all is lost): echo: expected deny, got allow; rules ["' .. at(1) .. '"]' },
  { "another network", { call = { tool = "echo", args = X }, expect = "allow", network = "web" }, ': echo: expected network web, got none; rules ["' .. at(1) .. '"]' },
  { "another rule", { call = { tool = "echo", args = X }, expect = "allow", rule = "other" }, ': echo: expected rule other, got others; rules ["' .. at(1) .. '"]' },
  { "other arguments", { call = { tool = "echo", args = X }, expect = "allow", args = {} }, ': echo: expected arguments {}, got {"message":"x"}; rules ["' .. at(1) .. '"]' },
} do
  t.test("a test is told: " .. case[1], function()
    t.eq(engine_of({ rules = { rule("allow", { id = "first" }) } }, { case[2] }).run_tests(), { FILE .. ":501: tests[1]" .. case[3] })
  end)
end

t.test("a hole in the list of tests does not hide those after it", function()
  t.eq(engine_of({ rules = {} }, { nil, { call = { tool = "echo", args = X }, expect = "allow" } }).run_tests(),
    { FILE .. ":501: tests[1]: " .. A_TEST, FILE .. ":502: tests[2]: echo: expected allow, got deny: " .. NO_RULE .. "; rules []" })
end)

t.test("a test may say marks in either way and name a rule by its id", function()
  local row = { rules = { rule "allow", rule("deny", { id = "taint", when = function(call) return call.session.marks.a and call.session.marks.b and not call.session.marks.c end }) } }
  local tests = {}
  for i, call in ipairs { { marks = { "a", "b" } }, { marks = { a = true, b = true, c = false } }, { marks = { "a" }, session = { marks = { b = true } } } } do
    call.tool = "echo"
    tests[i] = { call = call, expect = "deny", rule = "taint" }
  end
  tests[4] = { call = { tool = "echo", marks = { "a" } }, expect = "allow" }
  t.eq(engine_of(row, tests).run_tests(), {})
end)

t.test("tests leave their arguments as they were, for each other", function()
  local args = { message = "x" }
  local test = { call = { tool = "echo", args = args }, expect = "allow", args = { message = "x!" } }
  t.eq(engine_of({ rules = { rule("allow", { rewrite = function(a) a.message = a.message .. "!" return a end }) } }, { test, test }).run_tests(), {})
  t.eq(args, { message = "x" })
end)

-- Any rules and any call: the three say the same, and it is what the rules add up to ------------------

t.test("random rules: all three agree with the sum of the rules", function()
  local seed = 1
  local function random(n)
    seed = seed * 16807 % 2147483647
    return seed % n + 1
  end
  for _ = 1, 300 do
    local rules, by, redact, best, reason = {}, {}, {}, 0, nil
    local network, network_at, clash
    for i = 1, random(6) do
      local answer = random(3)
      local r = { tool = ({ "echo", "e*", "*", "up__*" })[random(4)], action = WORDS[random(9) < 5 and 1 or random(3)],
        when = answer > 1 and function() return answer == 2 end or nil, reason = random(2) == 1 and "r" .. i or nil }
      if r.action ~= "deny" then
        r.network = ({ "web", "mail" })[random(6)]
        r.redact = random(3) == 1 and { "p" .. i } or nil
      end
      rules[i] = r
      if r.tool ~= "up__*" and answer < 3 then
        by[#by + 1] = i
        if r.redact then redact[#redact + 1] = r.redact[1] end
        local rank = r.action == "deny" and 3 or r.action == "ask" and 2 or 1
        if rank > best then
          best = rank
          reason = rank == 3 and ("%s (%s)"):format(r.reason or "a rule denies it", at(i))
            or rank == 2 and ("nobody to ask%s (%s)"):format(r.reason and ": " .. r.reason or "", at(i)) or nil
        end
        if r.network and network and r.network ~= network then
          clash = clash or ("ambiguous network: %s (%s) and %s (%s)"):format(network, at(network_at), r.network, at(i))
        elseif r.network and not network then
          network, network_at = r.network, i
        end
      end
    end
    if best == 0 then best, reason = 3, NO_RULE end
    if clash and best ~= 3 then best, reason = 3, clash end
    agree { rules = rules, args = X, decision = WORDS[best], by = by, reason = reason, network = network, redact = redact }
  end
end)

return t.done()
