-- Compare and set. ARGV[3] name, ARGV[4] milliseconds ('' keeps the life), ARGV[5] tail,
-- ARGV[6] the stamp that must be there; '' asks only that no live value is. Returns the stamp, or 0.
local _, floor = order()
local data, found = stored(KEYS[3], floor)
if ARGV[6] == '' then
  if data then return 0 end
elseif found ~= tonumber(ARGV[6]) then
  return 0
end
local stamp = redis.call('INCR', KEYS[1])
if ARGV[4] == '' then
  redis.call('SET', KEYS[3], head(stamp) .. ARGV[5], 'KEEPTTL')
else
  redis.call('SET', KEYS[3], head(stamp) .. ARGV[5], 'PX', ARGV[4])
end
announce('W', stamp, ARGV[3])
return stamp
