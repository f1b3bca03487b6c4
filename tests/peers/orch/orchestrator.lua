-- What the peers see of orch: the same tools, resource and prompt that each peer's own server has, and `secret`.
return { policies = "policies", tools = { "lua/tools" }, workspace = "lua", http = { token = env("ORCH_TOKEN", nil) } }
