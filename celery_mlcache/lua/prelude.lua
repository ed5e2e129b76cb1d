-- Stands before every script. KEYS[1] counter, KEYS[2] floor, KEYS[3..] values;
-- ARGV[1] channel, ARGV[2] highest stamp the caller knows of.
-- Numbers are doubles: stamps stay below 2^53, and %.0f keeps them exact where tostring would not.
local VERSION, TOMBSTONE, INTEGER = 1, 84, 73
local KIND_AT = 18 -- of wire.py's offsets, counted from 1
local MARGIN = 1000000

local function digits(n) return string.format('%.0f', n) end

local clock
local function now_us()
  if not clock then
    local t = redis.call('TIME')
    clock = t[1] * 1000000 + t[2]
  end
  return clock
end

local function announce(op, stamp, names)
  local text = '1\n' .. op .. '\n' .. digits(stamp) .. '\n' .. digits(now_us())
  if names then text = text .. '\n' .. names end
  redis.call('PUBLISH', ARGV[1], text)
end

-- Counter and floor. Where either is lost (eviction, FLUSHALL, restart) or the counter ran backward (a failover that
-- lost writes), both start again above every stamp ever handed out, and everything stored before is dead.
local function order()
  local counter = tonumber(redis.call('GET', KEYS[1]) or '')
  local floor = tonumber(redis.call('GET', KEYS[2]) or '')
  local seen = tonumber(ARGV[2])
  if counter and floor and counter >= seen then return counter, floor end
  local seed = math.max(now_us(), seen + MARGIN, (counter or 0) + MARGIN, (floor or 0) + MARGIN)
  redis.call('SET', KEYS[1], digits(seed))
  redis.call('SET', KEYS[2], digits(seed))
  announce('F', seed)
  return seed, seed
end

local function next_stamp()
  local _, floor = order()
  return redis.call('INCR', KEYS[1]), floor
end

local function after(milliseconds) return math.floor(now_us() / 1000) + tonumber(milliseconds) end

local head, head_stamp, head_expires, expires_text -- the same for all keys of a script, as a rule
local function put(key, stamp, expires, tail)
  if stamp ~= head_stamp or expires ~= head_expires then
    head_stamp, head_expires, expires_text = stamp, expires, digits(expires)
    head = string.char(VERSION) .. struct.pack('>I8I8', stamp, expires)
  end
  redis.call('SET', key, head .. tail, 'PXAT', expires_text)
end

-- The live value (or nil), the stamp of whatever is there (0: nothing that counts), and its expiry.
local function stored(key, floor)
  local data = redis.call('GET', key)
  if not data or #data < KIND_AT or data:byte(1) ~= VERSION then return nil, 0 end
  local stamp, expires = struct.unpack('>I8I8', data, 2)
  if stamp < floor then return nil, 0 end
  if data:byte(KIND_AT) == TOMBSTONE then return nil, stamp end
  return data, stamp, expires
end
