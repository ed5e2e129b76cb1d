-- ARGV[6] names joined by newlines, ARGV[7] milliseconds to be kept as stale, then milliseconds and tail for each of
-- KEYS[3..]. Returns the stamp.
local stamp = next_stamp()
announce('W', stamp, ARGV[6])
for i = 3, #KEYS do
  local expires = after(ARGV[2 * i + 2])
  write(KEYS[i], stamp, expires, stale_end(expires, ARGV[7]), ARGV[2 * i + 3])
end
return stamp
