-- What each script of the results has besides.
--
-- A result begins with where it is listed: "<state>:<bytes of the queue's name>:<queue>:". The same before its id is its
-- member in {namespace}:results-end, which is scored by when it expires. A packed list follows, whose first two are the attempt
-- and when the job was enqueued (not in those that were saved by earlier versions); the others are read by clients only.

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

-- The attempt and the instant at the beginning of a packed list; nil of one by an earlier version.
local function order_of(blob)
    -- The list's own header is one byte.
    local behind, attempt = cmsgpack.unpack_one(blob, 1)
    if type(attempt) == 'number' then
        local _, enqueued = cmsgpack.unpack_one(blob, behind)
        return attempt, enqueued
    end
end

-- Tell whether an outcome comes too late to take the place of one that is kept: base.py, `is_outdated`.
local function is_outdated(place, blob, entry)
    local state, _, _, rest = split(entry)
    local attempt, enqueued = order_of(rest)
    local new_attempt, new_enqueued = order_of(blob)
    if enqueued ~= new_enqueued then
        return false
    end
    if attempt ~= new_attempt then
        return new_attempt < attempt
    end
    return state ~= 'running' and split(place) == 'running'
end

-- Keep outcomes: columns, of which only those places that `chosen` has are taken, an id at most once. Of `is_held` ones no
-- outcome can be too late.
local function keep_outcomes(chosen, ids, places, ended, keeps, blobs, is_held, t)
    -- Twice as many as are kept, so that there is an end to what has expired.
    sweep(t, 2 * #chosen + 10)
    local lists, ends, expiries, keys = {}, {}, {}, {}
    for n, i in ipairs(chosen) do
        keys[n] = result_key(ids[i])
    end
    local all_new = call('EXISTS', unpack(keys)) == 0
    for n, i in ipairs(chosen) do
        local id, key, place = ids[i], keys[n], places[i]
        -- 200 characters of a queue's name are at most 800 bytes
        local before = all_new and '' or call('GETRANGE', key, 0, 1000)
        local is_late = before ~= '' and not is_held and is_outdated(place, blobs[i], before)
        if not is_late then
            if before ~= '' and string.sub(before, 1, #place) ~= place then
                unlist(id, before)
            end
            local keep = keeps[i]
            local expiry = expiries[keep]
            if not expiry then
                expiry = { integer(keep), integer(t + keep * 1000) }
                expiries[keep] = expiry
            end
            call('SET', key, place .. blobs[i], 'PX', expiry[1])
            local list = lists[place]
            if not list then
                list = {}
                lists[place] = list
            end
            list[#list + 1] = integer(ended[i])
            list[#list + 1] = id
            ends[#ends + 1] = expiry[2]
            ends[#ends + 1] = place .. id
        end
    end
    for place, list in pairs(lists) do
        local state, queue = split(place)
        call('ZADD', list_key(state, queue), unpack(list))
        call('SADD', LISTS, state .. ':' .. queue)
    end
    if #ends > 0 then
        call('ZADD', ENDS, unpack(ends))
    end
end
