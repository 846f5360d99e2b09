-- renew.lua: extend live leases.
-- USES meters, accounts
-- KEYS  1 pool, 2 class, 3 expiry
-- ARGV  1 now in ms ('' = the server's), 2 ttl in ms, 3 the longest that a lease may live, in ms, 4 birth ('': any); then
--       lease ids
-- REPLY {}: the class was lost, register first; or for each lease 1 renewed, 0 lost

local pool, class, expiry = KEYS[1], KEYS[2], KEYS[3]
local ttl, longest, reply = tonumber(ARGV[2]), tonumber(ARGV[3]), {}
if ARGV[4] ~= '' and get(class, 'b') ~= ARGV[4] then return {} end
redis.call('PEXPIRE', class, KEEP)   -- a server that is out of memory lets write who has begun to
tick(pool)
reap(class, expiry, ttl)
for i = 5, #ARGV do
  local id, renewed = ARGV[i], 0
  local lease = lease_of(class, id)
  if lease and lease[1] == LIVE and lease[4] <= now then
    reap(class, expiry, ttl, id)
    lease[1] = EXPIRED
  end
  if lease and lease[1] == LIVE then
    renewed = 1
    put_lease(class, expiry, id, lease, math.max(lease[4], math.min(now + ttl, lease[3] + longest)))
    for _, field in ipairs(lease[5] == 1 and {'breaker', 'a:' .. lease[6], 'k:' .. lease[7]} or {}) do
      local scope = scope_of(pool, field)
      if scope and scope[4] == id then
        scope[5] = lease[4]
        put(pool, field, cmsgpack.pack(scope))
      end
    end
  end
  reply[#reply + 1] = renewed
end
finish(class)
return reply
