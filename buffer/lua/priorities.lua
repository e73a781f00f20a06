-- Give stored train groups new weights or priorities. The schema is in common.lua.
--
-- ARGV[3] cmsgpack list of {group_id, weight (priority where the weighting ranks), lot (exponential, mean 1)}; the
--         numbers are decimal strings
-- Returns how many of the ids are stored train groups.

work_in_full_memory()
local updated = 0
for _, entry in ipairs(cmsgpack.unpack(ARGV[3])) do
  local sequence = redis.call('HGET', key('sequences'), entry[1])
  if sequence and redis.call('HGET', group_key(sequence), 'split') == 'train' then
    reweigh(sequence, entry[2], tonumber(entry[3]))
    if tonumber(entry[2]) > line.top then
      set_line('top', tonumber(entry[2]))
    end
    updated = updated + 1
  end
end
return updated
