-- accounts.lua: an account of a class, its leases and when it can serve.

local LIVE, EXPIRED, TOMB = 1, 2, 3
local REGATHERING, UNHEARD, DAY = 8000, 250, 86400000
local ACCOUNT, LEASE, LEARNED = '<ddddddddddddddd', '<dddddssd', '<Bddddd'
local accounts, quotas, touched = {}, {}, {}

-- The limits of an account: what was declared, and under it what was learned (see learning.lua): of a learned meter i,
-- q[19 + i] says since when. Where none can be read it is `lost`, and nothing is granted. (What is known of an account
-- is read together.)
local function quota_of(class, name)
  local q = quotas[name]
  if not q then
    local cell, declared, learned = cells[class], 'q:' .. name, 'h:' .. name
    if not cell or cell[learned] == nil then cell = load(class, {declared, learned, 'a:' .. name}) end
    local packed = cell[declared] or get(class, 'q')
    q = packed and #packed >= 144 and {struct.unpack('<dddddddddddddddddd', packed)}
    local sum = q and q[1] + q[2] + q[3] + q[4] + q[5] + q[6] + q[7] + q[8] + q[9] + q[10] + q[11] + q[12] + q[13]
      + q[14] + q[15] + q[16] + q[17] + q[18]   -- which is none if one is NaN, or infinite
    local whole = q and sum < NEVER and math.min(unpack(q, 1, 18)) >= 0
    for j = 3, whole and 15 or 0, 4 do
      local rule, first, second = q[j], q[j + 2], q[j + 3]
      whole = whole and (rule == 0 or rule == 3 or first > 0 and second > 0 and (rule == 1 or rule == 2))
    end
    if packed and not whole then
      q = nil
      put(class, cell[declared] and declared or 'q', false)
    end
    if not q then
      q, stale = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, lost = true}, true
    else
      q.tz = packed:sub(145)
      learned = cell[learned]
      for place = 1, learned and #learned - 40 or 0, 41 do
        local i, since, rule, limit, first, second = struct.unpack(LEARNED, learned, place)
        local j = 4 * i - 1
        if q[j] == 0 and sound(since, rule, limit, first, second) and rule % 1 == 0 and rule > 0 and rule < 4 and limit > 0
          and (first > 0 or rule == 3 and first == 0) and second > 0 then
          q[j], q[j + 1], q[j + 2], q[j + 3], q[19 + i] = rule, limit, first, second, since
        end
      end
    end
    quotas[name] = q
  end
  return q
end

-- A lease that is packed; nil where it cannot be read.
local function lease_in(packed)
  local ok, state, tokens, granted, at, probe, account, key, before = pcall(struct.unpack, LEASE, packed)
  local sum = ok and state + tokens + granted + at + probe + before
  if ok and sum < NEVER and sum > -NEVER and tokens >= 0 then
    return {state, tokens, granted, at, probe, account, key, before}
  end
end

local function begin_meter(a, i, q, class)
  local rule = q[4 * i - 1]
  a[5 + 2 * i], a[6 + 2 * i] = 0, 0
  if rule == 1 then a[5 + 2 * i], a[6 + 2 * i] = q[4 * i + 2], now
  elseif rule > 1 then a[5 + 2 * i], a[6 + 2 * i] = (windows or make_windows(class))[rule].fresh(a, i, q) end
end

