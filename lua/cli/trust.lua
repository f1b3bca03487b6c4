local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"

local SHOWN = 12 -- changed lines of a file

local function lines_of(text)
  local out = {}
  for line in (text:gsub("\n$", "") .. "\n"):gmatch("(.-)\n") do out[#out + 1] = line end
  return out
end

-- What lies between the lines that both begin and end with.
local function middle(a, b)
  local first, last = 1, 0
  while first <= #a and a[first] == b[first] do first = first + 1 end
  while last < math.min(#a, #b) - first + 1 and a[#a - last] == b[#b - last] do last = last + 1 end
  return first, last
end

local function show_change(before, now)
  local a, b = lines_of(before), lines_of(now)
  local first, last = middle(a, b)
  local n = 0
  for _, side in ipairs { { "-", a }, { "+", b } } do
    for i = first, #side[2] - last do
      n = n + 1
      if n <= SHOWN then cli.out("    ", side[1], " ", tostring(i), ": ", cli.line(side[2][i]), "\n") end
    end
  end
  if n > SHOWN then cli.out(("    … and %d lines more\n"):format(n - SHOWN)) end
end

-- The texts that were trusted, by their SHA-256, so that the next time can say what changed.
local function copy_of(sha) return internal.paths().state .. "/trusted/" .. sha end

local function show(list)
  for _, f in ipairs(list) do
    local state = not f.before and "new" or f.before ~= f.sha256 and "changed" or "as before"
    cli.out(("%-9s  %s  %s (%d lines)\n"):format(state, f.sha256:sub(1, 16), cli.line(f.path), #lines_of(f.text)))
    local before = state == "changed" and orch.fs.read(copy_of(f.before))
    if before then show_change(before, f.text) end
  end
  for _, path in ipairs(list.gone) do cli.out(("%-9s  %s  %s\n"):format("gone", (" "):rep(16), cli.line(path))) end
end

local function keep_copies(list)
  if not orch.fs.mkdir(copy_of(""):sub(1, -2), { mode = tonumber("700", 8) }) then return end
  for _, f in ipairs(list) do
    if not cli.exists(copy_of(f.sha256)) then orch.fs.write(copy_of(f.sha256), f.text, { mode = tonumber("600", 8) }) end
  end
end

return cli.main("trust", {
  usage = "[--edits] [DIR]",
  about = "Accepts the configuration in DIR (default: the one in force here), its policies and its tools as "
    .. "they are now: says which are new or changed and how, and records their SHA-256. What is new or changed later "
    .. "is not loaded until you say so again. Only a configuration in the working directory needs it, one that says "
    .. "trust = \"always\", and one that a program which orch started may have written to; look at the files before you "
    .. "trust them. It is for a person at a terminal.",
  options = { { "--edits", nil, "accept later edits and new files too" } },
  examples = { "orch trust", "orch trust --edits ~/project" },
  status = "0 done, 3 refused below a process that orch started, 6 invalid, or no terminal, 2 usage",
  words = { 0, 1 },
  run = function(opts, words, _, name)
    local refused = cli.refuse_below(name)
    if refused then return refused end
    if not internal.terminal() then
      return cli.fail(name, "refused: standard input and standard error must be a terminal, so that a person sees what is "
        .. "accepted; run it in your own shell", 6)
    end
    local paths = internal.paths()
    local file, why = paths.named, nil
    if words[1] then
      file, why = cli.find_config(words[1])
    elseif paths.origin == "built-in" then
      file, why = cli.find_config(paths.cwd)
    end
    if file then file, why = internal.use_config(file) end
    if not file then return cli.fail(name, why, 6) end
    local list, ok, code
    list, why, code = internal.trust_look()
    if not list then return cli.fail(name, why, code) end
    show(list)
    ok, why, code = internal.trust(opts.edits or false)
    if not ok then return cli.fail(name, why, code) end
    keep_copies(list)
    cli.out(("%d files trusted%s\n"):format(#list, opts.edits and ", and later edits of this folder" or " as they are"))
    return 0
  end,
}, ...)
