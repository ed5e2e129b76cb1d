-- ARGV[3] name, ARGV[4] delta, ARGV[5] milliseconds and ARGV[6] tail where nothing is stored yet,
-- ARGV[7] the number in that tail. Returns {stamp, number, milliseconds left}.
local _, floor = order()
local data, _, expires = stored(KEYS[3], floor)
local tail, number
if data then
  if data:byte(KIND_AT) ~= INTEGER or data:byte(KIND_AT + 1) ~= 0 then return redis.error_reply('NOTINTEGER') end
  local body_at = KIND_AT + 5 + data:byte(KIND_AT + 3) * 256 + data:byte(KIND_AT + 4)
  local body = tonumber(data:sub(body_at))
  if not body then return redis.error_reply('NOTINTEGER') end
  number = body + tonumber(ARGV[4])
  if number > 9007199254740992 or number < -9007199254740992 then return redis.error_reply('OVERFLOW') end
  tail = data:sub(KIND_AT, body_at - 1) .. digits(number)
else
  tail, number, expires = ARGV[6], tonumber(ARGV[7]), after(ARGV[5])
end
local stamp = redis.call('INCR', KEYS[1])
put(KEYS[3], stamp, expires, tail)
announce('W', stamp, ARGV[3])
return {stamp, digits(number), digits(math.max(expires - now_us() / 1000, 0))}
