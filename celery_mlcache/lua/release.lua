-- KEYS[3] record of a lease, KEYS[4] the list that those who wait for its release pop from. ARGV[6] fence, ARGV[7] word.
-- Returns whether the lease was still held.
local WAKE_MS = 10000 -- for those who have asked and do not wait yet
local BATCH = 1000 -- Lua's stack takes some thousands of arguments
local lease = lease_of(KEYS[3])
if not lease.is_out or lease.fence ~= tonumber(ARGV[6]) then return 0 end
-- First what a full server does not refuse either. The fence stays.
redis.call('HDEL', KEYS[3], 'until', 'waiters', 'owner')
local left = math.min(lease.waiters, 10 * BATCH)
if left > 0 then
  redis.call('DEL', KEYS[4]) -- a foreign type
  while left > 0 do
    local words = {}
    for i = 1, math.min(left, BATCH) do words[i] = ARGV[7] end
    redis.call('RPUSH', KEYS[4], unpack(words))
    left = left - #words
  end
  redis.call('PEXPIRE', KEYS[4], WAKE_MS)
end
return 1
