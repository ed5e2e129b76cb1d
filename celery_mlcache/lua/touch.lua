-- ARGV[3] name, ARGV[4] milliseconds. A new stamp, so that copies with the old, longer life die. Returns it, or 0.
local _, floor = order()
local data = stored(KEYS[3], floor)
if not data then return 0 end
local stamp = redis.call('INCR', KEYS[1])
redis.call('SET', KEYS[3], head(stamp) .. data:sub(10), 'PX', ARGV[4])
announce('W', stamp, ARGV[3])
return stamp
