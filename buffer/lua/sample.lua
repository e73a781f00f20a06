-- Hand out exactly n distinct groups, or say why the draw must wait. The schema is in common.lua.
--
-- ARGV[3] JSON {request_id, num_groups, num_fresh, learner_version (decimal string), rest (selectors.rest_of)}
-- ARGV[4] the request as one string: a repeat must be equal to the draw that it repeats
-- ARGV[5] cmsgpack list of the random numbers of selectors.draw_lots
-- Returns {'drawn', {body, uses, age, probability}...} with the numbers as strings, age '' for data without a version;
--         {'again'} when more overdue groups must be removed, or other work done, first; {'conflict'} for a reused request_id;
--         {<code of rate_limiter.draw_blocked>, stored, stored fresh, eligible}.

local request = cjson.decode(ARGV[3])
local lots = cmsgpack.unpack(ARGV[5])
local draw_key = key('draw:' .. request.request_id)

local function bodies(draw)
  local reply = { 'drawn' }
  for _, entry in ipairs(draw) do
    reply[#reply + 1] = { redis.call('HGET', group_key(entry[1]), 'body'), entry[2], entry[3], entry[4] }
  end
  return reply
end

-- rate_limiter.draw_blocked
local function blocked(pace, eligible)
  local limiter = settings.limiter
  local short = (pace.sampleable < request.num_groups or pace.fresh < request.num_fresh) and 'fresh'
    or eligible < request.num_groups and 'weight'
  if pace.no_room then
    return short and 'no_fit' or nil
  elseif pace.sampleable < limiter.min_size then
    return 'min_size'
  end
  local floor = limiter.min_size * limiter.samples_per_insert - limiter.error_buffer
  if limiter_error(pace) - request.num_groups < floor then
    return 'ahead'
  end
  return short or nil
end

local function first(command, index, limit)
  local chosen = {}
  for _, sequence in ipairs(limit > 0 and redis.call(command, key(index), 0, limit - 1) or {}) do
    chosen[#chosen + 1] = { sequence, '1' }
  end
  return chosen
end

local function set_of(chosen)
  local is_taken = {}
  for _, entry in ipairs(chosen) do
    is_taken[entry[1]] = true
  end
  return is_taken
end

-- selectors.draw_ranks
local function draw_ranks(taken, total)
  local moved, drawn = {}, {}
  for i, rank in ipairs(taken) do
    moved[rank] = moved[i - 1] or i - 1
  end
  for i = 1, request.num_groups - #taken do
    local front = #taken + i - 1
    local other = front + math.floor(lots[i] * (total - front))
    drawn[i] = moved[other] or other
    moved[other] = moved[front] or front
  end
  return drawn
end

local function add_uniform(chosen)
  local total, taken = redis.call('ZCARD', key('train')), {}
  for i, entry in ipairs(chosen) do
    taken[i] = redis.call('ZRANK', key('train'), entry[1])
  end
  local chance = string.format('%.17g', 1 / math.max(1, total - #taken))
  for _, rank in ipairs(draw_ranks(taken, total)) do
    chosen[#chosen + 1] = { redis.call('ZRANGE', key('train'), rank, rank)[1], chance }
  end
  return chosen
end

-- Add the first of an index, in the order of the command, that are not chosen yet.
local function add_first(chosen, command, index)
  local is_taken = set_of(chosen)
  for _, entry in ipairs(first(command, index, request.num_groups)) do
    if #chosen < request.num_groups and not is_taken[entry[1]] then
      chosen[#chosen + 1] = entry
    end
  end
  return chosen
end

local function add_by_rank(chosen)
  local is_taken = set_of(chosen)
  for _, member in ipairs(redis.call('ZRANGE', key('weighted'), 0, request.num_groups - 1)) do
    local sequence = sequence_of(member)
    if #chosen < request.num_groups and not is_taken[sequence] then
      chosen[#chosen + 1] = { sequence, '1' }
    end
  end
  return chosen
end

-- The sum of the weights that the draw may choose from.
local function eligible_weight(chosen)
  local total = line.total
  for _, entry in ipairs(chosen) do
    total = total - weight_of(redis.call('HGET', group_key(entry[1]), 'weight'), line.reference)
  end
  return total
end

-- WeightedIndex.draw
local function add_by_clock(chosen)
  local is_taken, total = set_of(chosen), eligible_weight(chosen)
  local scored = redis.call('ZRANGE', key('weighted'), 0, request.num_groups - 1, 'WITHSCORES')
  local passed, last = {}, 0
  while #chosen < request.num_groups do
    local sequence, score = sequence_of(scored[2 * #passed + 1]), tonumber(scored[2 * #passed + 2])
    local weight = weight_of(redis.call('HGET', group_key(sequence), 'weight'), line.reference)
    passed[#passed + 1] = { scored[2 * #passed + 1], score, weight, is_taken[sequence] }
    if not is_taken[sequence] then
      chosen[#chosen + 1] = { sequence, number(math.min(1, weight / total)) }
    end
    last = score
  end
  if last > line.time then
    set_line('time', last)
  end
  for i, clock in ipairs(passed) do
    local member, score, weight, is_void = unpack(clock)
    local owed = is_void and 0 or math.max((score - line.time) * weight, -MOST_OWED)
    redis.call('ZADD', key('weighted'), number(line.time + (lots[i] + owed) / weight), member)
  end
  start_over_if_worn()
  return chosen
end

-- A selector adds {sequence, probability as a string} of each group that it chooses.
local selectors = {
  fifo = function(chosen) return add_first(chosen, 'ZRANGE', 'train') end,
  lifo = function(chosen) return add_first(chosen, 'ZREVRANGE', 'train') end,
  fresh = function(chosen) return chosen end,
  uniform = add_uniform,
  weighted = is_rank and add_by_rank or add_by_clock,
}

-- Count one use; returns {uses, age} as strings.
local function hand_out(sequence, clock)
  local fields = redis.call('HMGET', group_key(sequence), 'bytes', 'version')
  local uses = redis.call('HINCRBY', group_key(sequence), 'uses', 1)
  redis.call('HSET', group_key(sequence), 'sampled_s', now)
  count('uses', uses - 1, -1)
  count('uses', uses, 1)
  if uses == 1 then
    redis.call('ZREM', key('fresh'), sequence)
    make_evictable(sequence, fields[1])
  end
  use_weighted(sequence, uses, clock)
  return { integer(uses), fields[2] ~= '' and integer(clock - tonumber(fields[2])) or '' }
end

local function draw(clock)
  local drawn = {}
  for i, chosen in ipairs(selectors[request.rest](first('ZRANGE', 'fresh', request.num_fresh))) do
    local info = hand_out(chosen[1], clock)
    drawn[i] = { chosen[1], info[1], info[2], chosen[2] }
  end
  add_stat('sampled', #drawn)
  local reply = bodies(drawn)
  for _, entry in ipairs(drawn) do
    if settings.table.reuse_limit and tonumber(entry[2]) >= settings.table.reuse_limit then
      remove(entry[1], 'reuse')
    end
  end
  local window_ms = math.ceil(1000 * settings.table.repeat_window_s)
  redis.call('SET', draw_key, cmsgpack.pack({ ARGV[4], now, drawn }), 'PX', window_ms)
  return reply
end

local function remembered_draw()
  local packed = redis.call('GET', draw_key)
  local remembered = packed and cmsgpack.unpack(packed)
  if remembered and tonumber(now) - tonumber(remembered[2]) < settings.table.repeat_window_s then
    return remembered
  end
  return nil
end

local remembered = remembered_draw()
if remembered then
  return remembered[1] == ARGV[4] and bodies(remembered[3]) or { 'conflict' }
end
work_in_full_memory()
local clock = math.max(tonumber(request.learner_version), latest_version())
if remove_overdue(clock) or weighting and (wake(clock) or move_clocks()) then
  return { 'again' }
end
local pace = read_pace()
local eligible = request.rest == 'weighted' and redis.call('ZCARD', key('weighted')) or pace.sampleable
local code = blocked(pace, eligible)
if not code then
  end_wait('learner')
  redis.call('HDEL', key('stats'), 'wanted_fresh', 'no_room')
  return draw(clock)
end
if code ~= 'no_fit' then
  start_wait('learner', code)
end
if code == 'fresh' or code == 'weight' then -- rate_limiter.fresh_needed
  local wanted = math.max(request.num_fresh, pace.fresh + request.num_groups - eligible)
  redis.call('HSET', key('stats'), 'wanted_fresh', wanted)
end
return { code, integer(pace.sampleable), integer(pace.fresh), integer(eligible) }
