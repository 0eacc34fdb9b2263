-- Keep outcomes, but those that come too late. ARGV[1]: columns of ids (each once), places ("<state>:<bytes>:<queue>:"), end
-- times, milliseconds to keep, encoded outcomes.

local ids, places, ended, keeps, blobs = unpack(cmsgpack.unpack(ARGV[1]))
local chosen = {}
for i = 1, #ids do
    chosen[i] = i
end
keep_outcomes(chosen, ids, places, ended, keeps, blobs, false, now())
return 1
