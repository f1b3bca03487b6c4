local orch = require "orch"
local cli = require "cli"

local function options(...)
  local list = { unpack(cli.VM_OPTIONS) }
  for _, o in ipairs { ... } do list[#list + 1] = o end
  return list
end

local NAMES = { [1] = "failed", [2] = "usage", [3] = "denied",
  [5] = "isolation not available", [6] = "configuration", [8] = "limit" }

local function run(opts, words, cmd, name)
  if words[1] then return cli.usage(name, "unexpected argument " .. words[1] .. "; CMD comes after --") end
  if not cmd or not cmd[1] then return cli.usage(name, "CMD is missing: orch vm run [options] -- CMD ARG…") end
  -- CMD never ran: 125, and which of orch's own statuses it would have been.
  local function failed(message, code)
    local status = cli.status(code)
    if code == "usage" then return cli.usage(name, message) end
    if opts.json then cli.json { error = message, code = code, exit = 125, status_of_orch = status } end
    return cli.fail(name, ("%s\n(status %d: %s; CMD was not run)"):format(
      message, status, NAMES[status] or "failed"), 125)
  end
  local vm, why, code = cli.spawn(opts)
  if not vm then return failed(why, code) end
  local x = { user = opts.user, timeout = opts.timeout, inherit_stdin = true }
  if not opts.json then x.inherit = true end
  local ok, r
  ok, r, why, code = pcall(vm.exec, vm, cmd, x)
  if not ok then
    vm:close()
    return cli.usage(name, (tostring(r):gsub("\n.*", "")))
  elseif not r then
    vm:close()
    if code == "cancelled" then return 130 end
    return cli.fail(name, why, 125)
  end
  local exit = r.timed_out and 124 or r.signal and 128 + r.signal or r.status
  if opts.json then
    cli.json { id = vm.id, backend = vm.backend, isolation = vm.isolation, image = vm.image, spawn_ms = vm.spawn_ms,
      ms = r.ms, status = r.status, signal = r.signal, timed_out = r.timed_out, truncated = r.truncated,
      stdout = r.stdout, stderr = r.stderr, exit = exit }
  elseif r.failed then
    io.stderr:write(cli.escape(r.stderr))
  elseif r.timed_out then
    cli.err("orch vm run: ended: the time-out of " .. opts.timeout .. " is over")
  end
  if r.unwritten then
    cli.err("orch vm run: " .. r.unwritten)
    if exit == 0 then exit = 1 end
  end
  vm:close()
  return exit
end

local function hold(opts, _, _, name)
  local vm, why, code = cli.spawn(opts)
  if not vm then return cli.fail(name, why, code) end
  if opts.json then
    cli.json { id = vm.id, backend = vm.backend, isolation = vm.isolation, image = vm.image, spawn_ms = vm.spawn_ms }
  else
    cli.out(vm.id, "\n")
    io.stderr:write(("%s, %s, %s, %.1f ms; Ctrl-C ends it\n"):format(vm.image, vm.backend, vm.isolation, vm.spawn_ms))
  end
  io.stdout:flush()
  local gone
  repeat
    orch.sleep(0.5)
    gone, why, code = vm:network()
  until not gone
  return cli.fail(name, why, code)
end

-- Asks every process for its microVMs; `head` and `row` are the table of them.
local function show(opts, name, request, id, head, row)
  local answers = cli.control(request, opts.pid)
  local rows, all = { head }, {}
  for _, a in ipairs(answers) do
    if a.error then cli.err(("orch %s: pid %d: %s"):format(name, a.pid, a.error)) end
    for _, vm in ipairs(a.answer or {}) do
      vm.pid = a.pid
      if not id or vm.id == id then
        all[#all + 1] = vm
        rows[#rows + 1] = row(vm)
      end
    end
  end
  if opts.json then
    cli.json(orch.json.array(all))
  elseif all[1] then
    cli.columns(rows)
    if id then
      rows = { { "PACKETS", "BYTES", "RULE" } }
      for _, r in ipairs(all[1].rules) do rows[#rows + 1] = { r.packets, r.bytes, r.label } end
      if rows[2] then
        cli.out("\n")
        cli.columns(rows)
      end
    end
  elseif id and answers[1] then
    return cli.fail(name, "no microVM " .. id .. " is running; orch vm list shows them", "failed")
  elseif answers[1] then
    cli.out("no microVM is running\n")
  else
    cli.none_running(opts.pid)
  end
  return 0
end

local function list(opts, _, _, name)
  return show(opts, name, '{"op":"vms"}', nil,
    { "ID", "PID", "IMAGE", "BACKEND", "ISOLATION", "NETWORK", "SPAWN", "SINCE", "RUNS", "FOR", "NAME" }, function(vm)
      return { vm.id, vm.pid, vm.image, vm.backend, vm.isolation, vm.network, ("%.1f ms"):format(vm.spawn_ms), vm.since,
        vm.call and ("%s (%s)"):format(vm.tool, vm.call) or "-", vm.caller and (vm.caller:gsub(" /%S*/", " ", 1)) or "-",
        vm.name or "" }
    end)
end

local function stats(opts, words, _, name)
  local function mb(bytes) return ("%.1f MB"):format(bytes / 1e6) end
  return show(opts, name, '{"op":"stats"}', words[1], { "ID", "PID", "NETWORK", "VMM", "UPLINK", "CONNECTIONS", "NAME" },
    function(vm)
      return { vm.id, vm.pid, vm.network, mb(vm.vmm_bytes), mb(vm.uplink_bytes), vm.connections, vm.name or "" }
    end)
end

local JSON = { "--json", nil, "print one JSON object" }
local LATER = "vm list works; end a microVM by ending its orch process"

return cli.main("vm", {
  usage = "run|spawn|list …",
  about = "Runs commands in microVMs. Each is a machine of its own: nothing of the host is visible in it.",
  commands = {
    { "run", spec = {
      summary = "one microVM, one command, destroyed after",
      usage = "[options] -- CMD ARG…",
      about = "Spawns a microVM, runs CMD in it and destroys it. Standard input, output, error and the exit "
        .. "status are CMD's. With --network it reaches what that policy allows, through a packet filter of its own; "
        .. "else it has no network interface.",
      options = options({ "--user", "USER", "user that CMD runs as in the guest (default: 1000)" },
        { "--timeout", "TIME", 'CMD is ended after this ("250ms", "30s", "5m")', kind = "duration" },
        { "--json", nil,
          "print one JSON object with the output (at most 1 MiB a stream), status and isolation instead" }),
      examples = { "orch vm run -- uname -a", "tar c . | orch vm run -- sh -c 'cd /tmp && tar x && ls -l'",
        "orch vm run --timeout 10s --memory 512M -- sh -c 'exit 3'", "orch vm run --network packages -- wget -qO- http://198.51.100.10/" },
      status = "CMD's; 124 time-out, 126 not executable, 127 not found, 128+N signal N, 125 CMD never ran; 2 usage",
      command = "--", run = run } },
    { "spawn", spec = {
      summary = "spawn one microVM and hold it until interrupted",
      usage = "[options]", about = "Spawns a microVM, prints its id and holds it until Ctrl-C or SIGTERM.",
      options = options({ "--name", "TEXT", "a label for vm list" }, JSON), examples = { "orch vm spawn --name demo" },
      status = "130 interrupted, 143 terminated, 5 isolation not available, 2 usage", words = { 0, 0 }, run = hold } },
    { "list", spec = {
      summary = "the microVMs of this user's running orch processes",
      usage = "[--pid N] [--json]", about = "Lists the microVMs of every running orch process of this user: since when each runs, for which call, "
        .. "and for whom.",
      options = { { "--pid", "N", "only of this process", kind = "count" }, { "--json", nil, "print a JSON array" } },
      words = { 0, 0 }, run = list } },
    { "stats", spec = {
      summary = "memory and connections of the running microVMs; with ID, what its packet filter counted",
      usage = "[--pid N] [--json] [ID]",
      about = "Shows what each microVM takes: memory of its VMM and of its way to the network (proportional set size; "
        .. "the latter is a process of its own, about 20 MB whatever it carries), and its open connections.",
      options = { { "--pid", "N", "only of this process", kind = "count" }, { "--json", nil, "print a JSON array" } },
      words = { 0, 1 }, run = stats } },
    { "exec", later = LATER }, { "logs", later = LATER }, { "kill", later = LATER },
    { "pool", later = "every microVM is cloned when it is needed" },
  },
}, ...)
