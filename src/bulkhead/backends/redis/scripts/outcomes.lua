-- A part of the outcomes of a state, the one that ended last first. ARGV: state, offset, limit, queue (all without it).
-- Returns pairs of id and outcome.

local state, offset, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local sets = {}
if ARGV[4] then
    sets[1] = list_key(state, ARGV[4])
else
    for _, name in ipairs(call('SMEMBERS', LISTS)) do
        if string.sub(name, 1, #state + 1) == state .. ':' then
            sets[#sets + 1] = P .. 'results:' .. name
        end
    end
end
local found = {}
for _, entry in ipairs(page(sets, '-inf', '+inf', true, offset, limit)) do
    local outcome = call('GET', result_key(entry[2]))
    if outcome then
        found[#found + 1] = { entry[2], outcome }
    else
        call('ZREM', entry[1], entry[2])
    end
end
return found
