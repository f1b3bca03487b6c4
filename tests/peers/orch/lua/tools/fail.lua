return {
  name = "fail", description = "Fails", input = { type = "object", properties = {} },
  run = function() return nil, "broken on purpose" end,
}
