-- How many jobs are where. Returns for each queue that holds one: its name, ready, scheduled, running, dead, and how long the
-- oldest ready one has been due.

local t = now()
local found = {}
for _, queue in ipairs(call('HKEYS', KEYS[1])) do
    put_in_line(queue, t, 1000)
    local ready, total, oldest = 0, 0, t
    for _, level in ipairs(levels_of(queue)) do
        local key = waiting_key(level, queue)
        ready = ready + call('ZCOUNT', key, '-inf', t)
        total = total + call('ZCARD', key)
        local first = call('ZRANGE', key, 0, 0, 'WITHSCORES')
        oldest = math.min(oldest, tonumber(first[2] or t))
    end
    -- Those of them whose while is over are more than a call moves, and wait in fact.
    local back, over = call('ZCARD', back_key(queue)), call('ZCOUNT', back_key(queue), '-inf', t)
    ready, total = ready + over, total + back
    local running = call('ZCARD', running_key(queue))
    local expired = call('ZCOUNT', running_key(queue), '-inf', t)
    local dead = call('ZCARD', dead_key(queue))
    if total + running + dead == 0 then
        call('HDEL', KEYS[1], queue)
    else
        found[#found + 1] = { queue, ready + expired, total - ready, running - expired, dead, t - oldest }
    end
end
return found
