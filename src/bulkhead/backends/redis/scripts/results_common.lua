-- What each script of the results has besides.
--
-- A result begins with where it is listed: "<state>:<bytes of the queue's name>:<queue>:". The same before its id is its
-- member in {namespace}:results-end, which is scored by when it expires.

local ENDS = P .. 'results-end'
local LISTS = P .. 'results' -- "<state>:<queue>" of each list

local function result_key(id)
    return P .. 'result:' .. id
end

local function list_key(state, queue)
    return P .. 'results:' .. state .. ':' .. queue
end

-- The state, the queue, both as one text, and what follows.
local function split(entry)
    local state, size, start = string.match(entry, '^(%a+):(%d+):()')
    local stop = start + tonumber(size)
    return state, string.sub(entry, start, stop - 1), string.sub(entry, 1, stop), string.sub(entry, stop + 1)
end

-- Take an outcome out of the list that its stored beginning names.
local function unlist(id, entry)
    local state, queue, place = split(entry)
    call('ZREM', list_key(state, queue), id)
    call('ZREM', ENDS, place .. id)
end

-- Take up to `limit` outcomes out of the lists that have expired; returns how many there were.
local function sweep(t, limit)
    local members = call('ZRANGEBYSCORE', ENDS, '-inf', t, 'LIMIT', 0, limit)
    for _, member in ipairs(members) do
        local state, queue, _, id = split(member)
        call('ZREM', list_key(state, queue), id)
    end
    if #members > 0 then
        call('ZREM', ENDS, unpack(members))
    end
    return #members
end
