-- choose.lua: which account and key could serve a request, and when. For acquire; KEYS and ARGV as there.

local NAMES = {'rpm', 'rpd', 'tpm', 'tpd'}
local pool, class, expiry, ring, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local rows, plain = {}, false

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
