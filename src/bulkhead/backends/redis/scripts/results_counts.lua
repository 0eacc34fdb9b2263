-- How many outcomes there are. Returns for each list its "<state>:<queue>" and its length.

local found = {}
for _, name in ipairs(call('SMEMBERS', LISTS)) do
    local length = call('ZCARD', P .. 'results:' .. name)
    if length == 0 then
        call('SREM', LISTS, name)
    else
        found[#found + 1] = { name, length }
    end
end
return found
