-- Stands before every script. KEYS[1] counter, KEYS[2] floors, KEYS[3..] what the script is about;
-- ARGV[1] channel, ARGV[2] highest stamp the caller knows of, ARGV[3] milliseconds that a tombstone lives,
-- ARGV[4] what stands before a user's key in Redis, ARGV[5] what stands before a tag.
-- Numbers are doubles: stamps stay below 2^53, and %.0f keeps them exact where tostring would not.
local VERSION, TOMBSTONE, INTEGER = 2, 84, 73
local KIND_AT = 26 -- of wire.py's offsets, counted from 1
local KEY_AT = KIND_AT + 17 -- the key's length in the header: after kind, flags, serializer, H, CRC and time
local MARGIN = 1000000
local MAX_INTEGER = 9007199254740992 -- as wire.py's

local top = 0 -- the counter before this script: no stamp above it is one of ours
local newest = 0 -- the newest invalidation of any tag
local guard = 0 -- the newest invalidation of any prefix
local prefixes = {} -- {stamp, prefix} of each prefix that was invalidated and is not swept yet
local is_lenient = false -- what has expired will do, if it was stored to be served stale

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

local function after(milliseconds) return now_ms() + tonumber(milliseconds) end

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

local function save_floors(floor)
  local text = digits(floor) .. ' ' .. digits(newest) .. ' ' .. digits(guard)
  for _, p in ipairs(prefixes) do text = text .. '\n' .. digits(p[1]) .. ' ' .. p[2] end
  redis.call('SET', KEYS[2], text)
end

