-- Returns {counter, floor}, seeded anew where lost.
local counter, floor = order()
return {digits(counter), digits(floor)}
