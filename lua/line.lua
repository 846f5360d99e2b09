-- line.lua: who waits for a class, and whose turn it is.
--
-- THE LINE OF ALL WORKERS. A worker with waiters has a claim: how many wait in each band, and the time at which it was
-- told to ask again. The claim is valid until a second after that time; who comes later has lost it. Each band of a
-- claim has a turn, a number that grows by 1/waiting with each request that is served: so a worker that wants twice as
-- much has its turn twice as often, and whoever has waited longest for it has the lowest. A newcomer starts one turn
-- behind the lowest; where a claim grows to twice as many, its turn stays as many of its own requests away.
--   The place of a request is one more than the requests of other workers that come before it: all in more urgent
-- bands, and in its own those whose turn is earlier. It is served when as many requests of its size can be served as
-- its place says; until then its worker is told when that will be, which is a time of its own for each worker.
--   Of the others, only those that could use what is free count. A worker in line passes those of its own band that
-- are not due so far (they come at their time); one that is not in line leaves to every valid claim what it wants.
-- Claims of other rings are only counted for wakes and holds: what they want are other keys, for the most part.
--   A TICKET is the claim of one call that goes away and comes again (a task of a queue). Its id, t<ms><rest>, says when
-- it came first (t.<rest>: now); it has its turn before every ticket that came later, also after it has lost its claim.
-- Those of the first TICKETS are kept; it comes at least every RETURNS ms, or its claim ends.

local SOON, TICKETS, RETURNS = 50, 128, 60000

