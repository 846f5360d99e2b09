-- acquire.lua: choose a key for each request and reserve the request, its tokens and a slot; all in one step.
-- USES meters, accounts, claims, line, choose
-- KEYS  1 pool, 2 class, 3 expiry, 4 ring, 5 ready index, 6 wakes
-- ARGV  1 now in ms ('' = the server's), 2 a lease's ttl in ms, 3 ring and birth, 4 what the worker's line wants: '', or its
--       claim's id, waiting in bands 0 to 3, tokens of the smallest, ms until the last gives up (-1: never), how many others may use
--       the wake that it got (-1: none); then for each request 7 more: lease id, tokens, model, accounts to avoid if others
--       can serve, accounts to try first, accounts that must not serve (one a line), band (plus 4: large, it may hold an
--       account). None: the line has ended
-- REPLY {1}: register first; or {0, now, how many of the line can be served in time (-1: all, or it is not known; of a
--       ticket, how many came before it), ms until the last of it could be}, then for each request 5 more:
--       1, key, account, 0, days seen    granted (again, where the id is live: '' for days)
--       0, ms to wait, reason, how, account that is next    refused; how 1: can be served then, 0: not before then, 2:
--                                        look again then
--       2, 0, '', 0, ''                  the id has been settled already
--       3, 0, limit, 0, ''               larger than the limit of every key; '': no account is left that may serve

-- Most often who is first in the index is granted: all that is known of it is read ahead, beside what every request
-- needs. Only if it is not, EXAMINED are listed.
local mark = 'r:' .. ARGV[3]
listed = redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')
local first = listed[1]
local seen = first and load(pool, {'m', 'back', 'breaker', 'a:' .. first, 'k:' .. first})
  and load(class, {'m', 'q', 'w', 'x', mark, 'l:' .. (ARGV[5] or ''), 'a:' .. first, 'q:' .. first, 'h:' .. first})[mark]
if not seen or #seen < 24 then return {1} end
local revision, epoch = tick(pool)
local known, kept, is_plain = struct.unpack('<ddd', seen)
if not revision or known ~= revision and seen:sub(25) ~= epoch then return {1} end
reap(class, expiry, ttl)

-- An index that has not seen the last thing an admin did says nothing of who is not ready.
plain = is_plain == 1
if known ~= revision or now - kept >= KEEP / 48 then
  if known ~= revision then redis.call('ZUNIONSTORE', index, 1, index, 'WEIGHTS', 0) end
  for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], KEEP) end
  put(class, mark, struct.pack('<ddd', revision, now, is_plain) .. epoch)
  listed = false
end

-- Most often nobody waits, and the one request is served at once: then all that follows is not made.
local alone
if #ARGV == 11 and not get(class, 'w') and not lease_of(class, ARGV[5]) then
  alone = {serve(ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9], ARGV[10], false)}
  if alone[1] ~= 0 then
    finish(class)
    return stale and {1} or {0, now, -1, -1, unpack(alone)}
  end
end

local line, smaller, wait, reason, vague = false, {}, nil, '', false

local function line_of()
  return make_line(class, ARGV[3], ARGV[4], function()
    local names = redis.call('ZRANGE', index, 0, EXAMINED - 1, 'WITHSCORES')
    local size = #names / 2
    return names, size, size == EXAMINED and redis.call('ZCARD', index) or size
  end, judge, holds, tonumber(ARGV[11] or 0) > 3)
end

-- Not before its turn; nor where one that is no larger has just been refused.
local function answer(id, tokens, model, avoid, wanted, never, rank)
  local lease, band, alike = lease_of(class, id), rank % 4, model .. '\n' .. never
  if lease and lease[1] == LIVE and now - lease[3] >= UNHEARD then
    refund(class, lease[6], lease)   -- who asks again has not had it so far, and would use it later than it was charged
    put(class, 'l:' .. id, false)
    lease = nil
  elseif lease and lease[1] == LIVE then
    put_lease(class, expiry, id, lease, now + ttl)
    if line then line.served(band, tokens, model) end
    return 1, lease[7], lease[6], 0, ''
  end
  if lease and line then line.settled(band) end
  if lease then return 2, 0, '', 0, '' end
  local refused = smaller[alike]
  if refused and tokens >= refused[1] then return 0, unpack(refused, 2) end
  local ms, why, how, account
  if line and (rank < 4 or not line.held()) and line.waits(band, tokens, model) then
    ms, why, how, account = line.later(band, rank > 3 and 0 or tokens, model)
    ms = ms and line.looks_again(ms)
  end
  if not ms then
    local code
    holding = rank > 3 and line and line.held()
    code, ms, why, how, account = unpack(alone or {serve(id, tokens, model, avoid, wanted, never, holding)})
    if line and code == 1 then
      line.served(band, tokens, model)
      if holding == why then line.let_go() end
    end
    holding = false
    if line and code == 3 then line.settled(band) end
    if code ~= 0 then return code, ms, why, how, account end
    line = line or ARGV[4] ~= '' and line_of()
    if rank > 3 and line then line.hold(account, ms, tokens) end
    if line and (rank < 4 or line.held() ~= account) then
      local later, whose, what, which = line.later(band, tokens, model)
      if later and later > ms then ms, why, how, account = later, whose, what, which end
    end
  end
  why = NAMES[why] or why or 'line'
  smaller[alike] = {tokens, ms, why, how, account}
  if not wait or ms < wait then wait, reason, vague = ms, why, how == 2 end
  return 0, ms, why, how, account
end

local reply = {0, now, -1, -1}
if get(class, 'w') or #ARGV > 11 and ARGV[4] ~= '' then line = line_of() end
for i = 5, #ARGV, 7 do
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4], reply[n + 5] =
    answer(ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], tonumber(ARGV[i + 6]))
  listed = false
end
if line then reply[3], reply[4] = line.save(KEYS[6], wait, reason, vague, ARGV[7]) end
finish(class)
return stale and {1} or reply
