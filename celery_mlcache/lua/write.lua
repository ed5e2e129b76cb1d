-- ARGV[3] names joined by newlines, then milliseconds and tail for each of KEYS[3..]. Returns the stamp.
local stamp = next_stamp()
for i = 3, #KEYS do
  put(KEYS[i], stamp, after(ARGV[2 * i - 2]), ARGV[2 * i - 1])
end
announce('W', stamp, ARGV[3])
return stamp
