local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"

local FILES = {
  { "orchestrator.lua", [[
-- orch's configuration for this folder; all keys: orch help config
return {
  policies = "policies",
  tools = { "lua/tools" },
  workspace = ".", -- the only host directory that tools may see
  vm = { memory = "256M", timeout = "60s" },
}
]] },
  { "policies/tools.lua", [[
-- Which tool calls are allowed. Every rule that matches counts: deny beats ask beats allow; what no
-- rule matches is denied. Edits are in force within a moment; `orch policy check` says what is wrong.
return {
  rules = {
    -- A shell command in a microVM that exists for this call alone, without a network.
    { tool = "run_command", action = "allow", network = "none" },
    { tool = "hello", action = "allow" },
  },
  -- Run before every load: a policy whose tests fail is not put in force.
  tests = {
    { call = { tool = "run_command", args = { command = "id" } }, expect = "allow" },
    { call = { tool = "hello", args = { name = "you" } }, expect = "allow" },
    { call = { tool = "anything_else" }, expect = "deny" },
  },
}
]] },
  { "policies/network.lua", [[
-- Named network policies for microVMs. `none` is built in: no network interface at all.
return {}
]] },
  { "lua/tools/hello.lua", [[
-- A tool of your own: one file, one tool. It runs in orch, not in a microVM; ctx:vm() gives it one.
return {
  name = "hello",
  description = "Greets somebody by name",
  input = {
    type = "object",
    properties = { name = { type = "string", minLength = 1, maxLength = 100 } },
    required = { "name" },
    additionalProperties = false,
  },
  annotations = { readOnlyHint = true },
  run = function(args)
    return { text = "Hello, " .. args.name .. "!" }
  end,
}
]] },
}

return cli.main("init", {
  usage = "[DIR]",
  about = "Writes orchestrator.lua, policies/tools.lua, policies/network.lua and lua/tools/hello.lua into DIR "
    .. "(default: the working directory). A file that exists is left as it is.",
  examples = { "orch init && orch trust" },
  words = { 0, 1 },
  run = function(_, words, _, name)
    local dir = words[1] or "."
    for _, f in ipairs(FILES) do
      local path = dir .. "/" .. f[1]
      local ok, why = true, nil
      if cli.exists(path) then
        cli.out("kept   ", cli.line(path), " (it exists)\n")
      else
        ok, why = orch.fs.mkdir(path:match("^(.*)/"))
        if ok then ok, why = orch.fs.write(path, f[2]) end
        if not ok then return cli.fail(name, why, 1) end
        cli.out("wrote  ", cli.line(path), "\n")
      end
    end
    cli.out("\nNext: read them, then accept them with\n  orch trust", words[1] and " " .. cli.line(dir) or "",
      "\nand connect an agent to `orch mcp stdio`, started in that folder.\n",
      "Where the agent's own tools cannot write they are safer: orch init ", cli.line(internal.paths().user_config), "\n",
      "What is missing on this machine: orch doctor\n")
    return 0
  end,
}, ...)
