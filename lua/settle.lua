-- settle.lua: close leases, each exactly once, with what was used and what its outcome says of key, account and pool.
-- USES meters, accounts, claims, learning, verdicts
-- KEYS  1 pool, 2 class, 3 expiry, 4 ready index, 5 wakes
-- ARGV  1 now in ms ('' = the server's), 2 a lease's ttl in ms, 3 keys of the ring; then for each lease 10 more: id, account and key (as
--       granted; only the first lease's are read, ahead), model,
--       outcome ('ok', 'unsent', 'neutral', 'limited', 'account', 'key', 'model', 'failed'), tokens used ('' unknown),
--       detail (limited: the server's wait in ms or ''; account: the reason; failed, unsent: the kind of failure), jitter
--       0..1, what the response's headers said of limits (see learning.lua; '': nothing), accounts that share this one's
--       quota, as far as the worker knows (one a line; they are read where it is 'limited')
-- REPLY for each lease 2: 0 done, 1 late (it had expired), 2 gone (settled before, or never granted); then advice:
--       '' none, 'out' this put the scope out, 'fault' all keys fail alike, 'unknown' nobody has served this model,
--       'healed' those who wait for other classes should be woken

local expiry, index, ttl, reply, freed = KEYS[3], KEYS[4], tonumber(ARGV[2]), {}, 0
load(pool, {'m', 'auth', 'breaker', 'a:' .. ARGV[5], 'k:' .. ARGV[6]})
load(class, {'m', 'q', 'w', 'l:' .. ARGV[4], 'a:' .. ARGV[5], 'q:' .. ARGV[5], 'h:' .. ARGV[5], 's:' .. ARGV[7]})
redis.call('PEXPIRE', class, KEEP)   -- a server that is out of memory lets write who has begun to
tick(pool)
reap(class, expiry, ttl)

-- Change what a grant was charged, by `n`. In a window it goes to that of the grant; if that has gone, nowhere. A
-- bucket credits what its refill since the grant has not made good already.
local function amend(a, i, q, n, granted, class)
  if q[4 * i - 1] == 1 then
    if n < 0 then n = -math.max(0, -n - q[4 * i + 1] * math.max(0, now - granted)) end
    charge(a, i, q, n, class)
    a[5 + 2 * i] = math.min(q[4 * i + 2], a[5 + 2 * i])
  else
    (windows or make_windows(class))[q[4 * i - 1]].amend(a, i, q, n, granted)
  end
end

-- Whether a lease was charged to a meter: what was granted before its limit was learned was not.
local function charged(q, i, lease) return q[4 * i - 1] > 0 and lease[3] >= (q[19 + i] or 0) end

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
  close(class, account, lease, unsent and 0 or tokens or lease[2])
  for i = 1, q[2] == 1 and 2 or 4 do
    if charged(q, i, lease) then
      if unsent then amend(a, i, q, i > 2 and -lease[2] or -1, lease[3], class)
      elseif i > 2 and tokens and tokens > lease[2] then amend(a, i, q, tokens - lease[2], lease[3], class) end
    end
  end
  if sooner then
    local at = earliest(a, q, 0, class)
    redis.call('ZADD', index, 'XX', 'LT', at <= now and 0 or at, account)
  end
end

for i = 4, #ARGV, 10 do
  local id, n = ARGV[i], #reply
  local lease = lease_of(class, id)
  if lease and lease[1] == LIVE and lease[4] <= now then
    reap(class, expiry, ttl, id)
    lease[1] = EXPIRED
  end
  reply[n + 1], reply[n + 2] = 2, ''
  if lease and lease[1] ~= TOMB then
    local account, outcome, tokens = lease[6], ARGV[i + 4], tonumber(ARGV[i + 5])
    reply[n + 1] = lease[1] == EXPIRED and 1 or 0
    if lease[1] == LIVE then count(lease, account, outcome == 'unsent', tokens)
    elseif tokens and tokens > lease[2] then count_late(lease, account, tokens) end
    if ARGV[i + 8] ~= '' and outcome ~= 'unsent' then freed = freed + learn(class, account, lease, ARGV[i + 8]) end
    put(class, 'l:' .. id, false)
    redis.call('ZREM', expiry, id)
    reply[n + 2] = conclude(id, lease, account, lease[7], ARGV[i + 3], outcome, ARGV[i + 6], tonumber(ARGV[i + 7]),
      ARGV[i + 9], index)
  elseif not lease and get(class, 'q') then
    put_lease(class, expiry, id, {TOMB, 0, 0, 0, 0, '', '', 0}, now + 2 * ttl)
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
local classes = healed and get(pool, 'classes')
if classes and #reply > 0 and reply[#reply] == '' and cmsgpack.unpack(classes)[2] then reply[#reply] = 'healed' end
finish(class)
return reply
