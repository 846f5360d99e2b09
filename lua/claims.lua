-- claims.lua: the claims of those who wait for a class (line.lua has the theory), and how they are woken.
--
-- A claim, of those in the class's field w: {id, ring, told, tokens of its smallest request, what stands in its way, account
-- held or false, held until, waiting in bands 0 to 3, turns of bands 0 to 3}.

local GRACE = 1000
local WAITING, TURN = 8, 12   -- of band 0

-- Those that are valid; and what wakes so many of their workers, but never more than wait. A wake says how many others may
-- still use it if who gets it cannot.
local function claims_of(class)
  local claims = {}
  for _, claim in ipairs(table_in(class, 'w') or {}) do
    local whole = type(claim) == 'table' and sound(claim[3], claim[4], claim[7], unpack(claim, WAITING, TURN + 3))
      and type(claim[1]) == 'string' and type(claim[2]) == 'string' and type(claim[5]) == 'string' and claim[4] >= 0
      and (not claim[6] or type(claim[6]) == 'string')
    for b = WAITING, whole and WAITING + 3 or 0 do whole = whole and claim[b] >= 0 and claim[b] <= 1e9 end
    if whole and claim[3] + GRACE > now then claims[#claims + 1] = claim end
  end
  return claims, function(wakes, count, hops)
    count = math.min(count, #claims - redis.call('LLEN', wakes))
    for _ = 1, count do redis.call('RPUSH', wakes, hops or #claims - 1) end
    if count > 0 then redis.call('PEXPIRE', wakes, 60000) end
  end
end
