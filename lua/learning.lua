-- learning.lua: what the headers of responses say of an account's limits.
--
-- THE TEXT. Rows joined by ";", of six words each: number of the meter (0 to 3: rpm, rpd, tpm, tpd), limit or "-", what
-- remains or "-", then what the meter is if nobody has declared it: rule and its two numbers (see meters.lua). A row that
-- is not so, or says what cannot be, changes nothing.
--   What remains lowers a meter and never raises it: it lacks what has not arrived so far, and may be old. It was said at
-- some time since the grant, and what may have happened since is taken in its favour. So where only we use an account,
-- responses lower nothing, in whichever order requests arrive and leases are settled. (But for one thing: a bucket
-- that was full may lose what it refills within the headroom, once, where one request arrives that much sooner than
-- those before it.)
--   A bucket has refilled since the grant. A sliding log is compared only if nothing has expired from it since; what
-- others have used goes to the entry of the grant. A calendar is compared within one window, and not so close to its
-- start that the upstream's clock may still have been in the one before. Where tokens are charged by use, the upstream
-- may hold what the account has held at any time since the grant, and we hold that too or have charged less by now: so
-- much is added to what remains.
--   A limit that nobody has declared is learned. It lies under what is declared, and refuses no request as too large: such
-- a one waits until all of the limit is free, reserves that, and is the upstream's to refuse.

local ROW = '^([0-3]) ([%d%-]+) ([%d%-]+) ([0-3]) ([%d.e+%-]+) ([%d.e+%-]+)$'
local MOST = 1e12
local reordered   -- some may serve sooner than their rings' indexes say: these are zeroed, as after an admin's change

-- A changed limit keeps the level, clamped to the new capacity; another rule starts with what the old one had used.
local function carry(a, i, old, new, class)
  local x, was, is = 5 + 2 * i, old[4 * i - 1], new[4 * i - 1]
  local taken = 0
  if was == 1 then
    charge(a, i, old, 0, class)
    taken = math.ceil(old[4 * i + 2] - a[x])
  elseif was > 1 then taken = (windows or make_windows(class))[was].used(a, i, old) end
  if was == is and (is ~= 3 or old.tz == new.tz) then
    if is == 1 then a[x] = math.min(a[x], new[4 * i + 2]) end
    return
  end
  a.logs = a.logs or {}
  a.logs[i] = nil
  begin_meter(a, i, new, class)
  if is > 0 and taken > 0 then charge(a, i, new, taken, class) end
end

local function put_learned(class, name, q)
  local packed = ''
  for i = 1, 4 do
    local j, since = 4 * i - 1, q[19 + i]
    if since then packed = packed .. struct.pack(LEARNED, i, since, unpack(q, j, j + 3)) end
  end
  put(class, 'h:' .. name, packed ~= '' and packed)
end

-- No more is left of a meter than that.
local function lower(a, i, q, lease, left, class)
  local granted, j, x = lease[3], 4 * i - 1, 5 + 2 * i
  if q[2] == 1 and i > 2 then left = left + a[15] - lease[8] end
  if q[j] == 1 then
    local level, at = a[x], a[x + 1]
    if now > at then level, at = math.min(q[j + 3], level + (now - at) * q[j + 2]), now end
    left = left + q[j + 2] * math.max(0, now - granted)
    if left < level then a[x], a[x + 1] = left, at end
    return
  end
  local window, number = (windows or make_windows(class))[q[j]], q[j + 2]
  window.charge(a, i, q, 0)   -- what has expired goes
  local used, alike = a[x], false
  local missing = q[j + 1] - left - used
  if q[j] == 2 then alike = granted + number > now and a.logs[i][1] + number <= granted
  else alike = granted + base >= a[x + 1] + number end
  if missing > 0 and alike then
    window.amend(a, i, q, missing, granted)
    if q[j] == 2 and a[x] == used then window.charge(a, i, q, missing) end   -- the grant has no entry
  end
end

-- Returns how many of those who wait may be served sooner.
local function learn(class, name, lease, seen)
  local q, changed, grown, before = quota_of(class, name), false, false, nil
  local a = account_of(class, name, q)
  touched[name] = true
  for row in seen:gmatch('[^;]+') do
    local number, of, remaining, rule, first, second = row:match(ROW)
    local limit, left = tonumber(of), tonumber(remaining)
    if number and (of == '-' or limit and limit >= 1 and limit <= MOST)
      and (remaining == '-' or left and left >= 0 and left <= (limit or MOST)) then
      local i, j = number + 1, 4 * number + 3
      if limit and (q[j] == 0 or q[19 + i] and q[j + 1] ~= limit) then
        rule, first, second = tonumber(rule), tonumber(first), tonumber(second)
        if rule > 0 and first and second and second >= 1 and second <= MOST and second % 1 == 0 and first <= MOST
          and (rule == 1 and first > 0 or rule > 1 and first >= 0 and first % 1 == 0) then
          local old = {unpack(q, 1, 18)}
          old.tz, changed = q.tz, true
          if old[j] > 0 then
            before, grown = before or earliest(a, q, 0, class), grown or limit > old[j + 1] or rule ~= old[j]
          end
          q[j], q[j + 1], q[j + 2], q[j + 3], q[19 + i] = rule, limit, first, second, q[19 + i] or now
          carry(a, i, old, q, class)
        else left = nil end
      end
      if left and q[j] > 0 then lower(a, i, q, lease, left, class) end
    end
  end
  if changed then put_learned(class, name, q) end
  if before and before > now and earliest(a, q, 0, class) < before then
    reordered = true
    return NEVER
  end
  return grown and 1 or 0
end
