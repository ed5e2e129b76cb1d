-- ARGV[3] names, ARGV[4] milliseconds that the tombstones live. Returns {stamp, live values removed}.
local stamp, floor = next_stamp()
local grave = head(stamp) .. string.char(TOMBSTONE)
local removed = 0
for i = 3, #KEYS do
  if stored(KEYS[i], floor) then removed = removed + 1 end
  redis.call('SET', KEYS[i], grave, 'PX', ARGV[4])
end
announce('D', stamp, ARGV[3])
return {stamp, removed}
