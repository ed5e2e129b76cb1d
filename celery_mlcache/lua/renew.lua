-- KEYS[3..] records of leases. ARGV[6] milliseconds, then the fence of each. One that has lapsed is renewed as long as
-- nobody has taken it over. Returns for each whether it was.
local outcome = {}
for i = 3, #KEYS do
  local lease = lease_of(KEYS[i])
  local is_held = lease.is_out and lease.fence == tonumber(ARGV[i + 4])
  if is_held then
    local ends = after(ARGV[6])
    redis.call('HSET', KEYS[i], 'until', digits(ends))
    keep_lease(KEYS[i], ends)
  end
  outcome[#outcome + 1] = is_held and 1 or 0
end
return outcome
