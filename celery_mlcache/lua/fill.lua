-- The fenced add: ARGV[6] milliseconds to be kept as stale, ARGV[7] what stands before a key in the name of its lease's
-- record, then for each of KEYS[3..] token, until (ms by our clock), milliseconds, tail and fence of the filler's lease
-- (0: none). Takes no stamp and announces nothing: an absent key is in nobody's L1 with an older value. Never seeds: a
-- lost counter refuses.
-- Returns for each key {0} stored, {1, data} a live value won, {2} refused; then counter, floor and clock (us).
local counter, floor = known_order()
local outcome = {}
for i = 3, #KEYS do
  local token, until_ms = tonumber(ARGV[5 * i - 7]), tonumber(ARGV[5 * i - 6])
  local answer = {2}
  local is_fenced = counter and floor and counter >= token and math.max(floor, guard) <= token
  if is_fenced and now_ms() <= until_ms then
    local data, stamp = stored(KEYS[i], floor)
    local expires, tail, lease = after(ARGV[5 * i - 5]), ARGV[5 * i - 4], ARGV[5 * i - 3]
    local stale = stale_end(expires, ARGV[6])
    local tags = tags_of(tail, 1)
    if data then
      answer = {1, data}
    elseif lease ~= '0' and lease_of(ARGV[7] .. string.sub(KEYS[i], #ARGV[4] + 1)).fence > tonumber(lease) then
      answer = {2} -- paused past its lease: what its successor has stored may have expired by now
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
