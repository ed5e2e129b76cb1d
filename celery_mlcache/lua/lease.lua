-- Stands between the prelude and every script that looks at leases. The record of a key's lease is a hash: fence, owner,
-- until (ms by our clock; absent: given back) and waiters. It outlives the lease, so that fences only grow.
-- No stamp is taken here and none announced: a lease is nothing that anybody has in L1.

local function whole(text)
  local number = tonumber(string.match(text or '', '^%d+$'))
  return number and number < MAX_INTEGER and number or 0
end

-- A foreign type has no fields, and garbage in one is 0: nobody's lease.
local function lease_of(name)
  local found = redis.pcall('HMGET', name, 'fence', 'until', 'waiters', 'owner')
  local lease = {fence = whole(found[1]), ends = whole(found[2]), waiters = whole(found[3]), owner = found[4] or ''}
  lease.is_foreign = found.err ~= nil
  lease.is_out = lease.fence > 0 and lease.ends > 0 -- not given back; it may have lapsed
  return lease
end

-- A holder that was paused is refused by the record, for as long as a late fill is refused by a tombstone.
local function keep_lease(name, ends)
  local life = ends - now_ms() + tonumber(ARGV[3])
  redis.call('PEXPIRE', name, digits(math.max(life, redis.call('PTTL', name))))
end
