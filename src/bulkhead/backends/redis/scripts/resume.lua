-- Let a queue's jobs be claimed again. KEYS[2]: {namespace}:paused. ARGV[1]: queue.

if call('SREM', KEYS[2], ARGV[1]) == 1 then
    ring(ARGV[1])
end
return 1
