-- A tool that the policy asks about: with nobody to ask, it is denied.
return {
  name = "publish",
  description = "Publishes a text",
  input = { type = "object", properties = { text = { type = "string" } }, required = { "text" } },
  annotations = { destructiveHint = true, openWorldHint = true },
  run = function(args)
    return { text = "published " .. #args.text .. " bytes" }
  end,
}
