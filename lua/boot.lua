-- Runs first in every state, before anything else can take a reference to what it replaces.
local bounded, wait = ...
local create, raw_resume, running, yield = coroutine.create, coroutine.resume, coroutine.running, coroutine.yield
local error, pcall, select, type = error, pcall, select, type

-- Every level of nested coroutines costs C stack.
local MAX_DEPTH = 100
local depth = setmetatable({}, { __mode = "k" })

-- A C function that waits yields `wait`: handed up until the task's own thread yields it to the host,
-- whose results are handed down again.
local function pass(co, ...)
    local _, first = ...
    if first ~= wait then
        return ...
    end
    return pass(co, raw_resume(co, yield(wait)))
end

local function resume(co, ...)
    if type(co) ~= "thread" then
        error("bad argument #1 to 'resume' (coroutine expected)", 2)
    end
    local self = running()
    local level = (self and depth[self] or 0) + 1
    if level > MAX_DEPTH then
        return false, "coroutines are nested more than 100 deep"
    end
    depth[co] = level
    return pass(co, raw_resume(co, ...))
end

local function unwrap(ok, ...)
    if not ok then
        error((...), 0)
    end
    return ...
end

coroutine.resume = resume
function coroutine.wrap(fn)
    local co = create(fn)
    return function(...)
        return unwrap(resume(co, ...))
    end
end

-- In the interpreter's own xpcall the handler of an error that the budget's hook raised would run with
-- hooks off, without end if it loops. This one calls the handler after the stack is unwound.
if bounded then
    local function handle(handler, ok, ...)
        if ok then
            return true, ...
        end
        return false, select(2, pcall(handler, ...))
    end
    function xpcall(fn, handler, ...)
        return handle(handler, pcall(fn, ...))
    end
end
