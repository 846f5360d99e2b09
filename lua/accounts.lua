-- accounts.lua: an account of a class, its leases and when it can serve.

local LIVE, EXPIRED, TOMB = 1, 2, 3
local ACCOUNT, LEASE, LEARNED = '<ddddddddddddddd', '<dddddssd', '<Bddddd'
local accounts, quotas, touched = {}, {}, {}

-- The limits of an account: what was declared, and under it what was learned (see learning.lua): of a learned meter i,
-- q[19 + i] says since when. (What is known of an account is read together.)
local function quota_of(class, name)
  local q = quotas[name]
  if not q then
    local cell, declared, learned = cells[class], 'q:' .. name, 'h:' .. name
    if not cell or cell[learned] == nil then cell = load(class, {declared, learned, 'a:' .. name}) end
    local packed = cell[declared] or get(class, 'q')
    q = packed and {struct.unpack('<dddddddddddddddddd', packed)}
    if q then
      q.tz = packed:sub(145)
      learned = cell[learned]
      for place = 1, learned and #learned or 0, 41 do
        local i, since, rule, limit, first, second = struct.unpack(LEARNED, learned, place)
        local j = 4 * i - 1
        if q[j] == 0 then q[j], q[j + 1], q[j + 2], q[j + 3], q[19 + i] = rule, limit, first, second, since end
      end
      quotas[name] = q
    end
  end
  return q
end

local function begin_meter(a, i, q, class)
  local rule = q[4 * i - 1]
  a[5 + 2 * i], a[6 + 2 * i] = 0, 0
  if rule == 1 then a[5 + 2 * i], a[6 + 2 * i] = q[4 * i + 2], now
  elseif rule > 1 then a[5 + 2 * i], a[6 + 2 * i] = (windows or make_windows(class))[rule].fresh(a, i, q) end
end

local function account_of(class, name, q)
  local a = accounts[name]
  if a then return a end
  local packed = get(class, 'a:' .. name)
  if packed then
    a = {struct.unpack(ACCOUNT, packed)}
    a[16] = nil
    local place = 121
    if #packed > 120 then a.logs = {} end
    while place <= #packed do
      local i, head, before, at, amount, length
      i, head, before, at, amount, length, place = struct.unpack('<BddddI4', packed, place)
      a.logs[i] = {head, before, at, amount, packed:sub(place, place + length - 1)}
      place = place + length
    end
  else
    a = {0, 0, 0, 0, 0, 0, logs = {}}
    for i = 1, 4 do begin_meter(a, i, q, class) end
    a[15] = 0
  end
  accounts[name] = a
  return a
end

-- Write what has changed, the accounts in `touched` among it.
local function finish(class)
  for name in pairs(touched) do
    local a = accounts[name]
    local packed = struct.pack(ACCOUNT, unpack(a, 1, 15))
    for i, m in pairs(a.logs or {}) do
      packed = packed .. struct.pack('<BddddI4', i, m[1], m[2], m[3], m[4], #m[5]) .. m[5]
    end
    put(class, 'a:' .. name, packed)
  end
  flush()
end

local function lease_of(class, id)
  local packed = get(class, 'l:' .. id)
  if packed then return {struct.unpack(LEASE, packed)} end
end

local function watch(class, expiry, id, at)
  redis.call('ZADD', expiry, at, id)
  local first = get(class, 'm')
  if not first or at < tonumber(first) then put(class, 'm', ('%.17g'):format(at)) end
end

-- It expires then; or then what is left of it is dropped.
local function put_lease(class, expiry, id, lease, at)
  lease[4] = at
  put(class, 'l:' .. id, struct.pack(LEASE, unpack(lease, 1, 8)))
  watch(class, expiry, id, at)
end

-- When the account's meters admit a request of so many tokens (or the last of `count` such): the time, what stands in
-- the way, and whether that has no time of its own (then the time is only when to look again). Larger than a limit that
-- was only learned is as large as it.
local function earliest(a, q, tokens, class, count)
  local at, why, loose, held = now, false, false, q[2] == 1 and a[2] or 0
  if a[3] > at then at, why = a[3], 'cooldown' end
  repeat
    local before, calendar = at, false
    for i = 1, 4 do
      local rule = q[4 * i - 1]
      if rule > 0 then
        local n = i > 2 and tokens or 1
        if n > q[4 * i] then
          if not q[19 + i] then return NEVER, i, false end
          n = q[4 * i]
        end
        local time = ready(a, i, q, n, i > 2 and held or 0, at, class, count)
        if not time then
          if not loose then at, why, loose = math.max(at, now + POLL), i, true end
        elseif time > at then
          at, why = time, i
        end
        calendar = calendar or rule == 3
      end
    end
  until at == before or not calendar
  if q[1] > 0 and a[1] + (count or 1) > q[1] then
    -- Look again when a lease may expire: its worker may be dead.
    local again = math.min(now + POLL, math.max(now + 1, tonumber(get(class, 'm') or NEVER)))
    if at < again then at, why = again, 'concurrency' end
    loose = true
  end
  return at, why, loose
end

-- A lease ends: its slot and what it held come back. Where tokens are charged by use, they are charged now.
local function close(class, name, lease, tokens)
  local q = quota_of(class, name)
  local a = account_of(class, name, q)
  a[1] = math.max(0, a[1] - 1)
  if q[2] == 1 then
    a[2] = math.max(0, a[2] - lease[2])
    for i = 3, 4 do
      if q[4 * i - 1] > 0 then charge(a, i, q, tokens, class) end
    end
  end
  touched[name] = true
end

-- Expire the leases whose time is over, and drop what is left of those that have been so for long; or only expire
-- the one lease that is given.
local function reap(class, expiry, ttl, one)
  local due = get(class, 'm')
  if not one and (not due or now < tonumber(due)) then return end
  if not redis.call('ZSCORE', expiry, '') then   -- it was lost: only the leases themselves know
    local fields = redis.call('HGETALL', class)
    for n = 1, #fields, 2 do
      if fields[n]:sub(1, 2) == 'l:' then
        local _, _, _, at = struct.unpack(LEASE, fields[n + 1])
        redis.call('ZADD', expiry, at, fields[n]:sub(3))
      end
    end
    redis.call('ZADD', expiry, NEVER, '')
    redis.call('PEXPIRE', expiry, KEEP)
  end
  for _, id in ipairs(one and {one} or redis.call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, 100)) do
    local lease = lease_of(class, id)
    if lease and lease[1] == LIVE then
      close(class, lease[6], lease, lease[2])
      lease[1] = EXPIRED
      put_lease(class, expiry, id, lease, now + 2 * ttl)
    else
      put(class, 'l:' .. id, false)
      redis.call('ZREM', expiry, id)
    end
  end
  local first = redis.call('ZRANGE', expiry, 0, 0, 'WITHSCORES')
  put(class, 'm', first[2] or ('%.17g'):format(NEVER))
end

-- A scope (a key, an account, the pool) that is out, or nothing.
local function scope_of(pool, field)
  local packed = get(pool, field)
  if packed then return cmsgpack.unpack(packed) end
end

-- When it may be used: 0 at once, or a time; nil while it is probed.
local function opens(scope)
  if not scope or scope[1] == 0 then return 0 end
  if scope[4] and scope[5] > now then return nil end
  return scope[1]
end
