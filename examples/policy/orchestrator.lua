-- A configuration with a policy of its own. Try it from the root of the repository:
--   orch --config examples/policy/orchestrator.lua policy test
--   python3 examples/client.py --config examples/policy/orchestrator.lua --list
return {
  policies = "policies",
  tools = { "tools" },
}
