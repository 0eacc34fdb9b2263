-- Forget jobs that are settled. ARGV[1]: columns of ids, queues, tokens.
-- Returns a character for each: 1 done, 0 the claim was lost.

local ids, queues, tokens = unpack(cmsgpack.unpack(ARGV[1]))
local answers, done, priorities, settled, keys = {}, {}, {}, {}, {}
for i, id in ipairs(ids) do
    local queue = queues[i]
    local job = call('HMGET', job_key(id), 'token', 'remember', 'priority')
    if job[1] and job[1] == tokens[i] and not done[id] then
        answers[i] = '1'
        done[id] = true
        settled[queue] = settled[queue] or {}
        table.insert(settled[queue], id)
        priorities[id] = job[3]
        if job[2] then
            forget(id, job[2])
        else
            keys[#keys + 1] = job_key(id)
        end
    else
        answers[i] = '0'
        drop_unless_held(id, queue, job[1])
    end
end
for queue, some in pairs(settled) do
    -- Those that are missing had been put back because their lease had run out.
    if call('ZREM', running_key(queue), unpack(some)) < #some then
        for _, id in ipairs(some) do
            call('ZREM', waiting_key(priorities[id], queue), id)
        end
    end
end
if #keys > 0 then
    call('DEL', unpack(keys))
end
return table.concat(answers)
