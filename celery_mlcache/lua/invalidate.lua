-- ARGV[6] tags joined by newlines, their records KEYS[3..]: what carries one of them is dead. Returns the stamp.
local stamp, floor = next_stamp()
announce('T', stamp, ARGV[6])
for i = 3, #KEYS do
  local tag = string.sub(KEYS[i], #ARGV[5] + 1)
  keep_record(tag, stamp, math.max(record_of(tag)[2], after(ARGV[3])))
end
newest = stamp
save_floors(floor)
return stamp
