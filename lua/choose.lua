-- choose.lua: which account and key could serve a request, and when. For acquire; KEYS as there.

local NAMES = {'rpm', 'rpd', 'tpm', 'tpd'}
local pool, class, expiry, ring, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local rows, listed, whole, moved, plain = {}, false, false, false, false

-- The index from its front: first only one account, then EXAMINED.
local function list(count)
  listed, whole = call('ZRANGE', index, 0, count - 1, 'WITHSCORES'), count > 1
end

-- Read in two commands what a plain grant needs: the account whose turn it most likely is, with all that is known of
-- it, beside what every request needs. Says whether the ring is known.
local function look_ahead(mark, id)
  list(1)
  local account = listed[1]
  if not account then return false end
  load(pool, {'m', 'breaker', 'a:' .. account, 'k:' .. account})
  return load(class, {'m', 'q', mark, 'l:' .. id, 'a:' .. account, 'q:' .. account})[mark]
end

-- An index that has not seen the last thing an admin did says nothing of who is not ready.
local function refresh_index(mark, revision)
  local known, kept, is_plain = struct.unpack('<ddd', get(class, mark))
  plain = is_plain == 1
  if known == revision and now - kept < KEEP / 48 then return end
  if known ~= revision then call('ZUNIONSTORE', index, 1, index, 'WEIGHTS', 0) end
  for i = 1, #KEYS do call('PEXPIRE', KEYS[i], KEEP) end
  put(class, mark, struct.pack('<ddd', revision, now, is_plain))
  list(1)
end

-- An account's row of the ring: {weight, key, weight, key, weight, ..}.
local function row_of(account)
  local row = rows[account]
  if row == nil then
    row = plain and {1, account, 1} or {}
    if not plain then
      local text = call('HGET', ring, account)
      for part in (text or ''):gmatch('%S+') do row[#row + 1] = #row % 2 == 0 and tonumber(part) or part end
    end
    rows[account] = row
  end
  return row
end

-- When a key may be used for a model, what stands in the way until then, and whether that has no time.
local function key_opens(key, model)
  local k = scope_of(pool, 'k:' .. key)
  if not k then return 0 end
  if k[7] == -1 then return now + POLL, 'disabled', true end
  local at, why, loose = opens(k), k[3], false
  if not at then at, loose = now + POLL, true end
  if k[7] and k[7] > at then at, why, loose = k[7], 'disabled', false end
  local missing = k[8] and k[8][model]
  if missing and missing > at then at, why, loose = missing, 'model_not_found', false end
  return at, why, loose
end

-- The key of an account whose turn it is among those that are open (at most EXAMINED are looked at).
local function key_of(row, turn, model)
  if #row == 3 then return row[2], key_opens(row[2], model) end
  local count, place, start = (#row - 1) / 2, turn % row[1], 0
  while place >= row[2 * start + 3] do place, start = place - row[2 * start + 3], start + 1 end
  local best, best_at, best_why, best_loose
  for i = start, start + min(count, EXAMINED) - 1 do
    local key = row[2 * (i % count) + 2]
    local at, why, loose = key_opens(key, model)
    if not best or at < best_at then best, best_at, best_why, best_loose = key, at, why, loose end
    if at <= now then break end
  end
  return best, best_at, best_why, best_loose
end

-- When an account can serve so many tokens of a model: the time, what stands in the way, whether the time is loose
-- (only when to look again), the key, and the account's weight.
local function judge(account, tokens, model)
  local row = row_of(account)
  if not row[1] then return NEVER, false, false end   -- another ring's
  local q = quota_of(class, account)
  local a = account_of(class, account, q)
  local at, why, loose = earliest(a, q, tokens, class)
  local out = scope_of(pool, 'a:' .. account)
  if out then
    local open = opens(out)
    if not open then at, why, loose = max(at, now + POLL), out[3], true
    elseif open > at then at, why = open, out[3] end
  end
  local key, open, key_why, key_loose = key_of(row, a[6], model)
  if open > at then at, why = open, key_why end
  return at, why, loose or key_loose, key, row[1]
end

-- Where the account stands that was used last: behind all others. (Within a millisecond, behind who had fewer turns.)
local function back(a) return now - 1 + a[6] % 1000 / 1000 end

local function place(account, at, before)
  if at ~= before then
    call('ZADD', index, at, account)
    moved = true
  end
end

-- The accounts that are asked for, with their scores: {account, score, ..}.
local function scores_of(wanted)
  local found = {}
  for account in wanted:gmatch('[^\n]+') do
    local at = call('ZSCORE', index, account)
    if at then found[#found + 1] = account; found[#found + 1] = at end
  end
  return found
end

-- The candidates in the order of choice: those asked for, then the index.
local function candidate(n, asked_for)
  local i, found = 2 * n - 1, asked_for
  if not found or i > #found then
    i, found = i - (found and #found or 0), listed
    if not listed or i > #listed and not whole then list(i > 1 and EXAMINED or 1); found = listed end
  end
  return found[i], tonumber(found[i + 1])
end
