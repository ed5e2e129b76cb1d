-- ARGV[6] a prefix: what begins with it is dead. ARGV[7] how many prefixes may stand in the floors: one more raises the
-- floor under everything. Returns the stamp, then the prefixes whose values are still to be swept.
local stamp, floor = next_stamp()
local kept, unswept = {}, {ARGV[6]}
for _, p in ipairs(prefixes) do
  if string.sub(p[2], 1, #ARGV[6]) ~= ARGV[6] then
    kept[#kept + 1], unswept[#unswept + 1] = p, p[2]
  end
end
guard = stamp
if #kept >= tonumber(ARGV[7]) then
  announce('F', stamp)
  floor, newest, prefixes = stamp, stamp, {}
else
  announce('P', stamp, ARGV[6])
  kept[#kept + 1] = {stamp, ARGV[6]}
  prefixes = kept
end
save_floors(floor)
return {stamp, unpack(unswept)}
