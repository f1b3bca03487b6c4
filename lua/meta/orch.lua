---@meta orch
-- The Lua API of orch, for editors that read LuaCATS annotations: add the folder lua/meta to the library of
-- your language server. This file is documentation; nothing loads it.
--
-- Contexts, named with each function: P policies and orchestrator.lua, T tools, S trusted scripts
-- (`orch SCRIPT.lua`, `orch -e`). Called elsewhere, a function raises "… is for trusted scripts only".
-- What a later version brings is there by name and raises "… is not available yet".
--
-- Errors: a caller's mistake (type, range, unknown option key) raises; a failure of the world returns
-- nil, message, code. A call that waits suspends only its own task.

---A number of seconds, or a text: "250ms", "30s", "5m", "1h".
---@alias orch.duration number|string

---A number of bytes, or a text: "64K", "256M", "2G" (powers of 1024).
---@alias orch.size integer|string

---What kind of failure it was: the third value of a failed call.
---@alias orch.code
---| "failed"    # the world: a file, a program, an error in Lua
---| "usage"     # a caller's mistake found only at run time
---| "denied"    # by policy
---| "isolation" # QEMU, namespaces, KVM: nothing was run
---| "config"    # configuration, policy or script
---| "upstream"  # an MCP server
---| "limit"     # a budget or limit was hit
---| "timeout"   # its time is over; the message names what set it
---| "cancelled" # the task was cancelled
---| "closed"    # the microVM or client was closed or went away; the message says how

---@class orch
---@field version string "0.1.0" (P T S)
orch = {}

---Monotonic time in seconds, with microseconds; only differences mean something. P T S
---@return number
function orch.now() end

---Suspends the task. T S
---@param time orch.duration
---@return nil, string?, orch.code? # in a cancelled task of a script: nil, message, "cancelled"
function orch.sleep(time) end

---An environment variable; nil when it is not set. S (orchestrator.lua has a function env of its own)
---@param name string
---@return string?
function orch.env(name) end

---Not available yet.
function orch.on(event, fn) end

-- ---- JSON. P T S

---@class orch.json
---@field null userdata null, where a place must be kept: in arrays; in objects a null is nil
orch.json = {}

---A table with keys 1 to n is an array, another an object; {} is an object unless orch.json.array made it.
---Raises on what JSON cannot hold: functions, NaN, text that is not UTF-8, mixed keys, cycles.
---@param value any
---@return string
function orch.json.encode(value) end

---Strict: no duplicate keys, no trailing text, valid UTF-8. An integer beyond 2^53 is opaque: only tostring
---and == work on it, and it is encoded as it came.
---@param text string
---@return any value # or nil, message with the byte
---@return string? message
function orch.json.decode(text) end

---Marks a table as an array, so that an empty one is encoded as []. Returns it.
---@generic T: table
---@param t T
---@return T
function orch.json.array(t) end

-- ---- Log: lines on stderr, shown from level warn on unless -v or --log-level says otherwise. P T S
-- print goes to the log too; in scripts it is always shown.

---@class orch.log
orch.log = {}
---@param message string
---@param fields? table encoded as JSON beside the message
function orch.log.debug(message, fields) end
---@param message string
---@param fields? table
function orch.log.info(message, fields) end
---@param message string
---@param fields? table
function orch.log.warn(message, fields) end
---@param message string
---@param fields? table
function orch.log.error(message, fields) end

-- ---- Tasks. T S

---@class orch.task
orch.task = {}

---@class orch.Task
local Task = {}

---Starts fn in the next turn of the loop. At most 1024 tasks at once. In tools a task belongs to the call
---that spawned it: it shares its budget and ends with it.
---@param fn fun(...): ...
---@param ... any at most 16 arguments
---@return orch.Task? task # or nil, message, "limit"
---@return string? message
---@return orch.code? code
function orch.task.spawn(fn, ...) end

---Waits for the task; what fn returned, or nil, message, code when it failed or was cancelled.
---@return any ...
function Task:join() end

---Asks it to end; its wait returns nil, message, "cancelled". False when it has ended already.
---@return boolean
function Task:cancel() end

-- ---- microVMs

---@class orch.vm
orch.vm = {}

