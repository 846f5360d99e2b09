-- meters.lua: how much of a limit is used, under each window rule. A quota `q` has four numbers for the meter i (from
-- q[4 * i - 1] on: rule or 0, limit, and two that _limits.py compiles), an account `a` two (from a[5 + 2 * i] on):
--   1 bucket    q: rate per ms, capacity       a: level, at
--   2 sliding   q: period, slot                a: sum, entries; and a.logs[i]
--   3 calendar  q: headroom, period (0: days)  a: used, start of the window in epoch ms
-- Sliding: an exact log up to 100 entries; beyond that an entry's time is the end of its slot. The newest entry stands
-- apart: a.logs[i] = {head, before, at, amount, log}, where `log` has the older ones as pairs of varints (time since the one
-- before, amount), `head` is the time before its first entry, which is that of the last entry that has expired (at first, two
-- periods ago), and `before` that of its last. A time since is twice the ms, or where it is a number of slots, twice that
-- and one.

local windows
local stale   -- something that was registered is not there, or of another time: it is to be registered again

-- Sliding and calendar; made when first needed.
local function make_windows(class)
  local char, byte, floor = string.char, string.byte, math.floor
  local days_of = {}

  local function varint(n)
    local bytes = ''
    while n >= 128 do bytes, n = bytes .. char(n % 128 + 128), floor(n / 128) end
    return bytes .. char(n)
  end

  local function unvarint(log, place)
    local n, unit = 0, 1
    while true do
      local one = byte(log, place) or 0   -- of a log that is garbled nothing is more
      place = place + 1
      if one < 128 then return n + one * unit, place end
      n, unit = n + (one - 128) * unit, unit * 128
    end
  end

  -- The entry at a place of the log: time since the one before, amount, and the places of the amount and behind it.
  local function entry(log, place, slot)
    local delta, after = unvarint(log, place)
    local amount, following = unvarint(log, after)
    return delta % 2 == 0 and delta / 2 or (delta - 1) / 2 * slot, amount, after, following
  end

  local function prune(a, i, q)
    local m, place, x, period, slot = a.logs[i], 1, 5 + 2 * i, q[4 * i + 1], q[4 * i + 2]
    while a[x + 1] > 1 do
      local delta, amount, _, following = entry(m[5], place, slot)
      if m[1] + delta + period > now then break end
      place = following
      a[x], a[x + 1], m[1] = a[x] - amount, a[x + 1] - 1, m[1] + delta
    end
    if place > 1 then m[5] = m[5]:sub(place) end
    if a[x + 1] == 1 and m[3] + period <= now then a[x], a[x + 1], m[1], m[2] = 0, 0, m[3], m[3] end
    return m
  end

  -- The calendar's window at a time: its start and end in epoch ms; nothing when its days are not registered so far.
  local function window(q, i, at)
    local abs, period = at + base, q[4 * i + 2]
    if period > 0 then return abs - abs % period, abs - abs % period + period end
    local days = days_of[q.tz]
    if not days then
      days = table_in(class, 'd:' .. q.tz) or {}
      if not sound(unpack(days)) then days = {} end
      days_of[q.tz] = days
    end
    for day = 1, #days - 1 do
      if abs >= days[day] and abs < days[day + 1] then return days[day], days[day + 1] end
    end
    stale = stale or at == now
  end

  local function period(q, i) return q[4 * i + 2] > 0 and q[4 * i + 2] or 86400000 end

  -- Whether what an account has used was another window's: an earlier one's, or since the clock jumped back, one's far ahead.
  local function others(a, i, q, start)
    return a[6 + 2 * i] < start or a[6 + 2 * i] > start + period(q, i)
  end

  local rules = {
    [2] = {
      ready = function(a, i, q, need)
        local over = a[5 + 2 * i] + need - q[4 * i]
        if over <= 0 then return 0 end
        local m, place, period = a.logs[i], 1, q[4 * i + 1]
        local time = m[1]
        for _ = 2, a[6 + 2 * i] do
          local delta, amount, _, following = entry(m[5], place, q[4 * i + 2])
          place, time, over = following, time + delta, over - amount
          if over <= 0 then return time + period end
        end
        return m[3] + period
      end,
      charge = function(a, i, q, n)
        local m, x, at, slot = prune(a, i, q), 5 + 2 * i, now, q[4 * i + 2]
        if n == 0 then return end
        if a[x + 1] >= 100 then at = math.ceil(now / slot) * slot end
        a[x] = a[x] + n
        if a[x + 1] > 0 and m[3] >= at then
          m[4] = m[4] + n
          return
        end
        if a[x + 1] > 0 then
          local since = m[3] - m[2]
          since = since > 0 and since % slot == 0 and 2 * since / slot + 1 or 2 * since
          m[5], m[2] = m[5] .. varint(since) .. varint(m[4]), m[3]
        end
        a[x + 1], m[3], m[4] = a[x + 1] + 1, at, n
      end,
      amend = function(a, i, q, n, granted)
        if granted + q[4 * i + 1] <= now then return end   -- its window has gone
        local m, x, place = prune(a, i, q), 5 + 2 * i, 1
        local time = m[1]
        for _ = 2, a[x + 1] do
          local delta, amount, after, following = entry(m[5], place, q[4 * i + 2])
          time = time + delta
          if time >= granted then
            local amended = math.max(0, amount + n)
            a[x] = a[x] + amended - amount
            m[5] = m[5]:sub(1, after - 1) .. varint(amended) .. m[5]:sub(following)
            return
          end
          place = following
        end
        if a[x + 1] > 0 and m[3] >= granted then
          local amended = math.max(0, m[4] + n)
          a[x], m[4] = a[x] + amended - m[4], amended
        end
      end,
      -- What is used now; looking changes nothing.
      used = function(a, i, q)
        local m, sum, place, period = a.logs[i], a[5 + 2 * i], 1, q[4 * i + 1]
        local time = m[1]
        for _ = 2, a[6 + 2 * i] do
          local delta, amount, _, following = entry(m[5], place, q[4 * i + 2])
          place, time = following, time + delta
          if time + period > now then return sum end
          sum = sum - amount
        end
        return a[6 + 2 * i] > 0 and m[3] + period <= now and sum - m[4] or sum
      end,
      counts = function(i, q, at) return at + q[4 * i + 1] > now end,
      fresh = function(a, i, q)
        local before = now - 2 * q[4 * i + 1]
        a.logs[i] = {before, before, before, 0, ''}
        return 0, 0
      end,
      period = function(q, i) return q[4 * i + 1] end,
    },
    [3] = {
      ready = function(a, i, q, need, at)
        local start, finish = window(q, i, at)
        if not start then return now + POLL end   -- of `at` it would rise for ever
        if at + base >= finish - q[4 * i + 1] then return finish - base end
        if others(a, i, q, start) or a[5 + 2 * i] + need <= q[4 * i] then return 0 end
        return finish - base
      end,
      charge = function(a, i, q, n)
        local start = window(q, i, now)
        if start and others(a, i, q, start) then a[5 + 2 * i], a[6 + 2 * i] = 0, start end
        a[5 + 2 * i] = a[5 + 2 * i] + n
      end,
      amend = function(a, i, q, n, granted)
        if window(q, i, granted) == a[6 + 2 * i] then a[5 + 2 * i] = math.max(0, a[5 + 2 * i] + n) end
      end,
      used = function(a, i, q)
        local start = window(q, i, now)
        return start and others(a, i, q, start) and 0 or a[5 + 2 * i]
      end,
      counts = function(i, q, at)
        local start = window(q, i, now)
        return start and start == window(q, i, at)
      end,
      fresh = function(a, i, q) return 0, window(q, i, now) or 0 end,
      period = period,
    },
  }
  windows = rules
  return rules
