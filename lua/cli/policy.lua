local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"

local null = orch.json.null
local function given(v) return v ~= nil and v ~= null and v or nil end

-- The configuration to judge: that of the folder or file named, or the one in force.
local function load(words, name)
  if words[1] then
    local file, why = cli.find_config(words[1])
    if file then file, why = internal.use_config(file) end
    if not file then return nil, cli.fail(name, why, 6) end
  end
  local g, why, code = internal.load()
  if not g then
    -- Failing tests of an otherwise good policy are a failed test, not a broken file.
    local tests_only = true
    for line in why:gmatch("[^\n]+") do tests_only = tests_only and line:find("tests%[%d+%]") ~= nil end
    return nil, cli.fail(name, why, tests_only and 1 or code)
  end
  if g.notes ~= "" then cli.err((g.notes:gsub("\n$", ""))) end
  return g
end

local function plural(n, word) return ("%d %s%s"):format(n, word, n == 1 and "" or "s") end

local function check(_, words, _, name)
  local g, status = load(words, name)
  if not g then return status end
  cli.out(("%s, %s, %s: ok\n"):format(plural(g.rules, "rule"), plural(g.tests, "test"), plural(#g.tools, "tool")))
  return 0
end

local function test(_, words, _, name)
  local g, status = load(words, name)
  if not g then return status end
  cli.out(g.tests == 0 and "no tests; write some into policies/tools.lua: tests = { … }\n"
    or plural(g.tests, "test") .. " passed\n")
  return 0
end

local NONE = "none is built in: no network interface at all"

-- explain --network NAME ADDRESS PORT [tcp|udp]
local function explain_packet(opts, words, name)
  local port, proto = tonumber(words[2]), words[3] or "tcp"
  if not port or port % 1 ~= 0 or port < 1 or port > 65535 then return cli.usage(name, "ADDRESS PORT [tcp|udp] are needed") end
  if proto ~= "tcp" and proto ~= "udp" then return cli.usage(name, "the protocol is tcp or udp, not " .. proto) end
  local decision, rule, code = internal.packet(opts.network, words[1], proto, port)
  if opts.network == "none" and code ~= "usage" then decision, rule = "deny", NONE end
  if not decision then return cli.fail(name, rule, code) end
  if opts.json then
    cli.json { decision = decision, rule = rule }
  else
    cli.out(decision, ": ", rule, "\n")
  end
  return 0
end

local function said(r)
  if given(r.error) then return "when failed: " .. r.error end
  if not r.seen then return "not asked" end
  local text = (r.matched and "applies" or "does not apply") .. (r.has_when and " (when)" or "")
  return r.before == nil and text or text .. " to what was rewritten, " .. (r.before and "applied" or "did not") .. " before"
end

-- What the rules that apply do beside deciding, a line each.
local function effects(x)
  local function line(...) cli.out("  ", cli.line(table.concat { ... }), "\n") end
  if given(x.args) then line("rewritten (", table.concat(x.rewrites, ", "), "): ", orch.json.encode(x.args)) end
  if given(x.network) then line("network ", x.network.name, " (", x.network.where, ")") end
  for _, r in ipairs(x.redact) do line("redacted in the result: ", r.pattern, " (", r.where, ")") end
  for _, r in ipairs(x.rates) do line("rate ", r.rate, " for each caller, of which this took none (", r.where, ")") end
  for _, m in ipairs(x.marks) do line("marks the session ", m.mark, " (", m.where, ")") end
end

local function explain(opts, words, _, name)
  local g, status = load({}, name)
  if not g then return status end
  if opts.network then return explain_packet(opts, words, name) end
  if words[3] then return cli.usage(name, "unexpected argument " .. words[3]) end
  local x, why, code = internal.explain(words[1], words[2])
  if not x and code ~= "limit" then return cli.fail(name, why, code) end
  -- A rule that uses up a limit denies the call, and ends this as it ends that.
  x = x or { decision = "deny", reason = why, by = orch.json.array {}, rules = orch.json.array {}, limit = true }
  local without = not words[2] and given(x.by_name)
  if without then without.bad_arguments, x = x.bad_arguments, without end
  if opts.json then
    cli.json(x)
    return 0
  end
  cli.out(x.decision, given(x.reason) and ": " .. cli.line(x.reason) or "", "\n")
  if x.limit then return 0 end
  local rows, asked = {}, false
  for i, r in ipairs(x.rules) do
    rows[i] = { r.where, r.action, said(r), given(r.reason) or "" }
    asked = asked or r.has_when and r.seen
  end
  cli.columns(rows, "  ")
  effects(x)
  if asked then cli.out("  (when saw the caller ", x.caller, " and a session without marks)\n") end
  if x.others > 0 then cli.out("  (", plural(x.others, "other rule"), x.others == 1 and " is" or " are", " for other tools)\n") end
  if without then cli.out("  (no arguments given: only the name was judged; a call needs some: ", cli.line(x.bad_arguments), ")\n") end
  if not x.known then
    cli.out("  (no tool ", cli.line(words[1]), " is configured; only its name was judged)\n")
  elseif not x.listed then
    cli.out("  (not in tools/list)\n")
  end
  return 0
end

local function show(opts, _, _, name)
  local g, status = load({}, name)
  if not g then return status end
  if opts.nft == "none" then
    cli.out(NONE, "\n")
    return 0
  elseif opts.nft then
    local text, why, code = internal.nft(opts.nft)
    if not text then return cli.fail(name, why, code) end
    cli.out(text)
    return 0
  end
  local rules, why, code = internal.rules()
  if not rules then return cli.fail(name, why, code) end
  if opts.json then
    cli.json { rules = rules, tools = orch.json.array(g.tools), generation = g.generation }
    return 0
  end
  local rows = { { "RULE", "TOOL", "ACTION", "WHEN", "EFFECTS", "REASON" } }
  for _, r in ipairs(rules) do
    local effects = {}
    for _, key in ipairs { "network", "rate", "mark" } do
      if given(r[key]) then effects[#effects + 1] = key .. " " .. tostring(r[key]) end
    end
    if r.rewrite then effects[#effects + 1] = "rewrite" end
    if r.redact > 0 then effects[#effects + 1] = ("redact %d"):format(r.redact) end
    rows[#rows + 1] = { r.where, r.tool, r.action, r.when and "yes" or "-",
      effects[1] and table.concat(effects, ", ") or "-", given(r.reason) or "" }
  end
  cli.columns(rows)
  cli.out("\n")
  rows = { { "TOOL", "SERVER", "LISTED", "FILE" } }
  for _, t in ipairs(g.tools) do rows[#rows + 1] = { t.name, t.server, t.listed and "yes" or "no", t.file or "" } end
  cli.columns(rows)
  return 0
end

local STATUS = "0 good, 1 a policy test failed, 6 policy or configuration invalid or not trusted, 2 usage"

return cli.main("policy", {
  usage = "check|test|explain|show …",
  about = "Looks at policies: policies/tools.lua says which tool calls are allowed, network.lua names network "
    .. "policies. Every matching rule counts: deny beats ask beats allow; what no rule matches is denied.",
  commands = {
    { "check", spec = { summary = "read everything and name all errors", usage = "[FILE|DIR]",
      about = "Reads configuration, policies and tools, runs the policy's tests, prints every error with "
        .. "file:line. DIR: a folder with orchestrator.lua; FILE: that file or one of its policies.",
      examples = { "orch policy check", "orch policy check examples/policy" },
      status = STATUS, words = { 0, 1 }, run = check } },
    { "test", spec = { summary = "run the tests in policies/tools.lua", usage = "[FILE|DIR]",
      about = "Runs the unit tests of policies/tools.lua, as each load does.", examples = { "orch policy test" },
      status = STATUS, words = { 0, 1 }, run = test } },
    { "explain", spec = { summary = "which rules decide a call, with file:line", usage = "TOOL [ARGS-JSON] [--json] | --network NAME ADDRESS PORT [tcp|udp]",
      about = "Says what a call of TOOL with these arguments would get: the decision, what each rule says, effects and rewritten "
        .. "arguments; without ARGS-JSON by its name alone. With --network, whether a connection from a microVM with that network "
        .. "policy would pass. Nothing is run, nothing is taken from a rate.",
      options = { { "--json", nil, "print JSON" }, { "--network", "NAME", "a policy of policies/network.lua" } },
      examples = { [[orch policy explain run_command '{"command":"id"}']], "orch policy explain --network packages 203.0.113.7 443" },
      status = "0 whatever the decision, 6 policy invalid, 2 usage", words = { 1, 3 }, run = explain } },
    { "show", spec = { summary = "all rules, and which tools clients see", usage = "[--json] [--nft NAME]",
      about = "Prints the rules in force and, for each tool, whether tools/list shows it; with --nft, the packet filter of a "
        .. "network policy.",
      options = { { "--json", nil, "print JSON" }, { "--nft", "NAME", "a policy of policies/network.lua" } }, status = STATUS, words = { 0, 0 }, run = show } },
    { "diff", later = "compare the files with your version control" },
    { "grants", later = "nothing is remembered yet" },
    { "revoke", later = "nothing is remembered yet" },
  },
}, ...)
