-- Make claimed jobs dead letters. ARGV[1]: columns of ids, queues, tokens, reasons, errors.
-- Returns a character for each: 1 done, 0 the claim was lost.

local ids, queues, tokens, reasons, errors = unpack(cmsgpack.unpack(ARGV[1]))
local t = now()
local answers = {}
for i, id in ipairs(ids) do
    local key, queue = job_key(id), queues[i]
    local job = call('HMGET', key, 'token', 'priority')
    if job[1] and job[1] == tokens[i] then
        answers[i] = '1'
        withdraw(id, queue, job[2])
        call('HSET', key, 'buried', t, 'reason', reasons[i])
        if errors[i] then
            call('HSET', key, 'error', errors[i])
        end
        call('HDEL', key, 'token', 'cancelled')
        -- A microsecond each, so that the last one of a call is the newest.
        call('ZADD', dead_key(queue), t + i, id)
    else
        answers[i] = '0'
        drop_unless_held(id, queue, job[1])
    end
end
return table.concat(answers)
