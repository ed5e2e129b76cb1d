-- ARGV[3] name, ARGV[4] delta, ARGV[5] milliseconds and ARGV[6] tail where nothing is stored yet,
-- ARGV[7] the number in that tail. Returns {stamp, number, milliseconds left}.
local _, floor = order()
local data = stored(KEYS[3], floor)
local tail, number, life
if data then
  if data:byte(10) ~= INTEGER or data:byte(11) ~= 0 then return redis.error_reply('NOTINTEGER') end
  local body_at = 15 + data:byte(13) * 256 + data:byte(14)
  local body = tonumber(data:sub(body_at))
  if not body then return redis.error_reply('NOTINTEGER') end
  number = body + tonumber(ARGV[4])
  if number > 9007199254740992 or number < -9007199254740992 then return redis.error_reply('OVERFLOW') end
  tail = data:sub(10, body_at - 1) .. digits(number)
  life = redis.call('PTTL', KEYS[3])
else
  tail, number, life = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[5])
end
local stamp = redis.call('INCR', KEYS[1])
redis.call('SET', KEYS[3], head(stamp) .. tail, 'PX', math.max(life, 1))
announce('W', stamp, ARGV[3])
return {stamp, digits(number), life}
