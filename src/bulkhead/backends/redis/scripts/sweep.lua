-- Take outcomes out of the lists that have expired. ARGV[1]: at most how many. Returns how many there were.

return sweep(now(), tonumber(ARGV[1]))
