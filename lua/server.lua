-- server.lua: what the server is.

-- Whether it is older than Redis 6.2: LT is the youngest thing that is used. (This lowers nothing.)
local function is_old(expiry)
  local lowered = redis.pcall('ZADD', expiry, 'XX', 'LT', NEVER, '')
  return type(lowered) == 'table' and lowered.err:find('syntax error', 1, true)
end
