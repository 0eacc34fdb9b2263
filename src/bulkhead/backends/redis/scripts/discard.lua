-- Forget outcomes. ARGV[1]: ids. Returns a character for each: 1 done, 0 it was not kept.

local answers = {}
for i, id in ipairs(cmsgpack.unpack(ARGV[1])) do
    local before = call('GETRANGE', result_key(id), 0, 1000)
    answers[i] = '0'
    if before ~= '' then
        unlist(id, before)
        call('DEL', result_key(id))
        answers[i] = '1'
    end
end
return table.concat(answers)
