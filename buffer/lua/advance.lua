-- Record the latest published version, which never goes back, and remove what the age gate closes.
-- The schema is in common.lua.
--
-- ARGV[3] the version
-- Returns 1 when more overdue groups may be left: call again.

local function main()
  work_in_full_memory()
  if tonumber(ARGV[3]) > latest_version() then
    set_stat('latest_version', ARGV[3])
  end
  return remove_overdue(latest_version()) and 1 or 0
end
