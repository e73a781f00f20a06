-- The key schema of one table shard and the steps that its scripts share; redis_table.py puts this file before each.
--
-- KEYS[1] is the prefix `sw:{<run id>:<shard>}:`. The braces put all keys of a shard on one node of a cluster.
-- ARGV[1] is JSON {table, limiter}: TableSettings and RateLimiterSettings without nulls. ARGV[2] is the time, in
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
--   removed:<reason>       removed groups, all time
--   forgotten_ids          ids dropped from `remembered` by dedup_max_ids
--   forgotten_prompts      prompts dropped by max_prompts; weights_left_behind: see TableStats
--   wanted_fresh           fresh groups that would let the last refused draw go on; absent = 0
--   no_room                1 after an insert that found no room, until something is stored or handed out
--   <who>_wait_code, <who>_wait_since_s, <who>_wait_last_s   who = learner | actors; absent = does not wait
-- versions       hash    oldest policy version -> stored train groups, foreign ones left out
-- uses           hash    times handed out -> stored train groups
-- sequences      hash    group_id -> sequence number of a stored group
-- train          zset    stored train groups: member and score are the sequence number
-- fresh          zset    of these, never handed out
-- eval           zset    stored eval groups
-- evictable      zset    what capacity may remove: train groups handed out at least once, and eval groups
-- ages           zset    train groups with a version: member sequence number, score oldest policy version
-- weighted       zset    groups that a weighted draw may take: member = sequence number of 14 digits, score = when its
--                        clock goes off; where the weighting is rank, decay_per_use x uses - priority
-- weighted_old   zset    clocks that are still on the time line before; the coming draws move them
-- weighted_line  hash    time = where the time line is, total = sum of the weights in `weighted`, peak = its highest
--                        value on this line, reference = log2 of the weight that counts as 1 (recency; else 0),
--                        top = largest weight or priority ever posted, old_time and old_reference of `weighted_old`
-- resting        zset    groups in their cool-down: member as in `weighted`, score = clock at which it ends
-- prompt_groups:<prompt_id>  zset  stored train groups of the prompt, where the weighting is difficulty
-- prompts        hash    prompt_id -> cmsgpack {seen, solved, sum of rewards, newest version or ''}
-- prompt_ids     zset    of `prompts`, all scores 0: pages in the order of the ids
-- prompts_seen   zset    of `prompts`, score = sequence number of the prompt's last group
-- group:<seq>    hash    body (canonical msgpack), group_id, content (hash), split, version ('' = none), foreign (0/1),
--                        tokens, bytes, uses, inserted_s, sampled_s, prompt_id, trajectories, reward_sum, and of a train
--                        group weight (weighting.lua). A removed group that was handed out lives on until
--                        repeat_window_s after that, for a repeat of the request
-- groups_of:<prompt_id>  zset  stored groups of a prompt: member and score are the sequence number
-- remembered     hash    group_id -> content hash of a removed group; '' = a partial group that was dropped
-- remembered_at  zset    group_id, score = time of removal in seconds
-- partials       zset    open partial groups: group_id, score = time of the first trajectory in seconds
-- sealed         zset    partial groups that take no more trajectories and wait to be inserted: group_id, score = time
--                        of sealing or of the last refused insert
-- partial:<id>   hash    fields (prompt_id, split and group_size as one text), count, bytes,
--                        t:<trajectory_id> = encoded trajectory
-- presence       hash    no script reads it; services/presence.py keeps the last heartbeat of each actor and the learner's
--                        last report there, as JSON by name
-- draw:<request> string  cmsgpack {request, time in seconds, list of {sequence, uses, age, probability}}, expires; in place
--                        of the list 'left', where another shard makes the draw
-- pin:<request>  string  `<number of the shard that makes the draw> <share of its weight>`, in the shard that the
--                        request id hashes to, where there are several; expires
-- shards         string  number of shards of the run; shard 0 alone has it

local prefix = KEYS[1]
local settings = cjson.decode(ARGV[1])
local now = ARGV[2]
local BATCH = 1000 -- most groups that one script call removes for their age

local function key(name)
  return prefix .. name
end

local function group_key(sequence)
  return prefix .. 'group:' .. sequence
end

local function stat(field)
  return tonumber(redis.call('HGET', key('stats'), field) or 0)
end

local function add_stat(field, change)
  redis.call('HINCRBY', key('stats'), field, change)
end

local function integer(number)
  return string.format('%.0f', number)
end

-- Change a bucket of a histogram; empty buckets leave.
local function count(histogram, bucket, change)
  if redis.call('HINCRBY', key(histogram), bucket, change) == 0 then
    redis.call('HDEL', key(histogram), bucket)
  end
end

local function start_wait(who, code)
  local last = redis.call('HGET', key('stats'), who .. '_wait_last_s')
  if not last or tonumber(now) - tonumber(last) > tonumber(settings.forget_wait_s) then
    redis.call('HSET', key('stats'), who .. '_wait_since_s', now)
  end
  redis.call('HSET', key('stats'), who .. '_wait_code', code, who .. '_wait_last_s', now)
end

