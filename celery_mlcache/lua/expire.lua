-- ARGV[6] name. Its value has expired from now on: a tombstone takes its place, or, until its stale end, itself. Returns
-- {stamp, whether it was live}.
local stamp, floor = next_stamp()
announce('D', stamp, ARGV[6])
local data, _, _, stale = stored(KEYS[3], floor)
if data and stale > now_ms() then
  put(KEYS[3], stamp, now_ms(), stale, data:sub(KIND_AT), after(ARGV[3]))
else
  bury(KEYS[3], stamp)
end
return {stamp, data and 1 or 0}
