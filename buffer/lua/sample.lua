-- Hand out exactly n distinct groups, or say why the draw must wait. The schema is in common.lua.
--
-- ARGV[3] JSON {request_id, num_groups, num_fresh, learner_version (decimal string), rest (selectors.rest_of), mode}; mode
--         `draw`; `look` = only say whether a draw could go on; `leave` = a draw that would have to wait is never made
--         here, under this request_id
-- ARGV[4] the request as one string: a repeat must be equal to the draw that it repeats
-- ARGV[5] cmsgpack list of the random numbers of selectors.draw_lots
-- Returns {'drawn', {body, uses, age, probability}...} with the numbers as strings, age '' for data without a version;
--         {'again'} when more overdue groups must be removed, or other work done, first; {'conflict'} for a reused request_id;
--         {'open', weight, reference} to a look: the weight that it may choose from is weight x 2 ^ reference; {'left'};
--         {<code of rate_limiter.draw_blocked>, stored, stored fresh, eligible}.

local request = cjson.decode(ARGV[3])
local lots = cmsgpack.unpack(ARGV[5])
local draw_key = key('draw:' .. request.request_id)

-- What a draw wants to know of a group, read once: a call costs Redis more than all that Lua does with the answer.
local facts = {}
local function facts_of(sequence)
  if not facts[sequence] then
    local fields = redis.call('HMGET', group_key(sequence), 'body', 'bytes', 'version', 'uses', 'weight')
    facts[sequence] = { body = fields[1], bytes = fields[2], version = fields[3], uses = fields[4], weight = fields[5] }
  end
  return facts[sequence]
end

-- Call a command on an index with any number of arguments, as many at a time as fit on Lua's stack.
local function call_many(command, index, arguments)
  for i = 1, #arguments, 1000 do
    redis.call(command, key(index), unpack(arguments, i, math.min(i + 999, #arguments)))
  end
end

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
    total = total - weight_of(facts_of(entry[1]).weight, line.reference)
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
    local weight = weight_of(facts_of(sequence).weight, line.reference)
    passed[#passed + 1] = { scored[2 * #passed + 1], score, weight, is_taken[sequence] }
    if not is_taken[sequence] then
      chosen[#chosen + 1] = { sequence, number(math.min(1, weight / total)) }
    end
    last = score
  end
  if last > line.time then
    set_line('time', last)
  end
  local renewed = {}
  for i, clock in ipairs(passed) do
    local member, score, weight, is_void = unpack(clock)
    local owed = is_void and 0 or math.max((score - line.time) * weight, -MOST_OWED)
    renewed[2 * i - 1], renewed[2 * i] = number(line.time + (lots[i] + owed) / weight), member
  end
  call_many('ZADD', 'weighted', renewed)
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

-- Take groups that were used for the first time out of `fresh`: from now on capacity may remove them.
local function open_to_eviction(sequences)
  local scored, bytes = {}, 0
  for i, sequence in ipairs(sequences) do
    scored[2 * i - 1], scored[2 * i] = sequence, sequence
    bytes = bytes + facts_of(sequence).bytes
  end
  call_many('ZREM', 'fresh', sequences)
  call_many('ZADD', 'evictable', scored)
  add_stat('evictable_bytes', bytes)
end

-- Count one use of each chosen group; returns {sequence, uses, age, probability} of each, as strings.
local function hand_out(chosen, clock)
  local drawn, first_used, histogram = {}, {}, {}
  for i, entry in ipairs(chosen) do
    local sequence, group = entry[1], facts_of(entry[1])
    local before, uses = tonumber(group.uses), group.uses + 1
    redis.call('HSET', group_key(sequence), 'uses', uses, 'sampled_s', now)
    histogram[before] = (histogram[before] or 0) - 1
    histogram[uses] = (histogram[uses] or 0) + 1
    if before == 0 then
      first_used[#first_used + 1] = sequence
    end
    use_weighted(sequence, uses, clock)
    local age = group.version ~= '' and integer(clock - tonumber(group.version)) or ''
    drawn[i] = { sequence, integer(uses), age, entry[2] }
  end
  for times, change in pairs(histogram) do
    count('uses', times, change)
  end
  open_to_eviction(first_used)
  return drawn
end

local function remember_draw(drawn)
  local window_ms = math.ceil(1000 * settings.table.repeat_window_s)
  redis.call('SET', draw_key, cmsgpack.pack({ ARGV[4], now, drawn }), 'PX', window_ms)
end

local function draw(clock)
  local chosen = selectors[request.rest](first('ZRANGE', 'fresh', request.num_fresh))
  local drawn, reply = hand_out(chosen, clock), { 'drawn' }
  add_stat('sampled', #drawn)
  for i, entry in ipairs(drawn) do
    reply[i + 1] = { facts_of(entry[1]).body, entry[2], entry[3], entry[4] }
    if settings.table.reuse_limit and tonumber(entry[2]) >= settings.table.reuse_limit then
      remove(entry[1], 'reuse')
    end
  end
  remember_draw(drawn)
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

-- What a draw may choose from: a count where all weigh alike.
local function open(pace, eligible)
  if request.rest == 'weighted' and not is_rank then
    return { 'open', number(line.total), number(line.reference) }
  end
  return { 'open', integer(request.rest == 'fresh' and pace.fresh or eligible), '0' }
end

local remembered = remembered_draw()
if remembered then
  if remembered[1] ~= ARGV[4] then
    return { 'conflict' }
  end
  return remembered[3] == 'left' and { 'left' } or bodies(remembered[3])
end
work_in_full_memory()
local clock = math.max(tonumber(request.learner_version), latest_version())
if remove_overdue(clock) or weighting and (wake(clock) or move_clocks()) then
  return { 'again' }
end
local pace = read_pace()
local eligible = request.rest == 'weighted' and redis.call('ZCARD', key('weighted')) or pace.sampleable
local code = blocked(pace, eligible)
if not code and request.mode == 'look' then
  return open(pace, eligible)
elseif not code then
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
if request.mode == 'leave' then
  remember_draw('left')
  return { 'left' }
end
return { code, integer(pace.sampleable), integer(pace.fresh), integer(eligible) }
