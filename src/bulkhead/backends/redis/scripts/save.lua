-- Keep outcomes. ARGV[1]: columns of ids, places ("<state>:<bytes>:<queue>:"), end times, milliseconds to keep, encoded outcomes.

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
        -- Race: the outcome before may be of this very call, and not be listed yet.
        local state, queue, old = split(before)
        if lists[old] then
            lists[old][id] = nil
            ends[old .. id] = nil
        end
    end
    call('SET', key, place .. blobs[i], 'PX', text(keeps[i]))
    lists[place] = lists[place] or {}
    lists[place][id] = text(ended[i])
    ends[place .. id] = text(t + keeps[i] * 1000)
end

local function pairs_of(scores)
    local flat = {}
    for member, score in pairs(scores) do
        flat[#flat + 1] = score
        flat[#flat + 1] = member
    end
    return flat
end

for place, scores in pairs(lists) do
    local flat = pairs_of(scores)
    if #flat > 0 then
        local state, queue = split(place)
        call('ZADD', list_key(state, queue), unpack(flat))
        call('SADD', LISTS, state .. ':' .. queue)
    end
end
if next(ends) then
    call('ZADD', ENDS, unpack(pairs_of(ends)))
end
return 1
