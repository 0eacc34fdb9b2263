-- Make dead letters ready again, as if enqueued now. ARGV[1]: ids. Returns a character for each: 1 done, 0 no dead letter.

local ids = cmsgpack.unpack(ARGV[1])
local t = now()
local answers = {}
for i, id in ipairs(ids) do
    local key = job_key(id)
    local job = fields(id, 'queue', 'priority', 'buried')
    answers[i] = '0'
    if job[1] and job[3] then
        local due = t - #ids + i
        call('ZREM', dead_key(job[1]), id)
        call('HDEL', key, 'buried', 'reason', 'error', 'attempt', 'enqueued', 'cancelled')
        call('HSET', key, 'due', due)
        call('ZADD', waiting_key(job[2], job[1]), due, id)
        note(job[1], job[2] or '0')
        ring(job[1])
        answers[i] = '1'
    end
end
return table.concat(answers)
