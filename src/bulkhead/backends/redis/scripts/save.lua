-- Keep outcomes. ARGV[1]: columns of ids (each once), places ("<state>:<bytes>:<queue>:"), end times, milliseconds to keep,
-- encoded outcomes.

local ids, places, ended, keeps, blobs = unpack(cmsgpack.unpack(ARGV[1]))
local t = now()
-- Twice as many as are kept, so that there is an end to what has expired.
sweep(t, 2 * #ids + 10)
local lists, ends = {}, {}
for i, id in ipairs(ids) do
    local key, place = result_key(id), places[i]
    local before = call('GETRANGE', key, 0, 1000) -- 200 characters of a queue's name are at most 800 bytes
    if before ~= '' and string.sub(before, 1, #place) ~= place then
        unlist(id, before)
    end
    call('SET', key, place .. blobs[i], 'PX', integer(keeps[i]))
    local list = lists[place]
    if not list then
        list = {}
        lists[place] = list
    end
    list[#list + 1] = ended[i]
    list[#list + 1] = id
    ends[2 * i - 1] = t + keeps[i] * 1000
    ends[2 * i] = place .. id
end
for place, list in pairs(lists) do
    local state, queue = split(place)
    call('ZADD', list_key(state, queue), unpack(list))
    call('SADD', LISTS, state .. ':' .. queue)
end
call('ZADD', ENDS, unpack(ends))
return 1
