-- choose.lua: which account and key could serve a request, and when; and the grant. For acquire; KEYS and ARGV as there.
-- `holds` are the accounts that are held for a request too large for what comes free: nothing else is granted of them.

local NAMES = {'rpm', 'rpd', 'tpm', 'tpd'}
local pool, class, expiry, ring, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local ttl, rows, plain, holds, holding, listed = tonumber(ARGV[2]), {}, false, {}, false, false

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
-- (only when to look again), the key, and the account's weight. With a `count`: the last of so many requests.
local function judge(account, tokens, model, count)
  local row = rows[account]
  if not row then
    row = plain and {1, account, 1} or {}
    if not plain then
      local text = redis.call('HGET', ring, account)
      stale = stale or not text
      for part in (text or ''):gmatch('%S+') do row[#row + 1] = #row % 2 == 0 and tonumber(part) or part end
      local left = row[1]
      for n = 3, #row, 2 do left = type(left) == 'number' and type(row[n]) == 'number' and row[n] >= 1 and left - row[n] end
      if left ~= 0 or #row % 2 == 0 then row, stale = {}, true end   -- no weights, or not those of the account
    end
    rows[account] = row
  end
  if not row[1] then return now + POLL, false, true end
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  local at, why, loose = earliest(a, q, tokens, class, count)
  local held = holds[account]
  if held and held > at and account ~= holding then at, why = held, 'held' end
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
-- (Within a millisecond, behind who had fewer rounds of as many turns as it weighs.) What is larger than a limit that was
-- only learned reserves as much as that (where no other of tokens was declared): it has waited for all of it, and who comes
-- after need not wait for more.
local function grant(id, tokens, account, key, weight, before)
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  local asked = tokens
  for i = 3, 4 do
    if q[19 + i] then tokens = math.min(tokens, q[4 * i])
    elseif q[4 * i - 1] > 0 then tokens = asked break end
  end
  for i = 1, q[2] == 1 and 2 or 4 do
    if q[4 * i - 1] > 0 then charge(a, i, q, i > 2 and tokens or 1, class) end
  end
  if q[2] == 1 then a[2], a[15] = a[2] + tokens, a[15] + tokens end
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
  put(class, 'l:' .. id, struct.pack(LEASE, LIVE, tokens, now, expires, probe, account, key, a[15] - a[2]))
  watch(class, expiry, id, expires)
  local at = earliest(a, q, 0, class)
  if at <= now then at = (before >= now + 1 or a[6] % weight == 0) and now + math.floor(a[6] / weight) % 1000 / 1000 or before end
  if at ~= before then redis.call('ZADD', index, at, account) end
  return 1, key, account, 0, days_seen(a, q, class)
end

-- Grant a request, or say when it can be served (as acquire replies).
local function serve(id, tokens, model, avoid, wanted, never, large)
  local breaker = scope_of(pool, 'breaker')
  local open = opens(breaker)
  if not open then return 0, POLL, breaker[3], 2, '' end
  if open > now then return 0, open - now, breaker[3], 0, '' end
  local back = tonumber(get(pool, 'back') or nil)
  if back and back <= now and back + SETTLING > now then return 0, back + SETTLING - now, 'back', 0, '' end

  -- Those that are asked for come first, then the index.
  listed = listed or redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')
  local ahead, size, whole = {}, 2, false
  for account in wanted:gmatch('[^\n]+') do
    local at = redis.call('ZSCORE', index, account)
    if at then ahead[#ahead + 1] = account; ahead[#ahead + 1] = at end
  end
  local best, why, loose, whose, bounded, last = NEVER, false, false, '', false, 0
  for round = 1, avoid == '' and 1 or 2 do
    local n = 1 - #ahead
    while true do
      if n > size and not whole then
        listed, whole = redis.call('ZRANGE', index, 0, EXAMINED - 1, 'WITHSCORES'), true
        size = #listed
      end
      local account, at
      if n < 0 then account, at = ahead[n + #ahead], tonumber(ahead[n + #ahead + 1])
      else account, at = listed[n], tonumber(listed[n + 1]) end
      if n > 0 and (not account or at >= now + 1 and at >= best and at <= NEVER) then
        bounded = bounded or account or size < 2 * EXAMINED
        break
      end
      if at > NEVER then at = 0 end
      n, last = n + 2, math.max(last, at)
      local passed = never ~= '' and ('\n' .. never .. '\n'):find('\n' .. account .. '\n', 1, true)
      if not passed and (avoid == '' or (round == 2) == (('\n' .. avoid .. '\n'):find('\n' .. account .. '\n', 1, true) ~= nil)) then
        local time, reason, vague, key, weight = judge(account, tokens, model)
        if time <= now then return grant(id, tokens, account, key, weight, at) end
        if vague and reason == 'disabled' then time = NEVER - 1 end   -- somebody has to enable it
        if time < best or not why then best, why, loose, whose = time, reason, vague, account end
        if not whole then   -- before anything moves
          listed, whole = redis.call('ZRANGE', index, 0, EXAMINED - 1, 'WITHSCORES'), true
          size = #listed
        end
        holding = account   -- a hold may end at any time
        local small = judge(account, 0, '')
        holding = large
        if small <= now then
          small = size == 2 * EXAMINED and now + math.floor(accounts[account][6] / weight) % 1000 / 1000 or at
        end
        if small ~= at then redis.call('ZADD', index, small, account) end
      end
    end
  end
  why = why and (NAMES[why] or why) or ''
  if not bounded then return 0, math.floor(math.max(0, math.min(best, last) - now)), why, 0, whose end
  if best == NEVER then return 3, 0, why, 0, '' end
  if best == NEVER - 1 then best = now + POLL end
  return 0, best - now, why, loose and 2 or 1, whose
end