-- An account as it is known, else a new one. Where it was `lost`, anything may have been used of its last minute then:
-- nothing is left of that, and what may be on its way to the upstream is waited for; where workers know of leases and days,
-- so long that all of them have attended.
local function account_of(class, name, q, lost)
  local a, at = accounts[name], now
  if a and not lost then return a end
  local packed = not a and get(class, 'a:' .. name)
  if packed and #packed >= 120 then
    a = {struct.unpack(ACCOUNT, packed)}
    a[16] = nil
    local place = 121
    if #packed > 120 then a.logs = {} end
    while place + 36 <= #packed do
      local i, head, before, at, amount, length
      i, head, before, at, amount, length, place = struct.unpack('<BddddI4', packed, place)
      a.logs[i] = {head, before, at, amount, packed:sub(place, place + length - 1)}
      place = place + length
    end
  end
  local sum = a and a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7] + a[8] + a[9] + a[10] + a[11] + a[12] + a[13] + a[14]
    + a[15]
  local whole = a and sum < NEVER and sum > -NEVER and math.min(a[1], a[2], a[4], a[6]) >= 0
  for i = 1, whole and 4 or 0 do
    local rule, m, sum, entries = q[4 * i - 1], a.logs and a.logs[i], a[5 + 2 * i], a[6 + 2 * i]
    if rule > 1 and sum < 0 or rule == 2
      and not (m and sound(m[1], m[2], m[3], m[4]) and m[4] >= 0 and entries >= 0 and entries < 1000) then whole = false end
  end
  if not whole then
    a = {0, 0, 0, 0, 0, 0, logs = {}}
    lost = not packed and tonumber(get(class, 'x') or nil)
    lost = lost and lost <= now and now - lost < DAY and lost
    now = lost or now
    for i = 1, 4 do begin_meter(a, i, q, class) end
    a[15] = 0
    if packed then   -- it cannot be read: its meters are used up, and its leases those that there are
      touched[name] = true
      for i = 1, 4 do
        if q[4 * i - 1] > 0 then charge(a, i, q, q[4 * i - 1] == 1 and q[4 * i + 2] or q[4 * i], class) end
      end
      local fields = redis.call('HGETALL', class)
      for n = 1, #fields, 2 do
        local lease = fields[n]:sub(1, 2) == 'l:' and lease_in(fields[n + 1])
        if lease and lease[1] == LIVE and lease[6] == name then
          a[1] = a[1] + 1
          if q[2] == 1 then a[2], a[15] = a[2] + lease[2], a[15] + lease[2] end
        end
      end
    end
  end
  accounts[name] = a
  if lost then
    for i = 1, 3, 2 do
      local rule = q[4 * i - 1]
      local left = rule > 0 and (rule == 1 and q[4 * i + 2] or q[4 * i]) - used(a, i, q, class) or 0
      if left > 0 then charge(a, i, q, left, class) end
    end
    local regathers = q[1] > 0 or q[2] == 1 or q[7] > 0 or q[15] > 0
    a[3], now = math.max(a[3], now + (regathers and REGATHERING or SETTLING)), at
  end
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
  local lease = packed and lease_in(packed)
  if packed and not lease then put(class, 'l:' .. id, false) end
  return lease or nil
end

local function watch(class, expiry, id, at)
  redis.call('ZADD', expiry, at, id)
  if at < (tonumber(get(class, 'm')) or NEVER) then put(class, 'm', ('%.17g'):format(at)) end
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
  if q.lost then return now + POLL, false, true end
  local at, why, loose, held = now, false, false, q[2] == 1 and a[2] or 0
  if a[3] > at then at, why = a[3], 'cooldown' end
  local opens = at
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
        local time = ready(a, i, q, n, i > 2 and held or 0, at, opens, class, count)
        if not time then
          if not loose then at, why, loose = math.max(at, now + POLL), i, true end
        elseif time > at then
          at, why = math.min(time, now + LONGEST), i   -- a limit may have become a millionth of what was used
        end
        calendar = calendar or rule == 3
      end
    end
  until at == before or not calendar
  if q[1] > 0 and a[1] + (count or 1) > q[1] then
    -- Look again when a lease may expire: its worker may be dead.
    local again = math.min(now + POLL, math.max(now + 1, tonumber(get(class, 'm')) or NEVER))
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

-- A lease ends of which nothing was used.
local function refund(class, name, lease)
  local q = quota_of(class, name)
  close(class, name, lease, 0)
  for i = 1, q[2] == 1 and 2 or 4 do
    if charged(q, i, lease) then amend(accounts[name], i, q, i > 2 and -lease[2] or -1, lease[3], class) end
  end
end

-- Expire the leases whose time is over, and drop what is left of those that have been so for long; or only expire
-- the one lease that is given.
local function reap(class, expiry, ttl, one)
  local due = get(class, 'm')
  if not one and (not due or now < (tonumber(due) or 0)) then return end
  if not redis.call('ZSCORE', expiry, '') then   -- it was lost: only the leases themselves know
    local fields = redis.call('HGETALL', class)
    for n = 1, #fields, 2 do
      if fields[n]:sub(1, 2) == 'l:' then
        local lease = lease_in(fields[n + 1])
        redis.call('ZADD', expiry, lease and lease[4] or now, fields[n]:sub(3))
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
  local scope = table_in(pool, field)
  if not scope then return nil end
  local last = field == 'breaker' and scope[6] or scope[8] or {}
  if sound(scope[1], scope[2], scope[5]) and type(scope[3]) == 'string' and type(last) == 'table'
    and (field:sub(1, 2) ~= 'k:' or sound(scope[6], scope[7] or 0)) then return scope end
  cells[pool][field] = false
end

-- When it may be used: 0 at once, or a time; nil while it is probed.
local function opens(scope)
  if not scope or scope[1] == 0 then return 0 end
  if scope[4] and scope[5] > now then return nil end
  return scope[1]
end
