return {
  rules = {
    { tool = "*", action = "allow" },
    { tool = "secret", action = "deny", reason = "not for peers",
      when = function(call) return call.args.key == "k" end },
    { tool = "run_command", action = "deny" },
    { tool = "run_python", action = "deny" },
  },
}
