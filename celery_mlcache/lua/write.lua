-- ARGV[6] names joined by newlines, then milliseconds and tail for each of KEYS[3..]. Returns the stamp.
local stamp = next_stamp()
announce('W', stamp, ARGV[6])
for i = 3, #KEYS do
  write(KEYS[i], stamp, after(ARGV[2 * i + 1]), ARGV[2 * i + 2])
end
return stamp
