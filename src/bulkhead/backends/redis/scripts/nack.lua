-- Give jobs back. ARGV[1]: columns of ids, queues, tokens, delays, whether the attempt counts, errors, whether it
-- keeps its place.
-- Returns a character for each: 1 done, 0 the claim was lost.

even_when_full()
local ids, queues, tokens, delays, counts, errors, keeps = unpack(cmsgpack.unpack(ARGV[1]))
local t = now()
local answers = {}
for i, id in ipairs(ids) do
    local key, queue = job_key(id), queues[i]
    local job = fields(id, 'token', 'priority', 'due', 'enqueued', 'attempt')
    if job[1] and job[1] == tokens[i] then
        answers[i] = '1'
        local due = math.min(t + delays[i], LAST)
        local attempt = whole(job[5]) - (counts[i] and 0 or 1)
        local set, score = waiting_key(job[2], queue), due
        if keeps[i] then
            set = delays[i] > 0 and back_key(queue) or set
            due = integer(whole(job[3]))
            score = delays[i] > 0 and score or due
        end
        withdraw(id, queue, job[2])
        call('HSET', key, 'due', due, 'enqueued', job[4] or job[3], 'attempt', attempt)
        if errors[i] then
            call('HSET', key, 'error', errors[i])
        end
        call('HDEL', key, 'token')
        call('ZADD', set, score, id)
        note(queue, job[2] or '0')
        ring_if_soon(queue, t + delays[i], t)
    else
        answers[i] = '0'
        drop_unless_held(id, queue, job[1])
    end
end
return table.concat(answers)
