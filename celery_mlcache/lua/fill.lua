-- The fenced add: for each of KEYS[3..] token, milliseconds, tail from ARGV[4] on. Takes no stamp and announces
-- nothing: an absent key is in nobody's L1 with an older value. Never seeds: a lost counter refuses.
-- Returns for each key {0} stored, {1, data} a live value won, {2} refused; then counter, floor and clock (us).
local counter = tonumber(get(KEYS[1]) or '')
local floor = tonumber(get(KEYS[2]) or '')
local outcome = {}
for i = 3, #KEYS do
  local token = tonumber(ARGV[3 * i - 5])
  local answer = {2}
  if counter and floor and counter >= token and floor <= token then
    local data, stamp = stored(KEYS[i], floor)
    if data then
      answer = {1, data}
    elseif stamp <= token then
      put(KEYS[i], token, after(ARGV[3 * i - 4]), ARGV[3 * i - 3])
      answer = {0}
    end
  end
  outcome[#outcome + 1] = answer
end
outcome[#outcome + 1] = digits(counter or 0)
outcome[#outcome + 1] = digits(floor or 0)
outcome[#outcome + 1] = digits(now_us())
return outcome
