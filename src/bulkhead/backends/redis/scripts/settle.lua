-- End claims, each together with keeping its outcome. ARGV[1]: columns of ids, queues, tokens, reasons (none: the job is
-- forgotten; else it becomes a dead letter), errors of dead letters, and of outcomes places (none: nothing is kept), end
-- times, milliseconds to keep, encoded outcomes.
-- Returns a character for each: 1 done, now or by an earlier call whose outcome is kept; 0 the claim was lost.

even_when_full()
local ids, queues, tokens, reasons, errors, places, ended, keeps, blobs = unpack(cmsgpack.unpack(ARGV[1]))
local t = now()
local answers, jobs, done, chosen, missed = {}, {}, {}, {}, {}
for i, id in ipairs(ids) do
    local job = fields(id, 'token', 'remember', 'priority')
    if job[1] and job[1] == tokens[i] and not done[id] then
        answers[i] = '1'
        jobs[i], done[id] = job, true
        if places[i] then
            chosen[#chosen + 1] = i
        end
    else
        answers[i] = '0'
        missed[#missed + 1] = i
        drop_unless_held(id, queues[i], job[1])
    end
end

-- Why first: what is wrong with a key of the outcomes then leaves the claims as they are.
if #chosen > 0 then
    keep_outcomes(chosen, ids, places, ended, keeps, blobs, true, t)
end
for _, i in ipairs(missed) do
    if places[i] and call('GET', result_key(ids[i])) == places[i] .. blobs[i] then
        answers[i] = '1'
    end
end

local settled, keys = {}, {}
for i, id in ipairs(ids) do
    local job = jobs[i]
    if job then
        local key, queue = job_key(id), queues[i]
        if reasons[i] then
            withdraw(id, queue, job[3])
            call('HSET', key, 'buried', t, 'reason', reasons[i])
            if errors[i] then
                call('HSET', key, 'error', errors[i])
            end
            call('HDEL', key, 'token')
            -- A microsecond each, so that the last one of a call is the newest.
            call('ZADD', dead_key(queue), t + i, id)
        else
            settled[queue] = settled[queue] or { priorities = {} }
            local some = settled[queue]
            some[#some + 1] = id
            some.priorities[#some] = job[3]
            if job[2] then
                forget(id, job[2])
            else
                keys[#keys + 1] = key
            end
        end
    end
end
for queue, some in pairs(settled) do
    -- Those that are missing had been put back because their lease had run out.
    if call('ZREM', running_key(queue), unpack(some)) < #some then
        for n, id in ipairs(some) do
            call('ZREM', waiting_key(some.priorities[n], queue), id)
        end
    end
end
if #keys > 0 then
    call('DEL', unpack(keys))
end
return table.concat(answers)
