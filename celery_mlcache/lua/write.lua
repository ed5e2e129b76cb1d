-- ARGV[3] names joined by newlines, then milliseconds and tail for each of KEYS[3..]. Returns the stamp.
local stamp = next_stamp()
local first = head(stamp)
for i = 3, #KEYS do
  redis.call('SET', KEYS[i], first .. ARGV[2 * i - 1], 'PX', ARGV[2 * i - 2])
end
announce('W', stamp, ARGV[3])
return stamp
