-- ARGV[6] name, ARGV[7] delta, ARGV[8] milliseconds and ARGV[9] tail where nothing is stored yet,
-- ARGV[10] the number in that tail. Returns {stamp, number, milliseconds left, tags}.
local _, floor = order()
local data, _, expires, stale = stored(KEYS[3], floor)
local tail, number
if data then
  if data:byte(KIND_AT) ~= INTEGER or data:byte(KIND_AT + 1) ~= 0 then return redis.error_reply('NOTINTEGER') end
  local body_at = KIND_AT + 5 + data:byte(KIND_AT + 3) * 256 + data:byte(KIND_AT + 4)
  local body, delta = tonumber(data:sub(body_at)), tonumber(ARGV[7])
  if not body then return redis.error_reply('NOTINTEGER') end
  -- Before the sum: a double cannot tell 2^53 + 1 from 2^53.
  if (delta > 0 and body > MAX_INTEGER - delta) or (delta < 0 and body < -MAX_INTEGER - delta) then
    return redis.error_reply('OVERFLOW')
  end
  number = body + delta
  tail = data:sub(KIND_AT, body_at - 1) .. digits(number)
else
  tail, number, expires, stale = ARGV[9], tonumber(ARGV[10]), after(ARGV[8]), 0
end
local stamp = redis.call('INCR', KEYS[1])
announce('W', stamp, ARGV[6])
write(KEYS[3], stamp, expires, stale, tail)
return {stamp, digits(number), digits(math.max(expires - now_us() / 1000, 0)), tags_of(tail, 1)}
