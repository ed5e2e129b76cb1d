-- ARGV[6] a prefix: what begins with it is dead. ARGV[7] how many prefixes may stand in the floors: one more raises the
-- floor under everything. Returns the stamp, then the prefixes whose values are still to be swept.
local stamp, floor = next_stamp()
local kept, unswept = {}, {ARGV[6]}
for _, p in ipairs(prefixes) do
  if string.sub(p[3], 1, #ARGV[6]) ~= ARGV[6] then
    kept[#kept + 1] = p
    if p[2] == 0 then unswept[#unswept + 1] = p[3] end
  end
end
if #kept >= tonumber(ARGV[7]) then
  announce('F', stamp)
  floor, newest, prefixes = stamp, stamp, {}
else
  announce('P', stamp, ARGV[6])
  kept[#kept + 1] = {stamp, 0, ARGV[6]}
  prefixes = kept
end
save_floors(floor)
return {stamp, unpack(unswept)}