-- For acquire: the line as the worker sees it that asks now. `list` gives the first of the ready index, how many they
-- are and the number of all; `judge` when an account can serve; `keeps`: what it holds, it still needs.
local function make_line(class, ring, demand, list, judge, holds, keeps)
  local id, rest = demand:match('^(%S+) (.+)$')
  local fits, others, numbers, mine = {}, {}, {}, nil
  for number in (rest or '1 1 1 1 0 -1 -1'):gmatch('%S+') do numbers[#numbers + 1] = tonumber(number) end
  local smallest, patience, hops = numbers[5], numbers[6], numbers[7]
  local ticket = id and id:sub(1, 1) == 't'
  if ticket and id:sub(2, 2) == '.' then id = string.format('t%013.0f', now) .. id:sub(2) end
  local all, wake = claims_of(class)
  for n = #all, 1, -1 do
    if all[n][1] == id then mine = table.remove(all, n)
    else
      if all[n][2] == ring then others[#others + 1] = all[n] end
      if all[n][6] and all[n][7] > now then holds[all[n][6]] = all[n][7] end
    end
  end
  local newcomer, was = not mine, mine or {}
  mine = {id, ring, now, smallest, '', keeps and was[6] and was[7] > now and was[6], was[7] or 0}
  if mine[6] then holds[mine[6]] = mine[7] end
  for b = 0, 3 do
    local before, waiting, lowest, later = was[WAITING + b] or 0, math.max(1, numbers[b + 1]), nil, nil
    for _, claim in ipairs(others) do
      if claim[WAITING + b] > 0 then
        lowest = math.min(lowest or claim[TURN + b], claim[TURN + b])
        if ticket and claim[1]:sub(1, 1) == 't' and claim[1] > id then later = math.min(later or claim[TURN + b], claim[TURN + b]) end
      end
    end
    mine[WAITING + b], mine[TURN + b] = numbers[b + 1], before > 0 and was[TURN + b] or 0
    if lowest and before == 0 then mine[TURN + b] = later or lowest + 1 / waiting
    elseif lowest and waiting >= 2 * before then mine[TURN + b] = lowest + (mine[TURN + b] - lowest) * before / waiting end
  end

  -- The time at which so many requests of a size can be served, and what stands in the way of the next: the account that
  -- comes first is given its share of those that remain, again and again. A key that somebody disabled is not waited
  -- for; where slots may come free at any time, that is when to look again. Looking changes nothing.
  local function slot(count, tokens, model)
    local names, size, total = list()
    local found, best, least, unknown = {}, nil, NEVER + 1, NEVER
    for n = 1, size do
      local at, why, loose = judge(names[2 * n - 1], tokens, model)
      local as_good_as = at
      if loose and why == 'disabled' then as_good_as = NEVER - 1
      elseif loose then unknown = math.min(unknown, at)
      elseif at < NEVER then found[#found + 1] = {name = names[2 * n - 1], served = 0} end
      if as_good_as < least then best, least = {at, why, loose, names[2 * n - 1]}, as_good_as end
    end
    count = math.ceil(count * size / total)
    if count == 1 or #found == 0 then return best[1], best[2], best[3], best[4] end
    local parts = #found == 1 and 1 or 2 * #found
    local function look(row, share)
      local at, _, loose = judge(row.name, tokens, model, row.served + share)
      while loose and share > 1 do
        share = math.ceil(share / 2)
        at, _, loose = judge(row.name, tokens, model, row.served + share)
      end
      if loose then at, unknown = NEVER, math.min(unknown, at) end
      row.at, row.share = at, share
    end
    for _, row in ipairs(found) do look(row, math.ceil(count / parts)) end
    while true do
      local row = found[1]
      for n = 2, #found do
        if found[n].at < row.at then row = found[n] end
      end
      if row.at == NEVER or unknown < row.at then return unknown, best[2], true, best[4] end
      if row.share == count then return row.at, best[2], false, best[4] end
      if row.share < count then
        count, row.served = count - row.share, row.served + row.share
        look(row, math.ceil(count / parts))
      else look(row, count) end
    end
  end

  -- How many requests of a size can be served now; so many, where it is more. (Grants of the same size lower it.)
  local free = {}
  local function room(most, tokens, model)
    local names, size, total = list()
    local asked = math.ceil(most * size / total)
    local left = asked
    for n = 1, size do
      local low, high, middle = 0, left + 1, left
      while high - low > 1 do
        if judge(names[2 * n - 1], tokens, model, middle) <= now then low = middle else high = middle end
        middle = math.floor((low + high) / 2)
      end
      left = left - low
      if left == 0 then break end
    end
    return math.floor((asked - left) * total / size)
  end

  -- Requests of others before one of mine: of those that are due, or of all who want the same; and how large these and
  -- it are on average.
  local function ahead(b, turn, tokens, model, every)
    local n, size = 0, tokens
    for _, claim in ipairs(others) do
      local before, need, count = n, claim[4], claim[WAITING + b]
      if need > tokens and not every then
        need = 1
        while need < claim[4] do need = need * 2 end   -- few sizes are looked at
      end
      if fits[need] == nil and need > tokens and not every then fits[need] = slot(1, need, model) <= now end
      if every or need <= tokens or fits[need] then
        for above = 0, b - 1 do n = n + claim[WAITING + above] end
        if newcomer and not every then n = n + count
        elseif every or claim[3] <= now then
          local gap = (turn - claim[TURN + b]) * count
          local first = every and claim[1] < (id or '')   -- of those whose turn is the same
          n = n + math.max(0, math.min(count, first and math.floor(gap + 1e-6) + 1 or math.ceil(gap - 1e-6)))
        end
        size = size + (n - before) * need
      end
    end
    return n, math.floor(size / (n + 1))
  end

  local line = {}

  -- Whether the next request of a band has to leave what is free to others.
  function line.waits(b, tokens, model)
    if #others == 0 then return false end
    local n, mean = ahead(b, mine[TURN + b], tokens, model, false)
    if n == 0 then return false end
    local size = mean .. '\n' .. model
    if not free[size] then
      local most = 1
      for other = 0, 3 do
        most = most + numbers[other + 1]
        for _, claim in ipairs(others) do most = most + claim[WAITING + other] end
      end
      free[size] = room(most, mean, model)
    end
    return n >= free[size]
  end

  -- When it is its turn, if that is not before: ms, what stands in the way, how (as acquire replies), account.
  function line.later(b, tokens, model)
    if #others == 0 then return end
    local n, mean = ahead(b, mine[TURN + b], tokens, model, true)
    local at, why, loose, account = slot(n + 1, mean, model)
    -- Who is not in line yet leaves what is free to those who are; from now on it has its turn.
    if at <= now then return newcomer and SOON or GRACE, false, 0, account end
    if n > 0 and at < NEVER then return at - now, why, loose and 2 or 0, account end
  end

  function line.served(b, tokens, model)
    local size = tokens .. '\n' .. model
    free = {[size] = free[size] and free[size] - 1}
    mine[TURN + b] = mine[TURN + b] + 1 / math.max(1, mine[WAITING + b])
    numbers[b + 1] = numbers[b + 1] - 1
    hops = -1
  end

  -- Nothing else is granted of the account until then, where smaller ones would take what comes free; at most every
  -- second account is held.
  function line.hold(account, wait, tokens)
    local least = smallest
    for _, claim in ipairs(others) do least = math.min(least, claim[4]) end
    if tokens <= least then return end
    local held, _, size = 0, list()
    for _ in pairs(holds) do held = held + 1 end
    if not mine[6] and not holds[account] and held < math.max(1, math.floor(size / 2)) then mine[6] = account end
    if mine[6] == account then
      mine[7] = now + wait + GRACE
      holds[account] = mine[7]
    end
  end

  function line.held() return mine[6] end

  -- It will not be asked for again.
  function line.settled(b) numbers[b + 1] = numbers[b + 1] - 1 end

  -- Of those that are due some may never come: who would wait for long looks again when they have lost their claims.
  function line.looks_again(ms)
    for _, claim in ipairs(others) do
      if ms > POLL and not newcomer and not ticket and claim[3] <= now then return GRACE end
    end
    return ms
  end

  function line.let_go()
    holds[mine[6]], mine[6], was[6] = nil, false, false
  end

  -- How many of those that still wait can be served before the last of them gives up (-1: all, or it is not known),
  -- and when the last of them would be, in ms.
  local function in_time(left, model)
    local function comes(n)
      local within, place = n, n
      for b = 0, 3 do
        if within <= numbers[b + 1] then
          local turn = mine[TURN + b] + (within - 1) / numbers[b + 1]
          local before, mean = ahead(b, turn, smallest, model, true)
          local at, _, loose = slot(place + before, mean, model)
          return loose or at <= now + patience, at
        end
        within = within - numbers[b + 1]
      end
    end
    local all_come, last = comes(left)
    if all_come then return -1, -1 end
    local low, high = 0, left
    while high - low > 1 do
      local middle = math.floor((low + high) / 2)
      if comes(middle) then low = middle else high = middle end
    end
    return low, last - now
  end

  -- Keep the claim, with when to ask again (nil: at once) and why, or drop it where nobody waits any more; and pass on
  -- what this worker cannot use. Returns how many can be served in time, and when the last; for a ticket, how many
  -- of them came before it.
  function line.save(wakes, wait, why, loose, model)
    local left, count, last = 0, -1, -1
    for b = 0, 3 do
      numbers[b + 1] = math.max(0, numbers[b + 1])
      mine[WAITING + b], left = numbers[b + 1], left + numbers[b + 1]
    end
    local due = false
    for _, claim in ipairs(others) do due = due or claim[3] <= now end
    if newcomer and wait and not due and #others > 0 and slot(1, smallest, model) <= now then wake(wakes, 1)
    elseif hops > 0 and #all > 0 then wake(wakes, 1, hops - 1) end
    if was[6] and mine[6] ~= was[6] then wake(wakes, #others) end   -- what was held, for one that has left
    if id and left > 0 and (not wait or loose and patience ~= 0 or patience < 0 or wait <= patience) then
      mine[3], mine[5] = now + (ticket and math.min(wait or 0, RETURNS) or wait or 0), why or ''
      if left > 1 and wait and patience >= 0 then count, last = in_time(left, model) end
      all[#all + 1] = mine
      local tickets, last_of_them = 0, nil
      for n, claim in ipairs(ticket and all or {}) do
        if claim[1]:sub(1, 1) == 't' then
          tickets = tickets + 1
          if not last_of_them or claim[1] > all[last_of_them][1] then last_of_them = n end
        end
      end
      if ticket then
        count = 0
        for _, claim in ipairs(others) do
          if claim[1]:sub(1, 1) == 't' and claim[1] < id then count = count + 1 end
        end
      end
      if tickets > TICKETS then table.remove(all, last_of_them) end
    end
    put(class, 'w', #all > 0 and cmsgpack.pack(all))
    if #all == 0 then redis.call('DEL', wakes) end   -- nobody is left to be woken
    return count, last
  end

  return line
end