---@class orch.vm.SpawnOptions
---@field image? string default: vm.image of the configuration
---@field memory? orch.size 64M to 4G in whole MiB, default vm.memory; in tools at most that
---@field vcpus? integer 1 to 8, default vm.vcpus; 1 where microVMs are emulated; in tools at most the default
---@field timeout? orch.duration its life. Scripts: default vm.timeout, 0 for none. Tools: default as long as the call, it can only be less
---@field network? string a policy of policies/network.lua, "none" unless said: no network interface (scripts only)
---@field backend? "auto"|"qemu" (scripts only)
---@field name? string a label for `orch vm list` (scripts only)

---A microVM. Scripts: it lives until close(), its timeout or the end of orch. Tools (ctx:vm): until the end of the call.
---When it has ended, whoever ended it, each method returns nil, message, code: what was under way and what is called
---later get the same, `microVM ID: its time of 60 s is over (vm.timeout)` with "timeout", and with "closed" `the guest
---powered off`, `the VMM was killed by signal 9 (Killed)`, `it was closed`, `the call is over`, … The fields stay.
---@class orch.Vm
---@field id string "vm-6b769702"
---@field backend string "qemu"
---@field isolation "hardware"|"emulated" KVM, or QEMU's TCG
---@field image string
---@field spawn_ms number milliseconds from the wish to ready
local Vm = {}

---Spawns a microVM: a clone of the image's template, which the first start on a machine makes. S
---@param options? orch.vm.SpawnOptions
---@return orch.Vm? vm # or nil, message, "isolation"|"limit"|"config"|…
---@return string? message
---@return orch.code? code
function orch.vm.spawn(options) end

---The microVMs of this process. S
---@return { id: string, image: string, backend: string, isolation: string }[]
function orch.vm.list() end

---Not available yet.
function orch.vm.pool(options) end

---@class orch.vm.ExecOptions
---@field stdin? string bytes for standard input; default: /dev/null
---@field env? table<string, string> added to the guest's environment
---@field cwd? string default: the user's home
---@field user? string name or number, default "1000"
---@field timeout? orch.duration the whole process tree is ended after it; in tools what is left of the call's time, which is also the most: a larger one is capped
---@field max_output? orch.size a stream, default 1M, at most 64M unless on_stdout and on_stderr take it; the rest is dropped
---@field on_stdout? fun(bytes: string) called as output comes, instead of collecting it; must not wait
---@field on_stderr? fun(bytes: string)
---@field pty? boolean run it on a terminal
---@field inherit? boolean scripts: standard input, output and error of this process, without a limit
---@field inherit_stdin? boolean scripts: standard input of this process

---@class orch.vm.ExecResult
---@field status integer? exit status, 127 not found, 126 not executable; nil when a signal ended it
---@field signal integer? the signal
---@field failed string? why it could not be started: "not found", "not executable", …
---@field stdout string bytes
---@field stderr string bytes
---@field truncated boolean output was dropped
---@field timed_out boolean
---@field limit string? when timed_out or capped: how long it could take and what to raise for more, "60 s: vm.timeout", "30 s: timeout of lua/tools/build.lua", "5 s: the argument timeout"
---@field capped true? a timeout was asked for that is more than the whole time of the call
---@field ms number

---What came of a program until its microVM failed.
---@class orch.vm.ExecSoFar
---@field stdout string
---@field stderr string
---@field truncated boolean
---@field ms number

---Runs a program in the guest and waits for its end, whatever it is. In tools the guest ends it when the call's time
---is over; a few seconds remain then to use the result. T S
---@param argv string[] program and arguments; no shell unless you name one
---@param options? orch.vm.ExecOptions
---@return orch.vm.ExecResult? result # nil, message, code only when the microVM failed, or no time is left
---@return string? message
---@return orch.code? code
---@return orch.vm.ExecSoFar? so_far # when the program had been started
function Vm:exec(argv, options) end

---Writes a file in the guest, owned by uid 1000. T S
---@param path string absolute
---@param bytes string
---@param options? { mode?: integer } default 420 (0644)
---@return true? ok # or nil, message, code
---@return string? message
---@return orch.code? code
function Vm:write_file(path, bytes, options) end

