-- Store groups or say why not, each for itself and in order. The schema is in common.lua.
--
-- ARGV[3] cmsgpack list of {group_id, prompt_id, content, split, oldest, newest, foreign (bool), tokens, trajectories,
--         solved, reward_sum, sealed (bool: assembled from a sealed partial group), lot = what is left of its clock at
--         the start, exponential of mean 1, bytes}; the versions are nil when no span has one
-- ARGV[4] the encoded groups are at this key followed by 0, 1 ...
-- Returns {code, fact...} of each: `accepted` or a refusal of outcomes.py with the numbers of its sentence as strings.

local groups = cmsgpack.unpack(ARGV[3])
local prompts = {} -- prompt_id -> what is counted of it (see `prompts` in common.lua), as read or changed; false = nothing
local reward_sum = 0 -- of the train groups that are stored now

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

local function refused_for_training(group)
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
local function make_room(bytes)
  local stored = size_of('train') + size_of('eval')
  local stored_bytes = stat('bytes')
  local kept = stored - size_of('evictable')
  local kept_bytes = stored_bytes - stat('evictable_bytes')
  local capacity, capacity_bytes = settings.table.capacity_groups, settings.table.capacity_bytes
  if kept >= capacity or kept_bytes + bytes > capacity_bytes then
    return { 'capacity', integer(stored), integer(stored_bytes) }
  end
  while stored >= capacity or stored_bytes + bytes > capacity_bytes do
    local member = redis.call('ZRANGE', key('evictable'), 0, 0)[1]
    stored_bytes = stored_bytes - facts_of(member)[BYTES]
    stored = stored - 1
    remove(member, 'capacity')
  end
  return nil
end

local function refused(group)
  local content = known_content(group.group_id)
  if content then
    return { content == group.content and 'stored' or 'conflict' }
  end
  return refused_for_version(group, latest_version())
    or group.split == 'train' and refused_for_training(group)
    or make_room(group.bytes)
end

local function read_prompts()
  local prompt_ids = {}
  for i, group in ipairs(groups) do
    prompt_ids[i] = group.prompt_id
  end
  for i, packed in ipairs(redis.call('HMGET', key('prompts'), unpack(prompt_ids))) do
    prompts[prompt_ids[i]] = packed and cmsgpack.unpack(packed)
  end
end

local function forget_a_prompt()
  flush()
  local oldest = redis.call('ZPOPMIN', key('prompts_seen'))[1]
  leave('prompt_ids', oldest)
  redis.call('HDEL', key('prompts'), oldest)
  prompts[oldest] = false
  add_stat('forgotten_prompts', 1)
end

-- Add the group to the counts of its prompt and return them.
local function count_prompt(group, sequence)
  local before = prompts[group.prompt_id] or { 0, 0, 0, '' }
  local version = math.max(tonumber(before[4]) or -1, group.newest or -1)
  local counts = { before[1] + group.trajectories, before[2] + group.solved, before[3] + group.reward_sum,
    version >= 0 and version or '' }
  add_pair(written, 'prompts', group.prompt_id, cmsgpack.pack(counts))
  add_pair(entered, 'prompts_seen', sequence, group.prompt_id)
  if not prompts[group.prompt_id] then
    enter('prompt_ids', 0, group.prompt_id)
  end
  prompts[group.prompt_id] = counts
  local excess = size_of('prompt_ids') - settings.table.max_prompts -- large once the cap is lowered
  for _ = 1, math.min(excess, BATCH) do
    forget_a_prompt()
  end
  return { seen = counts[1], solved = counts[2] }
end

local function store_train(member, group, sequence)
  enter('train', sequence, member)
  enter('fresh', sequence, member)
  if group.oldest then
    enter('ages', group.oldest, member)
  end
  enter_weighted(member, group, count_prompt(group, sequence))
  count_train(0, group.tokens, group.foreign, group.oldest or -1, 1)
  add_stat('inserted', 1)
  add_stat('trajectories', group.trajectories)
  reward_sum = reward_sum + group.reward_sum
end

-- An eval group may have to give way to the next one, so that it is entered at once.
local function store_eval(member, group, sequence)
  enter('eval', sequence, member)
  enter('evictable', member, member)
  flush()
  add_stat('evictable_bytes', group.bytes)
end

local function store(group, incoming, sequence)
  local member, is_train = member_of(sequence), group.split == 'train'
  redis.call('RENAME', incoming, key('body:' .. member))
  redis.call('PERSIST', key('body:' .. member))
  add_pair(written, 'about', member, cmsgpack.pack({ group.group_id, group.content, group.prompt_id, group.split, group.foreign,
    group.tokens, group.trajectories, group.reward_sum, tonumber(now) }))
  facts[member] = { 0, group.oldest or -1, group.bytes, 0, 0, is_train and 1 or 0 }
  changed_facts[member] = true
  add_pair(entered, 'groups_of:' .. group.prompt_id, sequence, member)
  add_pair(written, 'sequences', group.group_id, member)
  known[group.group_id] = group.content
  add_stat('bytes', group.bytes)
  if is_train then
    store_train(member, group, sequence)
  else
    store_eval(member, group, sequence)
  end
  end_wait('actors')
  set_stat('no_room', nil)
end

local function insert(group, incoming, sequence)
  local result = refused(group)
  if not result then
    store(group, incoming, sequence)
    result = { 'accepted' }
  else
    redis.call('UNLINK', incoming)
  end
  if result[1] == 'pace' or result[1] == 'capacity' then
    start_wait('actors', result[1])
    if result[1] == 'capacity' then
      set_stat('no_room', 1)
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
end

local function main()
  local incoming = {}
  for i = 1, #groups do
    incoming[i] = ARGV[4] .. (i - 1)
  end
  if redis.call('EXISTS', unpack(incoming)) < #groups then
    return redis.error_reply('GONE the groups have expired before they were inserted')
  end
  -- The first write is one that Redis refuses when memory is full: then nothing at all has happened.
  local sequence = redis.call('HINCRBY', key('stats'), 'sequence', #groups) - #groups
  read_stats('latest_version', 'inserted', 'removed:age_unsampled', 'removed:ttl_unsampled', 'sampled', 'wanted_fresh',
    'no_room', 'bytes', 'evictable_bytes', 'actors_wait_code', 'actors_wait_since_s', 'actors_wait_last_s')
  remove_overdue(latest_version())
  forget_overdue()
  local group_ids, results = {}, {}
  for i, group in ipairs(groups) do
    group_ids[i] = group.group_id
  end
  read_known(group_ids)
  read_prompts()
  for i, group in ipairs(groups) do
    results[i] = insert(group, incoming[i], sequence + i)
  end
  if reward_sum ~= 0 then
    redis.call('HINCRBYFLOAT', key('stats'), 'reward_sum', reward_sum)
  end
  return results
end
