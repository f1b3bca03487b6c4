return {
  name = "echo", description = "Returns its message",
  input = { type = "object", properties = { message = { type = "string" } }, required = { "message" } },
  run = function(args) return { text = args.message } end,
}
