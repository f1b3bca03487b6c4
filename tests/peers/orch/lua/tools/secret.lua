return {
  name = "secret", description = "Denied by policy",
  input = { type = "object", properties = { key = { type = "string" } }, required = { "key" } },
  run = function() return { text = "told" } end,
}
