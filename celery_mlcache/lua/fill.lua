-- The fenced add: ARGV[6] milliseconds to be kept as stale, then for each of KEYS[3..] token, until (ms by our clock),
-- milliseconds and tail. Takes no stamp and announces nothing: an absent key is in nobody's L1 with an older value. Never
-- seeds: a lost counter refuses.
-- Returns for each key {0} stored, {1, data} a live value won, {2} refused; then counter, floor and clock (us).
local counter, floor = known_order()
local outcome = {}
for i = 3, #KEYS do
  local token, until_ms = tonumber(ARGV[4 * i - 5]), tonumber(ARGV[4 * i - 4])
  local answer = {2}
  local is_fenced = counter and floor and counter >= token and math.max(floor, guard) <= token
  if is_fenced and now_ms() <= until_ms then
    local data, stamp = stored(KEYS[i], floor)
    local expires, tail = after(ARGV[4 * i - 3]), ARGV[4 * i - 2]
    local stale = stale_end(expires, ARGV[6])
    local tags = tags_of(tail, 1)
    if data then
      answer = {1, data}
    elseif stamp <= token then
      -- In any case: a record that was lost must not refuse the next filler too.
      hold_records(tags, math.max(expires, stale))
      if invalidated(KEYS[i], tags) <= token then
        put(KEYS[i], token, expires, stale, tail)
        answer = {0}
      end
    end
  end
  outcome[#outcome + 1] = answer
end
outcome[#outcome + 1] = digits(counter or 0)
outcome[#outcome + 1] = digits(floor or 0)
outcome[#outcome + 1] = digits(now_us())
return outcome
