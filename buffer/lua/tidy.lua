-- Do what is due by the clock. The schema is in common.lua.
--
-- Returns {1 when more may be due: call again, group_id...}: the sealed partial groups that have waited longest for
-- their insert.

local SEALED = 100 -- most ids returned

-- Close partial groups that were not completed in time; return whether more may be left.
local function close_overdue_partials()
  local limit = string.format('%.17g', tonumber(now) - settings.table.partial_group_timeout_s)
  local overdue = redis.call('ZRANGEBYSCORE', key('partials'), '-inf', limit, 'LIMIT', 0, BATCH)
  for _, group_id in ipairs(overdue) do
    local count = tonumber(redis.call('HGET', key('partial:' .. group_id), 'count'))
    if count >= settings.table.min_group_size then
      seal(group_id)
    else
      drop_partial(group_id)
      add_stat('removed:partial_timeout', 1)
    end
  end
  return #overdue == BATCH
end

local function main()
  work_in_full_memory()
  forget_overdue()
  local more = remove_overdue(latest_version())
  more = close_overdue_partials() or more
  return { more and 1 or 0, unpack(redis.call('ZRANGE', key('sealed'), 0, SEALED - 1)) }
end
