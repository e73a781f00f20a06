-- Return one page of stored groups. The schema is in common.lua. Cost: O(limit x log n).
--
-- ARGV[3] JSON {indexes: names of the zsets to walk together, cursor (a sequence number as a string, absent = the first
--         page), limit, oldest_first (bool), group_id (absent, or the only group wanted)}
-- Returns {latest version, {sequence, field...}...}: one group more than `limit` when there is another page.

local query = cjson.decode(ARGV[3])

local sequences = { query.group_id and redis.call('HGET', key('sequences'), query.group_id) or nil }
for _, index in ipairs(query.indexes) do
  local command, first, last = 'ZREVRANGEBYSCORE', query.cursor and '(' .. query.cursor or '+inf', '-inf'
  if query.oldest_first then
    command, first, last = 'ZRANGEBYSCORE', query.cursor and '(' .. query.cursor or '-inf', '+inf'
  end
  for _, sequence in ipairs(redis.call(command, key(index), first, last, 'LIMIT', 0, query.limit + 1)) do
    sequences[#sequences + 1] = sequence
  end
end
table.sort(sequences, function(a, b)
  if query.oldest_first then
    a, b = b, a
  end
  return tonumber(a) > tonumber(b)
end)

local reply = { integer(latest_version()) }
for i = 1, math.min(#sequences, query.limit + 1) do
  local sequence = sequences[i]
  local fields = redis.call('HMGET', group_key(sequence), 'group_id', 'prompt_id', 'split', 'inserted_s', 'version',
    'uses', 'trajectories', 'tokens', 'bytes', 'reward_sum')
  reply[#reply + 1] = { sequence, unpack(fields) }
end
return reply
