-- ARGV[6] names. Returns {stamp, live values removed}.
local stamp, floor = next_stamp()
announce('D', stamp, ARGV[6])
local removed = 0
for i = 3, #KEYS do
  if stored(KEYS[i], floor) then removed = removed + 1 end
  bury(KEYS[i], stamp)
end
return {stamp, removed}
