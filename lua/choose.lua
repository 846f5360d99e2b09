-- choose.lua: which account and key could serve a request, and when; and the grant. For acquire; KEYS and ARGV as there.

local NAMES = {'rpm', 'rpd', 'tpm', 'tpd'}
local pool, class, expiry, ring, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ttl, rows, plain = tonumber(ARGV[2]), {}, false

-- The key of an account whose turn it is among those that are open (at most EXAMINED are looked at); when it may be
-- used for the model, what stands in the way until then, and whether that has no time.
local function key_of(row, turn, model)
  local count, start = (#row - 1) / 2, 0
  if count > 1 then
    local place = turn % row[1]
    while place >= row[2 * start + 3] do place, start = place - row[2 * start + 3], start + 1 end
  end
  local best, best_at, best_why, best_loose
  for i = start, start + math.min(count, EXAMINED) - 1 do
    local key = row[2 * (i % count) + 2]
    local k = scope_of(pool, 'k:' .. key)
    if not k then return key, 0 end
    local at, why, loose = opens(k), k[3], false
    if not at then at, loose = now + POLL, true end
    if k[7] and k[7] > at then at, why, loose = k[7], 'disabled', false end
    local missing = k[8] and k[8][model]
    if missing and missing > at then at, why, loose = missing, 'model_not_found', false end
    if k[7] == -1 then at, why, loose = now + POLL, 'disabled', true end
    if not best or at < best_at then best, best_at, best_why, best_loose = key, at, why, loose end
    if at <= now then break end
  end
  return best, best_at, best_why, best_loose
end

-- When an account can serve so many tokens of a model: the time, what stands in the way, whether the time is loose
-- (only when to look again), the key, and the account's weight.
local function judge(account, tokens, model)
  local row = rows[account]
  if not row then
    row = plain and {1, account, 1} or {}
    if not plain then
      local text = redis.call('HGET', ring, account)
      for part in (text or ''):gmatch('%S+') do row[#row + 1] = #row % 2 == 0 and tonumber(part) or part end
    end
    rows[account] = row
  end
  if not row[1] then return NEVER, false, false end   -- another ring's
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  local at, why, loose = earliest(a, q, tokens, class)
  local out = scope_of(pool, 'a:' .. account)
  if out then
    local open = opens(out)
    if not open then at, why, loose = math.max(at, now + POLL), out[3], true
    elseif open > at then at, why = open, out[3] end
  end
  local key, open, key_why, key_loose = key_of(row, a[6], model)
  if open > at then at, why = open, key_why end
  return at, why, loose or key_loose, key, row[1]
end

-- Grant, and put the account where it belongs in the index: behind all others, or where the time of its next is.
-- (Within a millisecond, behind who had fewer rounds of as many turns as it weighs.)
local function grant(id, tokens, account, key, weight, before)
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  for i = 1, q[2] == 1 and 2 or 4 do
    if q[4 * i - 1] > 0 then charge(a, i, q, i > 2 and tokens or 1, class) end
  end
  if q[2] == 1 then a[2] = a[2] + tokens end
  a[1], a[6] = a[1] + 1, a[6] + 1
  touched[account] = true
  local expires, probe = now + ttl, 0
  if get(pool, 'k:' .. key) or get(pool, 'a:' .. account) or get(pool, 'breaker') then
    for _, field in ipairs({'breaker', 'a:' .. account, 'k:' .. key}) do
      local scope = scope_of(pool, field)
      if scope and scope[1] > 0 then
        scope[4], scope[5], probe = id, expires, 1
        put(pool, field, cmsgpack.pack(scope))
      end
    end
  end
  put(class, 'l:' .. id, struct.pack(LEASE, LIVE, tokens, now, expires, probe, account, key))
  watch(class, expiry, id, expires)
  local at = earliest(a, q, 0, class)
  if at <= now then at = (before > now or a[6] % weight == 0) and now - 1 + math.floor(a[6] / weight) % 1000 / 1000 or before end
  if at ~= before then redis.call('ZADD', index, at, account) end
  return 1, key, account, 0
end
