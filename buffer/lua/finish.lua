-- The end of every script: run its `main`, then write what it changed in Lua. See common.lua.

local answer = main()

flush()

local packed, count = {}, 1
for member in pairs(changed_facts) do
  packed[count], packed[count + 1] = member, struct.pack(FACTS, unpack(facts[member], 1, TRAIN))
  count = count + 2
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
    if change ~= 0 and redis.call('HINCRBY', key(histogram), integer(bucket), change) == 0 then
      redis.call('HDEL', key(histogram), integer(bucket)) -- empty buckets leave
    end
  end
end
return answer
