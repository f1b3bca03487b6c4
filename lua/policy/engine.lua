-- The policy engine, in the policy state: compiles policies/tools.lua and policies/network.lua and
-- judges tool calls. Every rule that matches counts; deny beats ask beats allow; no match, an error or a
-- time-out is a deny. Outcomes are kept per tool and set of `when` results, so that a call costs its
-- predicates and two table look-ups. consider() is the only walk over the rules: a call, the tests of a
-- policy and `policy explain` use what it says.
--
-- deps: json, regex(pattern) -> matcher | nil, err; schema.compile; nearest(word, list);
--       session(id) -> { id =, marks = {} }, client info; rate(key, limit, window_ms) -> boolean;
--       cidr(text) -> true | nil, why; ports(text) -> true | nil, why
local deps = ...
local json, null = deps.json, deps.json.null
local pcall, setmetatable, ipairs = pcall, setmetatable, ipairs

local ALLOW, ASK, DENY = 1, 2, 3
local verdicts = { allow = ALLOW, ask = ASK, deny = DENY }
local names = { "allow", "ask", "deny" }
local windows = { s = 1000, sec = 1000, min = 60000, h = 3600000, hour = 3600000, day = 86400000 }
local MAX_WHENS = 50 -- of one tool: their results are the bits of a number

local engine = { rules = {}, redact = {}, tests = {}, file = "policies/tools.lua",
  redact_by = {}, test_lines = {}, -- where the pattern, the test of that number is written
  networks = {} } -- network policies: name -> { allow = { { cidr =, proto =, ports = { "443" } } }, connections =, bandwidth = "10mbit" }
local tools = {}    -- qualified name -> new_tool
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

