-- Everything stamped below the floor is dead: O(1), whatever is stored. Returns the new floor.
local stamp = next_stamp()
announce('F', stamp)
redis.call('SET', KEYS[2], digits(stamp))
return stamp
