-- Settle which shard makes a draw, the same for all who ask. The schema is in common.lua.
--
-- ARGV[3] the request id
-- ARGV[4] the choice that the caller knows, '' = none; ARGV[5] what it would choose instead, '' = nothing, it only asks
-- Returns the choice that holds; '' = none.

local function main()
  work_in_full_memory()
  local pin = key('pin:' .. ARGV[3])
  local settled = redis.call('GET', pin) or ''
  if settled == ARGV[4] and ARGV[5] ~= '' then
    -- longer than the draw is remembered: a repeat must find it
    redis.call('SET', pin, ARGV[5], 'PX', math.ceil(2000 * settings.table.repeat_window_s))
    settled = ARGV[5]
  end
  return settled
end
