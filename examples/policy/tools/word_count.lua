-- A tool that needs no microVM: arguments in, text and a structured result out.
return {
  name = "word_count",
  description = "Counts the words of a text",
  input = {
    type = "object",
    properties = { text = { type = "string", maxLength = 100000 } },
    required = { "text" },
    additionalProperties = false,
  },
  output = { type = "object", properties = { words = { type = "integer" } }, required = { "words" } },
  annotations = { readOnlyHint = true },
  run = function(args)
    local words = 0
    for _ in args.text:gmatch("%S+") do words = words + 1 end
    return { text = words .. " words", structured = { words = words } }
  end,
}
