local number = { type = "number" }
return {
  name = "add", description = "Adds two numbers",
  input = { type = "object", properties = { a = number, b = number }, required = { "a", "b" } },
  output = { type = "object", properties = { sum = number }, required = { "sum" } },
  run = function(args)
    local result = { sum = args.a + args.b }
    return { text = orch.json.encode(result), structured = result }
  end,
}
