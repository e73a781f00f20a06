-- Hand out exactly n distinct groups, or say why the draw must wait. The schema is in common.lua.
--
-- ARGV[3] JSON {request_id, num_groups, num_fresh, learner_version (decimal string), selector, rest (of a mix)}
-- ARGV[4] the request as one string: a repeat must be equal to the draw that it repeats
-- ARGV[5] cmsgpack list of uniform numbers in [0, 1), one per group, empty when the selector draws no lots
-- Returns {'drawn', {body, uses, age, probability}...} with the numbers as strings, age '' for data without a version;
--         {'again'} when more overdue groups must be removed first; {'conflict'} for a reused request_id;
--         {<code of rate_limiter.draw_blocked>, stored, stored fresh}.

local request = cjson.decode(ARGV[3])
local uniforms = cmsgpack.unpack(ARGV[5])
local draw_key = key('draw:' .. request.request_id)

local function bodies(draw)
  local reply = { 'drawn' }
  for _, entry in ipairs(draw) do
    reply[#reply + 1] = { redis.call('HGET', group_key(entry[1]), 'body'), entry[2], entry[3], entry[4] }
  end
  return reply
end

-- rate_limiter.draw_blocked
local function blocked(pace)
  local limiter = settings.limiter
  local short = pace.sampleable < request.num_groups or pace.fresh < request.num_fresh
  if pace.no_room then
    return short and 'no_fit' or nil
  elseif pace.sampleable < limiter.min_size then
    return 'min_size'
  end
  local floor = limiter.min_size * limiter.samples_per_insert - limiter.error_buffer
  if limiter_error(pace) - request.num_groups < floor then
    return 'ahead'
  end
  return short and 'fresh' or nil
end

local function oldest(index, limit)
  local chosen = {}
  for _, sequence in ipairs(redis.call('ZRANGE', key(index), 0, limit - 1)) do
    chosen[#chosen + 1] = { sequence, '1' }
  end
  return chosen
end

-- selectors.draw_ranks
local function draw_ranks(taken, total)
  local moved, drawn = {}, {}
  for i, rank in ipairs(taken) do
    moved[rank] = moved[i - 1] or i - 1
  end
  for i = 1, request.num_groups - #taken do
    local front = #taken + i - 1
    local other = front + math.floor(uniforms[i] * (total - front))
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

local function add_oldest(chosen)
  local is_taken = {}
  for _, entry in ipairs(chosen) do
    is_taken[entry[1]] = true
  end
  for _, entry in ipairs(oldest('train', request.num_groups)) do
    if #chosen < request.num_groups and not is_taken[entry[1]] then
      chosen[#chosen + 1] = entry
    end
  end
  return chosen
end

-- A selector returns {sequence, probability as a string} of each chosen group.
local selectors = {
  fifo = function() return oldest('train', request.num_groups) end,
  fresh = function() return oldest('fresh', request.num_groups) end,
  uniform = function() return add_uniform({}) end,
  mix = function()
    local rest = { fifo = add_oldest, uniform = add_uniform }
    return rest[request.rest](oldest('fresh', request.num_fresh))
  end,
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
  return { integer(uses), fields[2] ~= '' and integer(clock - tonumber(fields[2])) or '' }
end

local function draw(clock)
  local drawn = {}
  for i, chosen in ipairs(selectors[request.selector]()) do
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
if remove_overdue(clock) then
  return { 'again' }
end
local pace = read_pace()
local code = blocked(pace)
if not code then
  end_wait('learner')
  redis.call('HDEL', key('stats'), 'wanted_fresh', 'no_room')
  return draw(clock)
end
if code ~= 'no_fit' then
  start_wait('learner', code)
end
if code == 'fresh' then
  redis.call('HSET', key('stats'), 'wanted_fresh', request.num_fresh)
end
return { code, integer(pace.sampleable), integer(pace.fresh) }
