-- Keep trained groups, newest last, and drop the oldest beyond the bounds.
-- KEYS[1]  zset    group_id by number of arrival
-- KEYS[2]  hash    group_id -> msgpack TrainedGroup
-- KEYS[3]  hash    group_id -> JSON TrainedSummary
-- KEYS[4]  hash    arrived: number of the last arrival; bytes: of the bodies
-- ARGV: max groups, max bytes, then group_id, body, summary of each group, oldest first
local max_groups, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local function forget(id)
  local size = redis.call("HSTRLEN", KEYS[2], id)
  if size == 0 then
    return
  end
  redis.call("HINCRBY", KEYS[4], "bytes", -size)
  redis.call("ZREM", KEYS[1], id)
  redis.call("HDEL", KEYS[2], id)
  redis.call("HDEL", KEYS[3], id)
end
for i = 3, #ARGV, 3 do
  local id, body, summary = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  forget(id)
  redis.call("ZADD", KEYS[1], redis.call("HINCRBY", KEYS[4], "arrived", 1), id)
  redis.call("HSET", KEYS[2], id, body)
  redis.call("HSET", KEYS[3], id, summary)
  redis.call("HINCRBY", KEYS[4], "bytes", #body)
end
while redis.call("ZCARD", KEYS[1]) > max_groups or tonumber(redis.call("HGET", KEYS[4], "bytes")) > max_bytes do
  forget(redis.call("ZRANGE", KEYS[1], 0, 0)[1])
end
return redis.call("ZCARD", KEYS[1])
