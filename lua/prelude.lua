-- prelude.lua: what every verb shares. The loader puts it in front of each, and after it the parts that the verb's
-- head names in a line "USES meters, accounts".
--
-- THE SCHEMA. All keys of a pool carry one hash tag. Times are milliseconds since the pool's base (those of calendars
-- since 1970). What every lease touches is packed with struct (little-endian doubles), the rest with cmsgpack.
-- PEXPIRE only collects what has been idle for KEEP.
--
-- WHAT IS LOST. A server may evict any of the keys alone. So the base is 1970 until the clock has jumped back: what
-- outlives the pool's hash keeps its meaning. A new pool's revision is later than all of those before, and its epoch is
-- another: rings that were registered under an older one are registered again. Who needs what is not there says REGISTER
-- (or, of a lease, that it is gone); the leases of a class outlive the list of when they expire.
--
-- A class that is lost is born again, under another name, by the first to register. Who knew it as it was before says so
-- when it registers: then what is left of a minute is taken for used (see account_of), and each worker restores what it knows, its
-- live leases and what it has seen of days. Whoever comes with an older birth is told to register.
--
--   stable:{pool}:pool           hash
--     m            base, last now, raw clock when it was seen to jump back or -1, admin revision, epoch
--     a:<account>  an account that is out {until or 0, pause, reason, probe's lease or false, probe's expiry}
--     k:<key>      the same of a key, then {.., 401s in a row, disabled until or false (-1: for good), {model = until}}
--     breaker      the same of the pool (its reason is a kind of failure), then {.., {{time, kind, account}, ..}}
--     classes      {class, ..}: all that have been registered
--     back         when the first worker came back after the store was away for all of them: until the others have told
--                  what they used meanwhile, nothing is granted
--     auth         {[key] = {time of its 401, account}}: those since the last success
--   stable:{pool}:class:<class>  hash
--     m            no lease expires before this
--     w            the claims of those who wait (see claims.lua); not there while nobody does
--     q            the quota of the accounts that have none of their own
--     q:<account>  the quota of an account: concurrency or 0, whether tokens are charged by use, then four numbers for
--                  each of rpm, rpd, tpm, tpd (see meters.lua); then the time zone of its days
--     h:<account>  limits that responses' headers told of and nobody has declared: for each the meter's number 1 to 4 (a
--                  byte), since when, and its four numbers. What `register` declares lies over it, and drops it
--     d:<tz>       {midnight, ..}: days of a time zone, epoch ms
--     b            birth: what this class is called since it was begun
--     x            when a worker said that the class had been lost; not there where none did
--     e            {[worker] = {number, time}}: the last that each has restored of what it spent without us
--     r:<ring>.<birth>  admin revision that the ring's index has seen, when PEXPIRE was set, whether it is plain: every
--                  account has one key, of its own name, and weight 1 (then the hash of the ring is not needed); epoch
--     a:<account>  live leases, tokens held, cooldown until, refusals in a row, since, turn, then two numbers for each of
--                  rpm, rpd, tpm, tpd, tokens that it has ever held; then the logs of sliding windows
--     l:<lease>    state, tokens, granted, when it expires (or is dropped), is a probe; account and key; of the tokens
--                  that the account had ever held, those that it held no longer when this was granted
--     s:<model>    {account, ..}: up to two that have served the model
--   stable:{pool}:expiry:<class> zset  lease -> when it expires, or when what is left of it is dropped
--   stable:{pool}:ring:<ring>    hash  account -> "weight key weight key weight ..", the account's and each key's
--   stable:{pool}:ready:<ring>   zset  account -> the ready index: the time when it was last sent to the back, or where it
--                                      cannot serve even the smallest request, a lower bound of when it can
--   stable:{pool}:wakes:<class>  list  hints for those who wait, popped by one each
--   stable:{pool}:roster         zset  the workers that are there (see attend.lua)
--
-- WHAT IS GARBLED, by whoever else can write, is never trusted: a meter that cannot be read is read as used up, a quota as
-- unknown (REGISTER), the rest as lost. No number of the schema is beyond NEVER. (What is wrong but could be right is
-- believed: who may write here may also raise a limit.)
--
-- A script's body runs anew for every call, and each closure that it makes costs as much as a small command: what a
-- plain grant does not need is therefore made when it is first used.

local NEVER, LONGEST, POLL, EXAMINED, KEEP, SETTLING = 4503599627370496, 1e12, 5000, 16, 172800000, 2000
local cells, changed = {}, {}
local base, now

-- Read fields of a hash, once; a field that is not there is false.
local function load(key, fields)
  local cell, got = cells[key] or {}, redis.call('HMGET', key, unpack(fields))
  cells[key] = cell
  for i = 1, #fields do
    if cell[fields[i]] == nil then cell[fields[i]] = got[i] end
  end
  return cell
end

local function get(key, field)
  local cell = cells[key]
  if not cell or cell[field] == nil then cell = load(key, {field}) end
  return cell[field]
end

-- Whether numbers are some: nil, NaN and what is far out of the schema are not.
local function sound(...)
  for n = 1, select('#', ...) do
    local number = select(n, ...)
    if type(number) ~= 'number' or not (number > -NEVER and number <= NEVER) then return false end
  end
  return true
end

-- A table that is packed in a field; nil where there is none.
local function table_in(key, field)
  local packed = get(key, field)
  if not packed then return nil end
  local ok, value = pcall(cmsgpack.unpack, packed)
  if ok and type(value) == 'table' then return value end
  cells[key][field] = false
end

-- Fields are written (or dropped: false) together at the end.
local function put(key, field, value)
  cells[key][field] = value
  local fields = changed[key]
  if fields then fields[field] = value else changed[key] = {[field] = value} end
end

local function flush()
  for key, fields in pairs(changed) do
    local set, sets = {}, 0
    for field, value in pairs(fields) do
      if value then set[sets + 1], set[sets + 2], sets = field, value, sets + 2
      else redis.call('HDEL', key, field) end
    end
    for i = 1, sets, 1000 do redis.call('HSET', key, unpack(set, i, math.min(i + 999, sets))) end
  end
end

-- The pool's clock: ARGV[1] in tests, else the server's. A jump back freezes it for at most a minute, then the base
-- moves. `last` is kept to the second; a smaller step back is harmless, since no meter refills for negative time.
-- Returns the admin revision and the epoch; nothing where the pool is not known (then its clock is the server's).
local function tick(pool)
  local meta, raw = get(pool, 'm'), tonumber(ARGV[1])
  if not raw then
    local time = redis.call('TIME')
    raw = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  local last, back, revision, after
  if meta and #meta >= 32 then base, last, back, revision, after = struct.unpack('<dddd', meta) end
  local sum = base and base + last + back + revision
  if not (base and sum > -NEVER and sum < NEVER) then
    cells[pool].m, base, now = false, 0, raw
    return nil
  end
  now = raw - base
  local was_base, was_last, was_back = base, last, back
  if now >= last then
    if back >= 0 or now - last >= 1000 then last, back = now, -1 end
  else
    now = last
    if back < 0 or raw < back then back = raw
    elseif raw - back >= 60000 then base, back = raw - now, -1 end
  end
  if base ~= was_base or last ~= was_last or back ~= was_back then
    put(pool, 'm', struct.pack('<dddd', base, last, back, revision) .. meta:sub(after))
  end
  return revision, meta:sub(after)
end
