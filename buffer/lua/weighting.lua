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
local changed_line = {} -- fields that finish.lua writes
if weighting then
  local fields = redis.call('HGETALL', key('weighted_line'))
  for i = 1, #fields, 2 do
    line[fields[i]] = tonumber(fields[i + 1])
  end
end

local function set_line(field, value)
  line[field], changed_line[field] = value, true
end

local function add_total(change)
  set_line('total', math.max(0, line.total + change))
  if line.total > line.peak then
    set_line('peak', line.total)
  end
end

-- `stored` is the weight among the facts of a group: its weight, log2 of it where the weighting is recency.
local function weight_of(stored, reference)
  if weighting.by == 'recency' then
    return 2 ^ math.max(-MAX_OCTAVES, math.min(MAX_OCTAVES, stored - reference))
  end
  return stored
end

-- Enter a clock with `left` (weight x time) left; a group of weight 0 has none.
local function start_clock(member, left)
  local weight = weight_of(facts[member][WEIGHT], line.reference)
  if weight > 0 then
    add_pair(entered, 'weighted', line.time + left / weight, member)
    add_total(weight)
  end
end

-- Take a clock out and return what is left of it; nil when there is none.
local function stop_clock(member)
  local stored = facts[member][WEIGHT]
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

-- Split a reply WITHSCORES.
local function members_and_scores(reply)
  local members, scores = {}, {}
  for i = 1, #reply / 2 do
    members[i], scores[i] = reply[2 * i - 1], tonumber(reply[2 * i])
  end
  return members, scores
end

-- Move clocks to the new time line; return whether more may be left.
local function move_clocks()
  local members, scores = members_and_scores(redis.call('ZRANGE', key('weighted_old'), 0, BATCH - 1, 'WITHSCORES'))
  local moved, total = {}, 0
  read_facts(members)
  for i, member in ipairs(members) do
    local stored = facts[member][WEIGHT]
    local left = (scores[i] - line.old_time) * weight_of(stored, line.old_reference)
    local weight = weight_of(stored, line.reference)
    moved[2 * i - 1], moved[2 * i] = line.time + left / weight, member
    total = total + weight
  end
  if #members > 0 then
    redis.call('ZREMRANGEBYRANK', key('weighted_old'), 0, #members - 1)
    call_many('ZADD', 'weighted', moved)
    add_total(total)
  end
  return #members == BATCH
end

-- Start the line over if it is worn, with no clock left on the one before; return whether it did.
local function start_over_if_worn()
  if line.time * line.total <= FINEST and line.total * DEEPEST_FALL >= line.peak then
    return false
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
  return true
end

-- The score of a group by rank: the negative of what ranks first.
local function rank_of(member)
  return weighting.decay_per_use * facts[member][USES] - facts[member][WEIGHT]
end

local function place_by_rank(member)
  redis.call('ZADD', key('weighted'), rank_of(member), member)
end

-- Let the groups be drawn again whose cool-down is over; return whether more may be left.
local function wake(clock)
  local members = redis.call('ZRANGEBYSCORE', key('resting'), '-inf', integer(clock), 'LIMIT', 0, BATCH)
  read_facts(members)
  for _, member in ipairs(members) do
    redis.call('ZREM', key('resting'), member)
    place_by_rank(member)
  end
  return #members == BATCH
end

-- Give a group, whose facts are read, another weight or priority; the lot counts if it had weight 0 before.
local function reweigh(member, stored, lot)
  if entered.weighted then
    flush()
  end
  local left = not is_rank and (stop_clock(member) or lot)
  facts[member][WEIGHT], changed_facts[member] = stored, true
  if not is_rank then
    start_clock(member, left)
  elseif redis.call('ZSCORE', key('weighted'), member) then
    place_by_rank(member)
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
  local newest = redis.call('ZREVRANGE', siblings, 0, MAX_REWEIGHED - 1)
  read_facts(newest)
  for _, member in ipairs(newest) do
    reweigh(member, stored)
  end
  local left_behind = redis.call('ZCARD', siblings) - MAX_REWEIGHED
  if left_behind > 0 then
    add_stat('weights_left_behind', left_behind)
  end
end

-- Enter a new train group, whose facts are there; `prompt` = {seen, solved, ...} of its prompt, this group included.
local function enter_weighted(member, group, prompt)
  if not weighting then
    return
  end
  local stored = line.top > 0 and line.top or 1
  if weighting.by == 'recency' then
    stored = (group.oldest or math.max(0, latest_version())) / weighting.half_life_updates
  elseif weighting.by == 'difficulty' then
    stored = difficulty(prompt)
    reweigh_prompt(group.prompt_id, stored)
    redis.call('ZADD', key('prompt_groups:' .. group.prompt_id), member, member)
  end
  facts[member][WEIGHT] = stored
  if is_rank then
    add_pair(entered, 'weighted', rank_of(member), member)
  else
    start_clock(member, group.lot)
  end
end

-- Note one use of a group, whichever selector it came by.
local function use_weighted(member, clock)
  if not is_rank then
    return
  elseif weighting.cool_down_updates == 0 then
    place_by_rank(member)
  else
    redis.call('ZREM', key('weighted'), member)
    redis.call('ZADD', key('resting'), integer(clock + weighting.cool_down_updates), member)
  end
end

-- See common.lua.
leave_weighted = function(member, prompt_id)
  if not weighting then
    return
  end
  if is_rank then
    redis.call('ZREM', key('weighted'), member)
    redis.call('ZREM', key('resting'), member)
  else
    stop_clock(member)
  end
  if weighting.by == 'difficulty' then
    redis.call('ZREM', key('prompt_groups:' .. prompt_id), member)
  end
end
