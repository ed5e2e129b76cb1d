-- One key of a slot that is on its way to another server, so that counter and floors may be elsewhere: KEYS[1] is that
-- key. ARGV[6] its name, ARGV[7] the stamp that the caller has taken. Returns the stamp.
local stamp, found = tonumber(ARGV[7]), 0
local data = get(KEYS[1])
if data and #data >= KIND_AT and data:byte(1) == VERSION then found = struct.unpack('>I8', data, 2) end
announce('D', stamp, ARGV[6])
if found < stamp then bury(KEYS[1], stamp) end
return stamp