-- Counter and floor as they are; nil where one is lost.
local function known_order()
  local counter = tonumber(get(KEYS[1]) or '')
  local floor, rest
  floor, newest, guard, rest = string.match(get(KEYS[2]) or '', '^(%d+) (%d+) (%d+)(.*)$')
  floor, newest, guard = tonumber(floor), tonumber(newest) or 0, tonumber(guard) or 0
  for stamp, prefix in string.gmatch(rest or '', '\n(%d+) ([^\n]+)') do
    prefixes[#prefixes + 1] = {tonumber(stamp), prefix}
  end
  top = counter or 0
  return counter, floor
end

-- Counter and floor. Where either is lost (eviction, FLUSHALL, restart) or the counter ran backward (a failover that
-- lost writes), both start again above every stamp ever handed out, and everything stored before is dead.
local function order()
  local counter, floor = known_order()
  local seen = tonumber(ARGV[2])
  if counter and floor and counter >= seen then return counter, floor end
  local seed = math.max(now_us(), seen + MARGIN, (counter or 0) + MARGIN, (floor or 0) + MARGIN)
  announce('F', seed)
  redis.call('SET', KEYS[1], digits(seed))
  top, newest, guard, prefixes = seed, seed, seed, {}
  save_floors(seed)
  return seed, seed
end

local function next_stamp()
  local _, floor = order()
  return redis.call('INCR', KEYS[1]), floor
end

-- Tags. The record of a tag is "stamp soft until": what is older than the stamp is dead, what is older than soft has
-- expired. One that is not there counts as invalidated when the newest of all was.
local records = {} -- of this script's look-ups: {stamp, soft, until}

local function record_of(tag)
  local found = records[tag]
  if not found then
    local stamp, soft, keep_until = string.match(get(ARGV[5] .. tag) or '', '^(%d+) (%d+) (%d+)$')
    found = {tonumber(stamp), tonumber(soft), tonumber(keep_until)}
    if not stamp or math.max(found[1], found[2]) > top then found = {newest, newest, 0} end
    records[tag] = found
  end
  return found
end

local function keep_record(tag, stamp, soft, keep_until)
  records[tag] = {stamp, soft, keep_until}
  local text = digits(stamp) .. ' ' .. digits(soft) .. ' ' .. digits(keep_until)
  redis.call('SET', ARGV[5] .. tag, text, 'PXAT', digits(keep_until))
end

-- The record outlives what is stored now; with as much to spare, so that not every write has to prolong it.
local function hold_records(tags, keep_until)
  for _, tag in ipairs(tags) do
    local record = record_of(tag)
    if record[3] < keep_until then keep_record(tag, record[1], record[2], 2 * keep_until - now_ms()) end
  end
end

local function parse_tags(data, kind_at)
  local tags = {}
  local _, at = struct.unpack('>I2c0', data, kind_at + 17) -- the key
  _, at = struct.unpack('>I2c0', data, at) -- the codec's note
  local count
  count, at = struct.unpack('>I2', data, at)
  for i = 1, count do tags[i], at = struct.unpack('>I2c0', data, at) end
  return tags
end

-- The tags in a value's header; none in what is garbage, which no codec will read.
local function tags_of(data, kind_at)
  local is_parsed, tags = pcall(parse_tags, data, kind_at)
  return is_parsed and tags or {}
end

-- When a value of this Redis key was last invalidated by its tags (which may be soft) or by a prefix; 0: never.
local function invalidated(name, tags, is_hard_only)
  local last = 0
  for _, tag in ipairs(tags) do
    local record = record_of(tag)
    last = math.max(last, record[1], is_hard_only and 0 or record[2])
  end
  for _, p in ipairs(prefixes) do
    local whole = ARGV[4] .. p[2]
    if p[1] > last and string.sub(name, 1, #whole) == whole then last = p[1] end
  end
  return last
end

-- Until when a value may be served stale that is kept so many milliseconds beyond its expiry; 0: not at all.
local function stale_end(expires, milliseconds)
  milliseconds = tonumber(milliseconds) or 0
  return milliseconds > 0 and expires + milliseconds or 0
end

local head, head_stamp, head_expires, head_stale, until_text -- the same for all keys of a script, as a rule
local function put(name, stamp, expires, stale, tail, keep_until)
  if stamp ~= head_stamp or expires ~= head_expires or stale ~= head_stale then
    head_stamp, head_expires, head_stale = stamp, expires, stale
    until_text = digits(math.max(expires, stale, keep_until or 0))
    head = string.char(VERSION) .. struct.pack('>I8I8I8', stamp, expires, stale)
  end
  redis.call('SET', name, head .. tail, 'PXAT', until_text)
end

-- A write under a new stamp. The key outlives a value of short life by what a tombstone lives: a loader that began
-- before the write must not fill after it, though the value is gone by then.
local function write(name, stamp, expires, stale, tail)
  hold_records(tags_of(tail, 1), math.max(expires, stale))
  put(name, stamp, expires, stale, tail, after(ARGV[3]))
end

local function bury(name, stamp) put(name, stamp, after(ARGV[3]), 0, string.char(TOMBSTONE)) end

-- Of what is stored under a name (its first bytes will do, up to the tags): whether it is alive, the stamp since when
-- (0: nothing that counts), its expiry and its stale end. What its tags or a prefix have killed counts as removed when
-- they did.
local function judge(name, data, floor)
  if not data or #data < KIND_AT or data:byte(1) ~= VERSION then return false, 0 end
  local stamp, expires, stale = struct.unpack('>I8I8I8', data, 2)
  if stamp < floor or stamp > top then return false, 0 end
  if data:byte(KIND_AT) ~= TOMBSTONE and (stamp < newest or #prefixes > 0) then
    local last = invalidated(name, stamp < newest and tags_of(data, KIND_AT) or {}, is_lenient and stale > 0)
    if last > stamp then return false, last end
  end
  local ends = is_lenient and math.max(expires, stale) or expires
  return data:byte(KIND_AT) ~= TOMBSTONE and ends > now_ms(), stamp, expires, stale
end

-- The live value (or nil), the stamp of whatever is there, its expiry and its stale end.
local function stored(name, floor)
  local data = get(name)
  local is_alive, stamp, expires, stale = judge(name, data, floor)
  return is_alive and data or nil, stamp, expires, stale
end
