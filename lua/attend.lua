-- attend.lua: be in the roster of a pool, by which its keys are dealt where Redis is away (see backends/failover.py), and
-- hear which classes have been lost.
-- KEYS  1 pool, 2 roster, then the classes that the worker knows
-- ARGV  1 now in ms ('' = the server's), 2 the worker's id, 3 what it can share, as one word, 4 ms after which it attends
--       again ('': it leaves), 5 what these classes are called (one a line), 6 for how many
--       ms it could not reach us (0: it could)
-- REPLY {ms since the roster changed, the worker's rank in it (-1: it is not), how many there are, 1 if all of them can
--       share the same, the number of each class that is another one now, ..}

-- A roster is a zset: members are id, space, what it can share, scores when they attended last; '' when it changed.
local roster, id, shares, period = KEYS[2], ARGV[2], ARGV[3], ARGV[4] ~= '' and tonumber(ARGV[4])
redis.call('PEXPIRE', roster, KEEP)   -- a server that is out of memory lets write who has begun to
local away = tonumber(ARGV[6])
tick(KEYS[1])
local me, since, changed, names, others = id .. ' ' .. shares, now, false, {}, false
local known = redis.call('ZRANGE', roster, 0, -1, 'WITHSCORES')
for n = 1, #known, 2 do
  local member, at = known[n], tonumber(known[n + 1])
  if member == '' then since = at
  elseif member:match('^%S+') == id and (member ~= me or not period) or period and now - at > 3 * period then
    redis.call('ZREM', roster, member)
    changed = true
  elseif member ~= me then names[#names + 1] = member end
  others = others or member ~= '' and member ~= me and at > now - away + SETTLING and at < now - SETTLING
end
-- Nor could anybody else reach us, unless one was here in the midst of it (what comes at the end may have been kept waiting).
local back = tonumber(get(KEYS[1], 'back') or nil)
if away > 0 and not others and not (back and back <= now and back > now - away) then
  put(KEYS[1], 'back', ('%.17g'):format(now))
end
if period then
  changed = redis.call('ZADD', roster, now, me) == 1 or changed
  names[#names + 1] = me
end
if not names[1] then redis.call('ZREM', roster, '')
elseif changed then
  since = now
  redis.call('ZADD', roster, now, '')
end
redis.call('PEXPIRE', roster, KEEP)
table.sort(names)
local reply = {math.max(0, now - since), -1, #names, 1}
for n, member in ipairs(names) do
  if member == me then reply[2] = n - 1 end
  if member:match('%S+$') ~= shares then reply[4] = 0 end
end
local births = ARGV[5]:gmatch('[^\n]+')
for n = 3, #KEYS do
  if redis.call('HGET', KEYS[n], 'b') ~= births() then reply[#reply + 1] = n - 2 end
end
flush()
if away > 0 then redis.call('PEXPIRE', KEYS[1], KEEP) end
return reply