---Reads a file of the guest, at most 16 MiB of it. T S
---@param path string
---@param options? { offset?: integer, length?: integer } in bytes
---@return string? bytes # or nil, message, code
---@return string? message
---@return orch.code? code
function Vm:read_file(path, options) end

---@param path string
---@return { name: string, type: "file"|"directory"|"link"|"other", mode: integer, size: integer, mtime: integer }[]? entries # or nil, message, code
---@return string? message
---@return orch.code? code
function Vm:list_dir(path) end

---The last lines that VMM and guest console wrote. T S
---@return string? text # or nil, message, code
function Vm:logs() end

---The network policy that its packet filter enforces, or "no interface". T S
---@return string? # or nil, message, code
function Vm:network() end

---What it takes and does: memory of its VMM and of its way to the network (bytes, proportional set size; the
---latter about 20 MB whatever it carries, 0 without a network), open connections, and each rule of its packet
---filter with what it counted. T S
---@return { memory: { vmm: number, uplink: number }, connections: integer, rules: { label: string, packets: number, bytes: number }[] }? # or nil, message, code
---@return string? message
---@return orch.code? code
function Vm:stats() end

---Phases of the start with milliseconds since it was asked for. S
---@return { name: string, ms: number }[]?
function Vm:phases() end

---Ends it at once. T S
function Vm:close() end

-- Not available yet: copy_in, copy_out, changes, pause, resume, snapshot, fork, set_network.

---@class orch.image
orch.image = {}
---Not available yet; use `orch image build`.
function orch.image.build(options) end
---Not available yet; use `orch image list`.
function orch.image.list() end

-- ---- MCP. S

---@class orch.mcp
orch.mcp = {}

---Without tools, resources, resource_templates, prompts and complete it serves what is configured; with any of
---them just those, in this script's state.
---@class orch.mcp.ServeOptions
---@field transport? "stdio"|"http" default stdio
---@field listen? string http: "HOST:PORT" or "unix:PATH"; default: http.listen of the configuration
---@field token? string http: at least 16 characters; default: http.token of the configuration, else a made one
---@field name? string
---@field version? string
---@field instructions? string for the model
---@field tools? orch.Tool[]
---@field resources? orch.Resource[]
---@field resource_templates? orch.ResourceTemplate[]
---@field prompts? orch.Prompt[]
---@field complete? fun(ref: table, argument: { name: string, value: string }, ctx: orch.Ctx, context: table?): string[]|table
---@field command? string[] stdio: a server to put behind the policy, its tools unprefixed on the wire
---@field as? string its name in policies, default "cmd"
---@field protect? boolean orch's own files are read-only to command, default true; needs user namespaces, else code "isolation"
---@field start_timeout? orch.duration from its start until its tools are known, default 5 min; lists and calls wait
---@field timeout? orch.duration of a call to it, anew from each progress, default 1 h

