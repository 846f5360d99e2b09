-- acquire.lua: choose a key for each request and reserve the request, its tokens and a slot; all in one step.
-- USES meters, accounts, choose
-- KEYS  1 pool, 2 class, 3 expiry, 4 ring, 5 ready index
-- ARGV  1 now in ms ('' = the server's), 2 a lease's ttl in ms, 3 ring; then for each request 6 more: lease id, tokens,
--       model, accounts to avoid if others can serve, accounts to try first, accounts that must not serve (one a line)
-- REPLY {1}: register first; or {0}, then for each request 4 more:
--       1, key, account, 0             granted (again, where the id is live)
--       0, ms to wait, reason, how     refused; how 1: can be served then, 0: not before then, 2: look again then
--       2, 0, '', 0                    the id has been settled already
--       3, 0, limit, 0                 larger than the limit of every key; '': no account is left that may serve

-- Most often who is first in the index is granted: all that is known of it is read ahead, beside what every request
-- needs. Only if it is not, EXAMINED are listed.
local mark = 'r:' .. ARGV[3]
local listed = redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')
local first = listed[1]
if not first then return {1} end
load(pool, {'m', 'breaker', 'a:' .. first, 'k:' .. first})
local seen = load(class, {'m', 'q', mark, 'l:' .. ARGV[4], 'a:' .. first, 'q:' .. first})[mark]
local revision = seen and tick(pool)
if not revision then return {1} end
reap(class, expiry, ttl)

-- An index that has not seen the last thing an admin did says nothing of who is not ready.
local known, kept, is_plain = struct.unpack('<ddd', seen)
plain = is_plain == 1
if known ~= revision or now - kept >= KEEP / 48 then
  if known ~= revision then redis.call('ZUNIONSTORE', index, 1, index, 'WEIGHTS', 0) end
  for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], KEEP) end
  put(class, mark, struct.pack('<ddd', revision, now, is_plain))
  listed = false
end

local function serve(id, tokens, model, avoid, wanted, never)
  local lease = lease_of(class, id)
  if lease and lease[1] == LIVE then return 1, lease[7], lease[6], 0 end
  if lease then return 2, 0, '', 0 end
  local breaker = scope_of(pool, 'breaker')
  local open = opens(breaker)
  if not open then return 0, POLL, breaker[3], 2 end
  if open > now then return 0, open - now, breaker[3], 0 end

  -- Those that are asked for come first, then the index.
  listed = listed or redis.call('ZRANGE', index, 0, 0, 'WITHSCORES')
  local ahead, size, whole = {}, 2, false
  for account in wanted:gmatch('[^\n]+') do
    local at = redis.call('ZSCORE', index, account)
    if at then ahead[#ahead + 1] = account; ahead[#ahead + 1] = at end
  end
  local best, why, loose, bounded, last = NEVER, false, false, false, 0
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
      if not account or at > now and at >= best then
        bounded = bounded or account or size < 2 * EXAMINED
        break
      end
      n, last = n + 2, math.max(last, at)
      local passed = never ~= '' and ('\n' .. never .. '\n'):find('\n' .. account .. '\n', 1, true)
      if not passed and (avoid == '' or (round == 2) == (('\n' .. avoid .. '\n'):find('\n' .. account .. '\n', 1, true) ~= nil)) then
        local time, reason, vague, key, weight = judge(account, tokens, model)
        if time <= now then return grant(id, tokens, account, key, weight, at) end
        if time < best or not why then best, why, loose = time, reason, vague end
        if not whole then   -- before anything moves
          listed, whole = redis.call('ZRANGE', index, 0, EXAMINED - 1, 'WITHSCORES'), true
          size = #listed
        end
        local small = judge(account, 0, '')
        if small <= now then
          small = size == 2 * EXAMINED and now - 1 + math.floor(accounts[account][6] / weight) % 1000 / 1000 or at
        end
        if small ~= at then redis.call('ZADD', index, small, account) end
      end
    end
  end
  local reason = why and (NAMES[why] or why) or ''
  if not bounded then return 0, math.max(0, math.min(best, last) - now), reason, 0 end
  if best == NEVER then return 3, 0, reason, 0 end
  return 0, best - now, reason, loose and 2 or 1
end

local reply = {0}
for i = 4, #ARGV, 6 do
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] =
    serve(ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5])
  listed = false
end
finish(class)
return stale_days and {1} or reply
