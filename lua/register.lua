-- register.lua: make a worker's keys and limits known for one class; the last one to register wins. Who declares no limit
-- at all leaves those that others have declared: a look at the pool from a shell must not lift them.
-- USES server, meters, accounts, claims, learning
-- KEYS  1 pool, 2 class, 3 expiry, 4 ring, 5 ready index, 6 wakes
-- ARGV  1 now in ms ('' = the server's), 2 ring, 3 an epoch (taken where the pool has none), 4 days as JSON
--       {tz: [epoch ms, ..]}, 5 quotas as JSON [[18 numbers, time zone], ..], 6 members as JSON
--       [[account, number of its quota, weight, key, weight, ..], ..], 7 a birth (taken where the class has none), 8 the
--       birth that the worker knew ('': none), 9 how many ms ago it last did
-- REPLY {epoch, accounts whose limits this changed, birth, 1 where what the worker knew was lost since};
--       the error OLD from a server that is older than Redis 6.2

local pool, class, expiry, ring, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
if is_old(expiry) then return redis.error_reply('OLD') end
local revision, epoch = tick(pool)
if not revision then
  revision, epoch = now, ARGV[3]
  put(pool, 'm', struct.pack('<dddd', base, now, -1, revision) .. epoch)
end
load(class, {'q', 'w', 'b', 'x'})
local birth = get(class, 'b')
if not birth then
  birth = ARGV[7]
  put(class, 'b', birth)
end
local mark = 'r:' .. ARGV[2] .. '.' .. birth
local name, names = class:match(':class:(.*)$'), table_in(pool, 'classes') or {}
local listed = false
for _, other in ipairs(names) do listed = listed or other == name end
if not listed then
  names[#names + 1] = name
  put(pool, 'classes', cmsgpack.pack(names))
end
for tz, days in pairs(cjson.decode(ARGV[4])) do put(class, 'd:' .. tz, cmsgpack.pack(days)) end

local packed, silent, rows = {}, {}, {}
for n, quota in ipairs(cjson.decode(ARGV[5])) do
  silent[n] = quota[1] + quota[3] + quota[7] + quota[11] + quota[15] == 0
  packed[n] = struct.pack('<dddddddddddddddddd', unpack(quota, 1, 18)) .. quota[19]
end
local usual = get(class, 'q')
if not usual then
  usual = packed[1]
  put(class, 'q', usual)
end

local members, moved, plain = cjson.decode(ARGV[6]), 0, 1
for first = 1, #members, 500 do
  local fields, row, scores = {}, {}, {}
  local last = math.min(first + 499, #members)
  for m = first, last do
    fields[#fields + 1] = 'q:' .. members[m][1]
    fields[#fields + 1] = 'h:' .. members[m][1]
    fields[#fields + 1] = 'a:' .. members[m][1]
  end
  local known = load(class, fields)
  for m = first, last do
    local account, n = members[m][1], members[m][2]
    if not silent[n] and (known['q:' .. account] or usual) ~= packed[n] then
      local old = known['a:' .. account] and quota_of(class, account)
      moved = moved + 1
      put(class, 'q:' .. account, packed[n] ~= usual and packed[n])
      quotas[account] = nil
      if old then
        local new = quota_of(class, account)
        local a = account_of(class, account, old.lost and new or old)
        for i = 1, old.lost and 0 or 4 do carry(a, i, old, new, class) end
        if known['h:' .. account] then put_learned(class, account, new) end
        touched[account] = true
      end
    end
    local text = table.concat(members[m], ' ', 3)
    if text ~= '1 ' .. account .. ' 1' then plain = 0 end
    row[#row + 1] = account; row[#row + 1] = text
    scores[#scores + 1] = 0; scores[#scores + 1] = account
  end
  rows[#rows + 1] = row
  if get(class, mark) then redis.call('ZADD', index, 'NX', unpack(scores))
  else redis.call('ZADD', index, unpack(scores)) end   -- what is left of an index says nothing of a new class
end
if moved > 0 then
  revision = revision + 1
  local meta = get(pool, 'm')
  put(pool, 'm', meta:sub(1, 24) .. struct.pack('<d', revision) .. epoch)
  local claims, wake = claims_of(class)
  wake(KEYS[6], #claims)
end
put(class, mark, struct.pack('<ddd', revision, now, plain) .. epoch)
local lost = ARGV[8] ~= '' and ARGV[8] ~= birth and tonumber(ARGV[9]) < DAY
if lost and not get(class, 'x') then
  put(class, 'x', ('%.17g'):format(now))
  local fields = redis.call('HGETALL', class)   -- who knew nothing may have been here first
  for n = 1, #fields, 2 do
    local account = fields[n]:match('^a:(.*)$')
    if account then
      account_of(class, account, quota_of(class, account), true)
      touched[account] = true
    end
  end
end
finish(class)
if plain == 0 then for _, row in ipairs(rows) do redis.call('HSET', ring, unpack(row)) end end
redis.call('ZADD', expiry, NEVER, '')   -- it is never empty, and so never loses its PEXPIRE
for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], KEEP) end
return {epoch, moved, birth, lost and 1 or 0}
