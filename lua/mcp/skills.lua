-- The skills extension, client side: a skill's files are read when asked for, never ahead, and are
-- used only when they are what the skill's entry says: size, digest, and SKILL.md's front matter.
local crypto = require "orch.crypto"
local M = {}

local function hex(s)
  return (s:gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

local function scalar(s)
  local quoted = s:match('^"([^"\\]*)"$') or s:match("^'([^']*)'$")
  if quoted then return quoted end
  if s:find("^[%[{&*!|>%%@`\"']") or s:find(": ", 1, true) or s:find(" #", 1, true) then
    return nil
  end
  return s
end

-- The YAML that front matter is made of: scalars, and one level of maps and lists of them. nil for
-- other, since what cannot be read cannot be compared.
local function front_matter(text)
  local head = text:gsub("\r\n", "\n"):match("^%-%-%-\n(.-\n)%-%-%-\n")
  if not head then return nil end
  local out, open = {}, nil
  for line in head:gmatch("([^\n]*)\n") do
    local key, value = line:match("^([%w_.-]+):%s*(.-)%s*$")
    local sub, inner = line:match("^%s+([%w_.-]+):%s+(.-)%s*$")
    local item = line:match("^%s*%-%s+(.-)%s*$")
    local one = scalar(value or item or inner or "")
    if line:find("^%s*$") or line:find("^%s*#") then
      one = one -- nothing in it
    elseif one == nil or (key and out[key] ~= nil) or (not key and not open) then
      return nil
    elseif key then
      open = value == "" and {} or nil
      out[key] = open or one
    elseif item then
      open[#open + 1] = one
    elseif sub then
      open[sub] = one
    else
      return nil
    end
  end
  return out
end

local function same(a, b)
  if type(a) ~= "table" or type(b) ~= "table" then
    return type(a) ~= "table" and type(b) ~= "table" and tostring(a) == tostring(b)
  end
  for k, v in pairs(a) do
    if not same(v, b[k]) then return false end
  end
  for k in pairs(b) do
    if a[k] == nil then return false end
  end
  return true
end

local function listed(entry, uri)
  for _, r in ipairs(type(entry.resources) == "table" and entry.resources or {}) do
    if type(r) == "table" and r.uri == uri then return r end
  end
end

-- The text of one file of a skill, by default SKILL.md; nil, message, code when it is not what the
-- entry says.
function M.read(client, entry, uri, opts)
  uri = uri or entry.uri
  local said = listed(entry, uri)
  if not said then return nil, uri .. " is not a file of this skill", "denied" end
  local result, why, code = client:read_resource(uri, opts)
  if not result then return nil, why, code end
  local content = type(result.contents) == "table" and result.contents[1]
  local text = type(content) == "table" and content.text
  if type(text) ~= "string" then return nil, uri .. " has no text", "upstream" end
  if type(said.size) ~= "number" or #text ~= said.size then
    return nil, ("%s has %d bytes, not %s as its entry says"):format(uri, #text,
      tostring(said.size)), "denied"
  elseif said.digest ~= "sha256:" .. hex(crypto.sha256(text)) then
    return nil, uri .. " is not what its entry's digest says", "denied"
  elseif uri == entry.uri and not same(entry.frontmatter, front_matter(text)) then
    return nil, uri .. " describes itself otherwise than its entry does", "denied"
  end
  return text
end

return M
