-- The fenced add: for each of KEYS[3..] token, until (ms by our clock), milliseconds and tail from ARGV[6] on. Takes no
-- stamp and announces nothing: an absent key is in nobody's L1 with an older value. Never seeds: a lost counter refuses.
-- Returns for each key {0} stored, {1, data} a live value won, {2} refused; then counter, floor and clock (us).
local counter, floor = known_order()
local outcome = {}
for i = 3, #KEYS do
  local token, until_ms = tonumber(ARGV[4 * i - 6]), tonumber(ARGV[4 * i - 5])
  local answer = {2}
  if counter and floor and counter >= token and floor <= token and now_ms() <= until_ms then
    local data, stamp = stored(KEYS[i], floor)
    local tail = ARGV[4 * i - 3]
    local tags = tags_of(tail, 1)
    local expires = after(ARGV[4 * i - 4])
    if data then
      answer = {1, data}
    elseif stamp <= token and invalidated(KEYS[i], tags) <= token then
      hold_records(tags, expires)
      put(KEYS[i], token, expires, tail)
      answer = {0}
    elseif stamp <= token then
      hold_records(tags, expires) -- a record that was lost must not refuse the next filler too
    end
  end
  outcome[#outcome + 1] = answer
end
outcome[#outcome + 1] = digits(counter or 0)
outcome[#outcome + 1] = digits(floor or 0)
outcome[#outcome + 1] = digits(now_us())
return outcome
