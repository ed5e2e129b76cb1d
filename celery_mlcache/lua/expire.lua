-- ARGV[6] name. Its value has expired from now on: a tombstone takes its place, or, until its stale end, itself, though
-- it may have expired before. Returns {stamp, whether it was live}.
local stamp, floor = next_stamp()
announce('D', stamp, ARGV[6])
local data = get(KEYS[3])
local was_live = judge(KEYS[3], data, floor)
is_lenient = true
local is_kept, _, _, stale = judge(KEYS[3], data, floor)
if is_kept and stale > now_ms() then
  put(KEYS[3], stamp, now_ms(), stale, data:sub(KIND_AT), after(ARGV[3]))
else
  bury(KEYS[3], stamp)
end
return {stamp, was_live and 1 or 0}
