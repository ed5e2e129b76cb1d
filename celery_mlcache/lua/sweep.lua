-- Frees what a prefix or the floor has killed among KEYS[3..]. ARGV[6] prefix, ARGV[7] stamp: all that begins with that
-- prefix and was stored before that stamp has been looked at, so its lines may go: fills that began before it are refused
-- by the guard ('': not yet). Returns how many were freed.
local _, floor = order()
local freed = 0
for i = 3, #KEYS do
  local data = redis.pcall('GETRANGE', KEYS[i], 0, KIND_AT - 1)
  if type(data) == 'string' and #data == KIND_AT and data:byte(1) == VERSION then
    local stamp = struct.unpack('>I8', data, 2)
    if stamp < math.max(floor, invalidated(KEYS[i], {})) then freed = freed + redis.call('UNLINK', KEYS[i]) end
  end
end
if ARGV[7] ~= '' then
  local kept = {}
  for _, p in ipairs(prefixes) do
    local is_done = p[1] <= tonumber(ARGV[7]) and string.sub(p[2], 1, #ARGV[6]) == ARGV[6]
    if not is_done then kept[#kept + 1] = p end
  end
  prefixes = kept
  save_floors(floor)
end
return freed
