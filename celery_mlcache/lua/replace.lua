-- Compare and set. ARGV[6] name, ARGV[7] milliseconds ('' keeps the life), ARGV[8] tail,
-- ARGV[9] the stamp that must be there; '' asks only that no live value is,
-- ARGV[10] the fence of what the tail was made from: none of its tags, nor any prefix, may have been invalidated since
-- ('': whenever).
-- ARGV[11] milliseconds to be kept as stale, with a new life. Returns the stamp, or 0.
local _, floor = order()
local data, found, expires, stale = stored(KEYS[3], floor)
if ARGV[9] == '' then
  if data then return 0 end
elseif found ~= tonumber(ARGV[9]) then
  return 0
end
if ARGV[10] ~= '' and math.max(guard, invalidated(KEYS[3], tags_of(ARGV[8], 1))) > tonumber(ARGV[10]) then return 0 end
if ARGV[7] ~= '' then
  expires = after(ARGV[7])
  stale = stale_end(expires, ARGV[11])
end
if not expires then return 0 end -- its life ended meanwhile
local stamp = redis.call('INCR', KEYS[1])
announce('W', stamp, ARGV[6])
write(KEYS[3], stamp, expires, stale, ARGV[8])
return stamp
