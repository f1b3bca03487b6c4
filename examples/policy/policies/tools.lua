-- Judges every tool call. All matching rules count: deny beats ask beats allow, whatever the order;
-- what no rule matches is denied. Saved edits are in force at once, unless a test below fails.

-- Commands are free inside the microVM, which has no network and no files of yours. What is worth a rule
-- is what leaves it, and what should not be tried at all.
local function destroys(call)
  return call.args.command:find("mkfs", 1, true) or call.args.command:find("rm -rf /", 1, true)
end

return {
  rules = {
    -- Keys that a command prints never reach the agent or the audit log.
    { tool = "run_command", action = "allow", network = "none", redact = { [[\bsk-[A-Za-z0-9]{8,}\b]] } },
    { tool = "run_command", action = "deny", when = destroys, reason = "destroys its own machine" },

    { tool = "publish", action = "ask", reason = "leaves this machine" },
    { tool = "word_count", action = "allow", rate = "60/min" },
  },

  tests = {
    { call = { tool = "run_command", args = { command = "id" } }, expect = "allow" },
    { call = { tool = "run_command", args = { command = "rm -rf / --no-preserve-root" } }, expect = "deny" },
    { call = { tool = "word_count", args = { text = "one two" } }, expect = "allow" },
    { call = { tool = "publish", args = { text = "done" } }, expect = "ask" },
    { call = { tool = "something_else", args = {} }, expect = "deny" },
  },
}
