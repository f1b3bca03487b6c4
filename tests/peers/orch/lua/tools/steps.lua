return {
  name = "steps", description = "Reports progress", input = { type = "object", properties = {} },
  run = function(_, ctx)
    for i = 1, 3 do
      ctx:progress(i, 3)
      orch.sleep(0.02) -- TypeScript's clients forget progress that comes in one read with the answer
    end
    return { text = "stepped" }
  end,
}
