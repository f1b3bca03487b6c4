return {
  name = "greet", arguments = { { name = "name", required = true } },
  get = function(args) return "Say hello to " .. args.name end,
}
