return { policies = "policies", limits = { calls = 1024 } }
