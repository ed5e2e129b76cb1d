-- ARGV[6] name, ARGV[7] milliseconds. A new stamp, so that copies with the old, longer life die. Returns it, or 0.
local _, floor = order()
local data, _, expires, stale = stored(KEYS[3], floor)
if not data then return 0 end
local stamp = redis.call('INCR', KEYS[1])
announce('W', stamp, ARGV[6])
local life = after(ARGV[7])
write(KEYS[3], stamp, life, stale_end(life, stale - expires), data:sub(KIND_AT))
return stamp
