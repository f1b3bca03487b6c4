return { rules = { { tool = "*", action = "allow" } } }
