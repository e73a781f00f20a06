-- Give stored train groups new weights or priorities. The schema is in common.lua.
--
-- ARGV[3] cmsgpack list of {group_id, weight (priority where the weighting ranks), lot (exponential, mean 1)}
-- Returns how many of the ids are stored train groups.

local function main()
  work_in_full_memory()
  local members, posted = {}, {}
  for _, entry in ipairs(cmsgpack.unpack(ARGV[3])) do
    local member = redis.call('HGET', key('sequences'), entry[1])
    if member then
      members[#members + 1], posted[#posted + 1] = member, entry
    end
  end
  read_facts(members)
  local updated = 0
  for i, member in ipairs(members) do
    if facts[member][TRAIN] == 1 then
      reweigh(member, posted[i][2], posted[i][3])
      if posted[i][2] > line.top then
        set_line('top', posted[i][2])
      end
      updated = updated + 1
    end
  end
  return updated
end
