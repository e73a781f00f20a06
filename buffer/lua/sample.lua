-- Choose exactly n distinct groups to hand out, or say why the draw must wait. The schema is in common.lua.
--
-- ARGV[3] cmsgpack {request_id, num_groups, num_fresh, learner_version, rest (selectors.rest_of), lots: the random numbers
--         of selectors.draw_lots, mode}; mode `draw`; `look` = only say whether a draw could go on; `leave` = a draw that
--         would have to wait is never made here, under this request_id
-- ARGV[4] the request as one string: a repeat must be equal to the draw that it repeats
-- Returns {'drawn', cmsgpack {members, uses, ages (false for data without a version), probabilities, bytes, candidates (how
--         many groups the lot could choose from, 1 without a lot)}}, six lists;
--         the caller then reads the bodies, which stay for repeat_window_s whatever becomes of the groups, unless
--         repeat_max_bytes drops them;
--         {'again'} when more overdue groups must be removed, or other work done, first; {'conflict'} for a reused request_id;
--         {'open', weight, reference, groups} to a look: the weight that it may choose from is weight x 2 ^ reference;
--         {'left'};
--         {<code of rate_limiter.draw_blocked>, stored, stored fresh, eligible}.

local request = cmsgpack.unpack(ARGV[3])
local lots = request.lots
local draw_key = key('draw:' .. request.request_id)

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

-- A choice is two lists: members, and the probability of each.
local function first(command, index, limit)
  local members, chances = limit > 0 and redis.call(command, key(index), 0, limit - 1) or {}, {}
  for i = 1, #members do
    chances[i] = 1
  end
  return members, chances
end

local function set_of(members)
  local is_taken = {}
  for _, member in ipairs(members) do
    is_taken[member] = true
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

