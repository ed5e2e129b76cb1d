-- Stands before every script. KEYS[1] counter, KEYS[2] floor, KEYS[3..] values;
-- ARGV[1] channel, ARGV[2] highest stamp the caller knows of, ARGV[3] milliseconds that a tombstone lives.
-- Numbers are doubles: stamps stay below 2^53, and %.0f keeps them exact where tostring would not.
local VERSION, TOMBSTONE, INTEGER = 1, 84, 73
local KIND_AT = 18 -- of wire.py's offsets, counted from 1
local MARGIN = 1000000
local MAX_INTEGER = 9007199254740992 -- as wire.py's

local top = 0 -- the counter before this script: no stamp above it is one of ours

local function digits(n) return string.format('%.0f', n) end

local clock
local function now_us()
  if not clock then
    local t = redis.call('TIME')
    clock = t[1] * 1000000 + t[2]
  end
  return clock
end

local function now_ms() return math.floor(now_us() / 1000) end

-- nil for what is absent or no string: a foreign type under one of our keys is overwritten, not an error.
local function get(key)
  local data = redis.pcall('GET', key)
  return type(data) == 'string' and data or nil
end

-- Before anything is stored: where an ACL forbids the channel the script must fail whole. It is one step either way.
local function announce(op, stamp, names)
  local text = '1\n' .. op .. '\n' .. digits(stamp) .. '\n' .. digits(now_us())
  if names then text = text .. '\n' .. names end
  redis.call('PUBLISH', ARGV[1], text)
end

-- Counter and floor. Where either is lost (eviction, FLUSHALL, restart) or the counter ran backward (a failover that
-- lost writes), both start again above every stamp ever handed out, and everything stored before is dead.
local function order()
  local counter = tonumber(get(KEYS[1]) or '')
  local floor = tonumber(get(KEYS[2]) or '')
  local seen = tonumber(ARGV[2])
  if counter and floor and counter >= seen then
    top = counter
    return counter, floor
  end
  local seed = math.max(now_us(), seen + MARGIN, (counter or 0) + MARGIN, (floor or 0) + MARGIN)
  announce('F', seed)
  redis.call('SET', KEYS[1], digits(seed))
  redis.call('SET', KEYS[2], digits(seed))
  top = seed
  return seed, seed
end

local function next_stamp()
  local _, floor = order()
  return redis.call('INCR', KEYS[1]), floor
end

local function after(milliseconds) return now_ms() + tonumber(milliseconds) end

local head, head_stamp, head_expires, until_text -- the same for all keys of a script, as a rule
local function put(key, stamp, expires, tail, keep_until)
  if stamp ~= head_stamp or expires ~= head_expires then
    head_stamp, head_expires, until_text = stamp, expires, digits(math.max(expires, keep_until or 0))
    head = string.char(VERSION) .. struct.pack('>I8I8', stamp, expires)
  end
  redis.call('SET', key, head .. tail, 'PXAT', until_text)
end

-- A write under a new stamp. The key outlives a value of short life by what a tombstone lives: a loader that began
-- before the write must not fill after it, though the value is gone by then.
local function write(key, stamp, expires, tail) put(key, stamp, expires, tail, after(ARGV[3])) end

-- The live value (or nil), the stamp of whatever is there (0: nothing that counts), and its expiry.
local function stored(key, floor)
  local data = get(key)
  if not data or #data < KIND_AT or data:byte(1) ~= VERSION then return nil, 0 end
  local stamp, expires = struct.unpack('>I8I8', data, 2)
  if stamp < floor or stamp > top then return nil, 0 end
  if data:byte(KIND_AT) == TOMBSTONE or expires <= now_ms() then return nil, stamp end
  return data, stamp, expires
end
