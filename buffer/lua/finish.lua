-- The end of every script: run its `main`, then write what it changed in Lua. See common.lua.

local answer = main()

local packed = {}
for member in pairs(changed_facts) do
  local group = facts[member]
  packed[#packed + 1] = member
  packed[#packed + 1] = struct.pack(
    '<dddddB', group.weight, group.version, group.bytes, group.uses, group.used_s, group.train and 1 or 0)
end
call_many('HSET', 'facts', packed)

local moved = {}
for field in pairs(changed_line) do
  moved[#moved + 1], moved[#moved + 2] = field, line[field]
end
call_many('HSET', 'weighted_line', moved)

for field, change in pairs(stat_changes) do
  if change ~= 0 then
    redis.call('HINCRBY', key('stats'), field, integer(change))
  end
end
for histogram, changes in pairs(bucket_changes) do
  for bucket, change in pairs(changes) do
    if change ~= 0 and redis.call('HINCRBY', key(histogram), bucket, change) == 0 then
      redis.call('HDEL', key(histogram), bucket) -- empty buckets leave
    end
  end
end
return answer
