-- The key schema of one table shard and the steps that its scripts share; redis_table.py puts this file before each.
--
-- KEYS[1] is the prefix `sw:{<run id>:<shard>}:`. The braces put all keys of a shard on one node of a cluster.
-- ARGV[1] is cmsgpack {table, limiter}: TableSettings and RateLimiterSettings without nulls. ARGV[2] is the time, in
-- seconds since 1970. A sequence number is given to each insert attempt and names a stored group; it never returns.
--
-- stats          hash    counters, flags and waits:
--   sequence               last sequence number given
--   latest_version         latest published version; absent before the first
--   bytes                  encoded bytes of all stored groups; evictable_bytes: of those in `evictable`
--   tokens, foreign        response tokens and foreign groups among the stored train groups
--   inserted, sampled      train groups ever accepted; groups ever handed out
--   trajectories, reward_sum   of the train groups ever accepted
--   result:<code>          insert attempts by result (outcomes.py), all time; part:<code> of single trajectories
--   partial_bytes          bytes of all partial groups
--   repeat_bytes           bytes of the bodies in `repeats`; dropped_repeats: bodies dropped by repeat_max_bytes
--   removed:<reason>       removed groups, all time
--   forgotten_ids          ids dropped from `remembered` by dedup_max_ids
--   forgotten_prompts      prompts dropped by max_prompts; weights_left_behind: see TableStats
--   wanted_fresh           fresh groups that would let the last refused draw go on; absent = 0
--   no_room                1 after an insert that found no room, until something is stored or handed out
--   <who>_wait_code, <who>_wait_since_s, <who>_wait_last_s   who = learner | actors; absent = does not wait
-- versions       hash    oldest policy version -> stored train groups, foreign ones left out
-- uses           hash    times handed out -> stored train groups
-- sequences      hash    group_id -> member, the name of a stored group in all keys below: its sequence number in 14 digits,
--                        padded, so that ties of a score go to the oldest
-- body:<member>  string  canonical msgpack of the group (codec.py)
-- repeats        zset    bodies of removed groups that were handed out, kept for a repeat of the request: member and bytes
--                        as `<member>:<bytes>`, score = when the body goes: REREAD_S after repeat_window_s from its last use
-- incoming:<sender>:<number>  string  body of a group whose insert follows at once; expires
-- facts          hash    member -> struct <dddddB of what changes or decides about draws: weight (weighting.lua; 0 without
--                        one), oldest version (-1 = none), bytes, uses, time of the last use (0 = never), 1 = train
-- about          hash    member -> cmsgpack {group_id, content (hash), prompt_id, split, foreign (bool), tokens,
--                        trajectories, sum of rewards, time of the insert}
-- train          zset    stored train groups: member, score = sequence number
-- fresh          zset    of these, never handed out
-- eval           zset    stored eval groups
-- evictable      zset    what capacity may remove: train groups handed out at least once, and eval groups
-- ages           zset    train groups with a version: member, score = oldest policy version
-- groups_of:<prompt_id>  zset  stored groups of a prompt: member, score = sequence number
-- weighted       zset    groups that a weighted draw may take: member, score = when its clock goes off; where the
--                        weighting is rank, decay_per_use x uses - priority
-- weighted_old   zset    clocks that are still on the time line before; the coming draws move them
-- weighted_line  hash    time = where the time line is, total = sum of the weights in `weighted`, peak = its highest
--                        value on this line, reference = log2 of the weight that counts as 1 (recency; else 0),
--                        top = largest weight or priority ever posted, old_time and old_reference of `weighted_old`
-- resting        zset    groups in their cool-down: member, score = clock at which it ends
-- prompt_groups:<prompt_id>  zset  stored train groups of the prompt, where the weighting is difficulty
-- prompts        hash    prompt_id -> cmsgpack {seen, solved, sum of rewards, newest version or ''}
-- prompt_ids     zset    of `prompts`, all scores 0: pages in the order of the ids
-- prompts_seen   zset    of `prompts`, score = sequence number of the prompt's last group
-- remembered     hash    group_id -> content hash of a removed group; '' = a partial group that was dropped
-- remembered_at  zset    group_id, score = time of removal in seconds
-- partials       zset    open partial groups: group_id, score = time of the first trajectory in seconds
-- sealed         zset    partial groups that take no more trajectories and wait to be inserted: group_id, score = time
--                        of sealing or of the last refused insert
-- partial:<id>   hash    fields (prompt_id, split and group_size as one text), count, bytes,
--                        t:<trajectory_id> = encoded trajectory
-- presence       hash    no script reads it; services/presence.py keeps the last heartbeat of each actor and the learner's
--                        last report there, as JSON by name
-- evaluations    hash    no script reads it; services/evaluations.py keeps claims and results there, as JSON by name
-- draw:<request> string  cmsgpack {request, time in seconds, what sample.lua returned of the draw}, expires; in its place
--                        'left', where another shard makes the draw
-- pin:<request>  string  `<number of the shard that makes the draw> <share of its weight>`, in the shard that the
--                        request id hashes to, where there are several; expires
-- shards         string  number of shards of the run; shard 0 alone has it
-- weighting      string  JSON of table.weighting that the stored groups were weighed by, or `none`; shard 0 alone has it
--
-- A call of Redis costs more than all that Lua does with the answer. So a script reads counters, sizes and facts once,
-- changes them in Lua, and finish.lua, which follows each script, writes what changed, all groups in one call.

