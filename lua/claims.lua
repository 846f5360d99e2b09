-- claims.lua: the claims of those who wait for a class (line.lua has the theory), and how they are woken.
--
-- A claim, of those in the class's field w: {id, ring, told, tokens of its smallest request, what stands in its way, account
-- held or false, held until, waiting in bands 0 to 3, turns of bands 0 to 3}.

local GRACE = 1000
local WAITING, TURN = 8, 12   -- of band 0

-- Those that are valid; and what wakes so many of their workers, but never more than wait. A wake says how many others may
-- still use it if who gets it cannot.
local function claims_of(class)
  local claims, packed = {}, get(class, 'w')
  for _, claim in ipairs(packed and cmsgpack.unpack(packed) or {}) do
    if claim[3] + GRACE > now then claims[#claims + 1] = claim end
  end
  return claims, function(wakes, count, hops)
    count = math.min(count, #claims - redis.call('LLEN', wakes))
    for _ = 1, count do redis.call('RPUSH', wakes, hops or #claims - 1) end
    if count > 0 then redis.call('PEXPIRE', wakes, 60000) end
  end
end
