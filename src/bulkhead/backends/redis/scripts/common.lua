-- What each script begins with.
--
-- KEYS[1] is {namespace}:queues. Keys that depend on what is found (of jobs, of a queue's priorities) are built from it, so
-- that all keys of a namespace have one hash tag and lie on one node. Instants are microseconds by this server's clock.
--
-- Invariant: a job that is alive has a hash with the field "body", and is in exactly one of the sorted sets: that of its queue
-- and priority (waiting), of its queue's running jobs, of those given back for a while, or of its queue's dead letters. An id in a sorted set whose hash is
-- gone is dropped by whoever meets it.

local P = string.sub(KEYS[1], 1, -7)
local SECOND = 1000000
-- The last instant: beyond it numbers are not exact.
local LAST = 9e15
local call = redis.call

-- Race: a cluster moves a slot key by key to another node, and until that is over each of the two takes a key that the other one has
-- for none. A command with two keys that are nowhere is refused by both then, before anything was done.
call('EXISTS', P .. 'no', P .. 'nothing')

-- A number as an argument has all its digits, but newer servers write a large round one as 1e+12, which is no integer to them;
-- and Lua's own conversion keeps 14 digits. Scores and instants may be written either way.
local function integer(number)
    return string.format('%d', number)
end

-- A number that is kept with a job; 0 for what is none. Why: one hash that somebody else has changed must not stop a queue.
local function whole(text)
    local number = tonumber(text)
    if number and number > -2 ^ 53 and number < 2 ^ 53 then
        return math.floor(number)
    end
    return 0
end

-- A priority as it is written in keys and lists; '0' for what is none.
local function level_of(text)
    local number = tonumber(text)
    if number and number == math.floor(number) and math.abs(number) <= 1000 then
        return text
    end
    return '0'
end

-- What frees memory, or only keeps what is there, goes on where the server has none left: it refuses commands that take some,
-- but not in a script that has written already. Why: a server that jobs have filled could never be emptied.
local function even_when_full()
    call('DEL', P .. 'nothing')
end

local function now()
    local clock = call('TIME')
    return clock[1] * SECOND + clock[2]
end

local function job_key(id)
    return P .. 'job:' .. id
end

-- Fields of a job; none where there is no hash, or something else lies in its place.
local function fields(id, ...)
    local job = redis.pcall('HMGET', job_key(id), ...)
    return job.err and {} or job
end

local function waiting_key(priority, queue)
    return P .. 'queue:' .. level_of(priority or '0') .. ':' .. queue
end

local function running_key(queue)
    return P .. 'running:' .. queue
end

-- Of jobs that were given back for a while and then are to be where they were in line.
local function back_key(queue)
    return P .. 'back:' .. queue
end

local function dead_key(queue)
    return P .. 'dead:' .. queue
end

-- The priorities that a queue may have jobs of, the most urgent first.
local function levels_of(queue)
    local levels = {}
    for level in string.gmatch(call('HGET', KEYS[1], queue) or '', '[^,]+') do
        levels[#levels + 1] = level_of(level)
    end
    return levels
end

-- Remember that the queue may have jobs of this priority.
local function note(queue, priority)
    local levels = levels_of(queue)
    priority = level_of(priority)
    local place = 1
    for _, level in ipairs(levels) do
        if tonumber(level) == tonumber(priority) then
            return
        end
        if tonumber(level) > tonumber(priority) then
            place = place + 1
        end
    end
    table.insert(levels, place, priority)
    call('HSET', KEYS[1], queue, table.concat(levels, ','))
end

-- Wake one of those who wait for this queue, or the next that is going to wait. One ring is enough: who is woken and leaves
-- work behind rings again (claim.lua).
local function ring(queue)
    local bell = P .. 'bell:' .. queue
    if call('LLEN', bell) == 0 then
        call('RPUSH', bell, 1)
    end
end

-- Why only soon: who waits looks again each second.
local function ring_if_soon(queue, due, t)
    if due < t + SECOND then
        ring(queue)
    end
end

-- Put a job that was found in a set of a queue which its hash does not name in line where it says. Why: somebody has changed
-- the hash by hand, and a job in no set would wait for ever.
local function put_right(id, queue)
    local job = fields(id, 'body', 'queue', 'due', 'priority', 'buried')
    local place = job[2]
    if not job[1] or not place or place == queue or job[5] then
        return
    end
    -- Race: it may be there already, and what was found be left of an earlier job of this id.
    for _, key in ipairs({ waiting_key(job[4], place), running_key(place), P .. 'back:' .. place }) do
        if call('ZSCORE', key, id) then
            return
        end
    end
    note(place, job[4] or '0')
    call('ZADD', waiting_key(job[4], place), integer(whole(job[3])), id)
    ring(place)
end

-- Put jobs back in line whose lease has run out, or that were given back for a while which is over. The token of the former
-- stays: as long as nobody else claims such a job, its late consumer may still settle it.
local function put_in_line(queue, t, limit)
    for _, set in ipairs({ running_key(queue), back_key(queue) }) do
        local ids = call('ZRANGEBYSCORE', set, '-inf', t, 'LIMIT', 0, limit)
        for _, id in ipairs(ids) do
            local job = fields(id, 'queue', 'due', 'priority')
            if job[1] == queue and job[2] then
                note(queue, job[3] or '0')
                call('ZADD', waiting_key(job[3], queue), integer(whole(job[2])), id)
            else
                put_right(id, queue)
            end
        end
        if #ids > 0 then
            call('ZREM', set, unpack(ids))
        end
    end
end

-- Take a job that is claimed, or was until its lease ran out, out of its sorted set.
local function withdraw(id, queue, priority)
    if call('ZREM', running_key(queue), id) == 0 and call('ZREM', waiting_key(priority, queue), id) == 0 then
        call('ZREM', back_key(queue), id)
    end
end

-- Whoever has lost a job helps to drop it where its hash is gone, or nobody holds it.
local function drop_unless_held(id, queue, token)
    if not token then
        call('ZREM', running_key(queue), id)
    end
end

-- Forget a job; its id stays taken for `remember` milliseconds.
local function forget(id, remember)
    local key = job_key(id)
    call('DEL', key)
    if remember then
        call('HSET', key, 'taken', 1)
        call('PEXPIRE', key, remember)
    end
end

-- When the lease of a job ends that is running at `t`, else nil.
local function leased_until(id, queue, token, t)
    local ends = token and call('ZSCORE', running_key(queue), id)
    if ends and tonumber(ends) > t then
        return ends
    end
    return nil
end

-- What is known of a job as find and records return it, or false.
local function record(id, t)
    local job = fields(id, 'body', 'queue', 'due', 'enqueued', 'priority', 'attempt', 'token', 'buried', 'reason', 'error',
        'cancelled')
    if not (job[1] and job[2] and job[3]) then
        return false
    end
    local place, ends, due = 'dead', false, whole(job[8] or job[3])
    if not job[8] then
        ends = leased_until(id, job[2], job[7], t) or false
        due = ends and due or math.max(due, tonumber(call('ZSCORE', back_key(job[2]), id) or '0'))
        place = ends and 'running' or (due <= t and 'ready' or 'scheduled')
    end
    local enqueued = integer(whole(job[4] or job[3]))
    due = integer(due)
    return { id, place, job[2], integer(whole(level_of(job[5] or '0'))), integer(whole(job[6])), enqueued, due, ends,
        job[9] or '', job[11] or '0', job[1], job[10] }
end

-- A part of several sorted sets merged by score: pairs of a set's key and a member.
local function page(sets, low, high, is_reversed, offset, limit)
    local found = {}
    local skip = integer(#sets == 1 and offset or 0)
    local most = integer(#sets == 1 and limit or offset + limit)
    for _, key in ipairs(sets) do
        local members
        if is_reversed then
            members = call('ZREVRANGEBYSCORE', key, high, low, 'WITHSCORES', 'LIMIT', skip, most)
        else
            members = call('ZRANGEBYSCORE', key, low, high, 'WITHSCORES', 'LIMIT', skip, most)
        end
        for i = 1, #members, 2 do
            found[#found + 1] = { key, members[i], tonumber(members[i + 1]), #found }
        end
    end
    if #sets == 1 then
        return found
    end
    table.sort(found, function(a, b)
        if a[3] ~= b[3] then
            return (a[3] < b[3]) ~= is_reversed
        end
        return a[4] < b[4]
    end)
    local part = {}
    for i = offset + 1, math.min(#found, offset + limit) do
        part[#part + 1] = found[i]
    end
    return part
end
