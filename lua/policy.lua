-- The policy engine, in the policy state: compiles policies/tools.lua and policies/network.lua and
-- judges tool calls in the order CONTRACT section 4 gives. Every rule that matches counts; deny beats
-- ask beats allow; no match, an error or a time-out is a deny. Outcomes are cached per tool and set of
-- `when` results, so that a call costs its predicates and two table look-ups.
--
-- deps: json, regex(pattern) -> matcher | nil, err; schema.compile; nearest(word, list);
--       session(id) -> { id =, marks = {} }, client info; rate(key, limit, window_ms) -> boolean;
--       cidr(text) -> true | nil, why; ports(text) -> true | nil, why
local deps = ...
local json, null = deps.json, deps.json.null

local ALLOW, ASK, DENY = 1, 2, 3
local verdicts = { allow = ALLOW, ask = ASK, deny = DENY }
local names = { "allow", "ask", "deny" }
local windows = { s = 1000, sec = 1000, min = 60000, h = 3600000, hour = 3600000, day = 86400000 }
local MAX_WHENS = 50 -- of one tool: their results are the bits of a number

local engine = { rules = {}, tools = {}, redact = {}, tests = {}, file = "policies/tools.lua",
  networks = {} } -- network policies: name -> { allow = { { cidr =, proto =, ports = { "443" } } }, connections =, bandwidth = "10mbit" }
local cache = {}    -- tool name -> its candidates
local sessions = {} -- session id -> what predicates see of it
local clients = {}  -- session id -> what the client says of itself

-- ---- loading

local errors

