-- Which groups a weighted draw takes next; redis_scripts.py puts this file after common.lua, which has the schema.
-- weighted_index.py says what is done here and why, in Python. What Redis adds is that nothing may touch all groups:
--
-- A clock is stored as the time at which it goes off, on a time line of draws, so that letting all clocks run is moving
-- one number. The score of a group in `weighted` is time + left / weight. Draw = the smallest scores: O(k log n).
-- Weights that decay with age all decay alike: the rates between groups stay, and nothing is updated.
-- Float64 does not bear that for ever. When the time line has become too fine for it, or the total of the weights has
-- fallen so far that it is mostly rounding, the line starts over: the index is renamed, which costs nothing, and the
-- coming draws move its clocks to the new line, BATCH at a time, before they draw.

local weighting = settings.table.weighting -- nil = no weighted index
local is_rank = weighting and weighting.by == 'rank'
local MOST_OWED = 8 -- weighted_index.py
local MAX_REWEIGHED = 64 -- weighted_index.py
local MAX_OCTAVES = 1000 -- weighted_index.py
local FINEST = 2 ^ 40 -- time x total weight: beyond, neighbours on the line differ by less than 1e-3 of a step
local DEEPEST_FALL = 2 ^ 20 -- of the total: 1e-16 of what it was must stay far below what it is

local line = { time = 0, reference = 0, total = 0, peak = 0, top = 0, old_time = 0, old_reference = 0 }
if weighting then
  local fields = redis.call('HGETALL', key('weighted_line'))
  for i = 1, #fields, 2 do
    line[fields[i]] = tonumber(fields[i + 1])
  end
end

local function number(value)
  return string.format('%.17g', value)
end

local function set_line(field, value)
  line[field] = value
  redis.call('HSET', key('weighted_line'), field, number(value))
end

local function add_total(change)
  set_line('total', math.max(0, line.total + change))
  if line.total > line.peak then
    set_line('peak', line.total)
  end
end

-- Padded, so that ties go to the oldest.
local function member_of(sequence)
  return string.format('%014.0f', tonumber(sequence))
end

local function sequence_of(member)
  return integer(tonumber(member))
end

-- `stored` is the field `weight` of a group: its weight, log2 of it where the weighting is recency.
local function weight_of(stored, reference)
  if weighting.by == 'recency' then
    return 2 ^ math.max(-MAX_OCTAVES, math.min(MAX_OCTAVES, stored - reference))
  end
  return tonumber(stored)
end

-- Enter a clock with `left` (weight x time) left; a group of weight 0 has none.
local function start_clock(sequence, stored, left)
  local weight = weight_of(stored, line.reference)
  if weight > 0 then
    redis.call('ZADD', key('weighted'), number(line.time + left / weight), member_of(sequence))
    add_total(weight)
  end
end

-- Take a clock out and return what is left of it; nil when there is none.
local function stop_clock(sequence, stored)
  local member = member_of(sequence)
  local score = redis.call('ZSCORE', key('weighted'), member)
  if score then
    local weight = weight_of(stored, line.reference)
    redis.call('ZREM', key('weighted'), member)
    add_total(-weight)
    return (tonumber(score) - line.time) * weight
  end
  score = redis.call('ZSCORE', key('weighted_old'), member)
  if score then
    redis.call('ZREM', key('weighted_old'), member)
    return (tonumber(score) - line.old_time) * weight_of(stored, line.old_reference)
  end
  return nil
end