-- The list; an empty one where it is none.
local function check_list(where, name, list)
  if type(list) ~= "table" then
    fail(where, "%s must be a list, got %s", name, type(list))
    return {}
  end
  for k in pairs(list) do
    if type(k) ~= "number" or k < 1 or k > #list or k % 1 ~= 0 then
      fail(where, "%s must be a plain list; it has the key %s", name, tostring(k))
    end
  end
  return list
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
  local patterns = check_list(where, "redact", r.redact)
  rule.redact = {}
  for i = 1, #patterns do
    local pattern, ok, err = patterns[i], nil, "must be a PCRE2 pattern (a string)"
    if type(pattern) == "string" then ok, err = deps.regex(pattern) end
    if not ok then
      fail(where, "redact[%d]: %s", i, err)
    else
      engine.redact[#engine.redact + 1] = pattern
      engine.redact_by[#engine.redact] = where
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
  local rules = check_list(file, "rules", value.rules)
  for i = 1, #rules do
    engine.rules[#engine.rules + 1] = compile_rule(rules[i], i, lines["rules[" .. i .. "]"])
  end
  engine.tests = value.tests and check_list(file, "tests", value.tests) or {}
  for i = 1, #engine.tests do engine.test_lines[i] = lines["tests[" .. i .. "]"] end
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
  return { cidr = entry.cidr, proto = proto, ports = ports }
end

local function compile_network(where, name, policy, line_of)
  if type(policy) ~= "table" then return fail(where, "%s must be a table, got %s", name, type(policy)) end
  check_keys(where, policy, { allow = true, connections = true, bandwidth = true })
  local out = { allow = {} }
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

-- What the rules can say of a tool: those whose pattern matches it (the list), and the outcomes they came to so far.
-- check(args, lenient): its schema, nil where it is not looked at.
local function new_tool(name, server, check, says)
  local tool = { name = name, server = server, check = check, says = says, whens = {}, outcomes = {}, n_outcomes = 0 }
  for _, rule in ipairs(engine.rules) do
    if rule.matches(name) then
      tool[#tool + 1] = rule
      if rule.when then tool.whens[#tool.whens + 1] = rule end
    end
  end
  if #tool.whens > MAX_WHENS then
    tool.broken = ("more than %d rules with `when` match it (%s)"):format(MAX_WHENS, engine.file)
  end
  return tool
end

-- A tool: its qualified name, "local" or the upstream's, and its input schema.
-- What it says of itself (description, annotations) is only ever shown to predicates as untrusted.
function engine.add_tool(name, server, schema, untrusted_json)
  local check, unknown = deps.schema.compile(schema, { unknown = server == "local" and "error" or "collect" })
  if not check then return nil, unknown end
  tools[name] = new_tool(name, server, check, untrusted_json and json.decode(untrusted_json) or {})
  return true, type(unknown) == "table" and table.concat(unknown, ", ") or nil
end

-- ---- judging

-- For each candidate whether it counts. mask: what those with `when` said, the first of them its lowest bit.
local function hits_of(tool, mask)
  local hits, bit = {}, 1
  for i = 1, #tool do
    hits[i] = true
    if tool[i].when then
      hits[i] = mask % (bit + bit) >= bit
      bit = bit + bit
    end
  end
  return hits
end

-- What was raised, as a text that is the same each time.
local function text_of(raised) return type(raised) == "string" and raised or "a " .. type(raised) end

local function denied(out, reason)
  return { verdict = DENY, reason = reason, rules = out.rules, hits = out.hits }
end

-- The union of what the matching rules do beside deciding; a denied outcome where two of them do not agree.
local function add_effects(out, matched, server)
  local function add(key, value)
    out[key] = out[key] or {}
    table.insert(out[key], value)
  end
  local counted = {}
  for _, rule in ipairs(matched) do
    for _, index in ipairs(rule.redact or {}) do add("redact", index) end
    if rule.network and out.network and out.network ~= rule.network then
      return denied(out, ("ambiguous network: %s (%s) and %s (%s)"):format(out.network, out.network_by, rule.network, rule.where))
    elseif rule.network and not out.network then
      out.network, out.network_by = rule.network, rule.where
    end
    if rule.mark then
      add("marks", rule.mark)
      add("marks_by", rule.where)
    end
    if rule.rate and not counted[rule.rate.key] then
      counted[rule.rate.key] = true
      add("rates", rule)
    end
    if rule.rewrite then add("rewrites", rule) end
  end
  if out.network and server ~= "local" then
    out.unenforceable = denied(out,
      ("network %s cannot be enforced here: the server runs on the host (%s)"):format(out.network, out.network_by))
  end
  out.effects = out.redact or out.marks or (out.network and out.network ~= "none")
  return out
end

-- What the candidates come to. An outcome is shared by all calls that come to it and never changed:
--   verdict, reason, rules: file:line of those that matched, as JSON, hits: as hits_of;
--   effects: whether it has redact (indices into engine.redact), marks or a network to tell the call's side;
--   rates, rewrites: the rules that have one; unenforceable: the outcome instead where this is the last word.
local function combine(tool, mask)
  local verdict, by, matched, where = 0, nil, {}, {}
  local hits = hits_of(tool, mask)
  for i, rule in ipairs(tool) do
    if hits[i] then
      matched[#matched + 1], where[#where + 1] = rule, rule.where
      if rule.verdict > verdict then verdict, by = rule.verdict, rule end
    end
  end
  local out = { verdict = verdict, rules = json.encode(json.array(where)), hits = hits }
  if verdict == 0 then return denied(out, "no rule allows it (" .. engine.file .. ")") end
  if verdict == DENY then return denied(out, ("%s (%s)"):format(by.reason or "a rule denies it", by.where)) end
  if verdict == ASK then
    out.reason = ("nobody to ask%s (%s)"):format(by.reason and (": " .. by.reason) or "", by.where)
  end
  return add_effects(out, matched, tool.server)
end

local function decide(tool, call)
  if tool.broken then return { verdict = DENY, reason = tool.broken, rules = "[]", hits = {} } end
  local mask, bit = 0, 1
  local whens = tool.whens
  for i = 1, #whens do
    local rule = whens[i]
    engine.current = rule.where -- named when a budget ends it, which no pcall here sees
    local ok, hit = pcall(rule.when, call)
    if not ok then
      return { verdict = DENY, rules = json.encode(json.array { rule.where }), hits = hits_of(tool, mask), failed = rule,
        failure = text_of(hit), reason = ("`when` failed: %s (%s)"):format(text_of(hit), rule.where) }
    end
    if hit then mask = mask + bit end
    bit = bit + bit
  end
  local out = tool.outcomes[mask]
  if not out then
    out = combine(tool, mask)
    if tool.n_outcomes < 256 then
      tool.outcomes[mask], tool.n_outcomes = out, tool.n_outcomes + 1
    end
  end
  return out
end

local function run_rewrites(rules, args)
  for _, rule in ipairs(rules) do
    engine.current = rule.where
    local ok, new = pcall(rule.rewrite, args)
    if not ok then return nil, ("rewrite failed: %s (%s)"):format(text_of(new), rule.where) end
    if type(new) ~= "table" then
      return nil, ("rewrite must return the arguments, got %s (%s)"):format(type(new), rule.where)
    end
    args = new
  end
  return args
end

-- One call before all rules: judged, rewritten, checked by the schema, judged again. call: what predicates see, nil where
-- none asks. Takes nothing from a rate and sets no mark: that is for who lets the call run.
-- Returns the outcome; the rewritten arguments, if they were; the outcome before, when rewrites were to run.
local function consider(tool, args, call)
  local out = decide(tool, call)
  local before = out.rewrites and out
  if not before then return out.unenforceable or out end
  local rewritten, why = run_rewrites(before.rewrites, args)
  if not rewritten then return denied(before, why), nil, before end
  if tool.check then
    local ok
    ok, why = tool.check(rewritten)
    if not ok then
      why = ("the rewritten arguments are wrong: %s (%s)"):format(why, before.rewrites[1].where)
      return denied(before, why), nil, before
    end
  end
  if call then call.args = rewritten end
  out = decide(tool, call)
  return out.unenforceable or out, rewritten, before
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

local function judge(tool, args, session_id, caller)
  local call
  if tool.whens[1] then
    call = setmetatable({ tool = tool.name, server = tool.server, args = args, session = session_of(session_id), caller = caller,
      untrusted = { client = clients[session_id], tool = tool.says } }, call_meta)
  end
  local out, rewritten = consider(tool, args, call)
  if out.verdict == ALLOW then
    if out.rates then
      for _, rule in ipairs(out.rates) do
        if not deps.rate(rule.rate.key .. "|" .. caller, rule.rate.limit, rule.rate.window) then
          return DENY, ("rate limit %s is used up (%s)"):format(rule.rate.text, rule.where), out.rules
        end
      end
    end
    if out.marks then
      local marks = session_of(session_id).marks
      for _, mark in ipairs(out.marks) do marks[mark] = true end
    end
  end
  return out.verdict, out.reason, out.rules, out.effects and out, rewritten
end

-- Judges one call. args_full keeps nulls of objects and is what the schema sees; args is what policy
-- sees (the same table when there are none). Returns:
--   args_full without nulls that stand for absent members, where it had such,
--   verdict (0: bad arguments), reason, rules as JSON, effects or nil, rewritten arguments or nil
function engine.judge(name, args_full, args, session_id, caller)
  local tool = tools[name]
  engine.current = nil
  local ok, why = tool.check(args_full, args_full ~= args)
  if not ok then return nil, 0, why end
  return why and args_full, judge(tool, args, session_id, caller)
end

-- Whether tools/list shows it: some allow or ask pattern matches, and no deny without `when` does.
local function listed(tool)
  local shown = false
  for _, rule in ipairs(tool) do
    if rule.verdict == DENY and not rule.when then return false end
    if rule.verdict ~= DENY then shown = true end
  end
  return shown
end

function engine.listed(name) return listed(tools[name]) end

-- ---- what a call would get: for `policy explain` and the tests of a policy

-- A copy. Policy sees it without the members of objects that are null.
local function copy(v, without_null)
  if type(v) ~= "table" then return v end
  local out = {}
  for k, x in pairs(v) do
    if not (without_null and x == null and type(k) == "string") then out[k] = copy(x, without_null) end
  end
  return getmetatable(v) == getmetatable(json.array {}) and json.array(out) or out
end

-- The tool of that name; where there is none, or by_name, one that takes any arguments.
local function tool_of(name, by_name, server)
  local tool = tools[name]
  if tool and not by_name then return tool end
  return new_tool(name, tool and tool.server or server or name:match("^(.-)__") or "local", nil, tool and tool.says or {})
end

-- Judges a call as judge does, and leaves nothing behind. as: { session =, caller =, client =, says = }. Returns what
-- consider does, and the arguments that policy saw; where the schema refuses them, a denied outcome with bad_arguments,
-- for which no rule was asked.
local function rehearse(tool, args, as)
  engine.current = nil
  local full, ok, why = copy(args), true, nil
  if tool.check then ok, why = tool.check(full, true) end
  if not ok then
    return { verdict = DENY, reason = "bad arguments: " .. why, bad_arguments = why, rules = "[]", hits = {} }
  end
  local seen = copy(full, true)
  local out, rewritten, before = consider(tool, seen, setmetatable({ tool = tool.name, server = tool.server, args = seen,
    session = as.session, caller = as.caller, untrusted = { client = as.client or {}, tool = as.says or tool.says } },
    call_meta))
  if rewritten then -- where the call's side makes JSON of them
    ok, why = pcall(json.encode, rewritten)
    if not ok then
      why = "the rewritten arguments cannot be JSON: " .. why
      return out.verdict == DENY and out or denied(out, why), nil, before, seen
    end
  end
  return out, rewritten, before, seen
end

local test_types = { name = "string", call = "table", expect = "string", network = "string", reason = "string", args = "table",
  rule = "string" }
local call_types = { tool = "string", args = "table", marks = "table", session = "table", caller = "string", server = "string",
  untrusted = "table" }

local function check_types(where, prefix, t, types)
  check_keys(where, t, types)
  for key, kind in pairs(types) do
    if t[key] ~= nil and type(t[key]) ~= kind then fail(where, "%s%s must be a %s, got %s", prefix, key, kind, type(t[key])) end
  end
end

local function same(a, b)
  if type(a) ~= "table" or type(b) ~= "table" then return a == b end
  for k, v in pairs(a) do if not same(v, b[k]) then return false end end
  for k in pairs(b) do if a[k] == nil then return false end end
  return true
end

-- rule: its id, or where it is: tools.lua:12, with as much of the path as is wanted.
local function names_rule(tool, out, wanted)
  for _, where in ipairs(json.decode(out.rules)) do
    if where == wanted or where:sub(-#wanted - 1) == "/" .. wanted then return true end
    for _, rule in ipairs(tool) do
      if rule.where == where and rule.id == wanted then return true end
    end
  end
  return false
end

-- Both ways to write marks: { "untrusted" } and { untrusted = true }.
local function add_marks(marks, list)
  for k, v in pairs(type(list) == "table" and list or {}) do
    if type(k) == "number" then marks[v] = true elseif v == true then marks[k] = true end
  end
end

-- What is wrong with it as a test, or what it does not get that it expects; nil when it passes.
local function run_test(where, test)
  local call = type(test) == "table" and test.call
  if type(call) ~= "table" or type(call.tool) ~= "string" or not verdicts[test.expect] then
    return fail(where, "a test is { call = { tool =, args = }, expect = \"allow\" | \"ask\" | \"deny\" }")
  end
  local so_far = #errors
  check_types(where, "call.", call, call_types)
  check_types(where, "", test, test_types)
  local known = tools[call.tool]
  if known and call.server and call.server ~= known.server then
    fail(where, "%s is a tool of %s, not of %s", call.tool, known.server, call.server)
  end
  if #errors > so_far then return end

  local session, untrusted = { id = "test", marks = {} }, call.untrusted or {}
  add_marks(session.marks, call.marks)
  add_marks(session.marks, call.session and call.session.marks)
  -- What a server makes of its schemas must not keep a policy from being loaded.
  local by_name = not call.args or known and known.server ~= "local"
  local tool = tool_of(call.tool, by_name, call.server)
  local out, rewritten, _, seen = rehearse(tool, call.args or {}, { session = session, caller = call.caller or "test",
    client = untrusted.client, says = untrusted.tool })
  local function got(what, wanted, is)
    fail(where, "%s: expected %s%s, got %s%s; rules %s", call.tool, what, wanted, is,
      out.reason and is ~= out.reason and (": " .. out.reason) or "", out.rules)
  end
  if out.bad_arguments then -- whatever it expects: no rule was asked
    return fail(where, "%s: expected %s, got %s", call.tool, test.expect, out.reason)
  end
  if names[out.verdict] ~= test.expect then return got("", test.expect, names[out.verdict]) end
  local network = out.network or "none"
  if test.network and test.network ~= network then got("network ", test.network, network) end
  local reason = out.reason or "none"
  if test.reason and not reason:find(test.reason, 1, true) then got("the reason ", test.reason, reason) end
  if test.rule and not names_rule(tool, out, test.rule) then got("rule ", test.rule, "others") end
  local args, wanted = copy(rewritten or seen, true), copy(test.args, true)
  if wanted and not same(wanted, args) then got("arguments ", json.encode(wanted), json.encode(args)) end
end

-- The unit tests of tools.lua; returns a list of failures.
function engine.run_tests()
  errors = {}
  for i = 1, #engine.tests do
    local test = engine.tests[i]
    local name = type(test) == "table" and type(test.name) == "string" and (" (" .. test.name .. ")") or ""
    local line = engine.test_lines[i]
    run_test(("%s%s: tests[%d]%s"):format(engine.file, line and (":" .. line) or "", i, name), test)
  end
  return errors
end

local function or_null(v) if v == nil then return null end return v end

-- What each rule whose pattern matches said.
local function rows_of(tool, out, before)
  local rows, unseen = {}, false
  for i, rule in ipairs(tool) do
    local row = { where = rule.where, action = names[rule.verdict], reason = or_null(rule.reason),
      has_when = rule.when ~= nil, matched = out.hits[i] == true, seen = not (rule.when and unseen) and out.hits[i] ~= nil }
    if out.failed == rule then row.error, unseen = out.failure, true end
    if before and before.hits[i] ~= out.hits[i] then row.before = before.hits[i] end
    rows[i] = row
  end
  return json.array(rows)
end

-- For `policy explain`: how a call with these arguments would be decided, by which rules, and with what effects. The
-- parameters are judge's, but for args without nulls.
--   { decision, reason, by = { file:line… } as in the audit log, rules = { { where, action, reason, has_when, matched,
--     seen (its `when` was called, if it has one), before (whether it matched before a rewrite, where that differs),
--     error }… }, others (how many rules are for other tools), rewrites = { file:line… }, args (rewritten),
--     network = { name, where }, redact = { { pattern, where }… }, rates = { { rate, where }… },
--     marks = { { mark, where }… }, caller, listed, known, bad_arguments,
--     by_name (the same where no schema is looked at, when the arguments are bad) }
local function explain(name, args, session_id, caller, by_name)
  local session, client = deps.session(session_id)
  local tool = tool_of(name, by_name)
  local out, rewritten, before = rehearse(tool, args, { session = session, caller = caller, client = client })
  local x = { decision = names[out.verdict], reason = or_null(out.reason), by = json.decode(out.rules),
    rules = rows_of(tool, out, before), others = #engine.rules - #tool, args = or_null(rewritten), network = null,
    bad_arguments = or_null(out.bad_arguments), caller = caller, listed = listed(tool), known = tools[name] ~= nil }
  for _, key in ipairs { "rewrites", "redact", "rates", "marks" } do x[key] = json.array {} end
  for i, rule in ipairs(before and before.rewrites or {}) do x.rewrites[i] = rule.where end
  if out.network then x.network = { name = out.network, where = out.network_by } end
  for i, n in ipairs(out.redact or {}) do x.redact[i] = { pattern = engine.redact[n], where = engine.redact_by[n] } end
  for i, rule in ipairs(out.rates or {}) do x.rates[i] = { rate = rule.rate.text, where = rule.where } end
  for i, mark in ipairs(out.marks or {}) do x.marks[i] = { mark = mark, where = out.marks_by[i] } end
  return x
end

function engine.explain(name, args, session_id, caller)
  local x = explain(name, args, session_id, caller)
  if x.bad_arguments ~= null then x.by_name = explain(name, args, session_id, caller, true) end
  return x
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
