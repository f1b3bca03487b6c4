return { tools = { "tools" }, limits = { calls = 128 } }
