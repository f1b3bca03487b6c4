-- Runs a Python program in a microVM that is made for this call and destroyed after it.
return {
  name = "run_python",
  description = "Run a Python 3 program in a fresh, isolated microVM. Nothing of the host is visible and nothing is "
    .. "kept between calls. Returns what it printed, standard error under a line [stderr], and the exit status where it "
    .. "is not 0; print what you want to see.",
  input = {
    type = "object",
    properties = {
      code = { type = "string", description = "The program", minLength = 1, maxLength = 262144 },
      args = { type = "array", description = "Its sys.argv[1:]", maxItems = 64,
        items = { type = "string", maxLength = 4096 } },
      timeout = { type = "number", description = "Seconds after which it is ended; never more than vm.timeout of the configuration",
        exclusiveMinimum = 0, maximum = 86400 },
    },
    required = { "code" },
    additionalProperties = false,
  },
  annotations = { title = "Run Python in a microVM", readOnlyHint = false, destructiveHint = false, openWorldHint = false },
  run = function(args, ctx)
    local vm, err, code = ctx:vm()
    if not vm then return nil, err, code end
    local argv = { "python3", "-" }
    for i, arg in ipairs(args.args or {}) do argv[2 + i] = arg end
    local r, why, class, so_far = vm:exec(argv, { stdin = args.code, timeout = args.timeout })
    if r and r.failed == "not found" then
      return nil, "the image " .. vm.image .. " has no python3; build one that has, it is the default then: "
        .. "orch image build debian", "isolation"
    end
    return ctx:output(r, why, class, so_far)
  end,
}
