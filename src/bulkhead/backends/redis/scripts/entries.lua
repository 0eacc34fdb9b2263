-- All values whose key begins with ARGV[1], by key. Returns triples of key, value, version.

local prefix = ARGV[1]
sweep(now(), 1000)
local found = {}
-- No byte of UTF-8 is 255.
for _, name in ipairs(call('ZRANGEBYLEX', NAMES, '[' .. prefix, '[' .. prefix .. '\255')) do
    local entry = call('HMGET', entry_key(name), 'value', 'version')
    if entry[1] then
        found[#found + 1] = { name, entry[1], entry[2] }
    else
        call('ZREM', NAMES, name)
    end
end
return found
