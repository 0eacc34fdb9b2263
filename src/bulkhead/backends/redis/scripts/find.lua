-- What is known of jobs. ARGV[1]: ids. Returns a record or nil for each.

local t = now()
local found = {}
for i, id in ipairs(cmsgpack.unpack(ARGV[1])) do
    found[i] = record(id, t)
end
return found
