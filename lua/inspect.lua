-- inspect.lua: what is known of accounts and keys.
-- USES server, meters, accounts, claims
-- KEYS  1 pool, 2 class, 3 expiry
-- ARGV  1 now in ms ('' = the server's), 2 a lease's ttl in ms, 3 how many accounts follow; accounts, then keys
-- REPLY {breaker's reason, ms until it opens, now}, {for each claim of the line {its id, ms until it asks again, what stands
--       in its way, waiting in bands 0 to 3}, ..}, {class, ..}, then for each account {live, tokens held, ms of cooldown, ms out, why,
--       and for each of the four meters {used as %.17g, limit, 1 if it was learned, else 0} or {}}; then for each key
--       {ms out, why, 401s in a row, ms disabled (-1: for good)}; the error OLD as register says it

local pool, class, expiry, reply = KEYS[1], KEYS[2], KEYS[3], {}
if is_old(expiry) then return redis.error_reply('OLD') end
tick(pool)
reap(class, expiry, tonumber(ARGV[2]))

local function left(at) return math.max(0, at - now) end

local breaker = scope_of(pool, 'breaker')
reply[1] = {breaker and breaker[3] or '', breaker and left(breaker[1]) or 0, now}
reply[2] = {}
for n, claim in ipairs((claims_of(class))) do
  reply[2][n] = {claim[1], left(claim[3]), claim[5], unpack(claim, WAITING, WAITING + 3)}
end
reply[3] = {}
for _, name in ipairs(table_in(pool, 'classes') or {}) do
  if type(name) == 'string' then table.insert(reply[3], name) end
end
for n = 4, 3 + ARGV[3] do
  local account = ARGV[n]
  local q, out = quota_of(class, account), scope_of(pool, 'a:' .. account)
  local a = account_of(class, account, q)
  local row = {a[1], a[2], left(a[3]), out and left(out[1]) or 0, out and out[3] or ''}
  for i = 1, 4 do
    local rule = q[4 * i - 1]
    row[5 + i] = {}
    if rule > 0 then
      row[5 + i] = {('%.17g'):format(used(a, i, q, class)), q[4 * i], q[19 + i] and 1 or 0}
    end
  end
  reply[#reply + 1] = row
end
for n = 4 + ARGV[3], #ARGV do
  local k = scope_of(pool, 'k:' .. ARGV[n]) or {0, 0, '', false, 0, 0, false}
  reply[#reply + 1] = {left(k[1]), k[3], k[6], k[7] == -1 and -1 or k[7] and left(k[7]) or 0}
end
finish(class)
return reply
