-- Give due jobs to a consumer. KEYS[2..3]: {namespace}:paused, the queue's running jobs.
-- ARGV: queue, most jobs, lease, start of the tokens, what follows an empty answer: "return", "wait" or "leave" (the last
-- look after a wait).
-- Returns microseconds until it is worth to look again (-1: nothing is known), columns of what was claimed, and the bodies
-- and errors of all one after the other.

local queue, most, lease, token, after = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
if call('SISMEMBER', KEYS[2], queue) == 1 then
    return { -1 }
end
even_when_full()
local t = now()
put_in_line(queue, t, most)

local ids, priorities, attempts, enqueued, dues, sizes, error_sizes = {}, {}, {}, {}, {}, {}, {}
local texts, leases = {}, {}
local ends = integer(t + lease)
-- Bytes of bodies after which no more jobs are taken: an answer has to fit into memory several times.
local ENOUGH = 16 * 1024 * 1024
local bytes = 0

local function take(id, priority)
    local key = job_key(id)
    local job = fields(id, 'body', 'queue', 'due', 'enqueued', 'attempt', 'error')
    if not (job[1] and job[2] == queue and job[3]) then
        put_right(id, queue)
        return
    end
    local n = #ids + 1
    local attempt = whole(job[5]) + 1
    call('HSET', key, 'attempt', attempt, 'token', token .. n)
    ids[n], priorities[n], attempts[n] = id, priority, attempt
    dues[n], enqueued[n] = whole(job[3]), whole(job[4] or job[3])
    sizes[n], error_sizes[n] = #job[1], job[6] and #job[6] or -1
    texts[#texts + 1] = job[1]
    texts[#texts + 1] = job[6] or ''
    bytes = bytes + #job[1] + (job[6] and #job[6] or 0)
    leases[2 * n - 1], leases[2 * n] = ends, id
end

-- How often a set is looked at again when all jobs that it named were gone.
local ROUNDS = 100
local levels = levels_of(queue)
local kept, is_more = {}, false
for _, level in ipairs(levels) do
    local waiting, priority, rounds = waiting_key(level, queue), tonumber(level), 0
    repeat
        -- One more than is wanted shows whether somebody else has to be woken.
        local want, seen = most - #ids, {}
        local found = call('ZRANGEBYSCORE', waiting, '-inf', t, 'LIMIT', 0, want + 1)
        while #seen < #found and #ids < most and bytes < ENOUGH do
            seen[#seen + 1] = found[#seen + 1]
            take(seen[#seen], priority)
        end
        if #seen > 0 then
            call('ZREM', waiting, unpack(seen))
        end
        is_more = #seen < #found or #found > want
        rounds = rounds + 1
    until #found <= want or #ids == most or bytes >= ENOUGH or rounds == ROUNDS
    if is_more then
        break
    end
    if #levels > 1 and call('EXISTS', waiting) == 1 then
        kept[#kept + 1] = level
    end
end
if #ids > 0 then
    call('ZADD', KEYS[3], unpack(leases))
end
if is_more then
    ring(queue)
elseif #kept < #levels and #levels > 1 then
    call('HSET', KEYS[1], queue, #kept > 0 and table.concat(kept, ',') or '0')
end
if #ids > 0 then
    local columns = { ids, priorities, attempts, enqueued, dues, sizes, error_sizes }
    return { 0, cmsgpack.pack(columns), table.concat(texts) }
end
if after == 'return' then
    return { -1 }
end

-- Due times of jobs that wait, and ends of leases.
local soonest
local function consider(key)
    local first = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if first[2] and (not soonest or tonumber(first[2]) < soonest) then
        soonest = tonumber(first[2])
    end
end
for _, level in ipairs(levels) do
    consider(waiting_key(level, queue))
end
consider(KEYS[3])
consider(back_key(queue))
if not soonest then
    return { -1 }
end
-- Race: others who wait may have looked before the soonest job was there; who leaves tells one of them.
if after == 'leave' then
    ring_if_soon(queue, soonest, t)
end
return { math.max(0, soonest - t) }