local function add_uniform(chosen, chances)
  local total, taken = redis.call('ZCARD', key('train')), {}
  for i, member in ipairs(chosen) do
    taken[i] = redis.call('ZRANK', key('train'), member)
  end
  local num_candidates, count = math.max(1, total - #taken), #taken
  for i, rank in ipairs(draw_ranks(taken, total)) do
    chosen[count + i], chances[count + i] = redis.call('ZRANGE', key('train'), rank, rank)[1], 1 / num_candidates
  end
  return num_candidates
end

-- Add the first of an index, in the order of the command, that are not chosen yet.
local function add_first(chosen, chances, command, index)
  local is_taken, count = set_of(chosen), #chosen
  for _, member in ipairs(redis.call(command, key(index), 0, request.num_groups - 1)) do
    if count < request.num_groups and not is_taken[member] then
      count = count + 1
      chosen[count], chances[count] = member, 1
    end
  end
end

-- The sum of the weights that the draw may choose from, and the number of groups that have one.
local function eligible_weight(chosen)
  local total, number = line.total, size_of('weighted')
  for _, member in ipairs(chosen) do
    local weight = weight_of(facts[member][WEIGHT], line.reference)
    total, number = total - weight, number - (weight > 0 and 1 or 0)
  end
  return total, number
end

-- WeightedIndex.draw
local function add_by_clock(chosen, chances)
  local last, count, num_passed = request.num_groups - 1, #chosen, 0
  local members, scores = members_and_scores(redis.call('ZRANGE', key('weighted'), 0, last, 'WITHSCORES'))
  read_facts(chosen)
  read_facts(members)
  local is_taken, weights = set_of(chosen), {}
  local total, num_candidates = eligible_weight(chosen)
  while count < request.num_groups do
    num_passed = num_passed + 1
    local member = members[num_passed]
    local weight = weight_of(facts[member][WEIGHT], line.reference)
    weights[num_passed] = weight
    if not is_taken[member] then
      count = count + 1
      chosen[count], chances[count] = member, weight < total and weight / total or 1
    end
  end
  if num_passed > 0 and scores[num_passed] > line.time then
    set_line('time', scores[num_passed])
  end
  local time, renewed = line.time, {}
  for i = 1, num_passed do
    local member, weight, owed = members[i], weights[i], 0
    if not is_taken[member] then
      owed = math.max((scores[i] - time) * weight, -MOST_OWED)
    end
    renewed[2 * i - 1], renewed[2 * i] = time + (lots[i] + owed) / weight, member
  end
  call_many('ZADD', 'weighted', renewed)
  return num_candidates
end

-- A selector adds to a choice until it is complete, and returns how many groups the lot could choose from if there was one.
local selectors = {
  fifo = function(chosen, chances) add_first(chosen, chances, 'ZRANGE', 'train') end,
  lifo = function(chosen, chances) add_first(chosen, chances, 'ZREVRANGE', 'train') end,
  fresh = function() end,
  uniform = add_uniform,
  weighted = is_rank and function(chosen, chances) add_first(chosen, chances, 'ZRANGE', 'weighted') end or add_by_clock,
}

-- Take groups that were used for the first time out of `fresh`: from now on capacity may remove them.
local function open_to_eviction(members)
  local scored, bytes = {}, 0
  for i, member in ipairs(members) do
    scored[2 * i - 1], scored[2 * i] = member, member
    bytes = bytes + facts[member][BYTES]
  end
  call_many('ZREM', 'fresh', members)
  call_many('ZADD', 'evictable', scored)
  add_stat('evictable_bytes', bytes)
end

-- Count one use of each chosen group; returns the lists of uses, ages and bytes.
local function hand_out(members, clock)
  local uses, ages, bytes, first_used, used_s = {}, {}, {}, {}, tonumber(now)
  read_facts(members)
  for i, member in ipairs(members) do
    local group = facts[member]
    local before = group[USES]
    if before == 0 then
      first_used[#first_used + 1] = member
    end
    group[USES], group[USED_S], changed_facts[member] = before + 1, used_s, true
    count('uses', before, -1)
    count('uses', before + 1, 1)
    if is_rank then
      use_weighted(member, clock)
    end
    uses[i], ages[i], bytes[i] = before + 1, group[VERSION] >= 0 and clock - group[VERSION], group[BYTES]
  end
  open_to_eviction(first_used)
  return uses, ages, bytes
end

local function remember_draw(drawn)
  local window_ms = math.ceil(1000 * settings.table.repeat_window_s)
  redis.call('SET', draw_key, cmsgpack.pack({ ARGV[4], now, drawn }), 'PX', window_ms)
end

local function draw(clock)
  local members, chances = first('ZRANGE', 'fresh', request.num_fresh)
  local num_without_lot = #members
  local num_candidates, candidates = selectors[request.rest](members, chances) or 1, {}
  for i = 1, #members do
    candidates[i] = i > num_without_lot and num_candidates or 1
  end
  local uses, ages, bytes = hand_out(members, clock)
  add_stat('sampled', #members)
  if settings.table.reuse_limit then
    for i, member in ipairs(members) do
      if uses[i] >= settings.table.reuse_limit then
        remove(member, 'reuse')
      end
    end
  end
  local drawn = cmsgpack.pack({ members, uses, ages, chances, bytes, candidates })
  remember_draw(drawn)
  return { 'drawn', drawn }
end

local function remembered_draw()
  local packed = redis.call('GET', draw_key)
  local remembered = packed and cmsgpack.unpack(packed)
  if remembered and tonumber(now) - tonumber(remembered[2]) < settings.table.repeat_window_s then
    return remembered
  end
  return nil
end

-- What a draw may choose from: the weight is a count where all weigh alike.
local function open(pace, eligible)
  local groups = integer(request.rest == 'fresh' and pace.fresh or eligible)
  if request.rest == 'weighted' and not is_rank then
    return { 'open', string.format('%.17g', line.total), string.format('%.17g', line.reference), groups }
  end
  return { 'open', groups, '0', groups }
end

-- The answer to a request that was answered before; nil = a new one.
local function repeated()
  local remembered = remembered_draw()
  if not remembered then
    return nil
  elseif remembered[1] ~= ARGV[4] then
    return { 'conflict' }
  end
  return remembered[3] == 'left' and { 'left' } or { 'drawn', remembered[3] }
end

-- The answer to a draw that must wait, or that a full table can never serve.
local function refused(code, pace, eligible)
  if code ~= 'no_fit' then
    start_wait('learner', code)
  end
  if code == 'fresh' or code == 'weight' then -- rate_limiter.fresh_needed
    set_stat('wanted_fresh', math.max(request.num_fresh, pace.fresh + request.num_groups - eligible))
  end
  if request.mode == 'leave' then
    remember_draw('left')
    return { 'left' }
  end
  return { code, integer(pace.sampleable), integer(pace.fresh), integer(eligible) }
end

local function main()
  local answered = repeated()
  if answered then
    return answered
  end
  work_in_full_memory()
  read_stats('latest_version', 'inserted', 'removed:age_unsampled', 'removed:ttl_unsampled', 'sampled', 'wanted_fresh',
    'no_room', 'learner_wait_code', 'learner_wait_since_s', 'learner_wait_last_s')
  local clock = math.max(request.learner_version, latest_version())
  if remove_overdue(clock) or weighting and (wake(clock) or move_clocks() or start_over_if_worn()) then
    return { 'again' }
  end
  local pace = read_pace()
  local eligible = request.rest == 'weighted' and size_of('weighted') or pace.sampleable
  local code = blocked(pace, eligible)
  if code then
    return refused(code, pace, eligible)
  elseif request.mode == 'look' then
    return open(pace, eligible)
  end
  end_wait('learner')
  set_stat('wanted_fresh', nil)
  set_stat('no_room', nil)
  return draw(clock)
end
