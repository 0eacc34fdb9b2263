-- Remove a value. ARGV: key, version that it must have ("" for any). Returns 1, or 0 if there is none such.

local version = call('HGET', entry_key(ARGV[1]), 'version')
if not version or (ARGV[2] ~= '' and ARGV[2] ~= version) then
    return 0
end
drop(ARGV[1])
return 1
