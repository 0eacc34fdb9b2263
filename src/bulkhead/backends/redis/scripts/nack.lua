-- Give jobs back. ARGV[1]: columns of ids, queues, tokens, delays, whether the attempt counts, errors.
-- Returns a character for each: 1 done, 0 the claim was lost.

local ids, queues, tokens, delays, counts, errors = unpack(cmsgpack.unpack(ARGV[1]))
local t = now()
local answers = {}
for i, id in ipairs(ids) do
    local key, queue = job_key(id), queues[i]
    local job = call('HMGET', key, 'token', 'priority', 'due', 'enqueued', 'attempt')
    if job[1] and job[1] == tokens[i] then
        answers[i] = '1'
        local due = t + delays[i]
        local attempt = whole(job[5]) - (counts[i] and 0 or 1)
        withdraw(id, queue, job[2])
        call('HSET', key, 'due', due, 'enqueued', job[4] or job[3], 'attempt', attempt)
        if errors[i] then
            call('HSET', key, 'error', errors[i])
        end
        call('HDEL', key, 'token')
        call('ZADD', waiting_key(job[2], queue), due, id)
        note(queue, job[2] or '0')
        ring_if_soon(queue, due, t)
    else
        answers[i] = '0'
        drop_unless_held(id, queue, job[1])
    end
end
return table.concat(answers)