local function end_wait(who)
  redis.call('HDEL', key('stats'), who .. '_wait_code', who .. '_wait_since_s', who .. '_wait_last_s')
end

-- rate_limiter.Pace
local function read_pace()
  return {
    sampleable = redis.call('ZCARD', key('train')),
    fresh = redis.call('ZCARD', key('fresh')),
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
  redis.call('HSET', key('remembered'), group_id, content)
  redis.call('ZADD', key('remembered_at'), now, group_id)
  if redis.call('ZCARD', key('remembered_at')) > settings.table.dedup_max_ids then
    local oldest = redis.call('ZPOPMIN', key('remembered_at'))
    redis.call('HDEL', key('remembered'), oldest[1])
    add_stat('forgotten_ids', 1)
  end
end

local function make_evictable(sequence, bytes)
  redis.call('ZADD', key('evictable'), sequence, sequence)
  add_stat('evictable_bytes', bytes)
end

-- Enter a train group into the counters of what is stored, or take it out.
local function count_train(uses, tokens, foreign, version, change)
  count('uses', uses, change)
  add_stat('tokens', change * tokens)
  if foreign == '1' then
    add_stat('foreign', change)
  elseif version ~= '' then
    count('versions', version, change)
  end
end

local leave_weighted -- function(sequence) of weighting.lua: take a train group out of the weighted index

-- Take a group out of the table. Age and TTL count a train group that nobody used apart.
local function remove(sequence, reason)
  local fields = redis.call('HMGET', group_key(sequence),
    'group_id', 'content', 'split', 'version', 'foreign', 'tokens', 'bytes', 'uses', 'sampled_s', 'prompt_id')
  local group_id, content, split, version, foreign = fields[1], fields[2], fields[3], fields[4], fields[5]
  local tokens, bytes, uses, sampled_s = fields[6], fields[7], tonumber(fields[8]), tonumber(fields[9])
  redis.call('HDEL', key('sequences'), group_id)
  redis.call('ZREM', key('groups_of:' .. fields[10]), sequence)
  for _, index in ipairs({ 'train', 'fresh', 'eval', 'ages' }) do
    redis.call('ZREM', key(index), sequence)
  end
  if redis.call('ZREM', key('evictable'), sequence) == 1 then
    add_stat('evictable_bytes', -bytes)
  end
  add_stat('bytes', -bytes)
  if split == 'train' then
    leave_weighted(sequence)
    count_train(uses, tokens, foreign, version, -1)
  end
  remember(group_id, content)
  if split == 'train' and uses == 0 and (reason == 'age' or reason == 'ttl') then
    reason = reason .. '_unsampled'
  end
  add_stat('removed:' .. reason, 1)
  local repeatable_s = sampled_s and sampled_s + settings.table.repeat_window_s - tonumber(now) or 0
  if repeatable_s > 0 then
    redis.call('PEXPIRE', group_key(sequence), math.ceil(1000 * repeatable_s) + 5000)
  else
    redis.call('UNLINK', group_key(sequence))
  end
end

-- Remove what the TTL and the age gate close, at most BATCH groups; return whether more may be left.
local function remove_overdue(clock)
  local left = BATCH
  if settings.table.ttl_s then
    for _, index in ipairs({ 'train', 'eval' }) do
      while left > 0 do
        local sequence = redis.call('ZRANGE', key(index), 0, 0)[1]
        local inserted_s = sequence and tonumber(redis.call('HGET', group_key(sequence), 'inserted_s'))
        if not sequence or inserted_s > tonumber(now) - settings.table.ttl_s then
          break
        end
        remove(sequence, 'ttl')
        left = left - 1
      end
    end
  end
  if settings.table.max_age_updates then
    local newest_closed = integer(clock - settings.table.max_age_updates - 1)
    local closed = redis.call('ZRANGEBYSCORE', key('ages'), '-inf', newest_closed, 'LIMIT', 0, left)
    for _, sequence in ipairs(closed) do
      remove(sequence, 'age')
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
  return tonumber(redis.call('HGET', key('stats'), 'latest_version') or -1)
end

-- The content of the stored or removed group of this id; nil = a new id.
local function known_content(group_id)
  local sequence = redis.call('HGET', key('sequences'), group_id)
  if sequence then
    return redis.call('HGET', group_key(sequence), 'content')
  end
  local removed_s = redis.call('ZSCORE', key('remembered_at'), group_id)
  if removed_s and tonumber(removed_s) > tonumber(now) - settings.table.dedup_window_s then
    return redis.call('HGET', key('remembered'), group_id)
  end
  return nil
end

-- outcomes.refused_for_version; `facts` are those of a group or a trajectory
local function refused_for_version(facts, latest)
  local newest, oldest, max_age = tonumber(facts.newest), tonumber(facts.oldest), settings.table.max_age_updates
  if newest and newest > latest then
    return { 'version', facts.newest, integer(latest) }
  elseif facts.split ~= 'train' then
    return nil
  elseif max_age and oldest and latest - oldest > max_age then
    return { 'stale', facts.oldest, integer(latest - oldest), integer(max_age) }
  elseif facts.foreign and settings.table.foreign_share == 0 then
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
