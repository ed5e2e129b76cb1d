-- Compare and set. ARGV[4] name, ARGV[5] milliseconds ('' keeps the life), ARGV[6] tail,
-- ARGV[7] the stamp that must be there; '' asks only that no live value is. Returns the stamp, or 0.
local _, floor = order()
local data, found, expires = stored(KEYS[3], floor)
if ARGV[7] == '' then
  if data then return 0 end
elseif found ~= tonumber(ARGV[7]) then
  return 0
end
if ARGV[5] ~= '' then expires = after(ARGV[5]) end
if not expires then return 0 end -- its life ended meanwhile
local stamp = redis.call('INCR', KEYS[1])
announce('W', stamp, ARGV[4])
write(KEYS[3], stamp, expires, ARGV[6])
return stamp
