-- Remove jobs that are not running. ARGV[1]: ids. ARGV[2]: "delete", which takes dead letters too, "dead", which takes nothing
-- else, or "cancel", which leaves them and asks the consumers of running jobs to end them.
-- Returns a character for each: r removed, q requested, u unknown or untouched.

even_when_full()
local is_cancel = ARGV[2] == 'cancel'
local t = now()
local answers = {}
for i, id in ipairs(cmsgpack.unpack(ARGV[1])) do
    local key = job_key(id)
    local job = fields(id, 'queue', 'priority', 'token', 'buried', 'remember')
    answers[i] = 'u'
    if job[4] then
        if not is_cancel then
            call('ZREM', dead_key(job[1]), id)
            forget(id, job[5])
            answers[i] = 'r'
        end
    elseif job[1] and ARGV[2] ~= 'dead' then
        if not leased_until(id, job[1], job[3], t) then
            withdraw(id, job[1], job[2])
            forget(id, job[5])
            answers[i] = 'r'
        elseif is_cancel then
            call('HSET', key, 'cancelled', 1)
            answers[i] = 'q'
        end
    end
end
return table.concat(answers)
