-- Keep outcomes. ARGV[1]: columns of ids (each once), places ("<state>:<bytes>:<queue>:"), end times, milliseconds to keep,
-- encoded outcomes.

local ids, places, ended, keeps, blobs = unpack(cmsgpack.unpack(ARGV[1]))
local t = now()
-- Twice as many as are kept, so that there is an end to what has expired.
sweep(t, 2 * #ids + 10)
local lists, ends, expiries = {}, {}, {}
local keys = {}
for i, id in ipairs(ids) do
    keys[i] = result_key(id)
end
local all_new = call('EXISTS', unpack(keys)) == 0
for i, id in ipairs(ids) do
    local key, place = keys[i], places[i]
    -- 200 characters of a queue's name are at most 800 bytes
    local before = all_new and '' or call('GETRANGE', key, 0, 1000)
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
    ends[2 * i - 1] = expiry[2]
    ends[2 * i] = place .. id
end
for place, list in pairs(lists) do
    local state, queue = split(place)
    call('ZADD', list_key(state, queue), unpack(list))
    call('SADD', LISTS, state .. ':' .. queue)
end
call('ZADD', ENDS, unpack(ends))
return 1
