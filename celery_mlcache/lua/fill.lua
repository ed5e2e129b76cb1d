-- The fenced add: for each of KEYS[3..] token, until (ms by our clock), milliseconds and tail
-- from ARGV[4] on. Takes no stamp and announces
-- nothing: an absent key is in nobody's L1 with an older value. Never seeds: a lost counter refuses.
-- Returns for each key {0} stored, {1, data} a live value won, {2} refused; then counter, floor and clock (us).
local counter = tonumber(get(KEYS[1]) or '')
local floor = tonumber(get(KEYS[2]) or '')
top = counter or 0
local outcome = {}
for i = 3, #KEYS do
  local token, until_ms = tonumber(ARGV[4 * i - 8]), tonumber(ARGV[4 * i - 7])
  local answer = {2}
  if counter and floor and counter >= token and floor <= token and now_ms() <= until_ms then
    local data, stamp = stored(KEYS[i], floor)
    if data then
      answer = {1, data}
    elseif stamp <= token then
      put(KEYS[i], token, after(ARGV[4 * i - 6]), ARGV[4 * i - 5])
      answer = {0}
    end
  end
  outcome[#outcome + 1] = answer
end
outcome[#outcome + 1] = digits(counter or 0)
outcome[#outcome + 1] = digits(floor or 0)
outcome[#outcome + 1] = digits(now_us())
return outcome
