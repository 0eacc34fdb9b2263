-- What each script of the registry has besides. {namespace}:entries has the keys, all with score 0, so that they are sorted;
-- {namespace}:entries-end those that expire, by when.

local NAMES = P .. 'entries'
local ENDS = P .. 'entries-end'

local function entry_key(name)
    return P .. 'entry:' .. name
end

local function drop(name)
    call('DEL', entry_key(name))
    call('ZREM', NAMES, name)
    call('ZREM', ENDS, name)
end

-- Forget some names whose values have expired.
local function sweep(t, limit)
    for _, name in ipairs(call('ZRANGEBYSCORE', ENDS, '-inf', t, 'LIMIT', 0, limit)) do
        drop(name)
    end
end
