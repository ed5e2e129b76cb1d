-- ARGV[3] names, ARGV[4] milliseconds that the tombstones live. Returns {stamp, live values removed}.
local stamp, floor = next_stamp()
local until_ms = after(ARGV[4])
local removed = 0
for i = 3, #KEYS do
  if stored(KEYS[i], floor) then removed = removed + 1 end
  put(KEYS[i], stamp, until_ms, string.char(TOMBSTONE))
end
announce('D', stamp, ARGV[3])
return {stamp, removed}
