return {
  name = "ask", description = "Asks for a name", input = { type = "object", properties = {} },
  run = function(_, ctx)
    local answer, why, code = ctx:elicit { message = "Who?",
      schema = { type = "object", properties = { name = { type = "string" } }, required = { "name" } } }
    if not answer then return nil, why, code end
    return { text = "Hello, " .. answer.content.name }
  end,
}
