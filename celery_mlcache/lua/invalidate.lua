-- ARGV[6] tags joined by newlines, their records KEYS[3..]: what carries one of them is dead, or with ARGV[7] 'soft' has
-- expired. Returns the stamp.
local stamp, floor = next_stamp()
announce('T', stamp, ARGV[6])
for i = 3, #KEYS do
  local tag = string.sub(KEYS[i], #ARGV[5] + 1)
  local record = record_of(tag)
  keep_record(tag, ARGV[7] == 'soft' and record[1] or stamp, stamp, math.max(record[3], after(ARGV[3])))
end
newest = stamp
save_floors(floor)
return stamp
