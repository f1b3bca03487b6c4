return { name = "echo", description = "Echo", input = { type = "object", properties = { message = { type = "string" } }, required = { "message" } },
  run = function(args) return { text = args.message } end }
