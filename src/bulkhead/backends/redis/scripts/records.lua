-- A part of the jobs in a place. ARGV: place, offset, limit, queue (all queues without it). Returns records.

local place, offset, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local queues = ARGV[4] and { ARGV[4] } or call('HKEYS', KEYS[1])
local t = now()
local after_now = '(' .. integer(t)

-- Sorted sets by priority, the most urgent first.
local function levels_of_all()
    local by_level, levels = {}, {}
    for _, queue in ipairs(queues) do
        for _, level in ipairs(levels_of(queue)) do
            if not by_level[level] then
                by_level[level] = {}
                levels[#levels + 1] = level
            end
            table.insert(by_level[level], waiting_key(level, queue))
        end
    end
    table.sort(levels, function(a, b) return tonumber(a) > tonumber(b) end)
    local sets = {}
    for i, level in ipairs(levels) do
        sets[i] = by_level[level]
    end
    return sets
end

local function add(found, some)
    for _, each in ipairs(some) do
        found[#found + 1] = each
    end
end

local function ready()
    local found = {}
    for _, sets in ipairs(levels_of_all()) do
        local total = 0
        for _, key in ipairs(sets) do
            total = total + call('ZCOUNT', key, '-inf', t)
        end
        if offset < total and #found < limit then
            add(found, page(sets, '-inf', t, false, offset, limit - #found))
        end
        offset = math.max(0, offset - total)
    end
    return found
end

local function scheduled()
    local sets = {}
    for _, some in ipairs(levels_of_all()) do
        add(sets, some)
    end
    for _, queue in ipairs(queues) do
        sets[#sets + 1] = back_key(queue)
    end
    return page(sets, after_now, '+inf', false, offset, limit)
end

local function of_each_queue(name)
    local sets = {}
    for i, queue in ipairs(queues) do
        sets[i] = name(queue)
    end
    return sets
end

for _, queue in ipairs(queues) do
    put_in_line(queue, t, 1000)
end
local found
if place == 'ready' then
    found = ready()
elseif place == 'scheduled' then
    found = scheduled()
elseif place == 'running' then
    found = page(of_each_queue(running_key), after_now, '+inf', false, offset, limit)
else
    found = page(of_each_queue(dead_key), '-inf', '+inf', true, offset, limit)
end

local records = {}
for _, entry in ipairs(found) do
    local known = record(entry[2], t)
    if known and known[2] == place then
        records[#records + 1] = known
    elseif not known then
        call('ZREM', entry[1], entry[2])
    end
end
return records
