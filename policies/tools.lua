-- Which tool calls are allowed. Every rule that matches counts: deny beats ask beats allow; what no
-- rule matches is denied. Edits are in force within a moment; `orch policy check` says what is wrong.
return {
  rules = {
    -- A shell command in a microVM that exists for this call alone, without a network.
    { tool = "run_command", action = "allow", network = "none" },
  },
  -- Run before every load: a policy whose tests fail is not put in force.
  tests = {
    { call = { tool = "run_command", args = { command = "id" } }, expect = "allow" },
    { call = { tool = "anything_else" }, expect = "deny" },
  },
}
