-- Let leases end later. ARGV[1]: columns of ids, queues, tokens. ARGV[2]: lease.
-- Returns a character for each: h held, c held and to be cancelled, l lost.

even_when_full()
local ids, queues, tokens = unpack(cmsgpack.unpack(ARGV[1]))
local ends = now() + tonumber(ARGV[2])
local answers, leases = {}, {}
for i, id in ipairs(ids) do
    local queue = queues[i]
    local job = fields(id, 'token', 'cancelled', 'priority')
    if job[1] == tokens[i] then
        answers[i] = job[2] and 'c' or 'h'
        leases[queue] = leases[queue] or { members = {} }
        local some = leases[queue]
        some[#some + 1], some[#some + 2] = ends, id
        some.members[#some.members + 1] = { id, job[3] }
    else
        answers[i] = 'l'
        drop_unless_held(id, queue, job[1])
    end
end
for queue, some in pairs(leases) do
    -- Members that are new had been put back because their lease had run out.
    if call('ZADD', running_key(queue), unpack(some)) > 0 then
        for _, member in ipairs(some.members) do
            call('ZREM', waiting_key(member[2], queue), member[1])
        end
    end
end
return table.concat(answers)
