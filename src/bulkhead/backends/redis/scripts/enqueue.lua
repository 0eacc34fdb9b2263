-- Keep jobs. KEYS[2]: {namespace}:stamp. ARGV[1]: columns of ids, queues, bodies, priorities, delays, due times, remember.
-- Returns a character for each: 1 kept, 0 its id is taken.

local ids, queues, bodies, priorities, delays, dues, remembers = unpack(cmsgpack.unpack(ARGV[1]))
local t = now()

local keys = {}
for i, id in ipairs(ids) do
    keys[i] = job_key(id)
end
local all_free = call('EXISTS', unpack(keys)) == 0

-- Jobs that are due at once get the last microseconds up to now, one each and none twice: that is their order.
local stamp = t - #ids
local last = tonumber(call('GET', KEYS[2]) or '0')
if last > stamp and last < t + 1000 then -- beyond that the clock was set back
    stamp = last
end

-- Those of this call that are due at the same later instant are put a microsecond apart.
local taken = {}
local seen, answers, sets, bells = {}, {}, {}, {}
for i, id in ipairs(ids) do
    if seen[id] or (not all_free and call('EXISTS', keys[i]) == 1) then
        answers[i] = '0'
    else
        seen[id] = true
        answers[i] = '1'
        local queue, priority, due = queues[i], priorities[i], math.min(t + delays[i], LAST)
        if dues[i] ~= 0 then
            due = dues[i]
        end
        if due <= t then
            stamp = stamp + 1
            due = integer(stamp)
            call('HSET', keys[i], 'queue', queue, 'body', bodies[i], 'due', due)
            bells[queue] = true
        else
            taken[due] = (taken[due] or -1) + 1
            if due < t + SECOND then
                bells[queue] = true
            end
            due = integer(due + taken[due])
            call('HSET', keys[i], 'queue', queue, 'body', bodies[i], 'due', due, 'enqueued', integer(t))
        end
        if priority ~= 0 then
            call('HSET', keys[i], 'priority', priority)
        end
        if remembers[i] ~= 0 then
            call('HSET', keys[i], 'remember', integer(remembers[i]))
        end
        local key = waiting_key(priority, queue)
        local set = sets[key]
        if not set then
            set = { queue = queue, priority = priority }
            sets[key] = set
        end
        set[#set + 1] = due
        set[#set + 1] = id
    end
end

for key, set in pairs(sets) do
    call('ZADD', key, unpack(set))
    note(set.queue, set.priority)
end
for queue in pairs(bells) do
    ring(queue)
end
call('SET', KEYS[2], integer(stamp))
return table.concat(answers)
