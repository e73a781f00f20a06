-- Return one page of stored groups. The schema is in common.lua. Cost: O(limit x log n).
--
-- ARGV[3] cmsgpack {indexes: names of the zsets to walk together, cursor (a sequence number as a string, absent = the
--         first page), limit, oldest_first (bool), group_id (absent, or the only group wanted)}
-- Returns cmsgpack {latest version, {member, version (-1 = none), uses, bytes, fields of `about`...}...}: one group more
-- than `limit` when there is another page.

local query = cmsgpack.unpack(ARGV[3])

local function found()
  if query.group_id then
    return { redis.call('HGET', key('sequences'), query.group_id) or nil }
  end
  local members = {}
  for _, index in ipairs(query.indexes) do
    local command, first, last = 'ZREVRANGEBYSCORE', query.cursor and '(' .. query.cursor or '+inf', '-inf'
    if query.oldest_first then
      command, first, last = 'ZRANGEBYSCORE', query.cursor and '(' .. query.cursor or '-inf', '+inf'
    end
    for _, member in ipairs(redis.call(command, key(index), first, last, 'LIMIT', 0, query.limit + 1)) do
      members[#members + 1] = member
    end
  end
  table.sort(members, function(a, b)
    if query.oldest_first then
      return a < b
    end
    return a > b
  end)
  return members
end

local function main()
  local reply, members = { latest_version() }, found()
  read_facts(members)
  for i = 1, math.min(#members, query.limit + 1) do
    local member = members[i]
    local group = facts[member]
    reply[i + 1] = { member, group[VERSION], group[USES], group[BYTES],
      unpack(cmsgpack.unpack(redis.call('HGET', key('about'), member))) }
  end
  return cmsgpack.pack(reply)
end
