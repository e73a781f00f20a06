-- Store one group or say why not. The schema is in common.lua.
--
-- ARGV[3] JSON {group_id, prompt_id, content, split, oldest, newest, foreign (bool), tokens, trajectories, solved,
--         reward_sum, sealed (bool: assembled from a sealed partial group)}; the versions are decimal strings, absent
--         when no span has one; reward_sum is a decimal string
-- ARGV[4] the encoded group
-- ARGV[5] what is left of its clock at the start, exponential of mean 1
-- Returns {code, fact...}: `accepted` or a refusal of outcomes.py with the numbers of its sentence as strings.

local group = cjson.decode(ARGV[3])
local bytes = #ARGV[4]

-- rate_limiter.may_insert; returns the code and the facts when it may not
local function paced(pace)
  local limiter = settings.limiter
  if pace.sampleable < limiter.min_size or pace.fresh < pace.wanted_fresh then
    return nil
  end
  local ceiling = limiter.min_size * limiter.samples_per_insert + limiter.error_buffer
  if limiter_error(pace) + limiter.samples_per_insert <= ceiling then
    return nil
  end
  return { 'pace', tostring(limiter_error(pace)), tostring(ceiling) }
end

local function refused_for_training()
  local pace = read_pace()
  if group.foreign then
    local share, foreign = settings.table.foreign_share, stat('foreign')
    if foreign + 1 > share * (pace.sampleable + 1) then
      return { 'foreign_share', integer(foreign), integer(pace.sampleable), tostring(share) }
    end
  end
  return paced(pace)
end

-- Evict what may be evicted until the group fits; evict nothing when it would not help.
local function make_room()
  local stored = redis.call('ZCARD', key('train')) + redis.call('ZCARD', key('eval'))
  local stored_bytes = stat('bytes')
  local kept = stored - redis.call('ZCARD', key('evictable'))
  local kept_bytes = stored_bytes - stat('evictable_bytes')
  local capacity, capacity_bytes = settings.table.capacity_groups, settings.table.capacity_bytes
  if kept >= capacity or kept_bytes + bytes > capacity_bytes then
    return { 'capacity', integer(stored), integer(stored_bytes) }
  end
  while stored >= capacity or stored_bytes + bytes > capacity_bytes do
    local sequence = redis.call('ZRANGE', key('evictable'), 0, 0)[1]
    stored_bytes = stored_bytes - tonumber(redis.call('HGET', group_key(sequence), 'bytes'))
    stored = stored - 1
    remove(sequence, 'capacity')
  end
  return nil
end

local function refused()
  local known = known_content(group.group_id)
  if known then
    return { known == group.content and 'stored' or 'conflict' }
  end
  return refused_for_version(group, latest_version()) or group.split == 'train' and refused_for_training() or make_room()
end

-- Add the group to the counts of its prompt and return them.
local function count_prompt(sequence)
  local packed = redis.call('HGET', key('prompts'), group.prompt_id)
  local known = packed and cmsgpack.unpack(packed) or { 0, 0, 0, '' }
  local version = math.max(tonumber(known[4]) or -1, tonumber(group.newest) or -1)
  local prompt = { seen = known[1] + group.trajectories, solved = known[2] + group.solved }
  redis.call('HSET', key('prompts'), group.prompt_id, cmsgpack.pack({
    prompt.seen, prompt.solved, known[3] + tonumber(group.reward_sum), version >= 0 and version or '' }))
  redis.call('ZADD', key('prompts_seen'), sequence, group.prompt_id)
  if not packed then
    redis.call('ZADD', key('prompt_ids'), 0, group.prompt_id)
    if redis.call('ZCARD', key('prompt_ids')) > settings.table.max_prompts then
      local oldest = redis.call('ZPOPMIN', key('prompts_seen'))[1]
      redis.call('ZREM', key('prompt_ids'), oldest)
      redis.call('HDEL', key('prompts'), oldest)
      add_stat('forgotten_prompts', 1)
    end
  end
  return prompt
end

local function store_train(sequence, foreign)
  redis.call('ZADD', key('train'), sequence, sequence)
  redis.call('ZADD', key('fresh'), sequence, sequence)
  if group.oldest then
    redis.call('ZADD', key('ages'), group.oldest, sequence)
  end
  enter_weighted(sequence, group, count_prompt(sequence), ARGV[5])
  count_train(0, group.tokens, foreign, group.oldest or '', 1)
  add_stat('inserted', 1)
  add_stat('trajectories', group.trajectories)
  redis.call('HINCRBYFLOAT', key('stats'), 'reward_sum', group.reward_sum)
end

local function store(sequence)
  local foreign = group.foreign and '1' or '0'
  redis.call('HSET', group_key(sequence), 'body', ARGV[4], 'group_id', group.group_id, 'content', group.content,
    'split', group.split, 'version', group.oldest or '', 'foreign', foreign, 'tokens', group.tokens, 'bytes', bytes,
    'uses', 0, 'inserted_s', now, 'prompt_id', group.prompt_id, 'trajectories', group.trajectories,
    'reward_sum', group.reward_sum)
  redis.call('ZADD', key('groups_of:' .. group.prompt_id), sequence, sequence)
  redis.call('HSET', key('sequences'), group.group_id, sequence)
  add_stat('bytes', bytes)
  if group.split == 'train' then
    store_train(sequence, foreign)
  else
    redis.call('ZADD', key('eval'), sequence, sequence)
    make_evictable(sequence, bytes)
  end
  end_wait('actors')
  redis.call('HDEL', key('stats'), 'no_room')
end

-- The first write is one that Redis refuses when memory is full: then nothing at all has happened.
local sequence = redis.call('HINCRBY', key('stats'), 'sequence', 1)
remove_overdue(latest_version())
forget_overdue()
local result = refused()
if not result then
  store(sequence)
  result = { 'accepted' }
elseif result[1] == 'pace' or result[1] == 'capacity' then
  start_wait('actors', result[1])
  if result[1] == 'capacity' then
    redis.call('HSET', key('stats'), 'no_room', 1)
  end
end
add_stat('result:' .. result[1], 1)
if group.sealed then
  if result[1] == 'pace' or result[1] == 'capacity' or result[1] == 'foreign_share' then
    redis.call('ZADD', key('sealed'), 'XX', now, group.group_id)
  else
    drop_partial(group.group_id)
  end
end
return result