local function fail(where, fmt, ...)
  errors[#errors + 1] = where .. ": " .. fmt:format(...)
end

local function check_keys(where, t, known)
  for k in pairs(t) do
    if type(k) ~= "string" or not known[k] then
      local list = {}
      for name in pairs(known) do list[#list + 1] = name end
      local near = type(k) == "string" and deps.nearest(k, list)
      fail(where, "unknown key %s%s", tostring(k), near and (" (did you mean " .. near .. "?)") or "")
    end
  end
end

-- "*" is any run, all else literal. A pattern without "__" is for local tools only, "*" alone for all.
local function compile_pattern(pattern)
  if pattern == "*" then return function() return true end end
  local any_server = pattern:find("__", 1, true)
  local matches
  if not pattern:find("*", 1, true) then
    matches = function(name) return name == pattern end
  else
    local parts = {}
    for part in (pattern .. "*"):gmatch("(.-)%*") do parts[#parts + 1] = part end
    matches = function(name)
      local first, last = parts[1], parts[#parts]
      if name:sub(1, #first) ~= first or #name < #first + #last then return false end
      local at = #first + 1
      for i = 2, #parts - 1 do
        local from, to = name:find(parts[i], at, true)
        if not from then return false end
        at = to + 1
      end
      return #name - #last + 1 >= at and name:sub(#name - #last + 1) == last
    end
  end
  return function(name)
    return (any_server or not name:find("__", 1, true)) and matches(name)
  end
end

local rule_keys = { tool = true, action = true, when = true, network = true, reason = true, rewrite = true,
  redact = true, rate = true, mark = true, id = true }
local effects = { "network", "rewrite", "redact", "rate", "mark" }

local function compile_rate(where, rule, r)
  local limit, unit = tostring(r.rate):match("^(%d+)/(%a+)$")
  limit = tonumber(limit)
  if type(r.rate) ~= "string" or not limit or limit < 1 or limit > 1e6 or not windows[unit] then
    return fail(where, "rate must be like \"30/min\" (1 to 1000000 per s, min, h or day), got %s", tostring(r.rate))
  end
  rule.rate = { limit = limit, window = windows[unit], text = r.rate,
    key = rule.id and ("id:" .. rule.id) or (engine.file .. "|" .. rule.tool .. "|" .. r.rate) }
end

local function compile_redact(where, rule, r)
  if type(r.redact) ~= "table" then return fail(where, "redact must be a list of PCRE2 patterns") end
  rule.redact = {}
  for i, pattern in ipairs(r.redact) do
    local ok, err = deps.regex(pattern)
    if not ok then
      fail(where, "redact[%d]: %s", i, err)
    else
      engine.redact[#engine.redact + 1] = pattern
      rule.redact[i] = #engine.redact
    end
  end
end

local function compile_rule(r, i, line)
  local where = engine.file .. (line and (":" .. line) or (": rule " .. i))
  local rule = { where = where, index = i }
  if type(r) ~= "table" then return fail(where, "a rule must be a table, got %s", type(r)) end
  check_keys(where, r, rule_keys)
  if type(r.tool) ~= "string" or r.tool == "" then return fail(where, "tool must be a pattern (a string)") end
  rule.tool, rule.matches = r.tool, compile_pattern(r.tool)
  rule.verdict = verdicts[r.action]
  if not rule.verdict then
    return fail(where, "action must be \"allow\", \"ask\" or \"deny\", got %s", tostring(r.action))
  end
  for _, key in ipairs { "reason", "network", "mark", "id" } do
    if r[key] ~= nil and type(r[key]) ~= "string" then fail(where, "%s must be a string, got %s", key, type(r[key])) end
  end
  for _, key in ipairs { "when", "rewrite" } do
    if r[key] ~= nil and type(r[key]) ~= "function" then fail(where, "%s must be a function, got %s", key, type(r[key])) end
  end
  if rule.verdict == DENY then
    for _, key in ipairs(effects) do
      if r[key] ~= nil then fail(where, "%s on a deny rule has no effect; remove it", key) end
    end
  end
  if type(r.network) == "string" and r.network ~= "none" and not engine.networks[r.network] then
    local known = { "none" }
    for name in pairs(engine.networks) do known[#known + 1] = name end
    local near = deps.nearest(r.network, known)
    fail(where, "no network policy %q in policies/network.lua%s", r.network, near and ("; did you mean " .. near .. "?") or "")
  end
  rule.when, rule.rewrite, rule.reason, rule.network, rule.mark, rule.id = r.when, r.rewrite, r.reason, r.network, r.mark, r.id
  if r.rate ~= nil then compile_rate(where, rule, r) end
  if r.redact ~= nil then compile_redact(where, rule, r) end
  return rule
end

-- policies/tools.lua as it returned; lines: path -> line. Returns a list of errors.
function engine.load_tools(file, value, lines)
  errors, engine.file = {}, file
  if type(value) ~= "table" then return { file .. ": must return a table, got " .. type(value) } end
  check_keys(file, value, { rules = true, tests = true })
  if type(value.rules) ~= "table" then
    fail(file, "rules must be a list, got %s", type(value.rules))
    return errors
  end
  for k in pairs(value.rules) do
    if type(k) ~= "number" or k < 1 or k > #value.rules or k % 1 ~= 0 then
      fail(file, "rules must be a plain list; it has the key %s", tostring(k))
    end
  end
  for i = 1, #value.rules do
    local rule = compile_rule(value.rules[i], i, lines["rules[" .. i .. "]"])
    engine.rules[#engine.rules + 1] = rule
  end
  if value.tests ~= nil and type(value.tests) ~= "table" then
    fail(file, "tests must be a list, got %s", type(value.tests))
  end
  engine.tests = value.tests or {}
  return errors
end

local function compile_allow(where, entry)
  if type(entry) ~= "table" then return fail(where, "an entry must be a table, got %s", type(entry)) end
  check_keys(where, entry, { cidr = true, host = true, ports = true, proto = true })
  if entry.host ~= nil then
    return fail(where, "host = %q: rules by name are not available yet; use cidr", tostring(entry.host))
  end
  local ok, why
  if type(entry.cidr) == "string" then ok, why = deps.cidr(entry.cidr) end
  if not ok then fail(where, "cidr: %s", why or "must be a text like \"198.51.100.0/24\"") end
  local proto = entry.proto or "tcp"
  if proto ~= "tcp" and proto ~= "udp" then fail(where, "proto must be \"tcp\" or \"udp\", got %s", tostring(entry.proto)) end
  local ports = {}
  if type(entry.ports) ~= "table" or #entry.ports == 0 then
    fail(where, "ports is required: a list like { 443, \"8000-8010\" }")
  else
    for i, port in ipairs(entry.ports) do
      local text = type(port) == "number" and ("%.0f"):format(port) or port
      ok, why = nil, "must be a number or a range like \"8000-8010\""
      if type(text) == "string" and (type(port) ~= "number" or port % 1 == 0) then ok, why = deps.ports(text) end
      if not ok then fail(where, "ports[%d]: %s", i, why) end
      ports[i] = text
    end
  end
  return { cidr = entry.cidr, proto = proto, ports = ports, where = where }
end

local function compile_network(where, name, policy, line_of)
  if type(policy) ~= "table" then return fail(where, "%s must be a table, got %s", name, type(policy)) end
  check_keys(where, policy, { allow = true, connections = true, bandwidth = true })
  local out = { allow = {}, where = where }
  if type(policy.allow) ~= "table" then return fail(where, "%s.allow must be a list", name) end
  for i = 1, #policy.allow do
    out.allow[i] = compile_allow(line_of(name .. ".allow[" .. i .. "]"), policy.allow[i])
  end
  local connections = policy.connections
  if connections ~= nil and (type(connections) ~= "number" or connections % 1 ~= 0 or connections < 1 or connections > 65535) then
    fail(where, "%s.connections must be an integer from 1 to 65535, got %s", name, tostring(connections))
  end
  out.connections = connections
  if policy.bandwidth ~= nil then
    local ok, why = nil, "must be a text like \"10mbit\""
    if type(policy.bandwidth) == "string" then ok, why = deps.bandwidth(policy.bandwidth) end
    if not ok then fail(where, "%s.bandwidth %s", name, why) end
    out.bandwidth = policy.bandwidth
  end
  return out
end

-- policies/network.lua as it returned: named policies, everything else is denied. lines: path -> line.
function engine.load_network(file, value, lines)
  errors = {}
  if type(value) ~= "table" then return { file .. ": must return a table, got " .. type(value) } end
  local function line_of(path)
    return lines[path] and (file .. ":" .. lines[path]) or (file .. ": " .. path)
  end
  for name, policy in pairs(value) do
    if type(name) ~= "string" or not name:find("^[%w_-]+$") or #name > 64 then
      fail(file, "a network policy needs a name of 1 to 64 of A-Za-z0-9_-, got %s", tostring(name))
    elseif name == "none" then
      fail(line_of(name), "none is built in and cannot be redefined")
    else
      engine.networks[name] = compile_network(line_of(name), name, policy, line_of)
    end
  end
  return errors
end

-- A tool: its qualified name, "local" or the upstream's, and its input schema.
-- What it says of itself (description, annotations) is only ever shown to predicates as untrusted.
function engine.add_tool(name, server, schema, untrusted_json)
  local check, unknown = deps.schema.compile(schema, { unknown = server == "local" and "error" or "collect" })
  if not check then return nil, unknown end
  engine.tools[name] = { server = server, check = check, says = untrusted_json and json.decode(untrusted_json) or {} }
  return true, type(unknown) == "table" and table.concat(unknown, ", ") or nil
end

-- ---- judging

local function combine(candidates, mask)
  local verdict, by, matched, where = 0, nil, {}, {}
  local bit = 1
  for i = 1, #candidates do
    local rule, hit = candidates[i], true
    if rule.when then
      hit = mask % (bit + bit) >= bit
      bit = bit + bit
    end
    if hit then
      matched[#matched + 1] = rule
      where[#where + 1] = rule.where
      if rule.verdict > verdict then verdict, by = rule.verdict, rule end
    end
  end
  local out = { verdict = verdict, rules = json.encode(json.array(where)), matched = matched }
  if verdict == 0 then
    out.verdict = DENY
    out.reason = "no rule allows it (" .. engine.file .. ")"
  elseif verdict == DENY then
    out.reason = ("%s (%s)"):format(by.reason or "a rule denies it", by.where)
  elseif verdict == ASK then
    out.reason = ("nobody to ask%s (%s)"):format(by.reason and (": " .. by.reason) or "", by.where)
  end
  for _, rule in ipairs(matched) do
    if rule.verdict ~= DENY then
      if rule.redact then
        out.redact = out.redact or {}
        for _, index in ipairs(rule.redact) do out.redact[#out.redact + 1] = index end
      end
      if rule.network then
        if out.network and out.network ~= rule.network then
          return { verdict = DENY, rules = out.rules, matched = matched,
            reason = ("ambiguous network: %s (%s) and %s (%s)"):format(out.network, out.network_by, rule.network, rule.where) }
        end
        out.network, out.network_by = rule.network, rule.where
      end
      if rule.mark then out.marks = out.marks or {}; out.marks[#out.marks + 1] = rule.mark end
      if rule.rate then out.rates = out.rates or {}; out.rates[#out.rates + 1] = rule end
      if rule.rewrite then out.rewrites = out.rewrites or {}; out.rewrites[#out.rewrites + 1] = rule end
    end
  end
  out.effects = out.redact or out.marks or (out.network and out.network ~= "none")
  return out
end

local function candidates_of(tool)
  local list = cache[tool]
  if list then return list end
  list = { whens = {}, outcomes = {}, n_outcomes = 0 }
  for _, rule in ipairs(engine.rules) do
    if rule.matches(tool) then
      list[#list + 1] = rule
      if rule.when then list.whens[#list.whens + 1] = rule end
    end
  end
  if #list.whens > MAX_WHENS then
    list.broken = ("more than %d rules with `when` match it (%s)"):format(MAX_WHENS, engine.file)
  end
  cache[tool] = list
  return list
end

local function decide(list, call)
  if list.broken then return { verdict = DENY, reason = list.broken, rules = "[]", matched = {} } end
  local mask, bit = 0, 1
  local whens = list.whens
  for i = 1, #whens do
    local rule = whens[i]
    engine.current = rule.where -- named when a budget ends it, which no pcall here sees
    local ok, hit = pcall(rule.when, call)
    if not ok then
      return { verdict = DENY, rules = json.encode(json.array { rule.where }), matched = { rule },
        reason = ("`when` failed: %s (%s)"):format(tostring(hit), rule.where) }
    end
    if hit then mask = mask + bit end
    bit = bit + bit
  end
  local out = list.outcomes[mask]
  if not out then
    out = combine(list, mask)
    if list.n_outcomes < 256 then
      list.outcomes[mask], list.n_outcomes = out, list.n_outcomes + 1
    end
  end
  return out
end

local call_methods = {}

-- True when the argument is a path that climbs out of the workspace: absolute, or with more ".." than
-- names before it. A missing argument is not a path.
function call_methods.path_outside(call, key)
  local path = call.args[key]
  if path == nil then return false end
  if type(path) ~= "string" or path:sub(1, 1) == "/" or path:sub(1, 1) == "~" then return true end
  local depth = 0
  for part in path:gmatch("[^/]+") do
    if part == ".." then
      depth = depth - 1
      if depth < 0 then return true end
    elseif part ~= "." then
      depth = depth + 1
    end
  end
  return false
end

local call_meta = { __index = call_methods }

local function session_of(id)
  local s = sessions[id]
  if not s then
    s, clients[id] = deps.session(id)
    sessions[id] = s
  end
  return s
end

function engine.forget_session(id)
  sessions[id], clients[id] = nil, nil
end

local function run_rewrites(list, out, args)
  for _, rule in ipairs(out.rewrites) do
    engine.current = rule.where
    local ok, new = pcall(rule.rewrite, args)
    if not ok then return nil, ("rewrite failed: %s (%s)"):format(tostring(new), rule.where) end
    if type(new) ~= "table" then
      return nil, ("rewrite must return the arguments, got %s (%s)"):format(type(new), rule.where)
    end
    args = new
  end
  return args
end

local function judge(entry, tool, args, session_id, caller)
  local ok, why
  local list = cache[tool] or candidates_of(tool)
  local call
  if list.whens[1] then
    local session = session_of(session_id)
    call = setmetatable({ tool = tool, server = entry.server, args = args, session = session, caller = caller,
      untrusted = { client = clients[session_id], tool = entry.says } }, call_meta)
  end
  local out = decide(list, call)
  local rewritten
  if out.verdict ~= DENY and out.rewrites then
    rewritten, why = run_rewrites(list, out, args)
    if not rewritten then return DENY, why, out.rules end
    ok, why = entry.check(rewritten)
    if not ok then return DENY, ("the rewritten arguments are wrong: %s (%s)"):format(why, out.rewrites[1].where), out.rules end
    if call then call.args = rewritten end
    out = decide(list, call)
  end
  if out.network and out.verdict ~= DENY and entry.server ~= "local" then
    return DENY, ("network %s cannot be enforced here: the server runs on the host (%s)"):format(out.network, out.network_by), out.rules
  end
  if out.verdict == ALLOW and out.rates then
    for _, rule in ipairs(out.rates) do
      if not deps.rate(rule.rate.key .. "|" .. caller, rule.rate.limit, rule.rate.window) then
        return DENY, ("rate limit %s is used up (%s)"):format(rule.rate.text, rule.where), out.rules
      end
    end
  end
  if out.verdict == ALLOW and out.marks then
    local marks = session_of(session_id).marks
    for _, mark in ipairs(out.marks) do marks[mark] = true end
  end
  return out.verdict, out.reason, out.rules, out.effects and out, rewritten
end

-- Judges one call. args_full keeps nulls of objects and is what the schema sees; args is what policy
-- sees (the same table when there are none). Returns:
--   args_full without nulls that stand for absent members, where it had such,
--   verdict (0: bad arguments), reason, rules as JSON, effects or nil, rewritten arguments or nil
function engine.judge(tool, args_full, args, session_id, caller)
  local entry = engine.tools[tool]
  local ok, why = entry.check(args_full, args_full ~= args)
  if not ok then return nil, 0, why end
  return why and args_full, judge(entry, tool, args, session_id, caller)
end

-- Whether tools/list shows it: some allow or ask pattern matches, and no deny without `when` does.
function engine.listed(tool)
  local shown = false
  for _, rule in ipairs(candidates_of(tool)) do
    if rule.verdict == DENY and not rule.when then return false end
    if rule.verdict ~= DENY then shown = true end
  end
  return shown
end

-- The unit tests of tools.lua; returns a list of failures.
function engine.run_tests()
  errors = {}
  for i, test in ipairs(engine.tests) do
    local where = ("%s: tests[%d]"):format(engine.file, i)
    local call = type(test) == "table" and test.call
    if type(call) ~= "table" or type(call.tool) ~= "string" or not verdicts[test.expect] then
      fail(where, "a test is { call = { tool =, args = }, expect = \"allow\" | \"ask\" | \"deny\" }")
    else
      local session = { id = "test", marks = {} }
      for _, mark in ipairs(call.session and call.session.marks or {}) do session.marks[mark] = true end
      for mark, on in pairs(call.session and call.session.marks or {}) do
        if on == true then session.marks[mark] = true end
      end
      local args = call.args or {}
      local list = candidates_of(call.tool)
      local subject = setmetatable({ tool = call.tool, args = args, session = session, caller = call.caller or "test",
        server = call.server or call.tool:match("^(.-)__") or "local", untrusted = call.untrusted or {} }, call_meta)
      local out, why = decide(list, subject), nil
      if out.verdict ~= DENY and out.rewrites then
        subject.args, why = run_rewrites(list, out, args)
        out = subject.args and decide(list, subject) or { verdict = DENY, reason = why, rules = "[]" }
      end
      if names[out.verdict] ~= test.expect then
        fail(where, "%s: expected %s, got %s%s; rules %s", call.tool, test.expect, names[out.verdict],
          out.reason and (": " .. out.reason) or "", out.rules)
      end
    end
  end
  return errors
end

-- For `policy explain`: every rule whose pattern matches, and what each said. args as in judge.
function engine.explain(tool, args, session_id, caller)
  local rows = {}
  local call = setmetatable({ tool = tool, args = args, session = session_of(session_id), caller = caller, untrusted = {},
    server = engine.tools[tool] and engine.tools[tool].server or tool:match("^(.-)__") or "local" }, call_meta)
  local list = candidates_of(tool)
  for _, rule in ipairs(list) do
    local row = { where = rule.where, action = names[rule.verdict], reason = rule.reason or null, matched = true, has_when = rule.when ~= nil }
    if rule.when then
      local ok, hit = pcall(rule.when, call)
      row.matched = ok and not not hit
      if not ok then row.error = tostring(hit) end
    end
    rows[#rows + 1] = row
  end
  local out = decide(list, call)
  return { decision = names[out.verdict], reason = out.reason or null, rules = json.array(rows), listed = engine.listed(tool),
    known = engine.tools[tool] ~= nil }
end

-- For `policy show`.
function engine.show()
  local rows = {}
  for _, rule in ipairs(engine.rules) do
    rows[#rows + 1] = { where = rule.where, tool = rule.tool, action = names[rule.verdict], when = rule.when ~= nil,
      network = rule.network or null, reason = rule.reason or null, rate = rule.rate and rule.rate.text or null,
      rewrite = rule.rewrite ~= nil, redact = rule.redact and #rule.redact or 0, mark = rule.mark or null }
  end
  return json.array(rows)
end

return engine
