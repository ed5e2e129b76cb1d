-- What KEYS[3..] hold, without their bodies: those come as they are, by an MGET behind this script.
-- ARGV[6]: 'stale' where what has expired will do.
-- Returns {counter, floor, clock (us), verdicts}: for each key the stamp of a live value, or minus the stamp of what
-- is there instead (0: nothing). No verdicts where no tag or prefix was invalidated since the floor: the values
-- themselves tell all, then.
is_lenient = ARGV[6] == 'stale'
local counter, floor = order()
local verdicts = {}
if newest > floor or #prefixes > 0 then
  for i = 3, #KEYS do
    local name = KEYS[i]
    local size = KEY_AT + #name + 64 -- kind to key, an empty note and a tag or two
    local data = redis.pcall('GETRANGE', name, 0, size)
    if type(data) ~= 'string' then data = nil end
    if data and #data > size then
      local whole = KIND_AT + 4 + data:byte(KIND_AT + 3) * 256 + data:byte(KIND_AT + 4)
      if whole > size then data = redis.call('GETRANGE', name, 0, whole) end
    end
    local is_alive, stamp = judge(name, data, floor)
    verdicts[#verdicts + 1] = is_alive and stamp or -stamp
  end
end
return {digits(counter), digits(floor), digits(now_us()), verdicts}
