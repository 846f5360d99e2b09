-- settle.lua: close leases, each exactly once, with what was used and what its outcome says of key, account and pool.
-- USES meters, accounts, claims, learning, verdicts
-- KEYS  1 pool, 2 class, 3 expiry, 4 ready index, 5 wakes
-- ARGV  1 now in ms ('' = the server's), 2 a lease's ttl in ms, 3 keys of the ring, 4 birth ('': any); then for each lease 10
--       more: id, account and key (as granted; only the first lease's are read, ahead), model,
--       outcome ('ok', 'unsent', 'neutral', 'limited', 'account', 'key', 'model', 'failed'), tokens used ('' unknown),
--       detail (limited: the server's wait in ms or ''; account: the reason; failed, unsent: the kind of failure), jitter
--       0..1, what the response's headers said of limits (see learning.lua; '': nothing), accounts that share this one's
--       quota, as far as the worker knows (one a line; they are read where it is 'limited')
-- REPLY {}: the class was lost, register first; or for each lease 3: 0 done, 1 late (it had expired), 2 gone (settled before,
--       or never granted); advice: '' none, 'out' this put the scope out, 'fault' all keys fail alike, 'unknown' nobody has
--       served this model, 'healed' those who wait for other classes should be woken; days seen, if they are not those of the
--       grant

local expiry, index, ttl, reply, freed = KEYS[3], KEYS[4], tonumber(ARGV[2]), {}, 0
load(pool, {'m', 'auth', 'breaker', 'a:' .. ARGV[6], 'k:' .. ARGV[7]})
load(class, {'m', 'q', 'w', 'b', 'x', 'l:' .. ARGV[5], 'a:' .. ARGV[6], 'q:' .. ARGV[6], 'h:' .. ARGV[6], 's:' .. ARGV[8]})
if ARGV[4] ~= '' and get(class, 'b') ~= ARGV[4] then return {} end
redis.call('PEXPIRE', class, KEEP)   -- a server that is out of memory lets write who has begun to
tick(pool)
reap(class, expiry, ttl)

-- An expired lease has been counted; only what it used beyond its reservation is still to be charged.
local function count_late(lease, account, tokens)
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  for i = 3, 4 do
    if charged(q, i, lease) then amend(a, i, q, tokens - lease[2], lease[3], class) end
  end
  touched[account] = true
end

-- What the lease used, against what was reserved.
local function count(lease, account, unsent, tokens)
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  local sooner = unsent or q[1] > 0 and a[1] >= q[1] or a[2] > 0
  if sooner or q[1] > 0 then freed = freed + 1 end
  if unsent then refund(class, account, lease)
  else
    close(class, account, lease, tokens or lease[2])
    for i = 3, q[2] == 1 and 2 or 4 do
      if charged(q, i, lease) and tokens and tokens > lease[2] then amend(a, i, q, tokens - lease[2], lease[3], class) end
    end
  end
  if sooner then
    local at = earliest(a, q, 0, class)
    redis.call('ZADD', index, 'XX', 'LT', at <= now and 0 or at, account)
  end
end

local function bury(id) put_lease(class, expiry, id, {TOMB, 0, 0, 0, 0, '', '', 0}, now + 2 * ttl) end

for i = 5, #ARGV, 10 do
  local id, n = ARGV[i], #reply
  local lease = lease_of(class, id)
  if lease and lease[1] == LIVE and lease[4] <= now then
    reap(class, expiry, ttl, id)
    lease[1] = EXPIRED
  end
  reply[n + 1], reply[n + 2], reply[n + 3] = 2, '', ''
  if lease and lease[1] ~= TOMB then
    local account, outcome, tokens = lease[6], ARGV[i + 4], tonumber(ARGV[i + 5])
    reply[n + 1] = lease[1] == EXPIRED and 1 or 0
    if lease[1] == LIVE then count(lease, account, outcome == 'unsent', tokens)
    elseif tokens and tokens > lease[2] then count_late(lease, account, tokens) end
    if ARGV[i + 8] ~= '' and outcome ~= 'unsent' then freed = freed + learn(class, account, lease, ARGV[i + 8]) end
    local lost = get(class, 'x')
    if lost and lost + 2 * ttl > now then bury(id)   -- a restore of it may still be on its way
    else
      put(class, 'l:' .. id, false)
      redis.call('ZREM', expiry, id)
    end
    local q = quota_of(class, account)
    if outcome == 'unsent' or q[2] == 1 or tokens and tokens > lease[2] then
      reply[n + 3] = days_seen(account_of(class, account, q), q, class)
    end
    reply[n + 2] = conclude(id, lease, account, lease[7], ARGV[i + 3], outcome, ARGV[i + 6], tonumber(ARGV[i + 7]),
      ARGV[i + 9], index)
  elseif not lease and get(class, 'q') then
    bury(id)
  end
end
local meta = get(pool, 'm')
if reordered and meta then
  put(pool, 'm', meta:sub(1, 24) .. struct.pack('<d', struct.unpack('<d', meta, 25) + 1) .. meta:sub(33))
end
if get(class, 'w') and (freed > 0 or healed) then
  local claims, wake = claims_of(class)
  wake(KEYS[5], healed and #claims or freed)
end
local classes, n = healed and table_in(pool, 'classes'), #reply - 1
if classes and n > 0 and reply[n] == '' and classes[2] then reply[n] = 'healed' end
finish(class)
return reply