-- Move clocks to the new time line; return whether more may be left.
local function move_clocks()
  local scored, moved, total = redis.call('ZRANGE', key('weighted_old'), 0, BATCH - 1, 'WITHSCORES'), {}, 0
  for i = 1, #scored, 2 do
    local stored = redis.call('HGET', group_key(sequence_of(scored[i])), 'weight')
    local left = (tonumber(scored[i + 1]) - line.old_time) * weight_of(stored, line.old_reference)
    local weight = weight_of(stored, line.reference)
    moved[i], moved[i + 1] = number(line.time + left / weight), scored[i]
    total = total + weight
  end
  if #scored > 0 then
    redis.call('ZREMRANGEBYRANK', key('weighted_old'), 0, #scored / 2 - 1)
    redis.call('ZADD', key('weighted'), unpack(moved))
    add_total(total)
  end
  return #scored == 2 * BATCH
end

local function start_over_if_worn()
  if line.time * line.total <= FINEST and line.total * DEEPEST_FALL >= line.peak then
    return
  end
  if redis.call('EXISTS', key('weighted')) == 1 then
    redis.call('RENAME', key('weighted'), key('weighted_old'))
  end
  set_line('old_time', line.time)
  set_line('old_reference', line.reference)
  set_line('time', 0)
  set_line('total', 0)
  set_line('peak', 0)
  if weighting.by == 'recency' then
    set_line('reference', math.max(0, latest_version()) / weighting.half_life_updates)
  end
end

-- Place a group by rank, behind the groups that are smaller by the negative of what ranks first.
local function place_by_rank(sequence, priority, uses)
  redis.call('ZADD', key('weighted'), number(weighting.decay_per_use * uses - priority), member_of(sequence))
end

-- Let the groups be drawn again whose cool-down is over; return whether more may be left.
local function wake(clock)
  local members = redis.call('ZRANGEBYSCORE', key('resting'), '-inf', integer(clock), 'LIMIT', 0, BATCH)
  for _, member in ipairs(members) do
    local sequence = sequence_of(member)
    local fields = redis.call('HMGET', group_key(sequence), 'weight', 'uses')
    redis.call('ZREM', key('resting'), member)
    place_by_rank(sequence, fields[1], fields[2])
  end
  return #members == BATCH
end

-- Give a group another weight or priority; the lot counts if it had weight 0 before.
local function reweigh(sequence, stored, lot)
  local fields = redis.call('HMGET', group_key(sequence), 'weight', 'uses')
  redis.call('HSET', group_key(sequence), 'weight', stored)
  if not is_rank then
    start_clock(sequence, stored, stop_clock(sequence, fields[1]) or lot)
  elseif redis.call('ZSCORE', key('weighted'), member_of(sequence)) then
    place_by_rank(sequence, stored, fields[2])
  end
end

-- weighting.difficulty
local function difficulty(prompt)
  local chance = (prompt.solved + 1) / (prompt.seen + 2)
  return 4 * chance * (1 - chance)
end

-- Weigh the stored groups of a prompt by what is known of it now.
local function reweigh_prompt(prompt_id, stored)
  local siblings = key('prompt_groups:' .. prompt_id)
  for _, sequence in ipairs(redis.call('ZREVRANGE', siblings, 0, MAX_REWEIGHED - 1)) do
    reweigh(sequence, stored)
  end
  local left_behind = redis.call('ZCARD', siblings) - MAX_REWEIGHED
  if left_behind > 0 then
    add_stat('weights_left_behind', left_behind)
  end
end

-- Enter a new train group, whose hash exists; `prompt` = {seen, solved, ...} of its prompt, this group included.
local function enter_weighted(sequence, group, prompt, lot)
  if not weighting then
    return
  end
  local stored = line.top > 0 and line.top or 1
  if weighting.by == 'recency' then
    stored = tonumber(group.oldest or math.max(0, latest_version())) / weighting.half_life_updates
  elseif weighting.by == 'difficulty' then
    stored = difficulty(prompt)
    reweigh_prompt(group.prompt_id, number(stored))
    redis.call('ZADD', key('prompt_groups:' .. group.prompt_id), sequence, sequence)
  end
  redis.call('HSET', group_key(sequence), 'weight', number(stored))
  if is_rank then
    place_by_rank(sequence, stored, 0)
  else
    start_clock(sequence, stored, tonumber(lot))
  end
end

-- Note one use of a group, whichever selector it came by.
local function use_weighted(sequence, uses, clock)
  if not is_rank then
    return
  elseif weighting.cool_down_updates == 0 then
    place_by_rank(sequence, redis.call('HGET', group_key(sequence), 'weight'), uses)
  else
    redis.call('ZREM', key('weighted'), member_of(sequence))
    redis.call('ZADD', key('resting'), integer(clock + weighting.cool_down_updates), member_of(sequence))
  end
end

-- See common.lua.
leave_weighted = function(sequence)
  if not weighting then
    return
  end
  local stored, prompt_id = unpack(redis.call('HMGET', group_key(sequence), 'weight', 'prompt_id'))
  if is_rank then
    redis.call('ZREM', key('weighted'), member_of(sequence))
    redis.call('ZREM', key('resting'), member_of(sequence))
  else
    stop_clock(sequence, stored)
  end
  if weighting.by == 'difficulty' then
    redis.call('ZREM', key('prompt_groups:' .. prompt_id), sequence)
  end
end
