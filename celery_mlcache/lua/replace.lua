-- Compare and set. ARGV[3] name, ARGV[4] milliseconds ('' keeps the life), ARGV[5] tail,
-- ARGV[6] the stamp that must be there; '' asks only that no live value is. Returns the stamp, or 0.
local _, floor = order()
local data, found, expires = stored(KEYS[3], floor)
if ARGV[6] == '' then
  if data then return 0 end
elseif found ~= tonumber(ARGV[6]) then
  return 0
end
if ARGV[4] ~= '' or not expires then expires = after(ARGV[4] == '' and 1 or ARGV[4]) end
local stamp = redis.call('INCR', KEYS[1])
put(KEYS[3], stamp, expires, ARGV[5])
announce('W', stamp, ARGV[3])
return stamp