---lua/resources/*.lua beside the configuration return one of these, or an orch.ResourceTemplate.
---@class orch.Resource
---@field uri string
---@field name string
---@field title? string
---@field description? string
---@field mimeType? string
---@field size? integer
---@field annotations? table
---@field icons? table[]
---@field _meta? table
---@field text? string its content; or blob, or read
---@field blob? string base64
---@field read? fun(uri: string, ctx: orch.Ctx): string|table|nil, string? text, { text = } or { blob = }, or a list of such; nil: not there; nil, message: failed

---@class orch.ResourceTemplate
---@field uri_template string "notes://{id}"; {+path} and {path*} may hold "/"
---@field name string
---@field title? string
---@field description? string
---@field mimeType? string
---@field annotations? table
---@field icons? table[]
---@field _meta? table
---@field read fun(uri: string, ctx: orch.Ctx, variables: table<string, string>): string|table|nil, string?

---lua/prompts/*.lua beside the configuration return one of these.
---@class orch.Prompt
---@field name string
---@field title? string
---@field description? string
---@field arguments? { name: string, title?: string, description?: string, required?: boolean }[]
---@field icons? table[]
---@field _meta? table
---@field get fun(args: table<string, string>, ctx: orch.Ctx): string|table|nil, string? text, messages, or { description =, messages = }

---Serves MCP until the input ends (stdio) or it is interrupted. Every tool call is judged and audited.
---@param options? orch.mcp.ServeOptions
---@return integer? status # and why it ended; or nil, message, code
---@return string? why
---@return orch.code? code
function orch.mcp.serve(options) end

---Tells the clients of what is served that it changed: lists, or one resource by its uri. Contexts: script.
---@param what { tools?: boolean, prompts?: boolean, resources?: boolean, uri?: string }
function orch.mcp.changed(what) end

---@class orch.mcp.ConnectOptions
---@field command? string[] program and arguments of a server over stdio; it runs on the host
---@field url? string of a server over Streamable HTTP
---@field headers? table<string, string> for every HTTP request
---@field env? string[] "NAME=value" each; default: the environment of this process
---@field cwd? string
---@field timeout? orch.duration until the handshake is done, default 5 min for a command (it may have to be fetched), 1 min for a url
---@field sandbox? "host" the only one yet
---@field protect? boolean orch's own files, and this script, are read-only to command, as to a server of the thin proxy: for what an agent may steer. Default false
---@field protocol? string a revision, "2025-11-25"; default: asked by server/discover, then initialize. The verdict is kept, of the older era for 5 minutes
---@field elicit? fun(params: table): table|string answers a form: { action = "accept", content = {…} }, or "decline", "cancel"; what content leaves out has the schema's defaults
---@field elicit_url? fun(params: table): table|string the same for questions that send a person to a URL
---@field sample? fun(params: table): table answers sampling/createMessage
---@field roots? table[]|fun(): table[] { { uri = "file:///…", name = … } }
---@field capabilities? table further ones to declare, extensions for example
---@field on_log? fun(params: table) a log message
---@field on_notification? fun(method: string, params: table) any other notification; like on_log it must not wait
---@field auth? table OAuth for the url, see lua/mcp_auth.lua
---@field name? string of the client, default "orch"

---@class orch.mcp.Client
---@field server_info { name: string, version: string }?
---@field capabilities table?
---@field instructions string?
---@field protocol_version string
---@field era "legacy"|"modern" legacy: up to 2025-11-25
local Client = {}

---@class orch.mcp.CallOptions
---@field timeout? orch.duration default 5 min; progress sets its clock back
---@field max_timeout? orch.duration not longer whatever the progress, default ten times timeout
---@field progress? fun(done: number, total: number?, message: string?) must not wait
---@field meta? table for params._meta

---Starts a server, or goes to its url, and connects to it.
---@param options orch.mcp.ConnectOptions
---@return orch.mcp.Client? client # or nil, message, "upstream", "timeout", "denied"
---@return string? message
---@return orch.code? code
function orch.mcp.connect(options) end

---Any request. Lists follow their pages; what a server asks meanwhile is answered by the functions of connect.
---@param method string
---@param params? table
---@param options? orch.mcp.CallOptions
---@return table? result # or nil, message, code, and the JSON-RPC error if the server sent one
---@return string? message
---@return orch.code? code
---@return table? error
function Client:request(method, params, options) end

---@return true? ok # or nil, message, code
function Client:notify(method, params) end

---@return table[]? tools # as the server wrote them, but without those whose x-mcp-header is not valid; or nil, message, code
---@return string? message
---@return orch.code? code
function Client:list_tools(options) end

---@param name string
---@param arguments? table
---@param options? orch.mcp.CallOptions
---@return table? result # the MCP result: content, structuredContent, isError; or nil, message, code
---@return string? message
---@return orch.code? code
function Client:call_tool(name, arguments, options) end

---@return table[]? # or nil, message, code
function Client:list_resources(options) end
---@return table[]? # or nil, message, code
function Client:list_resource_templates(options) end
---@return table? result # { contents = {…} }; or nil, message, code
function Client:read_resource(uri, options) end
---@return table? # or nil, message, code
function Client:subscribe(uri) end
---@return table? # or nil, message, code
function Client:unsubscribe(uri) end
---@return table[]? # or nil, message, code
function Client:list_prompts(options) end
---@return table? result # { messages = {…} }; or nil, message, code
function Client:get_prompt(name, arguments, options) end
---@param ref table { type = "ref/prompt", name = … } or { type = "ref/resource", uri = … }
---@param argument table { name =, value = }
---@param context? table { arguments = {…} }
---@return table? completion # { values = {…}, total =, hasMore = }; or nil, message, code
function Client:complete(ref, argument, context, options) end
---The skills extension.
---@return table[]? skills # entries: uri, frontmatter, resources; or nil, message, code
function Client:list_skills(options) end
---A file of a skill, by default SKILL.md, if it is what the entry says: size, digest, front matter.
---@param entry table of list_skills
---@param uri? string
---@return string? text # or nil, message, code: "denied" when it is another
---@return string? message
---@return orch.code? code
function Client:read_skill(entry, uri, options) end
---@param level string "debug" … "emergency"
---@return table? # or nil, message, code
function Client:set_log_level(level) end

---Modern era: notifications of the kinds named come to on_notification until the task is cancelled.
---@param kinds table { toolsListChanged = true, resourceSubscriptions = { uri, … }, … }
---@return orch.Task
function Client:listen(kinds) end

---@return table? # or nil, message, code
function Client:ping(options) end

---Ends the server, or its session. A command has 2 s from the end of its input, 3 s from SIGTERM, then it is killed.
---What is under way and every later use return nil, message, "closed".
function Client:close() end

-- ---- The host. S

---@class orch.process
orch.process = {}

---Runs a program of the host and waits for it. At most 16 MiB of stdout and 1 MiB of stderr are kept.
---@param argv string[]
---@param options? { stdin?: string, env?: string[], cwd?: string, timeout?: orch.duration } env: "NAME=value" each
---@return { status: integer?, signal: integer?, stdout: string, stderr: string, timed_out: boolean }? result # or nil, message, code
---@return string? message
---@return orch.code? code
function orch.process.run(argv, options) end

---@class orch.fs
orch.fs = {}

---A whole file, at most 64 MiB.
---@param path string
---@return string? bytes # or nil, message, code
---@return string? message
---@return orch.code? code
function orch.fs.read(path) end

---Writes a file whole or not at all (by rename).
---@param path string
---@param bytes string
---@param options? { mode?: integer } default 420 (0644)
---@return true? ok # or nil, message, code
---@return string? message
---@return orch.code? code
function orch.fs.write(path, bytes, options) end

---Names in a directory, without "." and "..", in no order.
---@param path string
---@return string[]? names # or nil, message, code
---@return string? message
---@return orch.code? code
function orch.fs.list(path) end

---@param path string
---@return { type: "file"|"directory"|"other", size: integer, mode: integer, mtime: number }? stat # or nil, message, code
---@return string? message
---@return orch.code? code
function orch.fs.stat(path) end

---Makes a directory and those above it that are missing.
---@param path string
---@param options? { mode?: integer } of those it makes, default 0777 less the umask
---@return true? ok # or nil, message, code
---@return string? message
---@return orch.code? code
function orch.fs.mkdir(path, options) end

---@class orch.http
orch.http = {}
---@class orch.http.Options
---@field url string http or https, without user information; certificates are verified, proxies and cookies are not used
---@field method? string default GET, with a body POST
---@field headers? table<string, string>
---@field body? string
---@field timeout? orch.duration until the whole answer is there, default 60 s; ctx:http: what is left of the call's time, which is also the most
---@field on_data? fun(bytes: string) gets the body as it comes, of any size; without it the body is collected, at most 16 MiB

---One HTTP exchange. A redirect is an answer like others. S
---@param options orch.http.Options
---@return { status: integer, headers: table<string, string>, body: string? }? answer # whatever its status, header names in lower case; or nil, message, code
---@return string? message
---@return orch.code? code # "timeout", "limit", "closed", "upstream"
function orch.http.request(options) end

---@class orch.firewall
orch.firewall = {}
---Compiles a network policy (as in policies/network.lua) to the packet filter of a microVM. Contexts: tool, script.
---@param policy table `{ allow = { { cidr =, ports =, proto = } }, connections =, bandwidth = }`
---@return { chain: string, rule: string, verdict: string }[]? rules in the order of evaluation; nil, message, "config"
function orch.firewall.check(policy) end
---Whether a new flow from a microVM with this policy would pass, and which rule decides. Contexts: tool, script.
---@param policy table
---@param packet { ip: string, port: integer, proto?: "tcp"|"udp" }
---@return "allow"|"deny"|nil decision, string rule nil, message, "config" when the policy is wrong
function orch.firewall.explain(policy, packet) end

-- ---- A tool file (lua/tools/NAME.lua) returns one of these. T

---@class orch.Tool
---@field name string 1 to 64 of A-Za-z0-9_.-, without "__"
---@field title? string
---@field description string
---@field input table JSON Schema 2020-12 of the arguments; type must be "object"; an unknown keyword is a load error. A null that an optional argument's schema refuses counts as absent
---@field output? table JSON Schema of the structured result
---@field annotations? { title?: string, readOnlyHint?: boolean, destructiveHint?: boolean, idempotentHint?: boolean, openWorldHint?: boolean }
---@field timeout? orch.duration of a call, and so of its commands and microVMs; default: vm.timeout of the configuration. It stands still while a template is made and while somebody is asked
---@field run fun(args: table, ctx: orch.Ctx): orch.ToolResult?, string?, orch.code? runs in a task of its own; nil, message, code: failed
---@field task? "optional"|"required" a task of the tasks extension where the client can; required: only so

---A client shows its model the text or the structured part, rarely both: each must tell the whole. Without `output` give
---text alone.
---@class orch.ToolResult
---@field text? string bytes that are not UTF-8 become U+FFFD; default: structured as JSON
---@field structured? table checked against output
---@field is_error? boolean only when the tool could not do its work: what a command answers is none

---One call, as its tool sees it. After the call every use of it raises.
---@class orch.Ctx
---@field session { id: string }
---@field workspace string? the only host directory that tools may see
---@field client { elicit: boolean, elicit_url: boolean, sample: boolean, sample_tools: boolean, roots: boolean } what it can be asked
local Ctx = {}

---A microVM for this call, with the network the deciding rules say; it lives as long as the call.
---@param options? orch.vm.SpawnOptions
---@return orch.Vm? vm # or nil, message, code
---@return string? message
---@return orch.code? code
function Ctx:vm(options) end

---Tells the client how far the call is, when it asked for that.
---@param done number
---@param total? number
---@param message? string
function Ctx:progress(done, total, message) end

---A log message to the client.
---@param level "debug"|"info"|"notice"|"warning"|"error"|"critical"|"alert"|"emergency"
---@param message string
function Ctx:log(level, message) end

---@return boolean
function Ctx:cancelled() end

---A file beneath the workspace, at most 16 MiB; no symlink leads out.
---@param path string
---@return string? bytes # or nil, message, code
---@return string? message
---@return orch.code? code
function Ctx:read_file(path) end

---@param path? string default: the workspace itself
---@return { name: string, type: "file"|"directory"|"link"|"other", size: integer }[]? entries # or nil, message, code
---@return string? message
---@return orch.code? code
function Ctx:list_dir(path) end

---@class orch.Elicit
---@field message string
---@field schema? table JSON Schema of a flat object, a form; default: none, just yes or no
---@field url? string a page to show instead of a form
---@field key? string name of the question in the modern era; default: made up

---Asks the client's user. Waits up to 10 minutes; the tool's timeout stands still meanwhile. The same code serves
---both eras: a client of 2026-07-28 gets `input_required` and repeats its call with the answer.
---@param question orch.Elicit
---@return { action: "accept"|"decline"|"cancel", content: table? }? answer # or nil, message, code ("capability": cannot be asked)
---@return string? message
---@return string? code
function Ctx:elicit(question) end

---@class orch.Sample
---@field prompt? string one message of the user; or messages
---@field messages? table[]
---@field max_tokens? integer default 1000
---@field system? string
---@field temperature? number
---@field stop? string[]
---@field model? table modelPreferences
---@field tools? table[]
---@field tool_choice? table
---@field metadata? table
---@field key? string

---Asks the client's model.
---@param question orch.Sample
---@return { role: string, content: table, model: string, stopReason: string? }? answer # or nil, message, code
---@return string? message
---@return string? code
function Ctx:sample(question) end

---The folders that the client works in.
---@param options? { key?: string }
---@return { uri: string, name: string? }[]? roots # or nil, message, code
---@return string? message
---@return string? code
function Ctx:roots(options) end

---Several questions at once, by name.
---@param questions table<string, { elicit?: orch.Elicit, sample?: orch.Sample, roots?: true }>
---@return table<string, table>? answers # by the same names; or nil, message, code
---@return string? message
---@return string? code
function Ctx:ask(questions) end

---From here on the call is a task (extension io.modelcontextprotocol/tasks): the client has its id and asks for the rest.
---@return true? ok # or nil, message, code ("capability": the client has no tasks)
---@return string? message
---@return string? code
function Ctx:task() end

---For long calls over HTTP: ends the connection of a legacy client, which comes back for the answer after `retry`. Elsewhere
---without effect.
---@param retry? orch.duration
function Ctx:release(retry) end

---One HTTP exchange from this host. Each connection, those of redirects (at most 5) too, must be to an address and port that
---the network of the rules which allow the call lets pass; what is refused is in the audit log (`net_deny`). The URL must
---hold an IPv4 address: names are not looked up yet.
---@param options orch.http.Options
---@return { status: integer, headers: table<string, string>, body: string?, url: string }? answer # of the last redirect; or nil, message, code
---@return string? message
---@return orch.code? code # "denied", "timeout", "limit", "closed", "upstream"
function Ctx:http(options) end

---What vm:exec returned as a tool's result, in text alone: standard output, standard error under a line `[stderr]`, and
---how it ended, `[exit status 3]`, `[killed by signal 9 (SIGKILL)]`, `[ended after 60 s: …]`, `[cut: …]`; `[no output]`
---when there is nothing to say. An error only when the program could not be started or the microVM failed.
---`return ctx:output(vm:exec({ "make", "check" }))`
---@param result orch.vm.ExecResult?
---@param message? string
---@param code? orch.code
---@param so_far? { stdout: string, stderr: string } what it wrote before the microVM failed
---@return orch.ToolResult? # or nil, message, code
---@return string? message
---@return orch.code? code
function Ctx:output(result, message, code, so_far) end

-- Not available yet: call.

-- ---- policies/tools.lua returns one of these. P

---@class orch.ToolPolicy
---@field rules orch.Rule[] every matching rule counts: deny beats ask beats allow; no match, error, time-out: deny
---@field tests? orch.PolicyTest[] run before each load; a failure keeps the old policy in force

---@class orch.Rule
---@field tool string pattern: * is any run, all else literal; without "__" it matches local tools only, "*" alone all
---@field action "allow"|"ask"|"deny"
---@field when? fun(call: orch.Call): any the rule counts when it is truthy; its error denies
---@field reason? string shown to the client
---@field network? string "none" or a policy of policies/network.lua: of the call's microVMs and of ctx:http
---@field rewrite? fun(args: table): table changes the arguments; the result is checked and judged again
---@field redact? string[] PCRE2 patterns, replaced in results and audit log
---@field rate? string "30/min": 1 to 1000000 per s, min, h or day, for each caller
---@field mark? string set on the session when the call is allowed
---@field id? string what the rate is counted by across reloads

---A call is judged as it would be, rewrites and schema included; nothing is taken from a rate, no mark is set.
---@class orch.PolicyTest
---@field name? string told when it fails
---@field call orch.PolicyTestCall
---@field expect "allow"|"ask"|"deny"
---@field network? string the network the call's rules give it, "none" where they name none
---@field reason? string the reason has this text in it
---@field args? table what the tool gets, rewritten
---@field rule? string a rule that matched: its id, or "tools.lua:12"

---@class orch.PolicyTestCall
---@field tool string
---@field args? table what a local tool's schema refuses fails the test; without any only the name is judged
---@field marks? table of the session: { "untrusted" } or { untrusted = true }; `session = { marks = … }` says the same
---@field session? { marks?: table }
---@field caller? string
---@field server? string of a tool that is not configured; else what is before its "__", or "local"
---@field untrusted? { client?: table, tool?: table }

---@class orch.Call
---@field tool string the qualified name: NAME, or UPSTREAM__NAME
---@field server string "local" or the upstream's name
---@field args table
---@field session { id: string, marks: table<string, true> }
---@field caller string who started the session: uid and program
---@field untrusted { client: table, tool: table } what the other side says of itself
local Call = {}

---True when the argument is a path that climbs out of the workspace: absolute, "~", or too many "..".
---A missing argument is none.
---@param key string
---@return boolean
function Call:path_outside(key) end

return orch
