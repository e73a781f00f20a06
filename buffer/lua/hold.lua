-- Hold one trajectory until its group is complete, or say why not. The schema is in common.lua.
--
-- ARGV[3] cmsgpack {group_id, trajectory_id, fields, group_size, split, oldest, newest, foreign (bool), envelope_bytes,
--         limit_bytes}; fields as in the schema, the versions as in insert.lua, envelope_bytes what the encoded group
--         takes beside its trajectories, limit_bytes the largest encoded group
-- ARGV[4] the encoded trajectory
-- Returns {1 or 0, code, fact...}: 1 = the group is sealed and waits to be inserted; the code is `known` when a group of
--         this id is or was in the table, else one of outcomes.py with the numbers of its sentence as strings.

local part = cmsgpack.unpack(ARGV[3])
local partial = key('partial:' .. part.group_id)
local member = 't:' .. part.trajectory_id

-- Say what an existing partial group answers; nil = it takes the trajectory.
local function answered(fields)
  if fields ~= part.fields then
    return { 0, 'group_fields' }
  end
  local sealed = redis.call('ZSCORE', key('sealed'), part.group_id) and 1 or 0
  local held = redis.call('HGET', partial, member)
  if held then
    return held == ARGV[4] and { sealed, 'held' } or { 0, 'trajectory' }
  end
  return sealed == 1 and { 0, 'closed' } or nil
end

local function refused_for_size(stored_bytes, bytes)
  local group_bytes = part.envelope_bytes + stored_bytes + bytes
  if group_bytes > part.limit_bytes then
    return { 0, 'bytes', integer(group_bytes), integer(part.limit_bytes) }
  end
  local groups = redis.call('ZCARD', key('partials')) + redis.call('ZCARD', key('sealed'))
  local is_new = stored_bytes == 0 and 1 or 0
  local all_bytes = stat('partial_bytes')
  if groups + is_new > settings.table.partial_max_groups or all_bytes + bytes > settings.table.partial_max_bytes then
    return { 0, 'partials', integer(groups), integer(all_bytes) }
  end
  return nil
end

local function hold(bytes)
  if redis.call('HSETNX', partial, 'fields', part.fields) == 1 then
    redis.call('ZADD', key('partials'), now, part.group_id)
  end
  redis.call('HSET', partial, member, ARGV[4])
  redis.call('HINCRBY', partial, 'bytes', bytes)
  add_stat('partial_bytes', bytes)
  local count = redis.call('HINCRBY', partial, 'count', 1)
  local is_complete = count == part.group_size
  if is_complete then
    seal(part.group_id)
  end
  return { is_complete and 1 or 0, 'pending', integer(count), integer(part.group_size) }
end

local function judge()
  if known_content(part.group_id) then
    return { 0, 'known' }
  end
  local fields, stored_bytes = unpack(redis.call('HMGET', partial, 'fields', 'bytes'))
  local answer = fields and answered(fields)
  if answer then
    return answer
  end
  local refused = refused_for_version(part, latest_version())
  if refused then
    return { 0, unpack(refused) }
  end
  return refused_for_size(tonumber(stored_bytes or 0), #ARGV[4]) or hold(#ARGV[4])
end

local function main()
  -- a first write that Redis refuses when memory is full: then nothing at all has happened
  redis.call('HINCRBY', key('stats'), 'partial_bytes', 0)
  forget_overdue()
  local answer = judge()
  if answer[2] ~= 'known' then
    add_stat('part:' .. answer[2], 1)
  end
  return answer
end
