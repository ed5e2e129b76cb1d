-- Everything stamped below the floor is dead: O(1), whatever is stored. Returns the new floor.
local stamp = next_stamp()
announce('F', stamp)
newest, guard, prefixes = stamp, stamp, {}
save_floors(stamp)
return stamp