local prefix = KEYS[1]
local settings = cmsgpack.unpack(ARGV[1])
local now = ARGV[2]
local BATCH = 1000 -- most groups that one script call removes for their age
local REREAD_S = 5 -- what a repeat at the end of its window has to read the bodies
local STACK = 1000 -- most arguments of a call that come from a list: what fits on Lua's stack

local function key(name)
  return prefix .. name
end

local function integer(number)
  return string.format('%.0f', number)
end

local function member_of(sequence)
  return string.format('%014.0f', sequence)
end

-- Call a command on a key with a list of arguments, as many at a time as fit, always whole pairs.
local function call_many(command, name, arguments)
  for i = 1, #arguments, STACK do
    redis.call(command, key(name), unpack(arguments, i, math.min(i + STACK - 1, #arguments)))
  end
end

local stat_texts = {} -- fields of `stats` as they were read or set; false = absent
local stat_changes = {} -- what finish.lua adds to fields of `stats`
local bucket_changes = { versions = {}, uses = {} } -- what finish.lua adds to buckets of the histograms

local sizes = {} -- zset -> number of its members, as read and changed
local entered = {} -- zset -> {score, member, ...} that finish.lua adds
local written = {} -- hash -> {field, value, ...} that finish.lua sets
local known = {} -- group_id -> content of a stored or removed group, as read or changed; false = a new id

local function size_of(index)
  sizes[index] = sizes[index] or redis.call('ZCARD', key(index))
  return sizes[index]
end

local function add_pair(lists, name, first, second)
  local list = lists[name] or {}
  list[#list + 1], list[#list + 2] = first, second
  lists[name] = list
end

-- Add a new member.
local function enter(index, score, member)
  sizes[index] = size_of(index) + 1
  add_pair(entered, index, score, member)
end

-- Take out a member that was there when the script began; return 1 if it was.
local function leave(index, member)
  local taken = redis.call('ZREM', key(index), member)
  sizes[index] = sizes[index] and sizes[index] - taken
  return taken
end

-- Do what was entered and written so far.
local function flush()
  for index, list in pairs(entered) do
    call_many('ZADD', index, list)
  end
  for name, list in pairs(written) do
    call_many('HSET', name, list)
  end
  entered, written = {}, {}
end

local function read_stats(...)
  for i, text in ipairs(redis.call('HMGET', key('stats'), ...)) do
    stat_texts[select(i, ...)] = text
  end
end

local function stat_text(field)
  if stat_texts[field] == nil then
    stat_texts[field] = redis.call('HGET', key('stats'), field)
  end
  return stat_texts[field]
end

local function stat(field)
  return tonumber(stat_text(field) or 0) + (stat_changes[field] or 0)
end

local function add_stat(field, change)
  stat_changes[field] = (stat_changes[field] or 0) + change
end

-- Set a field that is no counter; nil = remove it.
local function set_stat(field, value)
  if value then
    redis.call('HSET', key('stats'), field, value)
    stat_texts[field] = tostring(value)
  elseif stat_text(field) then
    redis.call('HDEL', key('stats'), field)
    stat_texts[field] = false
  end
end

local function count(histogram, bucket, change)
  local changes = bucket_changes[histogram]
  changes[bucket] = (changes[bucket] or 0) + change
end

local function start_wait(who, code)
  local last = stat_text(who .. '_wait_last_s')
  if not last or tonumber(now) - tonumber(last) > tonumber(settings.forget_wait_s) then
    set_stat(who .. '_wait_since_s', now)
  end
  set_stat(who .. '_wait_code', code)
  set_stat(who .. '_wait_last_s', now)
end

local function end_wait(who)
  set_stat(who .. '_wait_code', nil)
  set_stat(who .. '_wait_since_s', nil)
  set_stat(who .. '_wait_last_s', nil)
end

local FACTS = '<dddddB'
local WEIGHT, VERSION, BYTES, USES, USED_S, TRAIN = 1, 2, 3, 4, 5, 6
local facts = {} -- member -> the facts of a group as they were read or changed, by the numbers above
local changed_facts = {} -- member -> true; finish.lua writes them

-- Read the facts of stored groups.
local function read_facts(members)
  local missing, count = {}, 0
  for _, member in ipairs(members) do
    if not facts[member] then
      count = count + 1
      missing[count] = member
    end
  end
  for i = 1, count, STACK do
    local packed = redis.call('HMGET', key('facts'), unpack(missing, i, math.min(i + STACK - 1, count)))
    for j = 1, #packed do
      facts[missing[i + j - 1]] = { struct.unpack(FACTS, packed[j]) }
    end
  end
end

local function facts_of(member)
  read_facts({ member })
  return facts[member]
end

-- What does not change of a stored group; see `about`.
local function about_of(member)
  local group = {}
  group.group_id, group.content, group.prompt_id, group.split, group.foreign, group.tokens, group.trajectories,
    group.reward_sum, group.inserted_s = unpack(cmsgpack.unpack(redis.call('HGET', key('about'), member)))
  return group
end

-- rate_limiter.Pace
local function read_pace()
  return {
    sampleable = size_of('train'),
    fresh = size_of('fresh'),
    inserted = stat('inserted') - stat('removed:age_unsampled') - stat('removed:ttl_unsampled'),
    sampled = stat('sampled'),
    wanted_fresh = stat('wanted_fresh'),
    no_room = stat('no_room') == 1,
  }
end

-- rate_limiter.limiter_error
local function limiter_error(pace)
  return pace.inserted * settings.limiter.samples_per_insert - pace.sampled
end

-- Keep the id and content of a removed group, so that a late retry is known.
local function remember(group_id, content)
  known[group_id] = content
  redis.call('HSET', key('remembered'), group_id, content)
  redis.call('ZADD', key('remembered_at'), now, group_id)
  local excess = redis.call('ZCARD', key('remembered_at')) - settings.table.dedup_max_ids -- large once the cap is lowered
  if excess > 0 then
    local oldest = redis.call('ZPOPMIN', key('remembered_at'), math.min(excess, BATCH))
    for i = 1, #oldest, 2 do
      redis.call('HDEL', key('remembered'), oldest[i])
      add_stat('forgotten_ids', 1)
    end
  end
end

-- Enter a train group into the counters of what is stored, or take it out. A version of -1 is none.
local function count_train(uses, tokens, foreign, version, change)
  count('uses', uses, change)
  add_stat('tokens', change * tokens)
  if foreign then
    add_stat('foreign', change)
  elseif version >= 0 then
    count('versions', version, change)
  end
end

local function drop_body(entry)
  local member, bytes = string.match(entry, '(%d+):(%d+)')
  redis.call('UNLINK', key('body:' .. member))
  redis.call('ZREM', key('repeats'), entry)
  add_stat('repeat_bytes', -bytes)
end

local function drop_overdue_bodies()
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', key('repeats'), '-inf', now, 'LIMIT', 0, BATCH)) do
    drop_body(entry)
  end
end

-- Keep the body of a removed group for repeats. Beyond repeat_max_bytes those go that would go soonest, but none that
-- was handed out at this very moment: nobody has read it yet.
local function keep_for_repeats(member, bytes, used_s)
  local life_s = settings.table.repeat_window_s + REREAD_S
  redis.call('ZADD', key('repeats'), string.format('%.17g', used_s + life_s), member .. ':' .. integer(bytes))
  redis.call('PEXPIRE', key('body:' .. member), math.ceil(1000 * (used_s + life_s - now)))
  add_stat('repeat_bytes', bytes)
  while stat('repeat_bytes') > settings.table.repeat_max_bytes do
    local entry, score = unpack(redis.call('ZRANGE', key('repeats'), 0, 0, 'WITHSCORES'))
    if tonumber(score) >= now + life_s then
      return
    end
    drop_body(entry)
    add_stat('dropped_repeats', 1)
  end
end

local leave_weighted -- function(member, prompt_id) of weighting.lua: take a train group out of the weighted index

-- Take a group out of the table. Age and TTL count a train group that nobody used apart.
local function remove(member, reason)
  local group, about = facts_of(member), about_of(member)
  local is_train = group[TRAIN] == 1
  redis.call('HDEL', key('sequences'), about.group_id)
  redis.call('ZREM', key('groups_of:' .. about.prompt_id), member)
  for _, index in ipairs(is_train and { 'train', 'fresh', 'ages' } or { 'eval' }) do
    leave(index, member)
  end
  if leave('evictable', member) == 1 then
    add_stat('evictable_bytes', -group[BYTES])
  end
  add_stat('bytes', -group[BYTES])
  if is_train then
    leave_weighted(member, about.prompt_id)
    count_train(group[USES], about.tokens, about.foreign, group[VERSION], -1)
  end
  remember(about.group_id, about.content)
  if is_train and group[USES] == 0 and (reason == 'age' or reason == 'ttl') then
    reason = reason .. '_unsampled'
  end
  add_stat('removed:' .. reason, 1)
  if group[USED_S] > 0 and group[USED_S] + settings.table.repeat_window_s > tonumber(now) then
    keep_for_repeats(member, group[BYTES], group[USED_S])
  else
    redis.call('UNLINK', key('body:' .. member))
  end
  redis.call('HDEL', key('facts'), member)
  redis.call('HDEL', key('about'), member)
  facts[member], changed_facts[member] = nil, nil
end

-- Remove what the TTL and the age gate close, at most BATCH groups, and bodies that no repeat can ask for any more;
-- return whether more groups may be left.
local function remove_overdue(clock)
  local left = BATCH
  drop_overdue_bodies()
  if settings.table.ttl_s then
    for _, index in ipairs({ 'train', 'eval' }) do
      while left > 0 do
        local member = redis.call('ZRANGE', key(index), 0, 0)[1]
        if not member or about_of(member).inserted_s > tonumber(now) - settings.table.ttl_s then
          break
        end
        remove(member, 'ttl')
        left = left - 1
      end
    end
  end
  if settings.table.max_age_updates then
    local newest_closed = integer(clock - settings.table.max_age_updates - 1)
    local closed = redis.call('ZRANGEBYSCORE', key('ages'), '-inf', newest_closed, 'LIMIT', 0, left)
    for _, member in ipairs(closed) do
      remove(member, 'age')
    end
    left = left - #closed
  end
  return left == 0
end

-- Redis checks the memory only before the first write of a script. A script that makes room calls this first: it is a
-- write that Redis never refuses, and it changes nothing.
local function work_in_full_memory()
  redis.call('HDEL', key('stats'), '')
end

local function latest_version()
  return tonumber(stat_text('latest_version') or -1)
end

-- Read what is known of up to STACK ids.
local function read_known(group_ids)
  local members = redis.call('HMGET', key('sequences'), unpack(group_ids))
  local contents = redis.call('HMGET', key('remembered'), unpack(group_ids))
  for i, group_id in ipairs(group_ids) do
    local removed_s = contents[i] and redis.call('ZSCORE', key('remembered_at'), group_id)
    local is_remembered = removed_s and tonumber(removed_s) > tonumber(now) - settings.table.dedup_window_s
    known[group_id] = members[i] and about_of(members[i]).content or is_remembered and contents[i]
  end
end

-- The content of the stored or removed group of this id; nil = a new id.
local function known_content(group_id)
  if known[group_id] == nil then
    read_known({ group_id })
  end
  return known[group_id] or nil
end

-- outcomes.refused_for_version; `tokens` are a group or a trajectory
local function refused_for_version(tokens, latest)
  local newest, oldest, max_age = tokens.newest, tokens.oldest, settings.table.max_age_updates
  if newest and newest > latest then
    return { 'version', integer(newest), integer(latest) }
  elseif tokens.split ~= 'train' then
    return nil
  elseif max_age and oldest and latest - oldest > max_age then
    return { 'stale', integer(oldest), integer(latest - oldest), integer(max_age) }
  elseif tokens.foreign and settings.table.foreign_share == 0 then
    return { 'foreign' }
  end
  return nil
end

local function forget_overdue()
  local limit = string.format('%.17g', tonumber(now) - settings.table.dedup_window_s)
  for _, group_id in ipairs(redis.call('ZRANGEBYSCORE', key('remembered_at'), '-inf', limit, 'LIMIT', 0, BATCH)) do
    redis.call('ZREM', key('remembered_at'), group_id)
    redis.call('HDEL', key('remembered'), group_id)
  end
end

-- Let a partial group take no more trajectories.
local function seal(group_id)
  redis.call('ZREM', key('partials'), group_id)
  redis.call('ZADD', key('sealed'), now, group_id)
end

-- Forget the trajectories of a partial group, and keep its id, so that later ones are told.
local function drop_partial(group_id)
  local bytes = redis.call('HGET', key('partial:' .. group_id), 'bytes')
  if not bytes then
    return
  end
  redis.call('UNLINK', key('partial:' .. group_id))
  redis.call('ZREM', key('partials'), group_id)
  redis.call('ZREM', key('sealed'), group_id)
  add_stat('partial_bytes', -bytes)
  if not known_content(group_id) then
    remember(group_id, '')
  end
end