end

-- When the meter admits `n` beside what is `held`: a time, or nil where that has none. A request larger than a bucket
-- but within the limit waits until the bucket is full. A calendar is judged as it will be at the time `at`. With a
-- `count`: when it admits the last of so many, one after the other, from the time `opens` on.
local function ready(a, i, q, n, held, at, opens, class, count)
  local j = 4 * i
  if q[j - 1] == 1 then
    local need = n + held
    if need > q[j + 2] then
      if held > 0 then return nil end
      need = q[j + 2]
    end
    local level, since = a[5 + 2 * i], a[6 + 2 * i]
    if count and count > 1 then   -- until it opens it fills up, and no further
      need = need + (count - 1) * math.min(n, q[j + 2])
      if opens > since then level, since = math.min(q[j + 2], level + (opens - since) * q[j + 1]), opens end
    end
    if level >= need then return 0 end
    return since + math.ceil((need - level) / q[j + 1])
  end
  if n + held > q[j] then return nil end
  local rule = (windows or make_windows(class))[q[j - 1]]
  if not count then return rule.ready(a, i, q, n + held, at) end
  local need = n * count + held
  local rounds = math.max(0, math.ceil(need / q[j]) - 1)
  local time = rule.ready(a, i, q, need - rounds * q[j], at)
  return rounds > 0 and math.max(now, time) + rounds * rule.period(q, i) or time
end

local function charge(a, i, q, n, class)
  local j, x = 4 * i, 5 + 2 * i
  if q[j - 1] == 1 then
    local at = a[x + 1]
    local level = a[x]
    if now > at then level, a[x + 1] = level + (now - at) * q[j + 1], now end
    a[x] = math.min(q[j + 2], level) - n
  else
    (windows or make_windows(class))[q[j - 1]].charge(a, i, q, n)
  end
end

-- What is used of a meter now; looking changes nothing.
local function used(a, i, q, class)
  local j, x = 4 * i, 5 + 2 * i
  if q[j - 1] ~= 1 then return (windows or make_windows(class))[q[j - 1]].used(a, i, q) end
  return q[j + 2] - math.min(q[j + 2], a[x] + math.max(0, now - a[x + 1]) * q[j + 1])
end

-- What an account has used of its days, for a worker to know if this is lost: now, requests, tokens; '' without limits.
local function days_seen(a, q, class)
  if q[7] == 0 and q[15] == 0 then return '' end
  return ('%.0f %.17g %.17g'):format(now, q[7] > 0 and used(a, 2, q, class) or 0, q[15] > 0 and used(a, 4, q, class) or 0)
end
