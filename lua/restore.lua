-- restore.lua: what a worker knows of a class, and the store does not: since it was lost, or was away.
-- USES meters, accounts
-- KEYS  1 pool, 2 class, 3 expiry
-- ARGV  1 now in ms ('' = the server's), 2 a lease's ttl in ms, 3 birth, 4 worker, 5 number of what it spent, higher than
--       all before, 6 days as JSON [[account, when it was seen, requests used, tokens used], ..], 7 live leases as JSON
--       [[id, account, key, tokens, granted], ..], 8 what it spent as JSON [[account, requests of its last minute, requests,
--       tokens of its last minute, tokens], ..]
-- REPLY 1; 0 the class is another one: register first

local pool, class, expiry, ttl = KEYS[1], KEYS[2], KEYS[3], tonumber(ARGV[2])
if get(class, 'b') ~= ARGV[3] then return 0 end
redis.call('PEXPIRE', class, KEEP)   -- a server that is out of memory lets write who has begun to
tick(pool)
reap(class, expiry, ttl)

-- Leases are live again, and charged to nothing: their minutes are taken for used, their days have been seen. So are those
-- that have expired meanwhile; where tokens are charged by use, what that charged is taken back.
for _, known in ipairs(cjson.decode(ARGV[7])) do
  local id, account, key, tokens, granted = unpack(known)
  local lease = lease_of(class, id)
  if lease and lease[1] == LIVE and (lease[6] ~= account or lease[7] ~= key) then
    refund(class, lease[6], lease)   -- what is told came to be elsewhere: our answer was lost
    lease = nil
  elseif lease and lease[1] == EXPIRED then   -- it could not be renewed
    local q = quota_of(class, lease[6])
    local a = account_of(class, lease[6], q)
    for i = 3, q[2] == 1 and 4 or 0 do
      if q[4 * i - 1] > 0 then amend(a, i, q, -lease[2], lease[4] - 2 * ttl, class) end
    end
    touched[lease[6]] = true
    lease = nil
  end
  if not lease then
    local q = quota_of(class, account)
    local a = account_of(class, account, q)
    a[1] = a[1] + 1
    if q[2] == 1 then a[2], a[15] = a[2] + tokens, a[15] + tokens end
    touched[account] = true
    put_lease(class, expiry, id, {LIVE, tokens, granted, 0, 0, account, key, a[15] - a[2]}, now + ttl)
  end
end

-- Of days the most that any worker has seen, as far as it still counts (after what was taken back: so twice is once).
for _, day in ipairs(cjson.decode(ARGV[6])) do
  local account, at = day[1], day[2]
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  for i = 2, 4, 2 do
    local rule, n = q[4 * i - 1], day[2 + i / 2]
    if rule == 1 then n = n - q[4 * i + 1] * math.max(0, now - at)
    elseif rule > 1 and not (windows or make_windows(class))[rule].counts(i, q, at) then n = 0 end
    n = rule > 0 and n - used(a, i, q, class) or 0
    if n > 0 then charge(a, i, q, n, class) end
  end
  touched[account] = true
end

-- What was spent is charged once.
local spent, number = cjson.decode(ARGV[8]), tonumber(ARGV[5])
if #spent > 0 then
  local packed, kept = get(class, 'e'), {}
  for worker, last in pairs(packed and cmsgpack.unpack(packed) or {}) do
    if now - last[2] < KEEP then kept[worker] = last end
  end
  local last = kept[ARGV[4]]
  if not last or last[1] < number then
    kept[ARGV[4]] = {number, now}
    put(class, 'e', cmsgpack.pack(kept))
    for _, row in ipairs(spent) do
      local account = row[1]
      local q = quota_of(class, account)
      local a = account_of(class, account, q)
      for i = 1, 4 do
        if q[4 * i - 1] > 0 and row[1 + i] > 0 then charge(a, i, q, row[1 + i], class) end
      end
      touched[account] = true
    end
  end
end
finish(class)
return 1
