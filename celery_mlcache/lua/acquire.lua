-- KEYS[3] value, KEYS[4] record of its lease. ARGV[6] who asks, ARGV[7] milliseconds, ARGV[8] the stamp of a live value
-- that will not do ('': none will, take the lease), ARGV[9] '1' where who asks is going to wait for the release.
-- Returns {0} where there is a value, else {1 somebody has it | 2 taken | 3 taken over, fence, microseconds left, owner}.
if ARGV[8] ~= '' then
  local counter, floor = known_order()
  if counter and floor then
    local data, stamp = stored(KEYS[3], floor)
    if data and stamp ~= tonumber(ARGV[8]) then return {0} end
  end
end
local lease = lease_of(KEYS[4])
if lease.is_out and lease.ends > now_ms() then
  if ARGV[9] == '1' then redis.call('HSET', KEYS[4], 'waiters', digits(lease.waiters + 1)) end
  return {1, lease.fence, lease.ends * 1000 - now_us(), lease.owner}
end
if lease.is_foreign then redis.call('DEL', KEYS[4]) end
-- The clock, so that fences grow though the record was lost; one more, though the clock was set back.
local fence, ends = math.max(now_us(), lease.fence + 1), after(ARGV[7])
redis.call('HSET', KEYS[4], 'fence', digits(fence), 'until', digits(ends), 'waiters', '0', 'owner', ARGV[6])
keep_lease(KEYS[4], ends)
return {lease.is_out and 3 or 2, fence, ends * 1000 - now_us(), ARGV[6]}
