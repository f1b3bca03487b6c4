local orch = require "orch"
local internal = require "orch.internal"
local cli = require "cli"
local recipe = require "recipe"

local function images_dir() return internal.paths().cache .. "/images" end

local function size(bytes) return ("%.1f MiB"):format(bytes / 1048576) end

local function names()
  local out = {}
  for _, name in ipairs(orch.fs.list(images_dir()) or {}) do
    if name:find("^[a-z][a-z0-9-]*$") and #name < 64 then out[#out + 1] = name end
  end
  table.sort(out)
  return out
end

local function shipped()
  local out = { "base" }
  for _, file in ipairs(orch.fs.list(internal.paths().share .. "/lua/images") or {}) do out[#out + 1] = file:match "^(.*)%.lua$" end
  table.sort(out)
  return out
end

-- What to build: an image's name and its recipe (nil: base), or nil, message, class.
local function plan(word, fresh)
  if word == "base" then return word end
  local path = internal.paths().share .. "/lua/images/" .. word .. ".lua"
  if word:find("/", 1, true) or word:find "%.lua$" then
    path = cli.absolute(word)
  elseif not word:find "^%l[%l%d-]*$" or not cli.exists(path) then
    return nil, ("no recipe named %s; there are %s, or name the file of yours"):format(word, table.concat(shipped(), ", ")), "usage"
  end
  local t, why, code = internal.recipe(path)
  if not t then return nil, why, code end
  local p, errors = recipe.plan(t)
  if not p then return nil, path .. ": " .. table.concat(errors, "\n" .. path .. ": "), "config" end
  p.sources, p.fresh = recipe.sources(p.suite), fresh
  return p.name, p
end

local function build(opts, words, _, name)
  local ok, why, code = cli.use_kernel(opts)
  if not ok then return cli.fail(name, why, code == "usage" and code or 1) end
  local what, how, class = plan(words[1], opts.fresh)
  if not what then return cli.fail(name, how, class) end
  local image
  image, why, code = internal.image_build(what, how)
  if not image then return cli.fail(name, why, code) end
  cli.out(("%s  %s  kernel %s  %s\n"):format(
    image.name, image.id:sub(1, 12), cli.line(image.kernel_release), size(image.bytes)))
  return 0
end

local function list(opts)
  local all, rows = {}, { { "NAME", "ID", "KERNEL", "SIZE" } }
  for _, name in ipairs(names()) do
    local image, why = internal.image_find(name)
    all[#all + 1] = image or { name = name, problem = why }
    rows[#rows + 1] = image and { name, image.id:sub(1, 12), image.kernel_release, size(image.bytes) }
      or { name, "-", why, "" }
  end
  if opts.json then
    cli.json(orch.json.array(all))
  elseif all[1] then
    cli.columns(rows)
  else
    cli.out("no image is built; the first microVM builds base; for Debian: orch image build debian\n")
  end
  return 0
end

-- The templates of an image; of images that are no longer there without an id.
local function templates_of(id)
  local out, dir = {}, internal.paths().cache .. "/templates"
  for _, key in ipairs(orch.fs.list(dir) or {}) do
    local text = orch.fs.read(dir .. "/" .. key .. "/meta.json")
    local meta = text and orch.json.decode(text)
    local of = type(meta) == "table" and meta.image_id
    if of and (of == id or not id and not cli.exists(images_dir() .. "/" .. of)) then out[#out + 1] = { path = dir .. "/" .. key, meta = meta } end
  end
  return out
end

local function inspect(opts, words, _, name)
  local image, why, code = internal.image_find(words[1])
  if not image then return cli.fail(name, why, code) end
  local rows = {}
  for _, key in ipairs { "name", "id", "kernel_release", "kernel", "initrd", "disk" } do
    rows[#rows + 1] = { key, image[key] }
  end
  rows[#rows + 1] = { "size", size(image.bytes) }
  image.templates = orch.json.array {}
  for i, t in ipairs(templates_of(image.id)) do
    local m = t.meta
    image.templates[i] = { path = t.path, accel = m.accel, vcpus = m.vcpus, memory_bytes = m.memory_bytes }
    rows[#rows + 1] = { "template", ("%s: %s, %s, %s processor(s)"):format(t.path, tostring(m.accel),
      size(tonumber(m.memory_bytes) or 0), tostring(m.vcpus)) }
  end
  if opts.json then cli.json(image) else cli.columns(rows) end
  return 0
end

local function remove_dir(path)
  for _, entry in ipairs(orch.fs.list(path) or {}) do os.remove(path .. "/" .. entry) end
  return os.remove(path)
end

local function manifest_of(path)
  local text, m = orch.fs.read(path .. "/manifest") or "", {}
  for key, value in text:gmatch("([%l]+) ([^\n]+)\n") do m[key] = value end
  return m
end

local function rm(_, words, _, name)
  local dir, image = images_dir(), words[1]
  if not image:find("^[a-z][a-z0-9-]*$") or not cli.exists(dir .. "/" .. image .. "/manifest") then
    return cli.fail(name, "no image named " .. image .. " is built; there are: "
      .. (table.concat(names(), ", "):gsub("^$", "none")), 1)
  end
  local ok, why = os.remove(dir .. "/" .. image)
  if not ok then return cli.fail(name, why, 1) end
  -- Its content and what earlier builds of it left; not what another name stands for.
  local kept = {}
  for _, other in ipairs(names()) do kept[manifest_of(dir .. "/" .. other).id or ""] = true end
  for _, id in ipairs(orch.fs.list(dir) or {}) do
    local m = #id == 64 and manifest_of(dir .. "/" .. id) or {}
    if m.id == id and m.name == image and not kept[id] then
      ok, why = remove_dir(dir .. "/" .. id)
      if not ok then return cli.fail(name, why, 1) end
    end
  end
  for _, t in ipairs(templates_of()) do remove_dir(t.path) end
  cli.out("removed ", image, "; microVMs that run from it go on\n")
  return 0
end

local JSON = { "--json", nil, "print JSON" }

return cli.main("image", {
  usage = "build|list|inspect|rm …",
  about = "Guest images: what a microVM boots from. They are kept in the cache directory, never on the system.",
  commands = {
    { "build", spec = {
      summary = "build an image: base, debian, or one by a recipe of yours",
      usage = "NAME|FILE.lua [--fresh] [--kernel FILE [--modules DIR]]",
      about = "Builds a guest image, or finds that it is built already. Progress is on stderr; nothing needs root.\n"
        .. "  base      Debian's cloud kernel, taken with apt-get download and never installed, and static busybox\n"
        .. "  debian    the same kernel and Debian 12 with git, curl, jq and python3; the default once it is built\n"
        .. "  FILE.lua  an image by your own recipe; start from a copy of "
        .. internal.paths().share .. "/lua/images/debian.lua",
      options = { { "--fresh", nil, "install today's packages, though the image is built already" },
        { "--kernel", "FILE", "another kernel (bzImage or vmlinux) than Debian's" },
        { "--modules", "DIR", "its /lib/modules/VERSION, when virtio is not built in" } },
      examples = { "orch image build debian", "orch image build ./toolbox.lua",
        "orch image build base --kernel ./bzImage --modules ./lib/modules/6.1.0" },
      words = { 1, 1 }, run = build } },
    { "list", spec = { summary = "the images that are built", usage = "[--json]",
      about = "Lists the images that are built.", options = { JSON },
      words = { 0, 0 }, run = list } },
    { "inspect", spec = { summary = "an image's files and templates", usage = "NAME [--json]",
      about = "Shows what an image is made of, and its templates.",
      options = { JSON }, examples = { "orch image inspect debian" }, words = { 1, 1 }, run = inspect } },
    { "rm", spec = { summary = "remove an image and its templates", usage = "NAME",
      about = "Removes an image and the templates made from it from the cache.",
      examples = { "orch image rm debian" }, words = { 1, 1 }, run = rm } },
  },
}, ...)
