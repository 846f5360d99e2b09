-- admin.lua: what a person decides about a key, for the whole pool.
-- USES meters, accounts, claims
-- KEYS  1 pool, then every class, then the wakes of each
-- ARGV  1 now in ms ('' = the server's), 2 'disable', 'enable', 'reset' or 'wake' (only the waiting), 3 key, 4 account, 5 for
--       how long in ms ('' = until it is enabled)
-- REPLY 1; 0 where the pool is not known (register first)

local pool, verb, key, account, last = KEYS[1], ARGV[2], 'k:' .. ARGV[3], ARGV[4], (#KEYS + 1) / 2
local revision, epoch = tick(pool)
if not revision then return 0 end
local k = scope_of(pool, key) or {0, 0, '', false, 0, 0, false, false}
if verb == 'disable' then
  k[7] = ARGV[5] == '' and -1 or now + tonumber(ARGV[5])
  put(pool, key, cmsgpack.pack(k))
elseif verb ~= 'wake' then
  -- Enabled: it may be used at once. Reset: all that was concluded of it and its account is forgotten too, and the
  -- limits that were learned; what has been used of those that were declared stays used.
  get(pool, 'a:' .. account)
  put(pool, key, false)
  put(pool, 'a:' .. account, false)
  for i = 2, verb == 'reset' and last or 0 do
    local known = load(KEYS[i], {'a:' .. account, 'h:' .. account})
    local packed = known['a:' .. account]
    if known['h:' .. account] then put(KEYS[i], 'h:' .. account, false) end
    if packed then
      put(KEYS[i], 'a:' .. account, packed:sub(1, 16) .. struct.pack('<ddd', 0, 0, 0) .. packed:sub(41))
    end
  end
end
local meta = get(pool, 'm')
if verb ~= 'wake' then revision = revision + 1 end
put(pool, 'm', meta:sub(1, 24) .. struct.pack('<d', revision) .. epoch)
for i = 2, verb ~= 'disable' and last or 0 do
  local claims, wake = claims_of(KEYS[i])
  wake(KEYS[i + last - 1], #claims)
end
flush()
return 1
