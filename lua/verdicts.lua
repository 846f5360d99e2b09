-- verdicts.lua: what the outcome of an attempt does to its key, its account and the pool. (What an error means is
-- _verdict.py's; here is what follows from it for all workers.)

local pool, class = KEYS[1], KEYS[2]
local verdicts, healed   -- healed: something may be used again that could not be, by all who wait

-- All outcomes but a plain success; made when first needed.
local function make_verdicts(index)
  local PROBE_FIRST, PROBE_LAST = 900000, 86400000      -- what is out is probed after 15 min, doubling to a day
  local AUTH_WINDOW, BREAKER_WINDOW, BREAKER_FAILURES = 60000, 10000, 5

  local function save(field, value) put(pool, field, value and cmsgpack.pack(value)) end

  -- Put a scope out; twice as long where its own probe says the same again. Says 'out' where this changed anything.
  local function put_out(field, scope, reason, id, shortest, longest)
    if scope[1] > 0 and scope[4] ~= id then return '' end
    scope[2] = scope[1] > 0 and math.min(longest, scope[2] * 2) or shortest
    scope[1], scope[3], scope[4], scope[5] = now + scope[2], reason, false, 0
    save(field, scope)
    return 'out'
  end

  local function key_scope(field) return scope_of(pool, field) or {0, 0, '', false, 0, 0, false, false} end

  -- Forget what a key's answers said of it; a record that says nothing any more is dropped.
  local function heal_key(field, k)
    k[1], k[2], k[3], k[4], k[5], k[6] = 0, 0, '', false, 0, 0
    save(field, (k[7] or k[8]) and k)
  end

  -- The lease was a probe: what it probed is well, or nothing has been learned.
  local function end_probe(id, account, key, well)
    for _, field in ipairs({'breaker', 'a:' .. account, 'k:' .. key}) do
      local scope = scope_of(pool, field)
      if scope and scope[4] == id then
        healed = true
        if not well then
          scope[4], scope[5] = false, 0
          save(field, scope)
        elseif field == 'k:' .. key then heal_key(field, scope)
        else save(field, false) end
      end
    end
  end

  -- The breaker opens after five failures of one kind in 10 s, from at least half of the accounts that were heard of
  -- meanwhile, without a success. (A refusal for its rate is heard, and no failure: its kind is ''.)
  local function failed(id, account, kind)
    local breaker = scope_of(pool, 'breaker') or {0, 0, '', false, 0, {}}
    if breaker[1] > 0 then
      if breaker[4] == id and breaker[3] == kind then put_out('breaker', breaker, kind, id, 1000, 60000) end
      return
    end
    local log, heard, all, failing, part, alike = {}, {}, 0, {}, 0, 0
    for _, entry in ipairs(breaker[6]) do
      if type(entry) == 'table' and entry[3] and sound(entry[1]) and entry[1] + BREAKER_WINDOW > now then log[#log + 1] = entry end
    end
    log[#log + 1] = {now, kind, account}
    if #log > 64 then table.remove(log, 1) end
    for _, entry in ipairs(log) do
      if not heard[entry[3]] then heard[entry[3]], all = true, all + 1 end
      if entry[2] == kind then
        alike = alike + 1
        if not failing[entry[3]] then failing[entry[3]], part = true, part + 1 end
      end
    end
    breaker[6] = log
    if kind ~= '' and alike >= BREAKER_FAILURES and 2 * part >= all then
      breaker[6] = {}
      put_out('breaker', breaker, kind, id, 1000, 60000)
    else
      save('breaker', breaker)
    end
  end

  return {
    ok = function(id, _, account, key)
      end_probe(id, account, key, true)
      local k = scope_of(pool, 'k:' .. key)
      if k and k[1] == 0 and k[6] > 0 then heal_key('k:' .. key, k) end
      save('auth', false)
      local breaker = scope_of(pool, 'breaker')
      healed = healed or breaker and breaker[1] > 0
      save('breaker', false)
    end,

    unsent = function(id, _, account, key, _, kind)
      if kind ~= '' then failed(id, account, kind) end
      end_probe(id, account, key, false)
    end,
    neutral = function(id, _, account, key) end_probe(id, account, key, false) end,

    -- The account rests for as long as the server says, else for 1 s doubling to a minute; what had been granted
    -- before the last rest began does not double it. So long do its siblings, of those that the caller's ring holds
    -- (others may be nobody's, and would be kept for nothing).
    limited = function(id, lease, account, key, _, wait, jitter, siblings)
      end_probe(id, account, key, true)
      failed(id, account, '')
      local a = account_of(class, account, quota_of(class, account))
      wait = tonumber(wait)
      if not wait then
        if lease[3] >= a[5] then a[4], a[5] = a[4] + 1, now end
        wait = math.min(60000, 1000 * 2 ^ (math.max(1, a[4]) - 1))
      end
      a[3] = math.max(a[3], now + math.floor(wait * (1 + jitter / 10)))
      touched[account] = true
      for sibling in siblings:gmatch('[^\n]+') do
        if redis.call('ZSCORE', index, sibling) then
          local s = account_of(class, sibling, quota_of(class, sibling))
          s[3] = math.max(s[3], a[3])
          touched[sibling] = true
        end
      end
    end,

    account = function(id, _, account, key, _, reason)
      local field = 'a:' .. account
      local advice = put_out(field, scope_of(pool, field) or {0, 0, '', false, 0}, reason, id, PROBE_FIRST, PROBE_LAST)
      end_probe(id, account, key, false)
      return advice
    end,

    -- A 401: out after two in a row. But where enough accounts fail alike no key is at fault, and those that were put
    -- out meanwhile return.
    key = function(id, _, account, key)
      local field = 'k:' .. key
      local seen, accounts, differing, failing = table_in(pool, 'auth') or {}, {}, 0, 0
      seen[key] = {now, account}
      for other, entry in pairs(seen) do
        if type(entry) ~= 'table' or not entry[2] or not sound(entry[1]) or entry[1] + AUTH_WINDOW <= now then seen[other] = nil
        else
          failing = failing + 1
          if not accounts[entry[2]] then accounts[entry[2]], differing = true, differing + 1 end
        end
      end
      save('auth', seen)
      if differing >= math.min(3, redis.call('ZCARD', index)) and failing >= math.min(3, tonumber(ARGV[3])) then
        local returned = false
        for other in pairs(seen) do
          local k = scope_of(pool, 'k:' .. other)
          if k and (k[1] == 0 or k[3] == 'invalid_api_key') then
            returned = returned or k[1] > 0
            heal_key('k:' .. other, k)
          end
        end
        healed, reordered = healed or returned, reordered or returned
        end_probe(id, account, key, false)
        return 'fault'
      end
      local k = key_scope(field)
      k[6] = k[6] + 1
      save(field, k)
      local advice = ''
      if k[6] >= 2 or k[1] > 0 then advice = put_out(field, k, 'invalid_api_key', id, PROBE_FIRST, PROBE_LAST) end
      end_probe(id, account, key, false)
      return advice
    end,

    -- The model is missing for this key only if another account has served it; else its name may be wrong.
    model = function(id, _, account, key, model)
      end_probe(id, account, key, false)
      local served, field = table_in(class, 's:' .. model), 'k:' .. key
      if not served then return 'unknown' end
      if served[1] == account and not served[2] then return '' end
      local k = key_scope(field)
      local missing = k[8] or {}
      for other, at in pairs(missing) do if at <= now then missing[other] = nil end end
      missing[model], k[8] = now + PROBE_FIRST, missing
      save(field, k)
      return 'out'
    end,

    failed = function(id, _, account, key, _, kind)
      failed(id, account, kind)
      end_probe(id, account, key, false)
    end,
  }
end

-- What follows from an outcome; returns the advice to who settled.
local function conclude(id, lease, account, key, model, outcome, detail, jitter, siblings, index)
  if outcome == 'ok' then
    local a, served = account_of(class, account, quota_of(class, account)), table_in(class, 's:' .. model) or {}
    if a[4] > 0 then a[4] = 0; touched[account] = true end
    if served[1] ~= account and not served[2] then
      served[#served + 1] = account
      put(class, 's:' .. model, cmsgpack.pack(served))
    end
    if not (get(pool, 'auth') or get(pool, 'breaker') or get(pool, 'a:' .. account) or get(pool, 'k:' .. key)) then
      return ''
    end
  end
  verdicts = verdicts or make_verdicts(index)
  return (verdicts[outcome] or verdicts.neutral)(id, lease, account, key, model, detail, jitter, siblings) or ''
end
