-- Set a value. ARGV: key, value, version that it must have ("" for any), milliseconds to keep ("" for ever).
-- Returns the new version, or 0 when it was another one.

local name, value, expected, keep = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local t = now()
sweep(t, 10)
local key = entry_key(name)
local version = call('HGET', key, 'version') or '0'
if expected ~= '' and expected ~= version then
    return 0
end
local new = call('INCR', P .. 'version')
if new <= tonumber(version) then -- the counter was deleted by hand
    new = tonumber(version) + 1
    call('SET', P .. 'version', integer(new))
end
call('HSET', key, 'value', value, 'version', integer(new))
call('ZADD', NAMES, 0, name)
if keep == '' then
    call('PERSIST', key)
    call('ZREM', ENDS, name)
else
    call('PEXPIRE', key, keep)
    call('ZADD', ENDS, t + tonumber(keep) * 1000, name)
end
return new
